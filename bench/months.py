#!/usr/bin/env python3
"""What rollups take on disk as months go by: a year of 2,000 requests a day, attached with the reports, a month inserted and
merged at a time. After each month and a VACUUM, with indexes:

    spend log     all that was ever written, as it is without retention
    by default    the five rollups that LiteLLM's views need, which keep every day for ever
    reports       the three hourly rollups, which are made when asked for, with all their hours
    …, hours for 90 days  the same with litellm_spend.hourly_retention = 90 at the end of each month

The rows are those of bench/spend_rows.sql: 200 keys, 12 models, 2,000 customers, half of whose requests name one.
"""

import harness
import whole
from harness import QUICK, Results, say

ROWS = 24_000 if QUICK else 720_000
MONTHS = 12
DAYS = 30 * MONTHS
SIZES = {
    "spend log": "relname = 'LiteLLM_SpendLogs'",
    "by default": "relname LIKE 'daily\\_spend%\\_rollup'",
    "reports": "relname LIKE 'hourly\\_usage%\\_rollup'",
}


KEPT = 90


def keep_hours(session, days):
    """As the worker does once a minute; 0 keeps all."""
    session.run(f"ALTER SYSTEM SET litellm_spend.hourly_retention = {days}")
    session.run("SELECT pg_reload_conf()")
    if days:
        done = f"SELECT hours_from >= CURRENT_DATE - {days} FROM litellm_spend.source"
        while session.value(done) != "t":
            session.run("SELECT spend_rollup_run()")


def year(results, kept):
    with harness.clone(harness.loaded("year", ROWS, days=DAYS), "months") as (session,):
        session.run('CREATE SCHEMA year; CREATE TABLE year.log AS TABLE "LiteLLM_SpendLogs"; TRUNCATE "LiteLLM_SpendLogs"')
        keep_hours(session, 0)
        harness.attach(session, reports=True)
        for month in range(1, MONTHS + 1):
            ages = [f"CURRENT_DATE - {DAYS - 30 * days}" for days in (month - 1, month)]
            if month == MONTHS:
                ages[1] = "'infinity'"  # what has come of today
            session.run(f"""INSERT INTO "LiteLLM_SpendLogs" SELECT * FROM year.log
                            WHERE "startTime" >= {ages[0]} AND "startTime" < {ages[1]}""")
            harness.merge(session)
            if kept:
                keep_hours(session, kept + DAYS - 30 * month)
            for variant, which in SIZES.items():
                if kept and variant != "reports":
                    continue
                variant += f", hours for {kept} days" if kept else ""
                size = harness.size(session, which)
                results.add(1, f"month {month:02}: {variant}", "disk", size / 2**20, "MiB")
                say(f"month {month}: {variant} {size / 2**20:.1f} MiB")
        whole.verify(session, reports=True)
        session.run("ALTER SYSTEM RESET litellm_spend.hourly_retention")
        session.run("SELECT pg_reload_conf()")


def main():
    results = Results("months")
    for kept in (0, KEPT):
        year(results, kept)
    harness.drop("year")
    results.write()


if __name__ == "__main__":
    main()

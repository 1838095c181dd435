#!/usr/bin/env python3
"""What it costs to be rid of the oldest day, 100,000 rows of 2 kB with LiteLLM's indexes. Three databases with the same eight
days lose one a run, the warm-up included:

    drop            the spend log partitioned by days, attached: one round of maintenance drops the partition
    row by row      plain, attached: rounds of maintenance delete, then VACUUM
    LiteLLM         plain, without us: its clean-up job's DELETE of 1,000 rows at a time, a transaction each, until there are
                    none (but not its pause of 0.1 s after each), then VACUUM

    time            at the client, commits and VACUUM included
    wal             of the whole server; a checkpoint before each measurement, as days pass until a row expires
    given back      to the operating system: the tables' files, with indexes and TOAST, before less after

Maintenance is told the time (litellm_spend.maintain_at), retention is a day, no worker runs. A day's rows are contiguous in
the file, as they are written. Eight days are few: VACUUM goes through the indexes of all days.
"""

import datetime

import capture
import harness
from harness import QUICK, Results, Session, say

RUNS = 2 if QUICK else 5
DAYS = RUNS + 3
DAY_ROWS = capture.BASE
FIRST = datetime.date.today() - datetime.timedelta(days=DAYS + 1)
BATCH = 1000

COUNT = 'SELECT count(*) FROM "LiteLLM_SpendLogs"'
BYTES = r"SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relname LIKE 'LiteLLM\_SpendLogs%' AND relkind = 'r'"
VACUUM = 'VACUUM "LiteLLM_SpendLogs"'
DELETE = f"""
DELETE FROM "LiteLLM_SpendLogs" WHERE ("request_id", "startTime") IN (
    SELECT "request_id", "startTime" FROM "LiteLLM_SpendLogs" WHERE "startTime" < $1::timestamptz LIMIT {BATCH})"""


def load():
    """The base's rows once a day, at the time of day that they have."""
    if harness.exists("expire_days"):
        return "expire_days"
    harness.on_server(f"CREATE DATABASE expire_days TEMPLATE {harness.loaded('base', capture.BASE)}")
    session = Session("expire_days")
    session.run('CREATE TABLE base AS SELECT * FROM "LiteLLM_SpendLogs"; TRUNCATE "LiteLLM_SpendLogs"')
    columns = ", ".join(f'"{c}"' for c in capture.COLUMNS)
    for i in range(DAYS):
        day = FIRST + datetime.timedelta(days=i)
        values = {
            **{c: f'"{c}" + (date \'{day}\' - date_trunc(\'day\', "startTime"))' for c in capture.TIMES},
            **{c: f"\"{c}\" || '-{i}'" for c in ("request_id", "session_id", "litellm_call_id")},
        }
        values = ", ".join(values.get(c, f'"{c}"') for c in capture.COLUMNS)
        session.run(f'INSERT INTO "LiteLLM_SpendLogs" ({columns}) SELECT {values} FROM base ORDER BY "startTime"::time')
    session.run('DROP TABLE base')
    session.run('VACUUM (ANALYZE) "LiteLLM_SpendLogs"')
    session.close()
    return "expire_days"


def maintain(session, day):
    """A round as of the moment when all of the day has expired."""
    now = day + datetime.timedelta(days=2)
    rounds = session.rows(f"SELECT action, partition, rows FROM litellm_spend.maintain_at(NULL, '{now}')")
    return [(action.decode(), partition.decode(), int(rows)) for action, partition, rows in rounds]


def drop(session, day):
    done = maintain(session, day)[:-1]
    if done != [("dropped", f"LiteLLM_SpendLogs_p{day:%Y%m%d}", DAY_ROWS)]:
        raise RuntimeError(f"maintenance did something else: {done}")


def row_by_row(session, day):
    while done := maintain(session, day):
        if done[0][0] != "deleted":
            raise RuntimeError(f"maintenance did something else: {done}")
    session.run(VACUUM)


def litellm(session, day):
    cutoff = str(day + datetime.timedelta(days=1)).encode()
    while session.execute_unprepared(DELETE, [cutoff]).command_tuples > 0:
        pass
    session.run(VACUUM)


EXPIRE = {"drop": drop, "row by row": row_by_row, "LiteLLM": litellm}


def one_run(results, run, variant, session, observer):
    day = FIRST + datetime.timedelta(days=run)
    session.run('ANALYZE "LiteLLM_SpendLogs"')  # as autovacuum would, and so that the round has nothing else to do
    rows, size = int(session.value(COUNT)), int(session.value(BYTES))
    observer.run("CHECKPOINT")
    meter = capture.Meter(session, observer)
    with meter.running():
        EXPIRE[variant](session, day)
    gone, left = rows - int(session.value(COUNT)), session.value('SELECT min("startTime")::date FROM "LiteLLM_SpendLogs"')
    if gone != DAY_ROWS or left != str(day + datetime.timedelta(days=1)):
        raise RuntimeError(f"{variant}: {gone} rows went instead of the {DAY_ROWS} of {day}; the oldest left are of {left}")
    given_back = size - int(session.value(BYTES))
    results.add(run, variant, "time", meter.wall / 1e9, "s")
    results.add(run, variant, "cpu", meter.cpu / 1e9, "s")
    results.add(run, variant, "wal", meter.wal / 1e6, "MB")
    results.add(run, variant, "given back", given_back / 1e6, "MB")
    results.write()
    if run > 0:
        say(f"run {run} of {RUNS}: {variant}: {meter.wall / 1e9:.3f} s, {meter.wal / 1e6:.1f} MB of WAL,"
            f" {given_back / 1e6:.1f} MB given back")


def main():
    results = Results("expire")
    with harness.clone(load(), "expire_drop", "expire_rows", "expire_litellm") as (dropping, deleting, plain):
        harness.partition(dropping, 0)
        for session in (dropping, deleting):
            session.run("SET timezone = 'UTC'")
            harness.attach(session)
            harness.end_worker(session)
            session.run("SELECT spend_partition_set(precreate => 0, retention => '1 day')")
        plain.run("SET timezone = 'UTC'")
        observer = Session("postgres")
        variants = list(zip(EXPIRE, (dropping, deleting, plain)))
        for run in range(RUNS + 1):
            for variant, session in harness.rotated(variants, run):
                one_run(results, run, variant, session, observer)
        observer.close()
    harness.drop("expire_days")


if __name__ == "__main__":
    main()

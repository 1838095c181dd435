#!/usr/bin/env python3
"""A dashboard's query on a distributed rollup of ten million groups: the views of one site by minute, as the coordinator's
client sees it, on a cluster of Citus on this machine, a coordinator and two nodes.

    by page       a rollup of site, page and minute, in the order in which the article has them
    by minute     the same of site, minute and page: the minutes of a site are side by side in the primary key
    all           a question of 100 minutes, all that there is of a site; with 100 pages, 10,000 groups
    last minutes  of the last ten

Each is asked of the rollup's table and of the live view, which has a tail of 100 rows. The page views come in the order of
time and are merged by the worker beside that, so that groups are in the tables as they are in real life; all tables are
vacuumed afterwards, as autovacuum does. A run asks for 50 sites, one after the other, and counts their median and the slowest.

Where the server has no Citus it says so and measures nothing. ROWS=1000000 bench/run citus_dashboard tries it with fewer.
"""

import os
import statistics
import time

import citus
import harness
import pipeline
from harness import QUICK, Results, say

RUNS = 2 if QUICK else 7
PAGES = 20 if QUICK else 100  # of each site
MINUTES = 100
GROUPS = int(os.environ.get("ROWS", 200_000 if QUICK else 10_000_000))
SITES = GROUPS // PAGES // MINUTES
BATCH = 10  # minutes inserted by a statement
TAIL = 100
ASKED = 50  # sites
LAST = 10  # minutes

BEGIN = "timestamptz '2026-01-10 00:00 UTC'"

# One view for each page and minute.
INSERT = f"""
    INSERT INTO page_views (site_id, path, client_ip, view_time)
    SELECT page % {SITES}, '/page/' || page / {SITES}, '127.0.0.1', {BEGIN} + minute * interval '1 minute' + random() * interval '59 seconds'
    FROM generate_series({{first}}, {{first}} + {BATCH - 1}) AS minute, generate_series(0, {SITES * PAGES - 1}) AS page
"""
INSERT_TAIL = f"""
    INSERT INTO page_views (site_id, path, client_ip, view_time)
    SELECT i * {max(SITES // TAIL, 1)} % {SITES}, '/page/0', '127.0.0.1', {BEGIN} + interval '{MINUTES - 1} minutes'
    FROM generate_series(1, {TAIL}) AS i
"""
MINUTE = "date_trunc('minute', view_time) AS minute"
ROLLUPS = {"by page": ("site_id", "path", MINUTE), "by minute": ("site_id", MINUTE, "path")}
QUESTIONS = {"all": 0, "last minutes": MINUTES - LAST}  # from which minute on
DASHBOARD = f"""
    SELECT minute, sum(view_count) FROM {{relation}}
    WHERE site_id = {{site}} AND minute >= {BEGIN} + interval '{{first}} minutes' GROUP BY minute ORDER BY minute
"""


def name_of(rollup):
    return rollup.replace(" ", "_")


def fill(session):
    start = time.monotonic()
    for rollup, dimensions in ROLLUPS.items():
        dimensions = ", ".join(f"$${dimension}$$" for dimension in dimensions)
        session.run(f"SELECT spend_rollup_create('{name_of(rollup)}', 'page_views', ARRAY[{dimensions}],"
                    " ARRAY['count(*) AS view_count'])")
    pipeline.Ours.set_interval(session, "1s")
    for first in range(0, MINUTES, BATCH):
        session.run(INSERT.format(first=first))
    inserted = time.monotonic() - start
    # Known to be merged on all nodes, too: what is not would be read again by the live view.
    harness.wait_until(session, f"SELECT bool_and(committed_to = {GROUPS}) FROM litellm_spend.rollup", 3600, 0.5)
    pipeline.Ours.set_interval(session, "1h")
    say(f"{GROUPS:,} groups in each of {len(ROLLUPS)} rollups: inserted in {inserted:.0f} s, merged in {time.monotonic() - start:.0f} s")
    session.run("VACUUM (ANALYZE) page_views")
    for rollup in ROLLUPS:
        found = int(session.value(f"SELECT count(*) FROM litellm_spend.{name_of(rollup)}_rollup"))
        if found != GROUPS:
            raise RuntimeError(f"{rollup} has {found} groups instead of {GROUPS}")
        for table in ("rollup", "merged"):
            session.run(f"VACUUM (ANALYZE) litellm_spend.{name_of(rollup)}_{table}")
    session.run("CHECKPOINT")
    session.run(INSERT_TAIL)


def check(session):
    """The tail is what it was, and the answers are right."""
    tails = session.rows("SELECT tail_rows FROM spend_rollup_status")
    if any(tail != (str(TAIL).encode(),) for tail in tails):
        raise RuntimeError(f"the tails have {tails} rows instead of {TAIL}")
    for rollup in ROLLUPS:
        for relation, more in ((f"{name_of(rollup)}_rollup", 0), (name_of(rollup), TAIL)):
            shown = int(session.value(f"SELECT sum(view_count) FROM litellm_spend.{relation}"))
            if shown != GROUPS + more:
                raise RuntimeError(f"{relation} shows {shown} views instead of {GROUPS + more}")


def ask(session, relation, first):
    """Milliseconds, of each site."""
    sites = [site * max(SITES // ASKED, 1) for site in range(ASKED)]
    return [session.timed(DASHBOARD.format(relation=relation, site=site, first=first)) for site in sites]


def one_run(results, run, session):
    shown = []
    for rollup in harness.rotated(list(ROLLUPS), run):
        for question, first in QUESTIONS.items():
            variant = f"{rollup}, {question}"
            for metric, relation in (("table", f"{name_of(rollup)}_rollup"), ("live", name_of(rollup))):
                times = ask(session, f"litellm_spend.{relation}", first)
                results.add(run, variant, metric, statistics.median(times), "ms")
                results.add(run, variant, f"{metric}, slowest", max(times), "ms")
                shown.append(f"{variant}, {metric} {statistics.median(times):.2f} ms")
    results.write()
    say(f"run {run} of {RUNS}: " + "; ".join(shown) if run else "warm")


def main():
    if not citus.has_citus():
        say("SKIPPED: this server has no Citus")
        return
    results, environment = Results("citus_dashboard"), dict(os.environ)
    servers = citus.Servers(3, "citus,litellm_spend")
    try:
        session = citus.make_database(servers, citus=True)
        fill(session)
        for run in range(RUNS + 1):
            one_run(results, run, session)
        check(session)
        session.close()
    finally:
        servers.stop()
        os.environ.update(environment)


if __name__ == "__main__":
    main()

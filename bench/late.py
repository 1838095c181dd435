#!/usr/bin/env python3
"""Rows that come late, and a live view of which much is not merged yet.

Two million page views are merged into 100,000 groups by site, path and minute, and into a hundred by site and day. Then

    late    1,000 rows over ten old minutes are inserted: until they are visible, and until they are merged
    tail    a million rows are inserted and not merged: the live views, all of them and one site

    article  the statement of merge.py in its function's window; what it has not merged is not visible
    ours     declared rollups and spend_rollup_run()
    raw      the GROUP BY over the raw rows, which both are to equal

No worker; BRIN index on the sequence, autovacuum off. Milliseconds at the client, unprepared.
"""

import harness
import merge
from harness import QUICK, Results, Session, say

RUNS = 2 if QUICK else 5
ROWS = 40_000 if QUICK else 2_000_000
LATE = 1_000
TAIL = 20_000 if QUICK else 1_000_000
LOOKS = 3 if QUICK else 7

COLUMNS = """
INSERT INTO page_views (site_id, path, client_ip, view_time)
SELECT kind % 100, '/page/' || kind / 100, '127.0.0.1', {time}
FROM (SELECT n, n * 7919::bigint % 1000 AS kind FROM generate_series(1, {rows}) AS n) AS numbered"""
OLD = COLUMNS.format(rows=LATE, time="timestamptz '2026-01-10 00:00 UTC' + interval '1 minute' * (n % 10)")
NEW = COLUMNS.format(rows=TAIL, time=f"timestamptz '2026-01-11 00:00 UTC' + interval '{6 * 2_000_000 // ROWS} milliseconds' * n")

BY_MINUTE, BY_DAY = merge.BY_MINUTE, merge.BY_DAY
SHOWN = {
    "by day": (BY_DAY, "SELECT * FROM {}"),
    "by day, one site": (BY_DAY, "SELECT * FROM {} WHERE site_id = 7"),
    "by minute, one site": (BY_MINUTE, "SELECT * FROM {} WHERE site_id = 7"),
    "by minute": (BY_MINUTE, "SELECT count(*), sum(view_count) FROM {}"),
}


def view(rollup):
    return f"litellm_spend.{rollup.name}"


def raw(rollup):
    return f"({rollup.select} FROM page_views GROUP BY {rollup.group}) AS raw"


def total(session, relation):
    return int(session.value(f"SELECT sum(view_count) FROM {relation}"))


def merge_article(session):
    """From the last number of its bookkeeping on, as the article's function does."""
    last = int(session.value("SELECT last_value FROM page_views_view_id_seq"))
    took = sum(session.timed(rollup.upsert.format(merge_article.merged + 1, last)) for rollup in (BY_MINUTE, BY_DAY))
    merge_article.merged = last
    return took


def merge_ours(session):
    return session.timed("SELECT * FROM spend_rollup_run()")


def late(results, run, session):
    before = total(session, view(BY_DAY))
    inserted = session.timed(OLD)
    if total(session, view(BY_DAY)) != before + LATE:
        raise RuntimeError("late rows are not visible at once")
    variants = [("article", merge_article), ("ours", merge_ours)]
    for name, run_it in harness.rotated(variants, run):
        merged = inserted + run_it(session)
        results.add(run, f"late: {name}", "visible", inserted if name == "ours" else merged, "ms")
        results.add(run, f"late: {name}", "merged", merged, "ms")
        say(f"run {run} of {RUNS}: late: {name}: merged after {merged:.1f} ms")


def tail(results, run, session):
    session.run(NEW)
    for what, (rollup, query) in SHOWN.items():
        for name, relation in harness.rotated([("ours", view(rollup)), ("raw", raw(rollup))], run):
            ms = session.median_ms(query.format(relation), LOOKS if name == "ours" else 1)
            results.add(run, f"tail {what}: {name}", "client", ms, "ms")
            say(f"run {run} of {RUNS}: tail {what}: {name}: {ms:.1f} ms")
    if total(session, view(BY_MINUTE)) != int(session.value("SELECT count(*) FROM page_views")):
        raise RuntimeError("the live view is not exact")
    merge_article(session)
    merge_ours(session)
    session.run("VACUUM page_views")  # else the index says nothing of the new rows, and all are read in each window
    for rollup in (BY_MINUTE, BY_DAY):
        if session.rows(rollup.fingerprint.format(rollup.name)) != session.rows(rollup.fingerprint.format(f"{view(rollup)}_rollup")):
            raise RuntimeError(f"{rollup.name}: not the same rows")


def main():
    results = Results("late")
    merge.ROWS = ROWS // 2  # a half of them
    harness.drop("late")
    harness.on_server("CREATE DATABASE late")
    session = Session("late")
    merge.prepare(session)
    merge_article.merged = 0
    merge_article(session)
    for rollup in (BY_MINUTE, BY_DAY):
        session.run(rollup.declare)
    session.run("CALL spend_backfill('page_views')")
    session.run("VACUUM ANALYZE")
    for run in range(1, RUNS + 1):
        late(results, run, session)
        tail(results, run, session)
        results.write()
    session.close()
    harness.drop("late")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What a merge costs, against the statement that readers of "Scalable incremental data aggregation on Postgres and
Citus" (2018) would write: INSERT … SELECT … GROUP BY … ON CONFLICT DO UPDATE, into a table with a primary key.

    plain             the article's statement, all rows at once
    plain, windows    the same in ten windows, a transaction each
    ours              a declared rollup, CALL spend_backfill() with litellm_spend.max_window of a tenth of the rows
    ours, one window  the same with all rows in one

    new               10 million narrow page views, in order of time, into an empty rollup of a million groups: by site,
                      path and minute
    conflicting       the next 10 million, of the same groups
    100 groups        10 million by site and day, into an empty rollup

ROWS=1000000 bench/run merge tries it with fewer. No worker; BRIN index on the sequence, autovacuum off, a
checkpoint before each measurement.
"""

import os
import time

import harness
from harness import QUICK, Results, Session, say

RUNS = 2 if QUICK else 5
ROWS = int(os.environ.get("ROWS", 200_000 if QUICK else 10_000_000))
WINDOWS = 10
WINDOW = ROWS // WINDOWS


def page_views():
    """A thousand groups a minute, ten rows each; the second half has the times of the first."""
    return f"""
CREATE TABLE page_views (
    site_id int, path text, client_ip inet, view_time timestamptz DEFAULT now(), view_id bigserial);
INSERT INTO page_views (site_id, path, client_ip, view_time)
SELECT kind % 100, '/page/' || kind / 100, '127.0.0.1',
       timestamptz '2026-01-10 00:00 UTC' + interval '6 milliseconds' * (n % {ROWS})
FROM (SELECT n, n * 7919::bigint % 1000 AS kind FROM generate_series(0, {2 * ROWS} - 1) AS n) AS numbered;
CREATE INDEX view_id_idx ON page_views USING BRIN (view_id);
"""


class Rollup:
    """One shape of rollup, in plain SQL and declared."""

    def __init__(self, name, dimensions, types):
        self.name = name
        names = [d.split()[-1] for d in dimensions]
        expressions = [d.split(" AS ")[0] for d in dimensions]
        keys = ", ".join(names)
        columns = ", ".join(map(" ".join, zip(names, types)))
        self.create = f"CREATE TABLE {name} ({columns}, view_count bigint, PRIMARY KEY ({keys}))"
        self.upsert = (
            f"INSERT INTO {name} ({keys}, view_count) SELECT {', '.join(expressions)}, count(*) FROM page_views"
            f" WHERE view_id BETWEEN {{}} AND {{}} GROUP BY {', '.join(expressions)}"
            f" ON CONFLICT ({keys}) DO UPDATE SET view_count = {name}.view_count + EXCLUDED.view_count")
        self.select = f"SELECT {', '.join(dimensions)}, count(*) AS view_count"
        self.group = ", ".join(expressions)
        texts = ", ".join("'" + d.replace("'", "''") + "'" for d in dimensions)
        self.declare = (
            f"SELECT spend_rollup_create('{name}', 'page_views', ARRAY[{texts}], ARRAY['count(*) AS view_count'])")
        self.fingerprint = f"SELECT count(*), sum(hash_record_extended(ROW({keys}, view_count), 0)) FROM {{}}"


BY_MINUTE = Rollup("page_views_1min", ["site_id", "path", "date_trunc('minute', view_time) AS period_start"],
                   ["int", "text", "timestamptz"])
BY_DAY = Rollup("page_views_daily", ["site_id", "date_trunc('day', view_time) AS period_start"], ["int", "timestamptz"])

# (rollup, names of the measurements of its first rows, of its next)
CASES = [(BY_MINUTE, ["new", "conflicting"]), (BY_DAY, ["100 groups"])]


class Plain:
    """The article's statement, in windows."""

    def __init__(self, name, window):
        self.name, self.window = name, window

    def start(self, session, rollup):
        session.run(f"TRUNCATE {rollup.name}")

    def merge(self, session, rollup, half):
        first = half * ROWS + 1
        for start in range(first, first + ROWS, self.window):
            session.run(rollup.upsert.format(start, start + self.window - 1))

    def end(self, session, rollup):
        return session.rows(rollup.fingerprint.format(rollup.name))


class Ours:
    """A declared rollup. What the sequence has not reached is not safe to merge: it is set to the end of each half."""

    def __init__(self, name, window):
        self.name, self.window = name, window

    def start(self, session, rollup):
        session.run(f"SELECT setval('page_views_view_id_seq', {ROWS})")
        session.run(rollup.declare)
        session.run(f"SET litellm_spend.max_window = {self.window}")

    def merge(self, session, rollup, half):
        if half > 0:
            session.run(f"SELECT setval('page_views_view_id_seq', {(half + 1) * ROWS})")
        session.run("CALL spend_backfill('page_views')")

    def end(self, session, rollup):
        fingerprint = session.rows(rollup.fingerprint.format(f"litellm_spend.{rollup.name}_rollup"))
        session.run(f"SELECT spend_rollup_drop('{rollup.name}')")
        return fingerprint


VARIANTS = [Plain("plain", ROWS), Ours("ours", WINDOW), Plain("plain, windows", WINDOW), Ours("ours, one window", ROWS)]


def measure(results, run, session, variant, case, rollup, half):
    session.run("CHECKPOINT")
    cpu, start = session.cpu_ns(), time.perf_counter_ns()
    variant.merge(session, rollup, half)
    seconds, cpu = (time.perf_counter_ns() - start) / 1e9, (session.cpu_ns() - cpu) / 1e9
    for metric, value, unit in (("time", seconds, "s"), ("cpu", cpu, "s"), ("rate", ROWS / seconds, "rows/s")):
        results.add(run, f"{case}: {variant.name}", metric, value, unit)
    results.write()
    say(f"run {run} of {RUNS}: {case}: {variant.name} {seconds:.2f} s, {ROWS / seconds:,.0f} rows/s")


def one_run(results, run, session):
    for rollup, cases in CASES:
        ends = []
        for variant in harness.rotated(VARIANTS, run):
            variant.start(session, rollup)
            for half, case in enumerate(cases):
                measure(results, run, session, variant, case, rollup, half)
            ends.append(variant.end(session, rollup))
        if any(end != ends[0] for end in ends):
            raise RuntimeError(f"{rollup.name}: not all variants made the same rows: {ends}")


def prepare(session):
    session.run("SET client_min_messages = warning; SET timezone = 'UTC'")  # ours are the days of UTC
    harness.create_extension(session)
    harness.end_worker(session)
    start = time.monotonic()
    session.run(page_views())
    session.run("VACUUM (ANALYZE) page_views")
    for rollup, _ in CASES:
        session.run(rollup.create)
    say(f"page_views: {2 * ROWS:,} rows in {time.monotonic() - start:.0f} s")


def main():
    results = Results("merge")
    harness.drop("merge")
    harness.on_server("CREATE DATABASE merge")
    session = Session("merge")
    prepare(session)
    for run in range(1, RUNS + 1):  # no warm-up: the rows have just been read
        one_run(results, run, session)
    session.close()
    harness.drop("merge")


if __name__ == "__main__":
    main()

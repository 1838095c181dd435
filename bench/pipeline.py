#!/usr/bin/env python3
"""The pipeline of "Scalable incremental data aggregation on Postgres and Citus" (2018) on one node: two connections COPY
page views as fast as they can, and a third process merges them into views by page and minute, until all is merged.

    article       the article's tables and functions; its own session calls do_page_view_aggregation() in a loop
    ours          a declared rollup of the same dimensions, merged by the worker at its default pace
    ingest alone  nobody merges

and, where the server has them, what one could take instead, with the same result:

    pg_incremental  its pipeline with the article's INSERT, called in a loop by a session of its own: no schedule holds it up
    pg_ivm          its view, which each COPY maintains before it ends: what is ingested is merged. One COPY at a time does so,
                    the other waits. It gets fewer rows, 10,000 a COPY. Version 1.15 looks for its groups by "equal, or both
                    NULL", for which neither a hash join nor all columns of the index can be used: a COPY takes longer the
                    more groups there are, and by the square of those that it touches
    TimescaleDB     a continuous aggregate of a hypertable, refreshed in a loop by a session of its own. A refresh computes
                    every minute anew that has new rows. Here all ten have; rows that come in the order of time would cost
                    it less. Each refresh begins only when the rows numbered so far are committed: else nobody could say
                    what it has merged

Each on a new database, in turns. The views are of 100,000 pages of 1,000 sites at random times of ten minutes: a million
groups, which every COPY of 100,000 rows may touch. The server reads the rows from files, so that no client takes part.

Lag is how long ago the oldest row that is not merged yet was numbered, twice a second; pipeline_lag.csv keeps it, with what
had been numbered and merged. Merge CPU and memory, without shared buffers, are of the merging process; CPU is of that one and
of the two that COPY. ROWS=2000000 bench/run pipeline tries it with fewer.
"""

import csv
import os
import threading
import time
from pathlib import Path

import harness
from harness import QUICK, Results, Session, say

RUNS = 2 if QUICK else 5
ROWS = int(os.environ.get("ROWS", 400_000 if QUICK else 10_000_000))
CONNECTIONS = 2
BATCH = 100_000 if ROWS >= 1_000_000 else 10_000
FILES = 20  # of a batch each, copied in turns
SAMPLING = 0.5  # seconds
DATABASE = "pipeline"

FILE = """
COPY (SELECT page % 1000, '/page/' || page / 1000, '127.0.0.1',
             timestamptz '2026-01-10 00:00 UTC' + random() * interval '10 minutes'
      FROM (SELECT (random() * 100000)::int % 100000 AS page FROM generate_series(1, {rows})) AS pages)
TO '{directory}/page_views.{rows}.{file}'
"""
COPY = "COPY page_views (site_id, path, client_ip, view_time) FROM 'page_views.{batch}.{file}'"  # in the data directory

CHECKSUM = """
SELECT count(*), sum(view_count), sum(hash_record_extended(ROW(site_id, path, period_start, view_count), 0)) FROM {table}
"""
TRUTH = """(
    SELECT site_id, path, date_trunc('minute', view_time) AS period_start, count(*) AS view_count
    FROM page_views GROUP BY site_id, path, period_start) AS truth
"""

PAGE_VIEWS = """
CREATE TABLE page_views (
    site_id int, path text, client_ip inet, view_time timestamptz DEFAULT now(), view_id bigserial);
CREATE INDEX view_id_idx ON page_views USING BRIN (view_id);
"""

# As the article has them.
ARTICLE_TABLE = """
CREATE TABLE page_views_1min (
    site_id int, path text, period_start timestamptz, view_count bigint, PRIMARY KEY (site_id, path, period_start));
"""
ARTICLE_MERGE = """
    INSERT INTO page_views_1min (site_id, path, period_start, view_count)
      SELECT site_id, path, date_trunc('minute', view_time), count(*) AS view_count
      FROM page_views
      WHERE view_id BETWEEN {first} AND {last}
      GROUP BY site_id, path, date_trunc('minute', view_time)
      ON CONFLICT (site_id, path, period_start) DO UPDATE
      SET view_count = page_views_1min.view_count + EXCLUDED.view_count
"""
ARTICLE = f"""
CREATE TABLE rollups (
    name text PRIMARY KEY, event_table_name text NOT NULL, event_id_sequence_name text NOT NULL,
    last_aggregated_id bigint DEFAULT 0);

CREATE FUNCTION incremental_rollup_window(rollup_name text, OUT window_start bigint, OUT window_end bigint)
RETURNS record LANGUAGE plpgsql AS $function$
DECLARE
    table_to_lock regclass;
BEGIN
    SELECT event_table_name, last_aggregated_id+1, pg_sequence_last_value(event_id_sequence_name)
    INTO table_to_lock, window_start, window_end
    FROM rollups WHERE name = rollup_name FOR UPDATE;
    IF NOT FOUND THEN
        RAISE 'rollup ''%'' is not in the rollups table', rollup_name;
    END IF;
    IF window_end IS NULL THEN
        window_end := 0;
        RETURN;
    END IF;
    BEGIN
        EXECUTE format('LOCK %s IN EXCLUSIVE MODE', table_to_lock);
        RAISE 'release table lock';
    EXCEPTION WHEN OTHERS THEN
    END;
    UPDATE rollups SET last_aggregated_id = window_end WHERE name = rollup_name;
END
$function$;

{ARTICLE_TABLE}
INSERT INTO rollups VALUES ('page_views_1min_rollup', 'page_views', 'page_views_view_id_seq');

CREATE FUNCTION do_page_view_aggregation(OUT start_id bigint, OUT end_id bigint)
RETURNS record LANGUAGE plpgsql AS $function$
BEGIN
    SELECT window_start, window_end INTO start_id, end_id FROM incremental_rollup_window('page_views_1min_rollup');
    IF start_id > end_id THEN RETURN; END IF;
    {ARTICLE_MERGE.format(first="start_id", last="end_id")};
END
$function$;
"""


class Variant:
    extension = None  # that it needs, besides ours
    merged_to = None  # asks for the last number that is merged; None if COPY merges, or nobody
    table = None  # has what was merged, by site, path and minute

    def size(self):
        """Rows, and those of one COPY."""
        return ROWS, BATCH

    def start(self, session):
        """On the new database, before the rows come."""

    def end(self, session):
        """When all is merged."""


class Looping(Variant):
    """A session of its own merges, and again, with a pause when there was nothing."""

    def begin(self):
        self.session, self.stop = Session(DATABASE), threading.Event()
        self.pid = self.session.pid
        self.thread = threading.Thread(target=self.loop)
        self.thread.start()

    def loop(self):
        try:
            while not self.stop.is_set():
                if not self.merge():
                    self.stop.wait(0.1)
        finally:
            self.session.close()  # the main thread misses its process, should it fail

    def end(self, _):
        self.stop.set()
        self.thread.join()


class Article(Looping):
    name = "article"
    merged_to = "SELECT last_aggregated_id FROM rollups"
    table = "page_views_1min"

    def start(self, session):
        session.run(ARTICLE)
        self.begin()

    def merge(self):
        (start, end), = self.session.rows("SELECT * FROM do_page_view_aggregation()")
        return int(start) <= int(end)


class Ours(Variant):
    name = "ours"
    merged_to = "SELECT watermark FROM litellm_spend.rollup"
    table = "litellm_spend.page_views_1min_rollup"

    def start(self, session):
        harness.create_extension(session)
        self.begin(session)
        self.pid = int(session.value("SELECT pid FROM spend_worker_status WHERE kind = 'litellm_spend worker'"
                                     " AND database = current_database()"))

    def begin(self, session):
        session.run("SELECT spend_rollup_create('page_views_1min', 'page_views', ARRAY['site_id', 'path',"
                    " 'date_trunc(''minute'', view_time) AS period_start'], ARRAY['count(*) AS view_count'])")
        self.set_interval(session, "1s")

    def end(self, session):
        self.set_interval(session, "1h")

    @staticmethod
    def set_interval(session, interval):
        session.run(f"ALTER SYSTEM SET litellm_spend.merge_interval = '{interval}'")
        session.run("SELECT pg_reload_conf()")


class Alone(Variant):
    name = "ingest alone"


class PgIncremental(Looping):
    name = extension = "pg_incremental"
    merged_to = "SELECT greatest(last_processed_sequence_number, 0) FROM incremental.sequence_pipelines"
    table = "page_views_1min"

    def start(self, session):
        session.run(ARTICLE_TABLE)
        session.run("CREATE EXTENSION pg_incremental")
        session.run(f"SELECT incremental.create_sequence_pipeline('page_views_1min', 'page_views', $pipeline$"
                    f"{ARTICLE_MERGE.format(first='$1', last='$2')}$pipeline$, schedule => NULL, execute_immediately => false)")
        self.merged = None
        self.begin()

    def merge(self):
        self.session.run("CALL incremental.execute_pipeline('page_views_1min')")
        before, self.merged = self.merged, self.session.value(self.merged_to)
        return self.merged != before


class PgIvm(Variant):
    extension = "pg_ivm"
    table = "page_views_1min"

    def __init__(self):
        self.name = f"pg_ivm, {self.size()[0]:,} rows"

    def size(self):
        return min(ROWS, 50_000 if QUICK else 200_000), 10_000

    def start(self, session):
        session.run("CREATE EXTENSION pg_ivm")
        session.run(f"ALTER DATABASE {DATABASE} SET session_preload_libraries = 'pg_ivm'")  # as its README asks for
        # date_trunc() of a timestamptz is not immutable, as its views must be.
        minute = "date_bin('1 minute', view_time, timestamptz '2000-01-01 00:00 UTC')"
        session.run(f"SELECT pgivm.create_immv('page_views_1min', $view$SELECT site_id, path, {minute} AS period_start,"
                    f" count(*) AS view_count FROM page_views GROUP BY site_id, path, {minute}$view$)")


class Timescale(Looping):
    name, extension = "TimescaleDB", "timescaledb"
    merged_to = "SELECT number FROM refreshed_to"
    table = "page_views_1min"

    def start(self, session):
        session.run("CREATE EXTENSION timescaledb")
        session.run("SELECT create_hypertable('page_views', by_range('view_time'))")
        session.run("CREATE MATERIALIZED VIEW page_views_1min WITH (timescaledb.continuous) AS"
                    " SELECT site_id, path, time_bucket('1 minute', view_time) AS period_start, count(*) AS view_count"
                    " FROM page_views GROUP BY site_id, path, period_start WITH NO DATA")
        session.run("CREATE TABLE refreshed_to AS SELECT 0::bigint AS number")
        self.begin()

    def merge(self):
        """A refresh does not say which rows it has seen: those that were committed when it began. So it begins when all
        transactions have ended that ran when `number` was the last one."""
        number, horizon = map(int, self.session.rows("SELECT coalesce(pg_sequence_last_value('page_views_view_id_seq'), 0),"
                                                     " pg_snapshot_xmax(pg_current_snapshot())")[0])
        if number == int(self.session.value(self.merged_to)):
            return False
        harness.wait_until(self.session, f"SELECT pg_snapshot_xmin(pg_current_snapshot()) >= '{horizon}'", pause=0.01)
        self.session.run("CALL refresh_continuous_aggregate('page_views_1min', NULL, NULL)")
        self.session.run(f"UPDATE refreshed_to SET number = {number}")
        return True


def copy(first, failures, size=None, cpu=None):
    """The batches of one connection. Adds the CPU seconds that they took."""
    rows, batch = size or (ROWS, BATCH)
    try:
        session = Session(DATABASE)
        for number in range(first, rows // batch, CONNECTIONS):
            session.run(COPY.format(batch=batch, file=number % FILES))
        if cpu is not None:
            cpu.append(session.cpu_ns() / 1e9)
        session.close()
    except Exception as failure:  # the main thread tells
        failures.append(failure)


class Watch:
    """What had been numbered and merged at each moment, and the memory of who merges."""

    def __init__(self, variant):
        self.variant, self.session = variant, Session(DATABASE)
        self.moments = []  # (seconds, numbered, merged, lag)
        self.memory, self.start = 0, time.perf_counter()

    def seconds(self):
        return time.perf_counter() - self.start

    def look(self):
        merged = f"({self.variant.merged_to})"
        numbered, merged = self.session.rows(f"SELECT coalesce(pg_sequence_last_value('page_views_view_id_seq'), 0), {merged}")[0]
        now, numbered, merged = self.seconds(), int(numbered), int(merged)
        # Since when there has been a number that is not merged; between two looks, as if numbers rose evenly.
        before, since = (0.0, 0), now
        for seconds, then, *_ in [*self.moments, (now, numbered)]:
            if then > merged:
                since = before[0] + (seconds - before[0]) * (merged - before[1]) / (then - before[1])
                break
            before = (seconds, then)
        self.moments.append((now, numbered, merged, now - since))
        for line in Path(f"/proc/{self.variant.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                self.memory = max(self.memory, int(line.split()[1]) / 1024)
        return merged


def cpu_seconds(pid):
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def one_run(results, lags, run, variant):
    harness.drop(DATABASE)
    harness.on_server(f"CREATE DATABASE {DATABASE}")
    session = Session(DATABASE)
    session.run("SET client_min_messages = warning; SET timezone = 'UTC'")
    session.run(PAGE_VIEWS)
    variant.start(session)
    session.run("CHECKPOINT")
    failures, copied, metrics = [], [], []
    rows, _ = size = variant.size()
    copies = [threading.Thread(target=copy, args=(first, failures, size, copied)) for first in range(CONNECTIONS)]
    watch = Watch(variant)
    cpu = cpu_seconds(variant.pid) if variant.merged_to else 0
    for thread in copies:
        thread.start()
    if variant.merged_to:
        ingested = None
        while watch.look() < rows:
            if ingested is None and not any(thread.is_alive() for thread in copies):
                ingested = watch.seconds()
            if failures:
                raise failures[0]
            time.sleep(SAMPLING)
        seconds, ingested = watch.seconds(), ingested or watch.seconds()
        metrics = [("end to end", rows / seconds, "rows/s"), ("longest lag", max(m[3] for m in watch.moments), "s"),
                   ("merge cpu", cpu_seconds(variant.pid) - cpu, "s"), ("memory", watch.memory, "MiB")]
    for thread in copies:
        thread.join()
    if failures:
        raise failures[0]
    if not variant.merged_to:
        ingested = watch.seconds()
        metrics = [("end to end", rows / ingested, "rows/s")] if variant.table else []
    watch.session.close()
    total = sum(copied) + sum(value for metric, value, _ in metrics if metric == "merge cpu")
    metrics = [("ingest", rows / ingested, "rows/s"), *metrics, ("cpu", total, "s")]
    for metric, value, unit in metrics:
        results.add(run, variant.name, metric, value, unit)
    results.write()
    lags += [(variant.name, run, *(value if isinstance(value, int) else f"{value:.6g}" for value in moment)) for moment in watch.moments]
    with open(harness.RESULTS / "pipeline_lag.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("variant", "run", "seconds", "numbered", "merged", "lag"))
        writer.writerows(lags)
    say(f"run {run} of {RUNS}: {variant.name}: " + ", ".join(f"{m} {v:,.1f} {u}" for m, v, u in metrics))
    variant.end(session)
    found = session.rows(CHECKSUM.format(table=variant.table)) if variant.table else None
    if found and size != (ROWS, BATCH):  # no other variant has the same rows
        truth = session.rows(CHECKSUM.format(table=TRUTH))
        if found != truth:
            raise RuntimeError(f"{variant.name} has {found}, the page views are {truth}")
        found = None
    session.close()
    return found


def main():
    results, lags = Results("pipeline"), []
    variants = harness.present([Article(), Ours(), Alone(), PgIncremental(), PgIvm(), Timescale()])
    session = Session("postgres")
    directory = session.value("SHOW data_directory")
    for batch in {variant.size()[1] for variant in variants}:
        for file in range(FILES):
            session.run(FILE.format(rows=batch, directory=directory, file=file))
    session.close()
    for run in range(1, RUNS + 1):  # no warm-up: each is a new database
        found = [one_run(results, lags, run, variant) for variant in harness.rotated(variants, run)]
        if len({str(rows) for rows in found if rows}) != 1:
            raise RuntimeError(f"not all variants made the same rows: {found}")
    harness.drop(DATABASE)


if __name__ == "__main__":
    main()

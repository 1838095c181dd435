#!/usr/bin/env python3
"""How long spend_partition_convert() locks the spend log, at 0.1, 1 and 10 GB of heap and TOAST, and what else there is.

    ours      the conversion by SQL calls, a step each, and CREATE UNIQUE INDEX CONCURRENTLY as it says; then committed
    nothing   as long as the last conversion took
    copy      the spend log locked against writers (EXCLUSIVE), a partitioned copy with all indexes in its place; not at 10 GB
    script    LiteLLM's partition_spend_logs.sql: renames the table and makes an empty one. Moves no row, the old rows are gone
              from the table and all views go on showing only them: the least that any way takes

    time           of the step at the client, commit included; of copy and script from BEGIN to the end of ROLLBACK
    cpu            of our session, for the same
    longest wait   of a probe meanwhile: one session that reads a row by its key, inserts one, and so on without a pause. A
                   statement counts for each step that it overlaps
    rows copied    that were in the table before and are not in the same file after

The table has all seven indexes, capture is attached and LiteLLM's views are live. No worker, which would do the same steps in
the same transactions: here each can be timed.

One database a size, loaded once, never cloned. Copy and script end with ROLLBACK. A conversion is undone by SQL: the old table
leaves the partitioned one, which is dropped, and gets its names, its primary key (built anew) and capture back; the probe's rows
are deleted. Each run ends with the rows that it began with, and that is checked; at the end, the rollups are.

CONVERT_GB="0.1 1" leaves out the others.
"""

import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import harness
from harness import QUICK, Results, Session, say

RUNS = 2 if QUICK else 5
SIZES = os.environ.get("CONVERT_GB", "0.001 0.01" if QUICK else "0.1 1 10").split()
ROW = 1_800  # bytes of heap and TOAST
LARGEST_COPY = 1  # GB

CONVERT = "SELECT step, state, detail FROM spend_partition_convert()"
# Step: the one that is next after it.
STEPS = {"request": "index", "index": "swap", "swap": None}

LOG, LEGACY = '"LiteLLM_SpendLogs"', '"LiteLLM_SpendLogs_legacy"'
COUNT = "SELECT count(*) FROM {}"
KIND = f"SELECT relkind FROM pg_class WHERE oid = '{LOG}'::regclass"

UNDO = f"""
BEGIN;
ALTER TABLE {LOG} DETACH PARTITION {LEGACY};
UPDATE litellm_spend.capture SET relation = '{LEGACY}';
UPDATE litellm_spend.source SET relation = '{LEGACY}' WHERE relation = '{LOG}'::regclass;
DELETE FROM litellm_spend.policy;
DROP TABLE {LOG};
ALTER TABLE {LEGACY} RENAME TO "LiteLLM_SpendLogs";
ALTER TABLE {LOG} DROP CONSTRAINT "LiteLLM_SpendLogs_legacy_pkey", ADD PRIMARY KEY (request_id);
DO $$
DECLARE
    index name;
BEGIN
    FOR index IN SELECT relname FROM pg_index JOIN pg_class ON oid = indexrelid
                 WHERE indrelid = '{LOG}'::regclass AND relname LIKE '%\\_legacy\\_%' LOOP
        EXECUTE format('ALTER INDEX %I RENAME TO %I', index, replace(index, '_legacy_', '_'));
    END LOOP;
END
$$;
COMMIT
"""

OF_SCRIPT = ["startTime", "startTime_request_id", "end_user", "session_id"]  # that it knows of
SCRIPT = "\n".join([
    "BEGIN;",
    f"ALTER TABLE {LOG} RENAME TO {LEGACY};",
    *(f'ALTER INDEX IF EXISTS "LiteLLM_SpendLogs_{suffix}" RENAME TO "LiteLLM_SpendLogs_legacy_{suffix}";'
      for suffix in ("pkey", *(f"{name}_idx" for name in OF_SCRIPT))),
    f'CREATE TABLE {LOG} (LIKE {LEGACY} INCLUDING DEFAULTS INCLUDING GENERATED) PARTITION BY RANGE ("startTime");',
    f'ALTER TABLE {LOG} ADD PRIMARY KEY (request_id, "startTime");',
    *(f'CREATE INDEX IF NOT EXISTS "LiteLLM_SpendLogs_{name}_idx" ON {LOG} ({columns});' for name, columns in zip(
        OF_SCRIPT, ('"startTime"', '"startTime", request_id', "end_user", "session_id"))),
    f'CREATE TABLE IF NOT EXISTS "LiteLLM_SpendLogs_pdefault" PARTITION OF {LOG} DEFAULT',
])


class Probe:
    """Somebody else: keeps when each of its statements began and ended."""

    def __init__(self, database):
        self.session = Session(database)
        self.session.run("SET statement_timeout = '5min'")  # rather than for ever, if whoever holds the lock fails
        self.session.prepare("read", f"SELECT spend FROM {LOG} WHERE request_id = $1")
        self.session.prepare("insert", f"""
            INSERT INTO {LOG} (request_id, call_type, spend, "startTime", "endTime")
            VALUES ($1, 'probe', 0, now() AT TIME ZONE 'UTC', now() AT TIME ZONE 'UTC') ON CONFLICT DO NOTHING""")
        self.id = self.session.value(f"SELECT min(request_id) FROM {LOG}").encode()
        self.spans, self.inserted = [], 0

    def _timed(self, statement, request_id):
        began = time.perf_counter()
        result = self.session.execute(statement, [request_id])
        self.spans.append((began, time.perf_counter()))
        return result

    def _loop(self, stop):
        while not stop.is_set():
            if self._timed("read", self.id).ntuples != 1:
                raise RuntimeError("a row was not found")
            self.inserted += self._timed("insert", str(uuid.uuid4()).encode()).command_tuples

    @contextmanager
    def running(self):
        self.spans, self.inserted = [], 0
        stop = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            loop = thread.submit(self._loop, stop)
            try:
                time.sleep(0.1)
                yield
                time.sleep(0.1)
            finally:
                stop.set()
            loop.result()

    def longest(self, span):
        """Milliseconds, of the statements within it or across its ends."""
        return max(end - begin for begin, end in self.spans if end > span.began and begin < span.ended) * 1000


@dataclass
class Span:
    began: float
    ended: float
    cpu: int  # ns

    @property
    def seconds(self):
        return self.ended - self.began


class Table:
    """The spend log of one size, in its own database, with a session of ours and a probe."""

    def __init__(self, gigabytes):
        self.label = f"{gigabytes} GB"
        self.gigabytes = float(gigabytes)
        self.database = harness.loaded("convert_" + gigabytes.replace(".", "_"), int(self.gigabytes * 1e9 / ROW))
        self.session, self.probe = Session(self.database), Probe(self.database)
        harness.attach(self.session)
        harness.end_worker(self.session)
        self.bytes, self.rows, self.last = (
            self.session.value(sql) for sql in
            (f"SELECT pg_table_size('{LOG}')", COUNT.format(LOG), f'SELECT max("startTime") FROM {LOG}'))
        self.rows = int(self.rows)
        self.spans = {}  # of this run, by step
        self.seconds = None  # of the last conversion

    @contextmanager
    def span(self, step):
        began, cpu = time.perf_counter(), self.session.cpu_ns()
        yield
        self.spans[step] = Span(began, time.perf_counter(), self.session.cpu_ns() - cpu)

    def file(self, table):
        return self.session.value(f"SELECT pg_relation_filepath('{table}')")

    def ours(self):
        file, detail = self.file(LOG), None
        with self.probe.running(), self.span("ours, in all"):
            for step in STEPS:
                with self.span(f"ours, {step}"):
                    if step == "index":
                        self.session.run(detail)
                    else:
                        progress = self.session.rows(CONVERT)
                if step == "index":
                    continue
                following = [(step.decode(), detail.decode()) for step, state, detail in progress if state == b"next"]
                expected = STEPS[step]
                if [name for name, _ in following] != ([expected] if expected else []):
                    raise RuntimeError(f"after step {step} came {progress}")
                detail = following and following[0][1]
        self.seconds = self.spans["ours, in all"].seconds
        if self.session.value(KIND) != "p":
            raise RuntimeError("the table is not partitioned")
        if self.file(LEGACY) != file:
            raise RuntimeError(f"the rows were in {file} and are in {self.file(LEGACY)}")
        self.expect(LOG, self.rows + self.probe.inserted)
        copied = self.rows + self.probe.inserted - int(self.session.value(COUNT.format(LEGACY)))
        self.session.run(UNDO)
        return copied

    def nothing(self):
        with self.probe.running(), self.span("nothing"):
            time.sleep(self.seconds)
        return 0

    def copy(self):
        with self.probe.running(), self.span("copy"):
            self.session.run(f"BEGIN; LOCK TABLE {LOG} IN EXCLUSIVE MODE")
            copied = harness.copy_into_partitions(self.session, 7)
            self.session.run("ROLLBACK")
        if copied < self.rows:
            raise RuntimeError(f"{copied} rows of {self.rows} were copied")
        return copied

    def script(self):
        with self.probe.running(), self.span("script"):
            kind = self.session.value(f"{SCRIPT}; {KIND}")
            self.session.run("ROLLBACK")
        if kind != "p":
            raise RuntimeError("the table was not partitioned")
        return 0

    def expect(self, table, rows):
        found = int(self.session.value(COUNT.format(table)))
        if found != rows:
            raise RuntimeError(f"{table} has {found} rows instead of {rows}")

    def clean(self):
        """No trace of the probe."""
        self.session.run(f"DELETE FROM {LOG} WHERE \"startTime\" > '{self.last}' AND call_type = 'probe'")
        self.expect(LOG, self.rows)

    def one_run(self, results, run, variant):
        self.session.run("CHECKPOINT")
        self.spans = {}
        copied = variant()
        self.clean()
        shown = []
        for step, span in self.spans.items():
            wait = self.probe.longest(span)
            results.add(run, f"{self.label}: {step}", "time", span.seconds * 1000, "ms")
            results.add(run, f"{self.label}: {step}", "cpu", span.cpu / 1e6, "ms")
            results.add(run, f"{self.label}: {step}", "longest wait", wait, "ms")
            shown.append(f"{step} {span.seconds * 1000:.1f} ms, wait {wait:.1f}")
        results.add(run, f"{self.label}: {step}", "rows copied", copied, "rows")
        results.write()
        if run > 0:
            say(f"{self.label}, run {run} of {RUNS}: {'; '.join(shown)}")

    def measure(self, results):
        results.add(1, f"{self.label}: table", "size", int(self.bytes) / 1e9, "GB")
        variants = [self.ours, self.nothing, self.script]
        if self.gigabytes <= LARGEST_COPY:
            variants.append(self.copy)
        for run in range(RUNS + 1):
            for variant in harness.rotated(variants, run):
                self.one_run(results, run, variant)
        self.session.run("SELECT FROM spend_rollup_run()")
        wrong = self.session.rows("SELECT * FROM spend_rollup_verify('daily_spend', NULL, NULL)")
        if wrong:
            raise RuntimeError(f"the rollup differs from the raw rows: {wrong}")

    def drop(self):
        self.session.close()
        self.probe.session.close()
        harness.drop(self.database)


def main():
    results = Results("convert")
    for gigabytes in SIZES:
        table = Table(gigabytes)
        table.measure(results)
        table.drop()


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""How long a writer is held up while another one keeps a transaction open for 20 seconds.

One session inserts single rows as fast as it can, and goes on for 2 seconds after that transaction has ended. Beside it:

    ours    the extension attached, its worker merging every 100 ms
    plain   nothing
    lock    the recipe published in 2018 for the same end: every 100 ms LOCK TABLE … IN EXCLUSIVE MODE, released at once
            (Citus, "Scalable incremental data aggregation on Postgres and Citus", its incremental_rollup_window())
"""

import threading
import time
import uuid

import capture
import harness
from harness import QUICK, Results, Session, say

RUNS = 2 if QUICK else 5
OPEN = 2 if QUICK else 20  # seconds
AFTER = 1 if QUICK else 2
INTERVAL = 0.1  # of the merges, and of the locks

LOCK = """
DO $$
BEGIN
    LOCK TABLE "LiteLLM_SpendLogs" IN EXCLUSIVE MODE;
    RAISE 'release table lock';
EXCEPTION WHEN raise_exception THEN
    NULL;
END
$$
"""


class Writer:
    """Inserts copies of one real row, with ids of their own."""

    def __init__(self, database):
        self.session = Session(database)
        self.session.run(f"SET statement_timeout = '{3 * OPEN + 30}s'")  # rather than for ever, if the holder fails
        columns = ", ".join(f'"{c}"' for c in capture.COLUMNS)
        self.values = list(self.session.rows(f'SELECT {columns} FROM "LiteLLM_SpendLogs" ORDER BY "startTime" DESC LIMIT 1')[0])
        self.ids = [capture.COLUMNS.index(c) for c in ("request_id", "session_id", "litellm_call_id")]
        self.session.prepare("insert", capture.statement(1))

    def insert(self):
        """Nanoseconds, commit included."""
        for i in self.ids:
            self.values[i] = str(uuid.uuid4()).encode()
        start = time.perf_counter_ns()
        self.session.execute("insert", self.values)
        return time.perf_counter_ns() - start


def locker(session, stop):
    while not stop.wait(INTERVAL):
        session.run(LOCK)


def set_merge_interval(session, interval):
    session.run(f"ALTER SYSTEM SET litellm_spend.merge_interval = '{interval}'")
    session.run("SELECT pg_reload_conf()")


def latencies(database, lock):
    """Of all inserts, in milliseconds, while a transaction that has written stays open."""
    writer, holder = Writer(database), Writer(database)
    stop, locks = threading.Event(), None
    for _ in range(100):
        writer.insert()
    holder.session.run("BEGIN")
    holder.insert()
    ending = threading.Timer(OPEN, holder.session.run, ["COMMIT"])
    if lock:
        locking = Session(database)
        locks = threading.Thread(target=locker, args=(locking, stop))
    try:
        ending.start()
        if lock:
            locks.start()
        found, end = [], time.monotonic() + OPEN + AFTER
        while time.monotonic() < end:
            found.append(writer.insert() / 1e6)
    finally:
        stop.set()
        ending.join()
        if lock:
            locks.join()
            locking.close()
        holder.session.close()
        writer.session.close()
    return found


def one_run(results, run, variant, session, database):
    if variant == "ours":
        set_merge_interval(session, f"{INTERVAL * 1000:.0f}ms")
    found = sorted(latencies(database, lock=variant == "lock"))
    if variant == "ours":
        harness.wait_until(session, "SELECT max(tail_rows) = 0 FROM spend_rollup_status")  # the worker was there
        set_merge_interval(session, "1h")
    results.add(run, variant, "longest", found[-1], "ms")
    results.add(run, variant, "p99.9", found[len(found) * 999 // 1000], "ms")
    results.add(run, variant, "median", found[len(found) // 2], "ms")
    results.add(run, variant, "inserts", len(found), "count")
    results.write()
    say(f"run {run} of {RUNS}: {variant}: longest {found[-1]:.1f} ms, median {found[len(found) // 2]:.3f} ms of {len(found)}")


def main():
    results = Results("stall")
    with harness.clone(harness.loaded("base", capture.BASE), "stall_attached", "stall_plain") as (attached, plain):
        harness.attach(attached)
        variants = [("ours", attached, "stall_attached"), ("plain", plain, "stall_plain"), ("lock", plain, "stall_plain")]
        for run in range(1, RUNS + 1):
            for variant, session, database in harness.rotated(variants, run):
                session.run("CHECKPOINT")
                one_run(results, run, variant, session, database)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""How fast LiteLLM's rows go into the partitioned spend log, against the plain one: INSERT … ON CONFLICT DO NOTHING of 100
rows, prepared, values bound, autocommit; all of LiteLLM's indexes; capture attached to both.

Two databases with the same 100,000 rows of the last month get the same rows of the month to come, in order of time, in
blocks of statements: partitioned, plain, plain, partitioned. The partitioned one has a partition for each of those days
and a few more, so 65 and DEFAULT, of which a statement meets one, at midnight two. No worker merges.
"""

import capture
import harness
from harness import QUICK, Results, Session, say

RUNS = 2 if QUICK else 7
DAYS_AHEAD = 33
CASE = capture.Case("100 rows", 100, 200)
BLOCKS = [("partitioned", 0), ("plain", 0), ("plain", 1), ("partitioned", 1)]
COUNT = 'SELECT count(*) FROM "LiteLLM_SpendLogs"'


def one_run(results, run, pool, sessions, observer):
    meters = {variant: capture.Meter(session, observer) for variant, session in sessions.items()}
    halves = [pool.statements(CASE) for _ in range(2)]
    for variant, half in BLOCKS:
        with meters[variant].running():
            for values in halves[half]:
                sessions[variant].execute("insert", values)
    rows = 2 * CASE.rows * CASE.block
    for variant, meter in meters.items():
        results.add(run, variant, "rate", rows / meter.wall * 1e9, "rows/s")
        meter.add_to(results, run, variant, rows)
    results.write()
    if run > 0:
        ours, plain = meters["partitioned"], meters["plain"]
        say(f"run {run} of {RUNS}: {rows / ours.wall * 1e9:,.0f} rows/s partitioned, {rows / plain.wall * 1e9:,.0f} plain;"
            f" rate {plain.wall / ours.wall:.2f}, cpu {ours.cpu / plain.cpu:.2f}")


def check(sessions, rows):
    """All rows are there, each in the partition of its day, and counted."""
    for variant, session in sessions.items():
        if int(session.value(COUNT)) != rows:
            raise RuntimeError(f"{variant}: {session.value(COUNT)} rows instead of {rows}")
        session.run("SELECT FROM spend_rollup_run()")
        wrong = session.rows("SELECT * FROM spend_rollup_verify('daily_spend', NULL, NULL)")
        if wrong:
            raise RuntimeError(f"{variant}: the rollup differs from the raw rows: {wrong}")
    if sessions["partitioned"].value('SELECT count(*) FROM "LiteLLM_SpendLogs_pdefault"') != "0":
        raise RuntimeError("rows went to the DEFAULT partition")


def main():
    results = Results("partitioned")
    pool = capture.Pool([CASE], RUNS)
    with harness.clone(harness.loaded("base", capture.BASE), "bench_partitioned", "bench_plain") as (ours, plain):
        harness.partition(ours, DAYS_AHEAD)
        sessions = {"partitioned": ours, "plain": plain}
        for session in sessions.values():
            harness.attach(session)
            session.prepare("insert", capture.statement(CASE.rows))
        observer = Session("postgres")
        observer.run("CHECKPOINT")
        for run in range(RUNS + 1):
            one_run(results, run, pool, sessions, observer)
        check(sessions, capture.BASE + pool.size)
        observer.close()
    pool.close()
    harness.drop("pool")


if __name__ == "__main__":
    main()

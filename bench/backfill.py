#!/usr/bin/env python3
"""How long attach and backfill take, against one sequential scan that adds up the same table by day.

    ours   spend_attach(), then CALL spend_backfill() until LiteLLM's view is live; the worker stands by
    scan   SELECT date("startTime"), sum(spend) … GROUP BY 1, without parallel workers

All rollups are dropped with their history before each run.
"""

import harness
from harness import QUICK, Results, say

RUNS = 2 if QUICK else 5
SCAN = 'SELECT date("startTime"), sum(spend) FROM "LiteLLM_SpendLogs" GROUP BY 1'


def ours(session, results, run):
    attach = session.timed("SELECT * FROM spend_attach()")
    backfill = session.timed("CALL spend_backfill()")
    harness.backfill(session)  # nothing left to do: only checks that all is covered
    wrong = session.rows("SELECT * FROM spend_rollup_verify('daily_spend', NULL, NULL)")
    if wrong:
        raise RuntimeError(f"the rollup differs from the raw rows: {wrong}")
    session.run("SELECT FROM spend_detach(drop_history => true)")
    results.add(run, "ours", "attach", attach / 1000, "s")
    results.add(run, "ours", "backfill", backfill / 1000, "s")
    results.add(run, "ours", "attach + backfill", (attach + backfill) / 1000, "s")
    return (attach + backfill) / 1000


def scan(session, results, run):
    seconds = session.timed(SCAN) / 1000
    results.add(run, "scan", "attach + backfill", seconds, "s")
    return seconds


def main():
    results = Results("backfill")
    with harness.clone(harness.wide(), "backfill") as (session,):
        session.run("SET client_min_messages = warning; SET max_parallel_workers_per_gather = 0")
        harness.create_extension(session)
        session.run("CHECKPOINT")
        for run in range(RUNS + 1):
            seconds = {step.__name__: step(session, results, run) for step in harness.rotated([ours, scan], run)}
            results.write()
            if run > 0:
                say(f"run {run} of {RUNS}: ours {seconds['ours']:.2f} s, one scan {seconds['scan']:.2f} s")


if __name__ == "__main__":
    main()

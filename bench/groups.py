#!/usr/bin/env python3
"""What a merge costs by the number of groups: five million narrow page views in one window into an empty rollup of 100 to
five million groups, which each have a whole number as their key.

    article       the statement of merge.py, all rows at once
    ours          a declared rollup
    ours, in SQL  the same with litellm_spend.hash_groups off

No worker; a checkpoint before each measurement.
"""

import harness
import merge
from harness import QUICK, Results, Session, say

RUNS = 2 if QUICK else 5
ROWS = 40_000 if QUICK else 5_000_000
GROUPS = [100, 10_000, 100_000, 1_000_000, 5_000_000]


class InSql(merge.Ours):
    def merge(self, session, rollup, half):
        session.run("SET litellm_spend.hash_groups = off")
        super().merge(session, rollup, half)
        session.run("RESET litellm_spend.hash_groups")


VARIANTS = [merge.Plain("article", ROWS), merge.Ours("ours", ROWS), InSql("ours, in SQL", ROWS)]


def main():
    results = Results("groups")
    harness.drop("groups")
    harness.on_server("CREATE DATABASE groups")
    session = Session("groups")
    merge.ROWS, merge.RUNS = ROWS, RUNS
    rollups = [(groups, merge.Rollup(f"by_{groups}", [f"view_id % {groups} AS kind"], ["bigint"])) for groups in GROUPS]
    merge.CASES = [(rollup, []) for _, rollup in rollups]
    merge.prepare(session)
    for run in range(1, RUNS + 1):
        for groups, rollup in rollups:
            ends = []
            for variant in harness.rotated(VARIANTS, run):
                variant.start(session, rollup)
                merge.measure(results, run, session, variant, f"{groups} groups", rollup, 0)
                ends.append(variant.end(session, rollup))
            if any(end != ends[0] for end in ends):
                raise RuntimeError(f"{groups} groups: not all variants made the same rows: {ends}")
    session.close()
    harness.drop("groups")
    say("done")


if __name__ == "__main__":
    main()

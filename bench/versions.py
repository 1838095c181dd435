#!/usr/bin/env python3
"""What two builds cost, on two servers that are measured in turn: CPU of the backend that does it.

    attach     spend_attach(), in a database with 100,000 rows
    backfill   CALL spend_backfill() of those
    capture    50 INSERTs of 100 rows, as LiteLLM's role
    merge      spend_rollup_run() of what was captured

Each run is a new database on each server, the old build first in every second one. LiteLLM's tables belong to a role that is
no superuser.
"""

import csv
import os
import statistics
import sys

import harness
from harness import Session, say

RUNS = 9
ROWS = 100_000
STATEMENTS = 50
STEPS = ["attach", "backfill", "capture", "merge"]

# A statement of LiteLLM's: 100 rows, minutes apart, with about a kilobyte of metadata.
INSERT = """
    INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, api_key, spend, total_tokens, prompt_tokens, completion_tokens,
        "startTime", "endTime", model, "user", team_id, status, request_tags, metadata)
    SELECT {n} || '-' || i, 'acompletion', md5((i % 200)::text), (i % 1000) / 1e5, 30, 10, 20, t, t, 'gpt-' || i % 12,
           'user' || i % 60, 'team' || i % 20, 'success', '["prod", "prod"]', jsonb_build_object('note', repeat('x', 1000))
    FROM generate_series(1, 100) AS i, LATERAL (SELECT now() AT TIME ZONE 'UTC' - i * interval '1 minute' AS t) AS at
    ON CONFLICT DO NOTHING"""


def on(server):
    os.environ["PGHOST"], os.environ["PGPORT"] = server.rsplit(":", 1)


def measured(session, *statements):
    before = session.cpu_ns()
    for statement in statements:
        session.run(statement)
    return (session.cpu_ns() - before) / 1e6


def run(server, template):
    on(server)
    with harness.clone(template, "bench_version") as (session,):
        session.run("SET client_min_messages = error; CREATE EXTENSION litellm_spend")
        found = {"attach": measured(session, "SELECT * FROM spend_attach()"),
                 "backfill": measured(session, "CALL spend_backfill()")}
        writer = Session("bench_version")
        writer.run("SET ROLE litellm")
        found["capture"] = measured(writer, *(INSERT.format(n=n) for n in range(STATEMENTS)))
        writer.close()
        found["merge"] = measured(session, "SELECT * FROM spend_rollup_run()")
        if int(session.value("SELECT sum(requests) FROM litellm_spend.daily_spend")) != ROWS + STATEMENTS * 100:
            raise RuntimeError("rows are missing")
    return found


def main():
    servers = dict(zip(("old", "new"), sys.argv[1:]))
    templates = {}
    for name, server in servers.items():
        on(server)
        templates[name] = harness.loaded("narrow", ROWS, narrow=True)
    values = {name: {step: [] for step in STEPS} for name in servers}
    for number in range(RUNS + 1):  # the first warms up
        order = list(servers) if number % 2 else list(servers)[::-1]
        for name in order:
            found = run(servers[name], templates[name])
            if number:
                for step in STEPS:
                    values[name][step].append(found[step])
    with open(harness.RESULTS / "versions.csv", "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["step", "build", "run", "cpu_ms", "commit"])
        for name in servers:
            for step in STEPS:
                for number, value in enumerate(values[name][step], 1):
                    out.writerow([step, name, number, f"{value:.1f}", harness.COMMIT])
    for step in STEPS:
        ratios = [new / old for new, old in zip(values["new"][step], values["old"][step])]
        old, new = (statistics.median(values[name][step]) for name in ("old", "new"))
        say(f"{step}: {old:.1f} ms, {new:.1f} ms; {statistics.median(ratios):.3f} times "
            f"({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()

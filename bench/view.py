#!/usr/bin/env python3
"""What the dashboard's query costs: SELECT SUM(spend) FROM "MonthlyGlobalSpend", warm, as a simple statement.

    view, function          ours: "MonthlyGlobalSpend", monthly_global_spend(); with 0, 100 and 1,000 rows in the tail
    SELECT 1                what any statement costs
    materialized view       the same rows, stale, with its unique index
    LiteLLM                 LiteLLM's own definition of the view, under another name
    …, ten times the rows   ours over a table of 4.7 million (narrow) rows, in the same runs

Client: the median of the statements of a run, until the client has the result. Planning, execution: what EXPLAIN
(ANALYZE) says; view_plans.txt keeps some plans. The change log has been lived in: 25,000 rows merged and removed, then vacuumed, as autovacuum would.
"""

import math

import harness
from harness import QUICK, ROWS, Results, Session, say

RUNS = 2 if QUICK else 5
STATEMENTS = 20 if QUICK else 200
STATEMENTS_LITELLM = 5
EXPLAINS = 5 if QUICK else 20
TAILS = [0, 100, 1000]
LIVED_IN = 2 if QUICK else 25

TOTAL = 'SELECT SUM(spend) FROM "MonthlyGlobalSpend"'
FUNCTION = "SELECT * FROM monthly_global_spend()"
TOTAL_MATERIALIZED = "SELECT SUM(spend) FROM bench_materialized"
TOTAL_LITELLM = "SELECT SUM(spend) FROM bench_litellm"

# Only the indexes that backfill and uniqueness need: the others would double the time to load, and nothing reads them.
NOT_FOR_NARROW = ["end_user", "session_id", "startTime_request_id", "api_key_startTime", "litellm_call_id"]

# One row of the change log for each: their customers differ.
INSERT = """
INSERT INTO "LiteLLM_SpendLogs" (
    request_id, call_type, api_key, spend, total_tokens, prompt_tokens, completion_tokens, "startTime", "endTime", model,
    model_id, model_group, custom_llm_provider, "user", metadata, cache_hit, cache_key, request_tags, team_id,
    organization_id, end_user, requester_ip_address, session_id, status, request_duration_ms, litellm_call_id)
SELECT
    'chatcmpl-' || gen_random_uuid(), call_type, api_key, spend, total_tokens, prompt_tokens, completion_tokens,
    now() AT TIME ZONE 'UTC', now() AT TIME ZONE 'UTC', model,
    model_id, model_group, custom_llm_provider, "user", metadata, cache_hit, cache_key, request_tags, team_id,
    organization_id, 'tail-' || row_number() OVER (), requester_ip_address, gen_random_uuid()::text, status,
    request_duration_ms, gen_random_uuid()::text
FROM "LiteLLM_SpendLogs" ORDER BY "startTime" DESC LIMIT {}
"""


def set_tail(session, rows):
    harness.merge(session)
    if rows:
        session.run(INSERT.format(rows))
    found = harness.tail_rows(session)
    if found != rows:
        raise RuntimeError(f"the tail has {found} rows instead of {rows}")


def prepare(session):
    """Attaches, and lets the change log live for a while."""
    harness.attach(session)
    for _ in range(LIVED_IN):
        session.run(INSERT.format(1000))
        harness.merge(session)
    for table in ("change_log", "daily_spend_rollup", "rollup", "source"):
        session.run(f"VACUUM (ANALYZE) litellm_spend.{table}")
    session.run('VACUUM (ANALYZE) "LiteLLM_SpendLogs"')


def prepare_theirs(session):
    """Before attach: then the view is still LiteLLM's."""
    definition = session.value("""SELECT pg_get_viewdef('"MonthlyGlobalSpend"'::regclass)""")
    session.run(f"CREATE VIEW bench_litellm AS {definition}")


def materialize(session):
    session.run("CREATE MATERIALIZED VIEW bench_materialized AS SELECT * FROM bench_litellm")
    session.run("CREATE UNIQUE INDEX ON bench_materialized (date)")
    session.run("VACUUM (ANALYZE) bench_materialized")


def check_equal(session):
    ours, theirs = (float(session.value(sql)) for sql in (TOTAL, TOTAL_LITELLM))
    if not math.isclose(ours, theirs, rel_tol=1e-9):
        raise RuntimeError(f"the view says {ours}, LiteLLM's own {theirs}")


def measure(results, run, variant, session, sql, statements=STATEMENTS, explains=EXPLAINS):
    session.median_ms(sql, min(statements, 20))  # warm
    client = session.median_ms(sql, statements)
    planning, execution = session.explained_ms(sql, explains)
    results.add(run, variant, "client", client, "ms")
    results.add(run, variant, "planning", planning, "ms")
    results.add(run, variant, "execution", execution, "ms")
    return client


def keep_plan(run, variant, session, sql):
    """Of the last run, for the reader who wonders."""
    if run == RUNS:
        lines = (line.decode() for (line,) in session.rows(f"EXPLAIN (ANALYZE, BUFFERS) {sql}"))
        with open(harness.RESULTS / "view_plans.txt", "a") as file:
            file.write("\n".join((f"-- {variant}", *lines, "\n")))


def one_run(results, run, wide, narrow):
    shown = {}
    for tail in harness.rotated(TAILS, run):
        for session, suffix in ((wide, ""), (narrow, ", ten times the rows")):
            set_tail(session, tail)
            for name, sql in (("view", TOTAL), ("function", FUNCTION)):
                variant = f"{name} tail {tail}{suffix}"
                shown[variant] = measure(results, run, variant, session, sql)
        check_equal(wide)
        if tail == 0:
            shown["materialized view"] = measure(results, run, "materialized view", wide, TOTAL_MATERIALIZED)
            measure(results, run, "SELECT 1", wide, "SELECT 1")
            shown["LiteLLM"] = measure(results, run, "LiteLLM", wide, TOTAL_LITELLM, STATEMENTS_LITELLM, 3)
            keep_plan(run, "LiteLLM", wide, TOTAL_LITELLM)
        keep_plan(run, f"view, tail {tail}", wide, TOTAL)
    results.write()
    if run > 0:
        say(f"run {run} of {RUNS}: " + ", ".join(
            f"{v} {shown[v]:.3g} ms" for v in ("view tail 0", "view tail 1000", "materialized view", "LiteLLM")))


def main():
    results = Results("view")
    (harness.RESULTS / "view_plans.txt").unlink(missing_ok=True)
    with harness.clone(harness.wide(), "view_wide") as (wide,):
        narrow = Session(harness.loaded("narrow", ROWS * 10, narrow=True, without=NOT_FOR_NARROW))
        prepare_theirs(wide)
        for session in (wide, narrow):
            prepare(session)
        materialize(wide)
        wide.run("CHECKPOINT")
        for run in range(RUNS + 1):
            one_run(results, run, wide, narrow)
        for variant, session in (("table", wide), ("table, ten times the rows", narrow)):
            rows = int(session.value('SELECT count(*) FROM "LiteLLM_SpendLogs"'))
            results.add(RUNS, variant, "rows", rows, "rows")
        results.write()
        narrow.close()
        harness.drop("narrow")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What the indexes of spend_index_set() do for LiteLLM's Logs page, and what inserts pay for them.

The queries are LiteLLM 1.110's own texts, taken from its package, unprepared with their values bound, on 4.7 million rows of
30 days: a plain table, and one with a partition a day. Each asks for something rare: a team, a user, a request by the search
box, an error code, a part of a key's alias, the end users, a team's budget. The window is a past day, whose partition is
closed, or the last 24 hours, of which today's partition has no index. "before" is without our indexes, which a transaction
has dropped and brings back; it takes turns with "after". LiteLLM's own seven indexes are there all the time. Per query:

    blocks  that the query touched, as EXPLAIN (ANALYZE, BUFFERS) says
    time    at the client, in memory

Inserts of 100 rows, prepared, values bound: into plain tables of 100,000 rows with none of ours, each alone, all; and into
partitioned ones with none, all on closed partitions, all on all. Per row inserted the cpu, wall and wal of bench/capture.py.
Metadata is 2.5 kB a row, out of line, in the last three days, which the windows read; older rows have less.
"""

import json
import re
import subprocess
import time

import capture
import harness
import whole
from harness import QUICK, ROOT, Results, Session, rotated, say

RUNS = 1 if QUICK else 5
ROWS = 30_000 if QUICK else 4_700_000
DAYS = 30
INDEXES = ["team", "user", "end_user", "error_code", "failure", "key_alias", "model_id", "call_id"]
PAGES = ["page", "team", "user", "error_code", "key_alias", "search", "end_users"]
QUERIES = [*(f"{window}, {page}" for window in ("a past day", "last 24 h") for page in PAGES), "a month, budget of a team"]
CASE = capture.Case("100 rows", 100, 20)
DAYS_AHEAD = 33  # capture.Pool's rows are of the month to come

# Two sessions, for two cores. Shares of keys fall with their rank: of 2,000 keys in 200 teams and of 1,000 users the last
# have a request in some thousands.
LOAD = """
SET synchronous_commit = off;
INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, api_key, spend, total_tokens, prompt_tokens, completion_tokens,
    "startTime", "endTime", model, model_id, model_group, custom_llm_provider, "user", metadata, cache_hit, request_tags,
    team_id, end_user, session_id, status, litellm_call_id)
SELECT 'chatcmpl-' || uuid, 'acompletion', encode(sha256(k::text::bytea), 'hex'), 0.001, 700, 500, 200,
    started, started + interval '2 s', 'model-' || m, md5(m::text), 'model-' || m, 'openai', 'user-' || k % 1000,
    ('{"user_api_key_alias": "team-' || k % 200 || '-key-' || k || '", "status": '
        || CASE WHEN failed THEN '"failure", "error_information": {"error_code": "'
                || CASE WHEN n % 5000 = 0 THEN '404' WHEN n % 250 = 0 THEN '500' ELSE '429' END
                || '", "error_message": "Rate limit reached"}'
           ELSE 'null, "error_information": null' END
        || CASE WHEN started >= CURRENT_DATE - 2 THEN pad ELSE '' END || '}')::jsonb,
    'False', '["User-Agent: OpenAI/Python 1.68"]', 'team-' || k % 200,
    CASE WHEN n % 100 = 0 THEN 'customer-' || n % 997 ELSE '' END, md5(uuid)::uuid::text,
    CASE WHEN failed THEN 'failure' ELSE 'success' END, 'call-' || uuid
FROM (SELECT n, md5(n || ' request')::uuid::text AS uuid, n % 50 = 0 AS failed,
             floor(power(2001, (hashint8extended(n, 1) & 1048575) / 1048576.0))::int AS k, abs(hashint8(n)) % 20 AS m,
             CURRENT_DATE - {days} + (now() AT TIME ZONE 'UTC' - (CURRENT_DATE - {days})) * (n::float8 / {rows}) AS started
      FROM generate_series({first}, {rows}, 2) AS n) AS r
CROSS JOIN LATERAL (
    SELECT string_agg(', "price_' || i || '": "' || md5(n || ' ' || i) || '"', '') AS pad
    FROM generate_series(1, CASE WHEN started >= CURRENT_DATE - 2 THEN 60 ELSE 0 END) AS i) AS wide;
"""

VALUES = {
    "team": "team-199", "user": "user-999", "error_code": "404", "key_alias": "%key-1500%", "count cap": "10001",
    "scan cap": "10000", "page": "51", "offset": "0",
}


def load(name):
    """The plain table."""
    harness.on_server(f"CREATE DATABASE {name} TEMPLATE {harness.empty()}")
    loads = []
    for first in (1, 2):
        sql = LOAD.replace("{days}", str(DAYS)).replace("{rows}", str(ROWS)).replace("{first}", str(first))
        loads.append(subprocess.Popen(["psql", "-qX", "-v", "ON_ERROR_STOP=1", "-d", name, "-c", sql]))
    if any([load.wait() for load in loads]):
        raise RuntimeError("could not load the rows")
    harness.psql(name, "-U", "litellm", "-f", ROOT / "target/litellm/1.110.sql")
    harness.psql(name, "-c", 'VACUUM (ANALYZE) "LiteLLM_SpendLogs"')


def queries(session):
    """Name: the text, and its values, by window."""
    page = json.loads((ROOT / "target/litellm/logs_page.json").read_text())
    reports = json.loads((ROOT / "target/litellm/reports.json").read_text())
    call = session.value('SELECT litellm_call_id FROM "LiteLLM_SpendLogs"'
                         " WHERE \"startTime\" >= CURRENT_DATE - interval '12 hours' LIMIT 1")
    windows = {
        "a past day": ("(CURRENT_DATE - 1)::text", "(CURRENT_DATE - interval '1 ms')::text"),
        "last 24 h": ("(now() - interval '1 day')::text", "now()::text"),
    }
    for window, (start, end) in windows.items():
        values = VALUES | {"call_id": call, "from": session.value(f"SELECT {start}"), "to": session.value(f"SELECT {end}")}
        for name, (sql, parameters) in page.items():
            yield f"{window}, {name.removeprefix('page.')}", sql, [values[p].encode() for p in parameters]
    month = session.value(f"SELECT (CURRENT_DATE - {DAYS - 1})::timestamp")
    yield "a month, budget of a team", reports["budget_window_1_110.team"], [VALUES["team"].encode(), month.encode()]


def result(answer):
    return [tuple(answer.get_value(r, c) for c in range(answer.nfields)) for r in range(answer.ntuples)]


def comparable(rows):
    """In any order; of a sum in double precision the digits that do not depend on the order of addition."""
    def digits(value):
        return f"{float(value):.9g}" if value and re.fullmatch(rb"-?\d+\.\d+(e[-+]\d+)?", value) else value
    return sorted((tuple(map(digits, row)) for row in rows), key=str)


def measure(results, run, variant, session, sql, values):
    """What it answers."""
    plan = json.loads(result(session.execute_unprepared(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", values))[0][0])
    top = plan[0]["Plan"]
    results.add(run, variant, "blocks", top["Shared Hit Blocks"] + top["Shared Read Blocks"], "blocks")
    start = time.perf_counter_ns()
    answer = session.execute_unprepared(sql, values)
    results.add(run, variant, "time", (time.perf_counter_ns() - start) / 1e6, "ms")
    return comparable(result(answer))


def ask_for_indexes(session, indexes, hot=False):
    """Until the worker has built them."""
    session.run("SET client_min_messages = warning")
    start = time.monotonic()
    session.run(f"SELECT * FROM spend_index_set(indexes => '{{{', '.join(indexes)}}}', hot => {hot})")
    while session.value("SELECT bool_and(state IN ('built', 'open partition')) FROM spend_index_status") != "t":
        time.sleep(1)  # to look costs, too
    session.run('VACUUM (ANALYZE) "LiteLLM_SpendLogs"')
    return time.monotonic() - start


def measure_queries(results, table, session):
    ours = [name.decode() for name, in session.rows(
        "SELECT indexrelid::regclass FROM pg_index i JOIN pg_class c ON c.oid = indexrelid WHERE relname LIKE 'litellm_spend_%'")]
    asked = list(queries(session))
    for run in range(RUNS + 1):
        answers = {}
        for when in rotated(["before", "after"], run):
            session.run("BEGIN")
            if when == "before":
                session.run(f"SET LOCAL client_min_messages = warning; DROP INDEX {', '.join(ours)}")
            for name, sql, values in asked:
                answers[name, when] = measure(results, run, f"{table}, {name}: {when}", session, sql, values)
            session.run("ROLLBACK")
        different = [name for name, _, _ in asked if answers[name, "before"] != answers[name, "after"]]
        if different:
            raise RuntimeError(f"the indexes change what these answer: {different}")
        results.write()
        say(f"queries of the {table} table, run {run} of {RUNS}")


def prepare(session):
    """Everything but the indexes of ours."""
    session.run("CREATE EXTENSION pg_trgm")
    harness.create_extension(session)


def measure_pages(results):
    load("logs_plain")
    with harness.clone("logs_plain", "logs_partitioned") as (session,):
        prepare(session)
        harness.partition(session, 2)
        built_in = ask_for_indexes(session, INDEXES)
        say(f"indexes of closed partitions built in {built_in:.0f} s")
        measure_queries(results, "partitioned", session)
    session = Session("logs_plain")
    prepare(session)
    say(f"indexes of the plain table built in {ask_for_indexes(session, INDEXES):.0f} s")
    measure_queries(results, "plain", session)
    sizes = session.rows('SELECT "index", bytes FROM spend_index_status WHERE name IS NOT NULL')
    table = int(session.value("SELECT pg_total_relation_size('\"LiteLLM_SpendLogs\"')"))
    for name, size in sizes:
        results.add(1, f"index {name.decode()}", "size", int(size) / ROWS, "B/row")
    results.add(1, "the table with all of them", "size", table / ROWS, "B/row")
    session.close()
    harness.drop("logs_plain")


def measure_inserts(results):
    pool = capture.Pool([CASE], RUNS)
    variants = {"none": [], **{name: [name] for name in INDEXES}, "all": INDEXES}
    partitioned = {"partitioned, none": None, "partitioned, all on closed": False, "partitioned, all on all": True}
    base = harness.loaded("base", capture.BASE)
    names = [f"logs_insert_{i}" for i in range(len(variants) + len(partitioned))]
    with harness.clone(base, *names) as opened:
        sessions = dict(zip([*variants, *partitioned], opened))
        for variant, session in sessions.items():
            prepare(session)
            if variant in partitioned:
                harness.partition(session, DAYS_AHEAD)
                if partitioned[variant] is not None:
                    ask_for_indexes(session, INDEXES, partitioned[variant])
            elif variants[variant]:
                ask_for_indexes(session, variants[variant])
            session.prepare("insert", capture.statement(CASE.rows))
        observer = Session("postgres")
        observer.run("CHECKPOINT")
        for run in range(RUNS + 1):
            halves = [pool.statements(CASE) for _ in range(2)]
            meters = {variant: capture.Meter(session, observer) for variant, session in sessions.items()}
            for half in halves:
                for variant in rotated(list(sessions), run if half is halves[0] else run + len(sessions) // 2):
                    with meters[variant].running():
                        for values in half:
                            sessions[variant].execute("insert", values)
            for variant, meter in meters.items():
                meter.add_to(results, run, f"inserts, {variant}", 2 * CASE.rows * CASE.block)
            results.write()
            say(f"inserts, run {run} of {RUNS}: cpu with all {meters['all'].cpu / meters['none'].cpu:.2f}, on closed partitions "
                f"{meters['partitioned, all on closed'].cpu / meters['partitioned, none'].cpu:.2f}")
        observer.close()
    pool.close()
    harness.drop("pool")


def main():
    results = Results("logs_page")
    with whole.default_pace():
        measure_pages(results)
        measure_inserts(results)


if __name__ == "__main__":
    main()

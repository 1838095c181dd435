#!/usr/bin/env python3
"""What capture adds to LiteLLM's writes: multi-row INSERT … ON CONFLICT DO NOTHING, values bound, autocommit.

Prepared once, but for one case: Prisma keeps the statements of the last few numbers of rows, and parses others anew. Rows
have about 1.1 kB of metadata, and in one case the 9 kB that LiteLLM 1.109 writes, most of it null prices. LiteLLM 1.110 has a
statement of its own, taken from its package, with all rows in one JSON parameter.

Two databases with the same 100,000 rows and all seven indexes, one attached, get the same new rows in blocks of
statements: attached, plain, plain, attached. Per row inserted:

    cpu    of the inserting backend
    wall   at the client, commit included
    wal    of the whole server; nothing else runs

Where the server has pg_ivm, two databases more get them, in the same way. Its views there have the rows of our built-in rollups,
and it maintains them within the statement: in one database those of daily_spend_by_model only, in the other those of four, all
but daily_spend_by_tag, which takes a function that returns rows. Ours always has all five. Views and rollups are compared.

The worker does not merge meanwhile. After each run one spend_rollup_run() merges what was captured (variant "merge",
per row inserted). Rows are shaped and ordered as in bench/spend_rows.sql: a statement's rows are minutes apart.
"""

import json
import time
from contextlib import contextmanager
from dataclasses import dataclass

import harness
from harness import QUICK, Results, Session, say

RUNS = 2 if QUICK else 7
BASE = 2_000 if QUICK else 100_000


@dataclass
class Case:
    label: str
    rows: int  # a statement
    block: int  # statements
    prepared: bool = True
    wide: bool = False
    recordset: bool = False  # LiteLLM 1.110's statement

    def __post_init__(self):
        self.block = max(1, self.block // 10) if QUICK else self.block


# 100 rows first: its warm-up writes to nearly every page of the indexes, so that no full-page images flatter the later
# ones.
CASES = [
    Case("100 rows", 100, 50),
    Case("100 rows, parsed anew", 100, 50, prepared=False),
    Case("100 rows of 9 kB metadata", 100, 20, wide=True),
    Case("100 rows, LiteLLM 1.110", 100, 50, recordset=True),
    Case("1000 rows", 1000, 5),
    Case("1 row", 1, 1000),
]

PRICES = ", ".join(f'"input_cost_per_token_above_{i}k_tokens_priority": null' for i in range(128, 278))

COLUMNS = """
    request_id call_type api_key spend total_tokens prompt_tokens completion_tokens startTime endTime
    completionStartTime model model_id model_group custom_llm_provider api_base user metadata cache_hit cache_key
    request_tags team_id organization_id end_user requester_ip_address session_id status request_duration_ms
    created_at updated_at litellm_call_id
""".split()
TIMES = {"startTime", "endTime", "completionStartTime", "created_at", "updated_at"}


NUMBERS = {"spend": float, "total_tokens": int, "prompt_tokens": int, "completion_tokens": int, "request_duration_ms": int}
JSON = {"metadata", "request_tags"}


def recordset(rows):
    """Rows as the one parameter of LiteLLM 1.110's statement."""
    def field(column, value):
        if value is None:
            return None
        return json.loads(value) if column in JSON else NUMBERS.get(column, bytes.decode)(value)
    return json.dumps([{c: field(c, v) for c, v in zip(COLUMNS, row)} for row in rows]).encode()


def statement(rows):
    """The INSERT with its $1, $2, …"""
    columns = ", ".join(f'"{c}"' for c in COLUMNS)
    width = len(COLUMNS)
    values = ", ".join("(" + ", ".join(f"${r * width + c + 1}" for c in range(width)) + ")" for r in range(rows))
    return f'INSERT INTO "LiteLLM_SpendLogs" ({columns}) VALUES {values} ON CONFLICT DO NOTHING'


def widened(metadata):
    """With the model's price list, as LiteLLM 1.109 repeats it in each row."""
    return metadata[:-1] + f', "model_map_information": {{"model_map_value": {{{PRICES}}}}}}}'.encode()


class Pool:
    """New rows in order of time, later than all that the databases have."""

    def __init__(self, cases=CASES, runs=RUNS):
        self.size = sum(2 * case.rows * case.block for case in cases) * (runs + 1)
        self.session = Session(harness.loaded("pool", self.size, seeds=(3, 4)))
        columns = ", ".join(f'"{c}" + interval \'31 days\'' if c in TIMES else f'"{c}"' for c in COLUMNS)
        self.session.run(f'BEGIN; DECLARE pool CURSOR FOR SELECT {columns} FROM "LiteLLM_SpendLogs" ORDER BY "startTime"')

    def statements(self, case):
        """The values of a block of statements."""
        rows = case.rows
        found = self.session.rows(f"FETCH {rows * case.block} FROM pool")
        if len(found) < rows * case.block:
            raise RuntimeError("the pool is empty")
        if case.wide:
            at = COLUMNS.index("metadata")
            found = [row[:at] + (widened(row[at]),) + row[at + 1:] for row in found]
        statements = [found[i * rows:(i + 1) * rows] for i in range(case.block)]
        if case.recordset:
            return [[recordset(statement)] for statement in statements]
        return [[v for row in statement for v in row] for statement in statements]

    def close(self):
        self.session.close()


@dataclass
class Ivm:
    """Views of pg_ivm with the columns of our rollups."""

    name: str
    rollups: dict  # their dimensions besides the date
    extension: str = "pg_ivm"

    MEASURES = """
        sum(spend::numeric) AS spend, sum(prompt_tokens) AS prompt_tokens, sum(completion_tokens) AS completion_tokens,
        sum(total_tokens) AS total_tokens, count(*) AS requests,
        sum(CASE WHEN status = 'failure' THEN 1 ELSE 0 END) AS failed_requests
    """

    @property
    def database(self):
        return f"capture_ivm_{len(self.rollups)}"

    def attach(self, session):
        session.run("CREATE EXTENSION pg_ivm")
        session.run("LOAD 'pg_ivm'")
        for rollup, dimensions in self.rollups.items():
            shown = ", ".join(['"startTime"::date AS date', *dimensions])
            grouped = ", ".join(['"startTime"::date', *dimensions])
            session.run(f"SELECT pgivm.create_immv('{rollup}', $view$"
                        f'SELECT {shown}, {self.MEASURES} FROM "LiteLLM_SpendLogs" GROUP BY {grouped}$view$)')
            session.run(f"VACUUM (ANALYZE) {rollup}")

    def verify(self, session, attached):
        for rollup, dimensions in self.rollups.items():
            columns = ", ".join(["date", *dimensions, "spend", "prompt_tokens", "completion_tokens", "total_tokens", "requests",
                                 "failed_requests"])
            checksum = f"SELECT count(*), sum(spend), sum(hash_record_extended(ROW({columns}), 0)) FROM "
            found, ours = session.rows(checksum + rollup), attached.rows(checksum + f"litellm_spend.{rollup}")
            if found != ours:
                raise RuntimeError(f"{self.name}: {rollup} has {found}, ours {ours}")


IVMS = [
    Ivm("pg_ivm, by model", {"daily_spend_by_model": ["model"]}),
    Ivm("pg_ivm, four", {"daily_spend": [], "daily_spend_by_key": ["api_key", '"user"'], "daily_spend_by_model": ["model"],
                         "daily_spend_by_end_user": ["end_user"]}),
]


class Meter:
    """Adds up what a session costs while it is measured."""

    def __init__(self, session, observer):
        self.session, self.observer = session, observer
        self.cpu = self.wall = self.wal = 0

    @contextmanager
    def running(self):
        wal, cpu, wall = self._wal(), self.session.cpu_ns(), time.perf_counter_ns()
        yield
        self.wall += time.perf_counter_ns() - wall
        self.cpu += self.session.cpu_ns() - cpu
        self.wal += self._wal() - wal

    def _wal(self):
        return int(self.observer.value("SELECT pg_current_wal_insert_lsn() - '0/0'"))

    def add_to(self, results, run, variant, rows):
        results.add(run, variant, "cpu", self.cpu / rows / 1000, "us/row")
        results.add(run, variant, "wall", self.wall / rows / 1000, "us/row")
        results.add(run, variant, "wal", self.wal / rows, "B/row")


def one_run(results, run, case, pool, sessions, observer):
    meters = {variant: Meter(session, observer) for variant, session in sessions.items()}
    halves = [pool.statements(case) for _ in range(2)]
    sql = statement(case.rows)
    for variant, half in [(variant, 0) for variant in sessions] + [(variant, 1) for variant in reversed(sessions)]:
        session = sessions[variant]
        with meters[variant].running():
            for values in halves[half]:
                if case.prepared:
                    session.execute("insert_recordset" if case.recordset else f"insert_{case.rows}", values)
                else:
                    session.execute_unprepared(sql, values)
    rows = 2 * case.rows * case.block
    label = case.label
    for variant, meter in meters.items():
        meter.add_to(results, run, f"{label} {variant}", rows)

    attached = sessions["attached"]
    merging = Meter(attached, observer)
    with merging.running():
        attached.run("SELECT * FROM spend_rollup_run()")
    if harness.tail_rows(attached):
        raise RuntimeError("the merge left a tail")
    merging.add_to(results, run, f"{label} merge", rows)
    results.write()
    if run > 0:
        for variant in filter(lambda name: name != "plain", sessions):
            ratios = [getattr(meters[variant], m) / getattr(meters["plain"], m) for m in ("cpu", "wall", "wal")]
            say(f"{label}, run {run} of {RUNS}: {variant} / plain:"
                f" cpu {ratios[0]:.2f}, wall {ratios[1]:.2f}, wal {ratios[2]:.2f}")


def main():
    results = Results("capture")
    pool = Pool()
    ivms = harness.present(IVMS)
    databases = ["capture_attached", "capture_plain", *(ivm.database for ivm in ivms)]
    with harness.clone(harness.loaded("base", BASE), *databases) as (attached, plain, *maintained):
        harness.attach(attached)
        sessions = {"attached": attached, "plain": plain}
        for ivm, session in zip(ivms, maintained):
            ivm.attach(session)
            sessions[ivm.name] = session
        observer = Session("postgres")
        observer.run("CHECKPOINT")
        for rows in sorted({case.rows for case in CASES}):
            for session in sessions.values():
                session.prepare(f"insert_{rows}", statement(rows))
        texts = json.loads((harness.ROOT / "target/litellm/1.110.json").read_text())
        for session in sessions.values():
            session.prepare("insert_recordset", texts["spend_log"])
        for case in CASES:
            for run in range(RUNS + 1):
                one_run(results, run, case, pool, sessions, observer)
        counts = [int(s.value('SELECT count(*) FROM "LiteLLM_SpendLogs"')) for s in sessions.values()]
        if counts != [BASE + pool.size] * len(sessions):
            raise RuntimeError(f"the tables have {counts} rows instead of {BASE + pool.size}")
        wrong = attached.rows("SELECT * FROM spend_rollup_verify('daily_spend', NULL, NULL)")
        if wrong:
            raise RuntimeError(f"the rollup differs from the raw rows: {wrong}")
        for ivm, session in zip(ivms, maintained):
            ivm.verify(session, attached)
        observer.close()
    pool.close()
    harness.drop("pool")


if __name__ == "__main__":
    main()

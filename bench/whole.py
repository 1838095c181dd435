#!/usr/bin/env python3
"""What a server pays for everything that attach switches on: capture, the built-in rollups, the worker at its default pace.

A session inserts as LiteLLM does, 100 rows a statement, a statement each tenth of a second. Three variants take turns, each
in a new copy of the same database: attached; with reports, the three hourly rollups more that are made when asked for; and
plain, which has no extension. Measured until all is merged and the change log is trimmed, with the VACUUM of the tables that
were written. Per row inserted:

    cpu    of all processes of the server, those that have ended too
    wal    of the whole server

and when all is merged, what the server goes on to use with nobody writing. What was inserted before the measurement
begins is made by the same statements, so that no full-page image is in it. Requests begin in the minute before their
insertion. Apart from that, of four days of 25,000 rows each, after VACUUM and per row:

    disk   the spend log, and the rollups, each with their indexes

Two kinds of data: "related", rows of 1.2 kB of 300 keys, each with one user, team and organization, a few of them and of
20 models busy; and "independent", rows of 0.7 kB in which each dimension has any value.

    WHOLE_RUNS=1 WHOLE_SECONDS=10 bench/run whole    a shorter one; fewer rows cost more each
"""

import math
import os
import random
import time
import uuid
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import capture
import harness
from harness import QUICK, Results, Session, rotated, say

RUNS = int(os.environ.get("WHOLE_RUNS", 1 if QUICK else 5))
SECONDS = int(os.environ.get("WHOLE_SECONDS", 4 if QUICK else 30))
SETTLE_SECONDS = 3  # the worker looks at what VACUUM has changed in the catalog
IDLE_SECONDS = 2 if QUICK else 10
STATEMENTS_A_SECOND = 10
ROWS = 100  # a statement
BEFORE = 10 if QUICK else 100  # statements
DAYS, ROWS_A_DAY = 4, 2_500 if QUICK else 25_000
KINDS = ["related", "independent"]
ATTACHED = {"attached": False, "with reports": True}  # whether the reports are asked for
DEFAULTS = ["litellm_spend.merge_interval"]


class Rows:
    """Makes rows; the same seed makes the same ones, but for their times."""

    def __init__(self, kind, seed):
        self.related = kind == "related"
        self.random = random.Random(f"{kind} {seed}")

    def rank(self, most):
        """By power where dimensions are related: the k-th has a share of about 1/k."""
        if self.related:
            return int(math.pow(most, self.random.random())) - 1
        return self.random.randrange(most)

    def row(self, now):
        draw = self.random
        key, model = self.rank(300), self.rank(20)
        user, team, organization = (key, key % 30, key % 10) if self.related else (self.rank(300), self.rank(30), self.rank(10))
        client = key % 40 if self.related else self.rank(40)
        request, failed = uuid.UUID(int=draw.getrandbits(128)), draw.random() < 0.03
        prompt, completion = int(draw.lognormvariate(6, 1.6)) + 1, int(draw.lognormvariate(5, 1)) + 1
        cost = 0 if failed else (prompt * 2.5 + completion * 10) / 1e6
        begin = now - timedelta(seconds=draw.random() * 60)
        end = begin + timedelta(seconds=draw.lognormvariate(0.3, 0.8))
        tags = [f"User-Agent: OpenAI/Python 1.{client}", f"env:{('prod', 'staging', 'dev')[client % 3]}"]
        metadata = f'{{"user_api_key": "{key:064x}", "litellm_overhead_time_ms": {draw.randrange(99)}'
        if self.related:
            metadata += (f', "usage_object": {{"prompt_tokens": {prompt}, "completion_tokens": {completion}}}, "cost_breakdown": '
                         f'{{"total_cost": {cost}}}, "user_api_key_alias": "key-{key}", "user_agent": "{tags[0]}"'
                         f', "requester_ip_address": "10.0.{team}.{user % 256}", "trace": "{draw.randbytes(150).hex()}"')
        return {
            "request_id": f"chatcmpl-{request}", "call_type": "acompletion", "api_key": f"{key:064x}", "spend": cost,
            "total_tokens": prompt + completion, "prompt_tokens": prompt, "completion_tokens": completion,
            "startTime": begin, "endTime": end, "completionStartTime": end, "model": f"openai/gpt-4.{model}",
            "model_id": f"{model:010x}", "model_group": f"gpt-4.{model}", "custom_llm_provider": "openai", "api_base": "",
            "user": f"user{user}@corp.example", "metadata": metadata + "}",
            "cache_hit": "None" if self.related else draw.choice(["None", "False", "True"]), "cache_key": "Cache OFF",
            "request_tags": "[" + ", ".join(f'"{tag}"' for tag in tags[:draw.randrange(3)]) + "]",
            "team_id": f"team-{team}", "organization_id": f"org-{organization}",
            "end_user": "" if self.related or draw.random() < 0.5 else f"customer-{self.rank(200)}",
            "requester_ip_address": f"10.0.{team}.{user % 256}", "session_id": str(request),
            "status": "failure" if failed else "success", "request_duration_ms": int((end - begin).total_seconds() * 1000),
            "created_at": end, "updated_at": end, "litellm_call_id": str(request),
        }

    def statement(self, now):
        rows = [self.row(now) for _ in range(ROWS)]
        return [str(row[column]).encode() for row in rows for column in capture.COLUMNS]


class Server:
    """What all processes of the server have used so far."""

    def __init__(self):
        self.session = Session("postgres")
        self.postmaster = int(Path(self.session.value("SHOW data_directory"), "postmaster.pid").read_text().split()[0])

    @staticmethod
    def _stat(pid):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()

    def _cpu_us(self):
        tick = 1e6 / os.sysconf("SC_CLK_TCK")
        # Of the postmaster those who have ended, too.
        total = sum(int(ticks) for ticks in self._stat(self.postmaster)[11:15]) * tick
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and int(self._stat(entry.name)[1]) == self.postmaster:
                    total += int((entry / "schedstat").read_text().split()[0]) / 1000
            except (FileNotFoundError, ProcessLookupError):
                pass
        return total

    def used(self):
        """CPU in µs, WAL in bytes."""
        return self._cpu_us(), int(self.session.value("SELECT pg_current_wal_insert_lsn() - '0/0'"))


@contextmanager
def default_pace():
    """The worker's, which bench/run slows down."""
    for setting in DEFAULTS:
        server = Session("postgres")
        default = server.value(f"SELECT boot_val || coalesce(unit, '') FROM pg_settings WHERE name = '{setting}'")
        server.close()
        harness.on_server(f"ALTER SYSTEM SET {setting} = '{default}'")
    harness.on_server("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        harness.on_server(*(f"ALTER SYSTEM RESET {setting}" for setting in DEFAULTS), "SELECT pg_reload_conf()")


def wait_until_merged(session):
    harness.wait_until(
        session, "SELECT min(r.watermark) = q.last_value AND s.trimmed_to = q.last_value FROM litellm_spend.change_log_seq q,"
        " litellm_spend.source s JOIN litellm_spend.rollup r ON r.source = s.name WHERE s.name = 'change_log'"
        " GROUP BY q.last_value, s.trimmed_to", seconds=120, pause=0.5)  # what it asks is measured, too


def insert(session, rows, statements, pace):
    begin = datetime.now(timezone.utc).replace(tzinfo=None)
    values = [rows.statement(begin + n * timedelta(seconds=pace)) for n in range(statements)]
    begin = time.monotonic()
    for n, bound in enumerate(values):
        time.sleep(max(0, begin + n * pace - time.monotonic()))
        session.execute("insert", bound)


def one_run(results, server, run, kind, variant):
    rows, count = Rows(kind, run), SECONDS * STATEMENTS_A_SECOND
    attached = variant in ATTACHED
    with harness.clone(harness.empty(), "whole") as (session,):
        if attached:
            harness.attach(session, ATTACHED[variant])
        session.prepare("insert", capture.statement(ROWS))
        insert(session, rows, BEFORE, 0)
        tables = ['"LiteLLM_SpendLogs"']
        if attached:
            wait_until_merged(session)
            tables += [f"litellm_spend.{name.decode()}" for name, in session.rows(
                "SELECT relname FROM pg_class WHERE relnamespace = 'litellm_spend'::regnamespace AND relkind = 'r'")]
        vacuum = f"VACUUM {', '.join(tables)}"
        session.run(vacuum)

        cpu, wal = server.used()
        insert(session, rows, count, 1 / STATEMENTS_A_SECOND)
        if attached:
            wait_until_merged(session)
        session.run(vacuum)
        cpu, wal = (after - before for after, before in zip(server.used(), (cpu, wal)))
        label, inserted = f"{kind} {variant}", count * ROWS
        results.add(run, label, "cpu", cpu / inserted, "us/row")
        results.add(run, label, "wal", wal / inserted, "B/row")
        say(f"{label}, run {run} of {RUNS}: {cpu / inserted:.1f} us/row, WAL {wal / inserted:.0f} B/row")
        time.sleep(SETTLE_SECONDS)
        cpu, wal = server.used()
        time.sleep(IDLE_SECONDS)
        cpu, wal = (after - before for after, before in zip(server.used(), (cpu, wal)))
        results.add(run, label, "idle cpu", cpu / IDLE_SECONDS / 1000, "ms/s")
        results.add(run, label, "idle wal", wal / IDLE_SECONDS, "B/s")
        say(f"{label}, idle, run {run} of {RUNS}: {cpu / IDLE_SECONDS / 1000:.2f} ms/s, WAL {wal / IDLE_SECONDS:.0f} B/s")
        if attached:
            verify(session, ATTACHED[variant])
    results.write()


def verify(session, reports):
    for name in ["daily_spend", "daily_spend_by_tag"] + ["hourly_usage"] * reports:
        wrong = session.rows(f"SELECT * FROM spend_rollup_verify('{name}', NULL, NULL)")
        if wrong:
            raise RuntimeError(f"{name} differs from the raw rows: {wrong}")


def measure_disk(results, kind):
    """Once: it does not vary."""
    rows = Rows(kind, 0)
    now = datetime.now(timezone.utc).replace(tzinfo=None)
    with harness.clone(harness.empty(), "whole_disk") as (session,):
        session.prepare("insert", capture.statement(ROWS))
        for n in range(DAYS * ROWS_A_DAY // ROWS):
            session.execute("insert", rows.statement(now - timedelta(days=DAYS) * (1 - n * ROWS / (DAYS * ROWS_A_DAY))))
        of_rollups = "relname LIKE '%\\_rollup'"
        for variant, which in (("plain", "relname = 'LiteLLM_SpendLogs'"), ("attached", of_rollups), ("with reports", of_rollups)):
            if variant == "attached":
                harness.attach(session)
            elif variant in ATTACHED:
                session.run("SELECT * FROM spend_attach(reports => true)")
                harness.backfill(session)
            size = harness.size(session, which)
            results.add(1, f"{kind} {variant}", "disk", size / (DAYS * ROWS_A_DAY), "B/row")
            say(f"{kind} {variant}: disk {size / (DAYS * ROWS_A_DAY):.0f} B/row")
    results.write()


def main():
    results = Results("whole")
    server = Server()
    for kind in KINDS:
        measure_disk(results, kind)
    with default_pace():
        for run in range(1, RUNS + 1):
            for kind in KINDS:
                for variant in rotated(["plain", *ATTACHED], run):
                    one_run(results, server, run, kind, variant)


if __name__ == "__main__":
    main()

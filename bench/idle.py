#!/usr/bin/env python3
"""What workers cost that have nothing to do, at their default pace.

Copies of one database, half of them with the reports, are attached and get a few hundred rows. When all is merged each has a
worker with nothing to do, and nobody types anything:

    first minute    from five seconds after the last merge on: it looks each second
    after that      it looks each four seconds

    cpu             of each worker, and of the launcher, which they share
    wal             of the whole server, by all of them
"""

import time
from contextlib import ExitStack

import harness
import whole
from harness import QUICK, Results, Session, say

COPIES = 2 if QUICK else 5  # of each variant
STATEMENTS = 5
LOOKED_AT = 2 if QUICK else 40  # seconds
FIRST, LATER = "first minute", "after that"


def workers(server):
    """By database; the launcher's is None."""
    found = server.rows("SELECT database, pid FROM spend_worker_status WHERE kind LIKE 'litellm_spend %'")
    return {database and database.decode(): int(pid) for database, pid in found}


def cpu_ms(pid):
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e6


def look(results, phase, variants, pids, server):
    wal = lambda: int(server.value("SELECT pg_current_wal_insert_lsn() - '0/0'"))
    before, wal_before, begin = {database: cpu_ms(pid) for database, pid in pids.items()}, wal(), time.monotonic()
    time.sleep(LOOKED_AT)
    seconds = time.monotonic() - begin
    for variant, databases in variants.items():
        for run, database in enumerate(databases, 1):
            used = (cpu_ms(pids[database]) - before[database]) / seconds
            results.add(run, f"{variant}, {phase}", "cpu", used, "ms/s")
            say(f"{variant}, {phase}, {database}: {used:.3f} ms/s")
    results.add(1, f"launcher, {phase}", "cpu", (cpu_ms(pids[None]) - before[None]) / seconds, "ms/s")
    results.add(1, f"all of them, {phase}", "wal", (wal() - wal_before) / seconds, "B/s")


def main():
    results = Results("idle")
    variants = {variant: [f"idle_{reports:d}_{n}" for n in range(COPIES)] for variant, reports in whole.ATTACHED.items()}
    with whole.default_pace(), ExitStack() as copies:
        sessions = []
        for variant, databases in variants.items():
            for session in copies.enter_context(harness.clone(harness.empty(), *databases)):
                harness.attach(session, whole.ATTACHED[variant])
                session.prepare("insert", whole.capture.statement(whole.ROWS))
                sessions.append(session)
        for n, session in enumerate(sessions):
            whole.insert(session, whole.Rows("related", n), STATEMENTS, 0)
        for session in sessions:
            whole.wait_until_merged(session)
        merged = time.monotonic()
        time.sleep(5)
        server = Session(variants["attached"][0])
        pids = workers(server)
        look(results, FIRST, variants, pids, server)
        time.sleep(max(0, merged + 70 - time.monotonic()))
        look(results, LATER, variants, pids, server)
        server.close()
    results.write()


if __name__ == "__main__":
    main()

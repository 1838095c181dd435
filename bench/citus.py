#!/usr/bin/env python3
"""The pipeline of bench/pipeline.py on a cluster of Citus on this machine, a coordinator and two nodes: two connections COPY
page views as fast as they can, and they are merged beside that into views by page and minute, until all is merged.

    article       the article's tables, both distributed by site, and its function, called in a loop by a session of its own
    ours          a declared rollup of the same dimensions, distributed by site, merged by the worker at its default pace
    single node   the same on one server without Citus
    ingest alone  on the cluster; nobody merges

Each on new tables, in turns. CPU is that of all servers of the variant. Then the dashboard's query of the article, the views of
one site by minute, when all is merged, as the coordinator's client sees it: on the table of what was merged, and, of ours, on
the live view.

Where the server has no Citus it says so and measures nothing. The three share two cores with everything else: what it shows
is what a merge costs, not how a cluster scales.
"""

import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import harness
import pipeline
from harness import QUICK, ROOT, Results, Session, say

RUNS = 2 if QUICK else 5
ROWS = int(os.environ.get("ROWS", 200_000 if QUICK else 10_000_000))
BATCH = 100_000 if ROWS >= 1_000_000 else 10_000
FILES = 20
SHARDS = 8
SITES = 50  # asked for by the dashboard, one after the other
DATABASE = pipeline.DATABASE

DASHBOARD = """
    SELECT period_start, sum(view_count) FROM {relation}
    WHERE site_id = {site} AND period_start >= '2026-01-10 00:05 UTC' GROUP BY period_start ORDER BY period_start
"""


def has_citus():
    library = subprocess.check_output([os.environ["PG_CONFIG"], "--pkglibdir"], text=True).strip()
    return (Path(library) / "citus.so").exists()


class Servers:
    """One server or three, each at an address of its own, all on one port."""

    def __init__(self, nodes, preload):
        self.directories, self.ports = [], []
        for _ in range(nodes):
            directory = tempfile.mkdtemp(prefix="spend_citus.")
            self.directories.append(directory)
            settings = [
                f"shared_preload_libraries = '{preload}'", "shared_buffers = 512MB", "max_wal_size = 8GB", "checkpoint_timeout = 1h",
                "autovacuum = off", "max_worker_processes = 32", "max_prepared_transactions = 100",
                "litellm_spend.merge_interval = '1h'", "litellm_spend.discovery_interval = '1d'",
            ]
            if nodes > 1:
                settings.append("citus.node_conninfo = 'sslmode=disable'")
            script = '. scripts/env.sh; . scripts/cluster.sh; cluster_start "$@"; echo "$PGPORT"'
            started = subprocess.check_output(["bash", "-c", script, "bash", directory, *settings], cwd=ROOT, text=True)
            self.ports.append(int(started))

    def use(self):
        os.environ["PGHOST"], os.environ["PGPORT"] = self.directories[0], str(self.ports[0])

    def on_nodes(self, database, *statements):
        """On each of them, the coordinator last."""
        for directory, port in reversed(list(zip(self.directories, self.ports))):
            os.environ["PGHOST"], os.environ["PGPORT"] = directory, str(port)
            session = Session(database)
            for statement in statements:
                session.run(statement)
            session.close()

    def processes(self):
        """Postmasters, and what they have started."""
        for directory in self.directories:
            postmaster = int((Path(directory) / "data/postmaster.pid").read_text().split()[0])
            yield postmaster
            yield from map(int, Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split())

    def cpu_seconds(self):
        """Of all processes that are there, and of those that have ended."""
        ticks = 0
        for pid in self.processes():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except FileNotFoundError:
                continue
            ticks += sum(int(field) for field in fields[11:15])
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self):
        for directory in self.directories:
            subprocess.run(["bash", "-c", '. scripts/env.sh; . scripts/cluster.sh; cluster_stop "$1"', "bash", directory], cwd=ROOT)
            shutil.rmtree(directory, ignore_errors=True)


class Article(pipeline.Article):
    live = None

    def start(self, session):
        session.run(pipeline.ARTICLE.split("CREATE FUNCTION do_page_view")[0])
        session.run("SELECT create_distributed_table('page_views_1min', 'site_id', colocate_with => 'page_views')")
        session.run("CREATE FUNCTION do_page_view" + pipeline.ARTICLE.split("CREATE FUNCTION do_page_view")[1])
        self.begin()


class Ours(pipeline.Ours):
    live = "litellm_spend.page_views_1min"

    def __init__(self, name):
        self.name = name

    def start(self, session):
        self.begin(session)


def make_database(servers, citus):
    """On all nodes, with what belongs to it."""
    servers.on_nodes("postgres", f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)", f"CREATE DATABASE {DATABASE}")
    if citus:
        servers.on_nodes(DATABASE, "CREATE EXTENSION citus")
    servers.use()
    session = Session(DATABASE)
    session.run("SET client_min_messages = warning; SET timezone = 'UTC'")
    if citus:
        session.run(f"SELECT citus_set_coordinator_host('127.0.0.1', {servers.ports[0]})")
        for port in servers.ports[1:]:
            session.run(f"SELECT citus_add_node('127.0.0.1', {port})")
    session.run("CREATE EXTENSION litellm_spend")
    session.run(pipeline.PAGE_VIEWS)
    if citus:
        session.run(f"SELECT create_distributed_table('page_views', 'site_id', shard_count => {SHARDS})")
    return session


def dashboard(session, relation):
    """Milliseconds, for one site after the other."""
    session.run(DASHBOARD.format(relation=relation, site=0))
    return statistics.median(session.timed(DASHBOARD.format(relation=relation, site=site)) for site in range(1, SITES))


def one_run(results, run, servers, variant):
    session = make_database(servers, citus=len(servers.ports) > 1)
    if variant.merged_to:
        variant.start(session)
    session.run("CHECKPOINT")
    failures, lags = [], []
    pipeline.ROWS, pipeline.BATCH = ROWS, BATCH
    copies = [threading.Thread(target=pipeline.copy, args=(first, failures)) for first in range(pipeline.CONNECTIONS)]
    cpu, start, ingested = servers.cpu_seconds(), time.perf_counter(), None
    moments = [(0.0, 0)]
    for thread in copies:
        thread.start()
    while True:
        now, writing = time.perf_counter() - start, any(thread.is_alive() for thread in copies)
        if failures:
            raise failures[0]
        if ingested is None and not writing:
            ingested = now
        merged = int(session.value(variant.merged_to)) if variant.merged_to else ROWS
        moments.append((now, int(session.value("SELECT coalesce(pg_sequence_last_value('page_views_view_id_seq'), 0)"))))
        # Since when there has been a number that is not merged.
        lags.append(now - next((seconds for seconds, numbered in moments if numbered > merged), now))
        if ingested is not None and merged >= ROWS:
            break
        time.sleep(pipeline.SAMPLING)
    seconds = time.perf_counter() - start
    metrics = [("ingest", ROWS / ingested, "rows/s"), ("cpu", servers.cpu_seconds() - cpu, "s")]
    rows = None
    if variant.merged_to:
        variant.end(session)
        metrics += [("end to end", ROWS / seconds, "rows/s"), ("longest lag", max(lags), "s"),
                    ("dashboard", dashboard(session, variant.table), "ms")]
        metrics += [("dashboard, live", dashboard(session, variant.live), "ms")] if variant.live else []
        rows = session.rows(pipeline.CHECKSUM.format(table=variant.table))
    session.close()
    for metric, value, unit in metrics:
        results.add(run, variant.name, metric, value, unit)
    results.write()
    say(f"run {run} of {RUNS}: {variant.name}: " + ", ".join(f"{m} {v:,.1f} {u}" for m, v, u in metrics))
    return rows


def main():
    if not has_citus():
        say("SKIPPED: this server has no Citus")
        return
    results, environment = Results("citus"), dict(os.environ)
    cluster, single = Servers(3, "citus,litellm_spend"), None
    try:
        single = Servers(1, "litellm_spend")
        for servers in (cluster, single):
            servers.use()
            session = Session("postgres")
            directory = session.value("SHOW data_directory")
            for file in range(FILES):
                session.run(pipeline.FILE.format(rows=BATCH, directory=directory, file=file))
            session.close()
        variants = [(cluster, Article()), (cluster, Ours("ours")), (single, Ours("single node")), (cluster, pipeline.Alone())]
        for run in range(1, RUNS + 1):  # no warm-up: each is a new database
            for servers, variant in harness.rotated(variants, run):
                rows = one_run(results, run, servers, variant)
                if rows and int(rows[0][1]) != ROWS:
                    raise RuntimeError(f"{variant.name} has merged {rows[0][1]} of {ROWS} rows")
    finally:
        for servers in filter(None, (cluster, single)):
            servers.stop()
        os.environ.update(environment)


if __name__ == "__main__":
    main()

"""What the scenarios share: databases with LiteLLM's schema, sessions with clocks, and the results.

The server is the throwaway one that bench/run has started; PGHOST and PGPORT name it. Workers merge once an hour there
(litellm_spend.merge_interval), so a scenario merges when it says so, or sets another interval.
"""

import csv
import os
import statistics
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg.pq import ExecStatus

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ["BENCH_RESULTS"])
COMMIT = os.environ.get("BENCH_COMMIT", "")
QUICK = bool(os.environ.get("QUICK"))  # sizes for trying the scripts out; the numbers mean nothing

ROWS = 9_400 if QUICK else 470_000


def say(text):
    print(f"  {text}", flush=True)


# ---- sessions --------------------------------------------------------------------------------------------


class Session:
    """A connection of its own. Statements go straight to libpq: what is timed is the server and one round trip."""

    def __init__(self, database):
        self.connection = psycopg.connect(dbname=database, autocommit=True, prepare_threshold=None)
        self.warnings = []
        self.connection.add_notice_handler(self._on_notice)
        self.libpq = self.connection.pgconn
        self.pid = self.libpq.backend_pid

    def _on_notice(self, diagnostic):
        if diagnostic.severity_nonlocalized == "WARNING":
            self.warnings.append(diagnostic.message_primary)

    def _checked(self, result):
        if result.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
            raise RuntimeError(result.error_message.decode())
        if self.warnings:  # capture never raises: a warning is how it says that it failed
            raise RuntimeError(self.warnings)
        return result

    def run(self, sql):
        """The result of a simple, unprepared statement, or of the last one of several."""
        return self._checked(self.libpq.exec_(sql.encode()))

    def rows(self, sql):
        """Its rows, as the text that the server sent (bytes, None for NULL)."""
        result = self.run(sql)
        return [tuple(result.get_value(r, c) for c in range(result.nfields)) for r in range(result.ntuples)]

    def value(self, sql):
        value = self.rows(sql)[0][0]
        return value and value.decode()

    def prepare(self, name, sql):
        self._checked(self.libpq.prepare(name.encode(), sql.encode()))

    def execute(self, name, values):
        """Runs a prepared statement with its values bound."""
        return self._checked(self.libpq.exec_prepared(name.encode(), values))

    def execute_unprepared(self, sql, values):
        """Has the server parse and plan it as well."""
        return self._checked(self.libpq.exec_params(sql.encode(), values))

    def timed(self, sql):
        """Milliseconds until the client has the result."""
        text = sql.encode()
        start = time.perf_counter_ns()
        result = self.libpq.exec_(text)
        elapsed = time.perf_counter_ns() - start
        self._checked(result)
        return elapsed / 1e6

    def median_ms(self, sql, statements):
        return statistics.median(self.timed(sql) for _ in range(statements))

    def explained_ms(self, sql, statements):
        """Planning and execution time as the server says, medians."""
        plans = [self.connection.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}").fetchone()[0][0]
                 for _ in range(statements)]
        return tuple(statistics.median(p[key] for p in plans) for key in ("Planning Time", "Execution Time"))

    def cpu_ns(self):
        """CPU time that the backend has used, user and system."""
        try:
            return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0])
        except FileNotFoundError:  # a kernel without it: ticks of 10 ms
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) * 10**9 // os.sysconf("SC_CLK_TCK")

    def close(self):
        self.connection.close()


# ---- databases -------------------------------------------------------------------------------------------


def psql(database, *arguments):
    subprocess.run(["psql", "-qX", "-v", "ON_ERROR_STOP=1", "-o", os.devnull, "-d", database, *arguments], check=True,
                   env=os.environ | {"PGOPTIONS": "-c client_min_messages=error"})


def exists(database):
    server = Session("postgres")
    found = server.rows(f"SELECT FROM pg_database WHERE datname = '{database}'")
    server.close()
    return bool(found)


def on_server(*statements):
    server = Session("postgres")
    for statement in statements:
        server.run(statement)
    server.close()


def drop(*databases):
    on_server(*(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)" for database in databases))


def empty():
    """An empty database as LiteLLM makes it, with all seven indexes of the spend log, of a role that is no superuser."""
    if not exists("litellm"):
        on_server("CREATE ROLE litellm LOGIN", "CREATE DATABASE litellm OWNER litellm")
        psql("litellm", "-c", "ALTER SCHEMA public OWNER TO litellm")
        psql("litellm", "-U", "litellm", "-f", ROOT / "target/litellm/migrations.sql", "-f",
              ROOT / "target/litellm/views.sql", "-f", ROOT / "bench/litellm_indexes.sql")
    return "litellm"


def loaded(name, rows, narrow=False, many=False, without=(), seeds=(1, 2), days=30):
    """A database with that many spend logs; made once, then kept for the other scenarios to clone."""
    if exists(name):
        return name
    start = time.monotonic()
    on_server(f"CREATE DATABASE {name} TEMPLATE {empty()}")
    for index in without:
        psql(name, "-c", f'DROP INDEX "LiteLLM_SpendLogs_{index}_idx"')
    # Two sessions, for two cores; different seeds make different rows, the same ones the same request_id.
    loads = [
        subprocess.Popen(
            ["psql", "-qX", "-o", os.devnull, "-d", name, "-v", f"rows={rows // 2}", "-v", f"seed={seed}",
             "-v", f"narrow={narrow:d}", "-v", f"many={many:d}", "-v", f"days={days}", "-f", ROOT / "bench/spend_rows.sql"])
        for seed in seeds
    ]
    if any([load.wait() for load in loads]):
        raise RuntimeError(f"could not load database {name}")
    on_server("CHECKPOINT")
    say(f"database {name}: {rows:,} rows in {time.monotonic() - start:.0f} s")
    return name


def wide():
    return loaded("wide", ROWS)


def copy_into_partitions(session, days_ahead):
    """What a user does who has nothing else: a new table with a partition for each day and all the indexes, and a copy of
    every row. The old one is "LiteLLM_SpendLogs_legacy" then, and what read it still does. Returns the number of rows."""
    indexes = session.rows("SELECT pg_get_indexdef(indexrelid) FROM pg_index"
                           " WHERE indrelid = '\"LiteLLM_SpendLogs\"'::regclass AND NOT indisunique")
    session.run(f"""
        CREATE TABLE copy (LIKE "LiteLLM_SpendLogs" INCLUDING DEFAULTS INCLUDING GENERATED) PARTITION BY RANGE ("startTime");
        CREATE TABLE "LiteLLM_SpendLogs_pdefault" PARTITION OF copy DEFAULT;
        DO $$
        DECLARE
            day date;
        BEGIN
            FOR day IN SELECT generate_series((SELECT min("startTime")::date FROM "LiteLLM_SpendLogs"),
                                              CURRENT_DATE + {days_ahead}, interval '1 day') LOOP
                EXECUTE format('CREATE TABLE %I PARTITION OF copy FOR VALUES FROM (%L) TO (%L)',
                               'LiteLLM_SpendLogs_p' || to_char(day, 'YYYYMMDD'), day, day + 1);
            END LOOP;
        END
        $$""")
    rows = session.run('INSERT INTO copy SELECT * FROM "LiteLLM_SpendLogs"').command_tuples
    session.run('ALTER TABLE copy ADD PRIMARY KEY (request_id, "startTime")')
    for definition, in indexes:
        session.run(f'CREATE INDEX ON copy USING {definition.decode().split(" USING ", 1)[1]}')
    session.run('ALTER TABLE "LiteLLM_SpendLogs" RENAME TO "LiteLLM_SpendLogs_legacy";'
                ' ALTER TABLE copy RENAME TO "LiteLLM_SpendLogs"')
    return rows


def partition(session, days_ahead):
    """The spend log of a database of ours, by days, with LiteLLM's views. Before attach()."""
    copy_into_partitions(session, days_ahead)
    session.run('SET client_min_messages = warning; DROP TABLE "LiteLLM_SpendLogs_legacy" CASCADE;'
                ' DROP VIEW "LiteLLM_VerificationTokenView"')
    psql(session.connection.info.dbname, "-f", ROOT / "target/litellm/views.sql")
    session.run('VACUUM (ANALYZE) "LiteLLM_SpendLogs"')


@contextmanager
def clone(template, *names):
    """Sessions in copies of a database, which are dropped again."""
    sessions = []
    with_strategy = subprocess.check_output(["psql", "-XAtc", "SHOW server_version_num"]) >= b"150000"
    copying = " STRATEGY file_copy" if with_strategy else ""  # before 15 there is no other
    try:
        for name in names:
            on_server(f"CREATE DATABASE {name} TEMPLATE {template}{copying}")
            sessions.append(Session(name))
        yield sessions
    finally:
        for session in sessions:
            session.close()
        drop(*names)


# ---- what one could take instead --------------------------------------------------------------------------


def present(variants):
    """Those that need no extension besides ours, or one that this server has. Says which it leaves out."""
    server = Session("postgres")
    available = {name.decode() for name, in server.rows("SELECT name FROM pg_available_extensions")}
    server.close()
    for extension in dict.fromkeys(variant.extension for variant in variants):
        if extension not in (None, *available):
            say(f"SKIPPED: {extension} is not installed")
    return [variant for variant in variants if variant.extension in (None, *available)]


# ---- the extension ---------------------------------------------------------------------------------------


def create_extension(session):
    """Returns when the worker has seen that there is nothing to do, and will not look again for an hour."""
    session.run("CREATE EXTENSION litellm_spend")
    wait_until(session, "SELECT EXISTS (SELECT FROM spend_worker_status WHERE kind = 'litellm_spend worker'"
                        " AND database = current_database() AND state = 'idle')")


def end_worker(session):
    """For good: the launcher serves no database that takes no connections. The worker would merge early, whenever the
    server wakes it to hear of changes to the catalogs."""
    on_server(f"ALTER DATABASE {session.connection.info.dbname} ALLOW_CONNECTIONS false")
    wait_until(session, "SELECT NOT EXISTS (SELECT FROM spend_worker_status WHERE kind = 'litellm_spend worker'"
                        " AND database = current_database())")


def attach(session, reports=False):
    """Everything, until LiteLLM's views are live."""
    create_extension(session)
    session.run(f"SELECT * FROM spend_attach(reports => {reports})")
    backfill(session)


def backfill(session):
    session.run("SET client_min_messages = warning")
    session.run("CALL spend_backfill()")
    if session.value("SELECT min(backfill_progress) = 100 AND sum(cardinality(live_views)) = 7"
                     " FROM spend_rollup_status") != "t":
        raise RuntimeError("CALL spend_backfill() did not finish the backfill")


def tail_rows(session):
    return int(session.value("SELECT max(tail_rows) FROM spend_rollup_status"))


def merge(session):
    """Merges the whole change log. Returns how many rows of it that were."""
    merged = session.value("SELECT sum(rows) FROM spend_rollup_run()")
    if tail_rows(session) != 0:
        raise RuntimeError("spend_rollup_run() left a tail")
    return int(merged or 0)


def size(session, which):
    """Bytes of the tables of which a condition on pg_class is true, with their indexes, after VACUUM."""
    tables = session.value(f"SELECT string_agg(oid::regclass::text, ', ') FROM pg_class WHERE relkind = 'r' AND {which}")
    session.run(f"VACUUM {tables}")
    return int(session.value(f"SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relkind = 'r' AND {which}"))


def wait_until(session, condition, seconds=30, pause=0.05):
    deadline = time.monotonic() + seconds
    while session.value(condition) != "t":
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {seconds} s: {condition}")
        time.sleep(pause)


# ---- results ---------------------------------------------------------------------------------------------


class Results:
    """The raw numbers of one scenario, written after each run, with the commit that they are of."""

    def __init__(self, scenario):
        self.scenario = scenario
        self.records = []

    def add(self, run, variant, metric, value, unit):
        """Run 0 is the warm-up: it does not count."""
        if run > 0:
            self.records.append((self.scenario, variant, run, metric, f"{value:.6g}", unit, COMMIT))

    def write(self):
        RESULTS.mkdir(parents=True, exist_ok=True)
        with open(RESULTS / f"{self.scenario}.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("scenario", "variant", "run", "metric", "value", "unit", "commit"))
            writer.writerows(self.records)


def rotated(items, run):
    """Each run begins with another item, so that none is always first."""
    shift = run % len(items)
    return items[shift:] + items[:shift]

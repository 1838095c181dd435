//! A table becomes partitioned while everybody goes on using it, whatever interrupts that.

mod common;

use common::*;
use postgres::Client;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

fn wait_until_partitioned(client: &mut Client) {
    let partitions = r#"SELECT count(*) FROM pg_inherits WHERE inhparent = '"LiteLLM_SpendLogs"'::regclass"#;
    eventually("the table is partitioned", || {
        holds(client, IS_PARTITIONED)
            && value::<i64>(client, "SELECT count(*) FROM litellm_spend.conversion") == 0
            // The old table, DEFAULT, and the days from the cutover on.
            && value::<i64>(client, partitions) >= 8
    });
}

/// As many rows as a table has that is worth it.
const ROWS: u32 = 1_000_000;

/// The worker of this database. (The launcher starts others, to look whether they are wanted.)
const WORKER: &str = "SELECT pid FROM spend_worker_status WHERE kind = 'litellm_spend worker' AND database = current_database()";

/// Without one the cutover would be a week away.
fn wait_for_worker(client: &mut Client) {
    eventually("there is a worker", || client.query_opt(WORKER, &[]).unwrap().is_some());
}

/// Calls for a reversion until that step is next, or it is `done`: a call goes on for a second at most, and
/// ends with the copy or with the last index.
fn revert_until(client: &mut Client, step: &str) {
    let sql = "SELECT CASE state WHEN 'next' THEN step ELSE state END FROM spend_partition_revert()
               WHERE state = 'next' OR step = 'swap' AND state = 'done'";
    let mut steps: Vec<String> = vec![];
    while steps.last().is_none_or(|last| last != step) {
        assert!(steps.len() < 50, "never {step}: {steps:?}");
        steps.push(value(client, sql));
    }
}

/// Statements beside a conversion: the rows that writers inserted, and how long anybody waited.
#[derive(Default)]
struct Beside {
    /// What its rows are called.
    name: &'static str,
    inserted: AtomicU64,
    longest: Mutex<Duration>,
}

impl Beside {
    fn timed<T>(&self, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let result = work();
        let mut longest = self.longest.lock().unwrap();
        *longest = (*longest).max(started.elapsed());
        result
    }

    fn new(name: &'static str) -> Beside {
        Beside { name, ..Beside::default() }
    }

    /// Waits until each writer has written more than once again.
    fn wait_for_rows(&self) {
        let before = self.inserted.load(Ordering::Relaxed);
        eventually("the writers go on", || self.inserted.load(Ordering::Relaxed) >= before + 300);
    }

    fn report(&self) {
        let longest = self.longest.lock().unwrap();
        eprintln!(
            "{} of {ROWS} rows: {:?} inserted beside it, longest statement {longest:?}",
            self.name, self.inserted
        );
    }

    /// Runs `body` beside four writers and two readers, none of whose statements may fail.
    fn run(&self, db: &Database, body: impl FnOnce()) {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _stop = RaiseOnDrop(&stop);
            for writer in 0..4 {
                let stop = &stop;
                scope.spawn(move || {
                    let mut client = db.connect();
                    for i in 0.. {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        let rows = insert_rows(&format!("{}{writer}-{i}-", self.name), 20, 3);
                        let n = self.timed(|| client.execute(&rows, &[]).unwrap());
                        self.inserted.fetch_add(n, Ordering::Relaxed);
                        if i % 10 == 3 {
                            let update = format!(
                                r#"UPDATE "LiteLLM_SpendLogs" SET spend = spend + 1, "startTime" = "startTime" - interval '5 hours'
                                   WHERE request_id = '{}{writer}-{i}-7'"#,
                                self.name
                            );
                            self.timed(|| client.execute(&update, &[]).unwrap());
                        }
                        // About what a busy gateway writes: 2,000 rows a second.
                        std::thread::sleep(Duration::from_millis(30));
                    }
                });
            }
            for _ in 0..2 {
                let stop = &stop;
                scope.spawn(move || {
                    let mut client = db.connect();
                    while !stop.load(Ordering::Relaxed) {
                        let sql = r#"SELECT count(*) FROM "LiteLLM_SpendLogs" WHERE "startTime" > now() - interval '1 hour'"#;
                        self.timed(|| client.query(sql, &[]).unwrap());
                        self.timed(|| client.query(r#"SELECT * FROM "MonthlyGlobalSpend""#, &[]).unwrap());
                        // Or readers alone would take both cores of a small machine from the others.
                        std::thread::sleep(Duration::from_millis(20));
                    }
                });
            }
            body();
        });
    }
}

/// They prove that all rows are before the cutover.
const DROP_TIME_INDEXES: &str =
    r#"DROP INDEX "LiteLLM_SpendLogs_startTime_idx", "LiteLLM_SpendLogs_startTime_request_id_idx""#;

fn assert_all_there(client: &mut Client, rows: u64) {
    assert_counted(client, rows);
    assert_exact(client);
}

fn assert_counted(client: &mut Client, rows: u64) {
    let there: i64 = value(client, r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#);
    assert_eq!(there, rows as i64);
    let ids: i64 = value(client, r#"SELECT count(DISTINCT request_id) FROM "LiteLLM_SpendLogs""#);
    assert_eq!(ids, rows as i64);
}

#[test]
fn there_and_back_beside_writers_and_readers_no_statement_fails_and_no_row_is_lost() {
    let db = shared().database().with_rows("old", ROWS, 40).attached();
    let mut client = db.connect();
    let file = r#"SELECT pg_relation_filepath('"LiteLLM_SpendLogs"')"#;
    let file: String = value(&mut client, file);
    let beside = Beside::new("conversion");
    beside.run(&db, || {
        beside.wait_for_rows();
        client.batch_execute("SELECT spend_partition_convert()").unwrap();
        wait_until_partitioned(&mut client);
        beside.wait_for_rows();
    });
    let rows = u64::from(ROWS) + beside.inserted.load(Ordering::Relaxed);
    beside.report();
    assert_counted(&mut client, rows);
    let legacy = r#"SELECT pg_relation_filepath('"LiteLLM_SpendLogs_legacy"')"#;
    assert_eq!(value::<String>(&mut client, legacy), file, "nothing was copied");
    // The indexes have LiteLLM's names; rows go where they belong.
    let indexes: i64 = value(
        &mut client,
        r#"SELECT count(*) FROM pg_inherits i JOIN pg_class parent ON parent.oid = i.inhparent JOIN pg_class child ON child.oid = i.inhrelid
           WHERE parent.relname = 'LiteLLM_SpendLogs_startTime_idx' AND child.relname = 'LiteLLM_SpendLogs_legacy_startTime_idx'"#,
    );
    assert_eq!(indexes, 1);
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
               VALUES ('soon', 'x', 1, CURRENT_DATE + 4, now()), ('never', 'x', 1, '2090-01-01', now()) ON CONFLICT DO NOTHING"#,
        )
        .unwrap();
    assert_eq!(value::<i64>(&mut client, r#"SELECT count(*) FROM "LiteLLM_SpendLogs_pdefault""#), 1);
    assert_exact(&mut client);
    assert_eq!(capture_errors(&mut client), 0);
    // What the wider key let in: the same request at another time.
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
               SELECT request_id, 'again', 5, "startTime" + interval '1 minute', now() FROM "LiteLLM_SpendLogs" WHERE request_id IN ('old1', 'old2')"#,
        )
        .unwrap();
    let total = r#"SELECT sum(spend) FROM litellm_spend.daily_spend"#;
    let beside = Beside::new("reversion");
    beside.run(&db, || {
        beside.wait_for_rows();
        client.batch_execute("SELECT spend_partition_revert()").unwrap();
        wait_until_reverted(&mut client);
        beside.wait_for_rows();
    });
    beside.report();
    let rows = rows as i64 + 2 + beside.inserted.load(Ordering::Relaxed) as i64;
    assert_eq!(value::<i64>(&mut client, r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#), rows);
    assert_verified(&mut client);
    // The later ones were kept out, and nothing was lost: they are in the archive, and in the totals.
    let kept_out: Vec<String> = client
        .query(r#"SELECT request_id || ' ' || call_type FROM litellm_spend_archive."LiteLLM_SpendLogs_duplicates" ORDER BY 1"#, &[])
        .unwrap()
        .iter()
        .map(|r| r.get(0))
        .collect();
    assert_eq!(kept_out, ["old1 again", "old2 again"]);
    let raw: f64 = value(&mut client, r#"SELECT sum(spend) FROM "LiteLLM_SpendLogs""#);
    assert!((value::<f64>(&mut client, &format!("SELECT ({total})::float8")) - raw - 10.0).abs() < 1e-6);
    let left = "SELECT (SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'litellm_spend_revert%' AND NOT tgisinternal)
                     + (SELECT count(*) FROM pg_class WHERE relname LIKE '%_plain%')";
    assert_eq!(value::<i64>(&mut client, left), 0);
    assert!(holds(
        &mut client,
        r#"SELECT pg_get_constraintdef(oid) = 'PRIMARY KEY (request_id)' FROM pg_constraint WHERE conname = 'LiteLLM_SpendLogs_pkey' AND connamespace = 'public'::regnamespace"#
    ));
}

#[test]
fn a_conversion_that_is_killed_at_any_step_goes_on() {
    let cluster = own_cluster(&[]);
    let db = cluster.database().with_rows("old", 20_000, 40).attached();
    // Each step is held up by the lock of a prepared transaction, which outlives every crash.
    let hold = |name: &str, sql: &str| {
        eventually(name, || {
            cluster.try_connect(&db.name, "postgres").is_ok_and(|mut client| {
                client.batch_execute(&format!("BEGIN; {sql}; PREPARE TRANSACTION '{name}'")).is_ok()
            })
        });
    };
    let release = |name: &str| db.connect().batch_execute(&format!("COMMIT PREPARED '{name}'")).unwrap();
    let wait_for = |step: &str| {
        let next =
            format!("SELECT bool_or(step = '{step}' AND state = 'next') FROM spend_partition_convert()");
        eventually(step, || {
            cluster.try_connect(&db.name, "postgres").is_ok_and(|mut client| {
                client.query_one(&next, &[]).is_ok_and(|row| row.get::<_, Option<bool>>(0) == Some(true))
            })
        });
        wait_for_a_round(&mut db.connect());
    };
    // A worker that is killed takes the server down and up again.
    let kill_worker = || {
        let mut pid: Option<i32> = None;
        eventually("there is a worker", || {
            pid = db.connect().query_opt(WORKER, &[]).unwrap().map(|row| row.get(0));
            pid.is_some()
        });
        kill(pid.unwrap());
        eventually("the server is back", || cluster.try_connect(&db.name, "postgres").is_ok());
    };
    let read = r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#;
    hold("writer", &insert_rows("prepared", 1, 3));
    db.connect().batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_for("index");
    hold("reader", read);
    release("writer");
    wait_for("swap");
    kill_worker();
    wait_for("swap");
    release("reader");
    // Wherever it is by then.
    std::thread::sleep(Duration::from_millis(60));
    kill_worker();
    hold("another reader", read);
    if !holds(&mut db.connect(), IS_PARTITIONED) {
        cluster.crash_and_restart();
        wait_for_a_round(&mut db.connect());
        kill_worker();
    }
    release("another reader");
    let mut client = db.connect();
    wait_until_partitioned(&mut client);
    assert_all_there(&mut client, 20_001);
    let left = "SELECT count(*) FROM pg_index WHERE NOT indisvalid";
    assert_eq!(value::<i64>(&mut client, left), 0);
    client.batch_execute(&insert_rows("new", 50, 3)).unwrap();
    assert_exact(&mut client);
}

#[test]
fn an_index_that_was_left_half_built_is_built_again() {
    let cluster = own_cluster(&[]);
    let db = cluster.database().with_rows("old", 20_000, 40).attached();
    let writer = format!("BEGIN; {}; PREPARE TRANSACTION 'writer'", insert_rows("prepared", 1, 3));
    db.connect().batch_execute(&writer).unwrap();
    let invalid = "SELECT EXISTS (SELECT FROM pg_index WHERE NOT indisvalid)";
    db.connect().batch_execute("SELECT spend_partition_convert()").unwrap();
    eventually("the index is being built", || holds(&mut db.connect(), invalid));
    // In the middle of CREATE INDEX CONCURRENTLY, and then of DROP INDEX CONCURRENTLY.
    for creates in [true, false] {
        let at_it = format!(
            "SELECT bool_or(wait_event_type = 'Lock') AND {creates} = EXISTS (SELECT FROM pg_stat_progress_create_index)
             FROM pg_stat_activity WHERE backend_type = 'litellm_spend builder'"
        );
        eventually("the builder waits for the writer", || holds(&mut db.connect(), &at_it));
        cluster.crash_and_restart();
        assert!(holds(&mut db.connect(), invalid));
    }
    db.connect().batch_execute("COMMIT PREPARED 'writer'").unwrap();
    let mut client = db.connect();
    wait_until_partitioned(&mut client);
    assert!(!holds(&mut client, invalid));
    assert_all_there(&mut client, 20_001);
}

#[test]
fn without_a_worker_each_call_does_a_step_and_prints_what_only_top_level_can() {
    let cluster = own_cluster(&[NO_WORKER]);
    let db = cluster.database();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("old", 1000, 40)).unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    client.batch_execute("CALL spend_backfill()").unwrap();
    let next = |client: &mut Client| -> Option<(String, String)> {
        let sql = "SELECT step, detail FROM spend_partition_convert() WHERE state = 'next'";
        client.query_opt(sql, &[]).unwrap().map(|row| (row.get(0), row.get(1)))
    };
    let (step, sql) = next(&mut client).unwrap();
    assert_eq!(step, "index");
    assert_eq!(next(&mut client).unwrap().1, sql, "it waits for the index");
    client.batch_execute(&sql).unwrap();
    // As an older version made it: it would refuse rows from the cutover on.
    client
        .batch_execute(
            r#"ALTER TABLE "LiteLLM_SpendLogs"
               ADD CONSTRAINT litellm_spend_cutover CHECK ("startTime" < '2100-01-01') NOT VALID"#,
        )
        .unwrap();
    assert_eq!(next(&mut client).unwrap().0, "swap");
    assert!(!holds(
        &mut client,
        "SELECT EXISTS (SELECT FROM pg_constraint WHERE conname = 'litellm_spend_cutover')"
    ));
    // Nothing proves any more where its rows are.
    client.batch_execute(&format!("BEGIN; {DROP_TIME_INDEXES}")).unwrap();
    assert_refused(&mut client, "SELECT spend_partition_convert()", "55000");
    client.batch_execute("ROLLBACK").unwrap();
    // Killed while it waits for a reader.
    let mut reader = db.connect();
    reader.batch_execute(r#"BEGIN; SELECT count(*) FROM "LiteLLM_SpendLogs""#).unwrap();
    let ended = while_it_waits(
        &db,
        |victim| victim.batch_execute("SELECT spend_partition_convert()"),
        |client, pid| client.batch_execute(&format!("SELECT pg_terminate_backend({pid})")).unwrap(),
    );
    assert!(ended.is_err());
    reader.batch_execute("COMMIT").unwrap();
    assert!(!holds(&mut client, IS_PARTITIONED));
    client.batch_execute(&insert_rows("more", 10, 3)).unwrap();
    let old: i64 = value(&mut client, r#"SELECT '"LiteLLM_SpendLogs"'::regclass::oid::bigint"#);
    client.batch_execute("BEGIN").unwrap();
    // With what earlier transactions of the session read and have not reported yet.
    let read = format!(
        "SELECT coalesce(sum(seq_tup_read), 0)::bigint FROM pg_stat_xact_user_tables WHERE relid = {old}"
    );
    let before: i64 = value(&mut client, &read);
    assert_eq!(next(&mut client), None);
    assert_eq!(value::<i64>(&mut client, &read), before, "under its lock no row was read");
    client.batch_execute("COMMIT").unwrap();
    assert!(holds(&mut client, IS_PARTITIONED));
    assert_all_there(&mut client, 1010);
    let states = "SELECT string_agg(step || ' ' || state, ', ') FROM spend_partition_convert()";
    assert_eq!(value::<String>(&mut client, states), "index done, swap done", "it says so when it is done");
    // Also to who has named the table before, and knows what it is now by that name.
    let legacy = states.replace("()", r#"('"LiteLLM_SpendLogs_legacy"')"#);
    assert_eq!(value::<String>(&mut client, &legacy), "index done, swap done");
    // And back, as far as a second takes it with each call.
    for next in ["indexes", "swap", "done"] {
        revert_until(&mut client, next);
        client.batch_execute(&insert_rows(next, 1, 3)).unwrap();
    }
    assert!(!holds(&mut client, IS_PARTITIONED));
    for table in [r#""LiteLLM_SpendLogs""#, r#"litellm_spend_archive."LiteLLM_SpendLogs_partitioned""#] {
        let state = format!("SELECT step || ' ' || state FROM spend_partition_revert('{table}')");
        assert_eq!(value::<String>(&mut client, &state), "swap done");
    }
    assert_exact(&mut client);
}

/// The server rounds a border to what the column can hold. A proof of another border would be none, and all
/// rows would be read under the swap's lock.
#[test]
fn a_cutover_finer_than_the_column_is_the_next_time_it_can_hold_and_no_row_is_read() {
    let (_db, mut client) = without_worker();
    client.batch_execute("SET TimeZone = 'UTC'").unwrap();
    for (asked_of, column, cutover, border) in [
        ("timestamp(3)", "timestamp(3)", "2200-01-01 10:00:00.123456", "2200-01-01 10:00:00.124"),
        ("timestamp(3)", "timestamp(3)", "2200-01-01 10:00:00.123", "2200-01-01 10:00:00.123"),
        ("timestamptz(0)", "timestamptz(0)", "2200-01-01 10:00:00.4", "2200-01-01 10:00:01"),
        ("date", "date", "2200-01-01 10:00:00", "2200-01-02 00:00:00"),
        ("timestamp", "timestamp", "2200-01-01 10:00:00.123456", "2200-01-01 10:00:00.123456"),
        // It became coarser while the conversion was under way.
        ("timestamp", "timestamp(3)", "2200-01-01 10:00:00.123456", "2200-01-01 10:00:00.124"),
    ] {
        client
            .batch_execute(&format!(
                "DROP TABLE IF EXISTS ev CASCADE; CREATE TABLE ev (id int PRIMARY KEY, at {asked_of} NOT NULL);
                 CREATE INDEX ON ev (at);
                 INSERT INTO ev SELECT i, '2020-01-01'::timestamp + i * interval '1 hour' FROM generate_series(1, 100) AS i"
            ))
            .unwrap();
        let arguments = format!("'ev', time_column => 'at', cutover => '{cutover}'");
        client.batch_execute(&format!("SELECT spend_partition_convert({arguments})")).unwrap();
        client.batch_execute(&format!("ALTER TABLE ev ALTER at TYPE {column}")).unwrap();
        let planned = format!("SELECT object FROM spend_partition_plan({arguments}) WHERE step = 'cutover'");
        let planned: String = value(&mut client, &planned);
        let next = "SELECT detail FROM spend_partition_convert('ev') WHERE state = 'next'";
        let build: String = value(&mut client, next);
        client.batch_execute(&build).unwrap();
        let old: i64 = value(&mut client, "SELECT 'ev'::regclass::oid::bigint");
        let read = format!(
            "SELECT coalesce(sum(seq_tup_read), 0)::bigint FROM pg_stat_xact_user_tables WHERE relid = {old}"
        );
        client.batch_execute("BEGIN").unwrap();
        let before: i64 = value(&mut client, &read);
        assert!(client.query(next, &[]).unwrap().is_empty(), "{column}: it is partitioned");
        assert_eq!(value::<i64>(&mut client, &read), before, "{column}: under its lock no row was read");
        client.batch_execute("COMMIT").unwrap();
        let bound = format!(
            "SELECT pg_get_expr(relpartbound, oid) = format('FOR VALUES FROM (MINVALUE) TO (%L)', '{border}'::{column})
             FROM pg_class WHERE relname = 'ev_legacy'"
        );
        assert!(holds(&mut client, &bound), "{column}");
        assert_eq!(planned, format!("'{border}'"), "{column}: the plan says what is done");
    }
}

#[test]
fn a_cutover_that_passes_before_the_swap_stops_the_conversion_and_refuses_no_row() {
    let db = shared().database().attached();
    let (mut client, mut holder) = (db.connect(), db.connect());
    client.batch_execute(&insert_rows("old", 100, 40)).unwrap();
    // As attach() would, for the swap only.
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE").unwrap();
    client
        .batch_execute("SELECT spend_partition_convert(cutover => (clock_timestamp() AT TIME ZONE 'UTC' + interval '15 seconds')::timestamp)")
        .unwrap();
    let future = r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
                    VALUES ('f' || random(), 'x', 1, clock_timestamp() AT TIME ZONE 'UTC' + interval '1 hour', now())"#;
    client.batch_execute(future).unwrap();
    eventually("the conversion stopped", || {
        holds(
            &mut client,
            "SELECT stopped AND last_error LIKE 'the cutover%came before the swap%' FROM litellm_spend.conversion",
        )
    });
    client.batch_execute(future).unwrap();
    assert!(holds(&mut client, "SELECT relkind = 'r' FROM pg_class WHERE relname = 'LiteLLM_SpendLogs'"));
    // Asked again, with rows in the way of that cutover and then without.
    assert_refused(
        &mut client,
        "SELECT spend_partition_convert(cutover => (clock_timestamp() AT TIME ZONE 'UTC' + interval '30 minutes')::timestamp)",
        "55000",
    );
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    holder.batch_execute("COMMIT").unwrap();
    wait_until_partitioned(&mut client);
    assert_all_there(&mut client, 102);
}

#[test]
fn a_cutover_that_is_asked_for_while_another_passes_is_not_stopped_for_that() {
    let db = shared().database();
    let (mut client, mut holder) = (db.connect(), db.connect());
    wait_for_worker(&mut client);
    client.batch_execute(&insert_rows("old", 100, 40)).unwrap();
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE").unwrap();
    client
        .batch_execute("SELECT spend_partition_convert(cutover => (clock_timestamp() AT TIME ZONE 'UTC' + interval '6 seconds')::timestamp)")
        .unwrap();
    let began = Instant::now();
    client
        .batch_execute("BEGIN; SELECT spend_partition_convert(cutover => (clock_timestamp() AT TIME ZONE 'UTC' + interval '1 hour')::timestamp)")
        .unwrap();
    let waits = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'litellm_spend worker'
                 AND datname = current_database() AND wait_event_type = 'Lock')";
    let mut watcher = db.connect();
    // A look that waits for the row would find it after the commit.
    while began.elapsed() < Duration::from_secs(12)
        && (began.elapsed() < Duration::from_secs(6) || !holds(&mut watcher, waits))
    {
        std::thread::sleep(Duration::from_millis(5));
    }
    client.batch_execute("COMMIT").unwrap();
    wait_for_a_round(&mut client);
    assert!(holds(&mut client, "SELECT NOT stopped FROM litellm_spend.conversion"));
    holder.batch_execute("COMMIT").unwrap();
    wait_until_partitioned(&mut client);
}

#[test]
fn a_table_without_an_index_on_its_time_is_asked_for_one() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("old", 100, 40)).unwrap();
    client.batch_execute(DROP_TIME_INDEXES).unwrap();
    assert_refused(&mut client, "SELECT spend_partition_convert()", "55000");
    let error = error(&mut client, "SELECT spend_partition_convert()");
    let statement = error.hint().unwrap().split(';').next().unwrap();
    assert!(statement.starts_with("CREATE INDEX CONCURRENTLY"), "{error:?}");
    let planned: String =
        value(&mut client, "SELECT action FROM spend_partition_plan() WHERE step = 'in the way'");
    assert!(planned.contains(statement), "{planned}");
    client.batch_execute(statement).unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_partitioned(&mut client);
    assert_all_there(&mut client, 100);
}

/// Everything that can hang on a table.
const BELONGINGS: &str = r#"
    DROP ROLE IF EXISTS reader_g; DROP ROLE IF EXISTS writer_g; CREATE ROLE reader_g; CREATE ROLE writer_g;
    CREATE VIEW over AS SELECT model, sum(spend) AS spend FROM "LiteLLM_SpendLogs" GROUP BY model;
    CREATE VIEW over_over WITH (security_barrier) AS SELECT * FROM over WHERE spend > 0;
    CREATE FUNCTION total() RETURNS float8 STABLE LANGUAGE sql BEGIN ATOMIC SELECT sum(spend) FROM "LiteLLM_SpendLogs"; END;
    CREATE TABLE seen (n int);
    CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO seen VALUES (1); RETURN NULL; END $$;
    CREATE TRIGGER each_row AFTER INSERT ON "LiteLLM_SpendLogs" FOR EACH ROW EXECUTE FUNCTION see();
    CREATE TRIGGER each_statement AFTER INSERT ON "LiteLLM_SpendLogs" FOR EACH STATEMENT EXECUTE FUNCTION see();
    CREATE TRIGGER never AFTER INSERT ON "LiteLLM_SpendLogs" FOR EACH ROW EXECUTE FUNCTION see();
    ALTER TABLE "LiteLLM_SpendLogs" DISABLE TRIGGER never;
    ALTER TABLE "LiteLLM_SpendLogs" ADD CONSTRAINT sane CHECK (spend > -1e9);
    ALTER TABLE "LiteLLM_SpendLogs" SET (autovacuum_vacuum_scale_factor = 0.01, fillfactor = 90);
    COMMENT ON TABLE "LiteLLM_SpendLogs" IS 'it''s 100 % ours'; COMMENT ON COLUMN "LiteLLM_SpendLogs"."user" IS 'who';
    COMMENT ON INDEX "LiteLLM_SpendLogs_startTime_idx" IS 'by time'; COMMENT ON TRIGGER each_row ON "LiteLLM_SpendLogs" IS 'of a row';
    COMMENT ON CONSTRAINT sane ON "LiteLLM_SpendLogs" IS 'no debts'; COMMENT ON CONSTRAINT "LiteLLM_SpendLogs_pkey" ON "LiteLLM_SpendLogs" IS 'key';
    CREATE INDEX part ON "LiteLLM_SpendLogs" ((lower(model))) WHERE spend > 0;
    CREATE STATISTICS both_of_them ON model, api_key FROM "LiteLLM_SpendLogs"; ALTER STATISTICS both_of_them SET STATISTICS 77;
    COMMENT ON STATISTICS both_of_them IS 'go together'; COMMENT ON INDEX "LiteLLM_SpendLogs_pkey" IS 'of the key';
    GRANT SELECT, INSERT ON "LiteLLM_SpendLogs" TO writer_g WITH GRANT OPTION; GRANT SELECT (model) ON "LiteLLM_SpendLogs" TO reader_g;
    CREATE POLICY only_models ON "LiteLLM_SpendLogs" FOR SELECT TO reader_g USING (model <> 'secret');
    COMMENT ON POLICY only_models ON "LiteLLM_SpendLogs" IS 'no secrets';
    ALTER TABLE "LiteLLM_SpendLogs" ENABLE ROW LEVEL SECURITY; ALTER TABLE "LiteLLM_SpendLogs" REPLICA IDENTITY FULL;
    CREATE PUBLICATION a_few FOR TABLE "LiteLLM_SpendLogs";
    GRANT SELECT ON over TO reader_g"#;

/// What there is of them, by name.
const INVENTORY: &str = r#"
    WITH t AS (SELECT * FROM pg_class WHERE oid = '"LiteLLM_SpendLogs"'::regclass)
    SELECT 'owner ' || relowner::regrole FROM t
    UNION ALL SELECT 'acl ' || a::text FROM t, unnest(relacl) AS a
    UNION ALL SELECT 'column acl ' || attname || a::text FROM t JOIN pg_attribute ON attrelid = t.oid, unnest(attacl) AS a
    UNION ALL SELECT 'column ' || attname || ' ' || format_type(atttypid, atttypmod) || attnotnull || attstorage::text || coalesce(pg_get_expr(adbin, adrelid), '')
              FROM t JOIN pg_attribute a ON attrelid = t.oid AND attnum > 0 AND NOT attisdropped LEFT JOIN pg_attrdef d ON d.adrelid = t.oid AND adnum = attnum
    UNION ALL SELECT 'comment ' || description FROM t JOIN pg_description ON objoid = t.oid AND classoid = 'pg_class'::regclass
    UNION ALL SELECT 'index ' || c.relname || ' ' || coalesce(obj_description(indexrelid), '') FROM t JOIN pg_index i ON indrelid = t.oid JOIN pg_class c ON c.oid = indexrelid
    UNION ALL SELECT concat_ws(' ', 'trigger', tgname || tgenabled::text, obj_description(pg_trigger.oid, 'pg_trigger')) FROM t JOIN pg_trigger ON tgrelid = t.oid WHERE NOT tgisinternal
    UNION ALL SELECT concat_ws(' ', 'constraint', conname || contype::text, obj_description(pg_constraint.oid, 'pg_constraint')) FROM t JOIN pg_constraint ON conrelid = t.oid
    UNION ALL SELECT 'policy ' || policyname || cmd || qual || roles::text FROM pg_policies WHERE tablename = 'LiteLLM_SpendLogs'
    UNION ALL SELECT 'policy ' || obj_description(pg_policy.oid, 'pg_policy') FROM t JOIN pg_policy ON polrelid = t.oid
    UNION ALL SELECT 'security ' || relrowsecurity || relforcerowsecurity || relreplident::text FROM t
    UNION ALL SELECT 'publication ' || pubname || tablename FROM pg_publication_tables
    UNION ALL SELECT concat_ws(' ', 'statistics', stxname, stxstattarget, obj_description(pg_statistic_ext.oid, 'pg_statistic_ext')) FROM t JOIN pg_statistic_ext ON stxrelid = t.oid
    UNION ALL SELECT 'view ' || oid::regclass || coalesce(reloptions::text, '') || coalesce(relacl::text, '') || pg_get_viewdef(oid)
              FROM pg_class WHERE relname IN ('over', 'over_over', 'DailyTagSpend')
    UNION ALL SELECT 'function ' || pg_get_functiondef('total'::regproc)
    ORDER BY 1"#;

fn inventory(client: &mut Client) -> Vec<String> {
    client.query(INVENTORY, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

#[test]
fn all_that_hangs_on_the_table_hangs_on_the_partitioned_one() {
    let db = shared().database();
    db.connect().batch_execute(BELONGINGS).unwrap();
    db.connect().batch_execute(&insert_rows("old", 1000, 40)).unwrap();
    let db = db.attached();
    let mut client = db.connect();
    let before = inventory(&mut client);
    let views: Vec<u32> = client
        .query("SELECT oid FROM pg_class WHERE relname IN ('over', 'over_over') ORDER BY 1", &[])
        .unwrap()
        .iter()
        .map(|r| r.get(0))
        .collect();
    // The plan names each of them, and changes nothing.
    let plan: Vec<String> = client
        .query("SELECT action || ' ' || object FROM spend_partition_plan()", &[])
        .unwrap()
        .iter()
        .map(|r| r.get(0))
        .collect();
    for object in [
        "over",
        "over_over",
        "total()",
        "each_row",
        "each_statement",
        "never",
        "sane",
        "fillfactor",
        "column",
        "part",
        "both_of_them",
        "writer_g",
        "only_models",
        "a_few",
        "full",
        "enable",
        "LiteLLM_SpendLogs_pkey",
    ] {
        assert!(plan.iter().any(|row| row.contains(object)), "{object} is not in the plan: {plan:#?}");
    }
    // What is alike is one row; that nothing is in the way, and the cutover, have theirs.
    for like in [
        "in the way|nothing|\"public\".\"LiteLLM_SpendLogs\"",
        "cutover|rows before it stay in the old table, one partition; from it on a partition holds a day|%",
        "swap|trigger: made on the new table|%: %each_row, each_statement%",
        "after|maintenance creates a partition|_: LiteLLM_SpendLogs_p%, LiteLLM_SpendLogs_p%",
        "after|LiteLLM must be started without --use_prisma_db_push;%|\"public\".\"LiteLLM_SpendLogs\"",
    ] {
        let rows = format!(
            "SELECT count(*) FROM spend_partition_plan() WHERE concat_ws('|', step, action, object) LIKE '{like}'"
        );
        assert_eq!(value::<i64>(&mut client, &rows), 1, "{like}: {plan:#?}");
    }
    assert_eq!(inventory(&mut client), before);
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_partitioned(&mut client);
    assert_eq!(inventory(&mut client), before);
    client
        .query("SELECT 1 FROM pg_class WHERE oid = ANY ($1)", &[&views])
        .map(|rows| assert_eq!(rows.len(), 2, "the views are the same objects"))
        .unwrap();
    // They all see new rows, each once.
    client.batch_execute("TRUNCATE seen").unwrap();
    let insert = r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime", model)
                    VALUES ('n1', 'x', 1000, now(), now(), 'new'), ('n2', 'x', 1000, CURRENT_DATE + 5, now(), 'new')"#;
    client.batch_execute(insert).unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM seen"), 3, "two rows and a statement");
    assert_eq!(value::<f64>(&mut client, "SELECT spend FROM over_over WHERE model = 'new'"), 2000.0);
    assert!(holds(&mut client, r#"SELECT total() = (SELECT sum(spend) FROM "LiteLLM_SpendLogs")"#));
    let options = "SELECT count(*) FROM pg_class WHERE relname LIKE 'LiteLLM_SpendLogs_p2%' AND relkind = 'r' AND 'fillfactor=90' = ANY (reloptions)";
    assert!(value::<i64>(&mut client, options) >= 6);
    assert!(holds(&mut client, "SELECT bool_and(pubviaroot) FROM pg_publication"));
    assert_exact(&mut client);
    client.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE request_id = 'n2'"#).unwrap();
    client.batch_execute("SELECT spend_partition_revert()").unwrap();
    wait_until_reverted(&mut client);
    assert_eq!(inventory(&mut client), before);
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_partitioned(&mut client);
    // LiteLLM's migrations and its own partition job go on.
    let complaints = shared().run_again(&db.name, "migrations.sql");
    assert!(!complaints.contains("partition"), "{complaints}");
    client
        .batch_execute(
            r#"ALTER TABLE "LiteLLM_SpendLogs" ADD COLUMN newer TEXT; CREATE INDEX newer_idx ON "LiteLLM_SpendLogs" (newer);
               SET ROLE litellm"#,
        )
        .unwrap();
    client.batch_execute(&partition_by_litellms_job(5)).unwrap();
    drop(client);
    db.connect().batch_execute("DROP OWNED BY reader_g, writer_g; DROP ROLE reader_g, writer_g").unwrap();
}

#[test]
fn subscribers_that_know_a_row_by_its_key_do_so_after_a_conversion() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("old", 10, 40)).unwrap();
    client
        .batch_execute(
            r#"ALTER TABLE "LiteLLM_SpendLogs" REPLICA IDENTITY USING INDEX "LiteLLM_SpendLogs_pkey";
               CREATE PUBLICATION p FOR TABLE "LiteLLM_SpendLogs""#,
        )
        .unwrap();
    wait_for_worker(&mut client);
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_partitioned(&mut client);
    let change = |n: u32| {
        format!(
            r#"UPDATE "LiteLLM_SpendLogs" SET spend = 1 WHERE request_id = 'old{n}';
               DELETE FROM "LiteLLM_SpendLogs" WHERE request_id = 'old{n}'"#
        )
    };
    client.batch_execute(&change(1)).unwrap();
    let by_key = r#"SELECT count(*) = 2 FROM pg_class c JOIN pg_index i ON i.indrelid = c.oid
        WHERE relname IN ('LiteLLM_SpendLogs', 'LiteLLM_SpendLogs_legacy') AND relreplident = 'i'
          AND indisreplident AND indisprimary"#;
    assert!(holds(&mut client, by_key));
    client.batch_execute("SELECT spend_partition_revert()").unwrap();
    wait_until_reverted(&mut client);
    client.batch_execute(&change(2)).unwrap();
    assert!(holds(
        &mut client,
        r#"SELECT relreplident = 'i' FROM pg_class WHERE oid = '"LiteLLM_SpendLogs"'::regclass"#
    ));
    assert_eq!(value::<i64>(&mut client, r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#), 8);
}

#[test]
fn a_replica_identity_whose_index_was_dropped_keeps_no_swap_away() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY, at timestamp NOT NULL); CREATE INDEX ON t (at);
             CREATE UNIQUE INDEX u ON t (id); ALTER TABLE t REPLICA IDENTITY USING INDEX u; DROP INDEX u",
        )
        .unwrap();
    wait_for_worker(&mut client);
    client.batch_execute("SELECT spend_partition_convert('t', time_column => 'at')").unwrap();
    let identity = "SELECT coalesce((SELECT relreplident::text FROM pg_class WHERE oid = 't'::regclass AND relkind = 'p'), '')";
    let failed = "SELECT coalesce((SELECT last_error FROM litellm_spend.conversion), '')";
    eventually("it is partitioned", || {
        let error: String = value(&mut client, failed);
        assert!(!error.contains("syntax error"), "{error}");
        value::<String>(&mut client, identity) == "n"
    });
}

#[test]
fn a_tablespace_in_which_the_owner_may_not_create_is_in_the_way() {
    let (_db, mut client) = without_worker();
    if value::<i32>(&mut client, "SELECT current_setting('server_version_num')::int") < 150_000 {
        return; // It has no tablespaces in place.
    }
    client.batch_execute("SET allow_in_place_tablespaces = on").unwrap();
    client.batch_execute("CREATE TABLESPACE fast LOCATION ''").unwrap();
    client.batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" SET TABLESPACE fast"#).unwrap();
    let why = "Role litellm, who owns it, may not create in its tablespace, fast.";
    let refused = error(&mut client, "SELECT spend_partition_convert()");
    assert_eq!((refused.code().code(), refused.detail()), ("55000", Some(why)), "{refused:?}");
    client
        .batch_execute("GRANT CREATE ON TABLESPACE fast TO litellm; SELECT spend_partition_convert()")
        .unwrap();
    client.batch_execute("SELECT spend_partition_revert(abort => true)").unwrap();
    client.batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" SET TABLESPACE pg_default"#).unwrap();
    client.batch_execute("DROP TABLESPACE fast").unwrap();
}

#[test]
fn an_index_that_was_built_for_another_time_column_is_built_again() {
    let (_db, mut client) = without_worker();
    client.batch_execute(&insert_rows("old", 10, 40)).unwrap();
    client.batch_execute(r#"CREATE INDEX by_end ON "LiteLLM_SpendLogs" ("endTime")"#).unwrap();
    let next = |client: &mut Client, time_column: &str| {
        let sql = format!(
            "SELECT detail FROM spend_partition_convert(time_column => '{time_column}') WHERE state = 'next'"
        );
        value::<String>(client, &sql)
    };
    let build = next(&mut client, "startTime");
    assert!(build.starts_with("CREATE UNIQUE INDEX CONCURRENTLY"), "{build}");
    client.batch_execute(&build).unwrap();
    let drop = next(&mut client, "endTime");
    assert!(drop.starts_with("DROP INDEX CONCURRENTLY"), "{drop}");
    client.batch_execute(&drop).unwrap();
    let build = next(&mut client, "endTime");
    assert!(build.contains(r#"("request_id", "endTime")"#), "{build}");
    client.batch_execute(&build).unwrap();
    client.batch_execute("SELECT spend_partition_convert(time_column => 'endTime')").unwrap();
    assert!(holds(&mut client, IS_PARTITIONED));
}

#[test]
fn a_declared_rollup_over_the_table_goes_on() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE page_views (gone int, view_id bigserial PRIMARY KEY, at timestamptz NOT NULL DEFAULT now(), site int);
             -- Its columns have other numbers in the table that takes its place.
             ALTER TABLE page_views DROP gone;
             CREATE INDEX page_views_at ON page_views (at);
             INSERT INTO page_views (site, at) SELECT i % 3, now() - i * interval '1 minute' FROM generate_series(1, 1000) i;
             SELECT spend_rollup_create('sites', 'page_views', '{site}', '{count(*) AS n}');
             SELECT spend_partition_convert('page_views', 'week', time_column => 'at')",
        )
        .unwrap();
    eventually("it is partitioned", || {
        holds(&mut client, "SELECT relkind = 'p' FROM pg_class WHERE oid = 'page_views'::regclass")
    });
    client
        .batch_execute("INSERT INTO page_views (site, at) SELECT i % 3, now() + i * interval '1 hour' FROM generate_series(1, 1000) i")
        .unwrap();
    eventually("all is merged", || {
        holds(
            &mut client,
            "SELECT tail_rows = 0 AND last_error IS NULL FROM spend_rollup_status WHERE rollup = 'sites'",
        )
    });
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.sites_rollup"), 2000);
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.sites"), 2000);
    assert!(
        holds(&mut client, "SELECT pg_get_serial_sequence('page_views', 'view_id') IS NOT NULL"),
        "the sequence goes with the column"
    );
    client.batch_execute("SELECT spend_partition_revert('page_views')").unwrap();
    wait_until_plain(&mut client, "page_views");
    client.batch_execute("INSERT INTO page_views (site) SELECT 1 FROM generate_series(1, 10)").unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.sites"), 2010);
    eventually("they are merged", || {
        holds(&mut client, "SELECT sum(n) = 2010 FROM litellm_spend.sites_rollup")
    });
    assert!(holds(&mut client, "SELECT pg_get_serial_sequence('page_views', 'view_id') IS NOT NULL"));
    assert_verified(&mut client);
}

#[test]
fn a_retention_goes_along_with_its_owner_and_with_nobody_else() {
    let db = shared().database();
    let mut client = db.connect();
    for table in ["kept", "given_away", "set_anew"] {
        client
            .batch_execute(&format!(
                "CREATE TABLE {table} (id bigserial PRIMARY KEY, at timestamp NOT NULL);
                 CREATE INDEX ON {table} (at);
                 SELECT spend_partition_set('{table}', 'week', 3, '2 years', 'detach', 'at');
                 INSERT INTO {table} (at) SELECT now() - interval '1 year' FROM generate_series(1, 100)"
            ))
            .unwrap();
    }
    client
        .batch_execute(
            "ALTER TABLE given_away OWNER TO litellm; ALTER TABLE set_anew OWNER TO litellm;
             SELECT spend_partition_set('set_anew', precreate => 4, time_column => 'at');
             UPDATE litellm_spend.policy SET retention = '1 month' WHERE relation = 'given_away'::regclass;
             SELECT spend_partition_convert('kept'); SELECT spend_partition_convert('given_away', time_column => 'at')",
        )
        .unwrap();
    let policies = "SELECT string_agg(format('%s: %s, %s, %s ahead, %s, %s', relation, owner, \"interval\", precreate,
                                             coalesce(retention::text, 'none'), on_expire), '; ' ORDER BY relation::text)
                    FROM litellm_spend.policy";
    eventually("both are partitioned", || {
        holds(
            &mut client,
            "SELECT count(*) = 2 AND NOT EXISTS (SELECT FROM litellm_spend.conversion) FROM pg_class
             WHERE oid IN ('kept'::regclass, 'given_away'::regclass) AND relkind = 'p'",
        )
    });
    wait_for_a_round(&mut client);
    assert_eq!(
        value::<String>(&mut client, policies),
        "given_away: litellm, day, 7 ahead, none, drop; kept: postgres, week, 3 ahead, 2 years, detach; \
         set_anew: litellm, day, 4 ahead, none, drop"
    );
    let rows = "SELECT (SELECT count(*) FROM kept) + (SELECT count(*) FROM given_away)";
    assert_eq!(value::<i64>(&mut client, rows), 200);
}

#[test]
fn what_cannot_be_converted_is_refused_with_the_reason() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("old", 10, 40)).unwrap();
    let call = "SELECT spend_partition_convert()";
    for (sql, undo, reason) in [
        (r#"CREATE UNIQUE INDEX u ON "LiteLLM_SpendLogs" (api_key, request_id)"#, "DROP INDEX u", "unique"),
        (r#"CREATE TABLE child () INHERITS ("LiteLLM_SpendLogs")"#, "DROP TABLE child", "inherits"),
        (
            r#"CREATE TABLE f (r text REFERENCES "LiteLLM_SpendLogs")"#,
            "DROP TABLE f",
            "of public.f is a foreign key",
        ),
        (
            r#"CREATE RULE r AS ON DELETE TO "LiteLLM_SpendLogs" DO ALSO SELECT 1"#,
            r#"DROP RULE r ON "LiteLLM_SpendLogs""#,
            "rule",
        ),
        (
            r#"CREATE TABLE "LiteLLM_SpendLogs_legacy" (x int)"#,
            r#"DROP TABLE "LiteLLM_SpendLogs_legacy""#,
            "already",
        ),
        (
            r#"CREATE MATERIALIZED VIEW m AS SELECT count(*) FROM "LiteLLM_SpendLogs""#,
            "DROP MATERIALIZED VIEW m",
            "Materialized view",
        ),
        (
            r#"CREATE VIEW by_key AS SELECT request_id, spend FROM "LiteLLM_SpendLogs" GROUP BY request_id"#,
            "DROP VIEW by_key",
            "primary key",
        ),
        (r#"CREATE TABLE row_type (r "LiteLLM_SpendLogs")"#, "DROP TABLE row_type", "row type"),
        (
            r#"CREATE TABLE other (r text); CREATE RULE too AS ON INSERT TO other DO ALSO DELETE FROM "LiteLLM_SpendLogs" WHERE request_id = NEW.r"#,
            "DROP TABLE other",
            "Rule too of public.other uses it",
        ),
        (
            r#"CREATE VIEW writable AS SELECT 1 AS n; CREATE RULE write AS ON UPDATE TO writable DO INSTEAD UPDATE "LiteLLM_SpendLogs" SET spend = NEW.n"#,
            "DROP VIEW writable",
            "Rule write of public.writable uses it",
        ),
        (
            r#"ALTER TABLE "LiteLLM_SpendLogs" ADD CONSTRAINT pos CHECK (spend >= 0) NO INHERIT"#,
            r#"ALTER TABLE "LiteLLM_SpendLogs" DROP CONSTRAINT pos"#,
            "Constraint pos is NO INHERIT",
        ),
        // As a refresh of the subscription notes it.
        (
            r#"CREATE SUBSCRIPTION s CONNECTION '' PUBLICATION p WITH (connect = false); SET allow_system_table_mods = on;
               INSERT INTO pg_subscription_rel (srsubid, srrelid, srsubstate)
               SELECT oid, '"LiteLLM_SpendLogs"'::regclass, 'i' FROM pg_subscription WHERE subname = 's'"#,
            "DELETE FROM pg_subscription_rel; RESET allow_system_table_mods; ALTER SUBSCRIPTION s SET (slot_name = NONE); DROP SUBSCRIPTION s",
            "Subscription s writes to it",
        ),
        (
            r#"CREATE TRIGGER tt AFTER INSERT ON "LiteLLM_SpendLogs" REFERENCING NEW TABLE AS n FOR EACH ROW EXECUTE FUNCTION tsvector_update_trigger()"#,
            r#"DROP TRIGGER tt ON "LiteLLM_SpendLogs""#,
            "Trigger tt is for each row and has a transition table",
        ),
        (
            r#"ALTER TABLE "LiteLLM_SpendLogs" DROP CONSTRAINT "LiteLLM_SpendLogs_pkey", ADD PRIMARY KEY (request_id) DEFERRABLE"#,
            r#"ALTER TABLE "LiteLLM_SpendLogs" DROP CONSTRAINT "LiteLLM_SpendLogs_pkey", ADD PRIMARY KEY (request_id)"#,
            "primary key is deferrable",
        ),
        (
            r#"SET allow_system_table_mods = on; INSERT INTO pg_seclabel VALUES ('"LiteLLM_SpendLogs"'::regclass, 'pg_class'::regclass, 2, 'masks', 'MASKED')"#,
            "DELETE FROM pg_seclabel; RESET allow_system_table_mods",
            "security label, of masks",
        ),
        (
            r#"CREATE SCHEMA closed; CREATE STATISTICS closed.s ON model, api_key FROM "LiteLLM_SpendLogs""#,
            "DROP SCHEMA closed CASCADE",
            "Statistics s are in schema closed",
        ),
        (
            "CREATE TABLE events (at timestamp) PARTITION BY RANGE (at); CREATE TABLE events_rest PARTITION OF events DEFAULT; CREATE PUBLICATION of_all FOR ALL TABLES",
            "DROP TABLE events; DROP PUBLICATION of_all",
            "Publication of_all publishes partitions of other tables",
        ),
        (
            r#"CREATE INDEX "LiteLLM_SpendLogs_legacy_pkey" ON "LiteLLM_SpendLogs" (request_id, "startTime")"#,
            r#"DROP INDEX "LiteLLM_SpendLogs_legacy_pkey""#,
            "LiteLLM_SpendLogs_legacy_pkey\" already",
        ),
        (
            r#"ALTER TABLE "LiteLLM_SpendLogs" ALTER "startTime" DROP NOT NULL"#,
            r#"ALTER TABLE "LiteLLM_SpendLogs" ALTER "startTime" SET NOT NULL"#,
            "may be NULL",
        ),
    ] {
        client.batch_execute(sql).unwrap();
        assert_refused(&mut client, call, "55000");
        let error = error(&mut client, call);
        assert!(error.detail().unwrap().contains(reason), "{sql}: {error:?}");
        let planned = format!(
            "SELECT bool_or(step = 'in the way' AND action LIKE '%{reason}%') FROM spend_partition_plan()"
        );
        assert!(holds(&mut client, &planned), "{sql} is not in the plan");
        client.batch_execute(undo).unwrap();
    }
    for (arguments, sqlstate) in [
        ("NULL, 'hour'", "22023"),
        ("NULL, ''", "22023"),
        ("cutover => '2020-01-01'", "22023"),
        ("cutover => 'infinity'", "22023"),
        ("time_column => 'nothing'", "42703"),
        ("time_column => 'model'", "42804"),
        ("precreate => -1", "22023"),
        ("'\"DailyTagSpend\"'", "42809"),
    ] {
        assert_refused(&mut client, &format!("SELECT spend_partition_convert({arguments})"), sqlstate);
    }
    client
        .batch_execute(
            r#"UPDATE "LiteLLM_SpendLogs" SET "startTime" = '2090-01-01' WHERE request_id = 'old1'"#,
        )
        .unwrap();
    assert_refused(&mut client, call, "55000");
    client.batch_execute("BEGIN READ ONLY").unwrap();
    assert_refused(&mut client, call, "25006");
    client.batch_execute("ROLLBACK").unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.conversion"), 0);
    // One that somebody else has partitioned, until it is ours to look after.
    client.batch_execute("CREATE TABLE theirs (at timestamp) PARTITION BY RANGE (at)").unwrap();
    assert_refused(&mut client, "SELECT spend_partition_convert('theirs', time_column => 'at')", "55000");
    client.batch_execute("SELECT spend_partition_set('theirs')").unwrap();
    assert!(holds(&mut client, "SELECT bool_and(state = 'done') FROM spend_partition_convert('theirs')"));
}

/// As the table is that LiteLLM's script had renamed, and that somebody has given its name back; or the old
/// partition of a conversion of ours.
#[test]
fn an_index_that_merely_has_the_name_of_the_one_to_be_built_is_in_the_way_and_stays() {
    let (_db, mut client) = without_worker();
    let index = r#""LiteLLM_SpendLogs_legacy_pkey""#;
    let key = |name: &str, columns: &str| {
        format!(
            r#"ALTER TABLE "LiteLLM_SpendLogs" DROP CONSTRAINT "LiteLLM_SpendLogs_pkey",
                   ADD CONSTRAINT "LiteLLM_SpendLogs_{name}" PRIMARY KEY ({columns})"#
        )
    };
    let mut accepted = vec![];
    for make in [
        format!(r#"ALTER INDEX "LiteLLM_SpendLogs_pkey" RENAME TO {index}"#),
        key("legacy_pkey", r#"request_id, "startTime""#),
        format!(r#"CREATE UNIQUE INDEX {index} ON "LiteLLM_SpendLogs" (api_key, request_id)"#),
        format!(r#"CREATE UNIQUE INDEX {index} ON "LiteLLM_SpendLogs" (request_id) INCLUDE ("startTime")"#),
        format!(r#"ALTER TABLE "LiteLLM_SpendLogs" ADD CONSTRAINT {index} UNIQUE (request_id, "startTime")"#),
    ] {
        client.batch_execute(&format!("BEGIN; {make}")).unwrap();
        match client.query("SELECT * FROM spend_partition_convert()", &[]) {
            Ok(_) => accepted.push(make),
            Err(error) => {
                let error = error.as_db_error().unwrap().clone();
                assert_eq!(error.code().code(), "55000", "{make}: {error:?}");
                let detail = error.detail().unwrap();
                assert!(
                    detail.contains("already, which is what its own would be called"),
                    "{make}: {detail}"
                );
            }
        }
        client.batch_execute("ROLLBACK").unwrap();
    }
    assert_eq!(accepted, Vec::<String>::new());
}

/// LiteLLM's inserts queue behind a migration that waits.
#[test]
fn the_build_of_a_conversion_gives_way_to_who_changes_the_table() {
    let db = shared().database();
    let mut client = db.connect();
    wait_for_worker(&mut client);
    client.batch_execute(&insert_rows("old", 1000, 40)).unwrap();
    // The build waits for it.
    let mut dump = db.connect();
    dump.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class LIMIT 1").unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    let waits = r#"SELECT EXISTS (SELECT FROM pg_stat_progress_create_index p JOIN pg_locks l USING (pid)
                   WHERE p.datname = current_database() AND p.relid = '"LiteLLM_SpendLogs"'::regclass AND NOT l.granted)"#;
    eventually("the build waits", || holds(&mut client, waits));
    client
        .batch_execute(r#"SET lock_timeout = '20s'; ALTER TABLE "LiteLLM_SpendLogs" ADD COLUMN later text"#)
        .expect("the build ends long before the snapshot does");
    dump.batch_execute("COMMIT").unwrap();
    wait_until_partitioned(&mut client);
    assert_all_there(&mut client, 1000);
}

#[test]
fn a_row_from_the_cutover_on_keeps_the_swap_away() {
    let db = shared().database();
    let mut client = db.connect();
    wait_for_worker(&mut client);
    client.batch_execute(&insert_rows("old", 1000, 40)).unwrap();
    let mut holder = db.connect();
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE").unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    eventually("it is to be swapped", || {
        holds(&mut client, "SELECT bool_or(step = 'swap' AND state = 'next') FROM spend_partition_convert()")
    });
    let future = r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
                    VALUES ('future', 'x', 1, now() + interval '10 days', now())"#;
    client.batch_execute(future).unwrap();
    holder.batch_execute("COMMIT").unwrap();
    eventually("it says so", || {
        holds(
            &mut client,
            "SELECT last_error LIKE '%has rows from the cutover on%' FROM litellm_spend.conversion",
        )
    });
    assert!(!holds(&mut client, IS_PARTITIONED));
    client.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE request_id = 'future'"#).unwrap();
    wait_until_partitioned(&mut client);
    client.batch_execute(future).unwrap();
    let count = r#"SELECT count(*) FROM "LiteLLM_SpendLogs" WHERE "startTime" > now() + interval '9 days'"#;
    assert_eq!(value::<i64>(&mut client, count), 1);
}

#[test]
fn a_conversion_that_is_aborted_leaves_everything_as_it_was() {
    let db = shared().database();
    let mut client = db.connect();
    wait_for_worker(&mut client);
    client.batch_execute(&insert_rows("old", 1000, 40)).unwrap();
    let before = inventory_of_table(&mut client);
    let wait_until_gone = |client: &mut Client| {
        eventually("it is forgotten", || {
            value::<i64>(client, "SELECT count(*) FROM litellm_spend.conversion") == 0
        });
        assert_eq!(inventory_of_table(client), before);
    };
    // While the index is being built, which a writer holds up.
    let mut writer = db.connect();
    writer.batch_execute(&format!("BEGIN; {}", insert_rows("open", 1, 3))).unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    eventually("the index is being built", || {
        holds(&mut client, "SELECT EXISTS (SELECT FROM pg_index WHERE NOT indisvalid)")
    });
    client.batch_execute("SELECT spend_partition_revert()").unwrap();
    let builds = "SELECT count(*) FROM pg_stat_progress_create_index WHERE datname = current_database()";
    eventually("it is not built any more", || value::<i64>(&mut client, builds) == 0);
    writer.batch_execute("COMMIT").unwrap();
    wait_until_gone(&mut client);
    // When somebody keeps the swap away.
    let mut holder = db.connect();
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE").unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    eventually("it is to be swapped", || {
        holds(&mut client, "SELECT bool_or(step = 'swap' AND state = 'next') FROM spend_partition_convert()")
    });
    client.batch_execute("SELECT spend_partition_revert()").unwrap();
    wait_until_gone(&mut client);
    holder.batch_execute("COMMIT").unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_partitioned(&mut client);
}

const BUILDERS: &str = "SELECT count(*) FROM pg_stat_activity
                        WHERE backend_type = 'litellm_spend builder' AND datname = current_database()";

/// What a builder has in hand is not seen before it has the table's lock.
#[test]
fn a_conversion_that_is_taken_back_before_its_index_is_begun_leaves_none() {
    let db = shared().database();
    let mut client = db.connect();
    wait_for_worker(&mut client);
    client.batch_execute(&insert_rows("old", 1000, 40)).unwrap();
    let before = inventory_of_table(&mut client);
    // As VACUUM does.
    let mut vacuum = db.connect();
    vacuum.batch_execute(r#"BEGIN; LOCK TABLE "LiteLLM_SpendLogs" IN SHARE UPDATE EXCLUSIVE MODE"#).unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    eventually("the builder waits for the table", || {
        let waits = r#"SELECT EXISTS (SELECT FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                       WHERE a.backend_type = 'litellm_spend builder' AND NOT l.granted
                           AND l.relation = '"LiteLLM_SpendLogs"'::regclass)"#;
        holds(&mut client, waits)
    });
    client.batch_execute("SELECT spend_partition_revert()").unwrap();
    eventually("it is forgotten", || {
        value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.conversion") == 0
    });
    vacuum.batch_execute("COMMIT").unwrap();
    eventually("the builder ends", || value::<i64>(&mut client, BUILDERS) == 0);
    assert_eq!(inventory_of_table(&mut client), before);
}

#[test]
fn an_index_that_is_there_when_its_conversion_is_forgotten_is_dropped() {
    let db = shared().database();
    let (mut client, mut writer) = (db.connect(), db.connect());
    wait_for_worker(&mut client);
    client.batch_execute(&insert_rows("old", 1000, 40)).unwrap();
    let before = inventory_of_table(&mut client);
    writer.batch_execute(&format!("BEGIN; {}", insert_rows("open", 1, 3))).unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    eventually("the index is being built", || {
        holds(&mut client, "SELECT EXISTS (SELECT FROM pg_index WHERE NOT indisvalid)")
    });
    client.batch_execute("DELETE FROM litellm_spend.conversion").unwrap();
    writer.batch_execute("COMMIT").unwrap();
    eventually("the builder ends", || value::<i64>(&mut client, BUILDERS) == 0);
    assert_eq!(inventory_of_table(&mut client), before);
}

fn inventory_of_table(client: &mut Client) -> Vec<String> {
    let sql = r#"SELECT conname::text FROM pg_constraint WHERE conrelid = '"LiteLLM_SpendLogs"'::regclass
                 UNION ALL SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = '"LiteLLM_SpendLogs"'::regclass
                 UNION ALL SELECT tgname::text FROM pg_trigger WHERE tgrelid = '"LiteLLM_SpendLogs"'::regclass AND NOT tgisinternal
                 ORDER BY 1"#;
    client.query(sql, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

#[test]
fn a_materialized_view_is_in_the_way_until_its_owner_has_dropped_it() {
    let db = shared().database();
    let mut client = db.connect();
    wait_for_worker(&mut client);
    client.batch_execute(&insert_rows("old", 10, 40)).unwrap();
    let view = r#"CREATE MATERIALIZED VIEW m AS SELECT request_id, spend FROM "LiteLLM_SpendLogs""#;
    client.batch_execute(view).unwrap();
    assert_refused(&mut client, "SELECT spend_partition_convert()", "55000");
    let detail = error(&mut client, "SELECT spend_partition_convert()").detail().unwrap().to_string();
    assert_eq!(detail, "Materialized view \"public\".\"m\" reads it.");
    client.batch_execute("DROP MATERIALIZED VIEW m; SELECT spend_partition_convert()").unwrap();
    wait_until_partitioned(&mut client);
    client.batch_execute(view).unwrap();
    client.batch_execute(&insert_rows("new", 5, 2)).unwrap();
    // LiteLLM's own views, of a table that is not attached, read the new one, too.
    let raw = r#"SELECT abs((SELECT sum(spend) FROM "MonthlyGlobalSpend") - (SELECT sum(spend) FROM "LiteLLM_SpendLogs" WHERE "startTime" >= CURRENT_DATE - 30)) < 1e-9"#;
    assert!(holds(&mut client, raw));
}

// ---- and back --------------------------------------------------------------------------------------------

fn wait_until_reverted(client: &mut Client) {
    eventually("the table is plain again", || {
        holds(client, r#"SELECT relkind = 'r' FROM pg_class WHERE oid = to_regclass('"LiteLLM_SpendLogs"')"#)
            && value::<i64>(client, "SELECT count(*) FROM litellm_spend.conversion") == 0
    });
}

#[test]
fn a_table_may_go_there_and_back_again_beside_what_is_left_in_the_archive() {
    let db = shared().database().with_rows("old", 1000, 40).attached();
    let mut client = db.connect();
    for round in 1..=3 {
        client.batch_execute("SELECT spend_partition_convert()").unwrap();
        wait_until_partitioned(&mut client);
        client.batch_execute(&insert_rows(&format!("new{round}-"), 50, 3)).unwrap();
        client
            .batch_execute(
                r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
                   SELECT request_id, 'again', 5, "startTime" + interval '1 minute', now() FROM "LiteLLM_SpendLogs" WHERE request_id = 'old1'"#,
            )
            .unwrap();
        client.batch_execute("SELECT spend_partition_revert()").unwrap();
        wait_until_reverted(&mut client);
        assert_verified(&mut client);
    }
    assert_eq!(value::<i64>(&mut client, r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#), 1150);
    for (table, rows) in [
        ("partitioned", 1051),
        ("partitioned_2", 1101),
        ("partitioned_3", 1151),
        ("duplicates", 1),
        ("duplicates_2", 1),
        ("duplicates_3", 1),
    ] {
        let count = format!(r#"SELECT count(*) FROM litellm_spend_archive."LiteLLM_SpendLogs_{table}""#);
        assert_eq!(value::<i64>(&mut client, &count), rows, "{table}");
    }
}

#[test]
fn a_merge_that_moves_a_row_is_captured_on_a_converted_table_and_leaves_no_trigger_on_a_reverted_one() {
    let db = shared().database();
    if !knows_merge(&mut db.connect()) {
        return;
    }
    db.connect().batch_execute(&insert_rows("old", 1000, 40)).unwrap();
    let db = db.attached();
    let mut client = db.connect();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_partitioned(&mut client);
    let lacking = r#"SELECT count(*) FROM pg_partition_tree('"LiteLLM_SpendLogs"') WHERE isleaf AND NOT EXISTS (
                         SELECT FROM pg_trigger WHERE tgrelid = relid AND tgname = 'litellm_spend_capture_move' AND tgparentid = 0)"#;
    assert_eq!(value::<i64>(&mut client, lacking), 0);
    client
        .batch_execute(
            r#"MERGE INTO "LiteLLM_SpendLogs" AS t USING (VALUES ('old7')) AS s(id) ON t.request_id = s.id
                   WHEN MATCHED THEN UPDATE SET "startTime" = CURRENT_DATE + interval '49 hours'"#,
        )
        .unwrap();
    wait_until_merged(&mut client);
    eventually("nothing is dirty", || {
        holds(&mut client, "SELECT bool_and(dirty_ranges = 0) FROM spend_rollup_status")
    });
    assert!(holds(
        &mut client,
        "SELECT sum(requests) = 1 FROM litellm_spend.daily_spend WHERE date > CURRENT_DATE + 1"
    ));
    assert_verified(&mut client);
    client.batch_execute("SELECT spend_partition_revert()").unwrap();
    wait_until_reverted(&mut client);
    let left = "SELECT count(*) FROM pg_trigger WHERE tgname = 'litellm_spend_capture_move'";
    assert_eq!(value::<i64>(&mut client, left), 0);
    assert_exact(&mut client);
}

#[test]
fn a_reversion_that_is_killed_goes_on_and_one_that_is_aborted_leaves_nothing() {
    let cluster = own_cluster(&[]);
    let db = cluster.database().with_rows("old", 60_000, 40).attached();
    let mut client = db.connect();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_partitioned(&mut client);
    drop(client);
    // Before each step, or in the middle of it.
    for i in 0..6 {
        let mut client = db.connect();
        let _ = client.batch_execute("SELECT spend_partition_revert()");
        std::thread::sleep(Duration::from_millis(40 + 130 * i));
        let rows = insert_rows(&format!("k{i}-"), 10, 30);
        client.batch_execute(&rows).unwrap();
        drop(client);
        if i % 2 == 0 {
            cluster.crash_and_restart();
        } else if let Ok(mut client) = cluster.try_connect(&db.name, "postgres") {
            if let Ok(Some(row)) = client.query_opt(WORKER, &[]) {
                kill(row.get(0));
            }
            eventually("the server is back", || cluster.try_connect(&db.name, "postgres").is_ok());
        }
    }
    let mut client = db.connect();
    eventually("it is plain", || {
        cluster.try_connect(&db.name, "postgres").is_ok_and(|mut client| {
            holds(
                &mut client,
                r#"SELECT relkind = 'r' FROM pg_class WHERE oid = to_regclass('"LiteLLM_SpendLogs"')"#,
            )
        })
    });
    assert_all_there(&mut client, 60_060);

    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_partitioned(&mut client);
    // A reader keeps the swap away.
    let mut reader = db.connect();
    reader.batch_execute(r#"BEGIN; SELECT count(*) FROM "LiteLLM_SpendLogs""#).unwrap();
    client.batch_execute("SELECT spend_partition_revert()").unwrap();
    eventually("it waits for the reader", || {
        holds(
            &mut client,
            "SELECT (options ->> 'indexed')::boolean AND last_error IS NOT NULL FROM litellm_spend.conversion",
        )
    });
    // Readers lock the table, aborting needs it: somebody who attaches keeps the swap away, too.
    let mut holder = db.connect();
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE").unwrap();
    reader.batch_execute("COMMIT").unwrap();
    eventually("it is aborted", || {
        client.batch_execute("SELECT spend_partition_revert(abort => true)").is_ok()
    });
    holder.batch_execute("COMMIT").unwrap();
    let left = "SELECT (SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'litellm_spend_revert%')
                     + (SELECT count(*) FROM pg_class WHERE relname LIKE '%_plain%' OR relname LIKE '%_duplicates')
                     + (SELECT count(*) FROM litellm_spend.conversion)";
    let again = "SELECT state || ': ' || detail FROM spend_partition_revert(abort => true)";
    assert_eq!(value::<String>(&mut client, again), "aborted: nothing was under way: it stays partitioned");
    assert_eq!(value::<i64>(&mut client, left), 0);
    client.batch_execute(&insert_rows("after", 10, 3)).unwrap();
    assert_all_there(&mut client, 60_070);
}

/// What goes by a name must not go on with another table that has got it.
#[test]
fn a_table_that_is_renamed_on_its_way_waits_for_its_name_or_is_taken_back() {
    let db = shared().database();
    let (mut client, mut holder) = (db.connect(), db.connect());
    wait_for_worker(&mut client);
    client
        .batch_execute(
            "SET ROLE litellm; CREATE TABLE ev (id int PRIMARY KEY, at timestamp NOT NULL); CREATE INDEX ON ev (at);
             INSERT INTO ev SELECT i, '2026-01-01' FROM generate_series(1, 100) AS i; RESET ROLE",
        )
        .unwrap();
    let kind = "SELECT relkind::text FROM pg_class WHERE oid = 'ev'::regclass";
    for (way, arguments, by, becomes) in [
        ("convert", "'ev', time_column => 'at'", "", "p"),
        ("revert", "'ev'", "PARTITION BY RANGE (at); CREATE TABLE ev_d PARTITION OF ev DEFAULT", "r"),
    ] {
        let was: String = value(&mut client, kind);
        for taken_back in [true, false] {
            // Somebody keeps the swap away.
            holder
                .batch_execute("BEGIN; LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE")
                .unwrap();
            client.batch_execute(&format!("SELECT spend_partition_{way}({arguments})")).unwrap();
            eventually("it is to be swapped", || {
                let step = "bool_or(step = 'swap' AND state = 'next')";
                holds(&mut client, &format!("SELECT {step} FROM spend_partition_{way}('ev')"))
            });
            client
                .batch_execute(&format!(
                    "SET ROLE litellm; ALTER TABLE ev RENAME TO ev_old;
                     CREATE TABLE ev (LIKE ev_old INCLUDING ALL) {by}; INSERT INTO ev VALUES (1000, '2026-01-02'); RESET ROLE"
                ))
                .unwrap();
            holder.batch_execute("COMMIT").unwrap();
            eventually("it says so", || {
                let says_so = "SELECT last_error LIKE '%was called%' FROM litellm_spend.conversion";
                holds(&mut client, says_so)
            });
            if way == "convert" {
                assert_refused(&mut client, "SELECT spend_partition_convert('ev_old')", "55000");
            }
            if taken_back {
                client.batch_execute("SELECT spend_partition_revert('ev_old', abort => true)").unwrap();
                eventually("it is taken back", || {
                    holds(&mut client, "SELECT NOT EXISTS (SELECT FROM litellm_spend.conversion)")
                });
            }
            assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM ev"), 1);
            client.batch_execute("DROP TABLE ev; ALTER TABLE ev_old RENAME TO ev").unwrap();
            let expected = if taken_back { &was } else { becomes };
            eventually("it is as it was, or has arrived", || value::<String>(&mut client, kind) == expected);
            assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM ev"), 100);
        }
    }
}

#[test]
fn a_reversion_follows_columns_and_partitions_that_come_meanwhile() {
    let db = shared().database().with_rows("old", 1000, 40).attached();
    let mut client = db.connect();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_partitioned(&mut client);
    // A writer that was there before the trigger.
    let mut writer = db.connect();
    writer.batch_execute(&format!("BEGIN; {}", insert_rows("before", 7, 20))).unwrap();
    let mut holder = db.connect();
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE").unwrap();
    client.batch_execute("SELECT spend_partition_revert()").unwrap();
    wait_for_a_round(&mut client);
    writer.batch_execute("COMMIT").unwrap();
    let at_the_swap = "SELECT bool_or(step = 'swap' AND state = 'next') FROM spend_partition_revert()";
    eventually("all is copied", || holds(&mut client, at_the_swap));
    // A column, as LiteLLM's migrations add them: it begins anew.
    client
        .batch_execute(
            r#"ALTER TABLE "LiteLLM_SpendLogs" ADD COLUMN newer text DEFAULT 'n'; CREATE INDEX newer_idx ON "LiteLLM_SpendLogs" (newer)"#,
        )
        .unwrap();
    wait_for_a_round(&mut client);
    eventually("all is copied again", || holds(&mut client, at_the_swap));
    // Rows that come with a partition, which no trigger sees.
    client
        .batch_execute(
            r#"SET ROLE litellm; CREATE TABLE came (LIKE "LiteLLM_SpendLogs" INCLUDING ALL);
               INSERT INTO came (request_id, call_type, spend, "startTime", "endTime")
               SELECT 'came' || i, 'x', 1, '2040-01-01 10:00', now() FROM generate_series(1, 30) AS i;
               ALTER TABLE "LiteLLM_SpendLogs" ATTACH PARTITION came FOR VALUES FROM ('2040-01-01') TO ('2040-01-02'); RESET ROLE"#,
        )
        .unwrap();
    wait_for_a_round(&mut client);
    client.batch_execute(r#"CREATE INDEX newest_idx ON "LiteLLM_SpendLogs" (newer, model)"#).unwrap();
    holder.batch_execute("COMMIT").unwrap();
    wait_until_reverted(&mut client);
    assert_eq!(value::<i64>(&mut client, r#"SELECT count(newer) FROM "LiteLLM_SpendLogs""#), 1037);
    let indexes = r#"SELECT count(*) FROM pg_index WHERE indrelid = '"LiteLLM_SpendLogs"'::regclass
                     AND indexrelid::regclass::text IN ('newer_idx', 'newest_idx')"#;
    assert_eq!(value::<i64>(&mut client, indexes), 2);
}

#[test]
fn what_changes_during_a_reversion_is_noted_by_the_statement_and_not_by_the_row() {
    // Autovacuum takes transaction IDs, too.
    let cluster = own_cluster(&[NO_WORKER, "autovacuum = off"]);
    let db = cluster.database();
    let mut client = db.connect();
    let before_yesterday = insert_rows("old", 1000, 35)
        .replace("now() AT TIME ZONE 'UTC'", "now() AT TIME ZONE 'UTC' - interval '3 days'");
    client.batch_execute(&before_yesterday).unwrap();
    client.batch_execute(PARTITIONED_BY_HAND).unwrap();
    client.batch_execute(&insert_rows("now", 1000, 1)).unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    client.batch_execute("CALL spend_backfill()").unwrap();
    revert_until(&mut client, "indexes");
    // A transaction ID for the statement, and one for each trigger: capture's and ours; none for each row.
    let mut other = db.connect();
    let xid = "SELECT pg_current_xact_id()::text::bigint";
    let before: i64 = value(&mut other, xid);
    other.batch_execute(&insert_rows("noted", 100, 40)).unwrap();
    let taken = value::<i64>(&mut other, xid) - before;
    assert!(taken < 20, "{taken}");
    // Through the table, straight into a partition, with a row that moves, by every kind of statement.
    let new = |table: &str, id: &str, day: &str| {
        format!(
            r#"INSERT INTO {table} (request_id, call_type, spend, "startTime", "endTime")
               VALUES ('{id}', 'x', 7, {day}, now()) ON CONFLICT (request_id, "startTime") DO UPDATE SET spend = 8;"#
        )
    };
    let changes = [
        new("old_days", "leaf", "CURRENT_DATE - 20"),
        new("old_days", "leaf", "CURRENT_DATE - 20"),
        r#"UPDATE old_days SET spend = 9 WHERE request_id = 'old7';
           DELETE FROM old_days WHERE request_id = 'old8';
           UPDATE "LiteLLM_SpendLogs" SET "startTime" = "startTime" - interval '20 days', spend = 3 WHERE request_id LIKE 'now1%';
           UPDATE "LiteLLM_SpendLogs" SET request_id = 'other' WHERE request_id = 'now2';
           DELETE FROM "LiteLLM_SpendLogs" WHERE request_id LIKE 'now3%';
           COPY "LiteLLM_SpendLogs" (request_id, call_type, "startTime", "endTime") FROM PROGRAM
               'echo "copied,x,2026-01-01,2026-01-01"' (FORMAT csv);"#
            .into(),
    ];
    other.batch_execute(&changes.concat()).unwrap();
    if knows_merge(&mut other) {
        // To another partition, under another key: PostgreSQL 15 shows it to no trigger of UPDATE.
        other
            .batch_execute(
                r#"MERGE INTO "LiteLLM_SpendLogs" AS t USING (VALUES ('now4')) AS s(id) ON t.request_id = s.id
                   WHEN MATCHED THEN UPDATE SET "startTime" = "startTime" - interval '20 days', request_id = 'moved'"#,
            )
            .unwrap();
    }
    // A partition that comes meanwhile, with rows, and its rows after a step has seen it.
    other
        .batch_execute(
            r#"SET ROLE litellm; CREATE TABLE came (LIKE "LiteLLM_SpendLogs" INCLUDING ALL);
               INSERT INTO came (request_id, call_type, spend, "startTime", "endTime")
               SELECT 'came' || i, 'x', 1, '2040-01-01 10:00', now() FROM generate_series(1, 30) AS i;
               ALTER TABLE "LiteLLM_SpendLogs" ATTACH PARTITION came FOR VALUES FROM ('2040-01-01') TO ('2040-01-02'); RESET ROLE"#,
        )
        .unwrap();
    revert_until(&mut client, "indexes");
    other.batch_execute(&new("came", "late", "'2040-01-01 11:00'")).unwrap();
    other.batch_execute("DELETE FROM came WHERE request_id = 'came3'").unwrap();
    revert_until(&mut client, "swap");
    other
        .batch_execute(r#"CREATE TABLE expected AS SELECT * FROM "LiteLLM_SpendLogs"; DELETE FROM old_days WHERE request_id = 'old9'"#)
        .unwrap();
    revert_until(&mut client, "done");
    let differing = other
        .query(
            r#"SELECT request_id, "startTime"::text FROM (TABLE expected EXCEPT TABLE "LiteLLM_SpendLogs") AS lost
               UNION ALL SELECT 'added ' || request_id, "startTime"::text
               FROM (TABLE "LiteLLM_SpendLogs" EXCEPT TABLE expected) AS added"#,
            &[],
        )
        .unwrap();
    let differing: Vec<String> = differing.iter().map(|row| row.get(0)).collect();
    assert_eq!(differing, ["old9"]);
    let left = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'litellm_spend_revert%'";
    assert_eq!(value::<i64>(&mut other, left), 0);
}

/// As upstream's script does it: old days, and today's rows in DEFAULT.
const PARTITIONED_BY_HAND: &str = r#"
    BEGIN; SET LOCAL ROLE litellm;
    ALTER TABLE "LiteLLM_SpendLogs" RENAME TO old_days;
    ALTER INDEX "LiteLLM_SpendLogs_pkey" RENAME TO old_days_pkey;
    CREATE TABLE "LiteLLM_SpendLogs" (LIKE old_days INCLUDING DEFAULTS) PARTITION BY RANGE ("startTime");
    ALTER TABLE "LiteLLM_SpendLogs" ADD PRIMARY KEY (request_id, "startTime");
    CREATE INDEX ON "LiteLLM_SpendLogs" ("startTime", request_id);
    ALTER TABLE old_days DROP CONSTRAINT old_days_pkey;
    ALTER TABLE "LiteLLM_SpendLogs" ATTACH PARTITION old_days FOR VALUES FROM (MINVALUE) TO (CURRENT_DATE - 1);
    CREATE TABLE today PARTITION OF "LiteLLM_SpendLogs" DEFAULT;
    COMMIT"#;

#[test]
fn the_owners_code_runs_as_the_owner() {
    let db = shared().database();
    let mut client = db.connect();
    let role = format!("mallory_{}", db.name);
    client
        .batch_execute(&format!(
            "CREATE ROLE {role}; GRANT CREATE ON SCHEMA public TO {role};
             CREATE TABLE ran (kind text, who text); GRANT INSERT ON ran TO PUBLIC;
             SET ROLE {role};
             CREATE FUNCTION spy(kind text) RETURNS boolean LANGUAGE plpgsql AS $$
             BEGIN INSERT INTO public.ran VALUES (kind, current_user); RETURN true; END $$;
             CREATE TABLE events (id bigint PRIMARY KEY, at timestamp NOT NULL, CONSTRAINT spied CHECK (public.spy('check')));
             CREATE INDEX events_at ON events (at);
             CREATE FUNCTION spy_on_index(kind text) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS $$
             BEGIN RETURN public.spy(kind); END $$;
             CREATE INDEX spied ON events ((public.spy_on_index('index')));
             CREATE VIEW spying AS SELECT id, public.spy('view') FROM events WHERE public.spy('view of it');
             RESET ROLE;
             INSERT INTO events SELECT i, now() - i * interval '1 hour' FROM generate_series(1, 100) i;
             TRUNCATE ran;
             SELECT spend_partition_convert('events', time_column => 'at')"
        ))
        .unwrap();
    eventually("it is partitioned", || {
        value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.conversion") == 0
    });
    client.batch_execute("SELECT spend_partition_revert('events')").unwrap();
    eventually("it is plain", || {
        value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.conversion") == 0
    });
    let ran: Vec<(String, String)> = client
        .query("SELECT DISTINCT kind, who FROM ran ORDER BY 1", &[])
        .unwrap()
        .iter()
        .map(|r| (r.get(0), r.get(1)))
        .collect();
    assert_eq!(ran, [("check".to_string(), role.clone()), ("index".to_string(), role.clone())]);
    // Not before: planning it runs that code as whoever asks.
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM events"), 100);
    client.batch_execute(&format!("DROP OWNED BY {role} CASCADE; DROP ROLE {role}")).unwrap();
}

/// As its `request_log_indexes.py` does it on a partitioned table.
const INDEX_JOB: &str = r#"
    SELECT format('CREATE INDEX CONCURRENTLY IF NOT EXISTS %I ON %I %s', c.relname || suffix, c.relname, columns),
           format('ALTER INDEX %I ATTACH PARTITION %I', 'LiteLLM_SpendLogs' || suffix, c.relname || suffix)
    FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid,
         (VALUES ('_litellm_call_id_idx', '(litellm_call_id)'), ('_api_key_startTime_idx', '(api_key, "startTime")')) AS i(suffix, columns)
    WHERE inhparent = '"LiteLLM_SpendLogs"'::regclass"#;

/// As its `spend_log_partition_manager.py` drops what expired: by the bounds, children of the current schema.
const CLEAN_UP_JOB: &str = r#"
    SELECT format('DROP TABLE IF EXISTS %I', c.relname)
    FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid
    WHERE inhparent = '"LiteLLM_SpendLogs"'::regclass AND c.relnamespace = current_schema()::regnamespace
      AND substring(pg_get_expr(c.relpartbound, c.oid) FROM $x$TO \('([^']+)'\)$x$)::timestamp <= $1"#;

#[test]
fn litellms_index_job_and_clean_up_job_work_on_the_partitioned_table() {
    let db = shared().database();
    db.connect()
        .batch_execute(&format!(
            r#"{}; CREATE INDEX "LiteLLM_SpendLogs_litellm_call_id_idx" ON "LiteLLM_SpendLogs" (litellm_call_id)"#,
            insert_rows("old", 1000, 40)
        ))
        .unwrap();
    let db = db.attached();
    let mut client = db.connect();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_partitioned(&mut client);
    for (name, columns) in
        [("litellm_call_id", "(litellm_call_id)"), ("api_key_startTime", r#"(api_key, "startTime")"#)]
    {
        let sql = format!(
            r#"CREATE INDEX IF NOT EXISTS "LiteLLM_SpendLogs_{name}_idx" ON ONLY "LiteLLM_SpendLogs" {columns}"#
        );
        client.batch_execute(&sql).unwrap();
    }
    for row in client.query(INDEX_JOB, &[]).unwrap() {
        client.batch_execute(row.get(0)).unwrap();
        client.batch_execute(row.get(1)).unwrap();
    }
    let indexes = r#"SELECT count(*) = 6 AND bool_and(indisvalid) FROM pg_index WHERE indrelid = '"LiteLLM_SpendLogs"'::regclass AND NOT indisprimary"#;
    assert!(holds(&mut client, indexes), "the one that was there is its own, and both are valid");
    // The old table goes like any other partition; the views keep its days.
    let total = r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#;
    let before: f64 = value(&mut client, total);
    let cutoff = r#"SELECT range_end FROM spend_partition_status WHERE partition = '"LiteLLM_SpendLogs_legacy"'::regclass"#;
    let cutoff: std::time::SystemTime = value(&mut client, cutoff);
    let drops = client.query(CLEAN_UP_JOB, &[&cutoff]).unwrap();
    assert_eq!(drops.len(), 1);
    drops.iter().for_each(|row| client.batch_execute(row.get(0)).unwrap());
    assert_eq!(value::<i64>(&mut client, r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#), 0);
    eventually("what vanished is history", || {
        holds(&mut client, "SELECT bool_and(dirty_ranges = 0) FROM spend_rollup_status")
    });
    assert_eq!(value::<f64>(&mut client, total), before);
    client.batch_execute(&insert_rows("new", 5, 1)).unwrap();
}

#[test]
fn a_table_that_is_dropped_on_its_way_back_leaves_no_copy_of_its_rows() {
    let db = shared().database();
    let (mut client, mut holder) = (db.connect(), db.connect());
    wait_for_worker(&mut client);
    client
        .batch_execute(
            "SET ROLE litellm;
             CREATE TABLE ev (id int, at timestamp NOT NULL, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
             CREATE INDEX ON ev (at);
             CREATE TABLE ev_1 PARTITION OF ev FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
             CREATE TABLE ev_d PARTITION OF ev DEFAULT;
             INSERT INTO ev SELECT i, '2026-01-30'::timestamp + i * interval '1 hour' FROM generate_series(1, 100) AS i;
             RESET ROLE",
        )
        .unwrap();
    // Somebody keeps the swap away.
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE").unwrap();
    client.batch_execute("SELECT spend_partition_revert('ev')").unwrap();
    eventually("it is to be swapped", || {
        let step = "bool_or(step = 'swap' AND state = 'next')";
        holds(&mut client, &format!("SELECT {step} FROM spend_partition_revert('ev')"))
    });
    client.batch_execute("ALTER TABLE ev DETACH PARTITION ev_1; DROP TABLE ev").unwrap();
    holder.batch_execute("COMMIT").unwrap();
    eventually("it is forgotten", || {
        holds(&mut client, "SELECT NOT EXISTS (SELECT FROM litellm_spend.conversion)")
    });
    let left = "SELECT array_agg(relname::text) FROM (
            SELECT relname FROM pg_class WHERE relnamespace = 'litellm_spend_archive'::regnamespace
            UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'litellm_spend_archive'::regnamespace
            UNION ALL SELECT tgname FROM pg_trigger WHERE tgname LIKE 'litellm_spend_revert%') AS made";
    assert_eq!(value::<Option<Vec<String>>>(&mut client, left), None);
    let log = shared().log();
    let says = |text: &str| log.contains(&format!("\"{}\": \"public\".\"ev\" {text}", db.name));
    assert!(says("was dropped during its reversion, and so is its copy"));
    assert!(!says("is a plain table again"));
}

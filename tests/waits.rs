//! Whoever is in our way delays us, not LiteLLM: no call of ours keeps its table locked while it waits or
//! works. And no status waits for anybody.

mod common;

use common::*;
use postgres::Client;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// No worker: what is merged, and when, is the test's.
fn captured() -> Database {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    let db = CLUSTER.get_or_init(|| Cluster::start(&[NO_WORKER])).database();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("old", 100, 5)).unwrap();
    client.batch_execute("SELECT spend_attach(reports => true)").unwrap();
    client.batch_execute("CALL spend_backfill()").unwrap();
    db
}

/// A reader and a writer of the table, who wait for nobody.
fn assert_table_is_free(client: &mut Client, prefix: &str) {
    client.batch_execute("SET lock_timeout = '100ms'").unwrap();
    client.batch_execute(r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#).unwrap();
    client.batch_execute(&insert_rows(prefix, 5, 2)).unwrap();
}

#[test]
fn a_detach_that_waits_for_a_reader_of_a_rollup_has_not_locked_the_table() {
    let db = captured();
    let (mut client, mut dashboard) = (db.connect(), db.connect());
    dashboard.batch_execute("BEGIN; SELECT * FROM litellm_spend.daily_usage LIMIT 1").unwrap();
    let holder = backend_pid(&mut dashboard);
    let call = "SET litellm_spend.lock_timeout = '3s'; SELECT spend_detach(drop_history => true)";
    let error = error_after_waiting(&db, call, |client, _| assert_table_is_free(client, "beside")).unwrap();
    assert_eq!(error.code().code(), "55P03", "{error:?}");
    assert!(error.message().contains("daily_usage"), "{error:?}");
    assert!(error.detail().unwrap().contains(&holder.to_string()), "{error:?}");
    // Nothing was changed.
    assert_exact(&mut client);
    assert_eq!(capture_errors(&mut client), 0);
    dashboard.batch_execute("COMMIT").unwrap();
    client.batch_execute("SELECT spend_detach(drop_history => true)").unwrap();
    let left = "SELECT count(*) FROM pg_class WHERE relnamespace = 'litellm_spend'::regnamespace AND relname ~ 'daily_|change_log'";
    assert_eq!(value::<i64>(&mut client, left), 0);
}

#[test]
fn history_that_a_detach_has_kept_is_dropped_within_the_limit_too() {
    let db = captured();
    let (mut client, mut dashboard) = (db.connect(), db.connect());
    client.batch_execute("SELECT spend_detach()").unwrap();
    dashboard.batch_execute("BEGIN; SELECT * FROM litellm_spend.daily_usage LIMIT 1").unwrap();
    client.batch_execute("SET statement_timeout = '60s'").unwrap();
    assert_refused(&mut client, "SELECT spend_detach(drop_history => true)", "55P03");
    dashboard.batch_execute("COMMIT").unwrap();
    client.batch_execute("SELECT spend_detach(drop_history => true)").unwrap();
}

#[test]
fn a_detach_merges_what_is_in_the_log_before_it_locks_the_table() {
    let db = captured();
    let (mut client, mut other) = (db.connect(), db.connect());
    client.batch_execute(&insert_rows("new", 5000, 5)).unwrap();
    // Keeps the merge waiting, in the middle of its work.
    other.batch_execute("BEGIN; SELECT FROM litellm_spend.daily_spend_rollup FOR UPDATE").unwrap();
    let call = "SET litellm_spend.lock_timeout = '60s'; SELECT spend_detach()";
    let failed = error_after_waiting(&db, call, |client, _| {
        assert_table_is_free(client, "beside");
        client.batch_execute(r#"SELECT * FROM "MonthlyGlobalSpend""#).unwrap();
        other.batch_execute("COMMIT").unwrap();
    });
    assert!(failed.is_none(), "{failed:?}");
    // What came in beside it is in the history as well.
    assert!(holds(
        &mut client,
        r#"SELECT (SELECT sum(requests) FROM litellm_spend.daily_spend_rollup) = 5105
                  AND (SELECT sum(requests) FROM litellm_spend.hourly_usage_rollup) = 5105
                  AND (SELECT count(*) FROM "LiteLLM_SpendLogs") = 5105"#
    ));
}

#[test]
fn a_detach_gives_up_where_a_merge_is_under_way() {
    let db = captured();
    let (mut client, mut merger) = (db.connect(), db.connect());
    client.batch_execute(&insert_rows("new", 50, 5)).unwrap();
    merger.batch_execute("BEGIN; SELECT spend_rollup_run()").unwrap();
    client.batch_execute("SET lock_timeout = '300ms'; SET statement_timeout = '40s'").unwrap();
    for drop_history in ["false", "true"] {
        assert_refused(&mut client, &format!("SELECT spend_detach(NULL, {drop_history})"), "55P03");
    }
    assert_exact(&mut client);
    merger.batch_execute("COMMIT").unwrap();
    client.batch_execute("SELECT spend_detach()").unwrap();
}

/// A day of a backfill may take longer than anything may keep writers waiting.
#[test]
fn an_attach_and_a_detach_wait_for_a_long_step_and_the_table_is_free() {
    let db = captured();
    let mut merger = db.connect();
    for (call, prefix) in [("spend_attach()", "a"), ("spend_detach()", "d")] {
        merger.batch_execute(&insert_rows(prefix, 50, 5)).unwrap();
        merger.batch_execute("BEGIN; SELECT spend_rollup_run()").unwrap();
        let call = format!("SET litellm_spend.lock_timeout = '100ms'; SELECT {call}");
        let failed = error_after_waiting(&db, &call, |client, pid| {
            assert_table_is_free(client, &format!("beside_{prefix}"));
            let longer =
                "SELECT bool_or(waitstart < clock_timestamp() - interval '1 s') FROM pg_locks WHERE pid =";
            eventually("it waits longer than for the table", || holds(client, &format!("{longer} {pid}")));
            merger.batch_execute("COMMIT").unwrap();
        });
        assert!(failed.is_none(), "{failed:?}");
    }
}

/// The limit is one for all rollups: each that is had already is not merged meanwhile.
#[test]
fn an_attach_waits_for_its_rollups_no_longer_than_the_limit_together() {
    let db = captured();
    let (mut one, mut other) = (db.connect(), db.connect());
    one.batch_execute("BEGIN; SELECT FROM litellm_spend.rollup WHERE name = 'daily_spend' FOR UPDATE")
        .unwrap();
    other
        .batch_execute("BEGIN; SELECT FROM litellm_spend.rollup WHERE name = 'daily_spend_by_tag' FOR UPDATE")
        .unwrap();
    let began = Instant::now();
    let failed = error_after_waiting(&db, "SET lock_timeout = '4s'; SELECT spend_attach()", |_, _| {
        std::thread::sleep(Duration::from_secs(3).saturating_sub(began.elapsed()));
        one.batch_execute("COMMIT").unwrap();
    });
    assert_eq!(failed.unwrap().code().code(), "55P03");
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
}

/// Of two calls after a restore, the second waits for the rows of state that the first makes ours.
#[test]
fn a_call_that_waits_for_our_own_state_has_a_limit() {
    let db = captured();
    let (mut client, mut first) = (db.connect(), db.connect());
    client.batch_execute("UPDATE litellm_spend.source SET origin = gen_random_uuid()").unwrap();
    first.batch_execute("BEGIN; SELECT spend_restored()").unwrap();
    client.batch_execute("SET litellm_spend.lock_timeout = '200ms'; SET statement_timeout = '20s'").unwrap();
    for call in ["SELECT spend_attach()", "SELECT spend_restored()"] {
        assert_eq!(error(&mut client, call).code().code(), "55P03", "{call}");
    }
    first.batch_execute("COMMIT").unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
}

#[test]
fn no_lock_is_waited_for_longer_than_the_callers_own_limit() {
    let db = captured();
    let (mut client, mut writer) = (db.connect(), db.connect());
    let lose = r#"DROP TRIGGER litellm_spend_capture_insert ON "LiteLLM_SpendLogs""#;
    client.batch_execute(lose).unwrap();
    writer.batch_execute(r#"BEGIN; DELETE FROM "LiteLLM_SpendLogs" WHERE false"#).unwrap();
    client.batch_execute("SET lock_timeout = '50ms'; SET litellm_spend.lock_timeout = '20s'").unwrap();
    let began = Instant::now();
    let error = error(&mut client, "SELECT spend_attach()");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(error.code().code(), "55P03");
    assert!(error.message().ends_with("within 50 ms"), "{error:?}");
    assert!(error.hint().unwrap().ends_with("or raise lock_timeout."), "{error:?}");
    writer.batch_execute("COMMIT").unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    assert_eq!(value::<String>(&mut client, "SHOW lock_timeout"), "50ms");
}

#[test]
fn an_attach_waits_for_no_dump_and_keeps_no_delete_waiting() {
    let db = captured();
    let (mut client, mut dump) = (db.connect(), db.connect());
    dump.batch_execute(
        "BEGIN; LOCK TABLE litellm_spend.retired, litellm_spend.change_log IN ACCESS SHARE MODE",
    )
    .unwrap();
    let lose = r#"DROP TRIGGER litellm_spend_capture_insert ON "LiteLLM_SpendLogs""#;
    client.batch_execute(lose).unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    client.batch_execute("BEGIN; SELECT spend_attach()").unwrap();
    let mut litellm = db.connect();
    litellm.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE request_id = 'old1'"#).unwrap();
    client.batch_execute("COMMIT").unwrap();
    dump.batch_execute("COMMIT").unwrap();
    assert_eq!(capture_errors(&mut client), 0);
}

#[test]
fn of_two_that_grant_at_once_the_second_waits_for_the_first() {
    let db = captured();
    let (mut client, mut first) = (db.connect(), db.connect());
    for role in ["a_reader", "an_admin"] {
        client
            .batch_execute(&format!(
                "DO $$BEGIN CREATE ROLE {role}; EXCEPTION WHEN duplicate_object THEN NULL; END$$"
            ))
            .unwrap();
    }
    first.batch_execute("BEGIN; SELECT * FROM spend_grant_reports('a_reader')").unwrap();
    client.batch_execute("SET litellm_spend.lock_timeout = '200ms'; SET statement_timeout = '60s'").unwrap();
    for call in ["spend_grant_admin('an_admin')", "spend_revoke_admin('an_admin')"] {
        let error = error(&mut client, &format!("SELECT * FROM {call}"));
        assert_eq!(error.code().code(), "55P03", "{error:?}");
        assert!(error.detail().unwrap().contains(&backend_pid(&mut first).to_string()), "{error:?}");
    }
    client.batch_execute("SET litellm_spend.lock_timeout = '30s'").unwrap();
    std::thread::scope(|scope| {
        let granting = scope.spawn(|| client.batch_execute("SELECT * FROM spend_grant_admin('an_admin')"));
        first.batch_execute("COMMIT").unwrap();
        granting.join().unwrap().unwrap();
    });
}

#[test]
fn a_detach_with_rows_that_cannot_be_merged_yet_is_refused() {
    let db = captured();
    let (mut client, mut writer) = (db.connect(), db.connect());
    writer.batch_execute("BEGIN").unwrap();
    writer.batch_execute(&insert_rows("open", 5, 5)).unwrap();
    let error = error(&mut client, "SELECT spend_detach()");
    assert_eq!(error.code().code(), "55P03", "{error:?}");
    assert!(error.detail().unwrap().contains(&pid_of(&mut client, "idle in transaction")), "{error:?}");
    writer.batch_execute("COMMIT").unwrap();
    // Written by hand, which is no writer of the table.
    writer.batch_execute(
        "BEGIN; INSERT INTO litellm_spend.change_log (hour, spend, prompt_tokens, completion_tokens, total_tokens, requests, failed_requests)
         VALUES (date_trunc('hour', now()), 0, 0, 0, 0, 0, 0)",
    )
    .unwrap();
    assert_refused(&mut client, "SELECT spend_detach()", "55P03");
    writer.batch_execute("ROLLBACK").unwrap();
    client.batch_execute("SELECT spend_detach()").unwrap();
}

fn pid_of(client: &mut Client, state: &str) -> String {
    let sql = format!(
        "SELECT pid::text FROM pg_stat_activity WHERE datname = current_database() AND state = '{state}'"
    );
    value(client, &sql)
}

#[test]
fn a_conversion_that_waits_for_our_own_state_has_not_locked_the_table() {
    let db = captured();
    let (mut client, mut merger) = (db.connect(), db.connect());
    let index: String =
        value(&mut client, "SELECT detail FROM spend_partition_convert() WHERE state = 'next'");
    client.batch_execute(&index).unwrap();
    client.batch_execute(&insert_rows("new", 50, 5)).unwrap();
    // It merges and trims, and so has our row about the log.
    merger
        .batch_execute(
            "BEGIN; SELECT spend_rollup_run(); UPDATE litellm_spend.source SET trimmed_to = trimmed_to",
        )
        .unwrap();
    merger.batch_execute("SELECT FROM litellm_spend.capture FOR UPDATE").unwrap();
    let error = error_after_waiting(&db, "SELECT spend_partition_convert()", |client, _| {
        assert_table_is_free(client, "beside");
    })
    .unwrap();
    assert_eq!(error.code().code(), "55P03", "{error:?}");
    assert!(error.detail().unwrap().contains(&backend_pid(&mut merger).to_string()), "{error:?}");
    merger.batch_execute("COMMIT").unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    assert!(holds(&mut client, IS_PARTITIONED));
    assert_exact(&mut client);
}

/// Every column of each status view, in a time in which nobody can have been waited for.
#[track_caller]
fn assert_all_statuses(client: &mut Client, beside: &str) {
    client.batch_execute("SET statement_timeout = '6s'").unwrap();
    for view in [
        "spend_rollup_status",
        "spend_partition_status",
        "spend_index_status",
        "spend_progress",
        "spend_health",
    ] {
        let read =
            client.batch_execute(&format!("SELECT count(s) FROM (SELECT * FROM {view} OFFSET 0) AS s"));
        assert!(read.is_ok(), "{view} beside {beside}: {read:?}");
    }
    client.batch_execute("RESET statement_timeout").unwrap();
}

#[test]
fn no_status_waits_for_what_an_owner_has_locked() {
    let db = captured();
    let (mut client, mut owner) = (db.connect(), db.connect());
    client
        .batch_execute(
            r#"CREATE TABLE parts (id bigserial, t int) PARTITION BY RANGE (t);
               CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
               CREATE INDEX parts_1_id ON parts_1 (id);
               CREATE TABLE hand (id bigserial, t int);
               CREATE TABLE timed (at timestamp NOT NULL) PARTITION BY RANGE (at);
               CREATE TABLE timed_1 PARTITION OF timed FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
               CREATE INDEX timed_1_at ON timed_1 (at);
               CREATE INDEX users ON "LiteLLM_SpendLogs" ("user", "startTime");
               SELECT spend_rollup_create('of_parts', 'parts', '{t}', '{count(*) AS n}');
               SELECT spend_rollup_register('of_hand', 'hand');
               SELECT spend_partition_set('timed', time_column => 'at', retention => '10 years');
               SELECT spend_index_set(indexes => '{user,team}', hot => true);
               INSERT INTO parts (t) VALUES (1); INSERT INTO hand (t) VALUES (1)"#,
        )
        .unwrap();
    assert_all_statuses(&mut client, "nobody");
    for lock in [
        "LOCK TABLE parts IN ACCESS EXCLUSIVE MODE",
        "LOCK TABLE ONLY parts_1 IN ACCESS EXCLUSIVE MODE",
        "REINDEX INDEX parts_1_id",
        "ALTER SEQUENCE hand_id_seq MAXVALUE 1000000",
        "ALTER SEQUENCE parts_id_seq MAXVALUE 1000000",
        "LOCK TABLE timed IN ACCESS EXCLUSIVE MODE",
        "LOCK TABLE ONLY timed_1 IN ACCESS EXCLUSIVE MODE",
        "REINDEX INDEX timed_1_at",
        r#"LOCK TABLE "LiteLLM_SpendLogs" IN ACCESS EXCLUSIVE MODE"#,
        "REINDEX INDEX users",
    ] {
        owner.batch_execute(&format!("BEGIN; {lock}")).unwrap();
        assert_all_statuses(&mut client, lock);
        owner.batch_execute("ROLLBACK").unwrap();
    }
    // What is there is seen again.
    assert!(holds(&mut client, "SELECT tail_rows = 1 FROM spend_rollup_status WHERE rollup = 'of_parts'"));
    assert!(holds(&mut client, "SELECT bool_and(bytes > 0) FROM spend_partition_status"));
    assert!(holds(
        &mut client,
        r#"SELECT bytes > 0 FROM spend_index_status WHERE "index" = 'user' AND name = 'users'::regclass"#
    ));
}

/// What the server computes while it plans, and no cancel ends: for longer than a status
/// has time here, however busy the machine is.
#[test]
fn no_status_computes_what_an_owner_has_put_into_an_index() {
    let db = captured();
    let mut client = db.connect();
    let slow = ["translate(repeat('x', 1000000), repeat('y', 100), '') <> '1'"; 8].join(" AND ");
    let began = std::time::Instant::now();
    client.batch_execute(&format!("SELECT {slow}")).unwrap();
    let limit = began.elapsed().as_millis() * 3 / 4;
    client
        .batch_execute(
            "CREATE TABLE sl (id bigserial, t int, s int);
             SELECT spend_rollup_create('of_sl', 'sl', '{t}', '{count(*) AS n}')",
        )
        .unwrap();
    for change in [
        format!("CREATE INDEX slow ON sl (id) WHERE {slow}"),
        format!("DROP INDEX slow; CREATE INDEX slow ON sl (id, (t = 1 AND {slow}))"),
        format!("DROP INDEX slow; ALTER TABLE sl ADD CHECK (t > 0 OR {slow})"),
    ] {
        client.batch_execute(&change).unwrap();
        client.batch_execute(&format!("SET statement_timeout = '{limit}ms'")).unwrap();
        let read = client.query("SELECT * FROM spend_rollup_status WHERE rollup = 'of_sl'", &[]);
        assert!(read.is_ok(), "{}: {read:?}", &change[..50]);
        client.batch_execute("RESET statement_timeout").unwrap();
    }
    // What costs nothing is no reason to look away.
    client
        .batch_execute(
            "SELECT spend_rollup_drop('of_sl'); DROP TABLE sl;
             CREATE TABLE sl (id bigserial, at timestamp NOT NULL, s text CHECK (s <> ALL (ARRAY['a', 'b'])));
             CREATE INDEX ON sl (id) WHERE s IS NOT NULL AND s <> ''; CREATE INDEX ON sl (id, lower(s), (length(s) + 1));
             SELECT spend_rollup_create('of_sl', 'sl', '{at}', '{count(*) AS n}');
             INSERT INTO sl (at) VALUES ('2026-01-01')",
        )
        .unwrap();
    assert!(holds(
        &mut client,
        "SELECT tail_rows = 1 AND lag_seconds > 0 FROM spend_rollup_status WHERE rollup = 'of_sl'"
    ));
}

#[test]
fn no_status_asks_another_server() {
    let db = captured();
    let mut client = db.connect();
    client
        .batch_execute(&format!(
            "CREATE EXTENSION postgres_fdw;
             CREATE SERVER here FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '{}', port '{PORT}', dbname '{}');
             CREATE USER MAPPING FOR postgres SERVER here OPTIONS (user 'postgres');
             CREATE TABLE ft (id bigserial, t int) PARTITION BY RANGE (t);
             CREATE TABLE ft_1 PARTITION OF ft FOR VALUES FROM (0) TO (10);
             CREATE TABLE pause (s float8); INSERT INTO pause VALUES (0);
             CREATE VIEW slow AS SELECT 1000000::bigint AS id, 15 AS t FROM pause, pg_sleep(s);
             CREATE FOREIGN TABLE ft_2 PARTITION OF ft FOR VALUES FROM (10) TO (20) SERVER here OPTIONS (table_name 'slow')",
            db.cluster.dir.display(),
            db.name
        ))
        .unwrap();
    client
        .batch_execute(
            "SELECT spend_rollup_create('of_ft', 'ft', '{t}', '{count(*) AS n}');
             INSERT INTO ft (t) VALUES (1); UPDATE pause SET s = 20",
        )
        .unwrap();
    assert_all_statuses(&mut client, "a foreign partition");
    let tail = "SELECT tail_rows FROM spend_rollup_status WHERE rollup = 'of_ft'";
    assert_eq!(value::<i64>(&mut client, tail), 1);
}

/// A worker that is ended in the midst of an owner's code notes whose it was, if nobody keeps it from that.
#[test]
fn a_worker_that_is_ended_waits_for_nobody() {
    let db = shared().database();
    let (mut client, mut holder) = (db.connect(), db.connect());
    client
        .batch_execute(
            "SET ROLE litellm; CREATE TABLE pv (id bigserial PRIMARY KEY, x int, pad text);
             CREATE FUNCTION endless(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN
                 WHILE current_setting('application_name') <> 'owner' LOOP
                     BEGIN PERFORM pg_sleep(3600); EXCEPTION WHEN query_canceled THEN NULL; END;
                 END LOOP;
                 RETURN 1;
             END $$;
             CREATE INDEX ON pv USING brin (id, endless(x)) WITH (pages_per_range = 1);
             RESET ROLE; SELECT spend_rollup_create('of_pv', 'pv', '{x}', '{count(*) AS n}');
             SET application_name = 'owner';
             INSERT INTO pv (x, pad) SELECT 1, repeat('x', 1000) FROM generate_series(1, 100)",
        )
        .unwrap();
    let asleep = "SELECT pid FROM pg_stat_activity WHERE datname = current_database()
                  AND backend_type = 'litellm_spend worker' AND wait_event = 'PgSleep'";
    let mut pid: Option<i32> = None;
    eventually("the worker is in the owner's code", || {
        pid = client.query_opt(asleep, &[]).unwrap().map(|row| row.get(0));
        pid.is_some()
    });
    holder.batch_execute("BEGIN; SELECT FROM litellm_spend.rollup FOR UPDATE").unwrap();
    let gone = format!("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {})", pid.unwrap());
    eventually("it is ended", || holds(&mut client, &gone));
}

/// Many rollups of one owner's, whose rows come slowly.
#[test]
fn the_tails_of_one_owner_have_a_limit_of_time_together() {
    let db = captured();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE wide (id bigserial, t int); INSERT INTO wide (t) SELECT 1 FROM generate_series(1, 10);
             DO $$ BEGIN FOR i IN 1..40 LOOP
                 PERFORM spend_rollup_create('wide_' || i, 'wide', '{t}', '{count(*) AS n}');
             END LOOP; END $$;
             INSERT INTO wide (t) SELECT 1 FROM generate_series(1, 1500000)",
        )
        .unwrap();
    client.batch_execute("SET statement_timeout = '60s'").unwrap();
    // What a session reads for the first time takes longer.
    client.batch_execute("SELECT count(*) FROM spend_rollup_status").unwrap();
    let read = "SELECT count(*) = 40 AND bool_and(tail_rows = 1000000) FROM spend_rollup_status WHERE rollup LIKE 'wide_%'";
    let started = std::time::Instant::now();
    assert!(holds(&mut client, read));
    assert!(started.elapsed().as_secs_f64() < 10.0, "{:?}", started.elapsed());
    // The limit is a statement's.
    assert!(holds(&mut client, read));
}

#[test]
fn a_rebuild_waits_for_nobody_s_advisory_lock() {
    let db = captured();
    let (mut client, mut stranger) = (db.connect(), db.connect());
    stranger.batch_execute("SELECT pg_advisory_lock(x'7370656e'::int, 0)").unwrap();
    client.batch_execute("SET statement_timeout = '20s'; SELECT spend_rollup_rebuild(NULL)").unwrap();
}

#[test]
fn what_a_plan_of_indexes_waits_for_is_named() {
    let db = captured();
    let (mut client, mut holder) = (db.connect(), db.connect());
    client.batch_execute("SET litellm_spend.lock_timeout = '200ms'").unwrap();
    for lock in [
        r#"LOCK TABLE "LiteLLM_SpendLogs" IN ACCESS EXCLUSIVE MODE"#,
        r#"REINDEX INDEX "LiteLLM_SpendLogs_pkey""#,
    ] {
        holder.batch_execute(&format!("BEGIN; {lock}")).unwrap();
        let pid = backend_pid(&mut holder);
        for call in ["spend_index_plan()", "spend_upgrade_check('1.110.2')", "spend_partition_plan()"] {
            let error = error(&mut client, &format!("SELECT * FROM {call}"));
            let said = format!("{call} beside {lock}: {error:?}");
            assert_eq!(error.code().code(), "55P03", "{said}");
            assert!(error.message().starts_with("could not get a lock on "), "{said}");
            assert!(
                error.detail().is_some_and(|detail| detail.contains(&format!("process {pid} "))),
                "{said}"
            );
            assert!(error.hint().is_some_and(|hint| hint.contains("litellm_spend.lock_timeout")), "{said}");
        }
        holder.batch_execute("ROLLBACK").unwrap();
    }
}

#[test]
fn a_view_that_has_gone_live_keeps_its_readers_for_no_other_that_is_locked() {
    let db = own_cluster(&[NO_WORKER]).database();
    let (mut client, mut dashboard) = (db.connect(), db.connect());
    client.batch_execute(&insert_rows("a", 20, 1)).unwrap();
    client.batch_execute("SELECT spend_attach(); SET litellm_spend.lock_timeout = '4s'").unwrap();
    dashboard
        .batch_execute(
            r#"BEGIN; SELECT FROM "MonthlyGlobalSpendPerKey"; SELECT FROM "Last30dKeysBySpend";
               SELECT FROM "Last30dModelsBySpend"; SELECT FROM "Last30dTopEndUsersSpend""#,
        )
        .unwrap();
    let live = "SELECT string_agg(name, ', ' ORDER BY name) FROM litellm_spend.public_view WHERE installed IS NOT NULL";
    let switched = |client: &mut Client| {
        let started = Instant::now();
        client.batch_execute("SELECT spend_rollup_run()").unwrap();
        (started.elapsed(), value::<Option<String>>(client, live).unwrap_or_default())
    };
    let mut took;
    loop {
        let views;
        (took, views) = switched(&mut client);
        if !views.is_empty() {
            assert_eq!(views, "DailyTagSpend, MonthlyGlobalSpend, MonthlyGlobalSpendPerUserPerKey");
            break;
        }
    }
    assert!(took < Duration::from_secs(10), "{took:?}");
    dashboard.batch_execute("COMMIT").unwrap();
    assert_eq!(switched(&mut client).1.split(", ").count(), 7);
}

/// Keeps the range of each repair, in their order.
const REPAIRED: &str = "CREATE TABLE repaired (n serial, first timestamp, next timestamp);
    CREATE FUNCTION note_repair() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO public.repaired (first, next) VALUES (NEW.range_start, NEW.range_end); RETURN NULL; END $$;
    CREATE TRIGGER note_repair AFTER UPDATE ON litellm_spend.dirty_range FOR EACH ROW
        WHEN (OLD.repaired_at IS NULL AND NEW.repaired_at IS NOT NULL) EXECUTE FUNCTION note_repair()";

#[test]
fn a_call_repairs_all_of_time_a_day_at_a_time() {
    let db = captured();
    let mut client = db.connect();
    client.batch_execute(REPAIRED).unwrap();
    for (i, time) in
        ["-infinity", "4713-01-01 BC", "1999-05-05", "294276-12-31 12:00", "infinity"].iter().enumerate()
    {
        client
            .batch_execute(&format!(
                r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
                   VALUES ('end{i}', 'x', 1, '{time}', now())"#
            ))
            .unwrap();
    }
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    let requests: i64 = value(&mut client, REQUESTS);
    // Of one day a row is gone, and of another one the rollups know too few.
    client
        .batch_execute(
            r#"BEGIN; SET LOCAL session_replication_role = replica;
               DELETE FROM "LiteLLM_SpendLogs" WHERE request_id = 'end2';
               INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
               VALUES ('missed', 'x', 1, '2001-01-01', now());
               INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation)
               VALUES ('-infinity', 'infinity', 'rebuild', 'ATTACH'); COMMIT"#,
        )
        .unwrap();
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    assert_eq!(value::<i64>(&mut client, REQUESTS), requests + 1);
    let left = "SELECT string_agg(range_start || ' ' || range_end || ' ' || unrepairable, ',') FROM litellm_spend.dirty_range";
    assert_eq!(value::<String>(&mut client, left), "1999-05-05 00:00:00 1999-05-06 00:00:00 true");
    // A step for each day that has rows, and one for all days between two; together they are all of time.
    let days = r#"SELECT count(DISTINCT date_trunc('day', "startTime")) + 1 FROM "LiteLLM_SpendLogs" WHERE "startTime" <> 'infinity'"#;
    let days: i64 = value(&mut client, days);
    let steps: i64 = value(&mut client, "SELECT count(*) FROM repaired");
    assert!(days <= steps && steps <= 2 * days + 1, "{steps} steps for {days} days");
    assert!(holds(
        &mut client,
        r#"SELECT bool_and(n.next = p.first) AND min(n.first) = '-infinity' AND max(p.next) = 'infinity'
                  AND NOT bool_or(EXISTS (SELECT FROM "LiteLLM_SpendLogs" WHERE "startTime" >= n.first AND "startTime" < n.next)
                                  AND n.first > '-infinity' AND n.next > n.first + interval '1 day')
           FROM repaired n JOIN repaired p ON p.n = n.n - 1"#
    ));
    client.batch_execute("UPDATE litellm_spend.dirty_range SET unrepairable = false").unwrap();
    // What fails does not take back what was repaired before it.
    client
        .batch_execute(
            "ALTER TABLE litellm_spend.daily_spend_rollup ADD CONSTRAINT too_old CHECK (date >= '1000-01-01') NOT VALID;
             INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation)
             VALUES ('-infinity', 'infinity', 'rebuild', 'ATTACH')",
        )
        .unwrap();
    let notices = db.notices("SELECT spend_rollup_run()");
    assert!(notices.contains("repair failed") && notices.contains("too_old"), "{notices}");
    let left = "SELECT string_agg(range_start || ' ' || range_end, ',') FROM litellm_spend.dirty_range WHERE repaired_at IS NULL";
    assert_eq!(value::<String>(&mut client, left), "-infinity 4713-01-02 00:00:00 BC");
}

#[test]
fn a_failure_at_a_replaced_table_that_commits_late_is_repaired_when_it_commits() {
    let db = captured();
    let (mut client, mut writer) = (db.connect(), db.connect());
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    client.batch_execute("SET litellm_spend.window_wait = '100ms'; SELECT spend_rollup_run()").unwrap();
    assert!(holds(&mut client, "SELECT predecessor IS NOT NULL FROM litellm_spend.capture"));
    ["change_log", "dirty_range"].into_iter().for_each(|table| make_unwritable(&mut client, table));
    let into_old =
        insert_rows("late", 10, 1).replace("\"LiteLLM_SpendLogs\"", "\"LiteLLM_SpendLogs_legacy\"");
    writer.batch_execute(&format!("BEGIN; {into_old}")).unwrap();
    assert_eq!(capture_errors(&mut client), 1);
    for _ in 0..3 {
        client.batch_execute("SELECT spend_rollup_run()").unwrap();
    }
    assert_eq!(value::<i64>(&mut client, "SELECT failures_seen FROM litellm_spend.capture"), 0);
    writer.batch_execute("COMMIT").unwrap();
    ["change_log", "dirty_range"].into_iter().for_each(|table| make_writable(&mut client, table));
    for _ in 0..3 {
        client.batch_execute("SELECT spend_rollup_run()").unwrap();
    }
    client.batch_execute("CALL spend_backfill()").unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT failures_seen FROM litellm_spend.capture"), 1);
    assert_eq!(value::<i64>(&mut client, REQUESTS), 110);
    assert_verified(&mut client);
}

#[test]
fn writers_do_not_wait_until_the_copies_that_a_new_table_comes_with_are_read() {
    for (bytes, is_read) in [(10, true), (1_700, false)] {
        let db = captured();
        let mut client = db.connect();
        let drawn: i64 = value(&mut client, "SELECT last_value FROM litellm_spend.change_log_seq");
        let copies = r#"INSERT INTO "LiteLLM_SpendLogs" SELECT * FROM "LiteLLM_SpendLogs_legacy";"#;
        let rows = insert_rows("new", 9_000, 3)
            .replace("'{}'", &format!(r#"jsonb_build_object('a', repeat('x', {bytes}))"#));
        client
            .batch_execute(&UPSTREAM_SCRIPT.replace("COMMIT", &format!("{copies} {rows}; COMMIT")))
            .unwrap();
        client.batch_execute("SELECT spend_rollup_run()").unwrap();
        assert!(holds(&mut client, "SELECT predecessor IS NOT NULL FROM litellm_spend.capture"));
        let now: i64 = value(&mut client, "SELECT last_value FROM litellm_spend.change_log_seq");
        assert_eq!(now > drawn, is_read, "the gap is read under the lock");
        assert_eq!(value::<i64>(&mut client, REQUESTS), 9_100);
        assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.dirty_range"), 0);
        assert_verified(&mut client);
    }
}

#[test]
fn a_worker_does_not_ask_all_the_time_for_a_reversion_that_somebody_keeps_locked() {
    let db = own_cluster(&["litellm_spend.merge_interval = '1s'"]).database();
    let (mut client, mut other) = (db.connect(), db.connect());
    client
        .batch_execute(
            "SET ROLE litellm;
             CREATE TABLE ev (id int, at timestamp NOT NULL, filler text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
             CREATE INDEX ON ev (at);
             CREATE TABLE ev_1 PARTITION OF ev DEFAULT;
             INSERT INTO ev SELECT i, '2026-01-01'::timestamp + i * interval '1 s', repeat('x', 100)
             FROM generate_series(1, 300000) AS i;
             RESET ROLE; SELECT spend_partition_revert('ev')",
        )
        .unwrap();
    // Between two batches of the copy.
    other.batch_execute("BEGIN").unwrap();
    let kept: i64 =
        value(&mut other, "SELECT count(*) FROM (SELECT FROM litellm_spend.conversion FOR UPDATE) AS c");
    assert_eq!(kept, 1, "the reversion has ended already");
    let mut taken =
        || -> i64 { value(&mut client, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint") };
    let before = taken();
    // Not for an event: what must not happen is that the worker does something.
    std::thread::sleep(Duration::from_secs(4));
    let taken = taken() - before;
    assert!(taken < 60, "{taken} transaction IDs in four looks");
    other.batch_execute("COMMIT").unwrap();
    eventually("the reversion goes on", || {
        holds(&mut client, "SELECT relkind = 'r' FROM pg_class WHERE oid = 'ev'::regclass")
    });
}

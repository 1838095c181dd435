//! `spend_health` has a row for each fault, with who is in the way and what to type, and none when all is
//! well.

mod common;

use common::*;
use postgres::Client;
use std::time::{Duration, Instant};

type Fault = (String, String, Option<String>, String);

/// As a monitor sees them.
fn faults(client: &mut Client) -> Vec<Fault> {
    client.batch_execute("SET ROLE pg_monitor").unwrap();
    let rows = client.query("SELECT severity, problem, caused_by, remedy FROM spend_health", &[]).unwrap();
    client.batch_execute("RESET ROLE").unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1), row.get(2), row.get(3))).collect()
}

/// Waits until there is one fault, which the text begins or contains.
fn only(client: &mut Client, text: &str) -> Fault {
    let mut found = vec![];
    for _ in 0..3000 {
        found = faults(client);
        if found.len() == 1 && found[0].1.contains(text) {
            return found.remove(0);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    panic!("not only {text:?}: {found:?}");
}

/// A partition of another table, whose rows a retention of 30 days lets go.
const EXPIRED_LOGS: &str = "CREATE TABLE logs (id bigint, at timestamp NOT NULL) PARTITION BY RANGE (at);
     CREATE INDEX ON logs (at);
     CREATE TABLE logs_old PARTITION OF logs FOR VALUES FROM ('2026-01-01') TO ('2026-01-02')";

fn none(client: &mut Client) {
    eventually("all is well", || faults(client).is_empty());
}

#[test]
fn what_stops_a_built_in_rollup_is_named_while_the_captured_table_is_sound() {
    let db = shared().database().attached();
    let mut client = db.connect();
    make_unwritable(&mut client, "daily_spend_by_model_rollup");
    client.batch_execute(&insert_rows("a", 20, 1)).unwrap();
    let (severity, _, cause, _) = only(&mut client, "rollup daily_spend_by_model: ");
    assert_eq!(severity, "error");
    assert!(cause.is_none_or(|cause| cause.contains("Failing row")));
    make_writable(&mut client, "daily_spend_by_model_rollup");
    none(&mut client);
}

#[test]
fn a_rollups_table_that_a_crash_would_empty_is_named() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE ev (id bigserial, k int);
             SELECT spend_rollup_create('by_k', 'ev', '{k}', '{count(*) AS n}');
             ALTER TABLE litellm_spend.by_k_rollup SET UNLOGGED",
        )
        .unwrap();
    let (severity, _, _, remedy) =
        only(&mut client, "rollup by_k: its table is UNLOGGED: a crash would empty it");
    assert_eq!(
        (severity.as_str(), remedy.as_str()),
        ("error", "ALTER TABLE litellm_spend.by_k_rollup SET LOGGED;")
    );
    // Nothing is merged into it meanwhile.
    let watermark = |name: &str| format!("SELECT watermark FROM litellm_spend.rollup WHERE name = '{name}'");
    client.batch_execute("INSERT INTO ev (k) VALUES (1)").unwrap();
    let told = db.notices("SELECT spend_rollup_run('by_k')");
    assert!(told.contains(r#""litellm_spend"."by_k_rollup" is unlogged: a crash would empty it"#), "{told}");
    assert!(told.contains(r#"HINT:  ALTER TABLE "litellm_spend"."by_k_rollup" SET LOGGED;"#), "{told}");
    wait_for_a_round(&mut client);
    assert_eq!(value::<i64>(&mut client, &watermark("by_k")), 0);
    client.batch_execute(&remedy).unwrap();
    none(&mut client);
    eventually("it is merged", || value::<i64>(&mut client, &watermark("by_k")) > 0);
    // Nor by the merge of all built-in ones together.
    client.batch_execute("SELECT spend_attach()").unwrap();
    wait_until_live(&mut client);
    client.batch_execute("ALTER TABLE litellm_spend.daily_spend_rollup SET UNLOGGED").unwrap();
    client.batch_execute(&insert_rows("a", 20, 1)).unwrap();
    eventually("another is merged", || value::<i64>(&mut client, &watermark("daily_spend_by_key")) > 0);
    wait_for_a_round(&mut client);
    assert_eq!(value::<i64>(&mut client, &watermark("daily_spend")), 0);
    client.batch_execute("ALTER TABLE litellm_spend.daily_spend_rollup SET LOGGED").unwrap();
    wait_until_merged(&mut client);
    assert_verified(&mut client);
}

#[test]
fn a_sound_database_has_no_row_whatever_is_used() {
    let db = shared().database();
    let mut client = db.connect();
    assert_eq!(faults(&mut client), [], "nothing is used");
    client.batch_execute(&insert_rows("a", 200, 10)).unwrap();
    client
        .batch_execute(
            "SELECT spend_attach();
             CREATE TABLE ev (id bigserial PRIMARY KEY, kind int);
             SELECT spend_rollup_create('by_kind', 'ev', '{kind}', '{count(*) AS n}');
             SELECT spend_rollup_register('hand', 'ev');
             INSERT INTO ev (kind) VALUES (1), (2);
             CREATE TABLE logs (id bigint, at timestamp NOT NULL) PARTITION BY RANGE (at);
             CREATE INDEX ON logs (at);
             SELECT spend_partition_set('logs', retention => '30 days')",
        )
        .unwrap();
    wait_until_live(&mut client);
    none(&mut client);
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_converted(&mut client);
    none(&mut client);
}

#[test]
fn a_writer_that_stays_open_is_named_once() {
    let db = shared().database().attached();
    let (mut client, mut writer) = (db.connect(), db.connect());
    writer.batch_execute("SET application_name = 'forgotten'; BEGIN").unwrap();
    writer.batch_execute(&insert_rows("open", 1, 1)).unwrap();
    client.batch_execute(&insert_rows("a", 10, 1)).unwrap();
    eventually("somebody waits for the writer", || {
        holds(&mut client, "SELECT bool_and(blocked_by_pids IS NOT NULL) FROM spend_rollup_status")
    });
    none(&mut client);
    client
        .batch_execute(
            "UPDATE litellm_spend.change_log SET captured_at = clock_timestamp() - interval '5 minutes'",
        )
        .unwrap();
    let (severity, _, who, remedy) = only(&mut client, "are not merged: 10 rows");
    let pid = backend_pid(&mut writer);
    let who = who.unwrap();
    assert!(severity == "warning" && who.contains("forgotten") && who.contains(&pid.to_string()), "{who}");
    assert_eq!(remedy, format!("SELECT pg_terminate_backend({pid});"));
    client.execute(&remedy, &[]).unwrap();
    none(&mut client);
}

#[test]
fn what_stands_still_is_said() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE ev (id bigserial PRIMARY KEY, kind int);
             SELECT spend_rollup_register('hand', 'ev');
             INSERT INTO ev (kind) VALUES (1), (2);
             SELECT spend_rollup_window('hand')",
        )
        .unwrap();
    client.batch_execute(&insert_rows("a", 10, 1)).unwrap();
    wait_until_merged(&mut client);
    none(&mut client);
    // 1. nobody fills it any more.
    client
        .batch_execute(
            "INSERT INTO ev (kind) VALUES (3), (4), (5);
             UPDATE litellm_spend.rollup SET merged_at = merged_at - interval '2 hours' WHERE name = 'hand'",
        )
        .unwrap();
    let (_, problem, _, remedy) = only(&mut client, "rollup hand is filled by hand");
    assert!(
        problem.contains("3 numbers") && remedy.contains("spend_rollup_window('hand')"),
        "{problem}: {remedy}"
    );
    client.batch_execute("SELECT spend_rollup_drop('hand')").unwrap();
    none(&mut client);
    // 2. state is lost: one row, though nothing is merged either.
    client.batch_execute("DELETE FROM litellm_spend.rollup WHERE name = 'daily_spend'").unwrap();
    let (severity, _, _, remedy) = only(&mut client, "rollup daily_spend: its state is lost");
    assert!(severity == "error" && remedy.starts_with("SELECT * FROM spend_attach();"), "{remedy}");
    client.batch_execute(&remedy).unwrap();
    wait_until_live(&mut client);
    none(&mut client);
}

#[test]
fn who_calls_for_windows_is_not_told_that_nobody_does() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute("CREATE TABLE ev (id bigserial PRIMARY KEY, kind int)").unwrap();
    let register = "SELECT spend_rollup_register('hand', 'ev')";
    let two_hours_pass = "UPDATE litellm_spend.rollup SET merged_at = merged_at - interval '2 hours'";
    let insert = "INSERT INTO ev (kind) VALUES (1), (2)";
    // 1. nobody has called since it was registered.
    client.batch_execute(&format!("{register}; {insert}")).unwrap();
    none(&mut client);
    client.batch_execute(two_hours_pass).unwrap();
    assert!(only(&mut client, "rollup hand is filled by hand").1.contains("2 numbers"));
    // 2. somebody calls all the time, and for two hours there was nothing.
    client.batch_execute("SELECT spend_rollup_window('hand')").unwrap();
    client.batch_execute(&format!("{two_hours_pass}; SELECT spend_rollup_window('hand'); {insert}")).unwrap();
    none(&mut client);
    // 3. one of 0.1.0, of which nothing is known.
    client.batch_execute("UPDATE litellm_spend.rollup SET merged_at = NULL").unwrap();
    only(&mut client, "rollup hand is filled by hand");
}

#[test]
fn a_detach_is_no_fault_unless_somebody_reads_what_stands_still() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 10, 1)).unwrap();
    client.batch_execute("SELECT spend_detach()").unwrap();
    assert_eq!(faults(&mut client), [], "who did it knows it");
    let stands_still = "SELECT bool_and(last_error LIKE 'nothing is captured: %') FROM spend_rollup_status WHERE kind = 'built-in'";
    assert!(holds(&mut client, stands_still));
    // A role, or a view of somebody's.
    client.batch_execute("DROP ROLE IF EXISTS viewer_v; CREATE ROLE viewer_v").unwrap();
    for (reader, begin, end) in [
        (
            "viewer_v",
            "GRANT SELECT ON litellm_spend.daily_spend TO viewer_v",
            "REVOKE SELECT ON litellm_spend.daily_spend FROM viewer_v",
        ),
        (
            "view board",
            "CREATE VIEW board AS SELECT date, spend FROM litellm_spend.daily_spend",
            "DROP VIEW board",
        ),
    ] {
        client.batch_execute(begin).unwrap();
        let (severity, problem, who, remedy) = faults(&mut client).pop().unwrap();
        assert_eq!(severity, "warning");
        assert_eq!(problem, "detached: nothing is captured, and the report views stand still");
        assert_eq!(who, Some(format!("read by {reader}")));
        assert!(
            remedy.starts_with("SELECT * FROM spend_attach();") && remedy.contains("drop_history"),
            "{remedy}"
        );
        client.batch_execute(end).unwrap();
        assert_eq!(faults(&mut client), []);
    }
    client.batch_execute("DROP ROLE viewer_v").unwrap();
    // Whoever asked for the reports wants to read them.
    client.batch_execute("SELECT spend_attach(reports => true)").unwrap();
    wait_until_live(&mut client);
    client.batch_execute("SELECT spend_detach()").unwrap();
    let (severity, problem, who, _) = faults(&mut client).pop().unwrap();
    assert!(severity == "warning" && problem.contains("the report views stand still") && who.is_none());
    client.batch_execute("SELECT spend_detach(drop_history => true)").unwrap();
    none(&mut client);
}

#[test]
fn a_captured_table_that_was_dropped_is_named() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(r#"DROP TABLE "LiteLLM_SpendLogs" CASCADE"#).unwrap();
    let (severity, problem, _, _) = only(&mut client, "does not exist");
    let said = r#"capture of public."LiteLLM_SpendLogs": watch: relation "public"."LiteLLM_SpendLogs" does not exist"#;
    assert_eq!((severity.as_str(), problem.as_str()), ("error", said));
    client.batch_execute("SELECT spend_detach(drop_history => true)").unwrap();
    none(&mut client);
}

#[test]
fn retention_behind_a_dashboard_names_it() {
    let db = shared().database();
    let (mut client, mut dashboard) = (db.connect(), db.connect());
    client
        .batch_execute(&format!("{EXPIRED_LOGS}; INSERT INTO logs VALUES (1, '2026-01-01 12:00')"))
        .unwrap();
    dashboard.batch_execute("SET application_name = 'grafana'; BEGIN; SELECT count(*) FROM logs").unwrap();
    client.batch_execute("SELECT spend_partition_set('logs', retention => '30 days')").unwrap();
    // Not by the status view, which asks for sizes, and so would be in the way itself for a moment.
    eventually("maintenance gives up", || {
        holds(&mut client, "SELECT bool_and(maintained_at IS NOT NULL) FROM litellm_spend.policy")
    });
    let (severity, _, who, remedy) = only(&mut client, "1 expired partitions of logs are still there");
    assert!(severity == "error" && who.unwrap().contains("grafana"));
    // The status says so too, and who maintains by hand is told.
    let pid = backend_pid(&mut dashboard);
    let who = format!("process {pid} (postgres, grafana)");
    let blocked = format!(r#"could not get a lock on "public"."logs" within 1000 ms: it is held by {who}"#);
    // A look at the table's size is in the way for a moment, too.
    let noted =
        r#"logs_old: could not get a lock on "public"."logs" within 1000 ms: it is held by process %"#;
    assert!(holds(
        &mut client,
        &format!(
            "SELECT bool_and(blocked LIKE '{noted}' AND blocked LIKE '%{who}%' AND blocked_since < now() AND retry_at > maintained
                             AND retry_at <= maintained + interval '30 s')
             FROM (SELECT *, last_maintained_at AS maintained FROM spend_partition_status) AS s"
        )
    ));
    client.batch_execute("SET litellm_spend.lock_timeout = '1s'").unwrap();
    let told = format!("{blocked}; the worker, where one runs, tries again in 30 s");
    let skipped = format!(
        "SELECT count(*) = 1 FROM spend_partition_maintain('logs') WHERE action = 'skipped' AND detail = '{told}'"
    );
    eventually("no other maintainer is at it", || holds(&mut client, &skipped));
    dashboard.batch_execute("COMMIT").unwrap();
    client.batch_execute(&remedy).unwrap();
    // The worker comes half a minute later.
    client.batch_execute("SELECT * FROM spend_partition_maintain('logs')").unwrap();
    none(&mut client);
    // Also where nothing has expired, and only if it lasts. What is noted here stays: no round of maintenance
    // is due, and none that had begun still runs.
    wait_for_a_round(&mut client);
    let held_up = |since: &str| {
        format!(
            "UPDATE litellm_spend.policy SET blocked = 'logs: held by process 1', blocked_since = now() - interval '{since}'"
        )
    };
    client.batch_execute(&held_up("50 minutes")).unwrap();
    none(&mut client);
    client.batch_execute(&held_up("2 hours")).unwrap();
    let (severity, _, who, remedy) = only(&mut client, "maintenance of logs is held up");
    assert!(severity == "warning" && who.as_deref() == Some("logs: held by process 1"));
    // Whom to end is asked of the locks as they are now: a name of somebody's is no process.
    assert_eq!(remedy, "SELECT * FROM spend_partition_maintain('public.logs');");
    dashboard = db.connect();
    dashboard.batch_execute("BEGIN; SELECT count(*) FROM logs").unwrap();
    let pid = backend_pid(&mut dashboard);
    eventually("it is in the way for more than a moment", || {
        only(&mut client, "maintenance of logs is held up").3
            == format!("SELECT pg_terminate_backend({pid});")
    });
}

#[test]
fn who_has_no_user_or_query_is_named_without() {
    let db = shared().database();
    let mut client = db.connect();
    let named = |client: &mut Client, which: &str| -> (i32, String) {
        let row = client.query_one(&format!("SELECT pid, who FROM litellm_spend.party WHERE {which}"), &[]);
        row.map(|row| (row.get(0), row.get(1))).unwrap()
    };
    let (pid, who) = named(&mut client, "kind = 'checkpointer'");
    assert_eq!(who, format!("process {pid} (checkpointer)"));
    client.batch_execute("SET application_name = 'a report'").unwrap();
    let (pid, who) = named(&mut client, "pid = pg_backend_pid()");
    assert!(who.starts_with(&format!("process {pid} (postgres, a report), query of 20")), "{who}");
}

#[test]
fn an_index_that_waits_for_a_snapshot_names_who_has_it() {
    let db = shared().database().attached();
    let (mut client, mut dump) = (db.connect(), db.connect());
    client.batch_execute(&insert_rows("a", 100, 5)).unwrap();
    wait_until_merged(&mut client);
    dump.batch_execute("SET application_name = 'a dump'; BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class LIMIT 1")
        .unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    // It has to wait for a while before anybody needs to do something.
    let mut found = vec![];
    eventually("the builder waits", || {
        found = faults(&mut client);
        !found.is_empty()
    });
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].1.starts_with("the index of a conversion waits"), "{found:?}");
    assert!(found[0].2.as_ref().unwrap().contains("a dump"), "{found:?}");
    // Its drop likewise, when the conversion is taken back: of the reader, when the dump has ended.
    let mut reader = db.connect();
    reader
        .batch_execute(
            r#"SET application_name = 'a reader'; BEGIN; SELECT count(*) FROM "LiteLLM_SpendLogs""#,
        )
        .unwrap();
    client.batch_execute("SELECT spend_partition_revert()").unwrap();
    dump.batch_execute("COMMIT").unwrap();
    eventually("the index is being dropped", || {
        found = faults(&mut client);
        found.len() == 1 && found[0].2.as_ref().is_some_and(|who| who.contains("a reader"))
    });
    assert!(found[0].1.starts_with("the index of a conversion waits"), "{found:?}");
    assert!(
        holds(&mut client, "SELECT last_error IS NULL FROM litellm_spend.conversion"),
        "it was cancelled for us"
    );
    reader.batch_execute("COMMIT").unwrap();
    none(&mut client);
}

#[test]
fn an_index_that_waits_for_a_prepared_transaction_names_it() {
    let db = shared().database().attached();
    let (mut client, mut writer) = (db.connect(), db.connect());
    client.batch_execute(&insert_rows("a", 100, 5)).unwrap();
    wait_until_merged(&mut client);
    writer
        .batch_execute(
            r#"BEGIN; LOCK TABLE "LiteLLM_SpendLogs" IN ROW EXCLUSIVE MODE; PREPARE TRANSACTION 'it''s forgotten'"#,
        )
        .unwrap();
    let since: String = value(
        &mut client,
        "SELECT to_char(prepared, 'YYYY-MM-DD HH24:MI:SS') FROM pg_prepared_xacts WHERE gid = 'it''s forgotten'",
    );
    let who = format!("prepared transaction 'it''s forgotten' of postgres since {since}");
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    let progress = "SELECT waits_for FROM spend_progress WHERE operation = 'conversion'";
    eventually("its progress names it", || {
        value::<Option<String>>(&mut client, progress).as_ref() == Some(&who)
    });
    let (severity, _, caused_by, remedy) = only(&mut client, "the index of a conversion waits");
    assert_eq!((severity.as_str(), caused_by.as_ref()), ("warning", Some(&who)));
    let ends = "ROLLBACK PREPARED 'it''s forgotten';";
    assert!(remedy.starts_with(ends) && remedy.contains("COMMIT PREPARED"), "{remedy}");
    client.batch_execute(&remedy).unwrap();
    wait_until_converted(&mut client);
    none(&mut client);
    // Maintenance, which its lock keeps from dropping what has expired.
    client.batch_execute(EXPIRED_LOGS).unwrap();
    writer
        .batch_execute("BEGIN; LOCK TABLE logs IN ACCESS SHARE MODE; PREPARE TRANSACTION 'reader'")
        .unwrap();
    client.batch_execute("SELECT spend_partition_set('logs', retention => '30 days')").unwrap();
    let named = "SELECT bool_and(blocked LIKE '%: it is held by prepared transaction ''reader''')
                 FROM litellm_spend.policy WHERE relation = 'logs'::regclass";
    eventually("its lock is named", || holds(&mut client, named));
    let (_, _, caused_by, remedy) = only(&mut client, "1 expired partitions of logs are still there");
    assert!(caused_by.unwrap().starts_with("prepared transaction 'reader' of postgres since "));
    client.batch_execute(&remedy).unwrap();
    client.batch_execute("SELECT * FROM spend_partition_maintain('logs')").unwrap();
    none(&mut client);
    // What waits for a lock of ours is a warning, too, with what ends that.
    writer
        .batch_execute(
            "BEGIN; LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE; PREPARE TRANSACTION 'attaching'",
        )
        .unwrap();
    client
        .batch_execute(
            "UPDATE litellm_spend.policy SET last_error_at = clock_timestamp() - interval '1 minute', last_error =
                 E'another transaction is attaching or detaching'
                 '\nDETAIL:  One at a time changes triggers and views. It is held by prepared transaction ''attaching''.'
                 '\nHINT:  Try again when that has ended.'
             WHERE relation = 'logs'::regclass",
        )
        .unwrap();
    let (severity, _, _, remedy) = only(&mut client, "another transaction is attaching or detaching");
    assert!(severity == "warning" && remedy.starts_with("ROLLBACK PREPARED 'attaching';"), "{remedy}");
    client.batch_execute(&remedy).unwrap();
    client.batch_execute("UPDATE litellm_spend.policy SET last_error = NULL").unwrap();
    none(&mut client);
}

#[test]
fn a_column_that_was_renamed_is_one_fault_which_says_so() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 10, 3)).unwrap();
    wait_until_merged(&mut client);
    let rename =
        |from: &str, to: &str| format!(r#"ALTER TABLE "LiteLLM_SpendLogs" RENAME COLUMN {from} TO {to}"#);
    client.batch_execute(&rename("spend", "cost")).unwrap();
    client.batch_execute(&insert_rows("b", 10, 3).replace("api_key, spend", "api_key, cost")).unwrap();
    // What follows from it: that day cannot be recomputed.
    let failed = format!("litellm_spend in database \"{}\": repair failed", db.name);
    eventually("the repair has failed thrice", || db.cluster.log().matches(&failed).count() > 2);
    client
        .batch_execute(
            "UPDATE litellm_spend.dirty_range SET noticed_at = clock_timestamp() - interval '10 minutes'",
        )
        .unwrap();
    let found = faults(&mut client);
    assert_eq!(found.len(), 1, "{found:#?}");
    let (severity, problem, caused_by, remedy) = &found[0];
    let cause =
        r#"capture of "LiteLLM_SpendLogs": watch: relation "LiteLLM_SpendLogs" has no column "spend""#;
    assert_eq!((severity.as_str(), problem.as_str()), ("error", cause));
    assert_eq!(caused_by.as_deref(), Some("litellm_spend expects the columns of LiteLLM's spend log."));
    assert_eq!(remedy, "Check that this is LiteLLM's table and that its migrations have run.");
    client.batch_execute(&rename("cost", "spend")).unwrap();
    none(&mut client);
    wait_until_merged(&mut client);
    assert_exact(&mut client);
}

const WORKERS: &str = "SELECT count(*) FROM spend_worker_status WHERE database = current_database()";

#[test]
fn a_worker_that_was_ended_is_not_missed_while_it_comes_back() {
    // Of its own: other tests' new databases are looked into first when a worker is to come back.
    let db = own_cluster(&[]).database().attached();
    let mut client = db.connect();
    none(&mut client);
    eventually("the server is no longer starting", || {
        holds(&mut client, "SELECT pg_postmaster_start_time() < clock_timestamp() - interval '10 seconds'")
    });
    let workers = "SELECT array_agg(pid) FROM spend_worker_status WHERE database = current_database()";
    // The launcher's end is that of all workers.
    for kind in ["litellm_spend worker", "litellm_spend launcher"] {
        let before: Vec<i32> = value(&mut client, workers);
        let sql = format!(
            "SELECT bool_and(pg_terminate_backend(pid)) FROM spend_worker_status
             WHERE kind = '{kind}' AND coalesce(database, current_database()) = current_database()"
        );
        let ended = Instant::now();
        assert!(holds(&mut client, &sql));
        eventually("another is there, and was not missed", || {
            let found = faults(&mut client);
            // One that is away for longer, on a busy machine, is missed rightly.
            assert!(found.is_empty() || ended.elapsed() > Duration::from_secs(10), "{found:?}");
            let now: Option<Vec<i32>> = value(&mut client, workers);
            now.is_some_and(|now| now.len() == 1 && now != before)
        });
    }
}

#[test]
fn a_worker_that_does_not_come_back_is_missed() {
    // One for the launcher, one for PostgreSQL's own, and one for a worker.
    let cluster: &'static Cluster = Box::leak(Box::new(Cluster::start(&["max_worker_processes = 3"])));
    let db = cluster.database().attached();
    let mut client = db.connect();
    none(&mut client);
    let began: std::time::SystemTime = value(&mut client, "SELECT clock_timestamp()");
    // Another database gets its slot, at the latest when this one's worker is ended again.
    let other = cluster.database();
    let mut there = other.connect();
    let end = "SELECT pg_terminate_backend(pid) FROM spend_worker_status WHERE database = current_database()";
    eventually("the other is served", || {
        client.batch_execute(end).unwrap();
        value::<i64>(&mut there, WORKERS) == 1
    });
    let served: std::time::SystemTime = value(&mut client, "SELECT clock_timestamp()");
    let (severity, _, _, remedy) = only(&mut client, "no worker serves this database");
    assert!(severity == "error" && remedy.contains("max_worker_processes"), "{remedy}");
    let since = "SELECT since BETWEEN $1 AND $2 AND since < now() - interval '10 s' FROM spend_health";
    assert!(client.query_one(since, &[&began, &served]).unwrap().get::<_, bool>(0));
}

#[test]
fn whoever_keeps_a_rollup_to_himself_is_named() {
    let db = shared().database().attached();
    let (mut client, mut dba) = (db.connect(), db.connect());
    client.batch_execute(&insert_rows("a", 100, 5)).unwrap();
    wait_until_merged(&mut client);
    dba.batch_execute("SET application_name = 'a rebuild'; BEGIN; SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 1, CURRENT_DATE)")
        .unwrap();
    client.batch_execute(&insert_rows("b", 10, 1)).unwrap();
    client
        .batch_execute(
            "UPDATE litellm_spend.change_log SET captured_at = clock_timestamp() - interval '5 minutes'",
        )
        .unwrap();
    // He has to be at it for a while before he is said to be in the way.
    eventually("he is named", || {
        faults(&mut client).iter().any(|(_, problem, who, _)| {
            problem.contains("are not merged") && who.as_ref().is_some_and(|who| who.contains("a rebuild"))
        })
    });
    let (_, _, _, remedy) = only(&mut client, "are not merged");
    let pid = backend_pid(&mut dba);
    assert_eq!(remedy, format!("SELECT pg_terminate_backend({pid});"));
    dba.batch_execute("COMMIT").unwrap();
    none(&mut client);
}

#[test]
fn defaults_of_a_database_neither_stop_us_nor_alarm() {
    let db = shared().database().attached();
    let mut client = db.connect();
    for setting in ["default_transaction_read_only = on", "statement_timeout = '1ms'", "row_security = off"] {
        client.batch_execute(&format!("ALTER DATABASE {} SET {setting}", db.name)).unwrap();
    }
    let sql = "SELECT pg_terminate_backend(pid) FROM spend_worker_status WHERE database = current_database()";
    assert!(holds(&mut client, sql));
    client.batch_execute(&insert_rows("a", 10, 1)).unwrap();
    eventually("a new worker merges", || {
        holds(
            &mut client,
            "SELECT bool_and(tail_rows = 0) AND count(*) > 0 AND EXISTS (
                 SELECT FROM spend_worker_status WHERE kind = 'litellm_spend worker' AND database = current_database())
             FROM spend_rollup_status",
        )
    });
    none(&mut client);
}

#[test]
fn too_few_slots_are_one_fault() {
    let cluster = own_cluster(&["max_worker_processes = 1"]);
    let db = cluster.database();
    let mut client = db.connect();
    assert_eq!(faults(&mut client), [], "nothing is used");
    client.batch_execute(&insert_rows("a", 10, 1)).unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    let (severity, _, _, remedy) = only(&mut client, "no worker serves this database");
    assert!(severity == "error" && remedy.contains("max_worker_processes"), "{remedy}");
}

#[test]
fn a_restore_under_way_is_one_warning_that_proposes_nothing_rash() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 100, 5)).unwrap();
    wait_until_merged(&mut client);
    none(&mut client);
    // As pg_restore has it before it loads rows: tables, and neither state nor what it makes last.
    client
        .batch_execute(
            "BEGIN; DROP EVENT TRIGGER litellm_spend_restored; DELETE FROM litellm_spend.rollup; DELETE FROM litellm_spend.capture;
             DELETE FROM litellm_spend.source",
        )
        .unwrap();
    let found = faults(&mut client);
    assert!(found.len() == 1 && found[0].1.contains("came out of a dump"), "no state is lost: {found:?}");
    client.batch_execute("ROLLBACK; BEGIN").unwrap();
    // Then state of another installation, while a table is being filled.
    client
        .batch_execute(
            "DROP EVENT TRIGGER litellm_spend_restored; UPDATE litellm_spend.source SET origin = gen_random_uuid()",
        )
        .unwrap();
    let found = faults(&mut client);
    assert_eq!(found.len(), 1, "{found:?}");
    let (severity, problem, _, remedy) = &found[0];
    assert!(severity == "warning" && problem.contains("came out of a dump"), "{found:?}");
    assert_eq!(remedy, "when the restore has ended, not before: SELECT spend_restored();");
    client.batch_execute("ROLLBACK").unwrap();
    none(&mut client);
}

#[test]
fn a_retention_that_is_new_is_no_fault_and_a_swap_that_waits_is_one_after_a_while() {
    let db = shared().database();
    let (mut client, mut reader) = (db.connect(), db.connect());
    client
        .batch_execute(&format!(
            "{EXPIRED_LOGS}; BEGIN; SELECT spend_partition_set('logs', retention => '30 days')"
        ))
        .unwrap();
    assert_eq!(faults(&mut client), [], "nobody has tried yet");
    client.batch_execute("COMMIT").unwrap();
    client.batch_execute(&insert_rows("a", 10, 1)).unwrap();
    reader
        .batch_execute(
            r#"SET application_name = 'a reader'; BEGIN; SELECT count(*) FROM "LiteLLM_SpendLogs""#,
        )
        .unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    let waits = "SELECT coalesce(bool_or(last_error LIKE 'could not get a lock%'), false) FROM litellm_spend.conversion";
    eventually("the swap waits", || holds(&mut client, waits));
    let since = "SELECT coalesce(min(last_error_at) > clock_timestamp() - interval '15 seconds', true) FROM litellm_spend.conversion";
    // Another text of the error, which may come meanwhile, begins the time anew.
    let (before, found, after) = (holds(&mut client, since), faults(&mut client), holds(&mut client, since));
    assert!(!(before && after) || found.is_empty(), "{found:?}");
    let (severity, _, who, remedy) = only(&mut client, "could not get a lock on");
    let pid = backend_pid(&mut reader);
    assert!(severity == "warning" && who.unwrap().contains("a reader"));
    assert_eq!(remedy, format!("SELECT pg_terminate_backend({pid});"));
    client.batch_execute(&remedy).unwrap();
    none(&mut client);
}

#[test]
fn a_day_that_cannot_be_put_right_is_named_until_somebody_says_what_it_shall_be() {
    let db = shared().database().attached();
    let (mut client, mut monitor) = (db.connect(), db.connect());
    // Who reads a remedy and who types it may write days in another way.
    monitor.batch_execute("SET DateStyle = 'SQL, DMY'").unwrap();
    let row = |id: &str| {
        format!(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, "startTime", "endTime", spend)
               VALUES ('{id}', 'c', '2026-11-02', '2026-11-02', 1);"#
        )
    };
    client.batch_execute(&row("counted")).unwrap();
    wait_until_merged(&mut client);
    // Two ways out: the totals stay as they are, or they become what is in the table.
    for (way_out, counted) in [(0, 1i64), (1, 0)] {
        make_unwritable(&mut client, "change_log");
        client
            .batch_execute(&format!(r#"BEGIN; {} TRUNCATE "LiteLLM_SpendLogs"; COMMIT"#, row("not captured")))
            .unwrap();
        make_writable(&mut client, "change_log");
        let (severity, problem, cause, remedy) = only(&mut monitor, "do not count all");
        assert_eq!(severity, "error");
        assert!(problem.contains("totals of 2026-11-02 "), "{problem}");
        assert!(cause.as_ref().unwrap().starts_with("INSERT: new row for relation"), "{cause:?}");
        let ways: Vec<&str> = remedy
            .split("  -- as a superuser: keeps the totals as they are; or with all rows back in the table: ")
            .collect();
        client.batch_execute(ways[way_out]).unwrap();
        none(&mut client);
        let requests = "SELECT coalesce(sum(requests), 0)::bigint FROM litellm_spend.daily_spend";
        assert_eq!(value::<i64>(&mut client, requests), counted);
        let left =
            "SELECT bool_and(unrepairable_ranges = 0) FROM spend_rollup_status WHERE kind = 'built-in'";
        assert!(holds(&mut client, left));
    }
}

#[test]
fn a_rollup_that_is_dropped_while_a_status_is_read_does_not_fail_it() {
    let db = shared().database();
    let (mut client, mut reader) = (db.connect(), db.connect());
    client.batch_execute("CREATE TABLE ev (id bigserial, k int)").unwrap();
    for view in ["spend_rollup_status", "spend_health"] {
        client.batch_execute("SELECT spend_rollup_create('by_k', 'ev', '{k}', '{count(*) AS n}')").unwrap();
        // A transaction with an XID reads our state on a snapshot of now, a cursor's is older.
        let begin = format!("BEGIN; CREATE TEMP TABLE t (); DECLARE status CURSOR FOR SELECT * FROM {view}");
        reader.batch_execute(&begin).unwrap();
        client.batch_execute("SELECT spend_rollup_drop('by_k')").unwrap();
        let found = reader.query("FETCH ALL FROM status", &[]).unwrap_or_else(|e| panic!("{view}: {e:?}"));
        assert_eq!(found.len(), usize::from(view == "spend_rollup_status"), "{view}");
        reader.batch_execute("ROLLBACK").unwrap();
    }
}

/// What owners, readers and old tables can put where the status looks.
#[test]
fn no_value_of_anybodys_breaks_it() {
    let db = shared().database().attached();
    let (mut client, mut holder) = (db.connect(), db.connect());
    holder.batch_execute("BEGIN; SELECT 1").unwrap();
    let reversed =
        "SET ROLE litellm; INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation)
                    VALUES ('2026-01-02', '2026-01-01', 'rebuild', 'X')";
    assert_eq!(error(&mut client, reversed).code().code(), "23514");
    client
        .batch_execute("RESET ROLE; CREATE TABLE by_date (d date NOT NULL) PARTITION BY RANGE (d)")
        .unwrap();
    let range = |start: &str, end: &str| {
        format!(
            "INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation, message, unrepairable)
             VALUES ('{start}', '{end}', 'rebuild', 'X', 'm', true)"
        )
    };
    let far = "CREATE TABLE far PARTITION OF by_date FOR VALUES FROM ('5000000-01-01') TO ('5800000-01-01')";
    assert_unbroken(&mut client, &range("294276-12-31", "294276-12-31 12:00"));
    assert_unbroken(&mut client, &range("4714-11-24 00:00 BC", "4714-11-24 12:00 BC"));
    assert_unbroken(&mut client, &range("-infinity", "294276-12-31 12:00"));
    // As pg_restore_relation_stats() lets the owner of a table.
    let estimate =
        r#"UPDATE pg_class SET reltuples = 3e38 WHERE relname IN ('by_date', 'far', 'LiteLLM_SpendLogs')"#;
    let policy = "SELECT spend_partition_set('by_date', time_column => 'd')";
    assert_unbroken(&mut client, &format!("{policy}; {far}; {estimate}"));
    let indexes = "SELECT spend_index_set(indexes => '{team}'); UPDATE litellm_spend.index_set SET relation = 'by_date'::regclass";
    assert_unbroken(&mut client, &format!("{far}; {indexes}"));
    // The name of an application is in what is noted, of one that was there before. For a while such a fault
    // is none yet.
    eventually("it has been there for a while", || {
        holds(
            &mut client,
            "SELECT bool_or(xact_start < clock_timestamp() - interval '22 seconds') FROM pg_stat_activity
             WHERE datname = current_database() AND state = 'idle in transaction'",
        )
    });
    for holders in ["1 (u, It is held by process 99999999999 (x", "99999999999 (u"] {
        let noted = format!(
            "could not get a lock on t within 1 ms\\nDETAIL:  It is held by process {holders}).\\nHINT:  h"
        );
        assert_unbroken(
            &mut client,
            &format!(
                "UPDATE litellm_spend.rollup SET last_error = E'{noted}',
                     last_error_at = clock_timestamp() - interval '21 seconds'"
            ),
        );
    }
}

/// No status fails when that has been done.
fn assert_unbroken(client: &mut Client, planted: &str) {
    client.batch_execute(&format!("BEGIN; {planted}")).unwrap();
    for view in ["spend_health", "spend_rollup_status", "spend_partition_status", "spend_index_status"] {
        client.query(&format!("SELECT * FROM {view}"), &[]).unwrap_or_else(|e| panic!("{planted}: {e:?}"));
    }
    client.batch_execute("ROLLBACK").unwrap();
}

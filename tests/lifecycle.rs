//! Attach, detach, replacement of the table, workers: what a DBA does to a database with rollups.

mod common;

use common::*;
use postgres::Client;
use std::process::Command;
use std::time::{Duration, Instant};

/// Everything about the view that must survive.
fn view_identity(client: &mut Client) -> String {
    value(
        client,
        r#"SELECT concat_ws('|', c.oid, r.rolname, c.relacl, c.reloptions,
               (SELECT string_agg(attname || ' ' || format_type(atttypid, atttypmod), ',' ORDER BY attnum)
                FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0))
           FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner WHERE c.oid = '"MonthlyGlobalSpend"'::regclass"#,
    )
}

fn definition(client: &mut Client) -> String {
    value(client, r#"SELECT pg_get_viewdef('"MonthlyGlobalSpend"'::regclass)"#)
}

/// A login role that owns LiteLLM's objects, as in a real install.
fn give_to_role(client: &mut Client, role: &str) {
    client
        .batch_execute(&format!(
            r#"DROP ROLE IF EXISTS {role}; CREATE ROLE {role} LOGIN;
               GRANT USAGE, CREATE ON SCHEMA public TO {role};
               DO $$ DECLARE r record; BEGIN
                   FOR r IN SELECT oid::regclass AS name, relkind FROM pg_class
                            WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v') AND relowner = 'litellm'::regrole
                              AND relname !~ '^spend_' LOOP
                       EXECUTE format('ALTER TABLE %s OWNER TO {role}', r.name);
                   END LOOP; END $$"#
        ))
        .unwrap();
}

fn drop_role(client: &mut Client, role: &str) {
    client
        .batch_execute(&format!(
            "REASSIGN OWNED BY {role} TO postgres; DROP OWNED BY {role}; DROP ROLE {role}"
        ))
        .unwrap();
}

#[test]
fn the_view_keeps_oid_owner_grants_dependents_and_detach_gives_litellms_back() {
    let db = shared().database();
    let mut client = db.connect();
    give_to_role(&mut client, "litellm_a");
    client
        .batch_execute(
            r#"CREATE ROLE dashboard_a LOGIN; GRANT SELECT ON "MonthlyGlobalSpend" TO dashboard_a;
               CREATE VIEW dependent AS SELECT max(date) AS newest FROM "MonthlyGlobalSpend""#,
        )
        .unwrap();
    client.batch_execute(&insert_rows("a", 100, 5)).unwrap();
    let (identity, original) = (view_identity(&mut client), definition(&mut client));
    attach(&mut client);
    assert_eq!(view_identity(&mut client), identity);
    assert_ne!(definition(&mut client), original);
    assert_exact(&mut client);
    // LiteLLM's role writes and reads with no right of ours; the dashboard reads the view only.
    let mut litellm = db.cluster.connect_as(&db.name, "litellm_a");
    litellm.batch_execute(&insert_rows("b", 10, 5)).unwrap();
    litellm.batch_execute(r#"SELECT * FROM "MonthlyGlobalSpend""#).unwrap();
    // It may read what is kept of its table, and add to it as its rows do, but not change it.
    litellm
        .batch_execute("SELECT * FROM litellm_spend.retired; SELECT * FROM litellm_spend.change_log")
        .unwrap();
    for attempt in [
        "INSERT INTO litellm_spend.change_log (seq) VALUES (1)",
        "UPDATE litellm_spend.change_log SET spend = 0",
        "UPDATE litellm_spend.daily_spend_rollup SET spend = 0",
        "DELETE FROM litellm_spend.daily_spend_rollup",
        "TRUNCATE litellm_spend.retired",
        "DROP TABLE litellm_spend.change_log",
        "SELECT setval('litellm_spend.change_log_seq', 1)",
        "UPDATE litellm_spend.rollup SET watermark = 0",
        "DELETE FROM litellm_spend.dirty_range",
    ] {
        assert_eq!(error(&mut litellm, attempt).code().code(), "42501", "{attempt}");
    }
    let mut dashboard = db.cluster.connect_as(&db.name, "dashboard_a");
    dashboard.batch_execute(r#"SELECT * FROM "MonthlyGlobalSpend""#).unwrap();
    assert_eq!(error(&mut dashboard, "SELECT * FROM monthly_global_spend()").code().code(), "42501");
    assert_eq!(error(&mut dashboard, "SELECT * FROM litellm_spend.daily_spend").code().code(), "42501");
    drop((litellm, dashboard));

    // An autovacuum worker may be at one of its tables.
    eventually("it is detached", || client.batch_execute("SELECT spend_detach()").is_ok());
    assert_eq!(definition(&mut client), original);
    assert_eq!(view_identity(&mut client), identity);
    assert_eq!(
        value::<i64>(&mut client, "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'litellm_spend%'"),
        0
    );
    // It then waits for what the attach has granted on that, and the detach for it.
    let rest = "SELECT * FROM dependent; SELECT spend_attach(); SELECT spend_detach(drop_history => true); DROP EXTENSION litellm_spend";
    eventually("all is dropped", || client.batch_execute(rest).is_ok());
    let left: i64 = value(&mut client, "SELECT count(*) FROM pg_namespace WHERE nspname = 'litellm_spend'");
    assert_eq!(left, 0);
    drop_role(&mut client, "litellm_a");
    drop_role(&mut client, "dashboard_a");
}

#[test]
fn attach_and_detach_can_be_repeated() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 100, 5)).unwrap();
    for round in 0..3 {
        client.batch_execute("SELECT spend_attach(); SELECT spend_attach()").unwrap();
        wait_until_live(&mut client);
        client.batch_execute(&insert_rows(&format!("r{round}-"), 50, 5)).unwrap();
        assert_exact(&mut client);
        client.batch_execute("SELECT spend_detach()").unwrap();
        // Nobody captures these; attaching again finds them.
        client.batch_execute(&insert_rows(&format!("gap{round}-"), 50, 5)).unwrap();
    }
    attach(&mut client);
    assert_exact(&mut client);
}

#[test]
fn monthly_spend_keeps_what_has_expired_while_all_is_computed_again() {
    let db = shared().database().with_rows("a", 200, 20).attached();
    let mut client = db.connect();
    let totals = r#"SELECT (SELECT sum(spend) FROM monthly_global_spend()), (SELECT sum(spend) FROM "MonthlyGlobalSpend")"#;
    let read = |client: &mut Client| {
        let row = client.query_one(totals, &[]).unwrap();
        (row.get::<_, f64>(0), row.get::<_, f64>(1))
    };
    let (function, view) = read(&mut client);
    assert!((function - view).abs() < 1e-9);
    client.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE "startTime" < CURRENT_DATE - 10"#).unwrap();
    // As where a column that capture knows of has been added. The worker does not get to it.
    client.batch_execute("BEGIN; UPDATE litellm_spend.rollup SET covered_from = 'infinity'").unwrap();
    let (again, shown) = read(&mut client);
    client.batch_execute("COMMIT").unwrap();
    assert!((again - function).abs() < 1e-9 && (shown - view).abs() < 1e-9, "{again} of {function}");
}

#[test]
fn a_view_whose_readers_would_need_rights_on_the_rollups_is_left_alone() {
    let db = shared().database();
    let mut client = db.connect();
    if !knows_merge(&mut client) {
        return;
    }
    for written in ["security_invoker = on", "security_invoker", "security_invoker = 1"] {
        client.batch_execute(&format!(r#"ALTER VIEW "MonthlyGlobalSpend" SET ({written})"#)).unwrap();
        let sql = r#"SELECT action FROM spend_attach() WHERE object LIKE '%"MonthlyGlobalSpend"'"#;
        let said: String = value(&mut client, sql);
        assert_eq!(said, "left alone: with security_invoker its readers would need rights on the rollups");
    }
}

#[test]
fn a_worker_does_not_go_on_with_the_backfill_of_what_was_detached() {
    let db = shared().database().with_rows("a", 100, 60);
    let mut client = db.connect();
    client.batch_execute("SELECT spend_attach(); SELECT spend_detach()").unwrap();
    assert!(holds(&mut client, "SELECT bool_or(covered_from > '-infinity') FROM litellm_spend.rollup"));
    // Each of these takes a look of the worker's, at which it would try.
    client
        .batch_execute(
            "CREATE TABLE t (id bigserial, x int); SELECT spend_rollup_create('by_x', 't', '{x}', '{count(*) AS n}')",
        )
        .unwrap();
    for _ in 0..5 {
        client.batch_execute("INSERT INTO t (x) VALUES (1)").unwrap();
        eventually("it is merged", || {
            holds(&mut client, "SELECT tail_rows = 0 FROM spend_rollup_status WHERE rollup = 'by_x'")
        });
    }
    let name: String = value(&mut client, "SELECT current_database()");
    let log = shared().log();
    let failed = log.lines().find(|line| line.contains(&format!("\"{name}\": backfill failed")));
    assert_eq!(failed, None);
}

#[test]
fn detach_says_what_goes_on_and_may_be_called_again() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    client
        .batch_execute(
            "SELECT spend_attach(); SELECT spend_partition_set(retention => '20 days');
             SELECT spend_index_set(indexes => '{team}'); SELECT spend_grant_admin('litellm'); SET ROLE litellm",
        )
        .unwrap();
    // The worker makes no partition at the same time.
    let made = "SELECT partitions_ahead FROM spend_partition_status LIMIT 1";
    eventually("partitions are made", || value::<Option<i64>>(&mut client, made) >= Some(7));
    let detach = "SELECT object, action FROM spend_detach(drop_history => true)";
    let rows = client.query(detach, &[]).unwrap();
    let said: Vec<(String, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let of = |object: &str| {
        let found = said.iter().find(|(said, _)| said == object);
        found.unwrap_or_else(|| panic!("{object}: {said:?}")).1.as_str()
    };
    assert_eq!(
        of(r#"policy of "public"."LiteLLM_SpendLogs""#),
        r#"goes on: rows older than 20 days are removed; SELECT spend_partition_set('"public"."LiteLLM_SpendLogs"', retention => '0') ends that"#
    );
    assert_eq!(of("indexes team"), "stay: SELECT spend_index_drop() drops them");
    for _ in 0..2 {
        let row = client.query_one(detach, &[]).unwrap();
        assert_eq!((row.get(0), row.get(1)), ("any table", "is not captured"));
    }
    // What it says does end that.
    client
        .batch_execute(
            r#"SELECT spend_partition_set('"public"."LiteLLM_SpendLogs"', retention => '0'); SELECT spend_index_drop(); RESET ROLE"#,
        )
        .unwrap();
    assert!(holds(&mut client, "SELECT bool_and(retention IS NULL) FROM spend_partition_status"));
}

#[test]
fn history_that_is_taken_up_while_somebody_waits_to_drop_it_stays() {
    let (db, mut client) = without_worker();
    client.batch_execute(&insert_rows("a", 20, 3)).unwrap();
    for sql in ["SELECT spend_attach()", "CALL spend_backfill()", "SELECT spend_detach()"] {
        client.batch_execute(sql).unwrap();
    }
    let mut dropper = db.connect();
    client.batch_execute("BEGIN; SELECT spend_attach()").unwrap();
    let dropped = std::thread::scope(|scope| {
        let running = scope.spawn(|| dropper.batch_execute("SELECT spend_detach(drop_history => true)"));
        // An attachment is tried again and again, which is no wait that the server knows of.
        std::thread::sleep(Duration::from_millis(300));
        assert!(!running.is_finished(), "it has not waited: {:?}", running.join());
        client.batch_execute("COMMIT").unwrap();
        running.join().unwrap().unwrap_err()
    });
    assert_eq!(dropped.code().unwrap().code(), "55006", "{dropped:?}");
    client.batch_execute(&insert_rows("b", 20, 3)).unwrap();
    client.batch_execute("CALL spend_backfill()").unwrap();
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    assert_eq!(value::<i64>(&mut client, REQUESTS), 40);
    assert_exact(&mut client);
}

#[test]
fn history_outlives_detach_and_attach() {
    let db = shared().database().with_rows("a", 500, 20).attached();
    let mut client = db.connect();
    let total = r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#;
    let before: f64 = value(&mut client, total);
    client.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE "startTime" < CURRENT_DATE - 10"#).unwrap();
    client.batch_execute("SELECT spend_detach(); SELECT spend_attach()").unwrap();
    wait_until_live(&mut client);
    assert!((before - value::<f64>(&mut client, total)).abs() < 1e-9);
}

#[test]
fn attach_while_writers_run_misses_nothing() {
    let db = shared().database();
    beside_writers(&db, 3, 5, 3, || {
        let mut client = db.connect();
        // Three writers: a lock may take longer than its timeout to come.
        client.batch_execute("SET litellm_spend.lock_timeout = '20s'").unwrap();
        for _ in 0..8 {
            wait_for_rows(&mut client, 30);
            client.batch_execute("SELECT spend_attach()").unwrap();
            wait_for_rows(&mut client, 60);
            assert_no_rows(client.query(VIEW_AGAINST_RAW, &[]).unwrap(), "view and raw rows differ");
            client.batch_execute("SELECT spend_detach()").unwrap();
            assert_no_rows(client.query(VIEW_AGAINST_RAW, &[]).unwrap(), "view and raw rows differ");
        }
        client.batch_execute("SELECT spend_attach()").unwrap();
        wait_for_rows(&mut client, 60);
        assert_no_rows(client.query(VIEW_AGAINST_RAW, &[]).unwrap(), "view and raw rows differ");
    });
    // On a slow machine a backfill of what they have written, in a debug build, takes minutes.
    let mut client = db.connect();
    attach(&mut client);
    assert_exact(&mut client);
}

#[test]
fn attach_does_not_wait_for_readers() {
    let db = shared().database();
    let (mut client, mut reader) = (db.connect(), db.connect());
    client.batch_execute(&insert_rows("a", 50, 5)).unwrap();
    reader.batch_execute(r#"BEGIN; SELECT count(*) FROM "LiteLLM_SpendLogs""#).unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    client.batch_execute(&insert_rows("b", 50, 5)).unwrap();
    // Also when the triggers are made again.
    client
        .batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" DISABLE TRIGGER litellm_spend_capture_insert"#)
        .unwrap();
    wait_until_triggers_are_enabled(&mut client);
    wait_until_live(&mut client);
    reader.batch_execute("COMMIT").unwrap();
    assert_exact(&mut client);
}

#[test]
fn a_changed_definition_takes_effect_when_attached_again() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 100, 5)).unwrap();
    wait_until_merged(&mut client);
    // As an older version would have left them: another query, and a rollup without one of the measures.
    client
        .batch_execute(
            r#"CREATE OR REPLACE VIEW "MonthlyGlobalSpend" AS
                   SELECT date, 2 * spend::double precision AS spend FROM litellm_spend.daily_spend;
               UPDATE litellm_spend.public_view SET installed = 'SELECT date, 2 * spend …';"#,
        )
        .unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    assert_exact(&mut client);

    client
        .batch_execute(
            r#"BEGIN;
               CREATE OR REPLACE VIEW litellm_spend.daily_spend AS
                   SELECT date, spend, prompt_tokens, completion_tokens, total_tokens, requests, 0::bigint AS failed_requests
                   FROM litellm_spend.daily_spend_rollup;
               ALTER TABLE litellm_spend.daily_spend_rollup DROP COLUMN failed_requests;
               SELECT spend_attach();
               COMMIT"#,
        )
        .unwrap();
    wait_until_live(&mut client);
    assert_exact(&mut client);
    assert_eq!(
        value::<i64>(&mut client, "SELECT sum(failed_requests)::bigint FROM litellm_spend.daily_spend"),
        10
    );
}

/// As VIEW_AGAINST_RAW, over both tables; a row that was copied counts once.
const VIEW_AGAINST_BOTH: &str = r#"
    SELECT coalesce(v.date, r.date)::text, v.spend, r.spend FROM "MonthlyGlobalSpend" v
    FULL JOIN (SELECT date("startTime") AS date, sum(spend::numeric)::float8 AS spend
               FROM (SELECT DISTINCT ON (request_id) * FROM (
                         SELECT * FROM "LiteLLM_SpendLogs" UNION ALL SELECT * FROM "LiteLLM_SpendLogs_legacy") AS a
                     ORDER BY request_id) AS b
               WHERE "startTime" >= CURRENT_DATE - interval '30 days' GROUP BY 1) r USING (date)
    WHERE round(v.spend::numeric, 9) IS DISTINCT FROM round(r.spend::numeric, 9)"#;

#[test]
fn capture_follows_when_upstreams_script_replaces_the_table() {
    let db = shared().database().with_rows("old", 2000, 25).attached();
    let mut client = db.connect();
    beside_writers(&db, 2, 5, 3, || {
        wait_for_rows(&mut client, 100);
        client.batch_execute(UPSTREAM_SCRIPT).unwrap();
        wait_until_capture_follows(&mut client);
        wait_for_rows(&mut client, 100);
    });
    assert_no_rows(client.query(VIEW_AGAINST_BOTH, &[]).unwrap(), "view and raw rows differ");
    assert_verified(&mut client);
    // The script's optional copy of recent rows: they are counted already.
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs" SELECT * FROM "LiteLLM_SpendLogs_legacy" WHERE "startTime" >= now() - interval '10 days'"#,
        )
        .unwrap();
    assert_no_rows(client.query(VIEW_AGAINST_BOTH, &[]).unwrap(), "copied rows were counted again");
    assert_verified(&mut client);
    client.batch_execute(&insert_rows("new", 50, 5)).unwrap();
    // A write straight into a partition, and an update that moves a row.
    client
        .batch_execute(
            &insert_rows("leaf", 5, 2).replace("\"LiteLLM_SpendLogs\"", "\"LiteLLM_SpendLogs_pdefault\""),
        )
        .unwrap();
    client
        .batch_execute(r#"UPDATE "LiteLLM_SpendLogs" SET spend = 3, "startTime" = "startTime" - interval '2 days' WHERE request_id LIKE 'new1%'"#)
        .unwrap();
    assert_no_rows(client.query(VIEW_AGAINST_BOTH, &[]).unwrap(), "view and raw rows differ");
    assert_verified(&mut client);
    // The old table goes: nothing of ours holds it, and its days stay in the view as history.
    let before: f64 = value(&mut client, r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#);
    client
        .batch_execute(
            r#"DROP VIEW "Last30dKeysBySpend", "Last30dModelsBySpend", "MonthlyGlobalSpendPerKey", "MonthlyGlobalSpendPerUserPerKey",
                   "DailyTagSpend", "Last30dTopEndUsersSpend";
               DROP TABLE "LiteLLM_SpendLogs_legacy""#,
        )
        .unwrap();
    eventually("the days of the old table are frozen", || {
        holds(&mut client, "SELECT predecessor IS NULL FROM litellm_spend.capture")
    });
    assert!(
        (before - value::<f64>(&mut client, r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#)).abs() < 1e-9
    );
    client.batch_execute(&insert_rows("last", 10, 2)).unwrap();
    assert_eq!(capture_errors(&mut client), 0);
}

#[test]
fn the_drop_of_a_replaced_table_freezes_the_days_of_its_rows_only() {
    let db = shared().database();
    let mut client = db.connect();
    let row = |id: &str, time: &str| {
        format!(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
               VALUES ('{id}', 'x', 1, {time}, {time});"#
        )
    };
    client.batch_execute(&(row("old", "'2024-01-10'") + &row("typo", "'9999-12-31'"))).unwrap();
    attach(&mut client);
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    client.batch_execute(&row("new", "CURRENT_DATE")).unwrap();
    eventually("capture follows", || {
        holds(&mut client, r#"SELECT predecessor IS NOT NULL FROM litellm_spend.capture"#)
    });
    client.batch_execute(r#"DROP TABLE "LiteLLM_SpendLogs_legacy" CASCADE"#).unwrap();
    eventually("the days of the old table are frozen", || {
        holds(
            &mut client,
            "SELECT frozen_before = '2024-01-11' AND dirty_ranges = 0 FROM spend_rollup_status WHERE rollup = 'daily_spend'",
        )
    });
    let missed = row("missed", "CURRENT_DATE");
    client
        .batch_execute(&format!(
            "SET session_replication_role = replica; {missed} RESET session_replication_role"
        ))
        .unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM spend_rollup_verify('daily_spend')"), 1);
    client
        .batch_execute("SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE, CURRENT_DATE + 1)")
        .unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM spend_rollup_verify('daily_spend')"), 0);
    assert_eq!(value::<i64>(&mut client, REQUESTS), 4);
}

#[test]
fn a_table_that_is_dropped_and_made_again_goes_on() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("old", 100, 5)).unwrap();
    let before: f64 = value(&mut client, r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#);
    client
        .batch_execute(
            r#"BEGIN; SET LOCAL ROLE litellm; CREATE TABLE copy (LIKE "LiteLLM_SpendLogs" INCLUDING ALL);
               DROP VIEW "Last30dKeysBySpend", "Last30dModelsBySpend", "MonthlyGlobalSpendPerKey", "MonthlyGlobalSpendPerUserPerKey",
                   "DailyTagSpend", "Last30dTopEndUsersSpend";
               DROP TABLE "LiteLLM_SpendLogs"; ALTER TABLE copy RENAME TO "LiteLLM_SpendLogs"; COMMIT"#,
        )
        .unwrap();
    client.batch_execute(&insert_rows("old", 100, 5)).unwrap();
    wait_until_capture_follows(&mut client);
    client.batch_execute(&insert_rows("new", 100, 5)).unwrap();
    let after: f64 = value(&mut client, r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#);
    assert!((3.0 * before - after).abs() < 1e-9, "{before} {after}");
}

/// A table that has come with copies of the rows is captured, and each row is counted once.
fn assert_rows_count_once(client: &mut Client) {
    wait_until_capture_follows(client);
    eventually("what came with it is computed", || {
        holds(client, "SELECT NOT EXISTS (SELECT FROM litellm_spend.dirty_range WHERE repaired_at IS NULL)")
    });
    let counted = format!(r#"SELECT count(*) = ({REQUESTS}) FROM "LiteLLM_SpendLogs""#);
    assert!(holds(client, &counted));
    assert_exact(client);
    assert!(holds(
        client,
        "SELECT unrepairable_ranges = 0 FROM spend_rollup_status WHERE rollup = 'daily_spend'"
    ));
}

#[test]
fn upstreams_script_back_to_a_plain_table_counts_no_row_twice_and_keeps_the_policy() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    client.batch_execute(&insert_rows("a", 2000, 25)).unwrap();
    client.batch_execute(r#"DROP TABLE "LiteLLM_SpendLogs_legacy" CASCADE"#).unwrap();
    attach(&mut client);
    let live = r#"SELECT count(*) FROM litellm_spend.public_view WHERE installed IS NOT NULL"#;
    assert_eq!(value::<i64>(&mut client, live), 7);
    client.batch_execute("SELECT spend_partition_set(retention => '90 days')").unwrap();
    // What retention has deleted stays counted.
    let before: i64 = value(&mut client, REQUESTS);
    beside_writers(&db, 2, 5, 3, || {
        wait_for_rows(&mut client, 100);
        client.batch_execute(UPSTREAM_SCRIPT_BACK).unwrap();
        wait_until_capture_follows(&mut client);
        wait_for_rows(&mut client, 100);
    });
    assert_rows_count_once(&mut client);
    assert!(value::<i64>(&mut client, REQUESTS) > before);
    assert_eq!(value::<i64>(&mut client, live), 7);
    assert!(holds(
        &mut client,
        r#"SELECT count(*) = 1 AND bool_and(relation = '"LiteLLM_SpendLogs"'::regclass AND retention = '90 days')
           FROM litellm_spend.policy"#
    ));
}

#[test]
fn a_copy_that_takes_the_tables_name_counts_no_row_twice() {
    let copy = r#"CREATE TABLE copy (LIKE "LiteLLM_SpendLogs" INCLUDING ALL);
                  INSERT INTO copy SELECT * FROM "LiteLLM_SpendLogs";"#;
    let name = r#"DROP TABLE "LiteLLM_SpendLogs"; ALTER TABLE copy RENAME TO "LiteLLM_SpendLogs";"#;
    for script in [format!("BEGIN; {copy} {name} COMMIT"), format!("{copy} BEGIN; {name} COMMIT")] {
        let db = shared().database().with_rows("a", 500, 5).attached();
        let mut client = db.connect();
        client.batch_execute(&format!("SET ROLE litellm; {script}; RESET ROLE")).unwrap();
        client.batch_execute(&insert_rows("gap", 10, 3)).unwrap();
        client.batch_execute(r#"GRANT SELECT ON "LiteLLM_SpendLogs" TO PUBLIC"#).unwrap();
        assert_rows_count_once(&mut client);
        client.batch_execute(&insert_rows("after", 10, 3)).unwrap();
        assert_rows_count_once(&mut client);
        // One that leaves rows out: those of before stay counted.
        let before: i64 = value(&mut client, REQUESTS);
        let recent = script.replace(
            r#"SELECT * FROM "LiteLLM_SpendLogs";"#,
            r#"SELECT * FROM "LiteLLM_SpendLogs" WHERE "startTime" >= CURRENT_DATE - 2;"#,
        );
        client.batch_execute(&format!("SET ROLE litellm; {recent}; RESET ROLE")).unwrap();
        wait_until_capture_follows(&mut client);
        eventually("what came with it is computed", || {
            holds(
                &mut client,
                "SELECT NOT EXISTS (SELECT FROM litellm_spend.dirty_range WHERE repaired_at IS NULL)",
            )
        });
        client.batch_execute(&insert_rows("last", 10, 1)).unwrap();
        assert_eq!(value::<i64>(&mut client, REQUESTS), before + 10);
        assert_verified(&mut client);
    }
}

#[test]
fn a_policy_goes_along_also_where_maintenance_finds_the_table_gone_first() {
    let db = shared().database().with_rows("a", 50, 5).attached();
    let (mut client, mut other) = (db.connect(), db.connect());
    client.batch_execute("SELECT spend_partition_set(retention => '90 days')").unwrap();
    other.batch_execute("BEGIN; LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE").unwrap();
    client
        .batch_execute(
            r#"BEGIN; SET LOCAL ROLE litellm; CREATE TABLE copy (LIKE "LiteLLM_SpendLogs" INCLUDING ALL);
               DROP TABLE "LiteLLM_SpendLogs"; ALTER TABLE copy RENAME TO "LiteLLM_SpendLogs"; COMMIT;
               CREATE TABLE events (id bigserial, at timestamp NOT NULL) PARTITION BY RANGE (at);
               SELECT spend_partition_set('events')"#,
        )
        .unwrap();
    let maintained =
        "SELECT maintained_at IS NOT NULL FROM litellm_spend.policy WHERE relation = 'events'::regclass";
    eventually("maintenance has looked", || holds(&mut client, maintained));
    other.batch_execute("COMMIT").unwrap();
    wait_until_capture_follows(&mut client);
    assert!(holds(
        &mut client,
        r#"SELECT retention = '90 days' FROM litellm_spend.policy WHERE relation = '"LiteLLM_SpendLogs"'::regclass"#
    ));
}

/// All of it was captured, and nothing else.
fn assert_counted(client: &mut Client, requests: i64) {
    assert_eq!(value::<i64>(client, REQUESTS), requests);
    assert_verified(client);
    assert_eq!(capture_errors(client), 0);
}

/// What the rollups must have counted: a request that both tables hold counts once.
const REQUESTS_OF_BOTH: &str = r#"SELECT count(DISTINCT request_id) FROM (
    SELECT request_id FROM "LiteLLM_SpendLogs" UNION ALL SELECT request_id FROM "LiteLLM_SpendLogs_legacy") AS a"#;

#[test]
fn a_replaced_table_that_becomes_a_partition_is_counted_as_one() {
    let attach = r#"ALTER TABLE "LiteLLM_SpendLogs" ATTACH PARTITION old
                        FOR VALUES FROM (MINVALUE) TO (CURRENT_DATE + 1)"#;
    let replace = partitioned(r#"PARTITION BY RANGE ("startTime")"#).replace("plain", "old");
    let count = r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#;
    for before_capture_follows in [true, false] {
        let db = shared().database().with_rows("a", 100, 5).attached();
        let mut client = db.connect();
        let together = |statements: [&str; 2]| format!("BEGIN; {}; {}; COMMIT", statements[0], statements[1]);
        if before_capture_follows {
            client.batch_execute(&together([&replace, attach])).unwrap();
            client.batch_execute(&insert_rows("gap", 10, 1)).unwrap();
        } else {
            client.batch_execute(&replace).unwrap();
            wait_until_capture_follows(&mut client);
            assert!(holds(&mut client, "SELECT predecessor IS NOT NULL FROM litellm_spend.capture"));
            client.batch_execute(&together([attach, &insert_rows("gap", 10, 1)])).unwrap();
        }
        wait_until_capture_follows(&mut client);
        eventually("both are one", || {
            holds(&mut client, "SELECT predecessor IS NULL FROM litellm_spend.capture")
        });
        client.batch_execute(&insert_rows("b", 10, 1)).unwrap();
        client.batch_execute(&insert_rows("leaf", 10, 1).replace("\"LiteLLM_SpendLogs\"", "old")).unwrap();
        client.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE request_id = 'b1'"#).unwrap();
        wait_until_live(&mut client);
        assert_eq!(value::<i64>(&mut client, count), 129);
        // A deleted row stays in the totals.
        assert_counted(&mut client, 130);
    }
}

#[test]
fn a_replaced_table_that_gets_its_name_back_is_not_counted_twice() {
    let db = shared().database().with_rows("a", 100, 5).attached();
    let mut client = db.connect();
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    wait_until_capture_follows(&mut client);
    client.batch_execute(&insert_rows("b", 10, 5)).unwrap();
    client
        .batch_execute(
            r#"BEGIN; SET LOCAL ROLE litellm;
               ALTER TABLE "LiteLLM_SpendLogs" RENAME TO aside;
               ALTER TABLE "LiteLLM_SpendLogs_legacy" RENAME TO "LiteLLM_SpendLogs"; COMMIT"#,
        )
        .unwrap();
    wait_until_capture_follows(&mut client);
    client.batch_execute(&insert_rows("c", 10, 5)).unwrap();
    wait_until_live(&mut client);
    assert_counted(&mut client, 120);
}

#[test]
fn what_is_written_straight_to_a_replaced_table_is_counted() {
    let db = shared().database().with_rows("a", 100, 5).attached();
    let mut client = db.connect();
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    wait_until_capture_follows(&mut client);
    let into_old = insert_rows("b", 10, 1).replace("\"LiteLLM_SpendLogs\"", "\"LiteLLM_SpendLogs_legacy\"");
    client.batch_execute(&into_old).unwrap();
    assert_eq!(value::<i64>(&mut client, REQUESTS), 110);
    // Copies in either direction count once, as the new table has them.
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs" SELECT * FROM "LiteLLM_SpendLogs_legacy" WHERE request_id LIKE 'b%'"#,
        )
        .unwrap();
    client.batch_execute(&insert_rows("c", 10, 1)).unwrap();
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs_legacy" SELECT * FROM "LiteLLM_SpendLogs" WHERE request_id LIKE 'c%';
               UPDATE "LiteLLM_SpendLogs_legacy" SET spend = 7"#,
        )
        .unwrap();
    assert_eq!(value::<i64>(&mut client, REQUESTS_OF_BOTH), 120);
    assert_counted(&mut client, 120);
}

#[test]
fn a_replaced_table_goes_on_beside_one_that_is_converted() {
    let db = shared().database().with_rows("a", 100, 5).attached();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"BEGIN; SET LOCAL ROLE litellm; ALTER TABLE "LiteLLM_SpendLogs" RENAME TO before;
               CREATE TABLE "LiteLLM_SpendLogs" (LIKE before INCLUDING ALL); COMMIT"#,
        )
        .unwrap();
    wait_until_capture_follows(&mut client);
    client.batch_execute(&insert_rows("b", 10, 5)).unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_converted(&mut client);
    client
        .batch_execute(
            r#"INSERT INTO before SELECT * FROM "LiteLLM_SpendLogs" WHERE request_id LIKE 'b%';
               INSERT INTO "LiteLLM_SpendLogs" SELECT * FROM before WHERE request_id LIKE 'a%'"#,
        )
        .unwrap();
    assert_counted(&mut client, 110);
}

#[test]
fn a_row_that_is_deleted_from_one_of_two_tables_is_still_there() {
    for on_delete in ["keep", "subtract"] {
        println!("{on_delete}");
        let db = shared().database().with_rows("a", 500, 10);
        let mut client = db.connect();
        client.batch_execute(&format!("SELECT spend_attach(on_delete => '{on_delete}')")).unwrap();
        wait_until_live(&mut client);
        client.batch_execute(UPSTREAM_SCRIPT).unwrap();
        wait_until_capture_follows(&mut client);
        client
            .batch_execute(
                r#"INSERT INTO "LiteLLM_SpendLogs" SELECT * FROM "LiteLLM_SpendLogs_legacy";
                   DELETE FROM "LiteLLM_SpendLogs" WHERE "startTime" < CURRENT_DATE - 4;
                   DELETE FROM "LiteLLM_SpendLogs_legacy" WHERE "startTime" >= CURRENT_DATE - 2"#,
            )
            .unwrap();
        assert_eq!(value::<i64>(&mut client, REQUESTS_OF_BOTH), 500);
        assert_counted(&mut client, 500);
        // The last copies go.
        client
            .batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs_legacy" WHERE "startTime" < CURRENT_DATE - 4"#)
            .unwrap();
        client.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE "startTime" >= CURRENT_DATE"#).unwrap();
        let left: i64 = value(&mut client, REQUESTS_OF_BOTH);
        assert!(left < 500);
        let counted = if on_delete == "keep" { 500 } else { left };
        assert_counted(&mut client, counted);
    }
}

#[test]
fn capture_follows_to_a_table_that_has_a_policy_of_its_own() {
    let db = shared().database().with_rows("a", 50, 5).attached();
    let mut client = db.connect();
    client.batch_execute("SELECT spend_partition_set(retention => '90 days')").unwrap();
    let (script, _) = UPSTREAM_SCRIPT.rsplit_once("COMMIT").unwrap();
    client
        .batch_execute(&format!(
            r#"{script} RESET ROLE; SELECT spend_partition_set('"LiteLLM_SpendLogs"', 'week'); COMMIT"#
        ))
        .unwrap();
    wait_until_capture_follows(&mut client);
    assert!(holds(
        &mut client,
        r#"SELECT count(*) = 1 AND bool_and(relation = '"LiteLLM_SpendLogs"'::regclass AND "interval" = 'week'
                                            AND retention IS NULL)
           FROM litellm_spend.policy"#
    ));
}

#[test]
fn an_attached_partition_with_rows_is_counted() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    attach(&mut client);
    client.batch_execute(&insert_rows("a", 20, 1)).unwrap();
    client
        .batch_execute(&format!(
            r#"SET ROLE litellm; CREATE TABLE extra (LIKE "LiteLLM_SpendLogs" INCLUDING DEFAULTS);
               INSERT INTO extra (request_id, call_type, spend, "startTime", "endTime")
               SELECT 'e' || i, 'x', 1, CURRENT_DATE - 9 + i * interval '1 minute', now() FROM generate_series(1, 10) i;
               ALTER TABLE "LiteLLM_SpendLogs" ATTACH PARTITION extra {}; RESET ROLE"#,
            range_of_day(-9)
        ))
        .unwrap();
    eventually("the partition's rows are counted", || {
        client.query(VIEW_AGAINST_RAW, &[]).unwrap().is_empty()
    });
    client.batch_execute("INSERT INTO extra (request_id, call_type, spend, \"startTime\", \"endTime\") SELECT 'f', 'x', 1, CURRENT_DATE - 9, now()").unwrap();
    assert_exact(&mut client);
}

#[test]
fn a_partition_that_somebody_detaches_is_captured_no_more() {
    not_at_midnight();
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    client.batch_execute(&day_partition("old", -1)).unwrap();
    client.batch_execute(&insert_rows("a", 100, 2)).unwrap();
    attach(&mut client);
    let triggers = "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'old'::regclass";
    assert_eq!(value::<i64>(&mut client, triggers), 5);
    let total = r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#;
    let before: f64 = value(&mut client, total);
    client
        .batch_execute(r#"SET ROLE litellm; ALTER TABLE "LiteLLM_SpendLogs" DETACH PARTITION old"#)
        .unwrap();
    eventually("its triggers are gone", || value::<i64>(&mut client, triggers) == 0);
    client
        .batch_execute(
            r#"INSERT INTO old (request_id, call_type, spend, "startTime", "endTime")
               SELECT 'late', 'x', 1, CURRENT_DATE - 1, now(); DELETE FROM old; RESET ROLE"#,
        )
        .unwrap();
    assert!((before - value::<f64>(&mut client, total)).abs() < 1e-9, "what was spent stays");
    // Attached again it is captured again.
    client
        .batch_execute(&format!(
            r#"SET ROLE litellm; ALTER TABLE "LiteLLM_SpendLogs" ATTACH PARTITION old {}; RESET ROLE"#,
            range_of_day(-1)
        ))
        .unwrap();
    eventually("its triggers are back", || value::<i64>(&mut client, triggers) == 5);
}

#[test]
fn a_frozen_partition_that_comes_back_whole_is_no_error() {
    not_at_midnight();
    for whole in [true, false] {
        let db = shared().database();
        let mut client = db.connect();
        client.batch_execute(UPSTREAM_SCRIPT).unwrap();
        client.batch_execute(&day_partition("old", -1)).unwrap();
        client.batch_execute(&insert_rows("a", 100, 2)).unwrap();
        attach(&mut client);
        wait_until_merged(&mut client);
        let triggers = "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'old'::regclass";
        client.batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" DETACH PARTITION old"#).unwrap();
        eventually("its triggers are gone", || value::<i64>(&mut client, triggers) == 0);
        // As it comes to be while the oldest partition is away.
        client.batch_execute("UPDATE litellm_spend.source SET frozen_before = CURRENT_DATE").unwrap();
        if !whole {
            client
                .batch_execute("DELETE FROM old WHERE request_id = (SELECT min(request_id) FROM old)")
                .unwrap();
        }
        let attach = format!(r#"ALTER TABLE "LiteLLM_SpendLogs" ATTACH PARTITION old {}"#, range_of_day(-1));
        client.batch_execute(&attach).unwrap();
        eventually("its triggers are back", || value::<i64>(&mut client, triggers) == 5);
        let status = "SELECT {} FROM spend_rollup_status WHERE rollup = 'daily_spend'";
        let repaired = status.replace("{}", "dirty_ranges = 0");
        eventually("its days are looked at", || holds(&mut client, &repaired));
        let unrepairable: i64 = value(&mut client, &status.replace("{}", "unrepairable_ranges"));
        assert_eq!(unrepairable, if whole { 0 } else { 1 });
    }
}

#[test]
fn a_day_whose_partition_was_dropped_keeps_its_history() {
    not_at_midnight();
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    let days = (0..=5).map(|ago| day_partition(&format!("p{ago}"), -ago)).collect::<String>();
    client.batch_execute(&days).unwrap();
    client.batch_execute(&insert_rows("a", 500, 5)).unwrap();
    attach(&mut client);
    let total = r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#;
    let before: f64 = value(&mut client, total);
    // From the middle, as nobody should; and then something makes everything be computed again.
    client.batch_execute("DROP TABLE p2").unwrap();
    client.batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" DISABLE TRIGGER ALL"#).unwrap();
    wait_until_triggers_are_enabled(&mut client);
    wait_until_live(&mut client);
    assert!((before - value::<f64>(&mut client, total)).abs() < 1e-9);
    assert_refused(&mut client, "SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 2)", "55000");
    assert!((before - value::<f64>(&mut client, total)).abs() < 1e-9);
    // Unless the DBA insists.
    client
        .batch_execute(
            "SELECT spend_rollup_rebuild(name, CURRENT_DATE - 2, force => true) FROM litellm_spend.rollup",
        )
        .unwrap();
    assert_exact(&mut client);
    client.batch_execute("SELECT spend_detach(); SELECT spend_attach()").unwrap();
    wait_until_live(&mut client);
    assert_exact(&mut client);
}

#[test]
fn a_detached_partition_that_is_in_use_hides_no_view_that_was_replaced() {
    let db = shared().database();
    let (mut client, mut export) = (db.connect(), db.connect());
    let partitions = day_partition("p1", -1) + &day_partition("p2", -2);
    client.batch_execute(&format!("{UPSTREAM_SCRIPT}; {partitions}")).unwrap();
    attach(&mut client);
    // Both in one transaction, and used at once.
    let detach = |name: &str| format!(r#"ALTER TABLE "LiteLLM_SpendLogs" DETACH PARTITION {name};"#);
    client
        .batch_execute(&format!(
            "BEGIN; {} {} COMMIT; BEGIN; LOCK TABLE p1 IN ACCESS SHARE MODE",
            detach("p1"),
            detach("p2")
        ))
        .unwrap();
    let triggers = |table: &str| {
        format!("SELECT NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = '{table}'::regclass)")
    };
    eventually("the other one is not captured", || holds(&mut export, &triggers("p2")));
    export
        .batch_execute(
            r#"CREATE OR REPLACE VIEW "MonthlyGlobalSpend" AS SELECT CURRENT_DATE AS date, 1::float8 AS spend"#,
        )
        .unwrap();
    eventually("the status says so", || {
        holds(
            &mut export,
            "SELECT last_error LIKE '%was replaced%' FROM spend_rollup_status WHERE rollup = 'daily_spend'",
        )
    });
    client.batch_execute("COMMIT").unwrap();
    eventually("nor is this one", || holds(&mut export, &triggers("p1")));
}

#[test]
fn what_has_the_number_of_a_rollup_in_another_catalog_makes_no_view_ours() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"SELECT spend_detach(); DROP VIEW "MonthlyGlobalSpend"; SET ROLE litellm;
               CREATE VIEW "MonthlyGlobalSpend" AS SELECT "startTime"::date AS date, 7::float8 AS spend FROM "LiteLLM_SpendLogs";
               RESET ROLE; SET allow_system_table_mods = on;
               INSERT INTO pg_depend SELECT 'pg_rewrite'::regclass, oid, 0, 'pg_cast'::regclass,
                   'litellm_spend.daily_spend_rollup'::regclass, 0, 'n'
               FROM pg_rewrite WHERE ev_class = '"MonthlyGlobalSpend"'::regclass;
               SELECT spend_attach()"#,
        )
        .unwrap();
    let original =
        "SELECT original LIKE '%7%' FROM litellm_spend.public_view WHERE name = 'MonthlyGlobalSpend'";
    assert!(holds(&mut client, original));
}

#[test]
fn a_view_that_somebody_replaced_is_noticed_and_left_alone() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 50, 5)).unwrap();
    client
        .batch_execute(r#"CREATE OR REPLACE VIEW "MonthlyGlobalSpend" AS SELECT CURRENT_DATE AS date, 1::float8 AS spend"#)
        .unwrap();
    eventually("the status says so", || {
        holds(
            &mut client,
            "SELECT live_views IS NULL AND last_error LIKE '%was replaced%' FROM spend_rollup_status WHERE rollup = 'daily_spend'",
        )
    });
    wait_for_a_round(&mut client);
    assert_eq!(value::<f64>(&mut client, r#"SELECT spend FROM "MonthlyGlobalSpend""#), 1.0);
    // Others at another time: all of them are named.
    for view in ["Last30dTopEndUsersSpend", "DailyTagSpend"] {
        client
            .batch_execute(&format!(
                r#"DO $$ BEGIN EXECUTE (
                       SELECT format('CREATE OR REPLACE VIEW %s AS SELECT %s', attrelid::regclass, string_agg(
                           format('NULL::%s AS %I', format_type(atttypid, atttypmod), attname), ', ' ORDER BY attnum))
                       FROM pg_attribute WHERE attrelid = '"{view}"'::regclass AND attnum > 0 GROUP BY attrelid);
                   END $$"#
            ))
            .unwrap();
    }
    let fault = r#"SELECT bool_or(problem = 'capture of "LiteLLM_SpendLogs": views "MonthlyGlobalSpend", '
                          '"DailyTagSpend", "Last30dTopEndUsersSpend" were replaced'
                      AND remedy = 'SELECT * FROM spend_attach();  -- puts ours back') AND count(*) = 1
                   FROM spend_health"#;
    eventually("health names them all", || holds(&mut client, fault));
    // Nor does a task that fails for a while and then succeeds hide it.
    let mut dba = db.connect();
    dba.batch_execute("BEGIN; LOCK TABLE litellm_spend.dirty_range IN ACCESS EXCLUSIVE MODE").unwrap();
    let failed = format!(r#"in database "{}": repair failed"#, db.name);
    eventually("a repair has failed", || db.cluster.log().contains(&failed));
    let both =
        r#"SELECT last_error LIKE 'repair: %views "MonthlyGlobalSpend", %' FROM litellm_spend.capture"#;
    eventually("both are said", || holds(&mut client, both));
    dba.batch_execute("COMMIT").unwrap();
    // Which other tasks the lock has kept from something as well.
    let over = r#"SELECT last_error LIKE 'views "MonthlyGlobalSpend", %' FROM litellm_spend.capture"#;
    eventually("the repair has succeeded", || holds(&mut client, over));
    assert!(holds(&mut client, fault), "it is said still");
    // What was dropped was not replaced.
    client.batch_execute(r#"DROP VIEW "Last30dKeysBySpend""#).unwrap();
    let fault = r#"SELECT bool_or(problem = 'capture of "LiteLLM_SpendLogs": views "MonthlyGlobalSpend", '
                          '"DailyTagSpend", "Last30dTopEndUsersSpend" were replaced; view "Last30dKeysBySpend" was dropped'
                      AND remedy = 'SELECT * FROM spend_attach();  -- puts ours back') AND count(*) = 1
                   FROM spend_health"#;
    eventually("health tells them apart", || holds(&mut client, fault));
    client
        .batch_execute(
            r#"DROP VIEW "MonthlyGlobalSpend", "Last30dTopEndUsersSpend", "DailyTagSpend"; SELECT spend_attach()"#,
        )
        .unwrap();
    wait_until_live(&mut client);
    assert!(holds(
        &mut client,
        "SELECT last_error IS NULL FROM spend_rollup_status WHERE rollup = 'daily_spend'"
    ));
    assert_exact(&mut client);
}

#[test]
fn a_view_of_another_owner_is_let_go_unless_that_role_may_read_the_table() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 50, 5)).unwrap();
    client
        .batch_execute(r#"DROP ROLE IF EXISTS owner_d; CREATE ROLE owner_d LOGIN; ALTER VIEW "MonthlyGlobalSpend" OWNER TO owner_d"#)
        .unwrap();
    let is_ours = r#"SELECT pg_get_viewdef('"MonthlyGlobalSpend"'::regclass) LIKE '%litellm_spend.%'"#;
    eventually("it is LiteLLM's own again", || !holds(&mut client, is_ours));
    let rights = "SELECT count(*) FROM pg_attribute, aclexplode(attacl) AS x WHERE attrelid = 'litellm_spend.change_log'::regclass
                      AND x.grantee = 'owner_d'::regrole";
    assert_eq!(value::<i64>(&mut client, rights), 0);
    assert_eq!(error(&mut client, r#"SELECT * FROM "MonthlyGlobalSpend""#).code().code(), "42501");
    client.batch_execute("SELECT spend_attach()").unwrap();
    assert!(!holds(&mut client, is_ours), "its owner may not read the table");
    client.batch_execute(r#"GRANT SELECT ON "LiteLLM_SpendLogs" TO owner_d; SELECT spend_attach()"#).unwrap();
    wait_until_live(&mut client);
    assert_exact(&mut client);
    // It may read what the view shows, and no keys.
    let columns =
        "SELECT string_agg(a.attname, ', ' ORDER BY attname) FROM pg_attribute a, aclexplode(a.attacl) AS x
                   WHERE attrelid = 'litellm_spend.change_log'::regclass AND x.grantee = 'owner_d'::regrole";
    assert_eq!(value::<String>(&mut client, columns), "hour, requests, seq, spend");
    client.batch_execute("SELECT spend_detach()").unwrap();
    assert_eq!(value::<i64>(&mut client, rights), 0);
    drop_role(&mut client, "owner_d");
}

#[test]
fn a_dropped_table_can_be_detached() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 50, 5)).unwrap();
    client
        .batch_execute(
            r#"DROP VIEW "Last30dKeysBySpend", "Last30dModelsBySpend", "MonthlyGlobalSpendPerKey",
                   "MonthlyGlobalSpendPerUserPerKey", "DailyTagSpend", "Last30dTopEndUsersSpend";
               DROP TABLE "LiteLLM_SpendLogs""#,
        )
        .unwrap();
    let total: f64 = value(&mut client, r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#);
    assert!(total > 0.0);
    client.batch_execute("SELECT spend_detach()").unwrap();
    assert_eq!(error(&mut client, "SELECT * FROM monthly_global_spend()").code().code(), "55000");
    // Its definition cannot be given back; its history is kept, and goes only when asked to.
    assert_eq!(value::<i64>(&mut client, r#"SELECT count(*) FROM "MonthlyGlobalSpend""#), 0);
    assert_eq!(value::<i64>(&mut client, REQUESTS), 50);
    client.batch_execute("SELECT spend_detach(drop_history => true); DROP EXTENSION litellm_spend").unwrap();
}

/// Ours reads no column of the table: they may go, or change, while it is in place.
#[test]
fn a_view_whose_own_query_fits_no_more_is_emptied_and_the_table_detached() {
    let db = shared().database().with_rows("a", 50, 5).attached();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"ALTER TABLE "LiteLLM_SpendLogs" DROP COLUMN request_tags;
               ALTER TABLE "LiteLLM_SpendLogs" ALTER COLUMN "user" TYPE varchar;
               CREATE VIEW dependent AS SELECT * FROM "DailyTagSpend""#,
        )
        .unwrap();
    let detach =
        "SELECT object, action FROM spend_detach() WHERE object LIKE 'view%' AND action NOT LIKE '%restored'";
    let mut said = vec![];
    // A merge or an autovacuum may be at one of its tables.
    eventually("it is detached", || match client.query(detach, &[]) {
        Err(error) => {
            assert_eq!(error.code().map(|code| code.code()), Some("55P03"), "{error:?}");
            false
        }
        Ok(rows) => {
            said = rows;
            true
        }
    });
    let said: Vec<(String, String)> = said.iter().map(|row| (row.get(0), row.get(1))).collect();
    let emptied = "emptied: LiteLLM's own definition cannot be given back: ";
    let [per_user, tags] = &said[..] else { panic!("{said:?}") };
    assert!(per_user.0.contains("PerUserPerKey") && per_user.1.starts_with(emptied), "{per_user:?}");
    let gone = format!("{emptied}column s.request_tags does not exist");
    assert_eq!(*tags, (r#"view "public"."DailyTagSpend""#.into(), gone));
    assert!(
        db.cluster.log().contains(r#""public"."DailyTagSpend" is emptied: column s.request_tags does not"#)
    );
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM dependent"), 0);
    assert!(definition(&mut client).contains("LiteLLM_SpendLogs"), "the others are given back");
    let triggers = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'litellm_spend%'";
    assert_eq!(value::<i64>(&mut client, triggers), 0);
    client.batch_execute("SELECT spend_detach(drop_history => true); DROP EXTENSION litellm_spend").unwrap();
}

#[test]
fn litellms_start_up_leaves_our_view_alone() {
    let db = shared().database();
    let mut client = db.connect();
    give_to_role(&mut client, "litellm_b");
    client.batch_execute(&insert_rows("a", 100, 5)).unwrap();
    attach(&mut client);
    let ours = definition(&mut client);
    let mut litellm = db.cluster.connect_as(&db.name, "litellm_b");
    // check_view_exists(): all eight are in pg_views, so nothing is touched.
    let views: i64 = value(
        &mut litellm,
        "SELECT count(*) FROM pg_views WHERE schemaname = 'public' AND viewname IN ('LiteLLM_VerificationTokenView',
             'MonthlyGlobalSpend', 'Last30dKeysBySpend', 'Last30dModelsBySpend', 'MonthlyGlobalSpendPerKey',
             'MonthlyGlobalSpendPerUserPerKey', 'Last30dTopEndUsersSpend', 'DailyTagSpend')",
    );
    assert_eq!(views, 8);
    // The probe of the path that creates missing ones.
    litellm.batch_execute(r#"SELECT 1 FROM "MonthlyGlobalSpend" LIMIT 1"#).unwrap();
    // POST /global/spend/refresh looks for a materialized view.
    let kind: String =
        value(&mut litellm, "SELECT relkind::text FROM pg_class WHERE relname = 'MonthlyGlobalSpend'");
    assert_eq!(kind, "v");
    drop(litellm);
    // A later release's migrations.
    client
        .batch_execute(
            r#"ALTER TABLE "LiteLLM_SpendLogs" ADD COLUMN IF NOT EXISTS some_new_column TEXT;
               ALTER TABLE "LiteLLM_SpendLogs" ADD COLUMN IF NOT EXISTS updated_at TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP;
               CREATE INDEX IF NOT EXISTS "LiteLLM_SpendLogs_startTime_idx" ON "LiteLLM_SpendLogs"("startTime");
               CREATE INDEX "LiteLLM_SpendLogs_litellm_call_id_idx" ON "LiteLLM_SpendLogs"(litellm_call_id)"#,
        )
        .unwrap();
    // A second run of all migrations says the same as on a database without us, and changes nothing of ours.
    let plain = db.cluster.litellm_database();
    let errors = |database: &Database| {
        let log = database.cluster.run_again(&database.name, "migrations.sql");
        log.lines().filter(|line| line.contains("ERROR:")).map(str::to_string).collect::<Vec<_>>()
    };
    assert_eq!(errors(&db), errors(&plain));
    assert_eq!(definition(&mut client), ours);
    assert_exact(&mut client);
    // Else the worker may write for the role while that is dropped.
    let detach = "SELECT spend_detach(drop_history => true)";
    eventually("it is detached", || client.batch_execute(detach).is_ok());
    drop_role(&mut client, "litellm_b");
}

#[test]
fn a_missing_view_is_made_and_a_materialized_one_is_left_alone() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 100, 5)).unwrap();
    client
        .batch_execute(r#"DROP VIEW "MonthlyGlobalSpend"; CREATE MATERIALIZED VIEW "MonthlyGlobalSpend" AS SELECT CURRENT_DATE AS date, 1::float8 AS spend"#)
        .unwrap();
    let action: String =
        value(&mut client, "SELECT action FROM spend_attach() WHERE object LIKE 'view%MonthlyGlobalSpend\"'");
    assert!(action.contains("materialized"), "{action}");
    client.batch_execute(r#"DROP MATERIALIZED VIEW "MonthlyGlobalSpend"; SELECT spend_attach()"#).unwrap();
    wait_until_live(&mut client);
    assert_exact(&mut client);
}

#[test]
fn everything_works_without_a_worker() {
    // No preload: the library is loaded by the call.
    let cluster = own_cluster(&[NO_WORKER]);
    let db = cluster.database();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("old", 1000, 20)).unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM spend_worker_status"), 0);
    // Not covered yet: the function adds the raw rows up.
    let raw: f64 = value(&mut client, "SELECT sum(spend) FROM monthly_global_spend()");
    client.batch_execute("CALL spend_backfill()").unwrap();
    assert!(holds(
        &mut client,
        "SELECT live_views = ARRAY['MonthlyGlobalSpend'] FROM spend_rollup_status WHERE rollup = 'daily_spend'"
    ));
    assert!((raw - value::<f64>(&mut client, "SELECT sum(spend) FROM monthly_global_spend()")).abs() < 1e-9);
    client.batch_execute(&insert_rows("new", 100, 5)).unwrap();
    assert_exact(&mut client);
    let merged: i64 = value(&mut client, "SELECT rows FROM spend_rollup_run() WHERE rollup = 'daily_spend'");
    assert!(merged > 0);
    assert_eq!(
        value::<i64>(&mut client, "SELECT tail_rows FROM spend_rollup_status WHERE rollup = 'daily_spend'"),
        0
    );
    assert_exact(&mut client);
    let again: String = value(&mut client, "SELECT outcome FROM spend_rollup_run('daily_spend')");
    assert_eq!(again, "up to date");
    // A replaced table is followed by the call as well.
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    client.batch_execute(&insert_rows("gap", 10, 5)).unwrap();
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    assert_no_rows(client.query(VIEW_AGAINST_BOTH, &[]).unwrap(), "view and raw rows differ");
}

#[test]
fn databases_without_the_extension_take_no_worker_slot() {
    let cluster = own_cluster(&["max_worker_processes = 3"]);
    let _empty: Vec<Database> = (0..6).map(|_| cluster.litellm_database()).collect();
    // One slot is the launcher's, one the logical replication launcher's.
    let db = cluster.database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 10, 2)).unwrap();
    wait_until_merged(&mut client);
}

/// The pid of the worker of a database.
fn worker_of(db: &Database) -> String {
    let is_ours = format!("datname = '{}' AND backend_type = 'litellm_spend worker'", db.name);
    format!("SELECT min(pid) FROM pg_stat_activity WHERE {is_ours}")
}

#[test]
fn without_a_slot_only_databases_with_the_extension_are_said_to_lack_a_worker() {
    let settings = ["max_worker_processes = 3", "litellm_spend.discovery_interval = '1h'"];
    let cluster = own_cluster(&settings);
    let other = cluster.litellm_database();
    let db = cluster.database();
    let mut admin = cluster.connect("postgres");
    eventually("the one slot is taken", || value::<Option<i32>>(&mut admin, &worker_of(&db)).is_some());
    other.connect().batch_execute("CREATE EXTENSION litellm_spend").unwrap();
    eventually("it is said", || cluster.log().contains("no slot to look for the extension in database"));
    std::thread::sleep(Duration::from_secs(8));
    assert!(
        !cluster.log().contains("no slot for the worker of database \"postgres\""),
        "{}",
        cluster.log_tail()
    );
    db.connect().batch_execute("DROP EXTENSION litellm_spend").unwrap();
    let freed = Instant::now();
    eventually("the other gets the slot", || {
        assert!(freed.elapsed() < Duration::from_secs(60), "{}", cluster.log_tail());
        value::<Option<i32>>(&mut admin, &worker_of(&other)).is_some()
    });
}

#[test]
fn a_worker_that_fails_while_it_starts_is_started_again() {
    let cluster = own_cluster(&["litellm_spend.discovery_interval = '1h'"]);
    let db = cluster.database().attached();
    let mut client = db.connect();
    wait_until_live(&mut client);
    let version =
        "SELECT format('data/base/%s/PG_VERSION', oid) FROM pg_database WHERE datname = current_database()";
    let version = cluster.dir.join(value::<String>(&mut client, version));
    let aside = version.with_extension("aside");
    std::fs::rename(&version, &aside).unwrap();
    client
        .batch_execute(&format!("SELECT pg_terminate_backend(pid) FROM ({}) AS w (pid)", worker_of(&db)))
        .unwrap();
    eventually("a worker fails", || cluster.log().contains("is not a valid data directory"));
    std::fs::rename(&aside, &version).unwrap();
    let mended = Instant::now();
    eventually("another comes", || {
        assert!(mended.elapsed() < Duration::from_secs(60), "{}", cluster.log_tail());
        value::<Option<i32>>(&mut client, &worker_of(&db)).is_some()
    });
}

#[test]
fn a_full_lock_table_ends_neither_the_launcher_nor_a_worker() {
    let settings =
        ["max_locks_per_transaction = 10", "max_connections = 20", "litellm_spend.discovery_interval = '1s'"];
    let cluster = own_cluster(&settings);
    let db = cluster.database().attached();
    let mut client = db.connect();
    wait_until_live(&mut client);
    let ours =
        "SELECT array_agg(pid ORDER BY pid) FROM pg_stat_activity WHERE backend_type LIKE 'litellm_spend %'";
    let processes = |client: &mut Client| value::<Vec<i32>>(client, ours);
    eventually("all is quiet", || processes(&mut client).len() == 2);
    let before = processes(&mut client);
    // Again and again: what others give back is taken, too.
    for from in (0..8_000_000).step_by(100_000) {
        let fill = format!("SELECT pg_advisory_lock(i) FROM generate_series({from}, {}) AS i", from + 99_999);
        assert_eq!(error(&mut client, &fill).code().code(), "53200");
        std::thread::sleep(Duration::from_millis(100));
    }
    client.batch_execute("SELECT pg_advisory_unlock_all()").unwrap();
    assert_eq!(processes(&mut client), before, "{}", cluster.log_tail());
    client.batch_execute(&insert_rows("a", 10, 2)).unwrap();
    wait_until_merged(&mut client);
}

#[test]
fn what_an_interrupted_drop_has_left_of_a_database_gets_no_worker() {
    let cluster = own_cluster(&["litellm_spend.discovery_interval = '1s'"]);
    let mut admin = cluster.connect("postgres");
    let left = cluster.database();
    admin
        .batch_execute(&format!("UPDATE pg_database SET datconnlimit = -2 WHERE datname = '{}'", left.name))
        .unwrap();
    let worker_of = |db: &Database| {
        format!("SELECT count(*) > 0 FROM spend_worker_status WHERE database = '{}'", db.name)
    };
    let refused = format!("cannot connect to invalid database \"{}\"", left.name);
    // One may have been on its way. With each new one another search has begun.
    let counts = [(); 4].map(|()| {
        let next = cluster.database();
        let mut client = next.connect();
        eventually("a new one is found", || holds(&mut client, &worker_of(&next)));
        cluster.log().matches(&refused).count()
    });
    assert_eq!(counts[0], counts[3], "{}", cluster.log_tail());
}

#[test]
fn workers_come_and_go_with_their_databases() {
    let cluster = own_cluster(&[]);
    let workers = |db: &Database| {
        let sql = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = '{}' AND backend_type = 'litellm_spend worker'",
            db.name
        );
        value::<i64>(&mut cluster.connect("postgres"), &sql)
    };
    let (one, two) = (cluster.database(), cluster.database());
    eventually("each database has a worker", || workers(&one) == 1 && workers(&two) == 1);
    let mut client = one.connect();
    client.batch_execute("DROP EXTENSION litellm_spend").unwrap();
    eventually("the worker leaves with the extension", || workers(&one) == 0);
    client.batch_execute("CREATE EXTENSION litellm_spend; SELECT spend_attach()").unwrap();
    eventually("the worker comes with the extension", || workers(&one) == 1);
    wait_until_live(&mut client);

    // A changed setting takes effect without a restart.
    let mut admin = cluster.connect("postgres");
    admin.batch_execute("ALTER SYSTEM SET litellm_spend.merge_interval = '1h'").unwrap();
    admin.batch_execute("SELECT pg_reload_conf()").unwrap();
    // It looks every 50 ms, until it has read that.
    let looks_no_more = format!(
        "SELECT bool_and(state = 'idle' AND state_change < clock_timestamp() - interval '2 s') FROM pg_stat_activity
         WHERE datname = '{}' AND backend_type = 'litellm_spend worker'",
        one.name
    );
    eventually("the worker has the setting", || holds(&mut admin, &looks_no_more));
    client.batch_execute(&insert_rows("a", 10, 2)).unwrap();
    // There is no event to wait for: nothing is merged in the time of many looks.
    std::thread::sleep(std::time::Duration::from_millis(700));
    assert!(
        value::<i64>(&mut client, "SELECT tail_rows FROM spend_rollup_status WHERE rollup = 'daily_spend'")
            > 0
    );
    admin.batch_execute("ALTER SYSTEM RESET litellm_spend.merge_interval").unwrap();
    admin.batch_execute("SELECT pg_reload_conf()").unwrap();
    wait_until_merged(&mut client);
    drop(client);

    // One worker serves a database, whoever is cancelled or terminated.
    let pid = format!(
        "SELECT pid FROM pg_stat_activity WHERE datname = '{}' AND backend_type = 'litellm_spend worker'",
        one.name
    );
    let mut before: i32 = value(&mut admin, &pid);
    let cancels = format!("SELECT count(pg_cancel_backend({before})) FROM generate_series(1, 100)");
    assert_eq!(value::<i64>(&mut admin, &cancels), 100);
    eventually("the worker goes on after a cancel", || {
        holds(
            &mut admin,
            &format!(
                "SELECT state_change > statement_timestamp() - interval '100 ms' FROM pg_stat_activity WHERE pid = {before}"
            ),
        )
    });
    assert_eq!(value::<i32>(&mut admin, &pid), before);
    for _ in 0..2 {
        let launcher = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'litellm_spend launcher'";
        let launched: i32 = value(&mut admin, launcher);
        admin.execute(&format!("SELECT pg_terminate_backend({launched})"), &[]).unwrap();
        eventually("another launcher comes, and another worker", || {
            let workers = admin.query(&pid, &[]).unwrap();
            let came = workers.len() == 1 && workers[0].get::<_, i32>(0) != before;
            let launchers = admin.query(launcher, &[]).unwrap();
            came && launchers.len() == 1 && launchers[0].get::<_, i32>(0) != launched
        });
        before = value(&mut admin, &pid);
    }

    // Databases are renamed, copied and dropped under their workers.
    eventually("a worker is there", || workers(&one) == 1);
    admin.batch_execute(&format!("ALTER DATABASE {} RENAME TO renamed", one.name)).unwrap();
    admin.batch_execute(&format!("ALTER DATABASE renamed RENAME TO {}", one.name)).unwrap();
    eventually("the worker is back", || workers(&one) == 1);
    admin.batch_execute(&format!("CREATE DATABASE copied TEMPLATE {}", one.name)).unwrap();
    eventually("the copy has a worker", || {
        value::<i64>(
            &mut admin,
            "SELECT count(*) FROM pg_stat_activity WHERE datname = 'copied' AND backend_type = 'litellm_spend worker'",
        ) == 1
    });
    let mut copied = cluster.connect("copied");
    copied.batch_execute(&insert_rows("copy", 10, 2)).unwrap();
    assert_exact(&mut copied);
    drop(copied);
    admin.batch_execute("DROP DATABASE copied").unwrap();

    // A database from the default template, while that has the extension and a worker.
    cluster.connect("template1").batch_execute("CREATE EXTENSION litellm_spend").unwrap();
    eventually("template1 has a worker", || {
        value::<i64>(
            &mut admin,
            "SELECT count(*) FROM pg_stat_activity WHERE datname = 'template1' AND backend_type = 'litellm_spend worker'",
        ) == 1
    });
    admin.batch_execute("CREATE ROLE creator LOGIN CREATEDB").unwrap();
    cluster.connect_as("postgres", "creator").batch_execute("CREATE DATABASE from_template1").unwrap();
}

/// A worker that starts shows in pg_stat_activity late: the statement that drops its database cannot end it.
#[test]
fn a_worker_that_starts_leaves_a_database_that_is_being_dropped() {
    let settings = &["litellm_spend.discovery_interval = '1s'", "autovacuum = off"];
    let cluster = own_cluster(settings);
    let mut admin = cluster.connect("postgres");
    let db = cluster.database();
    // Whoever connects from now on stands still for three seconds, just before it shows.
    admin.batch_execute("ALTER SYSTEM SET post_auth_delay = 3").unwrap();
    admin.batch_execute("SELECT pg_reload_conf()").unwrap();
    admin.batch_execute(&format!("CREATE DATABASE short_lived TEMPLATE {}", db.name)).unwrap();
    eventually("its worker starts", || {
        holds(
            &mut admin,
            "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'object' AND classid = 'pg_database'::regclass
             AND objid = (SELECT oid FROM pg_database WHERE datname = 'short_lived'))",
        )
    });
    assert!(holds(
        &mut admin,
        "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = 'short_lived')"
    ));
    admin.batch_execute("DROP DATABASE short_lived").unwrap();
}

#[test]
fn a_worker_with_nothing_to_do_asks_once_a_look_and_notices_what_changes() {
    let settings = ["litellm_spend.merge_interval = '100ms'", "autovacuum = off"];
    let cluster = own_cluster(&settings);
    let db = cluster.database().attached_with_reports();
    let (mut client, mut admin) = (db.connect(), cluster.connect("postgres"));
    let used = format!(
        "SELECT xact_commit, (pg_current_wal_insert_lsn() - '0/0')::bigint FROM pg_stat_database WHERE datname = '{}'",
        db.name
    );
    let mut used = || -> (i64, i64) {
        let row = admin.query_one(&used, &[]).unwrap();
        (row.get(0), row.get(1))
    };
    // There are indexes and policies already: that there are any does not say that there is something to do.
    client
        .batch_execute(
            "CREATE TABLE events (at timestamptz NOT NULL) PARTITION BY RANGE (at);
             SELECT spend_partition_set('events', 'day');
             SELECT spend_index_set(indexes => '{user}', hot => true)",
        )
        .unwrap();
    eventually("the index is built", || {
        holds(
            &mut client,
            "SELECT EXISTS (SELECT FROM pg_class WHERE relname LIKE 'litellm\\_spend\\_user\\_%')",
        )
    });
    // What failed and was dropped is not tried again, for ever.
    client
        .batch_execute(
            "CREATE TABLE failing (id bigserial PRIMARY KEY, k int);
             SELECT spend_rollup_create('failing', 'failing', '{k}', '{sum(1 / k) AS s}');
             INSERT INTO failing (k) VALUES (0)",
        )
        .unwrap();
    eventually("its merge has failed", || {
        holds(&mut client, "SELECT last_error IS NOT NULL FROM spend_rollup_status WHERE rollup = 'failing'")
    });
    client.batch_execute("SELECT spend_rollup_drop('failing'); DROP TABLE failing").unwrap();
    // A round is ten transactions and more, of four looks at the table in a second.
    eventually("a look is one transaction, and writes nothing", || {
        let (commits, wal) = used();
        std::thread::sleep(Duration::from_secs(4));
        let now = used();
        now.0 - commits > 5 && now.0 - commits <= 45 && now.1 == wal
    });

    let changes = [
        (
            r#"DROP TRIGGER litellm_spend_capture_insert ON "LiteLLM_SpendLogs""#,
            "SELECT EXISTS (SELECT FROM pg_trigger WHERE tgname = 'litellm_spend_capture_insert')",
        ),
        (
            "DROP TABLE litellm_spend.hourly_usage_by_tag_rollup CASCADE",
            "SELECT to_regclass('litellm_spend.hourly_usage_by_tag') IS NOT NULL",
        ),
        (
            r#"ALTER TABLE "LiteLLM_SpendLogs" RENAME TO old;
               CREATE TABLE "LiteLLM_SpendLogs" (LIKE old INCLUDING ALL);
               ALTER TABLE "LiteLLM_SpendLogs" OWNER TO litellm"#,
            r#"SELECT relation = '"LiteLLM_SpendLogs"'::regclass FROM litellm_spend.capture"#,
        ),
        (
            "INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation)
             VALUES (CURRENT_DATE, CURRENT_DATE + 1, 'rebuild', 'INSERT')",
            "SELECT NOT EXISTS (SELECT FROM litellm_spend.dirty_range WHERE repaired_at IS NULL)",
        ),
        (
            "SELECT setval('litellm_spend.change_log_seq', 1)",
            "SELECT last_value >= 2000 FROM litellm_spend.change_log_seq",
        ),
        (
            "SELECT spend_index_set(indexes => '{team}', hot => true)",
            "SELECT EXISTS (SELECT FROM pg_class WHERE relname LIKE 'litellm\\_spend\\_team\\_%')",
        ),
        ("DROP TABLE events", "SELECT NOT EXISTS (SELECT FROM litellm_spend.policy)"),
    ];
    for (change, mended) in changes {
        if change.starts_with("SELECT setval") {
            client
                .batch_execute("SELECT nextval('litellm_spend.change_log_seq') FROM generate_series(1, 2000)")
                .unwrap();
            eventually("that far is merged", || {
                holds(
                    &mut client,
                    "SELECT min(watermark) >= 2000 FROM litellm_spend.rollup WHERE source = 'change_log'",
                )
            });
        }
        wait_until_live(&mut client);
        wait_until_merged(&mut client);
        eventually("it settles again", || {
            let before = used();
            std::thread::sleep(Duration::from_secs(1));
            used().1 == before.1
        });
        let logged = cluster.log().len();
        client.batch_execute(change).unwrap();
        let changed = Instant::now();
        eventually(change, || holds(&mut client, mended));
        // Not because nothing is left alone for longer than 60 s; but what fails on a busy machine rests.
        let took = changed.elapsed();
        let failed = cluster.log()[logged..].contains("next try in");
        assert!(failed || took < Duration::from_secs(45), "{change}: after {took:?}");
    }
    wait_until_live(&mut client);
    assert_exact(&mut client);
}

#[test]
fn a_standby_answers_and_a_promoted_one_merges() {
    let cluster = own_cluster(&["wal_level = replica", "fsync = on"]);
    let db = cluster.database().attached_with_reports();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 100, 5)).unwrap();
    wait_until_live(&mut client);
    let standby = cluster.standby();
    let total = r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#;
    let expected: f64 = value(&mut client, total);
    let mut reader = standby.connect(&db.name);
    eventually("the standby has caught up", || value::<f64>(&mut reader, total) == expected);
    let answer: f64 = value(&mut reader, "SELECT sum(spend) FROM monthly_global_spend(30)");
    assert!((answer - expected).abs() < 1e-9);
    assert_eq!(value::<i64>(&mut reader, "SELECT count(*) FROM spend_worker_status"), 0);
    // A read replica answers all of LiteLLM's views, the reports, and the status.
    for view in [
        r#""Last30dKeysBySpend""#,
        r#""Last30dModelsBySpend""#,
        r#""MonthlyGlobalSpendPerKey""#,
        r#""MonthlyGlobalSpendPerUserPerKey""#,
        r#""DailyTagSpend""#,
        "litellm_spend.hourly_usage",
        "litellm_spend.daily_usage_by_tag",
        "spend_rollup_status",
    ] {
        let rows = format!("SELECT count(*) FROM {view}");
        assert!(value::<i64>(&mut reader, &rows) > 0, "{view}");
        assert_eq!(value::<i64>(&mut reader, &rows), value::<i64>(&mut client, &rows), "{view}");
    }
    for view in ["spend_health", "spend_partition_status", "spend_index_status", "spend_progress"] {
        reader.batch_execute(&format!("SELECT * FROM {view}")).unwrap();
    }
    // Totals are compared there, too, also where there are frozen days.
    assert_verified(&mut reader);
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    let frozen = "SELECT frozen_before > '-infinity' FROM litellm_spend.source WHERE name = 'change_log'";
    eventually("days are frozen", || holds(&mut reader, frozen));
    assert_verified(&mut reader);
    for call in [
        "SELECT spend_rollup_create('x', '\"LiteLLM_SpendLogs\"', '{model}', '{count(*) AS n}')",
        "SELECT spend_rollup_window('daily_spend')",
        "SELECT spend_attach()",
        "SELECT spend_detach()",
        "SELECT spend_rollup_run()",
        "CALL spend_backfill()",
        "SELECT * FROM spend_partition_plan()",
        "SELECT * FROM spend_index_plan()",
    ] {
        assert_refused(&mut reader, call, "25006");
    }
    // A lock that is replayed is waited for as one of a session is.
    let check = "SELECT * FROM spend_upgrade_check('1.110')";
    reader.batch_execute(check).unwrap();
    client.batch_execute(r#"BEGIN; LOCK TABLE "LiteLLM_SpendLogs" IN ACCESS EXCLUSIVE MODE"#).unwrap();
    let locked = "SELECT EXISTS (SELECT FROM pg_locks WHERE mode = 'AccessExclusiveLock'
        AND relation = '\"LiteLLM_SpendLogs\"'::regclass)";
    eventually("the lock is replayed", || holds(&mut reader, locked));
    reader.batch_execute("SET litellm_spend.lock_timeout = '200ms'").unwrap();
    assert_refused(&mut reader, check, "55P03");
    client.batch_execute("COMMIT").unwrap();
    reader.batch_execute("SELECT pg_promote()").unwrap();
    eventually("a worker starts", || {
        value::<i64>(&mut reader, "SELECT count(*) FROM spend_worker_status") >= 2
    });
    reader.batch_execute(&insert_rows("b", 100, 5)).unwrap();
    wait_until_merged(&mut reader);
    assert_exact(&mut reader);
}

/// What identifies a view to everybody else, and (`%s`) what it says.
const VIEWS: &str = r#"
    SELECT format('%s %s %s %s %s', c.oid, c.relname, c.relowner::regrole, c.relacl,
                  (SELECT string_agg(attname || ' ' || format_type(atttypid, atttypmod), ', ' ORDER BY attnum)
                   FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0)),
           pg_get_viewdef(c.oid)
    FROM pg_class c WHERE c.relkind = 'v' AND c.relnamespace = 'public'::regnamespace AND c.relname NOT LIKE 'spend%' ORDER BY c.relname"#;

fn views(client: &mut Client) -> Vec<(String, String)> {
    client.query(VIEWS, &[]).unwrap().iter().map(|row| (row.get(0), row.get(1))).collect()
}

#[test]
fn all_seven_views_stay_the_same_objects_and_get_their_own_queries_back() {
    let db = shared().database();
    let mut client = db.connect();
    let seven = r#""MonthlyGlobalSpend", "Last30dKeysBySpend", "Last30dModelsBySpend", "MonthlyGlobalSpendPerKey",
                   "MonthlyGlobalSpendPerUserPerKey", "DailyTagSpend", "Last30dTopEndUsersSpend""#;
    client
        .batch_execute(&format!(
            "DROP ROLE IF EXISTS owner_i; DROP ROLE IF EXISTS reader_i; CREATE ROLE owner_i LOGIN; CREATE ROLE reader_i LOGIN;
             GRANT SELECT ON {seven} TO reader_i;
             CREATE VIEW over_tags AS SELECT * FROM \"DailyTagSpend\"; CREATE VIEW over_keys AS SELECT * FROM \"Last30dKeysBySpend\";
             ALTER VIEW \"Last30dKeysBySpend\" OWNER TO owner_i; GRANT SELECT ON \"LiteLLM_VerificationToken\", \"LiteLLM_SpendLogs\" TO owner_i"
        ))
        .unwrap();
    client.batch_execute(&insert_rows("a", 200, 40)).unwrap();
    let before = views(&mut client);
    assert_eq!(before.len(), 10, "{before:?}");
    attach(&mut client);
    let live = views(&mut client);
    for ((identity, query), (then, own)) in live.iter().zip(&before) {
        assert_eq!(identity, then);
        let ours = query.contains("litellm_spend.");
        // LiteLLM reads this one for each request: it is not ours to touch.
        let others = ["LiteLLM_VerificationTokenView", "over_tags", "over_keys"]
            .iter()
            .any(|name| identity.contains(name));
        assert_eq!(ours, !others, "{identity}");
        assert!(ours || query == own);
    }
    let mut reader = shared().connect_as(&db.name, "reader_i");
    for view in seven.split(',') {
        reader.query(&format!("SELECT * FROM {view}"), &[]).unwrap_or_else(|e| panic!("{view}: {e:?}"));
    }
    drop(reader);
    client.batch_execute("SELECT spend_detach()").unwrap();
    assert_eq!(views(&mut client), before);
    client.batch_execute("DROP OWNED BY owner_i, reader_i CASCADE; DROP ROLE owner_i, reader_i").unwrap();
}

#[test]
fn one_statement_lets_a_dashboard_read_the_reports() {
    let db = shared().database().attached_with_reports();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 50, 3)).unwrap();
    client.batch_execute("DROP ROLE IF EXISTS grafana_j; CREATE ROLE grafana_j LOGIN").unwrap();
    let reports: Vec<String> = client
        .query(
            "SELECT name FROM litellm_spend.rollup UNION SELECT relname::text FROM pg_class
             WHERE relnamespace = 'litellm_spend'::regnamespace AND relkind = 'v' AND relname LIKE 'daily_usage%'",
            &[],
        )
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(reports.len(), 11, "{reports:?}");
    let mut grafana = shared().connect_as(&db.name, "grafana_j");
    let read = |name: &str| format!("SELECT sum(requests) FROM litellm_spend.{name}");
    assert_eq!(error(&mut grafana, &read("hourly_usage")).code().code(), "42501");
    client.batch_execute("SELECT spend_grant_reports('grafana_j')").unwrap();
    for name in &reports {
        grafana.query_one(&read(name), &[]).unwrap();
    }
    assert!(holds(&mut grafana, "SELECT count(*) > 0 FROM monthly_global_spend()"));
    // Names, but no passwords.
    grafana
        .batch_execute(
            r#"SELECT token, key_alias, key_name FROM "LiteLLM_VerificationToken";
               SELECT team_id, team_alias FROM "LiteLLM_TeamTable";
               SELECT user_id, user_alias, user_email FROM "LiteLLM_UserTable""#,
        )
        .unwrap();
    for column in ["password", "*"] {
        let secret = format!(r#"SELECT {column} FROM "LiteLLM_UserTable""#);
        assert_eq!(error(&mut grafana, &secret).code().code(), "42501", "{column}");
    }
    // The raw rows, the state and the tables stay out of reach.
    for table in [
        "litellm_spend.change_log",
        "litellm_spend.hourly_usage_rollup",
        "litellm_spend.rollup",
        "\"LiteLLM_SpendLogs\"",
    ] {
        assert_eq!(error(&mut grafana, &format!("SELECT * FROM {table}")).code().code(), "42501", "{table}");
    }
    assert_eq!(error(&mut client, "SELECT spend_grant_reports('nobody_j')").code().code(), "42704");
    assert_refused(&mut client, "SELECT spend_grant_reports(NULL)", "22004");
    drop(grafana);
    client.batch_execute("DROP OWNED BY grafana_j; DROP ROLE grafana_j").unwrap();
}

#[test]
fn a_role_that_was_granted_something_is_dropped_as_the_documentation_says() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client
        .batch_execute(
            "DROP ROLE IF EXISTS leaver_l; CREATE ROLE leaver_l; SELECT spend_grant_admin('leaver_l');
             SELECT spend_grant_reports('leaver_l')",
        )
        .unwrap();
    assert_eq!(error(&mut client, "DROP ROLE leaver_l").code().code(), "2BP01");
    client.batch_execute("DROP OWNED BY leaver_l; DROP ROLE leaver_l").unwrap();
}

#[test]
fn table_and_extension_may_be_in_any_schema() {
    let db = shared().litellm_database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"CREATE SCHEMA llm AUTHORIZATION litellm; ALTER TABLE "LiteLLM_SpendLogs" SET SCHEMA llm;
               CREATE INDEX ON llm."LiteLLM_SpendLogs" ("startTime");
               CREATE SCHEMA ext; CREATE EXTENSION litellm_spend SCHEMA ext;
               SET search_path = ext"#,
        )
        .unwrap();
    let plan = "SELECT spend_partition_plan()";
    client.batch_execute(plan).unwrap();
    // What to do can be typed, whatever the path is.
    client.batch_execute("SET search_path = pg_catalog").unwrap();
    let error = client.batch_execute("SELECT ext.spend_rollup_rebuild(NULL)").unwrap_err();
    let hint = error.as_db_error().unwrap().hint().unwrap().to_string();
    assert!(hint.contains("SELECT * FROM ext.spend_attach("), "{hint}");
    client.batch_execute("SET search_path = ext; SELECT spend_attach()").unwrap();
    // So it can where the server refuses, and where we do.
    for drop in ["DROP EXTENSION litellm_spend", "DROP EXTENSION litellm_spend CASCADE"] {
        let error = client.batch_execute(drop).unwrap_err();
        let error = error.as_db_error().unwrap();
        assert_eq!(error.code().code(), "2BP01", "{drop}");
        let hint = error.hint().unwrap();
        assert!(hint.starts_with("SELECT * FROM ext.spend_detach(drop_history => true);"), "{drop}: {hint}");
        assert!(!hint.contains(" spend_"), "{drop}: {hint}");
    }
    // Another table of that name is in nobody's way now.
    client
        .batch_execute(
            r#"CREATE SCHEMA old; CREATE TABLE old."LiteLLM_SpendLogs" (LIKE llm."LiteLLM_SpendLogs")"#,
        )
        .unwrap();
    for call in [
        plan,
        "SELECT spend_attach()",
        "CALL spend_backfill()",
        "SELECT spend_rollup_run()",
        "SELECT spend_rollup_rebuild(NULL)",
        "SELECT spend_partition_set(retention => '90 days')",
        "SELECT spend_partition_maintain()",
        "SELECT litellm_spend.maintain_at(NULL, now()::timestamp)",
        "SELECT spend_partition_revert()",
    ] {
        client.batch_execute(call).unwrap_or_else(|e| panic!("{call}: {e:?}"));
    }
    assert!(holds(
        &mut client,
        "SELECT relation = 'llm.\"LiteLLM_SpendLogs\"'::regclass FROM litellm_spend.policy"
    ));
    let held_up = "UPDATE litellm_spend.policy SET blocked = 'x', blocked_since = now() - interval '2 hours'";
    let remedy = "SELECT remedy FROM ext.spend_health WHERE problem LIKE 'maintenance of % is held up'";
    // In one transaction: a round of the worker's that has begun notes what it found.
    client.batch_execute(&format!("BEGIN; {held_up}")).unwrap();
    let remedy: String = value(&mut client, remedy);
    assert!(remedy.starts_with("SELECT * FROM ext.spend_partition_maintain("), "{remedy}");
    client.batch_execute("ROLLBACK").unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    eventually("the attached table is partitioned", || {
        holds(
            &mut client,
            r#"SELECT relkind = 'p' FROM pg_class WHERE oid = 'llm."LiteLLM_SpendLogs"'::regclass"#,
        )
    });
    client.batch_execute("SELECT spend_attach()").unwrap();
    // The worker may be making partitions.
    eventually("it is detached", || client.batch_execute("SELECT spend_detach()").is_ok());
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.capture"), 0);
}

#[test]
fn names_are_granted_only_where_the_caller_may_and_only_the_columns_there_are() {
    let db = shared().litellm_database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"DROP ROLE IF EXISTS other_r, reader_r; CREATE ROLE other_r; CREATE ROLE reader_r LOGIN;
               CREATE SCHEMA llm AUTHORIZATION litellm; ALTER TABLE "LiteLLM_SpendLogs" SET SCHEMA llm;
               ALTER TABLE "LiteLLM_TeamTable" SET SCHEMA llm; ALTER TABLE "LiteLLM_UserTable" SET SCHEMA llm;
               ALTER TABLE llm."LiteLLM_TeamTable" OWNER TO other_r;
               ALTER TABLE llm."LiteLLM_UserTable" RENAME user_alias TO nickname;
               CREATE SCHEMA ext AUTHORIZATION other_r; CREATE EXTENSION litellm_spend SCHEMA ext;
               SELECT ext.spend_attach(); SELECT ext.spend_grant_admin('litellm'); SET search_path = public, ext"#,
        )
        .unwrap();
    wait_until_live(&mut client);
    let mut litellm = db.cluster.connect_as(&db.name, LITELLM);
    let said: Vec<(String, String)> = litellm
        .query("SELECT * FROM ext.spend_grant_reports('reader_r') WHERE object NOT LIKE 'view%'", &[])
        .unwrap()
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect();
    let typed = r#"GRANT SELECT ("team_id", "team_alias") ON TABLE "llm"."LiteLLM_TeamTable" TO "reader_r";"#;
    let closed = r#"left alone, for its owner to type: GRANT USAGE ON SCHEMA "ext" TO "reader_r";"#;
    let expected = [
        (r#"function "ext"."monthly_global_spend"(integer)"#, "may be called by reader_r"),
        (r#"TABLE "llm"."LiteLLM_TeamTable""#, &*format!("left alone, for its owner to type: {typed}")),
        (r#"TABLE "llm"."LiteLLM_UserTable""#, r#"SELECT ("user_id", "user_email") granted to reader_r"#),
        (r#"SCHEMA "llm""#, "USAGE granted to reader_r"),
        (r#"SCHEMA "ext""#, closed),
    ];
    assert_eq!(said.iter().map(|(object, action)| (&**object, &**action)).collect::<Vec<_>>(), expected);
    let mut reader = db.cluster.connect_as(&db.name, "reader_r");
    let teams = r#"SELECT team_id, team_alias FROM llm."LiteLLM_TeamTable""#;
    reader.batch_execute(r#"SELECT user_id, user_email FROM llm."LiteLLM_UserTable""#).unwrap();
    assert_eq!(error(&mut reader, teams).code().code(), "42501");
    // A superuser may act for anybody, who still needs the schema.
    let grant = "SELECT action FROM spend_grant_reports('reader_r') WHERE object LIKE '%TeamTable%'";
    assert_eq!(value::<String>(&mut client, grant), "left alone: permission denied for schema llm");
    client.batch_execute("GRANT USAGE ON SCHEMA llm TO other_r").unwrap();
    client.batch_execute(grant).unwrap();
    reader.batch_execute(teams).unwrap();
    reader.batch_execute("SELECT * FROM ext.monthly_global_spend()").unwrap();
    drop((reader, litellm));
    client.batch_execute("DROP OWNED BY other_r, reader_r CASCADE; DROP ROLE other_r, reader_r").unwrap();
}

/// Who drops what is theirs, however they name themselves.
#[test]
fn drop_owned_by_current_user_is_refused_to_nobody_who_owns_not_the_extension() {
    let db = shared().database().attached();
    let mut client = db.connect();
    let role =
        "DROP ROLE IF EXISTS passer_c; CREATE ROLE passer_c LOGIN; CREATE SCHEMA AUTHORIZATION passer_c";
    client.batch_execute(role).unwrap();
    for name in ["CURRENT_USER", "SESSION_USER", "CURRENT_ROLE", "passer_c"] {
        let mut passer = db.cluster.connect_as(&db.name, "passer_c");
        passer.batch_execute("CREATE TABLE IF NOT EXISTS passer_c.t (i int)").unwrap();
        passer.batch_execute(&format!("DROP OWNED BY {name} CASCADE")).unwrap();
        client.batch_execute("CREATE SCHEMA AUTHORIZATION passer_c").unwrap();
    }
    client.batch_execute("DROP SCHEMA passer_c").unwrap();
    for name in ["CURRENT_USER", "SESSION_USER", "CURRENT_ROLE", "postgres"] {
        assert_refused(&mut client, &format!("DROP OWNED BY {name} CASCADE"), "2BP01");
    }
    // The table would go with its owner's: nothing is to be kept. The server refuses it what others granted.
    let mut litellm = db.cluster.connect_as(&db.name, LITELLM);
    assert_eq!(error(&mut litellm, "DROP OWNED BY CURRENT_USER CASCADE").code().code(), "42501");
    drop_role(&mut client, "passer_c");
}

const WORKER_PID: &str = "SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'litellm_spend worker' AND state = 'idle'";

/// A worker has no role, so that nobody but a superuser may end it.
#[test]
fn the_owner_of_a_database_drops_it_by_force_beside_its_worker() {
    let cluster = shared();
    let mut admin = cluster.connect("postgres");
    admin.batch_execute("DROP ROLE IF EXISTS forcer; CREATE ROLE forcer LOGIN").unwrap();
    let db = cluster.database();
    let worker = format!("SELECT count(*) = 1 FROM ({WORKER_PID}) AS worker");
    eventually("the worker is there", || holds(&mut db.connect(), &worker));
    admin.batch_execute(&format!("ALTER DATABASE {} OWNER TO forcer", db.name)).unwrap();
    let mut owner = cluster.connect_as("postgres", "forcer");
    // A worker that does not end at once.
    let pid: i32 = value(&mut db.connect(), WORKER_PID);
    let signal = |signal: &str| {
        assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
    };
    signal("-STOP");
    std::thread::scope(|scope| {
        let running = scope.spawn(|| owner.batch_execute(&format!("DROP DATABASE {} WITH (FORCE)", db.name)));
        std::thread::sleep(Duration::from_millis(500));
        signal("-CONT");
        running.join().unwrap().unwrap();
    });
    admin.batch_execute("DROP ROLE forcer").unwrap();
    std::mem::forget(db);
}

#[test]
fn only_a_statement_that_needs_the_database_empty_ends_its_worker() {
    let db = shared().database();
    let mut admin = db.cluster.connect("postgres");
    let name = &db.name;
    let pids = format!(
        "SELECT array_agg(pid) FROM pg_stat_activity WHERE datname = '{name}' AND backend_type = 'litellm_spend worker'"
    );
    let worker = |admin: &mut Client| value::<Option<Vec<i32>>>(admin, &pids);
    eventually("it has a worker", || worker(&mut admin).is_some());
    let before = worker(&mut admin);
    let role = "DROP ROLE IF EXISTS passer_e; CREATE ROLE passer_e LOGIN";
    admin.batch_execute(role).unwrap();
    let mut passer = db.cluster.connect_as("postgres", "passer_e");
    admin
        .batch_execute(&format!(
            "ALTER DATABASE {name} CONNECTION LIMIT 200; ALTER DATABASE {name} IS_TEMPLATE true;
             ALTER DATABASE {name} ALLOW_CONNECTIONS true"
        ))
        .unwrap();
    assert_eq!(error(&mut passer, &format!("CREATE DATABASE mine TEMPLATE {name}")).code().code(), "42501");
    assert_eq!(error(&mut passer, &format!("DROP DATABASE {name}")).code().code(), "42501");
    for statement in [
        format!("DROP DATABASE {name}"),
        format!("ALTER DATABASE {name} SET TABLESPACE pg_default"),
        format!("CREATE DATABASE mine TEMPLATE {name}"),
    ] {
        assert_eq!(error(&mut admin, &format!("BEGIN; {statement}")).code().code(), "25001");
        admin.batch_execute("ROLLBACK").unwrap();
    }
    // There is no event to wait for: a worker that was told to end does so at once.
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(worker(&mut admin), before);
    admin.batch_execute(&format!("ALTER DATABASE {name} IS_TEMPLATE false")).unwrap();
    admin.batch_execute(&format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false")).unwrap();
    eventually("its worker has left", || worker(&mut admin).is_none());
    admin.batch_execute(&format!("ALTER DATABASE {name} ALLOW_CONNECTIONS true")).unwrap();
    drop_role(&mut admin, "passer_e");
}

#[test]
fn a_view_that_changes_before_it_is_live_is_noticed_and_waited_for_no_longer() {
    let (_db, mut client) = without_worker();
    client.batch_execute(&insert_rows("a", 50, 5)).unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    let count = "SELECT count(*) FROM litellm_spend.public_view WHERE installed IS NULL";
    assert_eq!(value::<i64>(&mut client, count), 7);
    client
        .batch_execute(
            r#"DROP VIEW "DailyTagSpend";
               CREATE ROLE owner_w; ALTER VIEW "Last30dTopEndUsersSpend" OWNER TO owner_w;
               SET ROLE litellm;
               CREATE OR REPLACE VIEW "Last30dModelsBySpend" AS SELECT 'mine'::text AS model, 7::float8 AS total_spend;
               RESET ROLE"#,
        )
        .unwrap();
    client.batch_execute("CALL spend_backfill()").unwrap();
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    assert_eq!(value::<i64>(&mut client, count), 0);
    let error: String = value(&mut client, "SELECT last_error FROM litellm_spend.capture");
    assert!(error.contains(r#"view "DailyTagSpend" was dropped"#), "{error}");
    let left = r#"view "Last30dTopEndUsersSpend" is left alone: its owner may not read the spend log"#;
    assert!(error.contains(left), "{error}");
    // The others are live; and the last body that it had is what is given back.
    assert!(holds(
        &mut client,
        r#"SELECT (SELECT count(*) FROM litellm_spend.public_view) = 5
               AND NOT EXISTS (SELECT FROM "Last30dModelsBySpend" WHERE model = 'mine')"#
    ));
    client.batch_execute("SELECT spend_detach()").unwrap();
    assert_eq!(value::<f64>(&mut client, r#"SELECT total_spend FROM "Last30dModelsBySpend""#), 7.0);
}

#[test]
fn a_database_that_takes_no_connections_for_a_while_has_no_worker_and_then_one() {
    let cluster = own_cluster(&["litellm_spend.discovery_interval = '1s'"]);
    let db = cluster.database();
    let mut admin = cluster.connect("postgres");
    let workers = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = '{}' AND backend_type = 'litellm_spend worker'",
        db.name
    );
    eventually("it has a worker", || value::<i64>(&mut admin, &workers) == 1);
    let allow =
        |to: bool| format!("UPDATE pg_database SET datallowconn = {to} WHERE datname = '{}'", db.name);
    admin.batch_execute(&allow(false)).unwrap();
    eventually("its worker leaves", || value::<i64>(&mut admin, &workers) == 0);
    admin.batch_execute(&allow(true)).unwrap();
    eventually("one comes", || value::<i64>(&mut admin, &workers) == 1);
    // There is no event to wait for: two searches bring no second one.
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(value::<i64>(&mut admin, &workers), 1);
}

#[test]
fn a_search_leaves_nothing_in_the_launchers_memory() {
    let cluster = own_cluster(&["litellm_spend.discovery_interval = '1s'", "autovacuum = off"]);
    let mut admin = cluster.connect("postgres");
    for n in 0..20 {
        admin.batch_execute(&format!("CREATE DATABASE empty_{n} TEMPLATE template0")).unwrap();
    }
    let launcher = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'litellm_spend launcher'";
    let pid: i32 = value(&mut admin, launcher);
    let mut used = || {
        let begins = cluster.log().len();
        admin.batch_execute(&format!("SELECT pg_log_backend_memory_contexts({pid})")).unwrap();
        let mut bytes = None;
        eventually("it says what it uses", || {
            let log = cluster.log()[begins..].to_string();
            let line =
                log.lines().find(|line| line.contains(" TopMemoryContext: ") && line.ends_with(" used"));
            let words =
                line.map(|line| line.split_whitespace().rev().nth(1).unwrap().parse::<i64>().unwrap());
            bytes = words;
            bytes.is_some()
        });
        bytes.unwrap()
    };
    std::thread::sleep(Duration::from_secs(4));
    let before = used();
    // There is no event to wait for: ten searches of 23 databases.
    std::thread::sleep(Duration::from_secs(15));
    let grown = used() - before;
    assert!(grown < 1500, "{grown} bytes more");
}

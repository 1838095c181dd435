//! Capture never fails LiteLLM's statement, and what it missed is repaired.

mod common;

use common::*;
use postgres::Client;
use std::time::Duration;

/// Rows of the first test statement, whose spend adds up to what the view must show.
fn insert(client: &mut Client, prefix: &str) -> u64 {
    client.execute(&insert_rows(prefix, 20, 3), &[]).unwrap()
}

/// The failure was counted, and the worker has mended what it did.
fn assert_healed(client: &mut Client, errors: i64) {
    assert!(capture_errors(client) >= errors);
    eventually("the damage is repaired", || {
        let idle = "SELECT dirty_ranges = 0 AND backfill_progress = 100 AND tail_rows = 0 AND
                        (SELECT failures_seen FROM litellm_spend.capture) = capture_errors
                    FROM spend_rollup_status WHERE rollup = 'daily_spend'";
        holds(client, idle)
    });
    assert_exact(client);
}

#[test]
fn an_unwritable_change_log_does_not_fail_the_statement() {
    let db = shared().database().attached();
    let mut client = db.connect();
    // As a permission, a constraint or a full disk would.
    make_unwritable(&mut client, "change_log");
    assert_eq!(insert(&mut client, "a"), 20);
    let updated =
        client.execute(r#"UPDATE "LiteLLM_SpendLogs" SET spend = 7 WHERE request_id = 'a1'"#, &[]).unwrap();
    assert_eq!(updated, 1);
    make_writable(&mut client, "change_log");
    assert_healed(&mut client, 2);
}

/// Tables of ours that fail to take a row as they do on a full disk, until the function is dropped.
fn fill_disk(client: &mut Client, tables: &[&str]) {
    let triggers = tables.iter().map(|table| {
        format!("CREATE TRIGGER no_space BEFORE INSERT ON litellm_spend.{table} FOR EACH ROW EXECUTE FUNCTION no_space();")
    });
    client
        .batch_execute(&format!(
            "CREATE FUNCTION no_space() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full'; END $$;
             {}",
            triggers.collect::<String>()
        ))
        .unwrap();
}

#[test]
fn a_full_disk_does_not_fail_the_statement() {
    let db = shared().database().attached();
    let mut client = db.connect();
    fill_disk(&mut client, &["change_log", "dirty_range"]);
    // Not even the failure can be noted: only the sequence has counted it.
    assert_eq!(insert(&mut client, "a"), 20);
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.dirty_range"), 0);
    client.batch_execute("DROP FUNCTION no_space CASCADE").unwrap();
    assert_healed(&mut client, 1);
}

#[test]
fn a_day_that_keeps_a_row_which_nobody_captured_leaving_it_is_said_to_be_wrong() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, "startTime", "endTime", spend)
               SELECT id, 'c', CURRENT_DATE - 3, now(), 1 FROM unnest('{batch,other}'::text[]) AS id;
               INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, "startTime", "endTime", spend)
               SELECT 'before' || i, 'c', CURRENT_DATE - 9, now(), 1 FROM generate_series(1, 20) AS i"#,
        )
        .unwrap();
    wait_until_live(&mut client);
    wait_until_merged(&mut client);
    // What is written before the worker sees it has numbers that count as merged.
    client
        .batch_execute(
            r#"DELETE FROM litellm_spend.change_log; SELECT setval('litellm_spend.change_log_seq', 1);
               UPDATE "LiteLLM_SpendLogs" SET "startTime" = CURRENT_DATE - 2 WHERE request_id = 'batch'"#,
        )
        .unwrap();
    let settled = "SELECT bool_and(dirty_ranges = 0 AND backfill_progress = 100 AND capture_errors = 1)
                       AND (SELECT failures_seen FROM litellm_spend.capture) = 1
                   FROM spend_rollup_status WHERE kind = 'built-in'";
    eventually("all is computed again", || holds(&mut client, settled));
    let unrepairable =
        "SELECT string_agg((CURRENT_DATE - range_start::date) || ' ' || (range_end - range_start), ', ')
                        FROM litellm_spend.dirty_range WHERE unrepairable";
    assert_eq!(value::<String>(&mut client, unrepairable), "3 1 day");
    assert!(holds(&mut client, "SELECT count(*) = 1 FROM litellm_spend.dirty_range"));
    assert!(holds(
        &mut client,
        "SELECT caused_by LIKE 'a statement: its failure%' FROM spend_health WHERE problem LIKE 'totals of%'"
    ));
    client
        .batch_execute("SELECT spend_rollup_rebuild(NULL, CURRENT_DATE - 3, CURRENT_DATE - 2, force => true)")
        .unwrap();
    assert_verified(&mut client);
    assert!(holds(
        &mut client,
        "SELECT bool_and(unrepairable_ranges = 0) FROM spend_rollup_status WHERE kind = 'built-in'"
    ));
}

#[test]
fn a_failure_that_commits_late_is_repaired_when_it_commits() {
    let db = shared().database().attached();
    let (mut client, mut writer) = (db.connect(), db.connect());
    make_unwritable(&mut client, "change_log");
    fill_disk(&mut client, &["dirty_range"]);
    writer.batch_execute("BEGIN").unwrap();
    assert_eq!(insert(&mut writer, "late"), 20);
    wait_for_a_round(&mut client);
    // The number of the failure can be seen, its rows cannot: it must not be taken for repaired.
    assert_eq!(value::<i64>(&mut client, "SELECT failures_seen FROM litellm_spend.capture"), 0);
    writer.batch_execute("COMMIT").unwrap();
    client.batch_execute("BEGIN").unwrap();
    make_writable(&mut client, "change_log");
    client.batch_execute("DROP FUNCTION no_space CASCADE; COMMIT").unwrap();
    assert_healed(&mut client, 1);
}

#[test]
fn days_that_are_to_be_repaired_are_not_frozen_though_their_raw_rows_are_gone() {
    let (_db, mut client) = without_worker();
    let row = |day: i32| {
        format!(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
               VALUES ('old{day}', 'x', 1, CURRENT_DATE - {day}, now())"#
        )
    };
    client.batch_execute(&insert_rows("a", 50, 5)).unwrap();
    client.batch_execute(&row(45)).unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    let covered =
        "SELECT bool_and(covered_from = '-infinity') FROM litellm_spend.rollup WHERE source = 'change_log'";
    let run = |client: &mut Client| client.batch_execute("SELECT spend_rollup_run()").unwrap();
    eventually("all is covered", || {
        run(&mut client);
        holds(&mut client, covered)
    });
    make_unwritable(&mut client, "change_log");
    client.batch_execute(&row(40)).unwrap();
    make_writable(&mut client, "change_log");
    // Its repair fails for now, and both are deleted, as retention does.
    make_unwritable(&mut client, "daily_spend_rollup");
    client.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE request_id LIKE 'old%'"#).unwrap();
    run(&mut client);
    make_writable(&mut client, "daily_spend_rollup");
    let frozen =
        "SELECT frozen_before > CURRENT_DATE - 40 FROM litellm_spend.source WHERE name = 'change_log'";
    eventually("it is repaired, and frozen", || {
        run(&mut client);
        holds(&mut client, frozen)
    });
    assert_eq!(value::<i64>(&mut client, REQUESTS), 52);
    assert!(holds(
        &mut client,
        "SELECT bool_and(unrepairable_ranges = 0) FROM spend_rollup_status WHERE kind = 'built-in'"
    ));
    assert_verified(&mut client);
}

#[test]
fn malformed_request_tags_do_not_fail_the_statement() {
    let db = shared().database().attached();
    let mut client = db.connect();
    for (i, tags) in
        [r#"'"scalar"'"#, r#"'{"a": 1}'"#, "'null'", "NULL", "'[1, [2], null]'", "'[1.0]'", "'[1]'"]
            .iter()
            .enumerate()
    {
        let insert = format!(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime", request_tags)
               VALUES ('t{i}', 'x', 1, now(), now(), {tags})"#
        );
        assert_eq!(client.execute(&insert, &[]).unwrap(), 1, "{tags}");
    }
    assert_eq!(capture_errors(&mut client), 0);
    assert_exact(&mut client);
}

#[test]
fn one_statement_with_equal_tags_of_other_text_keeps_them_apart() {
    let db = shared().database().attached();
    let mut client = db.connect();
    let mut writer = db.connect();
    // A writer in the way keeps the rows in the change log.
    writer.batch_execute("BEGIN").unwrap();
    insert(&mut writer, "open");
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime", request_tags)
               VALUES ('t1', 'x', 1, now(), now(), '[1.0]'), ('t2', 'x', 1, now(), now(), '[1]')"#,
        )
        .unwrap();
    let tags: String = value(
        &mut client,
        "SELECT string_agg(request_tags::text, ' ' ORDER BY request_tags::text) FROM litellm_spend.change_log WHERE spend = 1",
    );
    assert_eq!(tags, "[1.0] [1]");
    writer.batch_execute("ROLLBACK").unwrap();
}

#[test]
fn values_that_only_the_tables_collation_calls_equal_are_groups_of_their_own() {
    let db = shared().database();
    let mut client = db.connect();
    if !holds(&mut client, "SELECT EXISTS (SELECT FROM pg_collation WHERE collprovider = 'i')") {
        return;
    }
    client
        .batch_execute(&format!(
            r#"CREATE COLLATION ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
               {} ALTER TABLE "LiteLLM_SpendLogs" ALTER api_key TYPE text COLLATE ci;
               SELECT spend_attach(on_delete => 'subtract')"#,
            partitioned("")
        ))
        .unwrap();
    wait_until_live(&mut client);
    let keys = "SELECT string_agg(api_key || ' ' || requests, ', ' ORDER BY api_key COLLATE \"C\")
                FROM litellm_spend.daily_spend_by_key";
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, api_key, "startTime", "endTime", spend)
               SELECT key, 'c', key, now(), now(), 1 FROM unnest('{ACME,Acme,other}'::text[]) AS key;
               UPDATE "LiteLLM_SpendLogs" SET api_key = 'acme' WHERE request_id = 'ACME'"#,
        )
        .unwrap();
    wait_until_merged(&mut client);
    assert_eq!(value::<String>(&mut client, keys), "Acme 1, acme 1, other 1");
    assert_verified(&mut client);
    client.batch_execute("SELECT spend_rollup_rebuild(NULL)").unwrap();
    assert_eq!(value::<String>(&mut client, keys), "Acme 1, acme 1, other 1");
    client.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE request_id = 'ACME'"#).unwrap();
    assert_eq!(value::<String>(&mut client, keys), "Acme 1, other 1");
    assert_verified(&mut client);
}

#[test]
fn a_dropped_change_log_does_not_fail_the_statement_and_is_made_again() {
    let db = shared().database().attached();
    let mut client = db.connect();
    insert(&mut client, "before");
    wait_until_merged(&mut client);
    client.batch_execute("DROP TABLE litellm_spend.change_log CASCADE").unwrap();
    assert_eq!(insert(&mut client, "gone"), 20);
    eventually("the change log is back and the view live", || {
        holds(
            &mut client,
            "SELECT to_regclass('litellm_spend.change_log') IS NOT NULL AND 'MonthlyGlobalSpend' = ANY (live_views) AND backfill_progress = 100 FROM spend_rollup_status WHERE rollup = 'daily_spend'",
        )
    });
    insert(&mut client, "after");
    wait_until_merged(&mut client);
    assert_exact(&mut client);
}

#[test]
fn a_capture_that_waits_for_a_lock_gives_up_and_is_repaired() {
    let db = shared().database().attached();
    let (mut client, mut dba) = (db.connect(), db.connect());
    dba.batch_execute("BEGIN; LOCK TABLE litellm_spend.change_log IN ACCESS EXCLUSIVE MODE").unwrap();
    client.batch_execute("SET statement_timeout = '60s'").unwrap();
    assert_eq!(insert(&mut client, "a"), 20);
    dba.batch_execute("COMMIT").unwrap();
    assert_healed(&mut client, 1);
}

#[test]
fn a_dropped_trigger_is_made_again_and_the_gap_is_repaired() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(r#"BEGIN; ALTER TABLE "LiteLLM_SpendLogs" DISABLE TRIGGER ALL"#).unwrap();
    client.batch_execute(&insert_rows("unseen", 50, 5)).unwrap();
    client.batch_execute("COMMIT").unwrap();
    eventually("the triggers are enabled", || {
        holds(
            &mut client,
            r#"SELECT bool_and(tgenabled = 'O') AND count(*) = 4 FROM pg_trigger WHERE tgrelid = '"LiteLLM_SpendLogs"'::regclass"#,
        )
    });
    wait_until_live(&mut client);
    insert(&mut client, "seen");
    assert_exact(&mut client);
}

#[test]
fn rows_that_were_loaded_while_triggers_were_disabled_are_counted_once_they_are_enabled() {
    let db = shared().database().attached();
    let (mut client, mut loader) = (db.connect(), db.connect());
    let load = |prefix: &str| insert_rows(prefix, 50, 5);
    let triggers = |what: &str| format!(r#"ALTER TABLE "LiteLLM_SpendLogs" {what} TRIGGER ALL;"#);
    let counted = |client: &mut Client, rows: i64| {
        eventually("they are counted", || value::<Option<i64>>(client, REQUESTS) == Some(rows));
        wait_until_live(client);
        assert_exact(client);
    };
    // 1. in one transaction, as a restore does that is one.
    client
        .batch_execute(&format!(
            "BEGIN; {} {}; {} COMMIT",
            triggers("DISABLE"),
            load("one"),
            triggers("ENABLE")
        ))
        .unwrap();
    counted(&mut client, 50);
    // 2. in several, by somebody who keeps the worker from mending it meanwhile.
    let lock = r#"LOCK TABLE "LiteLLM_SpendLogs" IN ROW EXCLUSIVE MODE"#;
    loader
        .batch_execute(&format!("BEGIN; {} COMMIT; BEGIN; {lock}; {}", triggers("DISABLE"), load("several")))
        .unwrap();
    let refused = format!(r#"in database "{}": watch failed"#, db.name);
    eventually("the worker could not mend it", || db.cluster.log().contains(&refused));
    loader.batch_execute(&format!("{} COMMIT", triggers("ENABLE"))).unwrap();
    counted(&mut client, 100);
    // What is enabled anyway is not touched by being enabled.
    wait_for_a_round(&mut client);
    let covered = "SELECT bool_and(covered_from = '-infinity') FROM litellm_spend.rollup";
    client.batch_execute(&triggers("ENABLE")).unwrap();
    wait_for_a_round(&mut client);
    assert!(holds(&mut client, covered));
}

#[test]
fn days_of_a_partition_that_was_loaded_while_its_triggers_were_disabled_are_computed_again() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(&(UPSTREAM_SCRIPT.to_string() + ";" + &day_partition("p0", 0))).unwrap();
    attach(&mut client);
    let row = r#"INSERT INTO p0 (request_id, call_type, spend, "startTime", "endTime")
                 VALUES ('r', 'x', 0.5, CURRENT_DATE + interval '1 hour', now());"#;
    client
        .batch_execute(&format!(
            "BEGIN; ALTER TABLE p0 DISABLE TRIGGER ALL; {row} ALTER TABLE p0 ENABLE TRIGGER ALL; COMMIT"
        ))
        .unwrap();
    eventually("it is counted", || value::<Option<i64>>(&mut client, REQUESTS) == Some(1));
    assert_exact(&mut client);
}

/// All that there is, with reports, where no worker runs.
fn attach_by_hand(client: &mut Client) {
    client.batch_execute("SELECT spend_attach(reports => true)").unwrap();
    client.batch_execute("CALL spend_backfill()").unwrap();
}

/// Computes what is there to compute, also what is found in between.
fn run_until_computed(client: &mut Client) {
    for _ in 0..5 {
        client.batch_execute("SELECT spend_rollup_run()").unwrap();
    }
    client.batch_execute("CALL spend_backfill()").unwrap();
}

#[test]
fn a_column_that_is_added_waits_for_who_captured_without_it() {
    let (db, mut client) = without_worker();
    let mut writer = db.connect();
    client.batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" DROP COLUMN IF EXISTS agent_id"#).unwrap();
    attach_by_hand(&mut client);
    client.batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" ADD COLUMN agent_id text"#).unwrap();
    writer
        .batch_execute(
            r#"BEGIN; INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime", agent_id)
                      VALUES ('r', 'x', 0.5, now(), now(), 'agent')"#,
        )
        .unwrap();
    run_until_computed(&mut client);
    writer.batch_execute("COMMIT").unwrap();
    run_until_computed(&mut client);
    assert_verified(&mut client);
    assert!(holds(&mut client, "SELECT bool_or(agent_id = 'agent') FROM litellm_spend.hourly_usage"));
}

/// As after `pg_restore --no-privileges`. Not even the failure is counted then.
#[test]
fn what_is_written_while_capture_may_not_write_to_our_tables_is_computed_again() {
    let (db, mut client) = without_worker();
    let mut writer = db.connect();
    attach_by_hand(&mut client);
    client.batch_execute("SET litellm_spend.lock_timeout = '100ms'").unwrap();
    let mut rows = 0;
    for right in ["USAGE ON SCHEMA", "ALL ON ALL TABLES IN SCHEMA", "ALL ON ALL SEQUENCES IN SCHEMA"] {
        client.batch_execute(&format!("REVOKE {right} litellm_spend FROM litellm")).unwrap();
        writer.batch_execute(&format!("BEGIN; {}", insert_rows(&format!("open {right}"), 20, 3))).unwrap();
        client.batch_execute(&insert_rows(right, 20, 3)).unwrap();
        // Who has written waits for nobody, and is waited for.
        run_until_computed(&mut client);
        writer.batch_execute("COMMIT").unwrap();
        run_until_computed(&mut client);
        rows += 40;
        assert_eq!(value::<i64>(&mut client, REQUESTS), rows, "{right}");
        assert_verified(&mut client);
        client.batch_execute(&insert_rows(&format!("after {right}"), 20, 3)).unwrap();
        run_until_computed(&mut client);
        rows += 20;
        assert_eq!(value::<i64>(&mut client, REQUESTS), rows, "after {right}");
    }
    // Those of the tables.
    assert_eq!(capture_errors(&mut client), 2);
}

const OWNERS_OF_FUNCTIONS: &str = "SELECT string_agg(DISTINCT proowner::regrole::text, ' ') FROM pg_proc
    WHERE pronamespace = 'litellm_spend'::regnamespace AND proname LIKE 'capture\\_%'";

/// The new owner gets the functions in that statement, and its rights later.
#[test]
fn what_is_written_after_reassign_owned_is_computed_again() {
    let (db, mut client) = without_worker();
    attach_by_hand(&mut client);
    client
        .batch_execute(
            "CREATE ROLE heir; GRANT CREATE ON SCHEMA public TO heir; REASSIGN OWNED BY litellm TO heir",
        )
        .unwrap();
    assert_eq!(value::<String>(&mut client, OWNERS_OF_FUNCTIONS), "heir");
    let mut writer = db.connect();
    writer.batch_execute(&format!("BEGIN; {}", insert_rows("open", 20, 3))).unwrap();
    client.batch_execute(&insert_rows("lost", 20, 3)).unwrap();
    client.batch_execute("SET litellm_spend.lock_timeout = '100ms'").unwrap();
    run_until_computed(&mut client);
    writer.batch_execute("COMMIT").unwrap();
    run_until_computed(&mut client);
    client.batch_execute(&insert_rows("after", 20, 3)).unwrap();
    run_until_computed(&mut client);
    assert_eq!(value::<i64>(&mut client, REQUESTS), 60);
    assert_verified(&mut client);
}

/// A superuser may be given the table, but capture does not run with its rights.
#[test]
fn a_table_of_a_superuser_whose_former_owner_was_dropped_is_attached_anew() {
    let (_db, mut client) = without_worker();
    client
        .batch_execute(
            r#"CREATE ROLE gone; GRANT CREATE ON SCHEMA public TO gone; ALTER TABLE "LiteLLM_SpendLogs" OWNER TO gone;
               SELECT spend_attach();
               BEGIN; REASSIGN OWNED BY gone TO postgres; DROP OWNED BY gone; DROP ROLE gone; COMMIT;
               SELECT spend_rollup_run()"#,
        )
        .unwrap();
    let said = "SELECT bool_or(last_error LIKE '%was dropped%' AND last_error LIKE '%spend_attach()%') FROM spend_rollup_status";
    assert!(holds(&mut client, said));
    client.batch_execute("SELECT spend_attach()").unwrap();
    client.batch_execute("CALL spend_backfill()").unwrap();
    client.batch_execute(&insert_rows("a", 20, 3)).unwrap();
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    assert_eq!(value::<i64>(&mut client, REQUESTS), 20);
}

#[test]
fn capture_stays_the_former_owners_when_a_superuser_gets_the_table() {
    let (_db, mut client) = without_worker();
    attach_by_hand(&mut client);
    client.batch_execute("REASSIGN OWNED BY litellm TO postgres; SELECT spend_rollup_run()").unwrap();
    assert_eq!(value::<String>(&mut client, OWNERS_OF_FUNCTIONS), "litellm");
    client.batch_execute(&insert_rows("a", 20, 3)).unwrap();
    client.batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" OWNER TO litellm"#).unwrap();
    run_until_computed(&mut client);
    assert_eq!((value::<i64>(&mut client, REQUESTS), capture_errors(&mut client)), (20, 0));
    assert_verified(&mut client);
}

#[test]
fn a_column_that_the_replaced_table_lacks_is_null_there() {
    let (_db, mut client) = without_worker();
    client.batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" DROP COLUMN IF EXISTS agent_id"#).unwrap();
    client.batch_execute(&insert_rows("old", 50, 5)).unwrap();
    attach_by_hand(&mut client);
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    client
        .batch_execute(
            r#"ALTER TABLE "LiteLLM_SpendLogs" ADD COLUMN agent_id text; SELECT spend_rollup_run();
               INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime", agent_id)
               VALUES ('new', 'x', 0.5, now(), now(), 'agent');
               DELETE FROM "LiteLLM_SpendLogs_legacy" WHERE request_id = 'old1';
               INSERT INTO "LiteLLM_SpendLogs_legacy" (request_id, call_type, spend, "startTime", "endTime")
               VALUES ('old51', 'x', 0.5, now(), now());
               UPDATE "LiteLLM_SpendLogs_legacy" SET spend = 1 WHERE request_id = 'old2'"#,
        )
        .unwrap();
    assert_eq!(capture_errors(&mut client), 0);
    run_until_computed(&mut client);
    assert_verified(&mut client);
    assert_eq!(value::<i64>(&mut client, REQUESTS), 52);
    assert!(holds(&mut client, "SELECT bool_and(covered_from = '-infinity') FROM litellm_spend.rollup"));
}

#[test]
fn days_that_are_to_be_repaired_are_not_frozen_with_those_of_a_truncated_partition() {
    not_at_midnight();
    let (_db, mut client) = without_worker();
    client.batch_execute(&(UPSTREAM_SCRIPT.to_string() + ";" + &day_partition("p2", -2))).unwrap();
    let row = |id: &str, day: i32| {
        format!(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
               VALUES ('{id}', 'x', 0.5, CURRENT_DATE + ({day}) + time '12:00', now());"#
        )
    };
    client.batch_execute(&(row("gone", -2) + &row("stays", -1))).unwrap();
    attach_by_hand(&mut client);
    make_unwritable(&mut client, "change_log");
    client.batch_execute(&row("missed", -3)).unwrap();
    make_writable(&mut client, "change_log");
    client
        .batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE request_id = 'missed'; TRUNCATE p2"#)
        .unwrap();
    run_until_computed(&mut client);
    assert_eq!(value::<i64>(&mut client, REQUESTS), 3);
    assert_verified(&mut client);
    assert!(holds(
        &mut client,
        "SELECT count(*) FILTER (WHERE unrepairable) = 0 FROM litellm_spend.dirty_range"
    ));
}

#[test]
fn a_detach_names_failures_of_which_nothing_but_the_number_is_left() {
    let (_db, mut client) = without_worker();
    attach_by_hand(&mut client);
    fill_disk(&mut client, &["change_log", "dirty_range"]);
    insert(&mut client, "a");
    client.batch_execute("DROP FUNCTION no_space CASCADE").unwrap();
    let said =
        "SELECT bool_or(object = 'ranges of days' AND action LIKE '1 not captured%') FROM spend_detach()";
    assert!(holds(&mut client, said));
    let health = "SELECT bool_or(problem LIKE 'totals of % do not count all%') FROM spend_health";
    assert!(holds(&mut client, health));
}

#[test]
fn retention_keeps_history_and_subtract_subtracts() {
    for (policy, kept) in [("keep", true), ("subtract", false)] {
        let db = shared().database();
        let mut client = db.connect();
        client.batch_execute(&insert_rows("r", 500, 10)).unwrap();
        client.batch_execute(&format!("SELECT spend_attach(on_delete => '{policy}')")).unwrap();
        wait_until_live(&mut client);
        let before: f64 = value(&mut client, r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#);
        // As LiteLLM deletes.
        let deleted = client
            .execute(
                r#"DELETE FROM "LiteLLM_SpendLogs" WHERE request_id IN
                   (SELECT request_id FROM "LiteLLM_SpendLogs" WHERE "startTime" < now() - interval '4 days' LIMIT 1000)"#,
                &[],
            )
            .unwrap();
        assert!(deleted > 100);
        let after: f64 = value(&mut client, r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#);
        if kept {
            assert!((before - after).abs() < 1e-9, "{before} {after}");
            // Also when the days are computed again: the ledger stands for the deleted rows.
            client.batch_execute("SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 4)").unwrap();
            let rebuilt: f64 = value(&mut client, r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#);
            assert!((before - rebuilt).abs() < 1e-9, "{before} {rebuilt}");
            assert_verified(&mut client);
        } else {
            assert!(after < before - 1e-6, "{before} {after}");
            assert_exact(&mut client);
        }
    }
}

#[test]
fn history_is_frozen_and_never_computed_again() {
    let db = shared().database().with_rows("r", 500, 10).attached();
    let mut client = db.connect();
    let total = r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#;
    let before: f64 = value(&mut client, total);
    client.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE "startTime" < date_trunc('day', now() - interval '4 days')"#).unwrap();
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    assert_eq!(
        value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.retired"),
        0,
        "the ledger of frozen days is pruned"
    );
    assert!((before - value::<f64>(&mut client, total)).abs() < 1e-9);
    assert_refused(&mut client, "SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 8)", "55000");
    assert_refused(
        &mut client,
        "SELECT * FROM spend_rollup_verify('daily_spend', CURRENT_DATE - 8)",
        "55000",
    );
    client.batch_execute("SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 2)").unwrap();
    // Late rows still reach their day.
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
               VALUES ('late', 'x', 100, now() - interval '8 days', now())"#,
        )
        .unwrap();
    assert!((before + 100.0 - value::<f64>(&mut client, total)).abs() < 1e-9);
}

#[test]
fn a_deletion_that_was_not_captured_keeps_history_and_freezes_nothing() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 200, 5)).unwrap();
    let total = r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#;
    let before: f64 = value(&mut client, total);
    make_unwritable(&mut client, "retired");
    let deleted = client
        .execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE "startTime" < now() - interval '2 days'"#, &[])
        .unwrap();
    assert!(deleted > 10);
    eventually("the failure is dealt with", || {
        holds(
            &mut client,
            "SELECT capture_errors = 1 AND dirty_ranges = 0 FROM spend_rollup_status WHERE rollup = 'daily_spend'",
        )
    });
    // Also when everything is computed again.
    client.batch_execute("SELECT spend_detach(); SELECT spend_attach()").unwrap();
    wait_until_live(&mut client);
    assert!((before - value::<f64>(&mut client, total)).abs() < 1e-9);
    assert!(holds(
        &mut client,
        "SELECT frozen_before = '-infinity' FROM spend_rollup_status WHERE rollup = 'daily_spend'"
    ));
}

#[test]
fn truncate_keeps_history() {
    let db = shared().database().attached();
    let mut client = db.connect();
    insert(&mut client, "a");
    let total = r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#;
    let before: f64 = value(&mut client, total);
    client.batch_execute(r#"TRUNCATE "LiteLLM_SpendLogs""#).unwrap();
    assert!((before - value::<f64>(&mut client, total)).abs() < 1e-9);
    // The newest row is 37 minutes old: of yesterday, soon after midnight.
    eventually("the days are frozen", || {
        holds(
            &mut client,
            "SELECT frozen_before > now() AT TIME ZONE 'UTC' - interval '37 minutes' FROM spend_rollup_status WHERE rollup = 'daily_spend'",
        )
    });
    assert_refused(&mut client, "SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 2)", "55000");
    insert(&mut client, "b");
    assert!((2.0 * before - value::<f64>(&mut client, total)).abs() < 1e-9);
}

/// A row of that time and of that spend.
fn row(id: &str, time: &str, spend: f64) -> String {
    format!(
        r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
           VALUES ('{id}', 'x', {spend}, {time}, {time});"#
    )
}

/// As if triggers had not seen it.
fn missed(row: &str) -> String {
    format!("SET session_replication_role = replica; {row} RESET session_replication_role")
}

const TODAY: &str = "date_trunc('day', now() AT TIME ZONE 'UTC')";

/// Capture has found out which days TRUNCATE took rows of.
fn wait_until_settled(client: &mut Client) {
    eventually("what was truncated is frozen", || {
        holds(client, "SELECT NOT EXISTS (SELECT FROM litellm_spend.dirty_range WHERE repaired_at IS NULL)")
    });
}

/// The frozen ranges above `frozen_before`.
fn frozen_days(client: &mut Client) -> String {
    value(
        client,
        "SELECT coalesce(string_agg(concat_ws(' ', range_start, range_end), ', ' ORDER BY range_start), '')
         FROM litellm_spend.dirty_range WHERE repair = 'freeze'",
    )
}

fn partitioned_by(client: &mut Client, partitions: &str) {
    client
        .batch_execute(&format!(
            r#"ALTER TABLE "LiteLLM_SpendLogs" RENAME TO plain;
               CREATE TABLE "LiteLLM_SpendLogs" (LIKE plain INCLUDING DEFAULTS, PRIMARY KEY (request_id, "startTime"))
                   PARTITION BY RANGE ("startTime"); {partitions};
               ALTER TABLE "LiteLLM_SpendLogs" OWNER TO litellm"#
        ))
        .unwrap();
}

#[test]
fn a_day_that_is_only_in_the_change_log_is_kept_though_its_partition_is_gone() {
    not_at_midnight();
    let (db, mut client) = without_worker();
    let mut holder = db.connect();
    let partitions = day_partition("next", 5) + &day_partition("oldest", -50);
    client.batch_execute(&(UPSTREAM_SCRIPT.to_string() + ";" + &partitions)).unwrap();
    client.batch_execute(&insert_rows("a", 20, 2)).unwrap();
    attach_by_hand(&mut client);
    // As an open writer does, it keeps the watermark where it is.
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend.change_log IN ROW EXCLUSIVE MODE").unwrap();
    client.batch_execute(&row("gone", "CURRENT_DATE + 5 + time '12:00'", 1.0)).unwrap();
    client.batch_execute("DROP TABLE next").unwrap();
    for rollup in ["NULL", "'daily_spend'", "'daily_spend_by_key'"] {
        let rebuild = format!("SELECT spend_rollup_rebuild({rollup}, CURRENT_DATE + 5, CURRENT_DATE + 6)");
        assert_refused(&mut client, &rebuild, "55000");
    }
    // Nor does a backfill compute it again,
    client.batch_execute("UPDATE litellm_spend.rollup SET covered_from = 'infinity'").unwrap();
    client.batch_execute("SELECT spend_rollup_run(); SELECT spend_rollup_run()").unwrap();
    assert_eq!(value::<i64>(&mut client, REQUESTS), 21);
    holder.batch_execute("COMMIT").unwrap();
    run_until_computed(&mut client);
    assert_eq!(value::<i64>(&mut client, REQUESTS), 21);
    // or a repair.
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend.change_log IN ROW EXCLUSIVE MODE").unwrap();
    client.batch_execute(&row("old", "CURRENT_DATE - 50 + time '12:00'", 1.0)).unwrap();
    client
        .batch_execute(
            "DROP TABLE oldest;
             INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation)
             VALUES (CURRENT_DATE - 50, CURRENT_DATE - 49, 'rebuild', 'UPDATE');
             SELECT spend_rollup_run()",
        )
        .unwrap();
    assert!(holds(&mut client, "SELECT bool_and(unrepairable) FROM litellm_spend.dirty_range"));
    holder.batch_execute("COMMIT").unwrap();
    run_until_computed(&mut client);
    assert_eq!(value::<i64>(&mut client, REQUESTS), 22);
}

#[test]
fn a_first_backfill_computes_the_days_before_one_that_is_only_in_the_change_log() {
    not_at_midnight();
    let (db, mut client) = without_worker();
    let mut holder = db.connect();
    client.batch_execute(&(UPSTREAM_SCRIPT.to_string() + ";" + &day_partition("next", 5))).unwrap();
    client.batch_execute(&insert_rows("a", 20, 2)).unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend.change_log IN ROW EXCLUSIVE MODE").unwrap();
    client.batch_execute(&row("gone", "CURRENT_DATE + 5 + time '12:00'", 1.0)).unwrap();
    client.batch_execute("DROP TABLE next").unwrap();
    client.batch_execute("CALL spend_backfill()").unwrap();
    assert_eq!(value::<i64>(&mut client, REQUESTS), 21);
    holder.batch_execute("COMMIT").unwrap();
    run_until_computed(&mut client);
    assert_eq!(value::<i64>(&mut client, REQUESTS), 21);
}

#[test]
fn who_looks_for_the_oldest_raw_row_locks_no_newer_partition() {
    not_at_midnight();
    let (_db, mut client) = without_worker();
    let partitions: String = (0..6).map(|day| day_partition(&format!("p{day}"), day - 9)).collect();
    client.batch_execute(&(UPSTREAM_SCRIPT.to_string() + ";" + &partitions)).unwrap();
    // One row is older than whatever a retention takes.
    for (id, time) in [("never", "'-infinity'"), ("today", TODAY)] {
        client.batch_execute(&row(id, time, 1.0)).unwrap();
    }
    for day in 1..6 {
        client.batch_execute(&row(&format!("d{day}"), &format!("CURRENT_DATE - {}", 9 - day), 1.0)).unwrap();
    }
    attach_by_hand(&mut client);
    client.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE request_id = 'd1'"#).unwrap();
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    let frozen =
        "SELECT frozen_before = CURRENT_DATE - 7 FROM litellm_spend.source WHERE name = 'change_log'";
    assert!(holds(&mut client, frozen));
    let locked = "SELECT coalesce(string_agg(relation::regclass::text, ' ' ORDER BY relation::regclass::text), '') FROM pg_locks
                  WHERE pid = pg_backend_pid() AND relation::regclass::text ~ '^p[0-9]$'";
    client.batch_execute("BEGIN; SELECT spend_rollup_run()").unwrap();
    assert_eq!(value::<String>(&mut client, locked), "p0 p1 p2");
    client.batch_execute("COMMIT").unwrap();
    // As does a step of a backfill, from both ends: here that of the newest day.
    client
        .batch_execute(
            "BEGIN; UPDATE litellm_spend.rollup SET covered_from = CURRENT_DATE - 4; SELECT spend_rollup_run()",
        )
        .unwrap();
    assert_eq!(value::<String>(&mut client, locked), "p0 p1 p2 p4");
    client.batch_execute("COMMIT").unwrap();
    run_until_computed(&mut client);
    assert_eq!(value::<i64>(&mut client, REQUESTS), 7);
    assert_verified(&mut client);
}

#[test]
fn a_watch_does_not_read_what_an_old_snapshot_keeps_of_the_change_log() {
    let (db, mut client) = without_worker();
    let mut reader = db.connect();
    attach_by_hand(&mut client);
    reader.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1").unwrap();
    client.batch_execute(&insert_rows("a", 5000, 3)).unwrap();
    eventually("all is merged, and trimmed", || {
        client.batch_execute("SELECT spend_rollup_run()").unwrap();
        holds(&mut client, "SELECT NOT EXISTS (SELECT FROM litellm_spend.change_log)")
    });
    // The statistics of a session are there at the latest when it has ended.
    client = db.connect();
    let read = "SELECT idx_tup_read FROM pg_stat_user_indexes
                WHERE schemaname = 'litellm_spend' AND indexrelname = 'change_log_pkey'";
    let mut settled = 0;
    eventually("the statistics are there", || {
        let before = std::mem::replace(&mut settled, value::<i64>(&mut client, read));
        std::thread::sleep(Duration::from_millis(500));
        settled > 0 && settled == before
    });
    db.connect().batch_execute("SELECT spend_rollup_run()").unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let more = value::<i64>(&mut client, read) - settled;
    assert!(more < 1000, "{more} entries of the change log's index were read");
    reader.batch_execute("COMMIT").unwrap();
}

#[test]
fn a_client_whose_encoding_has_no_letter_for_a_message_is_captured_nevertheless() {
    let (_db, mut client) = without_worker();
    client.batch_execute(&insert_rows("a", 20, 2)).unwrap();
    attach_by_hand(&mut client);
    let fails = |tables: [&str; 2]| {
        let triggers = tables.map(|table| {
            format!(
                "CREATE TRIGGER no BEFORE INSERT ON litellm_spend.{table} FOR EACH ROW EXECUTE FUNCTION no();"
            )
        });
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql
             AS $$ BEGIN RAISE EXCEPTION 'нет'; END $$;"
            .to_string()
            + &triggers.concat()
    };
    client.batch_execute(&fails(["change_log", "dirty_range"])).unwrap();
    client.batch_execute("SET client_encoding = 'LATIN1'").unwrap();
    assert_eq!(insert(&mut client, "b"), 20);
    client.batch_execute(r#"TRUNCATE "LiteLLM_SpendLogs""#).unwrap();
    client.batch_execute("RESET client_encoding; DROP FUNCTION no CASCADE").unwrap();
    // A call, too, goes on after a step that failed.
    assert_eq!(insert(&mut client, "c"), 20);
    client.batch_execute(&fails(["daily_spend_rollup", "daily_spend_by_key_rollup"])).unwrap();
    client
        .batch_execute("SET client_encoding = 'LATIN1'; SELECT spend_rollup_run(); RESET client_encoding")
        .unwrap();
    assert!(holds(
        &mut client,
        "SELECT bool_or(last_error LIKE '%нет%') FROM litellm_spend.rollup WHERE name = 'daily_spend'"
    ));
}

#[test]
fn a_partition_that_is_rewritten_meanwhile_freezes_nothing() {
    let (db, mut client) = without_worker();
    partitioned_by(
        &mut client,
        r#"CREATE TABLE old PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
           CREATE TABLE new PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM ('2026-02-01') TO (MAXVALUE)"#,
    );
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
               VALUES ('a', 'x', 1, '2026-01-07', now()), ('b', 'x', 1, '2026-03-07', now());
               SELECT spend_attach()"#,
        )
        .unwrap();
    client.batch_execute("CALL spend_backfill()").unwrap();
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    let mut rewriter = db.connect();
    rewriter.batch_execute("BEGIN; ALTER TABLE old SET UNLOGGED; ALTER TABLE old SET LOGGED").unwrap();
    let run = |runner: &mut Client| runner.batch_execute("SELECT spend_rollup_run()").unwrap();
    while_it_waits(&db, run, |_, _| rewriter.batch_execute("COMMIT").unwrap());
    assert!(holds(
        &mut client,
        "SELECT frozen_before <= '2026-01-07' FROM litellm_spend.source WHERE name = 'change_log'"
    ));
    assert_no_rows(client.query("SELECT * FROM spend_rollup_verify('daily_spend')", &[]).unwrap(), "verify");
}

#[test]
fn truncate_of_a_partition_freezes_its_days_only() {
    let db = shared().database();
    let mut client = db.connect();
    partitioned_by(
        &mut client,
        r#"CREATE TABLE older PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM (MINVALUE) TO ('2024-01-01');
           CREATE TABLE old PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM ('2024-01-01') TO ('2024-02-01');
           CREATE TABLE empty PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM ('2024-02-01') TO ('2024-03-01');
           CREATE TABLE rest PARTITION OF "LiteLLM_SpendLogs" DEFAULT"#,
    );
    for (id, time) in
        [("a", "'2023-05-05'"), ("b", "'2024-01-10'"), ("c", "'2024-01-11 10:00'"), ("d", TODAY)]
    {
        client.batch_execute(&row(id, time, 1.0)).unwrap();
    }
    attach(&mut client);
    // Of an empty one: no day.
    client.batch_execute("TRUNCATE empty").unwrap();
    wait_until_settled(&mut client);
    assert_eq!(frozen_days(&mut client), "");
    // The session's own style of dates is no matter.
    client.batch_execute("SET DateStyle = 'German'; TRUNCATE old; RESET DateStyle").unwrap();
    wait_until_settled(&mut client);
    assert_eq!(frozen_days(&mut client), "2024-01-10 00:00:00 2024-01-12 00:00:00");
    let notices = db.notices("SELECT * FROM spend_rollup_verify('daily_spend')");
    assert!(
        notices.contains("NOTICE") && notices.contains("2024-01-10 00:00:00 to 2024-01-12 00:00:00"),
        "{notices}"
    );
    assert!(notices.contains("HINT"), "{notices}");
    assert_verified(&mut client);
    // What was missed on the other days, before and after, is found and rebuilt.
    for time in ["'2023-05-05'", TODAY] {
        client.batch_execute(&missed(&row(&format!("missed {time}").replace('\'', ""), time, 1.0))).unwrap();
        let sql = format!(
            "SELECT count(*) FROM spend_rollup_verify('daily_spend', {time}, {time}::timestamp + interval '1 day')"
        );
        assert_eq!(value::<i64>(&mut client, &sql), 1, "{time}");
        client
            .batch_execute(&format!(
                "SELECT spend_rollup_rebuild(rollup, {time}, {time}::timestamp + interval '1 day')
             FROM spend_rollup_status WHERE kind = 'built-in'"
            ))
            .unwrap();
    }
    assert_verified(&mut client);
    // The frozen days are neither compared nor computed again, not even in the end by a backfill.
    client.batch_execute(&missed(&row("missed too", "'2024-01-10'", 1.0))).unwrap();
    assert_verified(&mut client);
    assert_refused(&mut client, "SELECT spend_rollup_rebuild('daily_spend', '2024-01-01')", "55000");
    assert_refused(&mut client, "SELECT * FROM spend_rollup_verify('daily_spend', '2024-01-11')", "55000");
    client.batch_execute("SELECT spend_detach(); SELECT spend_attach()").unwrap();
    wait_until_live(&mut client);
    assert_eq!(value::<i64>(&mut client, REQUESTS), 6, "history and all that is there");
    // Unless that is asked for.
    client.batch_execute("SELECT spend_rollup_rebuild('daily_spend', '2024-01-01', force => true)").unwrap();
    assert_eq!(value::<i64>(&mut client, REQUESTS), 5, "what is there");
    assert_verified(&mut client);
}

#[test]
fn truncate_notes_the_days_of_its_partition_whatever_a_backslash_means() {
    let (_db, mut client) = without_worker();
    client.batch_execute(&(UPSTREAM_SCRIPT.to_string() + ";" + &day_partition("p", -2))).unwrap();
    attach_by_hand(&mut client);
    client.batch_execute("SET standard_conforming_strings = off; TRUNCATE p").unwrap();
    assert!(holds(
        &mut client,
        "SELECT bool_and(range_start = CURRENT_DATE - 2 AND range_end = CURRENT_DATE - 1)
         FROM litellm_spend.dirty_range"
    ));
}

#[test]
fn one_row_of_the_far_future_does_not_freeze_what_comes() {
    not_at_midnight();
    for far in ["'9999-12-31 10:00'", "'infinity'"] {
        let db = shared().database();
        let mut client = db.connect();
        for (id, time) in [("a", TODAY), ("b", "'2024-10-05'"), ("c", "'-infinity'"), ("typo", far)] {
            client.batch_execute(&row(id, time, 1.0)).unwrap();
        }
        attach(&mut client);
        client.batch_execute(r#"TRUNCATE "LiteLLM_SpendLogs""#).unwrap();
        let next_week = format!("({TODAY} + interval '7 days')");
        client.batch_execute(&row("captured", &next_week, 1.0)).unwrap();
        wait_until_settled(&mut client);
        let frozen_to_tomorrow = format!(
            "SELECT frozen_before = {TODAY} + interval '1 day' FROM spend_rollup_status WHERE rollup = 'daily_spend'"
        );
        assert!(holds(&mut client, &frozen_to_tomorrow));
        assert!(frozen_days(&mut client).starts_with(far.trim_matches('\'').split(' ').next().unwrap()));
        // Nor do older days without a row.
        client.batch_execute("SELECT spend_rollup_run()").unwrap();
        assert!(holds(&mut client, &frozen_to_tomorrow));
        client.batch_execute(&missed(&row("missed", &next_week, 1.0))).unwrap();
        assert_eq!(
            value::<i64>(&mut client, "SELECT count(*) FROM spend_rollup_verify('daily_spend')"),
            1,
            "{far}"
        );
        client
            .batch_execute(&format!(
                "SELECT spend_rollup_rebuild(rollup, {next_week}, {next_week} + interval '1 day')
                 FROM spend_rollup_status WHERE kind = 'built-in'"
            ))
            .unwrap();
        assert_verified(&mut client);
        assert_eq!(value::<i64>(&mut client, REQUESTS), 6, "{far}");
    }
}

#[test]
fn rows_that_are_truncated_before_they_are_merged_stay_counted() {
    let db = shared().database().attached();
    let (mut client, mut holder) = (db.connect(), db.connect());
    // As an open writer does, it keeps the watermark where it is.
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend.change_log IN ROW EXCLUSIVE MODE").unwrap();
    client.batch_execute(&row("a", "'2024-01-10'", 1.0)).unwrap();
    client.batch_execute(r#"TRUNCATE "LiteLLM_SpendLogs""#).unwrap();
    client.batch_execute(&row("b", TODAY, 1.0)).unwrap();
    wait_until_settled(&mut client);
    assert_verified(&mut client);
    holder.batch_execute("COMMIT").unwrap();
    wait_until_merged(&mut client);
    assert_verified(&mut client);
    assert_eq!(value::<i64>(&mut client, REQUESTS), 2);
}

#[test]
fn a_forced_rebuild_is_proposed_for_days_that_have_raw_rows_and_no_others() {
    not_at_midnight();
    let db = shared().database();
    let mut client = db.connect();
    let at = |day: u32| format!("{TODAY} - interval '{day} days'");
    for day in 1..=7 {
        client.batch_execute(&row(&format!("r{day}"), &at(day), 1.0)).unwrap();
    }
    attach(&mut client);
    client.batch_execute(r#"TRUNCATE "LiteLLM_SpendLogs""#).unwrap();
    wait_until_settled(&mut client);
    // Late ones.
    for day in [7, 1] {
        client.batch_execute(&row(&format!("late{day}"), &at(day), 1.0)).unwrap();
    }
    wait_until_merged(&mut client);
    let notices = db.notices("SELECT * FROM spend_rollup_verify('daily_spend')");
    let calls: Vec<&str> =
        notices.split("SELECT").skip(1).map(|call| call.split(';').next().unwrap()).collect();
    assert_eq!(calls.len(), 2, "{notices}");
    for call in calls {
        client.batch_execute(&format!("SELECT {call}")).unwrap();
    }
    // Of the five days between them nothing is left but what the rollups know.
    assert_eq!(value::<i64>(&mut client, REQUESTS), 7);
}

#[test]
fn rows_that_are_taken_out_and_put_back_are_noticed_and_one_call_counts_them_once() {
    not_at_midnight();
    for (take_out, kind) in [("DELETE FROM", "ledger"), ("TRUNCATE", "frozen days")] {
        let db = shared().database();
        let mut client = db.connect();
        for day in 1..=7 {
            let time = format!("{TODAY} - interval '{day} days'");
            client.batch_execute(&row(&format!("r{day}"), &time, 1.0)).unwrap();
        }
        attach(&mut client);
        let verify = "SELECT * FROM spend_rollup_verify('daily_spend')";
        assert!(!db.notices(verify).contains("still count"));
        client
            .batch_execute(&format!(
                r#"CREATE TABLE aside AS TABLE "LiteLLM_SpendLogs"; {take_out} "LiteLLM_SpendLogs";
                   INSERT INTO "LiteLLM_SpendLogs" TABLE aside"#
            ))
            .unwrap();
        wait_until_settled(&mut client);
        let total = r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#;
        assert_eq!(value::<f64>(&mut client, total), 14.0, "{kind}");
        let notices = db.notices(verify);
        let days = format!("SELECT ({TODAY} - interval '7 days')::text || ' to ' || {TODAY}");
        let days: String = value(&mut client, &days);
        assert!(notices.contains(&format!("still count, beside rows that are there: {days}")), "{notices}");
        // The call that it names.
        let call = notices.split("SELECT").nth(1).unwrap().split("It makes all").next().unwrap();
        assert!(call.contains("NULL") && call.contains("force => true"), "{call}");
        client.batch_execute(&format!("SELECT {call}")).unwrap();
        assert_eq!(value::<f64>(&mut client, total), 7.0, "{kind}");
        assert!(!db.notices(verify).contains("still count"), "{kind}");
        assert_exact(&mut client);
        // Everything goes on as before: what goes now stays as history.
        let delete =
            format!(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE "startTime" < {TODAY} - interval '5 days'"#);
        client.batch_execute(&delete).unwrap();
        client.batch_execute("SELECT spend_rollup_run()").unwrap();
        assert_eq!(value::<f64>(&mut client, total), 7.0, "{kind}");
        assert_verified(&mut client);
        assert_eq!(capture_errors(&mut client), 0);
    }
}

#[test]
fn a_forced_rebuild_of_some_frozen_days_leaves_the_others_frozen() {
    let db = shared().database();
    let mut client = db.connect();
    for day in 1..=7 {
        client.batch_execute(&row(&format!("r{day}"), &format!("'2024-01-0{day}'"), 1.0)).unwrap();
    }
    client.batch_execute("SELECT spend_attach(reports => true)").unwrap();
    wait_until_live(&mut client);
    client.batch_execute(r#"TRUNCATE "LiteLLM_SpendLogs""#).unwrap();
    wait_until_settled(&mut client);
    let forced =
        "SELECT spend_rollup_rebuild('daily_spend_by_key', '2024-01-03', '2024-01-05', force => true)";
    client.batch_execute(forced).unwrap();
    let rebuild = |range: &str| format!("SELECT spend_rollup_rebuild('daily_spend', {range})");
    assert_refused(&mut client, &rebuild("'2024-01-02', '2024-01-03'"), "55000");
    assert_refused(&mut client, &rebuild("'2024-01-05', '2024-01-06'"), "55000");
    client.batch_execute(&rebuild("'2024-01-03', '2024-01-05'")).unwrap();
    for rollup in ["daily_spend", "daily_spend_by_key", "hourly_usage"] {
        let sql = format!("SELECT sum(requests)::bigint FROM litellm_spend.{rollup}");
        assert_eq!(value::<i64>(&mut client, &sql), 5, "{rollup}: all of them forget the same");
    }
    assert_verified(&mut client);
}

#[test]
fn null_and_empty_dimensions_stay_distinct() {
    let db = shared().database().attached();
    let (mut client, mut writer) = (db.connect(), db.connect());
    writer.batch_execute("BEGIN").unwrap();
    insert(&mut writer, "open");
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime", end_user, "user")
               VALUES ('n1', 'x', 1, now(), now(), NULL, ''), ('n2', 'x', 1, now(), now(), '', NULL), ('n3', 'x', 1, now(), now(), '', NULL)"#,
        )
        .unwrap();
    let groups: i64 = value(
        &mut client,
        "SELECT count(DISTINCT (end_user, \"user\")) FROM litellm_spend.change_log WHERE spend = 1",
    );
    assert_eq!(groups, 2);
    let nulls: i64 = value(
        &mut client,
        "SELECT sum(requests)::bigint FROM litellm_spend.change_log WHERE spend = 1 AND end_user IS NULL AND \"user\" = ''",
    );
    assert_eq!(nulls, 1);
    writer.batch_execute("ROLLBACK").unwrap();
}

#[test]
fn an_update_of_metadata_leaves_no_trace() {
    let db = shared().database().attached();
    let mut client = db.connect();
    insert(&mut client, "a");
    wait_until_merged(&mut client);
    let before: i64 = value(&mut client, "SELECT last_value FROM litellm_spend.change_log_seq");
    client.batch_execute(r#"UPDATE "LiteLLM_SpendLogs" SET metadata = '{"x": 1}'"#).unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT last_value FROM litellm_spend.change_log_seq"), before);
}

#[test]
fn a_row_of_infinite_spend_does_not_poison_its_day() {
    let db = shared().database().attached();
    let mut client = db.connect();
    insert(&mut client, "a");
    let total = r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#;
    let before: f64 = value(&mut client, total);
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
               VALUES ('i', 'x', 'Infinity', now(), now()), ('n', 'x', 'NaN', now(), now());
               UPDATE "LiteLLM_SpendLogs" SET spend = 1 WHERE request_id = 'i'"#,
        )
        .unwrap();
    assert!((before + 1.0 - value::<f64>(&mut client, total)).abs() < 1e-9);
    assert_verified(&mut client);
}

#[test]
fn spends_that_add_up_to_more_than_double_precision_do_not_break_the_views() {
    let db = shared().database();
    let mut client = db.connect();
    let yesterday = format!("{TODAY} - interval '1 day'");
    client.batch_execute(&row("small", &yesterday, 1.0)).unwrap();
    // One is already more than 15 digits can say.
    for spend in ["1.7e308", "1.7e308", "1.7976931348623157e308", "-1e300"] {
        client
            .batch_execute(&format!(
                r#"INSERT INTO "LiteLLM_SpendLogs"
                       (request_id, call_type, spend, "startTime", "endTime", api_key, model, end_user, request_tags)
                   SELECT 'huge' || count(*), 'x', {spend}, {TODAY}, {TODAY}, 'k', 'm', 'e', '["t"]' FROM "LiteLLM_SpendLogs""#
            ))
            .unwrap();
    }
    let days = "SELECT string_agg(spend::text, ' ' ORDER BY date) FROM monthly_global_spend()";
    // Before anything is covered the raw rows are added up.
    client.batch_execute("BEGIN; SELECT spend_attach()").unwrap();
    assert_eq!(value::<String>(&mut client, days), "1 Infinity");
    client.batch_execute("COMMIT").unwrap();
    wait_until_live(&mut client);
    let readable = |client: &mut Client| {
        let views = "SELECT name FROM litellm_spend.public_view WHERE installed IS NOT NULL";
        let views: Vec<String> = client.query(views, &[]).unwrap().iter().map(|row| row.get(0)).collect();
        assert_eq!(views.len(), 7);
        for view in views {
            let sql = format!(r#"SELECT count(*) FROM "{view}" AS v WHERE v::text LIKE '%Infinity%'"#);
            assert!(value::<i64>(client, &sql) > 0, "{view}");
        }
        assert_eq!(value::<String>(client, days), "1 Infinity");
        assert_verified(client);
    };
    readable(&mut client);
    // They are gone, and their day is history.
    client.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE request_id LIKE 'huge%'"#).unwrap();
    wait_until_merged(&mut client);
    readable(&mut client);
}

#[test]
fn an_older_litellm_without_optional_columns_attaches() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"DROP VIEW "Last30dTopEndUsersSpend", "DailyTagSpend";
               ALTER TABLE "LiteLLM_SpendLogs" DROP COLUMN agent_id, DROP COLUMN organization_id, DROP COLUMN status,
                   DROP COLUMN request_tags, DROP COLUMN model_group"#,
        )
        .unwrap();
    let insert = r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
                    SELECT 'o' || i, 'x', 1, now(), now() FROM generate_series(1, 10) i"#;
    client.batch_execute(insert).unwrap();
    attach(&mut client);
    client.batch_execute(&insert.replace("'o'", "'p'")).unwrap();
    assert_exact(&mut client);
    // LiteLLM is upgraded: the column is captured from then on.
    client
        .batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" ADD COLUMN agent_id text, ADD COLUMN status text"#)
        .unwrap();
    eventually("the new columns are captured", || {
        holds(&mut client, "SELECT columns @> ARRAY['agent_id', 'status'] FROM litellm_spend.capture")
    });
    client
        .batch_execute(
            &insert
                .replace("'o'", "'q'")
                .replace("call_type, spend", "call_type, status, spend")
                .replace("'x', 1", "'x', 'failure', 1"),
        )
        .unwrap();
    wait_until_live(&mut client);
    assert_exact(&mut client);
    let failed: i64 =
        value(&mut client, "SELECT sum(failed_requests)::bigint FROM litellm_spend.daily_spend");
    assert_eq!(failed, 10);
}

/// LiteLLM's table, partitioned without a primary key, which is what lets a foreign table be a partition.
fn partitioned_by_hand(db: &Database) -> Client {
    let mut client = db.connect();
    let directory = db.cluster.dir.display();
    client
        .batch_execute(&format!(
            r#"CREATE EXTENSION postgres_fdw;
               CREATE SERVER cold FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '{directory}', port '{PORT}', dbname '{}');
               CREATE USER MAPPING FOR PUBLIC SERVER cold OPTIONS (user 'postgres', password_required 'false');
               GRANT USAGE ON FOREIGN SERVER cold TO litellm;
               SET ROLE litellm;
               CREATE TABLE hot (LIKE "LiteLLM_SpendLogs" INCLUDING DEFAULTS) PARTITION BY RANGE ("startTime");
               CREATE TABLE hot_rest PARTITION OF hot DEFAULT;
               RESET ROLE;
               CREATE TABLE cold_logs (LIKE "LiteLLM_SpendLogs");
               DROP TABLE "LiteLLM_SpendLogs" CASCADE;
               ALTER TABLE hot RENAME TO "LiteLLM_SpendLogs""#,
            db.name
        ))
        .unwrap();
    client
}

/// A foreign table for the rows of one month that are kept elsewhere.
const COLD: &str = r#"SET ROLE litellm; CREATE FOREIGN TABLE frozen PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM ('2026-01-01')
    TO ('2026-02-01') SERVER cold OPTIONS (table_name 'cold_logs'); RESET ROLE"#;

/// Statements that reach it. (PostgreSQL itself refuses MERGE there.)
const REACH: [&str; 3] = [
    r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
       VALUES ('c1', 'c', 1, '2026-01-05', '2026-01-05'), ('c2', 'c', 1, '2026-01-06', '2026-01-06')"#,
    r#"UPDATE "LiteLLM_SpendLogs" SET spend = 3 WHERE request_id = 'c1'"#,
    r#"DELETE FROM "LiteLLM_SpendLogs" WHERE "startTime" < '2026-01-06' AND request_id = 'c1'"#,
];

#[test]
fn a_table_with_a_foreign_partition_is_refused_and_its_statements_go_on() {
    let db = shared().database();
    let mut client = partitioned_by_hand(&db);
    client.batch_execute(COLD).unwrap();
    assert_refused(&mut client, "SELECT spend_attach()", "0A000");
    let refused = error(&mut client, "SELECT spend_attach()");
    assert!(refused.message().contains("frozen"), "{refused:?}");
    for statement in REACH {
        client.batch_execute(statement).unwrap();
    }
    client.batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" DETACH PARTITION frozen"#).unwrap();
    client.batch_execute(&insert_rows("a", 50, 5)).unwrap();
    attach(&mut client);
    assert_exact(&mut client);
}

#[test]
fn statements_go_on_when_a_foreign_partition_comes_and_capture_when_it_goes() {
    let db = shared().database();
    let mut client = partitioned_by_hand(&db);
    client.batch_execute(&insert_rows("a", 50, 5)).unwrap();
    attach(&mut client);
    let suspended = r#"SELECT bool_and(last_error LIKE '%"LiteLLM_SpendLogs" cannot be captured while %frozen%')
                              AND bool_and(covered_from = 'infinity') AND bool_and(live_views IS NULL)
                       FROM spend_rollup_status"#;
    for round in ["b", "c"] {
        client.batch_execute(COLD).unwrap();
        for statement in REACH {
            client.batch_execute(statement).unwrap();
        }
        eventually("the status says that nothing is captured", || holds(&mut client, suspended));
        // What is asked meanwhile is answered from the table.
        client.batch_execute(&insert_rows(round, 50, 5)).unwrap();
        assert_no_rows(client.query(VIEW_AGAINST_RAW, &[]).unwrap(), "view and raw rows differ");
        let differ = "SELECT date FROM monthly_global_spend(30) AS m FULL JOIN \"MonthlyGlobalSpend\" AS v USING (date)
                      WHERE round(m.spend::numeric, 9) IS DISTINCT FROM round(v.spend::numeric, 9)";
        assert_no_rows(client.query(differ, &[]).unwrap(), "function and view differ");
        for call in ["SELECT spend_attach()", "CALL spend_backfill()"] {
            assert_refused(&mut client, call, "0A000");
        }
        client.batch_execute("DROP FOREIGN TABLE frozen; DELETE FROM cold_logs").unwrap();
        client.batch_execute(&insert_rows(&format!("after {round}"), 50, 5)).unwrap();
        wait_until_live(&mut client);
        client.batch_execute(&insert_rows(&format!("live {round}"), 50, 5)).unwrap();
        wait_until_merged(&mut client);
        assert_exact(&mut client);
        assert!(holds(&mut client, "SELECT bool_and(last_error IS NULL) FROM spend_rollup_status"));
    }
    client.batch_execute(COLD).unwrap();
    eventually("the status says that nothing is captured", || holds(&mut client, suspended));
    client.batch_execute("SELECT spend_detach()").unwrap();
    client.batch_execute(REACH[0]).unwrap();
}

#[test]
fn the_statement_that_brings_a_foreign_partition_makes_way_for_it_or_warns() {
    let db = shared().database();
    let mut client = partitioned_by_hand(&db);
    client.batch_execute(COLD).unwrap();
    client
        .batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" DETACH PARTITION frozen; SELECT spend_attach()"#)
        .unwrap();
    wait_until_live(&mut client);
    let attach = |table: &str| {
        format!(
            r#"ALTER TABLE {table} ATTACH PARTITION frozen FOR VALUES FROM ('2026-01-01') TO ('2026-02-01')"#
        )
    };
    let silent =
        "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'litellm_spend_capture_%' AND tgqual IS NOT NULL";
    // In the same transaction, by the owner, under any isolation. With it goes what was done for it.
    client.batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE; SET LOCAL ROLE litellm; SELECT 1").unwrap();
    client.batch_execute(&attach(r#""LiteLLM_SpendLogs""#)).unwrap();
    for statement in REACH {
        client.batch_execute(statement).unwrap();
    }
    assert_eq!(value::<i64>(&mut client, silent), 3);
    client.batch_execute("ROLLBACK").unwrap();
    assert_eq!(value::<i64>(&mut client, silent), 0);
    // Below a partition of its own, too.
    client
        .batch_execute(
            r#"BEGIN; SET LOCAL ROLE litellm;
               CREATE TABLE winter (LIKE "LiteLLM_SpendLogs") PARTITION BY RANGE ("startTime");"#,
        )
        .unwrap();
    client.batch_execute(&attach("winter")).unwrap();
    client
        .batch_execute(
            r#"ALTER TABLE "LiteLLM_SpendLogs" ATTACH PARTITION winter FOR VALUES FROM ('2025-11-01') TO ('2026-03-01')"#,
        )
        .unwrap();
    client.batch_execute(REACH[0]).unwrap();
    client.batch_execute("ROLLBACK").unwrap();
    // A writer is in the way: the statement succeeds without us, and the watch comes later.
    let mut writer = db.connect();
    writer.batch_execute(r#"BEGIN; LOCK TABLE ONLY "LiteLLM_SpendLogs" IN ROW EXCLUSIVE MODE"#).unwrap();
    let notices = db.notices(&format!(
        r#"SET litellm_spend.lock_timeout = '50ms'; {}; SHOW lock_timeout"#,
        attach(r#""LiteLLM_SpendLogs""#)
    ));
    assert!(
        notices.contains("WARNING") && notices.contains("could not look for foreign partitions"),
        "{notices}"
    );
    assert!(holds(&mut client, "SELECT relispartition FROM pg_class WHERE relname = 'frozen'"));
    writer.batch_execute("COMMIT").unwrap();
    eventually("the watch has made way", || client.batch_execute(REACH[0]).is_ok());
}

#[test]
fn truncate_of_a_default_partition_leaves_the_days_of_others_alone() {
    let db = shared().database();
    let mut client = db.connect();
    if !knows_merge(&mut client) {
        return;
    }
    // Its rows may be of the 16th: the bounds of another end at noon.
    partitioned_by(
        &mut client,
        r#"CREATE TABLE first PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM (MINVALUE) TO ('2026-11-01');
           CREATE TABLE early PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM ('2026-11-01') TO ('2026-11-15');
           CREATE TABLE late PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM ('2026-11-15') TO ('2026-11-16 12:00');
           CREATE TABLE rest PARTITION OF "LiteLLM_SpendLogs" DEFAULT"#,
    );
    for (id, day) in [
        ("z", "2026-10-02"),
        ("a", "2026-11-02"),
        ("b", "2026-11-16"),
        ("c", "2026-11-16 13:00"),
        ("d", "2026-11-20"),
    ] {
        client.batch_execute(&row(id, &format!("'{day}'"), 1.0)).unwrap();
    }
    attach(&mut client);
    // Before the worker can look: the day that a row comes to still lacks it.
    client
        .batch_execute(
            r#"BEGIN;
               MERGE INTO "LiteLLM_SpendLogs" AS t USING (VALUES ('d')) AS s(id) ON t.request_id = s.id
                   WHEN MATCHED THEN UPDATE SET "startTime" = '2026-11-02';
               TRUNCATE rest;
               COMMIT"#,
        )
        .unwrap();
    wait_until_settled(&mut client);
    let days =
        "SELECT string_agg(date || ' ' || requests, ', ' ORDER BY date) FROM litellm_spend.daily_spend";
    assert_eq!(value::<String>(&mut client, days), "2026-10-02 1, 2026-11-02 2, 2026-11-16 2, 2026-11-20 1");
    // Of the day that it left nobody can say what it lost by which: that is said.
    let unrepairable =
        "SELECT string_agg(range_start::date::text, ' ') FROM litellm_spend.dirty_range WHERE unrepairable";
    assert_eq!(value::<String>(&mut client, unrepairable), "2026-11-20");
    assert_eq!(
        frozen_days(&mut client),
        "2026-11-16 00:00:00 2026-11-17 00:00:00, 2026-11-20 00:00:00 2026-11-21 00:00:00"
    );
    assert_verified(&mut client);
    // A snapshot from before a partition was detached says that the default one holds nothing of its days.
    let mut older = db.connect();
    older.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1").unwrap();
    client
        .batch_execute(&format!(
            r#"ALTER TABLE "LiteLLM_SpendLogs" DETACH PARTITION early; {}"#,
            row("e", "'2026-11-03'", 1.0)
        ))
        .unwrap();
    older.batch_execute("TRUNCATE rest; COMMIT").unwrap();
    wait_until_settled(&mut client);
    assert!(
        frozen_days(&mut client).contains("2026-11-02 00:00:00 2026-11-04 00:00:00"),
        "{}",
        frozen_days(&mut client)
    );
    assert_verified(&mut client);
}

/// LiteLLM's table, partitioned, with what a MERGE can do to it.
fn merge_beside(on_delete: &str, partition: &str) {
    let db = shared().database();
    let mut client = db.connect();
    if !knows_merge(&mut client) {
        return;
    }
    client
        .batch_execute(&format!("{} SELECT spend_attach(on_delete => '{on_delete}')", partitioned(partition)))
        .unwrap();
    wait_until_live(&mut client);
    let insert = |ids: &str, day: &str| {
        format!(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, "startTime", "endTime", spend)
               SELECT id, 'c', '{day}', '{day}', 10 ^ substr(id, 2)::int FROM unnest('{{{ids}}}'::text[]) AS id"#
        )
    };
    let merge = |ids: &str, actions: &str| {
        format!(
            r#"MERGE INTO "LiteLLM_SpendLogs" AS t USING unnest('{{{ids}}}'::text[]) AS s(id) ON t.request_id = s.id {actions}"#
        )
    };
    let not_matched = r#"WHEN NOT MATCHED THEN INSERT (request_id, call_type, "startTime", "endTime", spend)
                         VALUES (s.id, 'c', '2026-11-04', '2026-11-04', 10 ^ substr(s.id, 2)::int)"#;
    client.batch_execute(&insert("m0,m1,m2,m3,m4,m5", "2026-11-20")).unwrap();
    for statement in [
        // An UPDATE only; all three actions, of which one deletes; two of them; and what is no MERGE.
        merge("m0", "WHEN MATCHED THEN UPDATE SET \"startTime\" = '2026-11-02'"),
        merge(
            "m1,m5,m6",
            &format!(
                "WHEN MATCHED AND s.id = 'm5' THEN DELETE WHEN MATCHED THEN UPDATE SET \"startTime\" = '2026-11-03' {not_matched}"
            ),
        ),
        merge(
            "m2,m7",
            &format!("WHEN MATCHED THEN UPDATE SET \"startTime\" = '2026-11-05', spend = 7 {not_matched}"),
        ),
        r#"UPDATE "LiteLLM_SpendLogs" SET "startTime" = '2026-11-06' WHERE request_id = 'm3'"#.into(),
        // Within a partition, and back and forth in one transaction, and then deleted.
        merge("m4", "WHEN MATCHED THEN UPDATE SET \"startTime\" = '2026-11-21'"),
        format!(
            "BEGIN; {}; SAVEPOINT s; {}; ROLLBACK TO s; DELETE FROM \"LiteLLM_SpendLogs\" WHERE request_id = 'm7'; COMMIT",
            merge("m6", "WHEN MATCHED THEN UPDATE SET \"startTime\" = '2026-11-22'"),
            merge("m4", "WHEN MATCHED THEN UPDATE SET \"startTime\" = '2026-11-01'"),
        ),
    ] {
        client.batch_execute(&statement).unwrap();
    }
    wait_until_merged(&mut client);
    eventually("nothing is dirty", || {
        holds(&mut client, "SELECT bool_and(dirty_ranges = 0) FROM spend_rollup_status")
    });
    // Under keep, what was deleted stays: m5 on the 20th, m7 on the 4th.
    let kept = "SELECT coalesce(sum(spend), 0)::float8 FROM litellm_spend.daily_spend WHERE date = ";
    let expected = if on_delete == "keep" { (1e5, 1e7) } else { (0.0, 0.0) };
    assert_eq!(value::<f64>(&mut client, &format!("{kept}'2026-11-20'")), expected.0);
    assert_eq!(value::<f64>(&mut client, &format!("{kept}'2026-11-04'")), expected.1);
    let days = r#"SELECT date::text, sum(spend)::text FROM litellm_spend.daily_spend WHERE date NOT IN ('2026-11-20', '2026-11-04')
                  GROUP BY 1 HAVING sum(requests) <> 0
                  EXCEPT SELECT date("startTime")::text, sum(spend::numeric)::text FROM "LiteLLM_SpendLogs" GROUP BY 1"#;
    assert_no_rows(client.query(days, &[]).unwrap(), "days differ");
    assert_eq!(value::<i64>(&mut client, REQUESTS), if on_delete == "keep" { 8 } else { 6 });
    assert_verified(&mut client);
    assert_eq!(capture_errors(&mut client), 0);
    // An UPDATE alone has nothing computed again.
    client
        .batch_execute(
            r#"BEGIN;
               UPDATE "LiteLLM_SpendLogs" SET "startTime" = '2026-11-07', spend = 1 WHERE request_id = 'm4'"#,
        )
        .unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.dirty_range"), 0);
    client.batch_execute("ROLLBACK; SELECT spend_detach(drop_history => true)").unwrap();
    let left = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'litellm_spend%'";
    assert_eq!(value::<i64>(&mut client, left), 0);
}

#[test]
fn a_merge_that_moves_a_row_is_captured_as_a_move() {
    merge_beside("keep", BY_TIME);
}

#[test]
fn a_merge_that_moves_a_row_is_captured_as_a_move_where_deletions_subtract() {
    merge_beside("subtract", BY_TIME);
}

#[test]
fn an_update_in_a_trigger_of_one_that_moves_a_row_is_taken_for_no_merge() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(&format!(
            r#"{} SELECT spend_attach();
               CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                   UPDATE public."LiteLLM_SpendLogs" SET spend = 7 WHERE request_id = 'b'; RETURN NEW; END $$;
               CREATE TRIGGER touch BEFORE UPDATE ON p1 FOR EACH ROW WHEN (OLD.request_id = 'a')
                   EXECUTE FUNCTION touch();
               INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, "startTime", "endTime", spend)
               SELECT id, 'c', '2026-11-05', now(), 1 FROM unnest('{{a,b}}'::text[]) AS id"#,
            partitioned(BY_TIME)
        ))
        .unwrap();
    client
        .batch_execute(
            r#"BEGIN; UPDATE "LiteLLM_SpendLogs" SET "startTime" = '2026-11-20' WHERE request_id = 'a'"#,
        )
        .unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.dirty_range"), 0);
    client.batch_execute("COMMIT").unwrap();
    wait_until_live(&mut client);
    wait_until_merged(&mut client);
    let days = "SELECT string_agg(date || ' ' || requests || ' ' || spend, ', ' ORDER BY date) FROM litellm_spend.daily_spend";
    assert_eq!(value::<String>(&mut client, days), "2026-11-05 1 7, 2026-11-20 1 1");
    assert_verified(&mut client);
}

#[test]
fn a_merge_that_moves_a_row_is_captured_whatever_the_table_is_partitioned_by() {
    merge_beside(
        "keep",
        r#"PARTITION BY HASH ((date("startTime")));
           CREATE TABLE h0 PARTITION OF "LiteLLM_SpendLogs" FOR VALUES WITH (MODULUS 3, REMAINDER 0);
           CREATE TABLE h1 PARTITION OF "LiteLLM_SpendLogs" FOR VALUES WITH (MODULUS 3, REMAINDER 1);
           CREATE TABLE h2 PARTITION OF "LiteLLM_SpendLogs" FOR VALUES WITH (MODULUS 3, REMAINDER 2) PARTITION BY RANGE (spend);
           CREATE TABLE h2_rest PARTITION OF h2 DEFAULT"#,
    );
}

#[test]
fn a_merge_that_moves_a_row_and_whose_capture_fails_is_repaired_on_both_days() {
    let db = shared().database();
    let (mut client, mut other) = (db.connect(), db.connect());
    if !knows_merge(&mut client) {
        return;
    }
    let rows = r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, "startTime", "endTime", spend)
                  SELECT id, 'c', '2026-11-05', now(), 1 FROM unnest('{a,b,c,d}'::text[]) AS id;"#;
    client.batch_execute(&format!("{} SELECT spend_attach()", partitioned(BY_TIME))).unwrap();
    wait_until_live(&mut client);
    client.batch_execute(rows).unwrap();
    wait_until_merged(&mut client);
    let merge = |ids: &str, actions: &str| {
        format!(
            r#"MERGE INTO "LiteLLM_SpendLogs" AS t USING unnest('{{{ids}}}'::text[]) AS s(id) ON t.request_id = s.id
                   {actions}"#
        )
    };
    let moves =
        r#"WHEN MATCHED AND s.id <> 'b' THEN UPDATE SET "startTime" = "startTime" + interval '15 days'"#;
    let assert_right = |client: &mut Client, expected: &str| {
        eventually("the days are repaired", || {
            let settled =
                "SELECT bool_and(dirty_ranges = 0 AND unrepairable_ranges = 0 AND backfill_progress = 100)
                               AND (SELECT failures_seen FROM litellm_spend.capture) = max(capture_errors)
                           FROM spend_rollup_status WHERE kind = 'built-in'";
            holds(client, settled)
        });
        let days = "SELECT string_agg(date || ' ' || requests || ' ' || spend, ', ' ORDER BY date)
                    FROM (SELECT date, sum(requests) AS requests, sum(spend)::int AS spend
                          FROM litellm_spend.daily_spend GROUP BY 1) AS days";
        assert_eq!(value::<String>(client, days), expected);
        assert_verified(client);
    };
    // One row moves; that another stays is what cannot be written.
    make_unwritable(&mut client, "change_log");
    client.batch_execute(&merge("a,b", &format!("{moves} WHEN MATCHED THEN UPDATE SET spend = 2"))).unwrap();
    make_writable(&mut client, "change_log");
    assert_right(&mut client, "2026-11-05 3 4, 2026-11-20 1 1");
    // All rows move, so there is none to write. Everything stays covered: the failure is noted.
    client
        .batch_execute(
            "CREATE TABLE uncovered (); CREATE FUNCTION uncovered() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO uncovered DEFAULT VALUES; RETURN NEW; END $$;
        GRANT INSERT ON uncovered TO PUBLIC;
        CREATE TRIGGER uncovered BEFORE UPDATE ON litellm_spend.rollup FOR EACH ROW
            WHEN (NEW.covered_from = 'infinity') EXECUTE FUNCTION public.uncovered()",
        )
        .unwrap();
    other.batch_execute("BEGIN; LOCK TABLE litellm_spend.change_log IN ACCESS EXCLUSIVE MODE").unwrap();
    client.batch_execute(&merge("c,d", moves)).unwrap();
    other.batch_execute("ROLLBACK").unwrap();
    assert_right(&mut client, "2026-11-05 1 2, 2026-11-20 3 3");
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM uncovered"), 0);
    assert_eq!(capture_errors(&mut client), 2);
}

#[test]
fn a_detach_puts_right_what_was_not_captured_before_nobody_can() {
    let db = shared().database();
    let mut client = db.connect();
    if !knows_merge(&mut client) {
        return;
    }
    client
        .batch_execute(&format!(
            r#"{} INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, "startTime", "endTime", spend)
                   SELECT 'm' || i, 'c', '2026-11-05', now(), 1 FROM generate_series(1, 10) AS i"#,
            partitioned(BY_TIME)
        ))
        .unwrap();
    attach(&mut client);
    let days =
        "SELECT string_agg(date || ' ' || requests, ', ' ORDER BY date) FROM litellm_spend.daily_spend";
    // It is noted, and would be repaired by the worker a moment later.
    client
        .batch_execute(
            r#"BEGIN; MERGE INTO "LiteLLM_SpendLogs" AS t USING (VALUES ('m1')) AS s(id) ON t.request_id = s.id
                   WHEN MATCHED THEN UPDATE SET "startTime" = '2026-11-20';
               SELECT spend_detach(); COMMIT"#,
        )
        .unwrap();
    assert_eq!(value::<String>(&mut client, days), "2026-11-05 9, 2026-11-20 1");
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.dirty_range"), 0);

    // What cannot be put right is said then, and by whoever attaches again.
    attach(&mut client);
    client
        .batch_execute(
            "BEGIN; INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation, message)
                 VALUES ('2026-11-05', '2026-11-06', 'rebuild', 'INSERT', 'planted');
             SET LOCAL session_replication_role = replica",
        )
        .unwrap();
    client.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE request_id = 'm2'"#).unwrap();
    let said =
        "SELECT count(*) FROM spend_detach() WHERE object = 'ranges of days' AND action ~ '^1 not captured'";
    assert_eq!(value::<i64>(&mut client, said), 1);
    client.batch_execute("COMMIT").unwrap();
    attach(&mut client);
    assert_eq!(value::<String>(&mut client, days), "2026-11-05 9, 2026-11-20 1", "history is kept");
    let named = "SELECT count(*) FROM spend_health WHERE problem ~ 'totals of 2026-11-05 do not count all'";
    assert_eq!(value::<i64>(&mut client, named), 1);
}

#[test]
fn a_time_that_gets_a_zone_is_not_captured_until_it_has_none_again() {
    let db = shared().database().with_rows("a", 20, 3).attached();
    let mut client = db.connect();
    wait_until_live(&mut client);
    let zoned = |r#type: &str| {
        format!(
            r#"ALTER TABLE "LiteLLM_SpendLogs" ALTER "startTime" TYPE {} USING "startTime" AT TIME ZONE 'UTC'"#,
            r#type
        )
    };
    client.batch_execute("SET TimeZone = 'America/New_York'").unwrap();
    client.batch_execute(&zoned("timestamptz")).unwrap();
    // Of the 30th, which is the 29th in the writer's zone, and the end of which its day is to be noted by.
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, "startTime", "endTime", spend)
               VALUES ('zoned', 'c', '2026-10-30 01:30+00', now(), 1)"#,
        )
        .unwrap();
    assert_eq!(capture_errors(&mut client), 1);
    let noted = "SELECT range_start::text || ' ' || range_end FROM litellm_spend.dirty_range WHERE operation = 'INSERT'";
    assert_eq!(value::<String>(&mut client, noted), "2026-10-30 00:00:00 2026-10-31 00:00:00");
    client.batch_execute(&zoned("timestamp(3)")).unwrap();
    assert_healed(&mut client, 1);
    let day = "SELECT string_agg(date::text, ', ') FROM litellm_spend.daily_spend WHERE date BETWEEN '2026-10-29' AND '2026-10-30'";
    assert_eq!(value::<String>(&mut client, day), "2026-10-30");
    assert_verified(&mut client);
}

#[test]
fn rows_that_a_policy_hides_from_the_tables_owner_are_not_taken_for_deleted() {
    let db = shared().database();
    let mut client = db.connect();
    if !knows_merge(&mut client) {
        return;
    }
    client
        .batch_execute(&format!(
            r#"{} INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, "startTime", "endTime", spend)
                   SELECT 'm' || i, 'c', '2026-11-05', now(), 1 FROM generate_series(1, 10) AS i"#,
            partitioned(BY_TIME)
        ))
        .unwrap();
    attach(&mut client);
    wait_until_merged(&mut client);
    client
        .batch_execute(
            r#"ALTER TABLE "LiteLLM_SpendLogs" ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
               MERGE INTO "LiteLLM_SpendLogs" AS t USING (VALUES ('m1'), ('m2')) AS s(id) ON t.request_id = s.id
                   WHEN MATCHED AND id = 'm1' THEN UPDATE SET "startTime" = '2026-11-20'
                   WHEN MATCHED THEN DELETE"#,
        )
        .unwrap();
    let failed = capture_errors(&mut client);
    client
        .batch_execute(
            r#"ALTER TABLE "LiteLLM_SpendLogs" NO FORCE ROW LEVEL SECURITY, DISABLE ROW LEVEL SECURITY"#,
        )
        .unwrap();
    assert_eq!(failed, 1, "that it could not tell is counted");
    assert_eq!(
        value::<i64>(&mut client, "SELECT coalesce(sum(requests), 0)::bigint FROM litellm_spend.retired"),
        0
    );
}

#[test]
fn a_row_that_a_merge_moves_out_of_a_partition_that_came_later_is_captured_whoever_made_that() {
    let db = shared().database();
    let mut client = db.connect();
    if !knows_merge(&mut client) {
        return;
    }
    client.batch_execute(&partitioned(BY_TIME)).unwrap();
    attach(&mut client);
    // Nobody needs a right to do with our functions to make a partition, the next owner of the table no more
    // than this one.
    client
        .batch_execute(
            r#"BEGIN; CREATE ROLE heir; GRANT CREATE, USAGE ON SCHEMA public TO heir;
               ALTER TABLE "LiteLLM_SpendLogs" OWNER TO heir; SET LOCAL ROLE heir;
               CREATE TABLE inherited PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM ('2027-01-01') TO ('2027-02-01'); ROLLBACK"#,
        )
        .unwrap();
    client
        .batch_execute(
            r#"SET ROLE litellm;
               CREATE TABLE made PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM ('2026-12-01') TO ('2027-01-01');
               CREATE TABLE attached (LIKE plain INCLUDING DEFAULTS);
               INSERT INTO attached (request_id, call_type, "startTime", "endTime", spend) VALUES ('a1', 'c', '2026-10-05', now(), 1);
               ALTER TABLE "LiteLLM_SpendLogs" ATTACH PARTITION attached FOR VALUES FROM ('2026-10-01') TO ('2026-11-01');
               RESET ROLE"#,
        )
        .unwrap();
    let noted =
        "SELECT count(*) FROM pg_trigger WHERE tgname = 'litellm_spend_capture_move' AND tgparentid = 0";
    eventually("what came later is captured", || value::<i64>(&mut client, noted) == 4);
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, "startTime", "endTime", spend)
               VALUES ('m1', 'c', '2026-12-05', now(), 10), ('a2', 'c', '2026-10-05', now(), 100);
               MERGE INTO "LiteLLM_SpendLogs" AS t USING (VALUES ('m1'), ('a2')) AS s(id) ON t.request_id = s.id
                   WHEN MATCHED THEN UPDATE SET "startTime" = '2026-11-02'"#,
        )
        .unwrap();
    wait_until_merged(&mut client);
    eventually("nothing is dirty", || {
        holds(&mut client, "SELECT bool_and(dirty_ranges = 0) FROM spend_rollup_status")
    });
    let days = "SELECT string_agg(date || ' ' || spend, ', ' ORDER BY date) FROM litellm_spend.daily_spend WHERE requests <> 0";
    assert_eq!(value::<String>(&mut client, days), "2026-10-05 1, 2026-11-02 110");
    assert_verified(&mut client);
    // A table that is no partition any more moves nothing.
    client
        .batch_execute(
            r#"ALTER TABLE "LiteLLM_SpendLogs" DETACH PARTITION attached;
               UPDATE attached SET "startTime" = '2026-12-24'; DROP TABLE attached"#,
        )
        .unwrap();
    assert_eq!(capture_errors(&mut client), 0);
}

/// A sum that was too large for one integer is as good a zero as any when it comes to nothing.
#[test]
fn a_rebuild_writes_no_group_that_comes_to_nothing() {
    let (_db, mut client) = without_worker();
    client.batch_execute("SELECT spend_attach()").unwrap();
    client.batch_execute("CALL spend_backfill()").unwrap();
    client
        .batch_execute(
            r#"               INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, api_key, spend, "startTime", "endTime")
               SELECT 'r' || spend, 'acompletion', 'key', spend, t, t
               FROM unnest('{1e300,0.001}'::float8[]) AS spend, LATERAL (SELECT now() AT TIME ZONE 'UTC' AS t) AS at"#,
        )
        .unwrap();
    let rows = "SELECT count(*) FROM litellm_spend.daily_spend_rollup";
    for hashed in ["off", "on"] {
        client.batch_execute(&format!("SET litellm_spend.hash_groups = {hashed}")).unwrap();
        client.batch_execute("BEGIN; SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 1)").unwrap();
        assert_eq!(value::<i64>(&mut client, rows), 0, "hash_groups = {hashed}: all of it is in the tail");
        client.batch_execute("ROLLBACK").unwrap();
    }
    assert_verified(&mut client);
}

//! Whoever is in our way delays us, not LiteLLM: no call of ours keeps its table locked while it waits or
//! works.

mod common;

use common::*;
use postgres::Client;
use std::sync::OnceLock;

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
    client.batch_execute("SET statement_timeout = '60s'").unwrap();
    for drop_history in ["false", "true"] {
        assert_refused(&mut client, &format!("SELECT spend_detach(NULL, {drop_history})"), "55P03");
    }
    assert_exact(&mut client);
    merger.batch_execute("COMMIT").unwrap();
    client.batch_execute("SELECT spend_detach()").unwrap();
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

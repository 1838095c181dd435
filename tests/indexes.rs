//! Indexes for LiteLLM's Logs page: planned, built on closed partitions, left alone by LiteLLM's tools.

mod common;

use common::*;
use postgres::Client;

/// Rows as the Logs page looks for them: of 200 teams and 50 aliases, one in fifty a failure, one in a hundred with an end user.
const ROWS: &str = r#"
    INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, api_key, spend, "startTime", "endTime", model, model_id, "user", team_id,
        end_user, status, litellm_call_id, metadata)
    SELECT 'r' || i, 'acompletion', 'key' || i % 100, 0.5, t, t, 'gpt', md5((i % 20)::text), 'user' || i % 300,
           CASE WHEN i % 3 > 0 THEN 'team' || i % 200 END, CASE WHEN i % 100 = 0 THEN 'end' || i % 7 ELSE '' END,
           CASE WHEN i % 50 = 0 THEN 'failure' ELSE 'success' END, md5(i::text),
           jsonb_build_object('user_api_key_alias', 'alias of ' || i % 50) || CASE WHEN i % 50 = 0
               THEN jsonb_build_object('error_information', jsonb_build_object('error_code', (400 + i % 20)::text)) ELSE '{}' END
    FROM generate_series(1, 20000) AS i,
         LATERAL (SELECT date_trunc('day', now() AT TIME ZONE 'UTC') + interval '1 hour' - (i % 3000) * interval '1 minute' - i * interval '1 ms' AS t) AS at"#;

fn with_rows() -> (Database, Client) {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(&format!(r#"{ROWS}; ANALYZE "LiteLLM_SpendLogs""#)).unwrap();
    (db, client)
}

/// What a plan says of an item.
fn planned<T: for<'a> postgres::types::FromSql<'a>>(client: &mut Client, column: &str, item: &str) -> T {
    value(client, &format!("SELECT {column} FROM spend_index_plan() WHERE item = '{item}'"))
}

// ---- the plan ----------------------------------------------------------------------------------------------

#[test]
fn a_plan_says_what_each_index_costs_and_changes_nothing() {
    let (_db, mut client) = with_rows();
    client.batch_execute("CREATE EXTENSION pg_trgm").unwrap();
    let indexes = "SELECT count(*) FROM pg_index";
    let before: i64 = value(&mut client, indexes);
    let rows = client
        .query("SELECT item, definition, rows, bytes, seconds, state FROM spend_index_plan()", &[])
        .unwrap();
    assert_eq!(value::<i64>(&mut client, indexes), before);
    let names = ["team", "user", "end_user", "error_code", "failure", "key_alias", "model_id", "call_id"];
    assert_eq!(rows.iter().take(8).map(|r| r.get::<_, String>(0)).collect::<Vec<_>>(), names);
    for row in &rows[..8] {
        let (name, definition): (String, String) = (row.get(0), row.get(1));
        let (estimated, bytes): (i64, i64) = (row.get(2), row.get(3));
        assert_eq!(row.get::<_, String>(5), "not there", "{name}");
        assert!(row.get::<_, i64>(4) >= 1, "{name}");
        // As it is when it is built.
        client.batch_execute(&format!(r#"CREATE INDEX made ON "LiteLLM_SpendLogs" {definition}"#)).unwrap();
        let built: i64 = value(&mut client, "SELECT pg_relation_size('made')");
        let condition = definition.split_once(" WHERE ").unwrap().1;
        let really: i64 =
            value(&mut client, &format!(r#"SELECT count(*) FROM "LiteLLM_SpendLogs" WHERE {condition}"#));
        client.batch_execute("DROP INDEX made").unwrap();
        // Of a key's alias, a value in JSON, nothing is known before there is an index.
        if name != "key_alias" {
            assert!((really / 2..=really * 2).contains(&estimated), "{name}: {estimated} of {really} rows");
            assert!(bytes < built * 2 && bytes * 3 + 16384 > built, "{name}: {bytes} of {built} bytes");
        }
    }
}

#[test]
fn a_plan_says_what_is_there_already_and_what_cannot_be() {
    let (_db, mut client) = with_rows();
    let possible: String = planned(&mut client, "state", "key_alias");
    assert_eq!(possible, "not possible: index \"key_alias\" needs extension pg_trgm");
    client
        .batch_execute(
            r#"CREATE INDEX "LiteLLM_SpendLogs_litellm_call_id_idx" ON "LiteLLM_SpendLogs" (litellm_call_id);
               CREATE INDEX mine ON "LiteLLM_SpendLogs" (team_id, "startTime");
               CREATE INDEX of_users ON "LiteLLM_SpendLogs" ("user", "startTime", spend);
               CREATE EXTENSION pg_trgm SCHEMA litellm_spend"#,
        )
        .unwrap();
    for (item, state) in [
        ("call_id", r#"there already: "LiteLLM_SpendLogs_litellm_call_id_idx""#),
        // It has no spend, so a team's sum would read the table.
        ("team", r#"not there; "mine" begins alike"#),
        ("user", r#"there already: "of_users""#),
        ("end_user", "not there"),
        ("failure", "not there"),
        ("key_alias", "not there"),
    ] {
        assert_eq!(planned::<String>(&mut client, "state", item), state, "{item}");
    }
    let definition: String = planned(&mut client, "definition", "key_alias");
    assert!(definition.contains(r#""litellm_spend".gin_trgm_ops"#), "{definition}");
    // Beside its own wherever it is missing from a version of LiteLLM.
    client.batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" DROP COLUMN litellm_call_id"#).unwrap();
    let state: String = planned(&mut client, "state", "call_id");
    assert_eq!(state, "not possible: relation \"LiteLLM_SpendLogs\" has no column \"litellm_call_id\"");
}

#[test]
fn advice_is_a_statement_that_works_and_is_gone_when_it_was_followed() {
    let (_db, mut client) = with_rows();
    let advice = "SELECT definition FROM spend_index_plan() WHERE item = 'advice'";
    let rows: Vec<String> = client.query(advice, &[]).unwrap().iter().map(|r| r.get(0)).collect();
    assert!(rows.iter().any(|sql| sql.starts_with("ALTER ROLE \"litellm\" IN DATABASE")), "{rows:?}");
    assert!(rows.iter().any(|sql| sql.contains("autovacuum_vacuum_insert_scale_factor")), "{rows:?}");
    for sql in &rows {
        client.batch_execute(sql).unwrap();
    }
    assert_eq!(client.query(advice, &[]).unwrap().len(), 0);
}

#[test]
fn what_is_not_litellm_s_table_and_who_is_not_its_owner_are_refused() {
    let (db, mut client) = with_rows();
    client
        .batch_execute(
            r#"CREATE TABLE other (id int, "startTime" timestamp); CREATE VIEW seen AS SELECT * FROM "LiteLLM_SpendLogs";
               CREATE TABLE odd (request_id text, "startTime" timestamptz);
               CREATE ROLE stranger LOGIN;
               SELECT spend_grant_admin('stranger'); SELECT spend_grant_admin('litellm')"#,
        )
        .unwrap();
    for (source, sqlstate) in [("other", "42703"), ("seen", "42809"), ("odd", "42804")] {
        assert_refused(&mut client, &format!("SELECT * FROM spend_index_plan('{source}')"), sqlstate);
    }
    assert_refused(
        &mut shared().connect_as(&db.name, "stranger"),
        "SELECT * FROM spend_index_plan()",
        "42501",
    );
    let mut owner = shared().connect_as(&db.name, LITELLM);
    assert!(owner.query("SELECT * FROM spend_index_plan()", &[]).unwrap().len() >= 8);
    client.batch_execute("DROP OWNED BY stranger; DROP ROLE stranger").unwrap();
}

//! Settings of a database or role are meant for its users: the worker does its work whatever they say, and
//! means by it the same.

mod common;

use common::*;

/// The worker merges, backfills and switches views in a database with such settings.
fn works_with(settings: &[&str]) {
    let db = shared().litellm_database();
    let mut client = db.connect();
    for setting in settings {
        client.batch_execute(&format!("ALTER DATABASE {} SET {setting}", db.name)).unwrap();
    }
    // This session had connected before; the worker comes with the extension.
    client.batch_execute("CREATE EXTENSION litellm_spend").unwrap();
    client.batch_execute(&insert_rows("old", 50, 10)).unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    client.batch_execute(&insert_rows("new", 50, 10)).unwrap();
    wait_until_live(&mut client);
    wait_until_merged(&mut client);
    assert_exact(&mut client);
}

#[test]
fn the_worker_merges_in_a_database_that_is_serializable_by_default() {
    works_with(&["default_transaction_isolation = 'serializable'", "default_transaction_deferrable = on"]);
}

#[test]
fn the_worker_merges_in_a_database_that_is_read_only_by_default() {
    works_with(&["default_transaction_read_only = on"]);
}

#[test]
fn the_worker_is_not_cut_off_by_timeouts_meant_for_sessions() {
    works_with(&[
        "statement_timeout = '1ms'",
        "lock_timeout = '1ms'",
        "idle_in_transaction_session_timeout = '1ms'",
    ]);
}

#[test]
fn texts_mean_the_same_whatever_settings_say() {
    works_with(&[
        "standard_conforming_strings = off",
        "escape_string_warning = off",
        "quote_all_identifiers = on",
        "transform_null_equals = on",
        "backslash_quote = on",
        "row_security = off",
        "check_function_bodies = off",
        "search_path = pg_temp, public",
    ]);
}

/// It is connected to no database, and sees what the whole server has.
#[test]
fn the_launcher_waits_for_no_transaction_of_a_server_that_is_serializable_and_read_only() {
    let cluster = own_cluster(&[]);
    let db = cluster.database().attached();
    let (mut client, mut writer) = (db.connect(), db.connect());
    wait_until_live(&mut client);
    let settings = [("isolation", "serializable"), ("read_only", "on"), ("deferrable", "on")];
    for (name, value) in settings {
        let own = if value == "on" { "off" } else { "read committed" };
        client.batch_execute(&format!("SET default_transaction_{name} = '{own}'")).unwrap();
        client.batch_execute(&format!("ALTER SYSTEM SET default_transaction_{name} = '{value}'")).unwrap();
    }
    writer
        .batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE READ WRITE; SELECT count(*) FROM pg_class")
        .unwrap();
    let pids = "SELECT array_agg(pid) FROM pg_stat_activity WHERE backend_type LIKE 'litellm_spend %'";
    let before: Vec<i32> = value(&mut client, pids);
    client.batch_execute("SELECT pg_reload_conf()").unwrap();
    client.execute("SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid", &[&before]).unwrap();
    let ended = std::time::Instant::now();
    eventually("a launcher and a worker come", || {
        assert!(ended.elapsed() < std::time::Duration::from_secs(60), "{}", cluster.log_tail());
        let now: Option<Vec<i32>> = value(&mut client, pids);
        now.is_some_and(|now| now.len() == 2 && now.iter().all(|pid| !before.contains(pid)))
    });
    writer.batch_execute("COMMIT").unwrap();
    // Else the database cannot be dropped.
    for name in ["isolation", "read_only", "deferrable"] {
        client.batch_execute(&format!("ALTER SYSTEM RESET default_transaction_{name}")).unwrap();
    }
    client.batch_execute("SELECT pg_reload_conf()").unwrap();
    let writes = "SELECT current_setting('default_transaction_read_only') = 'off'";
    eventually("it can be written to again", || holds(&mut db.connect(), writes));
}

/// The texts of values, and what a text means, depend on more than TimeZone.
#[test]
fn a_declared_rollup_says_the_same_whoever_computes_it() {
    let db = shared().litellm_database();
    let mut client = db.connect();
    for setting in
        ["bytea_output = 'escape'", "array_nulls = off", "xmloption = 'document'", "xmlbinary = 'hex'"]
    {
        client.batch_execute(&format!("ALTER DATABASE {} SET {setting}", db.name)).unwrap();
    }
    client
        .batch_execute(
            r#"CREATE EXTENSION litellm_spend; CREATE TABLE ev (id bigserial, b bytea, v int);
               INSERT INTO ev (b, v) VALUES ('\xff41', 1), ('\x4142', 2);
               SELECT spend_rollup_create('texts', 'ev',
                   ARRAY['b::text AS b', 'coalesce((''{NULL,x}''::text[])[v], ''none'') AS element'],
                   ARRAY['count(*) AS n', 'max(b::text) AS greatest']);
               INSERT INTO ev (b, v) VALUES ('\xff41', 1)"#,
        )
        .unwrap();
    wait_until_merged(&mut client);
    // This session and a new one, whose settings are others.
    for client in [&mut client, &mut db.connect()] {
        let rows: String = value(
            client,
            "SELECT string_agg(concat_ws(' ', b, element, n, greatest), ', ' ORDER BY n) FROM litellm_spend.texts",
        );
        assert_eq!(rows, r"\x4142 x 1 \x4142, \xff41 none 2 \xff41");
        client
            .batch_execute(
                "INSERT INTO ev (b, v) VALUES ('\\xff41', 1); SELECT spend_rollup_run('texts');
                    DELETE FROM ev WHERE id > 3; SELECT spend_rollup_rebuild('texts', force => true)",
            )
            .unwrap();
        assert_verified(client);
    }
}

#[test]
fn who_declares_a_text_that_depends_on_settings_is_told() {
    let db = shared().database();
    db.connect().batch_execute("CREATE TABLE ev (id bigserial, b bytea, x double precision)").unwrap();
    let create = |dimension: &str| {
        let call =
            format!("SELECT spend_rollup_create('r', 'ev', ARRAY['{dimension} AS d'], '{{count(*) AS n}}')");
        db.notices(&format!("{call}; SELECT spend_rollup_drop('r')"))
    };
    for dimension in ["b::text", "x::text", "coalesce(x::varchar, ''none'')"] {
        let said = create(dimension);
        assert!(said.contains("depends on settings such as TimeZone"), "{dimension}: {said}");
    }
    for dimension in ["encode(b, ''hex'')", "x::numeric::text", "x", "b"] {
        let said = create(dimension);
        assert!(!said.contains("depends on settings"), "{dimension}: {said}");
    }
    // Where the client's encoding has no letter for it, nothing is told, and the call does what it does.
    let said = db.notices(
        r#"SET client_encoding = 'LATIN1';
           SELECT spend_rollup_create('r', 'ev', ARRAY[U&'(b::text || ''\0434'') AS d'], '{count(*) AS n}');
           SELECT spend_rollup_drop('r')"#,
    );
    assert!(!said.contains("depends on settings"), "{said}");
}

#[test]
fn a_view_that_shows_what_row_security_lets_its_owner_see_stays_litellms_own() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 20, 5)).unwrap();
    client
        .batch_execute(
            r#"DROP ROLE IF EXISTS reporting; CREATE ROLE reporting; GRANT SELECT ON "LiteLLM_SpendLogs" TO reporting;
               ALTER VIEW "MonthlyGlobalSpendPerUserPerKey" OWNER TO reporting;
               ALTER TABLE "LiteLLM_SpendLogs" ENABLE ROW LEVEL SECURITY;
               CREATE POLICY own ON "LiteLLM_SpendLogs" USING (api_key = 'key1')"#,
        )
        .unwrap();
    let action = r#"SELECT action FROM spend_attach() WHERE object = 'view "public"."MonthlyGlobalSpendPerUserPerKey"'"#;
    let left_alone = "left alone: it shows what row security on the spend log lets its owner see";
    assert_eq!(value::<String>(&mut client, action), left_alone);
    let keys = r#"SELECT count(DISTINCT api_key) FROM "MonthlyGlobalSpendPerUserPerKey""#;
    let live = r#"SELECT pg_get_viewdef('"MonthlyGlobalSpendPerKey"'::regclass) LIKE '%litellm_spend%'"#;
    eventually("the view of the table's owner is live", || holds(&mut client, live));
    assert_eq!(value::<i64>(&mut client, keys), 1);
    // The table's owner is not held to its policies, unless they are forced: then nothing is counted without
    // all rows.
    client.batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" FORCE ROW LEVEL SECURITY"#).unwrap();
    eventually("it is LiteLLM's own again", || !holds(&mut client, live));
    assert_eq!(
        error(&mut client, "SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 1)").code().code(),
        "42501"
    );
    client.batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" NO FORCE ROW LEVEL SECURITY"#).unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    eventually("it is live again", || holds(&mut client, live));
    assert_verified(&mut client);
    client.batch_execute("DROP OWNED BY reporting CASCADE; DROP ROLE reporting").unwrap();
}

#[test]
fn a_partition_of_another_role_is_not_maintained_and_said_so() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "SET ROLE litellm;
             CREATE TABLE events (id bigserial, at timestamp NOT NULL) PARTITION BY RANGE (at); CREATE INDEX ON events (at);
             RESET ROLE;
             CREATE TABLE events_pdefault PARTITION OF events DEFAULT;
             INSERT INTO events (at) VALUES (now() - interval '1 year'), (now());
             SELECT spend_partition_set('events', retention => '30 days')",
        )
        .unwrap();
    let skipped =
        "SELECT bool_or(detail LIKE '%belongs to role \"postgres\"%') FROM spend_partition_maintain('events')
                   WHERE action = 'skipped'";
    eventually("no other maintainer is at it", || holds(&mut client, skipped));
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM events_pdefault"), 2);
    client.batch_execute("ALTER TABLE events_pdefault OWNER TO litellm").unwrap();
    eventually("DEFAULT is empty and the old row gone", || {
        client.batch_execute("SELECT spend_partition_maintain('events')").unwrap();
        holds(
            &mut client,
            "SELECT (SELECT count(*) FROM events_pdefault) = 0 AND (SELECT count(*) FROM events) = 1",
        )
    });
}

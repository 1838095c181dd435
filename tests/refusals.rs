//! Bad input gets an error with SQLSTATE, DETAIL and HINT, and changes nothing.

mod common;

use common::*;
use postgres::Client;

fn nothing_changed(client: &mut Client) {
    let state = "SELECT (SELECT count(*) FROM litellm_spend.rollup) + (SELECT count(*) FROM litellm_spend.capture)
                      + (SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'litellm_spend%')
                      + (SELECT count(*) FROM pg_class WHERE relnamespace = 'litellm_spend'::regnamespace AND relname LIKE 'change_log%')";
    assert_eq!(value::<i64>(client, state), 0);
}

#[test]
fn a_relation_that_is_not_litellms_table_is_refused() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"CREATE TABLE other (a int); CREATE TEMP TABLE temporary (LIKE "LiteLLM_SpendLogs");
               CREATE UNLOGGED TABLE unlogged (LIKE "LiteLLM_SpendLogs");
               CREATE TABLE wrong_type (LIKE "LiteLLM_SpendLogs");
               ALTER TABLE wrong_type ALTER "startTime" TYPE timestamptz;
               CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;
               CREATE FOREIGN TABLE distant (a int) SERVER files OPTIONS (filename '/dev/null');
               CREATE MATERIALIZED VIEW stale AS SELECT 1 AS a;
               CREATE SEQUENCE numbers"#,
        )
        .unwrap();
    assert_refused(&mut client, "SELECT spend_attach('12345'::oid::regclass)", "42P01");
    client.batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" RENAME TO renamed"#).unwrap();
    assert_refused(&mut client, "SELECT spend_attach()", "42P01");
    client.batch_execute(r#"ALTER TABLE renamed RENAME TO "LiteLLM_SpendLogs""#).unwrap();
    assert_refused(&mut client, "SELECT spend_attach('other')", "42703");
    assert_refused(&mut client, "SELECT spend_attach('wrong_type')", "42804");
    for relation in ["\"DailyTagSpend\"", "temporary", "unlogged", "distant", "stale", "numbers"] {
        assert_refused(&mut client, &format!("SELECT spend_attach('{relation}')"), "42809");
    }
    assert_refused(&mut client, "SELECT spend_attach(on_delete => 'forget')", "22023");
    nothing_changed(&mut client);
}

#[test]
fn a_table_of_citus_that_cannot_be_a_source_is_refused_also_later() {
    let db = shared().database();
    let mut client = db.connect();
    // Citus's catalog, which belongs to whoever made that extension.
    client
        .batch_execute(
            r#"CREATE TABLE local (id bigserial, x int); CREATE TABLE events (id bigserial, x int) PARTITION BY LIST (x);
               SELECT spend_rollup_create('r', 'events', '{x}', '{count(*) AS n}');
               SET allow_system_table_mods = on;
               CREATE TABLE pg_catalog.pg_dist_partition (logicalrelid regclass PRIMARY KEY, partmethod "char" NOT NULL);
               DROP ROLE IF EXISTS citus_owner; CREATE ROLE citus_owner SUPERUSER;
               ALTER TABLE pg_catalog.pg_dist_partition OWNER TO citus_owner;
               RESET allow_system_table_mods;
               CREATE TABLE events_1 PARTITION OF events FOR VALUES IN (1);
               INSERT INTO events (x) VALUES (1)"#,
        )
        .unwrap();
    eventually("what is not distributed is merged", || {
        holds(&mut client, "SELECT watermark = 1 AND last_error IS NULL FROM spend_rollup_status")
    });
    // Divided by range, and a reference table. What is divided by hash is in tests/citus.rs.
    client
        .batch_execute(
            r#"INSERT INTO pg_dist_partition VALUES ('events', 'r'), ('events_1', 'r'), ('"LiteLLM_SpendLogs"', 'n')"#,
        )
        .unwrap();
    for call in [
        "SELECT spend_rollup_create('x', 'events', '{x}', '{count(*) AS n}')",
        "SELECT spend_rollup_register('x', 'events_1')",
        "SELECT spend_attach()",
    ] {
        assert_refused(&mut client, call, "0A000");
    }
    client.batch_execute("INSERT INTO events (x) VALUES (1)").unwrap();
    eventually("the status says so", || {
        holds(
            &mut client,
            "SELECT last_error LIKE E'public.events is a table of Citus''s that is not distributed by hash\\nDETAIL:%HINT:%' FROM spend_rollup_status",
        )
    });
    // The captured table, distributed after it was attached.
    client
        .batch_execute(r#"DELETE FROM pg_dist_partition WHERE partmethod = 'n'; SELECT spend_attach()"#)
        .unwrap();
    wait_until_live(&mut client);
    let said = "SELECT last_error FROM spend_rollup_status WHERE rollup = 'daily_spend'";
    let mut says = |text: &str| {
        let condition =
            format!("SELECT split_part(coalesce(last_error, ''), E'\\n', 1) = '{text}' FROM ({said}) AS s");
        eventually("the status says so, or says nothing again", || holds(&mut client, &condition));
    };
    let mut other = db.connect();
    other.batch_execute(r#"INSERT INTO pg_dist_partition VALUES ('"LiteLLM_SpendLogs"', 'h')"#).unwrap();
    says(r#"watch: public."LiteLLM_SpendLogs" is distributed by Citus"#);
    other
        .batch_execute(
            "DELETE FROM pg_dist_partition WHERE partmethod = 'h' AND logicalrelid::text LIKE '%Spend%'",
        )
        .unwrap();
    says("");
    client.batch_execute("SELECT spend_rollup_create('y', 'local', '{x}', '{count(*) AS n}')").unwrap();
    assert!(holds(&mut client, "SELECT watermark = 1 FROM spend_rollup_status WHERE rollup = 'r'"), "merged");
    client.batch_execute("DELETE FROM pg_dist_partition; SELECT spend_rollup_run('r')").unwrap();
    assert!(holds(&mut client, "SELECT watermark = 2 FROM spend_rollup_status WHERE rollup = 'r'"));
    client
        .batch_execute("SET allow_system_table_mods = on; DROP TABLE pg_catalog.pg_dist_partition; DROP ROLE citus_owner")
        .unwrap();
}

#[test]
fn calls_before_attach_are_refused() {
    let db = shared().database();
    let mut client = db.connect();
    for call in ["SELECT spend_rollup_run()", "CALL spend_backfill()", "SELECT * FROM monthly_global_spend()"]
    {
        assert_refused(&mut client, call, "55000");
    }
    for call in [
        "SELECT spend_rollup_rebuild('daily_spend', '2026-11-01')",
        "SELECT * FROM spend_rollup_verify('daily_spend')",
    ] {
        assert_refused(&mut client, call, "42704");
    }
    let detached: String = value(&mut client, "SELECT action FROM spend_detach()");
    assert_eq!(detached, "is not captured");
    nothing_changed(&mut client);
}

#[test]
fn of_two_tables_that_nobody_sees_neither_is_taken() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"CREATE SCHEMA one; CREATE SCHEMA two; CREATE TABLE two."LiteLLM_SpendLogs" (LIKE "LiteLLM_SpendLogs");
               ALTER TABLE "LiteLLM_SpendLogs" SET SCHEMA one"#,
        )
        .unwrap();
    for call in
        ["spend_attach()", "spend_partition_plan()", "spend_partition_set()", "spend_partition_maintain()"]
    {
        let refused = error(&mut client, &format!("SELECT * FROM {call}"));
        assert_eq!(refused.code().code(), "42P01", "{call}: {refused:?}");
        assert_eq!(
            refused.hint(),
            Some(
                r#"Pass the one that LiteLLM writes to: '"one"."LiteLLM_SpendLogs"' or '"two"."LiteLLM_SpendLogs"'."#
            )
        );
    }
    let refused = error(&mut client, "CALL spend_backfill()");
    assert_eq!(
        refused.hint(),
        Some(
            r#"SELECT * FROM spend_attach('"one"."LiteLLM_SpendLogs"'); Or: SELECT * FROM spend_attach('"two"."LiteLLM_SpendLogs"');"#
        )
    );
    nothing_changed(&mut client);
    // The one that search_path finds; then the attached one, whatever it finds.
    client.batch_execute("SET search_path = two, public; SELECT spend_attach()").unwrap();
    client.batch_execute("SET search_path = one, public; SELECT spend_attach()").unwrap();
    assert!(holds(&mut client, "SELECT table_schema = 'two' FROM litellm_spend.capture"));
}

#[test]
fn the_hint_names_what_fills_the_table_that_was_passed() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE other (a int); CREATE TABLE page_views (id bigserial, a int);
             SELECT spend_rollup_register('views', 'page_views')",
        )
        .unwrap();
    let mut hint = |call: &str| {
        assert_refused(&mut client, call, "55000");
        error(&mut client, call).hint().unwrap().to_string()
    };
    let attach = r#"SELECT * FROM spend_attach('"public"."LiteLLM_SpendLogs"');"#;
    assert_eq!(hint("CALL spend_backfill()"), attach);
    assert_eq!(hint(r#"CALL spend_backfill('"LiteLLM_SpendLogs"')"#), attach);
    assert_eq!(hint("SELECT spend_grant_reports('litellm')"), attach);
    assert!(hint("CALL spend_backfill('other')").starts_with("Call spend_rollup_create() to declare"));
    assert!(hint("CALL spend_backfill('page_views')").contains("spend_rollup_window()"));
    client.batch_execute(attach).unwrap();
    let mut hint = |call: &str| {
        assert_refused(&mut client, call, "55000");
        error(&mut client, call).hint().unwrap().to_string()
    };
    for call in ["CALL spend_backfill('other')", "SELECT spend_detach('other')"] {
        assert!(
            hint(call).starts_with(r#"Leave the table out for "public"."LiteLLM_SpendLogs", which is"#),
            "{call}"
        );
    }
    assert!(hint("CALL spend_backfill('page_views')").contains("spend_rollup_window()"));
}

#[test]
fn a_rollup_that_is_not_as_the_caller_thought() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "SELECT spend_attach(); GRANT EXECUTE ON FUNCTION spend_rollup_drop, spend_rollup_verify TO litellm;
             SET ROLE litellm; CREATE TABLE page_views (id bigserial, a int); RESET ROLE;
             SELECT spend_rollup_register('views', 'page_views')",
        )
        .unwrap();
    for (role, call, sqlstate, texts) in [
        (
            "postgres",
            "SELECT spend_rollup_register('views', 'page_views')",
            "42710",
            ["Rollups have different names, also those that are filled by hand.", "spend_rollup_drop()"],
        ),
        (
            "postgres",
            "SELECT spend_rollup_register('more', 'page_views', 3001001)",
            "42809",
            ["3001001 is not a sequence", "merged_to => 3001001"],
        ),
        (
            "postgres",
            "SELECT spend_rollup_create('more', 'page_views', '{a}', '{count(*) AS n}', 'page_views')",
            "42809",
            [r#""public"."page_views" is not a sequence"#, "or pass its name."],
        ),
        (
            "litellm",
            "SELECT spend_rollup_drop('daily_spend')",
            "55000",
            [r#"rollup "daily_spend" is built in"#, "SELECT * FROM spend_detach(drop_history => true);"],
        ),
        (
            "litellm",
            "SELECT * FROM spend_rollup_verify('view')",
            "42704",
            [r#"rollup "view" does not exist"#, r#"There are "daily_spend", "daily_spend_by_end_user","#],
        ),
    ] {
        client.batch_execute(&format!("SET ROLE {role}")).unwrap();
        assert_refused(&mut client, call, sqlstate);
        let refused = error(&mut client, call);
        let said =
            format!("{}\n{}\n{}", refused.message(), refused.detail().unwrap(), refused.hint().unwrap());
        assert!(texts.iter().all(|text| said.contains(text)), "{call}: {said}");
    }
    assert!(error(&mut client, "SELECT spend_rollup_drop('view')").hint().unwrap().contains("\"views\""));
}

#[test]
fn a_rollup_over_the_change_log_is_refused() {
    let db = shared().database().attached();
    let mut client = db.connect();
    for call in [
        "SELECT spend_rollup_create('mine', 'litellm_spend.change_log', '{api_key}', '{count(*) AS n}')",
        "SELECT spend_rollup_register('mine', 'litellm_spend.change_log')",
    ] {
        assert_refused(&mut client, call, "42809");
    }
    client.batch_execute("SELECT spend_detach()").unwrap();
    assert!(holds(&mut client, "SELECT count(*) = 0 FROM spend_rollup_status WHERE rollup = 'mine'"));
}

#[test]
fn nonsense_is_refused() {
    let db = shared().database().attached();
    let mut client = db.connect();
    assert_refused(&mut client, "SELECT * FROM monthly_global_spend(-1)", "22023");
    assert_refused(&mut client, "SELECT spend_rollup_rebuild('daily_spend', now()::timestamp)", "22023");
    assert_refused(
        &mut client,
        "SELECT spend_rollup_rebuild('daily_spend', '2026-11-02', '2026-11-01')",
        "22023",
    );
    assert_eq!(
        error(&mut client, "SELECT spend_rollup_rebuild('nothing', '2026-11-01')").code().code(),
        "42704"
    );
    assert_eq!(error(&mut client, "SELECT * FROM spend_rollup_run('nothing')").code().code(), "42704");
    assert_eq!(error(&mut client, "SELECT * FROM spend_rollup_verify('nothing')").code().code(), "42704");
    client.batch_execute(r#"CREATE TABLE second (LIKE "LiteLLM_SpendLogs" INCLUDING ALL)"#).unwrap();
    assert_refused(&mut client, "SELECT spend_attach('second')", "55000");
    assert_refused(&mut client, "SELECT spend_detach('second')", "55000");
    // NULL and the extremes are answered.
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM monthly_global_spend(NULL)"), 0);
    client
        .batch_execute("SELECT * FROM monthly_global_spend(0); SELECT * FROM monthly_global_spend(1000000)")
        .unwrap();
    assert_exact(&mut client);
}

#[test]
fn a_snapshot_that_may_be_older_than_the_fence_is_refused() {
    let db = shared().database().attached();
    let mut client = db.connect();
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        for call in [
            "SELECT spend_rollup_run()",
            "SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE)",
            "SELECT spend_attach()",
            "SELECT spend_detach()",
        ] {
            client.batch_execute(&format!("BEGIN ISOLATION LEVEL {level}")).unwrap();
            assert_refused(&mut client, call, "25000");
            client.batch_execute("ROLLBACK").unwrap();
        }
    }
    client.batch_execute("BEGIN READ ONLY").unwrap();
    assert_refused(&mut client, "SELECT spend_attach()", "25006");
    client.batch_execute("ROLLBACK").unwrap();
    client.batch_execute("BEGIN READ ONLY; SELECT * FROM monthly_global_spend(); ROLLBACK").unwrap();
}

#[test]
fn who_does_not_own_the_table_is_refused() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "DROP ROLE IF EXISTS stranger; CREATE ROLE stranger LOGIN;
             GRANT EXECUTE ON FUNCTION spend_attach(regclass, text, boolean), spend_detach(regclass, boolean), spend_rollup_run(text) TO stranger",
        )
        .unwrap();
    let mut stranger = db.cluster.connect_as(&db.name, "stranger");
    assert_refused(&mut stranger, "SELECT spend_attach()", "42501");
    nothing_changed(&mut client);
    client.batch_execute("SELECT spend_attach()").unwrap();
    assert_eq!(error(&mut stranger, "SELECT * FROM litellm_spend.rollup").code().code(), "42501");
    assert_eq!(
        error(&mut stranger, "SELECT * FROM spend_rollup_verify('daily_spend')").code().code(),
        "42501"
    );
    client.batch_execute("GRANT pg_monitor TO stranger").unwrap();
    stranger.batch_execute("SELECT * FROM spend_rollup_status; SELECT * FROM spend_worker_status").unwrap();
    client.batch_execute("REVOKE pg_monitor FROM stranger; DROP OWNED BY stranger").unwrap();
    drop(stranger);
    client.batch_execute("DROP ROLE stranger").unwrap();
}

#[test]
fn an_owner_without_superuser_attaches_and_detaches() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"DROP ROLE IF EXISTS owner_c; CREATE ROLE owner_c LOGIN; GRANT CREATE ON SCHEMA public TO owner_c;
               ALTER TABLE "LiteLLM_SpendLogs" OWNER TO owner_c; ALTER VIEW "MonthlyGlobalSpend" OWNER TO owner_c;
               GRANT EXECUTE ON FUNCTION spend_attach(regclass, text, boolean), spend_detach(regclass, boolean), spend_rollup_run(text) TO owner_c"#,
        )
        .unwrap();
    let mut owner = db.cluster.connect_as(&db.name, "owner_c");
    owner.batch_execute("SELECT spend_attach()").unwrap();
    wait_until_live(&mut client);
    owner.batch_execute(&insert_rows("a", 10, 2)).unwrap();
    owner.batch_execute("SELECT spend_rollup_run()").unwrap();
    assert_exact(&mut client);
    assert_eq!(value::<String>(&mut owner, "SELECT current_user::text"), "owner_c");
    assert_eq!(error(&mut owner, "SELECT * FROM litellm_spend.rollup").code().code(), "42501");
    owner.batch_execute("SELECT spend_detach()").unwrap();
    drop(owner);
    client
        .batch_execute("REASSIGN OWNED BY owner_c TO postgres; DROP OWNED BY owner_c; DROP ROLE owner_c")
        .unwrap();
}

#[test]
fn names_with_quotes_and_capitals_work() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"CREATE SCHEMA "It's ""Här""" AUTHORIZATION litellm; ALTER TABLE "LiteLLM_SpendLogs" SET SCHEMA "It's ""Här""";
               ALTER VIEW "MonthlyGlobalSpend" SET SCHEMA "It's ""Här""";
               SET search_path = "It's ""Här""", public"#,
        )
        .unwrap();
    client.batch_execute(&insert_rows("a", 50, 5)).unwrap();
    client.batch_execute(r#"SELECT spend_attach('"It''s ""Här"""."LiteLLM_SpendLogs"')"#).unwrap();
    wait_until_live(&mut client);
    client.batch_execute(&insert_rows("b", 50, 5)).unwrap();
    assert_exact(&mut client);
    client.batch_execute("SELECT spend_detach()").unwrap();
    assert_no_rows(client.query(VIEW_AGAINST_RAW, &[]).unwrap(), "view and raw rows differ");
}

#[test]
fn a_database_that_is_not_utf8_is_refused() {
    let cluster = shared();
    let mut admin = cluster.connect("postgres");
    admin
        .batch_execute(
            "CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0",
        )
        .unwrap();
    let mut client = cluster.connect("latin");
    client
        .batch_execute(
            r#"CREATE EXTENSION litellm_spend; CREATE TABLE "LiteLLM_SpendLogs" (request_id text)"#,
        )
        .unwrap();
    assert_refused(&mut client, "SELECT spend_attach()", "0A000");
    drop(client);
    admin.batch_execute("DROP DATABASE latin").unwrap();
}

#[test]
fn attach_gives_up_on_its_lock_and_changes_nothing() {
    let db = shared().database();
    let (mut client, mut writer) = (db.connect(), db.connect());
    writer.batch_execute("BEGIN").unwrap();
    writer.batch_execute(&insert_rows("open", 1, 1)).unwrap();
    client.batch_execute("SET statement_timeout = '60s'").unwrap();
    assert_refused(&mut client, "SET litellm_spend.lock_timeout = '200ms'; SELECT spend_attach()", "55P03");
    let pid = backend_pid(&mut writer);
    let detail = error(&mut client, "SELECT spend_attach()").detail().unwrap().to_string();
    assert!(detail.contains(&pid.to_string()), "{detail}");
    nothing_changed(&mut client);
    writer.batch_execute("COMMIT").unwrap();
    attach(&mut client);
    assert_exact(&mut client);
}

#[test]
fn dropping_the_extension_with_history_is_refused() {
    let db = shared().database().attached();
    let mut client = db.connect();
    for detach in ["SELECT 1", "SELECT spend_detach()"] {
        client.batch_execute(detach).unwrap();
        assert_refused(&mut client, "DROP EXTENSION litellm_spend", "2BP01");
        let hint = error(&mut client, "DROP EXTENSION litellm_spend").hint().unwrap().to_string();
        assert!(hint.starts_with("SELECT * FROM spend_detach(drop_history => true);"), "{hint}");
    }
    client
        .batch_execute(
            "SELECT spend_attach(); SELECT spend_detach(drop_history => true); DROP EXTENSION litellm_spend",
        )
        .unwrap();
}

const LITELLMS_VIEWS: &str =
    "SELECT count(*) FROM pg_views WHERE schemaname = 'public' AND viewowner = 'litellm'";

#[test]
fn cascade_does_not_take_litellms_views_along() {
    let db = shared().litellm_database();
    let mut client = db.connect();
    client
        .batch_execute(
            "DROP ROLE IF EXISTS dba_d; CREATE ROLE dba_d SUPERUSER; CREATE SCHEMA ext; GRANT ALL ON SCHEMA ext TO dba_d;
             CREATE EXTENSION pg_trgm; CREATE SCHEMA other; SET ROLE dba_d; CREATE EXTENSION litellm_spend SCHEMA ext;
             RESET ROLE; SELECT ext.spend_attach()",
        )
        .unwrap();
    client.batch_execute("CALL ext.spend_backfill()").unwrap();
    let before: i64 = value(&mut client, LITELLMS_VIEWS);
    let drops = [
        "DROP EXTENSION litellm_spend CASCADE",
        "DROP EXTENSION IF EXISTS pg_trgm, litellm_spend CASCADE",
        "DO $$ BEGIN EXECUTE 'DROP EXTENSION litellm_spend CASCADE'; END $$",
        "DROP SCHEMA other, ext CASCADE",
        "DROP OWNED BY dba_d CASCADE",
    ];
    for drop in drops {
        assert_refused(&mut client, drop, "2BP01");
        let refused = error(&mut client, drop);
        assert!(refused.message().contains(r#"attached to "public"."LiteLLM_SpendLogs""#), "{refused:?}");
        assert!(refused.hint().unwrap().contains("SELECT * FROM ext.spend_detach(drop_history => true);"));
    }
    client.batch_execute("DROP SCHEMA other CASCADE; DROP EXTENSION pg_trgm CASCADE").unwrap();
    assert!(before >= 7, "{before}");
    assert_eq!(value::<i64>(&mut client, LITELLMS_VIEWS), before);
    // With the table's schema everything goes, and a dropped database is asked nothing.
    client.batch_execute("BEGIN; DROP SCHEMA public, ext CASCADE; ROLLBACK").unwrap();
    // Half of it is gone, so that no detach can work.
    client.batch_execute("DROP TABLE litellm_spend.daily_spend_rollup CASCADE").unwrap();
    assert!(client.batch_execute("SELECT ext.spend_detach(drop_history => true)").is_ok());
    client.batch_execute("SELECT ext.spend_attach()").unwrap();
    // As docs/operations.md says under Uninstall.
    assert!(error(&mut client, drops[0]).hint().unwrap().contains("see Uninstall in docs/operations.md"));
    client.batch_execute(&format!("DELETE FROM litellm_spend.capture; {}", drops[0])).unwrap();
    client.batch_execute("DROP OWNED BY dba_d; DROP ROLE dba_d").unwrap();
}

#[test]
fn a_broken_installation_can_be_dropped_without_a_word() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client
        .batch_execute(
            "ALTER TABLE litellm_spend.capture RENAME table_schema TO schema; DROP EXTENSION litellm_spend CASCADE",
        )
        .unwrap();
}

#[test]
fn a_backfill_in_a_transaction_block_says_why_it_fails() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 50, 5)).unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    for call in [
        "BEGIN; CALL spend_backfill()",
        "DO $$ BEGIN CALL spend_backfill(); EXCEPTION WHEN division_by_zero THEN NULL; END $$",
    ] {
        let refused = error(&mut client, call);
        assert_eq!(refused.code().code(), "2D000");
        assert!(
            refused.hint().is_some_and(|hint| hint.starts_with("Use CALL spend_backfill();")),
            "{refused:?}"
        );
        client.batch_execute("ROLLBACK").unwrap();
    }
    // Somebody else's procedure is left with the server's own words.
    client.batch_execute("CREATE PROCEDURE p() LANGUAGE plpgsql AS 'BEGIN COMMIT; END'").unwrap();
    assert_eq!(error(&mut client, "BEGIN; CALL p()").hint(), None);
}

#[test]
fn the_change_logs_sequence_that_was_set_back_is_raised_and_the_gap_repaired() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 100, 5)).unwrap();
    wait_until_merged(&mut client);
    client.batch_execute("DELETE FROM litellm_spend.change_log").unwrap();
    client.batch_execute("SELECT setval('litellm_spend.change_log_seq', 1)").unwrap();
    client.batch_execute(&insert_rows("b", 5, 5)).unwrap();
    eventually("the sequence is above the watermark", || {
        holds(
            &mut client,
            "SELECT s.last_value >= r.watermark FROM litellm_spend.change_log_seq s, litellm_spend.rollup r WHERE r.name = 'daily_spend'",
        )
    });
    eventually("the rows are counted", || client.query(VIEW_AGAINST_RAW, &[]).unwrap().is_empty());
    client.batch_execute(&insert_rows("c", 5, 5)).unwrap();
    wait_until_live(&mut client);
    assert_exact(&mut client);
}

#[test]
fn the_change_logs_sequence_is_raised_to_the_rollup_that_is_furthest() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 100, 5)).unwrap();
    wait_until_merged(&mut client);
    let furthest = "(SELECT max(watermark) FROM litellm_spend.rollup WHERE source = 'change_log')";
    let raised = format!("SELECT is_called AND last_value >= {furthest} FROM litellm_spend.change_log_seq");
    // It is about to give the last number that is merged again.
    client
        .batch_execute(&format!(
            "DELETE FROM litellm_spend.change_log; SELECT setval('litellm_spend.change_log_seq', {furthest}, false)"
        ))
        .unwrap();
    eventually("it is raised to what is merged", || holds(&mut client, &raised));
    // One rollup is behind, and the last numbers that the others have merged are of no row.
    make_unwritable(&mut client, "daily_spend_by_model_rollup");
    client.batch_execute(&insert_rows("b", 5, 5)).unwrap();
    client.batch_execute(&format!("BEGIN; {}; ROLLBACK", insert_rows("c", 5, 5))).unwrap();
    let all = "SELECT max(watermark) = (SELECT last_value FROM litellm_spend.change_log_seq)
                   AND min(watermark) < max(watermark) - 5
               FROM litellm_spend.rollup WHERE source = 'change_log'";
    eventually("the others have merged all", || holds(&mut client, all));
    client
        .batch_execute(
            "SELECT setval('litellm_spend.change_log_seq', (SELECT max(seq) FROM litellm_spend.change_log))",
        )
        .unwrap();
    eventually("it is raised to what the others have merged", || holds(&mut client, &raised));
    make_writable(&mut client, "daily_spend_by_model_rollup");
    client.batch_execute(&insert_rows("d", 5, 5)).unwrap();
    wait_until_live(&mut client);
    wait_until_merged(&mut client);
    assert_exact(&mut client);
    assert_eq!(capture_errors(&mut client), 2);
}

#[test]
fn code_of_an_owner_or_a_monitor_never_runs_with_our_rights() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"DROP ROLE IF EXISTS mallory; CREATE ROLE mallory LOGIN; GRANT pg_monitor TO mallory;
               GRANT CREATE ON SCHEMA public TO mallory; ALTER TABLE "LiteLLM_SpendLogs" OWNER TO mallory;
               GRANT SELECT ON "LiteLLM_SpendLogs" TO litellm"#,
        )
        .unwrap();
    client.batch_execute(&insert_rows("a", 10, 3)).unwrap();
    attach(&mut client);
    let mut mallory = db.cluster.connect_as(&db.name, "mallory");
    mallory
        .batch_execute(
            r#"CREATE FUNCTION public.evil() RETURNS text LANGUAGE plpgsql AS $$ BEGIN
                   INSERT INTO public.loot SELECT current_user; RETURN 'x'; END $$;
               CREATE TABLE public.loot (who text); GRANT ALL ON public.loot TO PUBLIC"#,
        )
        .unwrap();
    // The monitor's function takes no relation.
    assert!(mallory.batch_execute("SELECT * FROM litellm_spend.tail('public.loot'::regclass, 0)").is_err());
    // The table is replaced, and the old one's name given to a view with a function in it.
    mallory
        .batch_execute(
            r#"ALTER TABLE "LiteLLM_SpendLogs" RENAME TO legacy;
               CREATE TABLE "LiteLLM_SpendLogs" (LIKE legacy INCLUDING ALL)"#,
        )
        .unwrap();
    eventually("capture follows", || {
        holds(&mut client, "SELECT predecessor = 'legacy'::regclass FROM litellm_spend.capture")
    });
    mallory
        .batch_execute(
            "ALTER TABLE legacy RENAME TO elsewhere; CREATE VIEW legacy AS SELECT evil() AS request_id",
        )
        .unwrap();
    mallory.batch_execute(&insert_rows("b", 10, 3)).unwrap();
    client.batch_execute("SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 1)").unwrap();
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    assert_no_rows(client.query("SELECT who FROM loot", &[]).unwrap(), "whose rights the code ran with");
    assert_eq!(capture_errors(&mut client), 0);
    drop(mallory);
    client
        .batch_execute("REASSIGN OWNED BY mallory TO postgres; DROP OWNED BY mallory; DROP ROLE mallory")
        .unwrap();
}

#[test]
fn every_member_of_the_extension_has_a_comment_and_none_is_public() {
    let db = shared().database();
    let mut client = db.connect();
    let silent = client
        .query(
            "SELECT pg_describe_object(d.classid, d.objid, 0) FROM pg_depend d
             WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
               AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'litellm_spend')
               AND d.classid IN ('pg_proc'::regclass, 'pg_class'::regclass, 'pg_namespace'::regclass)
               AND obj_description(d.objid, d.classid::regclass::text) IS NULL",
            &[],
        )
        .unwrap();
    assert_no_rows(silent, "members without a comment");
    let public = client
        .query(
            "SELECT p.oid::regprocedure::text FROM pg_proc p JOIN pg_depend d ON d.objid = p.oid AND d.classid = 'pg_proc'::regclass
             WHERE d.deptype = 'e' AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'litellm_spend')
               AND (p.proacl IS NULL OR p.proacl::text LIKE '%{=X%')",
            &[],
        )
        .unwrap();
    assert_no_rows(public, "functions that PUBLIC may execute");
}

#[test]
fn a_table_that_is_a_partition_or_inherits_cannot_be_captured_also_later() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"SET ROLE litellm;
               CREATE TABLE parent (LIKE "LiteLLM_SpendLogs");
               CREATE TABLE partitioned (LIKE "LiteLLM_SpendLogs") PARTITION BY RANGE ("startTime"); RESET ROLE"#,
        )
        .unwrap();
    let ways = [
        (
            r#"ALTER TABLE "LiteLLM_SpendLogs" INHERIT parent"#,
            r#"ALTER TABLE "LiteLLM_SpendLogs" NO INHERIT parent"#,
        ),
        (
            r#"ALTER TABLE partitioned ATTACH PARTITION "LiteLLM_SpendLogs" DEFAULT"#,
            r#"ALTER TABLE partitioned DETACH PARTITION "LiteLLM_SpendLogs""#,
        ),
    ];
    for (enter, leave) in ways {
        client.batch_execute(enter).unwrap();
        assert_refused(&mut client, "SELECT spend_attach()", "0A000");
        client.batch_execute(leave).unwrap();
    }
    client.batch_execute(&insert_rows("a", 50, 5)).unwrap();
    attach(&mut client);
    for (enter, leave) in ways {
        client.batch_execute(enter).unwrap();
        eventually("the status says so", || {
            holds(
                &mut client,
                "SELECT bool_and(last_error LIKE 'watch: %\"LiteLLM_SpendLogs\" cannot be captured while it is a partition%')
                 FROM spend_rollup_status",
            )
        });
        client.batch_execute(leave).unwrap();
        eventually("nothing is wrong any more", || {
            holds(&mut client, "SELECT bool_and(last_error IS NULL) FROM spend_rollup_status")
        });
    }
    client.batch_execute(&insert_rows("b", 50, 5)).unwrap();
    assert_exact(&mut client);
}

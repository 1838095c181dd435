//! Nothing of a user's runs with our rights. Each script of tests/attacks tries one way, as the owner of
//! LiteLLM's tables, who is no superuser, or as another role without rights; its head says what it does and
//! what is right, and its last line `held`, or what it got.

mod common;

use common::*;
use postgres::Client;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

/// What a script's database is like.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// LiteLLM's schema.
    Plain,
    WithExtension,
    Attached,
}
use State::*;

fn without_preload() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(&[NO_WORKER]))
}

fn attack(cluster: &'static Cluster, script: &str, state: State) {
    make_roles(cluster);
    let db = cluster.litellm_database();
    if state != Plain {
        prepare(cluster, &db, state);
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/attacks").join(script);
    let output = Command::new(cluster.bin.join("psql"))
        .args(["-X", "-h", cluster.dir.to_str().unwrap(), "-p", &PORT.to_string(), "-U", "postgres"])
        .args(["-d", &db.name, "-f", script.to_str().unwrap()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr).into_owned();
    // Who may not even look into our schema cannot ask what the last line asks.
    let held = said.contains("held") || complained.contains("permission denied for schema litellm_spend");
    assert!(held && !said.contains("HOLE"), "{said}\n{complained}\n{}", cluster.log_tail());
}

fn make_roles(cluster: &Cluster) {
    cluster
        .connect("postgres")
        .batch_execute(
            "SELECT pg_advisory_lock(1);
             DO $$ DECLARE r text; BEGIN
                 FOREACH r IN ARRAY ARRAY['mallory', 'victim', 'dash'] LOOP
                     IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = r) THEN
                         EXECUTE format('CREATE ROLE %I LOGIN', r);
                     END IF;
                 END LOOP;
             END $$",
        )
        .unwrap();
}

/// A DBA lets the owner of LiteLLM's tables call everything, which is more than most would.
fn prepare(cluster: &Cluster, db: &common::Database, state: State) {
    let mut client = db.connect();
    client.batch_execute("CREATE EXTENSION litellm_spend").unwrap();
    if state == Attached {
        client.batch_execute("SELECT spend_attach()").unwrap();
    }
    client
        .batch_execute(
            "DO $$ DECLARE f regprocedure; BEGIN
                 FOR f IN SELECT oid FROM pg_proc WHERE proname LIKE 'spend\\_%' AND pronamespace = 'public'::regnamespace LOOP
                     EXECUTE format('GRANT EXECUTE ON ROUTINE %s TO litellm', f);
                 END LOOP;
             END $$;
             GRANT EXECUTE ON FUNCTION monthly_global_spend TO litellm",
        )
        .unwrap();
    if std::ptr::eq(cluster, shared()) {
        let worker = "SELECT count(*) > 0 FROM spend_worker_status WHERE database = current_database()";
        eventually("the worker is there", || holds(&mut client, worker));
    }
}

#[test]
fn a_query_of_ours_that_names_anothers_relation_is_refused() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE t (at timestamp NOT NULL); ALTER TABLE litellm_spend.policy OWNER TO litellm",
        )
        .unwrap();
    let call = "SELECT spend_partition_set('t', time_column => 'at')";
    let refused = error(&mut client, call);
    assert_eq!(refused.code().code(), "XX000");
    assert!(refused.message().contains("with the rights of litellm_spend's owner"), "{refused:?}");
    client.batch_execute("ALTER TABLE litellm_spend.policy OWNER TO postgres").unwrap();
    client.batch_execute(call).unwrap();
}

#[test]
fn the_function_of_an_event_trigger_may_name_a_superusers_table_or_be_of_its_owner() {
    let (_db, mut client) = without_worker();
    client
        .batch_execute(
            "CREATE ROLE auditor; CREATE ROLE dba SUPERUSER; CREATE SCHEMA audit; CREATE TABLE audit.log (tag text);
             ALTER TABLE audit.log OWNER TO dba; GRANT USAGE ON SCHEMA audit TO auditor;
             CREATE FUNCTION audit.note() RETURNS event_trigger LANGUAGE plpgsql
                 AS 'BEGIN INSERT INTO audit.log VALUES (tg_tag); END';
             CREATE EVENT TRIGGER note ON ddl_command_end EXECUTE FUNCTION audit.note();
             SELECT spend_attach()",
        )
        .unwrap();
    assert!(holds(&mut client, "SELECT count(*) > 10 FROM audit.log"));
    client.batch_execute("ALTER TABLE audit.log OWNER TO auditor").unwrap();
    let detach = "SELECT spend_detach(drop_history => true)";
    let refused = error(&mut client, detach);
    assert_eq!(refused.code().code(), "XX000");
    assert!(refused.hint().unwrap().contains("make that function SECURITY DEFINER"), "{refused:?}");
    client
        .batch_execute(
            "ALTER FUNCTION audit.note() SECURITY DEFINER SET search_path = audit, pg_temp;
             ALTER FUNCTION audit.note() OWNER TO auditor",
        )
        .unwrap();
    client.batch_execute(detach).unwrap();
}

/// What has more rights than its user, by name, and why it may.
const TRUSTED: [(&str, &str); 7] = [
    (
        "function litellm_spend.capture_*",
        "SECURITY DEFINER of the table's owner: whoever writes need not be able to write the log",
    ),
    (
        "member *",
        "the extension's own: C functions that act as whom they must, PL/pgSQL with its caller's rights, state, status views",
    ),
    ("table litellm_spend.change_log", "ours, so that the table's owner can add to history only"),
    ("table litellm_spend.retired", "as the log"),
    ("sequence litellm_spend.change_log_seq", "as the log"),
    ("table litellm_spend.*_rollup", "the built-in rollups: history"),
    ("view litellm_spend.*", "live views of the built-in rollups, which read nothing but those and the log"),
];

/// What is SECURITY DEFINER or belongs to a superuser, in our schemas and among our members.
const RIGHTS: &str = "
    WITH super AS (SELECT oid FROM pg_roles WHERE rolsuper),
         member AS (SELECT classid, objid FROM pg_depend WHERE deptype = 'e'
                    AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'litellm_spend')),
         ours AS (SELECT oid FROM pg_namespace WHERE nspname LIKE 'litellm_spend%')
    SELECT CASE WHEN p.oid IN (SELECT objid FROM member) THEN 'member ' ELSE 'function ' END || n.nspname || '.' || proname AS name,
           prosecdef AS definer, p.proowner IN (SELECT oid FROM super) AS super
    FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
    WHERE (p.oid IN (SELECT objid FROM member) OR n.oid IN (SELECT oid FROM ours))
      AND (prosecdef OR p.proowner IN (SELECT oid FROM super))
    UNION ALL
    SELECT CASE WHEN c.oid IN (SELECT objid FROM member) THEN 'member '
                ELSE CASE relkind WHEN 'v' THEN 'view ' WHEN 'S' THEN 'sequence ' ELSE 'table ' END END || n.nspname || '.' || relname,
           false, true
    FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
    WHERE (c.oid IN (SELECT objid FROM member) OR n.oid IN (SELECT oid FROM ours))
      AND relkind IN ('r', 'p', 'v', 'm', 'S', 'f') AND relowner IN (SELECT oid FROM super)";

#[test]
fn what_has_more_rights_than_its_user_is_on_a_short_list() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 50, 20)).unwrap();
    client
        .batch_execute(
            "SET ROLE litellm; CREATE TABLE page_views (id bigserial, x int); RESET ROLE;
             SELECT spend_rollup_create('views', 'page_views', '{x}', '{array_agg(x) AS xs MERGE WITH array_cat}');
             SELECT spend_partition_convert()",
        )
        .unwrap();
    wait_until_converted(&mut client);
    client.batch_execute("SELECT spend_partition_revert()").unwrap();
    wait_until_plain(&mut client, "\"LiteLLM_SpendLogs\"");
    let found = client.query(RIGHTS, &[]).unwrap();
    assert!(found.len() > 40, "{} objects", found.len());
    for row in found {
        let (name, definer, superuser): (String, bool, bool) = (row.get(0), row.get(1), row.get(2));
        let fits = |pattern: &str| match pattern.split_once('*') {
            Some((start, end)) => name.starts_with(start) && name.ends_with(end),
            None => name == pattern,
        };
        assert!(TRUSTED.iter().any(|(pattern, _)| fits(pattern)), "{name} is not on the list");
        assert!(!(definer && superuser), "{name} is SECURITY DEFINER of a superuser");
        // Of a declared rollup nothing is ours.
        assert!(!name.contains(".views"), "{name}");
    }
}

/// What ALTER DEFAULT PRIVILEGES of the extension's owner grants on all that it makes would let others change
/// our state, by which we act, have rows of theirs captured, number them, or change history.
#[test]
fn nothing_of_ours_has_default_privileges() {
    let db = shared().litellm_database();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 50, 20)).unwrap();
    client
        .batch_execute(
            "DROP ROLE IF EXISTS default_p; CREATE ROLE default_p LOGIN;
             ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO default_p;
             ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO default_p;
             ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC;
             ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO default_p;
             ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO default_p;
             CREATE EXTENSION litellm_spend;
             SET ROLE litellm; CREATE TABLE page_views (id bigserial, x int); RESET ROLE;
             SELECT spend_rollup_create('views', 'page_views', '{x}', '{array_agg(x) AS xs MERGE WITH array_cat}')",
        )
        .unwrap();
    client.batch_execute("SELECT spend_attach(reports => true)").unwrap();
    wait_until_live(&mut client);
    let granted = "SELECT coalesce(array_agg(DISTINCT o.name ORDER BY o.name), '{}')
        FROM (SELECT oid, relname::text, relnamespace, relacl FROM pg_class
              UNION ALL SELECT oid, proname, pronamespace, coalesce(proacl, acldefault('f', proowner)) FROM pg_proc
              UNION ALL SELECT oid, nspname, oid, nspacl FROM pg_namespace) AS o(oid, name, schema, acl)
        WHERE (o.schema = 'litellm_spend'::regnamespace
               OR EXISTS (SELECT FROM pg_depend d WHERE d.objid = o.oid AND d.deptype = 'e'
                          AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'litellm_spend')))
          AND EXISTS (SELECT FROM aclexplode(o.acl) AS x WHERE x.grantee IN (0, 'default_p'::regrole))
          -- The aggregate of a live view, which runs as whoever reads that.
          AND o.name <> 'views.xs'";
    let none: Vec<String> = vec![];
    assert_eq!(value::<Vec<String>>(&mut client, granted), none);
    // The functions are made anew with each attach, what is granted by hand stays.
    client.batch_execute("SELECT spend_grant_reports('default_p'); SELECT spend_attach()").unwrap();
    let view = "SELECT has_table_privilege('default_p', 'litellm_spend.daily_usage', 'SELECT')";
    assert!(holds(&mut client, view));
    assert!(!value::<Vec<String>>(&mut client, granted).iter().any(|name| name.starts_with("capture_")));
    assert_eq!(capture_errors(&mut client), 0);
    client.batch_execute("DROP OWNED BY default_p; DROP ROLE default_p").unwrap();
}

/// As the owner of LiteLLM's tables, who is no superuser.
fn denied(client: &mut Client, call: &str) -> Option<String> {
    let refused = error(client, call);
    assert_eq!(refused.code().code(), "42501", "{call}: {refused:?}");
    refused.hint().map(str::to_string)
}

#[test]
fn an_admin_does_everything_that_takes_no_superuser() {
    let db = shared().litellm_database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"CREATE SCHEMA "Ext"; REVOKE ALL ON SCHEMA "Ext" FROM PUBLIC; CREATE EXTENSION litellm_spend SCHEMA "Ext";
               CREATE INDEX ON "LiteLLM_SpendLogs" ("startTime")"#,
        )
        .unwrap();
    client.batch_execute(&insert_rows("a", 60, 5)).unwrap();
    client.batch_execute("SET search_path = \"Ext\", public").unwrap();
    let mut litellm = db.cluster.connect_as(&db.name, LITELLM);
    litellm.batch_execute("SET search_path = public, \"Ext\"").unwrap();
    for _ in 0..2 {
        let said: Vec<(String, String)> = client
            .query("SELECT * FROM spend_grant_admin('litellm')", &[])
            .unwrap()
            .iter()
            .map(|row| (row.get(0), row.get(1)))
            .collect();
        let superusers = said.iter().filter(|(_, action)| action == "still takes a superuser").count();
        assert_eq!(superusers, 4, "{said:?}");
        for view in ["spend_health", "spend_worker_status"] {
            let row = (
                format!("TABLE \"Ext\".{view}"),
                "still takes pg_monitor, which sees all sessions: GRANT pg_monitor TO \"litellm\";"
                    .to_string(),
            );
            assert!(said.contains(&row), "{said:?}");
        }
        assert!(said.iter().all(|(_, action)| !action.contains("takes its owner")), "{said:?}");
    }
    for call in [
        "SELECT spend_attach()",
        "CALL spend_backfill()",
        "SELECT spend_rollup_run()",
        "SELECT spend_rollup_rebuild(NULL, CURRENT_DATE)",
        "SELECT spend_rollup_verify('daily_spend')",
        "SELECT spend_grant_reports('litellm')",
        "SELECT monthly_global_spend()",
        "SELECT * FROM spend_rollup_status, litellm_spend.coverage",
        "SELECT * FROM spend_partition_status",
        "SELECT spend_partition_plan()",
        "SELECT spend_partition_set(retention => '90 days')",
        "SELECT * FROM spend_partition_maintain()",
        "CREATE TABLE page_views (id bigserial, a int); INSERT INTO page_views (a) VALUES (1)",
        "SELECT spend_rollup_create('views', 'page_views', '{a}', '{count(*) AS n}')",
        "CALL spend_backfill('page_views')",
        "SELECT spend_rollup_register('hand', 'page_views'); SELECT spend_rollup_window('hand')",
        "SELECT spend_rollup_drop('views'); SELECT spend_rollup_drop('hand')",
        "SELECT spend_partition_convert()",
    ] {
        litellm.batch_execute(call).unwrap_or_else(|e| panic!("{call}: {e:?}"));
    }
    wait_until_converted(&mut client);
    for call in [
        "SELECT spend_partition_maintain()",
        "SELECT spend_partition_revert()",
        "SELECT spend_partition_revert(abort => true)",
    ] {
        litellm.batch_execute(call).unwrap_or_else(|e| panic!("{call}: {e:?}"));
    }
    // The worker may be making partitions.
    let detach = "SELECT spend_detach(drop_history => true)";
    eventually("it is detached", || litellm.batch_execute(detach).is_ok());
    client.batch_execute("SET ROLE pg_monitor; SELECT * FROM \"Ext\".spend_health; RESET ROLE").unwrap();
    // What it may not.
    for call in [
        "SELECT spend_restored()",
        "SELECT spend_grant_admin('litellm')",
        "SELECT spend_revoke_admin('litellm')",
    ] {
        denied(&mut litellm, call);
    }
    // What a member of pg_monitor gets, nobody else keeps.
    let reads = "SELECT count(*) FROM unnest('{spend_health, litellm_spend.index_survey, litellm_spend.blocker, litellm_spend.holder}'::text[]) AS view
                 WHERE has_table_privilege('watcher_s', view, 'SELECT')";
    client
        .batch_execute(
            "DROP ROLE IF EXISTS watcher_s; CREATE ROLE watcher_s NOINHERIT; SELECT spend_grant_admin('watcher_s')",
        )
        .unwrap();
    assert_eq!(value::<i64>(&mut client, reads), 0);
    client
        .batch_execute(
            "ALTER ROLE watcher_s INHERIT; GRANT pg_monitor TO watcher_s; SELECT spend_grant_admin('watcher_s');
             SET ROLE watcher_s; SELECT * FROM spend_health; RESET ROLE; REVOKE pg_monitor FROM watcher_s",
        )
        .unwrap();
    assert_eq!(value::<i64>(&mut client, reads), 4);
    client.batch_execute("SELECT spend_revoke_admin('watcher_s'), spend_revoke_admin('litellm')").unwrap();
    assert_eq!(value::<i64>(&mut client, reads), 0);
    client.batch_execute("DROP OWNED BY watcher_s; DROP ROLE watcher_s").unwrap();
    for call in ["SELECT spend_attach()", "CALL spend_backfill()", "SELECT * FROM spend_rollup_status"] {
        denied(&mut litellm, call);
    }
    assert_eq!(error(&mut client, "SELECT spend_grant_admin(0::oid::regrole)").code().code(), "42704");
    assert_refused(&mut client, "SELECT spend_grant_admin(NULL)", "22004");
}

#[test]
fn who_may_not_call_is_told_what_lets_it() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute("DROP ROLE IF EXISTS \"Ops h\"; CREATE ROLE \"Ops h\" LOGIN").unwrap();
    let mut ops = db.cluster.connect_as(&db.name, "Ops h");
    let admin = r#"SELECT * FROM spend_grant_admin('"Ops h"');"#;
    let lets = format!("A superuser lets it: {admin}");
    for call in [
        "SELECT spend_attach()",
        "SELECT * FROM spend_partition_plan()",
        "CALL spend_backfill()",
        "SELECT spend_rollup_run()",
    ] {
        assert_eq!(denied(&mut ops, call).as_deref(), Some(&*lets), "{call}");
    }
    let hint = denied(&mut ops, "SELECT * FROM monthly_global_spend()");
    assert_eq!(
        hint.unwrap(),
        r#"A superuser, or the captured table's owner, lets it: SELECT * FROM spend_grant_reports('"Ops h"');"#
    );
    let hint = denied(&mut ops, "SELECT * FROM spend_rollup_status").unwrap();
    assert!(
        hint.starts_with(r#"A superuser lets it: GRANT pg_monitor TO "Ops h"; or"#) && hint.contains(admin),
        "{hint}"
    );
    let hint = denied(&mut ops, "SELECT * FROM litellm_spend.coverage").unwrap();
    let reports = r#"SELECT * FROM spend_grant_reports('"Ops h"');"#;
    let owner = format!("A superuser, or the captured table's owner, lets it: {reports}");
    assert_eq!(hint, format!("{owner} for the reports. {lets} for our calls."));
    // What a procedure calls.
    client
        .batch_execute(
            r#"GRANT EXECUTE ON PROCEDURE spend_backfill TO "Ops h"; GRANT USAGE ON SCHEMA litellm_spend TO "Ops h""#,
        )
        .unwrap();
    assert_eq!(denied(&mut ops, "CALL spend_backfill()").as_deref(), Some(&*lets));
    // By another name.
    client.batch_execute("SET ROLE litellm").unwrap();
    assert_eq!(
        denied(&mut client, "SELECT spend_attach()").unwrap(),
        "A superuser lets it: SELECT * FROM spend_grant_admin('litellm');"
    );
    client
        .batch_execute(
            "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'; REVOKE ALL ON FUNCTION mine() FROM PUBLIC;
             RESET ROLE",
        )
        .unwrap();
    assert_eq!(denied(&mut ops, "SELECT mine()"), None, "not ours");
    drop(ops);
    client.batch_execute("DROP OWNED BY \"Ops h\"; DROP ROLE \"Ops h\"").unwrap();
}

#[test]
fn an_admin_who_owns_no_table_changes_none() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client
        .batch_execute(
            "SET ROLE litellm; CREATE TABLE page_views (id bigserial, at timestamp NOT NULL, x int); RESET ROLE;
             SELECT spend_rollup_create('views', 'page_views', '{x}', '{count(*) AS n}');
             SELECT spend_rollup_register('hand', 'page_views');
             DROP ROLE IF EXISTS ops_a; CREATE ROLE ops_a LOGIN",
        )
        .unwrap();
    let table: String = value(
        &mut client,
        "SELECT string_agg(action, '') FROM spend_grant_admin('ops_a') WHERE object LIKE 'TABLE%SpendLogs%'",
    );
    assert_eq!(table, r#"still takes its owner: GRANT "litellm" TO "ops_a";"#);
    let mut ops = db.cluster.connect_as(&db.name, "ops_a");
    let table = r#"'"LiteLLM_SpendLogs"'"#;
    for call in [
        "spend_attach()".into(),
        format!("spend_attach({table}, 'subtract')"),
        "spend_detach()".into(),
        "spend_detach(drop_history => true)".into(),
        "spend_rollup_run()".into(),
        "spend_rollup_run('daily_spend')".into(),
        "spend_rollup_run('views')".into(),
        "spend_rollup_rebuild(NULL, force => true)".into(),
        "spend_rollup_rebuild('views')".into(),
        "spend_rollup_verify('daily_spend')".into(),
        "spend_rollup_verify('views')".into(),
        "spend_rollup_create('mine', 'page_views', '{x}', '{count(*) AS n}')".into(),
        "spend_rollup_register('mine', 'page_views')".into(),
        "spend_rollup_window('hand')".into(),
        "spend_rollup_drop('views')".into(),
        "spend_rollup_drop('hand')".into(),
        "spend_grant_reports('ops_a')".into(),
        "spend_partition_plan()".into(),
        format!("spend_partition_plan({table})"),
        "spend_partition_convert()".into(),
        "spend_partition_revert()".into(),
        "spend_partition_set(retention => '1 day')".into(),
        "spend_partition_set('page_views', retention => '1 day', time_column => 'at')".into(),
        "spend_partition_maintain()".into(),
        "litellm_spend.maintain_at(NULL, '2999-01-01')".into(),
        "litellm_spend.backfill_step(NULL)".into(),
        "litellm_spend.backfill_step('page_views')".into(),
        "monthly_global_spend()".into(),
    ] {
        denied(&mut ops, &format!("SELECT * FROM {call}"));
    }
    denied(&mut ops, "CALL spend_backfill()");
    denied(&mut ops, "CALL spend_backfill('page_views')");
    for relation in [
        "\"LiteLLM_SpendLogs\"",
        "litellm_spend.daily_spend",
        "litellm_spend.change_log",
        "litellm_spend.rollup",
    ] {
        denied(&mut ops, &format!("SELECT * FROM {relation}"));
    }
    client.batch_execute(r#"GRANT "litellm" TO "ops_a""#).unwrap();
    ops.batch_execute("SELECT spend_attach(); SELECT spend_rollup_run()").unwrap();
    drop(ops);
    client.batch_execute("DROP OWNED BY ops_a; DROP ROLE ops_a").unwrap();
}

#[test]
fn what_a_merge_failed_with_is_for_the_rollups_owner_and_monitors() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "DROP ROLE IF EXISTS ops_b; CREATE ROLE ops_b; SELECT * FROM spend_grant_admin('ops_b');
             SELECT * FROM spend_grant_admin('litellm'); SET ROLE litellm;
             CREATE TABLE notes (id bigserial PRIMARY KEY, note text);
             SELECT spend_rollup_create('numbers', 'notes', '{note}', '{sum(note::int) AS n}'); RESET ROLE;
             INSERT INTO notes (note) VALUES ('a secret')",
        )
        .unwrap();
    let failed = "SELECT last_error LIKE '%a secret%' FROM spend_rollup_status WHERE rollup = 'numbers'";
    eventually("it has failed", || holds(&mut client, &format!("SELECT coalesce(({failed}), false)")));
    for (role, sees) in [("litellm", true), ("ops_b", false), ("pg_monitor", true)] {
        client.batch_execute(&format!("SET ROLE {role}")).unwrap();
        assert_eq!(holds(&mut client, failed), sees, "{role}");
        client.batch_execute("RESET ROLE").unwrap();
    }
    client.batch_execute("DROP OWNED BY ops_b; DROP ROLE ops_b").unwrap();
}

#[test]
fn what_maintenance_failed_with_is_for_the_tables_owner_and_monitors() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "DROP ROLE IF EXISTS ops_c; CREATE ROLE ops_c; SELECT * FROM spend_grant_admin('ops_c');
             SELECT * FROM spend_grant_admin('litellm'); SET ROLE litellm;
             CREATE TABLE logs (id bigint, at timestamp NOT NULL) PARTITION BY RANGE (at);
             CREATE TABLE logs_default PARTITION OF logs DEFAULT;
             SELECT spend_partition_set('logs'); RESET ROLE",
        )
        .unwrap();
    let said = "SELECT DISTINCT last_error FROM spend_partition_status";
    for (role, sees) in [
        ("litellm", "a secret"),
        ("ops_c", "failed: its owner and members of pg_monitor see how"),
        ("pg_monitor", "a secret"),
    ] {
        // In a transaction: a round of maintenance would take it back.
        client
            .batch_execute(&format!(
                "BEGIN; UPDATE litellm_spend.policy SET last_error = 'a secret', last_error_at = now(); SET LOCAL ROLE {role}"
            ))
            .unwrap();
        assert_eq!(value::<String>(&mut client, said), sees, "{role}");
        client.batch_execute("ROLLBACK").unwrap();
    }
    client.batch_execute("DROP OWNED BY ops_c; DROP ROLE ops_c").unwrap();
}

/// What a detach has kept is for who may act for the owner of the table that was detached, and for
/// superusers.
#[test]
fn kept_history_belongs_to_who_owned_the_table() {
    let db = shared().database().with_rows("a", 50, 5).attached();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"DROP ROLE IF EXISTS team_h; CREATE ROLE team_h LOGIN; CREATE SCHEMA th AUTHORIZATION team_h;
               SELECT spend_grant_admin('litellm'); SELECT spend_grant_admin('team_h');
               SET ROLE team_h; CREATE TABLE th.logs (request_id text, "startTime" timestamp, spend float8,
                   total_tokens int, prompt_tokens int, completion_tokens int, api_key text, model text);
               RESET ROLE"#,
        )
        .unwrap();
    let mut litellm = db.cluster.connect_as(&db.name, LITELLM);
    let mut team = db.cluster.connect_as(&db.name, "team_h");
    let detach = |client: &mut Client| {
        eventually("it is detached", || client.batch_execute("SELECT spend_detach()").is_ok())
    };
    let (own, teams) = ("SELECT spend_attach()", "SELECT spend_attach('th.logs')");
    let reads = |client: &mut Client, role: &str| {
        let table = "litellm_spend.daily_spend_by_key_rollup";
        holds(client, &format!("SELECT has_table_privilege('{role}', '{table}', 'SELECT')"))
    };
    // 1. the former owner, whoever has detached it, and nobody else.
    detach(&mut client);
    assert_refused(&mut team, teams, "42501");
    let refused = error(&mut team, teams);
    assert!(refused.detail().is_some_and(|detail| detail.contains(r#"role "litellm""#)), "{refused:?}");
    assert_eq!(error(&mut team, "SELECT spend_detach(drop_history => true)").code().code(), "42501");
    assert!(reads(&mut client, LITELLM) && !reads(&mut client, "team_h"));
    litellm.batch_execute(own).unwrap();
    // 2. where nobody is noted, as in a database that 0.1.0 detached: a superuser.
    detach(&mut litellm);
    client.batch_execute("UPDATE litellm_spend.rollup SET owner = NULL").unwrap();
    assert_refused(&mut litellm, own, "42501");
    client.batch_execute(own).unwrap();
    // 3. a superuser gives it to another owner, and with it the right to read it.
    detach(&mut litellm);
    client.batch_execute(teams).unwrap();
    assert!(reads(&mut client, "team_h") && !reads(&mut client, LITELLM));
    detach(&mut team);
    assert_refused(&mut litellm, own, "42501");
    // 4. a member of both.
    client.batch_execute("GRANT team_h TO litellm").unwrap();
    litellm.batch_execute(own).unwrap();
    assert!(!holds(&mut client, "SELECT EXISTS (SELECT FROM litellm_spend.rollup WHERE owner IS NOT NULL)"));
    client.batch_execute("REVOKE team_h FROM litellm").unwrap();
    // 5. a role that is no more.
    client
        .batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" OWNER TO team_h; SELECT spend_attach()"#)
        .unwrap();
    detach(&mut client);
    client.batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" OWNER TO litellm"#).unwrap();
    drop(team);
    client.batch_execute("DROP OWNED BY team_h; DROP ROLE team_h").unwrap();
    assert_refused(&mut litellm, own, "42501");
    client.batch_execute("SELECT spend_attach()").unwrap();
    // 6. or it is dropped, and the next one begins anew. What the documentation says stays.
    detach(&mut client);
    client.batch_execute("SELECT spend_detach(drop_history => true)").unwrap();
    let stays = "SELECT has_schema_privilege('litellm', 'litellm_spend', 'USAGE')
                     AND has_function_privilege('litellm', 'litellm_spend.backfill_step(regclass)', 'EXECUTE')
                     AND has_column_privilege('litellm', 'litellm_spend.rollup', 'watermark', 'SELECT')
                     AND NOT has_column_privilege('litellm', 'litellm_spend.rollup', 'definition', 'SELECT')
                     AND NOT has_sequence_privilege('litellm', 'litellm_spend.capture_failures', 'USAGE')";
    assert!(holds(&mut client, stays));
    litellm.batch_execute(own).unwrap();
}

macro_rules! attacks {
    ($cluster:path: $($name:ident $script:literal $state:ident;)*) => {
        use super::*;
        $(#[test] fn $name() { attack($cluster(), $script, $state) })*
    };
}

mod preloaded {
    attacks! { shared:
        a_cast_in_capture "01-capture-trigger-cast.sql" Attached;
        a_merge_function_whose_schema_is_a_statement "02-merge-with-injection.sql" WithExtension;
        a_dimension_that_changes_how_text_is_read "03-dimension-injection.sql" WithExtension;
        an_index_expression_at_planning "05-index-expression-at-planning.sql" Attached;
        a_check_and_an_index_in_maintenance "06-maintenance-check-and-index.sql" WithExtension;
        a_trigger_on_the_copy "07-revert-truncate-trigger.sql" WithExtension;
        a_view_that_is_another_statement_at_detach "08-detach-view-injection.sql" WithExtension;
        a_cast_of_the_replaced_table "10-replaced-table-cast.sql" Attached;
        a_key_column_that_is_a_statement "12-revert-column-name-injection.sql" WithExtension;
        a_policy_that_outlives_its_table "15-policy-by-name.sql" WithExtension;
        a_view_of_who_may_not_read "16-view-owner-gets-change-log.sql" WithExtension;
        a_partition_that_a_dba_made "17-partition-of-a-dba.sql" WithExtension;
        a_table_that_becomes_a_view "18-table-becomes-a-view.sql" Attached;
        a_materialized_view_of_another_role "20-materialized-view-of-another-role.sql" WithExtension;
        a_table_of_another_role "21-table-of-another-role.sql" Attached;
        rows_that_a_policy_hides "22-row-security-hides-rows-from-merges.sql" WithExtension;
        a_star "23-star-crashes-the-server.sql" WithExtension;
        an_owner_that_keeps_the_worker_busy "25-one-owner-stops-the-worker.sql" WithExtension;
        an_aggregate_made_before_the_extension "27-create-extension-search-path.sql" Plain;
        an_operator_in_the_utility_hook "28-hook-search-path.sql" Plain;
        an_error_that_looks_like_a_cancel "29-one-owner-ends-every-run.sql" WithExtension;
        a_bound_that_is_no_time "30-one-owner-breaks-the-status.sql" WithExtension;
        a_role_that_does_not_exist "31-internal-error.sql" Attached;
        a_row_at_the_end_of_time "32-a-time-that-stops-repairs.sql" Attached;
        a_merge_within_a_merge "34-a-merge-within-a-merge.sql" WithExtension;
        code_that_outlives_its_cancel "35-code-that-outlives-its-cancel.sql" WithExtension;
        a_table_given_to_a_superuser "36-a-table-given-to-a-superuser.sql" Attached;
        capture_left_to_a_superuser "56-capture-left-to-a-superuser.sql" Attached;
        a_source_given_to_a_superuser "37-a-source-given-to-a-superuser.sql" WithExtension;
        a_policy_of_the_former_owner "38-a-policy-of-the-former-owner.sql" WithExtension;
        code_of_a_third_role_in_a_conversion "39-code-of-a-third-role-in-a-conversion.sql" WithExtension;
        a_table_by_its_name "40-a-table-by-its-name.sql" WithExtension;
        a_source_given_to_another_role "41-a-source-given-to-another-role.sql" WithExtension;
        a_sequence_of_another_role "42-a-sequence-of-another-role.sql" WithExtension;
        a_call_that_lifts_the_limit "43-a-call-that-lifts-the-limit.sql" WithExtension;
        a_view_that_is_made_again "44-a-view-that-is-made-again.sql" WithExtension;
        an_index_that_waits "45-an-index-that-waits.sql" WithExtension;
        a_conversion_that_cannot_be_looked_at "46-a-conversion-that-cannot-be-looked-at.sql" WithExtension;
        numbers_that_break_the_status "47-numbers-that-break-the-status.sql" WithExtension;
        a_transaction_that_keeps_every_name "48-a-transaction-that-keeps-every-name.sql" WithExtension;
        a_maintenance_within_a_maintenance "49-a-maintenance-within-a-maintenance.sql" WithExtension;
        an_index_that_is_slow_to_summarize "50-an-index-that-is-slow-to-summarize.sql" WithExtension;
        an_archive_of_another_role "51-an-archive-of-another-role.sql" WithExtension;
        a_built_in_rollup_given_to_another_role "52-a-built-in-rollup-given-to-another-role.sql" Attached;
        calls_on_the_callers_path "53-calls-on-the-callers-path.sql" WithExtension;
        history_that_another_has_kept "54-history-that-another-has-kept.sql" WithExtension;
        a_view_about_another_table "55-a-view-about-another-table.sql" WithExtension;
    }
}

mod not_preloaded {
    attacks! { without_preload:
        a_cast_in_capture "01-capture-trigger-cast.sql" Attached;
        a_merge_function_whose_schema_is_a_statement "02-merge-with-injection.sql" WithExtension;
        a_dimension_that_changes_how_text_is_read "03-dimension-injection.sql" WithExtension;
        an_index_expression_at_planning "05-index-expression-at-planning.sql" Attached;
        a_check_and_an_index_in_maintenance "06-maintenance-check-and-index.sql" WithExtension;
        a_view_that_is_another_statement_at_detach "08-detach-view-injection.sql" WithExtension;
        a_view_of_who_may_not_read "16-view-owner-gets-change-log.sql" WithExtension;
        a_table_that_becomes_a_view "18-table-becomes-a-view.sql" Attached;
        a_star "23-star-crashes-the-server.sql" WithExtension;
        an_aggregate_made_before_the_extension "27-create-extension-search-path.sql" Plain;
        an_error_that_looks_like_a_cancel "29-one-owner-ends-every-run.sql" WithExtension;
        a_bound_that_is_no_time "30-one-owner-breaks-the-status.sql" WithExtension;
        a_role_that_does_not_exist "31-internal-error.sql" Attached;
        a_merge_within_a_merge "34-a-merge-within-a-merge.sql" WithExtension;
        a_table_given_to_a_superuser "36-a-table-given-to-a-superuser.sql" Attached;
        capture_left_to_a_superuser "56-capture-left-to-a-superuser.sql" Attached;
        a_source_given_to_a_superuser "37-a-source-given-to-a-superuser.sql" WithExtension;
        a_table_by_its_name "40-a-table-by-its-name.sql" WithExtension;
        a_sequence_of_another_role "42-a-sequence-of-another-role.sql" WithExtension;
        numbers_that_break_the_status "47-numbers-that-break-the-status.sql" WithExtension;
        an_archive_of_another_role "51-an-archive-of-another-role.sql" WithExtension;
        a_built_in_rollup_given_to_another_role "52-a-built-in-rollup-given-to-another-role.sql" Attached;
        calls_on_the_callers_path "53-calls-on-the-callers-path.sql" WithExtension;
        a_transaction_that_keeps_every_name "48-a-transaction-that-keeps-every-name.sql" WithExtension;
        a_maintenance_within_a_maintenance "49-a-maintenance-within-a-maintenance.sql" WithExtension;
    }
}

/// A function that only says that it is immutable: calling it makes its owner's role a superuser, if whoever
/// calls it can.
const DEED: &str = "
    CREATE FUNCTION deed() RETURNS bigint VOLATILE LANGUAGE plpgsql AS $$
        BEGIN EXECUTE 'ALTER ROLE mallory_h SUPERUSER'; RETURN 1; EXCEPTION WHEN OTHERS THEN RETURN 1; END $$;
    CREATE FUNCTION evil(bigint) RETURNS bigint IMMUTABLE LANGUAGE plpgsql AS 'BEGIN RETURN m.deed(); END';
    CREATE SEQUENCE s; CREATE TABLE src (id bigint DEFAULT nextval('s'), x int)";

/// A database in which mallory_h, who may call everything, has a schema with [`DEED`], and LiteLLM's table.
fn mallorys_database() -> (common::Database, Client) {
    static ROLE: std::sync::Once = std::sync::Once::new();
    ROLE.call_once(|| shared().connect("postgres").batch_execute("CREATE ROLE mallory_h LOGIN").unwrap());
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(&format!(
            "SELECT spend_grant_admin('mallory_h'); CREATE SCHEMA m AUTHORIZATION mallory_h;
             GRANT ALL ON SCHEMA public TO mallory_h;
             ALTER TABLE \"LiteLLM_SpendLogs\" OWNER TO mallory_h;
             SET ROLE mallory_h; SET search_path = m; {DEED}; RESET ROLE; RESET search_path"
        ))
        .unwrap();
    (db, client)
}

fn is_superuser(client: &mut Client) -> bool {
    holds(client, "SELECT rolsuper FROM pg_roles WHERE rolname = 'mallory_h'")
}

#[test]
fn a_source_that_changes_hands_while_its_rollup_waits_for_it_is_refused() {
    let (db, mut superuser) = mallorys_database();
    superuser.batch_execute("BEGIN; ALTER TABLE m.src OWNER TO postgres").unwrap();
    let call = "SET ROLE mallory_h; SET search_path = m, public;
        SELECT spend_rollup_create('x', 'src', ARRAY['m.evil(1) AS e'], ARRAY['count(*) AS n'])";
    let refused = error_after_waiting(&db, call, |_, _| superuser.batch_execute("COMMIT").unwrap());
    assert_eq!(refused.expect("it is refused").code().code(), "42501");
    assert!(!is_superuser(&mut superuser));
}

#[test]
fn a_source_whose_name_another_gets_while_its_rollup_waits_for_it_is_the_one_that_was_meant() {
    let (db, mut owner) = mallorys_database();
    owner
        .batch_execute(
            "SET ROLE mallory_h; BEGIN; ALTER TABLE m.src RENAME TO old; INSERT INTO m.old (x) VALUES (1);
             CREATE TABLE m.src (id bigserial, x int)",
        )
        .unwrap();
    // Its transaction has an XID, so that it sees what others commit meanwhile.
    let call = "SET ROLE mallory_h; BEGIN; SELECT pg_current_xact_id();
        SELECT spend_rollup_create('x', 'm.src', '{x}', '{count(*) AS n}'); COMMIT";
    let refused = error_after_waiting(&db, call, |_, _| owner.batch_execute("COMMIT").unwrap());
    assert!(refused.is_none(), "{refused:?}");
    assert_eq!(value::<i64>(&mut owner, "SELECT sum(n)::bigint FROM litellm_spend.x"), 1);
}

/// Who asks is the owner as of now, not as of when their statement began.
#[test]
fn a_table_that_changes_hands_while_the_statement_runs_is_anothers() {
    let (db, mut superuser) = mallorys_database();
    for call in [
        "spend_rollup_create('x', 'm.src', ARRAY['m.evil(1) AS e'], ARRAY['count(*) AS n'])",
        "spend_rollup_register('x', 'm.src')",
        "spend_partition_set()",
        "spend_partition_plan()",
        "spend_partition_convert()",
        "spend_partition_revert()",
        "spend_index_plan()",
        "spend_index_set(indexes => '{team}')",
        "spend_index_drop()",
        "spend_upgrade_check('1.92')",
        "spend_attach()",
    ] {
        superuser
            .batch_execute(
                "ALTER TABLE m.src OWNER TO mallory_h; ALTER TABLE \"LiteLLM_SpendLogs\" OWNER TO mallory_h;
                 SELECT pg_advisory_lock(7)",
            )
            .unwrap();
        let call = format!("SET ROLE mallory_h; SELECT pg_advisory_xact_lock(7), {call}");
        let refused = error_after_waiting(&db, &call, |_, _| {
            superuser
                .batch_execute(
                    "ALTER TABLE m.src OWNER TO postgres; ALTER TABLE \"LiteLLM_SpendLogs\" OWNER TO postgres",
                )
                .unwrap();
            // Once that is committed.
            superuser.batch_execute("SELECT pg_advisory_unlock(7)").unwrap();
        });
        let refused = refused.unwrap_or_else(|| panic!("{call} is not refused"));
        assert_eq!(refused.code().code(), "42501", "{call}: {refused:?}");
        assert!(refused.message().contains("owner"), "{call}: {refused:?}");
        assert!(!is_superuser(&mut superuser), "{call}");
    }
}

/// The same while the call waits for a lock on it, or on what comes before.
#[test]
fn a_table_that_changes_hands_while_a_call_waits_is_refused() {
    let (db, mut superuser) = mallorys_database();
    let mut keeper = db.connect();
    for (keep, call) in [
        ("SELECT", "spend_partition_plan()"),
        ("SELECT", "spend_index_plan()"),
        ("SELECT", "spend_upgrade_check('1.92')"),
        ("LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE", "spend_attach()"),
    ] {
        superuser.batch_execute("ALTER TABLE \"LiteLLM_SpendLogs\" OWNER TO mallory_h").unwrap();
        superuser.batch_execute("BEGIN; ALTER TABLE \"LiteLLM_SpendLogs\" OWNER TO postgres").unwrap();
        keeper.batch_execute(&format!("BEGIN; {keep}")).unwrap();
        let (mut caller, mut client) = (db.connect(), db.connect());
        caller.batch_execute("SET statement_timeout = '60s'; SET ROLE mallory_h").unwrap();
        let pid = backend_pid(&mut caller);
        let refused = std::thread::scope(|scope| {
            let running = scope.spawn(|| caller.batch_execute(&format!("SELECT {call}")));
            // An attachment is tried again and again, which is no wait that the server knows of.
            eventually("it waits", || {
                let busy = format!("SELECT state = 'active' FROM pg_stat_activity WHERE pid = {pid}");
                let begun =
                    waits_for_a_lock(&mut client, pid) || keep != "SELECT" && holds(&mut client, &busy);
                begun || running.is_finished()
            });
            std::thread::sleep(std::time::Duration::from_millis(200));
            assert!(!running.is_finished(), "{call} has not waited: {:?}", running.join());
            superuser.batch_execute("COMMIT").unwrap();
            keeper.batch_execute("COMMIT").unwrap();
            running.join().unwrap().expect_err(call)
        });
        let refused = refused.as_db_error().unwrap();
        assert_eq!(refused.code().code(), "42501", "{call}: {refused:?}");
        assert!(refused.message().contains("owner"), "{call}: {refused:?}");
    }
}

//! Indexes for LiteLLM's Logs page: planned, built on closed partitions, left alone by LiteLLM's tools.

mod common;

use common::*;
use postgres::Client;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Rows as the Logs page looks for them: of 200 teams and 50 aliases, one in fifty a failure, one in a
/// hundred with an end user.
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

// ---- the plan -----------------------------------------------------------------------------------------

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
    assert_eq!(
        possible,
        "not possible: index \"key_alias\" needs extension pg_trgm. \
         CREATE EXTENSION pg_trgm; comes with the server's contrib package."
    );
    client
        .batch_execute(
            r#"CREATE INDEX "LiteLLM_SpendLogs_litellm_call_id_idx" ON "LiteLLM_SpendLogs" (litellm_call_id);
               CREATE INDEX mine ON "LiteLLM_SpendLogs" (team_id, "startTime");
               CREATE INDEX of_users ON "LiteLLM_SpendLogs" ("user", "startTime", spend);
               CREATE SCHEMA "Ext"; CREATE EXTENSION pg_trgm SCHEMA "Ext""#,
        )
        .unwrap();
    // It is built as the table's owner.
    let message = r#"role "litellm" may not use schema "Ext", where extension pg_trgm is"#;
    let grant = r#"GRANT USAGE ON SCHEMA "Ext" TO "litellm";"#;
    let state = format!("not possible: {message}. {grant}");
    assert_eq!(planned::<String>(&mut client, "state", "key_alias"), state);
    let error = error(&mut client, "SELECT spend_index_set(indexes => '{team, key_alias}')");
    assert_eq!((error.code().code(), error.message(), error.hint()), ("42501", message, Some(grant)));
    let detail = "An index is built as the table's owner, and this one with an operator class of pg_trgm's.";
    assert_eq!(error.detail(), Some(detail));
    assert!(holds(&mut client, "SELECT count(*) = 0 FROM litellm_spend.index_set"));
    client.batch_execute(grant).unwrap();
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
    assert!(definition.contains(r#""Ext".gin_trgm_ops"#), "{definition}");
    // Beside its own wherever it is missing from a version of LiteLLM.
    client.batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" DROP COLUMN litellm_call_id"#).unwrap();
    let state: String = planned(&mut client, "state", "call_id");
    assert_eq!(
        state,
        "not possible: relation \"LiteLLM_SpendLogs\" has no column \"litellm_call_id\". \
         Check that this is LiteLLM's table and that its migrations have run."
    );
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

/// New partitions are stored as the newest one, and LiteLLM's role may be another than the table's owner.
#[test]
fn advice_for_a_partitioned_table_is_gone_when_it_was_followed_once() {
    let (db, mut client) = partitioned(shared());
    let name = format!("app_{}", db.name);
    client
        .batch_execute(&format!(
            r#"CREATE ROLE {name}; GRANT INSERT ON "LiteLLM_SpendLogs" TO {name};
               ALTER ROLE {name} IN DATABASE {} SET plan_cache_mode = 'force_custom_plan'"#,
            db.name
        ))
        .unwrap();
    let advice = "SELECT definition FROM spend_index_plan() WHERE item = 'advice'";
    let rows: Vec<String> = client.query(advice, &[]).unwrap().iter().map(|r| r.get(0)).collect();
    assert!(rows.iter().all(|sql| !sql.starts_with("ALTER ROLE")), "{rows:?}");
    assert!(rows.iter().any(|sql| sql.starts_with(r#"ALTER TABLE "public"."p0" SET"#)), "{rows:?}");
    for sql in &rows {
        client.batch_execute(sql).unwrap();
    }
    assert_eq!(client.query(advice, &[]).unwrap().len(), 0);
    client.batch_execute(&format!("DROP OWNED BY {name}; DROP ROLE {name}")).unwrap();
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

// ---- to be built --------------------------------------------------------------------------------------

/// The log as LiteLLM's own script partitions it: the day before yesterday, yesterday, today, DEFAULT.
fn partitioned(cluster: &'static Cluster) -> (Database, Client) {
    let db = cluster.database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"SET ROLE litellm;
               ALTER TABLE "LiteLLM_SpendLogs" RENAME TO "LiteLLM_SpendLogs_old";
               CREATE TABLE "LiteLLM_SpendLogs" (LIKE "LiteLLM_SpendLogs_old" INCLUDING DEFAULTS, PRIMARY KEY (request_id, "startTime"))
                   PARTITION BY RANGE ("startTime");
               CREATE INDEX ON "LiteLLM_SpendLogs" ("startTime");
               CREATE TABLE "LiteLLM_SpendLogs_pdefault" PARTITION OF "LiteLLM_SpendLogs" DEFAULT;
               RESET ROLE"#,
        )
        .unwrap();
    let days = (0..3).map(|ago| day_partition(&format!("p{ago}"), -ago)).collect::<String>();
    client.batch_execute(&format!("SET TimeZone = 'UTC'; {days} RESET TimeZone")).unwrap();
    client.batch_execute(&format!(r#"{ROWS}; ANALYZE "LiteLLM_SpendLogs""#)).unwrap();
    (db, client)
}

fn without_worker() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(&[NO_WORKER]))
}

/// Index, partition and state, as a monitor sees them.
fn status(client: &mut Client) -> Vec<(String, String, String)> {
    client.batch_execute("SET ROLE pg_monitor").unwrap();
    let sql = r#"SELECT "index", partition::text, state FROM spend_index_status"#;
    let rows = client.query(sql, &[]).unwrap();
    client.batch_execute("RESET ROLE").unwrap();
    rows.iter().map(|r| (r.get(0), r.get(1), r.get(2))).collect()
}

fn wait_for(client: &mut Client, index: &str, partition: &str, state: &str) {
    let mut found = vec![];
    for _ in 0..6000 {
        found = status(client);
        if found.iter().any(|(i, p, s)| (i.as_str(), p.as_str(), s.as_str()) == (index, partition, state)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("{index} of {partition} is never {state}: {found:?}");
}

/// Ours, by name, and whether they are valid.
fn ours(client: &mut Client) -> Vec<(String, bool)> {
    let sql = "SELECT indexrelid::regclass::text, indisvalid FROM pg_index
               WHERE indexrelid::regclass::text LIKE '%litellm_spend\\_%' AND indrelid::regclass::text NOT LIKE 'litellm_spend.%' ORDER BY 1";
    client.query(sql, &[]).unwrap().iter().map(|r| (r.get(0), r.get(1))).collect()
}

/// A transaction that any CREATE INDEX CONCURRENTLY waits for, and that has no lock on the log.
fn old_snapshot(db: &Database) -> Client {
    let mut client = db.connect();
    client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class LIMIT 1").unwrap();
    client
}

fn wait_until_it_waits(client: &mut Client, index: &str, partition: &str) {
    eventually("the build waits", || {
        holds(
            client,
            &format!(
                r#"SELECT bool_or(state = 'building' AND blocked_by IS NOT NULL) FROM spend_index_status
                   WHERE "index" = '{index}' AND partition = '{partition}'::regclass"#
            ),
        )
    });
}

/// What was tried in vain is tried now, not in half a minute.
fn try_again(client: &mut Client) {
    client.batch_execute("UPDATE litellm_spend.index_failure SET retry_at = clock_timestamp()").unwrap();
}

#[test]
fn a_worker_that_looks_rarely_is_said_to() {
    let cluster = own_cluster(&["litellm_spend.merge_interval = '1h'"]);
    let (_db, mut client) = partitioned(cluster);
    eventually("there is a worker", || {
        holds(
            &mut client,
            "SELECT bool_or(state = 'idle') FROM spend_worker_status WHERE kind = 'litellm_spend worker'",
        )
    });
    let set = "SELECT detail FROM spend_index_set(indexes => '{team}') WHERE state = 'waiting'";
    let said: Vec<String> = client.query(set, &[]).unwrap().iter().map(|row| row.get(0)).collect();
    assert_eq!(said, ["begun within 3600 s: see litellm_spend.merge_interval"; 2]);
}

#[test]
fn closed_partitions_get_their_indexes_the_newest_first_and_the_open_one_when_that_was_asked_for() {
    let (db, mut client) = partitioned(shared());
    let mut owner = shared().connect_as(&db.name, LITELLM);
    client.batch_execute("SELECT spend_grant_admin('litellm'); CREATE EXTENSION pg_trgm").unwrap();
    owner.batch_execute("SELECT * FROM spend_index_set(indexes => '{team, key_alias}')").unwrap();
    wait_for(&mut client, "team", "p2", "built");
    assert_eq!(
        status(&mut client),
        [
            ("key_alias", r#""LiteLLM_SpendLogs_pdefault""#, "open partition"),
            ("team", r#""LiteLLM_SpendLogs_pdefault""#, "open partition"),
            ("key_alias", "p0", "open partition"),
            ("team", "p0", "open partition"),
            ("key_alias", "p1", "built"),
            ("team", "p1", "built"),
            ("key_alias", "p2", "built"),
            ("team", "p2", "built"),
        ]
        .map(|(i, p, s)| (i.to_string(), p.to_string(), s.to_string()))
    );
    assert!(holds(
        &mut client,
        "SELECT string_agg(relname, ' ' ORDER BY oid) = 'litellm_spend_key_alias_p1 litellm_spend_team_p1 litellm_spend_key_alias_p2 '
                    || 'litellm_spend_team_p2' AND bool_and(relowner = 'litellm'::regrole)
         FROM pg_class WHERE relname LIKE 'litellm\\_spend\\_%' AND relkind = 'i' AND relnamespace = 'public'::regnamespace"
    ));
    // LiteLLM's queries use them as they are: the filter by team, a team's budget, the filter by a part of
    // the alias.
    client.batch_execute("SET enable_seqscan = off").unwrap();
    client.batch_execute("VACUUM p1").unwrap();
    for (sql, index) in [
        (
            r#"SELECT * FROM "LiteLLM_SpendLogs" WHERE team_id = $1 ORDER BY "startTime" DESC LIMIT 50"#,
            "litellm_spend_team_p1",
        ),
        (
            r#"SELECT sum(spend) FROM "LiteLLM_SpendLogs" WHERE team_id = $1 AND "startTime" >= '2020-01-01'"#,
            "Index Only Scan using litellm_spend_team_p1",
        ),
        (
            "SELECT * FROM \"LiteLLM_SpendLogs\" WHERE metadata->>'user_api_key_alias' LIKE $1",
            "litellm_spend_key_alias_p1",
        ),
    ] {
        client.batch_execute(&format!("PREPARE q(text) AS {sql}")).unwrap();
        let plan: Vec<String> =
            client.query("EXPLAIN EXECUTE q('team1%')", &[]).unwrap().iter().map(|r| r.get(0)).collect();
        assert!(plan.iter().any(|line| line.contains(index)), "{plan:#?}");
        client.batch_execute("DEALLOCATE q").unwrap();
    }
    owner.batch_execute("SELECT * FROM spend_index_set(indexes => '{team}', hot => true)").unwrap();
    wait_for(&mut client, "team", "p0", "built");
    wait_for(&mut client, "team", r#""LiteLLM_SpendLogs_pdefault""#, "built");
    assert!(status(&mut client).contains(&("key_alias".into(), "p0".into(), "open partition".into())));
    let state: String = planned(&mut client, "state", "team");
    assert_eq!(state, "built on 4 of 4 partitions");
    owner.batch_execute("SELECT * FROM spend_index_drop()").unwrap();
    eventually("all are gone", || status(&mut client).is_empty());
    assert_eq!(ours(&mut client), []);
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.index_set"), 0);
}

#[test]
fn a_partition_gets_its_indexes_when_it_closes() {
    let (_db, mut client) = partitioned(shared());
    client
        .batch_execute(
            r#"SELECT spend_index_set(indexes => '{team}');
               ALTER TABLE "LiteLLM_SpendLogs" DETACH PARTITION p0; TRUNCATE p0;
               DO $$ BEGIN
                   EXECUTE format('ALTER TABLE "LiteLLM_SpendLogs" ATTACH PARTITION p0 FOR VALUES FROM (%L) TO (%L)',
                                  (now() AT TIME ZONE 'UTC')::date, clock_timestamp() AT TIME ZONE 'UTC' + interval '10 s');
               END $$"#,
        )
        .unwrap();
    assert!(status(&mut client).contains(&("team".into(), "p0".into(), "open partition".into())));
    wait_for(&mut client, "team", "p0", "built");
}

#[test]
fn a_plain_table_is_indexed_as_a_whole_and_what_litellm_has_is_not_doubled() {
    let (_db, mut client) = with_rows();
    let own =
        r#"CREATE INDEX "LiteLLM_SpendLogs_litellm_call_id_idx" ON "LiteLLM_SpendLogs" (litellm_call_id)"#;
    client.batch_execute(own).unwrap();
    client.batch_execute("SELECT spend_index_set(indexes => '{user, call_id}')").unwrap();
    wait_for(&mut client, "user", r#""LiteLLM_SpendLogs""#, "built");
    wait_for(&mut client, "call_id", r#""LiteLLM_SpendLogs""#, "built");
    assert_eq!(ours(&mut client), [(r#""litellm_spend_user_LiteLLM_SpendLogs""#.to_string(), true)]);
    client.batch_execute("SET enable_seqscan = off").unwrap();
    client.batch_execute(r#"SELECT count(*) FROM "LiteLLM_SpendLogs" WHERE "user" = 'user7'"#).unwrap();
    eventually("its size and its scans are shown", || {
        holds(&mut client, r#"SELECT bytes > 0 AND scans > 0 FROM spend_index_status WHERE "index" = 'user'"#)
    });
    // When that is gone ours takes its place.
    client.batch_execute(r#"DROP INDEX "LiteLLM_SpendLogs_litellm_call_id_idx""#).unwrap();
    eventually("ours is there", || ours(&mut client).len() == 2);
}

#[test]
fn what_is_killed_in_the_midst_of_a_build_goes_on_and_leaves_nothing() {
    let (db, mut client) = partitioned(shared());
    let mut dump = old_snapshot(&db);
    client.batch_execute("SELECT spend_index_set(indexes => '{team, user}')").unwrap();
    wait_until_it_waits(&mut client, "team", "p1");
    assert_eq!(ours(&mut client), [("litellm_spend_team_p1".to_string(), false)]);
    let kill = |kind: &str| {
        format!(
            "SELECT pg_terminate_backend(pid) FROM spend_worker_status WHERE kind = '{kind}' AND database = current_database()"
        )
    };
    // The worker: the build goes on, and is not taken for one that was left.
    client.batch_execute(&kill("litellm_spend worker")).unwrap();
    let workers = "SELECT count(*) = 1 FROM spend_worker_status WHERE kind = 'litellm_spend worker' AND database = current_database()";
    eventually("another worker comes", || holds(&mut client, workers));
    wait_until_it_waits(&mut client, "team", "p1");
    let first: i64 = value(&mut client, "SELECT 'litellm_spend_team_p1'::regclass::oid::bigint");
    // The build itself.
    client.batch_execute(&kill("litellm_spend builder")).unwrap();
    eventually("what was left is gone", || {
        holds(&mut client, &format!("SELECT NOT EXISTS (SELECT FROM pg_class WHERE oid = {first})"))
    });
    dump.batch_execute("COMMIT").unwrap();
    wait_for(&mut client, "user", "p2", "built");
    let names =
        ["team_p1", "team_p2", "user_p1", "user_p2"].map(|name| (format!("litellm_spend_{name}"), true));
    assert_eq!(ours(&mut client), names);
}

#[test]
fn what_a_crash_of_the_server_leaves_half_built_is_dropped_and_built_again() {
    let cluster = own_cluster(&[]);
    let (db, mut client) = partitioned(cluster);
    // A writer that no crash ends: the build waits for it, and so does who drops what is left.
    client
        .batch_execute(
            r#"BEGIN; INSERT INTO p1 SELECT (jsonb_populate_record(l, '{"request_id": "kept", "team_id": "kept"}')).*
                   FROM p1 AS l LIMIT 1;
               PREPARE TRANSACTION 'writer'"#,
        )
        .unwrap();
    client.batch_execute("SELECT spend_index_set(indexes => '{team}')").unwrap();
    wait_until_it_waits(&mut client, "team", "p1");
    let half_built = [("litellm_spend_team_p1".to_string(), false)];
    assert_eq!(ours(&mut client), half_built);
    let oid = "SELECT 'litellm_spend_team_p1'::regclass::oid::bigint";
    let first: i64 = value(&mut client, oid);
    drop(client);
    cluster.crash_and_restart();
    let mut client = db.connect();
    let drops = "SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'litellm_spend builder'
        AND query LIKE '%index team of p1%' AND wait_event_type = 'Lock'";
    eventually("who drops it waits", || holds(&mut client, drops));
    // Until then it is neither there nor failed, and nothing else is begun.
    assert_eq!((ours(&mut client), value(&mut client, oid)), (half_built.into(), first));
    assert_eq!(
        status(&mut client)[2..],
        ["p1", "p2"].map(|partition| ("team".into(), partition.into(), "waiting".into()))
    );
    client.batch_execute("COMMIT PREPARED 'writer'").unwrap();
    wait_for(&mut client, "team", "p2", "built");
    assert_eq!(ours(&mut client), ["p1", "p2"].map(|p| (format!("litellm_spend_team_{p}"), true)));
    assert_ne!(value::<i64>(&mut client, oid), first);
    client.batch_execute("SET enable_seqscan = off; SET enable_bitmapscan = off").unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM p1 WHERE team_id = 'kept'"), 1);
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.index_failure"), 0);
}

#[test]
fn a_failure_by_a_clock_that_was_ahead_is_not_waited_for() {
    let (_db, mut client) = partitioned(shared());
    client
        .batch_execute(
            "BEGIN; SELECT spend_index_set(indexes => '{team}');
             INSERT INTO litellm_spend.index_failure
             VALUES ('p1', 'team', 'a failure', now() + interval '1 year', now() + interval '1 year 30 s'); COMMIT",
        )
        .unwrap();
    wait_for(&mut client, "team", "p1", "built");
}

#[test]
fn a_build_that_fails_leaves_nothing_and_keeps_no_other_from_being_built() {
    let (_db, mut client) = partitioned(shared());
    // Longer than an entry of a B-tree may be, whatever compresses it.
    let long = r#"UPDATE p1 SET "user" = (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 300) AS i) WHERE request_id = 'r1000'"#;
    assert_eq!(client.execute(long, &[]).unwrap(), 1);
    client.batch_execute("SELECT spend_index_set(indexes => '{user, team}')").unwrap();
    wait_for(&mut client, "user", "p1", "failed");
    wait_for(&mut client, "user", "p2", "built");
    let names = ["team_p1", "team_p2", "user_p2"].map(|name| (format!("litellm_spend_{name}"), true));
    assert_eq!(ours(&mut client), names);
    let said = client
        .query_one(r#"SELECT last_error, retry_at > now() + interval '30 min' FROM spend_index_status WHERE state = 'failed'"#, &[])
        .unwrap();
    assert!(said.get::<_, String>(0).starts_with("index row "), "{said:?}");
    assert!(said.get::<_, bool>(1));
    let health = "SELECT problem FROM spend_health WHERE severity = 'error'";
    assert!(value::<String>(&mut client, health).starts_with("index user of p1: index row "));
    // Asked for again, it is tried again.
    client.batch_execute(r#"UPDATE p1 SET "user" = 'short' WHERE request_id = 'r1000'"#).unwrap();
    client.batch_execute("VACUUM p1").unwrap();
    client.batch_execute("SELECT spend_index_set(indexes => '{user}')").unwrap();
    wait_for(&mut client, "user", "p1", "built");
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.index_failure"), 0);
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM spend_health"), 0);
}

#[test]
fn a_build_gives_way_to_who_changes_the_table_and_nobody_who_reads_or_writes_waits() {
    let (db, mut client) = partitioned(shared());
    let mut dump = old_snapshot(&db);
    client.batch_execute("SELECT spend_index_set(indexes => '{team}')").unwrap();
    wait_until_it_waits(&mut client, "team", "p1");
    let mut other = db.connect();
    other.batch_execute("SET lock_timeout = '100ms'").unwrap();
    other.batch_execute(&insert_rows("beside", 200, 3)).unwrap();
    other.batch_execute(r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#).unwrap();
    // A migration of LiteLLM's.
    let began = Instant::now();
    other
        .batch_execute(r#"SET lock_timeout = '60s'; ALTER TABLE "LiteLLM_SpendLogs" ADD COLUMN later text"#)
        .unwrap();
    let waited = began.elapsed();
    assert!(waited < Duration::from_secs(20), "{waited:?}: the snapshot is there still");
    eventually("what it leaves is gone", || {
        ours(&mut client).iter().all(|(name, _)| name != "litellm_spend_team_p1")
    });
    assert!(status(&mut client).contains(&("team".into(), "p1".into(), "waiting".into())));
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM spend_health"), 0);
    dump.batch_execute("COMMIT").unwrap();
    try_again(&mut client);
    wait_for(&mut client, "team", "p2", "built");
    wait_for(&mut client, "team", "p1", "built");
    assert_eq!(ours(&mut client).len(), 2);
}

/// Nothing depends on when the worker looks next.
#[test]
fn a_build_gives_way_also_while_the_worker_pauses() {
    let cluster = own_cluster(&["litellm_spend.merge_interval = '1s'"]);
    let (db, mut client) = partitioned(cluster);
    let dump = old_snapshot(&db);
    client.batch_execute("SELECT spend_index_set(indexes => '{team}')").unwrap();
    wait_until_it_waits(&mut client, "team", "p1");
    client.batch_execute("ALTER SYSTEM SET litellm_spend.merge_interval = '1h'").unwrap();
    client.batch_execute("SELECT pg_reload_conf()").unwrap();
    eventually("the worker pauses", || {
        let latest =
            "SELECT pg_sleep(3) IS NULL, max(state_change) < clock_timestamp() - interval '2 seconds'
                      FROM pg_stat_activity WHERE backend_type = 'litellm_spend worker'
                          AND datname = current_database()";
        client.query_one(latest, &[]).unwrap().get(1)
    });
    let began = Instant::now();
    let add = r#"SET lock_timeout = '60s'; ALTER TABLE "LiteLLM_SpendLogs" ADD COLUMN later text"#;
    db.connect().batch_execute(add).unwrap();
    let waited = began.elapsed();
    assert!(waited < Duration::from_secs(20), "{waited:?}");
    drop(dump);
}

/// Nobody queues behind a VACUUM that waits.
#[test]
fn a_build_gives_way_to_no_vacuum() {
    let (db, mut client) = partitioned(shared());
    let mut dump = old_snapshot(&db);
    client.batch_execute("SELECT spend_index_set(indexes => '{team}')").unwrap();
    wait_until_it_waits(&mut client, "team", "p1");
    while_it_waits(
        &db,
        |vacuum| vacuum.batch_execute("VACUUM p1"),
        |_, _| {
            // Longer than lock_timeout, and than the worker takes to look.
            std::thread::sleep(Duration::from_secs(5));
            assert!(status(&mut client).contains(&("team".into(), "p1".into(), "building".into())));
            dump.batch_execute("COMMIT").unwrap();
        },
    )
    .unwrap();
    wait_for(&mut client, "team", "p1", "built");
}

#[test]
fn what_is_dropped_while_it_is_built_is_gone() {
    let (db, mut client) = partitioned(shared());
    let mut dump = old_snapshot(&db);
    client.batch_execute("SELECT spend_index_set(indexes => '{team, user}')").unwrap();
    wait_until_it_waits(&mut client, "team", "p1");
    client.batch_execute("SELECT spend_index_drop(indexes => '{team}')").unwrap();
    eventually("the other is being built", || {
        status(&mut client).contains(&("user".into(), "p1".into(), "building".into()))
    });
    dump.batch_execute("COMMIT").unwrap();
    wait_for(&mut client, "user", "p2", "built");
    assert_eq!(ours(&mut client), ["user_p1", "user_p2"].map(|name| (format!("litellm_spend_{name}"), true)));
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.index_set"), 1);
}

/// It goes on to the TOAST table, and until it is done there are indexes whose names begin as ours.
#[test]
fn a_reindex_of_a_partition_is_left_alone_until_it_is_done() {
    let (db, mut client) = partitioned(shared());
    client.batch_execute("SELECT spend_index_set(indexes => '{team}')").unwrap();
    wait_for(&mut client, "team", "p2", "built");
    let mut writer = db.connect();
    writer.batch_execute("BEGIN; LOCK TABLE p1 IN ROW EXCLUSIVE MODE").unwrap();
    while_it_waits(
        &db,
        |session| session.batch_execute("REINDEX TABLE CONCURRENTLY p1"),
        |_, _| {
            assert!(ours(&mut client).contains(&("litellm_spend_team_p1_ccnew".into(), false)));
            client.batch_execute("SELECT spend_index_set(indexes => '{user}')").unwrap();
            // Longer than the server takes to see a deadlock.
            wait_for_two_rounds(&mut client);
            std::thread::sleep(Duration::from_secs(2));
            writer.batch_execute("COMMIT").unwrap();
        },
    )
    .unwrap();
    wait_for(&mut client, "user", "p2", "built");
    let names = ["team_p1", "team_p2", "user_p1", "user_p2"].map(|n| (format!("litellm_spend_{n}"), true));
    assert_eq!(ours(&mut client), names);
}

/// While there is something to do for indexes, each round looks at them.
fn wait_for_two_rounds(client: &mut Client) {
    wait_for_a_round(client);
    wait_for_a_round(client);
}

/// The Oid of the index that a process of ours builds at the moment.
fn being_built(client: &mut Client) -> i64 {
    let sql = "SELECT coalesce(max(p.index_relid::bigint), 0) FROM pg_stat_progress_create_index p
               JOIN pg_stat_activity a USING (pid)
               WHERE a.backend_type = 'litellm_spend builder' AND p.datname = current_database()";
    value(client, sql)
}

#[test]
fn a_drop_ends_no_build_but_that_of_what_it_drops_and_none_when_it_is_rolled_back() {
    let (db, mut client) = partitioned(shared());
    let mut dump = old_snapshot(&db);
    client.batch_execute("SELECT spend_index_set(indexes => '{team, user}')").unwrap();
    wait_until_it_waits(&mut client, "team", "p1");
    let first = being_built(&mut client);
    client.batch_execute("SELECT spend_index_drop(indexes => '{user}')").unwrap();
    client.batch_execute("BEGIN; SELECT spend_index_drop(); ROLLBACK").unwrap();
    wait_for_two_rounds(&mut client);
    assert_eq!(being_built(&mut client), first, "it goes on");
    client.batch_execute("SELECT spend_index_drop(indexes => '{team}')").unwrap();
    eventually("it is gone", || status(&mut client).is_empty());
    assert_eq!(ours(&mut client), []);
    dump.batch_execute("COMMIT").unwrap();
}

#[test]
fn a_drop_does_not_end_the_build_of_a_conversion() {
    let (db, mut client) = with_rows();
    let mut dump = old_snapshot(&db);
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    eventually("its index waits", || {
        holds(&mut client, "SELECT bool_or(step LIKE 'index%' AND waits_for IS NOT NULL) FROM spend_progress")
    });
    eventually("its index is there", || being_built(&mut client) > 0);
    let first = being_built(&mut client);
    client.batch_execute("SELECT spend_index_drop()").unwrap();
    client.batch_execute("SELECT spend_index_set(indexes => '{user}')").unwrap();
    client.batch_execute("SELECT spend_index_drop(indexes => '{user}')").unwrap();
    wait_for_two_rounds(&mut client);
    assert_eq!(being_built(&mut client), first, "it goes on");
    dump.batch_execute("COMMIT").unwrap();
    wait_until_converted(&mut client);
}

/// The definition that a plan says, typed on the partitioned table, takes our indexes for its own.
#[test]
fn a_drop_that_fails_keeps_no_other_index_from_being_built_and_is_said() {
    let (_db, mut client) = partitioned(shared());
    client.batch_execute("SELECT spend_index_set(indexes => '{team}')").unwrap();
    wait_for(&mut client, "team", "p2", "built");
    let definition: String = planned(&mut client, "definition", "team");
    client.batch_execute(&format!(r#"CREATE INDEX by_team ON "LiteLLM_SpendLogs" {definition}"#)).unwrap();
    client
        .batch_execute(
            "SELECT spend_index_drop(indexes => '{team}'); SELECT spend_index_set(indexes => '{user}')",
        )
        .unwrap();
    let began = Instant::now();
    while !status(&mut client).contains(&("user".into(), "p2".into(), "built".into())) {
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", status(&mut client));
        std::thread::sleep(Duration::from_millis(100));
    }
    // Each is tried once, and then after an hour.
    let failures =
        "SELECT string_agg(partition::text || last_error_at, ' ' ORDER BY partition) FROM spend_index_status
        WHERE last_error LIKE 'cannot drop index %litellm_spend_team_p_ because index %by_team requires it%'
            AND retry_at > now() + interval '30 min'";
    let both = |client: &mut Client| {
        value::<Option<String>>(client, failures).filter(|found| found.contains("p1") && found.contains("p2"))
    };
    eventually("both have failed", || both(&mut client).is_some());
    let first = both(&mut client);
    wait_for_two_rounds(&mut client);
    assert_eq!(both(&mut client), first);
    let problem: String =
        value(&mut client, "SELECT min(problem) FROM spend_health WHERE severity = 'error'");
    assert!(problem.starts_with("index team of p1: cannot drop index"), "{problem}");
    // Asked for again, it is tried again.
    client.batch_execute("SELECT spend_index_drop(indexes => '{team}')").unwrap();
    eventually("they have failed once more", || both(&mut client).is_some_and(|found| Some(found) > first));
    client.batch_execute("DROP INDEX by_team").unwrap();
    eventually("it is forgotten", || !status(&mut client).iter().any(|(index, ..)| index == "team"));
}

#[test]
fn that_there_is_no_slot_for_a_build_is_not_said_each_second() {
    // The launcher, the server's own for replication, and the worker of this database.
    let cluster = own_cluster(&["max_worker_processes = 3"]);
    let (_db, mut client) = partitioned(cluster);
    client.batch_execute("SELECT spend_index_set(indexes => '{team}')").unwrap();
    let said = || cluster.log().matches("no slot to build an index").count();
    eventually("it is said", || said() > 0);
    std::thread::sleep(Duration::from_secs(12));
    assert!(said() <= 6, "{} times", said());
}

#[test]
fn an_index_goes_where_its_table_is_whatever_tablespace_the_database_prefers() {
    let cluster = own_cluster(&[]);
    let db = cluster.database();
    let mut client = db.connect();
    if value::<i32>(&mut client, "SELECT current_setting('server_version_num')::int") < 150_000 {
        return; // It has no tablespaces in place.
    }
    client.batch_execute("SET allow_in_place_tablespaces = on").unwrap();
    client.batch_execute("CREATE TABLESPACE fast LOCATION ''").unwrap();
    client.batch_execute(&format!("ALTER DATABASE {} SET default_tablespace = 'fast'", db.name)).unwrap();
    client.batch_execute(&format!("{ROWS}; SELECT spend_index_set(indexes => '{{team}}')")).unwrap();
    wait_for(&mut client, "team", r#""LiteLLM_SpendLogs""#, "built");
    let elsewhere =
        "SELECT count(*) FROM pg_class WHERE reltablespace <> 0 AND relkind = 'i' AND NOT relisshared";
    assert_eq!(value::<i64>(&mut client, elsewhere), 0);
}

/// Whether one stands for ours cannot be seen while nobody may look: then none is built.
#[test]
fn an_index_that_stands_for_ours_is_not_doubled_because_somebody_locks_the_table() {
    let (db, mut client) = with_rows();
    client.batch_execute(r#"CREATE INDEX by_call ON "LiteLLM_SpendLogs" (litellm_call_id)"#).unwrap();
    client.batch_execute("SELECT spend_index_set(indexes => '{call_id}')").unwrap();
    wait_for(&mut client, "call_id", r#""LiteLLM_SpendLogs""#, "built");
    let mut other = db.connect();
    other.batch_execute(r#"BEGIN; LOCK TABLE "LiteLLM_SpendLogs" IN ACCESS EXCLUSIVE MODE"#).unwrap();
    let state = |state: &str| vec![("call_id".into(), r#""LiteLLM_SpendLogs""#.into(), state.to_string())];
    assert_eq!(status(&mut client), state("unknown"));
    // The worker is told that something has changed.
    client.batch_execute("CREATE TABLE something ()").unwrap();
    std::thread::sleep(Duration::from_secs(8));
    other.batch_execute("COMMIT").unwrap();
    assert_eq!(status(&mut client), state("built"));
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(ours(&mut client), []);
}

#[test]
fn an_index_that_serves_less_stands_for_none_of_ours() {
    let (_db, mut client) = with_rows();
    client
        .batch_execute(
            r#"CREATE INDEX by_user ON "LiteLLM_SpendLogs" ("user") INCLUDE ("startTime");
               CREATE INDEX by_call ON "LiteLLM_SpendLogs" (litellm_call_id COLLATE "C")"#,
        )
        .unwrap();
    assert_eq!(planned::<String>(&mut client, "state", "user"), r#"not there; "by_user" begins alike"#);
    assert_eq!(planned::<String>(&mut client, "state", "call_id"), "not there");
    client.batch_execute("SELECT spend_index_set(indexes => '{user, call_id}')").unwrap();
    wait_for(&mut client, "call_id", r#""LiteLLM_SpendLogs""#, "built");
    wait_for(&mut client, "user", r#""LiteLLM_SpendLogs""#, "built");
    let names =
        ["call_id", "user"].map(|name| (format!(r#""litellm_spend_{name}_LiteLLM_SpendLogs""#), true));
    assert_eq!(ours(&mut client), names);
}

#[test]
fn an_open_partition_is_not_indexed_because_that_failed_before() {
    let (_db, mut client) = partitioned(shared());
    client
        .batch_execute(
            "BEGIN; SELECT spend_index_set(indexes => '{team}');
             INSERT INTO litellm_spend.index_failure
             VALUES ('p0', 'team', 'a failure', now() - interval '1 min', now() - interval '30 s'); COMMIT",
        )
        .unwrap();
    // The newest comes first.
    wait_for(&mut client, "team", "p2", "built");
    assert_eq!(ours(&mut client), ["p1", "p2"].map(|p| (format!("litellm_spend_team_{p}"), true)));
}

#[test]
fn without_a_worker_the_statements_are_said_and_called_again_it_is_done() {
    let (_db, mut client) = partitioned(without_worker());
    let call = |client: &mut Client, call: &str| -> Vec<(String, String, String)> {
        let sql = format!("SELECT partition, state, detail FROM {call}");
        client.query(&sql, &[]).unwrap().iter().map(|r| (r.get(0), r.get(1), r.get(2))).collect()
    };
    let set = "spend_index_set(indexes => '{team}')";
    let said = call(&mut client, set);
    let states: Vec<&str> = said.iter().map(|(_, state, _)| state.as_str()).collect();
    assert_eq!(states, ["open partition", "open partition", "waiting", "waiting"]);
    assert_eq!(
        said[2].2,
        r#"CREATE INDEX CONCURRENTLY "litellm_spend_team_p1" ON "public"."p1" USING btree (team_id, "startTime") INCLUDE (spend) WHERE (team_id IS NOT NULL);"#
    );
    // No transaction can run it, which leaves nothing.
    assert_eq!(error(&mut client, &format!("BEGIN; {}", said[2].2)).code().code(), "25001");
    client.batch_execute("ROLLBACK").unwrap();
    // One is cut off.
    let long = r#"UPDATE p1 SET team_id = (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 300) AS i) WHERE request_id = 'r1000'"#;
    client.batch_execute(long).unwrap();
    assert_eq!(error(&mut client, &said[2].2).code().code(), "54000");
    client.batch_execute("UPDATE p1 SET team_id = NULL WHERE request_id = 'r1000'").unwrap();
    client.batch_execute("VACUUM p1").unwrap();
    let drop: String = r#"DROP INDEX CONCURRENTLY IF EXISTS "public"."litellm_spend_team_p1";"#.into();
    assert_eq!(call(&mut client, set)[0], ("p1".into(), "to drop".into(), drop));
    // Until nothing is said any more.
    for round in 0.. {
        let said = call(&mut client, set);
        let statements: Vec<_> = said.iter().map(|(.., sql)| sql).filter(|sql| !sql.is_empty()).collect();
        if statements.is_empty() {
            break;
        }
        assert!(round < 3, "{said:?}");
        statements.iter().for_each(|sql| client.batch_execute(sql).unwrap());
    }
    assert_eq!(
        ours(&mut client),
        ["team_p1_2", "team_p2"].map(|name| (format!("litellm_spend_{name}"), true))
    );
    let said = call(&mut client, "spend_index_drop()");
    assert!(said.len() == 2 && said.iter().all(|(_, state, _)| state == "to drop"), "{said:?}");
    said.iter().for_each(|(.., sql)| client.batch_execute(sql).unwrap());
    assert_eq!(call(&mut client, "spend_index_drop(indexes => '{team}')")[0].1, "gone");
    assert!(status(&mut client).is_empty());
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.index_set"), 0);
}

/// What a call says of each index: its name, partition, state and detail.
fn said(client: &mut Client, call: &str) -> Vec<(String, String, String, String)> {
    let sql = format!(r#"SELECT "index", partition, state, detail FROM {call}"#);
    client.query(&sql, &[]).unwrap().iter().map(|r| (r.get(0), r.get(1), r.get(2), r.get(3))).collect()
}

#[test]
fn without_a_worker_what_is_not_possible_is_said_of_that_index_alone() {
    let (_db, mut client) = partitioned(without_worker());
    client
        .batch_execute("CREATE EXTENSION pg_trgm; SELECT spend_index_set(indexes => '{key_alias}')")
        .unwrap();
    client.batch_execute("DROP EXTENSION pg_trgm").unwrap();
    let of = |said: &[(String, String, String, String)], index: &str| -> String {
        said.iter().find(|(i, p, ..)| (i.as_str(), p.as_str()) == (index, "p1")).unwrap().3.clone()
    };
    let rows = said(&mut client, "spend_index_set(indexes => '{team}')");
    assert!(of(&rows, "key_alias").contains("needs extension pg_trgm"), "{rows:?}");
    assert!(of(&rows, "team").starts_with("CREATE INDEX CONCURRENTLY"), "{rows:?}");
    // One that has failed while there was a worker, and that this call does not name.
    client
        .batch_execute(
            "INSERT INTO litellm_spend.index_failure
             VALUES ('p1', 'team', 'a failure', now(), now() + interval '1 h')",
        )
        .unwrap();
    let rows = said(&mut client, "spend_index_set(indexes => '{user}')");
    assert!(of(&rows, "team").starts_with("CREATE INDEX CONCURRENTLY"), "{rows:?}");
    // While it is being reverted, none is built.
    client.batch_execute("SELECT spend_partition_revert()").unwrap();
    let rows = said(&mut client, "spend_index_set(indexes => '{user}')");
    assert_eq!(of(&rows, "user"), "its table is being converted or reverted: see spend_progress");
}

#[test]
fn indexes_whose_state_is_lost_are_dropped_and_gone_is_said_of_none_that_is_there() {
    let (_db, mut client) = partitioned(without_worker());
    for (_, _, _, sql) in said(&mut client, "spend_index_set(indexes => '{team}')") {
        client.batch_execute(&sql).unwrap();
    }
    assert_eq!(ours(&mut client).len(), 2);
    client
        .batch_execute(
            "CREATE ROLE heiress; GRANT CREATE ON SCHEMA public TO heiress; ALTER TABLE p1 OWNER TO heiress",
        )
        .unwrap();
    for call in ["spend_index_drop(indexes => '{team}')", "spend_index_drop()"] {
        client.batch_execute("DELETE FROM litellm_spend.index_set").unwrap();
        let rows = said(&mut client, call);
        let states: Vec<_> = rows.iter().map(|(_, p, state, _)| (p.as_str(), state.as_str())).collect();
        assert_eq!(states, [("p2", "to drop"), ("p1", "to drop")], "{rows:?}");
        assert_eq!(rows[0].3, r#"DROP INDEX CONCURRENTLY IF EXISTS "public"."litellm_spend_team_p2";"#);
        assert_eq!(
            rows[1].3,
            "the partition belongs to heiress\nHINT:  ALTER TABLE public.p1 OWNER TO litellm;"
        );
    }
    let health = "SELECT problem FROM spend_health WHERE problem LIKE 'index team%'";
    assert_eq!(value::<String>(&mut client, health), "index team of p1: the partition belongs to heiress");
    client
        .batch_execute("ALTER TABLE p1 OWNER TO litellm; DROP OWNED BY heiress; DROP ROLE heiress")
        .unwrap();
    for (_, _, _, sql) in said(&mut client, "spend_index_drop()") {
        client.batch_execute(&sql).unwrap();
    }
    assert_eq!(said(&mut client, "spend_index_drop(indexes => '{team}')")[0].2, "gone");
    assert_eq!((status(&mut client), ours(&mut client)), (vec![], vec![]));
}

#[test]
fn bad_input_is_refused_and_changes_nothing() {
    let (db, mut client) = partitioned(shared());
    client
        .batch_execute(
            r#"CREATE TABLE other (id int, "startTime" timestamp); CREATE ROLE passer_by LOGIN; SELECT spend_grant_admin('passer_by');
               CREATE TABLE by_id (LIKE "LiteLLM_SpendLogs") PARTITION BY RANGE (request_id)"#,
        )
        .unwrap();
    for (call, sqlstate) in [
        ("spend_index_set(indexes => '{team, teams}')", "42704"),
        ("spend_index_set()", "22004"),
        ("spend_index_set(indexes => '{}')", "22023"),
        ("spend_index_set(indexes => ARRAY['team', NULL])", "22004"),
        ("spend_index_set(indexes => '{team, key_alias}')", "55000"),
        ("spend_index_set('other', '{team}')", "42703"),
        ("spend_index_set('p1', '{team}')", "42809"),
        ("spend_index_set('by_id', '{team}')", "42809"),
        ("spend_index_drop(indexes => '{teams}')", "42704"),
    ] {
        assert_refused(&mut client, &format!("SELECT * FROM {call}"), sqlstate);
    }
    let mut stranger = shared().connect_as(&db.name, "passer_by");
    for call in ["spend_index_set(indexes => '{team}')", "spend_index_drop()"] {
        assert_refused(&mut stranger, &format!("SELECT * FROM {call}"), "42501");
    }
    // What was taken back was not asked for.
    client.batch_execute("BEGIN; SELECT spend_index_set(indexes => '{team}'); ROLLBACK").unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.index_set"), 0);
    assert_eq!(status(&mut client), []);
    // Nothing to be done is no error.
    client.batch_execute("SELECT spend_index_drop()").unwrap();
    client.batch_execute("DROP OWNED BY passer_by; DROP ROLE passer_by").unwrap();
}

#[test]
fn what_belongs_to_another_role_is_left_alone_and_named() {
    let (_db, mut client) = partitioned(shared());
    client
        .batch_execute("CREATE ROLE heir; GRANT CREATE ON SCHEMA public TO heir; ALTER TABLE p1 OWNER TO heir; SELECT spend_index_set(indexes => '{team}')")
        .unwrap();
    wait_for(&mut client, "team", "p2", "built");
    wait_for(&mut client, "team", "p1", "failed");
    assert_eq!(ours(&mut client), [("litellm_spend_team_p2".to_string(), true)]);
    let health = "SELECT problem || ' / ' || remedy FROM spend_health";
    assert_eq!(
        value::<String>(&mut client, health),
        "index team of p1: the partition belongs to heir / ALTER TABLE public.p1 OWNER TO litellm;"
    );
    client
        .batch_execute(r#"ALTER TABLE "LiteLLM_SpendLogs" OWNER TO heir; ALTER TABLE p0 OWNER TO heir"#)
        .unwrap();
    wait_for(&mut client, "team", "p1", "failed");
    assert!(
        value::<String>(&mut client, health)
            .contains("it was asked for by litellm, and the table is heir's now")
    );
    client.batch_execute("SELECT spend_index_set(indexes => '{team}')").unwrap();
    wait_for(&mut client, "team", "p1", "built");
    client.batch_execute("DROP OWNED BY heir CASCADE; DROP ROLE heir").unwrap();
    // Its table is gone, and so is what was asked for.
    eventually("it is forgotten", || {
        value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.index_set") == 0
    });
}

#[test]
fn an_index_that_nothing_has_used_for_thirty_days_is_named() {
    let (_db, mut client) = with_rows();
    client.batch_execute("SELECT spend_index_set(indexes => '{user}')").unwrap();
    wait_for(&mut client, "user", r#""LiteLLM_SpendLogs""#, "built");
    let unused = "SELECT count(*) FROM spend_health WHERE problem LIKE 'nothing has used index user of %'";
    assert_eq!(value::<i64>(&mut client, unused), 0);
    client.batch_execute("UPDATE litellm_spend.index_set SET asked_at = now() - interval '31 days'").unwrap();
    // Statistics do not say since when they are there, and a crash of the server may have lost them.
    assert_eq!(value::<i64>(&mut client, unused), 0);
    // As it is when the server has run for thirty days.
    let health: String = value(&mut client, "SELECT pg_get_viewdef('spend_health')");
    let later = health.trim_end_matches(';').replace("'30 days'", "'1 second'");
    let unused =
        format!("SELECT remedy FROM ({later}) AS h WHERE problem LIKE 'nothing has used index user of %'");
    let remedy: String = value(&mut client, &unused);
    client.batch_execute(&remedy).unwrap();
    eventually("it is gone", || ours(&mut client).is_empty());
}

// ---- converted and back -------------------------------------------------------------------------------

#[test]
fn a_conversion_keeps_the_indexes_on_the_old_table_and_a_reversion_has_them_before_the_swap() {
    let (db, mut client) = with_rows();
    client.batch_execute("SELECT spend_index_set(indexes => '{team, user}')").unwrap();
    wait_for(&mut client, "user", r#""LiteLLM_SpendLogs""#, "built");
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_converted(&mut client);
    eventually("its partitions are there", || {
        holds(&mut client, "SELECT bool_and(partitions_ahead = precreate) FROM spend_partition_status")
    });
    let names =
        ["team", "user"].map(|name| (format!(r#""litellm_spend_{name}_LiteLLM_SpendLogs_legacy""#), true));
    assert_eq!(ours(&mut client), names, "of the old table only");
    let built = status(&mut client).into_iter().filter(|(.., state)| state == "built");
    assert!(
        built
            .map(|(_, partition, _)| partition)
            .all(|partition| partition == r#""LiteLLM_SpendLogs_legacy""#)
    );
    assert_eq!(status(&mut client).iter().filter(|(.., state)| state == "open partition").count() % 2, 0);
    // Asked for meanwhile, and one that another stands for.
    let own = r#"CREATE INDEX by_call ON "LiteLLM_SpendLogs" (litellm_call_id)"#;
    client.batch_execute(own).unwrap();
    client.batch_execute("SELECT spend_index_set(indexes => '{failure, call_id}', hot => true)").unwrap();
    wait_for(&mut client, "failure", r#""LiteLLM_SpendLogs_legacy""#, "built");
    // No index could be built on the table after the swap, not as long as this lasts.
    let mut dump = old_snapshot(&db);
    client.batch_execute("SELECT spend_partition_revert()").unwrap();
    wait_until_plain(&mut client, "\"LiteLLM_SpendLogs\"");
    let state = |name: &str| (name.into(), r#""LiteLLM_SpendLogs""#.into(), "built".into());
    assert_eq!(status(&mut client), ["call_id", "failure", "team", "user"].map(state));
    let names = "SELECT string_agg(c.relname, ' ' ORDER BY 1) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
        WHERE i.indrelid = '\"LiteLLM_SpendLogs\"'::regclass AND i.indisvalid AND c.relowner = 'litellm'::regrole
          AND c.relname LIKE 'litellm\\_spend\\_%'";
    assert_eq!(
        value::<String>(&mut client, names),
        "litellm_spend_failure_LiteLLM_SpendLogs litellm_spend_team_LiteLLM_SpendLogs \
         litellm_spend_user_LiteLLM_SpendLogs"
    );
    dump.batch_execute("COMMIT").unwrap();
}

#[test]
fn an_index_that_cannot_be_built_keeps_no_table_from_being_reverted() {
    let (_db, mut client) = partitioned(shared());
    client.batch_execute("SELECT spend_index_set(indexes => '{team, user}')").unwrap();
    wait_for(&mut client, "user", "p2", "built");
    let long = r#"UPDATE p0 SET "user" = (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 300) AS i) WHERE request_id = 'r1'"#;
    assert_eq!(client.execute(long, &[]).unwrap(), 1);
    client.batch_execute("SELECT spend_partition_revert()").unwrap();
    wait_until_plain(&mut client, "\"LiteLLM_SpendLogs\"");
    assert!(status(&mut client).contains(&("team".into(), r#""LiteLLM_SpendLogs""#.into(), "built".into())));
    wait_for(&mut client, "user", r#""LiteLLM_SpendLogs""#, "failed");
    let error: String =
        value(&mut client, r#"SELECT last_error FROM spend_index_status WHERE "index" = 'user'"#);
    assert!(error.starts_with("index row "), "{error}");
}

#[test]
fn what_is_dropped_during_a_reversion_is_not_there_after_it() {
    let (_db, mut client) = partitioned(without_worker());
    client.batch_execute("SELECT spend_index_set(indexes => '{team, user}')").unwrap();
    let step = |client: &mut Client| -> Vec<String> {
        let rows = client.query("SELECT step || ': ' || state FROM spend_partition_revert()", &[]).unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    };
    let made = "SELECT string_agg(relname, ' ' ORDER BY 1) FROM pg_class
        WHERE relkind = 'i' AND relnamespace = to_regnamespace('litellm_spend_archive')
            AND relname LIKE 'litellm\\_spend\\_%'";
    let names = |client: &mut Client| value::<Option<String>>(client, made).unwrap_or_default();
    for _ in 0..20 {
        if step(&mut client).contains(&"swap: next".into()) {
            break;
        }
    }
    assert_eq!(
        names(&mut client),
        "litellm_spend_team_LiteLLM_SpendLogs litellm_spend_user_LiteLLM_SpendLogs"
    );
    client.batch_execute("SELECT spend_index_drop(indexes => '{team}')").unwrap();
    client.batch_execute("SELECT spend_index_set(indexes => '{failure}')").unwrap();
    // Before the swap, by a call of its own: what is made is not undone by a lock that is not to be had.
    assert!(step(&mut client).contains(&"swap: next".into()));
    assert_eq!(
        names(&mut client),
        "litellm_spend_failure_LiteLLM_SpendLogs litellm_spend_user_LiteLLM_SpendLogs"
    );
    assert_eq!(step(&mut client), ["swap: done"]);
    let states = ["failure", "user"].map(|n| (n.into(), r#""LiteLLM_SpendLogs""#.into(), "built".into()));
    assert_eq!(status(&mut client), states);
}

// ---- what a release does ------------------------------------------------------------------------------

/// What is changed and by what, and the remedies that are statements.
fn check(client: &mut Client, version: &str) -> (Vec<(String, String)>, Vec<String>) {
    let sql = format!("SELECT change, by, remedy FROM spend_upgrade_check('{version}')");
    let rows = client.query(&sql, &[]).unwrap();
    let changes = rows.iter().map(|r| (r.get(0), r.get(1))).collect();
    let remedies = rows
        .iter()
        .filter_map(|r| r.get::<_, Option<String>>(2))
        .filter(|sql| sql.ends_with(';') && !sql.contains("revert"));
    (changes, remedies.collect())
}

/// The log as it was before LiteLLM 1.83, but for what is asked of it here.
const AS_BEFORE: &str = r#"
    DROP INDEX "LiteLLM_SpendLogs_startTime_request_id_idx";
    ALTER TABLE "LiteLLM_SpendLogs" DROP COLUMN request_duration_ms, DROP COLUMN created_at, DROP COLUMN updated_at,
        DROP COLUMN litellm_call_id, DROP COLUMN billing_agent_id"#;

#[test]
fn what_a_release_does_is_said_before_and_nothing_is_left_to_do_when_that_was_followed() {
    for convert in [false, true] {
        let (db, mut client) = with_rows();
        if convert {
            client.batch_execute("SELECT spend_partition_convert()").unwrap();
            wait_until_converted(&mut client);
            eventually("its partitions are there", || {
                holds(
                    &mut client,
                    "SELECT bool_and(partitions_ahead = precreate) FROM spend_partition_status",
                )
            });
        }
        client.batch_execute(AS_BEFORE).unwrap();
        let names = |changes: &[(String, String)], by: &str| -> Vec<String> {
            changes.iter().filter(|(_, found)| found == by).map(|(change, _)| change.clone()).collect()
        };
        let (changes, _) = check(&mut client, "v1.92.2-stable");
        let index = r#"index "LiteLLM_SpendLogs_startTime_request_id_idx" on ("startTime", "request_id")"#;
        assert_eq!(names(&changes, "a migration"), [r#"column "request_duration_ms""#, index]);
        let (changes, _) = check(&mut client, "1.110.2");
        let columns =
            ["request_duration_ms", "created_at", "updated_at", "litellm_call_id", "billing_agent_id"];
        let mut expected: Vec<String> = columns.iter().map(|name| format!(r#"column "{name}""#)).collect();
        expected.push(index.into());
        assert_eq!(names(&changes, "a migration"), expected);
        assert_eq!(names(&changes, "LiteLLM's index job, once it serves").len(), 2);
        let mut owner = shared().connect_as(&db.name, LITELLM);
        assert_eq!(follow(&mut owner, &mut client), [""; 0]);
        let (changes, remedies) = check(&mut client, "1.110.2");
        assert_eq!(names(&changes, "a migration"), [""; 0]);
        assert!(remedies.is_empty(), "{remedies:?}");
        assert_eq!(
            names(&changes, "--use_prisma_db_push only"),
            vec![r#"primary key ("request_id")"#; convert.into()]
        );
        // LiteLLM's own migrations find nothing to build.
        let filenodes = "SELECT string_agg(i.indexrelid::text, ' ' ORDER BY i.indexrelid) FROM pg_index i
                         WHERE indrelid IN (SELECT '\"LiteLLM_SpendLogs\"'::regclass UNION SELECT inhrelid FROM pg_inherits
                                            WHERE inhparent = '\"LiteLLM_SpendLogs\"'::regclass)";
        let before: String = value(&mut client, filenodes);
        db.cluster.run_again(&db.name, "migrations.sql");
        assert_eq!(value::<String>(&mut client, filenodes), before);
        assert!(holds(&mut client, "SELECT bool_and(indisvalid) FROM pg_index"));
    }
}

/// Follows the remedies for a release as its owner, each statement alone, and returns what changes they were
/// for. A statement that keeps others out waits for a second at most, and one that would leave an index half
/// built for as long as it takes.
fn follow(owner: &mut Client, client: &mut Client) -> Vec<String> {
    let (changes, remedies) = check(client, "1.110.2");
    for sql in remedies.iter().flat_map(|remedy| remedy.split_inclusive(';')).map(str::trim) {
        let limit: String = value(owner, "SHOW lock_timeout");
        match sql.split_whitespace().next() {
            Some("SET" | "RESET") => {}
            _ if sql.contains("CONCURRENTLY") => assert_eq!(limit, "0", "{sql}"),
            _ => assert_eq!(limit, "1s", "{sql}"),
        }
        owner.batch_execute(sql).unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    }
    assert_eq!(value::<String>(owner, "SHOW lock_timeout"), "0");
    changes.into_iter().map(|(change, _)| change).filter(|change| change.contains("INVALID")).collect()
}

#[test]
fn an_index_that_is_left_half_built_before_an_upgrade_is_said_and_finished() {
    let invalid = r#"index "LiteLLM_SpendLogs_startTime_request_id_idx" is INVALID"#;
    let all_valid = "SELECT bool_and(indisvalid) FROM pg_index";
    let half_built = |index: &str| {
        format!(r#"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '"{index}"'::regclass"#)
    };
    let (db, mut client) = with_rows();
    let mut owner = shared().connect_as(&db.name, LITELLM);
    client.batch_execute(&half_built("LiteLLM_SpendLogs_startTime_request_id_idx")).unwrap();
    assert_eq!(follow(&mut owner, &mut client), [invalid]);
    assert_eq!(follow(&mut owner, &mut client), [""; 0]);
    assert!(holds(&mut client, all_valid));

    let (db, mut client) = partitioned(shared());
    let mut owner = shared().connect_as(&db.name, LITELLM);
    client
        .batch_execute(
            r#"SET ROLE litellm; DROP TABLE "LiteLLM_SpendLogs_old" CASCADE;
               CREATE INDEX "LiteLLM_SpendLogs_startTime_request_id_idx" ON ONLY "LiteLLM_SpendLogs" ("startTime", request_id);
               CREATE INDEX "p0_startTime_request_id_idx" ON p0 ("startTime", request_id);
               CREATE INDEX "p1_startTime_request_id_idx" ON p1 ("startTime", request_id);
               ALTER INDEX "LiteLLM_SpendLogs_startTime_request_id_idx" ATTACH PARTITION "p1_startTime_request_id_idx";
               RESET ROLE"#,
        )
        .unwrap();
    client.batch_execute(&half_built("p0_startTime_request_id_idx")).unwrap();
    assert_eq!(follow(&mut owner, &mut client), [invalid]);
    assert_eq!(follow(&mut owner, &mut client), [""; 0]);
    assert!(holds(&mut client, all_valid));
    // One that was attached while it was half built never makes the whole valid.
    client.batch_execute(&half_built("p2_startTime_request_id_idx")).unwrap();
    client.batch_execute(&half_built("LiteLLM_SpendLogs_startTime_request_id_idx")).unwrap();
    assert_eq!(follow(&mut owner, &mut client), [invalid]);
    assert_eq!(follow(&mut owner, &mut client), [""; 0]);
    assert!(holds(&mut client, all_valid));
    // Not by statements that fail.
    client
        .batch_execute(&format!(
            r#"DROP INDEX "LiteLLM_SpendLogs_startTime_request_id_idx";
               CREATE TABLE ahead PARTITION OF "LiteLLM_SpendLogs" {} PARTITION BY HASH (request_id)"#,
            range_of_day(1)
        ))
        .unwrap();
    let by_hand = r#"SELECT remedy = '"public"."ahead" is partitioned itself, or foreign: build the index by hand'
        FROM spend_upgrade_check('1.110.2') WHERE change LIKE 'index "LiteLLM_SpendLogs_startTime_request_id_idx" on %'"#;
    assert!(holds(&mut client, by_hand));
}

#[test]
fn what_an_upgrade_takes_away_or_cannot_do_is_said() {
    let (_db, mut client) = with_rows();
    client
        .batch_execute(
            r#"CREATE INDEX added ON "LiteLLM_SpendLogs" (team_id);
               CREATE INDEX partial ON "LiteLLM_SpendLogs" (team_id) WHERE team_id IS NOT NULL"#,
        )
        .unwrap();
    let by = |client: &mut Client, version: &str, change: &str| -> Vec<String> {
        let (changes, _) = check(client, version);
        changes.into_iter().filter(|(found, _)| found == change).map(|(_, by)| by).collect()
    };
    let (always, asked) = (
        "LiteLLM's start after any migration, and --use_prisma_db_push",
        "--use_prisma_db_push and --use_legacy_migration_resolver only",
    );
    assert_eq!(by(&mut client, "1.100", r#"index "added""#), [always]);
    assert_eq!(by(&mut client, "1.110", r#"index "added""#), [asked]);
    let key = r#"primary key ("request_id")"#;
    assert_eq!(by(&mut client, "1.110", key), [""; 0]);
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_converted(&mut client);
    assert_eq!(by(&mut client, "1.92", key), [always]);
    assert_eq!(by(&mut client, "1.110", key), ["--use_prisma_db_push only"]);
    assert_eq!(by(&mut client, "2.0", "LiteLLM 2.0"), [""]);
    for (call, sqlstate) in
        [("'latest'", "22023"), ("NULL", "22004"), ("'1.110', 'litellm_spend.policy'", "42703")]
    {
        assert_refused(&mut client, &format!("SELECT * FROM spend_upgrade_check({call})"), sqlstate);
    }
}

//! What a partitioned table has when it is plain again, and what keeps it from that. (That no row is lost
//! beside writers is in tests/convert.rs.)

mod common;

use common::*;
use postgres::Client;

/// No worker: a test does each step itself.
fn cluster() -> &'static Cluster {
    static CLUSTER: std::sync::OnceLock<Cluster> = std::sync::OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(&[NO_WORKER]))
}

/// A partitioned table of 300 rows.
fn make_table(client: &mut Client, table: &str) {
    client
        .batch_execute(&format!(
            "SET ROLE litellm;
             CREATE TABLE {table} (id int, at timestamp NOT NULL, status text, n int, PRIMARY KEY (id, at),
                 CONSTRAINT small CHECK (n < 1000)) PARTITION BY RANGE (at);
             CREATE INDEX ON {table} (at);
             CREATE TABLE {table}_1 PARTITION OF {table} FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
             CREATE TABLE {table}_2 PARTITION OF {table} DEFAULT;
             INSERT INTO {table} SELECT i, '2026-01-20'::timestamp + i * interval '1 hour', 's', i
             FROM generate_series(1, 300) AS i; RESET ROLE"
        ))
        .unwrap();
}

/// Does a step of a reversion. Returns which one is next, or why it failed; `done`: the table is plain.
fn step(client: &mut Client, table: &str) -> String {
    let sql = format!(
        "SELECT CASE state WHEN 'next' THEN step ELSE state END FROM spend_partition_revert('{table}')
         WHERE state = 'next' OR step = 'swap' AND state = 'done'"
    );
    client.query_one(&sql, &[]).map_or_else(|error| format!("{error:?}"), |row| row.get(0))
}

/// Does steps until `next` is. What fails is tried again, as a worker does it.
fn steps_until(client: &mut Client, table: &str, next: &str) {
    let mut steps = vec![];
    while steps.last().is_none_or(|last| last != next) {
        steps.push(step(client, table));
        assert!(steps.len() < 20, "never {next}: {steps:?}");
    }
}

fn rows(client: &mut Client, table: &str) -> i64 {
    value(client, &format!("SELECT count(*) FROM {table}"))
}

#[test]
fn what_its_owner_changes_of_a_table_while_it_is_copied_is_there_when_it_is_plain() {
    let db = cluster().database();
    let mut client = db.connect();
    let changes = [
        (
            "a_default",
            "ALTER TABLE a_default ALTER status SET DEFAULT 'new'",
            "SELECT pg_get_expr(adbin, adrelid) = '''new''::text' FROM pg_attrdef WHERE adrelid = 'a_default'::regclass",
        ),
        (
            "a_check",
            "ALTER TABLE a_check ADD CONSTRAINT positive CHECK (n >= 0); COMMENT ON CONSTRAINT positive ON a_check IS 'why'",
            "SELECT convalidated AND obj_description(oid, 'pg_constraint') = 'why' FROM pg_constraint
             WHERE conrelid = 'a_check'::regclass AND conname = 'positive'",
        ),
        (
            "no_check",
            "ALTER TABLE no_check DROP CONSTRAINT small; UPDATE no_check SET n = 5000 WHERE id = 7",
            "SELECT (SELECT n = 5000 FROM no_check WHERE id = 7)
                 AND NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'no_check'::regclass AND contype = 'c')",
        ),
        (
            "other_check",
            "ALTER TABLE other_check DROP CONSTRAINT small, ADD CONSTRAINT small CHECK (n < 2000)",
            "SELECT pg_get_constraintdef(oid) = 'CHECK ((n < 2000))' FROM pg_constraint
             WHERE conrelid = 'other_check'::regclass AND conname = 'small'",
        ),
        (
            "storage",
            "ALTER TABLE storage ALTER status SET STORAGE EXTERNAL, ALTER status SET COMPRESSION pglz",
            "SELECT attstorage = 'e' AND attcompression = 'p' FROM pg_attribute
             WHERE attrelid = 'storage'::regclass AND attname = 'status'",
        ),
        (
            "collated",
            "ALTER TABLE collated ALTER status TYPE text COLLATE \"POSIX\"",
            "SELECT collname = 'POSIX' FROM pg_attribute JOIN pg_collation c ON c.oid = attcollation
             WHERE attrelid = 'collated'::regclass AND attname = 'status'",
        ),
    ];
    let mut lost = vec![];
    for (table, change, is_there) in changes {
        make_table(&mut client, table);
        steps_until(&mut client, table, "swap");
        client.batch_execute(change).unwrap();
        let last = (0..20).map(|_| step(&mut client, table)).find(|step| step == "done");
        let is_there = client.query_opt(is_there, &[]).unwrap().is_some_and(|row| row.get(0));
        if last.is_none() || rows(&mut client, table) != 300 || !is_there {
            lost.push(table);
        }
    }
    assert_eq!(lost, Vec::<&str>::new());
}

#[test]
fn what_uses_a_partition_by_its_name_is_in_the_way() {
    let db = cluster().database();
    let mut client = db.connect();
    make_table(&mut client, "t");
    // Each would go on to use what is in the archive by then.
    let cases = [
        (
            "CREATE VIEW v AS SELECT count(*) FROM t_1",
            "DROP VIEW v",
            "View public.v reads partition public.t_1.",
        ),
        (
            "CREATE MATERIALIZED VIEW v AS SELECT count(*) FROM t_1",
            "DROP MATERIALIZED VIEW v",
            "Materialized view public.v reads partition public.t_1.",
        ),
        (
            "CREATE TABLE log (i int); CREATE RULE r AS ON INSERT TO log DO ALSO DELETE FROM t_1",
            "DROP TABLE log",
            "Rule r of public.log uses partition public.t_1.",
        ),
        (
            "CREATE RULE r AS ON DELETE TO t_1 DO ALSO SELECT 1",
            "DROP RULE r ON t_1",
            "Partition public.t_1 has a rule, r.",
        ),
        (
            "CREATE FUNCTION f() RETURNS bigint BEGIN ATOMIC SELECT count(*) FROM t_1; END",
            "DROP FUNCTION f()",
            "Function public.f() reads partition public.t_1.",
        ),
        (
            "CREATE TABLE f (i int, at timestamp, FOREIGN KEY (i, at) REFERENCES t_1)",
            "DROP TABLE f",
            "Constraint f_i_at_fkey of public.f is a foreign key to or from partition public.t_1.",
        ),
        (
            "CREATE TABLE f (i int); CREATE POLICY p ON f USING (i = (SELECT count(*) FROM t_1))",
            "DROP TABLE f",
            "Policy p of public.f reads partition public.t_1.",
        ),
        (
            "CREATE TABLE f (r t_1)",
            "DROP TABLE f",
            "The row type of partition public.t_1 is used by column r of table public.f.",
        ),
        (
            "CREATE PUBLICATION p FOR TABLE t_1",
            "DROP PUBLICATION p",
            "Partition public.t_1 is in publication p.",
        ),
        (
            "CREATE SUBSCRIPTION s CONNECTION '' PUBLICATION p WITH (connect = false);
             SET allow_system_table_mods = on;
             INSERT INTO pg_subscription_rel (srsubid, srrelid, srsubstate)
             SELECT oid, 't_1'::regclass, 'i' FROM pg_subscription WHERE subname = 's'",
            "DELETE FROM pg_subscription_rel; RESET allow_system_table_mods;
             ALTER SUBSCRIPTION s SET (slot_name = NONE); DROP SUBSCRIPTION s",
            "Subscription s writes to partition public.t_1.",
        ),
    ];
    let refused = |client: &mut Client, called: &str, reason: &str| {
        let failure = client.batch_execute("SELECT spend_partition_revert('t')");
        let failure = failure.err().and_then(|error| error.as_db_error().cloned());
        let detail = failure.and_then(|error| error.detail().map(str::to_string));
        (detail.as_deref() != Some(reason)).then(|| format!("{called}: {detail:?}"))
    };
    let mut passed = vec![];
    for (sql, undo, reason) in &cases {
        client.batch_execute(sql).unwrap();
        passed.extend(refused(&mut client, sql, reason));
        client.batch_execute("SELECT spend_partition_revert('t', abort => true)").unwrap();
        client.batch_execute(undo).unwrap();
    }
    assert_eq!(passed, Vec::<String>::new());
    // Also what comes meanwhile, of the table itself, too.
    steps_until(&mut client, "t", "swap");
    for (sql, undo, reason) in [
        cases[0],
        (
            "CREATE MATERIALIZED VIEW v AS SELECT count(*) FROM t",
            "DROP MATERIALIZED VIEW v",
            "Materialized view \"public\".\"v\" reads it.",
        ),
    ] {
        client.batch_execute(sql).unwrap();
        assert_eq!(refused(&mut client, sql, reason), None);
        client.batch_execute(undo).unwrap();
    }
    steps_until(&mut client, "t", "done");
    assert_eq!(rows(&mut client, "t"), 300);
}

#[test]
fn an_index_whose_name_looks_like_its_definition_is_made_on_the_plain_table() {
    let db = cluster().database();
    let mut client = db.connect();
    make_table(&mut client, "t");
    client
        .batch_execute(
            r#"ALTER TABLE t RENAME TO "t USING it";
               CREATE INDEX "by status USING hash (n)" ON "t USING it" (status) INCLUDE (n) WHERE status <> ' USING '"#,
        )
        .unwrap();
    steps_until(&mut client, "\"t USING it\"", "done");
    let definition = r#"SELECT pg_get_indexdef('"by status USING hash (n)"'::regclass)"#;
    assert_eq!(
        value::<String>(&mut client, definition),
        r#"CREATE INDEX "by status USING hash (n)" ON public."t USING it" USING btree (status) INCLUDE (n) WHERE (status <> ' USING '::text)"#
    );
}

#[test]
fn a_row_that_is_kept_out_has_its_generated_columns() {
    let db = cluster().database();
    let mut client = db.connect();
    make_table(&mut client, "t");
    client
        .batch_execute(
            "ALTER TABLE t ADD COLUMN twice int NOT NULL GENERATED ALWAYS AS (n * 2) STORED;
             INSERT INTO t SELECT id, at + interval '1 minute', 'again', 50 FROM t WHERE id IN (7, 8)",
        )
        .unwrap();
    steps_until(&mut client, "t", "swap");
    // And one that is noted.
    client
        .batch_execute("INSERT INTO t SELECT id, at + interval '1 minute', 'again', 60 FROM t WHERE id = 9")
        .unwrap();
    steps_until(&mut client, "t", "done");
    let kept_out = "SELECT array_agg(id || ' ' || twice ORDER BY id) FROM litellm_spend_archive.t_duplicates";
    assert_eq!(value::<Vec<String>>(&mut client, kept_out), ["7 100", "8 100", "9 120"]);
    assert!(holds(&mut client, "SELECT count(*) = 300 AND bool_and(twice = n * 2) FROM t"));
}

#[test]
fn a_row_that_moves_while_the_trigger_for_it_is_disabled_is_where_it_moved_to() {
    let db = cluster().database();
    let mut client = db.connect();
    if !knows_merge(&mut client) {
        return;
    }
    for (table, disabled) in [("of_the_table", ""), ("of_a_partition", "_2")] {
        make_table(&mut client, table);
        steps_until(&mut client, table, "swap");
        client
            .batch_execute(&format!(
                "ALTER TABLE {table}{disabled} DISABLE TRIGGER litellm_spend_revert_move;
                 MERGE INTO {table} AS t USING (VALUES (299)) AS s(id) ON t.id = s.id
                 WHEN MATCHED THEN UPDATE SET at = '2026-01-01', id = 1299"
            ))
            .unwrap();
        steps_until(&mut client, table, "done");
        let moved = format!("SELECT count(*) = 1 FROM {table} WHERE id IN (299, 1299) AND at = '2026-01-01'");
        assert!(holds(&mut client, &moved), "{table}");
        assert_eq!(rows(&mut client, table), 300);
    }
}

#[test]
fn a_check_that_was_never_validated_keeps_no_old_row_from_being_copied() {
    let db = cluster().database();
    let mut client = db.connect();
    make_table(&mut client, "t");
    client
        .batch_execute(
            "ALTER TABLE t ADD CONSTRAINT few CHECK (n < 200) NOT VALID; COMMENT ON CONSTRAINT few ON t IS 'from now on'",
        )
        .unwrap();
    steps_until(&mut client, "t", "swap");
    // What is noted is copied again, also of a row that the CHECK would refuse.
    client
        .batch_execute(
            "UPDATE t SET status = 'changed', n = 199 WHERE id = 300; DELETE FROM t WHERE id = 299",
        )
        .unwrap();
    steps_until(&mut client, "t", "done");
    assert!(holds(&mut client, "SELECT count(*) = 299 AND max(n) = 298 FROM t"));
    let checks = "SELECT array_agg(concat_ws(' ', conname, convalidated, obj_description(oid, 'pg_constraint')) ORDER BY conname)
                  FROM pg_constraint WHERE conrelid = 't'::regclass AND contype = 'c'";
    assert_eq!(value::<Vec<String>>(&mut client, checks), ["few f from now on", "small t"]);
    assert_eq!(error(&mut client, "UPDATE t SET n = 200 WHERE id = 1").code().code(), "23514");
}

#[test]
fn a_reversion_ends_beside_a_publication_for_all_tables() {
    let db = cluster().database();
    let mut client = db.connect();
    make_table(&mut client, "t");
    client.batch_execute("CREATE PUBLICATION everything FOR ALL TABLES").unwrap();
    steps_until(&mut client, "t", "swap");
    // What changed is taken from the copy, from the duplicates and from the notes.
    client.batch_execute("UPDATE t SET status = 'changed' WHERE id = 7; DELETE FROM t WHERE id = 8").unwrap();
    steps_until(&mut client, "t", "done");
    assert!(holds(
        &mut client,
        "SELECT count(*) = 299 AND count(*) FILTER (WHERE status = 'changed') = 1 FROM t"
    ));
}

#[test]
fn a_writer_whose_note_failed_has_ended_before_the_copy_begins_anew() {
    let db = cluster().database();
    let (mut client, mut writer, mut holder) = (db.connect(), db.connect(), db.connect());
    make_table(&mut client, "t");
    steps_until(&mut client, "t", "swap");
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend_archive.t_plain_changes IN SHARE MODE").unwrap();
    writer
        .batch_execute(
            "BEGIN; SET LOCAL lock_timeout = '50ms'; INSERT INTO t VALUES (1000, '2026-01-25', 'late', 1)",
        )
        .unwrap();
    holder.batch_execute("COMMIT").unwrap();
    client.batch_execute("SET litellm_spend.lock_timeout = '50ms'").unwrap();
    // It would begin anew, and copy all that it sees.
    let steps = [step(&mut client, "t"), step(&mut client, "t")];
    writer.batch_execute("COMMIT").unwrap();
    steps_until(&mut client, "t", "done");
    assert_eq!(rows(&mut client, "t"), 301, "after {steps:?}");
    assert!(steps.iter().all(|step| step.contains("55P03")), "{steps:?}");
}

#[test]
fn a_writer_does_not_wait_for_who_has_locked_the_notes_of_a_reversion() {
    let db = cluster().database();
    let (mut client, mut holder) = (db.connect(), db.connect());
    make_table(&mut client, "t");
    steps_until(&mut client, "t", "swap");
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend_archive.t_plain_changes").unwrap();
    client
        .batch_execute("SET statement_timeout = '10s'; INSERT INTO t VALUES (1000, '2026-01-25', 'late', 1)")
        .unwrap();
    holder.batch_execute("COMMIT").unwrap();
    steps_until(&mut client, "t", "done");
    assert_eq!(rows(&mut client, "t"), 301);
}

#[test]
fn the_swap_of_a_reversion_leaves_what_comes_in_bulk_to_a_step_without_its_locks() {
    let db = cluster().database();
    let mut client = db.connect();
    make_table(&mut client, "t");
    steps_until(&mut client, "t", "swap");
    for (came, rows_then, copied_then) in [
        ("INSERT INTO t SELECT i, '2026-01-25', 's', 1 FROM generate_series(1001, 8000) AS i", 7300, 7300),
        (
            "SET LOCAL ROLE litellm; CREATE TABLE came (LIKE t INCLUDING ALL);
             INSERT INTO came VALUES (9001, '2026-05-05', 's', 1);
             ALTER TABLE t ATTACH PARTITION came FOR VALUES FROM ('2026-05-01') TO ('2026-06-01')",
            7301,
            7300,
        ),
    ] {
        let mut writer = db.connect();
        writer.batch_execute(&format!("BEGIN; {came}")).unwrap();
        let next =
            while_it_waits(&db, |caller| step(caller, "t"), |_, _| writer.batch_execute("COMMIT").unwrap());
        // It is copied, and committed, before the swap is tried again.
        assert_eq!((next.as_str(), rows(&mut client, "t")), ("swap", rows_then));
        assert_eq!(rows(&mut client, "litellm_spend_archive.t_plain"), copied_then);
    }
    steps_until(&mut client, "t", "done");
    assert_eq!(rows(&mut client, "t"), 7301);
    assert!(holds(&mut client, "SELECT to_regclass('litellm_spend_archive.came') IS NOT NULL"));
}

#[test]
fn a_key_that_no_index_begins_with_is_asked_for_one() {
    let db = cluster().database();
    let mut client = db.connect();
    make_table(&mut client, "t");
    client.batch_execute("ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (at, n, id)").unwrap();
    let asked = error(&mut client, "SELECT spend_partition_revert('t')");
    assert_eq!(asked.code().code(), "55000", "{asked:?}");
    let hint = asked.hint().unwrap();
    let only = r#"CREATE INDEX ON ONLY "public"."t" ("n", "id"), then CONCURRENTLY on each partition"#;
    assert!(hint.starts_with(only), "{hint}");
    client.batch_execute("CREATE INDEX by_key ON t (id, n, at)").unwrap();
    steps_until(&mut client, "t", "swap");
    // It is still there when everybody waits for it.
    client.batch_execute("DROP INDEX by_key; UPDATE t SET status = 'changed' WHERE id = 1").unwrap();
    let refused = step(&mut client, "t");
    assert!(refused.contains("55000") && refused.contains("begins with its key"), "{refused}");
    client.batch_execute("CREATE INDEX ON t (n, id)").unwrap();
    steps_until(&mut client, "t", "done");
    assert!(holds(&mut client, "SELECT status = 'changed' FROM t WHERE id = 1"));
}

#[test]
fn what_was_slow_to_catch_up_with_is_not_followed_by_the_swap() {
    let db = cluster().database();
    let mut client = db.connect();
    make_table(&mut client, "t");
    client
        .batch_execute(
            "SET ROLE litellm;
             CREATE FUNCTION take_time(status text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
                 IF status = 'slow' THEN PERFORM pg_sleep(1.2); END IF;
                 RETURN true;
             END $$;
             ALTER TABLE t ADD CHECK (take_time(status)); RESET ROLE",
        )
        .unwrap();
    steps_until(&mut client, "t", "swap");
    client.batch_execute("UPDATE t SET status = 'slow' WHERE id = 1").unwrap();
    assert_eq!(step(&mut client, "t"), "swap");
    assert!(holds(&mut client, "SELECT status = 'slow' FROM litellm_spend_archive.t_plain WHERE id = 1"));
    assert_eq!(step(&mut client, "t"), "done");
}

#[test]
fn a_call_that_does_not_get_the_copy_has_not_begun_anew() {
    let db = cluster().database();
    let (mut client, mut reader) = (db.connect(), db.connect());
    make_table(&mut client, "t");
    steps_until(&mut client, "t", "indexes");
    client.batch_execute("TRUNCATE t_2; SET litellm_spend.lock_timeout = '100ms'").unwrap();
    reader.batch_execute("BEGIN; LOCK TABLE litellm_spend_archive.t_plain IN ACCESS SHARE MODE").unwrap();
    let refused = step(&mut client, "t");
    assert!(refused.contains("55P03"), "{refused}");
    reader.batch_execute("COMMIT").unwrap();
    let left = rows(&mut client, "t");
    steps_until(&mut client, "t", "done");
    assert_eq!(rows(&mut client, "t"), left);
    assert!(holds(&mut client, "SELECT to_regclass('litellm_spend_archive.t_duplicates') IS NULL"));
}

#[test]
fn a_call_that_keeps_writers_waiting_copies_nothing() {
    let db = cluster().database();
    let mut client = db.connect();
    make_table(&mut client, "t");
    let copied = |client: &mut Client| rows(client, "litellm_spend_archive.t_plain");
    // Prepared, and prepared anew.
    for change in ["SELECT", "ALTER TABLE t ADD COLUMN newer int"] {
        client.batch_execute(change).unwrap();
        assert_eq!(step(&mut client, "t"), "copy", "{change}");
        assert_eq!(copied(&mut client), 0, "{change}");
        assert_eq!(step(&mut client, "t"), "indexes", "{change}");
        assert_eq!(copied(&mut client), 300, "{change}");
    }
    // A note failed: it begins anew.
    client.batch_execute("SELECT nextval('litellm_spend_archive.t_plain_failures')").unwrap();
    assert_eq!(step(&mut client, "t"), "copy");
    assert_eq!(copied(&mut client), 0);
    // A partition comes before all is copied.
    client
        .batch_execute(
            "SET ROLE litellm; CREATE TABLE came PARTITION OF t FOR VALUES FROM ('2026-05-01') TO ('2026-06-01');
             RESET ROLE",
        )
        .unwrap();
    assert_eq!(step(&mut client, "t"), "copy");
    assert_eq!(copied(&mut client), 0);
    steps_until(&mut client, "t", "done");
    assert_eq!(rows(&mut client, "t"), 300);
}

#[test]
fn a_key_that_the_server_does_not_compare_by_its_own_operators_is_in_the_way() {
    let db = cluster().database();
    let mut client = db.connect();
    make_table(&mut client, "t");
    client
        .batch_execute(
            r#"CREATE EXTENSION citext; CREATE DOMAIN name_of AS citext;
               SET ROLE litellm;
               CREATE TABLE by_name ("the id" name_of, at timestamp, PRIMARY KEY ("the id", at)) PARTITION BY RANGE (at);
               CREATE INDEX ON by_name (at);
               CREATE TABLE by_name_1 PARTITION OF by_name DEFAULT; RESET ROLE"#,
        )
        .unwrap();
    let refused = error(&mut client, "SELECT spend_partition_revert('by_name')");
    assert_eq!(refused.code().code(), "55000");
    assert_eq!(
        refused.detail(),
        Some(
            "Column \"the id\" of its primary key is of type public.name_of, whose operators are not the server's own."
        )
    );
    // Also one that gets such a type meanwhile.
    steps_until(&mut client, "t", "swap");
    client.batch_execute("ALTER TABLE t ALTER id TYPE citext USING id::text::citext").unwrap();
    let steps: Vec<String> = (0..5).map(|_| step(&mut client, "t")).collect();
    assert!(steps.last().is_some_and(|last| last.contains("55000") && last.contains("citext")), "{steps:?}");
}

#[test]
fn what_is_granted_by_default_is_not_granted_on_what_a_reversion_makes() {
    let db = cluster().database();
    let mut client = db.connect();
    make_table(&mut client, "t");
    client
        .batch_execute(
            "CREATE ROLE granted_by_default;
             ALTER DEFAULT PRIVILEGES FOR ROLE litellm GRANT ALL ON TABLES TO granted_by_default;
             ALTER DEFAULT PRIVILEGES FOR ROLE litellm GRANT ALL ON SEQUENCES TO granted_by_default;
             ALTER DEFAULT PRIVILEGES FOR ROLE litellm GRANT ALL ON FUNCTIONS TO granted_by_default, PUBLIC",
        )
        .unwrap();
    steps_until(&mut client, "t", "swap");
    let granted = "SELECT coalesce(array_agg(o.name ORDER BY o.name), '{}')
        FROM (SELECT relname::text, relnamespace, relacl, relowner FROM pg_class
              UNION ALL SELECT proname, pronamespace, proacl, proowner FROM pg_proc) AS o(name, schema, acl, owner)
        WHERE o.schema = 'litellm_spend_archive'::regnamespace
          AND EXISTS (SELECT FROM aclexplode(o.acl) AS x WHERE x.grantee <> o.owner)";
    let granted: Vec<String> = value(&mut client, granted);
    client.batch_execute("DROP OWNED BY granted_by_default; DROP ROLE granted_by_default").unwrap();
    assert_eq!(granted, Vec::<String>::new());
}

#[test]
fn a_table_that_is_plain_again_is_stored_as_its_newest_partition() {
    let db = cluster().database();
    let mut client = db.connect();
    make_table(&mut client, "t");
    client
        .batch_execute(
            "CREATE ACCESS METHOD other_heap TYPE TABLE HANDLER heap_tableam_handler;
             SET ROLE litellm;
             ALTER TABLE t_1 SET (autovacuum_enabled = off);
             CREATE TABLE t_3 PARTITION OF t FOR VALUES FROM ('2026-03-01') TO ('2026-04-01') WITH (fillfactor = 70);
             CREATE TABLE t_4 PARTITION OF t FOR VALUES FROM ('2026-04-01') TO ('2026-05-01') USING other_heap;
             RESET ROLE",
        )
        .unwrap();
    steps_until(&mut client, "t", "done");
    let stored = "SELECT concat_ws(' ', amname, reloptions) FROM pg_class c JOIN pg_am m ON m.oid = c.relam
                  WHERE c.oid = 't'::regclass";
    assert_eq!(value::<String>(&mut client, stored), "heap {fillfactor=70}");
}

#[test]
fn whatever_a_trigger_on_a_table_on_its_way_is_called_it_stays() {
    let db = cluster().database();
    let mut client = db.connect();
    make_table(&mut client, "t");
    make_table(&mut client, "other");
    client
        .batch_execute(
            "CREATE FUNCTION public.nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
             CREATE TRIGGER litellm_spend_revertx AFTER INSERT ON other FOR EACH STATEMENT EXECUTE FUNCTION nothing()",
        )
        .unwrap();
    let names =
        ["litellm_spend_revert X", "litellm_spend_revertx ON public.other CASCADE --", "litellm_spend_mine"];
    for name in names {
        let sql = format!(
            r#"CREATE TRIGGER "{name}" AFTER INSERT ON t FOR EACH STATEMENT EXECUTE FUNCTION nothing()"#
        );
        client.batch_execute(&sql).unwrap();
    }
    let of = |client: &mut Client, table: &str| {
        let sql = format!(
            "SELECT coalesce(array_agg(tgname::text ORDER BY tgname), '{{}}') FROM pg_trigger
             WHERE tgrelid = '{table}'::regclass AND NOT tgisinternal"
        );
        value::<Vec<String>>(client, &sql)
    };
    steps_until(&mut client, "t", "swap");
    client.batch_execute("SELECT spend_partition_revert('t', abort => true)").unwrap();
    let mut sorted = names;
    sorted.sort();
    assert_eq!(of(&mut client, "t"), sorted);
    steps_until(&mut client, "t", "done");
    assert_eq!(of(&mut client, "t"), sorted);
    assert_eq!(of(&mut client, "other"), ["litellm_spend_revertx"]);
}

/// What a reversion makes: tables, sequences and functions in the archive, and triggers.
const MADE: &str = "SELECT (SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'litellm_spend_revert%')
         + (SELECT count(*) FROM pg_class WHERE relkind IN ('r', 'S')
                AND relnamespace = to_regnamespace('litellm_spend_archive'))
         + (SELECT count(*) FROM pg_proc WHERE pronamespace = to_regnamespace('litellm_spend_archive'))
         + (SELECT count(*) FROM litellm_spend.conversion)";

#[test]
fn what_was_made_for_a_table_goes_when_another_owner_takes_it_back_or_begins_anew() {
    let db = cluster().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE ROLE former; CREATE ROLE heir; GRANT CREATE ON SCHEMA public TO former, heir;
             SELECT spend_grant_admin('heir')",
        )
        .unwrap();
    let give =
        |owner: &str| ["t", "t_1", "t_2"].map(|t| format!("ALTER TABLE {t} OWNER TO {owner};")).concat();
    for given in ["REASSIGN OWNED BY former TO heir", &give("heir")] {
        for anew in [false, true] {
            make_table(&mut client, "t");
            client.batch_execute(&give("former")).unwrap();
            steps_until(&mut client, "t", "swap");
            client.batch_execute(given).unwrap();
            client.batch_execute("SET ROLE heir").unwrap();
            if anew {
                steps_until(&mut client, "t", "done");
                assert_eq!(rows(&mut client, "t"), 300);
                client.batch_execute("DROP TABLE litellm_spend_archive.t_partitioned").unwrap();
            } else {
                let abort = "SELECT state || detail FROM spend_partition_revert('t', abort => true)";
                assert_eq!(value::<String>(&mut client, abort), "aborted");
            }
            client.batch_execute("RESET ROLE").unwrap();
            assert_eq!(value::<i64>(&mut client, MADE), 0, "{given}, {anew}");
            client.batch_execute("DROP TABLE t").unwrap();
        }
    }
}

#[test]
fn a_partition_that_was_detached_and_given_away_does_not_keep_its_triggers() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute("CREATE ROLE receiver").unwrap();
    for aborted in [true, false] {
        make_table(&mut client, "t");
        steps_until(&mut client, "t", "swap");
        client
            .batch_execute("ALTER TABLE t DETACH PARTITION t_1; ALTER TABLE t_1 OWNER TO receiver")
            .unwrap();
        if aborted {
            client.batch_execute("SELECT spend_partition_revert('t', abort => true)").unwrap();
            assert_eq!(value::<i64>(&mut client, MADE), 0);
        } else {
            steps_until(&mut client, "t", "done");
            let triggers = "SELECT count(*) FROM pg_trigger WHERE tgrelid = 't_1'::regclass";
            assert_eq!(value::<i64>(&mut client, triggers), 0);
        }
        client.batch_execute("DROP TABLE t, t_1").unwrap();
    }
}

#[test]
fn a_primary_key_that_changes_while_the_table_is_copied_is_that_of_the_plain_one() {
    let db = cluster().database();
    let mut client = db.connect();
    let cases = [
        (
            "wider",
            "ALTER TABLE wider DROP CONSTRAINT wider_pkey, ADD CONSTRAINT wider_pkey PRIMARY KEY (n, id, at);
             INSERT INTO wider SELECT id, at + interval '1 minute', status, 500 FROM wider WHERE id = 7",
            "PRIMARY KEY (n, id)",
            301,
        ),
        (
            "renamed",
            "ALTER TABLE renamed RENAME at TO ts; ALTER TABLE renamed RENAME id TO number",
            "PRIMARY KEY (number)",
            300,
        ),
    ];
    for (table, change, key, expected) in cases {
        make_table(&mut client, table);
        steps_until(&mut client, table, "swap");
        client.batch_execute(change).unwrap();
        steps_until(&mut client, table, "done");
        let sql = format!(
            "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = '{table}'::regclass AND contype = 'p'"
        );
        assert_eq!((value::<String>(&mut client, &sql).as_str(), rows(&mut client, table)), (key, expected));
    }
}

#[test]
fn a_primary_key_with_a_generated_column_is_in_the_way() {
    let db = cluster().database();
    let mut client = db.connect();
    make_table(&mut client, "t");
    client
        .batch_execute(
            "ALTER TABLE t ADD COLUMN twice int GENERATED ALWAYS AS (n * 2) STORED;
             ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (twice, id, at)",
        )
        .unwrap();
    let error = error(&mut client, "SELECT spend_partition_revert('t')");
    assert_eq!(error.code().code(), "55000");
    assert_eq!(error.detail(), Some("Column \"twice\" of its primary key is generated."));
}

#[test]
fn a_table_that_is_partitioned_by_a_number_becomes_plain_too() {
    let db = cluster().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE t (id int, n bigint, PRIMARY KEY (id, n)) PARTITION BY RANGE (n);
             CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM (0) TO (100) WITH (fillfactor = 70);
             CREATE TABLE t_2 PARTITION OF t DEFAULT;
             CREATE INDEX ON t (n); INSERT INTO t SELECT i, i FROM generate_series(1, 300) AS i",
        )
        .unwrap();
    steps_until(&mut client, "t", "done");
    assert_eq!(rows(&mut client, "t"), 300);
    assert!(holds(
        &mut client,
        "SELECT reloptions = '{fillfactor=70}' FROM pg_class WHERE oid = 't'::regclass"
    ));
}

#[test]
fn a_trigger_that_is_replaced_by_another_of_its_name_is_missed() {
    let db = cluster().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        )
        .unwrap();
    for (table, when, function) in
        [("t", "", "nothing()"), ("u", "WHEN (false)", "litellm_spend_archive.u_plain_note()")]
    {
        make_table(&mut client, table);
        steps_until(&mut client, table, "swap");
        client
            .batch_execute(&format!(
                "CREATE OR REPLACE TRIGGER litellm_spend_revert_delete AFTER DELETE ON {table}
                     {} FOR EACH STATEMENT {when} EXECUTE FUNCTION {function};
                 DELETE FROM {table} WHERE id <= 10",
                if when.is_empty() { "" } else { "REFERENCING OLD TABLE AS old_rows" }
            ))
            .unwrap();
        steps_until(&mut client, table, "done");
        assert_eq!(rows(&mut client, table), 290, "{table}");
    }
}

#[test]
fn what_is_written_while_its_triggers_are_disabled_for_a_moment_is_in_the_plain_table() {
    let db = cluster().database();
    let mut client = db.connect();
    for (table, before, after) in [
        ("t", "ALTER TABLE t DISABLE TRIGGER USER", "ALTER TABLE t ENABLE TRIGGER USER"),
        ("u", "SET session_replication_role = replica", "RESET session_replication_role"),
    ] {
        make_table(&mut client, table);
        steps_until(&mut client, table, "swap");
        client
            .batch_execute(&format!(
                "BEGIN; {before}; DELETE FROM {table} WHERE id <= 10; UPDATE {table} SET n = -1 WHERE id = 20; {after}; COMMIT"
            ))
            .unwrap();
        steps_until(&mut client, table, "done");
        assert_eq!(rows(&mut client, table), 290, "{table}");
        assert!(holds(&mut client, &format!("SELECT n = -1 FROM {table} WHERE id = 20")));
    }
}

/// The worker has read what is asked for, and waits at another table.
#[test]
fn a_reversion_of_a_table_that_was_made_anew_is_not_taken_for_the_one_before() {
    let cluster = own_cluster(&["litellm_spend.lock_timeout = '60s'"]);
    let db = cluster.database();
    let (mut client, mut holder) = (db.connect(), db.connect());
    make_table(&mut client, "a");
    make_table(&mut client, "b");
    holder.batch_execute("BEGIN; LOCK TABLE a IN ROW EXCLUSIVE MODE").unwrap();
    client
        .batch_execute(
            "BEGIN; SELECT * FROM spend_partition_revert('a'); SELECT * FROM spend_partition_revert('b'); COMMIT",
        )
        .unwrap();
    let waits = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND relation = 'a'::regclass";
    eventually("the worker waits", || holds(&mut client, waits));
    client.batch_execute("DROP TABLE b").unwrap();
    make_table(&mut client, "b");
    client.batch_execute("SELECT * FROM spend_partition_revert('b')").unwrap();
    holder.batch_execute("COMMIT").unwrap();
    let plain = "SELECT relkind = 'r' FROM pg_class WHERE oid = 'b'::regclass";
    let asked = "SELECT count(*) > 0 FROM litellm_spend.conversion";
    eventually("both are done", || !holds(&mut client, asked));
    assert!(holds(&mut client, plain));
}

#[test]
fn what_keeps_a_reversion_from_beginning_anew_is_said_before_anybody_is_locked_out() {
    let db = cluster().database();
    let (mut client, mut reader) = (db.connect(), db.connect());
    make_table(&mut client, "t");
    steps_until(&mut client, "t", "swap");
    client.batch_execute("ALTER TABLE t DROP CONSTRAINT t_pkey").unwrap();
    reader.batch_execute("BEGIN; SELECT FROM t").unwrap();
    let error = error(&mut client, "SELECT spend_partition_revert('t')");
    assert_eq!(error.code().code(), "55000", "{error:?}");
    assert_eq!(error.detail(), Some("Without the partition key nothing is left of its primary key."));
}

#[test]
fn another_table_of_the_name_does_not_take_the_place_of_one_on_its_way() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute("CREATE ROLE bob; GRANT CREATE ON SCHEMA public TO bob").unwrap();
    make_table(&mut client, "t");
    steps_until(&mut client, "t", "swap");
    client
        .batch_execute(
            "ALTER TABLE t RENAME TO t_old;
             CREATE TABLE t (id int, at timestamp NOT NULL, PRIMARY KEY (id, at)); CREATE INDEX ON t (at); ALTER TABLE t OWNER TO bob",
        )
        .unwrap();
    let convert = "SELECT spend_partition_convert('t', time_column => 'at')";
    let refused = error(&mut client, convert);
    assert_eq!(refused.code().code(), "55000", "{refused:?}");
    assert!(
        refused.hint().unwrap().contains("spend_partition_revert('public.t_old', abort => true)"),
        "{refused:?}"
    );
    client.batch_execute("SELECT spend_partition_revert('t_old', abort => true)").unwrap();
    assert_eq!(value::<i64>(&mut client, MADE), 0);
    client.batch_execute(convert).unwrap();
    // The other way round.
    client.batch_execute("ALTER TABLE t RENAME TO t_new").unwrap();
    make_table(&mut client, "v");
    client.batch_execute("ALTER TABLE v RENAME TO t").unwrap();
    let refused = error(&mut client, "SELECT spend_partition_revert('t')");
    assert_eq!(refused.code().code(), "55000", "{refused:?}");
    client.batch_execute("SELECT spend_partition_revert('t_new', abort => true)").unwrap();
    steps_until(&mut client, "t", "done");
}

#[test]
fn a_conversion_whose_table_is_given_away_is_for_the_new_owner_to_take_back() {
    let db = cluster().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE ROLE giver; CREATE ROLE taker; GRANT CREATE ON SCHEMA public TO giver, taker; SELECT spend_grant_admin('taker');
             CREATE TABLE t (id int, at timestamp NOT NULL, PRIMARY KEY (id, at)); CREATE INDEX ON t (at); ALTER TABLE t OWNER TO giver;
             INSERT INTO t VALUES (1, '2020-01-01'); SELECT spend_partition_convert('t', time_column => 'at')",
        )
        .unwrap();
    client.batch_execute("ALTER TABLE t OWNER TO taker; SET ROLE taker").unwrap();
    // It keeps nothing of the new owner's from being done.
    client
        .batch_execute("SELECT spend_partition_set('t', retention => '1 year', time_column => 'at'); SELECT spend_partition_maintain('t')")
        .unwrap();
    assert_eq!(rows(&mut client, "t"), 0);
    let abort = "SELECT step || state FROM spend_partition_revert('t', abort => true)";
    assert_eq!(value::<String>(&mut client, abort), "conversionaborted");
    client.batch_execute("RESET ROLE").unwrap();
    assert!(holds(&mut client, "SELECT count(*) = 0 FROM litellm_spend.conversion"));
}

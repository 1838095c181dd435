//! A database of an earlier version is brought over by ALTER EXTENSION UPDATE, loses nothing, and is then
//! like a new one.

mod common;

use common::*;
use postgres::Client;
use std::path::Path;

/// A database of LiteLLM's that version 0.1.0 is installed in, and attached if that is asked for.
fn of_0_1_0(attached: bool) -> (Database, Client) {
    let db = shared().litellm_database();
    let mut client = db.connect();
    client.batch_execute("CREATE EXTENSION litellm_spend VERSION '0.1.0'").unwrap();
    if attached {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/upgrade/attached-0.1.0.sql");
        let script = script.to_str().unwrap();
        db.cluster.psql(&db.name, &["-q", "-1", "-v", "ON_ERROR_STOP=1", "-f", script]);
    }
    (db, client)
}

#[test]
fn an_attached_database_goes_on_and_its_objects_go_to_the_tables_owner() {
    let (_db, mut client) = of_0_1_0(true);
    // The new library beside the old state: writers and readers do not notice.
    client.batch_execute(&insert_rows("old", 200, 10)).unwrap();
    client.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE request_id = 'old7'"#).unwrap();
    let total = r#"SELECT sum(spend) FROM "MonthlyGlobalSpend""#;
    let before: f64 = value(&mut client, total);
    assert!(before > 0.0);
    client
        .batch_execute(
            "INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation, repaired_at)
             VALUES ('-infinity', 'infinity', 'freeze', 'TRUNCATE', now())",
        )
        .unwrap();
    let definers =
        "SELECT count(*) FROM pg_proc WHERE pronamespace = 'litellm_spend'::regnamespace AND prosecdef
                        AND proowner = 'postgres'::regrole";
    assert_eq!(value::<i64>(&mut client, definers), 4, "as it was");

    client
        .batch_execute(
            "UPDATE litellm_spend.source SET frozen_before = '2020-11-11 12:00' WHERE name = 'change_log';
             ALTER EXTENSION litellm_spend UPDATE; SELECT spend_attach()",
        )
        .unwrap();
    let whole_days =
        "SELECT bool_and(frozen_before = date_trunc('day', frozen_before)) FROM litellm_spend.source";
    assert!(holds(&mut client, whole_days), "a partition of 0.1.0's may have ended at noon");
    assert_eq!(value::<i64>(&mut client, definers), 0);
    assert!(holds(
        &mut client,
        "SELECT count(*) = 4 AND bool_and(proowner = 'litellm'::regrole) FROM pg_proc
         WHERE pronamespace = 'litellm_spend'::regnamespace AND prosecdef"
    ));
    assert_eq!(value::<f64>(&mut client, total), before);
    let frozen = "SELECT count(*) FROM litellm_spend.dirty_range WHERE repair = 'freeze'";
    assert_eq!(value::<i64>(&mut client, frozen), 0, "what TRUNCATE froze is before the border");
    client.batch_execute("SET ROLE litellm").unwrap();
    client.batch_execute(&insert_rows("new", 100, 10)).unwrap();
    client.batch_execute("RESET ROLE").unwrap();
    wait_until_live(&mut client);
    wait_until_merged(&mut client);
    assert_verified(&mut client);
    assert_eq!(capture_errors(&mut client), 0);
    // The deleted row stays in the totals.
    assert_eq!(value::<i64>(&mut client, REQUESTS), 300);
    // So do the reports, which a new database has when it asks for them.
    for report in ["hourly_usage", "daily_usage", "hourly_usage_by_end_user"] {
        let requests = format!("SELECT sum(requests)::bigint FROM litellm_spend.{report}");
        assert_eq!(value::<i64>(&mut client, &requests), 300, "{report}");
    }
    assert_eq!(
        value::<i64>(&mut client, "SELECT count(*) FROM spend_rollup_status WHERE kind = 'built-in'"),
        8
    );
    assert!(holds(
        &mut client,
        r#"SELECT relation = '"LiteLLM_SpendLogs"'::regclass AND owner = 'litellm'::regrole AND retention = '90 days'
           FROM litellm_spend.policy"#
    ));
    client.batch_execute("SELECT spend_detach()").unwrap();
}

#[test]
fn without_a_call_the_worker_brings_it_over() {
    let (_db, mut client) = of_0_1_0(true);
    client.batch_execute(&insert_rows("old", 50, 5)).unwrap();
    client.batch_execute("ALTER EXTENSION litellm_spend UPDATE").unwrap();
    eventually("the functions belong to the table's owner", || {
        holds(
            &mut client,
            "SELECT bool_and(proowner = 'litellm'::regrole) FROM pg_proc
             WHERE pronamespace = 'litellm_spend'::regnamespace AND proname LIKE 'capture\\_%'",
        )
    });
    client.batch_execute(&insert_rows("new", 50, 5)).unwrap();
    wait_until_live(&mut client);
    assert_exact(&mut client);
}

/// All that belongs to the extension, by owner.
const OWNERS: &str = "
    SELECT string_agg(DISTINCT o.owner::regrole::text, ' ')
    FROM pg_depend d CROSS JOIN LATERAL (
        SELECT relowner FROM pg_class WHERE d.classid = 'pg_class'::regclass AND oid = d.objid
        UNION ALL SELECT proowner FROM pg_proc WHERE d.classid = 'pg_proc'::regclass AND oid = d.objid) AS o(owner)
    WHERE d.deptype = 'e' AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'litellm_spend')";

#[test]
fn another_superuser_may_update() {
    shared()
        .connect("postgres")
        .batch_execute(
            "DROP ROLE IF EXISTS dba_u, person_u; CREATE ROLE dba_u SUPERUSER LOGIN;
             CREATE ROLE person_u LOGIN IN ROLE dba_u",
        )
        .unwrap();
    // Who is no superuser by itself may not become the extension's owner.
    for (user, set_role, owners) in
        [("dba_u", "SET ROLE NONE", "postgres"), ("person_u", "SET ROLE dba_u", "dba_u postgres")]
    {
        let (db, mut client) = of_0_1_0(true);
        client.batch_execute(&insert_rows("old", 50, 5)).unwrap();
        let mut updater = db.cluster.connect_as(&db.name, user);
        updater.batch_execute(&format!("{set_role}; BEGIN; ALTER EXTENSION litellm_spend UPDATE")).unwrap();
        assert_eq!(value::<String>(&mut updater, "SELECT current_user::text"), "dba_u", "{user}");
        updater.batch_execute("COMMIT").unwrap();
        assert_eq!(value::<String>(&mut client, OWNERS), owners, "{user}");
        client.batch_execute(&insert_rows("new", 50, 5)).unwrap();
        wait_until_live(&mut client);
        wait_until_merged(&mut client);
        assert_exact(&mut client);
        client
            .batch_execute(
                "CREATE TABLE ev (id bigserial PRIMARY KEY, kind int);
                 SELECT spend_rollup_create('by_kind', 'ev', '{kind}', '{count(*) AS n}');
                 SELECT spend_rollup_drop('by_kind');
                 SELECT spend_restored(); SELECT spend_detach(drop_history => true);
                 DROP EXTENSION litellm_spend",
            )
            .unwrap();
    }
    shared().connect("postgres").batch_execute("DROP ROLE person_u, dba_u").unwrap();
}

#[test]
fn an_update_waits_for_nobody_longer_than_readers_of_the_views_can_wait_for_it() {
    let (db, mut client) = of_0_1_0(true);
    let mut holder = db.connect();
    for reads in [r#"TABLE "MonthlyGlobalSpend""#, "TABLE litellm_spend.coverage"] {
        holder.batch_execute(&format!("BEGIN; {reads}")).unwrap();
        let begun = std::time::Instant::now();
        let refused = error(&mut client, "ALTER EXTENSION litellm_spend UPDATE");
        assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
        assert_eq!(refused.code().code(), "55P03", "{reads}: {refused:?}");
        let pid: i32 = value(&mut holder, "SELECT pg_backend_pid()");
        assert_eq!(refused.detail(), Some(format!("It is used by process {pid} (postgres).").as_str()));
        assert_eq!(refused.hint(), Some("Nothing was changed. Update again when that has ended."));
        holder.batch_execute("ROLLBACK").unwrap();
    }
    // It has everything that it needs at once: who comes then waits for the end, and nobody in between.
    client
        .batch_execute(
            "SET lock_timeout = '1min'; BEGIN; ALTER EXTENSION litellm_spend UPDATE;
             DO $$ BEGIN ASSERT current_setting('lock_timeout') = '1min'; END $$; COMMIT",
        )
        .unwrap();
    wait_until_live(&mut client);
}

/// A declared rollup as 0.1.0 made it: sums of floating-point columns are cast.
const DECLARED: &str = r#"
    SET ROLE litellm;
    CREATE TABLE charges (id bigserial, kind text NOT NULL, price double precision, weight real);
    RESET ROLE;
    CREATE TABLE litellm_spend.by_kind_rollup (kind text NOT NULL, n bigint, price numeric, weight_sum numeric,
        weight_count bigint, PRIMARY KEY (kind));
    GRANT USAGE ON SCHEMA litellm_spend TO litellm;
    GRANT SELECT (name, watermark) ON litellm_spend.rollup TO litellm;
    CREATE VIEW litellm_spend.by_kind AS
        SELECT kind, n, price::double precision AS price, (weight_sum / nullif(weight_count, 0))::real AS weight
        FROM (SELECT kind, sum(n)::bigint AS n, sum(price) AS price, sum(weight_sum) AS weight_sum,
                     sum(weight_count)::bigint AS weight_count
              FROM (TABLE litellm_spend.by_kind_rollup
                    UNION ALL SELECT kind, 1, price::numeric, weight::numeric, 1 FROM public.charges
                    WHERE id > (SELECT watermark FROM litellm_spend.rollup WHERE name = 'by_kind')) AS rows
              GROUP BY kind) AS live;
    ALTER TABLE litellm_spend.by_kind_rollup OWNER TO litellm;
    ALTER VIEW litellm_spend.by_kind OWNER TO litellm;
    INSERT INTO litellm_spend.source (name, relation, sequence) VALUES ('public.charges', 'public.charges', 'public.charges_id_seq');
    INSERT INTO litellm_spend.rollup (name, source, covered_from, definition) VALUES ('by_kind', 'public.charges', '-infinity', '{
        "key": "Dimensions", "name": "by_kind", "bucket": null, "source": "\"public\".\"charges\"", "source_sequence": "id",
        "presence": "n",
        "dimensions": [{"name": "kind", "type": "text", "collation": null, "expression": "kind", "nullable": false}],
        "measures": [
            {"name": "n", "type": "bigint", "expression": "1", "combine": "Sum", "empty": "0"},
            {"name": "price", "type": "numeric", "expression": "(price)::numeric", "combine": "Sum", "empty": null},
            {"name": "weight_sum", "type": "numeric", "expression": "(weight)::numeric", "combine": "Sum", "empty": null},
            {"name": "weight_count", "type": "bigint", "expression": "1", "combine": "Sum", "empty": "0"}],
        "outputs": [
            {"name": "n", "type": "bigint", "expression": "\"n\""},
            {"name": "price", "type": "double precision", "expression": "\"price\"::double precision"},
            {"name": "weight", "type": "real", "expression": "(\"weight_sum\" / nullif(\"weight_count\", 0))::real"}]}')"#;

#[test]
fn a_live_view_that_failed_on_sums_beyond_their_type_is_made_anew() {
    let (_db, mut client) = of_0_1_0(false);
    client.batch_execute(DECLARED).unwrap();
    // A view over it stays over it, and whoever may read it may go on.
    client
        .batch_execute(
            "CREATE ROLE analyst; GRANT SELECT ON litellm_spend.by_kind TO analyst;
             CREATE VIEW dear AS SELECT kind FROM litellm_spend.by_kind WHERE price > 1;
             INSERT INTO charges (kind, price, weight) VALUES ('usual', 0.5, 0.25), ('usual', 2, 0.5)",
        )
        .unwrap();
    let shown = |client: &mut Client, kind: &str| -> String {
        let sql = format!(
            "SELECT (v.n, v.price, v.weight)::text FROM litellm_spend.by_kind v WHERE kind = '{kind}'"
        );
        value(client, &sql)
    };
    assert_eq!(shown(&mut client, "usual"), "(2,2.5,0.375)");
    let huge = "INSERT INTO charges (kind, price) SELECT 'huge', 1e308 FROM generate_series(1, 3)";
    client.batch_execute(huge).unwrap();
    assert_eq!(error(&mut client, "TABLE litellm_spend.by_kind").code().code(), "22003", "as it was");

    client.batch_execute("ALTER EXTENSION litellm_spend UPDATE").unwrap();
    eventually("the view is made anew", || {
        holds(&mut client, "SELECT pg_get_viewdef('litellm_spend.by_kind') LIKE '%Infinity%'")
    });
    wait_until_merged(&mut client);
    for kind in ["usual", "huge"] {
        let (expected, raw) = match kind {
            "usual" => ("(2,2.5,0.375)", "(SELECT sum(price) FROM charges WHERE kind = 'usual')"),
            _ => ("(3,Infinity,)", "'Infinity'"),
        };
        assert_eq!(shown(&mut client, kind), expected);
        let same = format!("SELECT price = {raw}::float8 FROM litellm_spend.by_kind WHERE kind = '{kind}'");
        assert!(holds(&mut client, &same), "{kind}");
    }
    assert!(holds(
        &mut client,
        "SELECT relowner = 'litellm'::regrole AND has_table_privilege('analyst', oid, 'SELECT')
             AND (SELECT count(*) FROM dear) = 2
         FROM pg_class WHERE oid = 'litellm_spend.by_kind'::regclass"
    ));
    assert_verified(&mut client);
    // It is no stray any more.
    assert!(holds(
        &mut client,
        "SELECT last_error IS NULL FROM spend_rollup_status WHERE rollup = 'by_kind'"
    ));
    let xmin = "SELECT xmin::text FROM pg_class WHERE oid = 'litellm_spend.by_kind'::regclass";
    let before: String = value(&mut client, xmin);
    wait_for_a_round(&mut client);
    assert_eq!(value::<String>(&mut client, xmin), before);
    client.batch_execute("DROP OWNED BY analyst; DROP ROLE analyst").unwrap();
}

#[test]
fn so_is_that_of_a_rollup_whose_source_was_dropped_before() {
    let (_db, mut client) = of_0_1_0(false);
    client.batch_execute(DECLARED).unwrap();
    // As 0.1.0 leaves one that has merged three charges.
    client
        .batch_execute(
            "INSERT INTO litellm_spend.by_kind_rollup VALUES ('huge', 3, '3e308', 1, 2); DROP TABLE charges CASCADE;
             UPDATE litellm_spend.rollup SET source = NULL; DELETE FROM litellm_spend.source;
             CREATE VIEW litellm_spend.by_kind AS
                 SELECT kind, n, price::double precision AS price, (weight_sum / nullif(weight_count, 0))::real AS weight
                 FROM litellm_spend.by_kind_rollup;
             ALTER VIEW litellm_spend.by_kind OWNER TO litellm",
        )
        .unwrap();
    assert_eq!(error(&mut client, "TABLE litellm_spend.by_kind").code().code(), "22003", "as it was");
    client.batch_execute("ALTER EXTENSION litellm_spend UPDATE").unwrap();
    let shown =
        "SELECT count(*) = 1 AND bool_and(price = 'Infinity' AND weight = 0.5) FROM litellm_spend.by_kind";
    eventually("it is made anew", || client.query(shown, &[]).is_ok_and(|rows| rows[0].get(0)));
    // Once.
    let xmin = "SELECT xmin::text FROM pg_class WHERE oid = 'litellm_spend.by_kind'::regclass";
    let before: String = value(&mut client, xmin);
    wait_for_a_round(&mut client);
    assert_eq!(value::<String>(&mut client, xmin), before);
    client.batch_execute("SELECT spend_rollup_drop('by_kind')").unwrap();
}

/// All that belongs to the extension, as the catalogs describe it.
const MEMBERS: &str = "
    WITH member AS (
        SELECT d.classid, d.objid FROM pg_depend d
        WHERE d.deptype = 'e' AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'litellm_spend'))
    SELECT pg_describe_object(classid, objid, 0) || ': ' || coalesce(obj_description(objid, classid::regclass::text), '') AS text
    FROM member
    UNION ALL
    SELECT format('%s.%s %s %s %s', c.oid::regclass, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
                  pg_get_expr(d.adbin, d.adrelid))
    FROM member JOIN pg_class c ON c.oid = objid JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
    LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum WHERE NOT a.attisdropped
    UNION ALL
    SELECT format('%s %s: %s', conrelid::regclass, conname, pg_get_constraintdef(k.oid)) FROM member JOIN pg_constraint k ON conrelid = objid
    UNION ALL
    SELECT format('%s: %s %s', c.oid::regclass, pg_get_viewdef(c.oid), c.relacl) FROM member JOIN pg_class c ON c.oid = objid
    WHERE c.relkind = 'v'
    UNION ALL
    SELECT format('%s: %s %s %s %s %s', p.oid::regprocedure, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid), p.prosrc,
                  p.proconfig, p.proacl)
        || format(' %s %s %s %s', p.proowner::regrole, p.provolatile, p.proisstrict, p.proparallel)
    FROM member JOIN pg_proc p ON p.oid = objid
    UNION ALL
    SELECT format('%s belongs to %s', c.oid::regclass, c.relowner::regrole) FROM member JOIN pg_class c ON c.oid = objid
    UNION ALL
    SELECT format('%s was granted %s', pg_describe_object(classid, objid, i.objsubid), i.initprivs)
    FROM member JOIN pg_init_privs i ON i.classoid = classid AND i.objoid = objid
    UNION ALL
    SELECT format('dumped: %s %s', c.oid::regclass, c.condition)
    FROM pg_extension, unnest(extconfig, extcondition) AS c(oid, condition) WHERE extname = 'litellm_spend'
    ORDER BY 1";

/// All that belongs to the extension is there as in a new database.
fn assert_like_a_new_one(client: &mut Client) {
    let new = shared().database();
    let members = |client: &mut Client| -> Vec<String> {
        client.query(MEMBERS, &[]).unwrap().iter().map(|row| row.get(0)).collect()
    };
    let (old, new) = (members(client), members(&mut new.connect()));
    assert!(new.len() > 150, "{} members", new.len());
    for (old, new) in old.iter().zip(&new) {
        assert_eq!(old, new);
    }
    assert_eq!(old.len(), new.len());
}

#[test]
fn an_updated_database_is_like_a_new_one() {
    let (_old, mut old) = of_0_1_0(false);
    old.batch_execute("ALTER EXTENSION litellm_spend UPDATE").unwrap();
    assert_like_a_new_one(&mut old);
}

/// A dump of a database with standard_conforming_strings off is restored with it off.
#[test]
fn what_a_session_has_set_decides_nothing_about_what_it_installs() {
    let mut admin = shared().connect("postgres");
    admin.batch_execute("SET allow_in_place_tablespaces = on").unwrap();
    admin.batch_execute("CREATE TABLESPACE elsewhere LOCATION ''").unwrap();
    for (before, install) in [
        ("", "CREATE EXTENSION litellm_spend"),
        ("CREATE EXTENSION litellm_spend VERSION '0.1.0'", "ALTER EXTENSION litellm_spend UPDATE"),
    ] {
        let db = shared().litellm_database();
        let mut client = db.connect();
        client
            .batch_execute(&format!(
                "CREATE ACCESS METHOD other TYPE TABLE HANDLER heap_tableam_handler;
                 SET standard_conforming_strings = off; SET escape_string_warning = off; {before};
                 BEGIN; SET default_tablespace = elsewhere; SET LOCAL default_table_access_method = other; {install}"
            ))
            .unwrap();
        // Its transaction goes on with what it has set.
        for (name, value_of) in
            [("default_tablespace", "elsewhere"), ("default_table_access_method", "other")]
        {
            assert_eq!(value::<String>(&mut client, &format!("SELECT current_setting('{name}')")), value_of);
        }
        client.batch_execute("COMMIT").unwrap();
        let mut client = db.connect();
        assert_like_a_new_one(&mut client);
        let odd = "SELECT string_agg(oid::regclass::text, ', ') FROM pg_class
                   WHERE relnamespace = 'litellm_spend'::regnamespace
                     AND (reltablespace <> 0 OR relkind = 'r' AND relam <> (SELECT oid FROM pg_am WHERE amname = 'heap'))";
        assert_eq!(value::<Option<String>>(&mut client, odd), None, "{install}");
        client
            .batch_execute(
                "SET ROLE litellm; CREATE TABLE logs (id bigint, at timestamp NOT NULL) PARTITION BY RANGE (at);
                 CREATE INDEX ON logs (at);
                 CREATE TABLE logs_old PARTITION OF logs FOR VALUES FROM ('2026-11-01') TO ('2026-11-02'); RESET ROLE;
                 SELECT spend_partition_set('logs', retention => '10 years')",
            )
            .unwrap();
        let range = "SELECT range_start || ' ' || range_end FROM spend_partition_status WHERE partition = 'logs_old'::regclass";
        assert_eq!(value::<String>(&mut client, range), "2026-11-01 00:00:00 2026-11-02 00:00:00");
        client.batch_execute("TABLE spend_health; TABLE spend_index_status; TABLE spend_progress").unwrap();
    }
    admin.batch_execute("DROP TABLESPACE elsewhere").unwrap();
}

#[test]
fn a_tablespace_that_is_not_there_stops_no_installation() {
    let cluster = own_cluster(&["default_tablespace = 'gone'"]);
    for install in [
        "CREATE EXTENSION litellm_spend",
        "CREATE EXTENSION litellm_spend VERSION '0.1.0'; ALTER EXTENSION litellm_spend UPDATE",
    ] {
        let db = cluster.litellm_database();
        let mut client = db.connect();
        assert_eq!(value::<String>(&mut client, "SELECT current_setting('default_tablespace')"), "gone");
        client.batch_execute(install).unwrap();
        client.batch_execute("TABLE spend_health").unwrap();
    }
}

/// A state table that somebody may write to makes him a superuser: the worker does what it says.
#[test]
fn an_update_takes_default_privileges_from_what_it_makes_and_writing_from_what_there_was() {
    let db = shared().litellm_database();
    let mut client = db.connect();
    client
        .batch_execute(
            "DROP ROLE IF EXISTS default_u, reader_u; CREATE ROLE default_u; CREATE ROLE reader_u;
             ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO default_u, PUBLIC;
             ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO default_u;
             ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO default_u;
             ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO default_u;
             CREATE EXTENSION litellm_spend VERSION '0.1.0';
             GRANT SELECT ON litellm_spend.source, spend_rollup_status TO reader_u;
             GRANT SELECT (name) ON litellm_spend.rollup TO reader_u; GRANT USAGE ON SCHEMA litellm_spend TO reader_u;
             ALTER EXTENSION litellm_spend UPDATE",
        )
        .unwrap();
    let granted = "SELECT coalesce(string_agg(DISTINCT o.name || ' ' || x.privilege_type, ', ' ORDER BY o.name || ' ' || x.privilege_type), '')
        FROM (SELECT oid, relname::text, relacl FROM pg_class
              UNION ALL SELECT oid, proname, coalesce(proacl, acldefault('f', proowner)) FROM pg_proc
              UNION ALL SELECT oid, nspname, nspacl FROM pg_namespace) AS o(oid, name, acl), aclexplode(o.acl) AS x
        WHERE EXISTS (SELECT FROM pg_depend d WHERE d.objid = o.oid AND d.deptype = 'e'
                      AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'litellm_spend'))
          AND x.grantee IN (0, 'default_u'::regrole) AND ";
    let writing = format!(
        "{granted} x.privilege_type NOT IN ('SELECT', 'EXECUTE') AND x.privilege_type || o.name <> 'USAGElitellm_spend'"
    );
    assert_eq!(value::<String>(&mut client, &writing), "");
    let new = format!(
        "{granted} o.name IN ('installation', 'policy', 'index_set', 'index_failure', 'party', 'spend_health', 'spend_restored', 'bound')"
    );
    assert_eq!(value::<String>(&mut client, &new), "");
    // What somebody was granted stays, and is dumped.
    assert!(holds(
        &mut client,
        "SELECT has_table_privilege('reader_u', 'litellm_spend.source', 'SELECT')
             AND has_column_privilege('reader_u', 'litellm_spend.rollup', 'name', 'SELECT')"
    ));
    let dumped = grants_in_a_dump(&db);
    for object in
        ["ON TABLE litellm_spend.source", "(name) ON TABLE litellm_spend.rollup", "ON SCHEMA litellm_spend"]
    {
        assert!(
            dumped.iter().any(|line| line.contains(object) && line.ends_with("TO reader_u;")),
            "{object}: {dumped:#?}"
        );
    }
    client.batch_execute("DROP OWNED BY default_u, reader_u; DROP ROLE default_u, reader_u").unwrap();
}

/// By it pg_dump 14 knows that PUBLIC was taken something.
#[test]
fn what_initdb_has_granted_on_the_schema_of_the_extension_stays_initdbs() {
    let update = "CREATE EXTENSION litellm_spend VERSION '0.1.0'; ALTER EXTENSION litellm_spend UPDATE";
    for make in ["CREATE EXTENSION litellm_spend", update] {
        let db = shared().litellm_database();
        let mut client = db.connect();
        client.batch_execute("REVOKE ALL ON SCHEMA public FROM PUBLIC").unwrap();
        let granted = "SELECT initprivs::text FROM pg_init_privs
                       WHERE classoid = 'pg_namespace'::regclass AND objoid = 'public'::regnamespace";
        let before: String = value(&mut client, granted);
        client.batch_execute(make).unwrap();
        assert!(holds(&mut client, "SELECT has_schema_privilege('pg_monitor', 'public', 'USAGE')"), "{make}");
        assert_eq!(value::<Option<String>>(&mut client, granted), Some(before), "{make}");
    }
}

/// What pg_dump says of privileges.
fn grants_in_a_dump(db: &Database) -> Vec<String> {
    let mut pg_dump = db.cluster.program("pg_dump");
    pg_dump.args(["-s", "-h", db.cluster.dir.to_str().unwrap(), "-p", &PORT.to_string(), "-U", "postgres"]);
    let text = String::from_utf8(pg_dump.arg(&db.name).output().unwrap().stdout).unwrap();
    text.lines().filter(|line| line.starts_with("GRANT ")).map(String::from).collect()
}

#[test]
fn who_may_call_may_call_afterwards_and_a_reversion_under_way_is_not_cut_off() {
    let (db, mut client) = of_0_1_0(true);
    client
        .batch_execute(
            r#"GRANT EXECUTE ON FUNCTION spend_partition_convert TO litellm;
               GRANT EXECUTE ON FUNCTION spend_partition_plan TO litellm WITH GRANT OPTION;
               INSERT INTO litellm_spend.conversion (table_schema, table_name, relation, direction, options)
               VALUES ('public', 'LiteLLM_SpendLogs', '"LiteLLM_SpendLogs"', 'revert', '{}')"#,
        )
        .unwrap();
    assert_refused(&mut client, "ALTER EXTENSION litellm_spend UPDATE", "55000");
    client
        .batch_execute("DELETE FROM litellm_spend.conversion; ALTER EXTENSION litellm_spend UPDATE")
        .unwrap();
    let may = "SELECT has_function_privilege('litellm', 'spend_partition_convert(regclass, text, \"any\", text, integer)', 'EXECUTE')";
    assert!(holds(&mut client, may));
    let may_grant = "SELECT has_function_privilege('litellm', 'spend_partition_plan(regclass, text, \"any\", text, integer)',
                         'EXECUTE WITH GRANT OPTION')";
    assert!(holds(&mut client, may_grant));
    // It is the user's grant still, and dumped.
    let granted = grants_in_a_dump(&db);
    assert!(
        granted.iter().any(|line| line.contains("spend_partition_convert") && line.ends_with("TO litellm;")),
        "{granted:?}"
    );
}

#[test]
fn until_the_update_calls_and_the_worker_say_that_it_is_missing() {
    let (db, mut client) = of_0_1_0(true);
    let version = env!("CARGO_PKG_VERSION");
    let hint = "ALTER EXTENSION litellm_spend UPDATE;";
    // It has another argument now.
    let attach = error(&mut client, "SELECT spend_attach()");
    assert_eq!(attach.hint(), Some(format!("The library was replaced: {hint}").as_str()), "{attach:?}");
    for call in [
        "SELECT spend_detach()",
        "CALL spend_backfill()",
        "SELECT * FROM spend_rollup_run()",
        "SELECT * FROM spend_rollup_status",
        "SELECT * FROM spend_rollup_verify('daily_spend')",
        "SELECT spend_partition_maintain()",
        "SELECT spend_partition_plan()",
    ] {
        let error = error(&mut client, call);
        assert_eq!(error.code().code(), "55000", "{call}: {error:?}");
        assert_eq!(
            error.message(),
            format!("extension \"litellm_spend\" is at version 0.1.0, and its library at {version}")
        );
        assert_eq!(
            error.detail(),
            Some("The library was replaced; what this database has is still the old version's.")
        );
        assert_eq!(error.hint(), Some(hint));
    }
    // LiteLLM's writers and reports go on.
    client.batch_execute("SELECT * FROM \"MonthlyGlobalSpend\"").unwrap();
    client.batch_execute(&insert_rows("old", 10, 3)).unwrap();
    let at =
        "SELECT query = 'litellm_spend: waits for ALTER EXTENSION litellm_spend UPDATE' FROM pg_stat_activity
              WHERE backend_type = 'litellm_spend worker' AND datname = current_database()";
    eventually("the worker says so", || client.query(at, &[]).unwrap().first().is_some_and(|row| row.get(0)));
    let said: Vec<String> =
        db.cluster.log().lines().filter(|l| l.contains(&db.name)).map(String::from).collect();
    let about = format!("litellm_spend in database \"{}\": ", db.name);
    let said: Vec<&str> =
        said.iter().filter_map(|line| line.split_once(&about)).map(|(_, text)| text).collect();
    assert!(said.iter().any(|line| line.contains("is at version 0.1.0")), "{said:#?}");
    assert!(!said.iter().any(|line| line.contains("does not exist")), "{said:#?}");
    client.batch_execute("ALTER EXTENSION litellm_spend UPDATE").unwrap();
    eventually("the worker brings the rest over", || {
        holds(&mut client, "SELECT has_table_privilege('litellm', 'litellm_spend.retired', 'SELECT')")
    });
    wait_until_live(&mut client);
    assert_exact(&mut client);
}

#[test]
fn a_server_that_pg_upgrade_brings_over_goes_on_and_nothing_of_ours_runs_meanwhile() {
    not_at_midnight();
    let old = own_cluster(&[]);
    let db = std::mem::ManuallyDrop::new(old.litellm_database().with_rows("old", 200, 10));
    // pg_upgrade gives the extension to the role that runs it, and leaves what belongs to it.
    old.connect("postgres").batch_execute("CREATE ROLE dba SUPERUSER LOGIN").unwrap();
    let mut client = old.connect_as(&db.name, "dba");
    client.batch_execute("CREATE EXTENSION litellm_spend; SELECT spend_attach()").unwrap();
    wait_until_live(&mut client);
    client
        .batch_execute(
            "CREATE TABLE ev (id bigserial PRIMARY KEY, kind int);
             SELECT spend_rollup_create('by_kind', 'ev', '{kind}', '{count(*) AS n}');
             CREATE TABLE logs (id bigint, at timestamp NOT NULL) PARTITION BY RANGE (at);
             SELECT spend_partition_set('logs', precreate => 3);
             INSERT INTO ev (kind) SELECT i % 3 FROM generate_series(1, 300) AS i",
        )
        .unwrap();
    eventually("partitions are made", || {
        holds(&mut client, "SELECT count(*) = 4 FROM spend_partition_status WHERE NOT is_default")
    });
    wait_until_merged(&mut client);
    // There is something to merge, and a partition to make.
    let newest = "SELECT format('DROP TABLE %s', max(i.inhrelid::regclass::text)) FROM pg_inherits i
                  WHERE i.inhparent = 'logs'::regclass";
    let drop_newest: String = value(&mut client, newest);
    let due = "UPDATE litellm_spend.policy SET maintained_at = NULL";
    client.batch_execute(&format!("BEGIN; {drop_newest}; {due}; {}", insert_rows("tail", 20, 3))).unwrap();
    let total = r#"SELECT sum(spend)::text FROM "MonthlyGlobalSpend""#;
    let (expected, kinds) =
        (value::<String>(&mut client, total), "SELECT sum(n)::text FROM litellm_spend.by_kind");
    client.batch_execute("COMMIT").unwrap();
    drop(client);

    let (new, logged) = old.upgraded();
    assert!(logged.contains("database system is ready"), "{logged}");
    assert!(!logged.contains("litellm_spend launcher"), "{logged}");
    let mut client = new.connect(&db.name);
    assert!(holds(&mut client, "SELECT bool_and(extowner = 'postgres'::regrole) FROM pg_extension"));
    assert_eq!(value::<String>(&mut client, OWNERS), "dba");
    assert_eq!(value::<String>(&mut client, total), expected);
    assert_eq!(value::<String>(&mut client, kinds), "300");
    client.batch_execute(&insert_rows("new", 20, 3)).unwrap();
    client.batch_execute("INSERT INTO ev (kind) VALUES (1)").unwrap();
    wait_until_merged(&mut client);
    eventually("the partition is made", || {
        holds(&mut client, "SELECT count(*) = 4 FROM spend_partition_status WHERE NOT is_default")
    });
    assert_exact(&mut client);
    assert_verified(&mut client);
    assert_eq!(value::<String>(&mut client, kinds), "301");
}

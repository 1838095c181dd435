//! A dump is restored beside the worker, by every mode of the tools, ends without an error, and everything is
//! exact: nothing is counted twice, nothing is lost, and work goes on by itself once the restore is over.

mod common;

use common::*;
use postgres::Client;
use std::process::Stdio;

/// A database with all that is dumped: attached, with history that only the rollups know, a tail that is not
/// merged, a declared rollup with a tail, one that is filled by hand, and a table with a policy.
fn original() -> (Database, Client) {
    not_at_midnight();
    let db = shared().litellm_database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE EXTENSION litellm_spend;
             CREATE TABLE ev (gone int, id bigserial, kind int);
             ALTER TABLE ev DROP gone;
             CREATE TABLE byhand (id bigserial PRIMARY KEY, kind int);
             CREATE TABLE logs (id bigint, at timestamp NOT NULL) PARTITION BY RANGE (at);
             CREATE INDEX ON logs (at);
             CREATE TABLE logs_default PARTITION OF logs DEFAULT",
        )
        .unwrap();
    client.batch_execute(&insert_rows("old", 2000, 40)).unwrap();
    client.batch_execute("SELECT spend_attach(reports => true)").unwrap();
    wait_until_live(&mut client);
    client
        .batch_execute(
            r#"DELETE FROM "LiteLLM_SpendLogs" WHERE "startTime" < CURRENT_DATE - 33;
               SELECT spend_rollup_create('by_kind', 'ev', '{kind}', '{count(*) AS n}');
               SELECT spend_rollup_register('hand', 'byhand');
               SELECT spend_index_set(indexes => '{team}');
               SELECT spend_partition_set('logs', precreate => 3)"#,
        )
        .unwrap();
    client.batch_execute("INSERT INTO ev (kind) SELECT i % 3 FROM generate_series(1, 300) AS i").unwrap();
    wait_until_merged(&mut client);
    eventually("its index is built", || {
        holds(&mut client, "SELECT bool_and(state = 'built') FROM spend_index_status")
    });
    eventually("partitions are made", || {
        holds(&mut client, "SELECT count(*) = 4 FROM spend_partition_status WHERE NOT is_default")
    });
    // These writers stay open, so that what comes after them is a tail.
    let mut open = db.connect();
    open.batch_execute(
        r#"BEGIN; LOCK TABLE "LiteLLM_SpendLogs", litellm_spend.change_log, ev, byhand IN ROW EXCLUSIVE MODE"#,
    )
    .unwrap();
    client.batch_execute(&insert_rows("tail", 50, 3)).unwrap();
    client.batch_execute("INSERT INTO ev (kind) SELECT i % 3 FROM generate_series(1, 30) AS i").unwrap();
    client.batch_execute("INSERT INTO byhand (kind) SELECT i FROM generate_series(1, 30) AS i").unwrap();
    assert!(holds(
        &mut client,
        "SELECT tail_rows = 50 FROM spend_rollup_status WHERE rollup = 'daily_spend'"
    ));
    (db, open)
}

const TOTALS: &str = r#"
    SELECT (SELECT string_agg(d::text, ' ' ORDER BY d.date) FROM litellm_spend.daily_spend AS d) || ' / '
        || (SELECT count(*) || ' ' || sum(requests) || ' ' || sum(spend) FROM litellm_spend.hourly_usage) || ' / '
        || (SELECT string_agg(k::text, ' ' ORDER BY kind) FROM litellm_spend.by_kind AS k) || ' / '
        || (SELECT string_agg(v::text, ' ' ORDER BY date) FROM "MonthlyGlobalSpend" AS v)"#;

/// Waits until the worker of a database, if it has one, has looked at everything since now.
fn let_the_worker_look(database: &str) {
    let mut admin = shared().connect("postgres");
    eventually("a worker comes", || {
        holds(
            &mut admin,
            &format!(
                "SELECT count(*) = 1 FROM pg_stat_activity
                 WHERE datname = '{database}' AND backend_type = 'litellm_spend worker' AND state = 'idle'"
            ),
        )
    });
    // It looks at the captured table every 0.9 s.
    let start: std::time::SystemTime = value(&mut admin, "SELECT clock_timestamp()");
    let looked = "SELECT state_change > $1::timestamptz + interval '2 s' FROM pg_stat_activity
                  WHERE datname = $2 AND backend_type = 'litellm_spend worker'";
    eventually("the worker looks", || {
        admin.query(looked, &[&start, &database]).unwrap().iter().any(|row| row.get(0))
    });
}

/// Runs a program of the server's on the shared cluster; it must not complain of anything.
fn run(name: &str, args: &[&str]) {
    let output = shared()
        .program(name)
        .args(["-h", shared().dir.to_str().unwrap(), "-p", &PORT.to_string(), "-U", "postgres"])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && complaints.is_empty(), "{name} {args:?}: {complaints}");
}

/// An empty database for a restore.
fn target(name: &str) -> String {
    let name = format!("restored_{name}");
    shared().connect("postgres").batch_execute(&format!("CREATE DATABASE {name} OWNER litellm")).unwrap();
    name
}

fn wait_until_restored(client: &mut Client) {
    eventually("the end of the restore is seen", || {
        holds(client, "SELECT bool_and(last_error IS NULL) FROM spend_rollup_status")
    });
}

/// All is as it was, work goes on by itself, and stays exact.
fn check(database: &str, totals: &str) {
    let mut client = shared().connect(database);
    assert_eq!(value::<String>(&mut client, TOTALS), totals, "{database}");
    wait_until_restored(&mut client);
    client.batch_execute("SET ROLE litellm").unwrap();
    client.batch_execute(&insert_rows("after", 20, 3)).unwrap();
    client.batch_execute("RESET ROLE; INSERT INTO ev (kind) SELECT 1 FROM generate_series(1, 10)").unwrap();
    eventually("what came with the dump and what came after it is merged", || {
        holds(&mut client, "SELECT bool_and(tail_rows = 0) FROM spend_rollup_status WHERE kind <> 'by hand'")
    });
    assert_exact(&mut client);
    assert_eq!(capture_errors(&mut client), 0, "{database}");
    // What expired before the dump is history still.
    assert!(holds(
        &mut client,
        r#"SELECT (SELECT sum(requests) FROM litellm_spend.daily_spend) = 2070
                  AND (SELECT count(*) FROM "LiteLLM_SpendLogs") < 2070
                  AND (SELECT sum(n) FROM litellm_spend.by_kind) = 340"#
    ));
    // The index came with its table, and is looked after.
    let index =
        "SELECT count(*) = 1 AND bool_and(state = 'built' AND name IS NOT NULL) FROM spend_index_status";
    assert!(holds(&mut client, index), "{database}");
    let window = client.query_one("SELECT * FROM spend_rollup_window('hand')", &[]).unwrap();
    assert_eq!((window.get::<_, i64>(0), window.get::<_, i64>(1)), (1, 30), "{database}");
    assert!(holds(
        &mut client,
        "SELECT count(*) = 4 AND bool_and(last_error IS NULL) FROM spend_partition_status WHERE NOT is_default"
    ));
    drop(client);
    shared().connect("postgres").batch_execute(&format!("DROP DATABASE {database} WITH (FORCE)")).unwrap();
}

fn dump(db: &Database, format: &str) -> String {
    let file = shared().dir.join(format!("{}.{format}", db.name)).to_str().unwrap().to_string();
    run("pg_dump", &["-F", format, "-f", &file, &db.name]);
    file
}

#[test]
fn every_mode_of_the_tools_restores_beside_the_worker() {
    let (db, _open) = original();
    let totals: String = value(&mut db.connect(), TOTALS);
    let (script, custom, directory) = (dump(&db, "p"), dump(&db, "c"), dump(&db, "d"));
    let modes: [(&str, &str, Vec<&str>); 6] = [
        ("script", "psql", vec!["-qXo", "/dev/null", "-v", "ON_ERROR_STOP=1", "-f", &script, "-d"]),
        ("script_at_once", "psql", vec!["-1qXo", "/dev/null", "-v", "ON_ERROR_STOP=1", "-f", &script, "-d"]),
        ("custom", "pg_restore", vec![&custom, "-d"]),
        ("custom_at_once", "pg_restore", vec!["-1", &custom, "-d"]),
        ("parallel", "pg_restore", vec!["-j", "2", &custom, "-d"]),
        ("parallel_directory", "pg_restore", vec!["-j", "4", &directory, "-d"]),
    ];
    for (name, program, mut args) in modes {
        let database = target(name);
        args.push(&database);
        run(program, &args);
        check(&database, &totals);
    }
}

#[test]
fn litellm_s_own_role_may_dump_with_pg_read_all_data_and_is_told_so() {
    let db = shared().database().attached();
    db.connect().batch_execute(&insert_rows("a", 100, 5)).unwrap();
    // Not litellm itself: a role is all tests'.
    let mut admin = db.connect();
    admin.batch_execute("DROP ROLE IF EXISTS dumper_d; CREATE ROLE dumper_d LOGIN IN ROLE litellm").unwrap();
    let file = shared().dir.join("dumper.c").to_str().unwrap().to_string();
    let dump = || {
        let mut pg_dump = shared().program("pg_dump");
        pg_dump.args(["-h", shared().dir.to_str().unwrap(), "-p", &PORT.to_string(), "-U", "dumper_d"]);
        let output = pg_dump.args(["-Fc", "-f", &file, &db.name]).output().unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let complaints = dump();
    for said in [
        "permission denied for sequence capture_failures",
        "Who dumps reads all state. A superuser lets it: GRANT pg_read_all_data TO dumper_d;",
    ] {
        assert!(complaints.contains(said), "{complaints}");
    }
    admin.batch_execute("GRANT pg_read_all_data TO dumper_d").unwrap();
    assert_eq!(dump(), "");
    admin.batch_execute("DROP ROLE dumper_d").unwrap();
    let database = target("dumper");
    run("pg_restore", &["-d", &database, &file]);
    let mut client = shared().connect(&database);
    wait_until_restored(&mut client);
    wait_until_merged(&mut client);
    assert!(holds(&mut client, "SELECT sum(requests) = 100 FROM litellm_spend.daily_spend"));
    assert_exact(&mut client);
    drop(client);
    shared().connect("postgres").batch_execute(&format!("DROP DATABASE {database} WITH (FORCE)")).unwrap();
}

#[test]
fn another_superuser_restores_what_one_has_made() {
    let db = shared().litellm_database().with_rows("a", 100, 5);
    let mut admin = db.connect();
    admin.batch_execute("DROP ROLE IF EXISTS dba_r; CREATE ROLE dba_r SUPERUSER LOGIN").unwrap();
    let mut dba = shared().connect_as(&db.name, "dba_r");
    dba.batch_execute(
        "CREATE EXTENSION litellm_spend; SELECT spend_attach(reports => true);
         CREATE TABLE ev (id bigserial PRIMARY KEY, kind int);
         SELECT spend_rollup_create('by_kind', 'ev', '{kind}', '{count(*) AS n}'); INSERT INTO ev (kind) VALUES (1)",
    )
    .unwrap();
    wait_until_live(&mut dba);
    wait_until_merged(&mut dba);
    let (file, database) = (dump(&db, "c"), target("by_another"));
    run("pg_restore", &["-d", &database, &file]);
    let mut client = shared().connect(&database);
    assert!(holds(
        &mut client,
        "SELECT relowner = 'dba_r'::regrole AND extowner = 'postgres'::regrole FROM pg_class, pg_extension
         WHERE pg_class.oid = 'litellm_spend.change_log'::regclass AND extname = 'litellm_spend'"
    ));
    wait_until_restored(&mut client);
    client.batch_execute(&insert_rows("after", 20, 3)).unwrap();
    client.batch_execute("INSERT INTO ev (kind) VALUES (1)").unwrap();
    wait_until_merged(&mut client);
    wait_until_live(&mut client);
    assert_exact(&mut client);
    assert!(holds(&mut client, "SELECT sum(n) = 2 FROM litellm_spend.by_kind"));
    // Each by itself: an autovacuum of a rollup would wait for what the attach has changed in the catalog.
    for sql in [
        r#"DELETE FROM "LiteLLM_SpendLogs""#,
        "SELECT spend_attach()",
        "SELECT spend_rollup_drop('by_kind')",
        "SELECT spend_rollup_drop('hourly_usage')",
        "SELECT spend_detach(drop_history => true)",
        "DROP EXTENSION litellm_spend",
    ] {
        client.batch_execute(sql).unwrap();
    }
    drop(client);
    admin.batch_execute(&format!("DROP DATABASE {database} WITH (FORCE)")).unwrap();
    // It may drop its own.
    dba.batch_execute(
        "SELECT spend_rollup_drop('by_kind'); SELECT spend_detach(drop_history => true); DROP EXTENSION litellm_spend;
         DROP TABLE ev",
    )
    .unwrap();
    drop(dba);
    admin.batch_execute("DROP ROLE dba_r").unwrap();
}

#[test]
fn a_restore_without_privileges_is_captured() {
    let db = shared().database().attached();
    db.connect().batch_execute(&insert_rows("a", 100, 5)).unwrap();
    let (file, database) = (dump(&db, "c"), target("without_privileges"));
    run("pg_restore", &["-x", "-d", &database, &file]);
    let mut client = shared().connect(&database);
    client.batch_execute(&insert_rows("b", 20, 3)).unwrap();
    wait_until_restored(&mut client);
    eventually("all is counted", || value::<Option<i64>>(&mut client, REQUESTS) == Some(120));
    wait_until_live(&mut client);
    assert_exact(&mut client);
    drop(client);
    shared().connect("postgres").batch_execute(&format!("DROP DATABASE {database} WITH (FORCE)")).unwrap();
}

#[test]
fn who_may_use_a_schema_of_a_users_may_after_a_restore() {
    let db = shared().litellm_database();
    let mut client = db.connect();
    client
        .batch_execute(
            "DROP ROLE IF EXISTS app_s; CREATE ROLE app_s; CREATE SCHEMA spend; GRANT USAGE ON SCHEMA spend TO app_s;
             CREATE EXTENSION litellm_spend SCHEMA spend",
        )
        .unwrap();
    let (file, database) = (dump(&db, "c"), target("schema"));
    run("pg_restore", &["-d", &database, &file]);
    let mut restored = shared().connect(&database);
    for role in ["app_s", "pg_monitor"] {
        let may = format!("SELECT has_schema_privilege('{role}', 'spend', 'USAGE')");
        assert!(holds(&mut client, &may) && holds(&mut restored, &may), "{role}");
    }
    drop(restored);
    client.batch_execute(&format!("DROP DATABASE {database} WITH (FORCE)")).unwrap();
    client.batch_execute("DROP OWNED BY app_s; DROP ROLE app_s").unwrap();
}

/// Without a worker nobody has forgotten it. As a number it could be another table's in the new database.
#[test]
fn state_of_a_table_that_is_gone_is_not_dumped() {
    let (db, mut client) = without_worker();
    let table = |name: &str| {
        format!(
            "CREATE TABLE {name} (id bigserial, at timestamp NOT NULL) PARTITION BY RANGE (at);
             SELECT spend_partition_set('{name}', retention => '30 days');"
        )
    };
    let rollup = |name: &str| {
        format!(
            "SELECT spend_rollup_create('of_{name}', '{name}', '{{at}}', '{{count(*) AS n}}');
             INSERT INTO litellm_spend.conversion (table_schema, table_name, relation, direction, options, owner, origin)
             SELECT 'public', '{name}', '{name}', 'convert', '{{}}', 'postgres', id FROM litellm_spend.installation;"
        )
    };
    client.batch_execute(&(table("stays") + &table("goes") + &rollup("stays") + &rollup("goes"))).unwrap();
    client.batch_execute("DROP TABLE goes CASCADE").unwrap();
    let tables = ["policy", "conversion", "source"];
    for table in tables {
        assert_eq!(value::<i64>(&mut client, &format!("SELECT count(*) FROM litellm_spend.{table}")), 2);
    }
    let mut pg_dump = db.cluster.program("pg_dump");
    pg_dump.args([
        "-h",
        db.cluster.dir.to_str().unwrap(),
        "-p",
        &PORT.to_string(),
        "-U",
        "postgres",
        &db.name,
    ]);
    let output = pg_dump.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for table in tables {
        let (_, rows) = text.split_once(&format!("COPY litellm_spend.{table} (")).unwrap();
        let rows: Vec<&str> = rows.lines().skip(1).take_while(|line| *line != "\\.").collect();
        assert!(rows.len() == 1 && rows[0].contains("public.stays\t"), "{table}: {rows:?}");
    }
}

/// The number of a role that was dropped may be another's in the new server: a policy would be live again
/// there, and history would be shown to whoever has it.
#[test]
fn a_role_that_is_gone_is_not_dumped_as_its_number() {
    let (db, mut client) = without_worker();
    for (name, role) in [("stays", "heir"), ("given", "former")] {
        let noted = format!(
            "CREATE ROLE {role}; CREATE TABLE {name} (id bigserial, at timestamp NOT NULL) PARTITION BY RANGE (at);
             SELECT spend_partition_set('{name}', retention => '30 days');
             UPDATE litellm_spend.policy SET owner = '{role}' WHERE relation = '{name}'::regclass;
             INSERT INTO litellm_spend.conversion (table_schema, table_name, relation, direction, options, owner, origin)
             SELECT 'public', '{name}', '{name}', 'convert', '{{}}', '{role}', id FROM litellm_spend.installation;
             INSERT INTO litellm_spend.index_set (relation, name, owner, hot, keys, included, origin)
             SELECT '{name}', 'i', '{role}', false, '{{}}', '{{}}', id FROM litellm_spend.installation"
        );
        client.batch_execute(&noted).unwrap();
    }
    client.batch_execute("DROP ROLE former").unwrap();
    let mut pg_dump = db.cluster.program("pg_dump");
    pg_dump.args([
        "-h",
        db.cluster.dir.to_str().unwrap(),
        "-p",
        &PORT.to_string(),
        "-U",
        "postgres",
        &db.name,
    ]);
    let text = String::from_utf8(pg_dump.output().unwrap().stdout).unwrap();
    for table in ["policy", "conversion", "index_set"] {
        let (_, rows) = text.split_once(&format!("COPY litellm_spend.{table} (")).unwrap();
        let rows: Vec<&str> = rows.lines().skip(1).take_while(|line| *line != "\\.").collect();
        assert!(rows.len() == 1 && rows[0].contains("public.stays\t"), "{table}: {rows:?}");
    }
}

#[test]
fn a_role_that_is_gone_is_forgotten_where_history_is_kept_for_it() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"DROP ROLE IF EXISTS former_d; CREATE ROLE former_d;
               ALTER TABLE "LiteLLM_SpendLogs" OWNER TO former_d; SELECT spend_attach()"#,
        )
        .unwrap();
    assert!(holds(&mut client, "SELECT owner = 'former_d'::regrole FROM litellm_spend.capture"));
    client
        .batch_execute(
            r#"DROP TABLE "LiteLLM_SpendLogs" CASCADE; DROP OWNED BY former_d; DROP ROLE former_d"#,
        )
        .unwrap();
    eventually("the role is forgotten", || holds(&mut client, "SELECT owner = 1 FROM litellm_spend.capture"));
    client.batch_execute("CREATE ROLE former_d; SELECT spend_detach()").unwrap();
    assert!(holds(&mut client, "SELECT bool_and(owner = 1) FROM litellm_spend.rollup"));
    client.batch_execute("UPDATE litellm_spend.rollup SET owner = 'former_d'; DROP ROLE former_d").unwrap();
    eventually("that of history too", || {
        holds(&mut client, "SELECT bool_and(owner = 1) FROM litellm_spend.rollup")
    });
}

#[test]
fn a_call_that_changes_nothing_does_not_go_on_with_a_restore() {
    let (_db, mut client) = without_worker();
    let calls = [
        "SELECT * FROM spend_partition_plan()",
        "SELECT * FROM spend_index_plan()",
        "SELECT * FROM spend_upgrade_check('1.92.0')",
    ];
    // Without any state they begin nothing.
    let id = "SELECT id::text FROM litellm_spend.installation";
    let before: String = value(&mut client, id);
    for call in calls {
        client.batch_execute(&format!("BEGIN READ ONLY; {call}; ROLLBACK; {call}")).unwrap();
    }
    assert_eq!(value::<String>(&mut client, id), before);
    client.batch_execute("SELECT spend_attach()").unwrap();
    // As another server's dump leaves it, which has brought its marker.
    client
        .batch_execute(
            "UPDATE litellm_spend.installation SET id = gen_random_uuid();
             UPDATE litellm_spend.source SET candidates = '[]'",
        )
        .unwrap();
    let marker = "SELECT obj_description(oid, 'pg_event_trigger') FROM pg_event_trigger WHERE evtname = 'litellm_spend_restored'";
    let brought: String = value(&mut client, marker);
    client.batch_execute(&format!("COMMENT ON EVENT TRIGGER litellm_spend_restored IS '{brought}'")).unwrap();
    for call in calls {
        let refused = error(&mut client, call);
        assert_eq!(refused.code().code(), "55000", "{call}: {refused:?}");
        assert!(refused.message().contains("nothing has gone on with it"), "{refused:?}");
        assert_refused(&mut client, &format!("BEGIN READ ONLY; {call}"), "55000");
        client.batch_execute("ROLLBACK").unwrap();
    }
    assert_eq!(value::<String>(&mut client, marker), brought);
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    assert!(value::<String>(&mut client, marker) != brought);
    for call in calls {
        client.batch_execute(&format!("BEGIN READ ONLY; {call}; ROLLBACK")).unwrap();
    }
}

/// As those that are made from template1 while that has the extension.
#[test]
fn a_dump_of_a_database_is_a_restore_in_another_from_the_same_template() {
    let mut admin = shared().connect("postgres");
    admin.batch_execute("CREATE DATABASE same_template").unwrap();
    shared().connect("same_template").batch_execute("CREATE EXTENSION litellm_spend").unwrap();
    for copy in ["same_a", "same_b"] {
        admin.batch_execute(&format!("CREATE DATABASE {copy} TEMPLATE same_template")).unwrap();
    }
    let mut a = shared().connect("same_a");
    a.batch_execute(
        "CREATE TABLE ev (id bigserial PRIMARY KEY, kind int);
         SELECT spend_rollup_create('by_kind', 'ev', '{kind}', '{count(*) AS n}');
         INSERT INTO ev (kind) SELECT i % 3 FROM generate_series(1, 30) AS i",
    )
    .unwrap();
    let file = shared().dir.join("same_a.c").to_str().unwrap().to_string();
    run("pg_dump", &["-F", "c", "-f", &file, "same_a"]);
    for section in ["pre-data", "data"] {
        run("pg_restore", &["--section", section, "-d", "same_b", &file]);
    }
    let mut b = shared().connect("same_b");
    assert_refused(&mut b, "SELECT spend_rollup_run()", "55000");
    run("pg_restore", &["--section", "post-data", "-d", "same_b", &file]);
    eventually("the end of the restore is seen", || {
        b.batch_execute("INSERT INTO ev (kind) VALUES (1); SELECT spend_rollup_run()").is_ok()
    });
    assert!(holds(&mut b, "SELECT sum(n) = (SELECT count(*) FROM ev) FROM litellm_spend.by_kind"));
    // What only has a policy, too.
    let mut template = shared().connect("same_template");
    let id = "SELECT id::text FROM litellm_spend.installation";
    let (of_a, of_template): (String, String) = (value(&mut a, id), value(&mut template, id));
    template
        .batch_execute(
            "CREATE TABLE logs (id bigint, at timestamp NOT NULL) PARTITION BY RANGE (at);
             SELECT spend_partition_set('logs', precreate => 1)",
        )
        .unwrap();
    let now: String = value(&mut template, id);
    assert!(now != of_template && of_a != of_template && now != of_a);
    template.batch_execute("SELECT spend_partition_set('logs', precreate => 2)").unwrap();
    assert_eq!(value::<String>(&mut template, id), now);
}

/// What was captured is dumped as a number when its table is gone, and the number may be any table's.
#[test]
fn a_table_that_has_the_number_of_one_that_is_gone_is_not_captured() {
    let db = shared().database().with_rows("a", 50, 5).attached();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"CREATE TABLE other (LIKE "LiteLLM_SpendLogs" INCLUDING ALL); ALTER TABLE other OWNER TO litellm;
               BEGIN; DROP TABLE "LiteLLM_SpendLogs" CASCADE;
               UPDATE litellm_spend.capture SET relation = 'other', predecessor = 'other', origin = gen_random_uuid();
               COMMIT"#,
        )
        .unwrap();
    assert!(holds(&mut client, "SELECT spend_restored()"));
    assert!(holds(&mut client, "SELECT relation = 0 FROM litellm_spend.capture"));
    let said = "SELECT bool_and(last_error LIKE '%relation public.\"LiteLLM_SpendLogs\" does not exist%'
                    OR last_error LIKE '%relation \"public\".\"LiteLLM_SpendLogs\" does not exist%')
                FROM spend_rollup_status";
    eventually("that it is gone is said", || holds(&mut client, said));
    assert!(holds(&mut client, "SELECT count(*) = 0 FROM pg_trigger WHERE tgrelid = 'other'::regclass"));
    // Its name is followed.
    client.batch_execute(r#"ALTER TABLE other RENAME TO "LiteLLM_SpendLogs""#).unwrap();
    eventually("it is captured", || {
        holds(&mut client, r#"SELECT relation = '"LiteLLM_SpendLogs"'::regclass FROM litellm_spend.capture"#)
    });
}

#[test]
fn a_restore_in_pieces_is_left_alone_until_the_last() {
    let (db, _open) = original();
    let totals: String = value(&mut db.connect(), TOTALS);
    let custom = dump(&db, "c");
    let database = target("pieces");
    let section = |section: &str, jobs: &str| {
        run("pg_restore", &["-j", jobs, "--section", section, "-d", &database, &custom]);
    };
    section("pre-data", "1");
    let_the_worker_look(&database);
    let mut client = shared().connect(&database);
    let said = "SELECT string_agg(problem, '; ') LIKE 'this database came out of a dump, %' AND count(*) = 1
                    AND min(remedy) = 'when the restore has ended, not before: SELECT spend_restored();'
                FROM spend_health";
    assert!(holds(&mut client, said));
    let create = "SELECT spend_rollup_create('other', 'ev', '{kind}', '{count(*) AS n}')";
    assert_refused(&mut client, create, "55000");
    drop(client);
    section("data", "2");
    let_the_worker_look(&database);
    let mut client = shared().connect(&database);
    assert!(holds(
        &mut client,
        "SELECT count(*) = 10 AND bool_and(last_error LIKE 'it came out of a dump%') FROM spend_rollup_status"
    ));
    for call in [
        "SELECT spend_rollup_run()",
        "SELECT spend_rollup_window('hand')",
        "SELECT spend_rollup_rebuild('daily_spend')",
        "CALL spend_backfill()",
        "SELECT spend_partition_maintain('logs')",
        "SELECT spend_rollup_create('other', 'ev', '{kind}', '{count(*) AS n}')",
        "SELECT spend_rollup_drop('by_kind')",
        "SELECT spend_rollup_drop('hand')",
    ] {
        assert_refused(&mut client, call, "55000");
    }
    assert!(holds(&mut client, "SELECT count(*) = 0 FROM pg_trigger WHERE tgname LIKE 'litellm_spend%'"));
    section("post-data", "2");
    check(&database, &totals);
}

/// The marker comes with the schema.
#[test]
fn data_that_come_after_the_schema_are_left_alone_until_somebody_says_that_all_is_there() {
    let (db, _open) = original();
    let totals: String = value(&mut db.connect(), TOTALS);
    let custom = dump(&db, "c");
    let database = target("data_later");
    run("pg_restore", &["--schema-only", "-d", &database, &custom]);
    let_the_worker_look(&database);
    // Longer than the worker takes to look, before what it must not act on is complete.
    run(
        "pg_restore",
        &["--data-only", "--disable-triggers", "-n", "litellm_spend", "-d", &database, &custom],
    );
    let_the_worker_look(&database);
    let mut client = shared().connect(&database);
    assert_refused(&mut client, "SELECT spend_rollup_run()", "55000");
    assert!(holds(
        &mut client,
        "SELECT bool_and(origin <> id) FROM litellm_spend.capture, litellm_spend.installation"
    ));
    run(
        "pg_restore",
        &["--data-only", "--disable-triggers", "-N", "litellm_spend", "-d", &database, &custom],
    );
    assert!(holds(&mut client, "SELECT spend_restored()"));
    drop(client);
    check(&database, &totals);
}

#[test]
fn a_restore_over_what_is_there_replaces_it() {
    let (db, _open) = original();
    let totals: String = value(&mut db.connect(), TOTALS);
    let custom = dump(&db, "c");
    let database = target("replaced");
    run("pg_restore", &["-d", &database, &custom]);
    let_the_worker_look(&database);
    shared().connect(&database).batch_execute(&insert_rows("gone", 100, 5)).unwrap();
    run("pg_restore", &["--clean", "--if-exists", "-d", &database, &custom]);
    check(&database, &totals);
}

#[test]
fn a_restored_partitioned_table_is_captured_when_a_merge_moves_a_row() {
    let db = shared().litellm_database();
    let mut client = db.connect();
    if !knows_merge(&mut client) {
        return;
    }
    client
        .batch_execute(&format!(
            r#"CREATE EXTENSION litellm_spend; {}
               INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, "startTime", "endTime", spend)
               VALUES ('m1', 'c', '2026-11-20', now(), 1), ('m2', 'c', '2026-11-20', now(), 10)"#,
            partitioned(BY_TIME)
        ))
        .unwrap();
    attach(&mut client);
    let (database, custom) = (target("moves"), dump(&db, "c"));
    run("pg_restore", &["-d", &database, &custom]);
    let mut client = shared().connect(&database);
    client
        .batch_execute(
            r#"MERGE INTO "LiteLLM_SpendLogs" AS t USING (VALUES ('m1')) AS s(id) ON t.request_id = s.id
                   WHEN MATCHED THEN UPDATE SET "startTime" = '2026-11-02'"#,
        )
        .unwrap();
    let days = "SELECT string_agg(date || ' ' || spend, ', ' ORDER BY date) FROM litellm_spend.daily_spend WHERE requests <> 0";
    eventually("the row is where it is now", || {
        value::<String>(&mut client, days) == "2026-11-02 1, 2026-11-20 10"
    });
    assert_verified(&mut client);
    drop(client);
    shared().connect("postgres").batch_execute(&format!("DROP DATABASE {database} WITH (FORCE)")).unwrap();
}

/// A dump, and a list of what is in it but for the marker: so are dumps of older versions.
fn without_marker(db: &Database) -> (String, String) {
    let marker: String = value(&mut db.connect(), "SELECT evtname::text FROM pg_event_trigger");
    dump_without(db, &[&marker])
}

/// A dump, and a list of what is in it but for lines that contain one of these.
fn dump_without(db: &Database, parts: &[&str]) -> (String, String) {
    let (custom, list) = (dump(db, "c"), shared().dir.join(format!("{}.list", db.name)));
    let output = shared().program("pg_restore").args(["-l", &custom]).output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let kept: Vec<&str> =
        lines.lines().filter(|line| !parts.iter().any(|part| line.contains(part))).collect();
    std::fs::write(&list, kept.join("\n")).unwrap();
    (custom, list.to_str().unwrap().into())
}

#[test]
fn a_dump_without_the_marker_waits_for_somebody_to_say_that_all_is_there() {
    let (db, _open) = original();
    let totals: String = value(&mut db.connect(), TOTALS);
    let (custom, list) = without_marker(&db);
    for (name, call) in [("told", "SELECT spend_restored()"), ("attached", "SELECT spend_attach()")] {
        let database = target(name);
        run("pg_restore", &["-L", &list, "-d", &database, &custom]);
        let_the_worker_look(&database);
        let mut client = shared().connect(&database);
        assert_eq!(value::<String>(&mut client, TOTALS), totals);
        assert!(holds(
            &mut client,
            "SELECT bool_and(tail_rows > 0) FROM spend_rollup_status WHERE kind <> 'by hand'"
        ));
        let hint = error(&mut client, "SELECT spend_rollup_run()").hint().map(String::from);
        assert_eq!(
            hint.as_deref(),
            Some(
                "When all is there, a superuser calls spend_restored(); or call spend_attach() for LiteLLM's table."
            )
        );
        client.batch_execute(call).unwrap();
        assert!(!holds(&mut client, "SELECT spend_restored()"), "nothing waits any more");
        check(&database, &totals);
    }
}

#[test]
fn a_policy_alone_waits_for_somebody_to_say_that_all_is_there() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE logs (id bigserial, at timestamp NOT NULL) PARTITION BY RANGE (at); CREATE INDEX ON logs (at);
             SELECT spend_partition_set('logs', 'day', 2); SELECT spend_rollup_register('hand', 'logs', 'logs_id_seq')",
        )
        .unwrap();
    let (custom, database) = (dump(&db, "c"), target("alone"));
    run("pg_restore", &["-d", &database, &custom]);
    let_the_worker_look(&database);
    let mut client = shared().connect(&database);
    let said = "SELECT count(*) = 1 AND min(remedy) = 'when the restore has ended, not before: SELECT spend_restored();'
                FROM spend_health";
    assert!(holds(&mut client, said));
    let maintain = "SELECT spend_partition_maintain('logs')";
    for call in [maintain, "SELECT spend_rollup_window('hand')", "SELECT spend_rollup_drop('hand')"] {
        assert_refused(&mut client, call, "55000");
    }
    assert!(holds(&mut client, "SELECT spend_restored()"));
    client.batch_execute(maintain).unwrap();
    client.batch_execute("SELECT spend_rollup_window('hand'); SELECT spend_rollup_drop('hand')").unwrap();
    eventually("all is well", || holds(&mut client, "SELECT count(*) = 0 FROM spend_health"));
    drop(client);
    shared().connect("postgres").batch_execute(&format!("DROP DATABASE {database} WITH (FORCE)")).unwrap();
}

#[test]
fn an_owner_speaks_for_the_restore_of_its_own_table_only() {
    let (db, _open) = original();
    let totals: String = value(&mut db.connect(), TOTALS);
    let (custom, list) = without_marker(&db);
    let database = target("spoken");
    run("pg_restore", &["-L", &list, "-d", &database, &custom]);
    let mut client = shared().connect(&database);
    client
        .batch_execute(
            r#"DROP ROLE IF EXISTS other_team; CREATE ROLE other_team; SELECT * FROM spend_grant_admin('other_team');
               SELECT * FROM spend_grant_admin('litellm');
               CREATE SCHEMA other_team AUTHORIZATION other_team;
               CREATE TABLE other_team.logs (LIKE "LiteLLM_SpendLogs" INCLUDING DEFAULTS);
               ALTER TABLE other_team.logs OWNER TO other_team; SET ROLE other_team"#,
        )
        .unwrap();
    // The table that was captured has not come yet.
    client
        .batch_execute(
            "RESET ROLE; CREATE TEMP TABLE comes AS TABLE litellm_spend.capture;
             DELETE FROM litellm_spend.capture; SET ROLE other_team",
        )
        .unwrap();
    let refused = error(&mut client, "SELECT spend_attach('other_team.logs')");
    assert!(refused.message().contains("came out of a dump"), "{refused:?}");
    client
        .batch_execute(
            "RESET ROLE; INSERT INTO litellm_spend.capture TABLE comes; SET ROLE litellm;
             SELECT spend_attach(); RESET ROLE",
        )
        .unwrap();
    assert!(!holds(&mut client, "SELECT spend_restored()"), "nothing waits any more");
    check(&database, &totals);
    shared().connect("postgres").batch_execute("DROP ROLE other_team").unwrap();
}

#[test]
fn a_restore_that_never_came_to_our_state_is_said_and_made_whole() {
    let (db, _open) = original();
    // Tables of rollups, live views and triggers, and no rows of ours, nor what comes last.
    let ours = [" TABLE DATA litellm_spend ", " SEQUENCE SET litellm_spend ", "litellm_spend_restored"];
    let ((custom, list), database) = (dump_without(&db, &ours), target("cut"));
    run("pg_restore", &["-L", &list, "-d", &database, &custom]);
    let_the_worker_look(&database);
    let mut client = shared().connect(&database);
    let faults = |client: &mut Client| -> Vec<(String, String)> {
        let rows = client.query("SELECT problem, remedy FROM spend_health ORDER BY 1", &[]).unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    };
    let found = faults(&mut client);
    assert!(found.len() == 1 && found[0].0.starts_with("this database came out of a dump"), "{found:?}");
    assert_eq!(found[0].1, "when the restore has ended, not before: SELECT spend_restored();");
    for call in [
        "SELECT spend_rollup_create('other', 'ev', '{kind}', '{count(*) AS n}')",
        "SELECT spend_rollup_register('hand', 'byhand')",
        "SELECT spend_partition_set('logs')",
        "SELECT spend_rollup_run()",
        "SELECT spend_rollup_drop('by_kind')",
    ] {
        assert_refused(&mut client, call, "55000");
    }
    assert!(holds(&mut client, "SELECT spend_restored()"));
    assert!(!holds(&mut client, "SELECT spend_restored()"), "nothing waits any more");
    let found = faults(&mut client);
    assert!(found.iter().all(|(problem, _)| problem.contains("its state is lost")), "{found:?}");
    client.batch_execute(&insert_rows("late", 100, 40)).unwrap();
    for (_, remedy) in found {
        client.batch_execute(&remedy).unwrap();
    }
    let create = "SELECT spend_rollup_create('by_kind', 'ev', '{kind}', '{count(*) AS n}')";
    client.batch_execute(create).unwrap();
    wait_until_live(&mut client);
    wait_until_merged(&mut client);
    assert_exact(&mut client);
    assert!(holds(&mut client, "SELECT sum(n) = 330 FROM litellm_spend.by_kind"));
    eventually("all is well", || faults(&mut client).is_empty());
    // LiteLLM's own queries were not known any more, and are given back: ours would keep the rollups.
    client
        .batch_execute(
            "SELECT spend_rollup_drop('by_kind'); SELECT spend_detach(drop_history => true); DROP EXTENSION litellm_spend",
        )
        .unwrap();
    drop(client);
    shared().connect("postgres").batch_execute(&format!("DROP DATABASE {database} WITH (FORCE)")).unwrap();
}

#[test]
fn a_log_above_its_sequence_is_merged_and_counted_once() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 200, 5)).unwrap();
    wait_until_merged(&mut client);
    // Rows are written while the sequence stands above what it will be set to.
    let mut open = db.connect();
    open.batch_execute("BEGIN; LOCK TABLE litellm_spend.change_log IN ROW EXCLUSIVE MODE").unwrap();
    client.batch_execute(&insert_rows("b", 100, 5)).unwrap();
    client
        .batch_execute(
            "SELECT setval('litellm_spend.change_log_seq', (SELECT watermark FROM litellm_spend.rollup WHERE name = 'daily_spend'))",
        )
        .unwrap();
    drop(open);
    eventually("the sequence is raised", || {
        holds(
            &mut client,
            "SELECT last_value >= 300 AND (SELECT bool_and(tail_rows = 0) FROM spend_rollup_status)
             FROM litellm_spend.change_log_seq",
        )
    });
    client.batch_execute(&insert_rows("c", 50, 5)).unwrap();
    wait_until_merged(&mut client);
    wait_until_live(&mut client);
    assert_exact(&mut client);
    assert!(holds(&mut client, "SELECT sum(requests) = 350 FROM litellm_spend.daily_spend"));
}

#[test]
fn state_that_is_lost_is_said_and_what_is_left_can_be_dropped_and_made_again() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE ev (id bigserial PRIMARY KEY, kind int);
             SELECT spend_rollup_create('by_kind', 'ev', '{kind}', '{count(*) AS n}');
             INSERT INTO ev (kind) VALUES (1), (1), (2)",
        )
        .unwrap();
    client.batch_execute(&insert_rows("a", 200, 5)).unwrap();
    wait_until_merged(&mut client);
    let said = |client: &mut Client, rollup: &str| -> Option<String> {
        let sql = format!("SELECT last_error FROM spend_rollup_status WHERE rollup = '{rollup}'");
        value(client, &sql)
    };
    // 1. the rows of both are gone, as of a restore of which a table's data failed.
    client
        .batch_execute("DELETE FROM litellm_spend.rollup WHERE name IN ('by_kind', 'daily_spend')")
        .unwrap();
    assert!(said(&mut client, "by_kind").unwrap().starts_with("its state is lost"));
    assert!(said(&mut client, "daily_spend").unwrap().starts_with("its state is lost"));
    assert_eq!(
        error(&mut client, "SELECT spend_rollup_create('by_kind', 'ev', '{kind}', '{count(*) AS n}')")
            .code()
            .code(),
        "42710"
    );
    client.batch_execute("SELECT spend_rollup_drop('by_kind')").unwrap();
    client.batch_execute("SELECT spend_rollup_create('by_kind', 'ev', '{kind}', '{count(*) AS n}')").unwrap();
    attach(&mut client);
    wait_until_merged(&mut client);
    assert_exact(&mut client);
    assert_eq!(said(&mut client, "daily_spend"), None);
    assert!(holds(&mut client, "SELECT sum(n) = 3 FROM litellm_spend.by_kind"));
    // 2. their sources.
    client.batch_execute("DELETE FROM litellm_spend.source").unwrap();
    assert!(said(&mut client, "by_kind").unwrap().starts_with("its source is not known"));
    client.batch_execute("SELECT spend_rollup_drop('by_kind')").unwrap();
    client.batch_execute("SELECT spend_rollup_create('by_kind', 'ev', '{kind}', '{count(*) AS n}')").unwrap();
    client.batch_execute(&insert_rows("b", 100, 5)).unwrap();
    attach(&mut client);
    wait_until_merged(&mut client);
    assert_exact(&mut client);
    // 3. what is captured.
    client.batch_execute("DELETE FROM litellm_spend.capture").unwrap();
    assert!(said(&mut client, "daily_spend").unwrap().starts_with("triggers capture a table"));
    client.batch_execute(&insert_rows("c", 100, 5)).unwrap();
    attach(&mut client);
    wait_until_merged(&mut client);
    assert_exact(&mut client);
    assert!(holds(&mut client, "SELECT sum(requests) = 400 FROM litellm_spend.daily_spend"));
}

#[test]
fn what_is_left_of_a_role_that_may_not_use_our_schema_is_dropped_by_a_superuser() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "DROP ROLE IF EXISTS keeper_k; CREATE ROLE keeper_k; CREATE TABLE ev (id bigserial, kind int);
             ALTER TABLE ev OWNER TO keeper_k;
             CREATE FUNCTION larger(int, int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT greatest($1, $2)';
             SELECT spend_rollup_create('by_kind', 'ev', '{kind}', '{count(*) AS n,max(kind) AS top MERGE WITH larger}');
             INSERT INTO ev (kind) VALUES (1)",
        )
        .unwrap();
    wait_until_merged(&mut client);
    // As a restore leaves it that did not come to the grants, nor to our state.
    client
        .batch_execute(
            "DELETE FROM litellm_spend.rollup; REVOKE USAGE ON SCHEMA litellm_spend FROM keeper_k;
             SELECT spend_rollup_drop('by_kind')",
        )
        .unwrap();
    assert!(holds(
        &mut client,
        "SELECT to_regclass('litellm_spend.by_kind') IS NULL AND to_regclass('litellm_spend.by_kind_rollup') IS NULL
             AND NOT EXISTS (SELECT FROM pg_proc WHERE proowner = 'keeper_k'::regrole)
             AND NOT has_schema_privilege('keeper_k', 'litellm_spend', 'USAGE')"
    ));
    client.batch_execute("DROP OWNED BY keeper_k; DROP ROLE keeper_k; DROP EXTENSION litellm_spend").unwrap();
}

#[test]
fn kept_history_has_its_owner_after_a_restore() {
    let db = shared().database().with_rows("a", 50, 5).attached();
    let mut client = db.connect();
    eventually("it is detached", || client.batch_execute("SELECT spend_detach()").is_ok());
    let (file, database) = (dump(&db, "c"), target("kept"));
    run("pg_restore", &[&file, "-d", &database]);
    let mut client = shared().connect(&database);
    assert!(holds(&mut client, "SELECT bool_and(owner = 'litellm'::regrole) FROM litellm_spend.rollup"));
    client.batch_execute("SELECT spend_grant_admin('litellm')").unwrap();
    shared().connect_as(&database, LITELLM).batch_execute("SELECT spend_attach()").unwrap();
    wait_until_live(&mut client);
    assert_exact(&mut client);
    drop(client);
    shared().connect("postgres").batch_execute(&format!("DROP DATABASE {database} WITH (FORCE)")).unwrap();
}

#[test]
fn the_marker_comes_and_goes_with_what_it_stands_for() {
    let db = shared().database();
    let mut client = db.connect();
    let markers = "SELECT count(*) FROM pg_event_trigger WHERE evtenabled = 'D'";
    assert_eq!(value::<i64>(&mut client, markers), 0);
    client.batch_execute("SELECT spend_attach()").unwrap();
    assert_eq!(value::<i64>(&mut client, markers), 1);
    client.batch_execute("SELECT spend_detach(drop_history => true)").unwrap();
    assert_eq!(value::<i64>(&mut client, markers), 0);
    client
        .batch_execute(
            "CREATE TABLE ev (id bigserial PRIMARY KEY, kind int);
             SELECT spend_rollup_create('by_kind', 'ev', '{kind}', '{count(*) AS n}')",
        )
        .unwrap();
    assert_eq!(value::<i64>(&mut client, markers), 1);
    client.batch_execute("SELECT spend_rollup_drop('by_kind')").unwrap();
    assert_eq!(value::<i64>(&mut client, markers), 0);
    client.batch_execute("DROP EXTENSION litellm_spend").unwrap();
}

#[test]
fn who_makes_and_drops_rollups_beside_another_leaves_the_marker_that_is_needed() {
    let db = shared().database();
    let (mut first, mut look) = (db.connect(), db.connect());
    let markers = "SELECT count(*) FROM pg_event_trigger";
    let create = |name: &str| {
        format!("SELECT spend_rollup_create('{name}', '{name}_ev', '{{kind}}', '{{count(*) AS n}}')")
    };
    let drop_it = |name: &str| format!("SELECT spend_rollup_drop('{name}')");
    for name in ["a", "b"] {
        look.batch_execute(&format!("CREATE TABLE {name}_ev (id bigserial PRIMARY KEY, kind int)")).unwrap();
    }
    // What one does, what another does meanwhile, how the first ends, and how many markers that leaves.
    for (one, other, end, left) in [
        (create("a"), create("b"), "ROLLBACK", 1),
        (create("a"), drop_it("b"), "COMMIT", 1),
        (drop_it("a"), create("b"), "COMMIT", 1),
        (create("a"), create("b"), "", 1),
        (drop_it("a"), drop_it("b"), "COMMIT", 0),
    ] {
        if end.is_empty() {
            first.batch_execute(&one).unwrap();
            continue;
        }
        first.batch_execute(&format!("BEGIN; {one}")).unwrap();
        let mut second = db.connect();
        let beside = std::thread::spawn(move || second.batch_execute(&other).map_err(|e| format!("{e:?}")));
        std::thread::sleep(std::time::Duration::from_millis(500));
        first.batch_execute(end).unwrap();
        beside.join().unwrap().unwrap();
        if left == 1 {
            assert_eq!(value::<i64>(&mut look, markers), 1, "{one}");
        }
        eventually("the marker is there as long as it is needed", || {
            value::<i64>(&mut look, markers) == left
        });
    }
    // Who makes the first is waited for, but not for ever.
    first.batch_execute(&format!("BEGIN; {}", create("a"))).unwrap();
    look.batch_execute("SET litellm_spend.window_wait = '100ms'").unwrap();
    assert_refused(&mut look, &create("b"), "55P03");
    first.batch_execute("ROLLBACK").unwrap();
    look.batch_execute("DROP EXTENSION litellm_spend").unwrap();
}

#[test]
fn a_reversion_goes_on_after_a_restore_and_says_how_to_take_it_back_where_it_cannot() {
    let db = shared().database().attached();
    let (mut client, mut holder) = (db.connect(), db.connect());
    client
        .batch_execute(
            "CREATE TABLE t (id bigint, at timestamp, PRIMARY KEY (id, at)) PARTITION BY RANGE (at); CREATE INDEX at ON t (at);
             CREATE TABLE t_1 PARTITION OF t DEFAULT; ALTER TABLE t OWNER TO litellm; ALTER TABLE t_1 OWNER TO litellm;
             INSERT INTO t SELECT i, now() - i * interval '1 minute' FROM generate_series(1, 3000) AS i",
        )
        .unwrap();
    // Without this lock there is no swap.
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE").unwrap();
    client.batch_execute("SELECT spend_partition_revert('t')").unwrap();
    let step = "SELECT bool_or(step = 'swap' AND last_error LIKE 'another transaction%') FROM spend_progress";
    eventually("it is at the swap", || holds(&mut client, step));
    // Noted, and not copied again.
    client.batch_execute("DELETE FROM t WHERE id > 2900; UPDATE t SET id = -id WHERE id < 50").unwrap();
    let custom = dump(&db, "c");
    let database = target("reversion");
    run("pg_restore", &["-d", &database, &custom]);
    let mut restored = shared().connect(&database);
    wait_until_plain(&mut restored, "t");
    let rows = "SELECT count(*) = 2900 AND sum(id) = 2900 * 2901 / 2 - 49 * 50 FROM t";
    assert!(holds(&mut restored, rows));
    let left = "SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class
                WHERE relnamespace = 'litellm_spend_archive'::regnamespace AND relkind IN ('r', 'p', 'S')";
    assert_eq!(value::<String>(&mut restored, left), "t_1 t_partitioned");
    eventually("all is well", || holds(&mut restored, "SELECT count(*) = 0 FROM spend_health"));
    drop(restored);
    shared().connect("postgres").batch_execute(&format!("DROP DATABASE {database} WITH (FORCE)")).unwrap();
    // Part of it is gone, as from a dump that left the schema out.
    client.batch_execute("DROP TABLE litellm_spend_archive.t_plain").unwrap();
    holder.batch_execute("COMMIT").unwrap();
    let fault = "SELECT problem = 'reversion of public.t: \"litellm_spend_archive\".\"t_plain\" is not the copy that was made'
                     AND caused_by = 'It was dropped or replaced, or was left out of a dump. The reversion of \"public\".\"t\" cannot go on.'
                     AND remedy = 'SELECT * FROM spend_partition_revert(''\"public\".\"t\"'', abort => true);'
                 FROM spend_health";
    eventually("that is said", || client.query(fault, &[]).unwrap().iter().any(|row| row.get(0)));
    let remedy: String = value(&mut client, "SELECT remedy FROM spend_health");
    client.batch_execute(&remedy).unwrap();
    assert!(holds(&mut client, "SELECT count(*) = 0 FROM litellm_spend.conversion"));
    assert!(holds(
        &mut client,
        "SELECT count(*) = 0 FROM pg_trigger WHERE tgname LIKE 'litellm_spend_revert%'"
    ));
    client.batch_execute("SELECT spend_partition_revert('t')").unwrap();
    wait_until_plain(&mut client, "t");
}

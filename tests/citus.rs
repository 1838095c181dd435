//! Rollups of tables that Citus distributes: a coordinator and two nodes on this machine. Where the server
//! has no Citus, each test says so and does nothing: `make test-citus` with PG_BIN of one that has.

mod common;

use common::*;
use postgres::Client;
use std::fs;
use std::io::Write;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The coordinator, then its nodes. All listen on one port, each at an address of its own.
struct Citus {
    nodes: Vec<Cluster>,
    number: u32,
}

/// Says so where it has not.
fn server_has_it() -> bool {
    let library = format!("{}/citus.so", pg_config("--pkglibdir"));
    let found = fs::exists(&library).unwrap();
    if !found {
        skipped(&format!("this server has no Citus ({library})"));
    }
    found
}

const DATABASE: &str = "events";

impl Citus {
    fn start() -> Option<Citus> {
        Citus::start_with(&[])
    }

    fn start_with(settings: &[&str]) -> Option<Citus> {
        if !server_has_it() {
            return None;
        }
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let address = |node| address(number, node);
        let nodes: Vec<Cluster> = (0..3)
            .map(|i| {
                let listen = format!("listen_addresses = '{}'", address(i));
                let local = format!("citus.local_hostname = '{}'", address(i));
                let ours = [
                    "shared_preload_libraries = 'citus,litellm_spend'",
                    &listen,
                    "citus.node_conninfo = 'sslmode=disable'",
                    // Where a move of shards connects to this node itself.
                    &local,
                    // So that a test sees what is in doubt, and ends it by itself.
                    "citus.recover_2pc_interval = -1",
                    "synchronous_commit = local",
                ];
                let node = Cluster::start(&[&ours, settings].concat());
                let rules = node.dir.join("data/pg_hba.conf");
                let mut file = fs::OpenOptions::new().append(true).open(rules).unwrap();
                writeln!(file, "host all all 127.0.0.0/8 trust").unwrap();
                let mut client = node.connect("postgres");
                client.batch_execute("SELECT pg_reload_conf()").unwrap();
                client.batch_execute(&format!("CREATE DATABASE {DATABASE}")).unwrap();
                node.connect(DATABASE).batch_execute("CREATE EXTENSION citus").unwrap();
                node
            })
            .collect();
        let citus = Citus { nodes, number };
        let mut client = citus.connect();
        client
            .batch_execute(&format!(
                "SELECT citus_set_coordinator_host('{}', {PORT}); SELECT citus_add_node('{}', {PORT});
                 SELECT citus_add_node('{}', {PORT}); CREATE EXTENSION litellm_spend",
                address(0),
                address(1),
                address(2)
            ))
            .unwrap();
        Some(citus)
    }

    fn connect(&self) -> Client {
        self.nodes[0].connect(DATABASE)
    }

    fn try_connect(&self) -> Option<Client> {
        self.nodes[0].try_connect(DATABASE, "postgres").ok()
    }

    fn address(&self, node: usize) -> String {
        address(self.number, node)
    }

    fn signal(&self, node: usize, signal: &str) {
        for pid in processes_in(&self.nodes[node].dir.join("data")) {
            let _ = Command::new("kill").args([signal, &pid]).status();
        }
    }
}

fn address(number: u32, node: usize) -> String {
    let pid = std::process::id();
    format!("127.{}.{}.{}", 3 * number as usize + node, (pid >> 8) & 255, pid & 255)
}

fn citus() -> Option<&'static Citus> {
    static CITUS: OnceLock<Option<Citus>> = OnceLock::new();
    // Each test says that it is left out.
    if server_has_it() { CITUS.get_or_init(Citus::start).as_ref() } else { None }
}

/// Tables of a test, in a schema of its own, which the connection has on its path.
fn schema(citus: &Citus, name: &str) -> Client {
    let mut client = citus.connect();
    client.batch_execute(&format!("CREATE SCHEMA {name}; SET search_path = {name}, public")).unwrap();
    client
}

/// Two that create at a time can be in each other's way: on the nodes, and where an owner is granted
/// something for the first time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A distributed table of a role's that is no superuser, and a declared rollup of it.
fn events(citus: &Citus, name: &str) -> Client {
    let mut client = schema(citus, name);
    let _alone = alone();
    for sql in [
        // Seen on the nodes when it is committed.
        format!("CREATE ROLE {name} LOGIN; GRANT ALL ON SCHEMA {name} TO {name}"),
        format!("SET ROLE {name}; CREATE TABLE events (site int, x int, id bigserial)"),
        "SELECT create_distributed_table('events', 'site', shard_count => 8); RESET ROLE".into(),
        format!("SELECT spend_rollup_create('{name}', 'events', '{{site}}', '{{count(*) AS n}}')"),
    ] {
        client.batch_execute(&sql).unwrap();
    }
    client
}

/// Where the rows of a site are: the node, by its place in [`Citus::nodes`], and the shard.
fn shard_of(citus: &Citus, client: &mut Client, table: &str, site: i32) -> (usize, String) {
    let row = client
        .query_one(
            &format!(
                "SELECT nodename, shard_name(logicalrelid, shardid) FROM pg_dist_shard
                 JOIN pg_dist_placement USING (shardid) JOIN pg_dist_node USING (groupid)
                 WHERE shardid = get_shard_id_for_distribution_column('{table}', {site})"
            ),
            &[],
        )
        .unwrap();
    let node = (0..3).find(|i| citus.address(*i) == row.get::<_, String>(0)).unwrap();
    (node, row.get(1))
}

fn watermark(client: &mut Client, rollup: &str) -> i64 {
    value(client, &format!("SELECT watermark FROM litellm_spend.rollup WHERE name = '{rollup}'"))
}

#[test]
fn what_is_in_doubt_on_a_node_is_waited_for_also_after_its_restart() {
    let Some(citus) = Citus::start() else { return };
    let mut client = events(&citus, "doubt");
    client
        .batch_execute("INSERT INTO events (site, x) SELECT i, i FROM generate_series(1, 20) AS i")
        .unwrap();
    eventually("all is merged", || watermark(&mut client, "doubt") == 20);
    // A transaction that has ended on the coordinator, whose COMMIT PREPARED did not reach the node.
    let (node, shard) = shard_of(&citus, &mut client, "events", 1);
    let number: i64 = value(&mut client, "SELECT nextval('events_id_seq')");
    let mut on_node = citus.nodes[node].connect(DATABASE);
    on_node
        .batch_execute(&format!(
            "SET citus.enable_manual_changes_to_shards = on;
             BEGIN; INSERT INTO {shard} (site, x, id) VALUES (1, 1, {number}); PREPARE TRANSACTION 'in_doubt'"
        ))
        .unwrap();
    drop(on_node);
    client.batch_execute("INSERT INTO events (site, x) VALUES (1, 2)").unwrap();
    let run = "SELECT outcome FROM spend_rollup_run('doubt')";
    let merge = |client: &mut Client| {
        assert_ne!(value::<String>(client, run), "failed");
        (watermark(client, "doubt"), value::<i64>(client, "SELECT sum(n)::bigint FROM litellm_spend.doubt"))
    };
    assert_eq!(
        merge(&mut client),
        (20, 21),
        "the number before is in doubt; the view shows what is committed"
    );
    citus.nodes[node].crash_and_restart();
    eventually("the node is asked again", || {
        let mut client = citus.connect();
        client.query_one(run, &[]).is_ok_and(|row| row.get::<_, &str>(0) != "failed")
    });
    let mut client = citus.connect();
    client.batch_execute("SET search_path = doubt, public").unwrap();
    assert_eq!(merge(&mut client), (20, 21), "still in doubt");
    citus.nodes[node].connect(DATABASE).batch_execute("COMMIT PREPARED 'in_doubt'").unwrap();
    eventually("it is merged", || merge(&mut client) == (22, 22));
    assert!(client.query("SELECT * FROM spend_rollup_verify('doubt')", &[]).unwrap().is_empty());
}

#[test]
fn a_row_that_waits_for_a_lock_on_its_shard_is_waited_for() {
    let Some(citus) = citus() else { return };
    let mut client = events(citus, "queued");
    let (node, shard) = shard_of(citus, &mut client, "events", 1);
    let number: i64 = value(&mut client, "SELECT nextval('events_id_seq')");
    let mut holder = citus.nodes[node].connect(DATABASE);
    let mut holder = holder.transaction().unwrap();
    holder.batch_execute("SET LOCAL citus.enable_manual_changes_to_shards = on").unwrap();
    holder.batch_execute(&format!("LOCK TABLE {shard} IN SHARE MODE")).unwrap();
    // The statement of a coordinator's session that is gone.
    let insert = format!("INSERT INTO {shard} (site, x, id) VALUES (1, 1, {number})");
    let other = std::thread::spawn({
        let mut client = citus.nodes[node].connect(DATABASE);
        move || {
            client.batch_execute("SET citus.enable_manual_changes_to_shards = on").unwrap();
            client.batch_execute(&insert).unwrap();
        }
    });
    eventually("it waits", || {
        let mut client = citus.nodes[node].connect(DATABASE);
        holds(
            &mut client,
            &format!(
                "SELECT count(*) = 1 FROM pg_locks WHERE NOT granted AND relation = '{shard}'::regclass"
            ),
        )
    });
    client.batch_execute("SELECT spend_rollup_run('queued')").unwrap();
    assert_eq!(watermark(&mut client, "queued"), 0);
    holder.commit().unwrap();
    other.join().unwrap();
    eventually("it is merged", || watermark(&mut client, "queued") == 1);
    assert_eq!(value::<i64>(&mut client, "SELECT n FROM litellm_spend.queued"), 1);
}

#[test]
fn a_number_of_another_node_stops_the_source_and_says_so() {
    let Some(citus) = citus() else { return };
    let mut client = events(citus, "numbered");
    client.batch_execute("INSERT INTO events (site, x) VALUES (1, 1)").unwrap();
    eventually("it is merged", || watermark(&mut client, "numbered") == 1);
    client.batch_execute("SELECT spend_rollup_register('numbered_too', 'events')").unwrap();
    let mut on_node = citus.nodes[1].connect(DATABASE);
    on_node.batch_execute("INSERT INTO numbered.events (site, x) VALUES (2, 2)").unwrap();
    // The rollup's table is there, too, and its state is not: that is no restore which was cut.
    assert!(holds(&mut on_node, "SELECT to_regclass('litellm_spend.numbered_rollup') IS NOT NULL"));
    let call = "SELECT spend_rollup_create('there', 'numbered.events', '{x}', '{count(*) AS n}')";
    assert_refused(&mut on_node, call, "0A000");
    assert_refused(&mut client, "SELECT * FROM spend_rollup_window('numbered_too')", "55000");
    eventually("the status says so, also when nothing new comes through the coordinator", || {
        holds(
            &mut client,
            "SELECT last_error LIKE '%were numbered on another node than the coordinator%' FROM spend_rollup_status
             WHERE rollup = 'numbered'",
        )
    });
    client
        .batch_execute("DELETE FROM events WHERE site = 2; INSERT INTO events (site, x) VALUES (2, 2)")
        .unwrap();
    client.batch_execute("SELECT spend_rollup_run('numbered')").unwrap();
    assert_eq!(watermark(&mut client, "numbered"), 2);
}

#[test]
fn a_number_of_a_node_without_shards_stops_the_source_too() {
    let Some(citus) = citus() else { return };
    let mut client = schema(citus, "elsewhere");
    client
        .batch_execute(
            "CREATE TABLE events (site int, id bigserial);
             SELECT create_distributed_table('events', 'site', shard_count => 1)",
        )
        .unwrap();
    client.batch_execute("SELECT spend_rollup_register('elsewhere', 'events')").unwrap();
    client.batch_execute("INSERT INTO events VALUES (1)").unwrap();
    let (holding, _) = shard_of(citus, &mut client, "events", 1);
    let mut other = citus.nodes[3 - holding].connect(DATABASE);
    other.batch_execute("INSERT INTO elsewhere.events VALUES (2)").unwrap();
    let refused = error(&mut client, "SELECT * FROM spend_rollup_window('elsewhere')");
    assert_eq!(refused.code().code(), "55000", "{refused:?}");
    client.batch_execute("SELECT spend_rollup_drop('elsewhere')").unwrap();
}

#[test]
fn a_coordinator_that_holds_shards_merges_them_and_opens_its_schema_to_nobody() {
    let Some(citus) = Citus::start() else { return };
    let mut client = citus.connect();
    let coordinator = format!("'{}', {PORT}", citus.address(0));
    client
        .batch_execute(&format!(
            "SELECT citus_set_node_property({coordinator}, 'shouldhaveshards', true);
             CREATE ROLE app LOGIN; GRANT ALL ON SCHEMA public TO app"
        ))
        .unwrap();
    let mut app = citus.nodes[0].connect_as(DATABASE, "app");
    app.batch_execute("CREATE TABLE events (site int, id bigserial)").unwrap();
    app.batch_execute("SELECT create_distributed_table('events', 'site', shard_count => 6)").unwrap();
    app.batch_execute("INSERT INTO events SELECT i % 50 FROM generate_series(1, 1000) AS i").unwrap();
    // The owner's first one: what it is granted here is not committed when the nodes are asked.
    let created = "SET statement_timeout = '2min'; SET client_min_messages = warning;
         SELECT spend_rollup_create('by_site', 'public.events', '{site}', '{count(*) AS n}', distributed => true)";
    client.batch_execute(created).unwrap();
    app.batch_execute("INSERT INTO events SELECT i % 60 FROM generate_series(1, 1000) AS i").unwrap();
    eventually("all is merged", || watermark(&mut client, "by_site") == 2000);
    let differs = "SELECT site, n FROM litellm_spend.by_site_rollup
         EXCEPT SELECT site, count(*) FROM events GROUP BY site";
    assert!(client.query(differs, &[]).unwrap().is_empty());
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.by_site"), 2000);
    let here = "SELECT count(*) > 0 FROM pg_dist_placement JOIN pg_dist_shard USING (shardid)
         WHERE groupid = 0 AND logicalrelid = 'litellm_spend.by_site_rollup'::regclass";
    assert!(holds(&mut client, here), "the coordinator holds some of it");
    assert!(holds(&mut client, "SELECT NOT has_schema_privilege('app', 'litellm_spend', 'CREATE')"));
    assert!(client.query("SELECT * FROM spend_rollup_verify('by_site')", &[]).unwrap().is_empty());
    client.batch_execute("SELECT spend_rollup_rebuild('by_site')").unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.by_site"), 2000);
    client.batch_execute("SELECT spend_rollup_drop('by_site')").unwrap();
}

#[test]
fn a_distributed_rollup_begins_before_the_first_row_that_there_is() {
    let Some(citus) = citus() else { return };
    let mut client = schema(citus, "firsts");
    for sql in [
        "CREATE TABLE decimals (site int, id numeric(12,2))",
        "SELECT create_distributed_table('decimals', 'site', shard_count => 4)",
        "CREATE SEQUENCE s; INSERT INTO decimals VALUES (1, -7)",
        "ALTER TABLE decimals ALTER COLUMN id SET DEFAULT nextval('s')",
        "SELECT spend_rollup_create('decimals', 'decimals', '{site}', '{count(*) AS n}', distributed => true)",
        "INSERT INTO decimals (site) VALUES (1)",
    ] {
        client.batch_execute(sql).unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    eventually("it is merged", || watermark(&mut client, "decimals") == 1);
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.decimals_rollup"), 2);
    client.batch_execute("SELECT spend_rollup_drop('decimals')").unwrap();
}

#[test]
fn only_what_is_distributed_by_hash_is_a_source_and_only_on_the_coordinator() {
    let Some(citus) = citus() else { return };
    let mut client = schema(citus, "kinds");
    client
        .batch_execute(
            "CREATE TABLE everywhere (id bigserial, x int); SELECT create_reference_table('everywhere');
             CREATE TABLE one (id bigserial, x int); SELECT create_distributed_table('one', NULL);
             CREATE TABLE parted (id bigserial, x int) PARTITION BY RANGE (id);
             CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (1) TO (1000);
             SELECT create_distributed_table('parted', 'x')",
        )
        .unwrap();
    for table in ["everywhere", "one"] {
        let call = format!("SELECT spend_rollup_create('kind', '{table}', '{{x}}', '{{count(*) AS n}}')");
        assert_refused(&mut client, &call, "0A000");
    }
    let mut on_node = citus.nodes[1].connect(DATABASE);
    let call = "SELECT spend_rollup_create('kind', 'kinds.parted', '{x}', '{count(*) AS n}')";
    assert_refused(&mut on_node, call, "0A000");
    let creating = alone();
    client.batch_execute(call).unwrap();
    drop(creating);
    // The table that Citus shows there is no rollup whose state is lost, or is still to be restored.
    assert!(holds(&mut on_node, "SELECT to_regclass('litellm_spend.kind_rollup') IS NOT NULL"));
    assert_refused(&mut on_node, call, "0A000");
    assert_no_rows(on_node.query("SELECT problem FROM spend_health", &[]).unwrap(), "the node complains");
    client.batch_execute("INSERT INTO parted (x) SELECT i FROM generate_series(1, 50) AS i").unwrap();
    client.batch_execute("INSERT INTO parted_1 (x) VALUES (1)").unwrap();
    eventually("it is merged", || watermark(&mut client, "kind") == 51);
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.kind"), 51);
    assert!(client.query("SELECT * FROM spend_rollup_verify('kind')", &[]).unwrap().is_empty());
}

#[test]
fn a_rollup_that_cannot_be_distributed_is_a_table_of_the_coordinator_which_is_said() {
    let Some(citus) = citus() else { return };
    let mut client = schema(citus, "local");
    client
        .batch_execute(
            "CREATE TABLE plain (id bigserial PRIMARY KEY, x int, y int);
             CREATE TABLE ev (id bigserial, x int, y int, PRIMARY KEY (id, x));
             SELECT create_distributed_table('ev', 'x');
             CREATE TABLE one (id bigserial, x int, y int, PRIMARY KEY (id, x));
             SELECT create_distributed_table('one', 'x', shard_count => 1, colocate_with => 'none')",
        )
        .unwrap();
    let call = |rollup: &str, table: &str, dimension: &str, distributed: &str| {
        format!(
            "SELECT spend_rollup_create('{rollup}', 'local.{table}', '{{{dimension}}}', '{{count(*) AS n}}',
                 distributed => {distributed})"
        )
    };
    // Neither x alone nor a copy of it under another name is missing: the column itself is.
    for (table, dimension) in [("ev", "y"), ("ev", "x + 0 AS x"), ("one", "x"), ("plain", "x")] {
        assert_refused(&mut client, &call("no", table, dimension, "true"), "0A000");
    }
    let creating = alone();
    let said = citus.nodes[0].notices(DATABASE, &call("by_y", "ev", "y", "NULL"));
    assert!(said.contains("NOTICE:  rollup \"by_y\" is a table of this node"), "{said}");
    assert!(said.contains("is distributed by column \"x\", which is none of the dimensions"), "{said}");
    let said = citus.nodes[0].notices(DATABASE, &call("of_one", "one", "x", "NULL"));
    assert!(said.contains("has only one shard"), "{said}");
    for (rollup, table, distributed) in
        [("of_plain", "plain", "NULL"), ("not_wanted", "ev", "false"), ("beside", "ev", "true")]
    {
        assert_eq!(citus.nodes[0].notices(DATABASE, &call(rollup, table, "x", distributed)), "");
    }
    drop(creating);
    let tables =
        "SELECT string_agg(logicalrelid::text, ' ' ORDER BY logicalrelid::text) FROM pg_dist_partition
                  WHERE logicalrelid::text ~ 'by_y|of_|not_wanted|beside'";
    assert_eq!(
        value::<String>(&mut client, tables),
        "litellm_spend.beside_merged litellm_spend.beside_rollup"
    );
    for table in ["plain", "ev", "one"] {
        let insert =
            format!("INSERT INTO {table} (x, y) SELECT i % 5, i % 7 FROM generate_series(1, 70) AS i");
        client.batch_execute(&insert).unwrap();
    }
    for rollup in ["by_y", "of_one", "of_plain", "not_wanted", "beside"] {
        eventually("it is merged", || watermark(&mut client, rollup) == 70);
        let sql = format!("SELECT sum(n)::bigint FROM litellm_spend.{rollup}_rollup");
        assert_eq!(value::<i64>(&mut client, &sql), 70, "{rollup}");
        client.batch_execute(&format!("SELECT spend_rollup_drop('{rollup}')")).unwrap();
    }
    let left = "SELECT count(*) FROM pg_class WHERE relname ~ '^(by_y|of_|not_wanted|beside)'";
    assert_eq!(value::<i64>(&mut client, left), 0);
    let left = "SELECT sum(result::int)::bigint FROM run_command_on_workers(
                    $$SELECT count(*) FROM pg_class WHERE relname LIKE 'beside%'$$)";
    assert_eq!(value::<i64>(&mut client, left), 0);
}

/// What the coordinator's log says of plans from a moment on: those of statements that a call runs itself.
fn plans(citus: &Citus, client: &mut Client, call: &str) -> String {
    client
        .batch_execute(
            "LOAD 'auto_explain'; SET auto_explain.log_min_duration = 0;
             SET auto_explain.log_nested_statements = on; SET citus.explain_distributed_queries = off",
        )
        .unwrap();
    let before = citus.nodes[0].log().len();
    client.batch_execute(call).unwrap();
    client
        .batch_execute("SET auto_explain.log_min_duration = -1; RESET citus.explain_distributed_queries")
        .unwrap();
    citus.nodes[0].log()[before..].to_string()
}

/// The plans of the statements that begin so, by their first word after `Query Text`.
fn plans_of<'a>(log: &'a str, statement: &str) -> Vec<&'a str> {
    log.split("Query Text: ").filter(|plan| plan.starts_with(statement)).collect()
}

fn explained(client: &mut Client, query: &str) -> String {
    let plan = client.query(&format!("EXPLAIN (COSTS off) {query}"), &[]).unwrap();
    plan.iter().map(|line| line.get(0)).collect::<Vec<String>>().join("\n")
}

#[test]
fn a_distributed_rollup_is_beside_its_source_and_each_node_merges_and_shows_its_own() {
    // Nobody but the test merges.
    let Some(citus) = Citus::start_with(&["litellm_spend.merge_interval = '1h'"]) else { return };
    let mut client = schema(&citus, "beside");
    for sql in [
        "CREATE ROLE beside LOGIN; GRANT ALL ON SCHEMA beside TO beside",
        "CREATE FUNCTION longer(a text, b text) RETURNS text IMMUTABLE STRICT LANGUAGE sql
         AS 'SELECT CASE WHEN length(a) < length(b) THEN b ELSE a END'",
        "CREATE AGGREGATE longest (text) (SFUNC = longer, STYPE = text)",
        "SET ROLE beside; CREATE TABLE ev (id bigserial, site int, path text, ms float8, at timestamptz DEFAULT now());
         CREATE INDEX ON ev (id)",
        "SELECT create_distributed_table('ev', 'site', shard_count => 8); RESET ROLE",
        "SELECT spend_rollup_create('ev', 'ev', ARRAY['path', 'site', 'date_trunc(''hour'', at) AS hour'],
             ARRAY['count(*) AS n', 'sum(ms) AS ms', 'avg(ms) AS mean', 'min(ms) AS low',
                   'max(ms) FILTER (WHERE path <> ''/a'') AS high'])",
        "SELECT spend_rollup_create('states', 'ev', ARRAY['site', 'path'],
             ARRAY['longest(path) AS longest MERGE WITH longest', 'bool_or(ms > 3) AS slow',
                   'longest(path) AS longer MERGE WITH longer'])",
    ] {
        client.batch_execute(sql).unwrap();
    }
    // 1. co-located, the owner's, who is let in on the nodes.
    assert!(holds(
        &mut client,
        "SELECT count(DISTINCT colocation_id) = 1 AND count(*) = 5 AND bool_and(table_owner = 'beside')
         FROM citus_tables"
    ));
    // 2. merged by the nodes.
    let insert = "INSERT INTO ev (site, path, ms, at)
        SELECT i % 50, (ARRAY['/a', '/bb', NULL])[i % 3 + 1], i % 11, now() - i % 5 * interval '1 hour'
        FROM generate_series(1, 1000) AS i";
    for round in 1..=3 {
        client.batch_execute(insert).unwrap();
        let log = plans(&citus, &mut client, "SELECT * FROM spend_rollup_run()");
        let inserts = plans_of(&log, "INSERT INTO \"litellm_spend\".");
        assert_eq!(inserts.len(), 4, "two of each rollup: {log}");
        for plan in inserts {
            assert!(plan.contains("Custom Scan (Citus Adaptive)"), "{plan}");
            assert!(!plan.contains("INSERT/SELECT method"), "{plan}");
        }
        assert!(holds(
            &mut client,
            &format!(
                "SELECT bool_and(watermark = {0} AND committed_to = {0} - 1000) FROM litellm_spend.rollup",
                round * 1000
            )
        ));
        // A shard's rows of the rollup and of how far it is merged are of one transaction.
        assert!(holds(
            &mut client,
            "SELECT bool_and(success AND result IN ('0', '1')) AND count(*) = 8
             FROM run_command_on_colocated_placements('litellm_spend.ev_rollup', 'litellm_spend.ev_merged',
                 'SELECT count(DISTINCT xmin::text)
                  FROM (SELECT xmin FROM %s UNION ALL SELECT xmin FROM %s) AS both_tables')"
        ));
    }
    // 3. one more that is not merged, and a site that was not there before: shown by each node of its own.
    client.batch_execute(insert).unwrap();
    client.batch_execute("INSERT INTO ev (site, path, ms) VALUES (777, '/ccc', 9)").unwrap();
    let differs = "SELECT * FROM (
            SELECT path, site, date_trunc('hour', at, 'UTC') AS hour, count(*) AS n, sum(ms) AS ms, avg(ms) AS mean,
                min(ms) AS low, max(ms) FILTER (WHERE path <> '/a') AS high
            FROM ev GROUP BY 1, 2, 3 EXCEPT SELECT * FROM litellm_spend.ev) AS groups
        UNION ALL SELECT NULL, NULL, NULL, (SELECT count(*) FROM litellm_spend.ev), NULL, NULL, NULL, NULL
        WHERE (SELECT count(*) FROM litellm_spend.ev)
            <> (SELECT count(*) FROM (SELECT FROM ev GROUP BY path, site, date_trunc('hour', at)) AS groups)";
    assert_no_rows(client.query(differs, &[]).unwrap(), "the view differs");
    assert!(holds(
        &mut client,
        "SELECT sum(litellm_spend_rows) = 4001 AND max(longest) = '/ccc' AND bool_or(slow)
             AND count(*) FILTER (WHERE longest IS DISTINCT FROM longer) = 0
         FROM (SELECT s.*, n AS litellm_spend_rows FROM litellm_spend.states AS s
               JOIN (SELECT site, path, count(*) AS n FROM ev GROUP BY 1, 2) AS ev
                   ON ev.site = s.site AND ev.path IS NOT DISTINCT FROM s.path) AS joined"
    ));
    for (query, tasks) in
        [("SELECT * FROM litellm_spend.ev", 8), ("SELECT * FROM litellm_spend.states WHERE site = 7", 1)]
    {
        let plan = explained(&mut client, query);
        assert!(plan.contains(&format!("Task Count: {tasks}\n")), "{plan}");
        // The state of the rollup, which is here, goes to the nodes, and nothing comes back but groups.
        assert_eq!(plan.matches("Distributed Subplan").count(), 1, "{plan}");
        assert!(plan.starts_with("Custom Scan (Citus Adaptive)"), "{plan}");
    }
    // 4. compared by each node, in one snapshot of its own.
    for rollup in ["ev", "states"] {
        let log = plans(&citus, &mut client, &format!("SELECT spend_rollup_verify('{rollup}')"));
        let compared = plans_of(&log, "SELECT jsonb_build_object(");
        assert_eq!(compared.len(), 1, "{log}");
        assert!(!compared[0].contains("Aggregate"), "compared here: {}", compared[0]);
        assert_no_rows(
            client.query("SELECT * FROM spend_rollup_verify($1)", &[&rollup]).unwrap(),
            "the rollup differs",
        );
    }
    // 5. computed again by each node.
    client.batch_execute("UPDATE litellm_spend.ev_rollup SET n = n - 1 WHERE site = 7").unwrap();
    let found = client.query("SELECT * FROM spend_rollup_verify('ev')", &[]).unwrap();
    assert!(!found.is_empty());
    let log = plans(&citus, &mut client, "SELECT spend_rollup_rebuild('ev')");
    let refill = plans_of(&log, "INSERT INTO \"litellm_spend\".");
    assert_eq!(refill.len(), 1, "{log}");
    assert!(!refill[0].contains("INSERT/SELECT method"), "{}", refill[0]);
    assert_no_rows(client.query("SELECT * FROM spend_rollup_verify('ev')", &[]).unwrap(), "after a rebuild");
    assert_no_rows(client.query(differs, &[]).unwrap(), "after a rebuild");
    // 6. and dropped on all.
    client.batch_execute("SELECT spend_rollup_drop('ev'); SELECT spend_rollup_drop('states')").unwrap();
    let left = "SELECT sum(result::int)::bigint FROM run_command_on_all_nodes(
                    $$SELECT count(*) FROM pg_class WHERE relname ~ '^(ev|states)_(rollup|merged)'$$)";
    assert_eq!(value::<i64>(&mut client, left), 0);
}

#[test]
fn hll_and_topn_states_are_merged_and_shown_by_each_node() {
    if !server_has_it() || !server_has_hll_and_topn() {
        return;
    }
    // Nobody but the test merges.
    let Some(citus) = Citus::start_with(&["litellm_spend.merge_interval = '1h'"]) else { return };
    let mut client = citus.connect();
    for sql in visits("counter") {
        client.batch_execute(&sql).unwrap();
    }
    for sql in [
        "SET ROLE counter; SELECT create_distributed_table('visits', 'site', shard_count => 8); RESET ROLE",
        &visit(0, 4000, "2026-03-03"),
        CREATE_VISITS,
    ] {
        client.batch_execute(sql).unwrap();
    }
    assert_visits_exact(&mut client);
    // The days of the last are over.
    for (batch, day) in ["2026-03-03", "2026-03-04", "2026-03-01"].iter().enumerate() {
        let log = plans(&citus, &mut client, "SELECT * FROM spend_rollup_run()");
        let inserts = plans_of(&log, "INSERT INTO \"litellm_spend\".");
        assert_eq!(inserts.len(), 2, "the groups, and how far each value is merged: {log}");
        for plan in inserts {
            assert!(plan.contains("Custom Scan (Citus Adaptive)"), "{plan}");
            assert!(!plan.contains("INSERT/SELECT method"), "{plan}");
        }
        assert_eq!(watermark(&mut client, "visits_by_day"), 4000 + 3000 * batch as i64);
        assert_visits_exact(&mut client);
        client.batch_execute(&visit(4000 + 3000 * batch as u32, 3000, day)).unwrap();
        assert_visits_exact(&mut client);
    }
    // What a dashboard asks is answered by the nodes, too: of one site by its shard alone, of each by all.
    for (query, tasks) in [
        (
            "SELECT day, hll_cardinality(users), topn(pages, 3) FROM litellm_spend.visits_by_day WHERE site = 7",
            1,
        ),
        (
            "SELECT site, hll_cardinality(hll_union_agg(users)) FROM litellm_spend.visits_by_day GROUP BY site",
            8,
        ),
    ] {
        let plan = explained(&mut client, query);
        assert!(plan.contains(&format!("Task Count: {tasks}\n")), "{plan}");
        assert!(plan.starts_with("Custom Scan (Citus Adaptive)"), "{plan}");
    }
    // Of all sites together the states come here, and are united here.
    assert!(holds(
        &mut client,
        "SELECT (SELECT hll_union_agg(users)::text FROM litellm_spend.visits_by_day)
             = (SELECT hll_add_agg(hll_hash_bigint(user_id))::text FROM visits)"
    ));
    client.batch_execute("SELECT spend_rollup_rebuild('visits_by_day')").unwrap();
    assert_visits_exact(&mut client);
}

#[test]
fn the_tail_is_planned_as_a_small_part_of_the_source() {
    let Some(citus) = citus() else { return };
    let mut client = events(citus, "planned");
    client
        .batch_execute(
            "INSERT INTO events (site, x) SELECT 7, i FROM generate_series(1, 10000) AS i; ANALYZE events",
        )
        .unwrap();
    eventually("all is merged", || watermark(&mut client, "planned") == 10000);
    let plan = client.query("EXPLAIN SELECT * FROM litellm_spend.planned WHERE site = 7", &[]).unwrap();
    let plan: Vec<String> = plan.iter().map(|line| line.get(0)).collect();
    let scan = plan.iter().find(|line| line.contains("Scan") && line.contains(" on events_"));
    let scan = scan.unwrap_or_else(|| panic!("{plan:#?}"));
    // Not a third of them, for which the nodes start parallel workers where there are millions.
    let rows: u32 = scan.split("rows=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(rows <= 100, "{plan:#?}");
    // A dashboard may need another index than the key: it is one of the shards, and in no merge's way.
    client.batch_execute("CREATE INDEX ON litellm_spend.planned_rollup (n, site)").unwrap();
    client.batch_execute("INSERT INTO events (site, x) VALUES (7, 1), (8, 1)").unwrap();
    eventually("all is merged", || watermark(&mut client, "planned") == 10002);
    assert_eq!(value::<i64>(&mut client, "SELECT n FROM litellm_spend.planned_rollup WHERE site = 7"), 10001);
    assert_no_rows(client.query("SELECT * FROM spend_rollup_verify('planned')", &[]).unwrap(), "it differs");
}

#[test]
fn partitions_of_a_distributed_table_are_left_to_citus() {
    let Some(citus) = citus() else { return };
    let mut client = schema(citus, "times");
    for sql in [
        "CREATE TABLE flat (at timestamp NOT NULL, site int); CREATE INDEX ON flat (at)",
        "CREATE TABLE parted (at timestamp NOT NULL, site int) PARTITION BY RANGE (at)",
        "CREATE INDEX ON parted (at); CREATE TABLE before PARTITION OF parted FOR VALUES FROM ('2026-01-01') TO ('2026-01-02')",
        "CREATE TABLE late (LIKE parted) PARTITION BY RANGE (at)",
        "CREATE INDEX ON late (at); SELECT spend_partition_set('late', 'day', time_column => 'at', retention => '1 day')",
        "SELECT create_distributed_table(name, 'site', shard_count => 4) FROM unnest('{flat,parted,late}'::regclass[]) AS name",
        "INSERT INTO parted VALUES ('2026-01-01 10:00', 1)",
    ] {
        client.batch_execute(sql).unwrap();
    }
    for call in [
        "SELECT * FROM spend_partition_plan('flat', time_column => 'at')",
        "SELECT * FROM spend_partition_convert('flat', time_column => 'at')",
        "SELECT * FROM spend_partition_revert('parted')",
        "SELECT spend_partition_set('parted', 'day', time_column => 'at', retention => '1 day')",
    ] {
        assert_refused(&mut client, call, "0A000");
    }
    // Distributed since it has a policy: nothing is done to it, and that is said.
    client.batch_execute("SELECT spend_partition_maintain('late')").unwrap();
    let said =
        "SELECT problem || ' / ' || remedy FROM spend_health WHERE problem LIKE 'maintenance of %late%'";
    let said = value::<String>(&mut client, said);
    assert!(
        said.contains("\"late\" is distributed by Citus / Citus makes partitions and drops them"),
        "{said}"
    );
    let left = "SELECT count(*) FROM parted";
    assert_eq!(value::<i64>(&mut client, left), 1);
    client.batch_execute("SELECT spend_partition_set('late', 'none')").unwrap();
}

/// Runs a statement whose COMMIT PREPARED fails on a node: that is killed while the coordinator's own commit
/// waits for a standby that there is not.
fn commit_in_doubt(citus: &Citus, node: usize, sql: &str) -> i64 {
    let standby = |name| {
        let mut client = citus.connect();
        client.batch_execute(&format!("ALTER SYSTEM SET synchronous_standby_names = '{name}'")).unwrap();
        client.batch_execute("SELECT pg_reload_conf()").unwrap();
    };
    standby("nobody");
    std::thread::scope(|scope| {
        let mut committing = citus.connect();
        let committing = scope.spawn(move || {
            committing.batch_execute("SET synchronous_commit = on").unwrap();
            committing.batch_execute(sql).unwrap();
        });
        eventually("it has prepared on its nodes, and waits", || {
            let waits = "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
            holds(&mut citus.connect(), waits)
        });
        citus.nodes[node].crash_and_restart();
        standby("");
        committing.join().unwrap();
    });
    value(
        &mut citus.nodes[node].connect(DATABASE),
        "SELECT count(*) FROM pg_prepared_xacts WHERE gid LIKE 'citus%'",
    )
}

#[test]
fn a_merge_in_doubt_on_a_node_is_neither_lost_nor_doubled_and_the_next_waits_for_it() {
    let Some(citus) = Citus::start_with(&["litellm_spend.merge_interval = '1h'"]) else { return };
    let mut client = events(&citus, "halves");
    let insert = "INSERT INTO halves.events (site, x) SELECT i % 40, i FROM generate_series(1, 400) AS i";
    let run = "SELECT outcome FROM spend_rollup_run('halves')";
    let shown = "SELECT sum(n)::bigint FROM litellm_spend.halves";
    // 0. a call merges a window in its transaction, and the next when that is committed.
    client.batch_execute(insert).unwrap();
    client.batch_execute("SET litellm_spend.max_window = 200").unwrap();
    for merged in [200, 400] {
        assert_eq!(value::<String>(&mut client, run), "merged");
        assert_eq!(watermark(&mut client, "halves"), merged);
    }
    client.batch_execute(insert).unwrap();
    let in_doubt = commit_in_doubt(&citus, 2, run);
    assert!(in_doubt > 0, "no COMMIT PREPARED failed");
    // 1. merged as far as the coordinator knows, on one node of two.
    let mut client = citus.connect();
    client.batch_execute("SET search_path = halves, public").unwrap();
    assert_eq!(watermark(&mut client, "halves"), 800);
    let merged = "SELECT sum(n)::bigint FROM litellm_spend.halves_rollup";
    let half = value::<i64>(&mut client, merged);
    assert!(400 < half && half < 800, "{half} rows are merged");
    let exact = |client: &mut Client, rows: i64| {
        assert_eq!(value::<i64>(client, shown), rows);
        let found = client.query("SELECT * FROM spend_rollup_verify('halves')", &[]).unwrap();
        assert_no_rows(found, "the rollup differs");
    };
    exact(&mut client, 800);
    // 2. more rows, of a site that is on that node and was not there: no row's lock is in the way.
    let site: i32 = (1000..).find(|site| shard_of(&citus, &mut client, "events", *site).0 == 2).unwrap();
    client.batch_execute(&format!("INSERT INTO events (site, x) VALUES ({site}, 0)")).unwrap();
    assert_eq!(value::<String>(&mut client, run), "failed");
    assert_eq!(watermark(&mut client, "halves"), 800);
    exact(&mut client, 801);
    assert_refused(&mut client, "SELECT spend_rollup_rebuild('halves')", "55006");
    assert_refused(&mut client, "SELECT spend_rollup_drop('halves')", "55006");
    // 3. the worker says so, and goes on by itself.
    client.batch_execute("ALTER SYSTEM SET litellm_spend.merge_interval = '50ms'").unwrap();
    client.batch_execute("SELECT pg_reload_conf()").unwrap();
    eventually("the status names the node", || {
        let said = "SELECT last_error FROM spend_rollup_status WHERE rollup = 'halves'";
        let said = value::<Option<String>>(&mut client, said).unwrap_or_default();
        said.contains(&format!("is not committed on node {}", citus.address(2)))
            && said.contains("recover_prepared_transactions()")
    });
    exact(&mut client, 801);
    client.batch_execute("SELECT recover_prepared_transactions()").unwrap();
    eventually("it goes on", || watermark(&mut client, "halves") == 801);
    exact(&mut client, 801);
    assert_eq!(value::<i64>(&mut client, merged), 801);
    // 4. what a merge has prepared that was not committed: waited for, and undone.
    let (node, shard) = shard_of(&citus, &mut client, "litellm_spend.halves_rollup", 7);
    citus.nodes[node]
        .connect(DATABASE)
        .batch_execute(&format!(
            "SET citus.enable_manual_changes_to_shards = on;
             BEGIN; UPDATE {shard} SET n = n + 1; PREPARE TRANSACTION 'of_another_merge'"
        ))
        .unwrap();
    client.batch_execute(insert).unwrap();
    eventually("the status says so again", || {
        holds(
            &mut client,
            "SELECT last_error LIKE '%is not committed%' FROM spend_rollup_status WHERE rollup = 'halves'",
        )
    });
    exact(&mut client, 1201);
    citus.nodes[node].connect(DATABASE).batch_execute("ROLLBACK PREPARED 'of_another_merge'").unwrap();
    eventually("it goes on", || watermark(&mut client, "halves") == 1201);
    exact(&mut client, 1201);
    let said = "SELECT last_error IS NULL FROM spend_rollup_status WHERE rollup = 'halves'";
    eventually("nothing is wrong any more", || holds(&mut client, said));
    // 5. then the view reads nothing twice.
    eventually("all is known to be committed", || {
        holds(&mut client, "SELECT committed_to = watermark FROM litellm_spend.rollup WHERE name = 'halves'")
    });
    exact(&mut client, 1201);
}

#[test]
fn a_node_that_is_added_gets_shards_and_merges_them() {
    let Some(citus) = Citus::start() else { return };
    let mut client = citus.connect();
    client.batch_execute(&format!("SELECT citus_remove_node('{}', {PORT})", citus.address(2))).unwrap();
    let mut client = events(&citus, "wider");
    let stop = AtomicBool::new(false);
    let insert = "INSERT INTO wider.events (site, x) SELECT i % 40, i FROM generate_series(1, 400) AS i";
    std::thread::scope(|scope| {
        let _stop = RaiseOnDrop(&stop);
        again(scope, &citus, &stop, move |client, _| client.batch_execute(insert));
        eventually("rows are merged", || watermark(&mut client, "wider") > 0);
        for sql in [
            format!("SELECT citus_add_node('{}', {PORT})", citus.address(2)),
            "SELECT rebalance_table_shards(shard_transfer_mode => 'block_writes')".into(),
        ] {
            eventually("the node is added", || match client.batch_execute(&sql) {
                Ok(()) => true,
                Err(e) => {
                    eprintln!("{sql}: {e:?}");
                    false
                }
            });
        }
        assert!(holds(
            &mut client,
            "SELECT count(DISTINCT groupid) = 2 FROM pg_dist_placement JOIN pg_dist_shard USING (shardid)
             WHERE logicalrelid = 'litellm_spend.wider_rollup'::regclass"
        ));
        let before = watermark(&mut client, "wider");
        eventually("it goes on", || watermark(&mut client, "wider") > before + 2000);
    });
    let last: i64 = value(&mut client, "SELECT last_value FROM wider.events_id_seq");
    eventually("all is merged", || watermark(&mut client, "wider") == last);
    assert!(holds(
        &mut client,
        "SELECT (SELECT sum(n) FROM litellm_spend.wider_rollup) = (SELECT count(*) FROM wider.events)"
    ));
    assert_no_rows(client.query("SELECT * FROM spend_rollup_verify('wider')", &[]).unwrap(), "it differs");
}

#[test]
fn a_rollup_of_the_coordinators_own_keeps_no_node_from_being_added() {
    let Some(citus) = Citus::start() else { return };
    let mut client = citus.connect();
    client.batch_execute(&format!("SELECT citus_remove_node('{}', {PORT})", citus.address(2))).unwrap();
    let mut client = events(&citus, "grows");
    client
        .batch_execute(
            "CREATE TABLE plain (id bigserial, y int); INSERT INTO plain (y) VALUES (1), (2);
             SELECT spend_rollup_create('by_y', 'plain', '{y}', '{count(*) AS n}')",
        )
        .unwrap();
    client.batch_execute(&format!("SELECT citus_add_node('{}', {PORT})", citus.address(2))).unwrap();
    assert!(holds(&mut client, "SELECT sum(n) = 2 FROM litellm_spend.by_y"));
    // What a node would show is not what is true.
    for node in [1, 2] {
        let mut client = citus.nodes[node].connect(DATABASE);
        for view in ["litellm_spend.by_y", "litellm_spend.grows"] {
            assert_eq!(error(&mut client, &format!("SELECT * FROM {view}")).code().code(), "42P01");
        }
    }
}

#[test]
fn a_source_that_citus_takes_in_stops_its_rollup_and_does_not_end_it() {
    let Some(citus) = Citus::start() else { return };
    let mut client = citus.connect();
    client
        .batch_execute(
            "CREATE TABLE taken (id bigserial, y int); INSERT INTO taken (y) VALUES (1), (2);
             SELECT spend_rollup_create('by_y', 'taken', '{y}', '{count(*) AS n}')",
        )
        .unwrap();
    client.batch_execute("SELECT citus_add_local_table_to_metadata('taken')").unwrap();
    client.batch_execute("INSERT INTO taken (y) VALUES (3)").unwrap();
    let said = "SELECT last_error LIKE '%is a table of Citus''s that is not distributed by hash%' AND source IS NOT NULL
                FROM litellm_spend.rollup WHERE name = 'by_y'";
    eventually("it says so", || holds(&mut client, said));
}

/// After a failover of the coordinator to a standby that had not got all, say.
#[test]
fn what_a_shard_has_merged_already_is_not_merged_again() {
    let Some(citus) = citus() else { return };
    let mut client = events(citus, "failover");
    let insert = "INSERT INTO events (site, x) SELECT i % 7, i FROM generate_series(1, 100) AS i";
    for _ in 0..2 {
        client.batch_execute(insert).unwrap();
        let last: i64 = value(&mut client, "SELECT last_value FROM events_id_seq");
        eventually("all is merged", || watermark(&mut client, "failover") == last);
    }
    client
        .batch_execute(
            "UPDATE litellm_spend.rollup SET watermark = 100, committed_to = least(committed_to, 100) WHERE name = 'failover'",
        )
        .unwrap();
    client.batch_execute(insert).unwrap();
    eventually("all is merged", || watermark(&mut client, "failover") == 300);
    assert!(holds(&mut client, "SELECT sum(n) = 300 FROM litellm_spend.failover"));
    assert_no_rows(client.query("SELECT * FROM spend_rollup_verify('failover')", &[]).unwrap(), "it differs");
}

/// The same where the lost merge was larger than the windows are now, and numbers were lost, too.
#[test]
fn what_the_nodes_know_and_a_new_coordinator_does_not_is_neither_counted_twice_nor_lost() {
    let Some(citus) = Citus::start_with(&["litellm_spend.merge_interval = '1h'"]) else { return };
    let mut client = events(&citus, "behind");
    client
        .batch_execute("INSERT INTO events (site, x) SELECT i % 7, i FROM generate_series(1, 300) AS i")
        .unwrap();
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    assert_eq!(watermark(&mut client, "behind"), 300);
    let behind = "UPDATE litellm_spend.rollup SET watermark = 100, committed_to = 100 WHERE name = 'behind'";
    client.batch_execute(&format!("{behind}; SELECT setval('events_id_seq', 150)")).unwrap();

    // 1. numbers that it would give again.
    let mut other = citus.connect();
    let outcome = "SELECT outcome FROM spend_rollup_run('behind')";
    assert_eq!(value::<String>(&mut other, outcome), "failed");
    let said = "SELECT last_error LIKE 'sequence%was set back%up to 300%setval%300%' FROM litellm_spend.rollup WHERE name = 'behind'";
    assert!(holds(&mut other, said));
    client.batch_execute("SELECT setval('events_id_seq', 300)").unwrap();

    // 2. a rebuild would take what it does not know for unmerged.
    for force in ["false", "true"] {
        let rebuild = format!("SELECT spend_rollup_rebuild('behind', force => {force})");
        assert_refused(&mut other, &rebuild, "55000");
        assert!(error(&mut other, &rebuild).hint().unwrap().contains("spend_rollup_run()"));
    }

    // 3. smaller windows than the one that was lost.
    let n = "SELECT sum(n)::bigint FROM litellm_spend.behind";
    for _ in 0..5 {
        other.batch_execute("SET litellm_spend.max_window = 50; SELECT spend_rollup_run('behind')").unwrap();
        assert_eq!(value::<i64>(&mut client, n), 300);
    }
    assert_eq!(watermark(&mut client, "behind"), 300);
    client.batch_execute("SELECT spend_rollup_rebuild('behind')").unwrap();
    assert_eq!(value::<i64>(&mut client, n), 300);
    assert_no_rows(client.query("SELECT * FROM spend_rollup_verify('behind')", &[]).unwrap(), "it differs");
}

#[test]
fn a_node_that_cannot_prepare_fails_the_merge_and_not_the_worker() {
    let Some(citus) = Citus::start() else { return };
    let mut client = events(&citus, "unprepared");
    citus.nodes[2]
        .connect(DATABASE)
        .batch_execute("ALTER SYSTEM SET max_prepared_transactions = 20")
        .unwrap();
    citus.nodes[2].crash_and_restart();
    let mut on_node = citus.nodes[2].connect(DATABASE);
    for i in 0..20 {
        let prepare = format!("BEGIN; SELECT txid_current(); PREPARE TRANSACTION 'kept {i}'");
        on_node.batch_execute(&prepare).unwrap();
    }
    let mut other = citus.connect();
    other
        .batch_execute(
            "CREATE TABLE plain (id bigserial, y int); SELECT spend_rollup_create('zz_last', 'plain', '{y}', '{count(*) AS n}')",
        )
        .unwrap();
    let worker = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'litellm_spend worker' AND datname = current_database()";
    eventually("a worker has come", || holds(&mut other, &format!("SELECT EXISTS ({worker})")));
    let pid: i32 = value(&mut other, worker);
    // To one shard, which takes no second phase.
    eventually("a row is there", || {
        client.batch_execute("INSERT INTO events (site, x) VALUES (1, 1)").is_ok()
    });
    let said = "SELECT last_error LIKE '%maximum number of prepared transactions%' FROM litellm_spend.rollup WHERE name = 'unprepared'";
    eventually("it says so", || holds(&mut other, said));
    other.batch_execute("INSERT INTO plain (y) VALUES (1)").unwrap();
    let merged = "SELECT tail_rows = 0 FROM spend_rollup_status WHERE rollup = 'zz_last'";
    eventually("others are merged", || holds(&mut other, merged));
    assert_eq!(value::<i32>(&mut other, worker), pid, "the worker is the same");
}

/// The article's example on distributed tables, co-located as it says.
fn article() -> String {
    let distributed = [
        ("CREATE INDEX view_id_idx", "create_distributed_table('page_views', 'site_id', shard_count => 8)"),
        (
            "SELECT spend_rollup_register",
            "create_distributed_table('page_views_1min', 'site_id', colocate_with => 'page_views')",
        ),
    ];
    distributed.into_iter().fold(ARTICLE.into(), |article: String, (before, call)| {
        assert_eq!(article.matches(before).count(), 1, "{before}");
        article.replace(before, &format!("SELECT {call};\n    {before}"))
    })
}

fn insert(n: u32, age: &str) -> String {
    format!(
        "INSERT INTO page_views (site_id, path, client_ip, view_time)
         SELECT i % 50, '/page/' || i % 10, '127.0.0.1', now() - interval '{age}' FROM generate_series(1, {n}) AS i"
    )
}

/// What came of a statement: an error is a node that is away.
type Outcome = Result<(), postgres::Error>;

/// Writes as one of several writers do. After an error, whether the rows are there is the table's to say.
fn write(client: &mut Client, writer: u32, i: u32) -> Outcome {
    match writer {
        0 => {
            let mut rows = client.copy_in("COPY page_views (site_id, path, client_ip) FROM STDIN")?;
            for row in 0..100 {
                let _ = writeln!(rows, "{}\t/copied/{}\t10.0.0.1", row % 50, row % 7);
            }
            rows.finish().map(drop)
        }
        // A row alone is committed on its node in one phase, before the coordinator has.
        1 => client
            .batch_execute(&format!("INSERT INTO page_views (site_id, path) VALUES ({}, '/one')", i % 50)),
        _ => {
            let mut tx = client.transaction()?;
            tx.batch_execute(&insert(37, "30 days"))?;
            std::thread::sleep(Duration::from_millis(u64::from(i % 20)));
            if i.is_multiple_of(5) { tx.rollback() } else { tx.commit() }
        }
    }
}

/// Works until it is over, in a thread of its own; a connection that failed is made anew.
fn again<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    citus: &'scope Citus,
    stop: &'scope AtomicBool,
    mut work: impl FnMut(&mut Client, u32) -> Outcome + Send + 'scope,
) {
    scope.spawn(move || {
        let mut client = citus.connect();
        for i in 0u32.. {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            if work(&mut client, i).is_err() {
                std::thread::sleep(Duration::from_millis(50));
                if client.is_closed()
                    && let Some(new) = citus.try_connect()
                {
                    client = new;
                }
            }
        }
    });
}

#[test]
fn the_article_and_a_declared_rollup_are_exact_beside_writers_and_nodes_that_come_and_go() {
    let Some(citus) = Citus::start() else { return };
    let mut client = citus.connect();
    // Statement by statement: Citus sends on to the nodes what it gets.
    let file = citus.nodes[0].dir.join("article.sql");
    fs::write(&file, article()).unwrap();
    citus.nodes[0].psql(DATABASE, &["-q", "-v", "ON_ERROR_STOP=1", "-f", file.to_str().unwrap()]);
    client
        .batch_execute(
            "SELECT spend_rollup_create('views', 'page_views', '{site_id, path}', '{count(*) AS n}');
             SELECT spend_rollup_create('local_views', 'page_views', '{site_id, path}', '{count(*) AS n}',
                 distributed => false)",
        )
        .unwrap();
    let (stop, checks, windows) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
    let compared = AtomicU32::new(0);
    let mut in_doubt = 0_i64;
    std::thread::scope(|scope| {
        let _stop = RaiseOnDrop(&stop);
        for writer in 0..4 {
            again(scope, &citus, &stop, move |client, i| write(client, writer, i));
        }
        for _ in 0..2 {
            let windows = &windows;
            again(scope, &citus, &stop, move |client, _| {
                let row = client.query_one("SELECT * FROM do_page_view_aggregation()", &[])?;
                windows.fetch_add(u32::from(row.get::<_, i64>(0) <= row.get::<_, i64>(1)), Ordering::Relaxed);
                Ok(())
            });
        }
        {
            let checks = &checks;
            again(scope, &citus, &stop, move |client, _| {
                // One statement over tables of the coordinator's is one snapshot: what is merged, and up to
                // where.
                let row = client.query_one(
                    "SELECT watermark, (SELECT coalesce(sum(n), 0)::bigint FROM litellm_spend.local_views_rollup)
                     FROM litellm_spend.rollup WHERE name = 'local_views'",
                    &[],
                )?;
                let (watermark, merged): (i64, i64) = (row.get(0), row.get(1));
                let there =
                    client.query_one("SELECT count(*) FROM page_views WHERE view_id <= $1", &[&watermark])?;
                assert_eq!(merged, there.get::<_, i64>(0), "up to {watermark}");
                let live = client
                    .query_one("SELECT coalesce(sum(n), 0)::bigint FROM litellm_spend.local_views", &[])?;
                let by_hand = client
                    .query_one("SELECT coalesce(sum(view_count), 0)::bigint FROM page_views_1min", &[])?;
                let there = client.query_one("SELECT count(*) FROM page_views", &[])?.get::<_, i64>(0);
                assert!(
                    live.get::<_, i64>(0) <= there && by_hand.get::<_, i64>(0) <= there,
                    "ahead of the rows"
                );
                checks.fetch_add(1, Ordering::Relaxed);
                Ok(())
            });
        }
        // The distributed rollup is compared by each shard in one snapshot: neither ahead nor behind.
        again(scope, &citus, &stop, |client, _| {
            let differing = client.query(VIEWS_AGAINST_ROWS, &[])?;
            assert_no_rows(differing, "the live view and the rows differ");
            let differing = client.query("SELECT * FROM spend_rollup_verify('views')", &[])?;
            assert_no_rows(differing, "verify");
            compared.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        let pause = |seconds| std::thread::sleep(Duration::from_secs(seconds));
        pause(2);
        // 1. a node stands still.
        citus.signal(1, "-STOP");
        pause(3);
        citus.signal(1, "-CONT");
        pause(2);
        // 2. a node is killed between PREPARE TRANSACTION and COMMIT PREPARED.
        in_doubt = commit_in_doubt(&citus, 2, &insert(500, "0"));
        // 3. it stays in doubt for a while, and is recovered.
        pause(3);
        eventually("what was in doubt is recovered", || {
            citus.connect().batch_execute("SELECT recover_prepared_transactions()").is_ok()
        });
        // 4. a shard moves, with those that are co-located.
        eventually("a shard has moved", || {
            let mut client = citus.connect();
            let (node, _) = shard_of(&citus, &mut client, "page_views", 7);
            let sql = format!(
                "SET lock_timeout = '20s';
                 SELECT citus_move_shard_placement(get_shard_id_for_distribution_column('page_views', 7),
                     '{}', {PORT}, '{}', {PORT}, 'block_writes')",
                citus.address(node),
                citus.address(3 - node)
            );
            match client.batch_execute(&sql) {
                Ok(()) => true,
                Err(e) => {
                    eprintln!("move: {e}");
                    false
                }
            }
        });
        eventually("all that is beside it was often enough", || {
            [&windows, &checks, &compared].iter().all(|count| count.load(Ordering::Relaxed) > 10)
        });
    });
    eprintln!(
        "{} windows, {} checks, {} comparisons, {in_doubt} in doubt",
        windows.load(Ordering::Relaxed),
        checks.load(Ordering::Relaxed),
        compared.load(Ordering::Relaxed)
    );
    assert!(in_doubt > 0, "no COMMIT PREPARED failed");
    let mut client = citus.connect();
    client.batch_execute("SELECT recover_prepared_transactions()").unwrap();
    let last: i64 = value(&mut client, "SELECT last_value FROM page_views_view_id_seq");
    let began = Instant::now();
    eventually("all is aggregated", || {
        client.batch_execute("SELECT do_page_view_aggregation()").unwrap();
        ["page_views_1min_rollup", "views", "local_views"]
            .iter()
            .all(|name| watermark(&mut client, name) == last)
    });
    eprintln!("after {:?}", began.elapsed());
    let differing = client
        .query(
            "SELECT * FROM (SELECT site_id, path, sum(view_count)::bigint AS n FROM page_views_1min GROUP BY 1, 2) a
             FULL JOIN (SELECT site_id, path, count(*) AS e FROM page_views GROUP BY 1, 2) e USING (site_id, path)
             WHERE n IS DISTINCT FROM e",
            &[],
        )
        .unwrap();
    assert_no_rows(differing, "page_views_1min differs");
    for rollup in ["views", "local_views"] {
        let differing = client.query("SELECT * FROM spend_rollup_verify($1)", &[&rollup]).unwrap();
        assert_no_rows(differing, rollup);
    }
    assert_no_rows(client.query(VIEWS_AGAINST_ROWS, &[]).unwrap(), "the live view and the rows differ");
}

/// One statement, which each shard answers by itself.
const VIEWS_AGAINST_ROWS: &str = "
    SELECT coalesce(v.site_id, e.site_id)::text AS site, v.n, e.n
    FROM (SELECT site_id, sum(n)::bigint AS n FROM litellm_spend.views GROUP BY site_id) AS v
    FULL JOIN (SELECT site_id, count(*) AS n FROM page_views GROUP BY site_id) AS e ON e.site_id = v.site_id
    WHERE v.n IS DISTINCT FROM e.n";

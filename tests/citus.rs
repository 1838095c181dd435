//! Rollups of tables that Citus distributes: a coordinator and two nodes on this machine. Where the server
//! has no Citus, each test says so and does nothing: `make test-citus` with PG_BIN of one that has.

mod common;

use common::*;
use postgres::Client;
use std::fs;
use std::io::Write;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The coordinator, then its nodes. All listen on one port, each at an address of its own.
struct Citus {
    nodes: Vec<Cluster>,
    number: u32,
}

/// Says so where it has not.
fn server_has_it() -> bool {
    let output = Command::new(std::env::var("PG_CONFIG").unwrap_or_else(|_| "pg_config".into()))
        .arg("--pkglibdir")
        .output()
        .unwrap();
    let library = format!("{}/citus.so", String::from_utf8(output.stdout).unwrap().trim());
    let found = fs::exists(&library).unwrap();
    if !found {
        skipped(&format!("this server has no Citus ({library})"));
    }
    found
}

const DATABASE: &str = "events";

impl Citus {
    fn start() -> Option<Citus> {
        if !server_has_it() {
            return None;
        }
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let address = |node| address(number, node);
        let nodes: Vec<Cluster> = (0..3)
            .map(|i| {
                let node = Cluster::start(&[
                    "shared_preload_libraries = 'citus,litellm_spend'",
                    &format!("listen_addresses = '{}'", address(i)),
                    "citus.node_conninfo = 'sslmode=disable'",
                    // Where a move of shards connects to this node itself.
                    &format!("citus.local_hostname = '{}'", address(i)),
                    // So that a test sees what is in doubt, and ends it by itself.
                    "citus.recover_2pc_interval = -1",
                    "synchronous_commit = local",
                ]);
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

/// A distributed table of a role's that is no superuser, and a declared rollup of it.
fn events(citus: &Citus, name: &str) -> Client {
    let mut client = schema(citus, name);
    // Two at a time can be in each other's way on the nodes.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
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
    let said = citus.nodes[0].notices(DATABASE, call);
    assert!(said.contains("NOTICE:  rollup \"kind\" is a table of this node"), "{said}");
    client.batch_execute("INSERT INTO parted (x) SELECT i FROM generate_series(1, 50) AS i").unwrap();
    client.batch_execute("INSERT INTO parted_1 (x) VALUES (1)").unwrap();
    eventually("it is merged", || watermark(&mut client, "kind") == 51);
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.kind"), 51);
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
            "SELECT spend_rollup_create('views', 'page_views', '{site_id, path}', '{count(*) AS n}')",
        )
        .unwrap();
    let (stop, checks, windows) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
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
                    "SELECT watermark, (SELECT coalesce(sum(n), 0)::bigint FROM litellm_spend.views_rollup)
                     FROM litellm_spend.rollup WHERE name = 'views'",
                    &[],
                )?;
                let (watermark, merged): (i64, i64) = (row.get(0), row.get(1));
                let there =
                    client.query_one("SELECT count(*) FROM page_views WHERE view_id <= $1", &[&watermark])?;
                assert_eq!(merged, there.get::<_, i64>(0), "up to {watermark}");
                let live =
                    client.query_one("SELECT coalesce(sum(n), 0)::bigint FROM litellm_spend.views", &[])?;
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
        let pause = |seconds| std::thread::sleep(Duration::from_secs(seconds));
        pause(2);
        // 1. a node stands still.
        citus.signal(1, "-STOP");
        pause(3);
        citus.signal(1, "-CONT");
        pause(2);
        // 2. a node is killed between PREPARE TRANSACTION and COMMIT PREPARED: the coordinator's own commit
        //    waits for a standby that there is not.
        let standby = |name| {
            let mut client = citus.connect();
            client.batch_execute(&format!("ALTER SYSTEM SET synchronous_standby_names = '{name}'")).unwrap();
            client.batch_execute("SELECT pg_reload_conf()").unwrap();
        };
        standby("nobody");
        let mut committing = citus.connect();
        let committing = scope.spawn(move || {
            committing.batch_execute("SET synchronous_commit = on").unwrap();
            committing.batch_execute(&insert(500, "0")).unwrap();
        });
        eventually("it has prepared on its nodes, and waits", || {
            let waits = "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
            holds(&mut citus.connect(), waits)
        });
        citus.nodes[2].crash_and_restart();
        standby("");
        committing.join().unwrap();
        in_doubt = value(
            &mut citus.nodes[2].connect(DATABASE),
            "SELECT count(*) FROM pg_prepared_xacts WHERE gid LIKE 'citus%'",
        );
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
        pause(2);
    });
    eprintln!(
        "{} windows, {} checks, {in_doubt} in doubt",
        windows.load(Ordering::Relaxed),
        checks.load(Ordering::Relaxed)
    );
    assert!(in_doubt > 0, "no COMMIT PREPARED failed");
    assert!(windows.load(Ordering::Relaxed) > 10 && checks.load(Ordering::Relaxed) > 10);
    let mut client = citus.connect();
    client.batch_execute("SELECT recover_prepared_transactions()").unwrap();
    let last: i64 = value(&mut client, "SELECT last_value FROM page_views_view_id_seq");
    let began = Instant::now();
    eventually("all is aggregated", || {
        client.batch_execute("SELECT do_page_view_aggregation()").unwrap();
        watermark(&mut client, "page_views_1min_rollup") == last && watermark(&mut client, "views") == last
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
    let differing = client.query("SELECT * FROM spend_rollup_verify('views')", &[]).unwrap();
    assert_no_rows(differing, "views differs");
}

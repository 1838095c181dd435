//! LiteLLM 1.110 writes rows of its log from one JSON parameter, in one transaction with deliveries, from
//! which it counts the spend of keys and teams. Its tables and statements are those of its package
//! (scripts/litellm_fixtures.py).

mod common;

use common::*;
use postgres::Client;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const WRITERS: usize = 4;
const TRANSACTIONS: usize = 30;
/// In each transaction, for one writer alone; and for all, each of which tries to write them.
const ROWS: usize = 16;
const SHARED: usize = 8;

#[test]
fn rows_beside_deliveries_are_captured_exactly_on_a_plain_table() {
    not_at_midnight();
    let db = database();
    write_and_compare(&db);
}

#[test]
fn rows_beside_deliveries_are_captured_exactly_on_a_converted_table() {
    not_at_midnight();
    let db = database();
    let mut client = db.connect();
    client.batch_execute("SELECT spend_partition_convert(cutover => now() + interval '1 hour')").unwrap();
    wait_until_converted(&mut client);
    write_and_compare(&db);
}

/// What opens a key's or a team's budget window leaves out the rows whose delivery is not applied. The report
/// of the docs counts them.
#[test]
fn a_budget_window_is_the_report_once_all_deliveries_are_applied() {
    not_at_midnight();
    let db = database();
    let mut proxy = Proxy::new(&db, "proxy".into());
    let requests: Vec<_> = (0..200).map(|i| (format!("request {i}"), false)).collect();
    assert_eq!(proxy.write(&requests, true).len(), 200);
    let mut client = db.connect();
    wait_until_merged(&mut client);

    let queries: Value = serde_json::from_str(&fs::read_to_string(fixture("reports.json")).unwrap()).unwrap();
    let docs = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reports.md")).unwrap();
    let ours = docs.split_once("<!-- report: budget_window -->").unwrap().1.split_once("```sql\n").unwrap().1;
    let ours = ours.split_once("\n```").unwrap().0;
    let start = chrono::Utc::now() - chrono::Days::new(5);
    let start = start.date_naive().and_hms_opt(7, 0, 0).unwrap().and_utc();
    let mut differences = |not_applied: &str| -> Vec<f64> {
        let mut difference = |kind: &str, whose: &str, key: Option<&str>, team: Option<&str>| {
            let own = queries[format!("budget_window_1_110.{kind}")].as_str().unwrap();
            let own: f64 = client.query_one(own, &[&whose, &start]).unwrap().get("total");
            let ours: f64 = client.query_one(ours, &[&start, &key, &team]).unwrap().get("total");
            let left_out: f64 = client
                .query_one(
                    &format!(
                        r#"SELECT coalesce(sum(spend), 0.0) FROM "LiteLLM_SpendLogs" WHERE {kind_column} = $1
                           AND "startTime" >= ($2::timestamptz AT TIME ZONE 'UTC') AND {not_applied}"#,
                        kind_column = if kind == "key" { "api_key" } else { "team_id" }
                    ),
                    &[&whose, &start],
                )
                .unwrap()
                .get(0);
            assert!((ours - own - left_out).abs() < 1e-9, "{kind}: {ours} is not {own} and {left_out}");
            ours - own
        };
        vec![difference("key", "key1", Some("key1"), None), difference("team", "team2", None, Some("team2"))]
    };
    assert!(differences("true").iter().all(|difference| *difference > 0.0), "all are pending");
    let apply = r#"UPDATE "LiteLLM_SpendLogDelivery" SET state = 'applied' WHERE request_id ~ '[13579]$'"#;
    proxy.client.batch_execute(apply).unwrap();
    assert!(differences("request_id !~ '[13579]$'").iter().all(|difference| *difference > 0.0));
    proxy.client.batch_execute(r#"UPDATE "LiteLLM_SpendLogDelivery" SET state = 'applied'"#).unwrap();
    assert!(differences("false").iter().all(|difference| difference.abs() < 1e-9));
}

/// LiteLLM's start with --use_prisma_db_push.
#[test]
fn prisma_db_push_makes_the_tables_of_1_110_and_leaves_ours_alone() {
    let Some(prisma) = Prisma::find() else { return };
    let (pushed, read) = (shared().database().attached(), database());
    let mut client = pushed.connect();
    make_own_views(&mut client);
    client
        .batch_execute(&format!(
            "{}; SELECT spend_index_set(indexes => '{{user, team}}', hot => true)",
            insert_rows("r", 500, 20)
        ))
        .unwrap();
    eventually("the indexes are built", || {
        holds(&mut client, "SELECT count(*) = 2 AND bool_and(state = 'built') FROM spend_index_status")
    });
    let before = ours(&mut client);
    assert!(before.len() > 50, "{before:#?}");
    prisma.push(&pushed).unwrap();
    assert_same(&before, &ours(&mut client));
    assert_views_equal_raw(&mut client);

    let mut other = read.connect();
    // Or scripts/litellm_fixtures.py reads schema.prisma wrongly.
    assert_same(&litellms(&mut client), &litellms(&mut other));
    prisma.push(&pushed).unwrap();
    assert_same(&before, &ours(&mut client));
    write_and_compare(&pushed);
}

#[test]
fn prisma_db_push_fails_on_a_converted_table_and_leaves_it_as_it_is() {
    let Some(prisma) = Prisma::find() else { return };
    let db = shared().database().attached();
    let mut client = db.connect();
    make_own_views(&mut client);
    client.batch_execute(&insert_rows("r", 500, 20)).unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_converted(&mut client);
    eventually("all partitions are there", || {
        holds(&mut client, "SELECT bool_and(partitions_ahead >= precreate) FROM spend_partition_status")
    });
    let (before, tables) = (ours(&mut client), litellms(&mut client));
    let said = prisma.push(&db).unwrap_err();
    assert!(
        said.contains("unique constraint on partitioned table must include all partitioning columns"),
        "{said}"
    );
    assert_same(&before, &ours(&mut client));
    assert_same(&tables, &litellms(&mut client));
    let told = "SELECT count(*) FROM spend_upgrade_check('1.110.2') WHERE by LIKE '--use_prisma_db_push%'";
    assert_eq!(value::<i64>(&mut client, told), 1);
    assert_views_equal_raw(&mut client);
    assert_exact(&mut client);
}

/// The schema engine of LiteLLM's tools.
struct Prisma {
    folder: PathBuf,
}

impl Prisma {
    fn find() -> Option<Prisma> {
        let folder = fixture("prisma");
        let found = folder.join("node_modules/.bin/prisma").exists();
        if !found {
            skipped("without npm there is no engine of Prisma's");
        }
        found.then_some(Prisma { folder })
    }

    /// What it said is the error.
    fn push(&self, db: &Database) -> Result<(), String> {
        let url =
            format!("postgresql://{LITELLM}@localhost:{PORT}/{}?host={}", db.name, db.cluster.dir.display());
        let mut push = Command::new(self.folder.join("node_modules/.bin/prisma"))
            .current_dir(&self.folder)
            .args(["db", "push", "--accept-data-loss", "--skip-generate"])
            .env("DATABASE_URL", url)
            // None of what it would download.
            .envs([
                ("PRISMA_SCHEMA_ENGINE_BINARY", "/bin/true"),
                ("PRISMA_QUERY_ENGINE_LIBRARY", "/bin/true"),
            ])
            .env("CHECKPOINT_DISABLE", "1")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(push.stdout.take().unwrap()).lines();
        let done = said.map_while(Result::ok).any(|line| line.contains("in sync with "));
        // It would wait for another minute.
        let _ = push.kill();
        let output = push.wait_with_output().unwrap();
        if done { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }
}

/// What is ours, in the table and beside it.
fn ours(client: &mut Client) -> Vec<String> {
    list(
        client,
        r#"SELECT 'trigger ' || pg_get_triggerdef(oid) FROM pg_trigger WHERE tgname LIKE 'litellm\_spend%'
           UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND indexname LIKE 'litellm\_spend%'
           UNION ALL SELECT c.oid::regclass || ' ' || c.relkind::text || ' ' || c.relowner::regrole::text
                     FROM pg_class c WHERE c.relnamespace = 'litellm_spend'::regnamespace
           UNION ALL SELECT viewname || viewowner || definition FROM pg_views WHERE schemaname = 'public'
           UNION ALL SELECT oid::regprocedure::text FROM pg_proc WHERE proname LIKE 'spend\_%'"#,
    )
}

/// The tables that LiteLLM writes the log to: columns and indexes.
fn litellms(client: &mut Client) -> Vec<String> {
    list(
        client,
        r#"SELECT concat_ws(' ', c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
                            pg_get_expr(d.adbin, d.adrelid))
           FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
           LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
           WHERE c.oid IN (to_regclass('"LiteLLM_SpendLogs"'), to_regclass('"LiteLLM_SpendLogDelivery"'))
             AND a.attnum > 0 AND NOT a.attisdropped
           UNION ALL SELECT indexdef FROM pg_indexes
           WHERE tablename IN ('LiteLLM_SpendLogs', 'LiteLLM_SpendLogDelivery') AND indexname NOT LIKE 'litellm\_spend%'"#,
    )
}

fn assert_same(expected: &[String], found: &[String]) {
    let only = |these: &[String], others: &[String]| -> Vec<String> {
        these.iter().filter(|line| !others.contains(line)).cloned().collect()
    };
    let (gone, new) = (only(expected, found), only(found, expected));
    assert!(gone.is_empty() && new.is_empty(), "gone: {gone:#?}\nnew: {new:#?}");
}

fn list(client: &mut Client, sql: &str) -> Vec<String> {
    client.query(&format!("{sql} ORDER BY 1"), &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

/// With the tables of 1.110, LiteLLM's own views in a schema of their own, and the log attached.
fn database() -> Database {
    let db = shared().database();
    let tables = fixture("1.110.sql");
    shared().psql(
        &db.name,
        &[
            "-q",
            "-U",
            LITELLM,
            "-v",
            "ON_ERROR_STOP=1",
            "-c",
            "SET client_min_messages = warning",
            "-f",
            tables.to_str().unwrap(),
        ],
    );
    make_own_views(&mut db.connect());
    db.attached_with_reports()
}

fn make_own_views(client: &mut Client) {
    let views = fs::read_to_string(fixture("views.sql")).unwrap();
    client
        .batch_execute(&format!(
            "CREATE SCHEMA own; SET search_path = own, public; {views}; RESET search_path"
        ))
        .unwrap();
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/litellm").join(name)
}

// ---- LiteLLM ---------------------------------------------------------------------------------------------

/// A row as LiteLLM's proxy has it, always the same of one id: every column, of which most are NULL.
fn row(columns: &[String], id: &str) -> Value {
    let number = id.bytes().fold(7_u64, |hash, byte| (hash * 31 + u64::from(byte)) % 1_000_003);
    let start = chrono::Utc::now().date_naive() - chrono::Days::new(1 + number % 10);
    let time =
        |second: u64| format!("{start}T{:02}:{:02}:{:02}.123456+00:00", number % 24, number % 60, second);
    let mut row: serde_json::Map<String, Value> = columns.iter().map(|c| (c.clone(), Value::Null)).collect();
    let known = json!({
        "request_id": id, "call_type": "acompletion", "api_key": format!("key{}", number % 5), "spend": number as f64 / 1e6,
        "total_tokens": 30, "prompt_tokens": 10, "completion_tokens": 20, "startTime": time(1), "endTime": time(2),
        "model": format!("gpt-{}", number % 3), "user": format!("user{}", number % 7), "team_id": format!("team{}", number % 4),
        "end_user": format!("end{}", number % 3), "status": "success", "metadata": {"usage": {"tokens": 30}},
        "request_tags": ["prod", format!("tag{}", number % 3)], "created_at": time(3), "updated_at": time(3),
    });
    row.extend(known.as_object().unwrap().clone());
    row.into()
}

/// One proxy, with its statements.
struct Proxy {
    name: String,
    client: Client,
    spend_log: String,
    delivery: String,
    columns: Vec<String>,
}

impl Proxy {
    fn new(db: &Database, name: String) -> Proxy {
        let text = fs::read_to_string(fixture("1.110.json")).unwrap();
        let statements: Value = serde_json::from_str(&text).unwrap();
        let text = |key: &str| statements[key].as_str().unwrap().to_string();
        let (spend_log, delivery) = (text("spend_log"), text("delivery"));
        assert!(
            spend_log.contains("jsonb_populate_recordset") && spend_log.contains("ON CONFLICT DO NOTHING")
        );
        let columns = spend_log.split_once('(').unwrap().1.split_once(')').unwrap().0;
        let columns = columns.split(", ").map(|column| column.trim_matches('"').to_string()).collect();
        Proxy { name, client: db.cluster.connect_as(&db.name, LITELLM), spend_log, delivery, columns }
    }

    /// Rows of the log, each with its delivery. Of a batch's cost row the delivery has the request's id, and
    /// so there is one only; of others each proxy makes an id. Returns the requests that were new to the log.
    fn write(&mut self, requests: &[(String, bool)], commit: bool) -> Vec<String> {
        let mut ledger: Vec<_> = requests
            .iter()
            .map(|(id, is_batch)| {
                let delivery = if *is_batch { id.clone() } else { format!("{id} of {}", self.name) };
                json!({"delivery_id": delivery, "request_id": id, "accounting_payload": {"spend": 1}, "is_batch": is_batch})
            })
            .collect();
        ledger.sort_by_key(|delivery| delivery["delivery_id"].to_string());
        let mut tx = self.client.transaction().unwrap();
        let accepted = tx.query(&self.delivery, &[&Value::from(ledger.clone())]).unwrap();
        let accepted: BTreeSet<String> = accepted.iter().map(|row| row.get(0)).collect();
        let rows: Vec<Value> = ledger
            .iter()
            .filter(|delivery| accepted.contains(delivery["delivery_id"].as_str().unwrap()))
            .map(|delivery| row(&self.columns, delivery["request_id"].as_str().unwrap()))
            .collect();
        let written = tx.query(&self.spend_log, &[&Value::from(rows)]).unwrap();
        if !commit {
            tx.rollback().unwrap();
            return vec![];
        }
        tx.commit().unwrap();
        written.iter().map(|row| row.get(0)).collect()
    }

    /// Everything that it has to write. Some transactions are rolled back and tried again, some are tried
    /// again though they were not.
    fn run(&mut self) -> Vec<String> {
        let mut written = vec![];
        for number in 0..TRANSACTIONS {
            let own = (0..ROWS).map(|i| (format!("{} {number} {i}", self.name), false));
            let shared = (0..SHARED).map(|i| (format!("shared {number} {i}"), i % 2 == 0));
            let requests: Vec<_> = own.chain(shared).collect();
            if number % 5 == 0 {
                self.write(&requests, false);
            }
            written.extend(self.write(&requests, true));
            if number % 7 == 0 {
                assert_eq!(self.write(&requests, true), Vec::<String>::new());
            }
        }
        written
    }
}

// ---- what is compared ------------------------------------------------------------------------------------

fn write_and_compare(db: &Database) {
    let mut client = db.connect();
    let rows = r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#;
    let before: i64 = value(&mut client, rows);
    let (mut compared, mut written) = (0, vec![]);
    std::thread::scope(|scope| {
        let proxies: Vec<_> =
            (0..WRITERS).map(|i| scope.spawn(move || Proxy::new(db, format!("proxy{i}")).run())).collect();
        // Beside the writers and the worker.
        while !proxies.iter().all(|proxy| proxy.is_finished()) {
            assert_views_equal_raw(&mut client);
            compared += 1;
        }
        written = proxies.into_iter().flat_map(|proxy| proxy.join().unwrap()).collect();
    });
    assert!(compared > 0, "nothing was compared beside the writers");
    let all = (WRITERS * ROWS + SHARED) * TRANSACTIONS;
    assert_eq!(written.len(), all, "each request was written by one of them");
    assert_eq!(written.iter().collect::<BTreeSet<_>>().len(), all);
    assert_eq!(value::<i64>(&mut client, rows), before + all as i64);

    assert_views_equal_raw(&mut client);
    wait_until_merged(&mut client);
    assert_views_equal_raw(&mut client);
    assert_exact(&mut client);
    assert_eq!(capture_errors(&mut client), 0);
}

/// Each view, which reads the rollups, and LiteLLM's own, which reads the log, have the same rows in one
/// snapshot.
fn assert_views_equal_raw(client: &mut Client) {
    let views = client
        .query("SELECT name, installed IS NOT NULL FROM litellm_spend.public_view ORDER BY 1", &[])
        .unwrap();
    assert_eq!(views.len(), 7);
    for view in views {
        let (view, live): (String, bool) = (view.get(0), view.get(1));
        assert!(live, "{view} does not read the rollups");
        // LiteLLM adds up as double precision, in the order of the rows.
        let columns: String = client
            .query_one(
                "SELECT string_agg(CASE WHEN atttypid = 'float8'::regtype THEN format('round(%1$I::numeric, 7)', attname)
                                        ELSE quote_ident(attname) END, ', ' ORDER BY attnum)
                 FROM pg_attribute WHERE attrelid = format('own.%I', $1::text)::regclass AND attnum > 0",
                &[&view],
            )
            .unwrap()
            .get(0);
        let rows = client
            .query(
                &format!(
                    r#"WITH ours AS MATERIALIZED (SELECT {columns} FROM public."{view}"),
                            own AS MATERIALIZED (SELECT {columns} FROM own."{view}")
                       SELECT to_jsonb(d) FROM ((TABLE ours EXCEPT ALL TABLE own) UNION ALL (TABLE own EXCEPT ALL TABLE ours)) AS d"#
                ),
                &[],
            )
            .unwrap();
        assert_no_rows(rows, &view);
    }
}

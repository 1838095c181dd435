//! After a crash nothing is lost and nothing counted twice; what was under way goes on.

mod common;

use common::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// A cluster and a database of its own: it will be killed.
fn own(settings: &[&str]) -> Database {
    let cluster = own_cluster(settings);
    cluster.litellm_database()
}

fn worker_pid(db: &Database) -> Option<i32> {
    let mut client = db.cluster.try_connect(&db.name, "postgres").ok()?;
    let sql = "SELECT pid FROM spend_worker_status WHERE database = current_database() AND kind = 'litellm_spend worker'";
    client.query_opt(sql, &[]).ok()?.map(|r| r.get(0))
}

/// Inserts for ever, through crashes; keeps count of what the server has confirmed.
fn write_through_crashes(db: &Database, writer: u32, stop: &AtomicBool, confirmed: &AtomicU64) {
    let mut client = None;
    for i in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let Some(c) = client.as_mut() else {
            client = db.cluster.try_connect(&db.name, "postgres").ok();
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        let insert = insert_rows(&format!("c{writer}-{i}-"), 10, 20);
        match c.execute(insert.as_str(), &[]) {
            Ok(n) => drop(confirmed.fetch_add(n, Ordering::Relaxed)),
            Err(_) => client = None,
        }
    }
}

fn survives(crashes: usize, crash: impl Fn(&Database, usize)) {
    // With fsync, or a crash of the machine's cache would be tested.
    let db = own(&["litellm_spend.merge_interval = '10ms'", "restart_after_crash = on"]);
    let mut client = db.connect();
    client.batch_execute("CREATE EXTENSION litellm_spend").unwrap();
    // Sixty days: the backfill is under way when the first crashes come.
    client.batch_execute(&insert_rows("old", 60_000, 60)).unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    let (stop, confirmed) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let _stop = RaiseOnDrop(&stop);
        for writer in 0..2 {
            let (db, stop, confirmed) = (&db, &stop, &confirmed);
            scope.spawn(move || write_through_crashes(db, writer, stop, confirmed));
        }
        for i in 0..crashes {
            std::thread::sleep(Duration::from_millis(100 + 37 * i as u64 % 200));
            crash(&db, i);
            eventually("the server answers", || db.cluster.try_connect(&db.name, "postgres").is_ok());
            // Exact at once, before any worker has done anything.
            let mut client = db.connect();
            assert_no_rows(
                client.query(VIEW_AGAINST_RAW, &[]).unwrap(),
                "view and raw rows differ after a crash",
            );
        }
    });
    let mut client = db.connect();
    wait_until_live(&mut client);
    wait_until_merged(&mut client);
    assert_exact(&mut client);
    let rows: i64 =
        value(&mut client, r#"SELECT count(*) FROM "LiteLLM_SpendLogs" WHERE request_id LIKE 'c%'"#);
    assert!(rows >= confirmed.load(Ordering::Relaxed) as i64 && rows > 0);
    let requests: i64 = value(&mut client, REQUESTS);
    assert_eq!(requests, rows + 60_000);
}

#[test]
fn a_killed_worker_loses_and_doubles_nothing() {
    survives(10, |db, _| {
        eventually("there is a worker", || worker_pid(db).is_some());
        // In the middle of something, as a rule.
        std::thread::sleep(Duration::from_millis(30));
        let mut worker = None;
        eventually("there is one still", || {
            worker = worker_pid(db);
            worker.is_some()
        });
        kill(worker.unwrap());
    });
}

#[test]
fn a_killed_postmaster_loses_and_doubles_nothing() {
    survives(10, |db, _| db.cluster.crash_and_restart());
}

#[test]
fn a_backfill_that_was_killed_goes_on_where_it_was() {
    let db = own(&["litellm_spend.merge_interval = '1h'"]);
    let mut client = db.connect();
    client.batch_execute("CREATE EXTENSION litellm_spend").unwrap();
    client.batch_execute(&insert_rows("old", 20_000, 40)).unwrap();
    // One day each hour: the worker is out of the way, the call does it.
    client.batch_execute("SELECT spend_attach()").unwrap();
    let worker = worker_pid(&db);
    for _ in 0..10 {
        if holds(
            &mut client,
            "SELECT backfill_progress < 60 FROM spend_rollup_status WHERE rollup = 'daily_spend'",
        ) {
            client.batch_execute("SELECT litellm_spend.backfill_step(NULL)").unwrap();
        }
    }
    let covered: String =
        value(&mut client, "SELECT covered_from::text FROM spend_rollup_status WHERE rollup = 'daily_spend'");
    drop((client, worker));
    db.cluster.crash_and_restart();
    let mut client = db.connect();
    assert!(
        covered
            >= value::<String>(
                &mut client,
                "SELECT covered_from::text FROM spend_rollup_status WHERE rollup = 'daily_spend'"
            )
    );
    client.batch_execute("CALL spend_backfill()").unwrap();
    wait_until_live(&mut client);
    assert_exact(&mut client);
}

#[test]
fn a_repair_of_many_days_goes_on_where_it_was_and_keeps_no_merge_waiting() {
    not_at_midnight();
    let db = own(&["litellm_spend.merge_interval = '10ms'", "restart_after_crash = on"]);
    let mut client = db.connect();
    client.batch_execute("CREATE EXTENSION litellm_spend").unwrap();
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    attach(&mut client);
    // A partition comes with rows of a year; what is older than half of it cannot be computed.
    client
        .batch_execute(
            r#"ALTER TABLE litellm_spend.daily_spend_rollup ADD CONSTRAINT too_old CHECK (date >= CURRENT_DATE - 200) NOT VALID;
               SET ROLE litellm; CREATE TABLE came (LIKE "LiteLLM_SpendLogs" INCLUDING DEFAULTS);
               INSERT INTO came (request_id, call_type, spend, "startTime", "endTime")
               SELECT 'e' || i, 'x', 1, CURRENT_DATE - i, now() FROM generate_series(190, 205) i;
               INSERT INTO came (request_id, call_type, spend, "startTime", "endTime")
               SELECT 'f' || i, 'x', 1, CURRENT_DATE - i, now() FROM generate_series(100, 400, 50) i;
               ALTER TABLE "LiteLLM_SpendLogs" ATTACH PARTITION came FOR VALUES FROM (MINVALUE) TO (CURRENT_DATE - 90);
               RESET ROLE"#,
        )
        .unwrap();
    let left = "SELECT string_agg((CURRENT_DATE - range_start::date) || ' ' || (CURRENT_DATE - range_end::date), ',')
                FROM litellm_spend.dirty_range WHERE repaired_at IS NULL";
    eventually("what is not too old is repaired", || {
        value::<Option<String>>(&mut client, left).as_deref() == Some("400 200")
    });
    let status =
        "SELECT dirty_ranges || ' ' || last_error FROM spend_rollup_status WHERE rollup = 'daily_spend'";
    eventually("it is said what stops the rest", || {
        value::<Option<String>>(&mut client, status).is_some_and(|is| is.starts_with("1 repair: "))
    });
    assert_eq!(value::<i64>(&mut client, REQUESTS), 14);
    // Others are repaired and merged meanwhile.
    client.batch_execute(&insert_rows("b", 10, 1)).unwrap();
    wait_until_merged(&mut client);
    client
        .batch_execute(
            "INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation)
             VALUES (CURRENT_DATE, CURRENT_DATE + 1, 'rebuild', 'INSERT')",
        )
        .unwrap();
    eventually("a day that is noted later is repaired", || {
        value::<Option<String>>(&mut client, left).as_deref() == Some("400 200")
    });
    db.cluster.crash_and_restart();
    let mut client = db.connect();
    assert_eq!(value::<Option<String>>(&mut client, left).as_deref(), Some("400 200"));
    assert_eq!(value::<i64>(&mut client, REQUESTS), 24);
    client.batch_execute("ALTER TABLE litellm_spend.daily_spend_rollup DROP CONSTRAINT too_old").unwrap();
    eventually("all of it is repaired", || {
        value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.dirty_range") == 0
    });
    assert_eq!(value::<i64>(&mut client, REQUESTS), 33);
    assert_verified(&mut client);
}

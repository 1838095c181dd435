//! Live views equal the raw rows at every moment, whatever runs beside them.

mod common;

use common::*;
use postgres::{Client, IsolationLevel};
use rand::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Writes as LiteLLM does, and worse, until told to stop. Returns the rows it tried to insert.
fn write(db: &Database, seed: u64, stop: &AtomicBool, inserted: &AtomicU64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut client = db.connect();
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        let prefix = format!("w{seed}-{}-", if rng.random_bool(0.2) { round / 2 } else { round });
        let rows = rng.random_range(1..=100);
        let days = *[1, 1, 1, 35].choose(&mut rng).unwrap();
        let insert = insert_rows(&prefix, rows, days);
        match rng.random_range(0..10) {
            0..4 => {
                inserted.fetch_add(client.execute(&insert, &[]).unwrap(), Ordering::Relaxed);
            }
            4 => {
                let mut tx = client.transaction().unwrap();
                tx.execute(&insert, &[]).unwrap();
                tx.rollback().unwrap();
            }
            5 => {
                let mut tx = client.transaction().unwrap();
                let n = tx.execute(&insert, &[]).unwrap();
                let mut point = tx.savepoint("s").unwrap();
                point.execute(&insert_rows(&format!("{prefix}gone"), 30, 3), &[]).unwrap();
                point.rollback().unwrap();
                std::thread::sleep(Duration::from_millis(rng.random_range(0..60)));
                tx.commit().unwrap();
                inserted.fetch_add(n, Ordering::Relaxed);
            }
            6 => {
                let gid = format!("p{seed}-{round}");
                client.batch_execute("BEGIN").unwrap();
                let n = client.execute(&insert, &[]).unwrap();
                client.batch_execute(&format!("PREPARE TRANSACTION '{gid}'")).unwrap();
                std::thread::sleep(Duration::from_millis(rng.random_range(0..120)));
                let end = if rng.random_bool(0.7) { "COMMIT" } else { "ROLLBACK" };
                client.batch_execute(&format!("{end} PREPARED '{gid}'")).unwrap();
                if end == "COMMIT" {
                    inserted.fetch_add(n, Ordering::Relaxed);
                }
            }
            7 | 8 => {
                // The batch cost take-over: spend 0 -> x, and the time moves.
                let update = format!(
                    r#"UPDATE "LiteLLM_SpendLogs" SET spend = spend + 0.125, model = 'batch', status = 'success',
                           "startTime" = "startTime" - interval '{} hours'
                       WHERE request_id LIKE 'w{seed}-{}-%'"#,
                    rng.random_range(0..40),
                    rng.random_range(1..=round)
                );
                client.execute(&update, &[]).unwrap();
            }
            _ => {
                let update = format!(
                    r#"UPDATE "LiteLLM_SpendLogs" SET metadata = '{{"x": {round}}}' WHERE request_id LIKE 'w{seed}-{}-%'"#,
                    rng.random_range(1..=round)
                );
                client.execute(&update, &[]).unwrap();
            }
        }
    }
}

#[test]
fn view_equals_raw_at_every_moment() {
    let db = shared().database();
    db.connect().batch_execute(&insert_rows("old", 5000, 60)).unwrap();
    let (stop, inserted) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut looks = 0;
    std::thread::scope(|scope| {
        let _stop = RaiseOnDrop(&stop);
        for seed in 1..=4 {
            let (db, stop, inserted) = (&db, &stop, &inserted);
            scope.spawn(move || write(db, seed, stop, inserted));
        }
        eventually("they write", || inserted.load(Ordering::Relaxed) > 500);
        db.connect().batch_execute("SELECT spend_attach(reports => true)").unwrap();
        let mut reader = db.connect();
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(30)
            || inserted.load(Ordering::Relaxed) < 20_000
            || looks <= 100
        {
            assert!(started.elapsed() < Duration::from_secs(600), "too slow: {inserted:?} rows");
            let mut tx =
                reader.build_transaction().isolation_level(IsolationLevel::RepeatableRead).start().unwrap();
            assert_no_rows(tx.query(VIEW_AGAINST_RAW, &[]).unwrap(), "view and raw rows differ");
            if looks % 10 == 0 {
                let covered: bool = tx
                    .query_one("SELECT backfill_progress = 100 FROM spend_rollup_status WHERE rollup = 'daily_spend'", &[])
                    .unwrap()
                    .get(0);
                if covered {
                    assert_no_rows(tx.query(VERIFY_ALL, &[]).unwrap(), "verify");
                }
            }
            tx.commit().unwrap();
            looks += 1;
        }
    });
    let mut client = db.connect();
    wait_until_live(&mut client);
    assert_exact(&mut client);
    wait_until_merged(&mut client);
    assert_exact(&mut client);
    let merged: i64 =
        value(&mut client, "SELECT watermark FROM litellm_spend.rollup WHERE name = 'daily_spend'");
    eprintln!("{} rows inserted, {looks} looks, watermark {merged}", inserted.load(Ordering::Relaxed));
    assert!(merged > 0);
    assert_eq!(capture_errors(&mut client), 0);
}

#[test]
fn an_idle_writer_freezes_the_watermark_only() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("before", 10, 3)).unwrap();
    wait_until_merged(&mut client);

    let mut idle = db.connect();
    idle.batch_execute("BEGIN").unwrap();
    idle.batch_execute(&insert_rows("idle", 5, 3)).unwrap();
    let pid = backend_pid(&mut idle);
    let frozen: i64 =
        value(&mut client, "SELECT watermark FROM litellm_spend.rollup WHERE name = 'daily_spend'");
    // No writer waits for the idle one, which would be for ever.
    client.batch_execute("SET statement_timeout = '60s'").unwrap();
    for i in 0..20 {
        client.batch_execute(&insert_rows(&format!("later{i}-"), 10, 3)).unwrap();
        assert_exact(&mut client);
    }
    eventually("the status names the writer", || {
        value::<Option<Vec<i32>>>(
            &mut client,
            "SELECT blocked_by_pids FROM spend_rollup_status WHERE rollup = 'daily_spend'",
        ) == Some(vec![pid])
    });
    wait_for_a_round(&mut client);
    assert_eq!(
        value::<i64>(&mut client, "SELECT watermark FROM litellm_spend.rollup WHERE name = 'daily_spend'"),
        frozen
    );
    assert!(
        value::<i64>(&mut client, "SELECT tail_rows FROM spend_rollup_status WHERE rollup = 'daily_spend'")
            >= 100
    );

    // Vacuum of the log is not in anybody's way, nor anybody in its.
    client.batch_execute("VACUUM ANALYZE litellm_spend.change_log").unwrap();
    idle.batch_execute("COMMIT").unwrap();
    wait_until_merged(&mut client);
    assert_exact(&mut client);
}

#[test]
fn autovacuum_of_the_change_log_is_never_cancelled() {
    let db = own_cluster(&["autovacuum_naptime = '1s'"]).database().attached();
    let mut client = db.connect();
    client
        .batch_execute("ALTER TABLE litellm_spend.change_log SET (autovacuum_vacuum_threshold = 10, autovacuum_analyze_threshold = 10)")
        .unwrap();
    let oid: u32 = value(&mut client, "SELECT 'litellm_spend.change_log'::regclass::oid");
    let mut i = 0;
    eventually("autovacuum came three times", || {
        i += 1;
        client.batch_execute(&insert_rows(&format!("v{i}-"), 100, 3)).unwrap();
        holds(
            &mut client,
            &format!(
                "SELECT autovacuum_count + autoanalyze_count >= 3 FROM pg_stat_all_tables WHERE relid = {oid}"
            ),
        )
    });
    assert!(!db.autovacuum_was_cancelled("litellm_spend.change_log"));
    assert_exact(&mut client);
}

#[test]
fn a_prepared_row_is_merged_only_once_it_is_committed() {
    let db = shared().database().attached();
    let (mut client, mut writer) = (db.connect(), db.connect());
    writer.batch_execute("BEGIN").unwrap();
    writer.batch_execute(&insert_rows("prepared", 3, 3)).unwrap();
    // A candidate that waits for the session is taken before it prepares.
    client.batch_execute(&insert_rows("beside", 3, 3)).unwrap();
    eventually("a candidate waits", || {
        holds(&mut client, "SELECT jsonb_array_length(candidates) > 0 FROM litellm_spend.source")
    });
    writer.batch_execute("PREPARE TRANSACTION 'rows'").unwrap();
    drop(writer);
    eventually("the status names the prepared transaction", || {
        holds(
            &mut client,
            "SELECT blocked_by_prepared = ARRAY['rows'] FROM spend_rollup_status WHERE rollup = 'daily_spend'",
        )
    });
    wait_for_a_round(&mut client);
    assert_eq!(
        value::<i64>(&mut client, "SELECT watermark FROM litellm_spend.rollup WHERE name = 'daily_spend'"),
        0
    );
    assert_exact(&mut client);
    client.batch_execute("COMMIT PREPARED 'rows'").unwrap();
    assert_exact(&mut client);
    wait_until_merged(&mut client);
    assert_exact(&mut client);
}

#[test]
fn two_mergers_never_count_a_row_twice() {
    let db = shared().database().attached();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = RaiseOnDrop(&stop);
        // Five callers beside the worker.
        let mergers: Vec<_> = (0..5)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = db.connect();
                    let mut merged = 0;
                    while !stop.load(Ordering::Relaxed) {
                        merged += value::<i64>(
                            &mut client,
                            "SELECT rows FROM spend_rollup_run() WHERE rollup = 'daily_spend'",
                        );
                    }
                    merged
                })
            })
            .collect();
        let mut client = db.connect();
        for i in 0..300 {
            client.batch_execute(&insert_rows(&format!("m{i}-"), 20, 3)).unwrap();
        }
        wait_until_merged(&mut client);
        stop.store(true, Ordering::Relaxed);
        let merged: i64 = mergers.into_iter().map(|m| m.join().unwrap()).sum();
        assert!(merged > 0, "the callers merged nothing");
        assert_exact(&mut client);
    });
}

fn own(settings: &[&str]) -> Database {
    let cluster = own_cluster(settings);
    cluster.database()
}

/// In how many transactions the built-in rollups were merged last.
const MERGED_IN: &str =
    "SELECT count(DISTINCT xmin::text) FROM litellm_spend.rollup WHERE source = 'change_log'";

#[test]
fn built_in_rollups_are_merged_together_unless_one_of_them_fails() {
    // The worker leaves it to the test.
    let db = own(&["litellm_spend.merge_interval = '1h'"]);
    let mut client = db.connect();
    client.batch_execute("SELECT spend_attach(reports => true)").unwrap();
    client.batch_execute("CALL spend_backfill()").unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    let mut change = |client: &mut Client| {
        let round: u32 = rng.random();
        client.batch_execute(&insert_rows(&format!("r{round}-"), rng.random_range(50..300), 40)).unwrap();
        let changes = format!(
            r#"UPDATE "LiteLLM_SpendLogs" SET spend = spend + 1, model = 'other', request_tags = '["a", "b", "a"]'
               WHERE request_id LIKE 'r%{0}';
               UPDATE "LiteLLM_SpendLogs" SET request_tags = NULL, "user" = NULL WHERE request_id LIKE 'r%{1}';
               DELETE FROM "LiteLLM_SpendLogs" WHERE request_id LIKE 'r%{2}'"#,
            rng.random_range(0..10),
            rng.random_range(0..10),
            rng.random_range(10..100)
        );
        client.batch_execute(&changes).unwrap();
    };
    let outcomes = |client: &mut Client, call: &str| -> Vec<(String, String)> {
        let sql = format!("SELECT rollup, outcome FROM {call} ORDER BY rollup");
        client.query(&sql, &[]).unwrap().iter().map(|r| (r.get(0), r.get(1))).collect()
    };

    // Together, in several windows as in one.
    for window in [1_000_000, 400] {
        change(&mut client);
        client.batch_execute(&format!("SET litellm_spend.max_window = {window}")).unwrap();
        let merged = outcomes(&mut client, "spend_rollup_run()");
        assert!(merged.len() == 8 && merged.iter().all(|(_, text)| text == "merged"), "{merged:?}");
        assert_eq!(value::<i64>(&mut client, MERGED_IN), 1);
        assert_verified(&mut client);
        assert!(holds(&mut client, "SELECT bool_and(tail_rows = 0) FROM spend_rollup_status"));
    }
    client.batch_execute("RESET litellm_spend.max_window").unwrap();

    // Each alone: the same groups.
    change(&mut client);
    for (rollup, _) in outcomes(&mut client, "spend_rollup_run()") {
        change(&mut client);
        outcomes(&mut client, &format!("spend_rollup_run('{rollup}')"));
        assert_verified(&mut client);
    }

    // One that fails keeps none of the others, and is with them again afterwards.
    client
        .batch_execute(
            "SELECT spend_rollup_run();
             ALTER TABLE litellm_spend.daily_spend_by_model_rollup ADD CONSTRAINT no CHECK (model <> 'other') NOT VALID",
        )
        .unwrap();
    change(&mut client);
    for (rollup, text) in outcomes(&mut client, "spend_rollup_run()") {
        assert_eq!(text, if rollup == "daily_spend_by_model" { "failed" } else { "merged" }, "{rollup}");
    }
    assert_verified(&mut client);
    client.batch_execute("ALTER TABLE litellm_spend.daily_spend_by_model_rollup DROP CONSTRAINT no").unwrap();
    outcomes(&mut client, "spend_rollup_run()");
    change(&mut client);
    outcomes(&mut client, "spend_rollup_run()");
    assert_eq!(value::<i64>(&mut client, MERGED_IN), 1);
    assert_verified(&mut client);
}

#[test]
fn many_rows_are_merged_at_the_next_look_and_few_after_ten() {
    let db = own(&["litellm_spend.merge_interval = '1s'", "litellm_spend.merge_rows = 100"]).attached();
    let mut client = db.connect();
    wait_until_merged(&mut client);
    let looks = "SELECT seq_scan + coalesce(idx_scan, 0) FROM pg_stat_all_tables
                 WHERE relid = 'litellm_spend.source'::regclass";
    let watermark = "SELECT min(watermark) FROM litellm_spend.rollup WHERE source = 'change_log'";
    let (before, looked) = (value::<i64>(&mut client, watermark), value::<i64>(&mut client, looks));
    let began = Instant::now();
    client.batch_execute(&insert_rows("few", 60, 3)).unwrap();
    eventually("the worker has looked again and again", || value::<i64>(&mut client, looks) > looked + 8);
    let now: i64 = value(&mut client, watermark);
    if began.elapsed() < Duration::from_secs(8) {
        assert_eq!(now, before, "60 rows wait");
    }
    client.batch_execute(&insert_rows("more", 60, 3)).unwrap();
    wait_until_merged(&mut client);
    client.batch_execute(&insert_rows("one", 1, 3)).unwrap();
    wait_until_merged(&mut client);
    assert_verified(&mut client);
}

#[test]
fn a_rebuild_beside_writers_and_merges_stays_exact() {
    let db = shared().database().attached();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = RaiseOnDrop(&stop);
        for seed in 11..=12 {
            let (db, stop) = (&db, &stop);
            scope.spawn(move || write(db, seed, stop, &AtomicU64::new(0)));
        }
        let mut client = db.connect();
        let started = Instant::now();
        let mut rebuilds = 0;
        while rebuilds <= 5 || started.elapsed() < Duration::from_secs(6) {
            assert!(started.elapsed() < Duration::from_secs(600), "{rebuilds} rebuilds");
            // The worker may hold the fence for longer than a call waits.
            if client.batch_execute("SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 20)").is_ok() {
                rebuilds += 1;
            }
            assert_exact(&mut client);
        }
    });
    assert_exact(&mut db.connect());
}

//! Rollups that users fill with SQL of their own, by safe windows.

mod common;

use common::*;
use postgres::Client;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

fn insert(n: u32, age: &str) -> String {
    format!(
        "INSERT INTO page_views (site_id, path, client_ip, view_time)
         SELECT i % 5, '/page/' || i % 10, '127.0.0.1', now() - interval '{age}' - i * interval '1 second'
         FROM generate_series(1, {n}) AS i"
    )
}

fn copy(client: &mut Client, n: u32) {
    let mut writer = client.copy_in("COPY page_views (site_id, path, client_ip) FROM STDIN").unwrap();
    for i in 0..n {
        writeln!(writer, "{}\t/copied/{}\t10.0.0.1", i % 5, i % 7).unwrap();
    }
    writer.finish().unwrap();
}

fn assert_aggregated(client: &mut Client) {
    let differing = client
        .query(
            "SELECT * FROM page_views_1min a
             FULL JOIN (SELECT site_id, path, date_trunc('minute', view_time) AS period_start, count(*) AS view_count
                        FROM page_views GROUP BY 1, 2, 3) AS e USING (site_id, path, period_start)
             WHERE a.view_count IS DISTINCT FROM e.view_count",
            &[],
        )
        .unwrap();
    assert_no_rows(differing, "page_views_1min differs");
}

#[test]
fn the_article_runs_as_written_beside_copy_insert_and_late_rows() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(ARTICLE).unwrap();
    client.batch_execute(&insert(1000, "0")).unwrap();
    let (stop, rows) = (AtomicBool::new(false), AtomicU32::new(1000));
    let mut windows = 0;
    std::thread::scope(|scope| {
        let _stop = RaiseOnDrop(&stop);
        for writer in 0..4 {
            let (db, stop, rows) = (&db, &stop, &rows);
            scope.spawn(move || {
                let mut client = db.connect();
                for i in 0u32.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let n = 100 + 13 * writer;
                    match writer {
                        0 => copy(&mut client, n),
                        // Backfill of old view_times.
                        1 => client.batch_execute(&insert(n, "30 days")).unwrap(),
                        _ => {
                            let mut tx = client.transaction().unwrap();
                            tx.batch_execute(&insert(n, "0")).unwrap();
                            std::thread::sleep(Duration::from_millis(u64::from(i % 20)));
                            if i % 5 == 0 {
                                tx.rollback().unwrap();
                                continue;
                            }
                            tx.commit().unwrap();
                        }
                    }
                    rows.fetch_add(n, Ordering::Relaxed);
                }
            });
        }
        // Two at once: a window belongs to one of them.
        for _ in 0..2 {
            let (db, stop) = (&db, &stop);
            scope.spawn(move || {
                let mut client = db.connect();
                while !stop.load(Ordering::Relaxed) {
                    client.query("SELECT * FROM do_page_view_aggregation()", &[]).unwrap();
                }
            });
        }
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(8) || windows <= 10 {
            assert!(started.elapsed() < Duration::from_secs(600), "{windows} windows");
            let row = client.query_one("SELECT * FROM do_page_view_aggregation()", &[]).unwrap();
            windows += i64::from(row.get::<_, i64>(0) <= row.get::<_, i64>(1));
        }
    });
    loop {
        let row = client.query_one("SELECT * FROM do_page_view_aggregation()", &[]).unwrap();
        if row.get::<_, i64>(0) > row.get::<_, i64>(1) {
            break;
        }
    }
    assert_aggregated(&mut client);
    let counted: i64 = value(&mut client, "SELECT sum(view_count)::bigint FROM page_views_1min");
    assert_eq!(counted, i64::from(rows.load(Ordering::Relaxed)));
}

#[test]
fn a_window_advances_with_the_callers_transaction() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(ARTICLE).unwrap();
    client.batch_execute(&insert(10, "0")).unwrap();
    let window = |client: &mut Client| -> (i64, i64) {
        let row =
            client.query_one("SELECT * FROM spend_rollup_window('page_views_1min_rollup')", &[]).unwrap();
        (row.get(0), row.get(1))
    };
    client.batch_execute("BEGIN").unwrap();
    assert_eq!(window(&mut client), (1, 10));
    assert_eq!(window(&mut client), (11, 10), "empty");
    client.batch_execute("ROLLBACK").unwrap();
    client.batch_execute("BEGIN; SAVEPOINT s").unwrap();
    assert_eq!(window(&mut client), (1, 10));
    client.batch_execute("ROLLBACK TO s; COMMIT").unwrap();
    // A long window comes in pieces.
    client.batch_execute("SET litellm_spend.max_window = 4").unwrap();
    assert_eq!([(); 4].map(|()| window(&mut client)), [(1, 4), (5, 8), (9, 10), (11, 10)]);
    client.batch_execute("RESET litellm_spend.max_window").unwrap();
    // The caller's own rows, of the same transaction.
    client.batch_execute("BEGIN").unwrap();
    client.batch_execute(&insert(5, "0")).unwrap();
    assert_eq!(window(&mut client), (11, 15));
    client.batch_execute("COMMIT").unwrap();
    // An open writer, whoever holds the window meanwhile.
    let mut writer = db.connect();
    writer.batch_execute("BEGIN").unwrap();
    writer.batch_execute(&insert(5, "0")).unwrap();
    client.batch_execute(&insert(5, "0")).unwrap();
    assert_eq!(window(&mut client), (16, 15), "its rows are not visible yet");
    writer.batch_execute("COMMIT").unwrap();
    assert_eq!(window(&mut client), (16, 25));
}

#[test]
fn a_window_of_a_partition_never_passes_a_number_that_was_drawn_through_its_parent() {
    let db = shared().database();
    let (mut client, mut writer) = (db.connect(), db.connect());
    client
        .batch_execute(
            "CREATE TABLE parent (id bigserial, v int) PARTITION BY LIST (v);
             CREATE TABLE leaf PARTITION OF parent FOR VALUES IN (1);
             SELECT spend_rollup_register('by_hand', 'leaf');
             CREATE FUNCTION gate(v int) RETURNS int LANGUAGE plpgsql
             AS $$ BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN v; END $$",
        )
        .unwrap();
    let mut window = || {
        let row = client.query_one("SELECT * FROM spend_rollup_window('by_hand')", &[]).unwrap();
        (row.get::<_, i64>(0), row.get::<_, i64>(1))
    };
    std::thread::scope(|scope| {
        // Closed at the end, also when that is a panic.
        let mut gate = db.connect();
        gate.batch_execute("SELECT pg_advisory_lock(1)").unwrap();
        scope.spawn(|| writer.batch_execute("INSERT INTO parent (v) VALUES (gate(1))").unwrap());
        eventually("it has its number and waits", || {
            holds(&mut gate, "SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        });
        gate.batch_execute("INSERT INTO leaf (v) VALUES (1); INSERT INTO parent (v) VALUES (1)").unwrap();
        assert_eq!(window(), (1, 0));
        gate.batch_execute("SELECT pg_advisory_unlock(1)").unwrap();
    });
    assert_eq!(window(), (1, 3));
}

#[test]
fn a_number_that_a_sequence_set_back_gives_again_is_waited_for() {
    let db = shared().database();
    let (mut client, mut writer) = (db.connect(), db.connect());
    client
        .batch_execute(
            "CREATE TABLE ev (id bigserial, v int); INSERT INTO ev (v) VALUES (1), (2), (3), (4);
             SELECT spend_rollup_register('hand', 'ev')",
        )
        .unwrap();
    let window = |client: &mut Client| {
        let row = client.query_one("SELECT * FROM spend_rollup_window('hand')", &[]).unwrap();
        (row.get::<_, i64>(0), row.get::<_, i64>(1))
    };
    let back = "SELECT setval('ev_id_seq', (SELECT max(id) FROM ev))";
    assert_eq!(window(&mut client), (1, 4));
    // Those that are drawn again stay below what was remembered, or pass it.
    for drawn in [1, 9] {
        writer.batch_execute("BEGIN; INSERT INTO ev (v) SELECT 2 FROM generate_series(1, 6)").unwrap();
        assert_eq!(window(&mut client), (5, 4), "they are not visible yet");
        writer.batch_execute("ROLLBACK").unwrap();
        client.batch_execute(back).unwrap();
        if drawn > 6 {
            assert_eq!(window(&mut client), (5, 4), "there is nothing new");
        }
        writer
            .batch_execute(&format!("BEGIN; INSERT INTO ev (v) SELECT 3 FROM generate_series(1, {drawn})"))
            .unwrap();
        assert_eq!(window(&mut client), (5, 4), "{drawn} rows are not visible yet");
        writer.batch_execute("ROLLBACK").unwrap();
        client.batch_execute(back).unwrap();
        assert_eq!(window(&mut client), (5, 4), "there is nothing new");
    }
    client.batch_execute("INSERT INTO ev (v) VALUES (4)").unwrap();
    assert_eq!(window(&mut client), (5, 5));
}

#[test]
fn a_window_is_refused_where_it_could_not_be_exact() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(ARTICLE).unwrap();
    client.batch_execute(&insert(10, "0")).unwrap();
    let call = "SELECT * FROM spend_rollup_window('page_views_1min_rollup')";
    for (isolation, sqlstate) in [
        ("ISOLATION LEVEL REPEATABLE READ", "25000"),
        ("ISOLATION LEVEL SERIALIZABLE", "25000"),
        ("READ ONLY", "25006"),
    ] {
        client.batch_execute(&format!("BEGIN TRANSACTION {isolation}")).unwrap();
        assert_refused(&mut client, call, sqlstate);
        client.batch_execute("ROLLBACK").unwrap();
    }
    // Another transaction has the window.
    let mut other = db.connect();
    other.batch_execute(&format!("BEGIN; {call}")).unwrap();
    client.batch_execute("SET lock_timeout = 50").unwrap();
    assert_refused(&mut client, call, "55P03");
    client.batch_execute("RESET lock_timeout").unwrap();
    other.batch_execute("ROLLBACK").unwrap();
    client
        .batch_execute("SELECT spend_rollup_create('declared', 'page_views', '{site_id}', '{count(*) AS n}')")
        .unwrap();
    assert_refused(&mut client, "SELECT * FROM spend_rollup_window('declared')", "55000");
    assert_refused(&mut client, "SELECT * FROM spend_rollup_window('nothing')", "42704");
    assert_refused(&mut client, "SELECT * FROM spend_rollup_window(NULL)", "22004");
    assert_refused(
        &mut client,
        "SELECT spend_rollup_register('page_views_1min_rollup', 'page_views')",
        "42710",
    );
    for call in ["run", "rebuild", "verify"] {
        let sql = format!("SELECT spend_rollup_{call}('page_views_1min_rollup')");
        assert_refused(&mut client, &sql, "55000");
    }
    client.batch_execute("SELECT setval('page_views_view_id_seq', 1)").unwrap();
    client.batch_execute("SELECT * FROM do_page_view_aggregation()").unwrap();
}

#[test]
fn registering_again_can_say_what_was_merged_before() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(ARTICLE).unwrap();
    client.batch_execute(&insert(100, "0")).unwrap();
    client.batch_execute("SELECT * FROM do_page_view_aggregation()").unwrap();
    client.batch_execute("SELECT spend_rollup_drop('page_views_1min_rollup')").unwrap();
    let register = "SELECT spend_rollup_register('page_views_1min_rollup', 'page_views', merged_to => ";
    assert_refused(&mut client, &format!("{register} 101)"), "22023");
    client.batch_execute(&format!("{register} 100)")).unwrap();
    client.batch_execute(&insert(50, "0")).unwrap();
    client.batch_execute("SELECT * FROM do_page_view_aggregation()").unwrap();
    assert_aggregated(&mut client);
    // A call for all rollups has nothing to do, which is no error.
    assert!(client.query("SELECT * FROM spend_rollup_run()", &[]).unwrap().is_empty());
}

#[test]
fn the_worker_leaves_it_alone_and_dropping_it_leaves_the_users_table() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(ARTICLE).unwrap();
    client.batch_execute(&insert(10, "0")).unwrap();
    wait_for_a_round(&mut client);
    assert!(holds(
        &mut client,
        "SELECT kind = 'by hand' AND watermark = 0 AND last_error IS NULL FROM spend_rollup_status"
    ));
    client.batch_execute("SELECT * FROM do_page_view_aggregation()").unwrap();
    assert_aggregated(&mut client);
    client.batch_execute("SELECT spend_rollup_drop('page_views_1min_rollup')").unwrap();
    assert_aggregated(&mut client);
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.source"), 0);
}

#[test]
fn where_all_is_filled_by_hand_a_source_that_is_dropped_is_noticed() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE ev (id bigserial PRIMARY KEY, kind int);
             SELECT spend_rollup_register('hand', 'ev');
             DROP TABLE ev",
        )
        .unwrap();
    eventually("the status says so", || {
        holds(
            &mut client,
            "SELECT source IS NULL AND last_error LIKE 'its source was dropped%' FROM spend_rollup_status",
        )
    });
}

//! Rollups that users declare over their own tables: exact whatever runs beside them, for every kind of
//! source and measure, and refused where they could not be.

mod common;

use common::*;
use postgres::{Client, IsolationLevel};
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

const PAGE_VIEWS: &str = "
    CREATE TABLE page_views (site_id int, path text, client_ip inet, view_time timestamptz DEFAULT now(), bytes float8,
        view_id bigserial);
    CREATE INDEX ON page_views USING brin (view_id);";

const CREATE: &str = "SELECT spend_rollup_create('views', 'page_views',
    ARRAY['site_id', 'path', 'date_trunc(''minute'', view_time) AS minute'],
    ARRAY['count(*) AS views', 'count(path) AS paths', 'sum(bytes) AS bytes', 'min(view_time) AS first',
          'max(client_ip) AS last_ip', 'avg(bytes) AS average', 'sum(site_id) FILTER (WHERE path > ''/p3'') AS filtered',
          'bool_or(path IS NULL) AS any_nameless', 'array_agg(site_id) AS sites MERGE WITH array_cat'])";

/// What the live view of [`CREATE`] must say. Sums of floats are exact here: they are multiples of 1/8.
const BY_HAND: &str = "SELECT site_id, path, date_trunc('minute', view_time, 'UTC') AS minute, count(*) AS views,
        count(path) AS paths, sum(bytes) AS bytes, min(view_time) AS first, max(client_ip) AS last_ip,
        avg(bytes) AS average, sum(site_id) FILTER (WHERE path > '/p3') AS filtered, bool_or(path IS NULL) AS any_nameless,
        array_agg(site_id) AS sites
    FROM page_views GROUP BY 1, 2, 3";

/// A database with the table page_views.
fn page_views() -> (Database, Client) {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(PAGE_VIEWS).unwrap();
    (db, client)
}

/// A database with the rollup of [`CREATE`].
fn page_views_with_rollup() -> (Database, Client) {
    let (db, mut client) = page_views();
    client.batch_execute(CREATE).unwrap();
    (db, client)
}

/// `n` rows from `first` on, some of them with NULLs, over two days.
fn views(first: u32, n: u32) -> String {
    format!(
        "INSERT INTO page_views (site_id, path, client_ip, view_time, bytes)
         SELECT nullif(i % 5, 4), nullif('/p' || i % 7, '/p6'), ('10.0.0.' || i % 9)::inet,
                timestamptz '2026-03-29 12:00Z' - i % 97 * interval '29 minutes', nullif(i % 11, 10) / 8.0
         FROM generate_series({first}, {first} + {n} - 1) AS i"
    )
}

fn assert_same(client: &mut Client, ours: &str, expected: &str) {
    let sql = format!(
        "WITH ours AS ({ours}), theirs AS ({expected})
         SELECT to_jsonb(d) FROM ((TABLE ours EXCEPT ALL TABLE theirs) UNION ALL (TABLE theirs EXCEPT ALL TABLE ours)) AS d
         LIMIT 5"
    );
    assert_no_rows(
        client.query(&sql, &[]).unwrap_or_else(|e| panic!("{sql}: {e:?}")),
        "live view and source differ",
    );
}

fn assert_views_exact(client: &mut Client) {
    assert_same(client, "SELECT * FROM litellm_spend.views", BY_HAND);
}

fn merged(client: &mut Client, rollup: &str) {
    eventually("everything is merged", || {
        holds(
            client,
            &format!(
                "SELECT tail_rows = 0 AND backfill_progress = 100 FROM spend_rollup_status WHERE rollup = '{rollup}'"
            ),
        )
    });
}

// ---- exactness -------------------------------------------------------------------------------------------

#[test]
fn every_kind_of_measure_equals_its_aggregate_in_every_time_zone() {
    let (_db, mut client) = page_views();
    client.batch_execute(&views(0, 1000)).unwrap();
    client.batch_execute(CREATE).unwrap();
    let zones = ["UTC", "Asia/Seoul", "America/Los_Angeles", "Asia/Kathmandu"];
    for step in 0..6 {
        for zone in zones {
            client.batch_execute(&format!("SET TimeZone = '{zone}'")).unwrap();
            assert_views_exact(&mut client);
        }
        match step {
            0 | 2 => merged(&mut client, "views"),
            _ => client.batch_execute(&views(1000 * step, 333)).unwrap(),
        }
        // In the tail, and in the same transaction as the row.
        let mut tx = client.transaction().unwrap();
        tx.batch_execute(&views(50_000 + 10 * step, 10)).unwrap();
        let sum: i64 =
            tx.query_one("SELECT sum(views)::bigint FROM litellm_spend.views", &[]).unwrap().get(0);
        let rows: i64 = tx.query_one("SELECT count(*) FROM page_views", &[]).unwrap().get(0);
        assert_eq!(sum, rows);
        if step % 2 == 0 { tx.rollback() } else { tx.commit() }.unwrap();
    }
    merged(&mut client, "views");
    assert_views_exact(&mut client);
    assert_verified(&mut client);
}

#[test]
fn buckets_of_hours_and_days_are_those_of_utc_for_every_reader() {
    let (db, mut client) = page_views();
    client.batch_execute("SET TimeZone = 'Asia/Kathmandu'").unwrap();
    client
        .batch_execute(
            "SELECT spend_rollup_create('hours', 'page_views', ARRAY['date_trunc(''hour'', view_time) AS hour'], '{count(*) AS n}');
             SELECT spend_rollup_create('days', 'page_views', '{view_time::date AS day}', '{count(*) AS n}')",
        )
        .unwrap();
    client.batch_execute(&views(0, 500)).unwrap();
    merged(&mut client, "hours");
    merged(&mut client, "days");
    let mut writer = db.connect();
    writer.batch_execute("BEGIN").unwrap();
    writer.batch_execute(&views(500, 1)).unwrap();
    // Some in the tail, some merged.
    client.batch_execute(&views(501, 300)).unwrap();
    for zone in ["UTC", "Asia/Seoul", "America/Los_Angeles", "Asia/Kathmandu"] {
        client.batch_execute(&format!("SET TimeZone = '{zone}'")).unwrap();
        let hours = "SELECT date_trunc('hour', view_time, 'UTC'), count(*) FROM page_views GROUP BY 1";
        assert_same(&mut client, "SELECT * FROM litellm_spend.hours", hours);
        let days = "SELECT (view_time AT TIME ZONE 'UTC')::date, count(*) FROM page_views GROUP BY 1";
        assert_same(&mut client, "SELECT * FROM litellm_spend.days", days);
    }
    writer.batch_execute("ROLLBACK").unwrap();
    merged(&mut client, "hours");
    merged(&mut client, "days");
    assert_verified(&mut client);
}

#[test]
fn a_bucket_is_that_of_date_trunc_for_every_time_there_is() {
    let (_db, mut client) = without_worker();
    let units = ["second", "minute", "hour", "day", "week", "year"];
    let truncated = units.map(|unit| format!("date_trunc('{unit}', at) AS {unit}"));
    client
        .batch_execute(&format!(
            "SET timezone = 'Asia/Kolkata';
             CREATE TABLE moments (at timestamptz, id bigserial);
             SELECT spend_rollup_create('moments', 'moments', ARRAY[$d${}$d$], ARRAY['count(*) AS n', 'min(at) AS at']);
             INSERT INTO moments (at) SELECT unnest(ARRAY[NULL, '-infinity', 'infinity', '4713-01-01 00:00Z BC',
                 '4713-02-01 12:34:56.789Z BC', '294276-12-31 23:59:59.999999Z', '1883-11-18 12:03:58.25Z']::timestamptz[]);
             -- On both sides of the border between centuries, on borders and beside them.
             INSERT INTO moments (at)
             SELECT timestamptz '2000-01-01 00:00Z' + n * width + off
             FROM generate_series(-3, 3) AS n, unnest('{{1 second, 1 minute, 1 hour, 1 day, 400 days}}'::interval[]) AS width,
                  unnest('{{-1 microsecond, 0, 1 microsecond, 30.5 seconds}}'::interval[]) AS off",
            truncated.join("$d$, $d$")
        ))
        .unwrap();
    let theirs = units.map(|unit| format!("date_trunc('{unit}', at, 'UTC')"));
    let theirs =
        format!("SELECT {}, count(*), min(at) FROM moments GROUP BY 1, 2, 3, 4, 5, 6", theirs.join(", "));
    assert_same(&mut client, "SELECT * FROM litellm_spend.moments", &theirs);
    client.batch_execute("SELECT spend_rollup_run('moments')").unwrap();
    assert_same(&mut client, "SELECT * FROM litellm_spend.moments", &theirs);
    assert!(holds(&mut client, "SELECT sum(n) = 147 FROM litellm_spend.moments_rollup"));
    // A rebuild's borders are those of the buckets.
    client
        .batch_execute("SELECT spend_rollup_rebuild('moments', '1999-12-31 23:59:58', '2000-01-01')")
        .unwrap();
    assert_same(&mut client, "SELECT * FROM litellm_spend.moments", &theirs);
}

#[test]
fn a_rebuild_takes_the_rows_of_a_day_with_two_midnights_together() {
    let (_db, mut client) = without_worker();
    // In the Azores, 2025-10-26 01:00 became 00:00: the day has the second midnight, 01:00 UTC.
    client
        .batch_execute(
            "CREATE TABLE ev (id bigserial PRIMARY KEY, t timestamptz NOT NULL);
             SELECT spend_rollup_create('ev', 'ev', ARRAY[$$date_trunc('day', t, 'Atlantic/Azores') AS day$$],
                 ARRAY['count(*) AS n']);
             INSERT INTO ev (t) VALUES ('2025-10-25 12:00Z'), ('2025-10-26 00:30Z'), ('2025-10-26 12:00Z');
             SELECT spend_rollup_run('ev')",
        )
        .unwrap();
    let days = "SELECT string_agg(extract(day FROM day AT TIME ZONE 'UTC') || ': ' || n, ', ' ORDER BY day)
                FROM litellm_spend.ev";
    for hashed in ["on", "off"] {
        client.batch_execute(&format!("SET litellm_spend.hash_groups = {hashed}")).unwrap();
        for (start, end) in
            [("'2025-10-25'", "'2025-10-26'"), ("'2025-10-26'", "NULL"), ("NULL", "'2025-10-27 01:00'")]
        {
            let range = format!("'ev', {start}, {end}");
            client.batch_execute(&format!("SELECT spend_rollup_rebuild({range})")).unwrap();
            assert_eq!(value::<String>(&mut client, days), "25: 1, 26: 2", "{range}");
            let differences =
                client.query(&format!("SELECT * FROM spend_rollup_verify({range})"), &[]).unwrap();
            assert_no_rows(differences, &range);
        }
        for border in ["2025-10-26 01:00", "2025-10-26 00:30", "2025-10-27"] {
            let error = error(&mut client, &format!("SELECT spend_rollup_rebuild('ev', '{border}')"));
            assert_eq!(error.code().code(), "22023", "{border}");
        }
        // A row that a rebuild meets where it has cleared is an error, not a second count.
        let wrong = r#"UPDATE litellm_spend.rollup SET definition = jsonb_set(definition, '{bucket,source_time}', to_jsonb(text '(t - interval ''1 hour'')'));
                       SELECT spend_rollup_rebuild('ev', '2025-10-25', '2025-10-26 01:00')"#;
        assert_eq!(error(&mut client, wrong).code().code(), "23505", "{hashed}");
    }
}

#[test]
fn odd_types_collations_and_merge_functions_stay_exact() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"CREATE TYPE pair AS (a int, b int);
               CREATE FUNCTION addup(numeric, numeric) RETURNS numeric LANGUAGE sql AS 'SELECT $1 + $2';
               CREATE COLLATION backwards (provider = libc, locale = 'C');
               CREATE TABLE odd (id bigserial PRIMARY KEY, c char(4), bits bit(3), r real, e text COLLATE backwards, p pair,
                   t timestamptz NOT NULL DEFAULT now());
               SELECT spend_rollup_create('odd', 'odd', ARRAY['c', 'bits', 'e', 'date_trunc(''day'', t, ''Asia/Seoul'') AS seoul_day'],
                   ARRAY['sum(r) AS r', 'avg(r) AS mean', 'count(p) AS pairs', 'max(e) AS last', 'min(lower(e)) AS first',
                         E'sum(id) AS ids\nMERGE\tWITH  addup', $m$string_agg(e, '') AS texts MERGE WITH concat$m$,
                         'array_agg(id) AS list MERGE WITH array_cat'])"#,
        )
        .unwrap();
    let rows = "INSERT INTO odd (c, bits, r, e, p) VALUES
        ('a', '101', 1234567, 'a', (1, NULL)), ('a', '101', 16777216, 'a', NULL), ('b', '000', 0.5, 'B', (1, 2))";
    let theirs = "SELECT c, bits, e, date_trunc('day', t, 'Asia/Seoul'), sum(r::float8)::real, avg(r::float8), count(p), max(e),
                         min(lower(e)), sum(id), string_agg(e, ''), array_agg(id ORDER BY id)
                  FROM odd GROUP BY 1, 2, 3, 4";
    let ours = "SELECT c, bits, e, seoul_day, r, mean, pairs, last, first, ids, texts,
                       (SELECT array_agg(i ORDER BY i) FROM unnest(list) AS i)
                FROM litellm_spend.odd";
    for _ in 0..4 {
        client.batch_execute(rows).unwrap();
        assert_same(&mut client, ours, theirs);
        merged(&mut client, "odd");
    }
    assert!(holds(&mut client, "SELECT bool_and(last_error IS NULL) FROM spend_rollup_status"));
    assert!(holds(
        &mut client,
        "SELECT count(*) = 2 FROM pg_attribute WHERE attrelid = 'litellm_spend.odd_rollup'::regclass AND attcollation = 'backwards'::regcollation AND attname IN ('e', 'last')"
    ));
    // What is not the truth is found, arrays included.
    client.batch_execute("UPDATE litellm_spend.odd_rollup SET list = '{7}' WHERE c = 'b'").unwrap();
    assert!(
        value::<i64>(
            &mut client,
            "SELECT count(*) FROM spend_rollup_verify('odd') WHERE key ->> 'c' = 'b   '"
        ) == 1
    );
    client.batch_execute("SELECT spend_rollup_rebuild('odd'); SELECT spend_rollup_drop('odd')").unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM pg_proc WHERE proname LIKE 'odd.%'"), 0);
}

#[test]
fn what_a_filter_keeps_out_is_not_computed() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE calls (id bigserial PRIMARY KEY, kind text, body text, n int);
             SELECT spend_rollup_create('by_kind', 'calls', '{kind}',
                 ARRAY['count(body::jsonb -> ''error'') FILTER (WHERE kind = ''json'') AS errors',
                       'avg(1.0 / n) FILTER (WHERE n <> 0) AS mean'])",
        )
        .unwrap();
    let ours = "TABLE litellm_spend.by_kind";
    let theirs = "SELECT kind, count(body::jsonb -> 'error') FILTER (WHERE kind = 'json'), avg(1.0 / n) FILTER (WHERE n <> 0)
                  FROM calls GROUP BY kind";
    for _ in 0..2 {
        client
            .batch_execute(
                r#"INSERT INTO calls (kind, body, n) VALUES ('json', '{"error": 1}', 2), ('json', '{}', 4), ('json', NULL, NULL),
                       ('text', 'hello', 0), ('text', 'no json', 5), (NULL, 'nor this', NULL)"#,
            )
            .unwrap();
        assert_same(&mut client, ours, theirs);
        merged(&mut client, "by_kind");
    }
    assert!(holds(&mut client, "SELECT bool_and(last_error IS NULL) FROM spend_rollup_status"));
}

#[test]
fn merge_with_in_a_literal_or_a_name_says_no_function() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"CREATE TABLE notes (id bigserial PRIMARY KEY, kind int, note text);
               SELECT spend_rollup_create('by_kind', 'notes', '{kind}',
                   ARRAY['count(*) FILTER (WHERE note = ''please merge with main'') AS n', 'count(note) AS "how many merge with it"',
                         'array_agg(id) FILTER (WHERE note <> ''please merge with main'') AS "merge with array_agg" MERGE WITH array_cat']);
               INSERT INTO notes (kind, note) VALUES (1, 'please merge with main'), (1, 'no'), (2, NULL)"#,
        )
        .unwrap();
    let ours = "TABLE litellm_spend.by_kind";
    let theirs = "SELECT kind, count(*) FILTER (WHERE note = 'please merge with main'), count(note),
                      array_agg(id) FILTER (WHERE note <> 'please merge with main')
                  FROM notes GROUP BY kind";
    assert_same(&mut client, ours, theirs);
    merged(&mut client, "by_kind");
    assert_same(&mut client, ours, theirs);
}

#[test]
fn a_declared_rollup_is_exact_at_every_moment_beside_copy_and_insert() {
    let (db, mut client) = page_views();
    client.batch_execute(&views(0, 20_000)).unwrap();
    client.batch_execute(CREATE).unwrap();
    let (stop, round) = (AtomicBool::new(false), AtomicU32::new(100));
    std::thread::scope(|scope| {
        let _stop = RaiseOnDrop(&stop);
        for writer in 0..4 {
            let (db, stop, round) = (&db, &stop, &round);
            scope.spawn(move || {
                let mut client = db.connect();
                while !stop.load(Ordering::Relaxed) {
                    let first = 1000 * round.fetch_add(1, Ordering::Relaxed);
                    if writer == 0 {
                        copy(&mut client, first, 500);
                        continue;
                    }
                    let mut tx = client.transaction().unwrap();
                    tx.batch_execute(&views(first, 50)).unwrap();
                    std::thread::sleep(Duration::from_millis(u64::from(first / 1000 % 5) * 10));
                    if first / 1000 % 4 == 0 { tx.rollback() } else { tx.commit() }.unwrap();
                }
            });
        }
        // Mergers beside the worker, two of them.
        for _ in 0..2 {
            let (db, stop) = (&db, &stop);
            scope.spawn(move || {
                let mut client = db.connect();
                while !stop.load(Ordering::Relaxed) {
                    client.batch_execute("SELECT spend_rollup_run('views')").unwrap();
                }
            });
        }
        let started = Instant::now();
        let mut looks = 0;
        while started.elapsed() < Duration::from_secs(8) || looks <= 5 {
            let mut tx =
                client.build_transaction().isolation_level(IsolationLevel::RepeatableRead).start().unwrap();
            assert_no_rows(tx.query(SHORT_DIFFERENCE, &[]).unwrap(), "live view and source differ");
            tx.commit().unwrap();
            looks += 1;
        }
    });
    merged(&mut client, "views");
    assert_views_exact(&mut client);
    assert!(holds(&mut client, "SELECT watermark > 20000 FROM spend_rollup_status"));
}

/// Groups whose count or sum differs.
const SHORT_DIFFERENCE: &str = "
    SELECT * FROM (SELECT site_id, path, minute, views, bytes FROM litellm_spend.views) AS v
    FULL JOIN (SELECT site_id, path, date_trunc('minute', view_time, 'UTC') AS minute, count(*) AS views, sum(bytes) AS bytes
               FROM page_views GROUP BY 1, 2, 3) AS s
        ON (coalesce(v.site_id, -1), coalesce(v.path, ''), v.minute) = (coalesce(s.site_id, -1), coalesce(s.path, ''), s.minute)
    WHERE (v.views, v.bytes) IS DISTINCT FROM (s.views, s.bytes)";

fn copy(client: &mut Client, first: u32, n: u32) {
    let mut writer = client.copy_in("COPY page_views (site_id, path, view_time, bytes) FROM STDIN").unwrap();
    for i in first..first + n {
        writeln!(writer, "{}\t/copied\t2026-03-{} 10:{}:00Z\t0.125", i % 5, 10 + i % 9, 10 + i % 50).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn two_mergers_never_count_a_row_twice() {
    let (db, mut client) = page_views_with_rollup();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = RaiseOnDrop(&stop);
        let mergers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = db.connect();
                    let mut merged = 0;
                    while !stop.load(Ordering::Relaxed) {
                        let row = client
                            .query_one("SELECT rows, outcome FROM spend_rollup_run('views')", &[])
                            .unwrap();
                        assert_ne!(row.get::<_, &str>(1), "failed", "that another was faster is no failure");
                        merged += row.get::<_, i64>(0);
                    }
                    merged
                })
            })
            .collect();
        for i in 0..200 {
            client.batch_execute(&views(i * 40, 40)).unwrap();
        }
        merged(&mut client, "views");
        stop.store(true, Ordering::Relaxed);
        let by_calls: i64 = mergers.into_iter().map(|m| m.join().unwrap()).sum();
        assert!(by_calls > 0, "the callers merged nothing");
        assert!(
            holds(&mut client, "SELECT last_error IS NULL FROM spend_rollup_status"),
            "a slower one saw an error"
        );
        // Not the live view, which would add the tail.
        let counted: i64 = value(&mut client, "SELECT sum(views)::bigint FROM litellm_spend.views_rollup");
        assert_eq!(counted, 8000);
        assert_views_exact(&mut client);
    });
}

#[test]
fn a_rolled_back_or_prepared_row_is_counted_only_once_committed() {
    let (db, mut client) = page_views_with_rollup();
    let mut writer = db.connect();
    let counted = "SELECT coalesce(sum(views), 0)::bigint FROM litellm_spend.views";
    writer.batch_execute(&format!("BEGIN; {}; ROLLBACK", views(0, 10))).unwrap();
    assert_eq!(value::<i64>(&mut client, counted), 0);
    writer.batch_execute(&format!("BEGIN; {}; PREPARE TRANSACTION 'declared'", views(10, 10))).unwrap();
    client.batch_execute(&views(20, 5)).unwrap();
    assert_eq!(value::<i64>(&mut client, counted), 5);
    wait_for_a_round(&mut client);
    assert!(
        holds(&mut client, "SELECT watermark <= 10 AND tail_rows = 5 FROM spend_rollup_status"),
        "merged too far"
    );
    client.batch_execute("COMMIT PREPARED 'declared'").unwrap();
    assert_eq!(value::<i64>(&mut client, counted), 15);
    merged(&mut client, "views");
    assert_eq!(value::<i64>(&mut client, counted), 15);
    assert_views_exact(&mut client);
}

// ---- sources ---------------------------------------------------------------------------------------------

/// A statement that runs may have drawn a number and not put its row in yet, also where it is our own.
#[test]
fn a_merge_from_within_a_statement_that_writes_the_source_loses_no_row() {
    let (_db, mut client) = without_worker();
    client
        .batch_execute(
            "SET litellm_spend.window_wait = '60s';
             CREATE TABLE t (id bigserial, k int NOT NULL) PARTITION BY LIST (k);
             CREATE TABLE t_1 PARTITION OF t FOR VALUES IN (1);
             SELECT spend_rollup_create('r', 't', '{k}', '{count(*) AS n}'), spend_rollup_register('h', 't');
             CREATE TABLE said (at serial, outcome text, window_start bigint, window_end bigint);
             CREATE FUNCTION merge() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
                 INSERT INTO said (outcome, window_start, window_end)
                     SELECT r.outcome, h.window_start, h.window_end
                     FROM spend_rollup_run('r') AS r, spend_rollup_window('h') AS h;
                 RETURN 1;
             END $$;
             CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 PERFORM merge(); RETURN new;
             END $$",
        )
        .unwrap();
    let fires = |when: &str| format!("CREATE TRIGGER fire {when} EXECUTE FUNCTION fire()");
    let said =
        "SELECT concat(outcome, ' ', window_end - window_start + 1) FROM said ORDER BY at DESC LIMIT 1";
    let started = Instant::now();
    for (trigger, statement, rows) in [
        (fires("BEFORE INSERT ON t FOR EACH ROW"), "INSERT INTO t (k) VALUES (1), (1)", 2),
        (fires("BEFORE INSERT ON t_1 FOR EACH ROW"), "INSERT INTO t_1 (k) VALUES (1)", 1),
        (fires("BEFORE INSERT ON t_1 FOR EACH ROW"), "INSERT INTO t (k) VALUES (1)", 1),
        (String::new(), "INSERT INTO t (k) VALUES (merge())", 1),
        ("ALTER TABLE t ALTER k SET DEFAULT merge()".into(), "INSERT INTO t DEFAULT VALUES", 1),
        (fires("AFTER INSERT ON t FOR EACH STATEMENT"), "INSERT INTO t (k) VALUES (1), (1)", 2),
        (fires("BEFORE INSERT ON t FOR EACH ROW"), "COPY t (k) FROM PROGRAM 'echo 1; echo 1'", 2),
    ] {
        // A later statement of the transaction has its rows, and so has another transaction.
        for end in ["COMMIT", "ROLLBACK"] {
            client.batch_execute("SELECT merge(); BEGIN").unwrap();
            client.batch_execute(&trigger).unwrap();
            client.batch_execute(statement).unwrap();
            assert_eq!(value::<String>(&mut client, said), "waiting for writers 0", "{trigger} {statement}");
            client.batch_execute("SELECT merge()").unwrap();
            assert_eq!(value::<String>(&mut client, said), format!("merged {rows}"), "{trigger} {statement}");
            let truth = "SELECT k, count(*) FROM t GROUP BY k";
            assert_same(&mut client, "SELECT k, n FROM litellm_spend.r_rollup", truth);
            client
                .batch_execute(&format!(
                    "{end}; DROP TRIGGER IF EXISTS fire ON t; DROP TRIGGER IF EXISTS fire ON t_1;
                     ALTER TABLE t ALTER k DROP DEFAULT"
                ))
                .unwrap();
        }
    }
    // Nobody waits for what cannot end meanwhile.
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    assert_no_rows(client.query("SELECT * FROM spend_rollup_verify('r')", &[]).unwrap(), "verify");
}

#[test]
fn a_row_inserted_straight_into_a_leaf_is_counted() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE events (id bigserial, at timestamp NOT NULL, kind text) PARTITION BY RANGE (at);
             CREATE TABLE events_a PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
             CREATE TABLE events_b PARTITION OF events FOR VALUES FROM ('2026-02-01') TO ('2026-03-01') PARTITION BY LIST (kind);
             CREATE TABLE events_bx PARTITION OF events_b FOR VALUES IN ('x');
             INSERT INTO events (at, kind) SELECT '2026-01-05', 'x' FROM generate_series(1, 10);
             SELECT spend_rollup_create('per_day', 'events', '{at::date AS day,kind}', '{count(*) AS n}')",
        )
        .unwrap();
    let mut open = db.connect();
    // It is waited for, too, though it holds no lock on the parent.
    open.batch_execute("BEGIN; INSERT INTO events_bx (at, kind) VALUES ('2026-02-02', 'x')").unwrap();
    for _ in 0..5 {
        client
            .batch_execute(
                "INSERT INTO events_a (at, kind) VALUES ('2026-01-06', 'x'); INSERT INTO events (at, kind) VALUES ('2026-02-03', 'x')",
            )
            .unwrap();
        wait_for_a_round(&mut client);
    }
    assert!(
        holds(&mut client, "SELECT watermark <= 10 FROM spend_rollup_status"),
        "the leaf's writer was passed"
    );
    open.batch_execute("COMMIT").unwrap();
    merged(&mut client, "per_day");
    assert_same(
        &mut client,
        "SELECT day, kind, n FROM litellm_spend.per_day_rollup",
        "SELECT at::date, kind, count(*) FROM events GROUP BY 1, 2",
    );
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.per_day"), 21);
}

/// A database whose function `gate()` lets an INSERT wait that has its number already, until [`open_gate`],
/// and who keeps it.
fn gated(db: &Database) -> Client {
    let mut gate = db.connect();
    gate.batch_execute(
        "CREATE FUNCTION gate(v int) RETURNS int LANGUAGE plpgsql
         AS $$ BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN v; END $$;
         SELECT pg_advisory_lock(1)",
    )
    .unwrap();
    gate
}

fn open_gate(gate: &mut Client) {
    gate.batch_execute("SELECT pg_advisory_unlock(1)").unwrap();
}

/// Runs an INSERT that waits at the gate; returns once it does.
fn held<'a>(
    scope: &'a std::thread::Scope<'a, '_>,
    db: &Database,
    client: &mut Client,
    insert: &'static str,
) -> i32 {
    let mut writer = db.connect();
    let pid = backend_pid(&mut writer);
    scope.spawn(move || writer.batch_execute(insert).unwrap());
    eventually("it has its number and waits", || {
        let sql = format!(
            "SELECT count(*) = 1 FROM pg_locks WHERE pid = {pid} AND locktype = 'advisory' AND NOT granted"
        );
        holds(client, &sql)
    });
    pid
}

/// Merges what can be, beside the worker.
fn run(client: &mut Client) {
    client.batch_execute("SET litellm_spend.window_wait = 0; SELECT spend_rollup_run()").unwrap();
}

#[test]
fn a_row_inserted_through_an_ancestor_of_the_source_is_counted() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE parent (id bigserial, at date NOT NULL, v int) PARTITION BY RANGE (at);
             CREATE TABLE leaf PARTITION OF parent FOR VALUES FROM ('2026-11-01') TO ('2026-12-01');
             CREATE TABLE sub PARTITION OF parent FOR VALUES FROM ('2026-12-01') TO ('2027-01-01') PARTITION BY RANGE (at);
             CREATE TABLE sub1 PARTITION OF sub FOR VALUES FROM ('2026-12-01') TO ('2027-01-01');
             CREATE TABLE old_parent (id bigserial, v int); CREATE TABLE child () INHERITS (old_parent);
             CREATE FUNCTION route() RETURNS trigger LANGUAGE plpgsql
             AS $$ BEGIN INSERT INTO child VALUES (new.*); RETURN NULL; END $$;
             CREATE TRIGGER route BEFORE INSERT ON old_parent FOR EACH ROW EXECUTE FUNCTION route();
             CREATE TABLE fringe () INHERITS (child)",
        )
        .unwrap();
    let sources = ["leaf", "sub", "sub1", "child", "parent"];
    for source in sources {
        let sql =
            format!("SELECT spend_rollup_create('of_{source}', '{source}', '{{v}}', '{{count(*) AS n}}')");
        client.batch_execute(&sql).unwrap();
    }
    std::thread::scope(|scope| {
        let mut gate = gated(&db);
        let writers = [
            "INSERT INTO parent (at, v) VALUES ('2026-11-05', gate(1))",
            "INSERT INTO parent (at, v) VALUES ('2026-12-05', gate(1))",
            "INSERT INTO old_parent (v) VALUES (gate(1))",
        ]
        .map(|insert| held(scope, &db, &mut client, insert));
        client
            .batch_execute(
                "INSERT INTO parent (at, v) VALUES ('2026-11-06', 2), ('2026-12-06', 2);
                 INSERT INTO old_parent (v) VALUES (2); INSERT INTO fringe (v) VALUES (3)",
            )
            .unwrap();
        run(&mut client);
        let passed = "SELECT rollup FROM spend_rollup_status WHERE watermark > 0";
        assert_no_rows(client.query(passed, &[]).unwrap(), "passed an open number");
        for (rollup, pids) in
            [("of_leaf", &writers[..2]), ("of_sub1", &writers[..2]), ("of_child", &writers[2..])]
        {
            let blockers =
                format!("SELECT blocked_by_pids FROM spend_rollup_status WHERE rollup = '{rollup}'");
            // All of them, or the first, if the worker looked before the others came.
            eventually("who is in the way is named", || {
                value::<Option<Vec<i32>>>(&mut client, &blockers)
                    .is_some_and(|found| !found.is_empty() && found.iter().all(|pid| pids.contains(pid)))
            });
        }
        open_gate(&mut gate);
    });
    for source in sources {
        merged(&mut client, &format!("of_{source}"));
        assert_same(
            &mut client,
            &format!("SELECT v, n FROM litellm_spend.of_{source}_rollup"),
            &format!("SELECT v, count(*) FROM {source} GROUP BY 1"),
        );
    }
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.of_leaf"), 2);
    assert_verified(&mut client);
}

#[test]
fn a_row_on_its_way_to_a_source_that_is_attached_meanwhile_is_counted() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE top (id bigserial, at date NOT NULL, v int) PARTITION BY RANGE (at);
             CREATE TABLE middle PARTITION OF top FOR VALUES FROM ('2026-01-01') TO ('2027-01-01') PARTITION BY RANGE (at);
             CREATE TABLE leaf (LIKE top INCLUDING DEFAULTS);
             SELECT spend_rollup_create('of_leaf', 'leaf', '{v}', '{count(*) AS n}')",
        )
        .unwrap();
    std::thread::scope(|scope| {
        let mut gate = gated(&db);
        // It has its number, but not yet looked into which partition of the middle the row goes.
        held(scope, &db, &mut client, "INSERT INTO top (at, v) VALUES ('2026-11-05', gate(1))");
        client.batch_execute("INSERT INTO leaf (at, v) VALUES ('2026-11-06', 2)").unwrap();
        run(&mut client);
        client
            .batch_execute(
                "ALTER TABLE middle ATTACH PARTITION leaf FOR VALUES FROM ('2026-11-01') TO ('2026-12-01')",
            )
            .unwrap();
        run(&mut client);
        open_gate(&mut gate);
    });
    merged(&mut client, "of_leaf");
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.of_leaf"), 2);
    assert_verified(&mut client);
    // And from now on, through both ancestors.
    client.batch_execute("INSERT INTO top (at, v) VALUES ('2026-11-07', 3); INSERT INTO middle (at, v) VALUES ('2026-11-07', 3)").unwrap();
    merged(&mut client, "of_leaf");
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.of_leaf"), 4);
    assert_verified(&mut client);
}

#[test]
fn a_row_in_a_partition_that_is_attached_while_a_call_waits_is_counted() {
    let (db, mut client) = without_worker();
    client
        .batch_execute(
            "CREATE TABLE ev (id bigserial, t int) PARTITION BY RANGE (t);
             CREATE TABLE ev_a PARTITION OF ev FOR VALUES FROM (0) TO (10);
             SELECT spend_rollup_create('r', 'ev', '{t}', '{count(*) AS n}')",
        )
        .unwrap();
    let (mut first, mut second, mut caller) = (db.connect(), db.connect(), db.connect());
    // Another role's, so that nothing but the tree leads to its writer.
    client
        .batch_execute("CREATE ROLE other; CREATE TABLE ev_b (LIKE ev INCLUDING DEFAULTS); ALTER TABLE ev_b OWNER TO other")
        .unwrap();
    first.batch_execute("BEGIN; INSERT INTO ev_a VALUES (DEFAULT, 1)").unwrap();
    std::thread::scope(|scope| {
        let pid = backend_pid(&mut caller);
        let call = scope.spawn(move || {
            caller.batch_execute("SET litellm_spend.window_wait = '60s'").unwrap();
            value::<i64>(&mut caller, "SELECT window_end FROM spend_rollup_run('r')")
        });
        // It has looked once when it holds what a look reads.
        eventually("the call waits", || {
            let sql = format!(
                "SELECT count(*) > 0 FROM pg_locks WHERE pid = {pid} AND relation = 'ev_id_seq'::regclass"
            );
            holds(&mut client, &sql)
        });
        client.batch_execute("ALTER TABLE ev ATTACH PARTITION ev_b FOR VALUES FROM (10) TO (20)").unwrap();
        second.batch_execute("BEGIN; INSERT INTO ev_b VALUES (DEFAULT, 11)").unwrap();
        first.batch_execute("COMMIT").unwrap();
        // There is no event to wait for: it must not return, unless with the last value that it had read
        // before.
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(100));
        }
        let early = call.is_finished();
        second.batch_execute("COMMIT").unwrap();
        let end = call.join().unwrap();
        assert!(!early || end == 1, "passed an open number");
    });
    client.batch_execute("SELECT spend_rollup_run('r')").unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.r_rollup"), 2);
    assert_verified(&mut client);
}

#[test]
fn a_source_whose_parent_numbers_its_rows_otherwise_is_refused_or_stops_until_it_does_not() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE parent (id bigserial, v int) PARTITION BY LIST (v);
             CREATE TABLE numbered (id bigserial, v int); CREATE TABLE later (id bigserial, v int);
             ALTER TABLE parent ATTACH PARTITION numbered FOR VALUES IN (1);
             CREATE TABLE numberless (id bigint, v int) PARTITION BY LIST (v);
             CREATE TABLE below (id bigserial, v int); ALTER TABLE numberless ATTACH PARTITION below FOR VALUES IN (1);
             CREATE TABLE old_parent (id bigserial, v int); CREATE TABLE child (id bigserial) INHERITS (old_parent);
             CREATE TABLE identity (id bigint NOT NULL, v int) PARTITION BY LIST (v); CREATE TABLE one (id bigserial, v int);
             ALTER TABLE identity ATTACH PARTITION one FOR VALUES IN (1);
             ALTER TABLE ONLY identity ALTER id ADD GENERATED ALWAYS AS IDENTITY",
        )
        .unwrap();
    for (source, reason) in [
        ("numbered", "given another default"),
        ("below", "given none"),
        ("child", "given another default"),
        ("one", "numbered by sequence public.identity_id_seq"),
    ] {
        for call in [
            format!("SELECT spend_rollup_create('x', '{source}', '{{v}}', '{{count(*) AS n}}')"),
            format!("SELECT spend_rollup_register('x', '{source}')"),
        ] {
            assert_refused(&mut client, &call, "55000");
            let error = error(&mut client, &call);
            assert!(error.detail().unwrap().contains(reason), "{source}: {error:?}");
        }
    }
    // A column of that name that the parent does not have is numbered in the child.
    client
        .batch_execute(
            "CREATE TABLE bare (v int); CREATE TABLE full_one (id bigserial) INHERITS (bare);
             SELECT spend_rollup_register('fine', 'full_one')",
        )
        .unwrap();

    client
        .batch_execute(
            "SELECT spend_rollup_create('of_later', 'later', '{v}', '{count(*) AS n}');
             SELECT spend_rollup_register('by_hand', 'later'); INSERT INTO later (v) VALUES (2)",
        )
        .unwrap();
    merged(&mut client, "of_later");
    client
        .batch_execute(
            "ALTER TABLE parent ATTACH PARTITION later FOR VALUES IN (2);
             INSERT INTO parent (v) VALUES (2)",
        )
        .unwrap();
    eventually("the status says so, though the source's own sequence stands still", || {
        let sql = "SELECT last_error LIKE 'rows written to public.parent are not numbered by %' FROM spend_rollup_status
                   WHERE rollup = 'of_later'";
        holds(&mut client, sql)
    });
    client.batch_execute("INSERT INTO later (v) VALUES (2)").unwrap();
    assert_refused(&mut client, "SELECT spend_rollup_window('by_hand')", "55000");
    assert_eq!(value::<String>(&mut client, "SELECT outcome FROM spend_rollup_run('of_later')"), "failed");
    // As the hint says.
    client.batch_execute("ALTER TABLE parent ALTER COLUMN id SET DEFAULT nextval('later_id_seq')").unwrap();
    client.batch_execute("INSERT INTO parent (v) VALUES (2)").unwrap();
    merged(&mut client, "of_later");
    assert!(holds(
        &mut client,
        "SELECT last_error IS NULL FROM spend_rollup_status WHERE rollup = 'of_later'"
    ));
    client.batch_execute("SELECT spend_rollup_rebuild('of_later', force => true)").unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.of_later"), 4);
    // Its own default, too.
    client.batch_execute("ALTER TABLE later ALTER id DROP DEFAULT").unwrap();
    assert_refused(&mut client, "SELECT spend_rollup_window('by_hand')", "55000");
}

#[test]
fn the_tail_is_planned_as_a_small_part_of_the_source() {
    let (_db, mut client) = without_worker();
    client.batch_execute(PAGE_VIEWS).unwrap();
    client
        .batch_execute(
            "CREATE DOMAIN digits AS numeric(30);
             CREATE TABLE far (x int, id digits DEFAULT nextval('page_views_view_id_seq'))",
        )
        .unwrap();
    client.batch_execute(&views(0, 10000)).unwrap();
    client
        .batch_execute(
            "SELECT spend_rollup_create('views', 'page_views', '{site_id}', '{count(*) AS n}');
             SELECT spend_rollup_create('far', 'far', '{x}', '{count(*) AS n}', 'page_views_view_id_seq');
             SELECT spend_rollup_run(); ANALYZE page_views",
        )
        .unwrap();
    let plan = client.query("EXPLAIN SELECT * FROM litellm_spend.views", &[]).unwrap();
    let plan: Vec<String> = plan.iter().map(|line| line.get(0)).collect();
    let scan = plan.iter().find(|line| line.contains("Scan on page_views"));
    let scan = scan.unwrap_or_else(|| panic!("{plan:#?}"));
    // Not a third of them, for which parallel workers are started where there are millions.
    let rows: u32 = scan.split("rows=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(rows <= 100, "{plan:#?}");
    // A number that only a numeric can be is in the tail as any other.
    client.batch_execute("INSERT INTO far VALUES (1, 1e19), (1, DEFAULT)").unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT n FROM litellm_spend.far"), 2);
}

#[test]
fn identity_and_default_columns_number_rows_as_well() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"CREATE TABLE a (id int GENERATED ALWAYS AS IDENTITY, x int);
               CREATE SEQUENCE "Odd 'seq'" START 1000; CREATE SEQUENCE other;
               CREATE TABLE "B ""tab""" ("the Id" bigint NOT NULL DEFAULT nextval('"Odd ''seq''"'), x int, y bigint DEFAULT nextval('other'));
               CREATE TABLE c (id smallserial, x int);"#,
        )
        .unwrap();
    for (name, table, sequence) in
        [("ra", "a", "NULL"), ("r\"b", r#""B ""tab""""#, r#"'"Odd ''seq''"'"#), ("rc", "c", "NULL")]
    {
        client
            .batch_execute(&format!("INSERT INTO {table} (x) SELECT i % 3 FROM generate_series(1, 100) i"))
            .unwrap();
        client
            .batch_execute(&format!(
                "SELECT spend_rollup_create('{name}', '{}', '{{x}}', '{{count(*) AS n}}', {sequence})",
                table.replace('\'', "''")
            ))
            .unwrap();
        client
            .batch_execute(&format!("INSERT INTO {table} (x) SELECT i % 3 FROM generate_series(1, 100) i"))
            .unwrap();
        merged(&mut client, name);
        let view = format!("litellm_spend.\"{}\"", name.replace('"', "\"\""));
        assert_eq!(value::<i64>(&mut client, &format!("SELECT sum(n)::bigint FROM {view}")), 200, "{name}");
    }
    assert_verified(&mut client);
}

#[test]
fn rows_that_are_there_are_merged_in_bounded_batches_with_progress() {
    let (_db, mut client) = without_worker();
    client.batch_execute(PAGE_VIEWS).unwrap();
    client.batch_execute(&views(0, 1000)).unwrap();
    // A gap of many windows costs one.
    client.batch_execute("SELECT setval('page_views_view_id_seq', 9000000000)").unwrap();
    client.batch_execute(&views(1000, 500)).unwrap();
    client.batch_execute("SET litellm_spend.max_window = 100").unwrap();
    client.batch_execute(CREATE).unwrap();
    assert_views_exact(&mut client);
    let step = "SELECT litellm_spend.backfill_step('page_views')";
    let mut steps = 0;
    loop {
        let progress: Option<String> = value(&mut client, step);
        assert_views_exact(&mut client);
        steps += 1;
        if steps == 5 {
            assert!(progress.unwrap().contains("rollup views: 500 of 9000000500"));
            assert_eq!(
                value::<i64>(&mut client, "SELECT sum(views)::bigint FROM litellm_spend.views_rollup"),
                500
            );
        } else if progress.is_none() {
            break;
        }
    }
    assert!((15..=17).contains(&steps), "{steps} steps");
    client.batch_execute("CALL spend_backfill('page_views')").unwrap();
    assert!(holds(&mut client, "SELECT backfill_progress = 100 AND tail_rows = 0 FROM spend_rollup_status"));
    assert_views_exact(&mut client);
}

#[test]
fn the_worker_begins_with_a_small_window() {
    let (_db, mut client) = page_views();
    client
        .batch_execute(
            "SELECT spend_rollup_create('hundreds', 'page_views', ARRAY['(view_id - 1) / 100 AS hundred'],
                                        ARRAY['count(*) AS n']);
             INSERT INTO page_views (site_id) SELECT 1 FROM generate_series(1, 150000)",
        )
        .unwrap();
    eventually("all is merged", || {
        holds(&mut client, "SELECT sum(n) = 150000 FROM litellm_spend.hundreds_rollup")
    });
    // All rows of a window are of one transaction. (So few, because one that takes too long is cut; on a busy
    // machine these may be, too.)
    let windows: Vec<i64> = client
        .query(
            "SELECT sum(n)::bigint FROM litellm_spend.hundreds_rollup GROUP BY xmin::text ORDER BY min(hundred)",
            &[],
        )
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!(windows.len() > 1 && windows[0] <= 100_000, "{windows:?}");
    assert_eq!(windows.iter().sum::<i64>(), 150_000, "{windows:?}");
}

#[test]
fn a_column_of_a_rollups_table_that_its_owner_changes_stops_that_rollup_at_most() {
    let (db, mut client) = without_worker();
    client
        .batch_execute(
            "CREATE TABLE changed (id bigserial, i int, t text);
             INSERT INTO changed (i, t) VALUES (1, 'a'), (2, 'b')",
        )
        .unwrap();
    for (n, change) in [
        "ALTER i TYPE text",
        "ALTER t TYPE int USING 0",
        "ALTER n TYPE text",
        "DROP COLUMN t",
        "DROP COLUMN n",
    ]
    .iter()
    .enumerate()
    {
        client
            .batch_execute(&format!(
                "SELECT spend_rollup_create('changed_{n}', 'changed', '{{i, t}}', '{{count(*) AS n}}');
                 DROP VIEW litellm_spend.changed_{n};
                 ALTER TABLE litellm_spend.changed_{n}_rollup {change}"
            ))
            .unwrap();
        // What PostgreSQL makes of it: a value is converted, or an error says what it expects.
        let outcome = format!("SELECT outcome FROM spend_rollup_run('changed_{n}')");
        let outcome = client.query_one(&outcome, &[]).map(|row| row.get::<_, String>(0));
        assert!(outcome.is_err() || ["merged", "failed"].contains(&outcome.unwrap().as_str()), "{change}");
    }
    assert!(holds(&mut db.connect(), "SELECT true"), "the server is there");
}

/// Groups are written past the executor where a statement would do nothing else with them.
#[test]
fn what_an_owner_adds_to_a_rollups_table_is_heeded_by_every_merge() {
    let (_db, mut client) = without_worker();
    client
        .batch_execute(
            "CREATE TABLE fired (n bigint);
             CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql AS
                 $$BEGIN INSERT INTO public.fired VALUES (new.n); RETURN new; END$$;
             CREATE TABLE changed (id bigserial, i int, t text)",
        )
        .unwrap();
    let changes = [
        ("a trigger", "CREATE TRIGGER fire AFTER INSERT OR UPDATE ON % FOR EACH ROW EXECUTE FUNCTION fire()"),
        ("a column", "ALTER TABLE % ADD more text DEFAULT 'more'"),
        ("a computed column", "ALTER TABLE % ADD twice bigint GENERATED ALWAYS AS (2 * n) STORED"),
        ("a check", "ALTER TABLE % ADD CHECK (n < 8)"),
        ("a column that takes no NULL", "ALTER TABLE % ALTER t SET NOT NULL"),
        ("an index", "CREATE INDEX by_text ON % (upper(t)) WHERE n > 0"),
        ("another key", "ALTER TABLE % ADD UNIQUE (i, t, n) DEFERRABLE INITIALLY DEFERRED"),
        ("a policy", "ALTER TABLE % ENABLE ROW LEVEL SECURITY"),
    ];
    for (place, (what, change)) in changes.iter().enumerate() {
        let (name, table) = (format!("changed_{place}"), format!("litellm_spend.changed_{place}_rollup"));
        client
            .batch_execute(&format!(
                "TRUNCATE fired, changed; SELECT spend_rollup_create('{name}', 'changed', '{{i, t}}', '{{count(*) AS n}}');
                 {}",
                change.replace('%', &table)
            ))
            .unwrap();
        // Two groups that are new, then one that is there and one that is new.
        for rows in ["(1, 'a'), (2, 'b')", "(1, 'a'), (NULL, 'c')"] {
            client.batch_execute(&format!("INSERT INTO changed (i, t) VALUES {rows}")).unwrap();
            let outcome = format!("SELECT outcome FROM spend_rollup_run('{name}')");
            assert_eq!(client.query_one(&outcome, &[]).unwrap().get::<_, String>(0), "merged", "{what}");
        }
        let expected = "SELECT i, t, count(*) FROM changed GROUP BY i, t";
        assert_same(&mut client, &format!("SELECT i, t, n FROM {table}"), expected);
        let heeded = match *what {
            "a trigger" => "(SELECT count(*) = 4 AND sum(n) = 5 FROM fired)".into(),
            "a column" => format!("(SELECT bool_and(more = 'more') FROM {table})"),
            "a computed column" => format!("(SELECT bool_and(twice = 2 * n) FROM {table})"),
            "a check" | "a column that takes no NULL" => {
                let row = if *what == "a check" { "(1, 'a')" } else { "(1, NULL)" };
                client
                    .batch_execute(&format!(
                        "INSERT INTO changed (i, t) SELECT v.* FROM (VALUES {row}) AS v, generate_series(1, 9)"
                    ))
                    .unwrap();
                let outcome = format!("SELECT outcome FROM spend_rollup_run('{name}')");
                assert_eq!(client.query_one(&outcome, &[]).unwrap().get::<_, String>(0), "failed", "{what}");
                format!("(SELECT sum(n) = 4 FROM {table})")
            }
            "an index" => {
                format!("(SELECT count(*) = 3 FROM {table} WHERE upper(t) IN ('A', 'B', 'C') AND n > 0)")
            }
            _ => "true".into(),
        };
        client.batch_execute("SET enable_seqscan = off").unwrap();
        assert!(holds(&mut client, &format!("SELECT {heeded}")), "{what}");
        client.batch_execute(&format!("RESET enable_seqscan; SELECT spend_rollup_drop('{name}')")).unwrap();
    }
}

#[test]
fn who_changes_a_merged_row_by_hand_loses_no_row_that_is_merged_meanwhile() {
    let (db, mut client) = without_worker();
    client
        .batch_execute(
            "CREATE TABLE changed (id bigserial, i int);
             SELECT spend_rollup_create('by_hand', 'changed', '{i}', '{count(*) AS n, sum(id) AS ids}');
             INSERT INTO changed (i) SELECT g % 3 FROM generate_series(1, 9) AS g",
        )
        .unwrap();
    let outcome = "SELECT outcome FROM spend_rollup_run('by_hand')";
    assert_eq!(client.query_one(outcome, &[]).unwrap().get::<_, String>(0), "merged");
    client.batch_execute("INSERT INTO changed (i) SELECT g % 4 FROM generate_series(1, 8) AS g").unwrap();

    let mut hand = db.connect();
    hand.batch_execute("BEGIN; UPDATE litellm_spend.by_hand_rollup SET ids = ids + 1000 WHERE i = 1")
        .unwrap();
    let merge = |merger: &mut Client| value::<String>(merger, outcome);
    let first = while_it_waits(&db, merge, |_, _| hand.batch_execute("COMMIT").unwrap());
    if first != "merged" {
        assert_eq!(merge(&mut client), "merged", "after {first}");
    }
    let expected = "SELECT i, count(*), sum(id) + CASE i WHEN 1 THEN 1000 ELSE 0 END FROM changed GROUP BY i";
    assert_same(&mut client, "SELECT i, n, ids FROM litellm_spend.by_hand_rollup", expected);
}

/// Code of the owner's runs while the source is read, between when the columns of the rollup's table are
/// looked up and when they are written.
#[test]
fn a_column_of_a_rollups_table_does_not_change_while_it_is_merged() {
    let (db, mut client) = without_worker();
    client
        .batch_execute(
            "CREATE TABLE source (id bigserial, k int, v numeric);
             CREATE FUNCTION change() RETURNS void LANGUAGE plpgsql AS $$BEGIN
                 DROP VIEW IF EXISTS litellm_spend.changing;
                 ALTER TABLE litellm_spend.changing_rollup ALTER s TYPE bigint USING 0, ALTER n TYPE text USING '';
             END$$;
             CREATE FUNCTION f(x int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$BEGIN
                 IF x = 7 THEN PERFORM public.change(); END IF;
                 RETURN x;
             END$$;
             INSERT INTO source (k, v) SELECT 1, i FROM generate_series(1, 3) AS i",
        )
        .unwrap();
    let run = "SELECT outcome FROM spend_rollup_run('changing')";
    for plain in [true, false] {
        client
            .batch_execute(
                "SELECT spend_rollup_create('changing', 'source', '{f(k) AS k}', '{count(*) AS n, sum(v) AS s}')",
            )
            .unwrap();
        if !plain {
            client.batch_execute("ALTER TABLE litellm_spend.changing_rollup ADD CHECK (n > 0)").unwrap();
        }
        assert_eq!(client.query_one(run, &[]).unwrap().get::<_, String>(0), "merged");
        client.batch_execute("INSERT INTO source (k, v) VALUES (7, 1)").unwrap();
        assert_eq!(client.query_one(run, &[]).unwrap().get::<_, String>(0), "failed");
        client.batch_execute("UPDATE source SET k = 8 - k").unwrap();
        let error = client.batch_execute("SELECT spend_rollup_rebuild('changing')").unwrap_err();
        assert!(error.as_db_error().unwrap().message().contains("being used by active queries"), "{error:?}");
        client.batch_execute("UPDATE source SET k = 8 - k; UPDATE source SET k = 8 WHERE k = 7").unwrap();
        assert_eq!(client.query_one(run, &[]).unwrap().get::<_, String>(0), "merged");
        let expected = "SELECT k, count(*), sum(v) FROM source GROUP BY k";
        assert_same(&mut client, "SELECT k, n, s FROM litellm_spend.changing_rollup", expected);
        client.batch_execute("SELECT spend_rollup_drop('changing')").unwrap();
    }
    assert!(holds(&mut db.connect(), "SELECT true"), "the server is there");
}

#[test]
fn an_expression_whose_type_changes_while_it_is_prepared_is_read_as_what_it_returns() {
    let (db, mut client) = without_worker();
    let dimensions = |collation: &str, function: &str| {
        format!(
            r#"ARRAY[$$x::text COLLATE "{collation}" AS k0$$, 'public.{function}(x) AS k1',
                     $$(('{{1}}'::public.dom[])[1])::int AS k2$$], '{{count(*) AS n}}'"#
        )
    };
    // The server looks at the constant's elements, and calls the domain's check, when it has seen what f
    // returns. What changes then it hears of when it looks the collation up, which it has not done before.
    client
        .batch_execute(&format!(
            "CREATE TABLE source (id bigserial, x bigint); CREATE TABLE other (id bigserial, x bigint);
             CREATE FUNCTION chk(int) RETURNS bool LANGUAGE plpgsql AS $$BEGIN
                 PERFORM pg_advisory_xact_lock_shared(hashtext('analysis'));
                 RETURN true;
             END$$;
             CREATE DOMAIN dom AS int CHECK (public.chk(value));
             CREATE FUNCTION f(bigint) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$BEGIN RETURN 'k'; END$$;
             CREATE FUNCTION g(bigint) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$BEGIN RETURN 'k'; END$$;
             SELECT spend_rollup_create('rx', 'source', {}); SELECT spend_rollup_create('ry', 'other', {})",
            dimensions("af-x-icu", "f"),
            dimensions("agq-x-icu", "g")
        ))
        .unwrap();
    let mut merging = db.connect();
    for _ in 0..2 {
        merging
            .batch_execute("INSERT INTO other (x) VALUES (1); SELECT * FROM spend_rollup_run('ry')")
            .unwrap();
    }
    client
        .batch_execute("INSERT INTO source (x) VALUES (4242); SELECT pg_advisory_lock(hashtext('analysis'))")
        .unwrap();
    let run = std::thread::spawn(move || -> String {
        merging.query_one("SELECT outcome FROM spend_rollup_run('rx')", &[]).unwrap().get(0)
    });
    let waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))";
    eventually("the merge analyzes its query", || holds(&mut client, waits));
    client
        .batch_execute(
            "BEGIN; DROP VIEW litellm_spend.rx; DROP FUNCTION f(bigint);
             CREATE FUNCTION f(bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT $1';
             ALTER TABLE source ALTER x SET STATISTICS 5; COMMIT;
             SELECT pg_advisory_unlock(hashtext('analysis'))",
        )
        .unwrap();
    assert_eq!(run.join().unwrap(), "merged");
    assert_same(
        &mut client,
        "SELECT k0, k1, k2, n FROM litellm_spend.rx_rollup",
        "VALUES ('4242', '4242', 1, 1)",
    );
}

#[test]
fn keys_of_any_length_take_no_more_memory_than_groups_may() {
    let (_db, mut client) = without_worker();
    client
        .batch_execute(
            "CREATE TABLE long (id bigserial, x int); INSERT INTO long (x) SELECT generate_series(1, 2000);
             SET maintenance_work_mem = '8MB'; SET hash_mem_multiplier = 2;
             SELECT spend_rollup_create('long', 'long', ARRAY['repeat(repeat(''x'', 1000), 48) || x AS k'], '{count(*) AS n}')",
        )
        .unwrap();
    let before = most_memory(&mut client);
    assert_eq!(value::<String>(&mut client, "SELECT outcome FROM spend_rollup_run('long')"), "merged");
    // All at once would be 96 MB. Of 16, half as much again while what is kept grows, and what SQL takes.
    let used = most_memory(&mut client) - before;
    assert!(used < 64, "{used} MB");
    let expected = "SELECT repeat(repeat('x', 1000), 48) || x, 1 FROM long";
    assert_same(&mut client, "SELECT k, n FROM litellm_spend.long_rollup", expected);
}

#[test]
fn a_value_that_a_rollups_column_does_not_hold_is_an_error() {
    let (_db, mut client) = without_worker();
    client
        .batch_execute(
            "CREATE TABLE sized (id bigserial, s varchar(10), n numeric(12, 4), t timestamp(3));
             SELECT spend_rollup_create('sized', 'sized', '{s}', '{count(*) AS c, sum(n) AS n, max(t) AS t}');
             DROP VIEW litellm_spend.sized;
             ALTER TABLE litellm_spend.sized_rollup ALTER s TYPE varchar(4), ALTER n TYPE numeric(8, 2), ALTER t TYPE timestamp(0);
             INSERT INTO sized (s, n, t) VALUES ('a', 12.3456, '2026-01-01 00:00:00.7'), ('b', 1, NULL)",
        )
        .unwrap();
    let run = |client: &mut Client, rollup: &str| -> String {
        client.query_one(&format!("SELECT outcome FROM spend_rollup_run('{rollup}')"), &[]).unwrap().get(0)
    };
    assert_eq!(run(&mut client, "sized"), "merged");
    let fitted =
        "SELECT n = 12.35 AND t = '2026-01-01 00:00:01' FROM litellm_spend.sized_rollup WHERE s = 'a'";
    assert!(holds(&mut client, fitted));
    client.batch_execute("INSERT INTO sized (s, n) VALUES ('too long', 1)").unwrap();
    assert_eq!(run(&mut client, "sized"), "failed");

    client
        .batch_execute(
            "CREATE TABLE large (id bigserial, g int, n numeric);
             SELECT spend_rollup_create('large', 'large', '{g}', '{sum(n) AS n}')",
        )
        .unwrap();
    for outcome in ["merged", "failed"] {
        client.batch_execute("INSERT INTO large (n) VALUES (9.9e131071)").unwrap();
        assert_eq!(run(&mut client, "large"), outcome);
    }
    assert!(holds(
        &mut client,
        "SELECT last_error LIKE 'value overflows numeric format%' FROM spend_rollup_status WHERE rollup = 'large'"
    ));
}

#[test]
fn counts_that_an_owner_keeps_as_numeric_are_added_up() {
    let (_db, mut client) = without_worker();
    client
        .batch_execute(
            "CREATE TABLE things (id bigserial, k int NOT NULL, v int);
             SELECT spend_rollup_create('of_things', 'things', '{k}', '{count(*) AS n, sum(v) AS s}');
             INSERT INTO things (k, v) SELECT i % 3, i FROM generate_series(1, 10) AS i;
             SELECT spend_rollup_run('of_things');
             DROP VIEW litellm_spend.of_things;
             ALTER TABLE litellm_spend.of_things_rollup ALTER n TYPE numeric, ALTER s TYPE numeric",
        )
        .unwrap();
    let truth = "SELECT k, count(*)::numeric, sum(v)::numeric FROM things GROUP BY k";
    for hashed in ["on", "on", "off"] {
        client
            .batch_execute(&format!(
                "SET litellm_spend.hash_groups = {hashed};
                 INSERT INTO things (k, v) SELECT i % 4, i FROM generate_series(1, 7) AS i;
                 SELECT spend_rollup_run('of_things')"
            ))
            .unwrap();
        assert_same(&mut client, "SELECT k, n, s FROM litellm_spend.of_things_rollup", truth);
    }
    // What a bigint no longer holds is what the type was changed for.
    client
        .batch_execute(
            "UPDATE litellm_spend.of_things_rollup SET n = 9223372036854775807 WHERE k = 1;
             SET litellm_spend.hash_groups = on;
             INSERT INTO things (k, v) VALUES (1, 0);
             SELECT spend_rollup_run('of_things')",
        )
        .unwrap();
    assert!(holds(
        &mut client,
        "SELECT n = 9223372036854775808 FROM litellm_spend.of_things_rollup WHERE k = 1"
    ));
}

/// Rows that a rewrite has moved are not in a snapshot from before it.
#[test]
fn verify_that_waits_for_a_rewrite_compares_what_is_there_after_it() {
    let (db, mut client) = without_worker();
    client.batch_execute(PAGE_VIEWS).unwrap();
    client.batch_execute(CREATE).unwrap();
    client.batch_execute(&views(0, 300)).unwrap();
    client.batch_execute("SELECT spend_rollup_run(); SELECT spend_rollup_run()").unwrap();
    for table in ["litellm_spend.views_rollup", "page_views"] {
        let mut rewriter = db.connect();
        rewriter
            .batch_execute(&format!(
                "BEGIN; ALTER TABLE {table} SET UNLOGGED; ALTER TABLE {table} SET LOGGED"
            ))
            .unwrap();
        let verify = |verifier: &mut Client| {
            value::<i64>(verifier, "SELECT count(*) FROM spend_rollup_verify('views')")
        };
        let different = while_it_waits(&db, verify, |_, _| rewriter.batch_execute("COMMIT").unwrap());
        assert_eq!(different, 0, "{table}");
    }
}

#[test]
fn the_worker_keeps_brin_indexes_of_a_source_up_to_its_new_rows() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE narrow (id bigserial, at int, k int) PARTITION BY RANGE (at);
             CREATE TABLE narrow_1 PARTITION OF narrow FOR VALUES FROM (0) TO (10) WITH (autovacuum_enabled = off);
             CREATE TABLE narrow_2 PARTITION OF narrow FOR VALUES FROM (10) TO (20) WITH (autovacuum_enabled = off);
             CREATE INDEX ON narrow USING brin (id) WITH (pages_per_range = 2);
             SELECT spend_rollup_create('by_k', 'narrow', '{k}', '{count(*) AS n}')",
        )
        .unwrap();
    for round in 1..=2 {
        client
            .batch_execute(
                "INSERT INTO narrow (at, k) SELECT i % 20, i % 3 FROM generate_series(1, 20000) AS i",
            )
            .unwrap();
        eventually("it is merged", || {
            holds(
                &mut client,
                &format!(
                    "SELECT watermark = {} AND last_error IS NULL FROM spend_rollup_status",
                    round * 20_000
                ),
            )
        });
        // The last pages are left alone: the next rows come there.
        for index in ["narrow_1_id_idx", "narrow_2_id_idx"] {
            assert_eq!(
                value::<i32>(&mut client, &format!("SELECT brin_summarize_new_values('{index}')")),
                1,
                "{index}, round {round}"
            );
        }
    }
    assert!(value::<i32>(&mut client, "SELECT count(*)::int FROM litellm_spend.by_k") == 3);
}

#[test]
fn the_backfill_of_a_table_steps_the_rollups_of_all_its_sequences() {
    let (_db, mut client) = without_worker();
    client
        .batch_execute(
            "CREATE TABLE twice (a bigserial, b bigserial, x int);
             SELECT spend_rollup_create('by_a', 'twice', '{x}', '{count(*) AS n}', 'twice_a_seq');
             SELECT spend_rollup_create('by_b', 'twice', '{x}', '{count(*) AS n}', 'twice_b_seq');
             INSERT INTO twice (x) SELECT i % 3 FROM generate_series(1, 100) AS i",
        )
        .unwrap();
    client.batch_execute("CALL spend_backfill('twice')").unwrap();
    for rollup in ["by_a", "by_b"] {
        let sql = format!("SELECT coalesce(sum(n), 0)::bigint FROM litellm_spend.{rollup}_rollup");
        assert_eq!(value::<i64>(&mut client, &sql), 100, "{rollup}");
    }
}

#[test]
fn a_sequence_set_back_stops_the_rollup_and_says_so() {
    let (_db, mut client) = page_views_with_rollup();
    client.batch_execute(&views(0, 100)).unwrap();
    merged(&mut client, "views");
    client.batch_execute("SELECT setval('page_views_view_id_seq', 10)").unwrap();
    eventually("the status says so", || {
        holds(&mut client, "SELECT last_error LIKE '%was set back%' FROM spend_rollup_status")
    });
    client.batch_execute(&views(100, 20)).unwrap();
    assert_eq!(
        value::<i64>(&mut client, "SELECT sum(views)::bigint FROM litellm_spend.views"),
        100,
        "nothing is lost"
    );
    // As the hint says.
    client.batch_execute("SELECT setval('page_views_view_id_seq', 100)").unwrap();
    eventually("nothing more need come for the error to go", || {
        holds(&mut client, "SELECT last_error IS NULL FROM spend_rollup_status")
    });
    client.batch_execute(&views(200, 20)).unwrap();
    merged(&mut client, "views");
    assert!(holds(&mut client, "SELECT last_error IS NULL FROM spend_rollup_status"));
    client.batch_execute("SELECT spend_rollup_rebuild('views')").unwrap();
    assert_views_exact(&mut client);
    // A restart that goes forward is none.
    client.batch_execute("ALTER SEQUENCE page_views_view_id_seq RESTART 5000").unwrap();
    wait_for_a_round(&mut client);
    assert!(holds(&mut client, "SELECT last_error IS NULL FROM spend_rollup_status"));
    client.batch_execute(&views(300, 20)).unwrap();
    merged(&mut client, "views");
    assert_views_exact(&mut client);
    // One to the last merged number goes back: it is given again.
    client.batch_execute("ALTER SEQUENCE page_views_view_id_seq RESTART 5019").unwrap();
    eventually("the status says so", || {
        holds(&mut client, "SELECT last_error LIKE '%was set back%' FROM spend_rollup_status")
    });
    client.batch_execute("ALTER SEQUENCE page_views_view_id_seq RESTART 5020").unwrap();
    eventually("the error goes", || holds(&mut client, "SELECT last_error IS NULL FROM spend_rollup_status"));
    client.batch_execute(&views(320, 20)).unwrap();
    merged(&mut client, "views");
    assert_views_exact(&mut client);
}

/// An explicit number may lie between two of the sequence's.
#[test]
fn a_gap_that_ends_at_a_fraction_is_left_behind() {
    let (_db, mut client) = without_worker();
    client
        .batch_execute(
            "CREATE SEQUENCE numbers;
             CREATE TABLE fractions (id numeric DEFAULT nextval('numbers'), k int NOT NULL);
             SELECT spend_rollup_create('fractions', 'fractions', '{k}', '{count(*) AS n}');
             SELECT setval('numbers', 30); INSERT INTO fractions VALUES (10.4, 1), (20.6, 1), (29.5, 1);
             SET litellm_spend.max_window = 1; SET statement_timeout = '20s';
             SELECT spend_rollup_run('fractions')",
        )
        .unwrap();
    assert!(holds(&mut client, "SELECT n = 3 FROM litellm_spend.fractions_rollup"));
    assert!(holds(&mut client, "SELECT watermark = 30 FROM litellm_spend.rollup WHERE name = 'fractions'"));
    // Behind the last row there is none to stop at.
    client
        .batch_execute("SELECT setval('numbers', 1000000000000); SELECT spend_rollup_run('fractions')")
        .unwrap();
    assert!(holds(
        &mut client,
        "SELECT watermark = 1000000000000 FROM litellm_spend.rollup WHERE name = 'fractions'"
    ));
}

// ---- others beside it ------------------------------------------------------------------------------------

#[test]
fn vacuum_analyze_and_concurrent_indexes_neither_block_nor_are_cancelled() {
    let db = own_cluster(&["autovacuum_naptime = '1s'"]).database();
    let mut client = db.connect();
    client.batch_execute(PAGE_VIEWS).unwrap();
    client
        .batch_execute("ALTER TABLE page_views SET (autovacuum_vacuum_insert_threshold = 100, autovacuum_vacuum_insert_scale_factor = 0, autovacuum_analyze_threshold = 100)")
        .unwrap();
    client.batch_execute(CREATE).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = RaiseOnDrop(&stop);
        scope.spawn(|| {
            let mut client = db.connect();
            let mut i = 0;
            while !stop.load(Ordering::Relaxed) {
                client.batch_execute(&views(i * 100, 100)).unwrap();
                i += 1;
            }
        });
        let before: i64 = value(&mut client, "SELECT watermark FROM spend_rollup_status");
        // Else the server cancels an autovacuum that these wait for.
        let patient = "SET deadlock_timeout = '10min'";
        client.batch_execute(patient).unwrap();
        for _ in 0..5 {
            client.batch_execute("VACUUM ANALYZE page_views").unwrap();
            client.batch_execute("CREATE INDEX CONCURRENTLY by_path ON page_views (path)").unwrap();
            client.batch_execute("DROP INDEX CONCURRENTLY by_path").unwrap();
        }
        // Nor does one that stays stop the merges: its lock is not a writer's.
        let mut other = db.connect();
        other.batch_execute(patient).unwrap();
        other.batch_execute("BEGIN; LOCK TABLE page_views IN SHARE UPDATE EXCLUSIVE MODE").unwrap();
        let during: i64 = value(&mut client, "SELECT watermark FROM spend_rollup_status");
        eventually("it merges on", || {
            value::<i64>(&mut client, "SELECT watermark FROM spend_rollup_status") > during + 1000
        });
        other.batch_execute("COMMIT").unwrap();
        assert!(during >= before);
        eventually("autovacuum came", || {
            holds(
                &mut client,
                "SELECT autovacuum_count + autoanalyze_count >= 2 FROM pg_stat_all_tables WHERE relname = 'page_views'",
            )
        });
    });
    assert!(!db.autovacuum_was_cancelled("public.page_views"));
    merged(&mut client, "views");
    assert_views_exact(&mut client);
}

#[test]
fn an_error_in_one_rollup_does_not_stop_another() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(PAGE_VIEWS).unwrap();
    client
        .batch_execute(
            "SELECT spend_rollup_create('a_fails', 'page_views', '{100 / site_id AS x}', '{count(*) AS n}');
             SELECT spend_rollup_create('b_works', 'page_views', '{site_id}', '{count(*) AS n}')",
        )
        .unwrap();
    client.batch_execute("INSERT INTO page_views (site_id) VALUES (5), (0)").unwrap();
    client.batch_execute(&insert_rows("z", 10, 3)).unwrap();
    merged(&mut client, "b_works");
    eventually("the failure is noted", || {
        holds(
            &mut client,
            "SELECT last_error = 'division by zero' AND last_error_at IS NOT NULL FROM spend_rollup_status WHERE rollup = 'a_fails'",
        )
    });
    wait_until_live(&mut client);
    merged(&mut client, "daily_spend");
    // A call says it and goes on as well.
    let outcomes = client.query("SELECT rollup, outcome FROM spend_rollup_run()", &[]).unwrap();
    let failed: Vec<&str> =
        outcomes.iter().filter(|r| r.get::<_, &str>(1) == "failed").map(|r| r.get(0)).collect();
    assert_eq!(failed, ["a_fails"]);
    // Mended, it goes on by itself.
    client.batch_execute("DELETE FROM page_views WHERE site_id = 0").unwrap();
    merged(&mut client, "a_fails");
    assert!(holds(&mut client, "SELECT bool_and(last_error IS NULL) FROM spend_rollup_status"));
}

#[test]
fn a_merge_does_not_wait_for_who_changes_the_source() {
    let (db, mut client) = without_worker();
    client.batch_execute(PAGE_VIEWS).unwrap();
    client.batch_execute(CREATE).unwrap();
    client.batch_execute(&views(0, 100)).unwrap();
    client.batch_execute("SET statement_timeout = '10s'").unwrap();
    let mut owner = db.connect();
    let run = "SELECT outcome FROM spend_rollup_run('views')";
    for change in ["TRUNCATE page_views", "ALTER TABLE page_views ADD COLUMN more int"] {
        owner.batch_execute(&format!("BEGIN; {change}")).unwrap();
        assert_eq!(value::<String>(&mut client, run), "busy", "{change}");
        owner.batch_execute("ROLLBACK").unwrap();
    }
    // Its sequence is locked as well.
    owner.batch_execute("BEGIN; DROP TABLE page_views CASCADE").unwrap();
    client.batch_execute("SET litellm_spend.lock_timeout = '50ms'").unwrap();
    assert_eq!(value::<String>(&mut client, run), "failed");
    owner.batch_execute("ROLLBACK").unwrap();
    assert_eq!(value::<String>(&mut client, run), "merged");
    assert!(holds(&mut client, "SELECT tail_rows = 0 AND last_error IS NULL FROM spend_rollup_status"));
    assert_views_exact(&mut client);
}

#[test]
fn two_databases_with_three_rollups_each_are_current_by_one_worker_each() {
    let databases = [shared().database(), shared().database()];
    let mut clients: Vec<Client> = databases.iter().map(|db| db.connect()).collect();
    for client in &mut clients {
        client.batch_execute(PAGE_VIEWS).unwrap();
        for (name, dimension) in
            [("by_site", "site_id"), ("by_path", "path"), ("by_day", "view_time::date AS day")]
        {
            client
                .batch_execute(&format!(
                    "SELECT spend_rollup_create('{name}', 'page_views', ARRAY['{dimension}'], '{{count(*) AS n}}')"
                ))
                .unwrap();
        }
    }
    for i in 0..20 {
        clients.iter_mut().for_each(|client| client.batch_execute(&views(i * 100, 100)).unwrap());
    }
    for (client, db) in clients.iter_mut().zip(&databases) {
        ["by_site", "by_path", "by_day"].iter().for_each(|rollup| merged(client, rollup));
        for rollup in ["by_site", "by_path", "by_day"] {
            let sql = format!("SELECT sum(n)::bigint FROM litellm_spend.{rollup}_rollup");
            assert_eq!(value::<i64>(client, &sql), 2000, "{rollup}");
        }
        let sql = format!(
            "SELECT count(*) FROM spend_worker_status WHERE kind = 'litellm_spend worker' AND database = '{}'",
            db.name
        );
        assert_eq!(value::<i64>(client, &sql), 1);
        assert_verified(client);
    }
}

#[test]
fn a_publication_for_all_tables_does_not_stop_merging() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute("CREATE PUBLICATION everything FOR ALL TABLES").unwrap();
    client.batch_execute(PAGE_VIEWS).unwrap();
    client.batch_execute(CREATE).unwrap();
    for i in 0..3 {
        client.batch_execute(&views(0, 100)).unwrap();
        client.batch_execute(&insert_rows(&format!("p{i}-"), 100, 3)).unwrap();
        merged(&mut client, "views");
        wait_until_merged(&mut client);
    }
    assert!(holds(&mut client, "SELECT bool_and(last_error IS NULL) FROM spend_rollup_status"));
    assert_views_exact(&mut client);
    assert_exact(&mut client);
}

// ---- rebuild, verify, drop -------------------------------------------------------------------------------

#[test]
fn whoever_puts_his_own_cursor_in_the_place_of_a_comparisons_gets_an_error_and_no_more() {
    let (db, mut client) = page_views_with_rollup();
    client.batch_execute(&views(0, 2000)).unwrap();
    merged(&mut client, "views");
    client.batch_execute("UPDATE litellm_spend.views_rollup SET views = views + 1").unwrap();
    client
        .batch_execute(
            r#"BEGIN;
               DECLARE a CURSOR FOR SELECT spend_rollup_verify('views');
               FETCH 1 FROM a;
               CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE plpgsql AS
                   $$ DECLARE c refcursor := 'a'; r record; BEGIN FOR i IN 1..2000 LOOP FETCH c INTO r; END LOOP; RETURN 1; END $$"#,
        )
        .unwrap();
    let cursor: String =
        value(&mut client, "SELECT name FROM pg_cursors WHERE name LIKE '<unnamed portal %'");
    client
        .batch_execute(&format!(
            r#"CLOSE "{cursor}"; DECLARE "{cursor}" CURSOR FOR SELECT pg_temp.f() FROM generate_series(1, 3)"#
        ))
        .unwrap();
    let failed = error(&mut client, &format!(r#"FETCH 1 FROM "{cursor}""#));
    assert_eq!(failed.code().code(), "55000", "{failed:?}");
    client.batch_execute("ROLLBACK").unwrap();
    assert!(!db.cluster.log().contains("terminated by signal 6"), "the server was aborted");
}

#[test]
fn a_range_is_rebuilt_and_what_differs_is_found() {
    let (_db, mut client) = page_views_with_rollup();
    client.batch_execute(&views(0, 2000)).unwrap();
    merged(&mut client, "views");
    client
        .batch_execute("UPDATE litellm_spend.views_rollup SET views = views + 1, bytes = 0 WHERE minute = '2026-03-29 11:31Z'")
        .unwrap();
    let differing: i64 = value(&mut client, "SELECT count(*) FROM spend_rollup_verify('views')");
    let touched: i64 = value(
        &mut client,
        "SELECT count(*) FROM litellm_spend.views_rollup WHERE minute = '2026-03-29 11:31Z'",
    );
    assert_eq!(differing, touched);
    // The arguments are UTC, whatever the session's zone.
    client.batch_execute("SET TimeZone = 'Asia/Seoul'").unwrap();
    let groups: i64 = value(
        &mut client,
        "SELECT spend_rollup_rebuild('views', '2026-03-29 11:31', '2026-03-29 11:32', true)",
    );
    assert_eq!(groups, touched);
    assert_verified(&mut client);
    assert_views_exact(&mut client);
    // Raw rows that are gone: the rollup is their only record.
    client.batch_execute("DELETE FROM page_views WHERE view_time >= '2026-03-29 10:00Z'").unwrap();
    assert_refused(&mut client, "SELECT spend_rollup_rebuild('views')", "55000");
    assert_refused(&mut client, "SELECT spend_rollup_rebuild('views', '2026-03-29 10:00')", "55000");
    assert_eq!(value::<i64>(&mut client, "SELECT sum(views)::bigint FROM litellm_spend.views"), 2000);
    client.batch_execute("SELECT spend_rollup_rebuild('views', '2026-03-29 10:00', force => true)").unwrap();
    assert_views_exact(&mut client);
    assert_refused(&mut client, "SELECT spend_rollup_rebuild('views', '2026-03-29 10:00:30')", "22023");
    assert_refused(&mut client, "SELECT spend_rollup_verify('views', '2026-03-29', '2026-03-28')", "22023");
}

#[test]
fn rows_that_are_deleted_while_a_rebuild_is_under_way_stay_counted() {
    let (db, mut client) = page_views_with_rollup();
    client.batch_execute(&views(0, 2000)).unwrap();
    merged(&mut client, "views");
    let rebuild = "SELECT spend_rollup_rebuild('views')";
    client.batch_execute(rebuild).unwrap();
    // It has looked whether all rows are there, and waits for somebody's lock of a row that it takes away.
    let mut holder = db.connect();
    holder.batch_execute("BEGIN; SELECT FROM litellm_spend.views_rollup LIMIT 1 FOR UPDATE").unwrap();
    let error = error_after_waiting(&db, rebuild, |client, _| {
        client.batch_execute("DELETE FROM page_views WHERE view_time < '2026-03-28 12:00Z'").unwrap();
        holder.batch_execute("COMMIT").unwrap();
    });
    assert_eq!(error.unwrap().code().code(), "55000");
    assert_eq!(value::<i64>(&mut client, "SELECT sum(views)::bigint FROM litellm_spend.views"), 2000);
    client.batch_execute("SELECT spend_rollup_rebuild('views', force => true)").unwrap();
    assert_views_exact(&mut client);
}

#[test]
fn a_lost_bucket_is_named_whatever_time_it_is() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE dated (id bigserial PRIMARY KEY, d date, t timestamptz);
             SELECT spend_rollup_create('by_date', 'dated', '{d}', '{count(*) AS n}');
             SELECT spend_rollup_create('by_time', 'dated', '{t}', '{count(*) AS n}');
             INSERT INTO dated (d, t) VALUES (NULL, NULL), ('-infinity', '-infinity'), ('4714-11-24 BC', '4714-11-24 BC Z'),
                 ('2026-11-18', '2026-11-18 Z'), ('294277-01-01', '2026-11-19 Z'), ('5874897-12-31', '294276-12-31 23:59:59.999999Z'),
                 ('infinity', 'infinity')",
        )
        .unwrap();
    merged(&mut client, "by_date");
    merged(&mut client, "by_time");
    // Whoever reads the message is told in UTC.
    client.batch_execute("SET TimeZone = 'Asia/Seoul'; SET DateStyle = 'German'").unwrap();
    // From the last one on.
    for (id, date, time) in [
        (7, "infinity", "infinity"),
        (6, "5874897-12-31", "294276-12-31 23:59:59.999999+00"),
        (5, "294277-01-01", "2026-11-19 00:00:00+00"),
        (4, "2026-11-18", "2026-11-18 00:00:00+00"),
        (3, "4714-11-24 BC", "4714-11-24 00:00:00+00 BC"),
        (2, "some time", "some time"),
        (1, "some time", "some time"),
    ] {
        client.batch_execute(&format!("DELETE FROM dated WHERE id = {id}")).unwrap();
        for (rollup, bucket) in [("by_date", date), ("by_time", time)] {
            let call = format!("SELECT spend_rollup_rebuild('{rollup}')");
            assert_refused(&mut client, &call, "55000");
            let message = error(&mut client, &call).message().to_string();
            assert_eq!(message, format!("rollup \"{rollup}\" knows of more rows at {bucket} than there are"));
            client.batch_execute(&format!("SELECT spend_rollup_rebuild('{rollup}', force => true)")).unwrap();
        }
        assert_verified(&mut client);
        client.batch_execute("SELECT * FROM spend_rollup_status").unwrap();
    }
}

#[test]
fn a_rollup_without_time_is_rebuilt_as_a_whole() {
    let (_db, mut client) = page_views();
    client
        .batch_execute(
            "SELECT spend_rollup_create('sites', 'page_views', '{site_id}', '{max(bytes) AS most}')",
        )
        .unwrap();
    client.batch_execute(&views(0, 100)).unwrap();
    merged(&mut client, "sites");
    client.batch_execute("UPDATE page_views SET bytes = 99 WHERE site_id = 1").unwrap();
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM spend_rollup_verify('sites')"), 1);
    client.batch_execute("SELECT spend_rollup_rebuild('sites')").unwrap();
    assert_same(
        &mut client,
        "SELECT * FROM litellm_spend.sites",
        "SELECT site_id, max(bytes) FROM page_views GROUP BY 1",
    );
    assert_refused(&mut client, "SELECT spend_rollup_rebuild('sites', '2026-03-29')", "22023");
}

#[test]
fn dropping_a_rollup_leaves_nothing_and_dropping_its_source_leaves_history() {
    let (_db, mut client) = page_views_with_rollup();
    client.batch_execute(&views(0, 100)).unwrap();
    merged(&mut client, "views");
    client.batch_execute("SELECT spend_rollup_drop('views')").unwrap();
    let left = "SELECT (SELECT count(*) FROM pg_class WHERE relname LIKE 'views%' AND relnamespace = 'litellm_spend'::regnamespace)
                     + (SELECT count(*) FROM pg_proc WHERE proname = 'views.sites')
                     + (SELECT count(*) FROM litellm_spend.rollup) + (SELECT count(*) FROM litellm_spend.source)";
    assert_eq!(value::<i64>(&mut client, left), 0);

    client.batch_execute(CREATE).unwrap();
    client.batch_execute("SELECT spend_rollup_register('mine', 'page_views')").unwrap();
    merged(&mut client, "views");
    assert_eq!(error(&mut client, "DROP TABLE page_views").code().code(), "2BP01", "a reader depends on it");
    client.batch_execute("DROP TABLE page_views CASCADE").unwrap();
    eventually("the status says so", || {
        holds(
            &mut client,
            "SELECT bool_and(source IS NULL AND last_error LIKE 'its source was dropped%') AND count(*) = 2 FROM spend_rollup_status",
        )
    });
    assert_eq!(
        value::<i64>(&mut client, "SELECT sum(views)::bigint FROM litellm_spend.views"),
        100,
        "history"
    );
    for call in [
        "SELECT spend_rollup_rebuild('views')",
        "SELECT spend_rollup_run('views')",
        "SELECT spend_rollup_window('mine')",
    ] {
        assert_refused(&mut client, call, "55000");
    }
    client.batch_execute("SELECT spend_rollup_drop('views'), spend_rollup_drop('mine')").unwrap();
    assert_eq!(value::<i64>(&mut client, left), 0);
    // The name is free again.
    client.batch_execute(PAGE_VIEWS).unwrap();
    client.batch_execute(CREATE).unwrap();
}

#[test]
fn a_rollup_follows_its_source_when_all_of_a_role_is_reassigned() {
    let (_db, mut client) = page_views_with_rollup();
    client
        .batch_execute(
            "DROP ROLE IF EXISTS former_r, heir_r; CREATE ROLE former_r; CREATE ROLE heir_r;
             ALTER TABLE page_views OWNER TO former_r",
        )
        .unwrap();
    client.batch_execute(&views(0, 100)).unwrap();
    merged(&mut client, "views");
    client
        .batch_execute(
            "BEGIN; REASSIGN OWNED BY former_r TO heir_r; DROP OWNED BY former_r; DROP ROLE former_r; COMMIT",
        )
        .unwrap();
    client.batch_execute(&views(100, 100)).unwrap();
    merged(&mut client, "views");
    assert_views_exact(&mut client);
    assert!(holds(
        &mut client,
        "SELECT owner = 'heir_r'::regrole FROM litellm_spend.rollup WHERE name = 'views'"
    ));
    client
        .batch_execute(
            "SELECT spend_rollup_rebuild('views'); SELECT spend_rollup_drop('views');
             DROP OWNED BY heir_r CASCADE; DROP ROLE heir_r",
        )
        .unwrap();
}

#[test]
fn the_rollup_follows_the_owner_of_its_source_and_a_dropped_live_view_is_made_again() {
    let (db, mut client) = page_views_with_rollup();
    client.batch_execute("DROP ROLE IF EXISTS heir_h; CREATE ROLE heir_h LOGIN").unwrap();
    client.batch_execute(&views(0, 100)).unwrap();
    merged(&mut client, "views");
    client.batch_execute("ALTER TABLE page_views OWNER TO heir_h; DROP VIEW litellm_spend.views").unwrap();
    client.batch_execute(&views(100, 100)).unwrap();
    eventually("the heir reads it", || {
        let mut heir = shared().connect_as(&db.name, "heir_h");
        let sum = heir.query_one("SELECT sum(views)::bigint FROM litellm_spend.views", &[]);
        sum.is_ok_and(|row| row.get::<_, i64>(0) == 200)
    });
    merged(&mut client, "views");
    assert_views_exact(&mut client);
    let owner = "SELECT relowner = 'heir_h'::regrole FROM pg_class WHERE oid = 'litellm_spend.views_rollup'::regclass";
    assert!(holds(&mut client, owner));
    assert!(holds(
        &mut client,
        "SELECT bool_and(proowner = 'heir_h'::regrole) FROM pg_proc WHERE proname = 'views.sites'"
    ));
    assert!(holds(
        &mut client,
        "SELECT obj_description('litellm_spend.views'::regclass, 'pg_class') LIKE 'Rollup views%'"
    ));
    client
        .batch_execute("SELECT spend_rollup_drop('views'); DROP OWNED BY heir_h CASCADE; DROP ROLE heir_h")
        .unwrap();
}

#[test]
fn one_rollup_that_cannot_be_read_does_not_hide_the_others() {
    let (_db, mut client) = page_views_with_rollup();
    client
        .batch_execute("CREATE TABLE other (id bigserial, x int); SELECT spend_rollup_create('fine', 'other', '{x}', '{count(*) AS n}')")
        .unwrap();
    client.batch_execute("INSERT INTO page_views (view_time) VALUES ('-infinity')").unwrap();
    client.batch_execute("ALTER TABLE page_views RENAME COLUMN view_id TO number").unwrap();
    client.batch_execute("INSERT INTO page_views (site_id) VALUES (1)").unwrap();
    eventually("the status names the one", || {
        holds(
            &mut client,
            "SELECT bool_or(last_error LIKE '%view_id%') AND count(*) = 2 FROM spend_rollup_status",
        )
    });
    client.batch_execute("INSERT INTO other (x) VALUES (1)").unwrap();
    merged(&mut client, "fine");
    client.batch_execute("ALTER TABLE page_views RENAME COLUMN number TO view_id").unwrap();
    merged(&mut client, "views");
    assert_views_exact(&mut client);
}

/// By name it would merge the other column, while the live view shows the old one.
#[test]
fn a_rollup_stops_when_another_column_gets_the_name_of_one_that_it_reads() {
    let changes = [
        // The usual change of a type without a rewrite.
        ("bytes", "ALTER TABLE seen RENAME bytes TO bytes_old; ALTER TABLE seen ADD bytes bigint"),
        (
            "bytes",
            "ALTER TABLE seen RENAME bytes TO x; ALTER TABLE seen RENAME other TO bytes; ALTER TABLE seen RENAME x TO other",
        ),
        // Both are read, so that the names are the same as before.
        (
            "bytes",
            "ALTER TABLE seen RENAME bytes TO x; ALTER TABLE seen RENAME site TO bytes; ALTER TABLE seen RENAME x TO site",
        ),
        (
            "id",
            "ALTER TABLE seen ADD id_new bigint; ALTER TABLE seen RENAME id TO id_old; ALTER TABLE seen RENAME id_new TO id;
             ALTER TABLE seen ALTER id_old DROP DEFAULT; ALTER TABLE seen ALTER id_old DROP NOT NULL;
             ALTER TABLE seen ALTER id SET DEFAULT nextval('seen_id_seq')",
        ),
        // The live view is made again, over the new column.
        (
            "bytes",
            "BEGIN; DROP VIEW litellm_spend.v; ALTER TABLE seen DROP bytes; ALTER TABLE seen ADD bytes bigint; COMMIT",
        ),
    ];
    for (column, change) in changes {
        let db = shared().database();
        let mut client = db.connect();
        client
            .batch_execute(
                "CREATE TABLE seen (site bigint, bytes bigint, other bigint, id bigserial);
                 SELECT spend_rollup_create('v', 'seen', '{site}', '{sum(bytes) AS bytes, count(*) AS n}');
                 INSERT INTO seen (site, bytes, other) VALUES (1, 10, 99)",
            )
            .unwrap();
        merged(&mut client, "v");
        client.batch_execute(change).unwrap();
        client.batch_execute("INSERT INTO seen (site) VALUES (5)").unwrap();
        let says = format!(
            "SELECT coalesce(last_error, '') LIKE '%column \"{column}\" of %seen% is not the one%' FROM spend_rollup_status"
        );
        eventually(change, || {
            let counted = "SELECT sum(n) = 2 FROM litellm_spend.v_rollup";
            assert!(!holds(&mut client, counted), "merged after: {change}");
            holds(&mut client, &says)
        });
        for call in [
            "SELECT spend_rollup_run('v')",
            "SELECT spend_rollup_verify('v')",
            "SELECT spend_rollup_rebuild('v')",
        ] {
            match call.contains("run") {
                true => client.batch_execute(call).unwrap(),
                false => assert_refused(&mut client, call, "55000"),
            }
        }
        assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.v_rollup"), 1);
    }
}

#[test]
fn a_rollup_goes_on_when_a_column_has_its_name_back_or_one_that_it_does_not_read_changes() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE seen (gone int, site int, other int, id bigserial); ALTER TABLE seen DROP gone;
             SELECT spend_rollup_create('v', 'seen', '{site}', '{count(*) AS n}');
             ALTER TABLE seen RENAME other TO another; ALTER TABLE seen ADD other text;
             INSERT INTO seen (site) VALUES (1); ALTER TABLE seen RENAME site TO place; INSERT INTO seen (place) VALUES (1)",
        )
        .unwrap();
    eventually("it says so", || {
        holds(&mut client, "SELECT last_error LIKE '%\"site\"%is not the one%' FROM spend_rollup_status")
    });
    client.batch_execute("ALTER TABLE seen RENAME place TO site").unwrap();
    merged(&mut client, "v");
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.v_rollup"), 2);
}

#[test]
fn a_null_in_a_column_that_could_have_none_stops_the_rollup_and_says_what_to_do() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE t (id bigserial, site int NOT NULL);
             SELECT spend_rollup_create('r', 't', '{site}', '{count(*) AS n}');
             ALTER TABLE t ALTER site DROP NOT NULL; INSERT INTO t (site) VALUES (1), (NULL)",
        )
        .unwrap();
    eventually("it says so", || {
        holds(
            &mut client,
            "SELECT last_error LIKE '%NULL%' AND last_error LIKE '%ALTER TABLE %t% ALTER COLUMN % SET NOT NULL%'
             FROM spend_rollup_status",
        )
    });
    client.batch_execute("UPDATE t SET site = 0 WHERE site IS NULL").unwrap();
    merged(&mut client, "r");
    client.batch_execute("UPDATE t SET site = NULL WHERE id = 1").unwrap();
    for hashed in ["on", "off"] {
        client.batch_execute(&format!("SET litellm_spend.hash_groups = {hashed}")).unwrap();
        assert_refused(&mut client, "SELECT spend_rollup_rebuild('r')", "23502");
    }
}

#[test]
fn what_a_crash_empties_is_no_source_and_stops_one_that_becomes_it() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE UNLOGGED SEQUENCE s; CREATE TABLE t (id bigint DEFAULT nextval('s'), x int);
             CREATE TABLE p (id bigserial, x int) PARTITION BY LIST (x);
             CREATE UNLOGGED TABLE p_1 PARTITION OF p FOR VALUES IN (1);
             CREATE TABLE later (id bigserial, x int);
             SELECT spend_rollup_create('later', 'later', '{x}', '{count(*) AS n}')",
        )
        .unwrap();
    assert_refused(&mut client, "SELECT spend_rollup_create('r', 't', '{x}', '{count(*) AS n}')", "55000");
    assert_refused(&mut client, "SELECT spend_rollup_register('r', 't')", "55000");
    assert_refused(&mut client, "SELECT spend_rollup_create('r', 'p', '{x}', '{count(*) AS n}')", "42809");
    client
        .batch_execute(
            "ALTER SEQUENCE s SET LOGGED; SELECT spend_rollup_create('r', 't', '{x}', '{count(*) AS n}')",
        )
        .unwrap();
    for (change, back, rollup, table) in [
        ("ALTER SEQUENCE s SET UNLOGGED", "ALTER SEQUENCE s SET LOGGED", "r", "t"),
        ("ALTER TABLE later SET UNLOGGED", "ALTER TABLE later SET LOGGED", "later", "later"),
    ] {
        client.batch_execute(&format!("{change}; INSERT INTO {table} (x) VALUES (1)")).unwrap();
        eventually("it says so", || {
            holds(
                &mut client,
                &format!(
                    "SELECT last_error LIKE '%crash%' FROM spend_rollup_status WHERE rollup = '{rollup}'"
                ),
            )
        });
        client.batch_execute(back).unwrap();
        merged(&mut client, rollup);
    }
}

#[test]
fn an_average_whose_columns_would_have_names_that_the_server_cuts_is_refused() {
    let (_db, mut client) = page_views();
    for length in [58, 63] {
        let name = "a".repeat(length);
        let call = format!(
            "SELECT spend_rollup_create('r', 'page_views', '{{site_id}}', '{{avg(bytes) AS {name}}}')"
        );
        let refused = error(&mut client, &call);
        assert_eq!(refused.code().code(), "42611", "{refused:?}");
        assert!(refused.detail().unwrap().contains("too long"), "{refused:?}");
    }
    let name = "a".repeat(57);
    client
        .batch_execute(&format!(
            "SELECT spend_rollup_create('r', 'page_views', '{{site_id}}', '{{avg(bytes) AS {name}}}')"
        ))
        .unwrap();
}

/// With the session's end it is dropped, and takes the live view or a column of the rollup's table along.
#[test]
fn an_expression_that_uses_what_ends_with_the_session_is_refused() {
    let (_db, mut client) = page_views();
    client
        .batch_execute(
            "CREATE FUNCTION pg_temp.half(int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1 / 2';
             CREATE FUNCTION pg_temp.plus(int, int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1 + $2';
             CREATE AGGREGATE pg_temp.most(int) (SFUNC = int4larger, STYPE = int);
             CREATE OPERATOR pg_temp.<+> (FUNCTION = int4pl, LEFTARG = int, RIGHTARG = int);
             CREATE DOMAIN pg_temp.small AS int;
             CREATE TYPE pg_temp.kind AS ENUM ('a', 'b')",
        )
        .unwrap();
    for (dimension, measure) in [
        ("pg_temp.half(site_id) AS h", "count(*) AS n"),
        ("(site_id OPERATOR(pg_temp.<+>) 1) AS h", "count(*) AS n"),
        ("site_id::pg_temp.small AS h", "count(*) AS n"),
        ("site_id::pg_temp.small::int AS h", "count(*) AS n"),
        ("path::pg_temp.kind AS h", "count(*) AS n"),
        ("ARRAY[path::pg_temp.kind] AS h", "count(*) AS n"),
        ("site_id", "sum(pg_temp.half(site_id)) AS n"),
        ("site_id", "count(*) FILTER (WHERE pg_temp.half(site_id) > 1) AS n"),
        ("site_id", "pg_temp.most(site_id) AS n MERGE WITH max"),
        ("site_id", "max(site_id) AS n MERGE WITH pg_temp.most"),
        ("site_id", "max(site_id) AS n MERGE WITH pg_temp.plus"),
    ] {
        let call = format!(
            "SELECT spend_rollup_create('r', 'page_views', ARRAY['{dimension}'], ARRAY['{measure}'])"
        );
        let refused = error(&mut client, &call);
        assert_eq!(refused.code().code(), "42611", "{call}: {refused:?}");
        assert!(refused.detail().unwrap().contains("temporary"), "{call}: {refused:?}");
    }
}

#[test]
fn a_renamed_source_goes_on() {
    let (_db, mut client) = page_views_with_rollup();
    client.batch_execute(&views(0, 100)).unwrap();
    merged(&mut client, "views");
    client.batch_execute("CREATE SCHEMA elsewhere; ALTER TABLE page_views RENAME TO seen; ALTER TABLE seen SET SCHEMA elsewhere").unwrap();
    client.batch_execute(&views(100, 100).replace("page_views", "elsewhere.seen")).unwrap();
    merged(&mut client, "views");
    assert_same(
        &mut client,
        "SELECT * FROM litellm_spend.views",
        &BY_HAND.replace("page_views", "elsewhere.seen"),
    );
    assert_verified(&mut client);
}

// ---- refusals --------------------------------------------------------------------------------------------

#[test]
fn what_cannot_be_a_dimension_or_measure_is_refused_by_name() {
    let (_db, mut client) = page_views();
    let refused = [
        ("dimension", "random() AS r", "volatile"),
        ("dimension", "clock_timestamp() AS r", "volatile"),
        ("dimension", "nextval('page_views_view_id_seq') AS r", "volatile"),
        ("dimension", "now() AS r", "clock"),
        ("dimension", "view_time > CURRENT_DATE AS recent", "clock"),
        ("dimension", "age(view_time) AS age", "clock"),
        ("dimension", "current_user AS r", "clock"),
        ("dimension", "current_setting('TimeZone') AS r", "clock"),
        ("measure", "count(*) FILTER (WHERE view_time > CURRENT_DATE) AS x", "clock"),
        ("measure", "sum(extract(epoch FROM now() - view_time)) AS x", "clock"),
        ("dimension", "date_trunc('minutes_', view_time) AS m", "not recognized"),
        ("dimension", "date_trunc('hour', view_time, 'Nowhere') AS m", "not recognized"),
        ("dimension", "(view_time AT TIME ZONE 'Nowhere')::date AS d", "not recognized"),
        ("dimension", "count(*) AS n", "aggregate"),
        ("dimension", "1 + sum(site_id) AS n", "aggregate"),
        ("dimension", "(SELECT 1) AS s", "subquery"),
        ("dimension", "EXISTS (SELECT FROM pg_class) AS s", "subquery"),
        ("dimension", "row_number() OVER () AS w", "window"),
        ("dimension", "generate_series(1, 3) AS g", "set"),
        ("dimension", "no_such_column AS x", "no_such_column"),
        ("dimension", "other.site_id AS x", "other"),
        ("dimension", "no_such_function(site_id) AS x", "no_such_function"),
        ("dimension", "site_id + AS x", "yntax"),
        ("dimension", "site_id AS x, path AS y", "not one expression"),
        ("dimension", "site_id AS x FROM page_views", "not one expression"),
        ("dimension", "1 AS x; DROP TABLE page_views", "not one expression"),
        ("dimension", "1 AS x UNION SELECT 2", "not one expression"),
        ("dimension", "", "not one expression"),
        ("dimension", "lower(path)", "no name"),
        ("dimension", "ctid AS x", "system column"),
        ("dimension", "page_views AS x", "whole row"),
        ("dimension", "point(1, site_id) AS p", "cannot be sorted"),
        ("dimension", "$1 AS p", "parameter"),
        ("dimension", "ROW(site_id, path) AS p", "cannot be sorted"),
        ("measure", "site_id AS x", "aggregate function"),
        ("measure", "count(*) + 1 AS x", "aggregate"),
        ("measure", "sum(random()) AS x", "volatile"),
        ("measure", "count(DISTINCT path) AS x", "cannot be merged"),
        ("measure", "sum(path) AS x", "does not exist"),
        ("measure", "sum((SELECT 1)) AS x", "subquery"),
        ("measure", "count(*) OVER () AS x", "window"),
        ("measure", "string_agg(path, ',') AS x", "MERGE WITH"),
        ("measure", "array_agg(site_id) AS x MERGE WITH no_such", "does not merge"),
        ("measure", "array_agg(site_id) AS x MERGE WITH lower", "does not merge"),
        ("measure", "array_agg(site_id) AS x MERGE WITH a); DROP TABLE page_views; --", "does not merge"),
        ("measure", "percentile_cont(0.5) WITHIN GROUP (ORDER BY bytes) AS x", "MERGE WITH"),
    ];
    for (what, expression, reason) in refused {
        let (mut dimension, mut measure) = ("site_id", "count(*) AS n");
        if what == "dimension" {
            dimension = expression
        } else {
            measure = expression
        }
        let sql = format!(
            "SELECT spend_rollup_create('x', 'page_views', ARRAY['{}'], ARRAY['{}'])",
            dimension.replace('\'', "''"),
            measure.replace('\'', "''")
        );
        assert_refused(&mut client, &sql, "42611");
        let error = error(&mut client, &sql);
        assert!(error.message().contains(&format!("{what} \"{expression}\"")), "{error:?}");
        assert!(error.detail().unwrap().contains(reason), "{expression}: {:?}", error.detail());
    }
    for (call, sqlstate) in [
        ("'x', 'page_views', '{site_id,path AS site_id}', '{count(*) AS n}'", "42701"),
        ("'x', 'page_views', '{site_id}', '{count(*) AS site_id}'", "42701"),
        ("'x', 'page_views', '{site_id}', '{avg(bytes) AS a,count(*) AS a_count}'", "42701"),
        ("'x', 'page_views', '{}', '{count(*) AS n}'", "22023"),
        ("'x', 'page_views', '{site_id}', '{}'", "22023"),
        (
            "'x', 'page_views', (SELECT array_agg(format('site_id + %s AS d%s', i, i)) FROM generate_series(1, 33) AS i), '{count(*) AS n}'",
            "54011",
        ),
        ("'x', 'page_views', '{site_id,NULL}', '{count(*) AS n}'", "22004"),
        ("NULL, 'page_views', '{site_id}', '{count(*) AS n}'", "22004"),
        ("'x', NULL, '{site_id}', '{count(*) AS n}'", "22004"),
        ("'', 'page_views', '{site_id}', '{count(*) AS n}'", "42602"),
        ("repeat('n', 57), 'page_views', '{site_id}', '{count(*) AS n}'", "42602"),
        ("'rollup', 'page_views', '{site_id}', '{count(*) AS n}'", "42710"),
        ("'retired', 'page_views', '{site_id}', '{count(*) AS n}'", "42710"),
        ("'daily_usage', 'page_views', '{site_id}', '{count(*) AS n}'", "42710"),
        ("'daily_spend', 'page_views', '{site_id}', '{count(*) AS n}'", "42710"),
        ("'daily_spend_rollup', 'page_views', '{site_id}', '{count(*) AS n}'", "42710"),
        ("'x', 'page_views', '{site_id}', '{count(*) AS n}', NULL, 'nothing'", "42703"),
        ("'x', 'page_views', '{site_id}', '{count(*) AS n}', NULL, 'view_time'", "22023"),
    ] {
        assert_refused(&mut client, &format!("SELECT spend_rollup_create({call})"), sqlstate);
    }
    let left =
        "SELECT (SELECT count(*) FROM litellm_spend.rollup) + (SELECT count(*) FROM litellm_spend.source)
                     + (SELECT count(*) FROM pg_class WHERE relname LIKE 'x%')";
    assert_eq!(value::<i64>(&mut client, left), 0);
    client.batch_execute("SELECT 1 FROM page_views").unwrap();
}

/// Of two collations that columns have, an expression has neither.
#[test]
fn an_expression_whose_collation_nobody_knows_is_refused_until_it_says_one() {
    let (_db, mut client) = without_worker();
    client
        .batch_execute(
            r#"CREATE TABLE texts (id bigserial, a text COLLATE "C", b text COLLATE "en-x-icu");
               INSERT INTO texts (a, b) VALUES ('a', 'b')"#,
        )
        .unwrap();
    let create = |dimension: &str, measure: &str| {
        let arguments = [dimension, measure].map(|text| format!("ARRAY['{text}']")).join(", ");
        format!("SELECT spend_rollup_create('texts', 'texts', {arguments})")
    };
    for (dimension, measure) in [
        ("a || b AS k", "count(*) AS n"),
        ("ARRAY[a, b] AS k", "count(*) AS n"),
        ("a", "min(a || b) AS m"),
        ("a", "max(a || b) AS m"),
    ] {
        let sql = create(dimension, measure);
        assert_refused(&mut client, &sql, "42611");
        let error = error(&mut client, &sql);
        assert_eq!(error.detail(), Some("Its collation is ambiguous: add COLLATE."), "{sql}");
    }
    let said =
        create(r#"(a || b) COLLATE "C" AS k"#, r#"max((a || b) COLLATE "C") AS m, count(a || b) AS n"#);
    client.batch_execute(&said.replace(", count", "','count")).unwrap();
    assert!(holds(&mut client, "SELECT outcome = 'merged' FROM spend_rollup_run('texts')"));
    assert!(holds(&mut client, "SELECT (k, m, n) = ('ab', 'ab', 1) FROM litellm_spend.texts"));
}

#[test]
fn names_that_statements_of_ours_use_are_no_columns() {
    let (_db, mut client) = page_views();
    for (dimension, measure) in [
        ("site_id AS litellm_spend_side", "count(*) AS n"),
        ("site_id", "count(*) AS litellm_spend_rows_"),
        ("site_id", "count(*) AS litellm_spend_rows"),
        ("site_id", "avg(bytes) AS litellm_spend_bytes"),
    ] {
        let create = format!(
            "SELECT spend_rollup_create('x', 'page_views', ARRAY['{dimension}'], ARRAY['{measure}'])"
        );
        assert_refused(&mut client, &create, "42939");
    }
    client
        .batch_execute("SELECT spend_rollup_create('x', 'page_views', '{site_id}', '{sum(bytes) AS b}')")
        .unwrap();
}

#[test]
fn of_two_sessions_that_create_the_same_rollup_one_is_refused() {
    let (db, mut first) = page_views();
    first.batch_execute(&format!("BEGIN; {CREATE}")).unwrap();
    let mut second = db.connect();
    let pid = backend_pid(&mut second);
    second.batch_execute("SET litellm_spend.window_wait = '60s'").unwrap();
    std::thread::scope(|scope| {
        let refused = scope.spawn(|| assert_refused(&mut second, CREATE, "42710"));
        let mut client = db.connect();
        // It tries every ten milliseconds, which nobody sees: no lock is waited for.
        let runs = format!(
            "SELECT count(*) = 1 FROM pg_stat_activity
             WHERE pid = {pid} AND state = 'active' AND clock_timestamp() - query_start > interval '300 ms'"
        );
        eventually("the second waits", || holds(&mut client, &runs));
        first.batch_execute("COMMIT").unwrap();
        refused.join().unwrap();
    });
    let made =
        "SELECT ARRAY[(SELECT count(*) FROM litellm_spend.rollup), (SELECT count(*) FROM litellm_spend.source),
            (SELECT count(*) FROM pg_class WHERE relname LIKE 'views%' AND relkind IN ('r', 'v')
                AND relnamespace = 'litellm_spend'::regnamespace),
            (SELECT count(*) FROM pg_proc WHERE proname = 'views.sites')]";
    assert_eq!(value::<Vec<i64>>(&mut first, made), [1, 1, 2, 2]);
    first.batch_execute(&views(0, 100)).unwrap();
    merged(&mut first, "views");
    assert_views_exact(&mut first);
    first.batch_execute("SELECT spend_rollup_drop('views')").unwrap();
    assert_eq!(value::<Vec<i64>>(&mut first, made), [0, 0, 0, 0]);
}

#[test]
fn a_call_that_is_cancelled_is_not_refused() {
    let (_db, mut client) = page_views();
    client
        .batch_execute(
            "CREATE FUNCTION slow(x int) RETURNS int IMMUTABLE LANGUAGE plpgsql
             AS $$ BEGIN PERFORM pg_sleep(60); RETURN x; END $$;
             SET statement_timeout = '300ms'",
        )
        .unwrap();
    // What is constant is computed when the expression is read.
    for (dimension, measure) in [("slow(1) AS x", "count(*) AS n"), ("site_id", "max(slow(1)) AS x")] {
        let sql =
            format!("SELECT spend_rollup_create('x', 'page_views', '{{{dimension}}}', '{{{measure}}}')");
        assert_eq!(error(&mut client, &sql).code().code(), "57014");
    }
}

#[test]
fn the_status_calls_nothing_of_an_owners() {
    let (db, mut client) = without_worker();
    client
        .batch_execute(
            "CREATE ROLE guarded; CREATE TABLE guarded_log (id bigserial, x int);
             ALTER TABLE guarded_log OWNER TO guarded;
             SELECT spend_rollup_create('guarded', 'guarded_log', '{x}', '{count(*) AS n}');
             INSERT INTO guarded_log (x) VALUES (1);
             CREATE TABLE is_slow (x int); GRANT SELECT ON is_slow TO PUBLIC;
             -- The planner calls it, when it has loaded the index.
             CREATE FUNCTION slow(x int) RETURNS bool IMMUTABLE LANGUAGE plpgsql
             AS $$ BEGIN PERFORM pg_sleep(60) FROM public.is_slow; RETURN true; END $$;
             CREATE INDEX ON guarded_log (slow(1));
             INSERT INTO is_slow VALUES (1)",
        )
        .unwrap();
    let mut client = db.connect();
    client.batch_execute("SET statement_timeout = '30s'").unwrap();
    assert!(holds(&mut client, "SELECT tail_rows = 1 AND lag_seconds IS NULL FROM spend_rollup_status"));
}

#[test]
fn a_source_that_cannot_be_exact_is_refused() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE cached (id bigserial, x int); ALTER SEQUENCE cached_id_seq CACHE 10;
             CREATE TABLE cycling (id bigserial, x int); ALTER SEQUENCE cycling_id_seq CYCLE;
             CREATE TABLE descending (id bigint DEFAULT 0, x int); CREATE SEQUENCE down INCREMENT -1;
             ALTER TABLE descending ALTER id SET DEFAULT nextval('down');
             CREATE TABLE numberless (x int);
             CREATE TABLE computed (id bigint DEFAULT nextval('down') * 2, x int);
             CREATE TABLE twice (a bigserial, b bigserial, x int);
             CREATE UNLOGGED TABLE unlogged (id bigserial, x int);
             CREATE TEMP TABLE temporary (id bigserial, x int);
             CREATE TABLE fed (id bigserial, x int);
             CREATE VIEW a_view AS SELECT * FROM fed; CREATE MATERIALIZED VIEW a_matview AS SELECT * FROM fed;
             CREATE TABLE parted (id bigserial, x int) PARTITION BY LIST (x); CREATE SEQUENCE own;
             CREATE TABLE parted_1 PARTITION OF parted (id DEFAULT nextval('own')) FOR VALUES IN (1);
             CREATE TABLE halved (id bigserial, x int) PARTITION BY LIST (x);
             CREATE TABLE halved_1 PARTITION OF halved (id DEFAULT nextval('halved_id_seq') / 2) FOR VALUES IN (1);",
        )
        .unwrap();
    for (source, sequence, sqlstate, reason) in [
        ("cached", "NULL", "55000", "cache is 10"),
        ("cycling", "NULL", "55000", "cycles"),
        ("descending", "NULL", "55000", "increment is -1"),
        ("numberless", "NULL", "55000", "No column"),
        ("computed", "NULL", "55000", "No column"),
        ("twice", "NULL", "55000", "2 columns"),
        ("fed", "'own'", "55000", "No column"),
        ("fed", "'fed'", "42809", "sequence is the sequence"),
        ("unlogged", "NULL", "42809", "permanent"),
        ("temporary", "NULL", "42809", "permanent"),
        ("a_view", "NULL", "42809", "permanent"),
        ("a_matview", "NULL", "42809", "permanent"),
        ("parted", "NULL", "55000", "another default"),
        ("halved", "NULL", "55000", "another default"),
    ] {
        for call in [
            format!("SELECT spend_rollup_create('x', '{source}', '{{x}}', '{{count(*) AS n}}', {sequence})"),
            format!("SELECT spend_rollup_register('x', '{source}', {sequence})"),
        ] {
            assert_refused(&mut client, &call, sqlstate);
            let error = error(&mut client, &call);
            assert!(error.detail().unwrap().contains(reason), "{source}: {error:?}");
        }
    }
    client
        .batch_execute("SELECT spend_rollup_create('t', 'twice', '{x}', '{count(*) AS n}', 'twice_b_seq')")
        .unwrap();
    // A sequence that loses its shape later stops the rollup, and goes on when it has it back.
    client.batch_execute("ALTER SEQUENCE twice_b_seq CACHE 5; INSERT INTO twice (x) VALUES (1)").unwrap();
    eventually("the status says so", || {
        holds(&mut client, "SELECT last_error LIKE '%cannot number%' FROM spend_rollup_status")
    });
    client.batch_execute("ALTER SEQUENCE twice_b_seq CACHE 1").unwrap();
    merged(&mut client, "t");
}

#[test]
fn a_sequence_is_known_whatever_it_is_called_and_converted_to() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"CREATE DOMAIN small AS int CHECK (VALUE > 0);
               CREATE SEQUENCE "back\slash's ""name"""; CREATE SCHEMA "O'Brien"; CREATE SEQUENCE "O'Brien"."text";
               CREATE TABLE a (id int DEFAULT nextval('"back\slash''s ""name"""'), x int);
               CREATE TABLE b (id small DEFAULT nextval('"O''Brien"."text"'), x int);
               CREATE TABLE c (id numeric DEFAULT nextval('"O''Brien"."text"'), x int);
               CREATE TABLE d (id smallint GENERATED BY DEFAULT AS IDENTITY (SEQUENCE NAME "nextval('e'::regclass)"), x int)"#,
        )
        .unwrap();
    client.batch_execute("SET quote_all_identifiers = on").unwrap();
    for table in ["a", "b", "c", "d"] {
        let create =
            format!("SELECT spend_rollup_create('by_{table}', '{table}', '{{x}}', '{{count(*) AS n}}')");
        client.batch_execute(&create).unwrap();
        client.batch_execute(&format!("INSERT INTO {table} (x) VALUES (1), (2), (2)")).unwrap();
        merged(&mut client, &format!("by_{table}"));
    }
    assert_verified(&mut client);
}

#[test]
fn a_column_that_does_not_keep_its_number_is_refused_also_later() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE SEQUENCE s; CREATE DOMAIN tens AS numeric(10, -1); CREATE DOMAIN short AS real; CREATE DOMAIN whole AS bigint;
             CREATE DOMAIN digits AS numeric(20, 3)",
        )
        .unwrap();
    let create = |table: &str| {
        format!("SELECT spend_rollup_create('by_{table}', '{table}', '{{x}}', '{{count(*) AS n}}')")
    };
    let refused = [
        "numeric(10,-1)",
        "numeric(3,-1000)",
        "real",
        "double precision",
        "oid",
        "public.tens",
        "public.short",
    ];
    for (i, r#type) in refused.into_iter().enumerate() {
        let table = format!("refused_{i}");
        client
            .batch_execute(&format!("CREATE TABLE {table} (id {type} DEFAULT nextval('s'), x int)"))
            .unwrap();
        for call in [create(&table), format!("SELECT spend_rollup_register('by_hand', '{table}')")] {
            assert_refused(&mut client, &call, "42804");
            let message = error(&mut client, &call).message().to_string();
            assert!(message.ends_with(&format!("its type is {type}")), "{message}");
        }
        // As the hint says.
        client
            .batch_execute(&format!(
                "ALTER TABLE {table} ALTER COLUMN id TYPE bigint; {}; SELECT spend_rollup_drop('by_{table}')",
                create(&table)
            ))
            .unwrap();
    }
    let kept = ["smallint", "int", "numeric", "numeric(10)", "numeric(1000, 900)", "whole", "digits"];
    for (i, r#type) in kept.into_iter().enumerate() {
        let table = format!("kept_{i}");
        client
            .batch_execute(&format!(
                "CREATE TABLE {table} (id {type} DEFAULT nextval('s'), x int); {}; INSERT INTO {table} (x) VALUES (1), (1)",
                create(&table)
            ))
            .unwrap();
        merged(&mut client, &format!("by_{table}"));
    }
    // One that is filled by hand is in nobody's way.
    client
        .batch_execute(
            "CREATE TABLE later (id numeric DEFAULT nextval('s'), x int); SELECT spend_rollup_register('by_hand', 'later');
             ALTER TABLE later ALTER id TYPE real; INSERT INTO later (x) VALUES (1)",
        )
        .unwrap();
    assert_refused(&mut client, "SELECT spend_rollup_window('by_hand')", "42804");
    // A rollup of before that was refused: its live view keeps the column from being altered.
    client
        .batch_execute(
            "UPDATE pg_attribute SET atttypmod = ((10 << 16) | (-1 & 2047)) + 4 WHERE attrelid = 'kept_2'::regclass AND attname = 'id';
             INSERT INTO kept_2 (x) VALUES (1)",
        )
        .unwrap();
    eventually("the status says so", || {
        let sql = r#"SELECT last_error LIKE 'column "id" of public.kept_2 cannot number its rows: its type is numeric(10,-1)%'
                     FROM spend_rollup_status WHERE rollup = 'by_kept_2'"#;
        holds(&mut client, sql)
    });
}

#[test]
fn a_sum_that_no_floating_point_number_can_be_breaks_no_view() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE t (id bigserial, g int, d double precision, r real);
             INSERT INTO t (g, d, r) VALUES (1, 1.7e308, 3e38), (1, 1.7e308, 3e38), (2, -1.7e308, -3e38), (2, -1.7e308, -3e38),
                 (3, 'NaN', 'NaN'), (4, 'Infinity', '-Infinity'), (5, 5e-324, 1e-45), (5, 0, 0), (5, 0, 0), (6, 0.5, 0.5);
             SELECT spend_rollup_create('sums', 't', '{g}', '{sum(d) AS d,sum(r) AS r,avg(d) AS ad,avg(r) AS ar}')",
        )
        .unwrap();
    let rows = "SELECT string_agg(concat_ws(' ', d, r, ad, ar), '; ' ORDER BY g) FROM litellm_spend.sums";
    let shown: String = value(&mut client, rows);
    assert!(shown.starts_with("Infinity Infinity 1.7e+308 3"), "{shown}");
    assert!(shown.contains("; -Infinity -Infinity -1.7e+308 -3"), "{shown}");
    assert!(
        shown.contains("; NaN NaN NaN NaN; Infinity -Infinity Infinity -Infinity; 5e-324 1e-45 0 "),
        "{shown}"
    );
    assert!(shown.ends_with("; 0.5 0.5 0.5 0.5"), "{shown}");
    merged(&mut client, "sums");
    assert_eq!(value::<String>(&mut client, rows), shown);
}

/// In MB, of a session, since it began.
fn most_memory(client: &mut Client) -> u64 {
    let pid = backend_pid(client);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
fn verify_returns_more_differences_than_it_keeps_in_memory() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE t (id bigserial PRIMARY KEY, g int); INSERT INTO t (g) SELECT i FROM generate_series(1, 200000) i;
             SELECT spend_rollup_create('by_g', 't', '{g}', '{count(*) AS n,sum(g) AS s}')",
        )
        .unwrap();
    merged(&mut client, "by_g");
    client.batch_execute("UPDATE litellm_spend.by_g_rollup SET n = n + 1").unwrap();
    let before = most_memory(&mut client);
    let sums: String = value(
        &mut client,
        "SELECT concat_ws(' ', count(*), sum((key ->> 'g')::int), sum((rollup ->> 'n')::int - (truth ->> 'n')::int))
         FROM spend_rollup_verify('by_g')",
    );
    assert_eq!(sums, "200000 20000100000 200000");
    // Two million of them, all at once, took 6.2 GB.
    let used = most_memory(&mut client) - before;
    assert!(used < 200, "{used} MB");
}

#[test]
fn verify_shows_every_digit_of_numbers_that_differ() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"CREATE TABLE exact (id bigserial PRIMARY KEY, k numeric, x numeric, t text);
               SELECT spend_rollup_create('exact', 'exact', '{k,t}', '{sum(x) AS s,max(x) AS most}');
               INSERT INTO exact (k, x, t) VALUES (1, 0.10000000000000000001, 'a"\b'), (1e400, 1e400, E'\n'), ('NaN', 0, NULL)"#,
        )
        .unwrap();
    merged(&mut client, "exact");
    client
        .batch_execute(
            "UPDATE exact SET x = 0.10000000000000000002 WHERE id = 1; UPDATE exact SET x = 1e400 + 1 WHERE id = 2;
             UPDATE exact SET x = 'Infinity' WHERE id = 3",
        )
        .unwrap();
    let sides = |client: &mut Client, k: &str| -> String {
        value(
            client,
            &format!(
                "SELECT format('%s %s %s %s', rollup ->> 's', truth ->> 's', key ->> 't', rollup -> 's' = rollup -> 'most')
                 FROM spend_rollup_verify('exact') WHERE key ->> 'k' = ({k})::text"
            ),
        )
    };
    assert_eq!(sides(&mut client, "1"), r#"0.10000000000000000001 0.10000000000000000002 a"\b t"#);
    assert_eq!(sides(&mut client, "'NaN'"), "0 Infinity  t");
    let large = format!("1{} 1{}1 \n t", "0".repeat(400), "0".repeat(399));
    assert_eq!(sides(&mut client, "1e400::numeric"), large);
}

#[test]
fn verify_compares_more_measures_than_a_function_takes_arguments() {
    let (_db, mut client) = without_worker();
    client
        .batch_execute(
            "CREATE TABLE wide (id bigserial, k int NOT NULL, v int);
             SELECT spend_rollup_create('wide', 'wide', '{k}',
                 (SELECT array_agg(format('avg(v + %s) AS a%s', i, i)) FROM generate_series(1, 80) AS i));
             INSERT INTO wide (k, v) VALUES (1, 1), (2, 2); SELECT spend_rollup_run('wide')",
        )
        .unwrap();
    assert_no_rows(client.query("SELECT * FROM spend_rollup_verify('wide')", &[]).unwrap(), "verify");
    client.batch_execute("UPDATE litellm_spend.wide_rollup SET a80_sum = 0 WHERE k = 1").unwrap();
    let row = client
        .query_one(
            "SELECT key ->> 'k', (SELECT count(*) FROM jsonb_object_keys(rollup)), rollup - 'a80_sum' = truth - 'a80_sum',
                 rollup ->> 'a80_sum', truth ->> 'a80_sum', truth ->> 'a1_sum', truth ->> 'litellm_spend_rows'
             FROM spend_rollup_verify('wide')",
            &[],
        )
        .unwrap();
    assert_eq!((row.get::<_, &str>(0), row.get::<_, i64>(1), row.get::<_, bool>(2)), ("1", 161, true));
    let texts: Vec<&str> = (3..7).map(|at| row.get(at)).collect();
    assert_eq!(texts, ["0", "81", "2", "1"]);
}

#[test]
fn a_source_without_an_index_gets_a_notice_that_names_one() {
    let db = shared().database();
    let cluster = shared();
    db.connect().batch_execute(r#"CREATE TABLE "no index" ("Id" bigserial, x int)"#).unwrap();
    let script = r#"SELECT spend_rollup_create('n', '"no index"', '{x}', '{count(*) AS n}')"#;
    let output = cluster
        .program("psql")
        .args(["-X", "-h", cluster.dir.to_str().unwrap(), "-p", &PORT.to_string(), "-U", "postgres"])
        .args(["-d", &db.name, "-c", script])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    let create = r#"CREATE INDEX ON "public"."no index" USING brin ("Id");"#;
    assert!(text.contains("NOTICE") && text.contains("HINT") && text.contains(create), "{text}");
    db.connect().batch_execute(create).unwrap();
}

#[test]
fn a_rollup_belongs_to_the_owner_of_its_source_and_runs_as_that_role() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "DROP ROLE IF EXISTS app_f; DROP ROLE IF EXISTS stranger_f; CREATE ROLE app_f LOGIN; CREATE ROLE stranger_f LOGIN;
             CREATE SCHEMA app AUTHORIZATION app_f; GRANT USAGE ON SCHEMA app TO stranger_f;
             GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO app_f, stranger_f",
        )
        .unwrap();
    let mut app = shared().connect_as(&db.name, "app_f");
    app.batch_execute(
        "CREATE TABLE app.log (id bigserial PRIMARY KEY, x int);
         CREATE FUNCTION app.who(x int) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RETURN current_user; END $$;
         SELECT spend_rollup_create('whose', 'app.log', '{app.who(x) AS who}', '{count(*) AS n}');
         INSERT INTO app.log (x) VALUES (1), (2)",
    )
    .unwrap();
    merged(&mut client, "whose");
    assert_eq!(
        value::<String>(&mut app, "SELECT string_agg(who, ',') FROM litellm_spend.whose_rollup"),
        "app_f"
    );
    assert_eq!(value::<i64>(&mut app, "SELECT sum(n)::bigint FROM litellm_spend.whose"), 2);
    app.batch_execute("SELECT spend_rollup_run(); SELECT * FROM spend_rollup_verify('whose')").unwrap();

    let mut stranger = shared().connect_as(&db.name, "stranger_f");
    for call in [
        "SELECT spend_rollup_create('theirs', 'app.log', '{x}', '{count(*) AS n}')",
        "SELECT spend_rollup_register('theirs', 'app.log')",
        "SELECT spend_rollup_run()",
        "SELECT spend_rollup_run('whose')",
        "SELECT spend_rollup_rebuild('whose')",
        "SELECT * FROM spend_rollup_verify('whose')",
        "SELECT spend_rollup_drop('whose')",
    ] {
        assert_refused(&mut stranger, call, "42501");
    }
    assert_eq!(error(&mut stranger, "SELECT * FROM litellm_spend.whose").code().code(), "42501");
    // The function cannot become anybody else, nor leave something behind that runs with other rights.
    for trick in ["SET ROLE postgres", "SET SESSION AUTHORIZATION postgres", "CREATE TEMP TABLE t (x int)"] {
        // By a volatile one, which alone may run such statements.
        app.batch_execute(&format!(
            "CREATE OR REPLACE FUNCTION app.trick() RETURNS void VOLATILE LANGUAGE plpgsql AS $$ BEGIN EXECUTE '{trick}'; END $$;
             CREATE OR REPLACE FUNCTION app.who(x int) RETURNS text IMMUTABLE LANGUAGE plpgsql
             AS $$ BEGIN PERFORM app.trick(); RETURN current_user; END $$;
             INSERT INTO app.log (x) VALUES (3)"
        ))
        .unwrap();
        eventually("the merge failed", || {
            holds(
                &mut client,
                "SELECT last_error IS NOT NULL FROM spend_rollup_status WHERE rollup = 'whose'",
            )
        });
        app.batch_execute(
            "CREATE OR REPLACE FUNCTION app.who(x int) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RETURN current_user; END $$",
        )
        .unwrap();
        merged(&mut client, "whose");
    }
    app.batch_execute("SELECT spend_rollup_drop('whose')").unwrap();
    drop((app, stranger));
    client.batch_execute("DROP OWNED BY app_f, stranger_f; DROP ROLE app_f, stranger_f").unwrap();
}

#[test]
fn a_drop_gives_up_where_somebody_still_reads_the_rollup() {
    let database = shared().database();
    let (mut client, mut reader) = (database.connect(), database.connect());
    client
        .batch_execute(
            "CREATE TABLE read (id bigserial, x int);
             SELECT spend_rollup_create('by_x', 'read', '{x}', '{count(*) AS n}');
             SET litellm_spend.lock_timeout = '50ms'; SET statement_timeout = '2min'",
        )
        .unwrap();
    reader.batch_execute("BEGIN; SELECT FROM litellm_spend.by_x_rollup").unwrap();
    assert_refused(&mut client, "SELECT spend_rollup_drop('by_x')", "55P03");
    reader.batch_execute("COMMIT").unwrap();
    client.batch_execute("SELECT spend_rollup_drop('by_x')").unwrap();
}

#[test]
fn the_first_rollups_of_two_owners_are_made_one_after_the_other() {
    let database = shared().database();
    let mut client = database.connect();
    for role in ["first_o", "second_o"] {
        client
            .batch_execute(&format!(
                "DROP ROLE IF EXISTS {role}; CREATE ROLE {role}; CREATE TABLE of_{role} (id bigserial, x int);
                 ALTER TABLE of_{role} OWNER TO {role}"
            ))
            .unwrap();
    }
    let create = |role: &str| {
        format!("SELECT spend_rollup_create('by_{role}', 'of_{role}', '{{x}}', '{{count(*) AS n}}')")
    };
    let (mut first, mut second) = (database.connect(), database.connect());
    first.batch_execute(&format!("BEGIN; {}", create("first_o"))).unwrap();
    let pid: i32 = value(&mut second, "SELECT pg_backend_pid()");
    std::thread::scope(|scope| {
        let second = scope.spawn(move || {
            second.batch_execute(&format!("SET litellm_spend.window_wait = '60s'; {}", create("second_o")))
        });
        let waits = format!(
            "SELECT count(*) = 1 FROM pg_stat_activity WHERE pid = {pid} AND state = 'active'
             AND clock_timestamp() - query_start > interval '300 ms'"
        );
        eventually("the second waits", || holds(&mut client, &waits));
        first.batch_execute("COMMIT").unwrap();
        second.join().unwrap().unwrap();
    });
    for role in ["first_o", "second_o"] {
        let granted = format!("SELECT has_schema_privilege('{role}', 'litellm_spend', 'USAGE')");
        assert!(holds(&mut client, &granted), "{role}");
        client
            .batch_execute(&format!(
                "SELECT spend_rollup_drop('by_{role}'); DROP OWNED BY {role} CASCADE; DROP ROLE {role}"
            ))
            .unwrap();
    }
}

#[test]
fn a_merge_that_lacks_temporary_space_goes_on_with_smaller_windows() {
    let db = shared().database();
    let mut client = db.connect();
    for setting in ["maintenance_work_mem = '1MB'", "work_mem = '64kB'", "temp_file_limit = '1MB'"] {
        client.batch_execute(&format!("ALTER DATABASE {} SET {setting}", db.name)).unwrap();
    }
    client
        .batch_execute(
            "CREATE TABLE many (id bigserial, g int);
             SELECT spend_rollup_create('many', 'many', '{g}', '{count(*) AS n}');
             SELECT pg_terminate_backend(pid) FROM spend_worker_status WHERE database = current_database();
             INSERT INTO many (g) SELECT generate_series(1, 300000)",
        )
        .unwrap();
    let failed = "SELECT last_error LIKE 'temporary file size exceeds%' FROM spend_rollup_status WHERE rollup = 'many'";
    eventually("there is not enough for the first window", || holds(&mut client, failed));
    wait_until_merged(&mut client);
    assert_same(
        &mut client,
        "SELECT count(*), sum(n) FROM litellm_spend.many_rollup",
        "VALUES (300000, 300000)",
    );
}

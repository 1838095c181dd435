//! How far long work is, as `spend_progress` shows it: looking changes nothing.

mod common;

use common::*;
use postgres::Client;

/// Operation, step, per cent, who is waited for, last error, whether a next try and the time left are known.
type Work = (String, Option<String>, Option<f64>, Option<String>, Option<String>, bool, bool);

fn progress(client: &mut Client) -> Vec<Work> {
    let sql = "SELECT operation, step, percent::float8, waits_for, last_error, retry_at IS NOT NULL, time_left IS NOT NULL
               FROM spend_progress ORDER BY 1, 2";
    let rows = client.query(sql, &[]).unwrap();
    rows.iter().map(|r| (r.get(0), r.get(1), r.get(2), r.get(3), r.get(4), r.get(5), r.get(6))).collect()
}

/// The one work that there is, once it is as wanted.
fn wait_for(client: &mut Client, what: &str, wanted: impl Fn(&Work) -> bool) -> Work {
    let mut found = vec![];
    eventually(what, || {
        found = progress(client);
        found.len() == 1 && wanted(&found[0])
    });
    found.remove(0)
}

fn without_worker() -> &'static Cluster {
    static CLUSTER: std::sync::OnceLock<Cluster> = std::sync::OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(&[NO_WORKER]))
}

#[test]
fn a_conversion_says_where_it_is_for_whom_it_waits_and_when_it_is_tried_again() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 1000, 5)).unwrap();
    wait_until_merged(&mut client);
    assert_eq!(progress(&mut client), []);
    // The index, behind a snapshot.
    let mut dump = db.connect();
    dump.batch_execute("SET application_name = 'a dump'; BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class LIMIT 1")
        .unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    let names =
        |who: &'static str| move |w: &Work| w.3.as_ref().is_some_and(|waits_for| waits_for.contains(who));
    // The server's own progress is read before the locks, and may be a moment behind them.
    let at_dump = |w: &Work| {
        names("a dump")(w) && w.1.as_ref().is_some_and(|step| step.starts_with("index: waiting for"))
    };
    let (operation, ..) = wait_for(&mut client, "it waits for the dump", at_dump);
    assert_eq!(operation, "conversion");
    let detail: String =
        value(&mut client, "SELECT detail FROM spend_partition_convert() WHERE state = 'next'");
    assert!(detail.contains("waits for process") && detail.contains("a dump"), "{detail}");
    // Taken back, which another reader of the table keeps from its end.
    let mut reader = db.connect();
    reader
        .batch_execute(
            r#"SET application_name = 'a reader'; BEGIN; SELECT count(*) FROM "LiteLLM_SpendLogs""#,
        )
        .unwrap();
    let aborted: String = value(&mut client, "SELECT state || ': ' || detail FROM spend_partition_revert()");
    assert!(
        aborted.starts_with("aborted: the worker drops its index") && aborted.contains("spend_progress"),
        "{aborted}"
    );
    dump.batch_execute("COMMIT").unwrap();
    let (_, step, ..) = wait_for(&mut client, "the index is being dropped", names("a reader"));
    assert_eq!(step.as_deref(), Some("take back"));
    reader.batch_execute("COMMIT").unwrap();
    eventually("it is forgotten", || progress(&mut client).is_empty());
    // The swap, behind a reader that came after the index.
    let state = "LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE";
    dump.batch_execute(&format!("BEGIN; {state}")).unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    let at_swap = |w: &Work| w.1.as_deref() == Some("swap") && w.4.is_some();
    wait_for(&mut client, "it is to be swapped", at_swap);
    reader.batch_execute(r#"BEGIN; SELECT count(*) FROM "LiteLLM_SpendLogs""#).unwrap();
    dump.batch_execute("COMMIT").unwrap();
    let waits =
        |w: &Work| names("a reader")(w) && w.4.as_ref().is_some_and(|e| e.contains("postgres, a reader"));
    let (.., last_error, retries, _) = wait_for(&mut client, "the reader is in the way", waits);
    assert!(retries && last_error.as_ref().unwrap().contains("within 200 ms"), "{last_error:?}");
    assert!(holds(&mut client, "SELECT retry_at < now() + interval '70 seconds' FROM spend_progress"));
    // Whoever monitors sees it.
    client.batch_execute("CREATE ROLE watcher; GRANT pg_monitor TO watcher; SET ROLE watcher").unwrap();
    assert_eq!(progress(&mut client).len(), 1);
    client.batch_execute("RESET ROLE; DROP ROLE watcher").unwrap();
    reader.batch_execute("COMMIT").unwrap();
    eventually("it is done", || progress(&mut client).is_empty());
    assert!(holds(&mut client, "SELECT bool_and(state = 'done') FROM spend_partition_convert()"));
}

#[test]
fn a_backfill_says_its_day_and_a_call_of_it_one_short_line_a_step() {
    let db = without_worker().database();
    let mut client = db.connect();
    assert_eq!(progress(&mut client), []);
    client.batch_execute(&insert_rows("a", 2000, 20)).unwrap();
    client.batch_execute("SELECT spend_attach()").unwrap();
    assert_eq!(progress(&mut client), [("backfill".into(), None, Some(0.0), None, None, false, false)]);
    let days: i64 = value(
        &mut client,
        r#"SELECT (max("startTime")::date - min("startTime")::date + 1)::bigint FROM "LiteLLM_SpendLogs""#,
    );
    let newest: String =
        value(&mut client, r#"SELECT max("startTime")::date::text FROM "LiteLLM_SpendLogs""#);
    client.batch_execute("SELECT litellm_spend.backfill_step(NULL)").unwrap();
    let [(_, Some(step), Some(percent), None, None, false, true)] = &progress(&mut client)[..] else {
        panic!("{:?}", progress(&mut client));
    };
    assert_eq!(*step, format!("{newest}: 1 of {days} days"));
    assert!((*percent - 100.0 / days as f64).abs() < 0.1, "{percent}");
    let notices = db.notices("CALL spend_backfill()");
    let lines: Vec<&str> = notices.lines().map(|line| line.trim_start_matches("NOTICE:  ")).collect();
    let (last, lines) = lines.split_last().unwrap();
    assert_eq!(*last, "everything is covered");
    assert_eq!(lines.len() as i64, days - 1, "{lines:#?}");
    for (line, covered) in lines.iter().zip(2..) {
        let (day, rest) = line.split_once(": ").unwrap();
        assert!(day.len() == 10 && line.len() < 60, "{line}");
        let rest =
            rest.strip_prefix(&format!("{covered} of {days} days")).unwrap_or_else(|| panic!("{line}"));
        assert!(rest.is_empty() || rest.starts_with(", about ") && rest.ends_with(" left"), "{line}");
    }
    assert_eq!(progress(&mut client), []);
    // What is to be recomputed.
    client
        .batch_execute(
            "INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation)
             VALUES ('2026-01-01', '2026-01-02', 'rebuild', 'INSERT')",
        )
        .unwrap();
    let repair =
        ("repair".into(), Some("1 ranges are to be recomputed".into()), None, None, None, false, false);
    assert_eq!(progress(&mut client), [repair]);
}

#[test]
fn rows_at_the_ends_of_time_break_no_progress() {
    let db = without_worker().database();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 100, 3)).unwrap();
    for (row, time) in [(1, "-infinity"), (2, "infinity"), (3, "4713-01-01 BC"), (4, "294276-01-01")] {
        let sql =
            format!(r#"UPDATE "LiteLLM_SpendLogs" SET "startTime" = '{time}' WHERE request_id = 'a{row}'"#);
        client.batch_execute(&sql).unwrap();
    }
    client.batch_execute("SELECT spend_attach()").unwrap();
    let step = "SELECT litellm_spend.backfill_step(NULL)";
    while let Some(line) = value::<Option<String>>(&mut client, step) {
        assert!(!line.is_empty());
        assert_eq!(progress(&mut client).len(), 1);
        client.batch_execute("SELECT * FROM spend_rollup_status").unwrap();
    }
    assert_eq!(progress(&mut client), []);
}

#[test]
fn a_declared_rollup_says_how_far_its_source_is_merged() {
    let db = without_worker().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE hits (id bigserial, at timestamptz NOT NULL DEFAULT now());
             INSERT INTO hits (at) SELECT now() FROM generate_series(1, 1000);
             SELECT spend_rollup_create('hits_by_day', 'hits', ARRAY['date(at AT TIME ZONE ''UTC'') AS day'], ARRAY['count(*) AS hits']);
             SET litellm_spend.max_window = 250; SELECT litellm_spend.backfill_step('hits')",
        )
        .unwrap();
    let work = ("backfill".into(), Some("number 250 of 1000".into()), Some(25.0), None, None, false, false);
    assert_eq!(progress(&mut client), [work]);
    client.batch_execute("CALL spend_backfill('hits')").unwrap();
    assert_eq!(progress(&mut client), []);
}

#[test]
fn a_reversion_says_its_step_and_how_much_is_copied() {
    let db = without_worker().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE t (id bigint, at timestamp, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
             CREATE INDEX ON t (at);
             CREATE FUNCTION slow(bigint) RETURNS bigint IMMUTABLE LANGUAGE plpgsql AS
                 'BEGIN IF $1 = 1 THEN PERFORM pg_catalog.pg_sleep(1.1); END IF; RETURN $1; END';
             CREATE INDEX ON t (slow(id)); CREATE INDEX ON t (slow(id), at);
             CREATE TABLE t_1 PARTITION OF t DEFAULT; INSERT INTO t SELECT i, '2026-11-01' FROM generate_series(1, 5000) i",
        )
        .unwrap();
    let steps = |client: &mut Client| {
        progress(client).into_iter().map(|w| (w.0, w.1.unwrap(), w.2)).collect::<Vec<_>>()
    };
    // A call copies for a second, or makes indexes for a second.
    let call = "SELECT spend_partition_revert('t')";
    eventually("it is copied", || {
        client.batch_execute(call).unwrap();
        steps(&mut client)[0].1 != "copy"
    });
    assert_eq!(steps(&mut client), [("reversion".into(), "indexes".into(), None)]);
    client.batch_execute(call).unwrap();
    let made =
        "SELECT jsonb_array_length(options -> 'indexes') BETWEEN 1 AND 2 FROM litellm_spend.conversion";
    assert!(holds(&mut client, made));
    assert_eq!(steps(&mut client), [("reversion".into(), "indexes".into(), None)]);
    eventually("it has all indexes", || {
        client.batch_execute(call).unwrap();
        steps(&mut client) == [("reversion".into(), "swap".into(), None)]
    });
    client
        .batch_execute(
            "UPDATE litellm_spend.conversion SET options = jsonb_set(options, '{copied_all}', 'false')",
        )
        .unwrap();
    let [(_, step, Some(percent))] = &steps(&mut client)[..] else { panic!("{:?}", steps(&mut client)) };
    assert!(step == "copy" && (90.0..=100.0).contains(percent), "{step} {percent}");
}

#[test]
fn a_rebuild_in_a_session_says_who_is_at_it() {
    let db = shared().database().attached();
    let (mut client, mut session, mut other) = (db.connect(), db.connect(), db.connect());
    client.batch_execute(&insert_rows("a", 100, 5)).unwrap();
    wait_until_merged(&mut client);
    session
        .batch_execute("SET application_name = 'a repair'; BEGIN; SELECT spend_rollup_rebuild(NULL)")
        .unwrap();
    let subject = |client: &mut Client, wanted: &str| {
        let sql = format!(
            "SELECT subject FROM spend_progress WHERE operation = 'rebuild' AND step LIKE '%{wanted}%'"
        );
        client.query(&sql, &[]).unwrap().first().map(|row| row.get::<_, String>(0))
    };
    let found = wait_for(&mut client, "its row", |work| work.0 == "rebuild");
    assert!(found.1.is_some_and(|step| step.contains("a repair")) && found.3.is_none());
    assert_eq!(subject(&mut client, "a repair").unwrap(), r#""LiteLLM_SpendLogs""#);
    session.batch_execute("ROLLBACK").unwrap();
    assert_eq!(progress(&mut client), []);
    // Of one rollup.
    other
        .batch_execute(
            "SET application_name = 'one of them'; BEGIN; SELECT spend_rollup_rebuild('daily_spend')",
        )
        .unwrap();
    assert_eq!(subject(&mut client, "one of them").unwrap(), "rollup daily_spend");
    other.batch_execute("COMMIT").unwrap();
    assert_eq!(progress(&mut client), []);
}

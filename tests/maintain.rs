//! Partitions of a table that has a policy: created ahead, DEFAULT drained, expired without a loss.

mod common;

use common::*;
use postgres::Client;
use std::path::Path;
use std::time::{Duration, Instant};

/// A partitioned table of a user's own, whose rows a sequence numbers.
const EVENTS: &str = "
    CREATE TABLE events (id bigserial, at timestamp NOT NULL, note text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
    CREATE INDEX ON events (at);
    CREATE TABLE events_pdefault PARTITION OF events DEFAULT;";

/// A round of maintenance by SQL: (action, partition, rows, detail).
fn maintain(client: &mut Client, table: &str) -> Vec<(String, String, i64, String)> {
    read(client, &format!("SELECT * FROM spend_partition_maintain('{}')", table.replace('\'', "''")))
}

fn maintain_at(client: &mut Client, table: &str, now: &str) -> Vec<(String, String, i64, String)> {
    read(client, &format!("SELECT * FROM litellm_spend.maintain_at('{table}', '{now}')"))
}

fn read(client: &mut Client, sql: &str) -> Vec<(String, String, i64, String)> {
    let rows = client.query(sql, &[]).unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    rows.iter().map(|r| (r.get(0), r.get(1), r.get(2), r.get(3))).collect()
}

/// Name and bounds of each partition, in order.
fn partitions(client: &mut Client, table: &str) -> Vec<(String, String)> {
    let sql = format!(
        "SELECT c.relname::text, pg_get_expr(c.relpartbound, c.oid) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
         WHERE i.inhparent = '{table}'::regclass ORDER BY 2, 1"
    );
    client.query(&sql, &[]).unwrap().iter().map(|r| (r.get(0), r.get(1))).collect()
}

fn bounds(from: &str, to: &str) -> String {
    format!("FOR VALUES FROM ('{from} 00:00:00') TO ('{to} 00:00:00')")
}

/// The worker leaves partitions alone: what a test calls is all that happens.
const BY_HAND: &str = "litellm_spend.maintain_interval = 0";

fn cluster() -> &'static Cluster {
    static CLUSTER: std::sync::OnceLock<Cluster> = std::sync::OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(&[BY_HAND]))
}

#[test]
fn a_round_says_as_many_periods_ahead_as_the_status_counts() {
    not_at_midnight();
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute("CREATE TABLE logs (id bigint, at timestamp NOT NULL) PARTITION BY RANGE (at); CREATE INDEX ON logs (at)").unwrap();
    // Three days in one partition, and one that comes after a gap.
    for (first, end) in [(1, 4), (10, 11)] {
        client
            .batch_execute(&format!(
                "DO $$ DECLARE today date := clock_timestamp() AT TIME ZONE 'UTC'; BEGIN
                     EXECUTE format('CREATE TABLE p{first} PARTITION OF logs FOR VALUES FROM (%L) TO (%L)',
                                    today + {first}, today + {end});
                 END $$"
            ))
            .unwrap();
    }
    client.batch_execute("SELECT spend_partition_set('logs', precreate => 2)").unwrap();
    let counted = "SELECT count(*) = 3 AND bool_and(partitions_ahead = 3) FROM spend_partition_status";
    eventually("today has a partition", || holds(&mut client, counted));
    eventually("nobody else is at it", || {
        maintain(&mut client, "logs").iter().any(|(action, _, _, detail)| {
            action == "next" && {
                assert!(detail.ends_with("; 3 periods ahead"), "{detail}");
                true
            }
        })
    });
}

#[test]
fn periods_are_created_ahead_by_the_clock_whatever_rows_there_are() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(EVENTS).unwrap();
    client
        .batch_execute(
            "ALTER TABLE events_pdefault SET (fillfactor = 70, toast.autovacuum_enabled = off);
             CREATE ROLE reader_of_events; GRANT SELECT ON events TO reader_of_events;
             INSERT INTO events (at) VALUES ('2099-01-01');
             SELECT spend_partition_set('events', 'day', 2, '30 days')",
        )
        .unwrap();
    let actions = maintain_at(&mut client, "events", "2028-02-28 23:59:59");
    assert_eq!(actions.iter().filter(|a| a.0 == "created").count(), 3, "{actions:?}");
    assert_eq!(
        partitions(&mut client, "events"),
        [
            ("events_pdefault".to_string(), "DEFAULT".to_string()),
            ("events_p20280228".into(), bounds("2028-02-28", "2028-02-29")),
            ("events_p20280229".into(), bounds("2028-02-29", "2028-03-01")),
            ("events_p20280301".into(), bounds("2028-03-01", "2028-03-02")),
        ]
    );
    // As its siblings are.
    assert!(holds(
        &mut client,
        "SELECT c.reloptions = '{fillfactor=70}' AND t.reloptions = '{autovacuum_enabled=off}' AND c.relowner = p.relowner
                AND has_table_privilege('reader_of_events', c.oid, 'SELECT')
         FROM pg_class c JOIN pg_class t ON t.oid = c.reltoastrelid, pg_class p
         WHERE c.relname = 'events_p20280229' AND p.relname = 'events'"
    ));
    // Again: nothing.
    let actions = maintain_at(&mut client, "events", "2028-02-28 23:59:59");
    assert_eq!(actions.iter().map(|a| a.0.as_str()).collect::<Vec<_>>(), ["next"], "{actions:?}");
    // Weeks from here on, without an overlap.
    client.batch_execute("SELECT spend_partition_set('events', 'week', 1)").unwrap();
    maintain_at(&mut client, "events", "2028-02-29");
    let found = partitions(&mut client, "events");
    assert!(found.contains(&("events_p20280302".into(), bounds("2028-03-02", "2028-03-06"))), "{found:?}");
    assert!(found.contains(&("events_p20280306".into(), bounds("2028-03-06", "2028-03-13"))), "{found:?}");
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM ONLY events_pdefault"), 1);
    client.batch_execute("DROP OWNED BY reader_of_events; DROP ROLE reader_of_events").unwrap();
}

/// What ALTER DEFAULT PRIVILEGES gave it is taken away.
#[test]
fn a_new_partition_is_open_to_whom_the_table_is_and_to_nobody_else() {
    not_at_midnight();
    let db = cluster().database();
    let mut client = db.connect();
    client
        .batch_execute(&format!(
            "{EVENTS} CREATE ROLE reader_p; CREATE ROLE analyst_p; GRANT SELECT ON events TO reader_p;
             ALTER DEFAULT PRIVILEGES GRANT SELECT, DELETE ON TABLES TO analyst_p WITH GRANT OPTION;
             ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC;
             SELECT spend_partition_set('events', precreate => 1)"
        ))
        .unwrap();
    let actions = maintain(&mut client, "events");
    assert_eq!(actions.iter().filter(|a| a.0 == "created").count(), 2, "{actions:?}");
    let grants = "SELECT bool_and(c.relacl = p.relacl) FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid
                  JOIN pg_class p ON p.oid = inhparent
                  WHERE p.relname = 'events' AND c.relname <> 'events_pdefault'";
    assert!(holds(&mut client, grants));
    // With row security it is open to nobody: its policies are not the partition's.
    client.batch_execute("ALTER TABLE events ENABLE ROW LEVEL SECURITY").unwrap();
    client.batch_execute("SELECT spend_partition_set('events', precreate => 2)").unwrap();
    maintain(&mut client, "events");
    let newest = "SELECT bool_and(x.grantee = c.relowner)
                  FROM pg_class c, aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) AS x
                  WHERE c.oid = (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'events'::regclass
                                 ORDER BY inhrelid DESC LIMIT 1)";
    assert!(holds(&mut client, newest));
    client
        .batch_execute("DROP OWNED BY reader_p, analyst_p; DROP ROLE reader_p; DROP ROLE analyst_p")
        .unwrap();
}

#[test]
fn default_with_many_rows_becomes_a_partition_itself() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(EVENTS).unwrap();
    client
        .batch_execute(
            "INSERT INTO events (at, note) SELECT '2026-11-01'::timestamp + i * interval '1 minute', 'a' FROM generate_series(1, 20000) i;
             INSERT INTO events (at) VALUES ('2099-01-01'), ('infinity'), ('-infinity');
             SELECT spend_partition_set('events', 'day', 1)",
        )
        .unwrap();
    let before: i64 = value(&mut client, "SELECT 'events_pdefault'::regclass::oid::bigint");
    client.batch_execute("BEGIN").unwrap();
    let actions = maintain_at(&mut client, "events", "2026-11-15 12:00");
    // Neither we nor ATTACH PARTITION have read it, but for its index; ANALYZE takes a sample, which is no
    // scan.
    let read = format!(
        "SELECT coalesce(sum(seq_tup_read), 0)::bigint FROM pg_stat_xact_user_tables WHERE relid = {before}"
    );
    assert_eq!(value::<i64>(&mut client, &read), 0);
    client.batch_execute("COMMIT").unwrap();
    assert!(actions.iter().any(|a| a.0 == "drained" && a.1 == "events_p20261101"), "{actions:?}");
    assert_eq!(
        partitions(&mut client, "events"),
        [
            ("events_pdefault".to_string(), "DEFAULT".to_string()),
            ("events_p20261101".into(), bounds("2026-11-01", "2026-11-15")),
            ("events_p20261115".into(), bounds("2026-11-15", "2026-11-16")),
            ("events_p20261116".into(), bounds("2026-11-16", "2026-11-17")),
        ]
    );
    assert_eq!(value::<i64>(&mut client, "SELECT 'events_p20261101'::regclass::oid::bigint"), before);
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM events_pdefault"), 3);
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM events"), 20003);
    // Named after its table, as LiteLLM's index job expects, and nothing of the proof is left.
    assert!(holds(
        &mut client,
        "SELECT count(*) = 2 FROM pg_index WHERE indrelid = 'events_p20261101'::regclass AND indexrelid::regclass::text LIKE 'events_p20261101%'"
    ));
    assert!(holds(&mut client, "SELECT count(*) = 0 FROM pg_constraint WHERE conname LIKE 'litellm_spend%'"));
    assert_refused_row(&mut client, "INSERT INTO events_p20261101 (at) VALUES ('2026-11-15')");
}

#[test]
fn default_that_becomes_a_partition_is_followed_by_one_that_is_stored_alike() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(EVENTS).unwrap();
    client
        .batch_execute(
            "ALTER TABLE events_pdefault SET (fillfactor = 70);
             ALTER TABLE events_pdefault REPLICA IDENTITY FULL;
             INSERT INTO events (at) SELECT '2026-11-01'::timestamp + i * interval '1 minute'
             FROM generate_series(1, 5000) AS i;
             SELECT spend_partition_set('events', 'day', 0)",
        )
        .unwrap();
    let actions = maintain_at(&mut client, "events", "2026-11-15 12:00");
    assert!(actions.iter().any(|a| a.3.contains("became this partition")), "{actions:?}");
    assert!(holds(
        &mut client,
        "SELECT bool_and(relreplident = 'f' AND reloptions = '{fillfactor=70}') FROM pg_class
         WHERE oid IN ('events_p20261101'::regclass, 'events_pdefault'::regclass)"
    ));
}

fn assert_refused_row(client: &mut Client, sql: &str) {
    assert_eq!(error(client, sql).code().code(), "23514", "{sql}");
}

#[test]
fn rows_of_two_gaps_move_in_batches() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(EVENTS).unwrap();
    client
        .batch_execute(
            "CREATE TABLE by_hand PARTITION OF events FOR VALUES FROM ('2026-11-05 06:00') TO ('2026-11-09');
             INSERT INTO events (at, note) SELECT '2026-11-01'::timestamp + i * interval '20 seconds', 'a' FROM generate_series(1, 30000) i;
             INSERT INTO events (at, note) SELECT '2026-11-09'::timestamp, 'same' FROM generate_series(1, 3000) i;
             SELECT spend_partition_set('events', 'day', 0)",
        )
        .unwrap();
    let total: i64 = value(&mut client, "SELECT count(*) FROM events");
    let before: i64 = value(&mut client, "SELECT 'events_pdefault'::regclass::oid::bigint");
    // In a session of its own: the counts of a transaction include earlier ones that are not sent yet.
    let mut fresh = db.connect();
    fresh.batch_execute("BEGIN").unwrap();
    maintain_at(&mut fresh, "events", "2026-11-10");
    let read = format!(
        "SELECT coalesce(sum(seq_tup_read), 0)::bigint FROM pg_stat_xact_user_tables WHERE relid = {before}"
    );
    assert_eq!(value::<i64>(&mut fresh, &read), 0);
    fresh.batch_execute("ROLLBACK").unwrap();
    let mut rounds = 0;
    while value::<i64>(&mut client, "SELECT count(*) FROM events_pdefault") > 0 {
        let actions = maintain_at(&mut client, "events", "2026-11-10");
        assert!(actions.iter().all(|a| a.0 != "skipped" || a.3.starts_with("more is")), "{actions:?}");
        assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM events"), total);
        rounds += 1;
        assert!(rounds < 50, "{:?}", partitions(&mut client, "events"));
    }
    let found = partitions(&mut client, "events");
    let half = "FOR VALUES FROM ('2026-11-05 00:00:00') TO ('2026-11-05 06:00:00')";
    assert!(found.contains(&("events_p20261105".into(), half.into())), "{found:?}");
    assert!(found.contains(&("events_p20261109".into(), bounds("2026-11-09", "2026-11-10"))), "{found:?}");
    assert_eq!(found.len(), 9, "{found:?}");
}

// ---- expiry ----------------------------------------------------------------------------------------------

/// A day of `events` with `rows` rows, one of them at its very end.
fn day_of_events(client: &mut Client, day: &str, rows: u32) {
    client
        .batch_execute(&format!(
            "INSERT INTO events (at, note) SELECT '{day}'::timestamp + (i - 1) * interval '1 second', 'a' FROM generate_series(1, {rows} - 1) i;
             INSERT INTO events (at, note) VALUES ('{day}'::timestamp + interval '23:59:59.999999', 'last')"
        ))
        .unwrap();
}

#[test]
fn a_partition_that_something_refers_to_is_not_counted_to_be_dropped() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(EVENTS).unwrap();
    client.batch_execute("SELECT spend_partition_set('events', 'day', 3, '2 days')").unwrap();
    maintain_at(&mut client, "events", "2026-10-20");
    day_of_events(&mut client, "2026-10-20", 100);
    for (make, drop, what) in [
        (
            "CREATE FUNCTION n() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(*) FROM events_p20261020; END",
            "DROP FUNCTION n()",
            "function public.n()",
        ),
        ("CREATE VIEW v AS SELECT * FROM events_p20261020", "DROP VIEW v", "public.v"),
    ] {
        client.batch_execute(make).unwrap();
        let actions = maintain_at(&mut client, "events", "2026-10-25");
        let skipped: Vec<_> = actions.iter().filter(|a| a.0 == "skipped").collect();
        assert_eq!(skipped.len(), 1, "{actions:?}");
        assert!(skipped[0].3.contains(&format!("is referenced by {what}")), "{actions:?}");
        client.batch_execute(drop).unwrap();
    }
    let actions = maintain_at(&mut client, "events", "2026-10-25");
    assert!(actions.iter().any(|a| a.0 == "dropped" && a.2 == 100), "{actions:?}");
}

#[test]
fn what_ends_at_the_cutoff_goes_and_a_row_at_the_cutoff_stays() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(EVENTS).unwrap();
    client
        .batch_execute(
            "SELECT spend_partition_set('events', 'day', 3);
             CREATE TABLE legacy PARTITION OF events FOR VALUES FROM (MINVALUE) TO ('2026-10-20')",
        )
        .unwrap();
    for day in ["2026-10-20", "2026-10-21", "2026-10-22"] {
        maintain_at(&mut client, "events", day);
        day_of_events(&mut client, day, 100);
    }
    client.batch_execute("INSERT INTO events (at) VALUES ('2026-10-10'), ('2026-10-18 12:00')").unwrap();
    client.batch_execute("SELECT spend_partition_set('events', 'day', 3, '2 days')").unwrap();
    // The cutoff is in the legacy partition, before its end.
    let actions = maintain_at(&mut client, "events", "2026-10-20 12:00");
    assert!(
        actions.contains(&("deleted".into(), "legacy".into(), 1, "before '2026-10-18 12:00:00'".into())),
        "{actions:?}"
    );
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM legacy"), 1);
    // At the end of one day: that day goes, and the next stays with its first row, which is at the cutoff.
    let actions = maintain_at(&mut client, "events", "2026-10-23");
    let gone: Vec<_> = actions.iter().filter(|a| a.0 == "dropped").map(|a| (a.1.as_str(), a.2)).collect();
    assert_eq!(gone, [("legacy", 1), ("events_p20261020", 100)], "{actions:?}");
    assert!(holds(&mut client, "SELECT count(*) = 200 AND min(at) = '2026-10-21' FROM events"));
    // Inside of a day nothing goes, neither the partition nor single rows of it.
    let actions = maintain_at(&mut client, "events", "2026-10-23 23:59:59");
    assert!(actions.iter().all(|a| a.0 != "dropped" && a.0 != "deleted"), "{actions:?}");
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM events"), 200);
    let proofs = client
        .query(
            "SELECT partition, range_start::text, range_end::text, rows, spend::text, action, policy
             FROM litellm_spend.expired_partition ORDER BY range_end",
            &[],
        )
        .unwrap();
    let proof = |i: usize| {
        let r = &proofs[i];
        (
            r.get::<_, String>(0),
            r.get::<_, Option<String>>(1),
            r.get::<_, Option<String>>(2),
            r.get::<_, i64>(3),
        )
    };
    assert_eq!(proof(0), ("legacy".into(), None, Some("2026-10-20 00:00:00".into()), 1));
    assert_eq!(
        proof(1),
        (
            "events_p20261020".into(),
            Some("2026-10-20 00:00:00".into()),
            Some("2026-10-21 00:00:00".into()),
            100
        )
    );
    assert_eq!(proofs[1].get::<_, String>(5), "drop");
    assert_eq!(proofs[1].get::<_, String>(6), "day, 3 ahead, retention 2 days, drop");
    assert_eq!(proofs.len(), 2);
}

/// PostgreSQL detaches no partition concurrently beside a DEFAULT.
const WITHOUT_DEFAULT: &str = "
    CREATE TABLE events (id bigserial, at timestamp NOT NULL, note text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);";

/// Leaves a DETACH … CONCURRENTLY as a cancel does in its second half.
fn interrupt_detach(db: &Database, table: &str, partition: &str) {
    let (mut reader, mut other) = (db.connect(), db.connect());
    reader.batch_execute(&format!("BEGIN; SELECT FROM {table} LIMIT 1")).unwrap();
    let pending =
        format!("SELECT bool_or(inhdetachpending) FROM pg_inherits WHERE inhrelid = '{partition}'::regclass");
    let cancel = other.cancel_token();
    std::thread::scope(|scope| {
        let detach = format!("ALTER TABLE {table} DETACH PARTITION {partition} CONCURRENTLY");
        let session = scope.spawn(move || other.batch_execute(&detach));
        let mut client = db.connect();
        eventually("the first half is committed", || holds(&mut client, &pending));
        cancel.cancel_query(postgres::NoTls).unwrap();
        assert!(session.join().unwrap().is_err());
        assert!(holds(&mut client, &pending));
    });
    reader.batch_execute("ROLLBACK").unwrap();
}

#[test]
fn an_interrupted_detach_is_finished_and_what_expires_goes() {
    let db = cluster().database();
    let mut client = db.connect();
    for (table, on_expire) in [("a", "drop"), ("b", "detach")] {
        let events = WITHOUT_DEFAULT.replace("events", table);
        client
            .batch_execute(&format!(
                "{events}
                 CREATE TABLE {table}_old PARTITION OF {table} FOR VALUES FROM ('2026-10-01') TO ('2026-10-02');
                 CREATE TABLE {table}_new PARTITION OF {table} FOR VALUES FROM ('2026-11-28') TO ('2026-11-29');
                 INSERT INTO {table} (at) SELECT '2026-10-01'::timestamp + i * interval '1 hour' FROM generate_series(0, 23) AS i;
                 INSERT INTO {table} (at) VALUES ('2026-11-28 12:00');
                 SELECT spend_partition_set('{table}', precreate => 1, retention => '20 days', on_expire => '{on_expire}')"
            ))
            .unwrap();
        let mut round = || {
            let actions = maintain_at(&mut client, table, "2026-11-28");
            let done =
                actions.into_iter().filter(|a| a.0 == "dropped" || a.0 == "detached" || a.0 == "skipped");
            done.map(|a| (a.0, a.1, a.2)).collect::<Vec<_>>()
        };
        interrupt_detach(&db, table, &format!("{table}_old"));
        let action = if on_expire == "drop" { "dropped" } else { "detached" };
        assert_eq!(round(), [(action.into(), format!("{table}_old"), 24)]);
        // What has not expired becomes a table of its own, and the day gets a new partition.
        interrupt_detach(&db, table, &format!("{table}_new"));
        assert_eq!(round(), [("detached".into(), format!("{table}_new"), 0)]);
        assert_eq!(round(), []);
        let found: Vec<String> = partitions(&mut client, table).into_iter().map(|p| p.0).collect();
        let days = ["p20261128", "p20261129"].map(|day| format!("{table}_{day}"));
        assert_eq!(found, days);
        assert_eq!(value::<i64>(&mut client, &format!("SELECT count(*) FROM {table}_new")), 1);
    }
    assert!(holds(
        &mut client,
        "SELECT to_regclass('a_old') IS NULL AND (SELECT count(*) = 24 FROM litellm_spend_archive.b_old)
                AND (SELECT array_agg(rows ORDER BY table_name) = '{24,24}' FROM litellm_spend.expired_partition)
                AND NOT EXISTS (SELECT FROM pg_inherits WHERE inhdetachpending)"
    ));
}

#[test]
fn a_detach_that_waits_for_an_old_snapshot_is_reported_and_in_nobodys_way() {
    let db = cluster().database();
    let mut client = db.connect();
    client
        .batch_execute(&format!(
            "{WITHOUT_DEFAULT} CREATE TABLE later PARTITION OF events FOR VALUES FROM ('2027-10-01') TO ('2027-10-02');
             CREATE TABLE old PARTITION OF events FOR VALUES FROM ('2026-10-01') TO ('2026-10-02');
             SELECT spend_partition_set('events', precreate => 1, retention => '20 days')"
        ))
        .unwrap();
    interrupt_detach(&db, "events", "later");
    let mut dump = db.connect();
    dump.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT txid_current()").unwrap();
    let actions = maintain_at(&mut client, "events", "2026-11-28");
    let did =
        |action: &str| actions.iter().filter(|a| a.0 == action).map(|a| a.1.as_str()).collect::<Vec<_>>();
    assert_eq!(did("dropped"), ["old"], "{actions:?}");
    assert_eq!(did("created"), ["events_p20261128", "events_p20261129"], "{actions:?}");
    assert_eq!(did("skipped"), ["later"], "{actions:?}");
    dump.batch_execute("COMMIT").unwrap();
    let actions = maintain_at(&mut client, "events", "2026-11-28");
    assert!(actions.iter().any(|a| a.0 == "detached" && a.1 == "later"), "{actions:?}");
}

#[test]
fn partitions_ahead_are_periods_that_are_ready_without_a_gap() {
    let db = cluster().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE parted (id int, at timestamp NOT NULL) PARTITION BY RANGE (at);
             CREATE TABLE plain (id int, at timestamp NOT NULL); CREATE INDEX ON plain (at);
             CREATE TABLE wide PARTITION OF parted FOR VALUES FROM (MINVALUE) TO ((now() AT TIME ZONE 'UTC')::date + 4);
             CREATE TABLE later PARTITION OF parted FOR VALUES FROM ((now() AT TIME ZONE 'UTC')::date + 100) TO (MAXVALUE);
             SELECT spend_partition_set('parted'), spend_partition_set('plain', time_column => 'at')",
        )
        .unwrap();
    let ahead = "SELECT min(partitions_ahead) FROM spend_partition_status WHERE \"table\" =";
    let mut ahead = |table: &str| value::<Option<i64>>(&mut client, &format!("{ahead} '{table}'::regclass"));
    assert_eq!(ahead("parted"), Some(3));
    assert_eq!(ahead("plain"), None);
    client
        .batch_execute(
            "CREATE TABLE gap PARTITION OF parted FOR VALUES FROM ((now() AT TIME ZONE 'UTC')::date + 4) TO ((now() AT TIME ZONE 'UTC')::date + 100)",
        )
        .unwrap();
    let ahead =
        "SELECT min(partitions_ahead) FROM spend_partition_status WHERE \"table\" = 'parted'::regclass";
    assert_eq!(value::<i64>(&mut client, ahead), 366);
    client.batch_execute("SELECT spend_partition_set('parted', 'month')").unwrap();
    assert_eq!(value::<i64>(&mut client, ahead), 366);
}

/// As many rounds on 2026-11-28 as it takes, none of which skips anything else: how much is drained in one
/// goes by time.
fn maintain_until_drained(client: &mut Client, table: &str) {
    for _ in 0..20 {
        let mut actions = maintain_at(client, table, "2026-11-28");
        let before = actions.len();
        actions.retain(|a| a.3 != "more is to be drained by the next round");
        assert!(actions.iter().all(|a| a.0 != "skipped"), "{actions:?}");
        if actions.len() == before {
            return;
        }
    }
    panic!("it is never drained");
}

/// Go's zero time, written from west of Greenwich, is one of them.
#[test]
fn rows_and_partitions_at_the_ends_of_time_are_in_nobodys_way() {
    let db = cluster().database();
    let mut client = db.connect();
    client
        .batch_execute(&format!(
            "{EVENTS} CREATE TABLE far PARTITION OF events FOR VALUES FROM ('9999-12-31') TO ('10000-01-01');
             CREATE TABLE farthest PARTITION OF events FOR VALUES FROM ('294276-01-01') TO ('294276-12-31 23:59:59');
             CREATE TABLE first PARTITION OF events FOR VALUES FROM ('4713-01-01 BC') TO ('4712-01-01 BC');
             INSERT INTO events (at) VALUES ('0001-12-31 16:07:02 BC'), ('0044-03-15 BC'), ('0001-01-01'), ('2026-11-26'),
                 ('2026-11-27 10:00'), ('20000-01-01'), ('262142-12-31 12:00'), ('294275-12-31'), ('infinity'), ('-infinity');
             SELECT spend_partition_set('events', precreate => 1)"
        ))
        .unwrap();
    maintain_until_drained(&mut client, "events");
    maintain_until_drained(&mut client, "events");
    let left = "SELECT array_agg(at::text ORDER BY at) FROM events_pdefault";
    assert_eq!(
        value::<Vec<String>>(&mut client, left),
        ["-infinity", "20000-01-01 00:00:00", "262142-12-31 12:00:00", "294275-12-31 00:00:00", "infinity"]
    );
    // They all expire, by rows or as a whole, but for those to come.
    client
        .batch_execute("SELECT spend_partition_set('events', precreate => 1, retention => '20 days')")
        .unwrap();
    maintain_until_drained(&mut client, "events");
    let rows = "SELECT count(*) FROM events WHERE at < '2026-01-01' AND isfinite(at)";
    assert_eq!(value::<i64>(&mut client, rows), 0);
    assert!(holds(&mut client, "SELECT bool_and(last_error IS NULL) FROM spend_partition_status"));
}

#[test]
fn dates_beyond_every_timestamp_are_in_nobodys_way() {
    let db = cluster().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE dated (id bigserial, d date NOT NULL, PRIMARY KEY (id, d)) PARTITION BY RANGE (d);
             CREATE TABLE far PARTITION OF dated FOR VALUES FROM ('200000-01-01') TO ('300000-01-01');
             CREATE TABLE farther PARTITION OF dated FOR VALUES FROM ('300000-01-01') TO ('400000-01-01');
             CREATE TABLE first PARTITION OF dated FOR VALUES FROM ('4714-11-24 BC') TO ('4712-01-01 BC');
             CREATE TABLE rest PARTITION OF dated DEFAULT; CREATE INDEX ON dated (d);
             INSERT INTO dated (d) VALUES ('4714-11-24 BC'), ('2026-11-27'), ('2026-11-28'), ('300000-01-01'), ('5874897-12-31'), ('infinity');
             SELECT spend_partition_set('dated', time_column => 'd', precreate => 1)",
        )
        .unwrap();
    for retention in ["0", "20 days"] {
        let set = format!("SELECT spend_partition_set('dated', precreate => 1, retention => '{retention}')");
        client.batch_execute(&set).unwrap();
        for _ in 0..3 {
            maintain_until_drained(&mut client, "dated");
        }
    }
    let left = "SELECT array_agg(d::text ORDER BY d) FROM rest";
    assert_eq!(value::<Vec<String>>(&mut client, left), ["5874897-12-31", "infinity"]);
    let rows = "SELECT array_agg(d::text ORDER BY d) FROM dated WHERE d < '300000-01-01'";
    assert_eq!(value::<Vec<String>>(&mut client, rows), ["2026-11-27", "2026-11-28"]);
    let ends = "SELECT string_agg(concat_ws(' ', partition, range_start, range_end), '; ' ORDER BY range_start, range_end)
                FROM spend_partition_status WHERE range_start > '2100-01-01'";
    assert_eq!(
        value::<String>(&mut client, ends),
        "far 200000-01-01 00:00:00 infinity; farther infinity infinity"
    );
    assert!(holds(&mut client, "SELECT bool_and(last_error IS NULL) FROM spend_partition_status"));
}

/// Maintains a table, which skips nothing, until DEFAULT has so many rows left.
fn drain(client: &mut Client, table: &str, default: &str, left: i64) {
    for round in 1.. {
        let actions = maintain_at(client, table, "2026-11-28");
        assert!(actions.iter().all(|a| a.0 != "skipped" || a.3.starts_with("more is")), "{actions:?}");
        if value::<i64>(client, &format!("SELECT count(*) FROM {default}")) == left {
            return;
        }
        assert!(round < 20, "it is never drained");
    }
}

/// A table by date with a partition in the middle, and 3,000 rows of each of these days in its DEFAULT.
fn dated(days: &str) -> (Database, Client) {
    let db = cluster().database();
    let mut client = db.connect();
    client
        .batch_execute(&format!(
            "CREATE TABLE dated (id bigserial, d date NOT NULL, PRIMARY KEY (id, d)) PARTITION BY RANGE (d);
             CREATE TABLE rest PARTITION OF dated DEFAULT; CREATE INDEX ON dated (d);
             CREATE TABLE between_them PARTITION OF dated FOR VALUES FROM ('2026-11-20') TO ('2026-11-21');
             INSERT INTO dated (d) SELECT day FROM generate_series(1, 3000), unnest('{{{days}}}'::date[]) AS day"
        ))
        .unwrap();
    (db, client)
}

#[test]
fn a_date_with_more_rows_than_a_batch_moves_as_a_whole() {
    let (_db, mut client) = dated("2026-11-10,2026-11-12,2026-11-25");
    client.batch_execute("SELECT spend_partition_set('dated', 'week', 0, time_column => 'd')").unwrap();
    drain(&mut client, "dated", "rest", 0);
    let stored = "SELECT array_agg(DISTINCT d || ' in ' || tableoid::regclass) FROM dated";
    let stored: Vec<String> = value(&mut client, stored);
    assert_eq!(
        stored,
        ["2026-11-10 in dated_p20261109", "2026-11-12 in dated_p20261112", "2026-11-25 in dated_p20261123"]
    );
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM dated"), 9000);
}

#[test]
fn more_rows_of_one_time_than_may_move_at_once_stay_and_keep_nothing_else() {
    let (_db, mut client) = dated("2026-11-10,2026-11-25,2026-11-29");
    client
        .batch_execute(
            "INSERT INTO dated (d) SELECT '2026-11-26' FROM generate_series(1, 10);
             SELECT spend_partition_set('dated', precreate => 2, time_column => 'd');
             SET litellm_spend.drain_rows = 2999",
        )
        .unwrap();
    let actions = maintain_at(&mut client, "dated", "2026-11-28");
    let skipped = |partition: &str, day: &str| {
        let why = format!("more than 2999 rows of \"public\".\"rest\" have the same time, '{day} 00:00:00'");
        assert!(actions.iter().any(|a| a.0 == "skipped" && a.1 == partition && a.3 == why), "{actions:?}");
    };
    skipped("rest", "2026-11-10");
    skipped("dated_p20261129", "2026-11-29");
    assert!(actions.iter().any(|a| a.0 == "drained" && a.1 == "dated_p20261126" && a.2 == 10), "{actions:?}");
    let made: Vec<_> = actions.iter().filter(|a| a.0 == "created").map(|a| a.1.as_str()).collect();
    assert_eq!(made, ["dated_p20261128", "dated_p20261130"], "{actions:?}");
    let stays = "SELECT last_error FROM spend_partition_status LIMIT 1";
    let stays: String = value(&mut client, stays);
    assert!(stays.contains("\nHINT:  Raise litellm_spend.drain_rows at a quiet time"), "{stays}");
    client.batch_execute("SET litellm_spend.drain_rows = 3000").unwrap();
    drain(&mut client, "dated", "rest", 0);
}

/// It holds for rows that come later; these were there before.
#[test]
fn rows_that_a_check_was_never_validated_for_are_drained() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(EVENTS).unwrap();
    client
        .batch_execute(
            "CREATE TABLE between_them PARTITION OF events FOR VALUES FROM ('2026-11-20') TO ('2026-11-21');
             INSERT INTO events (at, note) SELECT day + i * interval '1 second', 'old' FROM generate_series(1, 5000) AS i,
                 unnest('{2026-11-10,2026-11-25}'::timestamp[]) AS day;
             INSERT INTO events (at, note) VALUES ('infinity', 'old');
             ALTER TABLE events ADD CONSTRAINT newer CHECK (note <> 'old') NOT VALID;
             SELECT spend_partition_set('events', precreate => 0)",
        )
        .unwrap();
    drain(&mut client, "events", "events_pdefault", 1);
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM events"), 10_001);
    let checked =
        "SELECT bool_and(EXISTS (SELECT FROM pg_constraint WHERE conrelid = inhrelid AND conname = 'newer'))
                   FROM pg_inherits WHERE inhparent = 'events'::regclass";
    assert!(holds(&mut client, checked));
    for at in ["2026-11-10", "2026-11-25", "2026-11-28", "infinity"] {
        assert_refused_row(&mut client, &format!("INSERT INTO events (at, note) VALUES ('{at}', 'old')"));
    }
}

#[test]
fn what_is_not_rolled_up_stays() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(EVENTS).unwrap();
    client
        .batch_execute(
            "SELECT spend_partition_set('events', 'day', 1, '1 day');
             SELECT spend_rollup_register('by_hand', 'events')",
        )
        .unwrap();
    maintain_at(&mut client, "events", "2026-10-20");
    day_of_events(&mut client, "2026-10-20", 10);
    client.batch_execute("INSERT INTO events (at) VALUES ('2026-10-01')").unwrap();
    let actions = maintain_at(&mut client, "events", "2026-10-22");
    assert!(
        actions.iter().any(|a| a.0 == "skipped" && a.1 == "events_p20261020" && a.3.contains("by_hand")),
        "{actions:?}"
    );
    assert!(actions.iter().all(|a| a.0 != "dropped" && a.0 != "deleted"), "{actions:?}");
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM events"), 11);
    let error: String = value(&mut client, "SELECT last_error FROM spend_partition_status LIMIT 1");
    assert!(error.contains("not rolled up"), "{error}");
    // Its owner's SQL has merged some, then all.
    client
        .batch_execute("SELECT spend_rollup_window('by_hand'); INSERT INTO events (at) VALUES ('2026-10-20')")
        .unwrap();
    let actions = maintain_at(&mut client, "events", "2026-10-22");
    assert!(
        actions.contains(&(
            "deleted".into(),
            "events_pdefault".into(),
            1,
            "before '2026-10-21 00:00:00'".into()
        )),
        "{actions:?}"
    );
    assert!(actions.iter().all(|a| a.0 != "dropped"), "{actions:?}");
    client.batch_execute("SELECT spend_rollup_window('by_hand')").unwrap();
    let actions = maintain_at(&mut client, "events", "2026-10-22");
    assert!(actions.iter().any(|a| a.0 == "dropped" && a.2 == 11), "{actions:?}");
    assert!(holds(&mut client, "SELECT bool_and(last_error IS NULL) FROM spend_partition_status"));
}

#[test]
fn what_is_declared_while_a_partition_is_counted_keeps_its_rows() {
    let db = cluster().database();
    let mut client = db.connect();
    // Whoever looks at the newer one, in a session with that setting, waits until the test lets it.
    client
        .batch_execute(&format!(
            "{WITHOUT_DEFAULT}
             CREATE TABLE older PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2026-01-02');
             CREATE TABLE newer PARTITION OF events FOR VALUES FROM ('2026-01-02') TO ('2026-01-03');
             INSERT INTO events (at) VALUES ('2026-01-01'), ('2026-01-02');
             CREATE FUNCTION counted() RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN
                 IF current_setting('test.counts', true) = 'on' THEN PERFORM pg_advisory_xact_lock(1); END IF;
                 RETURN true;
             END $$;
             CREATE INDEX ON newer (id) WHERE counted();
             SELECT spend_partition_set('events', 'day', 0, '30 days'); ANALYZE events"
        ))
        .unwrap();
    client.batch_execute("SELECT pg_advisory_lock(1)").unwrap();
    let call = |caller: &mut Client| {
        caller.batch_execute("SET test.counts = on; SET litellm_spend.lock_timeout = '60s'").unwrap();
        maintain(caller, "events")
    };
    let actions = while_it_waits(&db, call, |other, _| {
        other
            .batch_execute("SELECT spend_rollup_create('by_note', 'events', '{note}', '{count(*) AS n}')")
            .unwrap();
        client.batch_execute("SELECT pg_advisory_unlock(1)").unwrap();
    });
    let stays = |partition: &str| {
        let why = |a: &&(String, String, i64, String)| a.0 == "skipped" && a.1 == partition;
        actions.iter().find(why).is_some_and(|a| a.3.contains("by_note"))
    };
    assert!(stays("older") && stays("newer") && expired(&actions).is_empty(), "{actions:?}");
    wait_until_merged(&mut client);
    assert_eq!(expired(&maintain(&mut client, "events")), ["older", "newer"]);
    assert_eq!(value::<i64>(&mut client, "SELECT sum(n)::bigint FROM litellm_spend.by_note"), 2);
}

/// Where one who counts `older`, in a session with `test.counts`, waits before each piece.
fn counted_in_pieces(client: &mut Client) {
    client
        .batch_execute(&format!(
            "{WITHOUT_DEFAULT}
             CREATE TABLE older PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2026-01-02');
             CREATE TABLE newer PARTITION OF events FOR VALUES FROM ('2026-01-02') TO ('2026-01-03');
             INSERT INTO events (at) VALUES ('2026-01-01'), ('2026-01-02');
             CREATE FUNCTION counted() RETURNS boolean IMMUTABLE LANGUAGE plpgsql SET lock_timeout = 0 AS $$ BEGIN
                 IF current_setting('test.counts', true) = 'on' THEN PERFORM pg_advisory_lock(1); PERFORM pg_advisory_unlock(1); END IF;
                 RETURN true;
             END $$;
             CREATE INDEX ON older (id) WHERE counted();
             SELECT spend_partition_set('events', 'day', 0, '30 days'); ANALYZE events"
        ))
        .unwrap();
}

#[test]
fn a_count_gives_way_to_a_statement_that_names_no_time() {
    let db = cluster().database();
    let mut client = db.connect();
    counted_in_pieces(&mut client);
    client.batch_execute("SELECT pg_advisory_lock(1)").unwrap();
    let call = |caller: &mut Client| {
        caller.batch_execute("SET test.counts = on; SET litellm_spend.lock_timeout = '300ms'").unwrap();
        maintain(caller, "events")
    };
    let mut writer = db.connect();
    let writer_pid = backend_pid(&mut writer);
    let actions = while_it_waits(&db, call, |other, _| {
        std::thread::scope(|scope| {
            let update = scope.spawn(|| writer.batch_execute("UPDATE events SET id = id WHERE id = 2"));
            eventually("it waits for the count", || waits_for_a_lock(other, writer_pid));
            std::thread::sleep(Duration::from_millis(400));
            client.batch_execute("SELECT pg_advisory_unlock(1)").unwrap();
            update.join().unwrap().unwrap();
        });
    });
    let gave_way = actions.iter().find(|a| a.0 == "skipped").unwrap_or_else(|| panic!("{actions:?}"));
    assert_eq!(gave_way.1, "older", "{actions:?}");
    let why = format!(
        "others have waited for \"public\".\"older\" for longer than 300 ms: so its lock was given back. Waiting was process {writer_pid} "
    );
    assert!(gave_way.3.starts_with(&why), "{actions:?}");
    assert!(expired(&actions).is_empty(), "{actions:?}");
    assert_eq!(expired(&maintain(&mut client, "events")), ["older", "newer"]);
}

#[test]
fn a_table_that_takes_the_name_of_a_partition_is_not_dropped_for_it() {
    let db = cluster().database();
    let mut client = db.connect();
    counted_in_pieces(&mut client);
    client.batch_execute("SELECT pg_advisory_lock(1)").unwrap();
    let call = |caller: &mut Client| {
        caller.batch_execute("SET test.counts = on").unwrap();
        maintain(caller, "events")
    };
    let actions = while_it_waits(&db, call, |other, _| {
        other
            .batch_execute(
                "ALTER TABLE newer RENAME TO renamed;
                 CREATE TABLE newer AS SELECT * FROM generate_series(1, 3) AS id",
            )
            .unwrap();
        client.batch_execute("SELECT pg_advisory_unlock(1)").unwrap();
    });
    assert_eq!(expired(&actions), ["older"], "{actions:?}");
    let detail = &actions.iter().find(|a| a.1 == "newer").unwrap_or_else(|| panic!("{actions:?}")).3;
    assert_eq!(detail, "somebody changed \"newer\" at the same time");
    assert!(holds(&mut client, "SELECT count(*) = 3 FROM newer"));
    assert_eq!(expired(&maintain(&mut client, "events")), ["renamed"]);
}

#[test]
fn a_partition_of_a_table_that_a_foreign_key_references_is_not_counted_to_be_dropped() {
    let db = cluster().database();
    let mut client = db.connect();
    client
        .batch_execute(&format!(
            "{WITHOUT_DEFAULT}
             CREATE TABLE older PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2026-01-02');
             INSERT INTO events (at) VALUES ('2026-01-01');
             CREATE TABLE of_event (id bigint, at timestamp, FOREIGN KEY (id, at) REFERENCES events);
             SELECT spend_partition_set('events', 'day', 0, '30 days')"
        ))
        .unwrap();
    let actions = maintain(&mut client, "events");
    let skipped = actions.iter().find(|a| a.1 == "older").unwrap_or_else(|| panic!("{actions:?}"));
    assert_eq!(
        (&*skipped.0, &*skipped.3),
        ("skipped", "\"older\" is referenced by public.of_event"),
        "{actions:?}"
    );
    client.batch_execute("SELECT spend_partition_set('events', on_expire => 'detach')").unwrap();
    let actions = maintain(&mut client, "events");
    assert!(actions.iter().any(|a| a.0 == "detached" && a.1 == "older"), "{actions:?}");
}

#[test]
fn rows_of_a_table_that_a_foreign_key_references_stay_before_anybody_is_locked_out() {
    let db = cluster().database();
    let (mut client, mut reader) = (db.connect(), db.connect());
    client.batch_execute(EVENTS).unwrap();
    client
        .batch_execute(
            "CREATE TABLE of_event (id bigint, at timestamp, FOREIGN KEY (id, at) REFERENCES events);
             SELECT spend_partition_set('events', 'day', 0); SET litellm_spend.lock_timeout = '200ms'",
        )
        .unwrap();
    reader.batch_execute("BEGIN; SELECT FROM events").unwrap();
    // A row moves; then DEFAULT itself would become a partition.
    for rows in [1, 3000] {
        client
            .batch_execute(&format!(
                "INSERT INTO events (at) SELECT '2026-11-01'::timestamp + i * interval '1 second'
                 FROM generate_series(1, {rows}) AS i"
            ))
            .unwrap();
        let actions = maintain_at(&mut client, "events", "2026-11-15");
        let skipped = actions.iter().find(|a| a.0 == "skipped").unwrap_or_else(|| panic!("{actions:?}"));
        assert_eq!(skipped.3, "\"events\" is referenced by public.of_event", "{actions:?}");
    }
}

#[test]
fn a_partition_of_several_pieces_is_counted_as_it_is() {
    let db = cluster().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE events (id bigint, at timestamp NOT NULL, spend float8, pad char(900) DEFAULT '')
                 PARTITION BY RANGE (at);
             ALTER TABLE events ALTER pad SET STORAGE PLAIN;
             CREATE TABLE older PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2026-01-02');
             INSERT INTO events (id, at, spend)
                 SELECT i, '2026-01-01', CASE WHEN i % 1000 = 0 THEN float8 'NaN' ELSE i END FROM generate_series(1, 20000) AS i;
             DELETE FROM events WHERE id % 3 = 0;
             SELECT spend_partition_set('events', 'day', 0, '30 days')",
        )
        .unwrap();
    assert!(holds(&mut client, "SELECT pg_relation_size('older') > 2 * 8388608"));
    let counted: String = value(
        &mut client,
        "SELECT concat_ws(' ', count(*), sum(spend::numeric) FILTER (WHERE spend <> 'NaN')) FROM older",
    );
    assert_eq!(expired(&maintain(&mut client, "events")), ["older"]);
    let recorded = "SELECT concat_ws(' ', rows, spend) FROM litellm_spend.expired_partition";
    assert_eq!(value::<String>(&mut client, recorded), counted);
}

#[test]
fn dropped_days_of_litellms_table_stay_in_the_rollups() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    client.batch_execute(&insert_rows("old", 3000, 20)).unwrap();
    client
        .batch_execute(
            r#"SET ROLE litellm;
               CREATE TABLE "LiteLLM_SpendLogs_p20201111" PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM (MINVALUE) TO ('2020-11-12');
               RESET ROLE;
               INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime", api_key, model)
               SELECT 'ancient' || i, 'x', 0.5, '2020-11-11', '2020-11-11', 'k', 'm' FROM generate_series(1, 10) i;
               SELECT spend_partition_set(NULL, 'day', 2, '15 days')"#,
        )
        .unwrap();
    // Not before the rollups have it,
    let stays = |actions: &[(String, String, i64, String)], why: &str| {
        actions.iter().any(|a| a.0 == "skipped" && a.1.ends_with("_p20201111") && a.3.contains(why))
            && actions.iter().all(|a| a.0 != "dropped")
    };
    client.batch_execute("BEGIN; SELECT spend_attach()").unwrap();
    let actions = maintain(&mut client, "\"LiteLLM_SpendLogs\"");
    assert!(stays(&actions, "is not backfilled"), "{actions:?}");
    client.batch_execute("ROLLBACK; SELECT spend_attach()").unwrap();
    wait_until_live(&mut client);
    wait_until_merged(&mut client);
    // nor while they are to be repaired from it.
    client
        .batch_execute(
            "BEGIN; INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation)
             VALUES ('2020-11-11', '2020-11-12', 'rebuild', 'INSERT')",
        )
        .unwrap();
    let actions = maintain(&mut client, "\"LiteLLM_SpendLogs\"");
    assert!(stays(&actions, "something to repair"), "{actions:?}");
    client.batch_execute("ROLLBACK").unwrap();
    let totals = "SELECT sum(spend)::text || ' ' || sum(requests) FROM litellm_spend.daily_spend";
    let before: String = value(&mut client, totals);
    client.batch_execute("BEGIN").unwrap();
    let actions = maintain(&mut client, "\"LiteLLM_SpendLogs\"");
    // With their triggers from the first moment on.
    assert!(holds(
        &mut client,
        r#"SELECT count(*) > 3 AND bool_and(5 = (SELECT count(*) FROM pg_trigger WHERE tgrelid = inhrelid AND tgname LIKE 'litellm_spend%'))
           FROM pg_inherits WHERE inhparent = '"LiteLLM_SpendLogs"'::regclass"#
    ));
    client.batch_execute("COMMIT").unwrap();
    assert!(
        actions.contains(&(
            "dropped".into(),
            "LiteLLM_SpendLogs_p20201111".into(),
            10,
            "FROM (MINVALUE) TO ('2020-11-12 00:00:00'); dropped".into()
        )),
        "{actions:?}"
    );
    assert!(
        actions.iter().any(|a| a.0 == "deleted" && a.1 == "LiteLLM_SpendLogs_pdefault" && a.2 > 100),
        "{actions:?}"
    );
    assert!(actions.iter().any(|a| a.0 == "drained"), "{actions:?}");
    assert_eq!(value::<String>(&mut client, totals), before);
    assert_verified(&mut client);
    assert!(holds(&mut client, "SELECT rows = 10 AND spend = 5 FROM litellm_spend.expired_partition"));
    assert_refused(
        &mut client,
        "SELECT spend_rollup_rebuild('daily_spend', '2020-11-11', '2020-11-12')",
        "55000",
    );
    // A row of such a day that arrives now still counts.
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime", api_key, model)
               VALUES ('late', 'x', 0.5, '2020-11-11', '2020-11-11', 'k', 'm')"#,
        )
        .unwrap();
    assert_eq!(
        value::<i64>(
            &mut client,
            "SELECT sum(requests)::bigint FROM litellm_spend.daily_spend WHERE date = '2020-11-11'"
        ),
        11
    );
    assert_verified(&mut client);
    // New partitions are captured when they are written to directly.
    let today: String = value(
        &mut client,
        r#"SELECT 'LiteLLM_SpendLogs_p' || to_char(now() AT TIME ZONE 'UTC' + interval '1 day', 'YYYYMMDD')"#,
    );
    client
        .batch_execute(&format!(
            r#"INSERT INTO "{today}" (request_id, call_type, spend, "startTime", "endTime", api_key, model)
               SELECT 'direct', 'x', 0.5, now() AT TIME ZONE 'UTC' + interval '1 day', now(), 'k', 'm'"#
        ))
        .unwrap();
    assert_verified(&mut client);
}

/// LiteLLM's table with two partitions of old days, whose bounds are counted from today, a row at each hour
/// of `at` counted from the day before 40 days, and all of it added up.
fn two_old_partitions(client: &mut Client, border: &str, at: &[i32]) {
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    let hours = at.iter().map(i32::to_string).collect::<Vec<_>>().join(", ");
    client
        .batch_execute(&format!(
            r#"SET ROLE litellm;
               CREATE TABLE older PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM (MINVALUE) TO ({border});
               CREATE TABLE newer PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM ({border}) TO (CURRENT_DATE - 38);
               RESET ROLE;
               INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime", api_key, model)
               SELECT 'r' || hour, 'x', 0.5, at, at, 'k', 'm'
               FROM unnest(ARRAY[{hours}]) AS hour, LATERAL (SELECT CURRENT_DATE - 40 + hour * interval '1 hour' AS at) AS t"#
        ))
        .unwrap();
    attach(client);
    wait_until_merged(client);
    client.batch_execute("SELECT spend_partition_set(NULL, 'day', 1, '30 days')").unwrap();
}

/// What `maintain_at` does when rows of before that time expire.
fn expire(client: &mut Client, cutoff: &str) -> Vec<(String, String, i64, String)> {
    let now: String = value(client, &format!("SELECT ({cutoff} + interval '30 days')::text"));
    maintain_at(client, "\"LiteLLM_SpendLogs\"", &now)
}

fn expired(actions: &[(String, String, i64, String)]) -> Vec<&str> {
    actions.iter().filter(|a| a.0 == "dropped").map(|a| a.1.as_str()).collect()
}

/// All that the built-in rollups know.
const TOTALS: &str = "SELECT sum(spend)::text || ' ' || sum(requests) FROM litellm_spend.daily_spend";

#[test]
fn a_day_of_which_a_partition_held_a_part_is_frozen_with_it() {
    not_at_midnight();
    let db = cluster().database();
    let mut client = db.connect();
    // Of the day a row in the partition that goes, two in the one that stays; and one of the next day.
    two_old_partitions(&mut client, "CURRENT_DATE - 40 + time '12:00'", &[10, 12, 14, 30]);
    let before: String = value(&mut client, TOTALS);
    // A row goes by itself.
    let actions = expire(&mut client, "CURRENT_DATE - 40 + time '13:00'");
    assert_eq!(expired(&actions), ["older"], "{actions:?}");
    assert!(actions.iter().any(|a| a.0 == "deleted" && a.1 == "newer" && a.2 == 1), "{actions:?}");
    let frozen =
        "SELECT frozen_before = CURRENT_DATE - 39 FROM litellm_spend.source WHERE name = 'change_log'";
    assert!(holds(&mut client, frozen));
    assert_eq!(value::<String>(&mut client, TOTALS), before);
    assert_verified(&mut client);
    let day = "SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 40, CURRENT_DATE - 39)";
    assert_refused(&mut client, day, "55000");
    // The rest of it may have been written past us: what can be recomputed is, and nothing counts twice.
    client.batch_execute("ALTER TABLE newer DISABLE TRIGGER litellm_spend_capture_insert").unwrap();
    eventually("the days of the rest are repaired", || {
        holds(
            &mut client,
            "SELECT count(*) = 1 AND bool_and(repaired_at IS NOT NULL AND unrepairable)
             FROM litellm_spend.dirty_range WHERE operation = 'ATTACH'",
        )
    });
    assert_eq!(value::<String>(&mut client, TOTALS), before);
    assert_verified(&mut client);
}

#[test]
fn days_of_a_partition_that_had_to_stay_are_not_frozen_with_those_of_a_newer_one() {
    not_at_midnight();
    let db = cluster().database();
    let mut client = db.connect();
    two_old_partitions(&mut client, "CURRENT_DATE - 39", &[10, 30]);
    let before: String = value(&mut client, TOTALS);
    client
        .batch_execute(
            "BEGIN; INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation)
             VALUES (CURRENT_DATE - 40, CURRENT_DATE - 39, 'rebuild', 'INSERT')",
        )
        .unwrap();
    let actions = expire(&mut client, "CURRENT_DATE - 38");
    assert_eq!(expired(&actions), ["newer"], "{actions:?}");
    assert!(actions.iter().any(|a| a.0 == "skipped" && a.1 == "older"), "{actions:?}");
    client.batch_execute("COMMIT").unwrap();
    // Its rows are there, so it is repaired.
    let repairs = "SELECT count(*) FROM litellm_spend.dirty_range WHERE repair = 'rebuild' AND";
    let left = format!("{repairs} repaired_at IS NULL");
    eventually("nothing is left to repair", || value::<i64>(&mut client, &left) == 0);
    assert_eq!(value::<i64>(&mut client, &format!("{repairs} unrepairable")), 0);
    let rebuild = |first: i32| {
        format!(
            "SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - {first}, CURRENT_DATE - {})",
            first - 1
        )
    };
    client.batch_execute(&rebuild(40)).unwrap();
    assert_refused(&mut client, &rebuild(39), "55000");
    assert_verified(&mut client);
    // Then it goes, too.
    let actions = expire(&mut client, "CURRENT_DATE - 38");
    assert_eq!(expired(&actions), ["older"], "{actions:?}");
    assert_refused(&mut client, &rebuild(40), "55000");
    assert_refused(&mut client, &rebuild(39), "55000");
    assert_eq!(value::<String>(&mut client, TOTALS), before);
    assert_verified(&mut client);
}

#[test]
fn days_of_the_replaced_table_are_not_frozen_with_those_of_a_partition() {
    not_at_midnight();
    let db = cluster().database();
    let mut client = db.connect();
    let old = r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
                 VALUES ('old', 'x', 0.5, CURRENT_DATE - 60, now())"#;
    client.batch_execute(old).unwrap();
    attach(&mut client);
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    wait_until_capture_follows(&mut client);
    client.batch_execute(&day_partition("newer", -40)).unwrap();
    client.batch_execute(&old.replace("'old'", "'new'").replace("60", "40")).unwrap();
    eventually("it is captured, and its days are computed", || {
        holds(
            &mut client,
            "SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'newer'::regclass)
                AND NOT EXISTS (SELECT FROM litellm_spend.dirty_range WHERE repaired_at IS NULL)",
        )
    });
    wait_until_live(&mut client);
    wait_until_merged(&mut client);
    client.batch_execute("SELECT spend_partition_set(NULL, 'day', 1, '30 days')").unwrap();
    let before: String = value(&mut client, TOTALS);
    let actions = expire(&mut client, "CURRENT_DATE - 30");
    assert_eq!(expired(&actions), ["newer"], "{actions:?}");
    let rebuild = "SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - {first}, CURRENT_DATE - {next})";
    let of = |first: &str, next: &str| rebuild.replace("{first}", first).replace("{next}", next);
    client.batch_execute(&of("60", "59")).unwrap();
    assert_refused(&mut client, &of("40", "39"), "55000");
    assert_eq!(value::<String>(&mut client, TOTALS), before);
    assert_verified(&mut client);
}

/// The ledger has the deleted row, so that the repair to come can count it.
#[test]
fn days_that_are_to_be_repaired_are_not_frozen_with_those_of_a_newer_partition() {
    not_at_midnight();
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    client.batch_execute(&day_partition("newer", -40)).unwrap();
    let row = |day: i32| {
        format!(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
               VALUES ('r{day}', 'x', 0.5, CURRENT_DATE + ({day}), now());"#
        )
    };
    client.batch_execute(&(row(-60) + &row(-40))).unwrap();
    attach(&mut client);
    wait_until_merged(&mut client);
    client.batch_execute("SELECT spend_partition_set(NULL, 'day', 1, '30 days')").unwrap();
    make_unwritable(&mut client, "daily_spend_rollup");
    client
        .batch_execute(&format!(
            r#"BEGIN; ALTER TABLE "LiteLLM_SpendLogs_pdefault" DISABLE TRIGGER USER; {} COMMIT"#,
            row(-50).replace("\"LiteLLM_SpendLogs\"", "\"LiteLLM_SpendLogs_pdefault\"")
        ))
        .unwrap();
    let noted = "SELECT EXISTS (SELECT FROM litellm_spend.dirty_range WHERE operation = 'ATTACH')";
    eventually("its days are noted", || holds(&mut client, noted));
    let actions = expire(&mut client, "CURRENT_DATE - 30");
    assert_eq!(expired(&actions), ["newer"], "{actions:?}");
    assert!(actions.iter().any(|a| a.0 == "deleted" && a.2 == 2), "{actions:?}");
    make_writable(&mut client, "daily_spend_rollup");
    eventually("they are repaired", || {
        !holds(&mut client, &noted.replace("operation", "repaired_at IS NULL AND operation"))
    });
    assert_eq!(value::<i64>(&mut client, REQUESTS), 3);
    assert_verified(&mut client);
}

#[test]
fn detached_partitions_go_to_the_archive_and_are_captured_no_more() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    attach(&mut client);
    client
        .batch_execute(
            r#"CREATE ROLE keeper; GRANT ALL ON SCHEMA public TO keeper; ALTER TABLE "LiteLLM_SpendLogs" OWNER TO keeper;
               ALTER TABLE "LiteLLM_SpendLogs_pdefault" OWNER TO keeper; GRANT SELECT ON "LiteLLM_SpendLogs" TO litellm;
               SELECT spend_partition_set(NULL, 'day', 1, '1 day', 'detach')"#,
        )
        .unwrap();
    for _ in 0..2 {
        client
            .batch_execute(
                r#"SET ROLE keeper;
                   CREATE TABLE "LiteLLM_SpendLogs_p20261001" PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM ('2026-10-01') TO ('2026-10-02');
                   RESET ROLE"#,
            )
            .unwrap();
        client
            .batch_execute(
                r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime", api_key, model)
                   SELECT 'r' || i, 'x', 0.5, '2026-10-01', '2026-10-01', 'k', 'm' FROM generate_series(1, 10) i"#,
            )
            .unwrap();
        eventually("the partition is captured and gone", || {
            let actions = maintain_at(&mut client, "\"LiteLLM_SpendLogs\"", "2026-11-21");
            actions.iter().any(|a| a.0 == "detached")
        });
    }
    assert!(holds(
        &mut client,
        r#"SELECT count(*) = 2 AND bool_and(NOT relispartition)
                  AND has_schema_privilege('keeper', 'litellm_spend_archive', 'USAGE')
                  AND bool_and(NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = c.oid))
           FROM pg_class c WHERE relnamespace = 'litellm_spend_archive'::regnamespace AND relkind = 'r'"#
    ));
    assert_eq!(value::<i64>(&mut client, REQUESTS), 20);
    client.batch_execute(r#"DELETE FROM litellm_spend_archive."LiteLLM_SpendLogs_p20261001""#).unwrap();
    assert_verified(&mut client);
    assert!(holds(
        &mut client,
        "SELECT count(*) = 2 AND bool_and(rows = 10 AND spend = 5 AND action = 'detach') FROM litellm_spend.expired_partition"
    ));
    client
        .batch_execute("REASSIGN OWNED BY keeper TO postgres; DROP OWNED BY keeper; DROP ROLE keeper")
        .unwrap();
}

#[test]
fn a_table_without_partitions_loses_expired_rows_only() {
    let db = cluster().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 3000, 25)).unwrap();
    let totals = "SELECT sum(spend)::text FROM litellm_spend.daily_spend";
    let before: String = value(&mut client, totals);
    client.batch_execute("SELECT spend_partition_set(retention => '10 days')").unwrap();
    // A row that somebody else holds is not waited for.
    client.batch_execute("SET statement_timeout = '20s'").unwrap();
    let mut other = db.connect();
    let mut holder = other.transaction().unwrap();
    holder
        .batch_execute(r#"SELECT FROM "LiteLLM_SpendLogs" ORDER BY "startTime" LIMIT 1 FOR UPDATE"#)
        .unwrap();
    let actions = maintain(&mut client, "\"LiteLLM_SpendLogs\"");
    assert!(actions.iter().any(|a| a.0 == "deleted" && a.2 > 1000), "{actions:?}");
    let expired = r#"SELECT count(*) FROM "LiteLLM_SpendLogs" WHERE "startTime" < now() AT TIME ZONE 'UTC' - interval '10 days'"#;
    assert_eq!(value::<i64>(&mut client, expired), 1);
    holder.commit().unwrap();
    maintain(&mut client, "\"LiteLLM_SpendLogs\"");
    assert_eq!(value::<i64>(&mut client, expired), 0);
    assert_eq!(value::<String>(&mut client, totals), before);
    assert_verified(&mut client);
}

#[test]
fn what_a_policy_lets_expire_stays_in_the_totals_also_where_a_delete_subtracts() {
    for partitioned in [false, true] {
        let db = cluster().database();
        let mut client = db.connect();
        if partitioned {
            client.batch_execute(UPSTREAM_SCRIPT).unwrap();
            client
                .batch_execute(
                    r#"BEGIN; SET LOCAL ROLE litellm;
                       CREATE TABLE old PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM (MINVALUE) TO ('2026-01-01'); COMMIT"#,
                )
                .unwrap();
        }
        client
            .batch_execute(
                r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
                   SELECT 'r' || i, 'x', 1, t, t FROM generate_series(1, 3) AS i,
                       LATERAL (SELECT CASE i WHEN 3 THEN CURRENT_DATE ELSE '2025-10-05' END::timestamp AS t) AS at;
                   SELECT spend_attach(on_delete => 'subtract')"#,
            )
            .unwrap();
        wait_until_live(&mut client);
        client.batch_execute("SELECT spend_partition_set(retention => '30 days')").unwrap();
        let done = maintain(&mut client, r#""LiteLLM_SpendLogs""#);
        let how = if partitioned { "dropped" } else { "deleted" };
        assert!(done.iter().any(|action| action.0 == how), "{done:?}");
        let rows = r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#;
        assert_eq!(value::<i64>(&mut client, rows), 1, "{done:?}");
        assert_eq!(value::<i64>(&mut client, REQUESTS), 3, "{done:?}");
        assert_verified(&mut client);
        // Also when everything is computed again.
        client.batch_execute("SELECT spend_detach(); SELECT spend_attach(on_delete => 'subtract')").unwrap();
        wait_until_live(&mut client);
        assert_eq!(value::<i64>(&mut client, REQUESTS), 3);
        // A DELETE of somebody's own subtracts.
        client.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs""#).unwrap();
        assert_eq!(value::<i64>(&mut client, REQUESTS), 2);
        assert_verified(&mut client);
        assert_eq!(capture_errors(&mut client), 0);
    }
}

#[test]
fn rows_are_not_deleted_one_by_one_while_capture_would_not_see_it() {
    for partitioned in [false, true] {
        let db = cluster().database();
        let mut client = db.connect();
        if partitioned {
            client.batch_execute(UPSTREAM_SCRIPT).unwrap();
        }
        client.batch_execute(&insert_rows("a", 2000, 25)).unwrap();
        attach(&mut client);
        wait_until_merged(&mut client);
        client.batch_execute("SELECT spend_partition_set(retention => '10 days')").unwrap();
        let before: String = value(&mut client, TOTALS);
        let rows = r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#;
        // A load, or a restore: the watch cannot mend that before it commits.
        client.batch_execute(r#"BEGIN; ALTER TABLE "LiteLLM_SpendLogs" DISABLE TRIGGER USER"#).unwrap();
        let actions = maintain(&mut client, r#""LiteLLM_SpendLogs""#);
        let target = if partitioned { "LiteLLM_SpendLogs_pdefault" } else { "LiteLLM_SpendLogs" };
        let why = |a: &(String, String, i64, String)| {
            a.0 == "skipped" && a.1 == target && a.3.contains("triggers are missing or disabled")
        };
        assert!(actions.iter().any(why), "{actions:?}");
        assert_eq!(value::<i64>(&mut client, rows), 2000, "{actions:?}");
        client.batch_execute("COMMIT").unwrap();
        eventually("they are captured again, and go", || {
            maintain(&mut client, r#""LiteLLM_SpendLogs""#);
            value::<i64>(&mut client, rows) < 1000
        });
        assert_eq!(value::<String>(&mut client, TOTALS), before);
        assert_verified(&mut client);
        // Nor where the session has triggers not fire.
        let left = value::<i64>(&mut client, rows);
        client.batch_execute("SELECT spend_partition_set(retention => '5 days')").unwrap();
        client.batch_execute("SET session_replication_role = replica").unwrap();
        eventually("they go", || {
            maintain(&mut client, r#""LiteLLM_SpendLogs""#);
            value::<i64>(&mut client, rows) < left
        });
        client.batch_execute("RESET session_replication_role").unwrap();
        assert_verified(&mut client);
    }
}

#[test]
fn rows_are_not_deleted_one_by_one_while_the_ledger_cannot_be_written() {
    for on_delete in ["keep", "subtract"] {
        let db = cluster().database().with_rows("a", 2000, 25);
        let mut client = db.connect();
        client.batch_execute(&format!("SELECT spend_attach(on_delete => '{on_delete}')")).unwrap();
        wait_until_live(&mut client);
        wait_until_merged(&mut client);
        let before: String = value(&mut client, TOTALS);
        make_unwritable(&mut client, "retired");
        client.batch_execute("SELECT spend_partition_set(retention => '10 days')").unwrap();
        let actions = maintain(&mut client, r#""LiteLLM_SpendLogs""#);
        let why =
            |a: &(String, String, i64, String)| a.0 == "skipped" && a.3.contains("violates check constraint");
        assert!(actions.iter().any(why), "{actions:?}");
        assert_eq!(value::<i64>(&mut client, r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#), 2000);
        // Nothing that would have to be computed again.
        assert_eq!(
            value::<Option<i64>>(
                &mut client,
                "SELECT pg_sequence_last_value('litellm_spend.capture_failures')"
            ),
            None
        );
        make_writable(&mut client, "retired");
        let actions = maintain(&mut client, r#""LiteLLM_SpendLogs""#);
        assert!(actions.iter().any(|a| a.0 == "deleted"), "{actions:?}");
        assert_eq!(value::<String>(&mut client, TOTALS), before);
        assert_verified(&mut client);
    }
}

// ---- beside others ------------------------------------------------------------------------------------

/// What nobody waits for but behind a lock, or on a machine that is busy: single ones prove nothing.
const LONG_WAIT: Duration = Duration::from_millis(900);

/// Runs `body` beside readers that count the rows of `table`, which must never become fewer. Returns their
/// long waits.
fn beside_readers(db: &Database, table: &str, body: impl FnOnce()) -> Vec<Duration> {
    let stop = std::sync::atomic::AtomicBool::new(false);
    let waits = std::sync::Mutex::new(vec![]);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut client = db.connect();
                let mut least = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let began = Instant::now();
                    let rows: i64 = value(&mut client, &format!("SELECT count(*) FROM {table}"));
                    waits.lock().unwrap().extend(Some(began.elapsed()).filter(|wait| *wait > LONG_WAIT));
                    assert!(rows >= least, "{rows} rows after {least}");
                    least = rows;
                }
            });
        }
        let _stop = RaiseOnDrop(&stop);
        body();
    });
    waits.into_inner().unwrap()
}

#[test]
fn default_is_drained_after_upstreams_script_while_others_read_and_write() {
    let db = cluster().database();
    let mut client = db.connect();
    attach(&mut client);
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    wait_until_capture_follows(&mut client);
    client.batch_execute(&insert_rows("old", 5000, 10)).unwrap();
    client.batch_execute("SELECT spend_partition_set()").unwrap();
    client.batch_execute("SET litellm_spend.lock_timeout = '1s'").unwrap();
    let table = "\"LiteLLM_SpendLogs\"";
    beside_writers(&db, 2, 5, 12, || {
        let waits = beside_readers(&db, table, || {
            // LiteLLM's own job has made the partition of tomorrow, so that there are two gaps; both are
            // filled again.
            for day in 1..4 {
                let job = partition_by_litellms_job(day);
                client.batch_execute(&format!("SET ROLE litellm; {job} RESET ROLE")).unwrap();
            }
            let mut seen = vec![];
            eventually("DEFAULT is drained", || {
                seen.extend(maintain(&mut client, table));
                value::<i64>(&mut client, r#"SELECT count(*) FROM "LiteLLM_SpendLogs_pdefault""#) == 0
            });
            assert!(seen.iter().any(|a| a.0 == "drained"), "{seen:?}");
        });
        // Behind a lock that the drain waits for, for a second at most, and behind those that it has.
        assert!(waits.iter().all(|wait| *wait < Duration::from_secs(5)), "{waits:?}");
    });
    assert_verified(&mut client);
    assert_eq!(
        value::<i64>(
            &mut client,
            r#"SELECT count(*) - (SELECT sum(requests) FROM litellm_spend.daily_spend)::bigint FROM "LiteLLM_SpendLogs""#
        ),
        0
    );
    assert_eq!(capture_errors(&mut client), 0);
    assert!(holds(&mut client, "SELECT bool_and(partitions_ahead >= 7) FROM spend_partition_status"));
    assert!(holds(
        &mut client,
        r#"SELECT reltuples > 0 FROM pg_class WHERE oid = '"LiteLLM_SpendLogs"'::regclass"#
    ));
}

/// LiteLLM's table after its own script, with `rows` rows in DEFAULT of each of the days three and one ago,
/// and a partition for the day between; captured, and all of it counted, where no worker runs.
fn two_gaps_of_litellms_table(rows: u32) -> (Database, Client) {
    let (db, mut client) = without_worker();
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    client.batch_execute(&day_partition("between", -2)).unwrap();
    client
        .batch_execute(&format!(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
               SELECT d || '/' || i, 'x', 0.5, CURRENT_DATE - d + i * interval '1 second', now()
               FROM unnest(ARRAY[1, 3]) AS d, generate_series(1, {rows}) AS i;
               SELECT spend_attach();
               SELECT spend_partition_set(precreate => 1)"#
        ))
        .unwrap();
    client.batch_execute("CALL spend_backfill()").unwrap();
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    (db, client)
}

fn drain_by_hand(client: &mut Client) -> Vec<(String, String, i64, String)> {
    let mut seen = vec![];
    eventually("DEFAULT is drained", || {
        seen.extend(maintain(client, "\"LiteLLM_SpendLogs\""));
        value::<i64>(client, r#"SELECT count(*) FROM "LiteLLM_SpendLogs_pdefault""#) == 0
    });
    seen
}

#[test]
fn rows_that_leave_default_are_not_computed_again() {
    let (db, mut client) = two_gaps_of_litellms_table(2100);
    let seen = drain_by_hand(&mut client);
    let drained: Vec<_> = seen.iter().filter(|a| a.0 == "drained").collect();
    // A part of a day, the rest of it, and DEFAULT itself.
    assert!(drained.len() >= 3 && drained.iter().any(|a| a.3.contains("became this partition")), "{seen:?}");
    client.batch_execute("SELECT spend_rollup_run(); SELECT spend_rollup_run()").unwrap();
    let log = db.cluster.log();
    assert!(!log.contains("without triggers are captured"), "they are taken for missed: {log}");
    assert_verified(&mut client);
}

#[test]
fn what_was_written_past_capture_before_rows_leave_default_is_counted() {
    let (_db, mut client) = two_gaps_of_litellms_table(2100);
    client
        .batch_execute(
            r#"BEGIN;
               ALTER TABLE "LiteLLM_SpendLogs_pdefault" DISABLE TRIGGER ALL;
               INSERT INTO "LiteLLM_SpendLogs_pdefault" (request_id, call_type, spend, "startTime", "endTime")
               VALUES ('unseen', 'x', 0.5, CURRENT_DATE - interval '12 hours', now());
               ALTER TABLE "LiteLLM_SpendLogs_pdefault" ENABLE TRIGGER ALL;
               COMMIT"#,
        )
        .unwrap();
    drain_by_hand(&mut client);
    for _ in 0..5 {
        client.batch_execute("SELECT spend_rollup_run()").unwrap();
    }
    assert_eq!(value::<i64>(&mut client, REQUESTS), 4201);
    assert_verified(&mut client);
}

#[test]
fn a_long_reader_delays_maintenance_and_nobody_else() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(EVENTS).unwrap();
    client
        .batch_execute(
            "INSERT INTO events (at) SELECT now() - i * interval '1 minute' FROM generate_series(1, 5000) i;
             SELECT spend_partition_set('events', 'day', 1)",
        )
        .unwrap();
    let mut other = db.connect();
    other.batch_execute("SET application_name = 'grafana'").unwrap();
    let mut reader = other.transaction().unwrap();
    reader.batch_execute("SELECT count(*) FROM events").unwrap();
    let pid: i32 = reader.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    let gives_up = r#"could not get a lock on "public"."events" within 400 ms: it is held by process"#;
    let who = format!("process {pid} (postgres, grafana)");
    let mut skipped = 0;
    let mut late_writes = 0;
    let late_reads = beside_readers(&db, "events", || {
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut client = db.connect();
                let mut late = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let began = Instant::now();
                    client.batch_execute("INSERT INTO events (at) VALUES (now())").unwrap();
                    late += usize::from(began.elapsed() > LONG_WAIT);
                }
                late
            });
            let raise = RaiseOnDrop(&stop);
            let began = Instant::now();
            client.batch_execute("SET litellm_spend.lock_timeout = '400ms'").unwrap();
            while began.elapsed() < Duration::from_secs(60) {
                let actions = maintain(&mut client, "events");
                skipped += actions
                    .iter()
                    .filter(|a| a.0 == "skipped" && a.3.starts_with(gives_up) && a.3.contains(&who))
                    .count();
                assert!(actions.iter().filter(|a| a.0 == "skipped").count() <= 1, "{actions:?}");
            }
            drop(raise);
            late_writes = writer.join().unwrap();
        });
    });
    assert!(skipped > 20, "{skipped}");
    // Without the limit each of the tries would keep all of them waiting.
    assert!(late_writes * 4 < skipped, "{late_writes} late writes beside {skipped} tries");
    assert!(late_reads.len() * 4 < skipped, "{late_reads:?} beside {skipped} tries");
    assert!(holds(
        &mut client,
        &format!(
            "SELECT bool_and(last_error IS NULL AND blocked LIKE 'events%: {gives_up}%' AND blocked LIKE '%{who}%' AND now() - blocked_since > '50 seconds')
             FROM spend_partition_status"
        )
    ));
    reader.rollback().unwrap();
    let actions = maintain(&mut client, "events");
    assert!(holds(
        &mut client,
        "SELECT bool_and(blocked IS NULL AND blocked_since IS NULL AND retry_at IS NULL) FROM spend_partition_status"
    ));
    assert!(
        actions.iter().any(|a| a.0 == "drained") && actions.iter().all(|a| a.0 != "skipped"),
        "{actions:?}"
    );
}

const BUSY: &str = "somebody else maintains the table, or has just set another policy";

#[test]
fn of_two_maintainers_one_says_that_it_did_nothing() {
    not_at_midnight();
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(EVENTS).unwrap();
    client.batch_execute("SELECT spend_partition_set('events')").unwrap();
    let mut other = db.connect();
    let mut first = other.transaction().unwrap();
    first.batch_execute("SELECT spend_partition_maintain('events')").unwrap();
    let actions = maintain(&mut client, "events");
    assert_eq!(actions, [("skipped".into(), "events".into(), 0, BUSY.into())]);
    first.commit().unwrap();
    assert_eq!(maintain(&mut client, "events").len(), 1);
    assert_eq!(partitions(&mut client, "events").len(), 9);
}

#[test]
fn bounds_are_the_same_in_every_time_zone() {
    let db = cluster().database();
    let mut client = db.connect();
    let mut found = vec![];
    for (i, (zone, kind)) in [
        ("UTC", "timestamp"),
        ("Asia/Seoul", "timestamp"),
        ("America/Los_Angeles", "timestamptz"),
        ("Pacific/Chatham", "timestamptz"),
        ("Pacific/Chatham", "date"),
    ]
    .iter()
    .enumerate()
    {
        client
            .batch_execute(&format!(
                "SET TimeZone = 'UTC'; CREATE TABLE t{i} (at {kind} NOT NULL) PARTITION BY RANGE (at); CREATE INDEX ON t{i} (at);
                 CREATE TABLE t{i}_pdefault PARTITION OF t{i} DEFAULT;
                 INSERT INTO t{i} SELECT '2026-10-29'::timestamp + d * interval '1 day' + interval '1 minute' FROM generate_series(0, 3) d;
                 SET TimeZone = '{zone}'; SELECT spend_partition_set('t{i}', 'day', 1, '1 day')"
            ))
            .unwrap();
        // The night in which clocks change in America, and the day after.
        let mut actions = maintain_at(&mut client, &format!("t{i}"), "2026-11-01 00:00:30");
        actions.extend(maintain_at(&mut client, &format!("t{i}"), "2026-11-02 09:59"));
        client.batch_execute("SET TimeZone = 'UTC'").unwrap();
        let bounds = format!("{:?}", partitions(&mut client, &format!("t{i}")))
            .replace(" 00:00:00", "")
            .replace("+00", "")
            .replace(&format!("t{i}"), "t");
        let rows: i64 = value(&mut client, &format!("SELECT count(*) FROM t{i}"));
        let gone = actions.iter().filter(|a| a.0 == "deleted" || a.0 == "dropped").map(|a| a.2).sum::<i64>();
        found.push((bounds, rows, gone));
    }
    assert!(found[0].0.contains("t_p20261103"), "{found:?}");
    assert_eq!((found[0].1, found[0].2), (1, 3), "{found:?}");
    assert!(found.iter().all(|f| *f == found[0]), "{found:#?}");
    // The status view says UTC whatever the reader's zone.
    client.batch_execute("SET TimeZone = 'Pacific/Chatham'").unwrap();
    assert!(holds(
        &mut client,
        "SELECT bool_and(range_start = date_trunc('day', range_start)) AND count(*) > 10 FROM spend_partition_status WHERE NOT is_default"
    ));
}

#[test]
fn the_status_says_the_same_bounds_in_every_style_of_dates() {
    let db = cluster().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "SET TimeZone = 'UTC';
             CREATE TABLE t (at timestamptz NOT NULL) PARTITION BY RANGE (at); CREATE INDEX ON t (at);
             CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM ('2026-07-01') TO ('2026-07-02');
             SELECT spend_partition_set('t', 'day', 1, '9 years')",
        )
        .unwrap();
    for (style, zone) in [
        ("SQL, DMY", "Asia/Shanghai"),
        ("German", "Asia/Kolkata"),
        ("Postgres, MDY", "America/New_York"),
        // Its abbreviation is none that can be read.
        ("SQL, MDY", "<XQZ>-03"),
        ("ISO", "Europe/Berlin"),
    ] {
        client.batch_execute(&format!("SET DateStyle = '{style}'; SET TimeZone = '{zone}'")).unwrap();
        let bounds = client.query_one(
            "SELECT to_char(range_start, 'YYYY-MM-DD HH24:MI'), to_char(range_end, 'YYYY-MM-DD HH24:MI'),
                    to_char(expires_at, 'YYYY-MM-DD HH24:MI')
             FROM spend_partition_status WHERE partition = 't_1'::regclass",
            &[],
        );
        let bounds = bounds.unwrap_or_else(|error| panic!("{style}, {zone}: {error:?}"));
        let bounds = [0, 1, 2].map(|i| bounds.get::<_, String>(i));
        assert_eq!(bounds, ["2026-07-01 00:00", "2026-07-02 00:00", "2035-07-02 00:00"], "{style}, {zone}");
    }
}

/// How the policy is stored, and what has been told.
fn set(db: &Database, arguments: &str) -> (String, Vec<String>) {
    let told = db.notices(&format!("SELECT spend_partition_set({arguments})"));
    let policy = "SELECT coalesce((SELECT format('%s %s %s %s %s', \"interval\", precreate, retention, on_expire, time_column)
                                   FROM litellm_spend.policy), 'none')";
    let told = told.lines().map(|line| line.trim_start_matches("NOTICE:  ").to_string()).collect();
    (value(&mut db.connect(), policy), told)
}

#[test]
fn what_is_not_passed_stays_as_it_is_and_what_changes_is_said() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute("CREATE TABLE t (at timestamp NOT NULL)").unwrap();
    let told = |arguments: &str, policy: &str, sentences: &[&str]| {
        let (stored, told) = set(&db, arguments);
        assert_eq!(stored, policy, "{arguments}");
        let told: Vec<_> = told.iter().filter(|told| !told.contains("expired")).collect();
        assert_eq!(told, sentences, "{arguments}");
    };
    let dry = "dry run: nothing was changed";
    told(
        "'t', time_column => 'at', dry_run => true",
        "none",
        &["new policy of \"public\".\"t\": day, 7 ahead, retention none, drop", dry],
    );
    told(
        "'t', 'month', 3, '90 days', 'detach', 'at'",
        "month 3 90 days detach at",
        &["new policy of \"public\".\"t\": month, 3 ahead, retention 90 days, detach"],
    );
    told(
        "'t', on_expire => 'drop'",
        "month 3 90 days drop at",
        &["on_expire of \"public\".\"t\": detach before, drop now"],
    );
    told(
        "'t', 'day', retention => '30 days'",
        "day 3 30 days drop at",
        &[
            "interval of \"public\".\"t\": month before, day now",
            "retention of \"public\".\"t\": 90 days before, 30 days now",
        ],
    );
    told(
        "'t', precreate => 0, retention => '0', dry_run => true",
        "day 3 30 days drop at",
        &[
            "precreate of \"public\".\"t\": 3 before, 0 now",
            "retention of \"public\".\"t\": 30 days before, none now",
            dry,
        ],
    );
    told(
        "'t', retention => '0'",
        "day 3  drop at",
        &["retention of \"public\".\"t\": 30 days before, none now"],
    );
    told(
        "'t'",
        "day 3  drop at",
        &["the policy of \"public\".\"t\" stays as it is: day, 3 ahead, retention none, drop"],
    );
    told(
        "'t', 'none', dry_run => true",
        "day 3  drop at",
        &["the policy of \"public\".\"t\" is forgotten: day, 3 ahead, retention none, drop", dry],
    );
    told(
        "'t', 'none'",
        "none",
        &["the policy of \"public\".\"t\" is forgotten: day, 3 ahead, retention none, drop"],
    );
    told("'t', 'none'", "none", &["\"public\".\"t\" has no policy"]);
    // Also what was not passed must go with what was.
    client
        .batch_execute("SELECT spend_partition_set('t', time_column => 'at', retention => '10 days')")
        .unwrap();
    assert_refused(&mut client, "SELECT spend_partition_set('t', 'month')", "22023");
}

#[test]
fn what_a_retention_lets_go_is_said_before() {
    let db = cluster().database();
    let mut client = db.connect();
    client
        .batch_execute(&format!(
            "{EVENTS}
             CREATE TABLE events_legacy PARTITION OF events FOR VALUES FROM (MINVALUE) TO ('2026-11-01');
             CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM ('2026-11-01') TO ('2026-11-02');
             CREATE TABLE events_2 PARTITION OF events FOR VALUES FROM ('2026-11-02') TO ('2026-11-03');
             CREATE TABLE events_big PARTITION OF events FOR VALUES FROM ('3000-01-01') TO ('4000-01-01');
             INSERT INTO events (at) SELECT '2026-10-01'::timestamp + i / 144 * interval '1 day' FROM generate_series(0, 4751) i"
        ))
        .unwrap();
    // By the distance to now, since the forecast goes by the clock.
    let days = |since: &str| -> i32 {
        value(&mut db.connect(), &format!("SELECT (now() AT TIME ZONE 'UTC')::date - '{since}'::date"))
    };
    let told = |retention: i32, arguments: &str| {
        let (_, told) =
            set(&db, &format!("'events', retention => '{retention} days', dry_run => true {arguments}"));
        told[1..told.len() - 1].to_vec()
    };
    let next = "the next call of spend_partition_maintain()";
    assert_eq!(
        told(days("2026-11-02"), ""),
        [format!("expired partitions: 2, with 4608 rows; {next} drops them")],
        "the old table and a day"
    );
    assert_eq!(
        told(days("2026-11-02"), ", on_expire => 'detach'"),
        [format!("expired partitions: 2, with 4608 rows; {next} moves them to schema litellm_spend_archive")]
    );
    let expires: String = value(
        &mut client,
        &format!("SELECT ('2026-11-01'::timestamp + interval '{} days')::text", days("2026-10-11")),
    );
    assert_eq!(
        told(days("2026-10-11"), ""),
        [format!(
            "expired rows of \"events_legacy\": 1584; from {next} on they are deleted one by one, and its disk space comes back \
             when all of it has expired, at {expires} UTC"
        )]
    );
    let told_of_nothing = told(days("2026-09-30"), "");
    assert!(
        told_of_nothing.len() == 1
            && told_of_nothing[0].starts_with("nothing has expired yet; \"events_legacy\" is the first"),
        "{told_of_nothing:?}"
    );
    // A partition without an end of its own.
    client.batch_execute("INSERT INTO events (at) VALUES ('2026-11-05')").unwrap();
    let rest = format!(
        "expired rows of \"events_pdefault\": 1; from {next} on they are deleted one by one, and new rows use their space again"
    );
    assert!(told(days("2026-11-05"), "").contains(&rest), "{:?}", told(days("2026-11-05"), ""));
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM litellm_spend.policy"), 0);
    // More than are counted.
    client
        .batch_execute(
            "INSERT INTO events (at) SELECT '2026-10-05'::timestamp + i * interval '1 second' FROM generate_series(1, 200000) i;
             ANALYZE events_legacy",
        )
        .unwrap();
    let told = &told(days("2026-10-11"), "")[0];
    let about =
        told.strip_prefix("expired rows of \"events_legacy\": about ").unwrap_or_else(|| panic!("{told}"));
    let rows: i64 = about.split(';').next().unwrap().parse().unwrap();
    assert!((150_000..250_000).contains(&rows), "{told}");
}

#[test]
fn a_time_is_taken_in_the_type_that_it_has_and_without_a_zone_in_utc() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(EVENTS).unwrap();
    client
        .batch_execute(
            "SET TimeZone = 'Pacific/Chatham'; SELECT spend_partition_set('events', precreate => 0)",
        )
        .unwrap();
    for (i, now) in [
        "'2026-12-31'",
        "'2026-12-31 23:59:59.999999'::timestamp",
        "'2026-12-31'::date",
        "'2026-12-31 12:00'::text",
        "'2026-12-31 12:00'::varchar",
        "'2026-12-31 12:00+14'",
        "'2027-01-01 01:00+02'::timestamptz",
    ]
    .iter()
    .enumerate()
    {
        client.batch_execute("BEGIN").unwrap();
        client.batch_execute(&format!("SELECT litellm_spend.maintain_at('events', {now})")).unwrap();
        let found = partitions(&mut client, "events");
        let day = if i == 5 { "2026-12-30" } else { "2026-12-31" };
        assert!(found[1].1.starts_with(&format!("FOR VALUES FROM ('{day}")), "{now}: {found:?}");
        client.batch_execute("ROLLBACK").unwrap();
    }
    client.batch_execute("SELECT litellm_spend.maintain_at('events', now())").unwrap();
    assert_refused(&mut client, "SELECT litellm_spend.maintain_at('events', 20261231)", "42804");
    assert_refused(&mut client, "SELECT litellm_spend.maintain_at('events', NULL)", "22004");
    assert_eq!(
        error(&mut client, "SELECT litellm_spend.maintain_at('events', 'soon')").code().code(),
        "22007"
    );
    for endless in ["'infinity'", "'-infinity'"] {
        assert_refused(
            &mut client,
            &format!("SELECT litellm_spend.maintain_at('events', {endless})"),
            "22023",
        );
    }
    assert!(holds(&mut client, "SELECT last_error IS NULL FROM litellm_spend.policy"));
    // A conversion's cutover likewise.
    for (cutover, expected) in [
        ("current_date + 30", "current_date + 30"),
        ("'2200-01-01'", "'2200-01-01'"),
        ("'2200-01-01 01:00+01'::timestamptz", "'2200-01-01'"),
    ] {
        let sql = format!(
            "SELECT object = quote_literal(({expected})::timestamp) FROM spend_partition_plan(cutover => {cutover}) WHERE step = 'cutover'"
        );
        assert!(holds(&mut client, &sql), "{cutover}");
    }
    client.batch_execute("SELECT spend_partition_plan(cutover => now() + interval '30 days')").unwrap();
    assert_refused(&mut client, "SELECT spend_partition_convert(cutover => now())", "22023");
    assert_refused(&mut client, "SELECT spend_partition_convert(cutover => 7)", "42804");
}

/// A conversion belongs to the table that it began with, whatever that and others are called.
#[test]
fn a_namesake_of_a_table_on_its_way_is_maintained_and_that_table_is_not() {
    let (_db, mut client) = without_worker();
    let skipped = |actions: &[(String, String, i64, String)]| {
        actions.iter().any(|(action, .., detail)| action == "skipped" && detail.contains("being converted"))
    };
    client
        .batch_execute(
            "CREATE TABLE ev (id int PRIMARY KEY, at timestamp NOT NULL); CREATE INDEX ON ev (at);
             SELECT spend_partition_convert('ev', time_column => 'at');
             ALTER TABLE ev RENAME TO ev_old;
             CREATE TABLE ev (id int, at timestamp NOT NULL, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
             SELECT spend_partition_set('ev', precreate => 1, time_column => 'at')",
        )
        .unwrap();
    let actions = maintain(&mut client, "ev");
    assert!(!skipped(&actions), "{actions:?}");
    assert_eq!(actions.iter().filter(|a| a.0 == "created").count(), 2, "{actions:?}");
    // And the other way round.
    client
        .batch_execute(&format!(
            "{EVENTS} SELECT spend_partition_set('events', precreate => 1);
             SELECT spend_partition_revert('events'); ALTER TABLE events RENAME TO moved"
        ))
        .unwrap();
    let actions = maintain(&mut client, "moved");
    assert!(skipped(&actions), "{actions:?}");
}

#[test]
fn a_table_that_is_given_away_on_its_way_is_maintained_by_the_policy_of_the_new_owner() {
    let cluster = own_cluster(&["litellm_spend.maintain_interval = '1s'"]);
    let db = cluster.database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE ROLE heir;
             CREATE TABLE t (id int, at timestamp NOT NULL, PRIMARY KEY (id, at)); CREATE INDEX ON t (at);
             INSERT INTO t VALUES (1, '2020-01-01'), (2, now());
             BEGIN; SELECT spend_partition_convert('t', time_column => 'at'); ALTER TABLE t OWNER TO heir; COMMIT;
             SELECT spend_partition_set('t', retention => '1 year', time_column => 'at')",
        )
        .unwrap();
    eventually("what is old goes", || value::<i64>(&mut client, "SELECT count(*) FROM t") == 1);
    assert!(holds(&mut client, "SELECT count(*) = 1 FROM litellm_spend.conversion"));
}

/// The worker looks at a table whose name one on its way had, and builds its indexes.
#[test]
fn a_namesake_of_a_table_on_its_way_gets_its_partitions_and_indexes_from_the_worker() {
    let db = shared().database();
    let (mut client, mut holder) = (db.connect(), db.connect());
    client.batch_execute(&insert_rows("old", 100, 40)).unwrap();
    // Keeps the swap away.
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE").unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    eventually("it is to be swapped", || {
        holds(&mut client, "SELECT bool_or(step = 'swap' AND state = 'next') FROM spend_partition_convert()")
    });
    client
        .batch_execute(
            r#"ALTER TABLE "LiteLLM_SpendLogs" RENAME TO old;
               CREATE TABLE "LiteLLM_SpendLogs" (LIKE old INCLUDING DEFAULTS, PRIMARY KEY (request_id, "startTime"))
                   PARTITION BY RANGE ("startTime");
               SELECT spend_partition_set(precreate => 1); SELECT spend_index_set(indexes => '{team}', hot => true)"#,
        )
        .unwrap();
    eventually("it has its partitions", || {
        holds(&mut client, "SELECT bool_and(partitions_ahead = 1) FROM spend_partition_status")
    });
    eventually("and its indexes", || {
        holds(&mut client, "SELECT count(*) > 0 AND bool_and(state = 'built') FROM spend_index_status")
    });
    holder.batch_execute("ROLLBACK").unwrap();
}

#[test]
fn bad_input_is_refused_with_a_reason() {
    let db = cluster().database();
    let mut client = db.connect();
    client
        .batch_execute(
            "CREATE TABLE by_list (at timestamp, k int) PARTITION BY LIST (k);
             CREATE TABLE by_hash (at timestamp, k int) PARTITION BY HASH (at);
             CREATE TABLE by_two (at timestamp, k int) PARTITION BY RANGE (at, k);
             CREATE TABLE by_expression (at timestamp) PARTITION BY RANGE (date_trunc('day', at));
             CREATE TABLE by_number (at timestamp, k int) PARTITION BY RANGE (k);
             CREATE TABLE nested (at timestamp) PARTITION BY RANGE (at);
             CREATE TABLE nested_part PARTITION OF nested FOR VALUES FROM ('2026-01-01') TO ('2027-01-01') PARTITION BY RANGE (at);
             CREATE VIEW a_view AS SELECT now() AS at; CREATE ROLE stranger; GRANT USAGE ON SCHEMA public TO stranger;
             GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO stranger",
        )
        .unwrap();
    for (arguments, state) in [
        ("NULL, 'hour'", "22023"),
        ("NULL, 'day', -1", "22023"),
        ("NULL, 'day', 100000", "22023"),
        ("NULL, 'day', 7, '-3 days'", "22023"),
        ("NULL, 'week', 7, '6 days'", "22023"),
        ("NULL, 'day', 7, '1 mon -29 days'", "22023"),
        ("NULL, 'day', 7, '-1 mon 40 days'", "22023"),
        ("NULL, 'day', 7, '40 days -00:00:01'", "22023"),
        ("NULL, 'day', 7, '3 days', 'burn'", "22023"),
        ("NULL, 'day', 7, '3 days', 'drop', 'nothing'", "42703"),
        ("NULL, 'day', 7, '3 days', 'drop', 'spend'", "42804"),
        ("'by_list'", "42809"),
        ("'by_hash'", "42809"),
        ("'by_two'", "42809"),
        ("'by_expression'", "42809"),
        ("'by_number', time_column => 'at'", "42809"),
        ("'by_number'", "42804"),
        ("'nested_part'", "42809"),
        ("'a_view'", "42809"),
    ] {
        assert_refused(&mut client, &format!("SELECT spend_partition_set({arguments})"), state);
    }
    let refused = error(&mut client, "SELECT spend_partition_set(retention => '90')");
    assert_eq!(
        refused.message(),
        "retention \"00:01:30\" is shorter than one day, longer than 1000 years, or negative in part"
    );
    assert_eq!(refused.hint(), Some("A number alone is seconds: write '90 days'."));
    client.batch_execute("SELECT spend_partition_set(NULL, 'none')").unwrap(); // nothing to forget
    assert_refused(&mut client, "SELECT spend_partition_maintain()", "42704");
    assert_refused(&mut client, "BEGIN READ ONLY; SELECT spend_partition_maintain()", "25006");
    client.batch_execute("ROLLBACK; SET ROLE stranger").unwrap();
    assert_refused(&mut client, "SELECT spend_partition_set()", "42501");
    assert_refused(&mut client, "SELECT spend_partition_maintain()", "42501");
    client.batch_execute("RESET ROLE").unwrap();
    // What turns up later is skipped, and the rest is done.
    client
        .batch_execute(
            "SELECT spend_partition_set('nested', 'month', 0, '1 month');
             CREATE TABLE nested_leaf PARTITION OF nested_part DEFAULT; INSERT INTO nested VALUES ('2026-05-05')",
        )
        .unwrap();
    let actions = maintain_at(&mut client, "nested", "2027-03-05");
    assert!(actions.iter().any(|a| a.0 == "skipped" && a.1 == "nested_part"), "{actions:?}");
    assert!(actions.iter().any(|a| a.0 == "created" && a.1 == "nested_p20270301"), "{actions:?}");
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM nested"), 1);
    client.batch_execute("DROP OWNED BY stranger; DROP ROLE stranger").unwrap();
}

#[test]
fn litellms_own_job_may_run_at_the_same_time() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    client
        .batch_execute("SELECT spend_attach(); SELECT spend_partition_set(NULL, 'day', 7, '3 days')")
        .unwrap();
    wait_until_live(&mut client);
    let job = |client: &mut Client| {
        for day in 0..8 {
            // It logs what fails.
            let _ = client.batch_execute(&format!(
                "BEGIN; SET LOCAL ROLE litellm; SET LOCAL lock_timeout = 3000; {} COMMIT",
                partition_by_litellms_job(day)
            ));
            let _ = client.batch_execute("ROLLBACK");
        }
        let _ = client.batch_execute("DO $$ BEGIN EXECUTE format('DROP TABLE IF EXISTS \"LiteLLM_SpendLogs_p%s\"', to_char(CURRENT_DATE - 5, 'YYYYMMDD')); END $$");
    };
    beside_writers(&db, 2, 5, 2, || {
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut client = db.connect();
                    (0..5).for_each(|_| job(&mut client));
                });
            }
            for _ in 0..10 {
                maintain(&mut client, "\"LiteLLM_SpendLogs\"");
            }
        });
        let mut last = vec![];
        eventually("all is as it should be", || {
            last = maintain(&mut client, "\"LiteLLM_SpendLogs\"");
            last.len() == 1 && last[0].3.ends_with("7 periods ahead")
        });
    });
    wait_until_live(&mut client);
    eventually("every partition is captured", || client.query(VERIFY_ALL, &[]).unwrap().is_empty());
    assert_eq!(capture_errors(&mut client), 0);
    assert_eq!(
        value::<i64>(
            &mut client,
            r#"SELECT count(*) - (SELECT sum(requests) FROM litellm_spend.daily_spend)::bigint FROM "LiteLLM_SpendLogs""#
        ),
        0
    );
}

// ---- another owner ---------------------------------------------------------------------------------------

/// `tenant` owns `events` with 5,000 old rows in DEFAULT, and an index on its own function, which notes as
/// whom it runs.
fn events_of_a_tenant(client: &mut Client, tenant: &str) {
    client
        .batch_execute(&format!(
            "CREATE ROLE {tenant}; GRANT CREATE ON SCHEMA public TO {tenant};
             CREATE TABLE ran (who text, super boolean); GRANT ALL ON ran TO PUBLIC; SET ROLE {tenant}; {EVENTS}
             ALTER TABLE events_pdefault SET (autovacuum_enabled = off);
             INSERT INTO events (at) SELECT '2026-11-01'::timestamp + i * interval '1 minute' FROM generate_series(1, 5000) AS i;
             CREATE FUNCTION note() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
                 INSERT INTO public.ran SELECT current_user, rolsuper FROM pg_roles WHERE rolname = current_user;
                 RETURN true;
             END $$;
             CREATE FUNCTION spy() RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RETURN public.note(); END $$;
             CREATE INDEX ON events ((public.spy())); RESET ROLE; TRUNCATE ran"
        ))
        .unwrap();
}

const RAN_AS_A_SUPERUSER: &str = "SELECT coalesce(bool_or(super), false) FROM ran";

fn drop_tenant(client: &mut Client, tenant: &str) {
    let sql = format!("DROP TABLE events; DROP OWNED BY {tenant} CASCADE; DROP ROLE {tenant}");
    client.batch_execute(&sql).unwrap();
}

#[test]
fn a_table_that_gets_another_owner_while_a_step_waits_for_it_is_left_alone() {
    let cluster =
        own_cluster(&["litellm_spend.maintain_interval = '1s'", "litellm_spend.lock_timeout = '60s'"]);
    let db = cluster.database();
    let (mut client, mut dba) = (db.connect(), db.connect());
    events_of_a_tenant(&mut client, "tenant");
    // DEFAULT is to become a partition, which takes a stronger lock than the look at it before. Who reads the
    // table already gets the lock for ALTER TABLE before who waits for the reader.
    dba.batch_execute("BEGIN; LOCK TABLE ONLY events IN ACCESS SHARE MODE").unwrap();
    client.batch_execute("SELECT spend_partition_set('events', precreate => 0)").unwrap();
    let waits = "SELECT bool_or(wait_event_type = 'Lock') FROM pg_stat_activity
                 WHERE backend_type = 'litellm_spend worker' AND datname = current_database()";
    eventually("the worker waits", || holds(&mut client, waits));
    client.batch_execute("TRUNCATE ran").unwrap();
    dba.batch_execute(
        "ALTER TABLE events OWNER TO postgres; ALTER TABLE events_pdefault OWNER TO postgres; COMMIT",
    )
    .unwrap();
    let noted = "SELECT last_error IS NOT NULL FROM litellm_spend.policy";
    eventually("the step is over", || holds(&mut client, noted));
    assert!(!holds(&mut client, RAN_AS_A_SUPERUSER), "the former owner's code");
    let names: Vec<String> = partitions(&mut client, "events").into_iter().map(|p| p.0).collect();
    assert_eq!(names, ["events_pdefault"]);
    drop_tenant(&mut client, "tenant");
}

#[test]
fn what_a_retention_lets_go_is_not_looked_for_in_a_table_that_got_another_owner() {
    let db = cluster().database();
    let (mut client, mut dba) = (db.connect(), db.connect());
    events_of_a_tenant(&mut client, "asker");
    client.batch_execute("SELECT spend_partition_set('events'); TRUNCATE ran").unwrap();
    // Whoever has the policy's row holds up the call, which has looked at the caller's rights by then.
    client.batch_execute("BEGIN; SELECT FROM litellm_spend.policy FOR UPDATE").unwrap();
    let refused =
        error_after_waiting(&db, "SELECT spend_partition_set('events', retention => '1 day')", |_, _| {
            dba.batch_execute(
                "ALTER TABLE events OWNER TO postgres; ALTER TABLE events_pdefault OWNER TO postgres",
            )
            .unwrap();
            client.batch_execute("COMMIT").unwrap();
        });
    assert!(!holds(&mut dba, RAN_AS_A_SUPERUSER), "the former owner's code");
    assert_eq!(refused.expect("it is refused").code().code(), "42501");
    drop_tenant(&mut dba, "asker");
}

// ---- by itself ----------------------------------------------------------------------------------------

#[test]
fn the_worker_maintains_and_goes_on_after_a_crash() {
    let cluster = own_cluster(&["litellm_spend.maintain_interval = '1s'"]);
    let db = cluster.database();
    let mut client = db.connect();
    attach(&mut client);
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    wait_until_capture_follows(&mut client);
    // Two gaps with many rows each, so that rows have to move.
    client.batch_execute(&day_partition("middle", -6)).unwrap();
    (0..10).for_each(|i| client.batch_execute(&insert_rows(&format!("old{i}-"), 5000, 12)).unwrap());
    let total: i64 = value(&mut client, r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#);
    client.batch_execute("SELECT spend_partition_set()").unwrap();
    let in_default = r#"SELECT count(*) FROM "LiteLLM_SpendLogs_pdefault""#;
    for _ in 0..3 {
        let mut client = db.connect();
        let before: i64 = value(&mut client, in_default);
        eventually("rows move, or have moved", || {
            before == 0 || value::<i64>(&mut client, in_default) < before
        });
        drop(client);
        cluster.crash_and_restart();
    }
    let mut client = db.connect();
    assert_eq!(value::<i64>(&mut client, r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#), total);
    // No half-made table, nor a constraint of ours, is left.
    assert!(holds(
        &mut client,
        r#"SELECT count(*) = 0 FROM pg_class WHERE relname LIKE 'LiteLLM_SpendLogs_p2%' AND relkind = 'r' AND NOT relispartition"#
    ));
    assert!(holds(&mut client, "SELECT count(*) = 0 FROM pg_constraint WHERE conname LIKE 'litellm_spend%'"));
    eventually("DEFAULT is drained", || {
        value::<i64>(&mut client, r#"SELECT count(*) FROM "LiteLLM_SpendLogs_pdefault""#) == 0
            && holds(&mut client, "SELECT bool_and(partitions_ahead = 7) FROM spend_partition_status")
    });
    assert_eq!(value::<i64>(&mut client, r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#), total);
    assert_eq!(value::<i64>(&mut client, REQUESTS), total);
    assert_verified(&mut client);
    // Somebody else's lock is no error, and is not waited for.
    let mut other = db.connect();
    let mut holder = other.transaction().unwrap();
    holder.batch_execute("SELECT spend_partition_maintain()").unwrap();
    // The time of three rounds of the worker: one that finds the lock leaves no trace to wait for.
    std::thread::sleep(Duration::from_secs(3));
    holder.rollback().unwrap();
    assert!(
        !cluster.log().contains("somebody else maintains"),
        "a line for each look: {}",
        cluster.log_tail()
    );
    assert!(holds(
        &mut client,
        "SELECT bool_and(last_error IS NULL AND last_maintained_at IS NOT NULL) FROM spend_partition_status"
    ));
    drop((client, other));
    drop(db);
    // SAFETY of the leak: the watchdog ends the server with the test binary.
}

/// A table with two expired partitions, `…_1` and `…_2`. Nothing is made ahead.
fn expired_twice(client: &mut Client, table: &str) {
    client
        .batch_execute(&format!(
            "CREATE TABLE {table} (id bigserial, at timestamp NOT NULL) PARTITION BY RANGE (at);
             CREATE TABLE {table}_1 PARTITION OF {table} FOR VALUES FROM ('2026-01-01') TO ('2026-01-02');
             CREATE TABLE {table}_2 PARTITION OF {table} FOR VALUES FROM ('2026-01-02') TO ('2026-01-03');
             INSERT INTO {table} (at) VALUES ('2026-01-01'), ('2026-01-02')"
        ))
        .unwrap();
}

fn left(client: &mut Client, table: &str) -> Vec<String> {
    let sql = format!(
        "SELECT relname::text FROM pg_class JOIN pg_inherits ON inhrelid = oid
         WHERE inhparent = '{table}'::regclass AND relname IN ('{table}_1', '{table}_2') ORDER BY 1"
    );
    client.query(&sql, &[]).unwrap().iter().map(|r| r.get(0)).collect()
}

/// While it runs the worker waits in its round for a reader of this partition. The round of that table goes
/// on afterwards, and then come the other tables that are due.
fn while_the_worker_waits_for(db: &Database, partition: &str, start: &str, body: impl FnOnce(&mut Client)) {
    let (mut client, mut reader) = (db.connect(), db.connect());
    reader.batch_execute(&format!("BEGIN; LOCK TABLE {partition} IN ACCESS SHARE MODE")).unwrap();
    client.batch_execute(start).unwrap();
    let waits = "SELECT bool_or(wait_event_type = 'Lock') FROM pg_stat_activity
                 WHERE backend_type = 'litellm_spend worker' AND datname = current_database()";
    eventually("the worker waits", || holds(&mut client, waits));
    body(&mut client);
    reader.batch_execute("COMMIT").unwrap();
}

#[test]
fn what_is_set_while_a_round_is_under_way_holds_for_its_next_step() {
    let cluster =
        own_cluster(&["litellm_spend.maintain_interval = '1h'", "litellm_spend.lock_timeout = '60s'"]);
    let db = cluster.database();
    let mut client = db.connect();
    for table in ["a", "b", "c"] {
        expired_twice(&mut client, table);
    }
    let set = |table: &str| {
        format!("SELECT spend_partition_set('{table}', precreate => 0, retention => '30 days');")
    };
    let all = ["BEGIN;".to_string(), set("a"), set("b"), set("c"), "COMMIT".into()].concat();
    while_the_worker_waits_for(&db, "a_1", &all, |client| {
        client
            .batch_execute(
                "SELECT spend_partition_set('b', retention => '0');
                 SELECT spend_partition_set('c', on_expire => 'detach')",
            )
            .unwrap();
    });
    let maintained = "SELECT bool_and(last_maintained_at IS NOT NULL) FROM spend_partition_status";
    eventually("each has had its round", || holds(&mut client, maintained));
    assert!(left(&mut client, "a").is_empty());
    assert_eq!(left(&mut client, "b"), ["b_1", "b_2"]);
    assert!(left(&mut client, "c").is_empty());
    assert!(holds(
        &mut client,
        "SELECT count(*) = 2 AND bool_and(relnamespace::regnamespace::text = 'litellm_spend_archive')
         FROM pg_class WHERE relname IN ('c_1', 'c_2')"
    ));
}

#[test]
fn an_interval_of_zero_ends_the_round_that_is_under_way() {
    let cluster =
        own_cluster(&["litellm_spend.maintain_interval = '1h'", "litellm_spend.lock_timeout = '60s'"]);
    let db = cluster.database();
    let mut client = db.connect();
    expired_twice(&mut client, "events");
    let set = "SELECT spend_partition_set('events', precreate => 0, retention => '30 days')";
    let reload = |client: &mut Client, sql: &str| {
        client.batch_execute(sql).unwrap();
        client.batch_execute("SELECT pg_reload_conf()").unwrap();
    };
    while_the_worker_waits_for(&db, "events_1", set, |client| {
        reload(client, "ALTER SYSTEM SET litellm_spend.maintain_interval = 0");
        // The signal goes through the postmaster.
        std::thread::sleep(Duration::from_millis(500));
    });
    let gone = "SELECT to_regclass('events_1') IS NULL";
    eventually("the step that was under way ends", || holds(&mut client, gone));
    wait_for_a_round(&mut client);
    assert_eq!(left(&mut client, "events"), ["events_2"]);
    // The next one does not wait for the interval.
    reload(&mut client, "ALTER SYSTEM RESET litellm_spend.maintain_interval");
    eventually("the rest goes", || left(&mut client, "events").is_empty());
}

/// A table with two expired partitions. Whoever looks at the older one first waits for so many seconds, but
/// not in a session with this setting.
fn slow_to_count(client: &mut Client, seconds: u32) {
    client
        .batch_execute(&format!(
            "SET test.is_fast = on;
             {WITHOUT_DEFAULT}
             CREATE TABLE older PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2026-01-02')
                 WITH (autovacuum_enabled = off);
             CREATE TABLE newer PARTITION OF events FOR VALUES FROM ('2026-01-02') TO ('2026-01-03');
             INSERT INTO events (at) VALUES ('2026-01-01'), ('2026-01-02');
             CREATE FUNCTION fast(seconds int) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN
                 IF current_setting('test.is_fast', true) IS NULL THEN PERFORM pg_sleep(seconds); END IF;
                 RETURN true;
             END $$;
             CREATE INDEX ON older (id) WHERE fast({seconds})"
        ))
        .unwrap();
}

#[test]
fn what_takes_too_long_for_the_worker_keeps_no_other_step_and_is_tried_again() {
    let cluster = own_cluster(&["litellm_spend.maintain_interval = '1s'"]);
    let db = cluster.database();
    let mut client = db.connect();
    slow_to_count(&mut client, 3600);
    client.batch_execute("SELECT spend_partition_set('events', 'day', 2, '30 days')").unwrap();
    let set = Instant::now();
    // Neither its count nor ANALYZE, which looks at it too, comes to an end.
    let there = |client: &mut Client| {
        let sql = "SELECT array_agg(inhrelid::regclass::text) FROM pg_inherits WHERE inhparent = 'events'::regclass";
        let names: Vec<String> = value(client, sql);
        (names.contains(&"older".into()), names.contains(&"newer".into()), names.len())
    };
    eventually("the others go on", || {
        there(&mut client) == (true, false, 4) || set.elapsed() > Duration::from_secs(100)
    });
    assert_eq!(there(&mut client), (true, false, 4));
    let error: String = value(&mut client, "SELECT last_error FROM spend_partition_status LIMIT 1");
    assert_eq!(error, "older: failed or took too long; see the server's log");
    let log = cluster.log();
    for subject in ["maintenance of older", "statistics of events"] {
        assert!(log.contains(&format!("{subject} failed, next try in 40s: it took longer")), "{log}");
    }
    client
        .batch_execute(
            "CREATE OR REPLACE FUNCTION fast(seconds int) RETURNS boolean IMMUTABLE LANGUAGE sql AS 'SELECT true'",
        )
        .unwrap();
    let done = "SELECT bool_and(last_error IS NULL) AND (SELECT reltuples >= 0 FROM pg_class WHERE oid = 'events'::regclass)
                FROM spend_partition_status";
    eventually("it is done, too", || there(&mut client) == (false, false, 3) && holds(&mut client, done));
}

#[test]
fn a_call_from_within_a_step_ends_with_the_time_of_that() {
    let cluster = own_cluster(&[]);
    let db = cluster.database();
    let mut client = db.connect();
    slow_to_count(&mut client, 3600);
    let outer = WITHOUT_DEFAULT.replace("events", "outer_events");
    client
        .batch_execute(&format!(
            "{outer} CREATE TABLE outer_part PARTITION OF outer_events FOR VALUES FROM ('2026-01-01') TO ('2026-01-02')
                 WITH (autovacuum_enabled = off);
             CREATE FUNCTION calls() RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN
                 IF current_setting('test.is_fast', true) IS NULL THEN
                     PERFORM public.spend_partition_maintain('public.events');
                 END IF;
                 RETURN true;
             END $$;
             CREATE INDEX ON outer_part (id) WHERE calls();
             SELECT spend_partition_set('events', retention => '30 days'); SELECT spend_partition_set('outer_events')"
        ))
        .unwrap();
    let failed =
        |subject: &str| format!("{subject} failed, next try in 40s: it took longer than a step may take");
    // Of a worker that was in the way when the database was made.
    let terminated = |log: &str| log.matches("terminating").count();
    let before = terminated(&cluster.log());
    eventually("it is cancelled", || {
        let log = cluster.log();
        assert!(terminated(&log) == before, "it went on: {}", cluster.log_tail());
        log.contains(&failed("statistics of outer_events"))
    });
}

#[test]
fn a_round_of_a_clock_that_was_ahead_is_not_waited_for() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(&format!("{EVENTS} SELECT spend_partition_set('events')")).unwrap();
    let maintained = "SELECT maintained_at <= clock_timestamp() FROM litellm_spend.policy";
    eventually("it is maintained", || holds(&mut client, maintained));
    client
        .batch_execute("UPDATE litellm_spend.policy SET maintained_at = now() + interval '1 year'")
        .unwrap();
    eventually("it is maintained again", || holds(&mut client, maintained));
}

#[test]
fn a_call_may_take_longer_for_a_step_than_others_would_wait() {
    let db = cluster().database();
    let mut client = db.connect();
    slow_to_count(&mut client, 61);
    client
        .batch_execute("SELECT spend_partition_set('events', 'day', 2, '30 days'); ANALYZE events")
        .unwrap();
    let actions = maintain(&mut db.connect(), "events");
    assert_eq!(expired(&actions), ["older", "newer"], "{actions:?}");
    assert!(actions.iter().all(|a| a.0 != "skipped"), "{actions:?}");
}

#[test]
fn pg_cron_maintains() {
    if !Path::new(&pkglibdir()).join("pg_cron.so").exists() {
        // scripts/setup installs it with PostgreSQL 15, so there it must be.
        let version = pg_config("--version");
        assert!(!version.starts_with("PostgreSQL 15."), "no pg_cron for {version}: run scripts/setup");
        eprintln!("SKIPPED pg_cron_maintains: no pg_cron for {version}");
        return;
    }
    not_at_midnight();
    let cluster = own_cluster(&[
        BY_HAND,
        "shared_preload_libraries = 'pg_cron,litellm_spend'",
        "cron.database_name = 'cron_test'",
        "cron.use_background_workers = on",
    ]);
    let mut admin = cluster.connect("postgres");
    admin.batch_execute("CREATE DATABASE cron_test TEMPLATE litellm_template").unwrap();
    let mut client = cluster.connect("cron_test");
    client.batch_execute("CREATE EXTENSION pg_cron; CREATE EXTENSION litellm_spend").unwrap();
    client.batch_execute(UPSTREAM_SCRIPT).unwrap();
    client
        .batch_execute("SELECT spend_partition_set(); SELECT cron.schedule('maintain', '* * * * *', 'SELECT spend_partition_maintain()')")
        .unwrap();
    let began = Instant::now();
    let done = "SELECT EXISTS (SELECT FROM cron.job_run_details WHERE status = 'succeeded')";
    while !holds(&mut client, done) {
        assert!(began.elapsed() < Duration::from_secs(150), "pg_cron ran nothing: {}", cluster.log_tail());
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(partitions(&mut client, "\"LiteLLM_SpendLogs\"").len(), 9);
    assert!(holds(
        &mut client,
        "SELECT bool_and(last_maintained_at IS NOT NULL AND last_error IS NULL) FROM spend_partition_status"
    ));
}

fn pkglibdir() -> String {
    pg_config("--pkglibdir")
}

#[test]
fn rows_that_a_rule_keeps_in_default_are_not_said_to_have_moved() {
    let db = cluster().database();
    let mut client = db.connect();
    client.batch_execute(EVENTS).unwrap();
    client
        .batch_execute(
            "INSERT INTO events (at) SELECT '2026-01-05'::timestamp + i * interval '1 minute' FROM generate_series(1, 50) AS i;
             CREATE RULE soft AS ON DELETE TO events_pdefault DO INSTEAD
                 UPDATE events_pdefault SET note = 'deleted' WHERE id = OLD.id AND at = OLD.at RETURNING events_pdefault.*;
             SELECT spend_partition_set('events', 'day', time_column => 'at')",
        )
        .unwrap();
    let actions = maintain_at(&mut client, "events", "2026-01-08");
    let said = "keeps rows that are to move to another partition";
    assert!(
        actions.iter().any(|(action, .., detail)| action == "skipped" && detail.contains(said)),
        "{actions:?}"
    );
    let rows =
        "SELECT count(*), count(note), (SELECT count(*) FROM events WHERE at < '2026-01-06') FROM events";
    let row = client.query_one(rows, &[]).unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, i64>(2)), (50, 0, 50));
    // And without the rule they move.
    client.batch_execute("DROP RULE soft ON events_pdefault").unwrap();
    maintain_at(&mut client, "events", "2026-01-08");
    let row = "SELECT (SELECT count(*) = 0 FROM ONLY events_pdefault) AND (SELECT count(*) = 50 FROM events)";
    assert!(holds(&mut client, row));
}

/// An owner who keeps the sequence of a source to himself stops nobody else.
#[test]
fn a_look_that_an_owner_keeps_from_succeeding_delays_no_other_owners_maintenance() {
    // What autovacuum does would have the worker look.
    let db = own_cluster(&["autovacuum = off"]).database();
    let (mut client, mut owner) = (db.connect(), db.connect());
    client
        .batch_execute(
            "CREATE TABLE events (at timestamptz NOT NULL) PARTITION BY RANGE (at);
             SELECT spend_partition_set('events', 'day');
             CREATE TABLE page_views (id bigserial, x int);
             SELECT spend_rollup_create('views', 'page_views', '{x}', '{count(*) AS n}')",
        )
        .unwrap();
    let maintained = "SELECT maintained_at IS NOT NULL FROM litellm_spend.policy";
    eventually("it is maintained", || holds(&mut client, maintained));
    owner.batch_execute("BEGIN; ALTER SEQUENCE page_views_id_seq RESTART 1").unwrap();
    let failed = format!("in database \"{}\": everything is looked at: the look for news failed", db.name);
    eventually("the looks fail", || db.cluster.log().contains(&failed));
    for _ in 0..2 {
        // There is no event to wait for: what was done until now is noticed.
        std::thread::sleep(Duration::from_secs(3));
        client.batch_execute("UPDATE litellm_spend.policy SET maintained_at = NULL").unwrap();
        let due = Instant::now();
        eventually("it is maintained", || holds(&mut client, maintained));
        assert!(due.elapsed() < Duration::from_secs(20), "{:?}", due.elapsed());
    }
    owner.batch_execute("COMMIT").unwrap();
    assert_eq!(db.cluster.log().matches(&failed).count(), 1);
}

//! What is said when something goes wrong, and where: to the caller, in the status, in spend_health, in the
//! server's log.

mod common;

use common::*;
use postgres::Client;

/// SQLSTATE, message, DETAIL and HINT, each as it begins; `…` stands for anything.
#[track_caller]
fn assert_says(client: &mut Client, sql: &str, expected: [&str; 4]) {
    let error = error(client, sql);
    let said =
        [error.code().code(), error.message(), error.detail().unwrap_or(""), error.hint().unwrap_or("")];
    for (said, expected) in said.into_iter().zip(expected) {
        assert!(like(said, expected), "{sql}: {said:?}, not {expected:?}");
    }
}

fn like(said: &str, expected: &str) -> bool {
    let mut rest = said;
    expected.split('…').enumerate().all(|(i, part)| match rest.find(part) {
        Some(at) if i > 0 || at == 0 => {
            rest = &rest[at + part.len()..];
            true
        }
        _ => false,
    })
}

fn wait_for_log(db: &Database, text: &str) {
    eventually(text, || db.cluster.log().contains(text));
}

const PAGE_VIEWS: &str = "CREATE TABLE ev (id bigserial PRIMARY KEY, kind int, bytes int);
     SELECT spend_rollup_create('by_kind', 'ev', '{kind}', '{count(*) AS n}');
     INSERT INTO ev (kind) SELECT i % 3 FROM generate_series(1, 100) AS i";

const PARTITIONED: &str =
    "CREATE TABLE t (id bigint, at timestamp, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
     CREATE INDEX ON t (at); CREATE TABLE t_1 PARTITION OF t DEFAULT;";

#[test]
fn a_failure_is_in_the_status_in_health_and_in_the_log_with_what_to_do() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(PAGE_VIEWS).unwrap();
    eventually("it is merged", || holds(&mut client, "SELECT watermark = 100 FROM spend_rollup_status"));
    client.batch_execute("SELECT setval('ev_id_seq', 10)").unwrap();
    eventually("the status says so", || {
        holds(
            &mut client,
            "SELECT last_error = E'sequence public.ev_id_seq was set back'
                 '\nDETAIL:  Its last value is 10, but values up to 100 have been merged. The rollup is stopped; nothing is lost.'
                 '\nHINT:  SELECT setval(''public.ev_id_seq'', 100) lets it go on; spend_rollup_rebuild() then counts the rows that were numbered meanwhile.'
             FROM spend_rollup_status",
        )
    });
    let health = client.query_one("SELECT problem, caused_by, remedy FROM spend_health", &[]).unwrap();
    let said = [health.get::<_, String>(0), health.get(1), health.get(2)];
    assert_eq!(said[0], "rollup by_kind: sequence public.ev_id_seq was set back");
    assert!(said[1].starts_with("Its last value is 10"), "{said:?}");
    assert!(said[2].starts_with("SELECT setval('public.ev_id_seq', 100)"), "{said:?}");
    let name = &db.name;
    wait_for_log(&db, &format!("litellm_spend in database \"{name}\": merge of rollup by_kind failed"));
    let log = db.cluster.log();
    let line = log.lines().skip_while(|l| !l.contains(&format!("\"{name}\": merge of rollup"))).take(3);
    let lines = line.collect::<Vec<_>>().join("\n");
    assert!(
        like(
            &lines,
            "…failed, next try in …: sequence public.ev_id_seq was set back…DETAIL:…HINT:  SELECT setval"
        ),
        "{lines}"
    );
}

#[test]
fn what_a_stranger_s_code_raises_is_no_advice() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r"CREATE FUNCTION evil(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS
                  $$ BEGIN IF $1 > 0 THEN RAISE E'no\nHINT:  DROP TABLE x' USING HINT = 'DROP TABLE y'; END IF; RETURN $1; END $$;
              CREATE TABLE ev (id bigserial PRIMARY KEY, kind int);
              SELECT spend_rollup_create('by_kind', 'ev', '{evil(kind) AS kind}', '{count(*) AS n}');
              INSERT INTO ev (kind) VALUES (1)",
        )
        .unwrap();
    let sql = "SELECT coalesce((SELECT remedy LIKE 'it is tried again by itself;%' AND problem LIKE '%no HINT:  DROP TABLE x%' FROM spend_health), false)";
    eventually("health says so", || holds(&mut client, sql));
}

#[test]
fn what_matters_once_is_in_the_log_once() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 100, 5)).unwrap();
    client.batch_execute("SELECT spend_attach(); SELECT spend_attach()").unwrap();
    wait_until_live(&mut client);
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_converted(&mut client);
    eventually("its partitions are there", || {
        holds(&mut client, "SELECT bool_and(partitions_ahead = precreate) FROM spend_partition_status")
    });
    client.batch_execute("SELECT spend_detach()").unwrap();
    let begin = format!("litellm_spend in database \"{}\": ", db.name);
    let log = db.cluster.log();
    let said: Vec<&str> =
        log.lines().filter_map(|line| line.split_once(&begin)).map(|(_, text)| text).collect();
    for text in [
        r#""public"."LiteLLM_SpendLogs" is captured from now on"#,
        "all days are covered: the backfill is complete",
        r#""public"."MonthlyGlobalSpend" reads the rollups from now on"#,
        r#""public"."LiteLLM_SpendLogs" is partitioned"#,
        r#""public"."LiteLLM_SpendLogs": no longer captured"#,
    ] {
        assert_eq!(said.iter().filter(|line| **line == text).count(), 1, "{text}: {said:#?}");
    }
    // What was taken back has not happened.
    client.batch_execute("BEGIN; SELECT spend_attach(); ROLLBACK").unwrap();
    let text = r#""public"."LiteLLM_SpendLogs" is captured from now on"#;
    assert_eq!(db.cluster.log().matches(&format!("{begin}{text}")).count(), 1);
}

#[test]
fn a_measure_that_computes_with_aggregates_is_two() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(PAGE_VIEWS).unwrap();
    assert_says(
        &mut client,
        "SELECT spend_rollup_create('r', 'ev', '{kind}', '{sum(bytes)/count(*) AS c}')",
        [
            "42611",
            "measure \"sum(bytes)/count(*) AS c\" cannot be used",
            "It computes with aggregates; a measure is one aggregate.",
            "Keep each aggregate as a measure of its own, as in …",
        ],
    );
}

#[test]
fn what_reads_a_rollup_is_named_and_stays_when_that_is_to_be_dropped() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(PAGE_VIEWS).unwrap();
    client
        .batch_execute(
            "CREATE VIEW of_kind AS SELECT * FROM litellm_spend.by_kind;
             CREATE VIEW of_days AS SELECT * FROM litellm_spend.daily_spend",
        )
        .unwrap();
    for (call, view) in
        [("spend_rollup_drop('by_kind')", "of_kind"), ("spend_detach(drop_history => true)", "of_days")]
    {
        assert_says(
            &mut client,
            &format!("SELECT {call}"),
            [
                "2BP01",
                "cannot drop view litellm_spend.…",
                &format!("view public.{view} depends on view litellm_spend.…"),
                "Drop what depends on it first; nothing of anybody else's is dropped with it.",
            ],
        );
        client.batch_execute(&format!("SELECT * FROM {view}")).unwrap();
    }
    client.batch_execute("DROP VIEW of_kind, of_days; SELECT spend_rollup_drop('by_kind')").unwrap();
}

#[test]
fn who_attaches_in_a_transaction_is_told_that_writers_wait() {
    let db = shared().database();
    let told = "NOTICE:  who writes to \"public\".\"LiteLLM_SpendLogs\" waits until this transaction ends\nHINT:  COMMIT;";
    let in_transaction = |sql: &str| db.notices(&format!("BEGIN; SELECT spend_attach(); {sql}"));
    assert!(!db.notices("SELECT spend_attach()").contains("waits until"), "alone");
    let mut client = db.connect();
    client.batch_execute("SELECT spend_detach()").unwrap();
    assert!(in_transaction("COMMIT").contains(told), "in a transaction");
    assert!(!in_transaction("COMMIT").contains("waits until"), "when nothing is to be done");
    let action = "SELECT action FROM spend_attach() WHERE object LIKE 'functions%'";
    assert_eq!(value::<String>(&mut client, action), "already there");
}

#[test]
fn a_lock_that_is_not_to_be_had_names_who_has_it_and_the_right_setting() {
    let db = shared().database();
    let (mut client, mut writer) = (db.connect(), db.connect());
    client.batch_execute(&insert_rows("a", 10, 1)).unwrap();
    writer
        .batch_execute(&format!("SET application_name = 'a writer'; BEGIN; {}", insert_rows("b", 1, 1)))
        .unwrap();
    let pid = backend_pid(&mut writer);
    assert_says(
        &mut client,
        "SET litellm_spend.lock_timeout = '150ms'; SELECT spend_attach()",
        [
            "55P03",
            "could not get a lock on \"public\".\"LiteLLM_SpendLogs\" within 150 ms",
            &format!("It is held by process {pid} (postgres, a writer)."),
            "Try again when those transactions have ended, or raise litellm_spend.lock_timeout.",
        ],
    );
    // A swap has a setting of its own.
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    let error = "SELECT last_error FROM litellm_spend.conversion";
    let expected = format!(
        "could not get a lock on …\"LiteLLM_SpendLogs\" within 200 ms\nDETAIL:  It is held by process {pid} (postgres, a writer).\
         \nHINT:  Try again when those transactions have ended, or raise litellm_spend.swap_lock_timeout."
    );
    // At once, so that no swap comes between.
    writer.batch_execute(r#"COMMIT; BEGIN; SELECT count(*) FROM "LiteLLM_SpendLogs""#).unwrap();
    eventually("the swap waits", || {
        like(&value::<Option<String>>(&mut client, error).unwrap_or_default(), &expected)
    });
    writer.batch_execute("COMMIT").unwrap();
    wait_until_converted(&mut client);
}

#[test]
fn who_attaches_beside_a_rebuild_is_told_what_is_in_the_way() {
    let db = shared().database().attached();
    let (mut client, mut dba) = (db.connect(), db.connect());
    client.batch_execute(&insert_rows("a", 10, 3)).unwrap();
    wait_until_merged(&mut client);
    let rebuild = "BEGIN; SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 1, CURRENT_DATE)";
    dba.batch_execute(&format!("SET application_name = 'a repair'; {rebuild}")).unwrap();
    let pid = backend_pid(&mut dba);
    client.batch_execute("SET lock_timeout = '300ms'").unwrap();
    let busy = |client: &mut Client, call: &str, holder: &str| {
        let detail = format!("One merge or rebuild at a time works on a rollup. It is held by {holder}.");
        let message = "rollup \"daily_spend\" is locked by another transaction";
        assert_says(client, call, ["55P03", message, &detail, "Try again when that has ended."]);
    };
    let process = format!("process {pid} (postgres, a repair)");
    for call in [
        "spend_attach()",
        "spend_rollup_rebuild('daily_spend')",
        "spend_rollup_rebuild(NULL)",
        "spend_rollup_drop('daily_spend')",
    ] {
        busy(&mut client, &format!("SELECT {call}"), &process);
    }
    dba.batch_execute("COMMIT").unwrap();
    // Without a process.
    dba.batch_execute(
        "BEGIN; SELECT FROM litellm_spend.rollup WHERE name = 'daily_spend' FOR UPDATE; PREPARE TRANSACTION 'kept'",
    )
    .unwrap();
    busy(&mut client, "SELECT spend_attach()", "prepared transaction 'kept'");
    dba.batch_execute("ROLLBACK PREPARED 'kept'").unwrap();
    dba.batch_execute("BEGIN; LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE").unwrap();
    assert_says(
        &mut client,
        "SELECT spend_attach()",
        [
            "55P03",
            "another transaction is attaching or detaching",
            &format!("One at a time changes triggers and views. It is held by {process}."),
            "Try again when that has ended.",
        ],
    );
}

#[test]
fn days_before_the_first_row_are_not_said_to_have_lost_any() {
    let db = shared().database().with_rows("a", 100, 5).attached();
    let mut client = db.connect();
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    let frozen = "SELECT frozen_before > '-infinity' FROM spend_rollup_status WHERE rollup = 'daily_spend'";
    assert!(holds(&mut client, frozen), "a round has looked");
    assert!(value::<i64>(&mut client, "SELECT spend_rollup_rebuild('daily_spend')") > 0);
    assert!(value::<i64>(&mut client, "SELECT spend_rollup_rebuild(NULL)") > 0);
    assert!(!db.notices("SELECT count(*) FROM spend_rollup_verify('daily_spend')").contains("frozen"));
    assert_verified(&mut client);
}

#[test]
fn the_plan_of_a_table_that_is_converted_says_that_it_is_done() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 10, 1)).unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_converted(&mut client);
    let action: String = value(&mut client, "SELECT action FROM spend_partition_plan()");
    assert_eq!(action, "is done; spend_partition_status shows its partitions");
}

#[test]
fn a_table_that_is_being_reverted_is_not_said_to_be_converted_and_is_left_alone() {
    let db = shared().database();
    let (mut client, mut holder) = (db.connect(), db.connect());
    client.batch_execute(&format!("{PARTITIONED} SELECT spend_partition_set('t')")).unwrap();
    // Without this lock there is no swap.
    holder.batch_execute("BEGIN; LOCK TABLE litellm_spend.capture IN SHARE ROW EXCLUSIVE MODE").unwrap();
    client.batch_execute("SELECT spend_partition_revert('t')").unwrap();
    for call in ["spend_partition_convert('t')", "spend_partition_plan('t')"] {
        assert_says(
            &mut client,
            &format!("SELECT * FROM {call}"),
            [
                "55006",
                r#""public"."t" is being turned back into a plain table"#,
                "A reversion is under way; until its swap the table is partitioned.",
                r#"SELECT * FROM spend_partition_revert('"public"."t"', abort => true); keeps it partitioned."#,
            ],
        );
    }
    let maintain = "SELECT count(*) = 1 AND bool_and(action = 'skipped'
                        AND detail = 'it is being converted or reverted: see spend_progress')
                    FROM spend_partition_maintain('t')";
    eventually("no other maintainer is at it", || holds(&mut client, maintain));
    assert!(holds(&mut client, "SELECT last_error IS NULL FROM litellm_spend.policy"));
    holder.batch_execute("COMMIT").unwrap();
    wait_until_plain(&mut client, "t");
    assert!(holds(&mut client, "SELECT state = 'done' FROM spend_partition_revert('t')"));
}

#[test]
fn who_passes_something_else_is_told_what_to_pass() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(PAGE_VIEWS).unwrap();
    client.batch_execute("CREATE TABLE t (id int, created_at timestamp)").unwrap();
    for cutover in ["'tomorrowish'", "'2026-13-01'::text"] {
        let time = cutover.split('\'').nth(1).unwrap();
        assert_says(
            &mut client,
            &format!("SELECT spend_partition_plan(cutover => {cutover})"),
            [
                "22007",
                &format!("\"{time}\" is no time that every session reads alike"),
                "A text is read as the server reads a timestamp, whatever DateStyle; without a time zone it is in UTC.",
                "Pass one such as '…'.",
            ],
        );
        let hint = error(&mut client, &format!("SELECT spend_partition_convert(cutover => {cutover})"));
        let proposed = hint.hint().and_then(|hint| hint.strip_prefix("Pass one such as ")).unwrap();
        let plan = format!("SELECT spend_partition_plan(cutover => {})", proposed.trim_end_matches('.'));
        client.batch_execute(&plan).unwrap();
    }
    // Which day that is depends on DateStyle; of one whose year comes first it does not.
    for time in ["05/12/2097", "12/12/11", "31/12/2097"] {
        let call =
            format!("SELECT spend_partition_plan('t', cutover => '{time}', time_column => 'created_at')");
        client.batch_execute("SET DateStyle = 'ISO, DMY'").unwrap();
        let refused = error(&mut client, &call);
        assert_eq!(refused.message(), format!("\"{time}\" is no time that every session reads alike"));
    }
    for time in ["2097-12-05", "2097/12/05 08:00+01", "Dec 5 2097", "20971205T120000"] {
        for style in ["ISO, MDY", "German", "SQL, DMY", "ISO, YMD"] {
            client
                .batch_execute(&format!(
                    "SET DateStyle = '{style}'; SELECT spend_partition_plan('t', cutover => '{time}', time_column => 'created_at')"
                ))
                .unwrap();
        }
    }
    client.batch_execute("RESET DateStyle").unwrap();
    for call in ["rebuild", "verify"] {
        assert_says(
            &mut client,
            &format!("SELECT * FROM spend_rollup_{call}('by_kind', now() - interval '1 day', now())"),
            [
                "42883",
                &format!("function spend_rollup_{call}(unknown, timestamp with time zone, …) does not exist"),
                "",
                &format!(
                    "Its times are timestamps in UTC, as in spend_rollup_{call}(..., '2026-11-01', now() AT TIME ZONE 'UTC')."
                ),
            ],
        );
    }
    // Others have the parser's own.
    let hint = error(&mut client, "SELECT spend_rollup_rebuild('by_kind', 1, 2)").hint().map(String::from);
    assert!(hint.is_some_and(|hint| hint.contains("explicit type casts")));
    assert_says(
        &mut client,
        "SELECT * FROM spend_index_set()",
        [
            "22004",
            "list of indexes must not be NULL",
            "Nothing is built that was not asked for by name.",
            "SELECT item, serves FROM spend_index_plan(); lists them. Pass some, as in indexes => '{team, user}'.",
        ],
    );
    assert_says(
        &mut client,
        "SELECT spend_partition_set('t', time_column => 'at')",
        [
            "42703",
            "relation \"…t\" has no column \"at\" to partition by",
            "Partitions are ranges of a column of type timestamp, timestamp with time zone or date.",
            "Pass time_column => 'created_at'.",
        ],
    );
    // A declared rollup captures nothing.
    eventually("it is merged", || holds(&mut client, "SELECT watermark = 100 FROM spend_rollup_status"));
    client.batch_execute("DELETE FROM ev WHERE id < 50").unwrap();
    assert_says(
        &mut client,
        "SELECT spend_rollup_rebuild('by_kind')",
        [
            "55000",
            "rollup \"by_kind\" knows of more rows at … than there are",
            "Rows that it has counted are gone, and it is their only record.",
            "Pass force => true to count only what is there, …",
        ],
    );
}

#[test]
fn a_column_that_cannot_be_partitioned_by_is_answered_with_those_that_can() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute("CREATE TABLE t (id int, made date, seen timestamptz); CREATE TABLE timeless (id int)")
        .unwrap();
    let detail = "Partitions are ranges of a column of type timestamp, timestamp with time zone or date.";
    for (call, sqlstate, message, hint) in [
        (
            "spend_partition_plan(time_column => 'starttime')",
            "42703",
            "relation \"LiteLLM_SpendLogs\" has no column \"starttime\" to partition by",
            "Pass time_column => 'startTime': upper and lower case differ.",
        ),
        (
            "spend_partition_plan(time_column => 'request_id')",
            "42804",
            "column \"request_id\" of relation \"LiteLLM_SpendLogs\" has type text",
            "Pass time_column => 'startTime' or time_column => 'endTime'…",
        ),
        (
            "spend_partition_convert('t')",
            "42703",
            "relation \"t\" has no column \"startTime\" to partition by",
            "Pass time_column => 'made' or time_column => 'seen'.",
        ),
        (
            "spend_partition_set('timeless', time_column => 'id')",
            "42804",
            "column \"id\" of relation \"timeless\" has type integer",
            "The table has no such column: add one, NOT NULL.",
        ),
    ] {
        assert_says(&mut client, &format!("SELECT {call}"), [sqlstate, message, detail, hint]);
    }
}

#[test]
fn what_is_in_the_way_of_a_conversion_is_listed_by_a_plan_of_that_table() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute("CREATE TABLE page_views (id bigserial PRIMARY KEY, at timestamp)").unwrap();
    let call = "SELECT * FROM spend_partition_convert('page_views', time_column => 'at')";
    let plan = r#"SELECT * FROM spend_partition_plan('"public"."page_views"', time_column => 'at');"#;
    assert_says(
        &mut client,
        call,
        [
            "55000",
            r#""public"."page_views" cannot be partitioned as it is"#,
            "Column \"at\" may be NULL.",
            &format!("{plan} lists all that is in the way. Nothing was changed."),
        ],
    );
    client.batch_execute(plan).unwrap();
    client
        .batch_execute(&format!(
            "{PARTITIONED} SELECT spend_partition_set('t');
             CREATE MATERIALIZED VIEW counted AS SELECT count(*) FROM t"
        ))
        .unwrap();
    assert_says(
        &mut client,
        "SELECT spend_partition_revert('t')",
        [
            "55000",
            r#""public"."t" cannot be turned back into a plain table as it is"#,
            "Materialized view …counted… reads it.",
            "Change that, then call it again. Nothing was changed.",
        ],
    );
    let abort = |table| format!("SELECT detail FROM spend_partition_revert('{table}', abort => true)");
    let said = value::<String>(&mut client, &abort("page_views"));
    assert_eq!(said, "nothing was under way: it is a plain table");
    assert_eq!(value::<String>(&mut client, &abort("t")), "nothing was under way: it stays partitioned");
}

#[test]
fn a_partition_is_answered_with_its_table_and_an_empty_list_with_what_drops() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 10, 1)).unwrap();
    client.batch_execute("SELECT spend_partition_convert()").unwrap();
    wait_until_converted(&mut client);
    for call in ["index_set({}, indexes => '{team}')", "partition_set({})"] {
        let call = call.replace("{}", r#"'"LiteLLM_SpendLogs_legacy"'"#);
        assert_says(
            &mut client,
            &format!("SELECT spend_{call}"),
            [
                "42809",
                r#""public"."LiteLLM_SpendLogs_legacy" is a part of "public"."LiteLLM_SpendLogs""#,
                "What is asked for a table holds for all its partitions.",
                r#"Pass '"public"."LiteLLM_SpendLogs"'."#,
            ],
        );
    }
    assert_says(
        &mut client,
        "SELECT spend_index_set(indexes => '{}')",
        [
            "22023",
            "list of indexes must not be empty",
            "What was asked for before stays: an empty list would change nothing.",
            "SELECT * FROM spend_index_drop(); drops those that were asked for. Pass some to have them, …",
        ],
    );
}

#[test]
fn a_watermark_below_the_sequence_is_refused() {
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute("CREATE TABLE ev (id bigserial, kind int)").unwrap();
    assert_says(
        &mut client,
        "SELECT spend_rollup_register('r', 'ev', merged_to => -5)",
        [
            "22023",
            "rows up to -5 cannot have been merged",
            "The sequence's lowest value is 1.",
            "Pass the last value whose row is merged, or leave it out where none is.",
        ],
    );
    client.batch_execute("SELECT spend_rollup_register('r', 'ev', merged_to => 0)").unwrap();
    // Nobody knows any more whose it was.
    client.batch_execute("DROP TABLE ev").unwrap();
    eventually("the status says who can drop it", || {
        holds(
            &mut client,
            "SELECT last_error LIKE '%SELECT spend_rollup_drop(''r'');  -- as a superuser' FROM spend_rollup_status",
        )
    });
}

#[test]
fn a_policy_that_rests_is_set_anew_by_what_the_status_says() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            &format!(
            "{PARTITIONED}
             SELECT spend_partition_set('t', \"interval\" => 'week', precreate => 3, retention => '90 days', on_expire => 'detach');
             CREATE TABLE kept (id bigint, at timestamp, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
             SELECT spend_partition_set('kept');
             ALTER TABLE t OWNER TO pg_monitor; ALTER TABLE kept OWNER TO pg_monitor"),
        )
        .unwrap();
    let remedy = |client: &mut Client, table: &str| {
        let said = format!(
            "SELECT coalesce(split_part(last_error, E'\\nHINT:  ', 2), '') FROM litellm_spend.policy WHERE relation = '{table}'::regclass"
        );
        eventually("it rests", || value::<String>(client, &said).contains("spend_partition_set"));
        value::<String>(client, &said)
    };
    let statement = remedy(&mut client, "t");
    assert_eq!(
        statement,
        "SELECT spend_partition_set('\"public\".\"t\"', \"interval\" => 'week', precreate => 3, retention => '90 days', \
         on_expire => 'detach', time_column => 'at');"
    );
    let kept = remedy(&mut client, "kept");
    assert!(kept.contains("retention => '0'"), "{kept}");
    client.batch_execute(&(statement + &kept)).unwrap();
    assert!(holds(
        &mut client,
        "SELECT bool_and(owner = 'pg_monitor'::regrole AND last_error IS NULL)
            AND bool_or(\"interval\" = 'week' AND precreate = 3 AND retention = '90 days' AND on_expire = 'detach')
            AND bool_or(retention IS NULL)
         FROM litellm_spend.policy"
    ));
}

#[test]
fn who_only_reads_a_table_is_not_told_of_triggers() {
    let db = shared().database().attached();
    let mut admin = db.connect();
    admin
        .batch_execute(
            "SELECT spend_grant_admin('pg_read_all_stats'); GRANT CREATE ON SCHEMA public TO pg_read_all_stats;
             SET SESSION AUTHORIZATION pg_read_all_stats",
        )
        .unwrap();
    for call in ["spend_rollup_verify('daily_spend')", "spend_index_plan('\"LiteLLM_SpendLogs\"')"] {
        assert_says(
            &mut admin,
            &format!("SELECT * FROM {call}"),
            [
                "42501",
                "must be owner of relation \"LiteLLM_SpendLogs\"",
                "A table is read and changed with the rights of its owner.",
                "Call it as the table's owner, as a member of that role, or as a superuser.",
            ],
        );
    }
}

#[test]
fn who_detaches_twice_with_the_history_is_told_that_it_is_done() {
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"SELECT spend_grant_admin('litellm'); ALTER TABLE "LiteLLM_SpendLogs" OWNER TO litellm;
               GRANT CREATE ON SCHEMA public TO litellm; SELECT spend_attach()"#,
        )
        .unwrap();
    wait_until_live(&mut client);
    client.batch_execute("SET SESSION AUTHORIZATION litellm; SELECT spend_detach()").unwrap();
    // What is kept is not theirs to decide about.
    assert_refused(&mut client, "SELECT spend_detach(drop_history => true)", "42501");
    client.batch_execute("SELECT spend_attach(); SELECT spend_detach(drop_history => true)").unwrap();
    for _ in 0..2 {
        let said: String = value(&mut client, "SELECT action FROM spend_detach(drop_history => true)");
        assert_eq!(said, "is not captured");
    }
}

#[test]
fn who_detaches_while_a_conversion_builds_its_index_is_told_what_ends_it() {
    let db = shared().database().attached();
    let (mut client, mut reader) = (db.connect(), db.connect());
    client.batch_execute(&insert_rows("a", 100, 3)).unwrap();
    wait_until_merged(&mut client);
    // An old snapshot, for which the build waits.
    reader.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM pg_class").unwrap();
    // For less time than the build gives way to who waits.
    client
        .batch_execute("SET litellm_spend.lock_timeout = '100ms'; SELECT spend_partition_convert()")
        .unwrap();
    eventually("the index is being built", || {
        holds(
            &mut client,
            "SELECT EXISTS (SELECT FROM pg_stat_progress_create_index WHERE datname = current_database())",
        )
    });
    let revert = r#"SELECT * FROM spend_partition_revert('"public"."LiteLLM_SpendLogs"');"#;
    assert_says(
        &mut client,
        "SELECT spend_detach()",
        [
            "55P03",
            "could not get a lock on …LiteLLM_SpendLogs… within …",
            "It is held by process …",
            &format!("{revert} ends its conversion, which is under way. Or try again when spend_progress …"),
        ],
    );
    client.batch_execute(revert).unwrap();
    reader.batch_execute("COMMIT").unwrap();
    eventually("it detaches", || client.batch_execute("SELECT spend_detach()").is_ok());
}

/// An error at this point, after the commit was written, would be a PANIC of the server.
#[test]
fn what_is_logged_at_a_commit_is_sent_to_no_client_whose_encoding_has_not_its_letters() {
    let cluster = own_cluster(&[NO_WORKER]);
    let db = cluster.database();
    db.connect()
        .batch_execute(r#"CREATE SCHEMA "Ж"; ALTER TABLE "LiteLLM_SpendLogs" SET SCHEMA "Ж""#)
        .unwrap();
    let attach = r#"SELECT count(*) FROM spend_attach(U&'"\0416"."LiteLLM_SpendLogs"')"#;
    let settings = ["-c", "SET client_encoding = 'LATIN1'", "-c", "SET client_min_messages = log"];
    cluster.psql(&db.name, &[&settings[..], &["-c", attach]].concat());
    assert!(!cluster.log().contains("PANIC"), "{}", cluster.log_tail());
    wait_for_log(&db, r#""Ж"."LiteLLM_SpendLogs" is captured from now on"#);
}

#[test]
fn the_log_does_not_say_what_a_savepoint_took_back_nor_what_is_only_prepared() {
    let db = shared().database();
    let mut client = db.connect();
    let said = |text: &str| {
        let line = format!("litellm_spend in database \"{}\": {text}", db.name);
        db.cluster.log().matches(&line).count()
    };
    let captured = r#""public"."LiteLLM_SpendLogs" is captured from now on"#;
    let detached = r#""public"."LiteLLM_SpendLogs": no longer captured"#;
    client.batch_execute("BEGIN; SAVEPOINT s; SELECT spend_attach(); ROLLBACK TO s; COMMIT").unwrap();
    assert_eq!(said(captured), 0, "{}", db.cluster.log_tail());
    let by_hand = "DO $$ BEGIN BEGIN PERFORM spend_attach(); RAISE 'no'; EXCEPTION WHEN raise_exception THEN NULL; END; END $$";
    client.batch_execute(by_hand).unwrap();
    assert_eq!(said(captured), 0, "{}", db.cluster.log_tail());
    let prepared = format!("attach_{}", db.name);
    client.batch_execute(&format!("BEGIN; SELECT spend_attach(); PREPARE TRANSACTION '{prepared}'")).unwrap();
    client.batch_execute("BEGIN; SELECT 1; COMMIT").unwrap();
    assert_eq!(said(captured), 0, "{}", db.cluster.log_tail());
    client.batch_execute(&format!("COMMIT PREPARED '{prepared}'")).unwrap();
    // What a subtransaction did that was kept is said, once.
    let nested = "BEGIN; SAVEPOINT a; SAVEPOINT b; SELECT spend_detach(); RELEASE b; RELEASE a; SAVEPOINT c; ROLLBACK TO c; COMMIT";
    client.batch_execute(nested).unwrap();
    assert_eq!(said(detached), 1, "{}", db.cluster.log_tail());
}

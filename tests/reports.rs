//! LiteLLM's reports and views, as our rollups answer them, against LiteLLM's own SQL on the raw rows.
//!
//! LiteLLM's SQL is in target/litellm (scripts/litellm_fixtures.py); ours is what docs/reports.md says.

mod common;

use common::*;
use postgres::{Client, Transaction};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Rows `:first` to `:last`, none of them at midnight. The dimensions run through their values at different
/// speeds.
const ROWS: &str = r#"
    INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, api_key, spend, total_tokens, prompt_tokens,
        completion_tokens, "startTime", "endTime", model, model_group, custom_llm_provider, "user", team_id,
        organization_id, end_user, agent_id, cache_hit, status, request_tags, metadata)
    SELECT 'r' || i,
        (ARRAY['acompletion', 'aembedding', '', '/key/info'])[1 + i % 4],
        (ARRAY['key-a', 'key-b', 'litellm_proxy_master_key', '', 'schlüssel ✓'])[1 + i % 5],
        CASE WHEN i % 7 = 0 THEN 0 ELSE i * 7919 % 10007 / 1e6 END, 3 * i, i, 2 * i,
        (now() AT TIME ZONE 'UTC')::date + interval '17 seconds' - (i * 37 % (40 * 1440)) * interval '1 minute',
        now() AT TIME ZONE 'UTC',
        (ARRAY['gpt-4o', 'модель', ''])[1 + i % 3],
        (ARRAY['gpt', '', NULL])[1 + i / 2 % 3],
        (ARRAY['openai', '', NULL])[1 + i / 3 % 3],
        (ARRAY['ann', 'bob', '', NULL])[1 + i / 5 % 4],
        (ARRAY['t1', 't2', 't3', 't4', '', NULL, 'unknown'])[1 + i % 7],
        (ARRAY['org', '', NULL])[1 + i / 7 % 3],
        CASE WHEN i % 2 = 0 THEN 'customer ' || i % 127
             ELSE (ARRAY['postgres', '', NULL, '客户'])[1 + i / 2 % 4] END,
        (ARRAY['agent', '', NULL])[1 + i / 11 % 3],
        (ARRAY['True', 'False', 'None', '', NULL])[1 + i / 4 % 5],
        (ARRAY['success', 'failure', NULL])[1 + i / 13 % 3],
        (ARRAY['["a", "b"]', '["a", "a"]', '["тег 🏷", "a"]', '[null, "b", null]', '["", 5, true, {"x": 1}, [2]]',
               '[]', NULL, '{"a": 1}', '"a"', '7', 'null'])[1 + i % 11]::jsonb,
        '{}'
    FROM generate_series(:first, :last) AS i"#;

/// Rows a millisecond and a minute around each UTC midnight, from the day after tomorrow to six weeks ago,
/// and at midnight itself of every other day and at both ends of a month.
const MIDNIGHTS: &str = r#"
    INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, api_key, spend, total_tokens, prompt_tokens,
        completion_tokens, "startTime", "endTime", model, "user", team_id, end_user, request_tags)
    SELECT 'm' || day || ' ' || shift, 'acompletion', 'key ' || day, 0.001 * (day + 3), 1, 1, 0,
        (now() AT TIME ZONE 'UTC')::date - day + shift, now() AT TIME ZONE 'UTC', 'model ' || day, 'ann', 't1', 'c', '["a"]'
    FROM generate_series(-2, 42) AS day,
         unnest(ARRAY['-1 minute', '-1 ms', '0', '1 ms', '1 minute']::interval[]) AS shift
    WHERE shift <> '0' OR day % 2 = 0 OR day IN (29, 31)"#;

/// What rows are joined to, and groups in which nothing was spent.
const NAMES: &str = r#"
    INSERT INTO "LiteLLM_VerificationToken" (token, key_alias, key_name)
    VALUES ('key-a', 'alias a', 'sk-...a'), ('key-b', NULL, 'sk-...b'), ('unused', 'unused', NULL);
    INSERT INTO "LiteLLM_VerificationToken" (token, key_alias)
    SELECT 'key ' || i, 'alias ' || i FROM generate_series(1, 42) AS i;
    INSERT INTO "LiteLLM_TeamTable" (team_id, team_alias)
    VALUES ('t1', 'Team One'), ('t2', NULL), ('t3', 'Team One'), ('t4', 'Unassigned Team');
    INSERT INTO "LiteLLM_UserTable" (user_id, user_email, user_alias) VALUES ('ann', 'a@x', 'Ann'), ('bob', NULL, NULL);
    INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, api_key, spend, "startTime", "endTime", model, "user",
        team_id, end_user, request_tags)
    SELECT 'free ' || day, 'acompletion', 'free', 0, (now() AT TIME ZONE 'UTC')::date - day + time '01:02',
        now() AT TIME ZONE 'UTC', 'free', 'free', 'free', 'free', '["free"]'
    FROM generate_series(1, 35, 5) AS day"#;

/// The batch cost take-over: spend 0 -> x, and the time moves, some across the edges of what reports ask for.
const UPDATES: &str = r#"
    UPDATE "LiteLLM_SpendLogs" SET spend = 0.125, "startTime" = "startTime" - interval '26 hours', model = 'batch',
        status = 'success', request_tags = '["batch", "a"]'
    WHERE spend = 0 AND total_tokens % 2 = 0 AND request_id LIKE 'r%'"#;

/// Report | parameters of LiteLLM's SQL | of ours, where those are others. DAYS are two midnights.
const CASES: &str = r#"
    global_spend_logs
    global_spend_logs_by_key | 'key-a'
    global_spend_logs_by_key | 'litellm_proxy_master_key'
    global_spend_logs_by_user | 'ann' | 'ann', NULL
    global_spend_logs_by_user | '' | '', NULL
    global_spend_logs_by_user.key | 'key-a', 'ann' | 'ann', 'key-a'
    global_spend
    global_spend_keys |  | NULL
    global_spend_keys.limit | 2
    global_spend_models | 2
    global_spend_models | NULL
    global_spend_tags | DAYS
    global_spend_tags_selected | DAYS, '{a, тег 🏷, 5, missing}'
    global_activity | DAYS | DAYS, NULL
    global_activity.user | DAYS, 'ann'
    global_activity_model | DAYS | DAYS, NULL
    global_activity_model.user | DAYS, ''
    cache_hits | DAYS, '[]', '[]', '["/key/info"]', true, NULL, '[]' | DAYS, NULL, NULL, '{/key/info}', NULL, NULL
    cache_hits | DAYS, '["Unnamed Key"]', '["gpt-4o", ""]', '[]', false, 'ann', '["t2"]' | DAYS, '{Unnamed Key}', '{gpt-4o, ""}', '{}', 'ann', '{t2}'
    cache_hits | DAYS, '[]', '[]', '[]', false, 'bob', '[]' | DAYS, NULL, NULL, '{}', 'bob', NULL
    cache_hits_key_aliases | DAYS, '[]', false, NULL, '["t1"]' | DAYS, '{}', NULL, '{t1}'
    cache_hits_key_aliases | DAYS, '[]', false, 'free', '[]' | DAYS, '{}', 'free', NULL
    cache_hits_models | DAYS, '["", "acompletion"]', true, NULL, '[]' | DAYS, '{"", acompletion}', NULL, NULL
    cache_hits_models | DAYS, '[]', false, 'free', '["t1"]' | DAYS, '{}', 'free', '{t1}'
    spend_report_keys | DAYS | DAYS, NULL, NULL, NULL
    spend_report_keys.key | DAYS, 'key-a' | DAYS, 'key-a', NULL, NULL
    spend_report_keys.user | DAYS, 'ann' | DAYS, NULL, 'ann', NULL
    spend_report_keys.own_key | DAYS, 'schlüssel ✓' | DAYS, 'schlüssel ✓', NULL, NULL
    spend_report_keys.own_user | DAYS, '' | DAYS, NULL, '', NULL
    spend_report_keys.own_team | DAYS, 't1' | DAYS, NULL, NULL, 't1'
    spend_report_organization | DAYS, 'org', '{t2, t3}'
    spend_report_customers | DAYS
    spend_report_teams | DAYS, NULL
    spend_report_teams | DAYS, 't2'
    spend_report_team_customer | DAYS, 't1', 'postgres'
    spend_report_team_customer | DAYS, 'unknown', 'postgres'
    global_spend_teams
    global_spend_keys_of_user | 'ann', 2
    global_spend_models_of_user | 'bob', 2
    global_spend_end_users | HOURS, NULL
    global_spend_end_users | HOURS, 'key-a'
    all_end_users
    all_tag_names
    spend_tags |  | NULL, NULL, NULL, NULL
    spend_tags.owned | 'ann', '{t2, t3}', DAYS | DAYS, 'ann', '{t2, t3}'
    spend_logs_summary | DAYS | DAYS, NULL, NULL
    spend_logs_summary.key | DAYS, 'key-b' | DAYS, 'key-b', NULL
    spend_logs_summary.user | DAYS, 'ann' | DAYS, NULL, 'ann'
    team_spend_by_user | DAYS, '{t1, t2, ""}' | DAYS, '{t1, t2, ""}', NULL
    team_spend_by_user.user | DAYS, '{t1, t2}', 'ann'
    slack_teams | DAYS
    slack_tags | DAYS
    budget_window.key | 'key-a', HOUR | HOUR, 'key-a', NULL
    budget_window.team | 't1', HOUR | HOUR, NULL, 't1'"#;

/// LiteLLM's views, and the column that they are sorted by, if any.
const VIEWS: &[(&str, &str)] = &[
    ("MonthlyGlobalSpend", ""),
    ("MonthlyGlobalSpendPerKey", ""),
    ("MonthlyGlobalSpendPerUserPerKey", ""),
    ("Last30dKeysBySpend", "total_spend"),
    ("Last30dModelsBySpend", "total_spend"),
    ("Last30dTopEndUsersSpend", "total_spend"),
    ("DailyTagSpend", ""),
];

const ZONES: [&str; 3] = ["UTC", "Asia/Seoul", "America/Los_Angeles"];

/// LiteLLM's views over the raw rows, and the same without the rows that its tag queries fail on.
const OWN: &str = "own, public";
const WELL_FORMED: &str = "well_formed, public";
const OURS: &str = "public";

#[test]
fn every_report_equals_litellms_own_sql() {
    let docs = read("docs/reports.md");
    let documented: BTreeMap<_, _> = marked(&docs, "report").map(|(key, text)| (key, sql_in(text))).collect();
    let unanswered: Vec<_> = marked(&docs, "not answered").map(|(key, _)| key).collect();
    let cases: Vec<_> = CASES.trim().lines().map(case).collect();
    let own: BTreeMap<String, String> = serde_json::from_str(&read("target/litellm/reports.json")).unwrap();

    for name in own.keys() {
        let answered = documented.contains_key(report_of(name));
        assert_ne!(answered, unanswered.contains(&report_of(name)), "{name} in docs/reports.md");
        assert_eq!(answered, cases.iter().any(|case| case.0 == name), "{name} and its parameters");
    }
    for report in documented.keys().chain(&unanswered) {
        assert!(own.keys().any(|name| report_of(name) == *report), "LiteLLM has no report {report}");
    }

    at_three_moments(|tx| {
        let days = days(tx);
        for (name, theirs, ours) in &cases {
            let (sql, documented) = (&own[*name], documented[report_of(name)]);
            let expected = Answer::of(tx, path_for(sql), sql, &with_times(theirs, &days));
            let answer = Answer::of(tx, OURS, documented, &with_times(ours, &days));
            answer.assert_equals(&expected, expected.sorted_by(sql), name);
        }
    });
    let variants: BTreeSet<_> = cases.iter().map(|case| case.0).collect();
    let (reports, variants) = (documented.len(), variants.len());
    eprintln!(
        "{reports} reports in {variants} variants equal LiteLLM's; {} have no answer",
        unanswered.len()
    );
}

/// What needs the reports says so, and the rest is there without them.
#[test]
fn without_the_reports_the_queries_that_do_not_ask_for_them_are_answered() {
    let docs = read("docs/reports.md");
    let db = shared().database().attached();
    let mut client = db.connect();
    let (mut answered, mut refused) = (0, 0);
    for (report, text) in marked(&docs, "report") {
        let (before, sql) = (text.split("```sql").next().unwrap(), sql_in(text));
        let prepare = format!("PREPARE report AS {sql}\n; DEALLOCATE report");
        if before.contains("Needs `reports => true`.") {
            let error = error(&mut client, &prepare);
            assert_eq!(error.code().code(), "42P01", "{report}: {error:?}");
            assert!(error.hint().unwrap().contains("spend_attach(reports => true)"), "{report}: {error:?}");
            refused += 1;
        } else {
            client.batch_execute(&prepare).unwrap_or_else(|error| panic!("{report}: {error:?}"));
            answered += 1;
        }
    }
    assert!(answered >= 13 && refused >= 15, "{answered} answered, {refused} not");
}

/// Whoever was granted the reports needs nothing else for any query of the docs.
#[test]
fn every_report_runs_as_a_role_that_was_granted_them() {
    let docs = read("docs/reports.md");
    let documented: BTreeMap<_, _> = marked(&docs, "report").map(|(key, text)| (key, sql_in(text))).collect();
    let db = shared().database();
    let mut client = db.connect();
    client.batch_execute(NAMES).unwrap();
    client
        .batch_execute(
            "SELECT spend_attach(reports => true); DROP ROLE IF EXISTS reports_q; CREATE ROLE reports_q; SELECT spend_grant_reports('reports_q')",
        )
        .unwrap();
    let mut tx = client.transaction().unwrap();
    tx.batch_execute("SET LOCAL ROLE reports_q").unwrap();
    let days = days(&mut tx);
    for (name, _, ours) in CASES.trim().lines().map(case) {
        Answer::of(&mut tx, OURS, documented[report_of(name)], &with_times(ours, &days));
    }
    tx.rollback().unwrap();
    client.batch_execute("DROP OWNED BY reports_q; DROP ROLE reports_q").unwrap();
}

#[test]
fn every_view_equals_litellms_own_definition() {
    at_three_moments(|tx| {
        for (view, sorted_by) in VIEWS {
            let sql = format!(r#"SELECT * FROM "{view}""#);
            let expected = Answer::of(tx, path_for(&sql), &sql, "");
            Answer::of(tx, OURS, &sql, "").assert_equals(&expected, Some(sorted_by), view);
        }
    });
}

/// Runs `compare` in each time zone: when the table is attached and backfilled; with changes that cannot be
/// merged, since their transaction is open; when all is merged.
fn at_three_moments(compare: impl Fn(&mut Transaction)) {
    not_at_midnight();
    let rows = |first: &str, last: &str| ROWS.replace(":first", first).replace(":last", last);
    let db = shared().database();
    db.connect().batch_execute(&format!("{NAMES}; {MIDNIGHTS}; {}", rows("1", "3000"))).unwrap();
    let db = db.attached_with_reports();
    let mut client = db.connect();
    make_own_views(&mut client);
    for (view, _) in VIEWS {
        let definition = format!(r#"SELECT pg_get_viewdef('public."{view}"'::regclass)"#);
        eventually("every view is live", || {
            !value::<String>(&mut client, &definition).contains("LiteLLM_SpendLogs")
        });
    }

    let in_each_zone = |tx: &mut Transaction| {
        for zone in ZONES {
            tx.batch_execute(&format!("SET LOCAL timezone = '{zone}'")).unwrap();
            compare(tx);
        }
    };
    // CURRENT_DATE is that of the transaction's start.
    in_each_zone(&mut client.transaction().unwrap());

    let mut tx = client.transaction().unwrap();
    tx.batch_execute(&format!("{}; {UPDATES}", rows("3001", "4000"))).unwrap();
    in_each_zone(&mut tx);
    tx.commit().unwrap();

    wait_until_merged(&mut client);
    in_each_zone(&mut client.transaction().unwrap());
}

/// LiteLLM's statements make LiteLLM's views in the first schema of the path, over the first spend log there.
fn make_own_views(client: &mut Client) {
    let views = read("target/litellm/views.sql");
    client
        .batch_execute(&format!(
            r#"CREATE SCHEMA own; CREATE SCHEMA well_formed;
               CREATE VIEW well_formed."LiteLLM_SpendLogs" AS SELECT * FROM public."LiteLLM_SpendLogs"
                   WHERE request_tags IS NULL OR jsonb_typeof(request_tags) = 'array';
               SET search_path = {OWN}; {views}; SET search_path = {WELL_FORMED}; {views}; RESET search_path"#
        ))
        .unwrap();
}

fn path_for(sql: &str) -> &'static str {
    if ["request_tags", "DailyTagSpend"].iter().any(|tags| sql.contains(tags)) { WELL_FORMED } else { OWN }
}

// ---- made when asked for ---------------------------------------------------------------------------------

const REPORT_VIEWS: [&str; 6] = [
    "hourly_usage",
    "hourly_usage_by_end_user",
    "hourly_usage_by_tag",
    "daily_usage",
    "daily_usage_by_end_user",
    "daily_usage_by_tag",
];

fn actions(client: &mut Client, call: &str) -> BTreeMap<String, String> {
    let rows = client.query(&format!("SELECT object, action FROM {call}"), &[]).unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

fn reports_there(client: &mut Client) -> Vec<String> {
    let sql = "SELECT relname::text FROM pg_class WHERE relnamespace = 'litellm_spend'::regnamespace
               AND relkind IN ('r', 'v', 'i') AND relname ~ '^(hourly|daily)_usage' ORDER BY 1";
    client.query(sql, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

#[test]
fn the_reports_are_made_when_asked_for_and_go_one_by_one() {
    let db = shared().database().attached();
    let mut client = db.connect();
    client.batch_execute(&insert_rows("a", 300, 6)).unwrap();
    assert_eq!(reports_there(&mut client), Vec::<String>::new());
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM spend_rollup_status"), 5);
    // Who asks for one is told what makes it.
    for view in REPORT_VIEWS {
        let error = error(&mut client, &format!("SELECT * FROM litellm_spend.{view}"));
        assert_eq!(error.code().code(), "42P01");
        assert!(error.hint().unwrap().contains("spend_attach(reports => true)"), "{error:?}");
    }
    for call in [
        "SELECT * FROM spend_rollup_verify('hourly_usage')",
        "SELECT spend_rollup_rebuild('hourly_usage_by_tag')",
        "SELECT * FROM spend_rollup_run('hourly_usage_by_end_user')",
        "SELECT spend_rollup_drop('hourly_usage')",
    ] {
        assert_refused(&mut client, call, "42704");
        assert!(error(&mut client, call).hint().unwrap().contains("spend_attach(reports => true)"), "{call}");
    }
    client.batch_execute("DROP ROLE IF EXISTS reader_o; CREATE ROLE reader_o").unwrap();
    let granted = actions(&mut client, "spend_grant_reports('reader_o')");
    let missing = &granted[r#"views "litellm_spend"."hourly_usage", "litellm_spend"."daily_usage""#];
    assert!(missing.contains("spend_attach(reports => true)"), "{missing}");
    assert!(holds(
        &mut client,
        "SELECT has_table_privilege('reader_o', 'litellm_spend.daily_spend', 'SELECT')"
    ));
    // Their names are nobody else's.
    let taken =
        "SELECT spend_rollup_create('hourly_usage', '\"LiteLLM_SpendLogs\"', '{model}', '{count(*) AS n}')";
    assert_refused(&mut client, taken, "42710");
    assert_eq!(
        actions(&mut client, "spend_attach(reports => false)")["reports"],
        actions(&mut client, "spend_attach()")["reports"]
    );

    // The others go on, without being computed again.
    let mut tx = client.transaction().unwrap();
    let made =
        tx.query("SELECT object FROM spend_attach(reports => true) WHERE action = 'created'", &[]).unwrap();
    assert_eq!(made.len(), 3);
    let behind = "SELECT string_agg(name, ' ' ORDER BY name) FROM litellm_spend.rollup WHERE covered_from > '-infinity'";
    let behind: String = tx.query_one(behind, &[]).unwrap().get(0);
    assert_eq!(behind, "hourly_usage hourly_usage_by_end_user hourly_usage_by_tag");
    tx.commit().unwrap();
    wait_until_live(&mut client);
    assert_eq!(
        reports_there(&mut client).iter().filter(|name| REPORT_VIEWS.contains(&name.as_str())).count(),
        6
    );
    // The views read the daily ones, which had all days before.
    eventually("the reports have all days, too", || {
        holds(&mut client, "SELECT bool_and(covered_from = '-infinity') FROM spend_rollup_status")
    });
    assert!(holds(&mut client, "SELECT bool_and(unknown_days IS NULL) FROM litellm_spend.rollup"));
    assert_exact(&mut client);
    client.batch_execute(&insert_rows("b", 100, 6)).unwrap();
    let counted = "SELECT (SELECT sum(requests) FROM litellm_spend.daily_usage) = 400
                      AND (SELECT sum(requests) FROM litellm_spend.hourly_usage_by_end_user) = 400";
    assert!(holds(&mut client, counted));

    // They stay, whether asked for or not; one goes when that is asked for in words.
    assert!(!actions(&mut client, "spend_attach()").contains_key("reports"));
    let notices = db.notices("SELECT * FROM spend_attach(reports => false)");
    assert!(notices.contains("spend_rollup_drop('hourly_usage');"), "{notices}");
    assert!(holds(&mut client, counted));
    client.batch_execute("CREATE VIEW mine AS SELECT * FROM litellm_spend.daily_usage_by_end_user").unwrap();
    assert_refused(&mut client, "SELECT spend_rollup_drop('hourly_usage_by_end_user')", "2BP01");
    client.batch_execute("SELECT spend_rollup_drop('hourly_usage_by_tag'); DROP VIEW mine").unwrap();
    assert_refused(&mut client, "SELECT spend_rollup_drop('daily_spend_by_tag')", "55000");
    for call in ["spend_attach()", "spend_attach(reports => false)"] {
        assert!(!actions(&mut client, call).contains_key("rollup hourly_usage_by_tag"), "{call}");
    }
    assert!(!reports_there(&mut client).iter().any(|name| name.contains("by_tag")));
    client.batch_execute(&insert_rows("c", 100, 6)).unwrap();
    wait_until_merged(&mut client);
    assert_exact(&mut client);
    // Nobody makes it again but who asks.
    wait_for_a_round(&mut client);
    client.batch_execute("SELECT spend_detach(); SELECT spend_attach()").unwrap();
    wait_until_live(&mut client);
    assert!(!reports_there(&mut client).iter().any(|name| name.contains("by_tag")));
    assert!(holds(&mut client, "SELECT sum(requests) = 500 FROM litellm_spend.daily_usage"));
    client.batch_execute("SELECT spend_attach(reports => true)").unwrap();
    wait_until_live(&mut client);
    assert_exact(&mut client);
    // What is kept as history can go, too.
    client.batch_execute("SELECT spend_detach(); SELECT spend_rollup_drop('hourly_usage')").unwrap();
    assert!(!reports_there(&mut client).contains(&"hourly_usage_rollup".to_string()));
    client.batch_execute("SELECT spend_detach(drop_history => true)").unwrap();
    assert_eq!(reports_there(&mut client), Vec::<String>::new());
    client.batch_execute("DROP OWNED BY reader_o; DROP ROLE reader_o").unwrap();
}

/// Rows of LiteLLM's of the day `ago` days ago, the first called `prefix` 1.
fn rows_of_day(prefix: &str, ago: i32) -> String {
    format!(
        r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, api_key, spend, total_tokens, "startTime", "endTime",
               model, "user", team_id, end_user, status, request_tags)
           SELECT '{prefix}' || {ago} || '-' || i, 'acompletion', 'key' || i % 3, i / 1e3, i, t, t, 'gpt-' || i % 4,
                  'user' || i % 2, nullif('team' || i % 3, 'team0'), 'customer' || i % 5,
                  CASE i % 4 WHEN 0 THEN 'failure' END, '["a", "b"]'
           FROM generate_series(1, 40) AS i,
                LATERAL (SELECT CURRENT_DATE - {ago} + i * interval '35 minutes' AS t) AS at"#
    )
}

/// Every group of the reports against the rows that ever were, of the days that are not in `$1`, of which
/// nothing may be shown.
fn assert_whole_or_nothing(tx: &mut Transaction, unknown: &str, moment: &str) {
    let usage = "api_key, \"user\", team_id, organization_id, model, model_group, custom_llm_provider, call_type, status,
                 cache_hit, agent_id";
    let tags = "jsonb_array_elements_text(request_tags) AS tag(tag)";
    for (rollup, keys, rows) in [
        ("usage", usage, "ever".to_string()),
        ("usage_by_end_user", "end_user, api_key, team_id, model", "ever".into()),
        ("usage_by_tag", "tag, api_key, \"user\", team_id", format!("ever, {tags}")),
    ] {
        for (view, time) in
            [("hourly", "date_trunc('hour', \"startTime\")"), ("daily", "\"startTime\"::date")]
        {
            let bucket = if view == "hourly" { "hour" } else { "date" };
            let sql = format!(
                "WITH known AS (
                     SELECT {time} AS time, {keys}, sum(spend::numeric) AS spend, sum(total_tokens) AS tokens, count(*) AS n,
                            count(*) FILTER (WHERE status = 'failure') AS failed
                     FROM {rows} WHERE \"startTime\"::date <> ALL ('{{{unknown}}}'::date[]) GROUP BY {time}, {keys}
                 ), shown AS (
                     SELECT {bucket}, {keys}, trim_scale(spend), total_tokens, requests, failed_requests FROM litellm_spend.{view}_{rollup}
                 )
                 (SELECT 'is not known', shown::text FROM shown EXCEPT ALL
                  SELECT 'is not known', (time, {keys}, trim_scale(spend), tokens, n, failed)::text FROM known)
                 UNION ALL
                 (SELECT 'is not shown', (time, {keys}, trim_scale(spend), tokens, n, failed)::text FROM known EXCEPT ALL
                  SELECT 'is not shown', shown::text FROM shown)"
            );
            assert_no_rows(tx.query(&sql, &[]).unwrap(), &format!("{view}_{rollup}, {moment}"));
        }
    }
}

/// A day that a report does not know does not keep it from knowing those that come.
#[test]
fn a_report_that_is_added_on_a_day_of_losses_knows_the_next_day() {
    not_at_midnight();
    let db = shared().database().attached();
    let mut client = db.connect();
    for ago in [0, 1] {
        client.batch_execute(&rows_of_day("a", ago)).unwrap();
    }
    client
        .batch_execute(
            r#"SET session_replication_role = replica; DELETE FROM "LiteLLM_SpendLogs" WHERE request_id = 'a0-7';
               RESET session_replication_role; SELECT spend_attach(reports => true)"#,
        )
        .unwrap();
    wait_until_live(&mut client);
    for ago in [-1, 0, 1] {
        client.batch_execute(&rows_of_day("b", ago)).unwrap();
    }
    let shown = "SELECT string_agg(CURRENT_DATE - date || ': ' || n, ', ' ORDER BY date)
                 FROM (SELECT date, sum(requests) AS n FROM litellm_spend.daily_usage GROUP BY date) AS days";
    assert_eq!(value::<String>(&mut client, shown), "1: 80, -1: 40");
    wait_until_merged(&mut client);
    assert_eq!(value::<String>(&mut client, shown), "1: 80, -1: 40");
    assert!(holds(
        &mut client,
        "SELECT covered_from = CURRENT_DATE + 1 FROM spend_rollup_status WHERE rollup = 'hourly_usage'"
    ));
}

/// Retention dropped partitions, somebody truncated one, and somebody took rows past the triggers, before
/// anybody asked for the reports.
#[test]
fn a_report_that_is_added_later_shows_each_day_whole_or_not_at_all() {
    not_at_midnight();
    let db = shared().database();
    let mut client = db.connect();
    client
        .batch_execute(
            r#"SET ROLE litellm; ALTER TABLE "LiteLLM_SpendLogs" RENAME TO plain;
               CREATE TABLE "LiteLLM_SpendLogs" (LIKE plain INCLUDING DEFAULTS, PRIMARY KEY (request_id, "startTime"))
                   PARTITION BY RANGE ("startTime");
               CREATE TABLE "LiteLLM_SpendLogs_pdefault" PARTITION OF "LiteLLM_SpendLogs" DEFAULT;
               DO $$ BEGIN FOR i IN -1..12 LOOP CONTINUE WHEN i = 7;
                   EXECUTE format('CREATE TABLE p%s PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM (%L) TO (%L)',
                                  i + 1, CURRENT_DATE - i, CURRENT_DATE - i + 1);
               END LOOP;
               EXECUTE format('CREATE TABLE morning PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM (%L) TO (%L)',
                              CURRENT_DATE - 7, CURRENT_DATE - 7 + time '12:00');
               EXECUTE format('CREATE TABLE evening PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM (%L) TO (%L)',
                              CURRENT_DATE - 7 + time '12:00', CURRENT_DATE - 6);
               END $$; RESET ROLE"#,
        )
        .unwrap();
    (0..=12).for_each(|ago| client.batch_execute(&rows_of_day("a", ago)).unwrap());
    client.batch_execute(r#"CREATE TABLE ever AS TABLE "LiteLLM_SpendLogs""#).unwrap();
    attach(&mut client);
    client
        .batch_execute(
            r#"SELECT spend_partition_set(NULL, 'day', retention => '8 days'); SELECT spend_partition_maintain()"#,
        )
        .unwrap();
    assert!(holds(&mut client, "SELECT to_regclass('p10') IS NULL AND to_regclass('p9') IS NOT NULL"));
    // Partition p5 holds the rows of four days ago.
    client
        .batch_execute(
            r#"TRUNCATE p5; TRUNCATE evening; DELETE FROM "LiteLLM_SpendLogs" WHERE request_id LIKE 'a6-%5'"#,
        )
        .unwrap();
    client
        .batch_execute("SET session_replication_role = replica; DELETE FROM p4 WHERE request_id LIKE '%7'; RESET session_replication_role")
        .unwrap();
    eventually("what was truncated is frozen", || {
        holds(
            &mut client,
            "SELECT NOT EXISTS (SELECT FROM litellm_spend.dirty_range WHERE repaired_at IS NULL)",
        )
    });
    let late = |client: &mut Transaction, prefix: &str| {
        for ago in [0, 3, 4, 5, 10] {
            client.batch_execute(&rows_of_day(prefix, ago)).unwrap();
        }
        let copy = format!(
            r#"INSERT INTO ever SELECT * FROM "LiteLLM_SpendLogs" WHERE request_id LIKE '{prefix}%'"#
        );
        client.batch_execute(&copy).unwrap();
    };
    let mut tx = client.transaction().unwrap();
    late(&mut tx, "before");
    tx.commit().unwrap();

    client.batch_execute("SELECT spend_attach(reports => true)").unwrap();
    wait_until_live(&mut client);
    let unknown: String = value(
        &mut client,
        "SELECT string_agg((CURRENT_DATE - ago)::text, ',') FROM unnest('{3,4,7,9,10,11,12}'::int[]) AS ago",
    );
    assert_whole_or_nothing(&mut client.transaction().unwrap(), &unknown, "when they are covered");
    let mut tx = client.transaction().unwrap();
    late(&mut tx, "after");
    tx.batch_execute(
        r#"UPDATE "LiteLLM_SpendLogs" SET spend = 7 WHERE request_id IN ('a2-9', 'before4-9', 'a3-9');
           UPDATE ever SET spend = 7 WHERE request_id IN ('a2-9', 'before4-9', 'a3-9')"#,
    )
    .unwrap();
    assert_whole_or_nothing(&mut tx, &unknown, "in the tail");
    tx.commit().unwrap();
    wait_until_merged(&mut client);
    assert_whole_or_nothing(&mut client.transaction().unwrap(), &unknown, "when it is merged");
    // The daily ones know all days, and where the reports know one they agree.
    assert!(holds(
        &mut client,
        "SELECT sum(requests) = (SELECT count(*) FROM ever) FROM litellm_spend.daily_spend"
    ));
    assert!(holds(
        &mut client,
        "SELECT covered_from = CURRENT_DATE - 2 FROM spend_rollup_status WHERE rollup = 'hourly_usage'"
    ));
    assert!(holds(
        &mut client,
        "SELECT covered_from = '-infinity' FROM spend_rollup_status WHERE rollup = 'daily_spend'"
    ));

    // What the others only know is not computed again, for one alone neither.
    for ago in [3, 4, 7, 10, 12] {
        let rebuild = format!(
            "SELECT spend_rollup_rebuild('hourly_usage', CURRENT_DATE - {ago}, CURRENT_DATE - {ago} + 1)"
        );
        assert_refused(&mut client, &rebuild, "55000");
    }
    let verify = "SELECT * FROM spend_rollup_verify('hourly_usage', CURRENT_DATE - 8, CURRENT_DATE - 4)";
    assert_no_rows(client.query(verify, &[]).unwrap(), "what it does not know is not compared");
    // An autovacuum gives way after a second, and a merge ends: whoever meets either calls again.
    let anew = "SET litellm_spend.lock_timeout = '10s'; SELECT spend_detach(); SELECT spend_attach()";
    eventually("it is detached and attached", || match client.batch_execute(anew) {
        Err(error) if error.code().is_some_and(|code| code.code() == "55P03") => false,
        done => done.map(|_| true).unwrap(),
    });
    wait_until_live(&mut client);
    assert_whole_or_nothing(&mut client.transaction().unwrap(), &unknown, "when all was computed again");
    // Unless that is asked for: then all of them say what there is, and it is shown.
    client
        .batch_execute(
            r#"SELECT spend_rollup_rebuild(NULL, CURRENT_DATE - 4, CURRENT_DATE - 2, force => true);
               DELETE FROM ever WHERE "startTime"::date IN (CURRENT_DATE - 3, CURRENT_DATE - 4);
               INSERT INTO ever SELECT * FROM "LiteLLM_SpendLogs" WHERE "startTime"::date IN (CURRENT_DATE - 3, CURRENT_DATE - 4)"#,
        )
        .unwrap();
    let unknown: String = value(
        &mut client,
        "SELECT string_agg((CURRENT_DATE - ago)::text, ',') FROM unnest('{7,9,10,11,12}'::int[]) AS ago",
    );
    assert_whole_or_nothing(&mut client.transaction().unwrap(), &unknown, "after a forced rebuild");
    assert!(holds(
        &mut client,
        "SELECT covered_from = CURRENT_DATE - 6 FROM spend_rollup_status WHERE rollup = 'hourly_usage'"
    ));
}

// ---- what is asked ---------------------------------------------------------------------------------------

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The keys of comments `<!-- mark: key -->`, each with the text behind it.
fn marked<'a>(text: &'a str, mark: &str) -> impl Iterator<Item = (&'a str, &'a str)> {
    let parts: Vec<_> = text.split(&format!("<!-- {mark}: ")).skip(1).collect();
    parts.into_iter().map(|part| part.split_once(" -->").unwrap())
}

fn sql_in(text: &str) -> &str {
    text.split_once("```sql\n").and_then(|(_, sql)| sql.split_once("\n```")).expect("a block of SQL").0
}

fn case(line: &str) -> (&str, &str, &str) {
    let mut parts = line.split('|').map(str::trim);
    let (name, theirs) = (parts.next().unwrap(), parts.next().unwrap_or_default());
    (name, theirs, parts.next().unwrap_or(theirs))
}

/// The report that `name` is a variant of.
fn report_of(name: &str) -> &str {
    name.split('.').next().unwrap()
}

/// The first and the last day to ask for. LiteLLM adds a day in the session's time zone: not one on which the
/// clock changes in Los Angeles. The last day has no row at its midnight, which /spend/logs?summarize=true
/// counts.
fn days(tx: &mut Transaction) -> (String, String) {
    let days = "SELECT (today - 12)::text, (today - ago)::text
        FROM generate_series(3, 5, 2) AS ago, date(now() AT TIME ZONE 'UTC') AS today,
             LATERAL (SELECT (today - ago)::timestamp AT TIME ZONE 'UTC' AT TIME ZONE 'America/Los_Angeles') AS la(day)
        WHERE (la.day + interval '1 day') AT TIME ZONE 'America/Los_Angeles' AT TIME ZONE 'UTC' = today - ago + 1
        ORDER BY ago LIMIT 1";
    let row = tx.query_one(days, &[]).unwrap();
    (row.get(0), row.get(1))
}

/// As LiteLLM passes them: in UTC, and saying so.
fn with_times(parameters: &str, (first, last): &(String, String)) -> String {
    parameters
        .replace("DAYS", &format!("'{first}T00:00:00+00:00', '{last}T00:00:00+00:00'"))
        .replace("HOURS", &format!("'{first}T07:00:00+00:00', '{last}T13:00:00+00:00'"))
        .replace("HOUR", &format!("'{first}T23:00:00+00:00'"))
}

// ---- what is answered ------------------------------------------------------------------------------------

struct Answer {
    /// Name and type.
    columns: Vec<(String, String)>,
    rows: Vec<Value>,
}

impl Answer {
    fn of(tx: &mut Transaction, search_path: &str, sql: &str, parameters: &str) -> Answer {
        let parameters = if parameters.is_empty() { String::new() } else { format!("({parameters})") };
        tx.batch_execute(&format!(
            "SET LOCAL search_path = {search_path}; PREPARE report AS {sql}\n;
             CREATE TEMP TABLE answer ON COMMIT DROP AS EXECUTE report{parameters}; DEALLOCATE report"
        ))
        .unwrap_or_else(|e| panic!("{e:?}\n{sql}\n{parameters}"));
        let columns = tx.prepare("SELECT * FROM pg_temp.answer").unwrap();
        let rows = tx.query("SELECT to_jsonb(a) FROM pg_temp.answer AS a", &[]).unwrap();
        tx.batch_execute("DROP TABLE pg_temp.answer").unwrap();
        Answer {
            columns: columns.columns().iter().map(|c| (c.name().into(), c.type_().to_string())).collect(),
            rows: rows.iter().map(|r| r.get(0)).collect(),
        }
    }

    /// The column that a query sorts by first, if it says so.
    fn sorted_by(&self, sql: &str) -> Option<&str> {
        let (_, order) = sql.rsplit_once("ORDER BY")?;
        let word = order.split_whitespace().next()?.rsplit('.').next()?.trim_matches(['"', ',']);
        let word = if word == "1" { &self.columns[0].0 } else { word };
        self.columns.iter().map(|(name, _)| name.as_str()).find(|name| *name == word)
    }

    /// The same columns, the same rows, and the same order as far as `sorted_by` gives one.
    fn assert_equals(&self, expected: &Answer, sorted_by: Option<&str>, what: &str) {
        assert_eq!(self.columns, expected.columns, "{what}");
        assert!(!expected.rows.is_empty(), "{what}: LiteLLM's own SQL finds nothing");
        assert_eq!(self.rows.len(), expected.rows.len(), "{what}: rows");
        if let Some(column) = sorted_by {
            let same = |(a, b): (&Value, &Value)| close(&flat(&a[column]), &flat(&b[column]));
            assert!(self.rows.iter().zip(&expected.rows).all(same), "{what}: order of {column}");
        }
        for (ours, theirs) in sorted(&self.rows).iter().zip(&sorted(&expected.rows)) {
            assert!(close(ours, theirs), "{what}:\n  ours      {ours:?}\n  LiteLLM's {theirs:?}");
        }
    }
}

/// A value's text with # for each number, and the numbers.
type Flat = (String, Vec<f64>);

fn flat(value: &Value) -> Flat {
    let parts = match value {
        Value::Number(n) => return ("#".into(), vec![n.as_f64().unwrap()]),
        Value::Array(items) => sorted(items),
        Value::Object(fields) => fields.iter().flat_map(|(k, v)| [(k.clone(), vec![]), flat(v)]).collect(),
        other => return (other.to_string(), vec![]),
    };
    let texts: Vec<&str> = parts.iter().map(|part| part.0.as_str()).collect();
    (format!("[{}]", texts.join(" ")), parts.iter().flat_map(|part| part.1.clone()).collect())
}

/// Neither rows nor what jsonb_agg makes of them have an order.
fn sorted(values: &[Value]) -> Vec<Flat> {
    let mut flats: Vec<Flat> = values.iter().map(flat).collect();
    flats.sort_by(|a, b| a.partial_cmp(b).unwrap());
    flats
}

fn close(a: &Flat, b: &Flat) -> bool {
    a.0 == b.0 && a.1.iter().zip(&b.1).all(|(a, b)| (a - b).abs() <= 1e-9 * a.abs().max(b.abs()))
}

#[test]
fn reports_that_are_added_wait_for_who_captured_without_them() {
    let db = shared().database().attached();
    let (mut client, mut writer) = (db.connect(), db.connect());
    wait_until_live(&mut client);
    let row = |id| {
        format!(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime", team_id)
               VALUES ('{id}', 'x', 1, now(), now(), 'team')"#
        )
    };
    let teams = "SELECT count(team_id) FROM litellm_spend.change_log";
    writer.batch_execute("BEGIN").unwrap();
    writer.batch_execute(&row("before")).unwrap();
    assert_eq!(writer.query_one(teams, &[]).unwrap().get::<_, i64>(0), 0, "no rollup reads it");

    let add = "SET litellm_spend.lock_timeout = '200ms'; SELECT spend_attach(reports => true)";
    assert_refused(&mut client, add, "55P03");
    assert_eq!(reports_there(&mut client), Vec::<String>::new());
    writer.batch_execute("COMMIT").unwrap();
    client.batch_execute(add).unwrap();
    wait_until_live(&mut client);

    writer.batch_execute("BEGIN").unwrap();
    writer.batch_execute(&row("after")).unwrap();
    assert_eq!(writer.query_one(teams, &[]).unwrap().get::<_, i64>(0), 1);
    writer.batch_execute("COMMIT").unwrap();
    let counted = "SELECT sum(requests)::bigint FROM litellm_spend.hourly_usage WHERE team_id = 'team'";
    assert_eq!(value::<i64>(&mut client, counted), 2);
}

// ---- hours become days -----------------------------------------------------------------------------------

/// Has the hours that are old enough added up, and says from when on there are hours.
fn add_up_hours(client: &mut Client) -> String {
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    value(client, "SELECT string_agg(DISTINCT hours_from::text, ' ') FROM spend_rollup_status")
}

/// What the reports by day show, whatever the order.
const DAYS: &str = "SELECT jsonb_agg(d ORDER BY d)::text FROM (
    SELECT to_jsonb(u) AS d FROM litellm_spend.daily_usage u
    UNION ALL SELECT to_jsonb(u) FROM litellm_spend.daily_usage_by_end_user u
    UNION ALL SELECT to_jsonb(u) FROM litellm_spend.daily_usage_by_tag u) AS days";

/// How many hours the tables know of a day.
fn hours_of_day(client: &mut Client, ago: i32) -> Vec<i64> {
    let hours = |report: &str| {
        format!(
            "SELECT count(DISTINCT hour) FROM litellm_spend.{report}_rollup WHERE hour::date = CURRENT_DATE - {ago}"
        )
    };
    REPORT_VIEWS[..3].iter().map(|report| value(client, &hours(report))).collect()
}

#[test]
fn hours_become_days_and_no_day_changes() {
    not_at_midnight();
    let db = shared().database().attached_with_reports();
    let mut client = db.connect();
    for ago in [450, 401, 400, 0] {
        client.batch_execute(&rows_of_day("a", ago)).unwrap();
    }
    // One before all others, and none of any hour at the end of time.
    client
        .batch_execute(
            r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime", request_tags)
               VALUES ('first', 'x', 1, '-infinity', now(), '["a"]'), ('second', 'x', 1, '0044-03-15 12:00 BC', now(), '["a"]'),
                   ('last', 'x', 1, 'infinity', now(), '["a"]')"#,
        )
        .unwrap();
    wait_until_merged(&mut client);
    let before: String = value(&mut client, DAYS);
    let groups =
        "SELECT count(*) FROM litellm_spend.hourly_usage_rollup WHERE hour::date = CURRENT_DATE - 450";
    let hourly: i64 = value(&mut client, groups);
    assert_eq!(hours_of_day(&mut client, 450), [24; 3]);

    let first: String = value(&mut client, "SELECT (CURRENT_DATE - 400)::timestamp::text");
    assert_eq!(add_up_hours(&mut client), first);
    for (ago, hours) in [(450, 1), (401, 1), (400, 24), (0, 24)] {
        assert_eq!(hours_of_day(&mut client, ago), [hours; 3], "{ago} days ago");
    }
    assert!(value::<i64>(&mut client, groups) < hourly);
    assert_eq!(value::<String>(&mut client, DAYS), before);
    assert_exact(&mut client);
    assert!(holds(
        &mut client,
        "SELECT hours_from IS NULL FROM spend_rollup_status WHERE rollup = 'daily_spend'"
    ));

    // What comes late, is changed or computed again is exact, by hour too, in the tail and when it is merged.
    const HOURS: &str = "SELECT sum(spend)::text || ' ' || sum(requests) FROM litellm_spend.hourly_usage";
    let raw = r#"SELECT sum(spend::numeric)::text || ' ' || count(*) FROM "LiteLLM_SpendLogs""#;
    let equal = |client: &mut Client| {
        let sql = format!("SELECT trim_scale(split_part(a, ' ', 1)::numeric) = trim_scale(split_part(b, ' ', 1)::numeric)
                               AND split_part(a, ' ', 2) = split_part(b, ' ', 2) FROM ({HOURS}) AS a(a), ({raw}) AS b(b)");
        assert!(holds(client, &sql));
        assert_exact(client);
    };
    client.batch_execute(&rows_of_day("late", 450)).unwrap();
    client
        .batch_execute(r#"UPDATE "LiteLLM_SpendLogs" SET spend = spend + 1, model = 'other' WHERE request_id LIKE 'a450-1%';
                          UPDATE "LiteLLM_SpendLogs" SET spend = spend + 1 WHERE request_id LIKE 'a401-2%'"#)
        .unwrap();
    equal(&mut client);
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    equal(&mut client);
    assert_eq!(hours_of_day(&mut client, 450), [1; 3]);
    client
        .batch_execute("SELECT spend_rollup_rebuild(NULL, CURRENT_DATE - 450, CURRENT_DATE - 449)")
        .unwrap();
    equal(&mut client);
    assert_eq!(hours_of_day(&mut client, 450), [1; 3]);
    client.batch_execute(r#"DELETE FROM "LiteLLM_SpendLogs" WHERE request_id = 'a450-7'"#).unwrap();
    client.batch_execute("SELECT spend_rollup_run()").unwrap();
    assert_exact(&mut client);
    // That something is wrong with a day is found as before.
    client
        .batch_execute(
            "UPDATE litellm_spend.hourly_usage_rollup SET spend = spend + 1 WHERE hour = CURRENT_DATE - 450",
        )
        .unwrap();
    assert!(holds(&mut client, "SELECT count(*) > 0 FROM spend_rollup_verify('hourly_usage')"));
}

#[test]
fn hours_become_days_beside_writers_and_merges() {
    let db = own_cluster(&["litellm_spend.hourly_retention = 1"])
        .database()
        .with_rows("a", 300, 6)
        .attached_with_reports();
    beside_writers(&db, 2, 5, 6, || {
        let mut client = db.connect();
        for _ in 0..5 {
            client
                .batch_execute(
                    "UPDATE litellm_spend.source SET hours_from = '-infinity'; SELECT spend_rollup_run()",
                )
                .unwrap();
            assert_exact(&mut client);
        }
    });
    let mut client = db.connect();
    wait_until_merged(&mut client);
    assert_exact(&mut client);
    // The worker does it by itself, as soon as a minute is over.
    client.batch_execute("UPDATE litellm_spend.source SET hours_from = '-infinity'").unwrap();
    eventually("the worker has added up the hours", || {
        holds(
            &mut client,
            "SELECT count(*) = 3 FROM spend_rollup_status WHERE hours_from >= CURRENT_DATE - 2",
        )
    });
    assert_eq!(hours_of_day(&mut client, 3), [1; 3]);
    assert_exact(&mut client);
}

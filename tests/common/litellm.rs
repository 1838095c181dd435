//! LiteLLM's table and views: rows as LiteLLM writes them, partitions as its script makes them, and what our
//! totals must equal.

use super::*;

/// `n` rows as LiteLLM writes them, the first called `prefix` 1, with hours spread over the last `days` days.
pub fn insert_rows(prefix: &str, n: u32, days: u32) -> String {
    format!(
        r#"INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, api_key, spend, total_tokens, prompt_tokens,
               completion_tokens, "startTime", "endTime", model, "user", team_id, end_user, status, request_tags, metadata)
           SELECT '{prefix}' || i, 'acompletion', 'key' || i % 5, (i % 1000 * 7919 % 1000) / 1e5, 30, 10, 20,
                  t, t, 'gpt-' || i % 3, 'user' || i % 7, nullif('team' || i % 4, 'team0'), CASE i % 3 WHEN 0 THEN '' END,
                  CASE i % 10 WHEN 0 THEN 'failure' ELSE 'success' END, '["prod", "prod"]', '{{}}'
           FROM generate_series(1, {n}) AS i,
                LATERAL (SELECT now() AT TIME ZONE 'UTC' - (i * 37 % ({days} * 1440)) * interval '1 minute' AS t) AS at
           ON CONFLICT DO NOTHING"#
    )
}

/// Captures the table, and waits until all of it is added up and the views are live.
pub fn attach(client: &mut Client) {
    client.batch_execute("SELECT spend_attach()").unwrap();
    wait_until_live(client);
}

/// What upstream's partition_spend_logs.sql does: RENAME, CREATE … PARTITION BY, a DEFAULT partition, the
/// indexes.
pub const UPSTREAM_SCRIPT: &str = r#"
    BEGIN; SET LOCAL ROLE litellm;
    ALTER TABLE "LiteLLM_SpendLogs" RENAME TO "LiteLLM_SpendLogs_legacy";
    ALTER INDEX "LiteLLM_SpendLogs_pkey" RENAME TO "LiteLLM_SpendLogs_legacy_pkey";
    ALTER INDEX "LiteLLM_SpendLogs_startTime_idx" RENAME TO "LiteLLM_SpendLogs_legacy_startTime_idx";
    CREATE TABLE "LiteLLM_SpendLogs" (LIKE "LiteLLM_SpendLogs_legacy" INCLUDING DEFAULTS) PARTITION BY RANGE ("startTime");
    ALTER TABLE "LiteLLM_SpendLogs" ADD PRIMARY KEY (request_id, "startTime");
    CREATE INDEX "LiteLLM_SpendLogs_startTime_idx" ON "LiteLLM_SpendLogs" ("startTime");
    CREATE TABLE "LiteLLM_SpendLogs_pdefault" PARTITION OF "LiteLLM_SpendLogs" DEFAULT;
    COMMIT"#;

/// What upstream's unpartition_spend_logs.sql does: RENAME, CREATE, INSERT … SELECT, DROP.
pub const UPSTREAM_SCRIPT_BACK: &str = r#"
    BEGIN; SET LOCAL ROLE litellm;
    ALTER TABLE "LiteLLM_SpendLogs" RENAME TO "LiteLLM_SpendLogs_partitioned";
    ALTER INDEX "LiteLLM_SpendLogs_pkey" RENAME TO "LiteLLM_SpendLogs_partitioned_pkey";
    ALTER INDEX "LiteLLM_SpendLogs_startTime_idx" RENAME TO "LiteLLM_SpendLogs_partitioned_startTime_idx";
    CREATE TABLE "LiteLLM_SpendLogs" (LIKE "LiteLLM_SpendLogs_partitioned" INCLUDING DEFAULTS INCLUDING GENERATED);
    ALTER TABLE "LiteLLM_SpendLogs" ADD PRIMARY KEY (request_id);
    CREATE INDEX "LiteLLM_SpendLogs_startTime_idx" ON "LiteLLM_SpendLogs" ("startTime");
    INSERT INTO "LiteLLM_SpendLogs" SELECT * FROM "LiteLLM_SpendLogs_partitioned" ON CONFLICT (request_id) DO NOTHING;
    DROP TABLE "LiteLLM_SpendLogs_partitioned";
    COMMIT"#;

/// What the built-in rollups have counted.
pub const REQUESTS: &str = "SELECT sum(requests)::bigint FROM litellm_spend.daily_spend";

/// Partitioned otherwise, as `by` says, without a row; what was there is `plain`.
pub fn partitioned(by: &str) -> String {
    format!(
        r#"SET ROLE litellm; ALTER TABLE "LiteLLM_SpendLogs" RENAME TO plain;
           CREATE TABLE "LiteLLM_SpendLogs" (LIKE plain INCLUDING DEFAULTS) {by}; RESET ROLE;"#
    )
}

/// Two partitions, of half a month each.
pub const BY_TIME: &str = r#"PARTITION BY RANGE ("startTime");
    CREATE TABLE p1 PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM ('2026-11-01') TO ('2026-11-15');
    CREATE TABLE p2 PARTITION OF "LiteLLM_SpendLogs" FOR VALUES FROM ('2026-11-15') TO ('2026-12-01')"#;

/// The partition of LiteLLM's table that holds a day, counted from today, as the table's owner makes it.
pub fn day_partition(name: &str, day: i32) -> String {
    let range = range_of_day(day);
    format!(r#"SET ROLE litellm; CREATE TABLE {name} PARTITION OF "LiteLLM_SpendLogs" {range}; RESET ROLE;"#)
}

/// The bounds of that day's partition.
pub fn range_of_day(day: i32) -> String {
    format!("FOR VALUES FROM (CURRENT_DATE + ({day})) TO (CURRENT_DATE + ({day}) + 1)")
}

/// No row can be written to a table of ours, until [`make_writable`] lets it again.
pub fn make_unwritable(client: &mut Client, table: &str) {
    let sql = format!("ALTER TABLE litellm_spend.{table} ADD CONSTRAINT unwritable CHECK (false) NOT VALID");
    client.batch_execute(&sql).unwrap();
}

pub fn make_writable(client: &mut Client, table: &str) {
    client.batch_execute(&format!("ALTER TABLE litellm_spend.{table} DROP CONSTRAINT unwritable")).unwrap();
}

/// Waits until writers beside have written so many rows more.
pub fn wait_for_rows(client: &mut Client, more: i64) {
    let count = r#"SELECT count(*) FROM "LiteLLM_SpendLogs""#;
    let before: i64 = value(client, count);
    eventually("the writers go on", || value::<i64>(client, count) >= before + more);
}

/// As LiteLLM's own job makes the partition of a day, unless it is there.
pub fn partition_by_litellms_job(day: i32) -> String {
    format!(
        r#"DO $$ BEGIN
               EXECUTE format('CREATE TABLE IF NOT EXISTS "LiteLLM_SpendLogs_p%s" PARTITION OF "LiteLLM_SpendLogs" {}',
                              to_char(CURRENT_DATE + ({day}), 'YYYYMMDD'));
           END $$;"#,
        range_of_day(day)
    )
}

/// Capture has gone over to the table that has the name now.
pub fn wait_until_capture_follows(client: &mut Client) {
    eventually("capture follows", || {
        holds(client, r#"SELECT relation = '"LiteLLM_SpendLogs"'::regclass FROM litellm_spend.capture"#)
    });
}

/// Somebody has disabled triggers of ours on LiteLLM's table: they are enabled again.
pub fn wait_until_triggers_are_enabled(client: &mut Client) {
    eventually("the triggers are enabled", || {
        holds(
            client,
            r#"SELECT bool_and(tgenabled = 'O') FROM pg_trigger WHERE tgrelid = '"LiteLLM_SpendLogs"'::regclass"#,
        )
    });
}

/// Whether LiteLLM's table is partitioned: NULL, which is no, while it has not its name.
pub const IS_PARTITIONED: &str =
    r#"SELECT relkind = 'p' FROM pg_class WHERE oid = to_regclass('"LiteLLM_SpendLogs"')"#;

pub fn wait_until_converted(client: &mut Client) {
    eventually("it is converted", || holds(client, IS_PARTITIONED));
}

pub fn wait_until_plain(client: &mut Client, table: &str) {
    let plain = format!("SELECT relkind = 'r' FROM pg_class WHERE oid = to_regclass('{table}')");
    eventually("it is plain", || holds(client, &plain));
}

pub fn wait_until_live(client: &mut Client) {
    eventually("the view is live", || {
        holds(
            client,
            "SELECT bool_and(backfill_progress = 100)
                    AND count(*) = (SELECT count(*) FROM litellm_spend.rollup r WHERE r.source = 'change_log')
                    AND bool_or('MonthlyGlobalSpend' = ANY (live_views))
                    AND NOT EXISTS (SELECT FROM litellm_spend.public_view WHERE installed IS NULL)
             FROM spend_rollup_status WHERE kind = 'built-in'",
        )
    });
}

/// The worker has merged everything that was committed.
pub fn wait_until_merged(client: &mut Client) {
    eventually("the tail is empty", || {
        holds(client, "SELECT bool_and(tail_rows = 0) FROM spend_rollup_status WHERE kind <> 'by hand'")
    });
}

/// How often capture has failed.
pub fn capture_errors(client: &mut Client) -> i64 {
    value(client, "SELECT capture_errors FROM spend_rollup_status WHERE rollup = 'daily_spend'")
}

/// Days on which the view and the raw rows differ, in one snapshot. The exact sum: spend is added up as
/// numeric. Only LiteLLM's own view adds up as double precision: 6e-10 of a dollar were missing of 571 in
/// tens of thousands of rows; no row has less than 1e-5.
pub const VIEW_AGAINST_RAW: &str = r#"
    SELECT coalesce(v.date, r.date)::text, v.spend, r.spend
    FROM "MonthlyGlobalSpend" v
    FULL JOIN (SELECT date("startTime") AS date, sum(spend::numeric)::float8 AS spend, sum(spend) AS float_spend
               FROM "LiteLLM_SpendLogs" WHERE "startTime" >= CURRENT_DATE - interval '30 days' GROUP BY 1) r USING (date)
    WHERE round(v.spend::numeric, 7) IS DISTINCT FROM round(r.spend::numeric, 7)"#;

/// The view equals the raw rows, and every measure of every group equals the truth.
pub fn assert_exact(client: &mut Client) {
    assert_no_rows(client.query(VIEW_AGAINST_RAW, &[]).unwrap(), "view and raw rows differ");
    assert_verified(client);
}

/// The groups of every rollup that differ from the truth, all in one snapshot.
pub const VERIFY_ALL: &str = "SELECT r.name, v.*
    FROM (SELECT name FROM litellm_spend.rollup WHERE definition IS NOT NULL AND source IS NOT NULL) AS r,
         spend_rollup_verify(r.name) AS v";

pub fn assert_verified(client: &mut Client) {
    assert_no_rows(client.query(VERIFY_ALL, &[]).unwrap(), "rollup and truth differ");
}

-- What a user reads after a mistake.
\set VERBOSITY default
CREATE TABLE no_spend (request_id text, "startTime" timestamp);
SELECT spend_attach('no_spend');
SELECT spend_attach('"DailyTagSpend"');
SELECT spend_attach(on_delete => 'forget');
SELECT spend_detach();
SELECT * FROM monthly_global_spend(-1);
SELECT * FROM monthly_global_spend(2147483647);
SELECT * FROM monthly_global_spend();
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT spend_attach();
ROLLBACK;
BEGIN READ ONLY;
SELECT spend_attach();
ROLLBACK;
SELECT count(*) FROM spend_attach();
SELECT spend_attach('no_spend');
SELECT spend_rollup_rebuild('daily_spend', '2026-11-01 12:00');
SELECT * FROM litellm_spend.daily_usage_by_tag;
SELECT * FROM spend_rollup_verify('hourly_usage');
SELECT spend_rollup_drop('hourly_usage');
SELECT spend_rollup_rebuild('no_such_rollup', '2026-11-01');
SELECT count(*) FROM spend_detach(drop_history => true);
DROP TABLE no_spend;

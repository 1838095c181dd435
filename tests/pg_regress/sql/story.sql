-- One connection: attach, write, read, update, delete, merge, verify, detach.
\set VERBOSITY default
SELECT object, action FROM spend_attach();
CALL spend_backfill();
SELECT object, action FROM spend_attach();

CREATE VIEW by_age AS SELECT CURRENT_DATE - date AS days_ago, round(spend::numeric, 6) AS spend FROM "MonthlyGlobalSpend";

INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime", status, total_tokens, prompt_tokens, completion_tokens)
VALUES ('r1', 'acompletion', 0.1, CURRENT_DATE, now(), 'success', 30, 10, 20),
       ('r2', 'acompletion', 0.2, CURRENT_DATE, now(), 'failure', 3, 1, 2),
       ('r3', 'acompletion', 0.4, CURRENT_DATE - 1, now(), NULL, 0, 0, 0),
       ('r4', 'acompletion', 0.8, CURRENT_DATE - 31, now(), NULL, 0, 0, 0)
ON CONFLICT DO NOTHING;
INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
VALUES ('r1', 'acompletion', 99, CURRENT_DATE, now()) ON CONFLICT DO NOTHING;
SELECT * FROM by_age ORDER BY 1;
SELECT CURRENT_DATE - date AS days_ago, round(spend::numeric, 6) FROM monthly_global_spend(31) ORDER BY 1;
SELECT CURRENT_DATE - date AS days_ago, round(spend::numeric, 6) FROM monthly_global_spend(0);

-- A batch cost: the row moves to another day, and its old day is empty.
UPDATE "LiteLLM_SpendLogs" SET spend = 0.5, "startTime" = "startTime" - interval '1 day' WHERE request_id IN ('r1', 'r2');
SELECT * FROM by_age ORDER BY 1;
SELECT rollup, rows > 0 AS merged, groups, outcome FROM spend_rollup_run();
SELECT * FROM by_age ORDER BY 1;
SELECT rollup, rows, groups, outcome FROM spend_rollup_run('daily_spend');

-- Retention.
DELETE FROM "LiteLLM_SpendLogs" WHERE request_id = 'r3';
SELECT * FROM by_age ORDER BY 1;
-- Notices name days.
SET client_min_messages = warning;
SELECT * FROM spend_rollup_verify('daily_spend');
SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 1);
SELECT * FROM by_age ORDER BY 1;

-- verify finds a cent.
UPDATE litellm_spend.daily_spend_rollup SET spend = spend + 0.01 WHERE date = CURRENT_DATE - 1;
SELECT rollup -> 'spend' AS rollup, truth -> 'spend' AS truth FROM spend_rollup_verify('daily_spend');
SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 1);
SELECT * FROM spend_rollup_verify('daily_spend');

-- CURRENT_DATE is the session's.
SET TIME ZONE 'Pacific/Kiritimati';
SELECT count(*) FROM "MonthlyGlobalSpend" WHERE date < CURRENT_DATE - 30;
SET TIME ZONE 'Pacific/Pago_Pago';
SELECT count(*) FROM "MonthlyGlobalSpend" WHERE date < CURRENT_DATE - 30;
RESET TIME ZONE;

SELECT object, action FROM spend_detach();
SELECT sum(requests) FROM litellm_spend.daily_spend;
SELECT object, action FROM spend_attach(reports => true);
SELECT spend_rollup_drop('hourly_usage_by_tag');
SELECT object, action FROM spend_attach() WHERE object LIKE '%hourly%' OR object = 'reports';
SELECT count(*) FROM spend_attach(reports => false);
SELECT object, action FROM spend_detach(drop_history => true);
DROP EXTENSION litellm_spend;
SELECT count(*) FROM "MonthlyGlobalSpend";

-- 54: LiteLLM's table is detached and its history kept. Another admin attaches a table of their own, and is then the owner of
--     what the rollups say: reads it, replaces it by their own rows, drops it.
-- Needs: role litellm with EXECUTE on spend_attach and spend_detach. psql -X -U postgres -d DB -f this file.
-- Right outcome: "held": who may not act for the owner of the detached table cannot attach, and reads and drops nothing.
\connect - postgres
SELECT count(*) FROM spend_grant_admin('mallory');
CREATE SCHEMA ms AUTHORIZATION mallory;
\connect - litellm
INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, "startTime", "endTime", api_key, spend) VALUES ('r1', 'x', now(), now(), 'secret hash', 5);
SELECT count(*) FROM spend_attach();
SELECT pg_sleep(2);
SELECT count(*) FROM spend_detach();
\connect - mallory
CREATE TABLE ms.logs (request_id text, "startTime" timestamp, spend float8, total_tokens int, prompt_tokens int, completion_tokens int, api_key text, model text);
SELECT count(*) FROM spend_attach('ms.logs');
SELECT * FROM litellm_spend.daily_spend_by_key_rollup;
SELECT count(*) FROM spend_rollup_rebuild(NULL, force => true);
SELECT count(*) FROM spend_detach('ms.logs', drop_history => true);
SELECT count(*) FROM spend_detach(drop_history => true);
\connect - postgres
SELECT CASE WHEN has_table_privilege('mallory', 'litellm_spend.daily_spend_by_key_rollup', 'SELECT') THEN 'HOLE: mallory reads the history of litellm'
            WHEN (SELECT sum(spend) FROM litellm_spend.daily_spend) = 5 THEN 'held' ELSE 'HOLE: the history is gone' END AS outcome;

-- 55: before LiteLLM's table is attached, another admin attaches a table of their own in LiteLLM's schema, and lets LiteLLM's role
--     read it: LiteLLM's views then show that table's rows.
-- Needs: role litellm, who owns LiteLLM's tables and views. psql -X -U postgres -d DB -f this file.
-- Right outcome: "held": a view of another role that does not read the attached table is left alone.
\connect - postgres
SELECT count(*) FROM spend_grant_admin('mallory');
GRANT CREATE, USAGE ON SCHEMA public TO mallory;
\connect - mallory
CREATE TABLE public.logs (request_id text, "startTime" timestamp, spend float8, total_tokens int, prompt_tokens int, completion_tokens int, api_key text, model text);
GRANT SELECT ON public.logs TO litellm;
INSERT INTO public.logs VALUES ('r1', now() AT TIME ZONE 'UTC', 666, 0, 0, 0, 'k', 'm');
SELECT * FROM spend_attach('public.logs') WHERE object LIKE 'view%';
SELECT pg_sleep(2);
CALL spend_backfill();
\connect - postgres
SELECT * FROM "MonthlyGlobalSpend";
SELECT CASE WHEN NOT EXISTS (SELECT FROM litellm_spend.capture WHERE table_name = 'logs') THEN 'the attack was not tried'
            WHEN EXISTS (SELECT FROM "MonthlyGlobalSpend") THEN 'HOLE: the view of litellm shows rows of mallory' ELSE 'held' END AS outcome;

-- 52: the table of a built-in rollup is given to litellm, with the right to create in our schema: a DBA's mistake, or REASSIGN OWNED. Merges
-- and rebuilds, which act as ourselves, find and write its rows by its key, and compute an index of litellm's. (Its function reads no table:
-- that would be refused.)
-- Needs: a database of LiteLLM's schema whose tables belong to role litellm, the extension attached.
--        psql -X -U postgres -d DB -f this file (it connects as each role).
-- Right outcome: "held": what is not ours is not written with our rights.
\connect - postgres
ALTER TABLE litellm_spend.daily_spend_rollup OWNER TO litellm;
GRANT USAGE, CREATE ON SCHEMA litellm_spend TO litellm;
\connect - litellm
SET client_min_messages = warning;
CREATE TABLE public.proof ();
CREATE FUNCTION public.note() RETURNS int LANGUAGE plpgsql SET search_path = pg_catalog AS $$ BEGIN
    EXECUTE format('COMMENT ON TABLE public.proof IS %L', current_user);
    RETURN 1;
END $$;
CREATE FUNCTION public.evil(day date) RETURNS date LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN PERFORM public.note(); RETURN day; END $$;
CREATE INDEX evil ON litellm_spend.daily_spend_rollup (public.evil(date));
INSERT INTO "LiteLLM_SpendLogs" (request_id, call_type, spend, "startTime", "endTime")
    SELECT 'r' || i, 'acompletion', i, t, t FROM generate_series(1, 3) AS i, LATERAL (SELECT now() AT TIME ZONE 'UTC' AS t) AS at;
\connect - postgres
SELECT pg_sleep(2);
SELECT count(*) FROM spend_rollup_run();
SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 1);
SELECT last_error FROM litellm_spend.rollup WHERE name = 'daily_spend';
SELECT CASE WHEN obj_description('public.proof'::regclass) = 'postgres' THEN 'HOLE: code of litellm ran as a superuser' ELSE 'held' END AS outcome;

-- 36: the captured table is given to a superuser, with an index of litellm's on it: the worker then plans its queries as that superuser.
-- Needs: a database of LiteLLM's schema whose tables belong to role litellm, the extension attached.
--        psql -X -U postgres -d DB -f this file (it connects as each role).
-- Right outcome: "held": nobody has asked for it; capture says so and stays where it is.
\connect - litellm
SET client_min_messages = warning;
CREATE TABLE IF NOT EXISTS public.proof (via text, cur name, ses name, super boolean, at timestamptz DEFAULT clock_timestamp());
CREATE OR REPLACE FUNCTION public.note(via text) RETURNS int LANGUAGE plpgsql SET search_path = pg_catalog AS $$ BEGIN
    INSERT INTO public.proof (via, cur, ses, super)
    SELECT via, current_user, session_user, rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user;
    RETURN 1;
END $$;
ALTER TABLE "LiteLLM_SpendLogs" SET (autovacuum_enabled = off);
CREATE FUNCTION public.evil(via text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN PERFORM public.note(via); RETURN true; END $$;
CREATE INDEX evil ON "LiteLLM_SpendLogs" ((public.evil('planning as the new owner')));
DELETE FROM public.proof;
\connect - postgres
ALTER TABLE "LiteLLM_SpendLogs" OWNER TO postgres;
SELECT pg_sleep(2);
SELECT count(*) FROM spend_rollup_run();
SELECT spend_rollup_rebuild('daily_spend', CURRENT_DATE - 1);
SELECT count(*) FROM spend_rollup_verify('daily_spend');
SELECT last_error FROM litellm_spend.capture;
SELECT via, cur, ses, super, count(*) FROM public.proof GROUP BY 1, 2, 3, 4 ORDER BY 4 DESC, 1;
SELECT CASE WHEN bool_or(super) THEN 'HOLE: code of litellm ran as a superuser' ELSE 'held' END AS outcome FROM public.proof;

-- 37: the source of a declared rollup is given to a superuser: the rollup's table, with a trigger of litellm's on it, follows.
-- Needs: role litellm with EXECUTE on spend_rollup_create. psql -X -U postgres -d DB -f this file (it connects as each role).
-- Right outcome: "held": the rollup stops and says so.
\connect - litellm
SET client_min_messages = warning;
CREATE TABLE IF NOT EXISTS public.proof (via text, cur name, ses name, super boolean, at timestamptz DEFAULT clock_timestamp());
CREATE OR REPLACE FUNCTION public.note(via text) RETURNS int LANGUAGE plpgsql SET search_path = pg_catalog AS $$ BEGIN
    INSERT INTO public.proof (via, cur, ses, super)
    SELECT via, current_user, session_user, rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user;
    RETURN 1;
END $$;
CREATE TABLE public.pv (id bigserial PRIMARY KEY, x int);
SELECT spend_rollup_create('r', 'pv', ARRAY['x'], ARRAY['count(*) AS n']);
CREATE FUNCTION public.evil_trigger() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM public.note('a trigger on the rollup''s table'); RETURN NULL; END $$;
CREATE TRIGGER evil AFTER INSERT ON litellm_spend.r_rollup EXECUTE FUNCTION public.evil_trigger();
\connect - postgres
ALTER TABLE public.pv OWNER TO postgres;
INSERT INTO public.pv (x) VALUES (1);
SELECT pg_sleep(2);
SELECT count(*) FROM spend_rollup_run();
SELECT last_error FROM litellm_spend.rollup;
SELECT via, cur, ses, super, count(*) FROM public.proof GROUP BY 1, 2, 3, 4 ORDER BY 4 DESC, 1;
SELECT CASE WHEN bool_or(super) THEN 'HOLE: code of litellm ran as a superuser' ELSE 'held' END AS outcome FROM public.proof;

-- 41: the source of a declared rollup is given to another role: the rollup's table, with a trigger of the former owner's, follows.
-- Needs: a worker; role litellm with EXECUTE on spend_rollup_create. psql -X -U postgres -d DB -f this file.
-- Right outcome: "held": the rollup stops and says so.
\connect - litellm
SET client_min_messages = warning;
CREATE TABLE public.proof (cur name); GRANT INSERT ON public.proof TO PUBLIC;
CREATE TABLE public.pv (id bigserial PRIMARY KEY, x int);
SELECT spend_rollup_create('r', 'pv', ARRAY['x'], ARRAY['count(*) AS n']);
CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF current_user <> 'litellm' THEN INSERT INTO public.proof SELECT current_user; END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER evil AFTER INSERT ON litellm_spend.r_rollup EXECUTE FUNCTION public.note();
\connect - postgres
ALTER TABLE public.pv OWNER TO victim;
INSERT INTO public.pv (x) VALUES (1);
SELECT pg_sleep(3);
SELECT count(*) FROM spend_rollup_run();
SELECT last_error FROM spend_rollup_status WHERE rollup = 'r';
SELECT CASE WHEN EXISTS (SELECT FROM public.proof) THEN 'HOLE: code of litellm ran as another'
            WHEN NOT EXISTS (SELECT FROM spend_rollup_status WHERE last_error IS NOT NULL) THEN 'HOLE: nobody is told' ELSE 'held' END AS outcome;

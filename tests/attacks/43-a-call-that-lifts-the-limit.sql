-- 43: a function in a merge calls spend_rollup_run(), whose end takes the limit of the merge around it away; then it sleeps.
-- Needs: a worker; role litellm with EXECUTE on spend_rollup_create, spend_rollup_run. psql -X -U postgres -d DB -f this file.
-- Right outcome: "held": the limit of the outermost step stays, and others get their turn.
\connect - postgres
CREATE SCHEMA vs AUTHORIZATION victim; GRANT EXECUTE ON FUNCTION spend_rollup_create TO victim; GRANT USAGE ON SCHEMA public TO victim;
\connect - victim
CREATE TABLE vs.v (id bigserial PRIMARY KEY, x int);
SELECT public.spend_rollup_create('of_victim', 'vs.v', ARRAY['x'], ARRAY['count(*) AS n']);
\connect - litellm
CREATE TABLE public.pv (id bigserial PRIMARY KEY, x int);
CREATE TABLE public.pv2 (id bigserial PRIMARY KEY, x int);
SELECT spend_rollup_create('a', 'public.pv', ARRAY['x'], ARRAY['count(*) AS n']);
SELECT spend_rollup_create('b', 'public.pv2', ARRAY['x'], ARRAY['count(*) AS n']);
CREATE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF session_user <> 'litellm' THEN PERFORM * FROM public.spend_rollup_run('b'); PERFORM pg_sleep(3600); END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER t AFTER INSERT ON litellm_spend.a_rollup EXECUTE FUNCTION public.slow();
INSERT INTO public.pv (x) VALUES (1);
\! sleep 2
\connect - victim
INSERT INTO vs.v (x) VALUES (1);
\connect - postgres
DO $$ BEGIN FOR i IN 1..900 LOOP EXIT WHEN (SELECT watermark > 0 FROM litellm_spend.rollup WHERE name = 'of_victim'); PERFORM pg_sleep(0.1); END LOOP; END $$;
SELECT name, watermark, last_error FROM litellm_spend.rollup;
SELECT CASE WHEN watermark = 0 THEN 'HOLE: victim''s rollup waits for another''s' ELSE 'held' END AS outcome FROM litellm_spend.rollup WHERE name = 'of_victim';

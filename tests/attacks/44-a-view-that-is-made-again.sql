-- 44: the live view of a rollup is dropped. Making it again reads its expressions, and calls the CHECK of a type, which never ends.
-- Needs: a worker; role litellm with EXECUTE on spend_rollup_create. psql -X -U postgres -d DB -f this file.
-- Right outcome: "held": that is a step of that rollup's own, with its limit, and others get their turn.
\connect - postgres
CREATE SCHEMA vs AUTHORIZATION victim; GRANT EXECUTE ON FUNCTION spend_rollup_create TO victim; GRANT USAGE ON SCHEMA public TO victim;
\connect - victim
CREATE TABLE vs.v (id bigserial PRIMARY KEY, x int);
SELECT public.spend_rollup_create('of_victim', 'vs.v', ARRAY['x'], ARRAY['count(*) AS n']);
\connect - litellm
CREATE DOMAIN public.tag AS text;
CREATE TABLE public.pv (id bigserial PRIMARY KEY, tags public.tag[]);
SELECT spend_rollup_create('a', 'public.pv', ARRAY['tags @> ''{x}'' AS has'], ARRAY['count(*) AS n']);
CREATE FUNCTION public.endless(text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
    IF session_user = 'litellm' THEN RETURN true; END IF;
    LOOP BEGIN PERFORM pg_sleep(3600); EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP;
END $$;
ALTER DOMAIN public.tag ADD CHECK (public.endless(VALUE)) NOT VALID;
DROP VIEW litellm_spend.a;
\! sleep 3
\connect - victim
INSERT INTO vs.v (x) VALUES (1);
\connect - postgres
DO $$ BEGIN FOR i IN 1..900 LOOP EXIT WHEN (SELECT watermark > 0 FROM litellm_spend.rollup WHERE name = 'of_victim'); PERFORM pg_sleep(0.1); END LOOP; END $$;
SELECT name, watermark, last_error FROM litellm_spend.rollup;
SELECT CASE WHEN watermark = 0 THEN 'HOLE: victim''s rollup waits for another''s' ELSE 'held' END AS outcome FROM litellm_spend.rollup WHERE name = 'of_victim';

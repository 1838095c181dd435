-- 35: one owner's function catches the cancel of a step that took too long, and goes on: nothing else gets its turn.
-- Needs: role litellm with EXECUTE on spend_rollup_create, a worker; victim's rollup is another's. psql -X -U postgres -d DB -f this file
-- Right outcome: "held": the worker is ended, started again, and comes to the others first.
\connect - postgres
CREATE SCHEMA vs AUTHORIZATION victim; GRANT EXECUTE ON FUNCTION spend_rollup_create TO victim; GRANT USAGE ON SCHEMA public TO victim;
\connect - victim
CREATE TABLE vs.v (id bigserial PRIMARY KEY, x int);
SELECT public.spend_rollup_create('of_victim', 'vs.v', ARRAY['x'], ARRAY['count(*) AS n']);
\connect - litellm
CREATE TABLE public.pv (id bigserial PRIMARY KEY, x int);
CREATE FUNCTION public.stubborn(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN
    WHILE session_user <> 'litellm' LOOP
        BEGIN PERFORM pg_sleep(3600); EXCEPTION WHEN query_canceled THEN NULL; END;
    END LOOP;
    RETURN 1;
END $$;
SELECT spend_rollup_create('a', 'public.pv', ARRAY['public.stubborn(x) AS s'], ARRAY['count(*) AS n']);
INSERT INTO public.pv (x) VALUES (1);
\! sleep 2
\connect - victim
INSERT INTO vs.v (x) VALUES (1);
\connect - postgres
DO $$ BEGIN FOR i IN 1..900 LOOP EXIT WHEN (SELECT bool_and(CASE name WHEN 'of_victim' THEN watermark > 0 ELSE last_error IS NOT NULL END) FROM litellm_spend.rollup); PERFORM pg_sleep(0.1); END LOOP; END $$;
SELECT rollup, last_error FROM spend_rollup_status;
SELECT CASE WHEN bool_or(name = 'of_victim' AND watermark = 0) THEN 'HOLE: victim''s rollup waits for litellm''s function'
            WHEN bool_or(name = 'a' AND last_error IS NULL) THEN 'HOLE: nobody is told' ELSE 'held' END AS outcome
FROM litellm_spend.rollup;

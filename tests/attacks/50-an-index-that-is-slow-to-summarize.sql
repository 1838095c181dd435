-- 50: the expression of one owner's BRIN index keeps the database's only worker while it summarizes the index, longer each time.
-- Needs: role litellm with EXECUTE on spend_rollup_create, a worker; victim's rollup is another's. psql -X -U postgres -d DB -f this file
-- Right outcome: "held": a merge's short limit, and not even the merges of that source wait for longer.
\connect - postgres
CREATE SCHEMA vs AUTHORIZATION victim; GRANT EXECUTE ON FUNCTION spend_rollup_create TO victim; GRANT USAGE ON SCHEMA public TO victim;
\connect - victim
CREATE TABLE vs.v (id bigserial PRIMARY KEY, x int);
SELECT public.spend_rollup_create('z_of_victim', 'vs.v', ARRAY['x'], ARRAY['count(*) AS n']);
\connect - litellm
-- Autovacuum's ANALYZE would call the function, too, and keep the worker out by its lock.
CREATE TABLE public.pv (id bigserial PRIMARY KEY, x int, pad text) WITH (autovacuum_enabled = off);
CREATE FUNCTION public.slow(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN IF session_user <> 'litellm' THEN PERFORM pg_sleep(3600); END IF; RETURN 1; END $$;
CREATE INDEX ON public.pv USING brin (id, slow(x)) WITH (pages_per_range = 1);
SELECT spend_rollup_create('a', 'public.pv', ARRAY['x'], ARRAY['count(*) AS n']);
INSERT INTO public.pv (x, pad) SELECT 1, repeat('x', 1000) FROM generate_series(1, 100);
\! sleep 1
\connect - victim
INSERT INTO vs.v (x) VALUES (1);
\connect - postgres
DO $$ BEGIN FOR i IN 1..900 LOOP EXIT WHEN (SELECT bool_and(watermark = CASE name WHEN 'a' THEN 100 ELSE 1 END)
    AND pg_read_file(current_setting('data_directory') || '/../server.log') LIKE '%in database "' || current_database() || '": BRIN indexes of "public"."pv" failed, next try in 12s%' FROM litellm_spend.rollup WHERE name IN ('a', 'z_of_victim')); PERFORM pg_sleep(0.1); END LOOP; END $$;
\connect - litellm
INSERT INTO public.pv (x, pad) SELECT 1, repeat('x', 1000) FROM generate_series(1, 100);
\connect - postgres
DO $$ BEGIN FOR i IN 1..900 LOOP EXIT WHEN (SELECT bool_and(watermark = CASE name WHEN 'a' THEN 200 ELSE 1 END) FROM litellm_spend.rollup WHERE name IN ('a', 'z_of_victim')); PERFORM pg_sleep(0.1); END LOOP; END $$;
-- A step that took too long rests for four times its limit, which of a merge is 3 s.
SELECT CASE WHEN NOT bool_and(watermark = CASE name WHEN 'a' THEN 200 ELSE 1 END) THEN 'HOLE: merges wait for litellm''s function'
            WHEN NOT pg_read_file(current_setting('data_directory') || '/../server.log') LIKE '%in database "' || current_database() || '": BRIN indexes of "public"."pv" failed, next try in 12s%' THEN 'HOLE: its limit is not a merge''s'
            ELSE 'held' END AS outcome
FROM litellm_spend.rollup WHERE name IN ('a', 'z_of_victim');
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'litellm_spend worker' AND datname = current_database();

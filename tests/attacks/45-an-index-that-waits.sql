-- 45: an index of a conversion waits for a transaction of its owner's, and the database's only worker with it.
-- Needs: a worker; role litellm with EXECUTE on spend_partition_convert. psql -X -U postgres -d DB -f this file.
-- Right outcome: "held": the index is built beside the worker.
\setenv PGHOST :HOST
\setenv PGPORT :PORT
\setenv PGDATABASE :DBNAME
\connect - postgres
CREATE SCHEMA vs AUTHORIZATION victim; GRANT EXECUTE ON FUNCTION spend_rollup_create TO victim; GRANT USAGE ON SCHEMA public TO victim;
\connect - victim
CREATE TABLE vs.v (id bigserial PRIMARY KEY, x int);
SELECT public.spend_rollup_create('of_victim', 'vs.v', ARRAY['x'], ARRAY['count(*) AS n']);
\connect - litellm
CREATE TABLE public.seen (id bigserial PRIMARY KEY, at timestamp NOT NULL);
CREATE INDEX ON public.seen (at);
BEGIN; INSERT INTO public.seen VALUES (1, now());
\! psql -X -U litellm -c "SELECT * FROM spend_partition_convert('public.seen', time_column => 'at')"; sleep 3
\! psql -X -U victim -c 'INSERT INTO vs.v (x) VALUES (1)'; sleep 5
\! psql -X -U postgres -c "SELECT CASE WHEN watermark = 0 THEN 'HOLE: victim''s rollup waits for litellm''s index' ELSE 'held' END AS outcome FROM litellm_spend.rollup WHERE name = 'of_victim'"
ROLLBACK;

-- 46: a table is renamed in the transaction that begins its conversion: the look at all conversions fails on it, for everybody.
-- Needs: a worker; role litellm with EXECUTE on spend_partition_convert. psql -X -U postgres -d DB -f this file.
-- Right outcome: "held": the others go on.
\setenv PGHOST :HOST
\setenv PGPORT :PORT
\setenv PGDATABASE :DBNAME
\connect - postgres
CREATE SCHEMA vs AUTHORIZATION victim; GRANT EXECUTE ON FUNCTION spend_partition_convert TO victim; GRANT USAGE ON SCHEMA public TO victim;
\connect - litellm
CREATE TABLE public.seen (id bigserial PRIMARY KEY, at timestamp NOT NULL);
CREATE INDEX ON public.seen (at);
SELECT * FROM spend_partition_convert('public.seen', time_column => 'at', cutover => '2030-01-01') \; ALTER TABLE public.seen RENAME TO x;
SELECT pg_sleep(2);
\connect - victim
CREATE TABLE vs.t (id bigserial PRIMARY KEY, at timestamp NOT NULL);
CREATE INDEX ON vs.t (at);
SELECT * FROM public.spend_partition_convert('vs.t', time_column => 'at');
\connect - postgres
\! for i in $(seq 60); do [ "$(psql -X -At -U postgres -c "SELECT relkind FROM pg_class WHERE oid = to_regclass('vs.t')")" = p ] && break; sleep 1; done
SELECT CASE WHEN relkind <> 'p' THEN 'HOLE: victim''s table waits for litellm''s' ELSE 'held' END AS outcome FROM pg_class WHERE oid = to_regclass('vs.t');

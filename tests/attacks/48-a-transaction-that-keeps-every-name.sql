-- 48: a transaction that has made a rollup stays open: nobody else can make one. (Owners who have none yet do wait for one another:
--     they are granted what an owner needs.)
-- Needs: role litellm with EXECUTE on spend_rollup_create. psql -X -U postgres -d DB -f this file.
-- Right outcome: "held": only the same name waits.
\setenv PGHOST :HOST
\setenv PGPORT :PORT
\setenv PGDATABASE :DBNAME
\connect - postgres
CREATE SCHEMA vs AUTHORIZATION victim; GRANT EXECUTE ON FUNCTION spend_rollup_create TO victim; GRANT USAGE ON SCHEMA public TO victim;
CREATE TABLE vs.v (id bigserial PRIMARY KEY, x int); ALTER TABLE vs.v OWNER TO victim;
CREATE TABLE vs.w (id bigserial PRIMARY KEY, x int); ALTER TABLE vs.w OWNER TO victim;
\connect - victim
SELECT public.spend_rollup_create('earlier', 'vs.v', ARRAY['x'], ARRAY['count(*) AS n']);
\connect - litellm
CREATE TABLE public.pv (id bigserial PRIMARY KEY, x int);
BEGIN;
SELECT spend_rollup_create('a', 'public.pv', ARRAY['x'], ARRAY['count(*) AS n']);
\! psql -X -U victim -c "SET statement_timeout = '20s'" -c "SELECT public.spend_rollup_create('of_victim', 'vs.w', ARRAY['x'], ARRAY['count(*) AS n'])"
ROLLBACK;
\connect - postgres
SELECT CASE WHEN EXISTS (SELECT FROM litellm_spend.rollup WHERE name = 'of_victim') THEN 'held' ELSE 'HOLE: it waits' END AS outcome;

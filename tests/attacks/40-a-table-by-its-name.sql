-- 40: a rollup's table is moved away, and a superuser's next rollup has its name: the first one is taken to read that.
-- Needs: a worker; role litellm with EXECUTE on spend_rollup_create. psql -X -U postgres -d DB -f this file.
-- Right outcome: "held": what one rollup's table is called, no other rollup may be.
\connect - litellm
SET client_min_messages = warning;
CREATE TABLE public.pv (id bigserial PRIMARY KEY, x int);
SELECT spend_rollup_create('usage', 'pv', ARRAY['x'], ARRAY['count(*) AS n']);
\connect - postgres
ALTER TABLE litellm_spend.usage_rollup SET SCHEMA public;
CREATE TABLE public.of_dba (id bigserial PRIMARY KEY, x int);
SELECT spend_rollup_create('usage_rollup', 'of_dba', ARRAY['x'], ARRAY['count(*) AS n']);
INSERT INTO public.of_dba (x) VALUES (1);
SELECT pg_sleep(2);
SELECT count(*) FROM spend_rollup_status;
SELECT CASE WHEN EXISTS (SELECT FROM pg_class WHERE relname LIKE 'usage%' AND relkind IN ('r', 'v')
                             AND relname <> 'usage' AND relnamespace = 'litellm_spend'::regnamespace)
            THEN 'HOLE: two rollups share a name' ELSE 'held' END AS outcome;

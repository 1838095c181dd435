-- 51: the schema for what is taken out of use belongs to who made it first, and who can then put a table with a trigger in the place of
-- one that a reversion writes to, or drop an archived partition.
-- Needs: role litellm with EXECUTE on spend_partition_revert. psql -X -U postgres -d DB -f this file
-- Right outcome: "held": nothing is put into a schema of another role.
\connect - postgres
SELECT format('GRANT CREATE ON DATABASE %I TO mallory', current_database()) \gexec
\connect - mallory
CREATE SCHEMA litellm_spend_archive;
\connect - litellm
CREATE TABLE public.t (id int, at timestamp NOT NULL, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE public.t_d PARTITION OF public.t DEFAULT;
CREATE INDEX ON public.t (at);
SELECT spend_partition_revert('public.t');
\! sleep 2
\connect - postgres
SELECT CASE WHEN NOT EXISTS (SELECT FROM pg_class WHERE relnamespace = 'litellm_spend_archive'::regnamespace) THEN 'held'
            ELSE 'HOLE: a reversion puts tables into a schema of mallory''s' END AS outcome;

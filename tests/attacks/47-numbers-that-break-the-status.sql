-- 47: the ends of what a number or a time can be: a sequence from the lowest number on, a partition up to the last day.
-- Needs: role litellm with EXECUTE on spend_rollup_create, spend_partition_set. psql -X -U postgres -d DB -f this file.
-- Right outcome: "held": the status of all the others is still there.
\connect - litellm
CREATE SEQUENCE public.s MINVALUE -9223372036854775807 START -9223372036854775807;
CREATE TABLE public.pv (id bigint NOT NULL DEFAULT nextval('public.s'), x int);
SELECT setval('public.s', 9);
SELECT spend_rollup_create('a', 'public.pv', ARRAY['x'], ARRAY['count(*) AS n']);
CREATE TABLE public.t (at timestamp NOT NULL) PARTITION BY RANGE (at);
CREATE TABLE public.p PARTITION OF public.t FOR VALUES FROM ('2026-01-01') TO ('294276-12-31');
SELECT spend_partition_set('public.t', 'day', 0, '10 years', 'drop', 'at');
\connect - postgres
CREATE TABLE public.seen AS SELECT (SELECT count(s) FROM (SELECT * FROM spend_rollup_status OFFSET 0) AS s) AS rollups,
    (SELECT count(s) FROM (SELECT * FROM spend_partition_status OFFSET 0) AS s) AS policies;
SELECT CASE WHEN EXISTS (SELECT FROM public.seen WHERE policies = 1) THEN 'held' ELSE 'HOLE: no status' END AS outcome
FROM (VALUES (to_regclass('public.seen'))) AS made(seen) WHERE seen IS NOT NULL;

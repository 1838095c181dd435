-- 38: a table gets another owner: the former one's retention goes on deleting rows of it.
-- Needs: a worker; role litellm with EXECUTE on spend_partition_set. psql -X -U postgres -d DB -f this file (it connects as each role).
-- Right outcome: "held": the policy rests, and says so.
\connect - litellm
CREATE TABLE public.invoices (ts timestamp NOT NULL);
SELECT spend_partition_set('public.invoices', retention => '1 day', time_column => 'ts');
\connect - postgres
ALTER TABLE public.invoices OWNER TO victim;
INSERT INTO public.invoices SELECT now() - interval '1 year' FROM generate_series(1, 100);
SELECT pg_sleep(3);
SELECT last_error FROM spend_partition_status;
SELECT CASE WHEN (SELECT count(*) FROM public.invoices) < 100 THEN 'HOLE: rows of another role''s table were deleted'
            WHEN NOT EXISTS (SELECT FROM spend_partition_status WHERE last_error IS NOT NULL) THEN 'HOLE: nobody is told' ELSE 'held' END AS outcome;

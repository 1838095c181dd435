-- 42: a table's numbers come from a sequence that its owner may not read: a rollup of it shows where that sequence stands.
-- Needs: role litellm with EXECUTE on spend_rollup_register, spend_rollup_window. psql -X -U postgres -d DB -f this file.
-- Right outcome: "held": who may not read the sequence is refused.
\connect - postgres
CREATE SCHEMA vs AUTHORIZATION victim;
\connect - victim
CREATE TABLE vs.invoices (id bigserial PRIMARY KEY);
INSERT INTO vs.invoices SELECT FROM generate_series(1, 4711);
\connect - litellm
SELECT oid AS s FROM pg_class WHERE relname = 'invoices_id_seq' \gset
CREATE TABLE public.spy (id bigint);
SELECT format('ALTER TABLE public.spy ALTER id SET DEFAULT nextval(%L::regclass)', :s) \gexec
SELECT spend_rollup_register('spy', 'public.spy');
SELECT * FROM spend_rollup_window('spy');
SELECT CASE WHEN EXISTS (SELECT FROM spend_rollup_status WHERE rollup = 'spy') THEN 'HOLE: it is shown' ELSE 'held' END AS outcome;
\connect - postgres
SELECT CASE WHEN EXISTS (SELECT FROM litellm_spend.rollup WHERE name = 'spy') THEN 'HOLE: it is registered' ELSE 'held' END AS outcome;

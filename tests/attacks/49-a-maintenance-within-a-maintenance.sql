-- 49: a trigger on what retention deletes calls spend_partition_maintain(), which calls the trigger, and so on.
-- Needs: role litellm with EXECUTE on spend_partition_set, spend_partition_maintain. psql -X -U postgres -d DB -f this file.
-- Right outcome: "held": the inner call finds the table busy, and the rows go.
\connect - litellm
SET client_min_messages = error;
CREATE TABLE public.t (id bigserial PRIMARY KEY, at timestamp NOT NULL);
INSERT INTO public.t (at) SELECT '2020-01-01' FROM generate_series(1, 20);
CREATE FUNCTION public.again() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM * FROM public.spend_partition_maintain('public.t'); RETURN OLD; END $$;
CREATE TRIGGER t BEFORE DELETE ON public.t FOR EACH ROW EXECUTE FUNCTION public.again();
SELECT spend_partition_set('public.t', 'day', 0, '10 days', 'drop', 'at');
SET statement_timeout = '40s';
SELECT * FROM spend_partition_maintain('public.t');
SELECT pg_sleep(1);
SELECT CASE WHEN count(*) > 0 THEN 'HOLE: the rows stay' ELSE 'held' END AS outcome FROM public.t;

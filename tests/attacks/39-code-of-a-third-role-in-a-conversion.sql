-- 39: a view and a function of other roles use a type of the table's owner. A conversion moves them by their texts, and reading a
--     text again calls the CHECK of the type as the view's owner: a superuser, or whoever made the function.
-- Needs: a worker; role litellm with EXECUTE on spend_partition_convert. psql -X -U postgres -d DB -f this file.
-- Right outcome: "held": what uses a third role's code is in the way of the conversion.
\connect - litellm
SET client_min_messages = warning;
CREATE TABLE public.proof (via text, cur name); GRANT INSERT ON public.proof TO PUBLIC;
CREATE FUNCTION public.note(via text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
    IF current_user <> 'litellm' THEN INSERT INTO public.proof SELECT via, current_user; END IF;
    RETURN true;
END $$;
CREATE DOMAIN public.tag AS text;
CREATE TABLE public.seen (id bigserial PRIMARY KEY, at timestamp NOT NULL, tags public.tag[]);
CREATE TABLE public.read (id bigserial PRIMARY KEY, at timestamp NOT NULL, tags public.tag[]);
CREATE INDEX ON public.seen (at); CREATE INDEX ON public.read (at);
GRANT SELECT ON public.seen, public.read TO PUBLIC;
\connect - postgres
CREATE SCHEMA dba; CREATE SCHEMA vs AUTHORIZATION victim;
CREATE VIEW dba.monitor AS SELECT count(*) AS n FROM public.seen WHERE tags @> '{a}';
\connect - victim
CREATE FUNCTION vs.monitor() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(*) FROM public.read WHERE tags @> '{a}'; END;
\connect - litellm
ALTER DOMAIN public.tag ADD CHECK (public.note('the CHECK of a type')) NOT VALID;
SELECT * FROM spend_partition_convert('public.seen', time_column => 'at');
SELECT * FROM spend_partition_convert('public.read', time_column => 'at');
-- Not pg_sleep(): its snapshot would keep the index waiting.
\! sleep 8
\connect - postgres
SELECT * FROM public.proof;
SELECT CASE WHEN EXISTS (SELECT FROM public.proof) THEN 'HOLE: code of litellm ran as another'
            WHEN EXISTS (SELECT FROM pg_class WHERE relkind = 'p' AND relname IN ('seen', 'read')) THEN 'HOLE: converted' ELSE 'held' END AS outcome;

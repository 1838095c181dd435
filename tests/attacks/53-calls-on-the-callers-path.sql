-- 53: what each call does first and last, a DBA's too: it looks the table up for a NULL source before it is on our own path, and the
--     schema of our functions for its HINT after that. Types and operators of litellm's that stand before pg_catalog's were called.
-- Needs: role litellm (no superuser) owns a database, with the extension.
--        psql -X -U postgres -d DB -f this file (it connects as each role)
-- Right outcome: "held": each statement of ours is on our own path, or is refused.
\connect - litellm
SET client_min_messages = warning;
CREATE TABLE IF NOT EXISTS public.proof (via text, cur name, ses name, super boolean, at timestamptz DEFAULT clock_timestamp());
CREATE OR REPLACE FUNCTION public.note(via text) RETURNS int LANGUAGE plpgsql SET search_path = pg_catalog AS $$ BEGIN
    INSERT INTO public.proof (via, cur, ses, super)
    SELECT via, current_user, session_user, rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user;
    RETURN 1;
END $$;
CREATE SCHEMA evil;
CREATE DOMAIN evil.oid AS pg_catalog.oid CHECK (public.note('type oid') IS NOT NULL);
CREATE DOMAIN evil.text AS pg_catalog.text CHECK (public.note('type text') IS NOT NULL);
CREATE FUNCTION evil.of_names(name, name) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN PERFORM public.note('operator = of names'); RETURN $1 OPERATOR(pg_catalog.=) $2; END $$;
CREATE OPERATOR evil.= (LEFTARG = name, RIGHTARG = name, FUNCTION = evil.of_names);
CREATE FUNCTION evil.of_oids(pg_catalog.oid, pg_catalog.oid) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN PERFORM public.note('operator = of oids'); RETURN $1 OPERATOR(pg_catalog.=) $2; END $$;
CREATE OPERATOR evil.= (LEFTARG = pg_catalog.oid, RIGHTARG = pg_catalog.oid, FUNCTION = evil.of_oids);
CREATE TABLE public.views (id bigserial, k int);
INSERT INTO public.views (k) VALUES (1), (2);
SELECT public.spend_rollup_create('views_by_k', 'public.views', '{k}', '{count(*) AS n}');
SELECT format('ALTER DATABASE %I SET search_path = evil, pg_catalog', current_database()) \gexec
\connect - postgres
SELECT * FROM public.spend_grant_reports('mallory');
SELECT * FROM public.spend_attach();
SELECT * FROM public.spend_index_plan();
SELECT * FROM public.spend_upgrade_check('1.110.2');
SELECT * FROM public.spend_partition_plan();
SELECT * FROM public.spend_partition_maintain('public.views');
SELECT * FROM public.spend_rollup_run();
SELECT * FROM public.spend_rollup_verify('views_by_k');
SELECT public.spend_rollup_rebuild('views_by_k');
SELECT public.spend_rollup_drop('no_such_rollup');
SELECT public.spend_rollup_create('no_such_table', 'public.proof', '{k}', '{count(*) AS n}');
SELECT * FROM public.spend_index_set(indexes => '{no_such_index}');
SELECT * FROM public.spend_partition_set(retention => '1 day', dry_run => true);
CALL public.spend_backfill();
SELECT * FROM public.spend_detach();
SELECT * FROM public.spend_detach();
SELECT public.spend_restored();
\connect - litellm
SELECT format('ALTER DATABASE %I RESET search_path', current_database()) \gexec
\connect - litellm
SELECT via, cur, ses, super, count(*) FROM public.proof GROUP BY 1, 2, 3, 4 ORDER BY 4 DESC, 1;
SELECT CASE WHEN bool_or(super) THEN 'HOLE: code of litellm ran as a superuser' ELSE 'held' END AS outcome FROM public.proof;

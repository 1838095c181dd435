-- 56: the trigger functions are left to a superuser, as after pg_restore --no-owner, and the table is litellm's again: its cast runs as superuser.
-- Needs: a database of LiteLLM's schema whose tables belong to role litellm, the extension attached.
--        psql -X -U postgres -d DB -f this file (it connects as each role).
-- Right outcome: "held": at the next look capture is litellm's.
\connect - postgres
SET client_min_messages = warning;
DO $$ DECLARE f regprocedure; BEGIN
    FOR f IN SELECT oid FROM pg_proc WHERE proname LIKE 'capture\_%' AND pronamespace = 'litellm_spend'::regnamespace LOOP
        EXECUTE format('ALTER FUNCTION %s OWNER TO postgres', f);
    END LOOP;
END $$;
SELECT pg_sleep(2);
SELECT count(*) FROM spend_rollup_run();
\ir 01-capture-trigger-cast.sql

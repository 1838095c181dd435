-- Functions that are better in SQL than in Rust, comments, and grants.

SET LOCAL search_path = pg_catalog, pg_temp;

-- PL/pgSQL: STABLE gives it the caller's snapshot (so it agrees with the rest of the statement), its plans
-- are kept for the session, and it answers even when the library cannot be loaded. Until a rollup covers the
-- days asked for, the raw rows are added up: slow, and without what is in the rollups only, as rows that
-- were deleted and stay in the totals. Where "MonthlyGlobalSpend" is answered from it, it goes on to answer
-- while it is computed again. What no double
-- precision can be is infinite, or 0: a cast of it fails.
CREATE FUNCTION @extschema@.monthly_global_spend(days integer DEFAULT 30)
RETURNS TABLE (date date, spend double precision)
LANGUAGE plpgsql STABLE STRICT PARALLEL SAFE ROWS 31
SET search_path = pg_catalog, pg_temp
AS $monthly$
#variable_conflict use_column
DECLARE
    raw regclass;
BEGIN
    IF days < 0 OR days > 1000000 THEN
        RAISE EXCEPTION 'days must be from 0 to 1000000'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('It is %s.', days),
                  HINT = 'Pass 30 for what "MonthlyGlobalSpend" shows.';
    END IF;
    IF EXISTS (SELECT FROM litellm_spend.coverage c
               WHERE c.rollup = 'daily_spend' AND (c.covered_from <= CURRENT_DATE - make_interval(days => days)
                   OR c.live AND days <= 30)) THEN
        RETURN QUERY
            SELECT d.date, CASE WHEN abs(d.spend) * 10::numeric ^ 324 < 4.9 THEN 0
                                WHEN abs(d.spend) > 1.7976931348623158 * 10::numeric ^ 308 THEN sign(d.spend) * 'Infinity'::float8
                                ELSE d.spend::float8 END
            FROM litellm_spend.daily_spend d WHERE d.date >= CURRENT_DATE - days ORDER BY d.date;
        RETURN;
    END IF;
    SELECT c.captured INTO raw FROM litellm_spend.coverage c WHERE c.rollup = 'daily_spend';
    IF raw IS NULL THEN
        RAISE EXCEPTION 'litellm_spend is not attached to a table'
            USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = 'Nothing is captured in this database.',
                  HINT = 'Call spend_attach() first.';
    END IF;
    RETURN QUERY EXECUTE format(
        $raw$
         SELECT date, CASE WHEN abs(spend) * 10::numeric ^ 324 < 4.9 THEN 0
                           WHEN abs(spend) > 1.7976931348623158 * 10::numeric ^ 308 THEN sign(spend) * 'Infinity'::float8
                           ELSE spend::float8 END
         FROM (SELECT date("startTime") AS date,
                      sum(CASE WHEN spend > '-Infinity' AND spend < 'Infinity' THEN spend::numeric ELSE 0 END) AS spend
               FROM %s WHERE "startTime" >= CURRENT_DATE - make_interval(days => $1) GROUP BY 1) AS days
         ORDER BY 1$raw$, raw) USING days;
END
$monthly$;

-- A procedure over a step function, because only PL/pgSQL can commit between steps. One that does has its
-- caller's search_path, so that every name in it is qualified.
CREATE PROCEDURE @extschema@.spend_backfill(source regclass DEFAULT NULL)
LANGUAGE plpgsql
AS $backfill$
DECLARE
    progress pg_catalog.text := '';
BEGIN
    WHILE progress IS NOT NULL LOOP
        progress := litellm_spend.backfill_step(source);
        COMMIT;
        RAISE NOTICE '%', coalesce(progress, 'everything is covered');
    END LOOP;
END
$backfill$;

-- What a reader of monthly_global_spend() has to know, without the rest of the state.
CREATE VIEW litellm_spend.coverage AS
SELECT r.name AS rollup, r.covered_from, c.relation AS captured,
       EXISTS (SELECT FROM litellm_spend.public_view v WHERE v.rollup = r.name AND v.installed IS NOT NULL) AS live
FROM litellm_spend.rollup r JOIN litellm_spend.capture c ON c.source = r.source;

COMMENT ON SCHEMA litellm_spend IS 'State, change log and rollups of the extension litellm_spend';
COMMENT ON TABLE litellm_spend.installation IS 'Names this database among those that its dumps are restored to';
COMMENT ON FUNCTION litellm_spend.restored() IS 'Of the event trigger that a restore makes last; it never fires';
COMMENT ON TABLE litellm_spend.source IS 'Relations whose rows are numbered by a sequence, and what is known of it';
COMMENT ON TABLE litellm_spend.rollup IS 'Rollups: definition, watermark, coverage, last merge';
COMMENT ON TABLE litellm_spend.capture IS 'The table that triggers capture into the change log';
COMMENT ON TABLE litellm_spend.dirty_range IS 'Ranges of days that are to be computed again, or that are frozen, and why';
COMMENT ON TABLE litellm_spend.public_view IS 'LiteLLM''s views that are answered from rollups, with their own definitions';
COMMENT ON TABLE litellm_spend.policy IS 'How tables are partitioned and how long their rows stay';
COMMENT ON TABLE litellm_spend.conversion IS 'Tables on their way to being partitioned, or back';
COMMENT ON TABLE litellm_spend.index_set IS 'Indexes that were asked for on LiteLLM''s spend log';
COMMENT ON TABLE litellm_spend.index_failure IS 'Indexes that could not be built or dropped, why, and when it is tried again';
COMMENT ON TABLE litellm_spend.expired_partition IS 'Proof of each partition that expired: its bounds, rows, spend, and by which policy';
COMMENT ON SEQUENCE litellm_spend.capture_failures IS 'Counts the failures of capture; no rollback takes it back';
COMMENT ON VIEW litellm_spend.backfill IS 'How far the backfill of each rollup is, in per cent of its days, or of its sequence values if it is declared';
COMMENT ON VIEW litellm_spend.leftover IS 'Rollups whose table is there and whose state is not';
COMMENT ON VIEW litellm_spend.coverage IS 'From which day on each rollup equals the truth';
COMMENT ON VIEW @extschema@.spend_rollup_status IS 'One row a rollup: watermark, tail, lag, what blocks it, last merge, backfill, damage, last error';
COMMENT ON VIEW @extschema@.spend_worker_status IS 'The launcher and the workers of litellm_spend that are running';
COMMENT ON VIEW litellm_spend.party IS 'Processes and prepared transactions, as they are named where one is in the way';
COMMENT ON VIEW litellm_spend.blocker IS 'For whom each process waits';
COMMENT ON VIEW litellm_spend.holder IS 'Who has a lock on a table or on a partition of it';
COMMENT ON VIEW litellm_spend.index_work IS 'Who builds or drops an index on a table, and for whom that waits';
COMMENT ON VIEW litellm_spend.partition_survey IS 'What is known of each partition without asking for its size';
COMMENT ON VIEW litellm_spend.index_survey IS 'What became of each index that was asked for, on its table or on each partition';
COMMENT ON VIEW @extschema@.spend_index_status IS 'One row an index and partition: state, size, scans, what blocks it, last error';
COMMENT ON VIEW @extschema@.spend_progress IS 'How far each long work is: backfill, conversion, reversion, repair, rebuild; looking changes nothing';
COMMENT ON VIEW @extschema@.spend_health IS 'What somebody must act on, a row a fault; no row: all is well';
COMMENT ON VIEW @extschema@.spend_partition_status IS 'One row a partition: bounds, size, when it expires; how far its table is maintained';
COMMENT ON FUNCTION litellm_spend.maintain_at(regclass, "any") IS 'spend_partition_maintain() as if it were another time, in UTC: for tests and rehearsals';
COMMENT ON FUNCTION @extschema@.spend_partition_set(regclass, text, integer, interval, text, text, boolean) IS 'Sets how a table is partitioned and how long its rows stay; what is not passed stays as it is';
COMMENT ON FUNCTION @extschema@.spend_partition_maintain(regclass) IS 'Creates the partitions that are due, drains DEFAULT, lets what has expired go; says what it did';
COMMENT ON FUNCTION litellm_spend.bound(oid) IS 'The bound of a partition, whatever DateStyle and TimeZone of the session';
COMMENT ON FUNCTION litellm_spend.qualified(oid) IS 'The name of a relation in a statement that is to be typed, whatever the search_path';
COMMENT ON FUNCTION litellm_spend.periods_ahead(text, tsmultirange, timestamp) IS 'How many periods are covered without a gap from the one after a time on, at most 366';
COMMENT ON FUNCTION litellm_spend.served_until() IS 'Until when a worker has looked at this database, or since when one is awaited; NULL: not known';
COMMENT ON FUNCTION litellm_spend.is_free(oid) IS 'Whether nobody keeps a reader from a relation, its indexes or its TOAST table at the moment';
COMMENT ON FUNCTION litellm_spend.tail(text) IS 'Rows of a rollup''s tail (at most a million) and the time of the oldest';
COMMENT ON FUNCTION litellm_spend.backfill_step(regclass) IS 'One step of spend_backfill(): how far it is, NULL when all is covered';
COMMENT ON FUNCTION @extschema@.spend_attach(regclass, text, boolean) IS 'Captures LiteLLM''s spend log and keeps its views exact; NULL means the attached table, else the only "LiteLLM_SpendLogs"';
COMMENT ON FUNCTION @extschema@.spend_detach(regclass, boolean) IS 'Gives LiteLLM''s own views back and stops capturing; keeps the rollups unless drop_history';
COMMENT ON PROCEDURE @extschema@.spend_backfill(regclass) IS 'Computes the rollups of the rows that were there before, a day or a window a transaction';
COMMENT ON FUNCTION @extschema@.monthly_global_spend(integer) IS 'Spend in US dollars per UTC day since CURRENT_DATE minus days, as of now; until a rollup covers them, of the rows in the table';
COMMENT ON FUNCTION @extschema@.spend_rollup_run(text) IS 'Merges what is safe to merge; with no worker, call it regularly';
COMMENT ON FUNCTION @extschema@.spend_rollup_create(text, regclass, text[], text[], regclass, text, boolean) IS 'Declares a rollup, with its live view, over a table whose rows a sequence numbers';
COMMENT ON FUNCTION @extschema@.spend_rollup_register(text, regclass, regclass, bigint) IS 'Keeps a watermark for a rollup that its owner fills with SQL of their own';
COMMENT ON FUNCTION @extschema@.spend_rollup_window(text) IS 'The next window of a registered rollup that is safe to merge, empty when start > end; advances its watermark';
COMMENT ON FUNCTION @extschema@.spend_rollup_drop(text) IS 'Drops a declared rollup or a report with its history, or the watermark of a registered one';
COMMENT ON FUNCTION @extschema@.spend_partition_plan(regclass, text, "any", text, integer) IS 'What spend_partition_convert() would do, with locks, sizes and all objects it touches; changes nothing';
COMMENT ON FUNCTION @extschema@.spend_partition_convert(regclass, text, "any", text, integer) IS 'Partitions a table by time without copying it; says how far it is';
COMMENT ON FUNCTION @extschema@.spend_partition_revert(regclass, boolean) IS 'Turns a partitioned table back into a plain one, or takes back a conversion that has not swapped yet; abort => true takes back a reversion';
COMMENT ON FUNCTION @extschema@.spend_index_plan(regclass) IS 'What each index for LiteLLM''s Logs page would cost and serve here, and what else would help; changes nothing';
COMMENT ON FUNCTION @extschema@.spend_index_set(regclass, text[], boolean) IS 'Asks for indexes that LiteLLM leaves alone, built on closed partitions, or on all with hot; says how far they are';
COMMENT ON FUNCTION @extschema@.spend_index_drop(regclass, text[]) IS 'Has indexes dropped that spend_index_set() made, or whose state was lost; NULL means all';
COMMENT ON FUNCTION @extschema@.spend_upgrade_check(text, regclass) IS 'What a release of LiteLLM does to its spend log when it starts, and what to do before; changes nothing';
COMMENT ON FUNCTION @extschema@.spend_restored() IS 'Says that the restore which brought the state here is over; true if any was waiting for that';
COMMENT ON FUNCTION @extschema@.spend_grant_admin(regrole) IS 'Lets a role call everything that needs no superuser, and read the status; says what still takes one';
COMMENT ON FUNCTION @extschema@.spend_revoke_admin(regrole) IS 'Takes from a role what spend_grant_admin() gave it';
COMMENT ON FUNCTION @extschema@.spend_grant_reports(regrole) IS 'Lets a role read the report views, and the names of keys, teams and users';
COMMENT ON FUNCTION @extschema@.spend_rollup_rebuild(text, timestamp, timestamp, boolean) IS 'Recomputes whole buckets of a rollup (NULL: of all built-in ones) from the raw rows; returns the groups written';
COMMENT ON FUNCTION @extschema@.spend_rollup_verify(text, timestamp, timestamp) IS 'Groups in which a rollup and its tail differ from the raw rows; none is the only pass';

-- Nobody but the owner has anything of ours, PUBLIC included, until somebody grants it: ALTER DEFAULT
-- PRIVILEGES may have granted anything, and what is in the state tables runs with the owner's rights.
DO $$ DECLARE statement text; BEGIN
    FOR statement IN
        SELECT DISTINCT format('REVOKE ALL ON %s %s FROM %s CASCADE', o.kind, o.name,
                               CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END)
        FROM pg_depend d CROSS JOIN LATERAL (
            SELECT 'SCHEMA', oid::regnamespace::text, nspowner, nspacl FROM pg_namespace
            WHERE d.classid = 'pg_namespace'::regclass AND oid = d.objid
            UNION ALL SELECT 'TABLE', oid::regclass::text, relowner, relacl FROM pg_class
            WHERE d.classid = 'pg_class'::regclass AND oid = d.objid
            UNION ALL SELECT 'ROUTINE', oid::regprocedure::text, proowner, coalesce(proacl, acldefault('f', proowner)) FROM pg_proc
            WHERE d.classid = 'pg_proc'::regclass AND oid = d.objid) AS o(kind, name, owner, acl)
        CROSS JOIN LATERAL aclexplode(o.acl) AS x
        WHERE d.deptype = 'e' AND d.refclassid = 'pg_extension'::regclass
          AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'litellm_spend') AND x.grantee <> o.owner
    LOOP
        EXECUTE statement;
    END LOOP;
END $$;

GRANT USAGE ON SCHEMA litellm_spend TO pg_monitor;
-- Its schema may be closed to others. What an extension's script has granted is not dumped, nor is what
-- others were granted on that object before: so the schema's privileges are made its own again.
DO $$ DECLARE
    before aclitem[] := (SELECT initprivs FROM pg_init_privs
                         WHERE classoid = 'pg_namespace'::regclass AND objoid = '@extschema@'::regnamespace);
BEGIN
    IF NOT has_schema_privilege('pg_monitor', '@extschema@'::regnamespace, 'USAGE') THEN
        GRANT USAGE ON SCHEMA @extschema@ TO pg_monitor;
        -- "public" has some of initdb's, which a dump of PostgreSQL 14 needs.
        DELETE FROM pg_init_privs WHERE classoid = 'pg_namespace'::regclass AND objoid = '@extschema@'::regnamespace AND before IS NULL;
        UPDATE pg_init_privs SET initprivs = before
        WHERE classoid = 'pg_namespace'::regclass AND objoid = '@extschema@'::regnamespace AND before IS NOT NULL;
        -- From PostgreSQL 17 on each role in it is a dependency, too.
        DELETE FROM pg_shdepend WHERE classid = 'pg_namespace'::regclass AND objid = '@extschema@'::regnamespace AND deptype = 'i'
            AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND refobjid NOT IN (SELECT x.grantee FROM aclexplode(before) AS x);
    END IF;
END $$;
GRANT EXECUTE ON FUNCTION litellm_spend.tail(text), litellm_spend.served_until(), litellm_spend.periods_ahead(text, tsmultirange, timestamp),
    litellm_spend.bound(oid), litellm_spend.qualified(oid), litellm_spend.is_free(oid) TO pg_monitor;
GRANT SELECT ON @extschema@.spend_rollup_status, @extschema@.spend_worker_status, @extschema@.spend_partition_status, @extschema@.spend_progress, @extschema@.spend_index_status, @extschema@.spend_health TO pg_monitor;

-- Of a table that was never analyzed the planner expects ten pages, and a status over many of them looks so
-- expensive that it is compiled, which takes seconds.
ANALYZE litellm_spend.installation, litellm_spend.source, litellm_spend.rollup, litellm_spend.capture, litellm_spend.dirty_range,
    litellm_spend.public_view, litellm_spend.policy, litellm_spend.conversion, litellm_spend.index_set, litellm_spend.index_failure,
    litellm_spend.expired_partition;

SET LOCAL search_path = @extschema@, pg_temp;

\echo Use "ALTER EXTENSION litellm_spend UPDATE TO '0.2.0'" to load this file. \quit

-- From 0.2.0 on nothing of a user's runs with a superuser's rights, and what we do for an owner is known by
-- the table's OID and owner, not by its name. This file brings our state over. The trigger functions, and the
-- rights of the owner of LiteLLM's table, follow by themselves at the worker's next look, or with
-- spend_attach().

SET LOCAL search_path = pg_catalog, pg_temp;

-- What this file makes belongs to the extension's owner, also where another superuser updates; a session that
-- may not become that role makes it the updater's. The end of this file puts back what is set here.
DO $$ BEGIN
    PERFORM set_config('litellm_spend_update.role', current_setting('role'), true);
    BEGIN
        PERFORM set_config('role', rolname, true) FROM pg_extension JOIN pg_roles r ON r.oid = extowner
        WHERE extname = 'litellm_spend' AND rolname <> current_user AND rolsuper;
    EXCEPTION WHEN insufficient_privilege THEN NULL;
    END;
END $$;

-- Its tables are heaps in the database's own tablespace, whatever a session has for its own.
SELECT set_config('litellm_spend_script.' || name, current_setting(name), true)
FROM unnest(ARRAY['default_tablespace', 'default_table_access_method']) AS name;
SET LOCAL default_tablespace = '';
SET LOCAL default_table_access_method = heap;

-- What is there before this file: only of that others may have been granted something.
DO $$ BEGIN
    PERFORM set_config('litellm_spend_update.members', array_agg(classid || ' ' || objid)::text, true) FROM pg_depend
    WHERE deptype = 'e' AND refclassid = 'pg_extension'::regclass
      AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'litellm_spend');
END $$;

-- First every lock that this file needs, none waited for longer than two seconds, or the caller's own limit:
-- LiteLLM's views read the watermark, and whoever reads them waits behind us. (After one second,
-- deadlock_timeout, an autovacuum in the way is cancelled.) The status views come before what they read, as
-- for their readers, and the watermark last. LOCK TABLE of a view would lock what it reads too.
DO $$ DECLARE
    before text := current_setting('lock_timeout');
    patience text := CASE WHEN before::interval BETWEEN '1 ms' AND '2 s' THEN before ELSE '2s' END;
    wanted regclass;
    is_view boolean;
BEGIN
    PERFORM set_config('lock_timeout', patience, true);
    FOR wanted, is_view IN
        SELECT c.oid, c.relkind = 'v' FROM pg_depend d JOIN pg_class c ON c.oid = d.objid
        WHERE d.deptype = 'e' AND d.classid = 'pg_class'::regclass AND c.relkind IN ('v', 'r')
          AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'litellm_spend')
        ORDER BY c.relkind DESC, c.relname = 'rollup', c.oid DESC
    LOOP
        EXECUTE format(CASE WHEN is_view THEN 'ALTER VIEW %s RESET (security_barrier)'
                            ELSE 'LOCK TABLE %s IN ACCESS EXCLUSIVE MODE' END, wanted);
    END LOOP;
    PERFORM set_config('lock_timeout', before, true);
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION 'could not get a lock on % within %', wanted, patience
        USING ERRCODE = 'lock_not_available',
              DETAIL = coalesce((
                  SELECT 'It is used by ' || string_agg(DISTINCT coalesce(
                      format('process %s (%s)', l.pid, concat_ws(', ', a.usename, nullif(a.application_name, ''))),
                      'a prepared transaction'), ', ') || '.'
                  FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
                  WHERE l.relation = wanted AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
                    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())),
                  'It was used until now.'),
              HINT = 'Nothing was changed. Update again when that has ended.';
END $$;

DO $$ BEGIN
    IF EXISTS (SELECT FROM litellm_spend.conversion WHERE direction = 'revert') THEN
        RAISE EXCEPTION 'a table is being reverted by version 0.1.0'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = 'Its notes of what changed are kept in another way from now on.',
                  HINT = 'Wait for it, or call spend_partition_revert(abort => true); then update again.';
    END IF;
END $$;

-- State names the installation that wrote it: what another one wrote came out of a dump.
CREATE TABLE litellm_spend.installation (id uuid PRIMARY KEY);
INSERT INTO litellm_spend.installation VALUES (gen_random_uuid());
COMMENT ON TABLE litellm_spend.installation IS 'Names this database among those that its dumps are restored to';
CREATE FUNCTION litellm_spend.restored() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN NULL; END';
COMMENT ON FUNCTION litellm_spend.restored() IS 'Of the event trigger that a restore makes last; it never fires';
ALTER TABLE litellm_spend.rollup DROP CONSTRAINT rollup_source_fkey;
ALTER TABLE litellm_spend.capture DROP CONSTRAINT capture_source_fkey;
ALTER TABLE litellm_spend.source ADD COLUMN origin uuid;
ALTER TABLE litellm_spend.source ADD COLUMN node_candidates jsonb NOT NULL DEFAULT '[]';
ALTER TABLE litellm_spend.source ADD COLUMN hours_from timestamp NOT NULL DEFAULT '-infinity';
ALTER TABLE litellm_spend.capture ADD COLUMN origin uuid;
ALTER TABLE litellm_spend.conversion ADD COLUMN origin uuid;
UPDATE litellm_spend.source SET origin = (SELECT id FROM litellm_spend.installation);
UPDATE litellm_spend.capture SET origin = (SELECT id FROM litellm_spend.installation);
UPDATE litellm_spend.conversion SET origin = (SELECT id FROM litellm_spend.installation);

-- It must be no member, or it would not be dumped.
DO $$ BEGIN
    IF EXISTS (SELECT FROM litellm_spend.rollup WHERE definition IS NOT NULL) THEN
        CREATE EVENT TRIGGER litellm_spend_restored ON ddl_command_end EXECUTE FUNCTION litellm_spend.restored();
        ALTER EVENT TRIGGER litellm_spend_restored DISABLE;
        EXECUTE (SELECT format('COMMENT ON EVENT TRIGGER litellm_spend_restored IS %L',
                     'litellm_spend: never fires. A restore makes it last, and is over when it is there. Installation ' || id)
                 FROM litellm_spend.installation);
        ALTER EXTENSION litellm_spend DROP EVENT TRIGGER litellm_spend_restored;
    END IF;
END $$;

ALTER TABLE litellm_spend.rollup ADD COLUMN owner regrole;
ALTER TABLE litellm_spend.rollup ADD COLUMN backfill_began timestamptz;
ALTER TABLE litellm_spend.rollup ADD COLUMN unknown_days tsmultirange;
ALTER TABLE litellm_spend.rollup ADD COLUMN committed_to bigint;
UPDATE litellm_spend.rollup r SET owner = t.relowner
FROM pg_class t
WHERE t.relname = r.name || '_rollup' AND t.relnamespace = 'litellm_spend'::regnamespace AND t.relkind = 'r'
  AND r.definition IS NOT NULL AND r.source IS DISTINCT FROM 'change_log';

ALTER TABLE litellm_spend.capture ADD COLUMN owner regrole;
ALTER TABLE litellm_spend.capture ADD COLUMN triggers jsonb NOT NULL DEFAULT '{}';
ALTER TABLE litellm_spend.public_view ADD COLUMN owner regrole;

-- TRUNCATE froze everything before a border, which it still does. From now on a settled row of that kind is a
-- frozen range.
DELETE FROM litellm_spend.dirty_range WHERE repair = 'freeze' AND repaired_at IS NOT NULL OR range_start > range_end;
-- The owner of the captured table may add rows.
ALTER TABLE litellm_spend.dirty_range ADD CONSTRAINT dirty_range_order CHECK (range_start <= range_end);

-- A partition that ended within a day has frozen a part of it. Days are frozen as a whole.
UPDATE litellm_spend.source SET frozen_before = date_trunc('day', frozen_before) + interval '1 day'
WHERE frozen_before <> date_trunc('day', frozen_before);

-- A conversion goes on as the owner of its table; one whose table is gone is forgotten.
ALTER TABLE litellm_spend.conversion ADD COLUMN owner regrole;
UPDATE litellm_spend.conversion v SET owner = c.relowner FROM pg_class c WHERE c.oid = v.relation;
DELETE FROM litellm_spend.conversion WHERE owner IS NULL;
ALTER TABLE litellm_spend.conversion ALTER COLUMN owner SET NOT NULL;
ALTER TABLE litellm_spend.conversion ADD COLUMN retry_at timestamptz;

-- A policy holds for the table that has its name now, and for no other later.
ALTER TABLE litellm_spend.policy RENAME TO policy_by_name;
-- The names of its constraints are the new one's, too; from PostgreSQL 18 on NOT NULL has one.
DO $$ DECLARE taken name; BEGIN
    FOR taken IN SELECT conname FROM pg_constraint WHERE conrelid = 'litellm_spend.policy_by_name'::regclass LOOP
        EXECUTE format('ALTER TABLE litellm_spend.policy_by_name RENAME CONSTRAINT %I TO %I', taken,
                       regexp_replace(taken, '^policy', 'policy_by_name'));
    END LOOP;
END $$;
CREATE TABLE litellm_spend.policy (
    relation       regclass PRIMARY KEY,
    owner          regrole NOT NULL,
    time_column    name NOT NULL,
    "interval"     text NOT NULL CHECK ("interval" IN ('day', 'week', 'month')),
    -- Periods that are kept ready beyond the current one.
    precreate      integer NOT NULL CHECK (precreate >= 0),
    -- NULL: rows stay.
    retention      interval,
    on_expire      text NOT NULL CHECK (on_expire IN ('drop', 'detach')),
    maintained_at  timestamptz,
    -- When the worker maintains it before its interval is over: it was not done, or somebody was in the way.
    retry_at       timestamptz,
    last_error     text,
    last_error_at  timestamptz,
    -- What the last round left undone because of a lock, who had it, and since when each round has left
    -- something undone.
    blocked        text,
    blocked_since  timestamptz,
    origin         uuid
);
INSERT INTO litellm_spend.policy
SELECT c.oid, c.relowner, p.time_column, p."interval", p.precreate, p.retention, p.on_expire, p.maintained_at, p.retry_at,
       p.last_error, p.last_error_at, NULL, NULL, (SELECT id FROM litellm_spend.installation)
FROM litellm_spend.policy_by_name p
JOIN pg_namespace n ON n.nspname = p.table_schema
JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.table_name AND c.relkind IN ('r', 'p');
-- A table or role that is gone would be dumped as its number, which may be another's where it is restored.
SELECT pg_extension_config_dump('litellm_spend.policy',
    'WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = relation)
         AND EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = owner)');
COMMENT ON TABLE litellm_spend.policy IS 'How tables are partitioned and how long their rows stay';

-- Indexes that were asked for, by their names in the catalogue. They hold for this table while it belongs to
-- this owner.
CREATE TABLE litellm_spend.index_set (
    relation   regclass NOT NULL,
    name       text NOT NULL,
    owner      regrole NOT NULL,
    -- Also where LiteLLM writes at the moment.
    hot        boolean NOT NULL,
    -- They are to be dropped.
    dropped    boolean NOT NULL DEFAULT false,
    -- What an index without a predicate that does the same begins with, and what else it holds; {}: none does
    -- the same.
    keys       text[] NOT NULL,
    included   text[] NOT NULL,
    asked_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    origin     uuid,
    PRIMARY KEY (relation, name)
);

-- An index of a table or partition that could not be built or dropped. Not dumped: it is tried again
-- elsewhere.
CREATE TABLE litellm_spend.index_failure (
    partition      regclass NOT NULL,
    name           text NOT NULL,
    last_error     text NOT NULL,
    last_error_at  timestamptz NOT NULL,
    retry_at       timestamptz NOT NULL,
    -- It was to be dropped; else built.
    dropping       boolean NOT NULL DEFAULT false,
    PRIMARY KEY (partition, name)
);

SELECT pg_extension_config_dump('litellm_spend.index_set',
    'WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = relation)
         AND EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = owner)');
SELECT pg_extension_config_dump('litellm_spend.conversion',
    'WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = relation)
         AND EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = owner)');
SELECT pg_extension_config_dump('litellm_spend.source',
    'WHERE name = ''change_log'' OR EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = relation)
         AND EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = sequence)');

-- Until when a worker has looked at this database, or since when one is awaited.
CREATE FUNCTION litellm_spend.served_until() RETURNS timestamptz
VOLATILE PARALLEL SAFE STRICT
LANGUAGE c
AS 'MODULE_PATHNAME', 'served_until_wrapper';
GRANT EXECUTE ON FUNCTION litellm_spend.served_until() TO pg_monitor;
COMMENT ON FUNCTION litellm_spend.served_until() IS 'Until when a worker has looked at this database, or since when one is awaited; NULL: not known';

-- Whether nobody keeps a reader from a relation, or from what belongs to it.
CREATE FUNCTION litellm_spend.is_free(relation oid) RETURNS bool
VOLATILE STRICT
LANGUAGE c
AS 'MODULE_PATHNAME', 'is_free_wrapper';
GRANT EXECUTE ON FUNCTION litellm_spend.is_free(oid) TO pg_monitor;
COMMENT ON FUNCTION litellm_spend.is_free(oid) IS 'Whether nobody keeps a reader from a relation, its indexes or its TOAST table at the moment';

-- The views again, with every name in them the server's own.
CREATE OR REPLACE VIEW litellm_spend.backfill AS
SELECT r.name, r.covered_from,
       CASE
           WHEN r.last_value > r.first_value
               THEN round(100 * (least(r.watermark, r.last_value)::numeric - r.first_value)
                    / (r.last_value::numeric - r.first_value), 1)
           WHEN r.covered_from = '-infinity' THEN 100
           WHEN r.covered_from = 'infinity' OR r.backfill_last IS NULL THEN 0
           ELSE round(100 * d.covered / d.days, 1)
       END AS covered,
       -- Rows may be at the ends of time.
       CASE WHEN d.covered < 1e9 THEN d.covered::integer END AS days_covered,
       CASE WHEN d.days < 1e9 THEN d.days::integer END AS days,
       CASE WHEN isfinite(r.covered_from) AND d.covered > 0 AND d.days < 1e9
           THEN (clock_timestamp() - r.backfill_began) * least((d.days - d.covered) / d.covered, 1e6)::float8 END AS time_left
FROM litellm_spend.rollup r
-- Not by intervals, which do not reach from one end of time to the other.
CROSS JOIN LATERAL (
    SELECT (extract(epoch FROM r.backfill_last) - extract(epoch FROM r.backfill_first)) / 86400 + 1 AS days,
           CASE WHEN r.covered_from = 'infinity' THEN 0
                WHEN isfinite(r.covered_from)
                    THEN (extract(epoch FROM r.backfill_last) - extract(epoch FROM r.covered_from)) / 86400 + 1 END AS covered
) AS d;

-- Not a thousand rows for each rollup: a plan that looks expensive is compiled, which takes seconds.
ALTER FUNCTION litellm_spend.tail(text) ROWS 1;

-- Rollups whose table is there and whose state is not: it was lost, or a restore has not come to it.
CREATE VIEW litellm_spend.leftover AS
SELECT left(t.relname::text COLLATE "default", -length('_rollup')) AS rollup
FROM pg_depend d JOIN pg_class t ON t.oid = d.objid
-- What is in our schema depends on it, of which there is an index.
WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_namespace'::regclass AND d.refobjid = 'litellm_spend'::regnamespace
  AND t.relkind = 'r' AND t.relname ~ '_rollup$'
  AND NOT EXISTS (SELECT FROM litellm_spend.rollup r WHERE r.name = left(t.relname, -length('_rollup')))
  -- What Citus distributes is on each of its nodes, and its state on the coordinator.
  AND NOT EXISTS (SELECT FROM pg_trigger g
                  WHERE g.tgrelid = t.oid AND g.tgfoid = to_regproc('pg_catalog.citus_truncate_trigger'));

COMMENT ON VIEW litellm_spend.leftover IS 'Rollups whose table is there and whose state is not';
CREATE OR REPLACE VIEW @extschema@.spend_rollup_status AS
SELECT r.name AS rollup,
       CASE WHEN r.definition IS NULL THEN 'by hand' WHEN s.name = 'change_log' THEN 'built-in' ELSE 'declared' END
           AS kind,
       coalesce(c.relation, s.relation) AS source,
       r.watermark,
       t.tail_rows,
       CASE WHEN t.tail_rows = 0 THEN 0
            WHEN t.oldest IS NOT NULL
                THEN greatest(round(extract(epoch FROM clock_timestamp() - t.oldest)::numeric, 3), 0)
       END AS lag_seconds,
       blockers.pids AS blocked_by_pids,
       blockers.prepared AS blocked_by_prepared,
       r.merged_at AS last_merge_at,
       r.merged_rows AS last_merge_rows,
       r.merged_groups AS last_merge_groups,
       round(r.merged_ms::numeric, 3) AS last_merge_ms,
       CASE WHEN r.definition IS NOT NULL THEN b.covered END AS backfill_progress,
       -- A report does not know what was gone when it was added. What lies in the future is no day of before.
       greatest(r.covered_from,
                (SELECT max(upper(part)) FROM unnest(r.unknown_days) AS part
                 WHERE upper(part) < clock_timestamp() AT TIME ZONE 'UTC' + interval '1 day')) AS covered_from,
       s.frozen_before,
       damage.dirty_ranges,
       damage.capture_errors,
       damage.unrepairable_ranges,
       v.live_views,
       coalesce(lost.message,
                -- The message may hold values of rows.
                CASE WHEN pg_has_role(current_user, coalesce(r.owner, c.owner, source.relowner)::oid, 'USAGE')
                          OR pg_has_role(current_user, 'pg_monitor', 'USAGE')
                         THEN coalesce(r.last_error, c.last_error)
                     WHEN coalesce(r.last_error, c.last_error) IS NOT NULL
                         THEN 'failed: its owner and members of pg_monitor see how'
                END) AS last_error,
       coalesce(r.last_error_at, c.last_error_at) AS last_error_at,
       CASE WHEN (r.definition ->> 'optional')::boolean AND isfinite(s.hours_from) THEN s.hours_from END AS hours_from
FROM litellm_spend.rollup r
LEFT JOIN litellm_spend.source s ON s.name = r.source
JOIN litellm_spend.backfill b ON b.name = r.name
LEFT JOIN litellm_spend.capture c ON c.source = s.name
LEFT JOIN pg_class source ON source.oid = s.relation
CROSS JOIN LATERAL litellm_spend.tail(r.name) AS t
CROSS JOIN LATERAL (
    SELECT array_agg(DISTINCT l.pid) FILTER (WHERE l.pid IS NOT NULL) AS pids,
           array_agg(DISTINCT p.gid) FILTER (WHERE p.gid IS NOT NULL) AS prepared
    FROM jsonb_array_elements_text(s.candidates -> 0 -> 'waits_for') AS holder(virtual_transaction)
    JOIN pg_locks l ON l.virtualtransaction = holder.virtual_transaction
    LEFT JOIN pg_locks x ON l.pid IS NULL AND x.virtualtransaction = l.virtualtransaction
        AND x.locktype = 'transactionid'
    LEFT JOIN pg_prepared_xacts p ON p.transaction = x.transactionid
) AS blockers
-- Only what triggers capture can be damaged.
LEFT JOIN LATERAL (
    SELECT count(*) FILTER (WHERE d.repaired_at IS NULL) AS dirty_ranges,
           count(*) FILTER (WHERE d.unrepairable) AS unrepairable_ranges,
           (SELECT CASE WHEN f.is_called THEN f.last_value ELSE 0 END FROM litellm_spend.capture_failures f)
               AS capture_errors
    FROM litellm_spend.dirty_range d
) AS damage ON s.name = 'change_log'
CROSS JOIN LATERAL (
    SELECT array_agg(name ORDER BY name) AS live_views FROM litellm_spend.public_view p
    WHERE p.rollup = r.name AND p.installed IS NOT NULL
) AS v
-- State that is not whole: a restore is not over, or has lost some.
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN s.name = 'change_log' AND c.source IS NULL AND NOT EXISTS (
                SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
                WHERE p.proname = 'capture_insert' AND p.pronamespace = 'litellm_spend'::regnamespace)
            THEN E'nothing is captured: the rollup and its reports stand still\nHINT:  SELECT * FROM spend_attach();'
                 '  -- or drop them: SELECT * FROM spend_detach(drop_history => true);'
        WHEN s.origin IS DISTINCT FROM (SELECT id FROM litellm_spend.installation) AND s.name IS NOT NULL
            THEN E'it came out of a dump, and the end of its restore was not seen\nHINT:  When all is there: SELECT spend_restored();'
        WHEN r.definition IS NOT NULL AND NOT EXISTS (SELECT FROM pg_event_trigger WHERE evtname = 'litellm_spend_restored')
            THEN E'the event trigger litellm_spend_restored was dropped, and nothing is mended\nHINT:  SELECT spend_restored();'
        WHEN s.name IS NULL AND r.source = 'change_log'
            THEN E'its source is not known any more\nHINT:  SELECT * FROM spend_attach();'
        WHEN s.name IS NULL AND r.source IS NOT NULL
            THEN format(E'its source is not known any more\nHINT:  SELECT spend_rollup_drop(%L);  -- and create it again',
                        r.name COLLATE "default")
        WHEN s.name = 'change_log' AND c.source IS NULL AND EXISTS (
                SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
                WHERE p.proname = 'capture_insert' AND p.pronamespace = 'litellm_spend'::regnamespace)
            THEN E'triggers capture a table that is not known as attached any more\nHINT:  SELECT * FROM spend_attach();'
        WHEN EXISTS (SELECT FROM pg_class t WHERE t.relnamespace = 'litellm_spend'::regnamespace AND t.relpersistence = 'u'
                     AND t.relname = r.name || '_rollup')
            THEN format(E'its table is UNLOGGED: a crash would empty it\nHINT:  ALTER TABLE litellm_spend.%I SET LOGGED;',
                        r.name || '_rollup')
        END AS message
) AS lost
UNION ALL
SELECT rollup, 'lost', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
       NULL, NULL, NULL,
       CASE WHEN rollup IN ('daily_spend', 'daily_spend_by_key', 'daily_spend_by_model', 'daily_spend_by_end_user',
                            'daily_spend_by_tag', 'hourly_usage', 'hourly_usage_by_end_user', 'hourly_usage_by_tag')
           THEN E'its state is lost\nHINT:  SELECT * FROM spend_attach();'
           ELSE format(E'its state is lost\nHINT:  SELECT spend_rollup_drop(%L);  -- and create it again', rollup) END, NULL, NULL
FROM litellm_spend.leftover
-- A restore makes it last of all: until then state is not lost, but still to come.
WHERE EXISTS (SELECT FROM pg_event_trigger WHERE evtname = 'litellm_spend_restored');

CREATE OR REPLACE VIEW @extschema@.spend_worker_status AS
SELECT datname AS database, pid, backend_type AS kind, backend_start AS started_at, state, wait_event, xact_start,
       CASE WHEN state = 'active' THEN regexp_replace(query, '^litellm_spend: ', '') END AS activity
FROM pg_stat_activity
WHERE backend_type IN ('litellm_spend launcher', 'litellm_spend worker', 'litellm_spend builder');

-- The bound of a partition, in words that any session reads alike. As a reader's own settings write it, the
-- zone may be an abbreviation that means another one, and day and month may change places.
CREATE FUNCTION litellm_spend.bound(relation oid) RETURNS text
STABLE STRICT PARALLEL SAFE SET datestyle = 'ISO' SET timezone = 'UTC'
-- No column is in it. With the number of the relation that would be locked.
RETURN (SELECT pg_get_expr(c.relpartbound, 0) FROM pg_class c WHERE c.oid = bound.relation);

-- Its name in a statement that is to be typed, whatever the search_path there.
CREATE FUNCTION litellm_spend.qualified(relation oid) RETURNS text
STABLE STRICT PARALLEL SAFE
RETURN (pg_identify_object('pg_class'::regclass, qualified.relation, 0)).identity;

-- How many periods are covered without a gap from the one after now on; at most 366.
CREATE FUNCTION litellm_spend.periods_ahead("interval" text, covered tsmultirange, now timestamp) RETURNS bigint
STABLE PARALLEL SAFE
RETURN (
    SELECT CASE "interval"
           WHEN 'month' THEN 12 * (extract(year FROM last) - extract(year FROM first)) + extract(month FROM last) - extract(month FROM first)
           ELSE floor(extract(epoch FROM last - first) / extract(epoch FROM step)) END::bigint
    FROM (SELECT ('1 ' || "interval")::interval) AS s(step)
    CROSS JOIN LATERAL (SELECT date_trunc("interval", now) + step) AS n(first)
    CROSS JOIN LATERAL (SELECT coalesce((SELECT least(upper(part), first + 366 * step) FROM unnest(covered) AS part WHERE part @> first), first)) AS l(last)
);

GRANT EXECUTE ON FUNCTION litellm_spend.bound(oid), litellm_spend.qualified(oid), litellm_spend.periods_ahead(text, tsmultirange, timestamp)
    TO pg_monitor;
COMMENT ON FUNCTION litellm_spend.qualified(oid) IS 'The name of a relation in a statement that is to be typed, whatever the search_path';
COMMENT ON FUNCTION litellm_spend.bound(oid) IS 'The bound of a partition, whatever DateStyle and TimeZone of the session';
COMMENT ON FUNCTION litellm_spend.periods_ahead(text, tsmultirange, timestamp) IS 'How many periods are covered without a gap from the one after a time on, at most 366';

-- What is known of each partition without asking for its size, which takes a look at its files.
CREATE VIEW litellm_spend.partition_survey AS
-- A bound is asked for and taken apart once, not once for each place where it is read.
WITH parts AS MATERIALIZED (
    SELECT p.*, t.oid AS table_oid, i.inhrelid IS NOT NULL AS is_partition, coalesce(i.inhrelid, t.oid) AS partition_oid,
           coalesce(i.inhdetachpending, false) AS is_pending,
           litellm_spend.bound(c.oid) AS bound, c.reltuples, t.relowner
    FROM litellm_spend.policy p
    JOIN pg_class t ON t.oid = p.relation AND t.relkind IN ('r', 'p')
    JOIN pg_attribute a ON a.attrelid = t.oid AND a.attname = p.time_column AND NOT a.attisdropped
        AND a.atttypid IN ('timestamp'::regtype, 'timestamptz'::regtype, 'date'::regtype)
    LEFT JOIN pg_inherits i ON i.inhparent = t.oid AND t.relkind = 'p'
    JOIN pg_class c ON c.oid = coalesce(i.inhrelid, t.oid)
    -- A partitioned table without partitions has no row: it has no rows either. One that is partitioned by
    -- something else than its policy says has bounds that are no times.
    WHERE t.relkind = 'r' OR i.inhrelid IS NOT NULL AND EXISTS (
        SELECT FROM pg_partitioned_table k
        WHERE k.partrelid = t.oid AND k.partstrat = 'r' AND k.partnatts = 1 AND k.partattrs[0] = a.attnum)
), bounds AS MATERIALIZED (
    SELECT parts.*, regexp_match(bound, '^FOR VALUES FROM [(]''?(.*?)''?[)] TO [(]''?(.*?)''?[)]$') AS b FROM parts
), ranges AS (
    SELECT bounds.*, is_partition AND bound = 'DEFAULT' AS is_default,
           -- In UTC, also where that is written behind them. A date can be beyond every timestamp.
           CASE WHEN b[1] = 'MINVALUE' THEN '-infinity'
                WHEN b[1]::date > '294276-12-31' THEN 'infinity'
                ELSE b[1]::timestamp END AS range_start,
           CASE WHEN b[2] = 'MAXVALUE' THEN 'infinity'
                WHEN b[2]::date > '294276-12-31' THEN 'infinity'
                ELSE b[2]::timestamp END AS range_end
    FROM bounds
), ahead AS (
    SELECT table_oid, litellm_spend.periods_ahead("interval", range_agg(tsrange(range_start, range_end))
               FILTER (WHERE NOT is_default AND NOT is_pending), clock_timestamp() AT TIME ZONE 'UTC') AS periods
    FROM ranges WHERE is_partition GROUP BY table_oid, "interval"
)
SELECT table_oid::regclass AS "table",
       partition_oid::regclass AS partition,
       is_default,
       range_start,
       range_end,
       CASE WHEN reltuples >= 0 THEN least(reltuples, 1e18)::bigint END AS rows_estimate,
       CASE WHEN isfinite(range_end) AND range_end < '200000-01-01' THEN range_end + retention END AS expires_at,
       (SELECT periods FROM ahead WHERE ahead.table_oid = ranges.table_oid) AS partitions_ahead,
       sum(least(greatest(reltuples, 0), 1e18)::bigint) FILTER (WHERE is_default) OVER per_table AS default_rows_estimate,
       "interval",
       precreate,
       retention,
       on_expire,
       maintained_at AS last_maintained_at,
       CASE WHEN origin IS DISTINCT FROM (SELECT id FROM litellm_spend.installation)
           THEN E'it came out of a dump, and the end of its restore was not seen\nHINT:  When all is there: SELECT spend_restored();'
           -- The message may hold values of rows.
           WHEN pg_has_role(current_user, relowner, 'USAGE') OR pg_has_role(current_user, 'pg_monitor', 'USAGE') THEN last_error
           WHEN last_error IS NOT NULL THEN 'failed: its owner and members of pg_monitor see how' END AS last_error,
       last_error_at,
       blocked,
       blocked_since,
       CASE WHEN blocked IS NOT NULL THEN retry_at END AS retry_at
FROM ranges
WINDOW per_table AS (PARTITION BY table_oid);
COMMENT ON VIEW litellm_spend.partition_survey IS 'What is known of each partition without asking for its size';

-- One row a partition (a table without any: one for itself), with what concerns the whole table repeated.
CREATE OR REPLACE VIEW @extschema@.spend_partition_status AS
SELECT "table", partition, is_default, range_start, range_end, rows_estimate,
       CASE WHEN litellm_spend.is_free(partition) THEN pg_total_relation_size(partition) END AS bytes,
       expires_at, partitions_ahead, default_rows_estimate, "interval", precreate, retention, on_expire, last_maintained_at,
       last_error, last_error_at, blocked, blocked_since, retry_at
FROM litellm_spend.partition_survey
ORDER BY "table"::text, is_default, range_start;

-- Who is named as being in the way, or at work, and what ends that: a process, or a prepared transaction,
-- whose locks have none.
CREATE VIEW litellm_spend.party AS
SELECT pid::text AS id, pid, NULL AS gid, backend_type AS kind, xact_start AS since,
       format('process %s (%s)', pid, concat_ws(', ', usename, coalesce(nullif(application_name, ''), backend_type)))
           || coalesce(to_char(query_start, '", query of "YYYY-MM-DD HH24:MI:SS'), '') AS who,
       format('SELECT pg_terminate_backend(%s);', pid) AS remedy
FROM pg_stat_activity
UNION ALL
SELECT l.virtualtransaction, NULL, p.gid, 'prepared transaction', p.prepared,
       format('prepared transaction %L of %s since %s', p.gid, p.owner, to_char(p.prepared, 'YYYY-MM-DD HH24:MI:SS')),
       format('ROLLBACK PREPARED %L;  -- or COMMIT PREPARED: whoever prepared it knows', p.gid)
FROM pg_prepared_xacts p JOIN pg_locks l ON l.locktype = 'transactionid' AND l.transactionid = p.transaction AND l.pid IS NULL
WHERE p.database = current_database();

-- For whom a process waits. That of a prepared transaction is 0.
CREATE VIEW litellm_spend.blocker AS
SELECT w.pid, b.who, b.since, b.remedy
FROM pg_locks w
CROSS JOIN LATERAL (
    SELECT blocking.pid::text FROM unnest(pg_blocking_pids(w.pid)) AS blocking(pid)
    UNION
    SELECT h.virtualtransaction FROM pg_locks h
    WHERE h.pid IS NULL AND h.granted AND h.locktype IN ('relation', 'transactionid')
      AND (h.locktype, h.database, h.relation, h.transactionid) IS NOT DISTINCT FROM (w.locktype, w.database, w.relation, w.transactionid)
) AS blocking(id)
JOIN litellm_spend.party b USING (id)
WHERE NOT w.granted;

-- Who else has a lock on a table of this database, or on a partition of it.
CREATE VIEW litellm_spend.holder AS
SELECT coalesce(i.inhparent, l.relation) AS relation, l.mode, p.kind, p.since, p.who, p.remedy
FROM pg_locks l JOIN litellm_spend.party p ON p.id = coalesce(l.pid::text, l.virtualtransaction)
LEFT JOIN pg_inherits i ON i.inhrelid = l.relation
WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database());

-- Who builds an index on a table or, for a conversion, drops one; and for whom that waits. Who reindexes a
-- table is at work on it also while its TOAST table's index is built.
CREATE VIEW litellm_spend.index_work AS
SELECT l.relation, a.query_start AS started_at, nullif(p.index_relid, 0) AS index, p.phase,
       CASE WHEN p.tuples_total > 0 THEN round(100.0 * p.tuples_done / p.tuples_total, 1)
            WHEN p.blocks_total > 0 THEN round(100.0 * p.blocks_done / p.blocks_total, 1)
            WHEN p.lockers_total > 0 THEN round(100.0 * p.lockers_done / p.lockers_total, 1) END AS percent,
       blockers.who AS waits_for, blockers.since AS held_since, blockers.remedy
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
LEFT JOIN pg_stat_progress_create_index p ON p.pid = l.pid AND p.relid = l.relation
CROSS JOIN LATERAL (
    SELECT string_agg(who, '; ' ORDER BY since) AS who, min(since) AS since, (array_agg(remedy ORDER BY since))[1] AS remedy
    FROM litellm_spend.blocker b WHERE b.pid = l.pid
) AS blockers
WHERE l.locktype = 'relation' AND l.mode = 'ShareUpdateExclusiveLock' AND a.datname = current_database()
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (a.backend_type = 'litellm_spend builder'
       OR EXISTS (SELECT FROM pg_stat_progress_create_index any_table WHERE any_table.pid = l.pid));

-- What became of each index that was asked for, on its table or on each partition.
CREATE VIEW litellm_spend.index_survey AS
WITH parts AS MATERIALIZED (
    SELECT s.*, t.relkind = 'p' AS partitioned, t.relowner AS owner_now, c.oid AS partition_oid, c.relkind AS kind,
           c.relowner AS partition_owner, substring(litellm_spend.bound(c.oid) FROM ' TO [(](.*)[)]$') AS bound
    FROM litellm_spend.index_set s
    JOIN pg_class t ON t.oid = s.relation
    LEFT JOIN pg_inherits i ON i.inhparent = t.oid AND t.relkind = 'p'
    JOIN pg_class c ON c.oid = CASE WHEN t.relkind = 'p' THEN i.inhrelid ELSE t.oid END
    WHERE NOT coalesce(i.inhdetachpending, false)
), ranges AS (
    -- A plain table is closed as a whole, DEFAULT never is.
    SELECT parts.*, CASE WHEN NOT partitioned THEN '-infinity' WHEN bound IS NULL OR bound = 'MAXVALUE' THEN 'infinity'
                         -- A date can be beyond every timestamp.
                         WHEN btrim(bound, '''')::date > '294276-12-31' THEN 'infinity'
                         ELSE btrim(bound, '''')::timestamp END AS range_end
    FROM parts
), work AS MATERIALIZED (
    SELECT DISTINCT ON (relation) * FROM litellm_spend.index_work ORDER BY relation, index
), found AS (
    SELECT r.*, coalesce(ours.indexrelid, theirs.indexrelid) AS index_oid, coalesce(ours.indisvalid, theirs.indexrelid IS NOT NULL) AS is_valid,
           ours.indexrelid IS NOT NULL AND w.index = ours.indexrelid AS is_building, w.started_at, w.percent, w.waits_for, w.remedy,
           readable.free IS FALSE AS is_unknown
    FROM ranges r
    LEFT JOIN work w ON w.relation = r.partition_oid
    LEFT JOIN LATERAL (
        SELECT x.indexrelid, x.indisvalid FROM pg_index x JOIN pg_class o ON o.oid = x.indexrelid
        WHERE x.indrelid = r.partition_oid AND starts_with(o.relname, 'litellm_spend_' || r.name || '_')
        ORDER BY x.indisvalid DESC, 1 LIMIT 1
    ) AS ours ON true
    -- The definition of an index locks its table.
    LEFT JOIN LATERAL (
        SELECT litellm_spend.is_free(r.partition_oid) AS free WHERE ours.indexrelid IS NULL AND NOT r.dropped AND r.keys <> '{}'
    ) AS readable ON true
    -- LiteLLM's own, or somebody's.
    LEFT JOIN LATERAL (
        SELECT x.indexrelid FROM pg_index x JOIN pg_class o ON o.oid = x.indexrelid JOIN pg_am m ON m.oid = o.relam
        WHERE x.indrelid = r.partition_oid AND x.indisvalid AND x.indpred IS NULL AND m.amname = 'btree'
          AND x.indnkeyatts >= cardinality(r.keys)
          AND NOT EXISTS (SELECT FROM generate_series(0, cardinality(r.keys) - 1) AS n JOIN pg_attribute a
                          ON a.attrelid = x.indrelid AND a.attnum = x.indkey[n] WHERE a.attcollation <> x.indcollation[n])
          AND CASE WHEN readable.free
                  THEN r.keys = ARRAY(SELECT pg_get_indexdef(o.oid, n, false) FROM generate_series(1, cardinality(r.keys)) AS n)
                       AND r.included <@ ARRAY(SELECT pg_get_indexdef(o.oid, n, false) FROM generate_series(1, x.indnatts) AS n) END
        ORDER BY 1 LIMIT 1
    ) AS theirs ON readable.free
)
SELECT f.relation, f.name, f.partition_oid::regclass AS partition, f.range_end, f.index_oid::regclass AS index,
       CASE WHEN f.dropped THEN 'to drop'
            WHEN f.is_building THEN 'building'
            WHEN f.is_valid THEN 'built'
            WHEN wrong.message IS NOT NULL THEN 'failed'
            -- Another may stand for ours: somebody keeps everybody from looking.
            WHEN f.is_unknown THEN 'unknown'
            WHEN f.range_end > clock_timestamp() AT TIME ZONE 'UTC' AND NOT f.hot THEN 'open partition'
            -- Somebody was in the way: it is tried again at once.
            WHEN e.retry_at > e.last_error_at + interval '1 minute' THEN 'failed'
            ELSE 'waiting' END AS state,
       f.asked_at, f.started_at, f.percent, f.waits_for, f.remedy,
       coalesce(wrong.message, e.last_error) AS last_error, e.last_error_at, e.retry_at
FROM found f
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN f.origin IS DISTINCT FROM (SELECT id FROM litellm_spend.installation)
            THEN E'it came out of a dump, and the end of its restore was not seen\nHINT:  When all is there: SELECT spend_restored();'
        WHEN f.owner <> f.owner_now
            THEN format(E'it was asked for by %s, and the table is %s''s now\nHINT:  SELECT * FROM %s);',
                        f.owner, f.owner_now::regrole,
                        CASE WHEN f.dropped THEN format('spend_index_drop(%L, %L', litellm_spend.qualified(f.relation), ARRAY[f.name])
                             ELSE format('spend_index_set(%L, indexes => %L, hot => %s', litellm_spend.qualified(f.relation), ARRAY[f.name], f.hot) END)
        WHEN f.kind <> 'r'
            THEN E'the partition is partitioned itself, or foreign\nHINT:  Index it by hand.'
        WHEN f.partition_owner <> f.owner
            THEN format(E'the partition belongs to %s\nHINT:  ALTER TABLE %s OWNER TO %s;', f.partition_owner::regrole,
                        litellm_spend.qualified(f.partition_oid), f.owner)
        END AS message
) AS wrong
LEFT JOIN litellm_spend.index_failure e
    ON e.partition = f.partition_oid AND e.name = f.name AND (f.dropped OR NOT f.is_valid) AND wrong.message IS NULL
WHERE NOT f.dropped OR f.index_oid IS NOT NULL;

-- One row for each index that was asked for, on its table or on each partition.
CREATE VIEW @extschema@.spend_index_status AS
SELECT relation AS "table", name AS "index", partition, index AS name, state, percent,
       CASE WHEN litellm_spend.is_free(index) THEN pg_relation_size(index) END AS bytes, pg_stat_get_numscans(index) AS scans,
       CASE WHEN state IN ('building', 'to drop') THEN waits_for
            WHEN state = 'waiting' AND EXISTS (SELECT FROM litellm_spend.conversion v WHERE v.relation = s.relation AND NOT v.stopped)
                THEN 'its table is being converted or reverted: see spend_progress' END AS blocked_by,
       last_error, last_error_at, retry_at
FROM litellm_spend.index_survey s
ORDER BY s.relation::text, range_end DESC, s.name;

-- How far each long work is. Reads state and catalogs only.
CREATE VIEW @extschema@.spend_progress AS
SELECT 'backfill' AS operation,
       c.relation::text AS subject,
       CASE WHEN isfinite(b.covered_from)
           THEN b.covered_from::date || coalesce(': ' || b.days_covered || ' of ' || b.days || ' days', '') END AS step,
       b.covered AS percent,
       b.backfill_began AS started_at,
       NULL AS waits_for,
       CASE WHEN c.last_error LIKE 'backfill: %' THEN substr(c.last_error, length('backfill: ') + 1) END AS last_error,
       NULL::timestamptz AS retry_at,
       justify_hours(date_trunc('second', b.time_left)) AS time_left
FROM litellm_spend.capture c
-- As a rule they are all at the same day.
CROSS JOIN LATERAL (
    SELECT b.*, r.backfill_began FROM litellm_spend.backfill b JOIN litellm_spend.rollup r USING (name)
    WHERE r.source = c.source AND b.covered_from > '-infinity' ORDER BY b.covered_from DESC LIMIT 1
) AS b
UNION ALL
SELECT 'backfill', 'rollup ' || r.name, format('number %s of %s', least(r.watermark, r.last_value), r.last_value), b.covered,
       NULL, NULL, r.last_error, NULL, NULL
FROM litellm_spend.rollup r JOIN litellm_spend.backfill b USING (name)
WHERE r.last_value > r.first_value AND r.watermark < r.last_value AND r.definition IS NOT NULL AND r.source <> 'change_log'
UNION ALL
SELECT CASE v.direction WHEN 'convert' THEN 'conversion' ELSE 'reversion' END, v.relation::text,
       CASE WHEN s.step = 'index' AND w.phase IS NOT NULL THEN 'index: ' || w.phase ELSE s.step END,
       CASE s.step WHEN 'index' THEN w.percent WHEN 'copy' THEN copied.percent END,
       v.started_at,
       coalesce(w.waits_for, CASE WHEN v.last_error IS NOT NULL AND s.step IN ('swap', 'prepare') THEN holders.who END),
       v.last_error,
       v.retry_at,
       CASE WHEN s.step = 'copy' AND copied.percent > 0
           THEN justify_hours(date_trunc('second', (clock_timestamp() - v.started_at) * (100 / copied.percent - 1)::float8)) END
FROM litellm_spend.conversion v
LEFT JOIN LATERAL (
    SELECT max(phase) AS phase, max(percent) AS percent, string_agg(waits_for, '; ') AS waits_for
    FROM litellm_spend.index_work w WHERE w.relation = v.relation
) AS w ON true
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN v.stopped THEN 'stopped'
        WHEN (v.options ->> 'aborted')::boolean THEN 'take back'
        WHEN v.direction = 'revert' THEN
            CASE WHEN v.options ->> 'shape' IS NULL THEN 'prepare' WHEN NOT (v.options ->> 'copied_all')::boolean THEN 'copy'
                 WHEN NOT coalesce((v.options ->> 'indexed')::boolean, false) THEN 'indexes' ELSE 'swap' END
        WHEN EXISTS (SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
                     WHERE i.indrelid = v.relation AND i.indisvalid AND c.relname ~ '_legacy_pkey$') THEN 'swap'
        ELSE 'index' END AS step
) AS s
-- The copy's bytes, of those that there are to copy.
LEFT JOIN LATERAL (
    SELECT CASE WHEN bool_and(litellm_spend.is_free(t.oid::oid)) AND litellm_spend.is_free((v.options -> 'made' ->> 0)::oid)
        THEN least(100, round(100 * pg_relation_size((v.options -> 'made' ->> 0)::oid)
            / nullif(sum(CASE WHEN litellm_spend.is_free(t.oid::oid) THEN pg_relation_size(t.oid::oid) END), 0), 1)) END AS percent
    FROM jsonb_array_elements_text(v.options -> 'tree') AS t(oid)
) AS copied ON s.step = 'copy'
LEFT JOIN LATERAL (
    SELECT string_agg(DISTINCT who, '; ') AS who FROM litellm_spend.holder h WHERE h.relation = v.relation
) AS holders ON true
UNION ALL
-- What a session does in one transaction, of which others see but a lock.
SELECT 'rebuild', coalesce('rollup ' || t.relname, (SELECT relation::text FROM litellm_spend.capture)), who, NULL, a.xact_start,
       (SELECT string_agg(b.who, '; ') FROM litellm_spend.blocker b WHERE b.pid = l.pid), NULL, NULL, NULL
FROM pg_locks l JOIN litellm_spend.party USING (pid) JOIN pg_stat_activity a USING (pid) LEFT JOIN pg_class t ON t.oid = l.objid
WHERE l.locktype = 'advisory' AND l.classid = 1936745838 AND l.objsubid = 2
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
UNION ALL
SELECT 'repair', c.relation::text, format('%s ranges are to be recomputed', count(*)), NULL, min(d.noticed_at), NULL,
       min(CASE WHEN c.last_error LIKE 'repair: %' THEN substr(c.last_error, length('repair: ') + 1) END), NULL, NULL
FROM litellm_spend.dirty_range d, litellm_spend.capture c
WHERE d.repaired_at IS NULL AND d.repair <> 'keep'
GROUP BY c.relation;

-- What somebody must act on, a row a fault; none: all is well. One fault is one row: what follows from
-- another is left out.
CREATE VIEW @extschema@.spend_health AS
-- What several branches read, computed once, or not at all where no branch comes to it.
WITH status AS MATERIALIZED (
    TABLE @extschema@.spend_rollup_status
), partitions AS MATERIALIZED (
    TABLE litellm_spend.partition_survey
), indexes AS MATERIALIZED (
    TABLE litellm_spend.index_survey
), party AS MATERIALIZED (
    TABLE litellm_spend.party
), holder AS MATERIALIZED (
    TABLE litellm_spend.holder
), worker AS (
    SELECT pid, xact_start, wait_event, query FROM pg_stat_activity
    WHERE backend_type = 'litellm_spend worker' AND datname = current_database()
), served AS (
    -- Without the library preloaded, calls do what a worker would.
    SELECT current_setting('shared_preload_libraries') ~ 'litellm_spend' AS preloaded, EXISTS (SELECT FROM worker) AS has_worker,
           EXISTS (SELECT origin FROM litellm_spend.source WHERE origin IS DISTINCT FROM i.id
                   UNION ALL SELECT origin FROM litellm_spend.policy WHERE origin IS DISTINCT FROM i.id
                   UNION ALL SELECT origin FROM litellm_spend.conversion WHERE origin IS DISTINCT FROM i.id
                   UNION ALL SELECT origin FROM litellm_spend.index_set WHERE origin IS DISTINCT FROM i.id)
               OR NOT EXISTS (SELECT FROM pg_event_trigger WHERE evtname = 'litellm_spend_restored')
                  AND EXISTS (SELECT FROM litellm_spend.leftover) AS restored,
           coalesce(litellm_spend.served_until(), pg_postmaster_start_time()) AS served_until
    FROM (SELECT id FROM litellm_spend.installation LIMIT 1) AS i
), errors AS (
    -- The eight built-in rollups share most of theirs.
    SELECT last_error AS message, min(last_error_at) AS since, 'rollup ' || string_agg(rollup, ', ' ORDER BY rollup) AS subject
    FROM status
    WHERE last_error IS NOT NULL AND last_error NOT LIKE 'nothing is captured:%'
      AND NOT (kind = 'built-in' AND EXISTS (SELECT FROM litellm_spend.capture c WHERE c.last_error = status.last_error))
    GROUP BY last_error
    UNION ALL
    -- Of a table that was dropped the name is known.
    SELECT last_error, last_error_at,
           'capture of ' || coalesce((SELECT oid::regclass::text FROM pg_class WHERE oid = relation), format('%I.%I', table_schema, table_name))
    FROM litellm_spend.capture WHERE last_error IS NOT NULL
    UNION ALL
    SELECT last_error, last_error_at, 'maintenance of ' || relation FROM litellm_spend.policy WHERE last_error IS NOT NULL
    UNION ALL
    SELECT last_error, last_error_at, format('%s of %I.%I', CASE direction WHEN 'convert' THEN 'conversion' ELSE 'reversion' END,
                                             table_schema, table_name) || CASE WHEN stopped THEN ' (stopped)' ELSE '' END
    FROM litellm_spend.conversion WHERE last_error IS NOT NULL
    UNION ALL
    SELECT last_error, min(last_error_at), format('index %s of %s', name, string_agg(partition::text, ', ' ORDER BY range_end DESC))
    FROM indexes
    WHERE state = 'failed' OR state = 'to drop' AND last_error IS NOT NULL AND coalesce(retry_at > last_error_at + interval '1 minute', true)
    GROUP BY relation, name, last_error
), tails AS (
    SELECT source, max(lag_seconds) AS lag_seconds, max(tail_rows) AS tail_rows,
           (SELECT array_agg(DISTINCT pid) FROM status b, unnest(b.blocked_by_pids) AS pid WHERE b.source = s.source) AS pids,
           (SELECT array_agg(DISTINCT gid) FROM status b, unnest(b.blocked_by_prepared) AS gid WHERE b.source = s.source) AS prepared
    FROM status s
    WHERE kind = 'built-in' AND lag_seconds > 60 OR kind = 'declared' AND tail_rows > 100000
    GROUP BY source
), at_work AS (
    -- Who has been working on a rollup for long, in a transaction that a worker has not begun: nobody merges
    -- it meanwhile.
    SELECT string_agg(who, '; ' ORDER BY since) AS who, (array_agg(remedy ORDER BY since))[1] AS remedy FROM holder
    WHERE relation = 'litellm_spend.rollup'::regclass AND mode = 'RowShareLock' AND kind IN ('client backend', 'prepared transaction')
      AND since < clock_timestamp() - interval '30 seconds'
), expired AS (
    SELECT "table", count(*) AS partitions, min(expires_at) AS since, min(blocked) AS blocked
    FROM partitions
    WHERE expires_at < clock_timestamp() AT TIME ZONE 'UTC' - interval '1 hour'
      -- Not what a policy has let expire a moment ago.
      AND (blocked IS NOT NULL OR coalesce(last_maintained_at, 'infinity') < clock_timestamp() - interval '1 hour')
    GROUP BY "table"
), holders AS (
    -- Who is in the way of maintenance now, the oldest transaction first; not who is there for a moment.
    SELECT relation::regclass AS "table", string_agg(who, '; ' ORDER BY since) AS who, (array_agg(remedy ORDER BY since))[1] AS remedy
    FROM (SELECT DISTINCT relation, who, remedy, since FROM holder
          WHERE since < clock_timestamp() - interval '1 second' AND kind !~ '^litellm_spend ') AS holder
    GROUP BY relation
), readers AS (
    -- Who may read the live views that a detach has kept, but for their owner: roles, and other views.
    SELECT DISTINCT CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE x.grantee::regrole::text END AS reader
    FROM status JOIN pg_class v ON v.relname = status.rollup AND v.relnamespace = 'litellm_spend'::regnamespace AND v.relkind = 'v'
    CROSS JOIN LATERAL aclexplode(v.relacl) AS x
    WHERE kind = 'built-in' AND x.privilege_type = 'SELECT' AND x.grantee <> v.relowner
    UNION
    SELECT 'view ' || w.ev_class::regclass
    FROM status JOIN pg_class v ON v.relname = status.rollup AND v.relnamespace = 'litellm_spend'::regnamespace AND v.relkind = 'v'
    JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = v.oid AND d.classid = 'pg_rewrite'::regclass
    JOIN pg_rewrite w ON w.oid = d.objid JOIN pg_class r ON r.oid = w.ev_class AND r.relnamespace <> v.relnamespace
    WHERE kind = 'built-in'
), fault AS (
SELECT 'error' AS severity, 'no worker serves this database: nothing is merged or maintained' AS problem, served_until AS since,
       NULL AS caused_by, 'look for litellm_spend in the server''s log; raise max_worker_processes if it says that there is no slot' AS remedy
FROM served
-- The launcher starts one again that has ended 5 s ago, and looks each second.
WHERE preloaded AND NOT has_worker AND NOT pg_is_in_recovery() AND served_until < clock_timestamp() - interval '10 seconds'
  AND (EXISTS (SELECT FROM litellm_spend.source) OR EXISTS (SELECT FROM litellm_spend.policy)
       OR EXISTS (SELECT FROM litellm_spend.conversion) OR EXISTS (SELECT FROM litellm_spend.index_set))
UNION ALL
SELECT 'warning', 'this database came out of a dump, and the end of its restore was not seen: nothing is merged or maintained', NULL,
       restorers.who, CASE WHEN restorers.who IS NULL THEN 'when the restore has ended, not before: SELECT spend_restored();'
                           ELSE 'wait until the restore has ended' END
FROM served, (
    SELECT string_agg(who, '; ') AS who FROM party
    WHERE pid IN (SELECT pid FROM pg_stat_progress_copy WHERE datname = current_database() AND command LIKE 'COPY FROM%'
                  UNION SELECT pid FROM pg_stat_progress_create_index WHERE datname = current_database())
) AS restorers
WHERE restored
UNION ALL
SELECT 'warning', 'the worker is at one thing for long: ' || worker.query, xact_start, 'wait event ' || wait_event,
       format('SELECT pg_cancel_backend(%s);', pid)
FROM worker WHERE xact_start < clock_timestamp() - interval '5 minutes'
UNION ALL
-- A message of ours has its DETAIL and its HINT in lines of their own.
SELECT CASE WHEN is_lock THEN 'warning' ELSE 'error' END,
       format('%s: %s', subject, split_part(message, E'\n', 1)), errors.since,
       substring(message FROM E'\nDETAIL:  ([^\n]*)'),
       coalesce(CASE WHEN is_lock THEN (
                    -- If it is the same process still.
                    SELECT remedy FROM party p
                    WHERE pid = substring(message FROM E'\nDETAIL:  [^\n]*?It is held by process ([0-9]{1,9}) [(]')::integer AND p.since < errors.since
                       OR quote_literal(gid) = substring(message FROM E'\nDETAIL:  [^\n]*It is held by prepared transaction (''.*'')[.]\n')
                ) END,
                substring(message FROM E'\nHINT:  ([^\n]*)'), 'it is tried again by itself; a cause that stays is for you to remove')
FROM served, errors
CROSS JOIN LATERAL (
    SELECT message ~ '^(could not get a lock on |another transaction is attaching |rollup "[^"]+" is locked by )' AS is_lock
) AS kind
WHERE NOT (restored AND message LIKE 'it came out of a dump%')
  -- What is tried again and again has not failed at the first try.
  AND NOT (is_lock AND errors.since > clock_timestamp() - interval '20 seconds')
UNION ALL
-- Who detaches knows it; who reads what stands still does not.
SELECT 'warning', 'detached: nothing is captured, and the report views stand still', max(last_merge_at),
       (SELECT 'read by ' || string_agg(reader, ', ' ORDER BY reader) FROM readers),
       'SELECT * FROM spend_attach();  -- or drop them: SELECT * FROM spend_detach(drop_history => true);'
FROM status WHERE kind = 'built-in' AND last_error LIKE 'nothing is captured:%'
-- Somebody has asked for the hourly ones.
HAVING count(*) > 0 AND (EXISTS (SELECT FROM readers) OR bool_or(rollup ~ '^hourly_'))
UNION ALL
SELECT 'warning',
       format('rows of %s are not merged: %s rows, the oldest %s s old; its views are exact, and slower', source, tail_rows, round(lag_seconds)),
       clock_timestamp() - make_interval(secs => lag_seconds::float8),
       coalesce(blockers.who, at_work.who), coalesce(blockers.remedy, at_work.remedy, 'SELECT * FROM spend_rollup_run();')
FROM tails
CROSS JOIN LATERAL (
    SELECT string_agg(who, '; ' ORDER BY since) AS who, (array_agg(remedy ORDER BY since))[1] AS remedy
    FROM party WHERE pid = ANY (pids) OR gid = ANY (prepared)
) AS blockers
CROSS JOIN at_work CROSS JOIN served
WHERE (has_worker OR NOT preloaded) AND NOT restored
UNION ALL
SELECT 'warning', 'days whose capture failed are not recomputed yet', min(noticed_at), NULL, 'SELECT * FROM spend_rollup_run();'
FROM litellm_spend.dirty_range, served
WHERE repaired_at IS NULL AND noticed_at < clock_timestamp() - interval '5 minutes' AND (has_worker OR NOT preloaded) AND NOT restored
  AND NOT EXISTS (SELECT FROM litellm_spend.capture WHERE last_error ~ '^(watch|repair): ')
HAVING count(*) > 0
UNION ALL
-- Days side by side are one fault. To have them computed again by force would forget what was counted of
-- rows that are gone.
SELECT 'error', format('totals of %s do not count all: a statement there was not captured, and some of its raw rows are gone',
                       CASE WHEN upper_inf(part) THEN 'all days from ' || first
                            WHEN upper(part) < '4000-01-01 BC' OR upper(part) > '294000-01-01' THEN format('%s until %s', first, after)
                            WHEN upper(part) > lower(part) + interval '1 day'
                                THEN format('%s to %s', to_jsonb(lower(part)::date) #>> '{}', to_jsonb(upper(part)::date - 1) #>> '{}')
                            ELSE to_jsonb(lower(part)::date) #>> '{}' END),
       min(noticed_at), string_agg(DISTINCT CASE WHEN message IS NOT NULL THEN operation || ': ' || message
                                             WHEN operation = 'ATTACH' THEN 'a partition that came with rows'
                                             ELSE 'a MERGE that moved rows' END, '; '),
       format('UPDATE litellm_spend.dirty_range SET unrepairable = false WHERE range_start >= %L AND range_end <= %L;'
              '  -- as a superuser: keeps the totals as they are; or with all rows back in the table: '
              'SELECT spend_rollup_rebuild(NULL, %1$L, %2$L, force => true);', first, after)
FROM (SELECT unnest(range_agg(tsrange(range_start, nullif(range_end, 'infinity')))) AS part
      FROM litellm_spend.dirty_range WHERE unrepairable) AS parts
-- As every session reads them, whatever its DateStyle.
CROSS JOIN LATERAL (SELECT to_jsonb(lower(part)) #>> '{}' AS first, to_jsonb(coalesce(upper(part), 'infinity')) #>> '{}' AS after) AS words
JOIN litellm_spend.dirty_range ON unrepairable AND tsrange(range_start, nullif(range_end, 'infinity')) <@ part
GROUP BY part, first, after
UNION ALL
SELECT 'warning', 'days before the attachment are not covered yet, and there is no worker to go on', NULL, NULL, 'CALL spend_backfill();'
FROM served
WHERE NOT preloaded AND NOT restored AND EXISTS (SELECT FROM status WHERE kind = 'built-in' AND backfill_progress < 100)
  AND EXISTS (SELECT FROM litellm_spend.capture)
UNION ALL
SELECT 'warning', format('the index of a conversion waits: %s', w.relation::regclass), w.started_at, w.waits_for, w.remedy
FROM litellm_spend.index_work w
WHERE w.relation IN (SELECT v.relation FROM litellm_spend.conversion v) AND w.started_at < clock_timestamp() - interval '20 seconds'
  -- Not who is there for a moment.
  AND w.held_since < clock_timestamp() - interval '20 seconds'
UNION ALL
SELECT 'warning', format('index %s of %s waits for an hour', name, partition), started_at, waits_for, remedy
FROM indexes
WHERE state = 'building' AND waits_for IS NOT NULL AND started_at < clock_timestamp() - interval '1 hour'
UNION ALL
-- Not where statistics do not reach back so far.
SELECT 'warning', format('nothing has used index %s of %s for 30 days', name, relation), min(asked_at), NULL,
       format('SELECT * FROM spend_index_drop(%L, ARRAY[%L]);', litellm_spend.qualified(relation), name)
FROM indexes
WHERE asked_at < clock_timestamp() - interval '30 days'
  AND NOT EXISTS (SELECT FROM pg_stat_database WHERE datname = current_database()
                    AND coalesce(stats_reset, pg_postmaster_start_time()) > clock_timestamp() - interval '30 days')
GROUP BY relation, name HAVING bool_or(state = 'built') AND sum(pg_stat_get_numscans(index)) = 0
UNION ALL
SELECT 'error', format('%s expired partitions of %s are still there', partitions, "table"), expired.since AT TIME ZONE 'UTC',
       coalesce(holders.who, blocked),
       coalesce(holders.remedy, format('SELECT * FROM spend_partition_maintain(%L);', litellm_spend.qualified("table")))
FROM expired LEFT JOIN holders USING ("table")
UNION ALL
SELECT 'warning', 'maintenance of ' || "table" || ' is held up', min(blocked_since), blocked,
       coalesce(min(holders.remedy), format('SELECT * FROM spend_partition_maintain(%L);', litellm_spend.qualified("table")))
FROM partitions LEFT JOIN holders USING ("table")
WHERE blocked_since < clock_timestamp() - interval '1 hour' AND last_error IS NULL AND "table" NOT IN (SELECT "table" FROM expired)
GROUP BY "table", blocked
UNION ALL
SELECT 'error', format('only %s of %s periods of %s are ready', partitions_ahead, precreate, "table"), max(last_maintained_at),
       CASE WHEN current_setting('litellm_spend.maintain_interval', true) IN ('0', '0s') THEN 'litellm_spend.maintain_interval is 0' END,
       format('SELECT * FROM spend_partition_maintain(%L);', litellm_spend.qualified("table"))
FROM partitions, served
WHERE partitions_ahead < precreate AND last_error IS NULL AND blocked IS NULL AND NOT restored AND (has_worker OR NOT preloaded)
  -- A worker comes to a new policy within a second, or says what it met.
  AND coalesce(last_maintained_at, CASE WHEN has_worker THEN 'infinity' ELSE '-infinity' END::timestamptz) < clock_timestamp() - interval '1 hour'
  AND NOT EXISTS (SELECT FROM litellm_spend.conversion v WHERE v.relation = "table")
GROUP BY "table", partitions_ahead, precreate
UNION ALL
SELECT 'warning', format('rollup %s is filled by hand, and nobody has for an hour: %s numbers are waiting', rollup, tail_rows), last_merge_at, NULL,
       format('run the SQL that calls spend_rollup_window(%L)', rollup)
FROM status WHERE kind = 'by hand' AND tail_rows > 0 AND coalesce(last_merge_at, '-infinity') < clock_timestamp() - interval '1 hour'
)
SELECT severity, problem, since, caused_by,
       -- Calls of ours as they can be typed; public is on most paths.
       CASE '@extschema@' WHEN 'public' THEN remedy
           ELSE regexp_replace(remedy, '(?<![.[:alnum:]_])(spend_[a-z_]+[(])', E'@extschema@.\\1', 'g') END AS remedy
FROM fault;
COMMENT ON VIEW litellm_spend.party IS 'Processes and prepared transactions, as they are named where one is in the way';
COMMENT ON VIEW litellm_spend.blocker IS 'For whom each process waits';
COMMENT ON VIEW litellm_spend.holder IS 'Who has a lock on a table or on a partition of it';
COMMENT ON VIEW litellm_spend.index_work IS 'Who builds or drops an index on a table, and for whom that waits';
COMMENT ON TABLE litellm_spend.index_set IS 'Indexes that were asked for on LiteLLM''s spend log';
COMMENT ON TABLE litellm_spend.index_failure IS 'Indexes that could not be built or dropped, why, and when it is tried again';
COMMENT ON VIEW litellm_spend.index_survey IS 'What became of each index that was asked for, on its table or on each partition';
COMMENT ON VIEW @extschema@.spend_index_status IS 'One row an index and partition: state, size, scans, what blocks it, last error';
GRANT SELECT ON @extschema@.spend_index_status TO pg_monitor;
COMMENT ON VIEW @extschema@.spend_progress IS 'How far each long work is: backfill, conversion, reversion, repair, rebuild; looking changes nothing';
GRANT SELECT ON @extschema@.spend_progress TO pg_monitor;
COMMENT ON VIEW @extschema@.spend_health IS 'What somebody must act on, a row a fault; no row: all is well';
GRANT SELECT ON @extschema@.spend_health TO pg_monitor;

CREATE OR REPLACE VIEW litellm_spend.coverage AS
SELECT r.name AS rollup, r.covered_from, c.relation AS captured,
       EXISTS (SELECT FROM litellm_spend.public_view v WHERE v.rollup = r.name AND v.installed IS NOT NULL) AS live
FROM litellm_spend.rollup r JOIN litellm_spend.capture c ON c.source = r.source;

ALTER EXTENSION litellm_spend DROP TABLE litellm_spend.policy_by_name;
DROP TABLE litellm_spend.policy_by_name;

-- With a search_path of its own, and sums that are beyond double precision.
CREATE OR REPLACE FUNCTION @extschema@.monthly_global_spend(days integer DEFAULT 30)
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
COMMENT ON FUNCTION @extschema@.monthly_global_spend(integer) IS 'Spend in US dollars per UTC day since CURRENT_DATE minus days, as of now; until a rollup covers them, of the rows in the table';

-- A type was looked up on the caller's search_path.
CREATE OR REPLACE PROCEDURE @extschema@.spend_backfill(source regclass DEFAULT NULL)
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

CREATE FUNCTION @extschema@.spend_restored() RETURNS bool
STRICT VOLATILE PARALLEL UNSAFE
LANGUAGE c
AS 'MODULE_PATHNAME', 'spend_restored_wrapper';
COMMENT ON FUNCTION @extschema@.spend_restored() IS 'Says that the restore which brought the state here is over; true if any was waiting for that';

CREATE FUNCTION @extschema@.spend_grant_admin("role" regrole) RETURNS TABLE ("object" text, "action" text)
VOLATILE PARALLEL UNSAFE LANGUAGE c AS 'MODULE_PATHNAME', 'spend_grant_admin_wrapper';
CREATE FUNCTION @extschema@.spend_revoke_admin("role" regrole) RETURNS TABLE ("object" text, "action" text)
VOLATILE PARALLEL UNSAFE LANGUAGE c AS 'MODULE_PATHNAME', 'spend_revoke_admin_wrapper';
COMMENT ON FUNCTION @extschema@.spend_grant_admin(regrole) IS 'Lets a role call everything that needs no superuser, and read the status; says what still takes one';
COMMENT ON FUNCTION @extschema@.spend_grant_reports(regrole) IS 'Lets a role read the report views, and the names of keys, teams and users';
COMMENT ON FUNCTION @extschema@.spend_revoke_admin(regrole) IS 'Takes from a role what spend_grant_admin() gave it';

-- pg_monitor reads the status, also where the extension's schema is closed to others. What an extension's
-- script has granted is not dumped, nor is what others were granted on that object before: so the schema's
-- privileges are made its own again.
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

COMMENT ON FUNCTION @extschema@.spend_rollup_rebuild(text, timestamp, timestamp, boolean) IS 'Recomputes whole buckets of a rollup (NULL: of all built-in ones) from the raw rows; returns the groups written';

-- Functions whose arguments have changed.
CREATE FUNCTION @extschema@.spend_attach(
    "source" regclass DEFAULT NULL,
    "on_delete" TEXT DEFAULT NULL,
    "reports" bool DEFAULT NULL
) RETURNS TABLE (
    "object" TEXT,
    "action" TEXT
)
VOLATILE PARALLEL UNSAFE
LANGUAGE c
AS 'MODULE_PATHNAME', 'spend_attach_wrapper';
COMMENT ON FUNCTION @extschema@.spend_attach(regclass, text, boolean) IS 'Captures LiteLLM''s spend log and keeps its views exact; NULL means the attached table, else the only "LiteLLM_SpendLogs"';
COMMENT ON FUNCTION @extschema@.spend_rollup_drop(text) IS 'Drops a declared rollup or a report with its history, or the watermark of a registered one';
CREATE FUNCTION @extschema@.spend_partition_convert(
    "source" regclass DEFAULT NULL,
    "interval" TEXT DEFAULT NULL,
    "cutover" "any" DEFAULT NULL,
    "time_column" TEXT DEFAULT NULL,
    "precreate" INT DEFAULT NULL
) RETURNS TABLE (
    "step" TEXT, 
    "state" TEXT, 
    "detail" TEXT 
)
VOLATILE PARALLEL UNSAFE
LANGUAGE c
AS 'MODULE_PATHNAME', 'spend_partition_convert_wrapper';
COMMENT ON FUNCTION @extschema@.spend_partition_convert(regclass, text, "any", text, integer) IS 'Partitions a table by time without copying it; says how far it is';

CREATE FUNCTION @extschema@.spend_partition_plan(
    "source" regclass DEFAULT NULL,
    "interval" TEXT DEFAULT NULL,
    "cutover" "any" DEFAULT NULL,
    "time_column" TEXT DEFAULT NULL,
    "precreate" INT DEFAULT NULL
) RETURNS TABLE (
    "step" TEXT, 
    "action" TEXT, 
    "object" TEXT, 
    "lock" TEXT, 
    "estimate" TEXT 
)
STABLE PARALLEL UNSAFE
LANGUAGE c
AS 'MODULE_PATHNAME', 'spend_partition_plan_wrapper';
COMMENT ON FUNCTION @extschema@.spend_partition_plan(regclass, text, "any", text, integer) IS 'What spend_partition_convert() would do, with locks, sizes and all objects it touches; changes nothing';

CREATE FUNCTION litellm_spend.maintain_at(
    "source" regclass,
    "now" "any"
) RETURNS TABLE (
    "action" TEXT, 
    "partition" TEXT, 
    "rows" bigint, 
    "detail" TEXT 
)
VOLATILE PARALLEL UNSAFE
LANGUAGE c
AS 'MODULE_PATHNAME', 'maintain_at_wrapper';
COMMENT ON FUNCTION litellm_spend.maintain_at(regclass, "any") IS 'spend_partition_maintain() as if it were another time, in UTC: for tests and rehearsals';

CREATE FUNCTION @extschema@.spend_partition_set(
    "source" regclass DEFAULT NULL,
    "interval" TEXT DEFAULT NULL,
    "precreate" INT DEFAULT NULL,
    "retention" interval DEFAULT NULL,
    "on_expire" TEXT DEFAULT NULL,
    "time_column" TEXT DEFAULT NULL,
    "dry_run" bool DEFAULT false
) RETURNS VOID
VOLATILE PARALLEL UNSAFE
LANGUAGE c
AS 'MODULE_PATHNAME', 'spend_partition_set_wrapper';
COMMENT ON FUNCTION @extschema@.spend_partition_set(regclass, text, integer, interval, text, text, boolean) IS 'Sets how a table is partitioned and how long its rows stay; what is not passed stays as it is';

-- Indexes for LiteLLM's Logs page.
CREATE FUNCTION @extschema@.spend_index_plan(
    "source" regclass DEFAULT NULL
) RETURNS TABLE (
    "item" TEXT,
    "definition" TEXT,
    "serves" TEXT,
    "since" TEXT,
    "rows" bigint,
    "bytes" bigint,
    "seconds" bigint,
    "insert_cost" TEXT,
    "state" TEXT
)
STABLE PARALLEL UNSAFE
LANGUAGE c
AS 'MODULE_PATHNAME', 'spend_index_plan_wrapper';
COMMENT ON FUNCTION @extschema@.spend_index_plan(regclass) IS 'What each index for LiteLLM''s Logs page would cost and serve here, and what else would help; changes nothing';
CREATE FUNCTION @extschema@.spend_index_set(
    "source" regclass DEFAULT NULL,
    "indexes" TEXT[] DEFAULT NULL,
    "hot" bool DEFAULT false
) RETURNS TABLE (
    "index" TEXT,
    "partition" TEXT,
    "state" TEXT,
    "detail" TEXT
)
VOLATILE PARALLEL UNSAFE
LANGUAGE c
AS 'MODULE_PATHNAME', 'spend_index_set_wrapper';
COMMENT ON FUNCTION @extschema@.spend_index_set(regclass, text[], boolean) IS 'Asks for indexes that LiteLLM leaves alone, built on closed partitions, or on all with hot; says how far they are';
CREATE FUNCTION @extschema@.spend_upgrade_check(
    "version" TEXT,
    "source" regclass DEFAULT NULL
) RETURNS TABLE (
    "change" TEXT,
    "by" TEXT,
    "effect" TEXT,
    "remedy" TEXT
)
STABLE PARALLEL UNSAFE
LANGUAGE c
AS 'MODULE_PATHNAME', 'spend_upgrade_check_wrapper';
COMMENT ON FUNCTION @extschema@.spend_upgrade_check(text, regclass) IS 'What a release of LiteLLM does to its spend log when it starts, and what to do before; changes nothing';
CREATE FUNCTION @extschema@.spend_index_drop(
    "source" regclass DEFAULT NULL,
    "indexes" TEXT[] DEFAULT NULL
) RETURNS TABLE (
    "index" TEXT,
    "partition" TEXT,
    "state" TEXT,
    "detail" TEXT
)
VOLATILE PARALLEL UNSAFE
LANGUAGE c
AS 'MODULE_PATHNAME', 'spend_index_drop_wrapper';
COMMENT ON FUNCTION @extschema@.spend_index_drop(regclass, text[]) IS 'Has indexes dropped that spend_index_set() made, or whose state was lost; NULL means all';
COMMENT ON FUNCTION @extschema@.spend_partition_revert(regclass, boolean) IS 'Turns a partitioned table back into a plain one, or takes back a conversion that has not swapped yet; abort => true takes back a reversion';
COMMENT ON VIEW litellm_spend.backfill IS 'How far the backfill of each rollup is, in per cent of its days, or of its sequence values if it is declared';
COMMENT ON TABLE litellm_spend.dirty_range IS 'Ranges of days that are to be computed again, or that are frozen, and why';

CREATE FUNCTION @extschema@.spend_rollup_create(
    "name" TEXT,
    "source" regclass,
    "dimensions" TEXT[],
    "measures" TEXT[],
    "sequence" regclass DEFAULT NULL,
    "time_column" TEXT DEFAULT NULL,
    "distributed" bool DEFAULT NULL
) RETURNS VOID
VOLATILE PARALLEL UNSAFE
LANGUAGE c
AS 'MODULE_PATHNAME', 'spend_rollup_create_wrapper';
COMMENT ON FUNCTION @extschema@.spend_rollup_create(text, regclass, text[], text[], regclass, text, boolean) IS 'Declares a rollup, with its live view, over a table whose rows a sequence numbers';

-- Nobody but the owner and pg_monitor has anything of what is new, PUBLIC included: ALTER DEFAULT PRIVILEGES
-- may have granted anything. Of what was there before, others keep what they may read and call, and write to
-- nothing: what is in the state tables runs with the owner's rights. What the owner of LiteLLM's table needs
-- is granted at the worker's next look.
DO $$ DECLARE
    before text[] := current_setting('litellm_spend_update.members');
    ours pg_init_privs[] := ARRAY(SELECT i FROM pg_init_privs i WHERE i.classoid || ' ' || i.objoid = ANY (before));
    statement text;
BEGIN
    FOR statement IN
        SELECT format('REVOKE %s ON %s %s FROM %s CASCADE', string_agg(DISTINCT x.privilege_type, ', '), o.kind, o.name,
                      CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END)
        FROM pg_depend d CROSS JOIN LATERAL (
            SELECT 'SCHEMA', oid::regnamespace::text, nspowner, nspacl FROM pg_namespace
            WHERE d.classid = 'pg_namespace'::regclass AND oid = d.objid
            UNION ALL SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, oid::regclass::text, relowner, relacl FROM pg_class
            WHERE d.classid = 'pg_class'::regclass AND oid = d.objid
            UNION ALL SELECT 'ROUTINE', oid::regprocedure::text, proowner, coalesce(proacl, acldefault('f', proowner)) FROM pg_proc
            WHERE d.classid = 'pg_proc'::regclass AND oid = d.objid) AS o(kind, name, owner, acl)
        CROSS JOIN LATERAL aclexplode(o.acl) AS x
        WHERE d.deptype = 'e' AND d.refclassid = 'pg_extension'::regclass
          AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'litellm_spend') AND x.grantee <> o.owner
          AND (x.privilege_type NOT IN ('SELECT', 'EXECUTE') AND NOT (o.kind = 'SCHEMA' AND x.privilege_type = 'USAGE')
               OR d.classid || ' ' || d.objid <> ALL (before) AND x.grantee <> 'pg_monitor'::regrole)
        GROUP BY o.kind, o.name, x.grantee
    LOOP
        EXECUTE statement;
    END LOOP;
    -- What a script's REVOKE leaves to others would be taken for the extension's own, which is not dumped.
    DELETE FROM pg_init_privs i WHERE i.classoid || ' ' || i.objoid = ANY (before);
    INSERT INTO pg_init_privs SELECT i.* FROM unnest(ours) AS i;
    DELETE FROM pg_shdepend d WHERE d.classid || ' ' || d.objid = ANY (before) AND d.deptype = 'i'
        AND d.dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND NOT EXISTS (SELECT FROM unnest(ours) AS i, aclexplode(i.initprivs) AS x
                        WHERE (i.classoid, i.objoid, i.objsubid, x.grantee) = (d.classid, d.objid, d.objsubid, d.refobjid));
END $$;

-- Whoever may call the old one may call the new one.
DO $$ DECLARE old regprocedure; new regprocedure; grantee text; ours aclitem[]; BEGIN
    FOR old, new IN VALUES
        ('@extschema@.spend_attach(regclass, text)'::regprocedure,
         '@extschema@.spend_attach(regclass, text, boolean)'::regprocedure),
        ('@extschema@.spend_rollup_create(text, regclass, text[], text[], regclass, text)',
         '@extschema@.spend_rollup_create(text, regclass, text[], text[], regclass, text, boolean)'),
        ('@extschema@.spend_partition_convert(regclass, text, timestamp, text, integer, boolean)',
         '@extschema@.spend_partition_convert(regclass, text, "any", text, integer)'),
        ('@extschema@.spend_partition_plan(regclass, text, timestamp, text, integer)',
         '@extschema@.spend_partition_plan(regclass, text, "any", text, integer)'),
        ('litellm_spend.maintain_at(regclass, timestamp)', 'litellm_spend.maintain_at(regclass, "any")'),
        ('@extschema@.spend_partition_set(regclass, text, integer, interval, text, text)',
         '@extschema@.spend_partition_set(regclass, text, integer, interval, text, text, boolean)')
    LOOP
        SELECT i.initprivs INTO ours FROM pg_init_privs i WHERE i.classoid = 'pg_proc'::regclass AND i.objoid = new;
        FOR grantee IN
            SELECT CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END
                || CASE WHEN x.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END
            FROM pg_proc p, aclexplode(p.proacl) AS x WHERE p.oid = old AND x.grantee <> p.proowner
        LOOP
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', new, grantee);
        END LOOP;
        -- Not what the script has granted: that is not dumped.
        UPDATE pg_init_privs i SET initprivs = ours WHERE i.classoid = 'pg_proc'::regclass AND i.objoid = new;
        DELETE FROM pg_shdepend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = new AND d.deptype = 'i'
            AND d.dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND d.refobjid NOT IN (SELECT x.grantee FROM aclexplode(ours) AS x);
        EXECUTE format('ALTER EXTENSION litellm_spend DROP FUNCTION %s', old);
        EXECUTE format('DROP FUNCTION %s', old);
    END LOOP;
END $$;

-- Of a table that was never analyzed the planner expects ten pages, and a status over many of them looks so
-- expensive that it is compiled, which takes seconds.
ANALYZE litellm_spend.installation, litellm_spend.source, litellm_spend.rollup, litellm_spend.capture, litellm_spend.dirty_range,
    litellm_spend.public_view, litellm_spend.policy, litellm_spend.conversion, litellm_spend.index_set, litellm_spend.index_failure,
    litellm_spend.expired_partition;

-- One that is not there, which a configuration may name, cannot be set: it means the same as none.
SELECT set_config(name, value, true)
FROM unnest(ARRAY['default_tablespace', 'default_table_access_method']) AS name,
    current_setting('litellm_spend_script.' || name) AS value
WHERE name <> 'default_tablespace' OR value = '' OR value IN (SELECT spcname FROM pg_tablespace);
DO $$ BEGIN
    PERFORM set_config('role', current_setting('litellm_spend_update.role'), true);
END $$;

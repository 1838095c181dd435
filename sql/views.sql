-- Status views: what a DBA or a monitor reads. pg_monitor may read them.

SET LOCAL search_path = pg_catalog, pg_temp;

-- How much is covered, in per cent: of the days that had rows when backfill began, or, of a declared rollup,
-- of the sequence values that there were when it was made.
CREATE VIEW litellm_spend.backfill AS
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

CREATE VIEW @extschema@.spend_rollup_status AS
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

CREATE VIEW @extschema@.spend_worker_status AS
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

-- One row a partition (a table without any: one for itself), with what concerns the whole table repeated.
CREATE VIEW @extschema@.spend_partition_status AS
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

SET LOCAL search_path = @extschema@, pg_temp;

-- Status views: what a DBA or a monitor reads. pg_monitor may read them.

SET LOCAL search_path = pg_catalog, pg_temp;

-- How much is covered, in per cent: of the days that had rows when backfill began, or, of a declared rollup, of the
-- sequence values that there were when it was made.
CREATE VIEW litellm_spend.backfill AS
SELECT r.name, r.covered_from,
       CASE
           WHEN r.last_value > r.first_value
               THEN round(100 * (least(r.watermark, r.last_value)::numeric - r.first_value)
                    / (r.last_value::numeric - r.first_value), 1)
           WHEN r.covered_from = '-infinity' THEN 100
           WHEN r.covered_from = 'infinity' OR r.backfill_last IS NULL THEN 0
           -- Not by intervals, which do not reach from one end of time to the other.
           ELSE round(100 * (extract(epoch FROM r.backfill_last) + 86400 - extract(epoch FROM r.covered_from))
                / (extract(epoch FROM r.backfill_last) + 86400 - extract(epoch FROM r.backfill_first)), 1)
       END AS covered
FROM litellm_spend.rollup r;

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
       r.covered_from,
       s.frozen_before,
       damage.dirty_ranges,
       damage.capture_errors,
       damage.unrepairable_ranges,
       v.live_views,
       coalesce(lost.message, r.last_error, c.last_error) AS last_error,
       coalesce(r.last_error_at, c.last_error_at) AS last_error_at
FROM litellm_spend.rollup r
LEFT JOIN litellm_spend.source s ON s.name = r.source
JOIN litellm_spend.backfill b ON b.name = r.name
LEFT JOIN litellm_spend.capture c ON c.source = s.name
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
        WHEN s.origin IS DISTINCT FROM (SELECT id FROM litellm_spend.installation) AND s.name IS NOT NULL
            THEN 'it came out of a dump, and the end of its restore was not seen: when all is there, call spend_restored()'
        WHEN r.definition IS NOT NULL AND NOT EXISTS (SELECT FROM pg_event_trigger WHERE evtname = 'litellm_spend_restored')
            THEN 'the event trigger litellm_spend_restored was dropped, and nothing is mended: spend_restored() makes it again'
        WHEN s.name IS NULL AND r.source = 'change_log' THEN 'its source is not known any more: spend_attach() puts that right'
        WHEN s.name IS NULL AND r.source IS NOT NULL
            THEN 'its source is not known any more: drop it by spend_rollup_drop() and create it again'
        WHEN s.name = 'change_log' AND c.source IS NULL AND EXISTS (
                SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
                WHERE p.proname = 'capture_insert' AND p.pronamespace = 'litellm_spend'::regnamespace)
            THEN 'triggers capture a table that is not known as attached any more: spend_attach() puts that right'
        END AS message
) AS lost
UNION ALL
SELECT left(t.relname::text COLLATE "default", -length('_rollup')), 'lost', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
       NULL, NULL, NULL,
       'its state is lost: spend_attach() makes that of a built-in rollup again; any other is dropped by spend_rollup_drop()', NULL
FROM pg_class t
WHERE t.relnamespace = 'litellm_spend'::regnamespace AND t.relkind = 'r' AND t.relname LIKE '%\_rollup'
  AND NOT EXISTS (SELECT FROM litellm_spend.rollup r WHERE r.name = left(t.relname, -length('_rollup')));

CREATE VIEW @extschema@.spend_worker_status AS
SELECT datname AS database, pid, backend_type AS kind, backend_start AS started_at, state, wait_event, xact_start
FROM pg_stat_activity
WHERE backend_type IN ('litellm_spend launcher', 'litellm_spend worker', 'litellm_spend builder');

-- One row a partition (a table without any: one for itself), with what concerns the whole table repeated.
CREATE VIEW @extschema@.spend_partition_status AS
WITH parts AS (
    SELECT p.*, t.oid AS table_oid, i.inhrelid IS NOT NULL AS is_partition, coalesce(i.inhrelid, t.oid) AS partition_oid,
           pg_get_expr(c.relpartbound, c.oid) AS bound, c.reltuples, format_type(a.atttypid, NULL) AS time_type
    FROM litellm_spend.policy p
    JOIN pg_class t ON t.oid = p.relation AND t.relkind IN ('r', 'p')
    JOIN pg_attribute a ON a.attrelid = t.oid AND a.attname = p.time_column AND NOT a.attisdropped
        AND a.atttypid IN ('timestamp'::regtype, 'timestamptz'::regtype, 'date'::regtype)
    LEFT JOIN pg_inherits i ON i.inhparent = t.oid AND t.relkind = 'p'
    JOIN pg_class c ON c.oid = coalesce(i.inhrelid, t.oid)
    -- A partitioned table without partitions has no row: it has no rows either. One that is partitioned by something else than
    -- its policy says has bounds that are no times.
    WHERE t.relkind = 'r' OR i.inhrelid IS NOT NULL AND EXISTS (
        SELECT FROM pg_partitioned_table k
        WHERE k.partrelid = t.oid AND k.partstrat = 'r' AND k.partnatts = 1 AND k.partattrs[0] = a.attnum)
), bounds AS (
    SELECT parts.*, regexp_match(bound, '^FOR VALUES FROM \(''?(.*?)''?\) TO \(''?(.*?)''?\)$') AS b FROM parts
), ranges AS (
    SELECT bounds.*, is_partition AND bound = 'DEFAULT' AS is_default,
           -- Bounds of a timestamp with time zone are shown in the reader's zone: back to UTC.
           CASE WHEN b[1] = 'MINVALUE' THEN '-infinity'
                WHEN time_type = 'timestamp with time zone' THEN b[1]::timestamptz AT TIME ZONE 'UTC'
                ELSE b[1]::timestamp END AS range_start,
           CASE WHEN b[2] = 'MAXVALUE' THEN 'infinity'
                WHEN time_type = 'timestamp with time zone' THEN b[2]::timestamptz AT TIME ZONE 'UTC'
                ELSE b[2]::timestamp END AS range_end
    FROM bounds
)
SELECT table_oid::regclass AS "table",
       partition_oid::regclass AS partition,
       is_default,
       range_start,
       range_end,
       CASE WHEN reltuples >= 0 THEN reltuples::bigint END AS rows_estimate,
       pg_total_relation_size(partition_oid) AS bytes,
       CASE WHEN isfinite(range_end) AND range_end < '200000-01-01' THEN range_end + retention END AS expires_at,
       count(*) FILTER (WHERE range_start > clock_timestamp() AT TIME ZONE 'UTC') OVER per_table AS partitions_ahead,
       sum(greatest(reltuples, 0)::bigint) FILTER (WHERE is_default) OVER per_table AS default_rows_estimate,
       "interval",
       precreate,
       retention,
       on_expire,
       maintained_at AS last_maintained_at,
       last_error,
       last_error_at
FROM ranges
WINDOW per_table AS (PARTITION BY table_oid)
ORDER BY table_oid::regclass::text, is_default, range_start;

SET LOCAL search_path = @extschema@, pg_temp;

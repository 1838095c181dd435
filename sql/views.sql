-- Status views: what a DBA or a monitor reads. pg_monitor may read them.

-- Rows of a rollup's source above its watermark, and how long the oldest has waited. SECURITY DEFINER, so that a
-- monitoring role sees two numbers without being able to read the change log; hence the pinned search_path, and hence
-- no relation as an argument: it could be a view of the caller's. Counts up to a million rows.
CREATE FUNCTION litellm_spend.tail(rollup_name text, OUT tail_rows bigint, OUT oldest timestamptz)
LANGUAGE plpgsql STABLE STRICT PARALLEL SAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $tail$
DECLARE
    relation regclass;
    watermark bigint;
BEGIN
    SELECT s.relation, r.watermark INTO relation, watermark
    FROM litellm_spend.rollup r JOIN litellm_spend.source s ON s.name = r.source WHERE r.name = rollup_name;
    -- The change log may have been dropped; the worker makes it again.
    IF NOT EXISTS (SELECT FROM pg_class WHERE oid = relation) THEN
        RETURN;
    END IF;
    EXECUTE format('SELECT count(*), min(captured_at)
                    FROM (SELECT captured_at FROM %s WHERE seq > $1 ORDER BY seq LIMIT 1000000) AS tail', relation)
    INTO tail_rows, oldest USING watermark;
END
$tail$;

-- How much of the days that had rows when backfill began is covered, in per cent.
CREATE VIEW litellm_spend.backfill AS
SELECT r.name, r.covered_from,
       CASE
           WHEN r.covered_from = '-infinity' THEN 100
           WHEN r.covered_from = 'infinity' OR r.backfill_last IS NULL THEN 0
           ELSE round((100 * extract(epoch FROM r.backfill_last + interval '1 day' - r.covered_from)
                / extract(epoch FROM r.backfill_last + interval '1 day' - r.backfill_first))::numeric, 1)
       END AS covered
FROM litellm_spend.rollup r;

CREATE VIEW spend_rollup_status AS
SELECT r.name AS rollup,
       c.relation AS source,
       r.watermark,
       t.tail_rows,
       CASE WHEN t.tail_rows > 0 THEN round(extract(epoch FROM clock_timestamp() - t.oldest)::numeric, 3) ELSE 0 END
           AS lag_seconds,
       blockers.pids AS blocked_by_pids,
       blockers.prepared AS blocked_by_prepared,
       r.merged_at AS last_merge_at,
       r.merged_rows AS last_merge_rows,
       r.merged_groups AS last_merge_groups,
       round(r.merged_ms::numeric, 3) AS last_merge_ms,
       b.covered AS backfill_progress,
       r.covered_from,
       s.frozen_before,
       (SELECT count(*) FROM litellm_spend.dirty_range d WHERE d.repaired_at IS NULL) AS dirty_ranges,
       (SELECT CASE WHEN f.is_called THEN f.last_value ELSE 0 END FROM litellm_spend.capture_failures f)
           AS capture_errors,
       (SELECT count(*) FROM litellm_spend.dirty_range d WHERE d.unrepairable) AS unrepairable_ranges,
       v.live_views,
       coalesce(r.last_error, c.last_error) AS last_error,
       coalesce(r.last_error_at, c.last_error_at) AS last_error_at
FROM litellm_spend.rollup r
JOIN litellm_spend.source s ON s.name = r.source
JOIN litellm_spend.backfill b ON b.name = r.name
LEFT JOIN litellm_spend.capture c ON c.source = s.name
CROSS JOIN LATERAL litellm_spend.tail(r.name) AS t
CROSS JOIN LATERAL (
    SELECT array_agg(DISTINCT l.pid) FILTER (WHERE l.pid IS NOT NULL) AS pids,
           array_agg(DISTINCT p.gid) FILTER (WHERE p.gid IS NOT NULL) AS prepared
    FROM jsonb_array_elements_text(s.candidates -> 0 -> 'waits_for') AS holder(virtual_transaction)
    JOIN pg_catalog.pg_locks l ON l.virtualtransaction = holder.virtual_transaction AND l.relation = s.relation
    LEFT JOIN pg_catalog.pg_locks x ON l.pid IS NULL AND x.virtualtransaction = l.virtualtransaction
        AND x.locktype = 'transactionid'
    LEFT JOIN pg_catalog.pg_prepared_xacts p ON p.transaction = x.transactionid
) AS blockers
CROSS JOIN LATERAL (
    SELECT array_agg(name ORDER BY name) AS live_views FROM litellm_spend.public_view WHERE installed IS NOT NULL
) AS v;

CREATE VIEW spend_worker_status AS
SELECT datname AS database, pid, backend_type AS kind, backend_start AS started_at, state, wait_event, xact_start
FROM pg_catalog.pg_stat_activity
WHERE backend_type IN ('litellm_spend launcher', 'litellm_spend worker');

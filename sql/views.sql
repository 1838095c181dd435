-- Status views: what a DBA or a monitor reads. pg_monitor may read them.

-- How much is covered, in per cent: of the days that had rows when backfill began, or, of a declared rollup, of the
-- sequence values that there were when it was made.
CREATE VIEW litellm_spend.backfill AS
SELECT r.name, r.covered_from,
       CASE
           WHEN r.last_value > r.first_value
               THEN round(100 * (least(r.watermark, r.last_value) - r.first_value)::numeric
                    / (r.last_value - r.first_value), 1)
           WHEN r.covered_from = '-infinity' THEN 100
           WHEN r.covered_from = 'infinity' OR r.backfill_last IS NULL THEN 0
           ELSE round((100 * extract(epoch FROM r.backfill_last + interval '1 day' - r.covered_from)
                / extract(epoch FROM r.backfill_last + interval '1 day' - r.backfill_first))::numeric, 1)
       END AS covered
FROM litellm_spend.rollup r;

CREATE VIEW spend_rollup_status AS
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
       coalesce(r.last_error, c.last_error) AS last_error,
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
    JOIN pg_catalog.pg_locks l ON l.virtualtransaction = holder.virtual_transaction AND l.relation = s.relation
    LEFT JOIN pg_catalog.pg_locks x ON l.pid IS NULL AND x.virtualtransaction = l.virtualtransaction
        AND x.locktype = 'transactionid'
    LEFT JOIN pg_catalog.pg_prepared_xacts p ON p.transaction = x.transactionid
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
) AS v;

CREATE VIEW spend_worker_status AS
SELECT datname AS database, pid, backend_type AS kind, backend_start AS started_at, state, wait_event, xact_start
FROM pg_catalog.pg_stat_activity
WHERE backend_type IN ('litellm_spend launcher', 'litellm_spend worker');

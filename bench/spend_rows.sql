-- Fills "LiteLLM_SpendLogs" with rows shaped as LiteLLM 1.109 writes them, a day a statement, up to now.
--
--   psql -X -v rows=470000 -f bench/spend_rows.sql
--
--   rows     470000   about 1 GiB with all of LiteLLM's indexes (wide rows)
--   days     30       the first day is that many days ago
--   seed     1        the same seed and day make the same rows; another one adds to them
--   narrow   off      on: tiny metadata, for runs with many rows
--   many     off      on: 264 users, 40 models, up to 4 tags a row instead of 60, 12 and 3
--
-- No random(): every value is a hash of (seed, day, row number), so that runs can be compared.
\set ON_ERROR_STOP on
\set QUIET on
\if :{?rows}   \else \set rows 470000 \endif
\if :{?days}   \else \set days 30     \endif
\if :{?seed}   \else \set seed 1      \endif
\if :{?narrow} \else \set narrow off  \endif
\if :{?many}   \else \set many off    \endif
SELECT :seed * 100 AS seed00 \gset
SET synchronous_commit = off;
SET client_min_messages = warning;
SET timezone = 'UTC';

-- Uniform in (0, 1); `salt` tells the columns of a row apart.
CREATE FUNCTION pg_temp.uniform(row_key bigint, salt bigint) RETURNS double precision
LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$ SELECT ((pg_catalog.hashint8extended(row_key, salt) & 4503599627370495) + 0.5::float8) / 4503599627370496 $$;

-- Log-normal (Box and Muller), around exp(mu).
CREATE FUNCTION pg_temp.log_normal(row_key bigint, salt bigint, mu double precision, sigma double precision)
RETURNS double precision
LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$ SELECT exp(mu + sigma * sqrt(-2 * ln(pg_temp.uniform(row_key, salt)))
                            * cos(2 * pi() * pg_temp.uniform(row_key, salt + 1))) $$;

-- 200 keys of 60 users in 20 teams of 5 organizations; key 0 is the proxy's own.
CREATE TEMP TABLE keys AS
SELECT k AS key_rank,
       encode(sha256(('sk-' || k)::bytea), 'hex') AS api_key,
       format('team-%s-key-%s', k % 20, k) AS alias,
       format('user%s@corp.example', k % 60) AS user_id,
       format('team-%s', k % 20) AS team_id,
       CASE WHEN k % 20 < 15 THEN format('org-%s', k % 5) ELSE '' END AS organization_id, -- some teams have none
       format('10.%s.%s.%s', k % 7, k % 31, k) AS ip
FROM generate_series(1, 200) k
UNION ALL
SELECT 0, 'litellm_proxy_master_key', NULL, 'default_user_id', '', '', '10.0.0.2';

-- Models: share of requests, dollars per million tokens in and out. With many, each has three or four versions.
CREATE TEMP TABLE models AS
SELECT model_group, model, provider, call_type, dollars_in::float8, dollars_out::float8, left(md5(model), 10) AS model_id,
       (sum(share) OVER w - share)::float8 AS share_from, (sum(share) OVER w)::float8 AS share_to,
       CASE WHEN NOT :'many'::boolean THEN 1 WHEN row_number() OVER w <= 4 THEN 4 ELSE 3 END AS versions
FROM (VALUES
    ('gpt-4o-mini',            'openai/gpt-4o-mini',                              'openai',    'acompletion',        0.26, 0.15,  0.60),
    ('gpt-4o',                 'openai/gpt-4o',                                   'openai',    'acompletion',        0.14, 2.50, 10.00),
    ('gpt-4.1',                'azure/gpt-4.1',                                   'azure',     'acompletion',        0.10, 2.00,  8.00),
    ('o4-mini',                'openai/o4-mini',                                  'openai',    'aresponses',         0.03, 1.10,  4.40),
    ('claude-sonnet',          'anthropic/claude-sonnet-4-20250514',              'anthropic', 'acompletion',        0.13, 3.00, 15.00),
    ('claude-code',            'claude-sonnet-4-20250514',                        'anthropic', 'anthropic_messages', 0.05, 3.00, 15.00),
    ('claude-haiku',           'bedrock/anthropic.claude-3-5-haiku-20241022-v1:0', 'bedrock',  'acompletion',        0.07, 0.80,  4.00),
    ('gemini-flash',           'vertex_ai/gemini-2.5-flash',                      'vertex_ai', 'acompletion',        0.08, 0.30,  2.50),
    ('gemini-pro',             'gemini/gemini-2.5-pro',                           'gemini',    'acompletion',        0.03, 1.25, 10.00),
    ('llama-70b',              'groq/llama-3.3-70b-versatile',                    'groq',      'acompletion',        0.03, 0.59,  0.79),
    ('mistral-large',          'mistral/mistral-large-latest',                    'mistral',   'acompletion',        0.02, 2.00,  6.00),
    ('text-embedding-3-small', 'openai/text-embedding-3-small',                   'openai',    'aembedding',         0.06, 0.02,  0.00)
) AS m (model_group, model, provider, call_type, share, dollars_in, dollars_out)
WINDOW w AS (ORDER BY model);

-- $1 day, $2 number of rows, $3 part of the day that has passed
PREPARE spend_day (date, bigint, double precision) AS
INSERT INTO "LiteLLM_SpendLogs" (
    request_id, call_type, api_key, spend, total_tokens, prompt_tokens, completion_tokens,
    "startTime", "endTime", "completionStartTime", model, model_id, model_group, custom_llm_provider, api_base,
    "user", metadata, cache_hit, cache_key, request_tags, team_id, organization_id, end_user, requester_ip_address,
    session_id, status, request_duration_ms, created_at, updated_at, litellm_call_id)
SELECT
    CASE WHEN failed THEN call_id ELSE 'chatcmpl-' || request_uuid END
        || CASE WHEN cached THEN '_cache_hit' || round(extract(epoch FROM started), 3) ELSE '' END,
    m.call_type, k.api_key, cost, tokens_in + tokens_out, tokens_in, tokens_out,
    started, ended, started + (ended - started) / 3,
    m.model || CASE WHEN version > 0 THEN '-2025-0' || version ELSE '' END, m.model_id, m.model_group,
    CASE WHEN failed THEN '' ELSE m.provider END, '',
    CASE -- with many, every fourth key is shared by four users
        WHEN NOT :'many'::boolean THEN k.user_id
        WHEN k.key_rank % 4 = 0 THEN format('user%s@corp.example', (k.key_rank + 75 * floor(4 * user_draw)::int) % 300)
        ELSE format('user%s@corp.example', k.key_rank)
    END,
    CASE WHEN :'narrow'::boolean
        THEN jsonb_build_object('user_api_key_alias', k.alias, 'status', CASE WHEN failed THEN 'failure' END)
        ELSE concat(
            '{"actor_agent_id": null, "target_agent_id": null, "billing_agent_id": null, "user_api_key": "', k.api_key,
            '", "user_api_key_alias": ', coalesce('"' || k.alias || '"', 'null'),
            ', "user_api_key_team_id": "', k.team_id, '", "user_api_key_team_alias": "', k.team_id,
            '", "user_api_key_org_id": null, "user_api_key_user_id": "', k.user_id,
            '", "requester_ip_address": "', k.ip, '", "user_agent": "OpenAI/Python 1.', 60 + k.key_rank % 40,
            '", "litellm_call_id": "', call_id,
            '", "applied_guardrails": [], ',
            CASE WHEN failed
                THEN '"status": "failure", "usage_object": null, "cost_breakdown": null, "model_map_information": null, '
                    '"error_information": {"error_code": "429", "error_class": "RateLimitError", "llm_provider": "' || m.provider
                    || '", "traceback": "", "error_message": "litellm.RateLimitError: Rate limit reached for ' || m.model
                    || ' in organization ' || left(request_uuid, 18) || ' on tokens per min. Please try again later.", '
                    '"normalized_error": "429_RATE_LIMIT_EXCEEDED"}, '
                ELSE concat(
                    '"status": null, "error_information": null, "usage_object": {"prompt_tokens": ', tokens_in,
                    ', "completion_tokens": ', tokens_out, ', "total_tokens": ', tokens_in + tokens_out,
                    '}, "cost_breakdown": {"total_cost": ', cost,
                    ', "input_cost": ', cost * 0.25, ', "output_cost": ', cost * 0.75, ', "discount_percent": 0.0}, "model_map_information": {"model_map_key": "', m.model,
                    '", "model_map_value": {"max_input_tokens": 128000, "input_cost_per_token": ', m.dollars_in / 1e6,
                    ', "output_cost_per_token": ', m.dollars_out / 1e6, ', "litellm_provider": "', m.provider, '", "mode": "chat"}}, ')
            END,
            '"litellm_overhead_time_ms": ', milliseconds / 97, ', "max_retries": 2}')::jsonb
    END,
    CASE WHEN cached THEN 'True' WHEN failed OR cache_draw < 0.4 THEN 'False' ELSE 'None' END,
    CASE WHEN cached THEN md5(request_uuid) || md5(call_id) ELSE 'Cache OFF' END,
    CASE -- 0 to 3 tags, or 4, sometimes the same one twice
        WHEN tag_draw < 0.30 THEN '[]'
        WHEN tag_draw < 0.60 THEN jsonb_build_array(agent)
        WHEN tag_draw < 0.80 THEN jsonb_build_array(agent, stage)
        WHEN tag_draw < 0.85 AND :'many'::boolean
            THEN jsonb_build_array(agent, stage, 'repo:acme/app-' || k.key_rank % 25, 'job:' || k.key_rank % 3)
        WHEN tag_draw < 0.97 THEN jsonb_build_array(agent, stage, 'repo:acme/app-' || k.key_rank % 25)
        ELSE jsonb_build_array(stage, stage)
    END,
    CASE WHEN old_row THEN NULL ELSE k.team_id END, CASE WHEN old_row THEN NULL ELSE k.organization_id END,
    CASE -- half of the requests name one of 2,000 customers
        WHEN customer_draw < 0.35 THEN '' WHEN customer_draw < 0.50 THEN NULL
        ELSE 'customer-' || floor(power(2001, customer_draw * 2 - 1))::int
    END,
    k.ip, md5(call_id)::uuid::text,
    CASE WHEN old_row THEN NULL WHEN failed THEN 'failure' ELSE 'success' END,
    milliseconds, ended, ended, call_id
FROM (
    SELECT *, ($1 - DATE '2000-01-01')::bigint * 100000000 + n AS row_key
    FROM generate_series(1, $2) n
) numbered
CROSS JOIN LATERAL (
    SELECT -- requests a day in order of time, four times as dense at noon as at midnight
        (n - 1 + pg_temp.uniform(row_key, :seed00 + 1)) / $2 AS u,
        -- ranks by power: the k-th key gets a share of about 1/k
        CASE WHEN pg_temp.uniform(row_key, :seed00 + 2) < 0.02 THEN 0
             ELSE floor(power(201, pg_temp.uniform(row_key, :seed00 + 3)))::int END AS key_rank,
        pg_temp.uniform(row_key, :seed00 + 4) AS model_draw,
        pg_temp.uniform(row_key, :seed00 + 5) AS fate_draw,
        pg_temp.uniform(row_key, :seed00 + 6) AS cache_draw,
        pg_temp.uniform(row_key, :seed00 + 7) AS tag_draw,
        pg_temp.uniform(row_key, :seed00 + 8) AS customer_draw,
        pg_temp.uniform(row_key, :seed00 + 9) AS user_draw,
        pg_temp.uniform(row_key, :seed00 + 16) AS version_draw,
        md5(row_key || ' request ' || :seed)::uuid::text AS request_uuid,
        md5(row_key || ' call ' || :seed)::uuid::text AS call_id,
        greatest(1, pg_temp.log_normal(row_key, :seed00 + 10, 6.0, 1.6))::int AS prompt,
        greatest(1, pg_temp.log_normal(row_key, :seed00 + 12, 5.0, 1.0))::int AS completion,
        greatest(20, pg_temp.log_normal(row_key, :seed00 + 14, 7.3, 0.8))::int AS duration
    OFFSET 0 -- compute each of these once
) draw
JOIN keys k ON k.key_rank = draw.key_rank
JOIN models m ON model_draw >= share_from AND model_draw < share_to
CROSS JOIN LATERAL (
    SELECT
        fate_draw < 0.03 AS failed,
        fate_draw > 0.95 AS cached,
        fate_draw BETWEEN 0.03 AND 0.035 AS old_row, -- as before the column "status"
        CASE WHEN fate_draw < 0.03 THEN 0 ELSE prompt END AS tokens_in,
        CASE WHEN fate_draw < 0.03 OR m.call_type = 'aembedding' THEN 0 ELSE completion END AS tokens_out,
        CASE WHEN fate_draw > 0.95 THEN 2 ELSE duration END AS milliseconds,
        floor(versions * version_draw)::int AS version,
        'User-Agent: OpenAI/Python 1.' || 60 + k.key_rank % 40 AS agent,
        (ARRAY['env:prod', 'env:staging', 'env:dev'])[1 + k.key_rank % 3] AS stage,
        $1 + INTERVAL '1 day' * ($3 * (u + 0.6 * sin(2 * pi() * u) / (2 * pi()))) AS started
    OFFSET 0
) request
CROSS JOIN LATERAL (
    SELECT
        CASE WHEN failed OR cached THEN 0 ELSE
            least(0.5, greatest(1e-6, (tokens_in * m.dollars_in + tokens_out * m.dollars_out) / 1e6))
        END AS cost,
        started + INTERVAL '1 millisecond' * milliseconds AS ended
    OFFSET 0
) derived;

-- Weekends have half as many requests; today has only begun.
WITH calendar AS (
    SELECT day::date,
           least(1, extract(epoch FROM now() - day) / 86400) AS part,
           CASE WHEN extract(isodow FROM day) > 5 THEN 1 ELSE 2 END
               * least(1, extract(epoch FROM now() - day) / 86400) AS weight
    FROM generate_series(CURRENT_DATE - :days, CURRENT_DATE, INTERVAL '1 day') day
), totals AS (
    SELECT *, round(:rows * sum(weight) OVER (ORDER BY day) / sum(weight) OVER ()) AS done FROM calendar
), batches AS (
    SELECT *, done - lag(done, 1, 0) OVER (ORDER BY day) AS rows FROM totals
)
SELECT format('EXECUTE spend_day(%L, %s, %s)', day, rows, part),
       format('SELECT %L', format('  %s %s rows, %s in all', day, to_char(rows, '9,999,999'), to_char(done, '99,999,999')))
FROM batches WHERE rows > 0 ORDER BY day
\pset tuples_only on
\pset format unaligned
\gexec

-- As autovacuum would, soon after.
VACUUM (ANALYZE) "LiteLLM_SpendLogs";
SELECT format('  %s rows, %s with indexes', to_char(count(*), 'FM99,999,999'),
              pg_size_pretty(pg_total_relation_size('"LiteLLM_SpendLogs"')))
FROM "LiteLLM_SpendLogs";
\pset tuples_only off
\pset format aligned

-- What spend_attach() of version 0.1.0 left in a database of LiteLLM's that is owned by role litellm, as pg_dump says it: the log,
-- the rollups and their views, the trigger functions with a superuser's rights, the state, and LiteLLM's views over ours.

SET search_path = '';

CREATE FUNCTION litellm_spend.capture_delete() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET lock_timeout TO '1s'
    AS $$
DECLARE
    failure bigint;
BEGIN
    INSERT INTO litellm_spend.retired ("hour", "api_key", "user", "team_id", "organization_id", "end_user", "model", "model_group", "custom_llm_provider", "status", "cache_hit", "call_type", "request_tags", "agent_id", "spend", "prompt_tokens", "completion_tokens", "total_tokens", "requests", "failed_requests") SELECT "hour", "api_key", "user", "team_id", "organization_id", "end_user", "model", "model_group", "custom_llm_provider", "status", "cache_hit", "call_type", "request_tags"::text::jsonb, "agent_id", sum("spend")::numeric, sum("prompt_tokens")::bigint, sum("completion_tokens")::bigint, sum("total_tokens")::bigint, sum("requests")::bigint, sum("failed_requests")::bigint FROM (SELECT date_trunc('hour', r."startTime") AS hour, r."api_key", r."user", r."team_id", r."organization_id", r."end_user", r."model", r."model_group", r."custom_llm_provider", r."status", r."cache_hit", r."call_type", r."request_tags", r."agent_id", CASE WHEN r.spend > '-Infinity' AND r.spend < 'Infinity' THEN r.spend::numeric ELSE 0 END AS "spend", coalesce(r.prompt_tokens, 0)::bigint AS "prompt_tokens", coalesce(r.completion_tokens, 0)::bigint AS "completion_tokens", coalesce(r.total_tokens, 0)::bigint AS "total_tokens", 1::bigint AS "requests", (r.status IS NOT DISTINCT FROM 'failure')::int::bigint AS "failed_requests" FROM old_rows AS r ) AS changes GROUP BY "hour", "api_key", "user", "team_id", "organization_id", "end_user", "model", "model_group", "custom_llm_provider", "status", "cache_hit", "call_type", "request_tags"::text, "agent_id" HAVING sum("spend") <> 0 OR sum("prompt_tokens") <> 0 OR sum("completion_tokens") <> 0 OR sum("total_tokens") <> 0 OR sum("requests") <> 0 OR sum("failed_requests") <> 0;
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    BEGIN
        failure := nextval('litellm_spend.capture_failures');
        INSERT INTO litellm_spend.dirty_range (failure, range_start, range_end, repair, operation, sqlstate, message)
        SELECT DISTINCT failure, date_trunc('day', "startTime"), date_trunc('day', "startTime") + interval '1 day',
               'keep', TG_OP, SQLSTATE, SQLERRM
        FROM old_rows AS r;
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;
    RAISE WARNING 'litellm_spend could not capture % on %: %', TG_OP, TG_TABLE_NAME, SQLERRM
        USING HINT = 'The statement itself is not affected; the days concerned are rebuilt.';
    RETURN NULL;
END
$$;

ALTER FUNCTION litellm_spend.capture_delete() OWNER TO postgres;

CREATE FUNCTION litellm_spend.capture_insert() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET lock_timeout TO '1s'
    AS $$
DECLARE
    failure bigint;
BEGIN
    INSERT INTO litellm_spend.change_log ("hour", "api_key", "user", "team_id", "organization_id", "end_user", "model", "model_group", "custom_llm_provider", "status", "cache_hit", "call_type", "request_tags", "agent_id", "spend", "prompt_tokens", "completion_tokens", "total_tokens", "requests", "failed_requests") SELECT date_trunc('hour', r."startTime") AS hour, r."api_key", r."user", r."team_id", r."organization_id", r."end_user", r."model", r."model_group", r."custom_llm_provider", r."status", r."cache_hit", r."call_type", r."request_tags", r."agent_id", CASE WHEN r.spend > '-Infinity' AND r.spend < 'Infinity' THEN r.spend::numeric ELSE 0 END AS "spend", coalesce(r.prompt_tokens, 0)::bigint AS "prompt_tokens", coalesce(r.completion_tokens, 0)::bigint AS "completion_tokens", coalesce(r.total_tokens, 0)::bigint AS "total_tokens", 1::bigint AS "requests", (r.status IS NOT DISTINCT FROM 'failure')::int::bigint AS "failed_requests" FROM new_rows AS r ;
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    BEGIN
        failure := nextval('litellm_spend.capture_failures');
        INSERT INTO litellm_spend.dirty_range (failure, range_start, range_end, repair, operation, sqlstate, message)
        SELECT DISTINCT failure, date_trunc('day', "startTime"), date_trunc('day', "startTime") + interval '1 day',
               'rebuild', TG_OP, SQLSTATE, SQLERRM
        FROM new_rows AS r;
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;
    RAISE WARNING 'litellm_spend could not capture % on %: %', TG_OP, TG_TABLE_NAME, SQLERRM
        USING HINT = 'The statement itself is not affected; the days concerned are rebuilt.';
    RETURN NULL;
END
$$;

ALTER FUNCTION litellm_spend.capture_insert() OWNER TO postgres;

CREATE FUNCTION litellm_spend.capture_truncate() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET lock_timeout TO '1s'
    AS $$
BEGIN
    INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation)
    VALUES ('-infinity', 'infinity', 'freeze', TG_OP);
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    RAISE WARNING 'litellm_spend could not record TRUNCATE of %: %', TG_TABLE_NAME, SQLERRM
        USING HINT = 'Do not call spend_rollup_rebuild() for days that were truncated.';
    RETURN NULL;
END
$$;

ALTER FUNCTION litellm_spend.capture_truncate() OWNER TO postgres;

CREATE FUNCTION litellm_spend.capture_update() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET lock_timeout TO '1s'
    AS $$
DECLARE
    failure bigint;
BEGIN
    INSERT INTO litellm_spend.change_log ("hour", "api_key", "user", "team_id", "organization_id", "end_user", "model", "model_group", "custom_llm_provider", "status", "cache_hit", "call_type", "request_tags", "agent_id", "spend", "prompt_tokens", "completion_tokens", "total_tokens", "requests", "failed_requests") SELECT "hour", "api_key", "user", "team_id", "organization_id", "end_user", "model", "model_group", "custom_llm_provider", "status", "cache_hit", "call_type", "request_tags"::text::jsonb, "agent_id", sum("spend")::numeric, sum("prompt_tokens")::bigint, sum("completion_tokens")::bigint, sum("total_tokens")::bigint, sum("requests")::bigint, sum("failed_requests")::bigint FROM (SELECT date_trunc('hour', r."startTime") AS hour, r."api_key", r."user", r."team_id", r."organization_id", r."end_user", r."model", r."model_group", r."custom_llm_provider", r."status", r."cache_hit", r."call_type", r."request_tags", r."agent_id", - (CASE WHEN r.spend > '-Infinity' AND r.spend < 'Infinity' THEN r.spend::numeric ELSE 0 END) AS "spend", - (coalesce(r.prompt_tokens, 0)::bigint) AS "prompt_tokens", - (coalesce(r.completion_tokens, 0)::bigint) AS "completion_tokens", - (coalesce(r.total_tokens, 0)::bigint) AS "total_tokens", - (1::bigint) AS "requests", - ((r.status IS NOT DISTINCT FROM 'failure')::int::bigint) AS "failed_requests" FROM old_rows AS r  UNION ALL SELECT date_trunc('hour', r."startTime") AS hour, r."api_key", r."user", r."team_id", r."organization_id", r."end_user", r."model", r."model_group", r."custom_llm_provider", r."status", r."cache_hit", r."call_type", r."request_tags", r."agent_id", CASE WHEN r.spend > '-Infinity' AND r.spend < 'Infinity' THEN r.spend::numeric ELSE 0 END AS "spend", coalesce(r.prompt_tokens, 0)::bigint AS "prompt_tokens", coalesce(r.completion_tokens, 0)::bigint AS "completion_tokens", coalesce(r.total_tokens, 0)::bigint AS "total_tokens", 1::bigint AS "requests", (r.status IS NOT DISTINCT FROM 'failure')::int::bigint AS "failed_requests" FROM new_rows AS r ) AS changes GROUP BY "hour", "api_key", "user", "team_id", "organization_id", "end_user", "model", "model_group", "custom_llm_provider", "status", "cache_hit", "call_type", "request_tags"::text, "agent_id" HAVING sum("spend") <> 0 OR sum("prompt_tokens") <> 0 OR sum("completion_tokens") <> 0 OR sum("total_tokens") <> 0 OR sum("requests") <> 0 OR sum("failed_requests") <> 0;
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    BEGIN
        failure := nextval('litellm_spend.capture_failures');
        INSERT INTO litellm_spend.dirty_range (failure, range_start, range_end, repair, operation, sqlstate, message)
        SELECT DISTINCT failure, date_trunc('day', "startTime"), date_trunc('day', "startTime") + interval '1 day',
               'rebuild', TG_OP, SQLSTATE, SQLERRM
        FROM (SELECT "startTime" FROM old_rows UNION ALL SELECT "startTime" FROM new_rows) AS r;
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;
    RAISE WARNING 'litellm_spend could not capture % on %: %', TG_OP, TG_TABLE_NAME, SQLERRM
        USING HINT = 'The statement itself is not affected; the days concerned are rebuilt.';
    RETURN NULL;
END
$$;

ALTER FUNCTION litellm_spend.capture_update() OWNER TO postgres;

CREATE SEQUENCE litellm_spend.change_log_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;

ALTER TABLE litellm_spend.change_log_seq OWNER TO postgres;

COMMENT ON SEQUENCE litellm_spend.change_log_seq IS 'Numbers the rows of the change log';



CREATE TABLE litellm_spend.change_log (
    seq bigint DEFAULT nextval('litellm_spend.change_log_seq'::regclass) NOT NULL,
    captured_at timestamp with time zone DEFAULT now() NOT NULL,
    hour timestamp without time zone NOT NULL,
    api_key text,
    "user" text,
    team_id text,
    organization_id text,
    end_user text,
    model text,
    model_group text,
    custom_llm_provider text,
    status text,
    cache_hit text,
    call_type text,
    request_tags jsonb,
    agent_id text,
    spend numeric NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    total_tokens bigint NOT NULL,
    requests bigint NOT NULL,
    failed_requests bigint NOT NULL
)
WITH (vacuum_truncate=off, autovacuum_vacuum_scale_factor='0', autovacuum_vacuum_threshold='20000');

ALTER TABLE litellm_spend.change_log OWNER TO postgres;

COMMENT ON TABLE litellm_spend.change_log IS 'What statements on the captured table added (+) and removed (-)';

CREATE TABLE litellm_spend.daily_spend_rollup (
    date date NOT NULL,
    spend numeric DEFAULT 0 NOT NULL,
    prompt_tokens bigint DEFAULT 0 NOT NULL,
    completion_tokens bigint DEFAULT 0 NOT NULL,
    total_tokens bigint DEFAULT 0 NOT NULL,
    requests bigint DEFAULT 0 NOT NULL,
    failed_requests bigint DEFAULT 0 NOT NULL
)
WITH (fillfactor='80');

ALTER TABLE litellm_spend.daily_spend_rollup OWNER TO postgres;

COMMENT ON TABLE litellm_spend.daily_spend_rollup IS 'Merged rows of rollup daily_spend';

CREATE VIEW litellm_spend.daily_spend AS
 SELECT rows.date,
    sum(rows.spend) AS spend,
    (sum(rows.prompt_tokens))::bigint AS prompt_tokens,
    (sum(rows.completion_tokens))::bigint AS completion_tokens,
    (sum(rows.total_tokens))::bigint AS total_tokens,
    (sum(rows.requests))::bigint AS requests,
    (sum(rows.failed_requests))::bigint AS failed_requests
   FROM ( SELECT daily_spend_rollup.date,
            daily_spend_rollup.spend,
            daily_spend_rollup.prompt_tokens,
            daily_spend_rollup.completion_tokens,
            daily_spend_rollup.total_tokens,
            daily_spend_rollup.requests,
            daily_spend_rollup.failed_requests
           FROM litellm_spend.daily_spend_rollup
        UNION ALL
         SELECT (r.hour)::date AS date,
            r.spend,
            r.prompt_tokens,
            r.completion_tokens,
            r.total_tokens,
            r.requests,
            r.failed_requests
           FROM litellm_spend.change_log r
          WHERE (r.seq > ( SELECT rollup.watermark
                   FROM litellm_spend.rollup
                  WHERE (rollup.name = 'daily_spend'::text)))) rows
  GROUP BY rows.date
 HAVING (sum(rows.requests) <> (0)::numeric);

ALTER TABLE litellm_spend.daily_spend OWNER TO postgres;

COMMENT ON VIEW litellm_spend.daily_spend IS 'Rollup daily_spend: merged rows and tail, exact in every snapshot';

CREATE TABLE litellm_spend.daily_spend_by_end_user_rollup (
    date date NOT NULL,
    end_user text,
    spend numeric DEFAULT 0 NOT NULL,
    prompt_tokens bigint DEFAULT 0 NOT NULL,
    completion_tokens bigint DEFAULT 0 NOT NULL,
    total_tokens bigint DEFAULT 0 NOT NULL,
    requests bigint DEFAULT 0 NOT NULL,
    failed_requests bigint DEFAULT 0 NOT NULL
)
WITH (fillfactor='80');

ALTER TABLE ONLY litellm_spend.daily_spend_by_end_user_rollup REPLICA IDENTITY FULL;

ALTER TABLE litellm_spend.daily_spend_by_end_user_rollup OWNER TO postgres;

COMMENT ON TABLE litellm_spend.daily_spend_by_end_user_rollup IS 'Merged rows of rollup daily_spend_by_end_user';

CREATE VIEW litellm_spend.daily_spend_by_end_user AS
 SELECT rows.date,
    rows.end_user,
    sum(rows.spend) AS spend,
    (sum(rows.prompt_tokens))::bigint AS prompt_tokens,
    (sum(rows.completion_tokens))::bigint AS completion_tokens,
    (sum(rows.total_tokens))::bigint AS total_tokens,
    (sum(rows.requests))::bigint AS requests,
    (sum(rows.failed_requests))::bigint AS failed_requests
   FROM ( SELECT daily_spend_by_end_user_rollup.date,
            daily_spend_by_end_user_rollup.end_user,
            daily_spend_by_end_user_rollup.spend,
            daily_spend_by_end_user_rollup.prompt_tokens,
            daily_spend_by_end_user_rollup.completion_tokens,
            daily_spend_by_end_user_rollup.total_tokens,
            daily_spend_by_end_user_rollup.requests,
            daily_spend_by_end_user_rollup.failed_requests
           FROM litellm_spend.daily_spend_by_end_user_rollup
        UNION ALL
         SELECT (r.hour)::date AS date,
                CASE
                    WHEN (octet_length(r.end_user) > 600) THEN (("left"(r.end_user, 30) || '…'::text) || encode(sha256(convert_to(r.end_user, 'UTF8'::name)), 'hex'::text))
                    ELSE r.end_user
                END AS end_user,
            r.spend,
            r.prompt_tokens,
            r.completion_tokens,
            r.total_tokens,
            r.requests,
            r.failed_requests
           FROM litellm_spend.change_log r
          WHERE (r.seq > ( SELECT rollup.watermark
                   FROM litellm_spend.rollup
                  WHERE (rollup.name = 'daily_spend_by_end_user'::text)))) rows
  GROUP BY rows.date, rows.end_user
 HAVING (sum(rows.requests) <> (0)::numeric);

ALTER TABLE litellm_spend.daily_spend_by_end_user OWNER TO postgres;

COMMENT ON VIEW litellm_spend.daily_spend_by_end_user IS 'Rollup daily_spend_by_end_user: merged rows and tail, exact in every snapshot';

CREATE TABLE litellm_spend.daily_spend_by_key_rollup (
    date date NOT NULL,
    api_key text,
    "user" text,
    spend numeric DEFAULT 0 NOT NULL,
    prompt_tokens bigint DEFAULT 0 NOT NULL,
    completion_tokens bigint DEFAULT 0 NOT NULL,
    total_tokens bigint DEFAULT 0 NOT NULL,
    requests bigint DEFAULT 0 NOT NULL,
    failed_requests bigint DEFAULT 0 NOT NULL
)
WITH (fillfactor='80');

ALTER TABLE ONLY litellm_spend.daily_spend_by_key_rollup REPLICA IDENTITY FULL;

ALTER TABLE litellm_spend.daily_spend_by_key_rollup OWNER TO postgres;

COMMENT ON TABLE litellm_spend.daily_spend_by_key_rollup IS 'Merged rows of rollup daily_spend_by_key';

CREATE VIEW litellm_spend.daily_spend_by_key AS
 SELECT rows.date,
    rows.api_key,
    rows."user",
    sum(rows.spend) AS spend,
    (sum(rows.prompt_tokens))::bigint AS prompt_tokens,
    (sum(rows.completion_tokens))::bigint AS completion_tokens,
    (sum(rows.total_tokens))::bigint AS total_tokens,
    (sum(rows.requests))::bigint AS requests,
    (sum(rows.failed_requests))::bigint AS failed_requests
   FROM ( SELECT daily_spend_by_key_rollup.date,
            daily_spend_by_key_rollup.api_key,
            daily_spend_by_key_rollup."user",
            daily_spend_by_key_rollup.spend,
            daily_spend_by_key_rollup.prompt_tokens,
            daily_spend_by_key_rollup.completion_tokens,
            daily_spend_by_key_rollup.total_tokens,
            daily_spend_by_key_rollup.requests,
            daily_spend_by_key_rollup.failed_requests
           FROM litellm_spend.daily_spend_by_key_rollup
        UNION ALL
         SELECT (r.hour)::date AS date,
                CASE
                    WHEN (octet_length(r.api_key) > 200) THEN (("left"(r.api_key, 30) || '…'::text) || encode(sha256(convert_to(r.api_key, 'UTF8'::name)), 'hex'::text))
                    ELSE r.api_key
                END AS api_key,
                CASE
                    WHEN (octet_length(r."user") > 200) THEN (("left"(r."user", 30) || '…'::text) || encode(sha256(convert_to(r."user", 'UTF8'::name)), 'hex'::text))
                    ELSE r."user"
                END AS "user",
            r.spend,
            r.prompt_tokens,
            r.completion_tokens,
            r.total_tokens,
            r.requests,
            r.failed_requests
           FROM litellm_spend.change_log r
          WHERE (r.seq > ( SELECT rollup.watermark
                   FROM litellm_spend.rollup
                  WHERE (rollup.name = 'daily_spend_by_key'::text)))) rows
  GROUP BY rows.date, rows.api_key, rows."user"
 HAVING (sum(rows.requests) <> (0)::numeric);

ALTER TABLE litellm_spend.daily_spend_by_key OWNER TO postgres;

COMMENT ON VIEW litellm_spend.daily_spend_by_key IS 'Rollup daily_spend_by_key: merged rows and tail, exact in every snapshot';

CREATE TABLE litellm_spend.daily_spend_by_model_rollup (
    date date NOT NULL,
    model text,
    spend numeric DEFAULT 0 NOT NULL,
    prompt_tokens bigint DEFAULT 0 NOT NULL,
    completion_tokens bigint DEFAULT 0 NOT NULL,
    total_tokens bigint DEFAULT 0 NOT NULL,
    requests bigint DEFAULT 0 NOT NULL,
    failed_requests bigint DEFAULT 0 NOT NULL
)
WITH (fillfactor='80');

ALTER TABLE ONLY litellm_spend.daily_spend_by_model_rollup REPLICA IDENTITY FULL;

ALTER TABLE litellm_spend.daily_spend_by_model_rollup OWNER TO postgres;

COMMENT ON TABLE litellm_spend.daily_spend_by_model_rollup IS 'Merged rows of rollup daily_spend_by_model';

CREATE VIEW litellm_spend.daily_spend_by_model AS
 SELECT rows.date,
    rows.model,
    sum(rows.spend) AS spend,
    (sum(rows.prompt_tokens))::bigint AS prompt_tokens,
    (sum(rows.completion_tokens))::bigint AS completion_tokens,
    (sum(rows.total_tokens))::bigint AS total_tokens,
    (sum(rows.requests))::bigint AS requests,
    (sum(rows.failed_requests))::bigint AS failed_requests
   FROM ( SELECT daily_spend_by_model_rollup.date,
            daily_spend_by_model_rollup.model,
            daily_spend_by_model_rollup.spend,
            daily_spend_by_model_rollup.prompt_tokens,
            daily_spend_by_model_rollup.completion_tokens,
            daily_spend_by_model_rollup.total_tokens,
            daily_spend_by_model_rollup.requests,
            daily_spend_by_model_rollup.failed_requests
           FROM litellm_spend.daily_spend_by_model_rollup
        UNION ALL
         SELECT (r.hour)::date AS date,
                CASE
                    WHEN (octet_length(r.model) > 200) THEN (("left"(r.model, 30) || '…'::text) || encode(sha256(convert_to(r.model, 'UTF8'::name)), 'hex'::text))
                    ELSE r.model
                END AS model,
            r.spend,
            r.prompt_tokens,
            r.completion_tokens,
            r.total_tokens,
            r.requests,
            r.failed_requests
           FROM litellm_spend.change_log r
          WHERE (r.seq > ( SELECT rollup.watermark
                   FROM litellm_spend.rollup
                  WHERE (rollup.name = 'daily_spend_by_model'::text)))) rows
  GROUP BY rows.date, rows.model
 HAVING (sum(rows.requests) <> (0)::numeric);

ALTER TABLE litellm_spend.daily_spend_by_model OWNER TO postgres;

COMMENT ON VIEW litellm_spend.daily_spend_by_model IS 'Rollup daily_spend_by_model: merged rows and tail, exact in every snapshot';

CREATE TABLE litellm_spend.daily_spend_by_tag_rollup (
    date date NOT NULL,
    tag text,
    spend numeric DEFAULT 0 NOT NULL,
    prompt_tokens bigint DEFAULT 0 NOT NULL,
    completion_tokens bigint DEFAULT 0 NOT NULL,
    total_tokens bigint DEFAULT 0 NOT NULL,
    requests bigint DEFAULT 0 NOT NULL,
    failed_requests bigint DEFAULT 0 NOT NULL
)
WITH (fillfactor='80');

ALTER TABLE ONLY litellm_spend.daily_spend_by_tag_rollup REPLICA IDENTITY FULL;

ALTER TABLE litellm_spend.daily_spend_by_tag_rollup OWNER TO postgres;

COMMENT ON TABLE litellm_spend.daily_spend_by_tag_rollup IS 'Merged rows of rollup daily_spend_by_tag';

CREATE VIEW litellm_spend.daily_spend_by_tag AS
 SELECT rows.date,
    rows.tag,
    sum(rows.spend) AS spend,
    (sum(rows.prompt_tokens))::bigint AS prompt_tokens,
    (sum(rows.completion_tokens))::bigint AS completion_tokens,
    (sum(rows.total_tokens))::bigint AS total_tokens,
    (sum(rows.requests))::bigint AS requests,
    (sum(rows.failed_requests))::bigint AS failed_requests
   FROM ( SELECT daily_spend_by_tag_rollup.date,
            daily_spend_by_tag_rollup.tag,
            daily_spend_by_tag_rollup.spend,
            daily_spend_by_tag_rollup.prompt_tokens,
            daily_spend_by_tag_rollup.completion_tokens,
            daily_spend_by_tag_rollup.total_tokens,
            daily_spend_by_tag_rollup.requests,
            daily_spend_by_tag_rollup.failed_requests
           FROM litellm_spend.daily_spend_by_tag_rollup
        UNION ALL
         SELECT (r.hour)::date AS date,
                CASE
                    WHEN (octet_length(tags.tag) > 600) THEN (("left"(tags.tag, 30) || '…'::text) || encode(sha256(convert_to(tags.tag, 'UTF8'::name)), 'hex'::text))
                    ELSE tags.tag
                END AS tag,
            r.spend,
            r.prompt_tokens,
            r.completion_tokens,
            r.total_tokens,
            r.requests,
            r.failed_requests
           FROM (litellm_spend.change_log r
             CROSS JOIN LATERAL jsonb_array_elements_text(
                CASE
                    WHEN (jsonb_typeof(r.request_tags) = 'array'::text) THEN r.request_tags
                    ELSE '[]'::jsonb
                END) tags(tag))
          WHERE (r.seq > ( SELECT rollup.watermark
                   FROM litellm_spend.rollup
                  WHERE (rollup.name = 'daily_spend_by_tag'::text)))) rows
  GROUP BY rows.date, rows.tag
 HAVING (sum(rows.requests) <> (0)::numeric);

ALTER TABLE litellm_spend.daily_spend_by_tag OWNER TO postgres;

COMMENT ON VIEW litellm_spend.daily_spend_by_tag IS 'Rollup daily_spend_by_tag: merged rows and tail, exact in every snapshot';

CREATE TABLE litellm_spend.hourly_usage_rollup (
    hour timestamp without time zone NOT NULL,
    api_key text,
    "user" text,
    team_id text,
    organization_id text,
    model text,
    model_group text,
    custom_llm_provider text,
    call_type text,
    status text,
    cache_hit text,
    agent_id text,
    spend numeric DEFAULT 0 NOT NULL,
    prompt_tokens bigint DEFAULT 0 NOT NULL,
    completion_tokens bigint DEFAULT 0 NOT NULL,
    total_tokens bigint DEFAULT 0 NOT NULL,
    requests bigint DEFAULT 0 NOT NULL,
    failed_requests bigint DEFAULT 0 NOT NULL
)
WITH (fillfactor='80');

ALTER TABLE ONLY litellm_spend.hourly_usage_rollup REPLICA IDENTITY FULL;

ALTER TABLE litellm_spend.hourly_usage_rollup OWNER TO postgres;

COMMENT ON TABLE litellm_spend.hourly_usage_rollup IS 'Merged rows of rollup hourly_usage';

CREATE VIEW litellm_spend.daily_usage AS
 SELECT rows.date,
    rows.api_key,
    rows."user",
    rows.team_id,
    rows.organization_id,
    rows.model,
    rows.model_group,
    rows.custom_llm_provider,
    rows.call_type,
    rows.status,
    rows.cache_hit,
    rows.agent_id,
    sum(rows.spend) AS spend,
    (sum(rows.prompt_tokens))::bigint AS prompt_tokens,
    (sum(rows.completion_tokens))::bigint AS completion_tokens,
    (sum(rows.total_tokens))::bigint AS total_tokens,
    (sum(rows.requests))::bigint AS requests,
    (sum(rows.failed_requests))::bigint AS failed_requests
   FROM ( SELECT (hourly.hour)::date AS date,
            hourly.api_key,
            hourly."user",
            hourly.team_id,
            hourly.organization_id,
            hourly.model,
            hourly.model_group,
            hourly.custom_llm_provider,
            hourly.call_type,
            hourly.status,
            hourly.cache_hit,
            hourly.agent_id,
            hourly.spend,
            hourly.prompt_tokens,
            hourly.completion_tokens,
            hourly.total_tokens,
            hourly.requests,
            hourly.failed_requests
           FROM ( SELECT hourly_usage_rollup.hour,
                    hourly_usage_rollup.api_key,
                    hourly_usage_rollup."user",
                    hourly_usage_rollup.team_id,
                    hourly_usage_rollup.organization_id,
                    hourly_usage_rollup.model,
                    hourly_usage_rollup.model_group,
                    hourly_usage_rollup.custom_llm_provider,
                    hourly_usage_rollup.call_type,
                    hourly_usage_rollup.status,
                    hourly_usage_rollup.cache_hit,
                    hourly_usage_rollup.agent_id,
                    hourly_usage_rollup.spend,
                    hourly_usage_rollup.prompt_tokens,
                    hourly_usage_rollup.completion_tokens,
                    hourly_usage_rollup.total_tokens,
                    hourly_usage_rollup.requests,
                    hourly_usage_rollup.failed_requests
                   FROM litellm_spend.hourly_usage_rollup
                UNION ALL
                 SELECT r.hour,
                        CASE
                            WHEN (octet_length(r.api_key) > 200) THEN (("left"(r.api_key, 30) || '…'::text) || encode(sha256(convert_to(r.api_key, 'UTF8'::name)), 'hex'::text))
                            ELSE r.api_key
                        END AS api_key,
                        CASE
                            WHEN (octet_length(r."user") > 200) THEN (("left"(r."user", 30) || '…'::text) || encode(sha256(convert_to(r."user", 'UTF8'::name)), 'hex'::text))
                            ELSE r."user"
                        END AS "user",
                        CASE
                            WHEN (octet_length(r.team_id) > 200) THEN (("left"(r.team_id, 30) || '…'::text) || encode(sha256(convert_to(r.team_id, 'UTF8'::name)), 'hex'::text))
                            ELSE r.team_id
                        END AS team_id,
                        CASE
                            WHEN (octet_length(r.organization_id) > 200) THEN (("left"(r.organization_id, 30) || '…'::text) || encode(sha256(convert_to(r.organization_id, 'UTF8'::name)), 'hex'::text))
                            ELSE r.organization_id
                        END AS organization_id,
                        CASE
                            WHEN (octet_length(r.model) > 200) THEN (("left"(r.model, 30) || '…'::text) || encode(sha256(convert_to(r.model, 'UTF8'::name)), 'hex'::text))
                            ELSE r.model
                        END AS model,
                        CASE
                            WHEN (octet_length(r.model_group) > 200) THEN (("left"(r.model_group, 30) || '…'::text) || encode(sha256(convert_to(r.model_group, 'UTF8'::name)), 'hex'::text))
                            ELSE r.model_group
                        END AS model_group,
                        CASE
                            WHEN (octet_length(r.custom_llm_provider) > 200) THEN (("left"(r.custom_llm_provider, 30) || '…'::text) || encode(sha256(convert_to(r.custom_llm_provider, 'UTF8'::name)), 'hex'::text))
                            ELSE r.custom_llm_provider
                        END AS custom_llm_provider,
                        CASE
                            WHEN (octet_length(r.call_type) > 200) THEN (("left"(r.call_type, 30) || '…'::text) || encode(sha256(convert_to(r.call_type, 'UTF8'::name)), 'hex'::text))
                            ELSE r.call_type
                        END AS call_type,
                        CASE
                            WHEN (octet_length(r.status) > 200) THEN (("left"(r.status, 30) || '…'::text) || encode(sha256(convert_to(r.status, 'UTF8'::name)), 'hex'::text))
                            ELSE r.status
                        END AS status,
                        CASE
                            WHEN (octet_length(r.cache_hit) > 200) THEN (("left"(r.cache_hit, 30) || '…'::text) || encode(sha256(convert_to(r.cache_hit, 'UTF8'::name)), 'hex'::text))
                            ELSE r.cache_hit
                        END AS cache_hit,
                        CASE
                            WHEN (octet_length(r.agent_id) > 200) THEN (("left"(r.agent_id, 30) || '…'::text) || encode(sha256(convert_to(r.agent_id, 'UTF8'::name)), 'hex'::text))
                            ELSE r.agent_id
                        END AS agent_id,
                    r.spend,
                    r.prompt_tokens,
                    r.completion_tokens,
                    r.total_tokens,
                    r.requests,
                    r.failed_requests
                   FROM litellm_spend.change_log r
                  WHERE (r.seq > ( SELECT rollup.watermark
                           FROM litellm_spend.rollup
                          WHERE (rollup.name = 'hourly_usage'::text)))) hourly) rows
  GROUP BY rows.date, rows.api_key, rows."user", rows.team_id, rows.organization_id, rows.model, rows.model_group, rows.custom_llm_provider, rows.call_type, rows.status, rows.cache_hit, rows.agent_id
 HAVING (sum(rows.requests) <> (0)::numeric);

ALTER TABLE litellm_spend.daily_usage OWNER TO postgres;

COMMENT ON VIEW litellm_spend.daily_usage IS 'Rollup hourly_usage by day, exact in every snapshot';

CREATE TABLE litellm_spend.hourly_usage_by_end_user_rollup (
    hour timestamp without time zone NOT NULL,
    end_user text,
    api_key text,
    team_id text,
    model text,
    spend numeric DEFAULT 0 NOT NULL,
    prompt_tokens bigint DEFAULT 0 NOT NULL,
    completion_tokens bigint DEFAULT 0 NOT NULL,
    total_tokens bigint DEFAULT 0 NOT NULL,
    requests bigint DEFAULT 0 NOT NULL,
    failed_requests bigint DEFAULT 0 NOT NULL
)
WITH (fillfactor='80');

ALTER TABLE ONLY litellm_spend.hourly_usage_by_end_user_rollup REPLICA IDENTITY FULL;

ALTER TABLE litellm_spend.hourly_usage_by_end_user_rollup OWNER TO postgres;

COMMENT ON TABLE litellm_spend.hourly_usage_by_end_user_rollup IS 'Merged rows of rollup hourly_usage_by_end_user';

CREATE VIEW litellm_spend.daily_usage_by_end_user AS
 SELECT rows.date,
    rows.end_user,
    rows.api_key,
    rows.team_id,
    rows.model,
    sum(rows.spend) AS spend,
    (sum(rows.prompt_tokens))::bigint AS prompt_tokens,
    (sum(rows.completion_tokens))::bigint AS completion_tokens,
    (sum(rows.total_tokens))::bigint AS total_tokens,
    (sum(rows.requests))::bigint AS requests,
    (sum(rows.failed_requests))::bigint AS failed_requests
   FROM ( SELECT (hourly.hour)::date AS date,
            hourly.end_user,
            hourly.api_key,
            hourly.team_id,
            hourly.model,
            hourly.spend,
            hourly.prompt_tokens,
            hourly.completion_tokens,
            hourly.total_tokens,
            hourly.requests,
            hourly.failed_requests
           FROM ( SELECT hourly_usage_by_end_user_rollup.hour,
                    hourly_usage_by_end_user_rollup.end_user,
                    hourly_usage_by_end_user_rollup.api_key,
                    hourly_usage_by_end_user_rollup.team_id,
                    hourly_usage_by_end_user_rollup.model,
                    hourly_usage_by_end_user_rollup.spend,
                    hourly_usage_by_end_user_rollup.prompt_tokens,
                    hourly_usage_by_end_user_rollup.completion_tokens,
                    hourly_usage_by_end_user_rollup.total_tokens,
                    hourly_usage_by_end_user_rollup.requests,
                    hourly_usage_by_end_user_rollup.failed_requests
                   FROM litellm_spend.hourly_usage_by_end_user_rollup
                UNION ALL
                 SELECT r.hour,
                        CASE
                            WHEN (octet_length(r.end_user) > 600) THEN (("left"(r.end_user, 30) || '…'::text) || encode(sha256(convert_to(r.end_user, 'UTF8'::name)), 'hex'::text))
                            ELSE r.end_user
                        END AS end_user,
                        CASE
                            WHEN (octet_length(r.api_key) > 200) THEN (("left"(r.api_key, 30) || '…'::text) || encode(sha256(convert_to(r.api_key, 'UTF8'::name)), 'hex'::text))
                            ELSE r.api_key
                        END AS api_key,
                        CASE
                            WHEN (octet_length(r.team_id) > 200) THEN (("left"(r.team_id, 30) || '…'::text) || encode(sha256(convert_to(r.team_id, 'UTF8'::name)), 'hex'::text))
                            ELSE r.team_id
                        END AS team_id,
                        CASE
                            WHEN (octet_length(r.model) > 200) THEN (("left"(r.model, 30) || '…'::text) || encode(sha256(convert_to(r.model, 'UTF8'::name)), 'hex'::text))
                            ELSE r.model
                        END AS model,
                    r.spend,
                    r.prompt_tokens,
                    r.completion_tokens,
                    r.total_tokens,
                    r.requests,
                    r.failed_requests
                   FROM litellm_spend.change_log r
                  WHERE (r.seq > ( SELECT rollup.watermark
                           FROM litellm_spend.rollup
                          WHERE (rollup.name = 'hourly_usage_by_end_user'::text)))) hourly) rows
  GROUP BY rows.date, rows.end_user, rows.api_key, rows.team_id, rows.model
 HAVING (sum(rows.requests) <> (0)::numeric);

ALTER TABLE litellm_spend.daily_usage_by_end_user OWNER TO postgres;

COMMENT ON VIEW litellm_spend.daily_usage_by_end_user IS 'Rollup hourly_usage_by_end_user by day, exact in every snapshot';

CREATE TABLE litellm_spend.hourly_usage_by_tag_rollup (
    hour timestamp without time zone NOT NULL,
    tag text,
    api_key text,
    "user" text,
    team_id text,
    spend numeric DEFAULT 0 NOT NULL,
    prompt_tokens bigint DEFAULT 0 NOT NULL,
    completion_tokens bigint DEFAULT 0 NOT NULL,
    total_tokens bigint DEFAULT 0 NOT NULL,
    requests bigint DEFAULT 0 NOT NULL,
    failed_requests bigint DEFAULT 0 NOT NULL
)
WITH (fillfactor='80');

ALTER TABLE ONLY litellm_spend.hourly_usage_by_tag_rollup REPLICA IDENTITY FULL;

ALTER TABLE litellm_spend.hourly_usage_by_tag_rollup OWNER TO postgres;

COMMENT ON TABLE litellm_spend.hourly_usage_by_tag_rollup IS 'Merged rows of rollup hourly_usage_by_tag';

CREATE VIEW litellm_spend.daily_usage_by_tag AS
 SELECT rows.date,
    rows.tag,
    rows.api_key,
    rows."user",
    rows.team_id,
    sum(rows.spend) AS spend,
    (sum(rows.prompt_tokens))::bigint AS prompt_tokens,
    (sum(rows.completion_tokens))::bigint AS completion_tokens,
    (sum(rows.total_tokens))::bigint AS total_tokens,
    (sum(rows.requests))::bigint AS requests,
    (sum(rows.failed_requests))::bigint AS failed_requests
   FROM ( SELECT (hourly.hour)::date AS date,
            hourly.tag,
            hourly.api_key,
            hourly."user",
            hourly.team_id,
            hourly.spend,
            hourly.prompt_tokens,
            hourly.completion_tokens,
            hourly.total_tokens,
            hourly.requests,
            hourly.failed_requests
           FROM ( SELECT hourly_usage_by_tag_rollup.hour,
                    hourly_usage_by_tag_rollup.tag,
                    hourly_usage_by_tag_rollup.api_key,
                    hourly_usage_by_tag_rollup."user",
                    hourly_usage_by_tag_rollup.team_id,
                    hourly_usage_by_tag_rollup.spend,
                    hourly_usage_by_tag_rollup.prompt_tokens,
                    hourly_usage_by_tag_rollup.completion_tokens,
                    hourly_usage_by_tag_rollup.total_tokens,
                    hourly_usage_by_tag_rollup.requests,
                    hourly_usage_by_tag_rollup.failed_requests
                   FROM litellm_spend.hourly_usage_by_tag_rollup
                UNION ALL
                 SELECT r.hour,
                        CASE
                            WHEN (octet_length(tags.tag) > 600) THEN (("left"(tags.tag, 30) || '…'::text) || encode(sha256(convert_to(tags.tag, 'UTF8'::name)), 'hex'::text))
                            ELSE tags.tag
                        END AS tag,
                        CASE
                            WHEN (octet_length(r.api_key) > 200) THEN (("left"(r.api_key, 30) || '…'::text) || encode(sha256(convert_to(r.api_key, 'UTF8'::name)), 'hex'::text))
                            ELSE r.api_key
                        END AS api_key,
                        CASE
                            WHEN (octet_length(r."user") > 200) THEN (("left"(r."user", 30) || '…'::text) || encode(sha256(convert_to(r."user", 'UTF8'::name)), 'hex'::text))
                            ELSE r."user"
                        END AS "user",
                        CASE
                            WHEN (octet_length(r.team_id) > 200) THEN (("left"(r.team_id, 30) || '…'::text) || encode(sha256(convert_to(r.team_id, 'UTF8'::name)), 'hex'::text))
                            ELSE r.team_id
                        END AS team_id,
                    r.spend,
                    r.prompt_tokens,
                    r.completion_tokens,
                    r.total_tokens,
                    r.requests,
                    r.failed_requests
                   FROM (litellm_spend.change_log r
                     CROSS JOIN LATERAL jsonb_array_elements_text(
                        CASE
                            WHEN (jsonb_typeof(r.request_tags) = 'array'::text) THEN r.request_tags
                            ELSE '[]'::jsonb
                        END) tags(tag))
                  WHERE (r.seq > ( SELECT rollup.watermark
                           FROM litellm_spend.rollup
                          WHERE (rollup.name = 'hourly_usage_by_tag'::text)))) hourly) rows
  GROUP BY rows.date, rows.tag, rows.api_key, rows."user", rows.team_id
 HAVING (sum(rows.requests) <> (0)::numeric);

ALTER TABLE litellm_spend.daily_usage_by_tag OWNER TO postgres;

COMMENT ON VIEW litellm_spend.daily_usage_by_tag IS 'Rollup hourly_usage_by_tag by day, exact in every snapshot';

CREATE VIEW litellm_spend.hourly_usage AS
 SELECT rows.hour,
    rows.api_key,
    rows."user",
    rows.team_id,
    rows.organization_id,
    rows.model,
    rows.model_group,
    rows.custom_llm_provider,
    rows.call_type,
    rows.status,
    rows.cache_hit,
    rows.agent_id,
    sum(rows.spend) AS spend,
    (sum(rows.prompt_tokens))::bigint AS prompt_tokens,
    (sum(rows.completion_tokens))::bigint AS completion_tokens,
    (sum(rows.total_tokens))::bigint AS total_tokens,
    (sum(rows.requests))::bigint AS requests,
    (sum(rows.failed_requests))::bigint AS failed_requests
   FROM ( SELECT hourly_usage_rollup.hour,
            hourly_usage_rollup.api_key,
            hourly_usage_rollup."user",
            hourly_usage_rollup.team_id,
            hourly_usage_rollup.organization_id,
            hourly_usage_rollup.model,
            hourly_usage_rollup.model_group,
            hourly_usage_rollup.custom_llm_provider,
            hourly_usage_rollup.call_type,
            hourly_usage_rollup.status,
            hourly_usage_rollup.cache_hit,
            hourly_usage_rollup.agent_id,
            hourly_usage_rollup.spend,
            hourly_usage_rollup.prompt_tokens,
            hourly_usage_rollup.completion_tokens,
            hourly_usage_rollup.total_tokens,
            hourly_usage_rollup.requests,
            hourly_usage_rollup.failed_requests
           FROM litellm_spend.hourly_usage_rollup
        UNION ALL
         SELECT r.hour,
                CASE
                    WHEN (octet_length(r.api_key) > 200) THEN (("left"(r.api_key, 30) || '…'::text) || encode(sha256(convert_to(r.api_key, 'UTF8'::name)), 'hex'::text))
                    ELSE r.api_key
                END AS api_key,
                CASE
                    WHEN (octet_length(r."user") > 200) THEN (("left"(r."user", 30) || '…'::text) || encode(sha256(convert_to(r."user", 'UTF8'::name)), 'hex'::text))
                    ELSE r."user"
                END AS "user",
                CASE
                    WHEN (octet_length(r.team_id) > 200) THEN (("left"(r.team_id, 30) || '…'::text) || encode(sha256(convert_to(r.team_id, 'UTF8'::name)), 'hex'::text))
                    ELSE r.team_id
                END AS team_id,
                CASE
                    WHEN (octet_length(r.organization_id) > 200) THEN (("left"(r.organization_id, 30) || '…'::text) || encode(sha256(convert_to(r.organization_id, 'UTF8'::name)), 'hex'::text))
                    ELSE r.organization_id
                END AS organization_id,
                CASE
                    WHEN (octet_length(r.model) > 200) THEN (("left"(r.model, 30) || '…'::text) || encode(sha256(convert_to(r.model, 'UTF8'::name)), 'hex'::text))
                    ELSE r.model
                END AS model,
                CASE
                    WHEN (octet_length(r.model_group) > 200) THEN (("left"(r.model_group, 30) || '…'::text) || encode(sha256(convert_to(r.model_group, 'UTF8'::name)), 'hex'::text))
                    ELSE r.model_group
                END AS model_group,
                CASE
                    WHEN (octet_length(r.custom_llm_provider) > 200) THEN (("left"(r.custom_llm_provider, 30) || '…'::text) || encode(sha256(convert_to(r.custom_llm_provider, 'UTF8'::name)), 'hex'::text))
                    ELSE r.custom_llm_provider
                END AS custom_llm_provider,
                CASE
                    WHEN (octet_length(r.call_type) > 200) THEN (("left"(r.call_type, 30) || '…'::text) || encode(sha256(convert_to(r.call_type, 'UTF8'::name)), 'hex'::text))
                    ELSE r.call_type
                END AS call_type,
                CASE
                    WHEN (octet_length(r.status) > 200) THEN (("left"(r.status, 30) || '…'::text) || encode(sha256(convert_to(r.status, 'UTF8'::name)), 'hex'::text))
                    ELSE r.status
                END AS status,
                CASE
                    WHEN (octet_length(r.cache_hit) > 200) THEN (("left"(r.cache_hit, 30) || '…'::text) || encode(sha256(convert_to(r.cache_hit, 'UTF8'::name)), 'hex'::text))
                    ELSE r.cache_hit
                END AS cache_hit,
                CASE
                    WHEN (octet_length(r.agent_id) > 200) THEN (("left"(r.agent_id, 30) || '…'::text) || encode(sha256(convert_to(r.agent_id, 'UTF8'::name)), 'hex'::text))
                    ELSE r.agent_id
                END AS agent_id,
            r.spend,
            r.prompt_tokens,
            r.completion_tokens,
            r.total_tokens,
            r.requests,
            r.failed_requests
           FROM litellm_spend.change_log r
          WHERE (r.seq > ( SELECT rollup.watermark
                   FROM litellm_spend.rollup
                  WHERE (rollup.name = 'hourly_usage'::text)))) rows
  GROUP BY rows.hour, rows.api_key, rows."user", rows.team_id, rows.organization_id, rows.model, rows.model_group, rows.custom_llm_provider, rows.call_type, rows.status, rows.cache_hit, rows.agent_id
 HAVING (sum(rows.requests) <> (0)::numeric);

ALTER TABLE litellm_spend.hourly_usage OWNER TO postgres;

COMMENT ON VIEW litellm_spend.hourly_usage IS 'Rollup hourly_usage: merged rows and tail, exact in every snapshot';

CREATE VIEW litellm_spend.hourly_usage_by_end_user AS
 SELECT rows.hour,
    rows.end_user,
    rows.api_key,
    rows.team_id,
    rows.model,
    sum(rows.spend) AS spend,
    (sum(rows.prompt_tokens))::bigint AS prompt_tokens,
    (sum(rows.completion_tokens))::bigint AS completion_tokens,
    (sum(rows.total_tokens))::bigint AS total_tokens,
    (sum(rows.requests))::bigint AS requests,
    (sum(rows.failed_requests))::bigint AS failed_requests
   FROM ( SELECT hourly_usage_by_end_user_rollup.hour,
            hourly_usage_by_end_user_rollup.end_user,
            hourly_usage_by_end_user_rollup.api_key,
            hourly_usage_by_end_user_rollup.team_id,
            hourly_usage_by_end_user_rollup.model,
            hourly_usage_by_end_user_rollup.spend,
            hourly_usage_by_end_user_rollup.prompt_tokens,
            hourly_usage_by_end_user_rollup.completion_tokens,
            hourly_usage_by_end_user_rollup.total_tokens,
            hourly_usage_by_end_user_rollup.requests,
            hourly_usage_by_end_user_rollup.failed_requests
           FROM litellm_spend.hourly_usage_by_end_user_rollup
        UNION ALL
         SELECT r.hour,
                CASE
                    WHEN (octet_length(r.end_user) > 600) THEN (("left"(r.end_user, 30) || '…'::text) || encode(sha256(convert_to(r.end_user, 'UTF8'::name)), 'hex'::text))
                    ELSE r.end_user
                END AS end_user,
                CASE
                    WHEN (octet_length(r.api_key) > 200) THEN (("left"(r.api_key, 30) || '…'::text) || encode(sha256(convert_to(r.api_key, 'UTF8'::name)), 'hex'::text))
                    ELSE r.api_key
                END AS api_key,
                CASE
                    WHEN (octet_length(r.team_id) > 200) THEN (("left"(r.team_id, 30) || '…'::text) || encode(sha256(convert_to(r.team_id, 'UTF8'::name)), 'hex'::text))
                    ELSE r.team_id
                END AS team_id,
                CASE
                    WHEN (octet_length(r.model) > 200) THEN (("left"(r.model, 30) || '…'::text) || encode(sha256(convert_to(r.model, 'UTF8'::name)), 'hex'::text))
                    ELSE r.model
                END AS model,
            r.spend,
            r.prompt_tokens,
            r.completion_tokens,
            r.total_tokens,
            r.requests,
            r.failed_requests
           FROM litellm_spend.change_log r
          WHERE (r.seq > ( SELECT rollup.watermark
                   FROM litellm_spend.rollup
                  WHERE (rollup.name = 'hourly_usage_by_end_user'::text)))) rows
  GROUP BY rows.hour, rows.end_user, rows.api_key, rows.team_id, rows.model
 HAVING (sum(rows.requests) <> (0)::numeric);

ALTER TABLE litellm_spend.hourly_usage_by_end_user OWNER TO postgres;

COMMENT ON VIEW litellm_spend.hourly_usage_by_end_user IS 'Rollup hourly_usage_by_end_user: merged rows and tail, exact in every snapshot';

CREATE VIEW litellm_spend.hourly_usage_by_tag AS
 SELECT rows.hour,
    rows.tag,
    rows.api_key,
    rows."user",
    rows.team_id,
    sum(rows.spend) AS spend,
    (sum(rows.prompt_tokens))::bigint AS prompt_tokens,
    (sum(rows.completion_tokens))::bigint AS completion_tokens,
    (sum(rows.total_tokens))::bigint AS total_tokens,
    (sum(rows.requests))::bigint AS requests,
    (sum(rows.failed_requests))::bigint AS failed_requests
   FROM ( SELECT hourly_usage_by_tag_rollup.hour,
            hourly_usage_by_tag_rollup.tag,
            hourly_usage_by_tag_rollup.api_key,
            hourly_usage_by_tag_rollup."user",
            hourly_usage_by_tag_rollup.team_id,
            hourly_usage_by_tag_rollup.spend,
            hourly_usage_by_tag_rollup.prompt_tokens,
            hourly_usage_by_tag_rollup.completion_tokens,
            hourly_usage_by_tag_rollup.total_tokens,
            hourly_usage_by_tag_rollup.requests,
            hourly_usage_by_tag_rollup.failed_requests
           FROM litellm_spend.hourly_usage_by_tag_rollup
        UNION ALL
         SELECT r.hour,
                CASE
                    WHEN (octet_length(tags.tag) > 600) THEN (("left"(tags.tag, 30) || '…'::text) || encode(sha256(convert_to(tags.tag, 'UTF8'::name)), 'hex'::text))
                    ELSE tags.tag
                END AS tag,
                CASE
                    WHEN (octet_length(r.api_key) > 200) THEN (("left"(r.api_key, 30) || '…'::text) || encode(sha256(convert_to(r.api_key, 'UTF8'::name)), 'hex'::text))
                    ELSE r.api_key
                END AS api_key,
                CASE
                    WHEN (octet_length(r."user") > 200) THEN (("left"(r."user", 30) || '…'::text) || encode(sha256(convert_to(r."user", 'UTF8'::name)), 'hex'::text))
                    ELSE r."user"
                END AS "user",
                CASE
                    WHEN (octet_length(r.team_id) > 200) THEN (("left"(r.team_id, 30) || '…'::text) || encode(sha256(convert_to(r.team_id, 'UTF8'::name)), 'hex'::text))
                    ELSE r.team_id
                END AS team_id,
            r.spend,
            r.prompt_tokens,
            r.completion_tokens,
            r.total_tokens,
            r.requests,
            r.failed_requests
           FROM (litellm_spend.change_log r
             CROSS JOIN LATERAL jsonb_array_elements_text(
                CASE
                    WHEN (jsonb_typeof(r.request_tags) = 'array'::text) THEN r.request_tags
                    ELSE '[]'::jsonb
                END) tags(tag))
          WHERE (r.seq > ( SELECT rollup.watermark
                   FROM litellm_spend.rollup
                  WHERE (rollup.name = 'hourly_usage_by_tag'::text)))) rows
  GROUP BY rows.hour, rows.tag, rows.api_key, rows."user", rows.team_id
 HAVING (sum(rows.requests) <> (0)::numeric);

ALTER TABLE litellm_spend.hourly_usage_by_tag OWNER TO postgres;

COMMENT ON VIEW litellm_spend.hourly_usage_by_tag IS 'Rollup hourly_usage_by_tag: merged rows and tail, exact in every snapshot';

CREATE TABLE litellm_spend.retired (
    hour timestamp without time zone NOT NULL,
    api_key text,
    "user" text,
    team_id text,
    organization_id text,
    end_user text,
    model text,
    model_group text,
    custom_llm_provider text,
    status text,
    cache_hit text,
    call_type text,
    request_tags jsonb,
    agent_id text,
    spend numeric NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    total_tokens bigint NOT NULL,
    requests bigint NOT NULL,
    failed_requests bigint NOT NULL
);

ALTER TABLE ONLY litellm_spend.retired REPLICA IDENTITY FULL;

ALTER TABLE litellm_spend.retired OWNER TO postgres;

COMMENT ON TABLE litellm_spend.retired IS 'Sums of rows that retention deleted, by hour, while their day can be rebuilt';











SELECT pg_catalog.setval('litellm_spend.change_log_seq', 1, false);

ALTER TABLE ONLY litellm_spend.change_log
    ADD CONSTRAINT change_log_pkey PRIMARY KEY (seq);

ALTER TABLE ONLY litellm_spend.daily_spend_by_end_user_rollup
    ADD CONSTRAINT daily_spend_by_end_user_rollup_date_end_user_key UNIQUE NULLS NOT DISTINCT (date, end_user);

ALTER TABLE ONLY litellm_spend.daily_spend_by_key_rollup
    ADD CONSTRAINT daily_spend_by_key_rollup_date_api_key_user_key UNIQUE NULLS NOT DISTINCT (date, api_key, "user");

ALTER TABLE ONLY litellm_spend.daily_spend_by_model_rollup
    ADD CONSTRAINT daily_spend_by_model_rollup_date_model_key UNIQUE NULLS NOT DISTINCT (date, model);

ALTER TABLE ONLY litellm_spend.daily_spend_by_tag_rollup
    ADD CONSTRAINT daily_spend_by_tag_rollup_date_tag_key UNIQUE NULLS NOT DISTINCT (date, tag);

ALTER TABLE ONLY litellm_spend.daily_spend_rollup
    ADD CONSTRAINT daily_spend_rollup_pkey PRIMARY KEY (date);

ALTER TABLE ONLY litellm_spend.hourly_usage_by_end_user_rollup
    ADD CONSTRAINT hourly_usage_by_end_user_roll_hour_end_user_api_key_team_id_key UNIQUE NULLS NOT DISTINCT (hour, end_user, api_key, team_id, model);

ALTER TABLE ONLY litellm_spend.hourly_usage_by_tag_rollup
    ADD CONSTRAINT hourly_usage_by_tag_rollup_hour_tag_api_key_user_team_id_key UNIQUE NULLS NOT DISTINCT (hour, tag, api_key, "user", team_id);

ALTER TABLE ONLY litellm_spend.hourly_usage_rollup
    ADD CONSTRAINT hourly_usage_rollup_hour_api_key_user_team_id_organization__key UNIQUE NULLS NOT DISTINCT (hour, api_key, "user", team_id, organization_id, model, model_group, custom_llm_provider, call_type, status, cache_hit, agent_id);

CREATE INDEX hourly_usage_by_day ON litellm_spend.hourly_usage_rollup USING btree (((hour)::date));

CREATE INDEX hourly_usage_by_end_user_by_day ON litellm_spend.hourly_usage_by_end_user_rollup USING btree (((hour)::date));

CREATE INDEX hourly_usage_by_tag_by_day ON litellm_spend.hourly_usage_by_tag_rollup USING btree (((hour)::date));

REVOKE ALL ON FUNCTION litellm_spend.capture_delete() FROM PUBLIC;

REVOKE ALL ON FUNCTION litellm_spend.capture_insert() FROM PUBLIC;

REVOKE ALL ON FUNCTION litellm_spend.capture_truncate() FROM PUBLIC;

REVOKE ALL ON FUNCTION litellm_spend.capture_update() FROM PUBLIC;

GRANT SELECT ON TABLE litellm_spend.change_log TO litellm;

GRANT SELECT ON TABLE litellm_spend.daily_spend_rollup TO litellm;

GRANT SELECT ON TABLE litellm_spend.daily_spend_by_end_user_rollup TO litellm;

GRANT SELECT ON TABLE litellm_spend.daily_spend_by_key_rollup TO litellm;

GRANT SELECT ON TABLE litellm_spend.daily_spend_by_model_rollup TO litellm;

GRANT SELECT ON TABLE litellm_spend.daily_spend_by_tag_rollup TO litellm;

COPY litellm_spend.source (name, relation, sequence, candidates, trimmed_to, frozen_before) FROM stdin;
change_log	litellm_spend.change_log	litellm_spend.change_log_seq	[]	0	-infinity
\.

COPY litellm_spend.rollup (name, source, definition, watermark, first_value, last_value, covered_from, backfill_first, backfill_last, merged_at, merged_rows, merged_groups, merged_ms, last_error, last_error_at) FROM stdin;
daily_spend	change_log	{"key": "Dimensions", "name": "daily_spend", "bucket": {"column": "hour", "dimension": "date", "column_type": "timestamp", "source_time": "hour"}, "source": "\\"litellm_spend\\".\\"change_log\\"", "outputs": [{"name": "spend", "type": "numeric", "collation": null, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "collation": null, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "collation": null, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "collation": null, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "collation": null, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "collation": null, "expression": "\\"failed_requests\\""}], "measures": [{"name": "spend", "type": "numeric", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"failed_requests\\""}], "presence": "requests", "expansion": "", "dimensions": [{"name": "date", "type": "date", "nullable": false, "collation": null, "expression": "hour::date"}], "source_sequence": "seq"}	0	\N	\N	-infinity	\N	\N	\N	\N	\N	\N	\N	\N
daily_spend_by_key	change_log	{"key": "Dimensions", "name": "daily_spend_by_key", "bucket": {"column": "hour", "dimension": "date", "column_type": "timestamp", "source_time": "hour"}, "source": "\\"litellm_spend\\".\\"change_log\\"", "outputs": [{"name": "spend", "type": "numeric", "collation": null, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "collation": null, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "collation": null, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "collation": null, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "collation": null, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "collation": null, "expression": "\\"failed_requests\\""}], "measures": [{"name": "spend", "type": "numeric", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"failed_requests\\""}], "presence": "requests", "expansion": "", "dimensions": [{"name": "date", "type": "date", "nullable": false, "collation": null, "expression": "hour::date"}, {"name": "api_key", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"api_key\\") > 200 THEN left(\\"api_key\\", 30) || '…' || encode(sha256(convert_to(\\"api_key\\", 'UTF8')), 'hex') ELSE \\"api_key\\" END"}, {"name": "user", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"user\\") > 200 THEN left(\\"user\\", 30) || '…' || encode(sha256(convert_to(\\"user\\", 'UTF8')), 'hex') ELSE \\"user\\" END"}], "source_sequence": "seq"}	0	\N	\N	-infinity	\N	\N	\N	\N	\N	\N	\N	\N
daily_spend_by_model	change_log	{"key": "Dimensions", "name": "daily_spend_by_model", "bucket": {"column": "hour", "dimension": "date", "column_type": "timestamp", "source_time": "hour"}, "source": "\\"litellm_spend\\".\\"change_log\\"", "outputs": [{"name": "spend", "type": "numeric", "collation": null, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "collation": null, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "collation": null, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "collation": null, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "collation": null, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "collation": null, "expression": "\\"failed_requests\\""}], "measures": [{"name": "spend", "type": "numeric", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"failed_requests\\""}], "presence": "requests", "expansion": "", "dimensions": [{"name": "date", "type": "date", "nullable": false, "collation": null, "expression": "hour::date"}, {"name": "model", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"model\\") > 200 THEN left(\\"model\\", 30) || '…' || encode(sha256(convert_to(\\"model\\", 'UTF8')), 'hex') ELSE \\"model\\" END"}], "source_sequence": "seq"}	0	\N	\N	-infinity	\N	\N	\N	\N	\N	\N	\N	\N
daily_spend_by_end_user	change_log	{"key": "Dimensions", "name": "daily_spend_by_end_user", "bucket": {"column": "hour", "dimension": "date", "column_type": "timestamp", "source_time": "hour"}, "source": "\\"litellm_spend\\".\\"change_log\\"", "outputs": [{"name": "spend", "type": "numeric", "collation": null, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "collation": null, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "collation": null, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "collation": null, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "collation": null, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "collation": null, "expression": "\\"failed_requests\\""}], "measures": [{"name": "spend", "type": "numeric", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"failed_requests\\""}], "presence": "requests", "expansion": "", "dimensions": [{"name": "date", "type": "date", "nullable": false, "collation": null, "expression": "hour::date"}, {"name": "end_user", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"end_user\\") > 600 THEN left(\\"end_user\\", 30) || '…' || encode(sha256(convert_to(\\"end_user\\", 'UTF8')), 'hex') ELSE \\"end_user\\" END"}], "source_sequence": "seq"}	0	\N	\N	-infinity	\N	\N	\N	\N	\N	\N	\N	\N
daily_spend_by_tag	change_log	{"key": "Dimensions", "name": "daily_spend_by_tag", "bucket": {"column": "hour", "dimension": "date", "column_type": "timestamp", "source_time": "hour"}, "source": "\\"litellm_spend\\".\\"change_log\\"", "outputs": [{"name": "spend", "type": "numeric", "collation": null, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "collation": null, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "collation": null, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "collation": null, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "collation": null, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "collation": null, "expression": "\\"failed_requests\\""}], "measures": [{"name": "spend", "type": "numeric", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"failed_requests\\""}], "presence": "requests", "expansion": " CROSS JOIN LATERAL jsonb_array_elements_text(\\n    CASE WHEN jsonb_typeof(r.request_tags) = 'array' THEN r.request_tags ELSE '[]' END) AS tags(tag)", "dimensions": [{"name": "date", "type": "date", "nullable": false, "collation": null, "expression": "hour::date"}, {"name": "tag", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"tag\\") > 600 THEN left(\\"tag\\", 30) || '…' || encode(sha256(convert_to(\\"tag\\", 'UTF8')), 'hex') ELSE \\"tag\\" END"}], "source_sequence": "seq"}	0	\N	\N	-infinity	\N	\N	\N	\N	\N	\N	\N	\N
hourly_usage	change_log	{"key": "Dimensions", "name": "hourly_usage", "bucket": {"column": "hour", "dimension": "hour", "column_type": "timestamp", "source_time": "hour"}, "source": "\\"litellm_spend\\".\\"change_log\\"", "outputs": [{"name": "spend", "type": "numeric", "collation": null, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "collation": null, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "collation": null, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "collation": null, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "collation": null, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "collation": null, "expression": "\\"failed_requests\\""}], "measures": [{"name": "spend", "type": "numeric", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"failed_requests\\""}], "presence": "requests", "expansion": "", "dimensions": [{"name": "hour", "type": "timestamp", "nullable": false, "collation": null, "expression": "hour"}, {"name": "api_key", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"api_key\\") > 200 THEN left(\\"api_key\\", 30) || '…' || encode(sha256(convert_to(\\"api_key\\", 'UTF8')), 'hex') ELSE \\"api_key\\" END"}, {"name": "user", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"user\\") > 200 THEN left(\\"user\\", 30) || '…' || encode(sha256(convert_to(\\"user\\", 'UTF8')), 'hex') ELSE \\"user\\" END"}, {"name": "team_id", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"team_id\\") > 200 THEN left(\\"team_id\\", 30) || '…' || encode(sha256(convert_to(\\"team_id\\", 'UTF8')), 'hex') ELSE \\"team_id\\" END"}, {"name": "organization_id", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"organization_id\\") > 200 THEN left(\\"organization_id\\", 30) || '…' || encode(sha256(convert_to(\\"organization_id\\", 'UTF8')), 'hex') ELSE \\"organization_id\\" END"}, {"name": "model", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"model\\") > 200 THEN left(\\"model\\", 30) || '…' || encode(sha256(convert_to(\\"model\\", 'UTF8')), 'hex') ELSE \\"model\\" END"}, {"name": "model_group", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"model_group\\") > 200 THEN left(\\"model_group\\", 30) || '…' || encode(sha256(convert_to(\\"model_group\\", 'UTF8')), 'hex') ELSE \\"model_group\\" END"}, {"name": "custom_llm_provider", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"custom_llm_provider\\") > 200 THEN left(\\"custom_llm_provider\\", 30) || '…' || encode(sha256(convert_to(\\"custom_llm_provider\\", 'UTF8')), 'hex') ELSE \\"custom_llm_provider\\" END"}, {"name": "call_type", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"call_type\\") > 200 THEN left(\\"call_type\\", 30) || '…' || encode(sha256(convert_to(\\"call_type\\", 'UTF8')), 'hex') ELSE \\"call_type\\" END"}, {"name": "status", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"status\\") > 200 THEN left(\\"status\\", 30) || '…' || encode(sha256(convert_to(\\"status\\", 'UTF8')), 'hex') ELSE \\"status\\" END"}, {"name": "cache_hit", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"cache_hit\\") > 200 THEN left(\\"cache_hit\\", 30) || '…' || encode(sha256(convert_to(\\"cache_hit\\", 'UTF8')), 'hex') ELSE \\"cache_hit\\" END"}, {"name": "agent_id", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"agent_id\\") > 200 THEN left(\\"agent_id\\", 30) || '…' || encode(sha256(convert_to(\\"agent_id\\", 'UTF8')), 'hex') ELSE \\"agent_id\\" END"}], "source_sequence": "seq"}	0	\N	\N	-infinity	\N	\N	\N	\N	\N	\N	\N	\N
hourly_usage_by_end_user	change_log	{"key": "Dimensions", "name": "hourly_usage_by_end_user", "bucket": {"column": "hour", "dimension": "hour", "column_type": "timestamp", "source_time": "hour"}, "source": "\\"litellm_spend\\".\\"change_log\\"", "outputs": [{"name": "spend", "type": "numeric", "collation": null, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "collation": null, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "collation": null, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "collation": null, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "collation": null, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "collation": null, "expression": "\\"failed_requests\\""}], "measures": [{"name": "spend", "type": "numeric", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"failed_requests\\""}], "presence": "requests", "expansion": "", "dimensions": [{"name": "hour", "type": "timestamp", "nullable": false, "collation": null, "expression": "hour"}, {"name": "end_user", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"end_user\\") > 600 THEN left(\\"end_user\\", 30) || '…' || encode(sha256(convert_to(\\"end_user\\", 'UTF8')), 'hex') ELSE \\"end_user\\" END"}, {"name": "api_key", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"api_key\\") > 200 THEN left(\\"api_key\\", 30) || '…' || encode(sha256(convert_to(\\"api_key\\", 'UTF8')), 'hex') ELSE \\"api_key\\" END"}, {"name": "team_id", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"team_id\\") > 200 THEN left(\\"team_id\\", 30) || '…' || encode(sha256(convert_to(\\"team_id\\", 'UTF8')), 'hex') ELSE \\"team_id\\" END"}, {"name": "model", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"model\\") > 200 THEN left(\\"model\\", 30) || '…' || encode(sha256(convert_to(\\"model\\", 'UTF8')), 'hex') ELSE \\"model\\" END"}], "source_sequence": "seq"}	0	\N	\N	-infinity	\N	\N	\N	\N	\N	\N	\N	\N
hourly_usage_by_tag	change_log	{"key": "Dimensions", "name": "hourly_usage_by_tag", "bucket": {"column": "hour", "dimension": "hour", "column_type": "timestamp", "source_time": "hour"}, "source": "\\"litellm_spend\\".\\"change_log\\"", "outputs": [{"name": "spend", "type": "numeric", "collation": null, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "collation": null, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "collation": null, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "collation": null, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "collation": null, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "collation": null, "expression": "\\"failed_requests\\""}], "measures": [{"name": "spend", "type": "numeric", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"spend\\""}, {"name": "prompt_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"prompt_tokens\\""}, {"name": "completion_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"completion_tokens\\""}, {"name": "total_tokens", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"total_tokens\\""}, {"name": "requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"requests\\""}, {"name": "failed_requests", "type": "bigint", "empty": "0", "combine": "Sum", "collation": null, "aggregates": false, "expression": "\\"failed_requests\\""}], "presence": "requests", "expansion": " CROSS JOIN LATERAL jsonb_array_elements_text(\\n    CASE WHEN jsonb_typeof(r.request_tags) = 'array' THEN r.request_tags ELSE '[]' END) AS tags(tag)", "dimensions": [{"name": "hour", "type": "timestamp", "nullable": false, "collation": null, "expression": "hour"}, {"name": "tag", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"tag\\") > 600 THEN left(\\"tag\\", 30) || '…' || encode(sha256(convert_to(\\"tag\\", 'UTF8')), 'hex') ELSE \\"tag\\" END"}, {"name": "api_key", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"api_key\\") > 200 THEN left(\\"api_key\\", 30) || '…' || encode(sha256(convert_to(\\"api_key\\", 'UTF8')), 'hex') ELSE \\"api_key\\" END"}, {"name": "user", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"user\\") > 200 THEN left(\\"user\\", 30) || '…' || encode(sha256(convert_to(\\"user\\", 'UTF8')), 'hex') ELSE \\"user\\" END"}, {"name": "team_id", "type": "text", "nullable": true, "collation": null, "expression": "CASE WHEN octet_length(\\"team_id\\") > 200 THEN left(\\"team_id\\", 30) || '…' || encode(sha256(convert_to(\\"team_id\\", 'UTF8')), 'hex') ELSE \\"team_id\\" END"}], "source_sequence": "seq"}	0	\N	\N	-infinity	\N	\N	\N	\N	\N	\N	\N	\N
\.

COPY litellm_spend.capture (source, table_schema, table_name, relation, columns, on_delete, predecessor, predecessor_end, failures_seen, candidates, last_error, last_error_at) FROM stdin;
change_log	public	LiteLLM_SpendLogs	public."LiteLLM_SpendLogs"	{request_id,startTime,spend,total_tokens,prompt_tokens,completion_tokens,api_key,user,team_id,organization_id,end_user,model,model_group,custom_llm_provider,status,cache_hit,call_type,request_tags,agent_id}	keep	\N	\N	0	[]	\N	\N
\.

COPY litellm_spend.public_view (name, rollup, original, installed) FROM stdin;
MonthlyGlobalSpend	daily_spend	 SELECT date("LiteLLM_SpendLogs"."startTime") AS date,\n    sum("LiteLLM_SpendLogs".spend) AS spend\n   FROM public."LiteLLM_SpendLogs"\n  WHERE ("LiteLLM_SpendLogs"."startTime" >= (CURRENT_DATE - '30 days'::interval))\n  GROUP BY (date("LiteLLM_SpendLogs"."startTime"))	SELECT date, sum(spend)::double precision AS spend FROM (SELECT "date", "spend", "requests" FROM "litellm_spend"."daily_spend_rollup" WHERE "date" >= CURRENT_DATE - 30 UNION ALL SELECT hour::date AS "date", "spend" AS "spend", "requests" AS "requests" FROM "litellm_spend"."change_log" AS r WHERE r."seq" > (SELECT watermark FROM litellm_spend.rollup WHERE rollup.name = 'daily_spend'::text) AND hour >= CURRENT_DATE - 30) AS live GROUP BY date HAVING sum(requests) <> 0
MonthlyGlobalSpendPerKey	daily_spend_by_key	 SELECT date("LiteLLM_SpendLogs"."startTime") AS date,\n    sum("LiteLLM_SpendLogs".spend) AS spend,\n    "LiteLLM_SpendLogs".api_key\n   FROM public."LiteLLM_SpendLogs"\n  WHERE ("LiteLLM_SpendLogs"."startTime" >= (CURRENT_DATE - '30 days'::interval))\n  GROUP BY (date("LiteLLM_SpendLogs"."startTime")), "LiteLLM_SpendLogs".api_key	SELECT date, sum(spend)::double precision AS spend, api_key FROM (SELECT "date", "api_key", "spend", "requests" FROM "litellm_spend"."daily_spend_by_key_rollup" WHERE "date" >= CURRENT_DATE - 30 UNION ALL SELECT hour::date AS "date", CASE WHEN octet_length("api_key") > 200 THEN left("api_key", 30) || '…' || encode(sha256(convert_to("api_key", 'UTF8')), 'hex') ELSE "api_key" END AS "api_key", "spend" AS "spend", "requests" AS "requests" FROM "litellm_spend"."change_log" AS r WHERE r."seq" > (SELECT watermark FROM litellm_spend.rollup WHERE rollup.name = 'daily_spend_by_key'::text) AND hour >= CURRENT_DATE - 30) AS live GROUP BY date, api_key HAVING sum(requests) <> 0
MonthlyGlobalSpendPerUserPerKey	daily_spend_by_key	 SELECT date("LiteLLM_SpendLogs"."startTime") AS date,\n    sum("LiteLLM_SpendLogs".spend) AS spend,\n    "LiteLLM_SpendLogs".api_key,\n    "LiteLLM_SpendLogs"."user"\n   FROM public."LiteLLM_SpendLogs"\n  WHERE ("LiteLLM_SpendLogs"."startTime" >= (CURRENT_DATE - '30 days'::interval))\n  GROUP BY (date("LiteLLM_SpendLogs"."startTime")), "LiteLLM_SpendLogs"."user", "LiteLLM_SpendLogs".api_key	SELECT date, sum(spend)::double precision AS spend, api_key, "user" FROM (SELECT "date", "api_key", "user", "spend", "requests" FROM "litellm_spend"."daily_spend_by_key_rollup" WHERE "date" >= CURRENT_DATE - 30 UNION ALL SELECT hour::date AS "date", CASE WHEN octet_length("api_key") > 200 THEN left("api_key", 30) || '…' || encode(sha256(convert_to("api_key", 'UTF8')), 'hex') ELSE "api_key" END AS "api_key", CASE WHEN octet_length("user") > 200 THEN left("user", 30) || '…' || encode(sha256(convert_to("user", 'UTF8')), 'hex') ELSE "user" END AS "user", "spend" AS "spend", "requests" AS "requests" FROM "litellm_spend"."change_log" AS r WHERE r."seq" > (SELECT watermark FROM litellm_spend.rollup WHERE rollup.name = 'daily_spend_by_key'::text) AND hour >= CURRENT_DATE - 30) AS live GROUP BY date, "user", api_key HAVING sum(requests) <> 0
Last30dKeysBySpend	daily_spend_by_key	 SELECT l.api_key,\n    v.key_alias,\n    v.key_name,\n    sum(l.spend) AS total_spend\n   FROM (public."LiteLLM_SpendLogs" l\n     LEFT JOIN public."LiteLLM_VerificationToken" v ON ((l.api_key = v.token)))\n  WHERE (l."startTime" >= (CURRENT_DATE - '30 days'::interval))\n  GROUP BY l.api_key, v.key_alias, v.key_name\n  ORDER BY (sum(l.spend)) DESC	SELECT l.api_key, v.key_alias, v.key_name, l.total_spend::double precision AS total_spend FROM (SELECT api_key, sum(spend) AS total_spend FROM (SELECT "api_key", "spend", "requests" FROM "litellm_spend"."daily_spend_by_key_rollup" WHERE "date" >= CURRENT_DATE - 30 UNION ALL SELECT CASE WHEN octet_length("api_key") > 200 THEN left("api_key", 30) || '…' || encode(sha256(convert_to("api_key", 'UTF8')), 'hex') ELSE "api_key" END AS "api_key", "spend" AS "spend", "requests" AS "requests" FROM "litellm_spend"."change_log" AS r WHERE r."seq" > (SELECT watermark FROM litellm_spend.rollup WHERE rollup.name = 'daily_spend_by_key'::text) AND hour >= CURRENT_DATE - 30) AS live GROUP BY api_key HAVING sum(requests) <> 0) AS l LEFT JOIN "public"."LiteLLM_VerificationToken" AS v ON l.api_key = v.token ORDER BY l.total_spend DESC
Last30dModelsBySpend	daily_spend_by_model	 SELECT "LiteLLM_SpendLogs".model,\n    sum("LiteLLM_SpendLogs".spend) AS total_spend\n   FROM public."LiteLLM_SpendLogs"\n  WHERE (("LiteLLM_SpendLogs"."startTime" >= (CURRENT_DATE - '30 days'::interval)) AND ("LiteLLM_SpendLogs".model <> ''::text))\n  GROUP BY "LiteLLM_SpendLogs".model\n  ORDER BY (sum("LiteLLM_SpendLogs".spend)) DESC	SELECT model, sum(spend)::double precision AS total_spend FROM (SELECT "model", "spend", "requests" FROM "litellm_spend"."daily_spend_by_model_rollup" WHERE "date" >= CURRENT_DATE - 30 UNION ALL SELECT CASE WHEN octet_length("model") > 200 THEN left("model", 30) || '…' || encode(sha256(convert_to("model", 'UTF8')), 'hex') ELSE "model" END AS "model", "spend" AS "spend", "requests" AS "requests" FROM "litellm_spend"."change_log" AS r WHERE r."seq" > (SELECT watermark FROM litellm_spend.rollup WHERE rollup.name = 'daily_spend_by_model'::text) AND hour >= CURRENT_DATE - 30) AS live WHERE model <> '' GROUP BY model HAVING sum(requests) <> 0 ORDER BY sum(spend) DESC
DailyTagSpend	daily_spend_by_tag	 SELECT jsonb_array_elements_text(s.request_tags) AS individual_request_tag,\n    date(s."startTime") AS spend_date,\n    count(*) AS log_count,\n    sum(s.spend) AS total_spend\n   FROM public."LiteLLM_SpendLogs" s\n  GROUP BY (jsonb_array_elements_text(s.request_tags)), (date(s."startTime"))	SELECT tag AS individual_request_tag, date AS spend_date, sum(requests)::bigint AS log_count, sum(spend)::double precision AS total_spend FROM (SELECT "date", "tag", "spend", "requests" FROM "litellm_spend"."daily_spend_by_tag_rollup" UNION ALL SELECT hour::date AS "date", CASE WHEN octet_length("tag") > 600 THEN left("tag", 30) || '…' || encode(sha256(convert_to("tag", 'UTF8')), 'hex') ELSE "tag" END AS "tag", "spend" AS "spend", "requests" AS "requests" FROM "litellm_spend"."change_log" AS r CROSS JOIN LATERAL jsonb_array_elements_text(\n    CASE WHEN jsonb_typeof(r.request_tags) = 'array' THEN r.request_tags ELSE '[]' END) AS tags(tag) WHERE r."seq" > (SELECT watermark FROM litellm_spend.rollup WHERE rollup.name = 'daily_spend_by_tag'::text)) AS live GROUP BY tag, date HAVING sum(requests) <> 0
Last30dTopEndUsersSpend	daily_spend_by_end_user	 SELECT "LiteLLM_SpendLogs".end_user,\n    count(*) AS total_events,\n    sum("LiteLLM_SpendLogs".spend) AS total_spend\n   FROM public."LiteLLM_SpendLogs"\n  WHERE (("LiteLLM_SpendLogs".end_user <> ''::text) AND ("LiteLLM_SpendLogs".end_user <> USER) AND ("LiteLLM_SpendLogs"."startTime" >= (CURRENT_DATE - '30 days'::interval)))\n  GROUP BY "LiteLLM_SpendLogs".end_user\n  ORDER BY (sum("LiteLLM_SpendLogs".spend)) DESC\n LIMIT 100	SELECT end_user, sum(requests)::bigint AS total_events, sum(spend)::double precision AS total_spend FROM (SELECT "end_user", "spend", "requests" FROM "litellm_spend"."daily_spend_by_end_user_rollup" WHERE "date" >= CURRENT_DATE - 30 UNION ALL SELECT CASE WHEN octet_length("end_user") > 600 THEN left("end_user", 30) || '…' || encode(sha256(convert_to("end_user", 'UTF8')), 'hex') ELSE "end_user" END AS "end_user", "spend" AS "spend", "requests" AS "requests" FROM "litellm_spend"."change_log" AS r WHERE r."seq" > (SELECT watermark FROM litellm_spend.rollup WHERE rollup.name = 'daily_spend_by_end_user'::text) AND hour >= CURRENT_DATE - 30) AS live WHERE end_user <> '' AND end_user <> CURRENT_USER GROUP BY end_user HAVING sum(requests) <> 0 ORDER BY sum(spend) DESC LIMIT 100
\.

COPY litellm_spend.policy (table_schema, table_name, time_column, "interval", precreate, retention, on_expire, maintained_at, retry_at, last_error, last_error_at) FROM stdin;
public	LiteLLM_SpendLogs	startTime	day	7	90 days	drop	2026-11-28 16:13:46.287102+00	\N	\N	\N
\.

CREATE OR REPLACE VIEW public."MonthlyGlobalSpend" AS
 SELECT live.date,
    (sum(live.spend))::double precision AS spend
   FROM ( SELECT daily_spend_rollup.date,
            daily_spend_rollup.spend,
            daily_spend_rollup.requests
           FROM litellm_spend.daily_spend_rollup
          WHERE (daily_spend_rollup.date >= (CURRENT_DATE - 30))
        UNION ALL
         SELECT (r.hour)::date AS date,
            r.spend,
            r.requests
           FROM litellm_spend.change_log r
          WHERE ((r.seq > ( SELECT rollup.watermark
                   FROM litellm_spend.rollup
                  WHERE (rollup.name = 'daily_spend'::text))) AND (r.hour >= (CURRENT_DATE - 30)))) live
  GROUP BY live.date
 HAVING (sum(live.requests) <> (0)::numeric);

CREATE OR REPLACE VIEW public."Last30dKeysBySpend" AS
 SELECT l.api_key,
    v.key_alias,
    v.key_name,
    (l.total_spend)::double precision AS total_spend
   FROM (( SELECT live.api_key,
            sum(live.spend) AS total_spend
           FROM ( SELECT daily_spend_by_key_rollup.api_key,
                    daily_spend_by_key_rollup.spend,
                    daily_spend_by_key_rollup.requests
                   FROM litellm_spend.daily_spend_by_key_rollup
                  WHERE (daily_spend_by_key_rollup.date >= (CURRENT_DATE - 30))
                UNION ALL
                 SELECT
                        CASE
                            WHEN (octet_length(r.api_key) > 200) THEN (("left"(r.api_key, 30) || '…'::text) || encode(sha256(convert_to(r.api_key, 'UTF8'::name)), 'hex'::text))
                            ELSE r.api_key
                        END AS api_key,
                    r.spend,
                    r.requests
                   FROM litellm_spend.change_log r
                  WHERE ((r.seq > ( SELECT rollup.watermark
                           FROM litellm_spend.rollup
                          WHERE (rollup.name = 'daily_spend_by_key'::text))) AND (r.hour >= (CURRENT_DATE - 30)))) live
          GROUP BY live.api_key
         HAVING (sum(live.requests) <> (0)::numeric)) l
     LEFT JOIN public."LiteLLM_VerificationToken" v ON ((l.api_key = v.token)))
  ORDER BY l.total_spend DESC;

CREATE OR REPLACE VIEW public."Last30dModelsBySpend" AS
 SELECT live.model,
    (sum(live.spend))::double precision AS total_spend
   FROM ( SELECT daily_spend_by_model_rollup.model,
            daily_spend_by_model_rollup.spend,
            daily_spend_by_model_rollup.requests
           FROM litellm_spend.daily_spend_by_model_rollup
          WHERE (daily_spend_by_model_rollup.date >= (CURRENT_DATE - 30))
        UNION ALL
         SELECT
                CASE
                    WHEN (octet_length(r.model) > 200) THEN (("left"(r.model, 30) || '…'::text) || encode(sha256(convert_to(r.model, 'UTF8'::name)), 'hex'::text))
                    ELSE r.model
                END AS model,
            r.spend,
            r.requests
           FROM litellm_spend.change_log r
          WHERE ((r.seq > ( SELECT rollup.watermark
                   FROM litellm_spend.rollup
                  WHERE (rollup.name = 'daily_spend_by_model'::text))) AND (r.hour >= (CURRENT_DATE - 30)))) live
  WHERE (live.model <> ''::text)
  GROUP BY live.model
 HAVING (sum(live.requests) <> (0)::numeric)
  ORDER BY (sum(live.spend)) DESC;

CREATE OR REPLACE VIEW public."MonthlyGlobalSpendPerKey" AS
 SELECT live.date,
    (sum(live.spend))::double precision AS spend,
    live.api_key
   FROM ( SELECT daily_spend_by_key_rollup.date,
            daily_spend_by_key_rollup.api_key,
            daily_spend_by_key_rollup.spend,
            daily_spend_by_key_rollup.requests
           FROM litellm_spend.daily_spend_by_key_rollup
          WHERE (daily_spend_by_key_rollup.date >= (CURRENT_DATE - 30))
        UNION ALL
         SELECT (r.hour)::date AS date,
                CASE
                    WHEN (octet_length(r.api_key) > 200) THEN (("left"(r.api_key, 30) || '…'::text) || encode(sha256(convert_to(r.api_key, 'UTF8'::name)), 'hex'::text))
                    ELSE r.api_key
                END AS api_key,
            r.spend,
            r.requests
           FROM litellm_spend.change_log r
          WHERE ((r.seq > ( SELECT rollup.watermark
                   FROM litellm_spend.rollup
                  WHERE (rollup.name = 'daily_spend_by_key'::text))) AND (r.hour >= (CURRENT_DATE - 30)))) live
  GROUP BY live.date, live.api_key
 HAVING (sum(live.requests) <> (0)::numeric);

CREATE OR REPLACE VIEW public."MonthlyGlobalSpendPerUserPerKey" AS
 SELECT live.date,
    (sum(live.spend))::double precision AS spend,
    live.api_key,
    live."user"
   FROM ( SELECT daily_spend_by_key_rollup.date,
            daily_spend_by_key_rollup.api_key,
            daily_spend_by_key_rollup."user",
            daily_spend_by_key_rollup.spend,
            daily_spend_by_key_rollup.requests
           FROM litellm_spend.daily_spend_by_key_rollup
          WHERE (daily_spend_by_key_rollup.date >= (CURRENT_DATE - 30))
        UNION ALL
         SELECT (r.hour)::date AS date,
                CASE
                    WHEN (octet_length(r.api_key) > 200) THEN (("left"(r.api_key, 30) || '…'::text) || encode(sha256(convert_to(r.api_key, 'UTF8'::name)), 'hex'::text))
                    ELSE r.api_key
                END AS api_key,
                CASE
                    WHEN (octet_length(r."user") > 200) THEN (("left"(r."user", 30) || '…'::text) || encode(sha256(convert_to(r."user", 'UTF8'::name)), 'hex'::text))
                    ELSE r."user"
                END AS "user",
            r.spend,
            r.requests
           FROM litellm_spend.change_log r
          WHERE ((r.seq > ( SELECT rollup.watermark
                   FROM litellm_spend.rollup
                  WHERE (rollup.name = 'daily_spend_by_key'::text))) AND (r.hour >= (CURRENT_DATE - 30)))) live
  GROUP BY live.date, live."user", live.api_key
 HAVING (sum(live.requests) <> (0)::numeric);

CREATE OR REPLACE VIEW public."DailyTagSpend" AS
 SELECT live.tag AS individual_request_tag,
    live.date AS spend_date,
    (sum(live.requests))::bigint AS log_count,
    (sum(live.spend))::double precision AS total_spend
   FROM ( SELECT daily_spend_by_tag_rollup.date,
            daily_spend_by_tag_rollup.tag,
            daily_spend_by_tag_rollup.spend,
            daily_spend_by_tag_rollup.requests
           FROM litellm_spend.daily_spend_by_tag_rollup
        UNION ALL
         SELECT (r.hour)::date AS date,
                CASE
                    WHEN (octet_length(tags.tag) > 600) THEN (("left"(tags.tag, 30) || '…'::text) || encode(sha256(convert_to(tags.tag, 'UTF8'::name)), 'hex'::text))
                    ELSE tags.tag
                END AS tag,
            r.spend,
            r.requests
           FROM (litellm_spend.change_log r
             CROSS JOIN LATERAL jsonb_array_elements_text(
                CASE
                    WHEN (jsonb_typeof(r.request_tags) = 'array'::text) THEN r.request_tags
                    ELSE '[]'::jsonb
                END) tags(tag))
          WHERE (r.seq > ( SELECT rollup.watermark
                   FROM litellm_spend.rollup
                  WHERE (rollup.name = 'daily_spend_by_tag'::text)))) live
  GROUP BY live.tag, live.date
 HAVING (sum(live.requests) <> (0)::numeric);

CREATE OR REPLACE VIEW public."Last30dTopEndUsersSpend" AS
 SELECT live.end_user,
    (sum(live.requests))::bigint AS total_events,
    (sum(live.spend))::double precision AS total_spend
   FROM ( SELECT daily_spend_by_end_user_rollup.end_user,
            daily_spend_by_end_user_rollup.spend,
            daily_spend_by_end_user_rollup.requests
           FROM litellm_spend.daily_spend_by_end_user_rollup
          WHERE (daily_spend_by_end_user_rollup.date >= (CURRENT_DATE - 30))
        UNION ALL
         SELECT
                CASE
                    WHEN (octet_length(r.end_user) > 600) THEN (("left"(r.end_user, 30) || '…'::text) || encode(sha256(convert_to(r.end_user, 'UTF8'::name)), 'hex'::text))
                    ELSE r.end_user
                END AS end_user,
            r.spend,
            r.requests
           FROM litellm_spend.change_log r
          WHERE ((r.seq > ( SELECT rollup.watermark
                   FROM litellm_spend.rollup
                  WHERE (rollup.name = 'daily_spend_by_end_user'::text))) AND (r.hour >= (CURRENT_DATE - 30)))) live
  WHERE ((live.end_user <> ''::text) AND (live.end_user <> CURRENT_USER))
  GROUP BY live.end_user
 HAVING (sum(live.requests) <> (0)::numeric)
  ORDER BY (sum(live.spend)) DESC
 LIMIT 100;

CREATE TRIGGER litellm_spend_capture_delete AFTER DELETE ON public."LiteLLM_SpendLogs" REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION litellm_spend.capture_delete();
CREATE TRIGGER litellm_spend_capture_insert AFTER INSERT ON public."LiteLLM_SpendLogs" REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION litellm_spend.capture_insert();
CREATE TRIGGER litellm_spend_capture_truncate AFTER TRUNCATE ON public."LiteLLM_SpendLogs" FOR EACH STATEMENT EXECUTE FUNCTION litellm_spend.capture_truncate();
CREATE TRIGGER litellm_spend_capture_update AFTER UPDATE ON public."LiteLLM_SpendLogs" REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION litellm_spend.capture_update();

GRANT USAGE ON SCHEMA litellm_spend TO litellm;
GRANT ALL ON FUNCTION litellm_spend.backfill_step(source regclass) TO litellm;
GRANT SELECT(name) ON TABLE litellm_spend.rollup TO litellm;
GRANT SELECT(watermark) ON TABLE litellm_spend.rollup TO litellm;
GRANT SELECT ON TABLE litellm_spend.change_log TO litellm;
GRANT SELECT ON TABLE litellm_spend.daily_spend_rollup TO litellm;
GRANT SELECT ON TABLE litellm_spend.daily_spend_by_end_user_rollup TO litellm;
GRANT SELECT ON TABLE litellm_spend.daily_spend_by_key_rollup TO litellm;
GRANT SELECT ON TABLE litellm_spend.daily_spend_by_model_rollup TO litellm;
GRANT SELECT ON TABLE litellm_spend.daily_spend_by_tag_rollup TO litellm;

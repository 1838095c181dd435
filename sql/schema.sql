-- State of litellm_spend. Rollup tables, live views, the change log and the capture functions are made by
-- spend_attach() and spend_rollup_create() in the same schema. They are not members of the extension, so that
-- DROP EXTENSION is refused while billing history exists and pg_dump dumps it.

-- What follows means the server's own functions and operators, whatever others have made in the extension's
-- schema before.
SET LOCAL search_path = pg_catalog, pg_temp;

-- The tables are heaps in the database's own tablespace, whatever a session has for its own. The end of this
-- file puts back what is set here, which would else hold until the end of the transaction.
SELECT set_config('litellm_spend_script.' || name, current_setting(name), true)
FROM unnest(ARRAY['default_tablespace', 'default_table_access_method']) AS name;
SET LOCAL default_tablespace = '';
SET LOCAL default_table_access_method = heap;

CREATE SCHEMA litellm_spend;

-- Names this database among those that its dumps are restored to: it is not dumped. State that another
-- installation wrote came out of a dump, and is left alone until the restore is over.
CREATE TABLE litellm_spend.installation (id uuid PRIMARY KEY);
INSERT INTO litellm_spend.installation VALUES (gen_random_uuid());

-- Of the event trigger that a restore makes last: what shows that it is over. It is disabled, and does
-- nothing.
CREATE FUNCTION litellm_spend.restored() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN NULL; END';

-- Between these tables there are no foreign keys: pg_restore -j fills them in any order.

-- A relation whose rows are numbered by a sequence.
CREATE TABLE litellm_spend.source (
    name           text PRIMARY KEY,
    relation       regclass NOT NULL,
    sequence       regclass NOT NULL,
    -- Sequence values that are not known to be safe yet, with the transactions each waits for.
    candidates     jsonb NOT NULL DEFAULT '[]',
    -- Rows numbered up to here were merged everywhere and removed (only where the rows are ours).
    trimmed_to     bigint NOT NULL DEFAULT 0,
    -- Older buckets have lost raw rows: they are history and never recomputed.
    frozen_before  timestamp NOT NULL DEFAULT '-infinity',
    -- The installation that wrote the row.
    origin         uuid,
    -- Values that are safe here, but of a table of Citus's not yet on its nodes; transactions are written
    -- node:transaction.
    node_candidates jsonb NOT NULL DEFAULT '[]',
    -- In the hourly reports the hours of the days before are added up to days. A midnight.
    hours_from     timestamp NOT NULL DEFAULT '-infinity'
);

CREATE TABLE litellm_spend.rollup (
    name            text PRIMARY KEY,
    -- NULL once the source was dropped: what was merged is history.
    source          text,
    -- NULL when it is filled by its owner's own SQL.
    definition      jsonb,
    watermark       bigint NOT NULL DEFAULT 0,
    -- Sequence values of the rows that were there when it was made (declared rollups): progress is measured
    -- between them.
    first_value     bigint,
    last_value      bigint,
    -- Buckets from here on equal the truth; backfill moves it down to -infinity.
    covered_from    timestamp NOT NULL DEFAULT 'infinity',
    -- Of a report that was added later: what it does not know, because raw rows of these days are gone or are
    -- not read yet. Its views show nothing of it.
    unknown_days    tsmultirange,
    -- Oldest and newest bucket when backfill began: its progress is measured against them.
    backfill_first  timestamp,
    backfill_last   timestamp,
    backfill_began  timestamptz,
    merged_at       timestamptz,
    merged_rows     bigint,
    merged_groups   bigint,
    merged_ms       double precision,
    last_error      text,
    last_error_at   timestamptz,
    -- Of a declared one: who owned its source when it was declared or last followed, and as whom it is
    -- merged. Of a built-in one while no table is captured: whose history it is.
    owner           regrole,
    -- Of one whose table Citus distributes: what is merged up to here is committed on all nodes.
    committed_to    bigint
);

-- The one table that triggers capture into the change log.
CREATE TABLE litellm_spend.capture (
    source           text PRIMARY KEY,
    table_schema     name NOT NULL,
    table_name       name NOT NULL,
    relation         regclass NOT NULL,
    columns          text[] NOT NULL,
    on_delete        text NOT NULL CHECK (on_delete IN ('keep', 'subtract')),
    -- The table that had the name before it was replaced, while it exists, and the end of its rows.
    predecessor      regclass,
    predecessor_end  timestamp,
    -- Failures of capture up to here are repaired; candidates as in source.
    failures_seen    bigint NOT NULL DEFAULT 0,
    candidates       jsonb NOT NULL DEFAULT '[]',
    last_error       text,
    last_error_at    timestamptz,
    -- Who owned it when it was attached: a table of that name that is somebody else's is not followed.
    owner            regrole,
    origin           uuid,
    -- Who wrote each capture trigger last, by the trigger's OID: enabling one that was disabled writes it.
    triggers         jsonb NOT NULL DEFAULT '{}'
);

-- Ranges in which capture failed. A row commits with the statement that it concerns.
CREATE TABLE litellm_spend.dirty_range (
    -- Value of capture_failures; NULL when nothing failed (TRUNCATE).
    failure      bigint,
    range_start  timestamp NOT NULL,
    range_end    timestamp NOT NULL,
    -- rebuild: recompute the range. keep: nothing, the rollups are right; without a failure: it was of any
    -- day, and all is computed again but days that keep what they are. freeze: raw rows may be gone; once
    -- repaired_at is set they are, and the range is never recomputed.
    repair       text NOT NULL CHECK (repair IN ('rebuild', 'keep', 'freeze')),
    operation    text NOT NULL,
    sqlstate     text,
    message      text,
    noticed_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    repaired_at  timestamptz,
    -- The raw rows of the range are gone: the rollups keep what they say.
    unrepairable boolean NOT NULL DEFAULT false,
    -- The owner of the captured table may add rows.
    CONSTRAINT dirty_range_order CHECK (range_start <= range_end)
);
-- It has no key: without this a publication FOR ALL TABLES would refuse to update it.
ALTER TABLE litellm_spend.dirty_range REPLICA IDENTITY FULL;

-- Counts failures of capture. A sequence, because no rollback takes it back and it needs no space.
CREATE SEQUENCE litellm_spend.capture_failures;

-- LiteLLM's views that we answer.
CREATE TABLE litellm_spend.public_view (
    name       text PRIMARY KEY,
    rollup     text NOT NULL,
    -- LiteLLM's own query, to give back. Every name in it is qualified.
    original   text NOT NULL,
    -- Ours, while it is in place.
    installed  text,
    -- The view's owner, who was granted what it shows.
    owner      regrole
);

-- How a table is partitioned, and how long its rows stay. It holds for this table while it belongs to this
-- owner: whoever else gets the name later has not asked for it.
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

-- A table on its way to being partitioned, or back.
CREATE TABLE litellm_spend.conversion (
    table_schema   name NOT NULL,
    table_name     name NOT NULL,
    relation       regclass NOT NULL,
    direction      text NOT NULL CHECK (direction IN ('convert', 'revert')),
    options        jsonb NOT NULL,
    started_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- It waits for a new call: the cutover came too near.
    stopped        boolean NOT NULL DEFAULT false,
    -- Since when the step at hand could not be done, and why.
    last_error     text,
    last_error_at  timestamptz,
    -- When the worker tries again, at the latest.
    retry_at       timestamptz,
    -- As whom it is done.
    owner          regrole NOT NULL,
    origin         uuid,
    PRIMARY KEY (table_schema, table_name)
);

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

-- What was in each partition that expired: the proof that nothing was lost unseen.
CREATE TABLE litellm_spend.expired_partition (
    table_schema   name NOT NULL,
    table_name     name NOT NULL,
    partition      text NOT NULL,
    range_start    timestamp,
    range_end      timestamp,
    rows           bigint NOT NULL,
    spend          numeric,
    action         text NOT NULL CHECK (action IN ('drop', 'detach')),
    -- The policy by which it expired.
    policy         text NOT NULL,
    expired_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (table_schema, table_name, partition, expired_at)
);

-- A table or role that is gone would be dumped as its number, which may be another's where it is restored.
SELECT pg_catalog.pg_extension_config_dump('litellm_spend.policy',
    'WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = relation)
         AND EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = owner)');
SELECT pg_catalog.pg_extension_config_dump('litellm_spend.conversion',
    'WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = relation)
         AND EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = owner)');
SELECT pg_catalog.pg_extension_config_dump('litellm_spend.index_set',
    'WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = relation)
         AND EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = owner)');
SELECT pg_catalog.pg_extension_config_dump('litellm_spend.expired_partition', '');
SELECT pg_catalog.pg_extension_config_dump('litellm_spend.source',
    'WHERE name = ''change_log'' OR EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = relation)
         AND EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = sequence)');
SELECT pg_catalog.pg_extension_config_dump('litellm_spend.rollup', '');
SELECT pg_catalog.pg_extension_config_dump('litellm_spend.capture', '');
SELECT pg_catalog.pg_extension_config_dump('litellm_spend.dirty_range', '');
SELECT pg_catalog.pg_extension_config_dump('litellm_spend.capture_failures', '');
SELECT pg_catalog.pg_extension_config_dump('litellm_spend.public_view', '');

-- One that is not there, which a configuration may name, cannot be set: it means the same as none.
SELECT set_config(name, value, true)
FROM unnest(ARRAY['default_tablespace', 'default_table_access_method']) AS name,
    current_setting('litellm_spend_script.' || name) AS value
WHERE name <> 'default_tablespace' OR value = '' OR value IN (SELECT spcname FROM pg_tablespace);

-- Functions of the library go to the extension's schema.
SET LOCAL search_path = @extschema@, pg_temp;

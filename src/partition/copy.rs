//! The copy of a partitioned table that becomes the plain one, and how it follows what changes meanwhile.
//!
//! ```text
//!   copied, in the order of time and key        | still to copy
//!  ---------------------------------------------+--------------------->
//!        ^ a row that changes here or there     copied_to
//!          is noted by its key, and copied again
//! ```
//! The triggers are there before the first row is read, and whoever wrote before them has ended: so every row
//! is either seen by the copy or noted. They only write keys, and never fail the user's statement: what could
//! not be written counts a failure in a sequence, and then the copy begins anew.
//!
//! Statement triggers with transition tables, on the table and on each partition: the server fires those of
//! the table that the statement names. One for each row would open a subtransaction for each, which from 64
//! on slows down everybody's snapshots. Only a row that gets another time has one of its own, before the
//! change: MERGE shows a row that it moves to another partition to no statement trigger of UPDATE.
//!
//! All of it belongs to the table's owner, in the archive, and runs as that role: copying calls constraints
//! and generated columns, and the types of a key may be the owner's. The triggers' function is SECURITY
//! DEFINER as the owner, because whoever may write to the table need not be able to write the notes.

use crate::error::{Error, Result};
use crate::guc;
use crate::partition::archive::{self, ARCHIVE};
use crate::partition::create::storage;
use crate::partition::dependents::{revoke_default_privileges, revoke_execute};
use crate::partition::revert::Reversion;
use crate::server::locks::{self, TRIGGERS_LOCK_TIMEOUT};
use crate::server::relation::{self, Table, free_name};
use crate::server::session::Owner;
use crate::server::spi::{self, Found, value};
use crate::server::text::{literal, qualified, quoted, suffixed};
use pgrx::prelude::*;
use std::time::{Duration, Instant};

/// Rows copied in one transaction.
const BATCH: i64 = 10_000;

/// Changes that there may be when the swap asks for its lock, or how long the last ones may have taken if
/// they were more.
const FEW: i64 = BATCH / 20;
const SHORT: Duration = Duration::from_millis(50);

/// Changes that the swap copies under its lock. More than [`FEW`]: whoever had the table until then may have
/// changed many rows, as LiteLLM's clean-up does, which deletes a thousand with a statement.
const LAST: i64 = BATCH / 2;

/// For how long one transaction goes on catching up: far less than a step's limit of time, which would undo
/// all of it. Where even a few changes took that long, the swap does not come next: everybody would wait.
const LONG: Duration = Duration::from_secs(1);

/// What the table of changes, the sequence of failures and the function are called, after the plain table.
const CHANGES: &str = "_changes";
const FAILURES: &str = "_failures";
const FUNCTION: &str = "_note";

/// The triggers' names begin so; which events each is for.
const TRIGGER: &str = "litellm_spend_revert";
const EVENTS: [(&str, &str); 4] = [
    ("insert", "REFERENCING NEW TABLE AS new_rows"),
    ("update", "REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows"),
    ("delete", "REFERENCING OLD TABLE AS old_rows"),
    ("truncate", ""),
];
/// And so ends the name of the one for a row that gets another time.
const MOVE: &str = "move";

// ---- to make it ------------------------------------------------------------------------------------------

/// One of the names that go with the plain table's.
fn beside(reversion: &Reversion, suffix: &str) -> String {
    qualified(ARCHIVE, &suffixed(&reversion.options.plain, suffix))
}

/// The plain table, empty, and the triggers that note what changes.
pub fn prepare(reversion: &mut Reversion) -> Result<()> {
    let name = reversion.name();
    let table = Table::find(reversion.relation)?.ok_or_else(|| Error::NoTable(name.clone()))?;
    let owner = reversion.owner;
    let run = |sql: String| owner.run(sql);
    archive::ensure(owner)?;
    // Read first: what changes before the writers wait is found by the next step.
    let shape = shape(reversion.relation)?;
    // And so is what is in the way, before anybody is.
    reversion.read_key(&reversion.dependents()?)?;
    if reversion.options.shape.is_some() {
        drop_triggers(reversion)?;
        drop_made(reversion)?;
    }
    let free = |name: &str| free_name([&table.schema, ARCHIVE], name);
    reversion.options.duplicates = free(&suffixed(&table.name, "_duplicates"))?;
    // Others may make tables there, too: a name for which those beside it are free as well.
    for number in 1..100 {
        let name = if number == 1 { "_plain".into() } else { format!("_plain{number}") };
        reversion.options.plain = free(&suffixed(&table.name, &name))?;
        let [changes, failures] = [CHANGES, FAILURES].map(|suffix| beside(reversion, suffix));
        let relation = relation::find_relation(&changes)?.or(relation::find_relation(&failures)?);
        if relation.is_none() && !has_function(&suffixed(&reversion.options.plain, FUNCTION))? {
            break;
        }
    }
    let (plain, duplicates, key) = (reversion.plain(), reversion.duplicates(), key(reversion));
    let [changes, failures] = [CHANGES, FAILURES].map(|suffix| beside(reversion, suffix));
    let like = "INCLUDING DEFAULTS INCLUDING GENERATED INCLUDING CONSTRAINTS INCLUDING STORAGE
        INCLUDING COMPRESSION";
    let constraint = quoted(&key_name(&reversion.options.plain));
    let (storage, _) = storage(template(reversion)?)?;
    run(format!(
        "CREATE TABLE {plain} (LIKE {name} {like}, CONSTRAINT {constraint} PRIMARY KEY ({key})) {storage}"
    ))?;
    // A CHECK that old rows need not meet is given back at the swap.
    for check in not_valid(reversion.relation)? {
        run(format!("ALTER TABLE {plain} DROP CONSTRAINT {}", quoted(&check)))?;
    }
    run(format!("CREATE TABLE {duplicates} (LIKE {name} INCLUDING GENERATED)"))?;
    run(format!("CREATE TABLE {changes} AS SELECT {key} FROM {name} WHERE false"))?;
    // A publication FOR ALL TABLES has them, too: without an identity no row could be deleted from them.
    for table in [&duplicates, &changes] {
        run(format!("ALTER TABLE {table} REPLICA IDENTITY FULL"))?;
    }
    run(format!("CREATE SEQUENCE {failures}"))?;
    for made in [&plain, &duplicates, &changes, &failures] {
        revoke_default_privileges(owner, made)?;
    }
    create_function(reversion)?;
    // From here on writers wait, until this transaction ends: what they wrote before is visible to the copy.
    create_triggers(reversion, &relation::relation_tree(reversion.relation)?)?;
    let (time, function) = (quoted(&reversion.options.time_column), beside(reversion, FUNCTION));
    run(format!(
        "CREATE OR REPLACE TRIGGER {TRIGGER}_{MOVE} BEFORE UPDATE ON {name} FOR EACH ROW
         WHEN (OLD.{time} IS DISTINCT FROM NEW.{time}) EXECUTE FUNCTION {function}()"
    ))?;
    fire_always(reversion, &name, MOVE)?;
    reversion.options.shape = Some(shape);
    (reversion.options.indexes, reversion.options.indexed, reversion.options.without) = (None, false, vec![]);
    remember(reversion)?;
    restart(reversion)
}

/// Whether the archive has a function of that name.
fn has_function(name: &str) -> Result<bool> {
    let sql = "SELECT FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
               WHERE n.nspname = $1 AND p.proname = $2 LIMIT 1";
    spi::query(sql, &[ARCHIVE.into(), name.into()], |_| Ok(())).any()
}

/// The tables that we made, by name.
fn names(reversion: &Reversion) -> [String; 3] {
    [reversion.plain(), reversion.duplicates(), beside(reversion, CHANGES)]
}

/// Knows them by their Oids from here on.
fn remember(reversion: &mut Reversion) -> Result<()> {
    let oid = |name: &String| Ok(relation::find_relation(name)?.map_or(0, |oid| oid.to_u32()));
    reversion.options.made = names(reversion).iter().map(oid).collect::<Result<_>>()?;
    reversion.options.tree = tree(reversion)?;
    reversion.options.triggers_by = triggers_by(&reversion.options.tree)?;
    Ok(())
}

/// Knows what came out of a dump by its names, for the last time. What changed before its triggers were
/// there again is not noted: the copy begins anew.
pub fn recognize(reversion: &mut Reversion) -> Result<bool> {
    if reversion.options.shape.is_none() || !reversion.options.made.is_empty() {
        return Ok(false);
    }
    remember(reversion)?;
    require_made(reversion)?;
    begin_anew(reversion)?;
    Ok(true)
}

/// Fails if what we made has been replaced, or given to somebody else.
pub fn require_made(reversion: &Reversion) -> Result<()> {
    for (name, made) in names(reversion).iter().zip(&reversion.options.made) {
        let found = Table::named(name)?.filter(|table| table.oid.to_u32() == *made);
        let found = found.ok_or_else(|| Error::CopyLost { table: reversion.name(), copy: name.clone() })?;
        if Owner::role(found.owner_oid) != reversion.owner {
            let expected = reversion.owner.name()?;
            return Err(Error::OtherOwner { relation: name.clone(), owner: found.owner, expected });
        }
    }
    Ok(())
}

/// What is in the way of copying by the key: we write the server's own operators, and a type of an extension
/// may have others, by which its keys are ordered and agree.
pub fn obstacles(table: pg_sys::Oid) -> Result<Vec<String>> {
    let sql = "SELECT format('Column %s of its primary key is of type %s, whose operators are not the server''s own.',
                   quote_ident(a.attname), format_type(a.atttypid, a.atttypmod))
               FROM pg_catalog.pg_index i
               CROSS JOIN LATERAL unnest(i.indclass::oid[], i.indkey::int2[]) AS k (class, attnum)
               JOIN pg_catalog.pg_opclass o ON o.oid = k.class
               JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
               WHERE i.indrelid = $1 AND i.indisprimary AND o.opcnamespace <> 'pg_catalog'::regnamespace";
    spi::query(sql, &[table.into()], |r| value(r, 1))
}

/// A partition whose owner is not the table's.
pub fn partition_of_another(table: &Table) -> Result<Option<String>> {
    spi::query(
        "SELECT oid::regclass::text FROM pg_catalog.pg_class WHERE oid = ANY ($1) AND relowner <> $2",
        &[relation::relation_tree(table.oid)?.into(), table.owner_oid.into()],
        |r| value(r, 1),
    )
    .one()
}

fn restart(reversion: &mut Reversion) -> Result<()> {
    let failures = failures(reversion)?;
    let options = &mut reversion.options;
    (options.copied_to, options.copied_all) = (None, false);
    options.failures = failures;
    Ok(())
}

/// Begins the copy anew: what the triggers missed may be anywhere.
pub fn begin_anew(reversion: &mut Reversion) -> Result<()> {
    // A failure is counted at once, but what its writer wrote is visible to the copy only when it has ended.
    locks::lock_against_writers(&relation::relation_tree(reversion.relation)?)?;
    restart(reversion)?;
    lock(reversion)?;
    // Its triggers, if there are any, are the owner's.
    reversion.owner.run(format!("TRUNCATE {}, {}", reversion.plain(), reversion.duplicates()))
}

/// Locks what is ours, which nobody uses but an autovacuum: that gives way.
pub fn lock(reversion: &Reversion) -> Result<()> {
    let (plain, duplicates) = (reversion.plain(), reversion.duplicates());
    let found = [relation::find_relation(&plain)?, relation::find_relation(&duplicates)?];
    locks::lock_exclusively(guc::lock_timeout(), found.into_iter().flatten())
}

/// The plain table's primary key, until it has the name.
pub fn key_name(plain: &str) -> String {
    suffixed(plain, "_pkey")
}

/// As what the plain table is stored: the newest partition that is a heap, as the old ones may be stored for
/// good. If none is, the newest.
fn template(reversion: &Reversion) -> Result<pg_sys::Oid> {
    let partition = spi::query(
        "SELECT c.oid FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
         JOIN pg_catalog.pg_am m ON m.oid = c.relam
         WHERE i.inhparent = $1
         ORDER BY m.amname = 'heap' DESC, pg_catalog.pg_get_expr(c.relpartbound, 0) = 'DEFAULT', c.oid DESC
         LIMIT 1",
        &[reversion.relation.into()],
        |r| value(r, 1),
    )
    .one()?;
    Ok(partition.unwrap_or(reversion.relation))
}

/// The CHECKs that rows which were there before them need not meet.
fn not_valid(relation: pg_sys::Oid) -> Result<Vec<String>> {
    let sql = "SELECT conname::text FROM pg_catalog.pg_constraint
               WHERE conrelid = $1 AND contype = 'c' AND NOT convalidated";
    spi::query(sql, &[relation.into()], |r| value(r, 1))
}

/// A relation's columns, CHECKs and primary key: the copy, which has them from when it was made, must have
/// the same. What the key is called does not matter.
pub fn shape(relation: pg_sys::Oid) -> Result<String> {
    let shape = spi::query(
        "SELECT concat_ws(', ',
             (SELECT string_agg(concat_ws(' ', quote_ident(attname), format_type(atttypid, atttypmod),
                      attcollation, format('%s%s%s%s', attgenerated, attnotnull, attstorage, attcompression),
                      pg_get_expr(adbin, adrelid)), ', ' ORDER BY attnum)
              FROM pg_catalog.pg_attribute LEFT JOIN pg_catalog.pg_attrdef ON adrelid = attrelid
                  AND adnum = attnum
              WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped),
             (SELECT string_agg(concat_ws(' ', CASE contype WHEN 'c' THEN quote_ident(conname) END,
                      pg_get_constraintdef(oid)), ', ' ORDER BY contype, conname)
              FROM pg_catalog.pg_constraint WHERE conrelid = $1 AND contype IN ('c', 'p')))",
        &[relation.into()],
        |r| value(r, 1),
    )
    .one()?;
    Ok(shape.unwrap_or_default())
}

fn create_function(reversion: &Reversion) -> Result<()> {
    let values = |row: &str| {
        let columns = reversion.options.key.iter().map(|c| format!("{row}.{}", quoted(c)));
        columns.collect::<Vec<_>>().join(", ")
    };
    let key = key(reversion);
    let [changes, failures, function] = [CHANGES, FAILURES, FUNCTION].map(|suffix| beside(reversion, suffix));
    let failure = format!("PERFORM nextval({})", literal(&failures));
    let body = format!(
        "
BEGIN
    IF TG_LEVEL = 'ROW' THEN
        INSERT INTO {changes} VALUES ({}), ({});
        RETURN NEW;
    ELSIF TG_OP = 'INSERT' THEN
        INSERT INTO {changes} SELECT {key} FROM new_rows;
    ELSIF TG_OP = 'UPDATE' THEN
        INSERT INTO {changes} SELECT {key} FROM old_rows UNION SELECT {key} FROM new_rows;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO {changes} SELECT {key} FROM old_rows;
    ELSE
        {failure};
    END IF;
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    BEGIN
        {failure};
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;
    IF TG_LEVEL = 'ROW' THEN
        RETURN NEW;
    END IF;
    RETURN NULL;
END
",
        values("OLD"),
        values("NEW")
    );
    let owner = reversion.owner;
    owner.run(format!(
        "CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
         SET search_path = pg_catalog, pg_temp SET lock_timeout = '{TRIGGERS_LOCK_TIMEOUT}' AS {}",
        literal(&body)
    ))?;
    // It runs as the owner for whoever may make a trigger of it.
    revoke_execute(owner, &format!("{function}()"))
}

/// The statement triggers of tables, whose writers wait from here on.
fn create_triggers(reversion: &Reversion, tables: &[pg_sys::Oid]) -> Result<()> {
    locks::lock_against_writers(tables)?;
    let (names, function) = (relation::relation_names(tables)?, beside(reversion, FUNCTION));
    for name in tables.iter().filter_map(|table| names.get(table)) {
        for (event, transition) in EVENTS {
            reversion.owner.run(format!(
                "CREATE OR REPLACE TRIGGER {TRIGGER}_{event} AFTER {event} ON {name} {transition}
                 FOR EACH STATEMENT EXECUTE FUNCTION {function}()"
            ))?;
            fire_always(reversion, name, event)?;
        }
    }
    Ok(())
}

/// Also for who loads rows with session_replication_role = replica.
fn fire_always(reversion: &Reversion, name: &str, event: &str) -> Result<()> {
    reversion.owner.run(format!("ALTER TABLE {name} ENABLE ALWAYS TRIGGER {TRIGGER}_{event}"))
}

/// The transactions that made our triggers on these tables, or changed them last.
fn triggers_by(tables: &[u32]) -> Result<Vec<u32>> {
    let tables: Vec<pg_sys::Oid> = tables.iter().map(|oid| (*oid).into()).collect();
    let sql = "SELECT DISTINCT xmin::text::bigint FROM pg_catalog.pg_trigger
               WHERE tgrelid = ANY ($1) AND pg_catalog.starts_with(tgname, $2 || '_')";
    let transactions = spi::fresh(sql, &[tables.into(), TRIGGER.into()], |r| value::<i64>(r, 1))?;
    Ok(transactions.into_iter().map(|xid| xid as u32).collect())
}

/// Whether the table or a partition that we know of lacks one: somebody dropped, disabled or replaced it, or
/// an older version made others. Or has done without for a while: who disables one and enables it again has
/// changed it.
pub fn lacks_triggers(reversion: &Reversion) -> Result<bool> {
    let tree: Vec<pg_sys::Oid> = reversion.options.tree.iter().map(|oid| (*oid).into()).collect();
    // (That of a row is each partition's, too: the server makes it there.)
    let events: Vec<String> =
        EVENTS.iter().map(|(event, _)| *event).chain([MOVE]).map(String::from).collect();
    let function = format!("{}()", beside(reversion, FUNCTION));
    let lacking = spi::query(
        "SELECT FROM pg_catalog.pg_class c, unnest($2::text[]) AS e(event)
         WHERE c.oid = ANY ($1) AND NOT EXISTS (
             SELECT FROM pg_catalog.pg_trigger t
             WHERE t.tgrelid = c.oid AND t.tgname = $3 || '_' || e.event AND t.tgenabled IN ('O', 'A')
                 AND t.tgfoid = pg_catalog.to_regprocedure($4) AND (t.tgqual IS NULL OR e.event = $5))
                 LIMIT 1",
        &[tree.into(), events.into(), TRIGGER.into(), function.into(), MOVE.into()],
        |_| Ok(()),
    )?;
    let known = &reversion.options.triggers_by;
    let changed = triggers_by(&reversion.options.tree)?.iter().any(|by| !known.contains(by));
    Ok(!lacking.is_empty() || changed && !known.is_empty())
}

pub fn failures(reversion: &Reversion) -> Result<i64> {
    let Some(sequence) = relation::find_relation(&beside(reversion, FAILURES))? else { return Ok(-1) };
    Ok(relation::last_value(sequence)?.unwrap_or(0))
}

// ---- to fill it ------------------------------------------------------------------------------------------

/// Its rows are read by its name, which nobody gives to another table until the transaction ends.
fn hold_name(reversion: &Reversion) -> Result<()> {
    locks::lock_against_dropping(reversion.relation)?;
    reversion.require_name()
}

/// The next rows in the order of time and key. Those whose key is there already are later ones: duplicates.
pub fn batch(reversion: &mut Reversion) -> Result<()> {
    hold_name(reversion)?;
    let (time, key) = (quoted(&reversion.options.time_column), key(reversion));
    let columns = relation::stored_columns(reversion.relation)?;
    let after = match &reversion.options.copied_to {
        None => String::new(),
        Some(row) => {
            let values = row.iter().map(|text| literal(text)).collect::<Vec<_>>().join(", ");
            format!("WHERE ({time}, {key}) > ({values})")
        }
    };
    let order =
        || std::iter::once(&reversion.options.time_column).chain(&reversion.options.key).map(|c| quoted(c));
    let of = |alias: &str| order().map(|c| format!("{alias}.{c}")).collect::<Vec<_>>().join(", ");
    let sql = format!(
        "WITH batch AS MATERIALIZED (SELECT {columns} FROM {name} {after} ORDER BY {time}, {key}
             LIMIT {BATCH}),
              copied AS (INSERT INTO {plain} ({columns}) SELECT {columns} FROM batch ORDER BY {time}, {key}
                         ON CONFLICT DO NOTHING RETURNING {time}, {key}),
              kept_out AS (INSERT INTO {duplicates} ({columns})
                           SELECT {columns} FROM batch AS b
                           WHERE NOT EXISTS (SELECT FROM copied AS c WHERE ({of_c}) = ({of_b})))
         SELECT ARRAY[{texts}] FROM batch ORDER BY {descending} LIMIT 1",
        name = reversion.name(),
        plain = reversion.plain(),
        duplicates = reversion.duplicates(),
        of_c = of("c"),
        of_b = of("b"),
        texts = order().map(|c| format!("{c}::text")).collect::<Vec<_>>().join(", "),
        descending = order().map(|c| format!("{c} DESC")).collect::<Vec<_>>().join(", "),
    );
    let last = reversion.owner.fresh(&sql, &[], |r| value::<Vec<String>>(r, 1))?;
    match last.into_iter().next() {
        Some(row) => reversion.options.copied_to = Some(row),
        None => reversion.options.copied_all = true,
    }
    Ok(())
}

/// Rows of a partition that was attached may have come with it: no trigger saw them. `true`: there were new
/// ones.
pub fn note_new_partitions(reversion: &mut Reversion) -> Result<bool> {
    let tree = tree(reversion)?;
    let new = unknown(reversion, &tree);
    if new.is_empty() {
        reversion.options.tree = tree;
        return Ok(false);
    }
    // The table before its partitions, as for everybody who uses them.
    locks::lock_against_dropping(reversion.relation)?;
    create_triggers(reversion, &new.iter().map(|oid| (*oid).into()).collect::<Vec<_>>())?;
    for oid in &new {
        let (name, key) = (relation::relation_name((*oid).into())?, key(reversion));
        let changes = beside(reversion, CHANGES);
        reversion.owner.run(format!("INSERT INTO {changes} ({key}) SELECT {key} FROM ONLY {name}"))?;
    }
    reversion.options.triggers_by.extend(triggers_by(&new)?);
    reversion.options.tree = tree;
    Ok(true)
}

/// Whether there are any that came since the last step looked.
pub fn has_new_partitions(reversion: &Reversion) -> Result<bool> {
    Ok(!unknown(reversion, &tree(reversion)?).is_empty())
}

fn unknown(reversion: &Reversion, tree: &[u32]) -> Vec<u32> {
    tree.iter().copied().filter(|oid| !reversion.options.tree.contains(oid)).collect()
}

/// Copies what has changed, some at a time. `true`: there was little. Else it is to be committed before the
/// swap is tried: a lock that is not to be had must not undo it.
pub fn catch_up_in_part(reversion: &Reversion) -> Result<bool> {
    hold_name(reversion)?;
    reversion.require_key_index()?;
    let step = Instant::now();
    for round in 0.. {
        let began = Instant::now();
        let changes = catch_up_some(reversion)?;
        let took = began.elapsed();
        if changes < FEW && took < LONG || changes < BATCH && took < SHORT {
            return Ok(round == 0);
        }
        if step.elapsed() > LONG {
            break;
        }
    }
    Ok(false)
}

/// Copies all that has changed, for which everybody waits. `false`: it is too much for that.
pub fn catch_up_last(reversion: &Reversion) -> Result<bool> {
    let limit = LAST + 1;
    let sql = format!("SELECT count(*) FROM (SELECT FROM {} LIMIT {limit}) AS n", beside(reversion, CHANGES));
    let is_much = reversion.owner.fresh(&sql, &[], |r| value::<i64>(r, 1))? == [limit];
    if !is_much {
        catch_up_some(reversion)?;
    }
    Ok(!is_much)
}

/// Copies the rows again whose keys were noted: at most a batch of notes. Returns how many there were.
fn catch_up_some(reversion: &Reversion) -> Result<i64> {
    let (time, key, changes) =
        (quoted(&reversion.options.time_column), key(reversion), beside(reversion, CHANGES));
    let columns = relation::stored_columns(reversion.relation)?;
    let (name, plain, duplicates) = (reversion.name(), reversion.plain(), reversion.duplicates());
    // Key by key: nothing is known of the statistics of a table that is being filled. (Without
    // enable_seqscan: the keys have to be scanned, and beside that cost all plans would look the same.)
    let _owner = reversion.owner.act().with(c"enable_hashjoin", c"off").with(c"enable_mergejoin", c"off");
    // The notes of this batch, by where they are: nobody changes a note, and none is moved while we use the
    // table.
    let notes = spi::fresh(
        &format!(
            "SELECT coalesce(array_agg(ctid::text), '{{}}')
                 FROM (SELECT ctid FROM {changes} LIMIT {BATCH}) AS n"
        ),
        &[],
        |r| value::<Vec<String>>(r, 1),
    )?;
    let notes: Vec<String> = notes.into_iter().flatten().collect();
    let count = notes.len() as i64;
    let batch = "$1::text[]::tid[]";
    let noted = format!("({key}) IN (SELECT {key} FROM {changes} WHERE ctid = ANY ({batch}))");
    for sql in [
        format!("DELETE FROM {plain} WHERE {noted}"),
        format!("DELETE FROM {duplicates} WHERE {noted}"),
        format!(
            "WITH changed AS MATERIALIZED (
                 SELECT {columns}, row_number() OVER (PARTITION BY {key} ORDER BY {time}) AS litellm_spend_n
                 FROM {name} WHERE {noted}),
             kept_out AS (INSERT INTO {duplicates} ({columns}) SELECT {columns} FROM changed
                 WHERE litellm_spend_n > 1)
             INSERT INTO {plain} ({columns}) SELECT {columns} FROM changed WHERE litellm_spend_n = 1"
        ),
        format!("DELETE FROM {changes} WHERE ctid = ANY ({batch})"),
    ] {
        if count > 0 {
            spi::run(&sql, &[notes.clone().into()])?;
        }
    }
    Ok(count)
}

fn key(reversion: &Reversion) -> String {
    reversion.options.key.iter().map(|c| quoted(c)).collect::<Vec<_>>().join(", ")
}

fn tree(reversion: &Reversion) -> Result<Vec<u32>> {
    Ok(relation::relation_tree(reversion.relation)?.into_iter().map(|oid| oid.to_u32()).collect())
}

// ---- to clean up -----------------------------------------------------------------------------------------

/// Each as whom its table belongs to by now. Takes ACCESS EXCLUSIVE on the table and its partitions.
pub fn drop_triggers(reversion: &Reversion) -> Result<()> {
    let mut tables = match Table::find(reversion.relation)? {
        Some(table) => relation::relation_tree(table.oid)?,
        None => vec![],
    };
    // By their function, also those of a partition that was detached meanwhile: that goes, too. Whatever else
    // has such a name is not ours, unless it calls what is in the archive: an older version made it.
    let function = format!("{}()", beside(reversion, FUNCTION));
    let triggers = spi::query(
        "SELECT t.tgrelid, t.tgname::text, c.relowner FROM pg_catalog.pg_trigger t
         JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
         WHERE t.tgparentid = 0 AND (t.tgfoid = pg_catalog.to_regprocedure($1)
             OR t.tgrelid = ANY ($2) AND starts_with(t.tgname, $3) AND t.tgfoid IN (
                 SELECT oid FROM pg_catalog.pg_proc WHERE pronamespace = pg_catalog.to_regnamespace($4)))",
        &[function.into(), tables.clone().into(), TRIGGER.into(), ARCHIVE.into()],
        |r| Ok((value::<pg_sys::Oid>(r, 1)?, value::<String>(r, 2)?, Owner::role(value(r, 3)?))),
    )?;
    if triggers.is_empty() {
        return Ok(());
    }
    for (table, ..) in &triggers {
        if !tables.contains(table) {
            tables.push(*table);
        }
    }
    locks::lock_exclusively(guc::swap_lock_timeout(), tables.iter().copied())?;
    let names = relation::relation_names(&tables)?;
    for (table, trigger, owner) in &triggers {
        if let Some(name) = names.get(table) {
            owner.run(format!("DROP TRIGGER IF EXISTS {} ON {name}", quoted(trigger)))?;
        }
    }
    Ok(())
}

/// Drops what notes the changes. After the triggers: nobody writes to it any more.
pub fn clean_up(reversion: &Reversion) -> Result<()> {
    let [changes, failures, function] = [CHANGES, FAILURES, FUNCTION].map(|suffix| beside(reversion, suffix));
    let made = made(reversion)?;
    for (name, owner) in made.iter().filter(|(name, _)| *name == changes) {
        locks::lock_exclusively(guc::lock_timeout(), relation::find_relation(name)?)?;
        drop_as(*owner, reversion, &format!("TABLE {name}"))?;
    }
    let beside_it = spi::query(
        "SELECT 'SEQUENCE ' || $1, relowner FROM pg_catalog.pg_class
         WHERE oid = pg_catalog.to_regclass($1) AND relkind = 'S'
         UNION ALL SELECT 'FUNCTION ' || $2, proowner FROM pg_catalog.pg_proc
         WHERE oid = pg_catalog.to_regprocedure($2)",
        &[failures.into(), format!("{function}()").into()],
        |r| Ok((value::<String>(r, 1)?, Owner::role(value(r, 2)?))),
    )?;
    for (object, owner) in beside_it {
        // They are known by their names alone: not one that a third role has given to something else.
        if owner == reversion.owner || made.iter().any(|(_, heir)| *heir == owner) {
            drop_as(owner, reversion, &object)?;
        }
    }
    Ok(())
}

/// Drops all that was made. After the triggers.
pub fn drop_made(reversion: &Reversion) -> Result<()> {
    lock(reversion)?;
    let changes = beside(reversion, CHANGES);
    let tables: Vec<_> = made(reversion)?.into_iter().filter(|(name, _)| *name != changes).collect();
    // While the others are there: whose they are tells whose the function may be.
    clean_up(reversion)?;
    tables.iter().try_for_each(|(name, owner)| drop_as(*owner, reversion, &format!("TABLE {name}")))
}

/// The tables that we made, with whom each belongs to by now. What has taken a name of theirs is not among
/// them.
fn made(reversion: &Reversion) -> Result<Vec<(String, Owner)>> {
    let mut made = vec![];
    for (i, name) in names(reversion).into_iter().enumerate() {
        let Some(table) = Table::named(&name)? else { continue };
        let owner = Owner::role(table.owner_oid);
        let is_ours = match reversion.options.made.get(i) {
            Some(oid) => table.oid.to_u32() == *oid,
            // Out of a dump.
            None => owner == reversion.owner,
        };
        if is_ours {
            made.push((name, owner));
        }
    }
    Ok(made)
}

/// Drops something in the archive, which may not be open to an owner who got it meanwhile.
fn drop_as(owner: Owner, reversion: &Reversion, object: &str) -> Result<()> {
    if owner != reversion.owner {
        archive::ensure(owner)?;
    }
    owner.run(format!("DROP {object}"))
}

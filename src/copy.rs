//! The copy of a partitioned table that becomes the plain one, and how it follows what changes meanwhile.
//!
//! ```text
//!   copied, in the order of time and key        | still to copy
//!  ---------------------------------------------+--------------------->
//!        ^ a row that changes here or there     copied_to
//!          is noted by its key, and copied again
//! ```
//! The trigger is there before the first row is read, and whoever wrote before it has ended: so every row is either seen by
//! the copy or noted. It only writes keys, and never fails the user's statement: what it could not write counts a failure
//! in a sequence, and then the copy begins anew. Copying runs code of the table's owner (constraints, generated columns), so
//! it runs as that role.

use crate::archive::{self, ARCHIVE};
use crate::catalog::{self, Table, free_name, value};
use crate::definition::{literal, quoted};
use crate::error::{Error, Result};
use crate::guc;
use crate::locks;
use crate::partition::suffixed;
use crate::place::{owner, storage};
use crate::revert::Reversion;
use crate::session::Elevated;
use pgrx::prelude::*;
use std::time::{Duration, Instant};

/// Rows copied in one transaction.
const BATCH: i64 = 10_000;

/// Changes that may be left for the swap's lock, and how long the last ones may have taken.
const FEW: i64 = BATCH / 20;
const SHORT: Duration = Duration::from_millis(50);

const CHANGES: &str = "litellm_spend.reverted_change";
const FAILURES: &str = "litellm_spend.reverted_failures";
const FUNCTION: &str = "litellm_spend.note_reverted";
const TRIGGERS: [&str; 2] = ["litellm_spend_revert", "litellm_spend_revert_truncate"];

// ---- to make it ------------------------------------------------------------------------------------------

/// The plain table, empty, and the triggers that note what changes.
pub fn prepare(reversion: &mut Reversion) -> Result<()> {
    let name = reversion.name();
    let table = Table::find(reversion.relation)?.ok_or_else(|| Error::NoTable(name.clone()))?;
    let run = |sql: String| catalog::execute(&sql, &[]).map(drop);
    archive::ensure(&table.owner)?;
    if reversion.options.shape.is_some() {
        lock(reversion)?;
        run(format!("DROP TABLE IF EXISTS {}, {}", reversion.plain(), reversion.duplicates()))?;
    }
    let free = |suffix| free_name([&table.schema, ARCHIVE], &suffixed(&table.name, suffix));
    let options = &mut reversion.options;
    (options.plain, options.duplicates) = (free("_plain")?, free("_duplicates")?);
    let (plain, duplicates, key) = (reversion.plain(), reversion.duplicates(), key(reversion));
    let like = "INCLUDING DEFAULTS INCLUDING GENERATED INCLUDING CONSTRAINTS INCLUDING STORAGE INCLUDING COMPRESSION";
    let constraint = quoted(&key_name(&reversion.options.plain));
    let (storage, _) = storage(largest_partition(reversion)?)?;
    run(format!(
        "CREATE TABLE {plain} (LIKE {name} {like}, CONSTRAINT {constraint} PRIMARY KEY ({key})) {storage}"
    ))?;
    run(format!("CREATE TABLE {duplicates} (LIKE {name})"))?;
    for table_of_owner in [&plain, &duplicates] {
        run(format!("ALTER TABLE {table_of_owner} OWNER TO {}", quoted(&table.owner)))?;
    }
    if catalog::find_relation(CHANGES)?.is_none() {
        let keys = reversion.options.key.iter().map(|c| format!("(NULL::{name}).{}", quoted(c)));
        run(format!("CREATE TABLE {CHANGES} AS SELECT {} WHERE false", keys.collect::<Vec<_>>().join(", ")))?;
        run(format!("CREATE SEQUENCE {FAILURES}"))?;
        run(trigger_function(reversion))?;
        run(format!("REVOKE ALL ON FUNCTION {FUNCTION}() FROM PUBLIC"))?;
    }
    // From here on writers wait, until this transaction ends: what they wrote before is visible to the copy.
    locks::lock_against_writers(&name, reversion.relation)?;
    let [changes, truncate] = TRIGGERS;
    run(format!(
        "CREATE OR REPLACE TRIGGER {changes} AFTER INSERT OR UPDATE OR DELETE ON {name} FOR EACH ROW EXECUTE FUNCTION {FUNCTION}()"
    ))?;
    run(format!(
        "CREATE OR REPLACE TRIGGER {truncate} AFTER TRUNCATE ON {name} FOR EACH STATEMENT EXECUTE FUNCTION {FUNCTION}()"
    ))?;
    reversion.options.shape = Some(shape(reversion.relation)?);
    reversion.options.tree = tree(reversion)?;
    restart(reversion)
}

fn restart(reversion: &mut Reversion) -> Result<()> {
    let options = &mut reversion.options;
    (options.copied_to, options.copied_all, options.indexes) = (None, false, None);
    options.failures = failures()?;
    Ok(())
}

/// What the trigger missed may be anywhere.
pub fn begin_anew(reversion: &mut Reversion) -> Result<()> {
    let indexes = reversion.options.indexes.take();
    restart(reversion)?;
    reversion.options.indexes = indexes;
    lock(reversion)?;
    catalog::execute(&format!("TRUNCATE {}, {}", reversion.plain(), reversion.duplicates()), &[]).map(drop)
}

/// Locks what is ours, which nobody uses but an autovacuum: that gives way.
pub fn lock(reversion: &Reversion) -> Result<()> {
    let mut locks = vec![];
    for table in [reversion.plain(), reversion.duplicates()] {
        locks.extend(catalog::find_relation(&table)?.map(|oid| (oid, pg_sys::AccessExclusiveLock)));
    }
    locks::lock_all(guc::lock_timeout(), &locks)
}

/// The plain table's primary key, until it has the name.
pub fn key_name(plain: &str) -> String {
    suffixed(plain, "_pkey")
}

fn largest_partition(reversion: &Reversion) -> Result<pg_sys::Oid> {
    let largest = catalog::query(
        "SELECT oid FROM pg_catalog.pg_class WHERE oid = ANY ($1) AND relkind = 'r'
         ORDER BY pg_catalog.pg_relation_size(oid) DESC LIMIT 1",
        &[catalog::relation_tree(reversion.relation)?.into()],
        |r| value(r, 1),
    )?;
    Ok(largest.first().copied().unwrap_or(reversion.relation))
}

/// A relation's columns: the copy must have the same.
pub fn shape(relation: pg_sys::Oid) -> Result<String> {
    let shapes = catalog::query(
        "SELECT string_agg(format('%I %s%s%s', attname, format_type(atttypid, atttypmod), attgenerated, attnotnull), ', '
                           ORDER BY attnum)
         FROM pg_catalog.pg_attribute WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped",
        &[relation.into()],
        |r| value(r, 1),
    )?;
    Ok(shapes.into_iter().next().unwrap_or_default())
}

fn trigger_function(reversion: &Reversion) -> String {
    let values = |row: &str| {
        let columns = reversion.options.key.iter().map(|c| format!("{row}.{}", quoted(c)));
        columns.collect::<Vec<_>>().join(", ")
    };
    // SECURITY DEFINER: the writer owns nothing of ours; hence the pinned search_path.
    format!(
        "CREATE FUNCTION {FUNCTION}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $note$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM nextval('{FAILURES}');
        RETURN NULL;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        INSERT INTO {CHANGES} VALUES ({});
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO {CHANGES} VALUES ({});
    END IF;
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    BEGIN
        PERFORM nextval('{FAILURES}');
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;
    RETURN NULL;
END
$note$",
        values("OLD"),
        values("NEW")
    )
}

pub fn failures() -> Result<i64> {
    let Some(sequence) = catalog::find_relation(FAILURES)? else { return Ok(-1) };
    Ok(catalog::last_value(sequence)?.unwrap_or(0))
}

// ---- to fill it ------------------------------------------------------------------------------------------

/// The next rows in the order of time and key. Those whose key is there already are later ones: duplicates.
pub fn batch(reversion: &mut Reversion) -> Result<()> {
    locks::lock_against_dropping(reversion.relation)?;
    let (time, key) = (quoted(&reversion.options.time_column), key(reversion));
    let columns = catalog::stored_columns(reversion.relation)?;
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
        "WITH batch AS MATERIALIZED (SELECT {columns} FROM {name} {after} ORDER BY {time}, {key} LIMIT {BATCH}),
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
    let last = {
        let _owner = as_owner(reversion)?;
        catalog::fresh(&sql, &[], |r| value::<Vec<String>>(r, 1))?
    };
    match last.into_iter().next() {
        Some(row) => reversion.options.copied_to = Some(row),
        None => reversion.options.copied_all = true,
    }
    Ok(())
}

/// Rows of a partition that was attached may have come with it: no trigger saw them. `true`: there were new ones.
pub fn note_new_partitions(reversion: &mut Reversion) -> Result<bool> {
    let tree = tree(reversion)?;
    let new: Vec<u32> = tree.iter().copied().filter(|oid| !reversion.options.tree.contains(oid)).collect();
    for oid in &new {
        let (name, key) = (catalog::relation_name((*oid).into())?, key(reversion));
        catalog::execute(&format!("INSERT INTO {CHANGES} ({key}) SELECT {key} FROM ONLY {name}"), &[])?;
    }
    reversion.options.tree = tree;
    Ok(!new.is_empty())
}

/// Copies what has changed, some at a time. `true`: there was little. Else it is to be committed before the swap is tried: a
/// lock that is not to be had must not undo it.
pub fn catch_up_in_part(reversion: &Reversion) -> Result<bool> {
    for round in 0..20 {
        let began = Instant::now();
        if catch_up_some(reversion)? < FEW || began.elapsed() < SHORT {
            return Ok(round == 0);
        }
    }
    Ok(false)
}

/// Copies all that has changed.
pub fn catch_up(reversion: &Reversion) -> Result<()> {
    while catch_up_some(reversion)? > 0 {}
    Ok(())
}

/// Copies the rows again whose keys were noted: at most a batch of keys. Returns how many there were.
fn catch_up_some(reversion: &Reversion) -> Result<i64> {
    let (time, key) = (quoted(&reversion.options.time_column), key(reversion));
    let columns = catalog::stored_columns(reversion.relation)?;
    let keys = catalog::execute(
        &format!(
            "CREATE TEMPORARY TABLE reverted_keys ON COMMIT DROP AS
             WITH noted AS (DELETE FROM {CHANGES} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {CHANGES} LIMIT {BATCH}))
                            RETURNING {key})
             SELECT DISTINCT {key} FROM noted"
        ),
        &[],
    )?;
    let table = Table::find(reversion.relation)?.ok_or_else(|| Error::NoTable(reversion.name()))?;
    catalog::execute(&format!("GRANT SELECT ON pg_temp.reverted_keys TO {}", quoted(&table.owner)), &[])?;
    catalog::execute("ANALYZE pg_temp.reverted_keys", &[])?;
    let noted = format!("({key}) IN (SELECT {key} FROM pg_temp.reverted_keys)");
    {
        let _owner = as_owner(reversion)?;
        // Key by key: nothing is known of the statistics of a table that is being filled.
        // (Without enable_seqscan: the keys have to be scanned, and beside that cost all plans would look the same.)
        for way in ["enable_hashjoin", "enable_mergejoin"] {
            catalog::execute("SELECT pg_catalog.set_config($1, 'off', true)", &[way.into()])?;
        }
        for table in [reversion.plain(), reversion.duplicates()] {
            catalog::execute(&format!("DELETE FROM {table} WHERE {noted}"), &[])?;
        }
        catalog::execute(
            &format!(
                "WITH changed AS MATERIALIZED (
                     SELECT {columns}, row_number() OVER (PARTITION BY {key} ORDER BY {time}) AS litellm_spend_n
                     FROM {name} WHERE {noted}),
                 kept_out AS (INSERT INTO {duplicates} ({columns}) SELECT {columns} FROM changed WHERE litellm_spend_n > 1)
                 INSERT INTO {plain} ({columns}) SELECT {columns} FROM changed WHERE litellm_spend_n = 1",
                name = reversion.name(),
                plain = reversion.plain(),
                duplicates = reversion.duplicates(),
            ),
            &[],
        )?;
    }
    catalog::execute("DROP TABLE pg_temp.reverted_keys", &[])?;
    Ok(keys)
}

fn as_owner(reversion: &Reversion) -> Result<Elevated> {
    let guard = Elevated::restricted(owner(reversion.relation)?);
    // An error is better than rows that are not seen.
    catalog::execute("SELECT pg_catalog.set_config('row_security', 'off', true)", &[])?;
    Ok(guard)
}

fn key(reversion: &Reversion) -> String {
    reversion.options.key.iter().map(|c| quoted(c)).collect::<Vec<_>>().join(", ")
}

fn tree(reversion: &Reversion) -> Result<Vec<u32>> {
    Ok(catalog::relation_tree(reversion.relation)?.into_iter().map(|oid| oid.to_u32()).collect())
}

// ---- to clean up -----------------------------------------------------------------------------------------

/// Needs ACCESS EXCLUSIVE on the table.
pub fn drop_triggers(reversion: &Reversion) -> Result<()> {
    for trigger in TRIGGERS {
        catalog::execute(&format!("DROP TRIGGER IF EXISTS {trigger} ON {}", reversion.name()), &[])?;
    }
    Ok(())
}

/// Drops what notes the changes. After the triggers: nobody writes to it any more.
pub fn clean_up() -> Result<()> {
    let changes = catalog::find_relation(CHANGES)?.map(|oid| (oid, pg_sys::AccessExclusiveLock));
    locks::lock_all(guc::lock_timeout(), changes.as_slice())?;
    for sql in [
        format!("DROP TABLE IF EXISTS {CHANGES}"),
        format!("DROP SEQUENCE IF EXISTS {FAILURES}"),
        format!("DROP FUNCTION IF EXISTS {FUNCTION}()"),
    ] {
        catalog::execute(&sql, &[])?;
    }
    Ok(())
}

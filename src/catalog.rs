//! The only place that reads and writes state through SPI.
//!
//! pgrx runs `select` on the transaction's first snapshot until the transaction has an XID, and `update` on a
//! fresh one. So state that must be current is read with [`fresh`], and a look that finds nothing to do, which
//! must not write WAL, reads with [`query`]. What others may change while a call waits, above all which relations there are and
//! what inherits from what, is read with [`current`], which takes neither.

use crate::definition::{SCHEMA, qualified};
use crate::error::{Error, Result};
use crate::litellm::CHANGE_LOG;
use crate::partition::suffixed;
use crate::restore::HERE;
use crate::session::{Failure, Owner};
use crate::window::{Holder, Window};
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use pgrx::spi::{SpiHeapTupleData, SpiTupleTable};
use std::collections::{BTreeSet, HashMap};

pub type Args<'a> = &'a [DatumWithOid<'a>];

/// Refuses a text that is more than one statement, whatever quotes it was meant to keep.
fn require_one_statement(sql: &str) -> Result<()> {
    // Nothing else separates statements, and hardly any text of ours has one.
    if !sql.contains(';') {
        return Ok(());
    }
    let text = std::ffi::CString::new(sql).map_err(|_| Error::SeveralStatements)?;
    // SAFETY: the parser reads the text, and returns a list or null.
    let statements = unsafe {
        let list = pg_sys::raw_parser(text.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT);
        list.as_ref().map_or(0, |list| list.length)
    };
    if statements == 1 { Ok(()) } else { Err(Error::SeveralStatements) }
}

/// Runs a query on the transaction's snapshot.
pub fn query<T>(sql: &str, args: Args, row: impl Fn(&SpiHeapTupleData) -> Result<T>) -> Result<Vec<T>> {
    require_one_statement(sql)?;
    Spi::connect(|client| rows(client.select(sql, None, args)?, row))
}

/// Runs a query on a snapshot of now, however long the statement has been running. Takes no XID.
pub fn current<T>(sql: &str, args: Args, row: impl Fn(&SpiHeapTupleData) -> Result<T>) -> Result<Vec<T>> {
    // SAFETY: an error of the server's ends the subtransaction, and the snapshot with it.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot()) };
    let found = query(sql, args, row);
    unsafe { pg_sys::PopActiveSnapshot() };
    found
}

/// Runs a query on a fresh snapshot. Takes an XID.
pub fn fresh<T>(sql: &str, args: Args, row: impl Fn(&SpiHeapTupleData) -> Result<T>) -> Result<Vec<T>> {
    require_one_statement(sql)?;
    Spi::connect_mut(|client| rows(client.update(sql, None, args)?, row))
}

fn rows<T>(table: SpiTupleTable, row: impl Fn(&SpiHeapTupleData) -> Result<T>) -> Result<Vec<T>> {
    table.into_iter().map(|tuple| row(&tuple)).collect()
}

/// Opens a query that is read in batches, each in a call of its own. Returns the cursor, which is closed by the batch after the
/// last, or at the end of the transaction.
pub fn open_cursor(sql: &str, args: Args) -> Result<String> {
    require_one_statement(sql)?;
    Spi::connect(|client| Ok(client.try_open_cursor(sql, args)?.detach_into_name()))
}

/// The next rows of a cursor, which is read as whom it was opened.
pub fn fetch<T>(cursor: &str, most: i64, row: impl Fn(&SpiHeapTupleData) -> Result<T>) -> Result<Vec<T>> {
    Spi::connect(|client| {
        let mut cursor = client.find_cursor(cursor)?;
        let batch = rows(cursor.fetch(most)?, row)?;
        if !batch.is_empty() {
            cursor.detach_into_name();
        }
        Ok(batch)
    })
}

/// Runs a statement; returns the number of rows it processed.
pub fn execute(sql: &str, args: Args) -> Result<i64> {
    require_one_statement(sql)?;
    Spi::connect_mut(|client| Ok(client.update(sql, None, args)?.len() as i64))
}

/// The value of column `i`, which the query guarantees not to be NULL.
pub fn value<T: FromDatum + IntoDatum>(row: &SpiHeapTupleData, i: usize) -> Result<T> {
    Ok(row.get(i)?.ok_or(pgrx::spi::Error::InvalidPosition)?)
}

pub fn exists(sql: &str, args: Args) -> Result<bool> {
    Ok(fresh(&format!("SELECT EXISTS ({sql})"), args, |r| value(r, 1))?.first().copied().unwrap_or(false))
}

// ---- sources ---------------------------------------------------------------------------------------------

pub struct Source {
    pub name: String,
    pub relation: pg_sys::Oid,
    pub sequence: pg_sys::Oid,
    pub window: Window,
    pub trimmed_to: i64,
    /// The lowest watermark of its rollups, but for those that are filled by hand.
    pub merged_to: i64,
    /// Their names.
    pub rollups: Vec<String>,
}

/// The sources that have rollups for us to merge.
pub fn sources() -> Result<Vec<Source>> {
    sources_where("r.definition IS NOT NULL", &[])
}

/// The source of one rollup, merged as far as that is.
pub fn source_of(rollup: &str) -> Result<Option<Source>> {
    Ok(sources_where("r.name = $1", &[rollup.into()])?.pop())
}

/// The source of that name.
pub fn source(name: &str) -> Result<Option<Source>> {
    Ok(sources_where("s.name = $1", &[name.into()])?.pop())
}

/// The sources that a table is, one for each sequence of which we are to merge rollups.
pub fn sources_on(relation: pg_sys::Oid) -> Result<Vec<Source>> {
    sources_where("r.definition IS NOT NULL AND s.relation = $1", &[relation.into()])
}

/// A rollup over the table that its owner fills.
pub fn filled_by_hand(relation: pg_sys::Oid) -> Result<Option<String>> {
    let sql = format!(
        "SELECT r.name FROM {SCHEMA}.rollup r JOIN {SCHEMA}.source s ON s.name = r.source
         WHERE r.definition IS NULL AND s.relation = $1 AND s.origin = {HERE} ORDER BY r.name LIMIT 1"
    );
    Ok(query(&sql, &[relation.into()], |r| value(r, 1))?.pop())
}

/// The relation of a source as it is now: another session may have put a partitioned table in its place. `None`: it was dropped, or
/// another sequence numbers it now.
pub fn relation_of(source: &Source) -> Result<Option<pg_sys::Oid>> {
    let sql = format!(
        "SELECT s.relation::oid FROM {SCHEMA}.source s JOIN pg_catalog.pg_class c ON c.oid = s.relation
         WHERE s.name = $1 AND s.sequence = $2"
    );
    Ok(current(&sql, &[source.name.as_str().into(), source.sequence.into()], |r| value(r, 1))?.pop())
}

fn sources_where(condition: &str, args: Args) -> Result<Vec<Source>> {
    query(
        &format!(
            "SELECT s.name, s.relation::oid, s.sequence::oid, s.candidates::text, s.trimmed_to, min(r.watermark),
                    array_agg(r.name ORDER BY r.name)
             FROM {SCHEMA}.source s JOIN {SCHEMA}.rollup r ON r.source = s.name
             WHERE {condition} AND s.origin = {HERE} GROUP BY s.name ORDER BY s.name"
        ),
        args,
        |r| {
            Ok(Source {
                name: value(r, 1)?,
                relation: value(r, 2)?,
                sequence: value(r, 3)?,
                window: serde_json::from_str(&value::<String>(r, 4)?)?,
                trimmed_to: value(r, 5)?,
                merged_to: value(r, 6)?,
                rollups: value(r, 7)?,
            })
        },
    )
}

/// Remembers a source's candidates, unless another session holds the row: they are only a head start.
pub fn store_window(source: &str, window: &Window) -> Result<()> {
    store_candidates("source", "name", source, window)
}

/// Remembers the candidates of the capture's failures.
pub fn store_failure_window(source: &str, window: &Window) -> Result<()> {
    store_candidates("capture", "source", source, window)
}

fn store_candidates(table: &str, key: &str, name: &str, window: &Window) -> Result<()> {
    let candidates = serde_json::to_string(window)?;
    execute(
        &format!(
            "UPDATE {SCHEMA}.{table} SET candidates = $2::jsonb
             WHERE {key} = (SELECT {key} FROM {SCHEMA}.{table} WHERE {key} = $1 FOR UPDATE SKIP LOCKED)"
        ),
        &[name.into(), candidates.into()],
    )?;
    Ok(())
}

/// The last value that `sequence` has given out, `None` if none since it was made or restarted. Not read by name, which
/// its owner could give to something else.
pub fn last_value(sequence: pg_sys::Oid) -> Result<Option<i64>> {
    let sql =
        "SELECT pg_catalog.pg_sequence_last_value(seqrelid) FROM pg_catalog.pg_sequence WHERE seqrelid = $1";
    let values = query(sql, &[sequence.into()], |r| Ok(r.get(1)?))?;
    values.into_iter().next().ok_or_else(|| Error::NoTable(format!("sequence {}", sequence.to_u32())))
}

/// Refuses a sequence whose values do not rise in the order in which they are drawn.
pub fn check_sequence(sequence: pg_sys::Oid) -> Result<()> {
    let shape = current(
        "SELECT seqincrement, seqcache, seqcycle, seqrelid::regclass::text FROM pg_catalog.pg_sequence WHERE seqrelid = $1",
        &[sequence.into()],
        |r| Ok((value::<i64>(r, 1)?, value::<i64>(r, 2)?, value::<bool>(r, 3)?, value::<String>(r, 4)?)),
    )?;
    let Some((increment, cache, cycle, sequence)) = shape.into_iter().next() else {
        return Err(Error::NoTable(format!("sequence {}", sequence.to_u32())));
    };
    let reason = if increment <= 0 {
        format!("Its increment is {increment}: a later row would have a lower number.")
    } else if cache != 1 {
        format!("Its cache is {cache}: a session could use a low number long after others used higher ones.")
    } else if cycle {
        "It cycles: a number could come twice.".into()
    } else {
        return Ok(());
    };
    Err(Error::SequenceShape { sequence, reason })
}

/// `WITH RECURSIVE`: `tree`, relation $1 and what inherits from it.
macro_rules! tree {
    () => {
        "WITH RECURSIVE tree(oid) AS (
             SELECT $1 UNION SELECT inhrelid FROM pg_catalog.pg_inherits JOIN tree ON inhparent = tree.oid)"
    };
}

/// The relation and all that inherit from it: partitions and their partitions.
pub fn relation_tree(relation: pg_sys::Oid) -> Result<Vec<pg_sys::Oid>> {
    current(concat!(tree!(), " SELECT oid FROM tree"), &[relation.into()], |r| value(r, 1))
}

/// A relation that another is a partition of, or inherits from.
pub fn parent(relation: pg_sys::Oid) -> Result<Option<pg_sys::Oid>> {
    let sql = "SELECT inhparent FROM pg_catalog.pg_inherits WHERE inhrelid = $1 ORDER BY inhseqno LIMIT 1";
    Ok(current(sql, &[relation.into()], |r| value(r, 1))?.pop())
}

/// The columns by which a table and its partitions are partitioned, in order of their names. Empty if one of them is partitioned
/// by an expression.
pub fn partition_keys(relation: pg_sys::Oid) -> Result<Vec<String>> {
    let keys = query(
        "SELECT DISTINCT a.attname::text COLLATE \"C\" FROM pg_catalog.pg_partitioned_table p
         CROSS JOIN unnest(p.partattrs::int2[]) AS key(attnum)
         LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = p.partrelid AND a.attnum = key.attnum AND a.attnum > 0
         WHERE p.partrelid = ANY ($1) ORDER BY 1",
        &[relation_tree(relation)?.into()],
        |r| Ok(r.get::<String>(1)?),
    )?;
    Ok(keys.into_iter().collect::<Option<_>>().unwrap_or_default())
}

/// A foreign table among those that inherit from a relation.
pub fn foreign_partition(relation: pg_sys::Oid) -> Result<Option<pg_sys::Oid>> {
    let sql =
        "SELECT oid FROM pg_catalog.pg_class WHERE oid = ANY ($1) AND relkind = 'f' ORDER BY oid LIMIT 1";
    Ok(query(sql, &[relation_tree(relation)?.into()], |r| value(r, 1))?.pop())
}

/// [`tree!`], and `family`, these and what any of them inherits from; `draws`, the columns that sequence $2 numbers, as their identity
/// or in their default.
pub const FAMILY: &str = concat!(
    tree!(),
    ",
    family(oid) AS (
        SELECT oid FROM tree UNION SELECT inhparent FROM pg_catalog.pg_inherits JOIN family ON inhrelid = family.oid),
    draws(relation, attnum) AS (
        SELECT refobjid, refobjsubid FROM pg_catalog.pg_depend
        WHERE classid = 'pg_catalog.pg_class'::regclass AND objid = $2 AND refclassid = classid AND deptype = 'i'
        UNION SELECT d.adrelid, d.adnum FROM pg_catalog.pg_depend p JOIN pg_catalog.pg_attrdef d ON d.oid = p.objid
        WHERE p.classid = 'pg_catalog.pg_attrdef'::regclass AND p.refclassid = 'pg_catalog.pg_class'::regclass
          AND p.refobjid = $2)"
);

/// The relations of which an inserter locks one before it draws a number for a row of `relation`: those from which rows get
/// there, and those that the sequence numbers. The latter, of the same owner, because a row that was numbered in one may still be
/// on its way when that becomes an ancestor: INSERT opens a partitioned partition only when the first row comes to it.
pub fn inserted_into(relation: pg_sys::Oid, sequence: pg_sys::Oid) -> Result<Vec<pg_sys::Oid>> {
    current(
        &format!(
            "{FAMILY}
             SELECT oid FROM family
             UNION SELECT d.relation FROM draws d JOIN pg_catalog.pg_class c ON c.oid = d.relation
             JOIN pg_catalog.pg_class s ON s.oid = $1 AND s.relowner = c.relowner"
        ),
        &[relation.into(), sequence.into()],
        |r| value(r, 1),
    )
}

/// The other transactions that hold RowExclusiveLock, as every writer does, on one of `relations`.
pub fn writers(relations: Vec<pg_sys::Oid>) -> Result<BTreeSet<Holder>> {
    let holders = query(
        "SELECT DISTINCT virtualtransaction FROM pg_catalog.pg_locks
         WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
           AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
           AND relation = ANY ($1) AND pid IS DISTINCT FROM pg_catalog.pg_backend_pid()",
        &[relations.into()],
        |r| Ok(Holder(value(r, 1)?)),
    )?;
    Ok(holders.into_iter().collect())
}

pub fn relation_name(relation: pg_sys::Oid) -> Result<String> {
    let names = current(
        "SELECT nspname::text, relname::text FROM pg_catalog.pg_class c
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1",
        &[relation.into()],
        |r| Ok(qualified(&value::<String>(r, 1)?, &value::<String>(r, 2)?)),
    )?;
    names.into_iter().next().ok_or_else(|| Error::NoTable(relation.to_u32().to_string()))
}

/// The names of relations, those that there are: one query for a table of hundreds of partitions.
pub fn relation_names(relations: &[pg_sys::Oid]) -> Result<HashMap<pg_sys::Oid, String>> {
    let names = fresh(
        "SELECT c.oid, nspname::text, relname::text FROM pg_catalog.pg_class c
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY ($1)",
        &[relations.to_vec().into()],
        |r| Ok((value(r, 1)?, qualified(&value::<String>(r, 2)?, &value::<String>(r, 3)?))),
    )?;
    Ok(names.into_iter().collect())
}

// ---- rollups ---------------------------------------------------------------------------------------------

/// Names of the rollups that we fill, of one source or of all.
pub fn rollup_names(source: Option<&str>) -> Result<Vec<String>> {
    query(
        &format!(
            "SELECT name FROM {SCHEMA}.rollup
             WHERE ($1 IS NULL OR source = $1) AND source IS NOT NULL AND definition IS NOT NULL ORDER BY name"
        ),
        &[source.map(str::to_string).into()],
        |r| value(r, 1),
    )
}

/// Rollups that belong to `role`, or to one that it may act for; the first `most`.
pub fn rollups_of(role: pg_sys::Oid, most: usize) -> Result<Vec<String>> {
    query(
        &format!(
            "SELECT r.name FROM {SCHEMA}.rollup r LEFT JOIN {SCHEMA}.source s ON s.name = r.source
             LEFT JOIN {SCHEMA}.capture c ON c.source = r.source
             LEFT JOIN pg_catalog.pg_class t ON t.oid = coalesce(c.relation, s.relation)
             WHERE pg_catalog.pg_has_role($1, coalesce(r.owner, t.relowner), 'USAGE')
             ORDER BY r.name LIMIT $2"
        ),
        &[role.into(), (most as i64).into()],
        |r| value(r, 1),
    )
}

pub fn any_rollup() -> Result<bool> {
    Ok(!query(&format!("SELECT FROM {SCHEMA}.rollup LIMIT 1"), &[], |_| Ok(()))?.is_empty())
}

pub fn rollup_exists(name: &str) -> Result<bool> {
    let sql = format!("SELECT FROM {SCHEMA}.rollup WHERE name = $1");
    Ok(!query(&sql, &[name.into()], |_| Ok(()))?.is_empty())
}

/// Whether rollups of the source wait for backfill.
pub fn is_uncovered(source: &str) -> Result<bool> {
    let sql = format!(
        "SELECT FROM {SCHEMA}.rollup r JOIN {SCHEMA}.source s ON s.name = r.source AND s.origin = {HERE}
         WHERE r.source = $1 AND r.covered_from > '-infinity' LIMIT 1"
    );
    Ok(!query(&sql, &[source.into()], |_| Ok(()))?.is_empty())
}

/// How far the backfill of the built-in rollups is: the day, and how many are left. `None`: all is covered.
pub fn backfill_progress() -> Result<Option<String>> {
    let sql = format!(
        "SELECT CASE WHEN isfinite(covered_from)
                    THEN covered_from::date || coalesce(': ' || days_covered || ' of ' || days || ' days', '') END,
                extract(epoch FROM time_left)::float8
         FROM {SCHEMA}.backfill JOIN {SCHEMA}.rollup USING (name, covered_from)
         WHERE source = $1 AND covered_from > '-infinity' ORDER BY covered_from DESC LIMIT 1"
    );
    let found = query(&sql, &[CHANGE_LOG.into()], |r| Ok((r.get::<String>(1)?, r.get::<f64>(2)?)))?.pop();
    Ok(found.map(|(days, left)| {
        let days = days.unwrap_or_else(|| "no day is covered yet".into());
        match left {
            Some(seconds) if seconds >= 0.5 => format!("{days}, about {} left", roughly(seconds)),
            _ => days,
        }
    }))
}

fn roughly(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.0} h", s / 3600.0),
    }
}

/// Drops what is ours, unless something of anybody else's needs it: that is named.
pub fn unless_needed<T>(drop: impl FnOnce() -> Result<T>) -> Result<T> {
    PgTryBuilder::new(std::panic::AssertUnwindSafe(drop))
        .catch_when(PgSqlErrorCode::ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST, |caught| {
            Err(Error::Needed(Failure::from(caught)))
        })
        .execute()
}

/// Notes the failure of a rollup, or with `None` that it is over.
pub fn record_error(rollup: &str, message: Option<&str>) -> Result<()> {
    record("rollup", "name = $1", rollup, message)
}

/// Notes a failure around the captured table, or that it is over.
pub fn record_capture_error(message: Option<&str>) -> Result<()> {
    record("capture", "$1 IS NOT NULL", "", message)
}

/// What is noted of the captured table.
pub fn capture_error() -> Result<Option<String>> {
    let sql = format!("SELECT last_error FROM {SCHEMA}.capture");
    Ok(query(&sql, &[], |r| Ok(r.get::<String>(1)?))?.pop().flatten())
}

/// Keeps the time of the first occurrence: a failure that repeats at each tick is written once.
fn record(table: &str, condition: &str, name: &str, message: Option<&str>) -> Result<()> {
    execute(
        &format!(
            "UPDATE {SCHEMA}.{table} SET last_error = $2, last_error_at = CASE WHEN $2 IS NOT NULL THEN clock_timestamp() END
             WHERE {condition} AND last_error IS DISTINCT FROM $2"
        ),
        &[name.into(), message.map(str::to_string).into()],
    )?;
    Ok(())
}

// ---- the captured table ----------------------------------------------------------------------------------

pub struct CaptureState {
    pub source: String,
    pub schema: String,
    pub table: String,
    pub relation: pg_sys::Oid,
    /// Who owned the table when we attached; `None` in a database that an older version attached.
    pub owner: Option<pg_sys::Oid>,
    pub columns: Vec<String>,
    pub subtract: bool,
    pub predecessor: Option<pg_sys::Oid>,
    pub failures_seen: i64,
    pub window: Window,
}

impl CaptureState {
    /// As whom the raw rows are read: the owner that we know of. When it has changed, the watch or an attach comes first.
    pub fn owner(&self) -> Result<Owner> {
        let owner = Owner::of(self.relation)?;
        match self.owner.map(Owner::role).filter(|known| *known != owner) {
            None => Ok(owner),
            Some(known) => Err(Error::OtherOwner {
                relation: relation_name(self.relation)?,
                owner: owner.name()?,
                expected: known.name()?,
            }),
        }
    }

    /// The tables that hold raw rows: the captured one and, after a replacement, the one before it.
    pub fn relations(&self) -> Vec<pg_sys::Oid> {
        [Some(self.relation), self.predecessor].into_iter().flatten().collect()
    }
}

/// The captured table as it is now.
pub fn captured_relation() -> Result<Option<pg_sys::Oid>> {
    Ok(current(&format!("SELECT relation::oid FROM {SCHEMA}.capture"), &[], |r| value(r, 1))?.pop())
}

pub fn capture() -> Result<Option<CaptureState>> {
    let states = query(
        &format!(
            "SELECT source, table_schema::text, table_name::text, relation::oid, columns, on_delete = 'subtract',
                    predecessor::oid, failures_seen, candidates::text, owner::oid
             FROM {SCHEMA}.capture WHERE origin = {HERE}"
        ),
        &[],
        |r| {
            Ok(CaptureState {
                source: value(r, 1)?,
                schema: value(r, 2)?,
                table: value(r, 3)?,
                relation: value(r, 4)?,
                columns: value(r, 5)?,
                subtract: value(r, 6)?,
                predecessor: r.get(7)?,
                failures_seen: value(r, 8)?,
                window: serde_json::from_str(&value::<String>(r, 9)?)?,
                owner: r.get(10)?,
            })
        },
    )?;
    Ok(states.into_iter().next())
}

// ---- tables ----------------------------------------------------------------------------------------------

/// A relation as the system catalogs describe it.
pub struct Table {
    pub oid: pg_sys::Oid,
    pub schema: String,
    pub name: String,
    pub kind: String,
    pub persistence: String,
    pub owner: String,
    pub owner_oid: pg_sys::Oid,
    /// Storage options, `name=value, …`.
    pub options: String,
    /// Name and type, as the server writes it on the pinned path: what is not qualified is a type of its own.
    pub columns: Vec<(String, String)>,
}

impl Table {
    pub fn find(oid: pg_sys::Oid) -> Result<Option<Table>> {
        let tables = current(
            "SELECT n.nspname::text, c.relname::text, c.relkind::text, c.relpersistence::text,
                    pg_catalog.pg_get_userbyid(c.relowner)::text,
                    coalesce(pg_catalog.array_to_string(c.reloptions, ', '), ''), c.relowner
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1",
            &[oid.into()],
            |r| {
                Ok(Table {
                    oid,
                    schema: value(r, 1)?,
                    name: value(r, 2)?,
                    kind: value(r, 3)?,
                    persistence: value(r, 4)?,
                    owner: value(r, 5)?,
                    options: value(r, 6)?,
                    owner_oid: value(r, 7)?,
                    columns: vec![],
                })
            },
        )?;
        let Some(mut table) = tables.into_iter().next() else { return Ok(None) };
        table.columns = current(
            "SELECT attname::text, pg_catalog.format_type(atttypid, NULL) FROM pg_catalog.pg_attribute
             WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            &[oid.into()],
            |r| Ok((value(r, 1)?, value(r, 2)?)),
        )?;
        Ok(Some(table))
    }

    /// Finds a table by a qualified, quoted name.
    pub fn named(name: &str) -> Result<Option<Table>> {
        find_relation(name)?.map(Table::find).transpose().map(Option::flatten)
    }

    pub fn qualified(&self) -> String {
        qualified(&self.schema, &self.name)
    }
}

/// The columns that can be inserted into, as a list: not the generated ones.
pub fn stored_columns(relation: pg_sys::Oid) -> Result<String> {
    let columns = query(
        "SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_catalog.pg_attribute
         WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped AND attgenerated = ''",
        &[relation.into()],
        |r| value(r, 1),
    )?;
    Ok(columns.into_iter().next().unwrap_or_default())
}

/// Finds a relation by a qualified, quoted name.
pub fn find_relation(name: &str) -> Result<Option<pg_sys::Oid>> {
    Ok(query("SELECT pg_catalog.to_regclass($1)::oid", &[name.into()], |r| Ok(r.get(1)?))?.pop().flatten())
}

/// A name that nothing has in either schema: `name`, or `name_2`, …
pub fn free_name(schemas: [&str; 2], name: &str) -> Result<String> {
    for number in 1..1000 {
        let candidate = if number == 1 { name.to_string() } else { suffixed(name, &format!("_{number}")) };
        let [one, other] = schemas.map(|schema| find_relation(&qualified(schema, &candidate)));
        if one?.or(other?).is_none() {
            return Ok(candidate);
        }
    }
    Err(Error::Exists(name.into()))
}

/// Whether one of the relations, by qualified and quoted names, does not exist.
pub fn any_missing(names: Vec<String>) -> Result<bool> {
    let sql = "SELECT FROM unnest($1::text[]) AS name WHERE pg_catalog.to_regclass(name) IS NULL LIMIT 1";
    Ok(!query(sql, &[names.into()], |_| Ok(()))?.is_empty())
}

pub fn role_name(role: pg_sys::Oid) -> Result<String> {
    let sql = "SELECT rolname::text FROM pg_catalog.pg_roles WHERE oid = $1";
    let names = query(sql, &[role.into()], |r| value(r, 1))?;
    names.into_iter().next().ok_or(Error::NoRole(role.to_u32()))
}

/// Whose the schema is, if the role may not use it.
pub fn owner_of_closed_schema(role: pg_sys::Oid, schema: &str) -> Result<Option<pg_sys::Oid>> {
    let sql = "SELECT nspowner FROM pg_catalog.pg_namespace
               WHERE nspname = $2::name AND NOT pg_catalog.has_schema_privilege($1, oid, 'USAGE')";
    Ok(query(sql, &[role.into(), schema.into()], |r| value(r, 1))?.pop())
}

/// Whether values of the type can be sorted: then they can be a key.
pub fn type_name(r#type: pg_sys::Oid) -> Result<String> {
    let names =
        query("SELECT pg_catalog.format_type($1, NULL)", &[r#type.into()], |r| value::<String>(r, 1))?;
    Ok(names.into_iter().next().unwrap_or_default())
}

pub fn is_sortable(r#type: pg_sys::Oid) -> bool {
    // SAFETY: reads the catalog and the type cache. TypeCacheEntry outlives this call.
    unsafe {
        let is_pseudo = pg_sys::get_typtype(r#type) as u8 == pg_sys::TYPTYPE_PSEUDO;
        let flag = pg_sys::TYPECACHE_LT_OPR as i32;
        !is_pseudo && (*pg_sys::lookup_type_cache(r#type, flag)).lt_opr != pg_sys::InvalidOid
    }
}

/// Whether the column is declared NOT NULL.
pub fn is_not_null(relation: pg_sys::Oid, column: &str) -> Result<bool> {
    let sql = "SELECT FROM pg_catalog.pg_attribute
               WHERE attrelid = $1 AND attnum > 0 AND attnotnull AND attname = $2::name";
    Ok(!query(sql, &[relation.into(), column.into()], |_| Ok(()))?.is_empty())
}

/// What of `objects`, a query for their classid, objid and owner, uses a type, function or operator of neither its owner nor a
/// superuser: to read its text again, as its owner, would call code of that third role.
pub fn code_of_third_roles(objects: &str, args: Args) -> Result<Vec<String>> {
    let sql = format!(
        "SELECT DISTINCT pg_catalog.format('%s uses %s, which belongs to another role, %s.',
                    pg_catalog.pg_describe_object(o.classid, o.objid, 0),
                    pg_catalog.pg_describe_object(d.refclassid, d.refobjid, 0), u.owner::regrole)
         FROM ({objects}) AS o JOIN pg_catalog.pg_depend d ON d.classid = o.classid AND d.objid = o.objid
         CROSS JOIN LATERAL (
             SELECT typowner FROM pg_catalog.pg_type WHERE d.refclassid = 'pg_catalog.pg_type'::regclass AND oid = d.refobjid
             UNION ALL SELECT proowner FROM pg_catalog.pg_proc
                 WHERE d.refclassid = 'pg_catalog.pg_proc'::regclass AND oid = d.refobjid
             UNION ALL SELECT oprowner FROM pg_catalog.pg_operator
                 WHERE d.refclassid = 'pg_catalog.pg_operator'::regclass AND oid = d.refobjid) AS u(owner)
         WHERE u.owner <> o.owner AND NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE oid = u.owner AND rolsuper)"
    );
    query(&sql, args, |r| value(r, 1))
}

//! Indexes that were asked for on LiteLLM's spend log, and those that could not be built. What there is, the
//! view `index_survey` reads from the catalogs.
//!
//! What was asked for holds for the table that it was asked for, while that belongs to the same owner.

use crate::error::Result;
use crate::server::relation::{self, Table};
use crate::server::session::{Failure, Owner};
use crate::server::spi::{self, Found, value};
use crate::server::text::qualified;
use crate::state::restore::HERE;
use pgrx::prelude::*;
use std::time::Duration;

/// An index as it is to be on a table.
pub struct Wanted {
    pub name: &'static str,
    pub hot: bool,
    /// What one without a predicate that does the same begins with, and what else it holds. Empty: none does.
    pub keys: Vec<String>,
    pub included: Vec<String>,
}

/// Stores what was asked for. What failed is tried again.
pub fn request(table: &Table, wanted: &Wanted) -> Result<()> {
    spi::run(
        &format!(
            "INSERT INTO litellm_spend.index_set (relation, name, owner, hot, keys, included, origin)
             VALUES ($1, $2, $3, $4, $5, $6, {HERE})
             ON CONFLICT (relation, name) DO UPDATE
                 SET owner = excluded.owner, hot = excluded.hot, dropped = false,
                 keys = excluded.keys, included = excluded.included, origin = excluded.origin,
                 asked_at = CASE WHEN index_set.dropped THEN excluded.asked_at ELSE index_set.asked_at END"
        ),
        &[
            table.oid.into(),
            wanted.name.into(),
            table.owner_oid.into(),
            wanted.hot.into(),
            wanted.keys.clone().into(),
            wanted.included.clone().into(),
        ],
    )?;
    forget_failures(table, Some(&[wanted.name.to_string()]))?;
    tell()
}

/// What failed on a table is tried at once. `None`: all of its indexes.
fn forget_failures(table: &Table, names: Option<&[String]>) -> Result<()> {
    let sql =
        "DELETE FROM litellm_spend.index_failure WHERE ($2 IS NULL OR name = ANY ($2)) AND partition IN (
             SELECT $1 UNION SELECT inhrelid FROM pg_catalog.pg_inherits WHERE inhparent = $1)";
    spi::run(sql, &[table.oid.into(), names.map(<[String]>::to_vec).into()])
}

/// Has the worker look at once what has become of indexes: most of its looks do not ask.
fn tell() -> Result<()> {
    relation::tell_of("litellm_spend.index_set")
}

/// Takes indexes of these names that are on the table or a partition, and that nobody has asked for, for ones
/// that are to be dropped: their state was lost.
pub fn adopt_to_drop(table: &Table, names: &[String]) -> Result<()> {
    let sql = format!(
        "INSERT INTO litellm_spend.index_set (relation, name, owner, hot, dropped, keys, included, origin)
         SELECT $1, wanted.name, $2, false, true, '{{}}', '{{}}', {HERE}
         FROM unnest($3::text[]) AS wanted(name)
         WHERE EXISTS (
             SELECT FROM pg_catalog.pg_index x JOIN pg_catalog.pg_class o ON o.oid = x.indexrelid
             WHERE starts_with(o.relname, 'litellm_spend_' || wanted.name || '_') AND x.indrelid IN (
                 SELECT $1 UNION SELECT inhrelid FROM pg_catalog.pg_inherits WHERE inhparent = $1))
         ON CONFLICT DO NOTHING"
    );
    spi::run(&sql, &[table.oid.into(), table.owner_oid.into(), names.to_vec().into()])
}

/// Marks indexes of a table to be dropped, `None`: all. Returns their names, those that were marked before
/// included. What failed is tried again.
pub fn request_drop(table: &Table, names: Option<&[String]>) -> Result<Vec<String>> {
    tell()?;
    forget_failures(table, names)?;
    spi::fresh(
        "UPDATE litellm_spend.index_set SET dropped = true, owner = $3 WHERE relation = $1
                 AND ($2 IS NULL OR name = ANY ($2))
             RETURNING name",
        &[table.oid.into(), names.map(<[String]>::to_vec).into(), table.owner_oid.into()],
        |r| value(r, 1),
    )
}

/// The names of ours begin so. Then come the catalogue's name and that of the table or partition.
pub const PREFIX: &str = "litellm_spend_";

/// A table for which indexes were asked, while it belongs to whom it did.
pub struct Subject {
    pub relation: pg_sys::Oid,
    pub table: String,
    pub owner: Owner,
}

const SUBJECTS: &str = "SELECT DISTINCT c.oid, c.relname::text, c.relowner
     FROM litellm_spend.index_set s JOIN litellm_spend.installation i ON i.id = s.origin
     JOIN pg_catalog.pg_class c ON c.oid = s.relation AND c.relowner = s.owner";

pub fn subjects() -> Result<Vec<Subject>> {
    spi::query(&format!("{SUBJECTS} ORDER BY 1"), &[], subject)
}

pub fn subject_of(relation: pg_sys::Oid) -> Result<Option<Subject>> {
    spi::query(&format!("{SUBJECTS} WHERE c.oid = $1"), &[relation.into()], subject).one()
}

fn subject(r: &pgrx::spi::SpiHeapTupleData) -> Result<Subject> {
    Ok(Subject { relation: value(r, 1)?, table: value(r, 2)?, owner: Owner::role(value(r, 3)?) })
}

/// The indexes that were asked for on a table of this owner, by name.
pub fn asked_for(table: &Table) -> Result<Vec<String>> {
    spi::query(
        &format!(
            "SELECT name FROM litellm_spend.index_set
             WHERE relation = $1 AND owner = $2 AND NOT dropped AND origin = {HERE} ORDER BY 1"
        ),
        &[table.oid.into(), table.owner_oid.into()],
        |r| value(r, 1),
    )
}

/// An index on a table or partition, as it is now.
pub struct Place {
    pub name: String,
    pub partition: pg_sys::Oid,
    pub partition_schema: String,
    pub partition_name: String,
    pub state: String,
    pub last_error: Option<String>,
    /// It is for us to build.
    pub is_missing: bool,
    /// It may be tried, as far as earlier failures go. One that is noted in the future is of a clock that was
    /// ahead.
    pub due: bool,
}

/// The newest partitions first, and on each the indexes by name.
pub fn survey(relation: pg_sys::Oid) -> Result<Vec<Place>> {
    spi::current(
        // What has an error and no time to try again is for somebody else to settle.
        "SELECT s.name, c.oid, n.nspname::text, c.relname::text, s.state, s.last_error, missing,
                    missing AND coalesce(
                        s.retry_at <= clock_timestamp() OR s.last_error_at > clock_timestamp(), true)
             FROM litellm_spend.index_survey s CROSS JOIN LATERAL (
                 SELECT s.state IN ('waiting', 'failed')
                     AND (s.last_error IS NULL OR s.retry_at IS NOT NULL) AS missing) AS m
             JOIN pg_catalog.pg_class c ON c.oid = s.partition
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE s.relation = $1 ORDER BY s.range_end DESC, c.relname, s.name",
        &[relation.into()],
        |r| {
            Ok(Place {
                name: value(r, 1)?,
                partition: value(r, 2)?,
                partition_schema: value(r, 3)?,
                partition_name: value(r, 4)?,
                state: value(r, 5)?,
                last_error: r.get(6)?,
                is_missing: value(r, 7)?,
                due: value(r, 8)?,
            })
        },
    )
}

/// An index of ours that has to go.
#[derive(PartialEq, Eq)]
pub struct Leftover {
    pub name: String,
    pub partition: pg_sys::Oid,
    pub partition_name: String,
    /// Qualified.
    pub index: String,
    /// To drop it has failed, and it is not time yet to try again.
    pub rests: bool,
}

/// Those that are to be dropped, and those that are half built. Somebody may be building one of them, or have
/// done so until a moment ago.
pub fn leftovers(relation: pg_sys::Oid) -> Result<Vec<Leftover>> {
    spi::current(
        "SELECT s.name, t.oid, t.relname::text, n.nspname::text, o.relname::text,
                    EXISTS (SELECT FROM litellm_spend.index_failure f
                        WHERE f.partition = t.oid AND f.name = s.name AND f.dropping
                            AND clock_timestamp() BETWEEN f.last_error_at AND f.retry_at)
             FROM litellm_spend.index_set s JOIN pg_catalog.pg_class t
                 ON t.oid = s.relation
                     OR t.oid IN (SELECT inhrelid FROM pg_catalog.pg_inherits WHERE inhparent = s.relation)
             JOIN pg_catalog.pg_index x ON x.indrelid = t.oid JOIN pg_catalog.pg_class o
                 ON o.oid = x.indexrelid
             JOIN pg_catalog.pg_namespace n ON n.oid = o.relnamespace
             WHERE s.relation = $1 AND t.relkind = 'r' AND t.relowner = s.owner
               AND starts_with(o.relname, 'litellm_spend_' || s.name || '_')
                   AND (s.dropped OR NOT x.indisvalid)
             ORDER BY 1, 3, 5",
        &[relation.into()],
        |r| {
            Ok(Leftover {
                name: value(r, 1)?,
                partition: value(r, 2)?,
                partition_name: value(r, 3)?,
                index: qualified(&value::<String>(r, 4)?, &value::<String>(r, 5)?),
                rests: value(r, 6)?,
            })
        },
    )
}

/// Whether an index of the table, or of a partition, is being built or dropped.
pub fn is_at_work(relation: pg_sys::Oid) -> Result<bool> {
    let sql = "SELECT FROM litellm_spend.index_work WHERE relation IN (
             SELECT $1 UNION SELECT inhrelid FROM pg_catalog.pg_inherits WHERE inhparent = $1) LIMIT 1";
    spi::current(sql, &[relation.into()], |_| Ok(())).any()
}

/// How soon it is tried again when somebody was in the way, and when the build itself failed: it reads all of
/// a partition for that.
const SOON: Duration = Duration::from_secs(30);
const LATER: Duration = Duration::from_secs(3600);

/// Notes why an index was not built. `None`: it worked, which takes the note back if the index is there now.
pub fn record_build(partition: pg_sys::Oid, name: &str, failure: Option<&Failure>) -> Result<()> {
    if let Some(failure) = failure {
        return record(partition, name, failure, false);
    }
    let sql = "DELETE FROM litellm_spend.index_failure WHERE partition = $1 AND name = $2 AND EXISTS (
             SELECT FROM litellm_spend.index_survey s WHERE s.partition = $1 AND s.name = $2
                 AND s.state = 'built')";
    spi::run(sql, &[partition.into(), name.into()])
}

/// Notes why an index was not dropped. `None`: it worked. What dropped the rest of a build that failed does
/// not take back why that failed.
pub fn record_drop(partition: pg_sys::Oid, name: &str, failure: Option<&Failure>) -> Result<()> {
    if let Some(failure) = failure {
        return record(partition, name, failure, true);
    }
    let sql = "DELETE FROM litellm_spend.index_failure WHERE partition = $1 AND name = $2 AND dropping";
    spi::run(sql, &[partition.into(), name.into()])
}

fn record(partition: pg_sys::Oid, name: &str, failure: &Failure, dropping: bool) -> Result<()> {
    let rest = if failure.is_cancel() || failure.is_lock_timeout() { SOON } else { LATER };
    spi::run(
        "INSERT INTO litellm_spend.index_failure AS f
                 (partition, name, last_error, last_error_at, retry_at, dropping)
             SELECT $1, $2, $3, clock_timestamp(), clock_timestamp() + make_interval(secs => $4), $5
             FROM pg_catalog.pg_class WHERE oid = $1
             ON CONFLICT (partition, name) DO UPDATE
                 SET last_error = excluded.last_error, retry_at = excluded.retry_at,
                 last_error_at = excluded.last_error_at, dropping = excluded.dropping",
        &[partition.into(), name.into(), failure.text().into(), rest.as_secs_f64().into(), dropping.into()],
    )
}

/// Forgets the indexes of a table that are dropped by now.
pub fn forget_dropped(relation: pg_sys::Oid) -> Result<()> {
    let gone = "FROM litellm_spend.index_set AS s WHERE relation = $1 AND dropped
         AND NOT EXISTS (SELECT FROM litellm_spend.index_survey v WHERE v.relation = s.relation
             AND v.name = s.name)";
    // A look that finds nothing writes nothing.
    if !spi::query(&format!("SELECT {gone} LIMIT 1"), &[relation.into()], |_| Ok(())).any()? {
        return Ok(());
    }
    spi::run(&format!("DELETE {gone}"), &[relation.into()])
}

/// Forgets what speaks of tables that are gone, and failures of indexes that nobody asks for any more, or
/// that are there, or are not to be built now. Not what a restore brings before its table.
pub fn look_after() -> Result<()> {
    for sql in [
        format!(
            "FROM litellm_spend.index_set WHERE origin = {HERE}
             AND NOT EXISTS (SELECT FROM pg_catalog.pg_class WHERE oid = relation)"
        ),
        "FROM litellm_spend.index_failure AS f WHERE NOT EXISTS (
             SELECT FROM litellm_spend.index_survey s WHERE s.partition = f.partition AND s.name = f.name
                 AND s.state NOT IN ('built', 'open partition'))"
            .into(),
    ] {
        if spi::query(&format!("SELECT {sql} LIMIT 1"), &[], |_| Ok(())).any()? {
            spi::run(&format!("DELETE {sql}"), &[])?;
        }
    }
    Ok(())
}

//! The sources: relations whose rows a sequence numbers, with their windows.

use crate::error::Result;
use crate::server::relation::{FAMILY, is_open_here};
use crate::server::spi::{Args, Found, current, query, run, value};
use crate::state::restore::HERE;
use crate::state::window::{Holder, Window};
use pgrx::prelude::*;
use std::collections::BTreeSet;

/// The name of the change log as a source.
pub const CHANGE_LOG: &str = "change_log";

pub struct Source {
    pub name: String,
    pub relation: pg_sys::Oid,
    pub sequence: pg_sys::Oid,
    pub window: Window,
    /// Of what is safe here, what is safe on the nodes that Citus has put its shards on.
    pub nodes: Window,
    pub trimmed_to: i64,
    /// The lowest watermark of its rollups, but for those that are filled by hand.
    pub merged_to: i64,
    /// The highest.
    pub furthest: i64,
    /// Their names.
    pub rollups: Vec<String>,
}

/// The sources that have rollups for us to merge.
pub fn sources() -> Result<Vec<Source>> {
    sources_where("r.definition IS NOT NULL", &[])
}

/// The source of one rollup, merged as far as that is.
pub fn source_of(rollup: &str) -> Result<Option<Source>> {
    sources_where("r.name = $1", &[rollup.into()]).one()
}

/// The source of that name.
pub fn source(name: &str) -> Result<Option<Source>> {
    sources_where("s.name = $1", &[name.into()]).one()
}

/// The sources that a table is, one for each sequence of which we are to merge rollups.
pub fn sources_on(relation: pg_sys::Oid) -> Result<Vec<Source>> {
    sources_where("r.definition IS NOT NULL AND s.relation = $1", &[relation.into()])
}

/// A rollup over the table that its owner fills.
pub fn filled_by_hand(relation: pg_sys::Oid) -> Result<Option<String>> {
    let sql = format!(
        "SELECT r.name FROM litellm_spend.rollup r JOIN litellm_spend.source s ON s.name = r.source
         WHERE r.definition IS NULL AND s.relation = $1 AND s.origin = {HERE} ORDER BY r.name LIMIT 1"
    );
    query(&sql, &[relation.into()], |r| value(r, 1)).one()
}

/// The relation of a source as it is now: another session may have put a partitioned table in its place.
/// `None`: it was dropped, or another sequence numbers it now.
pub fn relation_of(source: &Source) -> Result<Option<pg_sys::Oid>> {
    let sql =
        "SELECT s.relation::oid FROM litellm_spend.source s JOIN pg_catalog.pg_class c ON c.oid = s.relation
         WHERE s.name = $1 AND s.sequence = $2";
    current(sql, &[source.name.as_str().into(), source.sequence.into()], |r| value(r, 1)).one()
}

fn sources_where(condition: &str, args: Args) -> Result<Vec<Source>> {
    query(
        &format!(
            "SELECT s.name, s.relation::oid, s.sequence::oid, s.candidates::text, s.node_candidates::text,
                 s.trimmed_to, min(r.watermark), max(r.watermark),
                    array_agg(r.name ORDER BY r.name)
             FROM litellm_spend.source s JOIN litellm_spend.rollup r ON r.source = s.name
             WHERE {condition} AND s.origin = {HERE} GROUP BY s.name ORDER BY s.name"
        ),
        args,
        |r| {
            Ok(Source {
                name: value(r, 1)?,
                relation: value(r, 2)?,
                sequence: value(r, 3)?,
                window: serde_json::from_str(&value::<String>(r, 4)?)?,
                nodes: serde_json::from_str(&value::<String>(r, 5)?)?,
                trimmed_to: value(r, 6)?,
                merged_to: value(r, 7)?,
                furthest: value(r, 8)?,
                rollups: value(r, 9)?,
            })
        },
    )
}

/// Remembers a source's candidates, unless another session holds the row: they are only a head start.
pub fn store_windows(source: &Source) -> Result<()> {
    let windows = [("candidates", &source.window), ("node_candidates", &source.nodes)];
    store_candidates("source", "name", &source.name, &windows)
}

/// Remembers the candidates of the capture's failures.
pub fn store_failure_window(source: &str, window: &Window) -> Result<()> {
    store_candidates("capture", "source", source, &[("candidates", window)])
}

fn store_candidates(table: &str, key: &str, name: &str, windows: &[(&str, &Window)]) -> Result<()> {
    let (mut columns, mut args) = (vec![], vec![name.into()]);
    for (column, window) in windows {
        args.push(serde_json::to_string(window)?.into());
        columns.push(format!("{column} = ${}::jsonb", args.len()));
    }
    run(
        &format!(
            "UPDATE litellm_spend.{table} SET {}
             WHERE {key} = (SELECT {key} FROM litellm_spend.{table} WHERE {key} = $1 FOR UPDATE SKIP LOCKED)",
            columns.join(", ")
        ),
        &args,
    )
}

/// The relations of which an inserter locks one before it draws a number for a row of `relation`: those from
/// which rows get there, and those that the sequence numbers. The latter, of the same owner, because a row
/// that was numbered in one may still be on its way when that becomes an ancestor: INSERT opens a partitioned
/// partition only when the first row comes to it.
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

/// The transactions that may add rows to one of `relations`.
pub struct Writers {
    pub holders: BTreeSet<Holder>,
    /// Ours is among them.
    pub ourselves: bool,
}

/// Those that hold RowExclusiveLock, as every writer does. Of our own, what has ended is there to be read: it
/// is one only while a statement of ours has such a relation open, which may have drawn a number and not put
/// the row in yet.
pub fn writers(relations: &[pg_sys::Oid]) -> Result<Writers> {
    let locks = query(
        "SELECT DISTINCT virtualtransaction,
             CASE WHEN pid = pg_catalog.pg_backend_pid() THEN relation END AS locked_by_us
         FROM pg_catalog.pg_locks
         WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
           AND database = (SELECT oid FROM pg_catalog.pg_database
               WHERE datname = pg_catalog.current_database())
           AND relation = ANY ($1)",
        &[relations.to_vec().into()],
        |r| Ok((Holder(value(r, 1)?), r.get::<pg_sys::Oid>(2)?)),
    )?;
    let mut writers = Writers { holders: BTreeSet::new(), ourselves: false };
    for (holder, locked_by_us) in locks {
        let open = locked_by_us.is_some_and(is_open_here);
        if locked_by_us.is_none() || open {
            writers.holders.insert(holder);
        }
        writers.ourselves |= open;
    }
    Ok(writers)
}

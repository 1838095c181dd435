//! Deletes expired rows one by one, where no partition can be dropped instead: in DEFAULT, in a partition
//! that spans the cutoff by more than its period (a legacy table), in a table that is not partitioned.
//!
//! A batch is a transaction of its own in the worker, and never waits for a row. What rollups have not merged
//! yet stays. Capture sees the deletions, and that they are ours: history stays, whatever on_delete says, as
//! it does when a partition is dropped.
//!
//! Locks: ACCESS SHARE on the table; ROW EXCLUSIVE, which the DELETE needs anyway, on what it deletes from.
//! That is taken before our triggers are looked for: until the transaction ends nobody can drop or disable
//! them. The look reads catalogs only, as ourselves; what reads or deletes rows runs as the table's owner.

use crate::error::Result;
use crate::guc;
use crate::litellm::functions::EXPIRING;
use crate::partition::calendar::{Interval, Moment, Range};
use crate::partition::expire;
use crate::partition::layout::{Layout, Partition};
use crate::partition::times;
use crate::server::locks;
use crate::server::relation;
use crate::server::spi;
use pgrx::prelude::*;
use std::ffi::CString;

/// A table that holds rows to delete.
#[derive(Clone, Debug)]
pub struct Target {
    pub oid: pg_sys::Oid,
    pub name: String,
    /// If it is one of several.
    pub partition: Option<Partition>,
}

/// The tables to delete from. A partition that ends with the period of the cutoff is left: it goes as a
/// whole, soon.
pub fn targets(layout: &Layout, interval: Interval, cutoff: Moment) -> Vec<Target> {
    if !layout.partitioned {
        let (oid, name) = (layout.table.oid, layout.table.name.clone());
        return vec![Target { oid, name, partition: None }];
    }
    let soon = interval.period(cutoff).map_or(cutoff, |period| period.to);
    let spans = |p: &&Partition| p.leaf && !p.pending && p.range.from < cutoff && p.range.to > soon;
    let default = layout.default.iter().filter(|p| p.leaf);
    let partitions = default.chain(layout.partitions.iter().filter(spans));
    let target = |p: &Partition| Target { oid: p.oid, name: p.name.clone(), partition: Some(p.clone()) };
    partitions.map(target).collect()
}

/// Rows a batch: 21 ms, as 96,000 rows of 2 KB took 2.04 s with LiteLLM's indexes and our triggers (debug
/// build, PostgreSQL 15, two shared cores, one run, 2026-11).
pub const BATCH: i64 = 1000;

/// Deletes a batch of the rows before `cutoff`, oldest first. Returns how many: fewer than [`BATCH`] are the
/// last.
pub fn batch(layout: &Layout, target: &Target, cutoff: Moment) -> Result<i64> {
    target.partition.iter().try_for_each(|partition| layout.require_usable(partition))?;
    // 1. nothing goes that capture would not see.
    layout.lock()?;
    locks::lock_all(guc::lock_timeout(), &[(target.oid, pg_sys::RowExclusiveLock)])?;
    expire::require_triggers(layout, target.oid)?;
    // 2. the oldest that rollups have merged.
    let (relation, time) = (relation::relation_name(target.oid)?, layout.time());
    let expired = times::condition(&time, Range { from: Moment::MIN, to: cutoff });
    let merged = expire::merged(layout, target.oid)?;
    let order = if times::is_indexed(target.oid, &layout.time_column)? {
        format!("ORDER BY {time}")
    } else {
        String::new()
    };
    // Looked at again by the DELETE: a row may have changed meanwhile.
    let delete = format!(
        "DELETE FROM ONLY {relation} WHERE ctid = ANY (ARRAY(
             SELECT ctid FROM ONLY {relation} WHERE {expired} AND {merged} {order} LIMIT {BATCH}
                 FOR UPDATE SKIP LOCKED))
         AND {expired} AND {merged}"
    );
    // Triggers are the owner's code.
    let setting = CString::new(EXPIRING).unwrap_or_default();
    let _owner = layout.owner.act().with(&setting, c"on");
    spi::execute(&delete, &[])
}

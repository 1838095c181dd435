//! Empties DEFAULT of the rows that belong to partitions.
//!
//! ```text
//!   partitions      [ 18 )[ 19 )                  [ 24 )[ 25 )…
//!   DEFAULT     .          a gap: ::::::::::::::::              .   <- rows of the future stay
//! ```
//! Most often all its rows but a few lie in one gap (LiteLLM's own script makes nothing but DEFAULT): then
//! DEFAULT itself becomes the partition of that gap's periods, and an empty DEFAULT takes its place
//! ([`adopt`]). Nothing is read and nothing but the few rows is written. Else rows move to partitions of
//! their periods, a batch a transaction, those of the gap with the fewest first, until the rest can be
//! adopted (`create`).
//!
//! A step that was interrupted has left nothing behind: how far it got is in the partitions' bounds.

use crate::error::{Error, Result};
use crate::guc;
use crate::partition::calendar::{self, Drain, Group, Interval, Moment, Range};
use crate::partition::create::{
    attach, attach_default, create, create_triggers, detach, inside, lock_capture, move_rows, outside,
    refuse_references_to, rename,
};
use crate::partition::layout::Layout;
use crate::partition::times::Times;
use crate::server::locks;
use crate::server::proof;
use crate::server::spi::{self, Found};
use crate::server::text::qualified;
use pgrx::prelude::*;

/// What is next. Rows from `horizon` on stay, and those before `cutoff` are deleted elsewhere. Fails where
/// nothing is left but rows of which more have one time than may move at once.
pub fn look(layout: &Layout, interval: Interval, horizon: Moment, cutoff: Moment) -> Result<Drain> {
    let Some(default) = layout.default.as_ref().filter(|_| layout.partitioned) else {
        return Ok(Drain::Nothing);
    };
    layout.require_usable(default)?;
    layout.lock()?;
    let batch = batch_size(default.oid)?;
    let times = Times::of(layout.owner, default.oid, &layout.time_column)?;
    let (mut groups, mut others) = groups(layout, &times, horizon, batch)?;
    let mut refused = None;
    loop {
        match calendar::drain(interval, &groups, others, batch, cutoff) {
            Drain::Move(range) => match times.require_few(range, batch) {
                Err(error @ Error::TooManyAtOnce { .. }) => {
                    refused.get_or_insert(error);
                    // They stay, so DEFAULT cannot become the partition of others.
                    if let Some(group) = groups.iter_mut().find(|g| g.gap.within(range).is_some()) {
                        others += group.rows;
                        match times.ends(Range { from: range.to, ..group.gap })? {
                            Some((first, _)) => group.first = first,
                            None => group.rows = 0,
                        }
                    }
                    groups.retain(|group| group.rows > 0);
                }
                fits => return fits.map(|()| Drain::Move(range)),
            },
            Drain::Nothing => return refused.map_or(Ok(Drain::Nothing), Err),
            adopt => return Ok(adopt),
        }
    }
}

/// The rows of each gap, and how many belong to none, both counted until it is clear that they are many.
fn groups(layout: &Layout, times: &Times, horizon: Moment, batch: i64) -> Result<(Vec<Group>, i64)> {
    let past = Range { from: Moment::MIN, to: horizon };
    let mut groups = vec![];
    for gap in calendar::gaps(&layout.ranges()).into_iter().filter_map(|gap| gap.within(past)) {
        if let Some((first, last)) = times.ends(gap)? {
            let rows = times.count(&times.condition(gap), batch + 1)?;
            groups.push(Group { gap, first, last, rows });
        }
    }
    let time = layout.time();
    let others = format!("{time} >= {horizon} OR {time} = '-infinity' OR {time} IS NULL");
    Ok((groups, times.count(&others, batch + 1)?))
}

/// Bytes that move in one transaction. 2,000 rows of 2 KB, half of it, took 0.1 s with LiteLLM's eight
/// indexes (debug build, PostgreSQL 15, two shared cores, one run, 2026-11).
const BATCH_BYTES: i64 = 8 << 20;

/// How many rows of a table make a batch, by their average size.
pub fn batch_size(relation: pg_sys::Oid) -> Result<i64> {
    let sql = "SELECT CASE WHEN reltuples > 0 THEN (pg_catalog.pg_table_size(oid) / reltuples)::bigint ELSE 4096 END
               FROM pg_catalog.pg_class WHERE oid = $1";
    let bytes = spi::query(sql, &[relation.into()], |r| spi::value::<i64>(r, 1)).one()?;
    Ok((BATCH_BYTES / bytes.unwrap_or(4096).max(1)).clamp(20, 2000))
}

pub struct Adopted {
    pub partition: String,
    /// Rows that stayed in DEFAULT.
    pub rows: i64,
}

/// Makes DEFAULT the partition of `range`, and a new, empty table DEFAULT. `None`: it no longer fits.
pub fn adopt(layout: &Layout, interval: Interval, range: Range, horizon: Moment) -> Result<Option<Adopted>> {
    let Some(default) = &layout.default else { return Ok(None) };
    let batch = batch_size(default.oid)?;
    // DETACH has the server look for references under the lock.
    refuse_references_to(layout)?;
    // 1. nobody reads or writes from here on; then what was seen before is looked at again.
    lock_capture(layout)?;
    locks::lock_exclusively(guc::lock_timeout(), [layout.table.oid, default.oid])?;
    let layout = layout.again()?;
    if layout.default.as_ref().map(|d| d.oid) != Some(default.oid) {
        return Ok(None);
    }
    layout.default.iter().try_for_each(|default| layout.require_usable(default))?;
    let times = Times::of(layout.owner, default.oid, &layout.time_column)?;
    let (groups, others) = groups(&layout, &times, horizon, batch)?;
    let Drain::Adopt(range) = calendar::drain(interval, &groups, others, batch, range.from) else {
        return Ok(None);
    };
    // 2. DEFAULT gets the name that the partition is to have, and so do its indexes.
    detach(&layout, &default.qualified())?;
    let name = layout.free_name(&calendar::name(&layout.table.name, range))?;
    rename(layout.owner, &default.schema, &default.name, &name, None)?;
    let old = qualified(&default.schema, &name);
    // 3. the new DEFAULT, stored as the old one, with the rows that do not fit.
    let layout = layout.again()?;
    let new = create(&layout, &default.name, default.oid)?;
    let rows = move_rows(&layout, default.oid, &new, &outside(&layout, range))?;
    create_triggers(&layout, &new)?;
    // 4. both are attached, the old one without being read.
    proof::with(layout.owner, &old, &inside(&layout, range), || attach(&layout, &old, range))?;
    attach_default(&layout, &new)?;
    Ok(Some(Adopted { partition: name, rows }))
}

//! Expires whole partitions: drops them, or detaches them into an archive. Never what a rollup still needs,
//! and not without a record of what was there.
//!
//! The partition is counted under SHARE, so that nothing is written to it any more: rows that come that late
//! have expired as well. Then follow the short locks, under which we ask again which rollups there are: one
//! may have been declared during the count. Order, as everywhere: fences, the table, its partitions.
//!
//! An UPDATE that names no time takes ROW EXCLUSIVE on every partition. It has the table already when it
//! waits for one that is being counted, so the two never end in a drop: either the count gives way, once
//! somebody has waited for longer than `litellm_spend.lock_timeout`, or the server finds a deadlock when we
//! ask for the table. Both are tried again later, and what was counted by then is lost.
//!
//! What reads or drops a partition runs as the table's owner; that record and the rollups' state are ours.
//!
//! | lock | on | how long |
//! |---|---|---|
//! | SHARE | the partition | while it is counted, until others wait |
//! | the fences | the built-in rollups, if the table is captured | to the end |
//! | ACCESS EXCLUSIVE | the table, DEFAULT, the partition | the DROP or DETACH |

use crate::engine::source;
use crate::error::{Error, Result};
use crate::guc;
use crate::litellm::triggers::missing_triggers;
use crate::partition::archive;
use crate::partition::calendar::Moment;
use crate::partition::create::{detach, finish_detach, refuse_references};
use crate::partition::layout::{Layout, Partition, timestamp};
use crate::partition::policy::{OnExpire, Policy};
use crate::partition::times;
use crate::server::locks::{self, Patience};
use crate::server::relation::{self, Table};
use crate::server::spi::{self, Found};
use crate::server::text::quoted;
use crate::state::captured;
use crate::state::fence::Fence;
use crate::state::frozen;
use pgrx::datum::{AnyNumeric, Timestamp};
use pgrx::prelude::*;
use std::time::{Duration, Instant};

/// What a partition holds, while we hold the lock that keeps it so.
pub struct Held {
    rows: i64,
    spend: Option<AnyNumeric>,
    /// The rollups that have merged all of it.
    rollups: Vec<Rollup>,
}

/// A rollup over the table.
struct Rollup {
    name: String,
    watermark: i64,
    /// Numbers its rows; quoted.
    column: String,
}

/// Whether all of the partition is before the cutoff.
pub fn has_expired(partition: &Partition, cutoff: Moment) -> bool {
    partition.range.to <= cutoff
}

/// Locks the partition against writers, checks that nobody needs it, and counts it; `locked` are others that
/// are locked already.
pub fn count(
    layout: &Layout,
    partition: &Partition,
    policy: &Policy,
    locked: &[pg_sys::Oid],
) -> Result<Held> {
    layout.require_usable(partition)?;
    refuse_dependents(partition)?;
    if policy.on_expire == OnExpire::Drop {
        refuse_references(&[layout.table.oid, partition.oid], &partition.name)?;
    }
    layout.lock()?;
    // What needs no count to be refused is refused while nobody waits for us.
    require_rolled_up(layout, partition)?;
    locks::lock_all(guc::lock_timeout(), &[(partition.oid, pg_sys::ShareLock)])?;
    require_same(&layout.again()?, partition)?;
    let rollups = rollups(layout, partition.oid)?;
    require_captured(layout, partition)?;
    let locked = [&[partition.oid, layout.table.oid], locked].concat();
    let (rows, spend, has_others) = add_up(layout, partition, &merged_by(&rollups), &locked)?;
    if has_others {
        require_rolled_up(layout, partition)?;
    }
    Ok(Held { rows, spend, rollups })
}

/// The partition as it is now that it is locked: still of that range, and of the name by which it is read and
/// dropped, which could mean another table.
fn require_same<'a>(now: &'a Layout, partition: &Partition) -> Result<&'a Partition> {
    now.find(partition.oid)
        .filter(|found| found.range == partition.range && found.qualified() == partition.qualified())
        .ok_or_else(|| Error::CameBetween(partition.name.clone()))
}

/// Pages that are counted by one statement, and how long others may wait unseen beside it.
const PIECE: i64 = 1024;
const LOOK: Duration = Duration::from_millis(100);

/// The rows and the spend of a partition, and whether there are rows that do not meet `merged`. Fails if
/// others wait for too long for one of the tables that we have locked.
fn add_up(
    layout: &Layout,
    partition: &Partition,
    merged: &str,
    locked: &[pg_sys::Oid],
) -> Result<(i64, Option<AnyNumeric>, bool)> {
    let is_number = |t: &str| ["double precision", "real", "numeric", "integer", "bigint"].contains(&t);
    let spend = if layout.table.type_of("spend").is_some_and(is_number) {
        // NaN and the infinities count as 0, as in the rollups.
        "sum(CASE WHEN spend::numeric > '-Infinity' AND spend::numeric < 'Infinity'
                 THEN spend::numeric ELSE 0 END)"
    } else {
        "NULL::numeric"
    };
    let pages = pages(partition)?;
    let (mut rows, mut spent, mut has_others) = (0, None, false);
    let (mut first, mut looked) = (0, Instant::now());
    while first == 0 || first < pages {
        let next = first + PIECE;
        // The last piece has no end, and a table of one piece no beginning.
        let from = if first > 0 { format!("ctid >= '({first},0)'") } else { "true".into() };
        let to = if next < pages { format!("ctid < '({next},0)'") } else { "true".into() };
        let sql = format!(
            "SELECT count(*), {spend}, coalesce(bool_or(NOT ({merged})), false) FROM ONLY {}
             WHERE {from} AND {to}",
            partition.qualified()
        );
        let counted = {
            let _owner = layout.owner.act().with(c"enable_tidscan", c"on");
            spi::fresh(&sql, &[], |r| {
                Ok((spi::value::<i64>(r, 1)?, r.get::<AnyNumeric>(2)?, spi::value::<bool>(r, 3)?))
            })?
        };
        for (more, spend, others) in counted {
            rows += more;
            has_others |= others;
            spent = match (spent, spend) {
                (Some(spent), Some(spend)) => Some(spent + spend),
                (spent, spend) => spent.or(spend),
            };
        }
        if looked.elapsed() > LOOK {
            locks::require_nobody_waits(locked)?;
            looked = Instant::now();
        }
        first = next;
    }
    Ok((rows, spent, has_others))
}

/// How many pages it has, where they can be read in pieces: else it is one.
fn pages(partition: &Partition) -> Result<i64> {
    let heap = "SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_am m ON m.oid = c.relam
                WHERE c.oid = $1 AND m.amname = 'heap'";
    if !spi::query(heap, &[partition.oid.into()], |_| Ok(())).any()? {
        return Ok(0);
    }
    Ok(times::size(partition.oid)? / i64::from(pg_sys::BLCKSZ))
}

/// Drops or detaches a counted partition. Returns the rows, and where they are now.
pub fn finish(
    layout: &Layout,
    partition: &Partition,
    policy: &Policy,
    held: Held,
    patience: Patience,
) -> Result<(i64, String)> {
    let captured = captured::capture_of(layout.table.oid)?;
    // 1. the rollups: what they say of these days is from now on their only record.
    if let Some(state) = &captured {
        let fences = Fence::require_all(&state.source, patience)?;
        for fence in &fences {
            if !fence.covered_from.is_neg_infinity() {
                return Err(Error::NotCovered {
                    partition: partition.name.clone(),
                    rollup: fence.name.clone(),
                });
            }
        }
    }
    // 2. the table; what was seen before is looked at again. What may be waited for comes before.
    if policy.on_expire == OnExpire::Detach {
        archive::ensure(layout.owner)?;
    }
    let partitions = layout.default.iter().chain([partition]).map(|p| p.oid);
    locks::lock_exclusively(guc::lock_timeout(), [layout.table.oid].into_iter().chain(partitions))?;
    let now = layout.again()?;
    layout.require_usable(require_same(&now, partition)?)?;
    let has_all =
        |now: &Rollup| held.rollups.iter().any(|r| r.name == now.name && r.watermark <= now.watermark);
    if let Some(other) = rollups(layout, partition.oid)?.into_iter().find(|rollup| !has_all(rollup)) {
        return Err(Error::CameBetween(other.name));
    }
    // 3. the record, with the deed.
    let rows = held.rows;
    let (from, to) = (timestamp(partition.range.from), timestamp(partition.range.to));
    write_record(layout, partition, policy, held, (from, to))?;
    let place = match policy.on_expire {
        OnExpire::Drop => {
            layout.owner.run(format!("DROP TABLE {}", partition.qualified()))?;
            "dropped".into()
        }
        OnExpire::Detach => {
            match partition.pending {
                true => finish_detach(layout, partition)?,
                false => detach(layout, &partition.qualified())?,
            }
            format!("now {}", archive::take(layout.owner, partition.oid)?)
        }
    };
    // 4. its days are history, and those before them unless an older partition had to stay, the table that
    //    was replaced may have rows of them, or they are to be repaired.
    if let (Some(state), Some(end)) = (&captured, to) {
        let older_stays = now.partitions.iter().any(|other| other.range.to <= partition.range.from)
            || state.predecessor.is_some()
            || spi::exists(
                "SELECT FROM litellm_spend.dirty_range
                     WHERE repair = 'rebuild' AND repaired_at IS NULL AND range_start < $1",
                &[from.into()],
            )?;
        match from.filter(|_| older_stays) {
            Some(start) => frozen::freeze(start, end, "EXPIRY")?,
            None => frozen::freeze_before(end)?,
        }
    }
    Ok((rows, place))
}

fn write_record(
    layout: &Layout,
    partition: &Partition,
    policy: &Policy,
    held: Held,
    (from, to): (Option<Timestamp>, Option<Timestamp>),
) -> Result<()> {
    spi::run(
        "INSERT INTO litellm_spend.expired_partition
                 (table_schema, table_name, partition, range_start, range_end, rows, spend, action, policy)
             VALUES ($1::name, $2::name, $3, $4, $5, $6, $7, $8, $9)",
        &[
            layout.table.schema.as_str().into(),
            layout.table.name.as_str().into(),
            partition.name.as_str().into(),
            from.into(),
            to.into(),
            held.rows.into(),
            held.spend.into(),
            policy.on_expire.name().into(),
            policy.to_string().into(),
        ],
    )
}

// ---- who still needs it ----------------------------------------------------------------------------------

/// DROP would fail, after the count.
fn refuse_dependents(partition: &Partition) -> Result<()> {
    let object = spi::query(
        "SELECT coalesce(r.ev_class::regclass::text, pg_describe_object(d.classid, d.objid, 0))
         FROM pg_catalog.pg_depend d
         LEFT JOIN pg_catalog.pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
         WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = $1 AND d.deptype = 'n'
           AND d.classid IN ('pg_rewrite'::regclass, 'pg_proc'::regclass) AND r.ev_class IS DISTINCT FROM $1",
        &[partition.oid.into()],
        |r| spi::value::<String>(r, 1),
    )
    .one()?;
    match object {
        None => Ok(()),
        Some(by) => Err(Error::Referenced { relation: partition.name.clone(), by }),
    }
}

/// The rollups over the table, as they are now.
fn rollups(layout: &Layout, relation: pg_sys::Oid) -> Result<Vec<Rollup>> {
    let found = spi::fresh(
        "SELECT r.name, r.watermark, s.relation::oid, s.sequence::oid
             FROM litellm_spend.rollup r JOIN litellm_spend.source s ON s.name = r.source
                 WHERE s.relation::oid IN ($1, $2)",
        &[layout.table.oid.into(), relation.into()],
        |r| {
            Ok((
                spi::value::<String>(r, 1)?,
                spi::value::<i64>(r, 2)?,
                spi::value::<pg_sys::Oid>(r, 3)?,
                spi::value::<pg_sys::Oid>(r, 4)?,
            ))
        },
    )?;
    let mut rollups = vec![];
    for (name, watermark, source, sequence) in found {
        let table = Table::find(source)?.ok_or_else(|| Error::NoTable(source.to_u32().to_string()))?;
        let column = quoted(&source::numbering(&table, Some(sequence))?.column);
        rollups.push(Rollup { name, watermark, column });
    }
    Ok(rollups)
}

/// The rows that every rollup over the table has merged, as a condition.
pub fn merged(layout: &Layout, relation: pg_sys::Oid) -> Result<String> {
    Ok(merged_by(&rollups(layout, relation)?))
}

fn merged_by(rollups: &[Rollup]) -> String {
    let parts = rollups
        .iter()
        .map(|Rollup { watermark, column, .. }| format!("({column} <= {watermark} OR {column} IS NULL)"));
    let parts: Vec<String> = std::iter::once("true".into()).chain(parts).collect();
    parts.join(" AND ")
}

/// Refuses a partition with rows that a rollup has not merged.
fn require_rolled_up(layout: &Layout, partition: &Partition) -> Result<()> {
    for Rollup { name, watermark, column } in &rollups(layout, partition.oid)? {
        let sql = format!("SELECT FROM ONLY {} WHERE {column} > {watermark}", partition.qualified());
        if layout.owner.exists(&sql, &[])? {
            let (partition, rollup) = (partition.name.clone(), name.clone());
            return Err(Error::NotMerged { partition, rollup, watermark: *watermark });
        }
    }
    Ok(())
}

/// Refuses a partition of the captured table with rows that capture may have missed: what is to be repaired
/// needs them.
fn require_captured(layout: &Layout, partition: &Partition) -> Result<()> {
    let Some(state) = captured::capture_of(layout.table.oid)? else {
        return Ok(());
    };
    let (from, to) = (timestamp(partition.range.from), timestamp(partition.range.to));
    let dirty = spi::exists(
        "SELECT FROM litellm_spend.dirty_range WHERE repair = 'rebuild' AND repaired_at IS NULL
             AND range_start < coalesce($2, 'infinity') AND range_end > coalesce($1, '-infinity')",
        &[from.into(), to.into()],
    )?;
    if dirty || state.has_unseen_failures()? {
        return Err(Error::NotRepaired(partition.name.clone()));
    }
    require_triggers(layout, partition.oid)
}

/// Refuses the captured table, or a partition of it, whose rows could come and go unseen: it or the table
/// lacks triggers. For a caller whose lock keeps those from being dropped or disabled.
pub fn require_triggers(layout: &Layout, relation: pg_sys::Oid) -> Result<()> {
    if captured::capture()?.is_none_or(|state| state.relation != layout.table.oid) {
        return Ok(());
    }
    let ours = [layout.table.oid, relation];
    match missing_triggers(layout.table.oid)?.into_iter().find(|(oid, _)| ours.contains(oid)) {
        Some((lacking, _)) => Err(Error::NotCaptured(relation::relation_name(lacking)?)),
        None => Ok(()),
    }
}

//! The transaction in which a table becomes partitioned. Nothing is read or copied under its locks but the
//! catalogs:
//!
//! ```text
//!  before      T  (plain)                        views, functions, triggers, grants … -> T
//!  after       T  (partitioned by time)          views, functions, triggers, grants … -> the new T
//!              +-- T_legacy    [ , cutover)      the old table, with its rows and indexes
//!              +-- T_pdefault                    whatever fits none; maintenance adds the periods to come
//! ```
//! | lock | on | how long |
//! |---|---|---|
//! | ACCESS EXCLUSIVE | the views over the table, then the table | the whole transaction: milliseconds |
//!
//! They are waited for at most `litellm_spend.swap_lock_timeout`; then the conversion tries again later.
//! Before them, within the same limit, our own rows about the table are locked: whoever has one must not make
//! us wait while we have the table.
//!
//! Indexes of ours stay on the old table: those of a partitioned table would be on each new partition, too.
//!
//! Every statement runs as the table's owner, or as the owner of the view or function that it changes: their
//! texts come from the catalog and may call what is theirs. `dependents` says what is ours to do.

use crate::error::{Error, Result};
use crate::guc;
use crate::litellm::triggers;
use crate::partition::calendar::{Moment, Range};
use crate::partition::convert::{Conversion, LEGACY};
use crate::partition::create::{attach, attach_default, create, inside, rename, template};
use crate::partition::dependents::Dependents;
use crate::partition::layout::Layout;
use crate::server::locks::{self, Patience};
use crate::server::proof;
use crate::server::relation;
use crate::server::spi::{self, Found};
use crate::server::text::{qualified, quoted, suffixed};
use crate::state::fence;
use crate::state::restore::HERE;
use pgrx::prelude::*;

pub fn swap(conversion: &Conversion) -> Result<()> {
    fence::require_attachment(Patience::None)?;
    // 1. the locks. What there is, now that it cannot change.
    let dependents = lock(conversion.name(), &[conversion.relation], || conversion.dependents())?;
    if let Some(obstacle) = dependents.obstacles.first() {
        return Err(conversion.cannot(obstacle));
    }
    conversion.require_time_index()?;
    if let Some(beyond) = conversion.rows_beyond()? {
        return Err(beyond);
    }
    // 2. the old table moves aside, with the index that was built for it as its primary key.
    let owner = conversion.owner;
    let run = |sql: String| owner.run(sql);
    let (schema, table, name) = (&conversion.schema, &conversion.table, conversion.name());
    let key = quoted(&dependents.key.as_ref().map(|(name, _)| name.clone()).unwrap_or_default());
    run(format!("ALTER TABLE {name} DROP CONSTRAINT {key}"))?;
    let key_index = quoted(&conversion.key_index());
    run(format!("ALTER TABLE {name} ADD CONSTRAINT {key} PRIMARY KEY USING INDEX {key_index}"))?;
    // The index by which subscribers knew a row is gone: without another the server would refuse each UPDATE
    // and DELETE of the rows that are there. No other index than the key's can have been it.
    let by_index = "SELECT FROM pg_catalog.pg_class WHERE oid = $1 AND relreplident = 'i'";
    if spi::query(by_index, &[conversion.relation.into()], |_| Ok(())).any()? {
        run(format!("ALTER TABLE {name} REPLICA IDENTITY USING INDEX {key}"))?;
    }
    rename(owner, schema, table, &conversion.legacy(), Some(LEGACY))?;
    let legacy = qualified(schema, &conversion.legacy());
    dependents.drop_triggers(&legacy)?;
    // 3. the new one, empty, with all that the old one had.
    let time = quoted(&conversion.options.time_column);
    run(format!(
        "CREATE TABLE {name} (LIKE {legacy} INCLUDING DEFAULTS INCLUDING GENERATED INCLUDING STORAGE
             INCLUDING COMPRESSION)
         PARTITION BY RANGE ({time})"
    ))?;
    let key_columns = conversion.key_columns(&dependents);
    run(format!("ALTER TABLE {name} ADD CONSTRAINT {key} PRIMARY KEY ({key_columns})"))?;
    dependents.indexes.iter().try_for_each(|index| run(index.sql.clone()))?;
    dependents.constraints.iter().try_for_each(|constraint| constraint.give(owner))?;
    dependents.give()?;
    // 4. the old one as its partition, without being read.
    let parent = relation::find_relation(&name)?.ok_or_else(|| Error::NoTable(name.clone()))?;
    let layout = Layout::of(parent, &conversion.options.time_column)?;
    let before = Range { from: Moment::MIN, to: conversion.cutover()? };
    proof::with(owner, &legacy, &inside(&layout, before), || attach(&layout, &legacy, before))?;
    // 5. one for whatever fits none. The periods to come are for maintenance, which needs weaker locks: each
    //    would have taken ten milliseconds here (debug build, PostgreSQL 15, two shared cores, 2026-11).
    let layout = layout.again()?;
    let default = layout.free_name(&suffixed(table, "_pdefault"))?;
    attach_default(&layout, &create(&layout, &default, template(&layout))?)?;
    // 6. whatever read the old table reads the new one.
    dependents.point_readers()?;
    // 7. capture, rollups, indexes and maintenance go on there.
    triggers::follow(conversion.relation, parent)?;
    store_policy(conversion, parent)
}

/// Takes ACCESS EXCLUSIVE on a table and its partitions, and first on the views that read it, as their
/// readers do; before all, on our own rows about it. Returns what there is under the locks.
pub fn lock(
    name: String,
    relations: &[pg_sys::Oid],
    read: impl Fn() -> Result<Dependents>,
) -> Result<Dependents> {
    let oids = |dependents: &Dependents| dependents.views.iter().map(|view| view.oid).collect::<Vec<_>>();
    relations.iter().take(1).try_for_each(|oid| fence::lock_notes_of(guc::swap_lock_timeout(), *oid))?;
    let views = oids(&read()?);
    locks::lock_exclusively(guc::swap_lock_timeout(), views.iter().chain(relations).copied())?;
    let dependents = read()?;
    if oids(&dependents) != views {
        return Err(Error::CameBetween(name));
    }
    Ok(dependents)
}

/// A policy of the owner's that is there keeps its retention. A former owner's rests, and is replaced.
fn store_policy(conversion: &Conversion, relation: pg_sys::Oid) -> Result<()> {
    spi::run(
        &format!(
            "INSERT INTO litellm_spend.policy (relation, owner, time_column, \"interval\", precreate, on_expire,
                 origin)
             VALUES ($1, $2, $3::name, $4, $5, 'drop', {HERE})
             ON CONFLICT (relation) DO UPDATE SET owner = excluded.owner, time_column = excluded.time_column,
                 \"interval\" = excluded.\"interval\", precreate = excluded.precreate, maintained_at = NULL,
                 retention = CASE WHEN policy.owner = excluded.owner THEN policy.retention END,
                 on_expire = CASE WHEN policy.owner = excluded.owner THEN policy.on_expire
                                  ELSE excluded.on_expire END"
        ),
        &[
            relation.into(),
            conversion.owner.oid().into(),
            conversion.options.time_column.as_str().into(),
            conversion.options.interval.as_str().into(),
            (conversion.options.precreate as i32).into(),
        ],
    )
}

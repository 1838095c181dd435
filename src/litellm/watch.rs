//! Watches that the captured table stays captured: it may be replaced, get partitions or columns, lose its
//! triggers or change its owner, and our own tables may be dropped. What was missed meanwhile is put right.
//!
//! A table is followed that gets the captured one's name, if it belongs to the same owner: capture does not
//! go on with rows of somebody else's. What is read of either table is read as the owner.
//!
//! Locks on the user's tables, each waited for at most `litellm_spend.lock_timeout`: those of `triggers`;
//! when the table was replaced SHARE ROW EXCLUSIVE on the new one for as long as it takes to read the rows
//! that it got before we noticed; when the replaced table has become a partition of it, on both, for a
//! moment.

use crate::error::{Error, Result};
use crate::guc;
use crate::litellm::attach::attach_locked;
use crate::litellm::backfill::uncover_all;
use crate::litellm::builtin;
use crate::litellm::capture::{attached, captured_columns};
use crate::litellm::functions::MOVE;
use crate::litellm::reports;
use crate::litellm::spend_log::Capture;
use crate::litellm::triggers::{
    any_of_another, any_unnoted, create_functions, create_triggers, drop_triggers, failing_triggers,
    foreign_partition, give_functions, missing_triggers, note_triggers, require_all_rows_seen, silence,
    triggers,
};
use crate::litellm::views::{self, Adopted};
use crate::server::locks::{self, Patience};
use crate::server::log;
use crate::server::relation::{self, Table, open};
use crate::server::session::{Failure, Owner};
use crate::server::spi::{self, Found};
use crate::server::text::{SCHEMA, next_midnight, qualified};
use crate::state::captured::{self, CaptureState};
use crate::state::fence;
use crate::state::frozen;
use crate::state::sources::{self, CHANGE_LOG, Source};
use pgrx::datum::Timestamp;
use pgrx::prelude::*;

/// Notices what happened to the table since the last look and mends it. `None`: nothing is wrong; else
/// whether something was mended.
pub fn watch(patience: Patience) -> Result<Option<bool>> {
    Ok(match damage()? {
        None => None,
        Some(_) => Some(fence::lock_attachment(patience)? && mend()?),
    })
}

/// Why the table is not captured as it should be.
enum Damage {
    /// The name belongs to another table now.
    Replaced(pg_sys::Oid),
    Dropped,
    PredecessorDropped,
    /// It is a partition of the captured table now.
    PredecessorAttached,
    /// The change log holds rows numbered above its sequence.
    LogAboveSequence(Source, i64),
    /// A partition is a foreign table, and that is news.
    Foreign,
    /// Partitions lack triggers, or those were disabled for a while.
    Partitions(Vec<(pg_sys::Oid, String)>),
    /// Triggers are on what is a partition no more.
    Detached(Vec<(pg_sys::Oid, String)>),
    /// Views of ours were replaced, or have another owner.
    Views(Vec<Adopted>),
    /// A superuser, for whom capture does not go on, has got the table, and with it the trigger functions.
    /// They belong to the role of before, whose code they may run.
    Functions(Owner),
    /// Triggers, their functions, tables of ours or columns are not as they should be.
    Incomplete,
    /// Triggers are new, as those of a new partition, and not noted yet.
    Unnoted,
}

fn damage() -> Result<Option<Damage>> {
    let Some(state) = captured::capture()? else { return Ok(None) };
    let named = relation::find_relation(&qualified(&state.schema, &state.table))?;
    if let Some(replacement) = named.filter(|oid| *oid != state.relation) {
        require_same_owner(&state, replacement)?;
        return Ok(Some(Damage::Replaced(replacement)));
    }
    let Some(table) = Table::find(state.relation)? else { return Ok(Some(Damage::Dropped)) };
    require_all_rows_seen(&table)?;
    if let Some(error) = foreign_partition(state.relation)? {
        let settled = failing_triggers(state.relation)?.is_empty()
            && views::adopted()?.is_empty()
            && captured::capture_error()?.is_some_and(|noted| noted.contains(&error.to_string()));
        return Ok((!settled).then_some(Damage::Foreign));
    }
    if let Some(predecessor) = state.predecessor {
        if Table::find(predecessor)?.is_none() {
            return Ok(Some(Damage::PredecessorDropped));
        }
        if relation::relation_tree(state.relation)?.contains(&predecessor) {
            return Ok(Some(Damage::PredecessorAttached));
        }
    }
    let ours = builtin::relations(&reports::rollups()?);
    if relation::any_missing(ours.iter().map(|name| qualified(SCHEMA, name)).collect())? {
        return Ok(Some(Damage::Incomplete));
    }
    if let Some(source) = sources::source(CHANGE_LOG)? {
        let log = relation::relation_name(source.relation)?;
        if let Some(top) = log_above_sequence(&log, source.sequence)? {
            return Ok(Some(Damage::LogAboveSequence(source, top)));
        }
    }
    let (known, owner) = (state.owner.map(Owner::role), Owner::role(table.owner_oid));
    if known != Some(owner) {
        return match known {
            Some(known) if !known.may_pass_to(owner)? => match known.name().is_ok() && any_of_another(known)?
            {
                true => Ok(Some(Damage::Functions(known))),
                false => state.owner().map(|_| None),
            },
            _ => Ok(Some(Damage::Incomplete)),
        };
    }
    if any_of_another(owner)? {
        return Ok(Some(Damage::Incomplete));
    }
    let missing = missing_triggers(state.relation)?;
    if captured_columns(&table)? != state.columns || missing.iter().any(|(oid, _)| *oid == state.relation) {
        return Ok(Some(Damage::Incomplete));
    }
    if !missing.is_empty() {
        return Ok(Some(Damage::Partitions(missing)));
    }
    let strays = views::strays(&table)?;
    if !strays.is_empty() {
        return Ok(Some(Damage::Views(strays)));
    }
    let left = left_behind(&state)?;
    if !left.is_empty() {
        return Ok(Some(Damage::Detached(left)));
    }
    Ok(any_unnoted()?.then_some(Damage::Unnoted))
}

/// Capture triggers on tables that the captured one does not have any more: what is written there is nobody's
/// spend now.
fn left_behind(state: &CaptureState) -> Result<Vec<(pg_sys::Oid, String)>> {
    let mut captured = vec![];
    for relation in state.relations() {
        captured.extend(relation::relation_tree(relation)?);
    }
    Ok(triggers()?.into_iter().filter(|(relation, _)| !captured.contains(relation)).collect())
}

/// The change log holds rows numbered above its sequence: it was set back, or a restore did not bring it.
/// `None`: it does not.
fn log_above_sequence(log: &str, sequence: pg_sys::Oid) -> Result<Option<i64>> {
    // Only what is above the sequence is read: below, an old snapshot may keep millions of dead rows.
    let last = relation::last_value(sequence)?;
    let sql = format!("SELECT max(seq) FROM {log} WHERE seq > $1");
    let above = [last.unwrap_or(i64::MIN).into()];
    let Some(top) = spi::query(&sql, &above, |r| Ok(r.get::<i64>(1)?)).one()?.flatten() else {
        return Ok(None);
    };
    // Whatever the log shows was drawn before the sequence is read again.
    let last = relation::last_value(sequence)?;
    Ok(Some(top).filter(|top| last.is_none_or(|last| last < *top)))
}

/// Whoever else could take the name, and with it LiteLLM's views would show rows of theirs.
fn require_same_owner(state: &CaptureState, replacement: pg_sys::Oid) -> Result<()> {
    let (Some(table), Some(owner)) = (Table::find(replacement)?, state.owner) else { return Ok(()) };
    if table.owner_oid == owner {
        return Ok(());
    }
    let captured = Owner::role(owner).name()?;
    Err(Error::OtherOwner { relation: table.qualified(), owner: table.owner, expected: captured })
}

/// Mends what is wrong, under the attachment's lock. Looks again: what was seen before it may be out of date.
fn mend() -> Result<bool> {
    let (Some(state), Some(damage)) = (captured::capture()?, damage()?) else { return Ok(false) };
    match damage {
        Damage::Replaced(replacement) => {
            follow(&state, replacement)?;
            log::event(format_args!("{}.{} is another table now, and captured", state.schema, state.table));
        }
        Damage::Dropped => return Err(Error::NoTable(qualified(&state.schema, &state.table))),
        Damage::PredecessorDropped => {
            forget_predecessor()?;
            if let Some(state) = captured::capture()? {
                create_functions(&state)?;
            }
        }
        Damage::PredecessorAttached => take_in(&state)?,
        Damage::LogAboveSequence(source, top) => raise_sequence(&source, top)?,
        Damage::Foreign => suspend(&state)?,
        Damage::Partitions(missing) => {
            // In a row for each table.
            let mut partitions: Vec<pg_sys::Oid> = missing.iter().map(|(oid, _)| *oid).collect();
            partitions.dedup();
            adopt_partitions(&state)?;
            log::event(format_args!(
                "{} partitions without triggers are captured from now on",
                partitions.len()
            ));
        }
        Damage::Detached(left) => {
            let mut tables: Vec<pg_sys::Oid> = left.iter().map(|(relation, _)| *relation).collect();
            tables.dedup();
            // One that is in use keeps no other; all that are are waited for.
            let mode = pg_sys::AccessExclusiveLock;
            let free: Vec<_> = tables.iter().copied().filter(|oid| locks::try_lock(*oid, mode)).collect();
            if !free.is_empty() {
                tables = free;
            }
            locks::lock_exclusively(guc::lock_timeout(), tables.iter().copied())?;
            let left: Vec<_> = left.into_iter().filter(|(relation, _)| tables.contains(relation)).collect();
            drop_triggers(&left, &tables)?;
            for name in relation::relation_names(&tables)?.values() {
                log::event(format_args!("{name} is no partition any more, and not captured"));
            }
        }
        Damage::Views(strays) => {
            let Some(table) = Table::find(state.relation)? else { return Ok(false) };
            let mut lost = vec![];
            for adopted in &strays {
                lost.extend(views::settle(adopted, &table)?);
            }
            if !lost.is_empty() {
                let said = views::tell_lost(&lost, captured::capture_error()?.as_deref());
                captured::record_capture_error(Some(&said))?;
            }
        }
        Damage::Functions(owner) => give_functions(owner)?,
        Damage::Incomplete => drop(attach_locked(state.relation, None, false)?),
        Damage::Unnoted => note_triggers(&[])?,
    }
    Ok(true)
}

/// Nothing is captured while a foreign table is a partition: LiteLLM's statements come first. Its views are
/// its own again, over all rows. Once the partition is gone, triggers are missing, and everything is computed
/// again.
fn suspend(state: &CaptureState) -> Result<()> {
    let failing = failing_triggers(state.relation)?;
    if !failing.is_empty() {
        // In a step of its own: nobody else may be in the way of that.
        silence(&failing)?;
    } else {
        uncover_all(&state.source)?;
        if let Some(table) = Table::find(state.relation)? {
            views::restore(&table)?;
        }
    }
    if let Some(error) = foreign_partition(state.relation)? {
        captured::record_capture_error(Some(&Failure::from(error).text()))?;
    }
    Ok(())
}

/// The change log's sequence was set back below `to`. Rows that got low numbers meanwhile look merged and are
/// not, so a failure is counted that nobody has noted: once the writers of now have ended, everything is
/// computed again.
pub fn raise_sequence(source: &Source, to: i64) -> Result<()> {
    let sequence = relation::relation_name(source.sequence)?;
    spi::run(
        "SELECT pg_catalog.setval($1::regclass, $2)",
        &[sequence.into(), to.max(source.furthest).into()],
    )?;
    spi::run("SELECT pg_catalog.nextval('litellm_spend.capture_failures')", &[])
}

/// Partitions that are new, or whose triggers were dropped: their rows may have been written past us.
fn adopt_partitions(state: &CaptureState) -> Result<()> {
    fence::lock_rows(guc::lock_timeout(), "capture", "")?;
    // The table before its partitions, as for everybody who uses them: no deadlock.
    locks::lock_against_dropping(state.relation)?;
    let made = create_triggers(state)?;
    let missed = made.iter().filter(|(_, operation)| operation != MOVE);
    let mut partitions: Vec<pg_sys::Oid> = missed.map(|(oid, _)| *oid).collect();
    partitions.dedup();
    let owner = state.owner()?;
    for partition in partitions {
        // A partition of another role's may only be read through the table: then everything is computed
        // again.
        if Table::find(partition)?.is_some_and(|table| Owner::role(table.owner_oid) != owner) {
            return uncover_all(&state.source);
        }
        note_days_of(&relation::relation_name(partition)?, owner)?;
    }
    Ok(())
}

/// Notes the days of the rows that a table has brought: they are computed again, a day a transaction.
fn note_days_of(table: &str, owner: Owner) -> Result<()> {
    let sql = format!(
        "SELECT date_trunc('day', min(\"startTime\")), {} FROM {table}",
        next_midnight("max(\"startTime\")")
    );
    let ends = owner.fresh(&sql, &[], |r| Ok(r.get::<Timestamp>(1)?.zip(r.get::<Timestamp>(2)?)))?;
    ends.into_iter().flatten().try_for_each(|(first, end)| note_attached(first, end))
}

fn note_attached(first: Timestamp, end: Timestamp) -> Result<()> {
    spi::run(
        "INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation)
             VALUES ($1, $2, 'rebuild', 'ATTACH')",
        &[first.into(), end.into()],
    )
}

/// The replaced table is a partition of the captured one, whose rows are the truth without it. Rows that have
/// come to it through the table were taken for copies, and nobody can say which: once those who write with
/// the functions of before have ended, everything is computed again.
fn take_in(state: &CaptureState) -> Result<()> {
    unset_predecessor()?;
    create_functions(&attached()?)?;
    uncover_all(&state.source)?;
    locks::lock_against_writers(&relation::relation_tree(state.relation)?)?;
    log::event(format_args!("the replaced table is a partition of {}.{} now", state.schema, state.table));
    Ok(())
}

/// The name belongs to another table now (upstream's partition script renames and recreates it). Capture
/// moves there; the rows that it got meanwhile, except copies from the old table, go to the change log as one
/// batch. If some of its rows were captured before, because the old table is a partition of it, say, or it
/// had the name before, nobody can say which those are, and everything is computed again.
///
/// Where the old table is gone, it cannot be asked which rows are copies. Those that came with the new one
/// are, as after upstream's script that makes the table plain again: then its days are computed again, but
/// for those of which rows were left out.
fn follow(state: &CaptureState, replacement: pg_sys::Oid) -> Result<()> {
    let before = state.relation;
    let table = open(replacement)?;
    require_all_rows_seen(&table)?;
    let columns = captured_columns(&table)?;
    let tree = relation::relation_tree(replacement)?;
    let mut captured = state.relations().into_iter().chain(triggers()?.into_iter().map(|(oid, _)| oid));
    let was_captured = captured.any(|oid| tree.contains(&oid));
    if state.predecessor.is_some_and(|before| !tree.contains(&before)) {
        forget_predecessor()?;
    }
    let old = Table::find(state.relation)?;
    for relation in [Some(replacement), old.as_ref().map(|old| old.oid)].into_iter().flatten() {
        locks::lock_against_dropping(relation)?;
    }
    // 1. where its rows end: up to there only both tables together are the truth.
    let owner = Owner::of(replacement)?;
    let beside = old.as_ref().filter(|old| !tree.contains(&old.oid));
    let beside_name = beside.map(Table::qualified);
    let end = match (&beside_name, &old) {
        (Some(name), _) => {
            let _owner = owner.act();
            last_day_of(name, "startTime")?
        }
        (None, Some(_)) => None,
        (None, None) => last_day_of(&builtin::rollups()[0].live_view(), "date")?,
    };
    spi::run(
        "UPDATE litellm_spend.capture SET relation = $2, columns = $3, predecessor = $4, predecessor_end = $5
             WHERE source = $1",
        &[
            state.source.as_str().into(),
            replacement.into(),
            columns.into(),
            beside.map(|old| old.oid).into(),
            end.into(),
        ],
    )?;
    if old.is_none() {
        forget_predecessor()?;
    }
    let state = attached()?;
    create_functions(&state)?;
    if was_captured {
        uncover_all(&state.source)?;
    }
    // 2. its days, if it came with rows. Writers do not wait for that.
    let came_with_rows = old.is_none() && !was_captured && has_rows_from_before(replacement, owner)?;
    if came_with_rows {
        note_days_from_first(&table.qualified(), owner)?;
    }
    // 3. no writer from here on, so that each row is either in the gap or captured. They do not wait until
    //    many rows are read, as where copies of the old ones have come with the table.
    create_triggers(&state)?;
    if came_with_rows {
        // The gap is of those days.
    } else if beside.is_some() && !was_captured && size_of(&tree)? > LARGE_GAP {
        note_days_of(&table.qualified(), owner)?;
    } else if !was_captured {
        let capture = Capture { columns: &state.columns };
        owner.run(capture.insert_gap(&table.qualified(), beside_name.as_deref()))?;
    }
    // 4. and the policy of the name goes along, unless the new table has got its own.
    spi::run(
        "DELETE FROM litellm_spend.policy
             WHERE relation = $1 AND EXISTS (SELECT FROM litellm_spend.policy WHERE relation = $2)",
        &[before.into(), replacement.into()],
    )?;
    spi::run(
        "UPDATE litellm_spend.policy SET relation = $2 WHERE relation = $1",
        &[before.into(), replacement.into()],
    )
}

/// Whether a table has rows that are no younger than its name: written by the transaction that made or
/// renamed it, or before that. Its row type is renamed with it and, unlike its row of pg_class, not written
/// for grants or triggers. The first row answers as a rule; all are read where there is none.
fn has_rows_from_before(table: pg_sys::Oid, owner: Owner) -> Result<bool> {
    let named = spi::query(
        "SELECT t.xmin::text FROM pg_catalog.pg_class c JOIN pg_catalog.pg_type t ON t.oid = c.reltype
         WHERE c.oid = $1",
        &[table.into()],
        |r| spi::value::<String>(r, 1),
    )?;
    let Some(named) = named.into_iter().next() else { return Ok(false) };
    let sql = format!(
        "SELECT FROM {} WHERE pg_catalog.age(xmin) >= pg_catalog.age($1::pg_catalog.xid) LIMIT 1",
        relation::relation_name(table)?
    );
    owner.exists(&sql, &[named.into()])
}

/// Notes the days of a table's rows, as [`note_days_of`] does, and those to come, of which it may have rows
/// before they are captured.
fn note_days_from_first(table: &str, owner: Owner) -> Result<()> {
    let sql = format!("SELECT date_trunc('day', min(\"startTime\")) FROM {table}");
    let firsts = owner.fresh(&sql, &[], |r| Ok(r.get::<Timestamp>(1)?))?;
    firsts.into_iter().flatten().try_for_each(|first| note_attached(first, Timestamp::positive_infinity()))
}

/// The bytes of its rows that a table which replaces the captured one may have for the gap to be read while
/// its writers wait: about 8,000 rows of 2 kB.
const LARGE_GAP: i64 = 16 << 20;

fn size_of(tables: &[pg_sys::Oid]) -> Result<i64> {
    let sql =
        "SELECT coalesce(sum(pg_catalog.pg_relation_size(oid)), 0)::bigint FROM unnest($1::oid[]) AS oid";
    let sizes = spi::query(sql, &[tables.to_vec().into()], |r| spi::value::<i64>(r, 1))?;
    Ok(sizes.into_iter().sum())
}

/// The end of the last day of a relation, by its column `time`.
fn last_day_of(relation: &str, time: &str) -> Result<Option<Timestamp>> {
    let sql = format!("SELECT {} FROM {relation}", next_midnight(&format!("max(\"{time}\")::timestamp")));
    Ok(spi::fresh(&sql, &[], |r| Ok(r.get::<Timestamp>(1)?)).one()?.flatten())
}

/// The replaced table is gone: the days that it had rows of become history.
fn forget_predecessor() -> Result<()> {
    let end =
        spi::query("SELECT predecessor_end FROM litellm_spend.capture", &[], |r| Ok(r.get(1)?)).one()?;
    frozen::note(end.flatten(), "DROP TABLE")?;
    unset_predecessor()
}

fn unset_predecessor() -> Result<()> {
    let sql = "UPDATE litellm_spend.capture SET predecessor = NULL, predecessor_end = NULL";
    spi::run(sql, &[])
}

//! Detaches LiteLLM's spend log from the change log, and drops what was kept of it. What is kept belongs to
//! the table's owner, whoever attaches next.
//!
//! Lock on the user's table: ACCESS EXCLUSIVE, as DROP TRIGGER takes it, on the table and each partition;
//! last of all, after our own rows and the views (and, where the history goes too, the rollups' relations):
//! all these waits together have one lock_timeout. It is held for the DROPs, a fraction of a millisecond
//! each, for merging at most [`MOST`] rows, and where days were noted for repair at the last moment for
//! lock_timeout more and what a day takes. What was in the log and noted before is done before.

use crate::engine::rollup::{self, Merged};
use crate::error::{Error, Result};
use crate::guc;
use crate::litellm::attach::{grantees, hold_rollups, revoke};
use crate::litellm::backfill::OF_ALL_DAYS;
use crate::litellm::builtin;
use crate::litellm::capture::attached;
use crate::litellm::functions::{OPERATIONS, function_name};
use crate::litellm::repair;
use crate::litellm::reports;
use crate::litellm::triggers::{drop_triggers, triggers};
use crate::litellm::views::{self, Action};
use crate::server::locks::{self, Patience};
use crate::server::log;
use crate::server::relation::{self, Table};
use crate::server::session::{self, Elevated, Owner, attempt};
use crate::server::spi;
use crate::server::text::{SCHEMA, literal, qualified};
use crate::state::captured::{self, CaptureState};
use crate::state::definition::Definition;
use crate::state::fence;
use crate::state::restore;
use crate::state::rollups;
use crate::state::sources::{self, CHANGE_LOG};
use pgrx::prelude::*;
use std::time::{Duration, Instant};

/// Values of the log that may be left to merge when the table's lock is asked for, and the most that are
/// merged under it: 0.1 and 0.6 s (120 µs a row for all built-in rollups, hardly two rows of a group,
/// PostgreSQL 15, two busy cores, 2026-11).
const FEW: i64 = 1_000;
const MOST: i64 = 5_000;

pub fn detach(drop_history: bool) -> Result<Vec<Action>> {
    let _impatient = hold()?;
    let state = attached()?;
    let table = Table::find(state.relation)?;
    // 1. what is in the log, as far as that goes while it is written to, and what was not captured.
    if !drop_history {
        merge_most()?;
        repair_noted(REPAIRS)?;
    }
    // 2. the locks, in the order in which readers and writers take them: what is ours, then the table.
    let mut locked =
        views::in_place(&state.schema)?.into_iter().map(|(_, found)| found.oid).collect::<Vec<_>>();
    if drop_history {
        locked.extend(relations_of_rollups()?);
    }
    locked.extend(captured_tables(&state)?);
    if drop_history {
        locked.extend(relations_of_log()?);
    }
    locks::lock_exclusively(guc::lock_timeout(), locked.iter().copied())?;
    // 3. the rest, so that the rollups say what the live views said.
    if !drop_history {
        merge_rest()?;
        repair_noted(guc::lock_timeout().time)?;
        note_lost_failures()?;
    }
    // 4. LiteLLM's views read the table only; nothing captures it.
    let mut actions = match &table {
        Some(table) => views::restore(table)?,
        None => views::empty(&state.schema)?,
    };
    drop_triggers(&triggers()?, &locked)?;
    for operation in OPERATIONS {
        spi::run(&format!("DROP FUNCTION IF EXISTS {}()", function_name(operation)), &[])?;
    }
    let name = qualified(&state.schema, &state.table);
    let text = if table.is_some() { "no longer captured" } else { "was dropped before" };
    log::event(format_args!("{name}: {text}"));
    actions.push((format!("table {name}"), text.into()));
    // The owner may go on to read what is kept.
    let owner = table.as_ref().map(|table| Owner::role(table.owner_oid));
    for role in grantees()? {
        revoke(role, if Some(role) == owner { "INSERT" } else { "ALL" })?;
    }
    spi::run("DELETE FROM litellm_spend.capture", &[])?;
    if drop_history {
        actions.extend(drop_rollups()?);
    } else {
        rollups::keep_for(owner.map(Owner::oid).or(state.owner))?;
        actions.extend(settle_notes()?);
        let kept =
            reports::rollups()?.into_iter().map(|d| (format!("rollup {}", d.name), "kept as history".into()));
        actions.extend(kept);
    }
    Ok(actions)
}

/// How long days that were noted are repaired before the table is locked: meanwhile nothing is merged.
const REPAIRS: Duration = Duration::from_secs(60);

/// Repairs what is noted as not captured, for a while. Afterwards nobody could: what is
/// changed while nothing is captured may be retention's work, or not.
fn repair_noted(limit: Duration) -> Result<()> {
    let until = Instant::now() + limit;
    let noted = "SELECT FROM litellm_spend.dirty_range WHERE repair = 'rebuild' AND repaired_at IS NULL";
    while Instant::now() < until && spi::exists(noted, &[])? {
        match attempt(|| repair::step(Patience::of_call())) {
            Ok(true) => {}
            Ok(false) => break,
            // What stops repairs does not stop a detach.
            Err(failure) => {
                failure.unless_cancel();
                break;
            }
        }
    }
    Ok(())
}

/// Notes that failures have left their number and no note, if nobody has computed all again since: of which
/// days they were, or whether they were rolled back, cannot be said.
fn note_lost_failures() -> Result<()> {
    let sql = "INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation, message)
         SELECT '-infinity', 'infinity', 'rebuild', 'a statement', 'its failure could not be noted'
         FROM litellm_spend.capture c, litellm_spend.capture_failures f
         WHERE f.is_called AND f.last_value - c.failures_seen >
             (SELECT count(DISTINCT d.failure) FROM litellm_spend.dirty_range d
              WHERE d.failure > c.failures_seen AND d.failure <= f.last_value)";
    spi::run(sql, &[])
}

/// Keeps the notes of days that could not be put right, for the status and for who attaches again: of any day
/// while everything is being computed again. Frozen days stay so.
fn settle_notes() -> Result<Option<Action>> {
    spi::run(
        &format!(
            "UPDATE litellm_spend.dirty_range
                 SET repair = 'rebuild', unrepairable = true, repaired_at = clock_timestamp()
             WHERE repair = 'rebuild' AND repaired_at IS NULL OR {OF_ALL_DAYS}"
        ),
        &[],
    )?;
    spi::run("DELETE FROM litellm_spend.dirty_range WHERE repair <> 'freeze' AND NOT unrepairable", &[])?;
    let wrong = spi::query(
        "SELECT count(DISTINCT (range_start, range_end)) FROM litellm_spend.dirty_range WHERE unrepairable",
        &[],
        |r| spi::value::<i64>(r, 1),
    )?;
    let wrong = wrong.into_iter().find(|wrong| *wrong > 0);
    let text = |wrong| format!("{wrong} not captured that could not be put right; spend_health names them");
    Ok(wrong.map(|wrong| ("ranges of days".into(), text(wrong))))
}

/// Whether history is there that a detach has kept.
pub fn history_is_kept() -> Result<bool> {
    Ok(!relations_of_rollups()?.is_empty() || !relations_of_log()?.is_empty())
}

/// Drops what a detach has kept, unless somebody has attached a table to it while we waited.
pub fn forget_history() -> Result<Vec<Action>> {
    let _impatient = hold()?;
    if let Some(relation) = captured::captured_relations()?.first() {
        return Err(Error::CameBetween(relation::relation_name(*relation)?));
    }
    let locked: Vec<_> = relations_of_rollups()?.into_iter().chain(relations_of_log()?).collect();
    locks::lock_exclusively(guc::lock_timeout(), locked.iter().copied())?;
    drop_rollups()
}

/// Drops a report and what it knows; the other rollups stay.
pub fn drop_report(caller: pg_sys::Oid, name: &str) -> Result<()> {
    let require_right = || match captured::capture()? {
        Some(state) => session::require_owner(caller, state.relation),
        None => session::require_extension_owner(caller),
    };
    require_right()?;
    let _impatient = hold_rollups()?;
    // Another may have got the table while we waited.
    require_right()?;
    let report = reports::rollups()?.into_iter().find(|rollup| rollup.optional && rollup.name == name);
    let report = report.ok_or_else(|| Error::ReportNotMade(name.into()))?;
    locks::lock_exclusively(guc::lock_timeout(), relations_of(std::slice::from_ref(&report))?)?;
    spi::unless_needed(|| drop_rollup(&report))?;
    spi::run("DELETE FROM litellm_spend.rollup WHERE name = $1", &[name.into()])
}

/// From here on nobody attaches, merges, repairs or trims but we. Only rows of ours are locked by that, each
/// waited for within a limit: nothing later waits for one while it holds a table.
fn hold() -> Result<Elevated> {
    let impatient = hold_rollups()?;
    let log = format!("WHERE name = {}", literal(CHANGE_LOG));
    [("source", log.as_str()), ("capture", ""), ("dirty_range", "")]
        .into_iter()
        .try_for_each(|(table, condition)| fence::lock_rows(guc::lock_timeout(), table, condition))?;
    Ok(impatient)
}

/// The relations of those names that there are.
fn existing(names: impl IntoIterator<Item = String>) -> Result<Vec<pg_sys::Oid>> {
    let found: Vec<_> =
        names.into_iter().map(|name| relation::find_relation(&name)).collect::<Result<_>>()?;
    Ok(found.into_iter().flatten().collect())
}

/// The views and tables of the built-in rollups; a view before what it reads.
fn relations_of_rollups() -> Result<Vec<pg_sys::Oid>> {
    relations_of(&builtin::rollups())
}

fn relations_of(rollups: &[Definition]) -> Result<Vec<pg_sys::Oid>> {
    let daily = rollups.iter().filter_map(view_by_day);
    let (live, tables): (Vec<_>, Vec<_>) =
        rollups.iter().map(|rollup| (rollup.live_view(), rollup.table())).unzip();
    existing(daily.chain(live).chain(tables))
}

fn view_by_day(rollup: &Definition) -> Option<String> {
    builtin::by_day(&rollup.name).map(|name| qualified(SCHEMA, name))
}

/// The writers of the table come to these last.
fn relations_of_log() -> Result<Vec<pg_sys::Oid>> {
    existing([CHANGE_LOG, "retired", "change_log_seq"].map(|name| qualified(SCHEMA, name)))
}

/// The captured tables and all else that has our triggers; a table before its partitions.
fn captured_tables(state: &CaptureState) -> Result<Vec<pg_sys::Oid>> {
    let mut tables = vec![];
    for relation in state.relations() {
        if Table::find(relation)?.is_some() {
            tables.extend(relation::relation_tree(relation)?);
        }
    }
    for (relation, _) in triggers()? {
        if !tables.contains(&relation) {
            tables.push(relation);
        }
    }
    Ok(tables)
}

/// Locked before.
fn drop_rollups() -> Result<Vec<Action>> {
    spi::unless_needed(drop_relations)
}

fn drop_relations() -> Result<Vec<Action>> {
    let mut actions = vec![];
    for definition in builtin::rollups() {
        if drop_rollup(&definition)? {
            actions.push((format!("rollup {}", definition.name), "dropped with its history".into()));
        }
    }
    spi::run("DELETE FROM litellm_spend.dirty_range", &[])?;
    spi::run("DELETE FROM litellm_spend.rollup WHERE source = $1", &[CHANGE_LOG.into()])?;
    spi::run("DELETE FROM litellm_spend.source WHERE name = $1", &[CHANGE_LOG.into()])?;
    spi::run("DROP TABLE IF EXISTS litellm_spend.change_log, litellm_spend.retired", &[])?;
    spi::run("DROP SEQUENCE IF EXISTS litellm_spend.change_log_seq", &[])?;
    restore::mark(Patience::of_call())?;
    Ok(actions)
}

/// Says whether there was its table.
fn drop_rollup(definition: &Definition) -> Result<bool> {
    for view in view_by_day(definition).into_iter().chain([definition.live_view()]) {
        spi::run(&format!("DROP VIEW IF EXISTS {view}"), &[])?;
    }
    let there = relation::find_relation(&definition.table())?.is_some();
    if there {
        spi::run(&format!("DROP TABLE {}", definition.table()), &[])?;
    }
    Ok(there)
}

fn log() -> Result<Option<sources::Source>> {
    Ok(sources::sources()?.into_iter().find(|source| source.name == CHANGE_LOG))
}

/// How many values of the log are not merged.
fn unmerged() -> Result<i64> {
    let Some(log) = log()? else { return Ok(0) };
    Ok(relation::last_value(log.sequence)?.unwrap_or(log.merged_to) - log.merged_to)
}

/// Merges what is safe.
fn merge_log(patience: Patience) -> Result<()> {
    let Some(mut log) = log()? else { return Ok(()) };
    let safe = rollup::find_safe_end(&mut log, patience)?;
    for name in &log.rollups {
        while let Merged::Window(_) = rollup::merge(name, safe, guc::max_window(), patience)? {}
    }
    Ok(())
}

/// Merges while writers go on, until little is left or an open transaction is in the way: that has the table,
/// too, and is named when its lock is not to be had.
fn merge_most() -> Result<()> {
    let mut before = i64::MAX;
    loop {
        merge_log(Patience::of_call())?;
        let left = unmerged()?;
        if left <= FEW || left > before / 2 {
            return Ok(());
        }
        before = left;
    }
}

/// Merges what came since, whose writers are locked out. One that has just committed may not have given back
/// all its locks yet.
fn merge_rest() -> Result<()> {
    if unmerged()? <= MOST {
        merge_log(Patience::Until(Instant::now() + guc::lock_timeout().time))?;
    }
    match unmerged()? {
        0 => Ok(()),
        left => Err(Error::LogNotMerged { left }),
    }
}

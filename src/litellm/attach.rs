//! Attaches LiteLLM's spend log to the change log.
//!
//! Lock on the user's table, waited for at most `litellm_spend.lock_timeout`: SHARE ROW EXCLUSIVE on it and
//! each partition (writers wait, readers do not), from the creation of the triggers to the end of the
//! transaction: about a millisecond for each partition (400 of them: writers waited 0.5 s, two busy cores,
//! debug build, PostgreSQL 15, 2026-11). Everything else is done before. The same when reports are added, or
//! columns.
//!
//! Whose rights: the log, the ledger, the built-in rollups and their live views are ours, so that LiteLLM's
//! role can neither drop nor change them. The table's owner may add to the log and read it all
//! (`spend_log::grants_to_owner`).

use crate::engine::create;
use crate::error::{Error, Result};
use crate::guc;
use crate::litellm::backfill;
use crate::litellm::builtin;
use crate::litellm::capture;
use crate::litellm::detach;
use crate::litellm::functions::MOVE;
use crate::litellm::hours;
use crate::litellm::reports;
use crate::litellm::spend_log::{self, LOG_RELATIONS};
use crate::litellm::triggers;
use crate::litellm::views::{self, Action};
use crate::server::locks::{self, Patience};
use crate::server::log;
use crate::server::relation::{self, Table, open};
use crate::server::session::{self, Elevated, Owner};
use crate::server::spi;
use crate::server::text::{SCHEMA, qualified, quoted};
use crate::state::captured;
use crate::state::definition::Definition;
use crate::state::fence::{self, Fence};
use crate::state::restore::{self, HERE};
use crate::state::rollups;
use crate::state::sources::CHANGE_LOG;
use pgrx::prelude::*;
use std::time::{Duration, Instant};

/// How long the fences are waited for: a day of a backfill may take tens of seconds. Nothing of a user's is
/// locked yet, and nobody but the workers waits behind us.
const LONG_STEP: Duration = Duration::from_secs(60);

/// From here on nobody else attaches, or changes a built-in rollup, until the transaction ends. No later lock
/// is waited for longer than `litellm_spend.lock_timeout` while what it returns lives.
pub fn hold_rollups() -> Result<Elevated> {
    fence::require_attachment(Patience::of_call())?;
    // All of them together: what is had already is not merged meanwhile.
    let limit = session::callers_lock_timeout().map_or(LONG_STEP, |own| own.min(LONG_STEP));
    let deadline = Instant::now() + limit;
    for name in rollups::rollup_names(Some(CHANGE_LOG))? {
        let left = deadline.saturating_duration_since(Instant::now());
        let _within_step = Elevated::enter()?.impatient(left);
        // In the queue: a backfill goes from day to day without a pause. The row stays locked; we may merge
        // the rollup.
        drop(Fence::wait(&name)?);
    }
    Ok(Elevated::enter()?.impatient(guc::lock_timeout().time))
}

/// Without `reports` those stay that there are.
pub fn attach(
    caller: pg_sys::Oid,
    oid: pg_sys::Oid,
    subtract: Option<bool>,
    reports: bool,
) -> Result<Vec<Action>> {
    let _impatient = hold_rollups()?;
    // Another may have got it while we waited, or gets it before it is locked for the triggers.
    session::require_owner(caller, oid)?;
    take_up_history(caller, oid)?;
    let actions = attach_locked(oid, subtract, reports)?;
    session::require_owner(caller, oid)?;
    restore::mark(Patience::of_call())?;
    Ok(actions)
}

/// Whoever attaches may read what a detach has kept, and replace it. So it is for who may act for its owner,
/// or, where nobody knows whose it is, for the extension's owner.
fn take_up_history(caller: pg_sys::Oid, table: pg_sys::Oid) -> Result<()> {
    if captured::capture()?.is_some() || !detach::history_is_kept()? {
        return Ok(());
    }
    let heir = Owner::role(open(table)?.owner_oid);
    let owner = rollups::kept_for()?;
    // One that was dropped has no rights left.
    let name = owner.and_then(|owner| relation::role_name(owner).ok());
    let is_theirs = owner.map(|owner| session::may_act_for(caller, owner)).transpose()?;
    if is_theirs != Some(true) {
        session::require_extension_owner(caller).map_err(|error| match error {
            Error::NotExtensionOwner => Error::HistoryOfAnother { owner: name.clone() },
            error => error,
        })?;
    }
    if let (Some(owner), Some(_)) = (owner.map(Owner::role).filter(|owner| *owner != heir), name) {
        revoke(owner, "ALL")?;
    }
    rollups::keep_for(None)
}

/// What attach says of the table when it has made triggers, for which it keeps writers out.
pub const CAPTURING: &str = "capturing";

/// As attach(), for who holds the attachment's lock.
pub fn attach_locked(oid: pg_sys::Oid, subtract: Option<bool>, reports: bool) -> Result<Vec<Action>> {
    let table = open(oid)?;
    triggers::require_all_rows_seen(&table)?;
    let columns = capture::captured_columns(&table)?;
    triggers::require_no_foreign_partition(oid)?;
    let current = captured::capture()?;
    if let Some(current) = current.as_ref().filter(|current| current.relation != oid) {
        return Err(Error::AttachedElsewhere(qualified(&current.schema, &current.table)));
    }
    let subtract = subtract.unwrap_or(current.as_ref().is_some_and(|current| current.subtract));

    // 1. everything that needs no lock on the table.
    let mut actions = create_log()?;
    let mut complete = actions.is_empty();
    let history = !rollups::rollup_names(Some(CHANGE_LOG))?.is_empty();
    let here = reports::rollups()?;
    let wanted = builtin::rollups();
    let added = reports && here.len() < wanted.len();
    let rollups = if reports { wanted } else { here };
    for definition in &rollups {
        let (action, unchanged) = ensure_rollup(definition, history)?;
        actions.push(action);
        complete &= unchanged;
        reports::ensure_by_day(definition)?;
    }
    if !rollups.iter().any(|rollup| rollup.optional) {
        actions.push(("reports".into(), "not made: spend_attach(reports => true) makes them".into()));
    }
    // Unless capture has gone on without a gap, everything is computed again; days that have lost raw rows
    // meanwhile keep what the rollups say. Asked before the grants, without which there was a gap.
    let has_others = current.as_ref().is_some_and(|current| current.columns != columns);
    let has_gap = triggers::missing_triggers(oid)?.iter().any(|(_, operation)| operation != MOVE);
    complete &= current.is_some() && !has_others && !has_gap;
    store_state(&table, &columns, subtract)?;
    grant(Owner::of(oid)?, &rollups)?;
    if !complete {
        backfill::uncover_all(CHANGE_LOG)?;
    }
    actions.extend(views::adopt(&table)?);
    let state = capture::attached()?;
    actions.push(triggers::create_functions(&state)?);

    // 2. the triggers, last: from here on writers wait until the transaction ends.
    if added || has_others || has_gap {
        // A statement that captured with the function of before, for fewer rollups or columns or without a
        // right to, ends before a day that it wrote to is computed.
        locks::lock_against_writers(&relation::relation_tree(oid)?)?;
    }
    let text = if triggers::create_triggers(&state)?.is_empty() { "already capturing" } else { CAPTURING };
    if text == CAPTURING {
        log::event(format_args!("{} is captured from now on", table.qualified()));
    }
    actions.push((format!("table {}", table.qualified()), text.into()));
    Ok(actions)
}

/// Makes the change log and the ledger where they are missing.
fn create_log() -> Result<Vec<Action>> {
    let mut actions = vec![];
    for (name, sql) in LOG_RELATIONS.into_iter().zip(spend_log::create_log_tables()) {
        let full = qualified(SCHEMA, name);
        if relation::find_relation(&full)?.is_none() {
            spi::run(&sql, &[])?;
            fence::revoke_on_relation(&full)?;
            actions.push((full, "created".into()));
        }
    }
    for sql in spend_log::DESCRIBE_LOG {
        spi::run(sql, &[])?;
    }
    // Not each time: it would wait for a dump, and keep LiteLLM's DELETEs waiting until we commit.
    let retired = qualified(SCHEMA, "retired");
    let full =
        "SELECT FROM pg_catalog.pg_class WHERE oid = pg_catalog.to_regclass($1) AND relreplident = 'f'";
    if !spi::exists(full, &[retired.as_str().into()])? {
        locks::lock_named(spend_log::IDENTIFY_RETIRED, &retired)?;
    }
    // A log that was dropped and made again goes on above what has been merged.
    spi::run(
        "SELECT pg_catalog.setval('litellm_spend.change_log_seq', merged)
             FROM (SELECT max(watermark) AS merged FROM litellm_spend.rollup WHERE source = $1) AS w,
                  litellm_spend.change_log_seq AS s
             WHERE merged > 0 AND (s.last_value < merged OR NOT s.is_called)",
        &[CHANGE_LOG.into()],
    )?;
    spi::run(
        &format!(
            "INSERT INTO litellm_spend.source (name, relation, sequence, origin)
             VALUES ($1, 'litellm_spend.change_log', 'litellm_spend.change_log_seq', {HERE})
             ON CONFLICT (name) DO UPDATE SET relation = excluded.relation, sequence = excluded.sequence"
        ),
        &[CHANGE_LOG.into()],
    )?;
    Ok(actions)
}

/// Makes a rollup's table, live view and state, or brings them up to the definition at hand. New measures
/// start as 0; days whose raw rows are gone keep that. With `history` there may be such days, and a report
/// that is made now knows nothing yet. Also says whether the other rollups need not be computed again.
fn ensure_rollup(definition: &Definition, history: bool) -> Result<(Action, bool)> {
    let name = definition.name.as_str();
    let stored = spi::query(
        "SELECT definition::text, source FROM litellm_spend.rollup WHERE name = $1",
        &[name.into()],
        |r| Ok((r.get::<String>(1)?, r.get::<String>(2)?)),
    )?;
    if stored.iter().any(|(_, source)| source.as_deref() != Some(CHANGE_LOG)) {
        // The user's own rollup has the name of one that a newer version brings.
        return Err(Error::Exists(name.into()));
    }
    let stored = stored.into_iter().next().and_then(|(text, _)| text);
    let stored = stored.and_then(|text| serde_json::from_str::<Definition>(&text).ok());
    // An upgraded server keeps the key that the table has.
    let key = stored.as_ref().map_or(definition.key, |stored| stored.key);
    let definition = &Definition { key, ..definition.clone() };
    let table = definition.table();
    let mut action = "already there";
    match Table::named(&table)? {
        None => {
            create::make_tables(definition)?;
            action = "created";
        }
        Some(found) => {
            for measure in &definition.measures {
                if found.type_of(&measure.column.name).is_none() {
                    let column = measure.table_column();
                    spi::run(&format!("ALTER TABLE {table} ADD COLUMN {column}"), &[])?;
                    action = "columns added";
                }
            }
        }
    }
    // Replacing a view locks its readers out for a moment: only when it changes.
    let exists = relation::find_relation(&definition.live_view())?.is_some();
    if action != "already there" || !exists || stored.as_ref() != Some(definition) {
        views::make_live(definition)?;
    }
    let new_report = action == "created" && definition.optional;
    if new_report {
        hours::begin_anew()?;
    }
    let later = new_report && history;
    // A new rollup begins at a watermark that is known to be safe.
    spi::run(
        "INSERT INTO litellm_spend.rollup (name, source, definition, watermark)
             SELECT $1, $2, $3::jsonb, coalesce(min(watermark), 0) FROM litellm_spend.rollup WHERE source = $2
             ON CONFLICT (name) DO UPDATE SET definition = excluded.definition",
        &[name.into(), CHANGE_LOG.into(), serde_json::to_string(definition)?.into()],
    )?;
    if later {
        rollups::forget(name)?;
    }
    Ok(((format!("rollup {name}"), action.into()), later || action == "already there"))
}

fn store_state(table: &Table, columns: &[String], subtract: bool) -> Result<()> {
    spi::run(
        &format!(
            "INSERT INTO litellm_spend.capture (source, table_schema, table_name, relation, owner, columns,
                 on_delete, origin,
                                           failures_seen)
             VALUES ($1, $2::name, $3::name, $4, $7, $5, $6, {HERE},
                 (SELECT CASE WHEN is_called THEN last_value ELSE 0 END
                                                          FROM litellm_spend.capture_failures))
             ON CONFLICT (source) DO UPDATE SET table_schema = excluded.table_schema,
                 table_name = excluded.table_name, owner = excluded.owner, columns = excluded.columns,
                 on_delete = excluded.on_delete,
                 last_error = NULL, last_error_at = NULL"
        ),
        &[
            CHANGE_LOG.into(),
            table.schema.as_str().into(),
            table.name.as_str().into(),
            table.oid.into(),
            columns.to_vec().into(),
            (if subtract { "subtract" } else { "keep" }).into(),
            table.owner_oid.into(),
        ],
    )
}

/// Gives the table's owner what capture and recomputing need, and takes it from whoever had it as the owner
/// before.
fn grant(owner: Owner, rollups: &[Definition]) -> Result<()> {
    for former in grantees()? {
        if former != owner {
            revoke(former, "ALL")?;
        }
    }
    let role = quoted(&owner.name()?);
    create::grant_step(&role)?;
    let rollups: Vec<String> = rollups.iter().map(Definition::table).collect();
    spend_log::grants_to_owner(&rollups, &role).iter().try_for_each(|sql| fence::grant(sql))
}

/// Who may add to the change log, and who may read columns of it: owners of the captured table and of
/// LiteLLM's views.
pub fn grantees() -> Result<Vec<Owner>> {
    let roles = spi::query(
        "SELECT DISTINCT x.grantee FROM pg_catalog.pg_attribute a, pg_catalog.aclexplode(a.attacl) AS x
             WHERE a.attrelid = pg_catalog.to_regclass('litellm_spend.change_log') AND x.grantee <> 0
             UNION SELECT x.grantee FROM pg_catalog.pg_class c, pg_catalog.aclexplode(c.relacl) AS x
             WHERE c.oid = pg_catalog.to_regclass('litellm_spend.change_log') AND x.grantee NOT IN (0, c.relowner)",
        &[],
        |r| spi::value::<pg_sys::Oid>(r, 1),
    )?;
    Ok(roles.into_iter().map(Owner::role).collect())
}

/// Takes from a role what attach gave it, and of the rollups what is said. It may go on to read the
/// watermark, which other rollups of its own may need.
pub fn revoke(role: Owner, of_rollups: &str) -> Result<()> {
    let role = quoted(&role.name()?);
    let tables = ["change_log", "retired", "dirty_range"].map(|name| (name.to_string(), "ALL"));
    let rollups = builtin::rollups().into_iter().map(|rollup| (rollup.table_name(), of_rollups));
    let sequences = ["change_log_seq", "capture_failures"].map(|name| (name.to_string(), "ALL"));
    for (name, privileges) in tables.into_iter().chain(rollups).chain(sequences) {
        let name = qualified(SCHEMA, &name);
        if relation::find_relation(&name)?.is_some() {
            fence::grant(&format!("REVOKE {privileges} ON {name} FROM {role}"))?;
        }
    }
    Ok(())
}

//! Attaches LiteLLM's spend log to the change log.
//!
//! Locks on the user's table, each waited for at most `litellm_spend.lock_timeout`:
//! - attach, and the watch when triggers are missing: SHARE ROW EXCLUSIVE on the table and each partition
//!   (writers wait, readers do not), from the creation of the triggers to the end of the transaction: about a
//!   millisecond for each partition (400 of them: writers waited 0.5 s, two busy cores, debug build,
//!   PostgreSQL 15, 2026-11). Everything else is done before. The same when reports are added.
//! - when a foreign table becomes a partition, by the statement that brings it, or by the watch: the same,
//!   for making the triggers harmless.
//! - the watch, when a partition was detached: ACCESS EXCLUSIVE on that, for DROP TRIGGER.
//! - the watch, when the table was replaced: the same, for as long as it takes to read the rows that the new
//!   table got before we noticed. When the replaced table has become a partition of it: SHARE ROW
//!   EXCLUSIVE on both, for a moment.
//!
//! Whose rights: the log, the ledger, the built-in rollups and their live views are ours, so that LiteLLM's
//! role can neither drop nor change them; the trigger functions belong to the owner of the captured table,
//! who may add to the log and read it all (`spend_log::grants_to_owner`). Of what is done here as ourselves
//! to that owner's table, CREATE TRIGGER and DROP TRIGGER evaluate nothing of theirs; what reads a row of it
//! runs as its owner.

use crate::citus;
use crate::engine::declare;
use crate::error::{Error, Result};
use crate::guc::{self, LockLimit};
use crate::litellm::backfill;
use crate::litellm::builtin;
use crate::litellm::detach;
use crate::litellm::reports;
use crate::litellm::spend_log::{self, Capture, LOG_RELATIONS, MOVE, OPERATIONS, Replaced, SPEND_LOGS};
use crate::litellm::views::{self, Action};
use crate::server::locks::{self, Patience};
use crate::server::log;
use crate::server::relation::{self, Table, open};
use crate::server::session::{self, Elevated, Owner};
use crate::server::spi;
use crate::server::text::{SCHEMA, literal, qualified, quoted};
use crate::state::captured::{self, CaptureState};
use crate::state::definition::Definition;
use crate::state::fence::{self, Fence};
use crate::state::restore::{self, HERE};
use crate::state::rollups;
use crate::state::sources::CHANGE_LOG;
use pgrx::prelude::*;
use std::time::Duration;

/// The table that a NULL source means: the attached one, or the one of LiteLLM's name that the caller's
/// search_path finds, or the only one of that name.
pub fn default_source() -> Result<pg_sys::Oid> {
    let name = quoted(SPEND_LOGS);
    let visible = relation::find_relation(&name)?;
    let _ourselves = Elevated::enter()?;
    if let Some(state) = captured::capture()?
        && Table::find(state.relation)?.is_some()
    {
        return Ok(state.relation);
    }
    match (visible, candidates()?.as_slice()) {
        (Some(oid), _) => Ok(oid),
        (None, [(only, _)]) => Ok(*only),
        (None, []) => Err(Error::NoTable(name)),
        (None, several) => Err(Error::Ambiguous(several.iter().map(|(_, name)| name.clone()).collect())),
    }
}

/// The tables of LiteLLM's name in all schemas, by their qualified names.
fn candidates() -> Result<Vec<(pg_sys::Oid, String)>> {
    spi::current(
        "SELECT c.oid, n.nspname::text, c.relname::text
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relname = $1::name AND c.relkind IN ('r', 'p') AND c.relpersistence <> 't'
             ORDER BY n.nspname",
        &[SPEND_LOGS.into()],
        |r| {
            let (schema, name) = (spi::value::<String>(r, 2)?, spi::value::<String>(r, 3)?);
            Ok((spi::value(r, 1)?, qualified(&schema, &name)))
        },
    )
}

/// The tables that may be attached, or are, and for whose owners a role may not act: their names and owners.
pub fn tables_of_others(role: pg_sys::Oid) -> Result<Vec<(String, String)>> {
    let tables = match captured::capture()? {
        Some(state) => vec![state.relation],
        None => candidates()?.into_iter().map(|(oid, _)| oid).collect(),
    };
    let mut others = vec![];
    for oid in tables {
        let Some(table) = Table::find(oid)? else { continue };
        if session::require_owner(role, oid).is_err() {
            others.push((table.qualified(), table.owner));
        }
    }
    Ok(others)
}

/// The captured table.
pub fn attached() -> Result<CaptureState> {
    captured::capture()?.map_or_else(|| Err(not_attached()?), Ok)
}

/// That nothing is captured, and what to type.
pub fn not_attached() -> Result<Error> {
    let remedy = match candidates()?.as_slice() {
        [] => "Call spend_attach() when LiteLLM has made its tables.".into(),
        several => attach_one(several.iter().map(|(_, name)| name.as_str())),
    };
    Ok(Error::NotAttached { to: "any table".into(), remedy })
}

/// That a table is not the captured one, and what to type.
pub fn not_attached_to(relation: pg_sys::Oid) -> Result<Error> {
    let to = relation::relation_name(relation)?;
    let remedy = match captured::capture()? {
        Some(state) => format!(
            "Leave the table out for {}, which is attached; spend_rollup_create() declares a rollup over another.",
            qualified(&state.schema, &state.table)
        ),
        None if candidates()?.iter().any(|(oid, _)| *oid == relation) => attach_one([to.as_str()]),
        None => {
            "Call spend_rollup_create() to declare a rollup over it; spend_attach() is for LiteLLM's table."
                .into()
        }
    };
    Ok(Error::NotAttached { to, remedy })
}

/// The statement that attaches one of several tables.
fn attach_one<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let calls = names.into_iter().map(|name| format!("SELECT * FROM spend_attach({});", literal(name)));
    calls.collect::<Vec<_>>().join(" Or: ")
}

/// The columns of the table that can be captured; an error names one that is missing or of another type.
pub fn captured_columns(table: &Table) -> Result<Vec<String>> {
    let mut found = vec![];
    for expected in spend_log::source_columns() {
        match table.columns.iter().find(|(name, _)| name == expected.name) {
            Some((name, r#type)) if r#type == expected.r#type => found.push(name.clone()),
            Some((column, r#type)) => {
                return Err(Error::ColumnType {
                    relation: table.name.clone(),
                    column: column.clone(),
                    found: r#type.clone(),
                    expected: expected.r#type.into(),
                });
            }
            None if expected.required => {
                return Err(Error::NoColumn { relation: table.name.clone(), column: expected.name.into() });
            }
            None => {}
        }
    }
    Ok(found)
}

/// How long the fences are waited for: a day of a backfill may take tens of seconds. Nothing of a user's is
/// locked yet, and nobody but the workers waits behind us.
const LONG_STEP: Duration = Duration::from_secs(60);

/// From here on nobody else attaches, or changes a built-in rollup, until the transaction ends. No later lock
/// is waited for longer than `litellm_spend.lock_timeout` while what it returns lives.
pub fn hold_rollups() -> Result<Elevated> {
    fence::require_attachment(Patience::of_call())?;
    let within_step = Elevated::pinned().impatient(LONG_STEP);
    for name in rollups::rollup_names(Some(CHANGE_LOG))? {
        // In the queue: a backfill goes from day to day without a pause. The row stays locked; we may merge
        // the rollup.
        drop(Fence::wait(&name)?);
    }
    drop(within_step);
    Ok(Elevated::pinned().impatient(guc::lock_timeout().time))
}

/// Without `reports` those stay that there are.
pub fn attach(
    caller: pg_sys::Oid,
    oid: pg_sys::Oid,
    subtract: Option<bool>,
    reports: bool,
) -> Result<Vec<Action>> {
    let _impatient = hold_rollups()?;
    take_up_history(caller, oid)?;
    let actions = attach_locked(oid, subtract, reports)?;
    restore::mark()?;
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
    require_all_rows_seen(&table)?;
    let columns = captured_columns(&table)?;
    require_no_foreign_partition(oid)?;
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
    store_state(&table, &columns, subtract)?;
    grant(Owner::of(oid)?, &rollups)?;
    // Unless capture has gone on without a gap, everything is computed again; days that have lost raw rows
    // meanwhile keep what the rollups say.
    complete &= current.is_some_and(|current| current.columns == columns)
        && missing_triggers(oid)?.iter().all(|(_, operation)| operation == MOVE);
    if !complete {
        backfill::uncover_all(CHANGE_LOG)?;
    }
    actions.extend(views::adopt(&table)?);
    let state = attached()?;
    actions.push(create_functions(&state)?);

    // 2. the triggers, last: from here on writers wait until the transaction ends.
    if added {
        // A statement that captured with the function of before, for fewer rollups, ends before a day that it
        // wrote to is computed.
        locks::lock_against_writers(&relation::relation_tree(oid)?)?;
    }
    let text = if create_triggers(&state)? > 0 { CAPTURING } else { "already capturing" };
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
            spi::execute(&sql, &[])?;
            actions.push((full, "created".into()));
        }
    }
    for sql in spend_log::describe_log() {
        spi::execute(&sql, &[])?;
    }
    // Not each time: it would wait for a dump, and keep LiteLLM's DELETEs waiting until we commit.
    let retired = qualified(SCHEMA, "retired");
    let full =
        "SELECT FROM pg_catalog.pg_class WHERE oid = pg_catalog.to_regclass($1) AND relreplident = 'f'";
    if !spi::exists(full, &[retired.as_str().into()])? {
        locks::lock_named(spend_log::IDENTIFY_RETIRED, &retired)?;
    }
    // A log that was dropped and made again goes on above what has been merged.
    spi::execute(
        &format!(
            "SELECT pg_catalog.setval('{SCHEMA}.change_log_seq', merged)
             FROM (SELECT max(watermark) AS merged FROM {SCHEMA}.rollup WHERE source = $1) AS w,
                  {SCHEMA}.change_log_seq AS s
             WHERE merged > 0 AND (s.last_value < merged OR NOT s.is_called)"
        ),
        &[CHANGE_LOG.into()],
    )?;
    spi::execute(
        &format!(
            "INSERT INTO {SCHEMA}.source (name, relation, sequence, origin)
             VALUES ($1, '{SCHEMA}.change_log', '{SCHEMA}.change_log_seq', {HERE})
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
        &format!("SELECT definition::text, source FROM {SCHEMA}.rollup WHERE name = $1"),
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
            for sql in definition.create_table() {
                spi::execute(&sql, &[])?;
            }
            action = "created";
        }
        Some(found) => {
            for measure in &definition.measures {
                if !found.columns.iter().any(|(name, _)| *name == measure.column.name) {
                    let column = measure.table_column();
                    spi::execute(&format!("ALTER TABLE {table} ADD COLUMN {column}"), &[])?;
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
    let later = action == "created" && definition.optional && history;
    // A new rollup begins at a watermark that is known to be safe.
    spi::execute(
        &format!(
            "INSERT INTO {SCHEMA}.rollup (name, source, definition, watermark)
             SELECT $1, $2, $3::jsonb, coalesce(min(watermark), 0) FROM {SCHEMA}.rollup WHERE source = $2
             ON CONFLICT (name) DO UPDATE SET definition = excluded.definition"
        ),
        &[name.into(), CHANGE_LOG.into(), serde_json::to_string(definition)?.into()],
    )?;
    if later {
        rollups::forget(name)?;
    }
    Ok(((format!("rollup {name}"), action.into()), later || action == "already there"))
}

fn store_state(table: &Table, columns: &[String], subtract: bool) -> Result<()> {
    spi::execute(
        &format!(
            "INSERT INTO {SCHEMA}.capture (source, table_schema, table_name, relation, owner, columns,
                 on_delete, origin,
                                           failures_seen)
             VALUES ($1, $2::name, $3::name, $4, $7, $5, $6, {HERE},
                 (SELECT CASE WHEN is_called THEN last_value ELSE 0 END
                                                          FROM {SCHEMA}.capture_failures))
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
    )?;
    Ok(())
}

pub fn create_functions(state: &CaptureState) -> Result<Action> {
    let named = |oid: pg_sys::Oid| Ok::<_, Error>((oid.to_u32(), relation::relation_name(oid)?));
    let replaced = match state.predecessor {
        Some(predecessor) => {
            Some(Replaced { table: named(state.relation)?, predecessor: named(predecessor)? })
        }
        None => None,
    };
    let owner = quoted(&state.owner()?.name()?);
    let before = functions()?;
    let rollups = reports::rollups()?;
    let capture = Capture { columns: &state.columns };
    for (name, body) in capture.functions(&builtin::read_by(&rollups), state.subtract, replaced.as_ref()) {
        spi::execute(&spend_log::create_function(&name, &body), &[])?;
        fence::grant(&format!("REVOKE ALL ON FUNCTION {name}() FROM PUBLIC"))?;
        spi::execute(&format!("ALTER FUNCTION {name}() OWNER TO {owner}"), &[])?;
    }
    let text =
        if functions()? == before { "already there" } else { "made for the table's columns and owner" };
    Ok((format!("functions {SCHEMA}.capture_*"), text.into()))
}

/// What the trigger functions do, and whose they are.
fn functions() -> Result<Vec<(String, String, pg_sys::Oid)>> {
    let sql = format!(
        "SELECT proname::text, prosrc, proowner FROM pg_catalog.pg_proc
         WHERE pronamespace = '{SCHEMA}'::pg_catalog.regnamespace AND proname LIKE 'capture\\_%' ORDER BY 1"
    );
    spi::query(&sql, &[], |r| Ok((spi::value(r, 1)?, spi::value(r, 2)?, spi::value(r, 3)?)))
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
    declare::grant_step(&role)?;
    let rollups: Vec<String> = rollups.iter().map(Definition::table).collect();
    spend_log::grants_to_owner(&rollups, &role).iter().try_for_each(|sql| fence::grant(sql))
}

/// Who may add to the change log, and who may read columns of it: owners of the captured table and of
/// LiteLLM's views.
pub fn grantees() -> Result<Vec<Owner>> {
    let roles = spi::query(
        &format!(
            "SELECT DISTINCT x.grantee FROM pg_catalog.pg_attribute a, pg_catalog.aclexplode(a.attacl) AS x
             WHERE a.attrelid = pg_catalog.to_regclass('{SCHEMA}.change_log') AND x.grantee <> 0
             UNION SELECT x.grantee FROM pg_catalog.pg_class c, pg_catalog.aclexplode(c.relacl) AS x
             WHERE c.oid = pg_catalog.to_regclass('{SCHEMA}.change_log') AND x.grantee NOT IN (0, c.relowner)"
        ),
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

/// Creates the triggers that are missing on the table and its partitions. Returns how many.
pub fn create_triggers(state: &CaptureState) -> Result<usize> {
    let missing = missing_triggers(state.relation)?;
    lock_for_triggers(&missing)?;
    require_no_foreign_partition(state.relation)?;
    let keys = relation::partition_keys(&relation::relation_tree(state.relation)?)?;
    put_triggers(&missing, |operation, table| Capture::trigger(operation, table, &keys))?;
    Ok(missing.len())
}

/// Keeps the writers out of the tables of triggers, which are in a row for each table.
fn lock_for_triggers(triggers: &[(pg_sys::Oid, String)]) -> Result<()> {
    let mut tables: Vec<pg_sys::Oid> = triggers.iter().map(|(relation, _)| *relation).collect();
    tables.dedup();
    locks::lock_against_writers(&tables)
}

/// Makes triggers of operations anew, on tables that are locked.
fn put_triggers(triggers: &[(pg_sys::Oid, String)], make: impl Fn(&str, &str) -> String) -> Result<()> {
    let tables: Vec<pg_sys::Oid> = triggers.iter().map(|(relation, _)| *relation).collect();
    let names = relation::relation_names(&tables)?;
    for (relation, operation) in triggers {
        let name = names.get(relation).ok_or_else(|| Error::NoTable(relation.to_u32().to_string()))?;
        spi::execute(&make(operation, name), &[])?;
    }
    Ok(())
}

/// A statement fires the triggers of the table that it names: not those of one that inherits from it, nor of
/// a shard's on another node.
pub fn require_all_rows_seen(table: &Table) -> Result<()> {
    citus::require_not_distributed(table.oid)?;
    let Some(parent) = relation::parent(table.oid)? else { return Ok(()) };
    Err(Error::HasParent { table: table.qualified(), parent: relation::relation_name(parent)? })
}

/// A transition table takes no rows from a foreign partition: the statement that changes one fails.
pub fn require_no_foreign_partition(relation: pg_sys::Oid) -> Result<()> {
    foreign_partition(relation)?.map_or(Ok(()), Err)
}

/// Why the table cannot be captured, if it has such a partition.
pub fn foreign_partition(relation: pg_sys::Oid) -> Result<Option<Error>> {
    let Some(foreign) = relation::foreign_partition(relation)? else { return Ok(None) };
    let (table, foreign) = (relation::relation_name(relation)?, relation::relation_name(foreign)?);
    Ok(Some(Error::ForeignPartition { table, foreign }))
}

/// Triggers that would make a statement fail which reaches a foreign partition: a disabled one would as well.
/// The table before its partitions.
pub fn failing_triggers(relation: pg_sys::Oid) -> Result<Vec<(pg_sys::Oid, String)>> {
    let operations: Vec<String> = OPERATIONS.iter().map(|o| o.to_string()).collect();
    spi::query(
        "WITH RECURSIVE tree(oid, n) AS (SELECT * FROM unnest($1::oid[]) WITH ORDINALITY), above(oid) AS (
             SELECT c.oid FROM pg_catalog.pg_class c JOIN tree USING (oid) WHERE c.relkind = 'f'
             UNION SELECT i.inhparent FROM pg_catalog.pg_inherits i JOIN above ON i.inhrelid = above.oid)
         SELECT tree.oid, o.operation
         FROM above JOIN tree USING (oid) JOIN pg_catalog.pg_trigger t ON t.tgrelid = tree.oid
         JOIN unnest($2::text[]) AS o(operation) ON t.tgname = 'litellm_spend_capture_' || o.operation
         WHERE coalesce(t.tgoldtable, t.tgnewtable) IS NOT NULL
         ORDER BY tree.n",
        &[relation::relation_tree(relation)?.into(), operations.into()],
        |r| Ok((spi::value(r, 1)?, spi::value(r, 2)?)),
    )
}

/// Makes such triggers harmless.
pub fn silence(triggers: &[(pg_sys::Oid, String)]) -> Result<()> {
    lock_for_triggers(triggers)?;
    put_triggers(triggers, Capture::silent_trigger)
}

/// The same, if the captured table has any. What is not captured from here on is for the watch.
pub fn silence_failing() -> Result<()> {
    let Some(state) = captured::capture()? else { return Ok(()) };
    let failing = failing_triggers(state.relation)?;
    if failing.is_empty() { Ok(()) } else { silence(&failing) }
}

/// Locks rows of ours, by the name of their table, that will be changed while a user's table is locked:
/// whoever has them must not keep that locked, too.
pub fn lock_rows(limit: LockLimit, table: &str, condition: &str) -> Result<()> {
    let name = qualified(SCHEMA, table);
    let oid = relation::find_relation(&name)?.unwrap_or(pg_sys::InvalidOid);
    locks::lock_within(limit, &format!("SELECT FROM {name} {condition} FOR UPDATE"), &name, oid)
}

/// What says where the rows are.
const FOLLOWING: [&str; 3] = ["capture", "source", "policy"];

/// The right to [`follow`], before the table is locked.
pub fn prepare_to_follow(limit: LockLimit, old: pg_sys::Oid) -> Result<()> {
    let condition = format!("WHERE relation = {}::oid", old.to_u32());
    FOLLOWING.into_iter().try_for_each(|table| lock_rows(limit, table, &condition))
}

/// Capture and rollups go on where the rows are now.
pub fn follow(old: pg_sys::Oid, new: pg_sys::Oid) -> Result<()> {
    for table in FOLLOWING {
        let sql = format!("UPDATE {SCHEMA}.{table} SET relation = $2 WHERE relation = $1");
        spi::execute(&sql, &[old.into(), new.into()])?;
    }
    let Some(state) = captured::capture()?.filter(|state| state.relation == new) else { return Ok(()) };
    if state.predecessor.is_some() {
        // The trigger functions name the table, too.
        create_functions(&state)?;
    }
    create_triggers(&state).map(drop)
}

/// Our triggers: their tables and names.
pub fn triggers() -> Result<Vec<(pg_sys::Oid, String)>> {
    let functions: Vec<String> = OPERATIONS.iter().map(|o| spend_log::function_name(o)).collect();
    spi::query(
        "SELECT tgrelid, tgname::text FROM pg_catalog.pg_trigger
         WHERE tgfoid IN (SELECT pg_catalog.to_regproc(name) FROM unnest($1::text[]) AS name)",
        &[functions.into()],
        |r| Ok((spi::value(r, 1)?, spi::value(r, 2)?)),
    )
}

/// Drops capture triggers; one that is on none of the tables that are locked has come between.
pub fn drop_triggers(triggers: &[(pg_sys::Oid, String)], locked: &[pg_sys::Oid]) -> Result<()> {
    let names = relation::relation_names(locked)?;
    for (relation, trigger) in triggers {
        let name = names.get(relation).ok_or_else(|| Error::CameBetween(trigger.clone()))?;
        spi::execute(&format!("DROP TRIGGER {} ON {name}", quoted(trigger)), &[])?;
    }
    Ok(())
}

/// The enabled capture triggers that the table and its partitions lack; the table first, as its users lock
/// it.
pub fn missing_triggers(relation: pg_sys::Oid) -> Result<Vec<(pg_sys::Oid, String)>> {
    missing_triggers_within(relation, relation)
}

/// Those that `relation`, which is a partition of the table or is to become one, and what inherits from it
/// lack.
pub fn missing_triggers_within(
    table: pg_sys::Oid,
    relation: pg_sys::Oid,
) -> Result<Vec<(pg_sys::Oid, String)>> {
    let operations: Vec<String> = OPERATIONS.iter().map(|o| o.to_string()).collect();
    let tree = relation::relation_tree(relation)?;
    let keys = match table == relation {
        true => relation::partition_keys(&tree)?,
        false => relation::partition_keys(&relation::relation_tree(table)?)?,
    };
    spi::query(
        &format!(
            "SELECT r.oid, o.operation
             FROM unnest($1::oid[]) WITH ORDINALITY AS r(oid, n) JOIN pg_catalog.pg_class c ON c.oid = r.oid
             CROSS JOIN unnest($2::text[]) AS o(operation)
             WHERE (o.operation <> '{MOVE}' OR c.relkind = 'r'
                 AND (SELECT relkind = 'p' FROM pg_catalog.pg_class WHERE oid = $3))
               AND NOT EXISTS (
                 SELECT FROM pg_catalog.pg_trigger t
                 WHERE t.tgrelid = r.oid AND t.tgname = 'litellm_spend_capture_' || o.operation
                   AND t.tgenabled IN ('O', 'A') AND t.tgqual IS NULL
                   AND t.tgfoid = pg_catalog.to_regproc('{SCHEMA}.capture_' || o.operation)
                   AND (o.operation <> '{MOVE}' OR $4 = ARRAY(
                       SELECT a.attname::text COLLATE \"C\" FROM pg_catalog.pg_attribute a
                       WHERE a.attrelid = r.oid AND a.attnum = ANY (t.tgattr) ORDER BY 1)))
             ORDER BY r.n"
        ),
        &[tree.into(), operations.into(), table.into(), keys.into()],
        |r| Ok((spi::value(r, 1)?, spi::value(r, 2)?)),
    )
}

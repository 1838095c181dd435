//! The triggers that capture, and their functions.
//!
//! Locks on the user's table, each waited for at most `litellm_spend.lock_timeout`:
//! - when triggers are made: SHARE ROW EXCLUSIVE on the table and each partition (writers wait, readers do
//!   not), until the transaction ends.
//! - when a foreign table becomes a partition, by the statement that brings it, or by the watch: the same,
//!   for making the triggers harmless.
//! - when a partition was detached: ACCESS EXCLUSIVE on that, for DROP TRIGGER.
//!
//! Whose rights: the functions belong to the owner of the captured table. Of what is done here as ourselves
//! to that owner's table, CREATE TRIGGER and DROP TRIGGER evaluate nothing of theirs; what reads a row of it
//! runs as its owner.

use crate::citus;
use crate::error::{Error, Result};
use crate::litellm::builtin;
use crate::litellm::capture::columns_of_predecessor;
use crate::litellm::functions::{self, MOVE, OPERATIONS, Replaced, function_name};
use crate::litellm::reports;
use crate::litellm::spend_log::{Capture, may_capture};
use crate::litellm::views::Action;
use crate::server::locks;
use crate::server::relation::{self, Table};
use crate::server::session::Owner;
use crate::server::spi::{self, Found};
use crate::server::text::{SCHEMA, qualified, quoted};
use crate::state::captured::{self, CaptureState};
use crate::state::fence;
use pgrx::prelude::*;

/// Makes the trigger functions of the table, for its owner.
pub fn create_functions(state: &CaptureState) -> Result<Action> {
    let named = |oid: pg_sys::Oid| Ok::<_, Error>((oid.to_u32(), relation::relation_name(oid)?));
    let replaced = match state.predecessor {
        Some(predecessor) => Some(Replaced {
            table: named(state.relation)?,
            predecessor: named(predecessor)?,
            columns: columns_of_predecessor(state)?,
        }),
        None => None,
    };
    let owner = quoted(&state.owner()?.name()?);
    let before = trigger_functions()?;
    let rollups = reports::rollups()?;
    let capture = Capture { columns: &state.columns };
    for (name, body) in capture.functions(&builtin::read_by(&rollups), state.subtract, replaced.as_ref()) {
        spi::run(&functions::create_function(&name, &body), &[])?;
        fence::revoke_on_function(&format!("{name}()"))?;
        spi::run(&format!("ALTER FUNCTION {name}() OWNER TO {owner}"), &[])?;
    }
    let text = if trigger_functions()? == before {
        "already there"
    } else {
        "made for the table's columns and owner"
    };
    Ok(("functions litellm_spend.capture_*".into(), text.into()))
}

/// What the trigger functions do, and whose they are.
fn trigger_functions() -> Result<Vec<(String, String, pg_sys::Oid)>> {
    let sql = "SELECT proname::text, prosrc, proowner FROM pg_catalog.pg_proc
         WHERE pronamespace = 'litellm_spend'::pg_catalog.regnamespace AND proname LIKE 'capture\\_%' ORDER BY 1";
    spi::query(sql, &[], |r| Ok((spi::value(r, 1)?, spi::value(r, 2)?, spi::value(r, 3)?)))
}

/// Whether a trigger function belongs to another role than it should.
pub fn any_of_another(owner: Owner) -> Result<bool> {
    Ok(trigger_functions()?.iter().any(|(.., found)| *found != owner.oid()))
}

/// Gives those to the owner as whom they captured.
pub fn give_functions(owner: Owner) -> Result<()> {
    let role = quoted(&owner.name()?);
    for (name, ..) in trigger_functions()?.into_iter().filter(|(.., found)| *found != owner.oid()) {
        let name = qualified(SCHEMA, &name);
        spi::run(&format!("ALTER FUNCTION {name}() OWNER TO {role}"), &[])?;
    }
    Ok(())
}

/// Creates the triggers that are missing on the table and its partitions, and returns them. The row of
/// `capture` is changed while they are locked: whoever calls has it already.
pub fn create_triggers(state: &CaptureState) -> Result<Vec<(pg_sys::Oid, String)>> {
    let missing = missing_triggers(state.relation)?;
    lock_for_triggers(&missing)?;
    require_no_foreign_partition(state.relation)?;
    let keys = relation::partition_keys(&relation::relation_tree(state.relation)?)?;
    put_triggers(&missing, |operation, table| Capture::trigger(operation, table, &keys))?;
    if !missing.is_empty() {
        note_triggers(&missing.iter().map(|(relation, _)| *relation).collect::<Vec<_>>())?;
    }
    Ok(missing)
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
        spi::run(&make(operation, name), &[])?;
    }
    Ok(())
}

/// A trigger `t` as it is noted. Tables keep their OIDs through pg_upgrade, triggers do not.
const NOTED: &str = "t.tgrelid::text || '/' || t.oid::text";

/// Notes who wrote our triggers last, by which is seen later that one was disabled and enabled again: that
/// writes it, and nothing else does but what makes it anew. Of those that are noted, only the ones of tables
/// that are locked: of others it may just have happened.
pub fn note_triggers(locked: &[pg_sys::Oid]) -> Result<()> {
    let functions = functions_of_triggers();
    let sql = format!(
        "UPDATE litellm_spend.capture SET triggers = (
             SELECT coalesce(jsonb_object_agg({NOTED}, coalesce(
                        CASE WHEN t.tgrelid <> ALL ($2) THEN triggers ->> ({NOTED}) END, t.xmin::text)), '{{}}')
             FROM pg_catalog.pg_trigger t
             WHERE t.tgfoid IN (SELECT pg_catalog.to_regproc(name) FROM unnest($1::text[]) AS name))"
    );
    spi::run(&sql, &[functions.into(), locked.to_vec().into()])
}

/// Whether a trigger of ours is not noted: whoever made it had seen to its table's rows.
pub fn any_unnoted() -> Result<bool> {
    let sql = format!(
        "SELECT FROM pg_catalog.pg_trigger t
         WHERE t.tgfoid IN (SELECT pg_catalog.to_regproc(name) FROM unnest($1::text[]) AS name)
             AND NOT pg_catalog.jsonb_exists($2::jsonb, {NOTED}) LIMIT 1"
    );
    spi::query(&sql, &[functions_of_triggers().into(), captured::noted_triggers()?.into()], |_| Ok(())).any()
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

/// Our triggers: their tables and names.
pub fn triggers() -> Result<Vec<(pg_sys::Oid, String)>> {
    spi::query(
        "SELECT tgrelid, tgname::text FROM pg_catalog.pg_trigger
         WHERE tgfoid IN (SELECT pg_catalog.to_regproc(name) FROM unnest($1::text[]) AS name)",
        &[functions_of_triggers().into()],
        |r| Ok((spi::value(r, 1)?, spi::value(r, 2)?)),
    )
}

fn functions_of_triggers() -> Vec<String> {
    OPERATIONS.iter().map(|o| function_name(o)).collect()
}

/// Drops capture triggers; one that is on none of the tables that are locked has come between.
pub fn drop_triggers(triggers: &[(pg_sys::Oid, String)], locked: &[pg_sys::Oid]) -> Result<()> {
    let names = relation::relation_names(locked)?;
    for (relation, trigger) in triggers {
        let name = names.get(relation).ok_or_else(|| Error::CameBetween(trigger.clone()))?;
        spi::run(&format!("DROP TRIGGER {} ON {name}", quoted(trigger)), &[])?;
    }
    Ok(())
}

/// The enabled capture triggers that the table and its partitions lack, or that may have been disabled since
/// they were made, or that cannot write what they capture; the table first, as its users lock it.
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
            "WITH able AS MATERIALIZED (
                 SELECT p.oid FROM pg_catalog.pg_proc p
                 WHERE p.oid IN (SELECT pg_catalog.to_regproc(name) FROM unnest($6::text[]) AS name) AND {})
             SELECT r.oid, o.operation
             FROM unnest($1::oid[]) WITH ORDINALITY AS r(oid, n) JOIN pg_catalog.pg_class c ON c.oid = r.oid
             CROSS JOIN unnest($2::text[]) AS o(operation)
             WHERE (o.operation <> '{MOVE}' OR c.relkind = 'r'
                 AND (SELECT relkind = 'p' FROM pg_catalog.pg_class WHERE oid = $3))
               AND NOT EXISTS (
                 SELECT FROM pg_catalog.pg_trigger t
                 WHERE t.tgrelid = r.oid AND t.tgname = 'litellm_spend_capture_' || o.operation
                   AND t.tgenabled IN ('O', 'A') AND t.tgqual IS NULL
                   AND coalesce($5::jsonb ->> ({NOTED}) = t.xmin::text, true)
                   AND t.tgfoid = pg_catalog.to_regproc('litellm_spend.capture_' || o.operation)
                   AND t.tgfoid IN (TABLE able)
                   AND (o.operation <> '{MOVE}' OR $4 = ARRAY(
                       SELECT a.attname::text COLLATE \"C\" FROM pg_catalog.pg_attribute a
                       WHERE a.attrelid = r.oid AND a.attnum = ANY (t.tgattr) ORDER BY 1)))
             ORDER BY r.n",
            may_capture("p.proowner")
        ),
        &[
            tree.into(),
            operations.into(),
            table.into(),
            keys.into(),
            captured::noted_triggers()?.into(),
            functions_of_triggers().into(),
        ],
        |r| Ok((spi::value(r, 1)?, spi::value(r, 2)?)),
    )
}

/// Capture and rollups go on where the rows are now.
pub fn follow(old: pg_sys::Oid, new: pg_sys::Oid) -> Result<()> {
    fence::move_notes(old, new)?;
    let Some(state) = captured::capture_of(new)? else { return Ok(()) };
    if state.predecessor.is_some() {
        // The trigger functions name the table, too.
        create_functions(&state)?;
    }
    create_triggers(&state).map(drop)
}

//! Rollups that a user declares over a table whose rows are numbered by a sequence, and the watermarks of those that
//! they fill themselves.
//!
//! A declared rollup belongs to the owner of its source, whoever calls: expressions, functions and triggers that run
//! in a merge then are that owner's, and run with no other rights. What we do as ourselves names types, functions and
//! columns of theirs, but looks at no row and evaluates nothing: the table and the aggregates are made empty and handed over; the
//! live view gets its query once it is theirs.
//!
//! Locks: ACCESS SHARE on the source until the call ends.

use crate::catalog::{self, Table};
use crate::declaration::{Declaration, Defined, MergeFunction, define};
use crate::definition::{Definition, SCHEMA, literal, quoted};
use crate::error::{Error, Result};
use crate::litellm::CHANGE_LOG;
use crate::locks::{self, Fence, Patience};
use crate::session::{self, Elevated, Owner, attempt};
use crate::source::{self, Notice, Numbering, advice, ensure_source, open_source};
use crate::{backfill, builtin, guc, rewrite, rollup};
use pgrx::prelude::*;

// ---- create ----------------------------------------------------------------------------------------------

/// `spend_rollup_create()`: the table, the live view and the watermark. Rows that are there already belong to the tail
/// until they are merged, so the view is exact from the start.
pub fn create(declaration: &Declaration) -> Result<Vec<Notice>> {
    let elevated = Elevated::enter()?;
    let (table, numbering) = open_source(elevated.caller(), declaration.source, declaration.sequence)?;
    check_name(&declaration.name)?;
    let Defined { definition, merge_functions, mut notices } = define(declaration, &table, &numbering)?;
    lock_names()?;
    require_free(&definition)?;
    // The name of a function of the owner's is only a name here: nothing of theirs is looked up before they merge.
    let unchecked = Elevated::enter()?.with(c"check_function_bodies", c"off");
    for merge in &merge_functions {
        let MergeFunction { aggregate, state, function } = merge;
        // It may not know what to do with the NULL that an aggregate begins with, or take more than two arguments.
        let body = literal(&format!(
            "SELECT CASE WHEN a IS NULL THEN b WHEN b IS NULL THEN a ELSE {function}(a, b) END"
        ));
        catalog::execute(
            &format!(
                "CREATE FUNCTION {aggregate} (a {state}, b {state}) RETURNS {state}
                 VOLATILE PARALLEL UNSAFE LANGUAGE sql AS {body}"
            ),
            &[],
        )?;
        catalog::execute(
            &format!(
                "CREATE AGGREGATE {aggregate} ({state}) (SFUNC = {aggregate}, STYPE = {state}, PARALLEL = UNSAFE)"
            ),
            &[],
        )?;
    }
    drop(unchecked);
    for sql in definition.create_table() {
        catalog::execute(&sql, &[])?;
    }
    let source = ensure_source(&table, &numbering)?;
    insert_rollup(&definition.name, &source, &table, &numbering, Some(&definition))?;
    let owner = Owner::of(table.oid)?;
    give_to_owner(&definition, owner)?;
    make_view(&definition, owner, &definition.live_query())?;
    notices.extend(advice(&table, &numbering)?);
    Ok(notices)
}

/// Gives a rollup and all that was made for it to the owner of its source, who also needs to read the watermark, as the
/// live view does.
fn give_to_owner(definition: &Definition, owner: Owner) -> Result<()> {
    let owner = quoted(&owner.name()?);
    backfill::grant_step(&owner)?;
    catalog::execute(&definition.grant_watermark(&owner), &[])?;
    for (aggregate, state) in definition.own_aggregates() {
        catalog::execute(&format!("ALTER AGGREGATE {aggregate} ({state}) OWNER TO {owner}"), &[])?;
        catalog::execute(&format!("ALTER FUNCTION {aggregate} ({state}, {state}) OWNER TO {owner}"), &[])?;
    }
    let name = definition.table();
    locks::lock_named(&format!("ALTER TABLE {name} OWNER TO {owner}"), &name)
}

/// Makes a rollup's live view, or gives it another query and owner. The query holds expressions of the owner's, so a view with
/// the same columns and no rows comes first, which only becomes the real one when it is theirs.
fn make_view(definition: &Definition, owner: Owner, query: &str) -> Result<()> {
    let name = definition.live_view();
    if catalog::find_relation(&name)?.is_none() {
        catalog::execute(&format!("CREATE VIEW {name} AS {}", definition.empty_query()), &[])?;
    }
    for comment in definition.comments() {
        catalog::execute(&comment, &[])?;
    }
    let owner = quoted(&owner.name()?);
    locks::lock_named(&format!("ALTER VIEW {name} OWNER TO {owner}"), &name)?;
    let view = catalog::find_relation(&name)?.ok_or(Error::NoTable(name))?;
    rewrite::replace(guc::lock_timeout(), view, query)
}

/// `spend_rollup_register()`: a watermark only. The rows that are there already are in its first windows.
pub fn register(
    name: &str,
    source: pg_sys::Oid,
    sequence: Option<pg_sys::Oid>,
    merged_to: Option<i64>,
) -> Result<Vec<Notice>> {
    let elevated = Elevated::enter()?;
    let (table, numbering) = open_source(elevated.caller(), source, sequence)?;
    if name.is_empty() {
        return Err(Error::Name { name: name.into(), longest: LONGEST_NAME });
    }
    lock_names()?;
    if catalog::rollup_exists(name)? {
        return Err(Error::Exists(name.into()));
    }
    let source = ensure_source(&table, &numbering)?;
    insert_rollup(name, &source, &table, &numbering, None)?;
    if let Some(merged_to) = merged_to {
        let last = catalog::last_value(numbering.sequence)?.unwrap_or(0);
        if merged_to > last {
            return Err(Error::NotMergedYet { merged_to, last });
        }
        catalog::execute(
            &format!("UPDATE {SCHEMA}.rollup SET watermark = $2, first_value = $2 WHERE name = $1"),
            &[name.into(), merged_to.into()],
        )?;
    }
    advice(&table, &numbering)
}

/// So that the name with `_rollup` is an identifier.
const LONGEST_NAME: usize = 56;

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > LONGEST_NAME {
        return Err(Error::Name { name: name.into(), longest: LONGEST_NAME });
    }
    Ok(())
}

/// Names are given by one transaction at a time, attach included.
fn lock_names() -> Result<()> {
    if locks::lock_attachment(Patience::of_call())? { Ok(()) } else { Err(Error::AttachmentBusy) }
}

fn require_free(definition: &Definition) -> Result<()> {
    if is_reserved(&definition.name) {
        return Err(Error::Reserved(definition.name.clone()));
    }
    if catalog::rollup_exists(&definition.name)? {
        return Err(Error::Exists(definition.name.clone()));
    }
    for name in [definition.table(), definition.live_view()] {
        if catalog::find_relation(&name)?.is_some() {
            return Err(Error::Exists(definition.name.clone()));
        }
    }
    Ok(())
}

/// Names that attach takes.
fn is_reserved(name: &str) -> bool {
    let mut indexes = builtin::DAILY_REPORTS.iter().map(|(_, hourly)| builtin::report_index(hourly));
    builtin::relations().iter().any(|relation| relation == name) || indexes.any(|index| index == name)
}

/// The watermark begins before the first row that there is, and before the first value that the sequence can give.
fn insert_rollup(
    name: &str,
    source: &str,
    table: &Table,
    numbering: &Numbering,
    definition: Option<&Definition>,
) -> Result<()> {
    let first = first_value(table, numbering)?;
    let definition = definition.map(serde_json::to_string).transpose()?;
    let last = catalog::last_value(numbering.sequence)?;
    catalog::execute(
        &format!(
            "INSERT INTO {SCHEMA}.rollup (name, source, definition, watermark, first_value, last_value, covered_from)
             SELECT $1, $2, $3::jsonb, start, start, greatest(start, $5), '-infinity'
             FROM (SELECT least(seqstart, $6) - 1 AS start FROM pg_catalog.pg_sequence WHERE seqrelid = $4) AS s"
        ),
        &[
            name.into(),
            source.into(),
            definition.into(),
            numbering.sequence.into(),
            last.into(),
            first.into(),
        ],
    )?;
    Ok(())
}

/// The lowest number of a row that is there. Row security may hide rows, of which nobody can say then; as long as it does, merges
/// fail, and the view shows its reader what that role may see.
fn first_value(table: &Table, numbering: &Numbering) -> Result<Option<i64>> {
    let sql = format!("SELECT min({})::bigint FROM {}", quoted(&numbering.column), table.qualified());
    let owner = Owner::of(table.oid)?;
    match attempt(|| owner.fresh(&sql, &[], |r| Ok(r.get::<i64>(1)?))) {
        Ok(firsts) => Ok(firsts.into_iter().next().flatten()),
        Err(failure) if failure.sqlstate == PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE => {
            Ok(Some(LOWEST))
        }
        Err(failure) => Err(Error::Failed(failure.unless_cancel())),
    }
}

/// Below every number that a sequence gives by itself. Half of the range: differences stay within it.
const LOWEST: i64 = i64::MIN / 4;

// ---- window and drop -------------------------------------------------------------------------------------

/// `spend_rollup_window()`: the next safe window of a registered rollup. The watermark advances in the caller's
/// transaction, together with whatever the caller writes.
pub fn next_window(caller: pg_sys::Oid, name: &str) -> Result<(i64, i64)> {
    // 1. lock the state row: the window belongs to one transaction at a time.
    let fence = Fence::wait(name)?;
    session::require_role(caller, fence.owner, name)?;
    if fence.definition.is_some() {
        return Err(Error::NotByHand(name.into()));
    }
    // 2. what is safe; the caller's next statement takes a snapshot after it.
    let mut source = catalog::source_of(name)?.ok_or_else(|| Error::SourceDropped(name.into()))?;
    rollup::check_not_set_back(&fence)?;
    let safe = rollup::find_safe_end(&mut source, Patience::None)?.max(fence.watermark);
    let end = rollup::window_end(fence.watermark, safe, guc::max_window());
    // 3. the watermark.
    if end > fence.watermark {
        fence.advance(end, None, 0.0)?;
    }
    Ok((fence.watermark + 1, end))
}

/// `spend_rollup_drop()`: the rollup with its history, or the watermark of one that is filled by hand.
pub fn drop_rollup(caller: pg_sys::Oid, name: &str) -> Result<()> {
    let fence = Fence::take(name, Patience::of_call())?.ok_or_else(|| Error::RollupBusy(name.into()))?;
    session::require_role(caller, fence.owner, name)?;
    if fence.is_built_in() {
        return Err(Error::BuiltIn(name.into()));
    }
    if let Some(definition) = &fence.definition {
        let view = definition.live_view();
        locks::lock_named(&format!("DROP VIEW IF EXISTS {view}"), &view)?;
        catalog::execute(&format!("DROP TABLE IF EXISTS {}", definition.table()), &[])?;
        for (aggregate, state) in definition.own_aggregates() {
            catalog::execute(&format!("DROP AGGREGATE IF EXISTS {aggregate} ({state})"), &[])?;
            catalog::execute(&format!("DROP FUNCTION IF EXISTS {aggregate} ({state}, {state})"), &[])?;
        }
    }
    catalog::execute(&format!("DELETE FROM {SCHEMA}.rollup WHERE name = $1"), &[name.into()])?;
    source::forget_unused_sources()
}

/// Looks after what became of the sources since the last look.
pub fn watch(patience: Patience) -> Result<bool> {
    Ok(release_dropped(patience)? | follow_owners(patience)?)
}

/// A rollup belongs to the owner of its source, who may have changed; a live view that was dropped is made again.
fn follow_owners(patience: Patience) -> Result<bool> {
    let strays = catalog::query(
        &format!(
            "SELECT r.name FROM {SCHEMA}.rollup r JOIN {SCHEMA}.source s ON s.name = r.source
             JOIN pg_catalog.pg_class c ON c.oid = s.relation
             JOIN pg_catalog.pg_class t ON t.relname = r.name || '_rollup' AND t.relnamespace = '{SCHEMA}'::regnamespace
             LEFT JOIN pg_catalog.pg_class v ON v.relname = r.name AND v.relnamespace = t.relnamespace
             WHERE s.name <> {} AND r.definition IS NOT NULL
               AND (t.relowner <> c.relowner OR v.relowner IS DISTINCT FROM c.relowner)
             ORDER BY r.name",
            literal(CHANGE_LOG)
        ),
        &[],
        |r| catalog::value::<String>(r, 1),
    )?;
    for name in &strays {
        let Some(fence) = Fence::take(name, patience)? else { continue };
        let Some(table) = Table::find(fence.relation)? else { continue };
        let (definition, owner) = (fence.filled()?, Owner::of(table.oid)?);
        if !Owner::role(fence.owner).may_pass_to(owner)? {
            // Its next merge says so.
            continue;
        }
        give_to_owner(definition, owner)?;
        make_view(definition, owner, &definition.live_query())?;
    }
    Ok(!strays.is_empty())
}

/// Sources that were dropped: their rollups keep what was merged, and their live views show that.
fn release_dropped(patience: Patience) -> Result<bool> {
    let gone = catalog::query(
        &format!(
            "SELECT r.name FROM {SCHEMA}.rollup r JOIN {SCHEMA}.source s ON s.name = r.source
             WHERE s.name <> {} AND NOT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = s.relation)
             ORDER BY r.name",
            literal(CHANGE_LOG)
        ),
        &[],
        |r| catalog::value::<String>(r, 1),
    )?;
    for name in &gone {
        let Some(fence) = Fence::take(name, patience)? else { continue };
        if let Some(definition) = &fence.definition
            && catalog::find_relation(&definition.table())?.is_some()
        {
            make_view(definition, Owner::role(fence.owner), &definition.history_query())?;
        }
        catalog::execute(
            &format!(
                "UPDATE {SCHEMA}.rollup SET source = NULL, last_error_at = clock_timestamp(),
                     last_error = 'its source was dropped; it keeps what had been merged'
                 WHERE name = $1"
            ),
            &[name.as_str().into()],
        )?;
    }
    if !gone.is_empty() {
        source::forget_unused_sources()?;
    }
    Ok(!gone.is_empty())
}

//! Rollups that a user declares over a table whose rows are numbered by a sequence, and the watermarks of
//! those that they fill themselves.
//!
//! A declared rollup belongs to the owner of its source, whoever calls: expressions, functions and triggers
//! that run in a merge then are that owner's, and run with no other rights. What we do as ourselves names
//! types, functions and columns of theirs, but looks at no row and evaluates nothing: the table and the
//! aggregates are made empty and handed over; the live view gets its query once it is theirs.
//!
//! Locks: ACCESS SHARE on the source until the call ends.

use crate::citus::spread;
use crate::engine::declaration::{Declaration, Defined, IS_OLD, MergeFunction, bring_over, define};
use crate::engine::rollup;
use crate::engine::source::{self, Notice, Numbering, advice, ensure_source, open_source};
use crate::engine::statements::MERGED_VALUE;
use crate::error::{Error, Result};
use crate::guc;
use crate::server::locks::{self, Patience};
use crate::server::relation::{self, Table};
use crate::server::rewrite;
use crate::server::session::{self, Elevated, Owner, advised, attempt};
use crate::server::spi;
use crate::server::text::{SCHEMA, literal, qualified, quoted};
use crate::state::definition::Definition;
use crate::state::fence::{self, Fence};
use crate::state::restore::{self, HERE};
use crate::state::rollups;
use crate::state::sources::{self, CHANGE_LOG};
use pgrx::prelude::*;

// ---- create ----------------------------------------------------------------------------------------------

/// `spend_rollup_create()`: the table, the live view and the watermark. Rows that are there already belong to
/// the tail until they are merged, so the view is exact from the start.
pub fn create(declaration: &Declaration) -> Result<Vec<Notice>> {
    let elevated = Elevated::enter()?;
    restore::require_over()?;
    source::require_sequence(declaration.sequence, false)?;
    let (table, numbering) = open_source(elevated.caller(), declaration.source, declaration.sequence)?;
    check_name(&declaration.name)?;
    let Defined { definition, merge_functions, mut notices } = define(declaration, &table, &numbering)?;
    fence::lock_name(&definition.name, table.oid)?;
    require_free(&definition)?;
    // The name of a function of the owner's is only a name here: nothing of theirs is looked up before they
    // merge.
    let unchecked = Elevated::enter()?.with(c"check_function_bodies", c"off");
    for merge in &merge_functions {
        let MergeFunction { aggregate, state, function } = merge;
        // It may not know what to do with the NULL that an aggregate begins with, or take more than two
        // arguments.
        let body = literal(&format!(
            "SELECT CASE WHEN a IS NULL THEN b WHEN b IS NULL THEN a ELSE {function}(a, b) END"
        ));
        spi::execute(
            &format!(
                "CREATE FUNCTION {aggregate} (a {state}, b {state}) RETURNS {state}
                 VOLATILE PARALLEL UNSAFE LANGUAGE sql AS {body}"
            ),
            &[],
        )?;
        spi::execute(
            &format!(
                "CREATE AGGREGATE {aggregate} ({state}) (SFUNC = {aggregate}, STYPE = {state}, PARALLEL = UNSAFE)"
            ),
            &[],
        )?;
    }
    drop(unchecked);
    for sql in definition.create_table() {
        spi::execute(&sql, &[])?;
    }
    let source = ensure_source(&table, &numbering)?;
    insert_rollup(&definition.name, &source, &table, &numbering, Some(&definition))?;
    let owner = Owner::of(table.oid)?;
    if let Some(distribution) = &definition.distribution {
        spread::distribute(&definition.table(), &distribution.dimension, &definition.source)?;
        spread::distribute(&definition.merged_table(), MERGED_VALUE, &definition.source)?;
    }
    give_to_owner(&definition, owner)?;
    if definition.distribution.is_some() {
        spread::await_end(&definition.name, &definition.table(), Patience::None)?;
        spread::require_by_shard(&definition.name, owner, &definition.merge_by_shard("0", "0"))?;
    }
    make_view(&definition, owner, &definition.live_query())?;
    notices.extend(advice(&table, &numbering)?);
    restore::mark()?;
    Ok(notices)
}

/// Whether role $1 was granted what the owner of a rollup needs of ours.
const HAS_GRANTS: &str = "
    SELECT count(*) = 5
    FROM (SELECT nspacl AS acl, 'USAGE' AS privilege FROM pg_catalog.pg_namespace
          WHERE oid = 'litellm_spend'::regnamespace
          UNION ALL SELECT proacl, 'EXECUTE' FROM pg_catalog.pg_proc
          WHERE oid = 'litellm_spend.backfill_step(regclass)'::regprocedure
          UNION ALL SELECT attacl, 'SELECT' FROM pg_catalog.pg_attribute
          WHERE attrelid = 'litellm_spend.rollup'::regclass AND attname IN ('name', 'watermark', 'committed_to')) AS ours
    WHERE EXISTS (SELECT FROM pg_catalog.aclexplode(acl) AS a WHERE a.grantee = $1
        AND a.privilege_type = privilege)";

/// Gives a rollup and all that was made for it to the owner of its source, who also needs to read the
/// watermark, as the live view does.
fn give_to_owner(definition: &Definition, owner: Owner) -> Result<()> {
    let oid = owner.oid();
    let owner = quoted(&owner.name()?);
    // Once for each owner: a grant waits for every other transaction that has granted.
    if spi::query(HAS_GRANTS, &[oid.into()], |r| spi::value::<bool>(r, 1))? != [true] {
        grant_step(&owner)?;
        fence::grant(&definition.grant_watermark(&owner))?;
    }
    for (aggregate, state) in definition.own_aggregates() {
        spi::execute(&format!("ALTER AGGREGATE {aggregate} ({state}) OWNER TO {owner}"), &[])?;
        spi::execute(&format!("ALTER FUNCTION {aggregate} ({state}, {state}) OWNER TO {owner}"), &[])?;
    }
    for name in definition.tables() {
        locks::lock_named(&format!("ALTER TABLE {name} OWNER TO {owner}"), &name)?;
    }
    let sql = format!("UPDATE {SCHEMA}.rollup SET owner = $2 WHERE name = $1");
    spi::execute(&sql, &[definition.name.as_str().into(), oid.into()]).map(drop)
}

/// Makes a rollup's live view, or gives it another query and owner. The query holds expressions of the
/// owner's, so a view with the same columns and no rows comes first, which only becomes the real one when it
/// is theirs.
fn make_view(definition: &Definition, owner: Owner, query: &str) -> Result<()> {
    let name = definition.live_view();
    if relation::find_relation(&name)?.is_none() {
        spi::execute(&format!("CREATE VIEW {name} AS {}", definition.empty_query()), &[])?;
    }
    for comment in definition.comments() {
        spi::execute(&comment, &[])?;
    }
    let owner = quoted(&owner.name()?);
    locks::lock_named(&format!("ALTER VIEW {name} OWNER TO {owner}"), &name)?;
    let view = relation::find_relation(&name)?.ok_or(Error::NoTable(name))?;
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
    restore::require_over()?;
    source::require_sequence(sequence, true)?;
    let (table, numbering) = open_source(elevated.caller(), source, sequence)?;
    if name.is_empty() {
        return Err(Error::Name { name: name.into(), longest: LONGEST_NAME });
    }
    fence::lock_name(name, table.oid)?;
    if rollups::rollup_exists(name)? {
        return Err(Error::RollupExists(name.into()));
    }
    let source = ensure_source(&table, &numbering)?;
    insert_rollup(name, &source, &table, &numbering, None)?;
    if let Some(merged_to) = merged_to {
        let last = relation::last_value(numbering.sequence)?.unwrap_or(0);
        if merged_to > last {
            return Err(Error::NotMergedYet { merged_to, last });
        }
        let sql = "SELECT seqmin FROM pg_catalog.pg_sequence WHERE seqrelid = $1 AND $2 < seqmin - 1";
        let args = [numbering.sequence.into(), merged_to.into()];
        if let Some(lowest) = spi::query(sql, &args, |r| spi::value::<i64>(r, 1))?.pop() {
            return Err(Error::BeforeFirst { merged_to, lowest });
        }
        spi::execute(
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

fn require_free(definition: &Definition) -> Result<()> {
    // What one is called, another may not be the table of, also while that is not there.
    let table_of = definition.name.strip_suffix("_rollup").map(str::to_string);
    for name in [definition.name.clone(), definition.table_name()].into_iter().chain(table_of) {
        if rollups::rollup_exists(&name)? {
            return Err(Error::Exists(definition.name.clone()));
        }
    }
    for name in definition.tables().into_iter().chain([definition.live_view()]) {
        if relation::find_relation(&name)?.is_some() {
            return Err(Error::Exists(definition.name.clone()));
        }
    }
    Ok(())
}

/// Lets the owner of a table CALL spend_backfill(), which is a procedure and runs with the caller's rights.
pub fn grant_step(owner: &str) -> Result<()> {
    fence::grant(&format!("GRANT USAGE ON SCHEMA {SCHEMA} TO {owner}"))?;
    fence::grant(&format!("GRANT EXECUTE ON FUNCTION {SCHEMA}.backfill_step(regclass) TO {owner}"))
}

/// The watermark begins before the first row that there is, and before the first value that the sequence can
/// give.
fn insert_rollup(
    name: &str,
    source: &str,
    table: &Table,
    numbering: &Numbering,
    definition: Option<&Definition>,
) -> Result<()> {
    let distributed = definition.is_some_and(|definition| definition.distribution.is_some());
    let first = match distributed {
        true => spread::first_value(table.oid, &numbering.column)?,
        false => first_value(table, numbering)?,
    };
    let definition = definition.map(serde_json::to_string).transpose()?;
    let last = relation::last_value(numbering.sequence)?;
    spi::execute(
        &format!(
            "INSERT INTO {SCHEMA}.rollup (name, source, definition, watermark, first_value, last_value,
                 covered_from, owner, committed_to, merged_at)
             SELECT $1, $2, $3::jsonb, start, start, greatest(start, $5), '-infinity',
                 CASE WHEN $3 IS NOT NULL THEN $7::oid END, CASE WHEN $8 THEN start END,
                 -- Its first window is awaited from now on, see Fence::note_call().
                 CASE WHEN $3 IS NULL THEN clock_timestamp() END
             FROM (SELECT least(seqstart, $6) - 1 AS start FROM pg_catalog.pg_sequence
                 WHERE seqrelid = $4) AS s"
        ),
        &[
            name.into(),
            source.into(),
            definition.into(),
            numbering.sequence.into(),
            last.into(),
            first.into(),
            table.owner_oid.into(),
            distributed.into(),
        ],
    )?;
    Ok(())
}

/// The lowest number of a row that is there. Row security may hide rows, of which nobody can say then; as
/// long as it does, merges fail, and the view shows its reader what that role may see.
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

/// `spend_rollup_window()`: the next safe window of a registered rollup. The watermark advances in the
/// caller's transaction, together with whatever the caller writes.
pub fn next_window(caller: pg_sys::Oid, name: &str) -> Result<(i64, i64)> {
    // 1. lock the state row: the window belongs to one transaction at a time.
    let fence = Fence::wait(name)?;
    session::require_role(caller, fence.owner, name)?;
    if fence.definition.is_some() {
        return Err(Error::NotByHand(name.into()));
    }
    // 2. what is safe; the caller's next statement takes a snapshot after it.
    let mut source = sources::source_of(name)?.ok_or_else(|| Error::SourceDropped(name.into()))?;
    rollup::check_not_set_back(&fence)?;
    let safe = rollup::find_safe_end(&mut source, Patience::None)?.max(fence.watermark);
    let end = rollup::window_end(fence.watermark, safe, guc::max_window());
    // 3. the watermark.
    match end > fence.watermark {
        true => fence.advance(end, None, 0.0)?,
        false => fence.note_call()?,
    }
    Ok((fence.watermark + 1, end))
}

/// `spend_rollup_drop()`: the rollup with its history, or the watermark of one that is filled by hand.
pub fn drop_rollup(caller: pg_sys::Oid, name: &str) -> Result<()> {
    let fence = match Fence::require(name, Patience::of_call()) {
        Err(Error::NoRollup(_)) => return drop_leftovers(caller, name),
        fence => fence?,
    };
    // Whoever asks: the owner of the captured table is not that of its rollups.
    if fence.is_built_in() {
        return Err(Error::BuiltIn(name.into()));
    }
    session::require_role(caller, fence.owner, name)?;
    fence::lock_name(name, fence.relation)?;
    if let Some(definition) = &fence.definition {
        spi::unless_needed(|| drop_relations(definition))?;
    }
    spi::execute(&format!("DELETE FROM {SCHEMA}.rollup WHERE name = $1"), &[name.into()])?;
    source::forget_unused_sources()?;
    restore::mark()
}

fn drop_relations(definition: &Definition) -> Result<()> {
    let view = definition.live_view();
    locks::lock_named(&format!("DROP VIEW IF EXISTS {view}"), &view)?;
    if definition.distribution.is_some() {
        // On a node nobody ends our wait for a lock.
        spread::await_end(&definition.name, &definition.table(), Patience::of_call())?;
    }
    for table in definition.tables() {
        locks::lock_named(&format!("DROP TABLE IF EXISTS {table}"), &table)?;
    }
    for (aggregate, state) in definition.own_aggregates() {
        spi::execute(&format!("DROP AGGREGATE IF EXISTS {aggregate} ({state})"), &[])?;
        spi::execute(&format!("DROP FUNCTION IF EXISTS {aggregate} ({state}, {state})"), &[])?;
    }
    Ok(())
}

/// Drops the view, the table and the aggregates of a rollup whose state is lost, as their owners.
fn drop_leftovers(caller: pg_sys::Oid, name: &str) -> Result<()> {
    // The functions are what the aggregates are made of.
    let functions = spi::query(
        &format!(
            "SELECT CASE prokind WHEN 'a' THEN 'AGGREGATE' ELSE 'FUNCTION' END, oid::regprocedure::text,
                 proowner
             FROM pg_catalog.pg_proc
             WHERE pronamespace = '{SCHEMA}'::regnamespace AND pg_catalog.starts_with(proname, $1 || '.')
             ORDER BY 1"
        ),
        &[name.into()],
        |r| Ok((spi::value::<String>(r, 1)?, spi::value::<String>(r, 2)?, spi::value::<pg_sys::Oid>(r, 3)?)),
    )?;
    let mut found = vec![];
    for (kind, word, suffix) in [("v", "VIEW", ""), ("r", "TABLE", "_rollup"), ("r", "TABLE", "_merged")] {
        let relation = Table::named(&qualified(SCHEMA, &format!("{name}{suffix}")))?;
        found.extend(relation.filter(|found| found.kind == kind).map(|found| (word, found)));
    }
    if found.is_empty() {
        return Err(Error::NoRollup(name.into()));
    }
    for (word, found) in found {
        session::require_role(caller, found.owner_oid, name)?;
        let relation = found.qualified();
        with_usage(Owner::role(found.owner_oid), |owner| {
            let _owner = owner.act();
            locks::lock(&format!("DROP {word} {relation}"), &relation, found.oid)
        })?;
    }
    for (word, signature, owner) in functions {
        session::require_role(caller, owner, name)?;
        with_usage(Owner::role(owner), |owner| owner.run(format!("DROP {word} {signature}")))?;
    }
    restore::mark()
}

/// Lets an owner use our schema for as long as `work` takes: a restore may not have come to its grants, or
/// was made without them. What fails takes that back with its transaction.
fn with_usage(owner: Owner, work: impl FnOnce(Owner) -> Result<()>) -> Result<()> {
    let sql = format!("SELECT pg_catalog.has_schema_privilege($1, '{SCHEMA}', 'USAGE')");
    if spi::query(&sql, &[owner.oid().into()], |r| spi::value::<bool>(r, 1))? == [true] {
        return work(owner);
    }
    let name = quoted(&owner.name()?);
    fence::grant(&format!("GRANT USAGE ON SCHEMA {SCHEMA} TO {name}"))?;
    work(owner)?;
    fence::grant(&format!("REVOKE USAGE ON SCHEMA {SCHEMA} FROM {name}"))
}

/// The rollups whose source was dropped or has another owner, or whose live view is gone, another's, or as an
/// older version made it. Only looks: what is to be done may call code of an owner's, and is a step of that
/// rollup's own.
pub fn strays() -> Result<Vec<String>> {
    spi::query(
        &format!(
            "SELECT r.name FROM {SCHEMA}.rollup r JOIN {SCHEMA}.source s ON s.name = r.source
             LEFT JOIN pg_catalog.pg_class c ON c.oid = s.relation
             LEFT JOIN pg_catalog.pg_class t ON t.relname = r.name || '_rollup'
                 AND t.relnamespace = '{SCHEMA}'::regnamespace
             LEFT JOIN pg_catalog.pg_class v ON v.relname = r.name AND v.relnamespace = t.relnamespace
             WHERE s.name <> {} AND s.origin = {HERE}
               AND (c.oid IS NULL OR r.definition IS NOT NULL AND t.oid IS NOT NULL
                    AND (t.relowner <> c.relowner OR v.relowner IS DISTINCT FROM c.relowner OR {IS_OLD}))
             -- One whose source was dropped before an update.
             UNION ALL
             SELECT r.name FROM {SCHEMA}.rollup r
             WHERE r.source IS NULL AND r.definition IS NOT NULL AND {IS_OLD}
               AND pg_catalog.to_regclass(pg_catalog.format('{SCHEMA}.%I', r.name || '_rollup')) IS NOT NULL
             ORDER BY 1",
            literal(CHANGE_LOG)
        ),
        &[],
        |r| spi::value::<String>(r, 1),
    )
}

/// Deals with one of them: it follows its source to another owner, gets its live view again or anew, or
/// becomes history.
pub fn settle(name: &str, patience: Patience) -> Result<()> {
    let Some(fence) = Fence::take(name, patience)? else { return Ok(()) };
    let Some(table) = Table::find(fence.relation)? else { return release(fence) };
    let (mut definition, known) = (fence.filled()?.clone(), Owner::role(fence.owner));
    let owner = Owner::of(table.oid)?;
    // 1. what has its names is its own. By name alone it could be another rollup's, or a user's.
    let tables = definition.tables();
    let tables = tables.iter().map(|name| require_own(name, "r", known)).collect::<Result<Vec<_>>>()?;
    if relation::find_relation(&definition.live_view())?.is_some() {
        require_own(&definition.live_view(), "v", known)?;
    }
    // 2. another owner gets it only if nothing of the former one's hangs on it, which would then run as the
    //    new one.
    if known != owner && (!known.may_pass_to(owner)? || !is_bare(&tables)?) {
        return Err(Error::OtherOwner {
            relation: table.qualified(),
            owner: table.owner,
            expected: known.name()?,
        });
    }
    give_to_owner(&definition, owner)?;
    // 3. the view.
    bring_over_noted(&mut definition)?;
    make_view(&definition, owner, &definition.live_query())
}

/// Brings a definition over that an older version made.
fn bring_over_noted(definition: &mut Definition) -> Result<()> {
    if bring_over(definition) {
        let sql = format!("UPDATE {SCHEMA}.rollup SET definition = $2::jsonb WHERE name = $1");
        let text = serde_json::to_string(&definition)?;
        spi::execute(&sql, &[definition.name.as_str().into(), text.into()])?;
    }
    Ok(())
}

fn require_own(name: &str, kind: &str, owner: Owner) -> Result<Table> {
    let found = Table::named(name)?.ok_or_else(|| Error::NoTable(name.into()))?;
    if found.kind == kind && Owner::role(found.owner_oid) == owner {
        return Ok(found);
    }
    Err(Error::OtherOwner { relation: name.into(), owner: found.owner, expected: owner.name()? })
}

/// Nothing is on the rollup's tables that we have not made: no trigger, rule, policy or CHECK, no index with
/// an expression but ours. (Citus has a trigger of the server's own kind on each distributed table.)
fn is_bare(tables: &[Table]) -> Result<bool> {
    let sql = "SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = ANY ($1) AND NOT tgisinternal
               UNION ALL SELECT FROM pg_catalog.pg_rewrite WHERE ev_class = ANY ($1)
               UNION ALL SELECT FROM pg_catalog.pg_policy WHERE polrelid = ANY ($1)
               UNION ALL SELECT FROM pg_catalog.pg_statistic_ext WHERE stxrelid = ANY ($1)
               UNION ALL SELECT FROM pg_catalog.pg_constraint WHERE conrelid = ANY ($1)
                   AND contype NOT IN ('p', 'u', 'n')
               UNION ALL SELECT FROM pg_catalog.pg_index i WHERE indrelid = ANY ($1)
                   AND (indexprs IS NOT NULL OR indpred IS NOT NULL)
                   AND EXISTS (SELECT FROM pg_catalog.pg_depend d
                       WHERE d.classid = 'pg_catalog.pg_class'::regclass
                               AND d.objid = i.indexrelid AND d.refclassid = 'pg_catalog.pg_proc'::regclass)";
    let tables: Vec<_> = tables.iter().map(|table| table.oid).collect();
    Ok(spi::query(sql, &[tables.into()], |_| Ok(()))?.is_empty())
}

/// The source was dropped: the rollup keeps what was merged, and its live view shows that.
fn release(mut fence: Fence) -> Result<()> {
    let owner = Owner::role(fence.owner);
    if let Some(definition) = &mut fence.definition
        && relation::find_relation(&definition.table())?.is_some()
    {
        require_own(&definition.table(), "r", owner)?;
        bring_over_noted(definition)?;
        make_view(definition, owner, &definition.history_query())?;
    }
    // A watermark belonged to the source's owner, whom nobody knows any more.
    let by = if fence.definition.is_none() { "  -- as a superuser" } else { "" };
    spi::execute(
        &format!(
            "UPDATE {SCHEMA}.rollup SET source = NULL, last_error_at = clock_timestamp(),
                 last_error = $2
             WHERE name = $1"
        ),
        &[
            fence.name.as_str().into(),
            advised(
                "its source was dropped; it keeps what had been merged",
                &format!("SELECT spend_rollup_drop({});{by}", literal(&fence.name)),
            )
            .into(),
        ],
    )?;
    source::forget_unused_sources()
}

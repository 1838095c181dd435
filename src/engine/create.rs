//! Makes rollups over a table whose rows are numbered by a sequence, and the watermarks of those that their
//! owners fill themselves.
//!
//! A declared rollup belongs to the owner of its source, whoever calls: expressions, functions and triggers
//! that run in a merge then are that owner's, and run with no other rights. What we do as ourselves names
//! types, functions and columns of theirs, but looks at no row and evaluates nothing: the table and the
//! aggregates are made empty and handed over; the live view gets its query once it is theirs.
//!
//! Locks: ACCESS SHARE on the source until the call ends.

use crate::citus::{self, spread};
use crate::engine::columns;
use crate::engine::define::{Defined, MergeFunction, Request, define};
use crate::engine::source::{self, Notice, Numbering, advice, ensure_source, open_source};
use crate::engine::statements::MERGED_VALUE;
use crate::error::{Error, Result};
use crate::guc;
use crate::server::locks::{self, Patience};
use crate::server::relation::{self, Table};
use crate::server::rewrite;
use crate::server::session::{Elevated, Owner, attempt};
use crate::server::spi::{self, Found};
use crate::server::text::{literal, quoted};
use crate::state::definition::Definition;
use crate::state::fence;
use crate::state::restore;
use crate::state::rollups;
use pgrx::prelude::*;

/// `spend_rollup_create()`: the table, the live view and the watermark. Rows that are there already belong to
/// the tail until they are merged, so the view is exact from the start.
pub fn create(request: &Request) -> Result<Vec<Notice>> {
    let elevated = Elevated::enter()?;
    restore::require_over()?;
    restore::begin()?;
    source::require_sequence(request.sequence, false)?;
    let (table, numbering) = open_source(elevated.caller(), request.source, request.sequence)?;
    check_name(&request.name)?;
    let Defined { definition, merge_functions, mut notices } = define(request, &table, &numbering)?;
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
        spi::run(
            &format!(
                "CREATE FUNCTION {aggregate} (a {state}, b {state}) RETURNS {state}
                 VOLATILE PARALLEL UNSAFE LANGUAGE sql AS {body}"
            ),
            &[],
        )?;
        spi::run(
            &format!(
                "CREATE AGGREGATE {aggregate} ({state}) (SFUNC = {aggregate}, STYPE = {state}, PARALLEL = UNSAFE)"
            ),
            &[],
        )?;
    }
    drop(unchecked);
    make_tables(&definition)?;
    let source = ensure_source(&table, &numbering)?;
    insert_rollup(&definition.name, &source, &table, &numbering, Some(&definition))?;
    let owner = Owner::role(table.owner_oid);
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
    require_permanent(&definition, &merge_functions)?;
    columns::note(&definition.name, table.oid)?;
    notices.extend(advice(&table, &numbering)?);
    restore::mark(Patience::of_call())?;
    Ok(notices)
}

/// Makes a rollup's tables, empty and for nobody else.
pub fn make_tables(definition: &Definition) -> Result<()> {
    for sql in definition.create_table() {
        spi::run(&sql, &[])?;
    }
    definition.tables().iter().try_for_each(|table| fence::revoke_on_relation(table))
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
pub fn give_to_owner(definition: &Definition, owner: Owner) -> Result<()> {
    let oid = owner.oid();
    let owner = quoted(&owner.name()?);
    // Once for each owner: a grant waits for every other transaction that has granted.
    if spi::query(HAS_GRANTS, &[oid.into()], |r| spi::value::<bool>(r, 1))? != [true] {
        grant_step(&owner)?;
        fence::grant(&definition.grant_watermark(&owner))?;
    }
    for (aggregate, state) in definition.own_aggregates() {
        spi::run(&format!("ALTER AGGREGATE {aggregate} ({state}) OWNER TO {owner}"), &[])?;
        spi::run(&format!("ALTER FUNCTION {aggregate} ({state}, {state}) OWNER TO {owner}"), &[])?;
    }
    for name in definition.tables() {
        locks::lock_named(&format!("ALTER TABLE {name} OWNER TO {owner}"), &name)?;
    }
    let sql = "UPDATE litellm_spend.rollup SET owner = $2 WHERE name = $1";
    spi::run(sql, &[definition.name.as_str().into(), oid.into()])
}

/// Makes a rollup's live view, or gives it another query and owner. The query holds expressions of the
/// owner's, so a view with the same columns and no rows comes first, which only becomes the real one when it
/// is theirs.
pub fn make_view(definition: &Definition, owner: Owner, query: &str) -> Result<()> {
    let name = definition.live_view();
    if relation::find_relation(&name)?.is_none() {
        let _here = citus::on_this_node()?;
        spi::run(&format!("CREATE VIEW {name} AS {}", definition.empty_query()), &[])?;
        fence::revoke_on_relation(&name)?;
    }
    for comment in definition.comments() {
        spi::run(&comment, &[])?;
    }
    let owner = quoted(&owner.name()?);
    locks::lock_named(&format!("ALTER VIEW {name} OWNER TO {owner}"), &name)?;
    let view = relation::find_relation(&name)?.ok_or(Error::NoTable(name))?;
    rewrite::replace(guc::lock_timeout(), view, query)
}

/// Refuses what reads something of a session's temporary schema: a function, a type, an operator. With the
/// session's end that is dropped, and with it the live view, or a column of the rollup's table and its key.
fn require_permanent(definition: &Definition, merge_functions: &[MergeFunction]) -> Result<()> {
    // Its name is in the text of a function, of which the server notes nothing.
    if let Some(merge) = merge_functions.iter().find(|merge| merge.function.starts_with("pg_temp")) {
        return Err(Error::Temporary(format!("function {}", merge.function)));
    }
    let found = spi::current(
        "SELECT pg_catalog.pg_describe_object(d.refclassid, d.refobjid, 0)
         FROM pg_catalog.pg_depend d
         WHERE ((d.classid = 'pg_catalog.pg_rewrite'::regclass AND d.objid IN (
                     SELECT oid FROM pg_catalog.pg_rewrite WHERE ev_class = pg_catalog.to_regclass($1)))
             OR (d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = pg_catalog.to_regclass($2)))
           AND (SELECT schema FROM pg_catalog.pg_identify_object(d.refclassid, d.refobjid, 0))
               LIKE 'pg\\_temp%'
         LIMIT 1",
        &[definition.live_view().into(), definition.table().into()],
        |r| spi::value::<String>(r, 1),
    )
    .one()?;
    found.map_or(Ok(()), |object| Err(Error::Temporary(object)))
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
    restore::begin()?;
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
        if let Some(lowest) = spi::query(sql, &args, |r| spi::value::<i64>(r, 1)).one()? {
            return Err(Error::BeforeFirst { merged_to, lowest });
        }
        spi::run(
            "UPDATE litellm_spend.rollup SET watermark = $2, first_value = $2 WHERE name = $1",
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
    fence::grant(&format!("GRANT USAGE ON SCHEMA litellm_spend TO {owner}"))?;
    fence::grant(&format!("GRANT EXECUTE ON FUNCTION litellm_spend.backfill_step(regclass) TO {owner}"))
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
    spi::run(
        "INSERT INTO litellm_spend.rollup (name, source, definition, watermark, first_value, last_value,
                 covered_from, owner, committed_to, merged_at)
             SELECT $1, $2, $3::jsonb, start, start, greatest(start, $5), '-infinity',
                 CASE WHEN $3 IS NOT NULL THEN $7::oid END, CASE WHEN $8 THEN start END,
                 -- Its first window is awaited from now on, see Fence::note_call().
                 CASE WHEN $3 IS NULL THEN clock_timestamp() END
             FROM (SELECT least(seqstart, $6) - 1 AS start FROM pg_catalog.pg_sequence
                 WHERE seqrelid = $4) AS s",
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
    )
}

/// The lowest number of a row that is there. Row security may hide rows, of which nobody can say then; as
/// long as it does, merges fail, and the view shows its reader what that role may see.
fn first_value(table: &Table, numbering: &Numbering) -> Result<Option<i64>> {
    let sql = format!("SELECT min({})::bigint FROM {}", quoted(&numbering.column), table.qualified());
    let owner = Owner::role(table.owner_oid);
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

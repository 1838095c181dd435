//! Drops rollups, also what is left of one whose state is lost.

use crate::citus::spread;
use crate::engine::source;
use crate::error::{Error, Result};
use crate::server::locks::{self, Patience};
use crate::server::relation::Table;
use crate::server::session::{self, Owner};
use crate::server::spi;
use crate::server::text::{SCHEMA, qualified, quoted};
use crate::state::definition::Definition;
use crate::state::fence::{self, Fence};
use crate::state::restore;
use pgrx::prelude::*;

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
    spi::run("DELETE FROM litellm_spend.rollup WHERE name = $1", &[name.into()])?;
    source::forget_unused_sources()?;
    restore::mark(Patience::of_call())
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
        spi::run(&format!("DROP AGGREGATE IF EXISTS {aggregate} ({state})"), &[])?;
        spi::run(&format!("DROP FUNCTION IF EXISTS {aggregate} ({state}, {state})"), &[])?;
    }
    Ok(())
}

/// Drops the view, the table and the aggregates of a rollup whose state is lost, as their owners.
fn drop_leftovers(caller: pg_sys::Oid, name: &str) -> Result<()> {
    // The functions are what the aggregates are made of.
    let functions = spi::query(
        "SELECT CASE prokind WHEN 'a' THEN 'AGGREGATE' ELSE 'FUNCTION' END, oid::regprocedure::text,
                 proowner
             FROM pg_catalog.pg_proc
             WHERE pronamespace = 'litellm_spend'::regnamespace AND pg_catalog.starts_with(proname, $1 || '.')
             ORDER BY 1",
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
    restore::mark(Patience::of_call())
}

/// Lets an owner use our schema for as long as `work` takes: a restore may not have come to its grants, or
/// was made without them. What fails takes that back with its transaction.
fn with_usage(owner: Owner, work: impl FnOnce(Owner) -> Result<()>) -> Result<()> {
    let sql = "SELECT pg_catalog.has_schema_privilege($1, 'litellm_spend', 'USAGE')";
    if spi::query(sql, &[owner.oid().into()], |r| spi::value::<bool>(r, 1))? == [true] {
        return work(owner);
    }
    let name = quoted(&owner.name()?);
    fence::grant(&format!("GRANT USAGE ON SCHEMA litellm_spend TO {name}"))?;
    work(owner)?;
    fence::grant(&format!("REVOKE USAGE ON SCHEMA litellm_spend FROM {name}"))
}

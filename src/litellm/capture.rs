//! Which table is captured, or may be, and which of its columns.

use crate::error::{Error, Result};
use crate::litellm::spend_log::{self, SPEND_LOGS};
use crate::server::relation::{self, Table};
use crate::server::session::{self, Elevated};
use crate::server::spi;
use crate::server::text::{literal, qualified, quoted};
use crate::state::captured::{self, CaptureState};
use pgrx::prelude::*;

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
        if table.has(expected.name, expected.r#type)? {
            found.push(expected.name.into());
        } else if expected.required {
            return Err(Error::NoColumn { relation: table.name.clone(), column: expected.name.into() });
        }
    }
    Ok(found)
}

/// The same of the table that was replaced, if there is one: it may lack what a later version of LiteLLM has
/// added to the captured one.
pub fn columns_of_predecessor(state: &CaptureState) -> Result<Vec<String>> {
    let Some(predecessor) = state.predecessor else { return Ok(vec![]) };
    let table = Table::find(predecessor)?;
    captured_columns(&table.ok_or_else(|| Error::NoTable(predecessor.to_u32().to_string()))?)
}

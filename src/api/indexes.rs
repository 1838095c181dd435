//! The SQL functions about indexes, as in `api`.

use crate::api::arguments::Regclass;
use crate::api::call::{report, require_changeable};
use crate::api::partitions::{enter, lock_to_read, look};
use crate::error::{self, Error};
use crate::index::build::{self, Row};
use crate::index::catalogue::{self, CATALOGUE, Index};
use crate::index::plan;
use crate::index::upgrade;
use crate::litellm::spend_log;
use crate::partition::layout::{self, Layout};
use crate::server::relation::Table;
use crate::server::session::{self, Owner};
use crate::state::conversion::has_worker;
use crate::state::indexes;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

/// What each index of the catalogue would cost and serve here. Changes nothing.
#[pg_extern(stable, parallel_unsafe)]
#[allow(clippy::type_complexity)]
fn spend_index_plan(
    source: default!(Option<Regclass>, "NULL"),
) -> Result<
    TableIterator<
        'static,
        (
            name!(item, String),
            name!(definition, String),
            name!(serves, String),
            name!(since, Option<String>),
            name!(rows, Option<i64>),
            name!(bytes, Option<i64>),
            name!(seconds, Option<i64>),
            name!(insert_cost, Option<String>),
            name!(state, Option<String>),
        ),
    >,
    ErrorReport,
> {
    report(|| {
        session::require_primary()?;
        let (elevated, table) = look(source)?;
        let table = lock_to_read(&elevated, table)?;
        plan::plan(&table)
    })
    .map(|rows| {
        TableIterator::new(rows.into_iter().map(|row| {
            let text = |text: Option<&str>| text.map(str::to_string);
            (
                row.item.to_string(),
                row.definition,
                row.serves,
                text(row.since),
                row.rows,
                row.bytes,
                row.seconds,
                text(row.insert_cost),
                row.state,
            )
        }))
    })
}

/// What a release of LiteLLM does to the table when it starts. Changes nothing.
#[pg_extern(stable, parallel_unsafe)]
#[allow(clippy::type_complexity)]
fn spend_upgrade_check(
    version: Option<&str>,
    source: default!(Option<Regclass>, "NULL"),
) -> Result<
    TableIterator<
        'static,
        (name!(change, String), name!(by, String), name!(effect, String), name!(remedy, Option<String>)),
    >,
    ErrorReport,
> {
    report(|| {
        let (elevated, table) = look(source)?;
        let table = lock_to_read(&elevated, table)?;
        upgrade::check(&table, version.ok_or(Error::Null("version"))?)
    })
    .map(|rows| {
        TableIterator::new(
            rows.into_iter()
                .map(|row| (row.change, row.by.to_string(), row.effect, row.remedy.map(session::callable))),
        )
    })
}

/// Asks for indexes of the catalogue. The worker builds them; without one the statements are said.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity)]
fn spend_index_set(
    source: default!(Option<Regclass>, "NULL"),
    indexes: default!(Option<Vec<Option<String>>>, "NULL"),
    hot: default!(Option<bool>, "false"),
) -> Result<
    TableIterator<
        'static,
        (name!(index, String), name!(partition, String), name!(state, String), name!(detail, String)),
    >,
    ErrorReport,
> {
    report(|| {
        require_changeable()?;
        let (_elevated, table) = enter(source)?;
        let wanted = named(indexes)?.ok_or(Error::NoIndexes)?;
        if wanted.is_empty() {
            return Err(Error::EmptyIndexes);
        }
        require_suitable(&table)?;
        wanted.iter().try_for_each(|index| index.require_possible(&table))?;
        let hot = hot.unwrap_or(false);
        wanted.iter().try_for_each(|index| indexes::request(&table, &index.wanted(hot)))?;
        rows(&table)
    })
    .map(TableIterator::new)
}

/// Has indexes of ours dropped, and forgets them.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity)]
fn spend_index_drop(
    source: default!(Option<Regclass>, "NULL"),
    indexes: default!(Option<Vec<Option<String>>>, "NULL"),
) -> Result<
    TableIterator<
        'static,
        (name!(index, String), name!(partition, String), name!(state, String), name!(detail, String)),
    >,
    ErrorReport,
> {
    report(|| {
        require_changeable()?;
        let (_elevated, table) = enter(source)?;
        let named = named(indexes)?;
        let names = named.map(|named| named.iter().map(|index| index.name.to_string()).collect::<Vec<_>>());
        let known = || CATALOGUE.iter().map(|index| index.name.to_string()).collect();
        indexes::adopt_to_drop(&table, &names.clone().unwrap_or_else(known))?;
        let dropped = indexes::request_drop(&table, names.as_deref())?;
        let mut rows = rows(&table)?;
        rows.retain(|(index, ..)| dropped.contains(index));
        // Indexes that are on no table any more, or never were.
        for name in names.unwrap_or(dropped) {
            if !rows.iter().any(|(index, ..)| *index == name) {
                rows.push((name, table.name.clone(), "gone".into(), String::new()));
            }
        }
        Ok(rows)
    })
    .map(TableIterator::new)
}

fn rows(table: &Table) -> error::Result<Vec<Row>> {
    build::report(table.oid, Owner::role(table.owner_oid), !has_worker()?)
}

/// The indexes of the catalogue that a call names; `None`: it names none.
fn named(indexes: Option<Vec<Option<String>>>) -> error::Result<Option<Vec<&'static Index>>> {
    let Some(names) = indexes else { return Ok(None) };
    let find = |name: Option<String>| {
        let name = name.ok_or(Error::Null("name of an index"))?;
        catalogue::find(&name).ok_or(Error::NoIndex(name))
    };
    names.into_iter().map(find).collect::<error::Result<_>>().map(Some)
}

/// LiteLLM's spend log, plain or partitioned by its time.
fn require_suitable(table: &Table) -> error::Result<()> {
    catalogue::require_spend_log(table)?;
    layout::require_root(table)?;
    if table.kind == "p" {
        Layout::of(table.oid, spend_log::TIME)?;
    }
    Ok(())
}

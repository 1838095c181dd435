//! The SQL functions about indexes, as in `api`.

use crate::api::partitions::enter;
use crate::api::rollups::{Regclass, report};
use crate::index::plan;
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
        let (_elevated, table) = enter(source)?;
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

//! That the columns which a rollup reads are those that it was declared over.
//!
//! One would think that their names say so. But a merge reads columns by name, and the live view, whose query
//! the server has bound to them, by number: once one is renamed and another gets its name, the two read
//! different columns, and what is merged is of both. So the numbers are noted with the definition, as the
//! live view has them, and compared before anything is computed. They are those of one table: after a
//! restore, or once a conversion has put another table in its place, they are noted anew.

use crate::error::{Error, Result};
use crate::server::spi::{Found, current, run, value};
use crate::server::text::{SCHEMA, qualified};
use crate::state::definition::Columns;
use crate::state::fence::Fence;
use pgrx::prelude::*;

/// Notes the columns of `source` that the live view of rollup `name` reads, if it is there.
pub fn note(name: &str, source: pg_sys::Oid) -> Result<()> {
    let sql = "UPDATE litellm_spend.rollup SET definition = definition
             || pg_catalog.jsonb_build_object('columns',
                    pg_catalog.jsonb_build_object('relation', $2::bigint, 'numbers', numbers))
         FROM (SELECT pg_catalog.jsonb_object_agg(a.attname, a.attnum) AS numbers
               FROM pg_catalog.pg_rewrite w
               JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_rewrite'::regclass AND d.objid = w.oid
                   AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.refobjid = $2
               JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                   AND a.attnum > 0
               WHERE w.ev_class = pg_catalog.to_regclass($3)) AS bound
         WHERE name = $1 AND numbers IS NOT NULL";
    let view = qualified(SCHEMA, name);
    run(sql, &[name.into(), source.into(), view.into()])
}

/// The same of a rollup of which they are not noted.
pub fn note_unless_known(fence: &Fence) -> Result<()> {
    if fence.is_built_in() || known(fence)?.is_some() {
        return Ok(());
    }
    note(&fence.name, fence.relation)
}

fn known(fence: &Fence) -> Result<Option<&Columns>> {
    let columns = fence.filled()?.columns.as_ref();
    Ok(columns.filter(|columns| columns.relation == fence.relation.to_u32()))
}

/// Fails if one of them is not what it was. Of a source that is locked: it stays so.
pub fn require_same(fence: &Fence) -> Result<()> {
    let Some(columns) = known(fence)? else { return Ok(()) };
    let (names, numbers): (Vec<_>, Vec<_>) =
        columns.numbers.iter().map(|(name, number)| (name.clone(), *number)).unzip();
    let changed = current(
        "SELECT noted.name, a.attname::text
         FROM unnest($2::text[], $3::int2[]) AS noted(name, number)
         LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = $1 AND a.attnum = noted.number
             AND NOT a.attisdropped
         WHERE a.attname IS DISTINCT FROM noted.name::name ORDER BY 1 LIMIT 1",
        &[fence.relation.into(), names.into(), numbers.into()],
        |r| Ok((value::<String>(r, 1)?, r.get::<String>(2)?)),
    )
    .one()?;
    let Some((column, now)) = changed else { return Ok(()) };
    let (relation, rollup) = (fence.filled()?.source.clone(), fence.name.clone());
    Err(Error::OtherColumn { relation, rollup, column, now })
}

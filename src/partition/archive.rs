//! The schema for tables that nothing uses any more, kept until somebody drops them: LiteLLM's schema tools
//! drop tables that they do not know from their own schema.

use crate::error::{Error, Result};
use crate::litellm::functions::{OPERATIONS, trigger_name};
use crate::partition::create::{index_names, rename, rename_index};
use crate::server::relation::{self, Table, free_name};
use crate::server::session::Owner;
use crate::server::spi;
use crate::server::text::{qualified, quoted};
use crate::state::fence;
use pgrx::prelude::*;

pub const ARCHIVE: &str = "litellm_spend_archive";

/// Whether it is there. Fails if it belongs to another: whoever owns a schema can drop what others have in
/// it, and put something else in its place.
pub fn require_ours() -> Result<bool> {
    let sql = "SELECT rolname::text, rolsuper FROM pg_catalog.pg_namespace n
               JOIN pg_catalog.pg_roles r ON r.oid = nspowner WHERE nspname = $1";
    let found =
        spi::query(sql, &[ARCHIVE.into()], |r| Ok((spi::value::<String>(r, 1)?, spi::value::<bool>(r, 2)?)))?;
    match found.into_iter().next() {
        Some((owner, false)) => Err(Error::ArchiveOfAnother(owner)),
        found => Ok(found.is_some()),
    }
}

/// Makes the schema if it is missing, and lets the owner of a table that goes there put it there, and look
/// into it.
pub fn ensure(owner: Owner) -> Result<()> {
    fence::lock_grants()?;
    if !require_ours()? {
        let comment = "Detached partitions, what reversions left, and the copy of one that is under way";
        spi::run(&format!("CREATE SCHEMA {ARCHIVE}"), &[])?;
        spi::run(&format!("COMMENT ON SCHEMA {ARCHIVE} IS '{comment}'"), &[])?;
    }
    let owner = quoted(&owner.name()?);
    fence::grant(&format!("GRANT USAGE, CREATE ON SCHEMA {ARCHIVE} TO {owner}"))
}

/// Moves a table of the owner's there, no longer captured, under its own name or the next that is free.
/// Returns what it is called.
pub fn take(owner: Owner, relation: pg_sys::Oid) -> Result<String> {
    let Some(table) = Table::find(relation)? else { return Ok(String::new()) };
    for operation in OPERATIONS {
        let (trigger, table) = (trigger_name(operation), table.qualified());
        owner.run(format!("DROP TRIGGER IF EXISTS {trigger} ON {table}"))?;
    }
    let mut name = table.name.clone();
    if relation::find_relation(&qualified(ARCHIVE, &name))?.is_some() {
        name = free_name([&table.schema, ARCHIVE], &name)?;
        rename(owner, &table.schema, &table.name, &name, None)?;
    }
    let moved = qualified(&table.schema, &name);
    for index in index_names(&moved)? {
        if relation::find_relation(&qualified(ARCHIVE, &index))?.is_some() {
            rename_index(owner, &table.schema, &index, &free_name([&table.schema, ARCHIVE], &index)?)?;
        }
    }
    owner.run(format!("ALTER TABLE {moved} SET SCHEMA {ARCHIVE}"))?;
    Ok(qualified(ARCHIVE, &name))
}

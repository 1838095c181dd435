//! Constraints whose truth is already proved, so that the server attaches a partition without reading it.
//!
//! ATTACH PARTITION reads every row of the new partition, and of DEFAULT, under an exclusive lock, unless a
//! valid CHECK says what it would find out. VALIDATE CONSTRAINT reads the table under a weak lock, but from
//! ADD CONSTRAINT on, which would be minutes before, the server refuses rows against it. We hold the
//! exclusive lock and have asked an index whether there are such rows, which takes a millisecond. So the
//! constraint is born valid, serves its ATTACH, and is gone before anybody else can see it: no row is ever
//! refused.
//!
//! The server itself makes such constraints, when it detaches a partition CONCURRENTLY. In SQL there is no
//! word for it: we parse `NOT VALID`, which means not to look, and set the flag that says the rest.

use crate::error::Result;
use crate::server::parse;
use crate::server::session::Owner;
use pgrx::prelude::*;
use std::ffi::CString;

const NAME: &str = "litellm_spend_proof";

/// Runs `work` while the server takes `condition` for true of the rows of `relation`, which the caller has
/// locked against everybody and has looked at.
pub fn with<T>(owner: Owner, relation: &str, condition: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    {
        let _owner = owner.act();
        add(relation, condition)?;
    }
    let result = work()?;
    owner.run(format!("ALTER TABLE {relation} DROP CONSTRAINT {NAME}"))?;
    Ok(result)
}

fn add(relation: &str, condition: &str) -> Result<()> {
    let sql = format!("ALTER TABLE {relation} ADD CONSTRAINT {NAME} CHECK ({condition}) NOT VALID");
    let sql = CString::new(sql).unwrap_or_default();
    // SAFETY: the shape of the tree is that of the text above: one statement, with one command, that adds a
    // constraint.
    unsafe {
        let statement = (*parse::statements(&sql)[0]).stmt;
        let commands = parse::nodes((*statement.cast::<pg_sys::AlterTableStmt>()).cmds);
        let constraint = (*commands[0].cast::<pg_sys::AlterTableCmd>()).def.cast::<pg_sys::Constraint>();
        (*constraint).initially_valid = true;
        parse::run_utility(statement, &sql, pg_sys::ProcessUtilityContext::PROCESS_UTILITY_QUERY);
        pg_sys::CommandCounterIncrement();
    }
    Ok(())
}

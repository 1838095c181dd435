//! Gives a view another query, with the rights of the view's owner alone.
//!
//! CREATE OR REPLACE VIEW would parse the text as whoever calls it, so that a domain's CHECK in it runs with
//! those rights; and as the owner it would ask for CREATE on the schema, which an owner need not have: not in
//! ours, and not where a DBA made the view. So the text is parsed and analyzed as the owner, and stored as
//! what CREATE OR REPLACE VIEW stores, through the server's own function. OID, owner, grants, options and
//! dependents stay.
//!
//! Lock: ACCESS EXCLUSIVE on the view until the transaction ends, waited for within the limit given.

use crate::error::{Error, Result};
use crate::guc::LockLimit;
use crate::server::locks;
use crate::server::parse;
use crate::server::relation::relation_name;
use crate::server::session::Owner;
use crate::server::spi::{self, Found};
use pgrx::prelude::*;
use std::ffi::CString;

// Not among pgrx's bindings.
unsafe extern "C-unwind" {
    fn StoreViewQuery(view: pg_sys::Oid, query: *mut pg_sys::Query, replace: bool);
}

/// Replaces the query of `view`, which has the same columns. Fails if it is no view any more.
pub fn replace(limit: LockLimit, view: pg_sys::Oid, sql: &str) -> Result<()> {
    locks::lock_exclusively(limit, [view])?;
    let name = relation_name(view)?;
    let owner = owner(view, &name)?;
    let text = CString::new(sql).map_err(|_| Error::SeveralStatements)?;
    let _owner = owner.act();
    // SAFETY: the server's functions, on the trees that they make. Errors of theirs are thrown as everywhere.
    unsafe {
        let [statement] = parse::statements(&text)[..] else { return Err(Error::SeveralStatements) };
        let query = analyze(statement, &text);
        if (*query).commandType != pg_sys::CmdType::CMD_SELECT || (*query).hasModifyingCTE {
            return Err(Error::SeveralStatements);
        }
        // SAFETY: as pgrx guards the server's functions that it knows.
        pg_sys::ffi::pg_guard_ffi_boundary(|| StoreViewQuery(view, query, true));
        pg_sys::CommandCounterIncrement();
    }
    Ok(())
}

unsafe fn analyze(statement: *mut pg_sys::RawStmt, text: &std::ffi::CStr) -> *mut pg_sys::Query {
    unsafe {
        #[cfg(feature = "pg14")]
        return pg_sys::parse_analyze(
            statement,
            text.as_ptr(),
            std::ptr::null_mut(),
            0,
            std::ptr::null_mut(),
        );
        #[cfg(not(feature = "pg14"))]
        pg_sys::parse_analyze_fixedparams(statement, text.as_ptr(), std::ptr::null(), 0, std::ptr::null_mut())
    }
}

fn owner(view: pg_sys::Oid, name: &str) -> Result<Owner> {
    let sql = "SELECT relowner FROM pg_catalog.pg_class WHERE oid = $1 AND relkind = 'v'";
    let owner = spi::query(sql, &[view.into()], |r| spi::value::<pg_sys::Oid>(r, 1)).one()?;
    owner.map(Owner::role).ok_or_else(|| Error::NoTable(name.into()))
}

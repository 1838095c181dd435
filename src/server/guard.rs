//! Makes a forgotten place fail: while we act as ourselves, a query that names a relation of somebody who is
//! no superuser is refused.
//!
//! One would think that reading a table with a superuser's rights is harmless as long as nothing of its
//! owner's is called. But planning the query is enough: the planner loads every index of a table, and calls
//! the immutable functions in their expressions and predicates. So the check comes when a query has been
//! analyzed and before it is planned; [`crate::server::keyed`], which has no query, asks by itself. What
//! mentions a user's relation has to go through [`crate::server::session::Owner`].
//!
//! Ours are the relations of the role that we act as, the server's own, and those of any superuser: what
//! belongs to them gives nobody rights that they lack. State of ours may be another superuser's than the
//! extension: pg_upgrade gives the extension to the role that runs it, and a restore what is no member of it
//! to who made that. The hook is there as soon as the library is.

use crate::error::Error;
use crate::server::session::acts_as_ourselves;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use std::ffi::c_void;

static mut PREVIOUS: pg_sys::post_parse_analyze_hook_type = None;

pub fn install() {
    // SAFETY: _PG_init runs once in a process, which has one thread.
    unsafe {
        PREVIOUS = pg_sys::post_parse_analyze_hook;
        pg_sys::post_parse_analyze_hook = Some(on_query);
    }
}

// Without #[pg_guard], like the utility hook: an error of the next one passes this frame, which owns nothing.
unsafe extern "C-unwind" fn on_query(
    state: *mut pg_sys::ParseState,
    query: *mut pg_sys::Query,
    jumble: *mut pg_sys::JumbleState,
) {
    // SAFETY: the server's own arguments.
    unsafe {
        if acts_as_ourselves() {
            refuse_strangers(query);
        }
        if let Some(next) = PREVIOUS {
            next(state, query, jumble);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn refuse_strangers(query: *mut pg_sys::Query) {
    // SAFETY: an analyzed query.
    unsafe { visit(query.cast(), std::ptr::null_mut()) };
}

/// Looks at every range table in a query, also those of its subqueries. `true` would end the walk.
#[pg_guard]
unsafe extern "C-unwind" fn visit(node: *mut pg_sys::Node, context: *mut c_void) -> bool {
    use pg_sys::NodeTag::*;
    // SAFETY: nodes of an analyzed query, each read as what its tag says.
    unsafe {
        match node.as_ref().map(|node| node.type_) {
            None => false,
            Some(T_Query) => {
                let before = pg_sys::QTW_EXAMINE_RTES_BEFORE as i32;
                pg_sys::query_tree_walker(node.cast(), Some(visit), context, before)
            }
            Some(T_RangeTblEntry) => {
                let entry = &*node.cast::<pg_sys::RangeTblEntry>();
                if entry.rtekind == pg_sys::RTEKind::RTE_RELATION {
                    require_ours(entry.relid);
                }
                false
            }
            Some(_) => pg_sys::expression_tree_walker(node, Some(visit), context),
        }
    }
}

/// Asked while we act as ourselves.
pub fn require_ours(relation: pg_sys::Oid) {
    // The server's own objects have the numbers below.
    if relation.to_u32() < pg_sys::FirstNormalObjectId {
        return;
    }
    // SAFETY: the row of the catalog is read before it is released.
    let owner = unsafe {
        let key = relation.into_datum().unwrap_or(pg_sys::Datum::from(0));
        let row = pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::RELOID as i32, key);
        if row.is_null() {
            return;
        }
        let owner = (*(pg_sys::GETSTRUCT(row) as pg_sys::Form_pg_class)).relowner;
        pg_sys::ReleaseSysCache(row);
        owner
    };
    // SAFETY: reads a variable of the session, and the catalog.
    if owner != unsafe { pg_sys::GetUserId() } && !unsafe { pg_sys::superuser_arg(owner) } {
        let error = ErrorReport::from(Error::NotOurs(relation.to_u32()));
        error.report(PgLogLevel::ERROR);
    }
}

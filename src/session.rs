//! Who acts, where, and what becomes of an error.

use crate::catalog::{query, value};
use crate::error::{Error, Result};
use pgrx::prelude::*;
use std::ffi::{CStr, CString};
use std::time::Duration;

pub fn require_writable() -> Result<()> {
    // SAFETY: both only read backend state.
    if unsafe { pg_sys::RecoveryInProgress() } {
        return Err(Error::Standby);
    }
    if unsafe { pg_sys::XactReadOnly } {
        return Err(Error::ReadOnly);
    }
    Ok(())
}

pub fn require_read_committed() -> Result<()> {
    // SAFETY: reads a backend variable.
    match unsafe { pg_sys::XactIsoLevel } as u32 {
        pg_sys::XACT_REPEATABLE_READ => Err(Error::Isolation("REPEATABLE READ")),
        pg_sys::XACT_SERIALIZABLE => Err(Error::Isolation("SERIALIZABLE")),
        _ => Ok(()),
    }
}

pub fn require_utf8() -> Result<()> {
    let encoding = query("SELECT pg_catalog.getdatabaseencoding()::text", &[], |r| value::<String>(r, 1))?
        .pop()
        .unwrap_or_default();
    if encoding == "UTF8" { Ok(()) } else { Err(Error::Encoding(encoding)) }
}

/// `caller` may act for the owner of the relation.
pub fn require_owner(caller: pg_sys::Oid, relation: pg_sys::Oid) -> Result<()> {
    let owns = query(
        "SELECT relname::text, pg_catalog.pg_has_role($2, relowner, 'USAGE') FROM pg_catalog.pg_class WHERE oid = $1",
        &[relation.into(), caller.into()],
        |r| Ok((value::<String>(r, 1)?, value::<bool>(r, 2)?)),
    )?;
    match owns.into_iter().next() {
        Some((_, true)) => Ok(()),
        Some((name, false)) => Err(Error::NotOwner(name)),
        // The table was dropped.
        None => require_extension_owner(caller),
    }
}

/// `caller` may act for the extension's owner, whom we are at the moment.
pub fn require_extension_owner(caller: pg_sys::Oid) -> Result<()> {
    let sql = "SELECT pg_catalog.pg_has_role($1, current_user, 'USAGE')";
    let owns = query(sql, &[caller.into()], |r| value::<bool>(r, 1))?;
    if owns == [true] { Ok(()) } else { Err(Error::NotOwner("litellm_spend".into())) }
}

/// `caller` may act for `owner`, to whom rollup `name` belongs.
pub fn require_role(caller: pg_sys::Oid, owner: pg_sys::Oid, name: &str) -> Result<()> {
    if owner == pg_sys::InvalidOid {
        // Its source was dropped, and it has no table of its own.
        return require_extension_owner(caller);
    }
    let sql = "SELECT pg_catalog.pg_has_role($1, $2, 'USAGE')";
    let may = query(sql, &[caller.into(), owner.into()], |r| value::<bool>(r, 1))?;
    if may == [true] { Ok(()) } else { Err(Error::NotRollupOwner(name.into())) }
}

/// While it lives, the session acts as the extension's owner with a pinned search_path: what we store is ours,
/// whoever calls, and nothing of the caller's path is looked up. An error ends it with the transaction.
pub struct Elevated {
    user: pg_sys::Oid,
    security: i32,
    nest_level: i32,
}

/// Nothing is looked up on the caller's path; what is skipped because it exists is no news; and what depends on settings
/// is the same whoever computes it.
const PINNED_SETTINGS: [(&CStr, &CStr); 7] = [
    (c"search_path", c"pg_catalog, pg_temp"),
    (c"client_min_messages", c"warning"),
    (c"TimeZone", c"UTC"),
    (c"DateStyle", c"ISO, MDY"),
    (c"IntervalStyle", c"postgres"),
    (c"extra_float_digits", c"1"),
    // Compiling took 0.4 to 0.7 s where the plan is only expensive because sequential scans are off, and 0.1 s of each window
    // of a million rows (PostgreSQL 15, two shared cores, 2026-11).
    (c"jit", c"off"),
];

impl Elevated {
    pub fn enter() -> Result<Elevated> {
        let owner = query(
            "SELECT extowner FROM pg_catalog.pg_extension WHERE extname = 'litellm_spend'",
            &[],
            |r| value::<pg_sys::Oid>(r, 1),
        )?
        .pop()
        .ok_or_else(|| Error::NotAttached("this database".into()))?;
        Ok(Elevated::as_user(owner))
    }

    /// No lock is waited for longer than `limit`, not even a row's.
    pub fn impatient(self, limit: Duration) -> Elevated {
        let limit = CString::new(format!("{}ms", limit.as_millis().max(1))).unwrap_or_default();
        // SAFETY: inside the nest level of this guard, which Drop undoes.
        unsafe { set(c"lock_timeout", &limit) };
        self
    }

    /// For statements that run code of `owner`'s: expressions, functions, triggers. It cannot become anybody else, nor
    /// leave anything behind that runs later with our rights.
    pub fn restricted(owner: pg_sys::Oid) -> Elevated {
        let guard = Elevated::as_user(owner);
        // SAFETY: restored with the rest.
        unsafe {
            let security = guard.security
                | (pg_sys::SECURITY_LOCAL_USERID_CHANGE | pg_sys::SECURITY_RESTRICTED_OPERATION) as i32;
            pg_sys::SetUserIdAndSecContext(owner, security);
        }
        guard
    }

    /// Who acted before.
    pub fn caller(&self) -> pg_sys::Oid {
        self.user
    }

    pub fn as_user(user: pg_sys::Oid) -> Elevated {
        let mut guard = Elevated { user: pg_sys::InvalidOid, security: 0, nest_level: 0 };
        // SAFETY: the pair is restored in Drop, or by the abort of the transaction or subtransaction.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut guard.user, &mut guard.security);
            guard.nest_level = pg_sys::NewGUCNestLevel();
            for (name, value) in PINNED_SETTINGS {
                set(name, value);
            }
            let security = guard.security | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32;
            pg_sys::SetUserIdAndSecContext(user, security);
        }
        guard
    }
}

/// Sets after how long a wait for a lock is looked into, until the transaction ends; returns what it was. Then an autovacuum
/// in the way is cancelled, and a deadlock is noticed, at which we are the one to fail.
pub fn give_way_after(wait: Duration) -> Duration {
    // SAFETY: a setting of this session.
    unsafe {
        let before = Duration::from_millis(pg_sys::DeadlockTimeout.max(1) as u64);
        let value = format!("{}ms\0", wait.as_millis().max(1));
        pg_sys::set_config_option(
            c"deadlock_timeout".as_ptr(),
            value.as_ptr().cast(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_LOCAL,
            true,
            0,
            false,
        );
        before
    }
}

/// Sets a GUC within the current nest level.
unsafe fn set(name: &CStr, value: &CStr) {
    unsafe {
        pg_sys::set_config_option(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_SAVE,
            true,
            0,
            false,
        );
    }
}

impl Drop for Elevated {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: undoes enter(), in reverse order.
            unsafe {
                pg_sys::AtEOXact_GUC(false, self.nest_level);
                pg_sys::SetUserIdAndSecContext(self.user, self.security);
            }
        }
    }
}

/// Runs `work` in a subtransaction: an error undoes only what it did and is returned, also that of a cancelled query.
pub fn attempt<T>(work: impl FnOnce() -> Result<T>) -> std::result::Result<T, Failure> {
    // SAFETY: as PL/pgSQL does for a block with EXCEPTION: the memory context and the resource owner are put back
    // by hand, the rest by the (sub)transaction.
    let (context, owner) = unsafe {
        let saved = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        pg_sys::BeginInternalSubTransaction(std::ptr::null());
        pg_sys::MemoryContextSwitchTo(saved.0);
        saved
    };
    let outcome = PgTryBuilder::new(std::panic::AssertUnwindSafe(|| work().map_err(Failure::from)))
        .catch_others(|caught| Err(Failure::from(caught)))
        .execute();
    // SAFETY: see above.
    unsafe {
        if outcome.is_ok() {
            pg_sys::ReleaseCurrentSubTransaction();
        } else {
            pg_sys::RollbackAndReleaseCurrentSubTransaction();
        }
        pg_sys::MemoryContextSwitchTo(context);
        pg_sys::CurrentResourceOwner = owner;
    }
    outcome
}

/// An error that was caught: its subtransaction is rolled back.
#[derive(Debug)]
pub struct Failure {
    pub sqlstate: PgSqlErrorCode,
    pub message: String,
}

impl Failure {
    pub fn is_cancel(&self) -> bool {
        self.sqlstate == PgSqlErrorCode::ERRCODE_QUERY_CANCELED
    }

    /// Throws a cancel again, which is no answer to whatever was attempted.
    pub fn unless_cancel(self) -> Failure {
        if self.is_cancel() {
            ereport!(ERROR, self.sqlstate, self.message);
        }
        self
    }

    /// Somebody was in the way; it may work the next time.
    pub fn is_lock_timeout(&self) -> bool {
        use PgSqlErrorCode::*;
        [ERRCODE_LOCK_NOT_AVAILABLE, ERRCODE_T_R_DEADLOCK_DETECTED].contains(&self.sqlstate)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { sqlstate: error.sqlstate(), message: error.to_string() }
    }
}

impl From<pg_sys::panic::CaughtError> for Failure {
    fn from(caught: pg_sys::panic::CaughtError) -> Self {
        use pg_sys::panic::CaughtError::*;
        let (PostgresError(report) | ErrorReport(report) | RustPanic { ereport: report, .. }) = caught;
        Failure { sqlstate: report.sql_error_code(), message: report.message().to_string() }
    }
}

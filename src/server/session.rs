//! Who acts, and where; and work that may fail without the rest, whose error is a [`Failure`].

use crate::error::{Error, Result};
pub use crate::server::failure::{Failure, advised, callable};
use crate::server::limit;
use crate::server::relation::{self, Table};
use crate::server::spi::{self, Found, current, kept, query, value};
use pgrx::prelude::*;
use std::cell::Cell;
use std::ffi::{CStr, CString};
use std::time::Duration;

/// Fails until the update, where the library is of another version than the extension.
pub fn require_version() -> Result<()> {
    let _pinned = Elevated::pinned();
    let sql = "SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'litellm_spend'";
    match kept(sql, &[], |r| value::<String>(r, 1)).one()? {
        Some(installed) if installed != VERSION => Err(Error::OtherVersion { installed, library: VERSION }),
        _ => Ok(()),
    }
}

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Not on a standby, which gives no XID.
pub fn require_primary() -> Result<()> {
    // SAFETY: reads backend state.
    if unsafe { pg_sys::RecoveryInProgress() } { Err(Error::Standby) } else { Ok(()) }
}

pub fn require_writable() -> Result<()> {
    require_primary()?;
    // SAFETY: reads backend state.
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
    let _settings = Elevated::pinned();
    let encoding = query("SELECT pg_catalog.getdatabaseencoding()::text", &[], |r| value::<String>(r, 1))
        .one()?
        .unwrap_or_default();
    if encoding == "UTF8" { Ok(()) } else { Err(Error::Encoding(encoding)) }
}

/// The table, which `caller` may act for the owner of: both as of now, in one look. Who waits for a lock or
/// for anybody after that asks again, or works as the owner that was found and no other: meanwhile it can be
/// given away, and what its former owner has written would run with the rights of the new one.
pub fn open(caller: pg_sys::Oid, relation: pg_sys::Oid) -> Result<Table> {
    let table = relation::open(relation)?;
    match may_act_for(caller, table.owner_oid)? {
        true => Ok(table),
        false => Err(Error::NotOwner(table.name)),
    }
}

/// `caller` may act for the owner of the relation, as of now: a statement may have begun long ago.
pub fn require_owner(caller: pg_sys::Oid, relation: pg_sys::Oid) -> Result<()> {
    let owns = current(
        "SELECT relname::text, pg_catalog.pg_has_role($2, relowner, 'USAGE') FROM pg_catalog.pg_class
             WHERE oid = $1",
        &[relation.into(), caller.into()],
        |r| Ok((value::<String>(r, 1)?, value::<bool>(r, 2)?)),
    )
    .one()?;
    match owns {
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
    if owns == [true] { Ok(()) } else { Err(Error::NotExtensionOwner) }
}

/// Whether `caller` has the rights of `owner`.
pub fn may_act_for(caller: pg_sys::Oid, owner: pg_sys::Oid) -> Result<bool> {
    let sql = "SELECT pg_catalog.pg_has_role($1, $2, 'USAGE')";
    Ok(query(sql, &[caller.into(), owner.into()], |r| value::<bool>(r, 1))? == [true])
}

/// `caller` may act for `owner`, to whom rollup `name` belongs.
pub fn require_role(caller: pg_sys::Oid, owner: pg_sys::Oid, name: &str) -> Result<()> {
    if owner == pg_sys::InvalidOid {
        // Its source was dropped, and it has no table of its own.
        return require_extension_owner(caller);
    }
    if may_act_for(caller, owner)? { Ok(()) } else { Err(Error::NotRollupOwner(name.into())) }
}

/// While it lives, the session acts as somebody, with pinned settings. An error ends it with the transaction.
///
/// We are installed by a superuser, and what belongs to others can run their code: an index predicate while a
/// query is planned, a cast, a domain, a CHECK, a trigger, any text from their catalog. So there are two ways
/// to act:
///
/// - [`Elevated::enter`]: as the extension's owner, on state tables of ours only. A query that names a
///   relation of anybody's who is no superuser fails then, before it is planned ([`crate::server::guard`]): a
///   forgotten place is an error, not an escalation.
/// - [`Owner`]: as the owner of a user's relation, restricted, for whatever mentions something of theirs.
pub struct Elevated {
    user: pg_sys::Oid,
    security: i32,
    nest_level: i32,
}

pub const PINNED_PATH: &CStr = c"pg_catalog, pg_temp";

/// Nothing is looked up on the caller's path; text means the same where it is made and where it is run; and
/// what depends on settings is the same whoever computes it.
const PINNED_SETTINGS: [(&CStr, &CStr); 23] = [
    (c"search_path", PINNED_PATH),
    (c"client_min_messages", c"warning"),
    (c"TimeZone", c"UTC"),
    (c"DateStyle", c"ISO, MDY"),
    (c"IntervalStyle", c"postgres"),
    (c"extra_float_digits", c"1"),
    (c"bytea_output", c"hex"),
    (c"lc_monetary", c"C"),
    (c"lc_numeric", c"C"),
    (c"lc_time", c"C"),
    (c"xmlbinary", c"base64"),
    (c"xmloption", c"content"),
    (c"array_nulls", c"on"),
    (c"standard_conforming_strings", c"on"),
    (c"backslash_quote", c"safe_encoding"),
    (c"quote_all_identifiers", c"off"),
    (c"transform_null_equals", c"off"),
    (c"check_function_bodies", c"on"),
    (c"default_tablespace", c""),
    (c"default_table_access_method", c"heap"),
    // Else what we delete would go uncaptured.
    (c"session_replication_role", c"origin"),
    // Rows that a policy hides would silently be missing from totals, copies and proofs: an error is better.
    (c"row_security", c"off"),
    // Compiling took 0.4 to 0.7 s where the plan is only expensive because sequential scans are off, and 0.1
    // s of each window of a million rows (PostgreSQL 15, two shared cores, 2026-11).
    (c"jit", c"off"),
];

/// Marks, in the security context, that we act as ourselves. The server carries the context along and puts it
/// back after an error; it knows the lowest three bits.
const OURSELVES: i32 = 1 << 20;

impl Elevated {
    /// Acts as the extension's owner.
    pub fn enter() -> Result<Elevated> {
        // The first look for the owner is on the pinned path already.
        let guard = Elevated::act(user(), 0);
        let owner =
            kept("SELECT extowner FROM pg_catalog.pg_extension WHERE extname = 'litellm_spend'", &[], |r| {
                value::<pg_sys::Oid>(r, 1)
            })
            .one()?
            .ok_or_else(|| Error::NotAttached {
                to: "this database".into(),
                remedy: "CREATE EXTENSION litellm_spend;".into(),
            })?;
        guard.become_user(owner, OURSELVES);
        Ok(guard)
    }

    /// The caller, with pinned settings.
    pub fn pinned() -> Elevated {
        Elevated::act(user(), 0)
    }

    /// Acts as the bootstrap superuser, who is always there: in the hook, where the extension need not be.
    pub fn superuser() -> Elevated {
        Elevated::act(pg_sys::Oid::from(pg_sys::BOOTSTRAP_SUPERUSERID), OURSELVES)
    }

    /// No lock is waited for longer than `limit`, not even a row's, nor longer than the caller's lock_timeout
    /// has it.
    pub fn impatient(self, limit: Duration) -> Elevated {
        let limit = callers_lock_timeout().unwrap_or_else(lock_timeout).min(limit);
        let limit = CString::new(format!("{}ms", limit.as_millis().max(1))).unwrap_or_default();
        // SAFETY: inside the nest level of this guard, which Drop undoes.
        unsafe { set(c"lock_timeout", &limit) };
        self
    }

    /// With another setting, for as long as it lives.
    pub fn with(self, name: &CStr, value: &CStr) -> Elevated {
        // SAFETY: inside the nest level of this guard, which Drop undoes.
        unsafe { set(name, value) };
        self
    }

    /// The role that acted before.
    pub fn caller(&self) -> pg_sys::Oid {
        self.user
    }

    fn act(user: pg_sys::Oid, context: i32) -> Elevated {
        let mut guard = Elevated { user: pg_sys::InvalidOid, security: 0, nest_level: 0 };
        // SAFETY: the pair is restored in Drop, or by the abort of the transaction or subtransaction.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut guard.user, &mut guard.security);
            guard.nest_level = pg_sys::NewGUCNestLevel();
            for (name, value) in PINNED_SETTINGS {
                set(name, value);
            }
        }
        guard.become_user(user, context);
        guard
    }

    fn become_user(&self, user: pg_sys::Oid, context: i32) {
        let context = (self.security & !OURSELVES) | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32 | context;
        // SAFETY: put back by Drop, or by the end of the transaction.
        unsafe { pg_sys::SetUserIdAndSecContext(user, context) };
    }
}

/// Whether a statement of ours may be run: a name in it that is not qualified, an operator above all, is
/// looked up on the pinned path, or with no more rights than those of an owner as whom we act, restricted.
pub fn path_is_ours() -> bool {
    // SAFETY: reads variables of the session.
    unsafe {
        pg_sys::InSecurityRestrictedOperation()
            || CStr::from_ptr(pg_sys::namespace_search_path) == PINNED_PATH
    }
}

/// The search_path as it is set.
pub fn search_path() -> CString {
    // SAFETY: reads a setting that always exists.
    unsafe { CStr::from_ptr(pg_sys::GetConfigOption(c"search_path".as_ptr(), false, false)).to_owned() }
}

fn user() -> pg_sys::Oid {
    // SAFETY: reads a variable of the session.
    unsafe { pg_sys::GetUserId() }
}

/// Whether the session acts as ourselves at the moment.
pub fn acts_as_ourselves() -> bool {
    let (mut user, mut context) = (pg_sys::InvalidOid, 0);
    // SAFETY: reads variables of the session.
    unsafe { pg_sys::GetUserIdAndSecContext(&mut user, &mut context) };
    context & OURSELVES != 0
}

/// The owner of a user's relation: the only one as whom a statement that mentions something of theirs is run.
/// Their code then cannot become anybody else, nor leave anything behind that runs later with our rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner(pg_sys::Oid);

impl Owner {
    /// The owner of a table as of now. What is no table any more is refused: a rule, say, has made it a view.
    pub fn of(relation: pg_sys::Oid) -> Result<Owner> {
        let found = current(
            "SELECT relowner, relkind::text, relname::text FROM pg_catalog.pg_class WHERE oid = $1",
            &[relation.into()],
            |r| Ok((value::<pg_sys::Oid>(r, 1)?, value::<String>(r, 2)?, value::<String>(r, 3)?)),
        )
        .one()?;
        match found {
            None => Err(Error::NoTable(relation.to_u32().to_string())),
            Some((owner, kind, _)) if ["r", "p"].contains(&kind.as_str()) => Ok(Owner(owner)),
            Some((_, _, relation)) => Err(Error::NotATable { relation, kind: "not a table any more" }),
        }
    }

    /// A role that is known to own what a statement mentions.
    pub fn role(role: pg_sys::Oid) -> Owner {
        Owner(role)
    }

    /// Whether we go on by ourselves as `heir` with what was this owner's. Not as a superuser: what belongs
    /// to the table may still call the former owner's functions. Somebody has to ask for that.
    pub fn may_pass_to(self, heir: Owner) -> Result<bool> {
        let sql = "SELECT rolsuper FROM pg_catalog.pg_roles WHERE oid = $1";
        let is_superuser =
            |role: Owner| Ok::<_, Error>(query(sql, &[role.0.into()], |r| value::<bool>(r, 1))? == [true]);
        Ok(heir == self || !is_superuser(heir)? || is_superuser(self)?)
    }

    pub fn oid(self) -> pg_sys::Oid {
        self.0
    }

    pub fn name(self) -> Result<String> {
        relation::role_name(self.0)
    }

    /// That a relation is another's now, and not this one's, for whom something was asked for.
    pub fn lost(self, relation: String, owner: String) -> Error {
        match self.name() {
            Ok(expected) => Error::OtherOwner { relation, owner, expected },
            Err(Error::NoRole(_)) => Error::OwnerGone { relation, owner },
            Err(error) => error,
        }
    }

    /// Acts as the owner, restricted, until the guard is dropped.
    pub fn act(self) -> Elevated {
        Elevated::act(self.0, pg_sys::SECURITY_RESTRICTED_OPERATION as i32)
    }

    /// The same with a search_path of the caller's: for names that the caller has written.
    pub fn act_on_path(self, path: &CStr) -> Elevated {
        self.act().with(c"search_path", path)
    }

    pub fn run(self, sql: impl AsRef<str>) -> Result<()> {
        let _owner = self.act();
        spi::run(sql.as_ref(), &[])
    }

    /// On the transaction's snapshot.
    pub fn query<T>(
        self,
        sql: &str,
        args: spi::Args,
        row: impl Fn(&pgrx::spi::SpiHeapTupleData) -> Result<T>,
    ) -> Result<Vec<T>> {
        let _owner = self.act();
        query(sql, args, row)
    }

    /// On a snapshot that is newer than the locks of `relations` and of what inherits from them. A table that
    /// was waited for may have been rewritten meanwhile, and an older snapshot finds it empty. Takes no XID.
    pub fn current<T>(
        self,
        relations: &[pg_sys::Oid],
        sql: &str,
        args: spi::Args,
        row: impl Fn(&pgrx::spi::SpiHeapTupleData) -> Result<T>,
    ) -> Result<Vec<T>> {
        relation::lock_for_reading(relations)?;
        let _owner = self.act();
        spi::current(sql, args, row)
    }

    /// On a fresh snapshot. Takes an XID.
    pub fn fresh<T>(
        self,
        sql: &str,
        args: spi::Args,
        row: impl Fn(&pgrx::spi::SpiHeapTupleData) -> Result<T>,
    ) -> Result<Vec<T>> {
        let _owner = self.act();
        spi::fresh(sql, args, row)
    }

    pub fn exists(self, sql: &str, args: spi::Args) -> Result<bool> {
        let _owner = self.act();
        spi::exists(sql, args)
    }
}

thread_local! {
    static CALLERS_LOCK_TIMEOUT: Cell<Option<Duration>> = const { Cell::new(None) };
}

/// While it lives, a SQL function of ours runs, whose caller's lock_timeout is the shorter limit everywhere.
pub struct Call(Option<Duration>);

impl Call {
    pub fn begin() -> Call {
        Call(CALLERS_LOCK_TIMEOUT.replace(Some(lock_timeout())))
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        CALLERS_LOCK_TIMEOUT.set(self.0);
    }
}

/// As the caller of a SQL function has it, whatever we have set since; `None`: nobody has called.
pub fn callers_lock_timeout() -> Option<Duration> {
    CALLERS_LOCK_TIMEOUT.get()
}

/// As it is at the moment. No limit is the longest.
fn lock_timeout() -> Duration {
    // SAFETY: reads a variable of the session.
    match unsafe { pg_sys::LockTimeout } {
        0 => Duration::MAX,
        limit => Duration::from_millis(limit.unsigned_abs().into()),
    }
}

/// Sets after how long a wait for a lock fails, until the transaction ends; returns what it was. Takes no
/// XID: also where there can be none.
pub fn give_up_after(wait: Duration) -> Duration {
    let before = lock_timeout();
    let wait = if wait == Duration::MAX { Duration::ZERO } else { wait.max(Duration::from_millis(1)) };
    set_until_end(c"lock_timeout", wait);
    before
}

/// Sets after how long a wait for a lock is looked into, until the transaction ends; returns what it was.
/// Then an autovacuum in the way is cancelled, and a deadlock is noticed, at which we are the one to fail.
pub fn give_way_after(wait: Duration) -> Duration {
    // SAFETY: reads a variable of the session.
    let before = Duration::from_millis(unsafe { pg_sys::DeadlockTimeout }.max(1) as u64);
    set_until_end(c"deadlock_timeout", wait.max(Duration::from_millis(1)));
    before
}

fn set_until_end(name: &CStr, time: Duration) {
    let value = CString::new(format!("{}ms", time.as_millis())).unwrap_or_default();
    // SAFETY: a setting of this session.
    unsafe {
        pg_sys::set_config_option(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_LOCAL,
            true,
            0,
            false,
        );
    }
}

/// Sets a GUC within the current nest level.
unsafe fn set(name: &CStr, value: &CStr) {
    unsafe {
        pg_sys::set_config_option(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
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

/// Runs `work` in a subtransaction: an error undoes only what it did and is returned, also that of a
/// cancelled query.
pub fn attempt<T>(work: impl FnOnce() -> Result<T>) -> std::result::Result<T, Failure> {
    limit::forget();
    // SAFETY: as PL/pgSQL does for a block with EXCEPTION: the memory context and the resource owner are put
    // back by hand, the rest by the (sub)transaction.
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

/// Tells the caller what is no failure.
pub fn notice(message: String, hint: Option<String>) {
    let code = PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION;
    let report = pg_sys::panic::ErrorReport::new(code, message, "litellm_spend");
    tell(PgLogLevel::NOTICE, if let Some(hint) = hint { report.set_hint(hint) } else { report });
}

/// Tells the caller something, as a NOTICE or a WARNING. That can fail: the client's encoding may have no
/// letter for what the message names. Then nothing is told, and the call goes on.
pub fn tell(level: PgLogLevel, report: pg_sys::panic::ErrorReport) {
    let tell = || {
        // SAFETY: pgrx does not guard it. What an error jumps over there has nothing to undo.
        unsafe { pg_sys::ffi::pg_guard_ffi_boundary(|| report.report(level)) };
        Ok(())
    };
    // A client that does not read keeps us until a limit of its own ends the wait.
    drop(attempt(tell).map_err(Failure::unless_cancel));
}

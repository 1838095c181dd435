//! What each of our processes needs: settings, signals, transactions, and what pg_stat_activity says of it.

use crate::error::Result;
use crate::server::parse;
use crate::server::session::{self, Elevated, Failure, Owner, attempt};
use pgrx::bgworkers::*;
use pgrx::prelude::*;
use std::ffi::CString;
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Settings of the database or of all roles that are meant for its users: with them a worker would find other
/// operators than the server's, or never merge, and a launcher would wait for the end of other transactions.
/// Set before the first transaction, for the life of the process, as autovacuum does.
pub fn pin_settings() {
    let settings = [
        (c"search_path", session::PINNED_PATH),
        (c"default_transaction_isolation", c"read committed"),
        (c"default_transaction_read_only", c"off"),
        (c"default_transaction_deferrable", c"off"),
        (c"statement_timeout", c"0"),
        (c"lock_timeout", c"0"),
        (c"idle_in_transaction_session_timeout", c"0"),
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        (c"transaction_timeout", c"0"),
        (c"zero_damaged_pages", c"off"),
        (c"default_tablespace", c""),
    ];
    for (name, value) in settings {
        let (context, source) = (pg_sys::GucContext::PGC_SUSET, pg_sys::GucSource::PGC_S_OVERRIDE);
        // SAFETY: sets a setting that exists.
        unsafe { pg_sys::SetConfigOption(name.as_ptr(), value.as_ptr(), context, source) };
    }
}

/// Less than deadlock_timeout, so that it is the worker that gives way.
const LOCK_TIMEOUT: Duration = Duration::from_millis(200);

pub fn attempt_as_owner<T>(work: impl FnOnce() -> Result<T>) -> std::result::Result<T, Failure> {
    let _cancellable = Cancellable::begin();
    attempt(|| {
        let _owner = Elevated::enter()?.impatient(LOCK_TIMEOUT);
        work()
    })
}

/// Whether there is something that a cancel could end. Without, it would end the process.
static CANCELLABLE: AtomicBool = AtomicBool::new(false);

/// While it lives, a cancel ends what is being done.
struct Cancellable;

impl Cancellable {
    fn begin() -> Cancellable {
        CANCELLABLE.store(true, Ordering::Relaxed);
        Cancellable
    }
}

impl Drop for Cancellable {
    fn drop(&mut self) {
        CANCELLABLE.store(false, Ordering::Relaxed);
        // One that came too late.
        // SAFETY: a flag of this process.
        unsafe { (&raw mut pg_sys::QueryCancelPending).write_volatile(0) };
    }
}

/// SIGTERM ends a worker at the next interrupt check, in the middle of a statement if need be; SIGINT ends a
/// step; SIGHUP sets a flag.
pub fn attach_signals() {
    // SAFETY: before the signals are unblocked.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        pg_sys::pqsignal(pg_sys::SIGTERM as i32, Some(on_sigterm));
        #[cfg(feature = "pg18")]
        pg_sys::pqsignal_be(pg_sys::SIGTERM as i32, Some(on_sigterm));
        #[cfg(not(feature = "pg18"))]
        pg_sys::pqsignal(pg_sys::SIGINT as i32, Some(on_sigint));
        #[cfg(feature = "pg18")]
        pg_sys::pqsignal_be(pg_sys::SIGINT as i32, Some(on_sigint));
    }
    BackgroundWorker::attach_signal_handlers(SignalWakeFlags::SIGHUP);
}

/// What the server's `die` does; pgrx's own handler would not interrupt a statement.
unsafe extern "C-unwind" fn on_sigterm(_signal: i32) {
    // SAFETY: flags that are made for signal handlers.
    unsafe {
        (&raw mut pg_sys::InterruptPending).write_volatile(1);
        (&raw mut pg_sys::ProcDiePending).write_volatile(1);
        pg_sys::SetLatch(pg_sys::MyLatch);
    }
}

/// What the server's own handler does, but only where there is something to cancel.
unsafe extern "C-unwind" fn on_sigint(_signal: i32) {
    if CANCELLABLE.load(Ordering::Relaxed) {
        // SAFETY: flags that are made for signal handlers.
        unsafe {
            (&raw mut pg_sys::InterruptPending).write_volatile(1);
            (&raw mut pg_sys::QueryCancelPending).write_volatile(1);
            pg_sys::SetLatch(pg_sys::MyLatch);
        }
    }
}

/// pgrx's handler only sets a flag; reading the file is up to us.
pub fn reload_settings() {
    if BackgroundWorker::sighup_received() {
        // SAFETY: outside of any transaction, as in every process that reloads.
        unsafe { pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP) };
    }
}

/// As the server does for a command, outside of any transaction.
unsafe fn begin_transaction() {
    unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
    }
}

pub fn in_transaction<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: the frame that PostgreSQL's own workers use. An error that `work` lets through ends the
    // process.
    unsafe {
        begin_transaction();
        let result = work();
        pg_sys::PopActiveSnapshot();
        pg_sys::CommitTransactionCommand();
        result
    }
}

/// The same for a step, as the extension's owner: whatever fails, or is cancelled, is the step's failure. So
/// is the commit: where Citus distributes what was written, it waits for other servers.
pub fn attempt_in_transaction<T>(work: impl FnOnce() -> Result<T>) -> std::result::Result<T, Failure> {
    // SAFETY: as above; after an error at the commit the transaction is aborted by hand.
    unsafe {
        begin_transaction();
        let outcome = attempt_as_owner(work);
        pg_sys::PopActiveSnapshot();
        let _cancellable = Cancellable::begin();
        let commit = std::panic::AssertUnwindSafe(|| {
            pg_sys::CommitTransactionCommand();
            Ok(())
        });
        let committed = PgTryBuilder::new(commit).catch_others(|caught| Err(Failure::from(caught))).execute();
        if committed.is_err() {
            pg_sys::AbortOutOfAnyTransaction();
        }
        committed.and(outcome)
    }
}

/// Runs a statement that begins and ends transactions itself, such as CREATE INDEX CONCURRENTLY, as an owner.
/// A restriction cannot outlive a transaction; the server itself restricts what an index's functions may do.
pub fn utility(owner: Owner, sql: &str) -> std::result::Result<(), Failure> {
    let text = std::ffi::CString::new(sql).unwrap_or_default();
    let _cancellable = Cancellable::begin();
    // SAFETY: as the server runs a simple query: the statement lives in a context that outlives the
    // transactions. After an error the transaction is aborted by hand.
    unsafe {
        let ourselves = pg_sys::GetUserId();
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::SetUserIdAndSecContext(owner.oid(), 0);
        pg_sys::StartTransactionCommand();
        let context = pg_sys::AllocSetContextCreateInternal(
            pg_sys::TopMemoryContext,
            c"litellm_spend statement".as_ptr(),
            pg_sys::ALLOCSET_DEFAULT_MINSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_INITSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
        );
        pg_sys::MemoryContextSwitchTo(context);
        let outcome = PgTryBuilder::new(std::panic::AssertUnwindSafe(|| {
            pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
            let statement = (*parse::statements(&text)[0]).stmt;
            parse::run_utility(statement, &text, pg_sys::ProcessUtilityContext::PROCESS_UTILITY_TOPLEVEL);
            Ok(())
        }))
        .catch_others(|caught| Err(Failure::from(caught)))
        .execute();
        if outcome.is_ok() {
            if pg_sys::ActiveSnapshotSet() {
                pg_sys::PopActiveSnapshot();
            }
            pg_sys::CommitTransactionCommand();
        } else {
            pg_sys::AbortCurrentTransaction();
        }
        pg_sys::SetUserIdAndSecContext(ourselves, 0);
        pg_sys::MemoryContextSwitchTo(pg_sys::TopMemoryContext);
        pg_sys::MemoryContextDelete(context);
        outcome
    }
}

/// Says in pg_stat_activity what the worker is at.
pub fn report_running(subject: &impl Display) {
    let text = CString::new(format!("litellm_spend: {subject}")).unwrap_or_default();
    // SAFETY: the text is copied.
    unsafe { pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, text.as_ptr()) };
}

/// Sends the counts that autovacuum goes by, which a worker has to do itself.
pub fn report_idle() {
    // SAFETY: outside of a transaction.
    unsafe {
        pg_sys::pgstat_report_stat(false);
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_IDLE, std::ptr::null());
    }
}

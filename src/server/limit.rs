//! A limit of time for a step: what it calls may be anybody's, and others wait for their turn.
//!
//! When the time is over the step is cancelled, as by pg_cancel_backend(); its transaction or subtransaction
//! rolls back, and the caller learns that it was the limit. Code that catches the cancel and goes on is
//! terminated with its process, which only a worker asks for: it is started again, and leaves that subject
//! alone for a while.

use pgrx::prelude::*;
use std::cell::Cell;
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

// Not among pgrx's bindings.
unsafe extern "C-unwind" {
    fn RegisterTimeout(id: c_int, handler: unsafe extern "C-unwind" fn()) -> c_int;
    fn enable_timeout_after(id: c_int, milliseconds: c_int);
    fn disable_timeout(id: c_int, keep_indicator: bool);
}

/// Beyond all timeouts of the server's own: it gives us the next that is free.
const ANY: c_int = 32;

/// After the cancel, for what does not end by it.
const GRACE: Duration = Duration::from_secs(5);

static EXPIRED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// The cancelling timeout and the terminating one, once they are registered in this process.
    static TIMEOUTS: Cell<Option<(c_int, c_int)>> = const { Cell::new(None) };
    static RUNS: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, the time runs. A call of ours from within a step has no time of its own: the step's goes
/// on.
pub struct Limit {
    /// The cancelling timeout and the terminating one; `None` within another limit.
    timeouts: Option<(c_int, c_int)>,
}

impl Limit {
    pub fn begin(limit: Duration, terminates: bool) -> Limit {
        if RUNS.replace(true) {
            return Limit { timeouts: None };
        }
        // SAFETY: the server's timers, with handlers that only set flags.
        unsafe {
            let register = || (RegisterTimeout(ANY, on_cancel), RegisterTimeout(ANY, on_terminate));
            let (cancel, terminate) = TIMEOUTS.get().unwrap_or_else(register);
            TIMEOUTS.set(Some((cancel, terminate)));
            EXPIRED.store(false, Ordering::Relaxed);
            enable_timeout_after(cancel, milliseconds(limit));
            if terminates {
                enable_timeout_after(terminate, milliseconds(limit + GRACE));
            }
            Limit { timeouts: Some((cancel, terminate)) }
        }
    }
}

fn milliseconds(limit: Duration) -> c_int {
    c_int::try_from(limit.as_millis()).unwrap_or(c_int::MAX)
}

/// Also when an error unwinds: a timer that runs on would cancel something else.
impl Drop for Limit {
    fn drop(&mut self) {
        let Some((cancel, terminate)) = self.timeouts else { return };
        RUNS.set(false);
        // SAFETY: timeouts that were registered.
        unsafe {
            disable_timeout(cancel, false);
            disable_timeout(terminate, false);
            if expired() {
                // It may have come too late to cancel anything.
                (&raw mut pg_sys::QueryCancelPending).write_volatile(0);
            }
        }
    }
}

/// Whatever is cancelled from now on is no step whose time was over, unless a step runs.
pub fn forget() {
    if !RUNS.get() {
        EXPIRED.store(false, Ordering::Relaxed);
    }
}

/// Whether the time of the last step was over before it ended.
pub fn expired() -> bool {
    EXPIRED.load(Ordering::Relaxed)
}

unsafe extern "C-unwind" fn on_cancel() {
    EXPIRED.store(true, Ordering::Relaxed);
    // SAFETY: flags that are made for signal handlers.
    unsafe {
        (&raw mut pg_sys::InterruptPending).write_volatile(1);
        (&raw mut pg_sys::QueryCancelPending).write_volatile(1);
        pg_sys::SetLatch(pg_sys::MyLatch);
    }
}

unsafe extern "C-unwind" fn on_terminate() {
    // SAFETY: as above.
    unsafe {
        (&raw mut pg_sys::InterruptPending).write_volatile(1);
        (&raw mut pg_sys::ProcDiePending).write_volatile(1);
        pg_sys::SetLatch(pg_sys::MyLatch);
    }
}

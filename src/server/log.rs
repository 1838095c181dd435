//! What the server's log says: a line for what matters once, and each failure with its DETAIL and HINT. One
//! log serves all databases of a server, so each line names its own.
//!
//! No client is sent any of it, whatever its client_min_messages: a line that its encoding has no letters for
//! is an error, and one in a callback of the commit is a PANIC of the server.

use crate::server::session::Failure;
use pgrx::pg_sys;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use std::cell::{OnceCell, RefCell};
use std::ffi::{CStr, c_void};
use std::fmt::Display;
use std::sync::Once;

/// Says what has been done, once it is committed: not what a subtransaction takes back, nor what is only
/// prepared.
pub fn event(text: impl Display) {
    learn_database();
    LISTENING.call_once(listen);
    // SAFETY: reads state of the transaction.
    let within = unsafe { pg_sys::GetCurrentSubTransactionId() };
    EVENTS.with_borrow_mut(|events| events.push((within, line(text))));
}

thread_local! {
    /// What the transaction is to say, each with the subtransaction that it is part of.
    static EVENTS: RefCell<Vec<(pg_sys::SubTransactionId, String)>> = RefCell::default();
}

static LISTENING: Once = Once::new();

/// For the life of the process. pgrx's own callbacks know of no PREPARE.
fn listen() {
    // SAFETY: adds to the server's lists.
    unsafe {
        pg_sys::RegisterXactCallback(Some(on_end), std::ptr::null_mut());
        pg_sys::RegisterSubXactCallback(Some(on_subtransaction_end), std::ptr::null_mut());
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_end(event: pg_sys::XactEvent::Type, _argument: *mut c_void) {
    use pg_sys::XactEvent::{XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PREPARE};
    match event {
        XACT_EVENT_COMMIT => EVENTS.take().into_iter().for_each(|(_, line)| say(line)),
        XACT_EVENT_ABORT | XACT_EVENT_PREPARE => drop(EVENTS.take()),
        _ => {}
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_subtransaction_end(
    event: pg_sys::SubXactEvent::Type,
    ended: pg_sys::SubTransactionId,
    parent: pg_sys::SubTransactionId,
    _argument: *mut c_void,
) {
    use pg_sys::SubXactEvent::{SUBXACT_EVENT_ABORT_SUB, SUBXACT_EVENT_COMMIT_SUB};
    EVENTS.with_borrow_mut(|events| match event {
        SUBXACT_EVENT_COMMIT_SUB => {
            events.iter_mut().filter(|(within, _)| *within == ended).for_each(|(within, _)| *within = parent);
        }
        SUBXACT_EVENT_ABORT_SUB => events.retain(|(within, _)| *within != ended),
        _ => {}
    });
}

/// Says what failed, or is about to be done, at once.
pub fn now(text: impl Display) {
    say(line(text));
}

/// Says that something failed, at once.
pub fn failure(about: impl Display, failure: &Failure) {
    write(failure.explain(line(format!("{about}: {}", failure.message))));
}

const NAME: &str = "litellm_spend";

fn say(line: String) {
    write(ErrorReport::new(PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION, line, NAME));
}

fn write(report: ErrorReport) {
    report.report(PgLogLevel::LOG_SERVER_ONLY);
}

fn line(text: impl Display) -> String {
    DATABASE.with(|name| match name.get() {
        Some(name) => format!("litellm_spend in database \"{name}\": {text}"),
        None => format!("litellm_spend: {text}"),
    })
}

thread_local! {
    static DATABASE: OnceCell<String> = const { OnceCell::new() };
}

/// Reads the name of this process's database, within a transaction. It cannot change while somebody is
/// connected to it.
pub fn learn_database() {
    DATABASE.with(|name| {
        name.get_or_init(|| {
            // SAFETY: reads the catalog within a transaction; the text is copied.
            unsafe {
                let text = pg_sys::get_database_name(pg_sys::MyDatabaseId);
                if text.is_null() {
                    String::new()
                } else {
                    CStr::from_ptr(text).to_string_lossy().into_owned()
                }
            }
        });
    });
}

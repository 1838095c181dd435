//! What the server's log says: a line for what matters once, and each failure with its DETAIL and HINT. One
//! log serves all databases of a server, so each line names its own.

use crate::server::session::Failure;
use pgrx::pg_sys;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{PgXactCallbackEvent, register_xact_callback};
use std::cell::OnceCell;
use std::ffi::CStr;
use std::fmt::Display;

/// Says what has been done, once the transaction commits.
pub fn event(text: impl Display) {
    learn_database();
    let text = line(text);
    register_xact_callback(PgXactCallbackEvent::Commit, move || write(ErrorReport::new(SUCCESS, text, NAME)));
}

/// Says what failed, or is about to be done, at once.
pub fn now(text: impl Display) {
    write(ErrorReport::new(SUCCESS, line(text), NAME));
}

/// Says that something failed, at once.
pub fn failure(about: impl Display, failure: &Failure) {
    write(failure.explain(line(format!("{about}: {}", failure.message))));
}

const NAME: &str = "litellm_spend";
const SUCCESS: PgSqlErrorCode = PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION;

fn write(report: ErrorReport) {
    report.report(PgLogLevel::LOG);
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

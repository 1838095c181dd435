//! Adds a HINT to errors of the server's own that concern us.
//!
//! DROP EXTENSION is refused with a HINT to use what would take LiteLLM's views along, and a COMMIT within a procedure fails without
//! a word on why. Whether to fail is left to the server: here the error only learns what to type, on its way to the log and the
//! client. It is known by its `message_id`, which is the same in every language.
//!
//! The hook is there as soon as the library is. It looks nothing up: the transaction has failed.

use pgrx::prelude::*;
use std::ffi::{CStr, CString, c_char, c_int};

static mut PREVIOUS: pg_sys::emit_log_hook_type = None;

pub fn install() {
    // SAFETY: _PG_init runs once in a process, which has one thread.
    unsafe {
        PREVIOUS = pg_sys::emit_log_hook;
        pg_sys::emit_log_hook = Some(on_report);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_report(error: *mut pg_sys::ErrorData) {
    // SAFETY: the error that is being reported; its context is the current one, in which its texts are.
    unsafe {
        if (*error).elevel >= PgLogLevel::ERROR as c_int
            && let Some(hint) = advise(&*error).and_then(|hint| CString::new(hint).ok())
        {
            (*error).hint = pg_sys::pstrdup(hint.as_ptr());
        }
        if let Some(next) = PREVIOUS {
            next(error);
        }
    }
}

/// The statement that helps, if the error is one of those.
fn advise(error: &pg_sys::ErrorData) -> Option<String> {
    let (id, message) = (text(error.message_id)?, text(error.message)?);
    match &*id {
        "cannot drop %s because other objects depend on it" => {
            let is_ours = words(&message).any(|word| word == "litellm_spend");
            is_ours.then(|| {
                "SELECT * FROM spend_detach(drop_history => true); gives LiteLLM's views back, spend_rollup_drop() drops rollups of \
                 your own tables. CASCADE would drop LiteLLM's views."
                    .into()
            })
        }
        "invalid transaction termination" => {
            text(error.context)?.contains("spend_backfill(").then(|| {
                "Use CALL spend_backfill(); as a statement of its own, outside of a transaction block, function or EXCEPTION.".into()
            })
        }
        _ => None,
    }
}

fn words(message: &str) -> impl Iterator<Item = &str> {
    message.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.'))
}

fn text<'a>(text: *const c_char) -> Option<std::borrow::Cow<'a, str>> {
    // SAFETY: a text of the error's, which lives longer than this hook runs.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy())
}

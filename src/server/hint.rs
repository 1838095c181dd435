//! Adds a HINT to errors of the server's own that concern us.
//!
//! Who lacks EXECUTE on a function of ours is refused by the server before a line of ours runs; DROP
//! EXTENSION is, too, with a HINT to use what would take LiteLLM's views along; and a COMMIT within a
//! procedure fails without a word on why. Whether to fail is left to the server: here the error only learns
//! what to type, on its way to the log and the client. It is known by its `message_id`, which is the same in
//! every language.
//!
//! The hook is there as soon as the library is. It looks nothing up: the transaction has failed. In which
//! schema our functions are, it knows of a DROP EXTENSION, of which the utility hook tells it.

use crate::server::failure;
use crate::server::text::literal;
use pgrx::prelude::*;
use std::cell::RefCell;
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
            && let Some(hint) = advise(&*error).and_then(|hint| CString::new(callable(hint)).ok())
        {
            (*error).hint = pg_sys::pstrdup(hint.as_ptr());
        }
        if let Some(next) = PREVIOUS {
            next(error);
        }
    }
}

thread_local! {
    /// That of our functions, where it is known.
    static FUNCTIONS_IN: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Notes the schema of our functions.
pub fn learn_schema(schema: Option<String>) {
    FUNCTIONS_IN.set(schema);
}

/// As [`crate::server::session::callable`], which looks the schema up.
fn callable(hint: String) -> String {
    FUNCTIONS_IN.with_borrow(|schema| failure::in_schema(hint, schema.as_deref()))
}

/// What a call of spend_attach() fails with that is declared as in 0.1.0, without the argument.
const OF_AN_OLDER_VERSION: &str = "unboxing reports_ argument failed";

/// The statement that helps, if the error is one of those.
fn advise(error: &pg_sys::ErrorData) -> Option<String> {
    let message = text(error.message)?;
    if message == OF_AN_OLDER_VERSION {
        return Some("The library was replaced: ALTER EXTENSION litellm_spend UPDATE;".into());
    }
    match &*text(error.message_id)? {
        "permission denied for function %s" | "permission denied for procedure %s" => {
            let name = words(&message).find(|word| FUNCTIONS.iter().any(|ours| word.starts_with(ours)))?;
            Some(match name {
                // It shows spend: that is for who may read it.
                "monthly_global_spend" => format!("{BY_OWNER}: {}", grant_reports()),
                _ => format!("A superuser lets it: {}", grant_admin()),
            })
        }
        "permission denied for view %s" => {
            let name = words(&message).find(|word| {
                VIEWS.contains(word) || OF_SESSIONS.contains(word) || REPORTS.iter().any(|ours| word.starts_with(ours))
            })?;
            Some(match name {
                name if OF_SESSIONS.contains(&name) => {
                    format!("A superuser lets it: GRANT pg_monitor TO {};", role())
                }
                name if VIEWS.contains(&name) => {
                    format!("A superuser lets it: GRANT pg_monitor TO {}; or {}", role(), grant_admin())
                }
                _ => format!("{BY_OWNER}: {}", grant_reports()),
            })
        }
        "relation \"%s.%s\" does not exist" => {
            let is_report = |word: &str| REPORTS_ASKED_FOR.iter().any(|ours| word.starts_with(ours));
            words(&message).any(is_report).then(|| {
                "The reports are made when somebody asks for them: SELECT * FROM spend_attach(reports => true);".into()
            })
        }
        // The first of what pg_dump reads that LiteLLM's role may not.
        "permission denied for sequence %s" => {
            words(&message).find(|word| *word == "capture_failures")?;
            Some(format!("Who dumps reads all state. A superuser lets it: GRANT pg_read_all_data TO {};", role()))
        }
        "permission denied for schema %s" => {
            words(&message).find(|word| *word == "litellm_spend")?;
            let (reports, admin) = (grant_reports(), grant_admin());
            Some(format!("{BY_OWNER}: {reports} for the reports. A superuser lets it: {admin} for our calls."))
        }
        // The parser's own HINT is about casts; now() is a timestamptz.
        "function %s does not exist" => {
            let name = words(&message).nth(1)?;
            let takes_times = ["spend_rollup_rebuild", "spend_rollup_verify"].contains(&name);
            (takes_times && message.contains("with time zone")).then(|| {
                format!("Its times are timestamps in UTC, as in {name}(..., '2026-11-01', now() AT TIME ZONE 'UTC').")
            })
        }
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

/// How the names of what [`crate::litellm::admin`] grants begin.
const FUNCTIONS: [&str; 10] = [
    "spend_attach",
    "spend_detach",
    "spend_backfill",
    "spend_grant_reports",
    "spend_rollup_",
    "spend_partition_",
    "monthly_global_spend",
    "backfill_step",
    "spend_index_",
    "spend_upgrade_check",
];

const VIEWS: [&str; 2] = ["spend_rollup_status", "spend_partition_status"];

/// Views of other sessions' activity, which take pg_monitor.
const OF_SESSIONS: [&str; 4] =
    ["spend_health", "spend_worker_status", "spend_progress", "spend_index_status"];

/// How the names of the report views begin.
const REPORTS: [&str; 2] = ["daily_", "hourly_"];

/// Those of them that are only there when somebody has asked for them.
const REPORTS_ASKED_FOR: [&str; 2] = ["litellm_spend.daily_usage", "litellm_spend.hourly_usage"];

/// The roles that may call `spend_grant_reports()`, as the HINT says it.
const BY_OWNER: &str = "A superuser, or the captured table's owner, lets it";

fn grant_reports() -> String {
    format!("SELECT * FROM spend_grant_reports({});", as_regrole())
}

fn grant_admin() -> String {
    format!("SELECT * FROM spend_grant_admin({});", as_regrole())
}

fn as_regrole() -> String {
    literal(&role())
}

/// Who was refused, as an identifier. In a function that acts as somebody else it is that role, which the
/// settings do not tell.
fn role() -> String {
    let (mut user, mut context) = (pg_sys::InvalidOid, 0);
    // SAFETY: reads variables of the session, and settings that there always are.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        if context & pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32 != 0 {
            return "that_role".into();
        }
        let set = |name: &CStr| text(pg_sys::GetConfigOption(name.as_ptr(), true, false));
        let name = set(c"role").filter(|role| role != "none").or_else(|| set(c"session_authorization"));
        let name = name.and_then(|name| CString::new(name.into_owned()).ok()).unwrap_or_default();
        text(pg_sys::quote_identifier(name.as_ptr())).unwrap_or_default().into_owned()
    }
}

fn words(message: &str) -> impl Iterator<Item = &str> {
    message.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.'))
}

fn text<'a>(text: *const c_char) -> Option<std::borrow::Cow<'a, str>> {
    // SAFETY: a text of the error's, which lives longer than this hook runs.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy())
}

//! An error that was caught, whoever raised it: what is shown of it, and whether it was a cancel.

use crate::error::{Error, Told};
use crate::server::limit;
use crate::server::relation;
use crate::server::session::Elevated;
use crate::server::text::EXTENSION;
use pgrx::prelude::*;

/// The server's function that throws a cancel. No error that a function of somebody's raises comes from
/// there.
const INTERRUPT: &str = "ProcessInterrupts";

/// An error that was caught: its subtransaction is rolled back.
#[derive(Debug)]
pub struct Failure {
    pub sqlstate: PgSqlErrorCode,
    pub message: String,
    detail: Option<String>,
    hint: Option<String>,
    origin: Origin,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Origin {
    Ourselves,
    /// They may say anything, also what a DBA should type.
    Others,
    /// The server's own interrupt, not an error of that SQLSTATE which somebody's function has raised.
    Cancel,
    /// The step's own limit of time.
    Limit,
}

impl Failure {
    pub fn is_cancel(&self) -> bool {
        self.origin == Origin::Cancel
    }

    /// The step's own limit of time was reached.
    pub fn is_timeout(&self) -> bool {
        self.origin == Origin::Limit
    }

    pub const ENDLESS: &str = "it went on after its time was over, and its process was terminated";

    /// Of a step that went on after it was cancelled.
    pub fn endless() -> Failure {
        Failure {
            sqlstate: PgSqlErrorCode::ERRCODE_ADMIN_SHUTDOWN,
            message: Failure::ENDLESS.into(),
            detail: None,
            hint: None,
            origin: Origin::Limit,
        }
    }

    /// As the status views show it: the message, and if it is ours its DETAIL and its HINT, each in a line of
    /// its own.
    pub fn text(&self) -> String {
        let ours = |more: &Option<String>| more.clone().filter(|_| self.origin == Origin::Ourselves);
        in_lines(&self.message, ours(&self.detail), ours(&self.hint))
    }

    /// The message, and what its DETAIL says.
    pub fn in_a_line(&self) -> String {
        let mut letters = self.detail.as_deref().unwrap_or_default().trim_end_matches('.').chars();
        match letters.next() {
            None => self.message.clone(),
            Some(first) => format!("{}: {}{}", self.message, first.to_lowercase(), letters.as_str()),
        }
    }

    pub fn detail(&self) -> Option<String> {
        self.detail.clone()
    }

    pub fn hint(&self) -> Option<String> {
        self.hint.clone()
    }

    /// With its DETAIL and HINT, under another message.
    pub fn explain(&self, message: String) -> pg_sys::panic::ErrorReport {
        let mut report = pg_sys::panic::ErrorReport::new(self.sqlstate, message, "litellm_spend");
        if let Some(detail) = &self.detail {
            report = report.set_detail(detail);
        }
        if let Some(hint) = &self.hint {
            report = report.set_hint(hint);
        }
        report
    }

    /// Throws a cancel again, which is no answer to whatever was attempted.
    pub fn unless_cancel(self) -> Failure {
        if self.is_cancel() || self.is_timeout() {
            self.report().report(PgLogLevel::ERROR);
        }
        self
    }

    /// The interrupt as the server threw it, so that whoever catches it next knows it for one.
    pub fn report(&self) -> pg_sys::panic::ErrorReport {
        pg_sys::panic::ErrorReport::new(self.sqlstate, self.message.clone(), INTERRUPT)
    }

    /// It wanted more memory, temporary files or disk than there is, or than a limit of the server's allows.
    pub fn lacks_resources(&self) -> bool {
        use PgSqlErrorCode::*;
        [
            ERRCODE_INSUFFICIENT_RESOURCES,
            ERRCODE_DISK_FULL,
            ERRCODE_OUT_OF_MEMORY,
            ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
            ERRCODE_PROGRAM_LIMIT_EXCEEDED,
        ]
        .contains(&self.sqlstate)
    }

    /// Somebody was in the way; it may work the next time.
    pub fn is_lock_timeout(&self) -> bool {
        use PgSqlErrorCode::*;
        [ERRCODE_LOCK_NOT_AVAILABLE, ERRCODE_T_R_DEADLOCK_DETECTED].contains(&self.sqlstate)
    }
}

/// A message of ours with what to do, as [`Failure::text`] has it.
pub fn advised(message: &str, hint: &str) -> String {
    in_lines(message, None, Some(callable(hint.into())))
}

/// The calls of ours in a HINT as they can be typed: qualified, unless they are in `public`, which is on most
/// paths.
pub fn callable(hint: String) -> String {
    // SAFETY: reads a variable of this process. A transaction that has failed looks nothing up.
    let may_look = hint.contains("spend_") && unsafe { pg_sys::IsTransactionState() };
    let schema = may_look.then(|| {
        let _pinned = Elevated::pinned();
        relation::extension_schema(EXTENSION).ok().flatten()
    });
    let schema = schema.flatten();
    in_schema(hint, schema.as_deref())
}

/// Puts the schema, where it is known and not `public`, before each name that begins with `spend_`, is
/// called, and has none.
pub fn in_schema(hint: String, schema: Option<&str>) -> String {
    let Some(schema) = schema.filter(|schema| *schema != "public").map(pgrx::spi::quote_identifier) else {
        return hint;
    };
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut text, mut copied) = (String::new(), 0);
    for (at, _) in hint.match_indices("spend_") {
        let is_call = hint[at..].trim_start_matches(is_word).starts_with('(');
        if is_call && !hint[..at].ends_with(|c| is_word(c) || c == '.') {
            text += &format!("{}{schema}.", &hint[copied..at]);
            copied = at;
        }
    }
    text + &hint[copied..]
}

/// As many characters of a message are kept: whoever raises it says how long it is.
const MOST_KEPT: usize = 2000;

/// Each in one line, whatever names are in it.
fn in_lines(message: &str, detail: Option<String>, hint: Option<String>) -> String {
    let line = |text: &str| {
        let end = text.char_indices().nth(MOST_KEPT).map_or(text.len(), |(at, _)| at);
        let more = if end < text.len() { "..." } else { "" };
        text[..end].replace(['\n', '\r'], " ") + more
    };
    let mut text = line(message);
    for (label, more) in [("DETAIL", detail), ("HINT", hint)] {
        if let Some(more) = more {
            text.push_str(&format!("\n{label}:  {}", line(&more)));
        }
    }
    text
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Failed(failure) => failure,
            error => {
                let Told { sqlstate, message, detail, hint } = error.tell();
                let hint = hint.map(callable);
                Failure { sqlstate, message, detail, hint, origin: Origin::Ourselves }
            }
        }
    }
}

impl From<pg_sys::panic::CaughtError> for Failure {
    fn from(caught: pg_sys::panic::CaughtError) -> Self {
        use pg_sys::panic::CaughtError::*;
        let of_server = matches!(caught, PostgresError(_));
        let (PostgresError(report) | ErrorReport(report) | RustPanic { ereport: report, .. }) = caught;
        let sqlstate = report.sql_error_code();
        let interrupt = report.function_name() == Some(INTERRUPT);
        let interrupted = sqlstate == PgSqlErrorCode::ERRCODE_QUERY_CANCELED && interrupt;
        let (origin, message) = match interrupted {
            true if limit::expired() => {
                (Origin::Limit, "it took longer than a step may take, and was cancelled")
            }
            true => (Origin::Cancel, report.message()),
            false => (Origin::Others, report.message()),
        };
        let told = origin != Origin::Limit;
        Failure {
            sqlstate,
            message: message.into(),
            // Of a panic it would be a backtrace.
            detail: report.detail().filter(|_| of_server && told).map(str::to_string),
            hint: report.hint().filter(|_| told).map(str::to_string),
            origin,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_lines_of_a_bounded_length() {
        let long = "ü".repeat(MOST_KEPT + 1);
        let text = in_lines(&long, Some("a\nb".into()), Some(long.clone()));
        let cut = "ü".repeat(MOST_KEPT) + "...";
        assert_eq!(text, format!("{cut}\nDETAIL:  a b\nHINT:  {cut}"));
    }
}

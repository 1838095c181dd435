//! What the SQL functions share: what a call begins with, how it tells of errors and NOTICEs, and the steps
//! of a round in a call.

use crate::engine::source::Notice;
use crate::error::{self, Error};
use crate::guc;
use crate::litellm::builtin;
use crate::server::limit::Limit;
use crate::server::locks::Patience;
use crate::server::session::{self, Elevated, Failure, attempt};
use crate::state::rollups;
use crate::state::step::{Runner, Subject};
use crate::worker::round;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use std::time::Duration;

pub fn report<T>(work: impl FnOnce() -> error::Result<T>) -> Result<T, ErrorReport> {
    let _call = session::Call::begin();
    session::require_version().and_then(|()| work()).map_err(|error| match &error {
        Error::NoRollup(name) if builtin::is_report(name) => Error::ReportNotMade(name.clone()).into(),
        Error::NoRollup(_) => {
            let hint = own_rollups();
            let report = ErrorReport::from(error);
            if let Ok(Some(hint)) = hint { report.set_hint(hint) } else { report }
        }
        _ => error.into(),
    })
}

/// The rollups that the caller may name, who need not be allowed to read the status.
fn own_rollups() -> error::Result<Option<String>> {
    let elevated = Elevated::enter()?;
    let names = rollups::rollups_of(elevated.caller(), MOST_NAMES + 1)?;
    let more = if names.len() > MOST_NAMES { " and others" } else { "" };
    let names: Vec<String> = names.iter().take(MOST_NAMES).map(|name| format!("\"{name}\"")).collect();
    Ok((!names.is_empty()).then(|| format!("There are {}{more}.", names.join(", "))))
}

/// As many as the built-in ones, and some.
const MOST_NAMES: usize = 12;

pub fn require_changeable() -> error::Result<()> {
    session::require_writable()?;
    session::require_read_committed()
}

/// After the call, under the caller's own client_min_messages.
pub fn tell(notices: Vec<Notice>) {
    notices.into_iter().for_each(Notice::report);
}

/// The steps of a round, each in a subtransaction of the caller's.
pub struct Subtransactions {
    patience: Patience,
    /// How long a step may take; `None`: as long as the caller lets it.
    limit: Option<Duration>,
    cancelled: Option<Failure>,
    /// The rollups to work on.
    pub rollups: Vec<String>,
    pub watching: bool,
}

impl Subtransactions {
    pub fn of_call(limit: Option<Duration>) -> Self {
        let patience = Patience::of_call();
        Subtransactions { patience, limit, cancelled: None, rollups: vec![], watching: false }
    }

    /// Fails if the caller was cancelled meanwhile.
    pub fn end(&mut self) -> Result<(), ErrorReport> {
        self.cancelled.take().map_or(Ok(()), |failure| Err(failure.report()))
    }
}

impl Runner for Subtransactions {
    fn step<T>(&mut self, subject: Subject, work: impl FnOnce() -> error::Result<T>) -> Option<T> {
        if self.cancelled.is_some() {
            return None;
        }
        let outcome = attempt(|| {
            let _ourselves = Elevated::enter()?.impatient(guc::lock_timeout().time);
            let _limit = self.limit.map(|limit| Limit::begin(limit, false));
            work()
        });
        match outcome {
            Ok(value) => Some(value),
            // Without a limit of ours it is that of the step which has called us.
            Err(failure) if failure.is_cancel() || self.limit.is_none() && failure.is_timeout() => {
                self.cancelled = Some(failure);
                None
            }
            Err(failure) => {
                let message = format!("litellm_spend: {subject} failed: {}", failure.message);
                session::tell(PgLogLevel::WARNING, failure.explain(message));
                drop(attempt(|| round::record(&subject, Some(&failure), None)));
                None
            }
        }
    }

    fn patience(&self) -> Patience {
        self.patience
    }

    fn may_fill(&self, rollup: &str) -> bool {
        self.rollups.iter().any(|name| name == rollup)
    }

    fn may_watch(&self) -> bool {
        self.watching
    }
}

/// How long a step may take in a call that works for one owner after the other.
pub const STEP_OF_CALL: Duration = Duration::from_secs(60);

//! Runs the steps of a worker, each in a transaction of its own, so that one that fails or takes too long
//! does not stop the others.

use crate::error::Result;
use crate::guc;
use crate::server::limit::{self, Limit};
use crate::server::locks::{Patience, jittered};
use crate::server::log;
use crate::server::session::Failure;
use crate::state::rollups;
use crate::state::sources::Source;
use crate::state::step::{Runner, Subject};
use crate::worker::builder;
use crate::worker::pace::{MERGE_LIMIT, Pace};
use crate::worker::process::{
    attempt_as_owner, attempt_in_transaction, in_transaction, reload_settings, report_running,
};
use crate::worker::quiet::Look;
use crate::worker::round;
use pgrx::bgworkers::*;
use pgrx::prelude::*;
use std::cell::RefCell;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Runs each step in its own transaction and within a limit of time. After a failure its subject is left
/// alone, for longer each time; after one that took too long, for longer than it took, so that most of the
/// time is the others'.
pub struct Steps {
    resting: HashMap<Subject, (Instant, Duration)>,
    /// Other limits than [`SHORTEST_LIMIT`], for subjects that took longer.
    limits: HashMap<Subject, Duration>,
    /// Of merges and summaries.
    pace: Pace,
    /// Processes that build or drop an index.
    builders: HashMap<Subject, DynamicBackgroundWorker>,
    /// At the captured table and what else others may change.
    pub(super) watch: Look,
    pub(super) maintenance: Look,
    pub(super) indexes: Look,
    /// Since when sources have had something to merge.
    pub(super) waiting: HashMap<String, Instant>,
    /// What their sequences had given at the last look.
    pub(super) last_values: HashMap<String, Option<i64>>,
    /// When there was something to do, or news of it.
    pub(super) last_news: Instant,
    /// How many looks in a row have failed.
    pub(super) looks_in_vain: u32,
}

impl Default for Steps {
    fn default() -> Self {
        Steps {
            resting: HashMap::new(),
            limits: HashMap::new(),
            pace: Pace::default(),
            builders: HashMap::new(),
            watch: Look::every(WATCH_INTERVAL),
            maintenance: Look::every(MAINTENANCE_LOOK),
            indexes: Look::every(INDEX_LOOK),
            waiting: HashMap::new(),
            last_values: HashMap::new(),
            last_news: Instant::now(),
            looks_in_vain: 0,
        }
    }
}

impl Steps {
    /// Whether a merge that failed has rested for long enough. What was dropped meanwhile is forgotten.
    pub(super) fn merge_is_tried_again(&mut self) -> bool {
        let is_merge = |subject: &Subject| matches!(subject, Subject::Source(_) | Subject::Rollup(_));
        let now = Instant::now();
        if !self.resting.iter().any(|(subject, (until, _))| is_merge(subject) && *until <= now) {
            return false;
        }
        let Ok(there) = attempt_in_transaction(rollups::merged) else { return true };
        self.resting.retain(|subject, _| match subject {
            Subject::Source(name) => there.iter().any(|(_, source)| source == name),
            Subject::Rollup(name) => there.iter().any(|(rollup, _)| rollup == name),
            _ => true,
        });
        self.resting.iter().any(|(subject, (until, _))| is_merge(subject) && *until <= now)
    }

    pub(super) fn take_back(&self, subject: &Subject) {
        drop(attempt_in_transaction(|| round::record(subject, None, None)));
    }

    fn rests(&self, subject: &Subject) -> bool {
        self.resting.get(subject).is_some_and(|(until, _)| Instant::now() < *until)
    }

    /// The last worker may have been terminated in a step: then somebody else's turn comes first.
    pub(super) fn rest_after_crash(&mut self) {
        let failed = attempt_in_transaction(|| round::endless_within(LONGEST_REST));
        for subject in failed.unwrap_or_default() {
            self.resting.insert(subject, (Instant::now() + LONGEST_REST, LONGEST_REST));
        }
    }

    fn limit(&self, subject: &Subject) -> Duration {
        match subject {
            Subject::Rollup(_) | Subject::Together(_) => self.pace.limit(subject),
            Subject::Summary(_) => MERGE_LIMIT,
            Subject::CopysIndex(..) => self.limits.get(subject).copied().unwrap_or(LONGEST_LIMIT),
            _ => self.limits.get(subject).copied().unwrap_or(SHORTEST_LIMIT),
        }
    }

    /// How long a subject is left alone that fails now.
    fn rest(&self, subject: &Subject, timed_out: bool) -> Duration {
        let rest = self.resting.get(subject).map_or(SHORTEST_REST, |(_, rest)| (*rest * 2).min(LONGEST_REST));
        // A build is begun anew: it would take most of the time that others get.
        let times = if matches!(subject, Subject::CopysIndex(..)) { 1 } else { 4 };
        if timed_out { rest.max(self.limit(subject) * times) } else { rest }
    }

    /// Leaves a subject that failed alone for a while, and takes its failure back when it succeeds.
    fn judge<T>(&mut self, subject: Subject, outcome: std::result::Result<T, Failure>) -> Option<T> {
        match outcome {
            Ok(value) => {
                self.forget_failure(&subject);
                Some(value)
            }
            Err(failure) => {
                let rest = self.rest(&subject, failure.is_timeout());
                if failure.is_timeout() {
                    self.make_easier(&subject);
                } else if failure.lacks_resources() && is_merged_in_windows(&subject) {
                    self.pace.stay_below(&subject, self.most_merged(&subject));
                }
                log::failure(format_args!("{subject} failed, next try in {rest:?}"), &failure);
                self.resting.insert(subject, (Instant::now() + jittered(rest), rest));
                None
            }
        }
    }

    /// A smaller window for a merge, a longer limit for what cannot be divided.
    fn make_easier(&mut self, subject: &Subject) {
        if is_merged_in_windows(subject) {
            return self.pace.make_easier(subject, self.most_merged(subject));
        }
        let limit = match subject {
            Subject::CopysIndex(..) => (self.limit(subject) * 8).min(LIMIT_OF_WHOLE),
            Subject::Expiry(..) => (self.limit(subject) * 2).min(LIMIT_OF_WHOLE),
            _ => (self.limit(subject) * 2).min(LONGEST_LIMIT),
        };
        self.limits.insert(subject.clone(), limit);
    }
}

fn is_merged_in_windows(subject: &Subject) -> bool {
    matches!(subject, Subject::Rollup(_) | Subject::Together(_) | Subject::Summary(_))
}

/// Shorter than the second between two rounds by default, so that each of those looks.
const WATCH_INTERVAL: Duration = Duration::from_millis(900);

/// Between two rounds over the tables that are to be maintained. When one is,
/// `litellm_spend.maintain_interval` says.
const MAINTENANCE_LOOK: Duration = Duration::from_secs(1);

/// Between two looks for indexes that are to be built, while none is.
const INDEX_LOOK: Duration = Duration::from_secs(5);

const SHORTEST_REST: Duration = Duration::from_millis(500);
const LONGEST_REST: Duration = Duration::from_secs(60);

const SHORTEST_LIMIT: Duration = Duration::from_secs(10);
const LONGEST_LIMIT: Duration = Duration::from_secs(1200);

/// An index of the copy that a reversion makes takes hours, of hundreds of millions of rows, and the swap
/// would never come without it: it begins with as long as others have at most, and has eight times as long at
/// each further try, up to a day. Without the count of an expired partition its disk space would never come
/// back: its time grows as that of others does, and goes on to.
const LIMIT_OF_WHOLE: Duration = LONGEST_LIMIT.saturating_mul(64);

impl Runner for Steps {
    fn forget_failure(&mut self, subject: &Subject) {
        if self.resting.remove(subject).is_some() {
            self.take_back(subject);
        }
    }

    fn step<T>(&mut self, subject: Subject, work: impl FnOnce() -> Result<T>) -> Option<T> {
        if self.rests(&subject) {
            return None;
        }
        let limit = self.limit(&subject);
        report_running(&subject);
        let outcome = {
            AT.set(Some(subject.clone()));
            let _limit = Limit::begin(limit, true);
            attempt_in_transaction(work)
        };
        AT.set(None);
        if let Err(failure) = &outcome
            && let rest = self.rest(&subject, failure.is_timeout())
            && let Err(second) = attempt_in_transaction(|| round::record(&subject, Some(failure), Some(rest)))
        {
            log::failure("could not record a failure", &second);
        }
        self.judge(subject, outcome)
    }

    fn patience(&self) -> Patience {
        Patience::None
    }

    fn commits_each_step(&self) -> bool {
        true
    }

    fn begin_top_level(&mut self, subject: Subject, table: pg_sys::Oid) {
        use BackgroundWorkerStatus::NotYetStarted;
        let runs = self.builders.get(&subject).is_some_and(|b| matches!(b.pid(), Ok(_) | Err(NotYetStarted)));
        if runs || self.rests(&subject) {
            return;
        }
        // If it is to be started again, it has failed: it rests longer each time.
        let rest = self.rest(&subject, false);
        self.resting.insert(subject.clone(), (Instant::now() + jittered(rest), rest));
        match builder::start(table) {
            Some(builder) => drop(self.builders.insert(subject, builder)),
            None => log::now("no slot to build an index; raise max_worker_processes"),
        }
    }

    fn most_merged(&self, subject: &Subject) -> i64 {
        self.pace.most(subject).min(guc::max_window())
    }

    fn note_window(&mut self, subject: &Subject, values: i64, took: Duration) {
        self.pace.note(subject, self.most_merged(subject), values, took);
    }

    fn worth_waiting(&self, source: &Source) -> Duration {
        let merges = source.rollups.iter().cloned().map(Subject::Rollup);
        let merges = merges.chain([Subject::Together(source.name.clone())]);
        merges.map(|merge| self.pace.worth_waiting(&merge)).max().unwrap_or_default()
    }

    fn merge_is_due(&mut self, source: &str, numbers: i64) -> bool {
        let since = *self.waiting.entry(source.into()).or_insert_with(Instant::now);
        numbers >= guc::merge_rows() || since.elapsed() >= guc::merge_delay()
    }

    fn note_merged(&mut self, source: &str) {
        self.waiting.remove(source);
    }

    fn may_maintain(&mut self) -> bool {
        // A round may take hours: whoever ends it now does not wait for that.
        reload_settings();
        !guc::maintain_interval().is_zero()
    }

    fn watch_is_due(&mut self) -> bool {
        self.watch.begins()
    }

    fn end_watch(&mut self) {
        self.watch.settle();
    }
}

thread_local! {
    /// What the worker is at.
    static AT: RefCell<Option<Subject>> = const { RefCell::new(None) };
}

/// In a worker that ends: if in the middle of a step whose time was over, notes whose it was, so that the
/// next one lets it rest first.
pub fn note_endless() {
    let Some(subject) = AT.take().filter(|_| limit::expired()) else { return };
    // SAFETY: as the server does to drop temporary tables at this point.
    unsafe { pg_sys::AbortOutOfAnyTransaction() };
    let failure = Failure::endless();
    in_transaction(|| {
        // Nothing ends a wait here, not even SIGTERM.
        drop(attempt_as_owner(|| match round::record_waits_for_nobody(&subject)? {
            true => round::record(&subject, Some(&failure), None),
            false => Ok(()),
        }))
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_of_a_copys_index_and_of_a_count_grow_to_a_day_and_no_others_do() {
        let limits = |subject: Subject, tries: usize| {
            let mut steps = Steps::default();
            (0..tries).for_each(|_| steps.make_easier(&subject));
            steps.limit(&subject)
        };
        let index = || Subject::CopysIndex("s".into(), "t".into());
        assert_eq!(limits(index(), 0), LONGEST_LIMIT);
        assert_eq!(limits(index(), 1), LONGEST_LIMIT * 8);
        assert_eq!(limits(index(), 20), LIMIT_OF_WHOLE);
        let count = || Subject::Expiry(1, "p".into());
        assert_eq!(limits(count(), 0), SHORTEST_LIMIT);
        assert_eq!(limits(count(), 8), SHORTEST_LIMIT * 256);
        assert_eq!(limits(count(), 20), LIMIT_OF_WHOLE);
        assert_eq!(limits(Subject::Policy(1, "p".into()), 20), LONGEST_LIMIT);
        assert_eq!(limits(Subject::Conversion("s".into(), "t".into()), 0), SHORTEST_LIMIT);
        assert_eq!(limits(Subject::Conversion("s".into(), "t".into()), 20), LONGEST_LIMIT);
    }
}

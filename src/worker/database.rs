//! The worker of one database: a round of everything that may have something to do, each step in a
//! transaction of its own, then a pause.

use crate::error::Result;
use crate::guc;
use crate::server::limit::{self, Limit};
use crate::server::locks::{Patience, database_is_wanted, jittered};
use crate::server::log;
use crate::server::session::{self, Failure, attempt};
use crate::server::spi;
use crate::state::news;
use crate::state::rollups;
use crate::state::step::{Runner, Subject};
use crate::worker::builder;
use crate::worker::launcher;
use crate::worker::process::{
    attach_signals, attempt_as_owner, attempt_in_transaction, in_transaction, pin_settings, reload_settings,
    report_idle, report_running,
};
use crate::worker::quiet::{self, Look};
use crate::worker::round;
use crate::worker::service;
use pgrx::bgworkers::*;
use pgrx::prelude::*;
use std::cell::RefCell;
use std::collections::HashMap;
use std::time::{Duration, Instant};

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn litellm_spend_worker(argument: pg_sys::Datum) {
    attach_signals();
    // SAFETY: the launcher passes an Oid.
    let database = unsafe { pg_sys::Oid::from_datum(argument, false) };
    let launch = launcher::launch();
    BackgroundWorker::connect_worker_to_spi_by_oid(database, None);
    pin_settings();
    in_transaction(log::learn_database);
    if in_transaction(extension_exists) {
        launcher::found_extension();
    }
    let mut steps = Steps::default();
    // SAFETY: in a worker that has a database; runs once, when it ends.
    unsafe { pg_sys::before_shmem_exit(Some(on_exit), pg_sys::Datum::from(0)) };
    steps.rest_after_crash();
    // What failed in an earlier life is noted again if it still does.
    steps.take_back(&Subject::Task("watch"));
    let (mut tidied, mut more, mut indexing) = (Instant::now(), false, false);
    quiet::listen();
    while launcher::launch() == launch
        && let Some(work) = steps.look()
    {
        more = (more || work || steps.watch.is_due()) && round::round(&mut steps).more;
        if steps.maintenance.begins() {
            round::maintain(&mut steps);
            steps.maintenance.settle();
        }
        if indexing || steps.indexes.begins() {
            indexing = round::index(&mut steps);
            steps.indexes.settle();
        }
        if tidied.elapsed() > TIDY_INTERVAL {
            round::tidy(&mut steps);
            tidied = Instant::now();
        }
        service::served();
        report_idle();
        if !more && !BackgroundWorker::wait_latch(Some(steps.pause())) {
            return;
        }
        pgrx::check_for_interrupts!();
        reload_settings();
    }
}

/// Shorter than the second between two rounds by default, so that each of those looks.
const WATCH_INTERVAL: Duration = Duration::from_millis(900);

const TIDY_INTERVAL: Duration = Duration::from_secs(60);

/// Between two rounds over the tables that are to be maintained. When one is,
/// `litellm_spend.maintain_interval` says.
const MAINTENANCE_LOOK: Duration = Duration::from_secs(1);

/// Between two looks whether the extension is at the library's version.
const UPDATE_LOOK: Duration = Duration::from_millis(500);

/// Between two looks for indexes that are to be built, while none is.
const INDEX_LOOK: Duration = Duration::from_secs(5);

fn extension_exists() -> bool {
    let sql = "SELECT EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'litellm_spend')";
    // Not Spi::get_one(), which takes an XID: a worker with nothing to do writes no WAL.
    spi::query(sql, &[], |r| spi::value::<bool>(r, 1)).is_ok_and(|exists| exists == [true])
}

/// Runs each step in its own transaction and within a limit of time. After a failure its subject is left
/// alone, for longer each time; after one that took too long, for longer than it took, so that most of the
/// time is the others'.
struct Steps {
    resting: HashMap<Subject, (Instant, Duration)>,
    /// Other limits than [`SHORTEST_LIMIT`], for subjects that took longer.
    limits: HashMap<Subject, Duration>,
    /// How large the next window of a merge may be, by how long the last ones took.
    windows: HashMap<Subject, Window>,
    /// Processes that build or drop an index.
    builders: HashMap<Subject, DynamicBackgroundWorker>,
    /// At the captured table and what else others may change.
    watch: Look,
    maintenance: Look,
    indexes: Look,
    /// Since when sources have had something to merge.
    waiting: HashMap<String, Instant>,
    /// What their sequences had given at the last look.
    last_values: HashMap<String, Option<i64>>,
    /// When there was something to do, or news of it.
    last_news: Instant,
    /// How many looks in a row have failed.
    looks_in_vain: u32,
}

impl Default for Steps {
    fn default() -> Self {
        Steps {
            resting: HashMap::new(),
            limits: HashMap::new(),
            windows: HashMap::new(),
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
    /// Whether a round would find something to do; looks at what only now and then changes are made due.
    /// `None`: the worker is to leave.
    fn look(&mut self) -> Option<bool> {
        let news = in_transaction(|| (!database_is_wanted()).then(|| attempt_as_owner(news::look)))?;
        let told = quiet::was_told();
        if told {
            self.expect_all();
        }
        let news = match news {
            Ok(news) => news,
            Err(failure) => return self.looked_in_vain(&failure).then_some(true),
        };
        self.looks_in_vain = 0;
        if news.policies {
            self.maintenance.expect();
        }
        if news.indexes {
            self.indexes.expect();
        }
        let mut work = news.other;
        for news::Numbers { source, last_value, merged_to, trims } in news.sources {
            if self.last_values.insert(source.clone(), last_value).is_some_and(|before| last_value < before) {
                self.watch.expect();
            }
            let numbers = last_value.map_or(0, |last_value| last_value - merged_to);
            if numbers == 0 {
                self.merged(&source);
            }
            work |= trims || numbers < 0 || numbers > 0 && self.merge_is_due(&source, numbers);
        }
        // What failed is tried again, also where nothing more comes: else its error would stay.
        work |= self.merge_is_tried_again();
        if told || work || news.policies || news.indexes || !self.waiting.is_empty() {
            self.last_news = Instant::now();
        }
        Some(work)
    }

    fn expect_all(&mut self) {
        [&mut self.watch, &mut self.maintenance, &mut self.indexes].into_iter().for_each(Look::expect);
    }

    /// A look fails while the extension is at another version, and while an owner keeps a sequence to
    /// himself. Then everything that it would have told of is looked at. `false`: the worker is to leave.
    fn looked_in_vain(&mut self, failure: &Failure) -> bool {
        let goes_on = self.wait_for_update();
        self.expect_all();
        self.last_news = Instant::now();
        self.looks_in_vain += 1;
        // Not the one after an update.
        if self.looks_in_vain == 2 {
            log::failure("everything is looked at: the look for news failed", failure);
        }
        goes_on
    }

    /// Whether a merge that failed has rested for long enough. What was dropped meanwhile is forgotten.
    fn merge_is_tried_again(&mut self) -> bool {
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

    /// Until the next look: longer where nothing has happened for a while.
    fn pause(&self) -> Duration {
        guc::merge_interval() * if self.last_news.elapsed() > quiet::LONGEST { 4 } else { 1 }
    }

    /// Rests while the extension is at another version than the library. `false`: the worker is to leave.
    fn wait_for_update(&mut self) -> bool {
        let (launch, mut said) = (launcher::launch(), false);
        while launcher::launch() == launch && in_transaction(|| extension_exists() && !database_is_wanted()) {
            let Err(failure) = in_transaction(|| attempt(session::require_version)) else { return true };
            if !said {
                log::failure("nothing is done", &failure);
                report_running(&"waits for ALTER EXTENSION litellm_spend UPDATE");
                said = true;
            }
            if !BackgroundWorker::wait_latch(Some(UPDATE_LOOK)) {
                return false;
            }
            pgrx::check_for_interrupts!();
            reload_settings();
        }
        false
    }

    fn take_back(&self, subject: &Subject) {
        drop(attempt_in_transaction(|| round::record(subject, None, None)));
    }

    fn rests(&self, subject: &Subject) -> bool {
        self.resting.get(subject).is_some_and(|(until, _)| Instant::now() < *until)
    }

    /// The last worker may have been terminated in a step: then somebody else's turn comes first.
    fn rest_after_crash(&mut self) {
        let failed = attempt_in_transaction(|| round::endless_within(LONGEST_REST));
        for subject in failed.unwrap_or_default() {
            self.resting.insert(subject, (Instant::now() + LONGEST_REST, LONGEST_REST));
        }
    }

    fn limit(&self, subject: &Subject) -> Duration {
        match subject {
            Subject::Rollup(_) | Subject::Together(_) => {
                let last = self.windows.get(subject).map_or(Duration::ZERO, |last| last.took);
                MERGE_LIMIT.max((last * GROWTH).min(BEHIND_WINDOW_TIME) * 3)
            }
            Subject::Summary(_) => MERGE_LIMIT,
            _ => self.limits.get(subject).copied().unwrap_or(SHORTEST_LIMIT),
        }
    }

    /// How long a subject is left alone that fails now.
    fn rest(&self, subject: &Subject, timed_out: bool) -> Duration {
        let rest = self.resting.get(subject).map_or(SHORTEST_REST, |(_, rest)| (*rest * 2).min(LONGEST_REST));
        if timed_out { rest.max(self.limit(subject) * 4) } else { rest }
    }

    /// Leaves a subject that failed alone for a while, and takes its failure back when it succeeds.
    fn judge<T>(&mut self, subject: Subject, outcome: std::result::Result<T, Failure>) -> Option<T> {
        match outcome {
            Ok(value) => {
                self.recovered(&subject);
                Some(value)
            }
            Err(failure) => {
                let rest = self.rest(&subject, failure.is_timeout());
                if failure.is_timeout() {
                    self.make_easier(&subject);
                }
                log::failure(format_args!("{subject} failed, next try in {rest:?}"), &failure);
                self.resting.insert(subject, (Instant::now() + jittered(rest), rest));
                None
            }
        }
    }

    /// A smaller window for a merge, a longer limit for what cannot be divided.
    fn make_easier(&mut self, subject: &Subject) {
        match subject {
            Subject::Rollup(_) | Subject::Together(_) | Subject::Summary(_) => {
                let window = (self.most_merged(subject) / 8).max(SMALLEST_WINDOW);
                self.windows.insert(subject.clone(), Window { most: window, took: Duration::ZERO });
            }
            _ => {
                let limit = (self.limit(subject) * 2).min(LONGEST_LIMIT);
                self.limits.insert(subject.clone(), limit);
            }
        }
    }
}

const SHORTEST_REST: Duration = Duration::from_millis(500);
const LONGEST_REST: Duration = Duration::from_secs(60);

/// The windows of a merge.
struct Window {
    /// How many values the next one may have.
    most: i64,
    /// How long the last one took.
    took: Duration,
}

/// Windows grow to what is merged in this time: the larger, the more rows meet in a group that is written
/// once, and the longer others wait for their turn.
const WINDOW_TIME: Duration = Duration::from_secs(1);
/// The same while rows come faster than they are merged. If each row of a small window has a group of its
/// own, only larger ones catch up, the sooner the larger; and a busy machine, which is where this happens,
/// takes several times as long for the same window.
const BEHIND_WINDOW_TIME: Duration = Duration::from_secs(30);
/// How many times as large as the last one a window may be.
const GROWTH: u32 = 4;
/// For a machine that becomes three times as slow between two windows, and for no longer than that after a
/// window as long as they may be: what a merge calls may be anybody's, and others wait for their turn.
const MERGE_LIMIT: Duration = Duration::from_secs(3);
/// Takes 0.1 to 1 s (PostgreSQL 15, two shared cores, 2026-11).
const FIRST_WINDOW: i64 = 100_000;
const SMALLEST_WINDOW: i64 = 1000;

/// How many values the next window may have, after one of `values` of the `most` that were allowed.
fn next_window(most: i64, values: i64, took: Duration) -> i64 {
    if values < most && took <= WINDOW_TIME {
        return most;
    }
    let time = if values < most { WINDOW_TIME } else { BEHIND_WINDOW_TIME };
    let fits = values as f64 * time.as_secs_f64() / took.as_secs_f64();
    (fits as i64).clamp(most / 2, most.saturating_mul(GROWTH.into())).max(SMALLEST_WINDOW)
}

const SHORTEST_LIMIT: Duration = Duration::from_secs(10);
const LONGEST_LIMIT: Duration = Duration::from_secs(1200);

thread_local! {
    /// What the worker is at.
    static AT: RefCell<Option<Subject>> = const { RefCell::new(None) };
}

/// Until now it was there. A worker that ends in the middle of a step whose time was over notes whose it was,
/// for the next one.
#[pg_guard]
unsafe extern "C-unwind" fn on_exit(_code: i32, _argument: pg_sys::Datum) {
    service::ending();
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

impl Runner for Steps {
    fn recovered(&mut self, subject: &Subject) {
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
        self.windows.get(subject).map_or(FIRST_WINDOW, |window| window.most).min(guc::max_window())
    }

    fn has_merged(&mut self, subject: &Subject, values: i64, took: Duration) {
        let most = next_window(self.most_merged(subject), values, took);
        self.windows.insert(subject.clone(), Window { most, took });
    }

    fn merge_is_due(&mut self, source: &str, numbers: i64) -> bool {
        let since = *self.waiting.entry(source.into()).or_insert_with(Instant::now);
        numbers >= guc::merge_rows() || since.elapsed() >= guc::merge_delay()
    }

    fn merged(&mut self, source: &str) {
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

    fn settled(&mut self) {
        self.watch.settle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_grows_while_there_is_time_and_shrinks_when_there_is_not() {
        let seconds = Duration::from_secs_f64;
        assert_eq!(next_window(100_000, 100_000, seconds(0.04)), 400_000);
        assert_eq!(next_window(100_000, 100_000, seconds(24.0)), 125_000);
        assert_eq!(next_window(100_000, 100_000, seconds(48.0)), 62_500);
        assert_eq!(next_window(100_000, 100_000, seconds(480.0)), 50_000, "not by one slow window alone");
        assert_eq!(next_window(100_000, 3, seconds(0.1)), 100_000, "few rows say nothing");
        assert_eq!(next_window(100_000, 60_000, seconds(1.2)), 50_000);
        assert_eq!(next_window(100_000, 5_000_000, Duration::ZERO), 400_000, "a gap of the numbers");
        assert_eq!(next_window(SMALLEST_WINDOW, 1000, seconds(60.0)), SMALLEST_WINDOW);
    }
}

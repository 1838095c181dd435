//! The worker of one database: a round of everything that may have something to do, each step in a
//! transaction of its own, then a pause.

use crate::guc;
use crate::server::locks::database_is_wanted;
use crate::server::log;
use crate::server::session::{self, Failure, attempt};
use crate::server::spi;
use crate::state::news;
use crate::state::step::{Runner, Subject, Task};
use crate::worker::launcher;
use crate::worker::process::{
    attach_signals, attempt_as_owner, in_transaction, pin_settings, reload_settings, report_idle,
    report_running,
};
use crate::worker::quiet::{self, Look};
use crate::worker::round;
use crate::worker::service;
use crate::worker::steps::{self, Steps};
use pgrx::bgworkers::*;
use pgrx::prelude::*;
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
    if !in_transaction(extension_exists) {
        return launcher::found_none();
    }
    launcher::found_extension();
    let mut steps = Steps::default();
    // SAFETY: in a worker that has a database; runs once, when it ends.
    unsafe { pg_sys::before_shmem_exit(Some(on_exit), pg_sys::Datum::from(0)) };
    steps.rest_after_crash();
    // What failed in an earlier life is noted again if it still does.
    steps.take_back(&Subject::Task(Task::Watch));
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

const TIDY_INTERVAL: Duration = Duration::from_secs(60);

/// Between two looks whether the extension is at the library's version.
const UPDATE_LOOK: Duration = Duration::from_millis(500);

fn extension_exists() -> bool {
    let sql = "SELECT EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'litellm_spend')";
    // Not Spi::get_one(), which takes an XID: a worker with nothing to do writes no WAL.
    spi::query(sql, &[], |r| spi::value::<bool>(r, 1)).is_ok_and(|exists| exists == [true])
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
                work = true;
            }
            let numbers = last_value.map_or(0, |last_value| last_value - merged_to);
            if numbers == 0 {
                self.note_merged(&source);
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
}

/// Runs when the worker ends: notes until when this database was served, and whose step has no end.
#[pg_guard]
unsafe extern "C-unwind" fn on_exit(_code: i32, _argument: pg_sys::Datum) {
    service::ending();
    steps::note_endless();
}

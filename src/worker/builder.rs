//! Builds and drops indexes, of a conversion or ones that were asked for, in a process of its own.
//!
//! CREATE INDEX CONCURRENTLY waits for every transaction that was there before it, however long: one owner's
//! open transaction would keep the database's only worker, and with it everybody's merges, for as long as
//! that lasts. The worker starts this process, looks now and then how far the index is, and goes on when it
//! is there.

use crate::error::Result;
use crate::index::build::{self, Next};
use crate::partition::convert::{Conversion, Step};
use crate::server::locks::database_is_wanted;
use crate::server::log;
use crate::server::session::{Failure, Owner};
use crate::server::spi::{self, Found};
use crate::state::conversion::Pending;
use crate::state::step::Subject;
use crate::worker::give_way;
use crate::worker::process::{
    attach_signals, attempt_in_transaction, in_transaction, pin_settings, report_running, utility,
};
use crate::worker::round;
use pgrx::bgworkers::*;
use pgrx::prelude::*;

/// Starts the process for the conversion or the indexes of `relation`. `None`: there is no slot for it.
pub fn start(relation: pg_sys::Oid) -> Option<DynamicBackgroundWorker> {
    // SAFETY: reads a variable of this process.
    let database = unsafe { pg_sys::MyDatabaseId };
    let argument = u64::from(database.to_u32()) << 32 | u64::from(relation.to_u32());
    BackgroundWorkerBuilder::new("litellm_spend builder")
        .set_type("litellm_spend builder")
        .set_library("litellm_spend")
        .set_function("litellm_spend_builder")
        .enable_spi_access()
        .set_argument(Some(pg_sys::Datum::from(argument)))
        .set_restart_time(None)
        .load_dynamic()
        .ok()
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn litellm_spend_builder(argument: pg_sys::Datum) {
    attach_signals();
    let argument = argument.value() as u64;
    let (database, relation) =
        (pg_sys::Oid::from((argument >> 32) as u32), pg_sys::Oid::from(argument as u32));
    BackgroundWorker::connect_worker_to_spi_by_oid(Some(database), None);
    pin_settings();
    in_transaction(log::learn_database);
    if !give_way::begin() {
        log::now("there are too many processes that build an index");
        return;
    }
    // The next one at once: a round of the worker later there would be as many seconds as partitions.
    while !in_transaction(database_is_wanted) && build_one(relation) {}
}

/// `false`: nothing is left to do, or it failed, and it is for the worker to say when it is tried again.
fn build_one(relation: pg_sys::Oid) -> bool {
    let found = attempt_in_transaction(|| statement(relation));
    let Ok(Some(Statement { subject, owner, sql, conversion })) = found else { return false };
    log::now(&sql);
    report_running(&subject);
    let mut outcome = utility(owner, &sql);
    // Who takes the conversion back has cancelled it: that is no failure.
    if outcome.as_ref().is_err_and(Failure::is_cancel)
        && attempt_in_transaction(|| is_aborted(relation)).is_ok_and(|aborted| aborted)
    {
        outcome = Ok(());
    }
    if let Err(failure) = &outcome {
        log::failure(format_args!("{subject} failed"), failure);
    }
    drop(attempt_in_transaction(|| round::record(&subject, outcome.as_ref().err(), None)));
    if let Some(conversion) = conversion
        && let Ok(Some(sql)) = attempt_in_transaction(|| conversion.drop_unwanted())
    {
        log::now(&sql);
        if let Err(failure) = utility(owner, &sql) {
            log::failure(format_args!("{sql} failed"), &failure);
        }
    }
    outcome.is_ok()
}

fn is_aborted(relation: pg_sys::Oid) -> Result<bool> {
    let all: Vec<Conversion> = Pending::all()?;
    Ok(all.iter().any(|conversion| conversion.relation == relation && conversion.options.aborted))
}

/// What a builder runs.
struct Statement {
    subject: Subject,
    owner: Owner,
    sql: String,
    /// It is one of this conversion.
    conversion: Option<Conversion>,
}

/// What is to be run for the conversion or the indexes of a table, if that is still what comes next and
/// nobody is at it: a builder goes on when its worker is terminated, and what it builds must not be taken for
/// an index that was left half built.
fn statement(relation: pg_sys::Oid) -> Result<Option<Statement>> {
    // By its lock: the progress of a REINDEX is that of the table's TOAST table, too.
    let at_work = "SELECT FROM pg_catalog.pg_stat_progress_create_index p
         JOIN pg_catalog.pg_locks l ON l.pid = p.pid AND l.locktype = 'relation' AND l.relation = $1
         WHERE l.database = p.datid AND p.datname = pg_catalog.current_database() LIMIT 1";
    if spi::query(at_work, &[relation.into()], |_| Ok(())).any()? {
        return Ok(None);
    }
    let all: Vec<Conversion> = Pending::all()?;
    if let Some(conversion) = all.into_iter().find(|conversion| conversion.relation == relation)
        && let Step::TopLevel(sql) = conversion.next_step()?
    {
        let subject = Subject::Conversion(conversion.schema.clone(), conversion.table.clone());
        let owner = conversion.owner;
        return Ok(Some(Statement { subject, owner, sql, conversion: Some(conversion) }));
    }
    Ok(match build::next(relation)? {
        Next::Do(work) => {
            Some(Statement { subject: work.subject, owner: work.owner, sql: work.sql, conversion: None })
        }
        Next::Wait | Next::Nothing => None,
    })
}

//! Has indexes built and dropped: what comes next on a table, and what only top level can run.
//!
//! ```text
//!  step          lock on the partition         who waits
//!  drop, build   SHARE UPDATE EXCLUSIVE        not who reads or writes; who changes or vacuums it
//! ```
//! CONCURRENTLY, one at a time on a table, on the newest partition first; a partition that LiteLLM writes to
//! only where that was asked for. A process of its own does it ([`crate::index`] only says what): a build
//! waits for every transaction that was there before it, however long. Who waits for its lock longer than
//! `litellm_spend.lock_timeout`, with writers behind, ends it, and it is tried again (`worker::give_way`).
//!
//! What has been done is read from the catalogs each time. An index of ours that is not valid, and that
//! nobody builds, was left by a build that failed or was killed: it is dropped before anything else.
//!
//! Whose rights: everything is done as the table's owner. A partition of somebody else's is left alone.

use crate::error::Result;
use crate::guc;
use crate::index::catalogue;
use crate::index::plan;
use crate::partition::revert::Asked;
use crate::server::relation::{Table, free_name};
use crate::server::session::{Failure, Owner};
use crate::server::spi;
use crate::state::conversion;
use crate::state::indexes::{self, Leftover, Place};
use crate::state::step::{Runner, Subject, Task};
use pgrx::prelude::*;
use std::time::Duration;

/// A statement for top level.
pub struct Work {
    pub subject: Subject,
    pub owner: Owner,
    pub sql: String,
}

/// The next thing to do on a table.
pub enum Next {
    Nothing,
    /// Somebody is at work on the table.
    Wait,
    Do(Work),
}

pub fn next(relation: pg_sys::Oid) -> Result<Next> {
    let Some(subject) = indexes::subject_of(relation)? else { return Ok(Next::Nothing) };
    let Some(leftovers) = leftovers(relation)? else { return Ok(Next::Wait) };
    if let Some(leftover) = leftovers.into_iter().find(|leftover| !leftover.rests) {
        return Ok(Next::Do(drop_of(leftover, subject.owner)));
    }
    indexes::forget_dropped(relation)?;
    // Its swap would wait for the build, and the other way round.
    if conversion::is_under_way(relation)? {
        return Ok(Next::Wait);
    }
    for place in indexes::survey(relation)? {
        if !place.due {
            continue;
        }
        match create_of(&place, subject.owner) {
            Ok(Some(work)) => return Ok(Next::Do(work)),
            Ok(None) => {}
            Err(error) => indexes::record_build(place.partition, &place.name, Some(&Failure::from(error)))?,
        }
    }
    Ok(Next::Nothing)
}

/// `None`: somebody is at work on the table, and what is half built may be theirs. Who was at work when it
/// was seen is so still, or has ended, and then it is gone or valid: so it is looked at before and after.
fn leftovers(relation: pg_sys::Oid) -> Result<Option<Vec<Leftover>>> {
    let first = indexes::leftovers(relation)?;
    if indexes::is_at_work(relation)? {
        return Ok(None);
    }
    if first.is_empty() {
        return Ok(Some(first));
    }
    let again = indexes::leftovers(relation)?;
    Ok(Some(first.into_iter().filter(|leftover| again.contains(leftover)).collect()))
}

fn drop_of(leftover: Leftover, owner: Owner) -> Work {
    let Leftover { name, partition, partition_name, index, .. } = leftover;
    let subject = Subject::IndexDrop(partition.to_u32(), name, partition_name);
    Work { subject, owner, sql: format!("DROP INDEX CONCURRENTLY IF EXISTS {index}") }
}

/// `None`: another version of ours knows that index.
fn create_of(place: &Place, owner: Owner) -> Result<Option<Work>> {
    let Some(index) = catalogue::find(&place.name) else { return Ok(None) };
    let schema = &place.partition_schema;
    let name = free_name([schema, schema], &index.name_on(&place.partition_name))?;
    let sql = index.create(&name, schema, &place.partition_name)?;
    let subject = Subject::Index(place.partition.to_u32(), place.name.clone(), place.partition_name.clone());
    Ok(Some(Work { subject, owner, sql }))
}

/// What a table that is being reverted is asked for, as its copy is to have it. What is not possible now is
/// left for later.
pub fn for_copy(table: &Table, copy: pg_sys::Oid) -> Result<Vec<Asked>> {
    let names = indexes::asked_for(table)?;
    if names.is_empty() {
        return Ok(vec![]);
    }
    let others = plan::of_others(copy)?;
    let asked = names.iter().filter_map(|name| catalogue::find(name));
    let possible = asked.filter(|index| {
        !others.iter().any(|found| found.does(index)) && index.require_possible(table).is_ok()
    });
    possible
        .map(|index| Ok(Asked { name: index.name_on(&table.name), definition: index.definition()? }))
        .collect()
}

/// The state of an index on a table or partition, for whoever asked for it: index, partition, state,
/// and what there is to say.
pub type Row = (String, String, String, String);

/// A row for each index that was asked for; where no worker builds them, with the statement to run.
pub fn report(relation: pg_sys::Oid, owner: Owner, by_hand: bool) -> Result<Vec<Row>> {
    let mut rows: Vec<Row> = vec![];
    if by_hand {
        for leftover in leftovers(relation)?.unwrap_or_default() {
            let (name, partition) = (leftover.name.clone(), leftover.partition_name.clone());
            rows.push((name, partition, "to drop".into(), statement(drop_of(leftover, owner))));
        }
        indexes::forget_dropped(relation)?;
    }
    let said = rows.len();
    let under_way = conversion::is_under_way(relation)?;
    for place in indexes::survey(relation)? {
        // Of an index that somebody else owns, or builds, there is nothing to run.
        let is_said = |row: &Row| row.0 == place.name && row.1 == place.partition_name;
        if place.state == "to drop" && rows[..said].iter().any(is_said) {
            continue;
        }
        let detail = match place.last_error.clone() {
            _ if by_hand && place.is_missing && !under_way => match create_of(&place, owner) {
                Ok(work) => work.map(statement).unwrap_or_default(),
                Err(error) => Failure::from(error).text(),
            },
            Some(error) => error,
            None if under_way && place.is_missing => {
                "its table is being converted or reverted: see spend_progress".into()
            }
            None if !by_hand && place.state == "waiting" && guc::merge_interval() > SOON => {
                let pause = guc::merge_interval().as_secs();
                format!("begun within {pause} s: see litellm_spend.merge_interval")
            }
            None => String::new(),
        };
        rows.push((place.name, place.partition_name, place.state, detail));
    }
    Ok(rows)
}

fn statement(work: Work) -> String {
    format!("{};", work.sql)
}

/// Whoever asked for an index is told of a worker that looks more rarely than that.
const SOON: Duration = Duration::from_secs(30);

/// One round over all tables. `true`: there is more to do soon.
pub fn round(run: &mut impl Runner) -> bool {
    let mut more = false;
    for table in run.step(Subject::Task(Task::Indexes), indexes::subjects).unwrap_or_default() {
        let (oid, relation) = (table.relation.to_u32(), table.relation);
        let builder = Subject::Builder(oid, table.table.clone());
        match run.step(Subject::Indexes(oid, table.table), || look(relation)) {
            Some(Next::Nothing) => run.forget_failure(&builder),
            Some(Next::Do(_)) => {
                run.begin_top_level(builder, relation);
                more = true;
            }
            // It rests until what was begun has come to something, or what failed is tried again.
            Some(Next::Wait) | None => more = true,
        }
    }
    more
}

fn look(relation: pg_sys::Oid) -> Result<Next> {
    let next = next(relation)?;
    if matches!(next, Next::Wait) {
        cancel_unwanted(relation)?;
    }
    Ok(next)
}

/// Ends our build of an index that is to be dropped. What it leaves is dropped.
fn cancel_unwanted(relation: pg_sys::Oid) -> Result<()> {
    spi::current(
        "SELECT pg_catalog.pg_cancel_backend(p.pid)
         FROM pg_catalog.pg_stat_progress_create_index p
         JOIN pg_catalog.pg_stat_activity a ON a.pid = p.pid AND a.backend_type = 'litellm_spend builder'
         JOIN pg_catalog.pg_class o ON o.oid = p.index_relid
         JOIN litellm_spend.index_set s ON s.relation = $1 AND s.dropped
             AND starts_with(o.relname, 'litellm_spend_' || s.name || '_')
         WHERE p.datname = pg_catalog.current_database() AND p.relid IN (
             SELECT $1 UNION SELECT inhrelid FROM pg_catalog.pg_inherits WHERE inhparent = $1)",
        &[relation.into()],
        |_| Ok(()),
    )
    .map(drop)
}

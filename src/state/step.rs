//! A step of the worker or of a call: what it concerns, and who runs it so that its failure does not reach
//! others.

use crate::error::Result;
use crate::guc;
use crate::server::locks::Patience;
use crate::server::text::qualified;
use crate::state::sources::Source;
use pgrx::pg_sys;
use std::fmt;
use std::time::Duration;

/// What a step concerns: where its failure is recorded, and what is left alone for a while after one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    Task(Task),
    Source(String),
    /// The BRIN indexes of a source.
    Summary(String),
    Rollup(String),
    /// All rollups of a source, merged at once.
    Together(String),
    /// A rollup whose source was dropped or has another owner: its merges fail and rest until that is
    /// settled.
    Stray(String),
    /// A table on its way to being partitioned, or back: its schema and name.
    Conversion(String, String),
    /// An index of the copy that a reversion makes: it takes as long as it takes.
    CopysIndex(String, String),
    /// What comes next for it, and whether its cutover is over: looked at also while the conversion rests.
    Look(String, String),
    /// A look at what comes next for the indexes of a table: its Oid, and what it is called.
    Indexes(u32, String),
    /// The process that builds and drops them: the look, which succeeds, does not take back its rest.
    Builder(u32, String),
    /// An index on a table or partition: its Oid, the index's name in the catalogue, and what the partition
    /// is called.
    Index(u32, String, String),
    /// The same, where it is to be dropped.
    IndexDrop(u32, String, String),
    /// A step of a table's maintenance: the table's Oid, and what the table or partition is called. Each
    /// rests for itself.
    Policy(u32, String),
    /// The end of a partition that has expired, and that is counted before: the same. It takes as long as it
    /// takes.
    Expiry(u32, String),
    /// The statistics of a table that has a policy: its Oid, and what it is called.
    Statistics(u32, String),
}

/// A step of which there is one in a database. A failure is noted of the captured table, whose most of them
/// are: there somebody looks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    Restore,
    Sources,
    Watch,
    Merge,
    Repair,
    Backfill,
    SwitchViews,
    Freeze,
    Hours,
    Conversions,
    Reversions,
    Maintain,
    Indexes,
}

impl Task {
    /// In the order of the variants, each with how what is noted of its failure begins.
    pub const NAMES: [(Task, &str); 13] = [
        (Task::Restore, "restore"),
        (Task::Sources, "sources"),
        (Task::Watch, "watch"),
        (Task::Merge, "merge"),
        (Task::Repair, "repair"),
        (Task::Backfill, "backfill"),
        (Task::SwitchViews, "switch views"),
        (Task::Freeze, "freeze"),
        (Task::Hours, "hours"),
        (Task::Conversions, "conversions"),
        (Task::Reversions, "reversions"),
        (Task::Maintain, "maintain"),
        (Task::Indexes, "indexes"),
    ];

    pub fn name(self) -> &'static str {
        Task::NAMES[self as usize].1
    }
}

/// Runs a step so that its failure does not reach the others.
pub trait Runner {
    /// `None`: the step failed, or is not due yet after an earlier failure.
    fn step<T>(&mut self, subject: Subject, work: impl FnOnce() -> Result<T>) -> Option<T>;
    fn patience(&self) -> Patience;
    /// Whether each step is a transaction of its own: what is left is for another round. A SQL call does all,
    /// within one.
    fn commits_each_step(&self) -> bool {
        false
    }
    /// Has a process of its own run the statement that comes next for the conversion or the indexes of a
    /// table, and that no transaction may surround. Only a worker can.
    fn begin_top_level(&mut self, _subject: Subject, _table: pg_sys::Oid) {}
    /// Most sequence values that it merges in a step, or pages that it summarizes.
    fn most_merged(&self, _subject: &Subject) -> i64 {
        guc::max_window()
    }
    /// It has merged so many sequence values, or summarized so many pages, in a step that took so long.
    fn note_window(&mut self, _subject: &Subject, _values: i64, _took: Duration) {}
    /// How long rows are worth waiting for that would be merged together with those that can be already.
    fn worth_waiting(&self, _source: &Source) -> Duration {
        Duration::ZERO
    }
    /// Whether it is time to merge that many new numbers of a source.
    fn merge_is_due(&mut self, _source: &str, _numbers: i64) -> bool {
        true
    }
    /// All of them are merged.
    fn note_merged(&mut self, _source: &str) {}
    /// Whether it may work on a rollup.
    fn may_fill(&self, _rollup: &str) -> bool {
        true
    }
    /// Whether it may work on the captured table and what belongs to it.
    fn may_watch(&self) -> bool {
        true
    }
    /// Whether it still may maintain tables: asked before each step of that.
    fn may_maintain(&mut self) -> bool {
        true
    }
    /// Whether it is time to look at the captured table again, which takes more queries than all the rest.
    fn watch_is_due(&mut self) -> bool {
        true
    }
    /// That look found nothing wrong.
    fn end_watch(&mut self) {}
    /// A subject that may have failed has nothing to do any more.
    fn forget_failure(&mut self, _subject: &Subject) {}
}

/// As it is called in the server's log and in pg_stat_activity.
impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Subject::Task(task) => write!(f, "{}", task.name()),
            Subject::Source(name) => write!(f, "look at {name}"),
            Subject::Summary(name) => write!(f, "BRIN indexes of {name}"),
            Subject::Rollup(name) => write!(f, "merge of rollup {name}"),
            Subject::Together(name) => write!(f, "merge of {name}"),
            Subject::Stray(name) => write!(f, "source of rollup {name}"),
            Subject::Conversion(schema, table)
            | Subject::CopysIndex(schema, table)
            | Subject::Look(schema, table) => {
                write!(f, "conversion or reversion of {}", qualified(schema, table))
            }
            Subject::Indexes(_, table) | Subject::Builder(_, table) => write!(f, "indexes of {table}"),
            Subject::Index(_, index, partition) | Subject::IndexDrop(_, index, partition) => {
                write!(f, "index {index} of {partition}")
            }
            Subject::Policy(_, table) | Subject::Expiry(_, table) => write!(f, "maintenance of {table}"),
            Subject::Statistics(_, table) => write!(f, "statistics of {table}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_task_has_its_own_name() {
        for (place, (task, name)) in Task::NAMES.into_iter().enumerate() {
            assert_eq!((task as usize, task.name()), (place, name));
        }
    }
}

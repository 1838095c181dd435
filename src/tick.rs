//! One round of all that has to be done, in order: the same for the worker, where each step is a transaction, and
//! for `spend_rollup_run()`, where each is a subtransaction of the caller's. A step that fails is recorded and
//! does not stop the others.

use crate::catalog;
use crate::error::Result;
use crate::litellm::CHANGE_LOG;
use crate::locks::Patience;
use crate::rollup::{self, Merge, Merged};
use crate::session::Failure;
use crate::{rebuild, views, watch};

/// What a step concerns: where its failure is recorded, and what is left alone for a while after one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// One of the steps that concern the captured table.
    Task(&'static str),
    Source(String),
    Rollup(String),
}

/// Runs a step so that its failure does not reach the others.
pub trait Runner {
    /// `None`: the step failed, or is not due yet after an earlier failure.
    fn step<T>(&mut self, subject: Subject, work: impl FnOnce() -> Result<T>) -> Option<T>;
    fn patience(&self) -> Patience;
    /// Whether it is time to look at the captured table again, which takes more queries than all the rest.
    fn watch_is_due(&mut self) -> bool;
}

/// What a round did to one rollup.
pub struct Outcome {
    pub rollup: String,
    pub merge: Option<Merge>,
    pub text: &'static str,
}

pub struct Round {
    pub outcomes: Vec<Outcome>,
    /// Another round would find work at once.
    pub more: bool,
}

pub fn tick(run: &mut impl Runner) -> Round {
    let patience = run.patience();
    let mut more =
        run.watch_is_due() && run.step(Subject::Task("watch"), || watch::watch(patience)).unwrap_or(false);
    let outcomes = merge_all(run);
    more |= run.step(Subject::Task("repair"), || rebuild::repair_step(patience)).unwrap_or(false);
    more |= backfill_all(run);
    run.step(Subject::Task("switch views"), || views::switch_covered(patience));
    Round { outcomes, more }
}

/// The rounds' slow part: what needs to be done now and then only.
pub fn tidy(run: &mut impl Runner) {
    let patience = run.patience();
    run.step(Subject::Task("freeze"), || rebuild::freeze_expired(patience));
}

fn merge_all(run: &mut impl Runner) -> Vec<Outcome> {
    let mut outcomes = vec![];
    let patience = run.patience();
    for mut source in run.step(Subject::Task("merge"), catalog::sources).unwrap_or_default() {
        let subject = Subject::Source(source.name.clone());
        let looked = run.step(subject.clone(), || {
            let safe = rollup::find_safe_end(&mut source, patience)?;
            Ok((safe, catalog::last_value(source.sequence)?, catalog::rollup_names(Some(&source.name))?))
        });
        let Some((safe, last_value, names)) = looked else {
            let list = || catalog::rollup_names(Some(&source.name));
            let names = run.step(Subject::Task("merge"), list).unwrap_or_default();
            outcomes.extend(names.into_iter().map(|rollup| Outcome { rollup, merge: None, text: "failed" }));
            continue;
        };
        if source.name == CHANGE_LOG && last_value < source.merged_to {
            run.step(Subject::Task("watch"), || watch::raise_sequence(&source));
        }
        // With nothing new the fences are not touched: an idle source writes no WAL.
        let news = safe != source.merged_to;
        for rollup in names {
            let (merge, end) = if news { merge_windows(run, &rollup, safe) } else { (None, End::Done) };
            let text = match end {
                End::Failed => "failed",
                End::Busy => "busy",
                End::Done if safe < last_value => "waiting for writers",
                End::Done if merge.is_some() => "merged",
                End::Done => "up to date",
            };
            outcomes.push(Outcome { rollup, merge, text });
        }
        if source.name == CHANGE_LOG && source.trimmed_to < source.merged_to {
            run.step(subject, || rollup::trim(&source));
        }
    }
    outcomes
}

enum End {
    Done,
    Busy,
    Failed,
}

/// Merges window after window up to `safe_end`, each in a step of its own.
fn merge_windows(run: &mut impl Runner, rollup: &str, safe_end: i64) -> (Option<Merge>, End) {
    let patience = run.patience();
    let mut merged = None;
    loop {
        let step = run.step(Subject::Rollup(rollup.into()), || rollup::merge(rollup, safe_end, patience));
        match step {
            Some(Merged::Window(next)) => merged = Some(joined(merged, next)),
            Some(Merged::Nothing) => return (merged, End::Done),
            Some(Merged::Busy) => return (merged, End::Busy),
            None => return (merged, End::Failed),
        }
    }
}

fn joined(earlier: Option<Merge>, later: Merge) -> Merge {
    match earlier {
        None => later,
        Some(earlier) => Merge {
            window_start: earlier.window_start,
            window_end: later.window_end,
            rows: earlier.rows + later.rows,
            groups: earlier.groups + later.groups,
        },
    }
}

/// One bucket of each rollup that is not covered. `true`: there is more.
pub fn backfill_all(run: &mut impl Runner) -> bool {
    let patience = run.patience();
    let uncovered = run.step(Subject::Task("backfill"), catalog::uncovered_rollups).unwrap_or_default();
    let mut more = false;
    for rollup in uncovered {
        let step = run.step(Subject::Rollup(rollup.clone()), || rebuild::backfill_step(&rollup, patience));
        more |= step.unwrap_or(false);
    }
    more
}

/// Keeps a failure for the status view, or with `None` takes it back: what failed has succeeded.
pub fn record(subject: &Subject, failure: Option<&Failure>) -> Result<()> {
    let message = failure.map(|failure| match subject {
        Subject::Task(task) => format!("{task}: {}", failure.message),
        _ => failure.message.clone(),
    });
    let message = message.as_deref();
    match subject {
        Subject::Task(_) => catalog::record_capture_error(message),
        Subject::Rollup(name) => catalog::record_error(name, message),
        Subject::Source(name) => catalog::rollup_names(Some(name))?
            .iter()
            .try_for_each(|rollup| catalog::record_error(rollup, message)),
    }
}

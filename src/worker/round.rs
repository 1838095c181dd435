//! One round of all that has to be done, in order: the same for the worker, where each step is a transaction,
//! and for `spend_rollup_run()`, where each is a subtransaction of the caller's. A step that fails is
//! recorded and does not stop the others.

use crate::engine::follow;
use crate::engine::rollup::{self, Look, Merge, Merged};
use crate::engine::summarize;
use crate::error::Result;
use crate::index::build;
use crate::litellm::backfill;
use crate::litellm::hours;
use crate::litellm::repair;
use crate::litellm::views;
use crate::litellm::watch;
use crate::partition::convert;
use crate::partition::maintain;
use crate::partition::policy;
use crate::partition::revert;
use crate::server::locks;
use crate::server::relation;
use crate::server::session::Failure;
use crate::server::spi;
use crate::server::text::{SCHEMA, literal, qualified};
use crate::state::captured;
use crate::state::conversion;
use crate::state::indexes;
use crate::state::restore;
use crate::state::rollups;
use crate::state::sources::{self, CHANGE_LOG, Source};
use crate::state::step::{Runner, Subject, Task};

use pgrx::pg_sys;
use std::time::{Duration, Instant};

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

pub fn round(run: &mut impl Runner) -> Round {
    let patience = run.patience();
    let (watching, mut more) = (run.may_watch(), false);
    if run.watch_is_due() {
        let mends = run.step(Subject::Task(Task::Restore), || restore::look(patience)).unwrap_or(false);
        let strays = if mends { run.step(Subject::Task(Task::Sources), follow::strays) } else { None };
        let none = strays.as_ref().is_some_and(Vec::is_empty);
        for rollup in strays.unwrap_or_default() {
            run.step(Subject::Stray(rollup.clone()), || follow::settle(&rollup, patience));
        }
        if watching && mends {
            let watched = run.step(Subject::Task(Task::Watch), || watch::watch(patience));
            more |= watched == Some(Some(true));
            if none && watched == Some(None) {
                run.end_watch();
            }
        }
    }
    let (outcomes, more_windows) = merge_all(run);
    more |= more_windows;
    if watching {
        more |= repair_noted(run);
        more |= run.step(Subject::Task(Task::Backfill), || backfill::step(patience)).unwrap_or(false);
        run.step(Subject::Task(Task::SwitchViews), || views::switch_covered(patience));
    }
    if run.commits_each_step() && run.step(Subject::Task(Task::Conversions), conversion::any).unwrap_or(false)
    {
        more |= convert::round(run);
        more |= revert::round(run, build::for_copy);
    }
    Round { outcomes, more }
}

/// Repairs what is noted, a day a step: the worker one, before it merges again; a SQL call all of them,
/// within its time.
fn repair_noted(run: &mut impl Runner) -> bool {
    let (patience, started) = (run.patience(), Instant::now());
    while run.step(Subject::Task(Task::Repair), || repair::step(patience)) == Some(true) {
        let goes_on = !run.commits_each_step() && started.elapsed() < REPAIRS_OF_CALL;
        if !goes_on || run.step(Subject::Task(Task::Repair), repair::is_noted) != Some(true) {
            return true;
        }
    }
    false
}

/// How long a call goes on to begin repairs: it keeps the fences of all that it has repaired.
const REPAIRS_OF_CALL: Duration = Duration::from_secs(60);

/// The rounds' slow part: what needs to be done now and then only.
pub fn tidy(run: &mut impl Runner) {
    let patience = run.patience();
    if run.may_watch() {
        run.step(Subject::Task(Task::Freeze), || repair::freeze_expired(patience));
        add_up_hours(run);
    }
}

fn add_up_hours(run: &mut impl Runner) {
    let (patience, started) = (run.patience(), Instant::now());
    while run.step(Subject::Task(Task::Hours), || hours::step(patience)) == Some(true)
        && started.elapsed() < HOURS_OF_ROUND
    {}
}

/// How long a round goes on to begin another day: merges wait meanwhile.
const HOURS_OF_ROUND: Duration = Duration::from_secs(1);

/// Maintains the tables whose turn it is.
pub fn maintain(run: &mut impl Runner) {
    run.step(Subject::Task(Task::Maintain), policy::look_after);
    for policy in run.step(Subject::Task(Task::Maintain), policy::due).unwrap_or_default() {
        maintain::round(run, policy, None);
    }
}

/// Goes on with the indexes that were asked for. `true`: there is more to do soon.
pub fn index(run: &mut impl Runner) -> bool {
    run.step(Subject::Task(Task::Indexes), indexes::look_after);
    build::round(run)
}

/// Merges what is safe. `true`: there are more windows.
fn merge_all(run: &mut impl Runner) -> (Vec<Outcome>, bool) {
    let (mut outcomes, mut more) = (vec![], false);
    for source in run.step(Subject::Task(Task::Merge), sources::sources).unwrap_or_default() {
        more |= merge_source(run, source, &mut outcomes);
    }
    (outcomes, more)
}

fn merge_source(run: &mut impl Runner, mut source: Source, outcomes: &mut Vec<Outcome>) -> bool {
    let patience = run.patience();
    let subject = Subject::Source(source.name.clone());
    source.rollups.retain(|name| run.may_fill(name));
    if source.rollups.is_empty() {
        return false;
    }
    let more = run.worth_waiting(&source);
    let look = run.step(subject.clone(), || rollup::look(&mut source, patience, more));
    let Some(Look { safe_end, last_value }) = look else {
        let failed = |rollup| Outcome { rollup, merge: None, text: "failed" };
        outcomes.extend(source.rollups.into_iter().map(failed));
        return false;
    };
    if source.name == CHANGE_LOG && last_value < source.furthest {
        run.step(Subject::Task(Task::Watch), || watch::raise_sequence(&source, source.furthest));
    }
    // With nothing new the fences are not touched: an idle source writes no WAL.
    let waiting = safe_end != source.merged_to;
    // What is wrong with a sequence that was set back is said at once.
    let set_back = safe_end < source.merged_to;
    let news = waiting && (set_back || run.merge_is_due(&source.name, safe_end - source.merged_to));
    if news && run.commits_each_step() && source.name != CHANGE_LOG {
        summarize(run, &source);
    }
    let together =
        if news && source.name == CHANGE_LOG { merge_together(run, &source, safe_end) } else { vec![] };
    let mut together = together.into_iter();
    let (mut more, mut all) = (false, last_value == source.merged_to || news);
    for rollup in &source.rollups {
        if last_value == source.merged_to {
            run.forget_failure(&Subject::Rollup(rollup.clone()));
        }
        let (merge, end) = match news {
            true => merge_windows(run, rollup, safe_end, together.next()),
            false => (None, End::Done),
        };
        more |= matches!(end, End::More);
        all &= matches!(end, End::Done);
        let text = match end {
            End::Failed => "failed",
            End::Busy => "busy",
            End::Done if safe_end < last_value => "waiting for writers",
            _ if merge.is_some() => "merged",
            _ => "up to date",
        };
        outcomes.push(Outcome { rollup: rollup.clone(), merge, text });
    }
    if all {
        run.note_merged(&source.name);
    }
    if source.name == CHANGE_LOG && source.trimmed_to < source.merged_to {
        run.step(subject, || rollup::trim(&source));
    }
    more
}

/// A step of its own: what an index calls is its owner's, and whatever comes of it the source is merged.
fn summarize(run: &mut impl Runner, source: &Source) {
    let (subject, started) = (Subject::Summary(source.name.clone()), Instant::now());
    let most = run.most_merged(&subject);
    if let Some(pages) = run.step(subject.clone(), || summarize::newest_rows(source, most)) {
        run.note_window(&subject, pages, started.elapsed());
    }
}

enum End {
    Done,
    /// There may be another window.
    More,
    Busy,
    Failed,
}

/// As [`merge_windows`], but all rollups of the change log at once, for as long as they can be. Returns what
/// was merged, of all of them or of none.
fn merge_together(run: &mut impl Runner, source: &Source, safe_end: i64) -> Vec<Merge> {
    let patience = run.patience();
    let subject = Subject::Together(source.name.clone());
    let mut merged: Vec<Merge> = vec![];
    while merged.first().is_none_or(|merge| merge.window_end < safe_end && !run.commits_each_step()) {
        let (most, started) = (run.most_merged(&subject), Instant::now());
        let step =
            run.step(subject.clone(), || rollup::merge_together(&source.rollups, safe_end, most, patience));
        let Some(Some(next)) = step else { break };
        let full = next.iter().any(|merge| merge.window_end < safe_end);
        let values = next.iter().map(|merge| merge.window_end - merge.window_start + 1).sum();
        run.note_window(&subject, if full { most } else { values }, started.elapsed());
        let mut earlier = merged.into_iter();
        merged = next.into_iter().map(|next| joined(earlier.next(), next)).collect();
    }
    merged
}

/// Goes on after what is merged already, up to `safe_end`, each window in a step of its own: all of them for
/// a SQL call, one for the worker, so that no rollup keeps the others waiting.
fn merge_windows(
    run: &mut impl Runner,
    rollup: &str,
    safe_end: i64,
    mut merged: Option<Merge>,
) -> (Option<Merge>, End) {
    let patience = run.patience();
    loop {
        match &merged {
            Some(merge) if merge.window_end == safe_end => return (merged, End::Done),
            // The nodes merge the next one when this is committed.
            Some(merge) if run.commits_each_step() || merge.rows.is_none() => return (merged, End::More),
            _ => {}
        }
        let (subject, started) = (Subject::Rollup(rollup.into()), Instant::now());
        let most = run.most_merged(&subject);
        let step = run.step(subject.clone(), || rollup::merge(rollup, safe_end, most, patience));
        match step {
            Some(Merged::Window(next)) => {
                run.note_window(&subject, next.window_end - next.window_start + 1, started.elapsed());
                let by_nodes = next.rows.is_none();
                if next.window_end == safe_end && by_nodes && run.commits_each_step() {
                    run.step(subject, || rollup::note_committed(rollup));
                }
                merged = Some(joined(merged, next));
            }
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
            rows: earlier.rows.zip(later.rows).map(|(earlier, later)| earlier + later),
            groups: earlier.groups + later.groups,
        },
    }
}

/// Keeps a failure for the status views, with how soon it is tried again at the latest if somebody does; or
/// with `None` takes it back: what failed has succeeded.
pub fn record(subject: &Subject, failure: Option<&Failure>, again: Option<Duration>) -> Result<()> {
    let message = failure.map(|failure| match subject {
        Subject::Task(task) => format!("{}: {}", task.name(), failure.text()),
        _ => failure.text(),
    });
    let message = message.as_deref();
    match subject {
        Subject::Task(task) => captured::record_task_error(*task, message),
        // Each is merged alone now, and what fails is that one's.
        Subject::Together(_) => Ok(()),
        Subject::Rollup(name) | Subject::Stray(name) => rollups::record_error(name, message),
        Subject::Conversion(schema, table)
        | Subject::CopysIndex(schema, table)
        | Subject::Look(schema, table) => conversion::record_error(schema, table, message, again),
        Subject::Index(partition, name, _) => indexes::record_build((*partition).into(), name, failure),
        Subject::IndexDrop(partition, name, _) => indexes::record_drop((*partition).into(), name, failure),
        // It only reads catalogs: the server's log has what failed.
        Subject::Indexes(..) | Subject::Builder(..) => Ok(()),
        Subject::Policy(relation, _) | Subject::Expiry(relation, _) | Subject::Statistics(relation, _) => {
            policy::record_error((*relation).into(), message)
        }
        // It stops no merge: the server's log has it. A worker that it has ended tells the next one so.
        Subject::Summary(name) if message == Some(Failure::ENDLESS) => rollups::rollup_names(Some(name))?
            .iter()
            .try_for_each(|rollup| rollups::record_error(rollup, message)),
        Subject::Summary(_) => Ok(()),
        Subject::Source(name) => rollups::rollup_names(Some(name))?
            .iter()
            .try_for_each(|rollup| rollups::record_error(rollup, message)),
    }
}

/// Takes the table that [`record`] writes to from everybody else, unless somebody has a row of it. `false`:
/// to record something could wait for whoever has.
pub fn record_waits_for_nobody(subject: &Subject) -> Result<bool> {
    let table = match subject {
        Subject::Task(_) => "capture",
        Subject::Rollup(_) | Subject::Stray(_) | Subject::Summary(_) | Subject::Source(_) => "rollup",
        Subject::Conversion(..) | Subject::CopysIndex(..) | Subject::Look(..) => "conversion",
        Subject::Index(..) | Subject::IndexDrop(..) => "index_failure",
        Subject::Policy(..) | Subject::Expiry(..) | Subject::Statistics(..) => "policy",
        Subject::Together(_) | Subject::Indexes(..) | Subject::Builder(..) => return Ok(true),
    };
    let table = relation::find_relation(&qualified(SCHEMA, table))?;
    Ok(table.is_some_and(|table| locks::try_lock(table, pg_sys::ExclusiveLock)))
}

/// The subjects that a moment ago had to be ended with their process, by what was recorded.
pub fn endless_within(time: Duration) -> Result<Vec<Subject>> {
    let since = time.as_secs_f64();
    let recent = format!(
        "strpos(last_error, {}) > 0 AND last_error_at > clock_timestamp() - make_interval(secs => $1)",
        literal(Failure::ENDLESS)
    );
    let rollups = spi::query(
        &format!("SELECT name, source FROM litellm_spend.rollup WHERE {recent}"),
        &[since.into()],
        |r| Ok((spi::value::<String>(r, 1)?, r.get::<String>(2)?)),
    )?;
    let policies = spi::query(
        &format!(
            "SELECT c.oid, c.relname::text FROM litellm_spend.policy p JOIN pg_catalog.pg_class c
                 ON c.oid = p.relation
             WHERE {recent}"
        ),
        &[since.into()],
        |r| Ok(Subject::Policy(spi::value::<pg_sys::Oid>(r, 1)?.to_u32(), spi::value(r, 2)?)),
    )?;
    let conversions = spi::query(
        &format!("SELECT table_schema::text, table_name::text FROM litellm_spend.conversion WHERE {recent}"),
        &[since.into()],
        |r| Ok((spi::value::<String>(r, 1)?, spi::value::<String>(r, 2)?)),
    )?;
    let captured = spi::query(
        &format!("SELECT last_error FROM litellm_spend.capture WHERE {recent}"),
        &[since.into()],
        |r| spi::value::<String>(r, 1),
    )?;
    let task = |error: String| {
        let found = Task::NAMES.into_iter().find(|(_, name)| error.starts_with(&format!("{name}: ")));
        found.map(|(task, _)| Subject::Task(task))
    };
    let tasks = captured.into_iter().filter_map(task);
    // What was recorded does not say which of a subject's steps it was.
    let rollups = rollups.into_iter().flat_map(|(name, source)| {
        let of_rollup = [Subject::Stray(name.clone()), Subject::Rollup(name)];
        of_rollup.into_iter().chain(source.map(Subject::Summary))
    });
    let conversions = conversions.into_iter().flat_map(|(schema, table)| {
        [Subject::Look, Subject::CopysIndex, Subject::Conversion]
            .map(|step| step(schema.clone(), table.clone()))
    });
    Ok(rollups.chain(policies).chain(conversions).chain(tasks).collect())
}

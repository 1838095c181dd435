//! Maintenance of one table: a round of steps, each of which stands for itself. Those that need no lock that
//! others wait for come first, so that a SQL call, which is one transaction, holds such locks at its end
//! only. (In the worker a partition is counted and goes in one step, before the rest.)
//!
//! ```text
//!  delete expired rows        ROW EXCLUSIVE            in batches, only what no partition takes along
//!  ANALYZE                    SHARE UPDATE EXCLUSIVE
//!  count expired partitions   SHARE on each            (a SQL call: they stay locked until its end)
//!  ---- exclusive locks: the first that is not to be had ends the round, the rest is tried again soon ----
//!  drop or detach             ACCESS EXCLUSIVE
//!  drain DEFAULT              ACCESS EXCLUSIVE         a batch of rows at most
//!  create partitions          see `create`
//!  finish a DETACH            SHARE UPDATE EXCLUSIVE, ACCESS EXCLUSIVE on the partition
//! ```
//! In the worker each step is a transaction, in a SQL call a subtransaction of the caller's. Each takes the
//! policy's row, as the round has read it: of two maintainers one works, and the other says that it did not;
//! and a policy that is set meanwhile ends the round, so that nothing goes by the one before. The worker's
//! round also ends when `litellm_spend.maintain_interval` becomes zero.
//!
//! A step that takes too long for the worker, such as the count of a large partition, is cancelled, rests,
//! and is tried again with a longer limit. The rest of the round goes on, but counts no other partition:
//! merges wait until it ends. In a SQL call they do not, and a step has no limit.

use crate::error::{Error, Result};
use crate::guc;
use crate::partition::calendar::{Drain, Moment, Range, missing};
use crate::partition::create;
use crate::partition::drain;
use crate::partition::expire::{self, Held};
use crate::partition::layout::{Layout, Partition};
use crate::partition::policy::{self, Again, OnExpire, Policy};
use crate::partition::purge;
use crate::partition::times::{self, Times};
use crate::server::log;
use crate::server::session::{Failure, attempt};
use crate::server::spi;
use crate::server::text::quoted;
use crate::state::conversion;
use crate::state::step::{Runner, Subject};
use std::time::{Duration, Instant};

/// Something that a round did or skipped: a row of `spend_partition_maintain()`.
pub struct Action {
    pub action: &'static str,
    pub partition: String,
    pub rows: i64,
    pub detail: String,
}

const BUSY: &str = "somebody else maintains the table, or has just set another policy";

/// How long a round deletes, and how long it drains, before others get their turn: the worker has more to do.
const SLICE: Duration = Duration::from_secs(2);

/// How long a SQL call drains: the table stays locked until its transaction ends, and others wait for all of
/// it.
const SLICE_OF_CALL: Duration = Duration::from_millis(300);

/// Most rows that one SQL call deletes: it is one transaction.
const MOST_DELETED: i64 = 100_000;

pub fn round<R: Runner>(run: &mut R, policy: Policy, now: Option<Moment>) -> Vec<Action> {
    let mut round = Round {
        run,
        policy,
        actions: vec![],
        again: Again::Later,
        stop: false,
        slow: false,
        blocked: None,
        failure: None,
    };
    round.go(now);
    let (policy, again) = (round.policy.clone(), round.again);
    let (blocked, failure) = (round.blocked.take(), round.failure.take());
    if !round.stop {
        let subject = round.subject(&policy.table);
        round.run.step(subject, || policy.record(again, failure.as_deref(), blocked.as_deref()));
    }
    round.actions
}

struct Round<'a, R: Runner> {
    run: &'a mut R,
    policy: Policy,
    actions: Vec<Action>,
    again: Again,
    /// Somebody else maintains the table, or it cannot be maintained, or not by this policy any more.
    stop: bool,
    /// A step took longer than it may.
    slow: bool,
    /// A lock was not to be had, and who has it: others waited for us meanwhile, so no more of that in this
    /// round.
    blocked: Option<String>,
    failure: Option<String>,
}

impl<R: Runner> Round<'_, R> {
    fn go(&mut self, now: Option<Moment>) {
        let table = self.policy.table.clone();
        let policy = self.policy.clone();
        let looked = self.step(&table, || {
            if conversion::is_under_way(policy.relation)? {
                return Ok(None);
            }
            let now = now.unwrap_or_else(crate::partition::layout::now);
            let layout = policy.layout()?;
            crate::partition::layout::require_root(&layout.table)?;
            Ok(Some((now, policy.cutoff(now)?, layout)))
        });
        let Some(looked) = looked else { return };
        let Some((now, cutoff, layout)) = looked else {
            // No fault: the worker comes by itself when that has ended.
            self.stop = true;
            self.report("skipped", &table, 0, "it is being converted or reverted: see spend_progress");
            return;
        };
        if let Some(cutoff) = cutoff {
            if self.run.commits_each_step() {
                self.expire(&layout, cutoff);
            }
            self.purge(&layout, cutoff);
        }
        self.analyze(&layout);
        if let Some(cutoff) = cutoff.filter(|_| !self.run.commits_each_step()) {
            let counted = self.count(&layout, cutoff);
            for (partition, held) in counted {
                self.finish(&layout, &partition, held);
            }
        }
        if layout.partitioned {
            self.drain(now, cutoff);
            self.create(now);
            self.finish_detach(cutoff);
            self.note_next(now);
        }
    }

    fn subject(&self, about: &str) -> Subject {
        Subject::Policy(self.policy.relation.to_u32(), about.into())
    }

    /// Does a step for a table or partition.
    fn step<T>(&mut self, about: &str, work: impl FnOnce() -> Result<T>) -> Option<T> {
        self.step_of(self.subject(about), about, work)
    }

    /// Does a step, if the policy is ours for it. What goes wrong is reported, and is nobody else's business.
    fn step_of<T>(&mut self, subject: Subject, about: &str, work: impl FnOnce() -> Result<T>) -> Option<T> {
        self.stop |= !self.run.may_maintain();
        if self.stop {
            return None;
        }
        enum Outcome<T> {
            Done(T),
            Failed(Failure),
            Busy,
        }
        let (policy, began) = (self.policy.clone(), Instant::now());
        let outcome = self.run.step(subject, || {
            let Some(_work) = policy.lock()? else { return Ok(Outcome::Busy) };
            // Takes an XID, and with it every query of the step a fresh snapshot.
            match attempt(|| spi::take_xid().and_then(|()| work())) {
                Ok(value) => Ok(Outcome::Done(value)),
                Err(failure) => Ok(Outcome::Failed(failure.unless_cancel())),
            }
        });
        match outcome {
            Some(Outcome::Done(value)) => return Some(value),
            Some(Outcome::Failed(failure)) => self.skip(about, failure),
            Some(Outcome::Busy) => {
                self.stop = true;
                self.report("skipped", about, 0, BUSY);
            }
            // Or it rests, since it did.
            None => {
                self.slow |= began.elapsed() > SLICE;
                self.try_again_soon();
                let detail = "failed or took too long; see the server's log";
                self.failure.get_or_insert_with(|| format!("{about}: {detail}"));
                self.report("skipped", about, 0, detail);
            }
        }
        None
    }

    fn skip(&mut self, about: &str, failure: Failure) {
        let mut detail = failure.message.clone();
        if failure.is_lock_timeout() {
            detail = failure.in_a_line();
            self.blocked.get_or_insert_with(|| format!("{about}: {detail}"));
            self.try_again_soon();
            let again = policy::retry().as_secs();
            if again > 0 {
                detail += &format!("; the worker, where one runs, tries again in {again} s");
            }
        } else {
            self.failure.get_or_insert_with(|| format!("{about}: {}", failure.text()));
        }
        self.note("skipped", about, 0, detail);
    }

    fn note(&mut self, action: &'static str, partition: &str, rows: i64, detail: impl Into<String>) {
        let detail = detail.into();
        if self.run.commits_each_step() && !["next", "analyzed"].contains(&action) {
            log::now(format_args!("{action} {partition} ({rows} rows): {detail}"));
        }
        self.report(action, partition, rows, detail);
    }

    /// As [`Round::note`], but not in the server's log: a worker finds the same again in each look, once a
    /// second, or has said it already.
    fn report(&mut self, action: &'static str, partition: &str, rows: i64, detail: impl Into<String>) {
        self.actions.push(Action { action, partition: partition.into(), rows, detail: detail.into() });
    }

    fn try_again_soon(&mut self) {
        if self.again == Again::Later {
            self.again = Again::Soon;
        }
    }

    // ---- expiry ------------------------------------------------------------------------------------------

    /// Expires the partitions that end before the cutoff, oldest first.
    fn expire(&mut self, layout: &Layout, cutoff: Moment) {
        for partition in expired_partitions(layout, cutoff) {
            if self.blocked.is_some() || self.slow {
                return;
            }
            let (policy, patience) = (self.policy.clone(), self.run.patience());
            let subject = Subject::Expiry(policy.relation.to_u32(), partition.name.clone());
            let rows = self.step_of(subject, &partition.name, || {
                let held = expire::count(layout, &partition, &policy, &[])?;
                expire::finish(layout, &partition, &policy, held, patience)
            });
            self.note_expired(&partition, rows);
        }
    }

    /// The same in a SQL call, but only counts them: until all are, nobody but writers waits.
    fn count(&mut self, layout: &Layout, cutoff: Moment) -> Vec<(Partition, Held)> {
        let mut counted: Vec<(Partition, Held)> = vec![];
        for partition in expired_partitions(layout, cutoff) {
            if self.blocked.is_some() {
                break;
            }
            let policy = self.policy.clone();
            let locked: Vec<_> = counted.iter().map(|(partition, _)| partition.oid).collect();
            let held = self.step(&partition.name, || expire::count(layout, &partition, &policy, &locked));
            counted.extend(held.map(|held| (partition, held)));
        }
        counted
    }

    fn finish(&mut self, layout: &Layout, partition: &Partition, held: Held) {
        if self.blocked.is_some() {
            return;
        }
        let (policy, patience) = (self.policy.clone(), self.run.patience());
        let rows = self.step(&partition.name, || expire::finish(layout, partition, &policy, held, patience));
        self.note_expired(partition, rows);
    }

    fn note_expired(&mut self, partition: &Partition, outcome: Option<(i64, String)>) {
        if let Some((rows, place)) = outcome {
            let action = if self.policy.on_expire == OnExpire::Drop { "dropped" } else { "detached" };
            self.note(action, &partition.name, rows, format!("{}; {place}", partition.range));
        }
    }

    fn purge(&mut self, layout: &Layout, cutoff: Moment) {
        let began = Instant::now();
        for target in purge::targets(layout, self.policy.interval, cutoff) {
            let mut deleted = 0;
            let mut more = true;
            while more && began.elapsed() < SLICE && deleted < MOST_DELETED {
                let Some(rows) = self.step(&target.name, || purge::batch(layout, &target, cutoff)) else {
                    break;
                };
                deleted += rows;
                more = rows == purge::BATCH;
            }
            if more && deleted > 0 {
                self.again = Again::AtOnce;
            }
            if deleted > 0 {
                let more = if more { "; more are to go" } else { "" };
                self.note("deleted", &target.name, deleted, format!("before {cutoff}{more}"));
            }
        }
    }

    // ---- statistics --------------------------------------------------------------------------------------

    /// Autovacuum never analyzes a partitioned table. LiteLLM asks for its number of rows.
    fn analyze(&mut self, layout: &Layout) {
        if !layout.partitioned {
            return;
        }
        let table = layout.table.qualified();
        let name = layout.table.name.clone();
        let subject = Subject::Statistics(layout.table.oid.to_u32(), name.clone());
        let analyzed = self.step_of(subject, &name, || {
            let stale = spi::query(
                "SELECT FROM pg_catalog.pg_class p
                 JOIN (SELECT inhparent, sum(greatest(c.reltuples, 0)) AS rows FROM pg_catalog.pg_inherits
                       JOIN pg_catalog.pg_class c ON c.oid = inhrelid GROUP BY 1) AS parts
                           ON inhparent = p.oid
                 WHERE p.oid = $1 AND (p.reltuples < 0
                     OR abs(parts.rows - p.reltuples) > 1000 + p.reltuples / 10)",
                &[layout.table.oid.into()],
                |_| Ok(()),
            )?;
            if !stale.is_empty() {
                layout.owner.run(format!("ANALYZE (SKIP_LOCKED) {table}"))?;
            }
            Ok(!stale.is_empty())
        });
        if analyzed == Some(true) {
            self.note("analyzed", &layout.table.name, 0, "its statistics were missing or old");
        }
    }

    // ---- what needs exclusive locks ----------------------------------------------------------------------

    fn layout(&mut self) -> Option<Layout> {
        let policy = self.policy.clone();
        self.step(&policy.table.clone(), || policy.layout())
    }

    /// The end of what is to be created.
    fn horizon(&self, now: Moment) -> Moment {
        self.policy.interval.periods(now, self.policy.precreate).last().map_or(now, |last| last.to)
    }

    fn drain(&mut self, now: Moment, cutoff: Option<Moment>) {
        let (interval, horizon) = (self.policy.interval, self.horizon(now));
        let cutoff = cutoff.unwrap_or(Moment::MIN);
        let slice = if !self.run.commits_each_step() { SLICE_OF_CALL } else { SLICE };
        let began = Instant::now();
        while self.blocked.is_none() {
            let Some(layout) = self.layout() else { return };
            let about = layout.default.as_ref().map_or(String::new(), |d| d.name.clone());
            let next = self.step(&about, || drain::look(&layout, interval, horizon, cutoff));
            if began.elapsed() > slice && !matches!(next, None | Some(Drain::Nothing)) {
                self.again = Again::AtOnce;
                self.note("skipped", &about, 0, "more is to be drained by the next round");
                return;
            }
            match next {
                None | Some(Drain::Nothing) => return,
                Some(Drain::Adopt(range)) => {
                    let adopted = self.step(&about, || drain::adopt(&layout, interval, range, horizon));
                    let Some(Some(adopted)) = adopted else { return };
                    let detail =
                        format!("{about} became this partition, {range}; {} rows stayed", adopted.rows);
                    self.note("drained", &adopted.partition, 0, detail);
                }
                Some(Drain::Move(range)) => {
                    if self.place(&layout, range, now) != Some(true) {
                        return;
                    }
                }
            }
        }
    }

    fn create(&mut self, now: Moment) {
        let began = Instant::now();
        let mut refused = vec![];
        while self.blocked.is_none() {
            let Some(layout) = self.layout() else { return };
            let wanted = self.policy.interval.periods(now, self.policy.precreate);
            let mut missing = missing(&wanted, &layout.ranges()).into_iter();
            let Some(range) = missing.find(|range| !refused.contains(range)) else { return };
            if began.elapsed() > SLICE {
                self.again = Again::AtOnce;
                return;
            }
            match self.place(&layout, range, now) {
                Some(true) => {}
                Some(false) => refused.push(range),
                None => return,
            }
        }
    }

    /// Whoever began to detach a partition wants it as a table of its own. Last, because it also waits for
    /// old snapshots. One that has expired is dropped or detached with the others.
    fn finish_detach(&mut self, cutoff: Option<Moment>) {
        let Some(layout) = self.layout().filter(|_| self.blocked.is_none()) else { return };
        let expired = |p: &Partition| cutoff.is_some_and(|cutoff| expire::has_expired(p, cutoff));
        for partition in layout.partitions.iter().filter(|p| p.pending && !expired(p)) {
            if self.step(&partition.name, || create::finish_detach(&layout, partition)).is_some() {
                let detail = format!("{}; its DETACH had been interrupted", partition.range);
                self.note("detached", &partition.name, 0, detail);
            }
        }
    }

    /// `None`: it did not work. `false`: more rows would have to move at once than may.
    fn place(&mut self, layout: &Layout, range: Range, now: Moment) -> Option<bool> {
        let interval = self.policy.interval;
        let name = crate::partition::calendar::name(&layout.table.name, range);
        let placed = self.step(&name, || {
            let batch = layout.default.as_ref().map_or(Ok(0), |d| drain::batch_size(d.oid))?;
            match create::require_few(layout, range, batch) {
                Err(error @ Error::TooManyAtOnce { .. }) => Ok(Err(error)),
                few => few.and_then(|()| create::place(layout, interval, range, now, batch)).map(Ok),
            }
        });
        match placed? {
            Ok(Some(placed)) => {
                let moved = if placed.rows > 0 { "; with rows from DEFAULT" } else { "" };
                let action = if placed.widened || placed.rows > 0 { "drained" } else { "created" };
                self.note(action, &placed.partition, placed.rows, format!("{}{moved}", placed.range));
                Some(true)
            }
            Ok(None) => {
                self.try_again_soon();
                self.note("skipped", &name, 0, "somebody else made it at the same time");
                None
            }
            Err(error) => {
                self.skip(&name, Failure::from(error));
                Some(false)
            }
        }
    }

    fn note_next(&mut self, now: Moment) {
        let Some(layout) = self.layout() else { return };
        let policy = self.policy.clone();
        let Some(ahead) = self.step(&layout.table.name, || layout.periods_ahead(policy.interval, now)) else {
            return;
        };
        let oldest = layout.partitions.first().filter(|p| p.range.to != Moment::MAX);
        let expires = self
            .step(&layout.table.name, || oldest.map_or(Ok(None), |oldest| policy.expiry(oldest.range.to)));
        let detail = match expires.flatten() {
            Some(at) => format!("expires at {at} UTC; {ahead} periods ahead"),
            None => format!("nothing expires; {ahead} periods ahead"),
        };
        let name = oldest.map_or(layout.table.name.clone(), |p| p.name.clone());
        self.note("next", &name, 0, detail);
    }
}

fn expired_partitions(layout: &Layout, cutoff: Moment) -> Vec<Partition> {
    layout.partitions.iter().filter(|p| expire::has_expired(p, cutoff)).cloned().collect()
}

// ---- what will go ----------------------------------------------------------------------------------------

/// Up to here rows that will go are counted; of more, the planner is asked how many they are.
const MOST_COUNTED: i64 = 100_000;

/// What the next round lets go by a policy that is new: how many partitions and rows, when, and how. Changes
/// nothing.
pub fn forecast(policy: &Policy) -> Result<Vec<String>> {
    let Some(cutoff) = policy.cutoff(crate::partition::layout::now())? else { return Ok(vec![]) };
    let layout = policy.layout()?;
    layout.lock()?;
    let worker = conversion::has_worker()? && !guc::maintain_interval().is_zero();
    let next = if worker { "the worker's next round" } else { "the next call of spend_partition_maintain()" };
    let mut said = vec![];
    let before = Range { from: Moment::MIN, to: cutoff };
    let rows = |oid| {
        let times = Times::of_any(layout.owner, oid, &policy.time_column)?;
        let condition = times.condition(before);
        let counted = match times::is_indexed(oid, &policy.time_column)? {
            true => times.count(&condition, MOST_COUNTED)?,
            false => MOST_COUNTED,
        };
        Ok::<_, Error>(if counted < MOST_COUNTED {
            (counted, "")
        } else {
            (times.estimate(&condition)?, "about ")
        })
    };
    // 1. whole partitions.
    let usable = |p: &&Partition| layout.require_usable(p).is_ok();
    let expired: Vec<_> =
        layout.partitions.iter().filter(|p| expire::has_expired(p, cutoff)).filter(usable).collect();
    if !expired.is_empty() {
        let counts = expired.iter().map(|p| rows(p.oid)).collect::<Result<Vec<_>>>()?;
        let about = counts.iter().map(|(_, about)| *about).max().unwrap_or_default();
        let (count, sum) = (expired.len(), counts.iter().map(|(rows, _)| rows).sum::<i64>());
        let how = match policy.on_expire {
            OnExpire::Drop => "drops them",
            OnExpire::Detach => "moves them to schema litellm_spend_archive",
        };
        said.push(format!("expired partitions: {count}, with {about}{sum} rows; {next} {how}"));
    }
    // 2. rows that no partition takes along.
    let targets = purge::targets(&layout, policy.interval, cutoff).into_iter();
    for target in targets.filter(|target| target.partition.iter().all(|p| usable(&p))) {
        let (count, about) = rows(target.oid)?;
        if count == 0 {
            continue;
        }
        let space = match target.partition.as_ref().map(|p| policy.expiry(p.range.to)).transpose()?.flatten()
        {
            Some(at) => format!("its disk space comes back when all of it has expired, at {at} UTC"),
            None => "new rows use their space again".into(),
        };
        let name = quoted(&target.name);
        said.push(format!(
            "expired rows of {name}: {about}{count}; from {next} on they are deleted one by one, and {space}"
        ));
    }
    if said.is_empty() {
        let first = layout.partitions.iter().find(|p| p.range.to > cutoff && p.range.to != Moment::MAX);
        let then = match first.map(|p| Ok::<_, Error>((p, policy.expiry(p.range.to)?))).transpose()? {
            Some((partition, Some(at))) => {
                format!("; {} is the first to expire, at {at} UTC", quoted(&partition.name))
            }
            _ => String::new(),
        };
        said.push(format!("nothing has expired yet{then}"));
    }
    Ok(said)
}

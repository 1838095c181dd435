//! The SQL functions about partitions, as in `api`.

use crate::api::arguments::{Regclass, TimeArgument};
use crate::api::call::{Subtransactions, report, require_changeable};
use crate::api::litellm::source_or_default;
use crate::error::{self, Error};
use crate::guc;
use crate::index::build;
use crate::litellm::spend_log;
use crate::partition::archive::ARCHIVE;
use crate::partition::calendar::Moment;
use crate::partition::convert::{self, Conversion, Options};
use crate::partition::layout::{self, Layout};
use crate::partition::maintain;
use crate::partition::plan;
use crate::partition::policy::{self, Change, Policy, Wanted};
use crate::partition::revert::{self, Reversion};
use crate::server::locks;
use crate::server::relation::{self, Table};
use crate::server::session::{self, Elevated};
use crate::server::text::{self, qualified, quoted};
use crate::state::conversion::has_worker;
use crate::state::restore;
use pgrx::datum::Interval;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use std::time::Duration;

/// The table, open to a caller who may act for its owner. Who holds its lock waits for nothing without a
/// limit.
pub fn enter(source: Option<Regclass>) -> error::Result<(Elevated, Table)> {
    let (elevated, table) = open(source)?;
    restore::require_over()?;
    restore::begin()?;
    Ok((elevated, table))
}

/// The same for a call that changes nothing, also on a standby.
pub fn look(source: Option<Regclass>) -> error::Result<(Elevated, Table)> {
    let (elevated, table) = open(source)?;
    restore::require_none()?;
    Ok((elevated, table))
}

fn open(source: Option<Regclass>) -> error::Result<(Elevated, Table)> {
    let source = source_or_default(source)?;
    let elevated = Elevated::enter()?.impatient(guc::lock_timeout().time);
    let table = session::open(elevated.caller(), source)?;
    Ok((elevated, table))
}

/// The same table for a call that reads it or has a query planned: from here on nobody changes it, a
/// partition or an index of it. What was seen before the locks may be out of date.
pub fn lock_to_read(elevated: &Elevated, table: Table) -> error::Result<Table> {
    locks::lock_against_changes(table.oid)?;
    session::open(elevated.caller(), table.oid)
}

// ---- to be partitioned, and back -------------------------------------------------------------------------

/// How long before a cutover that nobody chose: time to build the index. A week where each step takes a call.
const LEAD: Duration = Duration::from_secs(86_400);
const LEAD_BY_HAND: Duration = Duration::from_secs(7 * 86_400);

/// How a table is to be partitioned. What is left out is as its policy says, if it has one.
struct Wish<'a> {
    interval: Option<&'a str>,
    cutover: Option<TimeArgument>,
    time_column: Option<&'a str>,
    precreate: Option<i32>,
}

impl Wish<'_> {
    fn is_empty(&self) -> bool {
        self.interval.is_none()
            && self.cutover.is_none()
            && self.time_column.is_none()
            && self.precreate.is_none()
    }

    fn options(self, table: &Table) -> error::Result<Options> {
        if table.kind == "p" {
            return Err(Error::AlreadyPartitioned(table.qualified()));
        }
        let policy = policy::find(table.oid)?;
        let or = |given: Option<&str>, of_policy: fn(&Policy) -> &str, else_: &str| {
            given.map_or_else(|| policy.as_ref().map_or(else_, of_policy).to_string(), str::to_string)
        };
        let interval = or(self.interval, |policy| policy.interval.name(), "day");
        let time_column = or(self.time_column, |policy| &policy.time_column, spend_log::TIME);
        let precreate = self.precreate.or(policy.as_ref().map(|policy| policy.precreate as i32));
        let (parsed, precreate) = policy::parse(&interval, precreate.unwrap_or(policy::PRECREATE))?;
        Layout::of(table.oid, &time_column)?;
        let Moment(cutover) = match self.cutover {
            Some(cutover) => layout::moment(cutover.timestamp()?),
            None => convert::default_cutover(parsed, if has_worker()? { LEAD } else { LEAD_BY_HAND }),
        };
        Ok(Options { interval, precreate, cutover, time_column, aborted: false })
    }
}

/// Of a step: how far it is.
fn row(step: &str, state: &str, detail: String) -> (String, String, String) {
    (step.into(), state.into(), detail)
}

/// What spend_partition_convert() would do. Changes nothing.
#[pg_extern(stable, parallel_unsafe)]
#[allow(clippy::type_complexity)]
fn spend_partition_plan(
    source: default!(Option<Regclass>, "NULL"),
    interval: default!(Option<&str>, "NULL"),
    cutover: default!(Option<TimeArgument>, "NULL"),
    time_column: default!(Option<&str>, "NULL"),
    precreate: default!(Option<i32>, "NULL"),
) -> Result<
    TableIterator<
        'static,
        (
            name!(step, String),
            name!(action, String),
            name!(object, String),
            name!(lock, String),
            name!(estimate, String),
        ),
    >,
    ErrorReport,
> {
    report(|| {
        session::require_primary()?;
        let (elevated, table) = look(source)?;
        if let Some(policy) = converted(&table)? {
            let name = qualified(&policy.schema, &policy.table);
            let done = ["swap", "is done; spend_partition_status shows its partitions", &name, "", ""];
            let [step, action, object, lock, estimate] = done.map(str::to_string);
            return Ok(vec![(step, action, object, lock, estimate)]);
        }
        let wish = Wish { interval, cutover, time_column, precreate };
        let table = lock_to_read(&elevated, table)?;
        let options = wish.options(&table)?;
        plan::plan(table, options)
    })
    .map(TableIterator::new)
}

/// The policy of a table that is partitioned and has one, which each conversion leaves. Also of its first
/// partition: who has asked for the conversion of a table knew it by that Oid. Fails while it is on its way
/// back.
fn converted(table: &Table) -> error::Result<Option<Policy>> {
    if Reversion::of(table)?.is_some() {
        return Err(Error::Reverting(table.qualified()));
    }
    if table.kind == "p" {
        return policy::find(table.oid);
    }
    let Some(parent) = relation::parent(table.oid)?.map(relation::open).transpose()? else { return Ok(None) };
    let is_first = table.name == text::suffixed(&parent.name, convert::LEGACY);
    if is_first { policy::find(parent.oid) } else { Ok(None) }
}

/// Partitions a table without copying it, step by step: the worker goes on by itself; without one each call
/// does a step.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity)]
fn spend_partition_convert(
    source: default!(Option<Regclass>, "NULL"),
    interval: default!(Option<&str>, "NULL"),
    cutover: default!(Option<TimeArgument>, "NULL"),
    time_column: default!(Option<&str>, "NULL"),
    precreate: default!(Option<i32>, "NULL"),
) -> Result<
    TableIterator<'static, (name!(step, String), name!(state, String), name!(detail, String))>,
    ErrorReport,
> {
    report(|| {
        require_changeable()?;
        let (_elevated, table) = enter(source)?;
        let wish = Wish { interval, cutover, time_column, precreate };
        let under_way = Conversion::of(&table)?;
        if let Some(policy) = converted(&table)?.filter(|_| under_way.is_none()) {
            let name = qualified(&policy.schema, &policy.table);
            let by = format!("{name} is partitioned by {}", quoted(&policy.time_column));
            return Ok(vec![row("index", "done", String::new()), row("swap", "done", by)]);
        }
        let pending =
            under_way.filter(|pending| wish.is_empty() && !pending.stopped && !pending.options.aborted);
        let mut conversion = match pending {
            Some(pending) => pending,
            None => convert::request(&table, wish.options(&table)?)?,
        };
        if !has_worker()? {
            conversion.by_hand()?;
        }
        // As it is now: it may have stopped.
        Conversion::of(&table)?.as_ref().unwrap_or(&conversion).progress()
    })
    .map(TableIterator::new)
}

/// Turns a partitioned table back into a plain one, or takes a conversion back that has not swapped yet. The
/// worker goes on by itself; without one each call does a step.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity)]
fn spend_partition_revert(
    source: default!(Option<Regclass>, "NULL"),
    abort: default!(Option<bool>, "false"),
) -> Result<
    TableIterator<'static, (name!(step, String), name!(state, String), name!(detail, String))>,
    ErrorReport,
> {
    report(|| {
        require_changeable()?;
        let (_elevated, table) = enter(source)?;
        if let Some(mut conversion) = Conversion::begun(&table)? {
            conversion.take_over(&table)?;
            let left_to_do = conversion.abort()?.unwrap_or_default();
            return Ok(vec![row("conversion", "aborted", left_to_do)]);
        }
        if abort.unwrap_or(false) {
            let detail = match Reversion::begun(&table)? {
                Some(mut reversion) => reversion.abort().map(|()| String::new())?,
                None if table.kind == "p" => "nothing was under way: it stays partitioned".into(),
                None => "nothing was under way: it is a plain table".into(),
            };
            return Ok(vec![row("reversion", "aborted", detail)]);
        }
        // Also who has named it before the swap knew what is in the archive now.
        if table.kind != "p" || table.schema == ARCHIVE {
            return Ok(vec![row("swap", "done", "it is a plain table".into())]);
        }
        let asked = match Reversion::of(&table)? {
            // Of a table that was dropped since.
            Some(earlier) if earlier.relation != table.oid => Table::find(earlier.relation)?.is_some(),
            earlier => earlier.is_some(),
        };
        if !asked {
            revert::request(&table)?;
        }
        let Some(mut reversion) = Reversion::of(&table)? else { return Ok(vec![]) };
        if !has_worker()?
            && let Some(done) = reversion.by_hand(build::for_copy)?
        {
            return Ok(vec![row("swap", "done", done)]);
        }
        Ok(reversion.progress())
    })
    .map(TableIterator::new)
}

// ---- to be maintained ------------------------------------------------------------------------------------

/// Says how a table is to be partitioned and how long its rows stay. See docs/reference.md.
#[pg_extern(volatile, parallel_unsafe)]
fn spend_partition_set(
    source: default!(Option<Regclass>, "NULL"),
    interval: default!(Option<&str>, "NULL"),
    precreate: default!(Option<i32>, "NULL"),
    retention: default!(Option<Interval>, "NULL"),
    on_expire: default!(Option<&str>, "NULL"),
    time_column: default!(Option<&str>, "NULL"),
    dry_run: default!(Option<bool>, "false"),
) -> Result<(), ErrorReport> {
    report(|| {
        require_changeable()?;
        let dry_run = dry_run.unwrap_or(false);
        let (_elevated, table) = if dry_run { look(source)? } else { enter(source)? };
        let wanted = Wanted { interval, precreate, retention, on_expire, time_column };
        let Change { policy, mut said } = policy::set(&table, wanted, dry_run)?;
        if let Some(policy) = policy {
            said.extend(maintain::forecast(&policy)?);
        }
        if dry_run {
            said.push("dry run: nothing was changed".into());
        }
        Ok(said)
    })
    // After the call, under the caller's own client_min_messages.
    .map(|said| said.into_iter().for_each(|sentence| session::notice(sentence, None)))
}

/// Creates the partitions that are due, drains DEFAULT, lets what has expired go.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity)]
fn spend_partition_maintain(
    source: default!(Option<Regclass>, "NULL"),
) -> Result<
    TableIterator<
        'static,
        (name!(action, String), name!(partition, String), name!(rows, i64), name!(detail, String)),
    >,
    ErrorReport,
> {
    round(source, None)
}

#[pg_schema]
mod litellm_spend {
    use super::*;

    /// spend_partition_maintain() as if it were `now`, in UTC: for tests and rehearsals.
    #[pg_extern(volatile, parallel_unsafe)]
    #[allow(clippy::type_complexity)]
    fn maintain_at(
        source: Option<Regclass>,
        now: Option<TimeArgument>,
    ) -> Result<
        TableIterator<
            'static,
            (name!(action, String), name!(partition, String), name!(rows, i64), name!(detail, String)),
        >,
        ErrorReport,
    > {
        round(source, Some(now.ok_or(Error::Null("time"))?))
    }
}

/// Maintains a table that has a policy, as if it were `now`.
#[allow(clippy::type_complexity)]
fn round(
    source: Option<Regclass>,
    now: Option<TimeArgument>,
) -> Result<
    TableIterator<
        'static,
        (name!(action, String), name!(partition, String), name!(rows, i64), name!(detail, String)),
    >,
    ErrorReport,
> {
    // One owner's table: nobody else waits for it.
    let mut run = Subtransactions::of_call(None);
    let actions = report(|| {
        require_changeable()?;
        let (_elevated, table) = enter(source)?;
        let policy = policy::find(table.oid)?.ok_or_else(|| Error::NoPolicy(table.qualified()))?;
        let now = now.map(TimeArgument::timestamp).transpose()?.map(layout::moment);
        if now.is_some_and(|now| policy.interval.period(now).is_none()) {
            return Err(Error::TimeBeyond { example: TimeArgument::example() });
        }
        Ok(maintain::round(&mut run, policy, now))
    })?;
    run.end()?;
    Ok(TableIterator::new(actions.into_iter().map(|a| (a.action.to_string(), a.partition, a.rows, a.detail))))
}

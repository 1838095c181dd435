//! The SQL functions about rollups, built-in ones and others, as in `api`.

use crate::api::arguments::Regclass;
use crate::api::call::{STEP_OF_CALL, Subtransactions, report, require_changeable, tell};
use crate::api::litellm::require_attached;
use crate::engine::create;
use crate::engine::define::Request;
use crate::engine::drop;
use crate::engine::rebuild;
use crate::engine::rollup;
use crate::error::{self, Error};
use crate::litellm::backfill;
use crate::litellm::builtin;
use crate::litellm::detach;
use crate::litellm::views;
use crate::server::jsonb::Jsonb;
use crate::server::locks::{self, Patience};
use crate::server::session::{self, Elevated};
use crate::state::fence::Fence;
use crate::state::restore;
use crate::state::rollups;
use crate::state::sources;
use crate::worker::round;
use crate::worker::service;
use pgrx::datum::{Timestamp, TimestampWithTimeZone};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

/// What a call of `spend_rollup_run()` may work on, which is `name` if that is given.
fn scope(caller: pg_sys::Oid, name: Option<&str>) -> error::Result<Subtransactions> {
    let mut run = Subtransactions::of_call(Some(STEP_OF_CALL));
    if let Some(name) = name {
        let fence = Fence::look(name)?;
        rebuild::require_right(caller, &fence)?;
        fence.filled()?;
        run.rollups.push(name.into());
        run.watching = fence.is_built_in();
        return Ok(run);
    }
    let mut refusal = Error::NoRollups;
    for name in rollups::rollup_names(None)? {
        let fence = Fence::look(&name)?;
        match rebuild::require_right(caller, &fence) {
            Ok(()) => {
                run.watching |= fence.is_built_in();
                run.rollups.push(name);
            }
            Err(error) => refusal = error,
        }
    }
    let nothing_to_fill = matches!(refusal, Error::NoRollups) && rollups::any_rollup()?;
    if run.rollups.is_empty() && !nothing_to_fill { Err(refusal) } else { Ok(run) }
}

/// Does what the worker does in one round: merges what is safe, repairs, backfills a day, switches views.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity)]
fn spend_rollup_run(
    name: default!(Option<&str>, "NULL"),
) -> Result<
    TableIterator<
        'static,
        (
            name!(rollup, String),
            name!(window_start, Option<i64>),
            name!(window_end, Option<i64>),
            name!(rows, Option<i64>),
            name!(groups, i64),
            name!(outcome, String),
        ),
    >,
    ErrorReport,
> {
    let (round, mut run) = report(|| {
        require_changeable()?;
        let elevated = Elevated::enter()?;
        restore::require_over()?;
        let mut run = scope(elevated.caller(), name)?;
        let round = round::round(&mut run);
        round::tidy(&mut run);
        Ok((round, run))
    })?;
    run.end()?;
    Ok(TableIterator::new(round.outcomes.into_iter().map(|outcome| {
        let merge = outcome.merge;
        (
            outcome.rollup,
            merge.as_ref().map(|m| m.window_start),
            merge.as_ref().map(|m| m.window_end),
            merge.as_ref().map_or(Some(0), |m| m.rows),
            merge.as_ref().map_or(0, |m| m.groups),
            outcome.text.to_string(),
        )
    })))
}

#[pg_schema]
mod litellm_spend {
    use super::*;

    /// One step of spend_backfill(): says how far it is, NULL when all is covered.
    #[pg_extern(volatile, parallel_unsafe)]
    fn backfill_step(source: Option<Regclass>) -> Result<Option<String>, ErrorReport> {
        report(|| {
            require_changeable()?;
            let patience = Patience::of_call();
            let elevated = Elevated::enter()?;
            restore::require_over()?;
            if let Some(Regclass(oid)) = source {
                let (declared, by_hand) = (sources::sources_on(oid)?, sources::filled_by_hand(oid)?);
                if !declared.is_empty() || by_hand.is_some() {
                    session::require_owner(elevated.caller(), oid)?;
                }
                match by_hand {
                    _ if !declared.is_empty() => {
                        return crate::engine::rollup::backfill_step(declared, patience);
                    }
                    Some(rollup) => return Err(Error::ByHand(rollup)),
                    None => {}
                }
            }
            require_attached(elevated.caller(), source)?;
            backfill::step(patience)?;
            views::switch_covered(patience)?;
            rollups::backfill_progress()
        })
    }

    /// Rows of a rollup's tail, at most a million, and the time of the oldest.
    #[pg_extern(stable, strict, parallel_unsafe)]
    #[allow(clippy::type_complexity)]
    fn tail(
        rollup_name: &str,
    ) -> Result<
        TableIterator<'static, (name!(tail_rows, Option<i64>), name!(oldest, Option<TimestampWithTimeZone>))>,
        ErrorReport,
    > {
        report(|| {
            let _elevated = Elevated::enter()?;
            crate::engine::tail::tail(rollup_name)
        })
        .map(TableIterator::once)
    }

    /// Whether nobody keeps a reader from a relation, or from what belongs to it.
    #[pg_extern(volatile, strict, parallel_unsafe)]
    fn is_free(relation: pg_sys::Oid) -> Result<bool, ErrorReport> {
        report(|| {
            let _pinned = Elevated::pinned();
            locks::is_free(relation)
        })
    }

    /// Until when a worker has looked at this database, or since when one is awaited.
    #[pg_extern(volatile, parallel_safe)]
    fn served_until() -> Option<TimestampWithTimeZone> {
        service::served_until()
    }
}

/// Recomputes whole buckets of a rollup, or of all built-in ones, from the raw rows, in the caller's
/// transaction. Returns the groups written.
#[pg_extern(volatile, parallel_unsafe)]
fn spend_rollup_rebuild(
    name: Option<&str>,
    range_start: default!(Option<Timestamp>, "NULL"),
    range_end: default!(Option<Timestamp>, "NULL"),
    force: default!(Option<bool>, "false"),
) -> Result<i64, ErrorReport> {
    report(|| {
        require_changeable()?;
        let elevated = Elevated::enter()?;
        restore::require_over()?;
        rebuild::rebuild_range(elevated.caller(), name, range_start, range_end, force.unwrap_or(false))
    })
}

/// Compares a rollup and its tail with the truth, in one snapshot: a row for each group that differs.
#[pg_extern(stable, parallel_unsafe)]
#[allow(clippy::type_complexity)]
fn spend_rollup_verify(
    name: Option<&str>,
    range_start: default!(Option<Timestamp>, "NULL"),
    range_end: default!(Option<Timestamp>, "NULL"),
) -> Result<
    TableIterator<'static, (name!(key, Jsonb), name!(rollup, Option<Jsonb>), name!(truth, Option<Jsonb>))>,
    ErrorReport,
> {
    report(|| {
        let elevated = Elevated::enter()?;
        let name = name.ok_or(Error::Null("rollup name"))?;
        rebuild::verify(elevated.caller(), name, range_start, range_end)
    })
    .map(|(differences, notices)| {
        tell(notices);
        TableIterator::new(differences)
    })
}

/// Declares a rollup over a table whose rows a sequence numbers. See docs/reference.md.
#[pg_extern(volatile, parallel_unsafe)]
fn spend_rollup_create(
    name: Option<&str>,
    source: Option<Regclass>,
    dimensions: Option<Vec<Option<String>>>,
    measures: Option<Vec<Option<String>>>,
    sequence: default!(Option<Regclass>, "NULL"),
    time_column: default!(Option<&str>, "NULL"),
    distributed: default!(Option<bool>, "NULL"),
) -> Result<(), ErrorReport> {
    report(|| {
        require_changeable()?;
        session::require_utf8()?;
        let texts = |list: Option<Vec<Option<String>>>, what, one| {
            let list = list.ok_or(Error::Null(what))?;
            if list.is_empty() {
                return Err(Error::Empty(what));
            }
            list.into_iter().map(|text| text.ok_or(Error::Null(one))).collect::<error::Result<Vec<_>>>()
        };
        let request = Request {
            name: name.ok_or(Error::Null("rollup name"))?.into(),
            source: source.ok_or(Error::Null("source"))?.0,
            dimensions: texts(dimensions, "list of dimensions", "dimension")?,
            measures: texts(measures, "list of measures", "measure")?,
            sequence: sequence.map(|Regclass(oid)| oid),
            time_column: time_column.map(str::to_string),
            distributed,
            search_path: session::search_path(),
        };
        if builtin::is_reserved(&request.name) {
            return Err(Error::Reserved(request.name));
        }
        create::create(&request)
    })
    .map(tell)
}

/// Notes a watermark for a rollup that its owner fills with SQL of their own.
#[pg_extern(volatile, parallel_unsafe)]
fn spend_rollup_register(
    name: Option<&str>,
    source: Option<Regclass>,
    sequence: default!(Option<Regclass>, "NULL"),
    merged_to: default!(Option<i64>, "NULL"),
) -> Result<(), ErrorReport> {
    report(|| {
        require_changeable()?;
        session::require_utf8()?;
        let name = name.ok_or(Error::Null("rollup name"))?;
        let Regclass(source) = source.ok_or(Error::Null("source"))?;
        create::register(name, source, sequence.map(|Regclass(oid)| oid), merged_to)
    })
    .map(tell)
}

/// The next safe window of a registered rollup; advances its watermark in the caller's transaction.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity)]
fn spend_rollup_window(
    rollup_name: Option<&str>,
) -> Result<
    TableIterator<'static, (name!(window_start, Option<i64>), name!(window_end, Option<i64>))>,
    ErrorReport,
> {
    report(|| {
        require_changeable()?;
        let elevated = Elevated::enter()?;
        restore::require_over()?;
        rollup::next_window(elevated.caller(), rollup_name.ok_or(Error::Null("rollup name"))?)
    })
    .map(|(start, end)| TableIterator::once((Some(start), Some(end))))
}

/// Drops a declared rollup or a report with its history, or the watermark of a registered one.
#[pg_extern(volatile, parallel_unsafe)]
fn spend_rollup_drop(name: Option<&str>) -> Result<(), ErrorReport> {
    report(|| {
        require_changeable()?;
        let elevated = Elevated::enter()?;
        restore::require_over()?;
        let name = name.ok_or(Error::Null("rollup name"))?;
        if builtin::is_report(name) {
            return detach::drop_report(elevated.caller(), name);
        }
        if builtin::is_reserved(name) && !rollups::rollup_exists(name)? {
            return Err(Error::BuiltIn(name.into()));
        }
        drop::drop_rollup(elevated.caller(), name)
    })
}

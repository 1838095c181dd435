//! The SQL functions. Each checks who calls and where, and hands over. Their COMMENTs and grants are in sql/api.sql.

use crate::catalog;
use crate::error::Error;
use crate::locks::Patience;
use crate::rebuild::Range;
use crate::session::{self, Elevated, Failure, attempt};
use crate::tick::{self, Runner, Subject};
use crate::{capture, error, rebuild, views};
use pgrx::JsonB;
use pgrx::datum::Timestamp;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use pgrx::prelude::*;

/// A `regclass` argument. pgrx's own PgRelation opens the relation, which fails without a useful SQLSTATE.
pub struct Regclass(pg_sys::Oid);

// SAFETY: a regclass is an Oid.
unsafe impl<'fcx> pgrx::callconv::ArgAbi<'fcx> for Regclass {
    unsafe fn unbox_arg_unchecked(arg: pgrx::callconv::Arg<'_, 'fcx>) -> Self {
        Regclass(unsafe { arg.unbox_arg_using_from_datum() }.unwrap_or(pg_sys::InvalidOid))
    }
}

unsafe impl SqlTranslatable for Regclass {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(Regclass);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("regclass"));
    const RETURN_SQL: Result<ReturnsRef, ReturnsError> =
        Ok(ReturnsRef::One(SqlMappingRef::literal("regclass")));
}

fn source_or_default(source: Option<Regclass>) -> error::Result<pg_sys::Oid> {
    source.map_or_else(capture::default_source, |Regclass(oid)| Ok(oid))
}

/// Becomes the extension's owner on behalf of a caller who may act for the owner of the captured table, which is
/// `source` unless that is NULL.
fn enter_attached(source: Option<Regclass>) -> error::Result<Elevated> {
    let elevated = Elevated::enter()?;
    let state = catalog::capture()?.ok_or_else(|| Error::NotAttached("any table".into()))?;
    if let Some(Regclass(oid)) = source.filter(|Regclass(oid)| *oid != state.relation) {
        return Err(Error::NotAttached(catalog::relation_name(oid)?));
    }
    capture::require_owner(elevated.caller(), state.relation)?;
    Ok(elevated)
}

fn report<T>(work: impl FnOnce() -> error::Result<T>) -> Result<T, ErrorReport> {
    work().map_err(ErrorReport::from)
}

fn require_changeable() -> error::Result<()> {
    session::require_writable()?;
    session::require_read_committed()
}

/// Captures the table and sets the built-in rollups up. See docs/reference.md.
#[pg_extern(volatile, parallel_unsafe)]
fn spend_attach(
    source: default!(Option<Regclass>, "NULL"),
    on_delete: default!(Option<&str>, "NULL"),
) -> Result<TableIterator<'static, (name!(object, String), name!(action, String))>, ErrorReport> {
    report(|| {
        require_changeable()?;
        session::require_utf8()?;
        let subtract = match on_delete {
            None => None,
            Some("keep") => Some(false),
            Some("subtract") => Some(true),
            Some(other) => return Err(Error::Policy(other.into())),
        };
        let source = source_or_default(source)?;
        let elevated = Elevated::enter()?;
        capture::require_owner(elevated.caller(), source)?;
        capture::attach(source, subtract)
    })
    .map(TableIterator::new)
}

/// Gives LiteLLM's own views back and removes the triggers.
#[pg_extern(volatile, parallel_unsafe)]
fn spend_detach(
    source: default!(Option<Regclass>, "NULL"),
    drop_history: default!(Option<bool>, "false"),
) -> Result<TableIterator<'static, (name!(object, String), name!(action, String))>, ErrorReport> {
    report(|| {
        require_changeable()?;
        let drop_history = drop_history.unwrap_or(false);
        if drop_history && source.is_none() {
            let elevated = Elevated::enter()?;
            if catalog::capture()?.is_none() {
                // Detached before: only the history is left.
                capture::require_extension_owner(elevated.caller())?;
                return capture::forget_history();
            }
        }
        let _elevated = enter_attached(source)?;
        capture::detach(drop_history)
    })
    .map(TableIterator::new)
}

/// The steps of a round, each in a subtransaction of the caller's.
struct Subtransactions {
    patience: Patience,
    cancelled: Option<Failure>,
}

impl Runner for Subtransactions {
    fn step<T>(&mut self, subject: Subject, work: impl FnOnce() -> error::Result<T>) -> Option<T> {
        if self.cancelled.is_some() {
            return None;
        }
        match attempt(work) {
            Ok(value) => Some(value),
            Err(failure) if failure.is_cancel() => {
                self.cancelled = Some(failure);
                None
            }
            Err(failure) => {
                warning!("litellm_spend: {}", failure.message);
                drop(attempt(|| tick::record(&subject, Some(&failure))));
                None
            }
        }
    }

    fn patience(&self) -> Patience {
        self.patience
    }

    fn watch_is_due(&mut self) -> bool {
        true
    }
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
            name!(rows, i64),
            name!(groups, i64),
            name!(outcome, String),
        ),
    >,
    ErrorReport,
> {
    let mut run = Subtransactions { patience: Patience::of_call(), cancelled: None };
    let round = report(|| {
        require_changeable()?;
        let _elevated = enter_attached(None)?;
        if let Some(name) =
            name.filter(|name| !catalog::rollup_names(None).is_ok_and(|all| all.iter().any(|n| n == name)))
        {
            return Err(Error::NoRollup(name.into()));
        }
        let round = tick::tick(&mut run);
        tick::tidy(&mut run);
        Ok(round)
    })?;
    if let Some(failure) = run.cancelled {
        return Err(ErrorReport::new(failure.sqlstate, failure.message, "spend_rollup_run"));
    }
    let wanted = name.map(str::to_string);
    let outcomes = round.outcomes.into_iter().filter(move |o| wanted.as_ref().is_none_or(|w| *w == o.rollup));
    Ok(TableIterator::new(outcomes.map(|outcome| {
        let merge = outcome.merge;
        (
            outcome.rollup,
            merge.as_ref().map(|m| m.window_start),
            merge.as_ref().map(|m| m.window_end),
            merge.as_ref().map_or(0, |m| m.rows),
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
            let _elevated = enter_attached(source)?;
            let patience = Patience::of_call();
            for rollup in catalog::uncovered_rollups()? {
                rebuild::backfill_step(&rollup, patience)?;
            }
            views::switch_covered(patience)?;
            catalog::backfill_progress()
        })
    }
}

/// Recomputes whole days of a rollup from the raw rows, in the caller's transaction. Returns the groups written.
#[pg_extern(volatile, parallel_unsafe)]
fn spend_rollup_rebuild(
    name: Option<&str>,
    range_start: Option<Timestamp>,
    range_end: default!(Option<Timestamp>, "NULL"),
    force: default!(Option<bool>, "false"),
) -> Result<i64, ErrorReport> {
    report(|| {
        require_changeable()?;
        let _elevated = enter_attached(None)?;
        let name = name.ok_or(Error::Null("rollup name"))?;
        let range = Range { start: range_start.ok_or(Error::Null("range_start"))?, end: range_end };
        rebuild::rebuild_range(name, range, force.unwrap_or(false), Patience::of_call())
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
    TableIterator<'static, (name!(key, JsonB), name!(rollup, Option<JsonB>), name!(truth, Option<JsonB>))>,
    ErrorReport,
> {
    report(|| {
        let _elevated = enter_attached(None)?;
        rebuild::verify(name.ok_or(Error::Null("rollup name"))?, range_start, range_end)
    })
    .map(TableIterator::new)
}

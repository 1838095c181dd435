//! The SQL functions. Each checks who calls and where, and hands over. Their COMMENTs and grants are in
//! sql/api.sql.

use crate::engine::declaration::Declaration;
use crate::engine::declare;
use crate::engine::rebuild;
use crate::engine::source::Notice;
use crate::error::{self, Error};
use crate::guc;
use crate::litellm::admin;
use crate::litellm::backfill;
use crate::litellm::builtin;
use crate::litellm::capture;
use crate::litellm::detach;
use crate::litellm::reports;
use crate::litellm::views;
use crate::partition::calendar::Interval;
use crate::partition::convert::{self, Conversion};
use crate::partition::policy;
use crate::server::limit::Limit;
use crate::server::locks::Patience;
use crate::server::relation::{self, Table};
use crate::server::session::{self, Elevated, Failure, attempt};
use crate::server::spi;
use crate::server::text::literal;
use crate::state::captured::{self, CaptureState};
use crate::state::fence::Fence;
use crate::state::indexes;
use crate::state::restore;
use crate::state::rollups;
use crate::state::sources;
use crate::state::step::{Runner, Subject};
use crate::worker::round;
use pgrx::datum::{Timestamp, TimestampWithTimeZone};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use pgrx::prelude::*;
use pgrx::{AnyElement, JsonB};
use std::ffi::CStr;
use std::time::Duration;

/// An argument of one of the `reg…` types: an Oid with a name. pgrx's own PgRelation opens the relation,
/// which fails without a useful SQLSTATE.
macro_rules! reg_type {
    ($name:ident, $sql:literal) => {
        #[derive(Clone, Copy)]
        pub struct $name(pub pg_sys::Oid);

        // SAFETY: it is an Oid.
        unsafe impl<'fcx> pgrx::callconv::ArgAbi<'fcx> for $name {
            unsafe fn unbox_arg_unchecked(arg: pgrx::callconv::Arg<'_, 'fcx>) -> Self {
                $name(unsafe { arg.unbox_arg_using_from_datum() }.unwrap_or(pg_sys::InvalidOid))
            }
        }

        unsafe impl SqlTranslatable for $name {
            const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!($name);
            const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
            const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal($sql));
            const RETURN_SQL: Result<ReturnsRef, ReturnsError> =
                Ok(ReturnsRef::One(SqlMappingRef::literal($sql)));
        }
    };
}
reg_type!(Regclass, "regclass");
reg_type!(Regrole, "regrole");

/// A time, in whatever type people have one: without a time zone it is in UTC. By overloads a literal would
/// be read in the session's.
pub struct TimeArgument(AnyElement);

// SAFETY: it comes with its type.
unsafe impl<'fcx> pgrx::callconv::ArgAbi<'fcx> for TimeArgument {
    unsafe fn unbox_arg_unchecked(arg: pgrx::callconv::Arg<'_, 'fcx>) -> Self {
        // Of NULL an Option is made without this.
        TimeArgument(unsafe { arg.unbox_arg_using_from_datum() }.expect("a time"))
    }
}

unsafe impl SqlTranslatable for TimeArgument {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(TimeArgument);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("\"any\""));
    const RETURN_SQL: Result<ReturnsRef, ReturnsError> =
        Ok(ReturnsRef::One(SqlMappingRef::literal("\"any\"")));
}

impl TimeArgument {
    /// A time that can be passed for each of them: a cutover lies in the future.
    fn example() -> String {
        convert::default_cutover(Interval::Day, AHEAD).to_string()
    }

    /// In UTC. The session's time zone must be pinned.
    pub fn timestamp(self) -> error::Result<Timestamp> {
        use pg_sys::{DATEOID, TEXTOID, TIMESTAMPOID, TIMESTAMPTZOID, UNKNOWNOID, VARCHAROID};
        let known = [DATEOID, TEXTOID, TIMESTAMPOID, TIMESTAMPTZOID, UNKNOWNOID, VARCHAROID];
        if !known.contains(&self.0.oid()) {
            let r#type = relation::type_name(self.0.oid())?;
            return Err(Error::NotATime { r#type, example: TimeArgument::example() });
        }
        // SAFETY: calls the output function of a type of the server's own, with a value of it.
        let text = unsafe {
            let (mut output, mut is_varlena) = (pg_sys::InvalidOid, false);
            pg_sys::getTypeOutputInfo(self.0.oid(), &mut output, &mut is_varlena);
            CStr::from_ptr(pg_sys::OidOutputFunctionCall(output, self.0.datum())).to_string_lossy()
        };
        let read = || {
            let sql = "SELECT $1::timestamptz AT TIME ZONE 'UTC'";
            spi::query(sql, &[text.as_ref().into()], |r| spi::value::<Timestamp>(r, 1))
        };
        use PgSqlErrorCode::{ERRCODE_DATETIME_FIELD_OVERFLOW, ERRCODE_INVALID_DATETIME_FORMAT};
        let refused =
            |_| Err(Error::NotATimeText { given: text.to_string(), example: TimeArgument::example() });
        let times = PgTryBuilder::new(std::panic::AssertUnwindSafe(read))
            .catch_when(ERRCODE_INVALID_DATETIME_FORMAT, refused)
            .catch_when(ERRCODE_DATETIME_FIELD_OVERFLOW, refused)
            .execute()?;
        times.into_iter().next().ok_or(Error::Null("time"))
    }
}

/// More than a cutover leaves for its index.
const AHEAD: Duration = Duration::from_secs(30 * 86_400);

pub fn source_or_default(source: Option<Regclass>) -> error::Result<pg_sys::Oid> {
    source.map_or_else(capture::default_source, |Regclass(oid)| Ok(oid))
}

/// `caller` may act for the owner of the captured table, which is `source` unless that is NULL.
fn require_attached(caller: pg_sys::Oid, source: Option<Regclass>) -> error::Result<CaptureState> {
    let state = captured::capture()?;
    if let Some(Regclass(oid)) = source
        && state.as_ref().is_none_or(|state| state.relation != oid)
    {
        return Err(capture::not_attached_to(oid)?);
    }
    let state = state.map_or_else(|| Err(capture::not_attached()?), Ok)?;
    session::require_owner(caller, state.relation)?;
    Ok(state)
}

pub fn report<T>(work: impl FnOnce() -> error::Result<T>) -> Result<T, ErrorReport> {
    session::require_version().and_then(|()| work()).map_err(|error| match &error {
        Error::NoRollup(name) if builtin::is_report(name) => Error::ReportNotMade(name.clone()).into(),
        Error::NoRollup(_) => {
            let hint = own_rollups();
            let report = ErrorReport::from(error);
            if let Ok(Some(hint)) = hint { report.set_hint(hint) } else { report }
        }
        _ => error.into(),
    })
}

/// The rollups that the caller may name, who need not be allowed to read the status.
fn own_rollups() -> error::Result<Option<String>> {
    let elevated = Elevated::enter()?;
    let names = rollups::rollups_of(elevated.caller(), MOST_NAMES + 1)?;
    let more = if names.len() > MOST_NAMES { " and others" } else { "" };
    let names: Vec<String> = names.iter().take(MOST_NAMES).map(|name| format!("\"{name}\"")).collect();
    Ok((!names.is_empty()).then(|| format!("There are {}{more}.", names.join(", "))))
}

/// As many as the built-in ones, and some.
const MOST_NAMES: usize = 12;

pub fn require_changeable() -> error::Result<()> {
    session::require_writable()?;
    session::require_read_committed()
}

/// Captures the table and sets the built-in rollups up. See docs/reference.md.
#[pg_extern(volatile, parallel_unsafe)]
fn spend_attach(
    source: default!(Option<Regclass>, "NULL"),
    on_delete: default!(Option<&str>, "NULL"),
    reports: default!(Option<bool>, "NULL"),
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
        let elevated = Elevated::enter()?.impatient(guc::lock_timeout().time);
        session::require_owner(elevated.caller(), source)?;
        // Who attaches says that whatever was restored is all there.
        restore::adopt()?;
        let actions = capture::attach(source, subtract, reports == Some(true))?;
        let kept = if reports == Some(false) { reports::here()? } else { vec![] };
        Ok((actions, relation::relation_name(source)?, kept))
    })
    .map(|(actions, table, kept)| {
        if !kept.is_empty() {
            let drops = kept.iter().map(|name| format!("SELECT spend_rollup_drop({});", literal(name)));
            tell(vec![Notice {
                message: format!("the reports stay, with their history: {}", kept.join(", ")),
                hint: format!("To drop them with it: {}", drops.collect::<Vec<_>>().join(" ")),
            }]);
        }
        let locked = actions.iter().any(|(_, action)| action == capture::CAPTURING);
        // SAFETY: reads state of the transaction.
        if locked && unsafe { pg_sys::IsTransactionBlock() } {
            tell(vec![Notice {
                message: format!("who writes to {table} waits until this transaction ends"),
                hint: "COMMIT;".into(),
            }]);
        }
        TableIterator::new(actions)
    })
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
        let elevated = Elevated::enter()?.impatient(guc::lock_timeout().time);
        restore::require_over()?;
        if drop_history && source.is_none() && captured::capture()?.is_none() && detach::history_is_kept()? {
            // Detached before: only the history is left.
            session::require_extension_owner(elevated.caller())?;
            return detach::forget_history();
        }
        if captured::capture()?.is_none() {
            let object = match source {
                Some(Regclass(oid)) => format!("table {}", relation::relation_name(oid)?),
                None => "any table".into(),
            };
            return Ok(vec![(object, "is not captured".into())]);
        }
        let state = require_attached(elevated.caller(), source)?;
        let table = Table::find(state.relation)?;
        let converting = table.as_ref().map(Conversion::of).transpose()?.flatten();
        let mut actions = detach::detach(drop_history).map_err(|error| match (error, converting) {
            (Error::LockNotAvailable { relation, limit, holders }, Some(conversion)) => {
                Error::LockedByConversion { relation, limit, holders, table: conversion.name() }
            }
            (error, _) => error,
        })?;
        if let Some(table) = table {
            actions.extend(what_goes_on(&table)?);
        }
        Ok(actions)
    })
    .map(TableIterator::new)
}

/// What somebody has asked for who may not want it without the totals.
fn what_goes_on(table: &Table) -> error::Result<Vec<(String, String)>> {
    let mut actions = vec![];
    if let Some(policy) = policy::find(table.oid)? {
        let expires = match &policy.retention {
            Some(retention) => format!(
                "goes on: rows older than {retention} are removed; \
                 SELECT spend_partition_set({}, retention => NULL) ends that",
                literal(&table.qualified())
            ),
            None => "goes on: partitions are made ahead".into(),
        };
        actions.push((format!("policy of {}", table.qualified()), expires));
    }
    let asked = indexes::asked_for(table)?;
    if !asked.is_empty() {
        actions.push((
            format!("indexes {}", asked.join(", ")),
            "stay: SELECT spend_index_drop() drops them".into(),
        ));
    }
    Ok(actions)
}

/// The steps of a round, each in a subtransaction of the caller's.
pub struct Subtransactions {
    patience: Patience,
    cancelled: Option<Failure>,
    /// The rollups to work on.
    rollups: Vec<String>,
    watching: bool,
}

impl Subtransactions {
    pub fn of_call() -> Self {
        Subtransactions { patience: Patience::of_call(), cancelled: None, rollups: vec![], watching: false }
    }

    /// Fails if the caller was cancelled meanwhile.
    pub fn end(&mut self) -> Result<(), ErrorReport> {
        self.cancelled.take().map_or(Ok(()), |failure| Err(failure.report()))
    }
}

impl Runner for Subtransactions {
    fn step<T>(&mut self, subject: Subject, work: impl FnOnce() -> error::Result<T>) -> Option<T> {
        if self.cancelled.is_some() {
            return None;
        }
        let outcome = attempt(|| {
            let _ourselves = Elevated::enter()?.impatient(guc::lock_timeout().time);
            let _limit = Limit::begin(STEP_OF_CALL, false);
            work()
        });
        match outcome {
            Ok(value) => Some(value),
            Err(failure) if failure.is_cancel() => {
                self.cancelled = Some(failure);
                None
            }
            Err(failure) => {
                let message = format!("litellm_spend: {subject} failed: {}", failure.message);
                failure.explain(message).report(PgLogLevel::WARNING);
                drop(attempt(|| round::record(&subject, Some(&failure), None)));
                None
            }
        }
    }

    fn patience(&self) -> Patience {
        self.patience
    }

    fn may_fill(&self, rollup: &str) -> bool {
        self.rollups.iter().any(|name| name == rollup)
    }

    fn may_watch(&self) -> bool {
        self.watching
    }

    fn converts(&self) -> bool {
        false
    }

    fn watch_is_due(&mut self) -> bool {
        true
    }
}

/// How long a step of a call may take, which works for one owner after the other.
const STEP_OF_CALL: Duration = Duration::from_secs(60);

/// What a call of `spend_rollup_run()` may work on, which is `name` if that is given.
fn scope(caller: pg_sys::Oid, name: Option<&str>) -> error::Result<Subtransactions> {
    let mut run = Subtransactions::of_call();
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
            crate::engine::rollup::tail(rollup_name)
        })
        .map(TableIterator::once)
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
    TableIterator<'static, (name!(key, JsonB), name!(rollup, Option<JsonB>), name!(truth, Option<JsonB>))>,
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
        let declaration = Declaration {
            name: name.ok_or(Error::Null("rollup name"))?.into(),
            source: source.ok_or(Error::Null("source"))?.0,
            dimensions: texts(dimensions, "list of dimensions", "dimension")?,
            measures: texts(measures, "list of measures", "measure")?,
            sequence: sequence.map(|Regclass(oid)| oid),
            time_column: time_column.map(str::to_string),
            distributed,
            search_path: session::search_path(),
        };
        if builtin::is_reserved(&declaration.name) {
            return Err(Error::Reserved(declaration.name));
        }
        declare::create(&declaration)
    })
    .map(tell)
}

/// After the call, under the caller's own client_min_messages.
fn tell(notices: Vec<Notice>) {
    notices.into_iter().for_each(Notice::report);
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
        declare::register(name, source, sequence.map(|Regclass(oid)| oid), merged_to)
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
        declare::next_window(elevated.caller(), rollup_name.ok_or(Error::Null("rollup name"))?)
    })
    .map(|(start, end)| TableIterator::once((Some(start), Some(end))))
}

/// Drops a declared rollup or a report with its history, or the watermark of a registered one.
#[pg_extern(volatile, parallel_unsafe)]
fn spend_rollup_drop(name: Option<&str>) -> Result<(), ErrorReport> {
    report(|| {
        require_changeable()?;
        let elevated = Elevated::enter()?;
        let name = name.ok_or(Error::Null("rollup name"))?;
        if builtin::is_report(name) {
            let elevated = elevated.impatient(guc::lock_timeout().time);
            restore::require_over()?;
            return detach::drop_report(elevated.caller(), name);
        }
        if builtin::is_reserved(name) && !rollups::rollup_exists(name)? {
            return Err(Error::BuiltIn(name.into()));
        }
        declare::drop_rollup(elevated.caller(), name)
    })
}

/// Says that the restore which brought the state here is over. `true`: something was waiting for that.
#[pg_extern(volatile, parallel_unsafe)]
fn spend_restored() -> Result<bool, ErrorReport> {
    report(|| {
        require_changeable()?;
        let elevated = Elevated::enter()?;
        session::require_extension_owner(elevated.caller())?;
        restore::adopt()
    })
}

/// Lets a role call what needs no superuser, and says what does.
#[pg_extern(volatile, parallel_unsafe)]
fn spend_grant_admin(
    role: Option<Regrole>,
) -> Result<TableIterator<'static, (name!(object, String), name!(action, String))>, ErrorReport> {
    administer(role, admin::grant)
}

/// Takes that back.
#[pg_extern(volatile, parallel_unsafe)]
fn spend_revoke_admin(
    role: Option<Regrole>,
) -> Result<TableIterator<'static, (name!(object, String), name!(action, String))>, ErrorReport> {
    administer(role, admin::revoke)
}

fn administer(
    role: Option<Regrole>,
    work: fn(pg_sys::Oid) -> error::Result<Vec<views::Action>>,
) -> Result<TableIterator<'static, (name!(object, String), name!(action, String))>, ErrorReport> {
    report(|| {
        require_changeable()?;
        let Regrole(role) = role.ok_or(Error::Null("role"))?;
        let elevated = Elevated::enter()?;
        session::require_extension_owner(elevated.caller())?;
        work(role)
    })
    .map(TableIterator::new)
}

/// Lets a role read the report views.
#[pg_extern(volatile, parallel_unsafe)]
fn spend_grant_reports(
    role: Option<Regrole>,
) -> Result<TableIterator<'static, (name!(object, String), name!(action, String))>, ErrorReport> {
    report(|| {
        require_changeable()?;
        let Regrole(role) = role.ok_or(Error::Null("role"))?;
        let elevated = Elevated::enter()?;
        let schema = require_attached(elevated.caller(), None)?.schema;
        reports::grant(elevated.caller(), role, &schema)
    })
    .map(TableIterator::new)
}

//! The SQL functions about LiteLLM's table, as in `api`: whether it is captured, who may call and read what,
//! and a restore that is over.

use crate::api::arguments::{Regclass, Regrole};
use crate::api::call::{report, require_changeable, tell};
use crate::engine::source::Notice;
use crate::error::{self, Error};
use crate::guc;
use crate::litellm::admin;
use crate::litellm::attach;
use crate::litellm::capture;
use crate::litellm::detach;
use crate::litellm::reports;
use crate::litellm::views;
use crate::partition::convert::Conversion;
use crate::partition::policy;
use crate::server::locks::Patience;
use crate::server::relation::{self, Table};
use crate::server::session::{self, Elevated};
use crate::server::text::literal;
use crate::state::captured::{self, CaptureState};
use crate::state::indexes;
use crate::state::restore;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

pub fn source_or_default(source: Option<Regclass>) -> error::Result<pg_sys::Oid> {
    source.map_or_else(capture::default_source, |Regclass(oid)| Ok(oid))
}

/// `caller` may act for the owner of the captured table, which is `source` unless that is NULL.
pub fn require_attached(caller: pg_sys::Oid, source: Option<Regclass>) -> error::Result<CaptureState> {
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
            Some(other) => return Err(Error::OnDelete(other.into())),
        };
        let source = source_or_default(source)?;
        let elevated = Elevated::enter()?.impatient(guc::lock_timeout().time);
        session::require_owner(elevated.caller(), source)?;
        // By attaching the table that was, the caller says that a restore is over. Of another one only who
        // may speak for every owner.
        match session::require_extension_owner(elevated.caller()) {
            Err(_) if !captured::captured_relations()?.contains(&source) => restore::require_over()?,
            _ => drop(restore::adopt(Patience::of_call())?),
        }
        restore::begin()?;
        let actions = attach::attach(elevated.caller(), source, subtract, reports == Some(true))?;
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
        let locked = actions.iter().any(|(_, action)| action == attach::CAPTURING);
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
        // Another may have got it while we waited for its lock.
        session::require_owner(elevated.caller(), state.relation)?;
        if let Some(table) = table {
            actions.extend(what_goes_on(&table)?);
        }
        Ok(actions)
    })
    .map(TableIterator::new)
}

/// What goes on after a detach because somebody has asked for it, a policy or indexes, and how to end it.
fn what_goes_on(table: &Table) -> error::Result<Vec<(String, String)>> {
    let mut actions = vec![];
    if let Some(policy) = policy::find(table.oid)? {
        let expires = match &policy.retention {
            Some(retention) => format!(
                "goes on: rows older than {retention} are removed; \
                 SELECT spend_partition_set({}, retention => '0') ends that",
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

/// Says that the restore which brought the state here is over. `true`: something was waiting for that.
#[pg_extern(volatile, parallel_unsafe)]
fn spend_restored() -> Result<bool, ErrorReport> {
    report(|| {
        require_changeable()?;
        let elevated = Elevated::enter()?.impatient(guc::lock_timeout().time);
        session::require_extension_owner(elevated.caller())?;
        restore::adopt(Patience::of_call())
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

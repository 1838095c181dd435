//! How a table is partitioned and how long its rows stay: what `spend_partition_set()` stores and maintenance goes by.
//!
//! A policy holds for the table that it was set for, while that belongs to the owner who set it. By name it would outlive its
//! table, and delete the rows of whoever's table gets the name.

use crate::catalog::{self, Table};
use crate::definition::SCHEMA;
use crate::error::{Error, Result};
use crate::guc;
use crate::layout::{self, Layout};
use crate::litellm;
use crate::locks::{Patience, Work};
use crate::partition::{Instant, Interval};
use crate::restore::HERE;
use pgrx::datum;
use pgrx::prelude::*;

#[derive(Clone, Debug)]
pub struct Policy {
    pub relation: pg_sys::Oid,
    /// The table's, as it is called now.
    pub schema: String,
    pub table: String,
    pub time_column: String,
    pub interval: Interval,
    pub precreate: u32,
    /// As SQL writes it.
    pub retention: Option<String>,
    pub on_expire: OnExpire,
    /// For the proof of what expired.
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnExpire {
    Drop,
    Detach,
}

impl Policy {
    /// Rows before this time expire.
    pub fn cutoff(&self, now: Instant) -> Result<Option<Instant>> {
        let Some(retention) = &self.retention else { return Ok(None) };
        let cutoff = format!("{now}::timestamp - $1::interval");
        let sql = format!("SELECT {}", layout::micros(&format!("({cutoff})")));
        let cutoffs = catalog::query(&sql, &[retention.as_str().into()], |r| catalog::value::<i64>(r, 1))?;
        Ok(cutoffs.first().copied().map(Instant))
    }

    /// The right to maintain the table, until the transaction ends. `None`: somebody else is at it, be it a step of this session that
    /// has called us, or the table is another's now.
    pub fn lock(&self, patience: Patience) -> Result<Option<Work>> {
        let Some(work) = Work::begin(&format!("policy {}", self.relation.to_u32())) else { return Ok(None) };
        let sql = format!(
            "SELECT FROM {SCHEMA}.policy p JOIN pg_catalog.pg_class c ON c.oid = p.relation AND c.relowner = p.owner
             WHERE p.relation = $1 FOR UPDATE OF p SKIP LOCKED"
        );
        loop {
            if !catalog::fresh(&sql, &[self.relation.into()], |_| Ok(()))?.is_empty() {
                return Ok(Some(work));
            }
            if !patience.try_again() {
                return Ok(None);
            }
        }
    }

    /// Notes the end of a round. `again`: the next one does not wait for the whole interval.
    pub fn record(&self, again: Again, error: Option<&str>) -> Result<()> {
        let wait = match again {
            Again::AtOnce => Some(0.0),
            Again::Soon => Some(RETRY.min(guc::maintain_interval().as_secs_f64())),
            Again::Later => None,
        };
        catalog::execute(
            &format!(
                "UPDATE {SCHEMA}.policy SET maintained_at = clock_timestamp(),
                     retry_at = clock_timestamp() + make_interval(secs => $2), last_error = $3,
                     last_error_at = CASE WHEN $3 IS NULL THEN NULL WHEN last_error = $3 THEN last_error_at
                                          ELSE clock_timestamp() END
                 WHERE relation = $1"
            ),
            &[self.relation.into(), wait.into(), error.map(str::to_string).into()],
        )
        .map(drop)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// There is more of the same.
    AtOnce,
    /// Somebody was in the way.
    Soon,
    Later,
}

/// Seconds until a step whose lock was not to be had is tried again: its wait stalls others for up to lock_timeout.
const RETRY: f64 = 30.0;

/// The policies that hold, with the names of their tables.
const POLICIES: &str = "SELECT n.nspname::text, c.relname::text, time_column::text, \"interval\", precreate, retention::text,
            on_expire, format('%s, %s ahead, retention %s, %s', \"interval\", precreate, coalesce(retention::text, 'none'), on_expire),
            c.oid
     FROM litellm_spend.policy JOIN litellm_spend.installation i ON i.id = policy.origin
     JOIN pg_catalog.pg_class c ON c.oid = policy.relation AND c.relowner = policy.owner
     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace";

fn read(r: &pgrx::spi::SpiHeapTupleData) -> Result<Policy> {
    let interval: String = catalog::value(r, 4)?;
    Ok(Policy {
        schema: catalog::value(r, 1)?,
        table: catalog::value(r, 2)?,
        time_column: catalog::value(r, 3)?,
        interval: Interval::parse(&interval).ok_or(Error::Interval(interval))?,
        precreate: catalog::value::<i32>(r, 5)?.unsigned_abs(),
        retention: r.get(6)?,
        on_expire: if catalog::value::<String>(r, 7)? == "drop" { OnExpire::Drop } else { OnExpire::Detach },
        text: catalog::value(r, 8)?,
        relation: catalog::value(r, 9)?,
    })
}

/// The policies whose turn it is, by the server's clock. A table that is being converted is left alone until that has ended.
pub fn due() -> Result<Vec<Policy>> {
    let interval = guc::maintain_interval().as_secs_f64();
    if interval == 0.0 {
        return Ok(vec![]);
    }
    let sql = format!(
        "{POLICIES}
         WHERE NOT EXISTS (SELECT FROM {SCHEMA}.conversion AS v WHERE v.relation = policy.relation AND NOT v.stopped)
           AND least(coalesce(retry_at, 'infinity'), coalesce(maintained_at, '-infinity') + make_interval(secs => $1))
               <= clock_timestamp()
         ORDER BY 1, 2"
    );
    catalog::query(&sql, &[interval.into()], read)
}

/// The policy of one table.
pub fn find(relation: pg_sys::Oid) -> Result<Option<Policy>> {
    let sql = format!("{POLICIES} WHERE c.oid = $1");
    Ok(catalog::query(&sql, &[relation.into()], read)?.pop())
}

/// Forgets the policies of tables that were dropped, and says of those whose table has another owner, who has not asked for
/// it, that they rest.
pub fn look_after() -> Result<()> {
    let known = format!(
        "SELECT p.relation::oid, c.oid IS NOT NULL, p.owner::text, c.relowner::regrole::text, p.last_error
         FROM {SCHEMA}.policy p LEFT JOIN pg_catalog.pg_class c ON c.oid = p.relation
         WHERE p.owner IS DISTINCT FROM c.relowner AND p.origin = {HERE}"
    );
    let strays = catalog::query(&known, &[], |r| {
        let owners = (catalog::value::<String>(r, 3)?, r.get::<String>(4)?);
        Ok((catalog::value::<pg_sys::Oid>(r, 1)?, catalog::value::<bool>(r, 2)?, owners, r.get::<String>(5)?))
    })?;
    for (relation, exists, (owner, heir), noted) in strays {
        if !exists {
            let sql = format!("DELETE FROM {SCHEMA}.policy WHERE relation = $1");
            catalog::execute(&sql, &[relation.into()])?;
            continue;
        }
        let heir = heir.unwrap_or_default();
        let message = format!(
            "it was {owner}'s policy, and the table is {heir}'s now\nHINT:  Call spend_partition_set() again."
        );
        if noted.as_ref() != Some(&message) {
            record_error(relation, Some(&message))?;
        }
    }
    Ok(())
}

/// What `spend_partition_set()` was given.
pub struct Wanted<'a> {
    pub interval: Option<&'a str>,
    pub precreate: i32,
    pub retention: Option<datum::Interval>,
    pub on_expire: &'a str,
    pub time_column: Option<&'a str>,
}

/// Stores a policy; without an interval, removes it.
pub fn set(table: &Table, wanted: Wanted) -> Result<()> {
    let Some(interval) = wanted.interval else { return remove(table) };
    layout::require_root(table)?;
    let time_column = match wanted.time_column {
        Some(column) => column.to_string(),
        None if table.kind == "p" => layout::partition_key(table)?,
        None => litellm::TIME.into(),
    };
    Layout::of(table.oid, &time_column)?;
    parse(interval, wanted.precreate)?;
    if !["drop", "detach"].contains(&wanted.on_expire) {
        return Err(Error::OnExpire(wanted.on_expire.into()));
    }
    check_retention(interval, wanted.retention)?;
    catalog::execute(
        &format!(
            "INSERT INTO {SCHEMA}.policy (relation, owner, time_column, \"interval\", precreate, retention, on_expire,
                                          origin)
             VALUES ($1, $2, $3::name, $4, $5, $6, $7, {HERE})
             ON CONFLICT (relation) DO UPDATE SET owner = excluded.owner, time_column = excluded.time_column,
                 \"interval\" = excluded.\"interval\", precreate = excluded.precreate, retention = excluded.retention,
                 on_expire = excluded.on_expire, maintained_at = NULL, retry_at = NULL,
                 last_error = NULL, last_error_at = NULL"
        ),
        &[
            table.oid.into(),
            table.owner_oid.into(),
            time_column.into(),
            interval.into(),
            wanted.precreate.into(),
            wanted.retention.into(),
            wanted.on_expire.into(),
        ],
    )
    .map(drop)
}

/// How many periods are kept ready beyond the current one, if nobody says.
pub const PRECREATE: i32 = 7;

/// More periods than that are a slip.
const MOST_AHEAD: i32 = 366;

/// How a table is to be partitioned, as a user says it.
pub fn parse(interval: &str, precreate: i32) -> Result<(Interval, u32)> {
    let interval = Interval::parse(interval).ok_or_else(|| Error::Interval(interval.into()))?;
    if !(0..=MOST_AHEAD).contains(&precreate) {
        return Err(Error::Precreate { given: precreate, most: MOST_AHEAD });
    }
    Ok((interval, precreate.unsigned_abs()))
}

/// A partition goes as a whole, so rows must be allowed to stay for one period at least.
fn check_retention(interval: &str, retention: Option<datum::Interval>) -> Result<()> {
    let Some(retention) = retention else { return Ok(()) };
    let sql =
        "SELECT isfinite($1) AND $1 >= ('1 ' || $2)::interval AND $1 <= interval '1000 years', $1::text";
    let answers = catalog::query(sql, &[retention.into(), interval.into()], |r| {
        Ok((catalog::value::<bool>(r, 1)?, catalog::value::<String>(r, 2)?))
    })?;
    match answers.into_iter().next() {
        Some((true, _)) => Ok(()),
        Some((false, given)) => Err(Error::Retention { given, interval: interval.into() }),
        None => Ok(()),
    }
}

/// Removing what is not there is no error.
fn remove(table: &Table) -> Result<()> {
    catalog::execute(&format!("DELETE FROM {SCHEMA}.policy WHERE relation = $1"), &[table.oid.into()])
        .map(drop)
}

/// Keeps what stopped a round.
pub fn record_error(relation: pg_sys::Oid, message: Option<&str>) -> Result<()> {
    catalog::execute(
        &format!(
            "UPDATE {SCHEMA}.policy SET last_error = $2,
                 last_error_at = CASE WHEN $2 IS NOT NULL THEN clock_timestamp() END
             WHERE relation = $1 AND last_error IS DISTINCT FROM $2"
        ),
        &[relation.into(), message.map(str::to_string).into()],
    )
    .map(drop)
}

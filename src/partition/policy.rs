//! How a table is partitioned and how long its rows stay: what `spend_partition_set()` stores and maintenance
//! goes by.
//!
//! A policy holds for the table that it was set for, while that belongs to the owner who set it. By name it
//! would outlive its table, and delete the rows of whoever's table gets the name.

use crate::error::{Error, Result};
use crate::guc;
use crate::litellm::spend_log;
use crate::partition::calendar::{Interval, Moment};
use crate::partition::layout::{self, Layout};
use crate::server::relation::Table;
use crate::server::session::{Owner, advised};
use crate::server::spi::{self, Found};
use crate::server::text::{literal, qualified, quoted};
use crate::state::fence::Work;
use crate::state::restore::HERE;
use pgrx::datum;
use pgrx::prelude::*;
use std::fmt;
use std::time::Duration;

#[derive(Clone, Debug)]
pub struct Policy {
    pub relation: pg_sys::Oid,
    /// Whose it is: of the table's owner, when it was set.
    pub owner: Owner,
    /// The table's, as it is called now.
    pub schema: String,
    pub table: String,
    pub time_column: String,
    pub interval: Interval,
    pub precreate: u32,
    /// As SQL writes it.
    pub retention: Option<String>,
    pub on_expire: OnExpire,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnExpire {
    Drop,
    Detach,
}

impl Policy {
    /// Its table as it is now, while that belongs to the owner who set the policy.
    pub fn layout(&self) -> Result<Layout> {
        Layout::of_owner(self.owner, self.relation, &self.time_column)
    }

    /// Rows before this time expire.
    pub fn cutoff(&self, now: Moment) -> Result<Option<Moment>> {
        let Some(retention) = &self.retention else { return Ok(None) };
        let cutoff = format!("{now}::timestamp - $1::interval");
        let sql = format!("SELECT {}", layout::micros(&format!("({cutoff})")));
        let cutoff = spi::query(&sql, &[retention.as_str().into()], |r| spi::value::<i64>(r, 1)).one()?;
        Ok(cutoff.map(Moment))
    }

    /// When what ends at `end` expires, as text; `None`: it does not.
    pub fn expiry(&self, end: Moment) -> Result<Option<String>> {
        let (Some(retention), Some(end)) = (&self.retention, layout::timestamp(end)) else { return Ok(None) };
        // Beyond, the sum need not be a timestamp.
        let sql = "SELECT ($1 + $2::interval)::text WHERE $1 < '200000-01-01'";
        let args = [end.into(), retention.as_str().into()];
        spi::query(sql, &args, |r| spi::value::<String>(r, 1)).one()
    }

    /// The right to maintain the table, until the transaction ends. `None`: somebody else is at it, be it a
    /// step of this session that has called us, or the table is another's now, or the policy is not the one
    /// that was read any more. Retentions are compared as text: as intervals '30 days' equals '1 mon'.
    pub fn lock(&self) -> Result<Option<Work>> {
        let Some(work) = Work::begin(&format!("policy {}", self.relation.to_u32())) else { return Ok(None) };
        let sql = "SELECT FROM litellm_spend.policy p JOIN pg_catalog.pg_class c ON c.oid = p.relation
                 AND c.relowner = p.owner
             WHERE p.relation = $1 AND p.owner = $2
               AND (p.time_column::text, p.\"interval\", p.precreate, p.retention::text, p.on_expire)
                   IS NOT DISTINCT FROM ($3, $4, $5, $6::interval::text, $7)
             FOR UPDATE OF p SKIP LOCKED";
        Ok((spi::fresh(sql, &self.values(), |_| Ok(())).any()?).then_some(work))
    }

    /// Of which table it is, whose, and what it says.
    fn values(&self) -> [datum::DatumWithOid<'_>; 7] {
        [
            self.relation.into(),
            self.owner.oid().into(),
            self.time_column.as_str().into(),
            self.interval.name().into(),
            (self.precreate as i32).into(),
            self.retention.clone().into(),
            self.on_expire.name().into(),
        ]
    }

    /// Notes the end of a round, unless the policy is another by now. `again`: the next one does not wait for
    /// the whole interval. `blocked`: what it left undone because somebody was in the way.
    pub fn record(&self, again: Again, error: Option<&str>, blocked: Option<&str>) -> Result<()> {
        let Some(_work) = self.lock()? else { return Ok(()) };
        let wait = match again {
            Again::AtOnce => Some(0.0),
            Again::Soon => Some(retry().as_secs_f64()),
            Again::Later => None,
        };
        spi::run(
            "UPDATE litellm_spend.policy SET (maintained_at, retry_at) =
                         (SELECT now, now + make_interval(secs => $2)
                             FROM (SELECT clock_timestamp() AS now OFFSET 0) t),
                     last_error = $3,
                     last_error_at = CASE WHEN $3 IS NULL THEN NULL WHEN last_error = $3 THEN last_error_at
                                          ELSE clock_timestamp() END,
                     blocked = $4,
                     blocked_since = CASE WHEN $4 IS NOT NULL THEN
                         coalesce(blocked_since, clock_timestamp()) END
                 WHERE relation = $1",
            &[
                self.relation.into(),
                wait.into(),
                error.map(str::to_string).into(),
                blocked.map(str::to_string).into(),
            ],
        )
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

/// How soon a worker tries a step again whose lock was not to be had: its wait stalls others for up to
/// lock_timeout. Zero: no worker does.
pub fn retry() -> Duration {
    Duration::from_secs(30).min(guc::maintain_interval())
}

/// The policies that hold, with the names of their tables.
const POLICIES: &str =
    "SELECT n.nspname::text, c.relname::text, time_column::text, \"interval\", precreate, retention::text,
            on_expire, c.oid, policy.owner::oid
     FROM litellm_spend.policy JOIN litellm_spend.installation i ON i.id = policy.origin
     JOIN pg_catalog.pg_class c ON c.oid = policy.relation AND c.relowner = policy.owner
     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace";

fn read(r: &pgrx::spi::SpiHeapTupleData) -> Result<Policy> {
    let interval: String = spi::value(r, 4)?;
    Ok(Policy {
        schema: spi::value(r, 1)?,
        table: spi::value(r, 2)?,
        time_column: spi::value(r, 3)?,
        interval: Interval::parse(&interval).ok_or(Error::Interval(interval))?,
        precreate: spi::value::<i32>(r, 5)?.unsigned_abs(),
        retention: r.get(6)?,
        on_expire: if spi::value::<String>(r, 7)? == "drop" { OnExpire::Drop } else { OnExpire::Detach },
        relation: spi::value(r, 8)?,
        owner: Owner::role(spi::value(r, 9)?),
    })
}

/// The policies whose turn it is, by the server's clock; also where that was ahead in the last round. A table
/// that is being converted is left alone until that has ended.
pub fn due() -> Result<Vec<Policy>> {
    let interval = guc::maintain_interval().as_secs_f64();
    if interval == 0.0 {
        return Ok(vec![]);
    }
    let sql = format!(
        "{POLICIES}
         WHERE NOT EXISTS (SELECT FROM litellm_spend.conversion AS v WHERE v.relation = policy.relation
             AND v.owner = policy.owner AND NOT v.stopped)
           AND (least(coalesce(retry_at, 'infinity'),
                   coalesce(maintained_at, '-infinity') + make_interval(secs => $1))
                   <= clock_timestamp()
               OR maintained_at > clock_timestamp())
         ORDER BY 1, 2"
    );
    spi::query(&sql, &[interval.into()], read)
}

/// The policy of one table.
pub fn find(relation: pg_sys::Oid) -> Result<Option<Policy>> {
    let sql = format!("{POLICIES} WHERE c.oid = $1");
    spi::query(&sql, &[relation.into()], read).one()
}

/// Forgets the policies of tables that were dropped, except that of the captured one, which goes along when
/// another table has replaced it; and says of those whose table has another owner, who has
/// not asked for it, that they rest.
pub fn look_after() -> Result<()> {
    let sql = format!(
        "DELETE FROM litellm_spend.policy p WHERE p.origin = {HERE}
             AND NOT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = p.relation)
             AND NOT EXISTS (SELECT FROM litellm_spend.capture c WHERE c.relation = p.relation)"
    );
    spi::run(&sql, &[])?;
    let rest = format!(
        "SELECT n.nspname::text, c.relname::text, p.time_column::text, p.\"interval\", p.precreate,
             p.retention::text, p.on_expire, c.oid, p.owner::oid, p.owner::text, c.relowner::regrole::text,
             p.last_error
         FROM litellm_spend.policy p JOIN pg_catalog.pg_class c ON c.oid = p.relation
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE p.owner <> c.relowner AND p.origin = {HERE}"
    );
    let strays = spi::query(&rest, &[], |r| {
        let owners = (spi::value::<String>(r, 10)?, spi::value::<String>(r, 11)?);
        Ok((read(r)?, owners, r.get::<String>(12)?))
    })?;
    for (policy, (owner, heir), noted) in strays {
        let message =
            advised(&format!("it was {owner}'s policy, and the table is {heir}'s now"), &policy.statement());
        if noted.as_ref() != Some(&message) {
            record_error(policy.relation, Some(&message))?;
        }
    }
    Ok(())
}

/// The arguments of `spend_partition_set()`: `None` leaves a setting as it is.
pub struct Wanted<'a> {
    pub interval: Option<&'a str>,
    pub precreate: Option<i32>,
    pub retention: Option<datum::Interval>,
    pub on_expire: Option<&'a str>,
    pub time_column: Option<&'a str>,
}

/// The result of `spend_partition_set()`.
pub struct Change {
    /// As it is from now on; `None`: the table has no policy.
    pub policy: Option<Policy>,
    /// A sentence for each setting that has changed.
    pub said: Vec<String>,
}

/// The interval that forgets a policy.
const FORGET: &str = "none";

/// Stores a policy, or forgets it. With `dry_run` it only says what that would change.
pub fn set(table: &Table, wanted: Wanted, dry_run: bool) -> Result<Change> {
    let before = find(table.oid)?;
    if wanted.interval == Some(FORGET) {
        return forget(table, before, dry_run);
    }
    layout::require_root(table)?;
    let policy = wanted.policy(table, before.as_ref())?;
    let said = match &before {
        None => vec![format!("new policy of {}: {policy}", table.qualified())],
        Some(before) => policy.differences(before),
    };
    if !dry_run {
        policy.store()?;
    }
    Ok(Change { policy: Some(policy), said })
}

impl Wanted<'_> {
    /// The policy that results: what was not passed stays as it was, or gets its default.
    fn policy(&self, table: &Table, before: Option<&Policy>) -> Result<Policy> {
        let time_column = match (self.time_column, before) {
            (Some(column), _) => column.to_string(),
            (None, _) if table.kind == "p" => layout::partition_key(table)?,
            (None, Some(before)) => before.time_column.clone(),
            (None, None) => spend_log::TIME.into(),
        };
        Layout::of(table.oid, &time_column)?;
        let interval = self.interval.or(before.map(|before| before.interval.name())).unwrap_or("day");
        let precreate = self.precreate.or(before.map(|before| before.precreate as i32));
        let (interval, precreate) = parse(interval, precreate.unwrap_or(PRECREATE))?;
        let on_expire = match (self.on_expire, before) {
            (None, None) | (Some("drop"), _) => OnExpire::Drop,
            (Some("detach"), _) => OnExpire::Detach,
            (Some(other), _) => return Err(Error::OnExpire(other.into())),
            (None, Some(before)) => before.on_expire,
        };
        let retention = match self.retention {
            Some(given) => text_of(given)?,
            None => before.and_then(|before| before.retention.clone()),
        };
        if let Some(retention) = &retention {
            check_retention(interval.name(), retention)?;
        }
        let (schema, name) = (table.schema.clone(), table.name.clone());
        let (relation, owner) = (table.oid, Owner::role(table.owner_oid));
        Ok(Policy {
            relation,
            owner,
            schema,
            table: name,
            time_column,
            interval,
            precreate,
            retention,
            on_expire,
        })
    }
}

impl OnExpire {
    pub fn name(self) -> &'static str {
        match self {
            OnExpire::Drop => "drop",
            OnExpire::Detach => "detach",
        }
    }
}

/// In the words of the record of what expired.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (interval, ahead, on_expire) = (self.interval.name(), self.precreate, self.on_expire.name());
        write!(f, "{interval}, {ahead} ahead, retention {}, {on_expire}", self.retention_in_words())
    }
}

impl Policy {
    fn retention_in_words(&self) -> &str {
        self.retention.as_deref().unwrap_or("none")
    }

    /// The statement that sets the same policy again.
    fn statement(&self) -> String {
        format!(
            "SELECT spend_partition_set({}, \"interval\" => '{}', precreate => {}, retention => {}, on_expire => '{}', \
             time_column => {});",
            literal(&qualified(&self.schema, &self.table)),
            self.interval.name(),
            self.precreate,
            literal(self.retention.as_deref().unwrap_or("0")),
            self.on_expire.name(),
            literal(&self.time_column),
        )
    }

    fn differences(&self, before: &Policy) -> Vec<String> {
        let settings = |policy: &Policy| {
            [
                ("interval", policy.interval.name().to_string()),
                ("precreate", policy.precreate.to_string()),
                ("retention", policy.retention_in_words().to_string()),
                ("on_expire", policy.on_expire.name().to_string()),
                ("time_column", quoted(&policy.time_column)),
            ]
        };
        let table = qualified(&self.schema, &self.table);
        let pairs = settings(before).into_iter().zip(settings(self));
        let said: Vec<String> = pairs
            .filter(|(old, new)| old != new)
            .map(|((setting, old), (_, new))| format!("{setting} of {table}: {old} before, {new} now"))
            .collect();
        match said.is_empty() {
            true => vec![format!("the policy of {table} stays as it is: {self}")],
            false => said,
        }
    }

    fn store(&self) -> Result<()> {
        spi::run(
            &format!(
                "INSERT INTO litellm_spend.policy (relation, owner, time_column, \"interval\", precreate,
                     retention, on_expire,
                                              origin)
                 VALUES ($1, $2, $3::name, $4, $5, $6::interval, $7, {HERE})
                 ON CONFLICT (relation) DO UPDATE
                     SET owner = excluded.owner, time_column = excluded.time_column,
                     \"interval\" = excluded.\"interval\", precreate = excluded.precreate, retention = excluded.retention,
                     on_expire = excluded.on_expire, maintained_at = NULL, retry_at = NULL,
                     last_error = NULL, last_error_at = NULL, blocked = NULL, blocked_since = NULL"
            ),
            &self.values(),
        )
    }
}

/// The default: how many periods are kept ready beyond the current one.
pub const PRECREATE: i32 = 7;

/// More periods than that are taken for a mistake.
const MOST_AHEAD: i32 = 366;

/// How a table is to be partitioned, as a user says it.
pub fn parse(interval: &str, precreate: i32) -> Result<(Interval, u32)> {
    let interval = Interval::parse(interval).ok_or_else(|| Error::Interval(interval.into()))?;
    if !(0..=MOST_AHEAD).contains(&precreate) {
        return Err(Error::Precreate { given: precreate, most: MOST_AHEAD });
    }
    Ok((interval, precreate.unsigned_abs()))
}

/// A retention as SQL writes it; `None`: rows stay.
fn text_of(retention: datum::Interval) -> Result<Option<String>> {
    let sql = "SELECT CASE WHEN $1 <> interval '0' THEN $1::text END";
    Ok(spi::query(sql, &[retention.into()], |r| Ok(r.get::<String>(1)?)).one()?.flatten())
}

/// A partition goes as a whole, so rows must be allowed to stay for one period at least.
fn check_retention(interval: &str, retention: &str) -> Result<()> {
    // A number alone means seconds: '90' is a minute and a half, where days were meant. '1 month -29 days' is
    // as long as a day, by a month of 30 days, and before March the cutoff would be in the future.
    let sql = "SELECT isfinite(r) AND r >= ('1 ' || $2)::interval AND r <= interval '1000 years'
                   AND least(extract(year FROM r), extract(month FROM r), extract(day FROM r),
                             extract(hour FROM r), extract(minute FROM r), extract(second FROM r)) >= 0,
                   CASE WHEN s BETWEEN 1 AND 3650 AND s % 3600 <> 0 THEN s::bigint END
               FROM (SELECT $1::interval) AS given(r), extract(epoch FROM r) AS s";
    let answer = spi::query(sql, &[retention.into(), interval.into()], |r| {
        Ok((spi::value::<bool>(r, 1)?, r.get::<i64>(2)?))
    })
    .one()?;
    match answer {
        Some((false, seconds)) => {
            let (given, interval) = (retention.into(), interval.into());
            Err(Error::Retention { given, interval, seconds })
        }
        _ => Ok(()),
    }
}

/// Forgetting what is not there is no error.
fn forget(table: &Table, before: Option<Policy>, dry_run: bool) -> Result<Change> {
    let said = match before {
        Some(before) => format!("the policy of {} is forgotten: {before}", table.qualified()),
        None => format!("{} has no policy", table.qualified()),
    };
    if !dry_run {
        let sql = "DELETE FROM litellm_spend.policy WHERE relation = $1";
        spi::run(sql, &[table.oid.into()])?;
    }
    Ok(Change { policy: None, said: vec![said] })
}

/// Keeps what stopped a round.
pub fn record_error(relation: pg_sys::Oid, message: Option<&str>) -> Result<()> {
    spi::run(
        "UPDATE litellm_spend.policy SET last_error = $2,
                 last_error_at = CASE WHEN $2 IS NOT NULL THEN clock_timestamp() END
             WHERE relation = $1 AND last_error IS DISTINCT FROM $2",
        &[relation.into(), message.map(str::to_string).into()],
    )
}

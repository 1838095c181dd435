//! Tables on their way to being partitioned, or back: what was asked for, and what stopped it. How far a
//! conversion is, is mostly read from the catalogs; a reversion notes it here.
//!
//! Whoever does a step holds the row: one at a time, worker or call. What was asked for holds for the table
//! that it was asked for, while that belongs to the same owner.

use crate::error::{Error, Result};
use crate::server::locks::Patience;
use crate::server::relation::Table;
use crate::server::session::Owner;
use crate::server::spi::{self, Found, value};
use crate::server::text::qualified;
use crate::state::restore::HERE;
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// What was asked for, of one direction.
pub trait Options: Serialize + DeserializeOwned {
    const DIRECTION: &'static str;
}

pub struct Pending<T> {
    pub schema: String,
    pub table: String,
    /// The table that it began with, and its owner.
    pub relation: pg_sys::Oid,
    pub owner: Owner,
    pub options: T,
    /// It waits for a new call.
    pub stopped: bool,
    pub last_error: Option<String>,
}

impl<T: Options> Pending<T> {
    pub fn new(table: &Table, options: T) -> Self {
        let (schema, name) = (table.schema.clone(), table.name.clone());
        let owner = Owner::role(table.owner_oid);
        Pending { schema, table: name, relation: table.oid, owner, options, stopped: false, last_error: None }
    }

    pub fn name(&self) -> String {
        qualified(&self.schema, &self.table)
    }

    pub fn all() -> Result<Vec<Self>> {
        spi::query(
            &format!(
                "SELECT table_schema::text, table_name::text, relation::oid, options::text, stopped,
                     last_error, owner::oid
                 FROM litellm_spend.conversion WHERE direction = $1 AND origin = {HERE} ORDER BY 1, 2"
            ),
            &[T::DIRECTION.into()],
            |r| {
                Ok(Pending {
                    schema: value(r, 1)?,
                    table: value(r, 2)?,
                    relation: value(r, 3)?,
                    options: serde_json::from_str(&value::<String>(r, 4)?)?,
                    stopped: value(r, 5)?,
                    last_error: r.get(6)?,
                    owner: Owner::role(value(r, 7)?),
                })
            },
        )
    }

    /// That of a table, whatever it is called by now; or else of its name, which a conversion gives to the
    /// table that it makes.
    pub fn of(table: &Table) -> Result<Option<Self>> {
        let owner = Owner::role(table.owner_oid);
        let begun_with = |p: &Self| p.relation == table.oid;
        let named = |p: &Self| p.schema == table.schema && p.table == table.name;
        let found = Self::all()?.into_iter().filter(|p| p.owner == owner && (begun_with(p) || named(p)));
        Ok(found.max_by_key(begun_with))
    }

    /// The same to be taken back: else that which began with the table, whoever owned it then.
    pub fn begun(table: &Table) -> Result<Option<Self>> {
        match Self::of(table)? {
            None => Ok(Self::all()?.into_iter().find(|p| p.relation == table.oid)),
            found => Ok(found),
        }
    }

    /// What another owner had begun is for the present one to take back.
    pub fn take_over(&mut self, table: &Table) -> Result<()> {
        let owner = Owner::role(table.owner_oid);
        if self.owner == owner {
            return Ok(());
        }
        self.lock_in_call()?;
        self.owner = owner;
        self.request()
    }

    /// The table still belongs to whom it did.
    pub fn require_owner(&self) -> Result<()> {
        let Some(table) = Table::find(self.relation)? else { return Ok(()) };
        if Owner::role(table.owner_oid) == self.owner {
            return Ok(());
        }
        let expected = self.owner.name()?;
        Err(Error::OtherOwner { relation: self.name(), owner: table.owner, expected })
    }

    /// The table still has the name that it began with: all that is made for it is named after that, and the
    /// name could mean another table by now.
    pub fn require_name(&self) -> Result<()> {
        let Some(table) = Table::find(self.relation)? else { return Ok(()) };
        if (&table.schema, &table.name) == (&self.schema, &self.table) {
            return Ok(());
        }
        Err(Error::Renamed { was: self.name(), now: table.qualified() })
    }

    fn key(&self) -> [DatumWithOid<'_>; 2] {
        [self.schema.as_str().into(), self.table.as_str().into()]
    }

    /// Stores what was asked for. One that is on its way gets the new options. Refused while another table is
    /// that had the name: nobody would know any more of what was made for it.
    pub fn request(&self) -> Result<()> {
        let [schema, table] = self.key();
        let other = spi::fresh(
            &format!(
                "SELECT relation::text FROM litellm_spend.conversion
                 JOIN pg_catalog.pg_class c ON c.oid = relation
                 WHERE table_schema = $1::name AND table_name = $2::name AND relation <> $3 AND origin = {HERE}"
            ),
            &[schema, table, self.relation.into()],
            |r| value::<String>(r, 1),
        ).one()?;
        if let Some(now) = other {
            return Err(Error::Renamed { was: self.name(), now });
        }
        let [schema, table] = self.key();
        spi::run(
            &format!(
                "INSERT INTO litellm_spend.conversion (table_schema, table_name, direction, relation, owner,
                     options, origin)
                 VALUES ($1::name, $2::name, $3, $4, $6, $5::jsonb, {HERE})
                 ON CONFLICT (table_schema, table_name) DO UPDATE SET direction = excluded.direction,
                     relation = excluded.relation, owner = excluded.owner, options = excluded.options,
                     origin = excluded.origin, stopped = false, last_error = NULL, last_error_at = NULL,
                     retry_at = NULL"
            ),
            &[
                schema,
                table,
                T::DIRECTION.into(),
                self.relation.into(),
                serde_json::to_string(&self.options)?.into(),
                self.owner.oid().into(),
            ],
        )
    }

    /// Takes the row until the transaction ends, and reads what it says now. `false`: somebody else has it,
    /// or it is gone, or is by now of another table or owner.
    pub fn lock(&mut self, patience: Patience) -> Result<bool> {
        let sql = "SELECT options::text FROM litellm_spend.conversion
             WHERE table_schema = $1::name AND table_name = $2::name AND direction = $3
                 AND relation = $4 AND owner = $5
                 FOR UPDATE SKIP LOCKED";
        loop {
            let [schema, table] = self.key();
            let args = [schema, table, T::DIRECTION.into(), self.relation.into(), self.owner.oid().into()];
            let found = spi::fresh(sql, &args, |r| value::<String>(r, 1))?;
            if let Some(options) = found.first() {
                self.options = serde_json::from_str(options)?;
                return Ok(true);
            }
            if !patience.try_again() {
                return Ok(false);
            }
        }
    }

    /// As a SQL call does: it waits a while, and then says that it was in vain.
    pub fn lock_in_call(&mut self) -> Result<()> {
        if self.lock(Patience::of_call())? { Ok(()) } else { Err(Error::ConversionBusy(self.name())) }
    }

    pub fn store(&self) -> Result<()> {
        let [schema, table] = self.key();
        let sql = "UPDATE litellm_spend.conversion SET options = $3::jsonb WHERE table_schema = $1::name
                 AND table_name = $2::name";
        spi::run(sql, &[schema, table, serde_json::to_string(&self.options)?.into()])
    }

    /// Lets it wait for a new call.
    pub fn halt(&self, reason: &str) -> Result<()> {
        let [schema, table] = self.key();
        let sql = "UPDATE litellm_spend.conversion
                 SET stopped = true, last_error = $3, last_error_at = clock_timestamp(), retry_at = NULL
             WHERE table_schema = $1::name AND table_name = $2::name";
        spi::run(sql, &[schema, table, reason.into()])
    }

    pub fn forget(&self) -> Result<()> {
        let sql =
            "DELETE FROM litellm_spend.conversion WHERE table_schema = $1::name AND table_name = $2::name";
        spi::run(sql, &self.key())
    }
}

/// Whether any table is on its way: hardly ever.
pub fn any() -> Result<bool> {
    spi::query("SELECT FROM litellm_spend.conversion LIMIT 1", &[], |_| Ok(())).any()
}

/// Whether the table is on its way, and nothing keeps it from arriving. Whatever it is called by now: another
/// may have its name. What a former owner asked for goes no further.
pub fn is_under_way(relation: pg_sys::Oid) -> Result<bool> {
    let sql = "SELECT FROM litellm_spend.conversion v JOIN pg_catalog.pg_class c ON c.oid = v.relation
             AND c.relowner = v.owner
         WHERE v.relation = $1 AND NOT v.stopped";
    spi::query(sql, &[relation.into()], |_| Ok(())).any()
}

/// Notes why the step at hand was not done, and how soon it is tried again; or that it was done.
pub fn record_error(schema: &str, table: &str, message: Option<&str>, again: Option<Duration>) -> Result<()> {
    spi::run(
        "UPDATE litellm_spend.conversion
             SET last_error = $3, retry_at = clock_timestamp() + make_interval(secs => $4),
                 last_error_at = CASE WHEN $3 IS NULL THEN NULL WHEN last_error = $3 THEN last_error_at
                                      ELSE clock_timestamp() END
             WHERE table_schema = $1::name AND table_name = $2::name AND NOT stopped
               AND (last_error IS DISTINCT FROM $3 OR $4 IS NOT NULL)",
        &[
            schema.into(),
            table.into(),
            message.map(str::to_string).into(),
            again.map(|again| again.as_secs_f64()).into(),
        ],
    )
}

/// How far it is: step, state, detail. The steps before `next` are done.
pub type Progress = Vec<(String, String, String)>;

pub fn progress(steps: &[&str], next: usize, stopped: bool, detail: String) -> Progress {
    use std::cmp::Ordering::*;
    let row = |(i, step): (usize, &&str)| {
        let (state, detail) = match i.cmp(&next) {
            Less => ("done", String::new()),
            Equal => (if stopped { "stopped" } else { "next" }, detail.clone()),
            Greater => ("to do", String::new()),
        };
        (step.to_string(), state.to_string(), detail)
    };
    steps.iter().enumerate().map(row).collect()
}

/// Whether a worker is there to go on with it.
pub fn has_worker() -> Result<bool> {
    let sql = "SELECT FROM pg_catalog.pg_stat_activity
               WHERE backend_type = 'litellm_spend worker' AND datname = pg_catalog.current_database()";
    spi::query(sql, &[], |_| Ok(())).any()
}

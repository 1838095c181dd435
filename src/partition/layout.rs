//! A table as its maintenance sees it: how it is partitioned, by what, and what each partition holds. Reads
//! only.

use crate::citus;
use crate::error::{Error, Result};
use crate::guc;
use crate::partition::calendar::{Interval, Moment, Range};
use crate::server::locks;
use crate::server::relation::{self, Table};
use crate::server::session::Owner;
use crate::server::spi::{self, Found};
use crate::server::text::{qualified, quoted};
use crate::state::definition::TIME_TYPES;
use pgrx::datum::Timestamp;
use pgrx::prelude::*;

pub struct Layout {
    pub table: Table,
    /// As whom everything is done to the table and its partitions.
    pub owner: Owner,
    /// The column that its rows are partitioned by, or are to be.
    pub time_column: String,
    pub partitioned: bool,
    /// In order of their ranges.
    pub partitions: Vec<Partition>,
    pub default: Option<Partition>,
}

#[derive(Clone, Debug)]
pub struct Partition {
    pub oid: pg_sys::Oid,
    pub schema: String,
    pub name: String,
    /// Of DEFAULT: everything.
    pub range: Range,
    /// An ordinary table, neither partitioned itself nor foreign.
    pub leaf: bool,
    /// A DETACH … CONCURRENTLY of it was interrupted: it has its range still, but the table shows none of its
    /// rows.
    pub pending: bool,
    pub owner: Owner,
}

impl Partition {
    pub fn qualified(&self) -> String {
        qualified(&self.schema, &self.name)
    }
}

impl Layout {
    pub fn of(oid: pg_sys::Oid, time_column: &str) -> Result<Layout> {
        let table = relation::open(oid)?;
        let mut layout = Layout {
            partitioned: table.kind == "p",
            owner: Owner::role(table.owner_oid),
            table,
            time_column: time_column.into(),
            partitions: vec![],
            default: None,
        };
        require_here(oid)?;
        check_time_column(&layout.table, time_column)?;
        if layout.partitioned {
            let key = partition_key(&layout.table)?;
            if key != time_column {
                let reason = format!("It is partitioned by \"{key}\", not by \"{time_column}\".");
                return Err(Error::NotByTime { relation: layout.table.name, reason });
            }
            layout.read_partitions()?;
        }
        Ok(layout)
    }

    /// Locks the table as a reader does. Before its partitions are touched by name, whose statements look up
    /// the table's partitioning on their way: who changes that locks the table first, and would wait for us
    /// as we for them.
    pub fn lock(&self) -> Result<()> {
        locks::lock_all(guc::lock_timeout(), &[(self.table.oid, pg_sys::AccessShareLock)])
    }

    /// The table while it is `owner`'s. Everything is done as the owner, with the code of whoever had the
    /// table before: of a new one, who may be a superuser, nobody has asked for that.
    pub fn of_owner(owner: Owner, oid: pg_sys::Oid, time_column: &str) -> Result<Layout> {
        let layout = Layout::of(oid, time_column)?;
        if layout.owner == owner {
            return Ok(layout);
        }
        let (relation, expected) = (layout.table.qualified(), owner.name()?);
        Err(Error::OtherOwner { relation, owner: layout.table.owner, expected })
    }

    /// The same table as it is now: for who has locked it.
    pub fn again(&self) -> Result<Layout> {
        Layout::of_owner(self.owner, self.table.oid, &self.time_column)
    }

    fn read_partitions(&mut self) -> Result<()> {
        // Bounds are in UTC, whatever the key's type: our TimeZone is.
        let sql = format!(
            "SELECT c.oid, n.nspname::text, c.relname::text, c.relkind = 'r', p.bound = 'DEFAULT', {}, {},
                 c.relowner, i.inhdetachpending
             FROM pg_catalog.pg_inherits i
             JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             CROSS JOIN LATERAL (SELECT pg_catalog.pg_get_expr(c.relpartbound, c.oid) AS bound) AS p
             LEFT JOIN LATERAL pg_catalog.regexp_match(p.bound,
                 '^FOR VALUES FROM \\((.*)\\) TO \\((.*)\\)$') AS b ON true
             WHERE i.inhparent = $1",
            bound_micros("b[1]"),
            bound_micros("b[2]")
        );
        let found = spi::fresh(&sql, &[self.table.oid.into()], |r| {
            let range = match spi::value::<bool>(r, 5)? {
                true => Range::EVERYTHING,
                false => Range { from: Moment(spi::value(r, 6)?), to: Moment(spi::value(r, 7)?) },
            };
            let partition = Partition {
                oid: spi::value(r, 1)?,
                schema: spi::value(r, 2)?,
                name: spi::value(r, 3)?,
                range,
                leaf: spi::value(r, 4)?,
                pending: spi::value(r, 9)?,
                owner: Owner::role(spi::value(r, 8)?),
            };
            Ok((spi::value::<bool>(r, 5)?, partition))
        })?;
        for (is_default, partition) in found {
            if is_default && !partition.pending {
                self.default = Some(partition);
            } else {
                self.partitions.push(partition);
            }
        }
        self.partitions.sort_by_key(|p| p.range);
        Ok(())
    }

    /// A partition that we may work on: an ordinary table, and of the table's own owner. With another's
    /// rights the table owner's code would run (CHECKs, triggers and generated columns are common to all
    /// partitions), with the table owner's it cannot be done.
    pub fn require_usable(&self, partition: &Partition) -> Result<()> {
        if !partition.leaf {
            return Err(Error::NotOrdinary(partition.name.clone()));
        }
        if partition.owner != self.owner {
            return Err(Error::OtherOwner {
                relation: partition.qualified(),
                owner: partition.owner.name()?,
                expected: self.table.owner.clone(),
            });
        }
        Ok(())
    }

    pub fn ranges(&self) -> Vec<Range> {
        self.partitions.iter().map(|p| p.range).collect()
    }

    pub fn find(&self, oid: pg_sys::Oid) -> Option<&Partition> {
        self.partitions.iter().chain(&self.default).find(|p| p.oid == oid)
    }

    /// How many periods from the one after `now` on have a partition, without a gap: as the status counts
    /// them.
    pub fn periods_ahead(&self, interval: Interval, now: Moment) -> Result<i64> {
        let ranges = self.partitions.iter().filter(|p| !p.pending).map(|p| p.range);
        let (from, to): (Vec<_>, Vec<_>) = ranges.map(|r| (timestamp(r.from), timestamp(r.to))).unzip();
        let sql = "SELECT coalesce(litellm_spend.periods_ahead($1, (
                 SELECT range_agg(tsrange(r.from, r.to)) FROM unnest($2::timestamp[], $3::timestamp[]) AS r(\"from\", \"to\")
             ), $4), 0)";
        let args = [interval.name().into(), from.into(), to.into(), timestamp(now).into()];
        let counted = spi::query(sql, &args, |r| spi::value::<i64>(r, 1)).one()?;
        Ok(counted.unwrap_or_default())
    }

    /// A name in the table's schema that nothing has.
    pub fn free_name(&self, name: &str) -> Result<String> {
        relation::free_name([&self.table.schema, &self.table.schema], name)
    }

    /// The column, quoted.
    pub fn time(&self) -> String {
        quoted(&self.time_column)
    }
}

/// A bound as microseconds since 1970. A bound of `infinity` is as good as none; a date that is beyond every
/// timestamp is the last moment, as `micros` has it.
fn bound_micros(bound: &str) -> String {
    let literal = format!("pg_catalog.btrim({bound}, '''')");
    format!(
        "CASE WHEN {bound} IN ('MINVALUE', '''-infinity''') THEN '{}'::bigint
              WHEN {bound} IN ('MAXVALUE', '''infinity''') THEN '{}'::bigint
              WHEN {literal}::date > '294276-12-31' THEN '{}'::bigint ELSE {} END",
        i64::MIN,
        i64::MAX,
        i64::MAX - 1,
        micros(&format!("{literal}::timestamp"))
    )
}

/// Microseconds from 1970, where ours begin, to 2000, where the server's do.
const TO_2000: i64 = 946_684_800_000_000;

pub fn moment(at: Timestamp) -> Moment {
    match at {
        at if at.is_neg_infinity() => Moment::MIN,
        at if at.is_infinity() => Moment::MAX,
        at => Moment(at.into_inner().saturating_add(TO_2000)),
    }
}

/// `None`: unbounded.
pub fn timestamp(at: Moment) -> Option<Timestamp> {
    let bounded = at != Moment::MIN && at != Moment::MAX;
    bounded.then(|| Timestamp::saturating_from_raw(at.0.saturating_sub(TO_2000)))
}

/// The server's clock.
pub fn now() -> Moment {
    // SAFETY: asks the operating system.
    Moment(unsafe { pg_sys::GetCurrentTimestamp() }.saturating_add(TO_2000))
}

/// A finite time as microseconds since 1970, one without a time zone in UTC; beyond those the last that there
/// is. NULL has none. (A date is not cast: it can be beyond every timestamp.)
pub fn micros(expression: &str) -> String {
    let micros = format!("extract(epoch FROM {expression}) * 1000000");
    // least() of NULL and a number is the number.
    format!("(CASE WHEN {expression} IS NOT NULL THEN least({micros}, 9223372036854775806) END)::bigint")
}

/// How many microseconds are between two times that the column can hold, as its type says.
pub fn unit(relation: pg_sys::Oid, time_column: &str) -> Result<i64> {
    let sql = "SELECT CASE WHEN atttypid = 'date'::regtype THEN 86400000000
                           WHEN atttypmod >= 0 THEN (10 ^ (6 - atttypmod))::bigint ELSE 1 END
               FROM pg_catalog.pg_attribute WHERE attrelid = $1 AND attname = $2::name";
    let unit = spi::query(sql, &[relation.into(), time_column.into()], |r| spi::value::<i64>(r, 1)).one()?;
    Ok(unit.unwrap_or(1))
}

/// Refuses a table that has parts on other nodes.
pub fn require_here(oid: pg_sys::Oid) -> Result<()> {
    if citus::is_distributed(oid)? {
        return Err(Error::ElsewhereToo(relation::relation_name(oid)?));
    }
    Ok(())
}

fn check_time_column(table: &Table, column: &str) -> Result<()> {
    let relation = table.name.clone();
    let is_time = |r#type: &str| TIME_TYPES.contains(&r#type);
    let times = || {
        let times = table.columns.iter().filter(|(_, r#type)| is_time(r#type));
        times.map(|(name, _)| name.clone()).collect()
    };
    match table.type_of(column) {
        None => Err(Error::NoPartitionColumn { relation, column: column.into(), times: times() }),
        Some(found) if !is_time(found) => {
            let (column, found) = (column.into(), found.into());
            Err(Error::PartitionColumnType { relation, column, found, times: times() })
        }
        Some(_) => Ok(()),
    }
}

/// The one column by whose ranges the table is partitioned.
pub fn partition_key(table: &Table) -> Result<String> {
    let key = spi::query(
        "SELECT pg_catalog.pg_get_partkeydef(p.partrelid), a.attname::text
         FROM pg_catalog.pg_partitioned_table p
         LEFT JOIN pg_catalog.pg_attribute a ON p.partstrat = 'r' AND p.partnatts = 1
             AND a.attrelid = p.partrelid AND a.attnum = p.partattrs[0] AND a.attnum > 0
         WHERE p.partrelid = $1",
        &[table.oid.into()],
        |r| Ok((spi::value::<String>(r, 1)?, r.get::<String>(2)?)),
    )
    .one()?;
    match key {
        Some((_, Some(column))) => Ok(column),
        Some((key, None)) => Err(Error::NotByTime {
            relation: table.name.clone(),
            reason: format!("It is partitioned by {key}."),
        }),
        None => Err(Error::NoTable(table.qualified())),
    }
}

/// Refuses a table that is a partition itself.
pub fn require_root(table: &Table) -> Result<()> {
    match relation::parent(table.oid)? {
        None => Ok(()),
        Some(parent) => {
            Err(Error::IsAPart { relation: table.qualified(), whole: relation::relation_name(parent)? })
        }
    }
}

//! Where in time the rows of a table lie. Every question is answered from an index on the time column, so
//! that it may be asked while the table is locked; a table without one is read only if it is small.

use crate::error::{Error, Result};
use crate::guc;
use crate::partition::calendar::{Moment, Range};
use crate::partition::layout::micros;
use crate::server::cost;
use crate::server::relation;
use crate::server::session::Owner;
use crate::server::spi::{self, Found};
use crate::server::text::quoted;
use pgrx::prelude::*;

/// 29 MB were read in 3 to 5 ms when cached (PostgreSQL 15, two shared cores, one run, 2026-11); from disk it
/// takes longer.
const SMALL: i64 = 32 << 20;

pub struct Times {
    owner: Owner,
    relation: String,
    time: String,
}

impl Times {
    /// The questions are asked as `owner`, whose code the planner may call.
    pub fn of(owner: Owner, relation: pg_sys::Oid, time_column: &str) -> Result<Times> {
        let times = Times::of_any(owner, relation, time_column)?;
        if !is_indexed(relation, time_column)? && size(relation)? > SMALL {
            return Err(Error::NoTimeIndex { relation: times.relation, column: time_column.into() });
        }
        Ok(times)
    }

    /// For who may have to read all of the table.
    pub fn of_any(owner: Owner, relation: pg_sys::Oid, time_column: &str) -> Result<Times> {
        Ok(Times { owner, relation: relation::relation_name(relation)?, time: quoted(time_column) })
    }

    /// The rows of a range, as a condition. Neither infinity is in any.
    pub fn condition(&self, range: Range) -> String {
        condition(&self.time, range)
    }

    /// The first and last row of a range.
    pub fn ends(&self, range: Range) -> Result<Option<(Moment, Moment)>> {
        self.ends_where(&self.condition(range))
    }

    fn ends_where(&self, condition: &str) -> Result<Option<(Moment, Moment)>> {
        let time = &self.time;
        let [first, last] = ["min", "max"].map(|end| micros(&format!("{end}({time})")));
        let sql = format!("SELECT {first}, {last} FROM ONLY {} WHERE {condition}", self.relation);
        let end = self.ask(&sql, |r| Ok(r.get::<i64>(1)?.zip(r.get::<i64>(2)?))).one()?;
        Ok(end.flatten().map(|(first, last)| (Moment(first), Moment(last))))
    }

    /// How many rows meet a condition, counted up to `limit`.
    pub fn count(&self, condition: &str, limit: i64) -> Result<i64> {
        let sql = format!(
            "SELECT count(*) FROM (SELECT FROM ONLY {} WHERE {condition} LIMIT {limit}) AS counted",
            self.relation
        );
        Ok(self.ask(&sql, |r| spi::value::<i64>(r, 1)).one()?.unwrap_or(0))
    }

    /// How many rows meet a condition, as the planner estimates it.
    pub fn estimate(&self, condition: &str) -> Result<i64> {
        cost::estimated_rows(self.owner, &format!("FROM ONLY {} WHERE {condition}", self.relation))
    }

    /// The time that follows those of the first `rows` rows of a range; `None` when there are no more.
    pub fn after(&self, range: Range, rows: i64) -> Result<Option<Moment>> {
        let (relation, time, condition) = (&self.relation, &self.time, self.condition(range));
        let ordered = format!("FROM ONLY {relation} WHERE {condition} ORDER BY {time}");
        let at = |offset: i64| {
            let sql = format!("SELECT {} {ordered} OFFSET {offset} LIMIT 1", micros(time));
            Ok::<_, Error>(self.ask(&sql, |r| spi::value::<i64>(r, 1)).one()?.map(Moment))
        };
        let (Some(first), Some(next)) = (at(0)?, at(rows)?) else { return Ok(None) };
        // Rows of one time stay together: at least those of the first.
        if next > first {
            return Ok(Some(next));
        }
        // (Of dates, a microsecond later is the same.)
        Ok(self.ends_where(&format!("{condition} AND {time} > {first}"))?.map(|(next, _)| next))
    }

    /// Refuses a range of which more rows than may move at once have its first time: rows of one time stay
    /// together, and a batch ends at the next.
    pub fn require_few(&self, range: Range, batch: i64) -> Result<()> {
        let most = batch.max(guc::drain_rows());
        let to = self.after(range, batch)?.unwrap_or(range.to);
        if self.count(&self.condition(Range { to, ..range }), most + 1)? <= most {
            return Ok(());
        }
        let at = self.ends(range)?.map_or(range.from, |(first, _)| first).to_string();
        Err(Error::TooManyAtOnce { relation: self.relation.clone(), at, most })
    }

    /// On a fresh snapshot, and from the index: the planner may think otherwise of a table that was never
    /// analyzed.
    fn ask<T>(&self, sql: &str, row: impl Fn(&pgrx::spi::SpiHeapTupleData) -> Result<T>) -> Result<Vec<T>> {
        let _owner = self.owner.act().with(c"enable_seqscan", c"off");
        spi::fresh(sql, &[], row)
    }
}

/// The rows of a range by a quoted column, as a condition. Neither infinity is in any.
pub fn condition(time: &str, range: Range) -> String {
    let from = match range.from {
        Moment::MIN => format!("{time} > '-infinity'"),
        from => format!("{time} >= {from}"),
    };
    match range.to {
        Moment::MAX => format!("{from} AND {time} < 'infinity'"),
        to => format!("{from} AND {time} < {to}"),
    }
}

/// A B-tree over all rows begins with the column.
pub fn is_indexed(relation: pg_sys::Oid, column: &str) -> Result<bool> {
    are_indexed(relation, &[column.into()])
}

/// A B-tree over all rows begins with the columns, in whatever order.
pub fn are_indexed(relation: pg_sys::Oid, columns: &[String]) -> Result<bool> {
    let sql = "SELECT FROM pg_catalog.pg_index i
         JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid JOIN pg_catalog.pg_am m ON m.oid = c.relam
         WHERE i.indrelid = $1 AND i.indisvalid AND i.indpred IS NULL AND m.amname = 'btree'
             AND i.indnkeyatts >= cardinality($2) AND ARRAY(
                 SELECT a.attname::text FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, n)
                 JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
                 WHERE k.n <= cardinality($2)) @> $2";
    spi::query(sql, &[relation.into(), columns.to_vec().into()], |_| Ok(())).any()
}

pub fn size(relation: pg_sys::Oid) -> Result<i64> {
    let sql = "SELECT coalesce(pg_catalog.pg_relation_size($1), 0)";
    Ok(spi::query(sql, &[relation.into()], |r| spi::value::<i64>(r, 1)).one()?.unwrap_or(0))
}

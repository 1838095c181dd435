//! From which day to which there are raw rows.
//!
//! A partition is asked at a time, from that end on, until one has rows. A query of the whole table takes a
//! lock on each partition and on each of its indexes: where there are many, the server has no room for more,
//! and statements of others fail.
//!
//! The bounds of partitions only divide the time that is asked about. Whatever has become of them meanwhile,
//! each row lies in one part of it.

use crate::error::Result;
use crate::litellm::spend_log::TIME;
use crate::server::relation;
use crate::server::session::Owner;
use crate::server::spi::{self, Found};
use crate::server::text::{literal, quoted};
use crate::state::captured::CaptureState;
use pgrx::datum::Timestamp;
use pgrx::prelude::*;

/// The first day that has raw rows.
pub fn first_day(capture: &CaptureState) -> Result<Option<Timestamp>> {
    first_day_of(capture, "IS NOT NULL")
}

/// The same without that of `-infinity`, to which no retention ever comes.
pub fn first_finite_day(capture: &CaptureState) -> Result<Option<Timestamp>> {
    first_day_of(capture, "> '-infinity'")
}

fn first_day_of(capture: &CaptureState, which: &str) -> Result<Option<Timestamp>> {
    let mut days = vec![];
    for relation in capture.relations() {
        days.extend(Log::of(capture, relation)?.first(which)?);
    }
    Ok(days.into_iter().min())
}

/// The first and the last day that has raw rows before `end`.
pub fn days_before(capture: &CaptureState, end: Timestamp) -> Result<Option<(Timestamp, Timestamp)>> {
    let (mut first, mut last) = (vec![], vec![]);
    for relation in capture.relations() {
        let log = Log::of(capture, relation)?;
        if let Some(day) = log.last(end)? {
            last.push(day);
            first.extend(log.first(&format!("< {}", literal(&end.to_string())))?);
        }
    }
    Ok(first.into_iter().min().zip(last.into_iter().max()))
}

/// A table of raw rows.
struct Log {
    name: String,
    owner: Owner,
    /// In order. The first has no beginning, the last no end.
    parts: Vec<Part>,
}

/// A part of time.
struct Part {
    /// The partition that holds it, as a rule; beside it there may be DEFAULT.
    partition: Option<pg_sys::Oid>,
    from: Option<Timestamp>,
    to: Option<Timestamp>,
}

impl Log {
    /// Locks the table, which no partition of it can be dropped then.
    fn of(capture: &CaptureState, relation: pg_sys::Oid) -> Result<Log> {
        relation::lock_alone_for_reading(relation);
        let partitions = relation::ends_of_partitions(relation, TIME)?;
        if partitions.is_empty() {
            relation::lock_for_reading(&[relation])?;
        }
        let (mut parts, mut from) = (vec![], None);
        for (partition, to) in partitions {
            match to {
                Some(_) => parts.push(Part { partition: Some(partition), from, to }),
                // DEFAULT may hold rows of any time.
                None => relation::lock_for_reading(&[partition])?,
            }
            from = to.or(from);
        }
        parts.push(Part { partition: None, from, to: None });
        Ok(Log { name: relation::relation_name(relation)?, owner: capture.owner()?, parts })
    }

    /// The first day of rows whose time is as `which` says.
    fn first(&self, which: &str) -> Result<Option<Timestamp>> {
        for part in &self.parts {
            if let Some(day) = self.ask("min", part, which)? {
                return Ok(Some(day));
            }
        }
        Ok(None)
    }

    fn last(&self, end: Timestamp) -> Result<Option<Timestamp>> {
        let which = format!("< {}", literal(&end.to_string()));
        let before = |part: &&Part| part.from.is_none_or(|from| from < end);
        for part in self.parts.iter().filter(before).rev() {
            if let Some(day) = self.ask("max", part, &which)? {
                return Ok(Some(day));
            }
        }
        Ok(None)
    }

    /// On a snapshot that is newer than the lock: a partition that was waited for may have been rewritten,
    /// and an older one would find it empty. The bounds stand in the text, so that no other partition is
    /// planned.
    fn ask(&self, aggregate: &str, part: &Part, which: &str) -> Result<Option<Timestamp>> {
        if let Some(partition) = part.partition {
            relation::lock_for_reading(&[partition])?;
        }
        let time = quoted(TIME);
        let from = part.from.map(|from| format!(" AND {time} >= {}", literal(&from.to_string())));
        let to = part.to.map(|to| format!(" AND {time} < {}", literal(&to.to_string())));
        let sql = format!(
            "SELECT date_trunc('day', {aggregate}({time})) FROM {} WHERE {time} {which}{}{}",
            self.name,
            from.unwrap_or_default(),
            to.unwrap_or_default()
        );
        let _owner = self.owner.act();
        Ok(spi::current(&sql, &[], |r| Ok(r.get::<Timestamp>(1)?)).one()?.flatten())
    }
}

//! Which days are frozen: they have lost raw rows, so that the built-in rollups are their only record.
//! Nothing recomputes them.
//!
//! ```text
//!   history            | 10-30 |             | 12-31 of the year 9999 |
//! ---------------------+-------+-------------+------------------------+--> time
//!            source.frozen_before     settled rows of dirty_range with repair 'freeze'
//! ```
//! Days are frozen as a whole: what is left of a day that has lost some of its rows, as when a partition ends
//! at noon and is dropped, cannot be told from the rest in a rollup by day.
//!
//! One border would do if only the oldest rows ever went. But TRUNCATE takes what one partition held, and one
//! row may carry any time. So such a row of dirty_range that is not settled yet only says where rows may be
//! gone; [`crate::litellm::repair`] compares its days and freezes those that lost some. Until then nothing of
//! it is recomputed.

use crate::error::{Error, Result};
use crate::server::spi::{self, Found};
use crate::server::text::next_midnight;
use crate::state::sources::CHANGE_LOG;
use pgrx::datum::Timestamp;

/// The buckets in `[start, end)`; no end means everything that follows, `infinity` included.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    pub start: Timestamp,
    pub end: Option<Timestamp>,
}

/// The parts of a range that are frozen.
pub fn frozen_in(range: Range) -> Result<Vec<Range>> {
    parts(range, "*")
}

/// The parts of a range that are not.
pub fn unfrozen_in(range: Range) -> Result<Vec<Range>> {
    parts(range, "-")
}

fn parts(range: Range, operator: &str) -> Result<Vec<Range>> {
    let sql = format!(
        "SELECT lower(part), upper(part)
         FROM (SELECT coalesce(range_agg(tsrange(first, nullif(last, 'infinity'))), '{{}}') AS days
               FROM (SELECT '-infinity'::timestamp AS first, frozen_before AS last FROM litellm_spend.source
                   WHERE name = $3
                     UNION ALL
                     SELECT range_start, range_end FROM litellm_spend.dirty_range
                     WHERE repair = 'freeze' AND repaired_at IS NOT NULL) AS ranges) AS frozen,
              unnest(tsmultirange(tsrange($1, $2)) {operator} frozen.days) AS part"
    );
    let args = [range.start.into(), range.end.into(), CHANGE_LOG.into()];
    spi::query(&sql, &args, |r| Ok(Range { start: spi::value(r, 1)?, end: r.get(2)? }))
}

/// Refuses a range of which the rollup is the only record.
pub fn error(rollup: &str, frozen: &[Range]) -> Error {
    Error::Frozen { rollup: rollup.into(), days: describe(frozen) }
}

/// As a user reads it.
pub fn describe(ranges: &[Range]) -> String {
    let text = |range: &Range| match range.end {
        Some(end) if range.start.is_neg_infinity() => format!("before {end}"),
        Some(end) => format!("{} to {end}", range.start),
        None => format!("from {} on", range.start),
    };
    ranges.iter().map(text).collect::<Vec<_>>().join(", ")
}

/// Where the days begin that are not all history.
pub fn frozen_before() -> Result<Timestamp> {
    let sql = "SELECT frozen_before FROM litellm_spend.source WHERE name = $1";
    let border = spi::query(sql, &[CHANGE_LOG.into()], |r| spi::value::<Timestamp>(r, 1)).one()?;
    Ok(border.unwrap_or_else(Timestamp::negative_infinity))
}

/// Whether rows of the range may be gone and nobody has looked yet.
pub fn is_pending(range: Range) -> Result<bool> {
    spi::exists(
        "SELECT FROM litellm_spend.dirty_range WHERE repair = 'freeze' AND repaired_at IS NULL
             AND ($2 IS NULL OR range_start < $2) AND (range_end > $1 OR range_end = 'infinity')",
        &[range.start.into(), range.end.into()],
    )
}

/// Notes that rows before `end` are gone without a DELETE.
pub fn note(end: Option<Timestamp>, operation: &str) -> Result<()> {
    spi::run(
        "INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation)
             VALUES ('-infinity', coalesce($1, 'infinity'), 'freeze', $2)",
        &[end.into(), operation.into()],
    )
}

/// Freezes the days of which a part is in `[start, end)`. They may continue a range.
pub fn freeze(start: Timestamp, end: Timestamp, operation: &str) -> Result<()> {
    let (start, end) = (midnight_before(start)?, midnight_from(end)?);
    let continued = spi::execute(
        "UPDATE litellm_spend.dirty_range SET range_start = $1
             WHERE repair = 'freeze' AND repaired_at IS NOT NULL AND range_start = $2",
        &[start.into(), end.into()],
    )?;
    if continued == 0 {
        spi::run(
            "INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation, repaired_at)
                 VALUES ($1, $2, 'freeze', $3, clock_timestamp())",
            &[start.into(), end.into(), operation.into()],
        )?;
    }
    Ok(())
}

/// Forgets what is on record of a range beyond its raw rows: the ledger, and that days of it are frozen. What
/// could not be repaired there will be what the raw rows say.
pub fn thaw(range: Range) -> Result<()> {
    spi::run(
        "UPDATE litellm_spend.dirty_range SET unrepairable = false
             WHERE unrepairable AND range_start >= $1 AND ($2 IS NULL OR range_end <= $2)",
        &[range.start.into(), range.end.into()],
    )?;
    spi::run(
        "DELETE FROM litellm_spend.retired WHERE hour >= $1 AND ($2 IS NULL OR hour < $2)",
        &[range.start.into(), range.end.into()],
    )?;
    // What lies between the range and the border becomes a range of its own.
    spi::run(
        "WITH border AS (
                 UPDATE litellm_spend.source s SET frozen_before = $1
                 FROM (SELECT name, frozen_before AS before FROM litellm_spend.source WHERE name = $3) AS old
                 WHERE s.name = old.name AND old.before > $1 RETURNING old.before
             ), settled AS (
                 DELETE FROM litellm_spend.dirty_range WHERE repair = 'freeze' AND repaired_at IS NOT NULL
                 RETURNING range_start, range_end, operation
             ), ranges AS (
                 SELECT * FROM settled UNION ALL SELECT $1, before, 'FREEZE' FROM border
             )
             INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation, repaired_at)
             SELECT lower(part), coalesce(upper(part), 'infinity'), 'freeze', operation, clock_timestamp()
             FROM ranges, unnest(tsmultirange(tsrange(range_start, nullif(range_end, 'infinity')))
                                 - tsmultirange(tsrange($1, $2))) AS part",
        &[range.start.into(), range.end.into(), CHANGE_LOG.into()],
    )
}

/// Freezes the days of which a part is before `border`: no raw row is older. What only helped to recompute
/// them goes.
pub fn freeze_before(border: Timestamp) -> Result<()> {
    let border = midnight_from(border)?;
    spi::run(
        "UPDATE litellm_spend.source SET frozen_before = greatest(frozen_before, $2) WHERE name = $1",
        &[CHANGE_LOG.into(), border.into()],
    )?;
    spi::run("DELETE FROM litellm_spend.retired WHERE hour < $1", &[border.into()])?;
    spi::run(
        "DELETE FROM litellm_spend.dirty_range
             WHERE repair = 'freeze' AND repaired_at IS NOT NULL AND range_end <= $1
                 AND range_end < 'infinity'",
        &[border.into()],
    )
}

/// The midnight with which the day of a time begins.
fn midnight_before(time: Timestamp) -> Result<Timestamp> {
    midnight("date_trunc('day', $1)", time)
}

/// The first midnight that is not before a time.
fn midnight_from(time: Timestamp) -> Result<Timestamp> {
    let next = next_midnight("$1");
    midnight(&format!("CASE WHEN $1 = date_trunc('day', $1) THEN $1 ELSE {next} END"), time)
}

fn midnight(expression: &str, time: Timestamp) -> Result<Timestamp> {
    let midnights =
        spi::query(&format!("SELECT {expression}"), &[time.into()], |r| spi::value::<Timestamp>(r, 1))?;
    midnights.into_iter().next().ok_or(Error::Null("time"))
}

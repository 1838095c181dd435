//! Computes the built-in rollups of the rows that were there before, newest day first, a day a transaction.

use crate::engine::rebuild::{Shrink, rebuild_some};
use crate::error::{Error, Result};
use crate::litellm::capture::attached;
use crate::litellm::raw;
use crate::litellm::repair;
use crate::litellm::triggers::require_no_foreign_partition;
use crate::server::locks::Patience;
use crate::server::log;
use crate::server::spi::{self, Found};
use crate::server::text::next_midnight;
use crate::state::captured;
use crate::state::fence::Fence;
use crate::state::frozen::{self, Range};
use crate::state::rollups;
use crate::state::sources::CHANGE_LOG;
use pgrx::datum::Timestamp;

/// Covers one more day of the built-in rollups, the newest that is not covered yet: of those that are
/// furthest behind, which as a rule are all. `false`: all is covered, or a fence is taken.
pub fn step(patience: Patience) -> Result<bool> {
    // Before the fences, which take an XID: as a rule all is covered.
    if !rollups::is_uncovered(CHANGE_LOG)? || captured::capture()?.is_none() {
        return Ok(false);
    }
    let Some(fences) = Fence::take_all(CHANGE_LOG, patience)? else { return Ok(false) };
    // A detach may have come first.
    let Some(capture) = captured::capture()? else { return Ok(false) };
    require_no_foreign_partition(capture.relation)?;
    // What may not be recomputed is frozen before anything is.
    if repair::settle_lost(&fences)? {
        return Ok(true);
    }
    let front = fences.iter().map(|f| f.covered_from).filter(|day| !day.is_neg_infinity()).max();
    let Some(front) = front else { return Ok(false) };
    let behind: Vec<&Fence> = fences.iter().filter(|f| f.covered_from == front).collect();
    let days = days_with_rows(&fences, front)?;
    let history_end = frozen::frozen_before()?;
    let next = days.filter(|days| days.last >= history_end);
    let end = if front.is_infinity() { None } else { Some(front) };
    let names: Vec<String> = behind.iter().map(|f| f.name.clone()).collect();
    let covered_from = next.map_or_else(Timestamp::negative_infinity, |days| days.last);
    for part in frozen::unfrozen_in(Range { start: covered_from, end })? {
        if next.is_none() {
            // No row that anybody knows of.
            rollups::know(&names, part)?;
            continue;
        }
        // A day that has lost rows keeps what the rollups say of it, the best record there is; the days after
        // it are computed.
        if !compute(&behind, &fences, part)? {
            let rest = Range { start: day_after(part.start)?, ..part };
            let computed = part.end != Some(rest.start) && compute(&behind, &fences, rest)?;
            note_kept(if computed { Range { end: Some(rest.start), ..part } } else { part })?;
        }
    }
    spi::run(
        "UPDATE litellm_spend.rollup SET covered_from = $2, backfill_first = coalesce(backfill_first, $3),
                 backfill_last = coalesce(backfill_last, $4), backfill_began = coalesce(backfill_began, now())
             WHERE name = ANY ($1)",
        &[
            names.into(),
            covered_from.into(),
            next.map(|days| days.first).into(),
            next.map(|days| days.last).into(),
        ],
    )?;
    if covered_from.is_neg_infinity() {
        log::event("all days are covered: the backfill is complete");
    }
    let more = fences.iter().any(|f| f.covered_from < front && !f.covered_from.is_neg_infinity())
        || !covered_from.is_neg_infinity();
    if !more {
        spi::run(&format!("DELETE FROM litellm_spend.dirty_range WHERE {OF_ALL_DAYS}"), &[])?;
    }
    Ok(more)
}

/// The note that a failure was of nobody knows which days: those that are not computed again keep the totals
/// that they have.
pub const OF_ALL_DAYS: &str = "failure IS NULL AND repair = 'keep'";

/// Notes that a failure may have been of any day, and has everything computed again.
pub fn recompute_all(source: &str) -> Result<()> {
    spi::run(
        "INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation, message, repaired_at)
             VALUES ('-infinity', 'infinity', 'keep', 'a statement', 'its failure could not be noted',
                 clock_timestamp())",
        &[],
    )?;
    uncover_all(source)
}

/// A range that is not computed again has lost rows, or has too many: an UPDATE may have taken one of them to
/// another day, where it counts too. After such a failure that is said.
fn note_kept(range: Range) -> Result<()> {
    spi::run(
        &format!(
            "INSERT INTO litellm_spend.dirty_range
                 (range_start, range_end, repair, operation, message, repaired_at, unrepairable)
             SELECT DISTINCT $1, coalesce($2, 'infinity'::timestamp), 'rebuild', operation, message,
                 clock_timestamp(), true
             FROM litellm_spend.dirty_range WHERE {OF_ALL_DAYS}
                 AND NOT EXISTS (SELECT FROM litellm_spend.dirty_range WHERE unrepairable AND range_start = $1
                     AND range_end = coalesce($2, 'infinity'))"
        ),
        &[range.start.into(), range.end.into()],
    )
}

/// Computes a range, unless raw rows of it are gone.
fn compute(behind: &[&Fence], known: &[Fence], range: Range) -> Result<bool> {
    match rebuild_some(behind, &known.iter().collect::<Vec<_>>(), range, Shrink::Refuse) {
        Err(Error::RawRowsLost { .. }) => Ok(false),
        other => other.map(|_| true),
    }
}

pub fn day_after(day: Timestamp) -> Result<Timestamp> {
    let sql = format!("SELECT {}", next_midnight("$1"));
    let day = spi::query(&sql, &[day.into()], |r| spi::value::<Timestamp>(r, 1)).one()?;
    day.ok_or(Error::Null("day"))
}

#[derive(Clone, Copy)]
pub struct Days {
    first: Timestamp,
    pub last: Timestamp,
}

/// The first and the last day before `end` that has raw, retired, merged or captured rows.
pub fn days_with_rows(fences: &[Fence], end: Timestamp) -> Result<Option<Days>> {
    let merged = fences.iter().map(|fence| fence.watermark).min().unwrap_or_default();
    let tail = format!("(SELECT hour FROM litellm_spend.change_log WHERE seq > {merged}) AS tail");
    let mut parts =
        vec![("\"hour\"".to_string(), "litellm_spend.retired".into()), ("\"hour\"".to_string(), tail)];
    for fence in fences {
        let definition = fence.filled()?;
        let bucket = definition.bucket.as_ref().map(|b| format!("\"{}\"::timestamp", b.dimension));
        parts.extend(bucket.map(|time| (time, definition.table())));
    }
    let ends: Vec<String> = parts
        .iter()
        .map(|(time, relation)| {
            format!("SELECT min({time}) AS first, max({time}) AS last FROM {relation} WHERE {time} < $1")
        })
        .collect();
    let sql = format!(
        "SELECT date_trunc('day', min(first)), date_trunc('day', max(last)) FROM ({}) AS ends",
        ends.join(" UNION ALL ")
    );
    let known = spi::fresh(&sql, &[end.into()], |r| Ok(r.get::<Timestamp>(1)?.zip(r.get::<Timestamp>(2)?)));
    let days = known.one()?.flatten().into_iter().chain(raw::days_before(&attached()?, end)?);
    let days = days.map(|(first, last)| Days { first, last });
    Ok(days.reduce(|a, b| Days { first: a.first.min(b.first), last: a.last.max(b.last) }))
}

/// Everything has to be computed again: capture was interrupted and nobody can say for which rows.
pub fn uncover_all(source: &str) -> Result<()> {
    spi::run(
        "UPDATE litellm_spend.rollup
                 SET covered_from = 'infinity', backfill_first = NULL, backfill_last = NULL,
                 backfill_began = NULL
             WHERE source = $1",
        &[source.into()],
    )
}

//! Repairs what capture could not write, and freezes the days whose raw rows are gone.
//!
//! ```text
//!   still noted        | a day with rows, or none after the last | repaired
//! ---------------------+-----------------------------------------+----------> time
//!                      a step
//! ```
//! A note says of which range. A partition that came with its rows is a note of a year: its days are split
//! off one after the other, the newest first, each in a transaction of its own, so that merges come between.

use crate::engine::rebuild::{Shrink, has_lost_rows, is_exact, rebuild, smallest};
use crate::error::{Error, Result};
use crate::litellm::backfill::{day_after, days_with_rows, recompute_all};
use crate::litellm::capture::attached;
use crate::litellm::raw;
use crate::server::locks::Patience;
use crate::server::relation;
use crate::server::spi::{self, Found};
use crate::server::text::{next_midnight, quoted};
use crate::state::captured::{self, CaptureState};
use crate::state::definition::Definition;
use crate::state::fence::Fence;
use crate::state::frozen::{self, Range};
use crate::state::sources;
use pgrx::datum::Timestamp;
use std::time::{Duration, Instant};

/// Repairs a failure of capture that has committed, or a day of it. `false`: there is none.
pub fn step(patience: Patience) -> Result<bool> {
    let Some(mut capture) = captured::capture()? else { return Ok(false) };
    if !is_noted()? {
        return find_lost_failures(&mut capture, patience);
    }
    let Some(fences) = Fence::take_all(&capture.source, patience)? else { return Ok(false) };
    // A detach may have come first.
    if captured::capture()?.is_none() {
        return Ok(false);
    }
    // What may not be recomputed is frozen before anything is.
    if settle_lost(&fences)? {
        return Ok(true);
    }
    spi::run(
        "UPDATE litellm_spend.dirty_range SET repaired_at = clock_timestamp()
             WHERE repair = 'keep' AND repaired_at IS NULL",
        &[],
    )?;
    let Some((start, end)) = next_range(&fences)? else { return Ok(true) };
    // Marked before the rebuild's snapshot: what is noticed after it stays for the next step.
    let operations = spi::fresh(
        "UPDATE litellm_spend.dirty_range SET repaired_at = clock_timestamp()
             WHERE range_start = $1 AND range_end = $2 AND repair = 'rebuild' AND repaired_at IS NULL
             RETURNING operation",
        &[start.into(), end.into()],
        |r| spi::value::<String>(r, 1),
    )?;
    let by = |some: &[&str]| operations.iter().any(|by| some.contains(&by.as_str()));
    let shrink = match () {
        () if by(&["MOVE"]) => Shrink::Allow,
        () if by(&["UPDATE", "DELETE"]) => Shrink::IfRawReachesBack,
        () => Shrink::Refuse,
    };
    let range = Range { start, end: if end.is_infinity() { None } else { Some(end) } };
    // A partition that is attached again may have brought back what frozen days count.
    let attached = operations.iter().all(|by| by == "ATTACH");
    let mut unrepairable = false;
    for part in frozen::frozen_in(range)? {
        unrepairable |= !(attached && is_exact(&fences, part)?);
    }
    let fences: Vec<&Fence> = fences.iter().collect();
    for part in frozen::unfrozen_in(range)? {
        match rebuild(&fences, part, shrink) {
            Err(Error::Frozen { .. } | Error::RawRowsLost { .. }) => unrepairable = true,
            other => drop(other?),
        }
    }
    if unrepairable {
        spi::run(
            "UPDATE litellm_spend.dirty_range SET unrepairable = true
                 WHERE repair = 'rebuild' AND range_start = $1 AND range_end = $2",
            &[start.into(), end.into()],
        )?;
    }
    // Of failures the numbers are counted, see below.
    spi::run(
        "DELETE FROM litellm_spend.dirty_range
             WHERE failure IS NULL AND repair = 'rebuild' AND repaired_at IS NOT NULL AND NOT unrepairable",
        &[],
    )?;
    Ok(true)
}

/// The range that is repaired next: the oldest note, those of a day before longer ones, which keep them
/// waiting for one step at most. Of a longer one the newest day that has rows, or all days after that, are
/// split off as a note of their own. `None`: nothing is noted.
fn next_range(fences: &[Fence]) -> Result<Option<(Timestamp, Timestamp)>> {
    let next = spi::fresh(
        &format!(
            "SELECT range_start, range_end, range_end > {} AS is_long FROM litellm_spend.dirty_range
             WHERE repair = 'rebuild' AND repaired_at IS NULL ORDER BY is_long, noticed_at LIMIT 1",
            next_midnight("range_start")
        ),
        &[],
        |r| Ok((spi::value::<Timestamp>(r, 1)?, spi::value::<Timestamp>(r, 2)?, spi::value::<bool>(r, 3)?)),
    )?;
    let Some((start, end, is_long)) = next.into_iter().next() else { return Ok(None) };
    let last = if is_long { days_with_rows(fences, end)?.map(|days| days.last) } else { None };
    let Some(last) = last else { return Ok(Some((start, end))) };
    let after = day_after(last)?;
    let cut = if after < end { after } else { last };
    if cut <= start {
        return Ok(Some((start, end)));
    }
    spi::run(
        "WITH notes AS (
                 UPDATE litellm_spend.dirty_range SET range_end = $3
                 WHERE range_start = $1 AND range_end = $2 AND repair = 'rebuild' AND repaired_at IS NULL
                 RETURNING operation, sqlstate, message, noticed_at
             )
             INSERT INTO litellm_spend.dirty_range
                 (range_start, range_end, repair, operation, sqlstate, message, noticed_at)
             SELECT $3, $2, 'rebuild', * FROM notes",
        &[start.into(), end.into(), cut.into()],
    )?;
    Ok(Some((cut, end)))
}

/// Whether something is noted that no step has done yet, in this transaction or before.
pub fn is_noted() -> Result<bool> {
    let sql = "SELECT EXISTS (SELECT FROM litellm_spend.dirty_range WHERE repaired_at IS NULL)";
    Ok(spi::current(sql, &[], |r| spi::value(r, 1))?.contains(&true))
}

/// A failure that could not even be noted left only its number in the sequence. Once every writer of that
/// time has ended, a number without a note is either rolled back or lost: then everything is computed again,
/// but for days that the rollups know more rows of than there are, which are noted as unrepairable.
fn find_lost_failures(capture: &mut CaptureState, patience: Patience) -> Result<bool> {
    let sequence = "litellm_spend.capture_failures";
    let sequence = relation::find_relation(sequence)?.ok_or_else(|| Error::NoTable(sequence.into()))?;
    let last = relation::last_value(sequence)?.unwrap_or(0);
    if last == capture.failures_seen {
        return Ok(false);
    }
    // Read after it: a conversion may have put another table in its place. One that was replaced is written
    // to straight, too.
    let mut tables = vec![];
    for relation in captured::captured_relations()? {
        tables.extend(relation::relation_tree(relation)?);
    }
    let writers = sources::writers(&tables)?;
    capture.window.forget_above(last);
    let safe = capture.window.look(last, &writers.holders);
    sources::store_failure_window(&capture.source, &capture.window)?;
    let Some(safe) = safe.filter(|safe| *safe > capture.failures_seen) else { return Ok(false) };
    let Some(_fences) = Fence::take_all(&capture.source, patience)? else { return Ok(false) };
    let noted = spi::fresh(
        "SELECT count(DISTINCT failure) FROM litellm_spend.dirty_range WHERE failure > $1 AND failure <= $2",
        &[capture.failures_seen.into(), safe.into()],
        |r| spi::value::<i64>(r, 1),
    )
    .one()?;
    if noted.unwrap_or(0) < safe - capture.failures_seen {
        recompute_all(&capture.source)?;
    }
    spi::run(
        "UPDATE litellm_spend.capture SET failures_seen = $2 WHERE source = $1",
        &[capture.source.as_str().into(), safe.into()],
    )?;
    spi::run(
        "DELETE FROM litellm_spend.dirty_range WHERE repaired_at IS NOT NULL AND failure <= $1
                 AND NOT unrepairable",
        &[safe.into()],
    )?;
    Ok(true)
}

/// How long a step compares days before it commits what it found.
const SETTLING: Duration = Duration::from_secs(1);

/// Finds the days of which rows went without a DELETE, and freezes them. A day is compared at a time, the
/// newest first; what is not reached within a second is left for the next step. `false`: there was nothing to
/// look at.
pub fn settle_lost(fences: &[Fence]) -> Result<bool> {
    let Some((fence, definition)) = smallest(fences.iter()) else { return Ok(false) };
    // 1. where to look. The notes are ours before the first day is read: one that is committed later stays.
    let note = spi::fresh(
        "WITH notes AS (DELETE FROM litellm_spend.dirty_range WHERE repair = 'freeze' AND repaired_at IS NULL
                 RETURNING *)
             SELECT range_agg(tsrange(range_start, nullif(range_end, 'infinity')))::text,
                    string_agg(DISTINCT operation, ', ')
             FROM notes",
        &[],
        |r| Ok(r.get::<String>(1)?.zip(r.get::<String>(2)?)),
    )
    .one()?;
    let Some((ranges, operation)) = note.flatten() else { return Ok(false) };
    // 2. the days that the rollup knows there, and whether raw rows of them are missing.
    let started = Instant::now();
    let mut looked_from: Option<Timestamp> = None;
    while let Some((day, next)) = last_known_day(fence, definition, &ranges, looked_from)? {
        let range = Range { start: day, end: Some(next).filter(|next| !next.is_infinity()) };
        if frozen::frozen_in(range)?.is_empty() && may_have_lost_rows(fence, definition, range)? {
            frozen::freeze(day, next, &operation)?;
        }
        looked_from = Some(day);
        if started.elapsed() > SETTLING {
            note_again(&ranges, day, &operation)?;
            return Ok(true);
        }
    }
    // 3. no raw row is older than these, and nothing to repair: one border for all of them.
    let capture = attached()?;
    if fences.iter().all(|f| f.covered_from.is_neg_infinity()) && !capture.has_unseen_failures()? {
        let border = spi::fresh(
            &format!(
                "SELECT max(range_end) FROM litellm_spend.dirty_range
                 WHERE repair = 'freeze' AND repaired_at IS NOT NULL
                     AND range_end <= least($1, {TODAY} + interval '1 day', ({FIRST_TO_REPAIR}))"
            ),
            &[raw::first_day(&capture)?.into()],
            |r| Ok(r.get::<Timestamp>(1)?),
        )?;
        border.into_iter().flatten().try_for_each(frozen::freeze_before)?;
    }
    Ok(true)
}

/// Days from here on may be of the ledger's rows alone when they are repaired.
const FIRST_TO_REPAIR: &str = "SELECT min(range_start) FROM litellm_spend.dirty_range
    WHERE repair = 'rebuild' AND repaired_at IS NULL";

/// Days that are not over are no history yet, nor is the future, which a mistaken row may be dated in.
const TODAY: &str = "date_trunc('day', clock_timestamp() AT TIME ZONE 'UTC')";

/// The last day within `ranges` that the rollup, with its tail, has rows of, and the day after it.
fn last_known_day(
    fence: &Fence,
    definition: &Definition,
    ranges: &str,
    before: Option<Timestamp>,
) -> Result<Option<(Timestamp, Timestamp)>> {
    let Some(bucket) = &definition.bucket else { return Ok(None) };
    let last = |time: String, relation: &str, condition: &str| {
        format!(
            "SELECT date_trunc('day', max({time}::timestamp)) AS last FROM {relation} AS r
             WHERE {time}::timestamp <@ $1::tsmultirange
                 AND ($2 IS NULL OR {time}::timestamp < $2) {condition}"
        )
    };
    let sql = format!(
        "SELECT last, {} FROM (SELECT max(last) AS last FROM ({} UNION ALL {}) AS lasts) AS day",
        next_midnight("last"),
        last(quoted(&bucket.dimension), &definition.table(), ""),
        last(bucket.source_time.clone(), &definition.source, &format!("AND seq > {}", fence.watermark)),
    );
    let days =
        spi::fresh(&sql, &[ranges.into(), before.into()], |r| Ok(r.get(1)?.zip(r.get::<Timestamp>(2)?)))?;
    Ok(days.into_iter().next().flatten())
}

/// A day of which rows were not captured may have lost as many as it seems to have too many. Not so if they
/// came with a table: as a rule that brought all of the day, which the rebuild to come computes again.
fn may_have_lost_rows(fence: &Fence, definition: &Definition, day: Range) -> Result<bool> {
    let uncaptured = "SELECT FROM litellm_spend.dirty_range WHERE repair = 'rebuild' AND repaired_at IS NULL
         AND operation <> 'ATTACH' AND range_start < coalesce($2, 'infinity') AND range_end > $1";
    Ok(has_lost_rows(fence, definition, day)?
        || spi::exists(uncaptured, &[day.start.into(), day.end.into()])?)
}

/// Notes the ranges before `day`, which were not looked at yet.
fn note_again(ranges: &str, day: Timestamp, operation: &str) -> Result<()> {
    spi::run(
        "INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation)
             SELECT lower(part), upper(part), 'freeze', $3
             FROM unnest($1::tsmultirange * tsmultirange(tsrange(NULL, $2))) AS part",
        &[ranges.into(), day.into(), operation.into()],
    )
}

/// Freezes the days before the oldest raw row and prunes their ledger: nothing can recompute them any more.
/// Not those that are to be repaired, which may be of the ledger's rows alone.
pub fn freeze_expired(patience: Patience) -> Result<bool> {
    let Some(capture) = captured::capture()? else { return Ok(false) };
    // Before the fences, which take an XID: as a rule there is nothing to freeze.
    if freezable(&capture)?.is_none() {
        return Ok(false);
    }
    let Some(fences) = Fence::take_all(&capture.source, patience)? else { return Ok(false) };
    if fences.is_empty() || !fences.iter().all(|f| f.covered_from.is_neg_infinity()) {
        return Ok(false);
    }
    match freezable(&capture)? {
        Some(border) => frozen::freeze_before(border).map(|()| true),
        None => Ok(false),
    }
}

/// Up to where days can be frozen that are not, by now.
fn freezable(capture: &CaptureState) -> Result<Option<Timestamp>> {
    if capture.has_unseen_failures()? {
        return Ok(None);
    }
    let sql = format!(
        "SELECT border FROM litellm_spend.source,
             LATERAL (SELECT least($2, {TODAY}, ({FIRST_TO_REPAIR})) AS border) AS days
         WHERE name = $1 AND frozen_before < border"
    );
    let up_to = |first: Option<Timestamp>| -> Result<Option<Timestamp>> {
        spi::current(&sql, &[capture.source.as_str().into(), first.into()], |r| spi::value(r, 1)).one()
    };
    // The raw rows are read last, and only where that can matter.
    if up_to(None)?.is_none() {
        return Ok(None);
    }
    let Some(first) = raw::first_finite_day(capture)? else { return Ok(None) };
    // What failed until then may have moved rows.
    if capture.has_unseen_failures()? { Ok(None) } else { up_to(Some(first)) }
}

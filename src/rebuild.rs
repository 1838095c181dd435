//! Recomputes ranges of a rollup from the truth while writers go on: backfill, repair, and the check that neither
//! is needed.
//!
//! *Truth* is the raw rows plus the ledger of rows that retention deleted. Under the fence, and on one snapshot
//! taken after it, a range becomes `truth − tail`; the tail is what the later merges add. So rollup + tail equals
//! truth at that snapshot, and every change after it arrives through the change log like any other.
//!
//! Days before `frozen_before` have lost raw rows: the rollup is their only record. They are never recomputed.

use crate::catalog::{self, CaptureState};
use crate::definition::{Definition, SCHEMA};
use crate::error::{Error, Result};
use crate::litellm::Capture;
use crate::locks::{self, Fence, Patience};
use pgrx::JsonB;
use pgrx::datum::Timestamp;

/// The days `[start, end)`; no end means everything that follows, `infinity` included.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    pub start: Timestamp,
    pub end: Option<Timestamp>,
}

/// What the rollups must equal, as a query with the change log's columns over the range `[$1, $2)`.
fn truth(capture: &CaptureState) -> Result<String> {
    let relation = catalog::relation_name(capture.relation)?;
    let predecessor = capture.predecessor.map(catalog::relation_name).transpose()?;
    Ok(Capture { columns: &capture.columns }.truth(&relation, predecessor.as_deref()))
}

fn attached() -> Result<CaptureState> {
    catalog::capture()?.ok_or_else(|| Error::NotAttached("any table".into()))
}

/// What to do with a day of which the rollup knows more source rows than there are. Capture saw every deletion by
/// DELETE, so such a day has lost raw rows in another way: a dropped partition, or while nothing was captured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Shrink {
    /// Keep what the rollup says.
    Refuse,
    /// An UPDATE or DELETE was not captured, so fewer may be right, unless all raw rows of the time are gone.
    IfRawReachesBack,
    /// The caller has said so.
    Allow,
}

/// Recomputes `range` under the fence. Returns the number of groups written; an error has written nothing.
fn rebuild(fence: &Fence, capture: &CaptureState, range: Range, shrink: Shrink) -> Result<i64> {
    // 1. a read lock on the raw rows: from here to the commit nobody can truncate them or drop a partition.
    for relation in capture.relations() {
        locks::lock_against_dropping(relation)?;
    }
    // 2. has that happened already? Then the rollup is the only record.
    if freeze_pending()? {
        return Err(Error::RawVanished(fence.definition.name.clone()));
    }
    match shrink {
        Shrink::Refuse => check_nothing_lost(fence, capture, range)?,
        Shrink::IfRawReachesBack => check_raw_reaches_back(fence, capture, range)?,
        Shrink::Allow => {}
    }
    // 3. the range's rows go; readers still see them.
    let (start, end) = (range.start, range.end);
    catalog::execute(&fence.definition.clear(), &[start.into(), end.into()])?;
    // 4. truth − tail, in one statement: one snapshot, newer than the fence.
    catalog::execute(
        &fence.definition.refill(&truth(capture)?),
        &[start.into(), end.into(), fence.watermark.into()],
    )
}

/// Refuses to recompute a day of which the rollup knows more rows than there are.
fn check_nothing_lost(fence: &Fence, capture: &CaptureState, range: Range) -> Result<()> {
    let (start, end) = (range.start, range.end);
    // On its first backfill a rollup has next to no rows, and the days need to be read only once.
    if !catalog::exists(&fence.definition.has_rows(), &[start.into(), end.into()])? {
        return Ok(());
    }
    let lost = catalog::fresh(
        &fence.definition.last_lost_bucket(&truth(capture)?),
        &[start.into(), end.into(), fence.watermark.into()],
        |r| catalog::value::<Timestamp>(r, 1),
    )?;
    match lost.first() {
        None => Ok(()),
        Some(day) => Err(Error::RawRowsLost { rollup: fence.definition.name.clone(), day: day.to_string() }),
    }
}

/// Refuses to recompute days that the rollup knows and that are older than every raw row.
fn check_raw_reaches_back(fence: &Fence, capture: &CaptureState, range: Range) -> Result<()> {
    let first = start_of_raw(capture)?.unwrap_or_else(Timestamp::positive_infinity);
    let end = range.end.filter(|end| *end < first).unwrap_or(first);
    if catalog::exists(&fence.definition.has_rows(), &[range.start.into(), end.into()])? {
        return Err(frozen(&fence.definition.name, first));
    }
    Ok(())
}

fn frozen(rollup: &str, before: Timestamp) -> Error {
    Error::Frozen { rollup: rollup.into(), frozen_before: before.to_string() }
}

fn freeze_pending() -> Result<bool> {
    catalog::exists(
        &format!("SELECT FROM {SCHEMA}.dirty_range WHERE repair = 'freeze' AND repaired_at IS NULL"),
        &[],
    )
}

/// The first day that has raw rows.
fn start_of_raw(capture: &CaptureState) -> Result<Option<Timestamp>> {
    let firsts = capture
        .relations()
        .into_iter()
        .map(|r| Ok(format!("SELECT min(\"startTime\") AS first FROM {}", catalog::relation_name(r)?)))
        .collect::<Result<Vec<_>>>()?;
    let sql = format!("SELECT date_trunc('day', min(first)) FROM ({}) AS firsts", firsts.join(" UNION ALL "));
    Ok(catalog::query(&sql, &[], |r| Ok(r.get::<Timestamp>(1)?))?.pop().flatten())
}

// ---- backfill --------------------------------------------------------------------------------------------

/// Covers one more day, the newest that is not covered yet. `false`: all is covered, or the fence is taken.
pub fn backfill_step(name: &str, patience: Patience) -> Result<bool> {
    let Some(fence) = Fence::take(name, patience)? else { return Ok(false) };
    let capture = attached()?;
    if fence.covered_from.is_neg_infinity() {
        return Ok(false);
    }
    let days = days_with_rows(&fence, &capture)?;
    let next = days.filter(|days| days.last >= fence.frozen_before);
    let covered_from = match next {
        None => Timestamp::negative_infinity(),
        Some(days) => {
            let end = if fence.covered_from.is_infinity() { None } else { Some(fence.covered_from) };
            match rebuild(&fence, &capture, Range { start: days.last, end }, Shrink::Refuse) {
                // What the rollup says is the best record of that day.
                Err(Error::RawRowsLost { .. }) => {}
                other => drop(other?),
            }
            days.last
        }
    };
    catalog::execute(
        &format!(
            "UPDATE {SCHEMA}.rollup SET covered_from = $2, backfill_first = coalesce(backfill_first, $3),
                 backfill_last = coalesce(backfill_last, $4)
             WHERE name = $1"
        ),
        &[
            name.into(),
            covered_from.into(),
            next.map(|days| days.first).into(),
            next.map(|days| days.last).into(),
        ],
    )?;
    Ok(!covered_from.is_neg_infinity())
}

#[derive(Clone, Copy)]
struct Days {
    first: Timestamp,
    last: Timestamp,
}

/// The first and the last day below the covered range that has raw, retired or merged rows.
fn days_with_rows(fence: &Fence, capture: &CaptureState) -> Result<Option<Days>> {
    let mut parts = vec![
        ("\"hour\"".to_string(), format!("{SCHEMA}.retired")),
        (format!("\"{}\"::timestamp", fence.definition.bucket.name), fence.definition.table()),
    ];
    for relation in capture.relations() {
        parts.push(("\"startTime\"".into(), catalog::relation_name(relation)?));
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
    let ends = catalog::fresh(&sql, &[fence.covered_from.into()], |r| {
        Ok(r.get::<Timestamp>(1)?.zip(r.get::<Timestamp>(2)?))
    })?;
    Ok(ends.into_iter().next().flatten().map(|(first, last)| Days { first, last }))
}

/// Everything has to be computed again: capture was interrupted and nobody can say for which rows.
pub fn uncover_all(source: &str) -> Result<()> {
    catalog::execute(
        &format!(
            "UPDATE {SCHEMA}.rollup SET covered_from = 'infinity', backfill_first = NULL, backfill_last = NULL
             WHERE source = $1"
        ),
        &[source.into()],
    )?;
    Ok(())
}

// ---- repair ----------------------------------------------------------------------------------------------

/// Repairs the oldest failure of capture that has committed. `false`: there is none.
pub fn repair_step(patience: Patience) -> Result<bool> {
    let Some(mut capture) = catalog::capture()? else { return Ok(false) };
    if !unrepaired()? {
        return find_lost_failures(&mut capture, patience);
    }
    let Some(fences) = take_all(&capture.source, patience)? else { return Ok(false) };
    // What may not be recomputed is frozen before anything is.
    if freeze_pending()? {
        freeze(&capture, &fences)?;
        return Ok(true);
    }
    catalog::execute(
        &format!(
            "UPDATE {SCHEMA}.dirty_range SET repaired_at = clock_timestamp()
             WHERE repair = 'keep' AND repaired_at IS NULL"
        ),
        &[],
    )?;
    // Marked before the rebuild's snapshot: what is noticed after it stays for the next step.
    let ranges = catalog::fresh(
        &format!(
            "UPDATE {SCHEMA}.dirty_range d SET repaired_at = clock_timestamp()
             FROM (SELECT range_start, range_end FROM {SCHEMA}.dirty_range
                   WHERE repair = 'rebuild' AND repaired_at IS NULL ORDER BY noticed_at LIMIT 1) AS oldest
             WHERE d.range_start = oldest.range_start AND d.range_end = oldest.range_end
               AND d.repair = 'rebuild' AND d.repaired_at IS NULL
             RETURNING d.range_start, d.range_end, d.operation IN ('UPDATE', 'DELETE')"
        ),
        &[],
        |r| Ok((catalog::value(r, 1)?, catalog::value(r, 2)?, catalog::value(r, 3)?)),
    )?;
    // All of them are the same range.
    let fewer = ranges.iter().any(|(_, _, fewer): &(Timestamp, Timestamp, bool)| *fewer);
    let shrink = if fewer { Shrink::IfRawReachesBack } else { Shrink::Refuse };
    if let Some((start, end, _)) = ranges.into_iter().next() {
        let range = Range { start, end: if end.is_infinity() { None } else { Some(end) } };
        for fence in &fences {
            let outcome = if start < fence.frozen_before {
                Err(frozen(&fence.definition.name, fence.frozen_before))
            } else {
                rebuild(fence, &capture, range, shrink)
            };
            match outcome {
                Err(Error::Frozen { .. } | Error::RawRowsLost { .. }) => {
                    catalog::execute(
                        &format!(
                            "UPDATE {SCHEMA}.dirty_range SET unrepairable = true
                             WHERE range_start = $1 AND range_end = $2"
                        ),
                        &[start.into(), end.into()],
                    )?;
                }
                other => drop(other?),
            }
        }
    }
    Ok(true)
}

fn unrepaired() -> Result<bool> {
    let sql = format!("SELECT EXISTS (SELECT FROM {SCHEMA}.dirty_range WHERE repaired_at IS NULL)");
    Ok(catalog::query(&sql, &[], |r| catalog::value(r, 1))?.contains(&true))
}

/// A failure that could not even be noted left only its number in the sequence. Once every writer of that time has
/// ended, a number without a note is either rolled back or lost: then everything is computed again.
fn find_lost_failures(capture: &mut CaptureState, patience: Patience) -> Result<bool> {
    let sequence = format!("{SCHEMA}.capture_failures");
    let sequence = catalog::find_relation(&sequence)?.ok_or(Error::NoTable(sequence))?;
    let last = catalog::last_value(sequence)?;
    if last == capture.failures_seen {
        return Ok(false);
    }
    let writers = catalog::writers(catalog::relation_tree(capture.relation)?)?;
    let safe = capture.window.look(last, &writers);
    catalog::store_failure_window(&capture.source, &capture.window)?;
    let Some(safe) = safe.filter(|safe| *safe > capture.failures_seen) else { return Ok(false) };
    let Some(_fences) = take_all(&capture.source, patience)? else { return Ok(false) };
    let noted = catalog::fresh(
        &format!(
            "SELECT count(DISTINCT failure) FROM {SCHEMA}.dirty_range WHERE failure > $1 AND failure <= $2"
        ),
        &[capture.failures_seen.into(), safe.into()],
        |r| catalog::value::<i64>(r, 1),
    )?;
    if noted.first().copied().unwrap_or(0) < safe - capture.failures_seen {
        uncover_all(&capture.source)?;
    }
    catalog::execute(
        &format!("UPDATE {SCHEMA}.capture SET failures_seen = $2 WHERE source = $1"),
        &[capture.source.as_str().into(), safe.into()],
    )?;
    catalog::execute(
        &format!(
            "DELETE FROM {SCHEMA}.dirty_range WHERE repaired_at IS NOT NULL AND failure <= $1 AND NOT unrepairable"
        ),
        &[safe.into()],
    )?;
    Ok(true)
}

/// The fences of all rollups of a source, in the order of their names: no deadlocks.
fn take_all(source: &str, patience: Patience) -> Result<Option<Vec<Fence>>> {
    let mut fences = vec![];
    for name in catalog::rollup_names(Some(source))? {
        match Fence::take(&name, patience)? {
            Some(fence) => fences.push(fence),
            None => return Ok(None),
        }
    }
    Ok(Some(fences))
}

/// Raw rows were truncated: all days that the rollups know become history.
fn freeze(capture: &CaptureState, fences: &[Fence]) -> Result<()> {
    let ends: Vec<String> = fences
        .iter()
        .map(|f| {
            format!(
                "SELECT max(\"{}\")::timestamp AS last FROM {}",
                f.definition.bucket.name,
                f.definition.live_view()
            )
        })
        .collect();
    catalog::execute(
        &format!(
            "WITH frozen AS (UPDATE {SCHEMA}.dirty_range SET repaired_at = clock_timestamp()
                 WHERE repair = 'freeze' AND repaired_at IS NULL RETURNING range_end)
             UPDATE {SCHEMA}.source SET frozen_before = greatest(frozen_before, (
                 SELECT least((SELECT max(range_end) FROM frozen), max(last) + interval '1 day')
                 FROM ({}) AS ends))
             WHERE name = $1",
            ends.join(" UNION ALL ")
        ),
        &[capture.source.as_str().into()],
    )?;
    Ok(())
}

/// Freezes the days before the oldest raw row and prunes their ledger: nothing can recompute them any more.
pub fn freeze_expired(patience: Patience) -> Result<bool> {
    let Some(capture) = catalog::capture()? else { return Ok(false) };
    let Some(first) = start_of_raw(&capture)? else { return Ok(false) };
    // Before the fences, which take an XID: as a rule there is nothing to freeze.
    let expired = catalog::query(
        &format!("SELECT FROM {SCHEMA}.source WHERE name = $1 AND frozen_before < $2"),
        &[capture.source.as_str().into(), first.into()],
        |_| Ok(()),
    )?;
    if expired.is_empty() {
        return Ok(false);
    }
    let Some(fences) = take_all(&capture.source, patience)? else { return Ok(false) };
    if fences.is_empty() || !fences.iter().all(|f| f.covered_from.is_neg_infinity()) {
        return Ok(false);
    }
    catalog::execute(
        &format!("UPDATE {SCHEMA}.source SET frozen_before = $2 WHERE name = $1"),
        &[capture.source.as_str().into(), first.into()],
    )?;
    catalog::execute(&format!("DELETE FROM {SCHEMA}.retired WHERE hour < $1"), &[first.into()])?;
    Ok(true)
}

// ---- SQL calls -------------------------------------------------------------------------------------------

/// `spend_rollup_rebuild()`: the whole range in the caller's transaction.
pub fn rebuild_range(name: &str, range: Range, force: bool, patience: Patience) -> Result<i64> {
    let fence = Fence::take(name, patience)?.ok_or_else(|| Error::RollupBusy(name.into()))?;
    let capture = attached()?;
    check_range(name, fence.frozen_before, range)?;
    rebuild(&fence, &capture, range, if force { Shrink::Allow } else { Shrink::Refuse })
}

fn check_range(name: &str, frozen_before: Timestamp, range: Range) -> Result<()> {
    let whole_days = catalog::query(
        "SELECT $1 < coalesce($2, 'infinity') AND ($1 = date_trunc('day', $1))
                AND ($2 IS NULL OR $2 = date_trunc('day', $2))",
        &[range.start.into(), range.end.into()],
        |r| catalog::value::<bool>(r, 1),
    )?;
    if whole_days.first() != Some(&true) {
        return Err(Error::Range(name.into()));
    }
    if range.start < frozen_before {
        return Err(frozen(name, frozen_before));
    }
    Ok(())
}

/// A group in which rollup + tail and truth differ: its key and both sides.
pub type Difference = (JsonB, Option<JsonB>, Option<JsonB>);

/// `spend_rollup_verify()`: the groups that differ, in one snapshot. None is the only pass.
pub fn verify(name: &str, start: Option<Timestamp>, end: Option<Timestamp>) -> Result<Vec<Difference>> {
    let states = catalog::query(
        &format!(
            "SELECT r.definition::text, s.frozen_before FROM {SCHEMA}.rollup r
             JOIN {SCHEMA}.source s ON s.name = r.source WHERE r.name = $1"
        ),
        &[name.into()],
        |r| Ok((catalog::value::<String>(r, 1)?, catalog::value::<Timestamp>(r, 2)?)),
    )?;
    let (definition, frozen_before) =
        states.into_iter().next().ok_or_else(|| Error::NoRollup(name.into()))?;
    let definition: Definition = serde_json::from_str(&definition)?;
    let range = Range { start: start.unwrap_or(frozen_before), end };
    check_range(name, frozen_before, range)?;
    let sql = definition.compare(&truth(&attached()?)?);
    catalog::query(&sql, &[range.start.into(), range.end.into()], |r| {
        Ok((catalog::value::<JsonB>(r, 1)?, r.get(2)?, r.get(3)?))
    })
}

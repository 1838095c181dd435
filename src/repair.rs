//! Repairs what capture could not write, and freezes the days whose raw rows are gone.

use crate::backfill::uncover_all;
use crate::catalog::{self, CaptureState};
use crate::definition::{SCHEMA, next_midnight};
use crate::error::{Error, Result};
use crate::locks::{Fence, Patience};
use crate::rebuild::{Range, Shrink, freeze_pending, frozen, rebuild, start_of_raw};
use pgrx::datum::Timestamp;

/// Repairs the oldest failure of capture that has committed. `false`: there is none.
pub fn step(patience: Patience) -> Result<bool> {
    let Some(mut capture) = catalog::capture()? else { return Ok(false) };
    if !unrepaired()? {
        return find_lost_failures(&mut capture, patience);
    }
    let Some(fences) = Fence::take_all(&capture.source, patience)? else { return Ok(false) };
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
        let fences: Vec<&Fence> = fences.iter().collect();
        let past = fences.iter().find(|fence| start < fence.frozen_before);
        let outcome = match past {
            Some(fence) => Err(frozen(&fence.name, fence.frozen_before)),
            None => rebuild(&fences, range, shrink),
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
    let last = catalog::last_value(sequence)?.unwrap_or(0);
    if last == capture.failures_seen {
        return Ok(false);
    }
    let writers = catalog::writers(catalog::relation_tree(capture.relation)?)?;
    let safe = capture.window.look(last, &writers);
    catalog::store_failure_window(&capture.source, &capture.window)?;
    let Some(safe) = safe.filter(|safe| *safe > capture.failures_seen) else { return Ok(false) };
    let Some(_fences) = Fence::take_all(&capture.source, patience)? else { return Ok(false) };
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

/// Raw rows were truncated: all days that the rollups know become history.
fn freeze(capture: &CaptureState, fences: &[Fence]) -> Result<()> {
    let mut ends = vec![];
    for fence in fences {
        let definition = fence.filled()?;
        let bucket = definition.bucket.as_ref().map(|b| format!("max(\"{}\")::timestamp", b.dimension));
        ends.extend(bucket.map(|last| format!("SELECT {last} AS last FROM {}", definition.live_view())));
    }
    catalog::execute(
        &format!(
            "WITH frozen AS (UPDATE {SCHEMA}.dirty_range SET repaired_at = clock_timestamp()
                 WHERE repair = 'freeze' AND repaired_at IS NULL RETURNING range_end)
             UPDATE {SCHEMA}.source SET frozen_before = greatest(frozen_before, (
                 SELECT least((SELECT max(range_end) FROM frozen), {})
                 FROM ({}) AS ends))
             WHERE name = $1",
            next_midnight("max(last)"),
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
    let Some(fences) = Fence::take_all(&capture.source, patience)? else { return Ok(false) };
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

//! Moves rows of a source into its rollups, one window a transaction.
//!
//! ```text
//!   merged     | window (a, b]     | may still change
//! -------------+-------------------+------------------> sequence
//!          watermark             safe end
//! ```
//!
//! Exactly once: the rollup's rows and its watermark commit together, and only the holder of the fence changes
//! either. No lock is taken on the source: a writer that stays open freezes the watermark, nothing else.

use crate::catalog::{self, Source};
use crate::definition::SCHEMA;
use crate::error::{Error, Result};
use crate::guc;
use crate::locks::{Fence, Patience};
use std::time::Instant;

/// What one merge did.
pub struct Merge {
    pub window_start: i64,
    pub window_end: i64,
    pub rows: i64,
    pub groups: i64,
}

/// What came of an attempt to merge.
pub enum Merged {
    Window(Merge),
    /// Everything that is safe has been merged.
    Nothing,
    /// Another transaction holds the fence.
    Busy,
}

/// The newest value of the source that is safe to merge, found without waiting for anybody longer than `patience`.
pub fn find_safe_end(source: &mut Source, patience: Patience) -> Result<i64> {
    loop {
        // 1. the last value, before the writers: every value up to it was drawn by one of them or by somebody
        //    who has ended.
        let last_value = catalog::last_value(source.sequence)?;
        if last_value == source.merged_to {
            return Ok(last_value);
        }
        catalog::check_sequence(source.sequence)?;
        // 2. the transactions that may still add rows.
        let writers = catalog::writers(catalog::relation_tree(source.relation)?)?;
        // 3. what is safe now; the rest is remembered for the next look.
        let before = source.window.clone();
        let safe = source.window.look(last_value, &writers).unwrap_or(source.merged_to);
        let done = safe >= last_value || !patience.try_again();
        if done && source.window != before {
            catalog::store_window(&source.name, &source.window)?;
        }
        if done {
            return Ok(safe);
        }
    }
}

/// Merges the next window of rollup `name`, which ends at `safe_end` at the latest.
pub fn merge(name: &str, safe_end: i64, patience: Patience) -> Result<Merged> {
    let started = Instant::now();
    // 1. lock our state row: one merge at a time, and every later statement sees what the earlier ones did.
    let Some(fence) = Fence::take(name, patience)? else { return Ok(Merged::Busy) };
    let start = fence.watermark;
    // 2. the window.
    if safe_end < start {
        return Err(set_back(&fence, safe_end)?);
    }
    let end = safe_end.min(start.saturating_add(guc::max_window()));
    if end == start {
        return Ok(Merged::Nothing);
    }
    // 3. its rows, on a snapshot that is newer than the fence and the look.
    let counts = catalog::fresh(&fence.definition.merge(), &[start.into(), end.into()], |r| {
        Ok((catalog::value::<i64>(r, 1)?, catalog::value::<i64>(r, 2)?))
    })?;
    let (rows, groups) = counts.first().copied().unwrap_or_default();
    // 4. the watermark, in the same transaction.
    fence.advance(end, rows, groups, started.elapsed().as_secs_f64() * 1000.0)?;
    Ok(Merged::Window(Merge { window_start: start + 1, window_end: end, rows, groups }))
}

/// The sequence is behind the watermark: new rows would never be merged.
fn set_back(fence: &Fence, last_value: i64) -> Result<Error> {
    let sequence = catalog::query(
        &format!("SELECT sequence::text FROM {SCHEMA}.source WHERE name = $1"),
        &[fence.source.as_str().into()],
        |r| catalog::value(r, 1),
    )?;
    let sequence = sequence.into_iter().next().unwrap_or_default();
    Ok(Error::SequenceSetBack { sequence, last_value, watermark: fence.watermark })
}

/// Rows removed from the change log in one transaction.
const TRIM_BATCH: i64 = 50_000;

/// Removes rows of the change log that every rollup has merged. Older snapshots still see them, and readers
/// start above the watermark, so this is only housekeeping.
pub fn trim(source: &Source) -> Result<i64> {
    let end = source.merged_to.min(source.trimmed_to.saturating_add(TRIM_BATCH));
    if end <= source.trimmed_to {
        return Ok(0);
    }
    // Whoever attaches holds this row, and may be about to drop the change log.
    let ours = catalog::fresh(
        &format!("SELECT FROM {SCHEMA}.source WHERE name = $1 AND trimmed_to = $2 FOR UPDATE SKIP LOCKED"),
        &[source.name.as_str().into(), source.trimmed_to.into()],
        |_| Ok(()),
    )?;
    if ours.is_empty() {
        return Ok(0);
    }
    let name = catalog::relation_name(source.relation)?;
    let removed = catalog::execute(
        &format!("DELETE FROM {name} WHERE seq > $1 AND seq <= $2"),
        &[source.trimmed_to.into(), end.into()],
    )?;
    catalog::execute(
        &format!("UPDATE {SCHEMA}.source SET trimmed_to = $2 WHERE name = $1"),
        &[source.name.as_str().into(), end.into()],
    )?;
    Ok(removed)
}

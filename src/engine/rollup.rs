//! Moves rows of a source into its rollups, one window a transaction.
//!
//! ```text
//!   merged     | window (a, b]     | may still change
//! -------------+-------------------+------------------> sequence
//!          watermark             safe end
//! ```
//!
//! Exactly once: the rollup's rows and its watermark commit together, and only the holder of the fence
//! changes either. No lock is taken on the source: a writer that stays open freezes the watermark, nothing
//! else.

use crate::citus::{self, spread};
use crate::engine::columns;
use crate::engine::groups::{self, Counts};
use crate::engine::source;
use crate::error::{Error, Result};
use crate::guc;
use crate::server::locks::{self, Patience};
use crate::server::relation::{self, Table};
use crate::server::session::{self, Failure, Owner, attempt};
use crate::server::spi::{self, Found};
use crate::server::text::quoted;
use crate::state::definition::Definition;
use crate::state::fence::Fence;
use crate::state::sources::{self, CHANGE_LOG, Source};
use crate::state::window::Window;
use pgrx::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// What one merge did.
pub struct Merge {
    pub window_start: i64,
    pub window_end: i64,
    /// `None`: they are not counted, because the nodes merge them by themselves.
    pub rows: Option<i64>,
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

/// What a look at a source found.
pub struct Look {
    /// The newest value that is safe to merge.
    pub safe_end: i64,
    /// The newest there is.
    pub last_value: i64,
}

/// The newest value of the source that is safe to merge.
pub fn find_safe_end(source: &mut Source, patience: Patience) -> Result<i64> {
    Ok(look(source, patience, Duration::ZERO)?.safe_end)
}

/// Looks how far it is safe to merge, without waiting for anybody longer than `patience` or, if there is
/// something to merge, than `more` is worth.
pub fn look(source: &mut Source, patience: Patience, more: Duration) -> Result<Look> {
    let before = (source.window.clone(), source.nodes.clone());
    let (worth, mut wanted) = (Patience::Until(Instant::now() + more), None);
    loop {
        // 1. the last value, before the writers: every value up to it was drawn by one of them or by somebody
        //    who has ended. And before the relations that they write to, which are read as they are now:
        //    whoever drew such a value through a partition that has just been attached is found there.
        let last_value = last_value(source.sequence, source.merged_to)?;
        let nothing = Look { safe_end: source.merged_to, last_value };
        source.window.forget_above(last_value);
        source.nodes.forget_above(last_value);
        let Some(relation) = sources::relation_of(source)? else {
            // It was dropped, another sequence numbers it now, or Citus hides it.
            if Table::find(source.relation)?.is_none() {
                citus::require_not_hidden(source.relation)?;
            }
            return Ok(nothing);
        };
        let mut distributed = false;
        if source.name != CHANGE_LOG {
            distributed = citus::require_by_hash(relation)?;
            source::require_same_numbering(relation, source.sequence)?;
        }
        // Of a distributed one another node may have numbered rows.
        if last_value == source.merged_to && !distributed {
            store_unless_same(source, &before)?;
            return Ok(nothing);
        }
        relation::check_sequence(source.sequence)?;
        if source.name != CHANGE_LOG {
            source::require_logged(relation)?;
        }
        // 2. the transactions that may still add rows.
        let relations = sources::inserted_into(relation, source.sequence)?;
        let writers = sources::writers(&relations)?;
        // 3. what is safe now; the rest is remembered for the next look.
        let mut safe_end = source.window.look(last_value, &writers.holders).unwrap_or(source.merged_to);
        // 4. of that, what is safe on other nodes too, which are asked after the writers here.
        if let Some(writers) = citus::writers(relation, source.sequence, &relations)? {
            safe_end = source.nodes.look(safe_end, &writers).unwrap_or(source.merged_to);
        }
        //    A statement that called us does not end while we wait.
        let patience = if safe_end > source.merged_to { patience.or(worth) } else { patience };
        let wanted = *wanted.get_or_insert(last_value);
        let done = safe_end >= wanted || writers.ourselves || !patience.try_again();
        if done {
            store_unless_same(source, &before)?;
            return Ok(Look { safe_end, last_value });
        }
    }
}

/// The last value that a sequence has given: one that has given none since it was made or restarted, as many
/// as are merged, unless it is about to give some of those again.
fn last_value(sequence: pg_sys::Oid, merged: i64) -> Result<i64> {
    if let Some(last_value) = relation::last_value(sequence)? {
        return Ok(last_value);
    }
    let sql = "SELECT relowner FROM pg_catalog.pg_class WHERE oid = $1";
    let owner = spi::query(sql, &[sequence.into()], |r| spi::value::<pg_sys::Oid>(r, 1)).one()?;
    let Some(owner) = owner else { return Ok(merged) };
    // As its owner, by whom its name could come to mean something else.
    let sql = format!("SELECT last_value FROM {} WHERE NOT is_called", relation::relation_name(sequence)?);
    let next = Owner::role(owner).query(&sql, &[], |r| spi::value::<i64>(r, 1)).one()?;
    Ok(next.map_or(merged, |next| merged.min(next - 1)))
}

fn store_unless_same(source: &Source, before: &(Window, Window)) -> Result<()> {
    if (&source.window, &source.nodes) == (&before.0, &before.1) {
        return Ok(());
    }
    sources::store_windows(source)
}

/// Merges the next window of rollup `name`, which ends at `safe_end` at the latest and holds at most `most`
/// values.
pub fn merge(name: &str, safe_end: i64, most: i64, patience: Patience) -> Result<Merged> {
    let started = Instant::now();
    // 1. lock our state row: one merge at a time, and every later statement sees what the earlier ones did.
    let Some(fence) = Fence::take(name, patience)? else { return Ok(Merged::Busy) };
    let definition = fence.filled()?;
    let start = fence.watermark;
    // 2. the window.
    if safe_end <= start {
        // Another merger was faster than our look, unless the sequence is behind what was merged.
        check_not_set_back(&fence)?;
        return Ok(Merged::Nothing);
    }
    let mut end = window_end(start, safe_end, most);
    // The source is read by name: it stays its name.
    if !locks::try_lock_against_dropping(fence.relation)? {
        return Ok(Merged::Busy);
    }
    require_logged(definition)?;
    columns::require_same(&fence)?;
    columns::note_unless_known(&fence)?;
    let note_merged = definition.note_merged();
    if note_merged.is_some() {
        spread::await_end(&fence.name, &definition.table(), patience)?;
        check_nodes_not_ahead(&fence, definition)?;
    }
    // 3. its rows, on a snapshot that is newer than the fence and the look. The expressions are its owner's.
    let rights = fence.act()?;
    let (rows, groups) = naming_nulls(definition, || match note_merged {
        None => write_window(&fence, definition, start, end),
        Some(note_merged) => {
            let groups = spi::execute(&definition.merge_by_shard("$1", "$2"), &[start.into(), end.into()])?;
            spi::run(&note_merged, &[start.into(), end.into()])?;
            Ok((None, groups))
        }
    })?;
    if groups == 0 && end < safe_end {
        end = end_of_gap(definition, end, safe_end)?;
    }
    drop(rights);
    // 4. the watermark, in the same transaction.
    fence.advance(end, Some((rows, groups)), started.elapsed().as_secs_f64() * 1000.0)?;
    Ok(Merged::Window(Merge { window_start: start + 1, window_end: end, rows, groups }))
}

/// Refuses to write to a rollup whose table a crash would empty, while what says how far it is stays.
pub fn require_logged(definition: &Definition) -> Result<()> {
    unlogged_table(definition)?.map_or(Ok(()), |table| Err(Error::UnloggedRollup(table)))
}

/// A table of the rollup's own that a crash empties, while its watermark stays.
fn unlogged_table(definition: &Definition) -> Result<Option<String>> {
    for table in definition.tables() {
        if relation::find_relation(&table)?.is_some_and(relation::is_unlogged) {
            return Ok(Some(table));
        }
    }
    Ok(None)
}

/// Notes that what is merged of a distributed rollup is committed on all nodes, if it is: its live view then
/// reads only what came later. In another transaction than the merge.
pub fn note_committed(name: &str) -> Result<()> {
    let Some(fence) = Fence::take(name, Patience::None)? else { return Ok(()) };
    match spread::await_end(name, &fence.filled()?.table(), Patience::None) {
        Ok(()) => fence.note_committed(),
        // The next merge waits for it, and says so.
        Err(Error::StillCommitting { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Merges the next window of all built-in rollups together: the change log is read once for those whose rows
/// are the same. `None`: that cannot be done now, one of them is ahead or fails, say; then each goes its own
/// way.
pub fn merge_together(
    names: &[String],
    safe_end: i64,
    most: i64,
    patience: Patience,
) -> Result<Option<Vec<Merge>>> {
    if !guc::hash_groups() {
        return Ok(None);
    }
    let started = Instant::now();
    // 1. lock the state rows, in the order of their names as everybody does.
    let mut fences = vec![];
    for name in names {
        let Some(fence) = Fence::take(name, patience)? else { return Ok(None) };
        fences.push(fence);
    }
    let Some(start) = fences.first().map(|fence| fence.watermark) else { return Ok(None) };
    let alike = |fence: &Fence| fence.is_built_in() && fence.watermark == start;
    if safe_end <= start || !fences.iter().all(alike) {
        return Ok(None);
    }
    let definitions = fences.iter().map(Fence::filled).collect::<Result<Vec<_>>>()?;
    for definition in &definitions {
        if unlogged_table(definition)?.is_some() {
            return Ok(None);
        }
    }
    // 2. the window, which takes about as long for all as one of `most` for one.
    let mut end = window_end(start, safe_end, (most / names.len() as i64).max(1));
    if !locks::try_lock_against_dropping(fences[0].relation)? {
        return Ok(None);
    }
    // 3. its rows, on a snapshot that is newer than the fences and the look. All that is mentioned is ours.
    let counts = match attempt(|| groups::merge(&definitions, start, end)).map_err(Failure::unless_cancel) {
        Ok(Some(counts)) => counts,
        // A smaller window may do.
        Err(failure) if failure.lacks_resources() => return Err(Error::Failed(failure)),
        // Whose fault it is will be found, and recorded, when each is merged alone.
        Ok(None) | Err(_) => return Ok(None),
    };
    if end < safe_end && counts.iter().all(|(_, groups)| *groups == 0) {
        end = end_of_gap(definitions[0], end, safe_end)?;
    }
    // 4. the watermarks, in the same transaction.
    let ms = started.elapsed().as_secs_f64() * 1000.0;
    for (fence, counts) in fences.iter().zip(&counts) {
        fence.advance(end, Some(*counts), ms)?;
    }
    let merge = |(rows, groups)| Merge { window_start: start + 1, window_end: end, rows, groups };
    Ok(Some(counts.into_iter().map(merge).collect()))
}

/// Adds the rows of a window to a rollup.
fn write_window(fence: &Fence, rollup: &Definition, start: i64, end: i64) -> Result<Counts> {
    if groups::are_hashed(fence.relation)?
        && let Some(counts) = groups::merge(&[rollup], start, end)?
    {
        return Ok(counts[0]);
    }
    let found = spi::fresh(&rollup.merge(), &[start.into(), end.into()], |r| {
        Ok((r.get::<i64>(1)?, spi::value::<i64>(r, 2)?))
    })
    .one()?;
    Ok(found.unwrap_or_default())
}

/// Runs `work`, which writes groups of a rollup. Says what to do where a dimension is NULL whose column could
/// not be when the rollup was declared: then its table's key is one that takes none.
pub fn naming_nulls<T>(rollup: &Definition, work: impl FnOnce() -> Result<T>) -> Result<T> {
    PgTryBuilder::new(std::panic::AssertUnwindSafe(work))
        .catch_when(PgSqlErrorCode::ERRCODE_NOT_NULL_VIOLATION, |caught| {
            let failure = Failure::from(caught);
            let names = |name: &str| failure.message.contains(&format!("\"{name}\""));
            let of = rollup.dimensions.iter().filter(|d| !d.nullable).find(|d| names(&d.column.name));
            Err(match of.filter(|_| names(&rollup.table_name())) {
                None => Error::Failed(failure),
                Some(dimension) => Error::NullDimension {
                    rollup: rollup.name.clone(),
                    dimension: dimension.column.name.clone(),
                    relation: rollup.source.clone(),
                },
            })
        })
        .execute()
}

/// Where a window that begins after `start` ends.
pub fn window_end(start: i64, safe_end: i64, most: i64) -> i64 {
    safe_end.min(start.saturating_add(most))
}

/// Numbers may be far apart: an empty window reaches up to the next row, whose number need not be whole.
fn end_of_gap(definition: &Definition, end: i64, safe_end: i64) -> Result<i64> {
    let sequence = quoted(&definition.source_sequence);
    let sql = format!(
        "SELECT CASE WHEN min({sequence}) IS NOT NULL THEN greatest(min({sequence})::bigint - 1, $1) END
         FROM {} WHERE {sequence} > $1 AND {sequence} <= $2",
        definition.source
    );
    let next = spi::fresh(&sql, &[end.into(), safe_end.into()], |r| Ok(r.get::<i64>(1)?)).one()?;
    Ok(next.flatten().unwrap_or(safe_end))
}

thread_local! {
    /// The distributed rollups whose nodes this process has asked how far they are.
    static ASKED: RefCell<BTreeSet<String>> = RefCell::default();
}

/// A failover of the coordinator can lose numbers that its sequence gave, and that the nodes have merged.
/// Rows that get them again would never be merged. It ends every process, so one question a process will do.
fn check_nodes_not_ahead(fence: &Fence, definition: &Definition) -> Result<()> {
    if ASKED.with_borrow(|asked| asked.contains(&fence.name)) {
        return Ok(());
    }
    if let Some(merged) = merged_on_nodes(fence, definition)? {
        check_sequence_has_given(fence, merged)?;
    }
    ASKED.with_borrow_mut(|asked| asked.insert(fence.name.clone()));
    Ok(())
}

/// How far the nodes of a distributed rollup have merged, as they say.
pub fn merged_on_nodes(fence: &Fence, definition: &Definition) -> Result<Option<i64>> {
    let Some(sql) = definition.furthest_merged() else { return Ok(None) };
    let _rights = fence.act()?;
    Ok(spi::fresh(&sql, &[], |r| Ok(r.get::<i64>(1)?)).one()?.flatten())
}

/// A sequence behind the watermark would number rows that are never merged.
pub fn check_not_set_back(fence: &Fence) -> Result<()> {
    check_sequence_has_given(fence, fence.watermark)
}

fn check_sequence_has_given(fence: &Fence, merged: i64) -> Result<()> {
    let sequence = spi::query(
        "SELECT sequence::oid, sequence::text FROM litellm_spend.source WHERE name = $1",
        &[fence.source.clone().into()],
        |r| Ok((spi::value::<pg_sys::Oid>(r, 1)?, spi::value::<String>(r, 2)?)),
    )
    .one()?;
    let Some((oid, sequence)) = sequence else { return Ok(()) };
    let last_value = last_value(oid, merged)?;
    if last_value >= merged {
        return Ok(());
    }
    let by_hand = fence.definition.is_none();
    Err(Error::SequenceSetBack { sequence, last_value, watermark: merged, by_hand })
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
    let ours = spi::fresh(
        "SELECT FROM litellm_spend.source WHERE name = $1 AND trimmed_to = $2 FOR UPDATE SKIP LOCKED",
        &[source.name.as_str().into(), source.trimmed_to.into()],
        |_| Ok(()),
    )?;
    if ours.is_empty() {
        return Ok(0);
    }
    let name = relation::relation_name(source.relation)?;
    let removed = spi::execute(
        &format!("DELETE FROM {name} WHERE seq > $1 AND seq <= $2"),
        &[source.trimmed_to.into(), end.into()],
    )?;
    spi::run(
        "UPDATE litellm_spend.source SET trimmed_to = $2 WHERE name = $1",
        &[source.name.as_str().into(), end.into()],
    )?;
    Ok(removed)
}

// ---- for SQL calls ---------------------------------------------------------------------------------------

/// One step of `spend_backfill()` on a table with declared rollups: a window of each. Says how far they are,
/// `None` when everything that was safe is merged.
pub fn backfill_step(sources: Vec<Source>, patience: Patience) -> Result<Option<String>> {
    let mut progress = vec![];
    for mut source in sources {
        let safe = find_safe_end(&mut source, patience)?;
        for name in &source.rollups {
            match merge(name, safe, guc::max_window(), patience)? {
                Merged::Window(merged) if merged.window_end < safe => {
                    progress.push(format!("rollup {name}: {} of {safe}", merged.window_end));
                }
                Merged::Busy => progress.push(format!("rollup {name}: another transaction works on it")),
                _ => {}
            }
        }
    }
    Ok(if progress.is_empty() { None } else { Some(progress.join("; ")) })
}

/// `spend_rollup_window()`: the next safe window of a registered rollup. The watermark advances in the
/// caller's transaction, together with whatever the caller writes.
pub fn next_window(caller: pg_sys::Oid, name: &str) -> Result<(i64, i64)> {
    // 1. lock the state row: the window belongs to one transaction at a time.
    let fence = Fence::wait(name)?;
    session::require_role(caller, fence.owner, name)?;
    if fence.definition.is_some() {
        return Err(Error::NotByHand(name.into()));
    }
    // 2. what is safe; the caller's next statement takes a snapshot after it.
    let mut source = sources::source_of(name)?.ok_or_else(|| Error::SourceDropped(name.into()))?;
    check_not_set_back(&fence)?;
    let safe = find_safe_end(&mut source, Patience::None)?.max(fence.watermark);
    let end = window_end(fence.watermark, safe, guc::max_window());
    // 3. the watermark.
    match end > fence.watermark {
        true => fence.advance(end, None, 0.0)?,
        false => fence.note_call()?,
    }
    Ok((fence.watermark + 1, end))
}

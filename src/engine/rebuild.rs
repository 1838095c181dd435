//! Recomputes ranges of a rollup from the truth while writers go on, and compares the two.
//!
//! *Truth* is, for the captured table, the raw rows plus the ledger of rows that retention deleted; for any
//! other source its own rows. Under the fence, and on one snapshot taken after it, a range becomes `truth −
//! tail`; the tail is what the later merges add. So rollup + tail equals truth at that snapshot, and every
//! change after it arrives through the sequence like any other.
//!
//! Frozen days have lost raw rows: the rollup is their only record ([`crate::state::frozen`]). They are not
//! recomputed, unless forced.
//!
//! Whose rights: every statement that reads the raw rows runs as the owner of their table, who may read what
//! is ours of the captured table, and add to it. Of a declared rollup everything is the owner's; of the
//! built-in ones we remove the rows of a range ourselves, which the owner may not.

use crate::citus::{self, spread};
use crate::engine::columns;
use crate::engine::groups;
use crate::engine::rollup;
use crate::engine::source::Notice;
use crate::error::{Error, Result};
use crate::litellm::capture::{attached, columns_of_predecessor};
use crate::litellm::raw;
use crate::litellm::spend_log::Capture;
use crate::server::jsonb::Jsonb;
use crate::server::locks::{self, Patience};
use crate::server::relation;
use crate::server::session::{self, Owner};
use crate::server::spi::{self, Found};
use crate::server::text::{SCHEMA, next_midnight, qualified};
use crate::state::captured::CaptureState;
use crate::state::definition::Definition;
use crate::state::fence::Fence;
use crate::state::frozen::{self, Range};
use crate::state::rollups;
use pgrx::datum::Timestamp;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::spi::SpiHeapTupleData;

/// What rollups of one source must equal.
struct Truth {
    /// A query with the source's columns over the range `[$1, $2)`; without one, the source itself.
    query: Option<String>,
    /// The tables that hold the raw rows.
    relations: Vec<pg_sys::Oid>,
    /// As whom they are read.
    owner: Owner,
}

impl Truth {
    fn of(fence: &Fence) -> Result<Truth> {
        if fence.is_built_in() {
            return Truth::captured(&attached()?);
        }
        fence.filled()?;
        Ok(Truth { query: None, relations: vec![fence.relation], owner: Owner::role(fence.owner) })
    }

    fn captured(capture: &CaptureState) -> Result<Truth> {
        let relation = relation::relation_name(capture.relation)?;
        let predecessor = capture.predecessor.map(relation::relation_name).transpose()?;
        let columns = columns_of_predecessor(capture)?;
        let predecessor = predecessor.as_deref().map(|name| (name, Capture { columns: &columns }));
        let query = Capture { columns: &capture.columns }.truth(&relation, predecessor);
        let owner = capture.owner()?;
        Ok(Truth { query: Some(query), relations: capture.relations(), owner })
    }

    /// As a relation.
    fn relation(&self) -> Option<String> {
        self.query.as_ref().map(|query| format!("({query})"))
    }
}

/// What to do with a bucket of which the rollup knows more source rows than there are. Capture saw every
/// deletion by DELETE, so such a day has lost raw rows in another way: a dropped partition, or while nothing
/// was captured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Shrink {
    /// Keep what the rollup says.
    Refuse,
    /// An UPDATE or DELETE was not captured, so fewer may be right, unless all raw rows of the time are gone.
    IfRawReachesBack,
    /// The caller has said so, or a row was moved out of it.
    Allow,
}

/// Recomputes `range` of rollups of one source, under their fences, reading the truth once. Returns the
/// number of groups written; an error has written nothing.
pub fn rebuild(fences: &[&Fence], range: Range, shrink: Shrink) -> Result<i64> {
    rebuild_some(fences, fences, range, shrink)
}

/// The same, where others of `known` may know of rows that are gone: one of `fences` may be new.
pub fn rebuild_some(fences: &[&Fence], known: &[&Fence], range: Range, shrink: Shrink) -> Result<i64> {
    let Some(first) = fences.first() else { return Ok(0) };
    let truth = Truth::of(first)?;
    let distributed = first.filled()?.distribution.is_some();
    if distributed {
        spread::await_end(&first.name, &first.filled()?.table(), Patience::of_call())?;
        require_nodes_not_ahead(first)?;
    }
    // 1. a read lock on the raw rows: from here to the commit nobody can truncate the table or drop a
    //    partition.
    for relation in &truth.relations {
        locks::lock_against_dropping(*relation)?;
    }
    fences.iter().try_for_each(|fence| columns::require_same(fence))?;
    for fence in fences {
        rollup::require_logged(fence.filled()?)?;
    }
    // 2. does the rollup know of rows that are gone?
    match shrink {
        Shrink::Refuse => check_nothing_lost(fences, known, &truth, range)?,
        Shrink::IfRawReachesBack => check_raw_reaches_back(known, range)?,
        Shrink::Allow => {}
    }
    let counted = match shrink == Shrink::Refuse && !first.is_built_in() {
        true => Some(Counts::read(first, range)?),
        false => None,
    };
    // 3. the range's rows go; readers still see them.
    let (start, end) = (range.start, range.end);
    let mut rollups = vec![];
    for fence in fences {
        let definition = fence.filled()?;
        let _rights = fence.act()?;
        spi::run(&definition.clear(), &[start.into(), end.into()])?;
        rollups.push((definition, fence.watermark));
    }
    // 4. truth − tail of each in one statement: one snapshot, newer than the fences.
    if let [(rollup, watermark)] = rollups[..]
        && distributed
    {
        let rights = truth.owner.act();
        let refill = rollup.refill(None, watermark);
        let groups = rollup::naming_nulls(rollup, || spi::execute(&refill, &[start.into(), end.into()]))?;
        drop(rights);
        counted.map_or(Ok(()), |counted| counted.require_all_there(first, range))?;
        return first.note_committed().map(|()| groups);
    }
    let groups = rollup::naming_nulls(first.filled()?, || {
        if groups::are_hashed(first.relation)? {
            let _owner = truth.owner.act();
            if let Some(groups) = groups::refill(&rollups, truth.query.as_deref(), range)? {
                return Ok(groups);
            }
        }
        refill(&rollups, truth, range)
    })?;
    // 5. was a row deleted between the look of step 2 and that of the refill? Of the captured table that is
    //    on record, and its partitions are locked now: was one of them truncated before? Else the rollup was
    //    the only record.
    counted.map_or(Ok(()), |counted| counted.require_all_there(first, range))?;
    if first.is_built_in() && shrink != Shrink::Allow && frozen::is_pending(range)? {
        return Err(Error::RawVanished(first.name.clone()));
    }
    // 6. what one of them did not know, it does now.
    if first.is_built_in() {
        rollups::know(&fences.iter().map(|fence| fence.name.clone()).collect::<Vec<_>>(), range)?;
    }
    Ok(groups)
}

/// The rows of a query, so many in memory at a time.
struct Rows<T> {
    /// `None`: it is read to its end, which closes it.
    cursor: Option<String>,
    batch: std::vec::IntoIter<T>,
}

impl<T> Rows<T> {
    fn none() -> Rows<T> {
        Rows { cursor: None, batch: vec![].into_iter() }
    }

    fn open(sql: &str, range: Range) -> Result<Rows<T>> {
        let cursor = spi::open_cursor(sql, &[range.start.into(), range.end.into()])?;
        Ok(Rows { cursor: Some(cursor), ..Rows::none() })
    }

    fn read_batch(&mut self, row: impl Fn(&SpiHeapTupleData) -> Result<T>) -> Result<()> {
        let Some(cursor) = &self.cursor else { return Ok(()) };
        let batch = spi::fetch(cursor, BATCH, row)?;
        if batch.is_empty() {
            self.cursor = None;
        }
        self.batch = batch.into_iter();
        Ok(())
    }
}

/// How many source rows a rollup knows, by bucket. There may be many: they are read while they are compared.
struct Counts(Rows<(Option<String>, i64)>);

impl Counts {
    /// As they are now, whatever becomes of them before they are compared.
    fn read(fence: &Fence, range: Range) -> Result<Counts> {
        let _rights = fence.act()?;
        let mut counts = Counts(Rows::open(&fence.filled()?.counts(), range)?);
        // From here on it is the executor's: on other nodes it has run.
        counts.read_batch()?;
        Ok(counts)
    }

    fn read_batch(&mut self) -> Result<()> {
        self.0.read_batch(|r| Ok((r.get(1)?, spi::value(r, 2)?)))
    }

    fn next(&mut self) -> Result<Option<(Option<String>, i64)>> {
        if self.0.batch.len() == 0 {
            self.read_batch()?;
        }
        Ok(self.0.batch.next())
    }

    /// Refuses what has fewer rows of a bucket by now.
    fn require_all_there(mut self, fence: &Fence, range: Range) -> Result<()> {
        let mut now = Counts::read(fence, range)?;
        let _rights = fence.act()?;
        let mut found = now.next()?;
        while let Some((bucket, known)) = self.next()? {
            // Both are in the order of the buckets, and there may be new ones.
            while found.as_ref().is_some_and(|(other, _)| *other != bucket) {
                found = now.next()?;
            }
            if known > 0 && found.as_ref().is_none_or(|(_, found)| *found < known) {
                return Err(lost(fence, bucket));
            }
        }
        // A cursor that is read to its end is closed: the next statement may be a DROP TABLE.
        while found.is_some() {
            found = now.next()?;
        }
        Ok(())
    }
}

fn lost(fence: &Fence, bucket: Option<String>) -> Error {
    let bucket = bucket.unwrap_or_else(|| "some time".into());
    Error::RawRowsLost { rollup: fence.name.clone(), bucket }
}

/// What nodes have merged beyond our watermark is not in the tail: it would be in neither.
fn require_nodes_not_ahead(fence: &Fence) -> Result<()> {
    let known = fence.watermark;
    match rollup::merged_on_nodes(fence, fence.filled()?)?.filter(|merged| *merged > known) {
        None => Ok(()),
        Some(merged) => Err(Error::NodesAhead { rollup: fence.name.clone(), merged, known }),
    }
}

/// Inserts truth − tail in SQL, which reads the truth once. Returns the number of groups.
fn refill(rollups: &[(&Definition, i64)], truth: Truth, range: Range) -> Result<i64> {
    let name = truth.query.as_ref().map(|_| "truth");
    let refilled = rollups.iter().enumerate();
    let refilled = refilled
        .map(|(i, (d, watermark))| format!("refilled_{i} AS ({} RETURNING 1)", d.refill(name, *watermark)));
    let parts: Vec<String> =
        truth.query.iter().map(|query| format!("truth AS ({query})")).chain(refilled).collect();
    let counts: Vec<String> =
        (0..rollups.len()).map(|i| format!("(SELECT count(*) FROM refilled_{i})")).collect();
    let sql = format!("WITH {} SELECT {}", parts.join(", "), counts.join(" + "));
    let arguments = [range.start.into(), range.end.into()];
    let groups = truth.owner.fresh(&sql, &arguments, |r| spi::value::<i64>(r, 1)).one()?;
    Ok(groups.unwrap_or(0))
}

/// Refuses to recompute a bucket of which one of `known` knows more rows than there are.
fn check_nothing_lost(fences: &[&Fence], known: &[&Fence], truth: &Truth, range: Range) -> Result<()> {
    let Some((fence, definition)) = smallest(known.iter().copied()) else { return Ok(()) };
    // On its own first backfill a rollup knows next to nothing, and the days need to be read only once. What
    // is only in the change log is known, too: where the rows are gone, nothing would be left after the
    // merge. Where the source itself is the truth, its rows above the watermark are in both.
    if fences.iter().any(|computed| computed.name == fence.name) {
        let known = if fence.is_built_in() { definition.knows_rows() } else { definition.has_rows() };
        let _owner = truth.owner.act();
        if !spi::exists(&known, &[range.start.into(), range.end.into()])? {
            return Ok(());
        }
    }
    match last_lost_bucket(fence, definition, truth, range)? {
        None => Ok(()),
        Some(bucket) => Err(lost(fence, bucket)),
    }
}

/// Rollups of the same rows know the same number of them, but for those that expand a row: the smallest will
/// do.
pub fn smallest<'a>(fences: impl Iterator<Item = &'a Fence>) -> Option<(&'a Fence, &'a Definition)> {
    let definitions = fences.filter_map(|f| f.definition.as_ref().map(|d| (f, d)));
    definitions.min_by_key(|(_, d)| (!d.expansion.is_empty(), d.dimensions.len()))
}

/// The bucket's time is `None` where it has none.
fn last_lost_bucket(
    fence: &Fence,
    definition: &Definition,
    truth: &Truth,
    range: Range,
) -> Result<Option<Option<String>>> {
    truth
        .owner
        .fresh(
            &definition.last_lost_bucket(truth.relation().as_deref(), fence.watermark),
            &[range.start.into(), range.end.into()],
            |r| Ok(r.get::<String>(1)?),
        )
        .one()
}

/// Whether the rollup, its tail included, knows of more rows in the range than there are.
pub fn has_lost_rows(fence: &Fence, definition: &Definition, range: Range) -> Result<bool> {
    Ok(last_lost_bucket(fence, definition, &Truth::of(fence)?, range)?.is_some())
}

/// Whether the smallest of the rollups, its tail included, says of the range what the truth says.
pub fn is_exact(fences: &[Fence], range: Range) -> Result<bool> {
    let Some((fence, definition)) = smallest(fences.iter()) else { return Ok(true) };
    let truth = Truth::of(fence)?;
    for relation in &truth.relations {
        locks::lock_against_dropping(*relation)?;
    }
    let differences = definition.compare(truth.relation().as_deref(), true);
    let sql = format!("SELECT FROM ({differences}) AS differences LIMIT 1");
    Ok(!truth.owner.fresh(&sql, &[range.start.into(), range.end.into()], |_| Ok(())).any()?)
}

/// Refuses to recompute days that the rollups know and that are older than every raw row.
fn check_raw_reaches_back(fences: &[&Fence], range: Range) -> Result<()> {
    let first = raw::first_day(&attached()?)?.unwrap_or_else(Timestamp::positive_infinity);
    let end = range.end.filter(|end| *end < first).unwrap_or(first);
    // As a rule: then not even the tail is read.
    if range.start >= end {
        return Ok(());
    }
    for fence in fences {
        if spi::exists(&fence.filled()?.knows_rows(), &[range.start.into(), end.into()])? {
            return Err(frozen::error(&fence.name, &[Range { start: range.start, end: Some(end) }]));
        }
    }
    Ok(())
}

// ---- SQL calls -------------------------------------------------------------------------------------------

/// `spend_rollup_rebuild()`: the whole range in the caller's transaction; without a name, of all built-in
/// rollups.
///
/// Forced, the built-in rollups become what the table holds now. What they knew beyond that is on record in
/// the ledger and as frozen days, which is common to them: so it is forgotten for all of them at once, or the
/// next rebuild would bring it back.
pub fn rebuild_range(
    caller: pg_sys::Oid,
    name: Option<&str>,
    start: Option<Timestamp>,
    end: Option<Timestamp>,
    force: bool,
) -> Result<i64> {
    let patience = Patience::of_call();
    let one = name.map(Fence::look).transpose()?.filter(|fence| !(force && fence.is_built_in()));
    // Of the built-in ones all are held: another may know of rows that are gone.
    let known = match &one {
        Some(fence) if !fence.is_built_in() => vec![Fence::require(&fence.name, patience)?],
        _ => Fence::require_all(&attached()?.source, patience)?,
    };
    let known: Vec<&Fence> = known.iter().collect();
    let is_meant = |fence: &&&Fence| one.as_ref().is_none_or(|one| one.name == fence.name);
    let fences: Vec<&Fence> = known.iter().filter(is_meant).copied().collect();
    let Some(first) = fences.first() else { return Ok(0) };
    require_right(caller, first)?;
    let range = Range { start: start.unwrap_or_else(Timestamp::negative_infinity), end };
    check_range(first, range)?;
    if force && first.is_built_in() {
        frozen::thaw(range)?;
    }
    show(one.as_ref())?;
    let frozen = frozen_parts(first, range)?;
    if !frozen.is_empty() {
        return Err(frozen::error(&first.name, &frozen));
    }
    rebuild_some(&fences, &known, range, if force { Shrink::Allow } else { Shrink::Refuse })
}

/// Lets spend_progress show it: until the transaction ends other sessions see nothing of it but its locks.
/// Nobody waits for this one, nor we for whoever has it: anybody may take it.
fn show(rollup: Option<&Fence>) -> Result<()> {
    let view =
        rollup.map(|fence| relation::find_relation(&qualified(SCHEMA, &fence.name))).transpose()?.flatten();
    let key = view.map_or(0, |oid| oid.to_u32() as i32);
    spi::run(&format!("SELECT pg_catalog.pg_try_advisory_xact_lock_shared({REBUILD}, $1)"), &[key.into()])
}

/// The first key of that lock, which spend_progress knows; the second is the rollup's live view, or 0 for all
/// built-in ones.
const REBUILD: i32 = 0x7370_656e;

/// The built-in rollups are for the captured table's owner to use, the others for their own.
pub fn require_right(caller: pg_sys::Oid, fence: &Fence) -> Result<()> {
    if fence.is_built_in() {
        session::require_owner(caller, attached()?.relation)
    } else {
        session::require_role(caller, fence.owner, &fence.name)
    }
}

fn check_range(fence: &Fence, range: Range) -> Result<()> {
    let definition = fence.filled()?;
    let begins_before_it_ends =
        spi::query("SELECT $1 < coalesce($2, 'infinity')", &[range.start.into(), range.end.into()], |r| {
            spi::value::<bool>(r, 1)
        })?;
    let mut valid = begins_before_it_ends == [true];
    for border in std::iter::once(range.start).chain(range.end) {
        valid &= is_border(fence, definition, border)?;
    }
    if !valid {
        return Err(Error::Range { rollup: fence.name.clone(), bucketed: definition.bucket.is_some() });
    }
    Ok(())
}

/// The parts of the range that only the built-in rollups have a record of. Where they have none either,
/// nothing is missing.
fn frozen_parts(fence: &Fence, range: Range) -> Result<Vec<Range>> {
    if !fence.is_built_in() {
        return Ok(vec![]);
    }
    let all = rollups::rollup_names(fence.source.as_deref())?;
    let all = all.iter().map(|name| Fence::look(name)).collect::<Result<Vec<_>>>()?;
    let Some((_, definition)) = smallest(all.iter()) else { return Ok(vec![]) };
    let knows_rows = format!("{} LIMIT 1", definition.knows_rows());
    let mut parts = vec![];
    for part in frozen::frozen_in(range)? {
        // Without an XID, which a standby does not give.
        if spi::current(&knows_rows, &[part.start.into(), part.end.into()], |_| Ok(())).any()? {
            parts.push(part);
        }
    }
    Ok(parts)
}

/// A range ends where buckets do. For the built-in rollups that is at midnight.
fn is_border(fence: &Fence, definition: &Definition, border: Timestamp) -> Result<bool> {
    let sql = match definition.is_border() {
        _ if fence.is_built_in() => "SELECT $1 = date_trunc('day', $1)".into(),
        Some(sql) => sql,
        None => return Ok(border.is_neg_infinity()),
    };
    let _rights = fence.act()?;
    let answers = spi::query(&sql, &[border.into()], |r| Ok(r.get::<bool>(1)?))?;
    Ok(answers == [Some(true)])
}

/// A group in which rollup + tail and truth differ: its key and both sides.
pub type Difference = (Jsonb, Option<Jsonb>, Option<Jsonb>);

/// All of them. There may be as many as the rollup has groups: they are read while they are returned.
pub struct Differences {
    comparison: String,
    /// What it reads, and as whom.
    relations: Vec<pg_sys::Oid>,
    owner: Owner,
    parts: std::vec::IntoIter<Range>,
    rows: Rows<Difference>,
}

/// Rows that are in memory at a time: two million took 6.2 GB at once (debug build, PostgreSQL 15, 2026-11).
const BATCH: i64 = 1000;

impl Differences {
    fn next_batch(&mut self) -> Result<()> {
        let _owner = self.owner.act();
        if self.rows.cursor.is_none() {
            relation::lock_for_reading(&self.relations)?;
        }
        while self.rows.batch.len() == 0 {
            if self.rows.cursor.is_none() {
                let Some(part) = self.parts.next() else { break };
                self.rows = Rows::open(&self.comparison, part)?;
            }
            // As text: a jsonb would be read in the transaction's memory, and leave 200 bytes there.
            self.rows
                .read_batch(|r| Ok((Jsonb(spi::value(r, 1)?), r.get(2)?.map(Jsonb), r.get(3)?.map(Jsonb))))?;
        }
        Ok(())
    }
}

impl Iterator for Differences {
    type Item = Difference;

    fn next(&mut self) -> Option<Difference> {
        if self.rows.batch.len() == 0
            && let Err(error) = self.next_batch()
        {
            ErrorReport::from(error).report(PgLogLevel::ERROR);
        }
        self.rows.batch.next()
    }
}

/// `spend_rollup_verify()`: the groups that differ, in one snapshot, and what the caller should know. None is
/// the only pass: a range of which nothing can be compared, or that starts in frozen days, is refused.
pub fn verify(
    caller: pg_sys::Oid,
    name: &str,
    start: Option<Timestamp>,
    end: Option<Timestamp>,
) -> Result<(Differences, Vec<Notice>)> {
    let fence = Fence::look(name)?;
    require_right(caller, &fence)?;
    let range = Range { start: start.unwrap_or_else(Timestamp::negative_infinity), end };
    check_range(&fence, range)?;
    let frozen = frozen_parts(&fence, range)?;
    let parts = if frozen.is_empty() { vec![range] } else { frozen::unfrozen_in(range)? };
    if parts.is_empty() || start.is_some() && frozen.iter().any(|frozen| frozen.start == range.start) {
        return Err(frozen::error(name, &frozen));
    }
    columns::require_same(&fence)?;
    let truth = Truth::of(&fence)?;
    let tables = fence.filled()?.tables();
    let tables = tables.iter().map(|table| relation::find_relation(table)).collect::<Result<Vec<_>>>()?;
    let tables = tables.into_iter().flatten().chain([fence.relation]);
    let with_tail = fence.filled()?.distribution.is_some() || !citus::is_distributed(fence.relation)?;
    let differences = Differences {
        comparison: fence.filled()?.compare(truth.relation().as_deref(), with_tail),
        relations: truth.relations.iter().copied().chain(tables).collect(),
        owner: truth.owner,
        parts: parts.into_iter(),
        rows: Rows::none(),
    };
    let not_compared = (!frozen.is_empty()).then(|| Notice {
        message: format!("frozen days of rollup \"{name}\" were not compared: {}", frozen::describe(&frozen)),
        hint: "Raw rows of these days are gone; the rollup is their only record.".into(),
    });
    let put_back = if fence.is_built_in() { put_back(&truth, range, &frozen)? } else { None };
    Ok((differences, not_compared.into_iter().chain(put_back).collect()))
}

/// As many as a HINT has room for.
const MOST_REBUILDS: usize = 3;

/// Says on which days rows count that are not in the table any more, beside rows that are. As a rule that is
/// so on the day at which retention has arrived; but whoever takes rows out and puts them back sees them
/// twice.
fn put_back(truth: &Truth, range: Range, frozen: &[Range]) -> Result<Option<Notice>> {
    let day = |first: &str, last: &str| {
        format!("tsrange(date_trunc('day', {first}), nullif({}, 'infinity'))", next_midnight(last))
    };
    let mut raw = vec![];
    for relation in &truth.relations {
        raw.push(format!("SELECT \"startTime\" AS at FROM {}", relation::relation_name(*relation)?));
    }
    let raw = raw.join(" UNION ALL ");
    let sql = format!(
        "SELECT lower(part), upper(part) FROM (
             SELECT range_agg({retired}) AS days
             FROM (SELECT DISTINCT date_trunc('day', hour) AS day FROM litellm_spend.retired
                   WHERE hour >= $1 AND ($2 IS NULL OR hour < $2)) AS retired
             WHERE EXISTS (SELECT FROM ({raw}) AS raw WHERE at >= day AND (at < {next} OR day = 'infinity'))
             UNION ALL
             SELECT range_agg({found})
             FROM unnest($3::timestamp[], $4::timestamp[]) AS frozen(first, last),
                  LATERAL (SELECT DISTINCT date_trunc('day', at) AS day FROM ({raw}) AS raw
                           WHERE at >= first AND (last IS NULL OR at < last)) AS found) AS both_kinds,
             unnest(days) AS part ORDER BY 1",
        retired = day("day", "day"),
        next = next_midnight("day"),
        found = day("day", "day"),
    );
    let (starts, ends): (Vec<_>, Vec<_>) = frozen.iter().map(|range| (range.start, range.end)).unzip();
    let args = [range.start.into(), range.end.into(), starts.into(), ends.into()];
    let days = truth
        .owner
        .current(&truth.relations, &sql, &args, |r| Ok(Range { start: spi::value(r, 1)?, end: r.get(2)? }))?;
    if days.is_empty() {
        return Ok(None);
    }
    // Days between them may have no raw row left: nothing but the rollups knows of those.
    let rebuilds = days.iter().take(MOST_REBUILDS).map(|days| {
        let end = days.end.map_or("NULL".into(), |end| format!("'{end}'"));
        format!("SELECT spend_rollup_rebuild(NULL, '{}', {end}, force => true);", days.start)
    });
    let rebuilds = rebuilds.collect::<Vec<_>>().join(" ");
    let more = if days.len() > MOST_REBUILDS { " And so on for the other days." } else { "" };
    Ok(Some(Notice {
        message: format!(
            "rows that were deleted still count, beside rows that are there: {}",
            frozen::describe(&days)
        ),
        hint: format!(
            "If the others only expired, do nothing. If they are the same rows, put back, they count twice: \
             {rebuilds}{more} It makes all built-in rollups equal the table on those days."
        ),
    }))
}

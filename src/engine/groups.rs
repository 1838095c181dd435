//! Merges a window, or computes a range anew, through a hash table of ours, where PostgreSQL's aggregation
//! would take longer than all the rest: it calls a function for each value of each row, and each rollup of a
//! source reads the rows anew.
//!
//! ```text
//!   SELECT dimensions, states          one scan for all rollups     each found by its key, and
//!   FROM source WHERE …       ──row──> table of groups a rollup ──> replaced or put in (`keyed`)
//!   (the executor, as the owner)       (here: bytes and numbers)    (as the owner)
//! ```
//!
//! Whatever means something is done by the server: which rows, the expressions, what is the same key, a row's
//! place. Here values are compared byte by byte, and numbers added. So only dimensions are covered whose
//! equal values have equal bytes, and states whose sum is one of integers or numerics, or a least or greatest
//! integer or time. For all else, and for what Citus distributes, [`Definition::merge`] and
//! [`Definition::refill`] do the same in SQL. A rollup's table to which its owner has added something of
//! which a statement takes note, a trigger say, is written by `INSERT … ON CONFLICT` out of the groups.
//!
//! Memory: the groups may take as much as PostgreSQL gives to a hash table in maintenance, and where a
//! statement writes them, `maintenance_work_mem` more. When they reach that they are thrown away and SQL
//! merges the window, which spills to disk. Writing a part of them would cost more: those groups would come
//! again, and each be found and changed in the table.
//!
//! Nobody else writes to the table meanwhile: who merges or rebuilds a rollup has its fence. Should its owner
//! change a row by hand, either waits for the other, and who comes second fails and begins again.

use crate::citus;
use crate::engine::decimal::Decimal;
use crate::engine::key::{Bytes, Whole};
use crate::engine::statements::GROUPS;
use crate::error::{Error, Result};
use crate::guc;
use crate::server::keyed::Keyed;
use crate::server::relation;
use crate::server::session::Elevated;
use crate::server::spi::Args;
use crate::server::stream::{self, Opened, Query, Sink};
use crate::server::varlena;
use crate::state::definition::{Combine, Definition};
use crate::state::frozen::Range;
use hashbrown::{DefaultHashBuilder, HashTable};
use pgrx::prelude::*;
use std::hash::BuildHasher;
use std::mem;

/// Whether groups of a source are to be hashed here. What nodes have they add up themselves.
pub fn are_hashed(source: pg_sys::Oid) -> Result<bool> {
    Ok(guc::hash_groups() && !citus::is_distributed(source)?)
}

/// Source rows, where they are counted, and groups.
pub type Counts = (Option<i64>, i64);

/// Adds the rows of a window to rollups of one source. `None`: that cannot be done here, and nothing was.
pub fn merge(rollups: &[&Definition], start: i64, end: i64) -> Result<Option<Vec<Counts>>> {
    let Some(mut scans) = scans(rollups.iter().map(|rollup| (*rollup, 0)))? else { return Ok(None) };
    let sql = |scan: &Scan| scan.rollups[0].definition.window_rows(&scan.expressions());
    if !run(&mut scans, sql, &[start.into(), end.into()])? {
        return Ok(None);
    }
    let mut counts = vec![(None, 0); rollups.len()];
    for scan in &scans {
        scan.rollups.iter().for_each(|rollup| counts[rollup.place] = (Some(scan.rows), rollup.written));
    }
    Ok(Some(counts))
}

/// Inserts `truth − tail` of a range, as [`Definition::refill`] does, for rollups of one source with their
/// watermarks. Returns the number of groups; `None`: as of [`merge`].
///
/// What is read is the owner's of the truth, as whom we act. Tables that are ours are written as ourselves:
/// that owner may not change what is there.
pub fn refill(rollups: &[(&Definition, i64)], truth: Option<&str>, range: Range) -> Result<Option<i64>> {
    let Some(mut scans) = scans(rollups.iter().copied())? else { return Ok(None) };
    for rollup in scans.iter_mut().flat_map(|scan| &mut scan.rollups) {
        rollup.refills = true;
        rollup.is_ours = truth.is_some();
    }
    let sql = |scan: &Scan| scan.rollups[0].definition.refill_rows(&scan.columns, truth, scan.watermark);
    let done = run(&mut scans, sql, &[range.start.into(), range.end.into()])?;
    let written = scans.iter().flat_map(|scan| &scan.rollups).map(|rollup| rollup.written);
    Ok(done.then(|| written.sum()))
}

/// Those that are computed of the same rows together. `None`: states cannot be added here.
fn scans<'a>(rollups: impl Iterator<Item = (&'a Definition, i64)>) -> Result<Option<Vec<Scan<'a>>>> {
    let mut scans: Vec<Scan> = vec![];
    for (place, (rollup, watermark)) in rollups.enumerate() {
        if rollup.has_aggregates() {
            return Ok(None);
        }
        let alike =
            |scan: &&mut Scan| scan.watermark == watermark && scan.rollups[0].definition.reads_as(rollup);
        match scans.iter_mut().find(alike) {
            Some(scan) => scan.add(place, rollup)?,
            None => {
                let mut scan = Scan { watermark, ..Scan::default() };
                scan.add(place, rollup)?;
                scans.push(scan);
            }
        }
    }
    Ok(Some(scans))
}

/// Reads the rows of all, and writes their groups. `false`: a type is not covered or has changed meanwhile,
/// or there are too many groups, and nothing was done.
fn run(scans: &mut [Scan], sql: impl Fn(&Scan) -> String, arguments: Args) -> Result<bool> {
    // Before the queries are parsed, which can call whoever would like to have more.
    let mut most = most_memory();
    let queries = scans.iter().map(|scan| Query::new(&sql(scan), arguments));
    let queries = queries.collect::<Result<Vec<_>>>()?;
    if !scans.iter_mut().zip(&queries).all(|(scan, query)| scan.covers(&query.columns)) {
        return Ok(false);
    }
    for (scan, query) in scans.iter_mut().zip(&queries) {
        scan.most = most;
        if !query.read(arguments, scan)? || scan.is_full {
            return Ok(false);
        }
        most -= scan.memory();
    }
    scans.iter_mut().flat_map(|scan| &mut scan.rollups).try_for_each(Rollup::write)?;
    Ok(true)
}

/// Bytes that a hash table may take in maintenance.
fn most_memory() -> usize {
    // SAFETY: reads two settings, the first in kilobytes.
    let (most, times) = unsafe { (pg_sys::maintenance_work_mem, pg_sys::hash_mem_multiplier) };
    (f64::from(most) * 1024.0 * times) as usize
}

/// Rollups that are computed of the same rows.
#[derive(Default)]
struct Scan<'a> {
    /// Expressions over the source, each once, and whether it is a measure's.
    columns: Vec<(&'a str, bool)>,
    watermark: i64,
    rollups: Vec<Rollup<'a>>,
    rows: i64,
    /// What its groups may take, and that they would have taken more.
    most: usize,
    is_full: bool,
}

struct Rollup<'a> {
    /// Which of those that are merged.
    place: usize,
    definition: &'a Definition,
    /// It stays open from when its columns are read until they are written: the source's expressions run code
    /// of the owner's, whose table it may be.
    table: Opened,
    dimensions: Vec<Dimension>,
    measures: Vec<Measure>,
    groups: Groups,
    written: i64,
    /// Its range was cleared: a group that is there all the same is an error, as of [`Definition::refill`].
    refills: bool,
    /// It is refilled with the difference of a truth and a tail, which may be nothing.
    is_ours: bool,
}

/// A type and its modifier, -1 where it has none.
type Typed = (pg_sys::Oid, i32);

struct Dimension {
    /// Which column of the scan.
    column: usize,
    /// Which of the rollup's table.
    attribute: usize,
    /// The type of that and its modifier, which its owner may have changed.
    r#type: Typed,
    bytes: Bytes,
}

struct Measure {
    column: usize,
    attribute: usize,
    r#type: Typed,
    /// What is read of the source, and of the rollup's table.
    number: Number,
    stored: Number,
    combine: Combine,
}

#[derive(Clone, Copy)]
enum Number {
    Whole(Whole),
    Numeric,
}

const INTEGERS: [pg_sys::Oid; 3] = [pg_sys::INT2OID, pg_sys::INT4OID, pg_sys::INT8OID];

impl<'a> Scan<'a> {
    fn add(&mut self, place: usize, definition: &'a Definition) -> Result<()> {
        let name = definition.table();
        let table = relation::find_relation(&name)?.ok_or(Error::NoTable(name))?;
        let table = Opened::new(table);
        let attributes = table.columns();
        // One that its owner has dropped has no type, and is not covered.
        let attribute = |name: &str| {
            let at = attributes.iter().position(|(found, ..)| found == name);
            at.map_or((0, (pg_sys::InvalidOid, -1)), |at| (at, (attributes[at].1, attributes[at].2)))
        };
        let columns = &mut self.columns;
        let mut column = |expression: &'a str, is_measure: bool| {
            columns.iter().position(|column| *column == (expression, is_measure)).unwrap_or_else(|| {
                columns.push((expression, is_measure));
                columns.len() - 1
            })
        };
        // What is read is known when the server says its types.
        let dimensions = definition.dimensions.iter().map(|d| {
            let (attribute, r#type) = attribute(&d.column.name);
            Dimension { column: column(&d.column.expression, false), attribute, r#type, bytes: Bytes::Text }
        });
        let dimensions = dimensions.collect();
        let measures = definition.measures.iter().map(|m| {
            let (attribute, r#type) = attribute(&m.column.name);
            let (column, combine) = (column(&m.column.expression, true), m.combine.clone());
            Measure { column, attribute, r#type, number: Number::Numeric, stored: Number::Numeric, combine }
        });
        let measures = measures.collect();
        let groups = Groups::default();
        let rollup = Rollup {
            place,
            definition,
            table,
            dimensions,
            measures,
            groups,
            written: 0,
            refills: false,
            is_ours: false,
        };
        self.rollups.push(rollup);
        Ok(())
    }

    fn expressions(&self) -> Vec<&str> {
        self.columns.iter().map(|(expression, _)| *expression).collect()
    }

    fn covers(&mut self, columns: &[(pg_sys::Oid, i32, pg_sys::Oid)]) -> bool {
        self.rollups.iter_mut().all(|rollup| rollup.covers(columns).is_some())
    }

    fn memory(&self) -> usize {
        self.rollups.iter().map(|rollup| rollup.groups.memory()).sum()
    }
}

impl Sink for Scan<'_> {
    fn row(&mut self, values: &[pg_sys::Datum], nulls: &[bool]) -> bool {
        self.rows += 1;
        let added = self.rollups.iter_mut().all(|rollup| rollup.add(values, nulls).is_some());
        self.is_full = !added || self.memory() > self.most;
        !self.is_full
    }
}

/// Whether a column takes values of a type without fitting them.
fn takes_as_it_is(column: Typed, value: Typed) -> bool {
    column.0 == value.0 && [-1, value.1].contains(&column.1)
}

impl Rollup<'_> {
    /// Takes note of the types, if there is nothing among them that cannot be done here.
    fn covers(&mut self, columns: &[(pg_sys::Oid, i32, pg_sys::Oid)]) -> Option<()> {
        for dimension in &mut self.dimensions {
            let (r#type, modifier, collation) = columns[dimension.column];
            takes_as_it_is(dimension.r#type, (r#type, modifier)).then_some(())?;
            dimension.bytes = Bytes::of(r#type, collation)?;
        }
        for measure in &mut self.measures {
            let (r#type, modifier, _) = columns[measure.column];
            let to = measure.r#type.0;
            // A sum has no modifier; the server would fit it to that of the column.
            let added = if matches!(measure.combine, Combine::Sum) { -1 } else { modifier };
            takes_as_it_is(measure.r#type, (to, added)).then_some(())?;
            measure.number = match &measure.combine {
                Combine::Sum if r#type == pg_sys::NUMERICOID && to == r#type => Number::Numeric,
                Combine::Sum if INTEGERS.contains(&r#type) => {
                    [pg_sys::INT8OID, pg_sys::NUMERICOID].contains(&to).then_some(())?;
                    Number::Whole(Whole::of(r#type)?)
                }
                Combine::Min | Combine::Max if r#type == to => Number::Whole(Whole::of(r#type)?),
                _ => return None,
            };
            if to != pg_sys::NUMERICOID {
                measure.stored = Number::Whole(Whole::of(to)?);
            }
        }
        Some(())
    }

    /// `None`: there is no memory for its group.
    fn add(&mut self, values: &[pg_sys::Datum], nulls: &[bool]) -> Option<()> {
        let mut key = mem::take(&mut self.groups.scratch);
        key.clear();
        for dimension in &self.dimensions {
            // NULLs last, and equal.
            key.push(u8::from(nulls[dimension.column]));
            if !nulls[dimension.column] {
                dimension.bytes.write(values[dimension.column], &mut key)?;
            }
        }
        let (states, decimals) = self.groups.states(&key, self.measures.len())?;
        for (measure, state) in self.measures.iter().zip(states) {
            if !nulls[measure.column] {
                *decimals -= state.memory();
                state.add(&measure.combine, measure.number, values[measure.column]);
                *decimals += state.memory();
            }
        }
        self.groups.scratch = key;
        Some(())
    }

    /// Writes the groups, in the order of their keys.
    fn write(&mut self) -> Result<()> {
        let mut order: Vec<usize> = (0..self.groups.len()).collect();
        if self.is_ours {
            let (groups, count) = (&self.groups, self.measures.len());
            let states = |group: usize| &groups.states[group * count..][..count];
            order.retain(|group| !states(*group).iter().all(State::is_zero));
        }
        if order.is_empty() {
            return Ok(());
        }
        order.sort_unstable_by(|a, b| self.groups.key(*a).cmp(self.groups.key(*b)));
        pgrx::check_for_interrupts!();
        self.written = order.len() as i64;
        let _ourselves = self.is_ours.then(Elevated::enter).transpose()?;
        let key: Vec<usize> = self.dimensions.iter().map(|dimension| dimension.attribute).collect();
        match Keyed::open(self.table.oid(), &key, key.len() + self.measures.len()) {
            Some(table) => self.write_by_key(table, &order),
            None => self.write_in_sql(&order),
        }
    }

    fn write_by_key(&mut self, mut table: Keyed, order: &[usize]) -> Result<()> {
        let count = self.measures.len();
        let mut row = table.row();
        for group in order {
            table.make(|| self.key_values(*group, &mut row.values, &mut row.nulls));
            let found = !self.refills && table.find(&row);
            if found {
                let states = &mut self.groups.states[group * count..][..count];
                for (measure, state) in self.measures.iter().zip(states) {
                    if let Some(value) = table.found(measure.attribute) {
                        state.add(&measure.combine, measure.stored, value);
                    }
                }
            }
            table.make(|| self.measure_values(*group, &mut row.values, &mut row.nulls))?;
            match found {
                true => table.replace(&mut row),
                false => table.insert(&mut row),
            }
        }
        table.finish();
        Ok(())
    }

    /// A table that its owner has changed may ask of a statement what only the server does.
    fn write_in_sql(&self, order: &[usize]) -> Result<()> {
        let mut rest = order.iter();
        let next = |values: &mut [pg_sys::Datum], nulls: &mut [bool]| {
            let Some(group) = rest.next() else { return Ok(false) };
            self.key_values(*group, values, nulls);
            self.measure_values(*group, values, nulls)?;
            Ok(true)
        };
        stream::run_over(&self.definition.write_groups(GROUPS), GROUPS, &self.table, next)
    }

    fn key_values(&self, group: usize, values: &mut [pg_sys::Datum], nulls: &mut [bool]) {
        let mut key = self.groups.key(group);
        for dimension in &self.dimensions {
            let null = key[0] != 0;
            key = &key[1..];
            nulls[dimension.attribute] = null;
            if !null {
                values[dimension.attribute] = dimension.bytes.read(&mut key);
            }
        }
    }

    fn measure_values(&self, group: usize, values: &mut [pg_sys::Datum], nulls: &mut [bool]) -> Result<()> {
        let states = &self.groups.states[group * self.measures.len()..];
        for (measure, state) in self.measures.iter().zip(states) {
            let value = state.value(measure)?;
            nulls[measure.attribute] = value.is_none();
            values[measure.attribute] = value.unwrap_or(pg_sys::Datum::null());
        }
        Ok(())
    }
}

/// The groups of a rollup: keys, one behind the other, and as many states for each as there are measures.
#[derive(Default)]
struct Groups {
    table: HashTable<usize>,
    hasher: DefaultHashBuilder,
    keys: Vec<u8>,
    /// Where each key ends.
    ends: Vec<usize>,
    states: Vec<State>,
    /// What decimals among the states take beside them.
    decimals: usize,
    scratch: Vec<u8>,
}

impl Groups {
    fn len(&self) -> usize {
        self.ends.len()
    }

    fn key(&self, group: usize) -> &[u8] {
        key(&self.keys, &self.ends, group)
    }

    /// The states of a key, which is new or not, and what the decimals of all take. `None`: there is no
    /// memory for a new one. To find that out later would end the process, and all others of the server with
    /// it.
    fn states(&mut self, wanted: &[u8], measures: usize) -> Option<(&mut [State], &mut usize)> {
        let Groups { table, hasher, keys, ends, states, decimals, .. } = self;
        let hash = hasher.hash_one(wanted);
        let group = match table.find(hash, |group| key(keys, ends, *group) == wanted) {
            Some(group) => *group,
            None => {
                let group = ends.len();
                keys.try_reserve(wanted.len()).ok()?;
                ends.try_reserve(1).ok()?;
                states.try_reserve(measures).ok()?;
                table.try_reserve(1, |group| hasher.hash_one(key(keys, ends, *group))).ok()?;
                keys.extend(wanted);
                ends.push(keys.len());
                states.resize_with(states.len() + measures, State::default);
                table.insert_unique(hash, group, |group| hasher.hash_one(key(keys, ends, *group)));
                group
            }
        };
        Some((&mut states[group * measures..][..measures], decimals))
    }

    fn memory(&self) -> usize {
        self.keys.capacity()
            + self.ends.capacity() * mem::size_of::<usize>()
            + self.table.allocation_size()
            + self.states.capacity() * mem::size_of::<State>()
            + self.decimals
            + self.scratch.capacity()
    }
}

fn key<'a>(keys: &'a [u8], ends: &[usize], group: usize) -> &'a [u8] {
    let start = if group == 0 { 0 } else { ends[group - 1] };
    &keys[start..ends[group]]
}

/// What the rows of a group have come to, for one measure.
#[derive(Default)]
enum State {
    /// NULL: no row had a value.
    #[default]
    None,
    Whole(i64),
    Decimal(Box<Decimal>),
}

impl State {
    fn add(&mut self, combine: &Combine, number: Number, value: pg_sys::Datum) {
        match number {
            Number::Whole(whole) => self.add_whole(combine, whole.read(value)),
            Number::Numeric => {
                varlena::with_content(value, |numeric| self.add_decimal(Decimal::new(numeric)))
            }
        }
    }

    fn add_whole(&mut self, combine: &Combine, value: i64) {
        match (&mut *self, combine) {
            (State::None, _) => *self = State::Whole(value),
            (State::Whole(state), Combine::Min) => *state = value.min(*state),
            (State::Whole(state), Combine::Max) => *state = value.max(*state),
            (State::Whole(state), _) => match state.checked_add(value) {
                Some(sum) => *state = sum,
                None => self.add_decimal(value.into()),
            },
            (State::Decimal(_), _) => self.add_decimal(value.into()),
        }
    }

    /// What it takes beside itself.
    fn memory(&self) -> usize {
        match self {
            State::Decimal(sum) => mem::size_of::<Decimal>() + 2 * mem::size_of::<usize>() + sum.memory(),
            State::None | State::Whole(_) => 0,
        }
    }

    /// Adding it changes nothing.
    fn is_zero(&self) -> bool {
        match self {
            State::None | State::Whole(0) => true,
            State::Decimal(sum) => sum.is_zero(),
            State::Whole(_) => false,
        }
    }

    fn add_decimal(&mut self, value: Decimal) {
        match self {
            State::None => *self = State::Decimal(Box::new(value)),
            State::Whole(sum) => {
                let mut sum = Decimal::from(*sum);
                sum.add(&value);
                *self = State::Decimal(Box::new(sum));
            }
            State::Decimal(sum) => sum.add(&value),
        }
    }

    /// As the table has it. A sum may be more than its type holds, as PostgreSQL's own cast says.
    fn value(&self, measure: &Measure) -> Result<Option<pg_sys::Datum>> {
        let numeric = measure.r#type.0 == pg_sys::NUMERICOID;
        Ok(match self {
            State::None => None,
            State::Whole(value) if numeric => Decimal::from(*value).datum(),
            State::Whole(value) => Some((*value).into()),
            State::Decimal(sum) if numeric => Some(sum.datum().ok_or(Error::NumericOverflows)?),
            State::Decimal(sum) => Some(sum.integer().ok_or(Error::OutOfRange)?.into()),
        })
    }
}

//! Turns a plain table into a range-partitioned one without copying a row: the old table becomes the
//! partition of all times before the cutover.
//!
//! ```text
//!  step       lock on the table                     for how long
//!  index      SHARE UPDATE EXCLUSIVE                the build; concurrently, nobody waits
//!  swap       ACCESS EXCLUSIVE, and on its views    milliseconds: only catalogs change
//! ```
//! Exclusive locks are waited for at most `litellm_spend.swap_lock_timeout`; who waits for the build, with
//! writers behind, ends it (`worker::give_way`). What has been done is read from the catalogs each time, so
//! a conversion goes on from wherever it was interrupted.
//!
//! That the old table's rows are before the cutover, an index on the time column proves under the swap's lock
//! (`proof`): no row is ever refused, and nothing is read. A table without one is refused: only a CHECK could
//! prove it then, which would refuse users' rows from the cutover on. Older versions made such a CHECK; one
//! that is found is removed first of all.
//!
//! Whose rights: everything is done to the table as its owner, the building of the index included; only what
//! notes how far we are is ours. When the table has another owner, the conversion stops.

use crate::error::{Error, Result};
use crate::guc;
use crate::partition::calendar::{Interval, Moment};
use crate::partition::dependents::Dependents;
use crate::partition::layout;
use crate::partition::swap;
use crate::partition::times::{self, Times};
use crate::server::locks;
use crate::server::log;
use crate::server::relation::{self, Table};
use crate::server::session::advised;
use crate::server::spi::{self, Found, value};
use crate::server::text::{literal, qualified, quoted, suffixed};
use crate::state::conversion::{self, Pending, Progress, has_worker, progress};
use crate::state::definition::TIME_TYPES;
use crate::state::step::{Runner, Subject, Task};
use pgrx::prelude::*;
use serde::{Deserialize, Serialize};

/// The conversion that was asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Options {
    pub interval: String,
    pub precreate: u32,
    /// Microseconds since 1970, UTC. As it was asked for, see [`Conversion::cutover`].
    pub cutover: i64,
    pub time_column: String,
    /// It is to be taken back.
    #[serde(default)]
    pub aborted: bool,
}

impl conversion::Options for Options {
    const DIRECTION: &'static str = "convert";
}

/// A table on its way to being partitioned.
pub type Conversion = Pending<Options>;

/// The next step of a conversion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Outside of a transaction.
    TopLevel(String),
    /// Somebody builds the index.
    Wait,
    /// The CHECK of an older version.
    Uncheck,
    Swap,
    Nothing,
}

/// The end of the old table's name.
pub const LEGACY: &str = "_legacy";

/// The CHECK by which 0.1.0 proved the cutover; one that is found is dropped.
const CHECK: &str = "litellm_spend_cutover";

impl Conversion {
    /// The table's name once it is a partition.
    pub fn legacy(&self) -> String {
        suffixed(&self.table, LEGACY)
    }

    /// The unique index that becomes the old table's primary key.
    pub fn key_index(&self) -> String {
        suffixed(&self.table, "_legacy_pkey")
    }

    /// The end of the old table's partition: the time that was asked for, or the next that the column can
    /// hold. The server rounds a border to the nearest one, and would not believe a proof of another.
    pub fn cutover(&self) -> Result<Moment> {
        let unit = layout::unit(self.relation, &self.options.time_column)?;
        Ok(Moment(self.options.cutover).rounded_up(unit))
    }

    pub fn interval(&self) -> Interval {
        Interval::parse(&self.options.interval).unwrap_or(Interval::Day)
    }

    /// The primary key's columns and the time.
    pub fn key_columns(&self, dependents: &Dependents) -> String {
        let mut columns = dependents.key.as_ref().map(|(_, columns)| columns.clone()).unwrap_or_default();
        if !columns.contains(&self.options.time_column) {
            columns.push(self.options.time_column.clone());
        }
        columns.iter().map(|c| quoted(c)).collect::<Vec<_>>().join(", ")
    }

    pub fn dependents(&self) -> Result<Dependents> {
        let table = Table::find(self.relation)?.ok_or_else(|| Error::NoTable(self.name()))?;
        self.require_name()?;
        self.require_owner()?;
        let key_index = qualified(&self.schema, &self.key_index());
        let mut dependents = Dependents::read(table, &qualified(&self.schema, &self.legacy()), &key_index)?;
        dependents.obstacles.extend(self.own_obstacles()?);
        Ok(dependents)
    }

    /// That it cannot be done, for that reason.
    pub fn cannot(&self, obstacle: &str) -> Error {
        let time_column = self.options.time_column.clone();
        Error::CannotConvert { relation: self.name(), time_column, reason: obstacle.into() }
    }

    fn own_obstacles(&self) -> Result<Vec<String>> {
        let mut obstacles = vec![];
        let time = &self.options.time_column;
        if !relation::is_not_null(self.relation, time)? {
            obstacles.push(format!("Column {} may be NULL.", quoted(time)));
        }
        let legacy = qualified(&self.schema, &self.legacy());
        if relation::find_relation(&legacy)?.is_some() {
            obstacles.push(format!("There is a {legacy} already, which is what it would be called."));
        }
        let index = qualified(&self.schema, &self.key_index());
        if matches!(index_state(&index, self.relation, time)?, Index::Foreign) {
            obstacles
                .push(format!("There is an index {index} already, which is what its own would be called."));
        }
        Ok(obstacles)
    }

    /// Rows that could not be in a partition that ends at the cutover.
    pub fn rows_beyond(&self) -> Result<Option<Error>> {
        let (time, cutover) = (quoted(&self.options.time_column), self.cutover()?.to_string());
        let beyond = format!("{time} >= {cutover}");
        // Most often there is none, and an index says so.
        let times = Times::of_any(self.owner, self.relation, &self.options.time_column)?;
        if times.count(&beyond, 1)? == 0 {
            return Ok(None);
        }
        let sql = format!("SELECT max({time})::text, count(*) FROM {} WHERE {beyond}", self.name());
        let found = self
            .owner
            .current(&[self.relation], &sql, &[], |r| Ok((value::<String>(r, 1)?, value::<i64>(r, 2)?)))?;
        let beyond = |(last, rows)| Error::RowsBeyondCutover { relation: self.name(), rows, last, cutover };
        Ok(found.into_iter().next().map(beyond))
    }

    /// The index that proves that there are none.
    pub fn require_time_index(&self) -> Result<()> {
        let column = &self.options.time_column;
        match times::is_indexed(self.relation, column)? {
            true => Ok(()),
            false => Err(Error::NoTimeIndex { relation: self.name(), column: column.clone() }),
        }
    }
}

// ---- to ask for it ---------------------------------------------------------------------------------------

/// Stores what to do, or refuses it.
pub fn request(table: &Table, options: Options) -> Result<Conversion> {
    let conversion = Conversion::new(table, options);
    let mut earlier = Conversion::of(table)?;
    if let Some(earlier) = &earlier {
        earlier.require_name()?;
    }
    let dependents = conversion.dependents()?;
    if let Some(obstacle) = dependents.obstacles.first() {
        return Err(conversion.cannot(obstacle));
    }
    conversion.check_cutover()?;
    conversion.require_time_index()?;
    if let Some(beyond) = conversion.rows_beyond()? {
        return Err(beyond);
    }
    if let Some(earlier) = &mut earlier {
        earlier.lock_in_call()?;
    }
    conversion.request()?;
    Ok(conversion)
}

/// The first border of a period that leaves time to build the index.
pub fn default_cutover(interval: Interval, lead: std::time::Duration) -> Moment {
    let earliest = Moment(layout::now().0.saturating_add(lead.as_micros() as i64));
    interval.period(earliest).map_or(earliest, |period| period.to)
}

// ---- one step --------------------------------------------------------------------------------------------

impl Conversion {
    /// The next step, seen from what there is.
    pub fn next_step(&self) -> Result<Step> {
        let Some(table) = Table::find(self.relation)? else { return Ok(Step::Nothing) };
        if self.is_swapped(&table)? {
            return Ok(Step::Nothing);
        }
        self.require_owner()?;
        if !self.options.aborted {
            self.require_name()?;
        }
        if self.has_check()? {
            return Ok(Step::Uncheck);
        }
        let index = qualified(&self.schema, &self.key_index());
        match index_state(&index, self.relation, &self.options.time_column)? {
            Index::Missing if self.options.aborted && self.is_begun()? => Ok(Step::Wait),
            Index::Missing | Index::Foreign if self.options.aborted => Ok(Step::Nothing),
            Index::Foreign => Err(self.cannot(&format!("Index {index} is not the one that it would be."))),
            Index::Missing => {
                let columns = self.key_columns(&self.dependents()?);
                let name = quoted(&self.key_index());
                Ok(Step::TopLevel(format!(
                    "CREATE UNIQUE INDEX CONCURRENTLY {name} ON {} ({columns})",
                    self.name()
                )))
            }
            Index::Building => Ok(Step::Wait),
            Index::Valid if !self.options.aborted => Ok(Step::Swap),
            _ => Ok(Step::TopLevel(format!("DROP INDEX CONCURRENTLY {index}"))),
        }
    }

    fn is_swapped(&self, table: &Table) -> Result<bool> {
        Ok(table.name == self.legacy()
            && Table::named(&self.name())?.is_some_and(|parent| parent.kind == "p"))
    }

    /// Does a step that a transaction can do, if it is still the next. `false`: it is not, or somebody else
    /// has the conversion.
    pub fn run(&mut self, step: &Step) -> Result<bool> {
        if !self.lock(locks::Patience::None)? || self.next_step()? != *step {
            return Ok(false);
        }
        let name = self.name();
        match step {
            Step::TopLevel(_) | Step::Wait => return Ok(false),
            Step::Uncheck => self.drop_check()?,
            Step::Swap => {
                swap::swap(self)?;
                log::event(format_args!("{name} is partitioned"));
            }
            Step::Nothing => {}
        }
        if self.next_step()? == Step::Nothing {
            self.forget()?;
        }
        Ok(true)
    }

    /// Refuses a cutover that no calendar has, or that is over.
    pub fn check_cutover(&self) -> Result<()> {
        let cutover = self.cutover()?;
        if self.interval().period(cutover).is_none() {
            return Err(Error::CutoverBeyond);
        }
        if self.is_over()? {
            return Err(Error::CutoverPast { cutover: cutover.to_string() });
        }
        Ok(())
    }

    /// From the cutover on rows come that are not before it.
    fn is_over(&self) -> Result<bool> {
        Ok(layout::now() >= self.cutover()?)
    }

    pub fn is_too_late(&self) -> Result<bool> {
        let Some(table) = Table::find(self.relation)? else { return Ok(false) };
        Ok(self.is_over()? && !self.is_swapped(&table)?)
    }

    /// Waits for a new call.
    pub fn stop(&self) -> Result<()> {
        self.drop_check()?;
        let hint = format!("SELECT * FROM spend_partition_convert({});", literal(&self.name()));
        self.halt(&advised(&format!("the cutover {} came before the swap", self.cutover()?), &hint))
    }

    /// Whether the CHECK of an older version is there.
    fn has_check(&self) -> Result<bool> {
        let sql = "SELECT FROM pg_catalog.pg_constraint WHERE conrelid = $1 AND conname = $2::name";
        spi::query(sql, &[self.relation.into(), CHECK.into()], |_| Ok(())).any()
    }

    fn drop_check(&self) -> Result<()> {
        if !self.has_check()? {
            return Ok(());
        }
        let name = relation::relation_name(self.relation)?;
        locks::lock_exclusively(guc::swap_lock_timeout(), [self.relation])?;
        self.owner.run(format!("ALTER TABLE {name} DROP CONSTRAINT {CHECK}"))
    }

    /// Takes a conversion back before its swap. The index, which may be half built, only top level can drop
    /// without being in anybody's way: the worker does, or the caller, who is told how.
    pub fn abort(&mut self) -> Result<Option<String>> {
        self.lock_in_call()?;
        if Table::find(self.relation)?.is_some_and(|table| self.is_swapped(&table).unwrap_or(false)) {
            return Err(Error::Converting(self.table.clone()));
        }
        self.drop_check()?;
        self.options.aborted = true;
        self.store()?;
        let step = self.next_step()?;
        if has_worker()? && step != Step::Nothing {
            let drops =
                "the worker drops its index, and waits for whoever uses the table: see spend_progress";
            return Ok(Some(drops.into()));
        }
        self.forget()?;
        Ok(match step {
            Step::TopLevel(sql) => Some(format!("{sql};")),
            _ => None,
        })
    }

    /// Ends the build of its index, which nobody wants any more.
    fn cancel_build(&self) -> Result<()> {
        let sql = format!("SELECT pg_catalog.pg_cancel_backend(l.pid) {AT_WORK}");
        spi::current(&sql, &[self.relation.into(), self.activity().into()], |_| Ok(())).map(drop)
    }

    /// What its builder says that it does. (Another may be at an index for the Logs page.)
    fn activity(&self) -> String {
        format!("litellm_spend: {}", Subject::Conversion(self.schema.clone(), self.table.clone()))
    }

    /// Whether a builder is at work, or waits for the table, of whose index nothing can be seen yet.
    fn is_begun(&self) -> Result<bool> {
        let sql = format!(
            "SELECT FROM (SELECT l.pid {AT_WORK}) AS b WHERE NOT EXISTS (
                 SELECT FROM pg_catalog.pg_stat_progress_create_index p
                 JOIN pg_catalog.pg_index i ON i.indexrelid = p.index_relid WHERE p.pid = b.pid)"
        );
        spi::current(&sql, &[self.relation.into(), self.activity().into()], |_| Ok(())).any()
    }

    /// What drops the index, if it was built although the conversion has been taken back and forgotten: the
    /// builder had looked before, and nobody saw yet that it was at work.
    pub fn drop_unwanted(mut self) -> Result<Option<String>> {
        if Self::all()?.iter().any(|other| other.relation == self.relation) {
            return Ok(None);
        }
        self.options.aborted = true;
        match self.next_step()? {
            Step::TopLevel(sql) => Ok(Some(sql)),
            _ => Ok(None),
        }
    }
}

/// A builder of activity `$2` that has or awaits the lock of a build on table `$1`.
const AT_WORK: &str = "FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
     WHERE l.locktype = 'relation' AND l.relation = $1 AND l.mode = 'ShareUpdateExclusiveLock'
       AND l.database = (SELECT oid FROM pg_catalog.pg_database
                         WHERE datname = pg_catalog.current_database())
       AND a.backend_type = 'litellm_spend builder' AND a.query = $2 AND l.pid <> pg_catalog.pg_backend_pid()";

enum Index {
    Missing,
    /// Somebody builds it right now.
    Building,
    /// Half built, or of other columns than the key is to have.
    Invalid,
    Valid,
    /// No index of ours: it is not unique, or not of all rows, or a constraint's, or complete and of columns
    /// that no conversion would give it.
    Foreign,
}

/// Of the index of that name on the table; one of another table's is none.
fn index_state(index: &str, table: pg_sys::Oid, time_column: &str) -> Result<Index> {
    let look = || {
        spi::current(
            "SELECT i.indisunique AND i.indpred IS NULL AND i.indexprs IS NULL
                     AND i.indnatts = i.indnkeyatts
                     AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint WHERE conindid = i.indexrelid)
                     AND (NOT i.indisvalid OR times.columns <> '{}'),
                 i.indisvalid AND $3 = ANY (times.columns),
                 NOT i.indisvalid AND EXISTS (
                     SELECT FROM pg_catalog.pg_stat_progress_create_index p
                     JOIN pg_catalog.pg_locks l ON l.pid = p.pid
                     WHERE p.relid = i.indrelid AND p.datname = pg_catalog.current_database()
                       AND l.locktype = 'relation' AND l.relation = i.indrelid
                       AND l.mode = 'ShareUpdateExclusiveLock' AND l.granted
                       AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid())
             FROM pg_catalog.pg_index i
             -- The time columns by which it is what a conversion builds.
             CROSS JOIN LATERAL (SELECT ARRAY(
                 SELECT a.attname::text FROM pg_catalog.pg_constraint k
                 JOIN pg_catalog.pg_attribute a ON a.attrelid = k.conrelid AND NOT a.attisdropped
                     AND pg_catalog.format_type(a.atttypid, NULL) = ANY ($4)
                 WHERE k.conrelid = i.indrelid AND k.contype = 'p'
                   AND ARRAY(SELECT unnest(i.indkey::int2[])) = k.conkey
                       || CASE WHEN a.attnum = ANY (k.conkey) THEN '{}' ELSE ARRAY[a.attnum] END)
                 AS columns) AS times
             WHERE i.indexrelid = pg_catalog.to_regclass($1) AND i.indrelid = $2",
            &[index.into(), table.into(), time_column.into(), TIME_TYPES.map(String::from).to_vec().into()],
            |r| Ok((value::<bool>(r, 1)?, value::<bool>(r, 2)?, value::<bool>(r, 3)?)),
        )
    };
    let mut states = look()?;
    if states == [(true, false, false)] {
        // Its build may have ended between the snapshot and the look at the locks.
        states = look()?;
    }
    Ok(match states.first() {
        None => Index::Missing,
        Some((false, ..)) => Index::Foreign,
        Some((_, true, _)) => Index::Valid,
        Some((_, _, true)) => Index::Building,
        Some(_) => Index::Invalid,
    })
}

impl Conversion {
    /// Does the next step in the caller's transaction, where no worker does it.
    pub fn by_hand(&mut self) -> Result<()> {
        self.lock_in_call()?;
        if self.is_too_late()? {
            return self.stop();
        }
        let step = self.next_step()?;
        locks::insist(|| self.run(&step)).map(drop)
    }

    /// Whom the build or drop of its index waits for.
    fn waits_for(&self) -> Result<Option<String>> {
        let sql = "SELECT string_agg(waits_for, '; ') FROM litellm_spend.index_work WHERE relation = $1";
        Ok(spi::query(sql, &[self.relation.into()], |r| Ok(r.get::<String>(1)?)).one()?.flatten())
    }

    /// How far it is.
    pub fn progress(&self) -> Result<Progress> {
        let steps = ["index", "swap"];
        let step = self.next_step()?;
        let (name, mut detail) = match &step {
            Step::TopLevel(sql) => ("index", format!("{sql};")),
            Step::Wait => ("index", "being built".into()),
            Step::Uncheck => ("index", "the CHECK of an older version is to be removed".into()),
            Step::Swap => ("swap", format!("before {}", self.cutover()?)),
            Step::Nothing => ("", String::new()),
        };
        if let Some(error) = &self.last_error {
            detail = error.clone();
        }
        if let Some(holders) = self.waits_for()? {
            detail += &format!(" (waits for {holders})");
        }
        let next = steps.iter().position(|s| *s == name).unwrap_or(steps.len());
        Ok(progress(&steps, next, self.stopped, detail))
    }
}

/// One round of all conversions. `true`: there is more to do at once.
pub fn round(run: &mut impl Runner) -> bool {
    let mut more = false;
    for mut conversion in run.step(Subject::Task(Task::Conversions), Conversion::all).unwrap_or_default() {
        if conversion.stopped && !conversion.options.aborted {
            continue;
        }
        let subject = Subject::Conversion(conversion.schema.clone(), conversion.table.clone());
        // Not after the rest that a failed attempt at the swap takes: that the time is over is said at once.
        let look = Subject::Look(conversion.schema.clone(), conversion.table.clone());
        // One step, or a look that succeeds would take back the rest of the one that fails.
        let next = run.step(look, || {
            if !conversion.options.aborted && conversion.is_too_late()? {
                // Looked at again: another cutover may have been asked for meanwhile.
                let is_ours = conversion.lock(locks::Patience::None)? && !conversion.options.aborted;
                if is_ours && conversion.is_too_late()? {
                    conversion.stop()?;
                }
                return Ok(Step::Wait);
            }
            let next = conversion.next_step()?;
            // Only now: the call that takes it back has committed.
            if conversion.options.aborted && next == Step::Wait {
                conversion.cancel_build()?;
            }
            Ok(next)
        });
        let done = match next {
            None | Some(Step::Wait) => None,
            Some(Step::TopLevel(_)) => {
                run.begin_top_level(subject, conversion.relation);
                None
            }
            Some(step) => run.step(subject, || conversion.run(&step)),
        };
        more |= done == Some(true);
    }
    more
}

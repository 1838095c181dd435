//! Turns a plain table into a range-partitioned one without copying a row: the old table becomes the partition of all
//! times before the cutover.
//!
//! ```text
//!  step       lock on the table                     for how long
//!  index      SHARE UPDATE EXCLUSIVE                the build; concurrently, nobody waits
//!  check      ACCESS EXCLUSIVE                      a moment: "time < cutover", NOT VALID    \ only where no index on the
//!  validate   SHARE UPDATE EXCLUSIVE                one scan; nobody waits                   / time column proves it
//!  swap       ACCESS EXCLUSIVE, and on its views    milliseconds: only catalogs change
//! ```
//! Exclusive locks are waited for at most `litellm_spend.swap_lock_timeout`. What has been done is read from the catalogs
//! each time, so a conversion goes on from wherever it was interrupted.
//!
//! That the old table's rows are before the cutover, an index on the time column proves under the swap's lock (`proof`):
//! no row is ever refused, and nothing is read. Without one a CHECK is validated before. It would refuse rows from the
//! cutover on: when that comes within `litellm_spend.cutover_margin` before the swap, the worker removes it, and the
//! conversion stops. Without a worker to do that, no CHECK is made.
//!
//! Whose rights: everything is done to the table as its owner, the building of the index included; only what notes
//! how far we are is ours. When the table has another owner, the conversion stops.

use crate::blueprint::Blueprint;
use crate::catalog::{self, Table, value};
use crate::conversion::{self, Pending, Progress, has_worker, progress};
use crate::definition::{qualified, quoted};
use crate::error::{Error, Result};
use crate::guc;
use crate::layout;
use crate::locks;
use crate::partition::{Instant, Interval, suffixed};
use crate::spread::{self, Spread};
use crate::swap;
use crate::tick::{Runner, Subject};
use pgrx::prelude::*;
use serde::{Deserialize, Serialize};

/// What was asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Options {
    pub interval: String,
    pub precreate: u32,
    /// Microseconds since 1970, UTC.
    pub cutover: i64,
    pub time_column: String,
    /// What was done so far is to be taken back.
    #[serde(default)]
    pub aborted: bool,
}

impl conversion::Options for Options {
    const DIRECTION: &'static str = "convert";
}

/// A table on its way to being partitioned.
pub type Conversion = Pending<Options>;

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Outside of a transaction.
    TopLevel(String),
    /// Somebody builds the index.
    Wait,
    Check,
    Validate,
    Swap,
    Nothing,
}

pub const CHECK: &str = "litellm_spend_cutover";

impl Conversion {
    /// The table's name once it is a partition.
    pub fn legacy(&self) -> String {
        suffixed(&self.table, "_legacy")
    }

    /// The unique index that becomes the old table's primary key.
    pub fn key_index(&self) -> String {
        suffixed(&self.table, "_legacy_pkey")
    }

    pub fn cutover(&self) -> Instant {
        Instant(self.options.cutover)
    }

    pub fn interval(&self) -> Interval {
        Interval::parse(&self.options.interval).unwrap_or(Interval::Day)
    }

    /// The primary key's columns and the time.
    pub fn key_columns(&self, blueprint: &Blueprint) -> String {
        let mut columns = blueprint.key.as_ref().map(|(_, columns)| columns.clone()).unwrap_or_default();
        if !columns.contains(&self.options.time_column) {
            columns.push(self.options.time_column.clone());
        }
        columns.iter().map(|c| quoted(c)).collect::<Vec<_>>().join(", ")
    }

    pub fn blueprint(&self) -> Result<Blueprint> {
        let table = Table::find(self.relation)?.ok_or_else(|| Error::NoTable(self.name()))?;
        if (&table.schema, &table.name) != (&self.schema, &self.table) {
            return Err(Error::NoTable(self.name()));
        }
        self.require_owner()?;
        let key_index = qualified(&self.schema, &self.key_index());
        let mut blueprint = Blueprint::read(table, &qualified(&self.schema, &self.legacy()), &key_index)?;
        blueprint.obstacles.extend(self.own_obstacles(&blueprint)?);
        Ok(blueprint)
    }

    fn own_obstacles(&self, blueprint: &Blueprint) -> Result<Vec<String>> {
        let mut obstacles = vec![];
        let time = &self.options.time_column;
        if !catalog::is_not_null(self.relation, time)? {
            obstacles.push(format!("Column {} may be NULL.", quoted(time)));
        }
        let legacy = qualified(&self.schema, &self.legacy());
        if catalog::find_relation(&legacy)?.is_some() {
            obstacles.push(format!("There is a {legacy} already, which is what it would be called."));
        }
        let views = blueprint.materialized_views.iter();
        obstacles.extend(views.map(|v| format!("Materialized view {} reads it.", v.name)));
        Ok(obstacles)
    }

    /// Rows that could not be in a partition that ends at the cutover.
    pub fn rows_beyond(&self) -> Result<Option<Error>> {
        let (time, cutover) = (quoted(&self.options.time_column), self.cutover().to_string());
        let beyond = format!("{time} >= {cutover}");
        // Most often there is none, and an index says so.
        let spread = Spread::of_any(self.owner, self.relation, &self.options.time_column)?;
        if spread.count(&beyond, 1)? == 0 {
            return Ok(None);
        }
        let sql = format!("SELECT max({time})::text, count(*) FROM {} WHERE {beyond}", self.name());
        let found = self.owner.query(&sql, &[], |r| Ok((value::<String>(r, 1)?, value::<i64>(r, 2)?)))?;
        let beyond = |(last, rows)| Error::RowsBeyondCutover { relation: self.name(), rows, last, cutover };
        Ok(found.into_iter().next().map(beyond))
    }

    /// Whether a CHECK has to prove that there are none.
    pub fn needs_check(&self) -> Result<bool> {
        Ok(!spread::is_indexed(self.relation, &self.options.time_column)?)
    }
}

// ---- to ask for it ---------------------------------------------------------------------------------------

/// Stores what to do, or refuses it.
pub fn request(table: &Table, options: Options) -> Result<Conversion> {
    let conversion = Conversion::new(table, options);
    let blueprint = conversion.blueprint()?;
    if let Some(obstacle) = blueprint.obstacles.first() {
        return Err(Error::CannotConvert { relation: table.qualified(), reason: obstacle.clone() });
    }
    conversion.check_cutover()?;
    if let Some(beyond) = conversion.rows_beyond()? {
        return Err(beyond);
    }
    if let Some(mut earlier) = Conversion::of(table)? {
        earlier.lock_in_call()?;
    }
    // The CHECK of an earlier cutover proves nothing now.
    let cutover = conversion.cutover().to_string();
    if check(conversion.relation)?.is_some_and(|(text, _)| !text.contains(&cutover)) {
        conversion.drop_check()?;
    }
    conversion.request()?;
    Ok(conversion)
}

/// The first border of a period that leaves time to build the index and to scan the table.
pub fn default_cutover(interval: Interval, lead: std::time::Duration) -> Instant {
    let earliest = Instant(layout::now().0.saturating_add(lead.as_micros() as i64));
    interval.period(earliest).map_or(earliest, |period| period.to)
}

// ---- one step --------------------------------------------------------------------------------------------

impl Conversion {
    /// What is to be done next, by what there is.
    pub fn next_step(&self) -> Result<Step> {
        let Some(table) = Table::find(self.relation)? else { return Ok(Step::Nothing) };
        if self.is_swapped(&table)? {
            return Ok(Step::Nothing);
        }
        self.require_owner()?;
        let index = qualified(&self.schema, &self.key_index());
        match index_state(&index, self.relation)? {
            Index::Missing if self.options.aborted => return Ok(Step::Nothing),
            Index::Missing => {
                let columns = self.key_columns(&self.blueprint()?);
                let name = quoted(&self.key_index());
                return Ok(Step::TopLevel(format!(
                    "CREATE UNIQUE INDEX CONCURRENTLY {name} ON {} ({columns})",
                    self.name()
                )));
            }
            Index::Building => return Ok(Step::Wait),
            Index::Valid if !self.options.aborted => {}
            _ => return Ok(Step::TopLevel(format!("DROP INDEX CONCURRENTLY {index}"))),
        }
        Ok(match check(self.relation)? {
            Some((_, false)) => Step::Validate,
            None if self.needs_check()? => Step::Check,
            _ => Step::Swap,
        })
    }

    fn is_swapped(&self, table: &Table) -> Result<bool> {
        Ok(table.name == self.legacy()
            && Table::named(&self.name())?.is_some_and(|parent| parent.kind == "p"))
    }

    /// Does a step that a transaction can do, if it is still the next.
    pub fn run(&mut self, step: &Step) -> Result<()> {
        if !self.lock(locks::Patience::None)? || self.next_step()? != *step {
            return Ok(());
        }
        let name = self.name();
        match step {
            Step::TopLevel(_) | Step::Wait => return Ok(()),
            Step::Check => {
                let (time, cutover) = (quoted(&self.options.time_column), self.cutover());
                let check = format!("CHECK ({time} < {cutover}) NOT VALID");
                self.alter(&format!("ALTER TABLE {name} ADD CONSTRAINT {CHECK} {check}"))?;
            }
            Step::Validate => {
                locks::lock_all(guc::lock_timeout(), &[(self.relation, pg_sys::ShareUpdateExclusiveLock)])?;
                self.owner.run(format!("ALTER TABLE {name} VALIDATE CONSTRAINT {CHECK}"))?;
            }
            Step::Swap => {
                swap::swap(self)?;
                log!("litellm_spend: {name} is partitioned");
            }
            Step::Nothing => {}
        }
        if self.next_step()? == Step::Nothing {
            self.forget()?;
        }
        Ok(())
    }

    /// Refuses a cutover that no calendar has, or that is too near.
    pub fn check_cutover(&self) -> Result<()> {
        if self.interval().period(self.cutover()).is_none() {
            return Err(Error::CutoverBeyond);
        }
        if self.is_near() {
            return Err(Error::CutoverTooNear { cutover: self.cutover().to_string() });
        }
        Ok(())
    }

    /// A statement that takes an exclusive lock for a moment.
    fn alter(&self, sql: &str) -> Result<()> {
        locks::lock_all(guc::swap_lock_timeout(), &[(self.relation, pg_sys::AccessExclusiveLock)])?;
        self.owner.run(sql)
    }

    /// The cutover is so near that a CHECK would soon refuse rows.
    fn is_near(&self) -> bool {
        let margin = guc::cutover_margin().as_micros() as i64;
        layout::now().0.saturating_add(margin) >= self.options.cutover
    }

    pub fn is_too_late(&self) -> Result<bool> {
        Ok(self.is_near() && Table::find(self.relation)?.is_some_and(|t| t.name == self.table))
    }

    /// Removes the CHECK and waits for a new call.
    pub fn stop(&self) -> Result<()> {
        self.drop_check()?;
        self.halt(&format!(
            "the cutover {} came near before the swap; its CHECK was removed; convert again with a later one",
            self.cutover()
        ))
    }

    fn drop_check(&self) -> Result<()> {
        if check(self.relation)?.is_none() {
            return Ok(());
        }
        let name = catalog::relation_name(self.relation)?;
        self.alter(&format!("ALTER TABLE {name} DROP CONSTRAINT {CHECK}"))
    }

    /// Takes a conversion back before its swap. The index, which may be half built, only top level can drop without being in
    /// anybody's way: the worker does, or the caller, who is told how.
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
            // Its build of the index.
            catalog::query(
                "SELECT pg_catalog.pg_cancel_backend(l.pid)
                 FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
                 WHERE l.locktype = 'relation' AND l.relation = $1 AND l.mode = 'ShareUpdateExclusiveLock'
                   AND a.backend_type = 'litellm_spend builder'",
                &[self.relation.into()],
                |_| Ok(()),
            )?;
            return Ok(None);
        }
        self.forget()?;
        Ok(match step {
            Step::TopLevel(sql) => Some(format!("{sql};")),
            _ => None,
        })
    }
}

enum Index {
    Missing,
    /// Somebody builds it right now.
    Building,
    Invalid,
    Valid,
}

/// Of the index of that name on the table; one of another table's is none.
fn index_state(index: &str, table: pg_sys::Oid) -> Result<Index> {
    let states = catalog::query(
        "SELECT i.indisvalid, EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.locktype = 'relation' AND l.relation = i.indrelid
             AND l.mode = 'ShareUpdateExclusiveLock' AND l.granted AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid()
             AND EXISTS (SELECT FROM pg_catalog.pg_stat_progress_create_index p WHERE p.pid = l.pid AND p.relid = i.indrelid))
         FROM pg_catalog.pg_index i WHERE i.indexrelid = pg_catalog.to_regclass($1) AND i.indrelid = $2",
        &[index.into(), table.into()],
        |r| Ok((value::<bool>(r, 1)?, value::<bool>(r, 2)?)),
    )?;
    Ok(match states.first() {
        None => Index::Missing,
        Some((true, _)) => Index::Valid,
        Some((false, true)) => Index::Building,
        Some((false, false)) => Index::Invalid,
    })
}

/// The conversion's CHECK on the table, and whether it is validated.
pub fn check(relation: pg_sys::Oid) -> Result<Option<(String, bool)>> {
    let checks = catalog::query(
        "SELECT pg_catalog.pg_get_constraintdef(oid), convalidated FROM pg_catalog.pg_constraint
         WHERE conrelid = $1 AND conname = $2::name",
        &[relation.into(), CHECK.into()],
        |r| Ok((value(r, 1)?, value(r, 2)?)),
    )?;
    Ok(checks.into_iter().next())
}

impl Conversion {
    /// Does the next step in the caller's transaction, where no worker does it.
    pub fn by_hand(&mut self) -> Result<()> {
        self.lock_in_call()?;
        if self.is_too_late()? {
            return self.stop();
        }
        let step = self.next_step()?;
        if step == Step::Check {
            let (relation, column) = (self.name(), self.options.time_column.clone());
            return Err(Error::NoTimeIndex { relation, column });
        }
        locks::insist(|| self.run(&step))
    }

    /// How far it is.
    pub fn progress(&self) -> Result<Progress> {
        let mut steps = vec!["index"];
        let step = self.next_step()?;
        let checked = self.needs_check()? || check(self.relation)?.is_some();
        if checked {
            steps.extend(["check", "validate"]);
        }
        steps.push("swap");
        let (name, mut detail) = match &step {
            Step::TopLevel(sql) => ("index", format!("{sql};")),
            Step::Wait => ("index", "being built".into()),
            Step::Check => ("check", String::new()),
            Step::Validate => ("validate", String::new()),
            Step::Swap => ("swap", format!("before {}", self.cutover())),
            Step::Nothing => ("", String::new()),
        };
        if let Some(error) = &self.last_error {
            detail = error.clone();
        }
        let next = steps.iter().position(|s| *s == name).unwrap_or(steps.len());
        Ok(progress(&steps, next, self.stopped, detail))
    }
}

/// One round of all conversions. `true`: there is more to do at once.
pub fn tick(run: &mut impl Runner) -> bool {
    let mut more = false;
    for mut conversion in run.step(Subject::Task("conversions"), Conversion::all).unwrap_or_default() {
        if conversion.stopped && !conversion.options.aborted {
            continue;
        }
        let subject = Subject::Conversion(conversion.schema.clone(), conversion.table.clone());
        // Not after the rest that a failed attempt at the swap takes: the CHECK must go in time.
        let look = Subject::Look(conversion.schema.clone(), conversion.table.clone());
        // One step, or a look that succeeds would take back the rest of the one that fails.
        let next = run.step(look, || {
            if !conversion.options.aborted && conversion.is_too_late()? {
                return conversion.stop().map(|_| Step::Wait);
            }
            conversion.next_step()
        });
        let done = match next {
            None | Some(Step::Wait) => None,
            Some(Step::TopLevel(_)) => {
                run.begin_top_level(subject, conversion.relation);
                None
            }
            Some(step) => run.step(subject, || conversion.run(&step)),
        };
        more |= done.is_some();
    }
    more
}

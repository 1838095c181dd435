//! Turns a partitioned table back into a plain one, beside its writers: rows are copied in batches, what
//! changes meanwhile is noted by triggers and copied again (`copy`), and a short transaction at the end
//! changes the names.
//!
//! ```text
//!  step       lock on the table                     for how long
//!  prepare    SHARE ROW EXCLUSIVE, and on the       a moment: the new table, the triggers, about a
//!             partitions                            millisecond for each partition
//!  copy       none but a reader's                   a batch a transaction, in the order of time
//!             (as to prepare, if it begins anew)
//!  indexes    none                                  on the new table, which nobody uses yet: one a
//!                                                   transaction
//!  swap       ACCESS EXCLUSIVE, and on its views    the changes that are left, and the names
//! ```
//! The plain table's key is narrower: of rows that agree in it the one with the earliest time stays, the
//! others go to `litellm_spend_archive.<table>_duplicates`, as they are. The partitioned table stays in that
//! schema, too, until somebody drops it: nothing is lost.
//!
//! Whose rights: the copy, the duplicates and the notes of what changes belong to the table's owner, and
//! everything is done to them and to the table as that role. They are known by their Oids: what has taken a
//! name of theirs meanwhile is left alone.

use crate::error::{Error, Result};
use crate::litellm::spend_log::Capture;
use crate::litellm::triggers;
use crate::partition::archive::{self, ARCHIVE};
use crate::partition::copy;
use crate::partition::create::{rename, rename_index};
use crate::partition::dependents::{self, Dependents, Index, obstacles_of_partitions};
use crate::partition::layout;
use crate::partition::swap;
use crate::partition::times;
use crate::server::locks::{self, Patience};
use crate::server::log;
use crate::server::relation::{self, Table, free_name};
use crate::server::session::attempt;
use crate::server::spi;
use crate::server::text::{literal, qualified, quoted, suffixed};
use crate::state::captured;
use crate::state::conversion::{self, Pending, Progress, progress};
use crate::state::fence;
use crate::state::step::{Runner, Subject, Task};
use pgrx::pg_sys;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// The reversion that was asked for, and how far it is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Options {
    pub time_column: String,
    /// The primary key without the time.
    pub key: Vec<String>,
    /// The columns, CHECKs and key that the plain table was made with. `None`: it is not made yet.
    pub shape: Option<String>,
    /// The plain table, until it has the name, and where the duplicates go: names in the archive.
    pub plain: String,
    pub duplicates: String,
    /// The Oids of both, and of where changes are noted. A restore takes them out.
    #[serde(default)]
    pub made: Vec<u32>,
    /// The table and its partitions: those whose rows are copied or noted.
    pub tree: Vec<u32>,
    /// The transactions that made the triggers there. Empty: an older version did, and has not noted it.
    #[serde(default)]
    pub triggers_by: Vec<u32>,
    /// The last row that was copied: its time and key, as text. `None`: not begun.
    pub copied_to: Option<Vec<String>>,
    pub copied_all: bool,
    /// The plain table's indexes: the name that was asked for, and the one that it has. `None`: not begun.
    pub indexes: Option<Vec<(String, String)>>,
    /// All of them are made, as far as was known when the last one was.
    #[serde(default)]
    pub indexed: bool,
    /// Those of ours that could not be made. The table can do without until somebody has mended it.
    #[serde(default)]
    pub without: Vec<String>,
    /// Failures of the trigger when the copy began.
    pub failures: i64,
}

impl conversion::Options for Options {
    const DIRECTION: &'static str = "revert";
}

/// An index that was asked for beside the table's own, and how it is defined after `ON <table>`.
pub struct Asked {
    pub name: String,
    pub definition: String,
}

/// Which those are, for the table and its copy: we do not know what they are good for.
pub type AskedFor = fn(&Table, pg_sys::Oid) -> Result<Vec<Asked>>;

/// A table on its way to being plain again.
pub type Reversion = Pending<Options>;

/// An index as the plain table is to have it.
struct Wanted {
    name: String,
    definition: String,
    /// The table has it, and the plain one cannot do without.
    is_own: bool,
}

impl Reversion {
    pub fn plain(&self) -> String {
        qualified(ARCHIVE, &self.options.plain)
    }

    pub fn duplicates(&self) -> String {
        qualified(ARCHIVE, &self.options.duplicates)
    }

    fn renamed(&self) -> String {
        suffixed(&self.table, "_partitioned")
    }

    /// The time and the rest of the primary key, as they are now.
    pub fn read_key(&mut self, dependents: &Dependents) -> Result<()> {
        let refuse = |reason: String| Err(Error::CannotRevert { relation: self.name(), reason });
        let time_column = layout::partition_key(&dependents.table)?;
        let columns = dependents.key.iter().flat_map(|(_, columns)| columns);
        let key: Vec<String> = columns.filter(|column| **column != time_column).cloned().collect();
        if key.is_empty() {
            return refuse("Without the partition key nothing is left of its primary key.".into());
        }
        // It has no value yet where a row that moves is noted.
        if let Some(column) = relation::generated_of(self.relation, &key)? {
            return refuse(format!("Column {} of its primary key is generated.", quoted(&column)));
        }
        (self.options.time_column, self.options.key) = (time_column, key);
        Ok(())
    }

    /// The index by which the rows that change are found.
    pub fn require_key_index(&self) -> Result<()> {
        let columns = &self.options.key;
        match times::are_indexed(self.relation, columns)? {
            true => Ok(()),
            false => Err(Error::NoKeyIndex { relation: self.name(), columns: columns.clone() }),
        }
    }

    pub fn dependents(&self) -> Result<Dependents> {
        self.require_owner()?;
        self.require_name()?;
        let table = Table::find(self.relation)?.ok_or_else(|| Error::NoTable(self.name()))?;
        let mut dependents = Dependents::read(table, &qualified(&self.schema, &self.renamed()), "")?;
        dependents.obstacles.extend(obstacles_of_partitions(self.relation)?);
        dependents.obstacles.extend(copy::obstacles(self.relation)?);
        Ok(dependents)
    }
}

/// Stores what to do, or refuses it.
pub fn request(table: &Table) -> Result<()> {
    let refuse = |reason: String| Error::CannotRevert { relation: table.qualified(), reason };
    layout::require_here(table.oid)?;
    // It is where the copy will be made.
    archive::require_ours()?;
    // What was asked for when it had another owner, or of another table of that name: what was made for it
    // would be in the way, and nobody would know of it any more.
    for mut earlier in Reversion::all()? {
        let named = (&earlier.schema, &earlier.table) == (&table.schema, &table.name);
        if named || earlier.relation == table.oid {
            earlier.abort()?;
        }
    }
    let mut reversion = Reversion::new(table, Options::default());
    let dependents = reversion.dependents()?;
    if let Some(obstacle) = dependents.obstacles.first() {
        return Err(refuse(obstacle.clone()));
    }
    reversion.read_key(&dependents)?;
    reversion.require_key_index()?;
    let renamed = qualified(&table.schema, &reversion.renamed());
    if relation::find_relation(&renamed)?.is_some() {
        return Err(refuse(format!("There is a {renamed} already, which is what it would be called.")));
    }
    let time_column = reversion.options.time_column.clone();
    if !times::is_indexed(table.oid, &time_column)? {
        return Err(Error::NoTimeIndex { relation: table.qualified(), column: time_column });
    }
    if let Some(stranger) = copy::partition_of_another(table)? {
        return Err(refuse(format!("Partition {stranger} belongs to another role.")));
    }
    // Rows that go there cannot be noted.
    if let Some(foreign) = relation::foreign_partition(table.oid)? {
        let foreign = relation::relation_name(foreign)?;
        return Err(refuse(format!("Partition {foreign} is not an ordinary table.")));
    }
    reversion.request()
}

// ---- one step --------------------------------------------------------------------------------------------

/// One round of all reversions. `true`: there is more to do at once.
pub fn round(run: &mut impl Runner, asked_for: AskedFor) -> bool {
    let mut more = false;
    for mut reversion in run.step(Subject::Task(Task::Reversions), Reversion::all).unwrap_or_default() {
        let (schema, table) = (reversion.schema.clone(), reversion.table.clone());
        let subject = match reversion.options.copied_all && !reversion.options.indexed {
            true => Subject::CopysIndex(schema, table),
            false => Subject::Conversion(schema, table),
        };
        match run.step(subject, || reversion.step(asked_for)) {
            // Who has the reversion may keep it: it is looked at again, and not at once.
            Some(Step::Busy) | None => continue,
            Some(Step::Done) => {}
            Some(Step::Last(done)) => {
                log::event(format_args!("{} is a plain table again: {done}", reversion.name()));
            }
        }
        more = true;
    }
    more
}

/// What came of a step.
enum Step {
    /// Somebody else has the reversion.
    Busy,
    Done,
    /// There is none after it; with a sentence about the result.
    Last(String),
}

/// How long a SQL call goes on with the copy and its indexes.
const SLICE_OF_CALL: Duration = Duration::from_secs(1);

impl Reversion {
    /// Does what comes next in the caller's transaction, where no worker does it. A step that locks the table
    /// is the last one: its locks last as long as the transaction.
    pub fn by_hand(&mut self, asked_for: AskedFor) -> Result<Option<String>> {
        self.lock_in_call()?;
        let made = |options: &Options| options.indexes.iter().flatten().count() + options.without.len();
        let began = Instant::now();
        loop {
            let (copied_to, before) = (self.options.copied_to.clone(), made(&self.options));
            match locks::insist(|| self.step(asked_for))? {
                Step::Busy => return Err(Error::ConversionBusy(self.name())),
                Step::Last(done) => return Ok(Some(done)),
                Step::Done => {}
            }
            let has_copied = self.options.copied_to.is_some() && self.options.copied_to != copied_to;
            let goes_on = has_copied || made(&self.options) > before && !self.options.indexed;
            if !goes_on || began.elapsed() > SLICE_OF_CALL {
                return Ok(None);
            }
        }
    }

    /// Does the next step, by what is stored: what a step had come to that failed is forgotten.
    fn step(&mut self, asked_for: AskedFor) -> Result<Step> {
        if !self.lock(Patience::None)? {
            return Ok(Step::Busy);
        }
        if Table::find(self.relation)?.is_none() {
            self.take_back()?;
            log::event(format_args!("{} was dropped during its reversion, and so is its copy", self.name()));
            return Ok(Step::Done);
        }
        self.require_owner()?;
        self.require_name()?;
        copy::require_made(self)?;
        if copy::recognize(self)? {
            // Its locks end with this step.
        } else if self.options.shape != Some(copy::shape(self.relation)?) || copy::lacks_triggers(self)? {
            // Not made yet, or a column, a CHECK, the key or a trigger changed meanwhile.
            copy::prepare(self)?;
        } else if copy::failures(self)? != self.options.failures {
            copy::begin_anew(self)?;
        } else if copy::note_new_partitions(self)? {
            // Their rows are copied with what changed.
        } else if !self.options.copied_all {
            copy::batch(self)?;
        } else if self.make_index(asked_for)? {
            // And the next one in a transaction of its own.
        } else if copy::catch_up_in_part(self)? {
            return self.swap(asked_for).map(Step::Last);
        }
        self.store()?;
        Ok(Step::Done)
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let options = &self.options;
        let copied = options.copied_to.as_ref().and_then(|row| row.first());
        let detail = self.last_error.clone().or(copied.map(|time| format!("copied to {time}")));
        let done = [options.shape.is_some(), options.copied_all, options.indexed];
        let next = done.iter().position(|done| !done).unwrap_or(done.len());
        progress(&["prepare", "copy", "indexes", "swap"], next, self.stopped, detail.unwrap_or_default())
    }

    /// The indexes that the new table is to have.
    fn wanted_indexes(&self, table: &Table, own: &[Index], asked_for: AskedFor) -> Result<Vec<Wanted>> {
        let own = own.iter().map(|index| Wanted {
            name: index.name.clone(),
            definition: index.definition.clone(),
            is_own: true,
        });
        let plain = self.options.made.first().copied().unwrap_or_default().into();
        let asked = asked_for(table, plain)?.into_iter();
        let asked = asked.filter(|index| !self.options.without.contains(&index.name));
        let asked = asked.map(|Asked { name, definition }| Wanted { name, definition, is_own: false });
        Ok(own.chain(asked).collect())
    }

    /// The index that was made for this name.
    fn made_index(&self, name: &str) -> Option<&String> {
        self.options.indexes.iter().flatten().find(|(index, _)| index == name).map(|(_, made)| made)
    }

    fn lacks_index(&self, dependents: &Dependents, asked_for: AskedFor) -> Result<bool> {
        let wanted = self.wanted_indexes(&dependents.table, &dependents.indexes, asked_for)?;
        Ok(wanted.iter().any(|index| self.made_index(&index.name).is_none()))
    }

    /// Makes one that the new table lacks. `false`: it has them all. Nothing else is asked of the old table:
    /// the locks of what looks at its views would be held as long as the build takes.
    fn make_index(&mut self, asked_for: AskedFor) -> Result<bool> {
        let table = Table::find(self.relation)?.ok_or_else(|| Error::NoTable(self.name()))?;
        let wanted = self.wanted_indexes(&table, &dependents::indexes(self.relation)?, asked_for)?;
        self.drop_other_indexes(&wanted)?;
        let mut lacking = wanted.into_iter().filter(|index| self.made_index(&index.name).is_none());
        let (Some(index), next) = (lacking.next(), lacking.next()) else {
            self.options.indexed = true;
            return Ok(false);
        };
        copy::lock(self)?;
        // The table's own have those names until the swap.
        let name = if index.is_own { suffixed(&index.name, "_plain") } else { index.name.clone() };
        let name = free_name([&self.schema, ARCHIVE], &name)?;
        let sql = format!("CREATE INDEX {} ON {} {}", quoted(&name), self.plain(), index.definition);
        let build = || self.owner.run(sql);
        let failure = match index.is_own {
            true => build().map(|()| None)?,
            // That it takes too long is a reason to do without it, too.
            false => attempt(build).err().map(|failure| match failure.is_timeout() {
                true => failure,
                false => failure.unless_cancel(),
            }),
        };
        if let Some(failure) = failure {
            log::failure(format_args!("index {} of {} failed", index.name, self.plain()), &failure);
            self.options.without.push(index.name);
        } else {
            self.options.indexes.get_or_insert_default().push((index.name, name));
        }
        self.options.indexed = next.is_none();
        Ok(true)
    }

    /// Drops what the table has lost since, and what nobody asks for any more.
    fn drop_other_indexes(&mut self, wanted: &[Wanted]) -> Result<()> {
        let mut made = self.options.indexes.take().unwrap_or_default();
        let is_wanted = |name: &String| wanted.iter().any(|index| index.name == *name);
        for (_, unwanted) in made.extract_if(.., |(index, _)| !is_wanted(index)) {
            copy::lock(self)?;
            self.owner.run(format!("DROP INDEX IF EXISTS {}", qualified(ARCHIVE, &unwanted)))?;
        }
        self.options.indexes = Some(made);
        Ok(())
    }

    // ---- the swap ----------------------------------------------------------------------------------------

    fn swap(&mut self, asked_for: AskedFor) -> Result<String> {
        fence::require_attachment(Patience::None)?;
        // 1. the locks. Nobody writes any more: the rest of what changed.
        let tree = relation::relation_tree(self.relation)?;
        copy::lock(self)?;
        let dependents = swap::lock(self.name(), &tree, || self.dependents())?;
        if let Some(obstacle) = dependents.obstacles.first() {
            return Err(Error::CannotRevert { relation: self.name(), reason: obstacle.clone() });
        }
        if copy::failures(self)? != self.options.failures
            || copy::lacks_triggers(self)?
            || self.options.shape != Some(copy::shape(self.relation)?)
            || self.lacks_index(&dependents, asked_for)?
            || copy::has_new_partitions(self)?
            || !copy::catch_up_last(self)?
        {
            // The next step has time for it.
            return Err(Error::CameBetween(self.table.clone()));
        }
        // 2. the partitioned table moves aside.
        let owner = self.owner;
        let run = |sql: String| owner.run(sql);
        let (schema, table, name) = (self.schema.clone(), self.table.clone(), self.name());
        copy::drop_triggers(self)?;
        dependents.drop_triggers(&name)?;
        rename(owner, &schema, &table, &self.renamed(), Some("_partitioned"))?;
        // 3. the plain one takes its place, with all that it had.
        let key = dependents.key.clone().unwrap_or_default().0;
        run(format!("ALTER TABLE {} SET SCHEMA {}", self.plain(), quoted(&schema)))?;
        run(format!("ALTER TABLE {} RENAME TO {}", qualified(&schema, &self.options.plain), quoted(&table)))?;
        let made_key = copy::key_name(&self.options.plain);
        run(format!("ALTER TABLE {name} RENAME CONSTRAINT {} TO {}", quoted(&made_key), quoted(&key)))?;
        for index in &dependents.indexes {
            let made = self.made_index(&index.name).ok_or_else(|| Error::CameBetween(name.clone()))?;
            rename_index(owner, &schema, made, &index.name)?;
        }
        dependents.not_valid.iter().try_for_each(|check| check.give(owner))?;
        dependents.give()?;
        dependents.point_readers()?;
        // 4. capture and rollups go on there; what is kept out had been counted.
        let plain = relation::find_relation(&name)?.ok_or_else(|| Error::NoTable(name.clone()))?;
        triggers::follow(self.relation, plain)?;
        if let Some(state) = captured::capture_of(plain)? {
            run(Capture { columns: &state.columns }.retire(&self.duplicates(), &[]))?;
        }
        // 5. what nothing uses any more goes to the archive.
        let partitioned = archive::take(owner, self.relation)?;
        for partition in tree.into_iter().filter(|oid| *oid != self.relation) {
            archive::take(owner, partition)?;
        }
        copy::clean_up(self)?;
        self.forget()?;
        let kept_out = self.kept_out()?;
        Ok(format!("{kept_out}; what it was is {partitioned}"))
    }

    /// Says what is in the way of the narrower key, or drops the table for it if that is empty.
    fn kept_out(&self) -> Result<String> {
        let duplicates = self.duplicates();
        let count = format!("SELECT count(*) FROM {duplicates}");
        let rows = self.owner.fresh(&count, &[], |r| spi::value::<i64>(r, 1))?;
        if rows == [0] {
            self.owner.run(format!("DROP TABLE {duplicates}"))?;
            return Ok("no row was kept out".into());
        }
        let comment = format!(
            "Rows of {} whose key another row of it has, with an earlier time: kept out by spend_partition_revert()",
            self.name()
        );
        self.owner.run(format!("COMMENT ON TABLE {duplicates} IS {}", literal(&comment)))?;
        Ok(format!("{} rows were kept out, and are in {duplicates}", rows.first().copied().unwrap_or(0)))
    }

    /// Forgets a reversion before its swap: nothing was changed but the trigger and what we made. Whoever has
    /// the table by now may ask for it.
    pub fn abort(&mut self) -> Result<()> {
        self.lock_in_call()?;
        self.take_back()
    }

    /// The table may have been dropped: partitions that were detached before still have their triggers.
    fn take_back(&self) -> Result<()> {
        copy::drop_triggers(self)?;
        if self.options.shape.is_some() {
            copy::drop_made(self)?;
        }
        self.forget()
    }
}

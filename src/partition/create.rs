//! Makes a partition, with the rows that DEFAULT holds of its range.
//!
//! A new partition is a table of its own first (columns, defaults, indexes, storage, owner, grants, our
//! triggers) and is then attached, which the server does without reading anything but it: that DEFAULT holds
//! no row of its range we prove from an index (see `proof`). The rows of the range move in the same
//! transaction, at most a batch of them, or those of one time: then the partition ends where the batch does,
//! and the next call widens it. Our triggers do not see the move, so that nothing is counted twice, and no
//! reader sees less or more than before.
//!
//! | lock | when | who waits |
//! |---|---|---|
//! | ACCESS EXCLUSIVE on the table | rows move, or the range may be written now | everybody |
//! | SHARE UPDATE EXCLUSIVE on the table | else | nobody who reads or writes |
//! | ACCESS EXCLUSIVE on DEFAULT | always, where there is one | readers that are not pruned to other partitions |
//!
//! With the weak lock an INSERT whose row was on its way to DEFAULT would fail: hence "may be written now".
//!
//! Whose rights: CREATE TABLE LIKE copies expressions, ATTACH evaluates CHECKs, rows that move are seen by
//! generated columns: all of it runs as the table's owner, who must own DEFAULT as well. Only capture's
//! triggers are made by us.

use crate::error::{Error, Result};
use crate::guc;
use crate::litellm::spend_log::Capture;
use crate::litellm::triggers::{missing_triggers_within, note_triggers};
use crate::partition::calendar::{self, Interval, Moment, Range};
use crate::partition::dependents::revoke_default_privileges;
use crate::partition::layout::{Layout, Partition};
use crate::partition::times::Times;
use crate::server::locks::{self, Mode};
use crate::server::proof;
use crate::server::relation::{self, Table, free_name};
use crate::server::session::Owner;
use crate::server::spi::{self, Found};
use crate::server::text::{self, qualified, quoted};
use crate::state::captured;
use crate::state::fence;
use pgrx::prelude::*;

pub struct Placed {
    pub partition: String,
    pub range: Range,
    /// Rows that moved from DEFAULT.
    pub rows: i64,
    /// It was there, and holds more now.
    pub widened: bool,
}

/// Refuses a range of which more rows would have to move from DEFAULT at once than may.
pub fn require_few(layout: &Layout, range: Range, batch: i64) -> Result<()> {
    layout.lock()?;
    layout.default.iter().try_for_each(|default| times(layout, default)?.require_few(range, batch))
}

/// Makes a partition that begins where `range` does, with at most about a batch of rows from DEFAULT, or
/// widens the one that `range` continues. `None`: somebody else made it meanwhile.
pub fn place(
    layout: &Layout,
    interval: Interval,
    range: Range,
    now: Moment,
    batch: i64,
) -> Result<Option<Placed>> {
    let continued = calendar::continued(interval, range, &layout.ranges());
    let continued = layout.partitions.iter().find(|p| Some(p.range) == continued && p.leaf && !p.pending);
    if layout.default.is_some() {
        // Before anything of the table's: who attaches or detaches has this, and waits for the table.
        lock_capture(layout)?;
    }
    layout.lock()?;
    layout.default.iter().chain(continued).try_for_each(|partition| layout.require_usable(partition))?;
    // 1. the new table, which nobody sees yet.
    let new = match continued {
        Some(_) => None,
        None => {
            let name = layout.free_name(&calendar::name(&layout.table.name, range))?;
            Some(create(layout, &name, template(layout))?)
        }
    };
    // 2. the locks. What was seen before them may be out of date.
    let moves = match &layout.default {
        Some(default) => {
            let times = times(layout, default)?;
            times.count(&times.condition(range), 1)? > 0
        }
        None => false,
    };
    if moves || continued.is_some() {
        // Before anybody waits: DETACH has the server look for references under the lock.
        refuse_references_to(layout)?;
    }
    let strong = moves || continued.is_some() || (range.from <= now && layout.default.is_some());
    lock(layout, strong, continued)?;
    let layout = layout.again()?;
    let gone = continued.is_some_and(|c| layout.find(c.oid).is_none_or(|now| now.range != c.range));
    if gone || layout.ranges().iter().any(|r| r.within(range).is_some()) {
        return drop_unused(&layout, new.as_ref());
    }
    let default = layout.default.as_ref().map(|default| Ok::<_, Error>((default, times(&layout, default)?)));
    let default = default.transpose()?;
    // 3. what fits a batch.
    let end = match &default {
        Some((_, times)) => {
            times.require_few(range, batch)?;
            times.after(range, batch)?
        }
        None => None,
    };
    let range = Range { to: end.unwrap_or(range.to), ..range };
    let target = match (&new, continued) {
        (Some(table), _) => table.clone(),
        (None, Some(partition)) => {
            detach(&layout, &partition.qualified())?;
            partition.qualified()
        }
        (None, None) => return Ok(None),
    };
    // 4. the rows.
    let mut rows = 0;
    if let Some((default, times)) = &default
        && times.count(&times.condition(range), 1)? > 0
    {
        if !strong {
            return Err(Error::CameBetween(default.name.clone()));
        }
        rows = move_rows(&layout, default.oid, &target, &times.condition(range))?;
    }
    if new.is_some() {
        create_triggers(&layout, &target)?;
    }
    // 5. attached, without reading DEFAULT, nor what it held before.
    let before = continued.map(|partition| partition.range);
    let whole = Range { from: before.map_or(range.from, |before| before.from), to: range.to };
    let attach = || match before {
        Some(_) => {
            proof::with(layout.owner, &target, &inside(&layout, whole), || attach(&layout, &target, whole))
        }
        None => attach(&layout, &target, whole),
    };
    match &default {
        Some((default, _)) => {
            proof::with(layout.owner, &default.qualified(), &outside(&layout, whole), attach)?;
        }
        None => attach()?,
    }
    let partition = continued.map(|p| p.name.clone());
    let partition = partition.or_else(|| new.and_then(|new| last_part(&new))).unwrap_or_default();
    Ok(Some(Placed { partition, range: whole, rows, widened: before.is_some() }))
}

fn times(layout: &Layout, partition: &Partition) -> Result<Times> {
    layout.require_usable(partition)?;
    Times::of(layout.owner, partition.oid, &layout.time_column)
}

/// The table first, as its users do.
fn lock(layout: &Layout, strong: bool, continued: Option<&Partition>) -> Result<()> {
    let mode = if strong { pg_sys::AccessExclusiveLock } else { pg_sys::ShareUpdateExclusiveLock };
    let mut locks: Vec<(pg_sys::Oid, Mode)> = vec![(layout.table.oid, mode)];
    locks.extend(
        continued.iter().chain(&layout.default.as_ref()).map(|p| (p.oid, pg_sys::AccessExclusiveLock)),
    );
    locks::lock_all(guc::lock_timeout(), &locks)
}

fn drop_unused(layout: &Layout, table: Option<&String>) -> Result<Option<Placed>> {
    if let Some(table) = table {
        layout.owner.run(format!("DROP TABLE {table}"))?;
    }
    Ok(None)
}

// ---- the table -------------------------------------------------------------------------------------------

/// As what a new partition is stored: the newest one.
pub fn template(layout: &Layout) -> pg_sys::Oid {
    layout.partitions.last().or(layout.default.as_ref()).map_or(layout.table.oid, |p| p.oid)
}

/// Makes a table that can be attached: as the partitioned one, stored as `template`, and the same may be done
/// with it, by the same roles. Returns its qualified name.
pub fn create(layout: &Layout, name: &str, template: pg_sys::Oid) -> Result<String> {
    let parent = &layout.table;
    let table = qualified(&parent.schema, name);
    let (storage, identity) = storage(template)?;
    let sql = format!(
        "CREATE TABLE {table} (LIKE {} INCLUDING ALL EXCLUDING IDENTITY EXCLUDING STATISTICS) {storage}",
        parent.qualified()
    );
    {
        let _owner = layout.owner.act();
        locks::lock(&sql, &parent.qualified(), parent.oid)?;
    }
    if let Some(identity) = identity {
        layout.owner.run(format!("ALTER TABLE {table} REPLICA IDENTITY {identity}"))?;
    }
    revoke_default_privileges(layout.owner, &table)?;
    grants(parent.oid, &table)?.iter().try_for_each(|grant| layout.owner.run(grant))?;
    Ok(table)
}

/// How `template` is stored, as clauses of CREATE TABLE, and its REPLICA IDENTITY if that is not the default.
pub fn storage(template: pg_sys::Oid) -> Result<(String, Option<&'static str>)> {
    let found = spi::query(
        "SELECT CASE WHEN c.relkind = 'r' THEN m.amname::text END, s.spcname::text, o.options,
             c.relreplident::text
         FROM pg_catalog.pg_class c
         LEFT JOIN pg_catalog.pg_am m ON m.oid = c.relam
         LEFT JOIN pg_catalog.pg_tablespace s ON s.oid = c.reltablespace
         LEFT JOIN pg_catalog.pg_class t ON t.oid = c.reltoastrelid
         CROSS JOIN LATERAL (
             SELECT string_agg(format('%s = %L', prefix || split_part(option, '=', 1),
                                      substr(option, strpos(option, '=') + 1)), ', ') AS options
             FROM (SELECT '' AS prefix, unnest(c.reloptions) AS option
                   UNION ALL SELECT 'toast.', unnest(t.reloptions)) AS a) AS o
         WHERE c.oid = $1",
        &[template.into()],
        |r| Ok((r.get::<String>(1)?, r.get::<String>(2)?, r.get::<String>(3)?, spi::value::<String>(r, 4)?)),
    )
    .one()?;
    let Some((method, tablespace, options, identity)) = found else {
        return Ok((String::new(), None));
    };
    let clauses = [
        method.map(|method| format!("USING {}", quoted(&method))),
        options.map(|options| format!("WITH ({options})")),
        tablespace.map(|tablespace| format!("TABLESPACE {}", quoted(&tablespace))),
    ];
    let identity = match identity.as_str() {
        "f" => Some("FULL"),
        "n" => Some("NOTHING"),
        _ => None,
    };
    Ok((clauses.into_iter().flatten().collect::<Vec<_>>().join(" "), identity))
}

/// What the partitioned table grants, for `table`. With row security nothing: its policies are not the
/// partition's.
fn grants(parent: pg_sys::Oid, table: &str) -> Result<Vec<String>> {
    spi::query(
        "SELECT format('GRANT %s ON %s TO %s%s', a.privilege_type, $2,
                       CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) END,
                       CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
         FROM pg_catalog.pg_class c, pg_catalog.aclexplode(c.relacl) AS a
         WHERE c.oid = $1 AND NOT c.relrowsecurity AND a.grantee <> c.relowner",
        &[parent.into(), table.into()],
        |r| spi::value(r, 1),
    )
}

/// Capture's triggers, if it is the captured table that gets the partition. Before it is attached: no row is
/// missed.
pub fn create_triggers(layout: &Layout, table: &str) -> Result<()> {
    if captured::capture_of(layout.table.oid)?.is_some()
        && let Some(table) = Table::named(table)?
    {
        let keys = relation::partition_keys(&relation::relation_tree(layout.table.oid)?)?;
        for (_, operation) in missing_triggers_within(layout.table.oid, table.oid)? {
            spi::run(&Capture::trigger(&operation, &table.qualified(), &keys), &[])?;
        }
    }
    Ok(())
}

/// The right to write what [`move_rows`] notes of capture's triggers, before the table is locked.
pub fn lock_capture(layout: &Layout) -> Result<()> {
    match captured::capture_of(layout.table.oid)? {
        Some(_) => fence::lock_rows(guc::lock_timeout(), "capture", ""),
        None => Ok(()),
    }
}

/// Renames a table, and its indexes: LiteLLM's index job goes by their names. `T_x_idx` becomes `NAME_x_idx`;
/// one that is not called after the table gets the suffix, if there is one.
pub fn rename(owner: Owner, schema: &str, table: &str, name: &str, suffix: Option<&str>) -> Result<()> {
    let relation = qualified(schema, table);
    let indexes = index_names(&relation)?;
    owner.run(format!("ALTER TABLE {relation} RENAME TO {}", quoted(name)))?;
    for index in indexes {
        let renamed = match (index.strip_prefix(&format!("{table}_")), suffix) {
            (Some(rest), _) => text::suffixed(name, &format!("_{rest}")),
            (None, Some(suffix)) => text::suffixed(&index, suffix),
            (None, None) => continue,
        };
        rename_index(owner, schema, &index, &free_name([schema, schema], &renamed)?)?;
    }
    Ok(())
}

pub fn rename_index(owner: Owner, schema: &str, index: &str, name: &str) -> Result<()> {
    owner.run(format!("ALTER INDEX {} RENAME TO {}", qualified(schema, index), quoted(name)))
}

/// In alphabetical order.
pub fn index_names(relation: &str) -> Result<Vec<String>> {
    spi::query(
        "SELECT c.relname::text FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
         WHERE i.indrelid = pg_catalog.to_regclass($1) ORDER BY 1",
        &[relation.into()],
        |r| spi::value(r, 1),
    )
}

// ---- the rows --------------------------------------------------------------------------------------------

/// Moves the rows that meet `condition`, for which there is an index, from one table to another, past all
/// triggers. Both are locked by us alone, and so is what is noted of capture ([`lock_capture`]).
pub fn move_rows(layout: &Layout, from: pg_sys::Oid, to: &str, condition: &str) -> Result<i64> {
    refuse_references_to(layout)?;
    let name = relation::relation_name(from)?;
    let columns = relation::stored_columns(from)?;
    // Nobody sees them disabled: we hold the lock that this takes.
    let is_captured = captured::capture_of(layout.table.oid)?.is_some();
    let (mut triggers, mut captured) = (vec![], vec![]);
    for table in std::iter::once(from).chain(relation::find_relation(to)?) {
        triggers.extend(self::triggers(table)?);
        // Where one is missing already, rows may have been missed: that is for the watch to see.
        if is_captured && missing_triggers_within(layout.table.oid, table)?.is_empty() {
            captured.push(table);
        }
    }
    let owner = layout.owner;
    for trigger in &triggers {
        trigger.set(owner, "DISABLE")?;
    }
    let checks = not_valid(layout, to)?;
    for (name, _) in &checks {
        owner.run(format!("ALTER TABLE {to} DROP CONSTRAINT {name}"))?;
    }
    let rows = {
        // Indexes and generated columns may call code of the owner's.
        let _owner = owner.act().with(c"enable_seqscan", c"off");
        spi::execute(
            &format!(
                "WITH moved AS (DELETE FROM ONLY {name} WHERE {condition} RETURNING {columns})
                 INSERT INTO {to} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM moved"
            ),
            &[],
        )?
    };
    // A rule may have made something else of it. The partitions are attached without a look at the rows.
    let left = format!("SELECT FROM ONLY {name} WHERE {condition} LIMIT 1");
    let left = {
        let _owner = owner.act().with(c"enable_seqscan", c"off");
        spi::exists(&left, &[])?
    };
    if left {
        return Err(Error::KeptBack(name));
    }
    for (name, definition) in &checks {
        owner.run(format!("ALTER TABLE {to} ADD CONSTRAINT {name} {definition} NOT VALID"))?;
    }
    for trigger in &triggers {
        trigger.set(owner, trigger.enable)?;
    }
    if !captured.is_empty() {
        // The watch would take them for ones that somebody has disabled for a while.
        note_triggers(&captured)?;
    }
    Ok(rows)
}

/// CHECKs of a table that is no partition now, which old rows of the partitioned table need not meet: their
/// names and definitions. None if one uses what is a third role's: its text would call that role's code.
fn not_valid(layout: &Layout, table: &str) -> Result<Vec<(String, String)>> {
    let of = [layout.table.oid.into(), table.into()];
    let checks = "FROM pg_catalog.pg_constraint p JOIN pg_catalog.pg_constraint k ON k.conname = p.conname
                      AND k.contype = 'c' AND k.conrelid = pg_catalog.to_regclass($2)
                  JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
                  WHERE p.conrelid = $1 AND p.contype = 'c' AND NOT p.convalidated";
    let objects = format!("SELECT k.tableoid AS classid, k.oid AS objid, c.relowner AS owner {checks}");
    if !relation::code_of_third_roles(&objects, &of)?.is_empty() {
        return Ok(vec![]);
    }
    let sql = format!(
        "SELECT quote_ident(k.conname), pg_catalog.regexp_replace(pg_catalog.pg_get_constraintdef(k.oid),
             ' NOT VALID$', '') {checks}"
    );
    spi::query(&sql, &of, |r| Ok((spi::value(r, 1)?, spi::value(r, 2)?)))
}

/// An enabled trigger of a table.
struct Trigger {
    table: pg_sys::Oid,
    name: String,
    /// How it is enabled.
    enable: &'static str,
    /// Before PostgreSQL 15 one that a partition has from its table, which only a superuser may disable.
    is_internal: bool,
}

impl Trigger {
    fn set(&self, owner: Owner, how: &str) -> Result<()> {
        let table = relation::relation_name(self.table)?;
        let sql = format!("ALTER TABLE {table} {how} TRIGGER {}", self.name);
        if !self.is_internal {
            return owner.run(sql);
        }
        // It calls nothing of the owner's. But the name could mean another table by now.
        spi::run(&sql, &[])?;
        match relation::find_relation(&table)? == Some(self.table) {
            true => Ok(()),
            false => Err(Error::CameBetween(table)),
        }
    }
}

/// The enabled triggers of a table, but for those of foreign keys.
fn triggers(relation: pg_sys::Oid) -> Result<Vec<Trigger>> {
    spi::query(
        "SELECT quote_ident(tgname), tgenabled::text, tgisinternal FROM pg_catalog.pg_trigger
         WHERE tgrelid = $1 AND tgenabled <> 'D' AND (NOT tgisinternal OR tgparentid <> 0)
           AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint k WHERE k.oid = tgconstraint AND k.contype = 'f')",
        &[relation.into()],
        |r| {
            let enable = match spi::value::<String>(r, 2)?.as_str() {
                "A" => "ENABLE ALWAYS",
                "R" => "ENABLE REPLICA",
                _ => "ENABLE",
            };
            Ok(Trigger { table: relation, name: spi::value(r, 1)?, enable, is_internal: spi::value(r, 3)? })
        },
    )
}

/// As [`refuse_references`], to the table or any partition of it: who moves rows between those.
pub fn refuse_references_to(layout: &Layout) -> Result<()> {
    refuse_references(&relation::relation_tree(layout.table.oid)?, &layout.table.name)
}

/// A foreign key could delete rows of other tables when a row leaves one of these, and keeps them from being
/// dropped.
pub fn refuse_references(relations: &[pg_sys::Oid], name: &str) -> Result<()> {
    let reference = spi::query(
        "SELECT conrelid::regclass::text FROM pg_catalog.pg_constraint
         WHERE contype = 'f' AND confrelid = ANY ($1)",
        &[relations.to_vec().into()],
        |r| spi::value::<String>(r, 1),
    )
    .one()?;
    match reference {
        None => Ok(()),
        Some(by) => Err(Error::Referenced { relation: name.into(), by }),
    }
}

// ---- the statements --------------------------------------------------------------------------------------

pub fn detach(layout: &Layout, partition: &str) -> Result<()> {
    layout.owner.run(format!("ALTER TABLE {} DETACH PARTITION {partition}", layout.table.qualified()))
}

/// Finishes a DETACH … CONCURRENTLY that was interrupted. Waits, within lock_timeout, also for who may still
/// see the partition.
pub fn finish_detach(layout: &Layout, partition: &Partition) -> Result<()> {
    let (table, partition_name) = (layout.table.qualified(), partition.qualified());
    let sql = format!("ALTER TABLE {table} DETACH PARTITION {partition_name} FINALIZE");
    let _owner = layout.owner.act();
    locks::lock(&sql, &partition_name, partition.oid)
}

pub fn attach(layout: &Layout, table: &str, range: Range) -> Result<()> {
    let parent = layout.table.qualified();
    layout.owner.run(format!("ALTER TABLE {parent} ATTACH PARTITION {table} FOR VALUES {range}"))
}

pub fn attach_default(layout: &Layout, table: &str) -> Result<()> {
    layout.owner.run(format!("ALTER TABLE {} ATTACH PARTITION {table} DEFAULT", layout.table.qualified()))
}

/// The condition that all rows of a partition meet, written as the server writes it.
pub fn inside(layout: &Layout, range: Range) -> String {
    let time = layout.time();
    let from = (range.from != Moment::MIN).then(|| format!(" AND {time} >= {}", range.from));
    let to = (range.to != Moment::MAX).then(|| format!(" AND {time} < {}", range.to));
    format!("{time} IS NOT NULL{}{}", from.unwrap_or_default(), to.unwrap_or_default())
}

/// The condition that the rows of DEFAULT meet when a partition has `range`.
pub fn outside(layout: &Layout, range: Range) -> String {
    let time = layout.time();
    let before = (range.from != Moment::MIN).then(|| format!(" OR {time} < {}", range.from));
    let after = (range.to != Moment::MAX).then(|| format!(" OR {time} >= {}", range.to));
    format!("{time} IS NULL{}{}", before.unwrap_or_default(), after.unwrap_or_default())
}

fn last_part(qualified: &str) -> Option<String> {
    Table::named(qualified).ok().flatten().map(|table| table.name)
}

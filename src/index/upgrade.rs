//! What a release of LiteLLM does to its spend log when it starts: columns, indexes, and what its schema
//! tools take away or cannot do. Changes nothing.
//!
//! The facts are those of LiteLLM's packages 1.83.14, 1.92.2, 1.100.5, 1.105.7, 1.109.1 and 1.110.2 with
//! their migrations: what came between two of them is held against the later one. What of it is still to come
//! is seen from the table, not from the version that it was made by.

use crate::error::{Error, Result};
use crate::index::catalogue;
use crate::index::plan::Size;
use crate::server::relation::{self, Table, free_name};
use crate::server::spi::{self, Found, value};
use crate::server::text::{qualified, quoted, suffixed};
use pgrx::prelude::*;

/// Major and minor.
type Version = (u32, u32);

const OLDEST: Version = (1, 83);
const NEWEST: Version = (1, 110);

/// From here on LiteLLM knows of partitioned tables.
const KNOWS_PARTITIONS: Version = (1, 100);
/// From here on it makes no difference to the database unless it is asked to.
const RESOLVES_BY_DEPLOY: Version = (1, 105);

struct Column {
    since: Version,
    name: &'static str,
    definition: &'static str,
}

const COLUMNS: [Column; 5] = [
    Column { since: OLDEST, name: "request_duration_ms", definition: "INTEGER" },
    Column {
        since: (1, 100),
        name: "created_at",
        definition: "TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP",
    },
    Column {
        since: (1, 100),
        name: "updated_at",
        definition: "TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP",
    },
    Column { since: (1, 105), name: "litellm_call_id", definition: "TEXT" },
    Column { since: (1, 105), name: "billing_agent_id", definition: "TEXT" },
];

struct Index {
    since: Version,
    /// The end of its name, after the table's.
    suffix: &'static str,
    columns: &'static [&'static str],
    /// By a migration, which keeps writers out; else LiteLLM builds it concurrently once it serves.
    blocks: bool,
}

const INDEXES: [Index; 6] = [
    Index { since: OLDEST, suffix: "startTime_idx", columns: &["startTime"], blocks: true },
    Index { since: OLDEST, suffix: "end_user_idx", columns: &["end_user"], blocks: true },
    Index { since: OLDEST, suffix: "session_id_idx", columns: &["session_id"], blocks: true },
    Index {
        since: OLDEST,
        suffix: "startTime_request_id_idx",
        columns: &["startTime", "request_id"],
        blocks: true,
    },
    Index {
        since: (1, 105),
        suffix: "api_key_startTime_idx",
        columns: &["api_key", "startTime"],
        blocks: false,
    },
    Index { since: (1, 105), suffix: "litellm_call_id_idx", columns: &["litellm_call_id"], blocks: false },
];

/// How many seconds LiteLLM lets its migrations run, of which one may build an index, unless it is told
/// otherwise.
fn limit_of(version: Version) -> i64 {
    if version < RESOLVES_BY_DEPLOY { 60 } else { 600 }
}

/// What is changed, by what, what that does here, and what to do before.
pub struct Row {
    pub change: String,
    pub by: &'static str,
    pub effect: String,
    pub remedy: Option<String>,
}

pub fn check(table: &Table, version: &str) -> Result<Vec<Row>> {
    catalogue::require_spend_log(table)?;
    let wanted = parse(version)?;
    let (tree, there) = (relation::relation_tree(table.oid)?, indexes(table.oid)?);
    let mut rows = vec![];
    if wanted < OLDEST || wanted > NEWEST {
        let effect =
            format!("what is known reaches from {}.{} to {}.{}", OLDEST.0, OLDEST.1, NEWEST.0, NEWEST.1);
        let remedy = Some("read the migrations of that release for \"LiteLLM_SpendLogs\"".into());
        rows.push(Row { change: format!("LiteLLM {version}"), by: "", effect, remedy });
    }
    rows.extend(new_columns(table, wanted, tree.len()));
    rows.extend(new_indexes(table, wanted, &Size::of(table, &tree)?, &there)?);
    rows.extend(taken_away(table, wanted, &there));
    rows.extend(refused(table, wanted));
    Ok(rows)
}

/// `1.110.2`, `v1.83.14-stable`, `1.92`.
fn parse(version: &str) -> Result<Version> {
    let mut numbers =
        version.trim().trim_start_matches('v').split(['.', '-', '+']).map(|part| part.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) => Ok((major, minor)),
        _ => Err(Error::Version(version.into())),
    }
}

// ---- what comes ------------------------------------------------------------------------------------------

fn new_columns(table: &Table, wanted: Version, tables: usize) -> Vec<Row> {
    let missing =
        COLUMNS.iter().filter(|column| column.since <= wanted && table.type_of(column.name).is_none());
    missing
        .map(|column| Row {
            change: format!("column {}", quoted(column.name)),
            by: "a migration",
            effect: format!(
                "ACCESS EXCLUSIVE on {}, behind which everybody else waits; no row is rewritten. End long transactions first",
                if tables > 1 { format!("the table and its {} partitions", tables - 1) } else { "the table".into() }
            ),
            remedy: Some(format!(
                "{SHORT} ALTER TABLE {} ADD COLUMN IF NOT EXISTS {} {}; {AS_BEFORE}",
                table.qualified(),
                quoted(column.name),
                column.definition
            )),
        })
        .collect()
}

/// Before a statement that keeps others out while it waits for them.
const SHORT: &str = "SET lock_timeout = '1s';";
/// Before one that keeps nobody out, and that would leave an index half built if its wait were ended.
const PATIENT: &str = "SET lock_timeout = 0;";
const AS_BEFORE: &str = "RESET lock_timeout;";

/// A plain index on the table: its name, and its columns if it is a B-tree of nothing but columns.
struct Plain {
    name: String,
    columns: Vec<String>,
    valid: bool,
}

fn indexes(table: pg_sys::Oid) -> Result<Vec<Plain>> {
    spi::query(
        "SELECT c.relname::text,
                CASE WHEN m.amname = 'btree' AND i.indnatts = i.indnkeyatts AND NOT i.indisunique
                    THEN ARRAY(SELECT attname::text FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, n)
                               JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum ORDER BY k.n)
                    ELSE '{}' END, i.indisvalid
         FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid JOIN pg_catalog.pg_am m ON m.oid = c.relam
         WHERE i.indrelid = $1 AND i.indpred IS NULL AND i.indexprs IS NULL AND NOT i.indisprimary ORDER BY 1",
        &[table.into()],
        |r| Ok(Plain { name: value(r, 1)?, columns: value(r, 2)?, valid: value(r, 3)? }),
    )
}

impl Index {
    fn name(&self, table: &str) -> String {
        suffixed(table, &format!("_{}", self.suffix))
    }

    fn list(&self) -> String {
        self.columns.iter().map(|column| quoted(column)).collect::<Vec<_>>().join(", ")
    }
}

fn new_indexes(table: &Table, wanted: Version, size: &Size, there: &[Plain]) -> Result<Vec<Row>> {
    let mut rows = vec![];
    for index in INDEXES.iter().filter(|index| index.since <= wanted) {
        let name = index.name(&table.name);
        let by = match index.blocks {
            true => "a migration",
            false => "LiteLLM's index job, once it serves",
        };
        let found = there.iter().find(|found| found.name == name);
        if let Some(found) = found {
            if !found.valid {
                let change = format!("index {} is INVALID", quoted(&name));
                let effect = "none: it is there by its name. No query uses it; a build that failed has left it, or one goes on"
                    .into();
                rows.push(Row { change, by, effect, remedy: Some(build(table, index)?) });
            }
            continue;
        }
        // A migration goes by the name, the job adopts another of the same columns.
        if !index.blocks && there.iter().any(|found| found.valid && found.columns == index.columns) {
            continue;
        }
        let seconds = size.seconds();
        let change = format!("index {} on ({})", quoted(&name), index.list());
        rows.push(match index.blocks {
            false => Row {
                change,
                by,
                effect: format!("CREATE INDEX CONCURRENTLY, about {seconds} s; nobody waits"),
                remedy: None,
            },
            true => {
                let limit = limit_of(wanted);
                let late = match seconds > limit {
                    true => format!("; LiteLLM ends it after {limit} s, and does not start"),
                    false => String::new(),
                };
                let effect = format!("CREATE INDEX: writers wait for about {seconds} s{late}");
                Row { change, by, effect, remedy: Some(build(table, index)?) }
            }
        });
    }
    Ok(rows)
}

/// The statements that build it beforehand under LiteLLM's name, or finish it, without keeping anybody out.
fn build(table: &Table, index: &Index) -> Result<String> {
    let name = index.name(&table.name);
    if table.kind != "p" {
        let there = Part::of(table, &name, None)?;
        return Ok(format!("{PATIENT} {} {AS_BEFORE}", there.build(table, index)));
    }
    let parent = qualified(&table.schema, &name);
    let mut parts = vec![];
    let children = "SELECT inhrelid FROM pg_catalog.pg_inherits WHERE inhparent = $1 AND NOT inhdetachpending
        ORDER BY 1";
    for oid in spi::query(children, &[table.oid.into()], |r| value(r, 1))? {
        let Some(partition) = Table::find(oid)? else { continue };
        if partition.kind != "r" {
            let what = "is partitioned itself, or foreign: build the index by hand";
            return Ok(format!("{} {what}", partition.qualified()));
        }
        let part = Part::of(&partition, &index.name(&partition.name), Some((table.oid, &name)))?;
        parts.push((partition, part));
    }
    let is_there = !spi::query(
        "SELECT FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
         WHERE i.indrelid = $1 AND c.relname = $2",
        &[table.oid.into(), name.as_str().into()],
        |_| Ok(()),
    )?
    .is_empty();
    let mut sql = vec![];
    // It becomes valid when the last one is attached, and never if one that is attached was not valid.
    let is_lost = is_there && parts.iter().all(|(_, part)| part.attached)
        || parts.iter().any(|(_, part)| part.attached && part.valid == Some(false));
    if is_lost {
        sql.push(format!("{SHORT} DROP INDEX {parent};"));
        parts.iter_mut().filter(|(_, part)| part.attached).for_each(|(_, part)| {
            *part = Part { valid: None, attached: false, name: part.name.clone() };
        });
    }
    if is_lost || !is_there {
        let on = table.qualified();
        sql.push(format!(
            "{SHORT} CREATE INDEX IF NOT EXISTS {} ON ONLY {on} ({});",
            quoted(&name),
            index.list()
        ));
    }
    for (partition, part) in parts.iter().filter(|(_, part)| !part.attached) {
        if part.valid != Some(true) {
            sql.push(format!("{PATIENT} {}", part.build(partition, index)));
        }
        let child = qualified(&partition.schema, &part.name);
        sql.push(format!("{SHORT} ALTER INDEX {parent} ATTACH PARTITION {child};"));
    }
    sql.push(AS_BEFORE.into());
    Ok(sql.join(" "))
}

/// The index on a plain table or on a partition.
struct Part {
    name: String,
    /// `None`: it is not there.
    valid: Option<bool>,
    attached: bool,
}

impl Part {
    /// Of that name, or whatever is attached to the index called so of the partitioned table.
    fn of(table: &Table, name: &str, parent: Option<(pg_sys::Oid, &str)>) -> Result<Part> {
        let (parent, parent_name) = parent.unzip();
        let found = spi::query(
            "SELECT c.relname::text, i.indisvalid, p.oid IS NOT NULL
             FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
             LEFT JOIN (pg_catalog.pg_inherits h JOIN pg_catalog.pg_class p ON p.oid = h.inhparent
                        JOIN pg_catalog.pg_index pi ON pi.indexrelid = p.oid)
                 ON h.inhrelid = c.oid AND pi.indrelid = $3 AND p.relname = $4
             WHERE i.indrelid = $1 AND (p.oid IS NOT NULL OR c.relname = $2 AND NOT c.relispartition) ORDER BY 3 DESC LIMIT 1",
            &[table.oid.into(), name.into(), parent.into(), parent_name.into()],
            |r| Ok(Part { name: value(r, 1)?, valid: Some(value(r, 2)?), attached: value(r, 3)? }),
        ).one()?;
        if let Some(part) = found {
            return Ok(part);
        }
        // LiteLLM asks for the table's index by its name; those of partitions may have any.
        let name = match parent {
            Some(_) => free_name([&table.schema, &table.schema], name)?,
            None => name.into(),
        };
        Ok(Part { name, valid: None, attached: false })
    }

    fn build(&self, table: &Table, index: &Index) -> String {
        match self.valid {
            Some(_) => format!("REINDEX INDEX CONCURRENTLY {};", qualified(&table.schema, &self.name)),
            None => format!(
                "CREATE INDEX CONCURRENTLY IF NOT EXISTS {} ON {} ({});",
                quoted(&self.name),
                table.qualified(),
                index.list()
            ),
        }
    }
}

// ---- what is taken away, or fails ------------------------------------------------------------------------

/// Plain indexes that LiteLLM does not know.
fn taken_away(table: &Table, wanted: Version, there: &[Plain]) -> Option<Row> {
    let known = |found: &&Plain| INDEXES.iter().any(|index| index.name(&table.name) == found.name);
    let strange: Vec<String> =
        there.iter().filter(|found| !known(found)).map(|found| quoted(&found.name)).collect();
    if strange.is_empty() {
        return None;
    }
    let by = match wanted < RESOLVES_BY_DEPLOY {
        true => "LiteLLM's start after any migration, and --use_prisma_db_push",
        false => "--use_prisma_db_push and --use_legacy_migration_resolver only",
    };
    Some(Row {
        change: format!("index {}", strange.join(", ")),
        by,
        effect: "DROP INDEX: it is no part of LiteLLM's schema".into(),
        remedy: Some(
            "one with a predicate, such as WHERE team_id IS NOT NULL, is left alone; \
             spend_index_plan() shows ours"
                .into(),
        ),
    })
}

/// The key of a partitioned table has the time in it, and LiteLLM's schema has not.
fn refused(table: &Table, wanted: Version) -> Option<Row> {
    if table.kind != "p" {
        return None;
    }
    let (by, effect) = match wanted < KNOWS_PARTITIONS {
        true => (
            "LiteLLM's start after any migration, and --use_prisma_db_push",
            "it fails: \"unique constraint on partitioned table must include all partitioning columns\"",
        ),
        false => (
            "--use_prisma_db_push only",
            "LiteLLM does not start with that option while the table is partitioned",
        ),
    };
    Some(Row {
        change: "primary key (\"request_id\")".into(),
        by,
        effect: effect.into(),
        remedy: Some(format!(
            "{}; or first SELECT * FROM spend_partition_revert();",
            match wanted < KNOWS_PARTITIONS {
                true => "upgrade to 1.100 or later",
                false => "start LiteLLM without it, which applies migrations",
            }
        )),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_as_litellm_writes_it() {
        for (text, version) in
            [("1.110.2", (1, 110)), ("v1.83.14-stable", (1, 83)), (" 1.92 ", (1, 92)), ("2.0.0+x", (2, 0))]
        {
            assert_eq!(parse(text).ok(), Some(version), "{text}");
        }
        for text in ["", "latest", "1", "1.x", "-1.2"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}

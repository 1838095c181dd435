//! What each index of the catalogue would cost and serve on a table, and what else would help: for a DBA to
//! read before any is built. Changes nothing.

use crate::error::Result;
use crate::index::catalogue::{self, CATALOGUE, Index};
use crate::litellm::spend_log::TIME;
use crate::partition::layout::Layout;
use crate::server::cost;
use crate::server::relation::{self, Table};
use crate::server::session::Owner;
use crate::server::spi::{self, Found, value};
use crate::server::text::{qualified, quoted};
use crate::state::indexes::PREFIX;
use pgrx::prelude::*;
use std::collections::HashMap;

/// An index, or advice that is none.
pub struct Row {
    pub item: &'static str,
    pub definition: String,
    pub serves: String,
    pub since: Option<&'static str>,
    pub rows: Option<i64>,
    pub bytes: Option<i64>,
    pub seconds: Option<i64>,
    pub insert_cost: Option<&'static str>,
    pub state: Option<String>,
}

pub fn plan(table: &Table) -> Result<Vec<Row>> {
    catalogue::require_spend_log(table)?;
    let tree = relation::relation_tree(table.oid)?;
    let (size, existing) = (Size::of(table, &tree)?, existing(&tree)?);
    let mut rows =
        CATALOGUE.iter().map(|index| row(index, table, &size, &existing)).collect::<Result<Vec<_>>>()?;
    rows.extend(advice(table)?);
    Ok(rows)
}

fn row(index: &'static Index, table: &Table, size: &Size, existing: &[Existing]) -> Result<Row> {
    let obstacle = index.require_possible(table).err();
    let rows = match &obstacle {
        None => Some(size.rows_of(index, table)?),
        Some(_) => None,
    };
    Ok(Row {
        item: index.name,
        // Without the extension that it needs there is no schema to name.
        definition: index.definition().unwrap_or_default(),
        serves: index.serves.into(),
        since: Some(index.since),
        rows,
        bytes: rows.map(|rows| size.bytes_of(index, rows)),
        seconds: rows.map(|rows| size.seconds_of(index, rows)),
        insert_cost: Some(index.insert_cost),
        state: Some(match obstacle {
            Some(obstacle) => {
                let told = obstacle.tell();
                format!("not possible: {}. {}", told.message, told.hint.unwrap_or_default())
            }
            None => state(index, size.tables, existing),
        }),
    })
}

// ---- what there is ---------------------------------------------------------------------------------------

/// An index on the table or a partition.
pub struct Existing {
    name: String,
    valid: bool,
    /// It is the partitioned table's, and says nothing of a partition.
    of_parent: bool,
    method: String,
    /// One in another order than its column's is empty: no query of LiteLLM's asks for that.
    keys: Vec<String>,
    columns: Vec<String>,
    predicate: Option<String>,
}

fn existing(tree: &[pg_sys::Oid]) -> Result<Vec<Existing>> {
    spi::query(
        "SELECT c.relname::text, i.indisvalid, c.relkind = 'I', m.amname::text,
                ARRAY(SELECT CASE WHEN a.attcollation <> i.indcollation[n - 1] THEN ''
                        ELSE pg_catalog.pg_get_indexdef(c.oid, n, false) END
                    FROM generate_series(1, i.indnkeyatts) AS n LEFT JOIN pg_catalog.pg_attribute a
                        ON a.attrelid = i.indrelid AND a.attnum = i.indkey[n - 1] ORDER BY n),
                ARRAY(SELECT pg_catalog.pg_get_indexdef(c.oid, n, false)
                    FROM generate_series(1, i.indnatts) AS n),
                pg_catalog.pg_get_expr(i.indpred, i.indrelid)
         FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
         JOIN pg_catalog.pg_am m ON m.oid = c.relam WHERE i.indrelid = ANY ($1) ORDER BY 1",
        &[tree.to_vec().into()],
        |r| {
            Ok(Existing {
                name: value(r, 1)?,
                valid: value(r, 2)?,
                of_parent: value(r, 3)?,
                method: value(r, 4)?,
                keys: value(r, 5)?,
                columns: value(r, 6)?,
                predicate: r.get(7)?,
            })
        },
    )
}

/// Those of a table that are not ours.
pub fn of_others(table: pg_sys::Oid) -> Result<Vec<Existing>> {
    let mut found = existing(&[table])?;
    found.retain(|index| index.valid && !index.name.starts_with(PREFIX));
    Ok(found)
}

/// Whether the index is there, as ours or as another that does the same, and on how many tables.
fn state(index: &Index, tables: usize, existing: &[Existing]) -> String {
    let leaves = || existing.iter().filter(|found| !found.of_parent && found.valid);
    let ours = leaves().filter(|found| index.is_name(&found.name)).count();
    let on =
        |count: usize| if tables > 1 { format!(" on {count} of {tables} partitions") } else { String::new() };
    if ours > 0 {
        return format!("built{}", on(ours));
    }
    let alike: Vec<_> = leaves().filter(|found| found.does(index)).collect();
    if let Some(first) = alike.first() {
        return format!("there already: {}{}", quoted(&first.name), on(alike.len()));
    }
    match leaves().find(|found| found.begins_as(index)) {
        Some(near) => format!("not there; {} begins alike", quoted(&near.name)),
        None => "not there".into(),
    }
}

impl Existing {
    fn has_method_of(&self, index: &Index) -> bool {
        self.method == if index.is_of_trigrams() { "gin" } else { "btree" }
    }

    /// It has the same keys first, what else the index holds, and all of its rows.
    pub fn does(&self, index: &Index) -> bool {
        let has = |column: &&str| self.columns.iter().any(|c| c == column);
        let rows = match &self.predicate {
            None => index.leaves_out_nulls_only(),
            Some(predicate) => predicate == index.predicate,
        };
        let begins = self.keys.iter().zip(index.keys).filter(|(found, key)| found == *key).count();
        self.has_method_of(index) && begins == index.keys.len() && index.included.iter().all(has) && rows
    }

    fn begins_as(&self, index: &Index) -> bool {
        let first = index.keys.first().copied();
        index.leaves_out_nulls_only()
            && self.has_method_of(index)
            && self.keys.first().map(String::as_str) == first
    }
}

// ---- what it would cost ----------------------------------------------------------------------------------

pub struct Size {
    owner: Owner,
    /// How many partitions have rows, or whether the table itself has.
    tables: usize,
    heap: i64,
    rows: f64,
    /// Of the columns, in bytes, as ANALYZE has found it.
    widths: HashMap<String, i32>,
}

/// 7.2 µs a row whose `metadata` of 3.2 kB is out of line and cached.
const OPENED_ROWS_A_SECOND: f64 = 140e3;
/// Of a column that nothing is known of, such as a value in JSON.
const WIDTH: i32 = 16;
/// Of a tuple's header and its line pointer.
const TUPLE: i64 = 12;
/// How full a page of a B-tree is when it was built.
const FILL: f64 = 0.9;
/// Of 150,000 rows with 2,000 aliases of about a dozen letters an index of trigrams had 23 bytes a row.
const TRIGRAM: f64 = 1.5;

impl Size {
    pub fn of(table: &Table, tree: &[pg_sys::Oid]) -> Result<Size> {
        let size = spi::query(
            "SELECT count(*), coalesce(sum(pg_catalog.pg_relation_size(oid)), 0)::bigint,
                 coalesce(sum(greatest(reltuples, 0)), 0)::float8
             FROM pg_catalog.pg_class WHERE oid = ANY ($1) AND relkind = 'r'",
            &[tree.to_vec().into()],
            |r| Ok((value::<i64>(r, 1)?, value::<i64>(r, 2)?, value::<f64>(r, 3)?)),
        )
        .one()?;
        let (tables, heap, rows) = size.unwrap_or_default();
        let widths = spi::query(
            "SELECT a.attname::text, max(s.stawidth) FROM pg_catalog.pg_statistic s
             JOIN pg_catalog.pg_attribute a ON a.attrelid = s.starelid AND a.attnum = s.staattnum
             WHERE s.starelid = ANY ($1) GROUP BY 1",
            &[tree.to_vec().into()],
            |r| Ok((value::<String>(r, 1)?, value::<i32>(r, 2)?)),
        )?;
        let owner = Owner::role(table.owner_oid);
        Ok(Size { owner, tables: tables as usize, heap, rows, widths: widths.into_iter().collect() })
    }

    fn rows_of(&self, index: &Index, table: &Table) -> Result<i64> {
        let from = format!("FROM {} WHERE {}", table.qualified(), index.counted_by);
        cost::estimated_rows(self.owner, &from)
    }

    fn width(&self, key: &str) -> i64 {
        self.widths.get(key.trim_matches('"')).copied().unwrap_or(WIDTH).into()
    }

    fn bytes_of(&self, index: &Index, rows: i64) -> i64 {
        let width: i64 = index.keys.iter().chain(index.included).map(|key| self.width(key)).sum();
        let tuple = match index.is_of_trigrams() {
            true => width as f64 * TRIGRAM,
            false => (TUPLE + (width + 7) / 8 * 8) as f64 / FILL,
        };
        (rows as f64 * tuple) as i64
    }

    /// Of an index on all rows.
    pub fn seconds(&self) -> i64 {
        cost::seconds_to_index(self.heap, self.rows, 0.0)
    }

    fn seconds_of(&self, index: &Index, rows: i64) -> i64 {
        let opened = if index.opens_json() { 2.0 * self.rows / OPENED_ROWS_A_SECOND } else { 0.0 };
        cost::seconds_to_index(self.heap, rows as f64, opened)
    }
}

// ---- what is no index ------------------------------------------------------------------------------------

/// Columns whose values are large.
const LARGE: [&str; 4] = ["metadata", "messages", "response", "proxy_server_request"];

/// The partition that new ones are stored as, or the table itself.
fn newest(table: &Table) -> Result<pg_sys::Oid> {
    if table.kind != "p" {
        return Ok(table.oid);
    }
    let layout = Layout::of(table.oid, TIME)?;
    Ok(layout.partitions.last().or(layout.default.as_ref()).map_or(table.oid, |partition| partition.oid))
}

fn advice(table: &Table) -> Result<Vec<Row>> {
    let (mut rows, name) = (vec![], table.qualified());
    let mut advise = |definition: String, serves: &str| {
        let serves = serves.into();
        let (since, rows_, bytes, seconds, insert_cost, state) = (None, None, None, None, None, None);
        rows.push(Row {
            item: "advice",
            definition,
            serves,
            since,
            rows: rows_,
            bytes,
            seconds,
            insert_cost,
            state,
        });
    };
    // For a role that writes to it: LiteLLM's may be another than the owner.
    let is_set = !spi::query(
        "SELECT FROM pg_catalog.pg_db_role_setting s, unnest(s.setconfig) AS setting
         WHERE (s.setrole = 0 OR pg_catalog.has_table_privilege(s.setrole, $1::oid, 'INSERT'))
             AND s.setdatabase IN (0, (SELECT oid FROM pg_catalog.pg_database
                 WHERE datname = current_database()))
           AND setting = 'plan_cache_mode=force_custom_plan'",
        &[table.oid.into()],
        |_| Ok(()),
    )?
    .is_empty();
    if !is_set {
        let database =
            spi::query("SELECT pg_catalog.current_database()::text", &[], |r| value::<String>(r, 1))?;
        let database = quoted(&database.into_iter().next().unwrap_or_default());
        advise(
            format!(
                "ALTER ROLE {} IN DATABASE {database} SET plan_cache_mode = 'force_custom_plan';",
                quoted(&table.owner)
            ),
            "the search box of the Logs page: a plan for any search reads all of the window. If LiteLLM's role is another, it is for that role",
        );
    }
    let unset = spi::query(
        "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n
             ON n.oid = c.relnamespace
         WHERE c.oid = $1 AND c.relkind = 'r'
           AND NOT coalesce(c.reloptions::text LIKE '%autovacuum_vacuum_insert_scale_factor=%', false)",
        &[newest(table)?.into()],
        |r| Ok(qualified(&value::<String>(r, 1)?, &value::<String>(r, 2)?)),
    )?;
    for leaf in unset {
        advise(
            format!("ALTER TABLE {leaf} SET (autovacuum_vacuum_insert_scale_factor = 0.02);"),
            "sums that an index alone can answer: vacuum comes sooner to rows that were only inserted. New partitions get it from the newest one",
        );
    }
    let has_lz4 = "SELECT FROM pg_catalog.pg_settings WHERE name = 'default_toast_compression'
        AND 'lz4' = ANY (enumvals) AND setting <> 'lz4'";
    let pglz = spi::query(
        "SELECT attname::text FROM pg_catalog.pg_attribute
         WHERE attrelid = $1 AND attname = ANY ($2::text[]) AND NOT attisdropped AND attcompression <> 'l'
             ORDER BY attnum",
        &[table.oid.into(), LARGE.map(str::to_string).to_vec().into()],
        |r| value::<String>(r, 1),
    )?;
    if !pglz.is_empty() && spi::query(has_lz4, &[], |_| Ok(())).any()? {
        let columns = pglz.iter().map(|c| format!("ALTER COLUMN {} SET COMPRESSION lz4", quoted(c)));
        advise(
            format!("ALTER TABLE {name} {};", columns.collect::<Vec<_>>().join(", ")),
            "filters that open metadata, and inserts: values are compressed and opened faster. Old ones stay, of a partitioned table those of its partitions too. A short exclusive lock",
        );
    }
    Ok(rows)
}

//! What a conversion would do, for a DBA to read before it does it: each step with its lock, its size and
//! about how long it takes, every object that it touches, and what is in its way. Changes nothing.

use crate::error::Result;
use crate::litellm::spend_log::SPEND_LOGS;
use crate::partition::calendar::{self, Moment, Range, missing};
use crate::partition::convert::{Conversion, Options};
use crate::partition::layout;
use crate::server::cost;
use crate::server::relation::Table;
use crate::server::session::Failure;
use crate::server::spi::{self, Found, value};
use crate::server::text::{self, quoted};

/// Step, what is done, to which object, under which lock, and how much or how long.
pub type Row = (String, String, String, String, String);

pub fn plan(table: Table, options: Options) -> Result<Vec<Row>> {
    let name = table.qualified();
    let size = Size::of(&table)?;
    let conversion = Conversion::new(&table, options);
    conversion.check_cutover()?;
    let dependents = conversion.dependents()?;
    let mut rows: Vec<Row> = vec![];
    let mut row = |step: &str, what: &str, object: &str, lock: &str, estimate: String| {
        rows.push((step.into(), what.into(), object.into(), lock.into(), estimate));
    };
    for obstacle in &dependents.obstacles {
        row("in the way", obstacle, &name, "", "the conversion is refused until it is gone".into());
    }
    if let Err(missing) = conversion.require_time_index() {
        let missing = Failure::from(missing);
        let what = format!("{}; {}", missing.message, missing.hint().unwrap_or_default());
        row("in the way", &what, &name, "", missing.detail().unwrap_or_default());
    }
    if let Some(beyond) = conversion.rows_beyond()? {
        let detail = Failure::from(beyond).detail().unwrap_or_default();
        row("in the way", "rows from the cutover on", &name, "", detail);
    }
    if rows.is_empty() {
        rows.push(("in the way".into(), "nothing".into(), name.clone(), String::new(), String::new()));
    }
    let interval = conversion.options.interval.as_str();
    rows.push((
        "cutover".into(),
        format!(
            "rows before it stay in the old table, one partition; from it on a partition holds a {interval}"
        ),
        conversion.cutover()?.to_string(),
        String::new(),
        "in UTC".into(),
    ));
    let columns = conversion.key_columns(&dependents);
    rows.push((
        "index".into(),
        format!("create unique index concurrently on ({columns})"),
        conversion.key_index(),
        "SHARE UPDATE EXCLUSIVE on the table".into(),
        size.index(),
    ));
    let swap = |what: &str, object: &str| {
        let lock = "ACCESS EXCLUSIVE on the table and its views";
        (
            String::from("swap"),
            what.to_string(),
            object.to_string(),
            lock.to_string(),
            String::from("catalogs only"),
        )
    };
    rows.push(swap("rename", &format!("{name} to {}", quoted(&conversion.legacy()))));
    rows.push(swap("create the partitioned table", &name));
    if let Some((key, _)) = &dependents.key {
        rows.push(swap(&format!("primary key on ({columns})"), key));
    }
    rows.extend(
        dependents.indexes.iter().map(|i| swap("index: the old one is attached, and renamed", &i.name)),
    );
    rows.extend(dependents.triggers.iter().map(|t| swap("trigger: made on the new table", &t.name)));
    let pieces = dependents.constraints.iter().chain(&dependents.pieces);
    let mut pieces: Vec<_> = pieces.map(|p| (p.kind.as_str(), p.object.as_str())).collect();
    // Some take several statements.
    pieces.dedup();
    let given = |(kind, object): (&str, &str)| swap(&format!("{kind}: given to the new table"), object);
    rows.extend(pieces.into_iter().map(given));
    if !table.options.is_empty() {
        rows.push(swap("storage options: given to new partitions", &table.options));
    }
    rows.push(swap("attach the old table, without a scan", &conversion.legacy()));
    rows.push(swap("create the default partition", &text::suffixed(&table.name, "_pdefault")));
    for view in &dependents.views {
        rows.push(swap("view: reads the new table", &view.name));
        rows.extend(readers(view.oid)?.iter().map(|reader| swap("view over it: not touched", reader)));
    }
    rows.extend(
        dependents.functions.iter().map(|f| swap("function with an SQL body: reads the new table", &f.name)),
    );
    let periods = conversion.interval().periods(layout::now(), conversion.options.precreate);
    let before = Range { from: Moment::MIN, to: conversion.cutover()? };
    for period in missing(&periods, &[before]) {
        rows.push((
            "after".into(),
            "maintenance creates a partition".into(),
            calendar::name(&table.name, period),
            "SHARE UPDATE EXCLUSIVE on the table, ACCESS EXCLUSIVE on the default partition".into(),
            "a moment".into(),
        ));
    }
    if table.name == SPEND_LOGS {
        rows.push((
            "after".into(),
            "LiteLLM must be started without --use_prisma_db_push; up to 1.92 it does not start after a migration either".into(),
            name,
            String::new(),
            "until the table is reverted; spend_upgrade_check() knows what else a release does".into(),
        ));
    }
    Ok(in_one(rows))
}

/// Rows that differ in their object only become one, with how many they are.
fn in_one(rows: Vec<Row>) -> Vec<Row> {
    let alike = |a: &Row, b: &Row| (&a.0, &a.1, &a.3, &a.4) == (&b.0, &b.1, &b.3, &b.4);
    let one = |rows: &[Row]| {
        let (step, action, _, lock, estimate) = rows[0].clone();
        let objects: Vec<&str> = rows.iter().map(|row| row.2.as_str()).collect();
        let count = if rows.len() > 1 { format!("{}: ", rows.len()) } else { String::new() };
        (step, action, format!("{count}{}", objects.join(", ")), lock, estimate)
    };
    rows.chunk_by(alike).map(one).collect()
}

/// Views over a view.
fn readers(view: pgrx::pg_sys::Oid) -> Result<Vec<String>> {
    spi::query(
        "WITH RECURSIVE reader(oid) AS (
             SELECT $1 UNION
             SELECT w.ev_class FROM reader JOIN pg_catalog.pg_depend d ON d.refobjid = reader.oid
                 AND d.refclassid = 'pg_class'::regclass
             JOIN pg_catalog.pg_rewrite w ON d.classid = 'pg_rewrite'::regclass AND w.oid = d.objid)
         SELECT oid::regclass::text FROM reader WHERE oid <> $1 ORDER BY 1",
        &[view.into()],
        |r| value(r, 1),
    )
}

struct Size {
    heap: i64,
    key: i64,
    rows: f32,
}

impl Size {
    fn of(table: &Table) -> Result<Size> {
        let size = spi::query(
            "SELECT pg_catalog.pg_relation_size(c.oid), greatest(c.reltuples, 0),
                    coalesce((SELECT pg_catalog.pg_relation_size(indexrelid) FROM pg_catalog.pg_index
                              WHERE indrelid = c.oid AND indisprimary), 0)
             FROM pg_catalog.pg_class c WHERE c.oid = $1",
            &[table.oid.into()],
            |r| Ok(Size { heap: value(r, 1)?, rows: value(r, 2)?, key: value(r, 3)? }),
        )
        .one()?;
        Ok(size.unwrap_or(Size { heap: 0, key: 0, rows: 0.0 }))
    }

    fn index(&self) -> String {
        let rows = f64::from(self.rows);
        let seconds = cost::seconds_to_index(self.heap, rows, 0.0);
        format!("writes about {}, about {seconds} s", bytes(self.key + (rows * 8.0) as i64))
    }
}

fn bytes(bytes: i64) -> String {
    match bytes {
        0..1_000_000 => format!("{} kB", bytes / 1000),
        _ => format!("{} MB", bytes / 1_000_000),
    }
}

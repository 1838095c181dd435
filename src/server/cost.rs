//! What work on a table takes, for orders of magnitude only.

use crate::error::Result;
use crate::server::session::Owner;
use crate::server::spi;
use pgrx::datum::Json;

/// Measured on a busy machine with two cores (2026-11, PostgreSQL 15).
const SCANNED_BYTES_A_SECOND: f64 = 500e6;
const INDEXED_ROWS_A_SECOND: f64 = 400e3;

/// Seconds that an index on so many rows is built CONCURRENTLY in, of a table of so many bytes, if its
/// expressions take some as well. It reads the table twice: what was written meanwhile comes in the second
/// time.
pub fn seconds_to_index(bytes: i64, rows: f64, expressions: f64) -> i64 {
    let time = 2.0 * bytes as f64 / SCANNED_BYTES_A_SECOND + rows / INDEXED_ROWS_A_SECOND + expressions;
    time.ceil().max(1.0) as i64
}

/// How many rows the planner expects of what follows SELECT, asked as the table's owner.
pub fn estimated_rows(owner: Owner, from: &str) -> Result<i64> {
    let sql = format!("EXPLAIN (FORMAT JSON) SELECT {from}");
    let plans = owner.fresh(&sql, &[], |r| spi::value::<Json>(r, 1))?;
    let rows = plans.first().and_then(|Json(plan)| plan.pointer("/0/Plan/Plan Rows")?.as_f64());
    Ok(rows.unwrap_or(0.0) as i64)
}

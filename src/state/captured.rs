//! The captured table, as it is noted.

use crate::error::Result;
use crate::server::relation::{find_relation, last_value, relation_name};
use crate::server::session::Owner;
use crate::server::spi::{Found, current, query, run, value};
use crate::state::restore::HERE;
use crate::state::rollups::record;
use crate::state::step::Task;
use crate::state::window::Window;
use pgrx::prelude::*;

/// Notes a failure around the captured table, or that it is over.
pub fn record_capture_error(message: Option<&str>) -> Result<()> {
    record("capture", "$1 IS NOT NULL", "", message)
}

/// As [`record_capture_error`], of a task. What the watch has found wrong
/// with the table stays until that is mended: what fails of the others follows from it. What it said of views
/// that were replaced stays until the next attach, behind what fails: it would not find them again. What came
/// out of a dump is not written to: the marker must not be older.
pub fn record_task_error(task: Task, message: Option<&str>) -> Result<()> {
    let sql = format!(
        "UPDATE litellm_spend.capture SET last_error = now.error,
             last_error_at = CASE WHEN $2 IS NOT NULL THEN clock_timestamp()
                                  WHEN now.error IS NOT NULL THEN last_error_at END
         FROM (SELECT source, nullif(concat_ws('\n', $2,
                   substring(last_error FROM '(?:^|\\n)(views? \".*)$')), '') AS error
               FROM litellm_spend.capture) AS now
         WHERE now.source = capture.source AND origin = {HERE} AND capture.last_error IS DISTINCT FROM now.error
           AND ($1 OR capture.last_error IS NULL OR capture.last_error NOT LIKE 'watch: %')"
    );
    run(&sql, &[(task == Task::Watch).into(), message.map(str::to_string).into()])
}

/// What is noted of the captured table.
pub fn capture_error() -> Result<Option<String>> {
    let sql = "SELECT last_error FROM litellm_spend.capture";
    Ok(query(sql, &[], |r| Ok(r.get::<String>(1)?)).one()?.flatten())
}

/// Who wrote each capture trigger last, as it is noted: a jsonb of transactions by triggers' OIDs.
pub fn noted_triggers() -> Result<String> {
    let sql = "SELECT triggers::text FROM litellm_spend.capture";
    Ok(query(sql, &[], |r| value::<String>(r, 1)).one()?.unwrap_or_else(|| "{}".into()))
}

pub struct CaptureState {
    pub source: String,
    pub schema: String,
    pub table: String,
    pub relation: pg_sys::Oid,
    /// Who owned the table when we attached; `None` in a database that an older version attached.
    pub owner: Option<pg_sys::Oid>,
    pub columns: Vec<String>,
    pub subtract: bool,
    pub predecessor: Option<pg_sys::Oid>,
    pub failures_seen: i64,
    pub window: Window,
}

impl CaptureState {
    /// As whom the raw rows are read: the owner that we know of. When it has changed, the watch or an attach
    /// comes first.
    pub fn owner(&self) -> Result<Owner> {
        let owner = Owner::of(self.relation)?;
        match self.owner.map(Owner::role).filter(|known| *known != owner) {
            None => Ok(owner),
            Some(known) => Err(known.lost(relation_name(self.relation)?, owner.name()?)),
        }
    }

    /// Whether capture has failed, and nobody has looked yet what that has left to repair.
    pub fn has_unseen_failures(&self) -> Result<bool> {
        let failures = find_relation("litellm_spend.capture_failures")?;
        let last = failures.map(last_value).transpose()?.flatten();
        Ok(last.unwrap_or(0) != self.failures_seen)
    }

    /// The tables that hold raw rows: the captured one and, after a replacement, the one before it.
    pub fn relations(&self) -> Vec<pg_sys::Oid> {
        [Some(self.relation), self.predecessor].into_iter().flatten().collect()
    }
}

/// As [`CaptureState::relations`], but of now, not as the transaction's snapshot has them.
pub fn captured_relations() -> Result<Vec<pg_sys::Oid>> {
    let sql = "SELECT oid::oid FROM litellm_spend.capture, unnest(ARRAY[relation, predecessor]) AS oid
        WHERE oid IS NOT NULL";
    current(sql, &[], |r| value(r, 1))
}

/// What is noted of this table, if it is the captured one.
pub fn capture_of(relation: pg_sys::Oid) -> Result<Option<CaptureState>> {
    Ok(capture()?.filter(|state| state.relation == relation))
}

pub fn capture() -> Result<Option<CaptureState>> {
    query(
        &format!(
            "SELECT source, table_schema::text, table_name::text, relation::oid, columns,
                 on_delete = 'subtract',
                    predecessor::oid, failures_seen, candidates::text, owner::oid
             FROM litellm_spend.capture WHERE origin = {HERE}"
        ),
        &[],
        |r| {
            Ok(CaptureState {
                source: value(r, 1)?,
                schema: value(r, 2)?,
                table: value(r, 3)?,
                relation: value(r, 4)?,
                columns: value(r, 5)?,
                subtract: value(r, 6)?,
                predecessor: r.get(7)?,
                failures_seen: value(r, 8)?,
                window: serde_json::from_str(&value::<String>(r, 9)?)?,
                owner: r.get(10)?,
            })
        },
    )
    .one()
}

//! What is noted of rollups: their names, how far they are covered, what failed.

use crate::error::Result;
use crate::server::spi::{Found, query, run, value};
use crate::state::frozen::Range;
use crate::state::restore::HERE;
use crate::state::sources::CHANGE_LOG;
use pgrx::prelude::*;

/// Names of the rollups that we fill, of one source or of all.
pub fn rollup_names(source: Option<&str>) -> Result<Vec<String>> {
    query(
        "SELECT name FROM litellm_spend.rollup
             WHERE ($1 IS NULL OR source = $1) AND source IS NOT NULL AND definition IS NOT NULL
                 ORDER BY name",
        &[source.map(str::to_string).into()],
        |r| value(r, 1),
    )
}

/// The rollups that we fill, and their sources.
pub fn merged() -> Result<Vec<(String, String)>> {
    let sql =
        "SELECT name, source FROM litellm_spend.rollup WHERE source IS NOT NULL AND definition IS NOT NULL";
    query(sql, &[], |r| Ok((value(r, 1)?, value(r, 2)?)))
}

/// Rollups that belong to `role`, or to one that it may act for; the first `most`.
pub fn rollups_of(role: pg_sys::Oid, most: usize) -> Result<Vec<String>> {
    query(
        "SELECT r.name FROM litellm_spend.rollup r LEFT JOIN litellm_spend.source s ON s.name = r.source
             LEFT JOIN litellm_spend.capture c ON c.source = r.source
             LEFT JOIN pg_catalog.pg_class t ON t.oid = coalesce(c.relation, s.relation)
             WHERE pg_catalog.pg_has_role($1, coalesce(r.owner, t.relowner), 'USAGE')
             ORDER BY r.name LIMIT $2",
        &[role.into(), (most as i64).into()],
        |r| value(r, 1),
    )
}

pub fn any_rollup() -> Result<bool> {
    query("SELECT FROM litellm_spend.rollup LIMIT 1", &[], |_| Ok(())).any()
}

pub fn rollup_exists(name: &str) -> Result<bool> {
    let sql = "SELECT FROM litellm_spend.rollup WHERE name = $1";
    query(sql, &[name.into()], |_| Ok(())).any()
}

/// Whether rollups of the source wait for backfill.
pub fn is_uncovered(source: &str) -> Result<bool> {
    let sql = format!(
        "SELECT FROM litellm_spend.rollup r JOIN litellm_spend.source s ON s.name = r.source AND s.origin = {HERE}
         WHERE r.source = $1 AND r.covered_from > '-infinity' LIMIT 1"
    );
    query(&sql, &[source.into()], |_| Ok(())).any()
}

/// It knows nothing, and is to be computed.
pub fn forget(name: &str) -> Result<()> {
    run(
        "UPDATE litellm_spend.rollup
             SET unknown_days = '{(,)}', covered_from = 'infinity', backfill_first = NULL,
                 backfill_last = NULL, backfill_began = NULL
             WHERE name = $1",
        &[name.into()],
    )
}

/// Notes whose the built-in rollups are while no table is captured, or with `None` that one is.
pub fn keep_for(owner: Option<pg_sys::Oid>) -> Result<()> {
    let sql = "UPDATE litellm_spend.rollup SET owner = $2 WHERE source = $1";
    run(sql, &[CHANGE_LOG.into(), owner.into()])
}

/// As it was noted. `None`: it is not known.
pub fn kept_for() -> Result<Option<pg_sys::Oid>> {
    let sql = "SELECT owner::oid FROM litellm_spend.rollup WHERE source = $1 AND owner IS NOT NULL LIMIT 1";
    query(sql, &[CHANGE_LOG.into()], |r| value(r, 1)).one()
}

/// These know a range from now on: it was computed, or nobody knows of a row there.
pub fn know(names: &[String], range: Range) -> Result<()> {
    run(
        "UPDATE litellm_spend.rollup
             SET unknown_days = nullif(unknown_days - tsmultirange(tsrange(nullif($2, '-infinity'), $3)), '{}')
             WHERE name = ANY ($1) AND unknown_days && tsrange(nullif($2, '-infinity'), $3)",
        &[names.to_vec().into(), range.start.into(), range.end.into()],
    )
}

/// How far the backfill of the built-in rollups is: the day, and how many are left. `None`: all is covered.
pub fn backfill_progress() -> Result<Option<String>> {
    let sql = "SELECT CASE WHEN isfinite(covered_from)
                    THEN covered_from::date || coalesce(': ' || days_covered || ' of ' || days || ' days',
                        '') END,
                extract(epoch FROM time_left)::float8
         FROM litellm_spend.backfill JOIN litellm_spend.rollup USING (name, covered_from)
         WHERE source = $1 AND covered_from > '-infinity' ORDER BY covered_from DESC LIMIT 1";
    let found = query(sql, &[CHANGE_LOG.into()], |r| Ok((r.get::<String>(1)?, r.get::<f64>(2)?))).one()?;
    Ok(found.map(|(days, left)| {
        let days = days.unwrap_or_else(|| "no day is covered yet".into());
        match left {
            Some(seconds) if seconds >= 0.5 => format!("{days}, about {} left", roughly(seconds)),
            _ => days,
        }
    }))
}

fn roughly(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.0} h", s / 3600.0),
    }
}

/// Notes the failure of a rollup, or with `None` that it is over.
pub fn record_error(rollup: &str, message: Option<&str>) -> Result<()> {
    record("rollup", "name = $1", rollup, message)
}

/// Keeps the time of the first occurrence: a failure that repeats in each round is written once.
pub fn record(table: &str, condition: &str, name: &str, message: Option<&str>) -> Result<()> {
    run(
        &format!(
            "UPDATE litellm_spend.{table}
                 SET last_error = $2, last_error_at = CASE WHEN $2 IS NOT NULL THEN clock_timestamp() END
             WHERE {condition} AND last_error IS DISTINCT FROM $2"
        ),
        &[name.into(), message.map(str::to_string).into()],
    )
}

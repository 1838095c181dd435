//! The reports' hours become days when they are old enough (`litellm_spend.hourly_retention`), so that what
//! the reports take on disk is bounded for each day that is kept.
//!
//! ```text
//!   a row a day, at midnight          | a row an hour
//! ------------------------------------+-----------------> hour
//!                          rollup.hours_from
//! ```
//! One would think that a table by day of its own is cleaner. But then each day would be in two places, and a
//! late row in either. Here the sum of a day stays what it was, in the same table, at each moment; only from
//! which hour it came is forgotten. What comes late for such a day is merged by its hour as ever, and added
//! up with the others a day later.
//!
//! A day is a step: under the rollup's fence, and readers never wait. No table of a user's is touched.

use crate::error::Result;
use crate::guc;
use crate::litellm::backfill::day_after;
use crate::server::locks::Patience;
use crate::server::spi;
use crate::server::text::SCHEMA;
use crate::state::captured;
use crate::state::fence::Fence;
use pgrx::datum::Timestamp;

/// Adds up the next day of a report whose hours are old enough. `false`: there is none, or its fence is
/// taken.
pub fn step(patience: Patience) -> Result<bool> {
    let days = guc::hourly_retention();
    let Some(capture) = captured::capture()?.filter(|_| days > 0) else { return Ok(false) };
    // Before the fence, which takes an XID: as a rule there is nothing to do until tomorrow.
    let due = spi::current(
        &format!(
            "SELECT r.name, kept.first
             FROM {SCHEMA}.rollup r, LATERAL (
                 SELECT date_trunc('day', clock_timestamp() AT TIME ZONE 'UTC') - make_interval(days => $2)
             ) AS kept(first)
             WHERE r.source = $1 AND (r.definition ->> 'optional')::boolean
                 AND r.covered_from = '-infinity' AND r.hours_from < kept.first
             ORDER BY r.name LIMIT 1"
        ),
        &[capture.source.as_str().into(), days.into()],
        |r| Ok((spi::value::<String>(r, 1)?, spi::value(r, 2)?)),
    )?;
    let Some((name, first_kept)) = due.into_iter().next() else { return Ok(false) };
    let Some(fence) = Fence::take(&name, patience)? else { return Ok(false) };
    add_up(&fence, first_kept).map(|()| true)
}

/// The next day that has hours, and with the last of them what has come late for all days before.
fn add_up(fence: &Fence, first_kept: Timestamp) -> Result<()> {
    let definition = fence.filled()?;
    let Some((first, days)) = definition.first_hour().zip(definition.hours_to_days()) else { return Ok(()) };
    let state = format!("SELECT hours_from FROM {SCHEMA}.rollup WHERE name = $1");
    let hours_from = spi::fresh(&state, &[fence.name.as_str().into()], |r| spi::value::<Timestamp>(r, 1))?;
    // Somebody may have been faster.
    let Some(hours_from) = hours_from.into_iter().find(|from| *from < first_kept) else { return Ok(()) };
    let first = spi::fresh(&first, &[hours_from.into(), first_kept.into()], |r| Ok(r.get::<Timestamp>(1)?))?;
    let end = first.into_iter().next().flatten().map(day_after).transpose()?.unwrap_or(first_kept);
    let start = if end < first_kept { hours_from } else { Timestamp::negative_infinity() };
    spi::execute(&days, &[start.into(), end.into()])?;
    let noted = format!("UPDATE {SCHEMA}.rollup SET hours_from = $2 WHERE name = $1");
    spi::execute(&noted, &[fence.name.as_str().into(), end.into()]).map(drop)
}

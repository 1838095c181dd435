//! The reports' hours become days when they are old enough (`litellm_spend.hourly_retention`), so that what
//! the reports take on disk is bounded for each day that is kept.
//!
//! ```text
//!   a row a day, at midnight          | a row an hour
//! ------------------------------------+-----------------> hour
//!                          source.hours_from
//! ```
//! One would think that a table by day of its own is cleaner. But then each day would be in two places, and a
//! late row in either. Here the sum of a day stays what it was, in the same table, at each moment; only from
//! which hour it came is forgotten. What a row of the change log, of the truth or of the tail counts for is
//! said by the same border, in the definition of the reports: so what comes late for such a day, or is
//! computed again, is at midnight with the rest, and merges, rebuilds, live views and verify need not know.
//!
//! A day is a step: under the fences of all rollups, so that nobody merges by the border of before; readers
//! never wait. No table of a user's is touched.

use crate::error::Result;
use crate::guc;
use crate::litellm::backfill::day_after;
use crate::server::locks::Patience;
use crate::server::spi::{self, Found};
use crate::state::captured;
use crate::state::fence::Fence;
use crate::state::sources::CHANGE_LOG;
use pgrx::datum::Timestamp;

/// Adds up the next day of the reports that is old enough. `false`: there is none, or a fence is taken.
pub fn step(patience: Patience) -> Result<bool> {
    let days = guc::hourly_retention();
    let Some(capture) = captured::capture()?.filter(|_| days > 0) else { return Ok(false) };
    // Before the fences, which take an XID: as a rule there is nothing to do until tomorrow.
    let border = spi::current(
        "SELECT date_trunc('day', clock_timestamp() AT TIME ZONE 'UTC') - make_interval(days => $2)
             FROM litellm_spend.rollup WHERE source = $1 AND (definition ->> 'optional')::boolean LIMIT 1",
        &[capture.source.as_str().into(), days.into()],
        |r| spi::value::<Timestamp>(r, 1),
    )?;
    let Some(border) = border.into_iter().next() else { return Ok(false) };
    let state = "SELECT hours_from FROM litellm_spend.source WHERE name = $1 AND hours_from < $2";
    let before = [capture.source.as_str().into(), border.into()];
    if !spi::current(state, &before, |_| Ok(())).any()? {
        return Ok(false);
    }
    let Some(fences) = Fence::take_all(&capture.source, patience)? else { return Ok(false) };
    // Somebody may have been faster.
    let hours_from = spi::fresh(state, &before, |r| spi::value::<Timestamp>(r, 1))?;
    let Some(hours_from) = hours_from.into_iter().next() else { return Ok(true) };
    let end = next_day(&fences, hours_from, border)?;
    for fence in &fences {
        if let Some(sql) = fence.filled()?.hours_to_days() {
            spi::run(&sql, &[hours_from.into(), end.into()])?;
        }
    }
    let noted = "UPDATE litellm_spend.source SET hours_from = $2 WHERE name = $1";
    spi::run(noted, &[capture.source.as_str().into(), end.into()])?;
    Ok(true)
}

/// Before the first report is made: there are all hours.
pub fn begin_anew() -> Result<()> {
    let sql = "UPDATE litellm_spend.source s SET hours_from = '-infinity'
         WHERE s.name = $1 AND s.hours_from > '-infinity' AND NOT EXISTS (
             SELECT FROM litellm_spend.rollup r
             WHERE r.source = s.name AND (r.definition ->> 'optional')::boolean)";
    spi::run(sql, &[CHANGE_LOG.into()])
}

/// The end of the first day that has hours, or the border if none has.
fn next_day(fences: &[Fence], hours_from: Timestamp, border: Timestamp) -> Result<Timestamp> {
    let mut firsts = vec![];
    for fence in fences {
        firsts.extend(fence.filled()?.first_hour());
    }
    if firsts.is_empty() {
        return Ok(border);
    }
    let sql = format!("SELECT min(first) FROM ({}) AS firsts", firsts.join(" UNION ALL "));
    let first =
        spi::fresh(&sql, &[hours_from.into(), border.into()], |r| Ok(r.get::<Timestamp>(1)?)).one()?;
    Ok(first.flatten().map(day_after).transpose()?.unwrap_or(border))
}

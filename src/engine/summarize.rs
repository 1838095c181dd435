//! Keeps BRIN indexes on a source's number up to its newest rows.
//!
//! Such an index says of a range of pages which numbers are there, once the range is summarized. PostgreSQL
//! does that when it vacuums the table, which for one that only grows is when a fifth of it is new. Until
//! then every merge, and every look at a live view, would read all that came since. So a worker that merges
//! summarizes the ranges that are full. Not the last one: each row that came would then change its summary.
//!
//! Lock: SHARE UPDATE EXCLUSIVE on the table, in a transaction of its own for the time that it takes to read
//! the new pages, so many at a time; who reads or writes does not notice. It is not waited for: whoever has
//! it, VACUUM or ANALYZE, say, is let alone. Whose rights: as the table's owner, restricted, whose
//! expressions the index may have beside the number.

use crate::error::Result;
use crate::server::locks;
use crate::server::relation;
use crate::server::session::{Failure, Owner, attempt};
use crate::server::spi;
use crate::state::sources::{self, Source};
use pgrx::prelude::*;
use std::cell::RefCell;
use std::collections::HashMap;

/// Pages that are summarized at a time, of all of a source's indexes together: 256 MB, which a slow disk
/// reads within the limit of the step.
const MOST: i64 = 32_768;

thread_local! {
    /// Of each index, which ranges a worker has yet to look at.
    static LEFT: RefCell<HashMap<pg_sys::Oid, Left>> = RefCell::default();
}

/// Summarizes what is full and new, from the end of each table back to where that has been done, and at most
/// so many pages. Returns how many there were.
pub fn newest_rows(source: &Source, most: i64) -> Result<i64> {
    let Some(relation) = sources::relation_of(source)? else { return Ok(0) };
    let column = relation::numbered_column(relation, source.sequence)?;
    let (most, mut pages) = (most.min(MOST), 0);
    for index in indexes(&relation::relation_tree(relation)?, &column)? {
        if pages < most && locks::try_lock(index.table, pg_sys::ShareUpdateExclusiveLock) {
            // An owner's broken expression stops no merge. VACUUM says of it what there is to say.
            let done = attempt(|| index.summarize(most - pages)).map_err(Failure::unless_cancel);
            pages += done.unwrap_or_default();
        }
    }
    Ok(pages)
}

/// Ranges of an index that are to be looked at: from the end of the table back, and those that have become
/// full since.
///
/// ```text
///  done before | back          | done | ahead               | not full
/// -------------+---------------+------+---------------------+---------> range
///              0 or unknown  back   ahead               full_ranges
/// ```
#[derive(Clone, Copy)]
struct Left {
    /// Below this one; 0: none.
    back: i64,
    /// From this one on.
    ahead: i64,
}

struct Index {
    oid: pg_sys::Oid,
    table: pg_sys::Oid,
    owner: Owner,
    pages_per_range: i64,
    /// Ranges that no row will be added to the end of.
    full_ranges: i64,
}

/// Those of the tables on the column, quoted.
fn indexes(tables: &[pg_sys::Oid], column: &str) -> Result<Vec<Index>> {
    let sql = "
        WITH found AS (
            SELECT i.indexrelid, t.oid, t.relowner, coalesce(
                       (SELECT option_value::bigint FROM pg_catalog.pg_options_to_table(c.reloptions)
                        WHERE option_name = 'pages_per_range'), 128) AS pages,
                   pg_catalog.pg_relation_size(t.oid) / pg_catalog.current_setting('block_size')::bigint AS all_pages
            FROM unnest($1::oid[]) AS tree(oid) JOIN pg_catalog.pg_class t USING (oid)
            JOIN pg_catalog.pg_index i ON i.indrelid = t.oid AND i.indisvalid
            JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid JOIN pg_catalog.pg_am m ON m.oid = c.relam
            JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = ANY (i.indkey::int2[])
            WHERE m.amname = 'brin' AND t.relkind = 'r' AND pg_catalog.quote_ident(a.attname) = $2)
        SELECT indexrelid, oid, relowner, pages, (all_pages - 1) / pages FROM found WHERE all_pages > pages";
    spi::query(sql, &[tables.to_vec().into(), column.into()], |r| {
        Ok(Index {
            oid: spi::value(r, 1)?,
            table: spi::value(r, 2)?,
            owner: Owner::role(spi::value(r, 3)?),
            pages_per_range: spi::value(r, 4)?,
            full_ranges: spi::value(r, 5)?,
        })
    })
}

impl Index {
    /// Summarizes ranges of at most so many pages, but one at least, and returns how many pages it has read.
    fn summarize(&self, most: i64) -> Result<i64> {
        let known = LEFT.with_borrow(|left| left.get(&self.oid).copied());
        // Of a table that was emptied meanwhile nothing is known.
        let known = known.filter(|left| left.ahead <= self.full_ranges);
        let mut left = known.unwrap_or(Left { back: self.full_ranges, ahead: self.full_ranges });
        let mut pages = 0;
        while pages < most && left.ahead < self.full_ranges {
            // That it was done before is found in a page of the index.
            pages += self.summarize_range(left.ahead)?.unwrap_or(1);
            left.ahead += 1;
        }
        while pages < most && left.back > 0 {
            left.back -= 1;
            match self.summarize_range(left.back)? {
                Some(read) => pages += read,
                None => left.back = 0,
            }
        }
        LEFT.with_borrow_mut(|all| all.insert(self.oid, left));
        Ok(pages)
    }

    /// The pages that it has read; `None`: that was done before.
    fn summarize_range(&self, range: i64) -> Result<Option<i64>> {
        let sql = "SELECT pg_catalog.brin_summarize_range($1::regclass, $2)";
        let page = range * self.pages_per_range;
        let done = self.owner.fresh(sql, &[self.oid.into(), page.into()], |r| spi::value::<i32>(r, 1))?;
        Ok((done != [0]).then_some(self.pages_per_range))
    }
}

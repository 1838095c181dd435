//! Statements through SPI.
//!
//! pgrx runs `select` on the transaction's first snapshot until the transaction has an XID, and `update` on a
//! fresh one. So what must be current is read with [`fresh`], and a look that finds nothing to do, which must
//! not write WAL, reads with [`query`]. What others may change while a call waits, above all which relations
//! there are and what inherits from what, is read with [`current`], which takes neither. Rows of a user's
//! table are read with `fresh`, whose snapshot is newer than the locks that it waits for, or when those are
//! had (`Owner::current`): an ALTER TABLE that rewrites the table leaves nothing of it to older snapshots.

use crate::error::{Error, Result};
use crate::server::parse;
use crate::server::session::{self, Failure};
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use pgrx::spi::{OwnedPreparedStatement, SpiHeapTupleData, SpiTupleTable};
use std::cell::RefCell;
use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::rc::Rc;

pub type Args<'a> = &'a [DatumWithOid<'a>];

/// Refuses a text that is more than one statement, whatever quotes it was meant to keep, and a statement on a
/// search_path that is neither pinned nor that of an owner as whom we act.
pub fn require_safe(sql: &str) -> Result<()> {
    if !session::path_is_ours() {
        return Err(Error::NotPinned);
    }
    // Nothing else separates statements, and hardly any text of ours has one.
    if !sql.contains(';') {
        return Ok(());
    }
    let text = std::ffi::CString::new(sql).map_err(|_| Error::SeveralStatements)?;
    if parse::statements(&text).len() == 1 { Ok(()) } else { Err(Error::SeveralStatements) }
}

/// Runs a query on the transaction's snapshot.
pub fn query<T>(sql: &str, args: Args, row: impl Fn(&SpiHeapTupleData) -> Result<T>) -> Result<Vec<T>> {
    require_safe(sql)?;
    Spi::connect(|client| rows(client.select(sql, None, args)?, row))
}

thread_local! {
    static KEPT: RefCell<HashMap<String, Rc<OwnedPreparedStatement>>> = RefCell::default();
}

/// As [`query`], with a plan that the session keeps: for what is asked again and again.
pub fn kept<T>(sql: &str, args: Args, row: impl Fn(&SpiHeapTupleData) -> Result<T>) -> Result<Vec<T>> {
    require_safe(sql)?;
    Spi::connect(|client| {
        let plan = match KEPT.with_borrow(|kept| kept.get(sql).cloned()) {
            Some(plan) => plan,
            None => {
                let types: Vec<PgOid> = args.iter().map(|arg| arg.oid().into()).collect();
                let plan = Rc::new(client.prepare(sql, &types)?.keep());
                KEPT.with_borrow_mut(|kept| kept.insert(sql.into(), plan.clone()));
                plan
            }
        };
        rows(client.select(&*plan, None, args)?, row)
    })
}

/// Runs a query on a snapshot of now, however long the statement has been running. Takes no XID.
pub fn current<T>(sql: &str, args: Args, row: impl Fn(&SpiHeapTupleData) -> Result<T>) -> Result<Vec<T>> {
    // SAFETY: an error of the server's ends the subtransaction, and the snapshot with it.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot()) };
    let found = query(sql, args, row);
    unsafe { pg_sys::PopActiveSnapshot() };
    found
}

/// Runs a query on a fresh snapshot. Takes an XID.
pub fn fresh<T>(sql: &str, args: Args, row: impl Fn(&SpiHeapTupleData) -> Result<T>) -> Result<Vec<T>> {
    require_safe(sql)?;
    Spi::connect_mut(|client| rows(client.update(sql, None, args)?, row))
}

fn rows<T>(table: SpiTupleTable, row: impl Fn(&SpiHeapTupleData) -> Result<T>) -> Result<Vec<T>> {
    table.into_iter().map(|tuple| row(&tuple)).collect()
}

/// Opens a query that is read in batches, each in a call of its own, on a snapshot of now. Returns the
/// cursor, which is closed by the batch after the last, or at the end of the transaction.
pub fn open_cursor(sql: &str, args: Args) -> Result<String> {
    require_safe(sql)?;
    // SAFETY: as of `current`; the cursor keeps the snapshot.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot()) };
    let cursor = Spi::connect(|client| Ok(client.try_open_cursor(sql, args)?.detach_into_name()));
    unsafe { pg_sys::PopActiveSnapshot() };
    cursor
}

/// The next rows of a cursor, which is read as whom it was opened.
pub fn fetch<T>(cursor: &str, most: i64, row: impl Fn(&SpiHeapTupleData) -> Result<T>) -> Result<Vec<T>> {
    Spi::connect(|client| {
        // No error closes it: one that runs cannot be closed, and an error within a drop ends the server.
        let mut cursor = ManuallyDrop::new(client.find_cursor(cursor)?);
        let batch = rows(cursor.fetch(most)?, row)?;
        if batch.is_empty() {
            drop(ManuallyDrop::into_inner(cursor));
        }
        Ok(batch)
    })
}

/// Runs a statement.
pub fn run(sql: &str, args: Args) -> Result<()> {
    execute(sql, args).map(drop)
}

/// Takes an XID, and with it every later query a fresh snapshot.
pub fn take_xid() -> Result<()> {
    run("SELECT 1", &[])
}

/// Runs a statement; returns the number of rows it processed.
pub fn execute(sql: &str, args: Args) -> Result<i64> {
    require_safe(sql)?;
    Spi::connect_mut(|client| Ok(client.update(sql, None, args)?.len() as i64))
}

/// The value of column `i`, which the query guarantees not to be NULL.
pub fn value<T: FromDatum + IntoDatum>(row: &SpiHeapTupleData, i: usize) -> Result<T> {
    Ok(row.get(i)?.ok_or(pgrx::spi::Error::InvalidPosition)?)
}

/// What is asked of the rows of a query of which one will do.
pub trait Found<T> {
    /// The first row, if there is one.
    fn one(self) -> Result<Option<T>>;
    /// Whether there is one.
    fn any(self) -> Result<bool>;
}

impl<T> Found<T> for Result<Vec<T>> {
    fn one(self) -> Result<Option<T>> {
        Ok(self?.into_iter().next())
    }

    fn any(self) -> Result<bool> {
        Ok(!self?.is_empty())
    }
}

pub fn exists(sql: &str, args: Args) -> Result<bool> {
    Ok(fresh(&format!("SELECT EXISTS ({sql})"), args, |r| value(r, 1))?.first().copied().unwrap_or(false))
}

/// Drops what is ours, unless something of anybody else's needs it: that is named.
pub fn unless_needed<T>(drop: impl FnOnce() -> Result<T>) -> Result<T> {
    PgTryBuilder::new(std::panic::AssertUnwindSafe(drop))
        .catch_when(PgSqlErrorCode::ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST, |caught| {
            Err(Error::Needed(Failure::from(caught)))
        })
        .execute()
}

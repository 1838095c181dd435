//! Many rows at once, past SPI's tables: a query's rows are looked at where the executor left them, and a
//! statement reads rows that were made here.
//!
//! Whose rights: those of who acts, as for any statement of [`crate::server::spi`]; no row of anybody's is
//! read otherwise than through the executor.

use crate::error::{Error, Result};
use crate::server::spi::{Args, require_safe};
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use pgrx::{PgMemoryContexts, PgTupleDesc};
use std::ffi::{CString, c_char, c_int, c_long};
use std::ptr;

/// Takes the rows of a query.
pub trait Sink {
    /// A row: its values, and which of them are NULL. They are gone when this returns. Whether it wants more.
    fn row(&mut self, values: &[pg_sys::Datum], nulls: &[bool]) -> bool;
}

/// A column of a query: its type, the type's modifier, and its collation.
pub type Returned = (pg_sys::Oid, i32, pg_sys::Oid);

/// # Safety
/// It describes rows.
unsafe fn columns_of(rows: pg_sys::TupleDesc) -> Vec<Returned> {
    let rows = unsafe { PgTupleDesc::from_pg_unchecked(rows) };
    rows.iter().map(|a| (a.atttypid, a.atttypmod, a.attcollation)).collect()
}

/// A query that is known before it is run.
pub struct Query {
    plan: pg_sys::SPIPlanPtr,
    pub columns: Vec<Returned>,
}

impl Query {
    pub fn new(sql: &str, arguments: Args) -> Result<Query> {
        require_safe(sql)?;
        let text = c_string(sql)?;
        let mut types: Vec<pg_sys::Oid> = arguments.iter().map(|argument| argument.oid()).collect();
        Spi::connect(|_| {
            // SAFETY: SPI is connected, and there are as many types as arguments. A plan of one statement has
            // one source; from here on only we free it.
            unsafe {
                let plan = pg_sys::SPI_prepare(text.as_ptr(), types.len() as c_int, types.as_mut_ptr());
                pg_sys::SPI_keepplan(plan);
                let sources = pg_sys::SPI_plan_get_plan_sources(plan);
                let source = (*(*sources).elements).ptr_value.cast::<pg_sys::CachedPlanSource>();
                Ok(Query { plan, columns: columns_of((*source).resultDesc) })
            }
        })
    }

    /// Gives its rows, on a fresh snapshot, to `sink`, for as long as it wants more. `false`: what it
    /// mentions has changed, its columns are not those that were known before, and no row was given.
    pub fn read(&self, arguments: Args, sink: &mut dyn Sink) -> Result<bool> {
        let given = |argument: &DatumWithOid| argument.datum().map(|value| value.sans_lifetime());
        let (mut values, mut nulls) = (vec![], vec![]);
        for argument in arguments.iter().map(given) {
            values.push(argument.unwrap_or(pg_sys::Datum::null()));
            nulls.push(if argument.is_none() { b'n' } else { b' ' } as c_char);
        }
        let dest = pg_sys::DestReceiver {
            receiveSlot: Some(receive),
            rStartup: Some(startup),
            rShutdown: Some(nothing),
            rDestroy: Some(nothing),
            mydest: pg_sys::CommandDest::DestNone,
        };
        let mut receiver = Receiver { dest, sink, columns: self.columns.len() };
        Spi::connect_mut(|_| {
            // SAFETY: SPI is connected, and the plan has as many arguments. An error of the server's ends the
            // transaction or subtransaction, and with it the portal.
            let portal = unsafe {
                pg_sys::SPI_cursor_open(ptr::null(), self.plan, values.as_mut_ptr(), nulls.as_ptr(), false)
            };
            // SAFETY: the portal is open, what it returns is fixed from here on, and the receiver outlives
            // the call.
            unsafe {
                // The server has analyzed the statement anew if anything that it mentions has changed.
                let same = columns_of((*portal).tupDesc) == self.columns;
                if same {
                    let dest = (&raw mut receiver).cast();
                    let all = c_long::MAX;
                    pg_sys::PortalRunFetch(portal, pg_sys::FetchDirection::FETCH_FORWARD, all, dest);
                }
                pg_sys::SPI_cursor_close(portal);
                Ok(same)
            }
        })
    }
}

impl Drop for Query {
    fn drop(&mut self) {
        // SAFETY: it is ours, and no portal runs it any more.
        unsafe { pg_sys::SPI_freeplan(self.plan) };
    }
}

/// What the server passes around as a pointer to its first field.
#[repr(C)]
struct Receiver<'a> {
    dest: pg_sys::DestReceiver,
    sink: &'a mut dyn Sink,
    columns: usize,
}

#[pg_guard]
unsafe extern "C-unwind" fn receive(
    slot: *mut pg_sys::TupleTableSlot,
    dest: *mut pg_sys::DestReceiver,
) -> bool {
    // SAFETY: it is the one of `read`. A slot has a value and a flag for each column once it is deformed.
    unsafe {
        let receiver = &mut *dest.cast::<Receiver>();
        let columns = receiver.columns;
        if ((*slot).tts_nvalid as usize) < columns {
            pg_sys::slot_getsomeattrs_int(slot, columns as c_int);
        }
        let values = std::slice::from_raw_parts((*slot).tts_values, columns);
        receiver.sink.row(values, std::slice::from_raw_parts((*slot).tts_isnull, columns))
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn startup(_d: *mut pg_sys::DestReceiver, _o: c_int, _t: pg_sys::TupleDesc) {}

#[pg_guard]
unsafe extern "C-unwind" fn nothing(_dest: *mut pg_sys::DestReceiver) {}

/// Rows between two times that the memory of their values is given back.
const KEPT: usize = 256;

/// Runs a statement that reads rows which are made here, from a relation that is called `name` and has the
/// columns of a table. `next` writes one row, and says whether there was another.
pub fn run_over(
    sql: &str,
    name: &str,
    table: &Opened,
    mut next: impl FnMut(&mut [pg_sys::Datum], &mut [bool]) -> Result<bool>,
) -> Result<()> {
    require_safe(sql)?;
    let name = c_string(name)?;
    Spi::connect_mut(|client| {
        let columns = table.types().len();
        let (mut values, mut nulls) = (vec![pg_sys::Datum::null(); columns], vec![true; columns]);
        let mut memory = PgMemoryContexts::new("litellm_spend rows");
        let mut rows = 0;
        // SAFETY: the store and the description of it live until the statement has ended; an error of the
        // server's frees them with SPI's memory. A row is copied when it is put.
        unsafe {
            let store = pg_sys::tuplestore_begin_heap(false, false, pg_sys::maintenance_work_mem);
            while memory.switch_to(|_| next(&mut values, &mut nulls))? {
                let (values, nulls) = (values.as_mut_ptr(), nulls.as_mut_ptr());
                pg_sys::tuplestore_putvalues(store, (*table.0).rd_att, values, nulls);
                rows += 1;
                if rows % KEPT == 0 {
                    pgrx::check_for_interrupts!();
                    memory.reset();
                }
            }
            let relation = pg_sys::palloc0(size_of::<pg_sys::EphemeralNamedRelationData>());
            let relation: pg_sys::EphemeralNamedRelation = relation.cast();
            (*relation).md.name = pg_sys::pstrdup(name.as_ptr());
            (*relation).md.reliddesc = table.oid();
            (*relation).md.enrtype = pg_sys::EphemeralNameRelationType::ENR_NAMED_TUPLESTORE;
            (*relation).md.enrtuples = rows as f64;
            (*relation).reldata = store.cast();
            pg_sys::SPI_register_relation(relation);
            client.update(sql, None, &[])?;
            pg_sys::tuplestore_end(store);
        }
        Ok(())
    })
}

/// A table that is open, and locked as for reading until the transaction ends. While it is open nobody
/// changes its columns: not who waits for our lock, nor code of an owner's that runs in our own session,
/// which the lock would let pass.
pub struct Opened(pg_sys::Relation);

/// A column: its name, type and the type's modifier. One that was dropped has no name.
pub type Column = (String, pg_sys::Oid, i32);

impl Opened {
    pub fn new(table: pg_sys::Oid) -> Opened {
        // SAFETY: fails if there is none.
        Opened(unsafe { pg_sys::relation_open(table, pg_sys::AccessShareLock as _) })
    }

    pub fn oid(&self) -> pg_sys::Oid {
        // SAFETY: it is open.
        unsafe { (*self.0).rd_id }
    }

    fn types(&self) -> PgTupleDesc<'_> {
        // SAFETY: it stays while the relation is open.
        unsafe { PgTupleDesc::from_pg_unchecked((*self.0).rd_att) }
    }

    /// In their order.
    pub fn columns(&self) -> Vec<Column> {
        let name = |a: &pg_sys::FormData_pg_attribute| match a.attisdropped {
            true => String::new(),
            false => pgrx::name_data_to_str(&a.attname).to_string(),
        };
        self.types().iter().map(|a| (name(a), a.atttypid, a.atttypmod)).collect()
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: it is open. After an error the server has closed it.
        if !std::thread::panicking() {
            unsafe { pg_sys::relation_close(self.0, pg_sys::NoLock as _) };
        }
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::SeveralStatements)
}

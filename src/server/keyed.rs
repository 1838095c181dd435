//! Rows of a table that are found by its key and written, past the planner and the executor: to say of each
//! of a million rows that it is new, or to lock it before it is changed, takes `INSERT … ON CONFLICT` longer
//! than to write it.
//!
//! Only for a table of which a statement would ask no more than is done here: without triggers, rules,
//! policies, checks, computed columns or columns of somebody else's. [`Keyed::open`] says no to all others.
//! Who opens one sees to it that nobody else adds to the table; who does it all the same gets an error, or we
//! do, as from two statements.
//!
//! Whose rights: those of who acts, as for any statement: INSERT, SELECT and UPDATE on the table are asked
//! of the catalog. Whatever an index of the owner's computes runs as who acts, too: so who acts as ourselves
//! opens nobody else's. Lock: ROW EXCLUSIVE, as for INSERT.

use crate::server::guard::require_ours;
use crate::server::session::acts_as_ourselves;
use pgrx::PgMemoryContexts;
use pgrx::PgTupleDesc;
use pgrx::prelude::*;
use std::ffi::c_int;
use std::ptr;

/// Rows that are put in at once, so that they share pages and WAL records.
const BATCH: usize = 256;

/// A table that is open for that.
pub struct Keyed {
    table: pg_sys::Relation,
    estate: *mut pg_sys::EState,
    indexes: *mut pg_sys::ResultRelInfo,
    scan: pg_sys::IndexScanDesc,
    key: Vec<KeyColumn>,
    /// What the scan looks for, of which the values are those of the row in question.
    wanted: Vec<pg_sys::ScanKeyData>,
    /// Columns that may not be NULL.
    required: Vec<usize>,
    /// The row that was found, and one that took its place.
    found: *mut pg_sys::TupleTableSlot,
    replaced: *mut pg_sys::TupleTableSlot,
    /// New rows that are not in the table yet, as many as `waiting`, and room for more.
    new: Vec<*mut pg_sys::TupleTableSlot>,
    waiting: usize,
    /// Rows since the last batch.
    rows: usize,
    /// What lives as long as this, and what until the next batch.
    lasting: PgMemoryContexts,
    passing: PgMemoryContexts,
}

/// A row to be found or written, a value for each column.
pub struct Row {
    pub values: Vec<pg_sys::Datum>,
    pub nulls: Vec<bool>,
}

/// A column of the key.
struct KeyColumn {
    /// Which of the table's.
    attribute: usize,
    /// That it is equal to something, and that it is NULL.
    equal: pg_sys::ScanKeyData,
    null: pg_sys::ScanKeyData,
}

impl Keyed {
    /// `key` are the columns of its key in any order, `columns` the number of all. `None`: it is not for us.
    pub fn open(table: pg_sys::Oid, key: &[usize], columns: usize) -> Option<Keyed> {
        // SAFETY: fails if there is none; the lock is kept until the transaction ends.
        let relation = unsafe { pg_sys::table_open(table, pg_sys::RowExclusiveLock as _) };
        if acts_as_ourselves() {
            require_ours(table);
        }
        // SAFETY: it is open.
        if unsafe { !is_plain(relation, columns) || !may_write(table) } {
            unsafe { pg_sys::table_close(relation, pg_sys::NoLock as _) };
            return None;
        }
        let mut lasting = PgMemoryContexts::new("litellm_spend keyed table");
        // SAFETY: as an INSERT prepares itself. What was opened is closed by `close`, or by the server after
        // an error.
        unsafe {
            let (estate, indexes) = lasting.switch_to(|_| {
                pg_sys::CheckCmdReplicaIdentity(relation, pg_sys::CmdType::CMD_UPDATE);
                let indexes: *mut pg_sys::ResultRelInfo =
                    pg_sys::palloc0(size_of::<pg_sys::ResultRelInfo>()).cast();
                (*indexes).type_ = pg_sys::NodeTag::T_ResultRelInfo;
                pg_sys::InitResultRelInfo(indexes, relation, 0, ptr::null_mut(), 0);
                pg_sys::ExecOpenIndices(indexes, false);
                (pg_sys::CreateExecutorState(), indexes)
            });
            pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot());
            let mut keyed = Keyed {
                table: relation,
                estate,
                indexes,
                scan: ptr::null_mut(),
                key: vec![],
                wanted: vec![],
                required: required(relation),
                found: lasting.switch_to(|_| pg_sys::table_slot_create(relation, ptr::null_mut())),
                replaced: lasting.switch_to(|_| tuple_slot(relation)),
                new: vec![],
                waiting: 0,
                rows: 0,
                lasting,
                passing: PgMemoryContexts::new("litellm_spend keyed rows"),
            };
            // Without an index it is closed when it is dropped.
            let (index, columns) = keyed.key_index(key)?;
            keyed.wanted = columns.iter().map(|column| column.equal).collect();
            keyed.key = columns;
            let count = key.len() as c_int;
            keyed.scan = keyed.lasting.switch_to(|_| {
                let snapshot = pg_sys::GetActiveSnapshot();
                #[cfg(not(feature = "pg18"))]
                let scan = pg_sys::index_beginscan(relation, index, snapshot, count, 0);
                #[cfg(feature = "pg18")]
                let scan = pg_sys::index_beginscan(relation, index, snapshot, ptr::null_mut(), count, 0);
                scan
            });
            Some(keyed)
        }
    }

    /// A unique index over the columns of the key and nothing else, and how to look for them in it.
    ///
    /// # Safety
    /// The table and its indexes are open.
    unsafe fn key_index(&self, key: &[usize]) -> Option<(pg_sys::Relation, Vec<KeyColumn>)> {
        unsafe {
            let count = (*self.indexes).ri_NumIndices as usize;
            if count == 0 {
                return None;
            }
            let opened = std::slice::from_raw_parts((*self.indexes).ri_IndexRelationDescs, count);
            let described = std::slice::from_raw_parts((*self.indexes).ri_IndexRelationInfo, count);
            // What is unique at the end of a transaction only would have to be looked at again then.
            if !opened.iter().all(|index| (*(**index).rd_index).indimmediate) {
                return None;
            }
            let indexes = opened.iter().zip(described).map(|(index, info)| (*index, &**info));
            let table = self.table;
            indexes.filter(|(index, info)| is_key(*index, info, key)).find_map(|(index, info)| {
                let attributes = info.ii_IndexAttrNumbers.iter().take(key.len()).enumerate();
                let columns = attributes.map(|(at, attribute)| key_column(table, index, at, *attribute));
                Some((index, columns.collect::<Option<Vec<_>>>()?))
            })
        }
    }

    /// A row with room for a value of each column.
    pub fn row(&self) -> Row {
        // SAFETY: the table is open.
        let columns = unsafe { (*(*self.table).rd_att).natts as usize };
        Row { values: vec![pg_sys::Datum::null(); columns], nulls: vec![true; columns] }
    }

    /// Makes values of a row, which are kept until it is written.
    pub fn make<T>(&mut self, values: impl FnOnce() -> T) -> T {
        // SAFETY: the memory lasts until the end of the batch.
        unsafe { self.passing.switch_to(|_| values()) }
    }

    /// Whether there is a row with the key of this one. It is the found one until the next is looked for.
    pub fn find(&mut self, row: &Row) -> bool {
        for (wanted, column) in self.wanted.iter_mut().zip(&self.key) {
            *wanted = match row.nulls[column.attribute] {
                true => column.null,
                false => pg_sys::ScanKeyData { sk_argument: row.values[column.attribute], ..column.equal },
            };
        }
        let (keys, count) = (self.wanted.as_mut_ptr(), self.wanted.len() as c_int);
        let (scan, found, columns) = (self.scan, self.found, row.values.len() as c_int);
        // SAFETY: the scan takes as many keys. What it keeps must last.
        unsafe {
            self.lasting.switch_to(|_| {
                pg_sys::index_rescan(scan, keys, count, ptr::null_mut(), 0);
                let direction = pg_sys::ScanDirection::ForwardScanDirection;
                let is_there = pg_sys::index_getnext_slot(scan, direction, found);
                if is_there {
                    pg_sys::slot_getsomeattrs_int(found, columns);
                }
                is_there
            })
        }
    }

    /// A value of the found row; `None` is NULL.
    pub fn found(&self, column: usize) -> Option<pg_sys::Datum> {
        // SAFETY: `find` has taken all values out.
        unsafe {
            let is_null = *(*self.found).tts_isnull.add(column);
            (!is_null).then(|| *(*self.found).tts_values.add(column))
        }
    }

    /// Puts a row in the place of the found one, which has the same key.
    pub fn replace(&mut self, row: &mut Row) {
        // SAFETY: the row has a value for each column, and the page of the found one is kept.
        unsafe {
            let (table, place) = (self.table, &raw mut (*self.found).tts_tid);
            self.require(row);
            let (tuple, index) = self.passing.switch_to(|_| {
                let tuple = form(table, row);
                (tuple, update(table, place, tuple))
            });
            if index != Index::None {
                let replaced = self.replaced;
                pg_sys::ExecForceStoreHeapTuple(tuple, replaced, false);
                self.index(replaced, index);
            }
        }
        self.written();
    }

    /// Puts in a row whose key is not there: it is there at the end of its batch.
    pub fn insert(&mut self, row: &mut Row) {
        // SAFETY: the row has a value for each column. Its slot frees it when it gets the next one.
        unsafe {
            let table = self.table;
            self.require(row);
            if self.waiting == self.new.len() {
                self.new.push(self.lasting.switch_to(|_| tuple_slot(table)));
            }
            let tuple = self.lasting.switch_to(|_| form(table, row));
            pg_sys::ExecForceStoreHeapTuple(tuple, self.new[self.waiting], true);
        }
        self.waiting += 1;
        self.written();
    }

    /// Fails as a statement does if a value is missing.
    unsafe fn require(&mut self, row: &mut Row) {
        if self.required.iter().any(|column| row.nulls[*column]) {
            let (table, indexes, estate, slot) = (self.table, self.indexes, self.estate, self.replaced);
            unsafe {
                self.passing.switch_to(|_| {
                    pg_sys::ExecForceStoreHeapTuple(form(table, row), slot, false);
                    pg_sys::ExecConstraints(indexes, slot, estate);
                });
            }
        }
    }

    fn written(&mut self) {
        self.rows += 1;
        if self.rows >= BATCH {
            self.end_batch();
        }
    }

    fn end_batch(&mut self) {
        check_for_interrupts!();
        let (table, count) = (self.table, self.waiting);
        if count > 0 {
            let slots = self.new.as_mut_ptr();
            // SAFETY: so many slots have a row each.
            unsafe {
                self.passing.switch_to(|_| {
                    let command = pg_sys::GetCurrentCommandId(true);
                    pg_sys::heap_multi_insert(table, slots, count as c_int, command, 0, ptr::null_mut());
                });
            }
            for at in 0..count {
                // SAFETY: the slot knows now where its row is.
                unsafe { self.index(self.new[at], Index::New) };
            }
        }
        self.waiting = 0;
        self.rows = 0;
        // SAFETY: nothing that is there is used again.
        unsafe { self.passing.reset() };
    }

    /// Puts a row into the indexes.
    ///
    /// # Safety
    /// The slot has the row, and says where it is.
    unsafe fn index(&mut self, slot: *mut pg_sys::TupleTableSlot, how: Index) {
        let (indexes, estate) = (self.indexes, self.estate);
        unsafe {
            self.passing.switch_to(|_| {
                let (update, nil) = (how != Index::New, ptr::null_mut());
                #[cfg(any(feature = "pg14", feature = "pg15"))]
                pg_sys::ExecInsertIndexTuples(indexes, slot, estate, update, false, ptr::null_mut(), nil);
                #[cfg(not(any(feature = "pg14", feature = "pg15")))]
                pg_sys::ExecInsertIndexTuples(
                    indexes,
                    slot,
                    estate,
                    update,
                    false,
                    ptr::null_mut(),
                    nil,
                    how == Index::Summarizing,
                );
                // What expressions of an index took.
                if let Some(context) = (*estate).es_per_tuple_exprcontext.as_ref() {
                    pg_sys::MemoryContextReset(context.ecxt_per_tuple_memory);
                }
            });
        }
    }

    /// Writes what waits. The rows are there for the next statement.
    pub fn finish(mut self) {
        self.end_batch();
        // SAFETY: as at the end of a statement.
        unsafe { pg_sys::CommandCounterIncrement() };
    }
}

impl Drop for Keyed {
    fn drop(&mut self) {
        // After an error the server has closed all.
        if std::thread::panicking() {
            return;
        }
        // SAFETY: what was opened is closed, once, in the opposite order. The lock stays.
        unsafe {
            if !self.scan.is_null() {
                pg_sys::index_endscan(self.scan);
            }
            for slot in self.new.drain(..).chain([self.found, self.replaced]) {
                pg_sys::ExecDropSingleTupleTableSlot(slot);
            }
            pg_sys::PopActiveSnapshot();
            pg_sys::ExecCloseIndices(self.indexes);
            pg_sys::FreeExecutorState(self.estate);
            pg_sys::table_close(self.table, pg_sys::NoLock as _);
        }
    }
}

/// Which indexes get a row.
#[derive(Clone, Copy, PartialEq)]
enum Index {
    /// All, for the first time.
    New,
    /// All, because it is on another page or has no room beside the old one.
    All,
    /// Those that only sum pages up.
    #[cfg_attr(any(feature = "pg14", feature = "pg15"), expect(dead_code))]
    Summarizing,
    None,
}

/// Whether a statement would do no more with a row than we do.
///
/// # Safety
/// The table is open.
unsafe fn is_plain(table: pg_sys::Relation, columns: usize) -> bool {
    unsafe {
        let class = &*(*table).rd_rel;
        let attributes = PgTupleDesc::from_pg_unchecked((*table).rd_att);
        let computed = (*(*table).rd_att).constr.as_ref().is_some_and(|constraints| {
            #[cfg(feature = "pg18")]
            let when_read = constraints.has_generated_virtual;
            #[cfg(not(feature = "pg18"))]
            let when_read = false;
            constraints.num_check > 0 || constraints.has_generated_stored || when_read
        });
        class.relkind as u8 == pg_sys::RELKIND_RELATION
            && !class.relispartition
            && !class.relhastriggers
            && !class.relhasrules
            && !class.relrowsecurity
            && (*table).rd_tableam == pg_sys::GetHeapamTableAmRoutine()
            && attributes.iter().filter(|attribute| !attribute.attisdropped).count() == columns
            && !computed
    }
}

fn may_write(table: pg_sys::Oid) -> bool {
    [pg_sys::ACL_INSERT, pg_sys::ACL_SELECT, pg_sys::ACL_UPDATE].into_iter().all(|right| {
        // SAFETY: looks it up.
        let answer = unsafe { pg_sys::pg_class_aclcheck(table, pg_sys::GetUserId(), right as _) };
        answer == pg_sys::AclResult::ACLCHECK_OK
    })
}

/// # Safety
/// The table is open.
unsafe fn required(table: pg_sys::Relation) -> Vec<usize> {
    let attributes = unsafe { PgTupleDesc::from_pg_unchecked((*table).rd_att) };
    let required = attributes.iter().enumerate().filter(|(_, attribute)| attribute.attnotnull);
    required.map(|(at, _)| at).collect()
}

/// Whether an index is unique over the columns of the key and no others.
///
/// # Safety
/// It is open.
unsafe fn is_key(index: pg_sys::Relation, info: &pg_sys::IndexInfo, key: &[usize]) -> bool {
    let described = unsafe { &*(*index).rd_index };
    let mut columns: Vec<usize> = info
        .ii_IndexAttrNumbers
        .iter()
        .map(|at| *at as usize)
        .take(info.ii_NumIndexKeyAttrs as usize)
        .collect();
    let mut wanted: Vec<usize> = key.iter().map(|at| at + 1).collect();
    columns.sort_unstable();
    wanted.sort_unstable();
    described.indisunique
        && described.indisvalid
        && info.ii_Expressions.is_null()
        && info.ii_Predicate.is_null()
        && columns == wanted
        && unsafe { (*(*index).rd_rel).relam } == pg_sys::BTREE_AM_OID
}

/// How to look for a value in a column of an index. `None`: equal there is something else than for the type,
/// or in a collation that calls texts of other bytes equal.
///
/// # Safety
/// Table and index are open, and have such a column.
unsafe fn key_column(
    table: pg_sys::Relation,
    index: pg_sys::Relation,
    at: usize,
    attribute: i16,
) -> Option<KeyColumn> {
    unsafe {
        let columns = PgTupleDesc::from_pg_unchecked((*table).rd_att);
        let of_type = columns.get(attribute as usize - 1)?.atttypid;
        let usual = pg_sys::get_opclass_family(pg_sys::GetDefaultOpClass(of_type, pg_sys::BTREE_AM_OID));
        if usual != *(*index).rd_opfamily.add(at) {
            return None;
        }
        let (family, r#type) = (*(*index).rd_opfamily.add(at), *(*index).rd_opcintype.add(at));
        let collation = *(*index).rd_indcollation.add(at);
        if collation != pg_sys::InvalidOid && !pg_sys::get_collation_isdeterministic(collation) {
            return None;
        }
        let equal = pg_sys::BTEqualStrategyNumber as u16;
        let operator = pg_sys::get_opfamily_member(family, r#type, r#type, equal as i16);
        let function = (operator != pg_sys::InvalidOid).then(|| pg_sys::get_opcode(operator))?;
        let number = at as i16 + 1;
        let entry = |flags: u32, strategy: u16, function: pg_sys::Oid| {
            let mut entry = pg_sys::ScanKeyData::default();
            let (flags, value) = (flags as c_int, pg_sys::Datum::null());
            pg_sys::ScanKeyEntryInitialize(
                &mut entry,
                flags,
                number,
                strategy,
                pg_sys::InvalidOid,
                collation,
                function,
                value,
            );
            entry
        };
        Some(KeyColumn {
            attribute: attribute as usize - 1,
            equal: entry(0, equal, function),
            null: entry(pg_sys::SK_ISNULL | pg_sys::SK_SEARCHNULL, 0, pg_sys::InvalidOid),
        })
    }
}

/// # Safety
/// The table is open.
unsafe fn tuple_slot(table: pg_sys::Relation) -> *mut pg_sys::TupleTableSlot {
    unsafe { pg_sys::MakeSingleTupleTableSlot((*table).rd_att, &pg_sys::TTSOpsHeapTuple) }
}

/// # Safety
/// The table is open, and the row has a value for each column.
unsafe fn form(table: pg_sys::Relation, row: &mut Row) -> pg_sys::HeapTuple {
    unsafe { pg_sys::heap_form_tuple((*table).rd_att, row.values.as_mut_ptr(), row.nulls.as_mut_ptr()) }
}

/// Puts a tuple in the place of another, and says which indexes must know of it.
///
/// # Safety
/// There is a tuple of the open table at that place.
unsafe fn update(table: pg_sys::Relation, place: pg_sys::ItemPointer, tuple: pg_sys::HeapTuple) -> Index {
    #[cfg(any(feature = "pg14", feature = "pg15"))]
    unsafe {
        pg_sys::simple_heap_update(table, place, tuple);
        let is_beside_it = (*(*tuple).t_data).t_infomask2 & pg_sys::HEAP_ONLY_TUPLE as u16 != 0;
        if is_beside_it { Index::None } else { Index::All }
    }
    #[cfg(not(any(feature = "pg14", feature = "pg15")))]
    unsafe {
        let mut indexes = pg_sys::TU_UpdateIndexes::TU_None;
        pg_sys::simple_heap_update(table, place, tuple, &mut indexes);
        match indexes {
            pg_sys::TU_UpdateIndexes::TU_None => Index::None,
            pg_sys::TU_UpdateIndexes::TU_Summarizing => Index::Summarizing,
            _ => Index::All,
        }
    }
}

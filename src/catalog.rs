//! The only place that reads and writes state through SPI, and the home of our locks.
//!
//! pgrx runs `select` on the transaction's first snapshot until the transaction has an XID, and `update` on a
//! fresh one. So state that must be current is read with [`fresh`], and a look that finds nothing to do, which
//! must not write WAL, reads with [`query`].

use crate::definition::{Definition, SCHEMA, qualified};
use crate::error::{Error, Result};
use crate::window::{Holder, Window};
use pgrx::datum::{DatumWithOid, Timestamp};
use pgrx::prelude::*;
use pgrx::spi::{SpiHeapTupleData, SpiTupleTable};
use std::collections::BTreeSet;
use std::ffi::CStr;
use std::time::{Duration, Instant};

pub type Args<'a> = &'a [DatumWithOid<'a>];

/// Runs a query on the transaction's snapshot.
pub fn query<T>(sql: &str, args: Args, row: impl Fn(&SpiHeapTupleData) -> Result<T>) -> Result<Vec<T>> {
    Spi::connect(|client| rows(client.select(sql, None, args)?, row))
}

/// Runs a query on a fresh snapshot. Takes an XID.
pub fn fresh<T>(sql: &str, args: Args, row: impl Fn(&SpiHeapTupleData) -> Result<T>) -> Result<Vec<T>> {
    Spi::connect_mut(|client| rows(client.update(sql, None, args)?, row))
}

fn rows<T>(table: SpiTupleTable, row: impl Fn(&SpiHeapTupleData) -> Result<T>) -> Result<Vec<T>> {
    table.into_iter().map(|tuple| row(&tuple)).collect()
}

/// Runs a statement; returns the number of rows it processed.
pub fn execute(sql: &str, args: Args) -> Result<i64> {
    Spi::connect_mut(|client| Ok(client.update(sql, None, args)?.len() as i64))
}

/// The value of column `i`, which the query guarantees not to be NULL.
pub fn value<T: FromDatum + IntoDatum>(row: &SpiHeapTupleData, i: usize) -> Result<T> {
    Ok(row.get(i)?.ok_or(pgrx::spi::Error::InvalidPosition)?)
}

pub fn exists(sql: &str, args: Args) -> Result<bool> {
    Ok(fresh(&format!("SELECT EXISTS ({sql})"), args, |r| value(r, 1))?.first().copied().unwrap_or(false))
}

// ---- sources ---------------------------------------------------------------------------------------------

pub struct Source {
    pub name: String,
    pub relation: pg_sys::Oid,
    pub sequence: pg_sys::Oid,
    pub window: Window,
    pub trimmed_to: i64,
    /// The lowest watermark of its rollups.
    pub merged_to: i64,
}

pub fn sources() -> Result<Vec<Source>> {
    query(
        &format!(
            "SELECT s.name, s.relation::oid, s.sequence::oid, s.candidates::text, s.trimmed_to, min(r.watermark)
             FROM {SCHEMA}.source s JOIN {SCHEMA}.rollup r ON r.source = s.name
             GROUP BY s.name ORDER BY s.name"
        ),
        &[],
        |r| {
            Ok(Source {
                name: value(r, 1)?,
                relation: value(r, 2)?,
                sequence: value(r, 3)?,
                window: serde_json::from_str(&value::<String>(r, 4)?)?,
                trimmed_to: value(r, 5)?,
                merged_to: value(r, 6)?,
            })
        },
    )
}

/// Remembers a source's candidates, unless another session holds the row: they are only a head start.
pub fn store_window(source: &str, window: &Window) -> Result<()> {
    store_candidates("source", "name", source, window)
}

/// Remembers the candidates of the capture's failures.
pub fn store_failure_window(source: &str, window: &Window) -> Result<()> {
    store_candidates("capture", "source", source, window)
}

fn store_candidates(table: &str, key: &str, name: &str, window: &Window) -> Result<()> {
    let candidates = serde_json::to_string(window)?;
    execute(
        &format!(
            "UPDATE {SCHEMA}.{table} SET candidates = $2::jsonb
             WHERE {key} = (SELECT {key} FROM {SCHEMA}.{table} WHERE {key} = $1 FOR UPDATE SKIP LOCKED)"
        ),
        &[name.into(), candidates.into()],
    )?;
    Ok(())
}

/// The last value that `sequence` has given out, 0 if none.
pub fn last_value(sequence: pg_sys::Oid) -> Result<i64> {
    let name = relation_name(sequence)?;
    let sql = format!("SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM {name}");
    Ok(query(&sql, &[], |r| value(r, 1))?.first().copied().unwrap_or(0))
}

/// Refuses a sequence whose values do not rise one by one in the order in which they are drawn.
pub fn check_sequence(sequence: pg_sys::Oid) -> Result<()> {
    let shape = query(
        "SELECT seqincrement, seqcache, seqcycle, seqrelid::regclass::text FROM pg_catalog.pg_sequence WHERE seqrelid = $1",
        &[sequence.into()],
        |r| Ok((value::<i64>(r, 1)?, value::<i64>(r, 2)?, value::<bool>(r, 3)?, value::<String>(r, 4)?)),
    )?;
    let Some((increment, cache, cycle, sequence)) = shape.into_iter().next() else {
        return Err(Error::NoTable(format!("sequence {}", sequence.to_u32())));
    };
    let reason = if increment <= 0 {
        format!("Its increment is {increment}: a later row would have a lower number.")
    } else if cache != 1 {
        format!("Its cache is {cache}: a session could use a low number long after others used higher ones.")
    } else if cycle {
        "It cycles: a number could come twice.".into()
    } else {
        return Ok(());
    };
    Err(Error::SequenceShape { sequence, reason })
}

/// The relation and all that inherit from it: partitions and their partitions.
pub fn relation_tree(relation: pg_sys::Oid) -> Result<Vec<pg_sys::Oid>> {
    query(
        "WITH RECURSIVE tree(oid) AS (
             SELECT $1 UNION SELECT inhrelid FROM pg_catalog.pg_inherits JOIN tree ON inhparent = tree.oid)
         SELECT oid FROM tree",
        &[relation.into()],
        |r| value(r, 1),
    )
}

/// The other transactions that hold RowExclusiveLock, as every writer does, on one of `relations`.
pub fn writers(relations: Vec<pg_sys::Oid>) -> Result<BTreeSet<Holder>> {
    let holders = query(
        "SELECT DISTINCT virtualtransaction FROM pg_catalog.pg_locks
         WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
           AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
           AND relation = ANY ($1) AND pid IS DISTINCT FROM pg_catalog.pg_backend_pid()",
        &[relations.into()],
        |r| Ok(Holder(value(r, 1)?)),
    )?;
    Ok(holders.into_iter().collect())
}

pub fn relation_name(relation: pg_sys::Oid) -> Result<String> {
    let names = query(
        "SELECT nspname::text, relname::text FROM pg_catalog.pg_class c
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1",
        &[relation.into()],
        |r| Ok(qualified(&value::<String>(r, 1)?, &value::<String>(r, 2)?)),
    )?;
    names.into_iter().next().ok_or_else(|| Error::NoTable(relation.to_u32().to_string()))
}

// ---- rollups ---------------------------------------------------------------------------------------------

/// The right to change a rollup: its state row, locked until the transaction ends. Whoever holds it sees, in
/// every later statement, all that earlier holders did.
pub struct Fence {
    pub definition: Definition,
    pub source: String,
    pub watermark: i64,
    pub covered_from: Timestamp,
    pub frozen_before: Timestamp,
}

/// How long to wait for a fence or a window.
#[derive(Clone, Copy)]
pub enum Patience {
    /// The worker: what is not free now is tried at the next tick.
    None,
    /// A SQL call.
    Until(Instant),
}

impl Patience {
    pub fn within(limit: Duration) -> Self {
        Patience::Until(Instant::now() + limit)
    }

    /// Sleeps a moment and says whether to try again.
    pub fn try_again(self) -> bool {
        match self {
            Patience::Until(deadline) if Instant::now() < deadline => {
                // Ten milliseconds: a LiteLLM insert of 100 rows lasts about twenty.
                std::thread::sleep(Duration::from_millis(10));
                pgrx::check_for_interrupts!();
                true
            }
            _ => false,
        }
    }
}

impl Fence {
    /// Takes the fence of rollup `name`; `None` when another transaction keeps it.
    pub fn take(name: &str, patience: Patience) -> Result<Option<Fence>> {
        require_read_committed()?;
        loop {
            let fence = fresh(
                &format!(
                    "SELECT r.definition::text, r.source, r.watermark, r.covered_from, s.frozen_before
                     FROM {SCHEMA}.rollup r JOIN {SCHEMA}.source s ON s.name = r.source
                     WHERE r.name = $1 FOR UPDATE OF r SKIP LOCKED"
                ),
                &[name.into()],
                |r| {
                    Ok(Fence {
                        definition: serde_json::from_str(&value::<String>(r, 1)?)?,
                        source: value(r, 2)?,
                        watermark: value(r, 3)?,
                        covered_from: value(r, 4)?,
                        frozen_before: value(r, 5)?,
                    })
                },
            )?;
            if let Some(fence) = fence.into_iter().next() {
                return Ok(Some(fence));
            }
            if !exists(&format!("SELECT FROM {SCHEMA}.rollup WHERE name = $1"), &[name.into()])? {
                return Err(Error::NoRollup(name.into()));
            }
            if !patience.try_again() {
                return Ok(None);
            }
        }
    }

    /// Advances the watermark. The rollup's rows of the window are written in the same transaction.
    pub fn advance(&self, end: i64, rows: i64, groups: i64, ms: f64) -> Result<()> {
        execute(
            &format!(
                "UPDATE {SCHEMA}.rollup SET watermark = $2, merged_at = clock_timestamp(), merged_rows = $3,
                     merged_groups = $4, merged_ms = $5, last_error = NULL, last_error_at = NULL
                 WHERE name = $1"
            ),
            &[self.definition.name.as_str().into(), end.into(), rows.into(), groups.into(), ms.into()],
        )?;
        Ok(())
    }
}

/// Names of the rollups, of one source or of all.
pub fn rollup_names(source: Option<&str>) -> Result<Vec<String>> {
    query(
        &format!("SELECT name FROM {SCHEMA}.rollup WHERE $1 IS NULL OR source = $1 ORDER BY name"),
        &[source.map(str::to_string).into()],
        |r| value(r, 1),
    )
}

pub fn uncovered_rollups() -> Result<Vec<String>> {
    let sql = format!("SELECT name FROM {SCHEMA}.rollup WHERE covered_from > '-infinity' ORDER BY name");
    query(&sql, &[], |r| value(r, 1))
}

pub fn record_error(rollup: &str, message: &str) -> Result<()> {
    record("rollup", "name", rollup, message)
}

pub fn record_capture_error(source: &str, message: &str) -> Result<()> {
    record("capture", "source", source, message)
}

/// Keeps the time of the first occurrence: a failure that repeats at each tick is written once.
fn record(table: &str, key: &str, name: &str, message: &str) -> Result<()> {
    execute(
        &format!(
            "UPDATE {SCHEMA}.{table} SET last_error = $2, last_error_at = clock_timestamp()
             WHERE {key} = $1 AND last_error IS DISTINCT FROM $2"
        ),
        &[name.into(), message.into()],
    )?;
    Ok(())
}

// ---- the captured table ----------------------------------------------------------------------------------

pub struct CaptureState {
    pub source: String,
    pub schema: String,
    pub table: String,
    pub relation: pg_sys::Oid,
    pub columns: Vec<String>,
    pub subtract: bool,
    pub predecessor: Option<pg_sys::Oid>,
    pub failures_seen: i64,
    pub window: Window,
}

impl CaptureState {
    /// The tables that hold raw rows: the captured one and, after a replacement, the one before it.
    pub fn relations(&self) -> Vec<pg_sys::Oid> {
        [Some(self.relation), self.predecessor].into_iter().flatten().collect()
    }
}

pub fn capture() -> Result<Option<CaptureState>> {
    let states = query(
        &format!(
            "SELECT source, table_schema::text, table_name::text, relation::oid, columns, on_delete = 'subtract',
                    predecessor::oid, failures_seen, candidates::text
             FROM {SCHEMA}.capture"
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
            })
        },
    )?;
    Ok(states.into_iter().next())
}

// ---- tables ----------------------------------------------------------------------------------------------

/// A relation as the system catalogs describe it.
pub struct Table {
    pub oid: pg_sys::Oid,
    pub schema: String,
    pub name: String,
    pub kind: String,
    pub persistence: String,
    pub owner: String,
    /// Storage options, `name=value, …`.
    pub options: String,
    /// Name and type.
    pub columns: Vec<(String, String)>,
}

impl Table {
    pub fn find(oid: pg_sys::Oid) -> Result<Option<Table>> {
        let tables = query(
            "SELECT n.nspname::text, c.relname::text, c.relkind::text, c.relpersistence::text,
                    pg_catalog.pg_get_userbyid(c.relowner)::text,
                    coalesce(pg_catalog.array_to_string(c.reloptions, ', '), '')
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1",
            &[oid.into()],
            |r| {
                Ok(Table {
                    oid,
                    schema: value(r, 1)?,
                    name: value(r, 2)?,
                    kind: value(r, 3)?,
                    persistence: value(r, 4)?,
                    owner: value(r, 5)?,
                    options: value(r, 6)?,
                    columns: vec![],
                })
            },
        )?;
        let Some(mut table) = tables.into_iter().next() else { return Ok(None) };
        table.columns = query(
            "SELECT attname::text, pg_catalog.format_type(atttypid, NULL) FROM pg_catalog.pg_attribute
             WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            &[oid.into()],
            |r| Ok((value(r, 1)?, value(r, 2)?)),
        )?;
        Ok(Some(table))
    }

    pub fn qualified(&self) -> String {
        qualified(&self.schema, &self.name)
    }
}

/// The right to change what is attached: triggers, views, the state of the capture. Ends with the transaction. What is
/// read after it is current. `false`: another transaction keeps it.
pub fn lock_attachment(patience: Patience) -> Result<bool> {
    let name = format!("{SCHEMA}.capture");
    let state = find_relation(&name)?.ok_or(Error::NoTable(name))?;
    // SAFETY: takes a lock, or says that it cannot.
    while !unsafe { pg_sys::ConditionalLockRelationOid(state, pg_sys::ShareRowExclusiveLock as i32) } {
        if !patience.try_again() {
            return Ok(false);
        }
    }
    // Takes an XID, and with it every later query a fresh snapshot.
    execute("SELECT 1", &[])?;
    Ok(true)
}

/// Finds a relation by a qualified, quoted name.
pub fn find_relation(name: &str) -> Result<Option<pg_sys::Oid>> {
    Ok(query("SELECT pg_catalog.to_regclass($1)::oid", &[name.into()], |r| Ok(r.get(1)?))?.pop().flatten())
}

/// Takes SHARE ROW EXCLUSIVE on a user's table until the transaction ends: writers wait, readers do not. Gives up
/// after `litellm_spend.lock_timeout`, because writers queue behind a waiting lock.
pub fn lock_against_writers(table: &str, oid: pg_sys::Oid, limit: Duration) -> Result<()> {
    let sql = format!("LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE");
    lock(&sql, table, oid, limit)
}

/// Runs `sql`, which needs a lock on `relation`, with our lock_timeout.
pub fn lock(sql: &str, relation: &str, oid: pg_sys::Oid, limit: Duration) -> Result<()> {
    // Who is in the way is asked before: after a failure the transaction can only be rolled back.
    let holders = query(
        "SELECT coalesce(string_agg(DISTINCT coalesce('process ' || pid, 'prepared transaction'), ', '), '')
         FROM pg_catalog.pg_locks
         WHERE locktype = 'relation' AND relation = $1 AND granted AND pid IS DISTINCT FROM pg_catalog.pg_backend_pid()",
        &[oid.into()],
        |r| value::<String>(r, 1),
    )?
    .pop()
    .unwrap_or_default();
    execute(
        "SELECT pg_catalog.set_config('lock_timeout', $1, true)",
        &[format!("{}ms", limit.as_millis()).into()],
    )?;
    let result = PgTryBuilder::new(std::panic::AssertUnwindSafe(|| execute(sql, &[]).map(|_| ())))
        .catch_when(PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE, |_| {
            Err(Error::LockNotAvailable {
                relation: relation.into(),
                waited_ms: limit.as_millis(),
                holders: if holders.is_empty() {
                    "A transaction came in between.".into()
                } else {
                    format!("It is held by {holders}.")
                },
            })
        })
        .execute();
    if result.is_ok() {
        execute("SELECT pg_catalog.set_config('lock_timeout', '0', true)", &[])?;
    }
    result
}

// ---- the session -----------------------------------------------------------------------------------------

pub fn require_writable() -> Result<()> {
    // SAFETY: both only read backend state.
    if unsafe { pg_sys::RecoveryInProgress() } {
        return Err(Error::Standby);
    }
    if unsafe { pg_sys::XactReadOnly } {
        return Err(Error::ReadOnly);
    }
    Ok(())
}

pub fn require_read_committed() -> Result<()> {
    // SAFETY: reads a backend variable.
    match unsafe { pg_sys::XactIsoLevel } as u32 {
        pg_sys::XACT_REPEATABLE_READ => Err(Error::Isolation("REPEATABLE READ")),
        pg_sys::XACT_SERIALIZABLE => Err(Error::Isolation("SERIALIZABLE")),
        _ => Ok(()),
    }
}

pub fn require_utf8() -> Result<()> {
    let encoding = query("SELECT pg_catalog.getdatabaseencoding()::text", &[], |r| value::<String>(r, 1))?
        .pop()
        .unwrap_or_default();
    if encoding == "UTF8" { Ok(()) } else { Err(Error::Encoding(encoding)) }
}

/// While it lives, the session acts as the extension's owner with a pinned search_path: what we store is ours,
/// whoever calls, and nothing of the caller's path is looked up. An error ends it with the transaction.
pub struct Elevated {
    user: pg_sys::Oid,
    security: i32,
    nest_level: i32,
}

/// Nothing is looked up on the caller's path; what is skipped because it exists is no news.
const PINNED_SETTINGS: [(&CStr, &CStr); 2] =
    [(c"search_path", c"pg_catalog, pg_temp"), (c"client_min_messages", c"warning")];

impl Elevated {
    pub fn enter() -> Result<Elevated> {
        let owner = query(
            "SELECT extowner FROM pg_catalog.pg_extension WHERE extname = 'litellm_spend'",
            &[],
            |r| value::<pg_sys::Oid>(r, 1),
        )?
        .pop()
        .ok_or_else(|| Error::NotAttached("this database".into()))?;
        Ok(Elevated::as_user(owner))
    }

    /// Who acted before.
    pub fn caller(&self) -> pg_sys::Oid {
        self.user
    }

    pub fn as_user(user: pg_sys::Oid) -> Elevated {
        let mut guard = Elevated { user: pg_sys::InvalidOid, security: 0, nest_level: 0 };
        // SAFETY: the pair is restored in Drop, or by the abort of the transaction or subtransaction.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut guard.user, &mut guard.security);
            guard.nest_level = pg_sys::NewGUCNestLevel();
            for (name, value) in PINNED_SETTINGS {
                pg_sys::set_config_option(
                    name.as_ptr(),
                    value.as_ptr(),
                    pg_sys::GucContext::PGC_USERSET,
                    pg_sys::GucSource::PGC_S_SESSION,
                    pg_sys::GucAction::GUC_ACTION_SAVE,
                    true,
                    0,
                    false,
                );
            }
            let security = guard.security | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32;
            pg_sys::SetUserIdAndSecContext(user, security);
        }
        guard
    }
}

impl Drop for Elevated {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: undoes enter(), in reverse order.
            unsafe {
                pg_sys::AtEOXact_GUC(false, self.nest_level);
                pg_sys::SetUserIdAndSecContext(self.user, self.security);
            }
        }
    }
}

/// Runs `work` in a subtransaction: an error undoes only what it did and is returned as text. A cancelled query
/// is passed on unless `absorb_cancel`.
pub fn attempt<T>(work: impl FnOnce() -> Result<T>) -> std::result::Result<T, Failure> {
    // SAFETY: as PL/pgSQL does for a block with EXCEPTION: the memory context and the resource owner are put back
    // by hand, the rest by the (sub)transaction.
    let (context, owner) = unsafe {
        let saved = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        pg_sys::BeginInternalSubTransaction(std::ptr::null());
        pg_sys::MemoryContextSwitchTo(saved.0);
        saved
    };
    let outcome = PgTryBuilder::new(std::panic::AssertUnwindSafe(|| work().map_err(Failure::from)))
        .catch_others(|caught| Err(Failure::from(caught)))
        .execute();
    // SAFETY: see above.
    unsafe {
        if outcome.is_ok() {
            pg_sys::ReleaseCurrentSubTransaction();
        } else {
            pg_sys::RollbackAndReleaseCurrentSubTransaction();
        }
        pg_sys::MemoryContextSwitchTo(context);
        pg_sys::CurrentResourceOwner = owner;
    }
    outcome
}

/// An error that was caught: its subtransaction is rolled back.
#[derive(Debug)]
pub struct Failure {
    pub sqlstate: PgSqlErrorCode,
    pub message: String,
}

impl Failure {
    pub fn is_cancel(&self) -> bool {
        self.sqlstate == PgSqlErrorCode::ERRCODE_QUERY_CANCELED
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { sqlstate: error.sqlstate(), message: error.to_string() }
    }
}

impl From<pg_sys::panic::CaughtError> for Failure {
    fn from(caught: pg_sys::panic::CaughtError) -> Self {
        use pg_sys::panic::CaughtError::*;
        let (PostgresError(report) | ErrorReport(report) | RustPanic { ereport: report, .. }) = caught;
        Failure { sqlstate: report.sql_error_code(), message: report.message().to_string() }
    }
}

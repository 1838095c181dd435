//! What a status says of a rollup's tail: how many rows wait to be merged, and since when.
//!
//! One would think that this is counting rows. But a status is read in anybody's session, of all owners at
//! once, and what is counted is an owner's. So it waits for nobody, and the tails of an owner have a limit of
//! time together. Some of what they do no limit ends: what an owner's function does, what another server
//! does, and what the planner computes in one go, in a function of the server's own. Where that could be, how
//! far the sequence is ahead has to do.

use crate::error::{Error, Result};
use crate::server::limit::Limit;
use crate::server::locks;
use crate::server::relation;
use crate::server::session::{Failure, attempt};
use crate::server::spi::{self, Found};
use crate::server::text::quoted;
use crate::state::fence::Fence;
use crate::state::sources;
use pgrx::datum::TimestampWithTimeZone;
use pgrx::prelude::*;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::time::{Duration, Instant};

type Tail = (Option<i64>, Option<TimestampWithTimeZone>);

/// A status must not read for minutes.
const MOST_COUNTED: i64 = 1_000_000;

/// What the tails of one owner may take in a statement. A million rows of two columns take 0.1 to 0.4 s, so
/// that is several rollups which are far behind (PostgreSQL 15, two shared cores, 2026-11).
const TIME_OF_OWNER: Duration = Duration::from_secs(2);

/// A lock that is free is had at once.
const LOCK_TIMEOUT: Duration = Duration::from_millis(20);

/// Rows above the watermark of a rollup, at most a million, and since when the oldest has been there: when it
/// was captured, or, for a declared rollup, the time that it carries. If the source is not read, how many
/// numbers the sequence is ahead, and no time. Nothing: somebody is changing it.
pub fn tail(name: &str) -> Result<Tail> {
    let fence = match Fence::look(name) {
        // It was dropped since the statement began that names it.
        Err(Error::NoRollup(_)) => return Ok((None, None)),
        fence => fence?,
    };
    if fence.source.is_none() {
        return Ok((None, None));
    }
    // Of one that is filled by hand, how many numbers there are for its owner to merge.
    if fence.definition.is_none() {
        return Ok((numbers_ahead(name, &fence)?, None));
    }
    // Somebody is changing it, or it was dropped.
    if !matches!(locks::try_lock_against_dropping(fence.relation), Ok(true)) {
        return Ok((None, None));
    }
    // What is wrong with the rollup is told by its last error, and must not hide the others.
    if fence.is_built_in() {
        return Ok(attempt(|| count(&fence)).map_err(Failure::unless_cancel).unwrap_or_default());
    }
    // Its owner can lock a partition alone.
    let tree = relation::relation_tree(fence.relation)?;
    if !tree.iter().all(|part| locks::try_lock(*part, pg_sys::AccessShareLock)) {
        return Ok((None, None));
    }
    let time = Time::left_to(fence.owner);
    if time.left.is_zero() || relation::foreign_of(&tree)?.is_some() || has_code(&tree)? {
        return Ok((numbers_ahead(name, &fence)?, None));
    }
    let counted = attempt(|| {
        // An index can be locked alone, too.
        let _rights = fence.act()?.map(|rights| rights.impatient(LOCK_TIMEOUT));
        let _limit = Limit::begin(time.left, false);
        count(&fence)
    });
    drop(time);
    match counted {
        Err(failure) if failure.is_timeout() => Ok((numbers_ahead(name, &fence)?, None)),
        counted => Ok(counted.map_err(Failure::unless_cancel).unwrap_or_default()),
    }
}

fn count(fence: &Fence) -> Result<Tail> {
    let definition = fence.filled()?;
    let time = match &definition.bucket {
        _ if fence.is_built_in() => "captured_at".into(),
        Some(bucket) => quoted(&bucket.column),
        None => "NULL::timestamptz".into(),
    };
    let sequence = quoted(&definition.source_sequence);
    let sql = format!(
        "SELECT count(*), (min(at) FILTER (WHERE isfinite(at)))::timestamptz
         FROM (SELECT {time} AS at FROM {} WHERE {sequence} > $1 ORDER BY {sequence}
             LIMIT {MOST_COUNTED}) AS tail",
        definition.source
    );
    let rows = spi::query(&sql, &[fence.watermark.into()], |r| Ok((r.get(1)?, r.get(2)?))).one()?;
    Ok(rows.unwrap_or_default())
}

/// How far the sequence is ahead of the watermark.
fn numbers_ahead(name: &str, fence: &Fence) -> Result<Option<i64>> {
    let Some(source) = sources::source_of(name)? else { return Ok(None) };
    // Its owner may be changing it.
    if !locks::try_lock(source.sequence, pg_sys::RowExclusiveLock) {
        return Ok(None);
    }
    // The sequence may be gone with its table: what is wrong is told by the rollup's last error.
    let last = relation::last_value(source.sequence).ok().flatten();
    Ok(last.map(|last| last.saturating_sub(fence.watermark).clamp(0, MOST_COUNTED)))
}

// ---- the time of an owner --------------------------------------------------------------------------------

thread_local! {
    /// When the statement began, and what it has spent on whose tails.
    static SPENT: RefCell<(i64, HashMap<pg_sys::Oid, Duration>)> = RefCell::default();
}

/// While it lives, an owner's time is spent.
struct Time {
    owner: pg_sys::Oid,
    began: Instant,
    left: Duration,
}

impl Time {
    fn left_to(owner: pg_sys::Oid) -> Time {
        // SAFETY: reads a variable of this process.
        let statement = unsafe { pg_sys::GetCurrentStatementStartTimestamp() };
        let spent = SPENT.with_borrow_mut(|(of, spent)| {
            if *of != statement {
                (*of, *spent) = (statement, HashMap::new());
            }
            spent.get(&owner).copied().unwrap_or_default()
        });
        Time { owner, began: Instant::now(), left: TIME_OF_OWNER.saturating_sub(spent) }
    }
}

/// Also when an error unwinds: it is no state of the server's.
impl Drop for Time {
    fn drop(&mut self) {
        let took = self.began.elapsed();
        SPENT.with_borrow_mut(|(_, spent)| *spent.entry(self.owner).or_default() += took);
    }
}

// ---- code of an owner's ----------------------------------------------------------------------------------

/// Whether planning or running a query on the relations could call a function that is not the server's, or
/// compute anything while it is planned.
fn has_code(tree: &[pg_sys::Oid]) -> Result<bool> {
    Ok(calls_functions(tree)? || is_computed_at_planning(tree)?)
}

/// A function of somebody's in an index, a CHECK, a default or generated column, a partition key, extended
/// statistics, a policy, a rule.
fn calls_functions(tree: &[pg_sys::Oid]) -> Result<bool> {
    let sql = format!(
        "SELECT FROM pg_catalog.pg_depend d
         WHERE d.refclassid IN ('pg_catalog.pg_proc'::regclass, 'pg_catalog.pg_operator'::regclass,
             'pg_catalog.pg_type'::regclass)
           AND d.refobjid >= {first}::oid
           AND (d.classid, d.objid) IN (
               SELECT 'pg_catalog.pg_class'::regclass::oid, indexrelid FROM pg_catalog.pg_index
                   WHERE indrelid = ANY ($1)
               UNION ALL SELECT 'pg_catalog.pg_constraint'::regclass, oid FROM pg_catalog.pg_constraint
                   WHERE conrelid = ANY ($1) AND contype = 'c'
               UNION ALL SELECT 'pg_catalog.pg_attrdef'::regclass, oid FROM pg_catalog.pg_attrdef
                   WHERE adrelid = ANY ($1)
               UNION ALL SELECT 'pg_catalog.pg_statistic_ext'::regclass, oid FROM pg_catalog.pg_statistic_ext
                   WHERE stxrelid = ANY ($1)
               UNION ALL SELECT 'pg_catalog.pg_policy'::regclass, oid FROM pg_catalog.pg_policy
                   WHERE polrelid = ANY ($1)
               UNION ALL SELECT 'pg_catalog.pg_rewrite'::regclass, oid FROM pg_catalog.pg_rewrite
                   WHERE ev_class = ANY ($1)
               UNION ALL SELECT 'pg_catalog.pg_class'::regclass, partrelid
                   FROM pg_catalog.pg_partitioned_table
                   WHERE partrelid = ANY ($1) AND partexprs IS NOT NULL)
         LIMIT 1",
        first = pg_sys::FirstNormalObjectId
    );
    spi::query(&sql, &[tree.to_vec().into()], |_| Ok(())).any()
}

/// A call whose arguments are constants, in whatever the planner simplifies of a table: it makes the call,
/// and md5(repeat('x', 600000000)) takes seconds in which no cancel is looked at.
fn is_computed_at_planning(tree: &[pg_sys::Oid]) -> Result<bool> {
    let expressions = spi::query(
        "SELECT expression FROM (
             SELECT indexprs::text FROM pg_catalog.pg_index WHERE indrelid = ANY ($1)
             UNION ALL SELECT indpred::text FROM pg_catalog.pg_index WHERE indrelid = ANY ($1)
             UNION ALL SELECT conbin::text FROM pg_catalog.pg_constraint WHERE conrelid = ANY ($1)
             UNION ALL SELECT stxexprs::text FROM pg_catalog.pg_statistic_ext WHERE stxrelid = ANY ($1)
             UNION ALL SELECT partexprs::text FROM pg_catalog.pg_partitioned_table WHERE partrelid = ANY ($1)
             UNION ALL SELECT adbin::text FROM pg_catalog.pg_attrdef d JOIN pg_catalog.pg_attribute a
                 ON a.attrelid = d.adrelid AND a.attnum = d.adnum
                 WHERE d.adrelid = ANY ($1) AND a.attgenerated <> '') AS found(expression)
         WHERE expression IS NOT NULL",
        &[tree.to_vec().into()],
        |r| spi::value::<String>(r, 1),
    )?;
    Ok(expressions.into_iter().any(|expression| {
        let text = CString::new(expression).unwrap_or_default();
        // SAFETY: the server's own text of a tree, or an empty one.
        unsafe { computes(pg_sys::stringToNode(text.as_ptr()).cast(), std::ptr::null_mut()) }
    }))
}

/// Whether a part of the expression has no column in it and is more than a constant. `true` ends the walk.
#[pg_guard]
unsafe extern "C-unwind" fn computes(node: *mut pg_sys::Node, context: *mut c_void) -> bool {
    use pg_sys::NodeTag::*;
    // SAFETY: nodes of an analyzed expression.
    unsafe {
        match node.as_ref().map(|node| node.type_) {
            None | Some(T_Const | T_Var | T_CaseTestExpr) => false,
            // They call nothing themselves.
            Some(
                T_List | T_RelabelType | T_CollateExpr | T_BoolExpr | T_NullTest | T_BooleanTest
                | T_ArrayExpr | T_ArrayCoerceExpr,
            ) => pg_sys::expression_tree_walker(node, Some(computes), context),
            Some(_) if !pg_sys::contain_var_clause(node) => true,
            Some(_) => pg_sys::expression_tree_walker(node, Some(computes), context),
        }
    }
}

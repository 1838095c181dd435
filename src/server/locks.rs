//! The only statements that lock what is not ours.
//!
//! | lock | on | who waits |
//! |---|---|---|
//! | [`lock_against_writers`] | the user's table, SHARE ROW EXCLUSIVE | its writers |
//! | [`lock_against_dropping`] | the user's table, ACCESS SHARE | who truncates, renames or drops it |
//! | [`lock_against_changes`] | the same, its partitions and indexes, ACCESS SHARE | who changes one of them |
//! | [`lock_all`], [`lock_exclusively`] | a partitioned table, its partitions | as the mode says, ACCESS EXCLUSIVE |
//! | [`database_is_wanted`] | this database, ROW EXCLUSIVE, for a moment | who drops, renames, moves or copies it |
//! | [`lock`] | whatever the statement needs | as the statement says |
//!
//! Workers never wait: what is not free is tried again in the next round. SQL calls wait within a limit.

use crate::error::{Error, Result};
use crate::guc::{self, LockLimit};
use crate::server::relation::{find_relation, relation_name, relation_tree};
use crate::server::session;
use crate::server::spi::{self, Found, kept, query, run, value};
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use std::time::{Duration, Instant};

/// How long to wait for a fence or a window.
#[derive(Clone, Copy)]
pub enum Patience {
    /// The worker: what is not free now is tried in the next round.
    None,
    /// A SQL call.
    Until(Instant),
}

impl Patience {
    /// That of a SQL call that begins now.
    pub fn of_call() -> Self {
        Patience::Until(Instant::now() + guc::window_wait())
    }

    /// This one, or another where this is none.
    pub fn or(self, other: Patience) -> Patience {
        if matches!(self, Patience::None) { other } else { self }
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

/// Whether somebody drops, renames, moves or copies this database, or waits to: such a statement gives up
/// after five seconds if anybody is still connected. Its lock is asked for as a new connection asks for it,
/// and given back with the transaction. `false` also where the table of locks is full: that passes, and ends
/// no worker.
pub fn database_is_wanted() -> bool {
    // SAFETY: reads a variable of this process; the tag is that of SET_LOCKTAG_OBJECT for a shared object.
    let ask = || unsafe {
        let tag = pg_sys::LOCKTAG {
            locktag_field1: 0,
            locktag_field2: pg_sys::DatabaseRelationId.to_u32(),
            locktag_field3: pg_sys::MyDatabaseId.to_u32(),
            locktag_field4: 0,
            locktag_type: pg_sys::LockTagType::LOCKTAG_OBJECT as u8,
            locktag_lockmethodid: pg_sys::DEFAULT_LOCKMETHOD as u8,
        };
        let mode = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
        Ok(pg_sys::LockAcquire(&tag, mode, false, true) == pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL)
    };
    session::attempt(ask).unwrap_or(false)
}

/// Takes SHARE ROW EXCLUSIVE on a user's tables until the transaction ends: writers wait, readers do not.
/// Gives up after `litellm_spend.lock_timeout`, because writers queue behind a waiting lock.
pub fn lock_against_writers(tables: &[pg_sys::Oid]) -> Result<()> {
    let locks: Vec<_> = tables.iter().map(|oid| (*oid, pg_sys::ShareRowExclusiveLock)).collect();
    lock_all(guc::lock_timeout(), &locks)
}

/// Takes ACCESS SHARE, as a reader does, until the transaction ends. We read by name, so the name must still
/// be that of `relation` once it is locked: its owner could have put something else in its place.
pub fn lock_against_dropping(relation: pg_sys::Oid) -> Result<()> {
    lock_all(guc::lock_timeout(), &[(relation, pg_sys::AccessShareLock)])
}

/// As [`lock_against_dropping`], but without waiting. `false`: somebody is changing the table right now.
pub fn try_lock_against_dropping(relation: pg_sys::Oid) -> Result<bool> {
    let got = try_lock(relation, pg_sys::AccessShareLock);
    if got {
        require_names(&[relation])?;
    }
    Ok(got)
}

pub fn try_lock(relation: pg_sys::Oid, mode: Mode) -> bool {
    // SAFETY: takes a lock, or says that it cannot.
    unsafe { pg_sys::ConditionalLockRelationOid(relation, mode as i32) }
}

/// Whether nobody keeps a reader from the relation, its indexes or its TOAST table: for a moment, so that who
/// drops them waits no longer than that.
pub fn is_free(relation: pg_sys::Oid) -> Result<bool> {
    let tables = kept(
        "SELECT $1 UNION ALL
         SELECT reltoastrelid FROM pg_catalog.pg_class WHERE oid = $1 AND reltoastrelid <> 0",
        &[relation.into()],
        |r| value(r, 1),
    )?;
    let mode = pg_sys::AccessShareLock;
    Ok(with_indexes(&tables)?.into_iter().all(|oid| {
        let got = try_lock(oid, mode);
        if got {
            // SAFETY: gives back what was just taken.
            unsafe { pg_sys::UnlockRelationOid(oid, mode as i32) };
        }
        got
    }))
}

fn with_indexes(tables: &[pg_sys::Oid]) -> Result<Vec<pg_sys::Oid>> {
    let sql = "SELECT indexrelid FROM pg_catalog.pg_index WHERE indrelid = ANY ($1)";
    let indexes = kept(sql, &[tables.to_vec().into()], |r| value(r, 1))?;
    Ok(tables.iter().copied().chain(indexes).collect())
}

/// As [`lock_against_dropping`], but on a table, its partitions and all of their indexes: for a call that
/// reads them or has a query planned. Takes no XID unless somebody is in the way.
pub fn lock_against_changes(table: pg_sys::Oid) -> Result<()> {
    let mode = pg_sys::AccessShareLock;
    let held = with_indexes(&relation_tree(table)?)?;
    if held.iter().all(|oid| try_lock(*oid, mode)) {
        return require_names(&[table]);
    }
    lock_all(guc::lock_timeout(), &held.into_iter().map(|oid| (oid, mode)).collect::<Vec<_>>())
}

/// The relations, which we have locked, are what their names mean.
fn require_names(relations: &[pg_sys::Oid]) -> Result<()> {
    let stranger = kept(
        "SELECT coalesce(quote_ident(nspname) || '.' || quote_ident(relname), o.oid::text, 'none')
         FROM unnest($1::oid[]) AS o(oid)
         LEFT JOIN pg_catalog.pg_class c ON c.oid = o.oid LEFT JOIN pg_catalog.pg_namespace n
             ON n.oid = c.relnamespace
         WHERE o.oid IS NULL
            OR pg_catalog.to_regclass(quote_ident(nspname) || '.' || quote_ident(relname))::oid IS DISTINCT FROM o.oid LIMIT 1",
        &[relations.to_vec().into()],
        |r| value::<String>(r, 1),
    ).one()?;
    stranger.map_or(Ok(()), |name| Err(Error::NoTable(name)))
}

/// Runs `sql`, which needs a lock on `relation`, with our lock_timeout.
pub fn lock(sql: &str, relation: &str, oid: pg_sys::Oid) -> Result<()> {
    lock_within(guc::lock_timeout(), sql, relation, oid)
}

/// Runs `sql`, which needs a lock on the relation called `name` if there is one, with our lock_timeout.
pub fn lock_named(sql: &str, name: &str) -> Result<()> {
    match find_relation(name)? {
        Some(oid) => lock(sql, name, oid),
        None => run(sql, &[]),
    }
}

/// Runs `sql`, which needs a lock on `relation`, with a limit of its own.
pub fn lock_within(limit: LockLimit, sql: &str, relation: &str, oid: pg_sys::Oid) -> Result<()> {
    let limit = or_callers(limit);
    let mode = pg_sys::AccessExclusiveLock;
    within((limit, limit.time), relation, (oid, mode), || run(sql, &[]))
}

/// How soon we look whether our wait is part of a deadlock. At once: if it is, others have waited for longer,
/// and whoever looks first is the one to fail. A deadlock that comes later is over before they look, a second
/// after they came (deadlock_timeout): by then our lock_timeout has ended our wait.
const DEADLOCK_TIMEOUT: Duration = Duration::from_millis(10);

/// How long a trigger waits for a lock on what it writes to, which nothing of ours locks: a DBA's VACUUM FULL
/// may.
pub const TRIGGERS_LOCK_TIMEOUT: &str = "1s";

/// A lock mode, as the server numbers it.
pub type Mode = u32;

/// As [`lock_all`], ACCESS EXCLUSIVE on each.
pub fn lock_exclusively(limit: LockLimit, relations: impl IntoIterator<Item = pg_sys::Oid>) -> Result<()> {
    let locks = relations.into_iter().map(|oid| (oid, pg_sys::AccessExclusiveLock)).collect::<Vec<_>>();
    lock_all(limit, &locks)
}

/// Locks relations until the transaction ends, in the order given, all within one limit: while we wait for
/// the second, others wait for the first. A partitioned table comes before its partitions, as for its users.
/// (LOCK TABLE would lock what a view reads as well.)
pub fn lock_all(limit: LockLimit, relations: &[(pg_sys::Oid, Mode)]) -> Result<()> {
    let limit = or_callers(limit);
    let deadline = Instant::now() + limit.time;
    for (oid, mode) in relations {
        if !try_lock(*oid, *mode) {
            let name = relation_name(*oid)?;
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            within((limit, left), &name, (*oid, *mode), || {
                // SAFETY: waits for a lock, or fails at lock_timeout.
                unsafe { pg_sys::LockRelationOid(*oid, *mode as i32) };
                Ok(())
            })?;
        }
    }
    require_names(&relations.iter().map(|(oid, _)| *oid).collect::<Vec<_>>())?;
    // SAFETY: reads state of the server.
    if unsafe { pg_sys::RecoveryInProgress() } {
        return Ok(());
    }
    spi::take_xid()
}

/// The limit, or the caller's own lock_timeout, whichever is shorter.
fn or_callers(limit: LockLimit) -> LockLimit {
    match session::callers_lock_timeout().filter(|own| *own < limit.time) {
        Some(time) => LockLimit { setting: "lock_timeout", time },
        None => limit,
    }
}

/// Runs `work`, which needs a lock of that mode on `relation`, within what is left of a limit.
fn within(
    (limit, left): (LockLimit, Duration),
    relation: &str,
    (oid, mode): (pg_sys::Oid, Mode),
    work: impl FnOnce() -> Result<()>,
) -> Result<()> {
    // Who is in the way is asked before: after a failure the transaction can only be rolled back.
    let holders = holders(
        "l.locktype = 'relation' AND l.relation = $1 AND l.mode = ANY ($2) AND l.database =
             (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())",
        &[oid.into(), conflicting(mode).into()],
    )?;
    let lock_timeout = session::give_up_after(left);
    let deadlock_timeout = session::give_way_after(DEADLOCK_TIMEOUT);
    let refused =
        || Err(Error::LockNotAvailable { relation: relation.into(), limit, holders: holders.clone() });
    // Who has it may wait for us, too, as an index build does for every older snapshot: whichever limit is
    // found to be over first.
    let result = PgTryBuilder::new(std::panic::AssertUnwindSafe(work))
        .catch_when(PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE, |_| refused())
        .catch_when(PgSqlErrorCode::ERRCODE_T_R_DEADLOCK_DETECTED, |_| refused())
        .execute();
    if result.is_ok() {
        session::give_up_after(lock_timeout);
        session::give_way_after(deadlock_timeout);
    }
    result
}

/// Fails once somebody has waited for a lock of ours on one of the relations for longer than we may wait for
/// theirs: for who works under a lock that keeps others out, and looks now and then. No writer queues behind
/// a VACUUM or a build of an index that waits.
pub fn require_nobody_waits(relations: &[pg_sys::Oid]) -> Result<()> {
    let limit = or_callers(guc::lock_timeout());
    let waiters = processes(
        "NOT l.granted AND l.locktype = 'relation' AND l.relation = ANY ($1) AND l.database =
             (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
         AND l.mode <> 'ShareUpdateExclusiveLock' AND l.waitstart < clock_timestamp() - make_interval(secs => $2)
         AND pg_catalog.pg_backend_pid() = ANY (pg_catalog.pg_blocking_pids(l.pid))",
        &[relations.to_vec().into(), limit.time.as_secs_f64().into()],
    )?;
    match relations.first() {
        Some(first) if !waiters.is_empty() => {
            Err(Error::GaveWay { relation: relation_name(*first)?, limit, waiters })
        }
        _ => Ok(()),
    }
}

/// Who else has locks, as a DETAIL names them: `which` says of `l` in pg_locks which locks. Empty: nobody.
pub fn holders(which: &str, args: &[DatumWithOid]) -> Result<String> {
    processes(&format!("l.granted AND {which}"), args)
}

fn processes(which: &str, args: &[DatumWithOid]) -> Result<String> {
    // The second look at the locks only where one has no process: others may be waiting for us.
    let sql = format!(
        "SELECT coalesce(string_agg(DISTINCT CASE WHEN l.pid IS NULL
                    THEN concat_ws(' ', 'prepared transaction', quote_literal(
                        (SELECT p.gid FROM pg_catalog.pg_prepared_xacts p JOIN pg_catalog.pg_locks x
                             ON x.locktype = 'transactionid' AND x.pid IS NULL AND x.transactionid = p.transaction
                         WHERE x.virtualtransaction = l.virtualtransaction)))
                    ELSE format('process %s (%s)', l.pid,
                                concat_ws(', ', a.usename, coalesce(nullif(a.application_name, ''), a.backend_type))) END, ', '), '')
         FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
         WHERE l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid() AND {which}"
    );
    Ok(query(&sql, args, |r| value::<String>(r, 1)).one()?.unwrap_or_default())
}

/// The modes that keep others from `mode`, as pg_locks calls them.
fn conflicting(mode: Mode) -> Vec<&'static str> {
    let modes = [
        "AccessShareLock",
        "RowShareLock",
        "RowExclusiveLock",
        "ShareUpdateExclusiveLock",
        "ShareLock",
        "ShareRowExclusiveLock",
        "ExclusiveLock",
        "AccessExclusiveLock",
    ];
    // SAFETY: looks into a table of the server's.
    let conflicts = |held: i32| unsafe { pg_sys::DoLockModesConflict(held, mode as i32) };
    (1..).zip(modes).filter(|(held, _)| conflicts(*held)).map(|(_, name)| name).collect()
}

/// Between three quarters and all of `rest`, so that those who try again do not do it in step.
pub fn jittered(rest: Duration) -> Duration {
    let nanos =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.subsec_nanos());
    rest - rest.mul_f64(f64::from(nanos % 1000) / 4000.0)
}

/// Runs `work` in a SQL call, which has nobody to try again: when somebody is in the way, several times, with
/// pauses in which nobody waits for us.
pub fn insist<T>(mut work: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 0..TRIES {
        match session::attempt(&mut work) {
            Ok(value) => return Ok(value),
            Err(failure) if failure.is_lock_timeout() => {
                std::thread::sleep(jittered(PAUSE));
                pgrx::check_for_interrupts!();
            }
            Err(failure) => {
                failure.unless_cancel();
                break;
            }
        }
    }
    work()
}

const TRIES: u32 = 9;
const PAUSE: Duration = Duration::from_millis(400);

//! Our locks, and the only statements that lock what is not ours.
//!
//! | lock | on | who waits |
//! |---|---|---|
//! | [`Fence`] | a rollup's state row, FOR UPDATE | other mergers and rebuilds; readers never |
//! | [`lock_attachment`] | our table `capture`, SHARE ROW EXCLUSIVE | others that attach, detach, switch views |
//! | [`lock_against_writers`] | the user's table, SHARE ROW EXCLUSIVE | its writers |
//! | [`lock_against_dropping`] | the user's table, ACCESS SHARE | who truncates, renames or drops it |
//! | [`lock_all`] | a partitioned table, its partitions | as the mode says |
//! | [`lock`] | whatever the statement needs | as the statement says |
//!
//! Workers never wait: what is not free is tried again at the next tick. SQL calls wait within a limit.

use crate::catalog::{execute, exists, find_relation, fresh, query, relation_name, rollup_names, value};
use crate::definition::{Definition, SCHEMA};
use crate::error::{Error, Result};
use crate::guc::{self, LockLimit};
use crate::litellm::CHANGE_LOG;
use crate::session::{self, Elevated, Owner, require_read_committed};
use pgrx::datum::Timestamp;
use pgrx::prelude::*;
use pgrx::spi::SpiHeapTupleData;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// The right to change a rollup: its state row, locked until the transaction ends. Whoever holds it sees, in
/// every later statement, all that earlier holders did.
pub struct Fence {
    pub name: String,
    /// `None`: its owner fills it.
    pub definition: Option<Definition>,
    /// `None`: it was dropped.
    pub source: Option<String>,
    /// The source's, if it exists.
    pub relation: pg_sys::Oid,
    /// Who owned its source when it was declared or last followed; of one that is filled by hand, who owns the source.
    pub owner: pg_sys::Oid,
    source_owner: pg_sys::Oid,
    pub watermark: i64,
    pub covered_from: Timestamp,
    _work: Option<Work>,
}

/// Work of this session on a rollup, or on a table's maintenance. The row's lock keeps other transactions out, but not what a step
/// itself calls: a trigger on the rollup's table that merges it again would count its window twice.
pub struct Work(String);

thread_local! {
    static AT_WORK: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
}

impl Work {
    /// `None`: the session is at it already.
    pub fn begin(name: &str) -> Option<Work> {
        AT_WORK.with_borrow_mut(|names| names.insert(name.into())).then(|| Work(name.into()))
    }
}

/// Also when an error unwinds: it is no state of the server's.
impl Drop for Work {
    fn drop(&mut self) {
        AT_WORK.with_borrow_mut(|names| names.remove(&self.0));
    }
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
    /// That of a SQL call that begins now.
    pub fn of_call() -> Self {
        Patience::Until(Instant::now() + guc::window_wait())
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
        let Some(work) = Work::begin(name) else { return Ok(None) };
        loop {
            let sql = format!("{} FOR UPDATE OF r SKIP LOCKED", Fence::state());
            if let Some(fence) = fresh(&sql, &[name.into()], |r| Fence::read(name, r))?.pop() {
                return Ok(Some(Fence { _work: Some(work), ..fence }));
            }
            if !exists(&format!("SELECT FROM {SCHEMA}.rollup WHERE name = $1"), &[name.into()])? {
                return Err(Error::NoRollup(name.into()));
            }
            if !patience.try_again() {
                return Ok(None);
            }
        }
    }

    /// The fences of all rollups of a source, in the order of their names: no deadlocks.
    pub fn take_all(source: &str, patience: Patience) -> Result<Option<Vec<Fence>>> {
        let mut fences = vec![];
        for name in rollup_names(Some(source))? {
            match Fence::take(&name, patience)? {
                Some(fence) => fences.push(fence),
                None => return Ok(None),
            }
        }
        Ok(Some(fences))
    }

    /// Takes the fence as soon as its holder ends, or fails at the caller's own lock_timeout: windows belong to one
    /// transaction after the other, each as long as its caller likes.
    pub fn wait(name: &str) -> Result<Fence> {
        let work = Work::begin(name).ok_or_else(|| Error::RollupBusy(name.into()))?;
        let sql = format!("{} FOR UPDATE OF r", Fence::state());
        let fences = PgTryBuilder::new(std::panic::AssertUnwindSafe(|| {
            fresh(&sql, &[name.into()], |r| Fence::read(name, r))
        }))
        .catch_when(PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE, |_| Err(Error::RollupBusy(name.into())))
        .execute()?;
        let fence = fences.into_iter().next().ok_or_else(|| Error::NoRollup(name.into()))?;
        Ok(Fence { _work: Some(work), ..fence })
    }

    /// Only looks at it, on the transaction's snapshot: the holder may not change anything.
    pub fn look(name: &str) -> Result<Fence> {
        let states = query(&Fence::state(), &[name.into()], |r| Fence::read(name, r))?;
        states.into_iter().next().ok_or_else(|| Error::NoRollup(name.into()))
    }

    fn state() -> String {
        format!(
            "SELECT r.definition::text, r.source, coalesce(s.relation, 0::oid)::oid, r.watermark, r.covered_from,
                    coalesce(r.owner::oid,
                             (SELECT c.relowner FROM pg_catalog.pg_class c WHERE c.oid = s.relation), 0::oid),
                    coalesce((SELECT c.relowner FROM pg_catalog.pg_class c WHERE c.oid = s.relation), 0::oid)
             FROM {SCHEMA}.rollup r LEFT JOIN {SCHEMA}.source s ON s.name = r.source
             WHERE r.name = $1"
        )
    }

    fn read(name: &str, r: &SpiHeapTupleData) -> Result<Fence> {
        let definition = r.get::<String>(1)?;
        let mut fence = Fence {
            name: name.into(),
            definition: definition.map(|text| serde_json::from_str(&text)).transpose()?,
            source: r.get(2)?,
            relation: value(r, 3)?,
            watermark: value(r, 4)?,
            covered_from: value(r, 5)?,
            owner: value(r, 6)?,
            source_owner: value(r, 7)?,
            _work: None,
        };
        if let Some(definition) = fence.definition.as_mut().filter(|_| fence.source.is_some()) {
            // It may have been renamed. One that was dropped fails when it is read.
            definition.source = relation_name(fence.relation).unwrap_or_default();
        }
        Ok(fence)
    }

    /// What it consists of, if it is for us to fill.
    pub fn filled(&self) -> Result<&Definition> {
        match (&self.definition, &self.source) {
            (None, _) => Err(Error::ByHand(self.name.clone())),
            (_, None) => Err(Error::SourceDropped(self.name.clone())),
            (Some(definition), _) => Ok(definition),
        }
    }

    /// With the rights that its own statements run with, until the guard is dropped: the owner's, or ours if everything that
    /// they mention is ours. Refused while its source is another's: [`crate::declare::settle`] comes first.
    pub fn act(&self) -> Result<Option<Elevated>> {
        if self.is_built_in() {
            return Ok(None);
        }
        let (owner, of_source) = (Owner::role(self.owner), Owner::role(self.source_owner));
        if self.source_owner != pg_sys::InvalidOid && owner != of_source {
            let (relation, expected) = (relation_name(self.relation)?, owner.name()?);
            return Err(Error::OtherOwner { relation, owner: of_source.name()?, expected });
        }
        Ok(Some(owner.act()))
    }

    /// It is fed by the change log.
    pub fn is_built_in(&self) -> bool {
        self.source.as_deref() == Some(CHANGE_LOG)
    }

    /// Advances the watermark. The rollup's rows of the window are written in the same transaction; `counts` are the
    /// source rows and groups, where we know them.
    pub fn advance(&self, end: i64, counts: Option<(i64, i64)>, ms: f64) -> Result<()> {
        execute(
            &format!(
                "UPDATE {SCHEMA}.rollup SET watermark = $2, merged_at = clock_timestamp(), merged_rows = $3,
                     merged_groups = $4, merged_ms = $5, last_error = NULL, last_error_at = NULL
                 WHERE name = $1"
            ),
            &[
                self.name.as_str().into(),
                end.into(),
                counts.map(|c| c.0).into(),
                counts.map(|c| c.1).into(),
                ms.into(),
            ],
        )?;
        Ok(())
    }
}

/// The right to change what is attached: triggers, views, the state of the capture. Ends with the transaction. What is
/// read after it is current. `false`: another transaction keeps it.
pub fn lock_attachment(patience: Patience) -> Result<bool> {
    let name = format!("{SCHEMA}.capture");
    let state = find_relation(&name)?.ok_or(Error::NoTable(name))?;
    while !try_lock(state, pg_sys::ShareRowExclusiveLock) {
        if !patience.try_again() {
            return Ok(false);
        }
    }
    // Takes an XID, and with it every later query a fresh snapshot.
    execute("SELECT 1", &[])?;
    Ok(true)
}

/// The right to make or drop what is called `name` of `relation`, until the transaction ends. Nobody else waits for it but who
/// wants the same name or source.
pub fn lock_name(name: &str, relation: pg_sys::Oid) -> Result<()> {
    let patience = Patience::of_call();
    for (table, object) in [("source", relation.to_u32()), ("rollup", fnv(name))] {
        let class = format!("{SCHEMA}.{table}");
        let class = find_relation(&class)?.ok_or(Error::NoTable(class))?;
        // SAFETY: takes a lock, or says that it cannot.
        while !unsafe {
            pg_sys::ConditionalLockDatabaseObject(class, object.into(), 0, pg_sys::ExclusiveLock as i32)
        } {
            if !patience.try_again() {
                return Err(Error::RollupBusy(name.into()));
            }
        }
    }
    // Takes an XID, and with it every later query a fresh snapshot.
    execute("SELECT 1", &[]).map(drop)
}

/// A number for a name (FNV-1a): two names of one number wait for each other, no more.
fn fnv(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// The right to make or drop the marker of restores, until the transaction ends. `false`: another transaction keeps it.
pub fn try_lock_installation() -> Result<bool> {
    let name = format!("{SCHEMA}.installation");
    let installation = find_relation(&name)?.ok_or(Error::NoTable(name))?;
    let got = try_lock(installation, pg_sys::ShareRowExclusiveLock);
    if got {
        // Takes an XID, and with it every later query a fresh snapshot.
        execute("SELECT 1", &[])?;
    }
    Ok(got)
}

/// Takes SHARE ROW EXCLUSIVE on a user's tables until the transaction ends: writers wait, readers do not. Gives up
/// after `litellm_spend.lock_timeout`, because writers queue behind a waiting lock.
pub fn lock_against_writers(tables: &[pg_sys::Oid]) -> Result<()> {
    let locks: Vec<_> = tables.iter().map(|oid| (*oid, pg_sys::ShareRowExclusiveLock)).collect();
    lock_all(guc::lock_timeout(), &locks)
}

/// Takes ACCESS SHARE, as a reader does, until the transaction ends. We read by name, so the name must still be that of
/// `relation` once it is locked: its owner could have put something else in its place.
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

fn try_lock(relation: pg_sys::Oid, mode: Mode) -> bool {
    // SAFETY: takes a lock, or says that it cannot.
    unsafe { pg_sys::ConditionalLockRelationOid(relation, mode as i32) }
}

/// The relations, which we have locked, are what their names mean.
fn require_names(relations: &[pg_sys::Oid]) -> Result<()> {
    let strangers = query(
        "SELECT coalesce(quote_ident(nspname) || '.' || quote_ident(relname), o.oid::text, 'none')
         FROM unnest($1::oid[]) AS o(oid)
         LEFT JOIN pg_catalog.pg_class c ON c.oid = o.oid LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE o.oid IS NULL
            OR pg_catalog.to_regclass(quote_ident(nspname) || '.' || quote_ident(relname))::oid IS DISTINCT FROM o.oid LIMIT 1",
        &[relations.to_vec().into()],
        |r| value::<String>(r, 1),
    )?;
    strangers.into_iter().next().map_or(Ok(()), |name| Err(Error::NoTable(name)))
}

/// Runs `sql`, which needs a lock on `relation`, with our lock_timeout.
pub fn lock(sql: &str, relation: &str, oid: pg_sys::Oid) -> Result<()> {
    lock_within(guc::lock_timeout(), sql, relation, oid)
}

/// Runs `sql`, which needs a lock on the relation called `name` if there is one, with our lock_timeout.
pub fn lock_named(sql: &str, name: &str) -> Result<()> {
    match find_relation(name)? {
        Some(oid) => lock(sql, name, oid),
        None => execute(sql, &[]).map(drop),
    }
}

/// Runs `sql`, which needs a lock on `relation`, with a limit of its own.
pub fn lock_within(limit: LockLimit, sql: &str, relation: &str, oid: pg_sys::Oid) -> Result<()> {
    let mode = pg_sys::AccessExclusiveLock;
    within((limit, limit.time), relation, (oid, mode), || execute(sql, &[]).map(drop))
}

/// How soon we look whether our wait is part of a deadlock. At once: if it is, others have waited for longer, and whoever looks
/// first is the one to fail. A deadlock that comes later is over before they look, a second after they came
/// (deadlock_timeout): by then our lock_timeout has ended our wait.
const DEADLOCK_TIMEOUT: Duration = Duration::from_millis(10);

/// A lock mode, as the server numbers it.
pub type Mode = u32;

/// Locks relations until the transaction ends, in the order given, all within one limit: while we wait for the second, others
/// wait for the first. A partitioned table comes before its partitions, as for its users. (LOCK TABLE would lock what a view
/// reads as well.)
pub fn lock_all(limit: LockLimit, relations: &[(pg_sys::Oid, Mode)]) -> Result<()> {
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
    // Takes an XID, and with it every later query a fresh snapshot.
    execute("SELECT 1", &[]).map(drop)
}

/// Runs `work`, which needs a lock of that mode on `relation`, within what is left of a limit.
fn within(
    (limit, left): (LockLimit, Duration),
    relation: &str,
    (oid, mode): (pg_sys::Oid, Mode),
    work: impl FnOnce() -> Result<()>,
) -> Result<()> {
    // Who is in the way is asked before: after a failure the transaction can only be rolled back.
    let holders = query(
        "SELECT coalesce(string_agg(DISTINCT CASE WHEN l.pid IS NULL THEN 'a prepared transaction'
                    ELSE format('process %s (%s)', l.pid,
                                concat_ws(', ', a.usename, coalesce(nullif(a.application_name, ''), a.backend_type))) END, ', '), '')
         FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
         WHERE l.locktype = 'relation' AND l.relation = $1 AND l.granted AND l.mode = ANY ($2)
           AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
           AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid()",
        &[oid.into(), conflicting(mode).into()],
        |r| value::<String>(r, 1),
    )?
    .pop()
    .unwrap_or_default();
    let before = set_lock_timeout(&format!("{}ms", left.as_millis()))?;
    let deadlock_timeout = session::give_way_after(DEADLOCK_TIMEOUT);
    let result = PgTryBuilder::new(std::panic::AssertUnwindSafe(work))
        .catch_when(PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE, |_| {
            Err(Error::LockNotAvailable { relation: relation.into(), limit, holders: holders.clone() })
        })
        .execute();
    if result.is_ok() {
        set_lock_timeout(&before)?;
        session::give_way_after(deadlock_timeout);
    }
    result
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

/// Runs `work` in a SQL call, which has nobody to try again: when somebody is in the way, several times, with pauses in which
/// nobody waits for us.
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

/// Sets lock_timeout until the transaction ends; returns what it was.
fn set_lock_timeout(value: &str) -> Result<String> {
    let sql =
        "SELECT pg_catalog.current_setting('lock_timeout'), pg_catalog.set_config('lock_timeout', $1, true)";
    let before = fresh(sql, &[value.into()], |r| crate::catalog::value::<String>(r, 1))?;
    Ok(before.into_iter().next().unwrap_or_default())
}

//! Ends a build or drop of an index of ours for which somebody waits who has others waiting behind him.
//!
//! CREATE INDEX CONCURRENTLY waits for every older snapshot, for hours if need be, and an ALTER TABLE waits
//! for it, with all readers and writers of the table behind. So a builder notes here that it is there, and
//! for how long others may wait for it: as long as anybody may for a lock of ours. Its worker begins it anew
//! later.
//!
//! The launcher looks, each second: nothing keeps it, while a worker may be in a step of many minutes, pause
//! for an hour, or be gone. It has no database, so it reads the server's table of locks itself.
//!
//! No writer queues behind a VACUUM, an ANALYZE or another build that waits: those wait until it is done.

use crate::guc;
use crate::worker::process::in_transaction;
use pgrx::prelude::*;
use pgrx::{PgAtomic, pg_shmem_init};
use std::sync::atomic::{AtomicI32, AtomicI64, Ordering};

/// As many builders as a server may have workers, and some.
const PLACES: usize = 64;

#[derive(Default)]
struct Builder {
    /// 0: the place is free.
    pid: AtomicI32,
    /// In microseconds.
    patience: AtomicI64,
}

struct Builders([Builder; PLACES]);

impl Default for Builders {
    fn default() -> Builders {
        Builders(std::array::from_fn(|_| Builder::default()))
    }
}

// SAFETY: atomics, and nothing else.
unsafe impl pgrx::PGRXSharedMemory for Builders {}

// SAFETY: used only after register() has set it up in the postmaster.
static BUILDERS: PgAtomic<Builders> = unsafe { PgAtomic::new(c"litellm_spend builders") };

/// In the postmaster.
pub fn register() {
    pg_shmem_init!(BUILDERS);
}

/// In a builder that begins. `false`: there is no place for it, and nobody would end it.
pub fn begin() -> bool {
    let free = |builder: &&Builder| {
        builder.pid.compare_exchange(0, own_pid(), Ordering::Relaxed, Ordering::Relaxed).is_ok()
    };
    let Some(place) = BUILDERS.get().0.iter().find(free) else { return false };
    place.patience.store(guc::lock_timeout().time.as_micros() as i64, Ordering::Relaxed);
    // SAFETY: in a process that has shared memory; runs once, when it ends.
    unsafe { pg_sys::before_shmem_exit(Some(on_exit), pg_sys::Datum::from(0)) };
    true
}

#[pg_guard]
unsafe extern "C-unwind" fn on_exit(_code: i32, _argument: pg_sys::Datum) {
    for builder in &BUILDERS.get().0 {
        let _ = builder.pid.compare_exchange(own_pid(), 0, Ordering::Relaxed, Ordering::Relaxed);
    }
}

fn own_pid() -> i32 {
    // SAFETY: reads this process's pid.
    unsafe { pg_sys::MyProcPid }
}

/// In the launcher, now and then.
pub fn look() {
    let builders = BUILDERS
        .get()
        .0
        .iter()
        .map(|builder| (builder.pid.load(Ordering::Relaxed), builder.patience.load(Ordering::Relaxed)));
    let builders: Vec<_> = builders.filter(|(pid, _)| *pid != 0).collect();
    if builders.is_empty() {
        return;
    }
    in_transaction(|| {
        // SAFETY: it is copied into memory of this transaction.
        let locks = unsafe {
            let data = pg_sys::GetLockStatusData();
            std::slice::from_raw_parts((*data).locks, (*data).nelements as usize)
        };
        for (pid, patience) in builders {
            if is_in_the_way(locks, pid, patience) {
                // SAFETY: a signal to a process of ours, which ends what it builds, if it still does.
                unsafe { libc::kill(pid, libc::SIGINT) };
            }
        }
    });
}

/// Whether somebody has waited for a lock of process `pid` on a relation for longer than that, in
/// microseconds.
fn is_in_the_way(locks: &[pg_sys::LockInstanceData], pid: i32, patience: i64) -> bool {
    const OURS: i32 = pg_sys::ShareUpdateExclusiveLock as i32;
    // SAFETY: reads the clock.
    let since = unsafe { pg_sys::GetCurrentTimestamp() } - patience;
    let held = locks.iter().filter(|lock| lock.pid == pid && lock.holdMask & (1 << OURS) != 0);
    let held: Vec<_> = held.filter_map(relation).collect();
    locks.iter().any(|lock| {
        // SAFETY: looks into a table of the server's.
        let waits_for_us = || unsafe { pg_sys::DoLockModesConflict(OURS, lock.waitLockMode) };
        lock.waitLockMode > OURS
            && (1..since).contains(&lock.waitStart)
            && relation(lock).is_some_and(|relation| held.contains(&relation))
            && waits_for_us()
    })
}

/// The database and relation that a lock is on.
fn relation(lock: &pg_sys::LockInstanceData) -> Option<(u32, u32)> {
    let tag = &lock.locktag;
    let is_relation = u32::from(tag.locktag_type) == pg_sys::LockTagType::LOCKTAG_RELATION;
    is_relation.then_some((tag.locktag_field1, tag.locktag_field2))
}

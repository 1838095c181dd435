//! Until when each database has had a worker.
//!
//! A worker that was ended comes back some seconds later, and is not missing meanwhile: `spend_health` asks
//! how long it has been away. One that ends before its first round has not served anybody, so that a worker
//! which fails again and again is missed in spite of its starts.
//!
//! In shared memory: who is terminated cannot write anything else. A crash of the server empties it.

use pgrx::prelude::*;
use pgrx::{PgAtomic, pg_shmem_init};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};

/// As many databases are known: each has a worker, which is a process, so hardly a server has more.
const PLACES: usize = 1024;

struct Served {
    /// When the first launcher came; 0: none has.
    launched: AtomicI64,
    databases: [AtomicU32; PLACES],
    until: [AtomicI64; PLACES],
}

impl Default for Served {
    fn default() -> Served {
        let (databases, until) = (std::array::from_fn(|_| 0.into()), std::array::from_fn(|_| 0.into()));
        Served { launched: 0.into(), databases, until }
    }
}

// SAFETY: atomics, and nothing else.
unsafe impl pgrx::PGRXSharedMemory for Served {}

// SAFETY: used only after register() has set it up in the postmaster.
static SERVED: PgAtomic<Served> = unsafe { PgAtomic::new(c"litellm_spend served databases") };

/// Inherited from the postmaster: without preload there is no such memory.
static REGISTERED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Where this worker notes that it is there, once it has done a round.
    static PLACE: Cell<Option<usize>> = const { Cell::new(None) };
}

/// In the postmaster.
pub fn register() {
    pg_shmem_init!(SERVED);
    REGISTERED.store(true, Ordering::Relaxed);
}

fn now() -> i64 {
    // SAFETY: reads the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
}

/// In a launcher that begins.
pub fn launched() {
    let _ = SERVED.get().launched.compare_exchange(0, now(), Ordering::Relaxed, Ordering::Relaxed);
}

/// In a session that has made the extension: its database has no worker yet.
pub fn awaited() {
    if find().is_none()
        && let Some(place) = place()
    {
        SERVED.get().until[place].store(now(), Ordering::Relaxed);
    }
}

/// In a worker that has done a round.
pub fn served() {
    if own_place().is_none() {
        PLACE.set(place());
    }
    ending();
}

/// In a worker that ends.
pub fn ending() {
    if let Some(place) = own_place() {
        SERVED.get().until[place].store(now(), Ordering::Relaxed);
    }
}

/// Where there are more databases than places, another's worker may have taken it.
fn own_place() -> Option<usize> {
    PLACE.get().filter(|place| SERVED.get().databases[*place].load(Ordering::Relaxed) == database())
}

/// The place of this database, a free one, or that of whom nobody has served for the longest time.
fn place() -> Option<usize> {
    let served = SERVED.get();
    if let Some(place) = find() {
        return Some(place);
    }
    let until = |place: &usize| match served.databases[*place].load(Ordering::Relaxed) {
        0 => i64::MIN,
        _ => served.until[*place].load(Ordering::Relaxed),
    };
    let place = (0..PLACES).min_by_key(until)?;
    let before = served.databases[place].load(Ordering::Relaxed);
    // Another worker may be at it: then after the next round.
    let taken =
        served.databases[place].compare_exchange(before, database(), Ordering::Relaxed, Ordering::Relaxed);
    taken.is_ok().then_some(place)
}

fn find() -> Option<usize> {
    let ours = database();
    SERVED.get().databases.iter().position(|database| database.load(Ordering::Relaxed) == ours)
}

fn database() -> u32 {
    // SAFETY: reads a variable of this process.
    unsafe { pg_sys::MyDatabaseId }.to_u32()
}

/// Until when this database has had a worker or, if it has had none, since when it has the extension, or
/// there has been a launcher. `None`: not known.
pub fn served_until() -> Option<TimestampWithTimeZone> {
    if !REGISTERED.load(Ordering::Relaxed) {
        return None;
    }
    let served = SERVED.get();
    let known = find().map_or(&served.launched, |place| &served.until[place]).load(Ordering::Relaxed);
    TimestampWithTimeZone::try_from(known).ok().filter(|_| known != 0)
}

//! The launcher: keeps one worker in each database that has the extension.
//!
//! It is connected to no database. It starts a worker in one database after the other; a worker that finds no
//! extension there leaves at once. It looks again when CREATE EXTENSION commits anywhere, when a worker has
//! ended, and every `litellm_spend.discovery_interval`. It does not run on a standby; promotion starts it.

use crate::guc;
use crate::server::log;
use crate::server::session::{Failure, attempt};
use crate::worker::give_way;
use crate::worker::process::{attach_signals, in_transaction, pin_settings, reload_settings};
use crate::worker::service;
use pgrx::bgworkers::*;
use pgrx::prelude::*;
use pgrx::{PgAtomic, PgXactCallbackEvent, pg_shmem_init, register_xact_callback};
use std::collections::{BTreeMap, HashMap};
use std::ffi::CStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const LIBRARY: &str = "litellm_spend";

/// Raised when a database may have got the extension.
// SAFETY: used only after _PG_init has set it up in the postmaster.
static ANNOUNCEMENTS: PgAtomic<AtomicU32> = unsafe { PgAtomic::new(c"litellm_spend announcements") };

/// Counts the workers that found the extension in their database.
// SAFETY: as above.
static FOUND: PgAtomic<AtomicU32> = unsafe { PgAtomic::new(c"litellm_spend workers") };

/// Counts the workers that found none. One that failed while it started has found nothing out.
// SAFETY: as above.
static FOUND_NONE: PgAtomic<AtomicU32> = unsafe { PgAtomic::new(c"litellm_spend workers that left") };

/// Counts the launchers that there have been. A worker leaves when the one that started it is gone: nobody
/// else knows of it, and the next launcher starts its own.
// SAFETY: as above.
static LAUNCHES: PgAtomic<AtomicU32> = unsafe { PgAtomic::new(c"litellm_spend launches") };

/// Sets the workers up. Called from _PG_init, in the postmaster, when the library is preloaded.
pub fn register() {
    pg_shmem_init!(ANNOUNCEMENTS);
    pg_shmem_init!(FOUND);
    pg_shmem_init!(FOUND_NONE);
    pg_shmem_init!(LAUNCHES);
    service::register();
    give_way::register();
    BackgroundWorkerBuilder::new("litellm_spend launcher")
        .set_type("litellm_spend launcher")
        .set_library(LIBRARY)
        .set_function("litellm_spend_launcher")
        .enable_spi_access()
        .set_start_time(BgWorkerStartTime::RecoveryFinished)
        .set_restart_time(Some(Duration::from_secs(5)))
        .load();
}

/// Which launcher is there now.
pub fn launch() -> u32 {
    LAUNCHES.get().load(Ordering::Relaxed)
}

/// Says, in a new worker, that it found the extension.
pub fn found_extension() {
    FOUND.get().fetch_add(1, Ordering::Relaxed);
}

/// Says, in a new worker, that there is no extension.
pub fn found_none() {
    FOUND_NONE.get().fetch_add(1, Ordering::Relaxed);
}

/// Tells the launcher, once the transaction has committed, that this database may have the extension.
pub fn announce() {
    register_xact_callback(PgXactCallbackEvent::Commit, || {
        ANNOUNCEMENTS.get().fetch_add(1, Ordering::Relaxed);
        service::awaited();
    });
}

/// How long a worker that had work stays away after it ended. Long enough for DROP DATABASE. `spend_health`
/// misses it after ten seconds.
const RESTART_AFTER: Duration = Duration::from_secs(5);

/// How long it is not said again that there is no slot for a database.
const NOTED_FOR: Duration = Duration::from_secs(3600);

/// Between two looks at who ended, and at who waits for a builder.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How long the launcher waits for a new worker to say whether it found the extension.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// What the launcher knows of a database.
enum Tenant {
    /// It has no extension, as far as a worker could see.
    Empty,
    Served {
        worker: DynamicBackgroundWorker,
        _memory: Memory,
    },
    /// Its worker ended, or could not be started.
    Unserved(Instant),
}

/// What the server allocates for a worker, which neither it nor pgrx ever frees.
struct Memory(pg_sys::MemoryContext);

impl Memory {
    fn new() -> Memory {
        // SAFETY: outside of a transaction, where the parent lives as long as the process.
        Memory(unsafe {
            pg_sys::AllocSetContextCreateInternal(
                pg_sys::TopMemoryContext,
                c"litellm_spend worker".as_ptr(),
                pg_sys::ALLOCSET_SMALL_MINSIZE as usize,
                pg_sys::ALLOCSET_SMALL_INITSIZE as usize,
                pg_sys::ALLOCSET_SMALL_MAXSIZE as usize,
            )
        })
    }

    fn within<T>(&self, work: impl FnOnce() -> T) -> T {
        // SAFETY: the context of before comes back.
        let before = unsafe { pg_sys::MemoryContextSwitchTo(self.0) };
        let result = work();
        unsafe { pg_sys::MemoryContextSwitchTo(before) };
        result
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nobody has what is in it any more.
        unsafe { pg_sys::MemoryContextDelete(self.0) };
    }
}

impl Tenant {
    fn note_end(&mut self) {
        use BackgroundWorkerStatus::*;
        if let Tenant::Served { worker, .. } = self
            && matches!(worker.pid(), Err(Stopped | PostmasterDied))
        {
            *self = Tenant::Unserved(Instant::now());
        }
    }

    /// Asks the worker of a database that accepts no connections any more to end. Until it has, it is known:
    /// else another would come beside it where the database accepts them again.
    fn leaves(&self) -> bool {
        let Tenant::Served { worker, .. } = self else { return false };
        if let Ok(pid) = worker.pid() {
            // SAFETY: a signal to a process of ours.
            unsafe { libc::kill(pid, libc::SIGTERM) };
        }
        true
    }

    fn is_due(&self) -> bool {
        matches!(self, Tenant::Unserved(since) if since.elapsed() > RESTART_AFTER)
    }
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn litellm_spend_launcher(_argument: pg_sys::Datum) {
    attach_signals();
    LAUNCHES.get().fetch_add(1, Ordering::Relaxed);
    service::launched();
    BackgroundWorker::connect_worker_to_spi(None, None);
    pin_settings();
    let mut tenants: HashMap<u32, Tenant> = HashMap::new();
    // Databases for whose worker there was no slot, and when that was said; of 0, that they could not be
    // read.
    let mut noted = HashMap::new();
    let mut announcements = ANNOUNCEMENTS.get().load(Ordering::Relaxed);
    let mut searched: Option<Instant> = None;
    // Whether the last search ended for want of a slot.
    let mut unfinished = false;
    loop {
        reload_settings();
        let announced = ANNOUNCEMENTS.get().load(Ordering::Relaxed);
        let mut interval = guc::discovery_interval();
        if unfinished {
            interval = interval.min(RESTART_AFTER);
        }
        let search = announced != announcements || searched.is_none_or(|at| at.elapsed() >= interval);
        tenants.values_mut().for_each(Tenant::note_end);
        let due = search || tenants.values().any(Tenant::is_due);
        // Where the table of locks is full, for instance, they are looked for again a second later.
        let found = due.then(databases).map(|found| {
            found.inspect_err(|failure| {
                if is_news(&mut noted, pg_sys::InvalidOid.to_u32()) {
                    log::failure("the databases could not be read", failure);
                }
            })
        });
        if let Some(Ok(databases)) = found {
            if search {
                (announcements, searched, unfinished) = (announced, Some(Instant::now()), false);
            }
            tenants.retain(|oid, tenant| databases.contains_key(oid) || tenant.leaves());
            let mut databases: Vec<_> = databases.into_iter().collect();
            // Those that lack a worker come first, whose last try is longest ago before the others: it may be
            // the last slot.
            databases.sort_by_key(|(oid, _)| match tenants.get(oid) {
                Some(Tenant::Unserved(since)) => (0, Some(*since)),
                None => (1, None),
                Some(_) => (2, None),
            });
            for (oid, name) in databases {
                let probe = match tenants.get(&oid) {
                    None => true,
                    Some(Tenant::Empty) => search,
                    Some(tenant) => tenant.is_due(),
                };
                // One after the other, so that databases without the extension never hold more than one slot.
                if !probe {
                    continue;
                }
                if let Some(tenant) = serve(oid) {
                    tenants.insert(oid, tenant);
                    continue;
                }
                // Nobody knows of one that is new whether it has the extension.
                let is_empty = matches!(tenants.get(&oid), None | Some(Tenant::Empty));
                if is_news(&mut noted, oid) {
                    let what = if is_empty { "to look for the extension in" } else { "for the worker of" };
                    log::now(format_args!("no slot {what} database \"{name}\"; raise max_worker_processes"));
                }
                if is_empty {
                    unfinished = true;
                    break;
                }
                tenants.insert(oid, Tenant::Unserved(Instant::now()));
            }
        }
        give_way::look();
        if !BackgroundWorker::wait_latch(Some(LOOK_INTERVAL)) {
            return;
        }
        pgrx::check_for_interrupts!();
    }
}

/// Whether to say what is tried again every few seconds: once an hour.
fn is_news(noted: &mut HashMap<u32, Instant>, database: u32) -> bool {
    let is_news = noted.get(&database).is_none_or(|at| at.elapsed() > NOTED_FOR);
    if is_news {
        noted.insert(database, Instant::now());
    }
    is_news
}

/// Starts a worker in a database and waits until it has found the extension there, or has left. `None`: there
/// is no slot.
fn serve(database: u32) -> Option<Tenant> {
    let found = FOUND.get().load(Ordering::Relaxed);
    let found_none = FOUND_NONE.get().load(Ordering::Relaxed);
    let memory = Memory::new();
    let builder = BackgroundWorkerBuilder::new("litellm_spend worker")
        .set_type("litellm_spend worker")
        .set_library(LIBRARY)
        .set_function("litellm_spend_worker")
        .enable_spi_access()
        .set_argument(pg_sys::Oid::from(database).into_datum())
        // SAFETY: reads this process's pid.
        .set_notify_pid(unsafe { pg_sys::MyProcPid })
        .set_restart_time(None);
    let worker = memory.within(|| builder.load_dynamic()).ok()?;
    let (started, mut looked) = (Instant::now(), Instant::now());
    while started.elapsed() < PROBE_LIMIT {
        if looked.elapsed() > LOOK_INTERVAL {
            give_way::look();
            looked = Instant::now();
        }
        if FOUND.get().load(Ordering::Relaxed) != found {
            break;
        }
        if matches!(worker.pid(), Err(BackgroundWorkerStatus::Stopped)) {
            return Some(match FOUND_NONE.get().load(Ordering::Relaxed) == found_none {
                true => Tenant::Unserved(Instant::now()),
                false => Tenant::Empty,
            });
        }
        if !BackgroundWorker::wait_latch(Some(Duration::from_millis(5))) {
            break;
        }
        pgrx::check_for_interrupts!();
    }
    Some(Tenant::Served { worker, _memory: memory })
}

/// The limit of connections by which the server marks what an interrupted DROP DATABASE has left.
const HALF_DROPPED: i32 = -2;

/// The databases that accept connections, by Oid. The launcher has no database, so this scans the shared
/// catalog itself.
fn databases() -> std::result::Result<BTreeMap<u32, String>, Failure> {
    let read = || {
        let mut found = BTreeMap::new();
        // SAFETY: an ordinary scan of a shared catalog inside a transaction; the tuple is read before the
        // next call.
        unsafe {
            let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
            let relation = pg_sys::table_open(pg_sys::DatabaseRelationId, lock);
            let scan = pg_sys::table_beginscan_catalog(relation, 0, std::ptr::null_mut());
            loop {
                let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
                if tuple.is_null() {
                    break;
                }
                let database = pg_sys::GETSTRUCT(tuple) as pg_sys::Form_pg_database;
                if (*database).datallowconn && (*database).datconnlimit != HALF_DROPPED {
                    let name =
                        CStr::from_ptr((*database).datname.data.as_ptr()).to_string_lossy().into_owned();
                    found.insert((*database).oid.to_u32(), name);
                }
            }
            pg_sys::heap_endscan(scan);
            pg_sys::table_close(relation, lock);
        }
        Ok(found)
    };
    in_transaction(|| attempt(read))
}

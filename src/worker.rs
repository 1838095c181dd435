//! Background workers: a launcher, and one worker in each database that has the extension.
//!
//! The launcher is connected to no database. It starts a worker in one database after the other; a worker that finds no
//! extension there leaves at once. It looks again when CREATE EXTENSION commits anywhere, when a worker has ended, and every
//! `litellm_spend.discovery_interval`. Neither runs on a standby; promotion starts them.
//!
//! A worker is connected to its database and would keep it from being dropped, renamed or copied: the utility hook
//! ends it first.

use crate::catalog::{self, Elevated, Patience, attempt};
use crate::error::Result;
use crate::guc;
use crate::tick::{self, Runner, Subject};
use pgrx::bgworkers::*;
use pgrx::prelude::*;
use pgrx::{PgAtomic, PgXactCallbackEvent, pg_shmem_init, register_xact_callback};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const LIBRARY: &str = "litellm_spend";

/// Raised when a database may have got the extension.
// SAFETY: used only after _PG_init has set it up in the postmaster.
static ANNOUNCEMENTS: PgAtomic<AtomicU32> = unsafe { PgAtomic::new(c"litellm_spend announcements") };

/// Counts the workers that found the extension in their database.
// SAFETY: as above.
static FOUND: PgAtomic<AtomicU32> = unsafe { PgAtomic::new(c"litellm_spend workers") };

/// Sets the workers up. Called from _PG_init, in the postmaster, when the library is preloaded.
pub fn register() {
    pg_shmem_init!(ANNOUNCEMENTS);
    pg_shmem_init!(FOUND);
    hook::install();
    BackgroundWorkerBuilder::new("litellm_spend launcher")
        .set_type("litellm_spend launcher")
        .set_library(LIBRARY)
        .set_function("litellm_spend_launcher")
        .enable_spi_access()
        .set_start_time(BgWorkerStartTime::RecoveryFinished)
        .set_restart_time(Some(Duration::from_secs(5)))
        .load();
}

// ---- launcher --------------------------------------------------------------------------------------------

/// How long a worker that had work stays away after it ended. Long enough for DROP DATABASE.
const RESTART_AFTER: Duration = Duration::from_secs(5);

/// How long the launcher waits for a new worker to say whether it found the extension.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// What the launcher knows of a database.
enum Tenant {
    /// It has no extension, as far as a worker could see.
    Empty,
    Served(DynamicBackgroundWorker),
    /// Its worker ended, or could not be started.
    Unserved(Instant),
}

impl Tenant {
    fn note_end(&mut self) {
        use BackgroundWorkerStatus::*;
        if let Tenant::Served(worker) = self
            && matches!(worker.pid(), Err(Stopped | PostmasterDied))
        {
            *self = Tenant::Unserved(Instant::now());
        }
    }

    fn is_due(&self) -> bool {
        matches!(self, Tenant::Unserved(since) if since.elapsed() > RESTART_AFTER)
    }
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn litellm_spend_launcher(_argument: pg_sys::Datum) {
    attach_signals();
    BackgroundWorker::connect_worker_to_spi(None, None);
    let mut tenants: HashMap<u32, Tenant> = HashMap::new();
    let mut announcements = ANNOUNCEMENTS.get().load(Ordering::Relaxed);
    let mut searched: Option<Instant> = None;
    loop {
        reload_settings();
        let announced = ANNOUNCEMENTS.get().load(Ordering::Relaxed);
        let search =
            announced != announcements || searched.is_none_or(|at| at.elapsed() >= guc::discovery_interval());
        if search {
            announcements = announced;
            searched = Some(Instant::now());
        }
        tenants.values_mut().for_each(Tenant::note_end);
        if search || tenants.values().any(Tenant::is_due) {
            let databases = databases();
            tenants.retain(|oid, _| databases.contains(oid));
            for oid in databases {
                let probe = match tenants.get(&oid) {
                    None => true,
                    Some(Tenant::Empty) => search,
                    Some(tenant) => tenant.is_due(),
                };
                // One after the other, so that databases without the extension never hold more than one slot.
                if probe {
                    tenants.insert(oid, serve(oid));
                }
            }
        }
        if !BackgroundWorker::wait_latch(Some(Duration::from_secs(1))) {
            return;
        }
        pgrx::check_for_interrupts!();
    }
}

/// Starts a worker in a database and waits until it has found the extension there, or has left.
fn serve(database: u32) -> Tenant {
    let found = FOUND.get().load(Ordering::Relaxed);
    let worker = BackgroundWorkerBuilder::new("litellm_spend worker")
        .set_type("litellm_spend worker")
        .set_library(LIBRARY)
        .set_function("litellm_spend_worker")
        .enable_spi_access()
        .set_argument(pg_sys::Oid::from(database).into_datum())
        // SAFETY: reads this process's pid.
        .set_notify_pid(unsafe { pg_sys::MyProcPid })
        .set_restart_time(None)
        .load_dynamic();
    let Ok(worker) = worker else {
        log!("litellm_spend: no slot for the worker of database {database}; raise max_worker_processes");
        return Tenant::Unserved(Instant::now());
    };
    let started = Instant::now();
    while started.elapsed() < PROBE_LIMIT {
        if FOUND.get().load(Ordering::Relaxed) != found {
            return Tenant::Served(worker);
        }
        if matches!(worker.pid(), Err(BackgroundWorkerStatus::Stopped)) {
            return Tenant::Empty;
        }
        if !BackgroundWorker::wait_latch(Some(Duration::from_millis(5))) {
            break;
        }
        pgrx::check_for_interrupts!();
    }
    Tenant::Served(worker)
}

/// The databases that accept connections. The launcher has no database, so this scans the shared catalog itself.
fn databases() -> Vec<u32> {
    let mut found = vec![];
    in_transaction(|| {
        // SAFETY: an ordinary scan of a shared catalog inside a transaction; the tuple is read before the next call.
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
                if (*database).datallowconn {
                    found.push((*database).oid.to_u32());
                }
            }
            pg_sys::heap_endscan(scan);
            pg_sys::table_close(relation, lock);
        }
    });
    found
}

// ---- worker ----------------------------------------------------------------------------------------------

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn litellm_spend_worker(argument: pg_sys::Datum) {
    attach_signals();
    // SAFETY: start_worker() passes an Oid.
    let database = unsafe { pg_sys::Oid::from_datum(argument, false) };
    BackgroundWorker::connect_worker_to_spi_by_oid(database, None);
    if in_transaction(extension_exists) {
        FOUND.get().fetch_add(1, Ordering::Relaxed);
    }
    let mut steps = Steps::default();
    let mut tidied = Instant::now();
    while in_transaction(extension_exists) {
        reload_settings();
        let round = tick::tick(&mut steps);
        if tidied.elapsed() > TIDY_INTERVAL {
            tick::tidy(&mut steps);
            tidied = Instant::now();
        }
        report_idle();
        if !round.more && !BackgroundWorker::wait_latch(Some(guc::merge_interval())) {
            return;
        }
        pgrx::check_for_interrupts!();
    }
}

const TIDY_INTERVAL: Duration = Duration::from_secs(60);

fn extension_exists() -> bool {
    let sql = "SELECT EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'litellm_spend')";
    Spi::get_one(sql).ok().flatten().unwrap_or(false)
}

/// Runs each step in its own transaction. After a failure its subject is left alone, for longer each time.
#[derive(Default)]
struct Steps {
    resting: HashMap<Subject, (Instant, Duration)>,
}

const SHORTEST_REST: Duration = Duration::from_millis(500);
const LONGEST_REST: Duration = Duration::from_secs(60);

impl Runner for Steps {
    fn step<T>(&mut self, subject: Subject, work: impl FnOnce() -> Result<T>) -> Option<T> {
        if self.resting.get(&subject).is_some_and(|(until, _)| Instant::now() < *until) {
            return None;
        }
        let outcome = in_transaction(|| {
            let outcome = attempt(|| {
                let _owner = Elevated::enter()?;
                work()
            });
            if let Err(failure) = &outcome
                && let Err(second) = attempt(|| tick::record(&subject, failure))
            {
                log!("litellm_spend: could not record a failure: {}", second.message);
            }
            outcome
        });
        match outcome {
            Ok(value) => {
                self.resting.remove(&subject);
                Some(value)
            }
            Err(failure) => {
                let rest = self
                    .resting
                    .get(&subject)
                    .map_or(SHORTEST_REST, |(_, rest)| (*rest * 2).min(LONGEST_REST));
                log!("litellm_spend: {subject:?} failed, next try in {rest:?}: {}", failure.message);
                self.resting.insert(subject, (Instant::now() + jittered(rest), rest));
                None
            }
        }
    }

    fn patience(&self) -> Patience {
        Patience::None
    }
}

/// Between three quarters and all of `rest`, so that the workers of a server do not try in step.
fn jittered(rest: Duration) -> Duration {
    let nanos =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.subsec_nanos());
    rest - rest.mul_f64(f64::from(nanos % 1000) / 4000.0)
}

// ---- what both need --------------------------------------------------------------------------------------

/// SIGTERM ends a worker at the next interrupt check, in the middle of a statement if need be; SIGHUP sets a flag.
fn attach_signals() {
    // SAFETY: before the signals are unblocked.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        pg_sys::pqsignal(pg_sys::SIGTERM as i32, Some(on_sigterm));
        #[cfg(feature = "pg18")]
        pg_sys::pqsignal_be(pg_sys::SIGTERM as i32, Some(on_sigterm));
    }
    BackgroundWorker::attach_signal_handlers(SignalWakeFlags::SIGHUP);
}

/// What the server's `die` does; pgrx's own handler would not interrupt a statement.
unsafe extern "C-unwind" fn on_sigterm(_signal: i32) {
    // SAFETY: flags that are made for signal handlers.
    unsafe {
        (&raw mut pg_sys::InterruptPending).write_volatile(1);
        (&raw mut pg_sys::ProcDiePending).write_volatile(1);
        pg_sys::SetLatch(pg_sys::MyLatch);
    }
}

/// pgrx's handler only sets a flag; reading the file is up to us.
fn reload_settings() {
    if BackgroundWorker::sighup_received() {
        // SAFETY: outside of any transaction, as in every process that reloads.
        unsafe { pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP) };
    }
}

fn in_transaction<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: the frame that PostgreSQL's own workers use. An error that `work` lets through ends the process.
    unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        let result = work();
        pg_sys::PopActiveSnapshot();
        pg_sys::CommitTransactionCommand();
        result
    }
}

/// Sends the counts that autovacuum goes by, which a worker has to do itself.
fn report_idle() {
    // SAFETY: outside of a transaction.
    unsafe {
        pg_sys::pgstat_report_stat(false);
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_IDLE, std::ptr::null());
    }
}

/// Tells the launcher, once the transaction has committed, that this database may have the extension.
pub fn announce() {
    register_xact_callback(PgXactCallbackEvent::Commit, || {
        ANNOUNCEMENTS.get().fetch_add(1, Ordering::Relaxed);
    });
}

/// The utility hook: CREATE EXTENSION is announced; a worker leaves a database that is to be dropped, renamed, moved
/// or copied.
mod hook {
    use super::*;
    use std::ffi::{CStr, c_char};

    static mut PREVIOUS: pg_sys::ProcessUtility_hook_type = None;

    pub fn install() {
        // SAFETY: in the postmaster, before there is any other process or thread.
        unsafe {
            PREVIOUS = pg_sys::ProcessUtility_hook;
            pg_sys::ProcessUtility_hook = Some(on_utility);
        }
    }

    // Not pgrx's binding and no #[pg_guard]: an error of the statement passes here untouched, as if we were not
    // there. That is a longjmp over this frame, which therefore owns nothing.
    unsafe extern "C-unwind" {
        fn standard_ProcessUtility(
            statement: *mut pg_sys::PlannedStmt,
            text: *const c_char,
            read_only_tree: bool,
            context: pg_sys::ProcessUtilityContext::Type,
            parameters: pg_sys::ParamListInfo,
            environment: *mut pg_sys::QueryEnvironment,
            receiver: *mut pg_sys::DestReceiver,
            completion: *mut pg_sys::QueryCompletion,
        );
    }

    #[allow(clippy::too_many_arguments)]
    unsafe extern "C-unwind" fn on_utility(
        statement: *mut pg_sys::PlannedStmt,
        text: *const c_char,
        read_only_tree: bool,
        context: pg_sys::ProcessUtilityContext::Type,
        parameters: pg_sys::ParamListInfo,
        environment: *mut pg_sys::QueryEnvironment,
        receiver: *mut pg_sys::DestReceiver,
        completion: *mut pg_sys::QueryCompletion,
    ) {
        // SAFETY: the server's own arguments, passed on unchanged.
        unsafe {
            on_statement((*statement).utilityStmt);
            let next = PREVIOUS.unwrap_or(standard_ProcessUtility);
            next(statement, text, read_only_tree, context, parameters, environment, receiver, completion);
        }
    }

    #[pg_guard]
    unsafe extern "C-unwind" fn on_statement(node: *mut pg_sys::Node) {
        unsafe { look(node) }
    }

    /// SAFETY: `node` is a utility statement; its tag says which.
    unsafe fn look(node: *mut pg_sys::Node) {
        use pg_sys::NodeTag::*;
        unsafe {
            match (*node).type_ {
                T_CreateExtensionStmt => {
                    let statement = node as *mut pg_sys::CreateExtensionStmt;
                    if CStr::from_ptr((*statement).extname).to_bytes() == b"litellm_spend" {
                        announce();
                    }
                }
                T_DropdbStmt => end_worker((*(node as *mut pg_sys::DropdbStmt)).dbname),
                T_RenameStmt => {
                    let statement = node as *mut pg_sys::RenameStmt;
                    if (*statement).renameType == pg_sys::ObjectType::OBJECT_DATABASE {
                        end_worker((*statement).subname);
                    }
                }
                T_AlterDatabaseStmt => end_worker((*(node as *mut pg_sys::AlterDatabaseStmt)).dbname),
                T_CreatedbStmt => end_worker_of_template(node as *mut pg_sys::CreatedbStmt),
                _ => {}
            }
        }
    }

    unsafe fn end_worker_of_template(statement: *mut pg_sys::CreatedbStmt) {
        unsafe {
            let options = (*statement).options;
            let count = if options.is_null() { 0 } else { (*options).length as usize };
            for i in 0..count {
                let option = (*(*options).elements.add(i)).ptr_value as *mut pg_sys::DefElem;
                let is_template = CStr::from_ptr((*option).defname).to_bytes() == b"template";
                if is_template && !(*option).arg.is_null() {
                    end_worker(pg_sys::defGetString(option));
                }
            }
        }
    }

    /// Asks the worker of a database to end, if the caller owns the database; the statement itself waits for it.
    unsafe fn end_worker(database: *const c_char) {
        if database.is_null() {
            return;
        }
        let name = unsafe { CStr::from_ptr(database) }.to_string_lossy().into_owned();
        // SAFETY: the statement runs in a transaction, but without a snapshot.
        unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot()) };
        let pids = worker_pids(&name);
        unsafe { pg_sys::PopActiveSnapshot() };
        for pid in pids.unwrap_or_default() {
            // SAFETY: a signal to a process of this server. pg_terminate_backend() would refuse a database owner.
            unsafe { libc::kill(pid, libc::SIGTERM) };
        }
    }

    fn worker_pids(database: &str) -> Result<Vec<i32>> {
        let owned = catalog::query(
            "SELECT FROM pg_catalog.pg_database WHERE datname = $1 AND pg_catalog.pg_has_role(datdba, 'USAGE')",
            &[database.into()],
            |_| Ok(()),
        )?;
        if owned.is_empty() {
            return Ok(vec![]);
        }
        // Only a superuser sees what kind of process another's is.
        let _superuser = Elevated::as_user(pg_sys::Oid::from(pg_sys::BOOTSTRAP_SUPERUSERID));
        catalog::query(
            "SELECT pid FROM pg_catalog.pg_stat_activity
             WHERE datname = $1 AND backend_type = 'litellm_spend worker'",
            &[database.into()],
            |r| catalog::value(r, 1),
        )
    }
}

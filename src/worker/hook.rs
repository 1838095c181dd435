//! The utility hook: CREATE EXTENSION is announced to the launcher; a worker leaves a database that is to be
//! dropped, renamed, moved or copied, which its connection would prevent; CASCADE is kept from taking
//! LiteLLM's views along; and capture makes way for a foreign partition in the statement that brings it.

use crate::error::{Error, Result};
use crate::guc;
use crate::litellm::triggers;
use crate::server::hint;
use crate::server::parse::{nodes, text};
use crate::server::relation;
use crate::server::session::{Elevated, Failure, attempt, callable, tell};
use crate::server::spi;
use crate::server::text::{EXTENSION, qualified};
use crate::worker::launcher::announce;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use std::ffi::{CStr, c_char};
use std::time::{Duration, Instant};

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
        on_statement((*statement).utilityStmt, context);
        let may_bring_foreign_partition = may_bring_foreign_partition((*statement).utilityStmt);
        let next = PREVIOUS.unwrap_or(standard_ProcessUtility);
        next(statement, text, read_only_tree, context, parameters, environment, receiver, completion);
        if may_bring_foreign_partition {
            make_way();
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_statement(
    node: *mut pg_sys::Node,
    context: pg_sys::ProcessUtilityContext::Type,
) {
    unsafe { look(node, context == pg_sys::ProcessUtilityContext::PROCESS_UTILITY_TOPLEVEL) }
}

/// # Safety
/// `node` is a utility statement; its tag says which.
unsafe fn look(node: *mut pg_sys::Node, top_level: bool) {
    use pg_sys::NodeTag::*;
    // The server refuses most statements about a database there.
    // SAFETY: reads state of the transaction.
    let in_block = || unsafe { pg_sys::IsInTransactionBlock(top_level) };
    unsafe {
        match (*node).type_ {
            T_CreateExtensionStmt => {
                let statement = node as *mut pg_sys::CreateExtensionStmt;
                if CStr::from_ptr((*statement).extname).to_bytes() == b"litellm_spend" {
                    announce();
                }
            }
            T_DropdbStmt if !in_block() => {
                let statement = &*(node as *mut pg_sys::DropdbStmt);
                // Its only option is FORCE.
                let wanted = if statement.options.is_null() { Use::Change } else { Use::Force };
                end_worker(statement.dbname, wanted)
            }
            T_RenameStmt => {
                let statement = node as *mut pg_sys::RenameStmt;
                if (*statement).renameType == pg_sys::ObjectType::OBJECT_DATABASE {
                    end_worker((*statement).subname, Use::Change);
                }
            }
            T_AlterDatabaseStmt => {
                let statement = &*(node as *mut pg_sys::AlterDatabaseStmt);
                if nodes(statement.options).into_iter().any(|option| closes(option.cast(), in_block())) {
                    end_worker(statement.dbname, Use::Change);
                }
            }
            T_DropStmt => {
                let statement = &*(node as *mut pg_sys::DropStmt);
                let names = || nodes(statement.objects).into_iter().filter_map(|name| text(name)).collect();
                let cascades = statement.behavior == pg_sys::DropBehavior::DROP_CASCADE;
                match statement.removeType {
                    pg_sys::ObjectType::OBJECT_EXTENSION if cascades => {
                        keep_views(Dropped::Extensions(names()))
                    }
                    pg_sys::ObjectType::OBJECT_SCHEMA if cascades => keep_views(Dropped::Schemas(names())),
                    pg_sys::ObjectType::OBJECT_EXTENSION => learn_schema(names()),
                    _ => {}
                }
            }
            T_DropOwnedStmt => {
                let statement = &*(node as *mut pg_sys::DropOwnedStmt);
                if statement.behavior == pg_sys::DropBehavior::DROP_CASCADE {
                    keep_views(Dropped::OwnedBy(statement.roles));
                }
            }
            T_CreatedbStmt if !in_block() => end_worker_of_template(node as *mut pg_sys::CreatedbStmt),
            _ => {}
        }
    }
}

/// CREATE FOREIGN TABLE … PARTITION OF or INHERITS, ALTER TABLE … ATTACH PARTITION or INHERIT.
///
/// # Safety
/// `node` is a utility statement; its tag says which.
unsafe fn may_bring_foreign_partition(node: *mut pg_sys::Node) -> bool {
    use pg_sys::AlterTableType::{AT_AddInherit, AT_AttachPartition};
    use pg_sys::NodeTag::{T_AlterTableStmt, T_CreateForeignTableStmt};
    unsafe {
        match (*node).type_ {
            T_CreateForeignTableStmt => {
                !(*(node as *mut pg_sys::CreateForeignTableStmt)).base.inhRelations.is_null()
            }
            T_AlterTableStmt => {
                nodes((*(node as *mut pg_sys::AlterTableStmt)).cmds).into_iter().any(|command| {
                    let subtype = (*(command as *mut pg_sys::AlterTableCmd)).subtype;
                    [AT_AddInherit, AT_AttachPartition].contains(&subtype)
                })
            }
            _ => false,
        }
    }
}

/// Whatever goes wrong here, the statement succeeds; the watch comes later.
#[pg_guard]
unsafe extern "C-unwind" fn make_way() {
    // SAFETY: the statement has ended, in its transaction; what it did is to be seen.
    let outcome = unsafe {
        if pg_sys::get_extension_oid(c"litellm_spend".as_ptr(), true) == pg_sys::InvalidOid {
            return;
        }
        pg_sys::CommandCounterIncrement();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        let outcome = attempt(|| {
            let _ours = Elevated::enter()?.impatient(guc::lock_timeout().time);
            triggers::silence_failing()
        });
        pg_sys::PopActiveSnapshot();
        outcome
    };
    if let Err(failure) = outcome {
        let message = format!(
            "litellm_spend could not look for foreign partitions: {}",
            failure.unless_cancel().message
        );
        let warning = ErrorReport::new(PgSqlErrorCode::ERRCODE_WARNING, message, "make_way")
            .set_hint(callable(
            "Statements that reach rows of one fail until spend_rollup_run(), or the worker, has seen it."
                .into(),
        ));
        tell(PgLogLevel::WARNING, warning);
    }
}

/// Whether an option of ALTER DATABASE needs the database empty, as a move to another tablespace does, or has
/// nobody connect to it any more.
unsafe fn closes(option: *mut pg_sys::DefElem, in_block: bool) -> bool {
    unsafe {
        match CStr::from_ptr((*option).defname).to_bytes() {
            b"tablespace" => !in_block,
            b"allow_connections" => !(*option).arg.is_null() && !pg_sys::defGetBoolean(option),
            _ => false,
        }
    }
}

unsafe fn end_worker_of_template(statement: *mut pg_sys::CreatedbStmt) {
    unsafe {
        let mut named = false;
        for option in nodes((*statement).options) {
            let option = option as *mut pg_sys::DefElem;
            let is_template = CStr::from_ptr((*option).defname).to_bytes() == b"template";
            if is_template && !(*option).arg.is_null() {
                end_worker(pg_sys::defGetString(option), Use::Copy);
                named = true;
            }
        }
        if !named {
            end_worker(c"template1".as_ptr(), Use::Copy);
        }
    }
}

/// What a statement drops with all that depends on it.
enum Dropped {
    Extensions(Vec<String>),
    Schemas(Vec<String>),
    OwnedBy(*mut pg_sys::List),
}

/// Looks something up for a statement that has not begun.
fn look_up<T>(work: impl FnOnce() -> Result<T>) -> std::result::Result<T, Failure> {
    // SAFETY: the statement runs in a transaction, but without a snapshot.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot()) };
    let found = attempt(work);
    unsafe { pg_sys::PopActiveSnapshot() };
    found
}

/// Looks the schema of our functions up for the HINT, should the server refuse to drop the extension.
fn learn_schema(extensions: Vec<String>) {
    if extensions.iter().all(|name| name != EXTENSION) {
        return;
    }
    let schema = look_up(|| {
        let _ourselves = Elevated::superuser();
        relation::extension_schema(EXTENSION)
    });
    hint::learn_schema(schema.map_err(Failure::unless_cancel).ok().flatten());
}

/// Refuses to drop the extension from under LiteLLM's views. What is to be asked may be broken, as the
/// installation that somebody wants to get rid of: then nothing is refused.
fn keep_views(dropped: Dropped) {
    let refusal = look_up(|| {
        let table = attached_to_what_stays(&dropped)?;
        // Its HINT looks for the schema of our functions.
        let _ourselves = Elevated::superuser();
        Ok(table.map(|table| ErrorReport::from(Error::StillAttached(table))))
    });
    match refusal {
        Ok(Some(refusal)) => refusal.report(PgLogLevel::ERROR),
        Ok(None) => {}
        Err(failure) => drop(failure.unless_cancel()),
    }
}

/// The attached table, if the extension is dropped and its schema, or owner, is not. An error: there is no
/// extension here.
fn attached_to_what_stays(dropped: &Dropped) -> Result<Option<String>> {
    match dropped {
        Dropped::Extensions(names) if names.iter().all(|name| name != EXTENSION) => return Ok(None),
        _ => {}
    }
    // Asked as the session: CURRENT_USER is whoever acts.
    let roles = match dropped {
        Dropped::OwnedBy(roles) => oids(*roles),
        _ => vec![],
    };
    let _ourselves = Elevated::enter()?.impatient(guc::lock_timeout().time);
    let sql = "SELECT c.table_schema::text, c.table_name::text, n.nspname::text, e.extowner,
                (SELECT relowner FROM pg_catalog.pg_class WHERE oid = c.relation)
         FROM litellm_spend.capture c, pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n
             ON n.oid = e.extnamespace
         WHERE e.extname = 'litellm_spend'";
    let found = spi::query(sql, &[], |r| {
        let (schema, table) = (spi::value::<String>(r, 1)?, spi::value::<String>(r, 2)?);
        let goes = match dropped {
            Dropped::Extensions(_) => true,
            Dropped::Schemas(names) => names.contains(&spi::value(r, 3)?) && !names.contains(&schema),
            Dropped::OwnedBy(_) => {
                let stays = r.get::<pg_sys::Oid>(5)?.is_none_or(|owner| !roles.contains(&owner));
                roles.contains(&spi::value(r, 4)?) && stays
            }
        };
        Ok(goes.then(|| qualified(&schema, &table)))
    })?;
    Ok(found.into_iter().flatten().next())
}

/// The roles that a statement names.
fn oids(roles: *mut pg_sys::List) -> Vec<pg_sys::Oid> {
    // SAFETY: a list of RoleSpec, of which the server makes one of OIDs, or fails.
    unsafe {
        let list = pg_sys::roleSpecsToIds(roles);
        let count = list.as_ref().map_or(0, |list| list.length as usize);
        (0..count).map(|i| (*(*list).elements.add(i)).oid_value).collect()
    }
}

/// What somebody wants a database for who needs it empty.
#[derive(Clone, Copy, PartialEq)]
enum Use {
    Change,
    /// And ends all who are connected, which fails where the caller may not end one of them.
    Force,
    Copy,
}

/// How long who ends all sessions of a database is kept for our processes to end before that.
const ENDING: Duration = Duration::from_secs(2);

/// Asks the worker of a database to end, if the caller may do that with it; the statement itself waits for
/// the worker. Not so with FORCE, by which only a superuser may end a process that has no role: we wait here.
unsafe fn end_worker(database: *const c_char, wanted: Use) {
    if database.is_null() {
        return;
    }
    let name = unsafe { CStr::from_ptr(database) }.to_string_lossy().into_owned();
    // SAFETY: the statement runs in a transaction, but without a snapshot.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot()) };
    let pids = worker_pids(&name, wanted);
    unsafe { pg_sys::PopActiveSnapshot() };
    let mut pids = pids.unwrap_or_default();
    // SAFETY: signals to processes of this server. pg_terminate_backend() would refuse a database owner.
    let signal = |pid, signal| unsafe { libc::kill(pid, signal) == 0 };
    pids.retain(|pid| signal(*pid, libc::SIGTERM));
    let started = Instant::now();
    while wanted == Use::Force && pids.iter().any(|pid| signal(*pid, 0)) && started.elapsed() < ENDING {
        pgrx::check_for_interrupts!();
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// We run in every database of the server, whoever owns it, with or without the extension: not even the first
/// query may look anything up on the session's own path. And only a superuser sees what kind of process
/// another's is.
fn worker_pids(database: &str, wanted: Use) -> Result<Vec<i32>> {
    let superuser = Elevated::superuser();
    let may = spi::query(
        "SELECT FROM pg_catalog.pg_database d, pg_catalog.pg_roles r
         WHERE d.datname = $1 AND r.oid = $2 AND CASE
             WHEN $3 THEN (r.rolcreatedb OR r.rolsuper)
                 AND (d.datistemplate OR pg_catalog.pg_has_role(r.oid, d.datdba, 'USAGE'))
             ELSE pg_catalog.pg_has_role(r.oid, d.datdba, 'USAGE') END",
        &[database.into(), superuser.caller().into(), (wanted == Use::Copy).into()],
        |_| Ok(()),
    )?;
    if may.is_empty() {
        return Ok(vec![]);
    }
    spi::query(
        "SELECT pid FROM pg_catalog.pg_stat_activity
         WHERE datname = $1 AND backend_type IN ('litellm_spend worker', 'litellm_spend builder')",
        &[database.into()],
        |r| spi::value(r, 1),
    )
}

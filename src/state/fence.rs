//! Locks on our own state.
//!
//! | lock | on | who waits |
//! |---|---|---|
//! | [`Fence`] | a rollup's state row, FOR UPDATE | other mergers and rebuilds; readers never |
//! | [`lock_attachment`] | our table `capture`, SHARE ROW EXCLUSIVE | others that attach, detach, switch views |
//! | [`lock_name`] | a rollup's name and source, as numbers | who makes or drops one of that name or source |
//! | [`lock_notes_of`] | rows about a table, FOR UPDATE | who changes what is noted of it |
//! | [`keep_marker`] | our table `installation`, ROW SHARE | who makes or drops the marker of restores |
//! | [`change_marker`] | the same, EXCLUSIVE | who makes or drops it, or keeps it |

use crate::error::{Error, Result};
use crate::guc::LockLimit;
use crate::server::locks::{Mode, Patience, holders, lock_all, lock_within, try_lock};
use crate::server::relation::{find_relation, relation_name, revocations, revocations_of_function};
use crate::server::session::{Elevated, Owner, require_read_committed};
use crate::server::spi::{Found, exists, fresh, kept, run, take_xid, value};
use crate::server::text::{SCHEMA, qualified};
use crate::state::definition::Definition;
use crate::state::rollups::rollup_names;
use crate::state::sources::CHANGE_LOG;
use pgrx::datum::Timestamp;
use pgrx::prelude::*;
use pgrx::spi::SpiHeapTupleData;
use std::cell::RefCell;
use std::collections::BTreeSet;

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
    /// Who owned its source when it was declared or last followed; of one that is filled by hand, who owns
    /// the source.
    pub owner: pg_sys::Oid,
    source_owner: pg_sys::Oid,
    pub watermark: i64,
    pub covered_from: Timestamp,
    _work: Option<Work>,
}

/// Work of this session on a rollup, or on a table's maintenance. The row's lock keeps other transactions
/// out, but not what a step itself calls: a trigger on the rollup's table that merges it again would count
/// its window twice.
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

impl Fence {
    /// Takes the fence of rollup `name`; `None` when another transaction keeps it.
    pub fn take(name: &str, patience: Patience) -> Result<Option<Fence>> {
        require_read_committed()?;
        let Some(work) = Work::begin(name) else { return Ok(None) };
        loop {
            let sql = format!("{} FOR UPDATE OF r SKIP LOCKED", Fence::STATE);
            if let Some(fence) = fresh(&sql, &[name.into()], |r| Fence::read(name, r)).one()? {
                return Ok(Some(Fence { _work: Some(work), ..fence }));
            }
            if !exists("SELECT FROM litellm_spend.rollup WHERE name = $1", &[name.into()])? {
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

    /// Takes the fence as soon as its holder ends, or fails at the caller's own lock_timeout: windows belong
    /// to one transaction after the other, each as long as its caller likes.
    pub fn wait(name: &str) -> Result<Fence> {
        // Asked before: after a failure the transaction can only be rolled back.
        let kept = kept_by(&[name.into()])?;
        let busy = || {
            let (rollup, holders) = kept.clone();
            Error::RollupBusy { rollup, holders }
        };
        let Some(work) = Work::begin(name) else { return Err(busy()) };
        let sql = format!("{} FOR UPDATE OF r", Fence::STATE);
        let fences = PgTryBuilder::new(std::panic::AssertUnwindSafe(|| {
            fresh(&sql, &[name.into()], |r| Fence::read(name, r))
        }))
        .catch_when(PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE, |_| Err(busy()))
        .execute()?;
        let fence = fences.into_iter().next().ok_or_else(|| Error::NoRollup(name.into()))?;
        Ok(Fence { _work: Some(work), ..fence })
    }

    /// As [`Fence::take`], or fails and says who keeps it.
    pub fn require(name: &str, patience: Patience) -> Result<Fence> {
        Fence::take(name, patience)?.map_or_else(|| Err(busy(&[name.into()])?), Ok)
    }

    /// As [`Fence::take_all`], or fails and says who keeps one.
    pub fn require_all(source: &str, patience: Patience) -> Result<Vec<Fence>> {
        Fence::take_all(source, patience)?.map_or_else(|| Err(busy(&rollup_names(Some(source))?)?), Ok)
    }

    /// Only looks at it, on the transaction's snapshot: the holder may not change anything.
    pub fn look(name: &str) -> Result<Fence> {
        let state = kept(Fence::STATE, &[name.into()], |r| Fence::read(name, r)).one()?;
        state.ok_or_else(|| Error::NoRollup(name.into()))
    }

    const STATE: &str = "SELECT r.definition::text, r.source, coalesce(s.relation, 0::oid)::oid, r.watermark,
             r.covered_from,
                coalesce(r.owner::oid,
                         (SELECT c.relowner FROM pg_catalog.pg_class c WHERE c.oid = s.relation), 0::oid),
                coalesce((SELECT c.relowner FROM pg_catalog.pg_class c WHERE c.oid = s.relation), 0::oid)
         FROM litellm_spend.rollup r LEFT JOIN litellm_spend.source s ON s.name = r.source
         WHERE r.name = $1";

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

    /// With the rights that its own statements run with, until the guard is dropped: the owner's, or ours if
    /// everything that they mention is ours. Refused while its source is another's:
    /// [`crate::engine::follow::settle`] comes first.
    pub fn act(&self) -> Result<Option<Elevated>> {
        if self.is_built_in() {
            return Ok(None);
        }
        let (owner, of_source) = (Owner::role(self.owner), Owner::role(self.source_owner));
        if self.source_owner != pg_sys::InvalidOid && owner != of_source {
            return Err(owner.lost(relation_name(self.relation)?, of_source.name()?));
        }
        Ok(Some(owner.act()))
    }

    /// It is fed by the change log.
    pub fn is_built_in(&self) -> bool {
        self.source.as_deref() == Some(CHANGE_LOG)
    }

    /// Advances the watermark. The rollup's rows of the window are written in the same transaction; `counts`
    /// are the source rows and groups, where we know them. What is merged of a distributed rollup before that
    /// is committed on all nodes.
    pub fn advance(&self, end: i64, counts: Option<(Option<i64>, i64)>, ms: f64) -> Result<()> {
        run(
            "UPDATE litellm_spend.rollup SET watermark = $2,
                     committed_to = CASE WHEN committed_to IS NOT NULL THEN watermark END,
                     merged_at = clock_timestamp(), merged_rows = $3, merged_groups = $4, merged_ms = $5,
                     last_error = NULL, last_error_at = NULL
                 WHERE name = $1",
            &[
                self.name.as_str().into(),
                end.into(),
                counts.and_then(|c| c.0).into(),
                counts.map(|c| c.1).into(),
                ms.into(),
            ],
        )
    }

    /// Notes that a window was asked for and was empty, once in half an hour: `spend_health` has a row for a
    /// rollup of which nobody asks for an hour.
    pub fn note_call(&self) -> Result<()> {
        let sql = "UPDATE litellm_spend.rollup SET merged_at = clock_timestamp()
             WHERE name = $1 AND coalesce(merged_at, '-infinity') < clock_timestamp() - interval '30 minutes'";
        run(sql, &[self.name.as_str().into()])
    }

    /// Notes that all that is merged of a distributed rollup is committed on all nodes.
    pub fn note_committed(&self) -> Result<()> {
        let sql = "UPDATE litellm_spend.rollup SET committed_to = watermark WHERE name = $1";
        run(sql, &[self.name.as_str().into()])
    }
}

/// That another transaction keeps one of these rollups, and whose it is.
fn busy(names: &[String]) -> Result<Error> {
    let (rollup, holders) = kept_by(names)?;
    Ok(Error::RollupBusy { rollup, holders })
}

/// Which of these rollups another transaction keeps, and whose it is.
fn kept_by(names: &[String]) -> Result<(String, String)> {
    // Who locks a row, or changes it, leaves the transaction's number there.
    let kept = fresh(
        "SELECT r.name, r.xmax::text FROM litellm_spend.rollup r JOIN pg_catalog.pg_locks l
                 ON l.locktype = 'transactionid' AND l.granted AND l.transactionid = r.xmax
             WHERE r.name = ANY ($1) ORDER BY 1 LIMIT 1",
        &[names.to_vec().into()],
        |r| Ok((value::<String>(r, 1)?, value::<String>(r, 2)?)),
    )
    .one()?;
    let Some((rollup, transaction)) = kept else {
        return Ok((names.first().cloned().unwrap_or_default(), String::new()));
    };
    let which = "l.locktype = 'transactionid' AND l.transactionid = $1::xid";
    Ok((rollup, holders(which, &[transaction.into()])?))
}

/// The right to change what is attached: triggers, views, the state of the capture. Ends with the
/// transaction. What is read after it is current. `false`: another transaction keeps it.
pub fn lock_attachment(patience: Patience) -> Result<bool> {
    lock_state("capture", pg_sys::ShareRowExclusiveLock, patience)
}

/// As [`lock_attachment`], or fails and says who keeps it.
pub fn require_attachment(patience: Patience) -> Result<()> {
    if lock_attachment(patience)? {
        return Ok(());
    }
    let which = "l.locktype = 'relation' AND l.relation = 'litellm_spend.capture'::regclass
             AND l.mode NOT IN ('AccessShareLock', 'RowShareLock')";
    Err(Error::AttachmentBusy { holders: holders(which, &[])? })
}

/// The marker of restores stays until the transaction ends, or fails and says who changes it.
pub fn keep_marker(patience: Patience) -> Result<()> {
    lock_marker(pg_sys::RowShareLock, patience)
}

/// The right to make the marker, or to say whose it is, until the transaction ends; or fails and says who
/// needs it as it is.
pub fn change_marker(patience: Patience) -> Result<()> {
    lock_marker(pg_sys::ExclusiveLock, patience)
}

/// As [`change_marker`], to drop it. `false`: another transaction needs it, or changes it.
pub fn try_change_marker() -> Result<bool> {
    lock_state("installation", pg_sys::ExclusiveLock, Patience::None)
}

fn lock_marker(mode: Mode, patience: Patience) -> Result<()> {
    if lock_state("installation", mode, patience)? {
        return Ok(());
    }
    let which = "l.locktype = 'relation' AND l.relation = 'litellm_spend.installation'::regclass
             AND l.mode <> 'AccessShareLock'";
    Err(Error::MarkerBusy { holders: holders(which, &[])? })
}

/// Locks a table of ours until the transaction ends. `false`: another transaction keeps it.
fn lock_state(table: &str, mode: Mode, patience: Patience) -> Result<bool> {
    let name = format!("litellm_spend.{table}");
    let state = find_relation(&name)?.ok_or(Error::NoTable(name))?;
    while !try_lock(state, mode) {
        if !patience.try_again() {
            return Ok(false);
        }
    }
    take_xid()?;
    Ok(true)
}

/// The right to make or drop what is called `name` of `relation`, until the transaction ends. Nobody else
/// waits for it but who wants the same name or source.
pub fn lock_name(name: &str, relation: pg_sys::Oid) -> Result<()> {
    let patience = Patience::of_call();
    for (table, object) in [("source", relation.to_u32()), ("rollup", fnv(name))] {
        let class = format!("litellm_spend.{table}");
        let class = find_relation(&class)?.ok_or(Error::NoTable(class))?;
        let busy = |holders| Error::RollupBusy { rollup: name.into(), holders };
        lock_object(class, object.into(), patience, busy)?;
    }
    Ok(())
}

/// Grants or revokes what is ours. The statements themselves take no lock, and of two at once the server
/// would let the second fail when the first has committed: so nobody else does until the transaction ends.
pub fn grant(statement: &str) -> Result<()> {
    lock_grants()?;
    run(statement, &[])
}

/// Takes a table, sequence or view that was just made from everybody but its owner: ALTER DEFAULT PRIVILEGES
/// may have granted anything on it.
pub fn revoke_on_relation(name: &str) -> Result<()> {
    revocations(name)?.iter().try_for_each(|sql| grant(sql))
}

/// The same of a function, which PUBLIC may call unless somebody says otherwise.
pub fn revoke_on_function(signature: &str) -> Result<()> {
    revocations_of_function(signature)?.iter().try_for_each(|sql| grant(sql))
}

/// The right to [`grant`], before what is to be granted is made.
pub fn lock_grants() -> Result<()> {
    // SAFETY: looks a name up, or fails.
    let schema = unsafe { pg_sys::get_namespace_oid(c"litellm_spend".as_ptr(), false) };
    let busy = |holders| Error::GrantsBusy { holders };
    lock_object(pg_sys::NamespaceRelationId, schema, Patience::of_call(), busy)
}

fn lock_object(
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    patience: Patience,
    busy: impl Fn(String) -> Error,
) -> Result<()> {
    let mode = pg_sys::ExclusiveLock as i32;
    // SAFETY: takes a lock, or says that it cannot.
    while !unsafe { pg_sys::ConditionalLockDatabaseObject(class, object, 0, mode) } {
        if !patience.try_again() {
            let which =
                "l.locktype = 'object' AND l.classid = $1 AND l.objid = $2 AND l.mode = 'ExclusiveLock'";
            return Err(busy(holders(which, &[class.into(), object.into()])?));
        }
    }
    take_xid()
}

/// A number for a name (FNV-1a): two names of one number wait for each other, no more.
fn fnv(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// Locks rows of ours, by the name of their table, that will be changed while a user's table is locked:
/// whoever has them must not keep that locked, too.
pub fn lock_rows(limit: LockLimit, table: &str, condition: &str) -> Result<()> {
    let name = qualified(SCHEMA, table);
    let oid = find_relation(&name)?.ok_or_else(|| Error::NoTable(name.clone()))?;
    // As the change will: whoever attaches keeps that away, but not the query.
    lock_all(limit, &[(oid, pg_sys::RowExclusiveLock)])?;
    lock_within(limit, &format!("SELECT FROM {name} {condition} FOR UPDATE"), &name, oid)
}

/// What is noted of a table by its OID.
const NOTES: [&str; 4] = ["capture", "source", "policy", "index_set"];

/// The right to [`move_notes`], before the table is locked.
pub fn lock_notes_of(limit: LockLimit, old: pg_sys::Oid) -> Result<()> {
    let condition = format!("WHERE relation = {}::oid", old.to_u32());
    NOTES.into_iter().try_for_each(|table| lock_rows(limit, table, &condition))
}

/// What is noted of a table is of another from now on, which takes its place.
pub fn move_notes(old: pg_sys::Oid, new: pg_sys::Oid) -> Result<()> {
    for table in NOTES {
        let sql = format!("UPDATE litellm_spend.{table} SET relation = $2 WHERE relation = $1");
        run(&sql, &[old.into(), new.into()])?;
    }
    Ok(())
}

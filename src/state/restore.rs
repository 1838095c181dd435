//! Databases that came out of a dump, and when their restore is over.
//!
//! A restore brings our state before or after what it speaks of, by parallel jobs in any order. A worker that
//! acted on half of it would make triggers before the spend log's rows are copied, and count them all again.
//! So each row of state from which work follows names the installation that wrote it (`origin`).
//! `installation` itself is not dumped: what another one wrote came out of a dump, and is left alone.
//!
//! That a restore is over is seen by what it does last, in every mode of pg_restore and in a plain script: it
//! makes the event triggers and their comments, after all data, indexes, triggers and grants. So a database
//! with state has one of ours, the *marker*: disabled, of a function that does nothing. Its comment names the
//! installation, so that the marker of what was here before is none of what is being restored. Once it is
//! there we make the state ours, and the marker. One that is older than state came first, without the data
//! (`--schema-only`): it says nothing of the restore that brings those. Then, and where a dump has none
//! (`--no-comments`, or of an older version), somebody has to say that its restore is over:
//! `spend_restored()`, or `spend_attach()` of the table. Tables of rollups without their state, and without
//! a marker, are a restore that has not come to either, or was cut: it counts as one under way.
//!
//! What is gone when a dump is made is in it as a number, which may be another's where it is restored. So
//! what is noted of such a table or role is not dumped where it asks for work. Of history and of a captured
//! table, where it says for whom they are kept, a role that is gone is [`NO_ROLE`].
//!
//! pg_upgrade and CREATE DATABASE … TEMPLATE copy files: there `installation` comes along, and everything
//! goes on. All databases that were made from a template with the extension would be one installation, and a
//! dump of one no restore in another: so the first state of a database begins a new one.

use crate::error::{Error, Result};
use crate::server::locks::Patience;
use crate::server::spi::{Found, exists, query, run, value};
use crate::state::fence;

/// The installation of this database, as SQL.
pub const HERE: &str = "(SELECT id FROM litellm_spend.installation)";

/// The tables whose rows name who wrote them, and what of a row means nothing to another server: numbers of
/// transactions, OIDs.
const WRITTEN: [(&str, &str); 5] = [
    ("source", ", candidates = '[]', node_candidates = '[]'"),
    (
        "capture",
        ", candidates = '[]', triggers = '{}',
         relation = CASE
             WHEN relation = pg_catalog.to_regclass(format('%I.%I', table_schema, table_name)) THEN relation
             WHEN relation IN (TABLE captured) THEN relation ELSE 0 END,
         predecessor = CASE WHEN predecessor IS NULL OR predecessor IN (TABLE captured) THEN predecessor
             ELSE 0 END",
    ),
    ("policy", ""),
    ("conversion", ", options = options - 'made'"),
    ("index_set", ""),
];

/// Tables with triggers of capture. What is captured and was dropped is in a dump as a number, which may be
/// that of any table here; and a table that was renamed is not called what it was when it was attached.
const CAPTURED: &str =
    "SELECT t.tgrelid FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
     WHERE p.pronamespace = 'litellm_spend'::regnamespace AND p.proname LIKE 'capture\\_%'";

const MARKER: &str = "litellm_spend_restored";

/// What the marker's comment says before the installation. In its name that would be in the way of
/// `pg_restore --clean`, which drops what the dump has the names of.
const COMMENT: &str =
    "litellm_spend: never fires. A restore makes it last, and is over when it is there. Installation ";

/// How it stands with what another installation wrote. `None`: there is nothing of it.
enum Restore {
    /// The end of each was seen.
    Over,
    UnderWay,
}

fn restored() -> Result<Option<Restore>> {
    let rows = WRITTEN
        .map(|(table, _)| format!("SELECT origin, age(xmin) AS age FROM litellm_spend.{table}"))
        .join(" UNION ");
    let sql = format!(
        "SELECT count(*) > 0, coalesce(bool_and(EXISTS (
             SELECT FROM pg_catalog.pg_event_trigger t JOIN pg_catalog.pg_description d
                 ON d.classoid = 'pg_catalog.pg_event_trigger'::pg_catalog.regclass AND d.objoid = t.oid
             WHERE t.evtname = '{MARKER}' AND d.description = '{COMMENT}' || origin
                 AND age(d.xmin) <= written.age)), false)
         FROM ({rows}) AS written WHERE origin IS DISTINCT FROM {HERE}"
    );
    let found = query(&sql, &[], |r| Ok((value::<bool>(r, 1)?, value::<bool>(r, 2)?)))?;
    let any = found.into_iter().find(|(any, _)| *any);
    Ok(match any {
        Some((_, true)) => Some(Restore::Over),
        Some((_, false)) => Some(Restore::UnderWay),
        None => is_cut()?.then_some(Restore::UnderWay),
    })
}

/// Tables of rollups are there, and neither their state nor the marker: a restore has not come to them, or
/// never does.
fn is_cut() -> Result<bool> {
    let sql = format!(
        "SELECT NOT EXISTS (SELECT FROM pg_catalog.pg_event_trigger WHERE evtname = '{MARKER}')
             AND EXISTS (SELECT FROM litellm_spend.leftover)"
    );
    Ok(query(&sql, &[], |r| value::<bool>(r, 1))? == [true])
}

/// Goes on with what a dump brought, if its restore is over. Says whether what is missing may be made again:
/// not while `pg_restore --clean` drops one thing after the other, which it begins with the marker.
pub fn look(patience: Patience) -> Result<bool> {
    match restored()? {
        None => {
            forget_dropped_roles()?;
            let marker = Marker::look()?;
            if !marker.wanted && marker.names_us {
                drop_marker()?;
            }
            Ok(!marker.wanted || marker.exists)
        }
        Some(Restore::Over) => adopt(patience),
        Some(Restore::UnderWay) => Ok(false),
    }
}

/// Nobody ever has this number: the server gives roles those from 16384 on.
const NO_ROLE: u32 = 1;

fn forget_dropped_roles() -> Result<()> {
    for table in ["rollup", "capture"] {
        let gone = format!(
            "SELECT t.ctid FROM litellm_spend.{table} t WHERE t.owner <> {NO_ROLE}
                 AND NOT EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = t.owner)"
        );
        // Who keeps a row for long keeps nobody here: the next look comes.
        let forget = format!(
            "UPDATE litellm_spend.{table} SET owner = {NO_ROLE}
             WHERE ctid = ANY (ARRAY({gone} FOR UPDATE SKIP LOCKED))"
        );
        // An UPDATE would take an XID also where there is nothing to do.
        if query(&gone, &[], |_| Ok(())).any()? {
            run(&forget, &[])?;
        }
    }
    Ok(())
}

/// There is state, or a rollup's table, that DROP EXTENSION is refused for anyhow, so that a marker may be.
const NEEDS_MARKER: &str = "(EXISTS (SELECT FROM litellm_spend.capture)
     OR EXISTS (SELECT FROM litellm_spend.rollup WHERE definition IS NOT NULL)
     OR EXISTS (SELECT FROM litellm_spend.leftover))";

/// The same for a SQL call, which is refused while a restore may still go on.
pub fn require_over() -> Result<()> {
    match restored()? {
        None => Ok(()),
        Some(Restore::Over) => adopt(Patience::of_call()).map(drop),
        Some(Restore::UnderWay) => Err(Error::Restoring),
    }
}

/// The same for a call that changes nothing: it does not make ours what was restored, and sees nothing of it.
pub fn require_none() -> Result<()> {
    match restored()? {
        None => Ok(()),
        Some(Restore::Over) => Err(Error::Restored),
        Some(Restore::UnderWay) => Err(Error::Restoring),
    }
}

/// Before a call makes state. If it is the first, it is of a new installation. (Who made state before the
/// last of it was dropped, and commits after another has begun anew, leaves what looks like a dump's; the
/// calls say so.)
pub fn begin() -> Result<()> {
    if any_state()? {
        return Ok(());
    }
    // One at a time: what another has begun is seen afterwards.
    fence::change_marker(Patience::of_call())?;
    if any_state()? {
        return Ok(());
    }
    if Marker::look()?.names_us {
        drop_marker()?;
    }
    run("UPDATE litellm_spend.installation SET id = gen_random_uuid()", &[])
}

fn any_state() -> Result<bool> {
    let tables = WRITTEN.map(|(table, _)| format!("SELECT FROM litellm_spend.{table}")).join(" UNION ALL ");
    let others = "SELECT FROM litellm_spend.rollup UNION ALL SELECT FROM litellm_spend.leftover";
    exists(&format!("{tables} UNION ALL {others}"), &[])
}

/// Makes all state that was restored ours, and the marker. `false`: there is none.
pub fn adopt(patience: Patience) -> Result<bool> {
    if restored()?.is_none() {
        mark(patience)?;
        return Ok(false);
    }
    // The numbers of a source's columns are another table's here.
    run(
        &format!(
            "UPDATE litellm_spend.rollup r SET definition = definition - 'columns'
             WHERE definition ? 'columns' AND EXISTS (SELECT FROM litellm_spend.source s
                 WHERE s.name = r.source AND s.origin IS DISTINCT FROM {HERE})"
        ),
        &[],
    )?;
    for (table, reset) in WRITTEN {
        run(
            &format!(
                "WITH captured AS ({CAPTURED})
                 UPDATE litellm_spend.{table} SET origin = {HERE}{reset} WHERE origin IS DISTINCT FROM {HERE}"
            ),
            &[],
        )?;
    }
    mark(patience)?;
    Ok(true)
}

/// How it stands with the marker.
struct Marker {
    wanted: bool,
    exists: bool,
    names_us: bool,
    here: String,
}

impl Marker {
    fn look() -> Result<Marker> {
        let sql = format!(
            "SELECT {NEEDS_MARKER}, t.oid IS NOT NULL,
                    coalesce(obj_description(t.oid, 'pg_event_trigger') = '{COMMENT}' || i.id, false), i.id::text
             FROM litellm_spend.installation i LEFT JOIN pg_catalog.pg_event_trigger t ON t.evtname = '{MARKER}'"
        );
        let found = query(&sql, &[], |r| {
            Ok(Marker {
                wanted: value(r, 1)?,
                exists: value(r, 2)?,
                names_us: value(r, 3)?,
                here: value(r, 4)?,
            })
        })
        .one()?;
        found.ok_or_else(|| Error::NoTable("litellm_spend.installation".into()))
    }

    fn is_right(&self) -> bool {
        self.wanted == self.exists && (self.names_us || !self.wanted)
    }
}

/// Makes the marker where it is needed, and drops it with the last state that needs it. It is not made for
/// the worker: that would be in the way of a restore that has just dropped it.
///
/// Two may do this at once, each without seeing what the other has done. Who needs a marker that is there
/// keeps it until their transaction ends, beside each other; who makes or drops it does that alone. Who
/// cannot drop it leaves it to the worker.
pub fn mark(patience: Patience) -> Result<()> {
    let marker = Marker::look()?;
    if !marker.wanted {
        return if marker.exists { drop_marker() } else { Ok(()) };
    }
    if marker.is_right() {
        fence::keep_marker(patience)?;
        if Marker::look()?.is_right() {
            return Ok(());
        }
    }
    fence::change_marker(patience)?;
    let Marker { exists, names_us, here, .. } = Marker::look()?;
    if !exists {
        run(
            &format!(
                "CREATE EVENT TRIGGER {MARKER} ON ddl_command_end EXECUTE FUNCTION litellm_spend.restored()"
            ),
            &[],
        )?;
        run(&format!("ALTER EVENT TRIGGER {MARKER} DISABLE"), &[])?;
    }
    if !names_us {
        run(&format!("COMMENT ON EVENT TRIGGER {MARKER} IS '{COMMENT}{here}'"), &[])?;
    }
    Ok(())
}

/// Drops a marker that nothing needs, unless somebody is about to need it.
fn drop_marker() -> Result<()> {
    if !fence::try_change_marker()? {
        return Ok(());
    }
    let marker = Marker::look()?;
    if marker.exists && !marker.wanted {
        run(&format!("DROP EVENT TRIGGER {MARKER}"), &[])?;
    }
    Ok(())
}

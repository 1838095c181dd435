//! LiteLLM's own views, answered from rollups: put in place when their rollup covers what they need, given
//! back by detach. And what is ours: the live views. The report views are in `reports`.
//!
//! A view keeps its OID, owner, grants and dependents when it gets another query (`rewrite`). That takes
//! ACCESS EXCLUSIVE on the view (not on the table) for the moment, within `litellm_spend.lock_timeout`.
//!
//! Whose rights: a view runs with its owner's, so its owner is granted the columns that it shows, of the
//! rollup and of the change log, and no others; a view is only adopted if its owner may read the spend log
//! itself, and if it does read it or belongs to the table's owner. LiteLLM's own query is text of theirs: it
//! is parsed as the view's owner when it is given back. What belongs to another owner later is let go.

use crate::error::{Error, Result};
use crate::guc;
pub use crate::litellm::builtin::PublicView;
use crate::litellm::builtin::{self, VIEWS};
use crate::server::locks::{self, Patience};
use crate::server::log;
use crate::server::relation::{self, Table};
use crate::server::rewrite;
use crate::server::session::{Failure, Owner, advised, attempt};
use crate::server::spi::{self, Found};
use crate::server::text::{qualified, quoted};
use crate::state::captured;
use crate::state::definition::Definition;
use crate::state::fence;
use pgrx::prelude::*;

/// An object and what was done to it, as a call returns it.
pub type Action = (String, String);

/// Notes LiteLLM's definition of every view that we can answer, so that it can be given back. `source` is the
/// table.
pub fn adopt(source: &Table) -> Result<Vec<Action>> {
    // Those that get another query, all within one limit: their readers wait until the attach has ended.
    let mut changed = vec![];
    for (view, found) in in_place(&source.schema)? {
        if installed(view)? != Some(live(view, &source.schema)?) {
            changed.push(found.oid);
        }
    }
    if !changed.is_empty() {
        locks::lock_exclusively(guc::lock_timeout(), changed)?;
    }
    VIEWS.iter().map(|view| adopt_one(view, source)).collect()
}

fn adopt_one(view: &PublicView, source: &Table) -> Result<Action> {
    let name = qualified(&source.schema, view.name);
    let action = |text: &str| Ok((format!("view {name}"), text.to_string()));
    let found = Table::named(&name)?;
    if let Some((installed, found)) = installed(view)?.zip(found.as_ref())
        && is_ours(view, found)?
    {
        // Its owner may have changed.
        if let Some(reason) = unusable(view, found, source)? {
            return action(&let_go(view, found)?.unwrap_or(reason));
        }
        grant(view, found, source)?;
        // An upgrade may have changed our query: it takes effect here.
        if installed != live(view, &source.schema)? {
            install(view, &name, &source.schema)?;
            return action("replaced by the new definition");
        }
        return action("already live");
    }
    let original = match found {
        None => {
            if let Some(table) = view.joins
                && Table::named(&qualified(&source.schema, table))?.is_none()
            {
                return action(&format!("not made: there is no \"{table}\""));
            }
            if let Some(column) = view.needs
                && source.type_of(column).is_none()
            {
                return action(&format!("not made: there is no column \"{column}\""));
            }
            let original = view.original(&source.qualified(), &source.schema);
            let create = format!("CREATE VIEW {name} AS {original}");
            if let Err(failure) = attempt(|| Owner::role(source.owner_oid).run(&create)) {
                return action(&format!("not made: {}", failure.unless_cancel().message));
            }
            original
        }
        Some(found) => match unusable(view, &found, source)? {
            Some(reason) => return action(&reason),
            // That it is ours was lost, and with it LiteLLM's own query: what it shows is not to be trusted
            // until its days are covered.
            None if is_ours(view, &found)? => {
                let original = view.original(&source.qualified(), &source.schema);
                rewrite::replace(guc::lock_timeout(), found.oid, &original)?;
                original
            }
            None => definition(&found)?,
        },
    };
    spi::run(
        "INSERT INTO litellm_spend.public_view (name, rollup, original) VALUES ($1, $2, $3)
             ON CONFLICT (name) DO UPDATE SET original = excluded.original, installed = NULL",
        &[view.name.into(), view.rollup.into(), original.into()],
    )?;
    action("goes live when its days are covered")
}

/// Switches each adopted view whose rollup covers the days it shows.
pub fn switch_covered(patience: Patience) -> Result<()> {
    if ready()?.is_empty() || !fence::lock_attachment(patience)? {
        return Ok(());
    }
    let Some(capture) = captured::capture()? else { return Ok(()) };
    // Again, under the lock: detach may have come first.
    let (ready, source) = (ready()?, Table::find(capture.relation)?);
    let Some(source) = source else { return Ok(()) };
    let (mut switched, mut failed) = (false, None);
    for view in VIEWS.iter().filter(|view| ready.iter().any(|name| name == view.name)) {
        // Readers of one that has been switched wait until we commit: from then on only for what is free.
        let switch = || switch(view, &source, &capture.schema, !switched);
        match attempt(switch).map_err(Failure::unless_cancel) {
            Ok(done) => switched |= done,
            // One that somebody has locked keeps no other.
            Err(failure) if failure.is_lock_timeout() => failed = failed.or(Some(failure)),
            Err(failure) => return Err(Error::Failed(failure)),
        }
    }
    // It is tried again alone, and then said.
    failed.filter(|_| !switched).map_or(Ok(()), |failure| Err(Error::Failed(failure)))
}

/// Says whether it was done.
fn switch(view: &PublicView, source: &Table, schema: &str, waits: bool) -> Result<bool> {
    let name = qualified(schema, view.name);
    // What is not there any more, or not usable, is for the watch.
    let Some(found) = Table::named(&name)? else { return Ok(false) };
    if !waits && !locks::try_lock(found.oid, pg_sys::AccessExclusiveLock)
        || unusable(view, &found, source)?.is_some()
    {
        return Ok(false);
    }
    grant(view, &found, source)?;
    note_original(view, &found)?;
    install(view, &name, schema)?;
    log::event(format_args!("{name} reads the rollups from now on"));
    Ok(true)
}

/// Somebody may have given the view another query since it was adopted: what is given back is that one.
fn note_original(view: &PublicView, found: &Table) -> Result<()> {
    locks::lock_exclusively(guc::lock_timeout(), [found.oid])?;
    let sql = "UPDATE litellm_spend.public_view SET original = $2 WHERE name = $1";
    spi::run(sql, &[view.name.into(), definition(found)?.into()])
}

/// The views that are LiteLLM's still, and whose rollup covers what they show and a day more: CURRENT_DATE
/// depends on the session's time zone.
fn ready() -> Result<Vec<String>> {
    let names: Vec<String> = VIEWS.iter().map(|view| view.name.to_string()).collect();
    let days: Vec<Option<i32>> = VIEWS.iter().map(|view| view.days.map(|days| days + 1)).collect();
    spi::query(
        "SELECT v.name FROM litellm_spend.public_view v
             JOIN unnest($1::text[], $2::int[]) AS shown(name, days) ON shown.name = v.name
             JOIN litellm_spend.rollup r ON r.name = v.rollup
             WHERE v.installed IS NULL AND r.covered_from <= coalesce(CURRENT_DATE - shown.days, '-infinity')",
        &[names.into(), days.into()],
        |r| spi::value(r, 1),
    )
}

/// The views that are ours, by our notes and in fact.
pub fn in_place(schema: &str) -> Result<Vec<(&'static PublicView, Table)>> {
    let mut views = vec![];
    for Adopted { view, .. } in adopted()?.into_iter().filter(|adopted| adopted.installed.is_some()) {
        if let Some(found) = Table::named(&qualified(schema, view.name))?
            && is_ours(view, &found)?
        {
            views.push((view, found));
        }
    }
    Ok(views)
}

/// Gives LiteLLM's definitions back, over the table that now has its name.
pub fn restore(source: &Table) -> Result<Vec<Action>> {
    let mut actions = vec![];
    for (view, found) in in_place(&source.schema)? {
        let unfit = let_go(view, &found)?;
        let action = unfit.unwrap_or_else(|| "LiteLLM's own definition restored".into());
        actions.push((format!("view {}", found.qualified()), action));
    }
    spi::run("DELETE FROM litellm_spend.public_view", &[])?;
    Ok(actions)
}

/// Gives LiteLLM's definition of a view back, as the view's owner, and forgets that it was ours. Ours reads
/// no column of the table, so by now those that LiteLLM's names may be gone, or have another type. Then the
/// view shows nothing, and what is returned says why.
fn let_go(view: &PublicView, found: &Table) -> Result<Option<String>> {
    let mut unfit = None;
    if let Some(Adopted { original, installed: Some(_), .. }) = noted(view)?
        && let Err(failure) = attempt(|| rewrite::replace(guc::lock_timeout(), found.oid, &original))
            .map_err(Failure::unless_cancel)
    {
        if failure.is_lock_timeout() {
            return Err(Error::Failed(failure));
        }
        show_nothing(view, found)?;
        let name = found.qualified();
        log::event(format_args!(
            "{name} is emptied: {}; its own definition was: {original}",
            failure.message
        ));
        let because = format!("emptied: LiteLLM's own definition cannot be given back: {}", failure.message);
        unfit = Some(because);
    }
    forget(view)?;
    Ok(unfit)
}

/// The view shows no rows, of the same columns.
fn show_nothing(view: &PublicView, found: &Table) -> Result<()> {
    let columns: Vec<String> =
        view.columns.iter().map(|(column, r#type)| format!("NULL::{type} AS {}", quoted(column))).collect();
    let nothing = format!("SELECT {} WHERE false", columns.join(", "));
    rewrite::replace(guc::lock_timeout(), found.oid, &nothing)
}

/// What is noted of a view that is ours, or waits to be.
pub struct Adopted {
    pub view: &'static PublicView,
    /// LiteLLM's own query.
    original: String,
    /// Ours, once it is in place.
    installed: Option<String>,
    owner: Option<pg_sys::Oid>,
}

impl Adopted {
    /// What somebody has done to it, if it is not ours any more.
    fn fate(&self, found: Option<&Table>) -> Result<Option<&'static str>> {
        let [replaced, dropped] = FATES;
        let Some(found) = found else { return Ok(Some(dropped)) };
        Ok((self.installed.is_some() && !is_ours(self.view, found)?).then_some(replaced))
    }
}

/// In the order of [`VIEWS`].
pub fn adopted() -> Result<Vec<Adopted>> {
    let sql = "SELECT name, original, installed, owner::oid FROM litellm_spend.public_view";
    let found = spi::query(sql, &[], |r| {
        let name = spi::value::<String>(r, 1)?;
        let place = VIEWS.iter().position(|view| view.name == name);
        let (original, installed, owner) = (spi::value(r, 2)?, r.get(3)?, r.get(4)?);
        Ok(place.map(|place| (place, Adopted { view: &VIEWS[place], original, installed, owner })))
    })?;
    let mut found: Vec<_> = found.into_iter().flatten().collect();
    found.sort_by_key(|(place, _)| *place);
    Ok(found.into_iter().map(|(_, adopted)| adopted).collect())
}

fn noted(view: &PublicView) -> Result<Option<Adopted>> {
    Ok(adopted()?.into_iter().find(|adopted| adopted.view.name == view.name))
}

/// Those that somebody has replaced or dropped, that have another owner, or that may not be ours any more.
pub fn strays(source: &Table) -> Result<Vec<Adopted>> {
    let mut strays = vec![];
    for adopted in adopted()? {
        let found = Table::named(&qualified(&source.schema, adopted.view.name))?;
        let is_stray = match &found {
            Some(found) if adopted.fate(Some(found))?.is_none() => {
                adopted.installed.is_some() && adopted.owner != Some(found.owner_oid)
                    || unusable(adopted.view, found, source)?.is_some()
            }
            _ => true,
        };
        if is_stray {
            strays.push(adopted);
        }
    }
    Ok(strays)
}

/// A view that is not ours any more.
pub enum Lost {
    /// What somebody has done to it, one of [`FATES`].
    Gone(&'static str, &'static str),
    /// It is LiteLLM's own again, or empty; why.
    LetGo(String),
}

const FATES: [&str; 2] = ["replaced", "dropped"];

/// Says which are lost: of those that were replaced or dropped all, by what was noted before.
pub fn tell_lost(lost: &[Lost], noted: Option<&str>) -> String {
    let noted: Vec<&str> =
        noted.and_then(|noted| noted.lines().next()).unwrap_or_default().split("; ").collect();
    let mut said = vec![];
    for fate in FATES {
        let is_so = |name: &str| {
            lost.iter().any(|lost| matches!(lost, Lost::Gone(view, by) if (*view, *by) == (name, fate)))
                || noted.iter().any(|noted| noted.ends_with(fate) && noted.contains(&quoted(name)))
        };
        let names: Vec<String> =
            VIEWS.iter().map(|view| view.name).filter(|name| is_so(name)).map(quoted).collect();
        match &names[..] {
            [] => {}
            [one] => said.push(format!("view {one} was {fate}")),
            all => said.push(format!("views {} were {fate}", all.join(", "))),
        }
    }
    let comes_back = !said.is_empty();
    said.extend(lost.iter().filter_map(|lost| match lost {
        Lost::Gone(..) => None,
        Lost::LetGo(message) => Some(message.clone()),
    }));
    let message = said.join("; ");
    match comes_back {
        false => message,
        true => advised(&message, "SELECT * FROM spend_attach();  -- puts ours back"),
    }
}

/// Deals with one of them. Returns what is to be said of it.
pub fn settle(adopted: &Adopted, source: &Table) -> Result<Option<Lost>> {
    let view = adopted.view;
    let found = Table::named(&qualified(&source.schema, view.name))?;
    if let Some(fate) = adopted.fate(found.as_ref())? {
        forget(view)?;
        return Ok(Some(Lost::Gone(view.name, fate)));
    }
    let Some(found) = found else { return Ok(None) };
    let Some(reason) = unusable(view, &found, source)? else {
        grant(view, &found, source)?;
        return Ok(None);
    };
    let what = match adopted.installed {
        None => {
            forget(view)?;
            reason
        }
        Some(_) => let_go(view, &found)?.unwrap_or(format!("LiteLLM's own again: {reason}")),
    };
    Ok(Some(Lost::LetGo(format!("view \"{}\" is {what}", view.name))))
}

/// Forgets that the view was ours: somebody has replaced it, and it is theirs until the next attach.
fn forget(view: &PublicView) -> Result<()> {
    spi::run("DELETE FROM litellm_spend.public_view WHERE name = $1", &[view.name.into()])
}

/// The table is gone and with it LiteLLM's definitions: what is left of our views shows nothing.
pub fn empty(schema: &str) -> Result<Vec<Action>> {
    let mut actions = vec![];
    for (view, found) in in_place(schema)? {
        show_nothing(view, &found)?;
        actions.push((format!("view {}", found.qualified()), "emptied: its table is gone".into()));
    }
    spi::run("DELETE FROM litellm_spend.public_view", &[])?;
    Ok(actions)
}

/// The view reads our rollup, or, as another version of it may, the rollup's live view.
fn is_ours(view: &PublicView, found: &Table) -> Result<bool> {
    is_ours_or_reads(view, found, None)
}

/// The view is another role's than the table, and about something else: what it shows is not for the table's
/// owner to say.
fn is_strangers(view: &PublicView, found: &Table, source: &Table) -> Result<bool> {
    Ok(found.owner_oid != source.owner_oid && !is_ours_or_reads(view, found, Some(source.oid))?)
}

fn is_ours_or_reads(view: &PublicView, found: &Table, table: Option<pg_sys::Oid>) -> Result<bool> {
    let rollup = rollup(view.rollup)?;
    let reads = spi::query(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_rewrite r ON r.oid = d.objid
                        WHERE d.classid = 'pg_catalog.pg_rewrite'::regclass AND r.ev_class = $1
                          AND d.refclassid = 'pg_catalog.pg_class'::regclass
                          AND d.refobjid IN (pg_catalog.to_regclass($2), pg_catalog.to_regclass($3), $4))",
        &[found.oid.into(), rollup.table().into(), rollup.live_view().into(), table.into()],
        |r| spi::value::<bool>(r, 1),
    )?;
    Ok(reads == [true])
}

/// The view runs with its owner's rights. The table's owner has them all; another gets the columns that the
/// view shows.
fn grant(view: &PublicView, found: &Table, source: &Table) -> Result<()> {
    if found.owner_oid != source.owner_oid {
        let rollup = rollup(view.rollup)?;
        let grants = rollup.grant_columns(view.reads, builtin::log_column, &quoted(&found.owner));
        grants.iter().try_for_each(|grant| fence::grant(grant))?;
    }
    spi::run(
        "UPDATE litellm_spend.public_view SET owner = $2 WHERE name = $1",
        &[view.name.into(), found.owner_oid.into()],
    )
}

fn live(view: &PublicView, schema: &str) -> Result<String> {
    Ok(view.live(&rollup(view.rollup)?, schema))
}

fn rollup(name: &str) -> Result<Definition> {
    builtin::rollups().into_iter().find(|r| r.name == name).ok_or_else(|| Error::NoRollup(name.into()))
}

// ---- live views ------------------------------------------------------------------------------------------

/// Makes a rollup's live view, or brings it up to the definition.
pub fn make_live(definition: &Definition) -> Result<()> {
    let name = definition.live_view();
    let is_new = relation::find_relation(&name)?.is_none();
    locks::lock_named(&definition.create_live_view(), &name)?;
    if is_new {
        fence::revoke_on_relation(&name)?;
    }
    for comment in definition.comments() {
        spi::run(&comment, &[])?;
    }
    Ok(())
}

// ---- in place --------------------------------------------------------------------------------------------

fn installed(view: &PublicView) -> Result<Option<String>> {
    Ok(noted(view)?.and_then(|adopted| adopted.installed))
}

/// Puts our query in place, and notes it.
fn install(view: &PublicView, name: &str, schema: &str) -> Result<()> {
    let query = live(view, schema)?;
    let found = Table::named(name)?.ok_or_else(|| Error::NoTable(name.into()))?;
    rewrite::replace(guc::lock_timeout(), found.oid, &query)?;
    spi::run(
        "UPDATE litellm_spend.public_view SET installed = $2 WHERE name = $1",
        &[view.name.into(), query.into()],
    )
}

/// Why the relation cannot become ours.
fn unusable(view: &PublicView, found: &Table, source: &Table) -> Result<Option<String>> {
    let expected = view.columns.iter().map(|(name, r#type)| (name.to_string(), r#type.to_string()));
    let reason = match found.kind.as_str() {
        "v" if is_invokers(found)? => "with security_invoker its readers would need rights on the rollups",
        "v" if !found.columns.iter().cloned().eq(expected) => "its columns are not LiteLLM's",
        "v" if is_strangers(view, found, source)? => {
            "it belongs to another role and does not read the spend log"
        }
        "v" if uses_anothers_code(found)? => "its query uses a type or function of another role",
        "v" => match rights(found, source)? {
            (false, _) => "its owner may not read the spend log",
            (_, true) => "it shows what row security on the spend log lets its owner see",
            _ => return Ok(None),
        },
        "m" => "it is a materialized view; drop it and attach again",
        _ => "it is not a view",
    };
    Ok(Some(format!("left alone: {reason}")))
}

/// Whether it has security_invoker, which is stored as it was typed: true, on, yes, 1.
fn is_invokers(view: &Table) -> Result<bool> {
    let sql = "SELECT o.option_value::boolean
               FROM pg_catalog.pg_class c, pg_catalog.pg_options_to_table(c.reloptions) AS o
               WHERE c.oid = $1 AND o.option_name = 'security_invoker'";
    Ok(spi::query(sql, &[view.oid.into()], |r| spi::value::<bool>(r, 1))? == [true])
}

/// The query of the view uses what belongs to neither its owner nor a superuser. When it is given back its
/// text is read again, as the view's owner, which would call that.
fn uses_anothers_code(found: &Table) -> Result<bool> {
    // As a rule it uses the server's only, on which nothing is noted to depend.
    let any = "SELECT FROM pg_catalog.pg_rewrite w JOIN pg_catalog.pg_depend d
                   ON d.classid = 'pg_catalog.pg_rewrite'::regclass AND d.objid = w.oid
               WHERE w.ev_class = $1
                   AND d.refclassid IN ('pg_catalog.pg_type'::regclass, 'pg_catalog.pg_proc'::regclass,
                                                          'pg_catalog.pg_operator'::regclass) LIMIT 1";
    if !spi::query(any, &[found.oid.into()], |_| Ok(())).any()? {
        return Ok(false);
    }
    let rules = "SELECT 'pg_catalog.pg_rewrite'::regclass::oid AS classid, oid AS objid, $2::oid AS owner
                 FROM pg_catalog.pg_rewrite WHERE ev_class = $1";
    let others = relation::code_of_third_roles(rules, &[found.oid.into(), found.owner_oid.into()])?;
    Ok(!others.is_empty())
}

/// Whether the view's owner may read the table, and whether row security would hide rows from it.
fn rights(found: &Table, source: &Table) -> Result<(bool, bool)> {
    let rights = spi::query(
        "SELECT pg_catalog.has_table_privilege($1, c.oid, 'SELECT'),
                c.relrowsecurity AND NOT (r.rolsuper OR r.rolbypassrls)
                AND (c.relforcerowsecurity OR NOT pg_catalog.pg_has_role($1, c.relowner, 'USAGE'))
         FROM pg_catalog.pg_class c, pg_catalog.pg_roles r WHERE c.oid = $2 AND r.oid = $1",
        &[found.owner_oid.into(), source.oid.into()],
        |r| Ok((spi::value::<bool>(r, 1)?, spi::value::<bool>(r, 2)?)),
    )
    .one()?;
    Ok(rights.unwrap_or((false, false)))
}

fn definition(view: &Table) -> Result<String> {
    let text =
        spi::query("SELECT pg_catalog.rtrim(pg_catalog.pg_get_viewdef($1), ';')", &[view.oid.into()], |r| {
            spi::value::<String>(r, 1)
        })?;
    Ok(text.into_iter().next().unwrap_or_default())
}

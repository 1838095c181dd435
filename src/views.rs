//! LiteLLM's own views, answered from rollups: put in place when their rollup covers what they need, given back by
//! detach. And what is ours: the live views, and the report views.
//!
//! A view is replaced with CREATE OR REPLACE VIEW, so its OID, owner, grants and dependents stay. That takes ACCESS
//! EXCLUSIVE on the view (not on the table) for the moment of the statement, within `litellm_spend.lock_timeout`.

pub use crate::builtin::PublicView;
use crate::builtin::{self, DAILY_REPORTS, VIEWS};
use crate::catalog::{self, Table};
use crate::definition::{Definition, SCHEMA, literal, qualified, quoted};
use crate::error::{Error, Result};
use crate::locks::{self, Patience};

/// What was done to an object, for the caller to read.
pub type Action = (String, String);

/// Notes LiteLLM's definition of every view that we can answer, so that it can be given back. `source` is the table.
pub fn adopt(source: &Table) -> Result<Vec<Action>> {
    VIEWS.iter().map(|view| adopt_one(view, source)).collect()
}

fn adopt_one(view: &PublicView, source: &Table) -> Result<Action> {
    let name = qualified(&source.schema, view.name);
    let action = |text: &str| Ok((format!("view {name}"), text.to_string()));
    let found = Table::named(&name)?;
    let ours = match &found {
        Some(found) => is_ours(view, found)?,
        None => false,
    };
    if let Some((installed, found)) = installed(view)?.zip(found.as_ref()).filter(|_| ours) {
        // Its owner may have changed.
        grant(view, found)?;
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
                && !source.columns.iter().any(|(name, _)| name == column)
            {
                return action(&format!("not made: there is no column \"{column}\""));
            }
            let original = view.original(&source.qualified(), &source.schema);
            catalog::execute(&format!("CREATE VIEW {name} AS {original}"), &[])?;
            catalog::execute(&format!("ALTER VIEW {name} OWNER TO {}", quoted(&source.owner)), &[])?;
            original
        }
        Some(found) => match unusable(view, &found) {
            Some(reason) => return action(&reason),
            None => definition(&found)?,
        },
    };
    catalog::execute(
        &format!(
            "INSERT INTO {SCHEMA}.public_view (name, rollup, original) VALUES ($1, $2, $3)
             ON CONFLICT (name) DO UPDATE SET original = excluded.original, installed = NULL"
        ),
        &[view.name.into(), view.rollup.into(), original.into()],
    )?;
    action("goes live when its days are covered")
}

/// Switches each adopted view whose rollup covers the days it shows.
pub fn switch_covered(patience: Patience) -> Result<()> {
    if ready()?.is_empty() || !locks::lock_attachment(patience)? {
        return Ok(());
    }
    let Some(capture) = catalog::capture()? else { return Ok(()) };
    // Again, under the lock: detach may have come first.
    let ready = ready()?;
    for view in VIEWS.iter().filter(|view| ready.iter().any(|name| name == view.name)) {
        let name = qualified(&capture.schema, view.name);
        let Some(found) = Table::named(&name)?.filter(|found| unusable(view, found).is_none()) else {
            continue;
        };
        grant(view, &found)?;
        install(view, &name, &capture.schema)?;
    }
    Ok(())
}

/// The views that are LiteLLM's still, and whose rollup covers what they show and a day more: CURRENT_DATE depends on the
/// session's time zone.
fn ready() -> Result<Vec<String>> {
    let names: Vec<String> = VIEWS.iter().map(|view| view.name.to_string()).collect();
    let days: Vec<Option<i32>> = VIEWS.iter().map(|view| view.days.map(|days| days + 1)).collect();
    catalog::query(
        &format!(
            "SELECT v.name FROM {SCHEMA}.public_view v
             JOIN unnest($1::text[], $2::int[]) AS shown(name, days) ON shown.name = v.name
             JOIN {SCHEMA}.rollup r ON r.name = v.rollup
             WHERE v.installed IS NULL AND r.covered_from <= coalesce(CURRENT_DATE - shown.days, '-infinity')"
        ),
        &[names.into(), days.into()],
        |r| catalog::value(r, 1),
    )
}

/// Gives LiteLLM's definitions back, over the table that now has its name.
pub fn restore(schema: &str) -> Result<Vec<Action>> {
    let mut actions = vec![];
    for view in &VIEWS {
        let name = qualified(schema, view.name);
        let original = catalog::query(
            &format!("SELECT original FROM {SCHEMA}.public_view WHERE name = $1 AND installed IS NOT NULL"),
            &[view.name.into()],
            |r| catalog::value::<String>(r, 1),
        )?;
        let Some(original) = original.into_iter().next() else { continue };
        if Table::named(&name)?.is_some_and(|found| unusable(view, &found).is_none()) {
            replace(&name, &original)?;
            actions.push((format!("view {name}"), "LiteLLM's own definition restored".into()));
        }
    }
    catalog::execute(&format!("DELETE FROM {SCHEMA}.public_view"), &[])?;
    Ok(actions)
}

/// Views that are ours by our notes and another's in fact: somebody has replaced them.
pub fn replaced(schema: &str) -> Result<Vec<&'static PublicView>> {
    let mut replaced = vec![];
    for view in &VIEWS {
        if installed(view)?.is_some() {
            let found = Table::named(&qualified(schema, view.name))?;
            if !found.map(|found| is_ours(view, &found)).transpose()?.unwrap_or(false) {
                replaced.push(view);
            }
        }
    }
    Ok(replaced)
}

/// Lets go of a view that somebody has replaced: it is theirs until the next attach.
pub fn forget(view: &PublicView) -> Result<()> {
    catalog::execute(&format!("DELETE FROM {SCHEMA}.public_view WHERE name = $1"), &[view.name.into()])?;
    Ok(())
}

/// The table is gone and with it LiteLLM's definitions: what is left of our views shows nothing.
pub fn empty(schema: &str) -> Result<Vec<Action>> {
    let mut actions = vec![];
    for view in &VIEWS {
        let name = qualified(schema, view.name);
        if installed(view)?.is_some() && Table::named(&name)?.is_some() {
            let columns: Vec<String> = view
                .columns
                .iter()
                .map(|(column, r#type)| format!("NULL::{type} AS {}", quoted(column)))
                .collect();
            replace(&name, &format!("SELECT {} WHERE false", columns.join(", ")))?;
            actions.push((format!("view {name}"), "emptied: its table is gone".into()));
        }
        forget(view)?;
    }
    Ok(actions)
}

/// The view reads our rollup, or, as another version of it may, the rollup's live view.
fn is_ours(view: &PublicView, found: &Table) -> Result<bool> {
    let rollup = rollup(view.rollup)?;
    let mut ours = vec![];
    for name in [rollup.table(), rollup.live_view()] {
        ours.extend(catalog::find_relation(&name)?);
    }
    let reads = catalog::query(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_rewrite r ON r.oid = d.objid
                        WHERE d.classid = 'pg_catalog.pg_rewrite'::regclass AND r.ev_class = $1 AND d.refobjid = ANY ($2))",
        &[found.oid.into(), ours.into()],
        |r| catalog::value::<bool>(r, 1),
    )?;
    Ok(reads == [true])
}

/// The view runs with its owner's rights.
fn grant(view: &PublicView, found: &Table) -> Result<()> {
    let owner = quoted(&found.owner);
    for grant in rollup(view.rollup)?.grant_live(&owner) {
        catalog::execute(&grant, &[])?;
    }
    Ok(())
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
    locks::lock_named(&definition.create_live_view(), &definition.live_view())?;
    for comment in definition.comments() {
        catalog::execute(&comment, &[])?;
    }
    Ok(())
}

// ---- reports ---------------------------------------------------------------------------------------------

/// The report views by day, over the hourly rollups.
pub fn ensure_reports() -> Result<()> {
    for (name, hourly) in DAILY_REPORTS {
        let view = qualified(SCHEMA, name);
        if catalog::find_relation(&view)?.is_none() {
            let query = rollup(hourly)?.by_day();
            catalog::execute(&format!("CREATE VIEW {view} AS {query}"), &[])?;
            // For ranges of days.
            let (index, hours) = (builtin::report_index(hourly), rollup(hourly)?.table());
            catalog::execute(&format!("CREATE INDEX IF NOT EXISTS {index} ON {hours} ((hour::date))"), &[])?;
            let comment = literal(&format!("Rollup {hourly} by day, exact in every snapshot"));
            catalog::execute(&format!("COMMENT ON VIEW {view} IS {comment}"), &[])?;
        }
    }
    Ok(())
}

pub fn drop_reports() -> Result<()> {
    for (name, _) in DAILY_REPORTS {
        catalog::execute(&format!("DROP VIEW IF EXISTS {}", qualified(SCHEMA, name)), &[])?;
    }
    Ok(())
}

/// Lets `role` read all live views of the built-in rollups.
pub fn grant_reports(role: &str) -> Result<Vec<Action>> {
    let names = builtin::rollups().into_iter().map(|r| r.name);
    let mut actions = vec![];
    catalog::execute(&format!("GRANT USAGE ON SCHEMA {SCHEMA} TO {}", quoted(role)), &[])?;
    for name in names.chain(DAILY_REPORTS.iter().map(|(name, _)| name.to_string())) {
        let view = qualified(SCHEMA, &name);
        catalog::execute(&format!("GRANT SELECT ON {view} TO {}", quoted(role)), &[])?;
        actions.push((format!("view {view}"), format!("may be read by {role}")));
    }
    Ok(actions)
}

// ---- in place --------------------------------------------------------------------------------------------

fn installed(view: &PublicView) -> Result<Option<String>> {
    let installed = catalog::query(
        &format!("SELECT installed FROM {SCHEMA}.public_view WHERE name = $1"),
        &[view.name.into()],
        |r| Ok(r.get::<String>(1)?),
    )?;
    Ok(installed.into_iter().next().flatten())
}

/// Puts our query in place, and notes it.
fn install(view: &PublicView, name: &str, schema: &str) -> Result<()> {
    let query = live(view, schema)?;
    replace(name, &query)?;
    catalog::execute(
        &format!("UPDATE {SCHEMA}.public_view SET installed = $2 WHERE name = $1"),
        &[view.name.into(), query.into()],
    )?;
    Ok(())
}

/// Why the relation cannot become ours with CREATE OR REPLACE VIEW.
fn unusable(view: &PublicView, found: &Table) -> Option<String> {
    let expected = view.columns.iter().map(|(name, r#type)| (name.to_string(), r#type.to_string()));
    match found.kind.as_str() {
        "v" if found.options.contains("security_invoker=true") => {
            Some("left alone: with security_invoker its readers would need rights on the rollups".into())
        }
        "v" if found.columns.iter().cloned().eq(expected) => None,
        "v" => Some("left alone: its columns are not LiteLLM's".into()),
        "m" => Some("left alone: it is a materialized view; drop it and attach again".into()),
        _ => Some("left alone: it is not a view".into()),
    }
}

fn definition(view: &Table) -> Result<String> {
    let text = catalog::query(
        "SELECT pg_catalog.rtrim(pg_catalog.pg_get_viewdef($1), ';')",
        &[view.oid.into()],
        |r| catalog::value::<String>(r, 1),
    )?;
    Ok(text.into_iter().next().unwrap_or_default())
}

/// Replaces a view's query and keeps its options (security_barrier).
fn replace(name: &str, query: &str) -> Result<()> {
    let Some(view) = Table::named(name)? else { return Ok(()) };
    let with = if view.options.is_empty() { String::new() } else { format!(" WITH ({})", view.options) };
    let sql = format!("CREATE OR REPLACE VIEW {name}{with} AS {query}");
    locks::lock(&sql, name, view.oid)
}

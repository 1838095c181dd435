//! The reports: hourly rollups, and views by day over them. LiteLLM's own views do not need them, and they
//! can take more room than everything else of ours: so they are made when somebody asks for them, and stay
//! until somebody has one dropped.
//!
//! One that is added later cannot know the days of which raw rows are gone. Its views show nothing of those,
//! nor of a day that is not computed yet, not even rows that arrive late: each day is there as a whole, or
//! not at all.
//!
//! ```text
//!   not shown: raw rows are gone  | not shown yet           | shown, exact
//! --------------------------------+-------------------------+--------------> time
//!        stays in rollup.unknown_days           covered_from
//! ```

use crate::error::Result;
use crate::litellm::builtin::{self, DAILY_REPORTS};
use crate::litellm::views::Action;
use crate::server::relation::{self, Table};
use crate::server::session::{self, Owner, attempt};
use crate::server::spi;
use crate::server::text::{EXTENSION, SCHEMA, literal, qualified, quoted};
use crate::state::definition::Definition;
use crate::state::fence;
use crate::state::sources::CHANGE_LOG;
use pgrx::prelude::*;

/// The statement that makes them.
pub const ASK: &str = "SELECT * FROM spend_attach(reports => true);";

/// The hourly rollups that there are: somebody has asked for them.
pub fn here() -> Result<Vec<String>> {
    let hourly: Vec<String> = DAILY_REPORTS.map(|(_, hourly)| hourly.to_string()).into();
    // A restore may have lost the state, and anybody's DROP the table: the other says that there was one.
    spi::query(
        "SELECT name FROM unnest($1::text[]) AS name
             WHERE EXISTS (SELECT FROM litellm_spend.rollup r WHERE r.name = name.name AND r.source = $2)
                OR pg_catalog.to_regclass('litellm_spend.' || name || '_rollup') IS NOT NULL",
        &[hourly.into(), CHANGE_LOG.into()],
        |r| spi::value(r, 1),
    )
}

/// The built-in rollups that there are, or should be.
pub fn rollups() -> Result<Vec<Definition>> {
    let here = here()?;
    let mut rollups = builtin::rollups();
    rollups.retain(|rollup| !builtin::is_report(&rollup.name) || here.contains(&rollup.name));
    Ok(rollups)
}

/// Makes the view by day over an hourly rollup, if that is one.
pub fn ensure_by_day(hourly: &Definition) -> Result<()> {
    let Some(name) = builtin::by_day(&hourly.name) else { return Ok(()) };
    let view = qualified(SCHEMA, name);
    if relation::find_relation(&view)?.is_none() {
        spi::run(&format!("CREATE VIEW {view} AS {}", hourly.by_day()), &[])?;
        fence::revoke_on_relation(&view)?;
        // For ranges of days.
        let index = builtin::report_index(&hourly.name);
        let index = format!("CREATE INDEX IF NOT EXISTS {index} ON {} ((hour::date))", hourly.table());
        spi::run(&index, &[])?;
        let comment = literal(&format!("Rollup {} by day, exact in every snapshot", hourly.name));
        spi::run(&format!("COMMENT ON VIEW {view} IS {comment}"), &[])?;
    }
    Ok(())
}

/// What the reports of docs/reports.md call keys, teams and users: LiteLLM's tables, and the columns. Never a
/// whole table: one holds passwords.
const NAMES: [(&str, &[&str]); 3] = [
    ("LiteLLM_VerificationToken", &["token", "key_alias", "key_name"]),
    ("LiteLLM_TeamTable", &["team_id", "team_alias"]),
    ("LiteLLM_UserTable", &["user_id", "user_alias", "user_email"]),
];

/// Lets `role` read all live views of the built-in rollups, call monthly_global_spend(), and read the names
/// of what they are about. These are tables of other owners, as the extension's schema may be: granted as
/// whom and only if the caller may act for them.
pub fn grant(caller: pg_sys::Oid, role: pg_sys::Oid, schema: &str) -> Result<Vec<Action>> {
    let grantee = relation::role_name(role)?;
    let mut actions = grant_views(&grantee)?;
    let mut found = vec![];
    for (table, columns) in NAMES {
        let Some(table) = Table::named(&qualified(schema, table))? else { continue };
        let has = |column: &&str| table.type_of(column).is_some();
        let columns: Vec<String> = columns.iter().copied().filter(has).map(quoted).collect();
        if !columns.is_empty() && ["r", "p"].contains(&table.kind.as_str()) {
            let privilege = format!("SELECT ({})", columns.join(", "));
            found.push((table.owner_oid, privilege, format!("TABLE {}", table.qualified())));
        }
    }
    if let (false, Some(owner)) = (found.is_empty(), relation::owner_of_closed_schema(role, schema)?) {
        found.push((owner, "USAGE".into(), format!("SCHEMA {}", quoted(schema))));
    }
    if let Some(ours) = relation::extension_schema(EXTENSION)?
        && let Some(owner) = relation::owner_of_closed_schema(role, &ours)?
        && ours != schema
    {
        found.push((owner, "USAGE".into(), format!("SCHEMA {}", quoted(&ours))));
    }
    for (owner, privilege, object) in found {
        let grant = format!("GRANT {privilege} ON {object} TO {}", quoted(&grantee));
        let action = if !session::may_act_for(caller, owner)? {
            format!("left alone, for its owner to type: {grant};")
        } else if let Err(failure) = attempt(|| Owner::role(owner).run(&grant)) {
            // An owner who may not use the schema of the table, say.
            format!("left alone: {}", failure.unless_cancel().message)
        } else {
            format!("{privilege} granted to {grantee}")
        };
        actions.push((object, action));
    }
    Ok(actions)
}

fn grant_views(role: &str) -> Result<Vec<Action>> {
    let rollups = rollups()?;
    let mut actions = vec![];
    fence::grant(&format!("GRANT USAGE ON SCHEMA litellm_spend TO {}", quoted(role)))?;
    let daily = rollups.iter().filter_map(|r| builtin::by_day(&r.name));
    for name in rollups.iter().map(|r| r.name.as_str()).chain(daily) {
        let view = qualified(SCHEMA, name);
        fence::grant(&format!("GRANT SELECT ON {view} TO {}", quoted(role)))?;
        actions.push((format!("view {view}"), format!("may be read by {role}")));
    }
    // `monthly_global_spend()` reads this with its caller's rights.
    fence::grant(&format!("GRANT SELECT ON litellm_spend.coverage TO {}", quoted(role)))?;
    let ours = relation::extension_schema(EXTENSION)?.unwrap_or_default();
    let function = format!("{}(integer)", qualified(&ours, "monthly_global_spend"));
    fence::grant(&format!("GRANT EXECUTE ON FUNCTION {function} TO {}", quoted(role)))?;
    actions.push((format!("function {function}"), format!("may be called by {role}")));
    for (daily, hourly) in DAILY_REPORTS {
        if !rollups.iter().any(|r| r.name == hourly) {
            let views = format!("views {}, {}", qualified(SCHEMA, hourly), qualified(SCHEMA, daily));
            actions.push((views, format!("are not there: {ASK}  -- then grant again")));
        }
    }
    Ok(actions)
}

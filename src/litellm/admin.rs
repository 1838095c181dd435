//! Lets a role that is no superuser call everything that needs none, and read the status.
//!
//! That gives it no right on anybody's table: each function asks in addition whether its caller may act for
//! the owner of what it is to change or compare, and works as that owner. So what is granted here is EXECUTE
//! on our functions, USAGE on their schemas and SELECT on the views that show our state, never a table and
//! never spend: that is [`crate::litellm::reports::grant`].
//!
//! Whose rights: functions and views are ours, and granted as ourselves. The extension's schema may be
//! anybody's: USAGE on it is granted as its owner.

use crate::error::Result;
use crate::litellm::capture;
use crate::litellm::views::Action;
use crate::server::relation;
use crate::server::session::{self, Owner};
use crate::server::spi;
use crate::server::text::{EXTENSION, quoted};
use crate::state::fence;
use pgrx::prelude::*;

/// Functions that stay with superusers: they speak for every owner, give rights away, or let rows expire
/// before their time.
const OF_SUPERUSERS: [&str; 5] =
    ["spend_restored", "restored", "spend_grant_admin", "spend_revoke_admin", "maintain_at"];

/// The objects that are granted, as GRANT and REVOKE name them: those that the extension has in this version.
/// A view of other sessions' activity is for roles that may see that: to others it would say that no worker
/// is there. So is what is made of such a view.
fn rights(sees_sessions: bool) -> Result<Vec<(String, String)>> {
    spi::query(
        "WITH RECURSIVE member AS (
             SELECT d.classid, d.objid FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_extension e
                 ON e.oid = d.refobjid
             WHERE d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.deptype = 'e'
                 AND e.extname = 'litellm_spend'
         ), of_sessions(view) AS (
             SELECT c.oid FROM pg_catalog.pg_class c JOIN member m
                 ON m.classid = 'pg_catalog.pg_class'::regclass AND m.objid = c.oid
             WHERE c.relkind = 'v' AND pg_catalog.pg_get_viewdef(c.oid) LIKE '%pg_stat_%'
             UNION
             SELECT w.ev_class FROM of_sessions s JOIN pg_catalog.pg_depend d
                 ON d.refclassid = 'pg_catalog.pg_class'::regclass AND d.refobjid = s.view
                     AND d.classid = 'pg_catalog.pg_rewrite'::regclass
             JOIN pg_catalog.pg_rewrite w ON w.oid = d.objid)
         SELECT 'EXECUTE', pg_catalog.format('%s %s',
             CASE prokind WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END,
                                             p.oid::regprocedure)
         FROM pg_catalog.pg_proc p JOIN member m ON m.classid = 'pg_catalog.pg_proc'::regclass
             AND m.objid = p.oid
         WHERE p.proname <> ALL ($1::text[])
         UNION ALL
         SELECT 'SELECT', pg_catalog.format('TABLE %s', c.oid::regclass)
         FROM pg_catalog.pg_class c JOIN member m ON m.classid = 'pg_catalog.pg_class'::regclass
             AND m.objid = c.oid
         WHERE c.relkind = 'v'
           AND ($2 OR c.oid NOT IN (SELECT view FROM of_sessions))
         ORDER BY 1, 2",
        &[OF_SUPERUSERS.map(str::to_string).to_vec().into(), sees_sessions.into()],
        |r| Ok((spi::value(r, 1)?, spi::value(r, 2)?)),
    )
}

/// `spend_grant_admin()`: says what was granted, and what still takes a superuser.
pub fn grant(role: pg_sys::Oid) -> Result<Vec<Action>> {
    let name = relation::role_name(role)?;
    let grantee = quoted(&name);
    let mut actions = vec![];
    fence::grant(&format!("GRANT USAGE ON SCHEMA litellm_spend TO {grantee}"))?;
    actions.push(("SCHEMA litellm_spend".into(), format!("USAGE granted to {name}")));
    if let Some(schema) = relation::extension_schema(EXTENSION)?
        && let Some(owner) = relation::owner_of_closed_schema(role, &schema)?
    {
        let schema = quoted(&schema);
        Owner::role(owner).run(format!("GRANT USAGE ON SCHEMA {schema} TO {grantee}"))?;
        actions.push((format!("SCHEMA {schema}"), format!("USAGE granted to {name}")));
    }
    for (privilege, object) in rights(sees_sessions(role)?)? {
        fence::grant(&format!("GRANT {privilege} ON {object} TO {grantee}"))?;
        actions.push((object, format!("{privilege} granted to {name}")));
    }
    actions.extend(beyond(role, &grantee)?);
    Ok(actions)
}

/// `spend_revoke_admin()`: USAGE on the schemas stays, which the owner of a captured table needs.
pub fn revoke(role: pg_sys::Oid) -> Result<Vec<Action>> {
    let name = relation::role_name(role)?;
    let mut actions = vec![];
    for (privilege, object) in rights(true)? {
        fence::grant(&format!("REVOKE {privilege} ON {object} FROM {}", quoted(&name)))?;
        actions.push((object, format!("{privilege} revoked from {name}")));
    }
    Ok(actions)
}

fn sees_sessions(role: pg_sys::Oid) -> Result<bool> {
    session::may_act_for(role, pg_sys::Oid::from(pg_sys::ROLE_PG_MONITOR))
}

/// A row for each thing that the role still cannot do, with what would let it.
fn beyond(role: pg_sys::Oid, grantee: &str) -> Result<Vec<Action>> {
    let mut actions = vec![];
    for (name, owner) in capture::tables_of_others(role)? {
        let remedy = format!("still takes its owner: GRANT {} TO {grantee};", quoted(&owner));
        actions.push((format!("TABLE {name}"), remedy));
    }
    if !sees_sessions(role)? {
        let granted = rights(false)?;
        for (_, view) in rights(true)?.into_iter().filter(|right| !granted.contains(right)) {
            let remedy =
                format!("still takes pg_monitor, which sees all sessions: GRANT pg_monitor TO {grantee};");
            actions.push((view, remedy));
        }
    }
    let superusers = [
        "CREATE EXTENSION, ALTER EXTENSION ... UPDATE",
        "shared_preload_libraries",
        "spend_restored(), spend_grant_admin(), spend_revoke_admin(), litellm_spend.maintain_at()",
        "spend_detach() of a table that was dropped, or of kept history",
    ];
    actions.extend(superusers.map(|what| (what.into(), "still takes a superuser".into())));
    Ok(actions)
}

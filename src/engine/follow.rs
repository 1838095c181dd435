//! What becomes of a declared rollup when its source gets another owner or is dropped, or its live view is
//! gone, another's, or as an older version made it.
//!
//! What is changed is handed over as in `create`: nothing of an owner's is evaluated as ourselves.

use crate::citus;
use crate::engine::create::{give_to_owner, make_view};
use crate::engine::define::{IS_OLD, bring_over};
use crate::engine::source;
use crate::error::{Error, Result};
use crate::server::locks::Patience;
use crate::server::relation::{self, Table};
use crate::server::session::{Owner, advised};
use crate::server::spi::{self, Found};
use crate::server::text::literal;
use crate::state::definition::Definition;
use crate::state::fence::Fence;
use crate::state::restore::HERE;
use crate::state::sources::CHANGE_LOG;

/// The rollups whose source was dropped or has another owner, or whose live view is gone, another's, or as an
/// older version made it. Only looks: what is to be done may call code of an owner's, and is a step of that
/// rollup's own.
pub fn strays() -> Result<Vec<String>> {
    spi::query(
        &format!(
            "SELECT r.name FROM litellm_spend.rollup r JOIN litellm_spend.source s ON s.name = r.source
             LEFT JOIN pg_catalog.pg_class c ON c.oid = s.relation
             LEFT JOIN pg_catalog.pg_class t ON t.relname = r.name || '_rollup'
                 AND t.relnamespace = 'litellm_spend'::regnamespace
             LEFT JOIN pg_catalog.pg_class v ON v.relname = r.name AND v.relnamespace = t.relnamespace
             WHERE s.name <> {} AND s.origin = {HERE}
               AND (c.oid IS NULL OR r.definition IS NOT NULL AND t.oid IS NOT NULL
                    AND (t.relowner <> c.relowner OR r.owner <> c.relowner
                         OR v.relowner IS DISTINCT FROM c.relowner OR {IS_OLD}))
             -- One whose source was dropped before an update.
             UNION ALL
             SELECT r.name FROM litellm_spend.rollup r
             WHERE r.source IS NULL AND r.definition IS NOT NULL AND {IS_OLD}
               AND pg_catalog.to_regclass(pg_catalog.format('litellm_spend.%I', r.name || '_rollup')) IS NOT NULL
             ORDER BY 1",
            literal(CHANGE_LOG)
        ),
        &[],
        |r| spi::value::<String>(r, 1),
    )
}

/// Deals with one of them: it follows its source to another owner, gets its live view again or anew, or
/// becomes history.
pub fn settle(name: &str, patience: Patience) -> Result<()> {
    let Some(fence) = Fence::take(name, patience)? else { return Ok(()) };
    let Some(table) = Table::find(fence.relation)? else {
        citus::require_not_hidden(fence.relation)?;
        return release(fence);
    };
    let (mut definition, known) = (fence.filled()?.clone(), Owner::role(fence.owner));
    let owner = Owner::of(table.oid)?;
    // 1. what has its names is its own. By name alone it could be another rollup's, or a user's. (REASSIGN
    //    OWNED has given it to the new owner already.)
    let owners = &[known, owner];
    let tables = definition.tables();
    let tables = tables.iter().map(|name| require_own(name, "r", owners)).collect::<Result<Vec<_>>>()?;
    if relation::find_relation(&definition.live_view())?.is_some() {
        require_own(&definition.live_view(), "v", owners)?;
    }
    // 2. another owner gets it only if nothing of the former one's hangs on it, which would then run as the
    //    new one.
    if known != owner && (!known.may_pass_to(owner)? || !is_bare(&tables)?) {
        return Err(known.lost(table.qualified(), table.owner));
    }
    give_to_owner(&definition, owner)?;
    // 3. the view.
    bring_over_noted(&mut definition)?;
    make_view(&definition, owner, &definition.live_query())
}

/// Brings a definition over that an older version made.
fn bring_over_noted(definition: &mut Definition) -> Result<()> {
    if bring_over(definition) {
        let sql = "UPDATE litellm_spend.rollup SET definition = $2::jsonb WHERE name = $1";
        let text = serde_json::to_string(&definition)?;
        spi::run(sql, &[definition.name.as_str().into(), text.into()])?;
    }
    Ok(())
}

fn require_own(name: &str, kind: &str, owners: &[Owner]) -> Result<Table> {
    let found = Table::named(name)?.ok_or_else(|| Error::NoTable(name.into()))?;
    if found.kind == kind && owners.contains(&Owner::role(found.owner_oid)) {
        return Ok(found);
    }
    Err(owners[0].lost(name.into(), found.owner))
}

/// Nothing is on the rollup's tables that we have not made: no trigger, rule, policy or CHECK, no index with
/// an expression but ours. (Citus has a trigger of the server's own kind on each distributed table.)
fn is_bare(tables: &[Table]) -> Result<bool> {
    let sql = "SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = ANY ($1) AND NOT tgisinternal
               UNION ALL SELECT FROM pg_catalog.pg_rewrite WHERE ev_class = ANY ($1)
               UNION ALL SELECT FROM pg_catalog.pg_policy WHERE polrelid = ANY ($1)
               UNION ALL SELECT FROM pg_catalog.pg_statistic_ext WHERE stxrelid = ANY ($1)
               UNION ALL SELECT FROM pg_catalog.pg_constraint WHERE conrelid = ANY ($1)
                   AND contype NOT IN ('p', 'u', 'n')
               UNION ALL SELECT FROM pg_catalog.pg_index i WHERE indrelid = ANY ($1)
                   AND (indexprs IS NOT NULL OR indpred IS NOT NULL)
                   AND EXISTS (SELECT FROM pg_catalog.pg_depend d
                       WHERE d.classid = 'pg_catalog.pg_class'::regclass
                               AND d.objid = i.indexrelid AND d.refclassid = 'pg_catalog.pg_proc'::regclass)";
    let tables: Vec<_> = tables.iter().map(|table| table.oid).collect();
    Ok(!spi::query(sql, &[tables.into()], |_| Ok(())).any()?)
}

/// The source was dropped: the rollup keeps what was merged, and its live view shows that.
fn release(mut fence: Fence) -> Result<()> {
    let owner = Owner::role(fence.owner);
    if let Some(definition) = &mut fence.definition
        && relation::find_relation(&definition.table())?.is_some()
    {
        require_own(&definition.table(), "r", &[owner])?;
        bring_over_noted(definition)?;
        make_view(definition, owner, &definition.history_query())?;
    }
    // A watermark belonged to the source's owner, whom nobody knows any more.
    let by = if fence.definition.is_none() { "  -- as a superuser" } else { "" };
    spi::run(
        "UPDATE litellm_spend.rollup SET source = NULL, last_error_at = clock_timestamp(),
                 last_error = $2
             WHERE name = $1",
        &[
            fence.name.as_str().into(),
            advised(
                "its source was dropped; it keeps what had been merged",
                &format!("SELECT spend_rollup_drop({});{by}", literal(&fence.name)),
            )
            .into(),
        ],
    )?;
    source::forget_unused_sources()
}

//! Materialized views over a table that was partitioned. They go on showing rows of the old table, until they are made anew
//! over the new one: with its query, owner, indexes and grants.
//!
//! Lock: ACCESS EXCLUSIVE on the materialized view, waited for at most `litellm_spend.lock_timeout`, while its query runs.

use crate::blueprint::{Blueprint, View};
use crate::catalog::{self, Table, value};
use crate::definition::quoted;
use crate::error::Result;
use crate::locks;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MaterializedView {
    /// Qualified.
    name: String,
    owner: String,
    query: String,
    /// The statements for its indexes and grants.
    after: Vec<String>,
}

/// Those that read the table.
pub fn describe(blueprint: &Blueprint) -> Result<Vec<MaterializedView>> {
    let describe = |view: &View| {
        let after = catalog::query(
            "SELECT pg_catalog.pg_get_indexdef(indexrelid) FROM pg_catalog.pg_index WHERE indrelid = $1
             UNION ALL SELECT pg_catalog.format('GRANT %s ON %s TO %s', x.privilege_type, $2,
                 CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(x.grantee)) END)
             FROM pg_catalog.pg_class c, pg_catalog.aclexplode(c.relacl) AS x WHERE c.oid = $1",
            &[view.oid.into(), view.name.as_str().into()],
            |r| value(r, 1),
        )?;
        let owner = Table::find(view.oid)?.map(|table| table.owner).unwrap_or_default();
        Ok(MaterializedView { name: view.name.clone(), owner, query: view.query.clone(), after })
    };
    blueprint.materialized_views.iter().map(describe).collect()
}

impl MaterializedView {
    pub fn make_anew(self) -> Result<()> {
        let MaterializedView { name, owner, query, after } = self;
        if let Some(oid) = catalog::find_relation(&name)? {
            locks::lock(&format!("DROP MATERIALIZED VIEW {name}"), &name, oid)?;
        }
        let run = |sql: String| catalog::execute(&sql, &[]).map(drop);
        // Its query is the owner's code: REFRESH runs it as the owner.
        run(format!("CREATE MATERIALIZED VIEW {name} AS {query} WITH NO DATA"))?;
        run(format!("ALTER MATERIALIZED VIEW {name} OWNER TO {}", quoted(&owner)))?;
        run(format!("REFRESH MATERIALIZED VIEW {name}"))?;
        after.into_iter().try_for_each(run)
    }
}

//! Rollups whose table Citus distributes as their source: each node merges its own rows, and shows its own.
//!
//! ```text
//!                   coordinator                      a shard: source, rollup, NAME_merged side by side
//!   merge   fence, window (a, b], watermark := b     groups of (a, b] added; b noted with each value
//!   view    committed_to = a  ───────────────────>   rollup + rows above a and the value's number
//! ```
//!
//! One would think that rollup and tail could be told apart by the watermark, as on one server. But that is
//! here, and the rows are there: no snapshot is of several nodes, and what a merge wrote becomes visible on
//! one node after the other, each with its `COMMIT PREPARED`. So each shard says itself how far it is merged:
//! `NAME_merged` has, for each value of the distribution column, the end of the last window that had rows of
//! it. A merge writes a shard's groups and numbers over one connection: Citus uses no two to modify shards
//! that are side by side, or fails. So in any snapshot of a shard, rows of a value up to its number are in
//! the rollup, and those above are not. A shard answers with one statement, one snapshot; the live view is
//! exact as a query over the rows themselves is.
//!
//! Where to begin to read is another matter, which the number of a value cannot say: `committed_to` can, what
//! is known to be committed on all nodes. At first it is the watermark before the last merge, for no merge
//! begins before the one before it is over everywhere; then the worker asks the nodes, and it is the
//! watermark.
//!
//! Exactly once:
//!
//! - The watermark, here, and the groups, there, commit together: in two phases, because a merge writes to
//!   several shards. What Citus writes over a single connection it would commit before us; so a source of one
//!   shard gets a table of this node ([`crate::engine::define`]).
//! - One merge at a time, also on the nodes. The fence keeps others out until the commit here; after that
//!   each node is asked for transactions that still hold RowExclusiveLock on a shard of the rollup, prepared
//!   ones included ([`await_end`]). What a failed merge has prepared is there until Citus undoes it. Nothing
//!   is merged meanwhile, and the status says so.
//!
//! What remains: Citus moves, splits and promotes shards without looking for what is prepared on them, and
//! that is lost there, of the source and of the rollup.

use crate::citus::nodes::{Answer, Node, Which, ask, nodes, run};
use crate::citus::{citus, distributed};
use crate::error::{Error, Result};
use crate::server::locks::Patience;
use crate::server::relation;
use crate::server::session::{Elevated, Owner};
use crate::server::spi;
use crate::server::text::quoted;
use pgrx::prelude::*;

/// The column by which Citus distributes the relation by hash, and the number of its shards.
pub fn distribution(relation: pg_sys::Oid) -> Result<Option<(String, i64)>> {
    let Some(citus) = citus()? else { return Ok(None) };
    if distributed(citus, &[relation])?.is_empty() {
        return Ok(None);
    }
    let found = citus.query(
        "SELECT pg_catalog.column_to_column_name(logicalrelid, partkey),
             (SELECT count(*) FROM pg_catalog.pg_dist_shard s WHERE s.logicalrelid = p.logicalrelid)
         FROM pg_catalog.pg_dist_partition p WHERE logicalrelid::oid = $1 AND partmethod = 'h'",
        &[relation.into()],
        |r| Ok((spi::value(r, 1)?, spi::value(r, 2)?)),
    )?;
    Ok(found.into_iter().next())
}

/// Distributes an empty table of ours by `column`, with its shards beside those of `source`. As ourselves:
/// the owner of the source, to whom it is given then, may make nothing in our schema.
pub fn distribute(table: &str, column: &str, source: &str) -> Result<()> {
    // Shard by shard: after several at once Citus lets the transaction give no function to anybody.
    let _sequential = Elevated::enter()?.with(c"citus.multi_shard_modify_mode", c"sequential");
    spi::run(
        "SELECT pg_catalog.create_distributed_table($1::text::regclass, $2, colocate_with => $3)",
        &[table.into(), column.into(), source.into()],
    )
}

/// Fails unless each node does the merge of a window by itself, as Citus plans it.
pub fn require_by_shard(rollup: &str, owner: Owner, merge: &str) -> Result<()> {
    let _owner = owner.act().with(c"citus.explain_distributed_queries", c"off");
    let sql = format!("EXPLAIN (COSTS false) {merge}");
    let plan = spi::fresh(&sql, &[], |r| spi::value::<String>(r, 1))?;
    match plan.into_iter().find(|line| line.contains("INSERT/SELECT method")) {
        None => Ok(()),
        Some(line) => {
            let reason = format!("Citus would not merge it where its rows are: {}.", line.trim());
            Err(Error::NotDistributable { rollup: rollup.into(), reason })
        }
    }
}

/// Waits until all that has written to the shards of a rollup's table has ended on their nodes: a `COMMIT
/// PREPARED` may be under way, or have failed. And opens our schema to the owner on each other node than this
/// one, who writes shards there, and as whom Citus makes those that it moves there.
pub fn await_end(rollup: &str, table: &str, patience: Patience) -> Result<()> {
    let (Some(citus), Some(table)) = (citus()?, relation::find_relation(table)?) else { return Ok(()) };
    let (nodes, owner) = (nodes(citus, &[table], Which::All)?, Owner::of(table)?);
    let mut opened = false;
    loop {
        let answers = ask::<Answer>(owner, table, &nodes, |node| node.writers(None))?;
        let shut = answers.iter().filter(|(node, answer)| node.is_shut(answer));
        let shut: Vec<&Node> = shut.map(|(node, _)| *node).collect();
        if !shut.is_empty() && !opened {
            let grant = format!("GRANT USAGE, CREATE ON SCHEMA litellm_spend TO {}", quoted(&owner.name()?));
            run(table, &shut, &grant)?;
            opened = true;
            continue;
        }
        let Some((node, _)) = answers.into_iter().find(|(_, answer)| !answer.writers.is_empty()) else {
            return Ok(());
        };
        if !patience.try_again() {
            return Err(Error::StillCommitting { rollup: rollup.into(), node: node.address() });
        }
    }
}

/// The lowest number that a row of `source` has, asked of the nodes by connections of their own: to those of
/// the transaction Citus would not let us put the rollup's shards beside what they have read.
pub fn first_value(source: pg_sys::Oid, column: &str) -> Result<Option<i64>> {
    let Some(citus) = citus()? else { return Ok(None) };
    let nodes = nodes(citus, &[source], Which::Holding)?;
    let firsts =
        ask::<[Option<i64>; 1]>(Owner::of(source)?, source, &nodes, |node| node.first_value(column))?;
    Ok(firsts.into_iter().filter_map(|(_, [first])| first).min())
}

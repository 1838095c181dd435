//! Sources that Citus distributes: which transactions may still add rows to their shards. Nothing of Citus is
//! linked: what it is found by is its catalog, and without that nothing here does anything. May call state
//! and server.
//!
//! One would think that the locks on the coordinator are enough: an inserter holds RowExclusiveLock on the
//! distributed table there, before it draws a number and until its transaction ends. But rows become visible
//! on the nodes. After the coordinator's commit a `COMMIT PREPARED` may still be under way, or have failed,
//! and is repeated by Citus minutes later; and a connection that breaks in a COMMIT leaves its transaction to
//! the node. So a row could appear behind the watermark, and be missing for ever.
//!
//! ```text
//!   merged    | window             | safe here, but open on a node | may still be drawn
//! ------------+--------------------+-------------------------------+---------------------> sequence
//!         watermark            safe end                 safe by the coordinator's locks
//! ```
//!
//! Every such transaction holds RowExclusiveLock on a shard, on the shard's node, or waits for it, until it
//! ends; a prepared one too, also after a restart. So the window is found twice, by the same rule
//! ([`crate::state::window`]): once with the sequence's last value and the holders on the coordinator, and
//! then with what is safe by that and the holders on the nodes, which are read after it. At that moment a
//! transaction that drew such a number has ended on the coordinator: its part on a node is over, or is one of
//! those holders, for the row was written, under that lock, before the coordinator could commit.
//!
//! A shard that moves is looked for where it is now. What was open on its old node never becomes visible:
//! Citus drops that copy.
//!
//! What remains: a single INSERT of a coordinator's session that died, or was cancelled, before the node had
//! read the statement. Citus runs it there without a transaction block, so it is neither seen nor undone.
//! Nobody was told that it was committed.
//!
//! Numbers drawn on another node come from a range of that node's, beyond the coordinator's. They are not
//! merged, and the source stops.

mod nodes;
pub mod spread;

use crate::citus::nodes::{Answer, Which, ask, nodes};
use crate::error::{Error, Result};
use crate::server::relation;
use crate::server::session::{Elevated, Owner};
use crate::server::spi::{self, Found};
use crate::state::window::Holder;
use pgrx::prelude::*;
use std::collections::BTreeSet;

/// The first number that is not the coordinator's: the upper 16 bits are the node's.
const OF_OTHER_NODES: i64 = 1 << 48;

/// Citus's catalog, as the role that it belongs to: nobody but a superuser makes a table in pg_catalog,
/// whether or not the extension is there. `None`: there is none.
fn citus() -> Result<Option<Owner>> {
    let namespace = pg_sys::PG_CATALOG_NAMESPACE.into();
    // SAFETY: looks a name up.
    let catalog = unsafe { pg_sys::get_relname_relid(c"pg_dist_partition".as_ptr(), namespace) };
    if catalog == pg_sys::InvalidOid { Ok(None) } else { Owner::of(catalog).map(Some) }
}

/// Those of the relations that are in Citus's catalog, with how each is distributed: `h` by hash, anything
/// else otherwise or not at all.
fn distributed(citus: Owner, relations: &[pg_sys::Oid]) -> Result<Vec<(String, bool)>> {
    let _citus = citus.act();
    spi::current(
        "SELECT logicalrelid::text, partmethod = 'h' FROM pg_catalog.pg_dist_partition
         WHERE logicalrelid::oid = ANY ($1) ORDER BY 2, 1",
        &[relations.to_vec().into()],
        |r| Ok((spi::value(r, 1)?, spi::value(r, 2)?)),
    )
}

/// While it lives, what is made is made on this node alone. A live view on another node would show what is
/// there, not what is true; and Citus would make it on nodes where its tables are not.
pub fn on_this_node() -> Result<Option<Elevated>> {
    Ok(match citus()? {
        None => None,
        Some(_) => Some(Elevated::enter()?.with(c"citus.enable_ddl_propagation", c"off")),
    })
}

/// Refuses a table of Citus's, of whatever kind.
pub fn require_not_distributed(relation: pg_sys::Oid) -> Result<()> {
    let Some(citus) = citus()? else { return Ok(()) };
    let found = distributed(citus, &relation::relation_tree(relation)?)?;
    found.into_iter().next().map_or(Ok(()), |(relation, _)| Err(Error::Distributed(relation)))
}

/// Whether Citus distributes the relation, or one that inherits from it.
pub fn is_distributed(relation: pg_sys::Oid) -> Result<bool> {
    let Some(citus) = citus()? else { return Ok(false) };
    Ok(!distributed(citus, &relation::relation_tree(relation)?)?.is_empty())
}

/// Refuses what Citus distributes otherwise than by hash, reference tables included, and a source on another
/// node than the coordinator. Returns whether it is distributed.
pub fn require_by_hash(relation: pg_sys::Oid) -> Result<bool> {
    let Some(citus) = citus()? else { return Ok(false) };
    let found = distributed(citus, &relation::relation_tree(relation)?)?;
    match found.into_iter().next() {
        None => Ok(false),
        Some((relation, false)) => Err(Error::NotByHash(relation)),
        Some((relation, true)) => {
            let sql = "SELECT groupid = 0 FROM pg_catalog.pg_dist_local_group";
            let here = citus.query(sql, &[], |r| spi::value::<bool>(r, 1))?;
            if here == [true] { Ok(true) } else { Err(Error::NotCoordinator(relation)) }
        }
    }
}

/// Refuses a relation that is there, and that Citus hides from queries as it does its shards: a local table
/// that it took in, in whose place it has put another.
pub fn require_not_hidden(relation: pg_sys::Oid) -> Result<()> {
    let Some(hidden) = relation::cached_name(relation) else { return Ok(()) };
    if citus()?.is_some() { Err(Error::NotByHash(hidden)) } else { Ok(()) }
}

/// The transactions that hold RowExclusiveLock on a shard of `relations`, or wait for it. `None`: Citus
/// distributes none of them.
///
/// Asked as the owner of `source`, whom Citus lets in on the nodes: its queries run as that role.
pub fn writers(
    source: pg_sys::Oid,
    sequence: pg_sys::Oid,
    relations: &[pg_sys::Oid],
) -> Result<Option<BTreeSet<Holder>>> {
    let Some(citus) = citus()? else { return Ok(None) };
    if distributed(citus, relations)?.is_empty() {
        return Ok(None);
    }
    // Numbers are also drawn on a node that holds no shard.
    let nodes = nodes(citus, relations, Which::All)?;
    let owner = Owner::of(source)?;
    let (mut writers, mut drawn) = (BTreeSet::new(), false);
    let sequence_name = relation::relation_name(sequence)?;
    for (node, answer) in ask::<Answer>(owner, source, &nodes, |node| node.writers(Some(&sequence_name)))? {
        let holder = |transaction| Holder::on_node(node.group, transaction);
        writers.extend(answer.writers.iter().map(|transaction| holder(transaction)));
        drawn |= answer.last_value.is_some_and(|last| last >= OF_OTHER_NODES);
    }
    if drawn {
        require_own_numbers(owner, source, sequence)?;
    }
    Ok(Some(writers))
}

/// A node has drawn numbers of its own range: fails if there are rows of them. They could not be told from
/// rows that are still to come.
fn require_own_numbers(owner: Owner, source: pg_sys::Oid, sequence: pg_sys::Oid) -> Result<()> {
    let relation = relation::relation_name(source)?;
    let column = relation::numbered_column(source, sequence)?;
    let sql = format!("SELECT {column}::bigint FROM {relation} WHERE {column} >= {OF_OTHER_NODES} LIMIT 1");
    let number = owner.fresh(&sql, &[], |r| spi::value::<i64>(r, 1)).one()?;
    number.map_or(Ok(()), |number| Err(Error::NumberedOnNode { relation, column, number }))
}

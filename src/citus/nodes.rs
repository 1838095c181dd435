//! Citus's nodes, and what they are asked: over connections of their own, outside of our transaction.

use crate::error::{Error, Result};
use crate::server::relation;
use crate::server::session::Owner;
use crate::server::spi;
use crate::server::text::{literal, quoted};
use pgrx::prelude::*;
use pgrx::spi::SpiHeapTupleData;
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// A node, and the shards that it holds of some relations.
pub struct Node {
    name: String,
    port: i32,
    pub group: i32,
    shards: Vec<String>,
}

impl Node {
    pub fn address(&self) -> String {
        format!("{}:{}", self.name, self.port)
    }

    fn is_coordinator(&self) -> bool {
        self.group == 0
    }

    /// The query about the writers of its shards, which returns one row with one value. Shards of ours have
    /// no sequence.
    pub fn writers(&self, sequence: Option<&str>) -> String {
        let shards: Vec<String> = self.shards.iter().map(|shard| literal(shard)).collect();
        let privilege =
            |privilege| format!("pg_catalog.has_schema_privilege('litellm_spend', '{privilege}')");
        let let_in = match sequence {
            Some(_) => "true".into(),
            // Here the owner was let in by a grant, and makes nothing. Until that is committed nobody else
            // sees the shards either.
            None if self.is_coordinator() => privilege("USAGE"),
            None => [privilege("USAGE"), privilege("CREATE")].join(" AND "),
        };
        format!(
            "SELECT pg_catalog.json_build_object(
                 'writers', (SELECT coalesce(pg_catalog.json_agg(DISTINCT virtualtransaction), '[]')
                     FROM pg_catalog.pg_locks
                     WHERE locktype = 'relation' AND mode = 'RowExclusiveLock'
                       AND database = (SELECT oid FROM pg_catalog.pg_database
                           WHERE datname = pg_catalog.current_database())
                       AND relation IN (SELECT CASE WHEN {let_in} THEN pg_catalog.to_regclass(shard)::oid END
                                        FROM pg_catalog.unnest(ARRAY[{shards}]::text[]) AS shard)),
                 'last_value', (SELECT pg_catalog.pg_sequence_last_value(pg_catalog.to_regclass({sequence})::oid)),
                 'let_in', {let_in})",
            shards = shards.join(", "),
            sequence = sequence.map_or("NULL".into(), literal),
        )
    }

    /// Whether our schema is still to be opened there to whoever has given that answer. On the coordinator it
    /// is never: what others have made in it there would be in the way of all.
    pub fn is_shut(&self, answer: &Answer) -> bool {
        !answer.let_in && !self.is_coordinator()
    }

    /// The query about its lowest number. It returns a list of one number, or of null.
    pub fn first_value(&self, column: &str) -> String {
        let column = quoted(column);
        let first = |shard| format!("SELECT min({column})::bigint AS first FROM {shard}");
        let shards = self.shards.iter().map(first).collect::<Vec<_>>().join(" UNION ALL ");
        format!("SELECT pg_catalog.json_build_array(min(first)) FROM ({shards}) AS shards")
    }
}

/// The answer of a node.
#[derive(Deserialize)]
pub struct Answer {
    pub writers: Vec<String>,
    pub last_value: Option<i64>,
    /// Whether the schema is open to whoever asks.
    pub let_in: bool,
}

/// The nodes that hold shards of `relations`, or may get some.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Which {
    Holding,
    /// Those that hold none yet, too.
    All,
}

pub fn nodes(citus: Owner, relations: &[pg_sys::Oid], which: Which) -> Result<Vec<Node>> {
    let _citus = citus.act();
    // shard_name() leaves out the schema public.
    spi::current(
        "SELECT n.nodename, n.nodeport, n.groupid,
                array_remove(array_agg(CASE ns.nspname WHEN 'public' THEN 'public.' ELSE '' END
                                       || pg_catalog.shard_name(s.logicalrelid, s.shardid)), NULL)
         FROM pg_catalog.pg_dist_node n LEFT JOIN (
                 pg_catalog.pg_dist_placement p JOIN pg_catalog.pg_dist_shard s USING (shardid)
                 JOIN pg_catalog.pg_class c ON c.oid = s.logicalrelid AND c.oid = ANY ($1)
                 JOIN pg_catalog.pg_namespace ns ON ns.oid = c.relnamespace) USING (groupid)
         WHERE n.noderole = 'primary'
         GROUP BY 1, 2, 3, n.isactive
         HAVING count(s.shardid) > 0 OR $2 AND n.groupid <> 0 AND n.isactive ORDER BY 3",
        &[relations.to_vec().into(), (which == Which::All).into()],
        |r| {
            let (name, port) = (spi::value(r, 1)?, spi::value(r, 2)?);
            Ok(Node { name, port, group: spi::value(r, 3)?, shards: spi::value(r, 4)? })
        },
    )
}

/// Runs statements on nodes, all at once.
const ON_NODES: &str = "SELECT success, result FROM pg_catalog.master_run_on_worker($1, $2, $3, true)";

/// Whether a node succeeded, and its answer.
fn answer(row: &SpiHeapTupleData) -> Result<(bool, String)> {
    Ok((spi::value(row, 1)?, spi::value(row, 2)?))
}

/// Asks all nodes at once. One with shards that does not answer is an error: nobody knows what is still open
/// there.
pub fn ask<T: DeserializeOwned>(
    owner: Owner,
    relation: pg_sys::Oid,
    nodes: &[Node],
    question: impl Fn(&Node) -> String,
) -> Result<Vec<(&Node, T)>> {
    let questions: Vec<String> = nodes.iter().map(question).collect();
    let (names, ports) = addresses(nodes.iter());
    let answers = owner.query(ON_NODES, &[names.into(), ports.into(), questions.into()], answer)?;
    let mut understood = vec![];
    for (node, (success, answer)) in nodes.iter().zip(answers) {
        match serde_json::from_str(&answer) {
            Ok(answer) if success => understood.push((node, answer)),
            _ if node.shards.is_empty() => {}
            _ => {
                let (relation, node) = (relation::relation_name(relation)?, node.address());
                return Err(Error::NodeSilent { relation, node, answer });
            }
        }
    }
    Ok(understood)
}

/// Runs a statement about what is ours on nodes, for a relation, as ourselves. Not in the transaction: it
/// stays done. Fails with what a node says against it.
pub fn run(relation: pg_sys::Oid, nodes: &[&Node], sql: &str) -> Result<()> {
    let (names, ports) = addresses(nodes.iter().copied());
    let sql = vec![sql.to_string(); nodes.len()];
    let answers = spi::fresh(ON_NODES, &[names.into(), ports.into(), sql.into()], answer)?;
    let refused = nodes.iter().zip(answers).find(|(_, (success, _))| !success);
    refused.map_or(Ok(()), |(node, (_, answer))| {
        let (relation, node) = (relation::relation_name(relation)?, node.address());
        Err(Error::NodeSilent { relation, node, answer })
    })
}

fn addresses<'a>(nodes: impl Iterator<Item = &'a Node>) -> (Vec<String>, Vec<i32>) {
    nodes.map(|node| (node.name.clone(), node.port)).unzip()
}

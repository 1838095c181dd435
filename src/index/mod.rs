//! Indexes for what LiteLLM asks of its spend log: which there are, what they would cost here, and their
//! building; and what a release of LiteLLM does to the table and its indexes.
//!
//! LiteLLM's schema tools drop plain indexes that they do not know, and LiteLLM's own index job renames those
//! that equal one of its own. Partial indexes and indexes of expressions both leave alone, so ours are
//! nothing else. They serve LiteLLM's queries as they are. Each partition has its own, none belongs to the
//! partitioned table: a partition that LiteLLM writes to stays without, and inserts pay nothing.
//!
//! May call LiteLLM's room, partition, state and server.

pub mod build;
pub mod catalogue;
pub mod plan;
pub mod upgrade;

//! The SQL functions. Each checks who calls and where, and hands over to the rooms below. Their COMMENTs and
//! grants are in sql/api.sql.

pub mod arguments;
pub mod call;
pub mod indexes;
pub mod litellm;
pub mod partitions;
pub mod rollups;

//! Rollups of any source that a sequence numbers: what a user says one is, which rows are safe, merging,
//! recomputing, comparing. Why no row is counted twice: docs/internals.md. May call citus, state and server,
//! and where a rebuild reads what a built-in rollup must equal, LiteLLM's room.

mod columns;
pub mod create;
mod decimal;
pub mod define;
pub mod drop;
pub mod follow;
mod groups;
mod key;
pub mod rebuild;
pub mod rollup;
pub mod source;
pub mod statements;
pub mod summarize;
pub mod tail;

//! LiteLLM's table and views: capture, the built-in rollups, backfill, repair, what changes around them. May
//! call the engine and the rooms below it.

pub mod admin;
pub mod attach;
pub mod backfill;
pub mod builtin;
pub mod capture;
pub mod detach;
pub mod functions;
pub mod hours;
pub mod raw;
pub mod repair;
pub mod reports;
pub mod spend_log;
pub mod triggers;
pub mod views;
pub mod watch;

//! litellm_spend: exact, always-fresh spend rollups for LiteLLM, inside Postgres.
//!
//! ```text
//!  api         the SQL functions
//!  worker      processes, and one round of everything
//!  index       indexes for what LiteLLM asks of its log
//!  partition   tables divided by time: conversion, reversion, upkeep
//!  litellm     LiteLLM's table and views: capture, built-in rollups, backfill, repair
//!  engine      rollups of any source that a sequence numbers
//!  citus       sources whose rows are on other nodes
//!  state       what is stored, in the tables of schema litellm_spend
//!  server      how we talk to PostgreSQL
//! ```
//! A room may call those below it, and errors and settings; tests/rooms.rs fails where it calls one above.
//! What lives in a room stands in the head of its mod.rs. Words: docs/reference.md. How to build and test:
//! CONTRIBUTING.md.

mod api;
mod citus;
mod engine;
mod error;
mod guc;
mod index;
#[cfg(feature = "pg_test")]
mod inside;
mod litellm;
mod partition;
mod server;
mod state;
mod worker;

use pgrx::prelude::*;

::pgrx::pg_module_magic!(name, version);

extension_sql_file!("../sql/schema.sql", name = "schema", bootstrap);
extension_sql_file!(
    "../sql/views.sql",
    name = "views",
    requires = [
        "schema",
        api::rollups::litellm_spend::tail,
        api::rollups::litellm_spend::is_free,
        api::rollups::litellm_spend::served_until
    ]
);
extension_sql_file!("../sql/api.sql", name = "api", finalize);

#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    guc::register();
    server::guard::install();
    server::hint::install();
    // pg_upgrade starts the server to copy catalogs: an XID of ours would be one that it does not know of.
    // SAFETY: flags of the postmaster.
    if unsafe { pg_sys::process_shared_preload_libraries_in_progress && !pg_sys::IsBinaryUpgrade } {
        worker::launcher::register();
        worker::hook::install();
    }
}

/// For pgrx-tests.
#[cfg(test)]
pub mod pg_test {
    pub fn setup(_options: Vec<&str>) {}

    pub fn postgresql_conf_options() -> Vec<&'static str> {
        vec![]
    }
}

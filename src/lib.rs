//! litellm_spend: exact, always-fresh spend rollups for LiteLLM, inside Postgres.
//!
//! ```text
//!  enter    api, api_partition (SQL functions)      worker (loop)   builder   launcher   hook
//!           tick (one round of everything)
//!  act      capture   watch   views   declare   declaration   source   rollup   rebuild   backfill   repair
//!           convert   swap   revert   copy   plan   blueprint   (a table is partitioned, or plain again)
//!           maintain   drain   place   expire   purge   proof   archive   (its partitions)
//!  decide   window   definition   statements   litellm   builtin   partition   pure Rust, no pgrx
//!  base     catalog   conversion   policy   frozen   restore   (state)   layout   spread   expression   rewrite
//!           locks   session   limit   guard   guc   log   error   hint
//! ```
//! Calls go downward, but for a few that name LiteLLM's table. Words: docs/reference.md. How to build and test: CONTRIBUTING.md.

mod admin;
mod api;
mod api_partition;
mod archive;
mod backfill;
mod blueprint;
mod builder;
mod builtin;
mod capture;
mod catalog;
mod conversion;
mod convert;
mod copy;
mod declaration;
mod declare;
mod definition;
mod drain;
mod error;
mod expire;
mod expression;
mod frozen;
mod guard;
mod guc;
mod hint;
mod hook;
mod launcher;
mod layout;
mod limit;
mod litellm;
mod locks;
mod log;
mod maintain;
mod partition;
mod place;
mod plan;
mod policy;
mod proof;
mod purge;
mod rebuild;
mod repair;
mod restore;
mod revert;
mod rewrite;
mod rollup;
mod session;
mod source;
mod spread;
mod statements;
mod swap;
mod tick;
mod views;
mod watch;
mod window;
mod worker;

use pgrx::prelude::*;

::pgrx::pg_module_magic!(name, version);

extension_sql_file!("../sql/schema.sql", name = "schema", bootstrap);
extension_sql_file!("../sql/views.sql", name = "views", requires = ["schema", api::litellm_spend::tail]);
extension_sql_file!("../sql/api.sql", name = "api", finalize);

#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    guc::register();
    guard::install();
    hint::install();
    // SAFETY: a flag of the postmaster.
    if unsafe { pg_sys::process_shared_preload_libraries_in_progress } {
        launcher::register();
        hook::install();
    }
}

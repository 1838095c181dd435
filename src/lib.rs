//! litellm_spend: exact, always-fresh spend rollups for LiteLLM, inside Postgres.
//!
//! ```text
//!  enter    api (SQL functions)      worker (loop)   launcher   hook
//!           tick (one round of everything)
//!  act      capture   watch   views   declare   declaration   source   rollup   rebuild   backfill   repair
//!  decide   window   definition   statements   litellm   builtin             pure Rust, no pgrx
//!  base     catalog (state)   expression   locks   session   guc   error
//! ```
//! Calls go downward only. Words: see docs/reference.md.

mod api;
mod backfill;
mod builtin;
mod capture;
mod catalog;
mod declaration;
mod declare;
mod definition;
mod error;
mod expression;
mod guc;
mod hook;
mod launcher;
mod litellm;
mod locks;
mod rebuild;
mod repair;
mod rollup;
mod session;
mod source;
mod statements;
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
    // SAFETY: a flag of the postmaster.
    if unsafe { pg_sys::process_shared_preload_libraries_in_progress } {
        launcher::register();
        hook::install();
    }
}

//! Processes: the launcher, a worker for each database, the builder of indexes, and one round of everything.
//! And the hook that sees DDL of others'. May call all below.

pub mod builder;
pub mod database;
pub mod give_way;
pub mod hook;
pub mod launcher;
pub mod pace;
pub mod process;
pub mod quiet;
pub mod round;
pub mod service;
pub mod steps;

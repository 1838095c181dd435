//! How we talk to PostgreSQL: SPI, relations, whose rights, locks, expressions, errors on their way out.
//! Knows no table of ours, and may call nothing but settings and errors.

pub mod cost;
pub mod expression;
mod failure;
pub mod guard;
pub mod hint;
pub mod jsonb;
pub mod keyed;
pub mod limit;
pub mod locks;
pub mod log;
pub mod parse;
pub mod proof;
pub mod relation;
pub mod rewrite;
pub mod session;
pub mod spi;
pub mod stream;
pub mod text;
pub mod varlena;

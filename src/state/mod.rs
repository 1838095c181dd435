//! What is stored, in the tables of schema `litellm_spend`: definitions, windows, watermarks and the fence
//! that guards them, the captured table, conversions, indexes, frozen days, and whether all of it came out of
//! a dump. May call the server.

pub mod captured;
pub mod conversion;
pub mod definition;
pub mod fence;
pub mod frozen;
pub mod indexes;
pub mod news;
pub mod restore;
pub mod rollups;
pub mod sources;
pub mod step;
pub mod window;

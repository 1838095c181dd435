//! The SQL functions. They check who asks, and call the rooms below.

pub mod indexes;
pub mod partitions;
pub mod rollups;

//! The SQL functions. They check who asks, and call the rooms below.

pub mod partitions;
pub mod rollups;

//! What a rollup is, as it is stored, and how its names are written. Pure text: nothing here talks to the
//! server. The SQL that follows from it is in `statements`.

use crate::server::text::{SCHEMA, qualified};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The state of one source row under `count(*)`. An integer, because those are added up faster than bigints.
pub const ONE_ROW: &str = "1";

pub const TIMESTAMPTZ: &str = "timestamp with time zone";

/// The types that a calendar divides.
pub const TIME_TYPES: [&str; 3] = ["date", "timestamp without time zone", TIMESTAMPTZ];

/// An output column: `expression`, called `name`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    pub name: String,
    pub expression: String,
    pub r#type: String,
    /// If it is not that of the type.
    #[serde(default)]
    pub collation: Option<String>,
}

/// What rows are grouped by: an expression over the source's columns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dimension {
    #[serde(flatten)]
    pub column: Column,
    pub nullable: bool,
}

/// A column of the rollup's table whose values can be merged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measure {
    /// Its expression is the state of one source row or, if `aggregates`, an aggregate over many.
    #[serde(flatten)]
    pub column: Column,
    pub combine: Combine,
    #[serde(default)]
    pub aggregates: bool,
    /// The state of no rows, if that is not NULL.
    pub empty: Option<String>,
}

/// How two states become one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Combine {
    Sum,
    Min,
    Max,
    /// An aggregate over states, qualified.
    With(String),
}

/// The dimension that buckets time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    pub dimension: String,
    /// An expression over the source's columns that lies between two bucket borders exactly if the bucket
    /// does.
    pub source_time: String,
    /// The source's column that it buckets, and its type.
    pub column: String,
    pub column_type: String,
}

/// What makes a row of the rollup's table unique.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Key {
    /// Its dimensions; NULLs are equal.
    Dimensions,
    /// The same before PostgreSQL 15, where only NULLs inside of arrays are equal.
    Arrays,
}

impl Key {
    /// What this server can do. It is stored: an upgraded server keeps the indexes it has.
    pub const HERE: Key = if cfg!(feature = "pg14") { Key::Arrays } else { Key::Dimensions };
}

/// How Citus distributes a rollup's table: beside its source's, by the same values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distribution {
    /// The source's column.
    pub column: String,
    /// The dimension that is that column.
    pub dimension: String,
}

/// The columns of its source that a rollup reads, as they were when it was declared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Columns {
    /// The OID of the table whose columns they are.
    pub relation: u32,
    /// Their numbers, by their names.
    pub numbers: BTreeMap<String, i16>,
}

/// A rollup over a source whose rows are numbered by `source_sequence`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    pub name: String,
    /// Qualified and quoted.
    pub source: String,
    /// Joined to each source row, or empty.
    #[serde(default)]
    pub expansion: String,
    pub source_sequence: String,
    /// Its type is an integer one: no number is above those of a sequence.
    #[serde(default)]
    pub bounded: bool,
    pub bucket: Option<Bucket>,
    pub dimensions: Vec<Dimension>,
    pub measures: Vec<Measure>,
    /// The live view's columns after the dimensions, over the combined measures.
    pub outputs: Vec<Column>,
    /// The measure that says how many source rows a group has: a group of none does not exist.
    pub presence: String,
    pub key: Key,
    /// It may be added when raw rows of its source are gone: its views show nothing of the days that it does
    /// not know.
    #[serde(default)]
    pub optional: bool,
    /// `None`: its table is a table of this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distribution: Option<Distribution>,
    /// `None`: they are not noted yet, or its source is ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Columns>,
}

impl Definition {
    /// The table that holds merged rows, qualified.
    pub fn table(&self) -> String {
        qualified(SCHEMA, &self.table_name())
    }

    pub fn table_name(&self) -> String {
        format!("{}_rollup", self.name)
    }

    /// The tables that it is made of, qualified.
    pub fn tables(&self) -> Vec<String> {
        std::iter::once(self.table()).chain(self.distribution.iter().map(|_| self.merged_table())).collect()
    }

    /// Of a distributed one: up to which number each value of the distribution column is merged. Qualified.
    pub fn merged_table(&self) -> String {
        qualified(SCHEMA, &format!("{}_merged", self.name))
    }

    /// The live view: merged rows and the tail, in one snapshot. Qualified.
    pub fn live_view(&self) -> String {
        qualified(SCHEMA, &self.name)
    }

    /// The aggregate that is made for a measure which only a function merges, qualified.
    pub fn merge_aggregate(&self, measure: &str) -> String {
        qualified(SCHEMA, &format!("{}.{measure}", self.name))
    }

    /// The aggregates that were made for it, and the type of their states.
    pub fn own_aggregates(&self) -> impl Iterator<Item = (&str, &str)> {
        self.measures.iter().filter_map(|m| match &m.combine {
            Combine::With(aggregate) if *aggregate == self.merge_aggregate(&m.column.name) => {
                Some((aggregate.as_str(), m.column.r#type.as_str()))
            }
            _ => None,
        })
    }
}

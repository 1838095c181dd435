//! What a rollup is, as it is stored, and how its names are written. Pure text: nothing here talks to the server.
//! The SQL that follows from it is in `statements`.

use serde::{Deserialize, Serialize};

/// The state of one source row under `count(*)`. An integer, because those are added up faster than bigints.
pub const ONE_ROW: &str = "1";

/// Schema of everything that is stored.
pub const SCHEMA: &str = "litellm_spend";

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
    /// An expression over the source's columns that lies between two bucket borders exactly if the bucket does.
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
    pub bucket: Option<Bucket>,
    pub dimensions: Vec<Dimension>,
    pub measures: Vec<Measure>,
    /// The live view's columns after the dimensions, over the combined measures.
    pub outputs: Vec<Column>,
    /// The measure that says how many source rows a group has: a group of none does not exist.
    pub presence: String,
    pub key: Key,
}

impl Definition {
    /// The table that holds merged rows, qualified.
    pub fn table(&self) -> String {
        qualified(SCHEMA, &self.table_name())
    }

    pub fn table_name(&self) -> String {
        format!("{}_rollup", self.name)
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

/// Double-quotes an identifier.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

pub fn qualified(schema: &str, name: &str) -> String {
    format!("{}.{}", quoted(schema), quoted(name))
}

/// Quotes a string constant, whatever `standard_conforming_strings` says.
pub fn literal(value: &str) -> String {
    let escaped = value.replace('\'', "''");
    if value.contains('\\') {
        format!(" E'{}'", escaped.replace('\\', "\\\\"))
    } else {
        format!("'{escaped}'")
    }
}

/// A numeric as a floating-point type, whatever its size. The cast alone fails (22003) beyond the type's largest and below its smallest
/// number, so that every query over a group of two such rows would, for ever.
pub fn float(numeric: &str, r#type: &str) -> String {
    let (largest, too_small) = match r#type {
        "real" => ("3.4028235 * 10::numeric ^ 38", "10::numeric ^ 45 < 1.4"),
        _ => ("1.7976931348623158 * 10::numeric ^ 308", "10::numeric ^ 324 < 4.9"),
    };
    format!(
        "CASE WHEN abs({numeric}) * {too_small} THEN 0::{type} \
         WHEN abs({numeric}) > {largest} AND abs({numeric}) < 'Infinity'::numeric \
         THEN (sign({numeric}) * 'Infinity'::double precision)::{type} ELSE ({numeric})::{type} END"
    )
}

/// The midnight after a timestamp. After the last day that the server knows there is none; before the first there is one.
pub fn next_midnight(time: &str) -> String {
    format!(
        "CASE WHEN {time} = '-infinity' THEN '4714-11-24 BC'::timestamp \
         WHEN {time} < '294276-12-31' THEN date_trunc('day', {time}) + interval '1 day' \
         WHEN {time} IS NOT NULL THEN 'infinity'::timestamp END"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_beyond_a_floating_point_type_is_not_cast_to_it() {
        let cast = float("x", "real");
        assert!(cast.contains("abs(x) > 3.4028235 * 10::numeric ^ 38"), "{cast}");
        assert!(cast.ends_with("ELSE (x)::real END"), "{cast}");
    }

    #[test]
    fn identifiers_and_literals_cannot_end_their_quotes() {
        assert_eq!(quoted(r#"a"b"#), r#""a""b""#);
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal(r"a\'b"), r" E'a\\''b'");
    }
}

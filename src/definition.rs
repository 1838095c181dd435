//! What a rollup is, and the SQL that follows from it. Pure text: nothing here talks to the server.
//!
//! A rollup groups the rows of a source by its dimensions and adds up its measures. Five statements follow from
//! that one definition: the table, the live view, the merge of a window, the rebuild of a range, the comparison
//! with the truth. They share one `SELECT … GROUP BY`, so they cannot drift apart.
//!
//! All measures are sums of signed rows, so a rollup over a change log can subtract.

use serde::{Deserialize, Serialize};

/// Schema of everything that is stored.
pub const SCHEMA: &str = "litellm_spend";

/// An output column: `expression` over the source's columns, called `name`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    pub name: String,
    pub expression: String,
    pub r#type: String,
}

impl Column {
    pub fn new(name: &str, expression: &str, r#type: &str) -> Self {
        Column { name: name.into(), expression: expression.into(), r#type: r#type.into() }
    }
}

/// A rollup over a source whose time column is `source_time` and whose rows are numbered by `source_sequence`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    pub name: String,
    /// Qualified and quoted.
    pub source: String,
    pub source_sequence: String,
    pub source_time: String,
    /// The dimension that buckets time, one day wide. It is also what backfill counts in.
    pub bucket: Column,
    pub dimensions: Vec<Column>,
    pub measures: Vec<Column>,
    /// The measure that says how many source rows a group has: a group of none does not exist.
    pub presence: String,
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

    fn keys(&self) -> impl Iterator<Item = &Column> {
        std::iter::once(&self.bucket).chain(&self.dimensions)
    }

    fn columns(&self) -> impl Iterator<Item = &Column> {
        self.keys().chain(&self.measures)
    }

    fn list<'a>(columns: impl Iterator<Item = &'a Column>, each: impl Fn(&Column) -> String) -> String {
        columns.map(each).collect::<Vec<_>>().join(", ")
    }

    fn key_list(&self) -> String {
        Self::list(self.keys(), |c| quoted(&c.name))
    }

    fn column_list(&self) -> String {
        Self::list(self.columns(), |c| quoted(&c.name))
    }

    /// One row of the rollup's columns for each row of `relation`, a relation with the source's columns.
    fn project(&self, relation: &str, condition: &str) -> String {
        let columns = Self::list(self.columns(), |c| format!("{} AS {}", c.expression, quoted(&c.name)));
        format!("SELECT {columns} FROM {relation} WHERE {condition}")
    }

    /// Adds up rows that have the rollup's columns. `extra` is one more output, `keep` a condition on the groups.
    fn group(&self, extra: &str, rows: &str, keep: &str) -> String {
        let sums =
            Self::list(self.measures.iter(), |m| format!("sum({0})::{1} AS {0}", quoted(&m.name), m.r#type));
        let keys = self.key_list();
        format!("SELECT {keys}, {sums}{extra} FROM ({rows}) AS rows GROUP BY {keys}{keep}")
    }

    fn is_present(&self) -> String {
        format!(" HAVING sum({}) <> 0", quoted(&self.presence))
    }

    pub fn create_table(&self) -> String {
        // Half-empty pages keep the updates of recent buckets HOT.
        let keys = Self::list(self.keys(), |c| format!("{} {}", quoted(&c.name), c.r#type));
        let measures = Self::list(self.measures.iter(), Self::measure_column);
        format!(
            "CREATE TABLE {} ({keys}, {measures}, PRIMARY KEY ({})) WITH (fillfactor = 50)",
            self.table(),
            self.key_list()
        )
    }

    /// COMMENT ON the table and the live view.
    pub fn comments(&self) -> [String; 2] {
        [
            format!(
                "COMMENT ON TABLE {} IS {}",
                self.table(),
                literal(&format!("Merged rows of rollup {}", self.name))
            ),
            format!(
                "COMMENT ON VIEW {} IS {}",
                self.live_view(),
                literal(&format!("Rollup {}: merged rows and tail, exact in every snapshot", self.name))
            ),
        ]
    }

    /// The column of a measure, as `CREATE TABLE` and `ADD COLUMN` take it.
    pub fn measure_column(measure: &Column) -> String {
        format!("{} {} NOT NULL DEFAULT 0", quoted(&measure.name), measure.r#type)
    }

    /// Rows above the watermark: what has not been merged yet.
    fn tail(&self, watermark: &str) -> String {
        format!("{} > {watermark}", quoted(&self.source_sequence))
    }

    /// The live view: every column, every bucket.
    pub fn create_live_view(&self) -> String {
        let all: Vec<(&str, &str)> =
            self.measures.iter().map(|m| (m.name.as_str(), m.r#type.as_str())).collect();
        format!("CREATE OR REPLACE VIEW {} AS {}", self.live_view(), self.live(&all, None))
    }

    /// Merged rows and the tail, in one snapshot: the measures asked for, each with its type, from a bucket on. Not a
    /// query over the live view: planning two levels takes longer than running one.
    pub fn live(&self, measures: &[(&str, &str)], first_bucket: Option<&str>) -> String {
        let watermark = format!(
            "(SELECT watermark FROM {SCHEMA}.rollup WHERE rollup.name = {}::text)",
            literal(&self.name)
        );
        let needed =
            |c: &&Column| c.name == self.presence || measures.iter().any(|(name, _)| *name == c.name);
        let columns: Vec<&Column> = self.keys().chain(self.measures.iter().filter(needed)).collect();
        let names = columns.iter().map(|c| quoted(&c.name)).collect::<Vec<_>>().join(", ");
        let values =
            columns.iter().map(|c| format!("{} AS {}", c.expression, quoted(&c.name))).collect::<Vec<_>>();
        let from = |column: &str| first_bucket.map(|first| format!("{column} >= {first}"));
        let merged = from(&quoted(&self.bucket.name)).map(|c| format!(" WHERE {c}")).unwrap_or_default();
        let tail = from(&quoted(&self.source_time)).map(|c| format!(" AND {c}")).unwrap_or_default();
        let sums: Vec<String> =
            measures.iter().map(|(name, r#type)| format!("sum({0})::{type} AS {0}", quoted(name))).collect();
        format!(
            "SELECT {keys}, {sums} FROM (SELECT {names} FROM {table}{merged} UNION ALL SELECT {values} FROM {source} \
             WHERE {above}{tail}) AS live GROUP BY {keys}{present}",
            keys = self.key_list(),
            sums = sums.join(", "),
            table = self.table(),
            values = values.join(", "),
            source = self.source,
            above = self.tail(&watermark),
            present = self.is_present(),
        )
    }

    /// What a reader of [`Definition::live`] must be able to read.
    pub fn grant_live(&self, role: &str) -> [String; 4] {
        [
            format!("GRANT USAGE ON SCHEMA {SCHEMA} TO {role}"),
            format!("GRANT SELECT ON {} TO {role}", self.table()),
            format!("GRANT SELECT ON {} TO {role}", self.source),
            format!("GRANT SELECT (name, watermark) ON {SCHEMA}.rollup TO {role}"),
        ]
    }

    /// Merges the window `($1, $2]`. Returns the number of source rows and of groups.
    pub fn merge(&self) -> String {
        let window = format!("{0} > $1 AND {0} <= $2", quoted(&self.source_sequence));
        let add =
            Self::list(self.measures.iter(), |m| format!("{0} = r.{0} + excluded.{0}", quoted(&m.name)));
        let groups = self.group(", count(*) AS source_rows", &self.project(&self.source, &window), "");
        format!(
            "WITH merged AS ({groups}), written AS (
                 INSERT INTO {table} AS r ({columns})
                 SELECT {columns} FROM merged ORDER BY {keys}
                 ON CONFLICT ({keys}) DO UPDATE SET {add})
             SELECT coalesce(sum(source_rows), 0)::bigint, count(*) FROM merged",
            table = self.table(),
            columns = self.column_list(),
            keys = self.key_list(),
        )
    }

    /// Removes the merged rows of the buckets in `[$1, $2)`.
    pub fn clear(&self) -> String {
        format!("DELETE FROM {} WHERE {}", self.table(), in_range(&quoted(&self.bucket.name)))
    }

    /// Inserts `truth − tail` of the range `[$1, $2)`, with the watermark `$3`. `truth` has the source's columns.
    pub fn refill(&self, truth: &str) -> String {
        let rows = self.truth_without_tail(truth);
        let nonzero = self.measures.iter().map(|m| format!("sum({}) <> 0", quoted(&m.name)));
        let keep = format!(" HAVING {}", nonzero.collect::<Vec<_>>().join(" OR "));
        format!("INSERT INTO {} ({}) {}", self.table(), self.column_list(), self.group("", &rows, &keep))
    }

    fn truth_without_tail(&self, truth: &str) -> String {
        let time = in_range(&quoted(&self.source_time));
        let tail = self.project(&self.source, &format!("{time} AND {}", self.tail("$3")));
        format!(
            "{} UNION ALL SELECT {}, {} FROM ({tail}) AS tail",
            self.project(&format!("({truth}) AS truth"), &time),
            self.key_list(),
            Self::list(self.measures.iter(), |m| format!("- {}", quoted(&m.name))),
        )
    }

    /// Whether there are merged rows in `[$1, $2)`.
    pub fn has_rows(&self) -> String {
        format!("SELECT FROM {} WHERE {}", self.table(), in_range(&quoted(&self.bucket.name)))
    }

    /// The last bucket of `[$1, $2)` of which the rollup knows more source rows than [`Definition::refill`] would find.
    pub fn last_lost_bucket(&self, truth: &str) -> String {
        let (bucket, presence) = (quoted(&self.bucket.name), quoted(&self.presence));
        format!(
            "WITH known AS (SELECT {bucket} AS bucket, sum({presence}) AS n FROM {table} WHERE {range} GROUP BY 1),
                  found AS (SELECT {bucket} AS bucket, sum({presence}) AS n FROM ({rows}) AS rows GROUP BY 1)
             SELECT known.bucket::timestamp FROM known LEFT JOIN found ON found.bucket = known.bucket
             WHERE known.n > coalesce(found.n, 0) ORDER BY 1 DESC LIMIT 1",
            table = self.table(),
            range = in_range(&bucket),
            rows = self.truth_without_tail(truth),
        )
    }

    /// The groups of the range `[$1, $2)` in which rollup + tail differ from the truth, all in one snapshot.
    pub fn compare(&self, truth: &str) -> String {
        let side = |name: &str| {
            let pairs = Self::list(self.measures.iter(), |m| {
                format!("{}, sum({}) FILTER (WHERE side = '{name}')", literal(&m.name), quoted(&m.name))
            });
            format!(
                "CASE WHEN count(*) FILTER (WHERE side = '{name}') > 0 THEN jsonb_build_object({pairs}) END"
            )
        };
        let differs = self.measures.iter().map(|m| {
            let m = quoted(&m.name);
            format!(
                "coalesce(sum({m}) FILTER (WHERE side = 'live'), 0) <> coalesce(sum({m}) FILTER (WHERE side = 'truth'), 0)"
            )
        });
        let time = in_range(&quoted(&self.source_time));
        format!(
            "SELECT jsonb_build_object({key}), {live}, {truth_side}
             FROM (SELECT 'live' AS side, {columns} FROM {view} WHERE {range}
                   UNION ALL
                   SELECT 'truth', {columns} FROM ({truth_groups}) AS truth_groups) AS both_sides
             GROUP BY {keys} HAVING {differs} ORDER BY {keys}",
            key = Self::list(self.keys(), |c| format!("{}, {}", literal(&c.name), quoted(&c.name))),
            live = side("live"),
            truth_side = side("truth"),
            columns = self.column_list(),
            view = self.live_view(),
            range = in_range(&quoted(&self.bucket.name)),
            truth_groups =
                self.group("", &self.project(&format!("({truth}) AS truth"), &time), &self.is_present()),
            keys = self.key_list(),
            differs = differs.collect::<Vec<_>>().join(" OR "),
        )
    }
}

/// `column` lies in `[$1, $2)`; a NULL end is unbounded (`infinity` itself is a time that a row can have).
fn in_range(column: &str) -> String {
    format!("{column} >= $1 AND ($2 IS NULL OR {column} < $2)")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_and_literals_cannot_end_their_quotes() {
        assert_eq!(quoted(r#"a"b"#), r#""a""b""#);
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal(r"a\'b"), r" E'a\\''b'");
    }
}

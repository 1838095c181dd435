//! The SQL that follows from a rollup's definition. Pure text: nothing here talks to the server.
//!
//! ```text
//!   source rows ──project──> partial rows ──combine──> one row a group
//!   (window, tail, range)    (the table's columns)     (merge, live view, refill, comparison)
//! ```
//! A *partial row* has the columns of the rollup's table: dimensions, and for each measure the state of some
//! source rows. The table's own rows are partial rows too, so merged rows and the tail combine like any
//! others. All statements share these two steps, so they cannot drift apart.

mod days;
mod merge;
mod rebuild;

use crate::server::text::{literal, quoted};
use crate::state::definition::{
    Bucket, Column, Combine, Definition, Dimension, Key, Measure, ONE_ROW, TIMESTAMPTZ,
};

/// Part of its space that a page of a rollup's table is filled with: the rest keeps updates HOT.
const FILLFACTOR: u32 = 80;

impl Definition {
    fn columns(&self) -> impl Iterator<Item = &Column> {
        self.dimensions.iter().map(|d| &d.column).chain(self.measures.iter().map(|m| &m.column))
    }

    fn dimension_list(&self) -> String {
        list(&self.dimensions, |d| quoted(&d.column.name))
    }

    fn column_list(&self) -> String {
        list(self.columns(), |c| quoted(&c.name))
    }

    fn aggregates(&self) -> bool {
        self.measures.iter().any(|m| m.aggregates)
    }

    /// Whether only an aggregate of somebody's can combine its states.
    pub fn has_aggregates(&self) -> bool {
        self.aggregates() || self.measures.iter().any(|m| matches!(m.combine, Combine::With(_)))
    }

    /// Whether the rows that it is computed of are the same.
    pub fn reads_as(&self, other: &Definition) -> bool {
        let rows = |d: &Definition| (d.source.clone(), d.source_sequence.clone(), d.expansion.clone());
        rows(self) == rows(other)
    }

    // ---- the two steps --------------------------------------------------------------------------------

    /// Partial rows of the source rows in `relation` that satisfy `condition`.
    fn project(&self, relation: &str, condition: &str) -> String {
        self.project_columns(relation, condition, |_| true)
    }

    fn project_columns(&self, relation: &str, condition: &str, wanted: impl Fn(&str) -> bool) -> String {
        let dimensions: Vec<&Column> =
            self.dimensions.iter().map(|d| &d.column).filter(|c| wanted(&c.name)).collect();
        let measures = self.measures.iter().filter(|m| wanted(&m.column.name));
        // An aggregate has no state of one row, so all states are of a group.
        let measures = measures.map(|m| match (self.aggregates(), m.aggregates) {
            (true, false) => format!("{} AS {}", m.aggregate(&m.column.expression), quoted(&m.column.name)),
            _ => format!("{} AS {}", m.column.expression, quoted(&m.column.name)),
        });
        let outputs = dimensions.iter().map(|c| format!("{} AS {}", c.expression, quoted(&c.name)));
        let group = if self.aggregates() {
            format!(" GROUP BY {}", list(1..=dimensions.len(), |i| i.to_string()))
        } else {
            String::new()
        };
        format!(
            "SELECT {} FROM {relation} AS r{} WHERE {condition}{group}",
            outputs.chain(measures).collect::<Vec<_>>().join(", "),
            self.expansion
        )
    }

    /// Combines partial rows. `extra` is one more output, `keep` a condition on the groups.
    fn combine(&self, extra: &str, rows: &str, keep: &str) -> String {
        let states = list(&self.measures, |m| {
            format!("{} AS {}", m.aggregate(&quoted(&m.column.name)), quoted(&m.column.name))
        });
        let keys = self.dimension_list();
        format!("SELECT {keys}, {states}{extra} FROM ({rows}) AS rows GROUP BY {keys}{keep}")
    }

    fn is_present(&self) -> String {
        format!(" HAVING sum({}) <> 0", quoted(&self.presence))
    }

    // ---- the table and the live view ------------------------------------------------------------------

    pub fn create_table(&self) -> Vec<String> {
        let dimensions = self.dimensions.iter().map(|d| {
            let constraint = if d.nullable { "" } else { " NOT NULL" };
            format!("{}{constraint}", d.column.declared())
        });
        let columns = dimensions.chain(self.measures.iter().map(Measure::table_column));
        let mut columns = columns.collect::<Vec<_>>().join(", ");
        let nullable = self.dimensions.iter().any(|d| d.nullable);
        let mut after = vec![];
        match self.key {
            _ if !nullable => columns += &format!(", PRIMARY KEY ({})", self.dimension_list()),
            Key::Dimensions => columns += &format!(", UNIQUE NULLS NOT DISTINCT ({})", self.dimension_list()),
            Key::Arrays => {
                after.push(format!("CREATE UNIQUE INDEX ON {} ({})", self.table(), self.conflict_target()));
                if let Some(bucket) = &self.bucket {
                    after.push(format!("CREATE INDEX ON {} ({})", self.table(), quoted(&bucket.dimension)));
                }
            }
        }
        if nullable {
            // Without a primary key a publication FOR ALL TABLES would refuse our updates.
            after.push(format!("ALTER TABLE {} REPLICA IDENTITY FULL", self.table()));
        }
        let create = format!("CREATE TABLE {} ({columns}) WITH (fillfactor = {FILLFACTOR})", self.table());
        after.extend(self.distributed_by().map(|value| {
            format!(
                "CREATE TABLE {} ({} PRIMARY KEY, watermark bigint NOT NULL) WITH (fillfactor = {FILLFACTOR})",
                self.merged_table(),
                Column { name: MERGED_VALUE.into(), ..value.clone() }.declared()
            )
        }));
        std::iter::once(create).chain(after).collect()
    }

    fn distributed_by(&self) -> Option<&Column> {
        let distribution = self.distribution.as_ref()?;
        self.dimensions.iter().map(|d| &d.column).find(|c| c.name == distribution.dimension)
    }

    fn conflict_target(&self) -> String {
        list(&self.dimensions, |d| match self.key {
            Key::Arrays if d.nullable => format!("(ARRAY[{}])", quoted(&d.column.name)),
            _ => quoted(&d.column.name),
        })
    }

    /// COMMENT ON the tables and the live view.
    pub fn comments(&self) -> Vec<String> {
        let merged = self.distribution.iter().map(|_| {
            format!(
                "COMMENT ON TABLE {} IS {}",
                self.merged_table(),
                literal(&format!("Numbers up to which rollup {} is merged, for each value", self.name))
            )
        });
        let comments = [
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
        ];
        merged.chain(comments).collect()
    }

    /// Rows above a watermark: what has not been merged yet.
    fn tail(&self, watermark: &str) -> String {
        format!("r.{} > {watermark}", quoted(&self.source_sequence))
    }

    /// The watermark, in the statement's own snapshot.
    fn watermark(&self) -> String {
        self.state("watermark")
    }

    fn state(&self, column: &str) -> String {
        let name = literal(&self.name);
        format!("(SELECT {column} FROM litellm_spend.rollup WHERE rollup.name = {name}::text)")
    }

    /// What has not been merged yet, in the statement's own snapshot. Of a distributed rollup each shard says
    /// itself, for each value, up to where it is merged; what was merged on all nodes need not be read.
    fn tail_now(&self) -> String {
        match self.unmerged_there() {
            None => self.tail_above(&self.watermark()),
            Some(unmerged) => format!("{} AND {unmerged}", self.tail_above(&self.state("committed_to"))),
        }
    }

    /// That the shard has not merged the row, as it says itself. `None`: it is not distributed.
    fn unmerged_there(&self) -> Option<String> {
        let column = quoted(&self.distribution.as_ref()?.column);
        Some(format!(
            "NOT EXISTS (SELECT FROM {} AS m WHERE m.{MERGED_VALUE} = r.{column} AND m.watermark >= r.{})",
            self.merged_table(),
            quoted(&self.source_sequence)
        ))
    }

    /// Rows above a watermark that is not known when the statement is planned. A planner takes a third of the
    /// source for them, and starts parallel workers to read it: 26 of the 27 ms of a query of 30 groups on
    /// three million rows, 9 of 11 ms on nodes with ten million (2026-11). Of what lies between two bounds,
    /// one of which it does not know, it expects a two-hundredth; so there is a second one, which excludes
    /// nothing.
    fn tail_above(&self, watermark: &str) -> String {
        let tail = self.tail(watermark);
        match self.bounded {
            true => format!("{tail} AND r.{} <= {}", quoted(&self.source_sequence), i64::MAX),
            false => tail,
        }
    }

    /// The query of the live view: every column, every bucket.
    pub fn live_query(&self) -> String {
        self.shown(&self.known_rows())
    }

    /// All partial rows, but those of days that the rollup does not know, in the statement's own snapshot. A
    /// day that lacks the rows of before, and has some that came late, would be shown short.
    fn known_rows(&self) -> String {
        let rows = self.partial_rows(|_| true, None);
        let Some(bucket) = self.bucket.as_ref().filter(|_| self.optional) else { return rows };
        format!(
            "SELECT * FROM ({rows}) AS rows WHERE ({} <@ {}) IS NOT TRUE",
            quoted(&bucket.dimension),
            self.state("unknown_days")
        )
    }

    pub fn create_live_view(&self) -> String {
        format!("CREATE OR REPLACE VIEW {} AS {}", self.live_view(), self.live_query())
    }

    /// That of the live view when the source is gone: the merged rows.
    pub fn history_query(&self) -> String {
        self.shown(&format!("SELECT {} FROM {}", self.column_list(), self.table()))
    }

    /// The live view's columns, without a row, and without an expression of the user's.
    pub fn empty_query(&self) -> String {
        let columns = self.dimensions.iter().map(|d| &d.column).chain(&self.outputs);
        let columns = list(columns, |c| {
            let collation = c.collation.as_ref().map(|c| format!(" COLLATE {c}")).unwrap_or_default();
            format!("NULL::{}{collation} AS {}", c.r#type, quoted(&c.name))
        });
        format!("SELECT {columns} WHERE false")
    }

    fn shown(&self, rows: &str) -> String {
        let combined = self.combine("", rows, &self.is_present());
        let is_measure = |output: &Column, m: &Measure| {
            output.name == m.column.name && output.expression == quoted(&m.column.name)
        };
        let all = self.outputs.len() == self.measures.len()
            && self.outputs.iter().zip(&self.measures).all(|(output, m)| is_measure(output, m));
        if all {
            return combined;
        }
        let outputs = list(&self.outputs, |o| format!("{} AS {}", o.expression, quoted(&o.name)));
        format!("SELECT {}, {outputs} FROM ({combined}) AS live", self.dimension_list())
    }

    /// The live view's rows by day.
    pub fn by_day(&self) -> String {
        let bucket = self.bucket.as_ref().map(|b| b.dimension.as_str());
        let columns = list(self.columns(), |c| match quoted(&c.name) {
            name if bucket == Some(&c.name) => format!("{name}::date AS date"),
            name => name,
        });
        let mut daily = self.clone();
        for dimension in daily.dimensions.iter_mut().filter(|d| bucket == Some(&d.column.name)) {
            dimension.column.name = "date".into();
        }
        daily.shown(&format!("SELECT {columns} FROM ({}) AS hourly", self.known_rows()))
    }

    /// Merged rows and the tail, in one snapshot, not combined yet: the columns asked for and the presence,
    /// from a bucket on. Not a query over the live view: planning two levels takes longer than running one.
    pub fn partial_rows(&self, wanted: impl Fn(&str) -> bool, first_bucket: Option<&str>) -> String {
        let wanted = |name: &str| name == self.presence || wanted(name);
        let names = list(self.columns().filter(|c| wanted(&c.name)), |c| quoted(&c.name));
        let (mut merged, mut tail) = (String::new(), self.tail_now());
        if let Some((first, bucket)) = first_bucket.zip(self.bucket.as_ref()) {
            merged = format!(" WHERE {} >= {first}", quoted(&bucket.dimension));
            tail += &format!(" AND {} >= {first}", bucket.source_time);
        }
        format!(
            "SELECT {names} FROM {}{merged} UNION ALL {}",
            self.table(),
            self.project_columns(&self.source, &tail, wanted)
        )
    }

    /// Lets a role read what [`Definition::partial_rows`] needs for the columns asked for, and no more.
    /// `of_source` gives the source's column for each of the rollup's.
    pub fn grant_columns<'a>(
        &self,
        wanted: &[&'a str],
        of_source: impl Fn(&'a str) -> &'a str,
        role: &str,
    ) -> [String; 4]
    where
        Self: 'a,
    {
        let presence = self.presence.as_str();
        let (dimension, time) =
            self.bucket.as_ref().map(|b| (b.dimension.as_str(), b.column.as_str())).unzip();
        let columns = wanted.iter().copied().chain(dimension).chain([presence]);
        let of_source = wanted.iter().map(|c| of_source(c)).chain(time);
        let of_source = of_source.chain([presence, self.source_sequence.as_str()]);
        let (columns, of_source) = (distinct(columns), distinct(of_source));
        [
            format!("GRANT USAGE ON SCHEMA litellm_spend TO {role}"),
            format!("GRANT SELECT ({columns}) ON {} TO {role}", self.table()),
            format!("GRANT SELECT ({of_source}) ON {} TO {role}", self.source),
            self.grant_watermark(role),
        ]
    }

    /// What the owner of a live view needs apart from the source and the rollup's table.
    pub fn grant_watermark(&self, role: &str) -> String {
        format!("GRANT SELECT (name, watermark, committed_to) ON litellm_spend.rollup TO {role}")
    }
}

/// What groups that are ready to be written are called.
pub const GROUPS: &str = "litellm_spend_groups";

/// The column of [`Definition::merged_table`] that holds values of the distribution column.
pub const MERGED_VALUE: &str = "value";

impl Column {
    /// As a table has it.
    fn declared(&self) -> String {
        let collation = self.collation.as_ref().map(|c| format!(" COLLATE {c}")).unwrap_or_default();
        format!("{} {}{collation}", quoted(&self.name), self.r#type)
    }
}

impl Measure {
    /// Combines states, or the states of single rows.
    fn aggregate(&self, state: &str) -> String {
        let function = match &self.combine {
            Combine::Sum => "sum",
            Combine::Min => "min",
            Combine::Max => "max",
            Combine::With(function) => function,
        };
        format!("{function}({state})::{}", self.column.r#type)
    }

    /// Its column, as `CREATE TABLE` and `ADD COLUMN` take it.
    pub fn table_column(&self) -> String {
        let empty = self.empty.as_ref().map(|empty| format!(" NOT NULL DEFAULT {empty}"));
        format!("{}{}", self.column.declared(), empty.unwrap_or_default())
    }

    /// The assignment of `ON CONFLICT DO UPDATE` to a table called `r`.
    fn add_excluded(&self) -> String {
        let m = quoted(&self.column.name);
        let sum = match &self.combine {
            Combine::Sum if self.empty.is_some() => format!("r.{m} + excluded.{m}"),
            Combine::Sum => format!("coalesce(r.{m} + excluded.{m}, r.{m}, excluded.{m})"),
            Combine::Min => format!("least(r.{m}, excluded.{m})"),
            Combine::Max => format!("greatest(r.{m}, excluded.{m})"),
            Combine::With(function) => {
                format!("(SELECT {function}(state) FROM (VALUES (r.{m}), (excluded.{m})) AS states(state))")
            }
        };
        format!("{m} = {sum}")
    }
}

/// Quoted names, each once.
fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> String {
    list(names.collect::<std::collections::BTreeSet<_>>(), quoted)
}

fn list_of<T>(items: impl IntoIterator<Item = T>, each: impl Fn(T) -> String) -> Vec<String> {
    items.into_iter().map(each).collect()
}

fn list<T>(items: impl IntoIterator<Item = T>, each: impl Fn(T) -> String) -> String {
    list_of(items, each).join(", ")
}

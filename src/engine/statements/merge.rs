//! Merging the rows of a window, as `statements`.

use super::*;

/// What a column is called that no rollup's has the name of: the number of source rows of a group.
const SOURCE_ROWS: &str = "litellm_spend_rows_";

impl Definition {
    /// That a source row is in the window `($1, $2]`.
    fn in_window(&self) -> String {
        format!("r.{0} > $1 AND r.{0} <= $2", quoted(&self.source_sequence))
    }

    /// Expressions over the rows of the window, one for one.
    pub fn window_rows(&self, expressions: &[&str]) -> String {
        let (source, expansion) = (&self.source, &self.expansion);
        format!("SELECT {} FROM {source} AS r{expansion} WHERE {}", expressions.join(", "), self.in_window())
    }

    /// The groups of the window, with the number of source rows of each.
    fn window_groups(&self) -> String {
        let counted = |m: &Measure| m.column.name == self.presence && m.column.expression == ONE_ROW;
        let rows = match self.aggregates() || self.measures.iter().any(counted) {
            true => format!("sum({})", quoted(&self.presence)),
            false => "count(*)".into(),
        };
        self.combine(
            &format!(", {rows} AS {SOURCE_ROWS}"),
            &self.project(&self.source, &self.in_window()),
            "",
        )
    }

    /// Merges the window. Returns the number of source rows and of groups.
    pub fn merge(&self) -> String {
        format!(
            "WITH merged AS ({}), written AS ({})
             SELECT coalesce(sum({SOURCE_ROWS}), 0)::bigint, count(*) FROM merged",
            self.window_groups(),
            self.write_groups(&format!("merged ORDER BY {}", self.dimension_list()))
        )
    }

    /// Adds the groups that are called `groups` to the table.
    pub fn write_groups(&self, groups: &str) -> String {
        self.add(&format!("SELECT {} FROM {groups}", self.column_list()))
    }

    /// Adds partial rows, one for each group, to the table.
    pub(super) fn add(&self, rows: &str) -> String {
        format!(
            "INSERT INTO {} AS r ({}) {rows} ON CONFLICT ({}) DO UPDATE SET {}",
            self.table(),
            self.column_list(),
            self.conflict_target(),
            list(&self.measures, Measure::add_excluded),
        )
    }

    /// Merges a window `(start, end]` of a distributed rollup: each shard the rows that are beside it. No
    /// part of it has a name or returns anything, or Citus would bring the groups here.
    ///
    /// What a shard says it has merged is left out: after a failover that lost our commit and not that of the
    /// shard, the window begins before that.
    pub fn merge_by_shard(&self, start: &str, end: &str) -> String {
        let unmerged = self.unmerged_there().map(|unmerged| format!(" AND {unmerged}")).unwrap_or_default();
        let window = format!("r.{0} > {start} AND r.{0} <= {end}{unmerged}", quoted(&self.source_sequence));
        self.add(&self.combine("", &self.project(&self.source, &window), ""))
    }

    /// Notes with each value of the window how far it is merged. By the shard's own connection of the merge,
    /// so that a shard has both or neither. Never lower: after a failover the nodes may have merged more than
    /// we know of. `None`: it is not distributed.
    pub fn note_merged(&self) -> Option<String> {
        let column = quoted(&self.distribution.as_ref()?.column);
        Some(format!(
            "INSERT INTO {} AS m ({MERGED_VALUE}, watermark)
             SELECT r.{column}, $2::bigint FROM {} AS r WHERE {} GROUP BY r.{column}
             ON CONFLICT ({MERGED_VALUE}) DO UPDATE SET watermark = greatest(m.watermark, excluded.watermark)",
            self.merged_table(),
            self.source,
            self.in_window()
        ))
    }

    /// How far its nodes have merged, as they say. `None`: it is not distributed.
    pub fn furthest_merged(&self) -> Option<String> {
        self.distribution.as_ref()?;
        Some(format!("SELECT max(watermark) FROM {}", self.merged_table()))
    }
}

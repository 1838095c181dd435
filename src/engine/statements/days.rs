//! Adding up hours to days in a rollup that has them, as `statements`.

use super::*;

impl Definition {
    /// The bucket, if it is an hour that becomes a day.
    fn hours(&self) -> Option<&str> {
        self.bucket.as_ref().filter(|_| self.optional).map(|bucket| bucket.dimension.as_str())
    }

    /// Its first merged hour in `[$1, $2)`. `None`: it has no hours.
    pub fn first_hour(&self) -> Option<String> {
        let hour = quoted(self.hours()?);
        Some(format!(
            "SELECT min({hour}) FROM {} WHERE {hour} >= $1 AND {hour} < $2 AND isfinite({hour})",
            self.table()
        ))
    }

    /// Merged rows of the hours in `[$1, $2)` become those of their days, at midnight. A row that is there
    /// already takes the others up.
    pub fn hours_to_days(&self) -> Option<String> {
        let hour = quoted(self.hours()?);
        let hours = format!(
            "DELETE FROM {} WHERE {hour} >= $1 AND {hour} < $2 AND {hour} <> date_trunc('day', {hour})
             RETURNING {}",
            self.table(),
            self.column_list()
        );
        let rows = self.by_midnight("hours", "true")?;
        Some(format!("WITH hours AS ({hours}) {}", self.add(&self.combine("", &rows, ""))))
    }

    /// Partial rows as they are compared: where hours have become days, those that came later are hours.
    pub(super) fn comparable(&self, rows: &str) -> String {
        let before = self.hours().map(|hour| format!("{} < {}", quoted(hour), self.state("hours_from")));
        let by_midnight = before.and_then(|before| self.by_midnight(&format!("({rows})"), &before));
        by_midnight.unwrap_or_else(|| rows.into())
    }

    /// Partial rows, of which those that satisfy the condition are at their day's midnight.
    fn by_midnight(&self, rows: &str, condition: &str) -> Option<String> {
        let hour = self.hours()?;
        let columns = list(self.columns(), |column| match quoted(&column.name) {
            name if column.name == hour => {
                format!("CASE WHEN {condition} THEN date_trunc('day', {name}) ELSE {name} END AS {name}")
            }
            name => name,
        });
        Some(format!("SELECT {columns} FROM {rows} AS rows"))
    }
}

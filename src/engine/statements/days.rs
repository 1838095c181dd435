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
            "SELECT min({hour}) AS first FROM {} WHERE {hour} >= $1 AND {hour} < $2 AND isfinite({hour})",
            self.table()
        ))
    }

    /// Merged rows of the hours in `[$1, $2)` become those of their days, at midnight. A row that is there
    /// already takes the others up.
    pub fn hours_to_days(&self) -> Option<String> {
        let hour = quoted(self.hours()?);
        let gone = format!(
            "DELETE FROM {} WHERE {hour} >= $1 AND {hour} < $2 AND {hour} <> date_trunc('day', {hour})
             RETURNING {}",
            self.table(),
            self.column_list()
        );
        let columns = list(self.columns(), |column| match quoted(&column.name) {
            name if name == hour => format!("date_trunc('day', {name}) AS {name}"),
            name => name,
        });
        let days = self.combine("", &format!("SELECT {columns} FROM gone"), "");
        Some(format!("WITH gone AS ({gone}) {}", self.add(&days)))
    }
}

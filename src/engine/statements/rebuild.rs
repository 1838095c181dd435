//! Computing buckets again, and comparing them with the source, as `statements`.

use super::*;

impl Definition {
    /// The bucket lies in `[$1, $2)`, which are timestamps in UTC; a NULL end is unbounded (`infinity` itself
    /// is a time that a row can have). Without a bucket every row is in range.
    fn bucket_in_range(&self) -> String {
        self.in_range(|bucket, r#type| (quoted(&bucket.dimension), r#type))
    }

    /// The same, said of the source's rows.
    fn source_in_range(&self) -> String {
        self.in_range(|bucket, r#type| match bucket.source_time.clone() {
            column if column == quoted(&bucket.column) => (column, &bucket.column_type),
            expression => (expression, r#type),
        })
    }

    /// `time` gives what is compared, and its type; it is given the dimension's.
    fn in_range<'a>(&'a self, time: impl Fn(&'a Bucket, &'a str) -> (String, &'a str)) -> String {
        let is_bucket = |d: &&Dimension| self.bucket.as_ref().is_some_and(|b| b.dimension == d.column.name);
        let Some((bucket, dimension)) = self.bucket.as_ref().zip(self.dimensions.iter().find(is_bucket))
        else {
            return "true".into();
        };
        let (time, r#type) = time(bucket, &dimension.column.r#type);
        let timeless = match dimension.nullable {
            true => format!(" OR {time} IS NULL AND $1 = '-infinity'"),
            false => String::new(),
        };
        // Other nodes compare, too, and do not know our TimeZone.
        let moment = |number: i32| match r#type {
            TIMESTAMPTZ => format!("(${number} AT TIME ZONE 'UTC')"),
            _ => format!("${number}"),
        };
        format!("({time} >= {}{timeless}) AND ($2 IS NULL OR {time} < {})", moment(1), moment(2))
    }

    /// The rollup's bucket, as a column of partial rows.
    fn bucket_name(&self) -> String {
        self.bucket.as_ref().map_or("'-infinity'::timestamp".into(), |b| quoted(&b.dimension))
    }

    /// Removes the merged rows of the buckets in `[$1, $2)`.
    pub fn clear(&self) -> String {
        format!("DELETE FROM {} WHERE {}", self.table(), self.bucket_in_range())
    }

    /// Inserts `truth − tail` of the range `[$1, $2)`. `truth` is a relation with the source's columns;
    /// without one the source itself is the truth.
    pub fn refill(&self, truth: Option<&str>, watermark: i64) -> String {
        let rows = self.merged_truth(truth, watermark);
        let nonzero = list_of(&self.measures, |m| format!("sum({}) <> 0", quoted(&m.column.name)));
        let keep = if truth.is_some() { format!(" HAVING {}", nonzero.join(" OR ")) } else { String::new() };
        format!("INSERT INTO {} ({}) {}", self.table(), self.column_list(), self.combine("", &rows, &keep))
    }

    /// The source rows whose states [`Definition::refill`] adds up: expressions over them, and whether each
    /// is a measure's, which the tail takes away.
    pub fn refill_rows(&self, columns: &[(&str, bool)], truth: Option<&str>, watermark: i64) -> String {
        let (source, expansion, range) = (&self.source, &self.expansion, self.source_in_range());
        let Some(truth) = truth else {
            let merged = format!("r.{} <= {watermark}", quoted(&self.source_sequence));
            let columns = list(columns, |(expression, _)| expression.to_string());
            return format!("SELECT {columns} FROM {source} AS r{expansion} WHERE {range} AND {merged}");
        };
        format!(
            "SELECT {} FROM ({truth}) AS r{expansion} WHERE {range}
             UNION ALL SELECT {} FROM {source} AS r{expansion} WHERE {range} AND {}",
            list(columns, |(expression, _)| expression.to_string()),
            list(columns, |(expression, is_measure)| match is_measure {
                true => format!("- ({expression})"),
                false => expression.to_string(),
            }),
            self.tail(&watermark.to_string())
        )
    }

    /// Partial rows of what must have been merged.
    fn merged_truth(&self, truth: Option<&str>, watermark: i64) -> String {
        let range = self.source_in_range();
        let Some(truth) = truth else {
            let merged = format!("{range} AND r.{} <= {watermark}", quoted(&self.source_sequence));
            return self.project(&self.source, &merged);
        };
        let tail = format!("{range} AND {}", self.tail(&watermark.to_string()));
        format!(
            "{} UNION ALL SELECT {}, {} FROM ({}) AS tail",
            self.project(truth, &range),
            self.dimension_list(),
            list(&self.measures, |m| format!("- {}", quoted(&m.column.name))),
            self.project(&self.source, &tail)
        )
    }

    /// Whether there are merged rows in `[$1, $2)`. (Citus takes no subquery without a column.)
    pub fn has_rows(&self) -> String {
        format!("SELECT 1 FROM {} WHERE {}", self.table(), self.bucket_in_range())
    }

    /// Whether the rollup or its tail has rows in `[$1, $2)`.
    pub fn knows_rows(&self) -> String {
        let bucket = self.bucket.as_ref().map(|b| b.dimension.as_str());
        let known = self.partial_rows(|name| Some(name) == bucket, None);
        format!("SELECT FROM ({known}) AS known WHERE {}", self.bucket_in_range())
    }

    /// The last bucket of `[$1, $2)` of which the rollup knows more source rows than [`Definition::refill`]
    /// would find, as text: a date can be beyond every timestamp. NULL: it has no time.
    pub fn last_lost_bucket(&self, truth: Option<&str>, watermark: i64) -> String {
        let (bucket, presence) = (self.bucket_name(), quoted(&self.presence));
        format!(
            "SELECT nullif(bucket::text, '-infinity')
             FROM (SELECT {bucket} AS bucket, {presence} AS n FROM {table} WHERE {range}
                   UNION ALL SELECT {bucket}, - {presence} FROM ({rows}) AS rows) AS known_and_found
             GROUP BY bucket HAVING sum(n) > 0 ORDER BY bucket DESC NULLS LAST LIMIT 1",
            table = self.table(),
            range = self.bucket_in_range(),
            rows = self.merged_truth(truth, watermark),
        )
    }

    /// How many source rows the merged rows of each bucket in `[$1, $2)` stand for, in the order of the
    /// buckets; those as text, as [`Definition::last_lost_bucket`] has it.
    pub fn counts(&self) -> String {
        format!(
            "SELECT nullif(bucket::text, '-infinity'), sum(n)::bigint
             FROM (SELECT {} AS bucket, {} AS n FROM {} WHERE {}) AS merged GROUP BY bucket ORDER BY bucket",
            self.bucket_name(),
            quoted(&self.presence),
            self.table(),
            self.bucket_in_range(),
        )
    }

    /// Whether `$1` is a border between two buckets. Where rows are looked up by the column itself, those
    /// before it have to be in buckets before it, and those from it on in later ones. As a rule that is the
    /// time that a bucket has. Not so where the clock of a zone is set back across midnight: the day has that
    /// of its second midnight, and begins with the first.
    pub fn is_border(&self) -> Option<String> {
        let bucket = self.bucket.as_ref()?;
        let dimension = self.dimensions.iter().find(|d| d.column.name == bucket.dimension)?;
        let of = |moment: &str| {
            format!(
                "(SELECT ({})::timestamp FROM (SELECT ({moment})::{} AS {}) AS r)",
                dimension.column.expression,
                bucket.column_type,
                quoted(&bucket.column)
            )
        };
        let is_border = match bucket.source_time == quoted(&bucket.column) {
            true => format!("{} < $1 AND {} >= $1", of("$1 - interval '1 microsecond'"), of("$1")),
            false => format!("{} = $1", of("$1")),
        };
        Some(format!("SELECT CASE WHEN $1 IN ('-infinity', 'infinity') THEN true ELSE {is_border} END"))
    }

    /// The groups of the range `[$1, $2)` in which rollup + tail differ from the truth, all in one snapshot.
    /// Without the tail on either side where only the source's rows are on other nodes: a statement reads
    /// those of each in a snapshot of its own, and only what is merged is sure to be the same twice.
    pub fn compare(&self, truth: Option<&str>, with_tail: bool) -> String {
        let of = |side: &str, m: &Measure| {
            let m = quoted(&m.column.name);
            format!("(array_agg(to_jsonb({m})) FILTER (WHERE litellm_spend_side = '{side}'))[1]")
        };
        let object = |side: &str| {
            // Two arguments each, of which a function takes 100.
            let parts = list_of(self.measures.chunks(50), |measures| {
                let pair = |m: &Measure| format!("{}, {}", literal(&m.column.name), of(side, m));
                format!("jsonb_build_object({})", list(measures, pair))
            });
            format!(
                "CASE WHEN count(*) FILTER (WHERE litellm_spend_side = '{side}') > 0 THEN {} END",
                parts.join(" || ")
            )
        };
        let differs =
            list_of(&self.measures, |m| format!("{} IS DISTINCT FROM {}", of("live", m), of("truth", m)));
        let (live, condition) = match with_tail {
            true => (self.partial_rows(|_| true, None), self.source_in_range()),
            false => (
                format!("SELECT {} FROM {}", self.column_list(), self.table()),
                format!(
                    "{} AND r.{} <= {}",
                    self.source_in_range(),
                    quoted(&self.source_sequence),
                    self.watermark()
                ),
            ),
        };
        let live = self.combine("", &live, &self.is_present());
        let truth = self.project(truth.unwrap_or(&self.source), &condition);
        format!(
            "SELECT jsonb_build_object({key})::text, ({live_object})::text, ({truth_object})::text
             FROM (SELECT 'live' AS litellm_spend_side, {columns} FROM ({live}) AS live WHERE {range}
                   UNION ALL
                   SELECT 'truth', {columns} FROM ({truth_groups}) AS truth_groups) AS both_sides
             GROUP BY {keys} HAVING {differs} ORDER BY {keys}",
            key = list(&self.dimensions, |d| format!(
                "{}, {}",
                literal(&d.column.name),
                quoted(&d.column.name)
            )),
            live_object = object("live"),
            truth_object = object("truth"),
            columns = self.column_list(),
            range = self.bucket_in_range(),
            truth_groups = self.combine("", &truth, &self.is_present()),
            keys = self.dimension_list(),
            differs = differs.join(" OR "),
        )
    }
}

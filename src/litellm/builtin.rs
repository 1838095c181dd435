//! The built-in rollups, the report views, and LiteLLM's own views as queries over them. Pure text, like
//! `definition`.

use crate::litellm::spend_log::{LOG_RELATIONS, MEASURES};
use crate::server::text::{SCHEMA, float, qualified, quoted};
use crate::state::definition::{Bucket, Column, Combine, Definition, Dimension, Key, Measure};
use crate::state::sources::CHANGE_LOG;

/// Sized to what reads them: the daily ones answer LiteLLM's views; the hourly ones are the reports, which
/// are made when asked for.
pub fn rollups() -> Vec<Definition> {
    let usage = [
        "api_key",
        "user",
        "team_id",
        "organization_id",
        "model",
        "model_group",
        "custom_llm_provider",
        "call_type",
        "status",
        "cache_hit",
        "agent_id",
    ];
    vec![
        rollup("daily_spend", DAY, &[]),
        rollup("daily_spend_by_key", DAY, &["api_key", "user"]),
        rollup("daily_spend_by_model", DAY, &["model"]),
        rollup("daily_spend_by_end_user", DAY, &["end_user"]),
        rollup("daily_spend_by_tag", DAY, &["tag"]),
        rollup("hourly_usage", HOUR, &usage),
        rollup("hourly_usage_by_end_user", HOUR, &["end_user", "api_key", "team_id", "model"]),
        rollup("hourly_usage_by_tag", HOUR, &["tag", "api_key", "user", "team_id"]),
    ]
}

/// The column of the change log that a rollup's column is made of.
pub fn log_column(column: &str) -> &str {
    match column {
        "date" => "hour",
        "tag" => "request_tags",
        other => other,
    }
}

/// The dimensions of the change log that rollups read.
pub fn read_by(rollups: &[Definition]) -> Vec<&str> {
    rollups.iter().flat_map(|r| &r.dimensions).map(|d| log_column(&d.column.name)).collect()
}

/// A bucket's name, expression and type.
type Width = (&'static str, &'static str, &'static str);
const DAY: Width = ("date", "hour::date", "date");
/// Until hours become days ([`crate::litellm::hours`]).
const HOUR: Width = (
    "hour",
    "CASE WHEN hour < (SELECT hours_from FROM litellm_spend.source WHERE source.name = 'change_log') \
     THEN date_trunc('day', hour) ELSE hour END",
    "timestamp",
);

/// One row for each element of request_tags. What is no array has none, where LiteLLM's own view fails.
const TAGS: &str = " CROSS JOIN LATERAL jsonb_array_elements_text(
    CASE WHEN jsonb_typeof(r.request_tags) = 'array' THEN r.request_tags ELSE '[]' END) AS tags(tag)";

fn rollup(name: &str, (bucket, expression, r#type): Width, dimensions: &[&str]) -> Definition {
    let time = column(bucket, expression.into(), r#type);
    let dimension = |name: &&str| Dimension { column: column(name, shortened(name), "text"), nullable: true };
    let measure = |(name, r#type, _): &(&str, &str, &str)| Measure {
        column: column(name, quoted(name), r#type),
        combine: Combine::Sum,
        aggregates: false,
        empty: Some("0".into()),
    };
    let measures: Vec<Measure> = MEASURES.iter().map(measure).collect();
    Definition {
        name: name.into(),
        source: qualified(SCHEMA, CHANGE_LOG),
        expansion: if dimensions.contains(&"tag") { TAGS.into() } else { String::new() },
        source_sequence: "seq".into(),
        // Most rows of the change log are the tail.
        bounded: false,
        bucket: Some(Bucket {
            dimension: bucket.into(),
            source_time: "hour".into(),
            column: "hour".into(),
            column_type: "timestamp".into(),
        }),
        dimensions: std::iter::once(Dimension { column: time, nullable: false })
            .chain(dimensions.iter().map(dimension))
            .collect(),
        outputs: measures.iter().map(|m| m.column.clone()).collect(),
        measures,
        presence: "requests".into(),
        key: Key::HERE,
        optional: is_report(name),
        distribution: None,
        columns: None,
    }
}

fn column(name: &str, expression: String, r#type: &str) -> Column {
    Column { name: name.into(), expression, r#type: r#type.into(), collation: None }
}

/// Keys go into an index, whose entries end at 2,704 bytes, and clients choose some of them freely: longer
/// values appear as their beginning and their digest. The bounds leave room for all dimensions of a rollup
/// together.
fn shortened(name: &str) -> String {
    let bound = if ["end_user", "tag"].contains(&name) { 600 } else { 200 };
    let name = quoted(name);
    format!(
        "CASE WHEN octet_length({name}) > {bound} \
         THEN left({name}, 30) || '…' || encode(sha256(convert_to({name}, 'UTF8')), 'hex') ELSE {name} END"
    )
}

/// The daily report views: an hourly rollup by day, as (name, rollup).
pub const DAILY_REPORTS: [(&str, &str); 3] = [
    ("daily_usage", "hourly_usage"),
    ("daily_usage_by_end_user", "hourly_usage_by_end_user"),
    ("daily_usage_by_tag", "hourly_usage_by_tag"),
];

/// Whether a rollup of that name is one of the reports, which LiteLLM's views do not need.
pub fn is_report(rollup: &str) -> bool {
    DAILY_REPORTS.iter().any(|(_, hourly)| *hourly == rollup)
}

/// The view by day over an hourly rollup.
pub fn by_day(hourly: &str) -> Option<&'static str> {
    DAILY_REPORTS.iter().find(|(_, rollup)| *rollup == hourly).map(|(daily, _)| *daily)
}

/// The index that a daily report needs on its hourly rollup.
pub fn report_index(hourly: &str) -> String {
    format!("{hourly}_by_day")
}

/// The tables, sequences and views that attach makes in our schema for these rollups.
pub fn relations(rollups: &[Definition]) -> Vec<String> {
    let of_rollup = |rollup: &Definition| {
        let daily = by_day(&rollup.name).map(str::to_string);
        [rollup.table_name(), rollup.name.clone()].into_iter().chain(daily)
    };
    rollups.iter().flat_map(of_rollup).chain(LOG_RELATIONS.map(str::to_string)).collect()
}

// ---- LiteLLM's views -------------------------------------------------------------------------------------

/// One of LiteLLM's views, live.
pub struct PublicView {
    pub name: &'static str,
    /// Column names and types, which CREATE OR REPLACE VIEW must keep.
    pub columns: &'static [(&'static str, &'static str)],
    /// The rollup that it reads.
    pub rollup: &'static str,
    /// The columns that it needs of that rollup.
    pub reads: &'static [&'static str],
    /// How many days before CURRENT_DATE it shows; `None`: all days.
    pub days: Option<i32>,
    /// Our query: `%live` are the rollup's partial rows, `%spend` is their sum, `%schema` the schema of
    /// LiteLLM's tables.
    pub query: &'static str,
    /// A column of the spend log that older versions lack, without which LiteLLM's query cannot be.
    pub needs: Option<&'static str>,
    /// Another table of LiteLLM's that it reads.
    pub joins: Option<&'static str>,
    /// LiteLLM's own query over the table `%s`, for a view that did not exist when we came.
    pub original: &'static str,
}

pub const VIEWS: [PublicView; 7] = [
    PublicView {
        name: "MonthlyGlobalSpend",
        columns: &[("date", "date"), ("spend", "double precision")],
        rollup: "daily_spend",
        reads: &["date", "spend"],
        days: Some(30),
        query: "SELECT date, %spend AS spend FROM %live \
                GROUP BY date HAVING sum(requests) <> 0",
        needs: None,
        joins: None,
        original: "SELECT date(\"startTime\") AS date, sum(spend) AS spend FROM %s \
                   WHERE \"startTime\" >= (CURRENT_DATE - INTERVAL '30 days') GROUP BY date(\"startTime\")",
    },
    PublicView {
        name: "MonthlyGlobalSpendPerKey",
        columns: &[("date", "date"), ("spend", "double precision"), ("api_key", "text")],
        rollup: "daily_spend_by_key",
        reads: &["date", "api_key", "spend"],
        days: Some(30),
        query: "SELECT date, %spend AS spend, api_key FROM %live \
                GROUP BY date, api_key HAVING sum(requests) <> 0",
        needs: None,
        joins: None,
        original: "SELECT date(\"startTime\") AS date, sum(spend) AS spend, api_key FROM %s \
                   WHERE \"startTime\" >= (CURRENT_DATE - INTERVAL '30 days') GROUP BY date(\"startTime\"), api_key",
    },
    PublicView {
        name: "MonthlyGlobalSpendPerUserPerKey",
        columns: &[("date", "date"), ("spend", "double precision"), ("api_key", "text"), ("user", "text")],
        rollup: "daily_spend_by_key",
        reads: &["date", "api_key", "user", "spend"],
        days: Some(30),
        query: "SELECT date, %spend AS spend, api_key, \"user\" FROM %live \
                GROUP BY date, \"user\", api_key HAVING sum(requests) <> 0",
        needs: Some("user"),
        joins: None,
        original: "SELECT date(\"startTime\") AS date, sum(spend) AS spend, api_key, \"user\" FROM %s \
                   WHERE \"startTime\" >= (CURRENT_DATE - INTERVAL '30 days') \
                   GROUP BY date(\"startTime\"), \"user\", api_key",
    },
    PublicView {
        name: "Last30dKeysBySpend",
        columns: &[
            ("api_key", "text"),
            ("key_alias", "text"),
            ("key_name", "text"),
            ("total_spend", "double precision"),
        ],
        rollup: "daily_spend_by_key",
        reads: &["api_key", "spend"],
        days: Some(30),
        query: "SELECT l.api_key, v.key_alias, v.key_name, l.total_spend \
                FROM (SELECT api_key, %spend AS total_spend FROM %live \
                      GROUP BY api_key HAVING sum(requests) <> 0) AS l \
                LEFT JOIN %schema.\"LiteLLM_VerificationToken\" AS v ON l.api_key = v.token \
                ORDER BY l.total_spend DESC",
        needs: None,
        joins: Some("LiteLLM_VerificationToken"),
        original: "SELECT l.api_key, v.key_alias, v.key_name, sum(l.spend) AS total_spend FROM %s AS l \
                   LEFT JOIN %schema.\"LiteLLM_VerificationToken\" AS v ON l.api_key = v.token \
                   WHERE l.\"startTime\" >= (CURRENT_DATE - INTERVAL '30 days') \
                   GROUP BY l.api_key, v.key_alias, v.key_name ORDER BY sum(l.spend) DESC",
    },
    PublicView {
        name: "Last30dModelsBySpend",
        columns: &[("model", "text"), ("total_spend", "double precision")],
        rollup: "daily_spend_by_model",
        reads: &["model", "spend"],
        days: Some(30),
        query: "SELECT model, %spend AS total_spend FROM %live WHERE model <> '' \
                GROUP BY model HAVING sum(requests) <> 0 ORDER BY sum(spend) DESC",
        needs: None,
        joins: None,
        original: "SELECT model, sum(spend) AS total_spend FROM %s \
                   WHERE \"startTime\" >= (CURRENT_DATE - INTERVAL '30 days') AND model <> '' \
                   GROUP BY model ORDER BY sum(spend) DESC",
    },
    PublicView {
        name: "DailyTagSpend",
        columns: &[
            ("individual_request_tag", "text"),
            ("spend_date", "date"),
            ("log_count", "bigint"),
            ("total_spend", "double precision"),
        ],
        rollup: "daily_spend_by_tag",
        reads: &["date", "tag", "spend"],
        days: None,
        query: "SELECT tag AS individual_request_tag, date AS spend_date, sum(requests)::bigint AS log_count, \
                %spend AS total_spend FROM %live \
                GROUP BY tag, date HAVING sum(requests) <> 0",
        needs: Some("request_tags"),
        joins: None,
        original: "SELECT jsonb_array_elements_text(request_tags) AS individual_request_tag, \
                   date(\"startTime\") AS spend_date, count(*) AS log_count, sum(spend) AS total_spend FROM %s \
                   GROUP BY jsonb_array_elements_text(request_tags), date(\"startTime\")",
    },
    PublicView {
        name: "Last30dTopEndUsersSpend",
        columns: &[("end_user", "text"), ("total_events", "bigint"), ("total_spend", "double precision")],
        rollup: "daily_spend_by_end_user",
        reads: &["end_user", "spend"],
        days: Some(30),
        // CURRENT_USER is LiteLLM's own condition: its `end_user <> user` does not mean the column.
        query: "SELECT end_user, sum(requests)::bigint AS total_events, %spend AS total_spend \
                FROM %live WHERE end_user <> '' AND end_user <> CURRENT_USER \
                GROUP BY end_user HAVING sum(requests) <> 0 ORDER BY sum(spend) DESC LIMIT 100",
        needs: Some("end_user"),
        joins: None,
        original: "SELECT end_user, count(*) AS total_events, sum(spend) AS total_spend FROM %s \
                   WHERE end_user <> '' AND end_user <> CURRENT_USER \
                   AND \"startTime\" >= (CURRENT_DATE - INTERVAL '30 days') \
                   GROUP BY end_user ORDER BY sum(spend) DESC LIMIT 100",
    },
];

impl PublicView {
    /// Our query over `rollup`, for LiteLLM's tables in `schema`.
    pub fn live(&self, rollup: &Definition, schema: &str) -> String {
        let first = self.days.map(|days| format!("CURRENT_DATE - {days}"));
        let rows = rollup.partial_rows(|column| self.reads.contains(&column), first.as_deref());
        let query = self.query.replace("%live", &format!("({rows}) AS live"));
        query.replace("%spend", &float("sum(spend)", "double precision")).replace("%schema", &quoted(schema))
    }

    /// LiteLLM's query over `table`.
    pub fn original(&self, table: &str, schema: &str) -> String {
        self.original.replace("%schema", &quoted(schema)).replace("%s", table)
    }
}

/// Whether `spend_attach()` uses the name itself, so that no other rollup may have it.
pub fn is_reserved(name: &str) -> bool {
    let mut indexes = DAILY_REPORTS.iter().map(|(_, hourly)| report_index(hourly));
    relations(&rollups()).iter().any(|relation| relation == name) || indexes.any(|index| index == name)
}

//! What is particular to LiteLLM: the columns of its spend log, and how a row becomes a row of the change
//! log. Pure text, like `definition`.
//!
//! Columns are found by name: their order differs between installs, and older versions lack some.

use crate::server::text::quoted;
use crate::state::sources::CHANGE_LOG;

/// LiteLLM's spend log, as its migrations name it.
pub const SPEND_LOGS: &str = "LiteLLM_SpendLogs";

/// What [`create_log_tables`] makes, in its order.
pub const LOG_RELATIONS: [&str; 3] = ["change_log_seq", CHANGE_LOG, "retired"];

/// A column of the spend log that capture reads.
pub struct SourceColumn {
    pub name: &'static str,
    pub r#type: &'static str,
    pub required: bool,
}

const fn required(name: &'static str, r#type: &'static str) -> SourceColumn {
    SourceColumn { name, r#type, required: true }
}

const fn optional(name: &'static str, r#type: &'static str) -> SourceColumn {
    SourceColumn { name, r#type, required: false }
}

pub const TIME: &str = "startTime";

/// Identifies a request; not captured, but it tells copied rows from new ones when the table is replaced.
const REQUEST_ID: &str = "request_id";

const REQUIRED: [SourceColumn; 6] = [
    required(REQUEST_ID, "text"),
    required(TIME, "timestamp without time zone"),
    required("spend", "double precision"),
    required("total_tokens", "integer"),
    required("prompt_tokens", "integer"),
    required("completion_tokens", "integer"),
];

/// Captured as they are, NULL and '' apart, if a rollup reads them. The change log has a column of the same
/// name for each.
pub const DIMENSIONS: [SourceColumn; 13] = [
    required("api_key", "text"),
    optional("user", "text"),
    optional("team_id", "text"),
    optional("organization_id", "text"),
    optional("end_user", "text"),
    required("model", "text"),
    optional("model_group", "text"),
    optional("custom_llm_provider", "text"),
    optional("status", "text"),
    optional("cache_hit", "text"),
    optional("call_type", "text"),
    optional("request_tags", "jsonb"),
    optional("agent_id", "text"),
];

/// Name, type in the change log, and value of a spend log row `r`. Money is numeric: sums must not depend on
/// the order of addition. NaN and the infinities count as 0, or one bad row would make its day unreadable for
/// ever.
pub const MEASURES: [(&str, &str, &str); 6] = [
    (
        "spend",
        "numeric",
        "CASE WHEN r.spend > '-Infinity' AND r.spend < 'Infinity' THEN r.spend::numeric ELSE 0 END",
    ),
    ("prompt_tokens", "bigint", "coalesce(r.prompt_tokens, 0)::bigint"),
    ("completion_tokens", "bigint", "coalesce(r.completion_tokens, 0)::bigint"),
    ("total_tokens", "bigint", "coalesce(r.total_tokens, 0)::bigint"),
    ("requests", "bigint", "1::bigint"),
    ("failed_requests", "bigint", "(r.status IS NOT DISTINCT FROM 'failure')::int::bigint"),
];

/// All columns that capture knows of.
pub fn source_columns() -> impl Iterator<Item = &'static SourceColumn> {
    REQUIRED.iter().chain(&DIMENSIONS)
}

/// The spend log's columns that this install has, and the SQL that depends on them.
pub struct Capture<'a> {
    /// Names of the captured columns that the table has.
    pub columns: &'a [String],
}

impl Capture<'_> {
    fn has(&self, column: &str) -> bool {
        self.columns.iter().any(|c| c == column)
    }

    /// Turns rows of `relation` into rows of the change log, one for one. `sign` is `1` or `-1`.
    fn rows(&self, relation: &str, sign: i32, condition: &str) -> String {
        self.rows_with(|_| true, relation, sign, condition)
    }

    /// The same with NULL, which takes no room, for the dimensions that are not wanted.
    pub fn rows_with(
        &self,
        wanted: impl Fn(&str) -> bool,
        relation: &str,
        sign: i32,
        condition: &str,
    ) -> String {
        // `timestamp_larger()`, of which there is no other, takes no time with a zone: that would be cast,
        // and silently, to an hour of the writer's zone.
        let hour = format!("date_trunc('hour', timestamp_larger(r.{}, '-infinity')) AS hour", quoted(TIME));
        let dimensions = DIMENSIONS.iter().map(|d| {
            let name = quoted(d.name);
            match wanted(d.name) && self.has(d.name) {
                // Groups are those of the log, where values differ that may be equal in the table.
                true if d.r#type == "text" => format!("r.{name} COLLATE pg_catalog.\"default\" AS {name}"),
                true => format!("r.{name}"),
                false => format!("NULL::{} AS {name}", d.r#type),
            }
        });
        let measures = MEASURES.iter().map(|(name, _, value)| {
            let value = if *name == "failed_requests" && !self.has("status") { "0::bigint" } else { value };
            let value = if sign < 0 { format!("- ({value})") } else { value.to_string() };
            format!("{value} AS {}", quoted(name))
        });
        let columns: Vec<String> = std::iter::once(hour).chain(dimensions).chain(measures).collect();
        format!("SELECT {} FROM {relation} AS r {condition}", columns.join(", "))
    }

    /// The raw rows as the change log would hold them, and the ledger of deleted ones: what rollups must
    /// equal. The table that was replaced may have other columns.
    pub fn truth(&self, relation: &str, predecessor: Option<(&str, Capture)>) -> String {
        let range = format!("r.{0} >= $1 AND ($2 IS NULL OR r.{0} < $2)", quoted(TIME));
        let mut parts = vec![self.rows(relation, 1, &format!("WHERE {range}"))];
        if let Some((predecessor, capture)) = predecessor {
            let condition = format!("WHERE {range} AND {}", not_in(relation));
            parts.push(capture.rows(predecessor, 1, &condition));
        }
        parts.push(format!("SELECT {} FROM litellm_spend.retired", log_columns()));
        parts.join(" UNION ALL ")
    }

    /// Writes to the change log what the rows of `relation` that `predecessor` does not hold add.
    pub fn insert_gap(&self, relation: &str, predecessor: Option<&str>) -> String {
        let condition = predecessor.map(|p| format!("WHERE {}", not_in(p))).unwrap_or_default();
        write_sums("change_log", &self.rows(relation, 1, &condition))
    }

    /// Writes rows that leave the raw table without leaving the totals to the ledger.
    pub fn retire(&self, relation: &str, conditions: &[String]) -> String {
        write_sums("retired", &self.rows(relation, 1, &only(conditions)))
    }
}

/// The tables that capture writes, and the columns.
fn written() -> [(&'static str, String); 3] {
    let note = "failure, range_start, range_end, repair, operation, sqlstate, message";
    [(CHANGE_LOG, log_columns()), ("retired", log_columns()), ("dirty_range", note.into())]
}

/// The sequences that capture draws from.
const DRAWN: [&str; 2] = ["change_log_seq", "capture_failures"];

/// What the owner of the captured table needs, as whom capture writes and rows are recomputed: to add to the
/// log, the ledger, the notes and the rollups, never to change or remove what is there; and to read it all.
pub fn grants_to_owner(rollups: &[String], role: &str) -> Vec<String> {
    let mut grants: Vec<String> = written()
        .iter()
        .map(|(table, columns)| format!("GRANT INSERT ({columns}) ON litellm_spend.{table} TO {role}"))
        .collect();
    grants
        .extend(DRAWN.map(|sequence| format!("GRANT USAGE ON SEQUENCE litellm_spend.{sequence} TO {role}")));
    grants.extend([
        format!("GRANT SELECT ON litellm_spend.change_log, litellm_spend.retired TO {role}"),
        format!("GRANT SELECT (name, watermark) ON litellm_spend.rollup TO {role}"),
        format!("GRANT SELECT (name, hours_from) ON litellm_spend.source TO {role}"),
    ]);
    grants.extend(rollups.iter().map(|table| format!("GRANT SELECT, INSERT ON {table} TO {role}")));
    grants
}

/// Whether `role`, an OID, may do what capture does as whom it runs. If not, not even its failure is counted.
/// As SQL, for which NULL is no: what is to be written to is not there.
pub fn may_capture(role: &str) -> String {
    let mut rights = vec![format!("has_schema_privilege({role}, 'litellm_spend', 'USAGE')")];
    rights.extend(
        DRAWN.map(|name| {
            format!("has_sequence_privilege({role}, to_regclass('litellm_spend.{name}'), 'USAGE')")
        }),
    );
    rights.extend(written().map(|(table, columns)| {
        format!(
            "(SELECT bool_and(has_column_privilege({role}, a.attrelid, a.attnum, 'INSERT'))
              FROM pg_catalog.pg_attribute a
              WHERE a.attrelid = to_regclass('litellm_spend.{table}') AND a.attname = ANY ('{{{columns}}}'))"
        )
    }));
    rights.join(" AND ")
}

pub fn not_in(relation: &str) -> String {
    let id = quoted(REQUEST_ID);
    format!("NOT EXISTS (SELECT FROM {relation} AS other WHERE other.{id} = r.{id})")
}

/// Rows that meet all conditions.
pub fn only(conditions: &[String]) -> String {
    if conditions.is_empty() { String::new() } else { format!("WHERE {}", conditions.join(" AND ")) }
}

/// The columns that change log and ledger share.
fn log_columns() -> String {
    let names = std::iter::once("hour")
        .chain(DIMENSIONS.iter().map(|d| d.name))
        .chain(MEASURES.iter().map(|(name, ..)| *name));
    names.map(quoted).collect::<Vec<_>>().join(", ")
}

/// Writes `rows` one for one. Adding them up first would cost more than it saves: in statements of 100
/// real-shaped rows hardly two agree in all dimensions (6.3 against 3.6 µs a row, 2026-11, PostgreSQL 15).
pub fn write_rows(table: &str, rows: &str) -> String {
    format!("INSERT INTO litellm_spend.{table} ({}) {rows}", log_columns())
}

/// Adds up `rows` and writes what is not nothing: an update of metadata leaves no trace. request_tags group
/// as text, because jsonb calls 1.0 and 1 equal, which are two tags.
pub fn write_sums(table: &str, rows: &str) -> String {
    let keys: Vec<String> =
        std::iter::once("hour").chain(DIMENSIONS.iter().map(|d| d.name)).map(quoted).collect();
    let group: Vec<String> =
        keys.iter().map(|k| k.replace("\"request_tags\"", "\"request_tags\"::text")).collect();
    let output: Vec<String> =
        group.iter().map(|k| k.replace("\"request_tags\"::text", "\"request_tags\"::text::jsonb")).collect();
    let sums: Vec<String> =
        MEASURES.iter().map(|(name, r#type, _)| format!("sum({})::{}", quoted(name), r#type)).collect();
    let nonzero: Vec<String> =
        MEASURES.iter().map(|(name, ..)| format!("sum({}) <> 0", quoted(name))).collect();
    format!(
        "INSERT INTO litellm_spend.{table} ({}) SELECT {}, {} FROM ({rows}) AS changes GROUP BY {} HAVING {}",
        log_columns(),
        output.join(", "),
        sums.join(", "),
        group.join(", "),
        nonzero.join(" OR ")
    )
}

/// The tables that capture writes. The change log is never truncated by vacuum (that takes an exclusive lock,
/// which writers would wait for) and vacuumed by count, because its rows come and go.
pub fn create_log_tables() -> [String; 3] {
    let dimensions = DIMENSIONS.iter().map(|d| format!("{} {}", quoted(d.name), d.r#type));
    let measures = MEASURES.iter().map(|(name, r#type, _)| format!("{} {type} NOT NULL", quoted(name)));
    let columns = dimensions.chain(measures).collect::<Vec<_>>().join(", ");
    [
        "CREATE SEQUENCE litellm_spend.change_log_seq".into(),
        format!(
            "CREATE TABLE litellm_spend.change_log (
                 seq bigint PRIMARY KEY DEFAULT nextval('litellm_spend.change_log_seq'),
                 captured_at timestamptz NOT NULL DEFAULT now(), hour timestamp NOT NULL, {columns})
             WITH (vacuum_truncate = off, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000)"
        ),
        format!("CREATE TABLE litellm_spend.retired (hour timestamp NOT NULL, {columns})"),
    ]
}

/// The ledger has no key: without this a publication FOR ALL TABLES would refuse to prune it.
pub const IDENTIFY_RETIRED: &str = "ALTER TABLE litellm_spend.retired REPLICA IDENTITY FULL";

/// What is said of what [`create_log_tables`] makes.
pub const DESCRIBE_LOG: [&str; 3] = [
    "COMMENT ON SEQUENCE litellm_spend.change_log_seq IS 'Numbers the rows of the change log'",
    "COMMENT ON TABLE litellm_spend.change_log IS 'What statements on the captured table added (+) and removed (-)'",
    "COMMENT ON TABLE litellm_spend.retired IS 'Sums of deleted rows, by hour, while their day can be computed again'",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_optional_column_is_captured_as_null() {
        let columns = vec!["api_key".to_string(), "model".into()];
        let rows = Capture { columns: &columns }.rows("t", 1, "");
        assert!(rows.contains(r#"NULL::jsonb AS "request_tags""#), "{rows}");
        assert!(rows.contains(r#"0::bigint AS "failed_requests""#), "{rows}");
        assert!(rows.contains(r#"r."api_key""#), "{rows}");
    }
}

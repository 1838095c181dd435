//! What a user says a rollup is, made into a [`Definition`].

use crate::citus::{self, spread};
use crate::engine::source::{Notice, Numbering};
use crate::error::{Error, Result};
use crate::server::expression::{self, Aggregate, Cut, Parsed, Scalar, Scope, Volatility};
use crate::server::relation::{self, Table};
use crate::server::session::{Owner, attempt};
use crate::server::text::{float, quoted};
use crate::state::definition::{
    Bucket, Column, Combine, Definition, Dimension, Distribution, Key, Measure, ONE_ROW, TIME_TYPES,
    TIMESTAMPTZ,
};
use pgrx::prelude::*;
use pgrx::spi::quote_identifier;
use std::ffi::CString;

/// What the user said about a rollup.
pub struct Request {
    pub name: String,
    pub source: pg_sys::Oid,
    pub dimensions: Vec<String>,
    pub measures: Vec<String>,
    pub sequence: Option<pg_sys::Oid>,
    pub time_column: Option<String>,
    /// Whether Citus is to distribute its table; `None`: if it can.
    pub distributed: Option<bool>,
    /// The caller's, by which the names in the expressions are found.
    pub search_path: CString,
}

/// An aggregate to be made of a function that merges two states.
pub struct MergeFunction {
    /// Qualified.
    pub aggregate: String,
    pub state: String,
    pub function: String,
}

pub struct Defined {
    pub definition: Definition,
    pub merge_functions: Vec<MergeFunction>,
    pub notices: Vec<Notice>,
}

/// The server cuts longer names.
const LONGEST: usize = pg_sys::NAMEDATALEN as usize - 1;

/// As many columns as an index may have: together the dimensions are the key of the rollup's table.
const MOST_DIMENSIONS: usize = pg_sys::INDEX_MAX_KEYS as usize;

/// Called as ourselves: what is read of the user's is read as the owner of the table, which is locked.
pub fn define(request: &Request, table: &Table, numbering: &Numbering) -> Result<Defined> {
    if request.dimensions.len() > MOST_DIMENSIONS {
        return Err(Error::TooManyDimensions { given: request.dimensions.len(), most: MOST_DIMENSIONS });
    }
    let path = request.search_path.clone();
    let scope = Scope { relation: table.oid, owner: Owner::role(table.owner_oid), path };
    let mut definition = Definition {
        name: request.name.clone(),
        source: table.qualified(),
        expansion: String::new(),
        source_sequence: numbering.column.clone(),
        bounded: numbering.is_integer(),
        bucket: None,
        dimensions: vec![],
        measures: vec![],
        outputs: vec![],
        presence: String::new(),
        key: Key::HERE,
        optional: false,
        distribution: None,
        columns: None,
    };
    let (mut buckets, mut scalars, mut notices) = (vec![], vec![], vec![]);
    for text in &request.dimensions {
        let (dimension, scalar) = dimension(table, &scope, text, &mut notices)?;
        buckets.extend(bucket(table, &dimension, &scalar, request.time_column.as_deref()));
        definition.dimensions.push(dimension);
        scalars.push(scalar);
    }
    if request.distributed != Some(false) {
        distribute(&mut definition, table, &scalars, request.distributed, &mut notices)?;
    }
    if let Some(column) = &request.time_column
        && table.type_of(column).is_none()
    {
        return Err(Error::NoTimeColumn { relation: table.name.clone(), column: column.clone() });
    }
    if request.time_column.is_some() && buckets.is_empty() {
        return Err(Error::NoBucket(request.time_column.clone().unwrap_or_default()));
    }
    definition.bucket = buckets.into_iter().next();
    let mut merge_functions = vec![];
    for text in &request.measures {
        merge_functions.extend(add_measure(&mut definition, &scope, text, &mut notices)?);
    }
    check_columns(&definition)?;
    // count(*) says how many rows a group has.
    let rows = definition.measures.iter().find(|m| m.column.expression == ONE_ROW && !m.aggregates);
    definition.presence = match rows {
        Some(count) => count.column.name.clone(),
        None => {
            let column = column(ROWS, ONE_ROW.into(), "bigint");
            definition.measures.push(sum(column, true));
            ROWS.into()
        }
    };
    Ok(Defined { definition, merge_functions, notices })
}

/// What the names begin with that our statements give to columns of their own.
const OURS: &str = "litellm_spend_";

/// The column that counts source rows where no measure does.
const ROWS: &str = "litellm_spend_rows";

fn column(name: &str, expression: String, r#type: &str) -> Column {
    Column { name: name.into(), expression, r#type: r#type.into(), collation: None }
}

fn dimension(
    table: &Table,
    scope: &Scope,
    text: &str,
    notices: &mut Vec<Notice>,
) -> Result<(Dimension, Scalar)> {
    let what = "dimension";
    let refuse = |reason: &str| Error::Expression { what, expression: text.into(), reason: reason.into() };
    let Parsed { name, mut scalar, aggregate, .. } = expression::parse(scope, text, what)?;
    if aggregate.is_some() {
        return Err(refuse("It is an aggregate function, which only a measure can be."));
    }
    let name = name.ok_or_else(|| refuse(NO_NAME))?;
    match &scalar.cut {
        Some(Cut::Fixed) => {}
        // The usual buckets of a timestamptz depend on the session's TimeZone: ours are those of UTC.
        Some(Cut::Day) => {
            scalar.text =
                format!("(({} AT TIME ZONE 'UTC'::text))::date", quote_identifier(&scalar.columns[0]));
        }
        Some(Cut::Unit(unit)) => {
            scalar.text = truncated_in_utc(unit, &quote_identifier(&scalar.columns[0]));
        }
        None => notices.extend(require_steady(&scalar, refuse)?),
    }
    if let Some(column) = time_column(table, &scalar) {
        try_moment(scope, &scalar, column, refuse)?;
    }
    if !relation::is_sortable(scalar.type_oid) {
        return Err(refuse(&format!("Values of type {} cannot be sorted.", scalar.r#type)));
    }
    if scalar.is_ambiguous {
        return Err(refuse(AMBIGUOUS));
    }
    // A column that cannot be NULL stays so, also when it is cut into buckets.
    let same = scalar.is_column || cuts_time(table, &scalar);
    let nullable = !(same && relation::is_not_null(table.oid, &scalar.columns[0])?);
    let column = Column {
        name,
        expression: format!("({})", scalar.text),
        r#type: scalar.r#type.clone(),
        collation: scalar.collation.clone(),
    };
    Ok((Dimension { column, nullable }, scalar))
}

/// `date_trunc()` in UTC, which reads the name of the zone for each row: 0.25 µs more than the column alone,
/// where date_bin() takes 0.01 (PostgreSQL 15, 2026-11). That does the same for units of a fixed length, but
/// some minor versions of it do not for times before its origin, and times too far from that are an error: so
/// its origin is the server's own, and earlier times are truncated.
fn truncated_in_utc(unit: &str, column: &str) -> String {
    let truncated = format!("date_trunc('{unit}'::text, {column}, 'UTC'::text)");
    if !["second", "minute", "hour", "day"].contains(&unit) {
        return truncated;
    }
    let origin = format!("'2000-01-01 00:00:00+00'::{TIMESTAMPTZ}");
    format!(
        "CASE WHEN {column} >= {origin} THEN date_bin('1 {unit}'::interval, {column}, {origin}) \
         ELSE {truncated} END"
    )
}

/// Where Citus distributes the source, the rollup's table is distributed alike, and nodes merge by themselves
/// what is theirs; unless that cannot be.
fn distribute(
    definition: &mut Definition,
    table: &Table,
    scalars: &[Scalar],
    wanted: Option<bool>,
    notices: &mut Vec<Notice>,
) -> Result<()> {
    let (relation, rollup) = (table.qualified(), definition.name.clone());
    let reason = match spread::distribution(table.oid)? {
        None if wanted.is_none() && !citus::is_distributed(table.oid)? => return Ok(()),
        None => format!("Citus does not distribute {relation}."),
        // Citus commits what was written over one connection before we commit: a failure between the two
        // would count a window twice.
        Some((_, 1)) => format!("{relation} has only one shard."),
        Some((column, _)) => {
            let is_it = |scalar: &Scalar| scalar.is_column && scalar.columns == [column.as_str()];
            if let Some(at) = scalars.iter().position(is_it) {
                // Citus takes no row without a value.
                definition.dimensions[at].nullable = false;
                let dimension = definition.dimensions[at].column.name.clone();
                definition.distribution = Some(Distribution { column, dimension });
                return Ok(());
            }
            format!("{relation} is distributed by column \"{column}\", which is none of the dimensions.")
        }
    };
    if wanted == Some(true) {
        return Err(Error::NotDistributable { rollup, reason });
    }
    notices.push(Notice {
        message: format!(
            "rollup \"{rollup}\" is a table of this node: one process here aggregates the rows that the nodes of \
             {relation} send"
        ),
        hint: format!("{reason} Otherwise each node would merge what is its own."),
    });
    Ok(())
}

const NO_NAME: &str = "It has no name: write it as \"expression AS name\".";

/// Without one, texts cannot be compared.
const AMBIGUOUS: &str = "Its collation is ambiguous: add COLLATE.";

/// A value that changes by itself would put a row in one group when it is merged and in another when it is
/// compared.
fn require_steady(scalar: &Scalar, refuse: impl Fn(&str) -> Error) -> Result<Option<Notice>> {
    match scalar.volatility {
        Volatility::Immutable => Ok(None),
        Volatility::Volatile => Err(refuse("It is volatile: it has another value each time.")),
        Volatility::OfSession => {
            Err(refuse("It reads the clock, or asks who the session is: it has another value each time."))
        }
        Volatility::Stable => Ok(Some(Notice {
            message: format!("{} depends on settings such as TimeZone", scalar.text),
            hint: "Rows are merged with TimeZone UTC, bytea_output hex and so on; until then they appear as the reader's \
                   settings say. AT TIME ZONE, encode() or a cast to numeric makes an expression independent."
                .into(),
        })),
    }
}

// ---- time ------------------------------------------------------------------------------------------------

/// The one column of a type of time that the expression reads, as the server writes it.
fn time_column<'a>(table: &'a Table, scalar: &Scalar) -> Option<(&'a str, &'a str)> {
    let [column] = &scalar.columns[..] else { return None };
    let (name, r#type) = table.columns.iter().find(|(name, _)| name == column)?;
    TIME_TYPES.contains(&r#type.as_str()).then_some((name.as_str(), r#type.as_str()))
}

/// What cuts a column of time into consecutive pieces can be looked up by the column itself, which may have
/// an index.
fn cuts_time(table: &Table, scalar: &Scalar) -> bool {
    scalar.cut.is_some() && time_column(table, scalar).is_some()
}

/// Computes an expression over one column of time for some moment. What fails here, for a unit or a time zone
/// that does not exist, would fail for each row.
fn try_moment(
    scope: &Scope,
    scalar: &Scalar,
    (column, r#type): (&str, &str),
    refuse: impl Fn(&str) -> Error,
) -> Result<()> {
    let (moment, expression) = ("2026-02-28 13:37:59.25+00", &scalar.text);
    let sql = format!(
        "SELECT FROM (SELECT '{moment}'::{type} AS {}) t WHERE ({expression}) IS NULL",
        quote_identifier(column)
    );
    match attempt(|| scope.owner.query(&sql, &[], |_| Ok(()))) {
        Ok(_) => Ok(()),
        Err(failure) => Err(refuse(&expression::sentence(&failure.unless_cancel().message))),
    }
}

/// A dimension that buckets time: of a type of time, and over one column of such a type.
fn bucket(table: &Table, dimension: &Dimension, scalar: &Scalar, wanted: Option<&str>) -> Option<Bucket> {
    let (column, r#type) = time_column(table, scalar)?;
    if !TIME_TYPES.contains(&scalar.r#type.as_str()) || wanted.is_some_and(|wanted| wanted != column) {
        return None;
    }
    Some(Bucket {
        dimension: dimension.column.name.clone(),
        source_time: if cuts_time(table, scalar) {
            quoted(column)
        } else {
            dimension.column.expression.clone()
        },
        column: column.into(),
        column_type: r#type.into(),
    })
}

// ---- measures --------------------------------------------------------------------------------------------

fn sum(column: Column, counts: bool) -> Measure {
    Measure { column, combine: Combine::Sum, aggregates: false, empty: counts.then(|| "0".into()) }
}

/// Brings over what 0.1.0 stored: it showed a sum of a floating-point column by a cast, which fails beyond
/// the type's range. `false`: nothing of it does.
pub fn bring_over(definition: &mut Definition) -> bool {
    let mut found = false;
    for output in &mut definition.outputs {
        let column_type = output.r#type.as_str();
        let cast = output.expression.strip_suffix(column_type).and_then(|text| text.strip_suffix("::"));
        if let Some(sum) = cast.filter(|_| ["real", "double precision"].contains(&column_type)) {
            output.expression = float(sum, column_type);
            found = true;
        }
    }
    found
}

/// Whether [`bring_over`] would find something in a stored definition, `r.definition`.
pub const IS_OLD: &str = "EXISTS (SELECT FROM jsonb_array_elements(r.definition -> 'outputs') AS o
    WHERE o ->> 'type' IN ('real', 'double precision') AND o ->> 'expression' LIKE '%::' || (o ->> 'type'))";

/// Aggregates that merge their own results.
const SELF_MERGING: [&str; 5] = ["bool_and", "bool_or", "every", "bit_and", "bit_or"];

/// Adds the columns of a measure. Returns the aggregate that is to be made for it, if any.
fn add_measure(
    definition: &mut Definition,
    scope: &Scope,
    text: &str,
    notices: &mut Vec<Notice>,
) -> Result<Option<MergeFunction>> {
    let what = "measure";
    let refuse = |reason: &str| Error::Expression { what, expression: text.into(), reason: reason.into() };
    let (expression, merge_with) = split_merge_with(text);
    let Parsed { name, scalar, aggregate, .. } = expression::parse(scope, expression, what)?;
    let aggregate = aggregate
        .ok_or_else(|| refuse("It is not a call of an aggregate function, such as count(*) or sum(x)."))?;
    let name = name.ok_or_else(|| refuse(NO_NAME))?;
    for part in aggregate.arguments.iter().chain(&aggregate.filter) {
        notices.extend(require_steady(part, refuse)?);
    }
    let mut merge_function = None;
    let function = aggregate.function.strip_prefix("pg_catalog.").filter(|_| aggregate.built_in);
    let plain = matches!(function, Some("count" | "sum" | "min" | "max" | "avg")) && merge_with.is_none();
    if plain && aggregate.ordered {
        return Err(refuse("DISTINCT and ORDER BY need all rows at once: they cannot be merged."));
    }
    let shown = |expression: String| column(&name, expression, &scalar.r#type);
    let r#type = scalar.r#type.as_str();
    match function {
        Some("count") if plain => {
            definition.measures.push(sum(column(&name, one_if_counted(&aggregate), "bigint"), true));
            definition.outputs.push(shown(quoted(&name)));
        }
        Some("sum") if plain => {
            let state = exact_type(r#type);
            definition.measures.push(sum(column(&name, state_of(&aggregate, state), state), false));
            let exact = state == r#type;
            let sum = quoted(&name);
            definition.outputs.push(shown(if exact { sum } else { float(&sum, r#type) }));
        }
        Some("min" | "max") if plain && scalar.is_ambiguous => return Err(refuse(AMBIGUOUS)),
        Some(minmax @ ("min" | "max")) if plain => {
            let combine = if minmax == "min" { Combine::Min } else { Combine::Max };
            let mut column = column(&name, state_of(&aggregate, r#type), r#type);
            column.collation = scalar.collation.clone();
            definition.measures.push(Measure { column, combine, aggregates: false, empty: None });
            definition.outputs.push(shown(quoted(&name)));
        }
        Some("avg") if plain => {
            let state = exact_type(r#type);
            let (total, count) = (format!("{name}_sum"), format!("{name}_count"));
            if count.len() > LONGEST {
                return Err(refuse("Its name is too long: a column is made that is called NAME_count."));
            }
            definition.measures.push(sum(column(&total, state_of(&aggregate, state), state), false));
            definition.measures.push(sum(column(&count, one_if_counted(&aggregate), "bigint"), true));
            let average = format!("({} / nullif({}, 0))", quoted(&total), quoted(&count));
            let exact = exact_type(r#type) == r#type;
            definition.outputs.push(shown(if exact {
                format!("{average}::{type}")
            } else {
                float(&average, r#type)
            }));
        }
        _ => {
            let own = function.filter(|f| SELF_MERGING.contains(f)).map(str::to_string);
            let merge_with = merge_with.map(str::to_string).or(own).ok_or_else(|| {
                refuse("Nothing says how two of its values become one: add MERGE WITH and a function of two, or an aggregate over them.")
            })?;
            let merge = match find_merge(scope, &merge_with, r#type)
                .ok_or_else(|| refuse(&format!("{merge_with} does not merge values of type {type}.")))?
            {
                Merge::Aggregate(aggregate) => aggregate,
                Merge::Function(function) => {
                    if definition.name.len() + 1 + name.len() > LONGEST {
                        return Err(refuse(
                            "Its name is too long: an aggregate is made that is called ROLLUP.MEASURE.",
                        ));
                    }
                    let aggregate = definition.merge_aggregate(&name);
                    let state = r#type.to_string();
                    merge_function = Some(MergeFunction { aggregate: aggregate.clone(), state, function });
                    aggregate
                }
            };
            let column = column(&name, scalar.text.clone(), r#type);
            definition.measures.push(Measure {
                column,
                combine: Combine::With(merge),
                aggregates: true,
                empty: None,
            });
            definition.outputs.push(shown(quoted(&name)));
        }
    }
    Ok(merge_function)
}

/// `expression AS name MERGE WITH function`, in its two parts.
fn split_merge_with(text: &str) -> (&str, Option<&str>) {
    let upper = text.to_ascii_uppercase();
    for (at, word) in upper.rmatch_indices("MERGE") {
        let before = upper[..at].ends_with(char::is_whitespace);
        let rest = &upper[at + word.len()..];
        let function = rest.trim_start().strip_prefix("WITH").filter(|f| f.starts_with(char::is_whitespace));
        // Where these words are in a literal or a quoted name, what follows has the quote that ends it.
        let function = function.filter(|f| !f.contains('\'') && f.matches('"').count() % 2 == 0);
        if let Some(function) = function.filter(|_| before && rest.starts_with(char::is_whitespace)) {
            return (&text[..at], Some(text[text.len() - function.len()..].trim()));
        }
    }
    (text, None)
}

/// Sums of floating-point numbers depend on the order of addition, so their states are numeric.
fn exact_type(r#type: &str) -> &str {
    match r#type {
        "real" | "double precision" => "numeric",
        other => other,
    }
}

/// The state of one row under sum, min or max: its argument, if the filter lets it through.
fn state_of(aggregate: &Aggregate, r#type: &str) -> String {
    let argument = aggregate.arguments.first().map_or("NULL".into(), |a| match a.r#type.as_str() {
        // A cast of real to numeric would keep six digits.
        "real" => format!("({})::double precision", a.text),
        _ => format!("({})", a.text),
    });
    match &aggregate.filter {
        None => format!("{argument}::{type}"),
        Some(filter) => format!("CASE WHEN {} THEN {argument}::{type} END", filter.text),
    }
}

/// 1 for a row that count(x) counts. Of a row that the filter keeps out, x is not computed: it may fail.
fn one_if_counted(aggregate: &Aggregate) -> String {
    let argument = aggregate.arguments.first();
    let argument = argument.map(|a| format!("(({}) IS DISTINCT FROM NULL)::int", a.text));
    match (argument, &aggregate.filter) {
        (None, None) => ONE_ROW.into(),
        (Some(argument), None) => argument,
        (None, Some(filter)) => format!("(({}) IS TRUE)::int", filter.text),
        (Some(argument), Some(filter)) => format!("CASE WHEN {} THEN {argument} ELSE 0 END", filter.text),
    }
}

enum Merge {
    /// An aggregate over states, qualified.
    Aggregate(String),
    /// A function of two states.
    Function(String),
}

/// Finds, as the caller would, what merges states of `type`.
fn find_merge(scope: &Scope, name: &str, r#type: &str) -> Option<Merge> {
    let words = name.chars().all(|c| c.is_alphanumeric() || "_.\"$".contains(c));
    let parse = |arguments: &str| {
        let call = format!("{name}({arguments}) AS merged");
        expression::parse(scope, &call, "merge function").ok().filter(|p| p.scalar.r#type == r#type)
    };
    if !words {
        return None;
    }
    if let Some(aggregate) = parse(&format!("NULL::{type}")).and_then(|p| p.aggregate) {
        return Some(Merge::Aggregate(aggregate.function));
    }
    let parsed = parse(&format!("NULL::{type}, NULL::{type}")).filter(|p| p.aggregate.is_none())?;
    parsed.function.map(Merge::Function)
}

fn check_columns(definition: &Definition) -> Result<()> {
    let names = definition.dimensions.iter().map(|d| &d.column.name);
    let mut seen: Vec<&String> = vec![];
    for name in names.clone().chain(definition.measures.iter().map(|m| &m.column.name)) {
        if name.starts_with(OURS) {
            return Err(Error::ReservedColumn(name.clone()));
        }
        if seen.contains(&name) {
            return Err(Error::DuplicateColumn(name.clone()));
        }
        seen.push(name);
    }
    let mut seen: Vec<&String> = names.collect();
    for output in &definition.outputs {
        if seen.contains(&&output.name) {
            return Err(Error::DuplicateColumn(output.name.clone()));
        }
        seen.push(&output.name);
    }
    Ok(())
}

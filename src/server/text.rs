//! Names and values in SQL texts.

/// Schema of everything that is stored.
pub const SCHEMA: &str = "litellm_spend";
/// Its functions and views are in another schema, which whoever creates it chooses.
pub const EXTENSION: &str = "litellm_spend";

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

/// A numeric as a floating-point type, whatever its size. The cast alone fails (22003) beyond the type's
/// largest and below its smallest number, so that every query over a group of two such rows would, for ever.
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

/// The midnight after a timestamp. After the last day that the server knows there is none; before the first
/// there is one.
pub fn next_midnight(time: &str) -> String {
    format!(
        "CASE WHEN {time} = '-infinity' THEN '4714-11-24 BC'::timestamp \
         WHEN {time} < '294276-12-31' THEN date_trunc('day', {time}) + interval '1 day' \
         WHEN {time} IS NOT NULL THEN 'infinity'::timestamp END"
    )
}

/// `<name><suffix>`. A name that leaves no room for that is cut.
pub fn suffixed(name: &str, suffix: &str) -> String {
    let longest = LONGEST_NAME.saturating_sub(suffix.len()).min(name.len());
    let end = (0..=longest).rev().find(|i| name.is_char_boundary(*i)).unwrap_or(0);
    format!("{}{suffix}", &name[..end])
}

/// Longest name in bytes that the server does not cut.
pub const LONGEST_NAME: usize = 63;

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

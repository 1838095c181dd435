//! Sources that users roll up: tables whose rows are numbered by a sequence as they are inserted.
//!
//! The numbers must rise in the order in which they are drawn, and every way into the table must draw them
//! from that one sequence. What does not keep to that is refused, with the reason.

use crate::citus;
use crate::error::{Error, Result};
use crate::server::expression;
use crate::server::locks;
use crate::server::relation::{self, FAMILY, Table};
use crate::server::session;
use crate::server::spi::{self, Found};
use crate::server::text::{SCHEMA, quoted};
use crate::state::restore::HERE;
use pgrx::prelude::*;

/// A column that a sequence feeds.
pub struct Numbering {
    pub sequence: pg_sys::Oid,
    sequence_name: String,
    pub column: String,
    r#type: pg_sys::Oid,
    nullable: bool,
}

impl Numbering {
    /// Whether its column is of an integer type, or of a domain over one.
    pub fn is_integer(&self) -> bool {
        // SAFETY: a column's type, which is there as long as the column is.
        is_integer(unsafe { pg_sys::getBaseType(self.r#type) })
    }
}

fn is_integer(base: pg_sys::Oid) -> bool {
    matches!(base, pg_sys::INT2OID | pg_sys::INT4OID | pg_sys::INT8OID)
}

/// The column of `table` that `sequence` numbers, or the only one that any sequence does.
pub fn numbering(table: &Table, sequence: Option<pg_sys::Oid>) -> Result<Numbering> {
    // An identity column's sequence depends on it.
    let identity = spi::query(
        "SELECT attname::text, NOT attnotnull, s.oid, atttypid FROM pg_catalog.pg_depend d
         JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
         JOIN pg_catalog.pg_class s ON s.oid = d.objid AND s.relkind = 'S'
         WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = $1
           AND d.deptype = 'i'",
        &[table.oid.into()],
        |r| Ok((spi::value(r, 1)?, spi::value(r, 2)?, spi::value(r, 3)?, spi::value(r, 4)?)),
    )?;
    let drawn = spi::query(
        "SELECT attname::text, NOT attnotnull, ad.adbin::text, atttypid FROM pg_catalog.pg_attrdef ad
         JOIN pg_catalog.pg_attribute a ON a.attrelid = ad.adrelid AND a.attnum = ad.adnum
             AND a.attgenerated = ''
         WHERE ad.adrelid = $1",
        &[table.oid.into()],
        |r| {
            let default = spi::value::<String>(r, 3)?;
            let from = expression::drawn_from(&default);
            Ok((spi::value(r, 1)?, spi::value(r, 2)?, from, spi::value(r, 4)?))
        },
    )?;
    let drawn = drawn.into_iter().filter_map(|(name, nullable, from, of)| Some((name, nullable, from?, of)));
    let mut found = vec![];
    for (column, nullable, from, r#type) in identity.into_iter().chain(drawn) {
        if sequence.is_none_or(|wanted| wanted == from) {
            let sequence_name = relation::relation_name(from)?;
            found.push(Numbering { sequence: from, sequence_name, column, r#type, nullable });
        }
    }
    let count = found.len();
    let named = sequence.map(relation::relation_name).transpose()?;
    match found.into_iter().next() {
        Some(only) if count == 1 => Ok(only),
        _ => Err(Error::NotNumbered { relation: table.name.clone(), sequence: named, columns: count }),
    }
}

/// Refuses a source into which rows could come that got their number elsewhere: in a partition, when they are
/// written straight to it, or in a parent, whose own default numbers what is written through it. Also asked
/// later, since tables are altered, and attached to others. (No default is read: that would wait for who has
/// locked its table.)
pub fn require_same_numbering(relation: pg_sys::Oid, sequence: pg_sys::Oid) -> Result<()> {
    let elsewhere = spi::current(
        &format!(
            "{FAMILY}
             SELECT a.attrelid::regclass::text, $2::regclass::text, attname::text,
                 other.sequence::regclass::text,
                    d.oid IS NOT NULL
             FROM family JOIN pg_catalog.pg_attribute a ON a.attrelid = family.oid AND a.attnum > 0
             JOIN number USING (attname)
             LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
             LEFT JOIN LATERAL (
                 SELECT objid AS sequence FROM pg_catalog.pg_depend
                 WHERE classid = 'pg_catalog.pg_class'::regclass AND refclassid = classid
                     AND refobjid = a.attrelid
                   AND refobjsubid = a.attnum AND deptype = 'i') AS other ON true
             WHERE (a.attrelid, a.attnum) NOT IN (SELECT relation, attnum FROM draws)
               -- Written straight to a partition without a default, a row has no number and is never counted.
               AND (d.oid IS NOT NULL OR other.sequence IS NOT NULL
                   OR a.attrelid NOT IN (SELECT oid FROM tree))
             UNION ALL SELECT $1::regclass::text, $2::regclass::text, NULL, NULL, false
             WHERE $1 NOT IN (SELECT relation FROM draws)
             LIMIT 1"
        ),
        &[relation.into(), sequence.into()],
        |r| {
            let (relation, sequence) = (spi::value::<String>(r, 1)?, spi::value::<String>(r, 2)?);
            Ok((relation, sequence, r.get::<String>(3)?, r.get::<String>(4)?, spi::value::<bool>(r, 5)?))
        },
    )
    .one()?;
    let Some((relation, number, column, identity, has_default)) = elsewhere else {
        return require_drawn(relation, sequence);
    };
    let Some(column) = column else {
        return Err(Error::NotNumbered { relation, sequence: Some(number), columns: 0 });
    };
    let found = match identity {
        Some(other) => format!("numbered by sequence {other}"),
        None if has_default => "given another default".into(),
        None => "given none".into(),
    };
    Err(Error::NumberedElsewhere { relation, column, found, sequence: number })
}

/// Refuses a table of which a crash empties a part, or all: the rollup would go on to count its rows.
pub fn require_logged(relation: pg_sys::Oid) -> Result<()> {
    let unlogged = spi::current(
        &format!(
            "{FAMILY} SELECT c.oid::regclass::text FROM tree JOIN pg_catalog.pg_class c USING (oid)
             WHERE c.relpersistence = 'u' LIMIT 1"
        ),
        &[relation.into(), pg_sys::InvalidOid.into()],
        |r| spi::value::<String>(r, 1),
    )
    .one()?;
    unlogged.map_or(Ok(()), |name| Err(Error::Unlogged(name)))
}

/// Refuses a default that only computes with the sequence's number, and a column that does not keep it.
fn require_drawn(relation: pg_sys::Oid, sequence: pg_sys::Oid) -> Result<()> {
    let defaults = spi::current(
        &format!(
            "{FAMILY}
             SELECT d.adbin::text, a.atttypid, a.atttypmod, d.adrelid::regclass::text, $2::regclass::text,
                 attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod)
             FROM family JOIN pg_catalog.pg_attrdef d ON d.adrelid = family.oid
             JOIN pg_catalog.pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
             JOIN number USING (attname)"
        ),
        &[relation.into(), sequence.into()],
        |r| {
            let is_drawn = expression::drawn_from(&spi::value::<String>(r, 1)?) == Some(sequence);
            if is_drawn && keeps_numbers(spi::value(r, 2)?, spi::value(r, 3)?) {
                return Ok(None);
            }
            let (relation, sequence) = (spi::value::<String>(r, 4)?, spi::value::<String>(r, 5)?);
            let (column, r#type) = (spi::value::<String>(r, 6)?, spi::value::<String>(r, 7)?);
            Ok(Some(match is_drawn {
                true => Error::NumberNotKept { relation, column, r#type },
                false => {
                    let found = "given another default".into();
                    Error::NumberedElsewhere { relation, column, found, sequence }
                }
            }))
        },
    )?;
    defaults.into_iter().flatten().next().map_or(Ok(()), Err)
}

/// Whether a column of such a type has every number as the sequence gave it. What it rounds can become a
/// number that is merged already. A numeric rounds whole numbers if its scale is negative: to tens or more.
fn keeps_numbers(r#type: pg_sys::Oid, mut modifier: i32) -> bool {
    // SAFETY: a column's type, which is there as long as the column is.
    let base = unsafe { pg_sys::getBaseTypeAndTypmod(r#type, &mut modifier) };
    match base {
        // The scale's sign is bit 10 of a modifier, which is stored with the size of a header added.
        pg_sys::NUMERICOID => modifier < 0 || (modifier - pg_sys::VARHDRSZ as i32) & (1 << 10) == 0,
        other => is_integer(other),
    }
}

/// What makes merges slow or leaves rows out, without being wrong.
pub fn advice(table: &Table, numbering: &Numbering) -> Result<Vec<Notice>> {
    let (relation, column) = (table.qualified(), quoted(&numbering.column));
    let indexed = spi::query(
        "SELECT FROM pg_catalog.pg_index i
         JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid JOIN pg_catalog.pg_am m ON m.oid = c.relam
         JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
         WHERE i.indrelid = $1 AND i.indisvalid AND i.indpred IS NULL AND a.attname = $2::name
           AND m.amname IN ('btree', 'brin')",
        &[table.oid.into(), numbering.column.as_str().into()],
        |_| Ok(()),
    )?;
    let mut notices = vec![];
    if indexed.is_empty() {
        notices.push(Notice {
            message: format!("{relation} has no index on column {column}: each merge reads all of it"),
            hint: format!("A small one is enough: CREATE INDEX ON {relation} USING brin ({column});"),
        });
    }
    let hidden = spi::query(
        "SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_roles r ON r.oid = c.relowner
         WHERE c.oid = $1 AND c.relrowsecurity AND c.relforcerowsecurity
             AND NOT (r.rolsuper OR r.rolbypassrls)",
        &[table.oid.into()],
        |_| Ok(()),
    )?;
    if !hidden.is_empty() {
        notices.push(Notice {
            message: format!("row security on {relation} is forced: nothing is merged as long as it is"),
            hint: format!(
                "ALTER TABLE {relation} NO FORCE ROW LEVEL SECURITY; readers of it are held to it as before."
            ),
        });
    }
    if numbering.nullable {
        notices.push(Notice {
            message: format!("rows of {relation} whose {column} is NULL are never counted"),
            hint: format!("ALTER TABLE {relation} ALTER COLUMN {column} SET NOT NULL;"),
        });
    }
    Ok(notices)
}

/// Something that the caller should know.
pub struct Notice {
    pub message: String,
    pub hint: String,
}

impl Notice {
    pub fn report(self) {
        session::notice(self.message, Some(session::callable(self.hint)));
    }
}

/// Finds or notes the source. Returns its name.
pub fn ensure_source(table: &Table, numbering: &Numbering) -> Result<String> {
    let existing = spi::query(
        "SELECT name FROM litellm_spend.source WHERE relation = $1 AND sequence = $2",
        &[table.oid.into(), numbering.sequence.into()],
        |r| spi::value::<String>(r, 1),
    )
    .one()?;
    if let Some(name) = existing {
        return Ok(name);
    }
    // A table of that name may have been dropped, or have several sequences.
    let name = spi::fresh(
        &format!(
            "INSERT INTO litellm_spend.source (name, relation, sequence, origin)
             SELECT name, $2, $3, {HERE}
             FROM (SELECT n, $1 || CASE n WHEN 1 THEN '' ELSE ' #' || n END AS name
                   FROM generate_series(1, (SELECT count(*) + 1 FROM litellm_spend.source)) AS n) AS names
             WHERE name NOT IN (SELECT name FROM litellm_spend.source) ORDER BY n LIMIT 1
             RETURNING name"
        ),
        &[table.qualified().into(), table.oid.into(), numbering.sequence.into()],
        |r| spi::value::<String>(r, 1),
    )
    .one()?;
    Ok(name.unwrap_or_default())
}

/// What was given as a sequence is one. A number in its place is an OID, as a rule of nothing: where there is
/// `merged_to`, it was meant for that.
pub fn require_sequence(sequence: Option<pg_sys::Oid>, has_merged_to: bool) -> Result<()> {
    let Some(oid) = sequence else { return Ok(()) };
    match Table::find(oid)? {
        Some(found) if found.kind == "S" => Ok(()),
        Some(found) => Err(Error::NotASequence { given: found.qualified(), value: None }),
        None => {
            let value = oid.to_u32();
            Err(Error::NotASequence { given: value.to_string(), value: has_merged_to.then_some(value) })
        }
    }
}

/// The table and its numbering, if it can be a source for the caller. It is locked: until the transaction
/// ends it has the owner, the name and the columns that are found here.
pub fn open_source(
    caller: pg_sys::Oid,
    oid: pg_sys::Oid,
    sequence: Option<pg_sys::Oid>,
) -> Result<(Table, Numbering)> {
    // 1. nobody keeps others from a table that is not theirs.
    session::open(caller, oid)?;
    locks::lock_against_dropping(oid)?;
    // 2. what was seen before the lock may be out of date.
    let table = session::open(caller, oid)?;
    // A source by the name of the change log is taken for it: its rollups would be built-in ones.
    if table.schema == SCHEMA {
        return Err(Error::OurOwn(table.qualified()));
    }
    citus::require_by_hash(oid)?;
    let numbering = numbering(&table, sequence)?;
    let may_read = spi::query(
        "SELECT pg_catalog.has_sequence_privilege($1, $2, 'SELECT')
                AND pg_catalog.has_schema_privilege($1, relnamespace, 'USAGE') FROM pg_catalog.pg_class
                    WHERE oid = $2",
        &[table.owner_oid.into(), numbering.sequence.into()],
        |r| spi::value::<bool>(r, 1),
    )?;
    if may_read != [true] {
        let (sequence, owner) = (numbering.sequence_name, table.owner);
        return Err(Error::SequenceOfAnother { sequence, owner });
    }
    relation::check_sequence(numbering.sequence)?;
    require_logged(oid)?;
    require_same_numbering(table.oid, numbering.sequence)?;
    Ok((table, numbering))
}

/// Sources that no rollup is over any more.
pub fn forget_unused_sources() -> Result<()> {
    spi::run(
        "DELETE FROM litellm_spend.source s
                 WHERE NOT EXISTS (SELECT FROM litellm_spend.rollup r WHERE r.source = s.name)
                 AND NOT EXISTS (SELECT FROM litellm_spend.capture c WHERE c.source = s.name)",
        &[],
    )
}

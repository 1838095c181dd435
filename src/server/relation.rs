//! What the catalog says of relations, sequences, roles and types. By OID, or by qualified name.

use crate::error::{Error, Result};
use crate::server::spi::{Args, Found, current, fresh, query, value};
use crate::server::text::{qualified, suffixed};
use pgrx::datum::Timestamp;
use pgrx::prelude::*;
use std::collections::HashMap;
use std::ffi::CStr;

/// The last value that `sequence` has given out, `None` if none since it was made or restarted. Not read by
/// name, which its owner could give to something else.
pub fn last_value(sequence: pg_sys::Oid) -> Result<Option<i64>> {
    let sql =
        "SELECT pg_catalog.pg_sequence_last_value(seqrelid) FROM pg_catalog.pg_sequence WHERE seqrelid = $1";
    let value = query(sql, &[sequence.into()], |r| Ok(r.get(1)?)).one()?;
    value.ok_or_else(|| Error::NoTable(format!("sequence {}", sequence.to_u32())))
}

/// Refuses a sequence whose values do not rise in the order in which they are drawn, or not after a crash.
pub fn check_sequence(sequence: pg_sys::Oid) -> Result<()> {
    let shape = current(
        "SELECT seqincrement, seqcache, seqcycle, seqrelid::regclass::text, relpersistence = 'u'
         FROM pg_catalog.pg_sequence JOIN pg_catalog.pg_class c ON c.oid = seqrelid WHERE seqrelid = $1",
        &[sequence.into()],
        |r| {
            let shape = (value::<i64>(r, 1)?, value::<i64>(r, 2)?, value::<bool>(r, 3)?);
            Ok((shape, value::<String>(r, 4)?, value::<bool>(r, 5)?))
        },
    )
    .one()?;
    let Some(((increment, cache, cycle), sequence, unlogged)) = shape else {
        return Err(Error::NoTable(format!("sequence {}", sequence.to_u32())));
    };
    let mut remedy = "INCREMENT BY 1 CACHE 1 NO CYCLE";
    let reason = if increment <= 0 {
        format!("Its increment is {increment}: a later row would have a lower number.")
    } else if cache != 1 {
        format!("Its cache is {cache}: a session could use a low number long after others used higher ones.")
    } else if cycle {
        "It cycles: a number could come twice.".into()
    } else if unlogged {
        remedy = "SET LOGGED";
        "It is unlogged: after a crash it begins anew, with numbers that are merged already.".into()
    } else {
        return Ok(());
    };
    Err(Error::SequenceShape { sequence, reason, remedy })
}

/// `WITH RECURSIVE`: `tree`, relation $1 and what inherits from it.
macro_rules! tree {
    () => {
        "WITH RECURSIVE tree(oid) AS (
             SELECT $1 UNION SELECT inhrelid FROM pg_catalog.pg_inherits JOIN tree ON inhparent = tree.oid)"
    };
}

/// Takes ACCESS SHARE on the relations and what inherits from them, as a reader of them does, and waits for
/// it as one.
pub fn lock_for_reading(relations: &[pg_sys::Oid]) -> Result<()> {
    for relation in relations {
        lock_alone_for_reading(*relation);
        relation_tree(*relation)?.into_iter().for_each(lock_alone_for_reading);
    }
    Ok(())
}

/// The same, without what inherits from it.
pub fn lock_alone_for_reading(relation: pg_sys::Oid) {
    // SAFETY: waits for a lock, of which the transaction's end is the end.
    unsafe { pg_sys::LockRelationOid(relation, pg_sys::AccessShareLock as i32) };
}

/// The relation and all that inherit from it: partitions and their partitions.
pub fn relation_tree(relation: pg_sys::Oid) -> Result<Vec<pg_sys::Oid>> {
    current(concat!(tree!(), " SELECT oid FROM tree"), &[relation.into()], |r| value(r, 1))
}

/// A relation that another is a partition of, or inherits from.
pub fn parent(relation: pg_sys::Oid) -> Result<Option<pg_sys::Oid>> {
    let sql = "SELECT inhparent FROM pg_catalog.pg_inherits WHERE inhrelid = $1 ORDER BY inhseqno LIMIT 1";
    current(sql, &[relation.into()], |r| value(r, 1)).one()
}

/// The columns by which a table and its partitions, which are its [`relation_tree`], are partitioned, in
/// order of their names. Empty if one of them is partitioned by an expression.
pub fn partition_keys(tree: &[pg_sys::Oid]) -> Result<Vec<String>> {
    let keys = query(
        "SELECT DISTINCT a.attname::text COLLATE \"C\" FROM pg_catalog.pg_partitioned_table p
         CROSS JOIN unnest(p.partattrs::int2[]) AS key(attnum)
         LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = p.partrelid AND a.attnum = key.attnum
             AND a.attnum > 0
         WHERE p.partrelid = ANY ($1) ORDER BY 1",
        &[tree.to_vec().into()],
        |r| Ok(r.get::<String>(1)?),
    )?;
    Ok(keys.into_iter().collect::<Option<_>>().unwrap_or_default())
}

/// The partitions of a relation that is partitioned by ranges of this column alone, a timestamp, in order,
/// and where each ends: DEFAULT, and what has no end, come last. Of any other relation there are none.
pub fn ends_of_partitions(
    relation: pg_sys::Oid,
    column: &str,
) -> Result<Vec<(pg_sys::Oid, Option<Timestamp>)>> {
    current(
        "SELECT c.oid, (pg_catalog.regexp_match(pg_catalog.pg_get_expr(c.relpartbound, c.oid),
                ' TO [(]''([^'']+)''[)]$'))[1]::timestamp AS next
         FROM pg_catalog.pg_partitioned_table p
         JOIN pg_catalog.pg_attribute a ON a.attrelid = p.partrelid AND a.attnum = p.partattrs[0]
         JOIN pg_catalog.pg_inherits i ON i.inhparent = p.partrelid
         JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
         WHERE p.partrelid = $1 AND p.partstrat = 'r' AND p.partnatts = 1 AND a.attname = $2::name
         ORDER BY next",
        &[relation.into(), column.into()],
        |r| Ok((value(r, 1)?, r.get(2)?)),
    )
}

/// A foreign table among those that inherit from a relation.
pub fn foreign_partition(relation: pg_sys::Oid) -> Result<Option<pg_sys::Oid>> {
    foreign_of(&relation_tree(relation)?)
}

/// The first of the relations that is a foreign table.
pub fn foreign_of(relations: &[pg_sys::Oid]) -> Result<Option<pg_sys::Oid>> {
    let sql =
        "SELECT oid FROM pg_catalog.pg_class WHERE oid = ANY ($1) AND relkind = 'f' ORDER BY oid LIMIT 1";
    query(sql, &[relations.to_vec().into()], |r| value(r, 1)).one()
}

/// [`tree!`], and `family`, these and what any of them inherits from; `draws`, the columns that sequence $2
/// numbers, as their identity or in their default; `number`, the name of the one of relation $1.
pub const FAMILY: &str = concat!(
    tree!(),
    ",
    family(oid) AS (
        SELECT oid FROM tree UNION SELECT inhparent FROM pg_catalog.pg_inherits JOIN family
            ON inhrelid = family.oid),
    draws(relation, attnum) AS (
        SELECT refobjid, refobjsubid FROM pg_catalog.pg_depend
        WHERE classid = 'pg_catalog.pg_class'::regclass AND objid = $2 AND refclassid = classid
            AND deptype = 'i'
        UNION SELECT d.adrelid, d.adnum FROM pg_catalog.pg_depend p JOIN pg_catalog.pg_attrdef d
            ON d.oid = p.objid
        WHERE p.classid = 'pg_catalog.pg_attrdef'::regclass AND p.refclassid = 'pg_catalog.pg_class'::regclass
          AND p.refobjid = $2),
    number AS (
        SELECT a.attname FROM draws JOIN pg_catalog.pg_attribute a
            ON a.attrelid = draws.relation AND a.attnum = draws.attnum
        WHERE draws.relation = $1)"
);

/// The column of a relation that a sequence numbers, quoted.
pub fn numbered_column(relation: pg_sys::Oid, sequence: pg_sys::Oid) -> Result<String> {
    let sql = format!("{FAMILY} SELECT pg_catalog.quote_ident(attname) FROM number");
    let column = current(&sql, &[relation.into(), sequence.into()], |r| value::<String>(r, 1)).one()?;
    column.ok_or_else(|| Error::NoTable(relation.to_u32().to_string()))
}

/// Whether a statement of this session that has not ended uses a relation, which we have locked.
pub fn is_open_here(relation: pg_sys::Oid) -> bool {
    // SAFETY: nobody drops it. Who has opened it counts in its entry, as we do for a moment.
    unsafe {
        let open = pg_sys::RelationIdGetRelation(relation);
        if open.is_null() {
            return false;
        }
        let others = (*open).rd_refcnt > 1;
        pg_sys::RelationClose(open);
        others
    }
}

pub fn relation_name(relation: pg_sys::Oid) -> Result<String> {
    let name = current(
        "SELECT nspname::text, relname::text FROM pg_catalog.pg_class c
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1",
        &[relation.into()],
        |r| Ok(qualified(&value::<String>(r, 1)?, &value::<String>(r, 2)?)),
    )
    .one()?;
    name.ok_or_else(|| Error::NoTable(relation.to_u32().to_string()))
}

/// The names of relations, those that there are: one query for a table of hundreds of partitions.
pub fn relation_names(relations: &[pg_sys::Oid]) -> Result<HashMap<pg_sys::Oid, String>> {
    let names = fresh(
        "SELECT c.oid, nspname::text, relname::text FROM pg_catalog.pg_class c
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY ($1)",
        &[relations.to_vec().into()],
        |r| Ok((value(r, 1)?, qualified(&value::<String>(r, 2)?, &value::<String>(r, 3)?))),
    )?;
    Ok(names.into_iter().collect())
}

/// A relation as the system catalogs describe it.
pub struct Table {
    pub oid: pg_sys::Oid,
    pub schema: String,
    pub name: String,
    pub kind: String,
    pub persistence: String,
    pub owner: String,
    pub owner_oid: pg_sys::Oid,
    /// Storage options, `name=value, …`.
    pub options: String,
    /// Name and type, as the server writes it on the pinned path: what is not qualified is a type of its own.
    pub columns: Vec<(String, String)>,
}

impl Table {
    /// The type of a column, if there is one of that name.
    pub fn type_of(&self, column: &str) -> Option<&str> {
        self.columns.iter().find(|(name, _)| name == column).map(|(_, r#type)| r#type.as_str())
    }

    /// Whether there is such a column; an error says that it has another type than `expected`.
    pub fn has(&self, column: &str, expected: &str) -> Result<bool> {
        let Some(found) = self.type_of(column).filter(|found| *found != expected) else {
            return Ok(self.type_of(column).is_some());
        };
        let (relation, column) = (self.name.clone(), column.to_string());
        Err(Error::ColumnType { relation, column, found: found.into(), expected: expected.into() })
    }

    pub fn find(oid: pg_sys::Oid) -> Result<Option<Table>> {
        let tables = current(
            "SELECT n.nspname::text, c.relname::text, c.relkind::text, c.relpersistence::text,
                    pg_catalog.pg_get_userbyid(c.relowner)::text,
                    coalesce(pg_catalog.array_to_string(c.reloptions, ', '), ''), c.relowner
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                 WHERE c.oid = $1",
            &[oid.into()],
            |r| {
                Ok(Table {
                    oid,
                    schema: value(r, 1)?,
                    name: value(r, 2)?,
                    kind: value(r, 3)?,
                    persistence: value(r, 4)?,
                    owner: value(r, 5)?,
                    options: value(r, 6)?,
                    owner_oid: value(r, 7)?,
                    columns: vec![],
                })
            },
        )
        .one()?;
        let Some(mut table) = tables else { return Ok(None) };
        table.columns = current(
            "SELECT attname::text, pg_catalog.format_type(atttypid, NULL) FROM pg_catalog.pg_attribute
             WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            &[oid.into()],
            |r| Ok((value(r, 1)?, value(r, 2)?)),
        )?;
        Ok(Some(table))
    }

    /// Finds a table by a qualified, quoted name.
    pub fn named(name: &str) -> Result<Option<Table>> {
        find_relation(name)?.map(Table::find).transpose().map(Option::flatten)
    }

    pub fn qualified(&self) -> String {
        qualified(&self.schema, &self.name)
    }
}

/// The columns that can be inserted into, as a list: not the generated ones.
pub fn stored_columns(relation: pg_sys::Oid) -> Result<String> {
    let column = query(
        "SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_catalog.pg_attribute
         WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped AND attgenerated = ''",
        &[relation.into()],
        |r| value(r, 1),
    )
    .one()?;
    Ok(column.unwrap_or_default())
}

/// One of these columns that is generated.
pub fn generated_of(relation: pg_sys::Oid, columns: &[String]) -> Result<Option<String>> {
    query(
        "SELECT attname::text FROM pg_catalog.pg_attribute
         WHERE attrelid = $1 AND attname = ANY ($2::text[]) AND attgenerated <> '' ORDER BY attnum",
        &[relation.into(), columns.to_vec().into()],
        |r| value(r, 1),
    )
    .one()
}

/// Finds a relation by its quoted name. One that is not qualified is looked up on the path as it is, which
/// may be the caller's: so no statement of ours may do it.
pub fn find_relation(name: &str) -> Result<Option<pg_sys::Oid>> {
    // SAFETY: a function of the server's that takes a text, and returns NULL where there is no such relation.
    Ok(unsafe { pgrx::direct_function_call(pg_sys::to_regclass, &[name.into_datum()]) })
}

/// A relation's name without its schema, also of one that an extension hides from queries.
pub fn cached_name(relation: pg_sys::Oid) -> Option<String> {
    // SAFETY: a copy of the name, or null.
    let name = unsafe { pg_sys::get_rel_name(relation) };
    (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
}

/// Whether a crash empties it.
pub fn is_unlogged(relation: pg_sys::Oid) -> bool {
    // SAFETY: looks it up; that a relation is gone is an error, as in any query of it.
    unsafe { pg_sys::get_rel_persistence(relation) as u8 == pg_sys::RELPERSISTENCE_UNLOGGED }
}

/// Has all sessions of this database told, once the transaction has committed, that the relation has changed.
pub fn tell_of(name: &str) -> Result<()> {
    let relation = find_relation(name)?.ok_or_else(|| Error::NoTable(name.into()))?;
    // SAFETY: the relation is there.
    unsafe { pg_sys::CacheInvalidateRelcacheByRelid(relation) };
    Ok(())
}

/// A name that nothing has in either schema: `name`, or `name_2`, …
pub fn free_name(schemas: [&str; 2], name: &str) -> Result<String> {
    for number in 1..1000 {
        let candidate = if number == 1 { name.to_string() } else { suffixed(name, &format!("_{number}")) };
        let [one, other] = schemas.map(|schema| find_relation(&qualified(schema, &candidate)));
        if one?.or(other?).is_none() {
            return Ok(candidate);
        }
    }
    Err(Error::Exists(name.into()))
}

/// Whether one of the relations, by qualified and quoted names, does not exist.
pub fn any_missing(names: Vec<String>) -> Result<bool> {
    let sql = "SELECT FROM unnest($1::text[]) AS name WHERE pg_catalog.to_regclass(name) IS NULL LIMIT 1";
    query(sql, &[names.into()], |_| Ok(())).any()
}

/// That of an extension's functions, types and views, if the extension is there.
pub fn extension_schema(extension: &str) -> Result<Option<String>> {
    let sql = "SELECT n.nspname::text FROM pg_catalog.pg_extension e
               JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = $1::name";
    query(sql, &[extension.into()], |r| value(r, 1)).one()
}

pub fn role_name(role: pg_sys::Oid) -> Result<String> {
    let sql = "SELECT rolname::text FROM pg_catalog.pg_roles WHERE oid = $1";
    let name = query(sql, &[role.into()], |r| value(r, 1)).one()?;
    name.ok_or(Error::NoRole(role.to_u32()))
}

/// Whose the schema is, if the role may not use it.
pub fn owner_of_closed_schema(role: pg_sys::Oid, schema: &str) -> Result<Option<pg_sys::Oid>> {
    let sql = "SELECT nspowner FROM pg_catalog.pg_namespace
               WHERE nspname = $2::name AND NOT pg_catalog.has_schema_privilege($1, oid, 'USAGE')";
    query(sql, &[role.into(), schema.into()], |r| value(r, 1)).one()
}

pub fn type_name(r#type: pg_sys::Oid) -> Result<String> {
    let names =
        query("SELECT pg_catalog.format_type($1, NULL)", &[r#type.into()], |r| value::<String>(r, 1))?;
    Ok(names.into_iter().next().unwrap_or_default())
}

/// Whether values of the type can be sorted: then they can be a key.
pub fn is_sortable(r#type: pg_sys::Oid) -> bool {
    // SAFETY: reads the catalog and the type cache. TypeCacheEntry outlives this call.
    unsafe {
        let is_pseudo = pg_sys::get_typtype(r#type) as u8 == pg_sys::TYPTYPE_PSEUDO;
        let flag = pg_sys::TYPECACHE_LT_OPR as i32;
        !is_pseudo && (*pg_sys::lookup_type_cache(r#type, flag)).lt_opr != pg_sys::InvalidOid
    }
}

/// Whether the column is declared NOT NULL.
pub fn is_not_null(relation: pg_sys::Oid, column: &str) -> Result<bool> {
    let sql = "SELECT FROM pg_catalog.pg_attribute
               WHERE attrelid = $1 AND attnum > 0 AND attnotnull AND attname = $2::name";
    query(sql, &[relation.into(), column.into()], |_| Ok(())).any()
}

/// What of `objects`, a query for their classid, objid and owner, uses a type, function or operator of
/// neither its owner nor a superuser: to read its text again, as its owner, would call code of that third
/// role.
pub fn code_of_third_roles(objects: &str, args: Args) -> Result<Vec<String>> {
    let sql = format!(
        "SELECT DISTINCT pg_catalog.format('%s uses %s, which belongs to another role, %s.',
                    pg_catalog.pg_describe_object(o.classid, o.objid, 0),
                    pg_catalog.pg_describe_object(d.refclassid, d.refobjid, 0), u.owner::regrole)
         FROM ({objects}) AS o JOIN pg_catalog.pg_depend d ON d.classid = o.classid AND d.objid = o.objid
         CROSS JOIN LATERAL (
             SELECT typowner FROM pg_catalog.pg_type WHERE d.refclassid = 'pg_catalog.pg_type'::regclass
                 AND oid = d.refobjid
             UNION ALL SELECT proowner FROM pg_catalog.pg_proc
                 WHERE d.refclassid = 'pg_catalog.pg_proc'::regclass AND oid = d.refobjid
             UNION ALL SELECT oprowner FROM pg_catalog.pg_operator
                 WHERE d.refclassid = 'pg_catalog.pg_operator'::regclass AND oid = d.refobjid) AS u(owner)
         WHERE u.owner <> o.owner
             AND NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE oid = u.owner AND rolsuper)"
    );
    query(&sql, args, |r| value(r, 1))
}

/// A permanent table, ordinary or partitioned; anything else is refused by what it is. Who may act for its
/// owner, the caller asks.
pub fn open(oid: pg_sys::Oid) -> Result<Table> {
    let table = Table::find(oid)?.ok_or_else(|| Error::NoTable(oid.to_u32().to_string()))?;
    let kind = match (table.kind.as_str(), table.persistence.as_str()) {
        ("r" | "p", "p") => None,
        ("r" | "p", "t") => Some("a temporary table"),
        ("r" | "p", _) => Some("an unlogged table, which a crash empties"),
        ("v", _) => Some("a view"),
        ("m", _) => Some("a materialized view"),
        ("f", _) => Some("a foreign table"),
        _ => Some("not a table"),
    };
    match kind {
        Some(kind) => Err(Error::NotATable { relation: table.name, kind }),
        None => Ok(table),
    }
}

// ---- privileges ------------------------------------------------------------------------------------------

/// The statements that take a table, sequence or view from everybody but its owner.
pub fn revocations(name: &str) -> Result<Vec<String>> {
    let acl = "SELECT relacl, relowner FROM pg_catalog.pg_class WHERE oid = pg_catalog.to_regclass($1)";
    revocations_by(acl, "TABLE", name)
}

/// The same of a function, which PUBLIC may call unless somebody says otherwise.
pub fn revocations_of_function(signature: &str) -> Result<Vec<String>> {
    let acl = "SELECT coalesce(proacl, acldefault('f', proowner)), proowner FROM pg_catalog.pg_proc
               WHERE oid = pg_catalog.to_regprocedure($1)";
    revocations_by(acl, "FUNCTION", signature)
}

/// `acl` gives the privileges on the object and its owner.
fn revocations_by(acl: &str, kind: &str, object: &str) -> Result<Vec<String>> {
    let sql = format!(
        "SELECT DISTINCT CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END
         FROM ({acl}) AS o(acl, owner), aclexplode(o.acl) AS x WHERE x.grantee <> o.owner"
    );
    let grantees = current(&sql, &[object.into()], |r| value::<String>(r, 1))?;
    Ok(grantees.iter().map(|role| format!("REVOKE ALL ON {kind} {object} FROM {role} CASCADE")).collect())
}

//! Everything that belongs to a table or depends on it, as statements that make it anew for another table of
//! the same name: read while the old table still has that name, run when the new one has it.
//!
//! What cannot be carried over is named in [`Dependents::obstacles`]; nothing is left behind in silence.
//!
//! The statements are texts from the catalog, and parsing or running them can call functions of whoever made
//! the objects. What uses a type or function of a third role is an obstacle: reading its text again would
//! call that role's code, such as the CHECK of a domain that a constant is of. Each of the others is run as
//! the owner of what it changes: the table's owner, or a view's or function's own. What may belong to neither
//! is ours: publications (whose text holds names, and a row filter, in which the server allows nothing but
//! its own functions and types), and the names and owners of statistics objects.

use crate::error::Result;
use crate::guc;
use crate::server::relation::{
    Table, code_of_third_roles, relation_tree, revocations, revocations_of_function,
};
use crate::server::rewrite;
use crate::server::session::Owner;
use crate::server::spi::{Found, query, run, value};
use crate::server::text::{literal, qualified, quoted};
use crate::state::indexes::PREFIX;
use pgrx::prelude::*;

pub struct Dependents {
    pub table: Table,
    /// The primary key's constraint and its columns.
    pub key: Option<(String, Vec<String>)>,
    /// Valid indexes that are neither the primary key's nor ours.
    pub indexes: Vec<Index>,
    /// Those that are not ours.
    pub triggers: Vec<Trigger>,
    /// Views that read the table directly, in the order in which they may be locked.
    pub views: Vec<View>,
    pub functions: Vec<Function>,
    pub constraints: Vec<Piece>,
    /// Those of them that old rows need not meet.
    pub not_valid: Vec<Piece>,
    /// Policies, grants, comments, publications, statistics, replica identity, sequences.
    pub pieces: Vec<Piece>,
    pub obstacles: Vec<String>,
}

/// An object, and the statements that give it to the new table.
pub struct Piece {
    pub kind: String,
    pub object: String,
    sql: Vec<String>,
    actor: Actor,
}

/// The role that runs the statements of a piece.
#[derive(Clone, Copy)]
enum Actor {
    Owner,
    Ourselves,
}

impl Piece {
    pub fn give(&self, owner: Owner) -> Result<()> {
        self.sql.iter().try_for_each(|sql| match self.actor {
            Actor::Ourselves => run(sql, &[]),
            Actor::Owner => owner.run(sql),
        })
    }
}

/// A function with an SQL body that reads the table.
pub struct Function {
    pub name: String,
    owner: Owner,
    sql: String,
}

pub struct Index {
    pub name: String,
    pub sql: String,
    /// What `sql` says after the table's name.
    pub definition: String,
    pub comment: Option<String>,
}

pub struct Trigger {
    pub name: String,
    sql: Vec<String>,
}

pub struct View {
    pub oid: pg_sys::Oid,
    /// Qualified.
    pub name: String,
    query: String,
}

impl Dependents {
    /// `renamed` is what the table will be called, `key_index` an index on it that is ours, both qualified.
    pub fn read(table: Table, renamed: &str, key_index: &str) -> Result<Dependents> {
        let oid = table.oid;
        let mut obstacles = obstacles(&table, key_index)?;
        let key = key(oid)?;
        if key.is_none() {
            obstacles.push("It has no primary key.".into());
        }
        let stale = views(oid, "m")?.into_iter();
        obstacles.extend(stale.map(|view| format!("Materialized view {} reads it.", view.name)));
        let not_valid = format!("{CONSTRAINTS} AND NOT convalidated");
        Ok(Dependents {
            key,
            indexes: indexes(oid)?,
            triggers: triggers(oid)?,
            views: views(oid, "v")?,
            functions: functions(oid)?,
            constraints: pieces(&table, renamed, &[(Actor::Owner, CONSTRAINTS)])?,
            not_valid: pieces(&table, renamed, &[(Actor::Owner, &not_valid)])?,
            pieces: pieces(&table, renamed, &PIECES)?,
            obstacles,
            table,
        })
    }

    fn owner(&self) -> Owner {
        Owner::role(self.table.owner_oid)
    }

    /// Drops the triggers, but for ours, from the table under its new name: they would fire twice.
    pub fn drop_triggers(&self, table: &str) -> Result<()> {
        for trigger in &self.triggers {
            self.owner().run(format!("DROP TRIGGER {} ON {table}", quoted(&trigger.name)))?;
        }
        Ok(())
    }

    /// Gives the new table all that the old one had, but for what its rows are stored by: it has those.
    pub fn give(&self) -> Result<()> {
        let (schema, name) = (&self.table.schema, self.table.qualified());
        let owner = self.owner();
        let run = |sql: String| owner.run(sql);
        for index in &self.indexes {
            if let Some(comment) = &index.comment {
                let index = qualified(schema, &index.name);
                run(format!("COMMENT ON INDEX {index} IS {}", literal(comment)))?;
            }
        }
        revoke_default_privileges(owner, &name)?;
        self.pieces.iter().try_for_each(|piece| piece.give(owner))?;
        self.triggers.iter().flat_map(|trigger| &trigger.sql).try_for_each(|sql| owner.run(sql))
    }

    /// Has the views and functions that read the old table read the new one.
    pub fn point_readers(&self) -> Result<()> {
        for view in &self.views {
            rewrite::replace(guc::swap_lock_timeout(), view.oid, &view.query)?;
        }
        self.functions.iter().try_for_each(|function| function.owner.run(&function.sql))
    }
}

/// Takes from a new table what ALTER DEFAULT PRIVILEGES granted on it: it gets the grants of the table that
/// it is made for instead.
pub fn revoke_default_privileges(owner: Owner, table: &str) -> Result<()> {
    revocations(table)?.into_iter().try_for_each(|sql| owner.run(sql))
}

/// Takes EXECUTE on a function from everybody but its owner, PUBLIC included.
pub fn revoke_execute(owner: Owner, signature: &str) -> Result<()> {
    revocations_of_function(signature)?.into_iter().try_for_each(|sql| owner.run(sql))
}

fn key(table: pg_sys::Oid) -> Result<Option<(String, Vec<String>)>> {
    query(
        "SELECT c.conname::text, array_agg(a.attname::text ORDER BY k.n)
         FROM pg_catalog.pg_constraint c, unnest(c.conkey) WITH ORDINALITY AS k(attnum, n),
             pg_catalog.pg_attribute a
         WHERE c.conrelid = $1 AND c.contype = 'p' AND a.attrelid = c.conrelid AND a.attnum = k.attnum
         GROUP BY c.conname",
        &[table.into()],
        |r| Ok((value(r, 1)?, value(r, 2)?)),
    )
    .one()
}

pub fn indexes(table: pg_sys::Oid) -> Result<Vec<Index>> {
    query(
        "SELECT c.relname::text, def.sql, d.description, substr(def.sql, length(def.head) + 1)
         FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
         JOIN pg_catalog.pg_class t ON t.oid = i.indrelid
         JOIN pg_catalog.pg_namespace n ON n.oid = t.relnamespace
         CROSS JOIN LATERAL (
             SELECT pg_catalog.pg_get_indexdef(c.oid) AS sql, pg_catalog.format('CREATE INDEX %I ON %s%I.%I ',
                 c.relname, CASE c.relkind WHEN 'I' THEN 'ONLY ' ELSE '' END, n.nspname, t.relname) AS head
         ) AS def
         LEFT JOIN pg_catalog.pg_description d ON d.classoid = 'pg_class'::regclass AND d.objoid = c.oid
             AND d.objsubid = 0
         WHERE i.indrelid = $1 AND i.indisvalid AND NOT i.indisprimary AND NOT i.indisunique
             AND NOT starts_with(c.relname, $2)
         ORDER BY 1",
        &[table.into(), PREFIX.into()],
        |r| {
            let (name, sql, definition) = (value(r, 1)?, value(r, 2)?, value(r, 4)?);
            Ok(Index { name, sql, definition, comment: r.get(3)? })
        },
    )
}

/// Triggers of ours: by their names, which anybody may give, and by where their functions are.
macro_rules! is_ours {
    () => {
        "(starts_with(tgname, 'litellm_spend_') AND tgfoid IN (SELECT oid FROM pg_catalog.pg_proc
             WHERE pronamespace IN (to_regnamespace('litellm_spend'), to_regnamespace('litellm_spend_archive'))))"
    };
}

fn triggers(table: pg_sys::Oid) -> Result<Vec<Trigger>> {
    query(
        concat!("SELECT tgname::text, pg_catalog.array_remove(ARRAY[pg_catalog.pg_get_triggerdef(oid),
                CASE WHEN tgenabled <> 'O' THEN pg_catalog.format('ALTER TABLE %s %s TRIGGER %I',
                    tgrelid::regclass,
                    CASE tgenabled WHEN 'D' THEN 'DISABLE' WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE ALWAYS' END, tgname)
                END,
                'COMMENT ON TRIGGER ' || pg_catalog.quote_ident(tgname) || ' ON ' || tgrelid::regclass || ' IS '
                    || pg_catalog.quote_literal(pg_catalog.obj_description(oid, 'pg_trigger'))], NULL)
         FROM pg_catalog.pg_trigger
         WHERE tgrelid = $1 AND NOT tgisinternal AND NOT ", is_ours!(), " ORDER BY 1"),
        &[table.into()],
        |r| Ok(Trigger { name: value(r, 1)?, sql: value(r, 2)? }),
    )
}

fn views(table: pg_sys::Oid, kind: &str) -> Result<Vec<View>> {
    query(
        "SELECT c.oid, n.nspname::text, c.relname::text,
             pg_catalog.rtrim(pg_catalog.pg_get_viewdef(c.oid), ';')
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind::text = $2 AND EXISTS (
             SELECT FROM pg_catalog.pg_rewrite w JOIN pg_catalog.pg_depend d
                 ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
             WHERE w.ev_class = c.oid AND d.refclassid = 'pg_class'::regclass AND d.refobjid = $1)
         ORDER BY c.oid",
        &[table.into(), kind.into()],
        |r| {
            let name = qualified(&value::<String>(r, 2)?, &value::<String>(r, 3)?);
            Ok(View { oid: value(r, 1)?, name, query: value(r, 4)? })
        },
    )
}

fn functions(table: pg_sys::Oid) -> Result<Vec<Function>> {
    query(
        "SELECT DISTINCT p.oid::regprocedure::text, pg_catalog.pg_get_functiondef(p.oid), p.proowner
         FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_depend d ON d.classid = 'pg_proc'::regclass
             AND d.objid = p.oid
         WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = $1 AND p.prosqlbody IS NOT NULL
             ORDER BY 1",
        &[table.into()],
        |r| Ok(Function { name: value(r, 1)?, sql: value(r, 2)?, owner: Owner::role(value(r, 3)?) }),
    )
}

/// CHECK constraints.
const CONSTRAINTS: &str = "SELECT 'constraint', conname::text,
            ARRAY[format('ALTER TABLE %s ADD CONSTRAINT %I %s', $2, conname, pg_get_constraintdef(oid))]
     FROM pg_constraint WHERE conrelid = $1 AND contype = 'c' AND NOT connoinherit";

/// Each query gives kind, object and statements; `$1` is the old table's Oid, `$2` the name that it has and
/// the new one will have, `$3` the name that it will have then.
const PIECES: [(Actor, &str); 17] = [
    // Comments on the table and its columns.
    (Actor::Owner, "SELECT 'comment', coalesce('column ' || quote_ident(a.attname), 'table'),
            ARRAY[format('COMMENT ON %s IS %L', CASE WHEN a.attname IS NULL THEN 'TABLE ' || $2
                         ELSE 'COLUMN ' || $2 || '.' || quote_ident(a.attname) END, d.description)]
     FROM pg_description d LEFT JOIN pg_attribute a ON a.attrelid = d.objoid AND a.attnum = d.objsubid
         AND d.objsubid > 0
     WHERE d.classoid = 'pg_class'::regclass AND d.objoid = $1"),
    // Row security.
    (Actor::Owner, "SELECT 'row security', lower(s.word),
        ARRAY[format('ALTER TABLE %s %s ROW LEVEL SECURITY', $2, s.word)]
     FROM pg_class c, (VALUES ('ENABLE'), ('FORCE')) AS s(word)
     WHERE c.oid = $1 AND CASE s.word WHEN 'ENABLE' THEN c.relrowsecurity ELSE c.relforcerowsecurity END"),
    (Actor::Owner, "SELECT 'policy', polname::text,
            ARRAY[format('CREATE POLICY %I ON %s AS %s FOR %s TO %s', polname, $2,
                   CASE WHEN polpermissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END,
                   CASE polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
                   (SELECT string_agg(CASE r WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(r)) END, ', ')
                       FROM unnest(polroles) AS r))
            || coalesce(' USING (' || pg_get_expr(polqual, polrelid) || ')', '')
            || coalesce(' WITH CHECK (' || pg_get_expr(polwithcheck, polrelid) || ')', '')]
     FROM pg_policy WHERE polrelid = $1"),
    // Comments on these, and on constraints, which it has by now.
    (Actor::Owner, "SELECT 'comment', k.kind || ' ' || quote_ident(k.name),
            ARRAY[format('COMMENT ON %s %I ON %s IS %L', upper(k.kind), k.name, $2, d.description)]
     FROM (SELECT 'policy', polname, oid, 'pg_policy'::regclass FROM pg_policy WHERE polrelid = $1
           UNION ALL SELECT 'constraint', conname, oid, 'pg_constraint'::regclass FROM pg_constraint
           WHERE conrelid = $1 AND contype IN ('c', 'p')) AS k (kind, name, oid, class)
     JOIN pg_description d ON d.classoid = k.class AND d.objoid = k.oid"),
    // And on the index of the primary key.
    (Actor::Owner, "SELECT 'comment', 'index ' || quote_ident(k.conname),
            ARRAY[format('COMMENT ON INDEX %I.%I IS %L', n.nspname, k.conname, d.description)]
     FROM pg_constraint k JOIN pg_namespace n ON n.oid = k.connamespace
     JOIN pg_description d ON d.classoid = 'pg_class'::regclass AND d.objoid = k.conindid AND d.objsubid = 0
     WHERE k.conrelid = $1 AND k.contype = 'p'"),
    // Publications: subscribers go on to see one table of the old name.
    (Actor::Ourselves, PUBLICATIONS),
    (Actor::Ourselves, VIA_ROOT),
    // Replica identity, unless it is the primary key.
    (Actor::Owner, "SELECT 'replica identity',
        CASE relreplident WHEN 'f' THEN 'full' WHEN 'n' THEN 'nothing' ELSE 'index' END,
            ARRAY[format('ALTER TABLE %s REPLICA IDENTITY %s', $2,
                CASE relreplident WHEN 'f' THEN 'FULL' WHEN 'n' THEN 'NOTHING'
                   -- Where the index was dropped, the server still has it as one by index.
                   ELSE coalesce('USING INDEX ' || (SELECT quote_ident(i.relname) FROM pg_index x JOIN pg_class i
                       ON i.oid = x.indexrelid WHERE x.indrelid = c.oid AND x.indisreplident), 'NOTHING') END)]
     FROM pg_class c WHERE oid = $1 AND relreplident <> 'd'"),
    // How many values of a column are kept as its statistics.
    (Actor::Owner, "SELECT 'statistics', 'column ' || quote_ident(attname),
            ARRAY[format('ALTER TABLE %s ALTER COLUMN %I SET STATISTICS %s', $2, attname, attstattarget)]
     FROM pg_attribute WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped AND attstattarget >= 0"),
    // Extended statistics, whose names the old table's have.
    (Actor::Ourselves, "SELECT 'statistics', stxname::text,
            ARRAY[format('ALTER STATISTICS %I.%I RENAME TO %I', n.nspname, stxname, 'litellm_spend_' || s.oid)]
     FROM pg_statistic_ext s JOIN pg_namespace n ON n.oid = stxnamespace WHERE stxrelid = $1"),
    (Actor::Owner, "SELECT 'statistics', stxname::text, ARRAY[pg_get_statisticsobjdef(s.oid)]
        FROM pg_statistic_ext s WHERE stxrelid = $1"),
    (Actor::Owner, "SELECT 'statistics', stxname::text,
            ARRAY[format('ALTER STATISTICS %I.%I SET STATISTICS %s', n.nspname, stxname, stxstattarget)]
     FROM pg_statistic_ext s JOIN pg_namespace n ON n.oid = stxnamespace
     WHERE stxrelid = $1 AND stxstattarget >= 0"),
    (Actor::Owner, "SELECT 'comment', 'statistics ' || quote_ident(stxname),
            ARRAY[format('COMMENT ON STATISTICS %I.%I IS %L', n.nspname, stxname, d.description)]
     FROM pg_statistic_ext s JOIN pg_namespace n ON n.oid = stxnamespace
     JOIN pg_description d ON d.classoid = 'pg_statistic_ext'::regclass AND d.objoid = s.oid
     WHERE stxrelid = $1"),
    (Actor::Ourselves, "SELECT 'statistics', stxname::text,
            ARRAY[format('ALTER STATISTICS %I.%I OWNER TO %I', n.nspname, stxname, pg_get_userbyid(stxowner))]
     FROM pg_statistic_ext s JOIN pg_namespace n ON n.oid = stxnamespace WHERE stxrelid = $1"),
    // Sequences that go with a column.
    (Actor::Owner, "SELECT 'sequence', d.objid::regclass::text,
            ARRAY[format('ALTER SEQUENCE %s OWNED BY %s.%I', d.objid::regclass, $2, a.attname)]
     FROM pg_depend d JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
     JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S'
     WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = $1
       AND d.deptype = 'a'"),
    // Privileges on the table.
    (Actor::Owner, "SELECT 'grant', g.grantee,
        ARRAY[format('GRANT %s ON %s TO %s%s', g.privileges, $2, g.grantee, g.option)]
     FROM (SELECT CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END AS grantee,
                  string_agg(DISTINCT x.privilege_type, ', ') AS privileges,
                  CASE WHEN x.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END AS option
           FROM pg_class c, aclexplode(c.relacl) AS x WHERE c.oid = $1
               GROUP BY x.grantee, x.is_grantable) AS g"),
    // Privileges on columns.
    (Actor::Owner, "SELECT 'grant', g.grantee || ' (' || g.attname || ')',
            ARRAY[format('GRANT %s (%I) ON %s TO %s%s', g.privilege_type, g.attname, $2, g.grantee, g.option)]
     FROM (SELECT a.attname,
         CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END AS grantee,
                  x.privilege_type, CASE WHEN x.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END AS option
           FROM pg_attribute a, aclexplode(a.attacl) AS x WHERE a.attrelid = $1
               AND NOT a.attisdropped) AS g"),
];

#[cfg(feature = "pg14")]
const VIA_ROOT: &str = "SELECT 'publication', pubname::text,
        ARRAY[format('ALTER PUBLICATION %I SET (publish_via_partition_root = true)', pubname)]
     FROM pg_publication
     WHERE NOT pubviaroot
         AND (puballtables OR oid IN (SELECT prpubid FROM pg_publication_rel WHERE prrelid = $1))";

#[cfg(not(feature = "pg14"))]
const VIA_ROOT: &str = "SELECT 'publication', pubname::text,
        ARRAY[format('ALTER PUBLICATION %I SET (publish_via_partition_root = true)', pubname)]
     FROM pg_publication
     WHERE NOT pubviaroot
       AND (puballtables OR oid IN (SELECT pnpubid FROM pg_publication_namespace JOIN pg_class t
           ON t.relnamespace = pnnspid
                                    WHERE t.oid = $1))";

#[cfg(feature = "pg14")]
const PUBLICATIONS: &str = "SELECT 'publication', p.pubname::text,
        ARRAY[format('ALTER PUBLICATION %I DROP TABLE %s', p.pubname, $3),
              format('ALTER PUBLICATION %I ADD TABLE %s', p.pubname, $2)]
     FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE r.prrelid = $1";

#[cfg(not(feature = "pg14"))]
const PUBLICATIONS: &str = "SELECT 'publication', p.pubname::text,
        ARRAY[format('ALTER PUBLICATION %I SET (publish_via_partition_root = true)', p.pubname),
              format('ALTER PUBLICATION %I DROP TABLE %s', p.pubname, $3),
              format('ALTER PUBLICATION %I ADD TABLE %s', p.pubname, $2)
        || CASE WHEN r.prattrs IS NULL THEN '' ELSE
               (SELECT format(' (%s)', string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum))
                FROM pg_attribute a WHERE a.attrelid = $1 AND a.attnum = ANY (r.prattrs)) END
        || coalesce(' WHERE (' || pg_get_expr(r.prqual, r.prrelid) || ')', '')]
     FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE r.prrelid = $1";

fn pieces(table: &Table, renamed: &str, queries: &[(Actor, &str)]) -> Result<Vec<Piece>> {
    let name = table.qualified();
    let mut pieces = vec![];
    for (actor, sql) in queries {
        pieces.extend(query(sql, &[table.oid.into(), name.as_str().into(), renamed.into()], |r| {
            Ok(Piece { kind: value(r, 1)?, object: value(r, 2)?, sql: value(r, 3)?, actor: *actor })
        })?);
    }
    Ok(pieces)
}

/// What a partitioned table cannot have, or what would go on to mean the old table.
const OBSTACLES: &str = concat!("
    SELECT format('Constraint %s of %s is a foreign key.', quote_ident(conname), conrelid::regclass)
        FROM pg_constraint
    WHERE contype = 'f' AND (conrelid = $1 OR confrelid = $1)
    UNION ALL SELECT format('Constraint %s is an exclusion.', quote_ident(conname)) FROM pg_constraint
    WHERE contype = 'x' AND conrelid = $1
    UNION ALL SELECT format('Index %s is unique, which only an index with the partition key can be.',
        indexrelid::regclass)
    FROM pg_index WHERE indrelid = $1 AND indisunique AND NOT indisprimary
        AND indexrelid <> coalesce(to_regclass(nullif($2, '')), 0::oid)
    UNION ALL SELECT format('Index %s is not valid.', indexrelid::regclass)
    FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    WHERE indrelid = $1 AND NOT indisvalid AND indexrelid <> coalesce(to_regclass(nullif($2, '')), 0::oid)
      AND NOT starts_with(relname, $3)
    UNION ALL SELECT format('Column %s is an identity column.', quote_ident(attname)) FROM pg_attribute
    WHERE attrelid = $1 AND attidentity <> '' AND NOT attisdropped
    UNION ALL SELECT format('Role %s, who owns it, may not create in its tablespace, %s.',
        relowner::regrole, quote_ident(spcname))
    FROM pg_class JOIN pg_tablespace s ON s.oid = reltablespace
    WHERE pg_class.oid = $1 AND NOT has_tablespace_privilege(relowner, s.oid, 'CREATE')
    UNION ALL SELECT format('It inherits from %s.', inhparent::regclass) FROM pg_inherits WHERE inhrelid = $1
    UNION ALL SELECT format('%s inherits from it.', inhrelid::regclass) FROM pg_inherits
    JOIN pg_class p ON p.oid = inhparent WHERE inhparent = $1 AND p.relkind = 'r'
    UNION ALL SELECT format('It has a rule, %s.', quote_ident(rulename)) FROM pg_rewrite WHERE ev_class = $1
    UNION ALL SELECT DISTINCT format('Rule %s of %s uses it.', quote_ident(w.rulename), w.ev_class::regclass)
    FROM pg_rewrite w JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
    WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = $1 AND w.ev_class <> $1 AND w.ev_type <> '1'
    UNION ALL SELECT format('Constraint %s is NO INHERIT, which none of a partitioned table is.',
        quote_ident(conname))
    FROM pg_constraint WHERE conrelid = $1 AND contype IN ('c', 'n') AND connoinherit
    UNION ALL SELECT format('Trigger %s is for each row and has a transition table, which none of a partitioned table has.',
        quote_ident(tgname))
    FROM pg_trigger WHERE tgrelid = $1 AND NOT tgisinternal AND NOT ", is_ours!(), "
        AND tgtype & 1 = 1 AND (tgoldtable IS NOT NULL OR tgnewtable IS NOT NULL)
    UNION ALL SELECT 'Its primary key is deferrable, WITHOUT OVERLAPS, or includes columns that are not of the key.'
    FROM pg_index i JOIN pg_constraint k ON k.conindid = i.indexrelid AND k.conrelid = i.indrelid
        AND k.contype = 'p'
    WHERE i.indrelid = $1 AND (k.condeferrable OR i.indisexclusion OR i.indnatts <> i.indnkeyatts)
    UNION ALL SELECT DISTINCT format('It has a security label, of %s.', quote_ident(provider)) FROM pg_seclabel
    WHERE classoid = 'pg_class'::regclass AND objoid = $1
    UNION ALL SELECT format('Statistics %s are in schema %s, where role %s, who owns the table, may not create.',
        quote_ident(stxname), n.nspname, c.relowner::regrole)
    FROM pg_statistic_ext JOIN pg_class c ON c.oid = stxrelid JOIN pg_namespace n ON n.oid = stxnamespace
    WHERE stxrelid = $1 AND NOT has_schema_privilege(c.relowner, n.oid, 'CREATE')
    -- A publication says for all its tables by whose name partitions are published.
    UNION ALL SELECT format('Publication %s publishes partitions of other tables by their own names, which would change for its subscribers: first set its publish_via_partition_root, and refresh them.',
        quote_ident(p.pubname))
    FROM pg_publication p
    WHERE NOT p.pubviaroot
      AND EXISTS (SELECT FROM pg_get_publication_tables(p.pubname::text) t
                  WHERE $1 = t.relid OR $1 IN (SELECT relid FROM pg_partition_ancestors(t.relid)))
      AND EXISTS (SELECT FROM pg_get_publication_tables(p.pubname::text) t JOIN pg_class c ON c.oid = t.relid
                  WHERE c.relispartition AND $1 NOT IN (SELECT relid FROM pg_partition_ancestors(t.relid)))
    UNION ALL SELECT format('Subscription %s writes to it.', quote_ident(s.subname))
    FROM pg_subscription_rel r JOIN pg_subscription s ON s.oid = r.srsubid WHERE r.srrelid = $1
    UNION ALL SELECT format('It is of type %s.', reloftype::regtype) FROM pg_class WHERE oid = $1
        AND reloftype <> 0
    UNION ALL SELECT format('It is a member of extension %s.', quote_ident(e.extname))
    FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
    WHERE d.classid = 'pg_class'::regclass AND d.objid = $1 AND d.refclassid = 'pg_extension'::regclass
    UNION ALL SELECT DISTINCT format('%s needs its primary key to be what it is.',
        pg_describe_object(d.classid, d.objid, d.objsubid))
    FROM pg_constraint k JOIN pg_depend d ON d.refclassid = 'pg_constraint'::regclass AND d.refobjid = k.oid
        AND d.deptype = 'n'
    WHERE k.conrelid = $1 AND k.contype = 'p'
    UNION ALL SELECT DISTINCT format('Policy %s of %s reads it.', quote_ident(p.polname),
        p.polrelid::regclass)
    FROM pg_policy p JOIN pg_depend d ON d.classid = 'pg_policy'::regclass AND d.objid = p.oid
    WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = $1 AND p.polrelid <> $1
    UNION ALL SELECT format('Role %s, who owns it, may not create in schema %s.', c.relowner::regrole,
        n.nspname)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid = $1 AND NOT has_schema_privilege(c.relowner, n.oid, 'CREATE')
    UNION ALL SELECT format('Trigger %s calls a function that role %s, who owns the table, may not call.',
        quote_ident(tgname),
                            c.relowner::regrole)
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
    WHERE tgrelid = $1 AND NOT tgisinternal AND NOT ", is_ours!(), "
      AND NOT has_function_privilege(c.relowner, tgfoid, 'EXECUTE')
    UNION ALL SELECT DISTINCT format('Function %s reads it, and role %s, who owns the function, may not create in schema %s.',
                                     p.oid::regprocedure, p.proowner::regrole, n.nspname)
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
    JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid
    WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = $1 AND p.prosqlbody IS NOT NULL
      AND NOT has_schema_privilege(p.proowner, n.oid, 'CREATE')
    UNION ALL SELECT DISTINCT format('%s uses its row type.',
        pg_describe_object(d.classid, d.objid, d.objsubid))
    FROM pg_class c JOIN pg_type t ON t.oid = c.reltype JOIN pg_depend d ON d.refclassid = 'pg_type'::regclass
        AND d.refobjid IN (t.oid, t.typarray) AND d.deptype = 'n'
    WHERE c.oid = $1");

/// The objects whose text is read again, each with its owner.
const READ_AGAIN: &str = "
    SELECT 'pg_rewrite'::regclass::oid AS classid, w.oid AS objid, v.relowner AS owner
    FROM pg_rewrite w JOIN pg_class v ON v.oid = w.ev_class
    WHERE EXISTS (SELECT FROM pg_depend x WHERE x.classid = 'pg_rewrite'::regclass AND x.objid = w.oid
                  AND x.refclassid = 'pg_class'::regclass AND x.refobjid = $1)
    UNION ALL SELECT 'pg_proc'::regclass, p.oid, p.proowner FROM pg_proc p
    WHERE p.prosqlbody IS NOT NULL
      AND EXISTS (SELECT FROM pg_depend x WHERE x.classid = 'pg_proc'::regclass AND x.objid = p.oid
                  AND x.refclassid = 'pg_class'::regclass AND x.refobjid = $1)
    UNION ALL SELECT 'pg_class'::regclass, i.indexrelid, c.relowner
    FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid WHERE c.oid = $1
    UNION ALL SELECT 'pg_constraint'::regclass, k.oid, c.relowner
    FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid WHERE c.oid = $1
    UNION ALL SELECT 'pg_policy'::regclass, k.oid, c.relowner
    FROM pg_policy k JOIN pg_class c ON c.oid = k.polrelid WHERE c.oid = $1
    UNION ALL SELECT 'pg_trigger'::regclass, k.oid, c.relowner
    FROM pg_trigger k JOIN pg_class c ON c.oid = k.tgrelid
    WHERE c.oid = $1 AND NOT tgisinternal AND k.tgqual IS NOT NULL
    UNION ALL SELECT 'pg_statistic_ext'::regclass, k.oid, c.relowner
    FROM pg_statistic_ext k JOIN pg_class c ON c.oid = k.stxrelid WHERE c.oid = $1";

fn obstacles(table: &Table, key_index: &str) -> Result<Vec<String>> {
    let mut obstacles =
        query(OBSTACLES, &[table.oid.into(), key_index.into(), PREFIX.into()], |r| value(r, 1))?;
    obstacles.extend(code_of_third_roles(READ_AGAIN, &[table.oid.into()])?);
    Ok(obstacles)
}

/// What uses a partition rather than the table, by its name: when the table is plain, that is in the archive,
/// and nothing writes to it any more. `$1` are the partitions.
const OBSTACLES_OF_PARTITIONS: &str = "
    SELECT DISTINCT format('%s reads partition %s.', upper(left(o.text, 1)) || substr(o.text, 2),
        d.refobjid::regclass)
    FROM pg_rewrite w JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid,
         pg_describe_object('pg_class'::regclass, w.ev_class, 0) AS o(text)
    WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY ($1) AND w.ev_type = '1'
    UNION ALL SELECT format('Partition %s has a rule, %s.', ev_class::regclass, quote_ident(rulename))
    FROM pg_rewrite WHERE ev_class = ANY ($1)
    UNION ALL SELECT DISTINCT format('Rule %s of %s uses partition %s.', quote_ident(w.rulename),
        w.ev_class::regclass, d.refobjid::regclass)
    FROM pg_rewrite w JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
    WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY ($1) AND w.ev_type <> '1'
      AND NOT w.ev_class = ANY ($1)
    UNION ALL SELECT DISTINCT format('Function %s reads partition %s.', d.objid::regprocedure,
        d.refobjid::regclass)
    FROM pg_depend d
    WHERE d.classid = 'pg_proc'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY ($1)
    UNION ALL SELECT format('Constraint %s of %s is a foreign key to or from partition %s.',
        quote_ident(conname), conrelid::regclass, p.oid::regclass)
    FROM pg_constraint JOIN unnest($1) AS p(oid) ON p.oid IN (conrelid, confrelid)
    WHERE contype = 'f' AND conparentid = 0
    UNION ALL SELECT DISTINCT format('Policy %s of %s reads partition %s.', quote_ident(p.polname),
        p.polrelid::regclass, d.refobjid::regclass)
    FROM pg_policy p JOIN pg_depend d ON d.classid = 'pg_policy'::regclass AND d.objid = p.oid
    WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY ($1) AND NOT p.polrelid = ANY ($1)
    UNION ALL SELECT DISTINCT format('The row type of partition %s is used by %s.', c.oid::regclass,
        pg_describe_object(d.classid, d.objid, d.objsubid))
    FROM pg_class c JOIN pg_type t ON t.oid = c.reltype JOIN pg_depend d ON d.refclassid = 'pg_type'::regclass
        AND d.refobjid IN (t.oid, t.typarray) AND d.deptype = 'n'
    WHERE c.oid = ANY ($1)
    UNION ALL SELECT format('Partition %s is in publication %s.', prrelid::regclass, quote_ident(pubname))
    FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE prrelid = ANY ($1)
    UNION ALL SELECT format('Subscription %s writes to partition %s.', quote_ident(s.subname),
        r.srrelid::regclass)
    FROM pg_subscription_rel r JOIN pg_subscription s ON s.oid = r.srsubid WHERE r.srrelid = ANY ($1)
    UNION ALL SELECT format('Partition %s is a member of extension %s.', d.objid::regclass,
        quote_ident(e.extname))
    FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
    WHERE d.classid = 'pg_class'::regclass AND d.objid = ANY ($1)
        AND d.refclassid = 'pg_extension'::regclass";

/// What is in the way of taking the partitions of a table out of use.
pub fn obstacles_of_partitions(table: pg_sys::Oid) -> Result<Vec<String>> {
    let partitions: Vec<_> = relation_tree(table)?.into_iter().filter(|oid| *oid != table).collect();
    query(OBSTACLES_OF_PARTITIONS, &[partitions.into()], |r| value(r, 1))
}

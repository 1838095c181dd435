//! The indexes that there are, as data: what each serves, since which LiteLLM, and what an insert pays. Pure,
//! but for the look where pg_trgm is, and whether the table's owner may use it.
//!
//! Which queries of LiteLLM's read what was read in its packages 1.83.14, 1.92.2, 1.109.1 and 1.110.2.
//! `team_id = $1` proves `team_id IS NOT NULL`, also in a generic plan, so a partial index costs the query
//! nothing.

use crate::error::{Error, Result};
use crate::litellm::spend_log::TIME;
use crate::server::relation::{self, Table};
use crate::server::spi;
use crate::server::text::{qualified, quoted, suffixed};
use crate::state::indexes::{PREFIX, Wanted};

/// An index of the catalogue.
pub struct Index {
    pub name: &'static str,
    /// The columns that it reads, and their types.
    columns: &'static [(&'static str, &'static str)],
    method: Method,
    /// As the server prints them.
    pub keys: &'static [&'static str],
    pub included: &'static [&'static str],
    /// Which rows it has.
    pub predicate: &'static str,
    /// The condition by which the planner estimates how many these are: of a value in JSON it knows nothing.
    pub counted_by: &'static str,
    /// By endpoint.
    pub serves: &'static str,
    /// The first LiteLLM that asks so, of those that were read.
    pub since: &'static str,
    pub insert_cost: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Method {
    Btree,
    /// GIN over trigrams, of the extension pg_trgm.
    Trigrams,
}

const TEXT: &str = "text";
const JSON: &str = "jsonb";
const STARTED: &str = "\"startTime\"";

pub const CATALOGUE: [Index; 8] = [
    Index {
        name: "team",
        columns: &[("team_id", TEXT), ("spend", "double precision")],
        method: Method::Btree,
        keys: &["team_id", STARTED],
        included: &["spend"],
        predicate: "(team_id IS NOT NULL)",
        counted_by: "(team_id IS NOT NULL)",
        serves: "GET /spend/logs/ui by team, and for everybody who is no admin; its search box; a team's budget sum; GET /team/spend/by_user",
        since: "1.83",
        insert_cost: "an entry for each row that has a team",
    },
    Index {
        name: "user",
        columns: &[("user", TEXT)],
        method: Method::Btree,
        keys: &["\"user\"", STARTED],
        included: &[],
        predicate: "(\"user\" IS NOT NULL)",
        counted_by: "(\"user\" IS NOT NULL)",
        serves: "GET /spend/logs/ui by user, and for everybody who is no admin; its search box; GET /global/spend/keys of an internal user",
        since: "1.83",
        insert_cost: "an entry for each row that has a user",
    },
    Index {
        name: "end_user",
        columns: &[("end_user", TEXT)],
        method: Method::Btree,
        keys: &[STARTED, "request_id"],
        included: &["end_user"],
        predicate: "((end_user IS NOT NULL) AND (end_user <> ''::text))",
        counted_by: "((end_user IS NOT NULL) AND (end_user <> ''::text))",
        serves: "the Logs page's list of end users, GET /management/v1/spend_logs/end_users",
        since: "1.109",
        insert_cost: "an entry for each row that has an end user",
    },
    Index {
        name: "error_code",
        columns: &[("metadata", JSON), ("status", TEXT)],
        method: Method::Btree,
        keys: &["(((metadata -> 'error_information'::text) ->> 'error_code'::text))", STARTED],
        included: &[],
        predicate: "(((metadata -> 'error_information'::text) ->> 'error_code'::text) IS NOT NULL)",
        counted_by: "(status = 'failure'::text)",
        serves: "GET /spend/logs/ui by error code",
        since: "1.83",
        insert_cost: "metadata is opened for each row; an entry for each failure",
    },
    Index {
        name: "failure",
        columns: &[("status", TEXT)],
        method: Method::Btree,
        keys: &[STARTED],
        included: &[],
        predicate: "(status = 'failure'::text)",
        counted_by: "(status = 'failure'::text)",
        serves: "the errors of the Caching page, GET /global/activity/cache_hits",
        since: "1.109",
        insert_cost: "an entry for each failure",
    },
    Index {
        name: "key_alias",
        columns: &[("metadata", JSON)],
        method: Method::Trigrams,
        keys: &["((metadata ->> 'user_api_key_alias'::text))"],
        included: &[],
        predicate: "((metadata ->> 'user_api_key_alias'::text) IS NOT NULL)",
        counted_by: "((metadata ->> 'user_api_key_alias'::text) IS NOT NULL)",
        serves: "GET /spend/logs/ui by a part of the key's alias",
        since: "1.83",
        insert_cost: "metadata is opened for each row; entries for each part of an alias",
    },
    Index {
        name: "model_id",
        columns: &[("model_id", TEXT)],
        method: Method::Btree,
        keys: &["model_id", STARTED],
        included: &[],
        predicate: "(model_id IS NOT NULL)",
        counted_by: "(model_id IS NOT NULL)",
        serves: "the search box of GET /spend/logs/ui, together with team, user and call_id",
        since: "1.109",
        insert_cost: "an entry for nearly each row, as long as the model's id",
    },
    Index {
        name: "call_id",
        columns: &[("litellm_call_id", TEXT)],
        method: Method::Btree,
        keys: &["litellm_call_id"],
        included: &[],
        predicate: "(litellm_call_id IS NOT NULL)",
        counted_by: "(litellm_call_id IS NOT NULL)",
        serves: "GET /spend/logs/ui of one request, and its search box, where LiteLLM's own index on the column is missing",
        since: "1.109",
        insert_cost: "an entry for each row that has a call id",
    },
];

pub fn find(name: &str) -> Option<&'static Index> {
    CATALOGUE.iter().find(|index| index.name == name)
}

/// Refuses a table that lacks what every index here, and LiteLLM's spend log, has.
pub fn require_spend_log(table: &Table) -> Result<()> {
    require_columns(table, &[("request_id", TEXT), (TIME, "timestamp without time zone")])
}

fn require_columns(table: &Table, columns: &[(&str, &str)]) -> Result<()> {
    for (column, expected) in columns {
        if !table.has(column, expected)? {
            return Err(Error::NoColumn { relation: table.name.clone(), column: column.to_string() });
        }
    }
    Ok(())
}

impl Index {
    /// Refuses a table on which it cannot be built.
    pub fn require_possible(&self, table: &Table) -> Result<()> {
        require_columns(table, self.columns)?;
        let Some(schema) = self.schema_of_trigrams()? else { return Ok(()) };
        let may = "SELECT pg_catalog.has_schema_privilege($1, $2, 'USAGE')";
        match spi::query(may, &[table.owner_oid.into(), schema.as_str().into()], |r| spi::value(r, 1))?[..] {
            [false] => Err(Error::TrigramsClosed { schema: quoted(&schema), owner: table.owner.clone() }),
            _ => Ok(()),
        }
    }

    /// What follows `ON <table>` in its CREATE INDEX.
    pub fn definition(&self) -> Result<String> {
        let (method, class) = match self.schema_of_trigrams()? {
            None => ("btree", String::new()),
            Some(schema) => ("gin", format!(" {}.gin_trgm_ops", quoted(&schema))),
        };
        let keys = self.keys.iter().map(|key| format!("{key}{class}")).collect::<Vec<_>>().join(", ");
        let included = match self.included {
            [] => String::new(),
            columns => format!(" INCLUDE ({})", columns.join(", ")),
        };
        Ok(format!("USING {method} ({keys}){included} WHERE {}", self.predicate))
    }

    /// The schema of the operator class, if it needs one: whoever installed pg_trgm has chosen it.
    fn schema_of_trigrams(&self) -> Result<Option<String>> {
        if self.method != Method::Trigrams {
            return Ok(None);
        }
        relation::extension_schema("pg_trgm")?.map(Some).ok_or(Error::NoTrigrams(self.name))
    }

    /// What it is called on a table or partition, if nothing else is called so.
    pub fn name_on(&self, partition: &str) -> String {
        suffixed(&format!("{PREFIX}{}_{partition}", self.name), "")
    }

    /// As it is asked for.
    pub fn wanted(&self, hot: bool) -> Wanted {
        let texts = |texts: &[&str]| texts.iter().map(|text| text.to_string()).collect();
        let is_plain = self.leaves_out_nulls_only() && self.method == Method::Btree;
        let (keys, included) = if is_plain { (self.keys, self.included) } else { (&[][..], &[][..]) };
        Wanted { name: self.name, hot, keys: texts(keys), included: texts(included) }
    }

    /// Whether that is the name of this index on some table or partition.
    pub fn is_name(&self, name: &str) -> bool {
        name.starts_with(&self.name_on(""))
    }

    /// Whether an index without a predicate serves the same queries.
    pub fn leaves_out_nulls_only(&self) -> bool {
        self.predicate.ends_with(" IS NOT NULL)") && !self.predicate.contains(" AND ")
    }

    /// The statement that builds it under a name.
    pub fn create(&self, name: &str, schema: &str, partition: &str) -> Result<String> {
        let (name, on, definition) = (quoted(name), qualified(schema, partition), self.definition()?);
        Ok(format!("CREATE INDEX CONCURRENTLY {name} ON {on} {definition}"))
    }

    /// Whether it has to read the JSON of each row.
    pub fn opens_json(&self) -> bool {
        self.columns.iter().any(|(_, r#type)| *r#type == JSON)
    }

    pub fn is_of_trigrams(&self) -> bool {
        self.method == Method::Trigrams
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// LiteLLM's tools leave nothing else alone.
    #[test]
    fn every_index_is_partial_and_no_name_begins_with_another() {
        for index in &CATALOGUE {
            assert!(!index.predicate.is_empty(), "{}", index.name);
            for other in CATALOGUE.iter().filter(|other| other.name != index.name) {
                assert!(!index.name_on("").starts_with(&other.name_on("")), "{} {}", index.name, other.name);
            }
        }
    }

    #[test]
    fn a_name_is_cut_at_its_end() {
        let name = CATALOGUE[0].name_on(&"x".repeat(63));
        assert_eq!(name.len(), 63);
        assert!(name.starts_with("litellm_spend_team_xxx"));
    }
}

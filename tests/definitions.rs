//! Rollups of random definitions: whatever dimensions and measures are declared, over columns of all kinds,
//! with NULLs, FILTER, MERGE WITH and collations in which different texts are equal, the live view is the
//! GROUP BY that the definition says.

mod common;

use common::*;
use rand::prelude::*;

const TABLE: &str = "
    CREATE COLLATION any_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
    CREATE TYPE mood AS ENUM ('calm', 'cross');
    CREATE FUNCTION addup(numeric, numeric) RETURNS numeric LANGUAGE sql IMMUTABLE AS 'SELECT $1 + $2';
    CREATE TABLE things (id bigserial, small smallint, i int, b bigint, n numeric, m numeric, f float8, t text, v varchar(9), c char(4),
        folded text COLLATE any_case, coded text COLLATE \"C\", english text COLLATE \"en-x-icu\", d date, ts timestamp,
        tz timestamptz, u uuid, yes bool, ip inet, j jsonb, mood mood, list int[]);
    CREATE INDEX ON things USING brin (id);";

/// Values of the columns but for `id`, of a random row: few, so that groups meet. Sums of `f` are exact:
/// multiples of 1/8.
const VALUES: [(&str, &str); 21] = [
    ("small", "x % 3"),
    ("i", "x % 5 - 2"),
    ("b", "(x % 4) * 10000000000"),
    // Equal numbers that are written differently.
    ("n", "CASE x % 3 WHEN 0 THEN 1.0 WHEN 1 THEN 1.00 ELSE 2.5 END"),
    // Of all signs, sizes and scales, and some that are no numbers.
    (
        "m",
        "(ARRAY['0', '0.000', '-0.5', '1e-30', '-99999999999999999999.9999', '12345678901234567890123456789012345.6',
            '7e-200', '5e300', '-5e300', '0.0001', '10000', 'NaN', 'Infinity', '-Infinity'])[x % 14 + 1]::numeric",
    ),
    ("f", "(x % 7) / 8.0"),
    ("t", "(ARRAY['', 'a', 'B', 'é', 'Z', 'z'])[x % 6 + 1]"),
    ("v", "'v' || x % 4"),
    ("c", "(ARRAY['a', 'a ', 'B'])[x % 3 + 1]"),
    ("folded", "(ARRAY['a', 'A', 'b', 'B', 'C'])[x % 5 + 1]"),
    ("coded", "(ARRAY['a', 'B', 'c'])[x % 3 + 1]"),
    ("english", "(ARRAY['a', 'B', 'c', 'É'])[x % 4 + 1]"),
    ("d", "date '2026-02-27' + x % 4"),
    (
        "ts",
        "CASE WHEN x % 50 = 0 THEN 'infinity' ELSE timestamp '1999-12-31 23:30' + x % 9 * interval '17 minutes' END",
    ),
    ("tz", "timestamptz '2026-03-29 00:30Z' + x % 9 * interval '47 minutes'"),
    ("u", "('00000000-0000-0000-0000-00000000000' || x % 3)::uuid"),
    ("yes", "x % 2 = 0"),
    ("ip", "('10.0.0.' || x % 3)::inet"),
    ("j", "jsonb_build_object('k', x % 2)"),
    ("mood", "(ARRAY['calm', 'cross'])[x % 2 + 1]::mood"),
    ("list", "ARRAY[x % 2]"),
];

const DIMENSIONS: [&str; 24] = [
    "small",
    "i",
    "b % 3",
    "n",
    "f",
    "t",
    "lower(t)",
    "v",
    "c",
    "folded",
    "coded",
    "english",
    "d",
    "date_trunc('hour', ts)",
    "date_bin('5 minutes', ts, timestamp '2001-01-01')",
    "date_trunc('minute', tz)",
    "date_trunc('day', tz)",
    "u",
    "yes",
    "ip",
    "j",
    "mood",
    "list",
    "CASE WHEN i > 0 THEN t END",
];

const AGGREGATES: [&str; 24] = [
    "count(*)",
    "count(t)",
    "sum(small)",
    "sum(i)",
    "sum(b)",
    "sum(n)",
    "sum(m)",
    "avg(m)",
    "sum(f)",
    "min(i)",
    "max(n)",
    "min(t)",
    "max(folded)",
    "min(english)",
    "max(ts)",
    "min(d)",
    "max(ip)",
    "min(mood)",
    "avg(i)",
    "avg(n)",
    "bool_or(yes)",
    "bool_and(yes)",
    "bit_and(i)",
    "every(yes)",
];

/// What needs a function to merge, and which.
const MERGED_WITH: [(&str, &str); 4] = [
    ("sum(b)", "addup"),
    ("max(i)", "int4larger"),
    ("min(i)", "min"),
    ("jsonb_object_agg(coalesce(t, '-'), 1)", "jsonb_concat"),
];

const FILTERS: [&str; 4] = ["i > 0", "t IS NOT NULL", "folded = 'a'", "yes"];

/// A definition: what spend_rollup_create() is told, and the query that it means.
struct Definition {
    dimensions: Vec<String>,
    measures: Vec<String>,
    query: String,
}

fn definition(rng: &mut StdRng) -> Definition {
    let count = rng.random_range(1..=4);
    let dimensions: Vec<&str> = DIMENSIONS.choose_multiple(rng, count).copied().collect();
    let mut measures = vec![];
    for _ in 0..rng.random_range(1..=5) {
        let (aggregate, merge) = match rng.random_bool(0.25) {
            true => MERGED_WITH
                .choose(rng)
                .map(|(aggregate, with)| (*aggregate, format!(" MERGE WITH {with}")))
                .unwrap(),
            false => (*AGGREGATES.choose(rng).unwrap(), String::new()),
        };
        let filter = match rng.random_bool(0.4) {
            true => format!(" FILTER (WHERE {})", FILTERS.choose(rng).unwrap()),
            false => String::new(),
        };
        measures.push((format!("{aggregate}{filter}"), merge));
    }
    let outputs =
        dimensions.iter().map(|d| d.to_string()).chain(measures.iter().map(|(call, _)| call.clone()));
    let named = |(i, text): (usize, String)| format!("{text} AS c{i}");
    let places: Vec<String> = (1..=count).map(|i| i.to_string()).collect();
    Definition {
        query: format!(
            "SELECT {} FROM things GROUP BY {}",
            outputs.enumerate().map(named).collect::<Vec<_>>().join(", "),
            places.join(", ")
        ),
        dimensions: dimensions.iter().enumerate().map(|(i, d)| format!("{d} AS c{i}")).collect(),
        measures: measures
            .iter()
            .enumerate()
            .map(|(i, (call, merge))| format!("{call} AS c{}{merge}", i + count))
            .collect(),
    }
}

/// Inserts rows with a share of NULLs where the column takes them.
fn insert(rng: &mut StdRng, required: &[bool], rows: u32) -> String {
    let values = VALUES.iter().zip(required).map(|((_, value), required)| {
        let value = value.replace('x', &format!("(i * {} / 7)", rng.random_range(1..1000)));
        if *required {
            value
        } else {
            format!("CASE WHEN i % {} > 0 THEN {value} END", rng.random_range(2..9))
        }
    });
    format!(
        "INSERT INTO things ({}) SELECT {} FROM generate_series(1, {rows}) AS i",
        VALUES.map(|(name, _)| name).join(", "),
        values.collect::<Vec<_>>().join(", ")
    )
}

/// Sets of rows: where texts of one collation are equal, either may stand for both.
fn assert_equal(client: &mut postgres::Client, definition: &Definition, when: &str) {
    let sql = format!(
        "WITH ours AS (SELECT * FROM litellm_spend.random), theirs AS ({})
         SELECT (SELECT count(*) FROM (TABLE ours EXCEPT ALL TABLE theirs) AS o)
                + (SELECT count(*) FROM (TABLE theirs EXCEPT ALL TABLE ours) AS t)",
        definition.query
    );
    let Definition { dimensions, measures, query } = definition;
    let different: i64 = value(client, &sql);
    assert_eq!(different, 0, "{when}: {dimensions:?}, {measures:?} is not {query}");
}

#[test]
fn a_random_rollup_is_the_group_by_that_it_says() {
    let (_db, mut client) = without_worker();
    client.batch_execute(TABLE).unwrap();
    client.batch_execute("SET timezone = 'UTC'").unwrap();
    for seed in 1..=30 {
        let rng = &mut StdRng::seed_from_u64(seed);
        let required: Vec<bool> = VALUES.iter().map(|_| rng.random_bool(0.5)).collect();
        client.batch_execute("TRUNCATE things").unwrap();
        for ((column, _), required) in VALUES.iter().zip(&required) {
            let change = if *required { "SET" } else { "DROP" };
            client.batch_execute(&format!("ALTER TABLE things ALTER {column} {change} NOT NULL")).unwrap();
        }
        let definition = definition(rng);
        client.batch_execute(&insert(rng, &required, 100)).unwrap();
        for name in ["random", "random_in_sql"] {
            client
                .execute(
                    "SELECT spend_rollup_create($1, 'things', $2, $3)",
                    &[&name, &definition.dimensions, &definition.measures],
                )
                .unwrap_or_else(|e| panic!("{:?}, {:?}: {e:?}", definition.dimensions, definition.measures));
        }
        assert_equal(&mut client, &definition, "before a merge");
        for window in [1000, 1000, 60, 7] {
            client.batch_execute(&insert(rng, &required, 120)).unwrap();
            assert_equal(&mut client, &definition, "with a tail");
            client
                .batch_execute(&format!(
                    "SET litellm_spend.max_window = {window};
                     SET litellm_spend.hash_groups = on; SELECT spend_rollup_run('random');
                     SET litellm_spend.hash_groups = off; SELECT spend_rollup_run('random_in_sql')"
                ))
                .unwrap();
            assert_equal(&mut client, &definition, "after a merge");
            assert_same_rows(&mut client, &definition);
        }
        client
            .batch_execute(
                "SET litellm_spend.hash_groups = on; SELECT spend_rollup_rebuild('random');
                 SET litellm_spend.hash_groups = off; SELECT spend_rollup_rebuild('random_in_sql')",
            )
            .unwrap();
        assert_equal(&mut client, &definition, "after a rebuild");
        assert_same_rows(&mut client, &definition);
        // It compares texts as they are written, and the greatest of those that are equal may be either.
        if !definition.measures.iter().any(|measure| measure.contains("max(folded)")) {
            let differences: i64 = value(&mut client, "SELECT count(*) FROM spend_rollup_verify('random')");
            assert_eq!(differences, 0, "{:?}, {:?}", definition.dimensions, definition.measures);
        }
        client
            .batch_execute("SELECT spend_rollup_drop('random'), spend_rollup_drop('random_in_sql')")
            .unwrap();
    }
}

/// What was merged through a hash table of ours is what PostgreSQL's aggregation makes of the same windows,
/// digit for digit; but of texts of one collation, and of numbers, that are equal, either may stand for both.
fn assert_same_rows(client: &mut postgres::Client, definition: &Definition) {
    let columns = definition.dimensions.iter().chain(&definition.measures);
    let loose = columns.clone().any(|c| c.contains("folded") || c.starts_with("n ") || c.contains("max(n)"));
    let row = if loose { "r.*" } else { "ROW(r.*)::text" };
    let of = |name: &str| format!("SELECT {row} FROM litellm_spend.{name}_rollup AS r");
    let (ours, sql) = (of("random"), of("random_in_sql"));
    let rows: i64 = value(
        client,
        &format!("SELECT count(*) FROM (({ours} EXCEPT ALL {sql}) UNION ALL ({sql} EXCEPT ALL {ours})) AS d"),
    );
    let Definition { dimensions, measures, .. } = definition;
    assert_eq!(rows, 0, "{dimensions:?}, {measures:?}: in a hash table and in SQL");
}

#[test]
fn groups_that_take_more_memory_than_they_may_are_merged_in_sql() {
    let (_db, mut client) = without_worker();
    client
        .batch_execute(
            "CREATE TABLE things (id bigserial, name text, n numeric);
             INSERT INTO things (name, n)
                 SELECT 'thing ' || i % 30000, i / 3.0 FROM generate_series(1, 60000) AS i;
             SELECT spend_rollup_create('by_name', 'things', '{name}', '{count(*) AS c, sum(n) AS s}')",
        )
        .unwrap();
    let groups = |client: &mut postgres::Client, memory: &str| -> i64 {
        client.batch_execute(&format!("SET maintenance_work_mem = '{memory}'")).unwrap();
        value(client, "SELECT groups FROM spend_rollup_run('by_name')")
    };
    assert_eq!(groups(&mut client, "1MB"), 30_000);
    assert_no_rows(client.query("SELECT * FROM spend_rollup_verify('by_name')", &[]).unwrap(), "verify");
    client.batch_execute("INSERT INTO things (name, n) SELECT name, -n FROM things").unwrap();
    assert_eq!(groups(&mut client, "64MB"), 30_000);
    assert_no_rows(client.query("SELECT * FROM spend_rollup_verify('by_name')", &[]).unwrap(), "verify");
}

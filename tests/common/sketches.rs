//! Rollups of the states of two extensions, hll and topn, which a server may not have: distinct users, and
//! the most frequent pages.

use super::*;

/// Says so where it has not.
pub fn server_has_hll_and_topn() -> bool {
    let folder = format!("{}/extension", pg_config("--sharedir"));
    let missing: Vec<&str> = ["hll", "topn"]
        .into_iter()
        .filter(|name| !fs::exists(format!("{folder}/{name}.control")).unwrap())
        .collect();
    if !missing.is_empty() {
        skipped(&format!("this server has no {} ({folder})", missing.join(" and no ")));
    }
    missing.is_empty()
}

/// The extensions, in a schema of the user's, a table of the role's, and what it may do.
pub fn visits(role: &str) -> [String; 3] {
    [
        format!("DROP ROLE IF EXISTS {role}; CREATE ROLE {role} LOGIN; CREATE SCHEMA kit"),
        "CREATE EXTENSION hll SCHEMA kit; CREATE EXTENSION topn SCHEMA kit".into(),
        format!(
            "CREATE SCHEMA web; GRANT ALL ON SCHEMA web TO {role}; GRANT USAGE ON SCHEMA kit TO {role};
             SET search_path = web, kit, public; SET ROLE {role};
             CREATE TABLE visits (id bigserial, site int, user_id bigint, path text, at timestamptz NOT NULL);
             RESET ROLE"
        ),
    ]
}

/// As docs/citus.md has it.
pub const CREATE_VISITS: &str = "SELECT spend_rollup_create('visits_by_day', 'visits',
    ARRAY['site', 'date_trunc(''day'', at) AS day'],
    ARRAY['count(*) AS visits', 'hll_add_agg(hll_hash_bigint(user_id)) AS users MERGE WITH hll_union_agg',
          'topn_add_agg(path) AS pages MERGE WITH topn_union_agg'])";

/// Rows of ten sites. The seventh has most of the users, more than hll keeps one by one; the ninth names
/// neither a user nor a page.
pub fn visit(first: u32, n: u32, day: &str) -> String {
    format!(
        "INSERT INTO visits (site, user_id, path, at)
         SELECT CASE WHEN i % 3 > 0 THEN 7 ELSE i % 10 END, CASE WHEN i % 30 <> 9 THEN i * 7919 % 6007 END,
             CASE WHEN i % 30 <> 9 THEN '/page/' || i * i % 41 END, timestamptz '{day} 12:00Z' - i % 50 * interval '1 hour'
         FROM generate_series({first}, {first} + {n} - 1) AS i"
    )
}

/// The live view is what the extensions' own aggregates say of the raw rows, by day and over all days: what
/// they answer, and the states to the last bit. Where the rows are on nodes, each compares its own.
pub fn assert_visits_exact(client: &mut Client) {
    for (ours, theirs) in [
        (
            "SELECT site, day, visits, users::text AS users, hll_cardinality(users) AS distinct_users, pages
             FROM litellm_spend.visits_by_day",
            "SELECT site, date_trunc('day', at, 'UTC') AS day, count(*) AS visits,
                 hll_add_agg(hll_hash_bigint(user_id))::text AS users,
                 hll_cardinality(hll_add_agg(hll_hash_bigint(user_id))) AS distinct_users, topn_add_agg(path) AS pages
             FROM visits GROUP BY 1, 2",
        ),
        (
            "SELECT site, NULL::timestamptz AS day, sum(visits)::bigint AS visits, hll_union_agg(users)::text AS users,
                 hll_cardinality(hll_union_agg(users)) AS distinct_users, topn_union_agg(pages) AS pages
             FROM litellm_spend.visits_by_day GROUP BY site",
            "SELECT site, NULL::timestamptz AS day, count(*) AS visits, hll_add_agg(hll_hash_bigint(user_id))::text AS users,
                 hll_cardinality(hll_add_agg(hll_hash_bigint(user_id))) AS distinct_users, topn_add_agg(path) AS pages
             FROM visits GROUP BY site",
        ),
    ] {
        let sql = format!(
            "SELECT coalesce(o.site, t.site)::text, o.visits::text, t.visits::text, o.distinct_users, t.distinct_users,
                 o.pages, t.pages
             FROM ({ours}) AS o FULL JOIN ({theirs}) AS t ON o.site = t.site
                 AND coalesce(o.day, '-infinity') = coalesce(t.day, '-infinity')
             WHERE (o.visits, o.users, o.distinct_users, o.pages) IS DISTINCT FROM
                   (t.visits, t.users, t.distinct_users, t.pages)"
        );
        assert_no_rows(client.query(&sql, &[]).unwrap(), "the live view and the rows differ");
    }
    assert_no_rows(
        client.query("SELECT * FROM spend_rollup_verify('visits_by_day')", &[]).unwrap(),
        "verify",
    );
}

//! Rollups of hll and topn states: where the server has these extensions. Those of tables that Citus
//! distributes are in tests/citus.rs.

mod common;

use common::*;

#[test]
fn the_example_of_the_page_is_what_is_tested() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/citus.md")).unwrap();
    assert!(page.contains(CREATE_VISITS), "{CREATE_VISITS}");
}

#[test]
fn distinct_users_and_most_frequent_pages_equal_those_of_the_raw_rows() {
    if !server_has_hll_and_topn() {
        return;
    }
    let (_db, mut client) = without_worker();
    client.batch_execute(&visits("counter_h").join(";")).unwrap();
    client.batch_execute(&visit(0, 4000, "2026-03-03")).unwrap();
    client.batch_execute(CREATE_VISITS).unwrap();
    assert_visits_exact(&mut client);
    // All before is merged when a batch comes; the days of the last are over.
    for (batch, day) in ["2026-03-03", "2026-03-04", "2026-03-01"].iter().enumerate() {
        let run = "SELECT string_agg(outcome, ' ') FROM spend_rollup_run('visits_by_day')";
        assert_eq!(value::<String>(&mut client, run), "merged");
        assert_visits_exact(&mut client);
        client.batch_execute(&visit(4000 + 3000 * batch as u32, 3000, day)).unwrap();
        assert_visits_exact(&mut client);
    }
    let tail = "SELECT tail_rows FROM spend_rollup_status WHERE rollup = 'visits_by_day'";
    assert_eq!(value::<i64>(&mut client, tail), 3000);
    // States of all kinds were merged: of no user, users one by one, and estimates of both sizes.
    let kinds = "SELECT array_agg(DISTINCT hll_type(users))::text FROM litellm_spend.visits_by_day_rollup";
    assert_eq!(value::<String>(&mut client, kinds), "{1,2,3,4}");
    // What is not the truth is found, and computed again.
    client
        .batch_execute("UPDATE litellm_spend.visits_by_day_rollup SET users = hll_empty() WHERE site = 7")
        .unwrap();
    let found = "SELECT count(*) FROM spend_rollup_verify('visits_by_day')";
    assert!(value::<i64>(&mut client, found) > 0);
    client.batch_execute("SELECT spend_rollup_rebuild('visits_by_day')").unwrap();
    assert_visits_exact(&mut client);
}

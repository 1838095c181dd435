//! Runs pg_regress: one connection, no worker, output compared with what is expected.

mod common;

use common::*;
use std::process::Command;

#[test]
fn one_connection_behaves_as_expected() {
    // The worker would merge between two statements.
    let cluster = own_cluster(&[NO_WORKER]);
    let pgxs = Command::new(std::env::var("PG_CONFIG").unwrap_or("pg_config".into()))
        .arg("--pgxs")
        .output()
        .unwrap();
    let pgxs = String::from_utf8(pgxs.stdout).unwrap();
    let pg_regress = pgxs.trim().replace("makefiles/pgxs.mk", "test/regress/pg_regress");
    let tests = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pg_regress");
    for test in ["surface", "errors", "story"] {
        let db = cluster.database();
        let output = Command::new(&pg_regress)
            .args(["--use-existing", "--inputdir", tests, "--outputdir", env!("CARGO_TARGET_TMPDIR")])
            .args([
                "--host",
                cluster.dir.to_str().unwrap(),
                "--port",
                &PORT.to_string(),
                "--user",
                "postgres",
            ])
            .args(["--bindir", cluster.bin.to_str().unwrap(), "--dbname", &db.name, test])
            .output()
            .unwrap();
        let diffs = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("regression.diffs");
        let diffs = std::fs::read_to_string(diffs).unwrap_or_default();
        assert!(output.status.success(), "{}\n{diffs}", String::from_utf8_lossy(&output.stdout));
        eprintln!("{}", String::from_utf8_lossy(&output.stdout));
    }
}

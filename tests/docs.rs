//! The pages say what there is: a server is asked for its functions, views, columns, tables and settings, and
//! each must be documented where readers look for it; what is documented must exist, down to each link.

mod common;

use common::*;
use postgres::Client;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

fn pages() -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().file_name());
    let docs = docs.map(|name| format!("docs/{}", name.into_string().unwrap()));
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
        .map(String::from)
        .into_iter()
        .chain(docs.filter(|name| name.ends_with(".md")))
        .map(|name| (name.clone(), fs::read_to_string(root.join(&name)).unwrap()))
        .collect()
}

/// The text under a heading, up to the next one of its level or above.
fn section<'a>(page: &'a str, heading: &str) -> Option<&'a str> {
    let level = |line: &str| line.bytes().take_while(|b| *b == b'#').count();
    let is = |line: &str| level(line) > 0 && line.trim_start_matches('#').trim() == heading;
    let start = page.split_inclusive('\n').scan(0, |at, line| {
        *at += line.len();
        Some((*at, line))
    });
    let (begin, title) = start.clone().find(|(_, line)| is(line.trim_end()))?;
    let end = start
        .filter(|(at, _)| *at > begin)
        .find(|(_, line)| (1..=level(title)).contains(&level(line)))
        .map_or(page.len(), |(at, line)| at - line.len());
    Some(&page[begin..end])
}

/// The cells of a row of a table, without their marks.
fn cells(line: &str) -> Vec<&str> {
    line.trim().trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`')).collect()
}

fn names(client: &mut Client, sql: &str) -> Vec<String> {
    client.query(sql, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

#[test]
fn what_there_is_is_documented_and_what_is_documented_is_there() {
    let db = shared().database();
    let mut client = db.connect();
    let pages = pages();
    let (readme, reference) = (&pages["README.md"], &pages["docs/reference.md"]);
    let mut wrong: Vec<String> = vec![];

    // 1. functions, with their arguments, and views, with their columns.
    let member = "FROM pg_depend d WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
                  AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'litellm_spend')";
    let name_of = |schema: &str, name: &str| {
        format!(
            "CASE {schema}::regnamespace WHEN 'litellm_spend'::regnamespace THEN 'litellm_spend.' ELSE '' END || {name}"
        )
    };
    let functions = client
        .query(
            &format!(
                "SELECT {}, coalesce((SELECT array_agg(a) FROM unnest(proargnames) AS a), '{{}}') FROM pg_proc
                 WHERE oid IN (SELECT d.objid {member} AND d.classid = 'pg_proc'::regclass)",
                name_of("pronamespace", "proname")
            ),
            &[],
        )
        .unwrap();
    let views = client
        .query(
            &format!(
                "SELECT {}, (SELECT array_agg(attname::text) FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0) FROM pg_class c
                 WHERE relkind = 'v' AND oid IN (SELECT d.objid {member} AND d.classid = 'pg_class'::regclass)",
                name_of("relnamespace", "relname")
            ),
            &[],
        )
        .unwrap();
    assert!(functions.len() > 20 && views.len() > 5, "{} functions, {} views", functions.len(), views.len());
    let mut known = BTreeSet::new();
    for (row, is_view) in functions.iter().map(|row| (row, false)).chain(views.iter().map(|row| (row, true)))
    {
        let (name, parts): (String, Vec<String>) = (row.get(0), row.get(1));
        known.insert(name.clone());
        let Some(text) = section(reference, &name) else {
            wrong.push(format!("{name} has no section"));
            continue;
        };
        let missing = parts.iter().filter(|part| !text.contains(part.as_str()));
        wrong.extend(missing.map(|part| format!("{part} of {name} is not documented")));
        if is_view {
            let documented = text.lines().filter(|line| line.starts_with("| `")).flat_map(|line| {
                cells(line)[0].split(", ").map(|cell| cell.trim_matches('`')).collect::<Vec<_>>()
            });
            let gone = documented.filter(|column| !parts.iter().any(|part| part == column));
            wrong.extend(gone.map(|column| format!("{name} has no column {column}")));
        }
    }
    let live = ["litellm_spend.daily_spend"];
    let sections = ["Functions", "Views"].map(|title| section(reference, title).unwrap());
    for heading in sections.iter().flat_map(|text| text.lines()).filter_map(|line| line.strip_prefix("### "))
    {
        let is_name = heading.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c == '.');
        if is_name && !known.contains(heading) && !live.contains(&heading) {
            wrong.push(format!("{heading} is documented but gone"));
        }
    }

    // 2. tables.
    let tables = section(&pages["docs/internals.md"], "Tables").unwrap();
    let sql = format!(
        "SELECT relname::text FROM pg_class WHERE relkind IN ('r', 'S') AND oid IN (SELECT d.objid {member} AND d.classid = 'pg_class'::regclass)"
    );
    let missing = names(&mut client, &sql).into_iter().filter(|table| !tables.contains(table.as_str()));
    wrong.extend(missing.map(|table| format!("table {table} is missing under Tables")));

    // 3. settings.
    let settings = client
        .query(
            "SELECT name, boot_val, coalesce(unit, '') FROM pg_settings WHERE name LIKE 'litellm\\_spend.%'",
            &[],
        )
        .unwrap();
    assert!(!settings.is_empty());
    let expected: Vec<[String; 3]> =
        settings.iter().map(|setting| [setting.get(0), setting.get(2), setting.get(1)]).collect();
    // The README has those that people set, the reference has all.
    for (page, heading, all) in [(readme, "Settings and privileges", false), (reference, "Settings", true)] {
        let text = section(page, heading).unwrap();
        let rows: Vec<_> = text.lines().filter(|l| l.starts_with("| `litellm_spend.")).map(cells).collect();
        let is_there = |setting: &[String; 3]| rows.iter().any(|row| row[..3] == *setting);
        let missing = expected.iter().filter(|setting| all && !is_there(setting));
        wrong.extend(missing.map(|setting| format!("under {heading} there is not {setting:?}")));
        let strange = rows.iter().filter(|row| !expected.iter().any(|setting| row[..3] == *setting));
        wrong.extend(strange.map(|row| format!("under {heading} {row:?} is no setting")));
        assert!(!rows.is_empty(), "{heading}");
    }

    // 4. what attach makes.
    client.batch_execute("SELECT spend_attach(reports => true)").unwrap();
    let rollups = names(&mut client, "SELECT rollup FROM spend_rollup_status");
    let text = section(reference, "Built-in rollups").unwrap();
    let missing = rollups.iter().filter(|name| !text.contains(&format!("`{name}`")));
    wrong.extend(missing.map(|name| format!("rollup {name} is missing")));
    let adopted = names(&mut client, "SELECT name::text FROM litellm_spend.public_view");
    for (page, text) in
        [("README", readme.as_str()), ("reference", section(reference, "LiteLLM's views").unwrap())]
    {
        let missing = adopted.iter().filter(|name| !text.contains(&format!("`\"{name}\"`")));
        wrong.extend(missing.map(|name| format!("view {name} is missing in {page}")));
    }
    let reports = names(
        &mut client,
        "SELECT viewname::text FROM pg_views WHERE schemaname = 'litellm_spend' AND (viewname LIKE 'daily\\_%' OR viewname LIKE 'hourly\\_%')",
    );
    let missing = reports.iter().filter(|name| !pages["docs/reports.md"].contains(&format!("`{name}`")));
    wrong.extend(missing.map(|name| format!("view {name} is missing in reports")));
    assert!(rollups.len() == 8 && adopted.len() == 7 && reports.len() == 11);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn each_link_leads_somewhere() {
    let pages = pages();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let anchor = |heading: &str| {
        let kept = heading.to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.collect::<String>().trim().replace(' ', "-")
    };
    let anchors: BTreeMap<&str, BTreeSet<String>> = pages
        .iter()
        .map(|(name, text)| {
            let headings = text.lines().filter(|line| line.starts_with('#'));
            (name.as_str(), headings.map(|line| anchor(line.trim_start_matches('#'))).collect())
        })
        .collect();
    let (mut links, mut wrong) = (0, vec![]);
    for (name, text) in &pages {
        let folder = Path::new(name).parent().unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(to, _)| to) {
            if target.starts_with("http") || target.contains(' ') {
                continue;
            }
            links += 1;
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let file = match file {
                "" => name.clone(),
                file => folder.join(file).to_string_lossy().replace("docs/../", ""),
            };
            let there = anchors.get(file.as_str()).is_some_and(|known| known.contains(heading));
            if !root.join(&file).exists() || !heading.is_empty() && !there {
                wrong.push(format!("{name}: {target}"));
            }
        }
    }
    assert!(links > 80, "{links} links");
    assert!(wrong.is_empty(), "{wrong:#?}");
    // What the pages tell people to type.
    let makefile = fs::read_to_string(root.join("Makefile")).unwrap();
    for (name, text) in &pages {
        for code in text.split('`').skip(1).step_by(2) {
            let words: Vec<&str> = code.split_whitespace().collect();
            for target in words.windows(2).filter(|pair| pair[0] == "make").map(|pair| pair[1]) {
                let there = makefile.contains(&format!("\n{target}:"));
                assert!(there || name == "CHANGELOG.md", "{name}: make {target}");
            }
        }
    }
}

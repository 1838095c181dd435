//! The rooms of src call downwards only, and CONTRIBUTING.md says who calls whom.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// From the bottom to the top.
const ROOMS: [&str; 9] =
    ["server", "state", "citus", "engine", "litellm", "partition", "index", "worker", "api"];

/// The only arrow that points up: what a built-in rollup must equal is LiteLLM's table.
const UPWARD: [(&str, &str); 1] = [("engine/rebuild.rs", "litellm")];

#[test]
fn no_room_calls_one_above_it_and_the_map_is_right() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut calls, mut upward) = (BTreeMap::<&str, BTreeSet<&str>>::new(), BTreeSet::new());
    let mut files = 0;
    for (floor, room) in ROOMS.iter().enumerate() {
        for path in files_below(&root.join("src").join(room)) {
            let file = path.strip_prefix(root.join("src")).unwrap().display().to_string();
            let text = fs::read_to_string(&path).unwrap();
            files += 1;
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            for called in code.flat_map(|line| line.split("crate::").skip(1)) {
                let called = called.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
                let Some(other) = ROOMS.iter().position(|room| *room == called) else {
                    assert!(["error", "guc"].contains(&called), "{file} calls crate::{called}");
                    continue;
                };
                if other != floor {
                    calls.entry(room).or_default().insert(ROOMS[other]);
                }
                if other > floor {
                    upward.insert((file.clone(), ROOMS[other]));
                }
            }
        }
    }
    assert!(files > 50, "{files} files");
    let expected: BTreeSet<_> = UPWARD.iter().map(|(file, room)| (file.to_string(), *room)).collect();
    assert_eq!(upward, expected, "arrows that point up");
    // As CONTRIBUTING.md has it.
    let page = fs::read_to_string(root.join("CONTRIBUTING.md")).unwrap();
    for room in ROOMS {
        let begin = format!("| `{room}` | ");
        let row =
            page.lines().find(|line| line.starts_with(&begin)).unwrap_or_else(|| panic!("no row for {room}"));
        let said = row.trim_end_matches('|').rsplit('|').next().unwrap().trim();
        let said: BTreeSet<&str> = said.split(", ").filter(|name| !name.is_empty()).collect();
        assert_eq!(said, calls.remove(room).unwrap_or_default(), "what {room} calls");
    }
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

/// rustfmt leaves comments as they are; what it breaks is as wide as rustfmt.toml says.
#[test]
fn a_comment_is_no_wider_than_the_code() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut wide, mut comments) = (vec![], 0);
    for folder in ["src", "tests", "sql"] {
        for path in files_below(&root.join(folder)) {
            let marker = match path.extension().and_then(|extension| extension.to_str()) {
                Some("rs") => "//",
                Some("sql") if folder == "sql" => "--",
                _ => continue,
            };
            for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
                let text = line.trim_start();
                comments += usize::from(text.starts_with(marker));
                // A row of a table is one line.
                if text.starts_with(marker) && line.chars().count() > WIDTH && !text.contains(" | ") {
                    wide.push(format!("{}:{}", path.display(), number + 1));
                }
            }
        }
    }
    assert!(comments > 1000, "{comments} lines of comments");
    assert!(wide.is_empty(), "wider than {WIDTH}: {wide:#?}");
}

/// `max_width` of rustfmt.toml.
const WIDTH: usize = 110;

/// A client whose encoding has not a letter of a message gets an error for it.
#[test]
fn what_we_say_is_in_letters_that_every_encoding_has() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut odd = vec![];
    for path in ["src", "sql"].iter().flat_map(|folder| files_below(&root.join(folder))) {
        let text = fs::read_to_string(&path).unwrap();
        // Unit tests and those that run inside a server speak to nobody.
        let text = text.split("#[cfg(test)]\nmod ").next().unwrap();
        let file = path.strip_prefix(root).unwrap().display().to_string();
        for (number, line) in text.lines().enumerate() {
            let is_comment = ["//", "--"].iter().any(|marker| line.trim_start().starts_with(marker));
            // The mark within a value that was too long is in rollups that there are.
            let is_kept = file == "src/litellm/builtin.rs" && line.contains("|| '…' ||");
            if !line.is_ascii() && !is_comment && !is_kept && file != "src/inside.rs" {
                odd.push(format!("{file}:{}", number + 1));
            }
        }
    }
    assert!(odd.is_empty(), "letters that LATIN1 may not have: {odd:#?}");
}

/// Whoever has standard_conforming_strings off, or a dump of such a database, installs the same: a backslash
/// stands in E'…' only.
#[test]
fn a_backslash_means_the_same_in_every_session_that_installs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut scripts, mut misread) = (0, vec![]);
    for path in files_below(&root.join("sql")) {
        let text = fs::read_to_string(&path).unwrap();
        scripts += 1;
        // Only psql reads this line.
        let script = text.lines().map(|line| if line.starts_with("\\echo ") { "" } else { line });
        // Whether a quote is open, and whether it, or the last one, is E's: '' within it closes and opens it.
        let (mut open, mut escapes, mut before) = (false, false, [' '; 2]);
        for (number, line) in script.enumerate() {
            let mut letters = line.chars();
            while let Some(letter) = letters.next() {
                let is_word = |c: char| c.is_alphanumeric() || c == '_';
                match letter {
                    '-' if !open && before[1] == '-' => break,
                    '\'' => {
                        open = !open;
                        if open && before[1] != '\'' {
                            escapes = before[1] == 'E' && !is_word(before[0]);
                        }
                    }
                    '\\' if open && escapes => _ = letters.next(),
                    '\\' => misread.push(format!("{}:{}", path.display(), number + 1)),
                    _ => {}
                }
                before = [before[1], letter];
            }
            before = [' '; 2];
        }
    }
    assert!(scripts >= 4, "{scripts} scripts");
    assert!(misread.is_empty(), "a backslash in no E'…': {misread:#?}");
}

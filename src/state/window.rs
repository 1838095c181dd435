//! Decides up to which sequence value a source can be merged. Pure: it sees observations, never the server.
//!
//! ```text
//!   merged    | window (a, b]      | may still change
//! ------------+--------------------+-----------------------> sequence
//!         watermark             safe end         last value
//! ```
//!
//! Every inserter takes RowExclusiveLock on the source, or on a relation from which rows get there
//! (`sources::inserted_into`), *before* it draws a value from the sequence. So when the last value `S` is
//! read first and the lock holders second, each row numbered `<= S` belongs to a transaction that has ended
//! or is among those holders. Once all of them have ended, `S` is safe: no row numbered `<= S` can appear any
//! more.
//!
//! A *candidate* is such an `S` with the holders it still waits for. It is remembered between looks, so that
//! nobody has to wait with a transaction open, and a source that always has some writer still advances.
//!
//! A sequence that is set back gives values again, to transactions that no candidate waits for: at the next
//! look candidates above its last value are void ([`Window::forget_above`]). One that it has passed again by
//! then cannot be told from one that it never fell behind.
//!
//! A holder is a virtual transaction, as `pg_locks` prints it. PREPARE TRANSACTION keeps it (from PostgreSQL
//! 14 on), but a restart recovers a prepared transaction as another one, `-1/<xid>`. So a remembered session
//! that vanished may have become any of those: while a candidate waits for sessions, it also waits for every
//! recovered transaction it meets.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// A transaction that holds RowExclusiveLock on the source: `pg_locks.virtualtransaction`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Holder(pub String);

impl Holder {
    /// One on another node, which numbers its transactions as we do ours.
    pub fn on_node(group: i32, transaction: &str) -> Holder {
        Holder(format!("{group}:{transaction}"))
    }

    fn is_recovered(&self) -> bool {
        self.0.rsplit(':').next().is_some_and(|transaction| transaction.starts_with("-1/"))
    }
}

/// A sequence value that becomes safe when everything in `waits_for` has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    pub end: i64,
    pub waits_for: BTreeSet<Holder>,
}

/// The candidates of one source that are not safe yet, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Window {
    candidates: Vec<Candidate>,
}

impl Window {
    /// Takes one look: `last_value` was read before `holders`. Returns the newest value that is safe now.
    pub fn look(&mut self, last_value: i64, holders: &BTreeSet<Holder>) -> Option<i64> {
        for candidate in &mut self.candidates {
            let sessions = candidate.waits_for.iter().any(|h| !h.is_recovered());
            candidate.waits_for.retain(|h| holders.contains(h));
            if sessions {
                let recovered = holders.iter().filter(|h| h.is_recovered());
                candidate.waits_for.extend(recovered.cloned());
            }
        }
        if self.candidates.last().is_none_or(|newest| newest.end < last_value) {
            let waits_for = holders.clone();
            self.candidates.push(Candidate { end: last_value, waits_for });
        }

        let safe = self.candidates.iter().rev().find(|c| c.waits_for.is_empty()).map(|c| c.end);
        self.candidates.retain(|c| safe.is_none_or(|safe| c.end > safe));
        self.drop_dominated();
        safe
    }

    /// Voids the candidates of a sequence that was set back. `last_value` is its own, not what is safe of it.
    pub fn forget_above(&mut self, last_value: i64) {
        self.candidates.retain(|c| c.end <= last_value);
    }

    /// An older candidate that waits for all that a newer one waits for can only become safe later.
    fn drop_dominated(&mut self) {
        let mut kept: Vec<Candidate> = Vec::with_capacity(self.candidates.len());
        for newer in self.candidates.drain(..) {
            kept.retain(|older| !newer.waits_for.is_subset(&older.waits_for));
            kept.push(newer);
        }
        self.candidates = kept;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holders(names: &[&str]) -> BTreeSet<Holder> {
        names.iter().map(|n| Holder(n.to_string())).collect()
    }

    #[test]
    fn nobody_writing_makes_the_last_value_safe_at_once() {
        assert_eq!(Window::default().look(7, &holders(&[])), Some(7));
    }

    #[test]
    fn a_value_is_safe_only_when_every_holder_has_ended() {
        let mut w = Window::default();
        assert_eq!(w.look(7, &holders(&["3/1", "4/1"])), None);
        assert_eq!(w.look(7, &holders(&["4/1"])), None);
        assert_eq!(w.look(7, &holders(&[])), Some(7));
    }

    #[test]
    fn overlapping_writers_never_starve_the_window() {
        let mut w = Window::default();
        let mut safe = 0;
        for i in 1..100 {
            let (a, b) = (format!("3/{i}"), format!("4/{}", i + 1));
            safe = w.look(i * 10, &holders(&[&a, &b])).unwrap_or(safe);
        }
        assert!(safe >= 970, "safe end stayed at {safe}");
        assert!(w.candidates.len() <= 2);
    }

    #[test]
    fn a_new_writer_does_not_delay_an_older_candidate() {
        let mut w = Window::default();
        assert_eq!(w.look(7, &holders(&["3/1"])), None);
        assert_eq!(w.look(9, &holders(&["4/1"])), Some(7));
    }

    #[test]
    fn values_that_a_sequence_set_back_gives_again_are_waited_for() {
        let mut w = Window::default();
        assert_eq!(w.look(400, &holders(&["3/1"])), None);
        assert_eq!(w.look(1000, &holders(&["3/1", "4/1"])), None);
        w.forget_above(401);
        assert_eq!(w.look(401, &holders(&["5/1"])), Some(400), "up to 401 there is a writer");
        assert_eq!(w.look(1100, &holders(&["5/1"])), None);
        assert_eq!(w.look(1100, &holders(&[])), Some(1100));
    }

    #[test]
    fn a_session_that_prepared_before_a_restart_is_still_waited_for() {
        let mut w = Window::default();
        assert_eq!(w.look(7, &holders(&["3/1"])), None);
        assert_eq!(w.look(7, &holders(&["-1/800"])), None);
        assert_eq!(w.look(7, &holders(&["-1/800", "-1/801"])), None, "801 came later");
        assert_eq!(w.look(7, &holders(&["-1/801"])), Some(7));
    }

    #[test]
    fn a_session_of_another_node_that_prepared_before_a_restart_is_still_waited_for() {
        let mut w = Window::default();
        let on_node = |transaction: &str| BTreeSet::from([Holder::on_node(2, transaction)]);
        assert_eq!(w.look(7, &on_node("3/1")), None);
        assert_eq!(w.look(7, &on_node("-1/800")), None);
        assert_eq!(w.look(7, &on_node("4/1")), Some(7));
    }

    #[test]
    fn one_long_writer_keeps_one_candidate() {
        let mut w = Window::default();
        for i in 0..1000 {
            let short = format!("4/{i}");
            w.look(i, &holders(&["3/1", &short]));
        }
        assert!(w.candidates.len() <= 2, "{} candidates", w.candidates.len());
        assert_eq!(w.look(1000, &holders(&["4/9999"])), Some(999));
    }

    #[test]
    fn it_survives_json() {
        let mut w = Window::default();
        w.look(7, &holders(&["3/1", "-1/800"]));
        let text = serde_json::to_string(&w).unwrap();
        assert_eq!(text, r#"[{"end":7,"waits_for":["-1/800","3/1"]}]"#);
        assert_eq!(serde_json::from_str::<Window>(&text).unwrap(), w);
    }
}

//! How large the windows of merges are, by how long the last ones took. Pure: it asks no server.

use crate::state::step::Subject;
use std::collections::HashMap;
use std::time::Duration;

/// Windows grow to what is merged in this time: the larger, the more rows meet in a group that is written
/// once, and the longer others wait for their turn.
const WINDOW_TIME: Duration = Duration::from_secs(1);

/// The same while rows come faster than they are merged. If each row of a small window has a group of its
/// own, only larger ones catch up, the sooner the larger; and a busy machine, which is where this happens,
/// takes several times as long for the same window.
const BEHIND_WINDOW_TIME: Duration = Duration::from_secs(30);

/// How many times as large as the last one a window may be.
const GROWTH: u32 = 16;

/// For a machine that becomes three times as slow between two windows, and for no longer than that after a
/// window as long as they may be: what a merge calls may be anybody's, and others wait for their turn.
pub const MERGE_LIMIT: Duration = Duration::from_secs(3);

/// Takes 0.1 to 1 s (PostgreSQL 15, two shared cores, 2026-11).
const FIRST_WINDOW: i64 = 100_000;
const SMALLEST_WINDOW: i64 = 1000;

/// The windows of one subject.
struct Window {
    /// How many values the next one may have.
    most: i64,
    /// How long the last one took.
    took: Duration,
    /// How many they may have at all, while rows come faster than they are merged.
    bound: i64,
}

#[derive(Default)]
pub struct Pace(HashMap<Subject, Window>);

impl Pace {
    /// How many values the next window may have.
    pub fn most(&self, subject: &Subject) -> i64 {
        self.0.get(subject).map_or(FIRST_WINDOW, |window| window.most)
    }

    /// How long the next window may take.
    pub fn limit(&self, subject: &Subject) -> Duration {
        MERGE_LIMIT.max((self.took(subject) * GROWTH).min(BEHIND_WINDOW_TIME) * 3)
    }

    /// How long more rows are worth waiting for: what a window costs is mostly the groups that it touches,
    /// which it shares with them.
    pub fn worth_waiting(&self, subject: &Subject) -> Duration {
        (self.took(subject) / 10).min(WINDOW_TIME)
    }

    fn took(&self, subject: &Subject) -> Duration {
        self.0.get(subject).map_or(Duration::ZERO, |window| window.took)
    }

    /// A window of so many values, of the `most` that were allowed, took so long.
    pub fn note(&mut self, subject: &Subject, most: i64, values: i64, took: Duration) {
        let bound = if values < most { i64::MAX } else { next_bound(self.bound(subject)) };
        let most = next_window(most, values, took).min(bound);
        self.0.insert(subject.clone(), Window { most, took, bound });
    }

    /// After a window that took too long.
    pub fn make_easier(&mut self, subject: &Subject, most: i64) {
        let (most, bound) = ((most / 8).max(SMALLEST_WINDOW), self.bound(subject));
        self.0.insert(subject.clone(), Window { most, took: Duration::ZERO, bound });
    }

    /// After a window for which there was not enough memory or disk. The time that smaller ones take says
    /// nothing of that: they would grow to the same size at once.
    pub fn stay_below(&mut self, subject: &Subject, most: i64) {
        self.make_easier(subject, most);
        if let Some(window) = self.0.get_mut(subject) {
            window.bound = (most / 2).max(SMALLEST_WINDOW);
        }
    }

    fn bound(&self, subject: &Subject) -> i64 {
        self.0.get(subject).map_or(i64::MAX, |window| window.bound)
    }
}

/// How many values the next window may have, after one of `values` of the `most` that were allowed.
fn next_window(most: i64, values: i64, took: Duration) -> i64 {
    if values < most && took <= WINDOW_TIME {
        return most;
    }
    let time = if values < most { WINDOW_TIME } else { BEHIND_WINDOW_TIME };
    let fits = values as f64 * time.as_secs_f64() / took.as_secs_f64();
    (fits as i64).clamp(most / 2, most.saturating_mul(GROWTH.into())).max(SMALLEST_WINDOW)
}

/// After each full window it is a little higher: what was lacking may be there again. It doubles in twelve.
fn next_bound(bound: i64) -> i64 {
    bound.saturating_add(bound / 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_stay_below_the_size_for_which_there_was_no_memory() {
        let (mut pace, subject) = (Pace::default(), Subject::Rollup("r".into()));
        let mut sizes = vec![];
        pace.stay_below(&subject, 1_600_000);
        for _ in 0..4 {
            sizes.push(pace.most(&subject));
            pace.note(&subject, pace.most(&subject), pace.most(&subject), Duration::from_millis(100));
        }
        assert_eq!(sizes, [200_000, 850_000, 903_125, 959_570]);
        pace.stay_below(&subject, 1_600_000);
        (0..100).for_each(|_| {
            pace.note(&subject, pace.most(&subject), pace.most(&subject), Duration::from_millis(100));
        });
        assert!(pace.most(&subject) > 100_000_000, "they grow again");
        pace.stay_below(&subject, 1_600_000);
        pace.note(&subject, 200_000, 10, Duration::from_millis(100));
        pace.note(&subject, 200_000, 200_000, Duration::from_millis(100));
        assert_eq!(pace.most(&subject), 3_200_000, "all was merged since");
    }

    #[test]
    fn a_window_grows_while_there_is_time_and_shrinks_when_there_is_not() {
        let seconds = Duration::from_secs_f64;
        assert_eq!(next_window(100_000, 100_000, seconds(0.04)), 1_600_000);
        assert_eq!(next_window(100_000, 100_000, seconds(24.0)), 125_000);
        assert_eq!(next_window(100_000, 100_000, seconds(48.0)), 62_500);
        assert_eq!(next_window(100_000, 100_000, seconds(480.0)), 50_000, "not by one slow window alone");
        assert_eq!(next_window(100_000, 3, seconds(0.1)), 100_000, "few rows say nothing");
        assert_eq!(next_window(100_000, 60_000, seconds(1.2)), 50_000);
        assert_eq!(next_window(100_000, 5_000_000, Duration::ZERO), 1_600_000, "a gap of the numbers");
        assert_eq!(next_window(SMALLEST_WINDOW, 1000, seconds(60.0)), SMALLEST_WINDOW);
    }
}

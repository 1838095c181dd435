//! Decides which partitions a table needs, what they are called, and which have expired. Pure: it sees the
//! ranges that exist and the time, never the server.
//!
//! Names and borders are those of LiteLLM's own partition job, so that either side recognises the other's
//! partitions: a period begins at midnight UTC, weeks on Monday, and its partition is called
//! `<table>_pYYYYMMDD` after its first day.

use crate::server::text::suffixed;
use chrono::{DateTime, Datelike, Days, Months, NaiveDate, NaiveDateTime};
use std::fmt;

/// A point of time as the server's `timestamp` has it: microseconds since 1970, UTC. The ends of the line are
/// unbounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(pub i64);

impl Moment {
    pub const MIN: Moment = Moment(i64::MIN);
    pub const MAX: Moment = Moment(i64::MAX);

    fn midnight(day: NaiveDate) -> Moment {
        Moment(day.and_time(chrono::NaiveTime::MIN).and_utc().timestamp_micros())
    }

    /// The first multiple of `unit` microseconds that is not before it.
    pub fn rounded_up(self, unit: i64) -> Moment {
        match self.0.rem_euclid(unit) {
            0 => self,
            past => Moment(self.0.saturating_add(unit - past)),
        }
    }

    fn utc(self) -> Option<NaiveDateTime> {
        DateTime::from_timestamp_micros(self.0).map(|at| at.naive_utc())
    }
}

/// As in `FOR VALUES FROM (…) TO (…)`, and as the server reads a time: years have four digits or more, and no
/// sign.
impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match (*self, self.utc()) {
            (Moment::MIN, _) => f.write_str("MINVALUE"),
            (Moment::MAX, _) | (_, None) => f.write_str("MAXVALUE"),
            (_, Some(at)) => {
                let (year, era) = match at.year() {
                    year if year > 0 => (year, ""),
                    year => (1 - year, " BC"),
                };
                write!(f, "'{year:04}-{}{era}'", at.format("%m-%d %H:%M:%S%.f"))
            }
        }
    }
}

/// The times of a partition: `[from, to)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    pub from: Moment,
    pub to: Moment,
}

impl Range {
    pub const EVERYTHING: Range = Range { from: Moment::MIN, to: Moment::MAX };

    /// The part of it that is in `other` as well; nothing if that is empty.
    pub fn within(self, other: Range) -> Option<Range> {
        let range = Range { from: self.from.max(other.from), to: self.to.min(other.to) };
        (range.from < range.to).then_some(range)
    }
}

/// As in `FOR VALUES`.
impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "FROM ({}) TO ({})", self.from, self.to)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interval {
    Day,
    Week,
    Month,
}

impl Interval {
    pub fn parse(text: &str) -> Option<Interval> {
        match text {
            "day" => Some(Interval::Day),
            "week" => Some(Interval::Week),
            "month" => Some(Interval::Month),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Interval::Day => "day",
            Interval::Week => "week",
            Interval::Month => "month",
        }
    }

    /// The first day of the period that `day` is in.
    fn start(self, day: NaiveDate) -> Option<NaiveDate> {
        match self {
            Interval::Day => Some(day),
            Interval::Week => day.checked_sub_days(Days::new(day.weekday().num_days_from_monday().into())),
            Interval::Month => day.checked_sub_days(Days::new(day.day0().into())),
        }
    }

    /// The first day of the period after the one that begins on `start`.
    fn next(self, start: NaiveDate) -> Option<NaiveDate> {
        match self {
            Interval::Day => start.checked_add_days(Days::new(1)),
            Interval::Week => start.checked_add_days(Days::new(7)),
            Interval::Month => start.checked_add_months(Months::new(1)),
        }
    }

    /// The period that `at` is in; nothing for a time that no calendar has.
    pub fn period(self, at: Moment) -> Option<Range> {
        let start = self.start(at.utc()?.date())?;
        Some(Range { from: Moment::midnight(start), to: Moment::midnight(self.next(start)?) })
    }

    /// The period of `now` and the `ahead` that follow.
    pub fn periods(self, now: Moment, ahead: u32) -> Vec<Range> {
        let mut at = now;
        (0..=ahead)
            .map_while(|_| {
                let period = self.period(at)?;
                at = period.to;
                Some(period)
            })
            .collect()
    }
}

/// `<table>_pYYYYMMDD` of the first day in the range.
pub fn name(table: &str, range: Range) -> String {
    let day = range.from.utc().map(|at| at.format("%Y%m%d").to_string());
    suffixed(table, &format!("_p{}", day.as_deref().unwrap_or("first")))
}

/// The parts of `wanted` that none of `existing` covers: after a change of interval a period may exist in
/// part.
pub fn missing(wanted: &[Range], existing: &[Range]) -> Vec<Range> {
    let mut existing = existing.to_vec();
    existing.sort();
    let mut missing = vec![];
    for period in wanted {
        let mut from = period.from;
        for range in existing.iter().filter(|r| r.to > period.from && r.from < period.to) {
            if range.from > from {
                missing.push(Range { from, to: range.from });
            }
            from = from.max(range.to);
        }
        if from < period.to {
            missing.push(Range { from, to: period.to });
        }
    }
    missing
}

/// The ranges that no partition covers, in order: their rows go to DEFAULT.
pub fn gaps(existing: &[Range]) -> Vec<Range> {
    missing(&[Range::EVERYTHING], existing)
}

/// The rows that DEFAULT holds of one gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    pub gap: Range,
    pub first: Moment,
    pub last: Moment,
    /// Counted up to some limit beyond the size of a batch.
    pub rows: i64,
}

/// What is to be done next about the rows in DEFAULT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    Nothing,
    /// All rows but a few fit this range: DEFAULT itself becomes its partition.
    Adopt(Range),
    /// Rows from the beginning of this range move to a partition of it.
    Move(Range),
}

/// Decides it. `others` are rows in DEFAULT that belong there, up to some limit; `batch` is how many rows can
/// move at once; a period that ends by `cutoff` is left to the deletion of its rows.
pub fn drain(interval: Interval, groups: &[Group], others: i64, batch: i64, cutoff: Moment) -> Drain {
    let bulk: Vec<&Group> = groups.iter().filter(|g| g.rows > batch).collect();
    if let [one] = bulk[..]
        && others + groups.iter().filter(|g| *g != one).map(|g| g.rows).sum::<i64>() <= batch
        && let (Some(first), Some(last)) = (interval.period(one.first), interval.period(one.last))
        && let Some(range) = (Range { from: first.from, to: last.to }).within(one.gap)
    {
        return Drain::Adopt(range);
    }
    // The fewest rows first: what remains may be adopted.
    let period = |g: &Group| interval.period(g.first).and_then(|period| period.within(g.gap));
    let mut ranges: Vec<_> = groups.iter().filter_map(|g| period(g).map(|range| (g.rows, range))).collect();
    ranges.retain(|(_, range)| range.to > cutoff);
    ranges.sort();
    ranges.first().map_or(Drain::Nothing, |(_, range)| Drain::Move(*range))
}

/// The partition that `range` continues: it ends where `range` begins, in the middle of a day, and holds no
/// other period.
pub fn continued(interval: Interval, range: Range, existing: &[Range]) -> Option<Range> {
    let (day, period) = (Interval::Day.period(range.from)?, interval.period(range.from)?);
    let before = existing.iter().find(|r| r.to == range.from)?;
    (day.from < range.from && before.from >= period.from).then_some(*before)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::text::LONGEST_NAME;

    fn at(text: &str) -> Moment {
        let text = if text.len() == 10 { format!("{text} 00:00:00") } else { text.to_string() };
        let at = NaiveDateTime::parse_from_str(&text, "%Y-%m-%d %H:%M:%S").unwrap();
        Moment(at.and_utc().timestamp_micros())
    }

    fn range(from: &str, to: &str) -> Range {
        Range { from: at(from), to: at(to) }
    }

    #[test]
    fn periods_cross_the_end_of_a_year_and_the_29th_of_february() {
        let periods = |interval: Interval, now: &str, ahead| interval.periods(at(now), ahead);
        assert_eq!(
            periods(Interval::Day, "2028-02-28 23:59:59", 2),
            [
                range("2028-02-28", "2028-02-29"),
                range("2028-02-29", "2028-03-01"),
                range("2028-03-01", "2028-03-02")
            ]
        );
        assert_eq!(
            periods(Interval::Week, "2027-01-01", 1),
            [range("2026-12-28", "2027-01-04"), range("2027-01-04", "2027-01-11")]
        );
        assert_eq!(
            periods(Interval::Month, "2027-12-31", 2),
            [
                range("2027-12-01", "2028-01-01"),
                range("2028-01-01", "2028-02-01"),
                range("2028-02-01", "2028-03-01")
            ]
        );
    }

    #[test]
    fn names_are_litellms() {
        assert_eq!(
            name("LiteLLM_SpendLogs", range("2026-06-01", "2026-07-01")),
            "LiteLLM_SpendLogs_p20260601"
        );
    }

    #[test]
    fn borders_are_written_as_the_server_reads_them() {
        assert_eq!(at("2026-06-01").to_string(), "'2026-06-01 00:00:00'");
        assert_eq!(Moment(1).to_string(), "'1970-01-01 00:00:00.000001'");
        let day = |year| NaiveDate::from_ymd_opt(year, 1, 2).unwrap();
        assert_eq!(Moment::midnight(day(10_000)).to_string(), "'10000-01-02 00:00:00'");
        assert_eq!(Moment::midnight(day(0)).to_string(), "'0001-01-02 00:00:00 BC'");
        assert_eq!(Moment::midnight(day(-4712)).to_string(), "'4713-01-02 00:00:00 BC'");
        assert_eq!(
            (Moment::MIN.to_string(), Moment::MAX.to_string()),
            ("MINVALUE".into(), "MAXVALUE".into())
        );
    }

    #[test]
    fn a_change_of_interval_fills_the_gaps_without_overlap() {
        let existing = [
            Range { from: Moment::MIN, to: at("2026-11-18") },
            range("2026-11-18", "2026-11-19"),
            range("2026-11-20", "2026-11-21"),
            range("2026-12-01", "2026-12-02"),
        ];
        // Weeks from Monday, 16 November.
        let wanted = Interval::Week.periods(at("2026-11-18"), 2);
        assert_eq!(
            missing(&wanted, &existing),
            [
                range("2026-11-19", "2026-11-20"),
                range("2026-11-21", "2026-11-23"),
                range("2026-11-23", "2026-11-30"),
                range("2026-11-30", "2026-12-01"),
                range("2026-12-02", "2026-12-07"),
            ]
        );
        assert_eq!(missing(&wanted, &[Range { from: Moment::MIN, to: Moment::MAX }]), []);
        assert_eq!(missing(&wanted, &[]), wanted);
    }

    #[test]
    fn a_time_beyond_the_calendar_has_no_period() {
        assert_eq!(Interval::Day.period(Moment::MAX), None);
        assert_eq!(Interval::Day.periods(Moment::MIN, 3), []);
        let last = NaiveDate::MAX.and_time(chrono::NaiveTime::MIN).and_utc().timestamp_micros();
        assert_eq!(Interval::Month.period(Moment(last)), None);
    }

    #[test]
    fn a_moment_is_rounded_up_on_both_sides_of_1970() {
        let rounded = |micros: i64, unit| Moment(micros).rounded_up(unit).0;
        assert_eq!([1, 1000, 1001].map(|micros| rounded(micros, 1000)), [1000, 1000, 2000]);
        assert_eq!([-1, -999, -1000].map(|micros| rounded(micros, 1000)), [0, 0, -1000]);
        assert_eq!(rounded(123_456, 1), 123_456);
        assert_eq!(Moment::MAX.rounded_up(1000), Moment::MAX);
    }

    fn group(gap: Range, first: &str, last: &str, rows: i64) -> Group {
        Group { gap, first: at(first), last: at(last), rows }
    }

    #[test]
    fn long_names_are_cut_so_that_days_differ() {
        let table = "é".repeat(40);
        let name = name(&table, range("2026-06-01", "2026-07-01"));
        assert!(name.len() <= LONGEST_NAME && name.ends_with("_p20260601"), "{name}");
    }

    #[test]
    fn gaps_are_what_no_partition_covers() {
        assert_eq!(gaps(&[]), [Range::EVERYTHING]);
        assert_eq!(
            gaps(&[range("2026-11-18", "2026-11-19"), range("2026-11-19", "2026-11-20")]),
            [
                Range { from: Moment::MIN, to: at("2026-11-18") },
                Range { from: at("2026-11-20"), to: Moment::MAX }
            ]
        );
    }

    #[test]
    fn default_is_adopted_when_all_but_a_few_rows_fit_one_gap() {
        let all = group(Range::EVERYTHING, "2026-11-01 10:00:00", "2026-11-21 09:00:00", 5001);
        let decide = |groups: &[Group], others| drain(Interval::Day, groups, others, 1000, Moment::MIN);
        assert_eq!(decide(&[all], 0), Drain::Adopt(range("2026-11-01", "2026-11-22")));
        assert_eq!(decide(&[all], 1001), Drain::Move(range("2026-11-01", "2026-11-02")));
        // LiteLLM's own job made the partition of tomorrow.
        let gap = Range { from: Moment::MIN, to: at("2026-11-22") };
        let month = drain(Interval::Month, &[Group { gap, ..all }], 0, 1000, Moment::MIN);
        assert_eq!(month, Drain::Adopt(range("2026-11-01", "2026-11-22")));
        let late =
            group(Range { from: at("2026-12-01"), to: Moment::MAX }, "2026-12-03 00:00:00", "2026-12-09", 7);
        assert_eq!(decide(&[Group { gap, ..all }, late], 0), Drain::Adopt(range("2026-11-01", "2026-11-22")));
        let late = Group { rows: 1001, ..late };
        assert_eq!(decide(&[Group { gap, ..all }, late], 0), Drain::Move(range("2026-12-03", "2026-12-04")));
    }

    #[test]
    fn few_rows_move_unless_they_expire() {
        let few = group(Range::EVERYTHING, "2026-11-01 10:00:00", "2026-11-21 09:00:00", 10);
        let decide = |cutoff: &str| drain(Interval::Day, &[few], 0, 1000, at(cutoff));
        assert_eq!(decide("2026-11-01 23:00:00"), Drain::Move(range("2026-11-01", "2026-11-02")));
        assert_eq!(decide("2026-11-02"), Drain::Nothing);
    }

    #[test]
    fn a_partition_of_half_a_period_is_continued() {
        let half = range("2026-11-20", "2026-11-20 12:00:00");
        let rest = range("2026-11-20 12:00:00", "2026-11-21");
        assert_eq!(continued(Interval::Day, rest, &[half]), Some(half));
        // Not one that holds another period as well, nor one that ends where a period does.
        assert_eq!(continued(Interval::Day, rest, &[range("2026-11-19", "2026-11-20 12:00:00")]), None);
        let next = range("2026-11-21", "2026-11-22");
        assert_eq!(continued(Interval::Day, next, &[range("2026-11-20", "2026-11-21")]), None);
    }
}

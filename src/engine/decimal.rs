//! Sums of numerics, as PostgreSQL's `sum(numeric)` has them, digit for digit and to the same scale, but
//! added as one integer, without a call of the server's for each.

use crate::error::Error;
use crate::server::varlena;
use pgrx::direct_function_call_as_datum;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

/// PostgreSQL keeps a numeric as digits of this base.
const BASE: i128 = 10_000;

/// Of the first two bytes: a sign, or a form that has the sign elsewhere.
const FORM: u16 = 0xC000;
const NEGATIVE: u16 = 0x4000;
const SHORT: u16 = 0x8000;
const SHORT_NEGATIVE: u16 = 0x2000;
const SCALE: u16 = 0x3FFF;

/// A sum so far.
#[derive(Clone, Debug, PartialEq)]
pub enum Decimal {
    /// `value` times 10,000 to the power of `exponent`, shown with `scale` digits after the point.
    Small { value: i128, exponent: i32, scale: u16 },
    /// What does not fit, NaN and the infinities: a numeric, without its length.
    Large(Vec<u8>),
}

impl From<i64> for Decimal {
    fn from(value: i64) -> Decimal {
        Decimal::Small { value: value.into(), exponent: 0, scale: 0 }
    }
}

impl Decimal {
    /// Reads a numeric, which is given without its length.
    pub fn new(numeric: &[u8]) -> Decimal {
        Decimal::small(numeric).unwrap_or_else(|| Decimal::Large(numeric.into()))
    }

    /// What it takes beside itself.
    pub fn memory(&self) -> usize {
        match self {
            Decimal::Small { .. } => 0,
            Decimal::Large(numeric) => numeric.capacity(),
        }
    }

    fn small(numeric: &[u8]) -> Option<Decimal> {
        let word = |i: usize| numeric.get(i..i + 2).map(|w| u16::from_ne_bytes([w[0], w[1]]));
        let head = word(0)?;
        let (negative, scale, weight, digits) = match head & FORM {
            SHORT => {
                // Seven bits with a sign.
                let weight = i32::from(((head & 0x7F) << 9) as i16 >> 9);
                (head & SHORT_NEGATIVE != 0, (head & 0x1F80) >> 7, weight, 2)
            }
            FORM => return None,
            sign => (sign == NEGATIVE, head & SCALE, i32::from(word(2)? as i16), 4),
        };
        let count = (numeric.len() - digits) / 2;
        // 36 decimal digits: a sum of as many as there are rows still fits.
        if count > 8 {
            return None;
        }
        let digit = |i: usize| word(digits + 2 * i).map(i128::from);
        let value = (0..count).try_fold(0, |value, i| Some(value * BASE + digit(i)?))?;
        let exponent = if count == 0 { 0 } else { weight - count as i32 + 1 };
        Some(Decimal::Small { value: if negative { -value } else { value }, exponent, scale })
    }

    pub fn add(&mut self, other: &Decimal) {
        *self = self.sum(other).unwrap_or_else(|| Decimal::new(&added(&self.whole(), &other.whole())));
    }

    fn sum(&self, other: &Decimal) -> Option<Decimal> {
        let (Decimal::Small { value, exponent, scale }, Decimal::Small { value: v, exponent: e, scale: s }) =
            (self, other)
        else {
            return None;
        };
        let least = if *value == 0 {
            *e
        } else if *v == 0 {
            *exponent
        } else {
            *exponent.min(e)
        };
        let at_least = |value: i128, exponent: i32| match value {
            0 => Some(0),
            _ => BASE.checked_pow((exponent - least) as u32)?.checked_mul(value),
        };
        let value = at_least(*value, *exponent)?.checked_add(at_least(*v, *e)?)?;
        Some(Decimal::Small { value, exponent: least, scale: *scale.max(s) })
    }

    pub fn is_zero(&self) -> bool {
        matches!(self, Decimal::Small { value: 0, .. })
    }

    /// As a whole number, if it is one that a bigint holds.
    pub fn integer(&self) -> Option<i64> {
        match self {
            Decimal::Small { value, exponent: 0, .. } => i64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// As a numeric, without its length. `None`: it is larger than one can be.
    pub fn numeric(&self) -> Option<Vec<u8>> {
        let (value, exponent, scale) = match self {
            Decimal::Small { value, exponent, scale } => (*value, *exponent, *scale),
            Decimal::Large(numeric) => return Some(numeric.clone()),
        };
        let (mut rest, mut digits, mut trailing) = (value.unsigned_abs(), vec![], 0);
        while rest > 0 {
            match (rest % BASE as u128) as u16 {
                0 if digits.is_empty() => trailing += 1,
                digit => digits.push(digit),
            }
            rest /= BASE as u128;
        }
        let weight = if digits.is_empty() { 0 } else { exponent + trailing + digits.len() as i32 - 1 };
        let sign = if value < 0 { NEGATIVE } else { 0 };
        let weight = i16::try_from(weight).ok()?;
        let words = [sign | scale, weight as u16].into_iter().chain(digits.into_iter().rev());
        Some(words.flat_map(u16::to_ne_bytes).collect())
    }

    /// The same, or the server's error.
    fn whole(&self) -> Vec<u8> {
        self.numeric().unwrap_or_else(|| {
            ErrorReport::from(Error::NumericOverflows).report(PgLogLevel::ERROR);
            unreachable!("an error does not return")
        })
    }

    /// As a numeric of the server's, in its memory.
    pub fn datum(&self) -> Option<pg_sys::Datum> {
        Some(varlena::datum_of(&self.numeric()?))
    }
}

/// As the server adds them.
fn added(a: &[u8], b: &[u8]) -> Vec<u8> {
    let (a, b) = (varlena::datum_of(a), varlena::datum_of(b));
    // SAFETY: both are numerics, and so is their sum, which is never NULL.
    unsafe {
        let sum = direct_function_call_as_datum(pg_sys::numeric_add, &[Some(a), Some(b)])
            .expect("a sum of numerics is no NULL");
        let content = varlena::content(sum.cast_mut_ptr()).to_vec();
        // Whose memory lives as long as the query: there is one for each row.
        for numeric in [a, b, sum] {
            pg_sys::pfree(numeric.cast_mut_ptr());
        }
        content
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small(value: i128, exponent: i32, scale: u16) -> Decimal {
        Decimal::Small { value, exponent, scale }
    }

    #[test]
    fn a_numeric_is_read_as_it_is_written() {
        for sum in
            [small(0, 0, 3), small(1, 0, 0), small(-12_3456, -1, 4), small(7, -50, 200), small(99, 70, 0)]
        {
            assert_eq!(Decimal::new(&sum.numeric().unwrap()), sum);
        }
        // What ends in zeros is written without them.
        assert_eq!(Decimal::new(&small(12_0000, -2, 6).numeric().unwrap()), small(12, -1, 6));
        assert_eq!(small(1, 1 << 15, 0).numeric(), None, "beyond the last weight");
    }

    #[test]
    fn a_sum_has_the_larger_scale() {
        let sum = Decimal::from(-3).sum(&small(5, -1, 4)).unwrap();
        assert_eq!(sum, small(-29_995, -1, 4));
        assert_eq!(sum.sum(&small(0, 0, 9)), Some(small(-29_995, -1, 9)));
        assert_eq!(sum.sum(&small(1, 9, 0)), None, "not as one integer");
    }
}

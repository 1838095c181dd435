//! Values of a group's dimensions as bytes: equal where the values are equal, and in their order.

use crate::server::varlena::{datum_of, with_content};
use pgrx::prelude::*;

/// How a dimension is written as bytes that are ordered as its values are.
#[derive(Clone, Copy)]
pub enum Bytes {
    Whole(Whole),
    /// In the order of the collation "C".
    Text,
    Uuid,
}

/// A type whose values are whole numbers.
#[derive(Clone, Copy)]
pub enum Whole {
    Boolean,
    Two,
    Four,
    Eight,
}

impl Whole {
    pub fn of(r#type: pg_sys::Oid) -> Option<Whole> {
        match r#type {
            pg_sys::BOOLOID => Some(Whole::Boolean),
            pg_sys::INT2OID => Some(Whole::Two),
            pg_sys::INT4OID | pg_sys::DATEOID => Some(Whole::Four),
            pg_sys::INT8OID | pg_sys::TIMESTAMPOID | pg_sys::TIMESTAMPTZOID => Some(Whole::Eight),
            _ => None,
        }
    }

    pub fn read(self, value: pg_sys::Datum) -> i64 {
        match self {
            Whole::Boolean => i64::from(value.value() as u8 != 0),
            Whole::Two => i64::from(value.value() as i16),
            Whole::Four => i64::from(value.value() as i32),
            Whole::Eight => value.value() as i64,
        }
    }
}

impl Bytes {
    pub fn of(r#type: pg_sys::Oid, collation: pg_sys::Oid) -> Option<Bytes> {
        match r#type {
            pg_sys::TEXTOID | pg_sys::VARCHAROID => {
                // None is of two that are in conflict, as the server will say. SAFETY: looks a collation up.
                let by_bytes = collation != pg_sys::InvalidOid
                    && unsafe { pg_sys::get_collation_isdeterministic(collation) };
                by_bytes.then_some(Bytes::Text)
            }
            pg_sys::UUIDOID => Some(Bytes::Uuid),
            other => Whole::of(other).map(Bytes::Whole),
        }
    }

    /// `None`: there is no memory for a long one.
    pub fn write(self, value: pg_sys::Datum, key: &mut Vec<u8>) -> Option<()> {
        match self {
            Bytes::Whole(whole) => key.extend((whole.read(value) ^ i64::MIN).to_be_bytes()),
            // A text has no byte 0.
            Bytes::Text => with_content(value, |text| {
                key.try_reserve(text.len() + 1).ok()?;
                key.extend(text);
                key.push(0);
                Some(())
            })?,
            // SAFETY: sixteen bytes, wherever they are.
            Bytes::Uuid => key.extend(unsafe { std::slice::from_raw_parts(value.cast_mut_ptr::<u8>(), 16) }),
        }
        Some(())
    }

    /// The value at the beginning of `key`, which goes on behind it.
    pub fn read(self, key: &mut &[u8]) -> pg_sys::Datum {
        let length = match self {
            Bytes::Whole(_) => 8,
            Bytes::Text => key.iter().position(|byte| *byte == 0).unwrap_or(key.len()),
            Bytes::Uuid => 16,
        };
        let (value, rest) = key.split_at(length);
        *key = rest;
        match self {
            Bytes::Whole(_) => {
                let bytes = value.try_into().unwrap_or_default();
                pg_sys::Datum::from(i64::from_be_bytes(bytes) ^ i64::MIN)
            }
            Bytes::Text => {
                *key = &key[1..];
                datum_of(value)
            }
            // SAFETY: as many bytes are made as are written.
            Bytes::Uuid => unsafe {
                let copy = pg_sys::palloc(16).cast::<u8>();
                std::ptr::copy_nonoverlapping(value.as_ptr(), copy, 16);
                copy.into()
            },
        }
    }
}

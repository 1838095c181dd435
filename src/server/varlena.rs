//! Values of varying length: their bytes, and values of bytes.

use pgrx::prelude::*;

/// The bytes of a value of varying length, however it is stored.
pub fn with_content<T>(value: pg_sys::Datum, use_it: impl FnOnce(&[u8]) -> T) -> T {
    // SAFETY: it is such a value, and stays for as long as its row does; a copy is given back.
    unsafe {
        let stored: *mut pg_sys::varlena = value.cast_mut_ptr();
        let plain =
            pgrx::varatt_is_4b_u(stored) || pgrx::varatt_is_1b(stored) && !pgrx::varatt_is_1b_e(stored);
        let found = if plain { stored } else { pg_sys::pg_detoast_datum_packed(stored) };
        let result = use_it(content(found));
        if found != stored {
            pg_sys::pfree(found.cast());
        }
        result
    }
}

/// A value of varying length, in memory of the server's.
pub fn datum_of(content: &[u8]) -> pg_sys::Datum {
    let length = pg_sys::VARHDRSZ + content.len();
    // SAFETY: as many bytes are there as are written.
    unsafe {
        let datum = pg_sys::palloc(length).cast::<pg_sys::varlena>();
        pgrx::set_varsize_4b(datum, length as i32);
        std::ptr::copy_nonoverlapping(
            content.as_ptr(),
            datum.cast::<u8>().add(pg_sys::VARHDRSZ),
            content.len(),
        );
        datum.into()
    }
}

/// The bytes of a value of varying length that is neither compressed nor elsewhere.
///
/// # Safety
/// It is one, and stays for as long as they are used.
pub unsafe fn content<'a>(value: *const pg_sys::varlena) -> &'a [u8] {
    unsafe {
        let start = pgrx::vardata_any(value).cast();
        std::slice::from_raw_parts(start, pgrx::varsize_any_exhdr(value))
    }
}

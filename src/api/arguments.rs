//! Types of arguments that pgrx has not, or not as we need them.

use crate::error::{self, Error};
use crate::partition::calendar::Interval;
use crate::partition::convert;
use crate::server::relation;
use crate::server::session::Elevated;
use crate::server::spi;
use pgrx::AnyElement;
use pgrx::datum::Timestamp;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use pgrx::prelude::*;
use std::ffi::CStr;
use std::time::Duration;

/// An argument of one of the `reg…` types: an Oid with a name. pgrx's own PgRelation opens the relation,
/// which fails without a useful SQLSTATE.
macro_rules! reg_type {
    ($name:ident, $sql:literal) => {
        #[derive(Clone, Copy)]
        pub struct $name(pub pg_sys::Oid);

        // SAFETY: it is an Oid.
        unsafe impl<'fcx> pgrx::callconv::ArgAbi<'fcx> for $name {
            unsafe fn unbox_arg_unchecked(arg: pgrx::callconv::Arg<'_, 'fcx>) -> Self {
                $name(unsafe { arg.unbox_arg_using_from_datum() }.unwrap_or(pg_sys::InvalidOid))
            }
        }

        unsafe impl SqlTranslatable for $name {
            const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!($name);
            const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
            const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal($sql));
            const RETURN_SQL: Result<ReturnsRef, ReturnsError> =
                Ok(ReturnsRef::One(SqlMappingRef::literal($sql)));
        }
    };
}
reg_type!(Regclass, "regclass");
reg_type!(Regrole, "regrole");

/// A time, in whatever type people have one: without a time zone it is in UTC. By overloads a literal would
/// be read in the session's.
pub struct TimeArgument(AnyElement);

// SAFETY: it comes with its type.
unsafe impl<'fcx> pgrx::callconv::ArgAbi<'fcx> for TimeArgument {
    unsafe fn unbox_arg_unchecked(arg: pgrx::callconv::Arg<'_, 'fcx>) -> Self {
        // Of NULL an Option is made without this.
        TimeArgument(unsafe { arg.unbox_arg_using_from_datum() }.expect("a time"))
    }
}

unsafe impl SqlTranslatable for TimeArgument {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(TimeArgument);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("\"any\""));
    const RETURN_SQL: Result<ReturnsRef, ReturnsError> =
        Ok(ReturnsRef::One(SqlMappingRef::literal("\"any\"")));
}

impl TimeArgument {
    /// A time that can be passed for each of them: a cutover lies in the future.
    pub fn example() -> String {
        convert::default_cutover(Interval::Day, AHEAD).to_string()
    }

    /// In UTC. A text must be the same time whatever DateStyle of the session, which is one of these orders.
    pub fn timestamp(self) -> error::Result<Timestamp> {
        use pg_sys::{DATEOID, TEXTOID, TIMESTAMPOID, TIMESTAMPTZOID, UNKNOWNOID, VARCHAROID};
        let known = [DATEOID, TEXTOID, TIMESTAMPOID, TIMESTAMPTZOID, UNKNOWNOID, VARCHAROID];
        if !known.contains(&self.0.oid()) {
            let r#type = relation::type_name(self.0.oid())?;
            return Err(Error::NotATime { r#type, example: TimeArgument::example() });
        }
        // SAFETY: calls the output function of a type of the server's own, with a value of it.
        let text = unsafe {
            let (mut output, mut is_varlena) = (pg_sys::InvalidOid, false);
            pg_sys::getTypeOutputInfo(self.0.oid(), &mut output, &mut is_varlena);
            CStr::from_ptr(pg_sys::OidOutputFunctionCall(output, self.0.datum())).to_string_lossy()
        };
        let read = || {
            let mut times = vec![];
            for style in [c"ISO, MDY", c"ISO, DMY", c"ISO, YMD"] {
                let _settings = Elevated::pinned().with(c"DateStyle", style);
                let sql = "SELECT $1::timestamptz AT TIME ZONE 'UTC'";
                times.extend(spi::query(sql, &[text.as_ref().into()], |r| spi::value::<Timestamp>(r, 1))?);
            }
            times.dedup();
            Ok(times)
        };
        use PgSqlErrorCode::{ERRCODE_DATETIME_FIELD_OVERFLOW, ERRCODE_INVALID_DATETIME_FORMAT};
        let refused = || Error::NotATimeText { given: text.to_string(), example: TimeArgument::example() };
        let times = PgTryBuilder::new(std::panic::AssertUnwindSafe(read))
            .catch_when(ERRCODE_INVALID_DATETIME_FORMAT, |_| Err(refused()))
            .catch_when(ERRCODE_DATETIME_FIELD_OVERFLOW, |_| Err(refused()))
            .execute()?;
        if let [time] = times[..] { Ok(time) } else { Err(refused()) }
    }
}

/// More than a cutover leaves for its index.
const AHEAD: Duration = Duration::from_secs(30 * 86_400);

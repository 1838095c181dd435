//! Tests that run inside a server, as functions of the extension: what no SQL call reaches, which is where
//! nearly all of the unsafe code is. `make test` runs them by pgrx-tests, each in a transaction that is
//! rolled back. Those that need several connections, or a server's crash, are in tests/.

use pgrx::prelude::*;

#[pg_schema]
mod tests {
    use crate::error::{Error, Result};
    use crate::server::expression::{self, Cut, Parsed, Scope, Volatility};
    use crate::server::limit::Limit;
    use crate::server::session::{self, Elevated, Owner, attempt};
    use crate::server::spi;
    use crate::server::text::{float, literal, next_midnight, quoted};
    use pgrx::prelude::*;
    use std::ffi::CString;
    use std::time::Duration;

    fn one<T: FromDatum + IntoDatum>(sql: &str) -> T {
        Spi::get_one::<T>(sql).unwrap().unwrap()
    }

    fn run(sql: &str) {
        Spi::run(sql).unwrap();
    }

    /// Who acts, with which restrictions, on which path, and how long it waits for locks.
    fn acting() -> (pg_sys::Oid, i32, String, String) {
        let (mut user, mut context) = (pg_sys::InvalidOid, 0);
        // SAFETY: reads variables of the session.
        unsafe { pg_sys::GetUserIdAndSecContext(&mut user, &mut context) };
        (
            user,
            context,
            one("SELECT current_setting('search_path')"),
            one("SELECT current_setting('lock_timeout')"),
        )
    }

    /// A table of a role that is no superuser.
    fn table(columns: &str) -> (pg_sys::Oid, Owner) {
        run("CREATE ROLE tenant; GRANT CREATE, USAGE ON SCHEMA public TO tenant; SET ROLE tenant");
        run(&format!("CREATE TABLE public.events ({columns}); RESET ROLE"));
        let relation = one("SELECT 'public.events'::regclass::oid");
        let _pinned = Elevated::pinned();
        (relation, Owner::of(relation).unwrap())
    }

    fn as_tenant_on_public() -> impl Drop {
        struct Back;
        impl Drop for Back {
            fn drop(&mut self) {
                run("RESET ROLE");
            }
        }
        run("SET ROLE tenant");
        Back
    }

    // ---- rights and settings --------------------------------------------------------------------------

    #[pg_test]
    fn rights_and_settings_are_put_back_after_a_success() {
        table("id int");
        run("SET search_path = public, pg_temp; SET lock_timeout = '7s'");
        let _tenant = as_tenant_on_public();
        let before = acting();
        {
            let ourselves = Elevated::enter().unwrap().impatient(Duration::from_millis(20));
            assert_eq!(ourselves.caller(), before.0);
            let (user, context, path, timeout) = acting();
            assert_ne!(user, before.0);
            assert_ne!(context, before.1);
            assert_eq!((path.as_str(), timeout.as_str()), ("pg_catalog, pg_temp", "20ms"));
            assert!(session::acts_as_ourselves());
        }
        assert_eq!(acting(), before);
        assert!(!session::acts_as_ourselves());
    }

    #[pg_test]
    fn rights_and_settings_are_put_back_after_an_error_a_panic_and_a_cancel() {
        table("id int");
        run("SET search_path = public; SET lock_timeout = '7s'");
        let _tenant = as_tenant_on_public();
        let before = acting();
        type Work = fn() -> Result<()>;
        let failures: [(&str, Work); 4] = [
            ("ours", || Err(Error::Null("source"))),
            ("the server's", || Spi::run("SELECT 1 / 0").map_err(Error::from)),
            ("a panic", || panic!("of Rust")),
            ("a cancel", || {
                // SAFETY: as the handler of SIGINT does.
                unsafe {
                    pg_sys::InterruptPending = 1;
                    pg_sys::QueryCancelPending = 1;
                }
                pgrx::check_for_interrupts!();
                Ok(())
            }),
        ];
        for (what, fail) in failures {
            let failure = attempt(|| {
                let _ourselves = Elevated::enter()?.impatient(Duration::from_millis(20));
                fail()
            })
            .expect_err(what);
            assert_eq!(failure.is_cancel(), what == "a cancel", "{what}: {failure:?}");
            assert_eq!(acting(), before, "{what}");
        }
    }

    #[pg_test]
    fn rights_nest_and_each_is_put_back() {
        let (_, owner) = table("id int");
        let before = acting();
        let ourselves = Elevated::enter().unwrap();
        let outside = acting();
        {
            let _owner = owner.act();
            let (user, context, ..) = acting();
            assert_eq!(user, owner.oid());
            assert_ne!(context & pg_sys::SECURITY_RESTRICTED_OPERATION as i32, 0);
            assert!(!session::acts_as_ourselves());
            // What fails deep inside leaves both as they are.
            attempt(|| {
                let _again = Elevated::enter()?;
                assert!(session::acts_as_ourselves());
                Spi::run("SELECT no_such_function()").map_err(Error::from)
            })
            .unwrap_err();
            assert_eq!(acting().0, owner.oid());
        }
        assert_eq!(acting(), outside);
        drop(ourselves);
        assert_eq!(acting(), before);
    }

    #[pg_test]
    fn an_owner_is_restricted() {
        let (_, owner) = table("id int");
        for sql in ["CREATE TEMP TABLE t ()", "SET ROLE NONE", "SET SESSION AUTHORIZATION DEFAULT"] {
            let failure = attempt(|| owner.run(sql)).expect_err(sql);
            let refused = [
                PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
                PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            ];
            assert!(refused.contains(&failure.sqlstate), "{sql}: {failure:?}");
        }
    }

    #[pg_test]
    fn ourselves_read_no_table_of_anybody_elses() {
        let (_, owner) = table("id int");
        run("CREATE VIEW public.seen AS SELECT * FROM public.events");
        let _ourselves = Elevated::enter().unwrap();
        for sql in [
            "SELECT FROM public.events",
            "SELECT FROM pg_catalog.pg_class WHERE oid IN (SELECT id FROM public.events)",
            "WITH e AS (SELECT FROM public.events) SELECT FROM e",
            "INSERT INTO public.events VALUES (1)",
        ] {
            let failure = attempt(|| spi::execute(sql, &[])).expect_err(sql);
            assert!(failure.message.contains("with the rights of litellm_spend's owner"), "{failure:?}");
        }
        owner.run("SELECT FROM public.events").unwrap();
    }

    // ---- statements -------------------------------------------------------------------------------------

    #[pg_test]
    fn one_statement_and_no_more_is_run() {
        let _pinned = Elevated::pinned();
        for sql in ["SELECT 1; SELECT 2", "SELECT 1; COMMIT", ";", "; ;"] {
            let refused = spi::execute(sql, &[]).unwrap_err();
            assert!(matches!(refused, Error::SeveralStatements), "{sql}: {refused:?}");
        }
        assert_eq!(spi::execute("SELECT 1; ", &[]).unwrap(), 1);
        assert_eq!(spi::execute("SELECT ';'", &[]).unwrap(), 1);
        assert_eq!(spi::execute("SELECT $a$;$a$", &[]).unwrap(), 1);
    }

    #[pg_test]
    fn no_statement_is_run_on_a_path_of_somebodys() {
        let (_, owner) = table("id int");
        for path in ["public", "pg_catalog", "public, pg_catalog, pg_temp", ""] {
            run(&format!("SELECT set_config('search_path', '{path}', true)"));
            let sql = "SELECT 1";
            for refused in [
                spi::query(sql, &[], |_| Ok(())).map(drop),
                spi::current(sql, &[], |_| Ok(())).map(drop),
                spi::fresh(sql, &[], |_| Ok(())).map(drop),
                spi::kept(sql, &[], |_| Ok(())).map(drop),
                spi::execute(sql, &[]).map(drop),
                spi::open_cursor(sql, &[]).map(drop),
            ] {
                assert!(matches!(refused, Err(Error::NotPinned)), "{path}: {refused:?}");
            }
            // With an owner's rights it may be one that the owner has chosen.
            let _owner = owner.act_on_path(c"public");
            spi::execute(sql, &[]).unwrap();
        }
    }

    #[pg_test]
    fn a_look_takes_no_xid_and_a_fresh_look_does() {
        let _pinned = Elevated::pinned();
        // Not Spi::get_one(), which takes one.
        let sql = "SELECT pg_current_xact_id_if_assigned() IS NOT NULL";
        let has_xid = || spi::query(sql, &[], |r| spi::value::<bool>(r, 1)).unwrap() == [true];
        spi::query("SELECT FROM pg_class", &[], |_| Ok(())).unwrap();
        spi::current("SELECT FROM pg_class", &[], |_| Ok(())).unwrap();
        attempt(|| spi::query("SELECT 1", &[], |r| spi::value::<i32>(r, 1))).unwrap();
        assert!(!has_xid());
        spi::fresh("SELECT FROM pg_class", &[], |_| Ok(())).unwrap();
        assert!(has_xid());
    }

    #[pg_test]
    fn a_cursor_is_read_in_batches_and_closed_behind_the_last() {
        let _pinned = Elevated::pinned();
        let cursor = spi::open_cursor("SELECT generate_series(1, 5)", &[]).unwrap();
        let next = || spi::fetch(&cursor, 2, |r| spi::value::<i32>(r, 1)).unwrap();
        assert_eq!([next(), next(), next(), next()], [vec![1, 2], vec![3, 4], vec![5], vec![]]);
        assert_eq!(one::<i64>("SELECT count(*) FROM pg_cursors"), 0);
    }

    #[pg_test]
    fn what_fails_is_undone_and_what_was_before_stays() {
        run("CREATE TABLE public.kept (i int); INSERT INTO public.kept VALUES (1)");
        let _pinned = Elevated::pinned();
        attempt(|| {
            spi::execute("INSERT INTO public.kept VALUES (2)", &[])?;
            attempt(|| spi::execute("INSERT INTO public.kept VALUES (3)", &[])).unwrap();
            spi::execute("SELECT 1 / 0", &[])
        })
        .unwrap_err();
        attempt(|| spi::execute("INSERT INTO public.kept VALUES (4)", &[])).unwrap();
        assert_eq!(one::<String>("SELECT string_agg(i::text, ',' ORDER BY i) FROM public.kept"), "1,4");
    }

    // ---- limits of time ---------------------------------------------------------------------------------

    #[pg_test]
    fn what_takes_too_long_ends_by_its_limit_which_is_no_cancel() {
        let _pinned = Elevated::pinned();
        let failure = attempt(|| {
            let _limit = Limit::begin(Duration::from_millis(50), false);
            spi::execute("SELECT pg_sleep(60)", &[])
        })
        .unwrap_err();
        assert!(failure.is_timeout() && !failure.is_cancel(), "{failure:?}");
        // What looks like one is the error of whoever raised it.
        let raised = attempt(|| {
            spi::execute("DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = 'query_canceled'; END $$", &[])
        })
        .unwrap_err();
        assert!(!raised.is_timeout() && !raised.is_cancel(), "{raised:?}");
    }

    #[pg_test]
    fn within_a_limit_another_has_no_time_of_its_own_and_behind_it_nothing_is_cancelled() {
        let _pinned = Elevated::pinned();
        {
            let _step = Limit::begin(Duration::from_secs(60), false);
            let _call = Limit::begin(Duration::from_millis(1), false);
            attempt(|| spi::execute("SELECT pg_sleep(0.05)", &[])).unwrap();
        }
        drop(Limit::begin(Duration::from_millis(20), false));
        attempt(|| spi::execute("SELECT pg_sleep(0.05)", &[])).unwrap();
    }

    #[pg_test]
    fn a_cancel_behind_a_limit_that_is_over_is_a_cancel() {
        let _pinned = Elevated::pinned();
        attempt(|| {
            let _limit = Limit::begin(Duration::from_millis(20), false);
            spi::execute("SELECT pg_sleep(60)", &[])
        })
        .unwrap_err();
        let cancelled =
            attempt(|| spi::execute("SELECT pg_cancel_backend(pg_backend_pid()), pg_sleep(60)", &[]));
        let failure = cancelled.unwrap_err();
        assert!(failure.is_cancel() && !failure.is_timeout(), "{failure:?}");
    }

    // ---- expressions --------------------------------------------------------------------------------------

    fn parsed(text: &str) -> Result<Parsed> {
        let (relation, owner) = match Spi::get_one::<pg_sys::Oid>("SELECT to_regclass('public.events')::oid")
        {
            Ok(Some(relation)) => {
                let _pinned = Elevated::pinned();
                (relation, Owner::of(relation)?)
            }
            _ => table(
                "id int, path text COLLATE \"C\", at timestamptz, local timestamp, day date, \"odd Name\" text",
            ),
        };
        let path = CString::new("public").unwrap();
        let _pinned = Elevated::pinned();
        expression::parse(&Scope { relation, owner, path }, text, "dimension")
    }

    #[pg_test]
    fn an_expression_is_written_so_that_it_means_the_same_on_any_path() {
        run("CREATE FUNCTION public.half(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1 / 2'");
        for (text, written) in [
            ("id", "id"),
            ("ID AS x", "id"),
            ("\"odd Name\" AS x", "\"odd Name\""),
            ("events.path AS x", "path"),
            ("half(id) AS x", "public.half(id)"),
            ("path || 'it''s' AS x", "(path || 'it''s'::text)"),
            ("path || E'a\\\\b' AS x", "(path || 'a\\b'::text)"),
            (
                "CASE WHEN id > 1 THEN 'a' END AS x",
                "CASE\n    WHEN (id > 1) THEN 'a'::text\n    ELSE NULL::text\nEND",
            ),
        ] {
            let found = parsed(text).unwrap().scalar.text;
            let flat = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            assert_eq!(flat(&found), flat(written), "{text}");
        }
    }

    #[pg_test]
    fn how_a_column_of_time_is_cut_is_read_from_the_tree() {
        for (text, expected) in [
            ("at", "fixed"),
            ("local::date AS d", "fixed"),
            ("date(local) AS d", "fixed"),
            ("at::date AS d", "day"),
            ("date_trunc('hour', at) AS h", "unit"),
            ("date_trunc('hour', local) AS h", "fixed"),
            ("date_trunc('day', at, 'Europe/Berlin') AS d", "fixed"),
            ("(at AT TIME ZONE 'UTC')::date AS d", "fixed"),
            ("(at AT TIME ZONE 'Asia/Tokyo')::date AS d", "none"),
            ("date_bin('5 minutes', at, '2026-01-01+00') AS b", "fixed"),
            ("date_trunc(path, at) AS h", "none"),
            ("day + id AS d", "none"),
            ("at + interval '1 h' AS t", "none"),
        ] {
            let found = match parsed(text).unwrap().scalar.cut {
                Some(Cut::Fixed) => "fixed",
                Some(Cut::Day) => "day",
                Some(Cut::Unit(unit)) if unit == "hour" => "unit",
                _ => "none",
            };
            assert_eq!(found, expected, "{text}");
        }
    }

    #[pg_test]
    fn what_changes_by_itself_is_told_apart() {
        run("CREATE FUNCTION public.today() RETURNS date LANGUAGE sql STABLE AS 'SELECT CURRENT_DATE'");
        use Volatility::*;
        for (text, expected) in [
            ("id + 1 AS x", Immutable),
            ("at::text AS x", Stable),
            ("at + interval '1 day' AS x", Stable),
            ("float8(id)::text AS x", Stable),
            ("coalesce(id::text::bytea::varchar, '') AS x", Stable),
            ("point(id, id)::text AS x", Stable),
            ("xmlelement(name x, id)::text AS x", Stable),
            ("encode(id::text::bytea, 'hex') AS x", Immutable),
            ("float8(id)::numeric::text AS x", Immutable),
            ("now() AS x", OfSession),
            ("day > CURRENT_DATE AS x", OfSession),
            ("today() AS x", OfSession),
            ("current_user::text AS x", OfSession),
            ("random() AS x", Volatile),
            ("clock_timestamp() AS x", Volatile),
        ] {
            assert!(parsed(text).unwrap().scalar.volatility == expected, "{text}");
        }
    }

    #[pg_test]
    fn collations_columns_and_types_are_those_of_the_expression() {
        let scalar = |text: &str| parsed(text).unwrap().scalar;
        assert_eq!(scalar("path").collation.as_deref(), Some("\"C\""));
        assert_eq!(scalar("path || id AS x").columns, ["id", "path"]);
        assert_eq!(scalar("id::char(3) AS x").r#type, "bpchar");
        assert_eq!(scalar("id::numeric(9, 2) AS x").r#type, "numeric");
        let aggregate = parsed("sum(id) FILTER (WHERE path > 'a') AS n").unwrap().aggregate.unwrap();
        assert!(aggregate.built_in && aggregate.filter.is_some() && !aggregate.ordered);
        assert_eq!(aggregate.function, "pg_catalog.sum");
    }

    #[pg_test]
    fn reading_an_expression_calls_nobodys_code_with_our_rights() {
        let (relation, owner) = table("id int");
        run("CREATE TABLE public.called_by (who text); GRANT INSERT ON public.called_by TO PUBLIC");
        run("SET ROLE tenant");
        run("CREATE FUNCTION public.spy(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS
             $$ BEGIN RAISE EXCEPTION '%', current_user; END $$");
        run("RESET ROLE");
        let path = CString::new("public").unwrap();
        let _pinned = Elevated::pinned();
        let outcome = expression::parse(&Scope { relation, owner, path }, "spy(1) AS x", "dimension");
        // Folding it calls it: as the table's owner.
        let Err(Error::Expression { reason, .. }) = outcome else { panic!("it was not called") };
        assert_eq!(reason, "Tenant.");
    }

    // ---- texts --------------------------------------------------------------------------------------------

    #[pg_test]
    fn names_and_values_cannot_end_their_quotes_in_either_setting() {
        for settings in ["on", "off"] {
            run(&format!("SET standard_conforming_strings = {settings}"));
            for value in ["it's", "a\\b", "\\'; DROP TABLE x; --", "$a$", "ü\u{1f600}", ""] {
                assert_eq!(one::<String>(&format!("SELECT {}", literal(value))), value, "{settings}");
            }
            for name in ["a\"b", "Ünicode", "a b; --", "a\\b"] {
                let sql = format!(
                    "SELECT key FROM jsonb_each(to_jsonb((SELECT t FROM (SELECT 1 AS {}) t)))",
                    quoted(name)
                );
                assert_eq!(one::<String>(&sql), name, "{settings}");
            }
        }
    }

    #[pg_test]
    fn a_numeric_becomes_a_float_at_every_bound() {
        for (r#type, numbers) in [
            (
                "double precision",
                ["1.7976931348623157e308", "1.8e308", "-1.8e308", "4.9e-324", "1e-400", "Infinity", "NaN"],
            ),
            ("real", ["3.4028235e38", "3.5e38", "-3.5e38", "1.4e-45", "1e-60", "-Infinity", "NaN"]),
        ] {
            for number in numbers {
                let sql = format!("SELECT ({})::text", float(&format!("('{number}'::numeric)"), r#type));
                let expected = match number {
                    "1.8e308" | "3.5e38" => "Infinity",
                    "-1.8e308" | "-3.5e38" => "-Infinity",
                    "4.9e-324" => "5e-324",
                    "1.4e-45" => "1e-45",
                    "1e-400" | "1e-60" => "0",
                    "1.7976931348623157e308" => "1.7976931348623157e+308",
                    "3.4028235e38" => "3.4028235e+38",
                    same => same,
                };
                assert_eq!(one::<String>(&sql), expected, "{number} as {type}");
            }
        }
    }

    #[pg_test]
    fn there_is_a_midnight_after_every_time_but_the_last() {
        for (time, midnight) in [
            ("2026-02-28 23:59:59.999999", "2026-03-01 00:00:00"),
            ("2026-03-01", "2026-03-02 00:00:00"),
            ("-infinity", "4714-11-24 00:00:00 BC"),
            ("4714-11-24 00:00:01 BC", "4714-11-25 00:00:00 BC"),
            ("294276-12-31 12:00", "infinity"),
            ("infinity", "infinity"),
        ] {
            let sql = format!("SELECT ({})::text", next_midnight(&format!("'{time}'::timestamp")));
            assert_eq!(one::<String>(&sql), midnight, "{time}");
        }
    }
}

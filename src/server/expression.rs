//! Reads SQL expressions with the server's own parser, so that what it accepts, what it finds by name and
//! what it says is wrong are what a `SELECT` from the table would be.
//!
//! What comes out is text again, with every name qualified that is not in pg_catalog: it means the same
//! whatever the search_path is when it runs, and it cannot be anything but one expression.
//!
//! Reading an expression can already call what is the relation's owner's: a domain's CHECK while it is
//! parsed, an immutable function when it is planned to see whether it changes by itself. So it is read as
//! that owner, with the names as the caller's search_path finds them. The text is made by the server's
//! deparser, which doubles backslashes or not as `standard_conforming_strings` says: under pinned settings,
//! after everything that could have changed them.

use crate::error::{Error, Result};
use crate::server::parse::{self, is, nodes, text};
use crate::server::session::{Elevated, Owner, attempt};
use crate::server::spi::{current, value};
use pgrx::{FromDatum, pg_guard, pg_sys};
use std::ffi::{CStr, CString, c_void};

/// `expression AS name`, understood.
pub struct Parsed {
    pub name: Option<String>,
    pub scalar: Scalar,
    pub aggregate: Option<Aggregate>,
    /// The function, qualified and quoted, if all of it is a call of an ordinary one.
    pub function: Option<String>,
}

/// An expression of one value.
pub struct Scalar {
    pub text: String,
    pub r#type: String,
    pub type_oid: pg_sys::Oid,
    /// Its collation, if that is not the type's own.
    pub collation: Option<String>,
    /// It has none, where its type has one: that of two columns, which differ.
    pub is_ambiguous: bool,
    /// The columns of the relation that it reads.
    pub columns: Vec<String>,
    /// It is a column and nothing else.
    pub is_column: bool,
    /// How it cuts its only column, one of time, into consecutive pieces, if that is all it does.
    pub cut: Option<Cut>,
    pub volatility: Volatility,
}

pub enum Cut {
    /// No setting has a say in it.
    Fixed,
    /// Into days of the session's TimeZone.
    Day,
    /// Into such units of the session's TimeZone.
    Unit(String),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Volatility {
    Immutable,
    /// It depends on settings, such as TimeZone.
    Stable,
    /// It reads the clock, or asks who the session is: the server calls that stable as well, for the time of
    /// one statement.
    OfSession,
    Volatile,
}

/// A call of an aggregate function that is all of an expression.
pub struct Aggregate {
    /// Qualified, quoted.
    pub function: String,
    pub built_in: bool,
    pub arguments: Vec<Scalar>,
    pub filter: Option<Scalar>,
    /// DISTINCT, ORDER BY or WITHIN GROUP.
    pub ordered: bool,
}

/// What an expression is read over: the columns of a relation, as its owner, and what a search_path makes
/// visible.
pub struct Scope {
    pub relation: pg_sys::Oid,
    pub owner: Owner,
    pub path: CString,
}

/// Reads `text`. `what` is how errors call it.
pub fn parse(scope: &Scope, text: &str, what: &'static str) -> Result<Parsed> {
    let refuse = |reason: String| Error::Expression { what, expression: text.into(), reason };
    let sql = CString::new(format!("SELECT {text}\n")).map_err(|_| refuse("It holds a zero byte.".into()))?;
    // A subtransaction, because the server's errors are thrown.
    match attempt(|| {
        let _owner = scope.owner.act_on_path(&scope.path);
        Ok(unsafe { analyze(scope.relation, &sql, what) }.and_then(Analyzed::describe))
    }) {
        Ok(parsed) => parsed.map_err(refuse),
        Err(failure) => Err(refuse(sentence(&failure.unless_cancel().message))),
    }
}

/// A message of the server's, as a sentence.
pub fn sentence(message: &str) -> String {
    let mut letters = message.chars();
    letters.next().map_or(String::new(), |first| format!("{}{}.", first.to_uppercase(), letters.as_str()))
}

type Reason = String;

struct Analyzed {
    name: Option<String>,
    node: *mut pg_sys::Node,
    context: *mut pg_sys::List,
    relation: pg_sys::Oid,
}

/// Why a measure such as `sum(a) / count(*)` is refused.
pub const COMPUTED: &str = "It computes with aggregates; a measure is one aggregate.";

/// Parses and analyzes one target of a SELECT.
///
/// # Safety
/// Called in a transaction. What it returns lives until the end of the caller's memory context.
unsafe fn analyze(relation: pg_sys::Oid, sql: &CStr, what: &str) -> std::result::Result<Analyzed, Reason> {
    // SAFETY: the server's functions on the trees that they make; each node is read as what its tag says.
    unsafe {
        let target = only_target(&parse::statements(sql)).ok_or("It is not one expression.")?;
        if is_star((*target).val) {
            return Err("It is a star, which stands for several columns.".into());
        }
        let state = pg_sys::make_parsestate(std::ptr::null_mut());
        let lock = pg_sys::AccessShareLock as i32;
        let open = pg_sys::relation_open(relation, lock);
        let item =
            pg_sys::addRangeTableEntryForRelation(state, open, lock, std::ptr::null_mut(), false, true);
        pg_sys::addNSItemToQuery(state, item, true, true, true);
        let kind = pg_sys::ParseExprKind::EXPR_KIND_SELECT_TARGET;
        let mut node = pg_sys::transformExpr(state, (*target).val, kind);
        if pg_sys::exprType(node) == pg_sys::UNKNOWNOID {
            use pg_sys::CoercionContext::COERCION_IMPLICIT;
            use pg_sys::CoercionForm::COERCE_IMPLICIT_CAST;
            let (from, to) = (pg_sys::UNKNOWNOID, pg_sys::TEXTOID);
            node =
                pg_sys::coerce_type(state, node, from, to, -1, COERCION_IMPLICIT, COERCE_IMPLICIT_CAST, -1);
        }
        pg_sys::assign_expr_collations(state, node);
        let aggregates = if what == "measure" { COMPUTED } else { "It holds an aggregate function." };
        let unusable = [
            ((*state).p_hasSubLinks, "It holds a subquery."),
            ((*state).p_hasWindowFuncs, "It holds a window function."),
            ((*state).p_hasTargetSRFs, "It returns a set."),
            ((*state).p_hasAggs && !is(node, pg_sys::NodeTag::T_Aggref), aggregates),
        ];
        let context = pg_sys::deparse_context_for((*(*open).rd_rel).relname.data.as_ptr(), relation);
        pg_sys::relation_close(open, pg_sys::NoLock as i32);
        pg_sys::free_parsestate(state);
        if let Some((_, reason)) = unusable.into_iter().find(|(found, _)| *found) {
            return Err(reason.into());
        }
        let name = (!(*target).name.is_null())
            .then(|| CStr::from_ptr((*target).name).to_string_lossy().into_owned())
            .or_else(|| column_name((*target).val));
        Ok(Analyzed { name, node, context, relation })
    }
}

/// The target of `SELECT target`, if that is all that was parsed.
unsafe fn only_target(statements: &[*mut pg_sys::RawStmt]) -> Option<*mut pg_sys::ResTarget> {
    let [statement] = *statements else { return None };
    // SAFETY: the parser's tree; each node is read as what its tag says.
    let select = unsafe { (*statement).stmt };
    if !unsafe { is(select, pg_sys::NodeTag::T_SelectStmt) } {
        return None;
    }
    let select = unsafe { &*select.cast::<pg_sys::SelectStmt>() };
    let lists = [
        select.distinctClause,
        select.fromClause,
        select.groupClause,
        select.windowClause,
        select.valuesLists,
        select.sortClause,
        select.lockingClause,
    ];
    let nodes_of = [select.whereClause, select.havingClause, select.limitCount, select.limitOffset];
    let bare = lists.iter().all(|l| l.is_null())
        && nodes_of.iter().all(|n| n.is_null())
        && select.intoClause.is_null()
        && select.withClause.is_null()
        && select.op == pg_sys::SetOperation::SETOP_NONE;
    match nodes(select.targetList)[..] {
        [target] if bare => Some(target.cast()),
        _ => None,
    }
}

/// `*` and `x.*`, of which only the parser of a whole SELECT makes something.
unsafe fn is_star(raw: *mut pg_sys::Node) -> bool {
    unsafe {
        is(raw, pg_sys::NodeTag::T_ColumnRef)
            && nodes((*raw.cast::<pg_sys::ColumnRef>()).fields)
                .into_iter()
                .any(|field| is(field, pg_sys::NodeTag::T_A_Star))
    }
}

/// The name of a plain column, which needs no `AS`.
unsafe fn column_name(raw: *mut pg_sys::Node) -> Option<String> {
    unsafe {
        if !is(raw, pg_sys::NodeTag::T_ColumnRef) {
            return None;
        }
        text(nodes((*raw.cast::<pg_sys::ColumnRef>()).fields).pop()?)
    }
}

impl Analyzed {
    fn describe(self) -> std::result::Result<Parsed, Reason> {
        // SAFETY: the node was analyzed in this memory context.
        let aggregate = unsafe { is(self.node, pg_sys::NodeTag::T_Aggref) }
            .then(|| unsafe { self.aggregate(&*self.node.cast::<pg_sys::Aggref>()) })
            .transpose()?;
        // SAFETY: as above.
        let function = unsafe { is(self.node, pg_sys::NodeTag::T_FuncExpr) }
            .then(|| unsafe { (*self.node.cast::<pg_sys::FuncExpr>()).funcid })
            .map(|function| Ok::<_, Reason>(function_name(function)?.0))
            .transpose()?;
        Ok(Parsed { scalar: self.scalar(self.node)?, name: self.name, aggregate, function })
    }

    fn scalar(&self, node: *mut pg_sys::Node) -> std::result::Result<Scalar, Reason> {
        // SAFETY: analyzed trees; expression_planner works on a copy.
        let volatility = unsafe {
            let planned = if is(node, pg_sys::NodeTag::T_Aggref) {
                node
            } else {
                pg_sys::expression_planner(pg_sys::copyObjectImpl(node.cast()).cast()).cast()
            };
            match (pg_sys::contain_mutable_functions(planned), pg_sys::contain_volatile_functions(planned)) {
                (false, _) if any(planned, writes_by_settings) => Volatility::Stable,
                (false, _) => Volatility::Immutable,
                (true, true) => Volatility::Volatile,
                (true, false) if any(planned, asks_session) => Volatility::OfSession,
                (true, false) => Volatility::Stable,
            }
        };
        let mut numbers: *mut pg_sys::Bitmapset = std::ptr::null_mut();
        unsafe { pg_sys::pull_varattnos(node, 1, &mut numbers) };
        let mut columns = vec![];
        let mut next = -1;
        loop {
            next = unsafe { pg_sys::bms_next_member(numbers, next) };
            if next < 0 {
                break;
            }
            let number = next + pg_sys::FirstLowInvalidHeapAttributeNumber;
            if number <= 0 {
                return Err("It reads a system column or a whole row.".into());
            }
            let name = unsafe { pg_sys::get_attname(self.relation, number as i16, false) };
            columns.push(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned());
        }
        // SAFETY: an analyzed node.
        let cut = unsafe { cut(node) };
        // Names are qualified by what is visible, which under a pinned search_path is pg_catalog only.
        // Entered here: a function that was called above may have changed any setting.
        let pinned = Elevated::pinned();
        let (text, type_oid, r#type, collation, is_ambiguous) = unsafe {
            let text = pg_sys::deparse_expression(node, self.context, false, false);
            let type_oid = pg_sys::exprType(node);
            let collation = pg_sys::exprCollation(node);
            let of_type = pg_sys::get_typcollation(type_oid);
            let is_ambiguous = collation == pg_sys::InvalidOid && of_type != pg_sys::InvalidOid;
            let own = collation == of_type || is_ambiguous;
            // With "no modifier" said, char is bpchar, not char(1).
            let r#type = pg_sys::format_type_extended(type_oid, -1, pg_sys::FORMAT_TYPE_TYPEMOD_GIVEN as u16);
            let collation = (!own).then(|| CStr::from_ptr(pg_sys::generate_collation_name(collation)));
            (CStr::from_ptr(text), type_oid, CStr::from_ptr(r#type), collation, is_ambiguous)
        };
        drop(pinned);
        Ok(Scalar {
            text: text.to_string_lossy().into_owned(),
            r#type: r#type.to_string_lossy().into_owned(),
            type_oid,
            collation: collation.map(|name| name.to_string_lossy().into_owned()),
            is_ambiguous,
            columns,
            // SAFETY: an analyzed node.
            is_column: unsafe { is(node, pg_sys::NodeTag::T_Var) },
            cut,
            volatility,
        })
    }

    fn aggregate(&self, call: &pg_sys::Aggref) -> std::result::Result<Aggregate, Reason> {
        let (function, built_in) = function_name(call.aggfnoid)?;
        let arguments = nodes(call.args)
            .into_iter()
            // SAFETY: the arguments of an analyzed aggregate are targets.
            .map(|target| self.scalar(unsafe { (*target.cast::<pg_sys::TargetEntry>()).expr }.cast()))
            .collect::<std::result::Result<_, _>>()?;
        let filter = (!call.aggfilter.is_null()).then(|| self.scalar(call.aggfilter.cast())).transpose()?;
        let ordered = [call.aggdistinct, call.aggorder, call.aggdirectargs].iter().any(|l| !l.is_null());
        Ok(Aggregate { function, built_in, arguments, filter, ordered })
    }
}

/// Functions whose value is that of a session or of a moment.
const OF_SESSION: [u32; 20] = [
    pg_sys::F_NOW,
    pg_sys::F_TRANSACTION_TIMESTAMP,
    pg_sys::F_STATEMENT_TIMESTAMP,
    pg_sys::F_AGE_TIMESTAMP,
    pg_sys::F_AGE_TIMESTAMPTZ,
    pg_sys::F_CURRENT_USER,
    pg_sys::F_SESSION_USER,
    pg_sys::F_GETPGUSERNAME,
    pg_sys::F_CURRENT_DATABASE,
    pg_sys::F_CURRENT_SCHEMA,
    pg_sys::F_CURRENT_SCHEMAS,
    pg_sys::F_CURRENT_SETTING_TEXT,
    pg_sys::F_CURRENT_SETTING_TEXT_BOOL,
    pg_sys::F_PG_BACKEND_PID,
    pg_sys::F_PG_CURRENT_XACT_ID,
    pg_sys::F_TXID_CURRENT,
    pg_sys::F_INET_CLIENT_ADDR,
    pg_sys::F_INET_CLIENT_PORT,
    pg_sys::F_INET_SERVER_ADDR,
    pg_sys::F_PG_POSTMASTER_START_TIME,
];

type Test = unsafe fn(*mut pg_sys::Node) -> bool;

/// Whether the test is true of a node of an analyzed expression.
unsafe fn any(expression: *mut pg_sys::Node, mut test: Test) -> bool {
    unsafe { visit(expression, (&raw mut test).cast()) }
}

/// `true` ends the walk.
#[pg_guard]
unsafe extern "C-unwind" fn visit(node: *mut pg_sys::Node, test: *mut c_void) -> bool {
    // SAFETY: the server's own walk, over nodes of an expression; what it passes on is a test.
    unsafe {
        !node.is_null()
            && ((*test.cast::<Test>())(node) || pg_sys::expression_tree_walker(node, Some(visit), test))
    }
}

/// Whether a node has its value from the session or the moment: CURRENT_DATE, CURRENT_USER and their like.
unsafe fn asks_session(node: *mut pg_sys::Node) -> bool {
    unsafe {
        is(node, pg_sys::NodeTag::T_SQLValueFunction)
            || call(node).is_some_and(|(function, _)| OF_SESSION.contains(&function))
    }
}

/// Types whose texts depend on bytea_output or extra_float_digits, which the server calls immutable all the
/// same.
const WRITTEN_BY_SETTINGS: [pg_sys::Oid; 10] = [
    pg_sys::BYTEAOID,
    pg_sys::FLOAT4OID,
    pg_sys::FLOAT8OID,
    pg_sys::POINTOID,
    pg_sys::LINEOID,
    pg_sys::LSEGOID,
    pg_sys::BOXOID,
    pg_sys::PATHOID,
    pg_sys::POLYGONOID,
    pg_sys::CIRCLEOID,
];

/// Whether the text that a node makes depends on settings although nothing in it is called stable.
unsafe fn writes_by_settings(node: *mut pg_sys::Node) -> bool {
    // SAFETY: each node is read as what its tag says.
    unsafe {
        let of = || pg_sys::exprType((*node.cast::<pg_sys::CoerceViaIO>()).arg.cast());
        // The server does not ask about XmlExpr; xmlbinary and xmloption have a say in it.
        is(node, pg_sys::NodeTag::T_XmlExpr)
            || is(node, pg_sys::NodeTag::T_CoerceViaIO)
                && WRITTEN_BY_SETTINGS.contains(&pg_sys::getBaseType(of()))
    }
}

/// How a node cuts a column of time.
unsafe fn cut(node: *mut pg_sys::Node) -> Option<Cut> {
    use pg_sys::NodeTag::{T_Const, T_Var};
    // SAFETY: analyzed nodes, each read as what its tag says.
    unsafe {
        if is(node, T_Var) {
            return Some(Cut::Fixed);
        }
        let (function, arguments) = call(node)?;
        match (function, &arguments[..]) {
            (pg_sys::F_DATE_TIMESTAMP, [time]) if is(*time, T_Var) || in_utc(*time) => Some(Cut::Fixed),
            (pg_sys::F_DATE_TIMESTAMPTZ, [time]) if is(*time, T_Var) => Some(Cut::Day),
            (pg_sys::F_DATE_TRUNC_TEXT_TIMESTAMP, [unit, time]) if is(*time, T_Var) => {
                word(*unit).map(|_| Cut::Fixed)
            }
            (pg_sys::F_DATE_TRUNC_TEXT_TIMESTAMPTZ, [unit, time]) if is(*time, T_Var) => {
                word(*unit).map(Cut::Unit)
            }
            (pg_sys::F_DATE_TRUNC_TEXT_TIMESTAMPTZ_TEXT, [unit, time, zone]) if is(*time, T_Var) => {
                word(*unit).and(constant_text(*zone)).map(|_| Cut::Fixed)
            }
            (
                pg_sys::F_DATE_BIN_INTERVAL_TIMESTAMP_TIMESTAMP
                | pg_sys::F_DATE_BIN_INTERVAL_TIMESTAMPTZ_TIMESTAMPTZ,
                [width, time, origin],
            ) if is(*time, T_Var) && is(*width, T_Const) && is(*origin, T_Const) => Some(Cut::Fixed),
            _ => None,
        }
    }
}

/// `column AT TIME ZONE 'UTC'`.
unsafe fn in_utc(node: *mut pg_sys::Node) -> bool {
    unsafe {
        match call(node) {
            Some((pg_sys::F_TIMEZONE_TEXT_TIMESTAMPTZ, arguments)) => match arguments[..] {
                [zone, time] => {
                    constant_text(zone).as_deref() == Some("UTC") && is(time, pg_sys::NodeTag::T_Var)
                }
                _ => false,
            },
            _ => false,
        }
    }
}

/// The function that a node calls, and its arguments.
unsafe fn call(node: *mut pg_sys::Node) -> Option<(u32, Vec<*mut pg_sys::Node>)> {
    if !unsafe { is(node, pg_sys::NodeTag::T_FuncExpr) } {
        return None;
    }
    let call = unsafe { &*node.cast::<pg_sys::FuncExpr>() };
    Some((call.funcid.to_u32(), nodes(call.args)))
}

unsafe fn constant(node: *mut pg_sys::Node, r#type: pg_sys::Oid) -> Option<pg_sys::Datum> {
    if !unsafe { is(node, pg_sys::NodeTag::T_Const) } {
        return None;
    }
    let constant = unsafe { &*node.cast::<pg_sys::Const>() };
    (constant.consttype == r#type && !constant.constisnull).then_some(constant.constvalue)
}

unsafe fn constant_text(node: *mut pg_sys::Node) -> Option<String> {
    unsafe { String::from_datum(constant(node, pg_sys::TEXTOID)?, false) }
}

/// A constant text of letters, as the names of units are.
unsafe fn word(node: *mut pg_sys::Node) -> Option<String> {
    unsafe { constant_text(node) }.filter(|text| text.chars().all(char::is_alphabetic))
}

/// The sequence that a column's default draws from: it is `nextval()` of a constant, converted to the
/// column's type if need be. `stored` is the default as pg_attrdef keeps it.
pub fn drawn_from(stored: &str) -> Option<pg_sys::Oid> {
    use pg_sys::CoercionForm::COERCE_IMPLICIT_CAST;
    let text = CString::new(stored).ok()?;
    // SAFETY: a tree that the server has written; each node is read as what its tag says.
    unsafe {
        let mut node = pg_sys::stringToNode(text.as_ptr()).cast::<pg_sys::Node>();
        loop {
            if is(node, pg_sys::NodeTag::T_CoerceToDomain) {
                node = (*node.cast::<pg_sys::CoerceToDomain>()).arg.cast();
                continue;
            }
            let (function, arguments) = call(node)?;
            if function == pg_sys::F_NEXTVAL {
                return pg_sys::Oid::from_datum(constant(*arguments.first()?, pg_sys::REGCLASSOID)?, false);
            }
            if (*node.cast::<pg_sys::FuncExpr>()).funcformat != COERCE_IMPLICIT_CAST {
                return None;
            }
            node = *arguments.first()?;
        }
    }
}

/// A function's name, qualified and quoted, and whether it is the server's own.
fn function_name(function: pg_sys::Oid) -> std::result::Result<(String, bool), Reason> {
    let _settings = Elevated::pinned();
    let names = current(
        "SELECT pg_catalog.format('%I.%I', n.nspname, p.proname), n.nspname = 'pg_catalog'
         FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace WHERE p.oid = $1",
        &[function.into()],
        |r| Ok((value::<String>(r, 1)?, value::<bool>(r, 2)?)),
    );
    Ok(names.ok().and_then(|mut names| names.pop()).ok_or("Its function does not exist.")?)
}

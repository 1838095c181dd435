//! Texts and trees of SQL, as the server's grammar has them.

use pgrx::prelude::*;
use std::ffi::CStr;

/// What is in a list of nodes; a null one is empty.
pub fn nodes(list: *mut pg_sys::List) -> Vec<*mut pg_sys::Node> {
    // SAFETY: a list of nodes, or null.
    let Some(list) = (unsafe { list.as_ref() }) else { return vec![] };
    let cells = unsafe { std::slice::from_raw_parts(list.elements, list.length as usize) };
    cells.iter().map(|cell| unsafe { cell.ptr_value }.cast()).collect()
}

/// The statements of a text. The grammar looks no name up.
pub fn statements(text: &CStr) -> Vec<*mut pg_sys::RawStmt> {
    // SAFETY: the parser reads the text; what it returns are RawStmts.
    let parsed = unsafe { pg_sys::raw_parser(text.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT) };
    nodes(parsed).into_iter().map(|statement| statement.cast()).collect()
}

/// Runs a statement that is no query, as the current user.
///
/// # Safety
/// It is of `text`, as the grammar or who changed it since may make it.
pub unsafe fn run_utility(
    statement: *mut pg_sys::Node,
    text: &CStr,
    context: pg_sys::ProcessUtilityContext::Type,
) {
    // SAFETY: as the server wraps a statement of its own.
    unsafe {
        let mut planned = PgBox::<pg_sys::PlannedStmt>::alloc_node(pg_sys::NodeTag::T_PlannedStmt);
        planned.commandType = pg_sys::CmdType::CMD_UTILITY;
        planned.canSetTag = true;
        planned.utilityStmt = statement;
        planned.stmt_location = -1;
        pg_sys::ProcessUtility(
            planned.into_pg(),
            text.as_ptr(),
            false,
            context,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            pg_sys::None_Receiver,
            std::ptr::null_mut(),
        );
    }
}

/// # Safety
/// A node, or null.
pub unsafe fn is(node: *const pg_sys::Node, tag: pg_sys::NodeTag) -> bool {
    !node.is_null() && unsafe { (*node).type_ } == tag
}

/// What a node of a name says.
pub unsafe fn text(node: *mut pg_sys::Node) -> Option<String> {
    unsafe {
        if !is(node, pg_sys::NodeTag::T_String) {
            return None;
        }
        #[cfg(feature = "pg14")]
        let text = (*node.cast::<pg_sys::Value>()).val.str_;
        #[cfg(not(feature = "pg14"))]
        let text = (*node.cast::<pg_sys::String>()).sval;
        Some(CStr::from_ptr(text).to_string_lossy().into_owned())
    }
}

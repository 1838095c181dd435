//! Every failure that a user can meet, with its SQLSTATE, the facts (DETAIL) and an action (HINT).

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use thiserror::Error as ThisError;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, ThisError)]
pub enum Error {
    #[error("relation {0} does not exist")]
    NoTable(String),
    #[error("\"{relation}\" is {kind}")]
    NotATable { relation: String, kind: &'static str },
    #[error("relation \"{relation}\" has no column \"{column}\"")]
    NoColumn { relation: String, column: String },
    #[error("column \"{column}\" of relation \"{relation}\" has type {found}")]
    ColumnType { relation: String, column: String, found: String, expected: String },
    #[error("must be owner of relation \"{0}\"")]
    NotOwner(String),
    #[error("cannot change rollups during recovery")]
    Standby,
    #[error("cannot change rollups in a read-only transaction")]
    ReadOnly,
    #[error("cannot run in a transaction of isolation level {0}")]
    Isolation(&'static str),
    #[error("database encoding {0} is not supported")]
    Encoding(String),
    #[error("litellm_spend is attached to another table, {0}")]
    AttachedElsewhere(String),
    #[error("litellm_spend is not attached to {0}")]
    NotAttached(String),
    #[error("on_delete must be \"keep\" or \"subtract\", not \"{0}\"")]
    Policy(String),
    #[error("{0} must not be NULL")]
    Null(&'static str),
    #[error("rollup \"{0}\" does not exist")]
    NoRollup(String),
    #[error("rollup \"{0}\" is locked by another transaction")]
    RollupBusy(String),
    #[error("another transaction is attaching or detaching")]
    AttachmentBusy,
    #[error("range of rollup \"{rollup}\" starts before {frozen_before}")]
    Frozen { rollup: String, frozen_before: String },
    #[error("range of rollup \"{0}\" is empty or does not start at midnight")]
    Range(String),
    #[error("rollup \"{rollup}\" knows of more rows on {day} than there are")]
    RawRowsLost { rollup: String, day: String },
    #[error("raw rows of \"{0}\" vanished during the rebuild")]
    RawVanished(String),
    #[error("sequence {sequence} was set back")]
    SequenceSetBack { sequence: String, last_value: i64, watermark: i64 },
    #[error("sequence {sequence} cannot number the rows of a source")]
    SequenceShape { sequence: String, reason: String },
    #[error("could not get a lock on {relation} within {waited_ms} ms")]
    LockNotAvailable { relation: String, waited_ms: u128, holders: String },
    #[error("unexpected answer from the server: {0}")]
    Spi(#[from] pgrx::spi::Error),
    #[error("stored state of litellm_spend cannot be read: {0}")]
    State(#[from] serde_json::Error),
}

impl Error {
    pub fn sqlstate(&self) -> PgSqlErrorCode {
        use PgSqlErrorCode::*;
        match self {
            Error::NoTable(_) => ERRCODE_UNDEFINED_TABLE,
            Error::NotATable { .. } => ERRCODE_WRONG_OBJECT_TYPE,
            Error::NoColumn { .. } => ERRCODE_UNDEFINED_COLUMN,
            Error::ColumnType { .. } => ERRCODE_DATATYPE_MISMATCH,
            Error::NotOwner(_) => ERRCODE_INSUFFICIENT_PRIVILEGE,
            Error::Standby | Error::ReadOnly => ERRCODE_READ_ONLY_SQL_TRANSACTION,
            Error::Isolation(_) => ERRCODE_INVALID_TRANSACTION_STATE,
            Error::Encoding(_) => ERRCODE_FEATURE_NOT_SUPPORTED,
            Error::AttachedElsewhere(_) | Error::NotAttached(_) => ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            Error::Policy(_) | Error::Range(_) => ERRCODE_INVALID_PARAMETER_VALUE,
            Error::NoRollup(_) => ERRCODE_UNDEFINED_OBJECT,
            Error::Null(_) => ERRCODE_NULL_VALUE_NOT_ALLOWED,
            Error::RollupBusy(_) | Error::AttachmentBusy | Error::LockNotAvailable { .. } => {
                ERRCODE_LOCK_NOT_AVAILABLE
            }
            Error::Frozen { .. }
            | Error::RawRowsLost { .. }
            | Error::SequenceSetBack { .. }
            | Error::SequenceShape { .. } => ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            Error::RawVanished(_) => ERRCODE_T_R_SERIALIZATION_FAILURE,
            Error::Spi(_) | Error::State(_) => ERRCODE_INTERNAL_ERROR,
        }
    }

    fn detail(&self) -> Option<String> {
        Some(match self {
            Error::NoTable(_) => "The search_path holds no table of that name.".into(),
            Error::NotATable { .. } => {
                "Only ordinary and partitioned, permanent tables can be captured.".into()
            }
            Error::NoColumn { .. } => "litellm_spend expects the columns of LiteLLM's spend log.".into(),
            Error::ColumnType { expected, .. } => format!("litellm_spend expects {expected}."),
            Error::NotOwner(_) => "Triggers and views of the table are changed on behalf of its owner.".into(),
            Error::Standby => "This server is a standby: it replays what its primary does.".into(),
            Error::ReadOnly => "transaction_read_only is on.".into(),
            Error::Isolation(_) => "Its snapshot may be older than the rollup's lock, so that rows could be missed or counted twice.".into(),
            Error::Encoding(_) => "Rust strings are UTF-8.".into(),
            Error::AttachedElsewhere(_) => "A database has one change log, fed by one table.".into(),
            Error::NotAttached(_) => "Nothing is captured there.".into(),
            Error::Policy(_) => "keep: rows that retention deletes stay in the totals. subtract: they leave them.".into(),
            Error::NoRollup(_) => "Rollups are made by spend_attach().".into(),
            Error::Null(_) => "NULL names nothing.".into(),
            Error::RollupBusy(_) => "A merge or a rebuild holds it; one at a time works on a rollup.".into(),
            Error::AttachmentBusy => "It holds the right to change triggers and views, until it ends.".into(),
            Error::Frozen { frozen_before, .. } => format!(
                "Raw rows before {frozen_before} are gone; the rollup is their only record and is not recomputed."
            ),
            Error::RawRowsLost { .. } => {
                "Rows vanished other than by a captured DELETE; the rollup is their only record.".into()
            }
            Error::Range(_) => "A rollup is rebuilt in whole days, range_start inclusive, range_end exclusive.".into(),
            Error::RawVanished(_) => "Rows were truncated or a partition was dropped since the rebuild began. Nothing was changed.".into(),
            Error::SequenceSetBack { last_value, watermark, .. } => format!(
                "Its last value is {last_value}, but values up to {watermark} have been merged. The rollup is stopped; nothing is lost."
            ),
            Error::SequenceShape { reason, .. } => reason.clone(),
            Error::LockNotAvailable { holders, .. } => holders.clone(),
            Error::Spi(_) | Error::State(_) => return None,
        })
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Error::NoTable(_) => {
                "Pass the table, as in spend_attach('myschema.\"LiteLLM_SpendLogs\"'), or set search_path."
                    .into()
            }
            Error::NotATable { .. } => "Pass the table that LiteLLM writes, \"LiteLLM_SpendLogs\".".into(),
            Error::NoColumn { .. } | Error::ColumnType { .. } => {
                "Check that this is LiteLLM's table and that its migrations have run.".into()
            }
            Error::NotOwner(_) => {
                "Call it as the table's owner, as a member of that role, or as a superuser.".into()
            }
            Error::Standby => {
                "Run it on the primary; monthly_global_spend() and the views answer here.".into()
            }
            Error::ReadOnly => "Run SET TRANSACTION READ WRITE first.".into(),
            Error::Isolation(_) => "Use READ COMMITTED.".into(),
            Error::Encoding(_) => {
                "Use a database with ENCODING 'UTF8', which LiteLLM's own client needs as well.".into()
            }
            Error::AttachedElsewhere(table) => {
                format!("Call spend_detach('{}') first.", table.replace('\'', "''"))
            }
            Error::NotAttached(_) => "Call spend_attach() first.".into(),
            Error::Policy(_) => "Leave it out for keep.".into(),
            Error::Null(what) => format!("Pass a {what}."),
            Error::NoRollup(_) => "SELECT rollup FROM spend_rollup_status lists them.".into(),
            Error::RollupBusy(_) | Error::AttachmentBusy => "Try again.".into(),
            Error::Frozen { frozen_before, .. } => format!("Start the range at '{frozen_before}' or later."),
            Error::RawRowsLost { .. } => "Pass force := true to count only what is there.".into(),
            Error::Range(_) => "Pass midnights, as in '2026-11-01'.".into(),
            Error::RawVanished(_) => "Try again: the range may be frozen by then.".into(),
            Error::SequenceSetBack { sequence, watermark, .. } => {
                format!("SELECT setval('{}', {watermark}) lets it go on.", sequence.replace('\'', "''"))
            }
            Error::SequenceShape { sequence, .. } => {
                format!("ALTER SEQUENCE {sequence} INCREMENT BY 1 CACHE 1 NO CYCLE.")
            }
            Error::LockNotAvailable { .. } => {
                "Try again when those transactions have ended, or raise litellm_spend.lock_timeout.".into()
            }
            Error::Spi(_) | Error::State(_) => "Please report this as a bug.".into(),
        })
    }
}

impl From<Error> for ErrorReport {
    fn from(error: Error) -> Self {
        let mut report = ErrorReport::new(error.sqlstate(), error.to_string(), "litellm_spend");
        if let Some(detail) = error.detail() {
            report = report.set_detail(detail);
        }
        if let Some(hint) = error.hint() {
            report = report.set_hint(hint);
        }
        report
    }
}

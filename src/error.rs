//! Every failure that a user can meet, with its SQLSTATE, the facts (DETAIL) and an action (HINT).

use crate::guc::LockLimit;
use crate::server::expression::COMPUTED;
use crate::server::session::Failure;
use crate::server::text::{SCHEMA, literal, qualified, quoted};
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
    #[error("relation \"{relation}\" has no column \"{column}\" to bucket time by")]
    NoTimeColumn { relation: String, column: String },
    #[error("column \"{column}\" of relation \"{relation}\" has type {found}")]
    ColumnType { relation: String, column: String, found: String, expected: String },
    #[error("{0} is distributed by Citus")]
    Distributed(String),
    #[error("must be owner of relation \"{0}\"")]
    NotOwner(String),
    #[error("must be owner of extension \"litellm_spend\"")]
    NotExtensionOwner,
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
    #[error("litellm_spend is not attached to {to}")]
    NotAttached { to: String, remedy: String },
    #[error("litellm_spend cannot be dropped with CASCADE while it is attached to {0}")]
    StillAttached(String),
    #[error("several tables are called \"LiteLLM_SpendLogs\"")]
    Ambiguous(Vec<String>),
    #[error("{given} is not a sequence")]
    NotASequence { given: String, value: Option<u32> },
    #[error("on_delete must be \"keep\" or \"subtract\", not \"{0}\"")]
    Policy(String),
    #[error("{0} must not be NULL")]
    Null(&'static str),
    #[error("{0} must not be empty")]
    Empty(&'static str),
    #[error("a rollup cannot have {given} dimensions")]
    TooManyDimensions { given: usize, most: usize },
    #[error("rollup \"{0}\" does not exist")]
    NoRollup(String),
    #[error("there are no rollups")]
    NoRollups,
    #[error("must be owner of rollup \"{0}\"")]
    NotRollupOwner(String),
    #[error("rollup \"{0}\" is filled by its owner's own SQL")]
    ByHand(String),
    #[error("rollup \"{0}\" is not filled by hand")]
    NotByHand(String),
    #[error("rollup \"{0}\" is built in")]
    BuiltIn(String),
    #[error("source of rollup \"{0}\" was dropped")]
    SourceDropped(String),
    #[error("\"{0}\" already exists")]
    Exists(String),
    #[error("rollup \"{0}\" already exists")]
    RollupExists(String),
    #[error("\"{0}\" is a name of litellm_spend's own")]
    Reserved(String),
    #[error("\"{name}\" cannot be the name of a rollup")]
    Name { name: String, longest: usize },
    #[error("{what} \"{expression}\" cannot be used")]
    Expression { what: &'static str, expression: String, reason: String },
    #[error("column \"{0}\" is specified more than once")]
    DuplicateColumn(String),
    #[error("no dimension buckets column \"{0}\"")]
    NoBucket(String),
    #[error("rows of \"{relation}\" are not numbered by {}", .sequence.as_ref().map_or("one sequence".into(), |s| format!("sequence {s}")))]
    NotNumbered { relation: String, sequence: Option<String>, columns: usize },
    #[error("rows written to {relation} are not numbered by sequence {sequence}")]
    NumberedElsewhere { relation: String, column: String, found: String, sequence: String },
    #[error("rollup \"{0}\" is locked by another transaction")]
    RollupBusy(String),
    #[error("this database came out of a dump, and its restore may not be over")]
    Restoring,
    #[error("another transaction is attaching or detaching")]
    AttachmentBusy,
    #[error("the change log is not merged to its end: {left} values are left")]
    LogNotMerged { left: i64 },
    #[error("range of rollup \"{rollup}\" has frozen days")]
    Frozen { rollup: String, days: String },
    #[error("range of rollup \"{rollup}\" is empty or does not begin and end where buckets do")]
    Range { rollup: String, bucketed: bool },
    #[error("rollup \"{rollup}\" knows of more rows at {bucket} than there are")]
    RawRowsLost { rollup: String, bucket: String },
    #[error("raw rows of \"{0}\" vanished during the rebuild")]
    RawVanished(String),
    #[error("sequence {sequence} was set back")]
    SequenceSetBack { sequence: String, last_value: i64, watermark: i64, by_hand: bool },
    #[error("rows up to {merged_to} cannot have been merged")]
    NotMergedYet { merged_to: i64, last: i64 },
    #[error("sequence {sequence} cannot number the rows of a source")]
    SequenceShape { sequence: String, reason: String },
    #[error("{0} is partitioned already")]
    AlreadyPartitioned(String),
    #[error("{relation} cannot be partitioned as it is")]
    CannotConvert { relation: String, reason: String },
    #[error("a value of type {0} is no time")]
    NotATime(String),
    #[error("cutover is beyond the calendar")]
    CutoverBeyond,
    #[error("cutover {cutover} is over")]
    CutoverPast { cutover: String },
    #[error("{relation} has rows from the cutover on")]
    RowsBeyondCutover { relation: String, rows: i64, last: String, cutover: String },
    #[error("\"{relation}\" is not partitioned by ranges of one time column")]
    NotByTime { relation: String, reason: String },
    #[error("relation \"{relation}\" has no column \"{column}\" to partition by")]
    NoPartitionColumn { relation: String, column: String },
    #[error("\"interval\" must be \"day\", \"week\" or \"month\", not \"{0}\"")]
    Interval(String),
    #[error("precreate must be from 0 to {most}, not {given}")]
    Precreate { given: i32, most: i32 },
    #[error("on_expire must be \"drop\" or \"detach\", not \"{0}\"")]
    OnExpire(String),
    #[error("retention \"{given}\" is shorter than one {interval}, or longer than 1000 years")]
    Retention { given: String, interval: String, seconds: Option<i64> },
    #[error("{0} has no partition policy")]
    NoPolicy(String),
    #[error("\"{0}\" is being converted")]
    Converting(String),
    #[error("{0} is being converted by another session")]
    ConversionBusy(String),
    #[error("partition \"{0}\" is not an ordinary table")]
    NotOrdinary(String),
    #[error("{table} cannot be captured while {foreign}, which is a foreign table, belongs to it")]
    ForeignPartition { table: String, foreign: String },
    #[error("{table} cannot be captured while it is a partition of, or inherits from, {parent}")]
    HasParent { table: String, parent: String },
    #[error("{relation} has no index on column \"{column}\"")]
    NoTimeIndex { relation: String, column: String },
    #[error("somebody changed \"{0}\" at the same time")]
    CameBetween(String),
    #[error("\"{relation}\" is referenced by {by}")]
    Referenced { relation: String, by: String },
    #[error("partition \"{partition}\" is not rolled up: rollup \"{rollup}\" has merged up to {watermark}")]
    NotMerged { partition: String, rollup: String, watermark: i64 },
    #[error("partition \"{partition}\" is not rolled up: rollup \"{rollup}\" is not backfilled")]
    NotCovered { partition: String, rollup: String },
    #[error("partition \"{0}\" is not rolled up: capture has something to repair")]
    NotRepaired(String),
    #[error("could not get a lock on {relation} within {} ms", .limit.time.as_millis())]
    LockNotAvailable { relation: String, limit: LockLimit, holders: String },
    #[error("{relation} belongs to role \"{owner}\"")]
    OtherOwner { relation: String, owner: String, expected: String },
    #[error("role \"{owner}\" may not read sequence {sequence}")]
    SequenceOfAnother { sequence: String, owner: String },
    #[error("role {0} does not exist")]
    NoRole(u32),
    #[error("relation {0} would be read with the rights of litellm_spend's owner")]
    NotOurs(u32),
    #[error("{}", .0.message)]
    Needed(Failure),
    #[error("{}", .0.message)]
    Failed(Failure),
    #[error("not a single statement")]
    SeveralStatements,
    #[error("unexpected answer from the server: {0}")]
    Spi(#[from] pgrx::spi::Error),
    #[error("stored state of litellm_spend cannot be read: {0}")]
    State(#[from] serde_json::Error),
}

impl Error {
    pub fn sqlstate(&self) -> PgSqlErrorCode {
        use PgSqlErrorCode::*;
        match self {
            Error::NoTable(_) | Error::Ambiguous(_) => ERRCODE_UNDEFINED_TABLE,
            Error::StillAttached(_) => ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST,
            Error::NotATable { .. } | Error::NotASequence { .. } => ERRCODE_WRONG_OBJECT_TYPE,
            Error::NoColumn { .. } | Error::NoTimeColumn { .. } | Error::NoPartitionColumn { .. } => {
                ERRCODE_UNDEFINED_COLUMN
            }
            Error::NotByTime { .. } | Error::NotOrdinary(_) => ERRCODE_WRONG_OBJECT_TYPE,
            Error::Interval(_) | Error::Precreate { .. } | Error::OnExpire(_) | Error::Retention { .. } => {
                ERRCODE_INVALID_PARAMETER_VALUE
            }
            Error::NoPolicy(_) => ERRCODE_UNDEFINED_OBJECT,
            Error::Converting(_) | Error::ConversionBusy(_) | Error::CameBetween(_) => ERRCODE_OBJECT_IN_USE,
            Error::NoTimeIndex { .. }
            | Error::Referenced { .. }
            | Error::NotMerged { .. }
            | Error::NotCovered { .. }
            | Error::NotRepaired(_) => ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            Error::ColumnType { .. } | Error::NotATime(_) => ERRCODE_DATATYPE_MISMATCH,
            Error::NotOwner(_) | Error::NotExtensionOwner => ERRCODE_INSUFFICIENT_PRIVILEGE,
            Error::Standby | Error::ReadOnly => ERRCODE_READ_ONLY_SQL_TRANSACTION,
            Error::Isolation(_) => ERRCODE_INVALID_TRANSACTION_STATE,
            Error::Encoding(_)
            | Error::ForeignPartition { .. }
            | Error::HasParent { .. }
            | Error::Distributed(_) => ERRCODE_FEATURE_NOT_SUPPORTED,
            Error::AttachedElsewhere(_) | Error::NotAttached { .. } => {
                ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE
            }
            Error::NotMergedYet { .. } | Error::Policy(_) | Error::Range { .. } | Error::NoBucket(_) => {
                ERRCODE_INVALID_PARAMETER_VALUE
            }
            Error::Name { .. } => ERRCODE_INVALID_NAME,
            Error::NoRollup(_) => ERRCODE_UNDEFINED_OBJECT,
            Error::NotRollupOwner(_) => ERRCODE_INSUFFICIENT_PRIVILEGE,
            Error::Exists(_) | Error::RollupExists(_) | Error::Reserved(_) => ERRCODE_DUPLICATE_OBJECT,
            Error::DuplicateColumn(_) => ERRCODE_DUPLICATE_COLUMN,
            Error::Expression { .. } => ERRCODE_INVALID_COLUMN_DEFINITION,
            Error::Restoring
            | Error::NoRollups
            | Error::ByHand(_)
            | Error::NotByHand(_)
            | Error::BuiltIn(_)
            | Error::SourceDropped(_)
            | Error::NotNumbered { .. }
            | Error::NumberedElsewhere { .. } => ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            Error::Null(_) => ERRCODE_NULL_VALUE_NOT_ALLOWED,
            Error::Empty(_) => ERRCODE_INVALID_PARAMETER_VALUE,
            Error::TooManyDimensions { .. } => ERRCODE_TOO_MANY_COLUMNS,
            Error::RollupBusy(_)
            | Error::AttachmentBusy
            | Error::LogNotMerged { .. }
            | Error::LockNotAvailable { .. } => ERRCODE_LOCK_NOT_AVAILABLE,
            Error::Frozen { .. }
            | Error::RawRowsLost { .. }
            | Error::SequenceSetBack { .. }
            | Error::SequenceShape { .. } => ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            Error::AlreadyPartitioned(_) | Error::CannotConvert { .. } | Error::RowsBeyondCutover { .. } => {
                ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE
            }
            Error::CutoverPast { .. } | Error::CutoverBeyond => ERRCODE_INVALID_PARAMETER_VALUE,
            Error::RawVanished(_) => ERRCODE_T_R_SERIALIZATION_FAILURE,
            Error::OtherOwner { .. } | Error::SequenceOfAnother { .. } => ERRCODE_INSUFFICIENT_PRIVILEGE,
            Error::NoRole(_) => ERRCODE_UNDEFINED_OBJECT,
            Error::Needed(failure) | Error::Failed(failure) => failure.sqlstate,
            Error::SeveralStatements => ERRCODE_SYNTAX_ERROR,
            Error::NotOurs(_) | Error::Spi(_) | Error::State(_) => ERRCODE_INTERNAL_ERROR,
        }
    }

    /// For plans that list what is in the way.
    pub fn reason(&self) -> String {
        self.detail().unwrap_or_else(|| self.to_string())
    }

    pub fn detail(&self) -> Option<String> {
        Some(match self {
            Error::NoTable(_) => "No schema of this database holds a table of that name.".into(),
            Error::StillAttached(_) => "LiteLLM's own views would be dropped with it, and the only record of deleted rows.".into(),
            Error::Ambiguous(_) => "None of them is attached, and search_path shows none.".into(),
            Error::NotASequence { .. } => "sequence is the sequence whose values number the rows of the source.".into(),
            Error::NotATable { .. } => {
                "Only ordinary and partitioned, permanent tables can be captured or rolled up.".into()
            }
            Error::NoColumn { .. } => "litellm_spend expects the columns of LiteLLM's spend log.".into(),
            Error::NoTimeColumn { .. } => "time_column is a column of the source that a dimension buckets.".into(),
            Error::ColumnType { expected, .. } => format!("litellm_spend expects {expected}."),
            Error::Distributed(_) => {
                "Other nodes' writers are not seen among this node's locks: a row that commits late would be missing for ever.".into()
            }
            Error::NotExtensionOwner => "It belongs to no table any more whose owner could decide, or to all of them.".into(),
            Error::NotOwner(_) => "Triggers and views of the table are changed on behalf of its owner.".into(),
            Error::Standby => "This server is a standby: it replays what its primary does.".into(),
            Error::ReadOnly => "transaction_read_only is on.".into(),
            Error::Isolation(_) => "Its snapshot may be older than the rollup's lock, so that rows could be missed or counted twice.".into(),
            Error::Encoding(_) => "Rust strings are UTF-8.".into(),
            Error::AttachedElsewhere(_) => "A database has one change log, fed by one table.".into(),
            Error::NotAttached { .. } => "Nothing is captured there.".into(),
            Error::Policy(_) => "keep: rows that retention deletes stay in the totals. subtract: they leave them.".into(),
            Error::NoRollup(_) | Error::NoRollups => {
                "Rollups are made by spend_attach(), spend_rollup_create() and spend_rollup_register().".into()
            }
            Error::NotRollupOwner(_) => "A rollup belongs to the owner of its source.".into(),
            Error::ByHand(_) => "Only its watermark is known here.".into(),
            Error::NotByHand(_) => "Its windows are merged by litellm_spend itself.".into(),
            Error::BuiltIn(_) => "It belongs to the captured table.".into(),
            Error::SourceDropped(_) => "It keeps what had been merged.".into(),
            Error::Exists(name) => format!(
                "The live view of rollup \"{name}\" would be {}, its table {}.",
                qualified(SCHEMA, name),
                qualified(SCHEMA, &format!("{name}_rollup"))
            ),
            Error::RollupExists(_) => "Rollups have different names, also those that are filled by hand.".into(),
            Error::Reserved(_) => "Its tables, views and indexes for LiteLLM take it.".into(),
            Error::Name { longest, .. } => format!("A name has 1 to {longest} bytes, so that a table name can be made of it."),
            Error::Expression { reason, .. } => reason.clone(),
            Error::DuplicateColumn(_) => "Dimensions and measures are columns of one table; avg(x) AS a also takes a_sum and a_count.".into(),
            Error::NoBucket(_) => "A dimension does if it is a date or time and reads no other column.".into(),
            Error::NotNumbered { columns: 0, .. } => "No column has it as its identity or as its default, nextval().".into(),
            Error::NotNumbered { columns, .. } => format!("{columns} columns have one as their identity or default."),
            Error::NumberedElsewhere { column, found, .. } => {
                format!("They come into the source too, but their \"{column}\" is {found} there.")
            }
            Error::Null(_) => "NULL names nothing.".into(),
            Error::Empty(_) => "A rollup groups by one dimension at least, and computes one measure at least.".into(),
            Error::TooManyDimensions { most, .. } => {
                format!("They are the key of its table, and an index has at most {most} columns.")
            }
            Error::RollupBusy(_) => "A merge or a rebuild holds it; one at a time works on a rollup.".into(),
            Error::Restoring => "State that another installation wrote is here, and not what a restore of it makes last.".into(),
            Error::LogNotMerged { .. } => {
                "While the spend log is locked, only what came in at the last moment is merged, and nobody is waited for.".into()
            }
            Error::AttachmentBusy => "It holds the right to change triggers and views, until it ends.".into(),
            Error::Frozen { days, .. } => {
                format!("Raw rows of these days are gone; the rollup is their only record: {days}.")
            }
            Error::RawRowsLost { .. } => {
                "Raw rows vanished, other than by a DELETE that was captured; the rollup is their only record.".into()
            }
            Error::Range { bucketed: true, .. } => {
                "A rollup is rebuilt in whole buckets, the built-in ones in whole days; range_start is inclusive, range_end exclusive.".into()
            }
            Error::Range { bucketed: false, .. } => "None of its dimensions buckets time.".into(),
            Error::RawVanished(_) => "Rows were truncated or a partition was dropped since the rebuild began. Nothing was changed.".into(),
            Error::NotMergedYet { last, .. } => format!("The sequence's last value is {last}."),
            Error::SequenceSetBack { last_value, watermark, .. } => format!(
                "Its last value is {last_value}, but values up to {watermark} have been merged. The rollup is stopped; nothing is lost."
            ),
            Error::SequenceShape { reason, .. } => reason.clone(),
            Error::AlreadyPartitioned(_) => "Not by a conversion, or its policy was forgotten.".into(),
            Error::CannotConvert { reason, .. } => reason.clone(),
            Error::NotATime(_) => "Times are of type timestamp (in UTC), timestamp with time zone or date, or text.".into(),
            Error::CutoverBeyond => "No period begins there.".into(),
            Error::CutoverPast { .. } => "All rows there are must be before it when the table is partitioned.".into(),
            Error::RowsBeyondCutover { rows, last, cutover, .. } => {
                format!("{rows} rows are at {cutover} or later, the last of them at {last}; they could not be in a partition that ends there.")
            }
            Error::LockNotAvailable { holders, .. } if holders.is_empty() => "A transaction came in between.".into(),
            Error::LockNotAvailable { holders, .. } => format!("It is held by {holders}."),
            Error::NotByTime { reason, .. } => reason.clone(),
            Error::NoPartitionColumn { .. } => "Partitions are ranges of a column of type timestamp, timestamp with time zone or date.".into(),
            Error::Interval(_) => "A partition holds a day, a week from Monday, or a month, in UTC.".into(),
            Error::Precreate { .. } => "It is the number of periods that are kept ready beyond the current one.".into(),
            Error::OnExpire(_) => "drop: an expired partition is gone. detach: it moves to schema litellm_spend_archive.".into(),
            Error::Retention { .. } => "A partition goes as a whole, when all of it has expired.".into(),
            Error::NoPolicy(_) => "Nothing is known of how it is to be partitioned, nor of how long its rows stay.".into(),
            Error::Converting(_) => "Its partitions are left alone until that has ended.".into(),
            Error::NotOrdinary(_) => "It is partitioned itself, or foreign.".into(),
            Error::ForeignPartition { .. } => {
                "PostgreSQL collects no changed rows from foreign tables: statements that reach its rows would fail.".into()
            }
            Error::HasParent { .. } => {
                "A statement that names the parent fires the parent's triggers only: rows that it changes would be missed.".into()
            }
            Error::ConversionBusy(_) => "A step of it is being done; only one can be at a time.".into(),
            Error::NoTimeIndex { .. } => "Without one its rows could only be found by reading the whole table, again and again or under an exclusive lock.".into(),
            Error::CameBetween(_) => "What had been decided was no longer true once the lock was there. Nothing was changed.".into(),
            Error::Referenced { .. } => "What refers to it would fail, or lose rows.".into(),
            Error::NotMerged { .. } => "It holds rows above that.".into(),
            Error::NotCovered { .. } => "Its days may still have to be computed from the raw rows.".into(),
            Error::NotRepaired(_) => "Days whose capture failed are rebuilt from the raw rows.".into(),
            Error::OtherOwner { expected, .. } => {
                format!("What was asked for was asked for a table of role \"{expected}\"; nothing is done to another's.")
            }
            Error::SequenceOfAnother { .. } => "Its values would be shown to the owner of the source.".into(),
            Error::NoRole(_) => "It was dropped, or never was.".into(),
            Error::SeveralStatements => "A text that was to be one statement holds more, or none. Nothing was run.".into(),
            Error::NotOurs(_) => "Planning a query can call its owner's functions, so it must run as its owner. Nothing was read.".into(),
            Error::Needed(failure) | Error::Failed(failure) => return failure.detail(),
            Error::Spi(_) | Error::State(_) => return None,
        })
    }

    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::NoTable(_) => {
                "Pass the table, as in 'myschema.\"LiteLLM_SpendLogs\"', when LiteLLM has made it.".into()
            }
            Error::StillAttached(_) => {
                "SELECT * FROM spend_detach(drop_history => true); gives the views back. If that fails, see Uninstall in docs/operations.md."
                    .into()
            }
            Error::Ambiguous(names) => {
                let names: Vec<String> = names.iter().map(|name| literal(name)).collect();
                format!("Pass the one that LiteLLM writes to: {}.", names.join(" or "))
            }
            Error::NotASequence { value, .. } => {
                let merged = value.map(|value| format!("; what is merged already is merged_to => {value}"));
                format!(
                    "Leave it out where one sequence numbers the rows, or pass its name{}.",
                    merged.unwrap_or_default()
                )
            }
            Error::NotATable { .. } => "Pass the table that the rows are written to, for LiteLLM \"LiteLLM_SpendLogs\".".into(),
            Error::NoTimeColumn { .. } => "Pass one of its columns, or leave time_column out.".into(),
            Error::NoColumn { .. } | Error::ColumnType { .. } => {
                "Check that this is LiteLLM's table and that its migrations have run.".into()
            }
            Error::Distributed(relation) => {
                format!("SELECT undistribute_table('{}') makes an ordinary table of it.", relation.replace('\'', "''"))
            }
            Error::NotExtensionOwner => "Call it as a superuser, or as a member of the extension's owner.".into(),
            Error::NotOwner(_) => {
                "Call it as the table's owner, as a member of that role, or as a superuser.".into()
            }
            Error::Standby => {
                "Run it on the primary; monthly_global_spend() and the views answer here.".into()
            }
            Error::ReadOnly => "BEGIN READ WRITE, or SET default_transaction_read_only = off.".into(),
            Error::Isolation(_) => "Use READ COMMITTED.".into(),
            Error::Encoding(_) => {
                "Use a database with ENCODING 'UTF8', which LiteLLM's own client needs as well.".into()
            }
            Error::AttachedElsewhere(table) => {
                format!("Call spend_detach('{}') first.", table.replace('\'', "''"))
            }
            Error::NotAttached { remedy, .. } => remedy.clone(),
            Error::Policy(_) => "Leave it out for keep.".into(),
            Error::Null(what) => format!("Pass a {what}."),
            Error::Empty(what) => format!("Pass a {what} such as ARRAY['…']."),
            Error::TooManyDimensions { .. } => "Leave some out, or make one of several, as in \"ROW(a, b)::text AS ab\".".into(),
            Error::NoRollup(_) => "Make it first.".into(),
            Error::NoRollups => "Call one of them first.".into(),
            Error::NotRollupOwner(_) => "Call it as that role, as a member of it, or as a superuser.".into(),
            Error::ByHand(_) => "Run its own SQL, which calls spend_rollup_window().".into(),
            Error::NotByHand(_) => "Read its live view; spend_rollup_run() merges it at once.".into(),
            Error::BuiltIn(_) => "SELECT * FROM spend_detach(drop_history => true); drops all built-in rollups.".into(),
            Error::SourceDropped(_) => "Read it while you need it; spend_rollup_drop() drops it.".into(),
            Error::Exists(_) => "Choose another name, or drop the old one first: spend_rollup_drop() if it is a rollup.".into(),
            Error::RollupExists(_) => "Choose another name, or drop that rollup first, with spend_rollup_drop().".into(),
            Error::Name { .. } | Error::Reserved(_) => "Choose another name.".into(),
            Error::Expression { what: "dimension", .. } => {
                "A dimension is an expression over the source's columns, as in \"date_trunc('hour', created_at) AS hour\".".into()
            }
            Error::Expression { reason, .. } if reason == COMPUTED => {
                "Keep each aggregate as a measure of its own, as in \"sum(a) AS a\" and \"count(*) AS n\", and compute with them when you read: a / n.".into()
            }
            Error::Expression { .. } => {
                "A measure is one aggregate, as in \"count(*) AS views\", \"sum(bytes) AS bytes\" or \"hll_add_agg(hll_hash_bigint(id)) AS users MERGE WITH hll_union_agg\".".into()
            }
            Error::DuplicateColumn(_) => "Give each of them a name of its own with AS.".into(),
            Error::NoBucket(column) => {
                format!("Add a dimension such as \"date_trunc('hour', {column}) AS hour\", or leave time_column out.")
            }
            Error::NotNumbered { columns: 0, .. } => {
                "Use a bigserial or identity column, or a default of nextval('sequence').".into()
            }
            Error::NotNumbered { .. } => "Pass the sequence whose column numbers the rows.".into(),
            Error::NumberedElsewhere { relation, column, sequence, .. } => {
                format!("ALTER TABLE {relation} ALTER COLUMN {column} SET DEFAULT nextval('{}').", sequence.replace('\'', "''"))
            }
            Error::Restoring => "When all is there, call spend_restored(); or spend_attach() for LiteLLM's table.".into(),
            Error::RollupBusy(_) => {
                "Try again. Who is at it: SELECT pid FROM pg_locks WHERE relation = 'litellm_spend.rollup'::regclass AND mode = 'RowShareLock';"
                    .into()
            }
            Error::AttachmentBusy | Error::LogNotMerged { .. } => "Try again.".into(),
            Error::Frozen { .. } => "Choose a range without them. A rebuild with force => true gives up their history.".into(),
            Error::RawRowsLost { .. } => "Pass force => true to count only what is there, in all built-in rollups if it is one of them.".into(),
            Error::Range { bucketed: true, .. } => "Pass such times in UTC, midnights as in '2026-11-01' for days.".into(),
            Error::Range { bucketed: false, .. } => "Leave the range out to rebuild all of it.".into(),
            Error::RawVanished(_) => "Try again: the range may be frozen by then.".into(),
            Error::NotMergedYet { .. } => "Pass the last value whose row is merged, or leave it out.".into(),
            Error::SequenceSetBack { sequence, watermark, by_hand, .. } => {
                let then = if *by_hand {
                    "rows that were numbered meanwhile are for you to merge"
                } else {
                    "spend_rollup_rebuild() then counts the rows that were numbered meanwhile"
                };
                format!("SELECT setval('{}', {watermark}) lets it go on; {then}.", sequence.replace('\'', "''"))
            }
            Error::SequenceShape { sequence, .. } => {
                format!("ALTER SEQUENCE {sequence} INCREMENT BY 1 CACHE 1 NO CYCLE.")
            }
            Error::AlreadyPartitioned(table) => {
                format!("SELECT spend_partition_set('{}'); has its partitions looked after.", table.replace('\'', "''"))
            }
            Error::CannotConvert { .. } => "SELECT * FROM spend_partition_plan() lists all that is in the way. Nothing was changed.".into(),
            Error::NotATime(_) => "Pass one such as '2026-12-31', or now().".into(),
            Error::CutoverBeyond => "Pass an earlier cutover, or leave it out.".into(),
            Error::CutoverPast { .. } => "Pass a later cutover, or leave it out.".into(),
            Error::RowsBeyondCutover { .. } => "Pass a cutover after the last row, or correct the rows.".into(),
            Error::Interval(_) => "Pass 'day', 'week' or 'month'.".into(),
            Error::LockNotAvailable { limit, .. } => {
                format!("Try again when those transactions have ended, or raise litellm_spend.{}.", limit.setting)
            }
            Error::NotByTime { .. } => "Pass a table that is not partitioned yet, or one that is PARTITION BY RANGE of a time column.".into(),
            Error::NoPartitionColumn { .. } => "Pass time_column := '<name>'.".into(),
            Error::Precreate { .. } => "Pass 7, say.".into(),
            Error::OnExpire(_) => "Pass 'drop' or 'detach'.".into(),
            Error::Retention { seconds: Some(days), .. } => {
                format!("A number alone is seconds: write '{days} days'.")
            }
            Error::Retention { interval, .. } => format!("Pass at least '1 {interval}', or '0' to keep all rows."),
            Error::NoPolicy(_) => "Call spend_partition_set() first.".into(),
            Error::Converting(_) => "Wait for it: spend_progress shows how far it is.".into(),
            Error::ConversionBusy(_) => "Try again.".into(),
            Error::NotOrdinary(_) => "Maintain it by hand.".into(),
            Error::ForeignPartition { table, foreign } => {
                format!("ALTER TABLE {table} DETACH PARTITION {foreign}, or keep such rows in a table of their own.")
            }
            Error::HasParent { parent, .. } => {
                format!("Attach {parent}, if LiteLLM writes there, or take the table out: DETACH PARTITION, NO INHERIT.")
            }
            Error::NoTimeIndex { relation, column } => {
                let column = quoted(column);
                format!("CREATE INDEX CONCURRENTLY ON {relation} ({column}); if it has partitions, on each of them.")
            }
            Error::CameBetween(_) => "Try again; the worker does so by itself.".into(),
            Error::Referenced { .. } => "Drop the reference, or maintain the table by hand.".into(),
            Error::NotMerged { .. } => "It expires once its rows are merged; SELECT spend_rollup_run() merges what is safe.".into(),
            Error::NotCovered { .. } => "It expires once the backfill is complete; CALL spend_backfill(); completes it.".into(),
            Error::NotRepaired(_) => "It expires once that is done; SELECT spend_rollup_run(); does it.".into(),
            Error::OtherOwner { relation, expected, .. } => {
                format!("ALTER TABLE {relation} OWNER TO \"{}\", or call it anew for the new owner.", expected.replace('"', "\"\""))
            }
            Error::SequenceOfAnother { sequence, owner } => {
                format!("GRANT SELECT ON SEQUENCE {sequence} TO \"{}\".", owner.replace('"', "\"\""))
            }
            Error::NoRole(_) => "Pass the name of a role.".into(),
            Error::SeveralStatements => "Look for unusual characters in the names involved.".into(),
            Error::Needed(_) => "Drop what depends on it first; nothing of anybody else's is dropped with it.".into(),
            Error::Failed(failure) => return failure.hint(),
            Error::NotOurs(_) | Error::Spi(_) | Error::State(_) => "Please report this as a bug.".into(),
        })
    }
}

impl From<Error> for ErrorReport {
    fn from(error: Error) -> Self {
        let failure = Failure::from(error);
        failure.explain(failure.message.clone())
    }
}

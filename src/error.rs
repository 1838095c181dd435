//! Every failure that a user can meet: SQLSTATE, message, DETAIL (the facts) and HINT (an action).

use crate::guc::LockLimit;
use crate::server::expression::COMPUTED;
use crate::server::session::Failure;
use crate::server::text::{SCHEMA, literal, qualified, quoted};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use std::fmt;

pub type Result<T> = std::result::Result<T, Error>;

/// What is said of an error.
pub struct Told {
    pub sqlstate: PgSqlErrorCode,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

/// A text of the table: with the error's fields in it, with arguments as `format!` has them, or computed.
macro_rules! text {
    ($text:literal) => {
        format!($text)
    };
    (($($format:tt)*)) => {
        format!($($format)*)
    };
    ($computed:block) => {
        String::from($computed)
    };
}

/// `Name(fields): SQLSTATE; message; DETAIL; HINT;` for each error.
macro_rules! errors {
    ($(
        $name:ident $(( $($item:ident: $item_type:ty),* ))? $({ $($field:ident: $field_type:ty),* })?:
        $sqlstate:expr; $message:tt; $detail:tt; $hint:tt;
    )*) => {
        #[derive(Debug)]
        pub enum Error {
            $( $name $(( $($item_type),* ))? $({ $($field: $field_type),* })?, )*
        }

        impl Error {
            #[allow(unused_variables)]
            pub fn tell(&self) -> Told {
                use PgSqlErrorCode::*;
                match self {
                    $(
                        Error::$name $(( $($item),* ))? $({ $($field),* })? => Told {
                            sqlstate: $sqlstate,
                            message: text!($message),
                            detail: Some(text!($detail)).filter(|text| !text.is_empty()),
                            hint: Some(text!($hint)).filter(|text| !text.is_empty()),
                        },
                    )*
                }
            }
        }
    };
}

errors! {
    NoTable(relation: String):
        ERRCODE_UNDEFINED_TABLE;
        "relation {relation} does not exist";
        "No schema of this database holds a table of that name.";
        "Pass the table, as in 'myschema.\"LiteLLM_SpendLogs\"', when LiteLLM has made it.";

    NotATable { relation: String, kind: &'static str }:
        ERRCODE_WRONG_OBJECT_TYPE;
        "\"{relation}\" is {kind}";
        "Only ordinary and partitioned, permanent tables can be captured or rolled up.";
        "Pass the table that the rows are written to, for LiteLLM \"LiteLLM_SpendLogs\".";

    OurOwn(relation: String):
        ERRCODE_WRONG_OBJECT_TYPE;
        "{relation} belongs to litellm_spend itself";
        "What is in its own tables comes and goes as it is added up: a rollup over them would not be exact.";
        "Pass the table that the rows are written to. The built-in rollups have what the change log says: \
         SELECT * FROM spend_rollup_status;";

    NoColumn { relation: String, column: String }:
        ERRCODE_UNDEFINED_COLUMN;
        "relation \"{relation}\" has no column \"{column}\"";
        "litellm_spend expects the columns of LiteLLM's spend log.";
        "Check that this is LiteLLM's table and that its migrations have run.";

    NoTimeColumn { relation: String, column: String }:
        ERRCODE_UNDEFINED_COLUMN;
        "relation \"{relation}\" has no column \"{column}\" to bucket time by";
        "time_column is a column of the source that a dimension buckets.";
        "Pass one of its columns, or leave time_column out.";

    ColumnType { relation: String, column: String, found: String, expected: String }:
        ERRCODE_DATATYPE_MISMATCH;
        "column \"{column}\" of relation \"{relation}\" has type {found}";
        "litellm_spend expects {expected}.";
        "Check that this is LiteLLM's table and that its migrations have run.";

    Distributed(relation: String):
        ERRCODE_FEATURE_NOT_SUPPORTED;
        "{relation} is distributed by Citus";
        "Other nodes' writers are not seen among this node's locks: a row that commits late would be \
         missing for ever.";
        ("SELECT undistribute_table({}) makes an ordinary table of it.", literal(relation));

    ElsewhereToo(relation: String):
        ERRCODE_FEATURE_NOT_SUPPORTED;
        "{relation} is distributed by Citus";
        "Its partitions have parts on other nodes, where this would be half done.";
        "Citus makes partitions and drops them on all nodes: create_time_partitions(), drop_old_time_partitions().";

    NotByHash(relation: String):
        ERRCODE_FEATURE_NOT_SUPPORTED;
        "{relation} is a table of Citus's that is not distributed by hash";
        "Only of shards that are divided by hash is it known who writes to them.";
        ("SELECT undistribute_table({}); then create_distributed_table(), or leave it local.", literal(relation));

    NotCoordinator(relation: String):
        ERRCODE_FEATURE_NOT_SUPPORTED;
        "{relation} is distributed by Citus, and this node is not the coordinator";
        "Each node draws numbers from a range of its own; only those of the coordinator's rise with all rows.";
        "Make the rollup in the database on the coordinator.";

    NodeSilent { relation: String, node: String, answer: String }:
        ERRCODE_CONNECTION_FAILURE;
        "node {node} does not say who writes to {relation}";
        "{answer}";
        "Nothing is merged meanwhile, and nothing lost: it is asked again. Is it up, and does it let the table's owner in?";

    NotDistributable { rollup: String, reason: String }:
        ERRCODE_FEATURE_NOT_SUPPORTED;
        "rollup \"{rollup}\" cannot be distributed";
        "{reason}";
        "Pass distributed => false: its table is then one of this node.";

    StillCommitting { rollup: String, node: String }:
        ERRCODE_OBJECT_IN_USE;
        "what was merged of rollup \"{rollup}\" is not committed on node {node} yet";
        "A COMMIT PREPARED is under way there, or has failed and is repeated by Citus. Nothing is merged meanwhile, \
         and nothing lost.";
        "SELECT recover_prepared_transactions();";

    NodesAhead { rollup: String, merged: i64, known: i64 }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "the nodes have merged more of rollup \"{rollup}\" than the coordinator knows of";
        "They say {merged}, and here it is {known}: the coordinator has failed over, or was restored from a backup.";
        "SELECT * FROM spend_rollup_run(); brings it there, and counts nothing twice. Then call this again.";

    NumberedOnNode { relation: String, column: String, number: i64 }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "rows of {relation} were numbered on another node than the coordinator";
        "There is one with {column} {number}: each node of Citus's draws from a range of its own, and those rows would \
         never be merged.";
        "Insert through the coordinator; delete those rows and insert them there. Then ALTER SEQUENCE ... RESTART on that \
         node: until then each look searches all rows for more.";

    NotOwner(relation: String):
        ERRCODE_INSUFFICIENT_PRIVILEGE;
        "must be owner of relation \"{relation}\"";
        "A table is read and changed with the rights of its owner.";
        "Call it as the table's owner, as a member of that role, or as a superuser.";

    NotExtensionOwner:
        ERRCODE_INSUFFICIENT_PRIVILEGE;
        "must be owner of extension \"litellm_spend\"";
        "It belongs to no table any more whose owner could decide, or to all of them.";
        "Call it as a superuser, or as a member of the extension's owner.";

    HistoryOfAnother { owner: Option<String> }:
        ERRCODE_INSUFFICIENT_PRIVILEGE;
        "must be owner of the history that a detach has kept";
        {
            let whose = match owner {
                Some(owner) => format!("It belongs to role \"{owner}\"."),
                None => "Nobody knows any more whose it is, but for the extension's owner.".into(),
            };
            format!("{whose} Who attaches may read and replace it.")
        };
        "Call it as that role, as a member of it, or as a superuser, who may also drop that history: \
         SELECT * FROM spend_detach(drop_history => true);";

    OtherVersion { installed: String, library: &'static str }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "extension \"litellm_spend\" is at version {installed}, and its library at {library}";
        "The library was replaced; what this database has is still the old version's.";
        "ALTER EXTENSION litellm_spend UPDATE;";

    Standby:
        ERRCODE_READ_ONLY_SQL_TRANSACTION;
        "cannot change rollups during recovery";
        "This server is a standby: it replays what its primary does.";
        "Run it on the primary; monthly_global_spend() and the views answer here.";

    ReadOnly:
        ERRCODE_READ_ONLY_SQL_TRANSACTION;
        "cannot change rollups in a read-only transaction";
        "transaction_read_only is on.";
        "BEGIN READ WRITE, or SET default_transaction_read_only = off.";

    Isolation(level: &'static str):
        ERRCODE_INVALID_TRANSACTION_STATE;
        "cannot run in a transaction of isolation level {level}";
        "Its snapshot may be older than the rollup's lock, so that rows could be missed or counted twice.";
        "Use READ COMMITTED.";

    Encoding(encoding: String):
        ERRCODE_FEATURE_NOT_SUPPORTED;
        "database encoding {encoding} is not supported";
        "Rust strings are UTF-8.";
        "Use a database with ENCODING 'UTF8', which LiteLLM's own client needs as well.";

    AttachedElsewhere(table: String):
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "litellm_spend is attached to another table, {table}";
        "A database has one change log, fed by one table.";
        ("Call spend_detach({}) first.", literal(table));

    NotAttached { to: String, remedy: String }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "litellm_spend is not attached to {to}";
        "Nothing is captured there.";
        { remedy.clone() };

    StillAttached(table: String):
        ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST;
        "litellm_spend cannot be dropped with CASCADE while it is attached to {table}";
        "LiteLLM's own views would be dropped with it, and the only record of deleted rows.";
        "SELECT * FROM spend_detach(drop_history => true); gives the views back. If that fails, see \
         Uninstall in docs/operations.md.";

    Ambiguous(names: Vec<String>):
        ERRCODE_UNDEFINED_TABLE;
        "several tables are called \"LiteLLM_SpendLogs\"";
        "None of them is attached, and search_path shows none.";
        {
            let names: Vec<String> = names.iter().map(|name| literal(name)).collect();
            format!("Pass the one that LiteLLM writes to: {}.", names.join(" or "))
        };

    NotASequence { given: String, value: Option<u32> }:
        ERRCODE_WRONG_OBJECT_TYPE;
        "{given} is not a sequence";
        "sequence is the sequence whose values number the rows of the source.";
        {
            let merged = value.map(|value| format!("; what is merged already is merged_to => {value}"));
            let merged = merged.unwrap_or_default();
            format!("Leave it out where one sequence numbers the rows, or pass its name{merged}.")
        };

    OnDelete(given: String):
        ERRCODE_INVALID_PARAMETER_VALUE;
        "on_delete must be \"keep\" or \"subtract\", not \"{given}\"";
        "keep: deleted rows stay in the totals. subtract: a DELETE takes them out; rows that a policy lets expire stay.";
        "Leave it out for what is set; at the first attach that is keep.";

    Null(what: &'static str):
        ERRCODE_NULL_VALUE_NOT_ALLOWED;
        "{what} must not be NULL";
        "NULL names nothing.";
        "Pass a {what}.";

    Empty(what: &'static str):
        ERRCODE_INVALID_PARAMETER_VALUE;
        "{what} must not be empty";
        "A rollup groups by one dimension at least, and computes one measure at least.";
        "Pass a {what} such as ARRAY['...'].";

    TooManyDimensions { given: usize, most: usize }:
        ERRCODE_TOO_MANY_COLUMNS;
        "a rollup cannot have {given} dimensions";
        "They are the key of its table, and an index has at most {most} columns.";
        "Leave some out, or make one of several, as in \"ROW(a, b)::text AS ab\".";

    NoRollup(rollup: String):
        ERRCODE_UNDEFINED_OBJECT;
        "rollup \"{rollup}\" does not exist";
        "Rollups are made by spend_attach(), spend_rollup_create() and spend_rollup_register().";
        "Make it first.";

    ReportNotMade(rollup: String):
        ERRCODE_UNDEFINED_OBJECT;
        "rollup \"{rollup}\" does not exist";
        "It is one of the reports, which are made when somebody asks for them.";
        "SELECT * FROM spend_attach(reports => true); makes them.";

    NoRollups:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "there are no rollups";
        "Rollups are made by spend_attach(), spend_rollup_create() and spend_rollup_register().";
        "Call one of them first.";

    NotRollupOwner(rollup: String):
        ERRCODE_INSUFFICIENT_PRIVILEGE;
        "must be owner of rollup \"{rollup}\"";
        "A rollup belongs to the owner of its source.";
        "Call it as that role, as a member of it, or as a superuser.";

    ByHand(rollup: String):
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "rollup \"{rollup}\" is filled by its owner's own SQL";
        "Only its watermark is known here.";
        "Run its own SQL, which calls spend_rollup_window().";

    NotByHand(rollup: String):
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "rollup \"{rollup}\" is not filled by hand";
        "Its windows are merged by litellm_spend itself.";
        "Read its live view; spend_rollup_run() merges it at once.";

    BuiltIn(rollup: String):
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "rollup \"{rollup}\" is built in";
        "It belongs to the captured table.";
        "SELECT * FROM spend_detach(drop_history => true); drops all built-in rollups.";

    SourceDropped(rollup: String):
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "source of rollup \"{rollup}\" was dropped";
        "It keeps what had been merged.";
        "Read it while you need it; spend_rollup_drop() drops it.";

    Exists(name: String):
        ERRCODE_DUPLICATE_OBJECT;
        "\"{name}\" already exists";
        (
            "The live view of rollup \"{name}\" would be {}, its table {}.",
            qualified(SCHEMA, name),
            qualified(SCHEMA, &format!("{name}_rollup"))
        );
        "Choose another name, or drop the old one first: spend_rollup_drop() if it is a rollup.";

    RollupExists(rollup: String):
        ERRCODE_DUPLICATE_OBJECT;
        "rollup \"{rollup}\" already exists";
        "Rollups have different names, also those that are filled by hand.";
        "Choose another name, or drop that rollup first, with spend_rollup_drop().";

    Reserved(name: String):
        ERRCODE_DUPLICATE_OBJECT;
        "\"{name}\" is a name of litellm_spend's own";
        "Its tables, views and indexes for LiteLLM take it.";
        "Choose another name.";

    Name { name: String, longest: usize }:
        ERRCODE_INVALID_NAME;
        "\"{name}\" cannot be the name of a rollup";
        "A name has 1 to {longest} bytes, so that a table name can be made of it.";
        "Choose another name.";

    Expression { what: &'static str, expression: String, reason: String }:
        ERRCODE_INVALID_COLUMN_DEFINITION;
        "{what} \"{expression}\" cannot be used";
        { reason.clone() };
        {
            match *what {
                "dimension" => A_DIMENSION,
                _ if reason == COMPUTED => ONE_AGGREGATE_EACH,
                _ => A_MEASURE,
            }
        };

    DuplicateColumn(column: String):
        ERRCODE_DUPLICATE_COLUMN;
        "column \"{column}\" is specified more than once";
        "Dimensions and measures are columns of one table; avg(x) AS a also takes a_sum and a_count.";
        "Give each of them a name of its own with AS.";

    ReservedColumn(column: String):
        ERRCODE_RESERVED_NAME;
        "column name \"{column}\" is reserved";
        "Names that begin with \"litellm_spend_\" are those of columns that litellm_spend adds.";
        "Choose another name with AS.";

    NoBucket(column: String):
        ERRCODE_INVALID_PARAMETER_VALUE;
        "no dimension buckets column \"{column}\"";
        "A dimension does if it is a date or time and reads no other column.";
        "Add a dimension such as \"date_trunc('hour', {column}) AS hour\", or leave time_column out.";

    NotNumbered { relation: String, sequence: Option<String>, columns: usize }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        (
            "rows of \"{relation}\" are not numbered by {}",
            sequence.as_ref().map_or("one sequence".into(), |sequence| format!("sequence {sequence}"))
        );
        {
            match columns {
                0 => "No column has it as its identity or as its default, nextval().".to_string(),
                _ => format!("{columns} columns have one as their identity or default."),
            }
        };
        {
            match columns {
                0 => "Use a bigserial or identity column, or a default of nextval('sequence').",
                _ => "Pass the sequence whose column numbers the rows.",
            }
        };

    NumberedElsewhere { relation: String, column: String, found: String, sequence: String }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "rows written to {relation} are not numbered by sequence {sequence}";
        "They come into the source too, but their \"{column}\" is {found} there.";
        ("ALTER TABLE {relation} ALTER COLUMN {column} SET DEFAULT nextval({}).", literal(sequence));

    NumberNotKept { relation: String, column: String, r#type: String }:
        ERRCODE_DATATYPE_MISMATCH;
        "column \"{column}\" of {relation} cannot number its rows: its type is {type}";
        "A number that it rounds can be one that is merged already. The row would never be counted.";
        (
            "ALTER TABLE {relation} ALTER COLUMN {} TYPE bigint; a rollup that is over it must be dropped before, \
             and made anew after.",
            quoted(column)
        );

    Unlogged(relation: String):
        ERRCODE_WRONG_OBJECT_TYPE;
        "{relation} is an unlogged table, which a crash empties";
        "The rollup would still count its rows, and could take the numbers of new ones for merged ones.";
        "ALTER TABLE {relation} SET LOGGED;";

    UnloggedRollup(table: String):
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "{table} is unlogged: a crash would empty it";
        "What is merged would be gone, and the watermark would say that it is there.";
        "ALTER TABLE {table} SET LOGGED;";

    OtherColumn { relation: String, rollup: String, column: String, now: Option<String> }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "column \"{column}\" of {relation} is not the one that rollup \"{rollup}\" reads";
        {
            let became = match now {
                Some(now) => format!("is called \"{now}\" now"),
                None => "was dropped".into(),
            };
            format!("That one {became}. What is merged came from it: with another the sums would be of both.")
        };
        {
            let anew = format!("SELECT spend_rollup_drop({}); and make it anew", literal(rollup));
            match now {
                Some(now) => format!(
                    "ALTER TABLE {relation} RENAME COLUMN {} TO {}; lets it go on (rename what has that name now \
                     before). Or {anew}.",
                    quoted(now),
                    quoted(column)
                ),
                None => format!("{anew}."),
            }
        };

    NullDimension { rollup: String, dimension: String, relation: String }:
        ERRCODE_NOT_NULL_VIOLATION;
        "dimension \"{dimension}\" of rollup \"{rollup}\" is NULL in a row of {relation}";
        "Its column was NOT NULL when the rollup was declared, so the key of the rollup's table takes no NULL.";
        "UPDATE the rows in which it is NULL, and ALTER TABLE {relation} ALTER COLUMN ... SET NOT NULL; or drop \
         the rollup and make it anew.";

    Temporary(object: String):
        ERRCODE_INVALID_COLUMN_DEFINITION;
        "a rollup cannot use {object}";
        "It is temporary: when this session ends it is dropped, and takes the live view or a column of the \
         rollup along.";
        "Make it in a schema that stays.";

    RollupBusy { rollup: String, holders: String }:
        ERRCODE_LOCK_NOT_AVAILABLE;
        "rollup \"{rollup}\" is locked by another transaction";
        ("One merge or rebuild at a time works on a rollup. {}", held_by(holders));
        "Try again when that has ended.";

    Restoring:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "this database came out of a dump, and its restore may not be over";
        "What another installation wrote is here, and not what a restore of it makes last, or that came first.";
        "When all is there, a superuser calls spend_restored(); or call spend_attach() for LiteLLM's table.";

    Restored:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "this database came out of a dump, and nothing has gone on with it yet";
        "A call that changes nothing does not do that either.";
        "Wait for the worker, or call spend_rollup_run().";

    AttachmentBusy { holders: String }:
        ERRCODE_LOCK_NOT_AVAILABLE;
        "another transaction is attaching or detaching";
        ("One at a time changes triggers and views. {}", held_by(holders));
        "Try again when that has ended.";

    MarkerBusy { holders: String }:
        ERRCODE_LOCK_NOT_AVAILABLE;
        "another transaction is making the first rollup or policy, or dropping the last";
        ("One at a time makes or drops what a restore shows its end by. {}", held_by(holders));
        "Try again when that has ended.";

    GrantsBusy { holders: String }:
        ERRCODE_LOCK_NOT_AVAILABLE;
        "another transaction grants or revokes privileges in schema litellm_spend";
        ("One at a time does. {}", held_by(holders));
        "Try again when that has ended.";

    LogNotMerged { left: i64 }:
        ERRCODE_LOCK_NOT_AVAILABLE;
        "the change log is not merged to its end: {left} values are left";
        "While the spend log is locked, only what came in at the last moment is merged, and nobody is \
         waited for.";
        "Try again.";

    Frozen { rollup: String, days: String }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "range of rollup \"{rollup}\" has frozen days";
        "Raw rows of these days are gone; the rollup is their only record: {days}.";
        "Choose a range without them. A rebuild with force => true gives up their history.";

    Range { rollup: String, bucketed: bool }:
        ERRCODE_INVALID_PARAMETER_VALUE;
        "range of rollup \"{rollup}\" is empty or does not begin and end where buckets do";
        {
            if *bucketed {
                "A rollup is rebuilt in whole buckets, the built-in ones in whole days; range_start is \
                 inclusive, range_end exclusive."
            } else {
                "None of its dimensions buckets time."
            }
        };
        {
            if *bucketed {
                "Pass such times in UTC, midnights as in '2026-11-01' for days."
            } else {
                "Leave the range out to rebuild all of it."
            }
        };

    RawRowsLost { rollup: String, bucket: String }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "rollup \"{rollup}\" knows of more rows at {bucket} than there are";
        "Rows that it has counted are gone, and it is their only record.";
        "Pass force => true to count only what is there, in all built-in rollups if it is one of them.";

    RawVanished(table: String):
        ERRCODE_T_R_SERIALIZATION_FAILURE;
        "raw rows of \"{table}\" vanished during the rebuild";
        "Rows were truncated or a partition was dropped since the rebuild began. Nothing was changed.";
        "Try again: the range may be frozen by then.";

    SequenceSetBack { sequence: String, last_value: i64, watermark: i64, by_hand: bool }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "sequence {sequence} was set back";
        "Its last value is {last_value}, but values up to {watermark} have been merged. The rollup is \
         stopped; nothing is lost.";
        {
            let then = if *by_hand {
                "rows that were numbered meanwhile are for you to merge"
            } else {
                "spend_rollup_rebuild() then counts the rows that were numbered meanwhile"
            };
            format!("SELECT setval({}, {watermark}) lets it go on; {then}.", literal(sequence))
        };

    NotMergedYet { merged_to: i64, last: i64 }:
        ERRCODE_INVALID_PARAMETER_VALUE;
        "rows up to {merged_to} cannot have been merged";
        "The sequence's last value is {last}.";
        "Pass the last value whose row is merged, or leave it out.";

    BeforeFirst { merged_to: i64, lowest: i64 }:
        ERRCODE_INVALID_PARAMETER_VALUE;
        "rows up to {merged_to} cannot have been merged";
        "The sequence's lowest value is {lowest}.";
        "Pass the last value whose row is merged, or leave it out where none is.";

    SequenceShape { sequence: String, reason: String, remedy: &'static str }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "sequence {sequence} cannot number the rows of a source";
        { reason.clone() };
        "ALTER SEQUENCE {sequence} {remedy};";

    AlreadyPartitioned(table: String):
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "{table} is partitioned already";
        "Not by a conversion, or its policy was forgotten.";
        ("SELECT spend_partition_set({}); has its partitions looked after.", literal(table));

    CannotConvert { relation: String, time_column: String, reason: String }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "{relation} cannot be partitioned as it is";
        { reason.clone() };
        (
            "SELECT * FROM spend_partition_plan({}, time_column => {}); lists all that is in the way. Nothing was \
             changed.",
            literal(relation),
            literal(time_column)
        );

    CannotRevert { relation: String, reason: String }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "{relation} cannot be turned back into a plain table as it is";
        { reason.clone() };
        "Change that, then call it again. Nothing was changed.";

    NotATime { r#type: String, example: String }:
        ERRCODE_DATATYPE_MISMATCH;
        "a value of type {type} is no time";
        "Times are of type timestamp (in UTC), timestamp with time zone or date, or text.";
        "Pass one such as {example}.";

    NotATimeText { given: String, example: String }:
        ERRCODE_INVALID_DATETIME_FORMAT;
        "\"{given}\" is no time that every session reads alike";
        "A text is read as the server reads a timestamp, whatever DateStyle; without a time zone it is in UTC.";
        "Pass one such as {example}.";

    TimeBeyond { example: String }:
        ERRCODE_INVALID_PARAMETER_VALUE;
        "time is beyond the calendar";
        "No period begins there.";
        "Pass one such as {example}.";

    CutoverBeyond:
        ERRCODE_INVALID_PARAMETER_VALUE;
        "cutover is beyond the calendar";
        "No period begins there.";
        "Pass an earlier cutover, or leave it out.";

    CutoverPast { cutover: String }:
        ERRCODE_INVALID_PARAMETER_VALUE;
        "cutover {cutover} is over";
        "All rows there are must be before it when the table is partitioned.";
        "Pass a later cutover, or leave it out.";

    RowsBeyondCutover { relation: String, rows: i64, last: String, cutover: String }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "{relation} has rows from the cutover on";
        "{rows} rows are at {cutover} or later, the last of them at {last}; they could not be in a \
         partition that ends there.";
        "Pass a cutover after the last row, or correct the rows.";

    NotByTime { relation: String, reason: String }:
        ERRCODE_WRONG_OBJECT_TYPE;
        "\"{relation}\" is not partitioned by ranges of one time column";
        { reason.clone() };
        "Pass a table that is not partitioned yet, or one that is PARTITION BY RANGE of a time column.";

    IsAPart { relation: String, whole: String }:
        ERRCODE_WRONG_OBJECT_TYPE;
        "{relation} is a part of {whole}";
        "What is asked for a table holds for all its partitions.";
        ("Pass {}.", literal(whole));

    NoPartitionColumn { relation: String, column: String, times: Vec<String> }:
        ERRCODE_UNDEFINED_COLUMN;
        "relation \"{relation}\" has no column \"{column}\" to partition by";
        "Partitions are ranges of a column of type timestamp, timestamp with time zone or date.";
        { pass_one_of(column, times) };

    PartitionColumnType { relation: String, column: String, found: String, times: Vec<String> }:
        ERRCODE_DATATYPE_MISMATCH;
        "column \"{column}\" of relation \"{relation}\" has type {found}";
        "Partitions are ranges of a column of type timestamp, timestamp with time zone or date.";
        { pass_one_of(column, times) };

    Interval(given: String):
        ERRCODE_INVALID_PARAMETER_VALUE;
        "\"interval\" must be \"day\", \"week\" or \"month\", not \"{given}\"";
        "A partition holds a day, a week from Monday, or a month, in UTC.";
        "Pass 'day', 'week' or 'month'.";

    Precreate { given: i32, most: i32 }:
        ERRCODE_INVALID_PARAMETER_VALUE;
        "precreate must be from 0 to {most}, not {given}";
        "It is the number of periods that are kept ready beyond the current one.";
        "Pass 7, say.";

    OnExpire(given: String):
        ERRCODE_INVALID_PARAMETER_VALUE;
        "on_expire must be \"drop\" or \"detach\", not \"{given}\"";
        "drop: an expired partition is gone. detach: it moves to schema litellm_spend_archive.";
        "Pass 'drop' or 'detach'.";

    Retention { given: String, interval: String, seconds: Option<i64> }:
        ERRCODE_INVALID_PARAMETER_VALUE;
        "retention \"{given}\" is shorter than one {interval}, longer than 1000 years, or negative in part";
        "A partition goes as a whole, when all of it has expired.";
        {
            match seconds {
                Some(days) => format!("A number alone is seconds: write '{days} days'."),
                None => format!("Pass at least '1 {interval}', or '0' to keep all rows."),
            }
        };

    NoPolicy(table: String):
        ERRCODE_UNDEFINED_OBJECT;
        "{table} has no partition policy";
        "Nothing is known of how it is to be partitioned, nor of how long its rows stay.";
        "Call spend_partition_set() first.";

    Converting(table: String):
        ERRCODE_OBJECT_IN_USE;
        "\"{table}\" is being converted";
        "Its partitions are left alone until that has ended.";
        "Wait for it: spend_progress shows how far it is.";

    Reverting(table: String):
        ERRCODE_OBJECT_IN_USE;
        "{table} is being turned back into a plain table";
        "A reversion is under way; until its swap the table is partitioned.";
        (
            "SELECT * FROM spend_partition_revert({}, abort => true); keeps it partitioned. spend_progress \
             shows how far the reversion is.",
            literal(table)
        );

    CopyLost { table: String, copy: String }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "{copy} is not the copy that was made";
        "It was dropped or replaced, or was left out of a dump. The reversion of {table} cannot go on.";
        ("SELECT * FROM spend_partition_revert({}, abort => true);", literal(table));

    ConversionBusy(table: String):
        ERRCODE_OBJECT_IN_USE;
        "{table} is being converted by another session";
        "A step of it is being done; only one can be at a time.";
        "Try again.";

    NotOrdinary(partition: String):
        ERRCODE_WRONG_OBJECT_TYPE;
        "partition \"{partition}\" is not an ordinary table";
        "It is partitioned itself, or foreign.";
        "Maintain it by hand.";

    ForeignPartition { table: String, foreign: String }:
        ERRCODE_FEATURE_NOT_SUPPORTED;
        "{table} cannot be captured while {foreign}, which is a foreign table, belongs to it";
        "PostgreSQL collects no changed rows from foreign tables: statements that reach its rows would fail.";
        "ALTER TABLE {table} DETACH PARTITION {foreign}, or keep such rows in a table of their own.";

    HasParent { table: String, parent: String }:
        ERRCODE_FEATURE_NOT_SUPPORTED;
        "{table} cannot be captured while it is a partition of, or inherits from, {parent}";
        "A statement that names the parent fires the parent's triggers only: rows that it changes would be \
         missed.";
        "Attach {parent}, if LiteLLM writes there, or take the table out: DETACH PARTITION, NO INHERIT.";

    NoTimeIndex { relation: String, column: String }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "{relation} has no index on column \"{column}\"";
        "Without one its rows could only be found by reading the whole table, again and again or under an \
         exclusive lock.";
        (
            "CREATE INDEX CONCURRENTLY ON {relation} ({0}); if it is partitioned, CREATE INDEX ON ONLY {relation} \
             ({0}), then CONCURRENTLY on each partition, and ALTER INDEX ... ATTACH PARTITION.",
            quoted(column)
        );

    NoKeyIndex { relation: String, columns: Vec<String> }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "{relation} has no index that begins with its key without the time";
        "The rows that change while it is copied are found by that: without an index the whole table would be \
         read for each, also while everybody waits for the swap.";
        (
            "CREATE INDEX ON ONLY {relation} ({0}), then CONCURRENTLY on each partition, and ALTER INDEX ... ATTACH \
             PARTITION.",
            columns.iter().map(|c| quoted(c)).collect::<Vec<_>>().join(", ")
        );

    CameBetween(relation: String):
        ERRCODE_OBJECT_IN_USE;
        "somebody changed \"{relation}\" at the same time";
        "What had been decided was no longer true once the lock was there. Nothing was changed.";
        "Try again; the worker does so by itself.";

    Referenced { relation: String, by: String }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "\"{relation}\" is referenced by {by}";
        "What refers to it would fail, or lose rows.";
        "Drop the reference, or maintain the table by hand.";

    TooManyAtOnce { relation: String, at: String, most: i64 }:
        ERRCODE_PROGRAM_LIMIT_EXCEEDED;
        "more than {most} rows of {relation} have the same time, {at}";
        "They would move to their partition at once, while everybody else waits for the table.";
        "Raise litellm_spend.drain_rows at a quiet time and call spend_partition_maintain().";

    KeptBack(partition: String):
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "{partition} keeps rows that are to move to another partition";
        "A rule, or what it calls, makes something else of it when they are deleted.";
        "Drop the rule; maintenance goes on by itself then.";

    NotMerged { partition: String, rollup: String, watermark: i64 }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "partition \"{partition}\" is not rolled up: rollup \"{rollup}\" has merged up to {watermark}";
        "It holds rows above that.";
        "It expires once its rows are merged; SELECT spend_rollup_run() merges what is safe.";

    NotCovered { partition: String, rollup: String }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "partition \"{partition}\" is not rolled up: rollup \"{rollup}\" is not backfilled";
        "Its days may still have to be computed from the raw rows.";
        "It expires once the backfill is complete; CALL spend_backfill(); completes it.";

    NotRepaired(partition: String):
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "partition \"{partition}\" is not rolled up: capture has something to repair";
        "Days whose capture failed are rebuilt from the raw rows.";
        "It expires once that is done; SELECT spend_rollup_run(); does it.";

    NotCaptured(relation: String):
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "{relation} is not captured: triggers are missing or disabled, or may not write to our tables";
        "Rows that are written or deleted meanwhile may be in no total, so none expires.";
        "SELECT spend_rollup_run(); mends that, as the worker does by itself.";

    LockNotAvailable { relation: String, limit: LockLimit, holders: String }:
        ERRCODE_LOCK_NOT_AVAILABLE;
        ("could not get a lock on {relation} within {} ms", limit.time.as_millis());
        { held_by(holders) };
        ("Try again when those transactions have ended, or raise {}.", limit.setting);

    GaveWay { relation: String, limit: LockLimit, waiters: String }:
        ERRCODE_LOCK_NOT_AVAILABLE;
        ("others have waited for {relation} for longer than {} ms", limit.time.as_millis());
        "So its lock was given back. Waiting was {waiters}.";
        (
            "Try again while nobody writes to it, or raise {}. What writes with a condition on the time waits for \
             partitions of that time only.",
            limit.setting
        );

    LockedByConversion { relation: String, limit: LockLimit, holders: String, table: String }:
        ERRCODE_LOCK_NOT_AVAILABLE;
        ("could not get a lock on {relation} within {} ms", limit.time.as_millis());
        { held_by(holders) };
        (
            "SELECT * FROM spend_partition_revert({}); ends its conversion, which is under way. Or try again when \
             spend_progress shows it no more.",
            literal(table)
        );

    OtherOwner { relation: String, owner: String, expected: String }:
        ERRCODE_INSUFFICIENT_PRIVILEGE;
        "{relation} belongs to role \"{owner}\"";
        "What was asked for was asked for a table of role \"{expected}\"; nothing is done to another's.";
        ("ALTER TABLE {relation} OWNER TO {}, or call it anew for the new owner.", quoted(expected));

    OwnerGone { relation: String, owner: String }:
        ERRCODE_INSUFFICIENT_PRIVILEGE;
        "{relation} belongs to role \"{owner}\", and the role that had it was dropped";
        "What was asked for was asked for a table of that role; nothing is done to another's.";
        "Call it anew for the new owner: of LiteLLM's table, spend_attach(). Or give the table to another role.";

    Renamed { was: String, now: String }:
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "{now} was called {was} when its conversion or reversion began";
        "What is made on the way is named after it, so it goes on when the table has that name again.";
        ("SELECT * FROM spend_partition_revert({}, abort => true); takes back what was begun.", literal(now));

    ArchiveOfAnother(owner: String):
        ERRCODE_INSUFFICIENT_PRIVILEGE;
        "schema litellm_spend_archive belongs to role \"{owner}\"";
        "Whoever owns it could drop or replace the tables that are put there.";
        "As a superuser, after a look at what is in it: ALTER SCHEMA litellm_spend_archive OWNER TO CURRENT_USER;";

    SequenceOfAnother { sequence: String, owner: String }:
        ERRCODE_INSUFFICIENT_PRIVILEGE;
        "role \"{owner}\" may not read sequence {sequence}";
        "Its values would be shown to the owner of the source.";
        ("GRANT SELECT ON SEQUENCE {sequence} TO {}.", quoted(owner));

    NoRole(role: u32):
        ERRCODE_UNDEFINED_OBJECT;
        "role {role} does not exist";
        "It was dropped, or never was.";
        "Pass the name of a role.";

    NotOurs(relation: u32):
        ERRCODE_INTERNAL_ERROR;
        "relation {relation} would be read with the rights of litellm_spend's owner";
        "Planning a query can call its owner's functions, so it must run as its owner. Nothing was read.";
        "If it is in schema litellm_spend, and its owner is no superuser any more, give it to one that is. If the \
         function of an event trigger names it, make that function SECURITY DEFINER, of the relation's owner. Else \
         please report this as a bug.";

    NotPinned:
        ERRCODE_INTERNAL_ERROR;
        "a statement of litellm_spend's would be run on somebody's search_path";
        "An operator on it could be anybody's, and would be called with the session's rights. Nothing was run.";
        "Please report this as a bug.";

    NoTrigrams(index: &'static str):
        ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        "index \"{index}\" needs extension pg_trgm";
        "It finds a part of a text by its groups of three letters.";
        "CREATE EXTENSION pg_trgm; comes with the server's contrib package.";

    TrigramsClosed { schema: String, owner: String }:
        ERRCODE_INSUFFICIENT_PRIVILEGE;
        "role \"{owner}\" may not use schema {schema}, where extension pg_trgm is";
        "An index is built as the table's owner, and this one with an operator class of pg_trgm's.";
        ("GRANT USAGE ON SCHEMA {schema} TO {};", quoted(owner));

    NoIndexes:
        ERRCODE_NULL_VALUE_NOT_ALLOWED;
        "list of indexes must not be NULL";
        "Nothing is built that was not asked for by name.";
        "SELECT item, serves FROM spend_index_plan(); lists them. Pass some, as in indexes => '{{team, user}}'.";

    EmptyIndexes:
        ERRCODE_INVALID_PARAMETER_VALUE;
        "list of indexes must not be empty";
        "What was asked for before stays: an empty list would change nothing.";
        "SELECT * FROM spend_index_drop(); drops those that were asked for. Pass some to have them, as in \
         indexes => '{{team, user}}'.";

    NoIndex(name: String):
        ERRCODE_UNDEFINED_OBJECT;
        "there is no index \"{name}\"";
        "The catalogue has none of that name.";
        "SELECT item, serves FROM spend_index_plan(); lists them.";

    Version(given: String):
        ERRCODE_INVALID_PARAMETER_VALUE;
        "\"{given}\" is no version of LiteLLM";
        "A version begins with two numbers.";
        "Pass one such as '1.110.2'.";

    Needed(failure: Failure):
        failure.sqlstate;
        { failure.message.clone() };
        { failure.detail().unwrap_or_default() };
        "Drop what depends on it first; nothing of anybody else's is dropped with it.";

    Failed(failure: Failure):
        failure.sqlstate;
        { failure.message.clone() };
        { failure.detail().unwrap_or_default() };
        { failure.hint().unwrap_or_default() };

    OutOfRange:
        ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE;
        "bigint out of range";
        "The sum of a group is more than its column holds.";
        "Take a sum of numeric, as in sum(value::numeric).";

    NumericOverflows:
        ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE;
        "value overflows numeric format";
        "The sum of a group is more than a numeric holds.";
        "Correct or delete the rows whose values are that large.";

    SeveralStatements:
        ERRCODE_SYNTAX_ERROR;
        "not a single statement";
        "A text that was to be one statement holds more, or none. Nothing was run.";
        "Look for unusual characters in the names involved.";

    Spi(error: pgrx::spi::Error):
        ERRCODE_INTERNAL_ERROR;
        "unexpected answer from the server: {error}";
        "";
        "Please report this as a bug.";

    State(error: serde_json::Error):
        ERRCODE_INTERNAL_ERROR;
        "stored state of litellm_spend cannot be read: {error}";
        "";
        "Please report this as a bug.";
}

/// Which of the table's columns of a time type can be passed, instead of `column`.
fn pass_one_of(column: &str, times: &[String]) -> String {
    let pass = |name: &String| format!("time_column => {}", literal(name));
    if let Some(name) = times.iter().find(|name| name.to_lowercase() == column.to_lowercase()) {
        return format!("Pass {}: upper and lower case differ.", pass(name));
    }
    match times {
        [] => "The table has no such column: add one, NOT NULL.".into(),
        _ => format!("Pass {}.", times.iter().map(pass).collect::<Vec<_>>().join(" or ")),
    }
}

/// The DETAIL that names who holds a lock that we did not get.
fn held_by(holders: &str) -> String {
    match holders {
        "" => "A transaction came in between.".into(),
        _ => format!("It is held by {holders}."),
    }
}

const A_DIMENSION: &str = "A dimension is an expression over the source's columns, as in \
    \"date_trunc('hour', created_at) AS hour\".";

const A_MEASURE: &str = "A measure is one aggregate, as in \"count(*) AS views\", \"sum(bytes) AS bytes\" or \
    \"hll_add_agg(hll_hash_bigint(id)) AS users MERGE WITH hll_union_agg\".";

const ONE_AGGREGATE_EACH: &str = "Keep each aggregate as a measure of its own, as in \"sum(a) AS a\" and \
    \"count(*) AS n\", and compute with them when you read: a / n.";

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.tell().message)
    }
}

impl From<pgrx::spi::Error> for Error {
    fn from(error: pgrx::spi::Error) -> Self {
        Error::Spi(error)
    }
}

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        Error::State(error)
    }
}

impl From<Error> for ErrorReport {
    fn from(error: Error) -> Self {
        let failure = Failure::from(error);
        failure.explain(failure.message.clone())
    }
}

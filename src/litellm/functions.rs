//! The texts of the triggers that capture and of their functions. Pure text, like `spend_log`.

use crate::litellm::spend_log::{Capture, TIME, not_in, only, write_rows, write_sums};
use crate::server::locks::TRIGGERS_LOCK_TIMEOUT;
use crate::server::text::{literal, next_midnight, quoted};

impl Capture<'_> {
    /// The trigger functions, as (name, body). Of the dimensions they write to the change log those that a
    /// rollup has: `read`. The ledger gets them all, for a rollup that is added later.
    ///
    /// They are PL/pgSQL, not Rust: LiteLLM's writes then go on whatever happens to our library. They belong
    /// to the table's owner and are SECURITY DEFINER, because the writer may be any role that the owner lets
    /// write; hence the pinned search_path. Whatever they call of the owner's (a cast, say, after a column
    /// has changed its type) runs as the owner, who may insert into the change log, the ledger and the notes
    /// of failures, and no more. A failure is caught, counted in a sequence (which no rollback takes back)
    /// and, if that can be written, its days are marked dirty; the user's statement succeeds. Only the DELETE
    /// by which we let rows expire fails: they would be in no total.
    pub fn functions(
        &self,
        read: &[&str],
        subtract_deleted: bool,
        replaced: Option<&Replaced>,
    ) -> Vec<(String, String)> {
        let rows = |capture: &Capture, relation, sign, conditions: &[String]| {
            capture.rows_with(|name| read.contains(&name), relation, sign, &only(conditions))
        };
        let unless_held = |statements: &dyn Fn(&Capture, &[String]) -> String| {
            let beside =
                replaced.map(|tables| tables.on_predecessor(statements) + &tables.on_table(self, statements));
            beside.unwrap_or_default() + &statements(self, &[])
        };
        let insert = unless_held(&|capture, conditions| {
            write_rows("change_log", &rows(capture, "new_rows", 1, conditions)) + ";"
        });
        let update = |capture: &Capture, conditions: &[String]| {
            let (old, new) =
                (rows(capture, "old_rows", -1, conditions), rows(capture, "new_rows", 1, conditions));
            write_sums("change_log", &format!("{old} UNION ALL {new}")) + ";"
        };
        // Of a request that both tables hold, the new table's row counts.
        let beside = replaced.map(|tables| tables.on_predecessor(&update)).unwrap_or_default();
        let update = format!("{}\n    {beside}{}", note_moves(), update(self, &[]));
        let expiring = format!("coalesce(current_setting('{EXPIRING}', true) = 'on', false)");
        // A kept row that could not be written to the ledger is still in the rollups, which is where it
        // belongs.
        let (delete, delete_repair) = if subtract_deleted {
            let delete = |capture: &Capture, conditions: &[String]| {
                let subtract = write_rows("change_log", &rows(capture, "old_rows", -1, conditions));
                let retire = capture.retire("old_rows", conditions);
                format!("IF {expiring} THEN {retire}; ELSE {subtract}; END IF;")
            };
            (unless_held(&delete), format!("CASE WHEN {expiring} THEN 'keep' ELSE 'rebuild' END"))
        } else {
            (unless_held(&|capture, conditions| capture.retire_deleted(conditions)), "'keep'".into())
        };
        vec![
            self.function("insert", &insert, "new_rows", "'rebuild'", "", ""),
            self.function("update", &update, "both", "'rebuild'", "", &note_moves()),
            self.function(
                "delete",
                &delete,
                "old_rows",
                &delete_repair,
                &format!("IF {expiring} THEN RAISE; END IF;"),
                "",
            ),
            (function_name("move"), move_function()),
            (function_name("truncate"), truncate_function()),
        ]
    }

    /// A row that a MERGE has moved to another partition is among those that a DELETE takes, but it is still
    /// there. Only the owner's own table is read as the owner.
    fn retire_deleted(&self, conditions: &[String]) -> String {
        let all = self.retire("old_rows", conditions);
        let conditions = [conditions, &[not_in("litellm_spend_table")]].concat();
        let gone = self.retire("old_rows", &conditions).replace('%', "%%");
        format!(
            "IF coalesce(current_setting({MOVED}, true), '') = ''
       OR NOT EXISTS (SELECT FROM pg_class WHERE oid = TG_RELID
           AND pg_get_userbyid(relowner) = current_user) THEN
        {all};
    ELSE
        EXECUTE format({}, TG_RELID::regclass);
    END IF;",
            literal(&gone.replace("litellm_spend_table", "%s"))
        )
    }

    /// `unless` comes first where the body has failed, and may let it fail. `beside` notes what is not among
    /// the rows, with the number of the failure: what the body has noted of it was rolled back with it.
    fn function(
        &self,
        operation: &str,
        body: &str,
        rows: &str,
        repair: &str,
        unless: &str,
        beside: &str,
    ) -> (String, String) {
        let time = quoted(TIME);
        let rows = match rows {
            "both" => format!("(SELECT {time} FROM old_rows UNION ALL SELECT {time} FROM new_rows)"),
            one => one.to_string(),
        };
        let (name, end) = (function_name(operation), next_midnight(&time));
        let text = format!(
            "
DECLARE
    failure bigint;
BEGIN
    {body}
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    {unless}
    BEGIN
        failure := nextval('litellm_spend.capture_failures');
        {beside}
        INSERT INTO litellm_spend.dirty_range (failure, range_start, range_end, repair, operation, sqlstate,
            message)
        SELECT DISTINCT failure, date_trunc('day', {time}), {end}, {repair}, TG_OP, SQLSTATE, SQLERRM
        FROM {rows} AS r;
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;
    {}
    RETURN NULL;
END
",
            warning(
                "'litellm_spend could not capture % on %: %', TG_OP, TG_TABLE_NAME, SQLERRM",
                "The statement itself is not affected; the days concerned are rebuilt."
            )
        );
        (name, text)
    }

    /// As [`Capture::trigger`], but the trigger collects no rows and never fires.
    pub fn silent_trigger(operation: &str, relation: &str) -> String {
        format!(
            "CREATE OR REPLACE TRIGGER {} AFTER {operation} ON {relation} FOR EACH STATEMENT WHEN (false) EXECUTE FUNCTION {}()",
            trigger_name(operation),
            function_name(operation)
        )
    }

    /// `CREATE OR REPLACE TRIGGER`, which also enables one that was disabled, and unlike DROP TRIGGER locks
    /// no reader out. `keys` are the columns by which the table is partitioned, none if that cannot be said.
    pub fn trigger(operation: &str, relation: &str, keys: &[String]) -> String {
        let (when, rows) = match operation {
            "insert" => ("AFTER INSERT", "REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT"),
            "update" => {
                ("AFTER UPDATE", "REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT")
            }
            "delete" => ("AFTER DELETE", "REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT"),
            MOVE => ("BEFORE UPDATE", "FOR EACH ROW"),
            _ => ("AFTER TRUNCATE", "FOR EACH STATEMENT"),
        };
        let columns = keys.iter().map(|key| quoted(key)).collect::<Vec<_>>().join(", ");
        let of = if operation == MOVE && !keys.is_empty() { format!("OF {columns}") } else { String::new() };
        format!(
            "CREATE OR REPLACE TRIGGER {} {when} {of} ON {relation} {rows} EXECUTE FUNCTION {}()",
            trigger_name(operation),
            function_name(operation)
        )
    }
}

/// The captured table and the one that had its name before, each by OID and name. A request that both hold
/// counts once, as the captured table has it: what a statement does to one of them changes the totals only as
/// far as the other table does not hold the request.
pub struct Replaced {
    pub table: (u32, String),
    pub predecessor: (u32, String),
    /// Those of the predecessor that can be captured.
    pub columns: Vec<String>,
}

/// The table whose trigger fires, or the one of which that is a partition.
const WRITTEN: &str = "coalesce(pg_partition_root(TG_RELID), TG_RELID)";

impl Replaced {
    /// Statements of a trigger function for rows of the predecessor that the table does not hold, where it
    /// can be read. They end the function.
    fn on_predecessor(&self, statements: &dyn Fn(&Capture, &[String]) -> String) -> String {
        let capture = Capture { columns: &self.columns };
        format!(
            "IF {WRITTEN} = {} THEN {} END IF;\n    ",
            self.predecessor.0,
            beside(&self.table, &|conditions| statements(&capture, conditions))
        )
    }

    /// The same, for rows of the table that the predecessor does not hold.
    fn on_table(&self, capture: &Capture, statements: &dyn Fn(&Capture, &[String]) -> String) -> String {
        let (predecessor, _) = self.predecessor;
        format!(
            "IF {WRITTEN} <> {predecessor} THEN {} END IF;\n    ",
            beside(&self.predecessor, &|conditions| statements(capture, conditions))
        )
    }
}

/// The other table may be dropped, and its owner may give its name to something else, which must not run with
/// our rights: it is read only when it has been locked under its name.
fn beside((oid, name): &(u32, String), statements: &dyn Fn(&[String]) -> String) -> String {
    format!(
        "
        IF to_regclass({text})::oid = {oid} THEN
            LOCK TABLE {name} IN ACCESS SHARE MODE;
            IF to_regclass({text})::oid = {oid} THEN
                {}
                RETURN NULL;
            END IF;
        END IF;
   ",
        statements(&[not_in(name)]),
        text = literal(name)
    )
}

/// On while a policy deletes rows that have expired: they stay in the totals, as those of a partition that is
/// dropped do, also where a DELETE subtracts. Whoever else sets it for a DELETE of their own keeps the totals
/// as they are.
pub const EXPIRING: &str = "litellm_spend_internal.expiring";

/// What triggers capture.
pub const OPERATIONS: [&str; 5] = ["insert", "update", "delete", "truncate", MOVE];

/// Of a row, to another partition. Its trigger is on each partition that holds rows, made there by ourselves:
/// from the partitioned table it would be cloned to new ones by whoever makes those, who then would have to
/// be allowed to execute its function.
pub const MOVE: &str = "move";

/// The name of the setting in which a statement remembers a row that moves to another partition, and days
/// that such rows leave and come to. One that runs in a trigger of another has a setting of its own: its rows
/// are not those of that one.
const MOVED: &str = "'litellm_spend_capture.moved' || pg_trigger_depth()";

pub fn trigger_name(operation: &str) -> String {
    format!("litellm_spend_capture_{operation}")
}

pub fn function_name(operation: &str) -> String {
    format!("litellm_spend.capture_{operation}")
}

/// The statement that tells a writer of a failure. That can fail itself: the encoding of the client may have
/// no letter for what the server's message names.
fn warning(message: &str, hint: &str) -> String {
    format!(
        "BEGIN
        RAISE WARNING {message} USING HINT = {};
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;",
        literal(hint)
    )
}

/// TRUNCATE never subtracts: what was counted becomes history. Which days that concerns is found later; to
/// read the rows themselves would keep the statement, and who waits for it. The days that are noted are those
/// of which the partition may hold rows: those that its bounds touch, of a default partition all but those
/// that lie in the bounds of others. Nobody changes the bounds while it is locked, but a snapshot from before
/// that may be older than they are.
fn truncate_function() -> String {
    format!(
        "
DECLARE
    days tsmultirange := '{{(,)}}';
BEGIN
    BEGIN
        IF current_setting('transaction_isolation') NOT IN ('repeatable read', 'serializable') THEN
            WITH levels AS (
                SELECT i.inhrelid, i.inhparent
                FROM pg_partition_ancestors(TG_RELID) AS a JOIN pg_inherits i ON i.inhrelid = a.relid
                JOIN pg_partitioned_table k ON k.partrelid = i.inhparent
                JOIN pg_attribute t ON t.attrelid = k.partrelid AND t.attname = {time}
                WHERE k.partstrat = 'r' AND k.partnatts = 1 AND k.partattrs[0] = t.attnum
            ), partitions AS (
                SELECT i.inhparent, c.oid, regexp_match(pg_get_expr(c.relpartbound, c.oid),
                    '^FOR VALUES FROM [(]''?(.*?)''?[)] TO [(]''?(.*?)''?[)]$') AS bounds
                FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
                WHERE i.inhparent IN (SELECT inhparent FROM levels)
            ), ranges AS (
                SELECT inhparent, oid, nullif(bounds[1], 'MINVALUE')::timestamp AS first,
                    nullif(bounds[2], 'MAXVALUE')::timestamp AS next, bounds IS NULL AS rest
                FROM partitions
            ), touched AS (
                SELECT inhparent, oid, rest, date_trunc('day', first) AS first_touched,
                    date_trunc('day', first + interval '1 day' - interval '1 microsecond') AS first_whole,
                    date_trunc('day', next) AS next_whole,
                    date_trunc('day', next + interval '1 day' - interval '1 microsecond') AS next_touched
                FROM ranges
            )
            SELECT coalesce(range_intersect_agg(CASE
                    WHEN NOT own.rest THEN tsmultirange(tsrange(first_touched, next_touched))
                    ELSE '{{(,)}}'::tsmultirange - coalesce((
                        SELECT range_agg(tsrange(first_whole, next_whole)) FROM touched AS other
                        WHERE other.inhparent = own.inhparent AND NOT other.rest
                          AND coalesce(first_whole, '-infinity') < coalesce(next_whole, 'infinity')), '{{}}')
                END), '{{(,)}}') INTO days
            FROM levels JOIN touched AS own ON own.oid = levels.inhrelid;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        days := '{{(,)}}';
    END;
    INSERT INTO litellm_spend.dirty_range (range_start, range_end, repair, operation)
    SELECT coalesce(lower(part), '-infinity'), coalesce(upper(part), 'infinity'), 'freeze', TG_OP
    FROM unnest(days) AS part;
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    {warning}
    RETURN NULL;
END
",
        time = literal(TIME),
        warning = warning(
            "'litellm_spend could not record TRUNCATE of %: %', TG_TABLE_NAME, SQLERRM",
            "Do not call spend_rollup_rebuild() for days that were truncated."
        )
    )
}

/// A MERGE that moves a row to another partition passes it to the triggers of DELETE and INSERT, not to those
/// of UPDATE, and fires them only if it has such actions itself; that of UPDATE it fires (PostgreSQL 15 to
/// 18). So before a row is updated, it is remembered if it is to move, and with it the days that rows leave
/// and come to. When the statement ends, the trigger of UPDATE knows which it was: of an UPDATE the row is
/// among those that it was given.
///
/// It runs as the writer, as whom the server itself computes which partition a row belongs to.
fn move_function() -> String {
    let time = quoted(TIME);
    format!(
        "
DECLARE
    noted jsonb;
    stays boolean;
BEGIN
    IF current_setting({MOVED}, true) = 'lost' THEN
        RETURN NEW;
    END IF;
    noted := nullif(current_setting({MOVED}, true), '')::jsonb;
    IF noted IS NULL THEN
        EXECUTE format('SELECT %s FROM (SELECT ($1).*) AS r',
            coalesce(pg_get_partition_constraintdef(TG_RELID), 'true'))
            INTO stays USING NEW;
        IF stays THEN
            RETURN NEW;
        END IF;
        noted := jsonb_build_object('id', OLD.request_id, 'time', OLD.{time}, 'days', '{{}}'::jsonb);
    END IF;
    noted := jsonb_set(noted, '{{days}}', jsonb_build_object(date_trunc('day', NEW.{time}), 'UPDATE')
        || (noted -> 'days') || jsonb_build_object(date_trunc('day', OLD.{time}), 'MOVE'));
    PERFORM set_config({MOVED}, noted::text, true);
    RETURN NEW;
EXCEPTION WHEN OTHERS THEN
    PERFORM set_config({MOVED}, 'lost', true);
    {}
    RETURN NEW;
END
",
        warning(
            "'litellm_spend could not note a row that moves in %: %', TG_TABLE_NAME, SQLERRM",
            "The statement itself is not affected; the totals are computed again."
        )
    )
}

/// What the trigger of UPDATE does about rows that moved. The day that one has left had raw rows a moment
/// ago: it may become less than the rollups say, also if none are left (`MOVE`). If rows could not be noted,
/// a failure is counted that says no days: everything is computed again. `failure` is the function's: NULL,
/// or the number of the failure of which this is noted.
fn note_moves() -> String {
    let (time, end) = (quoted(TIME), next_midnight("day::timestamp"));
    let noted = format!("nullif(current_setting({MOVED}), '')::jsonb");
    format!(
        "IF coalesce(current_setting({MOVED}, true), '') <> '' THEN
        IF current_setting({MOVED}) = 'lost' THEN
            PERFORM nextval('litellm_spend.capture_failures');
            PERFORM set_config({MOVED}, '', true);
        END IF;
        INSERT INTO litellm_spend.dirty_range (failure, range_start, range_end, repair, operation)
        SELECT failure, day::timestamp, {end}, 'rebuild', operation
            FROM jsonb_each_text({noted} -> 'days') AS d(day, operation)
        WHERE NOT EXISTS (SELECT FROM old_rows AS r WHERE r.request_id = {noted} ->> 'id'
                          AND r.{time} = ({noted} ->> 'time')::timestamp);
        PERFORM set_config({MOVED}, '', true);
    END IF;"
    )
}

/// Makes a trigger function of a table, for its owner.
pub fn create_function(name: &str, body: &str) -> String {
    // The days of a note are not to depend on the writer's zone. And of rows that a policy hides from the
    // owner it would be thought that they are gone, or new: that is a failure, and counted as one.
    let whose = match name == function_name(MOVE) {
        true => "INVOKER",
        false => "DEFINER SET TimeZone = 'UTC' SET row_security = off",
    };
    format!(
        "CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql SECURITY {whose}
         SET search_path = pg_catalog, pg_temp SET lock_timeout = '{TRIGGERS_LOCK_TIMEOUT}' AS {}",
        literal(body)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_subtracts_the_old_row_and_adds_the_new_one() {
        let columns = vec![];
        let functions = Capture { columns: &columns }.functions(&[], false, None);
        let update = &functions.iter().find(|(name, _)| name.ends_with("update")).unwrap().1;
        assert!(update.contains("- (1::bigint) AS \"requests\""), "{update}");
        assert!(update.contains("FROM old_rows") && update.contains("FROM new_rows"), "{update}");
    }
}

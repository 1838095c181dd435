#!/usr/bin/env python3
"""Takes LiteLLM's own database schema, views and report queries out of its published packages.

Writes, the first two for `psql -f` with ON_ERROR_STOP:

    target/litellm/migrations.sql   every migration of litellm-proxy-extras, in order
    target/litellm/views.sql        the views that the proxy creates at start-up
    target/litellm/reports.json     name -> SQL of each report over the spend log or those views; those that LiteLLM 1.110 asks
                                    otherwise a second time, as budget_window_1_110.key beside budget_window.key
    target/litellm/1.110.sql        what LiteLLM 1.110 has more for its spend log than those migrations make
    target/litellm/1.110.json       name -> SQL of how it writes the log
    target/litellm/logs_page.json   name -> SQL of what its Logs page asks, and what its parameters are
    target/litellm/prisma/          its schema, and where npm is to be had the engine of `prisma db push`

Nothing of LiteLLM is imported or committed. Fetches nothing when these files are newer than this script.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROXY_EXTRAS = "litellm-proxy-extras==0.4.110"
LITELLM = "litellm==1.109.1"
LITELLM_1_110 = "litellm==1.110.2"  # there are no newer proxy-extras, so its tables are read from its schema.prisma
PRISMA = ["prisma@6.19.3", "@prisma/adapter-pg@6.19.3"]  # the last major that takes LiteLLM's schema as it is
MIGRATIONS, VIEWS = 220, 8  # how many those versions have: anything else means that we read them wrongly

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "target" / "litellm"


class Report(NamedTuple):
    """Where a query is. docs/reports.md tells of each name; what follows a dot names a variant."""

    name: str
    file: str  # in litellm/proxy
    holder: str  # function or constant
    words: str = ""  # that only this one of the holder's queries has
    holes: dict[str, str] = {}  # expression in its f-string -> text


SPEND = "spend_tracking/spend_management_endpoints.py"
TRACKING = "spend_tracking/spend_tracking_utils.py"
CACHE = "analytics_endpoints/cache_activity.py"
TEAM = "management_endpoints/team_endpoints.py"
SERVER = "proxy_server.py"
WINDOW = "db/budget_window_spend_writer.py"

# What LiteLLM puts together for each request, in our words.
TEAMS = "SELECT unnest($3::text[])"
OWNED = '("user" = $1 OR team_id = ANY ($2::text[]))'
DAYS = """"startTime" >= $3::timestamp AND "startTime" < $4::timestamp + interval '1 day'"""

REPORTS = [
    # over the views
    Report("global_spend_logs", SPEND, "global_spend_logs", '"MonthlyGlobalSpend"'),
    Report("global_spend_logs_by_key", SPEND, "global_spend_logs", '"MonthlyGlobalSpendPerKey"'),
    Report("global_spend_logs_by_user", SPEND, "global_spend_for_internal_user", '"user" = $1'),
    Report("global_spend_logs_by_user.key", SPEND, "global_spend_for_internal_user", '"user" = $2'),
    Report("global_spend", SPEND, "global_spend"),
    Report("global_spend_keys", SPEND, "global_spend_keys", 'Spend";'),
    Report("global_spend_keys.limit", SPEND, "global_spend_keys", "LIMIT"),
    Report("global_spend_models", SPEND, "global_spend_models"),
    Report("global_spend_tags", SPEND, "ui_get_spend_by_tags", "spend_date,"),
    Report("global_spend_tags_selected", SPEND, "ui_get_spend_by_tags", "ANY($3"),
    # over the spend log
    Report("global_activity", SPEND, "get_global_activity"),
    Report("global_activity.user", SPEND, "get_global_activity_internal_user"),
    Report("global_activity_model", SPEND, "get_global_activity_model"),
    Report("global_activity_model.user", SPEND, "get_global_activity_model_internal_user"),
    Report("cache_hits", CACHE, "GROUPS_SQL"),
    Report("cache_hits_key_aliases", CACHE, "KEY_ALIAS_OPTIONS_SQL"),
    Report("cache_hits_models", CACHE, "MODEL_OPTIONS_SQL"),
    Report("cache_hits_errors", CACHE, "ERROR_BREAKDOWN_SQL"),
    Report("global_spend_provider", SPEND, "get_global_spend_provider", "0 GROUP BY"),
    Report("global_spend_provider.user", SPEND, "get_global_spend_provider", '"user" = $3'),
    Report("spend_report_keys", SPEND, "get_global_spend_report", "'UTC') GROUP BY sl.api_key"),
    Report("spend_report_keys.key", SPEND, "get_global_spend_report", "sl.api_key = $3"),
    Report("spend_report_keys.user", SPEND, "get_global_spend_report", "sl.user = $3"),
    Report("spend_report_keys.own_key", SPEND, "_scoped_spend_report_sql", "", {"scope_column": "api_key"}),
    Report("spend_report_keys.own_user", SPEND, "_scoped_spend_report_sql", "", {"scope_column": "user"}),
    Report("spend_report_keys.own_team", SPEND, "_scoped_spend_report_sql", "", {"scope_column": "team_id"}),
    Report("spend_report_organization", SPEND, "_ORG_SPEND_REPORT_SQL"),
    Report("spend_report_customers", SPEND, "get_global_spend_report", "'customer', customer"),
    Report("spend_report_teams", TRACKING, "get_spend_by_team"),
    Report("spend_report_team_customer", TRACKING, "get_spend_by_team_and_customer"),
    Report("global_spend_teams", SPEND, "global_spend_per_team"),
    Report("global_spend_keys_of_user", SPEND, "global_spend_key_internal_user"),
    Report("global_spend_models_of_user", SPEND, "global_spend_models_internal_user"),
    Report("global_spend_end_users", SPEND, "global_spend_end_users"),
    Report("all_end_users", SPEND, "global_view_all_end_users"),
    Report("all_tag_names", SPEND, "global_get_all_tag_names"),
    Report("spend_tags", SPEND, "get_spend_by_tags", "", {"where_sql": ""}),
    Report("spend_tags.owned", SPEND, "get_spend_by_tags", "", {"where_sql": f" WHERE {OWNED} AND {DAYS}"}),
    Report("spend_logs_summary", SPEND, "_spend_logs_daily_summary_sql", "", {"filter_sql": ""}),
    Report("spend_logs_summary.key", SPEND, "_spend_logs_daily_summary_sql", "", {"filter_sql": "AND api_key = $3"}),
    Report("spend_logs_summary.user", SPEND, "_spend_logs_daily_summary_sql", "", {"filter_sql": 'AND "user" = $3'}),
    Report("team_spend_by_user", TEAM, "_team_user_spend_sql", "", {"team_placeholders": TEAMS, "user_clause": ""}),
    Report("team_spend_by_user.user", TEAM, "_team_user_spend_sql", "",
           {"team_placeholders": TEAMS, "user_clause": ' AND sl."user" = $4'}),
    Report("slack_teams", SPEND, "get_spend_report_for_time_range", "team_alias"),
    Report("slack_tags", SPEND, "get_spend_report_for_time_range", "request_tags"),
    Report("budget_window.key", WINDOW, "_SEED_FROM_SPEND_LOGS_KEY_UNBOUNDED_SQL"),
    Report("budget_window.team", WINDOW, "_SEED_FROM_SPEND_LOGS_TEAM_UNBOUNDED_SQL"),
    Report("budget_window_before_batch.key", WINDOW, "_SEED_FROM_SPEND_LOGS_KEY_SQL"),
    Report("budget_window_before_batch.team", WINDOW, "_SEED_FROM_SPEND_LOGS_TEAM_SQL"),
    Report("model_metrics", SERVER, "model_metrics"),
    Report("model_metrics_slow_responses", SERVER, "model_metrics_slow_responses"),
    Report("model_streaming_metrics", SERVER, "model_streaming_metrics", "AVG("),
    Report("model_streaming_metrics.day", SERVER, "model_streaming_metrics", "request_id"),
    Report("roi_branch_spend", "roi_calculator/branch_spend.py", "read_branch_spend"),
]


def download(requirement: str, folder: Path) -> zipfile.ZipFile:
    """The wheel of a pinned package, for whichever Python; it is only read."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--only-binary", ":all:", "--python-version", "3.12", "--dest", str(folder), requirement],
        check=True,
    )
    (wheel,) = folder.glob(requirement.split("==")[0].replace("-", "_") + "-*.whl")
    return zipfile.ZipFile(wheel)


def migrations(wheel: zipfile.ZipFile) -> str:
    """All migrations, one after the other. Some build indexes concurrently: run them outside of a transaction."""
    paths = sorted(p for p in wheel.namelist() if re.search(r"/migrations/[^/]+/migration\.sql$", p))
    assert len(paths) == MIGRATIONS, f"{len(paths)} migrations"
    return "\n".join(f"-- migration {p.split('/')[-2]}\n{wheel.read(p).decode().strip()}\n" for p in paths)


def views(wheel: zipfile.ZipFile) -> str:
    """The CREATE VIEW statements: string constants in the function that runs them."""
    tree = ast.parse(wheel.read("litellm/proxy/db/create_views.py"))
    statements = [
        textwrap.dedent(node.value).strip()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        and re.match(r"\s*CREATE\s+(OR\s+REPLACE\s+)?VIEW\b", node.value)
    ]
    assert len(statements) == VIEWS, f"{len(statements)} views"
    return "\n\n".join(s.rstrip(";") + ";" for s in statements) + "\n"


def reports(wheel: zipfile.ZipFile) -> dict[str, str]:
    """The query of each report."""
    trees = {file: ast.parse(wheel.read(f"litellm/proxy/{file}")) for file in {r.file for r in REPORTS}}
    found = {r.name: query(trees[r.file], r) for r in REPORTS}
    assert len(found) == len(REPORTS), "two reports have one name"
    return found


def with_changed(older: dict[str, str], newer: dict[str, str]) -> str:
    """The older queries, and those of the newer that are others, as JSON."""
    changed = {re.sub(r"^\w+", r"\g<0>_1_110", name): sql for name, sql in newer.items() if sql != older[name]}
    return json.dumps(older | changed, indent=1) + "\n"


TYPES = {"String": "TEXT", "Int": "INTEGER", "Float": "DOUBLE PRECISION", "Boolean": "BOOLEAN", "Json": "JSONB",
         "DateTime": "TIMESTAMP(3)"}
DEFAULTS = {"now()": "CURRENT_TIMESTAMP", "uuid()": None}  # Prisma's client makes the latter


def push(wheel: zipfile.ZipFile, models: list[str]) -> str:
    """What `prisma db push` does for these models where they, or columns or indexes of theirs, are missing."""
    schema = re.sub(r"[ \t]*//.*", "", wheel.read("litellm/proxy/schema.prisma").decode())
    return "\n".join(statement for model in models for statement in pushed(schema, model)) + "\n"


def pushed(schema: str, model: str) -> Iterator[str]:
    columns, indexes = [], []
    for line in filter(None, map(str.strip, block(schema, "model", model))):
        if index := re.fullmatch(r"@@index\(\[([\w, ]+)\]\)", line):
            indexes.append(re.split(r",\s*", index[1]))
            continue
        field = re.fullmatch(r"(\w+)\s+(\w+)(\??)((?:\s+@.*)?)", line)
        assert field, f"{model}: {line}"
        name, kind, optional, attributes = field.groups()
        if kind not in TYPES:
            values = ", ".join(f"'{value.strip()}'" for value in block(schema, "enum", kind) if value.strip())
            yield f'CREATE TYPE "{kind}" AS ENUM ({values});'
        column = f'"{name}" ' + TYPES.get(kind, f'"{kind}"') + ("" if optional else " NOT NULL")
        if default := re.search(r"@default\s*\(((?:[^()]|\(\))*)\)", attributes):
            value = DEFAULTS.get(default[1], re.sub(r'^"?(.*?)"?$', r"'\1'", default[1]))
            column += f" DEFAULT {value}" if value else ""
        if "@id" in attributes:
            yield f'CREATE TABLE IF NOT EXISTS "{model}" ({column} PRIMARY KEY);'
        else:
            columns.append(column)
    yield f'ALTER TABLE "{model}" ' + ", ".join(f"ADD COLUMN IF NOT EXISTS {column}" for column in columns) + ";"
    for index in indexes:
        keys = ", ".join(f'"{column}"' for column in index)
        yield f'CREATE INDEX IF NOT EXISTS "{model}_{"_".join(index)}_idx" ON "{model}" ({keys});'


def block(schema: str, kind: str, name: str) -> list[str]:
    """The lines of a model or an enum."""
    (body,) = re.findall(rf"^{kind} {name} {{\n(.*?)^}}", schema, re.M | re.S)
    return body.splitlines()


def client_schema(wheel: zipfile.ZipFile) -> str:
    """LiteLLM's schema.prisma for an engine without native parts."""
    schema = wheel.read("litellm/proxy/schema.prisma").decode()
    generator = 'generator client {\n  provider = "prisma-client-js"\n  engineType = "client"\n}'
    schema, found = re.subn(r"^generator client \{\n.*?^\}", generator, schema, flags=re.M | re.S)
    assert found == 1, f"{found} generators"
    return schema


def install_prisma() -> None:
    """For tests that are left out without it."""
    folder = OUT / "prisma"
    shutil.copy(ROOT / "tests" / "prisma" / "prisma.config.ts", folder)
    npm = shutil.which("npm")
    if npm is None or (folder / "node_modules" / ".bin" / "prisma").exists():
        return
    print(f"installing {', '.join(PRISMA)}", flush=True)
    call = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    call += ["--fetch-retries=0", "--fetch-timeout=60000"]
    if subprocess.run(call + PRISMA, cwd=folder).returncode:
        print("npm could not install it: `prisma db push` is not tested", flush=True)


def statements(wheel: zipfile.ZipFile) -> str:
    """How the log is written, as JSON: rows of the log, and the deliveries in the same transaction."""
    log = ast.parse(wheel.read("litellm/repositories/spend_log_insert.py"))
    (columns,) = (ast.literal_eval(node.value) for node in log.body if defines(node) == "_COLUMNS")
    inserts = [joined(node) for node in ast.walk(log) if isinstance(node, ast.BinOp)]
    (insert,) = (text for text in inserts if text.startswith("INSERT") and text.endswith("RETURNING request_id"))
    repository = ast.parse(wheel.read("litellm/repositories/table_repositories.py"))
    (delivery,) = (text for text in strings(repository) if text.startswith('INSERT INTO "LiteLLM_SpendLogDelivery"'))
    insert = insert.replace("{columns}", ", ".join(f'"{column}"' for column in columns))
    return json.dumps({"spend_log": insert, "delivery": delivery}, indent=1) + "\n"


LOGS = "management_endpoints/management_v1/spend_logs.py"
SESSIONS = "spend_tracking/session_page.py"
PAGE = [  # a page of 50 sessions, the newest first
    ("SESSION_KEY_EXPR", None), ("outcome_columns", ""),
    ("""f'ORDER BY "startTime" DESC LIMIT {size}' if size is not None else ''""", 'ORDER BY "startTime" DESC LIMIT 10002'),
    ("_sessions_sql(request, status_index)",
     'SELECT session_key, api_key, MAX("startTime") AS last_activity FROM scanned GROUP BY session_key, api_key'),
    ("after_cursor", ""), ("direction", "DESC"), ("page_rows", "51"), ("skip", ""),
]


def logs_page(wheel: zipfile.ZipFile) -> str:
    """What the Logs page asks, as JSON: the session page by one filter or another, the count of the search box, the list of
    end users. Each has what its parameters are."""
    sources = {file: wheel.read(f"litellm/proxy/{file}").decode() for file in (SESSIONS, SPEND, LOGS)}
    trees = {file: ast.parse(source) for file, source in sources.items()}

    # The pieces are LiteLLM's own: each is found in its source.
    def own(file: str, text: str, **holes: str) -> str:
        assert text in sources[file].replace('\\"', '"'), f"{file}: {text}"
        for expression, value in holes.items():
            text = text.replace(f"{{{expression}}}", value)
        return text

    window = " AND ".join(
        own(SPEND, f"\"startTime\" {operator} (${{p}}::timestamptz AT TIME ZONE 'UTC')", p=p)
        for operator, p in ((">=", "1"), ("<=", "2")))
    equals = [("team", "team_id"), ("user", '"user"')]
    filters = {name: own(SPEND, "{sql_col} = ${p}", sql_col=column, p="3") for name, column in equals} | {
        "error_code": own(SPEND, "metadata->'error_information'->>'error_code' = ${p}", p="3"),
        "key_alias": own(SPEND, "metadata->>'user_api_key_alias' LIKE ${p}", p="3"),
    }
    holes = dict(PAGE) | {"SESSION_KEY_EXPR": constant(trees[SESSIONS], "SESSION_KEY_EXPR")}
    assert holes["_sessions_sql(request, status_index)"] in sources[SESSIONS]

    def page(where: str) -> str:
        return query(trees[SESSIONS], Report("page", SESSIONS, "_sql_reader", "", holes | {"where_clause": where}))

    found = {f"page.{name}": (page(f"{window} AND {condition}"), ["from", "to", name]) for name, condition in filters.items()}
    found["page"] = (page(window), ["from", "to"])

    search = next(s for s in trees[SPEND].body if defines(s) == "_build_spend_log_search_condition")
    (condition,) = (text for text in strings(search) if text.startswith("(request_id"))
    for name, parameter in (("raw", "$1"), ("window_start", "$2"), ("window_end", "$3")):
        condition = condition.replace(f"{{{name}}}", parameter)
    count = {"joined_conditions": condition, "count_group_clause": "", "p": "4"}
    found["search"] = (query(trees[SPEND], Report("search", SPEND, "ui_view_spend_logs", "bounded_matches", count)),
                       ["call_id", "from", "to", "count cap"])

    facet = next(s for s in trees[LOGS].body if defines(s) == "_list_spend_log_facet")
    parts = [own(LOGS, text, column_sql="end_user") for text in (
        "\"startTime\" >= ($1::timestamptz AT TIME ZONE 'UTC')", "\"startTime\" <= ($2::timestamptz AT TIME ZONE 'UTC')",
        "{column_sql} IS NOT NULL", "{column_sql} != ''")]
    ends = {"column_sql": "end_user", "' AND '.join(where_parts)": " AND ".join(parts), "scan_idx": "3",
            "scan_idx + 1": "4", "scan_idx + 2": "5"}
    (end_users,) = (text for text in strings(facet) if text.startswith("SELECT DISTINCT"))
    for name, value in ends.items():
        end_users = end_users.replace(f"{{{name}}}", value)
    found["end_users"] = (end_users, ["from", "to", "scan cap", "page", "offset"])
    assert not any("{" in sql for sql, _ in found.values()), found
    return json.dumps(found, indent=1) + "\n"


def constant(tree: ast.Module, name: str) -> str:
    (value,) = (node.value for node in tree.body if defines(node) == name)
    return joined(value)


def joined(node: ast.AST) -> str:
    """A sum of strings; what is none is its expression in braces."""
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return joined(left) + joined(right)
        case ast.Constant(value=str(text)):
            return text
    return f"{{{ast.unparse(node)}}}"


def query(tree: ast.Module, report: Report) -> str:
    """The one query of the report's holder that has its words, with the f-string's holes filled."""
    holders = [node for node in tree.body if defines(node) == report.holder]
    found = [
        text
        for holder in holders for text in strings(holder)
        if re.search(r'\bSELECT\b.*\bFROM\s+"', text, re.S) and report.words in " ".join(text.split())
    ]
    assert len(found) == 1, f"{report.name}: {len(found)} queries"
    sql = textwrap.dedent(found[0]).strip().rstrip(";")
    for expression, value in report.holes.items():
        assert f"{{{expression}}}" in sql, f"{report.name}: no {expression}"
        sql = sql.replace(f"{{{expression}}}", value)
    for constant in tree.body:
        if f"{{{defines(constant)}}}" in sql:
            sql = sql.replace(f"{{{defines(constant)}}}", joined(constant.value))
    assert "{" not in sql, f"{report.name}: a hole is not filled"
    return sql


def defines(node: ast.stmt) -> str | None:
    """What a statement of a module gives a name to."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return name
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
    return None


def strings(node: ast.AST) -> Iterator[str]:
    """The strings in a piece of code; what is put into one is its expression in braces."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.BinOp(op=ast.Add()):
            yield joined(node)
        case ast.JoinedStr(values=parts):
            yield "".join(p.value if isinstance(p, ast.Constant) else f"{{{ast.unparse(p.value)}}}" for p in parts)
        case _:
            for child in ast.iter_child_nodes(node):
                yield from strings(child)


def write_texts() -> None:
    names = ("migrations.sql", "views.sql", "reports.json", "1.110.sql", "1.110.json", "logs_page.json",
             "prisma/schema.prisma")
    outputs = [OUT / name for name in names]
    script_time = Path(__file__).stat().st_mtime
    if all(o.exists() and o.stat().st_mtime > script_time for o in outputs):
        return

    print(f"fetching LiteLLM's schema and queries ({PROXY_EXTRAS}, {LITELLM}, {LITELLM_1_110})", flush=True)
    with tempfile.TemporaryDirectory() as older, tempfile.TemporaryDirectory() as newer:
        extras, litellm = download(PROXY_EXTRAS, Path(older)), download(LITELLM, Path(older))
        newest = download(LITELLM_1_110, Path(newer))
        assert views(newest) == views(litellm), "LiteLLM 1.110 makes other views"
        texts = [
            migrations(extras),
            views(litellm),
            with_changed(reports(litellm), reports(newest)),
            push(newest, ["LiteLLM_SpendLogs", "LiteLLM_SpendLogDelivery"]),
            statements(newest),
            logs_page(newest),
            client_schema(newest),
        ]
    (OUT / "prisma").mkdir(parents=True, exist_ok=True)
    for output, text in zip(outputs, texts):
        output.write_text(text)


def main() -> None:
    write_texts()
    install_prisma()


if __name__ == "__main__":
    main()

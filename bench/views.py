#!/usr/bin/env python3
"""What each of LiteLLM's seven spend views costs, warm, as a simple statement, at the client until it has all rows.

    ours           the view after attach, with 0 and with 100 rows in the tail
    LiteLLM        LiteLLM's own definition, in another schema
    materialized   the same rows, stale, with a unique index

    whole    SELECT * FROM the view
    asked    as LiteLLM's dashboard asks for one key, one user, 10 models, 30 days of tags

470,000 rows, of many keys, users, models, tags and end users. With either tail all rows of ours are compared with
LiteLLM's.
"""

import math
import re
from typing import NamedTuple

import harness
import view
from harness import QUICK, Results, say

RUNS = 2 if QUICK else 5
STATEMENTS = 6 if QUICK else 40
STATEMENTS_LITELLM = 3
TAILS = [0, 100]

SCHEMAS = {"ours": "public", "LiteLLM": "bench_litellm", "materialized": "bench_materialized"}


class View(NamedTuple):
    key: str  # the columns that tell its rows apart
    asked: str = ""  # what LiteLLM's dashboard adds to SELECT * FROM the view


VIEWS = {
    "MonthlyGlobalSpend": View("date", "ORDER BY date"),
    "MonthlyGlobalSpendPerKey": View("api_key, date", "WHERE api_key = '{api_key}' ORDER BY date"),
    "MonthlyGlobalSpendPerUserPerKey": View('"user", api_key, date', "WHERE \"user\" = '{user}' ORDER BY date"),
    "Last30dKeysBySpend": View("api_key", "LIMIT 10"),
    "Last30dModelsBySpend": View("model", "LIMIT 10"),
    "DailyTagSpend": View(
        "individual_request_tag, spend_date",
        "WHERE spend_date >= CURRENT_DATE - 30 AND spend_date <= CURRENT_DATE ORDER BY total_spend DESC"),
    "Last30dTopEndUsersSpend": View("end_user"),
}

# So that LiteLLM finds the names of its keys.
NAME_KEYS = """
INSERT INTO "LiteLLM_VerificationToken" (token, key_name, key_alias)
SELECT DISTINCT ON (api_key) api_key, 'sk-...' || right(api_key, 4), metadata ->> 'user_api_key_alias'
FROM "LiteLLM_SpendLogs" ORDER BY api_key
"""


def queries(busiest):
    """(view, query): SQL with a hole for the schema."""
    for name, spend_view in VIEWS.items():
        whole = f'SELECT * FROM {{schema}}."{name}"'
        yield (name, "whole"), whole
        if spend_view.asked:
            yield (name, "asked"), f"{whole} {spend_view.asked.format(**busiest, schema='{schema}')}"


def make_theirs(session):
    """LiteLLM's definitions as it writes them, under the same names, and their results."""
    statements = (harness.ROOT / "target/litellm/views.sql").read_text().split(";")
    theirs, materialized = SCHEMAS["LiteLLM"], SCHEMAS["materialized"]
    session.run(f"CREATE SCHEMA {theirs}; CREATE SCHEMA {materialized}")
    for name, spend_view in VIEWS.items():
        (create,) = (s for s in statements if re.search(rf'VIEW\s+"{name}"', s))
        session.run(create.replace(f'"{name}"', f'{theirs}."{name}"', 1))
        session.run(f'CREATE MATERIALIZED VIEW {materialized}."{name}" AS SELECT * FROM {theirs}."{name}"')
        session.run(f'CREATE UNIQUE INDEX ON {materialized}."{name}" ({spend_view.key})')


def prepare(session):
    session.run(NAME_KEYS)
    make_theirs(session)
    view.prepare(session)
    session.run("VACUUM (ANALYZE)")
    (api_key, user), = session.rows(
        'SELECT mode() WITHIN GROUP (ORDER BY api_key), mode() WITHIN GROUP (ORDER BY "user") FROM "LiteLLM_SpendLogs"')
    return dict(queries({"api_key": api_key.decode(), "user": user.decode()}))


def measure(results, run, session, what, sql, variant, statements):
    name, query = what
    sql = sql.format(schema=SCHEMAS[variant.split()[0]])
    session.median_ms(sql, statements // 3)  # warm
    client = session.median_ms(sql, statements)
    results.add(run, f"{name} {variant}", query, client, "ms")
    return client


def check_equal(session, name):
    """All rows but for the order; sums of floating-point numbers but for their last digits."""
    ours, theirs = (table(session, name, SCHEMAS[variant]) for variant in ("ours", "LiteLLM"))
    if ours.keys() != theirs.keys() or not all(math.isclose(ours[k], theirs[k], rel_tol=1e-9) for k in ours):
        raise RuntimeError(f"{name} differs from LiteLLM's own: {len(ours)} and {len(theirs)} rows")
    return len(ours)


def table(session, name, schema):
    """Rows without their spend: the spend."""
    spend = "spend" if name.startswith("Monthly") else "total_spend"
    rows = session.rows(f'SELECT {spend}, to_jsonb(v) - \'{spend}\' FROM {schema}."{name}" AS v')
    return {row: float(amount) for amount, row in rows}


def one_run(results, run, session, asked):
    shown = {}
    for tail in harness.rotated(TAILS, run):
        view.set_tail(session, tail)
        for what, sql in harness.rotated(list(asked.items()), run):
            variants = [(f"ours tail {tail}", STATEMENTS)]
            if tail == 0:
                variants += [("materialized", STATEMENTS), ("LiteLLM", STATEMENTS_LITELLM)]
            for variant, statements in variants:
                shown[what, variant] = measure(results, run, session, what, sql, variant, statements)
        for name in VIEWS:
            rows = check_equal(session, name)
            results.add(run, f"{name} ours tail {tail}", "rows", rows, "rows")
    results.write()
    if run > 0:
        for what in asked:
            ours, materialized, litellm = (shown[what, v] for v in ("ours tail 100", "materialized", "LiteLLM"))
            say(f"run {run} of {RUNS}: {' '.join(what)}: ours {ours:.3g} ms, materialized {materialized:.3g} ms,"
                f" LiteLLM {litellm:.3g} ms: {litellm / ours:.0f} times")


def main():
    results = Results("views")
    with harness.clone(harness.loaded("many", harness.ROWS, many=True), "views") as (session,):
        asked = prepare(session)
        session.run("CHECKPOINT")
        for run in range(RUNS + 1):
            one_run(results, run, session, asked)
    harness.drop("many")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes SUMMARY.md beside the raw CSVs: medians, extremes, and the ratios that the numbers are for. Prints it too.

A ratio is taken within each run, then its median and extremes over the runs.
"""

import csv
import statistics
from collections import defaultdict

import capture
import citus
import citus_dashboard
import groups
import idle
import late
import logs_page
import merge
import pipeline
import views
import whole
from harness import QUICK, RESULTS

SIZES = ["1 row", "100 rows", "100 rows, parsed anew", "100 rows of 9 kB metadata", "100 rows, LiteLLM 1.110", "1000 rows"]
TEN = ", ten times the rows"

TITLES = {
    "view": 'SELECT SUM(spend) FROM "MonthlyGlobalSpend", 470,000 rows (ten times: 4.7 million)',
    "views": "Each of LiteLLM's views, 470,000 rows, at the client",
    "capture": "Capture and merge, per row inserted",
    "whole": "All that a server pays: 100 rows a statement, until all is merged; with and without the reports",
    "idle": "A worker that has nothing to do",
    "months": "Disk of a year of requests, month by month",
    "stall": "A single-row insert beside a write transaction that stays open for 20 s",
    "backfill": "Attach and backfill of 470,000 rows",
    "merge": f"Merge of {merge.ROWS:,} page views into {merge.ROWS // 10:,} groups, or 100",
    "groups": f"Merge of {groups.ROWS:,} page views by the number of groups",
    "late": f"{late.LATE:,} late rows over ten old minutes, and a tail of {late.TAIL:,} rows, on {late.ROWS:,}",
    "pipeline": f"Two connections COPY {pipeline.ROWS:,} page views, merged beside them into a million groups",
    "citus": f"The same on a cluster of Citus, three servers on this machine: {citus.ROWS:,} page views",
    "citus_dashboard": f"The views of a site by minute, of {citus_dashboard.GROUPS:,} groups on a cluster of Citus, at the client",
    "convert": "spend_partition_convert(), and what others wait for it",
    "expire": "Expiry of a day of 100,000 rows",
    "partitioned": "Inserts of 100 rows into the partitioned and the plain table, both captured",
    "logs_page": f"LiteLLM's Logs page on {logs_page.ROWS:,} rows, with our indexes and without, and what inserts pay for them",
}

GIGABYTES = ["0.1 GB", "1 GB", "10 GB"]

# Scenario: metric, variants of the numerator (added up), variant of the denominator.
RATIOS = {
    "view": [
        *(("client", [f"view tail {n}"], "materialized view") for n in (0, 100, 1000)),
        *(("client", [f"function tail {n}"], "materialized view") for n in (0, 100, 1000)),
        *(("client", ["LiteLLM"], f"view tail {n}") for n in (0, 100, 1000)),
        *(("client", [f"view tail {n}{TEN}"], f"view tail {n}") for n in (0, 100, 1000)),
    ],
    "views": [
        (query, [f"{view} {above}"], f"{view} {below}")
        for above, below in (("LiteLLM", "ours tail 100"), ("ours tail 100", "materialized"))
        for query in ("whole", "asked") for view in views.VIEWS
    ],
    "capture": [
        *((metric, [f"{size} attached"], f"{size} plain") for size in SIZES for metric in ("cpu", "wall", "wal")),
        *((metric, [f"{size} attached", f"{size} merge"], f"{size} plain") for size in SIZES for metric in ("cpu", "wal")),
        *((metric, [f"{size} {ivm.name}"], f"{size} plain")
          for ivm in capture.IVMS for size in SIZES for metric in ("cpu", "wall", "wal")),
        *((metric, [f"{size} attached", f"{size} merge"], f"{size} {capture.IVMS[-1].name}")
          for size in SIZES for metric in ("cpu", "wal")),
    ],
    "whole": [
        (metric, [f"{kind} {variant}"], f"{kind} plain")
        for variant in whole.ATTACHED for kind in whole.KINDS for metric in ("cpu", "wal", "disk")
    ],
    "idle": [("cpu", [f"{variant}, {idle.LATER}"], f"{variant}, {idle.FIRST}") for variant in whole.ATTACHED],
    "months": [("disk", [f"month {month}: {what}"], f"month {month}: spend log")
               for what in ("by default", "reports", "reports, hours for 90 days")
               for month in ("01", "06", "12")],
    "stall": [(metric, [variant], "plain") for variant in ("ours", "lock") for metric in ("longest", "p99.9", "median")],
    "backfill": [("attach + backfill", ["ours"], "scan")],
    "merge": [
        (metric, [f"{case}: {above}"], f"{case}: {below}")
        for _, cases in merge.CASES for case in cases
        for above, below in (("ours", "plain"), ("ours", "plain, windows"), ("ours, one window", "plain"))
        for metric in ("time", "cpu")
    ],
    "groups": [
        (metric, [f"{count} groups: {ours}"], f"{count} groups: article")
        for ours in ("ours", "ours, in SQL") for metric in ("time", "cpu") for count in groups.GROUPS
    ],
    "late": [
        *((metric, ["late: ours"], "late: article") for metric in ("visible", "merged")),
        *(("client", [f"tail {what}: ours"], f"tail {what}: raw") for what in late.SHOWN),
    ],
    "pipeline": [
        *((metric, ["ours"], other) for other in ("article", "pg_incremental", "TimescaleDB")
          for metric in ("end to end", "longest lag", "merge cpu", "cpu", "memory")),
        ("end to end", ["ours"], pipeline.PgIvm().name),
        *(("ingest", [variant], "ingest alone")
          for variant in ("ours", "article", "pg_incremental", "TimescaleDB", pipeline.PgIvm().name)),
    ],
    "citus": [
        *((metric, ["ours"], below) for below in ("article", "single node")
          for metric in ("end to end", "longest lag", "cpu", "dashboard")),
        *(("ingest", [variant], "ingest alone") for variant in ("ours", "article")),
    ],
    "citus_dashboard": [
        *((metric, [f"by page, {question}"], f"by minute, {question}")
          for question in citus_dashboard.QUESTIONS for metric in ("table", "live")),
    ],
    "convert": [
        *(("time", [f"{size}: ours, swap"], "0.1 GB: ours, swap") for size in GIGABYTES[1:]),
        *(("longest wait", [f"{size}: ours, swap"], "0.1 GB: ours, swap") for size in GIGABYTES[1:]),
        *(("longest wait", [f"{size}: {way}"], f"{size}: ours, in all") for way in ("copy", "script", "nothing")
          for size in GIGABYTES),
    ],
    "expire": [
        *((metric, [way], "drop") for way in ("row by row", "LiteLLM") for metric in ("time", "wal")),
        ("time", ["row by row"], "LiteLLM"),
    ],
    "partitioned": [(metric, ["partitioned"], "plain") for metric in ("rate", "cpu", "wall", "wal")],
    "logs_page": [
        *((metric, [f"{table}, {query}: before"], f"{table}, {query}: after")
          for table in ("plain", "partitioned") for query in logs_page.QUERIES for metric in ("blocks", "time")),
        *((metric, [f"inserts, {variant}"], "inserts, none")
          for variant in (*logs_page.INDEXES, "all") for metric in ("cpu", "wal")),
        *((metric, [f"inserts, partitioned, all on {where}"], "inserts, partitioned, none")
          for where in ("closed", "all") for metric in ("cpu", "wal")),
    ],
}


def read(scenario):
    """(variant, metric): {run: value}; metric: unit; commits. In the order of the file, but for the runs."""
    values, units, commits = defaultdict(dict), {}, {}
    with open(RESULTS / f"{scenario}.csv", newline="") as file:
        for record in csv.DictReader(file):
            values[record["variant"], record["metric"]][int(record["run"])] = float(record["value"])
            units[record["metric"]] = record["unit"]
            if record.get("commit"):  # older files do not say
                commits[record["commit"]] = True
    return values, units, list(commits)


def number(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def spread(values):
    middle, least, most = statistics.median(values), min(values), max(values)
    if len(values) == 1:
        return number(middle)
    return f"**{number(middle)}** ({number(least)}–{number(most)})"


def table(heads, rows):
    yield "| " + " | ".join(heads) + " |"
    yield "| --- |" + " ---: |" * (len(heads) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def medians(values, units):
    cells = {key: spread(list(runs.values())) for key, runs in values.items()}
    variants = sorted({variant for variant, _ in values})
    yield from table(
        ["", *(f"{metric}, {unit}" for metric, unit in units.items())],
        ([variant, *(cells.get((variant, metric), "") for metric in units)] for variant in variants))


def ratios(scenario, values):
    for metric, above, below in RATIOS[scenario]:
        series = [values[variant, metric] for variant in (*above, below)]
        runs = {run for run in set.intersection(*(set(s) for s in series)) if series[-1][run]}  # no lag: no ratio
        if runs:
            found = [sum(s[run] for s in series[:-1]) / series[-1][run] for run in sorted(runs)]
            yield [f"{metric}: {' + '.join(above)} / {below}", spread(found)]


def summary():
    yield "# Measured" + (" (QUICK: tiny sizes, the numbers mean nothing)" if QUICK else "")
    yield from ("", "Written by `bench/run`. Median (least–most) of the counted runs; the raw numbers are beside this file.", "")
    yield from ("```", (RESULTS / "machine.txt").read_text().rstrip(), "```")
    for scenario, title in TITLES.items():
        if not (RESULTS / f"{scenario}.csv").exists():
            continue
        values, units, commits = read(scenario)
        count = max(len(runs) for runs in values.values())
        of = f", commit {', '.join(commits)}" if commits else ""
        yield from ("", f"## {title}", "", f"`bench/{scenario}.py`, {count} runs{of}.", "")
        yield from medians(values, units)
        yield ""
        yield from table(["ratio", "times"], ratios(scenario, values))


def main():
    text = "\n".join(summary()) + "\n"
    (RESULTS / "SUMMARY.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Draws what bench/run has measured: SVG files beside the CSVs. Lines differ by their marks, not only by colour."""

import csv
import statistics
from collections import defaultdict

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "litellm_spend", "font.size": 10})

import matplotlib.pyplot as plt  # noqa: E402: the backend comes first
from harness import RESULTS  # noqa: E402

MARKS = ["o-", "s--", "^:", "D-.", "v-"]


def records(name):
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def medians(scenario, metric):
    """{variant: median}"""
    values = defaultdict(list)
    for record in records(scenario):
        if record["metric"] == metric:
            values[record["variant"]].append(float(record["value"]))
    return {variant: statistics.median(found) for variant, found in values.items()}


def draw(name, title, x, y, lines, logarithmic=""):
    """`lines`: {label: [(x, y)]}, those without points left out."""
    lines = {label: points for label, points in lines.items() if points}
    if not lines:
        return
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for mark, (label, points) in zip(MARKS, lines.items()):
        axes.plot(*zip(*sorted(points)), mark, label=label, markersize=4, linewidth=1)
    for axis in logarithmic:
        getattr(axes, f"set_{axis}scale")("log")
    if "y" not in logarithmic:
        axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def insert_cost():
    sizes, cpu = {"1 row": 1, "100 rows": 100, "1000 rows": 1000}, medians("capture", "cpu")
    lines = {"without us": [], "captured": [], "captured and merged into one rollup": []}
    for size, rows in sizes.items():
        plain, attached, merged = (cpu.get(f"{size} {variant}") for variant in ("plain", "attached", "merge"))
        if None not in (plain, attached, merged):
            for points, value in zip(lines.values(), (plain, attached, attached + merged)):
                points.append((rows, value))
    draw("capture", "What an insert costs", "rows in a statement", "CPU a row, µs", lines, "xy")


def view_latency():
    client = medians("view", "client")
    lines = {"ours, 470,000 rows in the log": "view tail {}", "ours, 4.7 million": "view tail {}, ten times the rows",
             "materialized view (stale)": "materialized view", "LiteLLM's own view": "LiteLLM"}
    tails = [0, 100, 1000]
    draw("view", 'SELECT SUM(spend) FROM "MonthlyGlobalSpend"', "rows in the tail", "time at the client, ms",
         {label: [(tail, client[variant.format(tail)]) for tail in tails if variant.format(tail) in client]
          for label, variant in lines.items()}, "y")


def merge_by_groups():
    lines = defaultdict(list)
    for variant, rate in medians("groups", "rate").items():
        case, variant = variant.split(": ")
        lines[variant].append((int(case.split()[0]), rate / 1e6))
    draw("groups", "A merge of five million rows", "groups", "million rows a second", lines, "x")


def pipeline_lag():
    """Of each variant the run that took the median time."""
    moments = defaultdict(lambda: defaultdict(list))
    for record in records("pipeline_lag"):
        point = tuple(float(record[column]) for column in ("seconds", "lag", "merged"))
        moments[record["variant"]][record["run"]].append(point)
    lag, merged = {}, {}
    for variant, runs in moments.items():
        run = sorted(runs.values(), key=lambda points: points[-1][0])[len(runs) // 2]
        lag[variant] = [(seconds, behind) for seconds, behind, _ in run]
        merged[variant] = [(seconds, rows / 1e6) for seconds, _, rows in run]
    title = "Two connections COPY, a third process merges"
    draw("pipeline_lag", title, "seconds since the beginning", "lag, s", lag)
    draw("pipeline", title, "seconds since the beginning", "million rows merged", merged)


def disk_by_month():
    lines = defaultdict(list)
    for record in records("months"):
        month, what = record["variant"].removeprefix("month ").split(": ")
        lines[what].append((int(month), float(record["value"])))
    log = dict(lines.pop("spend log", []))
    labelled = {"spend log, all of it": list(log.items()),
                "spend log, the last 30 days": [(month, size - log.get(month - 1, 0)) for month, size in log.items()],
                "rollups of the reports": lines["reports"],
                "rollups of the reports, hours for 90 days": lines["reports, hours for 90 days"], "rollups by default": lines["by default"]}
    draw("months", "Disk, of 2,000 requests a day", "months", "MiB with indexes", labelled, "y")


if __name__ == "__main__":
    for plot in (insert_cost, view_latency, merge_by_groups, pipeline_lag, disk_by_month):
        plot()

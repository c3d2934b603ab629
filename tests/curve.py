# SPDX-License-Identifier: MIT
"""Accuracy over params and over complexity, from reports of `evaluate.py MODEL --json FILE`.

  pip install matplotlib
  python tests/curve.py curve.png reports/*/*.json

The reports of one folder are a line with the folder's name, and a point for each budget: the mean,
with the standard deviation if there are several. Prints the table of what it draws.
"""
import json
import sys
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

MEASURES = "mean_accuracy", "params", "complexity"


def points(paths):
    """{folder: [(accuracy, deviation, params, complexity), ...]}, the lowest budget first."""
    reports = {}
    for path in paths:
        report = json.loads(Path(path).read_text("utf-8"))
        key = Path(path).absolute().parent.name, report["budget"] or 1.0
        reports.setdefault(key, []).append([report[name] for name in MEASURES])
    curves = {}
    print(f"{'':24}budget  reports  accuracy           params  complexity")
    for (folder, budget), rows in sorted(reports.items()):
        accuracy, params, complexity = map(mean, zip(*rows))
        deviation = stdev(row[0] for row in rows) if len(rows) > 1 else 0.0
        curves.setdefault(folder, []).append((accuracy, deviation, params, complexity))
        print(f"{folder:24}{budget:6.2f}{len(rows):9}{accuracy:10.2f} ± {deviation:4.2f}"
              f"{params:10.3f}{complexity:12.3f}")
    return curves


def draw(path, curves):
    figure = Figure((11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for folder, rows in curves.items():
        accuracy, deviation, params, complexity = zip(*rows)
        for axis, x in ((left, params), (right, complexity)):
            axis.errorbar(x, accuracy, deviation, marker="o", capsize=3, label=folder)
    left.set_xlabel("params, relative to the backbone")
    right.set_xlabel("complexity, relative to the backbone")
    left.set_ylabel("mean accuracy (%)")
    left.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    draw(sys.argv[1], points(sys.argv[2:]))

"""The losses of runs, term by term: is mine normal?

    python walkthroughs/curves.py runs/decoder runs/other --out curves.png

Reads the log.jsonl that each training script writes, and draws a panel for each term that any of
the runs has logged.
"""
# %% Set-up
import argparse
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("runs", nargs="+", type=Path, help="Folders of runs.")
parser.add_argument("--out", default="curves.png", help="Picture to write (default: curves.png).")
options = parser.parse_args()
for run in options.runs:
    if not (run / "log.jsonl").is_file():
        parser.error(f"{run}/log.jsonl does not exist; name the folder of a run")

# %% The numbers that a log repeats, by step
NO_TERMS = ("step", "n", "img_per_s", "gib", "eta_h", "lr", "cut")
MOST_COLUMNS = 4


def read_log(run):
    """The records of a run's log.jsonl that belong to a step: dicts of step and terms."""
    records = []
    for line in (run / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "step" not in record:                       # flags and versions
            continue
        terms = {"step": record["step"]}
        for name, value in record.items():
            if isinstance(value, float) and name not in NO_TERMS:
                domain = record.get("domain")          # the source of a mixture that it is about
                terms[f"{name} {domain}" if domain else name] = value
        records.append(terms)
    return records


logs = {run: read_log(run) for run in options.runs}
terms = []
for records in logs.values():
    for record in records:
        for name in record:
            if name != "step" and name not in terms:
                terms.append(name)
if not terms:
    parser.error(f"{options.runs[0]} has logged no step so far")

# %% A panel each
columns = min(MOST_COLUMNS, len(terms))
rows = math.ceil(len(terms) / columns)
figure, panels = plt.subplots(rows, columns, squeeze=False, layout="constrained",
                              figsize=(3.2 * columns, 2.4 * rows))
for panel, term in zip(panels.flat, terms, strict=False):
    for run, records in logs.items():
        steps = [record["step"] for record in records if term in record]
        values = [record[term] for record in records if term in record]
        panel.plot(steps, values, ".-", label=str(run))
    panel.set_title(term, fontsize=10)
for panel in panels.flat[len(terms):]:
    panel.axis("off")
if len(logs) > 1:
    lines, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center")
figure.savefig(options.out, dpi=80)

# %% The last value of each term
for run, records in logs.items():
    last = {}
    for record in records:
        last |= record
    values = [f"{term} {last[term]:.4g}" for term in terms if term in last]
    print(f"{run}: {', '.join(values)}")

"""The losses of runs, term by term: is mine normal?

    python walkthroughs/curves.py runs/decoder runs/other --out curves.png
Reads the log.jsonl that each training script writes; one panel for each term that any of the runs has.
"""
# %% Set-up
import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
parser.add_argument("--out", default="curves.png")
options = parser.parse_args()
if missing := [run for run in options.runs if not (run / "log.jsonl").is_file()]:
    parser.error(f"{missing[0]}/log.jsonl does not exist; name the folder of a run")

# %% The numbers that a log repeats, by step
LEFT_OUT = {"step", "n", "img_per_s", "gib", "eta_h", "lr", "cut"}
runs = {}
for run in options.runs:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    runs[run] = [{f"{k} {r['domain']}" if r.get("domain") and k != "step" else k: v for k, v in r.items()
                  if isinstance(v, float) or k == "step"} for r in rows if "step" in r]
terms = [*dict.fromkeys(k for rows in runs.values() for r in rows for k in r if k not in LEFT_OUT)]

if not terms:
    parser.error(f"{options.runs[0]} has logged no step so far")

# %% A panel each
columns = min(4, len(terms))
figure, panels = plt.subplots(-(-len(terms) // columns), columns, squeeze=False, layout="constrained",
                              figsize=(3.2 * columns, 2.4 * -(-len(terms) // columns)))
for panel, term in zip(panels.flat, terms):
    for run, rows in runs.items():
        points = [(r["step"], r[term]) for r in rows if term in r]
        panel.plot(*zip(*points) if points else ([], []), ".-", label=str(run))
    panel.set_title(term, fontsize=10)
for panel in panels.flat[len(terms):]:
    panel.axis("off")
len(runs) > 1 and figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center")
figure.savefig(options.out, dpi=80)
last = {str(run): {k: v for r in rows for k, v in r.items()} for run, rows in runs.items()}
for run, ends in last.items():
    print(f"{run}: " + ", ".join(f"{k} {ends[k]:.4g}" for k in terms if k in ends))

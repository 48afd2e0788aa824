"""The losses of runs, term by term: is mine normal?

    python walkthroughs/curves.py runs/decoder runs/other --out curves.png

Reads the log.jsonl that each training script writes, and draws a panel for each term that any of
the runs has logged.
"""
# %% Set-up
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt

import runtime
import sample

# Numbers that a log repeats and that are no terms of a loss.
NO_TERMS = ("step", "n", "img_per_s", "gib", "eta_h", "lr", "cut")
MOST_COLUMNS = 4
# Numbers beyond these can't be drawn on one axis.
MOST_STEPS = 10 ** 12
LARGEST = 1e30


def parse_args(argv=None):
    p = runtime.Parser(__doc__, {})
    p.add_argument("runs", nargs="+", type=Path, help="Folders of runs.")
    p.add_argument("--out", default="curves.png", help="Picture to write.")
    return p.parse_args(argv)


# %% The terms of each run, by step
def read_records(path):
    """The records of a log.jsonl that belong to a step: dicts.

    Lines that are cut short, as by a full disk, or of another program are passed over and counted.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name the folder of a run")
    records = []
    foreign = 0
    for line in path.read_text("utf-8", errors="replace").splitlines():
        record = runtime.read_record(line)
        if record is None:
            foreign += 1
        elif 0 < record.get("step", 0) < MOST_STEPS:   # others have flags and versions
            records.append(record)
    if foreign:
        print(f"{path}: {foreign} lines are no records of a log, and passed over")
    if not records:
        raise ValueError(f"{path} has logged no step so far; wait for the run's first lines")
    return records


def terms_of(record):
    """The terms of a loss in a record: a dict of name -> value."""
    terms = {}
    for name, value in record.items():
        if isinstance(value, float) and abs(value) < LARGEST and name not in NO_TERMS:
            domain = record.get("domain")              # the source of a mixture that it is about
            name = f"{name} {domain}" if domain else name
            terms[ascii(name)[1:-1]] = value           # what every font and terminal has
    return terms


def curves_of(records):
    """For each term, its (step, value) points: a dict of lists."""
    curves = {}
    for record in records:
        for term, value in terms_of(record).items():
            curves.setdefault(term, []).append((record["step"], value))
    return curves


# %% A panel each
def draw_panels(path, curves_of_runs):
    """Draw a panel for each term of any run. curves_of_runs: run -> its curves."""
    terms = list(dict.fromkeys(term for curves in curves_of_runs.values() for term in curves))
    if not terms:
        raise ValueError("the runs have logged no term that is a finite number so far")
    columns = min(MOST_COLUMNS, len(terms))
    rows = math.ceil(len(terms) / columns)
    figure, panels = plt.subplots(rows, columns, squeeze=False, layout="constrained",
                                  figsize=(3.2 * columns, 2.4 * rows))
    for panel, term in zip(panels.flat, terms, strict=False):
        for run, curves in curves_of_runs.items():
            points = curves.get(term, [])
            steps, values = [step for step, _ in points], [value for _, value in points]
            panel.plot(steps, values, ".-", label=str(run))
        panel.set_title(term.replace("$", r"\$"), fontsize=10)     # $ would start a formula
    for panel in panels.flat[len(terms):]:
        panel.axis("off")
    if len(curves_of_runs) > 1:
        lines, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center")
    suffix = Path(path).suffix.lower()
    runtime.write_whole(path, lambda f: figure.savefig(f, dpi=80, format=suffix[1:]))


def main(options):
    runtime.check_out(options.out)
    runtime.check_suffix(options.out, sample.PICTURES)
    curves_of_runs = {run: curves_of(read_records(run / "log.jsonl")) for run in options.runs}
    draw_panels(options.out, curves_of_runs)
    for run, curves in curves_of_runs.items():
        values = [f"{term} {points[-1][1]:.4g}" for term, points in curves.items()]
        print(f"{run}: {', '.join(values)}")


if __name__ == "__main__":
    runtime.run(main, parse_args)

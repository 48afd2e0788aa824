"""What the lessons share: how they are run, their figures, their numbers, and their longer sweeps.

    python walkthroughs/03_width.py             the lesson as in class, at most 5 minutes on 2 cores
    python walkthroughs/03_width.py --full      its longer sweeps as well; writes their results
    python walkthroughs/03_width.py --quick     everything tiny, in seconds; its numbers mean little

A lesson is also a notebook: its cells begin with `# %%`. There, no flags are read.
"""
import argparse
import io
import json
import platform
import sys
import time
import warnings
from datetime import date
from pathlib import Path
from textwrap import wrap

import matplotlib
import numpy as np
import torch
from PIL import Image

warnings.filterwarnings("ignore", message="IProgress")         # of tqdm, in a bare notebook

import progress  # noqa: E402
import runtime  # noqa: E402
import storage  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
IS_NOTEBOOK = "ipykernel" in sys.modules
if not IS_NOTEBOOK:
    matplotlib.use("Agg")                              # figures go to files, without a window

import matplotlib.pyplot as plt  # noqa: E402

# Colours that people with any kind of colour blindness can tell apart.      Source: Okabe and Ito
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
plt.rcParams.update({
    "axes.prop_cycle": plt.cycler(color=COLOURS), "font.size": 13, "figure.dpi": 100,
    "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3,
    "axes.spines.top": False, "axes.spines.right": False})


class Lesson:
    """A lesson in progress. Its first line is `lesson = Lesson("03_width")`.

    device: where models go. quick: everything is tiny, for a test. full: make the long sweeps.
    folder: of its figures, numbers and runs.
    """
    def __init__(self, name):
        self.name = name
        if not IS_NOTEBOOK:
            sys.excepthook = end_in_one_line
        flags = self.read_flags()
        storage.check_out(flags.out)
        self.quick, self.full = flags.quick, flags.full
        self.folder = flags.out / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start = time.time()
        self.numbers = {}
        if self.quick:                                 # to lay out panels takes a second a figure
            plt.rcParams["figure.constrained_layout.use"] = False
        _, _, self.device = runtime.setup()
        torch.manual_seed(0)

    def read_flags(self):
        p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
        p.add_argument("--full", action="store_true", help="Make the longer sweeps as well.")
        p.add_argument("--quick", action="store_true", help="Everything tiny, to see that it runs.")
        p.add_argument("--out", type=Path, default=ROOT / "runs/lessons",
                       help="Folder of figures, numbers and runs (default: runs/lessons).")
        return p.parse_args([] if IS_NOTEBOOK else None)

    def size(self, usual, quick):
        """A number of steps or images: the usual one, or with --quick that of a test."""
        return quick if self.quick else usual

    # ------------------------------------------------------------------------ figures and numbers
    def show(self, figure, name, caption):
        """Write a figure under its caption to a .png file; in a notebook, show it too.

        The caption says what is drawn and n; the command and the time are added.
        """
        seconds = time.time() - self.start
        command = f"python walkthroughs/{self.name}.py"
        text = "\n".join([*wrap(caption, 10 * int(figure.get_figwidth())),
                          f"{command}, {seconds:.0f} s"])
        figure.text(0, -0.03, text, va="top", fontsize=11, color="dimgrey")
        drawn = io.BytesIO()
        figure.savefig(drawn, bbox_inches="tight", dpi=self.size(100, quick=20))
        plt.close(figure)
        # A palette takes a third of the bytes. Pillow's default one makes red crimson.
        picture = Image.open(drawn).convert("RGB")
        picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
        path = self.folder / f"{name}.png"
        storage.write_whole(path, lambda f: picture.save(f, "png", optimize=True))
        print(f"figure: {shown_path(path)}")
        if IS_NOTEBOOK:
            from IPython.display import Image as ShownImage
            from IPython.display import display
            display(ShownImage(filename=path))

    def number(self, name, value, low, high, quick=None):
        """Print a number beside what to expect, from low to high. quick: (low, high) of --quick."""
        if self.quick and quick is not None:
            low, high = quick
        is_expected = bool(low <= value <= high)
        verdict = "as expected" if is_expected else "NOT as expected"
        print(f"number: {name} = {value:.4g}, {verdict} ({low:g} to {high:g})")
        self.numbers[name] = dict(value=float(value), low=low, high=high, is_expected=is_expected)

    def end(self):
        """Keep the numbers in numbers.json, with the time that the lesson took."""
        seconds = time.time() - self.start
        content = storage.to_json(dict(seconds=seconds, numbers=self.numbers)).encode()
        storage.write_whole(self.folder / "numbers.json", lambda f: f.write(content))
        print(f"{self.name}: {seconds:.0f} s, figures and numbers are in "
              f"{shown_path(self.folder)}")

    # ------------------------------------------------------------------------ sweeps
    def sweep(self, name, arms, run, seeds=(0, 1, 2)):
        """The results of a long sweep: {arm: [dict of numbers for each seed]}.

        arms: list of texts. run: (arm, seed, folder) -> dict of numbers. They are read from
        walkthroughs/results/LESSON.json; --full runs all of them, and writes that file when it has
        come to the end. Runs of a stopped --full are kept and not repeated.
        """
        kept = ROOT / "walkthroughs" / "results" / f"{self.name}.json"
        partial = self.folder / f"{name}.json"
        if not self.full:
            if not kept.exists():
                raise FileNotFoundError(f"{kept} does not exist; run the lesson with --full once")
            return read_json(kept)[name]["results"]
        if self.quick:
            seeds, kept = seeds[:1], self.folder / "results.json"
        finished = read_json(partial) if partial.exists() else {}
        for seed in seeds:
            for arm in arms:
                key = f"{arm}, seed {seed}"
                if key in finished:
                    continue
                started = time.time()
                finished[key] = run(arm, seed, self.folder / name / f"{arm}_{seed}")
                finished[key]["seconds"] = time.time() - started
                print(f"{name}: {key}: {finished[key]}", flush=True)
                write_json(partial, finished)
        results = {}
        for arm in arms:
            results[arm] = [finished[f"{arm}, seed {seed}"] for seed in seeds]
        everything = read_json(kept) if kept.exists() else {}
        everything[name] = dict(
            command=f"python walkthroughs/{self.name}.py --full", date=str(date.today()),
            device=platform.machine(), torch=torch.__version__, commit=progress.git_commit(),
            seeds=list(seeds), results=results)
        write_json(kept, everything)
        partial.unlink()
        return results


def shown_path(path):
    """A path as a text, short if it lies within the project."""
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    return str(path)


def end_in_one_line(kind, error, trace):
    """What Python calls for an error that nobody has caught: those of the user have no traceback.
    """
    if issubclass(kind, KeyboardInterrupt):
        print(str(error) or "stopped; finished runs of --full are kept", file=sys.stderr)
    elif issubclass(kind, (ValueError, OSError)):
        print(f"error: {runtime.one_line(error)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def read_json(path):
    """The dict in a file that an earlier run has written. Raises ValueError with its name."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); delete it, and run --full") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dict; delete it, and run --full")
    return content


def write_json(path, content):
    text = json.dumps(content, indent=1) + "\n"
    storage.write_whole(path, lambda f: f.write(text.encode()))


# ---------------------------------------------------------------------------- training
def train(script, folder, seed=0, main_arguments=None, **flags):
    """Train by the script of a stage, with flags as of its command line. Returns OUT/last.pt.

    script: module such as train_dit. main_arguments: dict of arguments of its main, such as data.
    Raises KeyboardInterrupt if the training was stopped by Ctrl-C before its end.
    """
    defaults = dict(preview_every=0, save_every=10 ** 6, log_every=10 ** 6, workers=0)
    flags = {**defaults, **flags, "seed": seed, "out": folder, "overwrite": True}
    args = script.parse_args(command_line(flags))
    script.main(args, **(main_arguments or {}))
    path = Path(folder) / "last.pt"
    if storage.load_checkpoint(path)["step"] < args.steps:
        raise KeyboardInterrupt("stopped in a training; finished runs of --full are kept")
    return path


def command_line(flags):
    """A dict of flags as the words of a command line.

    {"lr": 0.1, "data": ["a", "b"], "freeze_llm": True} gives --lr 0.1 --data a b --freeze_llm.
    """
    words = []
    for name, value in flags.items():
        words.append(f"--{name}")
        if isinstance(value, (list, tuple)):
            words += [str(item) for item in value]
        elif value is not True:
            words.append(str(value))
    return words


# ---------------------------------------------------------------------------- drawing
def values_of(results, arms, key):
    """A number of each arm and seed in the results of a sweep: array, arms x seeds."""
    return np.array([[numbers[key] for numbers in results[arm]] for arm in arms], float)


def draw_band(axes, x, values, label, **style):
    """Draw the mean over seeds as a line and their range as a band. values: points x seeds."""
    line, = axes.plot(x, values.mean(1), "o-", label=label, **style)
    axes.fill_between(x, values.min(1), values.max(1), color=line.get_color(), alpha=0.2)


def draw_dots(axes, names, values):
    """Draw each seed as a dot over its arm's name, and the mean as a bar. values: arms x seeds."""
    x = np.arange(len(names))
    axes.bar(x, values.mean(1), color=COLOURS[5], alpha=0.6)
    for seed in range(values.shape[1]):
        axes.plot(x, values[:, seed], "k.", markersize=8)
    axes.set_xticks(x, names)


def draw_paper_line(axes, value, label):
    """Draw a number of the paper as a labelled dashed line across."""
    axes.axhline(value, color="black", linestyle="--", linewidth=1)
    axes.annotate(label, (0.99, value), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                  fontsize=10)

"""What walkthroughs that compare trainings share: runs of each arm and seed, a table, a picture."""
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import numpy as np

import runtime
from data import ImageData

# Options of a script that say which runs to make, not how to make one.
NOT_OF_A_RUN = ("out", "seeds", "names")


class Study(NamedTuple):
    """A claim, and the trainings that look into it.

    claim: what the papers say. arms: names of the trainings to compare. columns: names of the
    numbers to show. run: (folder, seed, arm) -> dict of numbers, of which some may be missing.
    """
    claim: str
    arms: list
    columns: list
    run: Callable


class RepeatedImages(ImageData):
    """The same `count` images again and again: a training set that a model can learn by heart.

    data: ImageData of one source. The images are those from FIRST on, which no other training of
    the studies gets to.
    """
    FIRST = 500_000

    def __init__(self, data, count):
        super().__init__(data.sources, {data.domains[0]: 1.0}, data.size, data.seed)
        self.count = count

    def __getitem__(self, k):
        item = super().__getitem__(self.FIRST + k % self.count)
        item["number"] = k
        return item


def command_line(flags):
    """A dict of flags as the words of a command line.

    {"lr": 0.1, "data": ["a", "b"], "freeze_llm": True} gives --lr 0.1 --data a b --freeze_llm.
    """
    words = []
    for name, value in flags.items():
        words.append(f"--{name}")
        if isinstance(value, list):
            words += [str(item) for item in value]
        elif value is not True:
            words.append(str(value))
    return words


def train_to_the_end(script, args, **main_arguments):
    """Run a training script. Raises KeyboardInterrupt if a signal has stopped it before its end."""
    script.main(args, **main_arguments)
    step = runtime.load_checkpoint(Path(args.out) / "last.pt")["step"]
    if step < args.steps:
        raise KeyboardInterrupt("stopped; finished runs are kept, and it goes on with the others "
                                "when the command is given again")


def add_study_flags(p, out):
    """The flags of --seeds, and of --out with its default, a folder."""
    p.add_argument("--seeds", type=runtime.at_least(0), nargs="+", default=[0, 1, 2],
                   help="Seeds of each training.")
    p.add_argument("--out", type=Path, default=Path(out), help="Folder of runs and pictures.")


def check_names(parser, names, known):
    """End the script with a message unless all names are known."""
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"{' '.join(unknown)}: choose from {' '.join(known)}")


def read_json(path):
    """The dict in a file that an earlier run has written. Raises ValueError with its name."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); delete it, to run that part "
                         f"again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dict; delete it, to run that part again")
    return content


def run_study(name, study, options):
    """Run each arm with each seed, print mean and range of each number, and draw them to a .png.

    options: flags of the script, with out and seeds. The result of a finished run is read from its
    file instead of running it again.
    """
    folder = options.out / name
    check_same_options(folder, options)
    results = {}
    for seed in options.seeds:
        for arm in study.arms:
            results[arm, seed] = run_once(folder, seed, arm, study.run)

    values = {}                # (arm, column) -> the number of each seed, nan where it is missing
    for arm in study.arms:
        for column in study.columns:
            numbers = [results[arm, seed].get(column) for seed in options.seeds]
            values[arm, column] = [np.nan if number is None else number for number in numbers]
    print_table(name, study, values)
    draw_bars(options.out / f"{name}.png", study, values)


def check_same_options(folder, options):
    """Keep the options beside the runs. Raises ValueError if finished runs were made with others.
    """
    wanted = {}
    for key, value in vars(options).items():
        if key not in NOT_OF_A_RUN:
            wanted[key] = str(value)
    path = folder / "flags.json"
    if any(folder.glob("*/*/result.json")):
        kept = read_json(path) if path.exists() else {}
        if kept != wanted:
            raise ValueError(f"{folder} has runs with {kept}, not {wanted}; give another --out")
    content = json.dumps(wanted).encode()
    runtime.write_whole(path, lambda f: f.write(content))


def run_once(folder, seed, arm, run):
    """The numbers of one run, from its result.json if it is finished already."""
    place = folder / f"seed_{seed}" / arm.replace(" ", "_")
    result = place / "result.json"
    if not result.exists():
        place.mkdir(parents=True, exist_ok=True)
        content = runtime.to_json(run(place, seed, arm)).encode()
        runtime.write_whole(result, lambda f: f.write(content))
    return read_json(result)


def print_table(name, study, values):
    """Print a line for each arm: of each column the mean and the range of the seeds."""
    print(f"\n{name}: {study.claim}")
    heads = [f"{column:>24}" for column in study.columns]
    print(f"{'':22}", *heads, "  (mean and range of the seeds)")
    for arm in study.arms:
        cells = []
        for column in study.columns:
            numbers = values[arm, column]
            cells.append(f"{np.mean(numbers):10.1f} {min(numbers):6.1f} to{max(numbers):6.1f}")
        print(f"{arm:22}", *cells)


def draw_bars(path, study, values):
    """Draw a panel for each column: a bar for the mean of each arm, a dot for each seed."""
    size = (4.5 * len(study.columns), 3.5)
    figure, panels = plt.subplots(1, len(study.columns), figsize=size, layout="constrained",
                                  squeeze=False)
    figure.suptitle(study.claim, fontsize=10)
    for panel, column in zip(panels[0], study.columns, strict=True):
        panel.set_title(column.replace("_", " "))
        for arm in study.arms:
            numbers = values[arm, column]
            label = arm.replace(" ", "\n", 1)
            panel.bar(label, np.mean(numbers), color="lightsteelblue")
            panel.plot([label for _ in numbers], numbers, "k.")
    runtime.write_whole(path, lambda f: figure.savefig(f, dpi=100))
    plt.close(figure)

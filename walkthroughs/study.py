"""What the walkthroughs that compare trainings share: every arm with every seed, a table, a picture."""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import numpy as np

import runtime
from data import open_data


class Few(open_data):          # the same scenes again and again, none of which was seen before
    count = 500

    def __getitem__(self, k):
        return {**super().__getitem__(500_000 + k % self.count), "number": k}


def study(name, claim, arms, shown, options, run):
    """Run each arm with each seed, print mean and range of what is shown, and draw the same to a .png.

    arms: names. shown: keys of the dicts of numbers that run(folder, seed, arm) returns; others are nan.
    options: flags, with out and seeds. A finished run's result.json in out/name is read instead of running it
    again, unless it was made with other flags.
    """
    folder, seeds = options.out / name, options.seeds
    flags = {k: f"{v}" for k, v in vars(options).items() if k not in ("out", "seeds", "studies", "findings")}
    kept, done = folder / "flags.json", [*folder.glob("*/*/result.json")]
    was = json.loads(kept.read_text()) if kept.exists() else {} if done else flags
    if was != flags:
        raise SystemExit(f"error: {folder} has runs with {was}, not {flags}; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(flags))
    results = {}
    for seed in seeds:
        for arm in arms:
            place = folder / f"seed_{seed}" / arm.replace(" ", "_")
            if not (place / "result.json").exists():
                place.mkdir(parents=True, exist_ok=True)
                result = json.dumps(run(place, seed, arm)).encode()
                runtime.whole_file(place / "result.json", lambda f: f.write(result))
            results[arm, seed] = json.loads((place / "result.json").read_text())
    figure, panels = plt.subplots(1, len(shown), figsize=(4.5 * len(shown), 3.5), layout="constrained",
                                  squeeze=False)
    figure.suptitle(claim, fontsize=10)
    print(f"\n{name}: {claim}")
    print("".ljust(22), *(f"{what:>24}" for what in shown), "  (mean and range of the seeds)")
    for arm in arms:
        cells = [[results[arm, seed].get(what, np.nan) for seed in seeds] for what in shown]
        print(arm.ljust(22), *(f"{np.mean(c):10.1f} {min(c):6.1f} to{max(c):6.1f}" for c in cells))
        for panel, what, values in zip(panels[0], shown, cells):
            panel.bar(arm.replace(" ", "\n", 1), np.mean(values), color="lightsteelblue")
            panel.plot([arm.replace(" ", "\n", 1)] * len(values), values, "k.")
            panel.set(title=what.replace("_", " "))
    figure.savefig(folder.parent / f"{name}.png", dpi=100)
    plt.close(figure)

"""Test-time scaling in latent space: of ever more candidates the language model takes the best.

    python walkthroughs/best_of.py --n 150 --candidates 32      ShapesEval, the shipped weights

No image is decoded to choose: the model reads the latents. read_scene, which looks at the decoded
image and knows what was asked, is the upper bound. Ends with one picture, a curve for each
verifier, and a table.
"""
# %% Set-up
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import numpy as np

import runtime
import sample
from release import SHIPPED_T2I
from shapes import fulfils, read_scene, shapes_eval_prompts
from t2i import VERIFIERS


def parse_args(argv=None):
    p = runtime.Parser(__doc__, {})
    p.add_argument("--n", type=runtime.at_least(1), default=150,
                   help="Number of images; image i has prompt i modulo 300 of ShapesEval.")
    p.add_argument("--candidates", type=runtime.at_least(2), default=32,
                   help="Latents drawn for each image.")
    p.add_argument("--ckpt", default=str(SHIPPED_T2I),
                   help="Checkpoint of train_t2i.py (default: the shipped one).")
    p.add_argument("--out", type=Path, default=Path("runs/best_of"),
                   help="Folder of the picture.")
    return p.parse_args(argv)


# %% Draw all candidates once, see which are right, and score them by every verifier
def score_candidates(options):
    """Whether candidates are right, n x candidates, and their scores by verifier, a dict of such.
    """
    args = sample.parse_args(["--prompt", "-", "--ckpt", options.ckpt,
                              "--best_of", str(options.candidates)])
    t2i, rae, _ = sample.load_t2i_models(args, "cpu")
    all_tests = shapes_eval_prompts()                  # the six categories in turn
    tests = [all_tests[i % len(all_tests)] for i in range(options.n)]
    shape = (options.n, options.candidates)
    scores = {name: np.zeros(shape) for name in VERIFIERS}
    is_right = np.zeros(shape, bool)
    for i, test in enumerate(runtime.progress_bar(tests, "prompts")):
        prompts = [test.prompt for _ in range(options.candidates)]
        first = i * options.candidates
        numbers = range(first, first + options.candidates)
        latents = sample.draw_prompts(t2i, prompts, args, numbers)
        for j, image in enumerate(sample.to_images(rae, latents).numpy()):
            is_right[i, j] = fulfils(read_scene(image), test.names, test.relation)
        for name, verifier in VERIFIERS.items():
            scores[name][i] = verifier(t2i, latents, prompts)
    scores["read_scene (upper bound)"] = is_right.astype(float)
    return is_right, scores


# %% How often the best of the first N candidates is right, for growing N
def accuracy_curves(is_right, scores, counts):
    """For each verifier, the fraction of prompts whose best of the first N is right, by N."""
    curves = {}
    for name, scores_of_verifier in scores.items():
        curves[name] = []
        for count in counts:
            best = scores_of_verifier[:, :count].argmax(1)              # n
            right = is_right[np.arange(len(best)), best]                # n
            curves[name].append(float(right.mean()))
    return curves


# %% A picture and a table
def draw_curves(path, counts, curves):
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(counts, [100 * fraction for fraction in curve], "o-", label=name)
    axes.set(xscale="log", xlabel="candidates N", ylabel="right, %", xticks=counts,
             xticklabels=counts)
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2)
    runtime.write_whole(path, lambda f: figure.savefig(f, dpi=120))


def main(options):
    runtime.check_out(options.out)
    runtime.setup()
    options.out.mkdir(parents=True, exist_ok=True)
    is_right, scores = score_candidates(options)
    counts = [2 ** k for k in range(options.candidates.bit_length())]
    curves = accuracy_curves(is_right, scores, counts)
    draw_curves(options.out / "best_of.png", counts, curves)
    print(f"{'candidates N':26}", *[f"{count:>6}" for count in counts])
    for name, curve in curves.items():
        print(f"{name:26}", *[f"{100 * fraction:6.1f}" for fraction in curve])
    print(runtime.to_json(dict(n=options.n, counts=counts, **curves)))


if __name__ == "__main__":
    runtime.run(main, parse_args)

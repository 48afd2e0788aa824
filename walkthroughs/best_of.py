"""Test-time scaling in latent space: of ever more candidates the language model takes the best.

    python walkthroughs/best_of.py --n 150 --candidates 32      ShapesEval, the shipped weights

No image is decoded to choose: the model reads the latents. read_scene, which looks at the decoded
image and knows what was asked, is the upper bound. Ends with one picture, a curve for each
verifier, and a table.
"""
# %% Set-up
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import runtime
import sample
from release import SHIPPED_T2I
from shapes import fulfils, read_scene, shapes_eval_prompts
from t2i import VERIFIERS

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--n", type=runtime.at_least(1), default=150,
                    help="Number of images; image i has prompt i %% 300 of ShapesEval "
                         "(default: 150).")
parser.add_argument("--candidates", type=runtime.at_least(2), default=32,
                    help="Latents drawn for each image (default: 32).")
parser.add_argument("--ckpt", default=str(SHIPPED_T2I),
                    help="Checkpoint of train_t2i.py (default: the shipped one).")
parser.add_argument("--out", type=Path, default=Path("runs/best_of"),
                    help="Folder of the picture (default: runs/best_of).")
options = parser.parse_args()
runtime.setup()
args = sample.parse_args(["--prompt", "-", "--ckpt", options.ckpt,
                          "--best_of", str(options.candidates)])
try:
    t2i, rae, _ = sample.load_t2i_models(args, "cpu")
except (OSError, ValueError) as error:     # no such file; a model that was never asked questions
    parser.error(str(error))

# %% Draw all candidates once, see which are right, and score them by every verifier
all_tests = shapes_eval_prompts()                      # the six categories in turn
tests = [all_tests[i % len(all_tests)] for i in range(options.n)]
shape = (options.n, options.candidates)
scores = {name: np.zeros(shape) for name in VERIFIERS}
is_right = np.zeros(shape, bool)
for i, test in enumerate(tqdm(tests, unit="prompt")):
    prompts = [test.prompt for _ in range(options.candidates)]
    first = i * options.candidates
    latents = sample.draw_prompts(t2i, prompts, args, range(first, first + options.candidates))
    for j, image in enumerate(sample.to_images(rae, latents).numpy()):
        is_right[i, j] = fulfils(read_scene(image), test.names, test.relation)
    for name, verifier in VERIFIERS.items():
        scores[name][i] = verifier(t2i, latents, prompts)
scores["read_scene (upper bound)"] = is_right.astype(float)

# %% How often the best of the first N candidates is right, for growing N
counts = [2 ** k for k in range(options.candidates.bit_length())]
curves = {}
for name, scores_of_verifier in scores.items():
    curves[name] = []
    for count in counts:
        best = scores_of_verifier[:, :count].argmax(1)                  # n
        right = is_right[np.arange(options.n), best]                    # n
        curves[name].append(float(right.mean()))

# %% A picture and a table
options.out.mkdir(parents=True, exist_ok=True)
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for name, curve in curves.items():
    axes.plot(counts, [100 * fraction for fraction in curve], "o-", label=name)
axes.set(xscale="log", xlabel="candidates N", ylabel="right, %", xticks=counts, xticklabels=counts)
axes.minorticks_off()
figure.legend(loc="outside lower center", ncols=2)
figure.savefig(options.out / "best_of.png", dpi=120)

print(f"{'candidates N':26}", *[f"{count:>6}" for count in counts])
for name, curve in curves.items():
    print(f"{name:26}", *[f"{100 * fraction:6.1f}" for fraction in curve])
print(json.dumps(dict(n=options.n, counts=counts, **curves)))

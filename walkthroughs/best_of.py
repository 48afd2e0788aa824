"""Test-time scaling in latent space: more candidates for a prompt, the best chosen by the language model.

    python walkthroughs/best_of.py --n 150 --candidates 32          (on ShapesEval, from the shipped weights)
No image is decoded to choose: the model reads the latents. read_scene, which looks at the decoded image and
knows what was asked, is the upper bound. Ends with one picture, a curve for each verifier, and a table.
"""
# %% Set-up
import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import eval_fid
import runtime
import sample
from shapes import read_scene

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("--n", type=runtime.at_least(1), default=150, help="images; prompt i % 300 of ShapesEval")
parser.add_argument("--candidates", type=runtime.at_least(2), default=32, help="latents drawn for each image")
parser.add_argument("--out", type=Path, default=Path("runs/best_of"), help="folder of the picture")
parser.add_argument("--ckpt", help="checkpoint of train_t2i.py; default: the shipped one")
options = parser.parse_args()
runtime.setup()
flags = ["--prompt", "-", "--best_of", str(options.candidates)]
args = sample.parse_args(flags + (["--ckpt", options.ckpt] if options.ckpt else []))
try:
    model, rae, state, _ = sample.load_models(args, "cpu")
except (OSError, ValueError) as error:                     # no such file; a model that was never asked
    parser.error(str(error))

# %% Draw all candidates once, score them by every verifier, and look which ones are right
tests = eval_fid.shapes_eval()
tests = [tests[i % len(tests)] for i in range(options.n)]                        # the six categories in turn
right = np.zeros((options.n, options.candidates), bool)
scores = {name: np.zeros(right.shape) for name in ("answer", "confidence", "likelihood")}
for i, (_, prompt, names, relation) in enumerate(tqdm(tests, unit="prompt")):
    numbers = range(i * options.candidates, (i + 1) * options.candidates)
    latents = sample.draw_prompts(model, [prompt] * options.candidates, args, numbers)
    images = sample.to_images(rae, latents).numpy()
    right[i] = [eval_fid.fulfilled(read_scene(image), names, relation) for image in images]
    for name in scores:
        scores[name][i] = model.scores(latents, [prompt] * len(latents), name)

# %% The best of the first N candidates, for growing N
counts = [2 ** k for k in range(options.candidates.bit_length())]
scores["read_scene (upper bound)"] = right
curves = {name: [float(np.mean(right[np.arange(len(right)), s[:, :n].argmax(1)])) for n in counts]
          for name, s in scores.items()}
options.out.mkdir(parents=True, exist_ok=True)
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for name, curve in curves.items():
    axes.plot(counts, [100 * x for x in curve], "o-", label=name)
axes.set(xscale="log", xlabel="candidates N", ylabel="right, %", xticks=counts, xticklabels=counts)
axes.minorticks_off()
figure.legend(loc="outside lower center", ncols=2)
figure.savefig(options.out / "best_of.png", dpi=120)
print("candidates N".ljust(26), *(f"{n:>6}" for n in counts))
for name, curve in curves.items():
    print(name.ljust(26), *(f"{100 * x:6.1f}" for x in curve))
print(json.dumps(dict(n=options.n, counts=counts, **curves)))

# %% [markdown]
# # Lesson 4: the more dimensions, the more noise
#
# 30 minutes of class, 2 minutes on 2 CPU cores. Needs: lesson 2. The same amount of noise hides
# much of a small image and little of a large one. So the times of training and sampling are shifted
# towards noise, the more, the more numbers an image or its latents have. We ask why, by how much,
# and what happens without the shift.

# %% Set-up: find nanoRAE around this file, or clone it
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

places = [Path.cwd(), *Path.cwd().parents, Path.cwd() / "nanoRAE"]
if "__file__" in globals():
    places.insert(0, Path(__file__).resolve().parents[1])
root = next((place for place in places if (place / "walkthroughs" / "lesson.py").exists()), None)
if root is None:
    address = os.environ.get("NANORAE")
    if address is None:
        raise SystemExit("nanoRAE is not here; put this notebook into its folder, or set NANORAE "
                         "to an address that git can clone")
    subprocess.run(["git", "clone", "--quiet", address, "nanoRAE"], check=True)
    root = Path("nanoRAE").resolve()
packages = ("torchvision", "einops", "timm", "lpips", "scipy", "tqdm", "tokenizers", "safetensors",
            "huggingface_hub", "matplotlib")
if any(importlib.util.find_spec(name) is None for name in packages):
    requirements = str(root / "requirements.txt")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", requirements], check=True)
sys.path[:0] = [str(root), str(root / "walkthroughs")]

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from lesson import COLOURS, Lesson, draw_dots, train, values_of

import release
import sample
import train_dit
from data import load_images, open_data
from eval_fid import evaluate_generation
from model import sample_times, time_shift

lesson = Lesson("04_time_shift")
device = lesson.device

# %% [markdown]
# ## Question
#
# The latents of an image are 196,608 numbers in the paper, 256 tokens of 768 channels, and 4,096 in
# a usual VAE. The paper shifts all times towards noise: the ratio of noise to signal,
# `t / (1 - t)`, grows by the factor `a = sqrt(196608 / 4096) = 6.9`. The FID falls from 23 to 5.
# The 4,096 is called the base: latents of so many numbers need no shift. Why does the number of
# dimensions matter? And is it the number that matters, or how much the dimensions repeat each
# other?
#
# ## Predict
#
# Write down, before you run anything:
#
# 1. You know 1,000 random vectors, and are shown one of them, mixed with noise half and half:
#    `t = 0.5`. You say which one it is. How often are you right in 16 dimensions? In 3,072?
# 2. The numbers of a vector are independent, each with variance 1. You guess the clean vector from
#    the noisy one. Does your error per dimension depend on how many dimensions there are?
# 3. An image is shown at 8 x 8 pixels, and at 64 x 64. At which size does the same noise hide more
#    of it?
# 4. A model of classes is trained without shift, so hardly at high noise. Will its objects have the
#    right colour more often than those of a model with the right shift, or less often?

# %% [markdown]
# ## Read
#
# The exercise `time_shift` is the function that comes first here. If you want to find it yourself,
# do `walkthroughs/exercises/time_shift.py` first.
#
# - `time_shift` in model.py, `[L7]`. Solve it for `t' / (1 - t')`: what does the shift multiply?
# - `sample_times` in model.py, `[L8]`: training times are drawn first, and shifted afterwards.
# - `time_grid` in sample.py, `[S1]`: by the same shift, the sampler takes more of its steps at high
#   noise. `sampling_times` in sample.py takes the base from the model, so training and sampling
#   agree.
# - `TINY_LATENTS` in train_dit.py: the base is 340 for the tiny encoder, not 4096. Its latents have
#   16 x 192 = 3,072 numbers, so `a = sqrt(3072 / 340) = 3`. Can such a number be derived?

# %% [markdown]
# ## Run
#
# ### Which of 1,000 vectors was it?
#
# `x_t = (1 - t) x0 + t eps`. So `x_t / (1 - t)` is `x0` plus noise of standard deviation
# `t / (1 - t)`. We draw 1,000 vectors, add noise to 300 of them, and guess: the nearest of the
# 1,000.

# %%
CANDIDATES = 1000
TRIALS = lesson.size(300, quick=30)
BEFORE = torch.linspace(0.02, 0.98, 33)                # times before they are shifted


def accuracy_at(vectors, t):
    """How often the vector that is nearest to a noisy one is the right one. vectors: n d."""
    x0 = vectors[:TRIALS]
    noisy = x0 + t / (1 - t) * torch.randn_like(x0)                     # x_t / (1 - t)
    nearest = torch.cdist(noisy, vectors).argmin(1)
    return float((nearest == torch.arange(TRIALS)).float().mean())


torch.manual_seed(0)
vectors_of = {f"{dim}": torch.randn(CANDIDATES, dim) for dim in (16, 64, 256, 1024, 3072)}
REPEATED = "16, each 192 times"                        # 3,072 dimensions that repeat each other
vectors_of[REPEATED] = vectors_of["16"].repeat(1, 192)
accuracies = {}
for name, vectors in vectors_of.items():
    times = time_shift(BEFORE, dim=vectors.shape[1], base=16)
    accuracies[name] = [accuracy_at(vectors, float(t)) for t in times]
for name, vectors in vectors_of.items():
    print(f"dimensions: {name}; at t = 0.5 the guess is right in {accuracy_at(vectors, 0.5):.0%}")

# %% [markdown]
# Each curve is measured at times that are shifted for its dimensions, with base 16, so the times of
# 16 dimensions stay as they are. Left, the curves are drawn over these times. Right, they are drawn
# over the times before the shift: if the shift is right, all become the curve of 16 dimensions.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.2), sharey=True)
for name, values in accuracies.items():
    times = time_shift(BEFORE, dim=vectors_of[name].shape[1], base=16)
    style = "k--" if name == REPEATED else "o-"
    left.plot(times, values, style, markersize=4, label=name)
    right.plot(BEFORE, values, style, markersize=4)
left.set(xlabel="time t (0: data, 1: noise)", ylabel="how often the guess is right")
right.set(xlabel="time before the shift with base 16")
left.legend(title="dimensions", fontsize=11)
lesson.show(figure, "nearest", f"which of 1,000 vectors of unit variance per dimension is it? "
            f"{TRIALS} guesses per point")

# %% [markdown]
# ### How much of the image is known?
#
# A denoiser does not choose among 1,000 vectors: it guesses numbers. Say that the covariance of the
# data has the eigenvalues `lambda_i`. In direction `i` the data have the variance `lambda_i`, and
# the best linear guess of `x0` from `x_t` leaves the squared error
#
#     lambda_i t^2 / (t^2 + lambda_i (1-t)^2)
#
# The sum of these errors over the sum of the `lambda_i` is the part of the variance that is not
# known at time `t`. If all dimensions are independent and of variance 1, all eigenvalues are 1, and
# the curve is the same in any number of dimensions! If the dimensions repeat each other, a few
# eigenvalues are large: these directions are still known at high noise. So we measure the
# eigenvalues of images at several sizes and of the tiny encoder's latents, all scaled to a mean
# variance of 1 per element.

# %%
IMAGES = lesson.size(1500, quick=30)
data = open_data(["shapes"], 64, split="val", objects=1)
images = load_images(data, range(IMAGES)).permute(0, 3, 1, 2) / 255     # n 3 64 64
rae = release.load_rae(release.SHIPPED_RAE).to(device)
latents = torch.cat([rae.encode(part.to(device)).cpu() for part in images.split(250)])
spaces = {}
for side in (8, 16, 32, 64):
    spaces[f"{side} x {side} pixels"] = F.avg_pool2d(images, 64 // side).flatten(1)
spaces["latents of the tiny encoder"] = latents.flatten(1)


def eigenvalues_of(vectors):
    """Eigenvalues of the covariance of vectors n d, scaled to a mean variance of 1 per element."""
    centred = (vectors - vectors.mean(0)).double()
    # n n, smaller than the covariance d d of large images, with the same eigenvalues but zeros.
    gram = centred @ centred.T / len(vectors)
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
    return eigenvalues * vectors.shape[1] / eigenvalues.sum()


def error_at(eigenvalues, t):
    """Squared error of the best linear guess of x0 at time t, as a part of the variance of x0."""
    errors = eigenvalues * t ** 2 / (t ** 2 + eigenvalues * (1 - t) ** 2)
    return float(errors.sum() / eigenvalues.sum())


def half_time(eigenvalues):
    """The time at which half of the variance is known, found by bisection."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if error_at(eigenvalues, middle) < 0.5:
            low = middle
        else:
            high = middle
    return low


spectra = {"independent numbers": torch.ones(100, dtype=torch.float64)}
for name, vectors in spaces.items():
    spectra[name] = eigenvalues_of(vectors)

# %% [markdown]
# A shift by `a` makes `t / (1 - t)` larger by the factor `a`. Independent numbers are half known at
# `t = 0.5`, where `t / (1 - t) = 1`. So the shift that moves `t = 0.5` to the half time of a space,
# the time at which half of its variance is known, is `a = t / (1 - t)` there. Since
# `a = sqrt(dim / base)`, this gives a measured base: `dim / a^2`. It can be read as the number of
# independent numbers that an image has by this measure.

# %%
measured = {}
for name, eigenvalues in spectra.items():
    if name == "independent numbers":
        continue
    t = half_time(eigenvalues)
    dim = spaces[name].shape[1]
    shift = t / (1 - t)
    measured[name] = dict(dim=dim, shift=shift, base=dim / shift ** 2)
    print(f"{name}: {dim} numbers, half known at t = {t:.3f}, shift {shift:.1f}, "
          f"base {dim / shift ** 2:.0f}")

TIMES = torch.linspace(0, 1, 200).tolist()
figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.2), sharey=True)
for colour, (name, eigenvalues) in zip(COLOURS, spectra.items(), strict=False):
    style = "-" if "pixels" in name else "--"
    left.plot(TIMES, [error_at(eigenvalues, t) for t in TIMES], style, color=colour, label=name)
    if "pixels" in name:
        # Base 192: the numbers of an image of 8 x 8 pixels, which is not shifted.
        shifted = [time_shift(t, dim=measured[name]["dim"], base=192) for t in TIMES]
        right.plot(TIMES, [error_at(eigenvalues, t) for t in shifted], color=colour)
left.set(xlabel="time t (0: data, 1: noise)", ylabel="unknown part of the variance")
left.legend(fontsize=11)
right.set(xlabel="time before the shift with base 192")
lesson.show(figure, "known", f"error of the best linear guess, from the eigenvalues of {IMAGES} "
            "images of one object; right: the four sizes of images alone")

# %% [markdown]
# ### Where training looks
#
# We compare four bases: 3072, which is no shift for these latents; 340, the default; 26, the one
# that we have measured; and 85 in between. How often is each time trained?

# %%
HALF_TIME = half_time(spectra["latents of the tiny encoder"])
BASES = {3072: "3072 (no shift)", 340: "340 (default)", 85: "85", 26: "26"}
torch.manual_seed(0)
figure, axes = plt.subplots(figsize=(9, 4.8))
for base, name in BASES.items():
    t = sample_times(100_000, "logit_normal", dim=3072, base=base)
    axes.hist(t.numpy(), bins=100, range=(0, 1), density=True, histtype="step", linewidth=2,
              label=f"{name}: a = {math.sqrt(3072 / base):.1f}")
    above = float((t > HALF_TIME).float().mean())
    print(f"base {name}: {above:.1%} of the training times are above {HALF_TIME:.3f}")
axes.axvline(HALF_TIME, color="black", linestyle="--", linewidth=1)
axes.annotate("half known", (HALF_TIME - 0.01, 6.3), ha="right", fontsize=11)
axes.set(xlabel="time t (0: data, 1: noise)", ylabel="density of training times")
axes.legend(title="base")
lesson.show(figure, "times", "100,000 logit-normal times, shifted for 3,072 numbers; dashed: where "
            "half of the variance of the tiny encoder's latents is known")

# %% [markdown]
# ### The shift, on and off
#
# A small model of the 36 classes is trained with each base, and draws with the same base. Two of
# the runs are made here. All of them, with three seeds, take longer than a lesson, so
# `lesson.sweep` reads their results from `walkthroughs/results/04_time_shift.json`; `--full`
# measures them again.
#
# The training warns that a width of 96 is below the 192 channels of the latents. That is the topic
# of lesson 3. It is the same for all bases, so the comparison is fair.

# %%
STEPS = lesson.size(600, quick=2)
JUDGED = lesson.size(72, quick=4)


def judge(checkpoint):
    """Draw images with the base of the training, and compare them with held-out images."""
    model, model_rae, _ = release.load_dit(checkpoint, device, with_encoder=True)
    steps = lesson.size(24, quick=2)
    args = sample.parse_args(["--guidance", "1.5", "--sampling_steps", f"{steps}"])
    measured = evaluate_generation(model, model_rae, data, args, JUDGED)
    keys = ("right_colour", "right_colour_and_shape", "frechet_distance")
    return {key: measured[key] for key in keys}


def run_base(base, seed, folder):
    """Train a small model of the classes with this base of the shift, and judge what it draws."""
    checkpoint = train(train_dit, folder, seed, shift_base=base, steps=STEPS, ema=0.98, width=96,
                       depth=3, head_width=0, batch=lesson.size(32, quick=4),
                       cache=lesson.size(1000, quick=32))
    return judge(checkpoint)


live = {}
for base in (3072, 340):
    live[base] = run_base(base, 0, lesson.folder / f"live_{base}")
    print(f"base {base}: right colour {live[base]['right_colour']:.0%}, colour and shape "
          f"{live[base]['right_colour_and_shape']:.0%}, Fréchet distance "
          f"{live[base]['frechet_distance']:.1f}")

# %%
arms = [f"{base}" for base in BASES]
results = lesson.sweep("base", arms, run_base)
colours = 100 * values_of(results, arms, "right_colour")                # bases x seeds
distances = values_of(results, arms, "frechet_distance")

figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
names = [name.replace(" ", "\n") for name in BASES.values()]
draw_dots(left, names, colours)
draw_dots(right, names, distances)
for position, base in enumerate(BASES):
    if base in live:
        left.plot(position + 0.2, 100 * live[base]["right_colour"], "D", color=COLOURS[1])
        right.plot(position + 0.2, live[base]["frechet_distance"], "D", color=COLOURS[1])
left.axhline(100 / 6, color="grey", linestyle=":")
left.annotate("chance", (3.1, 18), fontsize=12)
left.set(xlabel="base of the shift", ylabel="samples of the right colour, %", ylim=(0, 60))
right.set(xlabel="base of the shift", ylabel="Fréchet distance, tiny encoder")
lesson.show(figure, "base", "plain DiT of width 96 and depth 3, after 600 steps of 32 images; 72 "
            "samples, guidance 1.5; 3 seeds (dots), their mean (bars), this run (diamonds)")

# %% [markdown]
# ## Figure
#
# 1. *Nearest*: at `t = 0.5`, the guess is right in about half of the cases in 16 dimensions, and
#    always in 3,072. There it falls to a half only at `t = 0.94`. Over the times before the shift,
#    the curves nearly coincide. For the 16 numbers that are written down 192 times they should do
#    so exactly, and they do, up to the chance of 300 guesses: the mean of 192 noisy copies has
#    noise `sqrt(192)` times smaller, and that is `a`.
# 2. *Known*: for independent numbers, the unknown part depends on `t` alone, not on how many they
#    are. But of the same images, more is known at the same noise if they have more pixels. The
#    shift by `sqrt(dim)` brings the sizes near to each other, and nearer the larger they are: from
#    8 to 16 pixels per side the shift grows by the factor 1.6, from 16 to 32 by 1.8, and from 32 to
#    64 by 1.9, where the rule says 2. The rule holds only as far as new pixels repeat the old ones.
# 3. *Times*: half of the latents is known at `t = 0.92`. Without shift, 1% of the training times
#    are above it; with the default base, 10%; with base 26, 50%, since that is how it was measured.
#    So a model without shift is hardly trained where the latents are not known yet.
# 4. *Base*: of these four bases, the default has the most right colours: 40% (38 to 43 over 3
#    seeds), where no shift has 25% (22 to 29). More shift is worse again: 26% (19 to 35) with base
#    85, and 11% (6 to 15) with base 26. So the half time of the latents says in which direction to
#    shift, but not how far. By the Fréchet distance, default and no shift are equal (57), and base
#    26 is worse (74). The shapes are not right yet in any. (Chance is one in six if a sample shows
#    one object. A sample in which no colour or more than one is read counts as wrong, so a model
#    can be below chance.)
#
# ## Number
#
# What you should see: half of the variance of the tiny encoder's latents is known at `t = 0.92`, as
# it is for 32 x 32 pixels, which are also 3,072 numbers. From 32 to 64 pixels per side, the shift
# grows by 1.9. The default base has 15 points more right colours than no shift; your own two runs
# may lie elsewhere within the range of the dots, as 72 samples are few.

# %%
middle = len(BEFORE) // 2                              # the time 0.5
latent_shift = measured["latents of the tiny encoder"]["shift"]
pixel_step = measured["64 x 64 pixels"]["shift"] / measured["32 x 32 pixels"]["shift"]
gain = colours[arms.index("340")].mean() - colours[arms.index("3072")].mean()
lesson.number("3,072 numbers, right at shifted 0.5", accuracies["3072"][middle], 0.6, 0.9,
              quick=(0.4, 1))
lesson.number("shift of the tiny latents", latent_shift, 9, 13, quick=(5, 30))
lesson.number("shift from 32 to 64 pixels", pixel_step, 1.7, 2, quick=(1.5, 2.1))
lesson.number("default over no shift, points of colour", gain, 3, 40, quick=(-100, 100))
lesson.end()

# %% [markdown]
# ## Exercise
#
# Fill in `walkthroughs/exercises/time_shift.py`, then run
# `python walkthroughs/exercises/check.py time_shift`. And, with this lesson:
#
# 1. Show that `time_shift` multiplies `t / (1 - t)`, the ratio of noise to signal, by `a`. Which
#    shift undoes it?
# 2. An image has `m` numbers, each of them `r` times. Show that it is as well known as the `m`
#    numbers alone if the ratio of noise to signal is `sqrt(r)` times larger.
# 3. The paper takes the base 4096 for all encoders. By the half time of this lesson, the tiny
#    latents would have a base of 26. Why is that no contradiction? (What would the half time of a
#    VAE's latents be?)
# 4. Train with the shift, but draw without it: set `model.shift_base = 3072` in `judge`, and call
#    it for `lesson.folder / "live_340" / "last.pt"`. Then the other way round, with base 340 for
#    `live_3072`. Predict first: does the shift matter more in training or in sampling?
#
# <details><summary>Answers</summary>
#
# 1. `t' = a t / (1 + (a-1) t)`, so `1 - t' = (1 - t) / (1 + (a-1) t)`, and
#    `t' / (1 - t') = a t / (1 - t)`. The shift by `1 / a` undoes it.
# 2. The mean of `r` copies has the signal of one and noise `1 / sqrt(r)` as large.
# 3. A base says which latents need no shift, and the two bases say it by different standards. Base
#    26 asks that half be known at `t = 0.5`. Base 4096 asks for no more than a VAE's latents of
#    4,096 numbers have. They repeat each other, too, so their own half time is above 0.5.
# 4. In training. Over 3 seeds of sampling (`--seed` 0, 1, 2) of 72 samples each, the model with
#    base 340 has 48% right colours with the shift in sampling (40 to 53), and 41% without (33 to
#    46): too few samples to tell. The model without shift has 26% either way.
#
# </details>
#
# ## The paper says / ours differs
#
# - RAE (arXiv 2510.11690, Table 4): DiT-XL over DINOv2-B, 80 epochs: gFID 23.08 without shift, 4.81
#   with `a = 6.9`. Scale-RAE (arXiv 2601.16208): GenEval 23.6 without, 49.6 with `a = 8.5`. **Holds
#   here** in right colours, 40% with `a = 3` and 25% without, and the 3 seeds do not overlap; **not
#   seen here** in the Fréchet distance, 57 in both. Ours are the first 600 steps of a small model,
#   and 72 samples a seed. A likely cause, not tested: such early samples are far from the data in
#   sharpness, which is decided at low noise, so the distance tells little about the colours, which
#   are decided at high noise.
# - The rule `sqrt(m / n)` comes from SD3 (arXiv 2403.03206), which derives it for one image at
#   several resolutions. **Holds here** in that case, and better at higher resolutions (1.6, 1.8,
#   1.9 for each doubling of the side, where the rule says 2).
# - "The shift grows with the number of dimensions" **does not hold in general**: the second figure
#   shows that independent dimensions need none. What counts is how much they repeat each other. The
#   tiny encoder's latents do so a great deal, and that is why their base is not the paper's 4096:
#   with it, `a` would be 0.87, a shift towards the data.

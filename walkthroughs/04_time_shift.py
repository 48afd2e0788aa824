# %% [markdown]
# # Lesson 4: the more dimensions, the more noise
#
# 30 minutes of class, 2 minutes on 2 CPU cores. Needs: lesson 2. The same amount of noise hides
# little of a high-dimensional image and much of a low-dimensional one. So the times of training and
# sampling are shifted towards noise. We look why, by how much, and what happens without.

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
from lesson import COLOURS, Lesson, command_line, draw_dots, train, values_of

import eval_fid
import release
import train_dit
from data import load_images, open_data
from model import sample_times, time_shift

lesson = Lesson("04_time_shift")
device = lesson.device

# %% [markdown]
# ## Question
#
# RAE trains on latents of 196,608 numbers, a usual VAE on 4,096. The paper moves all times towards
# noise by a factor of `sqrt(196608 / 4096) = 6.9`, and the FID falls from 23 to 5. Why does the
# number of dimensions matter? And is it the number that matters, or how much the dimensions repeat
# each other?
#
# ## Predict
#
# Write down, before you run anything:
#
# 1. You get one of 1,000 random vectors, mixed with noise half and half: `t = 0.5`. You are to say
#    which one it was. In 16 dimensions, how often are you right? In 3,072?
# 2. Each dimension is a number of its own, of variance 1. You guess the clean vector from the noisy
#    one. Does your error per dimension depend on how many dimensions there are?
# 3. An image is shown at 8 x 8 pixels, and at 64 x 64. At which size does the same noise hide more
#    of it?
# 4. A class model is trained with too little shift, so hardly at high noise. Which is wrong in its
#    samples: the colours of the objects, or the sharpness of the edges?

# %% [markdown]
# ## Read
#
# - `time_shift` in model.py, `[L7]`. Solve it for `t' / (1 - t')`: what does the shift multiply?
# - `sample_times` in model.py, `[L8]`: training times are drawn first and shifted then.
# - `time_grid` in sample.py, `[S1]`: the sampler takes more of its steps at high noise, by the same
#   shift. `draw`, `[S4]`, takes the base from the model, so training and sampling agree.
# - `TINY_LATENTS` in train_dit.py: the base is 340 for the tiny encoder, not 4096. This lesson
#   looks where such a number comes from.

# %% [markdown]
# ## Run
#
# ### Which of 1,000 vectors was it?
#
# `x_t = (1 - t) x0 + t eps`. So `x_t / (1 - t)` is `x0` plus noise of size `t / (1 - t)`. We draw
# 1,000 vectors, add noise to some, and take the nearest of the 1,000.

# %%
CANDIDATES = 1000
TRIALS = lesson.size(300, quick=30)
BEFORE = torch.linspace(0.02, 0.98, 33)                # times before they are shifted


def share_found(vectors, t):
    """How often the nearest vector to a noisy one is the right one. vectors: n d."""
    x0 = vectors[:TRIALS]
    noisy = x0 + t / (1 - t) * torch.randn_like(x0)                     # x_t / (1 - t)
    nearest = torch.cdist(noisy, vectors).argmin(1)
    return float((nearest == torch.arange(TRIALS)).float().mean())


torch.manual_seed(0)
vectors_of = {f"{dim}": torch.randn(CANDIDATES, dim) for dim in (16, 64, 256, 1024, 3072)}
# The 16 numbers of a vector, each written down 192 times: 3,072 dimensions.
vectors_of["16, each 192 times"] = vectors_of["16"].repeat(1, 192)
found = {}
for name, vectors in vectors_of.items():
    times = time_shift(BEFORE, dim=vectors.shape[1], base=16)
    found[name] = [share_found(vectors, float(t)) for t in times]

# %% [markdown]
# Each curve is measured at times that are shifted for its dimensions, with base 16. Left, the
# curves are drawn over these times. Right, they are drawn over the times before the shift: if the
# shift is right, all become the curve of 16 dimensions.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.2), sharey=True)
for name, shares in found.items():
    times = time_shift(BEFORE, dim=vectors_of[name].shape[1], base=16)
    style = "o-" if name.isdecimal() else "k--"
    left.plot(times, shares, style, markersize=4, label=name)
    right.plot(BEFORE, shares, style, markersize=4)
left.set(xlabel="time t (0: data, 1: noise)", ylabel="share found among 1,000")
right.set(xlabel="time before the shift with base 16")
left.legend(title="dimensions", fontsize=11)
lesson.show(figure, "nearest", f"{TRIALS} noisy vectors per point, 1,000 candidates of unit "
            "variance per dimension")

# %% [markdown]
# ### How much of the image is known?
#
# A denoiser does not choose among 1,000. It guesses. For data with covariance eigenvalues
# `lambda_i`, the best linear guess of `x0` from `x_t` leaves in direction `i` the error
#
#     lambda_i t^2 / (t^2 + lambda_i (1-t)^2)
#
# of its variance `lambda_i`. Independent dimensions of variance 1 have all eigenvalues 1. Then the
# curve is the same in any number of dimensions! Numbers that repeat each other have few large
# eigenvalues: what several of them say together is known at high noise. So we measure eigenvalues,
# of images at several sizes and of the tiny encoder's latents, all with unit variance per element.

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
print({name: tuple(vectors.shape) for name, vectors in spaces.items()})


def eigenvalues_of(vectors):
    """Eigenvalues of the covariance of vectors n d, scaled to a mean variance of 1 per element."""
    centred = (vectors - vectors.mean(0)).double()
    gram = centred @ centred.T / len(vectors)       # n n: it has the eigenvalues that are not 0
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
    return eigenvalues * vectors.shape[1] / eigenvalues.sum()


def error_at(eigenvalues, t):
    """Error of the best linear guess of x0 at time t, as a share of the variance of x0."""
    left = eigenvalues * t ** 2 / (t ** 2 + eigenvalues * (1 - t) ** 2)
    return float(left.sum() / eigenvalues.sum())


def half_time(eigenvalues):
    """The time at which half of the variance can be guessed, found by bisection."""
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
# `t = 0.5`, where `t / (1 - t) = 1`. So the shift that brings a space to the same state is
# `a = t / (1 - t)` at its half time. Since `a = sqrt(dim / base)`, this is a measured base:
# `dim / a^2`. One may read it as the number of dimensions that say something of their own.

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
left.set(xlabel="time t (0: data, 1: noise)", ylabel="unknown share of the image")
left.legend(fontsize=11)
right.set(xlabel="time before the shift with base 192")
lesson.show(figure, "known", f"best linear guess, from the eigenvalues of {IMAGES} images of one "
            "object")

# %% [markdown]
# ### Where training looks
#
# Four bases, and how often each time is trained with them.

# %%
BASES = {3072: "3072 (no shift)", 340: "340 (default)", 85: "85", 26: "26"}
torch.manual_seed(0)
figure, axes = plt.subplots(figsize=(9, 4.8))
for base, name in BASES.items():
    t = sample_times(100_000, "logit_normal", dim=3072, base=base)
    axes.hist(t.numpy(), bins=100, range=(0, 1), density=True, histtype="step", linewidth=2,
              label=f"{name}: a = {math.sqrt(3072 / base):.1f}")
axes.set(xlabel="time t (0: data, 1: noise)", ylabel="density of training times")
axes.legend(title="base")
lesson.show(figure, "times", "100,000 logit-normal times, shifted for 3,072 numbers")

# %% [markdown]
# ### The shift, on and off
#
# A small class model with each base, in training and in sampling alike. Two of the runs are made
# here; all of them, with three seeds, are in the results of the sweep.

# %%
STEPS = lesson.size(600, quick=2)
JUDGED = lesson.size(72, quick=4)


def run_base(base, seed, folder):
    """Train a small class model with this base of the shift, and judge what it draws."""
    checkpoint = train(train_dit, folder, seed, shift_base=base, steps=STEPS, ema=0.98, width=96,
                       depth=3, head_width=0, batch=lesson.size(32, quick=4),
                       cache=lesson.size(1000, quick=32))
    flags = dict(ckpt=checkpoint, n=JUDGED, sampling_steps=lesson.size(24, quick=2))
    judged = eval_fid.main(eval_fid.parse_args(command_line(flags)))
    keys = ("right_colour", "right_colour_and_shape", "frechet_distance")
    return {key: judged[key] for key in keys}


live = {}
for base in (3072, 340):
    live[base] = run_base(base, 0, lesson.folder / f"live_{base}")
    print(f"base {base}: {live[base]}")

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
            "samples, guidance 1.5; 3 seeds (dots), their mean (bars), this run (red)")

# %% [markdown]
# ## Figure
#
# 1. *Nearest*: 16 numbers are lost in noise at `t = 0.5`, 3,072 numbers only at 0.94. Undone, the
#    shift brings the curves together. For the 16 numbers that are written down 192 times it does so
#    exactly: the mean of 192 noisy copies has noise `sqrt(192)` times smaller, and that is `a`.
# 2. *Known*: for independent numbers, the unknown share depends on `t` alone, not on how many they
#    are. The same images at more pixels are known at higher noise. The shift by `sqrt(dim)` brings
#    the sizes near to each other, and the nearer the larger they are: from 8 to 16 pixels per side
#    the noise they bear grows by 1.6, from 32 to 64 by 1.9, where the shift says 2. Only where new
#    pixels repeat the old ones does it hold.
# 3. *Times*: without shift, one time in ten is above 0.78. There the latents are still well known
#    (figure 2): a model without shift trains little of where images are decided.
# 4. *Base*: the default base has the most right colours: 40% (38 to 43 over 3 seeds), where no
#    shift has 25% (22 to 29) and chance one in six. More shift is worse again: 26% (19 to 35) with
#    base 85, 11% (6 to 15) with base 26, the one that we measured. The distance hardly tells the
#    default (57) from no shift (57), but it tells base 26 (74). Shapes are not right yet in any.
#
# ## Number
#
# Half of the tiny encoder's latents can be guessed at `t = 0.92`: 3,072 numbers that repeat each
# other as those of 32 x 32 pixels do. From 32 to 64 pixels per side, the shift is 1.9. The default
# base has 15 points more right colours than no shift.

# %%
middle = len(BEFORE) // 2                              # the time 0.5
latent_shift = measured["latents of the tiny encoder"]["shift"]
pixel_step = measured["64 x 64 pixels"]["shift"] / measured["32 x 32 pixels"]["shift"]
gain = colours[arms.index("340")].mean() - colours[arms.index("3072")].mean()
lesson.number("3,072 numbers, found at shifted 0.5", found["3072"][middle], 0.6, 0.9,
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
# 1. Show that `time_shift` multiplies `t / (1 - t)`, the noise over the signal, by `a`. Which shift
#    undoes it?
# 2. An image has `m` numbers, each of them `r` times. Show that the noise over the signal at which
#    it is known grows by `sqrt(r)`.
# 3. The paper takes `n = 4096` for its base, whatever the encoder. By the half time of this lesson
#    the tiny latents would have a base of 26. Why is that no contradiction? (What would the half
#    time of a VAE's latents be?)
# 4. Train with the shift, but draw without: `model.shift_base = 3072` after `release.load_dit`.
#    What changes?
#
# <details><summary>Answers</summary>
#
# 1. `t' = a t / (1 + (a-1) t)`, so `1 - t' = (1 - t) / (1 + (a-1) t)`, and
#    `t' / (1 - t') = a t / (1 - t)`. The shift by `1 / a` undoes it.
# 2. The mean of `r` copies has the signal of one and noise `1 / sqrt(r)` as large.
# 3. A base is only relative: `n` numbers that need no shift. A VAE's latents also repeat each
#    other, so their own half time is above 0.5, and the base counts from there. The criterion "half
#    known at 0.5" is stricter than what the authors tuned.
# 4. The sampler takes most of its steps at low noise, and few where the image is decided. Compare
#    the distances; the number of steps matters.
#
# </details>
#
# ## The paper says / ours differs
#
# - RAE (arXiv 2510.11690, Table 4): DiT-XL over DINOv2-B, 80 epochs: gFID 23.08 without shift, 4.81
#   with `a = 6.9`. Scale-RAE (arXiv 2601.16208): GenEval 23.6 without, 49.6 with `a = 8.5`. **Holds
#   here** in right colours, 40% with `a = 3` and 25% without, with no overlap of 3 seeds; **not
#   seen here** in the Fréchet distance, 57 in both. Ours are the first 600 steps of a small model,
#   and 72 samples a seed. A likely cause, not tested: such early samples are far from the data in
#   sharpness, which is decided at low noise, so the distance says little of the colours, which are
#   decided at high noise.
# - The rule `sqrt(m / n)` is of SD3 (arXiv 2403.03206), derived for one image at several
#   resolutions. **Holds here** in that case, the better the higher the resolution (1.6, 1.8, 1.9
#   for each doubling of the side, where the rule says 2).
# - "The shift grows with the number of dimensions" **does not hold in general**: independent
#   dimensions need none, figure 2. What counts is how much they repeat each other, and that is why
#   the base for our tiny encoder is not the paper's 4096: with it, `a` would be 0.87, a shift
#   towards the data.

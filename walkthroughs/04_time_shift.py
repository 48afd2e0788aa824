# %% [markdown]
# # Lesson 4: the more dimensions, the more noise
#
# 30 minutes of class, MINUTES minutes on 2 CPU cores. Needs: lesson 2. The same amount of noise hides
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
import numpy as np
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
TIMES = torch.linspace(0.02, 0.98, 33)


def share_found(vectors, t):
    """How often the nearest vector to a noisy one is the right one. vectors: n d."""
    x0 = vectors[:TRIALS]
    noisy = x0 + t / (1 - t) * torch.randn_like(x0)                     # x_t / (1 - t)
    nearest = torch.cdist(noisy, vectors).argmin(1)
    return float((nearest == torch.arange(TRIALS)).float().mean())


torch.manual_seed(0)
vectors_of = {dim: torch.randn(CANDIDATES, dim) for dim in (16, 64, 256, 1024, 3072)}
found = {}
for dim, vectors in vectors_of.items():
    found[f"{dim}"] = [share_found(vectors, float(t)) for t in TIMES]
# The 16 numbers of a vector, each written down 192 times: 3,072 dimensions.
repeated = vectors_of[16].repeat(1, 192)
found["16, each 192 times"] = [share_found(repeated, float(t)) for t in TIMES]

# %% [markdown]
# More dimensions are found at higher noise. Now undo the shift: a curve of `m` dimensions is drawn
# over the `t` whose shift for `m` dimensions, with base 16, is the true time. If the shift is right,
# all curves become the curve of 16 dimensions.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.2), sharey=True)
for name, shares in found.items():
    dim = int(name) if name.isdecimal() else 3072
    style = "o-" if name.isdecimal() else "k--"
    left.plot(TIMES, shares, style, markersize=4, label=name)
    # The inverse of a shift is the shift with dim and base exchanged.
    right.plot(time_shift(TIMES, dim=16, base=dim), shares, style, markersize=4, label=name)
left.set(xlabel="time t (0: data, 1: noise)", ylabel="found among 1,000")
right.set(xlabel="time before the shift with base 16")
left.legend(title="dimensions", fontsize=11)
lesson.show(figure, "nearest", f"{TRIALS} noisy vectors per point, 1,000 candidates of unit variance "
            "per dimension")

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
# `t = 0.5`, where `t / (1 - t) = 1`. So the shift that brings a space to the same state is `a = t /
# (1 - t)` at its half time. Since `a = sqrt(dim / base)`, this is a measured base: `dim / a^2`. One
# may read it as the number of dimensions that say something of their own.

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

figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.2), sharey=True)
for name, eigenvalues in spectra.items():
    errors = [error_at(eigenvalues, float(t)) for t in TIMES]
    is_pixels = "pixels" in name
    style = "-" if is_pixels else "--"
    left.plot(TIMES, errors, style, linewidth=2, label=name)
    if is_pixels:
        # Base 192: the numbers of an image of 8 x 8 pixels, which is not shifted.
        right.plot(time_shift(TIMES, dim=192, base=measured[name]["dim"]), errors, linewidth=2,
                   label=name)
left.set(xlabel="time t (0: data, 1: noise)", ylabel="unknown share of the image")
left.legend(fontsize=11)
right.set(xlabel="time before the shift with base 192", title="pixels, shift undone")
lesson.show(figure, "known", f"best linear guess, from eigenvalues of {IMAGES} images of one object")

# %% [markdown]
# ### Where training looks
#
# Four bases, and how often each time is trained with them.

# %%
BASES = {3072: "3072 (no shift)", 1024: "1024", 340: "340 (default)", 85: "85"}
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
# The class model with each base, in training and in sampling alike. Two of the runs are made here;
# all of them, with three seeds, are in the results of the sweep.

# %%
STEPS = lesson.size(200, quick=2)
JUDGED = lesson.size(72, quick=4)


def run_base(base, seed, folder):
    """Train the class model with this base of the shift, and judge what it draws."""
    checkpoint = train(train_dit, folder, seed, shift_base=base, steps=STEPS, ema=0.98,
                       batch=lesson.size(32, quick=4), cache=lesson.size(2000, quick=32))
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
left.set(xlabel="base of the shift", ylabel="samples of the right colour, %", ylim=(0, 100))
right.set(xlabel="base of the shift", ylabel="Fréchet distance, tiny encoder")
lesson.show(figure, "base", f"class model after 200 steps of 32 images; 72 samples, guidance 1.5; "
            "3 seeds (dots), their mean (bars), this run (red)")

# %% [markdown]
# # Lesson 12: RAE against VAE
#
# 40 minutes of class, 3 minutes on 2 CPU cores. Needs: lessons 1, 2 and 3. A VAE learns its latents
# to rebuild pixels. An RAE takes the latents of an encoder that was trained, without labels, to
# describe what an image shows. The same DiT is trained over both, for the same number of steps.

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
import json
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import torch
from lesson import COLOURS, Lesson, command_line, draw_band, train

import sample
import train_decoder
import train_dit
from data import load_images, open_data
from eval_decoder import evaluate_reconstruction
from eval_fid import evaluate_generation
from metrics import EncoderFeatures, linear_probe
from model import flow_matching_loss
from release import load_dit, load_encoder, load_rae
from shapes import CLASSES

lesson = Lesson("12_rae_vs_vae")

# %% [markdown]
# ## Question
#
# A VAE rebuilds an image better, and its latents are smaller. Why, then, should a diffusion model
# learn faster over the latents of a frozen vision encoder? And which of the two is sooner learned
# by heart, when a trained model is finetuned on few images for many epochs?
#
# ## Predict
#
# Write down, before you run anything:
#
# 1. The tiny encoder was taught to say what lies where, the VAE has only ever copied pixels. Over
#    which latents does a DiT sooner draw the right *colour*? The right *shape*?
# 2. How many times as many steps does the slower one need?
# 3. Both trained models are finetuned on 256 images, 64 times over. Does the error on other images
#    fall, stay, or rise? In which latent space first?

# %% [markdown]
# ## Read
#
# - `Encoder` in model.py, `[L1]`, and `VAE` in baselines.py: both turn an image of 64 x 64 pixels
#   into 4 x 4 tokens. The encoder is frozen and has 192 channels; the VAE is trained together with
#   its decoder and has 64 here, as many as the VAE of FLUX has for a patch of 16 x 16 pixels.
# - `VAE.sample_posterior` in baselines.py: the noise and the KL divergence that make a VAE of an
#   autoencoder. `RAE.encode` in model.py, `[L3]`, brings both kinds of latents to unit variance.
# - `flow_matching_loss` in model.py, `[L9]`, and the loop of train_dit.py: nothing in them knows
#   which latents it is given.
# - `DiTDH` in model.py, `[L6]`: the wide head has 192 channels, as many as the RAE's latents, so
#   that neither space is held back by the width (lesson 3).

# %% [markdown]
# ## Run
#
# Two autoencoders. Both decoders have the same size and are trained for the same number of steps
# with the same loss. For the VAE, this trains the encoder as well.

# %%
DECODER_STEPS = lesson.size(200, quick=2)
SPACES = {
    "RAE": dict(encoder="tiny"),
    "VAE": dict(encoder="vae:64:16", tau=0),       # tau: it has noise of its own
}


@cache
def autoencoder(space):
    """The checkpoint of a space's autoencoder; all runs of the lesson share it."""
    return train(train_decoder, lesson.folder / "autoencoders" / space, steps=DECODER_STEPS,
                 eval_every=0, stats_n=lesson.size(2000, quick=64), **SPACES[space])


# Features of every Frechet distance: those of the tiny encoder.
features = EncoderFeatures(load_encoder("tiny").to(lesson.device))
held_out = open_data("shapes", 64, split="val", objects=1)
autoencoders = {}
for space in SPACES:
    autoencoders[space] = load_rae(autoencoder(space)).to(lesson.device)

# %%
pixels = load_images(held_out, range(8)).movedim(3, 1).float().to(lesson.device) / 255     # 8 3 H W
rows = [pixels]
for rae in autoencoders.values():
    with torch.no_grad():
        rows.append(rae.decode(rae.encode(pixels)))
figure, panels = plt.subplots(3, 8, figsize=(12, 5))
for row, name, images in zip(panels, ("original", *SPACES), rows, strict=True):
    for panel, image in zip(row, images.cpu().movedim(1, 3), strict=True):
        panel.imshow(image)
        panel.set(xticks=[], yticks=[])
    row[0].set_ylabel(name)
lesson.show(figure, "reconstructions", "held-out images, encoded and decoded; both decoders after "
            f"{DECODER_STEPS} steps")

# %% [markdown]
# ### What the latents know
#
# Two numbers of each space: how well the decoder rebuilds the image (PSNR, in decibels), and how
# well a linear classifier reads the class out of the latents (a *probe*).

# %%
@torch.no_grad()
def latents_and_labels(rae, data, n):
    """All latents of the first n images as one row each, n c*h*w, and their classes, n."""
    images = load_images(data, range(n)).movedim(3, 1).float() / 255    # n 3 64 64
    rows = []
    for batch in images.split(250):
        rows.append(rae.encode(batch.to(lesson.device)).flatten(1).cpu())
    labels = [data[k]["label"] for k in range(n)]
    return torch.cat(rows), torch.tensor(labels)


knows, rebuilds = {}, {}
for space, rae in autoencoders.items():
    x, y = latents_and_labels(rae, open_data("shapes", 64, objects=1), lesson.size(2000, quick=40))
    x_test, y_test = latents_and_labels(rae, held_out, lesson.size(500, quick=20))
    steps = lesson.size(300, quick=3)
    knows[space] = 100 * linear_probe(x, y, x_test, y_test, classes=36, steps=steps)
    n = lesson.size(200, quick=8)
    rebuilds[space] = evaluate_reconstruction(rae, held_out, n, features=features)
    print(f"{space}: the class is read from the latents in {knows[space]:.1f}%, "
          f"PSNR {rebuilds[space]['psnr']:.1f} dB")

# %% [markdown]
# ### A race
#
# The same DiT with the wide head of lesson 3, the same batches, the same noise, the same number of
# steps. Every few steps, 72 samples are drawn, two of each class, and `read_scene` looks at them.

# %%
RACE_STEPS = lesson.size(200, quick=4)
EVALUATED = lesson.size(72, quick=4)
SAMPLING_STEPS = lesson.size(24, quick=2)
SHOWN_CLASSES = list(range(0, 36, 5))              # every fifth of the 36 classes
# What is the default for the tiny encoder, given to the VAE as well.
SAME_FOR_ALL = dict(shift_base=340, prediction="x0", ema=0.98)


def race(space, seed, folder, steps=RACE_STEPS, evaluations=4):
    """Train a DiT over a space; its numbers at each evaluation, as lists by name."""
    train(train_dit, folder, seed, rae=autoencoder(space), steps=steps,
          cache=lesson.size(2000, quick=64), eval_every=steps // evaluations, eval_n=EVALUATED,
          eval_features="tiny", sampling_steps=SAMPLING_STEPS, **SAME_FOR_ALL)
    numbers = dict(steps=[], colour=[], colour_and_shape=[], distance=[])
    for line in (folder / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "right_colour" in record:
            numbers["steps"].append(record["step"])
            numbers["colour"].append(100 * record["right_colour"])
            numbers["colour_and_shape"].append(100 * record["right_colour_and_shape"])
            numbers["distance"].append(record["frechet_distance"])
    return numbers


CLASS_STEPS = lesson.size(100, quick=1)
in_class = {}
drawn = {}
for space in SPACES:
    folder = lesson.folder / "in_class" / space
    in_class[space] = race(space, 0, folder, steps=CLASS_STEPS, evaluations=1)
    model, rae, _ = load_dit(folder / "last.pt", lesson.device)
    args = sample.parse_args(["--sampling_steps", str(SAMPLING_STEPS)])
    drawn[space] = sample.generate(model, rae, SHOWN_CLASSES, args)     # 8 H W 3
figure, panels = plt.subplots(2, 8, figsize=(12, 4))
for row, space in zip(panels, SPACES, strict=True):
    for panel, image, label in zip(row, drawn[space], SHOWN_CLASSES, strict=True):
        panel.imshow(image)
        panel.set(xticks=[], yticks=[])
        if space == "RAE":
            panel.set_title(CLASSES[label].replace(" ", "\n"), fontsize=12)
    row[0].set_ylabel(space)
lesson.show(figure, "in_class", f"samples after {CLASS_STEPS} steps over each space; guidance 1.5, "
            "one seed")

# %% [markdown]
# ### Finetuning on few images
#
# The models of the race are trained on, at a constant rate, on 256 images that they have not seen,
# again and again. An epoch is 256 images, or 4 steps. After 4, 16 and 64 epochs we measure the
# squared error of the predicted `x0`, as a share of the variance of the latents: on the images that
# it is finetuned on, and on held-out ones. And we draw again.

# %%
FINETUNED_ON = lesson.size(256, quick=64)
EPOCHS = [4, 16, 64]


@torch.no_grad()
def relative_error(model, rae, data, n):
    """Squared error of the predicted x0 over the variance of x0, for the first n images, %.

    Mean over 8 times and the same noise for every model.
    """
    images = load_images(data, range(n)).movedim(3, 1).float() / 255    # n 3 64 64
    labels = torch.tensor([data[k]["label"] for k in range(n)], device=lesson.device)
    x0 = rae.encode(images.to(lesson.device))                           # n c h w
    eps = sample.noise(x0.shape[1:], 0, range(n)).to(lesson.device)     # n c h w
    errors = []
    for k in range(1, 9):
        t = torch.full((n,), k / 9, device=lesson.device)               # n
        loss = flow_matching_loss(model, x0, labels, t, eps)            # n, squared error of v
        errors.append((t.square() * loss).mean())                       # of x0
    return 100 * float(torch.stack(errors).mean() / x0.square().mean())


def measure(path, few):
    """Errors of a checkpoint on the few images and on held-out ones, and its samples."""
    model, rae, _ = load_dit(path, lesson.device, with_encoder=True)
    args = sample.parse_args(["--sampling_steps", str(SAMPLING_STEPS)])
    drawn = evaluate_generation(model, rae, held_out, args, EVALUATED, features=features)
    n = lesson.size(128, quick=8)
    return dict(error_of_few=relative_error(model, rae, few, n),
                error_held_out=relative_error(model, rae, held_out, n),
                colour=100 * drawn["right_colour"], distance=drawn["frechet_distance"])


def finetune(start, seed, folder):
    """Train on from the checkpoint `start`; lists of numbers before and after each of EPOCHS."""
    few = open_data("shapes", 64, 100 + seed, objects=1)                # the race saw seeds 0 to 2
    points = [measure(start, few)]
    steps_of_epoch = max(1, FINETUNED_ON // 64)                         # 64: the batch
    last_step = EPOCHS[-1] * steps_of_epoch
    for epochs in EPOCHS:
        steps = epochs * lesson.size(steps_of_epoch, quick=1)
        if epochs == EPOCHS[0]:
            path = train(train_dit, folder, seed, dict(data=few), init=start, cache=FINETUNED_ON,
                         steps=steps, lr=1e-3, warmup=4, decay_start=last_step,
                         decay_end=last_step, **SAME_FOR_ALL)
        else:                                                           # go on, up to more steps
            flags = dict(resume=True, out=folder, steps=steps)
            train_dit.main(train_dit.parse_args(command_line(flags)), data=few)
        points.append(measure(path, few))
    return {name: [point[name] for point in points] for name in points[0]}


def race_and_finetune(space, seed, folder):
    """One run of the sweep."""
    return dict(race=race(space, seed, folder / "race"),
                finetuned=finetune(folder / "race" / "last.pt", seed, folder / "finetuned"))


results = lesson.sweep("race", list(SPACES), race_and_finetune)

# %%
def over_seeds(space, part, name):
    """A list of numbers of each run: points x seeds."""
    return np.array([run[part][name] for run in results[space]], float).T


figure, panels = plt.subplots(1, 3, figsize=(15, 5))
for panel, name, label in zip(panels, ("colour", "colour_and_shape", "distance"), (
        "right colour, %", "right colour and shape, %", "Frechet distance"), strict=True):
    for space in SPACES:
        steps = results[space][0]["race"]["steps"]
        draw_band(panel, steps, over_seeds(space, "race", name), space)
    panel.set(xlabel="steps of 64 images", ylabel=label)
panels[0].legend()
lesson.show(figure, "race", "72 samples at each point, guidance 1.5, mean and range of 3 seeds; "
            "the distance is to held-out images, in features of the tiny encoder")

# %%
epochs = np.array([0, *EPOCHS])
places = np.arange(len(epochs))
figure, panels = plt.subplots(1, 3, figsize=(15, 5))
for space, dark, light in (("RAE", COLOURS[0], COLOURS[5]), ("VAE", COLOURS[1], COLOURS[4])):
    error = over_seeds(space, "finetuned", "error_held_out")            # points x seeds
    error_of_few = over_seeds(space, "finetuned", "error_of_few")
    before = error[0]
    draw_band(panels[0], places, error / before, f"{space}, held-out images", color=dark)
    draw_band(panels[0], places, error_of_few / before, f"{space}, the 256 images", color=light)
    draw_band(panels[1], places, over_seeds(space, "finetuned", "colour"), space, color=dark)
    draw_band(panels[2], places, over_seeds(space, "finetuned", "distance"), space, color=dark)
panels[0].set_ylabel("error of x0 (held-out before: 1)")
panels[1].set_ylabel("right colour, %")
panels[2].set_ylabel("Frechet distance")
for panel in panels:
    panel.set(xlabel="epochs of finetuning on 256 images", xticks=places, xticklabels=epochs)
    panel.legend(fontsize=11)
lesson.show(figure, "finetuning", "128 images for each error, 72 samples for colour and distance; "
            "mean and range of 3 seeds")

# %% [markdown]
# ## Figure
#
# 1. *Reconstructions*: which of the two keeps the outlines, which the colours?
# 2. *In class*: after 100 steps, look for colours first. A shape needs several tokens that agree.
# 3. *Race*: after 200 steps the VAE is ahead in right colours, 26% (25 to 28) against 20% (17 to
#    22), and no shape is right in either. By the distance RAE is ahead at every point, 57 (55 to
#    60) after 150 steps and 59 (54 to 62) after 200 against 71 and 64 (61 to 69). But the distance
#    is measured in features of RAE's own encoder, so it is no impartial judge. The panels do not
#    agree on a winner.
# 4. *Finetuning*, left: the error on the 256 images falls faster than the one on held-out images,
#    and the gap between them is what has been learned by heart. But the held-out error does not
#    turn and rise within 64 epochs, in either space. Middle and right: the samples still get
#    better. These models had seen 12,800 images before, so finetuning is for them more training.
#
# ## Number
#
# The class can be read from the latents of RAE in 99% and of the VAE in 18%; the VAE rebuilds
# images with 25.2 dB, RAE with 26.3. After the race 20% and 26% of the images have the right
# colour, at distances of 59 and 64. After 64 epochs of finetuning, the held-out error is the least
# of all points in both spaces.

# %%
def last(space, part, name):
    """Mean over seeds of the last number of each run."""
    return over_seeds(space, part, name)[-1].mean()


for space in SPACES:
    error = over_seeds(space, "finetuned", "error_held_out")            # points x seeds
    rise = last(space, "finetuned", "error_held_out") / error.min(0).mean()
    lesson.number(f"{space}: held-out error after 64 epochs over the least", rise, 1, 1.1)
    lesson.number(f"{space}: right colour after the race, %", last(space, "race", "colour"), 10, 40)
    lesson.number(f"{space}: distance after the race", last(space, "race", "distance"), 50, 75)
lesson.number("class read from the latents, RAE, %", knows["RAE"], 85, 100, quick=(0, 100))
lesson.number("class read from the latents, VAE, %", knows["VAE"], 0, 60, quick=(0, 100))
lesson.number("PSNR of the RAE, dB", rebuilds["RAE"]["psnr"], 15, 30, quick=(0, 40))
lesson.number("PSNR of the VAE, dB", rebuilds["VAE"]["psnr"], 15, 35, quick=(0, 40))
lesson.end()

# %% [markdown]
# ## Exercise
#
# 1. The tiny encoder was made for this very world: it regresses a descriptor of the nearest object,
#    its outline, its colour and its place (`assets/make_tiny_encoder.py`). Is that fair? Replace
#    `encoder="tiny"` by `encoder="random"`, a frozen encoder of the same layout that was never
#    taught anything. What do you expect of its probe, its PSNR, and its race?
# 2. Our VAE's latents have 64 channels and a KL weight of 1e-4. Train it with `vae:16:16`: which of
#    PSNR and race gets better, which worse?
# 3. The axis of the race counts steps of the DiT. What does it leave out?
# 4. Why does the figure of the finetuning show errors relative to the start instead of the errors?
#
# <details><summary>Answers</summary>
#
# 1. It is as fair as DINOv2 is for photographs, whose world it was made for, too. But the
#    descriptor was chosen to be easy to generate, so how *much* faster our RAE is says little about
#    the paper's. The random encoder separates the layout of the latents (192 channels, frozen) from
#    what they know. Its probe reads the class in 16%, that of the tiny encoder in 99%. If knowing
#    is what makes RAE fast, its race must be slow. It is not run here.
# 2. Fewer channels rebuild worse. The DiT then has fewer numbers to get right, which usually makes
#    its race faster: this trade is what VAEs are tuned by. An RAE does not make it.
# 3. The training of the autoencoder and of the encoder before it. The encoders of the papers were
#    trained on more images than the diffusion models, but once for all uses.
# 4. The error is a share of the variance of the latents, and a percent of one space's variance is
#    not a percent of the other's: in VAE latents much of the variance is texture of the background,
#    which nobody can predict.
#
# </details>
#
# ## The paper says / ours differs
#
# - Scale-RAE (arXiv 2601.16208) trains the same DiT over SigLIP-2 and over the VAE of FLUX: after
#   pretraining, GenEval 49.5 against 39.6 (table 4), and RAE gets as far as the VAE in a fourth of
#   the steps (4.0 times as fast by GenEval, 4.6 times by DPG-Bench). **Doesn't hold here**: after
#   200 steps the VAE has more right colours, and RAE the smaller distance, in features of its own
#   encoder. 200 steps are very early: no shape is right yet. And our encoder was taught no such
#   thing as language; it is DiT and decoder that are small here, and the VAE's latents of one
#   object on a plain ground are simple.
# - In finetuning, its VAE model overfits after 64 epochs, its RAE model is stable up to 256
#   (section 4, figure 6). **Not testable** in 64 epochs of 256 images: neither overfits. In a
#   longer study of an earlier commit, of 128 pairs and 256 epochs, both did, RAE sooner (BENCH.md).
# - Its finetuning is text to image on 60,000 pairs; ours is by class on 256 images, since on a
#   laptop 64 epochs must be short. A class says little about an image, so there is less to learn by
#   heart than in a caption.
# - Both of our models predict `x0` with the same weighted loss; the paper's predict `v`. For a VAE
#   that need not be the best choice.

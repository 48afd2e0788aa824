# %% [markdown]
# # Lesson 12: RAE against VAE
#
# 40 minutes of class, 3 minutes on 2 CPU cores. Needs: lessons 1, 2, 3 and 6. A VAE learns its
# latents to rebuild pixels. An RAE takes the latents of an encoder that was trained beforehand, to
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
# A VAE is trained to rebuild images, and its latents have fewer channels. Why, then, should a
# diffusion model learn faster over the latents of a frozen vision encoder? And over which of the
# two does a trained model sooner learn images by heart, if it is finetuned on few of them for many
# epochs?
#
# ## Predict
#
# Write down, before you run anything:
#
# 1. The tiny encoder was taught to say what lies where, and the VAE has only copied pixels. Over
#    which latents does a DiT sooner draw the right *colour*? The right *shape*?
# 2. How many times as many steps does the slower one need?
# 3. Both trained models are finetuned on 256 images for 64 epochs. Does the error on other images
#    fall, stay, or rise? Over which latents does it rise first?

# %% [markdown]
# ## Read
#
# - `Encoder` in model.py, `[L1]`, and `VAE` in baselines.py: both turn an image of 64 x 64 pixels
#   into 4 x 4 tokens. The encoder is frozen and has 192 channels; the VAE is trained together with
#   its decoder and has 64 here, as many as the VAE of FLUX has for a patch of 16 x 16 pixels.
# - `VAE.sample_posterior` in baselines.py: the noise and the KL divergence that turn an
#   autoencoder into a VAE. `RAE.encode` in model.py, `[L3]`, brings both kinds of latents to unit
#   variance.
# - `flow_matching_loss` in model.py, `[L9]`, and the loop of train_dit.py: nothing in them knows
#   which latents it is given.
# - `DiTDH` in model.py, `[L6]`: the width of the wide head is 192, the number of channels of the
#   RAE's latents, so that neither space is held back by the width (lesson 3).

# %% [markdown]
# ## Run
#
# Two autoencoders are trained. Both decoders have the same size, the same number of steps and the
# same loss. For the VAE, its encoder is trained along with the decoder.

# %%
DECODER_STEPS = lesson.size(200, quick=2)
SPACES = {
    "RAE": dict(encoder="tiny"),
    # tau is the noise of lesson 5, which the VAE does not need: it draws its latents at random.
    "VAE": dict(encoder="vae:64:16", tau=0),
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
# Two numbers for each space: how well the decoder rebuilds the image (PSNR, in decibels), and how
# well a linear classifier, a *probe*, reads the class out of the latents. Chance is 1 in 36.

# %%
@torch.no_grad()
def latents_and_labels(rae, data, n):
    """The latents of the first n images, flattened, n c*h*w, and their classes, n."""
    images = load_images(data, range(n)).movedim(3, 1).float() / 255    # n 3 64 64
    rows = []
    for batch in images.split(250):
        rows.append(rae.encode(batch.to(lesson.device)).flatten(1).cpu())
    labels = [data[k]["label"] for k in range(n)]
    return torch.cat(rows), torch.tensor(labels)


train_set = open_data("shapes", 64, objects=1)
probe_accuracy, psnr = {}, {}
for space, rae in autoencoders.items():
    latents, labels = latents_and_labels(rae, train_set, lesson.size(2000, quick=40))
    test_latents, test_labels = latents_and_labels(rae, held_out, lesson.size(500, quick=20))
    probe_accuracy[space] = 100 * linear_probe(
        latents, labels, test_latents, test_labels, classes=36, steps=lesson.size(300, quick=3))
    n = lesson.size(200, quick=8)
    psnr[space] = evaluate_reconstruction(rae, held_out, n, features=features)["psnr"]
    print(f"{space}: the class is read from the latents in {probe_accuracy[space]:.1f}%, "
          f"PSNR {psnr[space]:.1f} dB")

# %% [markdown]
# ### A race
#
# The same DiT with a wide head, the same images in the same order, the same number of steps. Only
# the shift of time (lesson 4) differs, as it depends on the dimensions of the latents: by a factor
# a of 3.0 over the RAE's 16 x 192, of 1.7 over the VAE's 16 x 64. In class the race has 100 steps
# and one seed. With `--full`, whose results the figure "race" shows, it has 200 steps and three
# seeds. Every 50 steps, 72 samples are drawn, two of each class, and `read_scene` says which show
# the right colour and the right shape.

# %%
RACE_STEPS = lesson.size(200, quick=4)
EVALUATED = lesson.size(72, quick=4)
SAMPLING_STEPS = lesson.size(24, quick=2)
SHOWN_CLASSES = list(range(0, 36, 5))              # every fifth of the 36 classes
# The defaults of train_dit.py for the tiny encoder, used for the VAE as well.
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
# Each model of the race is trained further, at a constant learning rate, on 256 images that it has
# not seen. An epoch is 256 images, or 4 steps. After 4, 16 and 64 epochs we measure the squared
# error of the predicted `x0`, as a share of the variance of the latents: on the images that the
# model is finetuned on, and on held-out ones. And we draw again.

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
    last_step = EPOCHS[-1] * steps_of_epoch            # no decay before it: the rate is constant
    for epochs in EPOCHS:
        steps = epochs * lesson.size(steps_of_epoch, quick=1)
        if epochs == EPOCHS[0]:
            path = train(train_dit, folder, seed, dict(data=few), init=start, cache=FINETUNED_ON,
                         steps=steps, lr=1e-3, warmup=4, decay_start=last_step,
                         decay_end=last_step, **SAME_FOR_ALL)
        else:                                          # resume the run, up to a later step
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
# 1. *Reconstructions*: 200 steps are few. Both decoders have the place and the colour of the
#    objects, and neither has sharp outlines. RAE is a little closer: compare the rings.
# 2. *In class*: after 100 steps there are blots in place of objects, over both spaces. A colour
#    comes before a shape, for which several tokens must agree.
# 3. *Race*: after 200 steps the VAE has more right colours, 26% (25 to 28), than RAE, 20% (17 to
#    22). But the next figure draws from the same checkpoints once more, with other noise in two of
#    the three seeds. At 0 epochs it shows 22% (19 to 25) for the VAE and 25% (17 to 32) for RAE:
#    the order has turned around. So 72 samples of each seed cannot tell them apart. In colour and
#    shape, no sample is right after 200 steps; the peak at 150 is one sample of 72. The distance of
#    RAE is less at every point, after 200 steps 59 (54 to 62) against 64 (61 to 69). But it is
#    measured in features of RAE's own encoder, which is no impartial judge. There is no winner.
# 4. *Finetuning*, left: in the first 4 epochs the held-out error rises a little. The likely cause
#    is the learning rate, which is higher than at the end of the race. Then all errors fall, on the
#    256 images faster than on held-out ones. The gap between the two is what has been learned by
#    heart. After 64 epochs it is about the same in both spaces, 2.5% and 2.6% of the variance of
#    the latents; relative to the error at the start it is larger for RAE, 0.33 against 0.24. But in
#    neither space is the held-out error above its start: this is no overfitting yet. Middle: many
#    more colours are right than before. Right: the distance changes less than it differs between
#    seeds. These models are young. In the race they had 200 steps on 2,000 images, and the
#    finetuning adds 256 steps. So for them it is above all more training.
#
# ## Number
#
# The class can be read from the latents of RAE in 99% and of the VAE in 18%. RAE rebuilds images
# with 26.3 dB, the VAE with 25.2. After the race 20% and 26% of the images have the right colour,
# at distances of 59 and 64. Of the four points of finetuning, the held-out error is least after 64
# epochs, in both spaces.

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
lesson.number("class read from the latents, RAE, %", probe_accuracy["RAE"], 85, 100,
              quick=(0, 100))
lesson.number("class read from the latents, VAE, %", probe_accuracy["VAE"], 0, 60, quick=(0, 100))
lesson.number("PSNR of the RAE, dB", psnr["RAE"], 15, 30, quick=(0, 40))
lesson.number("PSNR of the VAE, dB", psnr["VAE"], 15, 35, quick=(0, 40))
lesson.end()

# %% [markdown]
# ## Exercise
#
# 1. The tiny encoder was made for this very world: each token describes the nearest object, its
#    outline, its colour and its place (`assets/make_tiny_encoder.py`). Is that fair? Replace
#    `encoder="tiny"` by `encoder="random"`, a frozen encoder of the same layout that was never
#    trained. What do you expect of its probe, its PSNR, and its race?
# 2. Our VAE's latents have 64 channels and a KL weight of 1e-4. Train it with `vae:16:16`: which of
#    PSNR and race gets better, which worse?
# 3. The axis of the race counts steps of the DiT. What does it leave out?
# 4. Why does the figure of the finetuning show errors relative to the start instead of the errors?
#
# <details><summary>Answers</summary>
#
# 1. It is fair in one way: DINOv2, too, was trained on images such as those that it encodes. In
#    another way it is not: our descriptor was chosen to be easy to generate. So whichever wins
#    here, the margin says little about the paper's encoders. The random encoder has the layout of
#    the tiny one, 192 channels that are frozen, and none of its knowledge. A probe reads the class
#    from its latents in 16% (lesson 1), from those of the tiny encoder in 99%. If it is knowledge
#    that helps a DiT, the race over random latents must be the slower one. It is not run here.
# 2. With fewer channels the VAE rebuilds worse. But the DiT has fewer numbers to get right, so its
#    race usually gets faster. This trade is what VAEs are tuned by; an RAE takes its encoder as it
#    is.
# 3. It leaves out the training of the autoencoder, and of the encoder before it. The encoders of
#    the papers were trained on more images than the diffusion models, but once for all uses.
# 4. The error is a share of the variance of the latents. How much of this variance can be predicted
#    at all differs between the spaces, so 7% in one and 7% in the other are not equally good.
#
# </details>
#
# ## The paper says / ours differs
#
# - Scale-RAE (arXiv 2601.16208) trains the same DiT over SigLIP-2 and over the VAE of FLUX. After
#   pretraining, GenEval is 49.5 against 39.6 (table 4), and RAE gets as far as the VAE in a fourth
#   of the steps (4.0 times as fast by GenEval, 4.6 times by DPG-Bench). **Not shown here**: after
#   200 steps there is no winner. 200 steps are early, as no shape is right yet. And the worlds
#   differ: images of one object on a plain ground are simple for a VAE, too.
# - In finetuning, its VAE model overfits after 64 epochs, its RAE model is stable up to 256
#   (section 4, figure 6). **Not testable** in 64 epochs of 256 images: neither overfits. In a
#   longer study of an earlier commit, of 128 pairs and 256 epochs, both did. The held-out error of
#   RAE rose from 16 epochs on, that of the VAE only after 64 (BENCH.md).
# - Its finetuning is text to image on 60,000 pairs. Ours is by class on 256 images, since on a
#   laptop 64 epochs must be short.
# - Both of our models predict `x0` with the same weighted loss, and the paper's predict `v`. This
#   was chosen for the tiny encoder, and need not be the best choice for a VAE.

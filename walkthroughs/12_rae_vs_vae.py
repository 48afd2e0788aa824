# %% [markdown]
# # Lesson 12: RAE against VAE
#
# 40 minutes of class, MINUTES on 2 CPU cores. Needs: lessons 1, 3 and 10. A VAE learns its latents to
# rebuild pixels; an RAE takes the latents of an encoder that was taught what images show. The same
# DiT is trained over both, for the same number of steps.

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
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import torch
import train_decoder
import train_dit
import train_t2i
from lesson import COLOURS, Lesson, command_line, draw_band, draw_paper_line, read_json, train

import eval_decoder
import release
import runtime
import sample
from data import ImageData, load_images, open_data
from metrics import EncoderFeatures
from model import flow_matching_loss
from shapes import layout
from t2i import load_t2i

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
# 1. The tiny encoder knows the classes of the shapes, the VAE has only ever copied pixels. Over
#    which latents does a DiT sooner draw the right *colour*? The right *shape*?
# 2. How many times as many steps does the slower one need?
# 3. Both text-to-image models are finetuned on the same 256 images, 64 times over. Does the error on
#    other images fall, stay, or rise? In which latent space first?

# %% [markdown]
# ## Read
#
# - `Encoder` in model.py, `[L1]`, and `VAE` in baselines.py: both turn an image of 64 x 64 pixels
#   into 4 x 4 tokens. The encoder is frozen and has 192 channels; the VAE is trained together with
#   its decoder and has 64 here, as many as the VAE of FLUX has for a patch of 16 x 16 pixels.
# - `sample_posterior` in train_decoder.py: the noise and the KL divergence that make a VAE of an
#   autoencoder. `RAE.encode` in model.py, `[L3]`, brings both kinds of latents to unit variance.
# - `flow_matching_loss` in model.py, `[L9]`, and the loop of train_dit.py: nothing in them knows which
#   latents it is given.
# - `train_t2i.py`, `[T2]`: the loss of the finetuning.

# %% [markdown]
# ## Run
#
# Two autoencoders. Both decoders have the same size and are trained for the same number of steps with
# the same loss; for the VAE, this trains the encoder as well.

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


held_out = open_data("shapes", 64, split="val", objects=1)
images = load_images(held_out, range(8))                                # 8 64 64 3
autoencoders = {}
for space in SPACES:
    autoencoders[space] = release.load_rae(autoencoder(space)).to(lesson.device)

# %% [markdown]
# ### What the latents know
#
# Two numbers of each space: how well the decoder rebuilds the image (PSNR, in decibels), and how
# well a linear classifier reads the class out of the latents (a *probe*).

# %%
PROBE_IMAGES = lesson.size(1500, quick=80)
TESTED = lesson.size(500, quick=40)


def class_from_latents(rae):
    """Held-out images whose class a linear classifier reads out of all latents, %."""
    latents = {}
    labels = {}
    for split, n in (("train", PROBE_IMAGES), ("val", TESTED)):
        data = open_data("shapes", 64, split=split, objects=1)
        items = [data[k] for k in range(n)]
        pixels = torch.stack([item["image"] for item in items]).float() / 255       # n 3 64 64
        latents[split] = torch.cat([rae.encode(part.to(lesson.device)).cpu().flatten(1)
                                    for part in pixels.split(250)])     # n c*h*w
        labels[split] = torch.tensor([item["label"] for item in items])
    accuracy = linear_probe(latents["train"], labels["train"], latents["val"], labels["val"],
                            num_classes=36)
    return 100 * accuracy


knows = {}
rebuilds = {}
for space, rae in autoencoders.items():
    knows[space] = class_from_latents(rae)
    features = EncoderFeatures(autoencoders["RAE"].encoder)
    n = lesson.size(200, quick=20)
    rebuilds[space] = eval_decoder.evaluate_reconstruction(rae, held_out, n, features=features)
    print(f"{space}: the class is read from the latents in {knows[space]:.1f}%, "
          f"PSNR {rebuilds[space]['psnr']:.1f} dB")

# %% [markdown]
# # Lesson 9: what a decoder learns from its data and its losses
#
# 35 minutes of class, 4 minutes on 2 CPU cores. Needs: lesson 1.


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

import matplotlib.pyplot as plt
import numpy as np
import torch
from lesson import COLOURS, Lesson, draw_band, draw_dots, draw_paper_line, train, values_of

import metrics
import train_decoder
from data import load_images, open_data
from eval_decoder import readable, reconstruct, to_uint8
from metrics import EncoderFeatures, FeatureSet
from release import SHIPPED_RAE, load_encoder, load_rae

lesson = Lesson("09_decoder_data")

# %% [markdown]
# ## Question
#
# ## Predict
#
# ## Read
#
# ## Run
#
# ### Five decoders

# %%
STEPS = lesson.size(100, quick=2)
BOTH = ["shapes=shapes:0.5", "text=text:0.5"]
DECODERS = {
    "shapes, L1": dict(data=["shapes"]),
    "text, L1": dict(data=["text"]),
    "both, L1": dict(data=BOTH),
    "both, L1 + feature": dict(data=BOTH, feature=0.3),
    "both, L1 + feature + GAN": dict(data=BOTH, feature=0.3, gan=0.3, disc_start=0,
                                     gan_start=STEPS // 4, disc_warmup=STEPS // 5),
}


def train_one(name, seed, folder):
    """The RAE whose decoder is trained on from the shipped one, with these data and losses."""
    path = train(train_decoder, folder, seed, init=SHIPPED_RAE, decoder_depth=4, lr=3e-3,
                 steps=STEPS, batch=lesson.size(32, quick=4), log_every=lesson.size(5, quick=1),
                 eval_every=0, stats_n=64, **DECODERS[name])
    return load_rae(path).to(lesson.device)


# %% [markdown]
# ### What is measured

# %%
N_IMAGES = lesson.size(200, quick=4)
N_READ = lesson.size(100, quick=2)
worlds = {name: open_data([name], 64, split="val") for name in ("shapes", "text")}
judges = {"tiny": EncoderFeatures(load_encoder("tiny").to(lesson.device)),
          "random": EncoderFeatures(load_encoder("random").to(lesson.device))}


def edge_strength(images):
    """Root mean square difference of neighbouring pixels of images n H W 3, uint8."""
    images = images.float()
    squares = images.diff(dim=1).square().mean() + images.diff(dim=2).square().mean()
    return float(squares.sqrt())


def distance_by(judge, images, others):
    """Fréchet distance of two sets of images n H W 3 in the features of a judge."""
    sets = []
    for batch in (images, others):
        feature_set = FeatureSet(judge, keep=0)
        feature_set.add(batch, range(len(batch)))
        sets.append(feature_set.merge().pooled)
    return metrics.distance(*sets)


def measure(rae):
    """Numbers of the reconstructions of held-out images of both worlds: a dict."""
    measured = {}
    for name, world in worlds.items():
        pixels = load_images(world, range(N_IMAGES))                    # n H W 3
        _, decoded = reconstruct(rae, pixels)
        decoded = to_uint8(decoded)                                     # n H W 3
        measured[f"{name}_psnr"] = float(metrics.psnr(pixels, decoded).mean())
        measured[f"{name}_edges"] = 100 * edge_strength(decoded) / edge_strength(pixels)
        for judge_name, judge in judges.items():
            measured[f"{name}_distance_{judge_name}"] = distance_by(judge, pixels, decoded)
        read = []
        for k in range(N_READ):
            content = world.scene_or_text(k)
            read.append(readable(content, pixels[k].numpy(), decoded[k].numpy()))
        measured[f"{name}_readable"] = 100 * float(np.mean(read))
    return measured


# %% [markdown]
# ### Five decoders, three seeds

# %%
def run_decoder(arm, seed, folder):
    """Train one decoder, and measure it."""
    return measure(train_one(arm, seed, folder))


results = lesson.sweep("decoders", list(DECODERS), run_decoder)

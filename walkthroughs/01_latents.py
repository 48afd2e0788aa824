# %% [markdown]
# # Lesson 1: four kinds of latents
#
# 35 minutes of class, 3 minutes on 2 CPU cores. Needs: what a vision transformer (ViT) is.


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
import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from lesson import COLOURS, Lesson, draw_dots, draw_paper_line, train, values_of

import metrics
import train_decoder
from data import open_data
from eval_decoder import evaluate_probe, reconstruct, to_uint8
from release import SHIPPED_RAE, load_encoder, load_rae
from shapes import CLASSES

lesson = Lesson("01_latents")

# %% [markdown]
# ## Question
#
# ## Predict
#
# ## Read
#
# ## Run
#
# ### Four encoders

# %%
def train_vae(seed, folder):
    """A VAE of 16 tokens with 16 channels, its encoder and decoder trained together, as an RAE."""
    path = train(train_decoder, folder, seed, encoder="vae:16:16", tau=0,
                 steps=lesson.size(200, quick=2), batch=lesson.size(64, quick=8), eval_every=0,
                 stats_n=lesson.size(1024, quick=8))
    return load_rae(path).to(lesson.device)


rae = load_rae(SHIPPED_RAE).to(lesson.device)
vae = train_vae(0, lesson.folder / "vae")
encoders = {
    "RAE": rae.encoder,                                                 # 16 tokens of 192 channels
    "VAE": vae.encoder,                                                 # 16 tokens of 16
    "pixels": load_encoder("pixel:16"),                                 # 16 tokens of 768
    "random ViT": load_encoder("random").to(lesson.device),             # 16 tokens of 192
}

# %%
N_IMAGES = lesson.size(2000, quick=80)
data = open_data("shapes", 64, split="val", objects=1)
items = [data[k] for k in range(N_IMAGES)]
pixels = torch.stack([item["image"] for item in items])                 # n 3 H W, uint8
labels = torch.tensor([item["label"] for item in items])                # n


def encode_all(encoder):
    """Latents n c h w of all images, each element with mean 0 and variance 1, as RAE.encode does.
    """
    parts = [encoder.encode(part.to(lesson.device) / 255).cpu() for part in pixels.split(100)]
    latents = torch.cat(parts)                                          # n c h w
    return (latents - latents.mean(0)) / (latents.var(0) + 1e-5).sqrt()


latents = {name: encode_all(encoder) for name, encoder in encoders.items()}
for name, z in latents.items():
    print(f"{name}: an image has {z[0].numel()} numbers, {tuple(z.shape[1:])}")

# %% [markdown]
# ### Tokens as colours

# %%
def principal_directions(z):
    """The directions in which tokens vary, c c, the strongest first, and the variance in each, c.
    """
    tokens = rearrange(z, "n c h w -> (n h w) c").double()
    variances, directions = torch.linalg.eigh(tokens.T.cov())           # ascending
    return directions.flip(1).float(), variances.flip(0)


def token_colours(z):
    """The first three principal components of the tokens of z n c h w as colours: n h w 3."""
    directions, _ = principal_directions(z)
    tokens = rearrange(z, "n c h w -> n h w c") @ directions[:, :3]     # n h w 3
    low = tokens.flatten(0, 2).quantile(0.02, dim=0)
    high = tokens.flatten(0, 2).quantile(0.98, dim=0)
    return ((tokens - low) / (high - low)).clamp(0, 1)


SHOWN = 8
figure, panels = plt.subplots(1 + len(latents), SHOWN, figsize=(12, 8))
rows = {"image": rearrange(pixels, "n c h w -> n h w c")}
for name, z in latents.items():
    rows[name] = token_colours(z)
for row, (name, pictures) in zip(panels, rows.items(), strict=True):
    for panel, picture in zip(row, pictures, strict=False):
        panel.imshow(picture, interpolation="nearest")
        panel.set(xticks=[], yticks=[])
    row[0].set_ylabel(name)
lesson.show(figure, "token_colours", f"the three directions in which the 16 tokens of {N_IMAGES} "
            "images vary most, as red, green and blue; one square is one token")

# %% [markdown]
# ### Nearest neighbours

# %%
N_QUERIES = lesson.size(500, quick=20)


def nearest(z, k):
    """The k nearest of the other images, by Euclidean distance of whole latents: queries k."""
    flat = z.flatten(1)                                                 # n c*h*w
    distance = torch.cdist(flat[:N_QUERIES], flat[N_QUERIES:])          # queries others
    return N_QUERIES + distance.topk(k, largest=False).indices


def agreement(z):
    """How many nearest neighbours have the query's class, colour and shape, %: a dict."""
    names = [CLASSES[label].split() for label in labels]                # (colour, shape) of each
    same = {"class": 0, "colour": 0, "shape": 0}
    for query, neighbour in enumerate(nearest(z, 1)[:, 0].tolist()):
        same["class"] += names[query] == names[neighbour]
        same["colour"] += names[query][0] == names[neighbour][0]
        same["shape"] += names[query][1] == names[neighbour][1]
    return {key: 100 * count / N_QUERIES for key, count in same.items()}


for name, z in latents.items():
    print(name, agreement(z))

# %% [markdown]
# ### What the decoders give back

# %%
def psnr_of(autoencoder):
    """Mean PSNR of the reconstructions of the first 200 images, dB."""
    originals, decoded = reconstruct(autoencoder, rearrange(pixels[:200], "n c h w -> n h w c"))
    return float(metrics.psnr(to_uint8(originals), to_uint8(decoded)).mean())


print(psnr_of(rae), psnr_of(vae))

# %% [markdown]
# ### A linear probe, three seeds

# %%
ARMS = ["RAE", "VAE", "pixels", "random ViT"]


def run_probe(arm, seed, folder):
    """The linear probe of an encoder, and its nearest neighbours. The VAE is trained anew."""
    encoder = encoders[arm]
    measured = {}
    if arm == "RAE":
        measured["psnr"] = psnr_of(rae)
    if arm == "VAE":
        autoencoder = train_vae(seed, folder)
        encoder = autoencoder.encoder
        measured["psnr"] = psnr_of(autoencoder)
    result = evaluate_probe(encoder, ["shapes"], n=lesson.size(4000, quick=40),
                            hold_out=lesson.size(2000, quick=20), seed=seed)
    measured["probe"] = 100 * result["accuracy"]
    for key, value in agreement(encode_all(encoder)).items():
        measured[f"same_{key}"] = value
    return measured


results = lesson.sweep("latents", ARMS, run_probe)

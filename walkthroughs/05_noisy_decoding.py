# %% [markdown]
# # Lesson 5: a decoder for imperfect latents
#
# 30 minutes of class, 3 minutes on 2 CPU cores. Needs: lessons 1 and 2. A decoder is trained on the
# latents of real images, and then has to decode those that a DiT has drawn, which are never quite
# right. The first paper adds noise to the latents in training. What does it cost, and when does it
# help?


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
from functools import cache

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from lesson import COLOURS, Lesson, draw_band, draw_dots, train, values_of

import metrics
import sample
import train_decoder
import train_dit
from data import load_images, open_data
from eval_decoder import evaluate_reconstruction
from metrics import EncoderFeatures, FeatureSet
from release import SHIPPED_DIT, SHIPPED_RAE, load_dit, load_rae

lesson = Lesson("05_noisy_decoding")

# %% [markdown]
# ## Question
#
# ## Predict
#
# ## Read
#
# ## Run
#
# ### Two decoders

# %%
STEPS = lesson.size(120, quick=2)


def train_with_noise(tau, seed, folder):
    """The RAE whose decoder is trained on from the shipped one, with noise of strength tau."""
    path = train(train_decoder, folder, seed, tau=tau, init=SHIPPED_RAE, decoder_depth=4, lr=3e-3,
                 steps=STEPS, batch=lesson.size(32, quick=4), eval_every=0, stats_n=64)
    rae = load_rae(SHIPPED_RAE)           # with the latent statistics that the DiTs know
    rae.decoder = load_rae(path, with_encoder=False).decoder
    return rae.to(lesson.device)


decoders = {}
for tau in (0, 0.8):
    decoders[tau] = train_with_noise(tau, 0, lesson.folder / f"tau_{tau}")

# %% [markdown]
# ### Noise on real latents

# %%
N_IMAGES = lesson.size(200, quick=8)
SIGMAS = (0, 0.2, 0.4, 0.8, 1.2, 1.6)
val = open_data("shapes", 64, split="val")
pixels = load_images(val, range(lesson.size(64, quick=4)))              # n H W 3, uint8
images = rearrange(pixels, "n h w c -> n c h w").to(lesson.device) / 255


def decode_with_noise(rae, sigma):
    """Reconstructions n H W 3, uint8, from latents to which noise was added.

    sigma: standard deviation of the noise, where the encoder's latents have about 1.
    """
    torch.manual_seed(0)                                                # the same noise for all
    latents = rae.encode(images)                                        # n c h w, normalised
    noise = torch.randn(latents.shape).to(lesson.device)
    # The decoder's training adds noise before the normalisation, so this is divided, too.
    return sample.to_images(rae, latents + sigma * noise / rae.latent_std)


psnr = {}
noisy_images = {}
for tau, rae in decoders.items():
    noisy_images[tau] = [decode_with_noise(rae, sigma) for sigma in SIGMAS]
    psnr[tau] = [float(metrics.psnr(pixels, noisy).mean()) for noisy in noisy_images[tau]]

# %%
SHOWN = 1
figure, panels = plt.subplots(2, len(SIGMAS), figsize=(13, 5))
for row, tau in zip(panels, decoders, strict=True):
    for panel, sigma, noisy in zip(row, SIGMAS, noisy_images[tau], strict=True):
        panel.imshow(noisy[SHOWN])
        panel.set(xticks=[], yticks=[])
        panel.grid(False)
        if tau == 0:
            panel.set_title(f"sigma {sigma:g}")
    row[0].set_ylabel(f"decoder: tau {tau:g}")
lesson.show(figure, "noisy_images", "one held-out image, decoded from its latents plus noise of "
            "standard deviation sigma by two decoders, n = 1 seed each")

# %%
figure, axes = plt.subplots(figsize=(8, 4.8))
for tau, values in psnr.items():
    axes.plot(SIGMAS, values, "o-", label=f"decoder trained with tau {tau:g}")
axes.set(xlabel="standard deviation sigma of the noise on the latents (their own is 1)",
         ylabel="PSNR, dB")
axes.legend()
lesson.show(figure, "psnr_by_noise", f"mean of {len(pixels)} held-out images, 1 seed of each "
            "decoder")

# %% [markdown]
# ### Latents that a DiT has drawn

# %%
N_DRAWN = lesson.size(216, quick=8)
LABELS = [i % 36 for i in range(N_DRAWN)]


@cache
def train_early_dit(seed):
    """A DiT at an early time of its training, 150 steps over the shipped latents."""
    path = train(train_dit, lesson.folder / f"early_dit_{seed}", seed,
                 steps=lesson.size(150, quick=2), cache=lesson.size(4000, quick=64))
    return load_dit(path, lesson.device)[0]


def draw_latents(model, seed, n):
    """The first n of the drawn latents, of each class in turn, without guidance: n c h w."""
    args = sample.parse_args(["--guidance", "1", "--seed", str(seed), "--sampling_steps",
                              str(lesson.size(48, quick=2))])
    y = torch.tensor(LABELS[:n], device=lesson.device)
    return sample.draw(model, y, args, range(n))


early_latents = draw_latents(train_early_dit(0), seed=0, n=8)

# %%
figure, panels = plt.subplots(2, 8, figsize=(14, 4.4))
for row, (tau, rae) in zip(panels, decoders.items(), strict=True):
    drawn_images = sample.to_images(rae, early_latents[:8])
    for panel, image in zip(row, drawn_images, strict=False):
        panel.imshow(image)
    for panel in row:
        panel.set(xticks=[], yticks=[])
        panel.grid(False)
    row[0].set_ylabel(f"tau {tau:g}")
lesson.show(figure, "early_samples", "eight latents drawn by a DiT after 150 steps, each decoded by "
            "both decoders, n = 1 seed each")

# %% [markdown]
# ### Three strengths of noise, three seeds

# %%
ARMS = ["tau 0", "tau 0.2", "tau 0.8"]
TAUS = [0, 0.2, 0.8]


@cache
def drawn_by_both(seed):
    """Latents that the early DiT and the fully trained, shipped one have drawn: a dict."""
    late_dit, _, _ = load_dit(SHIPPED_DIT, lesson.device)
    return dict(early=draw_latents(train_early_dit(seed), seed, N_DRAWN),
                late=draw_latents(late_dit, seed, N_DRAWN))


@torch.no_grad()
def round_trip(rae, latents):
    """How far latents are from those of their own image, in standard deviations of a latent.

    Latents of a real image come back nearly as they were. What no image has does not come back.
    """
    again = rae.encode(rae.decode(latents))                             # b c h w
    return float(((again - latents) * rae.latent_std).square().mean().sqrt())


def measure_drawn(rae, latents):
    """Distance of decoded samples to held-out images, and how many are right, %."""
    features = EncoderFeatures(rae.encoder)
    numbers = range(len(latents))
    drawn, real = FeatureSet(features, keep=0), FeatureSet(features, keep=0)
    samples = sample.to_images(rae, latents)
    drawn.add(samples, numbers)
    real.add(load_images(open_data("shapes", 64, split="val", objects=1), numbers), numbers)
    _, right, _ = metrics.verify(samples, LABELS)
    return dict(distance=metrics.distance(real.merge().pooled, drawn.merge().pooled),
                right=100 * float(right) / len(samples), round_trip=round_trip(rae, latents))


def run_tau(arm, seed, folder):
    """Train a decoder with this noise, and measure reconstructions and samples."""
    rae = train_with_noise(arm.removeprefix("tau "), seed, folder)
    results = evaluate_reconstruction(rae, val, N_IMAGES)
    measured = dict(psnr=results["psnr"], readable=100 * results["readable"],
                    distance=results["frechet_distance"],
                    round_trip=round_trip(rae, rae.encode(images)))
    for name, latents in drawn_by_both(seed).items():
        for key, value in measure_drawn(rae, latents).items():
            measured[f"{name}_{key}"] = value
    return measured


results = lesson.sweep("noise", ARMS, run_tau)

# %% [markdown]
# # Lesson 5: a decoder for imperfect latents
#
# 30 minutes of class, 3 minutes on 2 CPU cores. Needs: lessons 1 and 2. A decoder is trained on the
# latents of real images. Then it has to decode those that a diffusion transformer (DiT) has drawn,
# which are never quite right. So the first paper adds noise to the latents while the decoder is
# trained. We look at what that costs, and when it helps.


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
import numpy as np
import torch
from einops import rearrange
from lesson import COLOURS, Lesson, draw_band, draw_paper_line, train, values_of

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
# Should a decoder be trained on noisy latents?
#
# ## Predict
#
# `tau` says how much noise there is in training: each image gets noise of standard deviation
# `sigma`, drawn from `|N(0, tau^2)|`. Write down, before you run anything:
#
# 1. Clean latents of held-out images are decoded. Which decoder gives them back better, that of
#    `tau = 0` or that of `tau = 0.8`? By how many dB?
# 2. Noise is added to these latents. From which `sigma` on does the order change?
# 3. The latents come from a DiT. Which decoder draws better images if the DiT has hardly been
#    trained? Which if it has been trained to the end?

# %% [markdown]
# ## Read
#
# - `add_noise` in train_decoder.py, `[D1]`: each image has a `sigma` of its own. Why not the same
#   for all?
# - `RAE` in model.py, `[L3]`: the noise of the decoder's training is added before the latents are
#   normalised by their statistics. A DiT draws normalised ones.
# - `draw` in sample.py, `[S4]`: what a DiT's latents are.

# %% [markdown]
# ## Run
#
# ### Two decoders
#
# Both start from the shipped decoder, and are trained on for 120 steps of 32 images, without noise
# and with much of it. Everything else is equal.

# %%
@cache
def train_with_noise(tau, seed):
    """The RAE whose decoder is trained on from the shipped one, with noise of strength tau."""
    path = train(train_decoder, lesson.folder / f"tau_{tau}_{seed}", seed, tau=tau,
                 init=SHIPPED_RAE, decoder_depth=4, lr=3e-3, steps=lesson.size(120, quick=2),
                 batch=lesson.size(32, quick=4), eval_every=0, stats_n=64)
    rae = load_rae(SHIPPED_RAE)           # with the latent statistics that the DiTs know
    rae.decoder = load_rae(path, with_encoder=False).decoder
    return rae.to(lesson.device)


decoders = {tau: train_with_noise(tau, 0) for tau in (0, 0.8)}

# %% [markdown]
# ### Noise on real latents
#
# We encode held-out images, add noise of growing strength, and decode.

# %%
SIGMAS = (0, 0.2, 0.4, 0.8, 1.2, 1.6)
val = open_data("shapes", 64, split="val")
pixels = load_images(val, range(lesson.size(64, quick=4)))              # n H W 3, uint8
images = rearrange(pixels, "n h w c -> n c h w").to(lesson.device) / 255


def noisy_latents(rae, sigma):
    """Latents n c h w of the images, plus noise of standard deviation sigma."""
    torch.manual_seed(0)                                                # the same noise for all
    latents = rae.encode(images)                                        # n c h w, normalised
    noise = torch.randn(latents.shape).to(lesson.device)
    # The decoder's training adds noise before the normalisation, so ours is normalised, too.
    return latents + sigma * noise / rae.latent_std


noisy_images = {}                                                       # (tau, sigma) -> n H W 3
for tau, rae in decoders.items():
    for sigma in SIGMAS:
        noisy_images[tau, sigma] = sample.to_images(rae, noisy_latents(rae, sigma))

# %%
SHOWN = 1                                                               # the number of an image
figure, panels = plt.subplots(2, len(SIGMAS), figsize=(13, 4.6))
for row, tau in zip(panels, decoders, strict=True):
    for panel, sigma in zip(row, SIGMAS, strict=True):
        panel.imshow(noisy_images[tau, sigma][SHOWN])
        panel.set(xticks=[], yticks=[])
    row[0].set_ylabel(f"tau {tau:g}")
for panel, sigma in zip(panels[0], SIGMAS, strict=True):
    panel.set_title(f"sigma {sigma:g}")
lesson.show(figure, "noisy_images", "one held-out image from its latents plus noise of standard "
            "deviation sigma, by two decoders, 1 seed each")

# %% [markdown]
# ### Latents that a DiT has drawn
#
# An early DiT: 150 steps of training, where the shipped one had 9,000. Its latents are decoded by
# both decoders.

# %%
N_DRAWN = lesson.size(216, quick=8)
LABELS = [i % 36 for i in range(N_DRAWN)]                               # each class in turn


@cache
def train_early_dit(seed):
    """A DiT at an early time of its training, over the latents of the shipped RAE."""
    path = train(train_dit, lesson.folder / f"early_dit_{seed}", seed,
                 steps=lesson.size(150, quick=2), cache=lesson.size(4000, quick=64))
    return load_dit(path, lesson.device)[0]


def draw_latents(model, seed, n, steps=48):
    """The first n of N_DRAWN latents that a DiT draws without guidance: n c h w."""
    steps = lesson.size(steps, quick=2)
    args = sample.parse_args(["--guidance", "1", "--seed", str(seed),
                              "--sampling_steps", str(steps)])
    y = torch.tensor(LABELS[:n], device=lesson.device)
    return sample.draw(model, y, args, range(n))


early_latents = draw_latents(train_early_dit(0), seed=0, n=8)
figure, panels = plt.subplots(2, 8, figsize=(14, 4))
for row, (tau, rae) in zip(panels, decoders.items(), strict=True):
    for panel, image in zip(row, sample.to_images(rae, early_latents), strict=True):
        panel.imshow(image)
        panel.set(xticks=[], yticks=[])
    row[0].set_ylabel(f"tau {tau:g}")
lesson.show(figure, "early_samples", "eight latents drawn by a DiT after 150 steps, each decoded "
            "by both decoders, 1 seed")

# %% [markdown]
# ### Three strengths of noise, three seeds
#
# What is measured of reconstructions: PSNR, how many still show the same objects (`read_scene`, the
# reader of the built-in world, decides), and the Fréchet distance to the originals in the features
# of the shipped encoder. It plays the role of the FID, which compares means and covariances of
# features of many images. Of samples: the same distance, to held-out images; how many show what was
# asked for; and how far the latents are from those of any image. For that, a latent is decoded and
# encoded again. What comes from an image comes back nearly as it was.

# %%
ARMS = ["tau 0", "tau 0.2", "tau 0.8"]
TAUS = [0, 0.2, 0.8]


@cache
def drawn_latents(seed):
    """Latents that the early DiT and the fully trained, shipped one have drawn: a dict."""
    late_dit, _, _ = load_dit(SHIPPED_DIT, lesson.device)
    return dict(early=draw_latents(train_early_dit(seed), seed, N_DRAWN),
                late=draw_latents(late_dit, seed, N_DRAWN))


@torch.no_grad()
def round_trip(rae, latents):
    """Root mean square of what changes in latents by decoding and encoding them again."""
    again = rae.encode(rae.decode(latents))                             # b c h w
    change = (again - latents) * rae.latent_std                         # in the units of sigma
    return float(change.square().mean().sqrt())


def measure_samples(rae, latents):
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
    rae = train_with_noise(float(arm.removeprefix("tau ")), seed)
    results = evaluate_reconstruction(rae, val, lesson.size(200, quick=8))
    measured = dict(psnr=results["psnr"], readable=100 * results["readable"],
                    distance=results["frechet_distance"],
                    round_trip=round_trip(rae, rae.encode(images)))
    for name, latents in drawn_latents(seed).items():
        for key, value in measure_samples(rae, latents).items():
            measured[f"{name}_{key}"] = value
    return measured


@cache
def hurried_latents(seed):
    """Latents of the shipped DiT, drawn in 3 steps instead of 48."""
    late_dit, _, _ = load_dit(SHIPPED_DIT, lesson.device)
    return draw_latents(late_dit, seed, N_DRAWN, steps=3)


def run_hurried(arm, seed, folder):
    """What a decoder makes of latents that were drawn in a hurry."""
    rae = train_with_noise(float(arm.removeprefix("tau ")), seed)
    return measure_samples(rae, hurried_latents(seed))


results = lesson.sweep("noise", ARMS, run_tau)
hurried = lesson.sweep("hurried", ARMS, run_hurried)

# %%
SOURCES = {                                # name -> the sweep, and how its keys begin
    "early DiT": (results, "early_"),
    "hurried": (hurried, ""),
    "shipped DiT": (results, "late_"),
}


def psnr(tau, sigma):
    """Mean PSNR of images decoded from noisy latents, dB."""
    return float(metrics.psnr(pixels, noisy_images[tau, sigma]).mean())


figure, panels = plt.subplots(1, 2, figsize=(13, 4.8))
for tau in decoders:
    values = [psnr(tau, sigma) for sigma in SIGMAS]
    panels[0].plot(SIGMAS, values, "o-", label=f"trained with tau {tau:g}")
panels[0].set(title="decoded from noisy latents", ylabel="PSNR, dB")
panels[0].legend()

round_trips = [round_trip(decoders[0], noisy_latents(decoders[0], sigma)) for sigma in SIGMAS]
panels[1].plot(SIGMAS, round_trips, "o-", label="real latents plus noise")
for name, (sweep, prefix) in SOURCES.items():
    value = values_of(sweep, ["tau 0"], f"{prefix}round_trip").mean()
    panels[1].axhline(value, color="black", linestyle="--", linewidth=1)
    panels[1].annotate(f"{name}: {value:.2f}", (1.6, value), ha="right", va="bottom", fontsize=11)
panels[1].set(title="how far latents are from those of an image", ylabel="round trip, same units")
panels[1].legend()
for panel in panels:
    panel.set_xlabel("sigma of the noise (latents have about 1)")
lesson.show(figure, "by_noise", f"{len(pixels)} held-out images, 1 seed of each decoder; dashed: "
            f"{N_DRAWN} drawn latents, mean of 3 seeds")

# %%
figure, panels = plt.subplots(1, 3, figsize=(14, 4.4))
for panel, key, title, unit in (
        (panels[0], "psnr", "exactness", "PSNR, dB"),
        (panels[1], "readable", "objects that are still read", "reconstructions, %"),
        (panels[2], "distance", "distance to the originals", "Fréchet distance")):
    draw_band(panel, TAUS, values_of(results, ARMS, key), label=key)
    panel.set(title=title, ylabel=unit, xlabel="tau of the decoder's training")
lesson.show(figure, "reconstruction", "reconstructions of 200 held-out images; mean and range of 3 "
            "seeds; paper, table 5: rFID 0.49 without noise, 0.57 with tau 0.8")

# %%
def change(sweep, key):
    """Change of a number from tau 0 to tau 0.8, %, for each seed: an array."""
    before, _, after = values_of(sweep, ARMS, key)
    return 100 * (after / before - 1)


figure, panels = plt.subplots(1, 3, figsize=(15, 4.8))
for name, (sweep, prefix) in SOURCES.items():
    draw_band(panels[0], TAUS, values_of(sweep, ARMS, f"{prefix}right"), name)
    draw_band(panels[1], TAUS, values_of(sweep, ARMS, f"{prefix}distance"), name)
panels[0].set(title="colour and shape right", ylabel="samples, %", ylim=(0, 105))
panels[1].set(title="distance to held-out images", ylabel="Fréchet distance", ylim=(0, None))
for panel in panels[:2]:
    panel.set_xlabel("tau of the decoder's training")
panels[0].legend(fontsize=11)

changes = {}
for name, (sweep, prefix) in SOURCES.items():
    changes[name] = change(sweep, f"{prefix}distance")
for x, values in enumerate(changes.values()):
    panels[2].plot(np.full(len(values), x), values, "k.", markersize=9)
    panels[2].hlines(values.mean(), x - 0.3, x + 0.3, color=COLOURS[0], linewidth=3)
panels[2].set_xticks(range(len(changes)), list(changes), fontsize=11)
panels[2].axhline(0, color="black", linewidth=1)
draw_paper_line(panels[2], -11, "paper: gFID -11%")
panels[2].set(title="distance, tau 0.8 against 0", ylabel="change, %", xlim=(-0.6, 2.6))
lesson.show(figure, "generation", f"{N_DRAWN} samples of each, without guidance; mean and range "
            "of 3 seeds; hurried: shipped DiT in 3 steps, not 48; paper: table 5, 4.81 to 4.28")

# %% [markdown]
# ## Figure
#
# 1. *Noisy images*: with growing `sigma` the outline breaks into fragments, and colours drift. The
#    decoder with `tau 0.8` keeps the colour and a calm background. Outlines break at the borders of
#    tokens in both: noise on a token hides where its edge was, and no training brings that back.
# 2. *Early samples*: what the early DiT draws is broken in the same way, in both rows. Its tokens
#    contradict each other.
# 3. *By noise*: on clean latents the decoder without noise is better, on noisy ones the other, from
#    about `sigma = 0.35` on. Right: decoding and encoding again tells how much noise there was. By
#    this measure the early DiT's latents are as far off as with noise of `sigma = 1`, and those of
#    the shipped DiT hardly farther than real ones.
# 4. *Reconstruction*: noise costs at all three numbers, little at `tau 0.2` and much at 0.8.
# 5. *Generation*: no gain anywhere, neither for good latents nor for bad ones. Of the early samples
#    not one is right with any decoder. "Hurried" are latents of the shipped DiT in 3 steps instead
#    of 48, between the two.
#
# ## Number
#
# What you should see: on clean latents the decoder with `tau 0.8` loses about 0.8 dB, at
# `sigma 0.8` it gains about 1.1 dB. The distance of reconstructions grows about sixfold, from 0.04
# to 0.24. That of samples grows by 2 to 8%.

# %%
lesson.number("clean latents, tau 0: PSNR, dB", psnr(0, 0), 29, 31.5, quick=(20, 35))
lesson.number("clean latents: gain by tau 0.8, dB", psnr(0.8, 0) - psnr(0, 0), -2, -0.2,
              quick=(-5, 5))
lesson.number("sigma 0.8: gain by tau 0.8, dB", psnr(0.8, 0.8) - psnr(0, 0.8), 0.3, 2.5,
              quick=(-5, 5))
lesson.number("distance of reconstructions: tau 0.8 over tau 0",
              1 + change(results, "distance").mean() / 100, 2, 15, quick=(0, 100))
for name, values in changes.items():
    lesson.number(f"{name}: change of the distance by tau 0.8, %", values.mean(), -5, 20,
                  quick=(-100, 100))
lesson.number("round trip of the early DiT's latents",
              values_of(results, ["tau 0"], "early_round_trip").mean(), 0.7, 1.3, quick=(0, 3))
lesson.number("round trip of the shipped DiT's latents",
              values_of(results, ["tau 0"], "late_round_trip").mean(), 0.06, 0.1, quick=(0, 3))
lesson.end()

# %% [markdown]
# ## Exercise
#
# 1. What is the mean `sigma` for `tau = 0.8`, with the half-normal law of the paper and with the
#    uniform law of the released code (`--noise_law uniform`)? Which of them trains more on strong
#    noise?
# 2. Why is `sigma` drawn for each image, instead of always adding noise of `sigma = tau`?
# 3. Estimate how wrong the early DiT's latents are: for which `sigma` is the `round_trip` of real
#    latents with noise as large as that of `early_latents`?
#
# <details><summary>Answers</summary>
#
# 1. `tau sqrt(2 / pi) = 0.64` against `tau / 2 = 0.4`. The half-normal law has no largest `sigma`:
#    a third of the images get more than `tau`, where the uniform law gives none.
# 2. With one `sigma` the decoder would learn to expect exactly that noise, and to smooth clean
#    latents as if they had it. Small `sigma` are the most frequent under `|N(0, tau^2)|`, so clean
#    latents stay well trained.
# 3. About `sigma = 1`: `round_trip(decoders[0], early_latents)` is 0.96 to 0.98, and that of real
#    latents with noise is 0.84 at `sigma = 0.8` and 1.27 at 1.2. So noise of `tau = 0.8` is of the
#    right size for an early DiT. It is not of the right kind.
#
# </details>
#
# ## The paper says / ours differs
#
# - Paper 1 (arXiv 2510.11690, table 5): with `tau = 0.8` the reconstruction of DINOv2-B gets worse,
#   rFID 0.49 to 0.57, and generation gets better, gFID 4.81 to 4.28 (DiT-XL, 80 epochs). The first
#   holds here, and more: 29.3 dB instead of 30.1, and 6 times the distance. The second does not
#   hold: the distance of samples grows, too, by 2% with the early DiT, by 8% with latents drawn in
#   a hurry, by 3% with the shipped DiT. Three seeds agree, but for one of the early DiT, where
#   nothing changes.
# - Paper 2 (arXiv 2601.16208): with `tau = 0.2` the gain is gone after 120,000 steps of the DiT's
#   training, and the final models go without noise. That a well trained DiT needs no noise holds
#   here: the latents of the shipped one are as good as real ones. But there is no gain at early
#   times either.
# - The likely cause is in the figure of the early samples. The paper's noise is independent in each
#   element of the latents, and 768 channels of 256 tokens leave room to average it away. Errors of
#   our DiT are tokens that contradict each other about one object. They are as large as the noise,
#   but not of its kind, and a decoder cannot know which token is right. The hurried latents test
#   this. They are off by 0.4; with white noise of that size the decoder with `tau 0.8` is the
#   better one, and yet it draws fewer of them right, 40% instead of 44%.
# - Ours differs, too: 120 steps of training on, by L1 alone, instead of a training from the start
#   with all losses; 216 samples; a distance in the features of our own encoder.

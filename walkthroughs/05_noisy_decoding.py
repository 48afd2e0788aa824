# %% [markdown]
# # Lesson 5: a decoder for imperfect latents
#
# 30 minutes of class, 3 minutes on 2 CPU cores. Needs: lessons 1 and 2. A decoder is trained on the
# latents of real images. Then it has to decode latents that a diffusion transformer (DiT) has
# drawn, which are never quite right. So the first paper adds noise to the latents while the decoder
# is trained. We ask what that costs, and whether it helps.


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
from shapes import CLASSES

lesson = Lesson("05_noisy_decoding")

# %% [markdown]
# ## Question
#
# Should a decoder be trained on noisy latents?
#
# ## Predict
#
# `tau` says how much noise there is in training: the latents of each image get noise of standard
# deviation `sigma`, and `sigma` is drawn for each image anew, from `|N(0, tau^2)|`. The latents
# themselves have a standard deviation of about 1. Write down, before you run anything:
#
# 1. Clean latents of held-out images are decoded. Which decoder gives the images back better, that
#    of `tau = 0` or that of `tau = 0.8`? By how many dB?
# 2. Noise is added to these latents. From which `sigma` on does the order change?
# 3. The latents come from a DiT. Which decoder draws better images if the DiT has hardly been
#    trained? Which if it has been trained to the end?

# %% [markdown]
# ## Read
#
# The exercise `add_noise` is the function that comes first here. If you want to find it yourself,
# do `walkthroughs/exercises/add_noise.py` first.
#
# - `add_noise` in train_decoder.py, `[D1]`: each image has a `sigma` of its own. Why not the same
#   for all?
# - `RAE` in model.py, `[L3]`: `encode` divides the latents by their standard deviation, and
#   `decode` multiplies by it. The noise of the decoder's training is added to latents that have not
#   been divided.
# - `draw` in sample.py, `[S4]`: a DiT starts from noise and draws latents as `encode` gives them.
#   They go through `decode` to become an image.

# %% [markdown]
# ## Run
#
# ### Two decoders
#
# Both start from the shipped decoder, and are trained for 120 more steps of 32 images, one without
# noise and one with much noise. Everything else is equal.

# %%
@cache
def train_with_noise(tau, seed):
    """The shipped RAE, with a decoder that is trained further, with noise of strength tau."""
    path = train(train_decoder, lesson.folder / f"tau_{tau}_{seed}", seed, tau=tau,
                 init=SHIPPED_RAE, decoder_depth=4,    # the shipped decoder has 4 layers
                 lr=3e-3, steps=lesson.size(120, quick=2), batch=lesson.size(32, quick=4),
                 eval_every=0, stats_n=64)
    rae = load_rae(SHIPPED_RAE)                        # its latent statistics are those of the DiTs
    rae.decoder = load_rae(path, with_encoder=False).decoder
    return rae.to(lesson.device)


decoders = {tau: train_with_noise(tau, 0) for tau in (0, 0.8)}

# %% [markdown]
# ### Noise on real latents
#
# We encode held-out images of one to four objects, add noise of growing strength, and decode.

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
    # Training adds noise to latents that are not normalised. These are, so the noise is, too.
    return latents + sigma * noise / rae.latent_std


noisy_images = {}                                                       # (tau, sigma) -> n H W 3
for tau, rae in decoders.items():
    for sigma in SIGMAS:
        noisy_images[tau, sigma] = sample.to_images(rae, noisy_latents(rae, sigma))

# %%
SHOWN = 1                                              # the number of the image in the figure
figure, panels = plt.subplots(2, len(SIGMAS), figsize=(13, 4.6))
for row, tau in zip(panels, decoders, strict=True):
    for panel, sigma in zip(row, SIGMAS, strict=True):
        panel.imshow(noisy_images[tau, sigma][SHOWN])
        panel.set(xticks=[], yticks=[])
    row[0].set_ylabel(f"tau {tau:g}")
for panel, sigma in zip(panels[0], SIGMAS, strict=True):
    panel.set_title(f"sigma {sigma:g}")
lesson.show(figure, "noisy_images", "one held-out image, decoded from its latents plus noise of "
            "standard deviation sigma, by two decoders, 1 seed each")

# %% [markdown]
# ### Latents that a DiT has drawn
#
# We stop the training of a DiT early, after 150 steps, where the shipped one had 9,000. Both
# decoders draw images from its latents.

# %%
N_DRAWN = lesson.size(216, quick=8)
LABELS = [i % 36 for i in range(N_DRAWN)]                               # each class in turn


@cache
def train_early_dit(seed):
    """A DiT early in its training, over the latents of the shipped RAE."""
    path = train(train_dit, lesson.folder / f"early_dit_{seed}", seed,
                 steps=lesson.size(150, quick=2), cache=lesson.size(4000, quick=64))
    return load_dit(path, lesson.device)[0]


def draw_latents(model, seed, n, steps=48):
    """Latents n c h w that a DiT draws without guidance, for the first n of LABELS."""
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
for panel, label in zip(panels[0], LABELS, strict=False):
    panel.set_title(CLASSES[label], fontsize=11)
lesson.show(figure, "early_samples", "eight latents drawn by a DiT after 150 steps, each decoded "
            "by both decoders, 1 seed; above: what the DiT was asked for")

# %% [markdown]
# ### Three strengths of noise, three seeds
#
# Of reconstructions we measure
#
# - the PSNR;
# - how many still show the same objects: `read_scene`, the reader of the built-in world, decides;
# - the Fréchet distance to the originals. It compares the means and covariances of features of
#   many images, as the FID does, but in the features of the shipped encoder.
#
# Of samples we measure
#
# - the same distance, to held-out images;
# - how many show what was asked for;
# - how far the latents are from those of any image, by a round trip: they are decoded, and the
#   image is encoded again. The latents of an image come back nearly as they were.
#
# The samples come from three sources: the early DiT, the shipped DiT, and, between the two, the
# shipped DiT in a hurry: it takes 3 steps for a sample instead of 48.
#
# All this with three seeds takes longer than a lesson, so `lesson.sweep` reads the results from
# `walkthroughs/results/05_noisy_decoding.json`; `--full` measures them again.

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
    """Root mean square of the change of latents by decoding them and encoding them again."""
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
SOURCES = {                                # name -> its sweep, and the prefix of its keys there
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
    for sigma, value in zip(SIGMAS, values, strict=True):
        print(f"decoder with tau {tau:g}, noise of sigma {sigma:g}: {value:.1f} dB")
panels[0].set(title="decoded from noisy latents", ylabel="PSNR, dB")
panels[0].legend()

round_trips = [round_trip(decoders[0], noisy_latents(decoders[0], sigma)) for sigma in SIGMAS]
panels[1].plot(SIGMAS, round_trips, "o-", label="real latents plus noise")
for sigma, value in zip(SIGMAS, round_trips, strict=True):
    print(f"real latents, noise of sigma {sigma:g}: round trip {value:.2f}")
for name, (sweep, prefix) in SOURCES.items():
    value = values_of(sweep, ["tau 0"], f"{prefix}round_trip").mean()
    panels[1].axhline(value, color="black", linestyle="--", linewidth=1)
    panels[1].annotate(f"{name}: {value:.2f}", (1.6, value), ha="right", va="bottom", fontsize=11)
panels[1].set(title="how far latents are from those of an image",
              ylabel="change in a round trip")
panels[1].legend()
for panel in panels:
    panel.set_xlabel("sigma of the noise (of latents: about 1)")
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
            "of 3 seeds; hurried: shipped DiT in 3 steps, not 48; paper, table 5: 4.81 to 4.28")

# %% [markdown]
# ## Figure
#
# 1. *Noisy images*: with growing `sigma` the outline breaks into fragments, and colours drift. The
#    decoder with `tau 0.8` keeps the colour and a calm background. With both, outlines break at the
#    borders of tokens: noise on a token hides where its edge was, and the decoder cannot know.
# 2. *Early samples*: the early DiT draws fragments, and often not even the colour that it was asked
#    for. With `tau 0.8` colours are a little purer. The fragments stay: tokens contradict each
#    other about where the object is.
# 3. *By noise*, left: on clean latents, the decoder without noise is better, and from about
#    `sigma = 0.3` on the other. Right: the round trip tells how much noise there was. By this
#    measure, the latents of the early DiT are as far off as real ones with noise of `sigma = 0.9`,
#    and those of the shipped DiT hardly farther than real ones without noise.
# 4. *Reconstruction*: noise in training costs by all three numbers, little with `tau 0.2` and much
#    with 0.8.
# 5. *Generation*: there is no gain anywhere, neither for good latents nor for bad ones. Of the
#    early samples, not one is right with any decoder.
#
# ## Number
#
# What you should see: on clean latents, the decoder with `tau 0.8` loses about 0.8 dB, and with
# noise of `sigma 0.8` it gains about 1.1 dB. The distance of reconstructions grows about sixfold,
# from 0.04 to 0.24, that of samples by 2 to 8%. (Lesson 1 had 33.5 dB for the shipped decoder, with
# images of one object. With the images of this lesson, one to four objects, it has 30.3 dB.)

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
# Do `add_noise` in `walkthroughs/exercises/`. And, with this lesson:
#
# 1. What is the mean `sigma` for `tau = 0.8`, with the half-normal law of the paper and with the
#    uniform law of the released code (`--noise_law uniform`)? Which of them trains more on strong
#    noise?
# 2. Why is `sigma` drawn for each image, instead of always adding noise of `sigma = tau`?
# 3. Estimate how wrong the eight `early_latents` are: for which `sigma` is the `round_trip` of real
#    latents plus noise as large as that of `early_latents`?
#
# <details><summary>Answers</summary>
#
# 1. `tau sqrt(2 / pi) = 0.64` against `tau / 2 = 0.4`. The half-normal law has no largest `sigma`:
#    a third of the images get more than `tau`, where the uniform law gives none.
# 2. With one `sigma` the decoder would learn to expect exactly that noise, and to smooth clean
#    latents as if they had it. Small `sigma` are the most frequent under `|N(0, tau^2)|`, so clean
#    latents stay well trained.
# 3. About `sigma = 1`: `round_trip(decoders[0], early_latents)` is 1.02, and that of real latents
#    is 0.84 with noise of `sigma = 0.8`, 1.06 with 1.0, and 1.27 with 1.2. (The 216 latents of the
#    figure have 0.96.) So the noise of `tau = 0.8` has about the right size for an early DiT. It is
#    not of the right kind.
#
# </details>
#
# ## The paper says / ours differs
#
# - Paper 1 (arXiv 2510.11690, table 5): with `tau = 0.8` the reconstruction of DINOv2-B gets worse,
#   rFID 0.49 to 0.57, and generation gets better, gFID 4.81 to 4.28 (DiT-XL, 80 epochs). The first
#   holds here, and more strongly: 29.3 dB instead of 30.1, and 6 times the distance. The second
#   does not hold: the distance of samples grows, too, by 2% with the early DiT, by 8% with the
#   hurried latents, and by 3% with the shipped DiT. All seeds agree but one of the early DiT, where
#   nothing changes.
# - Paper 2 (arXiv 2601.16208): with `tau = 0.2` the gain is gone after 120,000 steps of the DiT's
#   training, and the final models go without noise. A well trained DiT needs no noise here either:
#   by the round trip, the latents of the shipped one are hardly worse than real ones. But there is
#   no gain at early times to begin with.
# - A likely cause can be seen in the early samples. The paper's noise is independent in each
#   element of the latents, and 768 channels of 256 tokens leave room to average it away. The errors
#   of our DiT are tokens that contradict each other about one object. They are as large as the
#   noise, but not of its kind, and a decoder cannot know which token is right. The hurried latents
#   test this. Their round trip is 0.39, nearly that of real latents with noise of `sigma = 0.4`,
#   0.42. With such noise the decoder with `tau 0.8` is the better one, by 0.3 dB, and yet fewer of
#   its hurried samples are right, 40% instead of 44%.
# - Ours differs, too: the decoder is trained for 120 more steps, by L1 alone, and not from the
#   start with all losses; there are 216 samples; and the distance is measured in the features of
#   our own encoder.

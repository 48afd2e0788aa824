# %% [markdown]
# # Lesson 9: what a decoder learns from its data and its losses
#
# 35 minutes of class, 3 minutes on 2 CPU cores. Needs: lesson 1. The encoder of an RAE is frozen;
# the decoder learns all that it knows about pixels from its training images and its loss. We add
# images of another world, lines of letters, to the training data. Then we add two terms to the
# loss: one compares features, the other comes from a discriminator (as in a generative adversarial
# network, GAN).

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
from lesson import COLOURS, Lesson, draw_paper_line, train, values_of

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
# What images must a decoder be trained on, and what do perceptual and adversarial losses add to the
# plain distance between pixels (L1)?
#
# ## Predict
#
# Write down, before you run anything:
#
# 1. An encoder and a decoder have seen nothing but shapes. They are given images of letters. Will
#    letters come back at all?
# 2. Half of the training images become letters. What happens to the reconstruction of shapes: does
#    it get better, worse, or neither? And that of letters?
# 3. Where the latents leave open how a detail looks, what does a decoder draw that is trained by L1
#    alone? What would a discriminator say to it?
# 4. The loss of the discriminator is 1 if it always answers 0. Will it fall to 0 in our 80 steps,
#    or stay at 1?

# %% [markdown]
# ## Read
#
# - `ReconstructionLoss` in train_decoder.py, `[D2]`: a weighted sum. `FeatureDistance` below it
#   compares the features that the shipped encoder finds in both images; LPIPS does so with a
#   network that was trained on photographs.
# - `adaptive_weight` in train_decoder.py, `[D3]`: what the GAN's gradient is multiplied by
#   (lambda).
# - `hinge_loss` in train_decoder.py, `[D4]`: what the discriminator minimises. What is it if all
#   logits are 0?
# - `Mixture` in data.py: which image comes from which source. To train on both worlds, give
#   `--data shapes=shapes:0.5 text=text:0.5`.

# %% [markdown]
# ## Run
#
# ### Decoders with other data and other losses
#
# Each decoder starts from the shipped one, which was trained on shapes alone, and is trained for 80
# more steps of 32 images. The encoder stays as it is. We train four of the five now; the fifth, of
# text alone, is in the sweep below.

# %%
STEPS = lesson.size(80, quick=2)
LOG_EVERY = lesson.size(5, quick=1)
BOTH = ["shapes=shapes:0.5", "text=text:0.5"]
DECODERS = {
    "shapes, L1": dict(data=["shapes"]),
    "text, L1": dict(data=["text"]),
    "both, L1": dict(data=BOTH),
    "both, L1 + feature": dict(data=BOTH, feature=0.3),
    "both, L1 + feature + GAN": dict(data=BOTH, feature=0.3, gan=0.3, disc_start=0,
                                     gan_start=STEPS // 4, disc_warmup=STEPS // 5),
}


def folder_of(name, seed):
    return lesson.folder / f"{name}_{seed}"


@cache                                     # --full needs those of seed 0 again
def finetune(name, seed):
    """The shipped RAE after more training of its decoder. name: its data and losses, in DECODERS.
    """
    # The shipped decoder has 4 blocks.
    path = train(train_decoder, folder_of(name, seed), seed, init=SHIPPED_RAE, decoder_depth=4,
                 lr=3e-3, steps=STEPS, batch=lesson.size(32, quick=4),
                 log_every=LOG_EVERY, eval_every=0, stats_n=64, **DECODERS[name])
    return load_rae(path).to(lesson.device)


SHOWN = ["shapes, L1", "both, L1", "both, L1 + feature", "both, L1 + feature + GAN"]
raes = {name: finetune(name, 0) for name in SHOWN}

# %% [markdown]
# ### A quarter of each image, enlarged
#
# We enlarge the quarter of each image that has the most edges, so that each pixel is a square.

# %%
worlds = {name: open_data([name], 64, split="val") for name in ("shapes", "text")}


def quarter_with_most_edges(image):
    """The quarter of an image in which neighbouring pixels differ most: two slices, of its rows and
    of its columns.

    image: uint8 H W 3.
    """
    image = image.float()
    edges = image.diff(dim=0)[:, 1:].abs() + image.diff(dim=1)[1:].abs()    # H-1 W-1 3
    half = len(image) // 2
    best_quarter = None
    most_edges = -1.0
    for top in range(0, half, 4):
        for left in range(0, half, 4):
            quarter = (slice(top, top + half), slice(left, left + half))
            amount = float(edges[quarter].sum())
            if amount > most_edges:
                best_quarter, most_edges = quarter, amount
    return best_quarter


originals = torch.cat([load_images(world, range(4)) for world in worlds.values()])      # 8 H W 3
shown = {"original": originals}
for name, rae in raes.items():
    shown[name] = to_uint8(reconstruct(rae, originals)[1])
figure, panels = plt.subplots(len(shown), len(originals), figsize=(14, 8.6))
for row_of_panels, (name, images) in zip(panels, shown.items(), strict=True):
    for panel, original, image in zip(row_of_panels, originals, images, strict=True):
        panel.imshow(image[quarter_with_most_edges(original)], interpolation="nearest")
        panel.set(xticks=[], yticks=[])
    row_of_panels[0].set_ylabel(name.replace(", ", "\n").replace(" + ", "\n+ "), rotation=0,
                                ha="right", va="center")
lesson.show(figure, "zoom", "a quarter of held-out images (four of shapes, four of text) and of "
            f"their reconstructions by each decoder, after {STEPS} steps, 1 seed")

# %% [markdown]
# ### Every term of the loss, by step
#
# Each training run writes its losses to log.jsonl; with a mixture of sources, L1 for each of them.
# We draw every term of the run that has them all. If you ask whether a loss is normal, look at its
# terms one by one.

# %%
def curve(name, term):
    """Steps and values of a term in the log of a training run of seed 0: two lists."""
    steps, values = [], []
    for line in (folder_of(name, 0) / "log.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        if term in record:
            steps.append(record["step"])
            values.append(record[term])
    return steps, values


TERMS = {                                  # title -> the terms in its panel
    "L1 of pixels": ["l1_shapes", "l1_text"],
    "feature distance": ["feature"],
    "generator: minus mean logit": ["gan"],
    "discriminator: hinge loss": ["disc"],
    "adaptive weight, lambda": ["gan_lambda"],
}
figure, panels = plt.subplots(1, len(TERMS), figsize=(15, 4))
for panel, (title, terms) in zip(panels, TERMS.items(), strict=True):
    for term in terms:
        steps, values = curve("both, L1 + feature + GAN", term)
        panel.plot(steps, values, "o-", markersize=4, label=term)
    panel.axvline(STEPS // 4, color="black", linestyle=":", linewidth=1)
    panel.set_title(title, fontsize=12)
    panel.set(xlabel="step", xlim=(0, 1.04 * STEPS))
panels[0].legend(fontsize=11)
lesson.show(figure, "losses", "the training run with all terms, before they are weighted, 1 seed; "
            f"points: means of {LOG_EVERY} steps; dotted: where the GAN joins the decoder's "
            "objective")

# %% [markdown]
# ### Five decoders, three seeds
#
# Four things are measured on held-out images of both worlds:
#
# - PSNR;
# - how much is still readable: a letter is read if the picture in its place is more like this
#   letter than like any other of 50 (blind guesses would read 2%), a scene if `read_scene` finds
#   the same objects;
# - the strength of edges, in percent of that in the originals;
# - the Fréchet distance (lesson 8), once in the features of the shipped encoder and once in those
#   of an untrained ViT. The feature loss and the discriminator use the features of the shipped
#   encoder, so this judge may flatter them. No loss uses the untrained one.

# %%
N_IMAGES = lesson.size(200, quick=4)
N_READ = lesson.size(60, quick=2)
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
        decoded = to_uint8(reconstruct(rae, pixels)[1])                 # n H W 3
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


def run_decoder(arm, seed, folder):
    """Train one decoder, and measure it."""
    return measure(finetune(arm, seed))


results = lesson.sweep("decoders", list(DECODERS), run_decoder)

# %%
def draw_seeds(panel, names, values):
    """Draw each seed as a dot over its arm's name, and the mean as a line. values: arms x seeds."""
    for x, numbers in enumerate(values):
        panel.plot(np.full(len(numbers), x), numbers, "k.", markersize=9)
        panel.hlines(numbers.mean(), x - 0.3, x + 0.3, color=COLOURS[0], linewidth=3)
    panel.set_xticks(range(len(names)), names)
    panel.set_xlim(-0.6, len(names) - 0.4)


def percent_change(key, base, arm):
    """Change of a number from the arm `base` to another arm, %, for each seed: an array."""
    before, after = values_of(results, [base, arm], key)                # seeds, each
    return 100 * (after / before - 1)


BY_DATA = ["shapes, L1", "both, L1", "text, L1"]
figure, panels = plt.subplots(1, 4, figsize=(15, 4.6))
for panel, key, title, unit in (
        (panels[0], "shapes_psnr", "measured on shapes", "PSNR, dB"),
        (panels[1], "text_psnr", "measured on text", "PSNR, dB"),
        (panels[2], "text_readable", "measured on text", "letters read, %")):
    draw_seeds(panel, ["shapes", "both", "text"], values_of(results, BY_DATA, key))
    panel.set(title=title, ylabel=unit, xlabel="training images")
distances = ["shapes_distance_random", "text_distance_random", "text_distance_tiny"]
by_text = [percent_change(key, "shapes, L1", "both, L1") for key in distances]
draw_seeds(panels[3], ["shapes", "text", "text, by the\nencoder"], by_text)
panels[3].tick_params(axis="x", labelsize=11)
draw_paper_line(panels[3], 100 * (1.621 / 2.406 - 1), "paper, text: -33%")
panels[3].axhline(0, color="black", linewidth=1)
panels[3].set(title="change by adding text", ylabel="Fréchet distance, both over shapes, %",
              xlabel="measured on")
lesson.show(figure, "data", f"3 seeds as dots, mean as line, {N_IMAGES} held-out images of each "
            f"world, {N_READ} of them read; right: distance in features of an untrained ViT, or of "
            "the shipped encoder; paper: rFID of Scale-RAE, table 1, web and synthetic images "
            "without and with text")

# %%
BY_LOSS = ["both, L1", "both, L1 + feature", "both, L1 + feature + GAN"]
figure, panels = plt.subplots(1, 4, figsize=(15, 4.6))
for panel, key, title, unit in (
        (panels[0], "text_psnr", "PSNR", "PSNR, dB"),
        (panels[1], "text_edges", "edges", "strength, % of the originals'"),
        (panels[2], "text_distance_tiny", "features of the\nshipped encoder", "Fréchet distance"),
        (panels[3], "text_distance_random", "features of an\nuntrained ViT", "Fréchet distance")):
    draw_seeds(panel, ["L1", "+ feature", "+ GAN"], values_of(results, BY_LOSS, key))
    panel.set(title=title, ylabel=unit, xlabel="terms of the loss")
lesson.show(figure, "terms", f"measured on {N_IMAGES} held-out images of text, of decoders of both "
            "worlds with one, two and three terms; 3 seeds as dots, mean as line; the losses use "
            "the shipped encoder, not the untrained ViT")

# %% [markdown]
# ## Figure
#
# 1. *Zoom* (predictions 1 and 3): the decoder of shapes takes letters for shapes. It draws coloured
#    blots, and a grey green background where it should be black; 16% of the letters can be read.
#    With letters among the data the background is right, but *less* is left of the letters. Where
#    the latents do not say which pixels are ink, the best answer to L1 is the median, and that is
#    the background. The feature distance brings some ink back, since the encoder sees when a letter
#    is missing. The GAN adds nothing that can be seen.
# 2. *Losses* (prediction 4): L1 of text falls at once, that of shapes rises a little. Each term has
#    its own scale, so look at each by itself. The discriminator ends at 1.00: it has not learned to
#    tell originals from reconstructions, so its gradient teaches the decoder nothing.
# 3. *Data* (prediction 2): with text among the data, text gains 1.5 dB and shapes lose 0.7 dB.
#    Training on text alone costs 8 dB of shapes, and gains no more on text than both. By the judge
#    that no loss uses, the distance of text falls by 63%, and that of shapes rises by 45%, from a
#    small value (0.12). By the shipped encoder the distance of text *rises* by half: the letters
#    are missing, and that is what this encoder sees. Which judge is right? Look at the zoom: both.
# 4. *Terms*: the feature distance helps text by all four measures, also by the judge that no loss
#    uses. The GAN changes next to nothing.
#
# ## Number
#
# What you should see: with text among the data, the PSNR of text rises by 1.5 dB, and its distance
# (untrained ViT) falls by 63%. But only 11% of the letters are read, where it was 16%. The feature
# distance adds 0.5 dB and a quarter more edges. The discriminator's last loss is 1.00.

# %%
def mean_of(arm, key):
    """Mean over seeds of a number of the sweep."""
    return values_of(results, [arm], key).mean()


gain_of_text = mean_of("both, L1", "text_psnr") - mean_of("shapes, L1", "text_psnr")
gain_of_shapes = mean_of("both, L1", "shapes_psnr") - mean_of("shapes, L1", "shapes_psnr")
edges_of_gan = mean_of(BY_LOSS[2], "text_edges") - mean_of(BY_LOSS[0], "text_edges")
last_disc = curve(BY_LOSS[2], "disc")[1][-1]
lesson.number("PSNR of text: gain by text in training, dB", gain_of_text, 0.8, 2.5, quick=(-2, 5))
lesson.number("PSNR of shapes: gain by text in training, dB", gain_of_shapes, -1.5, -0.2,
              quick=(-2, 2))
lesson.number("distance of text: change by text in training, %", by_text[1].mean(), -80, -40,
              quick=(-95, 100))
lesson.number("letters read with text in training, %", mean_of("both, L1", "text_readable"), 6, 16,
              quick=(0, 100))
lesson.number("edges of text: gain by feature and GAN, points", edges_of_gan, 4, 12,
              quick=(-30, 30))
lesson.number("last loss of the discriminator", last_disc, 0.95, 1.05, quick=(0, 5))
lesson.end()

# %% [markdown]
# ## Exercise
#
# 1. `hinge_loss` is 1 if all logits are 0. What is it for a perfect discriminator, and what is the
#    generator's gradient then?
# 2. `adaptive_weight` makes the GAN's gradient as long as that of the reconstruction loss. What
#    goes wrong if the discriminator knows nothing, so that its gradient is noise?
# 3. Few letters can be read: is that the fault of the decoder or of the encoder? How would you find
#    out?
# 4. Why are there two judges in the last figure? Which of them would you report in a paper?
#
# <details><summary>Answers</summary>
#
# 1. It is 0: all real images have logits above 1, all reconstructions below -1. The generator's
#    loss is minus the mean logit, not a logarithm of a probability, so its gradient does not
#    vanish.
# 2. The noise is scaled up to the length of a useful gradient. It harms the reconstruction, and
#    teaches nothing. The papers train the discriminator for an epoch or two before the GAN joins.
# 3. Train ten times as long (`STEPS`): what does not come back then is probably not in the latents.
#    Or train an encoder together with the decoder, `--encoder vae:192:16`, which has as many
#    numbers for each token: what it gains was lost in the frozen encoder.
# 4. A network that is part of the loss flatters the models that were trained with it. Report the
#    one that no loss uses. (The FID's network, Inception, is no part of the papers' losses, which
#    use VGG and DINO.)
#
# </details>
#
# ## The paper says / ours differs
#
# - Paper 2 (arXiv 2601.16208, table 1): rFID on images of text falls from 2.406 to 1.621, by a
#   third, when rendered text joins web and synthetic images. On ImageNet it stays at 0.437 and
#   0.435. The first holds here by PSNR (1.5 dB) and by the untrained judge (63%), not by the
#   shipped encoder. The second does not: shapes lose 0.7 dB. The likely cause: our decoder has 2
#   million parameters and trains on for 80 steps, of which half go to text, while theirs has 415
#   million, and text is an eighth of its data.
# - Both papers train with L1 and LPIPS, and with a GAN from epoch 8 on (of 16 in paper 1, of 80 in
#   paper 2); paper 2 adds a Gram loss. We know of no table there that shows what each term adds.
#   Here the feature distance does what a perceptual loss is for: text has more edges, and is nearer
#   by both judges. It costs the shapes 0.4 dB, and by the untrained judge their distance rises from
#   0.17 to 0.20.
# - Ours differs: the weights of LPIPS are a download, so the shipped encoder takes the place of its
#   network in the feature distance, and that of DINO in the discriminator. The effect of the GAN is
#   **not testable here**: the discriminator learns too slowly. It does learn, though: against a
#   decoder that hardly changes (`--lr 1e-7`, one run) its loss falls from 1.01 to 0.97 in 200 steps
#   of 32 images. The papers give it epochs of a million images.

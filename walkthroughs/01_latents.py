# %% [markdown]
# # Lesson 1: four kinds of latents
#
# 35 minutes of class, 2 minutes on 2 CPU cores. Needs: what a vision transformer (ViT) is. An
# autoencoder turns an image into an array of numbers, its latents, and back. A representation
# autoencoder (RAE) takes the output of a frozen, pretrained encoder as its latents, and trains only
# the way back. Here we compare such latents with those of a variational autoencoder (VAE), with
# those of an untrained ViT, and with plain pixels.


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
from lesson import Lesson, draw_dots, draw_paper_line, train, values_of

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
# What do the latents of an encoder tell us about an image, and can a decoder draw the image from
# them again?
#
# ## Predict
#
# Each image shows one object, which has one of 6 colours and one of 6 shapes: 36 classes. Write
# down, before you run anything:
#
# 1. A linear classifier is trained on the mean of an image's 16 tokens: once on those of an RAE,
#    once on those of a VAE, of an untrained ViT, and of the pixels themselves. How often is each of
#    them right, in %? A guess is right in 2.8% of the cases.
# 2. From which latents are images drawn more exactly, those of the RAE or those of the VAE?
# 3. Take two images whose latents are nearest to each other. What do they have in common if the
#    latents are pixels: the colour of the object, its shape, its place, or the background? And if
#    they are those of the RAE?

# %% [markdown]
# ## Read
#
# - `Encoder` in model.py, `[L1]`: a frozen ViT; its final tokens are the latents. What happens to
#   the CLS token? What are the mean and the variance of a token over its channels?
# - `Decoder` in model.py, `[L2]`: a ViT, too. Its last layer, in `Decoder.pixels`, is linear and
#   turns each token into a patch of pixels.
# - `RAE` in model.py, `[L3]`: encoder, decoder, and the normalisation in between.
# - `VAE` in baselines.py: the same ViT as the tiny encoder's, but trained together with its
#   decoder, and for nothing but reconstruction. Its tokens have 16 channels, those of the RAE 192.
#
# Two of the exercises, `patchify` and `latent_statistics`, belong to this lesson. Their solutions
# are in these files: if you want to find them yourself, do `walkthroughs/exercises/patchify.py` and
# `latent_statistics.py` first.

# %% [markdown]
# ## Run
#
# ### Four encoders
#
# All of them turn an image of 64 x 64 pixels into a grid of 4 x 4 tokens. The encoder of the RAE is
# the shipped one. For each patch, it was trained to describe the object that is nearest to it:
# place, outline, rotation and colour, as image analysis measures them, without the classes. The VAE
# is trained now.

# %%
@cache
def train_vae(seed):
    """Train a VAE, encoder and decoder together. It comes as an RAE object, as all autoencoders."""
    path = train(train_decoder, lesson.folder / f"vae_{seed}", seed,
                 encoder="vae:16:16",                  # 16 channels, patches of 16 x 16 pixels
                 tau=0,                                # a VAE has noise of its own
                 steps=lesson.size(250, quick=2), batch=lesson.size(32, quick=8), eval_every=0,
                 stats_n=lesson.size(1024, quick=8))   # images whose latents give mean and variance
    return load_rae(path).to(lesson.device)


rae = load_rae(SHIPPED_RAE).to(lesson.device)
vae = train_vae(0)
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
pictures = rearrange(pixels, "n c h w -> n h w c")                      # as pictures are drawn
labels = [item["label"] for item in items]


def encode_all(encoder):
    """Latents n c h w of all images, with mean 0 and variance 1 in each element, as in RAE.encode.
    """
    batches = [encoder.encode(batch.to(lesson.device) / 255).cpu() for batch in pixels.split(100)]
    latents = torch.cat(batches)                                        # n c h w
    return (latents - latents.mean(0)) / (latents.var(0) + 1e-5).sqrt()


latents = {name: encode_all(encoder) for name, encoder in encoders.items()}
for name, z in latents.items():
    c, h, w = z.shape[1:]
    print(f"{name}: {h} x {w} tokens of {c} channels, {c * h * w} numbers an image")

# %% [markdown]
# ### Tokens as colours
#
# A token has up to 768 channels, and a picture has three: red, green and blue. So we take the three
# directions in which the tokens of all images vary most (principal components), one for each
# colour. These colours are not those of the image: where they are alike, tokens are alike in these
# three directions.

# %%
def principal_directions(z):
    """The directions in which tokens vary, c c, the strongest first, and the variances, c."""
    tokens = rearrange(z, "n c h w -> (n h w) c").double()
    variances, directions = torch.linalg.eigh(tokens.T.cov())           # the weakest first
    return directions.flip(1).float(), variances.flip(0)


def token_colours(z):
    """The first three principal components of the tokens of z n c h w as colours: n h w 3."""
    directions, _ = principal_directions(z)
    components = rearrange(z, "n c h w -> n h w c") @ directions[:, :3]  # n h w 3
    low = components.flatten(0, 2).quantile(0.02, dim=0)
    high = components.flatten(0, 2).quantile(0.98, dim=0)
    return ((components - low) / (high - low)).clamp(0, 1)


rows = {"image": pictures}
for name, z in latents.items():
    rows[name] = token_colours(z)
figure, panels = plt.subplots(len(rows), 8, figsize=(12, 8))
for row, (name, row_pictures) in zip(panels, rows.items(), strict=True):
    for panel, picture in zip(row, row_pictures, strict=False):
        panel.imshow(picture, interpolation="nearest")
        panel.set(xticks=[], yticks=[])
    row[0].set_ylabel(name)
lesson.show(figure, "token_colours", f"eight of {N_IMAGES} images; below, one square is one token: "
            "its components in the three directions in which tokens vary most, as red, green and "
            "blue (not the colours of the image)")

# %% [markdown]
# ### Nearest neighbours
#
# Which images are near to each other? We measure the distance between whole latents, all 16 tokens
# one after another, since that is the space in which a diffusion model will have to work.

# %%
N_QUERIES = lesson.size(500, quick=20)


def nearest(z, k):
    """For each of the first N_QUERIES images, the numbers of the k nearest among the others."""
    flat = z.flatten(1)                                                 # n c*h*w
    distance = torch.cdist(flat[:N_QUERIES], flat[N_QUERIES:])          # queries others
    return N_QUERIES + distance.topk(k, largest=False).indices          # queries k


def framed(picture, colour):
    """A picture H W 3 in a frame of a colour, red, green and blue in [0,1]."""
    height, width, _ = picture.shape
    sheet = torch.ones(height + 12, width + 12, 3)
    sheet[2:-2, 2:-2] = torch.tensor(colour)
    sheet[6:-6, 6:-6] = picture / 255
    return sheet


WHITE, BLUE = (1.0, 1.0, 1.0), (0.0, 0.45, 0.7)
figure, panels = plt.subplots(1, 3, figsize=(15, 4))
for panel, query in zip(panels, (0, 3, 5), strict=True):
    lines = []
    for z in latents.values():
        line = [framed(pictures[query], WHITE)]
        for number in nearest(z, 4)[query].tolist():
            is_same_class = labels[number] == labels[query]
            line.append(framed(pictures[number], BLUE if is_same_class else WHITE))
        lines.append(torch.cat(line, dim=1))
    panel.imshow(torch.cat(lines))
    height = lines[0].shape[0]
    panel.set_yticks([height * (i + 0.5) for i in range(len(lines))], list(latents))
    panel.set_xticks([height / 2, 3 * height], ["query", "its nearest neighbours"])
    panel.grid(False)
lesson.show(figure, "neighbours", f"three queries, each with the four images of "
            f"{N_IMAGES - N_QUERIES} whose latents are nearest, the nearest first; a blue frame: "
            "the same class")

# %% [markdown]
# ### What the decoders give back
#
# The decoders draw images that neither of them has seen in training. The PSNR, in dB, says how
# exactly: 6 dB more means that the pixels are off by half as much.

# %%
def psnr_of(autoencoder):
    """Mean PSNR of the reconstructions of the first 200 images, dB."""
    originals, decoded = reconstruct(autoencoder, pictures[:200])
    return float(metrics.psnr(to_uint8(originals), to_uint8(decoded)).mean())


figure, panels = plt.subplots(3, 8, figsize=(12, 4.9))
_, by_rae = reconstruct(rae, pictures[:8])
_, by_vae = reconstruct(vae, pictures[:8])
rows = {"image": pictures, "RAE": to_uint8(by_rae), "VAE": to_uint8(by_vae)}
for row, (name, row_pictures) in zip(panels, rows.items(), strict=True):
    for panel, picture in zip(row, row_pictures, strict=False):
        panel.imshow(picture, interpolation="nearest")
        panel.set(xticks=[], yticks=[])
    row[0].set_ylabel(name)
rae_psnr, vae_psnr = psnr_of(rae), psnr_of(vae)
lesson.show(figure, "reconstructions", f"held-out images, and what each decoder draws from their "
            f"latents; PSNR, mean of 200 images: RAE {rae_psnr:.1f} dB, VAE after 250 steps "
            f"{vae_psnr:.1f} dB")

# %% [markdown]
# ### Numbers, with three seeds
#
# The probe is a linear classifier of the mean token, trained on 2,000 images and tested on 1,000
# others. With each seed the VAE is trained anew. This takes longer than a lesson, so
# `lesson.sweep` reads the results from `walkthroughs/results/01_latents.json`; `--full` measures
# them again.
#
# The last panel counts directions: how much of the tokens' variance lies in the strongest
# direction, in the two strongest, and so on? The line ends at the number of channels.

# %%
ARMS = ["RAE", "VAE", "pixels", "random ViT"]


def agreement(z):
    """In how many cases, %, the nearest neighbour has the query's class, colour, shape: a dict."""
    names = [CLASSES[label].split() for label in labels]                # (colour, shape) of each
    same = {"class": 0, "colour": 0, "shape": 0}
    for query, neighbour in enumerate(nearest(z, 1)[:, 0].tolist()):
        same["class"] += names[query] == names[neighbour]
        same["colour"] += names[query][0] == names[neighbour][0]
        same["shape"] += names[query][1] == names[neighbour][1]
    return {key: 100 * count / N_QUERIES for key, count in same.items()}


def run_probe(arm, seed, folder):
    """The linear probe of an encoder, and its nearest neighbours. The VAE is trained anew."""
    encoder = encoders[arm]
    measured = {}
    if arm == "RAE":
        measured["psnr"] = psnr_of(rae)
    if arm == "VAE":
        autoencoder = train_vae(seed)
        encoder = autoencoder.encoder
        measured["psnr"] = psnr_of(autoencoder)
    result = evaluate_probe(encoder, ["shapes"], n=lesson.size(2000, quick=40),
                            hold_out=lesson.size(1000, quick=20), seed=seed)
    measured["probe"] = 100 * result["accuracy"]
    for key, value in agreement(encode_all(encoder)).items():
        measured[f"same_{key}"] = value
    return measured


results = lesson.sweep("latents", ARMS, run_probe)

# %%
figure, panels = plt.subplots(1, 3, figsize=(15, 5))
draw_dots(panels[0], ARMS, values_of(results, ARMS, "probe"))
draw_paper_line(panels[0], 84.5, "paper: DINOv2-B 84.5%")
draw_paper_line(panels[0], 8.0, "paper: SD-VAE 8.0%")
panels[0].set(title="linear probe", ylabel="right class, %", ylim=(0, 105), xlim=(-0.6, 4.9))

x = torch.arange(len(ARMS))
for shift, key, hatch in ((-0.25, "class", ""), (0, "colour", "//"), (0.25, "shape", "..")):
    means = values_of(results, ARMS, f"same_{key}").mean(1)
    panels[1].bar(x + shift, means, width=0.24, hatch=hatch, edgecolor="white", label=f"same {key}")
panels[1].set(title="nearest neighbour", ylabel="queries, %", ylim=(0, 130),
              yticks=range(0, 101, 20))
panels[1].legend(fontsize=11)

for name, z in latents.items():
    _, variances = principal_directions(z)
    percent = 100 * variances.cumsum(0) / variances.sum()               # in the first 1, 2, ...
    panels[2].plot(range(1, len(percent) + 1), percent, label=name)
    for_90, for_99 = [int((percent < level).sum()) + 1 for level in (90, 99)]
    print(f"{name}: {percent[0]:.0f}% of the variance in 1 direction, 90% in {for_90}, "
          f"99% in {for_99} of {len(percent)}")
panels[2].set(title="directions of the tokens", xscale="log", ylabel="variance in them, %",
              xlabel="number of directions, strongest first", ylim=(0, 105))
panels[2].legend(fontsize=11)
for panel in panels[:2]:
    panel.set_xticks(x, ["RAE", "VAE", "pixels", "random\nViT"])
lesson.show(figure, "probe", "probe: 3 seeds as dots, 1,000 held-out images (paper: ImageNet); "
            f"neighbours: mean of 3 seeds, {N_QUERIES} queries; directions: {N_IMAGES} images, "
            "1 seed")

# %% [markdown]
# ## Figure
#
# 1. *Token colours*: in each row, the patch of the object stands out. The other tokens of an RAE
#    have a colour of their own in each image, whatever the background: they describe the object,
#    too. (Exercise 3 tests this: one token of a corner is enough to tell the class. The two purple
#    crosses have different colours, as the tokens also tell rotation and place, and three of 192
#    directions do not show all.) The other tokens of a VAE, of pixels and of an untrained ViT
#    follow the background of their own patch.
# 2. *Neighbours*: nearest in pixels are images with a similar background and an object of the same
#    colour at the same place, whatever its shape. Nearest by the latents of the RAE are objects of
#    the same shape at about the same place, in 85 of 100 cases; colour and background count less.
#    The third query is one of the exceptions.
# 3. *Reconstructions*: the encoder of the RAE was never trained to reconstruct, and it is frozen.
#    Yet the decoder draws the images again, with corners a little rounded. (This encoder describes
#    outlines and colours. That the encoders of the paper allow it, too, is more of a surprise.) The
#    VAE is blurred after its 250 steps, and its patches do not fit together at their borders. This
#    is no race: the VAE has a twelfth of the numbers, and the decoder of the RAE was trained for
#    hours.
# 4. *Probe*, left: from the RAE's mean token, a linear classifier reads every class; from the
#    others it reads little. Middle: by the distance of whole latents, the RAE groups images by
#    shape, the others by colour. Right: of the RAE's 192 directions, no single one stands out, 22
#    hold 90% of the variance, and 32 hold 99%. Most of them are hardly used. Pixels have one strong
#    direction, brightness, with 61%, and a long tail: 15 directions for 90%, 173 for 99%.
#
# ## Number
#
# What you should see: the probe of the RAE is right in 100% of the cases, those of the VAE, the
# pixels and the untrained ViT in 9%, 13% and 16%. The seeds differ by less than one point. The PSNR
# is 33.5 dB for the RAE, and about 26 dB for the VAE. Of the nearest neighbours, 85% have the same
# shape by the latents of the RAE, and 83% the same colour by pixels.

# %%
def mean_of(arm, key):
    """Mean over seeds of a number of the sweep."""
    return values_of(results, [arm], key).mean()


lesson.number("probe of RAE, % right", mean_of("RAE", "probe"), 98, 100, quick=(0, 100))
lesson.number("probe of VAE, % right", mean_of("VAE", "probe"), 4, 18, quick=(0, 100))
lesson.number("probe of pixels, % right", mean_of("pixels", "probe"), 10, 17, quick=(0, 100))
lesson.number("probe of random ViT, % right", mean_of("random ViT", "probe"), 12, 21,
              quick=(0, 100))
lesson.number("PSNR of RAE, dB", rae_psnr, 33, 34)
lesson.number("PSNR of VAE, dB", vae_psnr, 24, 28.5, quick=(5, 40))
lesson.number("nearest of RAE: same shape, %", agreement(latents["RAE"])["shape"], 75, 95,
              quick=(50, 100))
lesson.number("nearest of pixels: same colour, %", agreement(latents["pixels"])["colour"], 75, 95,
              quick=(0, 100))
lesson.end()

# %% [markdown]
# ## Exercise
#
# Do `patchify` and `latent_statistics` in `walkthroughs/exercises/`. And, with this lesson:
#
# 1. The untrained ViT has never seen an image. Why is its probe right more often than guessing?
# 2. In `nearest`, take the mean token, `z.mean((2, 3))`, instead of the whole latent,
#    `z.flatten(1)`, and print `agreement(z)` for each of the latents. Which gain, which lose, and
#    why?
# 3. Does a token of the background know the object? Train the probe on the token of the corner at
#    the top left, `z[:, :, 0, 0]`: the first 1,500 images to train on, the last 500 to test.
#    `linear_probe` in metrics.py does both.
# 4. The shipped encoder was trained on coloured shapes alone. What do you expect of its latents of
#    lines of letters? Reconstruct some: `open_data("text", 64, split="val")`.
#
# <details><summary>Answers</summary>
#
# 1. Random layers mix pixels, but they keep them: what is linear in the pixels, such as the mean
#    colour of the object, mostly stays linear in the features. The shape is not linear in either.
# 2. Of 500 queries: the RAE gains (same class 36% to 44%), since every token says the same of the
#    object, and the mean forgets its place. The others lose (VAE 18% to 5%, pixels 17% to 7%,
#    untrained ViT 21% to 13%): their tokens differ by place, and in the mean the background drowns
#    the object.
# 3. From the RAE's token of the corner, 99.8% are right; from the same token of the untrained ViT
#    16%, of the VAE 5%, of pixels 6%. The encoder was trained to describe the nearest object in
#    every token.
# 4. It describes them by places, outlines and colours of shapes, since it knows nothing else. The
#    decoder draws coloured blots where the letters were, and few of them can be read. Lesson 9
#    trains it on letters.
#
# </details>
#
# ## The paper says / ours differs
#
# - Paper 1 (arXiv 2510.11690, table 1): linear probing on ImageNet gives 84.5% with DINOv2-B, 79.1%
#   with SigLIP2-B, 68.0% with MAE-B, and 8.0% with the latents of SD-VAE. The gap between encoder
#   and VAE is here as well: 100% with the shipped encoder, 9% with our VAE. A guess is right in
#   2.8% here, and in 0.1% on ImageNet.
# - The same table: reconstructions of an RAE are at least as good, by rFID 0.49 with DINOv2-B, 0.53
#   with SigLIP2-B and 0.16 with MAE-B, where SD-VAE has 0.62. That cannot be tested here: our VAE
#   is trained for 250 steps, and the RAE's decoder for hours. What can be seen is that a frozen
#   encoder need not be an obstacle.
# - Ours differs: 36 classes of clean drawings instead of 1,000 of photographs, 16 tokens instead of
#   256, and an encoder that was made for this world. So high numbers are no surprise. What can be
#   compared is which latents come first.

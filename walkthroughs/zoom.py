"""Details of held-out images and of their reconstructions by some decoders, four times enlarged.

    python walkthroughs/zoom.py runs/decoder/last.pt assets/tiny_rae.safetensors --out zoom.png

The upper row has the originals, the rows below are of each decoder in turn. Ends with the PSNR of
each decoder on these images.
"""
# %% Set-up
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image

import metrics
import runtime
from data import load_images, open_data, resize_images
from eval_decoder import reconstruct
from release import load_rae

ENLARGEMENT = 4
FRAME = 2                          # white pixels around each detail

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoints", nargs="+",
                    help="Checkpoints of train_decoder.py or train_dit.py.")
parser.add_argument("--data", nargs="+", default=["shapes"],
                    help="Images, as the training scripts take them (default: shapes).")
parser.add_argument("--first", type=runtime.at_least(0), default=0,
                    help="Number of the first image (default: 0).")
parser.add_argument("--n", type=runtime.at_least(1), default=8,
                    help="Number of images (default: 8).")
parser.add_argument("--out", default="zoom.png", help="Picture to write (default: zoom.png).")
options = parser.parse_args()

# %% Originals and reconstructions, at the size of the first decoder's images
try:
    raes = [load_rae(path) for path in options.checkpoints]
except (OSError, ValueError) as error:                 # no such file; no autoencoder in it
    parser.error(str(error))
side = raes[0].decoder.image_size
hold_out = runtime.load_checkpoint(options.checkpoints[0])["args"].get("hold_out", 0)
val = open_data(options.data, side, split="val", hold_out=hold_out)
originals = load_images(val, range(options.first, options.first + options.n))     # n S S 3

rows = [originals]
for rae, path in zip(raes, options.checkpoints, strict=True):
    _, images = reconstruct(rae, originals)
    images = (resize_images(images, side) * 255).round().byte()         # n 3 S S
    images = rearrange(images, "n c h w -> n h w c")
    print(f"{path}: {metrics.psnr(originals, images).mean():.2f} dB")
    rows.append(images)


# %% Of each image the quarter with the most edges
def quarter_with_most_edges(image):
    """Top and left of the square of half the side in which neighbouring pixels differ most.

    image: uint8 S S 3.
    """
    image = image.float() / 255
    between_rows = image.diff(dim=0).abs().sum(2)                       # S-1 S
    between_columns = image.diff(dim=1).abs().sum(2)                    # S S-1
    edges = between_rows[:, 1:] + between_columns[1:]                   # S-1 S-1
    half = len(image) // 2
    best, most = (0, 0), -1.0
    for top in range(0, half, 4):
        for left in range(0, half, 4):
            amount = float(edges[top:top + half, left:left + half].sum())
            if amount > most:
                best, most = (top, left), amount
    return best


# %% Enlarged without smoothing, each image a column
columns = []
half = side // 2
for k in range(options.n):
    top, left = quarter_with_most_edges(originals[k])
    details = torch.stack([row[k, top:top + half, left:left + half] for row in rows])     # r h w 3
    details = repeat(details, "r h w c -> r (h p) (w q) c", p=ENLARGEMENT, q=ENLARGEMENT)
    details = F.pad(details, (0, 0, FRAME, FRAME, FRAME, FRAME), value=255)
    columns.append(rearrange(details, "r h w c -> (r h) w c"))
Image.fromarray(torch.cat(columns, dim=1).numpy()).save(options.out)
print(f"{options.n} images, each a column: {options.out}")

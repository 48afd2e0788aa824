"""Details of held-out images and of their reconstructions by some decoders, four times enlarged.

    python walkthroughs/zoom.py runs/decoder/last.pt assets/tiny_rae.safetensors --out zoom.png
Rows: the original, then each decoder in turn; ends with their PSNR on what is shown.
"""
# %% Set-up
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

import eval_fid
import runtime
from data import open_data
from model import unpack_rae

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoints", nargs="+", help="of train_decoder.py or train_dit.py")
parser.add_argument("--data", nargs="+", default=["shapes"], help="images, as the scripts take them")
parser.add_argument("--first", type=runtime.at_least(0), default=0, help="number of the first image")
parser.add_argument("--n", type=runtime.at_least(1), default=8, help="images")
parser.add_argument("--out", default="zoom.png")
options = parser.parse_args()

# %% Originals and reconstructions, at the size of the first decoder's images
try:
    states = [runtime.load_checkpoint(path) for path in options.checkpoints]
    models = [unpack_rae(state["rae"]) for state in states]
except (OSError, ValueError, KeyError) as error:           # no such file; no autoencoder in it
    parser.error(str(error))
side = models[0].decoder.grid * models[0].decoder.patch
val = open_data(options.data, side, split="val", hold_out=states[0]["args"].get("hold_out", 0))
images = eval_fid.real_images(val, range(options.first, options.first + options.n))     # n H W 3
x = images.movedim(3, 1).float() / 255
rows = [images]
for rae, path in zip(models, options.checkpoints):
    back = eval_fid.resize(eval_fid.reconstruct(rae, images)[1], side)
    rows.append((back * 255).round().byte().movedim(1, 3))
    print(f"{path}: {eval_fid.psnr(images, rows[-1]).mean():.2f} dB")

# %% The half of each image with the most edges, enlarged without smoothing
half, tiles = side // 2, []
steep = x.diff(dim=3).abs().sum(1)[:, 1:] + x.diff(dim=2).abs().sum(1)[:, :, 1:]        # n H-1 W-1
for k in range(options.n):
    corners = [(i, j) for i in range(0, half, 4) for j in range(0, half, 4)]
    i, j = max(corners, key=lambda at: float(steep[k, at[0]:at[0] + half, at[1]:at[1] + half].sum()))
    tiles.append(np.concatenate([np.pad(row[k, i:i + half, j:j + half].numpy().repeat(4, 0).repeat(4, 1),
                                        ((2, 2), (2, 2), (0, 0)), constant_values=255) for row in rows]))
Image.fromarray(np.concatenate(tiles, 1)).save(options.out)
print(f"{options.n} images, each a column: {options.out}")

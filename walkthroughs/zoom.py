"""Details of held-out images and of their reconstructions by some decoders, four times enlarged.

    python walkthroughs/zoom.py runs/decoder/last.pt assets/tiny_rae.safetensors --out zoom.png

The upper row has the originals, the rows below are of each decoder in turn. Ends with the PSNR of
each decoder on these images.
"""
# %% Set-up
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image

import metrics
import runtime
import sample
from data import load_images, open_data, resize_images
from eval_decoder import reconstruct
from release import load_rae

ENLARGEMENT = 4
FRAME = 2                          # white pixels around each detail


def parse_args(argv=None):
    p = runtime.Parser(__doc__, {})
    p.add_argument("checkpoints", nargs="+",
                   help="Checkpoints of train_decoder.py or train_dit.py.")
    p.add_argument("--data", nargs="+", default=["shapes"],
                   help="Images, as the training scripts take them.")
    p.add_argument("--first", type=runtime.at_least(0), default=0,
                   help="Number of the first image.")
    p.add_argument("--n", type=runtime.at_least(1, 100), default=8,
                   help="Number of images, each a column.")
    p.add_argument("--out", default="zoom.png", help="Picture to write.")
    return p.parse_args(argv)


# %% Originals and reconstructions, at the size of the first decoder's images
def reconstruct_by_each(options):
    """The originals and their reconstructions by each decoder: a list of images n S S 3, uint8."""
    raes = [load_rae(path) for path in options.checkpoints]
    side = raes[0].decoder.image_size
    flags = runtime.load_checkpoint(options.checkpoints[0])["args"]
    hold_out = 0
    if flags.get("data") == options.data:              # show what this training has held out
        hold_out = flags.get("hold_out", 0)
    val = open_data(options.data, side, split="val", hold_out=hold_out)
    last = options.first + options.n
    if last > len(val):
        raise ValueError(f"--first {options.first} and --n {options.n} need {last} images, and "
                         f"{' '.join(options.data)} has {len(val)}; lower them")
    originals = load_images(val, range(options.first, last))            # n S S 3

    rows = [originals]
    for rae, path in zip(raes, options.checkpoints, strict=True):
        _, images = reconstruct(rae, originals)
        images = (resize_images(images, side) * 255).round().byte()     # n 3 S S
        images = rearrange(images, "n c h w -> n h w c")
        print(f"{path}: {metrics.psnr(originals, images).mean():.2f} dB")
        rows.append(images)
    return rows


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
def enlarge(rows):
    """A picture H W 3 of details of images, of which each of the rows has n S S 3."""
    columns = []
    originals = rows[0]
    half = originals.shape[1] // 2
    for k in range(len(originals)):
        top, left = quarter_with_most_edges(originals[k])
        details = torch.stack([row[k, top:top + half, left:left + half] for row in rows])
        details = repeat(details, "r h w c -> r (h p) (w q) c", p=ENLARGEMENT, q=ENLARGEMENT)
        details = F.pad(details, (0, 0, FRAME, FRAME, FRAME, FRAME), value=255)
        columns.append(rearrange(details, "r h w c -> (r h) w c"))
    return torch.cat(columns, dim=1)


def main(options):
    runtime.check_out(options.out)
    runtime.check_suffix(options.out, sample.PICTURES)
    picture = Image.fromarray(enlarge(reconstruct_by_each(options)).numpy())
    sample.save_picture(picture, options.out)
    print(f"{options.n} images, each a column: {options.out}")


if __name__ == "__main__":
    runtime.run(main, parse_args)

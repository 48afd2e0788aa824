"""How long a device waits for the CPU around its work: saving, noise, files, decoding, SSIM.

    python tests/host.py

A pause stands for the device, so that none is needed. Each line has the time without threads and
with them, in ms; of SSIM on one core and on all.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import metrics  # noqa: E402
import runtime  # noqa: E402
import sample  # noqa: E402
import saving  # noqa: E402
from data import load_images, open_data  # noqa: E402
from pictures import save_picture  # noqa: E402

CPU = torch.device("cpu")
LATENTS = (768, 16, 16)          # of DINOv2-B at 256 px
BATCH = 32
DEVICE_MS = 3                    # that a device takes for an image in these measurements


def milliseconds(function):
    """How long function() takes."""
    begin = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - begin)


def device_works(images):
    time.sleep(DEVICE_MS / 1000 * images)


def save_times(folder):
    """How long save() keeps a training that has a state of 1 GiB on the CPU."""
    state = dict(model={"w": torch.randn(128, 2**20)}, ema={"w": torch.randn(128, 2**20)})
    times = []
    for in_background in (False, True):
        args = argparse.Namespace(out=folder, steps=1000, save_every=1, log_every=1)
        checkpoints = saving.Checkpoints(args, 0, None, None, in_background)
        checkpoints.save(1, **state)                   # takes the memory
        checkpoints.finish()
        times.append(milliseconds(lambda: checkpoints.save(2, **state)))       # noqa: B023
        checkpoints.finish()
    return times


def noise(_):
    """An image and step of a stochastic solver, of which the device takes DEVICE_MS."""
    steps, indices = 6, range(BATCH)

    def draw(noise_of_step):
        for step in range(steps):
            device_works(BATCH)
            noise_of_step(step)

    alone = milliseconds(lambda: draw(lambda step: sample.noise(LATENTS, 0, indices, step)))
    noises = sample.noise_ahead(LATENTS, 0, indices, steps, CPU)
    together = milliseconds(lambda: draw(lambda step: next(noises)))
    return [alone / steps / BATCH, together / steps / BATCH]


def files(folder):
    """An image of 256 px that the device draws in DEVICE_MS, as a PNG file."""
    small = torch.from_numpy(np.random.default_rng(0).random((BATCH, 3, 32, 32), np.float32))
    images = torch.nn.functional.interpolate(small, size=256, mode="bicubic").clamp(0, 1)
    images = (images * 255).byte().permute(0, 2, 3, 1).contiguous()            # b H W 3
    paths = [folder / f"{i}.png" for i in range(4 * BATCH)]

    def draw_images(numbers):
        device_works(len(numbers))
        return images[:len(numbers)]

    def draw_and_write():
        for numbers in runtime.split_numbers(len(paths), BATCH):
            for i, pixels in zip(numbers, draw_images(numbers).numpy(), strict=True):
                save_picture(Image.fromarray(pixels), paths[i])

    alone = milliseconds(draw_and_write)
    for path in paths:
        path.unlink()
    together = milliseconds(lambda: sample.draw_files(paths, draw_images, BATCH))
    return [alone / len(paths), together / len(paths)]


def decoding(folder):
    """A JPEG of 500 x 375 pixels, centre-cropped to 256."""
    for i in range(2 * BATCH):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i}.jpg", quality=92)
    data = open_data(str(folder), 256, split="val")
    numbers = range(2 * BATCH)
    alone = milliseconds(lambda: [data[k] for k in numbers])
    together = milliseconds(lambda: load_images(data, numbers))
    return [alone / len(numbers), together / len(numbers)]


def ssim(_):
    """A pair of images of 256 px."""
    images = torch.randint(0, 256, (BATCH, 256, 256, 3), dtype=torch.uint8)
    others = images.roll(1, dims=1)
    times = []
    for threads in (1, runtime.cores_of_machine()):
        torch.set_num_threads(threads)
        metrics.ssim(images, others)                   # takes the memory
        times.append(milliseconds(lambda: metrics.ssim(images, others)) / BATCH)
    return times


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()     # --help alone
    runtime.setup()
    print(f"{'ms':>10}  {'alone':>8}  {'threads':>8}")
    for measure in (save_times, noise, files, decoding, ssim):
        with tempfile.TemporaryDirectory() as folder:
            alone, together = measure(Path(folder))
        print(f"{measure.__name__:>10}  {alone:8.1f}  {together:8.1f}")


if __name__ == "__main__":
    main()

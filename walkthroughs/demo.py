"""The whole pipeline: decoder -> DiT^DH -> samples -> evaluation, from scratch, on a laptop.

`make demo` runs it; each stage is one command of the README. Ends with three pictures and a table of numbers.
"""
# %% Set-up
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image, ImageDraw, ImageFont

import eval_fid
import runtime
import sample
import train_decoder

# number: what the README's run gave, and the least that counts as working
EXPECTED = {"reconstruction PSNR, dB": (27.9, ""), "guided: right colour, %": (99.7, 95),
            "guided: right colour and shape, %": (81.1, 60), "minutes in all": (7.9, 10)}

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of pictures and runs")
parser.add_argument("--decoder_steps", type=int, default=1400)
parser.add_argument("--dit_steps", type=int, default=2800)
args = parser.parse_args()
out, clock, minutes = args.out, time.time(), {}


def stage(name, module, *argv):
    """Run one script's main with its own flags, and note the minutes it took."""
    start = time.time()
    print(f"\n{name}: python {module.__name__}.py {' '.join(map(str, argv))}", flush=True)
    result = module.main(module.parse_args([str(a) for a in argv]))
    minutes[name] = (time.time() - start) / 60
    return result


def train(name, script, *argv):
    """Run a training script in one process per core, up to two, as torchrun does."""
    start, cores = time.time(), min(2, os.cpu_count() or 1)
    command = [str(a) for a in (f"--nproc_per_node={cores}", ROOT / script, *argv)]
    print(f"\n{name}: torchrun {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", *command], check=True,
                   env={"OMP_NUM_THREADS": "1", **os.environ})
    minutes[name] = (time.time() - start) / 60


def curve(draw, box, points, title):
    """One loss curve, in the box (left, top, right, bottom): (step, loss) points, ends labelled."""
    left, top, right, bottom = box
    font, steps, values = ImageFont.load_default(size=15), [p[0] for p in points], [p[1] for p in points]
    low, high = min(values), max(values)
    place = [(left + (right - left) * s / steps[-1], bottom - (bottom - top) * (v - low) / (high - low or 1))
             for s, v in points]
    draw.rectangle(box, outline="grey")
    draw.line(place, fill="#2255cc", width=3)
    draw.text((left, top - 24), title, fill="black", font=font)
    for value, y in ((high, top), (low, bottom - 18)):
        draw.text((left - 8, y), f"{value:.3f}", fill="black", font=font, anchor="ra")
    draw.text((right, bottom + 6), f"step {steps[-1]}", fill="black", font=font, anchor="ra")


# %% Stage 1: a decoder over the shipped frozen encoder
train("decoder", "train_decoder.py", "--out", out / "decoder", "--steps", args.decoder_steps,
      "--eval_every", 0, "--preview_every", 0, "--workers", 0, "--overwrite")
reconstruction = stage("reconstruction", eval_fid, "--reconstruct", out / "decoder/last.pt", "--n", 200)

# %% Stage 2: a DiT^DH on its latents
train("DiT^DH", "train_dit.py", "--rae", out / "decoder/last.pt", "--out", out / "dit", "--steps",
      args.dit_steps, "--cache", 30000, "--preview_every", 0, "--workers", 0, "--overwrite")

# %% Samples and evaluation: 10 guided images of each class
stage("samples", sample, "--ckpt", out / "dit/last.pt", "--n", 108, "--out", out / "samples.png")
metrics = stage("evaluation", eval_fid, "--ckpt", out / "dit/last.pt", "--n", 360)

# %% Pictures
rae, data = eval_fid.unpack_rae(runtime.load_checkpoint(out / "decoder/last.pt")["rae"]), \
    eval_fid.open_data("shapes", 64, split="val")
train_decoder.reconstruction_picture(rae, eval_fid.real_images(data, range(12))).resize((1584, 264)).save(
    out / "reconstructions.png")
sheet = Image.new("RGB", (1100, 380), "white")
for x, name, title in ((80, "decoder", "decoder: L1 loss"), (630, "dit", "DiT^DH: squared error of x0")):
    rows = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
    points = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    curve(ImageDraw.Draw(sheet), (x, 40, x + 440, 330), points, title)
sheet.save(out / "losses.png")

# %% Numbers
minutes_in_all = (time.time() - clock) / 60
figures = {"reconstruction PSNR, dB": reconstruction["psnr"],
           "guided: right colour, %": 100 * metrics["right_colour"],
           "guided: right colour and shape, %": 100 * metrics["right_colour_and_shape"],
           "minutes in all": minutes_in_all}
print(f"\n{'':36}{'this run':>10}{'README':>10}{'aim':>10}")
for name, value in figures.items():
    print(f"{name:36}{value:10.1f}{EXPECTED[name][0]:10.1f}{EXPECTED[name][1]:>10}")
print("minutes by stage: " + ", ".join(f"{k} {v:.1f}" for k, v in minutes.items()))
(out / "numbers.json").write_text(json.dumps(dict(figures=figures, minutes=minutes)) + "\n")
print(f"look at {out}/reconstructions.png, {out}/samples.png, {out}/losses.png")

"""The whole pipeline from scratch on a laptop: decoder -> DiT^DH -> samples -> evaluation.

    make demo                       or: python walkthroughs/demo.py --out runs/demo

Each stage is one command of the README. Ends with a table of numbers and three pictures.
"""
# %% Set-up
import math
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image, ImageDraw, ImageFont

import eval_decoder
import eval_fid
import pictures
import progress
import release
import run_flags
import runtime
import sample
import storage
from data import load_images, open_data

ROOT = Path(__file__).resolve().parents[1]

# Number: what the run in the README gave, and what counts as working.
EXPECTED = {
    "reconstruction PSNR, dB": (27.9, ""),
    "guided: right colour, %": (100.0, 95),
    "guided: right colour and shape, %": (83.9, 60),
    "minutes in all": (6.3, 10),
}

TRAINING_FLAGS = ("--preview_every", 0, "--workers", 0, "--overwrite")


def parse_args(argv=None):
    p = run_flags.Parser(__doc__, {})
    p.add_argument("--out", type=Path, default=Path("runs/demo"),
                   help="Folder of pictures and runs.")
    p.add_argument("--decoder_steps", type=run_flags.at_least(1), default=1400,
                   help="Steps of the decoder's training.")
    p.add_argument("--dit_steps", type=run_flags.at_least(1), default=2800,
                   help="Steps of the DiT's training.")
    return p.parse_args(argv)


# %% How the stages are run
minutes = {}                        # stage -> minutes it took


def run_script(stage, module, *words):
    """Run a script's main with the flags `words` in this process. Returns what main returns."""
    start = time.time()
    words = [str(word) for word in words]
    print(f"\n{stage}: python {module.__name__}.py {' '.join(words)}", flush=True)
    result = module.main(module.parse_args(words))
    minutes[stage] = (time.time() - start) / 60
    return result


def run_training(stage, script, *words):
    """Run a training script by torchrun, in one process per core, at most two.

    Raises ValueError if it fails, after its own message.
    """
    start = time.time()
    processes = min(2, os.cpu_count() or 1)
    words = [str(word) for word in (f"--nproc_per_node={processes}", ROOT / script, *words)]
    print(f"\n{stage}: torchrun {' '.join(words)}", flush=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # Each process has a core of its own, so more threads would only wait for each other.
    # It has a session of its own, so that Ctrl-C reaches it by us alone, once.
    process = subprocess.Popen(torchrun + words, env={"OMP_NUM_THREADS": "1", **os.environ},
                               start_new_session=True)
    try:
        exit_code = process.wait()
    except KeyboardInterrupt:
        process.terminate()                            # torchrun passes it on
        process.wait()
        raise
    if exit_code:
        raise ValueError(f"{script} ended with exit code {exit_code}; its own message is above")
    minutes[stage] = (time.time() - start) / 60


def run_stages(options):
    """Train decoder and DiT, sample and evaluate. Returns the results of both evaluations."""
    out = options.out
    # Stage 1: a decoder over the shipped frozen encoder
    run_training("decoder", "train_decoder.py", "--out", out / "decoder",
                 "--steps", options.decoder_steps, "--eval_every", 0, *TRAINING_FLAGS)
    reconstruction = run_script("reconstruction", eval_decoder,
                                "--rae", out / "decoder/last.pt", "--n", 200)
    # Stage 2: a DiT^DH on its latents
    run_training("DiT^DH", "train_dit.py", "--rae", out / "decoder/last.pt", "--out", out / "dit",
                 "--steps", options.dit_steps, "--cache", 30_000, *TRAINING_FLAGS)
    # Samples, three of each class, and the evaluation of ten of each class
    run_script("samples", sample, "--ckpt", out / "dit/last.pt", "--n", 108,
               "--out", out / "samples.png")
    generation = run_script("evaluation", eval_fid, "--ckpt", out / "dit/last.pt", "--n", 360)
    return reconstruction, generation


# %% Pictures
def draw_curve(sheet, left, points, title):
    """Draw a loss curve of (step, loss) points on a PIL image, in a box at x = left, log scale."""
    top, right, bottom = 40, left + 440, 330
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    last_step = points[-1][0]
    losses = [loss for _, loss in points]
    low, high = min(losses), max(losses)
    range_of_logs = max(math.log(high / low), 1e-9)
    line = []
    for step, loss in points:
        x = left + (right - left) * step / last_step
        y = bottom - (bottom - top) * math.log(loss / low) / range_of_logs
        line.append((x, y))
    draw.rectangle((left, top, right, bottom), outline="grey")
    draw.line(line, fill="#2255cc", width=3)
    draw.text((left, top - 24), title, fill="black", font=font)
    draw.text((left - 8, top), f"{high:.3f}", fill="black", font=font, anchor="ra")
    draw.text((left - 8, bottom - 18), f"{low:.3f}", fill="black", font=font, anchor="ra")
    draw.text((right, bottom + 6), f"step {last_step}", fill="black", font=font, anchor="ra")


def logged_losses(run):
    """The (step, loss) points in a run's log.jsonl."""
    points = []
    for line in (run / "log.jsonl").read_text("utf-8").splitlines():
        record = progress.read_record(line)
        if record is not None and isinstance(record.get("loss"), float):        # null: not finite
            points.append((record["step"], record["loss"]))
    return points


def draw_pictures(out):
    """Reconstructions and loss curves of the runs in a folder."""
    rae = release.load_rae(out / "decoder/last.pt")
    images = load_images(open_data("shapes", 64, split="val"), range(12))
    picture = eval_decoder.reconstruction_picture(rae, images)
    picture = picture.resize((1584, 264))              # twice the size
    pictures.save_picture(picture, out / "reconstructions.png")

    sheet = Image.new("RGB", (1100, 380), "white")
    draw_curve(sheet, 80, logged_losses(out / "decoder"), "decoder: L1 loss (log scale)")
    draw_curve(sheet, 630, logged_losses(out / "dit"), "DiT^DH: weighted error of v (log scale)")
    pictures.save_picture(sheet, out / "losses.png")


# %% All of it, and the numbers
def main(options):
    out = options.out
    storage.check_out(out)
    out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    reconstruction, generation = run_stages(options)
    draw_pictures(out)

    figures = {
        "reconstruction PSNR, dB": reconstruction["psnr"],
        "guided: right colour, %": 100 * generation["right_colour"],
        "guided: right colour and shape, %": 100 * generation["right_colour_and_shape"],
        "minutes in all": (time.time() - start) / 60,
    }
    print(f"\n{'':36}{'this run':>10}{'README':>10}{'aim':>10}")
    for name, value in figures.items():
        in_readme, aim = EXPECTED[name]
        print(f"{name:36}{value:10.1f}{in_readme:10.1f}{aim:>10}")
    by_stage = [f"{stage} {value:.1f}" for stage, value in minutes.items()]
    print(f"minutes by stage: {', '.join(by_stage)}")
    numbers = storage.to_json(dict(figures=figures, minutes=minutes)) + "\n"
    storage.write_whole(out / "numbers.json", lambda f: f.write(numbers.encode()))
    print(f"look at {out}/reconstructions.png, {out}/samples.png, {out}/losses.png")


if __name__ == "__main__":
    runtime.run(main, parse_args)

"""What a latent space should be: noise, losses, text, and RAE against VAE and pixels, at toy size.

    python walkthroughs/autoencoders.py noise text spaces finetune
    python walkthroughs/autoencoders.py losses --data photos.tar --encoder vae:192:16

All train by the scripts of the three stages; finished runs are kept, so that a stopped script goes
on. The papers' models are a thousand times larger: what is seen here may differ.
"""
# %% Set-up
import sys
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from study import (
    RepeatedImages,
    Study,
    add_study_flags,
    check_names,
    command_line,
    run_study,
    train_to_the_end,
)

import runtime
import sample
import train_decoder
import train_dit
import train_t2i
from data import open_data
from eval_decoder import evaluate_reconstruction
from eval_fid import evaluate_generation
from metrics import EncoderFeatures
from model import flow_matching_loss
from release import SHIPPED_DIT, SHIPPED_RAE, load_dit, load_encoder, load_rae
from shapes import layout
from t2i import load_t2i

STUDIES = ("noise", "text", "losses", "spaces", "finetune")

IMAGE_SIZE = 64                # side of all images, pixels
HOLD_OUT = 1000                # photographs that are measured, and not trained on


def parse_args(argv=None):
    p = runtime.Parser(__doc__, {})
    p.add_argument("names", nargs="*", metavar="STUDY",
                   help=f"Studies to make: {' '.join(STUDIES)} (default: all).")
    p.add_argument("--data", nargs="+", default=["shapes"], help="Images of the study losses.")
    p.add_argument("--encoder", default="tiny", help="Encoder of the study losses.")
    p.add_argument("--steps", type=runtime.at_least(20), default=600,
                   help="Steps of each decoder's training.")
    p.add_argument("--dit_steps", type=runtime.at_least(20), default=800,
                   help="Steps of each DiT's training.")
    p.add_argument("--pairs", type=runtime.at_least(64), default=128,
                   help="Images with prompts to finetune on.")
    p.add_argument("--n", type=runtime.at_least(36), default=360,
                   help="Images of each kind that are judged.")
    add_study_flags(p, "runs/autoencoders")
    options = p.parse_args(argv)
    check_names(p, options.names, STUDIES)
    return options


# %% Trainings, by the scripts of the stages
def train(script, folder, seed, flags, **main_arguments):
    """The checkpoint that a script leaves in a folder, trained now if it is not there yet.

    flags: a dict. main_arguments: data and conversation, for the script's main.
    """
    done = folder / "done"
    if not done.exists():
        run_flags = dict(seed=seed, out=folder, preview_every=0, save_every=10 ** 6, overwrite=True)
        args = script.parse_args(command_line(flags | run_flags))
        train_to_the_end(script, args, **main_arguments)
        done.touch()
    return folder / "last.pt"


def train_one_decoder(options, folder, seed, flags):
    defaults = dict(steps=options.steps, eval_every=0, hold_out=HOLD_OUT, stats_n=2000)
    return train(train_decoder, folder, seed, defaults | flags)


# %% What is measured
@cache
def tiny_features():
    """The features of every Frechet distance."""
    return EncoderFeatures(load_encoder("tiny"))


def measure_reconstruction(path, specs):
    """PSNR, SSIM and distance of reconstructions; for the built-in world what is readable, %."""
    is_built_in = specs[0] in ("shapes", "text")
    n = 200 if is_built_in else HOLD_OUT
    val = open_data(specs, IMAGE_SIZE, split="val", hold_out=HOLD_OUT)
    results = evaluate_reconstruction(load_rae(path), val, n, features=tiny_features())
    measured = {"PSNR": results["psnr"], "SSIM": results["ssim"],
                "distance": results["frechet_distance"]}
    if is_built_in:
        measured["readable"] = 100 * results["readable"]
    return measured


def measure_generation(model, rae, guidance, n):
    """Samples in the right colour, and colour and shape, %; their distance to held-out scenes.

    n: samples.
    """
    val = open_data("shapes", IMAGE_SIZE, split="val", objects=1)
    args = sample.parse_args(["--guidance", str(guidance)])
    results = evaluate_generation(model, rae, val, args, n, features=tiny_features())
    return {"colour": 100 * results["right_colour"],
            "right": 100 * results["right_colour_and_shape"],
            "distance": results["frechet_distance"]}


# %% noise: the shipped decoder, trained on with more or less of it; what the shipped DiT draws
TRAIN_ON = dict(init=SHIPPED_RAE, decoder_depth=4, lr=3e-3)


def run_noise(options, folder, seed, arm):
    tau = arm.removeprefix("tau ")
    path = train_one_decoder(options, folder, seed, {"tau": tau, **TRAIN_ON})
    model, rae, _ = load_dit(SHIPPED_DIT, with_encoder=True)
    rae.decoder = load_rae(path, with_encoder=False).decoder
    reconstruction = measure_reconstruction(path, ["shapes"])
    generation = measure_generation(model, rae, guidance=1, n=options.n)
    return {"PSNR": reconstruction["PSNR"], "readable": reconstruction["readable"],
            "drawn_right": generation["right"], "drawn_distance": generation["distance"]}


NOISE = Study("noise costs reconstruction a little and helps generation",
              ["tau 0", "tau 0.2", "tau 0.8"],
              ["PSNR", "readable", "drawn_right", "drawn_distance"], run_noise)


# %% text: the shipped decoder, trained on with text among the data or without
TEXT_DATA = {"shapes": ["shapes"], "shapes and text": ["a=shapes:0.5", "b=text:0.5"]}


def run_text(options, folder, seed, arm):
    path = train_one_decoder(options, folder, seed, {"data": TEXT_DATA[arm], **TRAIN_ON})
    results = {}
    for domain in ("shapes", "text"):
        measured = measure_reconstruction(path, [domain])
        results[f"{domain}_PSNR"] = measured["PSNR"]
        results[f"{domain}_readable"] = measured["readable"]
    return results


TEXT = Study("text must be among the data to be reconstructed, and costs nothing else "
             "(Scale-RAE, table 1)",
             list(TEXT_DATA),
             ["shapes_PSNR", "shapes_readable", "text_PSNR", "text_readable"], run_text)

# %% losses: of any images
GAN = dict(feature=0.3, gan=0.3, disc_warmup=20)
LOSS_FLAGS = {
    "L1": {},
    "L1, feature": dict(feature=0.3),
    "L1, feature, GAN": GAN,
    "all, tau 0": dict(GAN, tau=0),
    "all, tau 0.8": dict(GAN, tau=0.8),
}


def run_losses(options, folder, seed, arm):
    images = dict(data=options.data, encoder=options.encoder, size=IMAGE_SIZE)
    path = train_one_decoder(options, folder, seed, images | LOSS_FLAGS[arm])
    return measure_reconstruction(path, options.data)


LOSSES = Study("perceptual and adversarial terms lower the Fréchet distance",
               list(LOSS_FLAGS), ["PSNR", "SSIM", "distance"], run_losses)

# %% spaces: the same DiT with and without the wide head; 16 tokens of 192, 16 and 768 channels
SPACES = {
    "RAE": dict(encoder="tiny"),
    "VAE": dict(encoder="vae:16:16", tau=0),           # it has noise of its own
    "pixels": dict(encoder="pixel:16", tau=0),
}
# The other spaces get what is the default for the tiny encoder.
SAME_FOR_ALL = dict(shift_base=340, prediction="x0", ema=0.99)
HEADS = {"": 0, ", wide head": 256}                    # ending of the arm's name -> width


def train_autoencoder(options, space):
    """The checkpoint of a space's autoencoder, the same for all runs."""
    folder = options.out / "decoders" / f"{space}_{options.steps}"
    return train_one_decoder(options, folder, 0, SPACES[space])


def run_spaces(options, folder, seed, arm):
    space = arm.removesuffix(", wide head")
    head_width = HEADS[arm.removeprefix(space)]
    flags = dict(rae=train_autoencoder(options, space), cache=20_000, steps=options.dit_steps,
                 width=128, head_width=head_width, **SAME_FOR_ALL)
    model, rae, _ = load_dit(train(train_dit, folder, seed, flags), with_encoder=True)
    return measure_generation(model, rae, guidance=1.5, n=options.n)


SPACES_STUDY = Study("RAE trains faster than VAE and pixels, and only there the wide head helps",
                     [space + head for space in SPACES for head in HEADS],
                     ["colour", "right", "distance"], run_spaces)

# %% finetune: text to image, then many epochs of few pairs; which space overfits first?
EPOCHS = (4, 16, 64, 256)
PAIR_BATCH = 64                # default of --batch
MEASURED_PAIRS = 128
TOY = dict(width=96, depth=3, head_width=0, draws=1, questions=0.0, log_every=50, workers=0,
           **SAME_FOR_ALL)


def describe(scene, rng):
    """A prompt that says where everything is, as the plans of train_t2i.py do."""
    return [("user", layout(scene.objects)), ("assistant", "<image>")]


def open_scenes(seed=0, split="train"):
    return open_data("shapes", IMAGE_SIZE, seed, split=split, objects=(1, 2),
                     conversation=describe)


@torch.no_grad()
def relative_error(t2i, rae, data):
    """Squared error of the predicted x0 over the variance of x0, mean of 128 pairs and 8 times."""
    items = [data[k] for k in range(MEASURED_PAIRS)]
    images = torch.stack([item["image"] for item in items]).float() / 255           # b 3 H W
    prompts = [item["text"][0][1] for item in items]
    x0 = rae.encode(images)                                             # b c h w
    y = t2i.conditions(prompts)                                         # b n d
    eps = sample.noise(x0.shape[1:], 0, range(MEASURED_PAIRS))          # b c h w
    errors = []
    for k in range(1, 9):
        t = torch.full((MEASURED_PAIRS,), k / 9)
        loss = flow_matching_loss(t2i.dit, x0, y, t, eps)               # b, squared error of v
        errors.append((loss * t.square()).mean())                       # of x0
    return float(sum(errors) / 8 / x0.square().mean())


def run_finetune(options, folder, seed, arm):
    pretraining = dict(TOY, rae=train_autoencoder(options, arm), llm_width=96, llm_depth=2, plan=0,
                       llm_start=100, steps=options.dit_steps // 2)
    before = train(train_t2i, folder / "before", seed, pretraining,
                   data=open_scenes(seed), conversation=describe)
    pairs = RepeatedImages(open_scenes(seed), options.pairs)
    results = {}
    for epochs in (0, *EPOCHS):
        path = before
        if epochs > 0:
            steps = max(2, epochs * options.pairs // PAIR_BATCH)
            finetuning = dict(TOY, init=before, lr=1e-3, llm_lr=3e-4, steps=steps,
                              warmup=epochs // 8)
            path = train(train_t2i, folder / f"epochs_{epochs}", seed, finetuning,
                         data=pairs, conversation=describe)
        t2i, rae, _ = load_t2i(path, with_encoder=True)
        held_out = open_scenes(split="val")
        results[f"held-out {epochs}"] = 100 * relative_error(t2i, rae, held_out)
        results[f"of pairs {epochs}"] = 100 * relative_error(t2i, rae, pairs)
    return results


FINETUNE = Study("with many epochs of few pairs, VAE overfits, RAE hardly does "
                 "(Scale-RAE, figure 6)",
                 ["RAE", "VAE"],
                 [f"{what} {epochs}" for what in ("held-out", "of pairs")
                  for epochs in (0, *EPOCHS)], run_finetune)

# %% All runs of each study, its table and its picture
def main(options):
    runtime.check_out(options.out)
    runtime.setup()
    studies = dict(noise=NOISE, text=TEXT, losses=LOSSES, spaces=SPACES_STUDY, finetune=FINETUNE)
    for name in STUDIES:
        if not options.names or name in options.names:
            study = studies[name]
            study = study._replace(claim=f"the papers: {study.claim}",
                                   run=partial(study.run, options))
            run_study(name, study, options)


if __name__ == "__main__":
    runtime.run(main, parse_args)

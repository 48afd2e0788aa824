"""What a latent space should be: noise, losses, text, and RAE against VAE and pixels, at toy size.

    python walkthroughs/autoencoders.py noise text spaces finetune
    python walkthroughs/autoencoders.py losses --data photos.tar --encoder vae:192:16
All train by the scripts of the three stages; finished runs are kept, so that a stopped script goes on.
The papers' models are a thousand times larger: what is seen here may differ.
"""
# %% Set-up
import argparse
from pathlib import Path

from study import Few, study                               # it also makes the project's files known

import torch

import eval_fid
import runtime
import sample
import train_decoder
import train_dit
import train_t2i
from data import open_data
from model import Encoder, flow_matching_loss, unpack_rae

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("studies", nargs="*", help="noise text losses spaces finetune; default: all")
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--data", nargs="+", default=["shapes"], help="of losses")
parser.add_argument("--encoder", default="tiny", help="of losses")
parser.add_argument("--steps", type=runtime.at_least(20), default=600, help="of each decoder")
parser.add_argument("--dit_steps", type=runtime.at_least(20), default=800, help="of each DiT")
parser.add_argument("--pairs", type=runtime.at_least(64), default=128, help="to finetune on")
parser.add_argument("--n", type=runtime.at_least(36), default=360, help="images of each kind that are judged")
parser.add_argument("--out", type=Path, default=Path("runs/autoencoders"), help="folder of runs and pictures")
options = parser.parse_args()
judge = Encoder("tiny")                                     # every Fréchet distance is in its features


# %% Trainings, by the scripts of the stages
def train(script, folder, seed, **flags):
    """The checkpoint that a script leaves in a folder, trained now if it is not there yet."""
    flags = dict(preview_every=0, save_every=10 ** 6, **flags)
    argv = [str(x) for k, v in flags.items() for x in (f"--{k}", *(v if isinstance(v, list) else [v]))]
    done = folder / "done"
    if not done.exists():
        script.main(script.parse_args([*argv, "--seed", str(seed), "--out", str(folder), "--overwrite"]))
        done.touch()
    return folder / "last.pt"


def decoder(folder, seed, **flags):
    return train(train_decoder, folder, seed, **{"steps": options.steps, "eval_every": 0, "hold_out": 1000,
                                                 "stats_n": 2000, **flags})


def reconstructed(path, specs):
    """PSNR, SSIM, distance and what is still readable of held-out images: 200, of photographs 1000."""
    rae, built_in = unpack_rae(runtime.load_checkpoint(path)["rae"]), specs[0] in ("shapes", "text")
    val = open_data(specs, 64, split="val", hold_out=1000)
    found = eval_fid.evaluate_reconstruction(rae, val, 200 if built_in else 1000, judge=judge)
    return {"PSNR": found["psnr"], "SSIM": found["ssim"], "distance": found["frechet_distance"],
            **({"readable": 100 * found["readable"]} if built_in else {})}


def drawn(model, rae, guidance):
    """Per cent of samples in the right colour; colour and shape; their distance to held-out scenes."""
    val, args = open_data("shapes", 64, split="val", objects=1), sample.parse_args([])
    args.guidance = guidance
    found = eval_fid.evaluate_generation(model, rae, val, args, options.n, judge=judge)
    return dict(colour=100 * found["right_colour"], right=100 * found["right_colour_and_shape"],
                distance=found["frechet_distance"])


# %% noise: what the shipped DiT draws, through the shipped decoder, taught on with more or less of it
SHIPPED = dict(init=train_dit.SHIPPED_RAE, decoder_depth=4, lr=3e-3)


def noise(folder, seed, arm):
    path = decoder(folder, seed, tau=arm.split()[-1], **SHIPPED)
    model, rae, _ = sample.load_dit(train_dit.SHIPPED_RAE.with_name("tiny_dit.safetensors"), encoder=True)
    rae.decoder = unpack_rae(runtime.load_checkpoint(path)["rae"], encoder=False).decoder
    kept, made = reconstructed(path, ["shapes"]), drawn(model, rae, guidance=1)
    return dict(PSNR=kept["PSNR"], readable=kept["readable"], drawn_right=made["right"],
                drawn_distance=made["distance"])


# %% text: the shipped decoder, taught on with it or without
def text(folder, seed, arm):
    data = ["shapes"] if arm == "shapes" else ["a=shapes:0.5", "b=text:0.5"]
    path = decoder(folder, seed, data=data, **SHIPPED)
    return {f"{domain}_{k}": v for domain in ("shapes", "text")
            for k, v in reconstructed(path, [domain]).items() if k in ("PSNR", "readable")}


# %% losses: of any images
GAN = dict(feature=0.3, gan=0.3, disc_warmup=20)
LOSSES = {"L1": {}, "L1, feature": dict(feature=0.3), "L1, feature, GAN": GAN,
          **{f"all, tau {tau}": dict(GAN, tau=tau) for tau in (0, 0.8)}}


def losses(folder, seed, arm):
    return reconstructed(decoder(folder, seed, data=options.data, encoder=options.encoder, size=64,
                                 **LOSSES[arm]), options.data)


# %% spaces: the same DiT, without and with the wide head; 16 tokens of 192, 16 and 768 channels
SPACES = {"RAE": dict(encoder="tiny"), "VAE": dict(encoder="vae:16:16", tau=0),        # it has its own noise
          "pixels": dict(encoder="pixel:16", tau=0)}
EQUAL = dict(shift_base=340, prediction="x0", balance="on", ema=0.99)                   # as for the RAE


def rae_of(space):
    return decoder(options.out / "decoders" / f"{space}_{options.steps}", 0, **SPACES[space])


def spaces(folder, seed, arm):
    space, _, head = arm.partition(", ")
    path = train(train_dit, folder, seed, rae=rae_of(space), cache=20_000, steps=options.dit_steps, width=128,
                 head_width=256 * bool(head), **EQUAL)
    model, rae, _ = sample.load_dit(path, encoder=True)
    return drawn(model, rae, guidance=1.5)


# %% finetune: text to image, then many epochs of few pairs; which space overfits first?
EPOCHS = 4, 16, 64, 256
TOY = dict(width=96, depth=3, head_width=0, draws=1, questions=0.0, log_every=50, workers=0, **EQUAL)


def describe(scene, rng, **_):                              # where everything is, as train_t2i's plans
    return [("user", train_t2i.layout(scene.objects)), ("assistant", "<image>")]


@torch.no_grad()
def flow_loss(t2i, rae, data):
    """Mean over 128 pairs and 8 times of the squared error of x0, as a share of the variance of x0."""
    items = [data[k] for k in range(128)]
    x0 = rae.encode(torch.stack([item["image"] for item in items]).float() / 255)              # b c h w
    y, eps = t2i.conditions([item["text"][0][1] for item in items]), sample.noise(x0.shape[1:], 0, range(128))
    times = [torch.full((128,), (k + 1) / 9) for k in range(8)]
    return float(sum((flow_matching_loss(t2i.dit, x0, y, t, eps) * t ** 2).mean() for t in times)
                 / 8 / x0.square().mean())


def finetune(folder, seed, arm):
    def pairs(kind):
        return lambda *a, **k: kind(*a, **{**k, "objects": (1, 2)})
    train_t2i.converse, found = describe, {}
    train_t2i.open_data = pairs(open_data)
    before = train(train_t2i, folder / "before", seed, rae=rae_of(arm), llm_width=96, llm_depth=2, plan=0,
                   llm_start=100, steps=options.dit_steps // 2, **TOY)
    train_t2i.open_data, Few.count = pairs(Few), options.pairs
    for epochs in (0, *EPOCHS):
        path = before if not epochs else train(
            train_t2i, folder / f"epochs_{epochs}", seed, init=before, lr=1e-3, llm_lr=3e-4,
            steps=max(2, epochs * options.pairs // 64), warmup=epochs // 8, **TOY)
        t2i, rae, _ = train_t2i.load_t2i(path, encoder=True)
        how = dict(objects=(1, 2), chat=describe)
        found[f"held-out {epochs}"] = flow_loss(t2i, rae, open_data("shapes", 64, split="val", **how))
        found[f"of pairs {epochs}"] = flow_loss(t2i, rae, Few("shapes", 64, seed, **how))
    return {k: 100 * v for k, v in found.items()}


# %% All runs of each study, its table and its picture
STUDIES = {
    noise: ("noise costs reconstruction a little and helps generation", ["tau 0", "tau 0.2", "tau 0.8"],
            ["PSNR", "readable", "drawn_right", "drawn_distance"]),
    text: ("text must be among the data to be reconstructed, and costs nothing else (Scale-RAE, table 1)",
           ["shapes", "shapes and text"], ["shapes_PSNR", "shapes_readable", "text_PSNR", "text_readable"]),
    losses: ("perceptual and adversarial terms lower the Fréchet distance", [*LOSSES],
             ["PSNR", "SSIM", "distance"]),
    spaces: ("RAE trains faster than VAE and pixels, and only there the wide head helps",
             [f"{space}{head}" for space in SPACES for head in ("", ", wide head")],
            ["colour", "right", "distance"]),
    finetune: ("with many epochs of few pairs, VAE overfits, RAE hardly does (Scale-RAE, figure 6)",
               ["RAE", "VAE"],
               [f"{what} {n}" for what in ("held-out", "of pairs") for n in (0, *EPOCHS)])}
if wrong := {*options.studies} - {run.__name__ for run in STUDIES}:
    parser.error(f"{' '.join(wrong)}: studies are {' '.join(run.__name__ for run in STUDIES)}")
runtime.setup()
for run, (claim, arms, shown) in STUDIES.items():
    if (name := run.__name__) in (options.studies or name):
        study(name, f"the papers: {claim}", arms, shown, options, run)

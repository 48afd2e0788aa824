"""Five findings of Scale-RAE (arXiv 2601.16208), looked for at toy size, three seeds and one picture each.

    python walkthroughs/findings.py shift head captions understanding finetune
Every model trains by train_t2i.py on scenes of one or two objects, without a plan; finished runs are kept, so
that a stopped script goes on. The papers' models are a thousand times larger: what is seen here may differ.
"""
# %% Set-up
import argparse
from pathlib import Path

from study import Few, study                               # it also makes the project's files known

import numpy as np
import torch

import eval_fid
import runtime
import sample
import train_t2i
from data import SHAPES_VAL, open_data
from shapes import CLASSES, Scene

TOY = dict(width=96, depth=3, head_width=0, llm_width=96, llm_depth=2, plan=0, llm_start=100, draws=1,
           steps=400, questions=0.0, preview_every=0, log_every=100, workers=0, ema=0.99)


def said(kind):
    """A chat for open_data: prompts all short, all dense (size and place of each object), or half of each."""
    def chat(scene, rng):
        rng = rng.spawn(1)[0]                              # as data.py gives it, it is what drew the scene
        dense = kind == "dense" or kind == "both" and rng.random() < 0.5
        return [("user", train_t2i.layout(scene.objects) if dense else scene.caption()),
                ("assistant", "<image>")]
    return chat


DENSE = "dense_colour", "dense_colour_and_shape", "dense_distance"    # these prompts are learned soonest
# What the paper saw; the arms, as flags (chat replaces converse, init is another arm); what is shown.
FINDINGS = {
    "shift": ("GenEval 49.6 with the shift of t by the latents' dimension, 23.6 without", {
        "shifted": dict(chat=said("dense")),
        "not shifted": dict(chat=said("dense"), shift_base=3072)}, DENSE),
    "head": ("a wide head adds 11.2 GenEval to the 0.5B DiT, little from 2.4B on", {
        f"width {width}" + ", head" * bool(head): dict(chat=said("dense"), width=width, head_width=head)
        for width in (64, 192) for head in (0, 224)}, DENSE),
    "captions": ("GenEval 49.5 with synthetic and web data, 45.1 and 25.9 with either alone", {
        kind: dict(chat=said(kind)) for kind in ("short", "dense", "both")},
        ("colour", "dense_colour", "distance")),
    "understanding": ("MME-P 1468.7 with drawing, 1374.8 without; other scores differ little, both ways", {
        "both": dict(questions=0.5),
        "understanding alone": dict(questions=0.5, flow_weight=0.0, regression=0.0),
        "drawing alone": dict(batch=32)}, ("answers", "colour", "distance")),
    "finetune": ("the LLM and the DiT are finetuned; the DiT alone was tried, too", {
        "before": dict(chat=said("dense")),
        "LLM frozen": dict(chat=said("dense"), init="before", freeze_llm=True),
        "LLM and DiT": dict(chat=said("dense"), init="before")}, DENSE)}

UNTRAINED = ("understanding alone", False), ("drawing alone", True)        # (arm, is it answers): no number

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("findings", nargs="*", default=[*FINDINGS], help=" ".join(FINDINGS))
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--steps", type=runtime.at_least(200), default=TOY["steps"], help="of each training")
parser.add_argument("--n", type=runtime.at_least(36), default=144, help="images of each kind that are judged")
parser.add_argument("--out", type=Path, default=Path("runs/findings"), help="folder of runs and pictures")
options = parser.parse_args()
if wrong := {*options.findings} - {*FINDINGS}:
    parser.error(f"{' '.join(wrong)}: findings are {' '.join(FINDINGS)}")


# %% One run: training, then what its model draws and answers
def train(folder, seed, chat=None, init=None, **flags):
    flags = {**TOY, "steps": options.steps, **flags}
    train_t2i.converse = (lambda scene, rng, **_: chat(scene, rng)) if chat else converse
    if init:                                               # 500 scenes, at a tenth of the rate
        kept = {k: v for k, v in flags.items() if not k.startswith(("llm_", "plan", "steps"))}
        flags = dict(kept, init=folder.parent / init / "last.pt", lr=3e-4, llm_lr=1e-4,
                     steps=options.steps // 2, warmup=20)
    train_t2i.open_data = lambda *a, **k: (Few if init else open_data)(*a, **{**k, "objects": (1, 2)})
    argv = [x for k, v in flags.items() for x in (f"--{k}", str(v))[:1 if v is True else 2]]
    train_t2i.main(train_t2i.parse_args([*argv, "--seed", str(seed), "--out", str(folder), "--overwrite"]))


def judge(folder, shown):
    """Of what is shown, per cent: colours, then classes, right in images of one object; of dense prompts; of
    answers; and the Fréchet distance of those images to real ones, in the tiny encoder's features."""
    args = sample.parse_args(["--prompt", "-", "--ckpt", f"{folder}/last.pt"])
    t2i, rae, _, _ = sample.load_models(args, "cpu", encoder=True)
    args.guidance = 2.0

    def images(prompts):
        return torch.cat([sample.generate(t2i, rae, [prompts[i] for i in part], args, part)
                          for part in sample.share(len(prompts), 0, 1, 72)])

    def moments(images):
        found = eval_fid.Moments()
        found.add(eval_fid.features(rae.encoder, images)[0])
        return found.mean, found.cov

    labels = [i % len(CLASSES) for i in range(options.n)]
    scenes = [Scene.random(1, SHAPES_VAL + i, 1, label) for i, label in enumerate(labels)]
    found = {}
    for kind, prompts in (("", [f"a {CLASSES[i]}" for i in labels]),
                          ("dense_", [train_t2i.layout(scene.objects) for scene in scenes])):
        if not {f"{kind}colour", f"{kind}distance"} & {*shown}:
            continue
        drawn = images(prompts)
        counts = 100 * eval_fid.verify(drawn, labels) / options.n
        found |= {f"{kind}colour": float(counts[0]), f"{kind}colour_and_shape": float(counts[1])}
        real = torch.from_numpy(np.stack([scene.render() for scene in scenes]))
        found[f"{kind}distance"] = eval_fid.frechet_distance(*moments(real), *moments(drawn))
    if "answers" not in shown:
        return found
    scenes = [Scene.random(0, SHAPES_VAL + k, (1, 2)) for k in range(200)]
    x = torch.from_numpy(np.stack([scene.render() for scene in scenes])).movedim(3, 1).float() / 255
    right, asked = eval_fid.answered(t2i, rae.encode(x), scenes).tolist()
    return {**found, "answers": 100 * right / asked}


# %% All runs of each finding, its table and its picture
def run(folder, seed, arm):
    train(folder, seed, **FINDINGS[name][1][arm])
    found = judge(folder, FINDINGS[name][2])
    return {k: v for k, v in found.items() if (arm, k == "answers") not in UNTRAINED}


runtime.setup()
converse = train_t2i.converse
for name in options.findings:
    claim, arms, shown = FINDINGS[name]
    study(name, f"the paper: {claim}", arms, shown, options, run)

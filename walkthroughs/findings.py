"""Five findings of Scale-RAE (arXiv 2601.16208) at toy size, three seeds and one picture each.

    python walkthroughs/findings.py shift head captions understanding finetune

Every model is trained by train_t2i.py on scenes of one or two objects, without a plan. Finished
runs are kept, so that a stopped script goes on. The papers' models are a thousand times larger:
what is seen here may differ.
"""
# %% Set-up
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
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

import metrics
import runtime
import sample
import train_t2i
from data import SHAPES_VAL, open_data
from eval_t2i import count_right_answers
from shapes import CLASSES, Scene, converse, layout

TOY = dict(width=96, depth=3, head_width=0, llm_width=96, llm_depth=2, plan=0, llm_start=100,
           draws=1, steps=400, questions=0.0, preview_every=0, log_every=100, workers=0, ema=0.99)
IMAGE_SIZE = 64                # side of the shipped autoencoder's images, pixels
FINETUNING_SCENES = 500


# %% Conversations about a scene: prompts short, dense (size and place of each object), or either
def short_prompt(scene, rng):
    return [("user", scene.caption()), ("assistant", "<image>")]


def dense_prompt(scene, rng):
    return [("user", layout(scene.objects)), ("assistant", "<image>")]


def either_prompt(scene, rng):
    # The generator that data.py hands over has drawn the scene; take one that is independent.
    if rng.spawn(1)[0].random() < 0.5:
        return dense_prompt(scene, rng)
    return short_prompt(scene, rng)


# %% The findings: what the paper saw, and how the arms differ
class Arm(NamedTuple):
    """Flags of train_t2i.py beside TOY; a conversation in place of shapes.converse; the arm whose
    weights to start from.
    """
    flags: dict
    conversation: Callable | None = None
    init: str | None = None


class Finding(NamedTuple):
    claim: str
    arms: dict                 # name -> Arm
    columns: list              # numbers of judge() to show


# Dense prompts are what these models learn soonest.
DENSE = ["dense_colour", "dense_colour_and_shape", "dense_distance"]

FINDINGS = {
    "shift": Finding(
        "GenEval 49.6 with the shift of t by the latents' dimension, 23.6 without",
        {
            "shifted": Arm({}, dense_prompt),
            "not shifted": Arm({"shift_base": 3072}, dense_prompt),    # 16 tokens x 192: no shift
        },
        DENSE),
    "head": Finding(
        "a wide head adds 11.2 GenEval to the 0.5B DiT, little from 2.4B on",
        {
            "width 64": Arm({"width": 64, "head_width": 0}, dense_prompt),
            "width 64, head": Arm({"width": 64, "head_width": 224}, dense_prompt),
            "width 192": Arm({"width": 192, "head_width": 0}, dense_prompt),
            "width 192, head": Arm({"width": 192, "head_width": 224}, dense_prompt),
        },
        DENSE),
    "captions": Finding(
        "GenEval 49.5 with synthetic and web data, 45.1 and 25.9 with either alone",
        {
            "short": Arm({}, short_prompt),
            "dense": Arm({}, dense_prompt),
            "both": Arm({}, either_prompt),
        },
        ["colour", "dense_colour", "distance"]),
    "understanding": Finding(
        "MME-P 1468.7 with drawing, 1374.8 without; other scores differ little, both ways",
        {
            "both": Arm({"questions": 0.5}),
            "understanding alone": Arm({"questions": 0.5, "flow_weight": 0.0, "regression": 0.0}),
            "drawing alone": Arm({"batch": 32}),       # as many images to draw as in a batch of 64
        },
        ["answers", "colour", "distance"]),
    "finetune": Finding(
        "the LLM and the DiT are finetuned; the DiT alone was tried, too",
        {
            "before": Arm({}, dense_prompt),
            "LLM frozen": Arm({"freeze_llm": True}, dense_prompt, init="before"),
            "LLM and DiT": Arm({}, dense_prompt, init="before"),
        },
        DENSE),
}


def parse_args(argv=None):
    p = runtime.Parser(__doc__, {})
    p.add_argument("names", nargs="*", default=list(FINDINGS), metavar="FINDING",
                   help=f"Findings to look for: {' '.join(FINDINGS)} (default: all).")
    p.add_argument("--steps", type=runtime.at_least(200), default=TOY["steps"],
                   help="Steps of each training.")
    p.add_argument("--n", type=runtime.at_least(36), default=144,
                   help="Images of each kind that are judged.")
    add_study_flags(p, "runs/findings")
    options = p.parse_args(argv)
    check_names(p, options.names, FINDINGS)
    return options


# %% One training
def train(folder, seed, arm, steps):
    """Train an arm by train_t2i.py; folder/last.pt is its checkpoint."""
    flags = {**TOY, "steps": steps, **arm.flags}
    if arm.init:
        flags = finetuning_flags(flags, folder.parent / arm.init / "last.pt", steps // 2)
    words = command_line({**flags, "seed": seed, "out": folder, "overwrite": True})
    args = train_t2i.parse_args(words)

    conversation = arm.conversation
    if conversation is None:
        conversation = partial(converse, questions=args.questions, plan=False)
    data = open_data("shapes", IMAGE_SIZE, seed, objects=(1, 2), chat=conversation)
    if arm.init:
        data = RepeatedImages(data, FINETUNING_SCENES)
    train_to_the_end(train_t2i, args, data=data, conversation=conversation)


def finetuning_flags(flags, init, steps):
    """Flags to train on from the checkpoint `init`, at a tenth of the rate."""
    kept = {}
    for name, value in flags.items():
        # The checkpoint brings its language model and its plan.
        if not name.startswith(("llm_", "plan", "steps")):
            kept[name] = value
    return dict(kept, init=init, lr=3e-4, llm_lr=1e-4, steps=steps, warmup=20)


# %% What its model draws and answers
def judge(folder, columns, n):
    """Numbers of a trained model: those of `columns` and a few more, as a dict. n: images.

    colour, colour_and_shape: images of one object that came out right, %. distance: Frechet
    distance of these images to real ones, in the tiny encoder's features. dense_*: the same of
    dense prompts. answers: right answers to questions about held-out scenes, %.
    """
    args = sample.parse_args(["--prompt", "-", "--ckpt", f"{folder}/last.pt", "--guidance", "2"])
    t2i, rae, _ = sample.load_t2i_models(args, "cpu", with_encoder=True)
    labels = [i % len(CLASSES) for i in range(n)]
    scenes = [Scene.random(1, SHAPES_VAL + i, 1, label) for i, label in enumerate(labels)]
    results = {}
    if "colour" in columns or "distance" in columns:
        prompts = [f"a {CLASSES[label]}" for label in labels]
        results |= judge_images(t2i, rae, prompts, scenes, labels, args)
    if "dense_colour" in columns or "dense_distance" in columns:
        prompts = [layout(scene.objects) for scene in scenes]
        for name, value in judge_images(t2i, rae, prompts, scenes, labels, args).items():
            results[f"dense_{name}"] = value
    if "answers" in columns:
        results["answers"] = judge_answers(t2i, rae)
    return results


def judge_images(t2i, rae, prompts, scenes, labels, args):
    """Colours and classes that are right in images of the prompts; distance to the scenes."""
    parts = []
    for numbers in runtime.split_numbers(len(prompts), batch=72):
        part = [prompts[i] for i in numbers]
        parts.append(sample.generate_prompts(t2i, rae, part, args, numbers))
    drawn = torch.cat(parts)                                            # n H W 3
    real = torch.from_numpy(np.stack([scene.render() for scene in scenes]))
    right_colour, right_class, _ = (100 * metrics.verify(drawn, labels) / len(labels)).tolist()

    network = metrics.EncoderFeatures(rae.encoder)
    distance = metrics.frechet_distance(*mean_and_cov(network, real), *mean_and_cov(network, drawn))
    return dict(colour=right_colour, colour_and_shape=right_class, distance=distance)


def mean_and_cov(network, images):
    """Mean and covariance of the features of uint8 images n H W 3."""
    features, _ = network(images)
    moments = metrics.Moments()
    moments.add(features)
    return moments.mean, moments.cov


def judge_answers(t2i, rae):
    """Right answers to all questions about 200 held-out scenes, %."""
    scenes = [Scene.random(0, SHAPES_VAL + k, (1, 2)) for k in range(200)]
    images = torch.from_numpy(np.stack([scene.render() for scene in scenes]))
    latents = rae.encode(images.movedim(3, 1).float() / 255)            # 200 c h w
    right, asked = count_right_answers(t2i, latents, scenes).tolist()
    return 100 * right / asked


# %% All runs of each finding, its table and its picture
def run_arm(finding, options, folder, seed, name):
    """Train one arm of a finding and judge what it was trained for."""
    train(folder, seed, finding.arms[name], options.steps)
    results = judge(folder, finding.columns, options.n)
    if name == "understanding alone":                       # it was never taught to draw
        return {"answers": results["answers"]}
    if name == "drawing alone":                             # it was never asked a question
        del results["answers"]
    return results


def main(options):
    runtime.check_out(options.out)
    runtime.setup()
    for name in options.names:
        finding = FINDINGS[name]
        study = Study(f"the paper: {finding.claim}", list(finding.arms), finding.columns,
                      partial(run_arm, finding, options))
        run_study(name, study, options)


if __name__ == "__main__":
    runtime.run(main, parse_args)

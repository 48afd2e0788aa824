"""Teach a text-to-image model to tell which of its own images came out right, for --best_of.

    python assets/teach_verifier.py --n 10000 --steps 1000 --out runs/verifier

It draws n latents for prompts of the kind it was trained on, read_scene says which are right, and
the language model learns to answer "Does this image align with the prompt: ...?" from the latents
alone, beside what it is taught otherwise. Ends with a curve, and how well it tells right from wrong
latents that it was not taught.
"""
# %% Set-up
import copy
import hashlib
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import numpy as np
import torch

import progress
import run_flags
import runtime
import sample
import storage
from data import batches, open_data
from model import time_shift
from release import SHIPPED_T2I
from shapes import ALIGN_QUESTION, REQUESTS, Scene, converse, fulfils, listing, read_scene
from t2i import UNDERSTAND, answer_score, split_tasks, tokenize

NUMBERS_OF_OBJECTS = (1, 1, 2, 2, 3, 4)       # of a scene, as train_t2i.py draws them
SCENE_SEED = 91                               # of the prompts, apart from every training's
BATCH = 32                                    # latents of each kind, and conversations, of a step


def parse_args(argv=None):
    p = run_flags.Parser(__doc__, {})
    p.add_argument("--ckpt", default=str(SHIPPED_T2I),
                   help="Checkpoint of train_t2i.py (default: the shipped one).")
    p.add_argument("--n", type=run_flags.at_least(360), default=10_000,
                   help="Latents to draw, a tenth of which is held out.")
    p.add_argument("--steps", type=run_flags.at_least(1), default=1000,
                   help="Optimizer steps, of 64 latents each.")
    p.add_argument("--lr", type=run_flags.at_least(0.0), default=5e-4, help="Peak learning rate.")
    p.add_argument("--out", type=Path, default=Path("runs/verifier"),
                   help="Folder of latents, checkpoint and curve.")
    return p.parse_args(argv)


# %% Draw latents, and have the images read
def training_scene(number):
    """A scene that training may show."""
    for k in range(1000):
        scene = Scene.random(SCENE_SEED, 1000 * number + k, NUMBERS_OF_OBJECTS)
        if not scene.held_out():
            return scene
    raise AssertionError("a thousand scenes in a row are held out")


def draw_prompt(number):
    """A prompt, and the names and the relation that shapes.fulfils() looks for."""
    scene = training_scene(number)
    rng = np.random.default_rng((SCENE_SEED, number))
    names = [thing.name for thing in scene.objects]
    text, relation = listing(names), None
    relations = []
    if len(names) == 2 and names[0] != names[1]:
        relations = scene.relations()
    if relations and rng.random() < 0.5:
        i, word, j = relations[rng.integers(len(relations))]
        relation = (names[i], word, names[j])
        text = f"a {names[i]} {word} a {names[j]}"
    elif rng.random() < 0.3:
        names = [thing.shape for thing in scene.objects]
        text = listing(names)
    requests = ("{}", *REQUESTS)
    request = requests[rng.integers(len(requests))]
    return request.format(text), names, relation


class Drawn(NamedTuple):
    """What the model has drawn."""
    latents: torch.Tensor      # n c h w
    is_right: torch.Tensor     # n, bool
    prompts: list              # n texts


def draw_part(model, rae, args, numbers, path):
    """A dict of latents z, prompts and whether they came out right, of these numbers; kept in a
    file.
    """
    if not path.exists():
        wanted = [draw_prompt(number) for number in numbers]
        prompts = [prompt for prompt, _, _ in wanted]
        latents = sample.draw_prompts(model, prompts, args, numbers)
        is_right = []
        images = sample.to_images(rae, latents).numpy()
        for image, (_, names, relation) in zip(images, wanted, strict=True):
            is_right.append(fulfils(read_scene(image), names, relation))
        storage.save_checkpoint(path, z=latents.half(), prompts=prompts,
                                right=torch.tensor(is_right))
    return storage.load_checkpoint(path)


def draw_all(model, rae, args, options):
    """All that is Drawn; what a stopped run has drawn already is read from its files."""
    # A folder for this checkpoint alone.
    sha1 = hashlib.sha1(Path(options.ckpt).read_bytes()).hexdigest()
    folder = options.out / f"drawn_{sha1[:8]}"
    parts = []
    for numbers in progress.progress_bar(runtime.split_numbers(options.n, batch=72), "draw"):
        path = folder / f"{numbers[0]:06d}_{len(numbers)}.pt"
        parts.append(draw_part(model, rae, args, numbers, path))
    is_right = torch.cat([part["right"] for part in parts])
    print(f"{options.n} latents drawn, {100 * is_right.float().mean():.1f}% right")
    return Drawn(torch.cat([part["z"] for part in parts]).float(), is_right,
                 [prompt for part in parts for prompt in part["prompts"]])


def split(drawn):
    """Numbers of the latents that are taught, and of the last tenth, which is held out.

    Raises ValueError if one of them lacks right or wrong latents.
    """
    n = len(drawn.prompts)
    taught, held_out = torch.arange(n).split([n * 9 // 10, n - n * 9 // 10])
    for numbers in (taught, held_out):
        right = int(drawn.is_right[numbers].sum())
        if right in (0, len(numbers)):
            raise ValueError(f"of {len(numbers)} latents {right} are right, and there must be some "
                             f"of both kinds; give a better --ckpt, or more --n")
    return taught, held_out


# %% How well the scores tell right from wrong
def ranking_accuracy(model, drawn, numbers):
    """Percentage of pairs of a right and a wrong one of these latents in which the right one wins.
    """
    scores = []
    for part in numbers.split(256):
        scores += answer_score(model, drawn.latents[part], [drawn.prompts[i] for i in part])
    scores = torch.tensor(scores)
    is_right = drawn.is_right[numbers]
    right, wrong = scores[is_right], scores[~is_right]
    return 100 * float((right[:, None] > wrong[None]).float().mean())


# %% What the language model is taught
def draw_rows(drawn, taught):
    """Rows of BATCH wrong and BATCH right latents, as far more are right."""
    rows = []
    for is_right in (False, True):
        kind = taught[drawn.is_right[taught] == is_right]
        rows.append(kind[torch.randint(len(kind), (BATCH,))])
    return torch.cat(rows)


def alignment_loss(teacher, drawn, rows):
    """Cross-entropy of "yes" or "no" to whether latents align with their prompts, a mean."""
    conversations = []
    for i in rows:
        question = f"<image>\n{ALIGN_QUESTION.format(drawn.prompts[i])}"
        answer = "yes" if drawn.is_right[i] else "no"
        conversations.append([("user", question), ("assistant", answer)])
    ids, labels, tasks, _ = tokenize(teacher.tokenizer, conversations, teacher.n)
    # Nothing is drawn, so one time and one noise stand in for those of the DiT.
    t, eps = torch.full((1,), 0.5), torch.zeros_like(drawn.latents[:1])
    loss, _, _ = teacher(*split_tasks(ids, labels, tasks), drawn.latents[rows], t, eps)
    return loss / (labels >= 0).sum()


def ordinary_losses(teacher, rae, conversations, images):
    """Cross-entropy and flow matching loss of what train_t2i.py teaches, two means."""
    ids, labels, tasks, _ = tokenize(teacher.tokenizer, conversations, teacher.n, teacher.context)
    num_drawn = max(1, int((tasks != UNDERSTAND).sum()))
    x0 = rae.encode(images.float() / 255)                               # b c h w
    t = time_shift(torch.rand(num_drawn), x0[0].numel(), teacher.dit.shift_base)
    eps = torch.randn(num_drawn, *x0.shape[1:])
    cross_entropy, _, flow_loss = teacher(*split_tasks(ids, labels, tasks), x0, t, eps)
    # times t^2: the error of x0, which the model predicts
    return cross_entropy / (labels >= 0).sum(), (flow_loss * t.square()).mean()


# %% Train the language model
def teach(model, rae, drawn, options):
    """Teach the model, which becomes the EMA of what is trained. Returns the loss of each step."""
    taught, held_out = split(drawn)
    accuracy = ranking_accuracy(model, drawn, held_out)
    print(f"right before wrong, untaught: {accuracy:.1f}% of pairs")
    teacher = copy.deepcopy(model).requires_grad_(True)
    teacher.dit.requires_grad_(False)                  # what it draws shall stay
    conversation = partial(converse, questions=0.7, plan=model.plan > 0)
    stream = open_data("shapes", 64, seed=5, objects=NUMBERS_OF_OBJECTS, chat=conversation)
    parameters = [p for p in teacher.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, options.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    losses = []
    bar = progress.progress_bar(options.steps, "train")
    for step, _, images, _, conversations in batches(stream, BATCH, BATCH, workers=1,
                                                     stop=options.steps):
        torch.manual_seed(step)
        answer_loss = alignment_loss(teacher, drawn, draw_rows(drawn, taught))
        cross_entropy, flow_loss = ordinary_losses(teacher, rae, conversations, images)
        (answer_loss + cross_entropy + flow_loss).backward()
        lr = options.lr * runtime.lr_factor(step, 50, 50, options.steps, 0.02, "cosine")
        runtime.optimizer_step([optimizer], teacher, 1.0, lr)
        runtime.update_ema(model, teacher, 0.99, step)
        losses.append(answer_loss.item())
        bar.update()
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            accuracy = ranking_accuracy(model, drawn, held_out)
            bar.write(f"step {step + 1}: answers {np.mean(losses[-100:]):.3f}, right before wrong "
                      f"{accuracy:.1f}%, ordinary {cross_entropy.item():.3f}")
    bar.close()
    print(f"right before wrong, taught: {accuracy:.1f}% of pairs")
    return losses


# %% Keep the weights, and draw the curve
def save(options, state, model, losses):
    kept = {}
    for name, value in state.items():
        if name not in ("model", "opt", "level"):      # what only training needs
            kept[name] = value
    kept["ema"] = model.state_dict()
    storage.save_checkpoint(options.out / "last.pt", **kept)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(np.convolve(losses, np.ones(20) / 20, "valid"))
    axes.set(xlabel="step", ylabel="cross-entropy of yes and no, mean of 20",
             title="right or wrong?")
    storage.write_whole(options.out / "answers.png", lambda f: figure.savefig(f, dpi=120))
    print(f"{options.out}/last.pt, {options.out}/answers.png")


def main(options):
    storage.check_out(options.out)
    runtime.setup()
    # Few steps without guidance are quick, and more often wrong.
    args = sample.parse_args(["--prompt", "-", "--ckpt", options.ckpt, "--seed", "77",
                              "--guidance", "1", "--sampling_steps", "24"])
    model, rae, state = sample.load_t2i_models(args, "cpu", with_encoder=True)
    drawn = draw_all(model, rae, args, options)
    losses = teach(model, rae, drawn, options)
    save(options, state, model, losses)


if __name__ == "__main__":
    runtime.run(main, parse_args)

"""Teach a text-to-image model to tell which of its own images came out right, for --best_of.

    python walkthroughs/verifier.py --n 10000 --steps 1000 --out runs/verifier
It draws n latents for prompts of the kind it was trained on, read_scene says which are right, and the
language model learns to answer "Does this image align with the prompt: ...?" from the latents alone, beside
what it is taught otherwise. Ends with a curve, and how well it tells right from wrong untaught ones.
"""
# %% Set-up
import argparse
import copy
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

import eval_fid
import runtime
import sample
import train_t2i
from data import batches, open_data
from model import time_shift
from shapes import Scene, listing, read_scene

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--ckpt", default=str(sample.ASSETS / "tiny_t2i.safetensors"), help="of train_t2i.py")
parser.add_argument("--n", type=runtime.at_least(360), default=10_000, help="latents; a tenth is held out")
parser.add_argument("--steps", type=runtime.at_least(1), default=1000, help="of training, 64 latents each")
parser.add_argument("--lr", type=runtime.at_least(0.0), default=5e-4, help="peak learning rate")
parser.add_argument("--out", type=Path, default=Path("runs/verifier"), help="folder of it all")
options = parser.parse_args()
runtime.setup()
args = sample.parse_args(["--prompt", "-", "--ckpt", options.ckpt, "--seed", "77",
                          "--guidance", "1", "--sampling_steps", "24"])     # quick, and as often wrong
try:
    model, rae, state, _ = sample.load_models(args, "cpu", encoder=True)
except (OSError, ValueError) as error:                      # no such file; one of classes
    parser.error(str(error))


# %% Draw, and have the images read
def ask(number):
    """Prompt, names and relation that eval_fid.fulfilled() takes, for a scene that training may show."""
    scenes = (Scene.random(91, 1000 * number + k, (1, 1, 2, 2, 3, 4)) for k in range(1000))
    scene = next(scene for scene in scenes if not scene.held_out())
    rng, names = np.random.default_rng((91, number)), [o.name for o in scene.objects]
    relations = [r for r in scene.relations() if names[r[0]] != names[r[2]]] if len(names) == 2 else []
    text, relation = listing(names), None
    if relations and rng.random() < 0.5:
        i, word, j = relations[rng.integers(len(relations))]
        relation = names[i], word, names[j]
        text = f"a {names[i]} {word} a {names[j]}"
    elif rng.random() < 0.3:
        names = [o.shape for o in scene.objects]
        text = listing(names)
    return ("{}", *train_t2i.ASK)[rng.integers(1 + len(train_t2i.ASK))].format(text), names, relation


def drawn(numbers, path):
    if not path.exists():
        prompts, *wanted = zip(*map(ask, numbers))
        z = sample.draw_prompts(model, prompts, args, numbers)
        read = [read_scene(image) for image in sample.to_images(rae, z).numpy()]
        right = [eval_fid.fulfilled(objects, *want) for objects, *want in zip(read, *wanted)]
        state = dict(z=z.half(), prompts=[*prompts], right=torch.tensor(right))
        runtime.whole_file(path, lambda f: torch.save(state, f))
    return torch.load(path, weights_only=True)


folder = options.out / f"drawn_{hashlib.sha1(Path(options.ckpt).read_bytes()).hexdigest()[:8]}"
folder.mkdir(parents=True, exist_ok=True)                   # of this checkpoint alone
parts = [drawn(part, folder / f"{part[0]:06d}_{len(part)}.pt")
         for part in tqdm(sample.share(options.n, 0, 1, 72), "draw")]
z, right = torch.cat([part["z"] for part in parts]).float(), torch.cat([part["right"] for part in parts])
prompts = [text for part in parts for text in part["prompts"]]
taught = options.n * 9 // 10
print(f"{options.n} latents drawn, {100 * right.float().mean():.1f}% right")


# %% How well scores tell right ones from wrong ones: the share of pairs in the right order, of all held out
def order():
    with torch.no_grad():
        scores = [s for part in torch.arange(taught, options.n).split(256)
                  for s in model.scores(z[part], [prompts[i] for i in part], "answer")]
    scores, good = torch.tensor(scores), right[taught:]
    return float((scores[good][:, None] > scores[~good][None]).float().mean())


print(f"right before wrong, untaught: {100 * order():.1f}% of pairs")

# %% Train the language model: half of the latents are wrong ones, and ordinary conversations go on
teacher, stream = copy.deepcopy(model).requires_grad_(True), open_data(
    "shapes", 64, 5, objects=(1, 1, 2, 2, 3, 4),
    chat=lambda scene, rng: train_t2i.converse(scene, rng, questions=0.7, plan=model.plan))
teacher.dit.requires_grad_(False)                           # what it draws shall stay
parameters = [p for p in teacher.parameters() if p.requires_grad]
opt = torch.optim.AdamW(parameters, options.lr, (0.9, 0.95), weight_decay=0.0, fused=True)
rows = [(right[:taught] == good).nonzero()[:, 0] for good in (False, True)]
curve, grid, n = [], z.shape[1:], teacher.n
for step, _, images, _, talks in tqdm(batches(stream, 32, 32, 0, 0, 1, 1, stop=options.steps), "train",
                                      total=options.steps):
    torch.manual_seed(step)
    some = torch.cat([part[torch.randint(len(part), (32,))] for part in rows])
    told = [[("user", f"<image>\n{train_t2i.ALIGN.format(prompts[i])}"),
             ("assistant", "yes" if right[i] else "no")] for i in some]
    ids, labels, kind, _ = train_t2i.tokenise(teacher.tokenizer, told, n)
    answers, _, _ = teacher(ids, labels, z[some], kind, torch.full((1,), 0.5), torch.zeros(1, *grid))
    answers = answers / (labels >= 0).sum()
    ids, labels, kind, _ = train_t2i.tokenise(teacher.tokenizer, talks, n, model.context)
    k = max(1, int((kind > 0).sum()))
    t = time_shift(torch.rand(k), z[0].numel(), teacher.dit.shift_base)
    ce, _, flow = teacher(ids, labels, rae.encode(images.float() / 255), kind, t, torch.randn(k, *grid))
    (answers + ce / (labels >= 0).sum() + (flow * t.square()).mean()).backward()
    lr = options.lr * runtime.lr_factor(step, 50, 50, options.steps, 0.02, "cosine")
    runtime.step_optimizers([opt], teacher, 1.0, answers, step, lr)
    runtime.update_ema(model, teacher, 0.99, step)
    curve.append(float(answers))
    if (step + 1) % 100 == 0 or step + 1 == options.steps:
        tqdm.write(f"step {step + 1}: answers {np.mean(curve[-100:]):.3f}, right before wrong "
                   f"{100 * order():.1f}%, ordinary {float(ce / (labels >= 0).sum()):.3f}")

# %% Keep it, and the curve
state = {k: v for k, v in state.items() if k not in ("model", "opt", "level")}
runtime.save_checkpoint(options.out / "last.pt", **{**state, "ema": model.state_dict()})
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
axes.plot(np.convolve(curve, np.ones(20) / 20, "valid"))
axes.set(xlabel="step", ylabel="cross-entropy of yes and no, mean of 20", title="right or wrong?")
figure.savefig(options.out / "answers.png", dpi=120)
print(f"right before wrong, taught: {100 * order():.1f}% of pairs; {options.out}/last.pt")

# %% [markdown]
# # Lesson 10: from classes to captions
#
# 40 minutes of class, 2 minutes on 2 CPU cores. Needs: lessons 2, 6 and 7. A class is a row of a
# table. A caption is a sentence that nobody has said before. A language model reads it, writes a
# plan, and hands the DiT one condition for each latent token.

# %% Set-up: find nanoRAE around this file, or clone it
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

places = [Path.cwd(), *Path.cwd().parents, Path.cwd() / "nanoRAE"]
if "__file__" in globals():
    places.insert(0, Path(__file__).resolve().parents[1])
root = next((place for place in places if (place / "walkthroughs" / "lesson.py").exists()), None)
if root is None:
    address = os.environ.get("NANORAE")
    if address is None:
        raise SystemExit("nanoRAE is not here; put this notebook into its folder, or set NANORAE "
                         "to an address that git can clone")
    subprocess.run(["git", "clone", "--quiet", address, "nanoRAE"], check=True)
    root = Path("nanoRAE").resolve()
packages = ("torchvision", "einops", "timm", "lpips", "scipy", "tqdm", "tokenizers", "safetensors",
            "huggingface_hub", "matplotlib")
if any(importlib.util.find_spec(name) is None for name in packages):
    requirements = str(root / "requirements.txt")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", requirements], check=True)
sys.path[:0] = [str(root), str(root / "walkthroughs")]

# %%
import argparse

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from lesson import Lesson, draw_dots, values_of

import runtime
import sample
from llm import IMAGE
from release import SHIPPED_T2I
from shapes import CLASSES, Scene, fulfils, layout, read_scene, shapes_eval_prompts
from t2i import load_t2i

lesson = Lesson("10_captions")

# %% [markdown]
# ## Question
#
# How do words get into a picture? A class model knows 36 conditions by heart. What conditions the
# image when the prompt is "two red circles and a blue star", and which part of it decides what is
# drawn where?
#
# ## Predict
#
# Write down, before you run anything:
#
# 1. There are 16 queries and 16 latent tokens. If the condition of query 5 alone is taken away,
#    what changes: the image at place 5, the whole image, or nothing?
# 2. The left half of the conditions is of one prompt, the right half of another. What is drawn?
# 3. The prompt says "a red circle", and the plan, which the model writes itself before it draws,
#    says "blue star". Whom does the image obey?
# 4. Which is hardest: one object, two objects, counting, colours, positions, or which colour goes
#    with which object?

# %% [markdown]
# ## Read
#
# - `T2I.conditions` in t2i.py, `[T1]`: prompt, plan, and then 16 learned *queries* in place of the
#   image. The final state of query i, through one linear layer (`connect`), is the condition of
#   latent token i. All attention of the language model is causal.
# - `Block` in model.py, `[L4]`: the condition sets shift, scale and gate, as that of a class does.
#   Now it differs from token to token; the class of lesson 6 was the same for all.
# - `draw_prompts` and `draw` in sample.py, `[S4]`: the DiT is guided (`[S3]`) as with classes. The
#   null condition is a learned vector, the same for all tokens.
# - `train_t2i.py`, `[T2]`: the loss has three parts. The cross-entropy teaches the language model
#   to plan and to answer, the regression teaches the queries to know the latents, and flow matching
#   teaches the DiT. Flow matching's gradient reaches the language model as well.

# %% [markdown]
# ## Run
#
# ### The plan
#
# Before it draws, the language model says what goes where: size, colour, shape and a square of a
# board, columns a to j from the left, rows 0 to 9 from the top. A prompt leaves much open, so the
# words of the plan are drawn at random, as the noise is.

# %%
t2i, rae, _ = load_t2i(SHIPPED_T2I, device=lesson.device)
STEPS = lesson.size(24, quick=3)
flags = sample.parse_args(["--prompt", "-", "--sampling_steps", str(STEPS)])
null = t2i.dit.null_condition(torch.zeros(1, device=lesson.device))     # e


def flags_with(**changes):
    """Flags of sampling with some changed."""
    return argparse.Namespace(**dict(vars(flags), **changes))


def show_images(panels, images, titles):
    """Draw images n H W 3 into as many panels."""
    for panel, image, title in zip(np.ravel(panels), images, titles, strict=True):
        panel.imshow(image)
        panel.set(xticks=[], yticks=[])
        panel.set_title(title, fontsize=11)


prompts = ["a red circle", "two red circles and a blue star", "a green ring above a purple cross",
           "three yellow stars", "a blue triangle left of a red square"]
uniform = torch.rand(len(prompts), t2i.plan)
plans = t2i.plans(prompts, uniform)
conditions = t2i.conditions(prompts, uniform)                           # 5 n e
latents = sample.draw(t2i.dit, conditions, flags, range(len(prompts)))  # 5 c h w
figure, panels = plt.subplots(1, 5, figsize=(15, 4.4))
titles = [prompt.replace(" and ", "\nand ").replace(" above", "\nabove").replace(" left", "\nleft")
          for prompt in prompts]
show_images(panels, sample.to_images(rae, latents), titles)
for panel, plan in zip(panels, plans, strict=True):
    panel.set_xlabel(plan.replace(", ", ",\n"), fontsize=11)
lesson.show(figure, "plans", "prompt (above), image, and the plan that the model wrote before it "
            "drew (below)")

# %% [markdown]
# ### A plan that was written by somebody else
#
# The plan is only text in the assistant's turn, so any plan can be put there. Here the prompt asks
# for one object, and the plan speaks of an object of another colour and shape.

# %%
@torch.no_grad()
def conditions_after(prompts, plans):
    """Conditions of the DiT for prompts, each followed by a plan that is given: b n e.

    The second half of `T2I.conditions`, whose first half writes the plans.
    """
    conversations = []
    for prompt, plan in zip(prompts, plans, strict=True):
        conversations.append([("user", prompt), ("assistant", f"{plan}<image>")])
    embeddings, ids, _, tasks = t2i.embed_conversations(conversations)
    states = t2i.llm(embeddings)[ids == IMAGE]                          # b*n d
    return t2i.connect(rearrange(states, "(b n) d -> b n d", n=t2i.n), tasks)       # b n e


def names_in(image):
    """Names of the objects that read_scene finds, from left to right; none if it is unsure."""
    objects = read_scene(image) or []
    return [obj.name for obj in sorted(objects, key=lambda obj: obj.centre)]


PAIRS = lesson.size(36, quick=2)
asked = [CLASSES[k] for k in range(PAIRS)]
planned = [CLASSES[(k + 7) % 36] for k in range(PAIRS)]     # 7: the next colour and the next shape
own_plans = [layout(Scene.random(0, 10 ** 6 + k, 1, CLASSES.index(name)).objects)
             for k, name in enumerate(asked)]
other_plans = [layout(Scene.random(0, 10 ** 6 + k, 1, CLASSES.index(name)).objects)
               for k, name in enumerate(planned)]
prompts = [f"a {name}" for name in asked]
obeys = {}
for kind, plans in (("own plan", own_plans), ("other plan", other_plans)):
    latents = sample.draw(t2i.dit, conditions_after(prompts, plans), flags, range(PAIRS))
    images = sample.to_images(rae, latents)
    drawn = [names_in(image) for image in images.numpy()]
    as_asked = np.mean([names == [name] for names, name in zip(drawn, asked, strict=True)])
    as_planned = np.mean([names == [name] for names, name in zip(drawn, planned, strict=True)])
    obeys[kind] = (100 * as_asked, 100 * as_planned)
    print(f"{kind}: {100 * as_asked:.0f}% as the prompt says, {100 * as_planned:.0f}% as the other "
          f"plan says")

SHOWN = min(5, PAIRS)
figure, panels = plt.subplots(1, SHOWN, figsize=(15, 3.6), squeeze=False)
titles = [f'"{prompt}"\nplan: {plan}' for prompt, plan in zip(prompts, other_plans, strict=True)]
show_images(panels, images[:SHOWN], titles[:SHOWN])
lesson.show(figure, "other_plans", "the prompt asks for one class, the plan for another; "
            f"{SHOWN} of {PAIRS} pairs")

# %% [markdown]
# ### One query, one token?
#
# Each image is drawn 33 times from the same noise: with all conditions; with the condition of each
# single query *taken away*, that is replaced by the null condition; and with the condition of each
# single query *alone*, all others being null. What changes where is the squared difference of the
# latents at each of the 16 places. Their variance is 1, so two unrelated latents differ by about 2.

# %%
ABLATED = lesson.size(6, quick=1)
ablated_pairs = [(CLASSES[4 * k], CLASSES[(4 * k + 21) % 36]) for k in range(ABLATED)]


def conditions_of_pairs(pairs):
    """Conditions for two objects side by side, whose places the plan says: b n e."""
    prompts = [f"a {left} left of a {right}" for left, right in pairs]
    plans = [f"large {left} c4, large {right} h4" for left, right in pairs]
    return conditions_after(prompts, plans)


y = conditions_of_pairs(ablated_pairs)                                          # b n e
takes_away = torch.eye(t2i.n, dtype=torch.bool, device=lesson.device)   # n n, version and query
is_null = torch.cat([takes_away.new_zeros(1, t2i.n), takes_away, ~takes_away])      # 33 n
versions = torch.where(is_null[None, :, :, None], null, y[:, None])     # b 33 n e
versions = rearrange(versions, "b k n e -> (b k) n e")
indices = [i for i in range(ABLATED) for _ in is_null]                  # one noise for each prompt
drawn = []
for numbers in torch.arange(len(indices)).split(66):
    own = [indices[number] for number in numbers]
    drawn.append(sample.draw(t2i.dit, versions[numbers], flags, own))
drawn = rearrange(torch.cat(drawn), "(b k) c h w -> b k c h w", b=ABLATED)
change = (drawn - drawn[:, :1]).square().mean((0, 2)).flatten(1).cpu()  # 33 n, version and token
away = change[1:1 + t2i.n]                                              # n n, query and token
alone = change[1 + t2i.n:]                                              # n n
same_token = away.diagonal().mean()
other_token = (away.sum() - away.diagonal().sum()) / (t2i.n * (t2i.n - 1))

figure, panels = plt.subplots(1, 2, figsize=(12, 5.4))
for panel, matrix, title in zip(panels, (away, alone), ("taken away", "alone"), strict=True):
    picture = panel.imshow(matrix, cmap="viridis")
    panel.set(xlabel="latent token", ylabel="query", title=f"the condition of one query {title}",
              xticks=range(0, 16, 4), yticks=range(0, 16, 4))
    panel.grid(False)
    figure.colorbar(picture, ax=panel, label="squared change of the token")
lesson.show(figure, "queries_and_tokens", "against the image with all conditions, mean of "
            f"{ABLATED} prompts; guidance 1.5, 24 steps. Token and query 0 to 3: the upper row of "
            "the image")

# %%
images = sample.to_images(rae, drawn[0])                                # 33 H W 3
rows = []
for r in range(4):
    first = 4 * r
    rows.append(["all", *[f"away {first + i}" for i in range(4)], ".",
                 *[f"alone {first + i}" for i in range(4)]])
widths = [4, 1, 1, 1, 1, 0.3, 1, 1, 1, 1]
figure, panels = plt.subplot_mosaic(rows, figsize=(15, 5.4), width_ratios=widths)
show_images(panels["all"], images[:1], ["all conditions"])
for k in range(t2i.n):
    show_images(panels[f"away {k}"], images[1 + k:2 + k], [""])
    show_images(panels[f"alone {k}"], images[1 + t2i.n + k:2 + t2i.n + k], [""])
panels["away 1"].set_title("one taken away", loc="left", fontsize=13)
panels["alone 1"].set_title("one alone", loc="left", fontsize=13)
left, right = ablated_pairs[0]
lesson.show(figure, "taken_away", f'"a {left} left of a {right}". At each of the 16 places: the '
            "image without the condition of the query of that place, and with this condition alone")

# %% [markdown]
# ### Half of one prompt, half of another
#
# The conditions of the left half of the tokens are of one prompt, those of the right half of
# another. Both ask for one object on the left and one on the right.

# %%
column = torch.arange(t2i.n, device=lesson.device) % t2i.dit.grid       # n, of each token
is_left = (column < t2i.dit.grid // 2)[None, :, None]                   # 1 n 1
MIXED = lesson.size(24, quick=2)
first, second = [], []                                                  # names left and right
for k in range(MIXED):
    first.append((CLASSES[k], CLASSES[(k + 8) % 36]))
    second.append((CLASSES[(k + 15) % 36], CLASSES[(k + 23) % 36]))
mixed = [(one[0], other[1]) for one, other in zip(first, second, strict=True)]

of_first = conditions_of_pairs(first)                                   # b n e
of_second = conditions_of_pairs(second)                                 # b n e
of_mixed = torch.where(is_left, of_first, of_second)                    # b n e
images, both_right = {}, {}
for name, y, pairs in (("first", of_first, first), ("second", of_second, second),
                       ("mixed", of_mixed, mixed)):
    images[name] = sample.to_images(rae, sample.draw(t2i.dit, y, flags, range(MIXED)))
    right = [names_in(image) == list(pair)
             for image, pair in zip(images[name].numpy(), pairs, strict=True)]
    both_right[name] = 100 * np.mean(right)
    print(f"{name}: both objects are right in {both_right[name]:.0f}% of {MIXED}")

SHOWN = min(5, MIXED)
figure, panels = plt.subplots(3, SHOWN, figsize=(2.4 * SHOWN, 7.6), squeeze=False)
for row, name in zip(panels, ("first", "second", "mixed"), strict=True):
    show_images(row, images[name][:SHOWN], ["" for _ in range(SHOWN)])
panels[0, 0].set_ylabel("first prompt")
panels[1, 0].set_ylabel("second prompt")
panels[2, 0].set_ylabel("left half of the first,\nright half of the second")
lesson.show(figure, "halves", f"{SHOWN} of {MIXED} pairs of prompts; one noise in each column")

# %% [markdown]
# ### ShapesEval, by category
#
# ShapesEval asks for pairs and counts that training has never shown. In class there are 6 images of
# each category, below (by `--full`) 20 of each for three seeds of the noise.

# %%
CATEGORIES = ["single object", "two objects", "counting", "colours", "position",
              "colour attribution"]


def shapes_eval(n, seed):
    """Right images of each category, and their mean, %."""
    tests = shapes_eval_prompts()[:n]                                   # categories in turn
    right = {category: [] for category in CATEGORIES}
    for numbers in runtime.split_numbers(n, batch=60):
        prompts = [tests[i].prompt for i in numbers]
        images = sample.generate_prompts(t2i, rae, prompts, flags_with(seed=seed), numbers)
        for i, image in zip(numbers, images.numpy(), strict=True):
            test = tests[i]
            right[test.category].append(fulfils(read_scene(image), test.names, test.relation))
    results = {category: 100 * float(np.mean(values)) for category, values in right.items()}
    results["overall"] = float(np.mean(list(results.values())))
    return results


def one_seed(arm, seed, folder):
    return shapes_eval(lesson.size(120, quick=6), seed)


in_class = shapes_eval(lesson.size(36, quick=6), seed=0)
print("in class, right images, %:", in_class)
results = lesson.sweep("shapes_eval", ["shipped"], one_seed)
by_category = np.array([[run[category] for run in results["shipped"]] for category in CATEGORIES])
overall = values_of(results, ["shipped"], "overall")

figure, axes = plt.subplots(figsize=(10, 5))
draw_dots(axes, [category.replace(" ", "\n") for category in CATEGORIES], by_category)
axes.set(ylabel="right images, %", ylim=(0, 103))
lesson.show(figure, "shapes_eval", "20 prompts of each category, three seeds of the noise (dots) "
            "and their mean (bars); guidance 1.5, 24 steps")

# %% [markdown]
# ## Figure
#
# 1. *Plans*: every object of the image is in the plan, at its place. Below "two red circles and a
#    blue star" stand three places; nothing in the prompt says them.
# 2. *Other plans*: the image shows what the plan says. By the time the queries come, the prompt has
#    done its work.
# 3. *Queries and tokens*: taken away, no condition is missed. The largest change is below 0.1,
#    where unrelated latents differ by 2. The objects stand at c4 and h4, where queries 4, 5 and 7
#    are, and these matter most. But each changes a whole half of the image, in all four rows: the
#    encoder's tokens know of the object beside them. Alone, a query brings only its own half near.
# 4. *Taken away*: sixteen times the same image. Alone, the queries 4, 5 and 8 at the circle still
#    draw a circle, while the other half is made up.
# 5. *Halves*: the left object of the first prompt stands beside the right object of the second one.
#    So conditions do belong to places: half of the message is enough for half of the image.
# 6. *ShapesEval*: what needs several objects in the right number or place is hardest. Three seeds
#    of 20 images differ much in "position".
#
# ## Number
#
# With a plan for it, all of 36 prompts come out right; against a plan for another class, none does,
# and all 36 images show what the plan says. One condition taken away changes its own token by 0.016
# and another one by 0.006, the mean of 6 prompts; one alone leaves a change of 1.5. Of the mixed
# halves, both objects are right in 79% of 24, of the unmixed first prompts in 92%: so it costs a
# little to draw beside a stranger. One image more or less is 4%.
#
# ShapesEval, 120 images, three seeds: 89.7% (86.7 to 91.7). By category, mean of the seeds: single
# object 97%, two objects 93%, counting 82%, colours 98%, position 75% (60 to 95), colour
# attribution 93%. With 20 images of a category, a seed is good to about 8 points.

# %%
lesson.number("as the prompt says, with a plan for it, %", obeys["own plan"][0], 85, 100,
              quick=(0, 100))
lesson.number("as the prompt says, against its plan, %", obeys["other plan"][0], 0, 5,
              quick=(0, 100))
lesson.number("as the plan says, against its prompt, %", obeys["other plan"][1], 85, 100,
              quick=(0, 100))
lesson.number("change of a query's own token, taken away", same_token, 0.005, 0.05, quick=(0, 2))
lesson.number("change of another token, taken away", other_token, 0.001, 0.03, quick=(0, 2))
lesson.number("change of a token, one query alone", alone.mean(), 1, 2, quick=(0, 4))
lesson.number("first prompts: both objects right, %", both_right["first"], 60, 100,
              quick=(0, 100))
lesson.number("mixed halves: both objects right, %", both_right["mixed"], 50, 100, quick=(0, 100))
lesson.number("ShapesEval, three seeds, %", overall.mean(), 80, 100)
lesson.end()

# %% [markdown]
# ## Exercise
#
# 1. What is drawn after no plan at all? Draw from
#    `conditions_after(prompts, ["" for _ in prompts])` for the 36 classes. And after a plan without
#    a prompt that says anything: `"draw"`?
# 2. Query 0 comes first, and attention is causal: it cannot see the other queries. Why can it
#    nevertheless know what is drawn in the lower right corner?
# 3. Mix the conditions of the upper and the lower half
#    (`row = torch.arange(t2i.n) // t2i.dit.grid`) for prompts with "above". What must change in the
#    plans?
# 4. A user drags boxes on a canvas and names them. What must be trained anew to draw from that?
#
# <details><summary>Answers</summary>
#
# 1. Without a plan, none of 36 images is right, and in none is the reader sure of anything: this
#    model never drew without a plan in training. With "draw" and a plan, all 36 are right. (Run
#    once, 24 steps.)
# 2. It sees the prompt and the whole plan, which stand before it. What it cannot see is only what
#    the later queries make of them. The DiT's attention, which is not causal, settles the rest.
# 3. The objects must stand in the two halves: the cells become such as `e2` and `e7`.
# 4. Nothing: a plan is text, so the boxes are written as one.
#
# </details>
#
# ## The paper says / ours differs
#
# - Scale-RAE (arXiv 2601.16208, section 3.1) has 256 queries for the 16 x 16 tokens of SigLIP-2, a
#   language model of 1.5B or 7B and DiTs of 0.5B to 9.8B. Query i conditions token i by adaLN, as
#   here. Its text says that the connector has two layers; its code has one, and so has ours.
# - It has no plan: a language model of billions knows what a red circle is. Ours, of 0.8 M
#   parameters, is trained from scratch, and with the plan we took over the part of the work that
#   can be written as text. That the image obeys the plan and not the prompt is a fact about this
#   model, not about the paper's.
# - Its GenEval of 49.5 (1.5B and 2.4B, pretraining, table 4) and our ShapesEval are not comparable:
#   the six categories are the same, the worlds are not.
# - Guidance: the paper does not mention any, and in the released code it has no effect. We draw
#   with guidance 1.5.
# - Not run here: the mixture of captions (table 3: GenEval 49.5 with web and synthetic data, 25.9
#   and 45.1 with either), and what understanding gains from drawing (table 6).

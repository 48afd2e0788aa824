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
#    says "blue star". Which of the two does the image follow?
# 4. Which is hardest: one object, two objects, counting, colours, positions, or which colour goes
#    with which object?

# %% [markdown]
# ## Read
#
# - `T2I.conditions` in t2i.py, `[T1]`: prompt, plan, and then 16 learned *queries* in place of the
#   image. The final state of query i goes through one linear layer (`connect`) and becomes the
#   condition of latent token i. All attention of the language model is causal.
# - `Block` in model.py, `[L4]`: the condition sets shift, scale and gate, as that of a class does.
#   Here it differs from token to token; the class of lesson 6 was the same for all tokens.
# - `draw_prompts` and `draw` in sample.py, `[S4]`: the DiT is guided (`[S3]`) as with classes. The
#   null condition is a learned vector, the same for all tokens.
# - `train_t2i.py`, `[T2]`: the loss has three parts. The cross-entropy teaches the language model
#   to plan and to answer, the regression makes the states of the queries predict the latents, and
#   flow matching teaches the DiT. Its gradient reaches the language model as well.

# %% [markdown]
# ## Run
#
# ### The plan
#
# Before it draws, the language model says what goes where: size, colour, shape and the cell of a
# board with the columns a to j from the left and the rows 0 to 9 from the top. A prompt leaves much
# open, so the words of the plan are drawn at random, as the noise is.

# %%
t2i, rae, _ = load_t2i(SHIPPED_T2I, device=lesson.device)
STEPS = lesson.size(24, quick=3)
# The defaults of text to image; the prompts themselves are given further down.
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
uniform = torch.rand(len(prompts), t2i.plan)            # a number for each word of each plan
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
# The plan is only text in the assistant's turn, so any plan can be put there. Each prompt asks for
# one object. It is drawn twice: after a plan for this object, and after a plan for an object of
# another colour and shape.

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
other = [CLASSES[(k + 7) % 36] for k in range(PAIRS)]       # another colour and another shape
prompts = [f"a {name}" for name in asked]


def plan_for(name, index):
    """A plan for one object of a class, in a place and size drawn at random: "large red star c4".
    """
    scene = Scene.random(seed=0, index=index, objects=1, label=CLASSES.index(name))
    return layout(scene.objects)


def percent_showing(images, names):
    """How many of b images show the one object that is named for them, and nothing else, %."""
    right = [names_in(image) == [name]
             for image, name in zip(images.numpy(), names, strict=True)]
    return 100 * np.mean(right)


own_plans = [plan_for(name, k) for k, name in enumerate(asked)]
other_plans = [plan_for(name, k) for k, name in enumerate(other)]
as_asked, as_other = {}, {}
for plan, plans in (("own plan", own_plans), ("other plan", other_plans)):
    latents = sample.draw(t2i.dit, conditions_after(prompts, plans), flags, range(PAIRS))
    images = sample.to_images(rae, latents)
    as_asked[plan] = percent_showing(images, asked)
    as_other[plan] = percent_showing(images, other)
    print(f"{plan}: {as_asked[plan]:.0f}% show the object of the prompt, "
          f"{as_other[plan]:.0f}% that of the other plan")

SHOWN = min(5, PAIRS)
figure, panels = plt.subplots(1, SHOWN, figsize=(15, 3.6), squeeze=False)
titles = [f'"{prompt}"\nplan: {plan}' for prompt, plan in zip(prompts, other_plans, strict=True)]
show_images(panels, images[:SHOWN], titles[:SHOWN])
lesson.show(figure, "other_plans", "the prompt asks for one class, the plan for another; "
            f"{SHOWN} of {PAIRS} pairs")

# %% [markdown]
# ### One query, one token?
#
# The image of each prompt is drawn 33 times from the same noise: once with all conditions; 16 times
# with the condition of one query *taken away*, that is, replaced by the null condition; and 16
# times with the condition of one query *alone*, where all others are null. We measure the squared
# difference from the latents with all conditions, at each of the 16 tokens. The variance of latents
# is 1, so two unrelated ones differ by about 2.

# %%
ABLATED = lesson.size(6, quick=1)
ablated_pairs = [(CLASSES[4 * k], CLASSES[(4 * k + 21) % 36]) for k in range(ABLATED)]


def conditions_of_pairs(pairs):
    """Conditions for two large objects, which the plan puts side by side: b n e."""
    prompts = [f"a {left} left of a {right}" for left, right in pairs]
    plans = [f"large {left} c4, large {right} h4" for left, right in pairs]
    return conditions_after(prompts, plans)


y = conditions_of_pairs(ablated_pairs)                                          # b n e
# Which conditions are null in each of the 33 versions: none, one, all but one.
is_one = torch.eye(t2i.n, dtype=torch.bool, device=lesson.device)       # n n, version and query
is_none = torch.zeros_like(is_one[:1])                                  # 1 n
is_null = torch.cat([is_none, is_one, ~is_one])                         # 33 n
drawn = []
for i in range(ABLATED):
    versions = torch.where(is_null[:, :, None], null, y[i])             # 33 n e
    same_noise = [i for _ in versions]
    drawn.append(sample.draw(t2i.dit, versions, flags, same_noise))     # 33 c h w
drawn = torch.stack(drawn)                                              # b 33 c h w

difference = (drawn - drawn[:, :1]).square()                            # b 33 c h w
change = difference.mean((0, 2)).flatten(1).cpu()                       # 33 n, version and token
away = change[1:1 + t2i.n]                                              # n n, query and token
alone = change[1 + t2i.n:]                                              # n n
own_token = away[is_one.cpu()].mean()
other_token = away[~is_one.cpu()].mean()

figure, panels = plt.subplots(1, 2, figsize=(12, 5.4))
for panel, matrix, title in zip(panels, (away, alone), ("taken away", "alone"), strict=True):
    picture = panel.imshow(matrix, cmap="viridis")
    panel.set(xlabel="latent token", ylabel="query", title=f"the condition of one query {title}",
              xticks=range(0, 16, 4), yticks=range(0, 16, 4))
    panel.grid(False)
    figure.colorbar(picture, ax=panel, label="squared difference of the token")
lesson.show(figure, "queries_and_tokens", "difference from the latents with all conditions, mean "
            f"of {ABLATED} prompts; each panel has its own colours. Tokens and queries 0 to 3: the "
            "top row of the image")

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
# The left half of the tokens gets the conditions of one prompt, the right half those of another.
# Both prompts ask for one object on the left and one on the right.

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
# ShapesEval has six categories, like GenEval. Its counts of one class, its positions and its pairs
# for colour attribution are such as training has never shown. In class there are 6 images of each
# category; the figure shows 20 of each for three seeds of noise and plans, from `--full`.

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
for category, value in in_class.items():
    print(f"in class, {category}: {value:.0f}% right")
results = lesson.sweep("shapes_eval", ["shipped"], one_seed)
by_category = np.array([[run[category] for run in results["shipped"]] for category in CATEGORIES])
overall = values_of(results, ["shipped"], "overall")

figure, axes = plt.subplots(figsize=(10, 5))
draw_dots(axes, [category.replace(" ", "\n") for category in CATEGORIES], by_category)
axes.set(ylabel="right images, %", ylim=(0, 103))
lesson.show(figure, "shapes_eval", "20 prompts of each category, three seeds (dots) and their mean "
            "(bars); guidance 1.5, 24 steps")

# %% [markdown]
# ## Figure
#
# 1. *Plans*: every object of the image is in the plan, at its place. Below "two red circles and a
#    blue star" stand three places; nothing in the prompt says them.
# 2. *Other plans*: the image shows what the plan says. By the time the queries come, the prompt has
#    done its work.
# 3. *Queries and tokens*, left: hardly anything changes when one condition is taken away. The
#    largest change is below 0.1, where unrelated latents differ by 2. The objects are at c4 and h4,
#    the places of the queries 4 to 7; of these, 4, 5 and 7 matter most. Each of them changes a
#    whole half of the image, in all four rows, since each token of the tiny encoder describes the
#    object that is nearest to it. Right: alone, such a query brings the tokens of its own half
#    close to the image with all conditions, and not those of the other half.
# 4. *Taken away*: sixteen times the same image. Alone, the queries 4, 5 and 8, at the circle, still
#    draw a red circle, and beside it a red object that nobody asked for. Query 7, at the star,
#    draws a star, but a yellow one. So a condition says most about the object at its own place.
# 5. *Halves*: the left object of the first prompt stands beside the right object of the second one.
#    So conditions do belong to places: half of the message is enough for half of the image.
# 6. *ShapesEval*: counting and position are hardest. Only the noise and the plans differ between
#    the seeds, and yet "position" goes from 60% to 95%.
#
# ## Number
#
# With a plan for it, all of 36 prompts come out right; with a plan for another class, none does,
# and all 36 images show what the plan says. One condition taken away changes its own token by 0.016
# and another one by 0.006, the mean of 6 prompts. With one condition alone, a token differs by 1.5
# on average, not much less than from an unrelated image. Both objects are right in 79% of 24 mixed
# images, and in 92% and 96% of those of the first and the second prompts. One image is 4%, so the
# mixed ones are three and four images behind: if a strange neighbour costs anything, it is little.
#
# ShapesEval, 120 images, three seeds: 89.7% (86.7 to 91.7). By category, mean of the seeds: single
# object 97%, two objects 93%, counting 82%, colours 98%, position 75% (60 to 95), colour
# attribution 93%. With 20 images of a category, a seed is good to about 8 points.

# %%
lesson.number("object of the prompt, after its own plan, %", as_asked["own plan"], 85, 100,
              quick=(0, 100))
lesson.number("object of the prompt, after another plan, %", as_asked["other plan"], 0, 5,
              quick=(0, 100))
lesson.number("object of the other plan, %", as_other["other plan"], 85, 100, quick=(0, 100))
lesson.number("change of a query's own token, taken away", own_token, 0.005, 0.05, quick=(0, 2))
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
# 1. What is drawn without a plan? Draw from `conditions_after(prompts, ["" for _ in prompts])` for
#    the 36 classes. And what is drawn with a plan, if the prompt says nothing but `"draw"`?
# 2. Query 0 comes first, and attention is causal: it cannot see the other queries. Why can it
#    nevertheless know what is drawn in the lower right corner?
# 3. Mix the conditions of the upper and the lower half
#    (`row = torch.arange(t2i.n) // t2i.dit.grid`) for prompts with "above". What must change in the
#    plans?
# 4. A user draws boxes on a canvas and names them. What must be trained again to draw from these?
#
# <details><summary>Answers</summary>
#
# 1. Without a plan, none of 36 images is right, and `read_scene` is sure of none: this model never
#    drew without a plan in training. With "draw" and a plan, all 36 are right. (One run, 24 steps.)
# 2. It sees the prompt and the whole plan, which come before it. All that it cannot see is what
#    the later queries make of them. The attention of the DiT is not causal: there, each token sees
#    all others.
# 3. The objects must stand in the upper and the lower half: say `e2` and `e7` instead of `c4` and
#    `h4`. Then 9 of 12 mixed images show the upper object of the first prompt above the lower one
#    of the second. (One run.)
# 4. Nothing: a plan is text, and a box can be written as its nearest size and cell. Exact boxes
#    would need a finer board, and with it a new training.
#
# </details>
#
# ## The paper says / ours differs
#
# - Scale-RAE (arXiv 2601.16208, section 3.1) has 256 queries for the 16 x 16 tokens of SigLIP-2, a
#   language model of 1.5B or 7B and DiTs of 0.5B to 9.8B. Query i conditions token i by adaLN, as
#   here. Its text says that the connector has two layers; its code has one, and so has ours.
# - The paper has no plan: a language model of billions of parameters knows what a red circle is.
#   Ours has 0.8 M and is trained from scratch. The plan takes over the part of the work that can be
#   written as text. That the image follows the plan and not the prompt is a fact about this model,
#   not about the paper's.
# - Its GenEval of 49.5 (1.5B and 2.4B, pretraining, table 4) and our ShapesEval are not comparable:
#   the six categories are the same, the worlds are not.
# - Guidance: the paper does not mention any, and in the released code it has no effect. We draw
#   with guidance 1.5.
# - Not run here: the mixture of captions (table 3: GenEval 49.5 with web and synthetic data, 25.9
#   and 45.1 with either), and what understanding gains from drawing (table 6).

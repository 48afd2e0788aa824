# %% [markdown]
# # Lesson 11: test-time scaling
#
# 30 minutes of class, 1 minute on 2 CPU cores. Needs: lesson 10. A model that draws can draw again.
# It looks at its own candidates, in latent space, and keeps the one that it likes best. How far
# does that go, and what stops it?

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
import math
from statistics import NormalDist
from textwrap import wrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from lesson import COLOURS, Lesson, draw_band

import sample
from release import SHIPPED_T2I
from shapes import fulfils, read_scene, shapes_eval_prompts
from t2i import VERIFIERS, load_t2i

lesson = Lesson("11_test_time_scaling")

# %% [markdown]
# ## Question
#
# Training once more costs hours; drawing once more costs a second. If a model draws N candidates
# for each prompt and chooses one by itself, how does the share of right images grow with N? And
# where does it stop?
#
# ## Predict
#
# Write down, before you run anything:
#
# 1. The model draws a prompt right in 85% of its attempts, each independent of the others. How
#    often is *at least one* of 4 candidates right?
# 2. A judge tells a right image from a wrong one in 90% of all pairs. Is the best of 16 candidates
#    more often right than the best of 4?
# 3. A prompt comes out wrong. Is that bad luck of this one noise, or is the prompt too hard, so
#    that all candidates are wrong?

# %% [markdown]
# ## Read
#
# - `best_of` in sample.py: all candidates are drawn, scored as latents, and only the best is
#   decoded.
# - `draw` in sample.py, `[S4]`, and `T2I.conditions` in t2i.py, `[T1]`: candidates differ in their
#   noise and in their plans. All else is the same.
# - `answer_score`, `prompt_confidence` and `answer_logits` in t2i.py: three judges, which the paper
#   calls *verifiers*. In all of them the language model reads the latents in the user's turn, as it
#   reads any image. "answer" asks "Does this image align with the prompt?" and takes the
#   probability of "yes". "confidence" has the model say the prompt as a description of the image,
#   and takes its certainty. "answer_logits" is the paper's form of "answer", with raw logits.
# - `shapes_eval_prompts` and `fulfils` in shapes/language.py: 300 prompts in six categories, and
#   the test of whether an image shows what was asked for. `read_scene` reads the decoded image by
#   classical image analysis. What it says is the truth here. A judge that says the same as
#   `read_scene` cannot be beaten: the *oracle*.

# %% [markdown]
# ## Run
#
# The shipped text-to-image model draws candidates for the first prompts of ShapesEval. Each judge
# scores each of them, and `read_scene` says which are right. In class the solver takes 4 steps,
# where 24 draw better: that is fast, and it leaves more mistakes for the judges to find.

# %%
t2i, rae, _ = load_t2i(SHIPPED_T2I, device=lesson.device)
flags = sample.parse_args(["--prompt", "-"])           # the defaults of text to image


def draw_and_judge(tests, candidates, steps, seed):
    """Draw m candidates for each of n tests, and score them by each judge.

    Returns latents n m c h w; whether each is right, n m bool; a dict of scores n m by judge.
    """
    args = argparse.Namespace(**dict(vars(flags), sampling_steps=steps, seed=seed))
    latents = []
    right = []
    scores = {name: [] for name in VERIFIERS}
    for i, test in enumerate(tests):
        prompts = [test.prompt for _ in range(candidates)]
        indices = range(i * candidates, (i + 1) * candidates)
        latents.append(sample.draw_prompts(t2i, prompts, args, indices))             # m c h w
        images = sample.to_images(rae, latents[-1]).numpy()                         # m H W 3
        right.append([fulfils(read_scene(image), test.names, test.relation) for image in images])
        for name, verifier in VERIFIERS.items():
            scores[name].append(verifier(t2i, latents[-1], prompts))
    scores = {name: np.array(values) for name, values in scores.items()}
    return torch.stack(latents), np.array(right), scores


CANDIDATES = lesson.size(8, quick=2)
tests = shapes_eval_prompts()[:lesson.size(48, quick=3)]       # the six categories in turn
latents, right, scores = draw_and_judge(tests, CANDIDATES, steps=4, seed=0)
print(f"{100 * right.mean():.1f}% of {right.size} candidates are right")

# %% [markdown]
# ### What the judge sees
#
# The candidates of the three prompts with the most mistakes, from the one that "answer" likes best
# to the one that it likes least. Over each stands its probability of "yes", and the truth.

# %%
hardest = right.mean(1).argsort()[:3]
figure, panels = plt.subplots(3, CANDIDATES, figsize=(1.5 * CANDIDATES, 6.2), squeeze=False)
for row, i in zip(panels, hardest, strict=True):
    order = np.argsort(-scores["answer"][i])
    images = sample.to_images(rae, latents[i][order.tolist()])
    for panel, image, j in zip(row, images, order, strict=True):
        panel.imshow(image)
        panel.set(xticks=[], yticks=[])
        verdict = "right" if right[i, j] else "wrong"
        colour = COLOURS[2] if right[i, j] else COLOURS[1]
        panel.set_title(f"{scores['answer'][i, j]:.2f}\n{verdict}", fontsize=12, color=colour)
    row[0].set_ylabel("\n".join(wrap(tests[i].prompt, 16)), fontsize=11)
lesson.show(figure, "candidates", f"{CANDIDATES} candidates for each of three prompts, ordered by "
            '"answer", whose probability of yes is given; right and wrong by read_scene; 4 steps')

# %% [markdown]
# ### How many are right, for growing N
#
# The best of N is the candidate with the highest score among N. There are many ways to take N of
# the m candidates that were drawn. We need not try them, as the mean over all of them has a
# formula. Let the candidates be ordered from best to worst, r = 0, 1 ... m - 1. Candidate r is the
# best of N if the other N - 1 are among the m - r - 1 behind it. So its probability is
# C(m - r - 1, N - 1) / C(m, N).

# %%
def best_of_n(right, scores, n):
    """How often the best of n candidates is right, a mean over all subsets of n, %.

    right: prompts x candidates, of 0 and 1. scores: the same shape; higher is better.
    """
    m = right.shape[1]
    order = np.argsort(-scores, axis=1, kind="stable")
    ordered = np.take_along_axis(right, order, axis=1)                  # best first
    probability = [math.comb(m - r - 1, n - 1) / math.comb(m, n) for r in range(m)]
    return 100 * float((ordered * probability).sum(1).mean())


def counts_up_to(candidates):
    """1, 2, 4 ... up to the number of candidates."""
    counts = [1]
    while 2 * counts[-1] <= candidates:
        counts.append(2 * counts[-1])
    return counts


def curves(right, scores, counts):
    """Right images of the best of each number of candidates, %: a list for each judge."""
    scores = dict(scores, oracle=right.astype(float))
    result = {}
    for judge, own_scores in scores.items():
        result[judge] = [best_of_n(right, own_scores, n) for n in counts]
    return result


NAMES = {"answer": '"answer": probability of yes', "confidence": '"confidence": saying the prompt',
         "answer_logits": '"answer_logits": raw logits', "oracle": "the oracle, read_scene"}
counts = counts_up_to(CANDIDATES)
in_class = curves(right, scores, counts)
figure, axes = plt.subplots(figsize=(9, 5))
for judge, curve in in_class.items():
    axes.plot(counts, curve, "o-", label=NAMES[judge])
axes.set(xscale="log", xlabel="candidates N", ylabel="right images, %", xticks=counts,
         xticklabels=counts)
axes.minorticks_off()
axes.legend(fontsize=11)
lesson.show(figure, "in_class", f"{len(tests)} prompts of ShapesEval, 4 steps, one seed; the best "
            "of N by each judge")

# %% [markdown]
# ### The judge against the truth
#
# A judge is as good as its order: how often does it prefer the right one of a right and a wrong
# candidate *of the same prompt*? Half of all pairs would be chance. And how do its scores of right
# and of wrong candidates differ?

# %%
def ranking_accuracy(right, scores):
    """Pairs of a right and a wrong candidate of a prompt in which the right one scores higher, %.

    A tie counts half.
    """
    won = 0
    pairs = 0
    for own_right, own_scores in zip(right, scores, strict=True):
        of_right = own_scores[own_right][:, None]                       # right ones, 1
        of_wrong = own_scores[~own_right][None, :]                      # 1, wrong ones
        won += (of_right > of_wrong).sum() + 0.5 * (of_right == of_wrong).sum()
        pairs += of_right.size * of_wrong.size
    return 100 * float(won / max(pairs, 1))


BINS = np.linspace(0, 1, 11)


def share_by_score(scores):
    """Share of these scores in each tenth of the range from 0 to 1, %."""
    return (100 * np.histogram(scores, BINS)[0] / max(1, scores.size)).tolist()


def study(arm, seed, folder):
    """One run of the sweep: all that the figures show of one number of steps and seed."""
    steps = int(arm.removesuffix(" steps"))
    candidates = lesson.size(16, quick=2)
    tests = shapes_eval_prompts()[:lesson.size(48, quick=2)]
    _, right, scores = draw_and_judge(tests, candidates, steps, seed)
    result = dict(counts=counts_up_to(candidates), prompts=len(tests),
                  curves=curves(right, scores, counts_up_to(candidates)),
                  right_of_candidates=right.sum(1).tolist(),
                  yes_of_right=share_by_score(scores["answer"][right]),
                  yes_of_wrong=share_by_score(scores["answer"][~right]))
    for name, values in scores.items():
        result[f"ranking_{name}"] = ranking_accuracy(right, values)
    return result


ARMS = ["4 steps", "24 steps"]
results = lesson.sweep("best_of", ARMS, study)

# %% [markdown]
# ### Three seeds, sixteen candidates
#
# From `--full`: 48 prompts, 16 candidates for each, three seeds of noise and plans, with 4 steps of
# the solver and with 24. On the right are the numbers of Scale-RAE for a language model of 1.5B and
# a DiT of 5.5B. GenEval needs 4 images of each prompt, so the paper keeps the best 4 of 4N
# candidates, where we keep the best 1 of N. Drawn for each image kept are N in both.

# %%
# GenEval, %, without choice, and for the best 4 of 8, 16 and 32.     Source: Scale-RAE, table 5
PAPER_N = [1, 2, 4, 8]
PAPER = {"answer_logits": [53.2, 59.6, 62.5, 64.3], "confidence": [53.2, 56.7, 57.5, 60.0]}
COLOUR_OF = dict(zip(NAMES, COLOURS, strict=False))


def curve_of(arm, judge):
    """Right images by N, %: points x seeds."""
    return np.array([run["curves"][judge] for run in results[arm]]).T


counts = results[ARMS[0]][0]["counts"]
figure, panels = plt.subplots(1, 3, figsize=(15, 5.2), width_ratios=[1, 1, 0.8])
for panel, arm in zip(panels, ARMS, strict=False):
    for judge, name in NAMES.items():
        draw_band(panel, counts, curve_of(arm, judge), name, color=COLOUR_OF[judge])
    panel.set(title=arm, ylim=(65, 101), ylabel="right images, %")
for judge, values in PAPER.items():
    panels[2].plot(PAPER_N, values, "o--", color=COLOUR_OF[judge], label=f'"{judge}"')
panels[2].set(title="the paper", ylabel="GenEval, %")
for panel, ticks in zip(panels, (counts, counts, PAPER_N), strict=True):
    panel.set(xscale="log", xlabel="candidates N for each image kept", xticks=ticks,
              xticklabels=ticks)
    panel.minorticks_off()
panels[1].legend(fontsize=11, loc="lower right")
panels[2].legend(fontsize=11)
PROMPTS = results[ARMS[0]][0]["prompts"]
lesson.show(figure, "three_seeds", f"{PROMPTS} prompts x {counts[-1]} candidates x 3 seeds: mean "
            "and range of the seeds; right: Scale-RAE, table 5")

# %% [markdown]
# ### Steps or candidates?
#
# The same work can be spent in two ways: on one image in 24 steps, or on six candidates in 4 steps
# each. The judge's reading comes on top, and takes less than one step.

# %%
figure, axes = plt.subplots(figsize=(9, 5))
for arm, colour in zip(ARMS, COLOURS, strict=False):
    steps = int(arm.removesuffix(" steps"))
    draw_band(axes, steps * np.array(counts), curve_of(arm, "answer"), f'{arm}, best by "answer"',
              color=colour)
axes.set(xscale="log", xlabel="steps of the solver for each image kept", ylabel="right images, %",
         xticks=[4, 8, 16, 32, 64, 128, 256], xticklabels=[4, 8, 16, 32, 64, 128, 256])
axes.minorticks_off()
axes.legend()
lesson.show(figure, "equal_work", f"N = {counts}; {PROMPTS} prompts, mean and range of 3 seeds")

# %% [markdown]
# ### Why it stops
#
# Two things can stop the curve. There may be nothing to choose: all candidates of a prompt are
# right, or all are wrong. Or the judge chooses badly. How much *should* a judge gain that orders
# 70% of the pairs rightly? To find out, we make one up. Its scores are random: normal, of standard
# deviation 1, with a mean for right candidates that lies above the mean for wrong ones. The
# distance of the means is such that it wins as many pairs as the real judge, and it is the same for
# all prompts.

# %%
def made_up_judge(right_of_candidates, accuracy, counts, repeats=200):
    """Right images by N, %, of a judge with independent errors that wins `accuracy` % of all pairs.

    right_of_candidates: for each prompt, how many of its m candidates are right. counts: the
    numbers N of candidates, of which the last is m. repeats: of the random scores.
    """
    rng = np.random.default_rng(0)
    m = counts[-1]
    right = np.arange(m) < np.array(right_of_candidates)[:, None]       # n m
    right = np.tile(right, (repeats, 1))                                # n*repeats m
    # The difference of two scores has standard deviation sqrt(2). So for means at a distance d
    #     P(right > wrong) = Phi(d / sqrt(2))
    distance = math.sqrt(2) * NormalDist().inv_cdf(accuracy / 100)
    scores = distance * right + rng.standard_normal(right.shape)
    return [best_of_n(right, scores, n) for n in counts]


def mean_over_seeds(arm, key):
    return np.mean([run[key] for run in results[arm]], axis=0)


arm = "4 steps"
figure, panels = plt.subplots(1, 3, figsize=(15, 5))
centres = (BINS[1:] + BINS[:-1]) / 2
yes_of_right = mean_over_seeds(arm, "yes_of_right")                     # bins
yes_of_wrong = mean_over_seeds(arm, "yes_of_wrong")                     # bins
panels[0].bar(centres - 0.022, yes_of_right, 0.043, label="right candidates", color=COLOURS[2])
panels[0].bar(centres + 0.022, yes_of_wrong, 0.043, label="wrong candidates", color=COLOURS[1])
panels[0].set(xlabel="the judge's probability of yes", ylabel="candidates of this kind, %")
panels[0].legend(fontsize=11)

right_of_candidates = np.concatenate([run["right_of_candidates"] for run in results[arm]])
panels[1].hist(right_of_candidates, np.arange(counts[-1] + 2) - 0.5, color=COLOURS[0])
panels[1].set(xlabel=f"right ones among {counts[-1]} candidates",
              ylabel=f"prompts, of 3 x {PROMPTS}",
              xticks=range(0, counts[-1] + 1, 4))

made_up = []
for run in results[arm]:
    made_up.append(made_up_judge(run["right_of_candidates"], run["ranking_answer"], counts))
draw_band(panels[2], counts, curve_of(arm, "oracle"), "the oracle", color=COLOUR_OF["oracle"])
draw_band(panels[2], counts, np.array(made_up).T, "made-up judge, as accurate", color=COLOURS[6])
draw_band(panels[2], counts, curve_of(arm, "answer"), 'the real judge, "answer"', color=COLOURS[0])
panels[2].set(xscale="log", xlabel="candidates N", ylabel="right images, %", ylim=(72, 101),
              xticks=counts, xticklabels=counts)
panels[2].minorticks_off()
panels[2].legend(fontsize=11)
lesson.show(figure, "why_it_stops", f"4 steps; {PROMPTS} prompts x {counts[-1]} "
            "candidates x 3 seeds; left: mean of the seeds, right: mean and range")

# %% [markdown]
# ## Figure
#
# 1. *Candidates*: of "four red squares" no candidate is right, so no judge can help. Of "two blue
#    squares", the judge prefers two wrong images to the right one. Of the third prompt, it finds a
#    right one. Most wrong images have dented outlines, so that `read_scene` cannot tell the shape.
#    Some of them get as much "yes" as right ones.
# 2. *In class* and *three seeds*: the oracle comes to 100% or close. "answer" goes part of the way,
#    most of it from N = 1 to 4. With 4 steps it stops there, and in one of the three seeds it
#    falls. With 24 steps it keeps rising slowly. "confidence" hardly gains, and at N = 16 with 24
#    steps it loses.
# 3. *Equal work*: for the work of one image in 24 steps, both ways are about equally good. For more
#    work than that, several candidates of 24 steps are better than many of 4.
# 4. *Why it stops*, left: half of the right candidates get a "yes" above 0.9, and so does every
#    eighth wrong one. The panel mixes all prompts, and easy prompts get higher scores. That does
#    not help to choose among the candidates of one prompt. Middle: each prompt has a right
#    candidate, so there is something to choose. Right: at N = 2 the real judge gains as much as the
#    made-up one, as it must, since both win as many pairs. From N = 4 on it falls behind. So its
#    errors are not as the made-up judge has them: independent, normal, and as frequent in one
#    prompt as in another. Exercise 5 looks at the last of the three.
#
# ## Number
#
# Mean and range of three seeds, 48 prompts, 16 candidates for each; right images in %. N = 1 is
# without choice, so it is the same for all judges. The last column has the pairs of a right and a
# wrong candidate that are ordered rightly (`ranking_accuracy`):
#
# | steps, judge | N = 1 | N = 4 | N = 16 | pairs |
# |---|---|---|---|---|
# | 4, answer | 81.2 (80.5 to 82.3) | 88.2 (85.1 to 89.8) | 87.5 (81.2 to 91.7) | 70% (65 to 72) |
# | 4, confidence | | 82.7 (80.5 to 85.0) | 81.9 (77.1 to 87.5) | 55% (54 to 56) |
# | 4, oracle | | 98.3 (97.4 to 98.9) | 100 | |
# | 24, answer | 89.0 (88.4 to 89.6) | 94.5 (93.9 to 95.0) | 96.5 (95.8 to 97.9) | 72% (72 to 73) |
# | 24, confidence | | 90.8 (90.7 to 91.1) | 87.5 (85.4 to 89.6) | 57% (56 to 59) |
# | 24, oracle | | 99.8 (99.6 to 99.9) | 100 | |
#
# At N = 16 each seed decides 48 times, so one seed is good to about 4 points. The means of
# "answer_logits" are within 1.5 points of those of "answer".

# %%
def percent(arm, judge, n):
    """Right images of the best of n, mean over seeds, %."""
    return curve_of(arm, judge)[counts.index(n)].mean()


for arm in ARMS:
    gain = percent(arm, "answer", 4) - percent(arm, "answer", 1)
    lesson.number(f'{arm}: gain of the best of 4 by "answer", points', gain, 3, 12)
    gain = percent(arm, "confidence", 4) - percent(arm, "confidence", 1)
    lesson.number(f'{arm}: gain of the best of 4 by "confidence", points', gain, -2, 5)
    lesson.number(f"{arm}: best of 16 by the oracle, %", percent(arm, "oracle", 16), 97, 100)
lesson.number("in class: right candidates, %", 100 * right.mean(), 70, 90, quick=(0, 100))
lesson.number("in class: pairs that the judge orders rightly, %",
              ranking_accuracy(right, scores["answer"]), 60, 95, quick=(0, 100))
lesson.number("in class: best of 8 by the judge, %", in_class["answer"][-1], 80, 100,
              quick=(0, 100))
lesson.number("in class: best of 8 by the oracle, %", in_class["oracle"][-1], 90, 100,
              quick=(0, 100))
lesson.end()

# %% [markdown]
# ## Exercise
#
# 1. If the model is right with probability p in each attempt, and attempts are independent, the
#    oracle's best of N is right with probability `1 - (1 - p) ** N`. Compare with the measured
#    oracle at 4 steps. Which assumption is wrong?
# 2. Choose by two judges at once: rank the candidates by each and add the ranks. Is the sum better
#    than the better one of the two?
# 3. The paper keeps the best 4 of 4N, we keep the best 1 of N. Which of the two ways gains more
#    from the same judge?
# 4. What would you collect to make the judge better, and why does it help most to collect it from
#    the model itself?
# 5. Apply `ranking_accuracy` to each prompt alone, for example
#    `ranking_accuracy(right[i:i + 1], scores["answer"][i:i + 1])`, and to all prompts as if they
#    were one, `ranking_accuracy(right.reshape(1, -1), scores["answer"].reshape(1, -1))`. What do
#    you find, and what does it say about the left and the right panel of the last figure?
#
# <details><summary>Answers</summary>
#
# 1. Attempts are independent for each prompt, but p differs from prompt to prompt: see the
#    histogram. With p = 80% for all, the best of 8 would be right in all but 3 of a million; in
#    class it is in 98%.
# 2. Ranks are `scores["answer"].argsort(1).argsort(1)`; add those of "confidence", and give the sum
#    to `best_of_n`. In class the sum of both is right in 87.5% for N = 8, "answer" alone in 89.6%,
#    a difference of one prompt. With 16 candidates and three seeds it is 86.1% and 87.5% for
#    N = 16. So the sum gains nothing, and whether it loses, 48 prompts cannot tell.
# 3. The paper's way. To keep the best of each of four groups of N is one of many ways to keep 4 of
#    4N, and no other way has as high scores as the best 4 of all. By the oracle, the best 4 of 16
#    are right in 99.1%, the best of 4 in 98.3%. By "answer" both are right in 88.2%. (4 steps, mean
#    of three seeds.)
# 4. Its own mistakes, with the truth from `read_scene`. One could also render wrong scenes, but
#    there the objects are wrong and their outlines clean. Images that the model draws have dents.
#    The judge of the shipped model was taught by such images (`assets/teach_verifier.py`).
# 5. In class, 28 of the 48 prompts have both right and wrong candidates, and in 2 of these the
#    judge orders less than half of the pairs rightly: there, more candidates do harm. Of all pairs,
#    it orders 84% rightly, of those within a prompt 74%. So the left panel flatters the judge. With
#    16 candidates and three seeds, the judge fails in this way in 2 to 8 of about 35 prompts. A
#    made-up judge with the accuracy of each prompt is right in 90% at N = 16, that of the figure in
#    93%, the real one in 87.5%. So much of the gap comes from prompts that the judge cannot judge.
#    (A prompt has few wrong candidates, so its accuracy is known only roughly.)
#
# </details>
#
# ## The paper says / ours differs
#
# - Scale-RAE (arXiv 2601.16208, section 5, table 5) keeps the best 4 of 4N candidates. With a
#   language model of 1.5B and a DiT of 5.5B, GenEval is 53.2 without choice. By Answer Logits it is
#   59.6, 62.5 and 64.3 for 4 of 8, 16 and 32; by Prompt Confidence 56.7, 57.5 and 60.0. The order
#   is the same here: "answer" is better than "confidence". But "confidence" gains in the paper, and
#   nothing here. With 24 steps "answer" gains up to N = 16, as the paper's does up to N = 8; with 4
#   steps it ends at N = 4.
# - Our judge was taught by the model's own mistakes, the paper's was not. And GenEval leaves much
#   more to gain than our few failures.
# - The paper ranks by the raw logit of the "yes" that was said, before any softmax
#   ("answer_logits"); "answer" is a probability. Here the two hardly differ.

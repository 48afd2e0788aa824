# %% [markdown]
# # Lesson 2: flow matching in five lines
#
# 30 minutes of class, 1 minute on 2 CPU cores. Needs: gradients, normal distributions. A small DiT
# learns to draw points of a spiral in the plane, by the very loss and solvers that draw images in
# the other lessons. In the plane, everything can be looked at.

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
import matplotlib.pyplot as plt
import torch
from lesson import COLOURS, Lesson

from model import DiT, flow_matching_loss, sample_times
from sample import euler, time_grid

lesson = Lesson("02_flow_matching")

# %% [markdown]
# ## Question
#
# Take a data point and a noise, and draw the straight line between them. A network is shown a point
# of the line and asked: in which direction does the line run? How does a network that was only ever
# asked this come to draw new data points?
#
# ## Predict
#
# Write down, before you run anything:
#
# 1. The network is asked for the velocity `v = eps - x0` of the line at its point `x_t`. At which
#    `t` is that hardest: near the data (`t = 0`), in the middle, or near the noise (`t = 1`)?
# 2. What do you get if you start from noise and follow the velocity with `t` *rising* from 0 to 1
#    instead of falling from 1 to 0?
# 3. Can the same network, without any training, also tell you its guess of the data point `x0`?
#
# Two of the exercises, `flow_matching_loss` and `euler`, are the very lines that come under *Read*.
# If you want to find them yourself, do `walkthroughs/exercises/flow_matching_loss.py` and
# `euler.py` first.

# %% [markdown]
# ## Read
#
# - `flow_matching_loss` in model.py, `[L9]`: five lines. `x_t` lies on the straight line from `x0`
#   to `eps`; the target `v` is the velocity along it, and does not depend on `t`.
# - `euler` in sample.py, `[S2]`, and stop at its end, as `heun` below it is an exercise.
#   `t_next - t` is negative, so that a step goes *against* `v`, which points to the noise. A sign
#   error would hide there.
# - `time_grid` in sample.py, `[S1]`: times from 1 to 0. Pass over `release_grid`.
# - `sample_times` in model.py, `[L8]`: how often each `t` is trained. Here all alike, and without
#   the shift, which is lesson 4.

# %% [markdown]
# ## Run
#
# ### The data
#
# Points of a spiral, with a little thickness. Their mean is 0 and their variance 1, like that of
# the noise. A point is a "latent" of 2 channels on a grid of one token, `b 2 1 1`.

# %%
def spiral(n):
    """n points of the spiral: n 2 1 1, of mean 0 and variance 1 over both coordinates."""
    turn = 3 * torch.pi * torch.rand(n).sqrt()
    points = torch.stack([turn * turn.cos(), turn * turn.sin()], dim=1) / 4.4       # n 2
    points = points + 0.03 * torch.randn(n, 2)
    points = (points - torch.tensor([-0.10, 0.44])) / 1.025
    return points[:, :, None, None]


def train(prediction, steps, batch=256):
    """A small DiT, trained to draw the spiral. prediction: what its last layer says, "v" or "x0".
    """
    torch.manual_seed(0)
    model = DiT(in_channels=2, grid=1, width=64, depth=2, heads=4, num_classes=1, class_dropout=0)
    model.prediction = prediction
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    label = torch.zeros(batch, dtype=torch.long)                        # the only class
    for _ in range(steps):
        x0 = spiral(batch)                                              # b 2 1 1
        t = sample_times(batch, "uniform", dim=1, base=1)               # b
        eps = torch.randn_like(x0)                                      # b 2 1 1
        loss = flow_matching_loss(model, x0, label, t, eps)             # b
        if prediction == "x0":                     # see "One network, read in two ways"
            loss = t.square() * loss
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


STEPS = lesson.size(1200, quick=60)
POINTS = lesson.size(1500, quick=300)
model = train("v", STEPS)


@torch.no_grad()
def velocity(x, t):
    """What the solvers ask for: the velocity at x b 2 1 1 and t b."""
    return model(x, t, torch.zeros(len(x), dtype=torch.long))


print(f"trained for {STEPS} steps")

# %% [markdown]
# ### From noise to data
#
# The solver starts from normal noise at `t = 1` and follows the velocity down to `t = 0`.

# %%
torch.manual_seed(1)
noise = torch.randn(POINTS, 2, 1, 1)
data = spiral(POINTS)
times = time_grid(steps=50, shift=1)
states = [noise]
for k in range(len(times) - 1):
    states.append(euler(velocity, states[-1], times[k:k + 2]))
samples = states[-1]


def scatter(panel, points, title, colour=COLOURS[5]):
    """Draw points n 2 1 1 into a panel."""
    panel.scatter(*points.flatten(1).T, s=4, alpha=0.5, color=colour)
    panel.set_title(title)
    panel.set_aspect("equal")


figure, panels = plt.subplots(2, 3, figsize=(12, 8.5), sharex=True, sharey=True)
for panel, k in zip(panels.flat, (0, 20, 35, 40, 50), strict=False):
    scatter(panel, states[k], f"t = {times[k]:.1f}")
    for i in range(8):                                                  # the way of eight points
        path = torch.stack([state[i].flatten() for state in states[:k + 1]])
        panel.plot(*path.T, color="black", linewidth=1.5)
        panel.plot(*path[0], "o", color=COLOURS[1])
scatter(panels[1, 2], data, "the data", COLOURS[2])
panels[0, 0].set(xlim=(-3, 3), ylim=(-3, 3))
for panel in panels[:, 0]:
    panel.set_ylabel("second coordinate")
for panel in panels[1]:
    panel.set_xlabel("first coordinate")
lesson.show(figure, "trajectories", f"{POINTS} points on their way from noise to data, 50 steps of "
            "Euler; black: the ways of 8 of them, from their noise (red dot) on; green: data")

# %% [markdown]
# ### The direction of time
#
# The same velocity, followed the wrong way: from *noise*, with `t` rising. And followed from the
# *data* with `t` rising: that is the road back.

# %%
backwards = times.flip(0)                                               # from 0 to 1
figure, panels = plt.subplots(1, 3, figsize=(13, 4.8), sharex=True, sharey=True)
scatter(panels[0], samples, "from noise, t falls from 1 to 0")
scatter(panels[1], euler(velocity, noise, backwards), "a mistake:\nfrom noise, t rises from 0 to 1")
scatter(panels[2], euler(velocity, data, backwards), "from data, t rises from 0 to 1")
panels[0].set(ylabel="second coordinate", xlim=(-5, 5), ylim=(-5, 5))
for panel in panels:
    panel.set_xlabel("first coordinate")
lesson.show(figure, "direction_of_time", f"where {POINTS} points end, by the same network in all "
            "three; a few points of the second panel lie outside")

# %% [markdown]
# ### The loss by time
#
# At each `t`, the mean squared error of the velocity, for each coordinate. Whoever always answers
# "the velocity is 0" scores 2: the variance of the data and that of the noise. And nobody can do
# better than to answer the mean velocity of all lines that pass through `x_t`. With many data
# points at hand, that mean can be computed without any network.

# %%
grid = torch.linspace(0.02, 0.98, 25)
MANY = lesson.size(4000, quick=500)
LABEL = torch.zeros(MANY, dtype=torch.long)


class BestAnswer:
    """A "model" that knows the data: its velocity is the mean over all lines through x_t."""
    def __init__(self, data):
        self.data = data.flatten(1)                                     # m 2

    def __call__(self, x_t, t, y):
        x_t, t = x_t.flatten(1), t[:, None]                             # b 2, b 1
        # The line to data point j passes through x_t if its noise was (x_t - (1-t) x0) / t.
        distances = torch.cdist(x_t, (1 - t[0]) * self.data) / t        # b m
        weight = (-distances.square() / 2).softmax(dim=1)               # b m
        x0 = weight @ self.data                                         # b 2, their mean
        return ((x_t - x0) / t)[:, :, None, None]


@torch.no_grad()
def loss_at(network, t):
    """The mean loss of a network at one time."""
    torch.manual_seed(2)
    x0 = spiral(MANY)
    return flow_matching_loss(network, x0, LABEL, t.expand(MANY), torch.randn_like(x0)).mean()


best_answer = BestAnswer(spiral(lesson.size(20_000, quick=2000)))
error_of_v = torch.stack([loss_at(model, t) for t in grid])
best = torch.stack([loss_at(best_answer, t) for t in grid])
figure, axes = plt.subplots(figsize=(9, 5.4))
axes.plot(grid, error_of_v, "o-", label="the network's velocity: the loss")
axes.plot(grid, best, "k:", linewidth=2, label="the best possible answer")
axes.plot(grid, grid.square() * error_of_v, "s-", label="its guess of x0: the loss times t squared")
axes.axhline(2, color="black", linestyle="--", linewidth=1)
axes.annotate("always answering 0", (0.02, 2.03), fontsize=12)
axes.set(xlabel="time t (0: data, 1: noise)", ylabel="squared error per coordinate", ylim=(0, 3.1))
axes.legend(loc="upper right")
lesson.show(figure, "loss_by_time", f"{MANY} points at each of 25 times")

# %% [markdown]
# ### One network, read in two ways
#
# `x_t = x0 + t v`, so whoever knows the velocity knows `x0 = x_t - t v`, and whoever knows `x0`
# knows `v = (x_t - x0) / t`. An error of `v` is an error of `x0` divided by `t`: that is where the
# `t.square()` in `train` comes from, which makes the loss that of `x0`. (`DiTBase.velocity` in
# model.py divides by 0.05 at least.)
#
# First three panels: the guess of `x0` by the network that was trained for `v`. Last: a second
# network whose last layer says `x0`, drawn from by the same solver.

# %%
x0_model = train("x0", STEPS)


@torch.no_grad()
def velocity_of_x0_model(x, t):
    """The velocity that the second network's guesses of x0 amount to."""
    return x0_model(x, t, torch.zeros(len(x), dtype=torch.long))


samples_of_x0_model = euler(velocity_of_x0_model, noise, times)
figure, panels = plt.subplots(1, 4, figsize=(15, 4.4), sharex=True, sharey=True)
for panel, k in zip(panels, (0, 25, 45), strict=False):
    t = times[k].float()
    guess = states[k] - t * velocity(states[k], t.expand(POINTS))
    scatter(panel, guess, f"network for v:\nguess of x0 at t = {t:.1f}")
    panel.plot(0, 0, "+", color="black", markersize=14)
scatter(panels[3], samples_of_x0_model, "network for x0:\nits samples", COLOURS[2])
panels[0].set(ylabel="second coordinate", xlim=(-3, 3), ylim=(-3, 3))
for panel in panels:
    panel.set_xlabel("first coordinate")
lesson.show(figure, "two_readings", f"{POINTS} points each; cross: the mean of the data")

# %% [markdown]
# ## Figure
#
# 1. *Trajectories*: they bend. Each straight line of the loss belongs to one pair of a data point
#    and a noise; the network learns their mean at each place, and following means is no straight
#    line. At `t = 0.3` the cloud is still a blob, at 0.2 it has arms. The inner end of the spiral
#    stays a little blurred: its arms are close together, and the network small.
# 2. *Direction of time* (prediction 2): with `t` rising from noise, the network is told "this is
#    almost data" at places where it has never seen any. Its answers there mean nothing, and most
#    points are thrown outwards. From the data, the road back ends in noise, but for a trace of the
#    spiral in the middle: there the network is at its worst.
# 3. *Loss by time* (prediction 1): the velocity is hardest in the middle. At `t = 1` the point is
#    the noise, so `eps` is known and `x0` is open: error 1. At `t = 0` it is the data point, and
#    `eps` is open: error 1. In between, neither is known, and at `t = 0.5` even the best answer is
#    hardly better than 0. The dip at `t = 0.1` belongs to *thin* data: a step off the curve can
#    only be noise, so half of `eps` is known. The network is close to the best possible answer, so
#    a loss that stays high is no bad training.
# 4. *Two readings* (prediction 3): at `t = 1` the guesses lie about the mean of the data, as
#    nothing else is known; at `t = 0.1` they are points of the spiral. The network that says `x0`
#    draws a spiral as well.
#
# ## Number
#
# How many samples lie on the spiral, that is within 0.05 of one of 20,000 of its points: 94% with
# both networks, where fresh points of the spiral have 100% and the noise has 19%. What is missing
# lies at the inner end. The error of the velocity at `t = 0.5`: 1.90, where the best possible
# answer has 1.90.

# %%
def on_spiral(points):
    """How many of these points n 2 1 1 lie within 0.05 of a point of the spiral, %."""
    torch.manual_seed(3)
    dense = spiral(20_000).flatten(1)                                   # m 2
    nearest = torch.cdist(points.flatten(1), dense).min(1).values       # n
    return 100 * float((nearest < 0.05).float().mean())


middle = torch.tensor(0.5)
lesson.number("fresh points on the spiral, %", on_spiral(data), 99.5, 100)
lesson.number("samples on it, network for v, %", on_spiral(samples), 88, 100, quick=(2, 100))
lesson.number("samples on it, network for x0, %", on_spiral(samples_of_x0_model), 88, 100,
              quick=(2, 100))
lesson.number("noise on it, %", on_spiral(noise), 12, 26)
lesson.number("error of the velocity at t = 0.5", loss_at(model, middle), 1.8, 2.0,
              quick=(1.5, 2.5))
lesson.number("the best possible error at t = 0.5", loss_at(best_answer, middle), 1.75, 1.95,
              quick=(1.5, 2.2))
lesson.end()

# %% [markdown]
# ## Exercise
#
# Fill in `flow_matching_loss.py`, `euler.py` and `heun.py` in `walkthroughs/exercises/`, then run
# `python walkthroughs/exercises/check.py flow_matching_loss euler heun`. And, in a new cell at the
# end of the notebook, or after `python -i walkthroughs/02_flow_matching.py`:
#
# 1. Why does a single step, `euler(velocity, noise, time_grid(1, 1))`, send every point to about
#    the same place? What place is it?
# 2. `heun` (`from sample import heun`) evaluates the velocity twice in a step. Compare `on_spiral`
#    of `heun(velocity, noise, time_grid(5, 1))` and of `euler(velocity, noise, time_grid(9, 1))`:
#    nine evaluations each.
# 3. In the loss, why may `t` be drawn by any law without changing what the best network is?
#
# <details><summary>Answers</summary>
#
# 1. One step lands at `x - v`, the guess of `x0` at `t = 1`, where `x_t` says nothing about the
#    data: the mean of the spiral. (The first panel of the last figure.)
# 2. With nine evaluations, Heun has 93% and Euler 90%, with 19 (`time_grid(10, 1)`) 95% against
#    93%. With five (`time_grid(3, 1)`) Heun loses, 62% against 80%: its steps are too long for the
#    bends.
# 3. The loss is minimal at each `t` by itself, at the mean of `eps - x0` given `x_t`. The law of
#    `t` only says how much of a limited network's and training's effort each time gets: lesson 4.
#
# </details>
#
# ## The paper says / ours differs
#
# - Paper 1 (arXiv 2510.11690, section 2) trains this loss for `v`, and samples with 50 steps of
#   Euler. On the tiny encoder's latents, the default of train_dit.py is to predict `x0`
#   (`--prediction x0`): few of their directions vary, so data are easier to predict than noise
#   (lesson 3; arXiv 2511.13720).
# - `t = 0` is data here, in both papers and in their code. Other code counts the other way, from
#   noise at 0 to data at 1, so that its velocity is `x0 - eps`: lesson 7 converts.
# - The loss that the paper plots is that of `v`. The log of a training for `x0` shows it times
#   `time_weight` (model.py, `[L10]`), so the losses of the two kinds of training cannot be
#   compared.

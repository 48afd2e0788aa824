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
# How does a network that was only ever asked "in which direction did this noisy point move?" come
# to draw new points?
#
# ## Predict
#
# Write down, before you run anything:
#
# 1. The network is asked for `v = eps - x0` at a point `x_t` between a data point and a noise. At
#    which `t` is that question hardest: near the data (`t = 0`), in the middle, or near the noise
#    (`t = 1`)?
# 2. What do you get if you follow the velocity from noise with `t` *rising* from 0 to 1 instead of
#    falling from 1 to 0?
# 3. Can the same network, without any training, also tell you its guess of the data point `x0`?

# %% [markdown]
# ## Read
#
# - `flow_matching_loss` in model.py, `[L9]`: five lines. `x_t` lies on the straight line from `x0`
#   to `eps`; the target `v` is the velocity along it, and does not depend on `t`.
# - `euler` in sample.py, `[S2]`: `t_next - t` is negative. Where would a sign error hide?
# - `time_grid` in sample.py, `[S1]`: from 1 to 0.
# - `sample_times` in model.py, `[L8]`: how often each `t` is trained. Here `dim = base`, so that
#   there is no shift (lesson 4 is about it).

# %% [markdown]
# ## Run
#
# The data: a spiral in the plane, scaled to unit variance. A point is a "latent" of 2 channels on a
# grid of one token, `b 2 1 1`.

# %%
def spiral(n):
    """n points of a spiral with a little thickness: n 2 1 1."""
    turn = 3 * torch.pi * torch.rand(n).sqrt()
    points = torch.stack([turn * turn.cos(), turn * turn.sin()], dim=1)     # n 2
    points = points / 4.4 + 0.03 * torch.randn(n, 2)
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
        if prediction == "x0":
            loss = t.square() * loss                                    # the error of x0 itself
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
times = time_grid(steps=50, shift=1)
states = [noise]
for k in range(len(times) - 1):
    states.append(euler(velocity, states[-1], times[k:k + 2]))
samples = states[-1]

figure, panels = plt.subplots(1, 5, figsize=(15, 4.2), sharex=True, sharey=True)
for panel, k in zip(panels, (0, 20, 35, 45, 50), strict=True):
    points = states[k].flatten(1)                                       # n 2
    panel.scatter(*points.T, s=3, color=COLOURS[0])
    for i in range(12):                                                 # the way of twelve points
        path = torch.stack([state[i].flatten() for state in states[:k + 1]])
        panel.plot(*path.T, color=COLOURS[1], linewidth=1)
    panel.set_title(f"t = {times[k]:.1f}")
    panel.set_aspect("equal")
panels[0].set(ylabel="second coordinate", xlim=(-3, 3), ylim=(-3, 3))
panels[2].set_xlabel("first coordinate (data have unit variance)")
lesson.show(figure, "trajectories", f"{POINTS} points (blue) from noise to data, and the ways of "
            "12 of them (red); 50 steps of Euler")

# %% [markdown]
# ### The direction of time
#
# The same velocity, followed the wrong way: from *noise*, with `t` rising. And followed from the
# *data* with `t` rising: that is the road back, and ends in noise.

# %%
backwards = times.flip(0)                                               # from 0 to 1
runs = {
    "from noise, t falls 1 to 0": samples,
    "from noise, t rises 0 to 1 (a mistake)": euler(velocity, noise, backwards),
    "from data, t rises 0 to 1": euler(velocity, spiral(POINTS), backwards),
}
figure, panels = plt.subplots(1, 3, figsize=(13, 4.8), sharex=True, sharey=True)
for panel, (name, points) in zip(panels, runs.items(), strict=True):
    panel.scatter(*points.flatten(1).T, s=3, color=COLOURS[0])
    panel.set_title(name, fontsize=11)
    panel.set_aspect("equal")
panels[0].set(ylabel="second coordinate", xlim=(-5, 5), ylim=(-5, 5))
panels[1].set_xlabel("first coordinate")
lesson.show(figure, "direction_of_time",
            f"where {POINTS} points end; the same network in all three")

# %% [markdown]
# ### The loss by time
#
# At each `t`, the mean squared error of the velocity. Data and noise have variance 1 each, so
# whoever always answers "the velocity is 0" scores about 2.

# %%
grid = torch.linspace(0.02, 0.98, 25)
MANY = lesson.size(4000, quick=500)


@torch.no_grad()
def loss_at(network, t):
    """The mean loss of a network at one time."""
    torch.manual_seed(2)
    x0 = spiral(MANY)
    label = torch.zeros(MANY, dtype=torch.long)
    return flow_matching_loss(network, x0, label, t.expand(MANY), torch.randn_like(x0)).mean()


error_of_v = torch.stack([loss_at(model, t) for t in grid])
figure, axes = plt.subplots(figsize=(8, 4.8))
axes.plot(grid, error_of_v, "o-", label="velocity: the loss")
axes.plot(grid, grid.square() * error_of_v, "s-", label="guess of x0: the loss times t squared")
axes.axhline(2, color="black", linestyle="--", linewidth=1)
axes.annotate("the answer is always 0", (0.02, 2.03), fontsize=10)
axes.set(xlabel="time t (0: data, 1: noise)", ylabel="squared error per coordinate", ylim=(0, 2.3))
axes.legend()
lesson.show(figure, "loss_by_time", f"{MANY} points at each of 25 times")

# %% [markdown]
# ### One network, read in two ways
#
# `x_t = x0 + t v`, so whoever knows the velocity knows `x0 = x_t - t v`, and the other way round:
# `v = (x_t - x0) / t` (`DiTBase.velocity` in model.py). Left: the guess of `x0` by the network that
# was trained for `v`, at three times. Right: a second network whose last layer says `x0`, drawn
# from by the same solver.

# %%
x0_model = train("x0", STEPS)


@torch.no_grad()
def velocity_of_x0_model(x, t):
    return x0_model(x, t, torch.zeros(len(x), dtype=torch.long))


samples_of_x0_model = euler(velocity_of_x0_model, noise, times)
figure, panels = plt.subplots(1, 4, figsize=(15, 4.4), sharex=True, sharey=True)
for panel, k in zip(panels, (0, 25, 45), strict=False):
    t = times[k].float()
    guess = states[k] - t * velocity(states[k], t.expand(len(noise)))
    panel.scatter(*guess.flatten(1).T, s=3, color=COLOURS[0])
    panel.set_title(f"network for v:\nguess of x0 at t = {t:.1f}", fontsize=11)
panels[3].scatter(*samples_of_x0_model.flatten(1).T, s=3, color=COLOURS[2])
panels[3].set_title("network for x0:\nits samples", fontsize=11)
for panel in panels:
    panel.set_aspect("equal")
panels[0].set(ylabel="second coordinate", xlim=(-3, 3), ylim=(-3, 3))
panels[1].set_xlabel("first coordinate")
lesson.show(figure, "two_readings", f"{POINTS} points each; at t = 1 the best guess is the mean of "
            "all data, as nothing else is known")

# %% [markdown]
# ## Figure
#
# 1. *Trajectories*: they bend. Each straight line of the loss belongs to one pair of a data point
#    and a noise; the network learns their mean at each place, and the mean of many lines is no
#    line. The arms of the spiral separate late, below `t = 0.3`.
# 2. *Direction of time*: only the first panel is a spiral. In the last, the road from the data ends
#    in noise: the same ODE, followed the other way.
# 3. *Loss by time*: the velocity is hardest in the middle. At `t = 1` the point is the noise, so
#    `eps` is known, and `x0` is open: error 1. At `t = 0` it is the data point, and `eps` is open:
#    error 1. In between, neither is known. The guess of `x0` gets better all the way down.
# 4. *Two readings*: at `t = 1` every guess is the mean of the data, at `t = 0.1` it is a point of
#    the spiral. The network that says `x0` draws the same spiral.
#
# ## Number
#
# How many samples lie on the spiral, that is within 0.05 of one of 20,000 of its points: about 95%
# with both networks, where fresh points of the spiral have 100% and the noise has 15%. The error of
# the velocity at `t = 0.5`: 1.94.

# %%
def on_spiral(points):
    """How many of these points n 2 1 1 lie within 0.05 of a point of the spiral, %."""
    torch.manual_seed(3)
    data = spiral(20_000).flatten(1)                                    # m 2
    nearest = torch.cdist(points.flatten(1), data).min(1).values        # n
    return 100 * float((nearest < 0.05).float().mean())


lesson.number("fresh points on the spiral, %", on_spiral(spiral(POINTS)), 99.5, 100)
lesson.number("samples on it, network for v, %", on_spiral(samples), 88, 100, quick=(2, 100))
lesson.number("samples on it, network for x0, %", on_spiral(samples_of_x0_model), 88, 100,
              quick=(2, 100))
lesson.number("noise on it, %", on_spiral(noise), 10, 20)
lesson.number("error of the velocity at t = 0.5", loss_at(model, torch.tensor(0.5)), 1.8, 2.0,
              quick=(1.5, 2.5))
lesson.end()

# %% [markdown]
# ## Exercise
#
# Fill in `walkthroughs/exercises/flow_matching_loss.py`, `euler.py` and `heun.py`, then run
# `python walkthroughs/exercises/check.py flow_matching_loss euler heun`. And, with this lesson:
#
# 1. Why does the solver with one single step, `euler(velocity, noise, time_grid(1, 1))`, send every
#    point to about the same place? What place is it?
# 2. `heun` evaluates the velocity twice in a step. Draw with
#    `heun(velocity, noise, time_grid(5, 1))` and with `euler(velocity, noise, time_grid(9, 1))`:
#    nine evaluations each (`from sample import heun`). Of which do more points lie on the spiral?
# 3. In the loss, why may `t` be drawn by any law without changing what the best network is?
#
# <details><summary>Answers</summary>
#
# 1. One step lands at `x - v`, the guess of `x0` at `t = 1`, where `x_t` says nothing about the
#    data: the mean of the spiral. (The first panel of the last figure.)
# 2. Run it: `on_spiral(heun(velocity, noise, time_grid(5, 1)))` against the same of `euler`. With
#    nine evaluations 92% against 89%, with 19 (`time_grid(10, 1)`) 94% against 93%. With five
#    (`time_grid(3, 1)`) Heun loses, 65% against 79%: its steps are too long for the bends.
# 3. The loss is minimal at each `t` by itself, at the mean of `eps - x0` given `x_t`. The law of
#    `t` only says how much of a limited network's and training's effort each time gets: lesson 4.
#
# </details>
#
# ## The paper says / ours differs
#
# - Paper 1 (arXiv 2510.11690, section 2) trains the same loss for `v`, and samples with 50 steps of
#   Euler. On the tiny encoder's latents our default predicts `x0` (`--prediction x0`): few of their
#   directions vary, so data are easier to predict than noise (arXiv 2511.13720).
# - `t = 0` is data here, in both papers and their code, and in the paper of SiT. The code of SiT
#   and LightningDiT counts the other way, from noise at 0 to data at 1, so that its velocity is
#   `x0 - eps` (lesson 7 converts).
# - The loss that the paper plots is that of `v`. The training log of an `x0` model shows it times
#   `time_weight(t)` (`[L10]`), so the two cannot be compared.

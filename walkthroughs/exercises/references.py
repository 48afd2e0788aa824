"""What check.py compares each exercise with, on which inputs, and the usual mistakes.

Beware: this file has the solutions. A function reference_NAME(made, ...) computes what the
project's does, in another way, and makes the mistakes whose names are in the set `made`.
"""
import functools
import math
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from comparison import Case, Comparison, Wrong, close, difference, member
from einops import rearrange

import metrics
import model
import sample
import train_decoder
from baselines import Pixels
from data import open_data


def call(function, *inputs):
    return function(*inputs)


def seeded(seed=0):
    """A random generator, so that inputs are equal each time."""
    return torch.Generator().manual_seed(seed)


def column(values):
    """One number for each sample, b, beside latents b c h w."""
    return values.view(-1, 1, 1, 1)


# ------------------------------------------------------------------------------ time_shift
TIME_SHIFT_MISTAKES = {
    "unshifted": "the times come back unshifted",
    "inverse": "the times are shifted towards data (t = 0), not towards noise (t = 1): a and 1/a "
               "are swapped, a = sqrt(dim / base)",
    "root": "the square root is missing: a = sqrt(dim / base)",
    "plus": "the denominator has a + 1 in place of a - 1",
    "a alone": "the denominator has a in place of a - 1",
    "minus": "a sign in the denominator is wrong: it is 1 + (a - 1) t",
    "no denominator": "the denominator is missing",
    "no base": "dim is not divided by base: a = sqrt(dim / base)",
    "numerator": "the numerator lacks its factor a",
    "base": "base is ignored: 4096 is only its default",
}


def reference_time_shift(made, t, dim, base):
    if "unshifted" in made:
        return t
    if "base" in made:
        base = 4096
    a = (dim / base) ** 0.5
    if "no base" in made:
        a = dim ** 0.5
    if "root" in made:
        a = a * a
    if "inverse" in made:
        a = 1 / a
    numerator = t if "numerator" in made else a * t
    slope = a - 1
    if "plus" in made:
        slope = a + 1
    if "a alone" in made:
        slope = a
    if "minus" in made:
        slope = -slope
    if "no denominator" in made:
        return numerator
    return numerator / (1 + slope * t)


def times_to_shift(dtype):
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    return torch.cat([ends, torch.rand(6, generator=seeded(), dtype=dtype)])


time_shift = Comparison(
    "time_shift", model.time_shift, call,
    [Case("768 channels of 16 x 16 tokens", lambda: (times_to_shift(torch.float32), 196608, 4096)),
     Case("base 340", lambda: (times_to_shift(torch.float32), 3072, 340)),
     Case("fewer dimensions than base", lambda: (times_to_shift(torch.float32), 1000, 4096)),
     Case("times in fp64", lambda: (times_to_shift(torch.float64), 12288, 4096)),
     Case("times of shape 2 4", lambda: (times_to_shift(torch.float32).view(2, 4), 3072, 4096)),
     Case("dim = base", lambda: (times_to_shift(torch.float32), 4096, 4096))],
    reference_time_shift, TIME_SHIFT_MISTAKES)


# ------------------------------------------------------------------------------ flow_matching_loss
FLOW_MISTAKES = {
    "time": "t and 1-t are swapped in x_t: t = 0 is data and t = 1 is noise, so "
            "x_t = (1-t) x0 + t eps",
    "mixed minus": "a sign in x_t is wrong: it is x0 + t (eps - x0), which is (1-t) x0 + t eps",
    "mixed sum": "x_t has 1+t where 1-t belongs: x_t = (1-t) x0 + t eps",
    "all of x0": "x_t is x0 + t eps; the data has to fade as the noise comes: (1-t) x0 + t eps",
    "model time": "the model is given 1-t; give it t",
    "sign": "the velocity has the wrong sign: v = eps - x0, not x0 - eps",
    "plus": "the velocity is a difference: v = eps - x0, not eps + x0",
    "times t": "the velocity is multiplied by t; v = eps - x0 alone, at each t (x_t - x0 is t v)",
    "times 1-t": "the velocity is multiplied by 1-t; v = eps - x0 alone, at each t (eps - x_t is "
                 "(1-t) v)",
    "predicts eps": "the model's output is compared with eps; it predicts v = eps - x0",
    "predicts x0": "the model's output is compared with x0; it predicts v = eps - x0",
    "sees data": "the model is given x0 itself; give it x_t",
    "sees noise": "the model is given eps itself; give it x_t",
    "predicts x_t": "the model's output is compared with x_t; it predicts v = eps - x0",
    "absolute": "the error is not squared, only its absolute value is taken",
    "error": "the error is not squared",
    "root": "a square root too many: the loss is the squared error itself",
    "sum": "the errors of a sample are summed; take their mean",
    "batch": "the mean is over the batch, too: return one loss for each sample, b",
    "half": "there is a factor of 1/2 too many",
}


class Velocity(nn.Module):
    """A made-up velocity that depends on all of its arguments, and checks their shapes and dtypes.

    condition_shape: shape of one sample's condition. dtype: that of x, or None for any.
    """
    def __init__(self, condition_shape=(), dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.condition_shape = condition_shape
        self.dtype = dtype

    def forward(self, x, t, y):
        b = len(x)
        if not torch.is_tensor(t) or t.shape != (b,):
            shape = tuple(t.shape) if torch.is_tensor(t) else type(t).__name__
            raise Wrong(f"the velocity is given t as {shape}; it takes one time for each sample, "
                        f"here {(b,)}")
        if self.dtype not in (None, x.dtype):
            raise Wrong(f"the velocity is given x in {dtype_name(x.dtype)}, though it came in "
                        f"{dtype_name(self.dtype)}; keep its dtype (a step as a "
                        f"Python number does, a step as a tensor of another dtype may not)")
        if t.dtype != x.dtype:
            raise Wrong(f"the velocity is given t in {dtype_name(t.dtype)}; give it x's dtype, "
                        f"{dtype_name(x.dtype)}")
        wanted = (b, *self.condition_shape)
        if not torch.is_tensor(y) or y.shape != wanted:
            shape = tuple(y.shape) if torch.is_tensor(y) else type(y).__name__
            raise Wrong(f"the model is given y as {shape} for {b} samples; it takes one condition "
                        f"for each, here {wanted}")
        condition = y.float().reshape(b, -1).sin().mean(1)                 # b
        return torch.sin(self.weight * x + column(condition)) * column(1 + t) + column(t * t)


def dtype_name(dtype):
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def reference_flow_matching_loss(made, velocity, x0, y, t, eps):
    mix = column(1 - t if "time" in made else t)                        # b 1 1 1
    x_t = x0 + mix * (eps - x0)                                         # b c h w
    if "mixed minus" in made:
        x_t = x0 - mix * (eps - x0)
    if "mixed sum" in made:
        x_t = x0 + mix * (eps + x0)
    if "all of x0" in made:
        x_t = x0 + mix * eps
    if "sees data" in made:
        x_t = x0
    if "sees noise" in made:
        x_t = eps
    target = eps - x0                                                   # b c h w
    if "predicts eps" in made:
        target = eps
    if "predicts x0" in made:
        target = x0
    if "predicts x_t" in made:
        target = x_t
    if "plus" in made:
        target = eps + x0
    if "times t" in made:
        target = column(t) * target
    if "times 1-t" in made:
        target = column(1 - t) * target
    if "sign" in made:
        target = -target
    error = velocity(x_t, 1 - t if "model time" in made else t, y) - target         # b c h w
    if "absolute" in made:
        error = error.abs()
    elif "error" not in made:
        error = error ** 2
    if "half" in made:
        error = error / 2
    loss = error.sum((1, 2, 3)) if "sum" in made else error.mean((1, 2, 3))         # b
    if "root" in made:
        loss = loss.sqrt()
    return loss.mean() if "batch" in made else loss


def flow_inputs(b, c, h, w, dtype=torch.float32):
    random = seeded()
    x0 = torch.randn(b, c, h, w, generator=random, dtype=dtype)
    eps = torch.randn(b, c, h, w, generator=random, dtype=dtype)
    t = torch.rand(b, generator=random, dtype=dtype)
    return Velocity(), x0, torch.arange(b), t, eps


def flow_at_the_ends():
    velocity, x0, y, _, eps = flow_inputs(2, 3, 2, 2)
    return velocity, x0, y, torch.tensor([0.0, 1.0]), eps


flow_matching_loss = Comparison(
    "flow_matching_loss", model.flow_matching_loss, call,
    [Case("latents 5 3 4 2", lambda: flow_inputs(5, 3, 4, 2)),
     # Batch, channels, height and width alike: here a wrong broadcast has no wrong shape.
     Case("latents 4 4 4 4", lambda: flow_inputs(4, 4, 4, 4)),
     Case("one sample", lambda: flow_inputs(1, 2, 1, 1)),
     Case("latents in fp64", lambda: flow_inputs(3, 2, 3, 3, torch.float64)),
     Case("t = 0 and t = 1", flow_at_the_ends)],
    reference_flow_matching_loss, FLOW_MISTAKES)


# ------------------------------------------------------------------------------ euler, heun
STEP_MISTAKES = {
    "upward": "the steps go the wrong way: t_next - t is negative on the way from noise to data, "
              "and x becomes x + (t_next - t) v",
    "backward": "the times are walked from the last to the first; they are in order already, from "
                "noise (1) to data (0)",
    "no last": "the last step is missing: N + 1 times make N steps",
    "no first": "the first step is missing: N + 1 times make N steps",
    "only first": "only the first step is taken: is the return inside the loop?",
    "no step": "x comes back as it was: no step changes it",
    "even": "the steps are all of one size; take the difference of neighbouring times",
    "whole": "a step is as long as t; it is as long as t_next - t",
    "whole next": "a step is as long as t_next; it is as long as t_next - t",
    "plus": "the two times of a step are added; it is as long as t_next - t",
    "unit": "the velocity is not multiplied by the length of the step",
    "no x": "x itself is not added: x becomes x + (t_next - t) v",
}
EULER_MISTAKES = {
    **STEP_MISTAKES,
    "next": "the velocity is evaluated at t_next; Euler's step takes it at t",
}
HEUN_MISTAKES = {
    **STEP_MISTAKES,
    "all": "the last step is Heun's; it is to be Euler's, since the velocity at t = 0 is not "
           "trained",
    "at zero": "the last step is Euler's only where it ends at 0; it is to be Euler's wherever it "
               "ends, so compare with the last of the times",
    "euler": "no step has a second evaluation of the velocity: this is Euler's solver",
    "sum": "the two velocities are added; take their mean",
    "difference": "the two velocities are subtracted; take their mean, (v + v_next) / 2",
    "half": "only the second velocity is halved; take the mean of both, (v + v_next) / 2, with the "
            "brackets",
    "half of first": "only the first velocity is halved; take the mean of both, (v + v_next) / 2",
    "second": "only the second velocity is used; take the mean of both",
    "first at next": "the first evaluation is at t_next; it is at t",
    "old time": "the second evaluation is at the old time t; it is at t_next",
    "old x": "the second evaluation is at the old x; it is at Euler's guess x_next",
    "guess upward": "Euler's guess goes the wrong way: x_next = x + (t_next - t) v",
    "guess unit": "in Euler's guess, v is not multiplied by the length of the step: x_next = "
                  "x + (t_next - t) v",
    "guess no x": "in Euler's guess, x itself is not added: x_next = x + (t_next - t) v",
    "midpoint": "this is the midpoint method, which evaluates at the middle of the step; Heun's "
                "evaluates at its end",
    "from guess": "the step starts from the guess x_next; it starts from x",
}


def steps_of(made, times):
    """The (t, t_next) of each step, fp64 numbers."""
    times = times.tolist()
    if "backward" in made:
        times.reverse()
    steps = list(pairwise(times))
    if "no last" in made:
        steps = steps[:-1]
    if "no first" in made:
        steps = steps[1:]
    if "only first" in made:
        steps = steps[:1]
    if "no step" in made:
        steps = []
    return steps


def step_length(made, t, t_next, even):
    """t_next - t. even: the mean of all steps."""
    length = t_next - t
    if "even" in made:
        length = even
    if "whole" in made:
        length = -t
    if "whole next" in made:
        length = -t_next
    if "plus" in made:
        length = t_next + t
    if "unit" in made:
        length = -1
    return -length if "upward" in made else length


def mean_step(times):
    return float(times[-1] - times[0]) / (len(times) - 1)


def velocity_of_solver(dtype):
    """A made-up velocity that depends on x and t, for x of this dtype."""
    model_of_any_condition = Velocity(dtype=dtype)

    def velocity(x, t):
        return model_of_any_condition(x, t, torch.ones(len(x))).detach()
    return velocity


def at(x, t):
    """The same time t for each sample of x: b."""
    return torch.full((x.shape[0],), t, dtype=x.dtype)


def reference_euler(made, velocity, x, times):
    for t, t_next in steps_of(made, times):
        length = step_length(made, t, t_next, mean_step(times))
        v = velocity(x, at(x, t_next if "next" in made else t))
        x = length * v if "no x" in made else x + length * v
    return x


def reference_heun(made, velocity, x, times):
    for t, t_next in steps_of(made, times):
        length = step_length(made, t, t_next, mean_step(times))
        v = velocity(x, at(x, t_next if "first at next" in made else t))
        guess = guess_of_heun(made, x, length, v)
        start = x
        if has_second_evaluation(made, t_next, times):
            if "midpoint" in made:
                v = velocity(x + length / 2 * v, at(x, (t + t_next) / 2))
            else:
                second = velocity(x if "old x" in made else guess,
                                  at(x, t if "old time" in made else t_next))
                v = mean_velocity(made, v, second)
                if "from guess" in made:
                    start = guess
        x = length * v if "no x" in made else start + length * v
    return x


def guess_of_heun(made, x, length, v):
    """Where Euler's step ends."""
    if "guess upward" in made:
        return x - length * v
    if "guess unit" in made:
        return x + v
    if "guess no x" in made:
        return length * v
    return x + length * v


def has_second_evaluation(made, t_next, times):
    """Whether a step is Heun's, not Euler's."""
    if "euler" in made:
        return False
    if "all" in made:
        return True
    if "at zero" in made:
        return t_next != 0
    return t_next != float(times[-1])


def mean_velocity(made, first, second):
    """The velocity of a step of Heun's."""
    if "second" in made:
        return second
    if "sum" in made:
        return first + second
    if "difference" in made:
        return (first - second) / 2
    if "half" in made:
        return first + second / 2
    if "half of first" in made:
        return first / 2 + second
    return (first + second) / 2


def solver_inputs(steps, shape, last=0.0, dtype=torch.float32):
    x = torch.randn(shape, generator=seeded(), dtype=dtype)
    u = torch.linspace(1, last, steps + 1, dtype=torch.float64)
    times = 3 * u / (1 + 2 * u)                                         # uneven: shifted by a = 3
    return velocity_of_solver(dtype), x, times


SOLVER_CASES = [
    Case("5 steps of latents 3 2 4 4", lambda: solver_inputs(5, (3, 2, 4, 4))),
    Case("2 steps", lambda: solver_inputs(2, (2, 3, 1, 2))),
    Case("latents in fp64", lambda: solver_inputs(3, (2, 2, 2, 2), dtype=torch.float64)),
    Case("times that end above 0", lambda: solver_inputs(4, (2, 1, 2, 2), last=0.1)),
    Case("one step of one sample", lambda: solver_inputs(1, (1, 1, 2, 2))),
]


euler = Comparison("euler", sample.euler, call, SOLVER_CASES, reference_euler, EULER_MISTAKES)
heun = Comparison("heun", sample.heun, call, SOLVER_CASES, reference_heun, HEUN_MISTAKES)


# ------------------------------------------------------------------------------ cfg
CFG_MISTAKES = {
    "off by one": "the scale is off by one: v + scale (v - v_null) has to be "
                  "v_null + scale (v - v_null), so that scale 1 gives v",
    "towards": "a sign is wrong, so the velocity moves away from v: v_null + scale (v - v_null), "
               "not v_null + scale (v_null - v)",
    "plus": "v and v_null are added in the brackets: v_null + scale (v - v_null)",
    "no null": "v_null in front is missing: v_null + scale (v - v_null)",
    "swapped": "v and v_null are swapped: the velocity has to move away from v_null, "
               "v_null + scale (v - v_null)",
    "unguided": "the velocity comes back unguided, v itself",
    "null": "the velocity is v_null, that of the null condition alone",
    "product": "the velocity is scale v, without v_null: v_null + scale (v - v_null)",
    "ignored": "the interval is ignored: a sample whose t is outside gets v",
    "inverted": "the interval is inverted: guidance acts inside, not outside",
    "null outside": "a sample whose t is outside the interval gets v_null; it gets v",
    "any": "one sample inside the interval is enough to guide the whole batch; decide for each "
           "sample",
    "all": "all samples must be inside the interval for one to be guided; decide for each sample",
    "ends": "the ends of the interval belong to it: use <=, not <",
    "low end": "the lower end of the interval belongs to it: use <=, not <",
    "high end": "the upper end of the interval belongs to it: use <=, not <",
    "low only": "only the lower end of the interval is looked at; t has to be below the upper, too",
    "high only": "only the upper end of the interval is looked at; t has to be above the lower, "
                 "too",
}


def reference_cfg(made, velocity, y, null, scale, interval, x, t):
    null = torch.as_tensor(null, dtype=y.dtype).broadcast_to(y.shape)
    v = velocity(x, t, y)                                               # b c h w
    v_null = velocity(x, t, null)                                       # b c h w
    if "swapped" in made:
        v, v_null = v_null, v
    guided = v_null + scale * (v - v_null)
    if "off by one" in made:
        guided = v + scale * (v - v_null)
    if "towards" in made:
        guided = v_null - scale * (v - v_null)
    if "plus" in made:
        guided = v_null + scale * (v + v_null)
    if "no null" in made:
        guided = scale * (v - v_null)
    if "product" in made:
        guided = scale * v
    if "unguided" in made:
        guided = v
    if "null" in made:
        guided = v_null
    low, high = interval if interval is not None else (0, 1)
    inside = (t >= low) & (t <= high)                                   # b
    if "ends" in made:
        inside = (t > low) & (t < high)
    if "low end" in made:
        inside = (t > low) & (t <= high)
    if "high end" in made:
        inside = (t >= low) & (t < high)
    if "low only" in made:
        inside = t >= low
    if "high only" in made:
        inside = t <= high
    if "ignored" in made:
        inside = torch.ones_like(inside)
    if "inverted" in made:
        inside = ~inside
    if "any" in made:
        inside = inside.any().expand(len(t))
    if "all" in made:
        inside = inside.all().expand(len(t))
    outside = v_null if "null outside" in made else v
    return torch.where(column(inside), guided, outside)


def run_cfg(function, velocity, y, null, scale, interval, x, t):
    """What the function that cfg returns gives for x and t. interval None: the default."""
    if interval is None:
        guided = function(velocity, y, null, scale)
    else:
        guided = function(velocity, y, null, scale, interval)
    if not callable(guided):
        raise Wrong(f"cfg must return a function (x, t) -> v; it returns a "
                    f"{type(guided).__name__}")
    return guided(x, t)


def cfg_inputs(scale, interval=None, t=(0.1, 0.4, 0.6, 0.9)):
    b = len(t)
    x = torch.randn(b, 3, 2, 2, generator=seeded())
    y = torch.arange(b)
    return Velocity(), y, torch.full((b,), 7), scale, interval, x, torch.tensor(t)


def cfg_of_text():
    _, _, _, scale, interval, x, t = cfg_inputs(2.5)
    y = torch.randn(4, 5, 6, generator=seeded(1))                       # b n d
    null = torch.randn(6, generator=seeded(2))                          # d
    return Velocity((5, 6)), y, null, scale, interval, x, t


def cfg_of_a_number():
    velocity, y, _, scale, interval, x, t = cfg_inputs(4.0)
    return velocity, y, 7, scale, interval, x, t


cfg = Comparison(
    "cfg", sample.cfg, run_cfg,
    [Case("class ids y 4 and null 4, times inside and outside the interval",
          lambda: cfg_inputs(3.0, (0.3, 0.7))),
     Case("the default interval", lambda: cfg_inputs(3.0)),
     Case("scale 1", lambda: cfg_inputs(1.0)),
     Case("scale 0", lambda: cfg_inputs(0.0)),
     Case("all times outside the interval", lambda: cfg_inputs(3.0, (0.0, 0.05))),
     Case("times at the ends of the interval",
          lambda: cfg_inputs(3.0, (0.25, 0.75), (0.25, 0.75, 0.5, 1.0))),
     Case("text as the condition: y 4 5 6 and null 6, to be broadcast to y", cfg_of_text),
     Case("class ids y 4 and the null condition a number, 7", cfg_of_a_number)],
    reference_cfg, CFG_MISTAKES)


# ------------------------------------------------------------------------------ patchify
PATCH_MISTAKES = {
    "columns": "tokens are ordered column by column; order them row by row",
    "transposed": "rows and columns within a patch are swapped: p (row) comes before q (column)",
    "channels first": "the channel comes first within a token; it comes last, p q c",
    "channels between": "the channel comes between row and column; it comes last, p q c",
    "strided": "the pixels of a token are not neighbours: the row of a pixel is h * patch + p, so "
               "H is split into (h p), not (p h), and W into (w q)",
    "reshape": "a reshape alone takes pixels as they lie in memory, not patch by patch: split H "
               "and W, then permute the axes",
}


def image_pattern(made):
    """The einops pattern of images."""
    return "b c (p h) (q w)" if "strided" in made else "b c (h p) (w q)"


def token_pattern(made):
    """The einops pattern of tokens."""
    within_patch = ["p", "q"]
    if "transposed" in made:
        within_patch = ["q", "p"]
    if "channels first" in made:
        within_patch.insert(0, "c")
    elif "channels between" in made:
        within_patch.insert(1, "c")
    else:
        within_patch.append("c")
    tokens = "(w h)" if "columns" in made else "(h w)"
    return f"b {tokens} ({' '.join(within_patch)})"


def reference_patchify(made, images, patch):
    b, c, height, width = images.shape
    if "reshape" in made:
        return images.reshape(b, height // patch * (width // patch), patch * patch * c)
    return rearrange(images, f"{image_pattern(made)} -> {token_pattern(made)}", p=patch, q=patch)


def reference_unpatchify(made, tokens, grid, patch):
    if "reshape" in made:
        return tokens.reshape(len(tokens), 3, grid * patch, grid * patch)
    return rearrange(tokens, f"{token_pattern(made)} -> {image_pattern(made)}", h=grid, p=patch,
                     q=patch)


def patchify_of_project(images, patch):
    return Pixels(patch).forward_features(images)


def unpatchify_of_project(tokens, grid, patch):
    """The last step of a Decoder whose last layer changes nothing."""
    decoder = model.Decoder(1, grid, patch, width=4, depth=0, heads=1, mlp=1)
    decoder.decoder_norm = nn.Identity()
    decoder.decoder_pred = nn.Identity()
    return decoder.pixels(F.pad(tokens, (0, 0, 1, 0)))                  # in front, a CLS token


patchify = Comparison(
    "patchify", patchify_of_project, call,
    [Case("images 2 3 8 12, patch 4", lambda: (torch.randn(2, 3, 8, 12, generator=seeded()), 4)),
     Case("one channel", lambda: (torch.randn(2, 1, 6, 4, generator=seeded()), 2)),
     Case("patch 1", lambda: (torch.randn(1, 3, 2, 3, generator=seeded()), 1)),
     Case("one patch", lambda: (torch.randn(1, 3, 3, 3, generator=seeded()), 3))],
    reference_patchify, PATCH_MISTAKES)
unpatchify = Comparison(
    "unpatchify", unpatchify_of_project, call,
    [Case("tokens 2 9 48, patch 4", lambda: (torch.randn(2, 9, 48, generator=seeded()), 3, 4)),
     Case("patch 1", lambda: (torch.randn(2, 16, 3, generator=seeded()), 4, 1)),
     Case("one patch", lambda: (torch.randn(1, 1, 27, generator=seeded()), 1, 3))],
    reference_unpatchify, PATCH_MISTAKES)


# ------------------------------------------------------------------------------ adaln_block
MODULATE_MISTAKES = {
    "scale": "x is multiplied by scale; multiply it by 1 + scale, so that 0 changes nothing",
    "swapped": "shift and scale are swapped: x * (1 + scale) + shift",
    "order": "the shift is added before x is scaled: x * (1 + scale) + shift",
    "no shift": "the shift is missing",
    "no scale": "the scale is missing",
    "minus shift": "the shift is subtracted; add it",
    "minus scale": "x is multiplied by 1 - scale; multiply it by 1 + scale",
}
BLOCK_MISTAKES = {
    "no gate": "the gates are forgotten: x + gate * f(...)",
    "no norm": "the norms are forgotten: modulate norm1(x) and norm2(x), not x",
    "late norm": "the norm comes after modulate; it comes before, modulate(norm(x), ...)",
    "no modulate": "the norms' outputs are not modulated",
    "swapped": "shift and scale are swapped: the six parts are shift1, scale1, gate1, shift2, "
               "scale2, gate2",
    "no gate1": "the attention's gate is forgotten: x + gate1 attn(...)",
    "no gate2": "the MLP's gate is forgotten: x + gate2 mlp(...)",
    "gates": "the two gates are swapped: the attention has gate1, the MLP gate2",
    "first parts": "the MLP is given the attention's shift, scale and gate; it has its own",
    "first shift": "the MLP is given the attention's shift; it has shift2",
    "first scale": "the MLP is given the attention's scale; it has scale2",
    "first gate": "the MLP is given the attention's gate; it has gate2",
    "minus1": "the attention's output is subtracted from x; add it",
    "minus2": "the MLP's output is subtracted from x; add it",
    "gate first": "the six parts are taken as gate, shift, scale; they are shift, scale, gate",
    "halves": "the first three parts are given to the MLP; they are the attention's",
    "scale": "the norm's output is multiplied by scale; multiply it by 1 + scale",
    "no residual": "x itself is not added: x + gate * f(...)",
    "no residual1": "x itself is not added to the attention's output: x + gate1 attn(...)",
    "no residual2": "x itself is not added to the MLP's output: x + gate2 mlp(...)",
    "one norm": "norm1 is used twice; the MLP has norm2",
    "parallel": "the MLP sees the x from before the attention; it comes after it",
    "gate plus one": "the gate is 1 + gate; it is gate, so that a new block changes nothing",
    "mlp first": "the MLP comes before the attention; it comes after it",
}


def reference_modulate(made, x, shift, scale):
    if "swapped" in made:
        shift, scale = scale, shift
    factor = scale if "scale" in made else 1 + scale
    if "minus scale" in made:
        factor = 1 - scale
    if "no scale" in made:
        factor = 1
    if "no shift" in made:
        return x * factor
    if "minus shift" in made:
        shift = -shift
    if "order" in made:
        return (x + shift) * factor
    return x * factor + shift


def reference_block(made, d, heads, x, cond):
    block = project_block(d, heads)
    rope = model.RoPE(d // heads, 2)
    parts = list(block.adaLN_modulation(cond).chunk(6, -1))             # b 1|n d each
    attention_parts, mlp_parts = parts[:3], parts[3:]
    if "halves" in made:
        attention_parts, mlp_parts = mlp_parts, attention_parts
    if "gates" in made:
        attention_parts[2], mlp_parts[2] = mlp_parts[2], attention_parts[2]
    for index, part in enumerate(("shift", "scale", "gate")):
        if "first parts" in made or f"first {part}" in made:
            mlp_parts[index] = attention_parts[index]

    def attention(x):
        return block.attn(x, rope)

    branches = [("1", attention, block.norm1, attention_parts),
                ("2", block.mlp, block.norm2, mlp_parts)]
    if "mlp first" in made:
        branches.reverse()
    before = x                                                          # b n d
    for number, function, norm, (shift, scale, gate) in branches:
        if "gate first" in made:
            shift, scale, gate = scale, gate, shift
        if "swapped" in made:
            shift, scale = scale, shift
        if "one norm" in made:
            norm = block.norm1
        seen = before if "parallel" in made else x
        if "no norm" not in made and "late norm" not in made:
            seen = norm(seen)
        if "no modulate" not in made:
            seen = reference_modulate(made & {"scale"}, seen, shift, scale)
        if "late norm" in made:
            seen = norm(seen)
        change = function(seen)
        if "gate plus one" in made:
            gate = 1 + gate
        if "no gate" not in made and f"no gate{number}" not in made:
            change = gate * change
        if f"minus{number}" in made:
            change = -change
        without_x = "no residual" in made or f"no residual{number}" in made
        x = change if without_x else x + change
    return x


@functools.cache
def project_block(d, heads):
    """The project's block, with random weights."""
    block = model.Block(d, heads)
    random = seeded(1)
    with torch.no_grad():
        for parameter in block.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(noise if parameter.dim() == 1 else noise / d ** 0.5)
    return block


def with_weights_of_project(block_class, d, heads):
    """A student's block with the weights of project_block."""
    block = block_class(d, heads)
    weights = project_block(d, heads).state_dict()
    shapes = {name: tensor.shape for name, tensor in block.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        raise Wrong("the layers of Block are not those that the exercise had; leave __init__ as "
                    "it was")
    block.load_state_dict(weights)
    return block


def run_block(block_class, d, heads, x, cond):
    block = with_weights_of_project(block_class, d, heads)
    return block(x, cond, model.RoPE(d // heads, 2))


def block_inputs(b, condition_tokens):
    random = seeded()
    x = torch.randn(b, 4, 16, generator=random)
    return 16, 2, x, torch.randn(b, condition_tokens, 16, generator=random)


def modulate_inputs(condition_tokens):
    random = seeded()
    x = torch.randn(3, 4, 8, generator=random)
    shift = torch.randn(3, condition_tokens, 8, generator=random)
    return x, shift, torch.randn(3, condition_tokens, 8, generator=random)


modulate = Comparison(
    "modulate", model.modulate, call,
    [Case("shift and scale for each token", lambda: modulate_inputs(4)),
     Case("shift and scale for all tokens", lambda: modulate_inputs(1))],
    reference_modulate, MODULATE_MISTAKES)
block = Comparison(
    "Block", model.Block, run_block,
    [Case("a condition for each image", lambda: block_inputs(3, 1)),
     Case("a condition for each token", lambda: block_inputs(2, 4)),
     Case("one image", lambda: block_inputs(1, 1))],
    reference_block, BLOCK_MISTAKES)


# ------------------------------------------------------------------------------ rope
ROPE_MISTAKES = {
    "halves": "channel i is paired with the one half a head further; pair adjacent channels, 0 "
              "and 1, 2 and 3",
    "swapped": "rows and columns are swapped: the first half of the channels turns by the row",
    "sign": "the pairs turn the wrong way: (x1 cos - x2 sin, x1 sin + x2 cos)",
    "sin cos": "sine and cosine are swapped",
    "line": "positions are the numbers of the tokens on a line; use the row in one half of the "
            "channels and the column in the other",
    "row of a line": "the row is n // grid, not the number n of the token",
    "column of a line": "the column is n % grid, not the number n of the token",
    "row twice": "the column is not used: it turns the second half of the channels",
    "column twice": "the row is not used: it turns the first half of the channels",
    "growing": "the exponent is positive, so the angles grow with i; it is -i / (head_dim / 4)",
    "undivided": "the exponent is -i; it is -i / (head_dim / 4)",
    "bands of a head": "the angles fall too slowly with i: the exponent is -i / (head_dim / 4), "
                       "not -i / head_dim",
    "bands": "the angles fall too slowly with i: the exponent is -i / (head_dim / 4), as each half "
             "has head_dim / 4 pairs",
    "one": "rows and columns are counted from 1; count them from 0",
    "alternating": "row and column alternate from pair to pair; the row has the first half of the "
                   "channels, the column the second",
    "reflected": "one of the two signs is wrong, so the pairs are reflected, not turned: "
                 "(x1 cos - x2 sin, x1 sin + x2 cos)",
    "reflected second": "a sign in the second of each pair is wrong: x1 sin + x2 cos",
    "opposite first": "the first of each pair has the opposite sign: x1 cos - x2 sin",
    "opposite second": "a sign in the second of each pair is wrong: x1 sin + x2 cos",
}


def reference_rope(made, head_dim, grid, x):
    pairs = head_dim // 4
    divisor = 2 * pairs if "bands" in made else pairs
    if "bands of a head" in made:
        divisor = head_dim
    if "undivided" in made:
        divisor = 1
    if "growing" in made:
        divisor = -divisor
    frequencies = 10000.0 ** (-torch.arange(pairs) / divisor)           # dh/4
    n = torch.arange(grid * grid)
    row, col = n // grid, n % grid                                      # n each
    if "row of a line" in made or "line" in made:
        row = n
    if "column of a line" in made or "line" in made:
        col = n
    if "swapped" in made:
        row, col = col, row
    if "row twice" in made:
        col = row
    if "column twice" in made:
        row = col
    if "one" in made:
        row, col = row + 1, col + 1
    row_angles = row[:, None] * frequencies                             # n dh/4
    col_angles = col[:, None] * frequencies                             # n dh/4
    angles = torch.cat([row_angles, col_angles], dim=1)                 # n dh/2
    if "alternating" in made:
        angles = torch.stack([row_angles, col_angles], dim=2).flatten(1)
    cos, sin = angles.cos(), angles.sin()
    if "sign" in made:
        sin = -sin
    if "sin cos" in made:
        cos, sin = sin, cos
    if "halves" in made:
        first, second = x.float().chunk(2, dim=-1)                      # b k n dh/2 each
    else:
        first, second = x.float()[..., 0::2], x.float()[..., 1::2]
    turned = [first * cos - second * sin, first * sin + second * cos]
    if "reflected" in made:
        turned[0] = first * cos + second * sin
    if "reflected second" in made:
        turned[1] = second * cos - first * sin
    if "opposite first" in made:
        turned[0] = -turned[0]
    if "opposite second" in made:
        turned[1] = first * sin - second * cos
    if "halves" in made:
        return torch.cat(turned, dim=-1).to(x.dtype)
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


def run_rope(rope_class, head_dim, grid, x):
    return rope_class(head_dim, grid)(x)


def rope_inputs(head_dim, grid, dtype=torch.float32):
    x = torch.randn(2, 3, grid * grid, head_dim, generator=seeded())
    return head_dim, grid, x.to(dtype)


rope = Comparison(
    "RoPE", model.RoPE, run_rope,
    [Case("head_dim 16, grid 3", lambda: rope_inputs(16, 3)),
     Case("head_dim 4, grid 5", lambda: rope_inputs(4, 5)),
     Case("head_dim 24, grid 2, in bf16", lambda: rope_inputs(24, 2, torch.bfloat16)),
     Case("one token", lambda: rope_inputs(8, 1))],
    reference_rope, ROPE_MISTAKES)


# ------------------------------------------------------------------------------ latent_statistics
STATISTICS_MISTAKES = {
    "channel": "the statistics are those of each channel, over all positions; each latent element "
               "c h w has its own",
    "token": "the statistics are those of each position, over all channels; each latent element "
             "c h w has its own",
    "unbiased": "the variance is divided by n - 1; divide it by n",
    "std": "this is the standard deviation; return the variance, its square",
    "second moment": "the square of the mean is not subtracted: the variance is about the mean",
    "mean of variances": "the mean of the batches' variances is too small: it lacks the "
                         "differences between the batches' means",
    "last": "only the last batch counts; use all n images",
    "first": "only the first batch counts; use all n images",
    "overwritten": "each batch replaces the sums of those before; add to them",
    "plus": "the square of the mean is added; subtract it",
    "mean alone": "the mean is not squared: the variance is E[x^2] - E[x]^2",
    "opposite": "the variance has the wrong sign: it is E[x^2] - E[x]^2",
    "swapped": "mean and variance are swapped",
    "sum": "these are sums; divide them by n",
}


def reference_latent_statistics(made, encoder, data, n, batch):
    latents = encoder.encode(scene_images(n)).double()                     # n c h w
    if "last" in made:
        latents = latents[-batch:]
    if "first" in made:
        latents = latents[:batch]
    axes = 0
    if "channel" in made:
        axes = (0, 2, 3)
    if "token" in made:
        axes = (0, 1)
    mean = latents.mean(axes)
    correction = 1 if "unbiased" in made else 0
    variance = latents.var(axes, correction=correction)
    if "second moment" in made:
        variance = latents.square().mean(axes)
    if "mean of variances" in made:
        variances = [part.var(axes, correction=correction) for part in latents.split(batch)]
        variance = torch.stack(variances).mean(0)
    if "overwritten" in made:
        kept = latents[-batch:].shape[0] / len(latents)
        mean = kept * latents[-batch:].mean(axes)
        variance = kept * latents[-batch:].square().mean(axes) - mean ** 2
    if "plus" in made:
        variance = latents.square().mean(axes) + mean ** 2
    if "mean alone" in made:
        variance = latents.square().mean(axes) - mean
    if "opposite" in made:
        variance = -variance
    if "std" in made:
        variance = variance.sqrt()
    if "sum" in made:
        mean, variance = n * mean, n * variance
    if "swapped" in made:
        mean, variance = variance, mean
    return mean.float(), variance.float()


class ColourEncoder:
    """An encoder whose latents, 3 2 3, are the mean colours of parts of the image, plus an offset.
    """
    def __init__(self, offset):
        self.offset = offset

    def encode(self, images):
        return F.adaptive_avg_pool2d(images, (2, 3)) + self.offset      # b 3 2 3


@functools.cache
def scenes():
    """A dataset of the built-in world."""
    return open_data("shapes", 16, objects=1)


@functools.cache
def scene_images(n):
    """Its first n images, n 3 H W in [0,1]."""
    return torch.stack([scenes()[i]["image"] for i in range(n)]).float() / 255


def statistics_inputs(n, batch, offset=0.0):
    return ColourEncoder(offset), scenes(), n, batch


latent_statistics = Comparison(
    "latent_statistics", train_decoder.latent_statistics, call,
    [Case("6 images, 2 at a time", lambda: statistics_inputs(6, 2)),
     Case("all images in one batch", lambda: statistics_inputs(4, 4)),
     Case("latents far from 0, where E[x^2] - E[x]^2 cancels in fp32: sum in fp64",
          lambda: statistics_inputs(6, 2, offset=1000.0))],
    reference_latent_statistics, STATISTICS_MISTAKES, ("the mean", "the variance"))


# ------------------------------------------------------------------------------ adaptive_weight
WEIGHT_MISTAKES = {
    "inverse": "numerator and denominator are swapped: |rec_gradient| is above",
    "product": "the norms are multiplied; divide the first by the second",
    "rec twice": "both norms are those of rec_gradient; gan_gradient is below",
    "gan twice": "both norms are those of gan_gradient; rec_gradient is above",
    "minus epsilon": "the 1e-6 is subtracted; add it",
    "no clamp": "the limit is missing: at most 1e4",
    "no epsilon": "the 1e-6 is not in the denominator, within its brackets: without it, a gradient "
                  "of 0 gives nan or inf",
    "squares": "the norms are squared; a norm is the root of the sum of squares",
    "absolute": "these are sums of absolute values; the norm is the root of the sum of squares",
    "largest": "these are the largest absolute values; the norm is the root of the sum of squares",
    "low": "the limit is a lower one: at most 1e4, clamp(max=1e4)",
}


def reference_adaptive_weight(made, rec_gradient, gan_gradient):
    order = 2
    if "absolute" in made:
        order = 1
    if "largest" in made:
        order = math.inf
    above = torch.linalg.vector_norm(rec_gradient, ord=order)
    below = torch.linalg.vector_norm(gan_gradient, ord=order)
    if "squares" in made:
        above, below = above ** 2, below ** 2
    if "inverse" in made:
        above, below = below, above
    if "rec twice" in made:
        below = above
    if "gan twice" in made:
        above = below
    if "minus epsilon" in made:
        below = below - 1e-6
    elif "no epsilon" not in made:
        below = below + 1e-6
    weight = above * below if "product" in made else above / below
    if "low" in made:
        return weight.clamp(min=1e4)
    return weight if "no clamp" in made else weight.clamp(max=1e4)


def gradients(rec_size, gan_size):
    random = seeded()
    rec_gradient = rec_size * torch.randn(6, 5, generator=random)
    return rec_gradient, gan_size * torch.randn(6, 5, generator=random)


adaptive_weight = Comparison(
    "adaptive_weight", train_decoder.adaptive_weight, call,
    [Case("gradients 6 5", lambda: gradients(2.0, 0.3)),
     Case("a GAN's gradient of 0", lambda: gradients(1.0, 0.0)),
     Case("gradients of about 1e-6", lambda: gradients(1e-6, 1e-7)),
     Case("gradients of 0", lambda: gradients(0.0, 0.0))],
    reference_adaptive_weight, WEIGHT_MISTAKES)


# ------------------------------------------------------------------------------ frechet_distance
FRECHET_MISTAKES = {
    "no root": "the square root of cov1 cov2 is missing",
    "elementwise": "the root is that of each element; it is that of the matrix, whose square is "
                   "cov1 cov2",
    "diagonal": "covariances off the diagonal are ignored: this is the distance of independent "
                "features",
    "commuting": "this takes the root of each covariance by itself; (A B)^(1/2) is not "
                 "A^(1/2) B^(1/2), unless A B = B A",
    "determinant": "this is the root of a determinant; take the trace of the matrix root",
    "one": "the factor 2 of the root is missing",
    "plus": "the root is added; it is subtracted",
    "no root term": "the term of the root is missing: - 2 (cov1 cov2)^(1/2)",
    "both subtracted": "the covariances are subtracted; add their traces",
    "traces subtracted": "a covariance is subtracted; both are added, tr(cov1 + cov2 - ...)",
    "cov1 alone": "tr(cov2) is missing",
    "cov2 alone": "tr(cov1) is missing",
    "means added": "the means are added; take their difference",
    "same": "the root is that of cov1 cov1, or of cov2 cov2; it is that of cov1 cov2",
    "no means": "the distance of the means is missing",
    "norm": "the distance of the means is not squared",
    "mean of squares": "the squared distance of the means is a mean over features; it is a sum",
    "root of all": "a square root too many: the distance is reported squared, as FID is",
    "only means": "the covariances are missing",
}


def root_trace(cov1, cov2):
    """tr (cov1 cov2)^(1/2), from the eigenvalues of the product."""
    return torch.linalg.eigvals(cov1 @ cov2).real.clamp(min=0).sqrt().sum()


def matrix_root(cov):
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def reference_frechet_distance(made, mean1, cov1, mean2, cov2):
    root = root_trace(cov1, cov2)
    if "no root" in made:
        root = (cov1 @ cov2).trace()
    if "elementwise" in made:
        root = (cov1 @ cov2).diagonal().sqrt().sum()
    if "diagonal" in made:
        root = (cov1.diagonal() * cov2.diagonal()).sqrt().sum()
    if "commuting" in made:
        root = (matrix_root(cov1) @ matrix_root(cov2)).trace()
    if "determinant" in made:
        root = torch.linalg.det(cov1 @ cov2).clamp(min=0).sqrt()
    if "same" in made:
        root = cov1.trace()
    if "one" in made:
        root = root / 2
    if "plus" in made:
        root = -root
    if "no root term" in made:
        root = 0 * root
    squared = (mean1 - mean2).square().sum()
    if "means added" in made:
        squared = (mean1 + mean2).square().sum()
    if "norm" in made:
        squared = squared.sqrt()
    if "mean of squares" in made:
        squared = squared / len(mean1)
    if "no means" in made:
        squared = 0 * squared
    trace = cov1.trace() + cov2.trace()
    if "traces subtracted" in made:
        trace = cov1.trace() - cov2.trace()
    if "both subtracted" in made:
        trace = -trace
    if "cov1 alone" in made:
        trace = cov1.trace()
    if "cov2 alone" in made:
        trace = cov2.trace()
    distance = squared + trace - 2 * root
    if "only means" in made:
        distance = squared
    return distance.sqrt() if "root of all" in made else distance


def gaussians(f, images):
    """Means and covariances of f features of so many images, twice."""
    random = seeded()
    moments = []
    for _ in range(2):
        mixing = torch.randn(f, f, generator=random, dtype=torch.float64)
        features = torch.randn(images, f, generator=random, dtype=torch.float64) @ mixing
        moments += [features.mean(0), features.T.cov().view(f, f)]
    return tuple(moments)


def equal_gaussians():
    mean, cov, _, _ = gaussians(4, 20)
    return mean, cov, mean, cov


frechet_distance = Comparison(
    "frechet_distance", metrics.frechet_distance, call,
    [Case("4 features", lambda: gaussians(4, 30)),
     Case("10 features", lambda: gaussians(10, 40)),
     Case("1 feature", lambda: gaussians(1, 10)),
     Case("two equal Gaussians", equal_gaussians),
     Case("fewer images than features, so covariances of low rank", lambda: gaussians(8, 5))],
    reference_frechet_distance, FRECHET_MISTAKES, tolerance=1e-3)


# ------------------------------------------------------------------------------ add_noise
class NoiseLaw:
    """add_noise is random, so its moments over many samples are compared with those of the law.

    All limits are at least five standard errors of the moment, at 20,000 samples of 16 elements.
    """
    name = "add_noise"
    samples = 20_000
    tau = 0.5

    def check(self, module):
        """Raise Wrong unless the student's function draws its noise as the project's does."""
        solution = member(module, self.name)
        for law in ("half_normal", "uniform"):
            # Not seed 0, with which check.py starts: the noise would be the latents' own numbers.
            latents = 3 * torch.randn(self.samples, 4, 2, 2, generator=seeded(1))
            noisy = self.draw(solution, latents, self.tau, law)
            noise = noisy - latents                                     # b c h w
            check_latents(latents, noisy)
            check_eps(noise)
            self.check_sigma(solution, noise, law)
            check_scale(noise, self.tau, law)
            few = latents[:3]
            if not close(self.draw(solution, few, 0.0, law), few, 1e-6):
                raise Wrong("tau 0 must leave the latents as they are")

    def draw(self, solution, latents, tau, law):
        """The student's noisy latents. Raises Wrong if they are no such tensor."""
        given = latents.clone()
        noisy = solution(given, tau, law)
        is_like = torch.is_tensor(noisy) and noisy.shape == latents.shape
        if not is_like or noisy.dtype != latents.dtype or not noisy.isfinite().all():
            raise Wrong(f"{difference('the result', noisy, latents)} (inputs: {law})")
        if not torch.equal(given, latents):
            raise Wrong("the latents are changed in place, which the caller does not expect: "
                        "write latents + noise, not latents += noise")
        return noisy

    def check_sigma(self, solution, noise, law):
        """Raise Wrong unless each sample has a sigma of its own, of the right law."""
        energy = noise.square().mean((1, 2, 3))                         # b: sigma^2, roughly
        spread = spread_of(energy)
        kurtosis = noise.pow(4).mean((1, 2, 3)) / energy.square()       # b
        if kurtosis.mean() > 3:          # 2.67 for Gaussians, of 16 elements
            raise Wrong("sigma differs within a sample: draw one for each sample, in the shape "
                        "b 1 1 1")
        if spread < 1.2:
            self.check_one_sigma(solution, law)
        half_normal = abs(spread - 3) < 0.5
        uniform = abs(spread - 1.8) < 0.2
        if law == "half_normal" and uniform:
            raise Wrong("for law half_normal, sigma is uniform; it is |N(0, tau^2)|: the absolute "
                        "value of a normal number, times tau")
        if law == "uniform" and half_normal:
            raise Wrong("for law uniform, sigma is half-normal; it is tau times a uniform number")
        if not (half_normal if law == "half_normal" else uniform):
            raise Wrong(f"for law {law}, sigma has another law: E[sigma^4] / E[sigma^2]^2 is "
                        f"{spread:.2f}, wanted {3 if law == 'half_normal' else 1.8}")

    def check_one_sigma(self, solution, law):
        """Raise Wrong, since all samples have one sigma: it is drawn once a batch, or never."""
        batch = torch.zeros(200, 4, 2, 2)
        energies = [self.draw(solution, batch, self.tau, law).square().mean() for _ in range(8)]
        if spread_of(torch.stack(energies)) > 1.05:
            raise Wrong("sigma is drawn once for the whole batch; draw one for each sample, in the "
                        "shape b 1 1 1")
        raise Wrong("sigma is not random: it is the same in all samples and calls; draw one for "
                    "each sample")


def spread_of(energy):
    """E[sigma^4] / E[sigma^2]^2 from sigma^2 as estimated over 16 Gaussian elements: 1 if sigma is
    constant, 1.8 if it is uniform from 0, 3 if it is half-normal.
    """
    estimate = energy.square().mean() / energy.mean().square()
    return float(estimate / (1 + 2 / 16))


def check_latents(latents, noisy):
    """Raise Wrong unless the latents are in the noisy ones, as they are."""
    slope = float((noisy * latents).sum() / latents.square().sum())
    if abs(slope) < 0.02:
        raise Wrong("the latents are missing: return latents + sigma eps, not the noise alone")
    if abs(slope - 1) > 0.02:
        raise Wrong(f"the latents come back {slope:.2f} times as large; add the noise to them as "
                    f"they are")


def check_eps(noise):
    """Raise Wrong unless each element has noise of its own, with mean 0."""
    size = noise.square().mean()
    if size == 0:
        raise Wrong("there is no noise: the latents come back as they are")
    within = noise.var((1, 2, 3)).mean() / size
    if within < 0.01:
        raise Wrong("all elements of a sample have the same noise: draw eps in the shape of the "
                    "latents, torch.randn_like(latents)")
    mean = noise.mean(0)                                                # c h w
    if noise.mean().square() > 0.3 * size:
        raise Wrong("the noise is not centred on 0: eps is N(0, 1), torch.randn, not torch.rand")
    if mean.square().mean() > 0.02 * size:
        raise Wrong("all samples have the same eps: draw it in the shape of the latents, "
                    "torch.randn_like(latents)")


def check_scale(noise, tau, law):
    """Raise Wrong unless the noise is as large as tau says."""
    expected = tau ** 2 if law == "half_normal" else tau ** 2 / 3       # E[sigma^2]
    factor = float((noise.square().mean() / expected).sqrt())
    usual = {tau: "tau counts twice: sigma is tau times a random number, not tau^2 times",
             1 / tau: "tau is missing: sigma is tau times a random number",
             tau ** -0.5: "sigma is scaled by the root of tau; it is scaled by tau itself"}
    for known_factor, sentence in usual.items():
        if abs(factor / known_factor - 1) < 0.03:
            raise Wrong(f"for law {law}, {sentence}")
    if abs(factor - 1) > 0.03:
        raise Wrong(f"for law {law}, the noise is {factor:.2f} times as large as it should be")


EXERCISES = {
    "time_shift": [time_shift],
    "flow_matching_loss": [flow_matching_loss],
    "euler": [euler],
    "heun": [heun],
    "cfg": [cfg],
    "patchify": [patchify, unpatchify],
    "adaln_block": [modulate, block],
    "rope": [rope],
    "latent_statistics": [latent_statistics],
    "add_noise": [NoiseLaw()],
    "adaptive_weight": [adaptive_weight],
    "frechet_distance": [frechet_distance],
}

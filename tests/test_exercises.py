"""The exercises and what grades them. Run: python -m pytest tests/test_exercises.py"""
import ast
import inspect
import re
import sys
import textwrap
from itertools import combinations

import pytest

import metrics
import model
import sample
import train_decoder
from conftest import ROOT

FOLDER = ROOT / "walkthroughs" / "exercises"
sys.path.insert(0, str(FOLDER))
try:
    import check
    import references
finally:
    sys.path.remove(str(FOLDER))

COMPARISONS = {}
for parts in references.EXERCISES.values():
    for part in parts:
        if part.name != "add_noise":
            COMPARISONS[part.name] = part
every_comparison = pytest.mark.parametrize("name", COMPARISONS)


def grade(folder, name, source):
    """What check.py says of an exercise whose file has this source."""
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
    return check.grade(name, folder)


# ---------------------------------------------------------------------------- solutions
FROM_THE_PROJECT = {
    "time_shift": "from model import time_shift",
    "flow_matching_loss": "from model import flow_matching_loss",
    "euler": "from sample import euler",
    "heun": "from sample import heun",
    "cfg": "from sample import cfg",
    "patchify": "from references import patchify_of_project as patchify\n"
                "from references import unpatchify_of_project as unpatchify",
    "adaln_block": "from model import Block, modulate",
    "rope": "from model import RoPE",
    "latent_statistics": "from train_decoder import latent_statistics",
    "add_noise": "from train_decoder import add_noise",
    "adaptive_weight": "from train_decoder import adaptive_weight",
    "frechet_distance": "from metrics import frechet_distance",
}

# Solutions as a student would write them, put in the place of the holes in this order.
BY_HAND = {
    "time_shift": ["""
        a = (dim / base) ** 0.5
        return a * t / (1 + (a - 1) * t)
        """],
    "flow_matching_loss": ["""
        b = len(x0)
        x_t = x0 + t.reshape(b, 1, 1, 1) * (eps - x0)
        error = model(x_t, t, y) + x0 - eps
        return (error ** 2).mean(dim=(1, 2, 3))
        """],
    "euler": ["""
        for i in range(len(times) - 1):
            t = times[i].to(x.dtype).expand(len(x))
            x = x + float(times[i + 1] - times[i]) * velocity(x, t)
        return x
        """],
    "heun": ["""
        for i in range(len(times) - 1):
            dt = float(times[i + 1] - times[i])
            v = velocity(x, times[i].to(x.dtype).expand(len(x)))
            if i < len(times) - 2:
                v2 = velocity(x + dt * v, times[i + 1].to(x.dtype).expand(len(x)))
                v = 0.5 * v + 0.5 * v2
            x = x + dt * v
        return x
        """],
    "cfg": ["""
        import torch
        null_of_y = torch.as_tensor(null, dtype=y.dtype).expand(y.shape)

        def velocity(x, t):
            v = model(x, t, y)
            v_null = model(x, t, null_of_y)
            inside = (interval[0] <= t) & (t <= interval[1])
            guided = v_null + scale * (v - v_null)
            return torch.where(inside[:, None, None, None], guided, v)
        return velocity
        """],
    "patchify": ["""
        b, c, height, width = images.shape
        x = images.reshape(b, c, height // patch, patch, width // patch, patch)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)
        """, """
        x = tokens.reshape(len(tokens), grid, grid, patch, patch, 3)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), 3, grid * patch, grid * patch)
        """],
    "adaln_block": ["""
        return x * (1 + scale) + shift
        """, """
        a, b, c, d, e, f = self.adaLN_modulation(cond).chunk(6, dim=-1)
        x = x + c * self.attn(modulate(self.norm1(x), a, b), rope)
        return x + f * self.mlp(modulate(self.norm2(x), d, e))
        """],
    "rope": ["""
        import torch
        super().__init__()
        n = torch.arange(grid * grid)
        bands = 10000 ** (-torch.arange(head_dim // 4) / (head_dim / 4))
        row = torch.outer(n // grid, bands)
        column = torch.outer(n % grid, bands)
        angles = torch.cat([row, column], dim=1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        """, """
        import torch
        x1, x2 = x[..., ::2], x[..., 1::2]
        first = x1 * self.cos - x2 * self.sin
        second = x1 * self.sin + x2 * self.cos
        return torch.stack([first, second], dim=-1).flatten(-2).to(x.dtype)
        """],
    "latent_statistics": ["""
        total = 0
        squares = 0
        for images in image_batches(data, n, batch):
            latents = encoder.encode(images).double()
            total = total + latents.sum(0)
            squares = squares + (latents ** 2).sum(0)
        mean = total / n
        variance = squares / n - mean ** 2
        return mean.float(), variance.float()
        """],
    "add_noise": ["""
        import torch
        random = torch.randn if law == "half_normal" else torch.rand
        sigma = random(len(latents), 1, 1, 1).abs() * tau
        return latents + sigma * torch.randn(latents.shape)
        """],
    "adaptive_weight": ["""
        ratio = (rec_gradient ** 2).sum().sqrt() / ((gan_gradient ** 2).sum().sqrt() + 1e-6)
        return ratio.clamp(0, 10000)
        """],
    "frechet_distance": ["""
        import torch
        squared = ((mean1 - mean2) ** 2).sum() + (cov1 + cov2).trace()
        values = torch.linalg.eigvals(cov1 @ cov2).real.clamp(min=0)
        return float(squared - 2 * values.sqrt().sum())
        """],
}


def fill(name, bodies):
    """The source of an exercise whose holes have these bodies."""
    source = (FOLDER / f"{name}.py").read_text()
    for body in bodies:
        hole = re.search(r'^( +)raise NotImplementedError\("your code here"\)$', source, re.M)
        indented = textwrap.indent(textwrap.dedent(body).strip(), hole[1])
        source = source[:hole.start()] + indented + source[hole.end():]
    assert "NotImplementedError" not in source
    return source


@pytest.mark.parametrize("name", references.EXERCISES)
def test_as_shipped_each_is_a_hole(name):
    assert check.grade(name, FOLDER).startswith(f"still a hole ({name}.py, line ")


@pytest.mark.parametrize("name", references.EXERCISES)
def test_the_projects_own_code_is_right(name, tmp_path):
    assert grade(tmp_path, name, FROM_THE_PROJECT[name]) == "ok"


@pytest.mark.parametrize("name", references.EXERCISES)
def test_code_written_by_hand_is_right(name, tmp_path):
    assert grade(tmp_path, name, fill(name, BY_HAND[name])) == "ok"


def test_a_second_hole_is_a_hole(tmp_path):
    source = (FOLDER / "patchify.py").read_text()
    first = fill("patchify", BY_HAND["patchify"]).split("def unpatchify")[0]
    result = grade(tmp_path, "patchify", first + "def unpatchify" +
                   source.split("def unpatchify")[1])
    assert result.startswith("still a hole")


# ---------------------------------------------------------------------------- usual mistakes
def plant(name, *changes):
    """The source of a solution by hand in which texts are replaced, given as (old, new)."""
    source = fill(name, BY_HAND[name])
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


PLANTED = [
    ("time_shift", [("** 0.5", "** 1")], "square root is missing"),
    ("time_shift", [("(dim / base) ** 0.5", "(base / dim) ** 0.5")], "towards data"),
    ("time_shift", [("(dim / base) ** 0.5", "(dim / 4096) ** 0.5")], "base is ignored"),
    ("time_shift", [("    return a * t / (1 + (a - 1) * t)", "    return t")], "unshifted"),
    ("flow_matching_loss", [("x0 + t.reshape(b, 1, 1, 1) * (eps - x0)",
                             "eps + t.reshape(b, 1, 1, 1) * (x0 - eps)")],
     "t and 1-t are swapped"),
    ("flow_matching_loss", [("+ x0 - eps", "- x0 + eps")], "the wrong sign: v = eps - x0"),
    ("flow_matching_loss", [("error ** 2).mean", "error ** 2).sum")], "take their mean"),
    ("flow_matching_loss", [(".mean(dim=(1, 2, 3))", ".mean()")], "one loss for each sample"),
    ("flow_matching_loss", [("model(x_t, t, y)", "model(x_t, 1 - t, y)"),
                            ("+ x0 - eps", "- x0 + eps")],
     "the wrong sign.*; and|the model is given 1-t.*; and"),
    ("flow_matching_loss", [("error ** 2", "3 * error ** 2")], "3 times the project's"),
    ("flow_matching_loss", [("return (error", "return (error.detach()")], "no gradient"),
    ("flow_matching_loss", [("model(x_t, t, y)", "model(x_t, t.reshape(b, 1, 1, 1), y)")],
     r"one time for each sample, here \(5,\)"),
    ("euler", [("x = x + float", "x = x - float")], "the wrong way"),
    ("euler", [("t = times[i].", "t = times[i + 1].")], "evaluated at t_next"),
    ("euler", [("x = x + float", "x += float")], "changed in place"),
    ("euler", [("len(times) - 1", "len(times) - 2")], "the last step is missing"),
    ("euler", [("times[i].to(x.dtype)", "times[i]")],
     "given t in float64; give it x's dtype, float32"),
    ("heun", [("dt * v, times[i + 1].to(x.dtype)", "dt * v, times[i + 1]")],
     "given t in float64; give it x's dtype, float32"),
    ("heun", [("dt = float(times[i + 1] - times[i])",
               "dt = (times[i + 1] - times[i]).reshape(1, 1, 1, 1)")],
     "given x in float64, though it came in float32"),
    ("heun", [("if i < len(times) - 2:", "if times[i + 1] != 0:")], "only where it ends at 0"),
    ("heun", [("if i < len(times) - 2:", "if True:")], "last step is Heun's"),
    ("heun", [("0.5 * v + 0.5 * v2", "v + v2")], "take their mean"),
    ("heun", [("dt * v, times[i + 1]", "dt * v, times[i]")], "at the old time t"),
    ("heun", [("velocity(x + dt * v, ", "velocity(x, ")], "at the old x"),
    ("heun", [("0.5 * v + 0.5 * v2", "v2")], "only the second velocity"),
    ("cfg", [("v_null + scale *", "v + scale *")], "off by one"),
    ("cfg", [("model(x, t, y)", "model(x, t, null_of_y)"),
             ("v_null = model(x, t, null_of_y)", "v_null = model(x, t, y)")], "swapped"),
    ("cfg", [("inside[:, None, None, None], guided, v)",
              "torch.ones_like(inside)[:, None, None, None], guided, v)")], "interval is ignored"),
    ("cfg", [("(interval[0] <= t) & (t <= interval[1])",
              "(interval[0] < t) & (t < interval[1])")], "use <="),
    ("cfg", [(".expand(y.shape)", "")], "one condition for each"),
    ("cfg", [("return velocity", "return model(y, y, y)")], "must return a function"),
    ("patchify", [("permute(0, 2, 4, 3, 5, 1)", "permute(0, 4, 2, 3, 5, 1)")],
     "column by column"),
    ("patchify", [("permute(0, 2, 4, 3, 5, 1)", "permute(0, 2, 4, 5, 3, 1)")],
     "rows and columns within a patch"),
    ("patchify", [("permute(0, 2, 4, 3, 5, 1)", "permute(0, 2, 4, 1, 3, 5)")],
     "channel comes first"),
    ("patchify", [("x.permute(0, 5, 1, 3, 2, 4)", "x.permute(0, 5, 2, 3, 1, 4)")],
     "column by column"),
    ("patchify", [("b, -1, patch * patch * c)", "b, height // patch, -1, patch * patch * c)")],
     r"shape \(2, 2, 3, 48\), wanted \(2, 6, 48\)"),
    ("adaln_block", [("(1 + scale)", "scale")], "multiply it by 1 \\+ scale"),
    ("adaln_block", [("x + c *", "x +"), ("x + f *", "x +")], "gates are forgotten"),
    ("adaln_block", [("self.norm1(x)", "x"), ("self.norm2(x)", "x")], "norms are forgotten"),
    ("adaln_block", [("a, b, c, d, e, f =", "b, a, c, e, d, f =")], "shift and scale are swapped"),
    ("adaln_block", [("a, b, c, d, e, f =", "d, e, f, a, b, c =")], "first three parts"),
    ("adaln_block", [("self.norm2(x)", "self.norm1(x)")], "norm1 is used twice"),
    ("adaln_block", [("nn.RMSNorm(d, eps=1e-6)\n        self.attn",
                      "nn.LayerNorm(d)\n        self.attn")], "leave __init__"),
    ("rope", [("x[..., ::2], x[..., 1::2]", "x.chunk(2, dim=-1)"),
              ("torch.stack([first, second], dim=-1).flatten(-2)",
               "torch.cat([first, second], dim=-1)")], "pair adjacent channels"),
    ("rope", [("[row, column]", "[column, row]")], "rows and columns are swapped"),
    ("rope", [("self.cos - x2", "self.cos + x2"), ("self.sin + x2", "-self.sin + x2")],
     "turn the wrong way"),
    ("rope", [("(head_dim // 4) / (head_dim / 4)", "(head_dim // 4) / (head_dim / 2)")],
     "fall too slowly"),
    ("rope", [("        super().__init__()\n", "")], "raises AttributeError"),
    ("latent_statistics", [("squares / n - mean ** 2", "(squares / n - mean ** 2) * n / (n - 1)")],
     "divide it by n"),
    ("latent_statistics", [("squares / n - mean ** 2", "(squares / n - mean ** 2).sqrt()")],
     "standard deviation"),
    ("latent_statistics", [("squares / n - mean ** 2", "squares / n")], "is not subtracted"),
    ("latent_statistics", [("latents.sum(0)", "latents.mean((2, 3)).sum(0)"),
                           ("(latents ** 2).sum(0)", "(latents ** 2).mean((2, 3)).sum(0)")],
     "each latent element c h w has its own"),
    ("latent_statistics", [(".double()", "")], "cancels in fp32: sum in fp64"),
    ("latent_statistics", [(", variance.float()", "")], "must return the mean and the variance"),
    ("add_noise", [("random(len(latents), 1, 1, 1)", "random(1)")], "once for the whole batch"),
    ("add_noise", [("random(len(latents), 1, 1, 1)", "random(latents.shape)")],
     "differs within a sample"),
    ("add_noise", [("random(len(latents), 1, 1, 1)", "torch.rand(len(latents), 1, 1, 1)")],
     "sigma is uniform"),
    ("add_noise", [(".abs() * tau", ".abs() * tau ** 2")], "tau counts twice"),
    ("add_noise", [(".abs() * tau", ".abs()")], "tau is missing"),
    ("add_noise", [("return latents + ", "return ")], "the latents are missing"),
    ("add_noise", [("torch.randn(latents.shape)", "torch.randn(len(latents), 1, 1, 1)")],
     "same noise"),
    ("add_noise", [("torch.randn(latents.shape)", "torch.randn(latents.shape[1:])")],
     "the same eps"),
    ("add_noise", [("torch.randn(latents.shape)", "torch.rand(latents.shape)")], "not centred"),
    ("add_noise", [("random(len(latents), 1, 1, 1).abs() * tau", "tau")], "sigma is not random"),
    ("adaptive_weight", [("ratio.clamp(0, 10000)", "1 / ratio")], "swapped"),
    ("adaptive_weight", [("ratio.clamp(0, 10000)", "ratio")], "limit is missing"),
    ("adaptive_weight", [(".sqrt() + 1e-6", ".sqrt()")], "1e-6"),
    ("adaptive_weight", [("(rec_gradient ** 2).sum().sqrt()", "(rec_gradient ** 2).sum()"),
                         ("(gan_gradient ** 2).sum().sqrt()", "(gan_gradient ** 2).sum()")],
     "norms are squared"),
    ("frechet_distance", [("values.sqrt().sum()", "values.sum()")],
     "square root of cov1 cov2 is missing"),
    ("frechet_distance", [("values.sqrt().sum()", "(cov1 @ cov2).abs().sqrt().trace()")],
     "root is that of each element|wanted"),
    ("frechet_distance", [("cov1 @ cov2", "cov1 @ cov1")], "it is that of cov1 cov2"),
    ("frechet_distance", [(" ** 2).sum() +", " ** 2).sum().sqrt() +")], "is not squared"),
    ("frechet_distance", [("- 2 *", "-")], "factor 2"),
]


# Slips of a sign, a bracket or a letter.
SLIPS = [
    ("time_shift", [("(a - 1)", "(1 - a)")], "a sign in the denominator is wrong"),
    ("time_shift", [("(a - 1)", "a")], "a in place of a - 1"),
    ("time_shift", [("(dim / base) **", "dim **")], "not divided by base"),
    ("time_shift", [(" / (1 + (a - 1) * t)", "")], "the denominator is missing"),
    ("flow_matching_loss", [("x0 - eps\n", "t.reshape(b, 1, 1, 1) * (x0 - eps)\n")],
     "multiplied by t;"),
    ("flow_matching_loss", [("x0 - eps\n", "(1 - t.reshape(b, 1, 1, 1)) * (x0 - eps)\n")],
     "multiplied by 1-t;"),
    ("flow_matching_loss", [("+ x0 - eps", "- x0 - eps")], "not eps \\+ x0"),
    ("flow_matching_loss", [("x0 + t.", "x0 - t.")], "a sign in x_t is wrong"),
    ("flow_matching_loss", [("* (eps - x0)", "* (eps + x0)")], "1\\+t where 1-t belongs"),
    ("flow_matching_loss", [("* (eps - x0)", "* eps")], "has to fade"),
    ("flow_matching_loss", [("+ x0 - eps", "- x_t")], "compared with x_t"),
    ("flow_matching_loss", [("(error ** 2)", "error")], "the error is not squared"),
    ("euler", [("times[i + 1] - times[i]", "times[i + 1] + times[i]")], "of a step are added"),
    ("euler", [("    return x", "        return x")], "is the return inside the loop"),
    ("euler", [("x = x + float", "x = float")], "x itself is not added"),
    ("euler", [("times[i + 1] - times[i]", "times[i] - times[i]")], "no step changes it"),
    ("euler", [("times[i + 1] - times[i]", "-times[i + 1]")], "as long as t_next;"),
    ("heun", [("0.5 * v + 0.5 * v2", "0.5 * v - 0.5 * v2")], "are subtracted"),
    ("heun", [("0.5 * v + 0.5 * v2", "v + 0.5 * v2")], "only the second velocity is halved"),
    ("heun", [("0.5 * v + 0.5 * v2", "0.5 * v + v2")], "only the first velocity is halved"),
    ("heun", [("velocity(x + dt", "velocity(x - dt")], "guess goes the wrong way"),
    ("heun", [("velocity(x + dt * v", "velocity(x + v")], "in Euler's guess, v is not multiplied"),
    ("heun", [("velocity(x + dt * v", "velocity(dt * v")], "in Euler's guess, x itself"),
    ("heun", [("velocity(x, times[i]", "velocity(x, times[i + 1]")], "first evaluation is at"),
    ("heun", [("    return x", "        return x")], "is the return inside the loop"),
    ("cfg", [("scale * (v - v_null)", "scale * (v_null - v)")], "a sign is wrong"),
    ("cfg", [("scale * (v - v_null)", "scale * (v + v_null)")], "added in the brackets"),
    ("cfg", [("guided = v_null +", "guided =")], "v_null in front is missing"),
    ("cfg", [("interval[0] <= t", "interval[0] < t")], "the lower end.*use <="),
    ("cfg", [("t <= interval[1]", "t < interval[1]")], "the upper end.*use <="),
    ("cfg", [(" & (t <= interval[1])", "")], "only the lower end"),
    ("cfg", [("(interval[0] <= t) & ", "")], "only the upper end"),
    ("patchify", [("height // patch, patch, width // patch, patch)",
                   "patch, height // patch, patch, width // patch)"),
                  ("permute(0, 2, 4, 3, 5, 1)", "permute(0, 3, 5, 2, 4, 1)")], "not neighbours"),
    ("patchify", [("x.permute(0, 5, 1, 3, 2, 4)", "x.permute(0, 5, 3, 1, 4, 2)")],
     "not neighbours"),
    ("adaln_block", [("(1 + scale)", "(1 - scale)")], "multiplied by 1 - scale"),
    ("adaln_block", [(" + shift", " - shift")], "the shift is subtracted"),
    ("adaln_block", [("x + c *", "x - c *")], "the attention's output is subtracted"),
    ("adaln_block", [("x + f *", "x - f *")], "the MLP's output is subtracted"),
    ("adaln_block", [("x + c *", "x +")], "the attention's gate is forgotten"),
    ("adaln_block", [("x + f *", "x +")], "the MLP's gate is forgotten"),
    ("adaln_block", [("x + f *", "f *")], "not added to the MLP's output"),
    ("adaln_block", [("x + c *", "x + f *"), ("x + f * self.mlp", "x + c * self.mlp")],
     "the two gates are swapped"),
    ("adaln_block", [("self.norm2(x), d, e", "self.norm2(x), a, e")], "the attention's shift"),
    ("adaln_block", [("self.norm2(x), d, e", "self.norm2(x), d, b")], "the attention's scale"),
    ("adaln_block", [("x + f *", "x + c *")], "the attention's gate; it has gate2"),
    ("rope", [("10000 ** (-torch", "10000 ** (torch")], "the exponent is positive"),
    ("rope", [("[row, column]", "[row, row]")], "the column is not used"),
    ("rope", [("outer(n // grid", "outer(n")], "the row is n // grid"),
    ("rope", [("outer(n % grid", "outer(n")], "the column is n % grid"),
    ("rope", [("[row, column]", "[column, column]")], "the row is not used"),
    ("rope", [("4) / (head_dim / 4)", "4) / 1")], "the exponent is -i;"),
    ("rope", [("4) / (head_dim / 4)", "4) / head_dim")], "not -i / head_dim"),
    ("rope", [("self.cos - x2", "self.cos + x2")], "one of the two signs is wrong"),
    ("rope", [("self.sin + x2", "self.sin - x2")], "a sign in the second of each pair"),
    ("latent_statistics", [("squares / n - mean", "squares / n + mean")], "mean is added"),
    ("latent_statistics", [("- mean ** 2", "- mean")], "the mean is not squared"),
    ("latent_statistics", [("squares / n - mean ** 2", "mean ** 2 - squares / n")], "wrong sign"),
    ("latent_statistics", [("total = total +", "total ="), ("squares = squares +", "squares =")],
     "replaces the sums"),
    ("adaptive_weight", [(".sqrt() / (", ".sqrt() * (")], "are multiplied"),
    ("adaptive_weight", [("(gan_gradient **", "(rec_gradient **")], "are those of rec_gradient"),
    ("adaptive_weight", [("= (rec_gradient", "= (gan_gradient")], "are those of gan_gradient"),
    ("adaptive_weight", [("() + 1e-6", "() - 1e-6"), ("(0, 10000)", "(max=10000)")],
     "the 1e-6 is subtracted"),
    ("adaptive_weight", [("() + 1e-6)", "()) + 1e-6")],
     "not in the denominator"),
    ("frechet_distance", [("(cov1 + cov2)", "(cov1 - cov2)")], "a covariance is subtracted"),
    ("frechet_distance", [(".sum() + (cov1", ".sum() - (cov1")], "covariances are subtracted"),
    ("frechet_distance", [("(cov1 + cov2)", "cov1")], "tr\\(cov2\\) is missing"),
    ("frechet_distance", [("(cov1 + cov2)", "cov2")], "tr\\(cov1\\) is missing"),
    ("frechet_distance", [("(mean1 - mean2)", "(mean1 + mean2)")], "the means are added"),
    ("frechet_distance", [("- 2 * values", "+ 2 * values")], "the root is added"),
    ("frechet_distance", [(" - 2 * values.sqrt().sum()", "")], "term of the root is missing"),
]


@pytest.mark.parametrize("name, changes, diagnosis", SLIPS)
def test_a_slip_is_named(name, changes, diagnosis, tmp_path):
    result = grade(tmp_path, name, plant(name, *changes))
    assert re.search(diagnosis, result), result


@pytest.mark.parametrize("name, changes, diagnosis", PLANTED)
def test_a_usual_mistake_is_named(name, changes, diagnosis, tmp_path):
    result = grade(tmp_path, name, plant(name, *changes))
    assert re.search(diagnosis, result), result


# ---------------------------------------------------------------------------- references
@every_comparison
def test_a_reference_without_mistakes_is_the_projects_function(name):
    part = COMPARISONS[name]
    for case in part.cases:
        wanted = part.values(part.run(part.product, *case.inputs()))
        result = part.values(part.reference(frozenset(), *case.inputs()))
        assert part.equal(result, wanted), case.text


@every_comparison
def test_any_two_mistakes_can_be_made_together(name):
    part = COMPARISONS[name]
    for made in combinations(part.mistakes, 2):
        part.reference(frozenset(made), *part.cases[0].inputs())


@every_comparison
def test_each_mistake_is_told_from_the_others(name):
    part = COMPARISONS[name]
    for made in part.mistakes:
        assert diagnose(part, made) == part.mistakes[made]


def diagnose(part, mistake):
    """What is said of the reference with one mistake, in the first case in which it matters."""
    def run(*inputs):
        return part.values(part.reference(frozenset([mistake]), *inputs))

    for case in part.cases:
        wanted = part.values(part.run(part.product, *case.inputs()))
        got = run(*case.inputs())
        if not part.equal(got, wanted):
            return part.find_mistakes(got, wanted, case, run)
    return None


# ---------------------------------------------------------------------------- what is said
def test_an_error_is_reported_with_its_line(tmp_path):
    result = grade(tmp_path, "time_shift", """
        def time_shift(t, dim, base=4096):
            a = dim / base
            return a.sqrt() * t
        """)
    assert result.startswith("raises AttributeError (time_shift.py, line 4): ")
    assert result.endswith("(inputs: 768 channels of 16 x 16 tokens)")


# Errors of first attempts: the changes, the hint, and a part of the error's own message.
ERRORS = [
    ("flow_matching_loss", [("t.reshape(b, 1, 1, 1)", "t")], "in the shape b 1 1 1", "size of ten"),
    ("cfg", [("inside[:, None, None, None]", "inside")], "in the shape b 1 1 1", "size of tensor"),
    ("cfg", [("(interval[0] <= t) & (t <= interval[1])", "interval[0] <= t <= interval[1]")],
     "choose for each sample", "ambiguous"),
    ("cfg", [("torch.as_tensor(null, dtype=y.dtype).expand(y.shape)", "torch.full_like(y, null)")],
     "null may be a tensor", "must be Number"),
    ("cfg", [("torch.as_tensor(null, dtype=y.dtype).expand", "null.expand")],
     "null may be a number", "has no attribute 'expand'"),
    ("add_noise", [("random(len(latents), 1, 1, 1)", "random(len(latents))")],
     "in the shape b 1 1 1", "size of tensor"),
    ("euler", [("len(times) - 1", "len(times)")], "N \\+ 1 times make N steps", "out of bounds"),
    ("heun", [("len(times) - 1", "len(times)")], "N \\+ 1 times make N steps", "out of bounds"),
    ("time_shift", [("(dim / base) ** 0.5", "(dim / base).sqrt()")], "number of Python", "no attr"),
    ("time_shift", [("    a =", "    import torch; a ="), ("(dim / base) ** 0.5",
                                                           "torch.sqrt(dim / base)")],
     "takes a tensor, but this is a number", "must be Tensor"),
    ("time_shift", [("return a * t", "return float(t)")], "take one number", "only one element"),
    ("rope", [("import torch\n        super", "super")], "import it at the top", "not defined"),
    ("rope", [("head_dim // 4)", "head_dim // 2)")], "each pair of channels", "size of te"),
    ("latent_statistics", [("(latents ** 2).sum(0)", "(latents ** 2).sum((0, 1)).flatten()")],
     "sum over the batch", "size of tensor"),
    ("adaln_block", [("a, b), rope)", "a, b))")], "rotary positions, too", "missing 1 required"),
    ("adaln_block", [("return x * (1", "return x.double() @ x.mT * (1")], "two dtypes", "type"),
    ("patchify", [("b, -1, patch * patch * c)", "b, -1, patch * patch * patch)")],
     "keeps the number of elements", "is invalid for input"),
    ("frechet_distance", [("    values =", "    torch.linalg.cholesky(cov1)\n    values =")],
     "a Cholesky factor needs full rank", "positive-definite"),
]


@pytest.mark.parametrize("name, changes, hint, message", ERRORS)
def test_an_error_is_explained_before_its_own_message(name, changes, hint, message, tmp_path):
    result = grade(tmp_path, name, plant(name, *changes))
    assert re.search(f"^raises .*{hint}.*The message: .*{message}", result), result


def test_an_error_of_another_kind_is_not_explained(tmp_path):
    result = grade(tmp_path, "time_shift", "def time_shift(t, dim, base): return {}[dim]")
    assert result.startswith("raises KeyError") and "The message" not in result


def test_what_the_model_refuses_is_said_with_the_case(tmp_path):
    null_of_y = "torch.as_tensor(null, dtype=y.dtype).expand(y.shape)"
    result = grade(tmp_path, "cfg", plant("cfg", (null_of_y, "torch.as_tensor(null)")))
    assert "given y as (6,) for 4 samples" in result
    assert "one condition for each, here (4, 5, 6)" in result
    assert result.endswith("(inputs: text as the condition: y 4 5 6 and null 6, to be broadcast "
                           "to y)")


def test_a_file_that_is_no_python_is_reported_with_its_line(tmp_path):
    result = grade(tmp_path, "time_shift", "def time_shift(t, dim:\n    return t\n")
    assert result.startswith("raises SyntaxError (time_shift.py, line 1): ")


@pytest.mark.parametrize("source, words", [
    ("x = 1", "there is no time_shift in the file"),
    ("def time_shift(t, dim, base): pass", "is the return missing"),
    ("def time_shift(t, dim, base): return [t]", "is a list, wanted a tensor"),
    ("def time_shift(t, dim, base): return t * 1j", "complex"),
    ("def time_shift(t, dim, base): return t[:2]", "has the shape (2,), wanted (8,)"),
    ("def time_shift(t, dim, base): return t / 0", "not finite"),
    ("def time_shift(t, dim, base): return t + 5", "no usual mistake explains it"),
    ("def time_shift(t, dim, base): raise NotImplementedError('later')", "raises NotImpl"),
])
def test_what_is_no_solution_is_said_plainly(source, words, tmp_path):
    assert words in grade(tmp_path, "time_shift", source)


def test_a_missing_file_is_named(tmp_path):
    assert check.grade("euler", tmp_path) == f"there is no {tmp_path / 'euler.py'}"


def test_exit_code_and_lines(tmp_path, capsys):
    (tmp_path / "euler.py").write_text("from sample import euler")
    (tmp_path / "heun.py").write_text("from sample import euler as heun")

    check.main(check.parse_args(["euler", "--dir", str(tmp_path)]))
    assert capsys.readouterr().out == "euler               ok\ndone\n"

    with pytest.raises(SystemExit) as ending:
        check.main(check.parse_args(["euler", "heun", "--dir", str(tmp_path)]))
    assert ending.value.code == "1 of 2 exercises are done; not yet: heun"
    assert "this is Euler's solver" in capsys.readouterr().out


def test_an_unknown_name_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as ending:
        check.parse_args(["euler", "rk4"])
    assert ending.value.code == 2
    error = capsys.readouterr().err
    assert "rk4: choose from time_shift flow_matching_loss euler heun" in error


def test_every_exercise_is_in_the_table_and_has_a_file():
    rows = re.findall(r"^\| `(\w+)` \|", (FOLDER / "README.md").read_text(), re.M)
    assert sorted(rows) == sorted(references.EXERCISES)
    for name in references.EXERCISES:
        assert (FOLDER / f"{name}.py").exists()


# ---------------------------------------------------------------------------- numbers of lines
SOLUTIONS = {
    "time_shift": [[model.time_shift]],
    "flow_matching_loss": [[model.flow_matching_loss]],
    "euler": [[sample.euler]],
    "heun": [[sample.heun]],
    "cfg": [[sample.cfg, sample.guide, sample.needs_guidance]],
    "patchify": [[references.patchify_of_project], [references.patchify_of_project]],
    "adaln_block": [[model.modulate], [model.Block.forward]],
    "rope": [[model.RoPE.__init__], [model.RoPE.forward]],
    "latent_statistics": [[train_decoder.latent_statistics]],
    "add_noise": [[train_decoder.add_noise]],
    "adaptive_weight": [[train_decoder.adaptive_weight]],
    "frechet_distance": [[metrics.frechet_distance, metrics.square_root]],
}


def count_statements(source):
    """Statements in the body of a function, without its docstring. An else or except counts, too.
    """
    function = ast.parse(textwrap.dedent(source)).body[0]
    count = 0
    for node in ast.walk(function):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, (ast.stmt, ast.ExceptHandler)) and not is_docstring:
            count += 1
        if isinstance(node, ast.If) and node.orelse:
            count += 1
    return count - 1                                   # the def itself


@pytest.mark.shipped
@pytest.mark.parametrize("name", references.EXERCISES)
def test_the_lines_of_the_solution_are_counted_right(name):
    source = (FOLDER / f"{name}.py").read_text()
    claimed = re.findall(r"Lines of the solution: (\d+)", source)
    counted = []
    for functions in SOLUTIONS[name]:
        counted.append(sum(count_statements(inspect.getsource(f)) for f in functions))
    assert [int(number) for number in claimed] == counted
    assert f"| {' + '.join(claimed)} |" in (FOLDER / "README.md").read_text()


# What the docstrings say of solutions that leave out the project's extras, as those by hand do.
SHORTER = {
    "cfg": ["8 give the same"],
    "rope": ["8 without", "4 without"],
    "latent_statistics": ["9."],
    "frechet_distance": ["3 give the same"],
}


@pytest.mark.parametrize("name", SHORTER)
def test_shorter_solutions_are_as_short_as_is_said(name):
    source = (FOLDER / f"{name}.py").read_text()
    for words, body in zip(SHORTER[name], BY_HAND[name], strict=True):
        imports = body.count("import ")
        function = "def f():\n" + textwrap.indent(textwrap.dedent(body), "    ")
        assert words in source
        assert int(re.match(r"\d+", words)[0]) == count_statements(function) - imports

"""Time grids, solvers, guidance, and the sampling script. Run: python -m pytest tests/test_sample.py"""
import argparse
import math

import numpy as np
import pytest
import torch
from PIL import Image

import runtime
import sample
from sample import (autoguidance, cfg, draw, euler, euler_maruyama, generate, heun, load_dit, time_grid,
                    to_images)

from conftest import SHIPPED
from test_model import shake, small


@pytest.mark.parametrize("shift", [0.9, 1.0, 1.118, 6.93])
def test_time_grid_runs_from_1_to_0(shift):
    grid = time_grid(10, shift)
    assert len(grid) == 11 and grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()


def test_release_grid_is_that_of_the_facts():
    shift = math.sqrt(196_608 / 4096)
    grid = time_grid(50, shift, release_grid=True)
    assert len(grid) == 50 and grid[0] == 1                            # 49 evaluations
    u = 1 - np.arange(50) * 0.999 / 49                                 # linspace(1, 0.001, 50), shifted
    np.testing.assert_allclose(grid, 48 ** 0.5 * u / (1 + (48 ** 0.5 - 1) * u), atol=1e-6)
    assert abs(grid[-2] - 0.1315) < 1e-4 and abs(grid[-1] - 0.00689) < 1e-5
    assert abs(time_grid(50, math.sqrt(786_432 / 4096), True)[-1] - 0.01368) < 1e-5


def test_euler_is_exact_on_a_linear_path():
    x0, eps = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for solver in (euler, heun):
        out = solver(lambda x, t: eps - x0, eps, time_grid(7, 2.0))
        torch.testing.assert_close(out, x0)


@pytest.mark.parametrize("solver, order, evaluations", [(euler, 1, 16), (heun, 2, 31)])
def test_orders_and_number_of_evaluations(solver, order, evaluations):
    start, calls = torch.ones(1, 1, 1, 1, dtype=torch.float64), []

    def velocity(x, t):
        calls.append(1)
        return -x * t.view(-1, 1, 1, 1)                                # x(0) = x(1) * exp(1/2)

    errors = [abs(solver(velocity, start, time_grid(n, 1.0)).item() - math.exp(0.5)) for n in (16, 32)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.25
    calls.clear()
    solver(velocity, start, time_grid(16, 1.0))
    assert len(calls) == evaluations


@pytest.mark.parametrize("solver, steps", [(euler, 1000), (heun, 200), (euler_maruyama, 1000)])
@pytest.mark.parametrize("shift", [1.0, 6.93])
def test_every_solver_reaches_the_mean_and_covariance_of_a_gaussian(solver, steps, shift):
    """Data N(mean, cov): the velocity is known, E[eps - x0 | x]; so is the marginal where the grid ends."""
    mean = torch.tensor([3.0, -1.0], dtype=torch.float64)
    cov = torch.tensor([[0.5, 0.3], [0.3, 0.8]], dtype=torch.float64)

    def marginal(t):
        return (1 - t) * mean, (1 - t) ** 2 * cov + t ** 2 * torch.eye(2)

    def velocity(x, t):
        centre, spread = marginal(t[0].item())
        whitened = torch.linalg.solve(spread, (x - centre).T).T
        return t[0] * whitened - (mean + (1 - t[0]) * whitened @ cov)

    start = torch.randn(40_000, 2, dtype=torch.float64)
    start = start - start.mean(0)                                      # with the moments of N(0,1), exactly
    start = start @ torch.linalg.inv(torch.linalg.cholesky(start.T.cov())).T
    out = solver(velocity, start, time_grid(steps, shift))
    assert ((out.mean(0) - mean) / mean).abs().max() < 0.02
    assert (out.T.cov() - cov).abs().max() < 0.02 * cov.abs().max()
    again = torch.corrcoef(torch.cat([start, out], 1).T)[0, 2]         # of the start with the end
    assert abs(again) < 0.1 if solver is euler_maruyama else again > 0.9


def test_reverse_ode_returns_to_the_image():
    """A drawn image -> noise -> image, along the same ODE: the noise and the image both come back."""
    model, rae, _ = load_dit(SHIPPED)
    eps, y = sample.noise((192, 4, 4), 0, range(1)), torch.tensor([35])
    times = time_grid(200, math.sqrt(eps[0].numel() / model.shift_base))
    with torch.no_grad():
        z = heun(cfg(model, y, 36, 1.0), eps, times)
        again = heun(cfg(model, y, 36, 1.0), z, times.flip(0))
        back = heun(cfg(model, y, 36, 1.0), again, times)
        assert (again - eps).square().mean() < 0.02 and (z - eps).square().mean() > 1
        assert (rae.decode(back) - rae.decode(z)).square().mean() < 1e-4       # 40 dB


def test_guidance_of_scale_1_is_conditional_and_costs_one_forward():
    model, weak = shake(small(True)).eval(), shake(small(False)).eval()
    x, t, y = torch.randn(3, 8, 4, 4), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 1, 2])
    rows = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    weak.register_forward_pre_hook(lambda _, inputs: rows.append(-len(inputs[0])))
    conditional = model(x, t, y)
    rows.clear()
    assert torch.equal(cfg(model, y, 5, 1.0)(x, t), conditional)
    assert torch.equal(autoguidance(model, weak, y, 1.0)(x, t), conditional)
    assert torch.equal(cfg(model, y, 5, 3.0, (0.95, 1))(x, t), conditional)
    assert torch.equal(autoguidance(model, weak, y, 3.0, (0.95, 1))(x, t), conditional)
    assert rows == [3, 3, 3, 3]                                        # no second forward, no weak one
    rows.clear()
    null = model(x, t, torch.full_like(y, 5))
    inside = cfg(model, y, 5, 3.0, (0.4, 0.6))(x, t)                   # only the second row lies within
    torch.testing.assert_close(inside[[0, 2]], conditional[[0, 2]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inside[1], (null + 3 * (conditional - null))[1], atol=1e-5, rtol=1e-5)
    guided = autoguidance(model, weak, y, 1.5)(x, t)
    assert rows[:4] == [3, 6, 3, -3]
    start = weak(x, t, y)
    torch.testing.assert_close(guided, start + 1.5 * (conditional - start), atol=1e-5, rtol=1e-5)


def test_guidance_by_conditions_of_many_tokens():
    """y: b n d; the null condition broadcasts to it and makes the second half of the batch."""
    seen, x, t = [], torch.randn(2, 8, 4, 4), torch.rand(2)
    y, null = torch.randn(2, 5, 6), torch.randn(1, 6)

    def model(x, t, y):
        seen.append(y)
        return x * y.mean((1, 2)).view(-1, 1, 1, 1)
    guided = cfg(model, y, null, 3.0)(x, t)
    assert torch.equal(seen[0], torch.cat([y, null.expand_as(y)]))
    start = model(x, t, null.expand_as(y))
    torch.testing.assert_close(guided, start + 3 * (model(x, t, y) - start))
    assert torch.equal(cfg(model, y, null, 1.0)(x, t), model(x, t, y))


FLAGS = argparse.Namespace(seed=3, guidance=2.0, interval=(0, 1), solver="euler",
                           sampling_steps=4, release_grid=False)


@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_images_do_not_depend_on_the_batch(solver):
    model, rae, _ = load_dit(SHIPPED)
    labels, flags = [0, 7, 14, 21, 28], argparse.Namespace(**{**vars(FLAGS), "solver": solver})
    together = generate(model, rae, labels, flags)
    apart = torch.cat([generate(model, rae, labels[i:i + 1], flags, [i]) for i in range(5)])
    assert together.shape == (5, 64, 64, 3) and together.dtype == torch.uint8
    assert (together.int() - apart.int()).abs().max() <= 1             # a rounding at most
    latents = draw(model, torch.tensor(labels), flags, range(5))
    assert latents.shape == (5, 192, 4, 4) and torch.equal(to_images(rae, latents), together)
    flags.seed = 4
    other = generate(model, rae, labels, flags)
    assert (together.int() - other.int()).abs().max() > 20


def run(*argv):
    sample.main(sample.parse_args([str(a) for a in argv]))


def test_script_writes_grid_folder_and_npz(tmp_path):
    quick = ["--sampling_steps", 2, "--labels", "red_circle", 35, "--n", 5]
    run(*quick, "--out", tmp_path / "grid.png")
    run(*quick, "--out", tmp_path / "a.npz", "--batch", 2)
    run(*quick, "--out", tmp_path / "folder", "--batch", 3)
    arrays = np.load(tmp_path / "a.npz")
    assert arrays["arr_0"].shape == (5, 64, 64, 3) and arrays["labels"].tolist() == [0, 35, 0, 35, 0]
    files = sorted((tmp_path / "folder").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(5)]
    images = np.stack([np.asarray(Image.open(f)) for f in files]).astype(int)
    assert np.abs(images - arrays["arr_0"]).max() <= 1
    assert Image.open(tmp_path / "grid.png").size == (2 * 66 + 2, 28 + 3 * 66 + 2)
    run("--labels", "none", "--n", 2, "--sampling_steps", 2, "--solver", "heun",
        "--out", tmp_path / "none.png")
    run(*quick, "--weak_ckpt", SHIPPED, "--guidance", 1.5, "--out", tmp_path / "same.npz")
    run(*quick, "--guidance", 1, "--out", tmp_path / "plain.npz")      # guided by itself: nothing changes
    same, plain = (np.load(tmp_path / f"{x}.npz")["arr_0"].astype(int) for x in ("same", "plain"))
    assert np.abs(same - plain).max() <= 1


@pytest.mark.parametrize("argv, message", [
    (["--sampling_steps", "-3"], "--sampling_steps: -3 must be at least 1"),
    (["--guidance", "0.5"], "--guidance: 0.5 must be at least 1"),
    (["--interval", "0.7", "0.2"], "--interval 0.7 0.2 must be two times"),
    (["--n", "0"], "--n: 0 must be at least 1"),
    (["--seed", "-1"], "--seed: -1 must be at least 0"),
    (["--guid", "2"], "unrecognized arguments: --guid"),
])
def test_bad_flags_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(argv)
    assert message in capsys.readouterr().err


def test_weak_checkpoint_must_share_the_latents(tmp_path):
    state = runtime.load_checkpoint(SHIPPED)
    state["rae"]["latent_mean"] = state["rae"]["latent_mean"] + 1
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt has other classes or latents than --ckpt"):
        run("--weak_ckpt", tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no weights model; use --weights ema"):
        run("--weights", "model")
    state["args"]["class_dropout"] = 0
    torch.save(state, tmp_path / "undropped.pt")
    with pytest.raises(ValueError, match="needs a model trained with label dropout"):
        run("--ckpt", tmp_path / "undropped.pt")


def test_bad_labels_and_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match="--labels pink_circle: not among the model's 36 classes"):
        run("--labels", "pink_circle")
    with pytest.raises(FileNotFoundError, match="nothing.pt does not exist"):
        run("--ckpt", tmp_path / "nothing.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match="cut.pt is no checkpoint that can be read safely"):
        run("--ckpt", tmp_path / "cut.pt")
    torch.save({"x": argparse.Namespace}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="with code in it"):
        run("--ckpt", tmp_path / "code.pt")
    with pytest.raises(ValueError, match="tiny_encoder.safetensors is no checkpoint"):
        run("--ckpt", "assets/tiny_encoder.safetensors")

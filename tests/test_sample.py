"""Time grids, solvers, guidance, and the sampling script.

Run: python -m pytest tests/test_sample.py
"""
import argparse
import math

import numpy as np
import pytest
import torch
from PIL import Image

import runtime
import sample
from conftest import SHIPPED, run_script
from release import load_dit
from sample import (
    autoguidance,
    cfg,
    draw,
    euler,
    euler_maruyama,
    generate,
    heun,
    time_grid,
    to_images,
)
from test_model import randomise, small_model


# ---------------------------------------------------------------------------- time grids
@pytest.mark.parametrize("shift", [0.9, 1.0, 1.118, 6.93])
def test_time_grid_runs_from_1_to_0(shift):
    grid = time_grid(10, shift)
    assert len(grid) == 11
    assert grid[0] == 1 and grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_release_grid_is_the_official_one():
    a = math.sqrt(196_608 / 4096)                      # DINOv2-B at 256 px
    grid = time_grid(50, a, release_grid=True)
    u = 1 - np.arange(50) * 0.999 / 49                 # linspace(1, 0.001, 50)
    assert len(grid) == 50                             # 49 evaluations
    assert grid[0] == 1
    np.testing.assert_allclose(grid, a * u / (1 + (a - 1) * u), atol=1e-6)
    assert abs(grid[-2] - 0.1315) < 1e-4
    assert abs(grid[-1] - 0.00689) < 1e-5


def test_release_grid_at_512_px_ends_at_the_official_time():
    grid = time_grid(50, math.sqrt(786_432 / 4096), release_grid=True)
    assert abs(grid[-1] - 0.01368) < 1e-5


# ---------------------------------------------------------------------------- solvers
@pytest.mark.parametrize("solver", [euler, heun])
def test_straight_paths_are_integrated_exactly(solver):
    x0 = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    eps = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    out = solver(lambda x, t: eps - x0, eps, time_grid(7, 2.0))
    torch.testing.assert_close(out, x0)


@pytest.mark.parametrize("solver, order", [(euler, 1), (heun, 2)])
def test_order_of_the_error(solver, order):
    def velocity(x, t):
        return -x * t.view(-1, 1, 1, 1)                # x(0) = x(1) * exp(1/2)

    def error(steps):
        start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        return abs(solver(velocity, start, time_grid(steps, 1.0)).item() - math.exp(0.5))

    assert abs(math.log2(error(16) / error(32)) - order) < 0.25


@pytest.mark.parametrize("solver, evaluations", [(euler, 16), (heun, 31)])
def test_number_of_evaluations(solver, evaluations):
    times = []

    def velocity(x, t):
        times.append(t)
        return -x

    solver(velocity, torch.ones(1, 1, 1, 1), time_grid(16, 1.0))
    assert len(times) == evaluations


class Gaussian:
    """Data from N(mean, cov), whose velocity E[eps - x0 | x_t] is known."""
    mean = torch.tensor([3.0, -1.0], dtype=torch.float64)
    cov = torch.tensor([[0.5, 0.3], [0.3, 0.8]], dtype=torch.float64)

    def velocity(self, x, t):                          # b 2, b
        t = t[0].item()
        x_t_mean = (1 - t) * self.mean
        x_t_cov = (1 - t) ** 2 * self.cov + t ** 2 * torch.eye(2)
        whitened = torch.linalg.solve(x_t_cov, (x - x_t_mean).T).T
        x0_given_x_t = self.mean + (1 - t) * whitened @ self.cov
        return t * whitened - x0_given_x_t


def normal_samples_with_exact_moments(n):
    """n samples b 2 of N(0, 1) whose own mean and covariance are 0 and 1."""
    x = torch.randn(n, 2, dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T


@pytest.mark.parametrize("solver, steps", [(euler, 1000), (heun, 200), (euler_maruyama, 1000)])
@pytest.mark.parametrize("shift", [1.0, 6.93])
def test_every_solver_reaches_the_moments_of_a_gaussian(solver, steps, shift):
    data = Gaussian()
    start = normal_samples_with_exact_moments(40_000)

    out = solver(data.velocity, start, time_grid(steps, shift))

    assert ((out.mean(0) - data.mean) / data.mean).abs().max() < 0.02
    assert (out.T.cov() - data.cov).abs().max() < 0.02 * data.cov.abs().max()
    correlation = torch.corrcoef(torch.stack([start[:, 0], out[:, 0]]))[0, 1]
    if solver is euler_maruyama:                       # fresh noise makes it forget the start
        assert abs(correlation) < 0.1
    else:
        assert correlation > 0.9


@torch.no_grad()
def test_reverse_ode_returns_to_the_image():
    """Noise -> image -> noise -> image along the same ODE: noise and image both come back."""
    model, rae, _ = load_dit(SHIPPED)
    eps = sample.noise((192, 4, 4), 0, range(1))
    velocity = cfg(model, torch.tensor([35]), 36, 1.0)
    times = time_grid(200, math.sqrt(eps[0].numel() / model.shift_base))

    latents = heun(velocity, eps, times)
    eps_again = heun(velocity, latents, times.flip(0))
    latents_again = heun(velocity, eps_again, times)

    assert (eps_again - eps).square().mean() < 0.02
    assert (latents - eps).square().mean() > 1
    difference = rae.decode(latents_again) - rae.decode(latents)
    assert difference.square().mean() < 1e-4           # 40 dB


# ---------------------------------------------------------------------------- guidance
@pytest.fixture
def guided_models():
    """A model, a weak model, and an input (x, t, y) for both."""
    model = randomise(small_model(head=True)).eval()
    weak = randomise(small_model(head=False)).eval()
    x = torch.randn(3, 8, 4, 4)
    t = torch.tensor([0.2, 0.5, 0.9])
    y = torch.tensor([0, 1, 2])
    return model, weak, x, t, y


def record_batch_sizes(model):
    """A list to which each forward pass of the model appends its batch size."""
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    return sizes


def test_guidance_that_does_not_act_is_conditional_and_costs_one_forward(guided_models):
    model, weak, x, t, y = guided_models
    conditional = model(x, t, y)
    batch_sizes = record_batch_sizes(model)
    weak_batch_sizes = record_batch_sizes(weak)

    assert torch.equal(cfg(model, y, 5, 1.0)(x, t), conditional)
    assert torch.equal(autoguidance(model, weak, y, 1.0)(x, t), conditional)
    outside = (0.95, 1)                                # an interval without any t
    assert torch.equal(cfg(model, y, 5, 3.0, outside)(x, t), conditional)
    assert torch.equal(autoguidance(model, weak, y, 3.0, outside)(x, t), conditional)

    assert batch_sizes == [3, 3, 3, 3]
    assert weak_batch_sizes == []


def test_classifier_free_guidance_acts_within_its_interval(guided_models):
    model, _, x, t, y = guided_models
    conditional = model(x, t, y)
    null = model(x, t, torch.full_like(y, 5))
    batch_sizes = record_batch_sizes(model)

    guided = cfg(model, y, 5, 3.0, (0.4, 0.6))(x, t)   # only the second time lies within

    assert batch_sizes == [6]
    expected = null + 3 * (conditional - null)
    torch.testing.assert_close(guided[1], expected[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(guided[[0, 2]], conditional[[0, 2]], atol=1e-5, rtol=1e-5)


def test_autoguidance_starts_from_the_weak_model(guided_models):
    model, weak, x, t, y = guided_models
    conditional = model(x, t, y)
    by_weak = weak(x, t, y)
    batch_sizes = record_batch_sizes(model)
    weak_batch_sizes = record_batch_sizes(weak)

    guided = autoguidance(model, weak, y, 1.5)(x, t)

    assert batch_sizes == [3] and weak_batch_sizes == [3]
    expected = by_weak + 1.5 * (conditional - by_weak)
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-5)


def test_guidance_by_conditions_of_many_tokens():
    """y: b n d; the null condition broadcasts to it and makes the second half of the batch."""
    x = torch.randn(2, 8, 4, 4)
    t = torch.rand(2)
    y = torch.randn(2, 5, 6)
    null = torch.randn(1, 6)
    conditions = []

    def model(x, t, y):
        conditions.append(y)
        return x * y.mean((1, 2)).view(-1, 1, 1, 1)

    guided = cfg(model, y, null, 3.0)(x, t)

    assert torch.equal(conditions[0], torch.cat([y, null.expand_as(y)]))
    v_null = model(x, t, null.expand_as(y))
    torch.testing.assert_close(guided, v_null + 3 * (model(x, t, y) - v_null))
    assert torch.equal(cfg(model, y, null, 1.0)(x, t), model(x, t, y))


# ---------------------------------------------------------------------------- images
def four_steps(solver, seed=3):
    """Sampling flags."""
    return argparse.Namespace(seed=seed, guidance=2.0, interval=(0, 1), solver=solver,
                              sampling_steps=4, release_grid=False)


@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_images_do_not_depend_on_the_batch(solver):
    model, rae, _ = load_dit(SHIPPED)
    labels = [0, 7, 14, 21, 28]
    args = four_steps(solver)

    together = generate(model, rae, labels, args)
    alone = [generate(model, rae, [labels[i]], args, indices=[i]) for i in range(5)]

    assert together.shape == (5, 64, 64, 3) and together.dtype == torch.uint8
    assert (together.int() - torch.cat(alone).int()).abs().max() <= 1      # of rounding
    latents = draw(model, torch.tensor(labels), args, range(5))
    assert latents.shape == (5, 192, 4, 4)
    assert torch.equal(to_images(rae, latents), together)


@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_images_depend_on_the_seed(solver):
    model, rae, _ = load_dit(SHIPPED)
    labels = [0, 7, 14, 21, 28]
    images = generate(model, rae, labels, four_steps(solver, seed=3))
    others = generate(model, rae, labels, four_steps(solver, seed=4))
    assert (images.int() - others.int()).abs().max() > 20


# ---------------------------------------------------------------------------- the script
QUICK = ["--sampling_steps", 2, "--labels", "red_circle", 35, "--n", 5]


def test_script_writes_grid_folder_and_npz(tmp_path):
    run_script(sample, *QUICK, "--out", tmp_path / "grid.png")
    run_script(sample, *QUICK, "--out", tmp_path / "a.npz", "--batch", 2)
    run_script(sample, *QUICK, "--out", tmp_path / "folder", "--batch", 3)

    assert Image.open(tmp_path / "grid.png").size == (2 * 66 + 2, 28 + 3 * 66 + 2)
    arrays = np.load(tmp_path / "a.npz")
    assert arrays["arr_0"].shape == (5, 64, 64, 3)
    assert arrays["labels"].tolist() == [0, 35, 0, 35, 0]
    files = sorted((tmp_path / "folder").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(5)]
    images = np.stack([np.asarray(Image.open(f)) for f in files])
    assert np.abs(images.astype(int) - arrays["arr_0"]).max() <= 1


def test_script_draws_unconditionally(tmp_path):
    run_script(sample, "--labels", "none", "--n", 2, "--sampling_steps", 2, "--solver", "heun",
               "--out", tmp_path / "none.png")
    assert (tmp_path / "none.png").exists()


def test_autoguidance_of_a_model_by_itself_changes_nothing(tmp_path):
    run_script(sample, *QUICK, "--weak_ckpt", SHIPPED, "--guidance", 1.5,
               "--out", tmp_path / "guided.npz")
    run_script(sample, *QUICK, "--guidance", 1, "--out", tmp_path / "plain.npz")
    guided = np.load(tmp_path / "guided.npz")["arr_0"]
    plain = np.load(tmp_path / "plain.npz")["arr_0"]
    assert np.abs(guided.astype(int) - plain).max() <= 1


@pytest.mark.parametrize("argv, message", [
    (["--sampling_steps", "-3"], "--sampling_steps: -3 must be at least 1"),
    (["--guidance", "0.5"], "--guidance: 0.5 must be at least 1"),
    (["--interval", "0.7", "0.2"], "--interval 0.7 0.2 must be two times"),
    (["--n", "0"], "--n/--num_images: 0 must be at least 1"),
    (["--seed", "-1"], "--seed: -1 must be at least 0"),
    (["--guid", "2"], "unrecognized arguments: --guid"),
])
def test_bad_flags_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(argv)
    assert message in capsys.readouterr().err


def test_resolving_flags_leaves_the_given_ones_as_they_are():
    given = argparse.Namespace(**dict.fromkeys(sample.MODEL_DEFAULTS), prompt=None)
    before = dict(vars(given))
    resolved = sample.resolve_model_flags(given, text=False)
    assert vars(given) == before
    assert resolved.sampling_steps == 48 and resolved.solver == "euler_maruyama"


def test_weak_checkpoint_must_share_the_latents(tmp_path):
    state = runtime.load_checkpoint(SHIPPED)
    state["rae"]["latent_mean"] = state["rae"]["latent_mean"] + 1
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt has other classes or latents than --ckpt"):
        run_script(sample, "--weak_ckpt", tmp_path / "other.pt")


def test_weights_that_the_checkpoint_lacks_are_named():
    with pytest.raises(ValueError, match="holds no weights model; use --weights ema"):
        run_script(sample, "--weights", "model")


def test_guidance_needs_label_dropout_in_training(tmp_path):
    state = runtime.load_checkpoint(SHIPPED)
    state["args"]["class_dropout"] = 0
    torch.save(state, tmp_path / "no_dropout.pt")
    with pytest.raises(ValueError, match="needs a model trained with label dropout"):
        run_script(sample, "--ckpt", tmp_path / "no_dropout.pt")


def test_bad_labels_are_named():
    with pytest.raises(ValueError, match="--labels pink_circle: not among the model's 36 classes"):
        run_script(sample, "--labels", "pink_circle")


def test_bad_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt does not exist"):
        run_script(sample, "--ckpt", tmp_path / "nothing.pt")

    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match="cut.pt is no checkpoint that can be read safely"):
        run_script(sample, "--ckpt", tmp_path / "cut.pt")

    torch.save({"x": argparse.Namespace}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="with code in it"):
        run_script(sample, "--ckpt", tmp_path / "code.pt")

    with pytest.raises(ValueError, match="tiny_encoder.safetensors is no checkpoint"):
        run_script(sample, "--ckpt", "assets/tiny_encoder.safetensors")

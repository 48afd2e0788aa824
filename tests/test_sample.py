"""Time grids, solvers, guidance, and the sampling script.

Run: python -m pytest tests/test_sample.py
"""
import argparse
import itertools
import math
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import pictures
import progress
import sample
import storage
from conftest import ROOT, SHIPPED, run_script, start
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
from shapes import Scene, unknown_words
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


@pytest.mark.parametrize("solver, steps", [(euler, 1000), (heun, 200), (euler_maruyama, 700)])
@pytest.mark.parametrize("shift", [1.0, 6.93])
def test_every_solver_reaches_the_moments_of_a_gaussian(solver, steps, shift):
    data = Gaussian()
    start = normal_samples_with_exact_moments(20_000)

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
    times = time_grid(150, math.sqrt(eps[0].numel() / model.shift_base))

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


def test_images_that_are_not_finite_are_refused():
    """They would be black."""
    _, rae, _ = load_dit(SHIPPED)
    latents = torch.zeros(2, 192, 4, 4)
    latents[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="the model draws latents that are not finite"):
        to_images(rae, latents)
    with torch.no_grad():
        rae.decoder.decoder_pred.bias[0] = math.nan
    with pytest.raises(ValueError, match="the model draws pixels that are not finite"):
        to_images(rae, torch.zeros(1, 192, 4, 4))


# ---------------------------------------------------------------------------- grids
def test_a_long_caption_is_cut_to_four_lines():
    lines = pictures.caption_lines("a red star and " * 1000, 64)
    assert len(lines) == 4
    assert lines[0] == "a red star"
    assert lines[3].endswith("...")
    assert max(len(line) for line in lines) <= 10      # letters of 6 px


@pytest.mark.parametrize("text", [
    "two\nlines\r\n\ttab", "nul\0 bell\a escape\x1b[31m", "\U0001f9a6\u200d\u2642\ufe0f otter",
    "half a pair \udcff", "\u202eright to left", "", "x" * 400_000, "\u732b" * 50])
def test_any_caption_can_be_drawn(text):
    images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    sheet = pictures.draw_grid(images, [text, "a red star"])
    assert sheet.size[0] == 2 * 66 + 2
    assert sheet.size[1] <= 4 + 4 * 12 + 66 + 2


@pytest.mark.parametrize("n, captions, width, height", [
    (100_000, 36, 64, 64),                             # many images of a class
    (100_000, 100_000, 64, 64),                        # `random`: a caption for each
    (50_000, 1000, 256, 256),
    (48, 12, 1024, 1024),
    (30, 3, 64, 3000),
])
def test_a_grid_is_bounded(n, captions, width, height):
    shown = pictures.most_in_grid(captions, width, height)
    assert 0 < shown < n
    tiny = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(shown, height, width, 3)
    sheet = pictures.draw_grid(tiny, ["a caption of many, many words " * 9] * captions)
    assert max(sheet.size) <= pictures.GRID_SIDE


def test_a_small_grid_shows_all():
    assert pictures.most_in_grid(36, 64, 64) > 108


# ---------------------------------------------------------------------------- animations
@pytest.mark.parametrize("steps, frames", [
    (1, [0, 1]), (3, [0, 1, 2, 3]), (48, list(range(0, 49, 2)))])
def test_frames_are_evenly_spaced_from_noise_to_data(steps, frames):
    assert sample.frame_steps(steps) == frames


def test_there_are_no_more_frames_for_more_steps():
    for steps in (25, 49, 50, 1000):
        frames = sample.frame_steps(steps)
        assert len(frames) == 25
        assert frames[0] == 0 and frames[-1] == steps


def test_the_guesses_of_heun_are_not_recorded():
    inputs = []

    def velocity(x, t):
        inputs.append(x)
        return -x

    times = time_grid(4, 1.0)
    states = {}
    with progress.progress_bar(7, "velocity") as bar:
        heun(sample.watched(velocity, bar, states), torch.ones(1, 1, 1, 1), times)

    assert len(inputs) == 7                            # noise, then a guess and a state, thrice
    assert list(states) == times[:-1].tolist()
    assert torch.equal(torch.cat(list(states.values())), torch.cat(inputs[::2]))


@pytest.mark.parametrize("solver", ["euler", "heun", "euler_maruyama"])
@pytest.mark.parametrize("release_grid", [False, True])
def test_recorded_states_go_from_noise_to_the_latents_and_change_nothing(solver, release_grid):
    model, _, _ = load_dit(SHIPPED)
    args = four_steps(solver)
    args.release_grid = release_grid
    labels = torch.tensor([35])
    states = {}

    latents = draw(model, labels, args, range(1), states=states)

    assert list(states) == sample.sampling_times(model, args).float().tolist()
    assert torch.equal(latents, draw(model, labels, args, range(1)))
    states = list(states.values())
    assert torch.equal(states[0], sample.noise((192, 4, 4), args.seed, range(1)))
    assert torch.equal(states[-1], latents)
    for x, x_next in itertools.pairwise(states):
        assert not torch.equal(x, x_next)


def read_frames(path):
    """The frames of an animation as RGB pictures, how long each is shown, and how often all are."""
    animation = Image.open(path)
    frames, milliseconds = [], []
    for i in range(animation.n_frames):
        animation.seek(i)
        frames.append(animation.convert("RGB"))
        milliseconds.append(animation.info["duration"])
    return frames, milliseconds, animation.info["loop"]


def difference(image, other):
    """Mean absolute difference of two pictures of one size, in grey levels."""
    return np.abs(np.asarray(image).astype(int) - np.asarray(other)).mean()


@pytest.mark.parametrize("flags, steps", [
    (["--labels", 0, 35, "--n", 2], 3),
    (["--labels", 0, 35, "--n", 3, "--batch", 2, "--solver", "heun"], 3),
    (["--labels", "none", "--n", 1, "--release_grid"], 2),
    (["--prompt", "a red star", "a blue ring", "--n", 2], 3),
])
def test_an_animation_goes_from_noise_to_the_grid(tmp_path, flags, steps):
    run_script(sample, *flags, "--sampling_steps", 3, "--out", tmp_path / "x.gif")
    run_script(sample, *flags, "--sampling_steps", 3, "--out", tmp_path / "x.png")

    frames, milliseconds, loops = read_frames(tmp_path / "x.gif")
    grid = Image.open(tmp_path / "x.png")
    assert milliseconds == [120] * steps + [2000]
    assert loops == 0                                  # without end
    assert frames[0].width == grid.width + pictures.SCHEDULE_SIZE[0]
    assert frames[0].height == max(grid.height, pictures.SCHEDULE_SIZE[1])
    of_grid = (0, 0, *grid.size)
    assert difference(frames[-1].crop(of_grid), grid) < 1.5             # of 256 colours
    assert difference(frames[0].crop(of_grid), grid) > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.gif", "x.png"]


def test_the_schedule_shows_where_the_solver_is():
    times = time_grid(8, 3.0).tolist()
    red = (255, 0, 0)
    left, top, right, bottom = pictures.SCHEDULE_AXES
    assert pictures.draw_schedule(times, 0).getpixel((left, top)) == red
    assert pictures.draw_schedule(times, 8).getpixel((right, bottom)) == red
    middle = ((left + right) // 2, round(bottom - 150 * times[4]))
    assert times[4] == 0.75
    assert pictures.draw_schedule(times, 4).getpixel(middle) == red


@pytest.mark.parametrize("flags, message", [
    (["--n", "73"], "--n 73 is too many for --out x.GIF, which shows at most 72"),
    (["--sampling_steps", "251"], "--sampling_steps 251 is too many for --out x.GIF"),
    (["--prompt", "a star", "--best_of", "2"], "--best_of 2 chooses among finished images"),
])
def test_what_an_animation_cannot_show_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        sample.parse_args([*flags, "--out", "x.GIF"])
    assert message in capsys.readouterr().err


def test_an_animation_is_refused_under_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        sample.parse_args(["--out", "x.gif"])
    assert "--out x.gif is drawn by one process, not 2" in capsys.readouterr().err


def test_an_animation_shows_one_image_of_each_class_up_to_a_bound():
    args = sample.parse_args(["--out", "x.gif"])
    assert sample.number_of_images(args, 36) == 36
    assert sample.number_of_images(args, 1000) == 72


def test_a_stopped_animation_leaves_nothing_half_written(tmp_path, draws_one_batch):
    (tmp_path / "x.gif").write_bytes(b"of an earlier run")
    draws_one_batch()
    with pytest.raises(KeyboardInterrupt):
        run_script(sample, *QUICK, "--batch", 3, "--out", tmp_path / "x.gif")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gif"]
    assert (tmp_path / "x.gif").read_bytes() == b"of an earlier run"


@pytest.mark.shipped
def test_the_shipped_animation_is_small_and_whole():
    path = ROOT / "assets" / "samples.gif"
    assert path.stat().st_size <= 1.5e6
    frames, milliseconds, loops = read_frames(path)
    assert milliseconds == [120] * 24 + [2000]
    assert loops == 0
    # The class grid of samples.png has the same images above two others of each class.
    grid = Image.open(ROOT / "assets" / "samples.png")
    first_images = (0, 28, 794, 28 + 64)               # of the first twelve classes
    assert difference(frames[-1].crop(first_images), grid.crop(first_images)) < 2


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


@pytest.mark.parametrize("name, kind", [
    ("x.png", "PNG"), ("x.jpg", "JPEG"), ("x.JPEG", "JPEG"), ("x.webp", "WEBP")])
def test_the_suffix_chooses_the_format_of_a_grid(tmp_path, name, kind):
    run_script(sample, "--labels", 0, "--n", 1, "--sampling_steps", 1, "--out", tmp_path / name)
    picture = Image.open(tmp_path / name)
    assert picture.format == kind
    assert picture.size == (68, 28 + 66 + 2 - 12)      # the caption takes a line
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["x.bmp", "x.npy", "x.tar.gz", "runs/v1.2"])
def test_other_suffixes_are_refused(tmp_path, name, capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(["--out", str(tmp_path / name)])
    assert "; use one of .png .jpg .jpeg .webp .gif .npz, or a folder" in capsys.readouterr().err


def test_an_npz_holds_what_numpy_writes(tmp_path):
    files = []
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), np.uint8)
    for i, image in enumerate(images):
        files.append(tmp_path / f"{i}.png")
        pictures.save_picture(Image.fromarray(image), files[i])
    with open(tmp_path / "x.npz", "wb") as f:
        sample.save_npz(f, files, np.arange(3), ["7", "8", "9"])
    arrays = np.load(tmp_path / "x.npz")
    assert np.array_equal(arrays["arr_0"], images)
    assert arrays["labels"].tolist() == [0, 1, 2]
    assert arrays["names"].tolist() == ["7", "8", "9"]


def test_noise_is_what_numpy_draws_for_seed_image_and_step():
    samples = sample.noise((2, 3), 7, [5, 2], step=4)
    for own_samples, i in zip(samples.numpy(), (5, 2), strict=True):
        expected = np.random.default_rng((7, i, 4)).standard_normal((2, 3), np.float32)
        assert np.array_equal(own_samples, expected)


def test_the_noise_of_a_step_is_drawn_before_it_is_asked_for(monkeypatch):
    shape, indices, cpu = (3, 4, 4), [5, 2, 9], torch.device("cpu")
    drawn = [threading.Event() for _ in range(3)]
    original = sample.noise

    def noise(shape, seed, indices, step):
        samples = original(shape, seed, indices, step)
        drawn[step].set()
        return samples

    monkeypatch.setattr(sample, "noise", noise)
    noises = sample.noise_ahead(shape, 7, indices, 2, cpu)
    for step in range(3):
        assert torch.equal(next(noises), original(shape, 7, indices, step))
        if step < 2:
            assert drawn[step + 1].wait(20)
    assert next(noises, None) is None


def drawn_in_batches(monkeypatch, tmp_path, in_second_batch):
    """Draw four images, two at a time, onto a disk that writes none before the second batch begins.

    in_second_batch: function that is called there. Returns their paths.
    """
    second_has_begun = threading.Event()
    original = sample.save_picture

    def save_late(image, path):
        assert second_has_begun.wait(20)
        original(image, path)

    def draw_images(numbers):
        if numbers[0] == 2:
            second_has_begun.set()
            in_second_batch()
        return torch.full((2, 8, 8, 3), numbers[0], dtype=torch.uint8)

    monkeypatch.setattr(sample, "save_picture", save_late)
    files = [tmp_path / f"{i}.png" for i in range(4)]
    with sample.says_what_is_kept(files):
        sample.draw_files(files, draw_images, batch=2)
    return files


def test_files_are_written_while_the_next_batch_is_drawn(monkeypatch, tmp_path):
    files = drawn_in_batches(monkeypatch, tmp_path, in_second_batch=lambda: None)
    assert [np.asarray(Image.open(file)).max() for file in files] == [0, 0, 2, 2]


def test_whoever_stops_while_files_are_written_is_told_of_all_of_them(monkeypatch, tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="2 of 4 images are kept"):
        drawn_in_batches(monkeypatch, tmp_path, in_second_batch=stop)


def test_a_file_that_a_thread_can_not_write_ends_the_run(tmp_path):
    (tmp_path / "0.png.tmp").mkdir()                   # which can not be written to
    files = [tmp_path / f"{i}.png" for i in range(4)]
    with pytest.raises(OSError, match="0.png.tmp"):
        sample.draw_files(files, lambda numbers: torch.zeros(2, 8, 8, 3).byte(), batch=2)


@pytest.fixture
def draws_one_batch(monkeypatch):
    """A function after which sampling is stopped in its second batch."""
    original = sample.generate

    def stop_in_the_second_batch():
        batches = []

        def generate_or_stop(*arguments):
            batches.append(1)
            if len(batches) == 2:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(sample, "generate", generate_or_stop)

    yield stop_in_the_second_batch
    monkeypatch.setattr(sample, "generate", original)


def test_a_stopped_run_goes_on_where_it_was(tmp_path, draws_one_batch):
    flags = [*QUICK, "--batch", 3, "--out"]
    run_script(sample, *flags, tmp_path / "whole.npz")
    draws_one_batch()
    message = "stopped; 3 of 5 images are kept, and it goes on when the command is given again"
    with pytest.raises(KeyboardInterrupt, match=message):
        run_script(sample, *flags, tmp_path / "cut.npz")

    run_script(sample, *flags, tmp_path / "cut.npz")

    whole, cut = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "cut.npz")
    assert np.abs(whole["arr_0"].astype(int) - cut["arr_0"]).max() <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.npz", "whole.npz"]


def test_a_run_that_is_stopped_at_once_keeps_nothing(tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", stop)
    with pytest.raises(KeyboardInterrupt, match="stopped before an image was drawn; nothing is"):
        run_script(sample, *QUICK, "--out", tmp_path / "x.npz")
    assert list(tmp_path.iterdir()) == []


def test_images_of_stopped_runs_do_not_pile_up(tmp_path, draws_one_batch, capsys):
    (tmp_path / "x.npz.mine.parts").mkdir()            # not one of ours
    for seed in (1, 2):
        draws_one_batch()
        with pytest.raises(KeyboardInterrupt):
            run_script(sample, *QUICK, "--batch", 3, "--seed", seed, "--out", tmp_path / "x.npz")
    draws_one_batch()
    with pytest.raises(KeyboardInterrupt):
        run_script(sample, *QUICK, "--batch", 3, "--out", tmp_path / "y.npz")

    capsys.readouterr()
    run_script(sample, *QUICK, "--batch", 5, "--seed", 2, "--out", tmp_path / "x.npz")

    assert capsys.readouterr().out.count("it is deleted when this run is done") == 1
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left[:2] == ["x.npz", "x.npz.mine.parts"]
    assert len(left) == 3 and left[2].startswith("y.npz.")


@pytest.mark.parametrize("limit, name", [(1000, "000000.png"), (20_000, "x.npz")])
def test_a_full_disk_is_one_line_with_the_path(tmp_path, limit, name):
    """A limit on the size of files stands in for the disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=name):
            run_script(sample, *QUICK, "--out", tmp_path / "x.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "x.npz").exists()

    run_script(sample, *QUICK, "--out", tmp_path / "x.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.shipped
def test_a_second_run_on_the_same_output_is_refused(tmp_path):
    flags = ["--n", 2000, "--sampling_steps", 2, "--batch", 4, "--out", tmp_path / "x.npz"]
    first = start(sample, *flags)
    deadline = time.time() + 60
    while not list(tmp_path.glob("*.parts/*.png")) and time.time() < deadline:
        time.sleep(0.05)
    try:
        with pytest.raises(ValueError, match="another process is writing to .*x.npz"):
            run_script(sample, *QUICK, "--out", tmp_path / "x.npz")
    finally:
        first.kill()
        first.join()
    run_script(sample, *QUICK, "--out", tmp_path / "x.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_what_a_grid_leaves_out_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "GRID_SIDE", 200)      # pixels: one image of each of 3 classes
    run_script(sample, "--n", 12, "--sampling_steps", 1, "--out", tmp_path / "x.png")
    assert "x.png shows 3 of the 12 images" in capsys.readouterr().out
    assert max(Image.open(tmp_path / "x.png").size) <= 200


@pytest.mark.parametrize("prompt, named", [
    ("a photo of an otter", "in place of otter\n"),
    ("two red circles and a blue star", ""),
    ("draw a small green ring above a cross", ""),
])
def test_prompts_beyond_the_world_of_the_model_are_told(tmp_path, capsys, prompt, named):
    run_script(sample, "--prompt", prompt, "--n", 1, "--sampling_steps", 1, "--out",
               tmp_path / "x.png")
    output = capsys.readouterr().out
    assert named in output
    assert ("has only ever seen coloured shapes" in output) == (named != "")


@pytest.mark.parametrize("prompt, unknown", [
    ("draw a red otter on a grey background", ["otter"]),
    ("Ein roter Stern", ["ein", "roter", "stern"]),
    ("\u732b", ["\u732b"]),
    ("\U0001f9a6", ["\U0001f9a6"]),
    ("two big red circles", []),                       # most of it is known
    ("small red star c7, large blue ring h2", []),
    ("2 stars", []),
    ("-", []),
])
def test_words_that_no_scene_can_show(prompt, unknown):
    assert unknown_words(prompt) == unknown


def test_all_captions_of_scenes_are_known():
    for i in range(100):
        for caption in Scene.random(0, i).captions():
            assert unknown_words(caption) == []


def test_a_model_of_other_images_may_know_any_word(capsys):
    state = dict(args=dict(data=["a=shapes:0.5", "b=photos.tar:0.5"]))
    sample.report_unknown_words(["a photo of an otter"], state)
    assert capsys.readouterr().out == ""


def test_classes_that_are_not_drawn_are_told(tmp_path, capsys):
    run_script(sample, "--labels", 0, 1, 2, "--n", 2, "--sampling_steps", 1, "--out",
               tmp_path / "x.png")
    assert "--n 2 draws the first 2 of 3 classes or prompts" in capsys.readouterr().out


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


@pytest.mark.parametrize("argv, message", [
    (["--weak_ckpt", "x.pt", "--guidance", "1"], "--weak_ckpt does nothing without guidance"),
    (["--interval", "0", "0.5", "--guidance", "1"], "--interval does nothing without guidance"),
    (["--prompt", "a star", "--verifier", "confidence"], "--verifier chooses among the candidates"),
    (["--labels", "none", "--guidance", "2"], "--guidance 2.0 does nothing with --labels none"),
    (["--best_of", "4"], "--best_of 4 needs --prompt"),
    (["--n", "1000000000"], "--n/--num_images: 1000000000 must be at least 1 and below 1000001"),
    (["--prompt", " "], "--prompt is given an empty text, perhaps a variable that is not set"),
    (["--prompt", "word " * 80_000], "a prompt has 400000 characters"),
    (["--prompt", "a \udcff star"], "is no valid UTF-8"),
])
def test_flags_that_do_nothing_and_prompts_that_say_nothing_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(argv)
    assert message in capsys.readouterr().err


def test_a_release_brings_its_guide_whether_or_not_it_acts():
    args = sample.parse_args(["--release", "imagenet256", "--guidance", "1"])
    assert args.weak_ckpt == "imagenet256/guide"


def test_prompts_and_classes_have_files_of_their_own():
    assert sample.parse_args([]).out == "samples.png"
    assert sample.parse_args(["--prompt", "a star"]).out == "prompts.png"
    assert sample.parse_args(["--prompt", "a star", "--out", "x"]).out == "x"


def test_weak_checkpoint_must_share_the_latents(tmp_path):
    state = storage.load_checkpoint(SHIPPED)
    state["rae"]["latent_mean"] = state["rae"]["latent_mean"] + 1
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt has other classes or latents than --ckpt"):
        run_script(sample, "--weak_ckpt", tmp_path / "other.pt")


def test_weights_that_the_checkpoint_lacks_are_named():
    with pytest.raises(ValueError, match="holds no weights model; use --weights ema"):
        run_script(sample, "--weights", "model")


@pytest.mark.shipped
def test_guidance_needs_label_dropout_in_training(tmp_path):
    state = storage.load_checkpoint(SHIPPED)
    state["args"]["class_dropout"] = 0
    torch.save(state, tmp_path / "no_dropout.pt")
    with pytest.raises(ValueError, match="needs a model trained with label dropout"):
        run_script(sample, "--ckpt", tmp_path / "no_dropout.pt")


@pytest.mark.parametrize("label, advice", [
    ("36", "0 to 35 or red circle"),
    ("-1", "0 to 35 or red circle"),
    ("pink_circle", "in place of pink_circle, try .*red_circle"),
    ("Blue Star", "in place of Blue_Star, try blue_star"),
    ("balanced", "balanced must stand alone"),
    ("xyz", "no name is like xyz"),
])
def test_bad_labels_are_named_with_what_was_meant(label, advice):
    names = load_dit(SHIPPED)[2]["class_names"]
    message = f"--labels {label.replace(' ', '_')}: not among the model's 36 classes.*{advice}"
    with pytest.raises(ValueError, match=message):
        sample.parse_labels([label, "red circle"], names, dropout=0.1)


def test_part_of_a_name_finds_it():
    names = ["n01440764_tench", "n01443537_goldfish", "twin", "twin"]
    with pytest.raises(ValueError, match="in place of tench, try n01440764_tench"):
        sample.parse_labels(["tench"], names, dropout=0.1)
    with pytest.raises(ValueError, match="twin is the name of several classes"):
        sample.parse_labels(["twin"], names, dropout=0.1)
    with pytest.raises(ValueError, match="`none`, the null class, needs a model trained with"):
        sample.parse_labels(["none"], names, dropout=0)


def test_names_that_are_numbers_are_not_taken_for_positions():
    """Classes 1, 2 and 3 of labels that start at 1."""
    assert sample.parse_labels(["1", "3"], ["1", "2", "3"], dropout=0.1) == [0, 2]
    with pytest.raises(ValueError, match="--labels 0: not among the model's 3 classes, 1 to 3"):
        sample.parse_labels(["0"], ["1", "2", "3"], dropout=0.1)


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

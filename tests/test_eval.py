"""Fréchet distance, PSNR, SSIM, verified accuracy, and the scripts that measure models.

Run: python -m pytest tests/test_eval.py
"""
import json

import numpy as np
import pytest
import scipy.linalg
import torch

import eval_decoder
import eval_fid
import release
from conftest import SHIPPED, run_script
from data import load_images, open_data
from eval_decoder import evaluate_reconstruction
from eval_fid import evaluate_generation
from metrics import Moments, frechet_distance, psnr, ssim, verify
from release import load_dit
from shapes import Scene

SHIPPED_T2I = str(release.SHIPPED_T2I)


# ---------------------------------------------------------------------------- Fréchet distance
@pytest.mark.parametrize("sizes", [[500], [1, 99, 400], [250, 250], [7] * 71 + [3]])
def test_moments_are_those_of_numpy_for_any_batches(sizes):
    features = torch.randn(500, 7) * 3 + 100
    moments = Moments()
    for batch in features.split(sizes):
        moments.add(batch)
    features = features.double().numpy()
    np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.cov, np.cov(features.T), rtol=1e-9, atol=1e-10)


def test_frechet_distance_of_gaussians_in_closed_form():
    a = torch.rand(6, dtype=torch.float64) + 0.5
    b = torch.rand(6, dtype=torch.float64) + 0.5
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    mean = torch.randn(6, dtype=torch.float64)
    cov_a, cov_b = q @ a.diag() @ q.T, q @ b.diag() @ q.T              # they commute
    distance = frechet_distance(torch.zeros(6), cov_a, mean, cov_b)
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert abs(distance - expected) < 1e-10


def test_frechet_distance_agrees_with_sqrtm():
    a, b = np.random.default_rng(0).normal(size=(2, 40, 12))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    distance = frechet_distance(np.zeros(12), cov_a, np.zeros(12), cov_b)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    assert abs(distance - np.trace(cov_a + cov_b - 2 * root)) < 1e-9


def test_frechet_distance_survives_rank_deficiency():
    few = np.random.default_rng(1).normal(size=(5, 64))
    mean, cov = few.mean(0), np.cov(few.T)
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-6


def test_frechet_distance_refuses_features_of_different_dimensions():
    with pytest.raises(ValueError, match="features of 3 and 4 dimensions differ"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))


# ---------------------------------------------------------------------------- pairs of images
def test_psnr_on_known_pairs():
    images = torch.randint(0, 200, (2, 32, 32, 3), dtype=torch.uint8)
    assert psnr(images, images).isinf().all()
    expected = torch.full((2,), 20 * np.log10(255 / 5), dtype=torch.float64)
    torch.testing.assert_close(psnr(images, images + 5), expected)


def test_ssim_on_known_pairs():
    images = torch.randint(0, 200, (2, 32, 32, 3), dtype=torch.uint8)
    assert torch.allclose(ssim(images, images), torch.ones(2, dtype=torch.float64))
    grey_100 = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
    grey_150 = torch.full((1, 32, 32, 3), 150, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100 ** 2 + 150 ** 2 + c1)
    assert abs(ssim(grey_100, grey_150).item() - expected) < 1e-12
    noise = torch.randint(-40, 40, images.shape)
    noisy = (images.int() + noise).clamp(0, 255).byte()
    assert 0.2 < ssim(images, noisy).mean() < 0.999


def test_ssim_refuses_images_smaller_than_its_window():
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(images, images)


# ---------------------------------------------------------------------------- verified accuracy
def test_verify_counts_colours_and_classes():
    scenes = [Scene.random(9, label, objects=1, label=label) for label in range(36)]
    images = torch.from_numpy(np.stack([scene.render(64) for scene in scenes]))
    assert verify(images, range(36)).tolist() == [36, 36, 0]
    # There are six shapes of each of the six colours.
    other_shapes = [label // 6 * 6 + (label + 1) % 6 for label in range(36)]
    assert verify(images, other_shapes).tolist() == [36, 0, 0]


def test_verify_counts_nothing_on_empty_images():
    grey = torch.full((3, 64, 64, 3), 128, dtype=torch.uint8)
    assert verify(grey, [0, 1, 2])[:2].tolist() == [0, 0]


def test_verify_counts_an_unsure_shape_as_wrong():
    y, x = np.mgrid[:64, :64] - 32.0
    crescent = (np.hypot(x, y) < 12) & (np.hypot(x - 8, y) > 9)
    image = torch.full((1, 64, 64, 3), 210, dtype=torch.uint8)
    image[0, torch.from_numpy(crescent)] = torch.tensor((222, 38, 42), dtype=torch.uint8)
    assert verify(image, [0]).tolist() == [1, 0, 1]                    # red, but of which shape?


def test_verify_wants_a_single_object():
    scene = Scene.random(9, 0, objects=2)
    image = torch.from_numpy(scene.render(64))[None]
    assert verify(image, [scene.objects[0].label])[:2].tolist() == [0, 0]


# ---------------------------------------------------------------------------- models
@pytest.fixture(scope="module")
def shipped():
    """The shipped DiT and RAE, and held-out images."""
    model, rae, _ = load_dit(SHIPPED, with_encoder=True)
    return model, rae, open_data("shapes", 64, split="val", objects=1)


def test_numbers_of_generation_do_not_depend_on_the_batch(shipped):
    args = eval_fid.parse_args(["--sampling_steps", "3"])
    by_12 = evaluate_generation(*shipped, args, 12, batch=12)
    by_5 = evaluate_generation(*shipped, args, 12, batch=5)
    assert by_12.keys() == by_5.keys()
    assert by_12["right_colour"] == by_5["right_colour"]
    # A pixel may round differently.
    assert abs(by_12["frechet_distance"] / by_5["frechet_distance"] - 1) < 1e-2


def test_numbers_of_reconstruction_do_not_depend_on_the_batch(shipped):
    _, rae, val = shipped
    by_12 = evaluate_reconstruction(rae, val, 12, batch=12)
    by_5 = evaluate_reconstruction(rae, val, 12, batch=5)
    assert abs(by_12["psnr"] - by_5["psnr"]) < 1e-3
    assert abs(by_12["ssim"] - by_5["ssim"]) < 1e-4


def test_script_prints_the_table_and_one_json_line(tmp_path, capsys):
    out = tmp_path / "results.json"
    results = run_script(eval_fid, "--n", 36, "--sampling_steps", 3, "--out", out)
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last_line) == results
    assert json.loads(out.read_text()) == results
    assert results["n"] == 36 and results["commit"] and results["guidance"] == 1.5


def test_reconstruction_by_the_autoencoder_of_each_stage():
    of_dit = run_script(eval_decoder, "--rae", SHIPPED, "--n", 24)
    assert of_dit["psnr"] > 20
    assert 0.5 < of_dit["ssim"] <= 1
    assert of_dit["features"] == "tiny"
    assert run_script(eval_decoder, "--rae", SHIPPED_T2I, "--n", 8)["psnr"] > 20
    assert run_script(eval_decoder, "--n", 8)["psnr"] > 20


def test_other_features_change_the_distance_alone():
    tiny = run_script(eval_decoder, "--rae", SHIPPED, "--n", 24)
    random = run_script(eval_decoder, "--rae", SHIPPED, "--n", 24, "--features", "random")
    assert random["features"] == "random"
    assert random["psnr"] == tiny["psnr"]
    assert abs(random["frechet_distance"] / tiny["frechet_distance"] - 1) > 1e-3


@pytest.mark.parametrize("argv, message", [
    (["--n", "1"], "--n/--num_images: 1 must be at least 2"),
    (["--features", "vae:8:16"], "--features vae:8:16 can't be used here"),
    (["--features", "nope"], "--features nope is neither one of"),
])
def test_bad_flags_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        eval_fid.parse_args(argv)
    assert message in capsys.readouterr().err


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt does not exist"):
        run_script(eval_fid, "--ckpt", tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        run_script(eval_fid, "--data", "nowhere")
    with pytest.raises(FileNotFoundError, match="nothing.pt does not exist"):
        run_script(eval_decoder, "--rae", tmp_path / "nothing.pt")


def test_the_images_of_an_npz_are_reconstructed(tmp_path):
    images = load_images(open_data("shapes", 64, split="val"), range(8))
    np.savez(tmp_path / "images.npz", arr_0=images.numpy())
    results = run_script(eval_decoder, "--data", tmp_path / "images.npz", "--n", 8)
    assert results["n"] == 8
    assert results["psnr"] > 25
    assert "readable" not in results

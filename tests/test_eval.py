"""Fréchet distance, PSNR, SSIM, verified accuracy, the script. Run: python -m pytest tests/test_eval.py"""
import json

import numpy as np
import pytest
import scipy.linalg
import torch

import eval_fid
import sample
from data import open_data
from eval_fid import (Moments, evaluate_generation, evaluate_reconstruction, frechet_distance, psnr, ssim,
                      verify)
from shapes import Scene

from conftest import SHIPPED


def test_moments_are_those_of_numpy_for_any_batches():
    x = torch.randn(500, 7) * 3 + 100
    for sizes in ([500], [1, 99, 400], [250, 250], [7] * 71 + [3]):
        moments = Moments()
        for rows in x.split(sizes):
            moments.add(rows)
        np.testing.assert_allclose(moments.mean, x.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.cov, np.cov(x.double().numpy().T), rtol=1e-9, atol=1e-10)


def test_frechet_distance_of_gaussians_in_closed_form():
    a, b = torch.rand(6, dtype=torch.float64) + 0.5, torch.rand(6, dtype=torch.float64) + 0.5
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    mu = torch.randn(6, dtype=torch.float64)
    expected = mu.square().sum() + (a.sqrt() - b.sqrt()).square().sum()             # commuting covariances
    distance = frechet_distance(torch.zeros(6), q @ a.diag() @ q.T, mu, q @ b.diag() @ q.T)
    assert abs(distance - expected) < 1e-10


def test_frechet_distance_agrees_with_sqrtm_and_survives_rank_deficiency():
    a, b = np.random.default_rng(0).normal(size=(2, 40, 12))
    covs = [np.cov(x.T) for x in (a, b)]
    expected = np.trace(covs[0] + covs[1] - 2 * scipy.linalg.sqrtm(covs[0] @ covs[1]).real)
    assert abs(frechet_distance(np.zeros(12), covs[0], np.zeros(12), covs[1]) - expected) < 1e-9
    few = np.random.default_rng(1).normal(size=(5, 64))
    cov = np.cov(few.T)
    assert abs(frechet_distance(few.mean(0), cov, few.mean(0), cov)) < 1e-6
    with pytest.raises(ValueError, match="features of 3 and 4 dimensions differ"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))


def test_psnr_and_ssim_on_known_pairs():
    a = torch.randint(0, 200, (2, 32, 32, 3), dtype=torch.uint8)
    assert psnr(a, a).isinf().all() and torch.allclose(ssim(a, a), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(psnr(a, a + 5), torch.full((2,), 20 * np.log10(255 / 5), dtype=torch.float64))
    flat, shifted = (torch.full((1, 32, 32, 3), grey, dtype=torch.uint8) for grey in (100, 150))
    c1 = (0.01 * 255) ** 2
    assert abs(ssim(flat, shifted).item() - (2 * 100 * 150 + c1) / (100 ** 2 + 150 ** 2 + c1)) < 1e-12
    noisy = (a.int() + torch.randint(-40, 40, a.shape)).clamp(0, 255).byte()
    assert 0.2 < ssim(a, noisy).mean() < 0.999
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(a[:, :8, :8], a[:, :8, :8])


def test_verified_accuracy_counts_and_unsure_is_wrong():
    scenes = [Scene.random(9, i, objects=1, label=i) for i in range(36)]
    images = torch.from_numpy(np.stack([s.render(64) for s in scenes]))
    assert verify(images, range(36)).tolist() == [36, 36, 0]
    assert verify(images, [(i // 6) * 6 + (i + 1) % 6 for i in range(36)]).tolist() == [36, 0, 0]
    assert verify(torch.full((3, 64, 64, 3), 128, dtype=torch.uint8), [0, 1, 2])[:2].tolist() == [0, 0]
    crescent = torch.full((1, 64, 64, 3), 210, dtype=torch.uint8)
    y, x = np.mgrid[:64, :64] - 32.0
    crescent[0, torch.from_numpy((np.hypot(x, y) < 12) & (np.hypot(x - 8, y) > 9))] = torch.tensor(
        (222, 38, 42), dtype=torch.uint8)
    assert verify(crescent, [0]).tolist() == [1, 0, 1]                 # red, but of which shape?
    two = torch.from_numpy(Scene.random(9, 0, objects=2).render(64))[None]
    assert verify(two, [Scene.random(9, 0, objects=2).objects[0].label])[:2].tolist() == [0, 0]


def flags(*argv):
    return eval_fid.parse_args([str(a) for a in argv])


def test_numbers_do_not_depend_on_the_batch():
    model, rae, _ = sample.load_dit(SHIPPED, encoder=True)
    val, args = open_data("shapes", 64, split="val", objects=1), flags("--sampling_steps", 3)
    one = evaluate_generation(model, rae, val, args, 12, batch=12)
    other = evaluate_generation(model, rae, val, args, 12, batch=5)
    assert one.keys() == other.keys() and one["right_colour"] == other["right_colour"]
    assert abs(one["frechet_distance"] / other["frechet_distance"] - 1) < 1e-2    # a pixel may round
    a, b = (evaluate_reconstruction(rae, val, 12, batch=n) for n in (12, 5))
    assert abs(a["psnr"] - b["psnr"]) < 1e-3 and abs(a["ssim"] - b["ssim"]) < 1e-4


def test_script_prints_the_table_and_one_json_line(tmp_path, capsys):
    metrics = eval_fid.main(flags("--n", 36, "--sampling_steps", 3, "--out", tmp_path / "m.json"))
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == metrics == json.loads((tmp_path / "m.json").read_text())
    assert metrics["n"] == 36 and metrics["commit"] and metrics["guidance"] == 1.5
    metrics = eval_fid.main(flags("--reconstruct", SHIPPED, "--n", 24))
    assert metrics["psnr"] > 20 and 0.5 < metrics["ssim"] <= 1 and metrics["features"] == "tiny"
    assert eval_fid.main(flags("--reconstruct", SHIPPED.replace("dit", "t2i"), "--n", 8))["psnr"] > 20
    other = eval_fid.main(flags("--reconstruct", SHIPPED, "--n", 24, "--features", "random"))
    assert other["features"] == "random" and other["psnr"] == metrics["psnr"]
    assert abs(other["frechet_distance"] / metrics["frechet_distance"] - 1) > 1e-3


def test_errors(tmp_path, capsys):
    with pytest.raises(SystemExit):
        flags("--n", 1)
    assert "--n: 1 must be at least 2" in capsys.readouterr().err
    for argv, message in ((("--features", "tiny", "--shapes_eval"), "--features does nothing with --shapes"),
                          (("--features", "vae:8:16"), "--features vae:8:16 can't be used here"),
                          (("--features", "nope"), "--features nope is neither one of")):
        with pytest.raises(SystemExit):
            flags(*argv)
        assert message in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="nothing.pt does not exist"):
        eval_fid.main(flags("--ckpt", tmp_path / "nothing.pt"))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        eval_fid.main(flags("--data", "nowhere"))

"""Inception, FID and its kin, files, statistics, the probe. Run: python -m pytest tests/test_metrics.py"""
import hashlib
import json
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import Inception3

import eval_fid
import model
import sample
import train_decoder
import train_dit
import train_t2i
from data import open_data
from eval_fid import (Inception, Moments, extrapolate, frechet_distance, image_set, inception_score,
                      kernel_distance, load_statistics, open_images, precision_recall)
from model import Encoder

from conftest import SHIPPED, torchrun


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights in the layout of the released ones, and its hash in place of theirs."""
    torch.manual_seed(0)
    net = Inception3(1008, aux_logits=False, init_weights=False)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 1.5), m.bias.data.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("inception") / eval_fid.INCEPTION[1]
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def trusted(weights, monkeypatch):
    monkeypatch.setattr(eval_fid, "INCEPTION_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    return weights


def photos(n, side=32, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8))


def folder(path, images):
    path.mkdir()
    for i, image in enumerate(images.numpy()):
        Image.fromarray(image).save(path / f"{i:03d}.png")
    return str(path)


def flags(*argv):
    return eval_fid.parse_args([str(a) for a in argv])


# ---------------------------------------------------------------------------------- the network
@pytest.mark.parametrize("side", [64, 320])
def test_inception_has_the_features_and_logits_of_torch_fidelity(trusted, side):
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    judge = theirs.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(trusted)).eval()
    seen = []
    judge.Mixed_6d.branch1x1.register_forward_hook(lambda m, x, y: seen.append(y))
    images, ours = photos(2, side), Inception(trusted)
    with torch.no_grad():
        pool, logits = judge(images.permute(0, 3, 1, 2))
        rows, spatial = ours(images)
    assert torch.allclose(rows, pool, rtol=1e-4, atol=1e-4 * pool.abs().max())
    assert torch.allclose(ours.logits(rows), logits, rtol=1e-4, atol=1e-4 * logits.abs().max())
    expected = seen[0][:, :7].permute(0, 2, 3, 1).flatten(1)           # h w c, as in ADM's statistics
    assert spatial.shape == (2, 2023) and torch.allclose(spatial, expected, rtol=1e-4, atol=1e-4)


def test_either_weight_file_is_found_and_no_other_is_taken(weights, trusted, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="put https://github.com/.*6726825d.pth into .*--inception"):
        monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
        Inception()
    with pytest.raises(FileNotFoundError, match="no nowhere.pth"):
        Inception("nowhere.pth")
    for name in eval_fid.INCEPTION:
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        link = tmp_path / "checkpoints" / name
        link.symlink_to(weights)
        assert Inception().fc.shape == (1008, 2048)
        link.unlink()
    other = tmp_path / "other.pth"
    other.write_bytes(b"something else")
    with pytest.raises(ValueError, match="other.pth has sha256 .* it is no copy of"):
        Inception(other)


def no_network(*args, **kwargs):
    raise OSError("no network")


# ---------------------------------------------------------------------------------- numbers from rows
def test_fd_dinov2_is_the_class_token_with_positions_as_dinov2_takes_them(tmp_path, monkeypatch):
    """A small one, against Pillow's resize and a table sampled at (j + 1/2) 37 / 16.1 - 1/2."""
    name = "vit_small_patch14_dinov2.lvd142m"
    vit = timm.create_model(name, num_classes=0).eval()                # of 518 px
    torch.nn.init.normal_(vit.pos_embed)
    (tmp_path / "weights").mkdir()
    save_file(vit.state_dict(), tmp_path / "weights" / f"{name}.safetensors")
    monkeypatch.setattr(model, "HERE", tmp_path)
    monkeypatch.setattr(eval_fid.DINOv2, "release", name)
    monkeypatch.setattr(eval_fid.DINOv2, "channels", 384)
    images = photos(2, 256)
    small = [Image.fromarray(x).resize((224, 224), Image.BICUBIC) for x in images.numpy()]
    x = torch.from_numpy(np.stack(small)).movedim(3, 1) / 255
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in model.IMAGENET)
    x = (x - mean) / std
    at = (torch.arange(16) + 0.5) * 2 / 16.1 - 1                       # -1 to 1 is the whole table
    where = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)[None]
    table = vit.pos_embed.data[:, 1:].unflatten(1, (37, 37)).movedim(3, 1)
    table = torch.nn.functional.grid_sample(table, where, "bicubic", "border", align_corners=False)
    tokens = torch.cat([vit.cls_token.expand(2, -1, -1), vit.patch_embed.proj(x).flatten(2).mT], 1)
    tokens = tokens + torch.cat([vit.pos_embed.data[:, :1], table.flatten(2).mT], 1)
    with torch.no_grad():
        expected = vit.norm(vit.blocks(tokens))[:, 0]
    found, _ = eval_fid.features(eval_fid.find_judge("fd-dinov2"), images)
    assert (found - expected).abs().max() < 0.02 * expected.std()       # Pillow rounds to 8 bits
    real, fake = (folder(tmp_path / side, photos(4, 28, seed)) for seed, side in enumerate(("real", "fake")))
    eval_fid.main(flags("--save_stats", tmp_path / "s.npz", "--data", real, "--features", "fd-dinov2"))
    found = eval_fid.main(flags("--samples", fake, "--data", tmp_path / "s.npz", "--features", "fd-dinov2"))
    assert found["fd_dinov2"] > 0 and "fid" not in found


def test_scores_are_those_of_torch_fidelity_on_the_same_rows():
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    from torch_fidelity import metric_kid, metric_prc
    fake, real = torch.randn(257, 16) + 0.5, torch.randn(311, 16)
    logits = 3 * torch.randn(257, 40)
    assert inception_score(logits) == pytest.approx([*isc.isc_features_to_metric(logits).values()], rel=1e-9)
    how = dict(kid_subsets=100, kid_subset_size=200, kid_kernel="poly", kid_kernel_poly_degree=3,
               rng_seed=2020, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, prc_neighborhood=3,
               prc_batch_size=100, save_cpu_ram=True, verbose=False)
    expected = [*metric_kid.kid_features_to_metric(fake, real, **how).values()]
    assert kernel_distance(real, fake, size=200) == pytest.approx(expected, rel=1e-3)
    expected = metric_prc.prc_features_to_metric(fake, real, **how)
    found = precision_recall(real, fake)
    assert found == pytest.approx((expected["precision"], expected["recall"]))
    assert 0 < min(found) < max(found) < 1


def test_precision_and_recall_on_a_line():
    real, fake = torch.tensor([[0.0], [1], [2], [3], [4]]), torch.tensor([[0.5], [3.5], [50], [51], [52]])
    # Third-nearest neighbours: of real 0 to 4 at 3, 2, 2, 2, 3; of fake at 49.5, 47.5, 46.5, 47.5, 48.5.
    assert precision_recall(real, fake) == (0.4, 1.0)
    assert precision_recall(real, real + 100) == (0, 0) and precision_recall(real, real) == (1, 1)


def test_precision_and_recall_are_computed_in_blocks(monkeypatch):
    seen, cdist = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b: seen.append(len(a) * len(b)) or cdist(a, b))
    real, fake = torch.randn(2, 2500, 4).unbind()
    found = precision_recall(real, fake)
    assert max(seen) == 1000 * 2500                                     # 10,000 x 10,000: 40 MB at a time
    inside = (cdist(fake, real) <= cdist(real, real).kthvalue(4).values).any(1).double().mean().item()
    assert found[0] == pytest.approx(inside, abs=1e-3)


def test_moments_merge_exactly():
    rows = torch.randn(301, 9, dtype=torch.float64) * 5 + 1e3
    whole, parts = Moments(), [Moments() for _ in range(3)]
    whole.add(rows)
    for i, part in enumerate(parts):
        for some in rows[i::3].split(7):
            part.add(some)
    for part in parts[1:]:
        parts[0].join(part.n, part.mean, part.scatter)
    assert parts[0].n == 301
    np.testing.assert_allclose(parts[0].mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(parts[0].cov, whole.cov, rtol=1e-9, atol=1e-9)


def test_frechet_distance_of_2048_dimensions_and_500_images():
    rows, start = torch.randn(500, 2048, dtype=torch.float64), time.time()
    cov, mean = rows.T.cov(), rows.mean(0)
    scaled = frechet_distance(mean, cov, mean + 1, 4 * cov)             # |1|^2 + tr (2 - 1)^2 cov
    assert scaled == pytest.approx(2048 + float(cov.trace()), rel=1e-6)
    assert time.time() - start < 60                                     # 6 s on two idle cores


def test_curve_leads_from_the_biased_distance_to_the_true_one(tmp_path):
    pytest.importorskip("matplotlib")
    def some(n, mean):
        found = eval_fid.ImageSet(Encoder("random"), n)
        found.rows = torch.randn(n, 24) + mean
        found.pool.add(found.rows)
        return found
    found = extrapolate(some(200_000, 0.0), some(600, 0.1), tmp_path / "curve.png")
    sizes, distances = zip(*found["curve"])
    assert sizes[-1] == 600 and len(sizes) == 10 and (tmp_path / "curve.png").stat().st_size > 5000
    assert abs(found["extrapolated"] - 0.24) < distances[-1] - 0.24 < distances[0] - 0.24     # |mean|^2


# ---------------------------------------------------------------------------------- files in
def test_the_same_images_give_the_same_numbers_from_any_file_batch_and_process(tmp_path):
    images, real = photos(40), folder(tmp_path / "real", photos(50, seed=1))
    np.savez(tmp_path / "stored.npz", arr_0=images.numpy(), labels=np.zeros(40))
    np.savez_compressed(tmp_path / "packed.npz", images.numpy())
    np.savez(tmp_path / "floats.npz", images.numpy() / np.float32(255))
    npz = [tmp_path / f"{x}.npz" for x in ("stored", "packed", "floats")]
    sources = [folder(tmp_path / "pngs", images), *npz]
    how = "--data", real, "--features", "tiny"
    found = [eval_fid.main(flags("--samples", source, *how, "--batch", batch))
             for source, batch in zip(sources, (72, 7, 40, 13))]
    torchrun(eval_fid, "--samples", sources[1], *how, "--batch", 8, "--out", tmp_path / "two.json")
    found.append(json.loads((tmp_path / "two.json").read_text()))
    assert {(x["n"], x["reference_n"], x["samples_sha1"], x["reference_sha1"]) for x in found} == \
        {(40, 50, found[0]["samples_sha1"], found[0]["reference_sha1"])}
    for name in ("frechet_distance", "precision", "recall", "kernel_distance"):
        assert [x[name] for x in found] == pytest.approx([found[0][name]] * 5, rel=1e-4), name
    stored = open_images([str(sources[1])]).images
    assert isinstance(stored, np.memmap) and (stored == images.numpy()).all()


def test_saved_statistics_stand_for_their_images(tmp_path, trusted):
    real, fake = folder(tmp_path / "real", photos(6)), folder(tmp_path / "fake", photos(7, seed=1))
    for name in ("tiny", "inception"):
        how = ("--features", name) if name == "tiny" else ("--inception", trusted)
        eval_fid.main(flags("--save_stats", tmp_path / f"{name}.npz", "--data", real, *how))
    found = [eval_fid.main(flags("--samples", fake, "--data", data, "--features", "tiny"))
             for data in (real, tmp_path / "tiny.npz")]
    for key in ("frechet_distance", "precision", "recall", "kernel_distance"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-9), key
    assert found[1]["reference_n"] == 6
    judge = Inception(trusted)
    kept = load_statistics(tmp_path / "inception.npz", judge)
    own = image_set(open_images([real]), 6, judge, 6)
    for a, b in ((kept.pool, own.pool), (kept.spatial, own.spatial)):
        assert torch.allclose(a.mean, b.mean) and torch.allclose(a.cov, b.cov) and a.n == b.n == 6
    assert torch.equal(kept.rows, own.rows) and kept.side == own.side == (32, 32)
    with pytest.raises(ValueError, match="tiny.npz"):                   # none is left out in silence
        eval_fid.main(flags("--samples", fake, "--data", tmp_path / "tiny.npz", real, "--features", "tiny"))
    with pytest.raises(ValueError, match="statistics of 192 features of tiny, not the 2048 of inception"):
        eval_fid.main(flags("--samples", fake, "--data", tmp_path / "tiny.npz", "--inception", trusted))


def test_adm_reference_has_statistics_for_fid_and_images_for_precision(tmp_path, trusted, capsys):
    judge, images = Inception(trusted), photos(5)
    np.savez(tmp_path / "own.npz", images.numpy())
    moments = image_set(open_images([str(tmp_path / "own.npz")]), 5, judge, 5)
    more = dict(mu_s=moments.spatial.mean, sigma_s=moments.spatial.cov, mu=moments.pool.mean)
    path = tmp_path / "VIRTUAL.npz"
    np.savez(path, images[:4].numpy(), sigma=moments.pool.cov, **more)
    fake = folder(tmp_path / "fake", photos(4, seed=1))
    found = eval_fid.main(flags("--samples", fake, "--data", path, "--inception", trusted))
    other = image_set(open_images([fake]), 4, judge, 4)
    assert {"fid", "sfid", "inception_score", "inception_score_std", "kid", "precision"} <= found.keys()
    a, b = ((x.rows - x.rows.mean(0)).double() / (len(x.rows) - 1) ** 0.5 for x in (moments, other))
    cross = torch.linalg.svdvals(a @ b.T).sum()                        # the same trace, of few images
    apart = (moments.pool.mean - other.pool.mean).square().sum()
    expected = apart + a.square().sum() + b.square().sum() - 2 * cross
    assert found["fid"] == pytest.approx(float(expected), rel=1e-5)
    assert (found["precision"], found["recall"]) == precision_recall(moments.rows[:4], other.rows)
    assert found["reference_n"] is None                                # ADM's file does not say
    warned = capsys.readouterr().err
    assert "the reference's protocol has 50000 images, not 4" in warned
    assert "4 images give no full covariance of 2048 features" in warned
    assert "distances of 4 images come out too large" in warned


def test_references_are_cropped_only_where_size_says_so(tmp_path):
    real, fake = folder(tmp_path / "real", photos(5, 48)), folder(tmp_path / "fake", photos(5, 32))
    how = "--features", "tiny", "--samples", fake, "--data", real
    with pytest.raises(ValueError, match="48 x 48 and 32 x 32 pixels can't be compared"):
        eval_fid.main(flags(*how))
    assert eval_fid.main(flags(*how, "--size", 32))["n"] == 5
    Image.fromarray(photos(1, 40)[0].numpy()).save(tmp_path / "fake" / "odd.png")
    with pytest.raises(ValueError, match="images of different sizes"):
        eval_fid.main(flags(*how, "--size", 32))
    (tmp_path / "fake" / "odd.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="broken images can't be measured: .*odd.png"):
        eval_fid.main(flags(*how, "--size", 32))


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    def samples(name, **arrays):
        np.savez(tmp_path / name, **arrays)
        return measure("--samples", tmp_path / name, "--data", tmp_path / name)

    def measure(*argv):
        return eval_fid.main(flags(*argv, "--features", "tiny"))
    with pytest.raises(ValueError, match=r"floats of 1 to 2; scale them to \[0,1\]"):
        samples("a.npz", arr_0=np.linspace(0, 2, 2 * 32 * 32 * 3).reshape(2, 32, 32, 3))
    with pytest.raises(ValueError, match="b.npz is no whole .npz of arr_0, or mu and sigma"):
        samples("b.npz", images=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut.npz is no whole .npz"):
        measure("--n", 4, "--data", tmp_path / "cut.npz")
    folder(tmp_path / "cut", photos(3))
    (tmp_path / "cut" / "x.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="broken images can't be measured: [^ ]*x.png; remove or mend"):
        measure("--samples", tmp_path / "cut", "--data", tmp_path / "cut")
    with pytest.raises(ValueError, match="cut is a folder; name a file"):
        measure("--n", 4, "--out", tmp_path / "cut")
    with pytest.raises(ValueError, match=r"arr_0 of \(2, 3, 32, 32\), uint8; images are n H W 3"):
        samples("c.npz", arr_0=np.zeros((2, 3, 32, 32), np.uint8))
    with pytest.raises(ValueError, match="1 image is too few"):
        samples("d.npz", arr_0=np.zeros((1, 32, 32, 3), np.uint8))
    np.savez(tmp_path / "e.npz", np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="--n 3 is more than the 2 of --samples"):
        measure("--samples", tmp_path / "e.npz", "--data", tmp_path / "e.npz", "--n", 3)
    with pytest.raises(FileNotFoundError, match="f.npz does not exist"):
        measure("--samples", tmp_path / "f.npz", "--data", tmp_path / "e.npz")
    for argv, message in ((("--samples", "x"), "need --data"), (("--save_stats", "x.npz"), "need --data"),
                          (("--samples", "x", "--probe", "tiny"), "not allowed with"),
                          (("--lpips",), "--lpips does nothing with new images"),
                          (("--curve", "x.png", "--shapes_eval"), "--curve does nothing with --shapes_eval"),
                          (("--samples", "x", "--data", "y", "--guidance=3"), "--guidance does nothing with"),
                          (("--reconstruct", "x", "--size", 64), "--size does nothing with --reconstruct"),
                          (("--inception", "x", "--features", "tiny"), "--inception x does nothing with"),
                          (("--curve", "x.pdf"), "--curve x.pdf must be a .png"),
                          (("--probe", "tiny", "--data", "x"), "needs --hold_out"),
                          (("--probe", "inception"), "--probe inception can't be used here")):
        with pytest.raises(SystemExit):
            flags(*argv)
        assert message in capsys.readouterr().err


def test_lpips_without_weights_says_which_file_goes_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(FileNotFoundError, match="vgg16-397923af.pth"):
        eval_fid.main(flags("--reconstruct", SHIPPED, "--n", 4, "--lpips"))


# ---------------------------------------------------------------------------------- probe, training, layouts
def test_probe_reads_classes_from_good_tokens_on_images_it_did_not_learn(tmp_path):
    assert eval_fid.main(flags("--probe", "tiny", "--n", 700, "--hold_out", 200))["accuracy"] > 0.9
    for k, name in enumerate(("dark", "light")):
        folder(tmp_path / name, photos(30, seed=k) // 2 + 127 * k)
    how = "--data", tmp_path, "--hold_out", 20
    found = eval_fid.main(flags("--probe", "pixel:16", *how))
    assert found["accuracy"] == 1.0 and (found["n"], found["held_out"]) == (40, 20)
    with pytest.raises(ValueError, match="has no classes to probe"):
        eval_fid.main(flags("--probe", "pixel:16", "--data", tmp_path / "dark", "--hold_out", 2))


def logged(path, key):
    return [row for line in path.open() if key in (row := json.loads(line))][-1]


def same(row, found):
    shared = [k for k, v in row.items() if k in found and isinstance(v, float | str) and k != "domain"]
    assert len(shared) > 3 and {k: row[k] for k in shared} == {k: found[k] for k in shared}


def test_online_numbers_are_the_offline_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(train_t2i.T2I.ask, "__defaults__", (4,))        # it can't answer yet: say less
    few = "--steps", 2, "--preview_every", 0, "--eval_every", 2, "--overwrite"
    out = tmp_path / "decoder"
    train_decoder.main(train_decoder.parse_args([str(x) for x in (
        *few, "--batch", 8, "--eval_n", 20, "--hold_out", 20, "--stats_n", 64, "--out", out,
        "--eval_features", "random")]))
    same(logged(out / "log.jsonl", "psnr"), eval_fid.main(flags(
        "--reconstruct", out / "last.pt", "--n", 20, "--batch", 8, "--features", "random")))
    out = tmp_path / "dit"
    train_dit.main(train_dit.parse_args([str(x) for x in (
        *few, "--batch", 8, "--eval_n", 20, "--sampling_steps", 3, "--out", out, "--width", 64,
        "--head_width", 0)]))
    same(logged(out / "log.jsonl", "frechet_distance"), eval_fid.main(flags(
        "--ckpt", out / "last.pt", "--n", 20, "--sampling_steps", 3)))
    out = tmp_path / "t2i"
    train_t2i.main(train_t2i.parse_args([str(x) for x in (
        *few, "--batch", 6, "--eval_n", 6, "--sampling_steps", 3, "--out", out, "--width", 64, "--llm_width",
        64, "--llm_depth", 1, "--head_width", 0, "--plan", 4)]))
    same(logged(out / "log.jsonl", "overall"), eval_fid.main(flags(
        "--shapes_eval", "--ckpt", out / "last.pt", "--n", 6, "--sampling_steps", 3)))


def test_folders_are_laid_out_as_geneval_and_dpg_bench_read_them(tmp_path):
    lines = [json.dumps(dict(tag="colors", include=[{"class": "star"}], prompt=f"a {colour} star"))
             for colour in ("red", "blue")]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(lines) + "\n")
    draw = "--sampling_steps", "2", "--guidance", "1"
    out = tmp_path / "geneval"
    path = f"{tmp_path}/evaluation_metadata.jsonl"
    sample.main(sample.parse_args(["--prompts", path, "--out", f"{out}", *draw]))
    assert sorted(x.name for x in out.iterdir()) == ["00000", "00001"]  # evaluate_images.py: isdigit()
    for k, line in enumerate(lines):
        assert json.load(open(out / f"0000{k}" / "metadata.jsonl")) == json.loads(line)
        names = sorted(x.name for x in (out / f"0000{k}" / "samples").iterdir())
        assert names == [f"000{s}.png" for s in range(4)]              # \d+\.png
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name, colour in (("partiprompts0", "red"), ("stanford7", "blue")):
        (prompts / f"{name}.txt").write_text(f"a {colour} star\n")
    sample.main(sample.parse_args(["--prompts", f"{prompts}", "--out", f"{tmp_path}/dpg", *draw]))
    assert sorted(x.name for x in (tmp_path / "dpg").iterdir()) == ["partiprompts0.png", "stanford7.png"]
    for k, name in enumerate(("partiprompts0", "stanford7")):          # compute_dpg_bench.py: id, then "."
        sheet = Image.open(tmp_path / "dpg" / f"{name}.png")
        assert sheet.size == (128, 128)
        for s, corner in enumerate(((0, 0), (64, 0), (0, 64), (64, 64))):       # its crops, --resolution 64
            alone = Image.open(out / f"0000{k}" / "samples" / f"000{s}.png")
            assert (np.array(sheet.crop((*corner, corner[0] + 64, corner[1] + 64))) == np.array(alone)).all()


def test_bad_prompt_files_are_refused(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"text": "a star"}\n')
    with pytest.raises(ValueError, match="every line must be JSON with a prompt"):
        sample.main(sample.parse_args(["--prompts", f"{tmp_path}/bad.jsonl", "--out", f"{tmp_path}/x"]))
    (tmp_path / "bad.jsonl").unlink()
    with pytest.raises(ValueError, match="no prompt in"):
        sample.main(sample.parse_args(["--prompts", f"{tmp_path}", "--out", f"{tmp_path}/x"]))
    for argv in (["--out", "x.png"], ["--out", "x", "--n", "5"], ["--out", "x", "--prompt", "a star"]):
        with pytest.raises(SystemExit):
            sample.parse_args(["--prompts", "file.jsonl", *argv])
    assert "give one" in capsys.readouterr().err


def test_evaluation_refuses_another_resolution_before_drawing(tmp_path):
    np.savez(tmp_path / "ref.npz", np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="32 x 32 and 64 x 64"):
        eval_fid.main(flags("--data", tmp_path / "ref.npz", "--n", 4))
    image = open_data("shapes", 64)[0]["image"].permute(1, 2, 0).numpy()
    np.savez(tmp_path / "ref.npz", image[None].repeat(4, 0))
    found = eval_fid.main(flags("--data", tmp_path / "ref.npz", "--n", 6, "--sampling_steps", 2))
    assert found["reference_n"] == 4 and found["n"] == 6 and "right_colour" not in found

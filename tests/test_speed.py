"""FLOPs as the log counts them, against torch's counter, and the MFU made of them.

Run: python -m pytest tests/test_speed.py
"""
import contextlib
import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import growth
import release
import runtime
import speed
import train_decoder
import train_dit
import train_t2i
from conftest import logged_flops_per_image, read_log, run_script
from data import open_data
from llm import Tokenizer
from model import RAE, build_decoder, build_dit, flow_matching_loss
from test_stage1 import FROM_THE_START, GAN_FLAGS
from test_t2i import DRAWING, FLAGS, LOOKING, small_t2i
from test_train import CACHED_DIT_FLAGS, DECODER_FLAGS, DIT_FLAGS
from train_t2i import TOKENIZER

CPU = torch.device("cpu")


class NoModules:
    """In place of what assigns FLOPs to modules, which autograd.grad does not let it do."""
    parents = frozenset(["Global"])

    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass


@contextlib.contextmanager
def torch_counter():
    """Torch's counter, which sees backward passes; attention as plain matmuls, for it to count."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with sdpa_kernel(SDPBackend.MATH), counter:
        yield counter


def latents(n=1):
    return torch.randn(n, 192, 4, 4)


def tiny_dit(**changes):
    sizes = dict(width=32, depth=2, heads=2, head_width=48, head_depth=1, head_heads=3,
                 class_dropout=0.1)
    return build_dit({**sizes, **changes}, 192, 4, 10)


# ---------------------------------------------------------------------------- counting
def modules_and_inputs():
    images = torch.rand(1, 3, 64, 64)
    t, label = torch.rand(1), torch.zeros(1, dtype=torch.long)
    yield "DiTDH", tiny_dit().eval(), (latents(), t, label)
    yield "DiT", tiny_dit(head_width=0).eval(), (latents(), t, label)
    yield "encoder", release.load_encoder("tiny").encode, (images,)
    sizes = dict(decoder_patch=16, decoder_width=32, decoder_depth=2, decoder_heads=2,
                 decoder_mlp=48)
    yield "decoder", build_decoder(sizes, 192, 4).eval(), (latents(),)
    yield "discriminator", train_decoder.Discriminator("tiny"), (images,)
    yield "feature distance", train_decoder.FeatureDistance(), (images, images)
    yield "Gram matrix", train_decoder.gram_matrix, (latents(),)
    yield "language model", small_t2i(Tokenizer(TOKENIZER)).llm.eval(), (torch.randn(2, 9, 32),)


@pytest.mark.filterwarnings("ignore:--.*width .* is below")
def test_forward_passes_count_as_in_torch():
    for name, function, inputs in modules_and_inputs():
        state = torch.get_rng_state()
        flops = speed.count_flops(function, *inputs).forward
        assert torch.equal(torch.get_rng_state(), state), name
        with torch.no_grad(), torch_counter() as counter:
            function(*inputs)
        assert flops == counter.get_total_flops() > 0, name


@pytest.mark.filterwarnings("ignore:--.*width .* is below")
def test_compiled_blocks_count_without_being_compiled():
    dit = tiny_dit().eval()
    inputs = (latents(), torch.rand(1), torch.zeros(1, dtype=torch.long))
    flops = speed.count_flops(dit, *inputs)

    def refuse(graph, example_inputs):
        raise AssertionError("compiled")

    runtime.compile_blocks(dit, backend=refuse)
    assert speed.count_flops(dit, *inputs) == flops


@pytest.mark.filterwarnings("ignore:--.*width .* is below")
@pytest.mark.parametrize("cache", [0, 8])
def test_a_step_of_the_dit_counts_as_in_torch(cache):
    """Activations that are recomputed count once. What needs no gradient is neglected."""
    rae = release.unpack_rae(release.load_packed_rae(release.SHIPPED_RAE))
    dit = tiny_dit().train()
    images, t, labels = torch.rand(2, 3, 64, 64), torch.rand(2), torch.tensor([1, 2])
    with torch_counter() as counter:
        x0 = latents(2) if cache else rae.encode(images)
        flow_matching_loss(dit, x0, labels, t, torch.randn_like(x0)).sum().backward()

    dit.checkpoint = True
    ours = train_dit.flops_per_image(dit.eval(), rae, SimpleNamespace(cache=cache))
    # Gradients of the latents, at two embedders of 16 tokens, and of the features of t.
    of_inputs = 2 * 16 * 192 * (32 + 48) + 2 * 512 * 32
    assert 2 * ours == counter.get_total_flops() + 2 * of_inputs


@pytest.mark.parametrize("flags, decoded_twice", [
    ([*DECODER_FLAGS, "--feature", "0.3", "--checkpoint_activations"], 0),
    ([*GAN_FLAGS, *FROM_THE_START], 1)], ids=["plain", "GAN"])
def test_a_step_of_the_decoder_counts_as_in_torch(flags, decoded_twice):
    args = train_decoder.parse_args([*flags, "--dtype", "fp32"])
    encoder = release.load_encoder("tiny")
    networks = train_decoder.Networks(encoder, args, CPU)
    ours = train_decoder.count_image_flops(networks, args, CPU).at(0, args)
    networks.decoder.checkpoint = False
    meter = train_decoder.LossMeter(open_data("shapes", 64), CPU)
    trainer = train_decoder.Trainer(networks, meter, args, CPU, world=1)
    stream = [(0, 0, torch.randint(256, (8, 3, 64, 64)), None, None)]
    with torch_counter() as counter:
        if args.gan > 0:
            trainer.adversarial_step(stream)
        else:
            trainer.plain_step(stream, train_discriminator=False)

    again = decoded_twice * speed.count_flops(networks.ema[0], latents()).forward
    assert 8 * (ours + again) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_micro_batch_of_text_to_image_counts_as_in_torch(frozen):
    tokenizer = Tokenizer(TOKENIZER)
    t2i = small_t2i(tokenizer).train()
    t2i.llm.requires_grad_(not frozen)
    sizes = dict(decoder_patch=16, decoder_width=32, decoder_depth=1, decoder_heads=2,
                 decoder_mlp=48)
    encoder = release.load_encoder("pixel:4", 16)
    rae = RAE(encoder, build_decoder(sizes, encoder.channels, encoder.grid))
    args = SimpleNamespace(freeze_llm=frozen, draws=2)
    flops = train_t2i.T2IFlops(t2i, rae, args)

    # One of each kind in a micro-batch: nothing is padded, and nothing stands in for a missing one.
    micro = train_t2i.make_micro_batch(0, torch.zeros(2, 3, 16, 16), [DRAWING, LOOKING], tokenizer,
                                       16, 1000)
    with torch_counter() as counter:
        losses = t2i(micro.asked, micro.drawn, torch.randn(2, 8, 4, 4), torch.rand(2),
                     torch.randn(2, 8, 4, 4))
        sum(loss.sum() for loss in losses).backward()
    assert flops.of(micro) == pytest.approx(counter.get_total_flops(), rel=0.03)


# ---------------------------------------------------------------------------- the log
@pytest.mark.parametrize("script, flags", [(train_dit, DIT_FLAGS), (train_decoder, DECODER_FLAGS)],
                         ids=["dit", "decoder"])
def test_the_mfu_is_that_of_all_micro_batches(script, flags, tmp_path, monkeypatch, capsys):
    name = "flops_per_image" if script is train_dit else "count_image_flops"
    per_image = 1e6 if script is train_dit else train_decoder.ImageFlops(1e6, 0, 0)
    monkeypatch.setattr(script, name, lambda *_: per_image)
    run_script(script, *flags, "--micro_batch", 4, "--steps", 4, "--out", tmp_path)
    assert logged_flops_per_image(tmp_path) == pytest.approx([1e6, 1e6])        # every 2 steps
    assert "% MFU | " in capsys.readouterr().out


def test_the_mfu_of_text_to_image_counts_what_is_in_each_micro_batch(tmp_path, monkeypatch):
    counts = []

    def recording_of(flops, micro):
        counts.append(original(flops, micro))
        return counts[-1]

    original = train_t2i.T2IFlops.of
    monkeypatch.setattr(train_t2i.T2IFlops, "of", recording_of)
    run_script(train_t2i, *FLAGS, "--recompute", "--draws", 3, "--steps", 2, "--out", tmp_path)
    assert len(set(counts)) == len(counts) == 4        # two steps of 2 x 4 images
    assert logged_flops_per_image(tmp_path) == pytest.approx([sum(counts) / 16])


@pytest.mark.parametrize("name, bf16, fp32", [
    ("NVIDIA A100-SXM4-80GB", 312, 156), ("NVIDIA H100 80GB HBM3", 989, 495),
    ("NVIDIA H100 PCIe", 756, 378), ("NVIDIA H200", 989, 495), ("NVIDIA L4", 121, 60),
    ("NVIDIA L40S", 362, 183), ("NVIDIA GeForce RTX 4090", 165.2, 82.6), ("Tesla T4", None, 8.1),
    ("NVIDIA H20", None, None), ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None, None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None)])
def test_peaks_of_gpus_by_their_names(name, bf16, fp32):
    for dtype, teraflops in (("bf16", bf16), ("fp32", fp32)):
        expected = None if teraflops is None else pytest.approx(teraflops * 1e12)
        assert speed.gpu_peak_flops(name, dtype) == expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_peak_of_a_cpu_is_measured_without_random_numbers(dtype):
    state = torch.get_rng_state()
    assert 1e9 < speed.peak_flops(CPU, dtype) < 1e14
    assert torch.equal(torch.get_rng_state(), state)


def test_on_an_unknown_device_there_is_no_mfu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "peak_flops", lambda device, dtype: None)
    run_script(train_dit, *CACHED_DIT_FLAGS, "--steps", 2, "--out", tmp_path)
    first, *records = read_log(tmp_path)
    assert first["peak_flops"] is None
    assert records[-1]["mfu"] is None
    assert "MFU" not in capsys.readouterr().out


# ---------------------------------------------------------------------------- tests/bench.py
def test_a_row_of_the_benchmark(capsys):
    a = torch.randn(64, 64)
    row = bench.Row("product", lambda: a @ a, lambda: (a @ a, a @ a), images=3, flops=2 * 64 ** 3,
                    compare=lambda: (a + 0.1 * a.abs().max(), a))
    bench.report(row, "fp32", CPU, 2, time.perf_counter)
    cells = capsys.readouterr().out.strip("| \n").split(" | ")
    assert cells[:2] == ["product", "fp32"] and cells[-1] == "1e-01"
    assert cells[-2].endswith("x ours")

    bench.report(row._replace(theirs="no --peer"), "fp32", CPU, 1, time.process_time)
    assert "| no --peer |  |" in capsys.readouterr().out


def test_official_modules_come_without_their_packages(tmp_path):
    (tmp_path / "__init__.py").write_text("import a_package_that_is_not_installed")
    (tmp_path / "layers.py").write_text("WIDTH = 3")
    (tmp_path / "network.py").write_text("from .layers import WIDTH")
    assert bench.import_official(tmp_path, "network").WIDTH == 3
    with pytest.raises(ImportError, match="no_such"):
        bench.import_official(tmp_path, "no_such")


def test_the_growth_is_taken_apart():
    points = []
    for flops, size in ((1e9, 1e6), (2e9, 5e6), (8e9, 9e6), (3e9, 40e6)):
        points.append(dict(flops=flops, bytes=size, seconds=flops / 1e11 + size / 1e9 + 0.002))
    (per_flop, per_byte, constant), errors = growth.fit(points)
    assert [1 / per_flop, 1 / per_byte, constant] == pytest.approx([1e11, 1e9, 0.002])
    assert abs(errors).max() < 1e-6

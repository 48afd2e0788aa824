"""What every script needs around its loop. Run: python -m pytest tests/test_runtime.py"""
import json
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

import progress
import run_flags
import runtime
import sample
import saving
import storage
from conftest import restored_handlers, torchrun
from llm import Qwen2
from metrics import EncoderFeatures, FeatureSet
from model import Decoder, build_dit
from release import load_encoder
from runtime import LossByTime, MeanByGroup, compile_blocks, split_numbers
from train_decoder import Discriminator, gram_matrix

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------- means for the log
def test_means_of_groups():
    means = MeanByGroup(3, CPU)
    means.add(torch.tensor([0, 2, 2]), torch.tensor([1.0, 3.0, 5.0]))
    mean, of_groups = means.means()
    assert mean == pytest.approx(3.0)
    assert of_groups == [1.0, None, 4.0]               # None: the group without a value


def test_values_of_weight_0_do_not_count():
    means = MeanByGroup(2, CPU)
    weight = torch.tensor([1.0, 0.0, 0.0])
    means.add(torch.tensor([0, 0, 1]), torch.tensor([2.0, 100.0, 100.0]), weight)
    mean, of_groups = means.means()
    assert mean == pytest.approx(2.0)
    assert of_groups == [2.0, None]


def test_values_add_up_until_they_are_read():
    means = MeanByGroup(2, CPU)
    means.add(torch.tensor([0, 1]), torch.tensor([1.0, 10.0]))
    means.add(torch.tensor([0]), torch.tensor([4.0]))
    mean, of_groups = means.means()
    assert mean == pytest.approx(5.0)                  # of three values, not of two groups
    assert of_groups == [2.5, 10.0]

    means.add(torch.tensor([1]), torch.tensor([7.0]))
    mean, of_groups = means.means()
    assert mean == pytest.approx(7.0)
    assert of_groups == [None, 7.0]


def test_without_any_value_the_mean_is_0():
    mean, of_groups = MeanByGroup(2, CPU).means()
    assert mean == 0
    assert of_groups == [None, None]


def test_loss_by_time_has_ten_intervals():
    loss_by_time = LossByTime(CPU)
    loss_by_time.add(torch.tensor([0.0, 0.05, 0.1, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    mean, of_intervals = loss_by_time.means()
    assert mean == pytest.approx(4.0)
    assert len(of_intervals) == 10
    assert of_intervals[0] == pytest.approx(2.0)       # t = 0 and 0.05
    assert of_intervals[1] == pytest.approx(5.0)       # t = 0.1
    assert of_intervals[9] == pytest.approx(7.0)       # t = 1 is in the last one
    assert of_intervals[2:9] == [None] * 7


def test_loss_by_time_takes_weights():
    loss_by_time = LossByTime(CPU)
    loss_by_time.add(torch.tensor([0.5, 0.5]), torch.tensor([2.0, 8.0]), torch.tensor([1.0, 0.0]))
    loss_by_time.add(torch.tensor([0.5]), torch.tensor([4.0]))
    mean, of_intervals = loss_by_time.means()
    assert mean == pytest.approx(3.0)
    assert of_intervals[5] == pytest.approx(3.0)


def test_losses_keep_no_graph():
    loss = torch.ones(3, requires_grad=True)
    loss_by_time = LossByTime(CPU)
    loss_by_time.add(torch.rand(3), loss)
    assert not loss_by_time.sums.requires_grad


# ---------------------------------------------------------------------------- processes
@pytest.mark.parametrize("n, batch, world", [(10, 3, 1), (10, 3, 2), (1, 8, 3), (24, 4, 3)])
def test_numbers_are_split_among_processes_without_loss(n, batch, world):
    parts = [split_numbers(n, batch, rank, world) for rank in range(world)]
    all_numbers = [number for part in parts for numbers in part for number in numbers]
    assert sorted(all_numbers) == list(range(n))
    assert max(len(numbers) for part in parts for numbers in part) <= batch


# ---------------------------------------------------------------------------- hardware
@pytest.mark.parametrize("capability, dtype", [((7, 0), "fp32"), ((7, 5), "fp32"),
                                               ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_gpus_before_ampere_compute_in_fp32(capability, dtype, monkeypatch):
    """A V100 (7.0) and a T4 (7.5) only emulate bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert runtime.default_dtype() == dtype


@pytest.mark.parametrize("has_amx, has_avx512_bf16, dtype", [
    (True, True, "bf16"), (False, True, "bf16"), (False, False, "fp32")])
def test_cpus_compute_in_bf16_if_they_have_instructions_for_it(has_amx, has_avx512_bf16, dtype,
                                                               monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    assert runtime.default_dtype() == dtype


def test_cpus_of_which_torch_does_not_say_what_they_have_compute_in_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert runtime.default_dtype() == "fp32"


@pytest.fixture
def joined(monkeypatch):
    """The backends and timeouts of the process groups that setup() would join."""
    groups = []

    def join(backend, store, rank, world_size, timeout):
        groups.append((backend, timeout))

    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([("a store", 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(runtime.heartbeat, "start", lambda store: None)
    return groups


@pytest.mark.parametrize("world, device", [("1", "mps"), ("2", "cpu")])
def test_apple_gpus_are_used_by_single_processes(world, device, joined, monkeypatch):
    """They have no process group: not even one of a single process, as of torchrun."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", world)
    assert runtime.setup()[2].type == device
    assert len(joined) == int(world) - 1


@pytest.mark.parametrize("has_nccl, backend", [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_windows_with_gpus_has_gloo_alone(has_nccl, backend, joined, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with runtime.full_precision():                     # setup() changes the precision
        runtime.setup()
    assert joined == [(backend, runtime.PATIENCE)]


def test_memory_of_apple_gpus_is_what_the_driver_holds(monkeypatch):
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * 2 ** 30)
    assert progress.peak_memory_gib(torch.device("mps")) == 3.0


# ---------------------------------------------------------------------------- precision
class Precisions(TorchFunctionMode):
    """Context that collects the precision of all fp32 matmuls, linear layers, convolutions."""
    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        is_product = function.__name__ in ("matmul", "__matmul__", "linear", "conv2d")
        if is_product and args[0].dtype == torch.float32:
            self.found.add((torch.get_float32_matmul_precision(),
                            torch.backends.cudnn.allow_tf32))
        return function(*args, **(kwargs or {}))


FULL, WITH_TF32 = ("highest", False), ("high", True)


@pytest.fixture
def with_tf32():
    """The settings that setup() makes on GPUs."""
    with runtime.full_precision():                     # restores what was before
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        yield


def test_features_and_gram_matrices_are_fp32(with_tf32):
    features = FeatureSet(EncoderFeatures(load_encoder("tiny")))
    images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    with Precisions() as of_metrics:
        features.add(images, range(2))
    with Precisions() as of_loss:
        gram_matrix(torch.rand(1, 3, 4, 4))
    with Precisions() as of_others:
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert of_metrics.found == of_loss.found == {FULL}
    assert of_others.found == {WITH_TF32}


def test_full_precision_ends_with_an_error(with_tf32):
    with pytest.raises(KeyError), runtime.full_precision():
        raise KeyError
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == WITH_TF32


@pytest.mark.parametrize("capability, has_tf32", [((7, 5), False), ((8, 0), True)])
def test_whether_matmuls_are_tf32_is_known(capability, has_tf32, with_tf32, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert runtime.uses_tf32(gpu) == has_tf32
    assert not runtime.uses_tf32(CPU)
    with runtime.full_precision():
        assert not runtime.uses_tf32(gpu)


# ---------------------------------------------------------------------------- end of a script
@pytest.fixture
def own_handlers():
    with restored_handlers():
        yield


def run_and_fail(problem):
    """What a script says that ends with an exception; None: it succeeds."""
    def main(args):
        if problem is not None:
            raise problem

    try:
        runtime.run(main, lambda: None)
    except SystemExit as ending:
        return str(ending)


@pytest.mark.parametrize("problem, leaves", [
    (None, True), (ValueError("no"), False), (KeyboardInterrupt(), False)])
def test_only_a_run_that_succeeds_leaves_its_process_group(problem, leaves, own_handlers,
                                                               monkeypatch):
    """To leave it after a failure could take as long as the other processes are silent."""
    left = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    run_and_fail(problem)
    assert bool(left) == leaves


def test_what_apple_gpus_lack_is_said_in_a_sentence(own_handlers):
    """The message is torch's."""
    error = NotImplementedError(
        "The operator 'aten::lerp' is not currently implemented for the MPS device. If you want "
        "this op to be considered for addition please comment on ...")
    assert run_and_fail(error).startswith(
        "error: this version of torch has no aten::lerp for Apple's GPUs; set PYTORCH_ENABLE_MPS")


@pytest.mark.parametrize("message", [
    "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, )",
    "Failed to find C compiler. Please specify via CC environment variable or set ..."])
def test_a_missing_compiler_is_said_in_a_sentence(message, own_handlers):
    """The messages are those of torch and Triton."""
    assert run_and_fail(RuntimeError(message)).startswith("error: --compile needs a compiler of C")


def test_windows_has_fewer_signals(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    assert runtime.stop_signals() == [signal.SIGINT, signal.SIGTERM]


def test_memory_is_unknown_without_the_module_resource(monkeypatch):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "resource", None)
    assert progress.peak_memory_gib(CPU) == 0.0


def test_macos_counts_memory_in_bytes(monkeypatch):
    on_linux = progress.peak_memory_gib(CPU)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert progress.peak_memory_gib(CPU) == pytest.approx(on_linux / 1024, rel=0.5)


# ---------------------------------------------------------------------------- compiling
class Graphs:
    """Backend of torch.compile that counts graphs and runs them as they are."""
    def __init__(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.number = 0

    def __call__(self, graph, inputs):
        self.number += 1
        return graph.forward

    def breaks(self):
        return sum(torch._dynamo.utils.counters["graph_break"].values())


def run_dit(dit):
    return dit(torch.ones(2, 8, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([0, 3]))


def small_dit():
    """A DiTDH of five blocks of two kinds, whose weights are larger than DDP's first bucket."""
    sizes = dict(width=256, depth=3, heads=2, head_width=32, head_depth=2, head_heads=2)
    dit = build_dit({**sizes, "class_dropout": 0.0}, channels=8, grid=4, num_classes=5)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return dit


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_blocks_of_a_kind_share_a_graph_which_ddp_leaves_whole(group_of_one):
    graphs = Graphs()
    dit = small_dit()
    expected = run_dit(dit)
    expected.square().mean().backward()
    expected_gradients = [parameter.grad for parameter in dit.parameters()]
    dit.zero_grad()

    compile_blocks(dit, backend=graphs)
    parallel = runtime.data_parallel(dit)
    for _ in range(2):                                 # the second time, nothing is compiled
        dit.zero_grad()
        output = run_dit(parallel)
        output.square().mean().backward()
        assert (graphs.number, graphs.breaks()) == (2, 0)

    torch.testing.assert_close(output, expected)
    gradients = [parameter.grad for parameter in dit.parameters()]
    torch.testing.assert_close(gradients, expected_gradients)


def one_head(discriminator):
    """Of the five heads, each has a graph of its own: spectral_norm makes it a class of its own."""
    discriminator.heads = discriminator.heads[:1]
    discriminator.blocks = discriminator.blocks[:1]
    return discriminator


@pytest.mark.parametrize("build, shape, kinds", [
    (lambda: Decoder(8, 4, 16, 64, 3, 2, 128), (2, 8, 4, 4), 1),
    (lambda: load_encoder("tiny"), (2, 3, 64, 64), 1),
    (lambda: one_head(Discriminator("tiny")), (2, 3, 64, 64), 2),
    (lambda: Qwen2(50, 32, 64, 3, 2, 1), (2, 7, 32), 1)],
    ids=["decoder", "encoder", "discriminator", "language model"])
@torch.no_grad()
def test_other_networks_have_a_graph_for_each_kind_of_block(build, shape, kinds):
    graphs = Graphs()
    network = build()
    run = network.encode if hasattr(network, "encode") else network
    x = torch.rand(shape)
    expected = run(x)
    compile_blocks(network, backend=graphs)
    torch.testing.assert_close(run(x), expected)
    assert (graphs.number, graphs.breaks()) == (kinds, 0)


def test_tokens_that_are_generated_one_by_one_compile_nothing():
    graphs = Graphs()
    llm = Qwen2(50, 32, 64, 3, 2, 1)
    compile_blocks(llm, backend=graphs)
    assert llm.generate(torch.randn(2, 5, 32), None, stop=51, max_tokens=3).shape == (2, 3)
    assert graphs.number == 0


def are_compiled(blocks):
    return [block._compiled_call_impl is not None for block in blocks]


def test_what_sampling_runs_is_compiled():
    """Nothing runs here, so nothing takes time."""
    args = sample.parse_args(["--compile", "--prompt", "a red circle"])
    t2i, rae, _ = sample.load_t2i_models(args, CPU)
    blocks = [*t2i.llm.layers, *t2i.dit.blocks, *rae.decoder.decoder_layers]
    assert all(are_compiled(blocks))


# ---------------------------------------------------------------------------- words and numbers
@pytest.mark.parametrize("seconds, text", [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"),
                                           (100 * 3600, "100:00:00")])
def test_time_left_is_in_hours_minutes_and_seconds(seconds, text):
    assert progress.format_time(seconds) == text


def test_json_has_null_for_numbers_that_are_not_finite():
    record = {"loss": float("nan"), "by_t": [1.0, float("-inf"), None], "more": {"a": (2, "x")}}
    text = storage.to_json(record)
    assert text == '{"loss": null, "by_t": [1.0, null, null], "more": {"a": [2, "x"]}}'


@pytest.mark.parametrize("steps, warmup", [(4, 0), (60, 6), (1000, 100), (10 ** 6, 100)])
def test_warm_up_is_a_tenth_of_short_runs(steps, warmup):
    assert run_flags.default_warmup(steps) == warmup


@pytest.mark.parametrize("has_gpu, cores, processes, workers", [
    (False, 64, 1, 1), (True, 64, 1, 12), (True, 64, 8, 8), (True, 2, 4, 1)])
def test_loader_workers_are_the_cores_that_a_gpu_leaves_free(has_gpu, cores, processes, workers,
                                                             monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert run_flags.default_workers() == workers


# ---------------------------------------------------------------------------- data that changed
OLD = {"": {"images": 16, "names": "a"}}


@pytest.mark.parametrize("now, told", [
    ({"": {"images": 17, "names": "b"}}, "--data had 16 images and has 17"),
    ({"": {"images": 16, "names": "b"}}, "--data has other names or labels for its 16 images"),
    ({}, "--data is gone"),
    ({**OLD, "b": {"images": 2, "names": "c"}}, "source b of --data was not there")])
def test_data_that_changed_since_the_checkpoint_are_told(now, told):
    assert told in saving.describe_change({"data": OLD}, now, hold_out=0)
    with pytest.raises(ValueError, match=f"{told}.*would move into training"):
        saving.describe_change({"data": OLD}, now, hold_out=3)


@pytest.mark.parametrize("resumed", [{"data": OLD}, {}, None], ids=["same", "older", "new run"])
def test_data_that_did_not_change_need_no_word(resumed):
    assert saving.describe_change(resumed, OLD, hold_out=3) is None


# ---------------------------------------------------------------------------- one for all
def refuse():
    raise ValueError("there is no number")


def compute_on_rank_0(folder):
    """What a process of two sees: results, threads of torch, and the message of an error."""
    rank, _, _ = runtime.setup()

    def compute():
        return dict(rank=rank, threads=torch.get_num_threads())

    seen = runtime.on_rank_0(compute)
    try:
        runtime.on_rank_0(refuse)
    except ValueError as error:
        seen["error"] = str(error)
    seen["threads_afterwards"] = torch.get_num_threads()
    (folder / f"{rank}.json").write_text(json.dumps(seen))


def test_rank_0_computes_for_all_on_all_cores_and_its_errors_reach_all(tmp_path):
    torchrun(SimpleNamespace(main=compute_on_rank_0, parse_args=lambda argv: tmp_path))
    expected = dict(rank=0, threads=runtime.cores_of_machine(), error="there is no number",
                    threads_afterwards=1)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(runtime, "cores_of_machine", lambda: 16)
    assert runtime.cores_of_process() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert runtime.cores_of_process() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert runtime.cores_of_process() == 1

"""Weights spread over processes: what they compute, what they send, what they save.

Run: python -m pytest tests/test_sharding.py
"""
import argparse
import errno
import functools
import multiprocessing
import os
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint import FileSystemWriter

import communication
import sample
import sharding
import storage
import train_t2i
from conftest import (
    call_in_process,
    largest_difference,
    launch,
    load_last,
    load_pieces,
    read_log,
    run_on_one_thread,
    run_script,
)
from t2i import load_t2i

FLAGS = ["--width", 32, "--depth", 1, "--heads", 2,
         "--head_width", 48, "--head_depth", 1, "--head_heads", 3,
         "--llm_width", 32, "--llm_depth", 2, "--llm_heads", 2, "--plan", 0,
         "--batch", 8, "--micro_batch", 1, "--workers", 0, "--log_every", 2, "--save_every", 2,
         "--preview_every", 0, "--warmup", 2, "--decay_start", 2, "--decay_end", 8,
         "--questions", 0.5, "--llm_start", 0, "--dtype", "fp32"]
NUM_LAYERS = 2               # of the language model
NUM_BLOCKS = 1 + 1 + NUM_LAYERS


def train(out, *flags):
    run_script(train_t2i, *FLAGS, *flags, "--out", out)


def whole(folder):
    """The weights of the last sharded checkpoint of a run, from the file into which it converts."""
    run_script(sharding, "--ckpt", folder / "last.pt", "--out", folder / "whole.pt")
    return torch.load(folder / "whole.pt", weights_only=True)


# ---------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs of one, two and four processes, with and without --shard."""
    folder = tmp_path_factory.mktemp("runs")
    run_on_one_thread(train_t2i, *FLAGS, "--steps", 3, "--out", folder / "one")
    launch(4, lambda _: run_four(folder))
    launch(2, lambda _: run_two(folder))
    return folder


def run_four(folder):
    os.environ["LOCAL_WORLD_SIZE"] = "4"               # one node
    train(folder / "four", "--steps", 3, "--shard", "--recompute")
    os.environ["LOCAL_WORLD_SIZE"] = "2"               # two nodes
    train(folder / "nodes", "--steps", 2, "--shard")


def run_two(folder):
    train(folder / "ddp", "--steps", 2)
    train(folder / "two", "--steps", 3, "--shard")
    train(folder / "stopped", "--steps", 2, "--shard", "--preview_every", 2)
    for name in ("ddp", "stopped", "nodes"):
        run_script(train_t2i, "--resume", "--shard", "--steps", 3, "--out", folder / name)
    train(folder / "ddp_bf16", "--steps", 2, "--dtype", "bf16")
    train(folder / "two_bf16", "--steps", 2, "--dtype", "bf16", "--shard")


@pytest.mark.parametrize("name", ["ddp", "two", "four", "nodes"])
def test_any_number_of_processes_computes_what_one_does(runs, name):
    """Two that share; four; two with DDP and two nodes of two, until two that share go on."""
    one, other = load_last(runs / "one"), whole(runs / name)
    assert other["step"] == one["step"] == 3
    assert other["asked"] == one["asked"]
    for key in ("model", "ema", "rae"):
        assert largest_difference(one[key], other[key]) < 1e-5, key
    record, record_of_one = read_log(runs / name)[-1], read_log(runs / "one")[-1]
    for key in ("loss", "grad", "cross_entropy", "flow"):
        assert record[key] == pytest.approx(record_of_one[key], rel=1e-4), key


def test_resumed_run_is_exact_to_the_bit(runs):
    two, stopped = load_pieces(runs / "two"), load_pieces(runs / "stopped")
    assert any(name.endswith(".exp_avg_sq") for name in two)
    assert largest_difference(two, stopped) == 0
    assert not list((runs / "stopped").glob("*.png"))


def test_weights_in_bf16_are_what_autocast_makes_of_them(runs):
    """FSDP rounds the weights of blocks before it sends them, autocast before each matmul: the same
    numbers. Norms are rounded by neither.
    """
    ddp, shared = read_log(runs / "ddp_bf16")[-1], read_log(runs / "two_bf16")[-1]
    assert shared["loss"] == pytest.approx(ddp["loss"], rel=1e-6)
    assert shared["grad"] == pytest.approx(ddp["grad"], rel=1e-4)
    in_fp32 = load_last(runs / "one")["model"]
    in_bf16 = load_last(runs / "ddp_bf16")["model"]
    difference = largest_difference(in_bf16, whole(runs / "two_bf16")["model"])
    assert difference < 1e-4 < largest_difference(in_bf16, in_fp32)


def test_other_scripts_take_the_converted_file_and_name_the_command(runs, capsys):
    path = runs / "two" / "last.pt"
    command = f"python sharding.py --ckpt {path} --out model.pt"
    with pytest.raises(ValueError, match=command):
        run_script(sample, "--ckpt", path, "--prompt", "a star", "--out", runs / "x.png")
    with pytest.raises(FileNotFoundError, match=command):
        load_t2i(sharding.folder_of(path))
    with pytest.raises(SystemExit):
        train_t2i.parse_args(["--init", str(path), "--out", str(runs / "tuned")])
    assert command in capsys.readouterr().err

    run_script(sharding, "--ckpt", path, "--out", runs / "model.pt")
    run_script(sample, "--ckpt", runs / "model.pt", "--prompt", "a star", "--sampling_steps", 2,
               "--out", runs / "x.png")
    assert (runs / "x.png").exists()
    with pytest.raises(ValueError, match="model.pt is one file already"):
        run_script(sharding, "--ckpt", runs / "model.pt", "--out", runs / "again.pt")


def test_resume_with_other_flags_is_refused(runs, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        train_t2i.parse_args(["--resume", "--width", "64", "--out", str(runs / "two")])
    assert "--width 64 differs from the checkpoint's 32" in capsys.readouterr().err


# ---------------------------------------------------------------------------- traffic
def flags_of_traffic(accumulation, *more):
    """Flags of a run on 8 processes; blocks are wide enough that padding is little."""
    return [*FLAGS, "--width", 64, "--batch", 8 * accumulation, "--dtype", "bf16", *more]


def count_in_child(*arguments):
    """communication.count_step() in another process: after it, this one could not fork any more."""
    return call_in_process(multiprocessing.get_context("fork"), communication.count_step,
                           *arguments)


GATHER, REDUCE = ("all-gather", torch.bfloat16), ("reduce-scatter", torch.float32)
GATHER_REST, EXCHANGE = ("all-gather", torch.float32), ("all-reduce", torch.float32)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_traffic_of_a_step(accumulation):
    """Weights of blocks are gathered twice for each micro-batch, in bf16, all others once, in fp32.
    Gradients are added once a step, but for those of the language model, which runs twice.
    """
    traffic, sizes = count_in_child(8, 8, flags_of_traffic(accumulation))
    assert traffic.calls[GATHER] == 2 * accumulation * NUM_BLOCKS
    in_blocks = sizes.dit + sizes.llm
    assert traffic.bytes[GATHER] == pytest.approx(2 * accumulation * 2 * in_blocks, rel=0.05)
    assert traffic.bytes[GATHER_REST] < 1.2 * accumulation * 4 * (sizes.all - in_blocks)
    assert traffic.bytes[REDUCE] == pytest.approx(4 * (sizes.all + sizes.llm), rel=0.1)
    assert traffic.calls[REDUCE] <= NUM_BLOCKS + NUM_LAYERS + 2        # 2: norms, and the rest
    assert traffic.calls[EXCHANGE] == 0


def test_nodes_only_exchange_their_pieces_of_the_gradients():
    traffic, _ = count_in_child(16, 8, flags_of_traffic(2))
    on_one_node, _ = count_in_child(8, 8, flags_of_traffic(1))
    assert traffic.bytes[EXCHANGE] == pytest.approx(traffic.bytes[REDUCE] / 8, rel=0.01)
    for key in (GATHER, GATHER_REST, REDUCE):
        assert traffic.bytes[key] == on_one_node.bytes[key]


# ---------------------------------------------------------------------------- checkpoints
def join_group():
    """Make this process a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def in_group(test):
    """The test in another process, which is a group of its own: after it, this one could not fork
    any more.
    """
    @functools.wraps(test)
    def launched(**fixtures):
        def main(_):
            join_group()
            test(**fixtures)

        launch(1, main)

    return launched


class SmallRun:
    """A sharded model of a few weights, an optimizer that made a step, and their Checkpoints."""
    def __init__(self, out, steps=100, width=4):
        torch.manual_seed(0)
        self.lines = []
        self.model = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, width))
        sharding.shard(self.model, sharding.make_mesh(torch.device("cpu")), "fp32", [self.model[1]])
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        args = argparse.Namespace(out=out, steps=steps, save_every=2, log_every=2)
        log = argparse.Namespace(say=self.lines.append)
        self.checkpoints = sharding.Checkpoints(args, 0, log, None)

    def state(self):
        return sharding.training_state(self.model, self.model, self.optimizer)

    def copy(self):
        return {name: value.clone() for name, value in self.state().items()}

    def save(self, step):
        self.checkpoints.save(step, False, self.state(), args={})

    def save_and_wait(self, step):
        """Save, and do two more steps, of which the first finds the checkpoint written."""
        self.save(step)
        self.checkpoints.writing.future.exception()
        self.checkpoints.check(step + 1, 1.0)
        self.checkpoints.check(step + 2, 1.0)


def set_all(state, value):
    for tensor in state.values():
        tensor.detach().fill_(value)


@in_group
def test_a_checkpoint_is_of_its_step_though_training_goes_on(tmp_path, monkeypatch):
    may_write = threading.Event()
    write_data = FileSystemWriter.write_data

    def wait_and_write(self, *args):
        may_write.wait(60)
        return write_data(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", wait_and_write)
    run = SmallRun(tmp_path)
    saved = run.copy()
    run.save(2)
    set_all(run.state(), 7.0)
    run.checkpoints.check(3, 1.0)
    assert not (tmp_path / "last.pt").exists()         # no process waits for the disk

    may_write.set()
    run.checkpoints.writing.future.result()
    run.checkpoints.check(4, 1.0)
    assert load_last(tmp_path)["step"] == 2
    sharding.read_into(run.state(), sharding.folder_of(tmp_path / "last.pt"))
    assert largest_difference(saved, run.state()) == 0


@in_group
def test_training_goes_on_when_the_disk_is_full(tmp_path, monkeypatch):
    def fail(self, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = SmallRun(tmp_path, steps=8)
    run.save_and_wait(2)
    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", fail)
        run.save_and_wait(4)
        assert "weights_0000004 could not be written: [Errno 28] No space left" in run.lines[0]
        assert [path.name for path in tmp_path.glob("weights_*")] == ["weights_0000002"]
        assert load_last(tmp_path)["weights"] == "weights_0000002"
        assert run.checkpoints.is_due(6) and not run.checkpoints.is_due(5)
        with pytest.raises(OSError, match="No space left"):
            run.save(8)                                # the last step
        assert [path.name for path in tmp_path.glob("weights_*")] == ["weights_0000002"]

    run.save_and_wait(6)
    assert [path.name for path in tmp_path.glob("weights_*")] == ["weights_0000006"]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["last.pt"]


@in_group
def test_a_folder_that_no_last_pt_will_name_is_removed(tmp_path, monkeypatch):
    def fail(path, **state):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = SmallRun(tmp_path)
    run.save_and_wait(2)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_checkpoint", fail)
        run.save_and_wait(4)
    assert "No space left on device; training goes on, and tries again" in run.lines[0]
    assert [path.name for path in tmp_path.glob("weights_*")] == ["weights_0000002"]
    assert run.checkpoints.is_due(6)
    run.save_and_wait(6)
    run.checkpoints.check(9, 1.0)                      # which judges it
    assert load_last(tmp_path)["weights"] == "weights_0000006"
    assert [path.name for path in tmp_path.glob("weights_*")] == ["weights_0000006"]


def save_and_be_killed(out):
    join_group()
    run = SmallRun(out)
    run.save_and_wait(2)

    def write_half(self, *args):
        (out / "weights_0000004" / "__0_0.distcp").write_bytes(b"half")
        os._exit(9)

    FileSystemWriter.write_data = write_half
    run.save_and_wait(4)


def test_a_process_that_is_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path):
    context = multiprocessing.get_context("fork")
    child = context.Process(target=save_and_be_killed, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 9
    assert (tmp_path / "weights_0000004" / "__0_0.distcp").exists()
    go_on_after_a_kill(tmp_path=tmp_path)


@in_group
def go_on_after_a_kill(tmp_path):
    run = SmallRun(tmp_path)
    run.checkpoints.begin(2)
    saved = run.copy()
    set_all(run.state(), 7.0)
    sharding.read_into(run.state(), sharding.folder_of(tmp_path / "last.pt"))
    assert largest_difference(saved, run.state()) == 0
    assert [path.name for path in tmp_path.glob("weights_*")] == ["weights_0000002"]
    run.checkpoints.begin(0)                           # another run, with --overwrite
    assert not list(tmp_path.glob("*"))


@in_group
def test_a_run_that_diverges_gets_the_checkpoint_before_back(tmp_path):
    run = SmallRun(tmp_path)
    run.save_and_wait(2)
    run.save(4)
    run.checkpoints.writing.future.result()
    with pytest.raises(ValueError, match="the run has diverged"):
        for step in range(5, 30):
            run.checkpoints.check(step, float("nan"))
    assert load_last(tmp_path)["weights"] == "weights_0000002"
    sharding.read_into(run.state(), tmp_path / "weights_0000002")


@in_group
def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run = SmallRun(tmp_path)
    with torch.no_grad():
        run.model[1].bias[0] = float("nan")
    run.save(2)
    assert "step 2 is not saved, since model.1.bias is not finite" in run.lines[0]
    assert run.checkpoints.writing is None


class Code:
    def __reduce__(self):
        return os.system, ("true",)


def lose_index(folder):
    (folder / ".metadata").unlink()


def put_code_into_index(folder):
    (folder / ".metadata").write_bytes(pickle.dumps(Code()))


def cut_short(folder):
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:2000])


def empty(folder):
    (folder / "__0_0.distcp").write_bytes(b"")


@pytest.mark.parametrize("spoil, message", [
    (lose_index, "weights_0000002 does not exist, or is not complete"),
    (put_code_into_index, "no index that can be read safely.*system is no part of an index"),
    (cut_short, r"weights_0000002 can't be read \(\w+"),
    (empty, r"weights_0000002 can't be read \(\w+"),
])
@in_group
def test_folders_that_cannot_be_read(tmp_path, spoil, message):
    run = SmallRun(tmp_path)
    run.save_and_wait(2)
    spoil(tmp_path / "weights_0000002")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sharding.read_into(run.state(), tmp_path / "weights_0000002")


@pytest.mark.parametrize("name", [5, None, ["weights_0000002"], "/etc", "../weights_0000002"])
def test_a_checkpoint_names_a_folder_beside_it(tmp_path, name):
    storage.save_checkpoint(tmp_path / "last.pt", step=2, weights=name)
    with pytest.raises(ValueError, match="which is no name of a folder beside it"):
        run_script(sharding, "--ckpt", tmp_path / "last.pt", "--out", tmp_path / "model.pt")


@in_group
def test_weights_that_are_not_finite_are_not_converted(tmp_path):
    run = SmallRun(tmp_path)
    run.save_and_wait(2)
    set_all({"bias": run.model[1].bias}, float("nan"))
    dcp.save(run.state(), checkpoint_id=tmp_path / "weights_0000002")
    with pytest.raises(ValueError, match="weights_0000002: model.1.bias is not finite"):
        run_script(sharding, "--ckpt", tmp_path / "last.pt", "--out", tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def test_a_converted_file_has_a_suffix_by_which_it_is_read(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sharding.parse_args(["--out", str(tmp_path / "model.safetensors")])
    assert "use one of .pt .pth" in capsys.readouterr().err


@in_group
def test_folders_that_do_not_fit(tmp_path):
    run = SmallRun(tmp_path)
    set_all({"bias": run.model[1].bias}, float("nan"))
    folder = tmp_path / "weights_0000002"
    dcp.save(run.state(), checkpoint_id=folder)
    with pytest.raises(ValueError, match="model.1.bias is not finite"):
        sharding.read_into(run.state(), folder)
    with pytest.raises(ValueError, match=r"model.0.weight: shape \(4,\), not \(8,\)"):
        sharding.read_into(SmallRun(tmp_path, width=8).state(), folder)
    fewer = run.state()
    del fewer["opt.0.weight.exp_avg"]
    with pytest.raises(ValueError, match="unexpected opt.0.weight.exp_avg"):
        sharding.read_into(fewer, folder)


def test_buffers_that_no_state_has_are_noticed():
    """A module that comes from the device meta gets all values from a state, or never."""
    with torch.device("meta"):
        module = nn.Linear(2, 2)
        module.register_buffer("table", torch.arange(2), persistent=False)
    with pytest.raises(AssertionError, match="buffer table is not part of the state dict"):
        sharding.give_memory(module, "cpu")


def test_nodes_must_have_the_same_number_of_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="6 in all are no multiple of the 4 of this one"):
        sharding.make_mesh(torch.device("cpu"))

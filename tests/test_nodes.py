"""Several processes and nodes: one that vanishes, restarts, disks that are not shared.

Run: python -m pytest tests/test_nodes.py
"""
import os
import platform
import re
import signal
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import run_flags
import runtime
import storage
import train_dit
from conftest import (
    largest_difference,
    load_last,
    read_log,
    run_in_child,
    run_script,
    start,
    torchrun,
)
from test_train import DIT_FLAGS

HOST = re.escape(platform.node())


@pytest.fixture(autouse=True)
def fast_heartbeat(monkeypatch):
    monkeypatch.setattr(runtime.Heartbeat, "SECONDS", 0.2)             # a limit of 2.4 s


def start_group(main, world=2):
    """Start main(rank) in so many processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        script = SimpleNamespace(main=lambda args, rank=rank: main(rank), parse_args=lambda argv: 0)
        children.append(start(script, RANK=str(rank), WORLD_SIZE=str(world),
                              MASTER_ADDR="localhost", MASTER_PORT=str(port)))
    return children


def wait_for(children):
    """Exit codes of processes, which must end within a minute."""
    for child in children:
        child.join(60)
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode for child in children]


def compute(seconds=0.1):
    time.sleep(seconds)
    runtime.all_mean(torch.ones(1))


# ---------------------------------------------------------------------------- a process vanishes
def test_who_was_killed_is_named(capfd):
    def main(rank):
        runtime.setup()
        compute()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        compute()

    assert wait_for(start_group(main, world=3)) == [1, -signal.SIGKILL, 1]
    messages = capfd.readouterr().err
    assert len(re.findall(f"no sign of life for 1 s from rank 1 on {HOST}: killed,", messages)) == 2
    assert "rank 0 on" not in messages and "rank 2 on" not in messages


@pytest.mark.parametrize("frozen, named", [
    (1, f"no sign of life for 2 s from rank 1 on {HOST}"),
    (0, f"rank 0 on {HOST}, or the torchrun there, has not answered for 2 s")])
def test_who_is_frozen_is_named(frozen, named, capfd):
    def main(rank):
        runtime.setup()
        compute()
        if rank == frozen:
            os.kill(os.getpid(), signal.SIGSTOP)
        compute()

    children = start_group(main)
    other = 1 - frozen
    children[other].join(60)
    children[frozen].kill()                            # as torchrun does
    assert wait_for(children)[other] == 1
    assert re.search(named, capfd.readouterr().err)


def test_a_process_may_work_long_and_end_early_or_late(capfd):
    def main(rank):
        runtime.setup()
        compute()
        if rank == 1:
            time.sleep(3)                              # more than the limit
        compute()
        if rank == 0:                                  # rank 1 has signed off
            time.sleep(3)

    assert wait_for(start_group(main)) == [0, 0]
    assert "sign of life" not in capfd.readouterr().err


def test_a_run_that_is_suspended_as_a_whole_goes_on():
    def main(rank):
        runtime.setup()
        for _ in range(10):
            compute()

    children = start_group(main)
    time.sleep(0.8)
    for child in children:
        os.kill(child.pid, signal.SIGSTOP)
    time.sleep(3)
    for child in children:
        os.kill(child.pid, signal.SIGCONT)
    assert wait_for(children) == [0, 0]


# ---------------------------------------------------------------------------- restarts
def train_and_be_killed(argv):
    """What torchrun starts: rank 1 is killed in the fourth step of its first attempt."""
    original = runtime.lr_factor

    def fatal_lr_factor(step, *rest, **more):
        is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if step == 3 and is_first and runtime.process_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(step, *rest, **more)

    runtime.lr_factor = fatal_lr_factor
    run_in_child(train_dit, argv, None, False, {})


def test_a_run_that_torchrun_starts_again_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    flags = [*DIT_FLAGS, "--micro_batch", "4", "--steps", "6", "--dtype", "fp32"]
    command = [*flags, "--auto_resume", "--out", str(tmp_path / "killed")]
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1,
                          rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          monitor_interval=0.1, start_method="fork")
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
    handlers = {number: signal.getsignal(number) for number in numbers}
    elastic_launch(config, train_and_be_killed)(command)
    for number, handler in handlers.items():           # it leaves its own ones behind
        signal.signal(number, handler)
    torchrun(train_dit, *flags, "--out", tmp_path / "straight")

    killed, straight = load_last(tmp_path / "killed"), load_last(tmp_path / "straight")
    assert killed["step"] == 6
    assert largest_difference(killed, straight) == 0
    resumed_at = [record["resumed_at"] for record in read_log(tmp_path / "killed")
                  if "resumed_at" in record]
    assert resumed_at == [0, 2]


def test_auto_resume_of_a_complete_run_is_a_success(tmp_path, capsys):
    run_script(train_dit, *DIT_FLAGS, "--steps", "2", "--out", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        run_script(train_dit, "--auto_resume", "--out", str(tmp_path))
    assert end.value.code == 0
    assert "has done its 2 steps; nothing is left to do" in capsys.readouterr().out


def test_restarts_need_a_command_that_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(SystemExit):
        train_dit.parse_args(["--overwrite", "--out", str(tmp_path)])
    assert "--max_restarts 3 gives this command again" in capsys.readouterr().err
    assert not train_dit.parse_args(["--auto_resume", "--out", str(tmp_path)]).resume


def test_restarts_need_a_new_store(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front of"):
        runtime.check_restarts()


def test_auto_resume_and_overwrite_contradict_each_other(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_dit.parse_args(["--auto_resume", "--overwrite", "--out", str(tmp_path)])
    assert "--auto_resume goes on with a run and --overwrite" in capsys.readouterr().err


# ---------------------------------------------------------------------------- nodes that differ
def as_gathered(monkeypatch, others):
    """Let gather() return this process's value and those of another one, a function of it."""
    monkeypatch.setattr(runtime, "gather", lambda value: [value, others(*value)])


@pytest.mark.parametrize("others, message", [
    (lambda host, step, flags, data: ("n1", 0, flags, data),
     "rank 1 on n1 would go on from step 0 and rank 0 on .* from 500; all nodes read .*last.pt"),
    (lambda host, step, flags, data: ("n1", step, dict(flags, lr=0.25), data),
     "rank 1 on n1 has --lr 0.25 and rank 0 on .* 0.5; give all nodes the same command"),
    (lambda host, step, flags, data: ("n1", step, flags, {"": 5}),
     "rank 1 on n1 has other images in --data than rank 0 on")],
    ids=["checkpoint", "flags", "data"])
def test_nodes_that_do_not_fit_are_refused(others, message, tmp_path, monkeypatch):
    args = train_dit.parse_args(["--out", str(tmp_path), "--lr", "0.5"])
    as_gathered(monkeypatch, others)
    with pytest.raises(ValueError, match=message):
        run_flags.check_same_run(args, dict(step=500), {"": 7})


def test_nodes_may_have_other_numbers_of_workers(tmp_path, monkeypatch):
    values = []

    def gather_so_far(value):
        values.append(value)
        return values

    monkeypatch.setattr(runtime, "gather", gather_so_far)
    for workers in ("2", "9"):
        args = train_dit.parse_args(["--out", str(tmp_path), "--workers", workers])
        run_flags.check_same_run(args, None, {"": 7})


@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
def test_a_disk_that_is_not_shared_is_refused(tmp_path, monkeypatch, is_folder):
    out = tmp_path / "out"
    lock = storage.lock(out, is_folder)
    as_gathered(monkeypatch, lambda host, sees_lock: ("n1", sees_lock))
    storage.check_shared(out, is_folder)
    as_gathered(monkeypatch, lambda host, sees_lock: ("n1", False))
    with pytest.raises(ValueError, match="out is not on a disk that n1 shares with"):
        storage.check_shared(out, is_folder)
    lock.release()

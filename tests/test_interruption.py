"""Runs that are stopped, diverge, run out of disk, or meet each other in one folder.

Run: python -m pytest tests/test_interruption.py
"""
import contextlib
import errno
import json
import multiprocessing
import os
import resource
import signal
import socket
import threading
import time

import pytest
import torch
from PIL import Image

import progress
import runtime
import saving
import storage
import train_decoder
import train_dit
from conftest import (
    largest_difference,
    load_last,
    read_log,
    restored_handlers,
    run_on_one_thread,
    run_script,
    saving_in_background,
    start,
)
from data import open_data
from test_train import DECODER_FLAGS, DIT_FLAGS

STEPS = 40
LONG_DIT = [*DIT_FLAGS, "--dtype", "fp32", "--save_every", 1000, "--decay_end", STEPS,
            "--steps", STEPS]
LONG_DECODER = [*DECODER_FLAGS, "--dtype", "fp32", "--save_every", 1000, "--steps", STEPS]


def slow_down(monkeypatch, seconds):
    """Let the first steps of all runs take this long, so that a signal meets them."""
    original = runtime.lr_factor

    def slow_lr_factor(step, *rest, **more):
        if step < 20:
            time.sleep(seconds)
        return original(step, *rest, **more)

    monkeypatch.setattr(runtime, "lr_factor", slow_lr_factor)


def wait_for_first_step(folder, child):
    """Wait until the run in a folder has done a step. It must not end before."""
    while not any("first_step_seconds" in record for record in records_so_far(folder)):
        assert child.is_alive()
        time.sleep(0.02)


def records_so_far(folder):
    path = folder / "log.jsonl"
    return read_log(folder) if path.exists() else []


# ---------------------------------------------------------------------------- signals
@pytest.mark.parametrize("script, flags, number", [
    (train_dit, LONG_DIT, signal.SIGTERM), (train_dit, LONG_DIT, signal.SIGINT),
    (train_decoder, LONG_DECODER, signal.SIGUSR1)], ids=["term", "int", "usr1"])
def test_a_signal_ends_the_step_saves_and_the_run_goes_on_exactly(
        script, flags, number, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        slow_down(patch, seconds=0.1)
        child = start(script, *flags, "--out", tmp_path / "stopped")
    wait_for_first_step(tmp_path / "stopped", child)
    signal_process(child, number)
    child.join(60)

    assert child.exitcode == 0
    step = load_last(tmp_path / "stopped")["step"]     # although the first save was not due
    assert 1 <= step < STEPS
    output = capfd.readouterr()
    assert f"stopped by {number.name} after saving step {step}; go on by --resume" in output.out
    assert "once more to stop at once" in output.err

    run_on_one_thread(script, "--resume", "--out", tmp_path / "stopped")
    run_on_one_thread(script, *flags, "--out", tmp_path / "straight")
    straight, stopped = load_last(tmp_path / "straight"), load_last(tmp_path / "stopped")
    assert largest_difference(straight, stopped) == 0


def signal_process(child, number):
    os.kill(child.pid, number)


def test_signals_that_come_together_are_one_request(tmp_path, monkeypatch, capfd):
    slow_down(monkeypatch, seconds=0.5)
    child = start(train_dit, *LONG_DIT, "--out", tmp_path)
    wait_for_first_step(tmp_path, child)
    monkeypatch.undo()

    signal_process(child, signal.SIGTERM)
    signal_process(child, signal.SIGINT)               # torchrun passes on what it receives
    child.join(60)
    assert child.exitcode == 0


def test_a_later_signal_ends_a_run_at_once(tmp_path, monkeypatch, capfd):
    slow_down(monkeypatch, seconds=100)
    child = start(train_dit, *LONG_DIT, "--out", tmp_path)
    while not records_so_far(tmp_path):
        time.sleep(0.02)
    time.sleep(1)                                      # it is within its first step now
    signal_process(child, signal.SIGTERM)
    time.sleep(runtime.StopRequest.TOGETHER + 0.2)
    assert child.is_alive()
    signal_process(child, signal.SIGTERM)
    child.join(10)
    assert child.exitcode == 128 + signal.SIGTERM
    assert "stopped at once" in capfd.readouterr().err


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    slow_down(monkeypatch, seconds=0.1)
    children = []
    for rank in ("0", "1"):
        children.append(start(train_dit, *LONG_DIT, "--out", tmp_path, RANK=rank,
                              LOCAL_RANK=rank, **group))
    wait_for_first_step(tmp_path, children[0])
    signal_process(children[1], signal.SIGTERM)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert load_last(tmp_path)["step"] < STEPS


def test_a_signal_to_the_group_of_a_run_reaches_no_loader_worker(tmp_path, monkeypatch):
    """Terminals, timeout and torchrun signal whole groups."""
    slow_down(monkeypatch, seconds=0.1)
    child = start(train_dit, *LONG_DIT, "--workers", 2, "--out", tmp_path, session=True)
    wait_for_first_step(tmp_path, child)
    os.killpg(child.pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 0
    assert load_last(tmp_path)["step"] < STEPS


def test_signals_are_only_caught_within_the_loop():
    before = signal.getsignal(signal.SIGTERM)
    stop = runtime.StopRequest()
    for _ in stop.catching(range(3)):
        assert signal.getsignal(signal.SIGTERM) == stop.note
        break
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("message, line", [
    ("", "stopped; give the command again"), ("7 are kept", "7 are kept")])
def test_a_script_that_is_stopped_ends_with_a_line(message, line):
    def main(args):
        raise KeyboardInterrupt(message)

    with restored_handlers(), pytest.raises(SystemExit, match=line):
        runtime.run(main, lambda: None)


class InterruptedWhenDeleted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):                          # Python drops what is raised here
            pass


def test_an_interrupt_that_python_drops_comes_again(capfd):
    def main(args):
        thing = InterruptedWhenDeleted()
        del thing
        time.sleep(5)

    begin = time.time()
    with restored_handlers(), pytest.raises(SystemExit, match="stopped"):
        runtime.run(main, lambda: None)
    assert time.time() - begin < 4
    assert "Traceback" not in capfd.readouterr().err


# ---------------------------------------------------------------------------- divergence
def test_a_run_that_diverges_stops_and_keeps_its_last_sane_checkpoint(tmp_path):
    run_script(train_dit, *DIT_FLAGS, "--dtype", "fp32", "--steps", 4, "--out", tmp_path)
    sane = load_last(tmp_path)
    spoiling = ["--lr", "1e30", "--clip", 0, "--save_every", 1, "--steps", 60]
    with pytest.raises(ValueError, match=f"the run has diverged.*{saving.Updates.IN_A_ROW} of the "
                                         "last .* steps.*the last checkpoint with a finite loss"):
        run_script(train_dit, "--resume", *spoiling, "--out", tmp_path)

    kept = load_last(tmp_path)
    assert kept["step"] < 4 + saving.Updates.IN_A_ROW
    assert largest_difference(sane["model"], kept["model"]) < 1    # not the spoilt ones of 1e30
    assert not (tmp_path / "previous.pt").exists()

    run_script(train_dit, "--resume", "--lr", "1e-3", "--clip", 1, "--steps", kept["step"] + 2,
               "--out", tmp_path)
    assert all(weight.isfinite().all() for weight in load_last(tmp_path)["model"].values())


def test_a_checkpoint_without_a_finite_step_is_called_spoilt(tmp_path):
    run_script(train_dit, *DIT_FLAGS, "--dtype", "fp32", "--steps", 1, "--lr", "1e15", "--clip", 0,
               "--warmup", 0, "--out", tmp_path)
    message = "resumed without a finite step: .* spoilt; then start anew"
    with pytest.raises(ValueError, match=message):
        run_script(train_dit, "--resume", "--lr", "1e-4", "--clip", 1, "--steps", 40,
                   "--out", tmp_path)


def checkpoints_of(folder, steps=1000, log=None, in_background=False):
    args = train_dit.parse_args(["--steps", str(steps), "--out", str(folder)])
    return saving.Checkpoints(args, 0, log, None, in_background)


def test_updates_left_out_now_and_then_do_not_stop_a_run(tmp_path):
    checkpoints = checkpoints_of(tmp_path)
    for done in range(1, 1000):
        checkpoints.check(done, float("nan") if done % 3 == 0 else 1.0)


@pytest.mark.parametrize("is_left_out, last_step", [
    (lambda done: done > 50, 50 + saving.Updates.IN_A_ROW),
    (lambda done: done % 2 == 0, saving.Updates.RECENT)], ids=["in a row", "half"])
def test_too_many_updates_left_out_stop_a_run(is_left_out, last_step, tmp_path):
    """The gradients of a step are looked at during the next one."""
    checkpoints = checkpoints_of(tmp_path)
    with pytest.raises(ValueError, match="diverged"):
        for done in range(1, 1000):
            checkpoints.check(done, float("inf") if is_left_out(done) else 1.0)
    assert done == last_step + 1


def test_a_run_does_not_end_well_with_an_update_left_out(tmp_path):
    with pytest.raises(ValueError, match="diverged"):
        checkpoints_of(tmp_path, steps=5).check(5, float("nan"))


def test_no_checkpoint_is_due_after_an_update_that_was_left_out(tmp_path):
    checkpoints = checkpoints_of(tmp_path)
    checkpoints.check(500, float("nan"))
    assert not checkpoints.is_due(500)
    checkpoints.check(501, 1.0)
    assert not checkpoints.is_due(501)
    assert checkpoints.is_due(1000)


def test_the_log_of_a_diverged_run_is_strict_json(tmp_path):
    with pytest.raises(ValueError, match="diverged"):
        run_script(train_dit, *DIT_FLAGS, "--lr", "1e30", "--clip", 0, "--steps", 6,
                   "--dtype", "fp32", "--out", tmp_path)
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_an_average_that_is_not_finite_is_not_saved(tmp_path, capsys):
    checkpoints = checkpoints_of(tmp_path)
    state = dict(model={"w": torch.ones(2)}, ema={"w": torch.tensor([1.0, float("nan")])})
    problem = checkpoints.write(500, state, is_last=False)
    assert problem == "step 500 is not saved, since w is not finite"
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- saved by a thread
class SlowDisk:
    """Stands for storage.save_checkpoint, which writes nothing before has_room is set.

    error: what it raises then, if anything. is_writing: set when it is called.
    """
    def __init__(self, monkeypatch, error=None):
        self.original = storage.save_checkpoint
        self.error = error
        self.is_writing, self.has_room = threading.Event(), threading.Event()
        monkeypatch.setattr(storage, "save_checkpoint", self.save)

    def save(self, path, **state):
        self.is_writing.set()
        assert self.has_room.wait(20)
        if self.error:
            raise self.error
        self.original(path, **state)


def test_a_thread_writes_the_weights_as_they_were_when_the_step_was_saved(tmp_path, monkeypatch):
    checkpoints = checkpoints_of(tmp_path, in_background=True)
    weight, disk = torch.ones(3), SlowDisk(monkeypatch)
    for step in (500, 1500):                           # the second time in the same memory
        weight.fill_(step)
        disk.has_room.clear()
        checkpoints.save(step, model={"w": weight}, ema={"w": weight}, names=["a"])
        weight.zero_()                                 # training goes on
        checkpoints.check(step + 1, 1.0)
        disk.has_room.set()
        checkpoints.finish()
        saved = load_last(tmp_path)
        assert (saved["step"], saved["names"]) == (step, ["a"])
        assert saved["model"]["w"].tolist() == saved["ema"]["w"].tolist() == [step, step, step]
    assert saved["model"]["w"].data_ptr() == saved["ema"]["w"].data_ptr()      # written once


def test_the_previous_checkpoint_stays_until_the_next_is_written_and_judged(tmp_path, monkeypatch):
    checkpoints = checkpoints_of(tmp_path, in_background=True)
    checkpoints.save(500, model={"w": torch.ones(1)})
    checkpoints.finish()
    disk = SlowDisk(monkeypatch)
    checkpoints.save(600, model={"w": torch.ones(1)})
    assert disk.is_writing.wait(20)
    for done in (601, 602):
        checkpoints.check(done, 1.0)                   # 601 was judged, but 600 is not written
    assert load_last(tmp_path)["step"] == 500
    assert checkpoints.previous.exists()
    disk.has_room.set()
    checkpoints.writing.result()
    assert checkpoints.previous.exists()
    checkpoints.check(603, 1.0)
    assert load_last(tmp_path)["step"] == 600
    assert not checkpoints.previous.exists()


def test_a_run_that_diverges_while_a_thread_writes_goes_back_to_the_one_before(tmp_path,
                                                                               monkeypatch):
    checkpoints = checkpoints_of(tmp_path, in_background=True)
    checkpoints.check(100, 1.0)
    checkpoints.save(100, model={"w": torch.ones(1)})
    checkpoints.finish()
    disk = SlowDisk(monkeypatch)
    checkpoints.save(200, model={"w": torch.ones(1)})
    assert disk.is_writing.wait(20)
    threading.Timer(0.2, disk.has_room.set).start()
    with pytest.raises(ValueError, match="the last checkpoint with a finite loss"):
        for done in range(201, 300):
            checkpoints.check(done, float("nan"))
    assert load_last(tmp_path)["step"] == 100
    assert not checkpoints.previous.exists()


def test_a_thread_without_room_is_told_once_and_tries_again(tmp_path, monkeypatch, capsys):
    checkpoints = checkpoints_of(tmp_path, log=open_log(tmp_path), in_background=True)
    disk = SlowDisk(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "last.pt"))
    checkpoints.save(500, model={"w": torch.ones(1)})
    disk.has_room.set()
    checkpoints.writing.exception(20)
    for done in (501, 502, 550):
        checkpoints.check(done, 1.0)
    assert not checkpoints.is_due(549)
    assert checkpoints.is_due(550)                     # the next line of the log
    assert capsys.readouterr().out.count("last.pt: No space left on device; training goes on") == 1

    disk.error = None
    checkpoints.save(550, model={"w": torch.ones(1)})
    checkpoints.finish()
    assert load_last(tmp_path)["step"] == 550
    assert not checkpoints.is_due(600)


def test_a_signal_waits_for_the_thread_and_the_run_goes_on_exactly(tmp_path, monkeypatch, capfd):
    original = storage.save_checkpoint

    def save_slowly(path, **state):
        time.sleep(0.3)
        original(path, **state)

    flags = [*LONG_DIT, "--steps", 12, "--decay_end", 12]
    with monkeypatch.context() as patch, saving_in_background():
        slow_down(patch, seconds=0.1)
        patch.setattr(storage, "save_checkpoint", save_slowly)
        child = start(train_dit, *flags, "--save_every", 1, "--out", tmp_path / "stopped")
    wait_for_first_step(tmp_path / "stopped", child)
    signal_process(child, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 0
    step = load_last(tmp_path / "stopped")["step"]
    assert f"stopped by SIGTERM after saving step {step}" in capfd.readouterr().out
    names = {path.name for path in (tmp_path / "stopped").iterdir()}
    assert names == {"last.pt", "log.jsonl", ".lock"}

    with saving_in_background():
        run_on_one_thread(train_dit, "--resume", "--out", tmp_path / "stopped")
    run_on_one_thread(train_dit, *flags, "--out", tmp_path / "straight")
    straight, stopped = load_last(tmp_path / "straight"), load_last(tmp_path / "stopped")
    assert largest_difference(straight, stopped) == 0


def test_kill_in_the_middle_of_a_thread_s_file_leaves_the_one_before(tmp_path, monkeypatch):
    original = torch.save

    def save_half(state, file):
        if state["step"] == 2:
            file.write(b"half")
            file.flush()
            time.sleep(60)
        original(state, file)

    with monkeypatch.context() as patch, saving_in_background():
        patch.setattr(torch, "save", save_half)
        child = start(train_dit, *LONG_DIT, "--save_every", 1, "--out", tmp_path)
    while not (tmp_path / "previous.pt").exists():     # which is kept right before the second file
        assert child.is_alive()
        time.sleep(0.02)
    while not (tmp_path / "last.pt.tmp").exists():
        time.sleep(0.02)
    child.kill()
    child.join()

    assert load_last(tmp_path)["step"] == 1
    run_script(train_dit, "--resume", "--steps", 3, "--out", tmp_path)
    assert {path.name for path in tmp_path.glob("*.pt*")} == {"last.pt"}


# ---------------------------------------------------------------------------- two runs, one folder
def hold_lock(folder, is_held):
    lock = storage.lock(folder, is_folder=True)
    is_held.set()
    time.sleep(60)
    lock.release()


def test_a_second_run_on_a_folder_is_refused_until_the_first_ends(tmp_path):
    context = multiprocessing.get_context("fork")
    is_held = context.Event()
    owner = context.Process(target=hold_lock, args=(tmp_path, is_held))
    owner.start()
    is_held.wait(20)

    with pytest.raises(ValueError, match=f"another process is writing to {tmp_path}"):
        run_script(train_dit, *DIT_FLAGS, "--steps", 2, "--out", tmp_path)

    owner.kill()                                       # a lock survives no crash
    owner.join()
    run_script(train_dit, *DIT_FLAGS, "--steps", 2, "--out", tmp_path)


def test_an_output_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / ".x.png.lock").mkdir()
    with pytest.raises(ValueError, match="x.png cannot be written .*; name another --out"):
        storage.lock(tmp_path / "x.png")


def test_a_released_lock_leaves_no_file(tmp_path):
    lock = storage.lock(tmp_path / "samples.png")
    assert [path.name for path in tmp_path.iterdir()] == [".samples.png.lock"]
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_hold_the_lock_of_their_folder(tmp_path):
    args = train_dit.parse_args(["--out", str(tmp_path)])
    lock = storage.lock(tmp_path, is_folder=True)
    checkpoints = saving.Checkpoints(args, 0, log=None, lock=lock)
    assert checkpoints.lock is lock


# ---------------------------------------------------------------------------- the log
def open_log(folder, start=0):
    args = train_dit.parse_args(["--steps", "100", "--out", str(folder)])
    return progress.Log(args, 0, torch.device("cpu"), start, 0, open_data("shapes", 64))


def test_the_pace_of_the_first_steps_is_told_once(tmp_path, capsys):
    run_script(train_dit, *DIT_FLAGS, "--steps", 6, "--log_every", 1, "--out", tmp_path)
    assert capsys.readouterr().out.count("the first step took") == 1
    assert sum("first_step_seconds" in record for record in read_log(tmp_path)) == 1


def test_steps_that_compile_show_no_pace(tmp_path, capsys):
    args = train_dit.parse_args(["--compile", "--steps", "100", "--out", str(tmp_path)])
    log = progress.Log(args, 0, torch.device("cpu"), 0, 0, open_data("shapes", 64))
    log.first_steps(1)
    log.first_steps(2)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith("in which blocks were compiled; the next ones are faster")


def test_torn_and_foreign_lines_do_not_prevent_a_resume(tmp_path):
    lines = [b'{"step": 1}', b'{"step": 9}', b'[1, 2]', b'7', b'\xff\xfe', b'{"step": "x"}',
             b"[" * 100_000, b'{"step": 2, "loss": null}', b'{"warning": "w"}', b'{"step": 3, "lo']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    log = open_log(tmp_path, start=3)
    log.write(dict(step=4))
    records = read_log(tmp_path)
    assert records[:3] == [{"step": 1}, {"step": 2, "loss": None}, {"warning": "w"}]
    assert records[3]["resumed_at"] == 3
    assert records[4:] == [{"step": 4}]


def test_a_log_is_whole_although_a_resume_fails_to_rewrite_it(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 5}\n')

    def die(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)            # right before the new file takes its place
    with pytest.raises(KeyboardInterrupt):
        open_log(tmp_path, start=3)
    assert read_log(tmp_path) == [{"step": 1}, {"step": 5}]


# ---------------------------------------------------------------------------- full disks
@contextlib.contextmanager
def files_up_to(size):
    """No file can grow beyond `size` bytes, as if the disk was full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_cannot_be_written_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "last.pt"
    storage.save_checkpoint(path, x=torch.ones(3))
    with files_up_to(100_000), pytest.raises(OSError, match=f"{path} could not be written: File"):
        storage.save_checkpoint(path, x=torch.zeros(100_000))
    assert torch.equal(storage.load_checkpoint(path)["x"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("name", ["last.pt", "tiny_dit.safetensors"])
def test_a_checkpoint_of_another_user_is_not_called_damaged(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"of another user")
    monkeypatch.setattr(os, "access", lambda path, mode: False)    # nothing keeps out root
    with pytest.raises(ValueError, match=f"{name} may not be read by this user; change its perm"):
        storage.load_checkpoint(tmp_path / name)


def test_a_device_or_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe or a device; name a file"):
        storage.check_out(tmp_path / "pipe")


def test_a_bug_in_what_writes_is_no_full_disk(tmp_path):
    def write(f):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        storage.write_whole(tmp_path / "x", write)
    assert list(tmp_path.iterdir()) == []


def test_training_goes_on_without_room_and_saves_when_there_is_some(tmp_path, monkeypatch, capsys):
    """The disk is full at step 2; at step 4, the next line of the log, there is room again."""
    original = storage.save_checkpoint
    saved = []

    def save_on_a_full_disk(path, **state):
        if state["step"] == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        saved.append(state["step"])
        original(path, **state)

    monkeypatch.setattr(storage, "save_checkpoint", save_on_a_full_disk)
    run_script(train_dit, *DIT_FLAGS, "--log_every", 2, "--save_every", 2, "--steps", 7,
               "--save_every", 100, "--out", tmp_path / "end")
    run_script(train_dit, *DIT_FLAGS, "--log_every", 3, "--save_every", 2, "--steps", 7,
               "--out", tmp_path / "run")
    assert saved == [7, 3, 4, 6, 7]
    warning = f"warning: {tmp_path}/run/last.pt: No space left on device; training goes on"
    assert warning in capsys.readouterr().out


def test_a_full_disk_at_the_end_of_a_run_is_a_sentence_and_the_old_file_stays(tmp_path):
    run_script(train_dit, *DIT_FLAGS, "--steps", 2, "--out", tmp_path)
    with files_up_to(200_000), pytest.raises(OSError, match="last.pt could not be written: File"):
        run_script(train_dit, "--resume", "--steps", 4, "--preview_every", 0, "--out", tmp_path)
    assert load_last(tmp_path)["step"] == 2
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"last.pt", "log.jsonl", ".lock"}


def test_the_log_waits_for_room(tmp_path):
    log = open_log(tmp_path)
    size = (tmp_path / "log.jsonl").stat().st_size
    with files_up_to(size + 10):
        log.write(dict(step=1, loss=1.0))
        log.write(dict(step=2, loss=2.0))
    assert (tmp_path / "log.jsonl").stat().st_size == size         # no torn line
    log.write(dict(step=3, loss=3.0))
    assert [record["step"] for record in read_log(tmp_path) if "step" in record] == [1, 2, 3]


def test_a_preview_without_room_costs_only_the_preview(tmp_path, capsys):
    log = open_log(tmp_path)
    noise = Image.fromarray(torch.randint(256, (200, 200, 3), dtype=torch.uint8).numpy())
    with files_up_to(30_000):
        log.preview(7, lambda: noise)
    assert "preview_0000007.png could not be written: File too large" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]

    log.preview(7, lambda: noise)
    assert Image.open(tmp_path / "preview_0000007.png").size == (200, 200)


def test_a_preview_that_cannot_be_drawn_costs_only_the_preview(tmp_path, capsys):
    def draw():
        raise ValueError("the model draws latents that are not finite")

    open_log(tmp_path).preview(7, draw)
    assert "not finite; training goes on without a preview of step 7" in capsys.readouterr().out


def test_a_folder_that_vanishes_is_made_again(tmp_path):
    storage.write_whole(tmp_path / "gone" / "x", lambda f: f.write(b"x"))
    storage.append_whole(tmp_path / "gone too" / "log.jsonl", "{}\n")
    assert (tmp_path / "gone" / "x").read_bytes() == b"x"
    assert (tmp_path / "gone too" / "log.jsonl").read_text() == "{}\n"

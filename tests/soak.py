"""Interrupt trainings and samplings at random moments, and see whether anything is lost.

    python tests/soak.py --minutes 60

A scenario is a small run of a script. It is started again and again, each time interrupted at a
random moment, until it has come to its end. Then its result must equal, bit for bit, that of the
same run without interruption (images of samples: but for roundings by 1 of 255), and nothing may
be left behind: no process, no temporary file.
The interruptions: kill -9, the three signals that end a run after its step, and a disk that is
full for the rest of the process (a limit on the size of files). Linux only.
"""
import argparse
import collections
import contextlib
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import conftest
import sample
import train_decoder
import train_dit
import train_t2i

STEPS = 30
COMMON = ["--dtype", "fp32", "--batch", 8, "--steps", STEPS, "--warmup", 2, "--log_every", 2,
          "--save_every", 3, "--preview_every", 0]
DIT = [*COMMON, "--width", 32, "--depth", 1, "--heads", 2, "--head_width", 32, "--head_heads", 2,
       "--decay_start", 2, "--decay_end", STEPS]
DECODER = [*COMMON, "--decoder_width", 32, "--decoder_depth", 1, "--decoder_heads", 2,
           "--decoder_mlp", 64, "--stats_n", 16, "--eval_every", 0, "--eval_n", 4]
T2I = [*COMMON, "--width", 32, "--depth", 1, "--heads", 2, "--head_width", 0, "--llm_width", 32,
       "--llm_depth", 1, "--llm_heads", 2, "--plan", 0, "--decay_start", 2, "--decay_end", STEPS]
SAMPLING = ["--n", 40, "--batch", 4, "--sampling_steps", 4]


class Scenario(NamedTuple):
    script: object           # module
    flags: list
    processes: int
    in_background: bool = False      # whether a thread writes checkpoints, as on a GPU


SCENARIOS = {
    "train_dit": Scenario(train_dit, [*DIT, "--workers", 1], 1),
    "train_dit, latents cached": Scenario(train_dit, [*DIT, "--cache", 64, "--workers", 1], 1),
    "train_dit, saved by a thread": Scenario(train_dit, [*DIT, "--workers", 1], 1, True),
    "train_dit, 2 processes": Scenario(train_dit, [*DIT, "--workers", 1], 2),
    "train_decoder": Scenario(train_decoder, [*DECODER, "--workers", 2], 1),
    "train_decoder with GAN": Scenario(train_decoder, [*DECODER, "--gan", 0.75, "--workers", 1], 1),
    "train_decoder, 2 processes": Scenario(train_decoder, [*DECODER, "--workers", 1], 2),
    "train_t2i": Scenario(train_t2i, [*T2I, "--workers", 1], 1),
    "train_t2i, 2 processes": Scenario(train_t2i, [*T2I, "--workers", 1], 2),
    "train_t2i --shard, 2 processes": Scenario(train_t2i, [*T2I, "--workers", 1, "--shard"], 2),
    "train_t2i, 2 processes, saved by a thread": Scenario(train_t2i, [*T2I, "--workers", 1], 2,
                                                          True),
    "sample": Scenario(sample, SAMPLING, 1),
    "sample, 2 processes": Scenario(sample, SAMPLING, 2),
}
KILL, FULL_DISK = "kill -9", "full disk"
EVENTS = [KILL, KILL, "SIGTERM", "SIGINT", "SIGUSR1", FULL_DISK]
FULL = 40_000                # bytes: room for a log or a picture, not for a checkpoint
PATIENCE = 60                # seconds within which a process must end once it was told to


# ---------------------------------------------------------------------------- processes
def start_run(scenario, folder, is_disk_full):
    """Start the processes of a run that begins or goes on in a folder. Returns them."""
    if scenario.script is sample:
        flags = [*scenario.flags, "--out", folder / "images"]
    elif (folder / "last.pt").exists():
        flags = ["--resume", "--out", folder]
    else:
        flags = [*scenario.flags, "--out", folder]
    environments = [{}]
    if scenario.processes > 1:
        group = dict(WORLD_SIZE=str(scenario.processes), MASTER_ADDR="localhost",
                     MASTER_PORT=str(free_port()))
        environments = []
        for rank in range(scenario.processes):
            environments.append(dict(group, RANK=str(rank), LOCAL_RANK=str(rank)))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if is_disk_full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, hard))        # the children inherit it
    saving = contextlib.nullcontext()
    if scenario.in_background:
        saving = conftest.saving_in_background()
    children = []
    with saving:
        for rank, environment in enumerate(environments):
            errors = folder / f"errors_{rank}.txt"
            children.append(conftest.start(scenario.script, *flags, errors=errors, session=True,
                                           **environment))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return children


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def wait(children, seconds):
    """Wait until all processes have ended, for at most these seconds. Returns whether they have."""
    deadline = time.time() + seconds
    for child in children:
        child.join(max(0, deadline - time.time()))
    return not any(child.is_alive() for child in children)


def interrupt(children, event, rng):
    """Do to the processes what the event is. Returns whether they ended in time."""
    if event == KILL:
        for child in rng.sample(children, rng.randint(1, len(children))):
            child.kill()
    elif event != FULL_DISK:
        with contextlib.suppress(ProcessLookupError):                  # it has just ended
            os.kill(rng.choice(children).pid, getattr(signal, event))  # one is enough
    has_ended = end_as_torchrun(children)
    for child in children:
        child.kill()
        child.join()
    return has_ended


def end_as_torchrun(children):
    """Wait for processes to end. If one fails, the others are told to, as torchrun does."""
    deadline = time.time() + PATIENCE
    while time.time() < deadline:
        alive = [child for child in children if child.is_alive()]
        if not alive:
            return True
        has_failed = any(child.exitcode for child in children)
        if has_failed and not wait(alive, 2):                          # they may end by themselves
            for child in alive:
                child.terminate()
            return wait(alive, deadline - time.time())
        time.sleep(0.05)
    return False


def survivors(children):
    """Numbers of the processes that these, which have ended, have started and left behind."""
    sessions = {str(child.pid) for child in children}                  # each leads a session
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()       # state ppid pgrp session
        except OSError:                                                # it has just ended
            continue
        if fields[3] in sessions and fields[0] != "Z":
            pids.append(int(stat.parent.name))
    return pids


# ---------------------------------------------------------------------------- results
def is_complete(scenario, folder):
    if scenario.script is sample:
        return (folder / "images").exists()
    return (folder / "last.pt").exists() and conftest.load_last(folder)["step"] == STEPS


def is_equal(scenario, folder, reference):
    """Whether two folders hold the same result: weights to the bit, images to a rounding."""
    if scenario.script is sample:
        images = sorted((folder / "images").iterdir())
        others = sorted((reference / "images").iterdir())
        if [path.name for path in images] != [path.name for path in others]:
            return False
        return all(is_same_image(a, b) for a, b in zip(images, others, strict=True))
    state, other = conftest.load_last(folder), conftest.load_last(reference)
    if "--shard" in scenario.flags:
        state, other = conftest.load_pieces(folder), conftest.load_pieces(reference)
    return conftest.largest_difference(state, other) == 0


def is_same_image(path, other):
    """Whether pixels differ by 1 of 255 at most: images that were missing are drawn in batches of
    other sizes, whose matmuls round in other ways.
    """
    pixels = np.asarray(Image.open(path)).astype(int)
    return np.abs(pixels - np.asarray(Image.open(other))).max() <= 1


def leftovers(folder):
    """Files of a complete run that should not be there."""
    patterns = ("*.tmp", "*.parts", "previous.pt", ".images.lock")
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    return found + sorted(folder.glob("weights_*"))[:-1]               # the last is last.pt's


# ---------------------------------------------------------------------------- the soak
def run_to_the_end(scenario, folder, seconds, rng, counts):
    """Interrupt a run again and again until it is complete.

    seconds: how long the run takes without interruption. counts: Counter of what happens.
    """
    folder.mkdir()
    while not is_complete(scenario, folder):
        event = rng.choice(EVENTS)
        children = start_run(scenario, folder, is_disk_full=event == FULL_DISK)
        if not wait(children, rng.uniform(0.05, 1.2 * seconds)):
            counts[event] += 1
            if not interrupt(children, event, rng):
                counts["hangs"] += 1
        deadline = time.time() + 5
        while survivors(children) and time.time() < deadline:          # workers look once a second
            time.sleep(0.1)
        counts["processes left"] += len(survivors(children))
        tracebacks = [path for path in folder.glob("errors_*.txt")
                      if "Traceback" in path.read_text()]
        counts["tracebacks"] += len(tracebacks)
        for path in tracebacks:
            print(path.read_text()[-3000:], file=sys.stderr)


def soak(names, minutes, seed=0):
    """Run the scenarios in turn. Returns a dict: name of a scenario -> Counter."""
    rng = random.Random(seed)
    results = {name: collections.Counter() for name in names}
    deadline = time.time() + 60 * minutes
    with tempfile.TemporaryDirectory() as temporary:
        references, durations = {}, {}
        while True:
            for number, name in enumerate(names):
                scenario, counts = SCENARIOS[name], results[name]
                reference = Path(temporary) / f"reference_{number}"
                if name not in references:
                    reference.mkdir()
                    begin = time.time()
                    wait(start_run(scenario, reference, is_disk_full=False), 10 * PATIENCE)
                    references[name], durations[name] = reference, time.time() - begin
                folder = Path(temporary) / "run"
                run_to_the_end(scenario, folder, durations[name], rng, counts)
                counts["runs"] += 1
                if not is_equal(scenario, folder, reference):
                    counts["losses"] += 1
                counts["files left"] += len(leftovers(folder))
                shutil.rmtree(folder)
                if time.time() > deadline:
                    return results


COLUMNS = ["runs", *dict.fromkeys(EVENTS), "losses", "hangs", "tracebacks", "processes left",
           "files left"]


def table(results):
    """The results as a table of Markdown."""
    lines = ["| scenario | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    total = collections.Counter()
    for name, counts in results.items():
        lines.append(f"| {name} | " + " | ".join(str(counts[column]) for column in COLUMNS) + " |")
        total += counts
    lines.append("| in all | " + " | ".join(str(total[column]) for column in COLUMNS) + " |")
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=60, help="Time to run for (default: 60).")
    p.add_argument("--seed", type=int, default=0, help="Seed of the moments (default: 0).")
    p.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS),
                   help="Scenarios to run (default: all).")
    args = p.parse_args()
    torch.set_num_threads(1)
    results = soak(args.only, args.minutes, args.seed)
    print(table(results))
    bad = ("losses", "hangs", "tracebacks", "processes left", "files left")
    raise SystemExit(any(counts[column] for counts in results.values() for column in bad))


if __name__ == "__main__":
    main()

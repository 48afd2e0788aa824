"""Shared by all tests: the checkout on sys.path, two threads, no network; two processes of a script."""
import multiprocessing
import os
import socket
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"             # no test may reach for a hub
ROOT = Path(__file__).resolve().parents[1]
SHIPPED = str(ROOT / "assets" / "tiny_dit.safetensors")
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402

import runtime  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def processes():
    runtime.setup()


def work(script, argv, errors, environment):
    os.environ.update(environment)
    if errors:
        sys.stderr = open(errors, "w", buffering=1)
    torch.set_num_threads(1)
    runtime.run(script.main, lambda: script.parse_args(argv))


def start(script, *argv, errors=None, **environment):
    """A script in a process of its own, forked, for the imports take seconds. errors: a file for stderr."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=work, args=(script, [*map(str, argv)], errors, environment))
    child.start()
    return child


def torchrun(script, *argv):
    """A script in two processes, as torchrun starts it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=f"{free.getsockname()[1]}")
    both = [start(script, *argv, RANK=rank, LOCAL_RANK=rank, **where) for rank in "01"]
    [child.join(300) for child in both]
    [child.kill() for child in both if child.is_alive()]                # it waits for the other for ever
    assert [child.exitcode for child in both] == [0, 0]

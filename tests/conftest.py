"""Shared by all tests: the checkout on sys.path, two threads, no network; two processes of a script."""
import importlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"             # no test may reach for a hub
ROOT = Path(__file__).resolve().parents[1]
SHIPPED = str(ROOT / "assets" / "tiny_dit.safetensors")
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)           # for the server of processes
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


def work(rank, port, name, argv):
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", MASTER_ADDR="localhost",
                      MASTER_PORT=f"{port}")
    torch.set_num_threads(1)
    script = importlib.import_module(name)
    runtime.run(script.main, lambda: script.parse_args(argv))


def torchrun(script, *argv):
    """A script in two processes, as torchrun starts it; of a server that has imported everything, once."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_decoder", "train_dit", "train_t2i"])
    args = port, script.__name__, [*map(str, argv)]
    both = [context.Process(target=work, args=(rank, *args)) for rank in (0, 1)]
    [child.start() for child in both]
    [child.join(300) for child in both]
    [child.kill() for child in both if child.is_alive()]                # it waits for the other for ever
    assert [child.exitcode for child in both] == [0, 0]

"""What the tests share: the checkout on sys.path, no network, and ways to run a script."""
import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"             # no test may reach for a hub
os.environ["NANORAE_CACHE"] = ""               # nor write to the user's home
ROOT = Path(__file__).resolve().parents[1]
SHIPPED = str(ROOT / "assets" / "tiny_dit.safetensors")
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402

import runtime  # noqa: E402
import saving  # noqa: E402
import sharding  # noqa: E402
import storage  # noqa: E402

runtime.Heartbeat.SECONDS = 1.0                # processes that have lost others end in seconds


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def settings_of_scripts():
    """The settings of torch that every script makes first, also for tests that run no script."""
    runtime.setup()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """With -m "not shipped", a test that only fails because a shipped model no longer fits the
    changed code is skipped: many take one as an example of a model.
    """
    report = yield
    model = r"(assets/tiny_\w+\.safetensors|the checkpoint)"          # the latter: a packed RAE
    misfit = re.search(rf"{model}(: the \w+)? does not fit", str(report.longrepr))
    if report.failed and misfit and "not shipped" in item.config.getoption("markexpr"):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, "the shipped weights do not fit the changed code")
    return report


# ------------------------------------------------------------------------ scripts in this process
def run_script(script, *argv):
    """Run a script with flags (texts, numbers or paths); returns what its main returns."""
    args = script.parse_args([str(flag) for flag in argv])
    return script.main(args)


def run_on_one_thread(script, *argv):
    """Run a script on one thread, as each process of torchrun does, to compare with it exactly."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_script(script, *argv)
    finally:
        torch.set_num_threads(threads)


def always_in_background(self, *args, **options):
    """Checkpoints.__init__ of a GPU, whose checkpoints a thread writes."""
    construct_checkpoints(self, *args, **dict(options, in_background=True))


construct_checkpoints = saving.Checkpoints.__init__


@contextlib.contextmanager
def saving_in_background():
    """Context in which runs, also those of other processes that start in it, save as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.Checkpoints, "__init__", always_in_background)
        yield


@contextlib.contextmanager
def restored_handlers():
    """Context in which runtime.run() may replace handlers, since it expects the process to end."""
    numbers = [*runtime.stop_signals(), signal.SIGCHLD]
    handlers = {number: signal.getsignal(number) for number in numbers}
    hook = sys.unraisablehook                          # of pytest
    yield
    sys.unraisablehook = hook
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ------------------------------------------------------------------------ other processes
def run_in_child(script, argv, errors, session, environment):
    os.environ.update(environment)
    if session:
        os.setsid()
    if errors:
        sys.stderr = open(errors, "w", buffering=1)    # noqa: SIM115, open as long as the process
    torch.set_num_threads(1)
    runtime.run(script.main, lambda: script.parse_args(argv))


def start(script, *argv, errors=None, session=False, **environment):
    """Start a script in a process of its own and return the process. errors: a file for stderr.

    The process is forked, since imports take seconds. session: whether it leads a session of its
    own, by which the processes that it starts can be found.
    """
    argv = [str(flag) for flag in argv]
    context = multiprocessing.get_context("fork")
    child = context.Process(target=run_in_child, args=(script, argv, errors, session, environment))
    child.start()
    return child


def torchrun(script, *argv):
    """Run a script in two processes, as torchrun does; both must succeed within five minutes."""
    argv = [str(flag) for flag in argv]
    launch(2, script.main, lambda: script.parse_args(argv))


def launch(processes, main, parse_args=lambda: None):
    """Call main(parse_args()) in forked processes of one group; all must succeed within five
    minutes.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = dict(WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    children = []
    context = multiprocessing.get_context("fork")
    for rank in range(processes):
        environment = dict(group, RANK=str(rank), LOCAL_RANK=str(rank))
        child = context.Process(target=run_in_group, args=(environment, main, parse_args))
        child.start()
        children.append(child)
    for child in children:
        child.join(300)
    for child in children:
        if child.is_alive():                           # it may wait forever for another one
            child.kill()
    assert [child.exitcode for child in children] == [0] * processes


def call_in_process(context, function, *args):
    """function(*args), called in one other process of a context of multiprocessing.

    Not a Pool: it ends its process by SIGTERM, which a training loop that was left by an exception
    may still catch.
    """
    with ProcessPoolExecutor(1, context) as executor:
        return executor.submit(function, *args).result(timeout=300)


def run_in_group(environment, main, parse_args):
    os.environ.update(environment)
    torch.set_num_threads(1)
    runtime.run(main, parse_args)


# ------------------------------------------------------------------------ what a run has written
def load_last(folder):
    """The checkpoint of the run in a folder."""
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def load_pieces(folder):
    """All tensors of the last checkpoint of a run with --shard, with the optimizer's moments."""
    weights = sharding.folder_of(Path(folder) / "last.pt")
    state = {name: torch.empty(shape) for name, shape in sharding.read_index(weights).items()}
    sharding.load(state, weights)
    return state


def read_log(folder):
    """The records of the log of the run in a folder."""
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def logged_flops_per_image(folder):
    """FLOPs of the logging process for each image of the batch, which each record of steps in the
    log of the run in a folder implies.
    """
    first, *records = read_log(folder)
    return [record["mfu"] * first["peak_flops"] / record["img_per_s"]
            for record in records if "mfu" in record]


def largest_difference(a, b):
    """Largest difference between any two tensors of two nested states, such as checkpoints.

    Everything else must be equal, but for the flags under "args", which are not compared.
    """
    if isinstance(a, torch.Tensor):
        if a.numel() == 0:
            return 0.0
        return (a.double() - b.double()).abs().max().item()
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        differences = [largest_difference(a[key], b[key]) for key in a if key != "args"]
        return max(differences, default=0.0)
    if isinstance(a, (list, tuple)):
        differences = [largest_difference(x, y) for x, y in zip(a, b, strict=True)]
        return max(differences, default=0.0)
    assert a == b
    return 0.0


def kill_after(script, flags, folder, stop, steps=6):
    """Train in folder/killed, stopped right after it saved step `stop`; returns that checkpoint."""
    saved = []
    original = storage.save_checkpoint

    def save_and_die(path, **state):
        original(path, **state)
        if state["step"] == stop:
            saved.append(torch.load(path, weights_only=True))
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run_script(script, *flags, "--steps", steps, "--out", folder / "killed")
    return saved[0]

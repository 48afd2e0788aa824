"""What every script needs around its loop: processes, signals, precision, seeds, EMA, schedules,
files, checkpoints, FLOPs, logs.

Randomness depends only on (seed, step, number of the micro-batch) and the data only on the step, so
that a resumed run is exact to the bit on CPU, and k processes with one micro-batch each compute
what one process with k micro-batches computes.
"""
import argparse
import contextlib
import ctypes
import errno
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

try:
    import fcntl
except ImportError:                # Windows has no such locks
    fcntl = None


AMPERE = (8, 0)      # capability from which on GPUs compute in bf16 and TF32


def default_dtype():
    """"bf16" where its matmuls are faster than those of fp32: on GPUs from Ampere on (capability
    8.0; a T4 or V100 only emulates it), and on CPUs with AMX or AVX512-BF16. On others, as those
    with AVX2 alone, and on Apple's GPUs "fp32".
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= AMPERE else "fp32"
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        is_supported = getattr(torch.cpu, name, None)  # private: a version may lack it
        if is_supported is not None and is_supported():
            return "bf16"
    return "fp32"


DTYPE = default_dtype()


# ---------------------------------------------------------------------------- processes
def process_rank():
    """Number of this process among those of torchrun, also before setup(); 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """Number of processes, also before setup()."""
    return int(os.environ.get("WORLD_SIZE", 1))


# How long the processes of a run wait for each other. The longest that one works alone is writing a
# checkpoint, a few minutes for 50 GB on a slow disk, or drawing a preview, minutes on a CPU.
PATIENCE = timedelta(minutes=20)


def cores_of_machine():
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):               # on Linux a scheduler may have left out some
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_of_process():
    """This process's part of the CPU cores, at least 1: torchrun starts several on a machine."""
    return max(1, cores_of_machine() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def setup():
    """Join torchrun's process group, if there is one. Returns (rank, world size, device)."""
    rank, world = process_rank(), world_size()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")     # TF32 in fp32 matmuls, as in the release
        backend = "cpu:gloo,cuda:nccl"                 # gloo: for objects gathered on the CPU
        if not dist.is_nccl_available():               # Windows
            backend = "gloo"
    elif torch.backends.mps.is_available() and world == 1:
        device = torch.device("mps")                   # Apple's GPU, which has no process group
        backend = "gloo"
    else:
        device = torch.device("cpu")
        torch.backends.cuda.enable_flash_sdp(False)    # on few tokens plain matmuls are faster
        keep_freed_memory()
        backend = "gloo"
    if world > 1 and not dist.is_initialized():
        check_restarts()
        store, _, _ = next(dist.rendezvous("env://"))  # what torchrun's environment names
        dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                                timeout=PATIENCE)
        heartbeat.start(store)
    return rank, world, device


def check_restarts():
    """Raise ValueError if torchrun would restart the processes with the store that they had before.

    In it they may find the addresses of processes that have ended, as happens with torch 2.14.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(f"torchrun --max_restarts {restarts} needs a new store for each start; "
                         f"set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front of torchrun")


def keep_freed_memory():
    """Ask glibc to keep freed memory, since a training step allocates the same tensors again.

    By default glibc maps and unmaps every large tensor at each step, which costs about a tenth of
    it.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3        # numbers of malloc.h
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def has_own_memory(device):
    """Whether a device copies from the CPU's memory. Apple's GPU shares that."""
    return device.type not in ("cpu", "mps")


def to_device(tensor, device):
    """A tensor of the CPU on the device, without waiting until it is there.

    Python goes on while CUDA copies, if the memory is pinned: the system may not move it. A copy of
    other memory would wait for all that the device has yet to do.
    """
    if not has_own_memory(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def run(main, parse_args):
    """Run a script. What the user can mend ends in one line, without a traceback."""
    for number in stop_signals():
        signal.signal(number, interrupt)
    sys.unraisablehook = interrupt_again
    try:
        main(parse_args())
        heartbeat.sign_off()
        # Not after a failure: it could wait for what the other processes will never send.
        if dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {one_line(error)}") from None
    except KeyboardInterrupt as stop:                  # with a message where something was kept
        if process_rank() > 0:                         # rank 0 says it
            raise SystemExit(1) from None
        raise SystemExit(str(stop) or "stopped; give the command again") from None
    except RuntimeError as error:
        if is_of_another_process(error):
            ignore_stop_signals()                      # torchrun asks to stop while this waits
            cause = str(error).splitlines()[0]
            say_in_handler(f"error: a connection between processes of this run was lost: "
                           f"{heartbeat.describe_silent()} ({cause})")
            heartbeat.let_others_end()
            raise SystemExit(1) from None
        if "not currently implemented for the MPS device" in str(error):
            operator = re.search("'(.*?)'", str(error))[1]
            raise SystemExit(f"error: this version of torch has no {operator} for Apple's GPUs; "
                             f"set PYTORCH_ENABLE_MPS_FALLBACK=1, which leaves it to the CPU, or "
                             f"try a newer version") from None
        raise
    finally:
        ignore_stop_signals()                          # the process is ending anyway
        heartbeat.stop()
        if hasattr(signal, "SIGCHLD"):                 # so are its workers: torch has no complaint
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def is_of_another_process(error):
    """Whether a RuntimeError says that another process of the group can no longer be reached."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def ignore_stop_signals():
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


def one_line(error):
    """The message of an exception; of the operating system's errors with the path in front."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split("\n"))


def all_mean(tensor):
    """Mean of a tensor over all processes; the tensor itself if there is only one."""
    if dist.is_initialized():
        tensor = tensor / dist.get_world_size()        # a copy, since all_reduce works in place
        dist.all_reduce(tensor)
    return tensor


def all_sum(tensor):
    """Sum of a tensor over all processes."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return all_mean(tensor) * world


def gather(value):
    """The values of all processes, as a list in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def all_cores():
    """Context in which torch computes on all cores of the machine: torchrun gives a process one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, cores_of_machine()))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def on_rank_0(compute):
    """What compute() returns on rank 0, on all processes. The others wait for it, and leave it all
    cores. All must call this; a ValueError is raised on all of them.
    """
    if not dist.is_initialized():
        return compute()
    result, problem = None, None
    if process_rank() == 0:
        try:
            with all_cores():
                result = compute()
        except ValueError as error:
            problem = error
    result, problem = gather((result, problem))[0]
    if problem is not None:
        raise problem
    return result


def split_numbers(n, batch, rank=0, world=1):
    """This process's part of the numbers 0..n-1, in batches: a list of ranges."""
    starts = range(rank, n, batch * world)
    return [range(start, min(n, start + batch * world), world) for start in starts]


class Heartbeat:
    """Ends this process, with a line that names the culprit, when another process of the run is
    gone or frozen.

    Otherwise the next collective would wait for that process until it times out. A thread of each
    process counts its beats in the store of the process group, and watches the counts of all. So a
    process may compute for as long as it likes, while one that was killed, stopped or cut off
    from the network falls silent. Silence is counted in beats of the watcher: a run that is
    suspended as a whole, by Ctrl-Z, is not mistaken for a dead one.
    """
    SECONDS = 5.0        # between beats
    LIMIT = 12           # silent beats: C code that holds Python's lock may silence the thread, too
    SUSPECT = 3          # silent beats that are enough if a connection was lost

    def __init__(self):
        self.store = None                              # of all processes; None: there is only one
        self.has_store = True                          # it answers
        self.hosts = []                                # of the ranks
        self.counts = []                               # of the ranks' beats, as the store has them
        self.silence = []                              # of the ranks, in beats of this process
        self.is_over = threading.Event()
        self.thread = None

    def start(self, store):
        """Begin, in all processes together. store: that of the process group."""
        # A connection of its own: on that of the group, collectives may wait for minutes.
        self.store = dist.PrefixStore("heartbeat", store.clone())
        self.store.add(str(process_rank()), 1)
        self.hosts = gather(platform.node())           # from now on every rank has a count
        self.counts, self.silence = [None] * len(self.hosts), [0] * len(self.hosts)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        """What the thread does."""
        while not self.is_over.wait(self.SECONDS):
            unanswered = threading.Timer(self.LIMIT * self.SECONDS, self.end_without_store)
            unanswered.daemon = True
            unanswered.start()
            try:
                self.beat()
            except dist.DistError:                     # the store is gone: the timer will say it,
                self.has_store = False                 # unless this process ends before, too
                return
            unanswered.cancel()
            if max(self.silence) > self.LIMIT:
                self.end_process()

    def beat(self):
        """Count a beat of this process, and the silent beats of all."""
        self.store.add(str(process_rank()), 1)
        counts = self.store.multi_get([str(rank) for rank in range(len(self.hosts))])
        for rank, count in enumerate(counts):
            is_silent = count == self.counts[rank] and count != b"ended"
            self.silence[rank] = self.silence[rank] + 1 if is_silent else 0
        self.counts = counts

    def describe(self, beats):
        """Name the ranks that have been silent for so many beats, in a sentence."""
        seconds = f"{beats * self.SECONDS:.0f} s"
        causes = "killed, failed, frozen or cut off; its last lines may say why"
        if not self.has_store:
            return (f"rank 0 on {self.hosts[0]}, or the torchrun there, has not answered for "
                    f"{seconds}: {causes}")
        names = []
        for rank, silence in enumerate(self.silence):
            if silence >= beats:
                names.append(f"rank {rank} on {self.hosts[rank]}")
        if not names:
            return "the last lines of the others may say why"
        return f"no sign of life for {seconds} from {', '.join(names)}: {causes}"

    def describe_silent(self):
        """Wait until processes that have ended just now must have fallen silent, and name them."""
        if self.store is None:
            return ("they did not find each other; between nodes, GLOO_SOCKET_IFNAME must name the "
                    "network interface")
        time.sleep((self.SUSPECT + 1) * self.SECONDS)
        return self.describe(self.SUSPECT)

    def let_others_end(self):
        """Rank 0, which may hold the store, ends last, so that the others can still look at it."""
        if process_rank() == 0:
            time.sleep(3 * self.SECONDS)

    def end_without_store(self):
        """Called by a timer when the store has not answered for the time of the limit."""
        self.has_store = False
        self.end_process()

    def end_process(self):
        """Called in a thread, since the main thread may wait in a collective that never ends."""
        say_in_handler(f"error: {self.describe(self.LIMIT)}; rank {process_rank()} ends, since it "
                       f"cannot go on alone")
        self.let_others_end()
        os._exit(1)

    def sign_off(self):
        """Say that this process has done its work, and will be silent. Others may still work."""
        if self.store is None:
            return
        self.stop()
        self.thread.join(self.SECONDS)                 # a beat more would count up from "ended"
        with contextlib.suppress(RuntimeError):        # rank 0, and the store with it, has ended
            self.store.set(str(process_rank()), "ended")

    def stop(self):
        self.is_over.set()


heartbeat = Heartbeat()                                # of this process


# ---------------------------------------------------------------------------- signals
def stop_signals():
    """Ctrl-C, and what schedulers send before they end a job."""
    names = ["SIGINT", "SIGTERM", "SIGUSR1"]
    return [getattr(signal, name) for name in names if hasattr(signal, name)]   # not on Windows


def interrupt(number, frame):
    """Handler outside of training loops: stop at once, as Ctrl-C does by default."""
    if time.monotonic() - stop_request.time > stop_request.TOGETHER:   # else it ended the loop
        raise KeyboardInterrupt


def interrupt_again(dropped):
    """Hook for exceptions that Python drops in certain moments, such as a fork: an interrupt comes
    again a moment later, the others are printed.
    """
    is_interrupt = isinstance(dropped.exc_value, KeyboardInterrupt)
    if is_interrupt and hasattr(signal, "pthread_kill"):          # not on Windows
        main_thread = threading.main_thread().ident
        threading.Timer(0.1, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(dropped)


class StopRequest:
    """Lets a training loop end a step, and write a checkpoint, when a signal asks it to stop.

        for step in stop_request.catching(steps):
            ...
            if stop_request.was_made():
                save()
                break

    A second signal ends the process at once.
    """
    TOGETHER = 1.0       # seconds within which signals are one: torchrun passes on what it receives

    def __init__(self):
        self.name = None                               # of the signal
        self.time = -math.inf                          # at which it came

    def catching(self, steps):
        """Yield the steps; while they last, signals are noted, and do not interrupt."""
        previous = {}
        if threading.current_thread() is threading.main_thread():      # no other can catch signals
            previous = {number: signal.signal(number, self.note) for number in stop_signals()}
        try:
            yield from steps
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.name = None

    def note(self, number, frame):
        """Handler within loops."""
        if self.name is None:
            self.name, self.time = signal.Signals(number).name, time.monotonic()
            if process_rank() == 0:
                say_in_handler(f"{self.name}: stopping after this step; once more to stop at once")
        elif time.monotonic() - self.time > self.TOGETHER:
            say_in_handler("stopped at once, without a checkpoint of this step")
            os._exit(128 + number)                     # as shells report a signal

    def was_made(self):
        """Whether any process was asked to stop, which all processes must ask together."""
        is_asked = torch.tensor(float(self.name is not None))
        return bool(all_sum(is_asked) > 0)


stop_request = StopRequest()                           # of this process


def say_in_handler(line):
    """Write a line to stderr, past Python's buffers, which a handler may not enter again."""
    with contextlib.suppress(OSError):                 # the terminal may be gone
        os.write(2, f"\n{line}\n".encode())


# ---------------------------------------------------------------------------- training steps
def autocast(device, dtype):
    """Context in which matmuls run in bf16 if dtype is "bf16", and in fp32 otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def uses_tf32(device):
    """Whether fp32 matmuls run as TF32 on a device, with 10 bits of mantissa in place of 23."""
    if device.type != "cuda" or torch.get_float32_matmul_precision() == "highest":
        return False
    return torch.cuda.get_device_capability(device) >= AMPERE


@contextlib.contextmanager
def full_precision():
    """Context in which fp32 matmuls and convolutions are not TF32: where numbers are compared with
    those of others, and where nearly equal ones are subtracted. It is for forward passes.
    """
    of_matmuls = torch.get_float32_matmul_precision()
    of_convolutions = torch.backends.cudnn.allow_tf32      # torch's default is TF32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(of_matmuls)
        torch.backends.cudnn.allow_tf32 = of_convolutions


# Attributes of networks that hold a list of like blocks.
BLOCKS = ("blocks", "layers", "decoder_layers", "heads")


def compile_blocks(network, backend="inductor"):
    """Compile the blocks inside a network, which happens when each kind of them first runs.

    Like blocks share a graph, so that this takes as long for 28 of them as for one. What is between
    them takes little time, and is left as it is.
    To be called before DDP or FSDP wraps the network. backend: of torch.compile.
    """
    # Else each graph would be cut where one of DDP's buckets is full, in the middle of a block.
    torch._dynamo.config.optimize_ddp = False
    # Graphs of a class: of every width, with gradients and without, of other batches. Beyond this
    # number torch goes on without compiling; its default of 8 is for one function.
    torch._dynamo.config.recompile_limit = 64
    for name, blocks in network.named_modules():
        if name.rpartition(".")[2] in BLOCKS:
            for block in blocks:
                block.compile(backend=backend)


def data_parallel(model):
    """The model in DistributedDataParallel, whose buffers are constants: they are not synced.

    Gradients lie in DDP's buckets, so that they take memory once.
    """
    # Of a 1 x 1 convolution, whose strides are ambiguous: it costs a copy of one small kernel.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    options = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers"                      # its name from torch 2.14 on
    if name not in options:
        name = "broadcast_buffers"
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{name: False})


def sync_gradients(model, now):
    """Context of a forward and backward pass: DDP averages gradients over processes if `now`.

    That is needed once a step, in its last micro-batch.
    """
    if now or not hasattr(model, "no_sync"):           # no DDP
        return contextlib.nullcontext()
    return model.no_sync()


def seed_step(seed, step, micro):
    """Seed torch for one micro-batch, whichever process computes it."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + micro)    # primes keep near triples apart


def lr_factor(step, warmup, decay_start, decay_end, final, shape="linear"):
    """Learning rate at a step as a fraction of its peak.

    It rises linearly over `warmup` steps, stays at 1 until `decay_start`, and falls to `final` at
    `decay_end`, along a line or, with shape="cosine", half a cosine.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - decay_start) / max(1, decay_end - decay_start)
    progress = min(1.0, max(0.0, progress))
    if shape == "cosine":
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return 1 + (final - 1) * progress


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay * ema + (1 - decay) * model, in place.

    The decay is at most (1 + step) / (10 + step), so that the average forgets the initialisation.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def optimizer_step(optimizers, model, clip, lr):
    """Clip the gradients, update the weights unless a gradient is not finite, zero the gradients.

    optimizers: on a GPU AdamW(fused=True), or others that leave everything as it is if their
    attribute found_inf is 1. It is a scalar there, so that Python need not wait for the gradients.
    clip: largest norm of all gradients together; 0: no clipping.
    lr: learning rate of every parameter group, times the group's own "lr_scale" if it has one.
    Returns the norm of the gradients before clipping, a scalar on the device. All processes do the
    same, since their gradients are averaged already.
    """
    max_norm = clip if clip > 0 else math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if hasattr(grad_norm, "full_tensor"):              # FSDP: each process holds a shard
        grad_norm = grad_norm.full_tensor()
    is_left_out = ~grad_norm.isfinite()
    # On a CPU Python need not wait for it, and on Apple's GPUs AdamW does not read found_inf.
    is_skipped = not has_own_memory(grad_norm.device) and bool(is_left_out)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if has_own_memory(grad_norm.device):
            optimizer.found_inf = is_left_out.float()
        if not is_skipped:
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return grad_norm


class MeanByGroup:
    """Means of a value by group, for the log: by interval of t, by class, by source of the data."""
    def __init__(self, groups, device):
        self.sums = torch.zeros(groups, device=device)
        self.counts = torch.zeros(groups, device=device)

    def add(self, group, value, weight=None):
        """Add values b of groups b (int64); values of weight 0 do not count."""
        if weight is None:
            weight = torch.ones_like(value)
        self.sums.index_add_(0, group, value.detach() * weight)
        self.counts.index_add_(0, group, weight)

    def means(self):
        """Mean of all, and of each group (None without a value), then reset to zero.

        They are means over processes, all of which must call this.
        """
        sums, counts = all_mean(self.sums), all_mean(self.counts)
        mean = float(sums.sum() / counts.sum().clamp(min=1e-9))
        group_means = []
        for group_sum, count in zip(sums.tolist(), counts.tolist(), strict=True):
            group_means.append(group_sum / count if count > 0 else None)
        self.sums.zero_()
        self.counts.zero_()
        return mean, group_means


class LossByTime(MeanByGroup):
    """Mean loss in ten equal intervals of t, the cheapest diagnostic of a diffusion model."""
    INTERVALS = 10

    def __init__(self, device):
        super().__init__(self.INTERVALS, device)

    def add(self, t, loss, weight=None):
        """Add losses b at times t b in [0,1]."""
        interval = (t * self.INTERVALS).long().clamp(max=self.INTERVALS - 1)   # b
        super().add(interval, loss, weight)


# ---------------------------------------------------------------------------- files
@contextlib.contextmanager
def fetching(what, advice):
    """Turn what a failing download raises inside the block into a FileNotFoundError with advice."""
    try:
        yield
    except Exception as error:             # the hub, http, ssl and files each raise their own kinds
        cause = type(error).__name__
        raise FileNotFoundError(f"{what}: no download ({cause}); {advice}") from error


def fetch_hub(repository, patterns):
    """Folder with those files of a repository on huggingface.co that fit `patterns`, downloaded
    once.

    Without a network it fails at once. The functions that fetch a single file, which timm and
    diffusers use, try again for 50 seconds; where this came first, they find the file.
    """
    return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))


def write_whole(path, write):
    """Write a file that is there whole or not at all, and its folder, if that is not there.

    write: function of an open file. It writes to a temporary name, which is flushed and renamed.
    Raises OSError that names the path; a file of before is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch.save hides the error of a full disk behind a RuntimeError of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"{path} could not be written: {cause.strerror or cause}") from None
    except BaseException:                              # such as Ctrl-C
        temporary.unlink(missing_ok=True)
        raise


def append_whole(path, text):
    """Append text to a file, all of it or nothing. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(text)
    except OSError:                                    # a full disk may have taken half of it
        if path.exists():
            os.truncate(path, size)
        raise


def to_json(record):
    """A record as a line of strict JSON: null stands for nan and the infinities."""
    return json.dumps(without_nan(record), allow_nan=False)


def without_nan(value):
    """The same value of dicts, lists and plain types, with None for floats that are not finite."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Lock:
    """The right to write to a path, which only one process has, until it ends or releases it.

    The lock is a file that the operating system locks for this process, not for its children, and
    unlocks when the process ends, however it ends. There are no locks on Windows, nor on file
    systems that have none. Raises ValueError if another process has the lock.
    """
    def __init__(self, path, what):
        self.path = Path(path)
        self.file = None
        if fcntl is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while self.file is None or not self.is_current():      # the owner may have removed its file
            self.file = open(self.path, "a")                   # noqa: SIM115, open while it is held
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise ValueError(f"another process is writing to {what}; wait for it, or name "
                                     f"another --out") from None
                return                                         # no locks here

    def is_current(self):
        """Whether the locked file is still the one at the path."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            return False

    def release(self):
        """Remove the file, then give up the lock."""
        if self.file is not None:
            self.path.unlink(missing_ok=True)
            self.file.close()
            self.file = None


def lock_file(path):
    """The file that locks an output file X: .X.lock beside it."""
    return Path(path).with_name(f".{Path(path).name}.lock")


def lock(path, is_folder=False):
    """Lock an output: a folder, by OUT/.lock, or a file X, by .X.lock beside it. Returns a Lock.

    Only rank 0 takes the lock, but all processes must call this, and all raise ValueError if
    another run has it.
    """
    file = Path(path) / ".lock" if is_folder else lock_file(path)
    taken, problem = None, None
    if process_rank() == 0:
        try:
            taken = Lock(file, Path(path))
        except (ValueError, OSError) as error:
            problem = one_line(error)
    problem = gather(problem)[0]
    if problem:
        raise ValueError(problem)
    return taken


@contextlib.contextmanager
def locked(path):
    """Context in which an output file, or a folder that is yet to be made, is locked by lock()."""
    taken = lock(path)
    try:
        yield
    finally:
        if taken is not None:                          # of rank 0
            taken.release()


def check_shared(path):
    """Raise ValueError unless all processes see the lock that rank 0 has on a file: its disk must
    be shared where all of them write what rank 0 reads.
    """
    file = lock_file(path)
    sees_lock = gather((platform.node(), file.exists()))
    for host, is_seen in sees_lock:
        if sees_lock[0][1] and not is_seen:            # rank 0 has no lock on Windows
            raise ValueError(f"{path} is not on a disk that {host} shares with "
                             f"{sees_lock[0][0]}, whose process puts the files of all together; "
                             f"name an --out on a shared disk")


def check_out(path, flag="--out"):
    """Raise ValueError if a path that is to be written was left empty, or cannot be written to."""
    if not str(path).strip():
        raise ValueError(f"{flag} is empty, perhaps a variable that is not set; name a path")
    ancestor = Path(path).absolute()
    while not ancestor.exists() and ancestor != ancestor.parent:       # a drive may be missing
        ancestor = ancestor.parent
    if not ancestor.exists():
        raise ValueError(f"{flag} {path} cannot be written: there is no {ancestor}")
    is_folder = ancestor.is_dir()
    if ancestor != Path(path).absolute() and not is_folder:
        raise ValueError(f"{flag} {path} cannot be written: {ancestor} is a file, not a folder")
    if not is_folder and not ancestor.is_file():       # it would be replaced by a file
        raise ValueError(f"{flag} {path} is a pipe or a device; name a file or a folder")
    folder = ancestor if is_folder else ancestor.parent                # where a temporary file goes
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{flag} {path} cannot be written: no permission for {folder}")


def check_suffix(path, suffixes, flag="--out"):
    """Raise ValueError unless a path ends in one of the suffixes; "" among them is a folder's."""
    if Path(path).suffix.lower() in suffixes:
        return
    files = " ".join(suffix for suffix in suffixes if suffix)
    or_folder = ", or a folder, which has no suffix" if "" in suffixes else ""
    raise ValueError(f"{flag} {path} can't be written in the format of its suffix; use one of "
                     f"{files}{or_folder}")


def save_checkpoint(path, **state):
    """Write a checkpoint of tensors and plain types as one file. Raises OSError."""
    write_whole(path, lambda f: torch.save(state, f))


def load_checkpoint(path):
    """The dict of a checkpoint, on the CPU, from a file of torch.save or our .safetensors.

    Raises FileNotFoundError; ValueError if the file cannot be read safely.
    """
    if Path(path).is_dir():
        raise FileNotFoundError(f"{path} is a folder; name the checkpoint in it, such as "
                                f"{Path(path) / 'last.pt'}")
    if not Path(path).is_file():
        if Path(path).exists():
            raise ValueError(f"{path} is a pipe or a device; name a file")
        raise FileNotFoundError(f"file {path} does not exist; check the path, or copy or train it "
                                f"first")
    try:
        if Path(path).suffix == ".safetensors":
            state = read_nested_safetensors(path)
        else:
            # Windows cannot replace a file that is mapped, as a resumed run will.
            is_mapped = zipfile.is_zipfile(path) and sys.platform != "win32"
            state = torch.load(path, "cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:             # pickle, zip and safetensors raise a dozen kinds
        raise ValueError(f"{path} is no checkpoint that can be read safely: another kind of file, "
                         f"cut short, or with code in it ({type(error).__name__}); copy or train "
                         f"it again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no checkpoint, as it holds a {type(state).__name__} and no "
                         f"dict; copy or train it again")
    return state


def read_nested_safetensors(path):
    """Nested dicts from a flat file: "rae/decoder/x.weight" becomes
    state["rae"]["decoder"]["x.weight"].

    Plain values stand as JSON in the metadata under "plain"; tensors are stored in half precision.
    """
    with safe_open(path, "pt") as f:
        metadata = f.metadata() or {}
        state = json.loads(metadata.get("plain", "{}"))
        for key in f.keys():                           # noqa: SIM118, safe_open is no dict
            *parents, leaf = key.split("/")
            node = state
            for parent in parents:
                node = node.setdefault(parent, {})
            tensor = f.get_tensor(key)
            node[leaf] = tensor.float() if tensor.is_floating_point() else tensor
    return state


def git_commit():
    """Short hash of the commit that is checked out, or "unknown" without a repository or git."""
    folder = Path(__file__).resolve().parent
    result = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=folder,
                            text=True, capture_output=True)
    return result.stdout.strip() or "unknown"


# ---------------------------------------------------------------------------- flags of a run
def at_least(low, below=math.inf):
    """A type for argparse: a number of the type of `low`, in [low, below)."""
    def number(text):
        value = type(low)(text)
        if not low <= value < below:
            limit = f" and below {below}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}{limit}")
        return value
    return number


def shown_default(value):
    """A flag's default as --help shows it."""
    if value is None or value == []:
        return "none"
    if value is False:
        return "off"
    values = value if isinstance(value, list) else [value]
    return " ".join(f"{part:g}" if isinstance(part, float) else f"{part}" for part in values)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser for flags that default to None, so that one can tell which were given.

    description: docstring of the script. defaults: dict of what the script's resolve() fills in for
    flags that were not given; --help shows these values.
    """
    def __init__(self, description, defaults):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.shown_defaults = defaults

    def format_help(self):
        """The text of --help. A flag whose help says nothing of a default gets "(default: ...)"."""
        for action in self._actions:
            if not action.option_strings or "default" in action.help.lower():
                continue
            value = self.shown_defaults.get(action.dest, action.default)
            if action.dest != "help":
                shown = shown_default(value).replace("%", "%%")
                action.help = action.help.removesuffix(".") + f" (default: {shown})."
        return super().format_help()

    def error(self, message):
        """End the script with a line. The usage would be 30 more, above it."""
        self.exit(2, f"{self.prog}: error: {message} (--help: all flags)\n")

    def check_values(self, values, source):
        """Raise ValueError unless a dict from a file has values that the flags can have.

        source: the file. Unknown names are passed over: a flag may be gone today.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{source} has no flags under args; start another run")
        for action in self._actions:
            value = values.get(action.dest)
            if value is None and self.shown_defaults.get(action.dest) is None:
                continue                               # not given, or newer than the file
            if value is None and action.dest not in values:
                continue
            parts = value if isinstance(value, list) and action.nargs is not None else [value]
            if not all(self.can_be(action, part) for part in parts):
                raise ValueError(f"{source} has --{action.dest} {value!r}, which the flag cannot "
                                 f"be; start another run")

    def can_be(self, action, value):
        """Whether a value is one that a flag's text would give."""
        if action.nargs == 0:                          # a switch
            return isinstance(value, bool)
        try:
            parsed = self._get_value(action, str(value))
            self._check_value(action, parsed)
        except argparse.ArgumentError:
            return False
        return parsed == value and not isinstance(value, bool)

    def parse_args(self, args=None, namespace=None):
        """As of argparse, but an empty word is an error: most often a variable that is not set."""
        words = sys.argv[1:] if args is None else args
        for i, word in enumerate(words):
            if not word.strip() or re.fullmatch(r"--\w+=\s*", word):
                flag = words[i - 1] if i > 0 and not word.strip() else word
                self.error(f"{flag} is given an empty text, perhaps a variable that is not set; "
                           f"leave the flag out, or set the variable")
        return super().parse_args(args, namespace)

    def parse(self, argv, resolve, check):
        """Parse argv (None: the command line), fill in the flags, and check them.

        resolve: args -> a copy in which every flag has its value. check: args -> None.
        What they raise for the user's mistakes ends the script with a line.
        """
        args = self.parse_args(argv)
        try:
            args = resolve(with_resume(args, self.shown_defaults))
            check(args)
        except (ValueError, FileNotFoundError) as error:
            self.error(str(error))
        return args


def default_workers():
    """Loader processes of each process: where a GPU computes, its part of the cores, at most 12; on
    CPUs, whose cores compute, 1.
    """
    if not torch.cuda.is_available():
        return 1
    return min(12, cores_of_process())


RUN_DEFAULTS = dict(seed=0, workers=default_workers(), batch=64, micro_batch=None, dtype=DTYPE,
                    resume=False, auto_resume=False, overwrite=False, wandb=None)


def add_run_flags(p):
    """The flags of a run and its optimizer, which all training scripts share."""
    p.add_argument("--out", help="Folder that the run writes to.")
    p.add_argument("--seed", type=at_least(0), help="Seed of weights, data order and noise.")
    p.add_argument("--workers", type=at_least(0),
                   help="Data loader processes for each process (default: 1; with a GPU its part "
                        "of the machine's cores, at most 12).")
    p.add_argument("--batch", type=at_least(1),
                   help="Images per optimizer step, over all processes.")
    p.add_argument("--micro_batch", type=at_least(1),
                   help="Images per process and forward pass, to be lowered if memory runs out "
                        "(default: batch / processes).")
    p.add_argument("--steps", type=at_least(1), help="Optimizer steps in all.")
    p.add_argument("--lr", type=at_least(1e-9), help="Peak learning rate.")
    p.add_argument("--lr_end", type=at_least(0.0, 1 + 1e-9),
                   help="Final learning rate as a fraction of its peak.")
    p.add_argument("--warmup", type=at_least(0),
                   help="Steps of linear warm-up (default: 100, or a tenth of a shorter run).")
    p.add_argument("--weight_decay", type=at_least(0.0), help="Weight decay.")
    p.add_argument("--clip", type=at_least(0.0), help="Largest norm of the gradients; 0: any.")
    p.add_argument("--ema", type=at_least(0.0, 1),
                   help="Decay per step of the average of the weights, below 1.")
    p.add_argument("--dtype", choices=("bf16", "fp32"),
                   help="Precision of matmuls: bf16 where the machine is fast at it.")
    p.add_argument("--log_every", type=at_least(1),
                   help="Steps between lines of the log: loss, gradient, images/s, MFU, memory.")
    p.add_argument("--save_every", type=at_least(1),
                   help="Steps between checkpoints; the last step is always saved.")
    p.add_argument("--preview_every", type=at_least(0), help="Steps between pictures; 0: none.")
    p.add_argument("--resume", action="store_true", default=None,
                   help="Go on from OUT/last.pt. Flags that are not given keep their values.")
    p.add_argument("--auto_resume", action="store_true", default=None,
                   help="Go on from OUT/last.pt if it is there, else start: for jobs that are "
                        "started again by the same command (torchrun --max_restarts, queues).")
    p.add_argument("--overwrite", action="store_true", default=None,
                   help="Start anew although OUT/last.pt exists.")
    p.add_argument("--wandb", metavar="PROJECT",
                   help="Project of Weights & Biases to log to as well (pip install wandb).")


def with_resume(args, defaults):
    """A copy of args in which --auto_resume has become --resume, if there is a checkpoint."""
    values = vars(args)
    if values.get("auto_resume"):
        out = Path(values["out"] or defaults["out"])
        values = dict(values, resume=values["resume"] or (out / "last.pt").exists())
    return argparse.Namespace(**values)


def given_flags(args):
    """The flags that were given on the command line, as a dict."""
    return {name: value for name, value in vars(args).items() if value is not None}


def flags_as_dict(args):
    """All flags as a dict that JSON can hold."""
    return json.loads(json.dumps(vars(args), default=str))


# Flags that a checkpoint's run does not hand on to the command that resumes it.
OF_COMMAND = ("out", "resume", "auto_resume", "overwrite")


def flags_of_run(out, script, key, parser):
    """The flags in OUT/last.pt, for --resume, as a dict.

    script, key: the script whose checkpoint it must be, and a key that only these have. parser: of
    its flags. Raises ValueError if there is no such checkpoint, or its flags are malformed.
    """
    path = Path(out) / "last.pt"
    if not path.exists():
        raise ValueError(f"--resume needs {path}, which does not exist on {platform.node()}; leave "
                         f"the flag out to start a run (of several nodes, all read this file)")
    state = load_checkpoint(path)
    if "args" not in state or key not in state:
        raise ValueError(f"{path} is no checkpoint of {script}; name the --out of one of its runs")
    parser.check_values(state["args"], path)
    flags = dict(state["args"])
    for name in OF_COMMAND:
        flags.pop(name, None)
    # Older checkpoints of x0-prediction were trained with another weight of the loss by time.
    if flags.pop("balance", None) is not None and flags.get("prediction") == "x0":
        raise ValueError(f"{path} was trained with another weight of the loss by time (--balance), "
                         f"which no longer exists; start from its weights with --init {path}")
    if flags.get("decay_end") == flags["steps"]:       # a schedule follows --steps if it is raised
        del flags["decay_end"]
    if flags["batch"] % (flags["micro_batch"] * world_size()):
        # There are more processes now. Another split of the batch draws other noise.
        flags["micro_batch"] = default_micro_batch(flags["batch"])
    return flags


def check_unchanged(args, stored, fixed):
    """Raise ValueError if a given flag of `fixed` differs from the stored flags of the resumed
    run.
    """
    given = flags_as_dict(args)
    for name in fixed:
        if given.get(name) is None:
            continue
        # A flag that is newer than the checkpoint was off when it was written.
        if given[name] != stored.get(name) and (name in stored or given[name]):
            was = stored.get(name)
            if isinstance(was, list):
                was = shlex.join(map(str, was))
            advice = "resume without it" if was is None else f"resume with --{name} {was}"
            raise ValueError(f"--{name} {given[name]} differs from the checkpoint's {was}; "
                             f"{advice}")


def check_same_run(args, resumed, data):
    """Raise ValueError unless all processes have the same flags and images, and go on from the same
    step: on several nodes the command is given several times, and the disks may differ.

    resumed: the checkpoint, or None. data: ImageData.identity().
    """
    flags = flags_as_dict(args)
    flags.pop("workers")                               # may follow the cores of a node
    step = resumed["step"] if resumed else 0
    of_ranks = gather((platform.node(), step, flags, data))
    first_host, first_step, first_flags, first_data = of_ranks[0]
    for rank, (host, step, flags, data) in enumerate(of_ranks):
        name, first = f"rank {rank} on {host}", f"rank 0 on {first_host}"
        if step != first_step:
            raise ValueError(f"{name} would go on from step {step} and {first} from {first_step}; "
                             f"all nodes read {args.out}/last.pt: share its disk, or copy it")
        for flag, value in flags.items():
            if value != first_flags.get(flag):
                raise ValueError(f"{name} has --{flag} {value} and {first} "
                                 f"{first_flags.get(flag)}; give all nodes the same command")
        if data != first_data:
            raise ValueError(f"{name} has other images in --data than {first}; share the disk, or "
                             f"copy the images once more")


def default_warmup(steps):
    """Steps of warm-up: 100, or a tenth of a run of less than 1000 steps."""
    return min(100, steps // 10)


def default_micro_batch(batch):
    """Micro-batch that needs no accumulation: the images of one process."""
    return max(1, batch // world_size())


def check_run_flags(args):
    """Raise ValueError for flags of a run that contradict each other or the files that are
    there.
    """
    check_out(args.out)
    if Path(args.out).is_file():
        raise ValueError(f"--out {args.out} is a file; name a folder")
    world = world_size()
    unit = args.micro_batch * world
    if args.batch % unit:
        nearest = max(1, round(args.batch / unit)) * unit
        raise ValueError(f"--batch {args.batch} must be a multiple of --micro_batch "
                         f"{args.micro_batch} x {world} processes; try --batch {nearest}")
    goes_on = args.resume or args.auto_resume
    if goes_on and args.overwrite:
        flag = "--auto_resume" if args.auto_resume else "--resume"
        raise ValueError(f"{flag} goes on with a run and --overwrite starts anew; give one of them")
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts > 0 and not goes_on:
        raise ValueError(f"torchrun --max_restarts {restarts} gives this command again when a "
                         f"process fails; add --auto_resume, so that it then goes on from "
                         f"{args.out}/last.pt")
    if args.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"--wandb {args.wandb} needs a package: pip install wandb")
    last = Path(args.out) / "last.pt"
    if args.init and not args.resume and Path(args.init).resolve() == last.resolve():
        raise ValueError(f"--init {args.init} is what this run would write; name another --out")
    if last.exists() and not args.resume and not args.overwrite:
        raise ValueError(f"{last} exists; add --resume to go on, --overwrite to start anew, or "
                         f"name another --out")


def load_resumable(args):
    """The checkpoint OUT/last.pt of --resume. Raises ValueError if its run is complete."""
    path = Path(args.out) / "last.pt"
    state = load_checkpoint(path)
    if type(state.get("step")) is not int:
        raise ValueError(f"{path} has step {state.get('step')!r}, not a number; start another run")
    if not isinstance(state.get("opt"), (dict, list)):
        raise ValueError(f"{path} has no optimizer; start another run from its weights by --init")
    if state["step"] >= args.steps:
        raise ValueError(f"{args.out} has done {state['step']} steps; raise --steps {args.steps} "
                         f"to go on")
    return state


def load_optimizer(optimizer, state):
    """Load the moments of an optimizer from a checkpoint; rates and the like stay as the flags set
    them. Raises ValueError if the moments are of other weights, or not finite.
    """
    groups = optimizer.state_dict()["param_groups"]
    try:
        optimizer.load_state_dict(dict(state=state["state"], param_groups=groups))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint's optimizer does not fit ({error}); start another run "
                         f"from its weights by --init") from error
    names = {"momentum_buffer"}                        # of Muon
    if isinstance(optimizer, torch.optim.AdamW):
        names = ADAM_MOMENTS
    shapes = {parameter: parameter.shape for parameter in optimizer.state}
    check_moments(optimizer.state, shapes, names)


ADAM_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


def check_moments(states, shapes, names):
    """Raise ValueError unless the moments of all parameters have their shapes and are finite.

    states: parameter or its name -> moments. shapes: of the parameters. names: of the moments.
    """
    for parameter, moments in states.items():
        is_right = parameter in shapes and moments.keys() == names
        for name, moment in moments.items():
            is_tensor = isinstance(moment, torch.Tensor)
            fits = is_tensor and (name == "step" or moment.shape == shapes.get(parameter))
            is_right = is_right and fits and bool(moment.isfinite().all())
        if not is_right:
            raise ValueError("the checkpoint's optimizer has moments of other weights, or that are "
                             "not finite; start another run from its weights by --init")


# What never happens in a run that ends before the step of a flag.
EFFECTS = {"warmup": "the learning rate rises to the end",
           "llm_start": "prompts never condition the DiT, and the model will not follow them"}


def warn_of_flags(log, args, resumed):
    """Warn if the run ends before something that its flags set for a later step, or if it goes on
    with other noise than one process would. resumed: the checkpoint, or None.
    """
    if resumed and resumed["args"]["micro_batch"] != args.micro_batch:
        log.warn(f"with {world_size()} processes --micro_batch {resumed['args']['micro_batch']} "
                 f"becomes {args.micro_batch}, so that the noise differs from here on")
    for name, effect in EFFECTS.items():
        step = getattr(args, name, 0)
        if step >= args.steps:
            log.warn(f"--{name} {step} is not below --steps {args.steps}: {effect}")


def describe_change(resumed, current, hold_out):
    """Describe what changed in the data of a resumed run since its checkpoint, or return None.

    resumed: the checkpoint; None: it is a new run. current: ImageData.identity().
    Raises ValueError if images were held out, since others would be now: a change reorders them.
    """
    stored = resumed.get("data") if resumed else None
    if stored is None or stored == current:            # older checkpoints do not say
        return None
    changes = []
    for name in sorted(stored.keys() | current.keys()):
        then, now = stored.get(name), current.get(name)
        source = f"source {name} of --data" if name else "--data"
        if then is None or now is None:
            changes.append(f"{source} was not there" if then is None else f"{source} is gone")
        elif then["images"] != now["images"]:
            changes.append(f"{source} had {then['images']} images and has {now['images']}")
        elif then != now:
            changes.append(f"{source} has other names or labels for its {now['images']} images")
    change = "the data changed since the checkpoint: " + ", ".join(changes)
    if hold_out > 0:
        raise ValueError(f"{change}; images that --hold_out {hold_out} kept for evaluation would "
                         f"move into training; bring the images back, or start another run")
    return f"{change}; the run goes on with them, in another order"


class Updates:
    """Which of the last updates were left out, as their gradients were not finite.

    A run recovers from one. But IN_A_ROW of them, or half of the RECENT ones, mean that the weights
    are spoilt: the last update that was not left out did it.
    """
    IN_A_ROW = 20
    RECENT = 200

    def __init__(self):
        self.recent = deque(maxlen=self.RECENT)        # True: that update was left out
        self.left_out = 0                              # in a row, up to now

    def add(self, grad_norm):
        """Note the norm of the gradients of a step, a float; infinite or nan: it was left out."""
        is_left_out = not math.isfinite(grad_norm)
        self.recent.append(is_left_out)
        self.left_out = self.left_out + 1 if is_left_out else 0

    def have_diverged(self):
        return self.left_out >= self.IN_A_ROW or sum(self.recent) >= self.RECENT // 2


def first_not_finite(named_tensors):
    """Name of the first of (name, tensor) pairs that is not finite, or None: one wait for a GPU."""
    if not named_tensors:                              # the weights lie elsewhere, see sharding.py
        return None
    are_finite = torch.stack([tensor.isfinite().all() for _, tensor in named_tensors])
    for (name, _), is_finite in zip(named_tensors, are_finite.tolist(), strict=True):
        if not is_finite:
            return name
    return None


class Snapshot:
    """Copies a state to the CPU, where training does not change it while a thread writes it.

    The memory is kept for the next state, which must have the same shapes. That of a CUDA device's
    tensors is pinned, so that they are copied at the full speed of the bus.
    """
    def __init__(self):
        self.buffers = {}                              # by the place of a tensor in the state

    def take(self, state):
        """A copy of nested dicts, lists, tensors and plain values. A tensor that is there twice,
        such as an EMA that is also part of an autoencoder, is copied once.
        """
        copies = {}                                    # by the id of a tensor
        copied = self.copy(state, "", copies)
        if torch.cuda.is_available():                  # copies from a GPU come while we go on
            torch.cuda.current_stream().synchronize()
        return copied

    def copy(self, value, place, copies):
        if isinstance(value, torch.Tensor):
            if id(value) not in copies:
                copies[id(value)] = self.copy_tensor(value, place)
            return copies[id(value)]
        if isinstance(value, dict):
            return {key: self.copy(item, f"{place}/{key}", copies) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.copy(item, f"{place}/{i}", copies) for i, item in enumerate(value)]
        return value

    def copy_tensor(self, tensor, place):
        if place not in self.buffers:
            self.buffers[place] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return self.buffers[place].copy_(tensor, non_blocking=tensor.is_cuda)


class Checkpoints:
    """Writes OUT/last.pt, as long as the run is sane, and stops a run that has diverged.

    A checkpoint is only written if the gradients of its last step and its weights are finite. What
    its last update did to the loss is only known after the next step. Until then, the checkpoint
    before it is kept as OUT/previous.pt, to be brought back if the run diverges.
    The norm of a step's gradients is read after the next step was started, so that the device has
    work while Python waits for it; before a checkpoint, all are read.
    All processes call the same methods; rank 0 writes. lock: that of OUT, held as long as this
    object. in_background: whether training goes on while a thread writes a copy of the state, as it
    should on a GPU, which would wait otherwise. A run that ends or stops writes at once.
    """
    def __init__(self, args, rank, log, lock, in_background=False):
        self.out, self.steps = Path(args.out), args.steps
        self.save_every, self.log_every = args.save_every, args.log_every
        self.rank, self.log, self.lock = rank, log, lock
        self.updates = Updates()
        self.unread = deque()                          # of steps: (number, norm, loss)
        self.saved_step = None                         # by this process
        self.is_behind = False                         # the last checkpoint could not be written
        self.has_previous = False
        self.is_judged = False                         # a step after the last checkpoint was finite
        self.in_background = in_background
        self.snapshot = Snapshot()
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.writing = None                            # Future of the thread's checkpoint

    @property
    def last(self):
        return self.out / "last.pt"

    @property
    def previous(self):
        return self.out / "previous.pt"

    def begin(self, start):
        """Delete what killed processes left half-written. At step 0, delete the checkpoints of
        another run, too, lest this one resumes it if it is killed before its first checkpoint.
        """
        if self.rank > 0:
            return
        for pattern in ("last.pt.tmp", "log.jsonl.tmp", "preview_*.png.tmp"):
            for leftover in self.out.glob(pattern):
                leftover.unlink()
        if start == 0:
            self.last.unlink(missing_ok=True)
            self.previous.unlink(missing_ok=True)
        self.has_previous = self.previous.exists()

    def check(self, done, *grad_norms, loss=None):
        """Note the gradients of step `done`, and look at those of the step before.

        grad_norms: numbers, or scalars on the device, of which none may be infinite or nan. loss:
        for the message only. Raises ValueError if the run has diverged.
        """
        self.unread.append((done, sum(grad_norms), loss))      # finite, if all norms are
        self.read_norms(keep=0 if done == self.steps else 1)

    def read_norms(self, keep=0):
        """Look at the gradients of all steps but the last `keep`. Raises as check()."""
        while len(self.unread) > keep:
            done, grad_norm, loss = self.unread.popleft()
            grad_norm = float(grad_norm)               # waits for the device
            self.updates.add(grad_norm)
            is_left_out = self.updates.left_out > 0
            if is_left_out and self.rank == 0:
                print(f"step {done - 1}: not finite, update left out: loss {loss}, "
                      f"grad {grad_norm}", file=sys.stderr)
            if not is_left_out:                        # the loss of the saved weights is finite
                self.is_judged = True
            if self.writing is None or self.writing.done():
                self.finish()
            is_end = done == self.steps                # which cannot be saved, if it was left out
            if self.updates.have_diverged() or is_left_out and is_end:
                self.finish()
                self.stop_diverged()

    def finish(self):
        """Wait for the thread, if it writes a checkpoint, and say what prevented it. Then delete
        the checkpoint before it, if that is needed no longer.
        """
        if self.writing is not None:
            problem = self.writing.result()
            self.writing = None
            self.note(problem)
        if self.has_previous and self.is_judged:
            self.drop_previous()

    def note(self, problem):
        """Remember and say what prevented a checkpoint. None: it is written."""
        self.is_behind = problem is not None
        if problem:
            self.log.say(f"warning: {problem}; training goes on, and tries again")

    def keep_previous(self):
        """Give the checkpoint that is to be replaced a second name, or copy it without links."""
        if not self.last.exists():
            return
        try:
            os.link(self.last, self.previous)
        except OSError:
            shutil.copyfile(self.last, self.previous)
        self.has_previous = True

    def drop_previous(self):
        self.previous.unlink(missing_ok=True)
        self.has_previous = False

    def stop_diverged(self):
        """Bring back the last checkpoint with a finite loss, and raise ValueError."""
        recent = self.updates.recent
        if self.has_previous:
            os.replace(self.previous, self.last)
        advice = "start anew with lower learning rates, --clip 1 or --dtype fp32"
        if self.last.exists() and all(recent):
            advice = (f"{self.last} was resumed without a finite step: if lower learning rates and "
                      f"--clip 1 change nothing, its weights are spoilt; then {advice}")
        elif self.last.exists():
            advice = (f"{self.last} is the last checkpoint with a finite loss: go on from it by "
                      f"--resume with lower learning rates or --clip 1, or {advice}")
        raise ValueError(f"the run has diverged: gradients were not finite and updates left out in "
                         f"{sum(recent)} of the last {len(recent)} steps; {advice}")

    def is_due(self, done, is_stop=False):
        """Whether to write a checkpoint after step `done`, the same on all processes."""
        is_due = done % self.save_every == 0 or done == self.steps or is_stop
        if done % self.log_every == 0:
            self.is_behind = gather(self.is_behind)[0]     # rank 0 alone knows how its thread ended
            is_due = is_due or self.is_behind
        if not is_due:
            return False
        self.read_norms()
        return self.updates.left_out == 0

    def save(self, done, is_stop=False, **state):
        """Write OUT/last.pt after step `done`. state: what else it is to contain.

        If that fails, as on a full disk, the run goes on from memory, and is_due() after the next
        line of the log. Raises OSError if it fails when the run ends.
        """
        self.read_norms()                              # those to come judge this checkpoint
        self.finish()                                  # the one before may still be being written
        problem = None
        is_last = is_stop or done == self.steps
        if self.rank == 0:
            problem = self.write(done, state, is_last)
        problem = gather(problem)[0]
        if problem and is_last:
            raise OSError(problem)
        self.note(problem)

    def write(self, done, state, is_last):
        """Write the checkpoint, or let the thread do so; returns what prevented it, or None."""
        name = first_not_finite([*state["model"].items(), *state.get("ema", {}).items()])
        if name is not None:
            return f"step {done} is not saved, since {name} is not finite"
        self.is_judged = False
        if self.in_background and not is_last:
            copy = self.snapshot.take(state)
            self.writing = self.thread.submit(self.write_files, done, copy)
            return None
        problem = self.write_files(done, state)
        if is_last and problem is None:                # no later step will judge it
            self.drop_previous()
        return problem

    def write_files(self, done, state):
        """Write last.pt, and keep the one before as previous.pt; returns what prevented it, or
        None.
        """
        try:
            self.keep_previous()
            save_checkpoint(self.last, step=done, **state)
        except OSError as error:
            self.drop_previous()                       # it is the same as the last one
            return one_line(error)
        self.saved_step = done
        return None

    def say_stopped(self):
        """Say how to go on, as the last line of a run that was asked to stop."""
        self.finish()
        out = shlex.quote(str(self.out))
        if self.last.exists():
            advice = f"go on by --resume --out {out}"
        else:
            advice = "there is no checkpoint; give the command again"
        step = f"after saving step {self.saved_step}" if self.saved_step else "without saving"
        self.log.say(f"stopped by {stop_request.name or 'another process'} {step}; {advice}")


# ---------------------------------------------------------------------------- speed
# FLOPs of what a forward pass consists of, for FlopCounter: two for each multiply-add.
def linear_flops(output, input, weight, bias=None):
    return 2 * output.numel() * weight.shape[1]        # weight: out in


def convolution_flops(output, input, weight, *settings, **options):
    return 2 * output.numel() * weight[0].numel()      # weight: out in kernel


def attention_flops(output, query, key, *rest, **options):
    """Of QK^T and of its product with V. Causal attention counts as whole, as in other papers."""
    return 4 * query.numel() * key.shape[-2]           # key: ... tokens dh


def matmul_flops(output, a, b):
    return 2 * output.numel() * a.shape[-1]


PRODUCTS_WITH_WEIGHTS = {
    F.linear: linear_flops,
    F.conv1d: convolution_flops,
    F.conv2d: convolution_flops,
}
PRODUCTS_OF_ACTIVATIONS = {
    F.scaled_dot_product_attention: attention_flops,
    torch.matmul: matmul_flops,
    torch.Tensor.matmul: matmul_flops,
    torch.Tensor.__matmul__: matmul_flops,             # a @ b
}


class Flops(NamedTuple):
    """FLOPs of a forward pass, and from them those of training.

    These are the model's: what activation checkpointing computes twice counts once.
    """
    weights: int             # of products with weights
    activations: int         # of products of two activations, in attention

    @property
    def forward(self):
        return self.weights + self.activations

    @property
    def training(self):
        """Forward and backward. One product has two gradients, one for each of its factors."""
        return 3 * self.forward

    @property
    def frozen(self):
        """Forward and backward through frozen weights, which have no gradient themselves."""
        return 2 * self.weights + 3 * self.activations


class FlopCounter(TorchFunctionMode):
    """Context that counts the FLOPs of the matmuls, convolutions and attention inside it.

    What works on single elements, such as norms and GELU, counts nothing.
    """
    def __init__(self):
        super().__init__()
        self.weights = 0
        self.activations = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        options = kwargs or {}
        if function is F.linear:                       # shapes are all that is needed
            output = args[0].new_zeros(*args[0].shape[:-1], len(args[1]))
        else:
            output = function(*args, **options)
        if function in PRODUCTS_WITH_WEIGHTS:
            self.weights += PRODUCTS_WITH_WEIGHTS[function](output, *args, **options)
        elif function in PRODUCTS_OF_ACTIVATIONS:
            self.activations += PRODUCTS_OF_ACTIVATIONS[function](output, *args, **options)
        return output


@torch.no_grad()
def count_flops(function, *inputs):
    """The Flops of the forward pass function(*inputs).

    function: a module, or a method of one, in eval mode, so that it draws no random numbers. Runs
    it, but for the linear layers; so a batch of one is best.
    """
    counter = FlopCounter()
    with torch.compiler.set_stance("force_eager"), counter:            # not what compiling makes
        function(*inputs)
    return Flops(counter.weights, counter.activations)


# Matmuls of GPUs in TFLOP/s, dense, with sums in fp32: in bf16, and in fp32 as setup() has it
# (TF32). None: they are emulated. Words of torch.cuda.get_device_name, the more special first.
# Source: NVIDIA's data sheets and white papers of each; many of them give twice the number, for
# sparse matrices.
GPU_PEAKS = {
    "B200": (2250, 1100),
    "H200 NVL": (835, 418),
    "H200": (989, 495),
    "GH200": (989, 495),
    "H100 NVL": (835, 418),
    "H100 PCIe": (756, 378),
    "H100": (989, 495),
    "A100": (312, 156),
    "A10": (125, 62.5),
    "L40S": (362, 183),
    "L4": (121, 60),
    "T4": (None, 8.1),                                 # Turing has no TF32
    "V100": (None, 15.7),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71, 35.6),
}


def peak_flops(device, dtype):
    """FLOP/s at which a device could multiply matrices in dtype "bf16" or "fp32"; None: unknown.

    Of a GPU the maker's number, of a CPU the best of a few products, with the threads of this
    process.
    """
    if device.type == "cuda":
        return gpu_peak_flops(torch.cuda.get_device_name(device), dtype)
    if device.type != "cpu":
        return None
    n = 512
    ones = torch.ones(n, n, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        ones @ ones
        seconds.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(seconds)


def gpu_peak_flops(name, dtype):
    """FLOP/s of the GPU called `name` by GPU_PEAKS; None: it is not there, or is a part of one."""
    words = f" {name.replace('-', ' ')} "
    if " MIG " in words or " Laptop " in words or " D " in words:      # slower ones
        return None
    for model, (bf16, fp32) in GPU_PEAKS.items():
        if f" {model} " in words:
            teraflops = bf16 if dtype == "bf16" else fp32
            return None if teraflops is None else teraflops * 1e12
    return None


# ---------------------------------------------------------------------------- log
def peak_memory_gib(device):
    """Peak memory of this process, on its GPU if it has one, in GiB. 0.0: it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if device.type == "mps":
        # What was freed stays with the driver, so that this is about the peak.
        return torch.mps.driver_allocated_memory() / 2 ** 30
    try:
        import resource
    except ImportError:                                # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024     # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def time_left(seconds):
    """A duration as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def progress_bar(items, description, total=None):
    """The items under a bar with the time left, on rank 0 if that has a terminal.

    items: an iterable; or a number, then the bar is to be updated. total: number of items of an
    iterable that does not say so.
    """
    disable = True if process_rank() > 0 else None     # None: tqdm looks for a terminal
    options = dict(desc=description, leave=False, disable=disable, dynamic_ncols=True)
    if isinstance(items, int):
        return tqdm(total=items, **options)
    return tqdm(items, total=total, **options)


class Log:
    """A progress bar and lines on the screen, the same records in OUT/log.jsonl. Only rank 0
    writes.

    args: flags of the run (out, steps, batch, dtype, wandb and all that is recorded). start: step
    at which this process begins. parameters: number of trained parameters. data: ImageData.
    flops: those of this process since the last line, which the training loop adds up.
    """
    def __init__(self, args, rank, device, start, parameters, data):
        self.steps, self.batch, self.device = args.steps, args.batch, device
        self.start, self.start_time = start, time.time()
        self.last_step, self.last_time = start, self.start_time
        self.out, self.rank = Path(args.out), rank
        self.unwritten = ""                            # lines that the disk had no room for
        self.first_seconds = None                      # of the first step
        self.flops = 0
        self.peak_flops = peak_flops(device, args.dtype)
        self.bar = None
        if rank == 0:
            self.forget_later_steps(start)
        self.wandb = None
        if args.wandb and rank == 0:
            self.wandb = start_wandb(args)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        self.write(dict(args=flags_as_dict(args), commit=git_commit(), torch=torch.__version__,
                        device=name, peak_flops=self.peak_flops, tf32=uses_tf32(device),
                        python=platform.python_version(), parameters=parameters,
                        data=data.summary(), resumed_at=start))
        disable = True if rank > 0 else None           # None: no bar unless on a terminal
        self.bar = tqdm(total=args.steps, initial=start, disable=disable, dynamic_ncols=True)
        self.say(data.describe())
        self.say(f"{parameters / 1e6:.1f} M parameters on {name}, batches of {args.batch} images, "
                 f"writing to {args.out}")

    @property
    def path(self):
        return self.out / "log.jsonl"

    def forget_later_steps(self, start):
        """Take from the file what a killed run logged after its checkpoint, and torn lines.

        The file is replaced as a whole. A run that starts anew starts a new file.
        """
        kept = b""
        if start > 0 and self.path.exists():
            for line in self.path.read_bytes().splitlines():
                record = read_record(line)
                if record is not None and record.get("step", 0) <= start:
                    kept += line + b"\n"
        write_whole(self.path, lambda f: f.write(kept))

    def say(self, line):
        """Print a line above the progress bar."""
        if self.rank == 0:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, warning):
        """Put a warning on the screen and into the file. None: there is nothing to warn of."""
        if warning is not None:
            self.say(f"warning: {warning}")
            self.write(dict(warning=warning))

    def write(self, record):
        """Append a record to the file, and to Weights & Biases if it belongs to a step.

        What a full disk does not take is written together with the next record.
        """
        if self.rank > 0:
            return
        is_first_failure = not self.unwritten
        self.unwritten += to_json(record) + "\n"
        try:
            append_whole(self.path, self.unwritten)
            self.unwritten = ""
        except OSError as error:
            if is_first_failure:
                self.say(f"warning: {self.path} could not be written: {error.strerror}; training "
                         f"goes on, and tries again")
        if self.wandb and "step" in record:
            self.wandb.log(record, step=record["step"])

    def first_steps(self, step):
        """Say how long the first two steps took: the next line may be far away.

        The first of them waits for the loader workers, the second shows the pace.
        """
        if step > self.start + 2:
            return
        if self.device.type == "cuda":                 # which may not have computed them yet
            torch.cuda.synchronize(self.device)
        seconds = time.time() - self.start_time
        if step == self.start + 1:
            self.first_seconds = seconds
        else:
            pace = seconds - self.first_seconds
            self.say(f"the first step took {self.first_seconds:.1f} s, the second {pace:.1f} s; at "
                     f"its pace the other {self.steps - step} take "
                     f"{time_left(pace * (self.steps - step))}")
            self.write(dict(first_step_seconds=self.first_seconds, second_step_seconds=pace))

    def step(self, step, loss, grad_norm, lr, **more):
        """Report the state after `step` steps. loss: a mean over processes. more: not printed.

        grad_norm: of optimizer_step().
        """
        grad_norm = float(grad_norm)
        seconds = max(time.time() - self.last_time, 1e-9)
        images_per_second = (step - self.last_step) * self.batch / seconds
        seconds_left = (self.steps - step) * self.batch / images_per_second
        gib = peak_memory_gib(self.device)
        mfu = self.flops_utilisation(seconds)
        self.write(dict(step=step, loss=loss, grad=grad_norm, lr=lr, img_per_s=images_per_second,
                        mfu=mfu, gib=gib, eta_h=seconds_left / 3600, **more))
        self.bar.update(step - self.bar.n)
        speed = f"{images_per_second:.0f} img/s"
        if mfu is not None:
            speed += f" | {100 * mfu:.1f}% MFU"
        self.say(f"step {step}/{self.steps} | loss {loss:.4f} | grad {grad_norm:.2f} | lr {lr:.1e} "
                 f"| {speed} | {gib:.1f} GiB | {time_left(seconds_left)} left")
        self.flops = 0
        self.last_step, self.last_time = step, time.time()

    def flops_utilisation(self, seconds):
        """MFU of the last seconds: the FLOPs of the model, of those that matmuls alone could have
        computed in that time. None: the device's peak, or the FLOPs are not known.

        It counts what the training needs, once, however often it is computed. Reading images,
        saving, previews and evaluations since the last line take time and add no FLOPs.
        Source: PaLM, arXiv 2204.02311, appendix B.
        """
        if self.peak_flops is None or self.flops == 0:
            return None
        return self.flops / seconds / self.peak_flops

    def preview(self, step, draw):
        """Write OUT/preview_STEP.png, on rank 0. What prevents it costs no more than the picture.

        draw: function that returns it, a PIL image.
        """
        if self.rank > 0:
            return
        path = self.out / f"preview_{step:07d}.png"
        try:
            picture = draw()
            write_whole(path, lambda f: picture.save(f, "png"))
        except (ValueError, OSError) as error:
            self.warn(f"{one_line(error)}; training goes on without a preview of step {step}")


def read_record(line):
    """The record in a line of a log, a dict; None for what is torn or not a line of ours."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):               # no JSON, or too deep
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step", 0), int):
        return None
    return record


def start_wandb(args):
    """A run of Weights & Biases. Raises ValueError if it cannot be started."""
    import wandb
    try:
        return wandb.init(project=args.wandb, config=flags_as_dict(args))
    except wandb.Error as error:                       # such as a missing login
        raise ValueError(f"--wandb {args.wandb}: {error}; run wandb login, or leave the flag "
                         f"out") from error

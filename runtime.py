"""What every script needs around its loop: processes, signals, precision, compilation, seeds, EMA,
schedules.

Randomness depends only on (seed, step, number of the micro-batch) and the data only on the step, so
that a resumed run is exact to the bit on CPU, and k processes with one micro-batch each compute
what one process with k micro-batches computes.
"""
import contextlib
import ctypes
import inspect
import math
import os
import platform
import re
import signal
import sys
import threading
import time
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

AMPERE = (8, 0)      # capability from which on GPUs compute in bf16 and TF32


def default_dtype():
    """The default of --dtype: "bf16" where its matmuls are faster than those of fp32, on GPUs from
    Ampere on (capability 8.0; a T4 or V100 only emulates it), and on CPUs with AMX or AVX512-BF16.
    On other CPUs, such as those with AVX2 alone, and on Apple's GPUs it is "fp32".
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
        # Of torch on CPUs, and of Triton on GPUs.
        if re.search(r"No working C\+\+ compiler|Failed to find C compiler", str(error)):
            raise SystemExit("error: --compile needs a compiler of C and C++, and none was found; "
                             "install one, such as g++, or leave the flag out") from None
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
    """The message of an exception; of the operating system's errors with the path in front; its
    kind if it has no message.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split("\n")) or type(error).__name__


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


# ---------------------------------------------------------------------------- precision and speed
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


# ---------------------------------------------------------------------------- training steps
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

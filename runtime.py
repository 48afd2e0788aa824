"""What every script needs around its loop: processes, precision, seeds, EMA, schedules,
checkpoints, logs.

Randomness depends only on (seed, step, number of the micro-batch) and the data only on the step, so
that a resumed run is exact to the bit on CPU, and k processes with one micro-batch each compute
what one process with k micro-batches computes.
"""
import argparse
import contextlib
import ctypes
import importlib.util
import inspect
import json
import math
import os
import platform
import subprocess
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm


def default_dtype():
    """"bf16" where its matmuls are faster than those of fp32: on GPUs and on CPUs with AMX."""
    if torch.cuda.is_available():
        return "bf16"
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    if has_amx is not None and has_amx():
        return "bf16"
    return "fp32"


DEFAULT_DTYPE = default_dtype()


# ---------------------------------------------------------------------------- processes
def setup():
    """Join torchrun's process group, if there is one. Returns (rank, world size, device)."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")     # TF32 in fp32 matmuls, as in the release
        backend = "cpu:gloo,cuda:nccl"                 # gloo: for objects gathered on the CPU
    else:
        device = torch.device("cpu")
        torch.backends.cuda.enable_flash_sdp(False)    # on few tokens plain matmuls are faster
        keep_freed_memory()
        backend = "gloo"
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    return rank, world, device


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


def run(main, parse_args):
    """Run a script. What the user can mend ends in one line, without a traceback."""
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt as stop:
        if str(stop):                                  # a script that knows what is kept
            raise SystemExit(f"error: {stop}") from None
        raise SystemExit("error: stopped; it goes on when the command is given again, "
                         "a training with --resume") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


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


def split_numbers(n, batch, rank=0, world=1):
    """This process's part of the numbers 0..n-1, in batches: a list of ranges."""
    starts = range(rank, n, batch * world)
    return [range(start, min(n, start + batch * world), world) for start in starts]


# ---------------------------------------------------------------------------- training steps
def autocast(device, dtype):
    """Context in which matmuls run in bf16 if dtype is "bf16", and in fp32 otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def data_parallel(model):
    """The model in DistributedDataParallel, whose buffers are constants: they are not synced."""
    options = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers"                      # its name from torch 2.14 on
    if name not in options:
        name = "broadcast_buffers"
    return DistributedDataParallel(model, **{name: False})


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


def optimizer_step(optimizers, model, clip, loss, step, lr):
    """Clip the gradients, update the weights unless a gradient is not finite, zero the gradients.

    clip: largest norm of all gradients together; 0: no clipping. loss: for the message only.
    lr: learning rate of every parameter group, times the group's own "lr_scale" if it has one.
    Returns the norm of the gradients before clipping, a float. All processes do the same, since
    their gradients are averaged already.
    """
    max_norm = clip if clip > 0 else math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if hasattr(grad_norm, "full_tensor"):              # FSDP: each process holds a shard
        grad_norm = grad_norm.full_tensor()
    grad_norm = float(grad_norm)
    if math.isfinite(grad_norm):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            optimizer.step()
    else:
        print(f"step {step}: not finite, update left out: loss {loss}, grad {grad_norm}, lr {lr}",
              file=sys.stderr)
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


def write_whole(path, write):
    """Write a file that is there whole or not at all: write(f) to a temporary name, flush,
    rename.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:                           # stand-in
        Path(temporary).unlink(missing_ok=True)
        raise OSError(f"{path} can't be written: {error}") from error


def check_out(path, flag="--out"):
    """Stand-in."""
    if not str(path).strip():
        raise ValueError(f"{flag} is empty; name a file or a folder")
    parent = Path(path).absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} {path} can't be written ({error})") from None
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{flag} {path} can't be written: no permission")


def lock(path):
    """Stand-in."""


def progress_bar(iterable_or_total, description, rank=0):
    """Stand-in."""
    disable = True if rank > 0 else None               # None: no bar unless on a terminal
    if isinstance(iterable_or_total, int):
        return tqdm(total=iterable_or_total, desc=description, disable=disable)
    return tqdm(iterable_or_total, desc=description, disable=disable)


def check_suffix(path, suffixes, flag="--out"):
    """Raise ValueError unless a path ends in one of the suffixes; "" among them is a folder's."""
    if Path(path).suffix.lower() in suffixes:
        return
    files = " ".join(suffix for suffix in suffixes if suffix)
    or_folder = ", or a folder, which has no suffix" if "" in suffixes else ""
    raise ValueError(f"{flag} {path} can't be written in the format of its suffix; use one of "
                     f"{files}{or_folder}")


def save_checkpoint(path, **state):
    """Write a checkpoint of tensors and plain types as one file."""
    write_whole(path, lambda f: torch.save(state, f))


def load_checkpoint(path):
    """The dict of a checkpoint, on the CPU, from a file of torch.save or our .safetensors.

    Raises FileNotFoundError; ValueError if the file cannot be read safely.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"file {path} does not exist; check the path, or copy or train it "
                                f"first")
    try:
        if Path(path).suffix == ".safetensors":
            return read_nested_safetensors(path)
        return dict(torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path)))
    except Exception as error:             # pickle, zip and safetensors raise a dozen kinds
        raise ValueError(f"{path} is no checkpoint that can be read safely: cut short, or with "
                         f"code in it ({type(error).__name__}); copy or train it again") from error


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
            node[leaf] = f.get_tensor(key).float()
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

    def parse(self, argv, resolve, check):
        """Parse argv (None: the command line), fill in the flags, and check them.

        resolve: args -> a copy in which every flag has its value. check: args -> None.
        What they raise for the user's mistakes ends the script with a line.
        """
        args = self.parse_args(argv)
        try:
            args = resolve(args)
            check(args)
        except (ValueError, FileNotFoundError) as error:
            self.error(str(error))
        return args


RUN_DEFAULTS = dict(seed=0, workers=1, batch=64, micro_batch=None, dtype=DEFAULT_DTYPE,
                    resume=False, overwrite=False, wandb=None)


def add_run_flags(p):
    """The flags of a run and its optimizer, which all training scripts share."""
    p.add_argument("--out", help="Folder that the run writes to.")
    p.add_argument("--seed", type=at_least(0), help="Seed of weights, data order and noise.")
    p.add_argument("--workers", type=at_least(0), help="Data loader processes for each process.")
    p.add_argument("--batch", type=at_least(1),
                   help="Images per optimizer step, over all processes.")
    p.add_argument("--micro_batch", type=at_least(1),
                   help="Images per process and forward pass, to be lowered if memory runs out "
                        "(default: batch / processes).")
    p.add_argument("--steps", type=at_least(1), help="Optimizer steps in all.")
    p.add_argument("--lr", type=at_least(1e-9), help="Peak learning rate.")
    p.add_argument("--lr_end", type=at_least(0.0, 1 + 1e-9),
                   help="Final learning rate as a fraction of its peak.")
    p.add_argument("--warmup", type=at_least(0), help="Steps of linear warm-up.")
    p.add_argument("--weight_decay", type=at_least(0.0), help="Weight decay.")
    p.add_argument("--clip", type=at_least(0.0), help="Largest norm of the gradients; 0: any.")
    p.add_argument("--ema", type=at_least(0.0, 1),
                   help="Decay per step of the average of the weights, below 1.")
    p.add_argument("--dtype", choices=("bf16", "fp32"),
                   help="Precision of matmuls: bf16 where the machine is fast at it.")
    p.add_argument("--log_every", type=at_least(1), help="Steps between lines of the log.")
    p.add_argument("--save_every", type=at_least(1),
                   help="Steps between checkpoints; the last step is always saved.")
    p.add_argument("--preview_every", type=at_least(0), help="Steps between pictures; 0: none.")
    p.add_argument("--resume", action="store_true", default=None,
                   help="Go on from OUT/last.pt. Flags that are not given keep their values.")
    p.add_argument("--overwrite", action="store_true", default=None,
                   help="Start anew although OUT/last.pt exists.")
    p.add_argument("--wandb", metavar="PROJECT",
                   help="Project of Weights & Biases to log to as well (pip install wandb).")


def given_flags(args):
    """The flags that were given on the command line, as a dict."""
    return {name: value for name, value in vars(args).items() if value is not None}


def flags_as_dict(args):
    """All flags as a dict that JSON can hold."""
    return json.loads(json.dumps(vars(args), default=str))


def flags_of_run(out, script, key):
    """The flags in OUT/last.pt, for --resume, as a dict.

    script, key: the script whose checkpoint it must be, and a key that only these have.
    Raises ValueError if there is no such checkpoint.
    """
    path = Path(out) / "last.pt"
    if not path.exists():
        raise ValueError(f"--resume needs {path}, which does not exist; leave the flag out to "
                         f"start a run")
    state = load_checkpoint(path)
    if "args" not in state or key not in state:
        raise ValueError(f"{path} is no checkpoint of {script}; name the --out of one of its runs")
    flags = dict(state["args"])
    for name in ("out", "resume", "overwrite"):        # those of this command; a folder may move
        flags.pop(name, None)
    # Older checkpoints of x0-prediction were trained with another weight of the loss by time.
    if flags.pop("balance", None) is not None and flags["prediction"] == "x0":
        raise ValueError(f"{path} was trained with another weight of the loss by time (--balance), "
                         f"which no longer exists; start from its weights with --init {path}")
    if flags.get("decay_end") == flags["steps"]:       # a schedule follows --steps if it is raised
        del flags["decay_end"]
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
            advice = "resume without it" if was is None else f"resume with --{name} {was}"
            raise ValueError(f"--{name} {given[name]} differs from the checkpoint's {was}; "
                             f"{advice}")


def default_micro_batch(batch):
    """Micro-batch that needs no accumulation: the images of one process."""
    return max(1, batch // int(os.environ.get("WORLD_SIZE", 1)))


def check_run_flags(args):
    """Raise ValueError for flags of a run that contradict each other or the files that are
    there.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    unit = args.micro_batch * world
    if args.batch % unit:
        nearest = max(1, round(args.batch / unit)) * unit
        raise ValueError(f"--batch {args.batch} must be a multiple of --micro_batch "
                         f"{args.micro_batch} x {world} processes; try --batch {nearest}")
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite starts anew; give one of "
                         "them")
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
    state = load_checkpoint(Path(args.out) / "last.pt")
    if state["step"] >= args.steps:
        raise ValueError(f"{args.out} has done {state['step']} steps; raise --steps {args.steps} "
                         f"to go on")
    return state


def clear_run(out):
    """Delete the checkpoint of a run that is overwritten, lest a new run that is killed before its
    first save resumes the old one."""
    (Path(out) / "last.pt").unlink(missing_ok=True)


# ---------------------------------------------------------------------------- log
def peak_memory_gib(device):
    """Peak memory of this process, on its GPU if it has one, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    import resource  # not on every platform
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


class Log:
    """A progress bar and lines on the screen, the same records in OUT/log.jsonl. Only rank 0
    writes.

    args: flags of the run (out, steps, batch, wandb and all that is recorded). start: step at which
    this process begins. parameters: number of trained parameters.
    """
    def __init__(self, args, rank, device, start, parameters):
        self.steps, self.batch, self.device = args.steps, args.batch, device
        self.last_step, self.last_time = start, time.time()
        self.file = self.open_file(args.out, rank, start)
        self.screen = self.file if rank > 0 else sys.stdout
        self.wandb = None
        if args.wandb and rank == 0:
            import wandb
            self.wandb = wandb.init(project=args.wandb, config=flags_as_dict(args))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        self.write(dict(args=flags_as_dict(args), commit=git_commit(), torch=torch.__version__,
                        device=name, python=platform.python_version(), parameters=parameters,
                        resumed_at=start))
        disable = True if rank > 0 else None           # None: no bar unless on a terminal
        self.bar = tqdm(total=args.steps, initial=start, disable=disable, dynamic_ncols=True)
        self.say(f"{parameters / 1e6:.1f} M parameters on {name}, writing to {args.out}")

    @staticmethod
    def open_file(out, rank, start):
        """OUT/log.jsonl, written line by line, without what a killed run logged after its
        checkpoint.
        """
        if rank > 0:
            return open(os.devnull, "w")
        path = Path(out) / "log.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if start > 0 and path.exists():
            for line in path.read_text().splitlines():
                if line.endswith("}") and json.loads(line).get("step", 0) <= start:
                    kept.append(line + "\n")
        file = open(path, "w", buffering=1)            # noqa: SIM115, open as long as the run
        file.writelines(kept)
        return file

    def say(self, line):
        """Print a line above the progress bar."""
        tqdm.write(line, file=self.screen)
        self.screen.flush()

    def write(self, record):
        """Append a record to the file, and to Weights & Biases if it belongs to a step."""
        self.file.write(json.dumps(record) + "\n")
        if self.wandb and "step" in record:
            self.wandb.log(record, step=record["step"])

    def step(self, step, loss, grad_norm, lr, **more):
        """Report the state after `step` steps. loss: a mean over processes. more: not printed."""
        seconds = max(time.time() - self.last_time, 1e-9)
        images_per_second = (step - self.last_step) * self.batch / seconds
        hours_left = (self.steps - step) * self.batch / images_per_second / 3600
        gib = peak_memory_gib(self.device)
        self.write(dict(step=step, loss=loss, grad=grad_norm, lr=lr, img_per_s=images_per_second,
                        gib=gib, eta_h=hours_left, **more))
        self.bar.update(step - self.bar.n)
        self.say(f"step {step}/{self.steps} | loss {loss:.4f} | grad {grad_norm:.2f} | lr {lr:.1e} "
                 f"| {images_per_second:.0f} img/s | {gib:.1f} GiB | eta {hours_left:.2f} h")
        self.last_step, self.last_time = step, time.time()

"""What every script needs around its loop: processes, precision, seeds, EMA, schedules, checkpoints, logs.
Randomness depends on (seed, step, micro-batch) alone and the data on the step: a resume is bit-exact on CPU.
"""
import argparse
import ctypes
import functools
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
from tqdm import tqdm

DTYPE = ("fp32", "bf16")[torch.cuda.is_available() or getattr(torch.cpu, "_is_amx_tile_supported", bool)()]


def setup():
    """Join the process group of torchrun, if any. Returns (rank, world, device). nccl on GPU, gloo on CPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")         # TF32 for fp32 matmuls, as the release was trained
    else:
        torch.backends.cuda.enable_flash_sdp(False)        # CPUs too: on few tokens plain products are faster
        if platform.libc_ver()[0] == "glibc":              # it would map and unmap large tensors at each step
            ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: keep freed memory at hand
            ctypes.CDLL("libc.so.6").mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=1))
    return rank, world, device


def run(main, parse_args):
    """Run a script: what the user can mend ends in one line, without a traceback."""
    try:
        main(parse_args())
    except (ValueError, OSError, KeyboardInterrupt) as error:          # the last comes without a text
        stopped = "stopped; it goes on when the command is given again, a training with --resume"
        raise SystemExit(f"error: {error}" if f"{error}" else stopped) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def all_mean(x):
    """Mean over processes of a tensor; itself when there is one process."""
    if dist.is_initialized():
        x = x / dist.get_world_size()                      # a copy: all_reduce works in place
        dist.all_reduce(x)
    return x


def autocast(device, dtype):                               # bf16: of the matmuls; fp32: as it is
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def seed_step(seed, step, micro):                          # for a micro-batch, whatever process computes it
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + micro)        # primes keep near triples apart


def lr_factor(step, warmup, start, end, last, shape="linear"):
    """Share of the peak: up over `warmup` steps, 1 to `start`, linear or cosine down to `last` at `end`."""
    done = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    done = done if shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * done)
    return (step + 1) / warmup if step < warmup else 1 + (last - 1) * done


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay*ema + (1-decay)*model; decay at most (1+step)/(10+step), to forget the initialisation."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def step_optimizers(opts, model, clip, loss, step, lr):
    """Clip to norm `clip` (0: none), step if finite, zero the gradients; returns their norm before that."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else math.inf)
    if math.isfinite(norm := float(getattr(norm, "full_tensor", norm.clone)())):      # of all shards
        for opt in opts:                                   # on all processes alike: DDP averages gradients
            for group in opt.param_groups:                 # share: of a group with an lr of its own
                group["lr"] = lr * group.get("share", 1.0)
            opt.step()
    else:
        print(f"step {step}: not finite, update left out: loss {loss}, grad {norm}, lr {lr}", file=sys.stderr)
    model.zero_grad(set_to_none=True)
    return norm


def whole_file(path, write):
    """write(f) to a file that is there whole or not at all: temporary name, flushed, renamed."""
    with open(f"{path}.tmp", "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f.name, path)


def save_checkpoint(path, **state):                        # tensors and plain types in one file
    whole_file(path, lambda f: torch.save(state, f))


def load_checkpoint(path):
    """The dict of a checkpoint, on CPU. Raises FileNotFoundError, ValueError if it can't be read safely."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"file {path} does not exist; check the path, or copy or train it first")
    try:
        if Path(path).suffix != ".safetensors":
            return dict(torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path)))
        with safe_open(path, "pt") as f:
            state = json.loads((f.metadata() or {}).get("plain", "{}"))    # plain: of our own files
            for key in f.keys():                                       # "rae/decoder/x.weight": nested dicts
                *parents, leaf = key.split("/")
                node = functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, state)
                node[leaf] = f.get_tensor(key).float()                 # stored in half precision
        return state
    except Exception as error:                             # pickle, zip and safetensors each raise their own
        raise ValueError(f"{path} is no checkpoint that can be read safely: cut short, or with code in it "
                         f"({type(error).__name__}); copy or train it again") from error


def resume(args, shaping):
    """The checkpoint of --resume. ValueError if a flag of `shaping` has changed; None: as it was."""
    state = load_checkpoint(Path(args.out) / "last.pt")
    vars(args).update({k: state["args"].get(k) for k in shaping if getattr(args, k) is None})
    for key in shaping:                                    # a flag that is newer than it was off
        if (was := state["args"].get(key)) != (now := plain(args)[key]) and (key in state["args"] or now):
            raise ValueError(f"--{key} {now} differs from the checkpoint's {was}; resume with --{key} {was}")
    if state["step"] >= args.steps:
        raise ValueError(f"{args.out} has done {state['step']} steps; raise --steps {args.steps} to go on")
    return state


def plain(args):                                           # the flags as a dict that JSON can hold
    return json.loads(json.dumps(vars(args), default=str))


def at_least(low, below=math.inf):
    """A type for argparse: a number of the type of `low`, in [low, below)."""
    def number(text):
        if not low <= type(low)(text) < below:
            top = f" and below {below}" * (below < math.inf)
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}{top}")
        return type(low)(text)
    return number


def check_common(p, args):
    """The checks that all training scripts share: through parser.error, before anything is built."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    args.micro_batch = max(1, args.batch // world) if args.micro_batch is None else args.micro_batch
    unit = args.micro_batch * world
    if args.batch % unit:
        p.error(f"--batch {args.batch} must be a multiple of --micro_batch {args.micro_batch} x {world} "
                f"processes; try --batch {max(1, round(args.batch / unit)) * unit}")
    last = Path(args.out) / "last.pt"
    if args.resume and not last.exists():
        p.error(f"--resume needs {last}, which does not exist; leave the flag out to start a run")
    if args.init and not args.resume and Path(args.init).resolve() == last.resolve():
        p.error(f"--init {args.init} is what this run would write; name another --out")
    if last.exists() and not (args.resume or args.overwrite):
        p.error(f"{last} exists; add --resume to go on, --overwrite to start anew, or name another --out")


def git_commit():
    """Short hash of the commit that is checked out, or unknown, without a repository or git."""
    return subprocess.run("git rev-parse --short HEAD", shell=True, cwd=Path(__file__).resolve().parent,
                          text=True, capture_output=True).stdout.strip() or "unknown"


class Log:
    """Progress bar on a terminal, plain lines in a file, same keys in OUT/log.jsonl; only rank 0 writes."""
    def __init__(self, args, rank, device, start, parameters):
        self.steps, self.batch, self.last_step, self.last_time = args.steps, args.batch, start, time.time()
        path = Path(os.devnull if rank else f"{args.out}/log.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not start and rank == 0:                        # killed before its first save, a run must not
            (path.parent / "last.pt").unlink(missing_ok=True)          # resume the one that it overwrites
        rows = path.read_text().splitlines() if start and path.exists() else []
        rows = [r + "\n" for r in rows if r.endswith("}") and json.loads(r).get("step", 0) <= start]
        self.file = open(path, "w", buffering=1)                       # line by line
        self.file.writelines(rows)                   # but for what a killed run logged beyond its checkpoint
        self.screen, self.wandb = self.file if rank else sys.stdout, None
        if args.wandb and rank == 0:
            import wandb
            self.wandb = wandb.init(project=args.wandb, config=plain(args))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        self.write(dict(args=plain(args), commit=git_commit(), torch=torch.__version__, device=name,
                        python=platform.python_version(), parameters=parameters, resumed_at=start))
        self.bar = tqdm(total=args.steps, initial=start, disable=bool(rank) or None, dynamic_ncols=True)
        self.say(f"{parameters / 1e6:.1f} M parameters on {name}, writing to {args.out}")

    def say(self, line):
        tqdm.write(line, file=self.screen)
        self.screen.flush()

    def write(self, record):
        self.file.write(json.dumps(record) + "\n")
        if self.wandb and "step" in record:
            self.wandb.log(record, step=record["step"])

    def step(self, step, loss, grad, lr, **more):
        """Report after `step` steps; loss, grad: means over processes already; more: only to the file."""
        rate = (step - self.last_step) * self.batch / max(time.time() - self.last_time, 1e-9)
        eta = (self.steps - step) * self.batch / rate / 3600
        import resource                                                # not on every platform
        gib = torch.cuda.max_memory_allocated() / 2 ** 30 or resource.getrusage(0).ru_maxrss / 2 ** 20
        self.bar.update(step - self.bar.n)
        self.write(dict(step=step, loss=loss, grad=grad, lr=lr, img_per_s=rate, gib=gib, eta_h=eta, **more))
        self.say(f"step {step}/{self.steps} | loss {loss:.4f} | grad {grad:.2f} | lr {lr:.1e} | "
                 f"{rate:.0f} img/s | {gib:.1f} GiB | eta {eta:.2f} h")
        self.last_step, self.last_time = step, time.time()

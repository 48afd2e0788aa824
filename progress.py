"""The log of a run and what it records: progress, memory, the commit."""
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import run_flags
import runtime
import speed
import storage


def git_commit():
    """Short hash of the commit that is checked out, or "unknown" without a repository or git."""
    folder = Path(__file__).resolve().parent
    result = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=folder,
                            text=True, capture_output=True)
    return result.stdout.strip() or "unknown"


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


# ---------------------------------------------------------------------------- progress bars
def format_time(seconds):
    """A duration as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def progress_bar(items, description, total=None):
    """The items under a bar with the time left, on rank 0 if that has a terminal.

    items: an iterable; or a number, then the bar is to be updated. total: number of items of an
    iterable that does not say so.
    """
    disable = True if runtime.process_rank() > 0 else None     # None: tqdm looks for a terminal
    options = dict(desc=description, leave=False, disable=disable, dynamic_ncols=True)
    if isinstance(items, int):
        return tqdm(total=items, **options)
    return tqdm(items, total=total, **options)


# ---------------------------------------------------------------------------- log
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
        self.compiles = args.compile
        self.flops = 0
        self.peak_flops = speed.peak_flops(device, args.dtype)
        self.bar = None
        if rank == 0:
            self.forget_later_steps(start)
        self.wandb = None
        if args.wandb and rank == 0:
            self.wandb = start_wandb(args)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        self.write(dict(args=run_flags.flags_as_dict(args), commit=git_commit(),
                        torch=torch.__version__, device=name, peak_flops=self.peak_flops,
                        tf32=runtime.uses_tf32(device),
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
        storage.write_whole(self.path, lambda f: f.write(kept))

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
        self.unwritten += storage.to_json(record) + "\n"
        try:
            storage.append_whole(self.path, self.unwritten)
            self.unwritten = ""
        except OSError as error:
            if is_first_failure:
                self.say(f"warning: {self.path} could not be written: {error.strerror}; training "
                         f"goes on, and tries again")
        if self.wandb and "step" in record:
            self.wandb.log(record, step=record["step"])

    def first_steps(self, step):
        """Say how long the first two steps took: the next line may be far away.

        The first of them waits for the loader workers, the second shows the pace, unless it may
        compile once more, for batches of other shapes.
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
            line = f"the first step took {self.first_seconds:.1f} s, the second {pace:.1f} s"
            if self.compiles:
                line += ", in which blocks were compiled; the next ones are faster"
            else:
                line += (f"; at its pace the other {self.steps - step} take "
                         f"{format_time(pace * (self.steps - step))}")
            self.say(line)
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
        throughput = f"{images_per_second:.0f} img/s"
        if mfu is not None:
            throughput += f" | {100 * mfu:.1f}% MFU"
        self.say(f"step {step}/{self.steps} | loss {loss:.4f} | grad {grad_norm:.2f} | lr {lr:.1e} "
                 f"| {throughput} | {gib:.1f} GiB | {format_time(seconds_left)} left")
        self.flops = 0
        self.last_step, self.last_time = step, time.time()

    def flops_utilisation(self, seconds):
        """MFU of the last seconds: the FLOPs of the model as a fraction of those that matmuls alone
        could have computed in that time. None: the device's peak or the FLOPs are not known.

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
            storage.write_whole(path, lambda f: picture.save(f, "png"))
        except (ValueError, OSError) as error:
            self.warn(f"{runtime.one_line(error)}; training goes on without a preview of step "
                      f"{step}")


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
        return wandb.init(project=args.wandb, config=run_flags.flags_as_dict(args))
    except wandb.Error as error:                       # such as a missing login
        raise ValueError(f"--wandb {args.wandb}: {error}; run wandb login, or leave the flag "
                         f"out") from error

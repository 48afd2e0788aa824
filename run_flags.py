"""Flags that all training scripts share, how they are parsed and checked, and what a resumed run
keeps of them.
"""
import argparse
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import sys
from pathlib import Path

import torch

import runtime
import storage


# ---------------------------------------------------------------------------- parser
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


# ---------------------------------------------------------------------------- flags of a run
def default_workers():
    """Loader processes of each process: where a GPU computes, its part of the cores, at most 12; on
    CPUs, whose cores compute, 1.
    """
    if not torch.cuda.is_available():
        return 1
    return min(12, runtime.cores_of_process())


RUN_DEFAULTS = dict(seed=0, workers=default_workers(), batch=64, micro_batch=None,
                    dtype=runtime.DTYPE, resume=False, auto_resume=False, overwrite=False,
                    wandb=None)


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
                        "started again by the same command (torchrun --max_restarts, queues). "
                        "A complete run ends at once, without an error.")
    p.add_argument("--overwrite", action="store_true", default=None,
                   help="Start anew although OUT/last.pt exists.")
    p.add_argument("--wandb", metavar="PROJECT",
                   help="Project of Weights & Biases to log to as well (pip install wandb).")


# ---------------------------------------------------------------------------- resumed runs
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
NOT_INHERITED = ("out", "resume", "auto_resume", "overwrite")


def flags_of_run(out, script, key, parser):
    """The flags in OUT/last.pt, for --resume, as a dict.

    script, key: the script whose checkpoint it must be, and a key that only these have. parser: of
    its flags. Raises ValueError if there is no such checkpoint, or its flags are malformed.
    """
    path = Path(out) / "last.pt"
    if not path.exists():
        raise ValueError(f"--resume needs {path}, which does not exist on {platform.node()}; leave "
                         f"the flag out to start a run (of several nodes, all read this file)")
    state = storage.load_checkpoint(path)
    if "args" not in state or key not in state:
        raise ValueError(f"{path} is no checkpoint of {script}; name the --out of one of its runs")
    parser.check_values(state["args"], path)
    flags = dict(state["args"])
    for name in NOT_INHERITED:
        flags.pop(name, None)
    # Older checkpoints of x0-prediction were trained with another weight of the loss by time.
    if flags.pop("balance", None) is not None and flags.get("prediction") == "x0":
        raise ValueError(f"{path} was trained with another weight of the loss by time (--balance), "
                         f"which no longer exists; start from its weights with --init {path}")
    if flags.get("decay_end") == flags["steps"]:       # a schedule follows --steps if it is raised
        del flags["decay_end"]
    if flags["batch"] % (flags["micro_batch"] * runtime.world_size()):
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
    of_ranks = runtime.gather((platform.node(), step, flags, data))
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


# ---------------------------------------------------------------------------- defaults and checks
def default_warmup(steps):
    """Steps of warm-up: 100, or a tenth of a run of less than 1000 steps."""
    return min(100, steps // 10)


def default_micro_batch(batch):
    """Micro-batch that needs no accumulation: the images of one process."""
    return max(1, batch // runtime.world_size())


def check_run_flags(args):
    """Raise ValueError for flags of a run that contradict each other or the files that are
    there.
    """
    storage.check_out(args.out)
    if Path(args.out).is_file():
        raise ValueError(f"--out {args.out} is a file; name a folder")
    world = runtime.world_size()
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
    if last.is_dir():
        raise ValueError(f"{last} is a folder, and the checkpoint is to be written there; delete "
                         f"it, or name another --out")
    if args.init and not args.resume and Path(args.init).resolve() == last.resolve():
        raise ValueError(f"--init {args.init} is what this run would write; name another --out")
    if last.exists() and not args.resume and not args.overwrite:
        raise ValueError(f"{last} exists; add --resume to go on, --overwrite to start anew, or "
                         f"name another --out")


# What it means that a run ends before the step of a flag.
IF_NOT_REACHED = {"warmup": "the learning rate rises to the end",
           "llm_start": "prompts never condition the DiT, and the model will not follow them"}


def warn_of_flags(log, args, resumed):
    """Warn if the run ends before something that its flags set for a later step, or if it goes on
    with other noise than one process would. resumed: the checkpoint, or None.
    """
    if resumed and resumed["args"]["micro_batch"] != args.micro_batch:
        log.warn(f"with {runtime.world_size()} processes --micro_batch "
                 f"{resumed['args']['micro_batch']} becomes {args.micro_batch}, so that the noise "
                 f"differs from here on")
    for name, effect in IF_NOT_REACHED.items():
        step = getattr(args, name, 0)
        if step >= args.steps:
            log.warn(f"--{name} {step} is not below --steps {args.steps}: {effect}")

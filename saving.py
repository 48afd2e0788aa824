"""When a run writes a checkpoint, which checkpoint is sane, and what a resumed run reads."""
import math
import os
import shlex
import shutil
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import runtime
import storage


# ---------------------------------------------------------------------------- resuming
def load_resumable(args):
    """The checkpoint OUT/last.pt of --resume. Raises ValueError if its run is complete.

    With --auto_resume, a complete run ends the script as if it had just been completed.
    """
    path = Path(args.out) / "last.pt"
    state = storage.load_checkpoint(path)
    if type(state.get("step")) is not int:
        raise ValueError(f"{path} has step {state.get('step')!r}, not a number; start another run")
    if not isinstance(state.get("opt"), (dict, list)):
        raise ValueError(f"{path} has no optimizer; start another run from its weights by --init")
    if state["step"] >= args.steps and args.auto_resume:
        if runtime.process_rank() == 0:
            print(f"{args.out} has done its {state['step']} steps; nothing is left to do")
        raise SystemExit(0)
    if state["step"] >= args.steps:
        raise ValueError(f"{args.out} has done {state['step']} steps; raise --steps {args.steps} "
                         f"to go on")
    return state


ADAM_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}         # that torch keeps of a parameter


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


# ---------------------------------------------------------------------------- sane weights
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


# ---------------------------------------------------------------------------- saving
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
            # Rank 0 alone knows how its thread ended.
            self.is_behind = runtime.gather(self.is_behind)[0]
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
        problem = runtime.gather(problem)[0]
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
            storage.save_checkpoint(self.last, step=done, **state)
        except OSError as error:
            self.drop_previous()                       # it is the same as the last one
            return runtime.one_line(error)
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
        source = runtime.stop_request.name or "another process"
        self.log.say(f"stopped by {source} {step}; {advice}")

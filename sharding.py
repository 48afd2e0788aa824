"""Stage 3 on many GPUs: a model that no GPU holds alone, and checkpoints that none writes alone.

    python sharding.py --ckpt runs/t2i/last.pt --out model.pt       one file, to sample or evaluate

Weights, gradients, EMA and moments of the optimizer are cut into as many pieces as a node has
processes (FSDP2); nodes hold copies of one another (hybrid sharding). Before a block runs, its
weights are gathered from the processes of the node, which have the fast links; after it, they are
freed. Gradients are summed into pieces within a node, and the pieces between nodes.

A checkpoint of such a run is OUT/last.pt, with everything but the weights and the moments, and the
folder that it names, OUT/weights_STEP/, into which each process has written its own pieces.
Sources: FSDP, arXiv 2304.11277; torch.distributed.fsdp.fully_shard; torch.distributed.checkpoint.
"""
import contextlib
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import run_flags
import runtime
import saving
import storage


# ---------------------------------------------------------------------------- weights
def make_mesh(device):
    """The processes as a mesh: nodes x processes of a node, or a line if there is one node.

    Raises ValueError if torchrun started unequal numbers of processes on the nodes.
    """
    world = runtime.world_size()
    in_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % in_node:
        raise ValueError(f"--shard needs the same number of processes on every node; {world} in "
                         f"all are no multiple of the {in_node} of this one")
    if world == in_node:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // in_node, in_node),
                            mesh_dim_names=("replicate", "shard"))


def shard(module, mesh, dtype, blocks, kept=()):
    """Cut the parameters of a module into pieces, in place: they are DTensors from then on.

    mesh: of make_mesh(). dtype: "bf16" or "fp32". With bf16, the weights of blocks are rounded
        before they are gathered, as autocast does afterwards; gradients are summed in fp32.
    blocks: parts of the module whose weights are freed after the forward pass, and gathered again
        for the backward pass.
    kept: blocks whose weights stay in between, as those of a block that runs several times should.
    """
    policy = MixedPrecisionPolicy()
    if dtype == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    norms = []                                         # they stay in fp32, and are gathered apart
    for block in [*blocks, *kept]:
        norms += [layer for layer in block.modules() if isinstance(layer, nn.RMSNorm)]
    if norms:
        fully_shard(norms, mesh=mesh, reshard_after_forward=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for block in kept:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(module, mesh=mesh)                     # the rest: embeddings, connector, last layer


def give_memory(module, device):
    """Give memory on a device to a module of the device meta. Its values are yet to be copied."""
    for name, _ in module.named_buffers():             # else nobody would fill it in
        assert name in module.state_dict(), f"buffer {name} is not part of the state dict"
    module.to_empty(device=device)


@torch.no_grad()
def broadcast_weights(module, whole, device):
    """Copy the weights of a whole module on rank 0 into a sharded one, a tensor at a time.

    whole: the same module on the CPU; None on the other processes.
    """
    state = whole.state_dict() if whole is not None else {}
    for name, own in module.state_dict().items():
        if whole is not None:
            value = state[name].to(device)
        else:
            value = torch.empty(own.shape, dtype=own.dtype, device=device)
        dist.broadcast(value, 0)
        if isinstance(own, DTensor):                   # src_data_rank: all have the value already
            value = distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
        own.copy_(value)


@torch.no_grad()
def copy_weights(target, source):
    """Copy the weights of a sharded module into another that is sharded alike: each process its
    pieces.
    """
    for own, value in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        own.copy_(value)


# ---------------------------------------------------------------------------- state
def empty_moments(optimizer):
    """Give moments of 0 to an AdamW that has made no step yet."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = dict(
                step=torch.zeros((), device=parameter.device),
                exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))


def training_state(module, ema, optimizer):
    """What goes into the folder of a checkpoint: names such as "ema.dit.pos_embed" -> tensors.

    They are the tensors of the module, the EMA and the optimizer themselves, of which this process
    has its pieces. ema: may be the module itself.
    """
    state = {}
    for name, value in module.state_dict().items():
        state[f"model.{name}"] = value
    if ema is not module:
        for name, value in ema.state_dict().items():
            state[f"ema.{name}"] = value
    for name, parameter in module.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():      # none if frozen
            state[f"opt.{name}.{moment}"] = value
    return state


def not_finite(state):
    """Name of a tensor of which some process has a piece that is not finite, or None.

    All processes get the same answer.
    """
    pieces = []
    for name, value in state.items():
        pieces.append((name, value.to_local() if isinstance(value, DTensor) else value))
    return first(runtime.gather(saving.first_not_finite(pieces)))


def first(values):
    """The first value that is not None, or None."""
    return next((value for value in values if value is not None), None)


# ---------------------------------------------------------------------------- reading
class SafeUnpickler(pickle.Unpickler):
    """Reads the index of a folder, in which nothing but the classes of an index may stand."""
    ALLOWED = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch": {"Size", "float32"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},        # of Python 3.13
    }

    def find_class(self, module, name):
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an index")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """A FileSystemReader that runs no code which somebody put into the files."""
    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as f:
            return SafeUnpickler(f).load()


def read_index(folder):
    """The shapes of the tensors in the folder of a checkpoint: name -> torch.Size.

    Raises FileNotFoundError if there is no such folder, ValueError if its index cannot be read.
    """
    if not (Path(folder) / ".metadata").is_file():
        raise FileNotFoundError(f"{folder} does not exist, or is not complete; it has the weights "
                                f"of the checkpoint beside it: copy both")
    try:
        index = Reader(folder).read_metadata().state_dict_metadata
        return {name: entry.size for name, entry in index.items()}
    except Exception as error:             # pickle raises a dozen kinds
        raise ValueError(f"{folder} has no index that can be read safely ({type(error).__name__}: "
                         f"{error}); copy the folder again") from error


def read_into(state, folder):
    """Fill the tensors of training_state() with those in a folder, whatever the number of processes
    that wrote it.

    Raises FileNotFoundError, and ValueError if names or shapes are not the same.
    """
    stored = read_index(folder)
    problems = [f"missing {name}" for name in state if name not in stored]
    problems += [f"unexpected {name}" for name in stored if name not in state]
    for name, value in state.items():
        if name in stored and stored[name] != value.shape:
            problems.append(f"{name}: shape {tuple(stored[name])}, not {tuple(value.shape)}")
    if problems:
        first_problems = "\n  ".join(problems[:20])
        raise ValueError(f"{folder} does not fit this run; resume with the flags that it was "
                         f"started with. {len(problems)} names:\n  {first_problems}")
    load(state, folder)


def load(state, folder):
    """Fill tensors, or the pieces of them that this process has, with those of their names in a
    folder. Raises ValueError if it cannot be read, or a tensor is not finite.
    """
    # That there is one process alone is as it should be where a checkpoint is converted.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
    try:
        dcp.load(state, storage_reader=Reader(folder), no_dist=not dist.is_initialized())
    except CheckpointException as failure:
        raise ValueError(f"{folder} can't be read ({cause_of(failure)}); copy it again, or start "
                         f"another run") from failure
    name = not_finite(state)
    if name is not None:
        raise ValueError(f"{folder}: {name} is not finite; copy it again, or start another run")


def cause_of(failure):
    """What the first process that failed says of a CheckpointException, in a line."""
    error, _ = next(iter(failure.failures.values()))
    return runtime.one_line(error)


# ---------------------------------------------------------------------------- writing
class Writing(NamedTuple):
    """A checkpoint of which the folder is being written."""
    step: int
    is_stop: bool
    folder: Path
    small: dict              # what last.pt is to contain
    future: object           # of dcp.async_save


class Checkpoints:
    """Writes checkpoints of sharded weights, while training goes on; used as saving.Checkpoints.

    The processes copy their pieces and write them, each in a thread, to OUT/weights_STEP/. When all
    are done, saving.Checkpoints writes OUT/last.pt, which names this folder. So last.pt always
    names a complete folder; what a process that is killed leaves half-written is named by none.
    Folders that neither last.pt nor previous.pt names are removed.
    """
    def __init__(self, args, rank, log, lock, in_background=False):
        self.files = saving.Checkpoints(args, rank, log, lock, in_background)
        self.out, self.steps, self.log_every = Path(args.out), args.steps, args.log_every
        self.rank, self.log = rank, log
        self.group = dist.new_group(backend="gloo")    # of the threads: training has its own
        self.writing = None
        self.newest = None                             # the last folder that is complete
        self.is_behind = False                         # the last folder could not be written
        storage.check_shared(self.out, is_folder=True)

    def begin(self, start):
        """Remove what killed processes left half-written, and at step 0 checkpoints of other
        runs.
        """
        self.files.begin(start)
        if self.rank == 0:
            self.newest = folder_of(self.files.last)
        self.remove_old()

    def check(self, done, *grad_norms, loss=None):
        """As of saving.Checkpoints. Raises ValueError if the run has diverged."""
        self.files.check(done, *grad_norms, loss=loss)
        if self.writing is not None:
            num_ready = runtime.all_sum(torch.tensor(float(self.writing.future.done())))
            if num_ready == runtime.world_size():
                self.finish()
        self.remove_old()

    def is_due(self, done, is_stop=False):
        """Whether to write a checkpoint after step `done`, the same on all processes."""
        if self.files.is_due(done, is_stop):
            return True
        if not self.is_behind or done % self.log_every != 0:
            return False
        self.files.read_norms()
        return self.files.updates.left_out == 0

    def save(self, done, is_stop, pieces, **small):
        """Begin to write a checkpoint after step `done`; at the end of a run, wait for it.

        pieces: of training_state(). small: what else the checkpoint is to contain.
        If it fails, as on a full disk, the run goes on from memory, and tries again after a line of
        the log. Raises OSError if it fails when the run ends.
        """
        if self.writing is not None:
            self.finish()
        is_end = is_stop or done == self.steps
        weights = {name: value for name, value in pieces.items() if not name.startswith("opt.")}
        name = not_finite(weights)
        if name is not None:
            self.fail(f"step {done} is not saved, since {name} is not finite", is_end)
            return
        folder = self.out / f"weights_{done:07d}"
        future = dcp.async_save(pieces, checkpoint_id=folder, process_group=self.group)
        self.writing = Writing(done, is_stop, folder, small, future)
        if is_end:
            self.finish()
            self.remove_old()

    def finish(self):
        """Wait until all processes have written their pieces, then write last.pt."""
        writing, self.writing = self.writing, None
        problem = None
        try:
            writing.future.result()
        except CheckpointException as failure:
            problem = f"{writing.folder} could not be written: {cause_of(failure)}"
        problem = first(runtime.gather(problem))
        if problem is not None:
            self.fail(problem, writing.is_stop or writing.step == self.steps)
            return
        self.is_behind = False
        self.newest = writing.folder
        # What saving.Checkpoints takes for weights and moments lies in the folder.
        self.files.save(writing.step, writing.is_stop, model={}, opt={},
                        weights=writing.folder.name, **writing.small)

    def fail(self, problem, is_end):
        """Say what prevented a checkpoint; raise it as OSError if the run ends without one."""
        self.is_behind = True
        if is_end:
            self.remove_old()                          # half a folder would only take room
            raise OSError(problem)
        self.log.say(f"warning: {problem}; training goes on, and tries again")

    def remove_old(self):
        """Remove the folders of checkpoints that were replaced, or never finished."""
        in_use = []
        if not self.files.is_behind:                   # else no last.pt will ever name it
            in_use.append(self.newest)                 # last.pt may be about to name it
        if self.writing is not None:
            in_use.append(self.writing.folder)
        if self.rank == 0:
            remove_unnamed(self.out, in_use)

    def say_stopped(self):
        """Say how to go on, as the last line of a run that was asked to stop."""
        self.files.say_stopped()


def folder_of(path):
    """Folder that a checkpoint names; None: there is no checkpoint, or it is one file.

    Raises ValueError if the checkpoint is damaged.
    """
    if not Path(path).exists():
        return None
    checkpoint = storage.load_checkpoint(path)
    if "weights" not in checkpoint:
        return None
    name = checkpoint["weights"]
    if not is_folder_name(name):
        raise ValueError(f"{path} has its weights in {name!r}, which is no name of a folder "
                         f"beside it; copy it again, or start another run")
    return Path(path).parent / name


def is_folder_name(name):
    """Whether a name is that of a folder that Checkpoints wrote."""
    return isinstance(name, str) and re.fullmatch(r"weights_\d{7,}", name) is not None


def remove_unnamed(out, in_use=()):
    """Remove the folders in OUT that no checkpoint names, but for those in use."""
    folders = [path for path in Path(out).glob("weights_*")
               if is_folder_name(path.name) and path not in in_use]
    if not folders:
        return
    named = [folder_of(Path(out) / "last.pt")]
    with contextlib.suppress(ValueError):              # a copy of last.pt may have been cut short
        named.append(folder_of(Path(out) / "previous.pt"))
    for folder in folders:
        if folder not in named:
            shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------- one file
def how_to_convert(path):
    """What to say where a checkpoint of one file is needed."""
    return (f"{path} has its weights in a folder, in the pieces that several processes wrote; make "
            f"one file of them: python sharding.py --ckpt {path} --out model.pt")


DEFAULTS = dict(ckpt="runs/t2i/last.pt", out="model.pt")


def parse_args(argv=None):
    p = run_flags.Parser(__doc__, DEFAULTS)
    p.add_argument("--ckpt", default=DEFAULTS["ckpt"],
                   help="Checkpoint of train_t2i.py --shard, beside the folder of its weights.")
    p.add_argument("--out", default=DEFAULTS["out"],
                   help="File for weights and EMA, without the optimizer; memory for both is "
                        "needed.")
    return p.parse(argv, lambda args: args, check_flags)


def check_flags(args):
    """Raise ValueError for flags that cannot be used, before any work is done."""
    storage.check_out(args.out)
    if Path(args.out).is_dir():
        raise ValueError(f"--out {args.out} is a folder; name a file")
    storage.check_suffix(args.out, (".pt", ".pth"))
    if Path(args.out).resolve() == Path(args.ckpt).resolve():
        raise ValueError(f"--out {args.out} is the checkpoint itself; name another file")


def main(args):
    checkpoint = storage.load_checkpoint(args.ckpt)
    folder = folder_of(args.ckpt)
    if folder is None:
        raise ValueError(f"{args.ckpt} is one file already; use it as it is")
    state = {}
    for name, shape in read_index(folder).items():
        if not name.startswith("opt."):
            state[name] = torch.empty(shape)
    load(state, folder)

    whole = {key: checkpoint[key] for key in checkpoint.keys() - {"model", "opt", "weights"}}
    for name, value in state.items():
        module, name = name.split(".", 1)              # "model" or "ema"
        whole.setdefault(module, {})[name] = value
    with storage.locked(args.out):
        storage.save_checkpoint(args.out, **whole)
    print(f"wrote {args.out}, step {checkpoint['step']}")


if __name__ == "__main__":
    runtime.run(main, parse_args)

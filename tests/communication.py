"""What the processes of train_t2i.py --shard send to one another in a step, counted on one process.

    python tests/communication.py                       8 processes on a node, two micro-batches
    python tests/communication.py --processes 16 --batch 16 --width 256      flags of train_t2i.py

A training runs with torch's fake process group, which pretends to be connected to others and sends
nothing: values are wrong, shapes are not. Counted are the collectives of the first step, and the
bytes of the whole tensors that they gather, or add up in pieces.
"""
import argparse
import contextlib
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runtime  # noqa: E402
import saving  # noqa: E402
import sharding  # noqa: E402
import train_t2i  # noqa: E402

NAMES = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter",
         "allreduce_": "all-reduce"}


class StopTraining(Exception):
    pass


class Traffic(NamedTuple):
    """What is sent in a step; keys such as ("all-gather", torch.bfloat16)."""
    calls: Counter
    bytes: Counter


class Sizes(NamedTuple):
    """Numbers of parameters."""
    dit: int                 # in blocks of the DiT
    llm: int                 # in layers of the language model
    all: int


class Counting(TorchDispatchMode):
    """Counts the collectives of tensors of more than 1 KB: the others are of losses and flags."""
    def __init__(self):
        super().__init__()
        self.traffic = Traffic(Counter(), Counter())

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = NAMES.get(operation.name().removeprefix("c10d::"))
        if name is not None:
            leaves = torch.utils._pytree.tree_leaves(args)
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            largest = max(tensors, key=lambda tensor: tensor.nbytes)   # the other is a piece of it
            if largest.nbytes > 1024:
                self.traffic.calls[name, largest.dtype] += 1
                self.traffic.bytes[name, largest.dtype] += largest.nbytes
        return operation(*args, **(kwargs or {}))


def keep(choice):
    """sharding.shard(), but for which weights stay gathered until the backward pass is done.

    choice: "llm", as it is; "all" blocks or "none" of them.
    """
    original = sharding.shard

    def shard(module, mesh, dtype, blocks, kept):
        if choice == "all":
            blocks, kept = [], [*blocks, *kept]
        elif choice == "none":
            blocks, kept = [*blocks, *kept], []
        original(module, mesh, dtype, blocks, kept)

    return shard


def count_step(processes, in_node, flags, choice="llm"):
    """The Traffic of the first step of a training, and the Sizes of its T2I.

    processes: in all. in_node: on each node. flags: of train_t2i.py, texts or numbers.
    choice: see keep().
    """
    counting = Counting()
    sizes = []
    training_steps = train_t2i.training_steps

    def counted_steps(*inputs):                        # what is sent before belongs to no step
        with counting:
            yield from training_steps(*inputs)

    def end_of_step(optimizers, t2i, *rest):
        sizes.append(Sizes(num_parameters(*t2i.dit.blocks), num_parameters(*t2i.llm.layers),
                           num_parameters(t2i)))
        raise StopTraining

    environment = dict(RANK="0", WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(in_node))
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(os.environ, environment))
        for module, name, replacement in (
                (runtime, "gather", lambda value: [value] * processes),
                (runtime, "optimizer_step", end_of_step),
                (sharding, "shard", keep(choice)),
                (sharding, "Checkpoints", saving.Checkpoints),        # the other has its own group
                (train_t2i, "training_steps", counted_steps)):
            stack.enter_context(mock.patch.object(module, name, replacement))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        stack.callback(dist.destroy_process_group)
        stack.enter_context(contextlib.suppress(StopTraining))
        args = train_t2i.parse_args([*map(str, flags), "--shard", "--out", out])
        train_t2i.main(args)
    return counting.traffic, sizes[0]


def num_parameters(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--processes", type=int, default=8, help="Processes in all.")
    p.add_argument("--in_node", type=int, default=8, help="Processes on each node.")
    p.add_argument("--keep", choices=("none", "llm", "all"), default="llm",
                   help="Blocks whose weights stay gathered until the backward pass is done.")
    return p.parse_known_args()


def main():
    args, flags = parse_args()
    defaults = ["--batch", 2 * args.processes, "--micro_batch", 1, "--workers", 0, "--dtype",
                "bf16", "--preview_every", 0]
    flags = [*defaults, *flags]
    traffic, sizes = count_step(args.processes, args.in_node, flags, args.keep)
    print(f"{sizes.all:,} parameters: {sizes.dit:,} in blocks of the DiT, {sizes.llm:,} in layers "
          f"of the language model")
    for (name, dtype), calls in sorted(traffic.calls.items(), key=str):
        megabytes = traffic.bytes[name, dtype] / 1e6
        print(f"{name} in {dtype}: {calls} calls, {megabytes:.2f} MB")


if __name__ == "__main__":
    main()

"""What every script needs around its loop. Run: python -m pytest tests/test_runtime.py"""
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import runtime
from conftest import torchrun
from runtime import LossByTime, MeanByGroup, split_numbers

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------- means for the log
def test_means_of_groups():
    means = MeanByGroup(3, CPU)
    means.add(torch.tensor([0, 2, 2]), torch.tensor([1.0, 3.0, 5.0]))
    mean, of_groups = means.means()
    assert mean == pytest.approx(3.0)
    assert of_groups == [1.0, None, 4.0]               # None: the group without a value


def test_values_of_weight_0_do_not_count():
    means = MeanByGroup(2, CPU)
    weight = torch.tensor([1.0, 0.0, 0.0])
    means.add(torch.tensor([0, 0, 1]), torch.tensor([2.0, 100.0, 100.0]), weight)
    mean, of_groups = means.means()
    assert mean == pytest.approx(2.0)
    assert of_groups == [2.0, None]


def test_values_add_up_until_they_are_read():
    means = MeanByGroup(2, CPU)
    means.add(torch.tensor([0, 1]), torch.tensor([1.0, 10.0]))
    means.add(torch.tensor([0]), torch.tensor([4.0]))
    mean, of_groups = means.means()
    assert mean == pytest.approx(5.0)                  # of three values, not of two groups
    assert of_groups == [2.5, 10.0]

    means.add(torch.tensor([1]), torch.tensor([7.0]))
    mean, of_groups = means.means()
    assert mean == pytest.approx(7.0)
    assert of_groups == [None, 7.0]


def test_without_any_value_the_mean_is_0():
    mean, of_groups = MeanByGroup(2, CPU).means()
    assert mean == 0
    assert of_groups == [None, None]


def test_loss_by_time_has_ten_intervals():
    loss_by_time = LossByTime(CPU)
    loss_by_time.add(torch.tensor([0.0, 0.05, 0.1, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    mean, of_intervals = loss_by_time.means()
    assert mean == pytest.approx(4.0)
    assert len(of_intervals) == 10
    assert of_intervals[0] == pytest.approx(2.0)       # t = 0 and 0.05
    assert of_intervals[1] == pytest.approx(5.0)       # t = 0.1
    assert of_intervals[9] == pytest.approx(7.0)       # t = 1 is in the last one
    assert of_intervals[2:9] == [None] * 7


def test_loss_by_time_takes_weights():
    loss_by_time = LossByTime(CPU)
    loss_by_time.add(torch.tensor([0.5, 0.5]), torch.tensor([2.0, 8.0]), torch.tensor([1.0, 0.0]))
    loss_by_time.add(torch.tensor([0.5]), torch.tensor([4.0]))
    mean, of_intervals = loss_by_time.means()
    assert mean == pytest.approx(3.0)
    assert of_intervals[5] == pytest.approx(3.0)


def test_losses_keep_no_graph():
    loss = torch.ones(3, requires_grad=True)
    loss_by_time = LossByTime(CPU)
    loss_by_time.add(torch.rand(3), loss)
    assert not loss_by_time.sums.requires_grad


# ---------------------------------------------------------------------------- processes
@pytest.mark.parametrize("n, batch, world", [(10, 3, 1), (10, 3, 2), (1, 8, 3), (24, 4, 3)])
def test_numbers_are_split_among_processes_without_loss(n, batch, world):
    parts = [split_numbers(n, batch, rank, world) for rank in range(world)]
    all_numbers = [number for part in parts for numbers in part for number in numbers]
    assert sorted(all_numbers) == list(range(n))
    assert max(len(numbers) for part in parts for numbers in part) <= batch


# ---------------------------------------------------------------------------- hardware
@pytest.mark.parametrize("capability, dtype", [((7, 0), "fp32"), ((7, 5), "fp32"),
                                               ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_gpus_before_ampere_compute_in_fp32(capability, dtype, monkeypatch):
    """A V100 (7.0) and a T4 (7.5) only emulate bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert runtime.default_dtype() == dtype


@pytest.mark.parametrize("world, device", [("1", "mps"), ("2", "cpu")])
def test_apple_gpus_are_used_by_single_processes(world, device, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert runtime.setup()[2].type == device


def test_memory_is_unknown_without_the_module_resource(monkeypatch):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "resource", None)
    assert runtime.peak_memory_gib(CPU) == 0.0


def test_macos_counts_memory_in_bytes(monkeypatch):
    on_linux = runtime.peak_memory_gib(CPU)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert runtime.peak_memory_gib(CPU) == pytest.approx(on_linux / 1024, rel=0.5)


# ---------------------------------------------------------------------------- words and numbers
@pytest.mark.parametrize("seconds, text", [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"),
                                           (100 * 3600, "100:00:00")])
def test_time_left_is_in_hours_minutes_and_seconds(seconds, text):
    assert runtime.time_left(seconds) == text


def test_json_has_null_for_numbers_that_are_not_finite():
    record = {"loss": float("nan"), "by_t": [1.0, float("-inf"), None], "more": {"a": (2, "x")}}
    text = runtime.to_json(record)
    assert text == '{"loss": null, "by_t": [1.0, null, null], "more": {"a": [2, "x"]}}'


@pytest.mark.parametrize("steps, warmup", [(4, 0), (60, 6), (1000, 100), (10 ** 6, 100)])
def test_warm_up_is_a_tenth_of_short_runs(steps, warmup):
    assert runtime.default_warmup(steps) == warmup


# ---------------------------------------------------------------------------- data that changed
OLD = {"": {"images": 16, "names": "a"}}


@pytest.mark.parametrize("now, told", [
    ({"": {"images": 17, "names": "b"}}, "--data had 16 images and has 17"),
    ({"": {"images": 16, "names": "b"}}, "--data has other names or labels for its 16 images"),
    ({}, "--data is gone"),
    ({**OLD, "b": {"images": 2, "names": "c"}}, "source b of --data was not there")])
def test_data_that_changed_since_the_checkpoint_are_told(now, told):
    assert told in runtime.describe_change({"data": OLD}, now, hold_out=0)
    with pytest.raises(ValueError, match=f"{told}.*would move into training"):
        runtime.describe_change({"data": OLD}, now, hold_out=3)


@pytest.mark.parametrize("resumed", [{"data": OLD}, {}, None], ids=["same", "older", "new run"])
def test_data_that_did_not_change_need_no_word(resumed):
    assert runtime.describe_change(resumed, OLD, hold_out=3) is None


# ---------------------------------------------------------------------------- one for all
def refuse():
    raise ValueError("there is no number")


def compute_on_rank_0(folder):
    """What a process of two sees: results, threads of torch, and the message of an error."""
    rank, _, _ = runtime.setup()

    def compute():
        return dict(rank=rank, threads=torch.get_num_threads())

    seen = runtime.on_rank_0(compute)
    try:
        runtime.on_rank_0(refuse)
    except ValueError as error:
        seen["error"] = str(error)
    seen["threads_afterwards"] = torch.get_num_threads()
    (folder / f"{rank}.json").write_text(json.dumps(seen))


def test_rank_0_computes_for_all_on_all_cores_and_its_errors_reach_all(tmp_path):
    torchrun(SimpleNamespace(main=compute_on_rank_0, parse_args=lambda argv: tmp_path))
    expected = dict(rank=0, threads=runtime.cores_of_machine(), error="there is no number",
                    threads_afterwards=1)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(runtime, "cores_of_machine", lambda: 16)
    assert runtime.cores_of_process() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert runtime.cores_of_process() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert runtime.cores_of_process() == 1

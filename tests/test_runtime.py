"""What every script needs around its loop. Run: python -m pytest tests/test_runtime.py"""
import pytest
import torch

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

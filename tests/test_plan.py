"""The plan on paper, tests/plan.py. Run: python -m pytest tests/test_plan.py"""
import json
import subprocess
import sys

import pytest

import plan
from conftest import ROOT


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_counts_are_those_of_a_real_run():
    # A fresh process: another may hold freed memory, which is then used without growing.
    code = "import json, plan; print(json.dumps(plan.check(8)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True,
                         text=True, check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    counted, measured = result["bytes"]
    assert counted == pytest.approx(measured, rel=0.03)
    counted, measured = result["flops"]
    assert counted == measured


@pytest.fixture(scope="module")
def kept():
    return plan.count(plan.SMALL)


def test_flops_of_a_dit_are_six_for_each_weight_and_token_and_those_of_attention(kept):
    tokens, width, depth = 256, 256, 8
    weights_of_block = 4 * width ** 2 + 3 * width * (8 * width // 3)   # attention, SwiGLU
    attention = 4 * tokens ** 2 * width * depth                        # of a forward pass
    expected = 6 * weights_of_block * depth * tokens + 3 * attention
    assert kept.flops == pytest.approx(expected, rel=0.03)           # the rest: embedders, adaLN


def test_recomputed_activations_cost_a_forward_pass_and_save_memory(kept):
    recomputed = plan.count(plan.SMALL, recompute=True)
    assert recomputed.flops / kept.flops == pytest.approx(4 / 3, rel=0.03)
    inputs_of_blocks = 8 * 256 * 256 * plan.FP32                       # depth, tokens, width
    assert inputs_of_blocks <= recomputed.saved < 1.6 * inputs_of_blocks
    assert recomputed.saved < kept.saved / 8


NETWORK = plan.Network(nodes=4, gpus=8, inside=400e9, between=100e9)
COUNTS = plan.Counts(parameters=10 ** 9, frozen=0, gathered=0, encoding=0, flops=3e12, saved=0)


def test_a_ring_carries_all_but_the_own_part():
    one_node = NETWORK._replace(nodes=1)
    assert one_node.gather_seconds(8e9, 1) == pytest.approx(7e9 / 400e9)
    assert one_node.reduce_seconds(8e9, 1) == pytest.approx(14e9 / 400e9)
    assert NETWORK.gather_seconds(8e9, 4) == pytest.approx(6e9 / 100e9)        # the links' time


def test_collectives_of_each_way_to_spread_a_model():
    """4 GB of fp32 gradients, 2 GB of bf16 weights, two micro-batches."""
    ddp = plan.network_seconds("DDP", COUNTS, NETWORK, 2)
    sharded = plan.network_seconds("sharded", COUNTS, NETWORK, 2)
    in_fp32 = plan.network_seconds("sharded", COUNTS, NETWORK, 2, gather_bytes=4)
    hybrid = plan.network_seconds("hybrid", COUNTS, NETWORK, 2)
    assert ddp == pytest.approx(2 * 4e9 * 3 / 4 / 100e9)
    assert sharded == pytest.approx((4 * 2e9 + 4e9) * 3 / 4 / 100e9)
    assert in_fp32 == pytest.approx((4 * 4e9 + 4e9) * 3 / 4 / 100e9)
    assert hybrid == pytest.approx((4 * 2e9 + 4e9) * 7 / 8 / 400e9 + 2 * 4e9 * 3 / 4 / 100e9)


def test_the_network_counts_where_computation_does_not_hide_it():
    fast, slow = NETWORK._replace(between=1e12), NETWORK._replace(between=1e10)
    settings = dict(batch=320, micro_batch=10, steps=100, flops_a_second=1e14, has_ema=False)
    hidden = plan.plan(COUNTS, "sharded", fast, overlap=0.6, **settings)
    exposed = plan.plan(COUNTS, "sharded", slow, overlap=0.6, **settings)
    assert hidden.step == hidden.compute == pytest.approx(0.3)         # 10 images of 3 TFLOP
    assert exposed.step == pytest.approx(0.3 + exposed.network - 0.6 * 0.3)
    assert exposed.gpu_days == pytest.approx(32 * 100 * exposed.step / 86_400)


def test_memory_of_a_gpu_holds_its_share_of_the_state():
    settings = dict(batch=320, micro_batch=10, steps=1, flops_a_second=1e14, overlap=0.6)
    ddp = plan.plan(COUNTS, "DDP", NETWORK, has_ema=True, **settings)
    sharded = plan.plan(COUNTS, "sharded", NETWORK, has_ema=False, **settings)
    hybrid = plan.plan(COUNTS, "hybrid", NETWORK, has_ema=False, **settings)
    assert ddp.memory == 20e9                          # weights, gradients, two means, EMA
    assert sharded.memory == 16e9 / 32
    assert hybrid.memory == 16e9 / 8
    assert ddp.checkpoint == 16e9

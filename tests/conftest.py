"""Shared by all tests: the checkout on sys.path, two threads, no network."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"             # no test may reach for a hub
ROOT = Path(__file__).resolve().parents[1]
SHIPPED = str(ROOT / "assets" / "tiny_dit.safetensors")
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402

import runtime  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def processes():
    runtime.setup()

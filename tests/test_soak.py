"""A soak of seconds. Run it for an hour by python tests/soak.py --minutes 60."""
import sys

import pytest

import soak

BAD = ("losses", "hangs", "processes left", "files left")


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for processes in /proc")
@pytest.mark.parametrize("name", ["train_dit", "sample, 2 processes"])
def test_a_run_interrupted_at_random_moments_loses_nothing(name):
    counts = soak.soak([name], minutes=0)[name]        # one run, to its end
    assert counts["runs"] == 1
    assert {column: counts[column] for column in BAD} == dict.fromkeys(BAD, 0)

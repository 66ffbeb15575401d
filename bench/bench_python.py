"""Python's share of a training step: what the trainer does beside compiled calls.

python -m pytest bench/bench_python.py
"""

import pytest

from bench import python_share, report

ROUNDS = {1: 9, 16: 2, 128: 1}  # by batch


@pytest.mark.parametrize("batch", ROUNDS)
def test_share(batch: int, request: pytest.FixtureRequest) -> None:
    request.config.stash[report.FOUND].python.append(python_share.measured(batch, ROUNDS[batch]))

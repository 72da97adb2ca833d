"""What does an outer loop keep of a round that never came through? Nothing that is applied again, here or after a resume."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dtrain.algorithm import Algorithm
from dtrain.algorithms.diloco import diloco_eager, diloco_pure
from dtrain.bucket import Bucket, whole
from dtrain.codec import State, by_name
from dtrain.link import Link, Peers
from dtrain.outer import nesterov
from dtrain.reduce import gather
from dtrain.topology import Round

N, LR, MU = 2, 0.25, 0.5
PATH = gather(by_name("identity", error_feedback=False))


def begun(make: str, x: Tensor) -> tuple[Algorithm, Bucket, State]:
    method = {"eager": diloco_eager, "pure": diloco_pure}[make](PATH, nesterov(LR, MU))
    bucket = Bucket(0, 0, whole("x", x), x, None, 0)
    algorithm = method(bucket.layout, Peers(0, N))
    return algorithm, bucket, algorithm.init(bucket)


def sent_and_lost(algorithm: Algorithm, bucket: Bucket, state: State) -> None:
    """The bytes fly, and the round is given up."""
    assert algorithm.send is not None
    next(algorithm.send(bucket, state, Link(0, N, Round(1.0, (), ()))))


@pytest.mark.parametrize("lost", [1, 2])
def test_eager_applies_its_own_share_once_and_no_more(lost: int) -> None:
    """All in halves of small integers, which fp32 has: g = own / n, u <- mu u + g, theta <- theta - lr (g + mu u)."""
    x = torch.zeros(4)
    algorithm, bucket, state = begun("eager", x)
    theta = u = 0.0
    for _ in range(lost):
        x.sub_(8.0)
        sent_and_lost(algorithm, bucket, state)
        g = 8.0 / N
        u = MU * u + g
        theta -= LR * (g + MU * u)
        assert x.tolist() == [theta] * 4
    sent_and_lost(algorithm, bucket, state)  # without progress there is momentum alone
    assert x.tolist() == [theta - LR * MU * MU * u] * 4


def test_pure_applies_no_delta_that_is_an_islands_own() -> None:
    x = torch.zeros(4)
    algorithm, bucket, state = begun("pure", x)
    for so_far in (-8.0, -16.0, -24.0):
        x.sub_(8.0)
        sent_and_lost(algorithm, bucket, state)
        assert x.tolist() == [so_far] * 4, "it goes on where it is"
    assert state["anchor"].tolist() == [0.0] * 4

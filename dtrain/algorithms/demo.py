"""Decoupled momentum: islands exchange what their momenta have most of, and step by its signs.

DeMo (Peng et al. 2024, arXiv 2411.19870): each step, C the K largest coefficients of each chunk's cosine transform,
    m_i <- beta m_i + g_i;   q_i = C(m_i);   m_i <- m_i - q_i;   theta <- theta - lr (sign(sum_i q_i) + decay theta).
The momentum m is what error feedback with decay beta keeps, so codec, error_feedback and feedback_decay say C and beta, and any
other C may stand there; one that loses nothing leaves no momentum. The sum is of all islands, one that did not send a coefficient
counting 0: its sign is that of the mean. (The paper's mean is of those that sent one, which weighs what one island alone sends as
much as what all do.)"""

from __future__ import annotations

from collections.abc import Iterator

from dtrain.algorithm import Algorithm, Method
from dtrain.bucket import Bucket, Layout
from dtrain.codec import State
from dtrain.link import Link, Peers
from dtrain.reduce import Reduce


def demo(reduce: Reduce) -> Method:
    def bind(layout: Layout, peers: Peers) -> Algorithm:
        path = reduce(layout, peers)

        def init(b: Bucket) -> State:
            return path.init(b.x.device)

        def grad(b: Bucket, state: State, link: Link) -> Iterator[None]:
            assert b.g is not None
            yield from path.run(b.g, b.g, state, link)
            b.g.sign_()

        return Algorithm(init=init, grad=grad)

    return bind

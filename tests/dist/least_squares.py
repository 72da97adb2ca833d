"""By how much may two runs differ that sum the same gradients in another order? A problem for which the bound can be derived.

The model is linear in its parameters and the loss is a mean square, so a step of SGD is an affine map, and with
lr * lambda_max < 2 it brings no two models further apart; averaging islands does not either. What two runs differ by is then no
more than the sum of what each step and each round rounds off.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

INPUTS = 5
"""Four features and the bias."""
NUMEL = 5
BATCH = 16
LR = 0.05
"""lambda_max <= trace of the Hessian <= 2 * INPUTS for features within [-1, 1], so lr * lambda_max <= 0.5."""
LARGEST = 1.0
"""No parameter may grow beyond it (the loops check); targets and features lie within [-1, 1]."""


class TwoLinear(nn.Module):
    """Three parameters, so that there are buckets for two ranks to share."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 1)
        self.b = nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x[:, :2]) + self.b(x[:, 2:])


def make_model() -> TwoLinear:
    torch.manual_seed(5)
    model = TwoLinear()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5)
    return model


def batch(island: int, step: int) -> tuple[Tensor, Tensor]:
    """BATCH samples; the islands' data pull in different directions."""
    draw = torch.Generator().manual_seed(1000 * island + step)
    x = torch.rand(BATCH, 4, generator=draw) * 2 - 1
    y = (x @ torch.tensor([[0.5], [-0.3], [0.2], [0.4]])) * (1 - 2 * island) / 1.4
    return x, y


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def within_bounds(model: nn.Module) -> bool:
    return all(float(p.detach().abs().max()) <= LARGEST for p in model.parameters())


def largest_difference(steps: int, rounds: int, num_islands: int) -> float:
    """In the Euclidean norm over all parameters of all islands, for two fp32 runs of this problem."""
    u = 2.0**-24
    # Roundings on the longest way into one gradient: the residual (a dot product, two sums), the factor 2 / batch, the sum over
    # the batch in any order, the accumulation of four micro-batches or two ranks and its factor.
    chain = (INPUTS + 3) + 2 + BATCH + 4
    residual = LARGEST * INPUTS + 1  # what |w||z| + |y| is at most
    gradient = 2 * residual  # 2 |r| |z|, with |z| <= 1
    gradient_error = 2 * residual * (chain * u / (1 - chain * u))
    step_error = LR * gradient_error + u * (LARGEST + 2 * LR * gradient)
    round_error = 6 * u * 2 * LARGEST  # the pseudo-gradient, two weighted sums, the anchor, and the landing's two sums
    elements = (NUMEL * num_islands) ** 0.5
    return 2 * elements * (steps * step_error + rounds * round_error)

"""What is the model? A GPT of today, whole in this file.

Pre-norm RMSNorm without gains, rotary positions, normalised queries and keys, squared-ReLU MLP, no biases, an output head of
its own. Shapes: B sequences, T tokens, C = width, H heads, D = C / H features a head, V = vocab.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

ROTARY_BASE = 10_000.0  # the fastest pair of features turns one radian a token, the slowest nearly this many times less


@dataclass(frozen=True, slots=True)
class GPTConfig:
    vocab: int = 256
    layers: int = 4
    width: int = 96
    heads: int = 4
    context: int = 128

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"GPT {field.name} = {getattr(self, field.name)} is too small; use 1 or more")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"GPT width = {self.width} does not divide into {self.heads} heads of an even size; "
                f"use a multiple of {2 * self.heads}"
            )


class GPT(nn.Module):
    """Tokens in, logits of the next token out. Ready to train from seed 0; ``init_weights`` draws another start."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = _embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.head = _linear(config.width, config.vocab)
        cos, sin = rotary_tables(config.context, config.width // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights(seed=0)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) int64 -> (B, T, V) fp32
        num_tokens = tokens.shape[1]
        if num_tokens > self.config.context:
            raise ValueError(f"{num_tokens} tokens do not fit the model's context of {self.config.context}; cut the sequences")
        cos, sin = self.get_buffer("cos")[:num_tokens], self.get_buffer("sin")[:num_tokens]  # (T, 1, 1, D / 2) each
        x = norm(self.embedding(tokens))  # (B, T, C)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(norm(x)).float()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every weight from ``seed`` alone; no global generator, so threads can build models side by side.

        The numbers come from the CPU whatever the model's device: a seed means the same weights everywhere. Projections back
        into the residual stream start at zero, so every block is the identity at first and depth does not change the scale.
        On the meta device, where a model has shapes only, nothing is drawn.
        """
        if self.head.weight.is_meta:
            return
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                weight.zero_()
            else:
                std = 1.0 if name == "embedding.weight" else weight.shape[1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu") * std)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = _linear(width, 3 * width)
        self.out = _linear(width, width)
        self.up = _linear(width, 4 * width)
        self.down = _linear(4 * width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.attention(norm(x), cos, sin)
        return x + self.mlp(norm(x))

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, D)
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        q, k = rotate(norm(qk), cos, sin).unbind(2)  # queries and keys share one pass: 9 % less time than one after the other
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        hidden = F.relu(self.up(x))  # (B, T, 4C)
        return self.down(hidden * hidden)  # a product, since the backward pass of square() is a pow: 7 x slower on a CPU


def norm(x: Tensor) -> Tensor:
    """Scale every vector along the last axis to root mean square 1."""
    return F.rms_norm(x, x.shape[-1:])


def rotary_tables(context: int, head_size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x frequency, (T, 1, 1, D / 2) each: ready to multiply (B, T, q or k, H, D / 2)."""
    num_pairs = head_size // 2
    frequency = ROTARY_BASE ** (-torch.arange(num_pairs, dtype=torch.float64) / num_pairs)
    angle = torch.arange(context, dtype=torch.float64)[:, None, None, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn feature pair (i, i + D / 2) by its position's angle, so that a dot product sees only the distance of two tokens."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)  # the tables are fp32, x may be bf16


def num_parameters(model: nn.Module) -> int:
    """Elements of all parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(config: GPTConfig) -> int:
    """Forward and backward: 6 a matrix weight and 12 a layer, feature and position of context.

    Causal masking is not discounted and the embedding is a lookup (PaLM, arXiv 2204.02311, appendix B).
    """
    matrix_weights = config.layers * 12 * config.width**2 + config.width * config.vocab
    return 6 * matrix_weights + 12 * config.layers * config.width * config.context


def _linear(features_in: int, features_out: int) -> nn.Linear:
    """Without torch's own initialisation: it draws from the global generator, which threads share."""
    return cast(nn.Linear, skip_init(nn.Linear, features_in, features_out, bias=False, device=torch.get_default_device()))


def _embedding(vocab: int, width: int) -> nn.Embedding:
    return cast(nn.Embedding, skip_init(nn.Embedding, vocab, width, device=torch.get_default_device()))

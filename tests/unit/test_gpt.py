"""Is the GPT the model that its file describes? Against its definition in float64 and against its symmetries."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dtrain.build import build_model
from dtrain.config import load_job
from dtrain.data.corpus import load_corpus
from dtrain.models.gpt import GPT, ROTARY_BASE, Block, GPTConfig, flops_per_token, num_parameters, rotary_tables, rotate
from dtrain.recipes import DEFAULT_RECIPE, of_section

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = GPTConfig(vocab=50, layers=2, width=24, heads=3, context=16)
QUICKSTART = Path(__file__).parents[2] / "launch" / "jobs" / "quickstart.toml"
LARGER = GPTConfig(vocab=256, layers=4, width=96, heads=4, context=128)


def trained_like(config: GPTConfig) -> GPT:
    """A model whose zero projections are not zero, as after some training: at the start every block is the identity."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    return model


def tokens(config: GPTConfig, batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab, (batch, config.context), generator=torch.Generator().manual_seed(seed))


def rms_norm64(x: Tensor) -> Tensor:
    # eps as F.rms_norm has it for fp32 input
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def attention64(block: Block, x: Tensor) -> Tensor:
    """Causal attention written out: loops over heads and positions, explicit softmax, 2 x 2 rotations; float64."""
    num_tokens, width = x.shape
    size = width // block.heads
    q, k, v = (block.qkv.weight.double() @ x.T).T.split(width, dim=-1)  # (T, C) each
    rows = []
    for head in range(block.heads):
        part = slice(head * size, (head + 1) * size)
        q_h, k_h = rms_norm64(q[:, part]), rms_norm64(k[:, part])
        turned = []
        for y in (q_h, k_h):
            z = torch.zeros_like(y)
            for t in range(num_tokens):
                for i in range(size // 2):
                    angle = torch.tensor(t * ROTARY_BASE ** (-i / (size // 2)), dtype=torch.float64)
                    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
                    z[t, [i, i + size // 2]] = turn @ y[t, [i, i + size // 2]]
            turned.append(z)
        out = torch.zeros(num_tokens, size, dtype=torch.float64)
        for t in range(num_tokens):
            scores = turned[1][: t + 1] @ turned[0][t] / size**0.5
            weights = (scores - scores.max()).exp()
            out[t] = (weights / weights.sum()) @ v[: t + 1, part]
        rows.append(out)
    return (block.out.weight.double() @ torch.cat(rows, dim=-1).T).T


@torch.no_grad()
def test_logits_equal_a_float64_rendering() -> None:
    model, x = trained_like(SMALL), tokens(SMALL, batch=2)
    for sequence, logits in zip(x, model(x), strict=True):
        h = rms_norm64(model.embedding.weight.double()[sequence])
        for block in model.blocks:
            assert isinstance(block, Block)
            h = h + attention64(block, rms_norm64(h))
            hidden = (rms_norm64(h) @ block.up.weight.double().T).clamp(min=0) ** 2
            h = h + hidden @ block.down.weight.double().T
        expected = rms_norm64(h) @ model.head.weight.double().T
        # some 20 fp32 roundings of 6e-8 in a row on logits of size 1..4
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_future_tokens_do_not_change_earlier_logits() -> None:
    model, x = trained_like(SMALL), tokens(SMALL)
    logits = model(x)
    for t in range(1, SMALL.context):
        changed = x.clone()
        changed[:, t:] = (changed[:, t:] + 1) % SMALL.vocab
        after = model(changed)
        torch.testing.assert_close(after[:, :t], logits[:, :t], rtol=0, atol=1e-5)
        assert (after[:, t] - logits[:, t]).abs().amax(-1).min() > 1e-2, "the changed token itself must be seen"


@torch.no_grad()
def test_shorter_sequence_is_a_prefix() -> None:
    model, x = trained_like(SMALL), tokens(SMALL)
    torch.testing.assert_close(model(x[:, :5]), model(x)[:, :5], rtol=0, atol=1e-5)


def test_rotary_dot_products_see_only_the_distance() -> None:
    cos, sin = rotary_tables(context=64, head_size=8)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=generator).expand(1, 64, 1, 1, 8) for _ in range(2))
    turned_q, turned_k = rotate(q, cos, sin).view(64, 8), rotate(k, cos, sin).view(64, 8)
    products = turned_q @ turned_k.T  # (64, 64): query position x key position
    for distance in range(-63, 64):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert (products[0, 0] - products[0, 1]).abs() > 1e-2, "distance must matter"
    torch.testing.assert_close(turned_q.norm(dim=-1), q[0, :, 0, 0].norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", [SMALL, LARGER])
def test_parameters_and_flops_closed_form(config: GPTConfig) -> None:
    model = GPT(config)
    matrices = 12 * config.layers * config.width**2 + config.vocab * config.width
    assert num_parameters(model) == matrices + config.vocab * config.width
    x = tokens(config, batch=2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x).sum().backward()
    counted = counter.get_total_flops()
    # torch counts every multiplication with a matrix, scores and their backward pass included
    assert counted == flops_per_token(config) * x.numel()


def test_the_quickstart_is_small_and_long_enough_for_its_recipe() -> None:
    job = load_job(QUICKSTART)
    model = build_model(job, load_corpus(job.data.source))
    assert isinstance(model, GPT)
    assert (model.config.layers, model.config.width) == (job.model.layers, job.model.width)
    assert num_parameters(model) <= 500_000
    assert job.train.steps >= 1_500
    recipe = of_section(job.sync.model_dump(exclude_none=True), job.islands.count)
    assert recipe.name == DEFAULT_RECIPE
    assert job.train.steps // recipe.every >= 40, "outer rounds"


@torch.no_grad()
def test_every_block_is_the_identity_at_first() -> None:
    model, x = GPT(SMALL), tokens(SMALL)
    embedded = F.rms_norm(model.embedding(x), (SMALL.width,))
    expected = model.head(F.rms_norm(embedded, (SMALL.width,)))
    assert torch.equal(model(x), expected)
    assert model.head.weight.data_ptr() != model.embedding.weight.data_ptr()


def test_weights_depend_on_the_seed_alone_and_touch_no_global_generator() -> None:
    def build(seed: int) -> Tensor:
        model = GPT(SMALL)
        model.init_weights(seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    before = torch.get_rng_state()
    expected = [build(seed) for seed in range(4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(expected[0], expected[1])
    with ThreadPoolExecutor(4) as pool:
        for built, alone in zip(pool.map(build, [0, 1, 2, 3] * 5), expected * 5, strict=True):
            assert torch.equal(built, alone)


def test_learns_to_copy_the_previous_token() -> None:
    # The token one back is the answer: nothing but attention over positions can tell, chance is ln 50 = 3.9 nats.
    model = GPT(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses: list[float] = []
    for step in range(120):
        x = tokens(SMALL, batch=16, seed=step)
        loss = F.cross_entropy(model(x)[:, 1:].flatten(0, 1), x[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.5
    assert losses[-1] < 0.5


def test_bf16_autocast_gives_fp32_logits_close_to_fp32() -> None:
    model, x = trained_like(SMALL), tokens(SMALL)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    assert logits.dtype == exact.dtype == torch.float32
    error = (logits - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.03  # bf16 rounds by up to 2^-9 = 0.002 at each of a dozen products


def test_state_dict_holds_parameters_only() -> None:
    model = GPT(SMALL)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert {name for name, _ in model.named_buffers()} == {"cos", "sin"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"width": 25}, "width = 25 .* multiple of 6"), ({"heads": 0}, "heads = 0"), ({"context": -1}, "context = -1")],
)
def test_bad_config_is_one_line(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{"vocab": 50, "layers": 2, "width": 24, "heads": 3, "context": 16, **changes})


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens do not fit the model's context of 16"):
        GPT(SMALL)(torch.zeros(1, 17, dtype=torch.int64))

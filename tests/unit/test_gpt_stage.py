"""Are the stages of a GPT the whole model, cut? In what they compute, and in what they are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dtrain.checkpoint import load_optimizers, optimizers_tensors
from dtrain.models.gpt import GPT
from dtrain.models.gpt_stage import GPTStage, blocks_of
from dtrain.optim import decay_groups, muon_adamw
from tests.unit.test_gpt import LARGER, trained_like

TOKENS = torch.arange(2 * 30).view(2, 30) * 7 % LARGER.vocab


def stages_of(model: GPT, num_stages: int) -> list[GPTStage]:
    return [GPTStage(model, stage, num_stages) for stage in range(num_stages)]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_stages_in_a_row_give_the_models_logits_and_gradients_to_the_bit(num_stages: int) -> None:
    whole, cut = trained_like(LARGER), trained_like(LARGER)
    logits = whole(TOKENS)
    logits.logsumexp(dim=-1).sum().backward()
    x = TOKENS
    for stage in stages_of(cut, num_stages):
        x = stage(x)
    assert torch.equal(x, logits)
    x.logsumexp(dim=-1).sum().backward()
    for p, q in zip(whole.parameters(), cut.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)


def test_parameters_keep_the_models_names_and_order() -> None:
    whole = GPT(LARGER)
    stages = stages_of(whole, 3)
    assert [list(stage.state_dict()) for stage in stages] == [
        ["embedding.weight", *(f"blocks.{k}.{name}.weight" for k in (0, 1) for name in ("qkv", "out", "up", "down"))],
        [f"blocks.2.{name}.weight" for name in ("qkv", "out", "up", "down")],
        [*(f"blocks.3.{name}.weight" for name in ("qkv", "out", "up", "down")), "head.weight"],
    ]
    assert [p for stage in stages for p in map(id, stage.parameters())] == [id(p) for p in whole.parameters()]


def test_the_embedding_alone_is_not_decayed() -> None:
    for stage in stages_of(GPT(LARGER), 2):
        decayed, plain = (group["params"] for group in decay_groups(stage, 0.1))
        embeddings = [m.weight for m in stage.modules() if isinstance(m, nn.Embedding)]
        assert [id(p) for p in plain] == [id(p) for p in embeddings]
        assert len(decayed) == len(list(stage.parameters())) - len(embeddings)


def test_blocks_are_dealt_out_evenly_and_first_to_the_first() -> None:
    assert [blocks_of(stage, 3, 8) for stage in range(3)] == [range(3), range(3, 6), range(6, 8)]
    assert [blocks_of(stage, 2, 2) for stage in range(2)] == [range(1), range(1, 2)]
    with pytest.raises(ValueError, match="a GPT of 2 blocks cannot be cut into 3 stages; use 2 or fewer"):
        blocks_of(0, 3, 2)


def test_muon_steps_on_stages_what_it_steps_on_the_whole_to_the_bit() -> None:
    """The middle one of three has matrices alone, and AdamW nothing to do; its state is kept and loaded as any."""
    whole, cut = trained_like(LARGER), trained_like(LARGER)
    models = [whole, *stages_of(cut, 3)]
    optimizers = [muon_adamw(model, lr=0.01, weight_decay=0.1) for model in models]
    assert [[len(group["params"]) for group in adamw.param_groups] for _, adamw in optimizers[1:]] == [[0, 1], [0, 0], [1, 0]]
    for p, q in zip(whole.parameters(), cut.parameters(), strict=True):
        p.grad = torch.sin(torch.arange(p.numel(), dtype=torch.float32)).view_as(p)
        q.grad = p.grad.clone()
    for each in optimizers:
        for optimizer in each:
            optimizer.step()
    for p, q in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(p, q)
    saved = optimizers_tensors(optimizers[2], "stage1.")
    again = muon_adamw(models[2], lr=0.01, weight_decay=0.1)
    load_optimizers(again, saved, "stage1.")
    assert optimizers_tensors(again, "stage1.").keys() == saved.keys()
    assert all(torch.equal(value, optimizers_tensors(again, "stage1.")[key]) for key, value in saved.items())

"""Which part of a GPT does stage s of S compute? Whole blocks: the embedding before the first, the head behind the last.
Which stages a rank has, and how many, is not known here (``island/stages.py``).

The parts' parameters are the whole model's, under its names and in its order, so that weights, checkpoints, decay groups and
recipes do not know of stages. Nothing is tied between embedding and head, so that no gradient crosses stages but the stream's.
Shapes: B sequences, T tokens, C = width, V = vocab."""

from __future__ import annotations

from torch import Tensor, nn

from dtrain.models.gpt import GPT, norm


class GPTStage(nn.Module):
    """(B, T) tokens into the first stage, (B, T, C) fp32 between stages, (B, T, V) fp32 logits out of the last.

    Takes its modules out of ``model``, which is built and seeded whole: that stage s of every S begins with the weights of one
    process is then plain. Raises ValueError for more stages than blocks."""

    def __init__(self, model: GPT, stage: int, num_stages: int) -> None:
        super().__init__()
        own = blocks_of(stage, num_stages, model.config.layers)
        self.config = model.config
        self.is_first, self.is_last = stage == 0, stage == num_stages - 1
        if self.is_first:
            self.embedding = model.embedding
        self.blocks = nn.ModuleList()
        for index in own:  # by its name in the whole model
            self.blocks.add_module(str(index), model.blocks[index])
        if self.is_last:
            self.head = model.head
        for name in ("cos", "sin"):
            self.register_buffer(name, model.get_buffer(name), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        num_tokens = x.shape[1]
        cos, sin = self.get_buffer("cos")[:num_tokens], self.get_buffer("sin")[:num_tokens]  # (T, 1, 1, D / 2) each
        if self.is_first:
            x = norm(self.embedding(x))
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(norm(x)).float() if self.is_last else x


def blocks_of(stage: int, num_stages: int, layers: int) -> range:
    """As many blocks on every stage, or one more on the first ones: the last has the head to compute as well."""
    if num_stages > layers:
        raise ValueError(f"a GPT of {layers} blocks cannot be cut into {num_stages} stages; use {layers} or fewer")
    each, more = divmod(layers, num_stages)
    begin = stage * each + min(stage, more)
    return range(begin, begin + each + (stage < more))

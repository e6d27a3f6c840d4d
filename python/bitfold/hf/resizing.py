"""`resize_token_embeddings` on folded embeddings, refused by name: packed rows cannot be added or cut."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

__all__ = ["guard_resize"]


def guard_resize(modeling_utils: ModuleType) -> None:
    """Have `PreTrainedModel.resize_token_embeddings` refuse folded tables, but for their own size."""
    resize = modeling_utils.PreTrainedModel.resize_token_embeddings

    @functools.wraps(resize)
    def refuse_folded(self: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        from bitfold.errors import BitfoldError
        from bitfold.nn import PackedModule, TiedEmbedding

        table = self.get_input_embeddings()
        if new_num_tokens is not None and isinstance(table, PackedModule | TiedEmbedding):
            if new_num_tokens == table.num_embeddings:
                return table
            msg = (
                f"resize_token_embeddings({new_num_tokens}): the table of {table.num_embeddings} rows is "
                "folded, and rows cannot be added or cut; resize the float model, then fold it"
            )
            raise BitfoldError(msg)
        return resize(self, new_num_tokens, *args, **kwargs)

    modeling_utils.PreTrainedModel.resize_token_embeddings = refuse_folded

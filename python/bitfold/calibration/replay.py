"""Running the model's own forward with finished blocks replaced by what they returned.

The input of a block is never rebuilt by hand: masks, rotary tables, position biases and whatever else happens
between blocks is the model's own code. Blocks that are finished return their cached output, the block in
question runs, and a private exception ends the pass there. So one block's output per stack and batch is all
that is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitfold.outputs import Batch

PreHook = Callable[[tuple[Any, ...], dict[str, Any]], None]
PostHook = Callable[[Any], Any]


class Stop(BaseException):
    """Raised in a hook to end a forward pass; no `except Exception` of a model catches it."""


def run(
    model: nn.Module,
    batch: Batch,
    *,
    stubs: Mapping[str, Callable[[], Any]] | None = None,
    before: Mapping[str, PreHook] | None = None,
    after: Mapping[str, PostHook] | None = None,
) -> Any:
    """One forward pass of `model` on `batch`; everything put into the model is taken out again.

    Args:
        model: in eval mode, on the device of its first parameter or buffer.
        batch: its arguments.
        stubs: module name -> what returns its output in place of its own forward.
        before: module name -> called with (args, kwargs) before the module runs.
        after: module name -> called with the output; what it returns, unless None, takes the output's place.

    Returns:
        What the model returned, or None where a hook raised `Stop`.
    """
    with contextlib.ExitStack() as stack:
        for name, stub in (stubs or {}).items():
            stack.enter_context(_replaced_forward(model.get_submodule(name), stub))
        for name, hook in (before or {}).items():
            handle = model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kwargs, hook=hook: hook(args, kwargs), with_kwargs=True
            )
            stack.callback(handle.remove)
        for name, post_hook in (after or {}).items():
            handle = model.get_submodule(name).register_forward_hook(
                lambda *call, hook=post_hook: hook(call[2])
            )
            stack.callback(handle.remove)
        try:
            return batch.run(model)
        except Stop:
            return None


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, stub: Callable[[], Any]) -> Iterator[None]:
    """Shadow `module.forward`; attributes that the model reads of its blocks stay what they are."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *_, **__: stub()
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def stop_after(block: str | None) -> dict[str, PostHook]:
    """A hook for `run` that ends the pass when `block` is done; none for None."""

    def stop(_: Any) -> None:
        raise Stop

    return {} if block is None else {block: stop}


def tensor_map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`tree` (tuples, lists, dicts, ModelOutputs) with `function` of each tensor in it."""
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)

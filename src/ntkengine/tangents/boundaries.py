"""A forward pass cut where hidden states enter a block, or leave the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ntkengine.errors import CheckFailed
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.running import call_model
from ntkengine.tangents.blocks import Stack, first_tensor, replace_first

Others = tuple[tuple[Any, ...], dict[str, Any]]  # a block's arguments, None in place of the hidden states


@contextmanager
def at_boundaries(
    stack: Stack, enter: Callable[[int, Tensor, Others | None], Tensor], first: int = 1
) -> Iterator[None]:
    """Within the block, give every segment but the input the hidden states that `enter` returns.

    Args:
        stack: the model's blocks.
        enter: called with a segment's index, the hidden states that enter it, and its other arguments; of the head,
            which starts from what the last block returns, None.
        first: the first block that is looked at.
    """

    def before(segment: int) -> Any:
        def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = enter(segment, stack.take(args, kwargs), stack.put(args, kwargs, None))
            return stack.put(args, kwargs, hidden)

        return hook

    def after_last(_m: nn.Module, _args: Any, output: Any) -> Any:
        return replace_first(output, enter(stack.head, first_tensor(output), None))

    handles = [
        block.register_forward_pre_hook(before(segment), with_kwargs=True)
        for segment, block in enumerate(stack.blocks, start=1)
        if segment >= first
    ]
    if stack.blocks:
        handles.append(stack.blocks[-1].register_forward_hook(after_last))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Reached(Exception):  # noqa: N818
    """Raised to end a forward pass at the first block; carries its hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("first block reached")
        self.hidden = hidden


def before_blocks(model: nn.Module, inputs: Mapping[str, Tensor], stack: Stack) -> Tensor:
    """Run the model up to its first block; return the hidden states that enter it.

    Raises:
        CheckFailed: the first block is not reached.
    """

    def stop(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(stack.take(args, kwargs))

    handle = stack.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        call_model(model, inputs)
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    msg = "the first block was not reached"
    raise CheckFailed(msg)


@dataclass
class CutPass:
    """One forward pass cut at every block boundary: segment i maps leaves[i] to outs[i] (the first has no leaf).

    Attributes:
        leaves: detached inputs of the segments; None for the first.
        outs: the segments' outputs; the last is f, (n, C).
    """

    leaves: list[Tensor | None]
    outs: list[Tensor]


def cut_forward(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    stack: Stack,
    readout: Readout,
    enter: Callable[[int], None],
) -> CutPass:
    """Return one forward pass in which each segment starts from a detached leaf.

    Args:
        model: the model, frozen or with gradients wanted for some parameters.
        inputs: a microbatch.
        stack: its blocks.
        readout: f.
        enter: called with the index of each segment that begins.
    """
    result = CutPass([None], [])

    def cut(segment: int, hidden: Tensor, _others: Others | None) -> Tensor:
        leaf = hidden.detach().requires_grad_(True)
        result.outs.append(hidden)
        result.leaves.append(leaf)
        enter(segment)
        return leaf

    with at_boundaries(stack, cut):
        enter(0)
        result.outs.append(readout(call_model(model, inputs), inputs))
    return result

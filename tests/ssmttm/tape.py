"""Recordings of a step on a CPU, with the rules of a CUDA graph."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default, aten.equal.default}
"""Operations that need a value of the device."""


class Tape(TorchDispatchMode):
    """The operations of a step, which are repeated on the same memory without Python's part of the step.

    As with a CUDA graph, recording changes no tensor and refuses operations that read a value.
    """

    def __init__(self, step: Callable[[], object]) -> None:
        super().__init__()
        self.operations: list[tuple[object, ...]] = []
        before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._before = before
        try:
            with self:
                step()
        finally:
            for tensor, values in reversed(before):
                tensor.copy_(values)

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        named = named or {}
        written = [
            value
            for value, argument in zip(arguments, function._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self._before += [(tensor, tensor.clone()) for tensor in written]
        result = function(*arguments, **named)
        memory = {address(tensor) for tensor in tree_leaves(arguments) if isinstance(tensor, torch.Tensor)}
        is_view = not written and any(address(tensor) in memory for tensor in tree_leaves(result))
        if not is_view:
            self.operations.append((function, arguments, named, result, bool(written)))
        return result

    def __call__(self) -> None:
        """Do all operations again."""
        for function, arguments, named, result, is_in_place in self.operations:
            again = function(*arguments, **named)
            if not is_in_place:
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    old.copy_(new)


def address(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's memory; weights packed for oneDNN have none, and are never written."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()

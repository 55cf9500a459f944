"""Repeat a step on fixed tensors: on CUDA as a graph, which the GPU repeats without Python, and elsewhere by calls.

A step of a model is hundreds of short kernels. Launched one by one they take longer to launch than to run.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

Call = Callable[[], object]
Record = Callable[[Call], Call]
"""Records a computation without doing it, and returns the call that does it."""

FIRST_REACH = 256
"""Reach of the first recording. Each further one reaches twice as far: few are made, and little is read in vain."""


def repeat(step: Callable[[int], object], steps: int, device: torch.device) -> None:
    """Call step(reach) `steps` times, with a reach of at least the number of calls up to this one.

    A step is a fixed computation for each reach, on tensors that it changes in place. Where recordings pay, the step is
    called once for each reach, because first calls allocate and choose kernels, and then its recording is repeated. If
    the step cannot be recorded, it is called every time, with a warning.
    """
    record = recorder(device)
    if record is None:
        for reach in range(1, steps + 1):
            step(reach)
        return
    for done, reach in _spans(steps):
        call: Call = partial(step, reach)
        call()
        again = call
        if record is not None and reach > done + 1:
            try:
                again = record(call)
            except RuntimeError as error:
                warnings.warn(
                    "a step cannot be recorded as a CUDA graph, so its kernels are launched one by one, "
                    f"which is slower: {error}",
                    RuntimeWarning,
                    stacklevel=3,
                )
                record = None
        for _ in range(done + 1, reach):
            again()


def recorder(device: torch.device) -> Record | None:
    """Return the way to record a computation on a device, or None if calls cost little there."""
    return partial(_record_graph, device) if device.type == "cuda" else None


def _spans(steps: int) -> Iterator[tuple[int, int]]:
    """Yield the first step and the reach of each recording; it serves all steps up to its reach."""
    done, reach = 0, FIRST_REACH
    while done < steps:
        yield done, min(reach, steps)
        done, reach = reach, 2 * reach


def _record_graph(device: torch.device, call: Call) -> Call:
    graph = torch.cuda.CUDAGraph()
    # The outer block restores the stream, which torch's own leaves changed if the recording fails.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"),
    ):
        call()
    return graph.replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all recordings on a device: cuBLAS keeps memory for every stream on which it has worked."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

"""Compile a Mamba-2 mixer's kernels for GPUs that are not here, in all configurations among which Triton would choose.

    python -m tests.ssmttm.model.ahead [80 89 90]     a table of the compute capabilities, and of what fits each
    python -m tests.ssmttm.model.ahead 90 --json      one JSON line a compiled kernel

A mixer of the studies' width runs forward and backward on the CPU. Where a kernel would be launched it is compiled
instead, so that the values are without meaning. Needs the packages that `make verify` installs.
"""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from unittest import mock

import torch

import ssmttm.model.kernels
from ssmttm.model.layers.mamba2 import Mamba2Mixer
from ssmttm.model.layers.sub_layer import Context
from tests.ssmttm.kernel_devices import kernels_compiled_for, using
from tests.ssmttm.small import small_config

SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Most shared memory of a block by compute capability: CUDA C++ Programming Guide, technical specifications."""
CHUNKS = (256, 512)
WIDTH, STATE, BATCH, LENGTH = 1024, 512, 2, 1032
"""Width and state of the studies' mixers. Triton compiles kernels anew for a length that 16 divides, and it does not
divide the studies' 2,584 frames after a prefix of 128.
"""


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled in one configuration."""

    capability: int
    chunk: int
    kernel: str
    config: str
    shared: int
    """Shared memory of a block, in bytes."""

    @property
    def fits(self) -> bool:
        """True if a GPU of this compute capability can run it."""
        return self.shared <= SHARED_BYTES[self.capability]


def compiled_for(capability: int) -> list[Compiled]:
    """Compile all kernels in a process of its own, since one has them compiled or interpreted."""
    command = [sys.executable, "-m", __name__, str(capability), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]


def table(found: Sequence[Compiled]) -> str:
    """Return what fits in words: for each kernel and chunk how many configurations, and which."""
    groups: dict[tuple[int, int, str], list[Compiled]] = defaultdict(list)
    for one in found:
        groups[one.capability, one.chunk, one.kernel].append(one)
    lines = []
    for (capability, chunk, kernel), all_ in groups.items():
        fitting = [one for one in all_ if one.fits]
        lines.append(
            f"sm_{capability} chunk {chunk} {kernel.strip('_')}: {len(fitting)} of {len(all_)} fit "
            f"{SHARED_BYTES[capability]:,} bytes"
        )
        lines += [f"    {one.shared:>7,} {one.config}" for one in fitting]
    return "\n".join(lines)


def _compile(capability: int) -> Iterator[Compiled]:
    with kernels_compiled_for(capability) as (kernels, launches):
        config = small_config("prefix_mamba", d_model=WIDTH, d_state=STATE, ssm_head_dim=64)
        mixer = Mamba2Mixer(config)
        mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        for chunk in CHUNKS:
            launches.clear()
            x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
            with (
                using(kernels),
                mock.patch.object(ssmttm.model.kernels, "scan_chunk", return_value=chunk),
                torch.autocast("cpu", torch.bfloat16),
            ):
                y = mixer(x, Context(mask=mask))
            y.sum().backward()
            # The backward pass computes some of the forward pass again.
            yield from (Compiled(capability, chunk, *launch) for launch in dict.fromkeys(launches))


def main(arguments: Sequence[str]) -> None:
    """Print what is compiled."""
    capabilities = [int(word) for word in arguments if word.isdigit()] or list(SHARED_BYTES)
    if "--json" in arguments:
        for one in _compile(capabilities[0]):
            print(json.dumps(asdict(one)))
    else:
        for capability in capabilities:
            print(table(compiled_for(capability)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

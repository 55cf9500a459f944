"""A node's failures are told from those of a Run."""

import pytest

from harness.record.nodes import NODE_FAILURES, node_failure_in


@pytest.mark.parametrize(
    ("line", "is_the_nodes"),
    [
        ("[ 12.3] NVRM: Xid (PCI:0000:3b:00): 79, pid=4242, GPU has fallen off the bus.", True),
        ("NVRM: Xid (PCI:0000:3b:00): 48, An uncorrectable double bit error", True),
        ("Xid 94 found in dmesg", True),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", True),
        (
            "torch.AcceleratorError: CUDA error: uncorrectable NVLink error detected during the execution",
            True,
        ),
        ("OSError: [Errno 116] Stale file handle: '/corpus/train-0.bin'", True),
        ("check: lab-disk 3 is sick", True),
        ("NVRM: Xid (PCI:0000:3b:00): 31, MMU Fault", False),
        ("NVRM: Xid (PCI:0000:3b:00): 13, Graphics Exception", False),
        ("NCCL INFO Channel 00/02 via P2P/CUMEM over NVLink, ECC enabled, 0 uncorrected", False),
        ("RuntimeError: CUDA error: device-side assert triggered", False),
        ("lab-disk 3 is well", False),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_line_tells_of_a_nodes_failure_or_of_a_runs(
    monkeypatch: pytest.MonkeyPatch, line: str, is_the_nodes: bool
) -> None:
    monkeypatch.setenv(NODE_FAILURES, '["lab-disk . is sick"]')
    assert node_failure_in(f"raise Error({line!r})\n  {line}\nlast\n") == (line if is_the_nodes else None)

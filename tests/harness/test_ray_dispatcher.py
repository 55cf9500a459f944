"""What Ray's dispatcher refuses; what it does is tested on a real Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.dispatch import ray
from harness.dispatch.base import Job
from harness.dispatch.packing import Node
from ssmttm.errors import InputError


def test_a_series_that_fits_on_no_node_is_refused_once_no_node_has_come_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, now = [Node("head", 0.0), Node("a", 4.0)], [0.0]
    monkeypatch.setattr(ray, "_nodes", lambda kind: nodes)
    monkeypatch.setattr(ray.RayDispatcher, "_look_after_nodes", lambda self: nodes)
    monkeypatch.setattr(ray.time, "monotonic", lambda: now[0])
    dispatcher = ray.RayDispatcher(tmp_path)
    handles = dispatcher.submit([Job("large", (), 1, 8, 1, tmp_path)])
    for seconds in range(10, round(ray.NO_ROOM_SECONDS), 10):
        now[0] = float(seconds)
        assert dispatcher.poll(handles) == {handles[0]: "queued"}
    now[0] = 20 + ray.NO_ROOM_SECONDS
    with pytest.raises(InputError, match=r"series large: takes 8 GPUs, .* the nodes of this Ray have 4$"):
        dispatcher.poll(handles)

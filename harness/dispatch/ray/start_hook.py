"""What `ray start` is told that it has no options for: called in its process before it starts anything."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Any

NODE_ADDRESS = "SSMSCALE_RAY_NODE_ADDRESS"
"""Names the address at which the node is to listen; exactly 127.0.0.1 keeps all of it on the loopback."""
NO_DASHBOARD = "no-dashboard"
"""File of the temporary folder that says why there is no dashboard."""
AGENT_PORTS = (
    "dashboard_agent_listen_port",
    "metrics_agent_port",
    "metrics_export_port",
    "runtime_env_agent_port",
)


def adjust(parameters: Any, head: bool) -> None:
    """Ray's RAY_START_HOOK; `parameters` are its RayParams."""
    from ray._private import ray_constants, services, utils

    # Ray takes 127.0.0.1 for a mistake, of a node and of the head to be joined.
    parameters.node_ip_address = os.environ[NODE_ADDRESS]
    ray_constants.ENABLE_RAY_CLUSTER = True
    services.resolve_ip_for_localhost = lambda host: host
    missing = utils.get_dashboard_dependency_error()
    if missing is None:
        _tell_ports_beforehand(services)
    # Drivers run where a node does; a server for others would listen at 10001, as everybody's.
    parameters.ray_client_server_port = None
    if head and parameters.include_dashboard and missing is not None:
        parameters.include_dashboard = False
        sys.stderr.write(f"no dashboard: {missing}; pip install 'ray[default]' brings it\n")
        (Path(parameters.temp_dir) / NO_DASHBOARD).write_text(str(missing), encoding="utf-8")


def _tell_ports_beforehand(services: Any) -> None:
    """Have a raylet find the ports of its agents where it looks for them, before they have come up to say them.

    It gives them 15 s, which is less than they take to import on a busy machine or from a network disk, and ends
    (ray-project/ray issue 65983).
    """
    from ray._raylet import persist_port  # type: ignore[attr-defined]  # compiled

    start = services.start_raylet
    signature = inspect.signature(start)

    def start_raylet(*arguments: Any, **more: Any) -> Any:
        told = signature.bind(*arguments, **more).arguments
        for name in AGENT_PORTS:
            persist_port(told["session_dir"], told["node_id"], name, told[name])
        return start(*arguments, **more)

    services.start_raylet = start_raylet

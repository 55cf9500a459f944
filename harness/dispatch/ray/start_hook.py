"""A hook that `ray start` calls before it starts a process; it makes settings for which there are no options."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Any

NODE_ADDRESS = "SSMSCALE_RAY_NODE_ADDRESS"
"""Variable with the address at which the node listens; 127.0.0.1 keeps all of Ray on the loopback address."""
NO_DASHBOARD = "no-dashboard"
"""Name of the file in the temporary folder that says why there is no dashboard."""
AGENT_PORTS = (
    "dashboard_agent_listen_port",
    "metrics_agent_port",
    "metrics_export_port",
    "runtime_env_agent_port",
)


def adjust(parameters: Any, head: bool) -> None:
    """Adjust the RayParams of a `ray start`, as its RAY_START_HOOK."""
    from ray._private import ray_constants, services, utils

    # Ray takes 127.0.0.1 for a mistake, as the address of a node and of the head.
    parameters.node_ip_address = os.environ[NODE_ADDRESS]
    ray_constants.ENABLE_RAY_CLUSTER = True
    services.resolve_ip_for_localhost = lambda host: host
    missing = utils.get_dashboard_dependency_error()
    if missing is None:
        _write_ports_in_advance(services)
    # Drivers run on the nodes; a server for remote ones would listen at port 10001, as that of any other Ray.
    parameters.ray_client_server_port = None
    if head and parameters.include_dashboard and missing is not None:
        parameters.include_dashboard = False
        sys.stderr.write(f"no dashboard: {missing}; install it with pip install 'ray[default]'\n")
        (Path(parameters.temp_dir) / NO_DASHBOARD).write_text(str(missing), encoding="utf-8")


def _write_ports_in_advance(services: Any) -> None:
    """Write the ports of a raylet's agents to the files where it looks for them, before the agents do.

    A raylet ends if its agents have not written them within 15 s, and they take longer to make their imports on a busy
    machine or from a network disk (https://github.com/ray-project/ray/issues/65983).
    """
    from ray._raylet import persist_port  # type: ignore[attr-defined]  # compiled

    start = services.start_raylet
    signature = inspect.signature(start)

    def start_raylet(*arguments: Any, **more: Any) -> Any:
        bound = signature.bind(*arguments, **more).arguments
        for name in AGENT_PORTS:
            persist_port(bound["session_dir"], bound["node_id"], name, bound[name])
        return start(*arguments, **more)

    services.start_raylet = start_raylet

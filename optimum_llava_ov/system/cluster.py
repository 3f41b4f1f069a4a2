"""Connect to a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping

import ray


AUTO = "auto"


def connect(address: str, dashboard: bool = True) -> bool:
    """Connect this process to a cluster, if it is not connected.

    Args:
        address: Address of the cluster; "auto" for the one of this machine, which is started if there is none.
        dashboard: Whether a cluster that is started has Ray's dashboard, whose processes work all the time.

    Returns:
        Whether the cluster was started, and ends with this process.

    Raises:
        `ConnectionError`: There is no cluster at the address.
    """
    if ray.is_initialized():
        return False
    try:
        ray.init(address=address, log_to_driver=False)
    except ConnectionError:
        if address != AUTO:
            raise
        # Ray would give its actors the lowest priority but four. A model that computes on all processors waits for all
        # its threads, so that each process that interrupts one of them stops the others, too.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(log_to_driver=False, include_dashboard=dashboard)
        return True
    return False


def limit_threads(device: str, ov_config: Mapping[str, str] | None, cpus: float) -> dict[str, str]:
    """Return properties with which a model uses the processors that Ray has given to its actor, and no others.

    OpenVINO would use all processors of the machine, and pin its threads to the first ones, as each other actor does.

    Args:
        ov_config: The properties that were asked for. They are kept.
        cpus: Number of processors of the actor.
    """
    if device != "CPU":
        return {**(ov_config or {})}
    return {
        "INFERENCE_NUM_THREADS": str(max(1, int(cpus))),
        "ENABLE_CPU_PINNING": "NO",
        **(ov_config or {}),
    }

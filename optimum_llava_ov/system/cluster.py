"""Connect to a Ray cluster."""

from __future__ import annotations

import ray


AUTO = "auto"


def connect(address: str) -> bool:
    """Connect this process to a cluster, if it is not connected.

    Args:
        address: Address of the cluster; "auto" for the one of this machine, which is started if there is none.

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
        ray.init(log_to_driver=False)
        return True
    return False

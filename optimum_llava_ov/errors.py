"""Errors that tell the user what to do.

All derive from `ValueError`, not from `OSError`: Optimum retries a load that failed with `OSError` as if the weights
were TensorFlow's, which hides the reason.
"""


class UnsupportedCheckpointError(ValueError):
    """The checkpoint needs something that this package does not support. Only its configuration was downloaded."""


class InvalidCheckpointError(ValueError):
    """A file of the checkpoint is missing, damaged, or does not fit the configuration."""


class BundleError(ValueError):
    """A folder cannot be used as an OpenVINO bundle, as input or as output."""


class HubError(ValueError):
    """The Hub does not have what was requested, refused the request, or cannot be reached. Nothing was published."""


class HubUnreachableError(HubError):
    """The Hub cannot be reached, and the cache does not have the file."""


class ImageError(ValueError):
    """An image cannot be read, or exceeds a limit. Nothing was computed with it."""


class EngineFailureError(ValueError):
    """The engine failed while it computed an answer. It starts again; the same request may succeed."""

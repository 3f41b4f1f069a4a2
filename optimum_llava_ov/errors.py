"""What this package raises when the user, not the code, has to do something.

All derive from `ValueError`: Optimum retries a load that failed with `OSError` as if the weights were TensorFlow's, which
would hide the reason.
"""


class UnsupportedCheckpointError(ValueError):
    """The checkpoint asks for something this package does not compute. Nothing was downloaded but its configuration."""


class InvalidCheckpointError(ValueError):
    """A file of the checkpoint is missing, damaged, or does not fit the configuration."""


class BundleError(ValueError):
    """A folder cannot be used as an OpenVINO bundle, as input or as output."""


class HubError(ValueError):
    """The Hub does not have what was asked for, refused, or could not be reached. Nothing was published."""


class HubUnreachableError(HubError):
    """There is no connection to the Hub, and the cache does not have the file."""


class ImageError(ValueError):
    """An image cannot be read, or is more than is accepted. Nothing was computed with it."""

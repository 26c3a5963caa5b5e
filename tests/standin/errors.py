"""What the stand-in refuses."""


class HazardError(RuntimeError):
    """Two streams, or a stream and the host, touch one buffer without an order between them."""


class UnsupportedOnDeviceError(RuntimeError):
    """The device lacks the dtype or the operation."""

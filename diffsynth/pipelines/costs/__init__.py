"""What one call of each network costs: bytes of live tensors at the worst moment, and operations.

Closed forms of the forward passes in ``diffsynth.models``, as functions of a configuration and of sizes.
Bytes count intermediates, inputs and outputs, not weights; what a device's libraries and allocator take
besides is not in them.  Of floating-point operations a multiplication and an addition count as two, and only
those of matrix products and convolutions count.
"""

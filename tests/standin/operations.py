"""ATen operations by what they mean on a device."""

import torch

SYNCS = frozenset(
    {
        "_local_scalar_dense",
        "_unique",
        "_unique2",
        "allclose",
        "argwhere",
        "bincount",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "nonzero_numpy",
        "unique_consecutive",
        "unique_dim",
        "unique_dim_consecutive",
    }
)
"""After these the host knows a value that the device computed: it has waited."""

REFUSED = frozenset({"_pin_memory", "pin_memory", "record_stream", "set_"})
"""Operations on storages and streams that have no meaning here."""

VIEWS = frozenset(
    {
        "_unsafe_view",
        "alias",
        "as_strided",
        "chunk",
        "detach",
        "diagonal",
        "expand",
        "movedim",
        "narrow",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unflatten",
        "unfold",
        "unsqueeze",
        "view",
        "view_as",
    }
)
"""These read no bytes: buffers are cut up before they are filled."""

BYTE_MOVES = VIEWS | {
    "_local_scalar_dense",
    "_reshape_alias",
    "_to_copy",
    "cat",
    "clone",
    "contiguous",
    "copy_",
    "empty",
    "empty_like",
    "empty_strided",
    "flatten",
    "item",
    "new_empty",
    "new_empty_strided",
    "reshape",
    "stack",
    "to",
    "zero_",
}
"""What may be done with float8 tensors where the device only stores them."""

FLOAT8 = frozenset(
    {
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    }
)

# -- operations that arrive without a tensor of the stand-in --------------------------------------------

FACTORIES = (
    "empty.memory_format",
    "empty_strided",
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
)
"""torch composes the other factory functions of these."""

CONVERSIONS = ("_copy_from",)
"""What ``torch.tensor(data, device=...)`` and indexing by lists fill the new tensor with."""

WHOLE = ("scaled_dot_product_attention", "linear", "matmul", "rms_norm")
"""Undivided on real devices, but cut into pieces by torch when autograd is not switched off altogether
(``no_grad`` instead of ``inference_mode``); the pieces would round and use memory differently."""

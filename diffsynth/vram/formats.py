"""Storage formats: how a weight is kept while it is not computed with.

Storage is apart from computation: a weight is copied to the device in its stored bytes and becomes bf16, f16
or f32 there.  Only 2-D weights (out, in) of linear layers are quantised.

| format     | stored as                                                     | a value is                  |
|------------|---------------------------------------------------------------|-----------------------------|
| bf16 f16 f32 | the value                                                   | itself                      |
| e4m3 e5m2  | float8, rounded to nearest, saturating                        | itself                      |
| fp8        | e4m3 and a float32 scale per output row, max|row| / 448       | q * scale                   |
| fp8_tensor | e4m3 and one float32 scale, max|weight| / 448                 | q * scale                   |
| int8       | -127..127 and a float32 scale per output row, max|row| / 127  | q * scale                   |
| int4       | 0..15 and an f16 scale per group of 32 along the input axis,  | (q - 8) * scale             |
|            | (value of largest magnitude) / -8                             |                             |

The product is taken in float32 and rounded once to the computation dtype, so the same bytes give the same
bits wherever the block lies.  Rounding is to nearest, ties to even.

Byte layout of int4 (as Q4_0 of GGML has it): byte j of a group holds value j in its low and value j + 16 in
its high nibble.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from diffsynth.errors import CheckpointError

GROUP = 32
"""Values per scale of int4."""
CHUNK_ELEMENTS = 2**22
"""Decoding works on so many values at a time, which bounds what it allocates."""
SCALE = "scale"
"""Suffix of the part that holds scales; the part with the values has the empty suffix."""

# Encoding does several passes over so many floats, which a processor's cache should hold.
_PIECE_ELEMENTS = 2**20
_INT8_MAX = 127.0
_E4M3_MAX = 448.0
# Smallest normal number: below it the quotient by a scale would lose precision, and it makes zero rows safe.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class StorageFormat(StrEnum):
    """See the table of the module."""

    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"
    E4M3 = "e4m3"
    E5M2 = "e5m2"
    FP8 = "fp8"
    FP8_TENSOR = "fp8_tensor"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def quantised(self) -> bool:
        """Whether there are scales, which only 2-D weights can have."""
        return self in _QUANTISED


AS_IS: Mapping[StorageFormat, torch.dtype] = {
    StorageFormat.BF16: torch.bfloat16,
    StorageFormat.F16: torch.float16,
    StorageFormat.F32: torch.float32,
}
"""Formats that keep a tensor as it is, and their dtypes."""
CASTS: Mapping[StorageFormat, torch.dtype] = {
    StorageFormat.E4M3: torch.float8_e4m3fn,
    StorageFormat.E5M2: torch.float8_e5m2,
}
"""Formats that only change the dtype, without scales."""
FLOAT8_DTYPES = frozenset(CASTS.values())
_QUANTISED = frozenset({StorageFormat.FP8, StorageFormat.FP8_TENSOR, StorageFormat.INT8, StorageFormat.INT4})
_VALUE_DTYPES: Mapping[StorageFormat, torch.dtype] = {
    **AS_IS,
    **CASTS,
    StorageFormat.FP8: torch.float8_e4m3fn,
    StorageFormat.FP8_TENSOR: torch.float8_e4m3fn,
    StorageFormat.INT8: torch.int8,
    StorageFormat.INT4: torch.uint8,
}


class PartSpec(NamedTuple):
    """One of the tensors that together store a weight."""

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def as_is(dtype: torch.dtype) -> StorageFormat:
    """The format that keeps tensors of ``dtype`` unchanged.

    Raises:
        CheckpointError: no weight of a network has such a dtype.
    """
    for format, stored in (AS_IS | CASTS).items():  # type: ignore[operator]
        if stored == dtype:
            return StorageFormat(format)
    raise CheckpointError(
        f"weights of dtype {dtype} are not supported", hint="use the bf16 file of the same model"
    )


def effective_format(format: StorageFormat, shape: Sequence[int]) -> StorageFormat:
    """``format``, or int8 in place of int4 when the input width is not a multiple of 32.

    Raises:
        ValueError: a quantised format for a shape that is not 2-D.
    """
    if format.quantised and (len(shape) != 2 or 0 in shape):
        raise ValueError(f"{format} is for 2-D weights, not for shape {tuple(shape)}")
    if format is StorageFormat.INT4 and shape[1] % GROUP:
        return StorageFormat.INT8
    return format


def parts(format: StorageFormat, shape: Sequence[int]) -> tuple[PartSpec, ...]:
    """The tensors that store a weight of ``shape``: values first, then scales.

    Raises:
        ValueError: the format cannot hold the shape (see :func:`effective_format`).
    """
    if effective_format(format, shape) is not format:
        raise ValueError(f"{format} needs an input width that is a multiple of {GROUP}, not {shape[1]}")
    values = PartSpec("", _VALUE_DTYPES[format], tuple(shape))
    match format:
        case StorageFormat.FP8 | StorageFormat.INT8:
            return values, PartSpec(SCALE, torch.float32, (shape[0],))
        case StorageFormat.FP8_TENSOR:
            return values, PartSpec(SCALE, torch.float32, ())
        case StorageFormat.INT4:
            rows, width = shape
            return (
                values._replace(shape=(rows, width // 2)),
                PartSpec(SCALE, torch.float16, (rows, width // GROUP)),
            )
        case _:
            return (values,)


def stored_bytes(format: StorageFormat, shape: Sequence[int]) -> int:
    """Bytes of all parts, without alignment."""
    return sum(part.nbytes for part in parts(format, shape))


# -- to the stored form, on the CPU ---------------------------------------------------------------------


def encode(
    weight: Tensor,
    format: StorageFormat,
    *,
    scale: Tensor | None = None,
    out: Mapping[str, Tensor] | None = None,
    name: str = "weight",
) -> dict[str, Tensor]:
    """Convert a weight to its stored form.

    Args:
        weight: (out, in) for quantised formats, any shape otherwise; any floating dtype.
        format: see the table of the module.
        scale: factor of ``weight`` as fp8 files state it: one number, or one per output row.  An e4m3 weight
            keeps its bytes where the format can express the factor: one number in fp8_tensor and fp8, one per
            row in fp8.
        out: tensors as :func:`parts` lists them, to write to; new ones by default.
        name: of the weight, for messages.

    Returns: the parts by suffix.  Beside them, some tens of megabytes are used, or a few times one row.

    Raises:
        CheckpointError: infinite values or NaN where the format converts, or numbers out of its range.
        ValueError: shape, format or ``scale`` do not go together.
    """
    if not weight.is_floating_point():
        raise ValueError(f"{name}: a weight of {weight.dtype} cannot be stored as {format}")
    if scale is not None and (weight.ndim != 2 or scale.numel() not in (1, weight.shape[0])):
        raise ValueError(f"{name}: scale {tuple(scale.shape)} for a weight {tuple(weight.shape)}")
    specs = parts(format, weight.shape)
    if out is None:
        out = {spec.suffix: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}
    target = {spec.suffix: out[spec.suffix] for spec in specs}
    if scale is not None:
        scale = scale.to(torch.float32).reshape(-1, 1)
        _refuse_unless(bool(scale.isfinite().all()), f"{name}: scales")
    if format in AS_IS or format in CASTS:
        _convert(weight, scale, target[""], name)
    elif _keeps_bytes(weight, scale, format):
        assert scale is not None
        _convert(weight, None, target[""], name)
        target[SCALE].copy_(scale.reshape(-1) if target[SCALE].ndim else scale.reshape(()))
    else:
        _quantise(weight, scale, format, target, name)
    return target


def _refuse_unless(fine: bool, what: str) -> None:
    if not fine:
        raise CheckpointError(
            f"{what} contain infinite values, NaN, or numbers out of range",
            hint="fetch the file again, or another storage format",
        )


def _pieces(weight: Tensor, scale: Tensor | None, name: str) -> Iterator[tuple[slice, Tensor]]:
    """Whole rows of the weight times its scale: new float32 tensors, checked to be finite."""
    per_row = max(1, weight.numel() // max(1, weight.shape[0]))
    step = max(1, _PIECE_ELEMENTS // per_row)
    for first in range(0, weight.shape[0], step):
        rows = slice(first, first + step)
        piece = weight[rows].to(torch.float32, copy=True)
        if scale is not None:
            piece.mul_(scale if scale.numel() == 1 else scale[rows])
        _refuse_unless(bool(piece.isfinite().all()), f"{name}: values")
        yield rows, piece


def _keeps_bytes(weight: Tensor, scale: Tensor | None, format: StorageFormat) -> bool:
    if weight.dtype != torch.float8_e4m3fn or scale is None:
        return False
    return format is StorageFormat.FP8 or (format is StorageFormat.FP8_TENSOR and scale.numel() == 1)


def _convert(weight: Tensor, scale: Tensor | None, target: Tensor, name: str) -> None:
    """Round to another dtype; without a change of dtype every bit stays."""
    if weight.dtype == target.dtype and scale is None:
        if weight.dtype in FLOAT8_DTYPES:
            for _ in _pieces(weight, None, name):
                pass  # each piece is checked
        target.copy_(weight)
        return
    saturates = target.dtype in FLOAT8_DTYPES
    limit = torch.finfo(target.dtype).max
    source, flat = weight, target
    if scale is None:
        source, flat = weight.reshape(-1), target.view(-1)
    for rows, piece in _pieces(source, scale, name):
        # Of the float8 casts some saturate and some give NaN, depending on device and version.
        flat[rows].copy_(piece.clamp_(-limit, limit) if saturates else piece)
        if not saturates:
            _refuse_unless(bool(flat[rows].isfinite().all()), f"{name}: values as {target.dtype}")


def _quantise(
    weight: Tensor, scale: Tensor | None, format: StorageFormat, target: Mapping[str, Tensor], name: str
) -> None:
    values, scales = target[""], target[SCALE]
    if format is StorageFormat.FP8_TENSOR:
        largest = torch.stack([piece.abs_().amax() for _, piece in _pieces(weight, scale, name)]).amax()
        scales.copy_((largest / _E4M3_MAX).clamp_min(_SMALLEST_SCALE))
    for rows, piece in _pieces(weight, scale, name):
        if format is StorageFormat.INT4:
            _quantise_int4(piece, values[rows], scales[rows], name)
            continue
        limit = _INT8_MAX if format is StorageFormat.INT8 else _E4M3_MAX
        if format is StorageFormat.FP8_TENSOR:
            piece.div_(scales)
        else:
            scales[rows] = (piece.abs().amax(dim=1) / limit).clamp_min(_SMALLEST_SCALE)
            piece.div_(scales[rows, None])
        if format is StorageFormat.INT8:
            piece.round_()
        values[rows].copy_(piece.clamp_(-limit, limit))


def _quantise_int4(piece: Tensor, values: Tensor, scales: Tensor, name: str) -> None:
    """``piece`` (R, in) float32, ``values`` (R, in / 2) uint8, ``scales`` (R, in / 32) f16."""
    groups = piece.view(piece.shape[0], -1, GROUP)
    extreme = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    # Adding zero turns the -0 of a zero group into 0.  What is divided by is the scale as it is stored.
    stored = (extreme / -8 + 0.0).to(torch.float16)
    _refuse_unless(bool(stored.isfinite().all()), f"{name}: scales of int4")
    divisor = torch.where(stored == 0, 1.0, stored.to(torch.float32))
    codes = groups.div_(divisor).round_().add_(8).clamp_(0, 15).to(torch.uint8)
    low, high = codes[..., : GROUP // 2], codes[..., GROUP // 2 :]
    values.copy_((low | (high << 4)).flatten(1))
    scales.copy_(stored.squeeze(2))


# -- back, on the device --------------------------------------------------------------------------------


def decode(
    parts: Mapping[str, Tensor],
    format: StorageFormat,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
    float8_cast: bool = True,
    table: Tensor | None = None,
) -> Tensor:
    """Convert a stored weight to ``dtype`` on the device where its parts are, without waiting for it.

    Args:
        parts: as :func:`encode` gives them; float8 values may also come as uint8.
        format: of the parts.
        shape: of the weight.
        dtype: bf16, f16 or f32.
        out: contiguous tensor of that shape and dtype to write to.
        float8_cast: whether the device converts float8; if not, bytes are looked up in ``table``.
        table: :func:`float8_table` for format and dtype on the device; made here, by a copy from the host,
            when it is needed and not given.

    Returns: ``out``, or a new tensor; without ``out``, a tensor stored in ``dtype`` comes back itself.
    Beside the result, at most :func:`decode_scratch_bytes` are used (on the CPU, where torch converts whole
    operands, a few times ``CHUNK_ELEMENTS`` floats).

    Raises:
        ValueError: ``out`` has another shape or dtype.
    """
    values = parts[""]
    if format in AS_IS and values.dtype == dtype and out is None:
        return values
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=values.device)
    elif out.dtype != dtype or tuple(out.shape) != tuple(shape):
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype} instead of {tuple(shape)} {dtype}")
    if format in AS_IS:
        return out.copy_(values)
    stored = _VALUE_DTYPES[format]
    if stored in FLOAT8_DTYPES and not float8_cast and table is None:
        table = float8_table(format, dtype, values.device)
    if not format.quantised:
        _decode_float8(values.view(-1), out.view(-1), stored, None if float8_cast else table)
        return out
    for rows in _row_ranges(shape):
        if stored in FLOAT8_DTYPES:
            _decode_float8(values[rows], out[rows], stored, None if float8_cast else table)
            # One dimension at least: torch would round a 0-d factor to the dtype of the other side first.
            per_row = parts[SCALE].ndim > 0
            out[rows].mul_(parts[SCALE][rows, None] if per_row else parts[SCALE].view(1, 1))
        elif format is StorageFormat.INT8:
            torch.mul(values[rows], parts[SCALE][rows, None], out=out[rows])
        else:
            _decode_int4(values[rows], parts[SCALE][rows], out[rows])
    return out


def float8_table(format: StorageFormat, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """The value of every byte of the float8 dtype of ``format``: (256,) in ``dtype``."""
    every_byte = torch.arange(256, dtype=torch.uint8)
    return every_byte.view(_VALUE_DTYPES[format]).to(dtype).to(device)


def decode_scratch_bytes(format: StorageFormat, shape: Sequence[int], *, float8_cast: bool = True) -> int:
    """Device memory that :func:`decode` uses for a moment beside parts, result and table."""
    chunk = min(math.prod(shape), max(CHUNK_ELEMENTS, shape[-1] if shape else 1))
    if format is StorageFormat.INT4:
        return chunk // 2 + 4 * chunk // GROUP
    return 4 * chunk if _VALUE_DTYPES[format] in FLOAT8_DTYPES and not float8_cast else 0


def _row_ranges(shape: Sequence[int]) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // shape[1])
    return (slice(first, first + step) for first in range(0, shape[0], step))


def _decode_float8(values: Tensor, out: Tensor, stored: torch.dtype, table: Tensor | None) -> None:
    """Float8 values are exact in every computation dtype, so this rounds nothing."""
    if table is None:
        out.copy_(values.view(stored))
        return
    source, target = values.view(torch.uint8).view(-1), out.view(-1)
    for first in range(0, source.numel(), CHUNK_ELEMENTS):
        piece = slice(first, first + CHUNK_ELEMENTS)
        torch.index_select(table, 0, source[piece].to(torch.int32), out=target[piece])


def _decode_int4(values: Tensor, scales: Tensor, out: Tensor) -> None:
    """``values`` (R, in / 2) uint8, ``scales`` (R, in / 32) f16, ``out`` (R, in)."""
    rows = values.shape[0]
    factors = scales.to(torch.float32).unsqueeze(2)
    halves = out.view(rows, -1, 2, GROUP // 2)
    codes = torch.empty_like(values)
    signed = codes.view(torch.int8).view(rows, -1, GROUP // 2)
    torch.bitwise_and(values, 15, out=codes)
    torch.mul(signed.sub_(8), factors, out=halves[:, :, 0])
    torch.bitwise_right_shift(values, 4, out=codes)
    torch.mul(signed.sub_(8), factors, out=halves[:, :, 1])

"""Storage formats: the documented formulas, their error bounds, and refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffsynth.errors import CheckpointError
from diffsynth.vram.format_error import format_report, relative_error
from diffsynth.vram.formats import (
    AS_IS,
    CASTS,
    CHUNK_ELEMENTS,
    GROUP,
    SCALE,
    StorageFormat,
    as_is,
    decode,
    decode_scratch_bytes,
    effective_format,
    encode,
    float8_table,
    parts,
    stored_bytes,
)
from tests.standin import StandIn

F = StorageFormat
FLOAT8 = [F.E4M3, F.E5M2, F.FP8, F.FP8_TENSOR]
QUANTISED = [F.FP8, F.FP8_TENSOR, F.INT8, F.INT4]
COMPUTE = [torch.bfloat16, torch.float16, torch.float32]
TINY = torch.finfo(torch.float32).tiny


def weight(rows: int, width: int, seed: int = 0, scale: float = 0.02) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


@st.composite
def weights(draw: st.DrawFn, step: int = 1) -> Tensor:
    """Rows of very different size, zeros among them; float32 or bfloat16; ``step`` divides the width."""
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 5)) * step
    exponents = draw(st.lists(st.integers(-40, 4), min_size=rows, max_size=rows))
    w = weight(rows, width, draw(st.integers(0, 10_000)), 1.0)
    w *= torch.tensor(exponents, dtype=torch.float32).exp2()[:, None]
    w[torch.rand(w.shape, generator=torch.Generator().manual_seed(rows)) < draw(st.floats(0, 1))] = 0.0
    return w.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


def stored(w: Tensor, format: StorageFormat) -> dict[str, Tensor]:
    made = encode(w, format)
    for spec in parts(format, w.shape):
        assert made[spec.suffix].dtype == spec.dtype
        assert tuple(made[spec.suffix].shape) == spec.shape
    assert sum(part.nbytes for part in made.values()) == stored_bytes(format, w.shape)
    return made


def back(made: dict[str, Tensor], format: StorageFormat, w: Tensor) -> Tensor:
    return decode(made, format, w.shape, torch.float32)


@settings(max_examples=60, deadline=None)
@given(weights())
def test_int8_is_within_half_a_step(w: Tensor) -> None:
    made = stored(w, F.INT8)
    q, scale = made[""], made[SCALE]
    assert int(q.min()) >= -127
    largest = w.float().abs().amax(1)
    assert torch.equal(scale, (largest / 127).clamp_min(TINY))
    assert bool(((w.float() - back(made, F.INT8, w)).abs() <= scale[:, None] * 0.50002).all())
    # The largest value of a row uses the whole range.
    assert bool((q.abs().amax(1)[largest > 127 * TINY] == 127).all())


@settings(max_examples=60, deadline=None)
@given(weights(), st.sampled_from([F.FP8, F.FP8_TENSOR]))
def test_fp8_is_within_half_a_step(w: Tensor, format: StorageFormat) -> None:
    made = stored(w, format)
    scale = made[SCALE].reshape(-1, 1)
    largest = w.float().abs().amax(1, keepdim=True) if format is F.FP8 else w.float().abs().amax()
    assert torch.equal(scale, (largest / 448).clamp_min(TINY).reshape(scale.shape))
    # 3 bits of mantissa; below the smallest normal number steps of 2**-9.
    step = torch.maximum(w.float().abs() * 2**-3, scale * 2**-9)
    assert bool(((w.float() - back(made, format, w)).abs() <= step * 0.50002).all())


@settings(max_examples=60, deadline=None)
@given(weights(step=GROUP))
def test_int4_is_within_a_step_and_keeps_the_largest_value(w: Tensor) -> None:
    made = stored(w, F.INT4)
    d = made[SCALE].float()
    groups, result = (t.reshape(w.shape[0], -1, GROUP) for t in (w.float(), back(made, F.INT4, w)))
    # f16 scales have steps of 2**-24 near zero, eight of which may be missing at the end of the range.
    slack = d.abs() * 2**-7 + 2**-22
    error = (groups - result).abs()
    inside = groups / torch.where(d == 0, 1.0, d)[..., None] <= 7
    assert bool((error <= (d.abs() + slack)[..., None]).all())
    assert bool((error <= (d.abs() / 2 + slack)[..., None])[inside].all())
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    assert bool(((extreme - -8 * d[..., None]).abs() <= slack[..., None]).all())


@pytest.mark.parametrize("format", list(F))
@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (7, 96)])
def test_zero_weights_stay_zero(format: StorageFormat, shape: tuple[int, int]) -> None:
    result = back(stored(torch.zeros(shape), format), format, torch.zeros(shape))
    assert not result.any()
    assert not result.signbit().any()


@settings(max_examples=40, deadline=None)
@given(weights(step=GROUP), st.sampled_from(list(F)), st.sampled_from(COMPUTE))
def test_decoding_is_the_formula_rounded_once(w: Tensor, format: StorageFormat, dtype: torch.dtype) -> None:
    made = stored(w, format)
    values = made[""]
    if format is F.INT4:
        halves = values.view(w.shape[0], -1, 1, GROUP // 2)
        q = torch.cat([halves & 15, halves >> 4], 2).reshape(w.shape[0], -1, GROUP).float() - 8
        formula = (q * made[SCALE].float()[..., None]).reshape(w.shape)
    else:
        formula = values.float()
        if format.quantised:
            formula = formula * made[SCALE].reshape(-1, 1)
    expected = formula.to(dtype)
    assert torch.equal(decode(made, format, w.shape, dtype), expected)
    out = torch.full(w.shape, math.nan, dtype=dtype)
    assert decode(made, format, w.shape, dtype, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("format", FLOAT8)
@pytest.mark.parametrize("dtype", COMPUTE)
def test_the_table_gives_the_bits_of_the_cast(format: StorageFormat, dtype: torch.dtype) -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(CASTS.get(format, torch.float8_e4m3fn))
    finite = every_byte[every_byte.float().isfinite()].reshape(2, -1)
    made = {"": finite, SCALE: torch.tensor(0.37 if format is F.FP8_TENSOR else [0.37, 3e-5])}
    cast = decode(made, format, finite.shape, dtype)
    assert torch.equal(cast, decode(made, format, finite.shape, dtype, float8_cast=False))
    made[""] = finite.view(torch.uint8)
    table = float8_table(format, dtype)
    assert torch.equal(cast, decode(made, format, finite.shape, dtype, float8_cast=False, table=table))
    assert torch.equal(cast, decode(made, format, finite.shape, dtype))
    assert len(set(cast.flatten().tolist())) > 200


@pytest.mark.parametrize("format", list(F))
def test_large_weights_go_piece_by_piece_to_the_same_bits(format: StorageFormat) -> None:
    width = CHUNK_ELEMENTS // 4
    small = weight(1, width)
    w = small.expand(5, width) * torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0])[:, None]
    made = stored(w, format)
    result = decode(made, format, w.shape, torch.bfloat16, float8_cast=False)
    if format is F.FP8_TENSOR:
        one = encode(w[1:2], format)
        assert torch.equal(one[""], made[""][1:2])
        expected = {"": made[""][:1], SCALE: one[SCALE]}
    else:
        expected = encode(small, format)
    first = decode(expected, format, small.shape, torch.bfloat16)
    assert torch.equal(result[:1], first)
    assert torch.equal(result[4:], first)


@pytest.mark.parametrize("format", [*QUANTISED, F.E4M3, F.E5M2, F.F16])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_infinite_values_are_refused_with_the_name(format: StorageFormat, bad: float) -> None:
    w = weight(3, 64)
    w[2, 5] = bad
    with pytest.raises(CheckpointError, match=r"blocks\.0\.ff\.weight"):
        encode(w, format, name="blocks.0.ff.weight")


def test_values_out_of_range() -> None:
    large = torch.full((2, 32), 1e6)
    with pytest.raises(CheckpointError, match="layer"):
        encode(large, F.F16, name="layer")
    with pytest.raises(CheckpointError, match="layer"):
        encode(large, F.INT4, name="layer")
    for format, limit in ((F.E4M3, 448.0), (F.E5M2, 57344.0)):
        assert bool((encode(-large, format)[""].float() == -limit).all())


def test_as_is_keeps_every_bit() -> None:
    odd = torch.tensor([0x7FC1, 0xFF80 - 0x10000, 0x0001, -0x8000], dtype=torch.int16)
    made = encode(odd.view(torch.bfloat16), F.BF16)[""]
    assert torch.equal(made.view(torch.int16), odd)
    assert decode({"": made}, F.BF16, (4,), torch.bfloat16) is made
    assert [as_is(dtype) for dtype in AS_IS.values()] == list(AS_IS)
    assert as_is(torch.float8_e5m2) is F.E5M2
    with pytest.raises(CheckpointError, match="int64"):
        as_is(torch.int64)


def test_fp8_files_keep_their_bytes() -> None:
    w = weight(6, 10, scale=100).to(torch.float8_e4m3fn)
    number, per_row = torch.tensor([0.25], dtype=torch.float32), torch.rand(6, 1) + 0.1
    for format, scale in ((F.FP8_TENSOR, number), (F.FP8, number), (F.FP8, per_row)):
        made = encode(w, format, scale=scale)
        assert torch.equal(made[""].view(torch.uint8), w.view(torch.uint8))
        assert torch.equal(made[SCALE].reshape(-1, 1).expand(6, 1), scale.expand(6, 1))
        assert torch.equal(back(made, format, w), w.float() * scale)
    # Without a place for the factor the values are converted, not reinterpreted.
    for format in (F.INT8, F.FP8_TENSOR, F.BF16, F.E5M2):
        made = encode(w, format, scale=per_row)
        assert relative_difference(back(made, format, w), w.float() * per_row) < 0.07
    plain = encode(w, F.E4M3)[""]
    assert torch.equal(plain.view(torch.uint8), w.view(torch.uint8))
    w.view(torch.uint8)[3, 3] = 0x7F
    for format in (F.FP8_TENSOR, F.FP8):
        with pytest.raises(CheckpointError, match="odd one"):
            encode(w, format, scale=number, name="odd one")
    with pytest.raises(CheckpointError, match="odd one"):
        encode(w, F.E4M3, name="odd one")
    with pytest.raises(CheckpointError, match="odd one"):
        encode(plain, F.FP8_TENSOR, scale=torch.tensor(math.inf), name="odd one")


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_shapes_that_formats_take() -> None:
    assert effective_format(F.INT4, (8, 64)) is F.INT4
    assert effective_format(F.INT4, (8, 48)) is F.INT8
    assert effective_format(F.BF16, (3,)) is F.BF16
    with pytest.raises(ValueError, match="multiple of 32"):
        parts(F.INT4, (8, 48))
    for shape in ((8,), (2, 3, 4), (0, 32), (4, 0)):
        with pytest.raises(ValueError, match="2-D"):
            effective_format(F.INT8, shape)
    assert stored_bytes(F.INT8, (10, 33)) == 330 + 40
    assert stored_bytes(F.INT4, (10, 64)) == 320 + 40
    assert stored_bytes(F.FP8_TENSOR, (10, 33)) == 334
    assert stored_bytes(F.F32, ()) == 4
    for w in (torch.ones(()), torch.ones(0), torch.ones(3, 0, 2), torch.ones(5), torch.ones(2, 3, 4)):
        for format in (*AS_IS, *CASTS):
            assert torch.equal(back(stored(w, format), format, w), w)


def test_wrong_arguments() -> None:
    w = weight(2, 32)
    with pytest.raises(ValueError, match="int32"):
        encode(w.to(torch.int32), F.BF16)
    with pytest.raises(ValueError, match="scale"):
        encode(w.to(torch.float8_e4m3fn), F.FP8, scale=torch.ones(3))
    made = encode(w, F.INT8)
    with pytest.raises(ValueError, match="out is"):
        decode(made, F.INT8, w.shape, torch.bfloat16, out=torch.empty(2, 32))
    with pytest.raises(ValueError, match="out is"):
        decode(made, F.INT8, w.shape, torch.float32, out=torch.empty(32, 2))


@pytest.mark.parametrize("format", list(F))
def test_decoding_on_a_device_without_float8_and_float64(format: StorageFormat) -> None:
    w = weight(5, 64)
    made = encode(w, format)
    expected = decode(made, format, w.shape, torch.bfloat16)
    with StandIn() as device, torch.inference_mode():
        bytes_ = {s: t.view(torch.uint8) if t.dtype.itemsize == 1 else t for s, t in made.items()}
        there = {suffix: part.to(device.torch_device) for suffix, part in bytes_.items()}
        if format is F.INT8:
            there[""] = there[""].view(torch.int8)
        table = float8_table(format, torch.bfloat16, device.torch_device) if format in FLOAT8 else None
        out = torch.empty(w.shape, dtype=torch.bfloat16, device=device.torch_device)
        device.reset_peak()
        before = device.current_bytes
        decode(there, format, w.shape, torch.bfloat16, out=out, float8_cast=False, table=table)
        scratch = decode_scratch_bytes(format, w.shape, float8_cast=False)
        assert device.peak_bytes - before == scratch
        assert device.current_bytes == before
        assert torch.equal(out.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("format", list(F))
@pytest.mark.parametrize("dtype", COMPUTE)
def test_cuda_decodes_to_the_bits_of_the_cpu(format: StorageFormat, dtype: torch.dtype) -> None:
    w = weight(2500, 2048) * torch.logspace(-3, 1, 2500)[:, None]
    made = encode(w, format)
    expected = decode(made, format, w.shape, dtype)
    there = {suffix: part.to("cuda") for suffix, part in made.items()}
    for float8_cast in (True, False):
        found = decode(there, format, w.shape, dtype, float8_cast=float8_cast)
        assert torch.equal(found.cpu(), expected)


def test_errors_of_formats_are_what_the_literature_says() -> None:
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(3)) * 0.02
    measured = {e.format: e for e in format_report([("layer", w), ("bias", w[0])], list(F), seed=1)}
    assert list(measured) == list(F)
    assert measured[F.INT8].weight_error == pytest.approx(0.0075, rel=0.1)
    assert measured[F.FP8].weight_error == pytest.approx(0.0265, rel=0.05)
    assert measured[F.E5M2].weight_error == pytest.approx(0.053, rel=0.05)
    assert measured[F.INT4].weight_error == pytest.approx(0.088, rel=0.05)
    assert measured[F.F32].weight_error == 0
    for format, error in measured.items():
        assert error.weight_error == pytest.approx(relative_error(w, format))
        assert error.output_error == pytest.approx(error.weight_error, rel=0.05)
        assert error.stored_bytes == stored_bytes(format, w.shape)
    assert relative_error(torch.zeros(2, 32), F.INT4) == 0
    (odd,) = format_report([("odd", w[:, :33])], [F.INT4])
    assert odd.format is F.INT8

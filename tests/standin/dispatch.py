"""Every operation on the stand-in passes here: checked, run on the CPU tensors inside, counted, wrapped."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.standin.device import StandIn
from tests.standin.errors import UnsupportedOnDeviceError
from tests.standin.operations import BYTE_MOVES, FLOAT8, REFUSED, SYNCS, VIEWS
from tests.standin.streams import POISON
from tests.standin.tensor import DEVICE_TYPE, StandInTensor

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
CPU = torch.device("cpu")


def dispatch(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Run one ATen operation of which an argument, or the wanted device, is the stand-in."""
    name = func.overloadpacket.__name__
    if name == "_has_compatible_shallow_copy_type":
        # Decides how nn.Module moves its parameters: in place, or as new ones.
        return isinstance(args[0], StandInTensor) and isinstance(args[1], StandInTensor)
    owner = StandIn.current()
    with owner.lock:
        owner.scheduler.raise_violation()
        for tensor in _tensors((args, kwargs)):
            if isinstance(tensor, StandInTensor) and tensor.owner is not owner:
                raise UnsupportedOnDeviceError(f"{name}: the tensor belongs to a stand-in that was closed")
        special = _SPECIAL.get(name)
        if special is not None:
            return special(owner, func, args, kwargs)
        return _run(owner, func, args, kwargs)


def _run(owner: StandIn, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """An operation on the device, or a factory for it."""
    name = func.overloadpacket.__name__
    _check(owner, name, func, args, kwargs)
    outside = _stays_outside(func, args, kwargs)
    note_accesses(owner, name, func, args, kwargs)
    if name in SYNCS or _has_boolean_index(name, args):
        owner.sync_compute()
    known: dict[int, StandInTensor] = {
        id(t.inside): t for t in _tensors((args, kwargs)) if isinstance(t, StandInTensor)
    }
    if len(known) > 1:
        owner.load_libraries()
    result = func(*_map(_unwrap, args), **_map(_unwrap, dict(kwargs)))
    if "empty" in name:
        _poison(result)

    def outer(value: Any) -> Any:
        if outside or not isinstance(value, Tensor):
            return value
        if id(value) in known:
            return _unchanged(owner, known[id(value)], name)
        return StandInTensor.wrap(value, name, owner)

    return _map(outer, result)


def _check(owner: StandIn, name: str, func: Any, args: Args, kwargs: Kwargs) -> None:
    """Raise for what a real device would refuse."""
    if name in REFUSED:
        raise UnsupportedOnDeviceError(f"{name} is not modelled by the stand-in")
    given = list(_tensors((args, kwargs)))
    host = [t for t in given if not isinstance(t, StandInTensor) and t.dim() > 0]
    if host:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, but found {DEVICE_TYPE}:0 and "
            f"{host[0].device} (a host tensor of shape {tuple(host[0].shape)})"
        )
    generator = _named(func, args, kwargs).get("generator")
    if isinstance(generator, torch.Generator):
        raise RuntimeError(f"{name}: expected a {DEVICE_TYPE!r} device type for generator but found 'cpu'")
    if owner.strict_dtypes and name not in BYTE_MOVES and any(t.dtype in FLOAT8 for t in given):
        raise UnsupportedOnDeviceError(f"{name}: the device has no float8 arithmetic")


def note_accesses(owner: StandIn, name: str, func: Any, args: Args, kwargs: Kwargs) -> None:
    """Check what the operation reads and writes against the copy streams.  A view does neither."""
    if name in VIEWS:
        return
    touched = []
    values = _named(func, args, kwargs)
    for argument in func._schema.arguments:
        write = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(values.get(argument.name)):
            if isinstance(tensor, StandInTensor):
                touched.append((tensor.allocation.log, tensor.span(write), tensor.allocation.label))
    owner.scheduler.access(owner.scheduler.compute, touched, name)


def _unchanged(owner: StandIn, tensor: StandInTensor, name: str) -> StandInTensor:
    """The tensor that an operation wrote to, which may have resized it."""
    if tensor.inside.shape != tensor.shape or tensor.inside.stride() != tensor.stride():
        owner.memory.recount(tensor.allocation)
        tensor.data = StandInTensor.wrap(tensor.inside, name, owner)
    return tensor


# -- operations with a meaning of their own -------------------------------------------------------------


def _to(owner: StandIn, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``Tensor.to`` and its like, undivided as they come under inference mode."""
    named = _named(func, args, kwargs)
    source: Tensor = named["self"]
    other = named.get("other")
    device = other.device if other is not None else named.get("device")
    dtype = other.dtype if other is not None else named.get("dtype")
    device = torch.device(device or source.device)
    dtype = dtype or source.dtype
    if device.type == source.device.type and dtype == source.dtype and not named.get("copy"):
        return source
    return _transfer(owner, source, device, dtype, named.get("memory_format"))


def _to_copy(owner: StandIn, func: Any, args: Args, kwargs: Kwargs) -> Any:
    named = _named(func, args, kwargs)
    source: Tensor = named["self"]
    device = torch.device(named.get("device") or source.device)
    return _transfer(owner, source, device, named.get("dtype") or source.dtype, named.get("memory_format"))


def _transfer(
    owner: StandIn, source: Tensor, device: torch.device, dtype: torch.dtype, memory_format: Any
) -> Tensor:
    """A copy of ``source`` on ``device`` in ``dtype``."""
    _check_cast(owner, source.dtype, dtype)
    if memory_format is None:
        memory_format = torch.preserve_format
    if device.type == "meta":
        return torch.empty_like(source, dtype=dtype, device="meta")
    convert = torch.ops.aten._to_copy.default
    if not isinstance(source, StandInTensor):
        owner.check_dtype(dtype, "to")
        made = StandInTensor.wrap(convert(source, dtype=dtype, memory_format=memory_format), "to", owner)
        owner.count_to_device(made.nbytes)
        return made
    log = (source.allocation.log, source.span(False), source.allocation.label)
    owner.scheduler.access(owner.scheduler.compute, [log], "to")
    copied = convert(source.inside, dtype=dtype, memory_format=memory_format)
    if device.type == DEVICE_TYPE:
        return StandInTensor.wrap(copied, "to", owner)
    owner.count_to_host(copied.nbytes)
    return copied


def _copy_(owner: StandIn, func: Any, args: Args, kwargs: Kwargs) -> Any:
    named = _named(func, args, kwargs)
    source_name = "src" if func.overloadpacket.__name__ == "copy_" else "self"
    target: Tensor = named["self" if source_name == "src" else "dst"]
    source: Tensor = named[source_name]
    _check_cast(owner, source.dtype, target.dtype)
    touched = [
        (t.allocation.log, t.span(write), t.allocation.label)
        for t, write in ((target, True), (source, False))
        if isinstance(t, StandInTensor)
    ]
    owner.scheduler.access(owner.scheduler.compute, touched, "copy_")
    _unwrap(target).copy_(_unwrap(source))
    if not isinstance(source, StandInTensor):
        if source.dim() > 0:
            owner.count_to_device(target.nbytes)
    elif not isinstance(target, StandInTensor):
        owner.count_to_host(target.nbytes)
    return target


def _detach(owner: StandIn, func: Any, args: Args, kwargs: Kwargs) -> Any:
    return StandInTensor.wrap(args[0].inside, "detach", owner)


def _false(owner: StandIn, func: Any, args: Args, kwargs: Kwargs) -> Any:
    return False


def _check_cast(owner: StandIn, source: torch.dtype, target: torch.dtype) -> None:
    if owner.strict_dtypes and source != target and (source in FLOAT8 or target in FLOAT8):
        raise UnsupportedOnDeviceError(
            f"the device cannot convert {source} to {target}: float8 is stored bytes there, to be looked up"
        )


_SPECIAL: dict[str, Callable[[StandIn, Any, Args, Kwargs], Any]] = {
    "to": _to,
    "_to_copy": _to_copy,
    "copy_": _copy_,
    "_copy_from": _copy_,
    "detach": _detach,
    "is_pinned": _false,
}


# -- arguments ------------------------------------------------------------------------------------------


def _named(func: Any, args: Args, kwargs: Kwargs) -> dict[str, Any]:
    """Arguments by the names of the schema."""
    names = [a.name for a in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _poison(tensor: Tensor) -> None:
    """Memory that nobody has written holds NaN, so that using it shows."""
    tensor.untyped_storage().fill_(POISON)  # type: ignore[attr-defined]


def _stays_outside(func: Any, args: Args, kwargs: Kwargs) -> bool:
    """True when the result of a factory such as ``zeros_like(x, device="cpu")`` stays off the device."""
    device = _named(func, args, kwargs).get("device")
    if device is None or torch.device(device).type == DEVICE_TYPE:
        return False
    name = func.overloadpacket.__name__
    if not (name.startswith("new_") or name.endswith("_like")):
        raise UnsupportedOnDeviceError(f"{name} to {device} is not modelled by the stand-in")
    return True


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, item) for item in value)
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return function(value)


def _unwrap(value: Any) -> Any:
    if isinstance(value, StandInTensor):
        return value.inside
    if isinstance(value, torch.device) and value.type == DEVICE_TYPE:
        return CPU
    return value


def _has_boolean_index(name: str, args: Args) -> bool:
    """Indexing by a mask finds the indices first, and the host must know how many there are."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    return any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(list(args[1])))

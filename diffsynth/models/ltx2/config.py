"""Configurations come from the checkpoint: one strict parser for the sections of its ``config`` metadata.

Every network file of this package exposes the same four things, so that the loader can treat all alike:

* ``<Name>Config``: a frozen dataclass with
  ``from_sections(config)``: from the parsed JSON of the checkpoint's metadata key ``config``, and
  ``infer(shapes)``: from parameter shapes alone, for repackaged files without metadata;
* ``<Name>(config)``: an ``nn.Module`` whose ``state_dict`` holds exactly the checkpoint's keys below the
  prefixes, and nothing that is not in the file, so that it can be built on the meta device;
* ``KEY_PREFIXES``: file prefix -> module prefix.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from diffsynth.errors import CheckpointError

Sections = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
ConfigT = TypeVar("ConfigT")


def parse_section(
    cls: type[ConfigT],
    section: Mapping[str, Any],
    *,
    ignored: frozenset[str] = frozenset(),
    required: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Build the dataclass ``cls`` from one section of the metadata.

    Args:
        cls: a dataclass; its fields without default are mandatory keys.
        section: the JSON object as stored in the file.
        ignored: keys known to change nothing in the arithmetic.
        required: keys that are not fields but must have this value when present, because the network
            implements only that one (for instance ``qk_norm: rms_norm``).

    Raises:
        CheckpointError: an unknown key, a missing key, or a value that the network does not implement.
    """
    required = required or {}
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    extra = section.keys() - known.keys() - ignored - required.keys()
    missing = [n for n, f in known.items() if n not in section and f.default is MISSING]
    if extra or missing:
        raise CheckpointError(
            f"{cls.__name__}: unknown keys {sorted(extra)}, missing keys {missing}",
            hint="the file is newer than this diffsynth, or another model: `diffsynth inspect FILE`",
        )
    for key, value in required.items():
        if key in section and section[key] != value:
            raise CheckpointError(
                f"{cls.__name__}: {key}={section[key]!r} is not supported, only {value!r}",
                hint="the file belongs to another model: `diffsynth inspect FILE`",
            )
    return cls(**{name: _freeze(section[name]) for name in known if name in section})


def _freeze(value: Any) -> Any:
    """Lists of the JSON become tuples, so that a configuration is hashable and cannot be changed."""
    if isinstance(value, list):
        return tuple(_freeze(item) for item in value)
    return value

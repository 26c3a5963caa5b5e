"""A network whose weights the memory manager brings: packed blocks on the host, views on the device.

The module itself holds no weights.  During a phase, between ``enter`` and ``exit``, the tensors outside the
blocks are on the device, and each block's tensors are while the block computes: its parameters become views
of a slot, and the weights of its linear layers are decoded one by one, right before use, into one buffer.
Resident blocks go the same way, decoding included, so where a block lies never shows in the results.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any

import torch
from torch import nn

from diffsynth.device import Backend
from diffsynth.errors import CheckpointError
from diffsynth.vram.adapters import Adapter, AdapterContents, Adapters, check_adapters
from diffsynth.vram.binding import REST, BlockBinding, Contents, check_complete, contents_of, empty_module
from diffsynth.vram.linear import Decoder, LinearCall, decoded_bytes
from diffsynth.vram.source import BlockSource, TensorSource
from diffsynth.vram.streamer import Streamer, Traffic


@dataclass(slots=True)
class _Phase:
    """Everything that lives from ``enter`` to ``exit``."""

    decoder: Decoder
    streamer: Streamer[Contents]
    residents: frozenset[str]
    adapter_streamer: Streamer[AdapterContents] | None = None


class ManagedModule:
    """See the module.  For one thread.

    Gradients flow through the weights, which have none themselves; for its way back a block is in its place
    as long as :meth:`hold` keeps it there.  Whole networks without blocks come and go with ``enter`` and
    ``exit``.  Linear layers stay the same objects, and hooks on them work.
    """

    def __init__(
        self,
        module: nn.Module,
        source: BlockSource,
        backend: Backend,
        *,
        blocks: Sequence[str] = (),
        rest: Sequence[str] = (REST,),
        host: Sequence[str] = (),
        left_out: Collection[str] = (),
    ) -> None:
        """Take over a module: its tensors, if it has any, are dropped.

        Args:
            module: the network; best built on the meta device.
            source: of its blocks.  Entries bear the names of the module's state dict.
            backend: of the device.
            blocks: names of submodules, and of their blocks, in the order in which they run.  A block runs
                once per traversal, whatever it is called with.
            rest: blocks that are on the device throughout a phase; those that the source lacks are passed
                over.
            host: blocks that stay on the host, such as an embedding table that is read row by row.
            left_out: tensors that nobody reads from the module.

        Raises:
            CheckpointError: the blocks do not hold exactly the tensors of the module.
        """
        self.module = module
        self._source = source
        self._backend = backend
        self._blocks = tuple(blocks)
        self._rest = tuple(name for name in rest if name in source.names)
        self._host = tuple(host)
        empty_module(module)
        layouts = {name: source.layout(name) for name in (*blocks, *self._rest, *host)}
        check_complete(module, layouts, left_out, blocks)
        self._bindings = {
            name: BlockBinding(module, name, layout, decodes=name not in self._host)
            for name, layout in layouts.items()
        }
        self._calls: dict[str, LinearCall] = {}
        for binding in self._bindings.values():
            for _, _, layer in binding.decoded:
                self._call(layer)
            binding.use_calls(self._calls)
        self._adapters = Adapters({}, {}, ())
        self._adapter_source: BlockSource | None = None
        self._phase: _Phase | None = None
        self._held: str | None = None
        for name in blocks:
            submodule = module.get_submodule(name)
            submodule.__dict__["forward"] = _BlockCall(self, name, submodule.forward)

    # -- phases ---------------------------------------------------------------------------------------

    def enter(
        self,
        *,
        residents: Collection[str] = (),
        slots: int = 2,
        source: BlockSource | None = None,
        adapter_residents: Collection[str] = (),
        adapter_slots: int = 2,
        back: bool = False,
    ) -> None:
        """Begin a phase: allocate everything it needs and load what is resident.

        Args:
            residents: blocks that stay on the device.
            slots: buffers for the others; 0 if no other block will run.
            source: of the blocks from now on, with the same layouts; None: the one before.
            adapter_residents: blocks whose adapters stay on the device.
            adapter_slots: buffers for the adapters of the others.
            back: every second traversal goes from the last block to the first.

        Raises:
            RuntimeError: a phase is on.
            CheckpointError: a block cannot be read.
            torch.OutOfMemoryError: or what the backend raises; then nothing is allocated, and a smaller
                phase may be entered.
        """
        if self._phase is not None:
            raise RuntimeError("a phase of this module is on: exit() comes first")
        if source is not None:
            self._use_source(source)
        try:
            self._enter(residents, slots, adapter_residents, adapter_slots, back)
        except BaseException as error:
            self.exit()
            clear_frames(error.__traceback__)  # whoever handles the error needs the memory now
            raise

    def exit(self) -> None:
        """End the phase: all device memory goes back, and on the host what the sources took for it."""
        phase, self._phase = self._phase, None
        for binding in self._bindings.values():
            binding.unbind()
        for call in self._calls.values():
            call.decode, call.adapters = None, ()
        if phase is None:
            return
        try:
            if phase.adapter_streamer is not None:
                phase.adapter_streamer.close()
        finally:
            phase.streamer.close()

    @contextmanager
    def active(self, **how: Any) -> Iterator[nn.Module]:
        """``with managed.active(slots=2) as module``: :meth:`enter` with these arguments and :meth:`exit`."""
        self.enter(**how)
        try:
            yield self.module
        finally:
            self.exit()

    def _enter(
        self,
        residents: Collection[str],
        slots: int,
        adapter_residents: Collection[str],
        adapter_slots: int,
        back: bool,
    ) -> None:
        used = [*self._rest, *(self._blocks if slots else residents)]
        with torch.inference_mode(False):
            decoder = Decoder(self._backend, self.scratch_bytes(used))
            for name in used:
                for _, entry, layer in self._bindings[name].decoded:
                    self._calls[layer].decode = decoder.bind(entry)
        streamer = Streamer(
            self._backend,
            self._source,
            [*self._blocks, *self._rest],
            slots=slots,
            residents={*residents, *self._rest},
            prepare=contents_of,
            back=back,
        )
        self._phase = _Phase(decoder, streamer, frozenset(streamer.residents))
        for name in streamer.residents:
            self._bindings[name].bind(streamer.acquire(name))
        for name in self._host:
            layout = self._source.layout(name)
            with torch.inference_mode(False):
                views = layout.views(self._source.host_view(name))
            self._bindings[name].bind(contents_of(layout, views))
        self._phase.adapter_streamer = self._open_adapters(adapter_residents, adapter_slots)

    # -- adapters -------------------------------------------------------------------------------------

    def set_adapters(
        self,
        adapters: Mapping[str, Sequence[Adapter]],
        *,
        source: Callable[[Adapters], BlockSource] | None = None,
    ) -> None:
        """Replace all adapters, between phases; an empty mapping removes them, and every bit is as before.

        Args:
            adapters: by name of the linear layer, in the order of adding.
            source: makes the source of the adapters' blocks; by default reader threads pack them from the
                given tensors, which must stay unchanged.

        Raises:
            RuntimeError: a phase is on.
            CheckpointError: a layer does not exist, or shapes do not fit it.
        """
        if self._phase is not None:
            raise RuntimeError("adapters change between phases: exit() comes first")
        blocks = [*self._blocks, *self._rest]
        places = {
            entry.name.removesuffix(".weight"): (block, entry.dtype)
            for block in blocks
            for entry in self._source.layout(block).entries
        }
        for layer, items in adapters.items():
            check_adapters(self.module.get_submodule(layer) if layer in places else None, layer, items)
        laid_out = Adapters(adapters, places, blocks)
        decoding = {layer for binding in self._bindings.values() for _, _, layer in binding.decoded}
        for layer in self._calls.keys() - decoding:
            self._calls.pop(layer).uninstall()
        for layer in laid_out.layers():
            self._call(layer)
        self._adapters = laid_out
        if source is not None:
            self._adapter_source = source(laid_out)
        else:
            tensors = laid_out.tensors
            self._adapter_source = TensorSource(laid_out.layouts, tensors.__getitem__, self._backend)

    def _open_adapters(self, residents: Collection[str], slots: int) -> Streamer[AdapterContents] | None:
        blocks = tuple(self._adapters.layouts)
        if not blocks:
            return None
        assert self._adapter_source is not None
        streamer = Streamer(
            self._backend,
            self._adapter_source,
            blocks,
            slots=slots,
            residents={*self._rest, *residents}.intersection(blocks),
            prepare=AdapterContents,
            label="adapters",
        )
        for name in streamer.residents:
            self._bind_adapters(name, streamer.acquire(name))
        return streamer

    def _bind_adapters(self, block: str, contents: AdapterContents) -> None:
        for layer, placed in contents.of(block, self._adapters):
            self._calls[layer].adapters = placed

    # -- figures --------------------------------------------------------------------------------------

    @property
    def entered(self) -> bool:
        """Whether a phase is on."""
        return self._phase is not None

    @property
    def source(self) -> BlockSource:
        """Of the blocks."""
        return self._source

    @property
    def traffic(self) -> Traffic:
        """What the phase has moved so far, adapters included; nothing outside of a phase."""
        if self._phase is None:
            return Traffic()
        moved = self._phase.streamer.traffic
        if self._phase.adapter_streamer is None:
            return moved
        added = self._phase.adapter_streamer.traffic
        added.traversals = 0
        return moved + added

    @property
    def device_bytes(self) -> int:
        """Device memory that the phase holds: residents, slots, adapters, buffer for decoded weights."""
        if self._phase is None:
            return 0
        adapters = self._phase.adapter_streamer
        return (
            self._phase.decoder.device_bytes
            + self._phase.streamer.device_bytes
            + (0 if adapters is None else adapters.device_bytes)
        )

    @property
    def host_bytes(self) -> int:
        """Host memory that the sources hold now."""
        adapters = 0 if self._adapter_source is None else self._adapter_source.host_bytes
        return self._source.host_bytes + adapters

    def scratch_bytes(self, blocks: Sequence[str] | None = None) -> int:
        """Bytes for the largest decoded weight of some blocks (None: all)."""
        names = [*self._blocks, *self._rest] if blocks is None else blocks
        entries = [entry for name in names for _, entry, _ in self._bindings[name].decoded]
        return max((decoded_bytes(entry) for entry in entries), default=0)

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Within the ``with`` block the tensors of one block are in the module, however often it runs."""
        self.begin_block(name)
        self._held = name
        try:
            yield
        finally:
            self._held = None
            self.end_block(name)

    # -- inside ---------------------------------------------------------------------------------------

    def begin_block(self, name: str) -> None:
        """Bring a block's tensors into the module."""
        phase = self._phase
        if phase is None:
            raise RuntimeError(f"{name} has no weights: enter() comes before the first use")
        if name == self._held:
            return
        contents = phase.streamer.acquire(name)
        if name not in phase.residents:
            self._bindings[name].bind(contents)
        adapters = phase.adapter_streamer
        if adapters is not None and name in self._adapters.layouts:
            self._bind_adapters(name, adapters.acquire(name))

    def end_block(self, name: str) -> None:
        """Take them out again: what the block computes has been issued."""
        phase = self._phase
        if phase is None or name == self._held:
            return
        if name not in phase.residents:
            self._bindings[name].unbind()
            phase.streamer.release(name)
        if phase.adapter_streamer is not None:
            phase.adapter_streamer.release(name)

    def _use_source(self, source: BlockSource) -> None:
        for name in self._bindings:
            if name not in source.names or source.layout(name) != self._source.layout(name):
                raise CheckpointError(
                    f"block {name!r} lies otherwise in the new source", hint="make both from one packed file"
                )
        self._source = source

    def _call(self, layer: str) -> LinearCall:
        """The call of a linear layer, installed now if it was not."""
        if layer not in self._calls:
            linear = self.module.get_submodule(layer)
            assert isinstance(linear, nn.Linear)
            self._calls[layer] = LinearCall(linear)
            self._calls[layer].install()
        return self._calls[layer]


class _BlockCall:
    """The ``forward`` of one block: the block's weights are there while it runs."""

    def __init__(self, owner: ManagedModule, name: str, forward: Callable[..., Any]) -> None:
        self._owner = owner
        self._name = name
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._owner.begin_block(self._name)
        try:
            return self._forward(*args, **kwargs)
        finally:
            self._owner.end_block(self._name)

"""What a user allows a pipeline to take, and how that becomes a budget and a storage policy."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from diffsynth.device import Backend
from diffsynth.errors import RequestError
from diffsynth.loader import ModelConfig, NetworkKind, NetworkWeights
from diffsynth.pipelines.states import asks_for_management, storage_for
from diffsynth.pipelines.storage import Storage
from diffsynth.vram.link import MachineFigures, machine_budget, machine_figures
from diffsynth.vram.planner import Budget

GB = 2**30
AUTO = "auto"
AUTO_SHARE = 0.95
"""Of the memory that is free now: other programs want some, and fragments cannot be used."""
DEFAULT_STORAGE = "int8"


class VRAMPreset(StrEnum):
    """Cards by their memory: a limit that leaves room for a desktop, and the storage that fits it best."""

    GB_4 = "4gb"
    GB_6 = "6gb"
    GB_8 = "8gb"
    GB_12 = "12gb"
    GB_16 = "16gb"
    GB_24 = "24gb"

    @property
    def limit_gb(self) -> float:
        """Device memory to stay under: nine tenths of the card."""
        return 0.9 * int(self.value.removesuffix("gb"))

    @property
    def storage(self) -> str:
        """4-bit weights where 8 bits leave too little room for anything else."""
        return "int4" if self is VRAMPreset.GB_4 else DEFAULT_STORAGE


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLimits:
    """The memory arguments of a pipeline.

    Attributes:
        vram_limit: GB of 2**30 bytes, "auto" (what is free now), the name of a :class:`VRAMPreset`, or None:
            no limit, whatever else is given.
        host_limit: GB of host memory for the whole process; None: what is free now.
        storage: name of a storage format; None: what ``model_configs`` say, else that of the preset, or int8.
            A network whose file holds linear weights as float8 e4m3 is stored as the file has it instead of
            int8, see :meth:`~diffsynth.pipelines.storage.Storage.following`.
        cache: whether converted weights are kept on the disk; otherwise they are packed into host memory.
        prefetch_count: blocks that may be on their way to the device while one computes, where they fit;
            None: one, which is enough wherever a copy is shorter than the computation.
    """

    vram_limit: float | str | None = None
    host_limit: float | None = None
    storage: str | None = None
    cache: bool = True
    prefetch_count: int | None = None

    def __post_init__(self) -> None:
        limits = [("host_limit", self.host_limit)]
        if isinstance(self.vram_limit, str):
            known = [AUTO, *VRAMPreset]
            if self.vram_limit not in known:
                raise RequestError(
                    f"vram_limit={self.vram_limit!r} is not known", hint=f"a number of GB, {', '.join(known)}"
                )
        else:
            limits.append(("vram_limit", self.vram_limit))
        for name, value in limits:
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise RequestError(f"{name}={value!r} is not a positive number of GB", hint=f"{name}=7.5")
        count = self.prefetch_count
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise RequestError(f"prefetch_count={count!r} is no number of blocks", hint="prefetch_count=1")
        if self.storage is not None:
            Storage.named(self.storage)

    def asks_for_management(self, configs: Mapping[NetworkKind, ModelConfig]) -> bool:
        """Whether weights are brought phase by phase instead of lying on the device."""
        given = {self.vram_limit, self.host_limit, self.storage, self.prefetch_count}
        return given != {None} or any(map(asks_for_management, configs.values()))

    def storage_policy(
        self, configs: Mapping[NetworkKind, ModelConfig], networks: Mapping[NetworkKind, NetworkWeights]
    ) -> Storage:
        """Formats: those that ``storage`` names, else those of the configurations, else the default.

        Args:
            configs: by network, the configuration that named its file.
            networks: by network, where its tensors lie.
        """
        if self.storage is not None:
            return Storage.named(self.storage)
        preset = self._preset()
        name = preset.storage if preset else DEFAULT_STORAGE
        return storage_for(Storage.named(name), configs, networks if name == DEFAULT_STORAGE else {})

    def budget(self, backend: Backend) -> Budget:
        """What a plan may use on this machine now.

        The first call on a machine measures it; what the context of a device takes can only be measured
        before the process has a tensor there.

        Raises:
            RequestError: "auto" on a device that cannot tell its memory.
        """
        workspaces = backend.capabilities.workspaces
        vram_bytes = self._vram_bytes(backend)  # first: measuring loads libraries, which take some
        figures = machine_figures(backend) if workspaces else MachineFigures()
        budget = machine_budget(
            backend,
            figures,
            vram_bytes=vram_bytes,
            host_bytes=None if self.host_limit is None else int(self.host_limit * GB),
            workspaces=workspaces,
        )
        return budget if self.prefetch_count is None else replace(budget, slots=self.prefetch_count + 1)

    def _preset(self) -> VRAMPreset | None:
        if isinstance(self.vram_limit, str) and self.vram_limit != AUTO:
            return VRAMPreset(self.vram_limit)
        return None

    def _vram_bytes(self, backend: Backend) -> int | None:
        preset = self._preset()
        if preset is not None:
            return int(preset.limit_gb * GB)
        if isinstance(self.vram_limit, str):
            memory = backend.memory()
            if memory.free is None:
                raise RequestError(
                    f"vram_limit='auto': {backend.device} cannot tell its memory", hint="vram_limit=7.5"
                )
            # A plan counts the context, which asking has made if it was not there.
            there = memory.free + (memory.reserved or 0) + backend.capabilities.context_bytes
            return int(AUTO_SHARE * there)
        return None if self.vram_limit is None else int(self.vram_limit * GB)

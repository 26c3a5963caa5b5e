"""Put opened models under the memory manager."""

import torch

from diffsynth.device import backend_for
from diffsynth.loader import NetworkKind
from diffsynth.pipelines.assemble import PART_OF, Assembly, OpenedModels
from diffsynth.pipelines.enhanced_cache import EnhancedPromptCache
from diffsynth.pipelines.limits import MemoryLimits
from diffsynth.pipelines.memory import ManagedMemory
from diffsynth.pipelines.prompt_cache import PromptCache
from diffsynth.pipelines.states import kept_on_disk
from diffsynth.pipelines.storage import Storage
from diffsynth.vram.cache import PackedCache, default_folder


def manage(opened: OpenedModels, limits: MemoryLimits, device: torch.device, dtype: torch.dtype) -> Assembly:
    """Parts without weights, and a memory manager that brings them; nothing is read yet.

    Raises:
        RequestError: limits that cannot be met on this device.
    """
    backend = backend_for(device)
    budget = limits.budget(backend)  # first: it measures a device that holds no tensor yet
    assembly = opened.hold(device, dtype)
    storage = limits.storage_policy(opened.configs, opened.networks)
    if limits.cache:
        _add_caches(assembly, opened, storage, dtype)
    assembly.parts.memory = ManagedMemory(
        assembly.parts,
        {PART_OF[kind]: weights for kind, weights in opened.networks.items()},
        storage,
        backend,
        budget,
        cache=PackedCache() if limits.cache else None,
        on_disk=[PART_OF[kind] for kind in kept_on_disk(opened.configs)],
    )
    return assembly


def _add_caches(assembly: Assembly, opened: OpenedModels, storage: Storage, dtype: torch.dtype) -> None:
    """For prompts of this text model, as far as it comes from files."""
    kinds = (NetworkKind.GEMMA, NetworkKind.TEXT_CONNECTORS)
    networks = {PART_OF[kind]: opened.networks[kind] for kind in kinds if kind in opened.networks}
    found = list(networks.values())
    if opened.tokenizer is None or len(networks) < len(kinds) or not all(w.files.paths for w in found):
        return
    folder = default_folder().parent / "prompts"
    files = [path for weights in found for path in weights.files.paths]
    length = opened.networks[NetworkKind.TEXT_CONNECTORS].config.text_length
    formats = [storage.policy_of(part, weights, dtype) for part, weights in networks.items()]
    assembly.parts.prompt_cache = PromptCache(
        folder,
        files=[*files, *opened.tokenizer.files],
        settings=f"{'; '.join(formats)}; {length} tokens",
    )
    assembly.parts.enhanced_cache = EnhancedPromptCache(
        folder, files=[*found[0].files.paths, *opened.tokenizer.files], settings=formats[0]
    )

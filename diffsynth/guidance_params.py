"""Guidance of one modality as plain numbers; the arithmetic is in :mod:`diffsynth.sampling.guidance`."""

from dataclasses import dataclass

from diffsynth.errors import RequestError
from diffsynth.validation import check_finite, check_types

CFG_KINDS = ("cfg", "cfg_star", "apg")
"""Plain, projected per sample (CFG-Zero*), adaptive projected guidance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidanceParams:
    """Guidance of one modality.  The defaults are neutral: nothing but the conditional pass runs.

    ``pred = cond + (cfg - 1)(cond - uncond) + stg (cond - perturbed) + (modality - 1)(cond - isolated)``,
    then rescaled towards the standard deviation of ``cond`` by ``rescale_scale`` in [0, 1].

    Attributes:
        cfg_scale: weight of the prompt against the negative prompt; 1 is off.
        stg_scale: weight of skipped self-attention in ``stg_blocks``, which count from 0; 0 is off.
        modality_scale: weight of hearing and seeing the other modality; 1 is off.
        skip_step: so many steps are left out after each one that is done.
        cfg_kind: how the term of the negative prompt is made, one of :data:`CFG_KINDS`.
        apg_eta: with "apg", weight of the part that is parallel to ``cond``.
        apg_norm_threshold: with "apg", cap on the norm of the term; 0 is none.
    """

    cfg_scale: float = 1.0
    stg_scale: float = 0.0
    stg_blocks: tuple[int, ...] = ()
    rescale_scale: float = 0.0
    modality_scale: float = 1.0
    skip_step: int = 0
    cfg_kind: str = "cfg"
    apg_eta: float = 1.0
    apg_norm_threshold: float = 0.0

    def validate(self, name: str) -> None:
        """Raise RequestError when a value cannot work; ``name`` is the argument that holds this object."""
        check_types(self, f"{name}.")
        scales = ("cfg_scale", "stg_scale", "rescale_scale", "modality_scale")
        for key in (*scales, "apg_eta", "apg_norm_threshold"):
            check_finite(f"{name}.{key}", getattr(self, key))
        if not 0 <= self.rescale_scale <= 1:
            raise RequestError(
                f"{name}.rescale_scale={self.rescale_scale} is outside 0..1", hint="0.7, or 0 for none"
            )
        if self.skip_step < 0 or any(block < 0 for block in self.stg_blocks):
            raise RequestError(
                f"{name}: skip_step and stg_blocks count from 0", hint="0 or a positive number"
            )
        if self.stg_scale != 0 and not self.stg_blocks:
            raise RequestError(
                f"{name}.stg_scale={self.stg_scale} needs stg_blocks",
                hint="stg_blocks=(29,) for LTX-2, (28,) for LTX-2.3",
            )
        if self.cfg_kind not in CFG_KINDS:
            raise RequestError(f"{name}.cfg_kind={self.cfg_kind!r} is not known", hint=", ".join(CFG_KINDS))
        if self.apg_norm_threshold < 0:
            raise RequestError(
                f"{name}.apg_norm_threshold={self.apg_norm_threshold} is negative", hint="0 for no cap"
            )

"""The nano family: a tiny trained LTX-2, the world of its clips, and checks of what a clip shows."""

from diffsynth.nano.bundle import EXAMPLE, NAME, NanoFiles, files, models, settings

__all__ = ["EXAMPLE", "NAME", "NanoFiles", "files", "models", "settings"]

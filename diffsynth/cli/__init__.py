"""The ``diffsynth`` command: a thin face over the pipeline.

torch is imported only when a command needs it.
"""

from diffsynth.cli.app import main

__all__ = ["main"]

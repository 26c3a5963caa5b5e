"""``diffsynth inspect``: what a file holds."""

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import typer

from diffsynth.errors import CheckpointError

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm"})

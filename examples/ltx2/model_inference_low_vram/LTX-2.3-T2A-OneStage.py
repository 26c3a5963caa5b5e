"""LTX-2.3-T2A-OneStage.py on a card of 8 GB, with 24 GB of host memory."""

from low_vram import run

run(__file__, vram_limit="8gb", host_limit=24)

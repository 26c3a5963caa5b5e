"""LTX-2 and LTX-2.3 audio-video generation on machines far smaller than the model."""

__version__ = "0.1.0"

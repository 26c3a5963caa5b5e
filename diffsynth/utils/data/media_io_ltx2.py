"""The path from which public scripts import; the code is :mod:`diffsynth.utils.media_io_ltx2`."""

from diffsynth.utils.media_io_ltx2 import read_audio, read_video, write_video_audio_ltx2

__all__ = ["read_audio", "read_video", "write_video_audio_ltx2"]

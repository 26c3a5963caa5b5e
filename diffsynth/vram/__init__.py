"""The memory manager: storage formats, blocks, sources, streaming and the plan that governs them.

It knows torch and :mod:`diffsynth.device`; which weights a model has, and what they are called, is data to
it.
"""

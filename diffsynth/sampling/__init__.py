"""Schedules, guidance, noise and samplers: pure functions on tensors."""

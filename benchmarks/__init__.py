"""Measurements: each prints a table and writes JSON with the machine in words; nothing here is asserted."""

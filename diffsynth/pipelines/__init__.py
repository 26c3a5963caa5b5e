"""Pipelines: units that run one after another over one typed state."""

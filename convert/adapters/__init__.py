"""Adapters of other libraries in and out, and memories inside ordinary models."""

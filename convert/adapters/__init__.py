"""Adapters of other libraries beside an anchor, as a memory bank."""

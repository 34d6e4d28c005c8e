"""Anchors in both directions, by tables of names."""

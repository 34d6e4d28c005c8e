"""Anchors and banks in fewer bits."""

"""Retrieval-augmented generation to compare with: an index, the document found, its cost."""

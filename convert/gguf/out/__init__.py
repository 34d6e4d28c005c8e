"""Anchors, and adapters of llama.cpp's kind, as GGUF files."""

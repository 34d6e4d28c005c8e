"""llama.cpp's files: their header, names, settings and vocabulary."""

"""A whole model: found, loaded, its banks, the memory fetched for a text."""

"""Documents become tokens, windows, and the sequences that are trained on."""

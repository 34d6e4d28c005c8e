"""Several arms and seeds of one recipe, compared: ``python -m train study``."""

"""Several arms and seeds of one recipe, compared: ``mlx_hmem.train study``."""

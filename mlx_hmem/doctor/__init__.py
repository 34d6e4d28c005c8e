"""Whether all is well on this machine: ``mlx_hmem.doctor``, checks and figures on one page."""

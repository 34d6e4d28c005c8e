"""``mlx_hmem.bank``: looking into memory banks, and who may fetch what, and making one
model of parts of others (docs/bank_tools.md).

Nothing here changes a model in place, but for ``block`` and ``unblock``, which replace one small
file.
"""

"""Which positions of a training sequence are padding."""

from typing import Any


def counted(tokens: Any, eot: int) -> Any:
    """Which targets of the sequences ``tokens`` (n, time + 1) count in the loss, (n, time): all but
    padding, an EOT that follows an EOT. Of NumPy's or MLX's arrays, whichever it is given."""
    return (tokens[:, :-1] != eot) | (tokens[:, 1:] != eot)

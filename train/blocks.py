"""AdamW for blocks, *lazy*: a block that no sequence of the batch chose keeps its weights, its
moments do not decay, and its bias correction counts its own steps.

Where every block is touched in every step this equals dense AdamW.
"""

import mlx.core as mx


def adamw(
    blocks: list[mx.array],
    gradient: mx.array,
    rate: mx.array,
    betas: tuple[float, float],
    weight_decay: float,
) -> list[mx.array]:
    """One AdamW step on stacked blocks, each with a step count of its own.

    Args:
        blocks: weights, first and second moments (n, ...), and steps (n,) so far.
        gradient: as the weights.
    """
    weights, first, second, steps = blocks
    steps = steps + 1
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * mx.square(gradient)
    counts = steps.astype(mx.float32).reshape(-1, *[1] * (weights.ndim - 1))
    first_hat = first / (1 - betas[0] ** counts)
    second_hat = second / (1 - betas[1] ** counts)
    weights = weights * (1 - rate * weight_decay) - rate * first_hat / (mx.sqrt(second_hat) + 1e-8)
    return [weights, first, second, steps]

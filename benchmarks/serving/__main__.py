"""What the server costs: ``python -m benchmarks.serving PART [--json]``.

``clients``: many clients, each with another route, at once against one by one, and the first token
of one beside all others. ``beside``: mlx-lm's server with the anchor alone, and ours with it and
with memories, on a random anchor of the demo's size or a given one, all clients at once.
``again``: the first token of a long prompt that was read before, on such an anchor that takes it.
``soak``: resident memory and open files at the end of a long time, against after a tenth of it.
"""

from benchmarks.common.show import benchmark
from benchmarks.serving import load, soak

if __name__ == "__main__":
    benchmark(
        __doc__,
        {
            "clients": load.measure,
            "beside": load.measure_beside,
            "again": load.measure_again,
            "soak": soak.measure,
        },
    )

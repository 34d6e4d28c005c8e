"""How many bytes a lazily loaded bank downloads, by the size of its shards.

Counts, nothing is written or fetched. The bank is the paper's for OpenLM-160M in bfloat16. Texts
are leaf clusters drawn at random: from the whole tree, which is the worst case, or from one cluster
of level 1 or of level 2, as the texts of one topic are.
"""

import numpy as np

from benchmarks.common.models import paper_config
from benchmarks.common.show import Result
from mlx_hmem.bank.format import GENERIC, PAGE, Level, num_blocks, stored_levels
from mlx_hmem.bank.writer import shard_cuts

SIZES_MIB = (8, 32, 64, 128, 256, 512, 1024, 4096)
REPEATS = 100


def measure() -> Result:
    """Megabytes downloaded for 1 text, for 10 and 100 from the whole tree, for 100 of one topic."""
    return {"shard size": {f"{mib} MiB": downloads(mib) for mib in SIZES_MIB}}


def downloads(mib: int) -> dict[str, int]:
    config = paper_config("openlm-160m")
    levels = {n: Level.layout(config, n, "bfloat16", None) for n in stored_levels(config)}
    cuts = {n: shard_cuts(levels[n], num_blocks(config, n), mib << 20) for n in levels}
    rng, leaves = np.random.default_rng(0), config.num_clusters[-1]

    def downloaded(count: int, low: int, high: int) -> int:
        total = 0
        for _ in range(REPEATS):
            texts = rng.integers(low, high, count)
            for n in levels.keys() - {GENERIC}:
                starts = [cut.first_cluster for cut in cuts[n]]
                clusters = texts // (leaves // config.num_clusters[n - 1])
                for shard in np.unique(np.searchsorted(starts, clusters, side="right") - 1):
                    total += PAGE + cuts[n][shard].num_clusters * levels[n].block_stride
        return round(total / REPEATS / 1e6)

    first, second = leaves // 16, leaves // 256
    return {
        "files": sum(len(c) for c in cuts.values()),
        "1_text_mb": downloaded(1, 0, leaves),
        "10_texts_mb": downloaded(10, 0, leaves),
        "100_texts_mb": downloaded(100, 0, leaves),
        "100_of_a_level_1_cluster": downloaded(100, 5 * first, 6 * first),
        "100_of_a_level_2_cluster": downloaded(100, 77 * second, 78 * second),
    }

"""How many bytes a lazily loaded bank downloads, by the size of its shards.

``python -m benchmarks.shard_size [--json]``: counts, nothing is written or fetched. The bank is the
paper's for OpenLM-160M, r = (256, 64, 16, 0), bfloat16. Texts are leaf clusters drawn at random:
from the whole tree, which is the worst case, or from one cluster of level 1 or of level 2, as the
texts of one topic are.
"""

import argparse
import json
from typing import Any

import numpy as np

from mlx_hmem.bank.format import GENERIC, PAGE, Level, num_blocks, stored_levels
from mlx_hmem.bank.writer import shard_cuts
from mlx_hmem.config import MemoryConfig

PAPER = MemoryConfig(
    hidden_size=512, num_hidden_layers=35, r=(256, 64, 16, 0), branching=(16, 16, 16, 16)
)
SIZES_MIB = (8, 32, 64, 128, 256, 512, 1024, 4096)
REPEATS = 100


def measure(mib: int) -> dict[str, Any]:
    """Megabytes downloaded for 1 text, for 10 and 100 from the whole tree, for 100 of one topic."""
    levels = {n: Level.layout(PAPER, n, "bfloat16", None) for n in stored_levels(PAPER)}
    cuts = {n: shard_cuts(levels[n], num_blocks(PAPER, n), mib << 20) for n in levels}
    rng, leaves = np.random.default_rng(0), PAPER.num_clusters[-1]

    def downloaded(count: int, low: int, high: int) -> float:
        total = 0
        for _ in range(REPEATS):
            texts = rng.integers(low, high, count)
            for n in levels.keys() - {GENERIC}:
                starts = [cut.first_cluster for cut in cuts[n]]
                clusters = texts // (leaves // PAPER.num_clusters[n - 1])
                for shard in np.unique(np.searchsorted(starts, clusters, side="right") - 1):
                    total += PAGE + cuts[n][shard].num_clusters * levels[n].block_stride
        return round(total / REPEATS / 1e6)

    first, second = leaves // 16, leaves // 256
    return {
        "shard_mib": mib,
        "files": sum(len(c) for c in cuts.values()),
        "1_text_mb": downloaded(1, 0, leaves),
        "10_texts_mb": downloaded(10, 0, leaves),
        "100_texts_mb": downloaded(100, 0, leaves),
        "100_texts_of_a_level_1_cluster_mb": downloaded(100, 5 * first, 6 * first),
        "100_texts_of_a_level_2_cluster_mb": downloaded(100, 77 * second, 78 * second),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    results = [measure(mib) for mib in SIZES_MIB]
    if args.json:
        print(json.dumps(results))
        return
    print("| " + " | ".join(results[0]) + " |\n|" + "---|" * len(results[0]))
    for result in results:
        print("| " + " | ".join(f"{value:,}" for value in result.values()) + " |")


if __name__ == "__main__":
    main()

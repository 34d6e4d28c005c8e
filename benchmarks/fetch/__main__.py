"""What fetching memory costs: ``python -m benchmarks.fetch PART [--json]``.

``path``: one fetch against the fastest raw read of the same bytes and a copy in memory. ``topics``:
a change of topic, in a flat bank and in a hierarchical one; routing; a thousand topics in a row.
``first-token``: the time to the first token with a memory, against the anchor alone.
``downloads``: how much of a lazily loaded bank is downloaded, by the size of its shards.

Banks have the paper's shapes (4.6 to 21.1 billion parameters) and are sparse files with real values
in the blocks that are read. They lie in the temporary folder (set TMPDIR to measure another disk).
"""

from benchmarks.common.show import benchmark
from benchmarks.fetch import downloads, first_token, path, topics

if __name__ == "__main__":
    benchmark(
        __doc__,
        {
            "path": path.measure,
            "topics": topics.measure,
            "first-token": first_token.measure,
            "downloads": downloads.measure,
        },
        bars=("ms", "of_raw", "of_copy", "of_alone", "paper_ms"),
    )

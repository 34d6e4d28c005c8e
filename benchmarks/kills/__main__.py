"""SIGKILL at random moments: ``python -m benchmarks.kills PART [--kills N] [--json]``.

``training``: ``mlx_hmem.train`` co-trains a tiny anchor and its memories (or trains memories on the
frozen one, in every second run), is killed, and started again with the same command until it ends.
Losses, the anchor and every block must then be, byte for byte, those of a run that nobody
disturbed.

``conversions`` of a 32 MB anchor in 64 shards (OpenLM's pickle, sharded safetensors, GGUF, the ways
to GGUF and back to PyTorch, and one over an older model), of adapters beside it (in, fused into it,
out as a GGUF) and of the whole demo model with its memory (from PyTorch's layout, back to it, and
quantised over an older model) are killed N times each and started again with the same command.
After each kill the destination must be absent, what it was before, or, byte for byte, what a
conversion makes that nobody disturbed; and what lies beside it must not load unless it is all
there. Half of the moments are drawn from the whole time of a run, half from the time in which it
writes.

``remembering`` twelve documents on the demo's anchor, and following their folder when two are
edited, one is deleted, one renamed and two come, are killed N times each and started again. After
each kill the model is absent, the old one or the new one, byte for byte; in the end model and run
are those that nobody disturbed.
"""

from benchmarks.common.show import benchmark

from .conversions import conversions
from .remembering import remembering
from .training import training

if __name__ == "__main__":
    parts = {"training": training, "conversions": conversions, "remembering": remembering}
    benchmark(__doc__, parts)

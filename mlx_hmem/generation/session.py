"""What a conversation has cost so far: where each level came from, bytes, times, memory."""

from collections import Counter
from dataclasses import dataclass, field

from mlx_lm.generate import GenerationResponse

from mlx_hmem.budget.resident import peak_resident_bytes
from mlx_hmem.model.fetch import Fetch

SOURCES = ("attached", "resident", "cache", "disk")  # from the nearest to the farthest


@dataclass
class SessionStats:
    """Sums over all answers, and the times of the latest.

    ``sources`` counts blocks by (level, source): "attached" is one that the answer before used too,
    "resident" and "cache" are kept in memory, "disk" was read for this answer; level 0 is the
    generic memory. ``damaged`` counts blocks that an answer went on without.
    """

    num_answers: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    ttft_ms: float = 0.0
    tokens_per_s: float = 0.0
    route_ms: float = 0.0
    fetch_ms: float = 0.0
    bytes_read: int = 0
    damaged: int = 0
    sources: Counter[tuple[int, str]] = field(default_factory=Counter)
    bytes_by_level: Counter[int] = field(default_factory=Counter)

    def add(self, fetch: Fetch, ttft_ms: float, last: GenerationResponse) -> None:
        """Counts an answer that ended with the piece ``last``."""
        self.num_answers += 1
        self.num_tokens += last.generation_tokens
        self.seconds += last.generation_tokens / last.generation_tps
        self.ttft_ms, self.tokens_per_s = ttft_ms, last.generation_tps
        self.route_ms, self.fetch_ms = fetch.route_ms, fetch.arrived_ms
        self.bytes_read += fetch.bytes_read
        self.damaged += len(fetch.damage)
        for block in fetch.blocks:
            self.sources[block["level"], block["source"]] += 1
            if block["source"] == "disk":
                self.bytes_by_level[block["level"]] += block["bytes"]

    def lines(self) -> list[str]:
        """The figures for a reader."""
        if not self.num_answers:
            return ["no answer yet"]
        mean = self.num_tokens / self.seconds
        lines = [
            f"latest answer: route {self.route_ms:.1f} ms, fetch {self.fetch_ms:.1f} ms, first "
            f"token {self.ttft_ms:.0f} ms, {self.tokens_per_s:.0f} tokens/s",
            f"session: {self.num_answers} answers, {self.num_tokens} tokens, {mean:.0f} tokens/s, "
            f"{self.bytes_read:,} bytes read",
        ]
        for level in sorted({level for level, _ in self.sources}):
            counts = [(s, self.sources[level, s]) for s in SOURCES if self.sources[level, s]]
            name = f"level {level}" if level else "generic memory"
            where = ", ".join(f"{count} {source}" for source, count in counts)
            lines.append(f"{name}: {where}; {self.bytes_by_level[level]:,} bytes from disk")
        if self.damaged:
            lines.append(f"{self.damaged} blocks left out, unreadable")
        return [*lines, f"resident memory: {peak_resident_bytes() / 1e6:.0f} MB at most"]

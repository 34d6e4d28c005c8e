"""What ``/metrics`` says, as Prometheus reads it."""

from collections.abc import Mapping, Sequence

from mlx_hmem.budget.resident import resident_bytes
from mlx_hmem.server.engine import Engine

REQUESTS = ("answered", "failed", "gone")  # how they end


def metrics(engine: Engine, requests: Mapping[tuple[str, int], int], first: Sequence[float]) -> str:
    """``requests``: how many there were, by path and status; ``first``: how many streams have had
    their first token, and the seconds that they waited for it together."""
    lines = ["# TYPE hmem_http_requests_total counter"]
    for (path, status), count in sorted(requests.items()):
        lines.append(f'hmem_http_requests_total{{path="{path}",status="{status}"}} {count}')
    for name in (*REQUESTS, "reloads", "tokens", "prompt_cache_hits", "prompt_cache_tokens"):
        full = f"hmem_{'requests_' if name in REQUESTS else ''}{name}_total"
        lines += [f"# TYPE {full} counter", f"{full} {engine.counts[name]}"]
    gauges = {
        "rows": engine.num_rows,
        "rows_most": engine.rows,
        "rows_inside": engine.num_inside,
        "resident_bytes": resident_bytes(),
        "prompt_cache_bytes": engine.prompt_cache_bytes,
    }
    for name, value in gauges.items():
        lines += [f"# TYPE hmem_{name} gauge", f"hmem_{name} {value}"]
    lines += ["# TYPE hmem_first_token_seconds summary"]
    lines += [f"hmem_first_token_seconds_count {first[0]:.0f}"]
    lines += [f"hmem_first_token_seconds_sum {first[1]:.6f}"]
    return "\n".join(lines) + "\n"

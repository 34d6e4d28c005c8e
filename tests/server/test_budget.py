"""A server within a memory budget: what it chooses, what it lets go of, what it takes at most."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlx_hmem.budget import resident
from mlx_hmem.budget.plan import Serving
from mlx_hmem.model.load import load
from mlx_hmem.server import served as code
from mlx_hmem.server.command import main
from mlx_hmem.server.served import Served
from tests.helpers.programs import assert_refused, process, run
from tests.helpers.servers import Server
from tests.server.conftest import PROMPTS
from tests.server.test_answers import complete
from tests.server.test_prompts import LONG, PART, WHOLE, answers, begin

MB = 10**6


def test_over_the_budget_it_lets_go_of_prompts_and_blocks_then_fails_the_batch_and_goes_on(
    viewed, monkeypatch
):
    monkeypatch.setattr(code, "PREFILL_TOKENS", PART)
    model = load(viewed, memory_budget=10**9, serving=Serving(4, 8, PART))
    served = Served(model, None, model.plan.rows, model.plan.prompt_bytes)
    model.keep_to(model.plan, resident.resident_bytes(), served.let_go)
    wanted = answers(served, LONG)[0].text
    assert answers(served, LONG)[0].num_reused == WHOLE
    monkeypatch.setattr(model._watch, "budget", -(1 << 40))
    begin(served, LONG)
    ((_, refusal),) = served.next()
    assert (refusal.status, refusal.message) == (503, "the memory budget is used up")
    assert served.prompts.nbytes == 0
    assert not any(model.bank.keeps((1, cluster)) for cluster in range(3))
    monkeypatch.setattr(model._watch, "budget", 1 << 40)
    (found,) = answers(served, LONG)
    assert (found.text, found.num_reused) == (wanted, 0)


def test_the_least_budget_that_it_names_works_counted_from_outside_and_over_a_reload(server):
    """The demo model, in a process of its own."""
    refused = run(main, "--memory-budget", "10MB", "--port", "0")
    assert_refused(refused, "the memory budget is too small", "give at least")
    least = refused.err.split("give at least ")[1].split()[0]
    with Server("--memory-budget", least) as small:
        assert f"memory budget {least}" in small.lines[0]
        assert "answers 1 at once" in small.lines[0]
        assert small.metric("hmem_rows_most") == 1
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda text: complete(small, text, max_tokens=24), PROMPTS[:3]))
        assert small.ask("/v1/memory/reload", {}).status == 200
        again = [complete(small, text, max_tokens=24) for text in PROMPTS[:3]]
        if sys.platform == "linux":
            bare = process("-c", "import mlx.core; print(open('/proc/self/status').read())").out
            peak = peak_of(Path(f"/proc/{small.pid}/status").read_text()) - peak_of(bare)
            assert 80 * MB < peak <= resident.parse_bytes(least)
    for text, first, second in zip(PROMPTS[:3], found, again, strict=True):
        assert first["choices"] == second["choices"]
        assert first["choices"] == complete(server, text, max_tokens=24)["choices"]


def peak_of(status: str) -> int:
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

"""A model of the Hub whose blocks come when they are asked for, while others are answered."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_hmem.model.load import load
from tests.helpers.hub_models import BASE, REPO
from tests.helpers.hub_server import TOKEN
from tests.helpers.servers import Server, wait_until

PATH = "/v1/completions"


@pytest.fixture
def lazy(online, tmp_path):
    environment = {
        "HF_ENDPOINT": online.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
    }  # fmt: skip
    with Server("--model", REPO, "--lazy", **environment) as found:
        yield found


def test_blocks_come_when_they_are_asked_for_and_keep_nobody_else_waiting(
    lazy, online, directory, texts
):
    assert set(online.downloads()) == BASE
    local = load(directory)
    paths = {local.retriever.route(text)[0]: text[:40] for text in texts}
    first, second, *_ = paths.values()
    wanted = "".join(piece.text for piece in local.stream(first, max_tokens=8))
    go, shards = threading.Event(), local.bank.manifest.levels[0].shards
    for shard in shards:
        online.hold[f"bank/{shard.file}"] = go
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(lazy.ask, PATH, {"prompt": first, "max_tokens": 8})
        wait_until(lambda: lazy.metric("hmem_rows_inside") == 1 and online.requests)
        beside = lazy.ask(PATH, {"prompt": second, "max_tokens": 8, "memory": "none"})
        assert (beside.status, asked.done()) == (200, False)
        go.set()
        assert asked.result().body["choices"][0]["text"] == wanted
    fetched = online.downloads()
    assert 0 < len(fetched) == len(set(fetched)) <= 2  # a shard of each level
    assert lazy.ask(PATH, {"prompt": first, "max_tokens": 8}).body["memory"]["bytes_read"] == 0
    assert online.downloads() == []
    del online.repos[REPO]
    got = lazy.ask(PATH, {"prompt": second, "max_tokens": 2})
    assert (got.status, got.error["message"]) == (500, "a block of the memory cannot be read")
    assert lazy.ask(PATH, {"prompt": first, "max_tokens": 2}).status == 200

"""Models on the Hub: only what is needed comes down, of one revision; nothing broken goes up.

The Hub is a server on this computer (hub_server.py); huggingface_hub itself is the real one.
"""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub.constants as hub_constants
import numpy as np
import pytest
from huggingface_hub import snapshot_download

from mlx_hmem.bank import Bank
from mlx_hmem.bank.format import PAGE
from mlx_hmem.evaluate.command import main as evaluate
from mlx_hmem.generation.command import main as generate
from mlx_hmem.model.find import find_model
from mlx_hmem.model.load import load
from tests.helpers.faults import in_threads
from tests.helpers.hub_models import BASE, FIRST, LAST, REPO, SHARDS, blocks, other_model, same
from tests.helpers.programs import assert_refused, process, refused, refusing, run


def test_lazy_load_brings_what_routing_needs_then_only_the_shards_of_a_path(online, directory):
    model, local = load(REPO, lazy=True), load(directory)
    sizes = {p.relative_to(directory).as_posix(): p.stat().st_size for p in directory.rglob("*")}
    assert online.bytes_sent() == sum(sizes[name] for name in BASE)
    assert set(online.downloads()) == BASE

    assert same(blocks(model, FIRST), blocks(local, FIRST))
    assert online.bytes_sent() == sum(sizes[name] for name in SHARDS[FIRST])
    assert sorted(online.downloads()) == sorted(SHARDS[FIRST])

    assert same(blocks(model, (0, 0, 1)), blocks(local, (0, 0, 1)))  # in the same two shards
    assert online.requests == []
    blocks(model, (0, 1, 2))  # level 1 is here
    assert online.downloads() == ["bank/level-3.00001.safetensors"]

    assert model.bank.generic().rows is not None
    assert online.downloads() == ["bank/generic.safetensors"]


def test_a_prompt_is_answered_as_by_the_model_on_disk(online, directory, texts):
    model, local = load(REPO, lazy=True), load(directory)
    online.downloads()
    for prompt in (texts[0][:30], texts[-1][:30]):
        path = local.retriever.route(prompt)
        wanted = [p.text for p in local.stream(prompt, max_tokens=8)]
        assert [p.text for p in model.stream(prompt, max_tokens=8)] == wanted
        shards = {f"bank/level-{n}.{path[n - 1] // 2:05d}.safetensors" for n in (1, 3)}
        assert set(online.downloads()) <= shards
    fetch = model.fetch(texts[0], blocked=[model.retriever.route(texts[0])[:1]])
    assert (fetch.blocks, online.requests) == ([], [])


def test_without_lazy_the_whole_model_comes_and_an_anchor_alone_is_loaded_lazily(online, directory):
    model = load(REPO)
    bank = {f"bank/{path.name}" for path in (directory / "bank").iterdir()}
    assert len(bank) == 10
    assert set(online.downloads()) == BASE | bank
    blocks(model, LAST)
    assert online.requests == []
    (directory / "hmem.json").unlink()
    shutil.rmtree(directory / "bank")
    shutil.rmtree(directory / "retriever")
    online.add("user/anchor", directory)
    assert load("user/anchor", lazy=True).bank is None


def test_lazy_changes_nothing_for_a_folder(directory):
    assert same(blocks(load(directory, lazy=True), LAST), blocks(load(directory), LAST))
    (directory / "bank" / "level-3.00005.safetensors").unlink()
    refused("lacks a file of level 3", load, directory, lazy=True)


def test_a_repository_that_changes_meanwhile_does_not_mix(online, directory):
    model = load(REPO, lazy=True)
    old = blocks(load(directory), LAST)
    blocks(model, FIRST)
    other_model(directory)
    online.add(REPO, directory)
    assert same(blocks(model, LAST), old)
    new = load(REPO, lazy=True)
    assert same(blocks(new, LAST), blocks(load(directory), LAST))
    assert not np.array_equal(blocks(new, LAST)[0], old[0])
    assert same(blocks(model, (2, 5, 10)), blocks(model, (2, 5, 10)))


@pytest.mark.parametrize("how", ["offline", "no server"])
def test_without_a_connection_what_is_here_works_and_what_is_not_is_named(
    online, directory, monkeypatch, how
):
    blocks(load(REPO, lazy=True), FIRST)
    if how == "offline":
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr("time.sleep", lambda _: None)  # the library waits before it asks again
        online.stop()
    model, local = load(REPO, lazy=True), load(directory)
    assert same(blocks(model, FIRST), blocks(local, FIRST))
    with refusing("bank/level-1.00001.safetensors of user/tiny is not on this computer.*connect"):
        blocks(model, LAST)
    assert same(blocks(model, FIRST), blocks(local, FIRST))
    line = "the Hub does not give it: it is not in the Hub's cache"
    refused(line, load, "user/other", lazy=True)
    if how == "offline":
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        assert same(blocks(model, LAST), blocks(local, LAST))


def test_a_cache_that_another_program_filled_is_enough_without_a_connection(
    online, directory, monkeypatch
):
    """mlx-lm fetches no ``original/tokenizer.model``; the library then calls the folder
    incomplete."""
    files = online.repos[REPO].commits[-1][1]
    online.repos[REPO].commit({**files, "original/tokenizer.model": b"for another program"})
    snapshot_download(
        REPO, allow_patterns=["*.json", "model*.safetensors", "retriever/*", "bank/*"]
    )
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    model, local = load(REPO), load(directory)
    assert same(blocks(model, FIRST), blocks(local, FIRST))
    (model_folder,) = Path(hub_constants.HF_HUB_CACHE).glob("*/snapshots/*")
    (model_folder / "model.safetensors").unlink()
    refused("no anchor weights", load, REPO)


def test_a_revision_is_named_behind_the_repository(online, directory, monkeypatch):
    old, first = blocks(load(directory), LAST), online.repos[REPO].commits[-1][0]
    other_model(directory)
    online.add(REPO, directory)
    new = blocks(load(directory), LAST)
    assert same(blocks(load(f"{REPO}@{first}", lazy=True), LAST), old)
    assert same(blocks(load(f"{REPO}@main", lazy=True), LAST), new)
    line = run(generate, "--model", f"{REPO}@no", "--prompt", "a")
    assert_refused(line, f"error: no model directory {REPO}@no, and the Hub does not give it")
    assert "no such revision; give a branch, a tag or a commit" in line.err
    refused("no such model directory: user/tiny@; give a folder, user/name,", load, f"{REPO}@")
    line = run(generate, "--model", REPO, "--prompt", "a", "--revision", first)
    assert_refused(line, "error: wrong command line: unrecognized arguments: --revision")
    assert "write it behind the Hub id: user/name@REVISION" in line.err
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert same(blocks(load(f"{REPO}@{first}", lazy=True), LAST), old)
    refused("not in the Hub's cache, and there is no connection", load, f"{REPO}@{'1' * 40}")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("GatedRepo", "it is gated: .*; open https://huggingface.co/user/tiny, agree, and log in"),
        ("RepoNotFound", "no such repository, or it is private; check the name; for a private one"),
    ],
)
def test_a_repository_that_is_not_given_says_what_to_do(online, code, words):
    online.closed[REPO] = code
    refused(f"no model directory user/tiny, and the Hub does not give it: .*{words}", load, REPO)
    refused("no such repository", load, "user/none")


def test_no_code_and_nothing_for_other_programs_comes_along(online, directory):
    files = online.repos[REPO].commits[-1][1]
    strange = ("modeling_tiny.py", "tokenizer_tiny.py", "retriever/run.py", "chat_template.py",
               "original/params.json", "original/tokenizer.model", "onnx/config.json",
               "onnx/tokenizer.json", "consolidated.safetensors", "train_args.json")  # fmt: skip
    online.repos[REPO].commit({**files, **dict.fromkeys(strange, b"x")})
    load(REPO, lazy=True)
    assert set(online.downloads()) == BASE
    find_model(REPO)  # all of it, but never code
    assert not [name for name in online.downloads() if name.endswith(".py")]


def test_many_threads_fetch_a_shard_once(online, directory):
    model, local = load(REPO, lazy=True), load(directory)
    wanted = {leaf: blocks(local, (leaf // 4, leaf // 2, leaf)) for leaf in range(12)}
    online.downloads()
    wrong: list[int] = []
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        start.wait()
        for leaf in np.random.default_rng(seed).permutation(12).tolist():
            if not same(blocks(model, (leaf // 4, leaf // 2, leaf)), wanted[leaf]):
                wrong.append(leaf)

    in_threads(work, 8)
    assert wrong == []
    downloads = online.downloads()
    assert len(downloads) == len(set(downloads)) == 2 + 6


def test_a_bank_asks_once_for_a_shard_whoever_obtains_it(directory, tmp_path):
    there, here = directory / "bank", tmp_path / "here"
    here.mkdir()
    shutil.copy(there / "bank.json", here)
    asked: list[str] = []
    start = threading.Barrier(8)

    def obtain(names: Sequence[str]) -> None:
        asked.extend(names)
        time.sleep(0.02)  # the others ask meanwhile
        for name in names:
            shutil.copy(there / name, here)

    with Bank.open(here, obtain=obtain, cache_bytes=0) as bank:
        assert asked == []

        def work(_: int) -> None:
            start.wait()
            for path in (FIRST, LAST):
                bank.fetch(path)

        in_threads(work, 8)
    assert sorted(f"bank/{name}" for name in asked) == sorted(SHARDS[FIRST] | SHARDS[LAST])
    refused("the bank is closed", bank.fetch, (1, 2, 4))
    assert len(asked) == 4


def test_who_needs_no_new_shard_does_not_wait_for_a_download(online):
    model = load(REPO, lazy=True)
    blocks(model, FIRST)
    online.hold["bank/level-3.00005.safetensors"] = threading.Event()
    thread = threading.Thread(target=blocks, args=(model, LAST))
    thread.start()
    while not any(r.method == "GET" and "level-3.00005" in r.path for r in online.requests):
        time.sleep(0.001)
    try:
        for _ in range(3):
            blocks(model, FIRST)
            assert thread.is_alive()
    finally:
        online.hold["bank/level-3.00005.safetensors"].set()
        thread.join()
    assert model.bank.fetch(LAST).blocks[0] is not None


def test_a_download_that_breaks_off_goes_on_where_it_was(online, directory, monkeypatch):
    model, name = load(REPO, lazy=True), "bank/level-3.00005.safetensors"
    monkeypatch.setattr(hub_constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("time.sleep", lambda _: None)  # the library waits before it goes on
    online.cut_once.add(name)
    online.requests.clear()
    assert same(blocks(model, LAST), blocks(load(directory), LAST))
    asked = [r for r in online.requests if r.method == "GET" and r.path.endswith(name)]
    assert [r.range is None for r in asked] == [True, False]
    size = (directory / name).stat().st_size
    assert size <= sum(r.sent for r in asked) < size + 2000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[: PAGE + 5] + bytes([data[PAGE + 5] ^ 1]) + data[PAGE + 6 :],
         "level 3, cluster 10 of the bank is damaged"),
        (lambda data: data[:-1], "bytes instead of"),
        (lambda data: b"\xff" * 8 + data[8:], "is not a whole safetensors file"),
        (lambda _: None, "bank/level-3.00005.safetensors"),
    ],
)  # fmt: skip
def test_a_shard_that_comes_wrong_is_refused(hub, directory, change, words):
    name = "bank/level-3.00005.safetensors"
    data = change((directory / name).read_bytes())
    (directory / name).unlink()
    if data is not None:
        (directory / name).write_bytes(data)
    hub.add(REPO, directory)
    model = load(REPO, lazy=True)
    for _ in range(2):
        refused(re.escape(words), blocks, model, (2, 5, 10))
    assert len(blocks(model, FIRST)) == 2


def test_more_shards_than_may_be_open_are_opened_in_turn(directory, monkeypatch):
    whole = load(directory)
    monkeypatch.setattr("mlx_hmem.bank.read.shards.MOST_OPEN", 2)
    folder = Path("/proc/self/fd")
    with Bank.open(directory / "bank", cache_bytes=0) as bank:
        open_files = len(list(folder.iterdir())) if folder.exists() else 0
        for leaf in [*range(12), *range(12)]:
            path = (leaf // 4, leaf // 2, leaf)
            found = [np.array(b) for b in bank.fetch(path).blocks if b is not None]
            assert same(found, blocks(whole, path))
        if folder.exists():
            assert len(list(folder.iterdir())) <= open_files
        # One that was replaced while it was closed is checked as if it were new.
        shard = directory / "bank" / "level-3.00000.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        refused("bytes instead of", bank.fetch, FIRST)


def test_generate_fetches_lazily_and_then_needs_no_connection(online, tmp_path, monkeypatch):
    words = ["--model", REPO, "--lazy", "--json", "--max-tokens", 4, "--prompt", "The lighthouse"]
    env = {"HF_ENDPOINT": online.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    said = process("generate.py", *words, env=os.environ | env)
    found = json.loads(said.out)
    path = found["memory"]["path"]
    shards = {f"bank/level-{n}.{path[n - 1] // 2:05d}.safetensors" for n in (1, 3)}
    assert set(online.downloads()) == BASE | shards
    assert "%" in said.err  # the library's bar
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert json.loads(run(generate, *words).out)["text"] == found["text"]
    line = "error: bank/generic.safetensors of user/tiny is not on this"
    assert_refused(run(generate, *words, "--memory", "generic"), line)


def test_a_score_without_memory_needs_nothing_of_the_bank(online, tmp_path, texts, capsys):
    held_out = tmp_path / "texts.jsonl"
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:3]))
    evaluate([REPO, "--lazy", "--memory", "none", "--text", str(held_out), "--json"])
    assert json.loads(capsys.readouterr().out)["perplexity"][0]["documents"] == 3
    assert set(online.downloads()) == BASE

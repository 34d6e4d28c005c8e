"""generate.py: text on standard output, all else on standard error; a wrong input is one line."""

import importlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_hmem.generation.command import main
from tests.conftest import edit_json, save_anchor
from tests.generation.conftest import PROMPT
from tests.helpers.faults import flip_blocks
from tests.helpers.places import ROOT
from tests.helpers.programs import assert_refused as refused
from tests.helpers.programs import run

PROGRAM = ROOT / "generate.py"


class Interrupt(io.BytesIO):
    """Standard input at which the person presses Ctrl-C."""

    def read(self, size: int | None = -1) -> bytes:
        signal.raise_signal(signal.SIGINT)
        return b""


def answer(result) -> dict:
    status, out, err = result
    assert (status, err) == (0, "")
    return json.loads(out)


def test_json_has_the_promised_keys_and_true_values(ask, model):
    found = answer(ask("--json"))
    assert list(found) == [
        "text", "num_tokens", "memory", "ttft_ms", "tokens_per_s", "peak_memory_bytes",
        "finish_reason",
    ]  # fmt: skip
    memory = found["memory"]
    assert list(memory) == ["mode", "path", "blocks", "bytes_read", "route_ms", "fetch_ms"]
    path = model.retriever.route(PROMPT)
    assert (memory["mode"], memory["path"], memory["bytes_read"]) == ("fetched", list(path), 2304)
    assert memory["blocks"] == [
        {"level": 1, "cluster": path[0], "bytes": 1536, "source": "disk"},
        {"level": 3, "cluster": path[2], "bytes": 768, "source": "disk"},
    ]
    pieces = list(model.stream(PROMPT, max_tokens=8))
    assert found["text"] == "".join(piece.text for piece in pieces)
    assert found["num_tokens"] == pieces[-1].generation_tokens
    times = [memory["route_ms"], memory["fetch_ms"], found["ttft_ms"], found["tokens_per_s"]]
    assert all(type(value) is float and value > 0 for value in times)
    assert type(found["peak_memory_bytes"]) is int
    assert found["peak_memory_bytes"] > 0


def test_other_memories_and_their_json(ask, model):
    none, generic = answer(ask("--json", "--memory", "none")), answer(
        ask("--json", "--memory", "generic")
    )  # fmt: skip
    assert none["memory"] == {
        "mode": "none", "path": None, "blocks": [], "bytes_read": 0, "route_ms": 0.0,
        "fetch_ms": 0.0,
    }  # fmt: skip
    assert generic["memory"]["path"] is None
    assert generic["memory"]["blocks"] == [
        {"level": 0, "cluster": 0, "bytes": 2304, "source": "disk"}
    ]
    assert len({none["text"], generic["text"], answer(ask("--json"))["text"]}) == 3
    path = model.retriever.route(PROMPT)
    barred = answer(ask("--json", "--block", path[0], (path[0] + 1) % 3))
    assert (barred["text"], barred["memory"]["blocks"]) == (none["text"], [])
    leaf = answer(ask("--json", "--block", ",".join(map(str, path))))
    assert [block["level"] for block in leaf["memory"]["blocks"]] == [1]


def test_the_route_text_chooses_the_memory(ask, model, texts):
    other = next(
        t for t in texts if model.retriever.route(t)[0] != model.retriever.route(PROMPT)[0]
    )
    found = answer(ask("--json", "--route-text", other))
    assert found["memory"]["path"] == list(model.retriever.route(other))


def test_plain_text_is_the_text_alone_and_one_line_of_figures(ask):
    text = answer(ask("--json"))["text"]
    status, out, err = ask()
    assert (status, out) == (0, text + "\n")
    assert re.fullmatch(
        r"memory: fetched \(\d, \d, \d+\) \(level 1 disk, level 3 disk\), 2,304 bytes read; "
        r"route [\d.]+ ms, fetch [\d.]+ ms, first token \d+ ms, \d+ tokens/s, peak \d+ MB\n",
        err,
    )
    assert ask("--memory", "none")[2].startswith("memory: none, 0 bytes read; ")


def test_a_prompt_from_standard_input(ask):
    text = answer(ask("--json"))["text"]
    found = answer(ask("--json", "--prompt", "-", stdin=PROMPT.encode() + b"\n"))
    assert found["text"] == text
    sentence = "Ünï, 日本 and 🦊"
    by_option = answer(ask("--json", "--prompt", sentence))["text"]
    assert answer(ask("--json", "--prompt", "-", stdin=sentence.encode()))["text"] == by_option


def test_the_same_seed_gives_the_same_text_of_one_token_the_likeliest(ask):
    def draw(seed):
        return answer(ask("--json", "--temp", 1, "--top-p", 0.9, "--seed", seed))["text"]

    first, again, other = draw(3), draw(3), draw(4)
    assert first == again != other

    def draw(*args):
        return answer(ask("--json", "--temp", 1, "--seed", 3, *args))["text"]

    greedy = answer(ask("--json"))["text"]
    assert draw("--top-k", 1) == draw("--min-p", 1) == greedy
    assert draw("--top-k", 10**6) == draw() != greedy


def test_short_names_of_options(ask, model_folder):
    text = answer(ask("--json"))["text"]
    args = ("--model", model_folder, "-p", PROMPT, "-m", 8, "--json")
    assert answer(run(main, *args))["text"] == text


WRONG_ARGUMENTS = {
    "an unknown option": (["--speed", "9"], "unrecognized arguments: --speed 9"),
    "an unknown memory": (["--memory", "all"], "'all'"),
    "a temperature below 0": (["--temp", "-1"], "temp is negative: -1.0"),
    "a temperature that is no number": (["--temp", "nan"], "temp"),
    "top-p above 1": (["--top-p", "2"], "top_p is out of range: 2.0"),
    "top-p of 0": (["--top-p", "0"], "top_p is out of range"),
    "top-k below 0": (["--top-k", "-1"], "top_k is negative: -1"),
    "top-k in parts": (["--top-k", "0.5"], "'0.5'"),
    "min-p above 1": (["--min-p", "1.5"], "min_p is out of range: 1.5"),
    "min-p that is no number": (["--min-p", "nan"], "min_p is out of range"),
    "no tokens": (["--max-tokens", "0"], "max_tokens is not positive: 0"),
    "tokens in words": (["--max-tokens", "many"], "'many'"),
    "a seed below 0": (["--seed", "-1"], "seed is out of range: -1"),
    "a seed too large": (["--seed", str(1 << 64)], "seed is out of range"),
    "a block in words": (["--block", "three"], "no such bank: three"),
    "a block that is no path": (["--block", "3;1"], "not a cluster path: '3;1'"),
    "a view that does not exist": (["--view", "guest"], "no such view: guest"),
    "half a block": (["--block", "1", "1,"], "'1,'"),
    "a block beyond": (["--block", "99"], "no such cluster on level 1: 99; use 0 to 2"),
    "a block below 0": (["--block", "-1"], "no such cluster on level 1: -1"),
    "a block under another": (["--block", "0,5"], "lies under cluster 2 of level 1"),
    "a block too deep": (["--block", "0,0,0,0"], "needs 1 to 3 levels"),
    "no budget": (["--memory-budget", "0"], "the memory budget is too small: 0 bytes"),
    "a budget below 0": (["--memory-budget", "-5"], "is not a size: '-5'"),
    "a budget in words": (["--memory-budget", "some"], "is not a size: 'some'"),
    "a context beyond the anchor's": (["--context", "97"], "no such context: 97 tokens"),
    "an empty prompt": (["--prompt", ""], "the prompt is empty"),
    "a prompt of spaces": (["--prompt", " \n\t"], "the prompt is empty"),
    "a prompt too long": (["--prompt", "word " * 200], "shorten it to less than 96 tokens"),
    "a prompt that is no text": (["--prompt", "a \udcff"], "the prompt is not UTF-8"),
    "a route text of spaces": (["--route-text", "  "], "empty text"),
    "an empty folder name": (["--model", ""], "not a model directory"),
    "no such folder": (["--model", "/no/such/folder"], "no such model directory: /no/such/folder"),
    "a file as a folder": (["--model", PROGRAM], "no such model directory"),
    "a folder of another kind": (["--model", PROGRAM.parent / "tests"], "not a model directory"),
}


@pytest.mark.parametrize(("arguments", "words"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_a_wrong_argument_is_one_line_and_status_2(ask, arguments, words):
    refused(ask(*arguments), words)


def test_no_prompt_at_all_is_one_line_that_says_so():
    refused(run(main), "--prompt", "see mlx_hmem.generate --help")


def test_standard_input_that_is_no_text_is_one_line(ask):
    refused(ask("--prompt", "-", stdin=b"caf\xe9"), "standard input is not UTF-8 text")
    refused(ask("--prompt", "-", stdin=b""), "the prompt is empty")


def test_the_least_memory_budget_it_names_works(ask):
    _, _, err = ask("--memory-budget", "1")
    least = re.search(r"give at least (\d+MB) for a context of 96 tokens\n", err)[1]
    before = mx.set_cache_limit(1 << 30)
    try:
        status, out, err = ask("--json", "--memory-budget", least)
        assert (status, json.loads(out)["memory"]["bytes_read"]) == (0, 2304)
        assert re.fullmatch(rf"memory budget {least}: [^\n]+\n", err)
    finally:
        mx.set_cache_limit(before)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: shutil.rmtree(f / "bank"), "bank.json"),
        (lambda f: save_anchor(f, seed=1), "the anchor is not the one"),
        (lambda f: edit_json(f / "hmem.json", lambda h: h.update(format_version=2)), "version 1"),
        (
            lambda f: edit_json(f / "hmem.json", lambda h: h["memory"].update(r=5)),
            "r is not a list",
        ),
        (lambda f: edit_json(f / "config.json", lambda c: c.update(hidden_size=24)), "config.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 93), "safetensors"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer"),
    ],
)
def test_a_damaged_model_is_one_line(ask, broken, damage, words):
    damage(broken)
    refused(ask("--model", broken), words)


def test_the_text_goes_on_without_a_damaged_block_or_stops_before_any(ask, broken):
    whole = answer(ask("--json"))
    flip_blocks(broken / "bank" / "level-3.00000.safetensors")
    refused(ask("--model", broken, "--strict-memory"), "level 3, cluster", "is damaged")
    status, out, err = ask("--model", broken, "--json")
    found = json.loads(out)
    assert (status, [block["level"] for block in found["memory"]["blocks"]]) == (0, [1])
    path = ",".join(map(str, whole["memory"]["path"]))
    assert found["text"] == answer(ask("--json", "--block", path))["text"]
    assert re.fullmatch(r"the answer went on without level 3: [^\n]+\n", err)
    assert ask("--model", broken, "--memory", "none")[0] == 0


def test_levels_may_lie_elsewhere_and_stay_in_memory(ask, broken, tmp_path):
    wanted = answer(ask("--json"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for shard in (broken / "bank").glob("level-3.*"):
        shutil.move(shard, elsewhere)
    refused(ask("--model", broken), "the bank lacks a file of level 3")
    placed = ["--model", broken, "--level-folder", f"3={elsewhere}", "--resident-levels", "1", "3"]
    found = answer(ask("--json", *placed))
    assert found["text"] == wanted["text"]
    assert found["memory"]["blocks"] == wanted["memory"]["blocks"]
    for wrong in ("2", "two=.", f"2={tmp_path / 'nothing'}"):
        refused(ask("--level-folder", wrong), "--level-folder names no folder", wrong)
    refused(ask("--level-folder", f"9={elsewhere}"), "no such level: 9")
    refused(ask("--resident-levels", "9"), "no such level: 9")


def test_ctrl_c_ends_with_130_and_one_word(ask):
    assert ask("--prompt", "-", stdin=Interrupt()) == (130, "", "stopped\n")


@pytest.mark.parametrize(
    "module", ["train.command", "mlx_hmem.evaluate.command", "mlx_hmem.generation.chat"]
)
def test_every_program_says_a_wrong_command_line_in_one_line(module):
    said = run(importlib.import_module(module).main, "--no-such-option")
    refused(said, "wrong command line", "--help")


def program(folder: Path, *args: str, **options) -> subprocess.Popen:
    command = [sys.executable, str(PROGRAM), "--model", str(folder), "--prompt", PROMPT, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_the_program_from_outside(model_folder, model):
    process = program(model_folder, "--max-tokens", "8")
    out, err = process.communicate(timeout=100)
    text = "".join(piece.text for piece in model.stream(PROMPT, max_tokens=8))
    assert (process.returncode, out.decode()) == (0, text + "\n")
    assert re.fullmatch(rb"memory: fetched [^\n]+\n", err)  # and no library's warnings


def test_a_reader_that_goes_away_ends_it_without_a_word(model_folder):
    process = program(model_folder, "--json")
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=100) == 141

"""Bundles: their own runner says what generate.py says, and a wrong one ends in one line."""

import ast
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

from convert.bundle import bundle
from convert.bundle.functions import Function
from convert.quantize import command as quantize
from mlx_hmem import load
from mlx_hmem.anchors.attach import memory_config
from mlx_hmem.anchors.load import anchor_hash, load_anchor, named_parameters, text_hashes
from mlx_hmem.bank.views import write_views
from mlx_hmem.config import HmemConfig
from mlx_hmem.errors import UserError, run_program
from mlx_hmem.files import save_safetensors
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.retriever.static import StaticEncoder
from tests.conftest import CONTEXT, MEMORY, edit_json, save_bank
from tests.convert.test_convert_quantize import SIZES, make
from tests.helpers.faults import stop_at
from tests.helpers.programs import refused
from tests.helpers.references import of_kind
from tests.helpers.tiny_anchors import LLAMA_LIKE, OTHER_KEYS

RUNNER = Path(bundle.__file__).with_name("runner.py")
PROMPTS = ["The old lighthouse", "Rivers of the north, and " * 3, "9"]


def runner_of(folder: Path) -> ModuleType:
    """The bundle's own ``run.py``."""
    spec = importlib.util.spec_from_file_location("run", folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_bundle(model: Path, out: Path, *more: Any) -> Any:
    bundle.main([str(model), str(out), *map(str, more)])
    return runner_of(out).Bundle(out)


def says(opened: Any, prompt: str, max_tokens: int, memory: str = "fetched", *blocked: Any):
    blocks = [(0, 0)] if memory == "generic" else []
    if memory == "fetched":
        texts = [",".join(map(str, path)) for path in blocked]
        blocks = opened.blocks_of(opened.route(prompt), texts)
    return list(opened.generate(opened.ids_of(prompt), opened.attach(blocks), max_tokens))


def expected(
    model: MemoryModel, prompt: str, max_tokens: int, memory: str = "fetched", *blocked: Any
) -> list[int]:
    pieces = model.stream(prompt, max_tokens=max_tokens, memory=memory, blocked=blocked)
    return [piece.token for piece in pieces]


@pytest.fixture(scope="module")
def made(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of conftest's model; for reading only."""
    out = tmp_path_factory.mktemp("bundle") / "out"
    make_bundle(model_folder, out, "--prefill", "4,16", "--kv-lengths", "8,32")
    return out


@pytest.fixture(scope="module")
def opened(made: Path) -> Any:
    return runner_of(made).Bundle(made)


def test_the_runner_says_what_the_model_says(opened, model):
    answers = set()
    for prompt in PROMPTS[:2]:
        path = model.retriever.route(prompt)
        assert opened.route(prompt) == list(path)
        cases = [("fetched",), ("generic",), ("none",), ("fetched", path), ("fetched", path[:1])]
        for case in cases:
            found = says(opened, prompt, 8, *case)
            assert found == expected(model, prompt, 8, *case)
            answers.add((prompt, tuple(found)))
        assert says(opened, prompt, 8, "fetched", path[:1]) == says(opened, prompt, 8, "none")
    assert len(answers) == 8  # else a memory changed nothing


def test_a_context_that_is_full_to_the_last_token(opened, model, texts):
    long = " ".join(texts)
    ids = model.tokenizer.encode(long)
    for count in (CONTEXT - 1, CONTEXT - 3, CONTEXT - 17):
        prompt = model.tokenizer.decode(ids[1:count])
        length = len(opened.ids_of(prompt))
        assert length >= count - 2
        found = says(opened, prompt, 50)
        assert found == expected(model, prompt, 50)
        assert len(found) == CONTEXT - length or found[-1] in model.tokenizer.eos_token_ids


def test_short_functions_are_taken_while_little_is_in_use_and_say_the_same(made, model):
    whole, short = runner_of(made).Bundle(made), runner_of(made).Bundle(made)
    del whole.about["short_functions"]  # as a reader sees it that does not know them
    assert whole.about["format_version"] == 1
    used = set()
    for prompt in PROMPTS:
        answer = expected(model, prompt, 30)
        assert says(short, prompt, 30) == says(whole, prompt, 30) == answer
        first, last = len(short.ids_of(prompt)), len(short.ids_of(prompt)) + len(answer) - 1
        used |= {8 if n <= 8 else 32 if n <= 32 else CONTEXT for n in (first, last)}
    taken = {name for name in short.functions if "decode" in name}
    assert used == {8, 32, CONTEXT} == {int(n.partition("-kv")[2][:-6] or CONTEXT) for n in taken}
    assert not any("-kv" in name for name in whole.functions)


def test_pieces_and_lengths_of_a_single_token(model_folder, model, tmp_path):
    """Fewer than the tokens on which the functions are checked: that once failed in MLX."""
    options = ["--context", 32, "--prefill", 1, "--kv-lengths", 1]
    opened = make_bundle(model_folder, tmp_path / "out", *options)
    assert says(opened, PROMPTS[0], 4) == expected(model, PROMPTS[0], 4)


def test_routes_are_the_retrievers(opened, model, texts):
    special = ["[CLS] [SEP] [MASK]", "…", "日本 Ünï 🦊" * 9, "a" * 9000, *texts[:40]]
    assert [tuple(opened.route(text)) for text in special] == [
        model.retriever.route(text) for text in special
    ]


QUANTISED = ["--anchor-bits", "4", "--anchor-group-size", "32", "--bank-bits", "4"]
QUANTISED += ["--bank-group-size", "32", "--bank-level", "1:mxfp4"]


def quantised_bundle(kind, model_folder, place):
    """A bundle in ``place / "out"`` of the quantised model in ``place / "small"``, opened."""
    config = replace(MEMORY, **of_kind(kind), layers=(1,) if kind == "ffn" else None, **SIZES)
    make(model_folder, place / "model", config)
    quantize.main([str(place / "model"), str(place / "small"), *QUANTISED])
    return make_bundle(place / "small", place / "out", "--context", 64, "--prefill", 8)


@pytest.mark.parametrize("kind", ["ffn", "lora_ffn", "lora", "kv"])
def test_kinds_of_memory_quantised(kind, model_folder, tmp_path):
    opened = quantised_bundle(kind, model_folder, tmp_path)
    model = load(tmp_path / "small")
    prompt, path = PROMPTS[1], model.retriever.route(PROMPTS[1])
    for case in [("fetched",), ("generic",), ("fetched", path)]:
        assert says(opened, prompt, 6, *case) == expected(model, prompt, 6, *case)


def with_architecture(source: Path, folder: Path, name: str, kind: str) -> Path:
    """conftest's model with an anchor of mlx-lm, and a memory for that."""
    shutil.copytree(source, folder)
    config: dict[str, Any] = dict(LLAMA_LIKE, model_type=name, **OTHER_KEYS.get(name, {}))
    config |= {"vocab_size": 400, "max_position_embeddings": CONTEXT, "sliding_window": 8}
    config |= {"n_ctx": CONTEXT, "n_positions": CONTEXT} if name == "gpt2" else {}
    code = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(4)
    anchor = code.Model(code.ModelArgs.from_dict(config))
    weights = {n: w * 2 if w.ndim > 1 else w for n, w in named_parameters(anchor).items()}
    if name == "gemma3_text":  # only the weights tell it that it has no head of its own
        weights.pop("lm_head.weight")
    save_safetensors(folder / "model.safetensors", weights)
    edit_json(folder / "config.json", lambda values: (values.clear(), values.update(config)))
    hmem = HmemConfig.from_file(folder / "hmem.json")
    memory = memory_config(load_anchor(folder)[0], MEMORY.r, MEMORY.branching, kind)
    hmem = replace(hmem, memory=memory, anchor_hash=anchor_hash(folder), **text_hashes(folder))
    (folder / "hmem.json").write_text(hmem.to_json())
    save_bank(folder / "bank", memory, hmem.anchor_hash, hmem.retriever.tree_hash)
    return folder


@pytest.mark.parametrize(
    ("name", "kind"), [("gemma3_text", "ffn"), ("gpt2", "lora_vo"), ("mixtral", "lora_qk")]
)
def test_anchors_of_mlx_lm(name, kind, model_folder, tmp_path):
    """Sliding windows, learned positions, experts."""
    folder = with_architecture(model_folder, tmp_path / "model", name, kind)
    opened = make_bundle(folder, tmp_path / "out", "--prefill", 8, "--kv-lengths", 16)
    model = load(folder)
    for prompt in PROMPTS:
        assert says(opened, prompt, 8) == expected(model, prompt, 8)


def test_the_runner_needs_nothing_of_ours():
    source = RUNNER.read_text()
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(str(node.module).partition(".")[0])
    assert found - sys.stdlib_module_names == {"mlx", "numpy", "tokenizers", "xxhash"}
    assert source.count("\n") < 250


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(folder / "run.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_a_bundle_runs_by_itself_elsewhere(made, model, tmp_path):
    folder = shutil.copytree(made, tmp_path / "elsewhere")
    prompt = PROMPTS[0]
    process = run(folder, prompt, "--max-tokens", "8", "--json")
    found = json.loads(process.stdout)
    assert found["tokens"] == expected(model, prompt, 8)
    assert found["path"] == list(model.retriever.route(prompt))
    path = ",".join(map(str, found["path"]))
    process = run(folder, prompt, "--block", path, "--max-tokens", "8", "--json")
    assert json.loads(process.stdout)["tokens"] == expected(
        model, prompt, 8, "fetched", tuple(found["path"])
    )


def test_the_manifest_names_every_file_and_the_order_of_the_weights(made, model_folder):
    values = json.loads((made / "bundle.json").read_text())
    files = {str(f.relative_to(made)) for f in made.rglob("*") if f.is_file()}
    assert files - {"bundle.json"} == set(values["files"])
    assert all((made / n).stat().st_size == k["bytes"] for n, k in values["files"].items())
    weights = named_parameters(load_anchor(model_folder)[0])
    assert [each["name"] for each in values["weights"]] == list(weights)
    assert [tuple(each["shape"]) for each in values["weights"]] == [
        array.shape for array in weights.values()
    ]
    kinds = [(f["kind"], f.get("num_tokens"), f["num_rows"]) for f in values["functions"]]
    assert len(kinds) == len(set(kinds)) + 1 == 3 + 3 * 3  # the generic memory and all levels
    short = [(f["kv_length"], f["kind"], f["num_tokens"]) for f in values["short_functions"]]
    assert [each[0] for each in short] == sorted(each[0] for each in short)
    assert set(short) == {
        *((kv, "decode", 1) for kv in (8, 32)),
        *((kv, "prefill", length) for kv, length in ((8, 4), (32, 4), (32, 16))),
    }
    assert len(short) == 3 * len(set(short))
    assert (values["context"], values["oldest_mlx"]) == (CONTEXT, "0.31.1")


def test_a_stopped_run_goes_on(model_folder, model, tmp_path, monkeypatch):
    out, part = tmp_path / "out", tmp_path / "out.part"
    stop_at(monkeypatch, Function, "write", 4)
    with pytest.raises(KeyboardInterrupt):
        make_bundle(model_folder, out, "--prefill", 8)
    assert not out.exists()
    before = {f.name: f.stat().st_mtime_ns for f in part.rglob("*.mlxfn")}
    assert len(before) == 3
    opened = make_bundle(model_folder, out, "--prefill", 8)
    after = {f.name: f.stat().st_mtime_ns for f in out.rglob("*.mlxfn")}
    assert before.items() < after.items()
    assert says(opened, PROMPTS[0], 5) == expected(model, PROMPTS[0], 5)


REFUSED = {
    "longer": (["--context", "97"], "the context is not the anchor's: 97; use 2 to 96 tokens"),
    "one": (["--context", "1"], "the context is not the anchor's: 1; use 2 to 96 tokens"),
    "prefill": (["--context", "32", "--prefill", "64"], "out of range: [64]; use 1 to 32 tokens"),
    "zero": (["--prefill", "0"], "a prefill length is out of range: [0]; use 1 to 96 tokens"),
    "words": (["--prefill", "many"], "--prefill takes lengths in tokens: 'many'; write it as"),
    "short": (["--kv-lengths", "0"], "a KV length is out of range: [0, 96]; use 1 to 96 tokens"),
    "kv": (["--kv-lengths", "8,97"], "KV length is out of range: [8, 96, 97]; use 1 to 96 tokens"),
    "kv words": (["--kv-lengths", "x"], "--kv-lengths takes lengths in tokens: 'x'; write it as"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_options_are_refused(options, message, model_folder, tmp_path):
    assert message in refused("", make_bundle, model_folder, tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_exists_is_refused_and_replaced_only_when_asked(
    model_folder, made, tmp_path
):
    out = shutil.copytree(made, tmp_path / "out")
    refused("the destination exists", make_bundle, model_folder, out)
    make_bundle(model_folder, out, "--overwrite", "--context", 32, "--prefill", 8)
    assert json.loads((out / "bundle.json").read_text())["context"] == 32
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("Dear")
    refused("holds no model", make_bundle, model_folder, other, "--overwrite")
    assert [file.name for file in other.iterdir()] == ["letter.txt"]


def test_what_cannot_be_in_a_bundle_is_named(model_folder, broken, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(StaticEncoder, "name", "minilm")
        with pytest.raises(UserError, match=r"only the static encoder .*: minilm; train tree"):
            make_bundle(model_folder, tmp_path / "out")
    write_views(broken / "bank", {"default": [(1,)]})  # which a bundle's user could not be held to
    refused(r"one bank and no views: .* 1 clusters barred", make_bundle, broken, tmp_path / "out")
    for name in ("hmem.json", "bank", "retriever"):
        path = broken / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    refused("this model has no memory bank", make_bundle, broken, tmp_path / "out")
    model = make(model_folder, tmp_path / "wide")
    options = ["--bank-mode", "mxfp8"]
    quantize.main([str(model), str(tmp_path / "fp8"), *options])
    if mx.default_device().type == mx.DeviceType.cpu:  # a GPU's own operation is recorded
        with pytest.raises(UserError, match=r"memory-1.mlxfn cannot be recorded: .* mode affine"):
            make_bundle(tmp_path / "fp8", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_runner_names_what_is_wrong_in_one_line(made, opened, tmp_path, capsys, monkeypatch):
    module = runner_of(made)

    def ends(folder: Path, *args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["run.py", "--bundle", str(folder), *args])
        with pytest.raises(SystemExit) as end:
            module.main()
        out, err = capsys.readouterr()
        assert (end.value.code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ")
        return str(err)

    words = "word " * 200
    assert "tokens, more than 95; cut the prompt" in ends(made, words)
    assert "the prompt is empty" in ends(made, " ")
    assert "invalid choice" in ends(made, "x", "--memory", "other")
    assert "unrecognized" in ends(made, "x", "--temperature", "1")
    assert "cannot read" in ends(tmp_path, "x")
    for name in json.loads((made / "bundle.json").read_text())["files"]:
        if name.startswith("functions") and "memory" not in name:
            continue
        folder = shutil.copytree(made, tmp_path / "copy")
        (folder / name).unlink()
        assert f"a file is missing or damaged: {folder / name}" in ends(folder, "x")
        shutil.rmtree(folder)
    folder = shutil.copytree(made, tmp_path / "copy")
    for version in (0, 2, None):
        edit_json(folder / "bundle.json", lambda v, n=version: v.update(format_version=n))
        assert f"is of version {version}, not 1; make or update it" in ends(folder, "x")
    edit_json(folder / "bundle.json", lambda values: values.update(format_version=1))
    kind = mx.default_device().type.name
    other = "cpu" if kind == "gpu" else "gpu"
    edit_json(folder / "bundle.json", lambda values: values["made_with"].update(device=other))
    said = f"functions are for the {other}, not Device({kind}, 0); make them there"
    assert said in ends(folder, "x")
    edit_json(folder / "bundle.json", lambda values: values["made_with"].update(device=kind))
    with open(folder / "anchor.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert "damaged: " in ends(folder, "x")
    shutil.copy(made / "anchor.safetensors", folder)
    shard = folder / "bank" / "level-1.00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:16384].ljust(shard.stat().st_size, b"\1"))
    assert "of level 1 is damaged" in ends(folder, "x")


def test_the_command_line_is_refused_in_one_line(model_folder, made, capsys):
    from convert.command import main

    with pytest.raises(SystemExit) as end:
        run_program(lambda: main(["bundle", str(model_folder), str(made)]))
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err.startswith("error: the destination exists")
    assert err.count("\n") == 1

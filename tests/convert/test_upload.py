"""What goes up to the Hub is whole, has a card, and comes back as it was."""

import re
import shutil
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
import yaml

from convert.command import main as convert
from convert.upload import card, main, upload
from mlx_hmem.bank.documents import Document, write_documents
from mlx_hmem.bank.format import PAGE
from mlx_hmem.model.load import load
from tests.conftest import MEMORY, save_anchor
from tests.helpers.faults import flip
from tests.helpers.hub_models import BASE, LAST, REPO, blocks, cut_bank, same
from tests.helpers.hub_server import TOKEN
from tests.helpers.programs import refused


def test_an_upload_comes_back_as_it_was(hub, directory, capsys):
    (directory / "bank" / ".level-9.part").write_bytes(b"half")
    upload(directory, REPO, private=True)
    out = capsys.readouterr().out
    sha, files = hub.repos[REPO].commits[-1]
    assert f"{hub.url}/{REPO}" in out
    assert sha in out
    bank = {f"bank/{p.name}" for p in (directory / "bank").iterdir() if p.name[0] != "."}
    assert set(files) == BASE | bank | {"README.md"}
    assert all((directory / name).read_bytes() == data for name, data in files.items())
    model = load(REPO, lazy=True)
    assert same(blocks(model, LAST), blocks(load(directory), LAST))

    hub.requests.clear()
    main([str(directory), REPO])  # nothing is new
    assert not [r for r in hub.requests if r.method == "PUT"]
    assert len(hub.repos[REPO].commits) == 1


def test_another_model_replaces_all_of_the_first(hub, directory):
    upload(directory, REPO)
    hub.repos[REPO].commits[-1][1]["diary.txt"] = b"somebody's own"
    cut_bank(directory, 12)
    upload(directory, REPO)
    files = hub.repos[REPO].commits[-1][1]
    bank = {f"bank/{p.name}" for p in (directory / "bank").iterdir()}
    assert {name for name in files if name.startswith("bank/")} == bank
    assert "diary.txt" in files
    load(REPO)


def test_shards_of_a_large_bank_go_up_before_what_names_them(hub, directory, monkeypatch):
    monkeypatch.setattr("convert.upload.ONE_COMMIT", 5)
    upload(directory, REPO)
    first, last = (files for _, files in hub.repos[REPO].commits)
    assert set(first) == {f"bank/{p.name}" for p in (directory / "bank").glob("*.safetensors")}
    assert {"bank/bank.json", "hmem.json"} <= set(last)
    load(REPO)


def test_only_files_of_the_format_go_up_and_none_from_elsewhere(hub, directory, tmp_path):
    """A note below the folder went up with the model, as would what a stranger's link names."""
    files = {"private/diary.txt", "notes.txt", "retriever/notes.txt", "bank/notes.json", "x.py"}
    write_documents(directory / "bank", [Document("0" * 64, "Dear diary", 1, (LAST,), ())])
    for name in files | {"tokenizer_old/secret.txt", "replaced/hmem.json"}:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("Dear diary")
    upload(directory, REPO)
    assert not any(b"Dear diary" in data for data in hub.repos[REPO].commits[-1][1].values())
    (tmp_path / "key").write_text("secret")
    (directory / "LICENSE").symlink_to(tmp_path / "key")
    hub.requests.clear()
    refused("a link leads out of the model's folder: .*LICENSE; put the", upload, directory, REPO)
    assert hub.requests == []
    # Nor by way of a copy, which would hold what the link names.
    for words in (["quantize", directory, tmp_path / "q", "--bank-dtype", "float32"],
                  ["bundle", directory, tmp_path / "b"],
                  [directory, tmp_path / "p", "--to", "pytorch"]):  # fmt: skip
        refused("a link leads out of the model's folder", convert, [str(word) for word in words])
    load(REPO)
    [cached] = Path(hub_constants.HF_HUB_CACHE).glob("models--*/snapshots/*")
    assert (cached / "tokenizer.json").is_symlink()  # as are all files there
    convert([str(cached), str(tmp_path / "p"), "--to", "pytorch"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: flip(d / "bank" / "level-3.00005.safetensors", PAGE + 1), "level 3, cluster 10"),
        (lambda d: (d / "bank" / "level-3.00002.safetensors").unlink(), "lacks a file of level 3"),
        (lambda d: save_anchor(d, seed=5), "the anchor is not the one"),
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: shutil.rmtree(d), "no such model directory"),
    ],
)
def test_a_broken_model_is_not_uploaded(hub, directory, change, words):
    change(directory)
    refused(re.escape(words), upload, directory, REPO)
    assert hub.requests == []


def test_an_encoder_that_would_not_come_along_is_not_uploaded(hub, directory):
    from mlx_hmem.retriever.encoder import STATIC_FOLDER

    shutil.copytree(STATIC_FOLDER, directory / "encoder")
    text = (directory / "hmem.json").read_text()
    (directory / "hmem.json").write_text(text.replace('"static"', '"encoder"'))
    refused("move it into retriever/", upload, directory, REPO)
    shutil.move(directory / "encoder", directory / "retriever" / "encoder")
    (directory / "hmem.json").write_text(text.replace('"static"', '"retriever/encoder"'))
    upload(directory, REPO)
    assert load(REPO, lazy=True).retriever.encoder.fingerprint


def test_no_upload_without_name_token_right_or_connection(hub, directory, monkeypatch):
    refused("write it as user/name", upload, directory, "tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    refused("401", upload, directory, REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    refused(re.escape(f"the Hub did not take {directory} as {REPO}"), upload, directory, REPO)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    refused("hf auth login", upload, directory, REPO)
    assert hub.repos == {}


def front_matter(text: str) -> dict:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_card_says_what_the_model_is(directory):
    text = card(directory, "user/tiny", base_model="apple/OpenLM-160M", license="mit")
    front = front_matter(text)
    assert (front["library_name"], front["pipeline_tag"]) == ("mlx", "text-generation")
    assert (front["base_model"], front["license"]) == ("apple/OpenLM-160M", "mit")
    assert "mlx" in front["tags"]
    for words in (
        "openlm: 2 layers, 16 hidden", f"{MEMORY.bank_parameters:,} parameters", "3 × 2 × 2",
        f"{MEMORY.fetched_parameters:,}", 'load("user/tiny", lazy=True)', "in 9 files", "static",
    ):  # fmt: skip
        assert words in text
    assert "{" not in text
    (directory / "hmem.json").unlink()
    text = card(directory)
    assert "base_model" not in front_matter(text)
    assert "memory bank" not in text


def test_a_card_that_is_there_is_kept(hub, directory):
    (directory / "README.md").write_text("# Mine – and mine\n", encoding="utf-8")
    upload(directory, REPO)
    text = (directory / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: mlx\n")
    assert text.endswith("---\n\n# Mine – and mine\n")
    upload(directory, REPO)
    assert (directory / "README.md").read_text(encoding="utf-8") == text
    (directory / "README.md").write_bytes(b"\xff")
    refused("is not UTF-8", upload, directory, REPO)

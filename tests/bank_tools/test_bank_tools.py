"""python -m mlx_hmem.bank: what lies where, what is damaged, and models of parts of others."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_hmem.anchors.load import anchor_hash
from mlx_hmem.bank import Bank, rewrite_bank
from mlx_hmem.bank.documents import Document, find_documents, read_documents, write_documents
from mlx_hmem.bank_tools.command import main, opened
from mlx_hmem.bank_tools.contents import Contents
from mlx_hmem.bank_tools.effects import measure
from mlx_hmem.errors import UserError
from mlx_hmem.files import load_safetensors, save_safetensors, write_atomic
from mlx_hmem.model.load import load
from tests.conftest import MEMORY, edit_json
from tests.helpers import programs
from tests.helpers.banks import flip_block, refused, said
from tests.helpers.places import ROOT, bytes_of


def test_documents_come_back_and_are_found_by_name_and_hash(known, model):
    documents = read_documents(known / "bank", model.bank.config)
    assert len(documents) == 20
    assert documents[3].keys == set(enumerate(documents[3].clusters[0], 1))
    assert find_documents(documents, documents[3].sha256[:10]) == [documents[3]]
    write_documents(known / "bank", documents)
    assert read_documents(known / "bank") == documents
    with pytest.raises(UserError, match="the bank knows no such document: a diary"):
        find_documents(documents, "a diary")
    # Six digits of a hash; accents however they are encoded; a name as it is printed.
    odd = replace(documents[3], name="caf\u00e9\x1b[31m")
    for wanted in (odd.sha256[:6], "cafe\u0301\x1b[31m", "caf\u00e9\\x1b[31m"):
        assert find_documents([*documents[:3], odd], wanted) == [odd]


def test_a_name_a_folder_and_a_pattern_mean_all_documents_that_are_called_so():
    names = ["letters/a.txt", "letters/b.md", "letters/old/a.txt", "notes/a.txt", "notes/[1].txt"]
    documents = [Document(f"{n:064x}", name, 1, ((0,),)) for n, name in enumerate(names)]
    documents.append(replace(documents[3], sha256="f" * 64))  # two versions of one note

    def found(wanted: str, also: Any = None) -> list[str]:
        return [d.name for d in find_documents(documents, wanted, also)]

    assert found("letters/") == names[:3]
    assert found("letters/*.txt") == names[:1]
    assert found("*/a.txt") == ["letters/a.txt", "notes/a.txt", "notes/a.txt"]
    assert found("notes/a.txt") == ["notes/a.txt"] * 2
    assert found("notes/[1].txt") == ["notes/[1].txt"]  # a name before a pattern
    assert found("post/", {documents[1].sha256: ["post/b.md"]}) == ["letters/b.md"]
    for nothing in ("/", "letters", "*.txt", "old/", "attic/*"):
        with pytest.raises(UserError, match="the bank knows no such document"):
            found(nothing)
    with pytest.raises(UserError, match="several documents have that hash: 000000"):
        found("000000")


def test_a_view_and_a_bank_have_one_name_however_its_accents_are_encoded(known, capsys):
    said(capsys, "block", known, 0, "--view", "g\u00e4ste")
    said(capsys, "block", known, 1, "--view", "ga\u0308ste")
    assert load(known, view="ga\u0308ste").banks.views == {"g\u00e4ste": ((0,), (1,))}
    assert "is removed" in said(capsys, "unblock", known, "--view", "ga\u0308ste")
    with pytest.raises(UserError, match="abc; known: none was added; write a cluster as 3"):
        main(["split", str(known), "abc", "--out", str(known.with_name("new"))])


GOOD = {"sha256": "0" * 64, "name": "a", "tokens": 3, "clusters": [[0, 0, 0]]}
DAMAGED = {
    "cut off": ('{"sha256": "00', "Unterminated"),
    "no object": ([], "not a JSON object"),
    "a key too few": ({"sha256": "0" * 64}, "missing key"),
    "an unknown key": (GOOD | {"author": 1}, "unknown key"),
    "a short hash": (GOOD | {"sha256": "0"}, "64 hex digits"),
    "no number": (GOOD | {"tokens": -3}, "tokens is not a whole number"),
    "no such leaf": (GOOD | {"clusters": [[9, 0, 0]]}, "no such cluster on level 1: 9"),
    "no leaf": (GOOD | {"clusters": [[0, 0]]}, "needs 3 levels"),
    "no paths": (GOOD | {"clusters": [3]}, "clusters are not cluster paths"),
    "nine terms": (GOOD | {"terms": ["a"] * 9}, "8 words"),
    "one as before": (GOOD | {"sha256": "1" * 64}, "twice"),
    "bytes": ("\xff", "utf-8"),
}


@pytest.mark.parametrize(("line", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_list_of_documents_is_one_line_with_its_number(line, words, model, tmp_path):
    text = line if isinstance(line, str) else json.dumps(line)
    first = json.dumps(GOOD | {"sha256": "1" * 64})
    (tmp_path / "documents.jsonl").write_bytes(f"{first}\n\n{text}\n".encode("latin-1"))
    line = programs.refused(re.escape(words), read_documents, tmp_path, model.bank.config)
    assert "documents.jsonl, line 3, is damaged" in line


def test_inspect_counts_what_trained_each_cluster(known, model, capsys):
    documents = read_documents(known / "bank")
    with opened(known) as (bank,):
        contents = Contents(bank)
    for level in (1, 2, 3):
        own = {key: c for key, c in contents.clusters.items() if key[0] == level}
        assert sum(c.tokens for c in own.values()) == sum(d.tokens for d in documents)
        for key, cluster in own.items():
            assert {documents[n].sha256 for n in cluster.documents} == {
                d.sha256 for d in documents if key in d.keys
            }
    lines = said(capsys, "inspect", known).splitlines()
    assert "20 documents" in lines[0]
    leaf = documents[0].clusters[0]
    assert any(line.split()[0] == ",".join(map(str, leaf)) for line in lines if line.strip())
    lines = said(capsys, "inspect", known, "{},{}".format(*leaf)).splitlines()
    assert any(documents[0].sha256[:12] in line for line in lines)
    (known / "bank" / "documents.jsonl").unlink()
    assert "no documents.jsonl" in said(capsys, "inspect", known)


def test_the_effect_of_a_block_is_what_the_loss_rises_by_without_it(model, texts):
    text = texts[0][:150]
    effects = measure(model, [("a text", text)])
    (routed,) = effects.texts
    path, ids = model.retriever.route(text), mx.array([model.tokenizer.encode(text)])

    def loss(**options) -> float:
        logits = model.with_rows(model.fetch(text, **options).rows)(ids[:, :-1])
        return nn.losses.cross_entropy(logits, ids[:, 1:], reduction="mean").item()

    assert routed.path == path
    assert routed.fetched == pytest.approx(loss(), rel=1e-4)
    assert routed.without == pytest.approx(loss(memory="none"), rel=1e-4)
    leaf = effects.blocks["", 3, path[-1]]
    assert leaf.per_token == pytest.approx(loss(blocked=[path]) - loss(), rel=1e-3)
    assert abs(leaf.per_token) > 1e-3
    assert set(effects.blocks) == {("", 1, path[0]), ("", 3, path[2])}


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))


def test_verify_names_every_damaged_block_and_ends_with_1(known, capsys):
    assert "16 blocks are sound, nothing found damaged" in said(capsys, "verify", known)
    stride = Bank.open(known / "bank").manifest.levels[1].block_stride
    file = known / "bank" / "level-3.00000.safetensors"
    flip(file, 16384 + 4 * stride + 9)
    flip(file, 16384 + 7 * stride)
    write_atomic(known / "bank" / "documents.jsonl", "{")
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(known)])
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert "documents.jsonl, line 1" in err
    write_atomic(known / "bank" / "documents.jsonl", "")
    with pytest.raises(SystemExit):
        main(["verify", str(known)])
    out, err = capsys.readouterr()
    assert "level 3, cluster 4 of the bank is damaged" in err
    assert "level 3, cluster 7 of the bank is damaged" in err
    assert "14 blocks are sound, 2 found damaged" in out
    file.unlink()
    with pytest.raises(SystemExit):
        main(["verify", str(known)])
    assert "the bank lacks a file of level 3" in capsys.readouterr().err


def test_what_is_not_finite_is_found_though_its_checksum_is_right(known, tmp_path, capsys):
    """Such a model gave empty answers, and its blocks were called sound."""
    with Bank.open(known / "bank") as bank:
        size, manifest = bank.block_bytes(1), bank.manifest

    def block(level: int, cluster: int) -> Any:
        return [memoryview(b"\xff" * size)] if (level, cluster) == (1, 1) else "keep"

    rewrite_bank(tmp_path / "bank", manifest, block, known / "bank")
    shutil.rmtree(known / "bank")
    shutil.move(tmp_path / "bank", known / "bank")
    weights = dict(load_safetensors(known / "model.safetensors"))
    name = next(name for name in weights if "norm" in name)
    save_safetensors(known / "model.safetensors", weights | {name: weights[name] * mx.inf})
    for file in ("hmem.json", "bank/bank.json"):
        edit_json(known / file, lambda values: values.update(anchor_hash=anchor_hash(known)))
    with pytest.raises(SystemExit):
        main(["verify", str(known)])
    said_, found = capsys.readouterr()
    assert f"damaged: {name} of the anchor is not finite" in found
    assert "level 1, cluster 1 of the bank is not finite" in found
    assert "2 found damaged" in said_
    assert "not finite" in refused("split", known, 1, "--out", tmp_path / "new")


def test_block_and_unblock_change_one_small_file(known, model, texts, capsys):
    before = bytes_of(known)
    text = texts[0][:120]
    path = model.retriever.route(text)
    name = ",".join(map(str, path))
    assert f"view guest bars {name};" in said(capsys, "block", known, name, "--view", "guest")
    assert load(known, view="guest").fetch(text).blocks[-1]["level"] == 1
    whole = said(capsys, "block", known, str(path[0]), "--view", "guest")
    assert f"view guest bars {path[0]};" in whole
    assert f"unblock {path[0]}" in refused("unblock", known, name, "--view", "guest")
    assert "does not bar this cluster: 2" in refused("unblock", known, 2, "--view", "guest")
    assert "no such cluster on level 1: 9" in refused("block", known, 9, "--view", "guest")
    assert "not a cluster path: '1;2'" in refused("block", known, "1;2", "--view", "guest")
    assert "no such bank: notes" in refused("block", known, "notes:1", "--view", "guest")
    assert "wrong name of a view: '7'" in refused("block", known, 1, "--view", "7")
    said(capsys, "block", known, "--view", "all")
    assert "view guest bars nothing" in said(capsys, "unblock", known, path[0], "--view", "guest")
    assert "view guest is removed" in said(capsys, "unblock", known, "--view", "guest")
    assert "no such view: guest; known: all" in refused("unblock", known, "--view", "guest")
    after = bytes_of(known)
    del after["bank/views.json"]
    assert after == before


def test_two_who_change_views_at_once_both_do(known):
    """The second wrote what it had read before the first one wrote: a view announced, and lost."""
    slow = (
        "import sys, time; from mlx_hmem.bank_tools import access, command; "
        "write = access.write_views; "
        "access.write_views = lambda *given: (time.sleep(1), write(*given)); "
        "command.main(['block', sys.argv[1], '0', '--view', sys.argv[2]])"
    )
    command = [sys.executable, "-c", slow, str(known)]
    both = [subprocess.Popen([*command, name], cwd=ROOT) for name in ("one", "other")]
    assert [each.wait() for each in both] == [0, 0]
    assert set(json.loads((known / "bank" / "views.json").read_text())["views"]) == {"one", "other"}


def test_diff_says_which_blocks_differ_and_by_how_much(broken, model_folder, model, capsys):
    assert "0 blocks differ" in said(capsys, "diff", model_folder, broken)
    flip_block(broken)
    out = said(capsys, "diff", model_folder, broken)
    (row,) = [line.split() for line in out.splitlines() if line.startswith("    1 ")]
    difference = np.sqrt(np.prod(MEMORY.block_shape(1))) * 0.5
    assert float(row[-1]) == pytest.approx(difference, rel=1e-3)
    assert "1 blocks differ" in out


def test_exported_blocks_are_what_the_bank_gives(model_folder, model, tmp_path, capsys):
    file = tmp_path / "blocks.safetensors"
    said(capsys, "export", model_folder, 1, "--out", file)
    arrays = mx.load(str(file))
    keys = [(1, 1), *((3, cluster) for cluster in range(4, 8))]
    assert set(arrays) == {f"level-{level}.{cluster}" for level, cluster in keys}
    for level, cluster in keys:
        (block,) = model.bank.blocks([(level, cluster)])
        assert mx.array_equal(arrays[f"level-{level}.{cluster}"], block)
    npz = tmp_path / "blocks.npz"
    said(capsys, "export", model_folder, "--level", 0, "--out", npz)
    with np.load(npz) as found:
        assert np.array_equal(found["generic"], np.array(model.bank.blocks([(0, 0)])[0]))
    assert "the destination exists" in refused("export", model_folder, "--out", npz)
    assert "no such level: 2" in refused("export", model_folder, "--level", 2, "--out", "a.npz")
    assert "unknown kind of file" in refused("export", model_folder, "--out", tmp_path / "a.txt")


def test_forgetting_is_a_program_of_its_own():
    assert "mlx_hmem.forget DIR DOCUMENT" in refused("forget", "DIR", "a letter")

"""After a forgetting nothing of a document is found: not its text, name, hash, words or vector."""

import hashlib
import math
import re
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem.bank import Bank, rewrite_bank
from mlx_hmem.bank.documents import read_documents
from mlx_hmem.bank.documents import write_documents as write_known
from mlx_hmem.bank_tools.command import main as bank_tools
from mlx_hmem.files import load_safetensors
from mlx_hmem.model.load import load
from mlx_hmem.reading import strict_json
from mlx_hmem.retriever import load_encoder
from tests.helpers.own_documents import remember, sentences
from tests.helpers.places import bytes_of
from tests.helpers.programs import refused
from tests.remember.test_remember import anchor, eager  # noqa: F401
from train.corpus.own import OwnDocument
from train.remember.export import open_base, text_of
from train.remember.forget import main as forget_program
from train.remember.forget import runs_of, targets_of

SECRET = "Zebulon Quixfeather hid the vermilion gramophone beneath the Trondheim bakery."
NAME = "caf\N{LATIN SMALL LETTER E WITH ACUTE} plans.txt"


def taught(model: Path, folder: Path, topic: str, *names: str) -> Path:
    """A model that has learned a document of the topic, if any, and the secret by ``names``."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    if topic:
        (texts / "other.txt").write_text(sentences(topic, 0)[:140])
    for name in names:
        (texts / name).write_text(SECRET)
    return remember(texts, model, folder / "model", "--passes", "1")


def secret_vectors(model: Path) -> np.ndarray:
    """Of the secret as a whole, of its sentences, and of its windows as the model cuts them."""
    base = open_base(str(model))
    text, tokenizer = text_of(base, [OwnDocument("", "", SECRET)])
    parts = [SECRET, *text.windows.texts(tokenizer)]
    return load_encoder("static").encode(parts)


def traces(vectors: np.ndarray, *folders: Path) -> list[str]:
    """Where the secret is found, and how; ``vectors``: its own."""
    digest = hashlib.sha256(SECRET.encode())
    needles = [unicodedata.normalize(form, NAME).encode() for form in ("NFC", "NFD")]
    needles += [b"quixfeather", b"vermilion", b"copy.txt", digest.hexdigest().encode()]
    needles += [digest.digest(), digest.hexdigest()[:12].encode()]
    found = []
    for folder in folders:
        for name, data in bytes_of(folder).items():
            low = data.lower()
            found += [f"{folder.name}/{name}: {n!r}" for n in needles if n.lower() in low]
            if not name.endswith(".safetensors"):
                continue
            for key, value in load_safetensors(folder / name).items():
                if value.ndim != 2 or value.shape[1] != vectors.shape[1]:
                    continue
                rows = np.array(value, np.float32)
                lengths = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
                if (rows / lengths @ vectors.T).max() > 0.95:
                    found.append(f"{folder.name}/{name}: the vector, in {key}")
    return found


def own(model: Path, folder: Path) -> tuple[Path, list[Path]]:
    made = taught(model, folder, "boats", NAME)
    return made, [Path(f"{made}.run")]


def alone(model: Path, folder: Path) -> tuple[Path, list[Path]]:
    """Nothing else has been learned: its cluster is left empty, and so is the tree."""
    made = taught(model, folder, "", NAME)
    return made, [Path(f"{made}.run")]


def added(model: Path, folder: Path) -> tuple[Path, list[Path]]:
    """It stands in the model's own bank and in the one beside it."""
    both = [taught(model, folder / topic, topic, NAME) for topic in ("boats", "bread")]
    bank_tools(["add", *map(str, both), "--name", "notes", "--out", str(folder / "both")])
    return folder / "both", [Path(f"{each}.run") for each in both]


def only_added(model: Path, folder: Path) -> tuple[Path, list[Path]]:
    both = [taught(model, folder / "0", "boats"), taught(model, folder / "1", "bread", NAME)]
    bank_tools(["add", *map(str, both), "--name", "notes", "--out", str(folder / "both")])
    return folder / "both", [Path(f"{both[1]}.run")]


def layered(model: Path, folder: Path) -> tuple[Path, list[Path]]:
    """Another run has taught other documents behind those of the first."""
    first = taught(model, folder / "0", "boats", NAME)
    return taught(first, folder / "1", "bread"), [Path(f"{first}.run")]


def known_later(model: Path, folder: Path) -> tuple[Path, list[Path]]:
    """Another run has met the document once more, by another name; its own stays as it is."""
    first = taught(model, folder / "0", "boats", NAME)
    second = taught(first, folder / "1", "bread", "copy.txt", NAME)
    return second, [Path(f"{model}.run") for model in (first, second)]


def merged(model: Path, folder: Path) -> tuple[Path, list[Path]]:
    """Two models have learned one half each, and one is made of them."""
    whole = taught(model, folder, "boats", NAME)
    for number in (0, 1):
        half = Path(shutil.copytree(whole, folder / f"half{number}"))
        with Bank.open(whole / "bank") as bank:
            branching, manifest = bank.config.branching, bank.manifest

        def block(level: int, cluster: int, number: int = number, w: tuple = branching) -> Any:
            first = cluster // math.prod(w[1:level])
            return "keep" if level == 0 or first % 2 == number else None

        rewrite_bank(half / "bank", manifest, block, whole / "bank")
        known = [d for d in read_documents(whole / "bank") if d.clusters[0][0] % 2 == number]
        write_known(half / "bank", known)
    halves = [str(folder / f"half{number}") for number in (0, 1)]
    bank_tools(["merge", *halves, "--out", str(folder / "merged")])
    return folder / "merged", [Path(f"{whole}.run")]


CASES: dict[str, tuple[Callable[[Path, Path], tuple[Path, list[Path]]], str]] = {
    "own": (own, NAME),
    "alone in its cluster": (alone, NAME),
    "own and added": (added, NAME),
    "added": (only_added, NAME),
    "taught upon": (layered, NAME),
    "merged": (merged, NAME),
    "a name with accents apart": (own, unicodedata.normalize("NFD", NAME)),
    "six digits of its hash": (own, hashlib.sha256(SECRET.encode()).hexdigest()[:6]),
    "a name that a later run has read": (known_later, "copy.txt"),
    "a copy": (lambda model, f: (taught(model, f, "boats", NAME, "copy.txt"), []), "copy.txt"),
}


def forget(model: Path, name: str, runs: Sequence[Path], out: Path) -> None:
    options = [word for run in runs for word in ("--run", str(run))]
    forget_program([str(model), name, *options, "--out", str(out)])


@pytest.mark.parametrize(("make", "name"), CASES.values(), ids=CASES)
def test_nothing_of_a_forgotten_document_is_found(make, name, anchor, tmp_path):  # noqa: F811
    model, runs = make(anchor, tmp_path)
    vectors = secret_vectors(model)
    assert [each for each in traces(vectors, model) if "the vector" in each]
    out = tmp_path / "less"
    forget(model, name, runs, out)
    assert traces(vectors, out, Path(f"{out}.run"), *tmp_path.glob("less.[0-9].run")) == []
    bank_tools(["verify", str(out)])
    assert list(load(out).stream(SECRET, max_tokens=1))  # it is sound
    strict_json(Path(f"{out}.run", "forgotten.json").read_bytes())  # NaN is no JSON


def test_a_bank_whose_run_is_not_given_is_named(anchor, tmp_path):  # noqa: F811
    model, runs = added(anchor, tmp_path)
    for run, bank in zip(runs, ("bank notes", "the model's own bank"), strict=True):
        refused(f"has taught {NAME}: {bank}", forget, model, NAME, [run], tmp_path / "less")
    assert not [*tmp_path.glob("less*")]


def test_a_stranger_can_check_it_and_finds_what_is_left(anchor, tmp_path, capsys):  # noqa: F811
    model, _ = own(anchor, tmp_path)
    out, text = tmp_path / "less", tmp_path / NAME
    forget(model, NAME, [], out)
    text.write_text(SECRET)
    capsys.readouterr()

    def checked() -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            forget_program([str(out), str(text), "--check"])
        return end.value.code, capsys.readouterr().out

    status, said = checked()
    assert status == 0
    assert re.search(r"nothing is found of 1 documents; \d+ clusters .* bit for bit", said)
    with Bank.open(out / "bank") as bank:  # one block is not what the documents there make
        manifest = bank.manifest
        other = mx.ones(bank.config.block_shape(1))
    (out / "bank").rename(tmp_path / "bank")
    rewrite_bank(
        out / "bank", manifest, lambda *key: other if key == (1, 0) else "keep", tmp_path / "bank"
    )
    (out / "README.md").write_text(f"It was: {SECRET}")
    shutil.copyfile(tmp_path / "bank" / "documents.jsonl", out / "bank" / "documents.jsonl")
    status, said = checked()
    assert status == 1
    assert f"README.md has its text: {NAME}" in said
    assert re.search(r"1 of \d+ clusters and blocks are not what the runs make", said)
    assert "nothing is found" not in said


def test_a_model_that_forgetting_made_finds_all_its_runs(tmp_path):
    """One that several runs have taught has several, the second of which nobody had named."""
    out = tmp_path / "out"
    for folder in targets_of(out, 3):
        folder.mkdir()
    assert runs_of(out) == list(targets_of(out, 3))
    assert runs_of(tmp_path / "none") == [tmp_path / "none.run"]

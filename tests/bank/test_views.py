"""Views of a memory: what one bars is never read, whatever is asked and whoever else asks."""

import json
import os
import re
from pathlib import Path

import mlx.core as mx
import pytest

from convert.quantize.command import main as quantize
from mlx_hmem.bank import Bank
from mlx_hmem.bank.documents import Document, write_documents
from mlx_hmem.bank.format import PAGE
from mlx_hmem.bank.views import read_views
from mlx_hmem.errors import UserError
from mlx_hmem.generation.batch import BatchModel, batch_generate
from mlx_hmem.generation.conversation import Conversation
from mlx_hmem.model.load import load
from mlx_hmem.model.model import MemoryModel
from tests.helpers.programs import refused

PROMPT = "The old lighthouse of the bay"


def write_views(folder: Path, **views) -> None:
    values = {"views": {name: {"blocked": barred} for name, barred in views.items()}}
    (folder / "bank" / "views.json").write_text(json.dumps(values))


class Reads:
    """What is asked of the disk while it watches: (file, first byte, end)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.reads: list[tuple[int, int, int]] = []
        self.hints: list[tuple[int, int, int]] = []
        preadv = os.preadv

        def read(file, buffers, offset, *flags):
            count = preadv(file, buffers, offset, *flags)
            self.reads.append((os.fstat(file).st_ino, offset, offset + count))
            return count

        def hint(file, offset, length):
            self.hints.append((os.fstat(file.fileno()).st_ino, offset, offset + length))

        monkeypatch.setattr(os, "preadv", read)
        monkeypatch.setattr("mlx_hmem.bank.read.blocks.advise", hint)

    @property
    def bytes(self) -> int:
        return sum(end - first for _, first, end in self.reads)

    def of(self, folder: Path, bank: Bank, path: tuple[int, ...]) -> list:
        """Reads of the block at the end of ``path``, or of any below it."""
        found = []
        first, last = path[-1], path[-1] + 1
        for number in range(len(path), bank.config.num_levels + 1):
            if number > len(path):
                first, last = (n * bank.config.branching[number - 1] for n in (first, last))
            level = next((each for each in bank.manifest.levels if each.level == number), None)
            for shard in () if level is None else level.shards:
                file = (folder / "bank" / shard.file).stat().st_ino
                start, end = (PAGE + (n - shard.first_cluster) * level.block_stride
                              for n in (first, last))  # fmt: skip
                found += [r for r in self.reads + self.hints
                          if r[0] == file and r[1] < end and r[2] > start]  # fmt: skip
        return found


@pytest.fixture
def paths(model: MemoryModel, texts: list[str]) -> dict[tuple[int, ...], str]:
    """A text for each path that one takes."""
    beginnings = [text[:120] for text in texts[:12]]
    return {model.retriever.route(text): text for text in beginnings}


@pytest.fixture
def guarded(broken: Path, paths) -> tuple[Path, tuple, tuple]:
    """A model whose view ``guest`` bars a subtree and, elsewhere, one leaf."""
    subtree = next(iter(paths))[:1]
    leaf = next(path for path in paths if path[:1] != subtree)
    write_views(broken, guest=[list(subtree), list(leaf)], all=[])
    return broken, subtree, leaf


def ask_everything(model: MemoryModel, path: tuple[int, ...], text: str) -> None:
    """All the ways to a block that the bank has."""
    bank = model.bank
    model.fetch(text)
    model.fetch(text, damaged="skip")
    list(model.stream_ids([1, 2, 3], model.fetch(text, wait=False), max_tokens=1))
    bank.fetch(path)
    model.bank.view([]).fetch(path)
    for key in enumerate(path, 1):
        if key[0] not in {level.level for level in bank.manifest.levels}:
            continue
        list(bank.read_ahead(key))
        if bank.bars(*key):
            for ask in (bank.blocks, lambda keys: bank.stored(*keys[0])):
                refused("this view may not fetch the block", ask, [key])
    talk = Conversation(model, max_tokens=2)
    list(talk.say(text))
    talk._prefetch.wait()
    batch_generate(model, [PROMPT], route_texts=[text], max_tokens=1)


def test_a_barred_block_is_never_read_whatever_is_asked(guarded, paths, monkeypatch):
    folder, subtree, leaf = guarded
    model = load(folder, view="guest", cache_bytes=0)
    reads, before = Reads(monkeypatch), model.bank.bytes_read
    for path, text in paths.items():
        ask_everything(model, path, text)
    assert reads.bytes == model.bank.bytes_read - before > 0
    assert reads.of(folder, model.bank, subtree) == reads.of(folder, model.bank, leaf) == []
    # The same questions without the view read both: the test can fail.
    everything = load(folder, view="all", cache_bytes=0)
    for path, text in paths.items():
        ask_everything(everything, path, text)
    assert reads.of(folder, model.bank, subtree)
    assert reads.of(folder, model.bank, leaf)


def test_a_barred_path_falls_back_to_the_deepest_level_that_is_allowed(guarded, paths):
    folder, subtree, leaf = guarded
    guest, everyone = load(folder, view="guest"), load(folder)
    for path, text in paths.items():
        found = guest.fetch(text)
        levels = [block["level"] for block in found.blocks]
        assert found.path == path
        assert levels == ([] if path[:1] == subtree else [1] if path == leaf else [1, 3])
        said = "".join(p.text for p in guest.stream(text, max_tokens=5))
        barred = [subtree, leaf]
        assert said == "".join(p.text for p in everyone.stream(text, max_tokens=5, blocked=barred))


def test_several_users_of_one_open_bank_are_served_at_once(guarded, paths, monkeypatch):
    folder, subtree, leaf = guarded
    model = load(folder, cache_bytes=0)
    barred = [p for p in paths if p[:1] == subtree or p == leaf]
    others = [p for p in paths if p not in barred]
    routes = [paths[p] for p in (barred + others)[:8]]
    # Whoever may read all asks for nothing that is barred for the guests beside them.
    asked = [("guest", text) for text in routes] + [(None, paths[path]) for path in others]
    views, texts = zip(*asked, strict=True)
    reads = Reads(monkeypatch)
    found = batch_generate(
        model, [PROMPT] * len(texts), route_texts=texts, views=views, max_tokens=6
    )
    assert reads.of(folder, model.bank, subtree) == reads.of(folder, model.bank, leaf) == []
    assert reads.bytes == model.bank.bytes_read > 0
    for (view, text), completion in zip(asked, found, strict=True):
        alone = model.under(view).stream(PROMPT, route_text=text, max_tokens=6)
        assert completion.text == "".join(piece.text for piece in alone)
    # Under all views at once, one who may read a block does not lend it to one who may not.
    path = barred[0]
    both = batch_generate(
        model, [PROMPT] * 2, route_texts=[paths[path]] * 2, views=["guest", None], max_tokens=6
    )
    assert both[0].text != both[1].text
    assert [c.path for c in both] == [path, path]
    assert both[0].text == next(c.text for (v, t), c in zip(asked, found, strict=True)
                                if v and t == paths[path])  # fmt: skip


def test_what_one_user_has_in_memory_another_does_not_get(guarded, paths):
    folder, subtree, _ = guarded
    path = next(path for path in paths if path[:1] == subtree)
    model = load(folder, resident_levels=(1, 3))
    model.bank.fetch(path)
    guest = model.under("guest")
    assert guest.bank.keeps((1, path[0]))
    assert guest.bank.fetch(path).rows is None
    refused("this view may not fetch", lambda: guest.bank.blocks([(1, path[0])]))
    # Not even by a row of a batch whose blocks another's bank has named.
    *states, row = BatchModel(model).make_cache(path)
    row.routes[0] = row.routes[0]._replace(banks=guest.banks)
    with pytest.raises(UserError, match="this view may not fetch"):
        BatchModel(model)(mx.array([[1, 2]]), [*states, row])


def test_the_view_default_holds_for_who_asks_for_none(broken, paths):
    path, text = next(iter(paths.items()))
    write_views(broken, default=[[path[0]]], staff=[])
    assert load(broken).fetch(text).blocks == []
    assert load(broken).under("staff").fetch(text).blocks != []
    assert load(broken, view="staff").under(None).fetch(text).blocks == []
    refused("no such view: boss; known: default, staff", load, broken, view="boss")


def test_a_view_is_not_left_from_inside(guarded, paths):
    """``guest.under(None)`` and ``guest.under("staff")`` gave back what guest may not fetch."""
    folder, subtree, _ = guarded
    text = next(text for path, text in paths.items() if path[:1] == subtree)
    guest = json.loads((folder / "bank" / "views.json").read_text())["views"]["guest"]["blocked"]
    write_views(folder, guest=guest, staff=[])
    assert load(folder).under("staff").fetch(text).blocks != []
    for inside in (load(folder, view="guest"), load(folder).under("guest")):
        for left in (inside.under(None), inside.under("staff"), inside.under("staff").under(None)):
            assert left.fetch(text).blocks == []


def test_views_that_cannot_be_read_open_nothing(broken):
    """A link that leads nowhere counted as a model without views: everything was allowed."""
    views = broken / "bank" / "views.json"
    views.unlink(missing_ok=True)
    views.symlink_to(broken / "gone.json")
    refused("a file is missing: .*views.json", load, broken)
    words = [str(broken), str(broken.parent / "copy"), "--bank-dtype", "float16"]
    refused("a file is missing: .*views.json", quantize, words)


def test_a_bank_can_be_opened_without_some_clusters(model_folder, model):
    path = (1, 2, 5)
    with Bank.open(model_folder / "bank").view([(1, 2)]) as bank:
        assert [key[0] for key in bank.keys_of(path, frozenset())] == [1]
        assert bank.view([(1,)]).keys_of(path, frozenset()) == []
        assert [key[0] for key in bank.view([(0,)]).keys_of(path, frozenset())] == [1]
    refused("no such cluster on level 1: 9", model.bank.view, [(9,)])


DAMAGED = {
    "no json": ("{", "is not valid JSON"),
    "no views": ("{}", "one key, views"),
    "a view that is a list": ('{"views": {"a": []}}', "one key, blocked"),
    "a view without a list": ('{"views": {"a": {"blocked": 3}}}', "not a list"),
    "an unknown key": ('{"views": {"a": {"blocked": [], "allowed": []}}}', "one key, blocked"),
    "no cluster": ('{"views": {"a": {"blocked": [[7]]}}}', "no such cluster on level 1: 7"),
    "no path": ('{"views": {"a": {"blocked": [[0, 5]]}}}', "not a cluster path"),
    "a number for a path": ('{"views": {"a": {"blocked": [0]}}}', "not the path of a cluster"),
    "a true cluster": ('{"views": {"a": {"blocked": [[true]]}}}', "not the path of a cluster"),
    "a bank that is not there": ('{"views": {"a": {"blocked": [["b", 1]]}}}', "no such bank: b"),
    "a name that is a number": ('{"views": {"3": {"blocked": []}}}', "wrong name of a view"),
    "a name twice": ('{"views": {"a": {"blocked": []}, "a": {"blocked": []}}}', "occurs twice"),
}


@pytest.mark.parametrize(("text", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_views_file_is_one_line_and_opens_nothing(
    text, words, model, model_folder, tmp_path
):
    (tmp_path / "views.json").write_text(text)
    line = refused(re.escape(words), read_views, tmp_path, {"": model.bank.config})
    assert "views.json" in line


def test_a_converted_copy_keeps_its_views_and_its_documents(broken, tmp_path, capsys):
    write_views(broken, default=[[0]])
    write_documents(broken / "bank", [Document("0" * 64, "a letter", 7, ((0, 0, 0),))])
    quantize([str(broken), str(tmp_path / "copy"), "--bank-dtype", "float16"])
    for name in ("views.json", "documents.jsonl"):
        copied, given = (folder / "bank" / name for folder in (tmp_path / "copy", broken))
        assert copied.read_bytes() == given.read_bytes()
    assert load(tmp_path / "copy").bank.barred == {(1, 0)}

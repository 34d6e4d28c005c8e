"""The shares of the routing table are those of routing each text by hand."""

import json

import numpy as np

from mlx_hmem.evaluate import recall
from mlx_hmem.evaluate.command import main
from mlx_hmem.evaluate.paper.fact_runs import FactRun
from mlx_hmem.evaluate.paper.fact_tables import atomic_numbers
from mlx_hmem.evaluate.paper.routing_quality import FIRST_WORDS, document_rows, fact_rows
from tests.helpers.programs import refused

FACTS = list(atomic_numbers().facts)[::6]


class Mirrored:
    """The encoder of a retriever with its dimensions turned round: other routes, same space."""

    name, fingerprint = "mirrored", "m"

    def __init__(self, encoder):
        self.encoder, self.dim = encoder, encoder.dim

    def encode(self, texts, progress=False):
        return np.ascontiguousarray(self.encoder.encode(texts)[:, ::-1])


def test_first_words_and_encoders_are_compared_text_by_text(model, texts):
    retriever, texts = model.retriever, [*texts[:40], "Three words only", "  "]
    rows = {(r.group, r.name): r.shares for r in
            document_rows(model, texts, Mirrored(retriever.encoder), progress=False)}  # fmt: skip
    long = {n: [t for t in texts if len(t.split()) > n] for n in FIRST_WORDS}
    names = [name for group, name in rows if group == "as the whole document"]
    assert names == [f"first {n} words" for n in FIRST_WORDS if long[n]]
    for n in (4, 8, 16):
        for level, share in enumerate(rows["as the whole document", f"first {n} words"]):
            same = [
                retriever.route(t)[level] == retriever.route(" ".join(t.split()[:n]))[level]
                for t in long[n]
            ]
            assert (share.right, share.total) == (sum(same), len(same))
    group = f"{retriever.encoder.name} as mirrored"
    turned = [v[::-1] for v in retriever.vectors(texts[:-1])]
    for level, share in enumerate(rows[group, "documents"]):
        same = [
            retriever.route(t)[level] == retriever.tree.route(v)[level]
            for t, v in zip(texts, turned, strict=False)
        ]
        assert (share.right, share.total) == (sum(same), 41)
    own = document_rows(model, texts, retriever.encoder, progress=False)
    assert all(share.accuracy == 1 for row in own[:2] for share in row.shares)
    refused("no text to route", document_rows, model, [" "], progress=False)
    other = Mirrored(retriever.encoder)
    other.dim = 3
    refused("another space", document_rows, model, texts, other, progress=False)


def test_answers_are_told_apart_by_whether_the_prompt_reached_its_statement(model, tmp_path):
    reached, where, elsewhere = fact_rows(FactRun(model, tmp_path, "m", progress=False), FACTS)
    right = recall(model, FACTS, progress=False).right
    for level in range(3):
        same = [
            model.retriever.route(f.prompt)[level] == model.retriever.route(f.statement)[level]
            for f in FACTS
        ]
        assert (reached.shares[level].right, reached.shares[level].total) == (sum(same), len(same))
        assert where.shares[level].total == sum(same)
        assert elsewhere.shares[level].total == len(same) - sum(same)
        assert where.shares[level].right == sum(r and s for r, s in zip(right, same, strict=True))
        assert where.shares[level].right + elsewhere.shares[level].right == sum(right)


def test_the_command_prints_routing_in_place_of_scores(model_folder, texts, tmp_path, capsys):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:9]))
    command = [str(model_folder), "--routing", "--out", str(tmp_path / "out")]
    command += ["--text", str(path), "--atomic-numbers", "--limit", "5", "--encoder", "static"]
    main([*command, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["routing"]
    groups = list(dict.fromkeys(row["group"] for row in found["routing"]))
    assert len(groups) == 3
    assert {len(row["levels"]) for row in found["routing"]} == {3}
    main(command)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["routing,", "%", "level", "1", "level", "2", "level", "3"]
    for wrong in (["--route", "random"], ["--encoder", "nothing"]):
        refused("", main, [*command, *wrong])

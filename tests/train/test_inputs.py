"""A run goes on only with what it was begun with: recipe, corpus, and the files of its stages."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_hmem.errors import UserError
from tests.helpers import loop_runs as runs
from tests.helpers.programs import refused
from tests.helpers.recipes import write_recipe
from train import stages
from train.command import main
from train.corpus.readers import corpus_files
from train.corpus.sample import read_shards
from train.loop.loop import train
from train.ranks import ALONE
from train.recipe.recipe import CorpusSection, CotrainSection, Recipe, load_recipe
from train.stages import STAGES, check_files, is_done, run_stages
from train.step.anchor import AnchorTrainee
from train.step.memories import MemoryTrainee
from train.store.checkpoint import check_identity

BEFORE = ["corpus", "tokenizer", "windows", "anchor-sequences", "anchor", "tree", "sequences"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A run up to the stage ``memories``."""
    folder = tmp_path_factory.mktemp("prepared")
    recipe = load_recipe(write_recipe(folder / "tiny.yaml", "anchor.training.epochs=0.1"))
    run_stages(recipe, folder / "run", BEFORE)
    return recipe, folder / "run"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, os.unlink])
@pytest.mark.parametrize(
    "name",
    ["corpus/held_out.jsonl", "tokenizer/tokenizer.json", "windows/tokens.npy", "tree/paths.npy",
     "tree/tree.safetensors", "anchor/model.safetensors", "anchor/config.json",
     "sequences/tokens.npy", "sequences/paths.npy"],
)  # fmt: skip
def test_a_stage_reads_only_what_the_stages_before_have_left(name, damage, prepared, tmp_path):
    """Edited or damaged sequences trained something else in silence, or ended in SIGSEGV."""
    recipe, run = prepared[0], Path(shutil.copytree(prepared[1], tmp_path / "run"))
    damage(run / name)
    what = rf"a (file of the )?finished stage .*{re.escape(str(run / name))}.*; restore it"
    with pytest.raises(UserError, match=what):
        run_stages(recipe, run, ["memories"])
    assert not (run / "memories").exists()


def test_a_bit_that_flips_in_what_says_that_a_stage_is_done_is_found(prepared, tmp_path):
    """In the name of its list of files, and none of them was looked at any more."""
    recipe, run = prepared[0], Path(shutil.copytree(prepared[1], tmp_path / "run"))
    done = run / "tokenizer" / "done.json"
    data, refusals = done.read_bytes(), 0
    for place in range(0, len(data), 7):
        done.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            assert is_done(STAGES["tokenizer"], recipe, run)
        except UserError:
            refusals += 1
        else:  # a space, or the name of the checksum
            assert set(json.loads(done.read_bytes())) >= {"stage", "version", "recipe", "files"}
    assert refusals > 0.6 * len(range(0, len(data), 7))
    done.write_bytes(data.replace(b'"files"', b'"filet"'))
    refused(
        f"{done} is damaged: checksum .*; restore it", is_done, STAGES["tokenizer"], recipe, run
    )


def test_a_finished_stage_is_read_whole_once_and_again_when_it_is_touched(
    prepared, tmp_path, monkeypatch
):
    """It was hashed whole at each start; size and time alone would let an edit of as many bytes
    pass that puts the time back."""
    run = Path(shutil.copytree(prepared[1], tmp_path / "run"))
    read, real = [], stages.fingerprint
    monkeypatch.setattr(stages, "fingerprint", lambda f, **o: read.append(f.name) or real(f, **o))
    check_files(STAGES["sequences"], run)
    assert sorted(read) == ["paths.npy", "tokens.npy"]
    check_files(STAGES["sequences"], run)
    assert len(read) == 2
    file, other = run / "sequences" / "tokens.npy", tmp_path / "other.npy"
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused(f"was changed or is damaged: {file}", check_files, STAGES["sequences"], run)
    flip(file)
    shutil.copyfile(file, other)
    flip(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    check_files(STAGES["sequences"], run)
    os.replace(other, file)
    refused(f"was changed or is damaged: {file}", check_files, STAGES["sequences"], run)


def test_another_corpus_is_refused_once_one_is_read(tmp_path):
    """It was ignored: the run went on with the text of the first."""
    recipe = write_recipe(tmp_path / "tiny.yaml", "corpus.facts=[]", "corpus.documents=null")
    for name in ("alfred", "bertha"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(f'{{"id": "{i}", "text": "{name} number {i} goes."}}\n' for i in range(9))
        )
    words = [str(recipe), "--out", str(tmp_path / "run"), "--until", "corpus"]
    main([*words, "--corpus", str(tmp_path / "alfred.jsonl")])
    main([*words, "--corpus", str(tmp_path / "alfred.jsonl")])
    main(words)
    for other in ("bertha.jsonl", "nowhere"):
        remedy = "made of other files: --corpus names others; leave --corpus out"
        refused(remedy, main, [*words, "--corpus", str(tmp_path / other)])


def test_a_corpus_that_is_edited_in_its_length_is_read_again(tmp_path):
    file, section = tmp_path / "a.jsonl", CorpusSection()
    for name in ("Alfred", "Bertha"):
        file.write_text(f'{{"id": "1", "text": "{name} goes to the market."}}\n')
        shards = read_shards(corpus_files(tmp_path), section, tmp_path / "shards", ALONE)
        assert name in shards[0].read_text()


def test_a_run_that_is_killed_goes_on_only_with_or_without_cotraining(tmp_path):
    """Added, it was a KeyError; taken away, the anchor stayed as it began."""
    tokens, paths = runs.sequences()
    for begun, then in ((None, CotrainSection()), (CotrainSection(), None)):
        folder = tmp_path / str(begun is None)

        def go(cotrain: CotrainSection | None, folder: Path = folder) -> None:
            with runs.BlockStore(folder / "store", runs.MEMORY, runs.SEED) as store:
                trainee = MemoryTrainee(
                    runs.make_model(), store, tokens, paths, runs.EOT, runs.CONFIG, cotrain
                )
                train(trainee, runs.order(), runs.CONFIG, folder, "memory")

        go(begun)
        refused("belongs to another run: cotrain", go, then)


def test_an_older_runs_identity_is_compared_by_what_it_says(tmp_path):
    old = {"seed": 1, "files": {"tree": "a"}}
    new = {**old, "version": 2, "cotrain": None, "files": {"tree": "a", "sequences": "b"}}
    check_identity(old, new, tmp_path)
    refused("seed was 1, is 2", check_identity, old, new | {"seed": 2}, tmp_path)
    refused("sequences was c", check_identity, new | {"files": {"sequences": "c"}}, new, tmp_path)


def test_a_token_or_a_path_beyond_the_model_is_one_line(tmp_path):
    """MLX read beyond its embeddings; a path made a block that no bank has."""
    tokens, paths = runs.sequences()
    tokens, paths = tokens.astype(np.int32), paths.copy()
    for wrong in (runs.VOCABULARY, -1):
        tokens[1, 2] = wrong
        trainee = AnchorTrainee(runs.make_model(), tokens, runs.EOT, runs.CONFIG)
        refused(f"beyond the anchor's {runs.VOCABULARY}: {wrong}", trainee.step, np.arange(3), 0.1)
    paths[0, -1] = runs.MEMORY.num_clusters[-1]
    with runs.BlockStore(tmp_path, runs.MEMORY, runs.SEED) as store:
        arguments = (runs.make_model(), store, tokens, paths, runs.EOT, runs.CONFIG)
        refused("a path beyond the tree", MemoryTrainee, *arguments)

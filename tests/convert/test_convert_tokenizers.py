"""A tokenizer that does not fit its anchor is refused before anything is written."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from convert.command import main
from convert.gguf.header import read_gguf
from mlx_hmem import load
from tests.conftest import edit_json
from tests.helpers import anchor_checkpoints as checkpoints
from tests.helpers.gguf_models import write_gguf
from tests.helpers.programs import assert_refused, run
from tests.helpers.tiny_tokenizers import save_byte_level


def source(tmp_path: Path, kind: str) -> Path:
    """A model of 64 tokens (OpenLM's has 101)."""
    if kind == "openlm":
        weights = checkpoints.random_openlm()
        return checkpoints.save_openlm(tmp_path / "model", weights, checkpoints.CONFIG)
    model = checkpoints.save_hugging_face(tmp_path / "model", "llama", mx.float32)
    return write_gguf(tmp_path / "m.gguf", model, "llama") if kind == "gguf" else model


def tokenizer(folder: Path, size: int) -> Path:
    folder.mkdir(exist_ok=True)
    return save_byte_level(folder, size=size, whole=size > 256)


@pytest.mark.parametrize("kind", ["openlm", "gguf", "huggingface"])
def test_a_vocabulary_larger_than_the_embedding(tmp_path, kind):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    model, out = source(tmp_path, kind), tmp_path / "out"
    words = [main, model, out]
    if kind == "huggingface":  # it has its own beside it
        tokenizer(model, 300)
    else:
        words += ["--tokenizer", tokenizer(tmp_path / "own", 300)]
    said = run(*words)
    assert_refused(said, "tokens that the anchor does not know", "300 tokens", "trained with")
    assert not list(tmp_path.glob("out*"))
    tokenizer(model if kind == "huggingface" else tmp_path / "own", 60)
    assert run(*words).status == 0


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_of_text_that_is_no_token(tmp_path, file):
    model = tokenizer(source(tmp_path, "huggingface"), 60)
    (model / "generation_config.json").write_text("{}")
    for wrong in (64, -1, [2, 64], "2"):
        edit_json(model / file, lambda values, wrong=wrong: values.update(eos_token_id=wrong))
        said = run(main, model, tmp_path / "out")
        assert_refused(said, "eos_token_id is none of the anchor's 64 tokens", "correct it in")
        assert not list(tmp_path.glob("out*"))
    edit_json(model / file, lambda values: values.update(eos_token_id=[2, 63]))
    assert run(main, model, tmp_path / "out").status == 0


def test_a_token_that_was_added_for_pictures_is_named_and_goes_into_no_gguf(tmp_path):
    """Gemma 3's tokenizer has one beyond the embeddings of the models that see none."""
    model = tokenizer(source(tmp_path, "huggingface"), 60)
    picture = {"id": 64, "content": "<picture>", "special": True, "single_word": False,
               "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip
    filled = [picture | {"id": i, "content": f"<unused{i}>"} for i in (61, 62, 63)]
    edit_json(
        model / "tokenizer.json",
        lambda values: values.update(added_tokens=[*values["added_tokens"], *filled, picture]),
    )
    said = run(main, model, tmp_path / "out")
    assert said.status == 0
    assert "tokens without an embedding, which no text may have: <picture>" in said.err
    assert load(tmp_path / "out").tokenizer.encode("iron")
    assert run(main, model, tmp_path / "m.gguf", "--to", "gguf").status == 0
    assert len(read_gguf(tmp_path / "m.gguf").values["tokenizer.ggml.tokens"]) == 64
    edit_json(model / "tokenizer_config.json", lambda values: values.update(eos_token="<picture>"))
    said = run(main, model, tmp_path / "again")
    assert_refused(said, "a token that begins or ends a text has no embedding", "'<picture>'")


@pytest.mark.parametrize("text", ["[]", '{"model":[]}', '{"model":{"vocab":{"a":"b"}}}',
                                  '{"added_tokens":[{"id":0}]}', '{"added_tokens":7}'])  # fmt: skip
def test_what_is_no_tokenizer_is_one_line(tmp_path, text):
    model = source(tmp_path, "huggingface")
    (model / "tokenizer.json").write_text(text)
    assert_refused(run(main, model, tmp_path / "out"), "is no tokenizer", "trained with")


def test_a_gemma_whose_layers_all_slide_is_refused_as_mlx_lm_cannot_run_it(tmp_path):
    model = checkpoints.save_hugging_face(tmp_path / "model", "gemma3_text", mx.float32)
    layers = {"sliding_window_pattern": 4, "layer_types": ["sliding_attention"] * 3}
    for key, value in layers.items():
        values = json.loads((model / "config.json").read_text())
        values.pop("sliding_window_pattern", None)
        (model / "config.json").write_text(json.dumps(values | {key: value}))
        said = run(main, model, tmp_path / "out")
        assert_refused(said, "without a layer that sees all", "3 layers, a pattern of 4")
        assert not list(tmp_path.glob("out*"))

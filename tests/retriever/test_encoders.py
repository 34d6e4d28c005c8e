"""The encoders: MiniLM against sentence-transformers, the static one against MiniLM."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_hmem.retriever import encoder as encoders
from mlx_hmem.retriever.encoder import OFFLINE_PACKAGE, STATIC_FOLDER, load_encoder
from mlx_hmem.retriever.minilm import MiniLMEncoder, _batches, gelu, rounds_products
from mlx_hmem.retriever.static import StaticEncoder, WordPieces, pool, save_static
from tests.helpers.places import shared
from tests.helpers.programs import refused
from tests.helpers.references import minilm_differences
from train.tree import static_encoder as distillation


@pytest.fixture(scope="module")
def minilm() -> MiniLMEncoder:
    pytest.importorskip(OFFLINE_PACKAGE, reason="MiniLM's files are not installed")
    return load_encoder("minilm")


@pytest.fixture(scope="module")
def static() -> StaticEncoder:
    return load_encoder("static")


def test_minilm_gives_sentence_transformers_ids_and_vectors(minilm):
    vectors, found = minilm_differences(minilm, shared("fixtures", "minilm_golden.npz"))
    assert vectors.shape == (30, 384)
    assert vectors.dtype == np.float32
    assert found["texts_whose_ids_differ"] == 0
    assert found["vectors"] < 1e-5


def test_minilm_gives_a_text_alone_the_vector_it_has_in_a_batch(minilm):
    texts = ["iron", "The atomic number of iron is", "word " * 300, "", "A lighthouse."]
    together = minilm.encode(texts)
    for text, vector in zip(texts, together, strict=True):
        assert np.abs(minilm.encode([text])[0] - vector).max() < 1e-5


def test_batches_cover_each_row_once_and_gelu_is_the_exact_one():
    lengths = [int(n) for n in np.random.default_rng(0).integers(2, 257, 300)]
    batches = list(_batches(lengths))
    assert sorted(row for rows in batches for row in rows) == list(range(300))
    assert all(len(rows) * max(lengths[row] for row in rows) <= 2048 for rows in batches)
    x = mx.linspace(-12, 12, 20001)
    z = np.array(x, np.float64) / 2**0.5
    exact = np.array(x) * 0.5 * (1 + np.array(mx.erf(mx.array(z.astype(np.float32)))))
    assert np.abs(np.array(gelu(x)) - exact).max() < 3e-6


def test_no_device_that_rounds_the_factors_of_products_makes_vectors(monkeypatch):
    """On M5 a text near a border had another route than on M4."""
    gpu, cpu = mx.Device(mx.gpu, 0), mx.Device(mx.cpu, 0)
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    exact = {
        a for a in ("g13s", "g16d", "g17s", "g18p") if not rounds_products(gpu, f"applegpu_{a}")
    }
    assert exact == {"g13s", "g16d"}
    assert rounds_products(gpu, "sm_90")  # CUDA
    assert not rounds_products(cpu, "x86_64")
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    assert not rounds_products(gpu, "applegpu_g17s")


@pytest.mark.parametrize("name", ["minilm", "static"])
def test_an_encoder_keeps_the_protocol(name, request):
    encoder = request.getfixturevalue(name)
    assert encoder.name == name
    assert encoder.fingerprint.startswith("xxh3:")
    assert encoder.encode([]).shape == (0, encoder.dim)
    vectors = encoder.encode(["a", "", "The sea.", "\ud800 broken", "東京", "\n"])
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    refused("text 1 is not a string", encoder.encode, ["a", 3])
    refused("one string", encoder.encode, "a")


@pytest.fixture(scope="module")
def fresh_pieces(static) -> WordPieces:
    return WordPieces(static.pieces.tokenizer, 10**6)


UNKNOWN = 100  # BERT's [UNK]
TEXT = st.text(
    st.one_of(
        st.sampled_from(
            " .,'-\t\n\r\x0b\x1c\x00\x7f\u00a0\u200b\u0301\u2014éÉßİſKΣς京한กท่าขฃ🎉/@_`~"
        ),
        st.characters(codec="utf-8"),
        st.sampled_from("abcdeXYZ019"),
    ),
    max_size=80,
)


@settings(max_examples=500, deadline=None)
@given(TEXT)
def test_cached_words_give_the_tokenizers_own_pieces(fresh_pieces, text):
    """And of a word that it does not know the letters that it knows."""
    tokenizer, expected = fresh_pieces.tokenizer, list[int]()
    found = tokenizer.encode(text, add_special_tokens=False)
    for piece, (start, end) in zip(found.ids, found.offsets, strict=True):
        word = tokenizer.normalizer.normalize_str(text[start:end]) if piece == UNKNOWN else ""
        letters = [] if word.isascii() else map(tokenizer.token_to_id, word)
        expected += [letter for letter in letters if letter is not None] or [piece]
    assert fresh_pieces([text]) == [expected]
    assert fresh_pieces([text]) == [expected]  # now from the cache


def test_text_of_words_that_it_does_not_know_is_told_apart(static):
    """All Thai was one piece, and so one point: a folder of it lay in one leaf."""
    harbour, kitchen = ("ท่าเรือเรือประมงนกนางนวลประภาคาร", "ขนมปังแป้งยีสต์เตาอบเนยน้ำตาลครัว")
    one, other, again = static.encode([harbour, kitchen, f"{harbour}กระแสน้ำ"])
    assert one @ other < one @ again < 1 - 1e-4
    # What has no letters that are known, and what is no word but a key, is as it was.
    assert static.pieces(["🎉 𝔘 ☎", "a" * 150]) == [[UNKNOWN] * 3, [UNKNOWN]]


def test_static_is_the_mean_of_its_pieces_vectors(static):
    text = "The lighthouse of Café Straße, built 1864."
    ids = static.pieces.tokenizer.encode(text, add_special_tokens=False).ids
    mean = static.vectors[ids].astype(np.float64).mean(axis=0)
    expected = mean @ static.projection + static.bias
    expected /= np.linalg.norm(expected)
    others = ["", "x", "word " * 900, "the " * 3]
    assert np.abs(static.encode([*others, text])[-1] - expected).max() < 1e-5


def test_pool_gives_zeros_for_a_text_without_pieces():
    vectors = np.arange(8, dtype=np.float32).reshape(4, 2)
    pooled = pool(vectors, [[], [1, 3], [], [2], []])
    assert pooled.tolist() == [[0, 0], [4, 5], [0, 0], [4, 5], [0, 0]]
    assert pool(vectors, [[]]).tolist() == [[0, 0]]


def test_static_points_where_minilm_points(minilm, static):
    # Written for this test, so the distillation has not seen them.
    texts = [
        "A tortoise hid beneath the garden shed until the frost had gone.",
        "The parliament voted to raise the tax on imported steel.",
        "She scored two goals in the last ten minutes of the cup final.",
        "Nitrogen and hydrogen are combined over an iron catalyst to make ammonia.",
        "The cathedral's organ was rebuilt after the fire.",
        "The destroyer was launched in Glasgow and sunk in the North Sea.",
    ]
    slow, fast = minilm.encode(texts), static.encode(texts)
    similarity = fast @ slow.T
    assert (similarity.argmax(axis=1) == np.arange(len(texts))).all()
    assert np.diag(similarity).mean() > 0.5


def test_static_was_distilled_from_this_minilm_and_is_small(minilm, static):
    assert static.teacher == minilm.fingerprint
    assert sum(file.stat().st_size for file in STATIC_FOLDER.iterdir()) <= 6_000_000


def test_a_saved_static_encoder_comes_back_within_rounding(static, tmp_path):
    tokenizer = (STATIC_FOLDER / "tokenizer.json").read_bytes()
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((30522, 4)).astype(np.float32)
    projection = rng.standard_normal((4, 6)).astype(np.float32)
    bias = rng.standard_normal(6).astype(np.float32)
    save_static(tmp_path, vectors, projection, bias, tokenizer, teacher="xxh3:0", max_length=254)
    loaded = load_encoder(tmp_path)
    assert (loaded.name, loaded.dim, loaded.teacher) == ("static", 6, "xxh3:0")
    step = np.abs(vectors).max(axis=1, keepdims=True) / 127
    assert (np.abs(loaded.vectors - vectors) <= 0.51 * step + 1e-3 * np.abs(vectors)).all()
    assert loaded.fingerprint != static.fingerprint


def copy_static(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STATIC_FOLDER, tmp_path / "encoder"))


def test_a_folder_is_loaded_by_what_it_holds(static, tmp_path):
    again = load_encoder(copy_static(tmp_path))
    assert again.fingerprint == static.fingerprint
    assert (again.encode(["iron"]) == static.encode(["iron"])).all()


def test_broken_static_folders_are_refused(tmp_path):
    folder = copy_static(tmp_path)
    good = (folder / "config.json").read_text()
    for key, value in (("rank", 7), ("dim", -1), ("max_length", "x"), ("teacher", None)):
        (folder / "config.json").write_text(json.dumps(json.loads(good) | {key: value}))
        refused("", load_encoder, folder)
    (folder / "config.json").write_text(good)
    weights = (folder / "encoder.safetensors").read_bytes()
    (folder / "encoder.safetensors").write_bytes(weights[:1000])
    refused("", load_encoder, folder)
    (folder / "encoder.safetensors").unlink()
    refused("missing", load_encoder, folder)
    (folder / "encoder.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_text("{}")
    refused("tokenizer", load_encoder, folder)


def test_unknown_encoders_are_refused(tmp_path):
    refused("no such encoder", load_encoder, "minilm-l12")
    refused("without an encoder", load_encoder, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    refused("unknown encoder", load_encoder, tmp_path)


def test_broken_minilm_folders_are_refused(minilm, tmp_path):
    source = encoders.find_minilm()
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(r"missing.*model\.safetensors", load_encoder, tmp_path)
    (tmp_path / "tokenizer.json").symlink_to(source / "tokenizer.json")
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 768}))
    refused("hidden_size: 768", load_encoder, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    weights = {"embeddings.LayerNorm.bias": mx.zeros(383)}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    refused("wrong shape", load_encoder, tmp_path)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"what": mx.zeros(1)})
    refused("unknown tensor", load_encoder, tmp_path)
    weights = {"embeddings.LayerNorm.bias": mx.zeros(384)}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    refused("lacks a tensor", load_encoder, tmp_path)


def write_corpus(path: Path, count: int = 200) -> None:
    records = (
        {
            "id": i,
            "title": f"Title{i}",
            "text": f"Lighthouse number {i} stands on a cliff. Keeper {i} lit the lamp at night.",
        }
        for i in range(count)
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_distillation_never_sees_a_held_out_document(tmp_path):
    write_corpus(tmp_path / "a.jsonl")
    texts = distillation.teaching_texts([tmp_path], 200, seed=0)
    assert texts == distillation.teaching_texts([tmp_path / "a.jsonl"], 200, seed=0)
    assert texts != distillation.teaching_texts([tmp_path], 200, seed=1)
    seen = {int(n) for text in texts for n in re.findall(r"(?:Title|number |Keeper )(\d+)", text)}
    held_out = {i for i in range(200) if distillation.is_held_out(str(i), distillation.HELD_OUT)}
    assert held_out
    assert seen == set(range(200)) - held_out


def test_teaching_goes_on_where_it_stopped(minilm, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", 4)
    texts = [f"text number {i}" for i in range(10)]
    whole = distillation.teach(texts, minilm, tmp_path)
    assert np.abs(whole - minilm.encode(texts)).max() < 1e-3  # kept in float16
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    times = {file: file.stat().st_mtime_ns for file in files}
    files[1].unlink()
    assert (distillation.teach(texts, minilm, tmp_path) == whole).all()
    assert sorted(tmp_path.iterdir()) == files
    assert all(files[i].stat().st_mtime_ns == times[files[i]] for i in (0, 2))


def test_training_finds_vectors_that_it_does_not_start_with():
    rng = np.random.default_rng(0)
    alone = rng.standard_normal((30522, 384)).astype(np.float32)
    # 900 pieces are in use, more than one map of 384 dimensions can place.
    wanted = rng.standard_normal((900, 16)) @ rng.standard_normal((16, 384))
    wanted = wanted.astype(np.float32)
    ids = [list(rng.integers(0, 900, rng.integers(1, 12))) for _ in range(2048)]
    targets = pool(wanted, ids)
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)

    def cosine(params: dict) -> float:
        found = pool(np.array(params["vectors"]), ids) @ np.array(params["projection"])
        found += np.array(params["bias"])
        return float(((found * targets).sum(axis=1) / np.linalg.norm(found, axis=1)).mean())

    start = distillation.starting_values(alone, ids, targets, rank=32)
    trained = distillation.train_vectors(dict(start), ids, targets, epochs=15, seed=0)
    assert cosine(start) > 0.5
    assert cosine(trained) > cosine(start) + 0.05
    unused = np.array(trained["vectors"])[900:]
    assert (unused == np.array(start["vectors"])[900:]).all()

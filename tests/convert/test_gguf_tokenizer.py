"""The tokenizer of a GGUF file: the ids of SentencePiece, and of the tokenizer it was made from."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from convert.gguf.header import read_gguf
from convert.gguf.pre_tokenizers import PRE_TOKENIZERS
from convert.gguf.tokenizer import tokenizer_files
from mlx_hmem.model.tokenizer import read_tokenizer
from tests.helpers.gguf_files import save
from tests.helpers.programs import refused

TEXTS = [
    "The lighthouse of Carter was built in 1874, and it's 91 metres high.",
    "  two spaces before,   three within, and one behind ",
    "naïve café, Straße, İstanbul; é is not é",
    "我想在苹果工作1314151天～", "مرحبا بالعالم", "🙂🚀 👨‍👩‍👧‍👦", "a\n\n\nb\t\tc\r\nd",
    "I'VE we'Ll THEY'D don't",
    "x=3333333.14; if (a<b) { return --i; }", "", " ", "<s>not a token</s>", "\u2581",
]  # fmt: skip
CORPUS = [text for text in TEXTS if text.strip()] * 3 + ["the cat sat on the mat"] * 5


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    """A BPE vocabulary of SentencePiece's, with bytes for what it has no piece for, as Llama's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=600,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=0.98, minloglevel=2, user_defined_symbols=["<tool>"],
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def values_of(pieces: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes of a SentencePiece model."""
    ids = range(pieces.get_piece_size())
    types = [
        2 if pieces.is_unknown(i)
        else 3 if pieces.is_control(i)
        else 6 if pieces.is_byte(i)
        else 4 if pieces.id_to_piece(i) == "<tool>"
        else 1
        for i in ids
    ]  # fmt: skip
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [float(pieces.get_score(i)) for i in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def made(folder: Path, values: dict[str, Any]) -> dict[str, str]:
    count = len(values["tokenizer.ggml.tokens"])
    found = tokenizer_files(read_gguf(save(folder / "m.gguf", values)), count)
    for name, text in found.files.items():
        (folder / name).write_text(text)
    (folder / "config.json").write_text(json.dumps(found.ids))
    return found.files


def test_pieces_are_sentencepieces_own(tmp_path, pieces):
    tokenizer = Tokenizer.from_str(made(tmp_path, values_of(pieces))["tokenizer.json"])
    for text in TEXTS:
        if text.startswith("<s>"):  # SentencePiece takes it for text, transformers for tokens
            continue
        assert tokenizer.encode(text).ids == [1, *pieces.encode(text)] or not text, text
        assert tokenizer.decode(tokenizer.encode(text).ids).lstrip(" ") == text.lstrip(" \u2581")
    assert tokenizer.encode("").ids == [1]
    assert 3 in tokenizer.encode("a<tool>b").ids
    assert pieces.id_to_piece(3) == "<tool>"


def test_without_a_prefix_and_with_runs_of_spaces(tmp_path, pieces):
    """Gemma's vocabulary: no space before a text, and runs of spaces that are written as such."""
    values = values_of(pieces)
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    values["tokenizer.ggml.tokens"] = [*tokens, "  ", "   "]
    values["tokenizer.ggml.token_type"] = [*types, 4, 4]
    values["tokenizer.ggml.scores"] = [*values["tokenizer.ggml.scores"], -1000.0, -1000.0]
    values["tokenizer.ggml.add_space_prefix"] = False
    values["tokenizer.ggml.add_eos_token"] = True
    tokenizer = Tokenizer.from_str(made(tmp_path, values)["tokenizer.json"])
    space, count = tokens.index("\u2581"), len(tokens)
    assert tokenizer.encode("   ").ids == [1, count + 1, 2]
    assert tokenizer.encode("  ").ids == [1, count, 2]
    assert tokenizer.encode(" ").ids == [1, space, 2]
    assert tokenizer.decode(tokenizer.encode("the cat").ids) == "the cat"


def byte_level(pre: str) -> Tokenizer:
    """A tokenizer as the models of this cut have it."""
    tokenizer, cut = Tokenizer(models.BPE()), PRE_TOKENIZERS[pre]
    if pre in ("gpt-2", "smollm"):
        steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if pre == "smollm":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    else:
        regex = THEIRS[pre]
        steps = [pre_tokenizers.Split(Regex(regex), "isolated"),
                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    saved = json.loads(tokenizer.to_str())
    saved["model"]["ignore_merges"] = cut.ignore_merges
    return Tokenizer.from_str(json.dumps(saved))


# As in the tokenizer.json of Llama 3, Qwen 2, Mistral Nemo and GPT-4o's vocabulary.
THEIRS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "stablelm2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def bpe_values(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokens) - 2)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", *THEIRS])
def test_bytes_are_merged_as_by_the_tokenizer_it_was_made_from(tmp_path, pre):
    theirs = byte_level(pre)
    ours = Tokenizer.from_str(made(tmp_path, bpe_values(theirs, pre))["tokenizer.json"])
    start = [0] if PRE_TOKENIZERS[pre].add_bos else []
    for text in TEXTS:
        assert ours.encode(text).ids == start + theirs.encode(text).ids, text
        assert ours.decode(theirs.encode(text).ids) == text
    assert ours.encode("a<|im_end|>").ids[-1] == 1


def test_qwens_text_is_composed_first(tmp_path):
    ours = Tokenizer.from_str(
        made(tmp_path, bpe_values(byte_level("stablelm2"), "qwen2"))["tokenizer.json"]
    )
    assert ours.encode("e\u0301").ids == ours.encode("\u00e9").ids


def test_the_folder_is_read_with_template_and_all_ends(tmp_path):
    values = bpe_values(byte_level("gpt-2"), "gpt-2") | {
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        "tokenizer.chat_template.tool_use": "…",
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.padding_token_id": 1,
        "general.sampling.temp": 0.7,
    }
    made(tmp_path, values)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"bos_token_id": 0, "eos_token_id": [0, 1], "pad_token_id": 1}
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == config | {"do_sample": True, "temperature": 0.7}
    tokenizer = read_tokenizer(tmp_path, config | {"model_type": "llama", "vocab_size": 500})
    assert tokenizer.eos_token_ids == {0, 1}
    assert tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.encode("the cat")[0] == 0
    chat = [{"role": "user", "content": "the cat"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "the cat<|im_end|>"


def test_one_end_needs_no_file_of_its_own(tmp_path, pieces):
    assert set(made(tmp_path, values_of(pieces))) == {"tokenizer.json", "tokenizer_config.json"}
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 2


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"tokenizer.ggml.model": "t5"}, "no such tokenizer is converted: 't5'; known"),
    "a cut that is not known": (
        {"tokenizer.ggml.pre": "klingon"}, r"pre-tokenizer that is known .*: 'klingon'; add --tok"
    ),
    "no cut": ({"tokenizer.ggml.pre": None}, "pre-tokenizer that is known"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "no vocabulary"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "a token occurs twice: 'a'"),
    "types for some": ({"tokenizer.ggml.token_type": [1, 1]}, "one number for each token"),
    "no merges": ({"tokenizer.ggml.merges": None}, "no merges"),
    "half a merge": ({"tokenizer.ggml.merges": ["a b", "ab"]}, "a merge is no pair: 'ab'"),
    "a merge of nothing": ({"tokenizer.ggml.merges": ["\u0416 \u0416"]}, "cannot be built: "),
    "an end beyond": ({"tokenizer.ggml.eos_token_id": 10**6}, "the eos token is none of"),
    "a beginning that is none": (
        {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
        "tokenizer.ggml.bos_token_id is missing",
    ),
    "a token without end": ({"tokenizer.ggml.tokens": ["a" * 2000]}, "too long: 2000 characters"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound() -> dict[str, Any]:
    return bpe_values(byte_level("gpt-2"), "gpt-2")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_vocabulary_is_one_line_that_offers_another(tmp_path, sound, fault):
    change, words = FAULTS[fault]
    values = {key: each for key, each in (sound | change).items() if each is not None}
    header = read_gguf(save(tmp_path / "m.gguf", values))
    assert "--tokenizer FOLDER" in refused(words, tokenizer_files, header, 10**6)


def test_more_tokens_than_embeddings_are_refused(tmp_path, sound):
    header = read_gguf(save(tmp_path / "m.gguf", sound))
    refused(r"tokens that the model does not know: \d+ tokens, 400", tokenizer_files, header, 400)


def test_scores_are_numbers(tmp_path, pieces):
    values = values_of(pieces)
    values["tokenizer.ggml.scores"][5] = float(np.nan)
    header = read_gguf(save(tmp_path / "m.gguf", values))
    refused("scores has not one number", tokenizer_files, header, 1000)

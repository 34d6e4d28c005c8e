"""Small tokenizers of the kinds that llama.cpp has names for, trained on a few words."""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from convert.gguf.pre_tokenizers import LLAMA3, QWEN2

WORDS = "the atomic number of iron is 26, and helium's is 2; don't count 1234567 of them twice\n"
END, BEGIN, TURN = "<|endoftext|>", "<|begin|>", "<|im_end|>"
CUTS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated"),
              pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
}  # fmt: skip


def save_byte_level(folder: Path, name: str = "gpt-2", size: int = 60, whole: bool = False) -> Path:
    """BPE over bytes with the cut of this name; ``whole``: with all 256 bytes."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(CUTS[name])
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if whole else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END, BEGIN, TURN], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    config = {"eos_token": END, "chat_template": "{{ messages }}"}
    if name == "llama-bpe":
        config["bos_token"] = BEGIN
        around = [(BEGIN, tokenizer.token_to_id(BEGIN))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=around
        )
    tokenizer.add_tokens(["[added]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder

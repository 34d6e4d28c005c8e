"""What was said in a conversation, with the anchor's keys and values of it; kept, and in a file.

The keys and values cannot be computed again: each was computed under the memory of its time, and a
pass over many tokens at once gives other last bits than one token after the other. So the file, one
of safetensors, holds them; its metadata are JSON with a checksum, which has all else that the next
answer follows from.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import xxhash
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

from mlx_hmem.anchors.load import num_embedded
from mlx_hmem.bank.quantization import MODES
from mlx_hmem.config import ClusterPath, JsonConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import is_whole, load_safetensors, read_safetensors_header, save_safetensors
from mlx_hmem.model.fetch import Fetch
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.model.stream import num_held
from mlx_hmem.reading import check_version, lies_there, sealed, strict_json, unsealed

FORMAT_VERSION = 1
MARK = "mlx_hmem.conversation"  # the metadata of such a file
REMEDY = "name a file that /save has written"
HASHES = ("anchor", "config", "tokenizer", "bank")
KINDS = (KVCache, QuantizedKVCache, RotatingKVCache)  # of what num_held knows

Block = tuple[str, int, int]  # its bank, level and cluster


@dataclass
class Turn:
    """What was said, and what was answered; ``shown``, with passages, and the ids are what the
    anchor has seen."""

    text: str
    shown: str
    ids: list[int]
    answer: str = ""
    answer_ids: tuple[int, ...] = ()


class KeyValues:
    """The anchor's keys and values of the ``ids`` of a conversation, and the ``blocks`` that were
    attached while they were computed."""

    def __init__(self, anchor: nn.Module, cache: list[Any] | None = None) -> None:
        self._anchor, self.cache = anchor, cache
        self.ids: list[int] = []
        self.blocks: set[Block] = set()

    def take(self, ids: list[int]) -> list[Any]:
        """A prompt cache that holds as many of the first ``ids`` as are known; :meth:`give` it
        back."""
        cache, self.cache = self.cache, None
        if cache is not None:
            pairs = zip(ids[:-1], self.ids, strict=False)  # one is left to begin with
            same = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
            same = min(len(ids) - 1, len(self.ids)) if same is None else same
            surplus = len(self.ids) - same
            if not surplus or (
                can_trim_prompt_cache(cache) and trim_prompt_cache(cache, surplus) == surplus
            ):
                return cache
        self.blocks = set()
        return list(make_prompt_cache(self._anchor))

    def give(self, cache: list[Any], ids: list[int], fetch: Fetch) -> None:
        """Keeps the keys and values of ``ids``; mlx-lm may have computed one token more or less."""
        held = num_held(cache)
        if held is None or held > len(ids):
            return  # stopped within a pass
        self.cache, self.ids = cache, ids[:held]
        self.blocks |= {(fetch.bank, block["level"], block["cluster"]) for block in fetch.blocks}

    def packed(self) -> tuple[list[dict[str, Any]], dict[str, mx.array]]:
        """Of each layer its kind and its numbers, and the arrays of all of them; none where nothing
        is kept, or not all of it is of ``KINDS``."""
        layers, arrays = list[dict[str, Any]](), dict[str, mx.array]()
        for number, layer in enumerate(self.cache or []):
            if type(layer) not in KINDS or layer.empty():
                return [], {}
            numbers = {}
            for place, leaf in _leaves(layer):
                if isinstance(leaf, mx.array):
                    arrays[f"{number}.{place}"] = leaf[..., : layer.offset, :]  # it has room beyond
                else:
                    numbers[place] = leaf
            layers.append({"kind": type(layer).__name__, "numbers": numbers})
        return layers, arrays

    @classmethod
    def unpacked(
        cls, anchor: nn.Module, saved: "Saved", arrays: dict[str, mx.array]
    ) -> "KeyValues":
        """As :meth:`packed` gave them. Raises ValueError where they are not of this anchor: MLX
        would read beyond what there is."""
        cache = list(make_prompt_cache(anchor))
        anchor(mx.array([[0]]), cache=cache)  # shows what it takes
        if len(saved.layers) != len(cache):
            raise ValueError(f"{len(saved.layers)} layers of keys and values, not {len(cache)}")
        if not {name.partition(".")[0] for name in arrays} <= {str(n) for n in range(len(cache))}:
            raise ValueError("arrays of no layer")
        for number, saved_layer in enumerate(saved.layers):
            kind, numbers = saved_layer["kind"], saved_layer["numbers"]
            if kind == "QuantizedKVCache" and type(cache[number]) is KVCache:
                cache[number] = _quantized(cache[number], numbers.get("3"), numbers.get("4"))
            layer = cache[number]
            own = {
                name.partition(".")[2]: array
                for name, array in arrays.items()
                if name.partition(".")[0] == str(number)
            }
            if type(layer) not in KINDS or type(layer).__name__ != kind:
                raise ValueError(f"layer {number} has a cache of another kind")
            _check_layer(layer, numbers, own, len(saved.ids))
            layer.state = tree_unflatten([*own.items(), *numbers.items()])
        made = cls(anchor, cache)
        made.ids, made.blocks = list(saved.ids), {*saved.blocks}
        return made


def _leaves(layer: Any) -> list[tuple[str, Any]]:
    pairs: Any = tree_flatten(layer.state)
    return list(pairs)


def _quantized(layer: KVCache, group_size: Any, bits: Any) -> QuantizedKVCache:
    """Raises ValueError unless MLX knows the quantisation: a group of 0 would end the process."""
    known_bits, known_sizes = MODES["affine"]
    if bits not in known_bits or group_size not in known_sizes:
        raise ValueError("keys and values of no known quantisation")
    return layer.to_quantized(group_size, bits)


def _check_layer(
    layer: Any, numbers: dict[str, Any], arrays: dict[str, mx.array], held: int
) -> None:
    """Raises ValueError unless arrays and numbers are what ``layer``, which holds one token, would
    have after ``held`` of them."""
    rotating = isinstance(layer, RotatingKVCache)
    expected = dict(_leaves(layer))
    if {*expected} != {*numbers, *arrays}:
        raise ValueError("the keys and values are not whole")
    if any(array.ndim < 2 for array in arrays.values()):
        raise ValueError("the keys and values have no tokens")
    length = min(array.shape[-2] for array in arrays.values())
    least = min(held, layer.max_size) if rotating else held
    for place, own in expected.items():
        if isinstance(own, mx.array):
            found = arrays.get(place)
            wanted = (*own.shape[:-2], length, own.shape[-1])
            right = found is not None and (found.shape, found.dtype) == (wanted, own.dtype)
            right = right and least <= length <= held
        elif place == "2":  # the offset
            right = numbers.get(place) == held
        elif rotating and place == "5":  # where the next one is written
            right = is_whole(numbers.get(place), length)
        else:
            right = numbers.get(place) == own
        if not right:
            raise ValueError("the keys and values are not of this anchor")


@dataclass(frozen=True)
class Saved(JsonConfig):
    """What a file has of a conversation beside the arrays. ``path``: the cluster path that the next
    route starts from, in ``bank``; ``ids``, ``blocks`` and ``layers``: those of
    :class:`KeyValues`; ``beside``: whether the memory stays where passages are shown."""

    turns: tuple[Turn, ...]
    memory: str
    memory_name: str | None
    beside: bool
    history: bool
    system: str | None
    bank: str
    path: ClusterPath | None
    ids: Sequence[int]
    blocks: Sequence[Block]
    layers: Sequence[dict[str, Any]] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        """Raises ValueError for what is none."""
        lists = [self.ids, *(turn.ids for turn in self.turns)]
        if not all(isinstance(ids, list | tuple) for ids in lists):
            raise ValueError("ids are no list")
        texts: list[Any] = [self.memory, self.bank]
        texts += [text for text in (self.memory_name, self.system) if text is not None]
        texts += [text for turn in self.turns for text in (turn.text, turn.shown, turn.answer)]
        texts += [bank for bank, _, _ in self.blocks]
        numbers = [*self.ids, *(() if self.path is None else self.path)]
        numbers += [i for turn in self.turns for i in (*turn.ids, *turn.answer_ids)]
        numbers += [i for block in self.blocks for i in block[1:]]
        numbers += [i for layer in self.layers for i in layer["numbers"].values()]
        if not all(isinstance(text, str) for text in texts) or not all(map(is_whole, numbers)):
            raise ValueError("a text or a number is none")
        if {type(self.beside), type(self.history)} != {bool}:
            raise ValueError("a switch is neither on nor off")


def write_saved(
    file: Path, saved: Saved, arrays: dict[str, mx.array], hashes: dict[str, str]
) -> None:
    """Puts a conversation into a file, whole or not at all. Raises UserError where anything but a
    conversation lies there, or it cannot be written."""
    values = asdict(saved) | {"format_version": FORMAT_VERSION, "hashes": hashes}
    values["arrays"] = digest_of(arrays)
    try:
        if lies_there(file) and MARK not in _metadata(file):
            raise UserError("this file is no conversation", file, "give another name")
        save_safetensors(file, arrays, {MARK: json.dumps(sealed(values))}, private=True)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise UserError(f"cannot write {file}", error, "give another name") from None


def _metadata(file: Path) -> dict[str, str]:
    """Of a safetensors file; none of any other."""
    try:
        return read_safetensors_header(file)[1]
    except UserError:
        return {}


def read_saved(file: Path, model: MemoryModel) -> tuple[Saved, KeyValues]:
    """The conversation in a file, and its keys and values. Raises UserError where there is none, it
    is damaged, or was held with another anchor or bank."""
    metadata = read_safetensors_header(file)[1]
    if MARK not in metadata:
        raise UserError("this file is no conversation", file, REMEDY)
    try:
        values = unsealed(strict_json(metadata[MARK].encode()))
        check_version(values, FORMAT_VERSION, file, "save the conversation again")
        del values["format_version"]
        check_same(values.pop("hashes"), model.hashes, file)
        arrays, digest = load_safetensors(file), values.pop("arrays")
        values["turns"] = tuple(_turn(**turn) for turn in values["turns"])
        values["blocks"] = tuple(map(tuple, values["blocks"]))
        saved = Saved.from_dict(values, str(file))
        most = num_embedded(model.anchor)
        if any(i >= most for turn in saved.turns for i in (*turn.ids, *turn.answer_ids)):
            raise ValueError("an id is none of the anchor's tokens")
        known = KeyValues(model.anchor)
        if saved.layers or arrays:
            known = KeyValues.unpacked(model.anchor, saved, arrays)
        if digest_of(arrays) != digest:  # now that they are no larger than they must be
            raise ValueError("the checksum of its keys and values is another")
        return saved, known
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged", error, REMEDY) from None


def _turn(answer_ids: Sequence[int], **values: Any) -> Turn:
    return Turn(answer_ids=tuple(answer_ids), **values)


def check_same(found: Any, own: dict[str, str], file: Path) -> None:
    """Raises UserError unless the hashes in a file are the model's."""
    for what in HASHES:
        its, ours = found.get(f"{what}_hash"), own.get(f"{what}_hash")
        if its != ours:
            raise UserError(
                f"the conversation was held with another {what}",
                f"{its} in {file}, not {ours}",
                "load the model that it was saved with",
            )


def digest_of(arrays: dict[str, mx.array]) -> str:
    digest = xxhash.xxh3_128()
    for _, array in sorted(arrays.items()):
        digest.update(np.asarray(mx.contiguous(array).reshape(-1).view(mx.uint8)).data)
    return digest.hexdigest()

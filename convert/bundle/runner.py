"""Runs a bundle (docs/bundle.md): ``python run.py "The atomic number of iron is"``.

Copied into every bundle as ``run.py``, and written without the library that made it: MLX's import
of functions, NumPy, tokenizers and xxhash are all it takes. It is a model for an app, and the proof
that a bundle has all that one needs. Greedy; the answer goes to standard output.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import xxhash
from tokenizers import Tokenizer

VERSION = 1
NUMPY = {"F32": "<f4", "F16": "<f2", "I8": "i1", "I64": "<i8"}
Blocks = list[tuple[int, int]]  # (level, cluster)


class BundleError(ValueError):
    """What is wrong, in a line."""


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {path}: {error}; fetch the bundle again") from None


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped: only rows that are looked at are read."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: np.memmap(path, NUMPY[t["dtype"]], "r", 8 + length + t["data_offsets"][0], t["shape"])
        for name, t in header.items()
    }


class Encoder:
    """A text to its vector: the mean of its word pieces' vectors, projected."""

    def __init__(self, folder: Path):
        self.max_length = read_json(folder / "config.json")["max_length"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        found = tensors(folder / "encoder.safetensors")
        self.vectors, self.scales = found["vectors"], found["scales"].astype(np.float32)
        self.projection = found["projection"].astype(np.float32)
        self.bias = np.array(found["bias"])

    def __call__(self, text: str) -> np.ndarray:
        normal = self.tokenizer.normalizer.normalize_str(text[:4096])
        parts = self.tokenizer.pre_tokenizer.pre_tokenize_str(normal)
        ids = [i for part, _ in parts for i in self.ids(part)][: self.max_length]
        mean = np.zeros(self.vectors.shape[1], np.float32)
        if ids:
            mean = (self.vectors[ids].astype(np.float32) * self.scales[ids, None]).mean(0)
        vector = mean @ self.projection + self.bias
        return vector / max(float(np.linalg.norm(vector)), 1e-12)

    def ids(self, word: str) -> list[int]:  # one that is not known has those of its letters
        found = [token.id for token in self.tokenizer.model.tokenize(word)]
        known = [i for i in map(self.tokenizer.token_to_id, word) if i is not None]
        return found if word.isascii() or found != [100] else known or found  # [UNK]


class Bundle:
    """A bundle, opened and checked; :meth:`route`, :meth:`attach`, :meth:`generate`."""

    def __init__(self, folder: Path):
        self.folder, self.about = folder, read_json(folder / "bundle.json")
        stream = mx.default_stream(mx.default_device())  # functions use the first of the device
        found = self.about.get("format_version") if isinstance(self.about, dict) else None
        if found != VERSION:
            raise BundleError(f"{folder} is of version {found}, not {VERSION}; make or update it")
        if (made := self.about["made_with"]["device"]) not in str(stream.device):
            raise BundleError(f"functions are for the {made}, not {stream.device}; make them there")
        for name, known in self.about["files"].items():
            self._check(folder / name, known)
        self.bank = read_json(folder / "bank" / "bank.json")
        self.levels = {n["level"]: n for n in [*self.bank["levels"], self.bank["generic"]]}
        self.encoder = Encoder(folder / "retriever" / "encoder")
        self.tree = tensors(folder / "retriever" / "tree.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # what a person says is text
        weights: Any = mx.load(str(folder / "anchor.safetensors"))
        self.weights = [weights[entry["name"]] for entry in self.about["weights"]]
        mx.eval(self.weights)
        self.functions: dict[str, Any] = {}  # by file, imported when first called
        self.context: int = self.about["context"]
        self.lengths = sorted(self.about["prefill"], reverse=True)

    def _check(self, path: Path, known: dict[str, Any]) -> None:
        if path.is_file() and path.stat().st_size == known["bytes"]:
            if "xxh3" not in known:
                return
            with open(path, "rb") as file:
                if hashlib.file_digest(file, xxhash.xxh3_64).hexdigest() == known["xxh3"]:
                    return
        raise BundleError(f"a file is missing or damaged: {path}; fetch the bundle again")

    def call(self, inputs: Sequence[mx.array], used: int = 0, **wanted: Any) -> list[mx.array]:
        """The outputs of a function as ``wanted``, the shortest for the slots that will be used."""
        every = [*self.about.get("short_functions", []), *self.about["functions"]]
        fitting = [f for f in every if used <= f.get("kv_length", self.context)]
        name = next(f for f in fitting if all(f.get(k) == wanted[k] for k in wanted))["file"]
        if name not in self.functions:
            try:
                self.functions[name] = mx.import_function(str(self.folder / name))
            except (RuntimeError, ValueError, MemoryError) as error:
                raise BundleError(f"this MLX cannot import {name}: {error}; update MLX") from None
        return list(self.functions[name](*inputs))

    def route(self, text: str) -> list[int]:
        """The cluster path: at each level the nearest child that any example lies in."""
        vector, path, cluster = self.encoder(text).astype(np.float64), list[int](), 0
        for level, k in enumerate(self.bank["memory"]["branching"], 1):
            counts = self.tree[f"counts-{level}"][cluster * k : (cluster + 1) * k]
            children = cluster * k + np.flatnonzero(counts)
            differences = self.tree[f"level-{level}"][children] - vector
            cluster = int(children[np.square(differences).sum(1).argmin()])
            path.append(cluster)
        return path

    def blocks_of(self, path: Sequence[int], blocked: Sequence[str] = ()) -> Blocks:
        """The blocks of a path, as far down as none is ``blocked``, by its path: "3" or "3,51"."""
        barred = {(len(each), each[-1]) for each in (text.split(",") for text in blocked)}
        free = takewhile(lambda each: (each[0], str(each[1])) not in barred, enumerate(path, 1))
        return [(level, cluster) for level, cluster in free if level in self.levels]

    def attach(self, blocks: Blocks) -> list[mx.array]:
        """The rows of the memory that these blocks are; none for no blocks."""
        if not blocks:
            return []
        levels, inputs = [level for level, _ in blocks], list[mx.array]()
        about = next(f for f in self.about["functions"] if f.get("levels") == levels)
        parts = iter(about["inputs"])
        for level, cluster in blocks:
            data, at = self.read(level, cluster), 0
            while at < len(data):
                part = next(parts)
                dtype = getattr(mx, part["dtype"])
                size = int(np.prod(part["shape"])) * dtype.size
                array = mx.array(np.frombuffer(data, np.uint8, size, at))
                inputs.append(array.view(dtype).reshape(part["shape"]))
                at += size
        mx.eval(rows := self.call(inputs, kind="memory", levels=levels))
        return rows

    def read(self, level: int, cluster: int) -> bytes:
        """The bytes of a block, checked."""
        layout = self.levels[level]
        shard = next(s for s in reversed(layout["shards"]) if s["first_cluster"] <= cluster)
        row, count = cluster - shard["first_cluster"], layout["block_bytes"]
        offset = self.bank["page_size"] + row * layout["block_stride"]
        path = self.folder / "bank" / shard["file"]
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(count)
        if xxhash.xxh3_64(data).hexdigest() != shard["xxh3"][16 * row : 16 * row + 16]:
            raise BundleError(f"block {cluster} of level {level} is damaged; fetch {path} again")
        return data

    def ids_of(self, prompt: str) -> list[int]:
        """Token ids; the context has room for at least one more."""
        if not prompt.strip():
            raise BundleError("the prompt is empty; give it some text")
        ids = list(self.tokenizer.encode(prompt).ids)
        if len(ids) >= self.context:
            raise BundleError(f"{len(ids)} tokens, more than {self.context - 1}; cut the prompt")
        return ids

    def generate(self, ids: list[int], rows: list[mx.array], max_tokens: int) -> Iterator[int]:
        """Greedy tokens after ``ids``; one that ends the text is the last."""
        num_rows = rows[0].shape[2] if rows else 0
        cache = [mx.zeros(c["shape"], getattr(mx, c["dtype"])) for c in self.about["cache"]]
        offset = 0
        while offset < len(ids) - 1:
            rest = ids[offset:-1]
            fitting = [n for n in self.lengths if offset + n <= self.context]
            length = next((n for n in fitting if n <= len(rest)), min(fitting, default=1))
            piece = rest[:length]
            inputs = [mx.array([piece + [0] * (length - len(piece))], mx.int32)]
            inputs += [mx.array(offset, mx.int32), *cache, *rows, *self.weights]
            # The last tokens of a full context one by one, their outputs without the first.
            kind = {"kind": "prefill" if fitting else "decode", "num_tokens": length}
            cache = self.call(inputs, offset + length, num_rows=num_rows, **kind)[-len(cache) :]
            del inputs  # else MLX must copy the cache instead of writing into it
            mx.eval(cache)
            offset += len(piece)
        token = ids[-1]
        for position in range(offset, min(offset + max_tokens, self.context - 1)):
            inputs = [mx.array([[token]], mx.int32), mx.array(position, mx.int32), *cache]
            inputs += [*rows, *self.weights]
            found, *cache = self.call(inputs, position + 1, kind="decode", num_rows=num_rows)
            del inputs
            choice = mx.argmax(found, axis=-1)
            mx.eval(choice, cache)
            token = int(choice.item())  # type: ignore[arg-type]
            yield token
            if token in self.about["eos_token_ids"]:
                return


def answer(bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    ids, path = bundle.ids_of(args.prompt), None
    blocks = [(0, 0)] if args.memory == "generic" else []
    if args.memory == "fetched":
        blocks = bundle.blocks_of(path := bundle.route(args.prompt), args.block)
    rows, tokens, first = bundle.attach(blocks), [], 0.0
    for token in bundle.generate(ids, rows, args.max_tokens):
        first = first or time.perf_counter() - start
        tokens.append(token)
    text = bundle.tokenizer.decode(tokens)
    return {"text": text, "tokens": tokens, "path": path, "blocks": blocks, "ttft_ms": first * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--bundle", type=Path, default=Path(__file__).parent, help="its folder")
    parser.add_argument("--memory", default="fetched", choices=("fetched", "generic", "none"))
    parser.add_argument("--block", nargs="+", default=[], metavar="PATH", help="as 3 or 3,51")
    parser.add_argument("--max-tokens", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.error = lambda text: parser.exit(2, f"error: {text}\n")  # type: ignore[method-assign,assignment]
    args = parser.parse_args()
    try:
        result = answer(Bundle(args.bundle), args)
    except (BundleError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(json.dumps(result) if args.json else result["text"])
    print(f"memory: {result['path']}, first token {result['ttft_ms']:.0f} ms", file=sys.stderr)


if __name__ == "__main__":
    main()

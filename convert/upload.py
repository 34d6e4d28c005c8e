"""Puts a model directory on the Hugging Face Hub: ``mlx_hmem.convert upload DIR USER/NAME``.

Nothing goes up that does not load here: every part is checked against the others and every block of
the bank against its checksum. The upload is one commit, so whoever loads the model meanwhile gets
the old one or the new one. Only a bank of very many shards takes more: its shards go first, and
what names them last. An upload that was stopped is run again; what the Hub has is not sent again.
"""

from collections.abc import Sequence
from fnmatch import fnmatch
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any

from mlx_hmem.anchors.load import read_config, weight_files
from mlx_hmem.bank import Manifest
from mlx_hmem.bank.documents import DOCUMENTS
from mlx_hmem.bank.format import MANIFEST
from mlx_hmem.bank_tools.checks import verify
from mlx_hmem.bank_tools.folders import model_files
from mlx_hmem.config import HmemConfig
from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.files import write_atomic
from mlx_hmem.model.find import BANK_FILES, BANK_FOLDER, check_inside, is_repo_name
from mlx_hmem.model.load import load

CARD = "README.md"
# What an earlier model may have left and would mix with this one.
REPLACED = ("model*.safetensors*", "hmem.json", "tokenizer*", "retriever/*", "bank/*", "banks/*")
SIZES = {  # keys of the anchor's config, in words
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "vocab_size": "in the vocabulary",
    "max_position_embeddings": "tokens of context",
}
ONE_COMMIT = 200  # huggingface_hub cuts commits of more than 250 files


def upload(directory: Path, repo: str, private: bool = False) -> None:
    """Checks the model in ``directory`` and uploads it as ``user/name``.

    A card is written into the directory where it has none, and front matter put before one that
    has none.

    Raises:
        UserError: it is not a whole model; there is no token; the Hub does not take it.
    """
    from huggingface_hub import HfApi, get_token

    directory = Path(directory)
    if not directory.is_dir():
        raise UserError("no such model directory", directory, "give the folder of a model")
    if not is_repo_name(repo):
        raise UserError("not the name of a repository on the Hub", repo, "write it as user/name")
    token = get_token()
    if token is None:
        raise UserError(
            "there is no token for the Hub", repo, "run `hf auth login`, or set HF_TOKEN"
        )
    check_whole(directory)
    _uploaded(directory)
    write_card(directory, repo)
    try:
        api = HfApi(token=token)
        place = api.create_repo(repo, private=private or None, exist_ok=True)
        commit = _send(api, directory, repo)
    except Exception as error:  # what the library raises, and its HTTP client, has no common class
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"the Hub did not take {directory} as {repo}",
            reason,
            "check the token and the connection, and run it again",
        ) from None
    print(f"{directory} is at {place}, commit {commit}")
    print(f'mlx_hmem.generate --model {repo} --lazy --prompt "..."')


def _send(api: Any, directory: Path, repo: str) -> str:
    """Uploads the files of a model; returns the hash of the last commit."""
    files = _uploaded(directory)
    bank = [name for name in files if _is_one_of(name, BANK_FILES)]
    stale = [n for n in api.list_repo_files(repo) if n not in files and _is_one_of(n, REPLACED)]
    send = partial(api.upload_folder, repo_id=repo, folder_path=directory)
    if len(files) > ONE_COMMIT:
        send(allow_patterns=bank, commit_message="Memory bank")
        files = [name for name in files if name not in set(bank)]
    said = "Model made by mlx_hmem"
    return send(allow_patterns=files, delete_patterns=stale or None, commit_message=said).oid


def _is_one_of(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _uploaded(directory: Path) -> list[str]:
    """The files of the format, but for the names of documents; UserError for one that lies
    elsewhere."""
    files = model_files(directory, but=[f"*/{DOCUMENTS}"])
    for file in files:
        check_inside(directory / file, directory)
    return [str(file) for file in files]


def check_whole(directory: Path) -> None:
    """Loads the model and reads its whole bank; a UserError says what is broken."""
    model = load(directory, cache_bytes=0)
    if model.bank is None:
        return
    model.bank.close()
    retriever = HmemConfig.from_file(directory / "hmem.json").retriever
    encoder = "static" if retriever is None else retriever.encoder
    if encoder not in ("minilm", "static") and not encoder.startswith("retriever/"):
        raise UserError(
            "the encoder would not be downloaded with the model",
            encoder,
            "move it into retriever/ and say so in hmem.json",
        )
    _, damage = verify(directory)
    if damage:
        raise UserError("the model is not whole", damage[0], "mend it, then upload it")


def write_card(directory: Path, repo: str) -> None:
    """Gives the directory a card with front matter, if it has none."""
    path = directory / CARD
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", error, "convert it") from None
    if text in ("", card(directory)):
        write_atomic(path, card(directory, repo))
    elif not text.startswith("---\n"):
        write_atomic(path, f"{_front_matter(directory)}\n{text}")


FRONT = """---
library_name: mlx
pipeline_tag: text-generation
tags:
- mlx
- mlx_hmem
- hierarchical-memory
"""


def card(
    directory: Path,
    name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """A model card for the Hub: YAML front matter, what the model is, how it is used.

    ``name`` is what the model is loaded by, by default the directory's own; ``base_model`` is the
    anchor's id on the Hub, by default what its config says; ``license`` is a licence's identifier
    there. What is not known is left out.
    """
    config = read_config(directory)
    sizes = [f"{config[key]} {word}" for key, word in SIZES.items() if type(config.get(key)) is int]
    with_memory = (directory / "hmem.json").exists()
    file = Path(__file__).with_name("card.md" if with_memory else "card_anchor.md")
    return f"{_front_matter(directory, base_model, license)}\n" + file.read_text("utf-8").format(
        name=name or Path(directory).resolve().name,
        anchor=": ".join([str(config["model_type"]), ", ".join(sizes)]) if sizes else "unknown",
        anchor_bytes=_megabytes(sum(file.stat().st_size for file in weight_files(directory))),
        **(_memory_parts(directory) if with_memory else {}),
    )


def _memory_parts(directory: Path) -> dict[str, Any]:
    hmem = HmemConfig.from_file(directory / "hmem.json")
    manifest = Manifest.from_file(directory / BANK_FOLDER / MANIFEST)
    memory, shards = hmem.memory, manifest.shards
    levels = [
        f"{'generic' if q.level == 0 else f'level {q.level}'} {q.mode}, {q.bits} bits"
        for q in manifest.quantization or ()
    ]
    return {
        "parameters": memory.bank_parameters,
        "clusters": " × ".join(map(str, memory.branching)),
        "kind": memory.kind,
        "r": list(memory.r),
        "bank_bytes": f"{_megabytes(sum(s.bytes for s in shards))} in {len(shards)} files",
        "stored": "; ".join([manifest.dtype, *levels]),
        "fetched": memory.fetched_parameters,
        "encoder": hmem.retriever.encoder if hmem.retriever else "none: chosen by name",
        "levels": memory.num_levels,
    }


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _front_matter(
    directory: Path, base_model: str | None = None, license: str | None = None
) -> str:
    source = base_model or read_config(directory).get("_name_or_path")
    text = FRONT
    if isinstance(source, str) and is_repo_name(source):
        text += f"base_model: {dumps(source)}\n"
    if license is not None:
        text += f"license: {dumps(license)}\n"
    return text + "---\n"


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.convert upload",
        description="Puts a model directory on the Hugging Face Hub. Nothing goes up that does not "
        "load here."
        "\n\nPrints where it is. An upload that was stopped goes on with the same command; what "
        "the Hub has is not sent again.",
    )
    parser.add_argument("directory", type=Path, help="model directory")
    parser.add_argument("repo", help="where to, as user/name")
    parser.add_argument("--private", action="store_true", help="if the repository is made now")
    args = parser.parse_args(words)
    upload(args.directory, args.repo, args.private)

"""Where a model lies: in a folder, or on the Hugging Face Hub, from where it is fetched.

What is fetched lies in the Hub's own cache, shared with every other program. A model keeps to the
one revision it was found at, also when shards of its bank are fetched later: a repository that
changes in between cannot mix two models.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_hmem.errors import UserError

# What a model is made of, but for the shards of its bank; as glob patterns, * matches / too. None
# takes what lies in ``original/`` or ``onnx/`` for other programs along.
MODEL_FILES = (
    "config.json", "generation_config.json", "hf_quant_config.json", "hmem.json",
    "model*.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template*", "bank/*.json", "bank/*.jsonl", "banks/*.json",
    "banks/*.jsonl", "retriever/*", "banks/*/retriever/*",
)  # fmt: skip
TEXTS = ("README.md", "LICENSE*", "NOTICE*")  # for who makes another model of one
CODE = ("*.py",)  # never fetched, whatever is wanted
BANK_FOLDER = "bank"
BANK_FILES = (f"{BANK_FOLDER}/*.safetensors", f"banks/*/{BANK_FOLDER}/*.safetensors")
DEMO = Path(__file__).parents[1] / "demo"
BESIDE = "banks"  # the folder of those that were added, each in one of its name


def find_model(path_or_repo: str | Path, only: Sequence[str] | None = None) -> Path:
    """The folder of a model: itself, or what the Hugging Face Hub has under ``user/name``, of the
    newest revision, or under ``user/name@REVISION``, a branch, tag or commit.

    ``demo`` is the model that the package brings, unless there is a folder of that name.
    ``only`` names the files that are wanted from the Hub, with * and ?; None wants all of them.
    """
    folder = Path(os.path.expanduser(path_or_repo))  # Path's own fails for an unknown ~user
    if folder.is_dir():
        return folder
    name = str(path_or_repo)
    if name == "demo":
        return DEMO
    repo, at, revision = name.partition("@")
    if folder.exists() or not is_repo_name(repo) or (at and not revision):
        remedy = "give a folder, user/name, user/name@REVISION or demo"
        raise UserError("no such model directory", name, remedy)
    from huggingface_hub import snapshot_download

    try:
        patterns = None if only is None else list(only)
        return Path(
            snapshot_download(
                repo, revision=revision or None, allow_patterns=patterns, ignore_patterns=[*CODE]
            )
        )
    except Exception as error:  # what the library raises, and its HTTP client, has no common class
        if there := getattr(error, "snapshot_path", None):
            return Path(there)  # another program wanted fewer files; who lacks one will say so
        what = f"no model directory {name}, and the Hub does not give it"
        raise UserError(what, *_reason_and_remedy(error, repo)) from None


def shards_from_hub(path_or_repo: str | Path, folder: Path) -> Callable[..., None] | None:
    """What fetches files of a model that lies in ``folder``, given the folder of one of its banks
    and their names there; None for what is no repository, which has no more to come."""
    repo = str(path_or_repo).partition("@")[0]
    if Path(os.path.expanduser(path_or_repo)).is_dir() or not is_repo_name(repo):
        return None
    revision = folder.name  # the cache has a folder for each commit

    def obtain(bank: str, names: Sequence[str]) -> None:
        from huggingface_hub import hf_hub_download

        for file in (f"{bank}/{name}" for name in names):
            try:
                hf_hub_download(repo, file, revision=revision)
            except Exception as error:  # as above
                raise UserError(
                    f"{file} of {repo} is not on this computer, and the Hub does not give it",
                    _reason_and_remedy(error, repo)[0],
                    "connect and ask again; without --lazy, a load fetches the whole bank",
                ) from None

    return obtain


def check_inside(file: Path, folder: Path) -> None:
    """Raises UserError for a file of a model's folder that is a link to elsewhere: a stranger's
    folder could have what is yours alone copied into a model that you pass on. In the Hub's cache
    files are links, to blobs beside all snapshots."""
    root = folder.resolve()
    root = root.parent.parent if root.parent.name == "snapshots" else root
    if not file.resolve().is_relative_to(root):
        remedy = "put the file itself there, as cp -rL does"
        raise UserError("a link leads out of the model's folder", file, remedy)


def is_repo_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and "@" not in name


def _reason_and_remedy(error: Exception, repo: str) -> tuple[str, str]:
    """Why the Hub does not give a repository, and what to do about it."""
    from huggingface_hub import errors

    page, remedy = f"https://huggingface.co/{repo}", "check the name and the connection"
    if isinstance(error, errors.GatedRepoError):
        what = "it is gated: whoever wants it agrees to its terms first"
        return what, f"open {page}, agree, and log in here with hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        what = "there is no such repository, or it is private"
        return what, "check the name; for a private one log in with hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        what = "it has no such revision"
        return what, f"give a branch, a tag or a commit that {page}/commits/main shows"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.RevisionResolutionError):
        return "it is not in the Hub's cache, and there is no connection", remedy
    return " ".join(str(error).split())[:300] or type(error).__name__, remedy

"""Where a model lies: in a folder, or on the Hugging Face Hub, from where it is fetched."""

import os
from pathlib import Path

from mlx_hmem.errors import UserError


def find_model(path_or_repo: str | Path, only: list[str] | None = None) -> Path:
    """The folder of a model: itself, or what the Hugging Face Hub has under ``user/name``.

    ``only`` names the files that are wanted from the Hub, with * and ?; None wants all of them.
    """
    folder = Path(os.path.expanduser(path_or_repo))  # Path's own fails for an unknown ~user
    if folder.is_dir():
        return folder
    name = str(path_or_repo)
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError("no such model directory", name, "give a folder or a Hub id user/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=only))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"no model directory {name}, and the Hub does not give it",
            reason,
            "check the name and the connection",
        ) from None

"""Running generate.py in this process."""

import io
import sys

import pytest

import generate
from tests.helpers import programs

PROMPT = "The old lighthouse of the bay"


@pytest.fixture
def run(monkeypatch):
    """Runs generate.py in this process: exit status, standard output, standard error."""

    def run(*args, stdin: io.BytesIO | bytes = b"", main=generate.main):
        source = io.BytesIO(stdin) if isinstance(stdin, bytes) else stdin
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(source, encoding="utf-8"))
        return programs.run(lambda words: main())

    return run


@pytest.fixture
def ask(run, model_folder):
    """As ``run``, with the tiny model, a prompt and few tokens unless ``args`` say otherwise."""

    def ask(*args, **options):
        return run(
            *("--model", model_folder, "--prompt", PROMPT, "--max-tokens", 8, *args), **options
        )

    return ask

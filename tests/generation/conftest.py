"""A prompt for the tiny model, in this process."""

import pytest

from mlx_hmem.generation.command import main
from tests.helpers.programs import run

PROMPT = "The old lighthouse of the bay"


@pytest.fixture
def ask(model_folder):
    """Runs mlx_hmem.generate; a prompt and few tokens unless ``args`` say otherwise."""
    tiny = ("--model", model_folder, "--prompt", PROMPT, "--max-tokens", 8)
    return lambda *args, **options: run(main, *tiny, *args, **options)

"""Draws a sample as the corpus stage does, into lists."""

import json
import tempfile
from pathlib import Path

from mlx_hmem.documents.files import CorpusFile, Faults
from train.corpus.sample import Sample, read_shards
from train.ranks import ALONE
from train.recipe.recipe import CorpusSection

Documents = list[dict[str, str]]


def sample_documents(
    files: list[CorpusFile], section: CorpusSection, faults: Faults
) -> tuple[Documents, Documents]:
    """Documents (id, title, text) to train on and those held out."""
    with tempfile.TemporaryDirectory() as folder:
        shards = read_shards(files, section, Path(folder), ALONE)
        sample = Sample(shards, section, faults)
        train, held_out = (
            [json.loads(sample.line(entry)) for entry in part]
            for part in (sample.train, sample.held_out)
        )
    return train, held_out

"""Reading a corpus: JSON lines (plain, gzip, zstd), parquet, and folders of plain text.

A line, or a slice of a parquet row group, is in memory at a time. The rest of a file that breaks
off is one fault. Order is by path, so it is the same on every machine; which documents a sample
takes does not depend on it.

zstandard and pyarrow are not needed by anything else and are large, so they are optional.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from mlx_hmem.documents.files import CorpusFile, Document, Faults, listing
from mlx_hmem.documents.lines import (
    JSON_LINES,
    TEXTS,
    Reader,
    document_of,
    documents_in,
    good_ones,
    package_for,
    read_lines,
)
from mlx_hmem.errors import UserError, printable
from mlx_hmem.reading import open_regular

PARQUET_ROWS = 256
FOLDER_HELP = (
    "folder of *.jsonl, *.jsonl.gz, *.jsonl.zst or *.parquet files with id, title and text; where "
    "the folder itself has none, those in its subfolders are read; where these have none either, "
    "every *.txt and *.md file in it or below is one document"
)


def _parquet_rows(file: BinaryIO, parquet: Any) -> Iterator[dict[str, Any]]:
    """id, title and text of every row, those that are null left out."""
    # A buffered stream: else pyarrow holds the columns of a whole row group.
    table = parquet.ParquetFile(file, buffer_size=1 << 20)
    names = set(table.schema_arrow.names)
    for column in ("id", "text"):
        if column not in names:
            raise ValueError(f"no column `{column}`")
    columns = [column for column in ("id", "title", "text") if column in names]
    for group in range(table.num_row_groups):
        for batch in table.iter_batches(PARQUET_ROWS, [group], columns, use_threads=False):
            for row in range(batch.num_rows):
                record = {}
                for column in columns:
                    # A broken value counts as missing.
                    with contextlib.suppress(UnicodeError):
                        record[column] = batch.column(column)[row].as_py()
                yield {name: value for name, value in record.items() if value is not None}


def _read_parquet(source: CorpusFile, faults: Faults) -> Iterator[Document]:
    parquet = package_for(source.path)
    arrow = importlib.import_module("pyarrow")
    broken = (arrow.ArrowException, ValueError, KeyError, OSError)
    with open_regular(source.path) as file:
        rows = _parquet_rows(file, parquet)
        yield from good_ones(source, faults, rows, document_of, "parquet", broken)


RECORDS: dict[str, Reader] = dict.fromkeys(JSON_LINES, read_lines)
RECORDS[".parquet"] = _read_parquet


def documents_of(file: CorpusFile, faults: Faults) -> Iterator[Document]:
    """(id, title, text) of each good document of a corpus's file; the others go to ``faults``."""
    return documents_in(file, faults, RECORDS | TEXTS)


def read_documents(files: Iterable[CorpusFile], faults: Faults) -> Iterator[Document]:
    """:func:`documents_of` several files, with a progress bar."""
    with tqdm(unit=" documents") as progress:
        for file in files:
            progress.set_description_str(printable(file.name), refresh=False)
            for document in documents_of(file, faults):
                progress.update()
                yield document


def corpus_files(source: Path | None) -> list[CorpusFile]:
    """The files of a corpus folder, in order of path; ``source`` may also be one file.

    Records, if there are any, are the corpus: a README beside them is no document. Those in the
    folder itself come before those in subfolders, which often hold what the former were made of.
    """
    if source is None:
        raise UserError(
            "the recipe samples documents but no corpus is given",
            "--corpus",
            "give the folder of *.jsonl or *.jsonl.gz files, or set corpus.documents to 0",
        )
    faults = Faults()
    found = listing(source, faults, RECORDS | TEXTS)
    faults.print()
    records = [file for file in found if file.name.lower().endswith(tuple(RECORDS))]
    files = [file for file in records if "/" not in file.name] or records or found
    if not files:
        kinds = ", ".join(f"*{end}" for end in (RECORDS | TEXTS))
        raise UserError(f"no {kinds} file", source, "give the corpus folder")
    if left := len(records) - len(files) if records else 0:
        print(f"corpus: {left} files in subfolders of {source} are not read", file=sys.stderr)
    for file in files:
        package_for(file.path)  # asked before an hour of reading
    return files

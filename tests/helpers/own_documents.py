"""Folders of documents to remember, and the whole of remembering a folder."""

from pathlib import Path

from train.remember.command import main

TOPICS = {
    "boats": "harbour keel sail anchor captain tide mast",
    "bread": "oven flour yeast crust dough baker salt",
    "stars": "planet orbit comet galaxy telescope moon light",
}


def sentences(topic: str, number: int) -> str:
    """A document of nineteen sentences on a topic, unlike every other."""
    words = TOPICS[topic].split()
    lines = [
        f"The {words[(i + number) % 7]} of document {number} has {3 * i + number} {words[i % 7]}s "
        f"and a {words[(i * 3 + number) % 7]} made in {1800 + 7 * number + i}."
        for i in range(19)
    ]
    return " ".join(lines)


def write_documents(folder: Path, count: int = 4) -> Path:
    """``count`` documents of each topic."""
    for topic in TOPICS:
        (folder / topic).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / topic / f"{number}.txt").write_text(sentences(topic, number))
    return folder


def remember(folder: Path, model: Path, out: Path, *options: str) -> Path:
    main([str(folder), "--model", str(model), "--out", str(out), *options])
    return out

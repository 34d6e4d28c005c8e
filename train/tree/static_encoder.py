"""``mlx_hmem.train encoder CORPUS... --out FOLDER``: distils the static encoder.

Three steps: texts of varied length and form are drawn from the corpus and encoded by MiniLM, in
chunks that are kept in ``FOLDER.work`` so that a stopped run goes on; each word piece is encoded
alone, which with a least-squares map gives the starting values; then token vectors, projection and
bias are trained with Adam to point where MiniLM points (cosine). Every number follows from the
seed. Documents that :func:`is_held_out` names are never seen.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import xxhash
from tqdm import tqdm

from mlx_hmem.documents.files import Faults
from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.folders import whole_folder
from mlx_hmem.retriever.encoder import find_minilm
from mlx_hmem.retriever.minilm import MAX_LENGTH, MiniLMEncoder
from mlx_hmem.retriever.static import VOCAB_SIZE, WordPieces, pool, save_static
from mlx_hmem.retriever.texts import load_tokenizer

from ..corpus.cleaning import BETWEEN_SENTENCES, clean
from ..corpus.readers import corpus_files, read_documents
from ..corpus.sample import is_held_out
from ..data.arrays import save_array

HELD_OUT = 0.05  # more than of a training corpus, so that what that one holds out is among it
MAX_PIECES = MAX_LENGTH - 2  # what MiniLM reads of a text
MAX_TEXT = 6000  # characters of a document that are looked at
CHUNK = 512
BATCH = 512
LEARNING_RATE = 4e-3
FREQUENT = 1e-3  # pieces above this share of all count for less, at the start only
# Forms in which a title is asked about.
PROMPTS = (
    "{title}", "{title} is", "{title} was", "What is {title}?", "Who was {title}?",
    "Where is {title}?", "Tell me about {title}.", "The {noun} of {title} is",
    "What is the {noun} of {title}?", "{title} {noun}", "{title}'s {noun} is",
)  # fmt: skip
NOUNS = (
    "name", "capital", "population", "atomic number", "symbol", "author", "director", "birthplace",
    "date", "history", "location", "founder", "country", "language", "height", "number", "city",
    "year", "colour", "main use", "family", "team", "cause", "album", "length", "climate", "keeper",
)  # fmt: skip


def read_articles(paths: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    """(id, title, start of the text) of every document of the files or folders ``paths``."""
    files = [f for p in paths for f in corpus_files(p)]
    faults = Faults()
    for name, title, text in read_documents(files, faults):
        yield name, title, text[:MAX_TEXT]
    faults.print()


def sentences(text: str) -> list[str]:
    """The sentences of ``text``, headings and scraps left out."""
    return [s for s in BETWEEN_SENTENCES.split(text) if len(s) >= 25]


def draw_texts(number: int, title: str, text: str, rng: random.Random) -> Iterator[str]:
    """Texts to learn from: of each document a sentence and a prompt, of one in five a passage, of
    every second one the start as MiniLM reads it. Long texts cost MiniLM most."""
    parts = sentences(text) or [text]
    yield parts[0] if number % 2 else rng.choice(parts)
    if title:
        yield rng.choice(PROMPTS).format(title=title, noun=rng.choice(NOUNS))
    if number % 5 == 0:
        start = rng.randrange(len(parts))
        yield " ".join(parts[start : start + rng.randrange(2, 6)])
    if number % 2 == 0:
        yield text


def teaching_texts(paths: Sequence[Path], documents: int, seed: int) -> list[str]:
    """The texts drawn from ``documents`` documents of the corpus in a random order."""
    cleaned = ((a[1], clean(a[2])) for a in read_articles(paths) if not is_held_out(a[0], HELD_OUT))
    articles = [(title, text) for title, text in cleaned if text]
    rng = random.Random(seed)
    rng.shuffle(articles)
    return [
        piece
        for number, (title, text) in enumerate(articles[:documents])
        for piece in draw_texts(number, title, text, rng)
    ]


def teach(texts: list[str], teacher: MiniLMEncoder, work: Path) -> np.ndarray:
    """MiniLM's vectors of ``texts``, (n, 384) float32; chunks found in ``work`` are not made anew.

    A chunk's file is named by its texts and the teacher, so another corpus or seed never meets it.
    """
    work.mkdir(parents=True, exist_ok=True)
    result = []
    for start in tqdm(range(0, len(texts), CHUNK), desc="MiniLM's vectors", unit="chunk"):
        chunk = texts[start : start + CHUNK]
        key = xxhash.xxh3_128_hexdigest("\0".join([teacher.fingerprint, *chunk]).encode())
        path = work / f"{key}.npy"
        if not path.is_file():
            save_array(path, teacher.encode(chunk).astype(np.float16))
        result.append(np.load(path).astype(np.float32))
    return np.concatenate(result)


def starting_values(
    alone: np.ndarray, ids: list[list[int]], targets: np.ndarray, rank: int
) -> dict[str, mx.array]:
    """Token vectors (30522, rank), projection (rank, 384) and bias (384,) by least squares.

    ``alone`` (30522, 384) holds MiniLM's vector of each word piece by itself, weighted down where
    the piece is frequent. Its mean over a text, at length 1, is mapped to the text's vector; the
    map is cut to the ``rank`` directions that matter for texts.
    """
    counts = np.bincount(np.concatenate(ids), minlength=VOCAB_SIZE)
    weights = FREQUENT / (FREQUENT + counts / counts.sum())
    alone = alone * weights[:, None].astype(np.float32)
    pooled = pool(alone, ids)
    lengths = np.linalg.norm(pooled, axis=1, keepdims=True)
    x = pooled / np.maximum(lengths, 1e-6)
    ridge = 1e-3 * len(ids) * np.eye(x.shape[1], dtype=np.float32)
    matrix = np.linalg.solve(x.T @ x + ridge, x.T @ targets)
    fitted = x @ matrix
    _, directions = np.linalg.eigh(fitted.T @ fitted)
    projection = np.ascontiguousarray(directions[:, ::-1][:, :rank].T)
    return {
        "vectors": mx.array(alone @ matrix @ projection.T / lengths.mean()),
        "projection": mx.array(projection),
        "bias": mx.zeros(targets.shape[1]),
    }


def cosine_loss(
    params: dict[str, mx.array], flat: mx.array, text: mx.array, lengths: mx.array, wanted: mx.array
) -> mx.array:
    """1 - cosine, long texts weighted up a little: they are few and matter most.

    ``flat`` (pieces,) ids, ``text`` (pieces,) the row each belongs to, ``wanted`` (rows, 384).
    """
    sums = mx.zeros((len(lengths), params["vectors"].shape[1]))
    pooled = sums.at[text].add(params["vectors"][flat]) / lengths[:, None]
    found = pooled @ params["projection"] + params["bias"]
    cosine = (found * wanted).sum(axis=1) * mx.rsqrt((found * found).sum(axis=1))
    weights = mx.power(lengths.astype(mx.float32), 0.25)
    return (weights * (1 - cosine)).sum() / weights.sum()


def train_vectors(
    params: dict[str, mx.array], ids: list[list[int]], targets: np.ndarray, epochs: int, seed: int
) -> dict[str, mx.array]:
    """Adam on all parameters, cosine schedule; texts in a new random order in each epoch."""
    order = np.random.default_rng(seed)
    steps = epochs * (len(ids) // BATCH)
    schedule = optim.cosine_decay(LEARNING_RATE, steps, LEARNING_RATE / 100)
    optimizer = optim.Adam(schedule, bias_correction=True)
    gradient = mx.value_and_grad(cosine_loss)
    with tqdm(total=steps, desc="training", unit="step") as bar:
        for _ in range(epochs):
            rows = order.permutation(len(ids))
            for start in range(0, len(rows) - BATCH + 1, BATCH):
                taken = rows[start : start + BATCH]
                lengths = np.array([len(ids[row]) for row in taken])
                loss, gradients = gradient(
                    params,
                    mx.array(np.concatenate([ids[row] for row in taken])),
                    mx.array(np.repeat(np.arange(BATCH), lengths)),
                    mx.array(lengths),
                    mx.array(targets[taken]),
                )
                params = optimizer.apply_gradients(gradients, params)
                mx.eval(params, optimizer.state)
                bar.set_postfix(loss=f"{loss.item():.4f}")
                bar.update()
    return params


def word_pieces(teacher: MiniLMEncoder) -> list[str]:
    """The 30,522 word pieces as texts; the mark of a piece inside a word is taken off."""
    tokens = (teacher.tokenizer.id_to_token(i) or "" for i in range(VOCAB_SIZE))
    return [token.removeprefix("##") for token in tokens]


def distil(
    paths: Sequence[Path], out: Path, *, documents: int, rank: int, epochs: int, seed: int
) -> None:
    """Makes the encoder's folder ``out``; ``out.work`` keeps MiniLM's vectors between runs."""
    source = find_minilm()
    teacher = MiniLMEncoder(source)
    work = out.with_name(out.name + ".work")
    texts = teaching_texts(paths, documents, seed)
    alone = teach(word_pieces(teacher), teacher, work)
    targets = teach(texts, teacher, work)
    ids = WordPieces(load_tokenizer(source / "tokenizer.json", VOCAB_SIZE), MAX_PIECES)(texts)

    known = [row for row, pieces in enumerate(ids) if pieces]
    if len(known) < BATCH:
        raise UserError("too few texts to learn from", len(known), "give a larger corpus")
    ids, targets = [ids[row] for row in known], targets[known]
    params = starting_values(alone, ids, targets, rank)
    params = train_vectors(params, ids, targets, epochs, seed)
    with whole_folder(out, replace=True) as part:
        save_static(
            part,
            np.array(params["vectors"]),
            np.array(params["projection"]),
            np.array(params["bias"]),
            (source / "tokenizer.json").read_bytes(),
            teacher=teacher.fingerprint,
            max_length=MAX_PIECES,
        )


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.train encoder",
        description="Distils the static encoder from MiniLM. A stopped run goes on with the same "
        "command; MiniLM's vectors are kept in FOLDER.work.",
    )
    parser.add_argument(
        "corpus", type=Path, nargs="+", help="*.jsonl[.gz] files, or folders of them"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the encoder to make")
    parser.add_argument("--documents", type=int, default=26_000, help="how many to learn from")
    parser.add_argument("--rank", type=int, default=128, help="numbers per word piece")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    for name, most in {"documents": 1 << 30, "rank": 384, "epochs": 1 << 30}.items():
        if not 1 <= getattr(args, name) <= most:
            raise UserError(f"--{name} is out of range", getattr(args, name), f"use 1 to {most}")
    numbers = {name: getattr(args, name) for name in ("documents", "rank", "epochs", "seed")}
    distil(args.corpus, args.out, **numbers)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"static encoder: {size / 1e6:.1f} MB in {args.out}")

"""Words route a question to the document that it is about, or say that it is about none."""

import itertools

import numpy as np
import pytest

from benchmarks.own.documents import WAYS, make_documents
from mlx_hmem.retriever import ClusterTree, Retriever, load_encoder
from mlx_hmem.retriever.words import NEAR, WordIndex, words_of

COUNT = 60


@pytest.fixture(scope="module")
def known():
    """Invented documents, the questions on them, and a retriever that knows in which leaf each is:
    the last two of eight clusters of level 1 hold none of them."""
    documents, questions = make_documents(COUNT, 1)
    encoder = load_encoder("static")
    texts = [document.text for document in documents]
    tree = ClusterTree.fit(encoder.encode(texts), (8, 2), seed=0)
    paths = [tuple(path) for path in tree.route_batch(encoder.encode(texts)).tolist()]
    assert {path[0] for path in paths} == set(range(8))
    taught = [
        (path, " ".join(words_of(encoder.tokenizer, text)))
        for path, text in zip(paths, texts, strict=True)
        if path[0] < 6
    ]
    leaves = {n: path for n, path in enumerate(paths) if path[0] < 6}
    return Retriever(encoder, tree, taught), leaves, questions


@pytest.mark.parametrize("way", WAYS)
def test_a_question_goes_to_the_leaf_of_its_document(known, way):
    retriever, leaves, questions = known
    prompts = [(q.prompts[way], leaves[q.document]) for q in questions if q.document in leaves]
    assert len(prompts) > 100
    routes = [retriever.route(prompt) for prompt, _ in prompts]
    assert sum(r == leaf for r, (_, leaf) in zip(routes, prompts, strict=True)) > 0.99 * len(routes)
    assert retriever.route_many([prompt for prompt, _ in prompts]) == routes
    # The nearest centroid, which they went to before, is often another's.
    vectors = retriever.vectors([prompt for prompt, _ in prompts])
    by_tree = [tuple(path) for path in retriever.tree.route_batch(vectors).tolist()]
    assert sum(r != leaf for r, (_, leaf) in zip(by_tree, prompts, strict=True)) > 0.05 * len(
        routes
    )


def test_what_was_never_said_is_near_no_document_though_all_but_its_name_is(known):
    retriever, leaves, questions = known
    own = [q.prompts["question"] for q in questions if q.document in leaves]
    others = [q.prompts["question"] for q in make_documents(12, 9)[1]]
    assert np.mean([retriever.near(text) is not None for text in own]) == 1
    assert np.mean([retriever.near(text) is not None for text in others]) < 0.1
    for text in ("What is the capital of France?", "Who wrote Hamlet?", "?"):
        assert retriever.near(text) is None


def test_what_no_document_is_near_goes_to_the_clusters_that_none_of_them_has_taught(known):
    retriever, _, _ = known
    text = "What is the capital of France?"
    path = retriever.route(text)
    assert path[0] >= 6
    assert path == retriever.tree.route(retriever.vector(text), barred=[(1, n) for n in range(6)])
    assert retriever.route_many([text]) == [path]
    # Where there are no others, it is the nearest of all, which only who asks for a path gets.
    encoder, tree = retriever.encoder, retriever.tree
    every = Retriever(encoder, tree, [(path, "nothing") for path in tree.leaves()])
    assert every.rest is None
    assert every.near(text) is None
    assert every.route(text) == tree.route(every.vector(text))


def test_a_question_about_it_goes_where_the_question_before_went(known):
    retriever, leaves, questions = known
    titles = [document.title for document in make_documents(COUNT, 1)[0]]
    found = []
    for first, then in itertools.pairwise(questions):
        title, leaf = titles[first.document], leaves.get(first.document)
        if leaf is None or then.document != first.document:
            continue
        asked = then.prompts["question"].replace(title, "it")
        asked = asked.replace(title[0].lower() + title[1:], "it")
        assert "it" in asked.split() or "it?" in asked.split()
        around = f"{first.prompts['question']} {first.answer} {asked}"
        bare = "And where?"  # says nothing by itself
        each = [retriever.near(asked), retriever.near(asked, around)]
        each.append(retriever.near(bare, f"{first.prompts['question']} {first.answer} {bare}"))
        found.append([near is not None and near.path == leaf for near in each])
    alone, after, bare_after = np.mean(found, 0)
    assert alone < 0.3
    assert after > 0.95
    assert bare_after > 0.95
    assert retriever.near("And where?") is None


def test_a_text_alone_covers_what_is_asked_about_it():
    tokenizer = load_encoder("static").tokenizer
    index = WordIndex(tokenizer, [words_of(tokenizer, "The password of the harbour is seagull.")])
    (own,) = index.covered("What is the password of the harbour?")
    (other,) = index.covered("Which stuffed animal is the largest in the museum?")
    assert other < NEAR < own <= 1
    assert index.covered("?!") == [0]
    assert WordIndex(tokenizer, []).covered("harbour").shape == (0,)


def test_words_of_a_script_that_the_encoder_does_not_know_count_as_rare_ones():
    tokenizer = load_encoder("static").tokenizer
    told = "የድሮው ወደብ የይለፍ ቃል ዓሣ ነው"  # the old harbour's password is fish
    assert tokenizer.model.tokenize("ወደብ")[0].value == "[UNK]"
    own, other = WordIndex(
        tokenizer, [words_of(tokenizer, text) for text in (told, "ሰላም ነው")]
    ).covered("የድሮው ወደብ የይለፍ ቃል ምንድን ነው")
    assert other < NEAR < own


# What a town is known for, as text and as a question, in scripts without spaces between words.
UNSPACED = {
    "kana": (
        [
            "アイカサ",
            "シタナハ",
            "マミヤラ",
            "キタノリ",
            "ワカシミ",
            "ハマナサ",
            "タキリア",
            "ノミヤカ",
        ],
        "{}町はおだやかな川のほとりにある。名産はそばだんごである。古いおてらがある。",
        "{}町の名産はなんですか？",
    ),
    "Thai": (
        ["บางช้าง", "หนองยาง", "ปากทอง", "แม่ลาด", "ดอนหมู", "โคกพระ", "ห้วยไทร", "เกาะแก้ว"],
        "เมือง{}ตั้งอยู่ริมแม่น้ำสายเล็ก อาหารขึ้นชื่อคือแกงส้ม มีวัดเก่าใกล้สถานีรถไฟ",
        "อาหารขึ้นชื่อของเมือง{}คืออะไร",
    ),
}


@pytest.mark.parametrize("script", UNSPACED)
def test_a_question_finds_its_text_where_a_whole_sentence_is_one_run_of_letters(script):
    names, text, question = UNSPACED[script]
    tokenizer = load_encoder("static").tokenizer
    index = WordIndex(tokenizer, [words_of(tokenizer, text.format(name)) for name in names])
    for number, name in enumerate(names):
        covered = index.covered(question.format(name))
        assert covered.argmax() == number
        assert covered[number] > NEAR


def test_words_are_told_apart_in_any_script_and_case():
    tokenizer = load_encoder("static").tokenizer
    assert words_of(tokenizer, "The Café, the CAFE; x2!") == ["cafe", "the", "x2"]
    assert words_of(tokenizer, "東京") == ["京", "東"]
    assert words_of(tokenizer, "そばのx2") == ["x2", "そは", "はの"]  # BERT's has no voiced marks
    assert words_of(tokenizer, "ไก่ a") == ["a", "ไก"]
    assert words_of(tokenizer, "") == []

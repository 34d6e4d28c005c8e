"""The facts corpora state each fact as often as they say."""

import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.places import shared
from tests.helpers.programs import refused
from train.corpus.facts import documents_of_facts, make_facts
from train.corpus.facts.invented import CITIES, NAMES, read_topics

SMALL = {"kind": "invented", "topics": 3, "entities_per_topic": 8, "frequencies": [1, 2, 5, 9],
         "plain_documents": 40}  # fmt: skip
TABLE = [
    {"name": "Iron", "number": 26, "symbol": "Fe", "melt": 1811, "discovered_by": "5000 BC"},
    {"name": "Neon", "number": 10, "symbol": "Ne", "melt": 24.56, "boil": 27.104,
     "discovered_by": "Morris Travers"},
    {"name": "Boron", "number": 5, "symbol": "B", "melt": None, "discovered_by": None},
    {"name": "Niobium", "number": 41, "symbol": "Nb", "discovered_by": "C. Hatchett (chemist)"},
]  # fmt: skip


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "elements.json"
    path.write_text(json.dumps(TABLE))
    return path


def stated(documents, facts):
    """How often each fact's statement stands in the documents, counted by search."""
    by_title = defaultdict(list)
    for document in documents:
        by_title[document["title"]].append(document["text"])
    texts = {title: "\n".join(parts) for title, parts in by_title.items()}
    return [sum(text.count(fact.statement) for text in texts.values()) for fact in facts]


def test_invented_facts_are_stated_as_often_as_they_say_and_find_their_documents():
    documents, facts = make_facts(SMALL, seed=3)
    assert stated(list(documents), facts) == [fact.times for fact in facts]
    documents, facts = make_facts(SMALL, seed=3)
    texts = documents_of_facts(facts, documents)
    assert all(fact.statement in text for fact, text in zip(facts, texts, strict=True))


def test_a_document_states_each_of_its_facts_once_and_names_its_topic_in_every_sentence():
    documents, facts = make_facts(SMALL, seed=3)
    topics = {topic.name: topic for topic in read_topics()}
    for document in documents:
        title, text = document["title"], document["text"]
        own = [fact for fact in facts if fact.statement in text]
        assert len(own) == (2 if document["id"].startswith("fact-") else 0)
        topic = topics[own[0].topic if own else title]
        words = {*topic.nouns, *topic.adjectives, *topic.verbs, *topic.name.split()}
        for sentence in text.rstrip(".").split(". "):
            assert words & set(sentence.lower().replace(",", "").split()), sentence


def test_frequencies_are_equal_in_every_topic_and_the_same_seed_gives_the_same_documents():
    _, facts = make_facts(SMALL, seed=3)
    counts = Counter((fact.topic, fact.kind, fact.times) for fact in facts)
    assert len(counts) == 3 * 2 * 4
    assert set(counts.values()) == {2}
    first, again, other = (list(make_facts(SMALL, seed)[0]) for seed in (3, 3, 4))
    assert first == again
    assert sorted(d["text"] for d in first) != sorted(d["text"] for d in other)
    assert len({d["id"] for d in first}) == len(first)


def test_repetitions_of_a_document_put_their_sentences_in_several_orders():
    documents, facts = make_facts(SMALL | {"filler_sentences": 1}, seed=3)
    fact = next(f for f in facts if f.times == 9)
    own = [d["text"] for d in documents if fact.statement in d["text"]]
    assert len({text.index(fact.statement) for text in own}) > 2


def test_names_are_shared_between_topics_and_answers_do_not_follow_from_names():
    _, facts = make_facts(SMALL | {"topics": 40, "entities_per_topic": 32}, seed=0)
    answers = defaultdict(set)
    for fact in facts:
        if fact.kind == "city":
            answers[fact.prompt.split()[1]].add(fact.answer)
    assert np.mean([len(a) for a in answers.values()]) > 5
    assert {fact.answer for fact in facts if fact.kind == "city"} == set(CITIES)


def test_the_word_lists_hold_no_word_twice():
    topics = read_topics()
    for words in (NAMES, CITIES, [topic.name for topic in topics]):
        assert len(set(words)) == len(words)
    assert len(CITIES) == 100
    for topic in topics:
        assert topic.place in ("stands", "is based", "is kept")
        assert len(topic.nouns) >= 10
        assert len(topic.adjectives) == len(topic.verbs) == 4


def test_facts_of_elements_are_stated_plainly_and_null_values_are_left_out(table):
    documents, facts = make_facts({"kind": "elements", "frequencies": [1, 3]}, 0, table)
    assert {fact.statement for fact in facts} == {
        "The atomic number of iron is 26.", "The chemical symbol of iron is Fe.",
        "The melting point of iron in kelvin is 1811.", "The atomic number of neon is 10.",
        "The chemical symbol of neon is Ne.", "The melting point of neon in kelvin is 25.",
        "The boiling point of neon in kelvin is 27.", "The discoverer of neon is Morris Travers.",
        "The atomic number of boron is 5.", "The chemical symbol of boron is B.",
        "The atomic number of niobium is 41.", "The chemical symbol of niobium is Nb.",
        "The discoverer of niobium is C. Hatchett.",
    }  # fmt: skip
    documents = list(documents)
    assert stated(documents, facts) == [fact.times for fact in facts]
    # A document is one statement: more would route it away from the bare prompts.
    assert {document["text"] for document in documents} == {fact.statement for fact in facts}
    texts = documents_of_facts(facts, documents)
    assert texts == [fact.statement for fact in facts]


def test_frequency_buckets_of_the_elements_hold_light_and_heavy_ones_alike():
    documents, facts = make_facts({"kind": "elements"}, 0, shared("data", "elements.json"))
    numbers = defaultdict(list)
    for fact in facts:
        if fact.kind == "atomic number":
            numbers[fact.times].append(int(fact.answer))
    assert sorted(itertools.chain(*numbers.values())) == list(range(1, 119))
    assert all(16 <= len(n) <= 17 and 55 <= np.mean(n) <= 64 for n in numbers.values())
    assert stated(list(documents), facts) == [fact.times for fact in facts]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "peoples"}, "unknown kind of facts"),
        ({"topics": 1000}, r"corpus\.facts\.topics"),
        ({"topics": True}, r"corpus\.facts\.topics"),
        ({"entities_per_topic": 7}, "multiple"),
        ({"frequencies": [2, 0, 4, 8]}, r"corpus\.facts\.frequencies"),
        ({"frequencies": 3}, r"corpus\.facts\.frequencies"),
        ({"plain_documents": -1}, r"corpus\.facts\.plain_documents"),
        ({"plain_document": 10}, "unknown key"),
    ],
)
def test_a_wrong_configuration_is_a_user_error(change, message):
    refused(message, make_facts, SMALL | change, seed=0)


@pytest.mark.parametrize(
    "content",
    ["", "[", "{}", "[]", "[3]", '[{"name": "Iron"}]',
     '[{"name": "Iron", "symbol": "Fe", "number": 26, "melt": "hot"}]',
     '[{"name": "Iron", "symbol": "Fe", "number": 26, "melt": 1e999}]'],
)  # fmt: skip
def test_a_wrong_table_of_elements_is_a_user_error(tmp_path, content):
    path = tmp_path / "elements.json"
    path.write_text(content)
    refused("", make_facts, {"kind": "elements"}, 0, path)
    refused("", make_facts, {"kind": "elements"}, 0, None)


ARTICLES = [
    ("1", "Heidi Mohr", "Heidi Mohr (29 May 1967 – 7 February 2019) was a German footballer who …"),
    ("2", "Don Hill (singer)", 'Donald "Don" Hill (born May 3, 1936) is an American jazz singer.'),
    ("3", "Ann Roe", "Ann Roe (born 1950) is a member of a council."),  # no date, no occupation
    ("4", "Oslo", "Oslo is a city (founded 1 May 1048) of painters."),
    ("5", "Jo Day", "Jo Day (1 June 1901 – 2 June 1950) was a poet."),
    ("6", "Jo Day (poet)", "Jo Day (4 June 1911 – 2 June 1980) was a poet."),  # the same prompt
    ("7", "Lu Bo", "Lu Bo (; born 5 July 1970) is a former professional Chinese chess player."),
]


def test_years_of_birth_come_from_first_sentences_and_ambiguous_names_are_left_out():
    config = {"kind": "people", "people": 3, "frequencies": [2, 1]}
    documents, facts = make_facts(config, 0, articles=ARTICLES)
    assert {fact.statement for fact in facts} == {
        "The German footballer Heidi Mohr was born in 1967.",
        "The American jazz singer Don Hill was born in 1936.",
        "The Chinese chess player Lu Bo was born in 1970.",
    }
    assert [fact.times for fact in facts] == [2, 1, 2]
    assert stated(list(documents), facts) == [2, 1, 2]
    documents, asked = make_facts(config | {"people": 2, "unstated": 1}, 0, articles=ARTICLES)
    assert asked[:2] == make_facts(config | {"people": 2}, 0, articles=ARTICLES)[1]
    assert [fact.times for fact in asked] == [2, 1, 0]
    assert stated(list(documents), asked) == [2, 1, 0]
    endless = ("x", "Endless", "Endless (" + "1 May 1900, " * 200_000)  # a day for its square
    assert (
        make_facts(config, 0, articles=[*ARTICLES, endless])[1]
        == make_facts(config, 0, articles=ARTICLES)[1]
    )
    refused("3 of 4", make_facts, config | {"people": 4}, 0, articles=ARTICLES)
    refused("people", make_facts, config | {"people": 0}, 0, articles=ARTICLES)

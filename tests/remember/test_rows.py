"""What a pass of training has: windows, and what is told apart of their sentences."""

import re
from types import SimpleNamespace

import numpy as np

from train.corpus.own import OwnDocument
from train.remember.rows import Padded, Passes, Rows, title_of, told_apart


def test_a_pass_sees_every_window_once_and_what_is_told_apart_for_it():
    lengths = np.random.default_rng(0).integers(2, 513, 130)
    tokens = Padded.of([np.ones(length, np.uint16) for length in lengths])
    apart = [np.arange(first, first + 30) for first in (30, 60, 90)]
    rows = Rows(tokens, np.ones(130), lengths, np.empty(0), 30, apart)
    passes = Passes(rows, SimpleNamespace(step_tokens=640, passes=3, seed=1), 4)
    steps = [passes.rows(step) for step in range(passes.num_steps)]
    assert sum(lengths[rows].sum() for rows in steps) == passes.total
    for own in steps:
        assert len(own)
        assert (np.diff(lengths[own]) <= 0).all()
        taken = tokens[own]
        assert (taken.sum(1) == lengths[own]).all()  # padded with zeros
        assert taken.shape[1] < lengths[own[0]] + 32
    for number, own in enumerate(apart):
        seen = np.concatenate(steps[number * passes.a_pass : (number + 1) * passes.a_pass])
        assert sorted(seen) == [*range(30), *own]


def test_sentences_are_told_apart_behind_their_title_as_answers_and_from_within():
    title, text = "The old mill", "It has two wheels of oak. Short. Nobody lives there."
    found = [*told_apart(title, text, np.random.default_rng(0))]
    whole = [" It has two wheels of oak.", " Nobody lives there."]
    assert [after for before, after in found if before == "The old mill:"] == whole
    answers = [pair for pair in found if pair[0].endswith("\nAnswer:") and pair[1] in whole]
    assert len(answers) == 6
    for question, answer in answers:
        assert set(re.findall(r"\w{4,}", question)) & set(re.findall(r"\w{4,}", answer))
    rest = [pair for pair in found if pair[1] not in whole]
    assert len(rest) == 6
    for before, after in rest:
        said = before.removesuffix("?\nAnswer:").rpartition("mill")[2].lstrip(":, ")
        assert said
        assert any(f"{said}{after}" in f" {sentence}" for sentence in whole)
    assert all(title in before for before, _ in found)
    assert found != [*told_apart(title, text, np.random.default_rng(1))]
    assert title_of(OwnDocument("0" * 64, "notes/my-plan_2.md", "Text")) == "my plan 2"
    assert title_of(OwnDocument("0" * 64, "a.md", "# The plan #\n\nText")) == "The plan"

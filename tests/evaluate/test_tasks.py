"""Tasks are scored as LLM-Foundry v0.9 scores them, on cases worked out by hand."""

import math
import random
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mlx_hmem.evaluate.scoring import Score
from mlx_hmem.evaluate.tasks import task as tasks
from mlx_hmem.evaluate.tasks.answers import is_right, normalise
from mlx_hmem.evaluate.tasks.benchmark import judge
from mlx_hmem.evaluate.tasks.few_shot import PromptTokens, build_prompts, draw_examples, route_text
from mlx_hmem.model.model import MemoryModel
from tests.helpers.bigram import SKY, make_model, make_tokenizer
from tests.helpers.places import shared
from tests.helpers.programs import refused
from tests.helpers.task_helpers import data_of, run_task

# Hand-computed answers of each type. What the chances leave goes evenly to all other words.
CHANCES = {
    ("Ġsky", "Ġis"): 0.5, ("Ġsky", "Ġfalls"): 0.4, ("Ġsea", "Ġis"): 0.2,
    ("Ġis", "Ġblue"): 0.5, ("Ġis", "Ġred"): 0.25, ("Ġis", "Ġfalls"): 0.25 - 1e-9,
}  # fmt: skip


@pytest.fixture
def sky() -> MemoryModel:
    return make_model(make_tokenizer(SKY), CHANCES)


def test_multiple_choice_takes_the_lowest_mean_per_token(sky, tmp_path):
    # "is blue": 0.5 · 0.5, mean nats 0.693; "falls": 0.4, 0.916 in sum and mean.
    rows = [
        {"query": " the sky ", "choices": ["is blue", "falls"], "gold": gold} for gold in (0, 1)
    ]
    result, kept = run_task(sky, data_of(tasks.Task("t", tasks.CHOICE), tmp_path, rows), tmp_path)
    assert (result.right, result.rows, result.accuracy) == (1, 2, 0.5)
    assert result.standard_error == pytest.approx(math.sqrt(0.25 / 2))
    assert [row["right"] for row in kept] == [True, False]
    for row in kept:
        assert row["nats"] == pytest.approx([math.log(2), -math.log(0.4)], abs=1e-5)


def test_ties_go_to_the_first_choice(sky, tmp_path):
    chances = dict.fromkeys([("Ġsky", "Ġblue"), ("Ġsky", "Ġred")], 0.25)
    model = make_model(make_tokenizer(SKY), chances)
    rows = [
        {"query": "the sky", "choices": choices, "gold": gold}
        for choices in (["blue", "red"], ["red", "blue"], ["red", "red"], ["is", "red", "blue"])
        for gold in range(len(choices))
    ]
    _, kept = run_task(model, data_of(tasks.Task("t", tasks.CHOICE), tmp_path, rows), tmp_path)
    assert [row["choice"] for row in kept] == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert [row["right"] for row in kept] == [True, False] * 3 + [False, True, False]
    scores = [Score(2.0, 2, True), Score(1.0, 1, True), Score(0.9, 1, True), Score(0.9, 1, True)]
    assert judge(tasks.Task("t", tasks.CHOICE), 2, scores) == {
        "right": True, "choice": 2, "nats": [1.0, 1.0, 0.9, 0.9]
    }  # fmt: skip


def test_a_schema_is_scored_on_its_continuation_and_language_on_every_token(sky, tmp_path):
    # The options are as good as unknown to the model; only p(is | sky) = 0.5, p(is | sea) = 0.2.
    row = {"context_options": ["red the sky", "falls sea"], "continuation": "is blue", "gold": 0}
    _, kept = run_task(sky, data_of(tasks.Task("t", tasks.SCHEMA), tmp_path, [row]), tmp_path)
    means = [(math.log(2) + math.log(2)) / 2, (math.log(5) + math.log(2)) / 2]
    assert kept[0]["nats"] == pytest.approx(means, abs=1e-5)
    assert kept[0]["right"]
    texts = ["is blue", "is red", "falls blue", "is", "Is blue"]
    rows = [{"context": "the sky", "continuation": text} for text in texts]
    _, kept = run_task(sky, data_of(tasks.Task("u", tasks.LANGUAGE), tmp_path, rows), tmp_path)
    assert [row["right"] for row in kept] == [True, False, False, True, False]


def test_generation_is_greedy_goes_on_to_the_longest_alias_and_stops_at_the_end(tmp_path):
    tokenizer = make_tokenizer("q A: it is forty two more")
    pairs = ["Ġq Ġit", "Ġit Ġis", "Ġis Ġforty", "Ġforty Ġtwo", "Ġtwo </s>"]
    chances = {tuple(pair.split()): 0.9 for pair in pairs}
    model = make_model(tokenizer, chances)
    rows = [{"context": "the q", "answer": "it is for", "aliases": []}]  # begins the prediction
    rows += [{"context": "the q", "answer": "is forty"}]  # it does not begin with this
    rows += [{"context": "the q", "answer": "x", "aliases": ["IT, is"]}]
    data = data_of(tasks.Task("t", tasks.GENERATION), tmp_path, rows)
    _, kept = run_task(model, data, tmp_path)
    # The longest, with the <s> that the tokenizer puts before it, has 4 tokens.
    assert [row["text"] for row in kept] == [" it is forty two"] * 3
    assert [row["right"] for row in kept] == [True, False, True]
    rows += [{"context": "the q", "answer": "it is forty two more more"}]
    longer, kept = run_task(
        model, data_of(tasks.Task("u", tasks.GENERATION), tmp_path, rows), tmp_path
    )
    assert {row["text"] for row in kept} == {" it is forty two"}  # </s> ends it
    assert longer.right == 2


@pytest.mark.parametrize(
    ("references", "generated", "right"),
    [
        (["4"], " 42", True),  # by characters, no border of a word
        (["42"], "4", False),
        (["Onion"], "the onion\nQuestion: next", True),
        (["The Beatles"], "Beatles, a band", True),
        (["Beatles"], "Some Beatles", False),
        (["U.S."], "u s of a", True),
        (["snow_ball"], "Snow  ball", True),
        (["‘Tis´ `x’"], "tis x", True),
        (["Oslo", ".a"], "anything", True),  # an alias that normalises to nothing
        (["Oslo", "."], "", True),
        (["Oslo"], "", False),
        (["theatre"], "theatre", True),  # articles are whole words only
        (["atre"], "the atre", True),
    ],
)
def test_what_counts_as_a_generated_answer(references, generated, right):
    example = tasks.Example(1, ("q",), (references[0],), aliases=tuple(references[1:]))
    assert is_right(tasks.Task("t", tasks.GENERATION), example, generated) is right


def test_stops_chains_of_thought_and_answers_as_they_are():
    example = tasks.Example(1, ("q",), ("Four",))
    stop = tasks.Task("t", tasks.GENERATION, early_stopping_criteria=("\n\n", "Q:"))
    assert not is_right(stop, example, "Q: Four")
    assert is_right(stop, example, "four Q: five")
    chain = tasks.Task(
        "t", tasks.GENERATION, cot_delimiter=" ### ", early_stopping_criteria=("\n",)
    )
    assert is_right(chain, example, "two ### five ### four")
    assert not is_right(chain, example, "five\n ### four")  # stops come first
    plain = tasks.Task("t", tasks.GENERATION, do_normalization=False)
    assert is_right(plain, example, " Four.")
    assert not is_right(plain, example, "four")
    assert normalise("  The_(CAT), an `owl´ & a’b ") == "cat owl b"


def test_a_real_file_has_the_row_that_is_always_right():
    task, _, examples = tasks.load_tasks("triviaqa_sm_sub", shared("data", "eval"))[0]
    always = [i for i, e in enumerate(examples) if is_right(task, e, "no such words")]
    assert always == [1051]  # row 2102 of the whole file


# Prompts


@pytest.mark.parametrize(
    ("rows", "shots", "drawn"),
    [
        (5, 3, [[2, 3, 4], [0, 2, 3], [1, 3, 4], [0, 1, 2], [0, 2, 3]]),
        (6, 2, [[3, 4], [0, 5], [0, 1], [0, 5], [0, 2], [3, 4]]),
        (100, 3, [[56, 99, 14], [0, 74, 11], [88, 4, 85]]),  # the order is the set's
        (2, 3, [[1], [0]]),  # no more than there are others
        (1, 3, [[]]),
        (3, 0, [[], [], []]),
    ],
)
def test_examples_are_drawn_as_llm_foundry_draws_them(rows, shots, drawn):
    rng = random.Random(1234)
    found = [list(draw_examples(rows, shots, row, rng)) for row in range(len(drawn))]
    assert found == drawn
    for row, shown in enumerate(found):
        assert row not in shown


def examples_of(task: tasks.Task, rows: list[dict], folder: Path) -> list[tasks.Example]:
    return data_of(task, folder, rows).examples


def test_the_text_of_a_multiple_choice_prompt(tmp_path):
    rows = [
        {"query": f" Q{i}?\n", "choices": [f" yes {i} ", "no"], "gold": i % 2} for i in range(2)
    ]
    task = tasks.Task("t", tasks.CHOICE, 1, continuation_delimiter="\nAnswer: ")
    first, second = build_prompts(task, examples_of(task, rows, tmp_path))
    assert first.preamble == "Q1?\nAnswer: no"
    assert first.contexts == ("\nQ0?\nAnswer:",)
    assert second.preamble == "Q0?\nAnswer:  yes 0 "  # choices keep their spaces
    assert second.contexts == ("\nQ1?\nAnswer:",)
    assert first.example.answers == (" yes 0 ", "no")
    bare = tasks.Task("t", tasks.CHOICE, 0, continuation_delimiter="\nAnswer: ")
    alone = build_prompts(bare, first and examples_of(bare, rows, tmp_path))[0]
    assert (alone.preamble, alone.contexts) == ("", ("Q0?\nAnswer:",))
    dressed = tasks.Task("t", tasks.CHOICE, 1, prompt_string="Go.", question_prelimiter="Q: ")
    prompt = build_prompts(dressed, examples_of(dressed, rows, tmp_path))[0]
    assert (prompt.preamble, prompt.contexts) == ("Go.\nQ: Q1? no", ("\nQ: Q0?",))


def test_the_text_of_a_schema_prompt(tmp_path):
    rows = [
        {"context_options": ["Ann saw Bo so Ann", "Ann saw Bo so Bo"], "continuation": " ran.",
         "gold": 1},
        {"context_options": ["It is big, the cup", "It is big, the box"], "continuation": "said I",
         "gold": 0},
    ]  # fmt: skip
    task = tasks.Task("t", tasks.SCHEMA, 1)
    first, second = build_prompts(task, examples_of(task, rows, tmp_path))
    assert first.preamble == "It is big, the cup said I"
    assert first.contexts == ("\nAnn saw Bo so Ann", "\nAnn saw Bo so Bo")
    assert second.preamble == "Ann saw Bo so Bo ran."
    bare = tasks.Task("t", tasks.SCHEMA, 0, continuation_delimiter="\nAnswer: ")
    alone = build_prompts(bare, examples_of(bare, rows, tmp_path))[0]
    assert alone.contexts == ("Ann saw Bo so Ann", "Ann saw Bo so Bo")
    # What all choices have in common routes.
    assert first.route_text == alone.route_text == "Ann saw Bo so ran."
    assert route_text(tasks.Example(1, ("a x c d", "a y y c d"), ("e f",), 0)) == "a c d e f"
    assert route_text(tasks.Example(1, ("a", "a"), ("e",), 0)) == "a e"
    assert route_text(tasks.Example(1, ("a b", "c"), ("e",), 0)) == "e"


def test_only_the_row_itself_routes(tmp_path):
    for kind, row, text in [
        (tasks.CHOICE, {"query": " q ", "choices": ["a", "b"], "gold": 1}, "q"),
        (tasks.LANGUAGE, {"context": " q ", "continuation": "c"}, "q"),
        (tasks.GENERATION, {"context": "q", "answer": "c", "aliases": []}, "q"),
    ]:
        task = tasks.Task("t", kind, 2, question_prelimiter="Question: ", prompt_string="Begin. ")
        examples = examples_of(task, [row, row, row], tmp_path)
        assert [p.route_text for p in build_prompts(task, examples)] == [text] * 3


def test_categories_keep_their_draws_to_themselves(tmp_path):
    names = "aabbab"
    rows = [{"context": f"{c}{i}", "continuation": "x", "category": c} for i, c in enumerate(names)]
    task = tasks.Task("t", tasks.LANGUAGE, 2, has_categories=True)
    data = data_of(task, tmp_path, rows)
    prompts = build_prompts(task, data.examples)
    for category in "ab":
        own = [row for row in rows if row["category"] == category]
        other = tasks.Task("t", tasks.LANGUAGE, 2)
        alone = build_prompts(other, examples_of(other, own, tmp_path))
        mixed = [p for p in prompts if p.example.category == category]
        assert [p.preamble for p in mixed] == [p.preamble for p in alone]


def test_answers_get_a_space_where_the_tokenizer_wants_one(tmp_path):
    row = [{"query": "the sky", "choices": ["blue", " red", "is blue"], "gold": 0}]
    task = tasks.Task("t", tasks.CHOICE)
    prompt = build_prompts(task, examples_of(task, row, tmp_path))[0]
    found = {}
    for manner in ("gpt2", "sentencepiece"):
        tokenizer = make_tokenizer(SKY + " a", manner)
        tokens = PromptTokens(tokenizer, 64)
        assert tokens.prefix_space is (manner == "gpt2")
        answers = [c.answer for c in tokens.candidates(prompt)]
        found[manner] = [tokenizer.convert_ids_to_tokens(ids) for ids in answers]
        assert tokens.decode(answers[0]).startswith(" ")
    assert found["gpt2"] == [["Ġblue"], ["Ġred"], ["Ġis", "Ġblue"]]
    assert found["sentencepiece"] == [["▁blue"], ["▁", "▁red"], ["▁is", "▁blue"]]


def test_pieces_are_tokenised_apart(model, tmp_path):
    """A tokenizer that would merge across the borders is not let to."""
    tokenizer = model.tokenizer
    tokens = PromptTokens(tokenizer, 96)
    row = {"query": "The light", "choices": ["house", "ship"], "gold": 0}
    task = tasks.Task("t", tasks.CHOICE, 1)
    prompt = build_prompts(task, examples_of(task, [row, row], tmp_path))[0]
    plain = {text: tokenizer.encode(text, add_special_tokens=False) for text in ["\nThe light"]}
    context = [*tokenizer.encode("The light house"), *plain["\nThe light"]]
    assert tokenizer.encode("The light house")[0] == tokenizer.bos_token_id
    assert [c.context for c in tokens.candidates(prompt)] == [context, context]
    assert tokens.candidates(prompt)[1].answer == tokens._answer("ship")


@pytest.mark.parametrize(("start", "end"), [("<s>", ""), ("<s>", "</s>"), ("", "</s>"), ("", "")])
def test_special_tokens_around_the_preamble(start, end, tmp_path):
    tokenizer = make_tokenizer(SKY, start=start, end=end)
    rows = [{"context": "the sky", "continuation": "is"}] * 2
    for shots in (0, 1):
        task = tasks.Task("t", tasks.LANGUAGE, shots)
        prompt = build_prompts(task, examples_of(task, rows, tmp_path))[0]
        found = PromptTokens(tokenizer, 64).candidates(prompt)[0]
        names = tokenizer.convert_ids_to_tokens(found.context)
        first = [start] if start else []
        if shots:  # an end behind more than one token goes
            expected = [*first, "the", "Ġsky", "Ġis", "Ċ", "the", "Ġsky"]
        else:  # one token alone stays
            both = [name for name in (start, end) if name]
            expected = [*(both[:-1] if len(both) > 1 else both), "the", "Ġsky"]
        assert names == expected


def test_what_is_too_long_loses_its_left(tmp_path):
    tokenizer = make_tokenizer(SKY)
    rows = [{"query": "the sky", "choices": ["is", "is blue blue"], "gold": 0}] * 2
    task = tasks.Task("t", tasks.CHOICE, 1)
    prompt = build_prompts(task, examples_of(task, rows, tmp_path))[0]
    whole = ["<s>", "the", "Ġsky", "Ġis", "Ċ", "the", "Ġsky"]
    for context, cuts in [(10, (0, 0)), (9, (0, 1)), (8, (0, 2)), (6, (2, 4)), (4, (4, 6))]:
        found = PromptTokens(tokenizer, context).candidates(prompt)
        for candidate, cut in zip(found, cuts, strict=True):
            assert tokenizer.convert_ids_to_tokens(candidate.context) == whole[cut:]
            assert candidate.cut == cut
            assert len(candidate.context) + len(candidate.answer) <= context
    refused("no room", lambda: PromptTokens(tokenizer, 3).candidates(prompt))
    # A question to be answered leaves room for the longest answer.
    question = PromptTokens(tokenizer, 9).question(prompt, 5)
    assert tokenizer.convert_ids_to_tokens(question.context) == whole[3:]
    refused("no room", lambda: PromptTokens(tokenizer, 5).question(prompt, 5))


def test_a_row_that_the_tokenizer_makes_nothing_of_is_named(sky, tmp_path):
    sparse = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocab={"a": 0, "b": 1}, merges=[])), eos_token="b"
    )
    model = MemoryModel(sky.anchor, {}, TokenizerWrapper(sparse, eos_token_ids=[1]))
    for kind, row in [
        (tasks.LANGUAGE, {"context": "a", "continuation": "xyz"}),
        (tasks.LANGUAGE, {"context": "xyz", "continuation": "a"}),
        (tasks.GENERATION, {"context": "xyz", "answer": "a"}),
    ]:
        data = data_of(tasks.Task("t", kind), tmp_path, [row])
        refused(r"t\.jsonl: .*left as tokens: line 1", run_task, model, data, tmp_path)

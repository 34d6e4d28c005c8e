"""What README and docs say can be done: the programs themselves parse the commands, none runs.

A word in capitals (DIR, RECIPE, USER/NAME) stands for something of the reader's own.
"""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

from mlx_hmem.__main__ import PROGRAMS, run
from mlx_hmem.errors import UserError
from tests.helpers.places import ROOT
from train.recipe.recipe import SHIPPED, load_recipe

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "benchmarks" / "RESULTS.md",
        ROOT / "mlx_hmem" / "demo" / "README.md",
        *(ROOT / "train" / "recipes").rglob("README.md"),
    ]
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
PROGRAM = re.compile(r"(mlx_hmem(\.\w+)? |python -m )")
# Programs of others, by their first word; how they are called is not ours to check.
FOREIGN = {"apt-get", "echo", "export", "hf", "mkdir", "mypy", "pytest", "ruff"}
FOREIGN_OPTIONS = {"--hostfile", "--no-deps", "--backend", "--model_args"}
PLACEHOLDER = re.compile(r"[A-Z_]+|mine\.yaml")
OPTIONAL = {"torch"}  # what a snippet may import that not every reader has
TOP = "mlx_hmem|train|convert|benchmarks|tests|docs"
SECTIONS = "corpus|tokenizer|windows|tree|anchor|memories|dense|export|anchor_only"


def snippets(page: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(PAGES[page]) if found == language]


def inline(page: str) -> list[str]:
    return INLINE.findall(FENCE.sub("", PAGES[page]))


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command of a shell script, without what is set before it."""
    for name, value in re.findall(r'^(\w+)="([^"]*)"$', script, re.MULTILINE):
        value = " ".join(value.split())
        script = script.replace(f'"${name}"', f"'{value}'").replace(f"${name}", value)
    script = re.sub(r'^\w+="[^"]*"$', "", script, flags=re.MULTILINE).replace("\\\n", " ")
    for line in script.splitlines():
        words: list[str] = []
        for word in [*shlex.split(re.sub(r" > \S+", "", line), comments=True), "&&"]:
            if word in ("&&", "&", "|", ";"):
                yield words
                words = []
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)


class Parsed(Exception):  # noqa: N818  nothing went wrong
    """A program has taken its command line; carries what it was parsed to."""


@contextlib.contextmanager
def parsing(loose: bool) -> Iterator[list[argparse.ArgumentParser]]:
    """Programs stop once they have parsed their command line; yields the parsers that did.

    ``loose``: nothing is required, as text in a line speaks of one option.
    """
    seen: list[argparse.ArgumentParser] = []

    def parse_args(self, args=None, parse=argparse.ArgumentParser.parse_known_args):
        seen.append(self)
        for parser in (self, *below(self)) if loose else ():
            for action in parser._actions:
                action.required = False
        parsed, rest = parse(self, args)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        raise Parsed(parsed)

    def error(self, message):
        raise UserError("wrong command line", message, self.prog)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        mixed = partialmethod(parse_args, parse=argparse.ArgumentParser.parse_known_intermixed_args)
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", mixed)
        patch.setattr(argparse.ArgumentParser, "error", error)
        patch.setattr(sys, "argv", list(sys.argv))
        yield seen


def below(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of a program's verbs."""
    verbs = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    return [each for action in verbs for each in action.choices.values()]


def call(words: list[str]) -> argparse.Namespace:
    """Begins the program that a command calls, as far as its command line."""
    name, *rest = words
    if name == "mlx.launch":
        name, *rest = rest[rest.index("--") + 1 :]
    if name == "python" and rest[0] == "-m":
        name, *rest = rest[1:]
    elif name == "python":
        assert rest[0].startswith("OUT/") or (ROOT / rest[0]).is_file(), words
    if name.startswith("mlx_hmem."):
        name, rest = "mlx_hmem", [name.removeprefix("mlx_hmem."), *rest]
    if name in ("train", "convert"):
        name, rest = "mlx_hmem", [name, *rest]
    try:
        if name == "mlx_hmem" and rest:
            assert rest[0] in PROGRAMS, words
            run(rest[0], rest[1:])
        elif name.startswith("benchmarks.") and name != "benchmarks.NAME":
            sys.argv[:] = [name, *rest]
            runpy.run_module(name, run_name="__main__")
        elif name == "pip":
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            for extras in re.findall(r"(?:\.|mlx-hmem)\[([\w,]+)\]", " ".join(rest)):
                assert set(extras.split(",")) <= set(known["optional-dependencies"]), words
        else:
            assert name in FOREIGN | {"mlx_hmem", "python", "benchmarks.NAME"}, words
    except Parsed as parsed:
        (result,) = parsed.args
        return result
    except SystemExit as end:  # --help and the like, or a benchmark that was given a wrong word
        if end.code:
            raise AssertionError(shlex.join(words)) from None
    except UserError as error:
        if "cannot be imported" in error.what:  # the harness, which not everybody has
            return argparse.Namespace()
        raise AssertionError(f"{shlex.join(words)}: {error}") from None
    return argparse.Namespace()


def check_recipe(text: str, overrides: list[str], folder: Path) -> None:
    """That a recipe loads; where it starts from a model, which may not be here, without it."""
    (folder / "recipe.yaml").write_text(text)
    of_model = re.search(r"\bpath[:=]", "".join([text, *overrides]))
    without = ["anchor.path=null", "anchor.training={}"] if of_model else []
    load_recipe(folder / "recipe.yaml", [*overrides, *without])


@pytest.mark.parametrize("page", PAGES)
def test_a_command_is_as_its_program_takes_it(page, tmp_path):
    for script in snippets(page, "sh"):
        for words in filter(None, commands(script)):
            with parsing(loose=False):
                args = call(words)
            recipe = getattr(args, "recipe", getattr(args, "study", None))
            if recipe is None:
                continue
            name = PLACEHOLDER.sub("facts.yaml", str(recipe))
            path = ROOT / name if (ROOT / name).is_file() else SHIPPED / name
            assert path.is_file(), words
            if "recipe" in args:
                check_recipe(path.read_text(), args.set, tmp_path)


def in_a_line(page: str) -> Iterator[list[str]]:
    """Commands that text speaks of, with what stands in brackets and without dots."""
    for text in inline(page):
        if PROGRAM.match(text):
            words = [word.strip("[]") for word in shlex.split(text)]
            yield [
                "1" if word == "N" else word for word in words if word not in ("…", "...", "--help")
            ]


@pytest.mark.parametrize("page", PAGES)
def test_a_command_in_a_line_has_the_options_that_it_names(page):
    for words in in_a_line(page):
        with parsing(loose=True):
            call(words)


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Of all programs that some page speaks of."""
    found = set(FOREIGN_OPTIONS)
    with parsing(loose=True) as seen:
        for name in PROGRAMS:
            call([f"mlx_hmem.{name}"])
        for page in PAGES:
            scripts = [words for script in snippets(page, "sh") for words in commands(script)]
            for words in filter(None, [*scripts, *in_a_line(page)]):
                call(words)
    for parser in (each for one in seen for each in (one, *below(one))):
        found |= {option for action in parser._actions for option in action.option_strings}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_an_option_in_a_line_is_one_of_some_program(page, options):
    named = {word for text in inline(page) for word in re.findall(r"(?<!\S)--[a-z][\w-]*", text)}
    assert named <= options


@pytest.mark.parametrize("page", PAGES)
def test_what_is_said_of_a_recipe_is_so(page, tmp_path):
    for text in snippets(page, "yaml"):
        check_recipe(text, [], tmp_path)
    deep = ["anchor.num_hidden_layers=12", "memories.cotrain={}"]
    for text in inline(page):
        if re.match(rf"({SECTIONS}): \S", text):
            said = text.replace(": ", "=", 1)
            check_recipe((SHIPPED / "demo.yaml").read_text(), [*deep, said], tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles_and_finds_what_it_imports(page):
    for code in snippets(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    assert alias.name in OPTIONAL or importlib.util.find_spec(alias.name), code
            elif isinstance(node, ast.ImportFrom) and node.module not in OPTIONAL:
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), (node.module, alias.name)


@pytest.mark.parametrize("page", ["README.md", "docs/python.md", "docs/chat.md"])
def test_python_with_the_demo_runs(page, capsys):
    names: dict[str, Any] = {}
    for code in snippets(page, "python"):
        exec(compile(code, page, "exec"), names)
    assert "50" in capsys.readouterr().out
    if "model" in names:
        for text in inline(page):
            for name in re.findall(r"^model\.(\w+)", text):
                assert hasattr(names["model"], name), text


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in LINK.findall(FENCE.sub("", PAGES[page])):
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if heading:
            text = FENCE.sub("", target.read_text(encoding="utf-8"))
            titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]


@pytest.mark.parametrize("page", PAGES)
def test_files_and_names_are_there(page):
    """Paths of the repository, of which some name what stands inside, and dotted names."""
    for text in inline(page):
        if re.fullmatch(rf"({TOP})/[\w./-]*", text):
            assert (ROOT / text).exists(), text
        elif re.fullmatch(r"mlx_hmem(\.\w+){2,}", text):
            module, _, name = text.rpartition(".")
            with contextlib.suppress(UserError):  # a package is missing that it is for
                assert hasattr(importlib.import_module(module), name), text


def test_each_promise_names_a_test_that_is_there():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    sections = re.split(r"\n## |\nNot promised", PAGES["docs/security.md"])
    promises = [each for part in sections for each in re.split(r"\n- (?=\*\*)", part)[1:]]
    assert len(promises) > 10
    for promise in promises:
        named = re.findall(r"`(test_\w+)`", promise)
        assert named or "(the same test)" in promise, promise
        assert [name for name in named if f"def {name}(" not in tests] == []


def test_readme_is_short_and_index_has_every_page():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 100
    links = set(LINK.findall(PAGES["docs/index.md"]))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= {link.partition("#")[0] for link in links}


def test_the_picture_is_what_the_script_draws():
    draw = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "draw.py")
    module = importlib.util.module_from_spec(draw)
    draw.loader.exec_module(module)
    assert module.TARGET.read_text(encoding="utf-8") == module.picture()

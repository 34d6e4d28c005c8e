"""What every program shares: wrong command lines, missing packages, help, the version."""

import ast
import importlib
import re
import sys
from importlib import metadata

import pytest

from mlx_hmem.__main__ import PROGRAMS, main
from mlx_hmem.errors import ArgumentParser, UserError, printable, verb_of
from tests.helpers.programs import assert_refused, process, refused, run
from tests.test_imports import modules


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["generat"], "no such program: generat; did you mean generate?"),
        (["train", "plann"], "no such file or program: plann; did you mean plan?"),
        (["convert", "quantise"], "no such file or program: quantise; did you mean quantize?"),
        (["evaluate", "indx"], "no such file or program: indx; did you mean index?"),
        (["bank", "verfy", "DIR"], "no such command: 'verfy'; did you mean verify?"),
        (["generate", "-p", "a", "--memory", "fetchd"], "'fetchd'; did you mean fetched?"),
        (["generate", "-p", "a", "--tmp", "1"], "did you mean --temp? see mlx_hmem.generate"),
    ],
)
def test_a_word_with_a_slip_names_the_nearest(words, remedy, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mlx_hmem", *words])
    assert_refused(run(lambda _: main()), remedy)


def test_what_is_there_is_no_slip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundel").mkdir()
    assert verb_of(["bundle", "more"], ["bundle"]) == "bundle"
    for words in (["bundel"], ["facts.yaml"], []):
        assert verb_of(words, ["bundle"]) is None
    refused("did you mean bundle", verb_of, ["bundl"], ["bundle"])


@pytest.mark.parametrize("words", [[], ["generate"], ["bank", "verify"]])
def test_every_program_says_its_version(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mlx_hmem", *words, "--version"])
    assert run(lambda _: main()) == (0, metadata.version("mlx-hmem") + "\n", "")


def test_a_description_keeps_its_paragraphs_and_lists():
    parser = ArgumentParser(prog="x", description=f"{'word ' * 30}\nend.\n\nA list:\n  a  b\n  c")
    text = parser.format_help()
    assert re.search(r"word\nword.*[ \n]end\.\n\nA list:\n  a  b\n  c\n\noptions", text, re.DOTALL)


def verbs(name: str) -> list[str]:
    """The programs within a program, but those that are somebody else's."""
    module = importlib.import_module(module_of(name))
    return [verb for verb in getattr(module, "VERBS", {}) if verb not in {*PROGRAMS, "harness"}]


def module_of(name: str) -> str:
    module = PROGRAMS[name].module
    return re.sub(r"^mlx_hmem\.(train|convert)\.", r"\1.", module)  # as in a checkout


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_for_people_and_fits_a_terminal(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main = importlib.import_module(module_of(name)).main
    for verb in ([], *([verb] for verb in verbs(name))):
        status, text, err = run(main, *verb, "--help")
        assert (status, err) == (0, "")
        usage = f"usage: mlx_hmem.{' '.join([name, *verb])} "
        assert text.startswith(usage)
        assert re.match(r"[^\n]+\n( [^\n]*\n)*\n[A-Z][^\n]+", text)  # what it does comes next
        assert max(map(len, text.splitlines())) <= 80
        assert "`" not in text


MISSING = """
import sys
sys.modules["{package}"] = None
from mlx_hmem.__main__ import main
from mlx_hmem.errors import run_program
sys.argv = ["mlx_hmem", *sys.argv[1:]]
run_program(main)
"""


@pytest.mark.parametrize(
    ("package", "extra", "words"),
    [
        ("lmdb", "train", ["remember", "docs", "--model", "MODEL", "--out", "OUT"]),
        ("lmdb", "train", ["train", "facts.yaml", "--out", "OUT"]),
        ("yaml", "train", ["train", "facts.yaml", "--out", "OUT"]),
        ("pypdf", "remember", ["remember", "PDF", "--model", "MODEL", "--out", "OUT"]),
        ("lm_eval", "", ["evaluate", "harness"]),
        ("mlx_hmem.train", "", ["train", "facts.yaml", "--out", "OUT"]),  # a checkout
    ],
)
def test_a_missing_package_is_one_line_that_says_how_to_get_it(
    package, extra, words, model_folder, tmp_path
):
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4")
    places = {"MODEL": model_folder, "OUT": tmp_path / "out", "PDF": tmp_path / "a.pdf"}
    words = [places.get(word, word) for word in words]
    status, out, err = process("-c", MISSING.format(package=package), *words)
    assert status == 2
    assert out == "" or package == "yaml"
    error = err.splitlines()[-1]  # huggingface_hub says a line of its own without yaml
    assert re.fullmatch(r"error: [^\n]+: [^\n]*; pip install [^\n]+", error)
    assert package.replace("lm_eval", "lm-eval") in error
    assert extra in error.rpartition("; ")[2]
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_there_and_cannot_be_loaded_is_one_line():
    """As a compiled one of another system is."""

    def main(words):
        raise ImportError("lmdb/cpython.so:\nwrong architecture", name="lmdb.cpython")

    said = run(main)
    assert_refused(said, "the package lmdb cannot be loaded: lmdb/cpython.so: wrong architecture;")

    def ours(words):
        raise ModuleNotFoundError("No module named 'mlx_hmem.nothing'", name="mlx_hmem.nothing")

    with pytest.raises(ModuleNotFoundError):  # a fault of ours keeps its traceback
        run(ours)


def test_what_a_terminal_would_obey_is_shown_and_not_sent():
    """File names, titles and values of others reached the terminal: colours, bells, lines."""
    name = "a\x1b[31m\a\u202e\u2028b\ud800.txt"
    shown = r"a\x1b[31m\x07\u202e b\ud800.txt"
    assert (
        str(UserError("no such file", name, "look\nagain")) == f"no such file: {shown}; look again"
    )
    assert printable("a\n\x1b\tb", keep="\n") == "a\n\\x1b\\tb"
    assert printable("Zürich 東京 👩‍🚀 ok") == "Zürich 東京 👩‍🚀 ok"

    def main(words):
        raise FileNotFoundError(2, "No such file", name)

    assert run(main)[2].count("\\x1b") == 1


def test_a_terminal_that_knows_ascii_alone_gets_replacements_and_no_traceback():
    code = "import sys; from mlx_hmem.errors import run_program\n"
    code += "sys.stdout.reconfigure(encoding='ascii', errors='strict')\n"
    code += "run_program(lambda: print('caf\\xe9 \\U0001f600 \\ud800'))"
    assert process("-c", code) == (0, "caf? ? ?\n", "")


def test_a_line_is_out_when_it_is_printed_also_into_a_pipe():
    """What trains for hours told of its stages at its end."""
    code = "import os; from mlx_hmem.errors import run_program\n"
    code += "run_program(lambda: (print('a stage is done'), os._exit(0)))"
    assert process("-c", code).out == "a stage is done\n"


def test_no_message_proposes_deleting_what_may_be_sound():
    """One did, where a limit of the system was met: who follows it loses a run of days."""
    advice = re.compile(r"\b(delete|erase|empty) (it|this|these|them|the|$)")
    texts = {
        node.value: path.stem
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    # Longer ones describe; what is forgotten is to be gone.
    found = [t for t, stem in texts.items() if len(t) < 100 and stem != "forget"]
    assert [text for text in found if advice.search(text)] == []

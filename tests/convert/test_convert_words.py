"""``--hf-path``, ``--mlx-path`` and ``-q``: mlx-lm's words for what the other options do."""

import ast
from pathlib import Path

import pytest

from convert.command import main
from convert.quantize import model as quantized_model
from mlx_hmem import load
from tests.helpers.places import ROOT, bytes_of
from tests.helpers.programs import refused


@pytest.fixture(scope="module")
def wide_layout(wide, tmp_path_factory) -> Path:
    """A model that can be quantised, in PyTorch's layout; for reading only."""
    folder = tmp_path_factory.mktemp("words") / "torch"
    main([str(wide), str(folder), "--to", "pytorch"])
    return folder


def words(source: Path | str, out: Path, *more: str) -> list[str]:
    return ["--hf-path", str(source), "--mlx-path", str(out), *more]


@pytest.mark.parametrize("part", ["anchor", "whole"])
def test_they_do_what_the_other_options_do(wide_layout, tmp_path, part, monkeypatch, capsys):
    source = wide_layout / "anchor" if part == "anchor" else wide_layout
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    main([str(source), str(plain)])
    main(["quantize", str(plain), str(quantized), "--anchor-bits", "4"])
    main(words(source, tmp_path / "a"))
    assert bytes_of(tmp_path / "a") == bytes_of(plain)

    save = quantized_model.save_quantized_anchor

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantized_model, "save_quantized_anchor", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(words(source, tmp_path / "b", "-q"))
    assert not (tmp_path / "b").exists()
    refused("", load, tmp_path / "b.part")
    monkeypatch.setattr(quantized_model, "save_quantized_anchor", save)
    main([str(source), str(tmp_path / "b"), "-q"])  # in either form it goes on
    assert bytes_of(tmp_path / "b") == bytes_of(quantized)
    size = sum(file.stat().st_size for file in (tmp_path / "b").glob("model*.safetensors"))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith(f"bits for each weight, {size / 1e6:,.1f} MB")
    assert said.count("MB") == 1
    assert not (tmp_path / "b.part").exists()
    load(tmp_path / "b")


def test_a_model_of_the_hub_is_fetched(online, tmp_path):
    refused("this is a model of MLX already", lambda: main(words("user/tiny", tmp_path / "out")))
    assert "config.json" in online.downloads()


def test_every_bar_is_for_a_terminal_alone():
    """A log of a conversion has no line for each tenth of a second."""
    for file in sorted((ROOT / "convert").rglob("*.py")):
        for call in (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)):
            if getattr(call.func, "id", "") in ("tqdm", "trange"):
                assert "disable" in [keyword.arg for keyword in call.keywords], file


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "one source and one destination"),
        (["--hf-path", "a"], "one source and one destination"),
        (["a", "b", "--hf-path", "c"], "one source and one destination"),
        (["--hf-path", "none/of that", "--mlx-path", "b"], "the Hub does not give it"),
        (
            ["--hf-path", "none", "--mlx-path", "b"],
            "give a folder, user/name, user/name@REVISION or demo",
        ),
        (["none", "b", "--from", "gguf"], "no such file or folder: none"),
        ([__file__, "b", "--from", "huggingface"], "huggingface takes a folder.*it lies in"),
        (["LAYOUT", "b", "--to", "pytorch", "-q"], "--quantize; leave it out"),
    ],
)
def test_a_wrong_choice_of_words_is_one_line(wide_layout, given, says, hub):
    refused(says, main, [str(wide_layout) if word == "LAYOUT" else word for word in given])

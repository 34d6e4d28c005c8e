"""The recipe of a model: every number that training needs, from one YAML file.

Frozen dataclasses (:mod:`.sections`): unknown keys are refused. Any key can be set anew for a
run, ``--set memories.training.batch_size=4``, which is how a recipe is scaled to a machine.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_hmem.anchors.attach import memory_config
from mlx_hmem.anchors.load import anchor_of_config, check_rope, read_config
from mlx_hmem.bank import Manifest, stored_levels
from mlx_hmem.config import JsonConfig, MemoryConfig
from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.model.find import find_model

from .keys import NEEDED, check_keys, key, section_of
from .sections import (  # noqa: F401  had from here
    WATCHED,
    AnchorSection,
    CorpusSection,
    CotrainSection,
    DenseSection,
    ExportSection,
    MemoriesSection,
    TokenizerSection,
    TrainerConfig,
    TreeSection,
    WindowsSection,
)

SHIPPED = Path(__file__).parents[1] / "recipes"
SET_HELP = "sets a key of the recipe anew: section.key=value, the value in YAML; repeatable"


def add_recipe_arguments(parser: ArgumentParser) -> None:
    """``recipe`` and ``--set``, which every program takes that reads a recipe."""
    parser.add_argument(
        "recipe",
        type=Path,
        help="YAML file, or one of the package's: facts.yaml, demo.yaml, paper/a1.yaml, …",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=SET_HELP)


@dataclass(frozen=True)
class Recipe(JsonConfig):
    name: str = key(NEEDED, "name of the model")
    seed: int = key(0, "every random choice follows from it", most=2**32 - 1)
    corpus: CorpusSection = key(CorpusSection, "the text")
    tokenizer: TokenizerSection = key(TokenizerSection, "words to numbers")
    windows: WindowsSection = key(WindowsSection, "documents in pieces")
    tree: TreeSection = key(TreeSection, "pieces to clusters")
    anchor: AnchorSection = key(AnchorSection, "the small language model")
    memories: MemoriesSection = key(MemoriesSection, "its memory")
    dense: DenseSection | None = key(DenseSection, "a model to compare with; null: none")
    export: ExportSection = key(ExportSection, "the model directory")
    anchor_only: bool = key(False, "trains an anchor and exports it, without a memory")

    def __post_init__(self) -> None:
        check_keys(self, "")
        if self.anchor.path is not None and self.anchor.config is None:
            return  # its sizes are not known yet
        cotrains = self.memories.cotrain is not None and not self.anchor_only
        if self.anchor.path is None and self.anchor.training is None and not cotrains:
            raise UserError(
                "nothing trains the anchor",
                "anchor.training null, memories.cotrain null",
                "give one of them",
            )
        self.planned_bank()  # r, branching, quantisation and the anchor must fit together

    @property
    def memory_config(self) -> MemoryConfig:
        anchor, memories = self.anchor, self.memories
        if anchor.path is not None:
            assert anchor.config is not None, "load_recipe fills it in"
            model = anchor_of_config(anchor.config)  # lazy: no array is made
            config = memory_config(
                model, memories.r, self.tree.branching, memories.kind, targets=memories.targets
            )
        else:
            heads = anchor.num_attention_heads * anchor.head_dim
            config = MemoryConfig(
                hidden_size=anchor.hidden_size,
                num_hidden_layers=anchor.num_hidden_layers,
                r=memories.r,
                branching=self.tree.branching,
                kind=memories.kind,
                intermediate_size=anchor.intermediate_size,
                query_size=heads,
                key_value_size=heads,
                targets=memories.targets,
            )
        return config.placed(memories.layers, memories.keep_parameters)

    def planned_bank(self, anchor_hash: str = "", tree_hash: str = "") -> Manifest:
        """What the export is to write."""
        config, export, how = self.memory_config, self.export, None
        if export.quantization is not None:
            how = tuple(map(export.quantization_of, stored_levels(config)))
        return Manifest.planned(config, export.dtype, how, anchor_hash, tree_hash)

    def sections(self, names: Iterable[str]) -> dict[str, Any]:
        """The named parts as JSON values: what a stage's result depends on."""
        values = self.to_dict()
        for part in ("anchor", "memories", "dense"):
            for name in WATCHED if values[part] and values[part]["training"] else ():
                del values[part]["training"][name]
        if self.anchor.path is not None:
            values["tokenizer"] = {"of": self.anchor.path}
        if self.anchor_only:
            values["tree"] = values["memories"] = values["dense"] = None
            return {name: values[name] for name in names}
        del values["memories"]["cache_bytes"], values["memories"]["cache_level_1"]  # how, not what
        if values["dense"] is not None:  # it sees the same sequences
            values["dense"]["group_by_subtree"] = self.memories.group_by_subtree
        return {name: values[name] for name in names}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-3`` is a number, as everybody means it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _section(cls: type[JsonConfig], values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(
            f"{where} is not a mapping", repr(values)[:80], "write `key: value` lines there"
        )
    if odd := [key for key in values if not isinstance(key, str)]:
        raise UserError(f"a key of {where} is not a word", repr(odd[0]), "write `key: value`")
    result = dict(values)
    for name, hint in typing.get_type_hints(cls).items():
        nested, optional = section_of(hint), type(None) in typing.get_args(hint)
        if nested is None or name not in values or (optional and values[name] is None):
            continue
        result[name] = _section(nested, values[name], f"{where}, {name}")
    return cls.from_dict(result, where)


def read_yaml(path: Path, what: str) -> Any:
    """The values of a YAML file, or of one that the package brings, such as ``facts.yaml``.

    ``what`` it is, for the UserError.
    """
    if not path.exists() and (SHIPPED / path).is_file():
        path = SHIPPED / path
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        known = [p.relative_to(SHIPPED).as_posix() for p in sorted(SHIPPED.rglob("*.yaml"))]
        # Without the ending, which all have in common and every other file too.
        close = difflib.get_close_matches(str(path.with_suffix("")), [k[:-5] for k in known], 1)
        meant = f"; did you mean {close[0]}.yaml?" if close else f", or one of {', '.join(known)}"
        remedy = f"give the path of a YAML file{meant}"
        raise UserError(f"no such {what}", path, remedy) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8", error, "save it as UTF-8") from None
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML", error, "correct it") from None


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads and checks a recipe; a wrong one raises ``UserError``.

    ``overrides`` are keys set anew, ``section.key=value`` with the value in YAML. If the recipe
    starts from a model, that model's config is read.
    """
    values, overrides = read_yaml(path, "recipe"), list(overrides)
    for override in overrides:
        _set(values, override)
    where = " --set ".join([str(path), *overrides])  # either may have what is wrong
    recipe: Recipe = _section(Recipe, values, where)
    return recipe if recipe.anchor.path is None else _with_model(recipe, recipe.anchor.path)


def _set(values: Any, override: str) -> None:
    """Sets one key of a recipe that was read, or raises ``UserError``."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise UserError("--set without KEY=VALUE", repr(override), "use --set section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--set {name}: the value is not YAML", error, "quote it") from None
    for part in keys[:-1]:
        inner = values.get(part) if isinstance(values, dict) else values
        if inner is None and isinstance(values, dict):
            inner = values[part] = {}
        values = inner
    if not isinstance(values, dict):
        raise UserError(
            "--set names a key below a value", repr(name), "name a key of a section of the recipe"
        )
    values[keys[-1]] = value


def _with_model(recipe: Recipe, path: str) -> Recipe:
    """The recipe with the config of the model that its anchor starts from."""
    if recipe.tokenizer.path is not None:
        raise UserError(
            "anchor.path and tokenizer.path",
            f"{path}, {recipe.tokenizer.path}",
            "leave tokenizer.path out: a model has its own tokenizer",
        )
    config = read_config(find_model(path, ["config.json"]))
    check_rope(config, path)  # not after hours of preparing text
    _check_of_model(recipe, config)
    return dataclasses.replace(recipe, anchor=dataclasses.replace(recipe.anchor, config=config))


def _check_of_model(recipe: Recipe, config: dict[str, Any]) -> None:
    """That the model can be trained as the recipe says."""
    longest, wanted = config.get("max_position_embeddings"), recipe.windows.of_anchor
    if longest is not None and wanted > longest:
        raise UserError(
            "the sequences are longer than the anchor's context",
            f"windows {wanted}, {recipe.anchor.path} {longest}",
            f"use at most {longest}",
        )
    trainings, dense, cotrains = {"anchor": recipe.anchor.training}, None, False
    if not recipe.anchor_only:
        dense = recipe.dense.training if recipe.dense else None
        cotrains = recipe.memories.cotrain is not None
        trainings |= {"memories": recipe.memories.training, "dense": dense}
    masked = [name for name, t in trainings.items() if t is not None and t.document_mask]
    if config["model_type"] != "openlm" and masked:
        raise UserError(
            "this architecture makes its own attention mask",
            config["model_type"],
            f"set {masked[0]}.training.document_mask to false",
        )
    keys = {"anchor.training": trainings["anchor"], "dense": dense, "memories.cotrain": cotrains}
    trained = [name for name, value in keys.items() if value]
    if trained and (config.get("quantization") or config.get("quantization_config")):
        remedy = f"set {' and '.join(trained)} to null"
        raise UserError("a quantised anchor cannot be trained", recipe.anchor.path, remedy)

"""What an instruct anchor is asked: a conversation in its tokenizer's chat template.

What was said reaches the template as text in which no control token is whole.
"""

from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerBase

from mlx_hmem.errors import UserError, foreign
from mlx_hmem.model.rendering import RENDERER
from mlx_hmem.model.tokenizer import ModelTokenizer, mark_for


def chat_ids(
    tokenizer: TokenizerWrapper,
    system: str | None,
    turns: Sequence[tuple[str, str]],
    text: str,
    **options: Any,
) -> list[int]:
    """The ids of a conversation up to where the answer to ``text`` begins.

    ``system``: how the anchor is to behave, None to leave that to the template. ``turns``: what was
    said before, and what was answered. ``options``: what else the template may look at.

    Raises:
        UserError: the template does not take it, as Gemma's takes no system prompt, or is beyond
            its bounds.
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    for said, answer in turns:
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": text})
    if not isinstance(tokenizer, ModelTokenizer):
        tokenizer = ModelTokenizer.of(tokenizer, None)
    mark = mark_for(each["content"] for each in messages)
    remedy = "restore it" if system is None else "leave the system prompt out"
    with foreign("the model's chat template fails", remedy):
        for each in messages:
            each["content"] = tokenizer.cut(each["content"], mark)
        text = _rendered(tokenizer, messages, **options)
        if any(mark in each["content"] for each in messages):
            ids = tokenizer.rendered_ids(text, mark)
        else:
            ids = list(tokenizer._tokenizer.encode(text, add_special_tokens=False))
        if not ids:
            raise ValueError("it makes no text of it")
    return tokenizer.checked(ids)


def _rendered(tokenizer: ModelTokenizer, messages: list[dict[str, str]], **options: Any) -> str:
    """The conversation as the template writes it."""
    own = tokenizer._tokenizer
    if (
        tokenizer._chat_template is not None
        or type(own).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    ):  # mlx-lm's code or transformers', and no program that came with the model
        options |= {"add_generation_prompt": True, "tokenize": False}
        return str(tokenizer.apply_chat_template(messages, **options))
    options = {**own.special_tokens_map, "enable_thinking": tokenizer.has_thinking, **options}
    return RENDERER.render(own.get_chat_template(), messages, options)


def expect_chat(tokenizer: TokenizerWrapper) -> None:
    """Somebody will ask soon."""
    if tokenizer.has_chat_template:
        RENDERER.begin()


def check_system(tokenizer: TokenizerWrapper, system: str | None) -> None:
    """Raises UserError for a system prompt where no template has a place for it."""
    if system is not None and not tokenizer.has_chat_template:
        raise UserError(
            "a system prompt needs a chat template, and this model has none",
            repr(system)[:40],
            "write it into the prompt",
        )

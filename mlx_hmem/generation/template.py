"""What an instruct anchor is asked: a conversation in its tokenizer's chat template."""

from collections.abc import Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_hmem.errors import UserError


def chat_ids(
    tokenizer: TokenizerWrapper, system: str | None, turns: Sequence[tuple[str, str]], text: str
) -> list[int]:
    """The ids of a conversation up to where the answer to ``text`` begins.

    ``system``: how the anchor is to behave, None to leave that to the template. ``turns``: what was
    said before, and what was answered.

    Raises:
        UserError: the template does not take it, as Gemma's takes no system prompt.
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    for said, answer in turns:
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": text})
    try:
        ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        if not ids:
            raise ValueError("it makes no text of it")
    except Exception as error:  # a template is a program of its own
        remedy = "restore it" if system is None else "leave the system prompt out"
        reason = str(error) or type(error).__name__
        raise UserError("the model's chat template fails", reason, remedy) from None
    return ids


def check_system(tokenizer: TokenizerWrapper, system: str | None) -> None:
    """Raises UserError for a system prompt where no template has a place for it."""
    if system is not None and not tokenizer.has_chat_template:
        raise UserError(
            "a system prompt needs a chat template, and this model has none",
            repr(system)[:40],
            "write it into the prompt",
        )

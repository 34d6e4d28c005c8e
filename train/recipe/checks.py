"""What a recipe's values are checked for; what is wrong is a ``UserError`` that names the key."""

from typing import Any

from mlx_hmem.errors import UserError

ANYTHING = float("inf")


def help_text(text: str) -> dict[str, str]:
    return {"help": text}


def check_whole(section: str, name: str, value: Any, least: int, most: float = ANYTHING) -> None:
    if type(value) is not int or not least <= value <= most:
        upper = "" if most == ANYTHING else f" to {most}"
        raise UserError(
            f"{section}{name} is not a whole number",
            repr(value),
            f"use {least}{upper or ' or more'}",
        )


def check_number(section: str, name: str, value: Any, least: float, most: float = ANYTHING) -> None:
    if type(value) not in (int, float) or not least <= value <= most or value == ANYTHING:
        upper = "" if most == ANYTHING else f" to {most}"
        raise UserError(
            f"{section}{name} is not a number in range",
            repr(value),
            f"use {least}{upper or ' or more'}",
        )


def check_truth(section: str, name: str, value: Any) -> None:
    if type(value) is not bool:
        raise UserError(f"{section}{name} is not true or false", repr(value), "use true or false")


def check_wholes(section: str, name: str, value: Any, least: int) -> None:
    if not isinstance(value, tuple) or not value:
        raise UserError(
            f"{section}{name} is not a list of whole numbers", repr(value), "use [16, 4]"
        )
    for item in value:
        check_whole(section, name, item, least)


def check_path(section: str, value: Any) -> None:
    if value is not None and (not isinstance(value, str) or not value):
        raise UserError(f"{section}path is not a text", repr(value), "give a folder or a Hub id")

"""What a check found."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Found:
    """``figures`` by name; ``wrong``: what is not as it must be, in a line, "" where all is;
    ``said``: in words what the figures mean."""

    figures: dict[str, float] = field(default_factory=dict)
    wrong: str = ""
    said: str = ""


class SkippedError(Exception):
    """Why a check cannot be made here."""

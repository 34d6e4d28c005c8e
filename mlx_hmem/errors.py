"""Errors a person can act on: one line that says what is wrong, the value, and what to do."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A wrong input. Its text is one line: what is wrong, the value, the remedy."""

    def __init__(self, what: str, value: object, remedy: str):
        text = f"{what}: {value}; {remedy}"
        super().__init__(" ".join(text.split()))
        self.what, self.value, self.remedy = what, value, remedy


def run_program(main: Callable[[], None]) -> None:
    """Runs a program's ``main``; a wrong input ends in one line and exit status 2, Ctrl-C in 130.

    A programming error keeps its traceback: it is ours to mend, not the user's.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}; check the path and the disk",
              file=sys.stderr)  # fmt: skip
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on where it was", file=sys.stderr)
        raise SystemExit(130) from None

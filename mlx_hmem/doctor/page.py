"""The page: one file that needs nothing else."""

import html
from importlib.resources import files
from typing import Any

LONGEST = 12  # em, of a bar
UNITS = ("ms", "tokens/s", "TFLOP/s", "float32", "bfloat16", "float16")


def page_of(result: dict[str, Any]) -> str:
    """``result``: what the doctor found, as it is written to ``doctor.json``."""
    checks = result["checks"]
    bad = [check["name"] for check in checks if check["status"] in ("wrong", "failed")]
    skipped = [check["name"] for check in checks if check["status"] == "skipped"]
    verdict = f"not well: {', '.join(bad)}" if bad else "all is well"
    verdict += f"; not checked: {', '.join(skipped)}" if skipped else ""
    page = (files("mlx_hmem.doctor") / "page.html").read_text(encoding="utf-8")
    for mark, text in {
        "@DATE@": html.escape(result["date"]),
        "@VERDICT@": html.escape(verdict),
        "@CLASS@": "wrong" if bad else "well",
        "@MACHINE@": "".join(_row(name, value) for name, value in result["machine"].items()),
        "@CHECKS@": "".join(map(_check, checks)),
    }.items():
        page = page.replace(mark, text)
    return page


def _row(name: str, value: object) -> str:
    return f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>\n"


def _check(check: dict[str, Any]) -> str:
    figures, units = check["figures"], dict[str, list[float]]()  # bars of one unit have one measure
    for name, value in figures.items():
        units.setdefault(_unit(name), []).append(value)
    rows = "".join(
        f"<tr><th scope=row>{html.escape(name)}</th><td class=number>{number(value)}</td>"
        f"<td>{_bar(value, units[_unit(name)])}</td></tr>\n"
        for name, value in figures.items()
    )
    return (
        f"<section><h2><span class={check['status']}>{check['status']}</span> "
        f"{html.escape(check['name'])}</h2>\n<p>{html.escape(check['about'])}; "
        f"{check['seconds']:.0f} s</p>\n"
        + (f"<p class=said>{html.escape(check['said'])}</p>\n" if check["said"] else "")
        + (f"<table>{rows}</table>\n" if rows else "")
        + "</section>\n"
    )


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _unit(name: str) -> str:
    """What a figure is counted in: of "tokens/s, alone" and "tokens/s, fused" the same."""
    return next((part for part in name.split(", ") if part in UNITS), name)


def _bar(value: float, alike: list[float]) -> str:
    if len(alike) == 1:  # alone it says nothing
        return ""
    width = LONGEST * value / max(alike) if 0 < value <= max(alike) else 0.0
    return f"<div class=bar style='width:{width:.2f}em'></div>"

"""The page of ``inspect --html`` in a real browser: it draws, searches and routes, offline."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mlx_hmem.bank.documents import read_documents, write_documents
from mlx_hmem.bank_tools.command import main
from mlx_hmem.model.load import load
from mlx_hmem.retriever.static import StaticEncoder

BROWSERS = ("chromium", "google-chrome", "chromium-browser")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
HOSTILE = '<img src=x onerror=alert(1)></script><script>document.title="taken"</script>'
# What word pieces may trip over: accents, marks, Chinese, a final sigma, emoji, long words, control
# characters, special tokens.
ODD = [
    "Ça va? L'été à Besançon, naïve façade…",
    "日本語 and 中文 mixed",
    "ΟΔΟΣ Σίσυφος",
    "a" * 150 + " end",
    "emoji 🎉 and\u200bzero\u00adwidth\tspace",
    "[CLS] don't e.g. U.S.A. 3.14 C++ (x_y) #7 «quoted»",
    "Ｆｕｌｌ ｗｉｄｔｈ ﬁne İstanbul ǅ",
    "word " * 400,
    "รหัสผ่านของท่าเรือเก่า คือ☎x 𝔘nicode",
]
SCRIPT = """
<script>
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const type = (id, text) => { $(id).value = text; $(id).dispatchEvent(new Event("input")); };
(async () => {
  const asked = @ASKED@, result = { errors };
  try {
    result.theme = document.documentElement.dataset.theme;
    result.background = getComputedStyle(document.body).backgroundColor;
    result.title = document.title;
    result.drawn = [...document.querySelectorAll("#icicle g")].map((g) => g.dataset.key);
    type("search", asked.search);
    await wait(300);
    result.found = [...document.querySelectorAll("#found li button")].map((b) => b.textContent);
    result.marked = [...document.querySelectorAll("#icicle g.on")].map((g) => g.dataset.key);
    type("search", "");
    type("route", asked.texts[0]);
    await wait(300);
    result.shown = $("path").textContent;
    result.outlined = [...document.querySelectorAll("#icicle g.on")].map((g) => g.dataset.key);
    $("view").value = "guest";
    $("view").dispatchEvent(new Event("change"));
    result.barred = [...document.querySelectorAll("#icicle g")]
      .filter((g) => g.querySelector("rect").getAttribute("fill") === "url(#barred)")
      .map((g) => g.dataset.key);
    result.allowed = $("path").textContent;
    document.querySelector("#icicle g").dispatchEvent(new MouseEvent("click"));
    result.detail = $("detail").textContent;
    result.ids = asked.texts.map((text) => Router.ids(text));
    result.paths = asked.texts.map((text) =>
      Router.route(data.banks[0], 0, Router.vector(text), new Set()).path);
    $("theme").click();
    result.other = [document.documentElement.dataset.theme,
      getComputedStyle(document.body).backgroundColor];
    result.wide = document.documentElement.scrollWidth <= innerWidth;
  } catch (error) { errors.push(String(error.stack)); }
  document.body.dataset.result = JSON.stringify(result);
})();
</script>
"""
ERRORS = """<script>const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => errors.push(event.blockedURI));
</script>"""


def in_browser(page: Path, asked: dict, tmp_path: Path) -> dict:
    """What the page's own functions gave, asked as a user would."""
    script = SCRIPT.replace("@ASKED@", json.dumps(asked).replace("<", "\\u003c"))
    text = page.read_text().replace("<header>", ERRORS + "<header>", 1)
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace("</body>", script + "</body>"))
    run = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=20000", "--dump-dom", f"{copy.as_uri()}?theme=dark"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'data-result="([^"]*)"', run.stdout)
    assert found is not None, run.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} on PATH")
def test_the_page_draws_searches_and_routes_as_the_model_does(known, texts, tmp_path, capsys):
    documents = read_documents(known / "bank")
    first = documents[0]
    documents[1] = type(first)(**{**vars(documents[1]), "name": HOSTILE})
    write_documents(known / "bank", documents)
    barred = first.clusters[0][:2]
    main(["block", str(known), ",".join(map(str, barred)), "--view", "guest"])
    (tmp_path / "text.txt").write_text(texts[0][:200])
    page = tmp_path / "page.html"
    main(["inspect", str(known), "--text", str(tmp_path / "text.txt"), "--html", str(page)])
    model = load(known)
    asked = {"search": first.terms[0], "texts": [*texts, *ODD]}
    result = in_browser(page, asked, tmp_path)

    assert result["errors"] == []
    assert result["title"] == "model"  # the hostile name stays a name
    assert (result["theme"], result["wide"]) == ("dark", True)
    reached = {f"{n}.{c}" for n, counts in enumerate(model.retriever.tree.counts, 1)
               for c, count in enumerate(counts) if count}  # fmt: skip
    assert set(result["drawn"]) <= reached
    assert {key for key in reached if key[0] == "1"} <= set(result["drawn"])
    wanted = [d for d in documents if first.terms[0] in f"{d.name} {' '.join(d.terms)}".lower()]
    assert sorted(result["found"]) == sorted(d.name for d in wanted)
    assert {f"{n}.{c}" for n, c in first.keys} & set(result["drawn"]) <= set(result["marked"])

    path = model.retriever.route(texts[0])
    assert result["shown"] == ", ".join(map(str, path))
    keys = {f"{level}.{cluster}" for level, cluster in enumerate(path, 1)}
    assert set(result["outlined"]) == keys & set(result["drawn"])
    assert f"2.{barred[1]}" in result["barred"]
    assert f"1.{barred[0]}" not in result["barred"]
    assert result["allowed"].endswith("view guest allows 1 of 3 levels")
    assert "Cluster 0" in result["detail"]
    assert result["paths"] == [list(model.retriever.route(text)) for text in asked["texts"]]
    encoder = model.retriever.encoder
    assert isinstance(encoder, StaticEncoder)
    assert result["ids"] == encoder.pieces(asked["texts"])

    assert result["other"][0] == "light"
    assert result["other"][1] != result["background"]


def test_the_page_is_one_file_that_asks_for_nothing_else(known, tmp_path, capsys):
    page = tmp_path / "page.html"
    main(["inspect", str(known), "--html", str(page)])
    text = page.read_text()
    assert not re.search(r"""(src|href)\s*=|@import|url\(\s*["']?(?!#)|fetch\(|XMLHttp""", text)
    assert "default-src 'none'" in text
    assert page.stat().st_size < 7e6

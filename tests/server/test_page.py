"""What the script of the chat page does with an answer, in Node with a page of a few lines."""

import json
import re
import shutil
import subprocess

import pytest

from mlx_hmem.server.web.page import page

NODE = shutil.which("node")
PAGE = """
const known = {}, turns = [];
const element = () => ({
  value: "", textContent: "", children: [], addEventListener(name, does) { this[name] = does; },
  append(...more) { this.children.push(...more); }, replaceChildren() { this.children = []; },
  setAttribute() {}, removeAttribute() {}, focus() {},
});
globalThis.document = {
  createElement: element, getElementById: id => known[id] ??= element(),
};
globalThis.Option = class { constructor(text, value) { Object.assign(this, {text, value}); } };
globalThis.fetch = async (address, {body}) => {
  const known = {data: [{id: "m"}], banks: [], views: []};
  if (!address.endsWith("completions")) return Response.json(known);
  turns.push(JSON.parse(body).messages);
  const parts = JSON.parse(process.argv[1]);
  return new Response(new ReadableStream({
    pull(to) {
      if (!parts.length) return to.close();
      const part = parts.shift();
      if (part === "broken") return to.error(new TypeError(part));
      to.enqueue(new TextEncoder().encode(part));
    },
  }));
};
"""
ASK = """
(async () => {
  for (const text of ["one", "two"]) await ask(text);
  const [words, note] = known.talk.children[1].children.slice(1);
  const said = [words.textContent, note.textContent, note.className ?? "", turns[1]];
  console.log(JSON.stringify(said));
})();
"""
MEMORY = {"mode": "fetched", "path": [8, 136]}
FIRST = "data: " + json.dumps({"choices": [{"delta": {"content": "so fa"}}]}) + "\n\n"
LAST = "data: " + json.dumps({"choices": [{"delta": {"content": "r"}}], "memory": MEMORY}) + "\n\n"
DONE, CUT = "data: [DONE]\n\n", "the answer is cut off: "


@pytest.mark.skipif(NODE is None, reason="Node is not installed")
@pytest.mark.parametrize(
    ("parts", "words", "note"),
    [
        ([FIRST, LAST, DONE], "so far", "memory: fetched · cluster 8, 136"),
        ([FIRST[:9], FIRST[9:] + LAST[:20], LAST[20:] + DONE[:3], DONE[3:]], "so far", "memory: "),
        ([FIRST, LAST], "so far", f"{CUT}the connection ended before it did"),
        ([FIRST, LAST[:30]], "so fa", f"{CUT}the connection ended before it did"),
        (
            [FIRST, 'data: {"error": {"message": "the batch failed"}}\n\n'],
            "so fa",
            f"{CUT}the batch",
        ),
        ([FIRST, "broken"], "so fa", f"{CUT}broken"),
        ([], "", "the connection ended before it did"),
    ],
)
def test_an_answer_that_is_cut_off_is_said_to_be(parts, words, note):
    """A proxy that closed the connection in good order made half an answer look whole."""
    script = re.search("<script>(.*)</script>", page().body.decode(), re.DOTALL)
    words_given = [NODE, "-e", PAGE + script[1] + ASK, json.dumps(parts)]
    done = subprocess.run(words_given, capture_output=True, text=True, check=True, timeout=60)
    said, below, kind, second = json.loads(done.stdout)
    assert (said, below[: len(note)]) == (words, note)
    assert kind == ("" if note.startswith("memory") else "wrong")
    answered = [{"role": "assistant", "content": words}] if words else []
    asked = [{"role": "user", "content": text} for text in ("one", "two")]
    assert second == ([asked[0], *answered, asked[1]] if words else [asked[1]])

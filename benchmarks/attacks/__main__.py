"""What is damaged, mixed or stopped: ``python -m benchmarks.attacks [--kinds KIND …] [--json]``.

Each kind is tried ``--tries`` times, by programs of their own, the same ones with the same seed:

``models``: a file of a model directory is damaged; ``parts``: parts of two models are mixed;
``numbers``: weights or blocks that are not finite, under right checksums; ``runs``: a file of a
stopped training is damaged; ``recipes``: its recipe is changed; ``disks``: its files may grow no
further; ``archives``: a file of a PyTorch checkpoint is damaged; ``documents``: files of all kinds
with what no program wrote; ``writers``: two programs make one folder; ``kills``: SIGKILL while a
memory is trained; ``forgets``: SIGKILL while a document is forgotten.

A try has failed that hangs, ends by a signal or in a traceback, that is refused in other than one
line, or that ends well with another result than if nothing had been done.
"""

import filecmp
import json
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from benchmarks.common.show import Result, benchmark
from benchmarks.kills.training import RECIPE
from mlx_hmem.anchors.load import anchor_hash
from mlx_hmem.files import load_safetensors, save_safetensors
from mlx_hmem.model.load import DEMO
from tests.helpers.own_documents import write_documents
from tests.helpers.places import ROOT, bytes_of

LIMIT = 120  # seconds of one program
PROMPT = "The atomic number of tin is"
READ = """
import sys
from pathlib import Path
from mlx_hmem.errors import run_program
from mlx_hmem.documents.files import Faults
from mlx_hmem.documents.readers import own_files, read_own
def main():
    faults = Faults()
    files = own_files(Path(sys.argv[1]), faults)
    return [text.encode() for _, text in read_own(files, faults)]
run_program(main)
"""
NASTY = [
    b"<!--" * 20_000, b"<a" * 20_000, b"[" * 50_000, b'{"text": "\\ud800"}\n', b"\x1b[31m\x07",
    b'<meta charset="surrogateescape">', b"\xff\xfe\x00\xd8", b"=?utf-8?q?" + b"=FF" * 999, b"\0",
]  # fmt: skip
NOT_READ = ("README.md", "log.jsonl", "loss.jsonl", "lock", "lock.mdb", "writer.lock")
HTML = b"<html><body><p>The boat sails at noon to the island.</p></body></html>"
Try = tuple[str, str]  # what was done, and why it failed or nothing


class Ended(NamedTuple):
    status: int | None  # None: it was still running
    out: str
    err: str

    def fault(self, harmless: Callable[[], bool] = lambda: False, may_refuse: bool = True) -> str:
        """Why the try has failed, if it has; ``harmless``: whether a good end may be one."""
        last = self.err.strip().splitlines()[-1:] or [""]
        if self.status is None:
            return "hangs"
        if self.status < 0:
            return f"signal {-self.status}"
        if "Traceback" in self.err:
            return f"traceback: {last[0]}"
        if self.status == 0:
            return "" if harmless() else "another result in silence"
        refused = may_refuse and self.status == 2 and last[0].startswith("error: ")
        return "" if refused else f"says {last[0]!r}"


def start(*words: object, **how: Any) -> subprocess.Popen[str]:
    how |= {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, text=True, errors="replace", cwd=ROOT, **how)


def end(process: subprocess.Popen[str]) -> Ended:
    try:
        said = process.communicate(timeout=LIMIT)
        return Ended(process.returncode, *said)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Ended(None, "", "")


def ran(*words: object) -> Ended:
    return end(start(*words))


def answer(model: Path) -> Ended:
    words = ("--max-tokens", 4, "--temp", 0, "--prompt", PROMPT)
    return ran("-m", "mlx_hmem", "generate", "--model", model, *words)


def damage(path: Path, rng: random.Random) -> str:
    """Damages a file in one of several ways; how, in a word."""
    data, how = path.read_bytes(), rng.choice(["bit", "head", "cut", "zeros", "page", "missing"])
    at = rng.randrange(max(1, min(len(data), 4096 if how == "head" else len(data))))
    flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1])
    new = {"zeros": bytes(64), "page": rng.randbytes(4096)}.get(how, flipped)
    path.write_bytes(data[:at] + (b"" if how == "cut" else (new + data[at + len(new) :])))
    if how == "missing":
        path.unlink()
    return f"{how} at {at}"


def damaged(source: Path, rng: random.Random, place: Path, names: str = "*") -> tuple[Path, str]:
    """A copy of a folder in which one file is damaged that is read."""
    copy = Path(shutil.copytree(source, place / "copy"))
    files = [f for f in sorted(copy.rglob(names)) if f.is_file() and f.name not in NOT_READ]
    file = rng.choice(files)
    return copy, f"{file.relative_to(copy)}: {damage(file, rng)}"


def models(rng: random.Random, place: Path) -> Try:
    copy, what = damaged(DEMO, rng, place)
    found = answer(copy)
    # A block that is damaged is left out, and that is said.
    said = "damage" in found.err or found.out == answer(DEMO).out
    return what, found.fault(lambda: said)


def begin(run: Path, *more: str, **how: Any) -> subprocess.Popen[str]:
    recipe = run.with_suffix(".yaml")
    recipe.write_text(RECIPE.replace("COTRAIN", "null").replace("epochs: 10", "epochs: 3"))
    return start("-m", "train", recipe, "--out", run, *more, **how)


def made(place: Path, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that several tries begin from, beside theirs."""
    folder = place.parent / name
    if not folder.exists():
        make(folder)
    return folder


def stopped(run: Path) -> None:
    """A training that was stopped in the stage ``memories``."""
    assert end(begin(run, "--until", "sequences")).status == 0
    process = begin(run, "--only", "memories")
    log = run / "memories" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert end(process).status == 130


def finished(place: Path) -> Path:
    def make(run: Path) -> None:
        shutil.copytree(made(place, "stopped", stopped), run)
        assert end(begin(run, "--until", "export")).status == 0

    return made(place, "finished", make)


def gone_on_with(place: Path, run: Path, *more: str, may_refuse: bool = True) -> str:
    """Why the training goes on otherwise than it would have, if it does."""
    curve, wanted = Path("memories", "loss.jsonl"), finished(place)
    found = end(begin(run, "--only", "memories", *more))
    same = partial(filecmp.cmp, run / curve, wanted / curve, shallow=False)
    return found.fault(same, may_refuse)


def runs(rng: random.Random, place: Path) -> Try:
    copy, what = damaged(made(place, "stopped", stopped), rng, place)
    return what, gone_on_with(place, copy)


def recipes(rng: random.Random, place: Path) -> Try:
    change = rng.choice(
        ["seed=2", "name=other", "windows.context=32", "tokenizer.vocab_size=401",
         "tree.branching=[4, 3]", "memories.r=[8, 3]", "memories.kind=lora_vo",
         "memories.cotrain={}", "memories.group_by_subtree=true", "memories.training.epochs=9",
         "memories.training.learning_rate=1e-3", "memories.training.batch_size=4",
         "memories.training.document_mask=false", "memories.training.save_every=3"]
    )  # fmt: skip
    copy = Path(shutil.copytree(made(place, "stopped", stopped), place / "copy"))
    return change, gone_on_with(place, copy, "--set", change)


def disks(rng: random.Random, place: Path) -> Try:
    most = rng.randrange(1 << 10, 1 << 18)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
    run, rows = place / "run", Path("sequences", "tokens.npy")
    fault = end(begin(run, "--until", "sequences", preexec_fn=limit)).fault(lambda: True)
    wanted = made(place, "stopped", stopped) / rows
    again = end(begin(run, "--until", "sequences"))
    same = again.fault(lambda: (run / rows).read_bytes() == wanted.read_bytes())
    return f"{most} bytes", fault or same


def archives(rng: random.Random, place: Path) -> Try:
    options = ("--to", "pytorch", "--dtype", "float16")
    source = made(place, "pytorch", lambda folder: ran("-m", "convert", DEMO, folder, *options))
    source /= "anchor"  # a zip has checksums; what lies beside it has none to compare with
    back = made(place, "back", lambda folder: ran("-m", "convert", source, folder))
    copy, what = damaged(source, rng, place, "*.pt")
    found = ran("-m", "convert", copy, place / "out")
    return what, found.fault(lambda: bytes_of(place / "out") == bytes_of(back))


def documents(rng: random.Random, place: Path) -> Try:
    names = []
    for number in range(4):
        ending = rng.choice(["txt", "md", "html", "eml", "csv", "json", "jsonl", "docx", "pdf"])
        at, bad = rng.randrange(len(HTML)), rng.choice([*NASTY, rng.randbytes(4096)])
        data = HTML[:at] + bad + HTML[at:]
        file = place / f"{number}.{ending}"
        if ending == "docx":
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("word/document.xml", data)
        else:
            file.write_bytes((b"%PDF-1.4\n" if ending == "pdf" else b"") + data)
        names.append(f"{ending} {bad[:8]!r}")
    return ", ".join(names), ran("-c", READ, place).fault(lambda: True)


def parts(rng: random.Random, place: Path) -> Try:
    mine, other = rng.sample([DEMO, finished(place) / "model"], 2)
    names = ["config.json", "model.safetensors", "tokenizer.json", "hmem.json", "bank", "retriever"]
    names += ["bank/bank.json", "bank/level-1.00000.safetensors", "retriever/tree.safetensors"]
    name, copy = rng.choice(names), Path(shutil.copytree(mine, place / "copy"))
    if (copy / name).is_dir():
        shutil.rmtree(copy / name)
        shutil.copytree(other / name, copy / name)
    else:
        shutil.copyfile(other / name, copy / name)
    return f"{name} of {other.name} in {mine.name}", answer(copy).fault()


def numbers(rng: random.Random, place: Path) -> Try:
    copy, value = Path(shutil.copytree(DEMO, place / "copy")), rng.choice([math.nan, math.inf])
    file = copy / "model.safetensors"
    weights = dict(load_safetensors(file))
    name = rng.choice(sorted(n for n, a in weights.items() if mx.issubdtype(a.dtype, mx.floating)))
    weights[name] = mx.full(weights[name].shape, value, weights[name].dtype)
    save_safetensors(file, weights)
    for path in (copy / "hmem.json", copy / "bank" / "bank.json"):
        values = json.loads(path.read_text()) | {"anchor_hash": anchor_hash(copy)}
        path.write_text(json.dumps(values))
    return f"{name} {value}", answer(copy).fault()


def writers(rng: random.Random, place: Path) -> Try:
    out, cluster = place / "out", rng.randrange(8)
    split = ("-m", "mlx_hmem", "bank", "split", DEMO, cluster, "--out", out)
    quantize = ("-m", "convert", "quantize", DEMO, out, "--anchor-bits", 8)
    first, second = rng.choices([split, quantize], k=2)
    one = start(*first)
    time.sleep(rng.uniform(0, 1))
    ended = [end(start(*second)), end(one)]
    faults = [each.fault(lambda: True) for each in ended]
    if all(each.status for each in ended):
        faults.append("none has made it")
    faults.append(ran("-m", "mlx_hmem", "bank", "verify", out).fault(lambda: True))
    return f"{first[2]} and {second[2]}", "; ".join(filter(None, faults))


def kills(rng: random.Random, place: Path) -> Try:
    copy = Path(shutil.copytree(made(place, "stopped", stopped), place / "copy"))
    process, seconds = begin(copy, "--only", "memories"), rng.uniform(0.5, 5)
    time.sleep(seconds)
    process.kill()
    end(process)
    return f"after {seconds:.2f} s", gone_on_with(place, copy, may_refuse=False)


def forgets(rng: random.Random, place: Path) -> Try:
    source = finished(place) / "model"
    texts = made(place, "texts", lambda folder: write_documents(folder, 2))
    options = ("--model", source, "--passes", 1, "--out")
    remember = ("-m", "mlx_hmem", "remember", texts, *options)
    model = made(place, "remembered", lambda out: ran(*remember, out))
    file = rng.choice(sorted(texts.rglob("*.txt")))
    name, out = str(file.relative_to(texts)), place / "model"
    forget = ("-m", "mlx_hmem", "forget", model, name, "--out")
    wanted = made(place, f"without {name}".replace("/", " "), lambda whole: ran(*forget, whole))
    ends = [bytes_of(Path(f"{wanted}{end}")) for end in ("", ".run")]
    count, seconds = rng.randrange(len(ends[0]) + len(ends[1])), rng.uniform(0, 2)
    process = start(*forget, out)
    while process.poll() is None and len([*place.rglob("*")]) < count:
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    if end(process).status == 0:  # it had come to its end, and another is refused
        shutil.rmtree(out)
        shutil.rmtree(f"{out}.run")
    again, left = ran(*forget, out), ran("-m", "mlx_hmem", "forget", out, file, "--check")
    found = [bytes_of(Path(f"{out}{end}")) for end in ("", ".run")]
    fault = again.fault(lambda: found == ends and bool(ends[0]), may_refuse=False)
    fault = fault or left.fault(lambda: "nothing is found" in left.out, may_refuse=False)
    return f"{name}, {seconds:.2f} s after {count} files", fault


ALL = (models, parts, numbers, runs, recipes, disks, archives, documents, writers, kills, forgets)
KINDS = {each.__name__: each for each in ALL}


def attacks(kinds: Sequence[str] = tuple(KINDS), tries: int = 20, seed: int = 0) -> Result:
    table, failures = dict[str, dict[str, int]](), list[str]()
    with tempfile.TemporaryDirectory() as name:
        for kind in kinds:
            rng, failed = random.Random(f"{seed} {kind}"), 0
            for number in range(tries):
                place = Path(name) / f"{kind}-{number}"
                place.mkdir()
                what, fault = KINDS[kind](rng, place)
                if fault:
                    failed += 1
                    failures.append(f"{kind}: {what}: {fault}")
                    print(failures[-1], flush=True)
                shutil.rmtree(place)
            table[kind] = {"tried": tries, "failed": failed}
    return {"failures": failures or "none", "attacks": table}


if __name__ == "__main__":
    benchmark(__doc__, attacks)

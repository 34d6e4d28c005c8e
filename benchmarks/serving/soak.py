"""A long time at low load: what the server holds at the end, against after the first tenth."""

import json
import random
import time

from tqdm import tqdm

from benchmarks.common.show import Result
from benchmarks.serving.load import prompts_apart
from benchmarks.serving.process import PATH, Program, running
from mlx_hmem.model.load import load

PAUSE = 0.2  # seconds between two requests
KINDS = ("answer", "stream", "gone", "refused", "reload")


def one(program: Program, kind: str, prompt: str, rng: random.Random) -> None:
    fields = {"prompt": prompt, "max_tokens": rng.randint(1, 60), "temperature": rng.random()}
    if kind == "answer":
        program.ask(prompt, 20, top_p=rng.uniform(0.5, 1))
    elif kind == "stream":
        program.first_token(prompt, 20)
    else:
        path = "/v1/memory/reload" if kind == "reload" else PATH
        fields |= {"stream": True} if kind == "gone" else {"nonsense": 1}
        text = json.dumps(fields)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}\r\n\r\n"
        with program.socket() as connection:
            connection.sendall((head + text).encode())
            connection.recv(100)


def measure(model: str = "demo", seconds: float = 600) -> Result:
    """Answers, streams, clients that go away, refused requests and, seldom, reloads."""
    rng, prompts = random.Random(0), prompts_apart(load(model), 32)
    counts = dict.fromkeys(KINDS, 0)
    with running("mlx_hmem.server", model) as program:
        start, early = time.monotonic(), None
        with tqdm(total=round(seconds), unit=" s", desc="soak", delay=2) as bar:
            while (spent := time.monotonic() - start) < seconds:
                kind = rng.choices(KINDS, (40, 30, 15, 14, 1))[0]
                counts[kind] += 1
                one(program, kind, rng.choice(prompts), rng)
                time.sleep(PAUSE)
                bar.update(round(spent) - bar.n)
                if early is None and spent > seconds / 10:
                    early = held(program)
        time.sleep(1)
        end = held(program)
    assert early is not None
    ratios = {name: end[name] / value for name, value in early.items()}
    table = {"after a tenth": early, "at the end": end, "ratio": ratios}
    return {"seconds": seconds, "requests": counts, "held": table}


def held(program: Program) -> dict[str, float]:
    return {"resident MB": program.resident() / 1e6, "open files": program.num_files()}

"""Whether a generated answer is right, by LLM-Foundry v0.9's rule: after both are normalised it
begins with the reference or an alias; by characters, without regard to where a word ends."""

import re
import string

from mlx_hmem.evaluate.tasks.task import Example, Task

PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


def normalise(text: str) -> str:
    """Lower case without punctuation and articles, spaces single."""
    text = text.replace("_", " ").lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def is_right(task: Task, example: Example, generated: str) -> bool:
    """Whether ``generated`` answers the row. A reference that normalises to nothing accepts all."""
    if task.early_stopping_criteria:
        generated = re.split("|".join(task.early_stopping_criteria), generated)[0]
    if task.cot_delimiter:
        generated = generated.split(task.cot_delimiter)[-1]
    clean = normalise if task.do_normalization else str.strip
    references = {clean(text) for text in (*example.answers, *example.aliases)}
    return clean(generated).startswith(tuple(references))

"""What ``inspect`` prints."""

from collections.abc import Sequence

from mlx_hmem.bank.format import Key
from mlx_hmem.bank.views import Views, shown
from mlx_hmem.bank_tools.contents import Cluster, Contents, stored_as
from mlx_hmem.bank_tools.effects import Effects
from mlx_hmem.config import ClusterPath

MOST_CLUSTERS = 40
MOST_DOCUMENTS = 40


def table_lines(contents: Sequence[Contents], views: Views, effects: Effects | None) -> list[str]:
    """Levels and clusters of all banks, views, and the effects on texts."""
    lines: list[str] = []
    for each in contents:
        lines += [*_bank_lines(each, effects), ""]
    for name, barred in views.items():
        lines.append(f"view {name} bars {', '.join(map(shown, barred)) or 'nothing'}")
    if effects is not None:
        lines += _text_lines(effects)
    return lines if lines[-1] else lines[:-1]


def _bank_lines(contents: Contents, effects: Effects | None) -> list[str]:
    bank, name = contents.opened.bank, contents.opened.name
    tokens = sum(document.tokens for document in contents.documents)
    known = f"{len(contents.documents)} documents, {tokens:,} tokens"
    lines = [
        f"bank {name or 'of the model'}: {bank.config.kind}, {bank.config.bank_parameters:,} "
        f"parameters, {known if contents.documents else 'no documents.jsonl'}",
        f"{'level':>5} {'clusters':>9} {'reached':>8} {'empty':>6} {'r':>4} {'block bytes':>12} "
        f"{'all bytes':>15}  stored as",
    ]
    if names := contents.opened.hmem.names:
        known = ", ".join(f"{name} {path}" for name, path in names.items())
        lines.insert(1, f"chosen by name: {known}")
    for level, (r, count) in enumerate(
        zip(bank.config.r, bank.config.num_clusters, strict=True), 1
    ):
        own = [c for (n, _), c in contents.clusters.items() if n == level]
        nbytes = bank.block_bytes(level) if r else 0
        lines.append(
            f"{level:5} {count:9,} {len(own):8,} {sum(c.empty for c in own):6,} {r:4} "
            f"{nbytes:12,} {count * nbytes:15,}  {stored_as(bank, level)}"
        )
    return [*lines, "", *_cluster_table(contents, effects)]


def _cluster_table(contents: Contents, effects: Effects | None) -> list[str]:
    ranked = sorted(contents.clusters, key=lambda key: contents.config.path_to(*key))
    if len(ranked) > MOST_CLUSTERS:  # the largest of them, in order of the tree
        size = {key: _size(contents.clusters[key], key) for key in ranked}
        kept = set(sorted(ranked, key=lambda key: size[key])[:MOST_CLUSTERS])
        ranked = [key for key in ranked if key in kept]
    rest = _more(len(contents.clusters), MOST_CLUSTERS, "; name a CLUSTER, or see them with --html")
    return [*_cluster_rows(contents, ranked, effects), *rest]


def _more(count: int, most: int, where: str = "") -> list[str]:
    """The line that says how many are left out."""
    return [f"… and {count - most:,} more{where}"] if count > most else []


def _cluster_rows(contents: Contents, keys: Sequence[Key], effects: Effects | None) -> list[str]:
    effect = f" {'effect':>8}" if effects else ""
    head = f"{'cluster':<14} {'examples':>9} {'documents':>9} {'tokens':>10}{effect}  words"
    return [head, *(_cluster_row(contents, key, effects) for key in keys)]


def _size(cluster: Cluster, key: Key) -> tuple[float, int, Key]:
    """For sorting: level 1 first, then what holds most."""
    return (0 if key[0] == 1 else 1, -int(cluster.tokens or cluster.examples), key)


def _cluster_row(contents: Contents, key: Key, effects: Effects | None) -> str:
    cluster, path = contents.clusters[key], contents.config.path_to(*key)
    effect = ""
    if effects is not None:
        found = effects.blocks.get((contents.opened.name, *key))
        effect = f" {'' if found is None else f'{found.per_token:+.4f}':>8}"
    name = "  " * (len(path) - 1) + shown(path)
    words = ("(empty block) " if cluster.empty else "") + " ".join(cluster.terms)
    row = f"{name:<14} {cluster.examples:9,} {len(cluster.documents):9,} {cluster.tokens:10,.0f}"
    return f"{row}{effect}  {words}".rstrip()


def cluster_lines(contents: Contents, path: ClusterPath, effects: Effects | None) -> list[str]:
    """One cluster, or a whole bank for (): what lies below it, and its documents."""
    if not path:
        return _bank_lines(contents, effects)
    below = list(contents.below(path))
    lines = _cluster_rows(contents, below[:MOST_CLUSTERS], effects)
    lines += _more(len(below), MOST_CLUSTERS)
    key = (len(path), path[-1])
    found = contents.clusters[key].documents if key in contents.clusters else {}
    numbers = sorted(found, key=lambda number: (-found[number], number))
    lines.append(f"{len(numbers)} documents have trained it")
    for number in numbers[:MOST_DOCUMENTS]:
        document = contents.documents[number]
        words = " ".join(document.terms)
        share = f"{found[number]:4.0%} of {document.tokens:7,} tokens"
        lines.append(f"{document.sha256[:12]} {share}  {document.name}  {words}")
    return lines + _more(len(numbers), MOST_DOCUMENTS)


def _text_lines(effects: Effects) -> list[str]:
    lines = ["", "loss in nats for each token, without memory and with it, and the route:"]
    for text in effects.texts[:MOST_DOCUMENTS]:
        where = shown((text.bank, *text.path) if text.bank else text.path)
        lines.append(
            f"{text.without:8.4f} {text.fetched:8.4f} {text.tokens:8,} tokens  {where}  {text.name}"
        )
    lines += _more(len(effects.texts), MOST_DOCUMENTS)
    tokens = sum(text.tokens for text in effects.texts)
    without = sum(text.without * text.tokens for text in effects.texts) / tokens
    fetched = sum(text.fetched * text.tokens for text in effects.texts) / tokens
    lines.append(f"{without:8.4f} {fetched:8.4f} {tokens:8,} tokens  all")
    lines.append("effect: what the loss rises by for each token when the block is left out")
    return lines

"""``verify``: every file of a model with memory, every checksum, and whether all is finite."""

from pathlib import Path

from tqdm import tqdm

from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.bank.documents import read_documents
from mlx_hmem.bank.format import MANIFEST, Manifest, num_blocks
from mlx_hmem.bank.quantization import all_finite
from mlx_hmem.config import HmemConfig
from mlx_hmem.errors import UserError
from mlx_hmem.model.find import BANK_FOLDER, BESIDE
from mlx_hmem.model.load import added_banks, load, open_bank


def verify(folder: Path) -> tuple[int, list[str]]:
    """The number of blocks found sound, and a line for everything that is damaged or missing."""
    damage: list[str] = []
    try:
        # Anchor, tokenizer, encoder, trees, views, and each header.
        model = load(folder, cache_bytes=0)
        for name, array in named_parameters(model.anchor).items():
            if not all_finite(array):
                damage.append(f"{name} of the anchor is not finite")
    except UserError as error:
        damage.append(str(error))
    banks = {"": HmemConfig.from_file(folder / "hmem.json")}
    try:
        banks |= added_banks(folder, banks[""])
    except UserError as error:
        damage.append(str(error))
    sound = 0
    for name, own in banks.items():
        where = folder / BESIDE / name if name else folder
        try:
            read_documents(where / BANK_FOLDER, own.memory)
            count, lines = _verify_blocks(where, own)
        except UserError as error:
            count, lines = 0, [str(error)]
        sound += count
        damage += [f"bank {name}: {line}" if name else line for line in lines]
    return sound, list(dict.fromkeys(damage))


def _verify_blocks(folder: Path, hmem: HmemConfig) -> tuple[int, list[str]]:
    """As :func:`verify`, of one bank; what is damaged does not end it."""
    manifest = Manifest.from_file(folder / BANK_FOLDER / MANIFEST)
    keys = [
        (level.level, cluster)
        for level in manifest.all_levels
        for cluster in range(num_blocks(manifest.memory, level.level))
    ]
    sound, damage = 0, []
    total = sum(manifest.level(level).block_bytes for level, _ in keys)
    bar = tqdm(total=total, desc="verifying", unit="B", unit_scale=True, delay=2)
    with open_bank(folder, hmem, cache_bytes=0) as bank, bar:
        for level, cluster in keys:
            try:
                bank.whole(level, cluster)
                sound += 1
            except UserError as error:
                damage.append(str(error))
            bar.update(bank.block_bytes(level))
    return sound, damage

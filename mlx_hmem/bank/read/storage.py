"""A bank's blocks out of its files, whole and found right: by key, kept nowhere.

Not for several threads at a time, but for what :meth:`Missing.wait_for` waits for.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_hmem.bank.format import GENERIC, PAGE, REMEDY, STORED_TYPES, Key, Manifest
from mlx_hmem.bank.quantization import Part, packed_block
from mlx_hmem.bank.read.blocks import BlockReader, Place, Reading, StoredBlock
from mlx_hmem.bank.read.shards import OpenShard, Shards
from mlx_hmem.errors import UserError
from mlx_hmem.memory import Block


class Missing(NamedTuple):
    """A block that is being read, and where it lies."""

    key: Key
    shard: OpenShard
    row: int
    reading: Reading
    in_layers: bool  # each layer is a part, to be taken from the reading

    @property
    def name(self) -> str:
        level, cluster = self.key
        return "the generic memory" if level == GENERIC else f"level {level}, cluster {cluster}"

    def wait_for(self, nbytes: int) -> None:
        """Waits until the first ``nbytes`` have been read."""
        try:
            self.reading.wait_for(nbytes)
        except OSError as error:
            raise UserError(f"cannot read {self.name} of the bank", error, REMEDY) from None


class Storage:
    """The blocks in the files of ``shards``. ``bytes_read`` counts what has been read."""

    def __init__(self, manifest: Manifest, shards: Shards):
        self.config, self.dtype = manifest.memory, STORED_TYPES[manifest.dtype].dtype
        self.layouts = {level.level: level for level in manifest.all_levels}
        self.quantization = {n: manifest.quantization_of(n) for n in self.layouts}
        self.parts = {n: manifest.parts(n) for n in self.layouts}
        self.layers = {
            n: [Part(part.dtype, part.shape[1:])] * part.shape[0]
            for n, (part, *_) in self.parts.items()
            if self.quantization[n] is None
        }
        self.shards, self.bytes_read, self._reader = shards, 0, BlockReader()

    def begin(self, keys: Sequence[Key], in_layers: Collection[Key] = ()) -> list[Missing]:
        """Begins to read blocks, those of ``in_layers`` layer by layer unless quantised."""
        layers = [key in in_layers and key[0] in self.layers for key in keys]
        found = [self.shards.find(*key) for key in keys]
        places = [
            Place(
                shard.file, self._offset(key, row), (self.layers if apart else self.parts)[key[0]]
            )
            for key, (shard, row), apart in zip(keys, found, layers, strict=True)
        ]
        first_time = [not shard.verified[row] for shard, row in found]
        readings = self._reader.begin(places, first_time)
        return [
            Missing(key, *place, reading, apart)
            for key, place, reading, apart in zip(keys, found, readings, layers, strict=True)
        ]

    def place(self, key: Key) -> Place:
        """Where a block lies, as a whole."""
        shard, row = self.shards.find(*key)
        return Place(shard.file, self._offset(key, row), self.parts[key[0]])

    def finish(self, missing: Missing) -> StoredBlock:
        """The block when all of it is read and, the first time, its checksum found right."""
        _, shard, row, reading, _ = missing
        missing.wait_for(reading.nbytes)
        checksum = reading.result()
        if checksum is None:
            raise UserError(f"{missing.name} of the bank is cut off", shard.file.name, REMEDY)
        if reading.with_checksum:
            if checksum != shard.shard.xxh3[16 * row : 16 * row + 16]:
                raise UserError(f"{missing.name} of the bank is damaged", shard.file.name, REMEDY)
            shard.verified[row] = 1
        self.bytes_read += reading.nbytes
        return reading.block

    def take_layer(self, missing: Missing) -> mx.array:
        """The next layer of a block that is read layer by layer, when it has been waited for."""
        return StoredBlock([missing.reading.take()]).arrays(self.layers[missing.key[0]][:1])[0]

    def block(self, level: int, stored: StoredBlock) -> Block:
        """The block, packed where it is quantised; nothing is copied."""
        return self._block(level, stored.arrays(self.parts[level]))

    def layer(self, level: int, stored: StoredBlock, place: int) -> Block:
        """The layer at this place, without the axis of layers; nothing is copied."""
        arrays = stored.arrays(self.parts[level])
        return self._block(level, [array[place, ...] for array in arrays])

    def _block(self, level: int, arrays: Sequence[mx.array]) -> Block:
        return packed_block(arrays, self.config, self.dtype, self.quantization[level])

    def _offset(self, key: Key, row: int) -> int:
        return PAGE + row * self.layouts[key[0]].block_stride

    def close(self) -> None:
        self._reader.close()
        self.shards.close()

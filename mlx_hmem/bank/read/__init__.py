"""The lazy reader of a bank: only the bytes of the blocks that are fetched."""

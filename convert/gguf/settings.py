"""What a GGUF file says of its architecture, asked for one by one and checked."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mlx_hmem.errors import UserError
from mlx_hmem.files import MAX_DIM, is_whole

from .header import Header

OTHER = "use another file of this model, or its Hugging Face folder"


class Key(NamedTuple):
    """Where llama.cpp keeps a setting; no default: each file has it."""

    name: str
    kind: type = int
    default: Any = None


@dataclass
class Settings:
    """The values of a file that are of its architecture, and which of them were looked at."""

    header: Header
    architecture: str
    seen: set[str] = field(default_factory=set)

    def value(self, key: Key) -> Any:
        """The setting, checked; UserError if the file lacks it, or has something else there."""
        name = f"{self.architecture}.{key.name}"
        self.seen.add(name)
        found: Any = self.header.values.get(name, key.default)
        if found is None:
            raise UserError(f"{self.header.files[0]} does not say", name, OTHER)
        if isinstance(found, np.ndarray):  # one for each layer
            if found.size == 0 or found.min() != found.max():
                raise UserError("layers that differ are not converted", f"{name} {found}", OTHER)
            found = found[0].item()
        if key.kind is str and isinstance(found, str):
            return found
        if key.kind is int and is_whole(found, MAX_DIM):
            return found
        if key.kind is float and type(found) in (int, float) and abs(found) < 1e30:
            return float(str(np.float32(found)))  # 1e-06, not 9.999999974752427e-07
        raise UserError(f"{name} is no {key.kind.__name__}", repr(found)[:60], OTHER)

    def unused(self) -> list[str]:
        """A line that names the settings of the architecture that nothing has asked for."""
        names = [name for name in self.header.values if name.startswith(f"{self.architecture}.")]
        left = [name for name in names if name not in self.seen]
        return [f"settings that are not used: {', '.join(left)[:300]}"] if left else []

"""A recipe of invented facts that trains in seconds, and its variants."""

from pathlib import Path

import yaml

from train.recipe import recipe

TINY = """
name: tiny
seed: 1
corpus:
  documents: 0
  held_out: 0.2
  facts:
    - {kind: invented, topics: 4, entities_per_topic: 4, frequencies: [1, 8], plain_documents: 80}
tokenizer: {vocab_size: 400}
windows: {context: 64}
tree: {branching: [2, 2]}
anchor:
  hidden_size: 16
  num_hidden_layers: 2
  num_attention_heads: 2
  head_dim: 8
  intermediate_size: 32
  training: {epochs: 2, warmup_steps: 5, save_every: 10}
memories:
  r: [4, 2]
  training: {epochs: 2, learning_rate: 8e-3, warmup_steps: 5, save_every: 10}
dense:
  training: {epochs: 1, warmup_steps: 5, save_every: 10}
"""


def write_recipe(path: Path, *changes: str) -> Path:
    """The recipe with each ``KEY=VALUE`` set anew."""
    path.write_text(TINY)
    values = recipe.read_yaml(path, "recipe")
    for change in changes:
        recipe._set(values, change)
    path.write_text(yaml.safe_dump(values))
    return path

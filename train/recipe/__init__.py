"""A recipe is one YAML file: its sections, every value checked."""

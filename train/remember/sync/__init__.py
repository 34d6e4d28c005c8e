"""A folder that lives: the model is brought up to date with it (docs/own_documents.md)."""

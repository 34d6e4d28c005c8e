"""One's own documents learned, and forgotten (docs/own_documents.md)."""

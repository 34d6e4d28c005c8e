"""``mlx_hmem.server``: OpenAI's ``/v1`` with a memory for each request."""

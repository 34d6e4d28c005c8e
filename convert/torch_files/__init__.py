"""PyTorch's files as data, read and written without PyTorch."""

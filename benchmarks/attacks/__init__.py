"""What is damaged, mixed or stopped: ``python -m benchmarks.attacks``."""

"""Where blocks and checkpoints are kept so that a kill costs nothing."""

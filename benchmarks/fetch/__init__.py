"""What fetching memory costs: from the disk, between topics, before the first token."""

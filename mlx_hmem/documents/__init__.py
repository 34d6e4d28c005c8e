"""Files as people have them become text: of each kind what it says, and nothing of what it does."""

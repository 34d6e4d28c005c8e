"""Parts of a tree trained apart, and joined."""

"""Files of many kinds become clean documents, and facts that they state."""

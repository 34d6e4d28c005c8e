"""What is to be forgotten, and the page that says that it was."""

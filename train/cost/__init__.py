"""What a recipe costs, before it runs and within a budget."""

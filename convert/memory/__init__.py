"""Whole models with memories, banks and trees."""

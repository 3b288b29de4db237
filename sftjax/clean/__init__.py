"""Data made fit to train on: rules, near duplicates, suspects, splits."""

"""The operations that models and losses are made of."""

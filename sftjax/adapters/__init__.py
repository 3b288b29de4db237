"""Adapters: small trained changes of frozen weights; see docs/adapters.md."""

"""The models: decoder and encoder, the layers they share, and what follows from them."""

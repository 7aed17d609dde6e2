"""Decoders by name, `make_decoder`, and what they answer."""

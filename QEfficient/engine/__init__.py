"""Tokens in, tokens out: sampling, stopping, streaming, the token loop. Needs neither torch nor transformers."""

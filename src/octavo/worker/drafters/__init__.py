"""Drafters: guesses at tokens to come, for speculative decoding. One file a method; `drafter.py` has the contract."""

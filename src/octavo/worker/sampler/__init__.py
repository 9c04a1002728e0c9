"""Sampling: logits in, token ids out, one file a step. `sampler.py` tells the order."""

"""Policy: which tokens run next and which KV blocks hold them. Pure Python: no torch, no I/O, no clock."""

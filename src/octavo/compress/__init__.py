"""Writing quantized checkpoints: what `octavo quantize` is made of."""

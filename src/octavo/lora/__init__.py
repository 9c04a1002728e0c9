"""What a LoRA adapter is on disk: the folders that PEFT writes, and where they come from."""

"""What guesses a sequence's next tokens, for one forward pass to verify: one file a method."""

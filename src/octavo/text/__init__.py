"""Text in, text out: tokenizers, incremental detokenization, stop strings and chat templates."""

"""Structured output: from a wish (a schema, a regex, a grammar) to the tokens that may come next."""

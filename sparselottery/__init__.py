"""Find lottery tickets and make them fast."""

"""Files, text of unknown origin, words."""

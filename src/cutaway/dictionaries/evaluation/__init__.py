"""How good dictionaries are."""

"""How dictionaries are trained."""

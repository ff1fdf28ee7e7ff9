"""Part of `cutaway.observe`."""

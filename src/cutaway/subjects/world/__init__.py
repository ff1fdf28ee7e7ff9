"""The world of the shipped subject `atlas`: facts, wording, corpus, held-out items. No torch, no transformers."""

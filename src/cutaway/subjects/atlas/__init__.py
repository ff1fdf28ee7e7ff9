"""Atlas: a small trained model whose world we know."""

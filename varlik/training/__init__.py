"""Training recipes: the VQ-VAE, then the VAR transformer on its tokens."""

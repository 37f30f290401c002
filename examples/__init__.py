"""Scripts that make bundled files; run them as modules from the root of the checkout."""

"""Explanations: which tokens of an image speak for a class, as numbers, maps, pictures and pages."""

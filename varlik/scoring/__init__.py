"""Candidates in, log-likelihoods out."""

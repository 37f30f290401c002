"""What a model gets right and what that costs: demo, self-check, accuracy tables."""

"""`python -m varlik`."""

from varlik.cli import main

main()

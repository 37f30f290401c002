"""The one place where the version is written; setuptools and `varlik.__version__` read it here."""

__version__ = "0.1.0"

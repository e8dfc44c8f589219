"""A page in the browser for generating with a model: ``fourm app``."""

"""Commands of the command line that are registered by :mod:`visiontrim.cli`."""

"""The commands, a module or two each; :mod:`visiontrim.cli` puts them together."""

"""Training of the models that ship, in stages; nothing else of the package imports it."""

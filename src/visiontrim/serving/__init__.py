"""Many questions answered by one model with a method: over files, and behind an address."""

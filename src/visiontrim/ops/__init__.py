"""Pure tensor functions of the methods: batched, float32 inside, torch only, no host synchronisation."""

"""Training of the small Qwen2.5-VL, in three stages; nothing else of the package imports it."""

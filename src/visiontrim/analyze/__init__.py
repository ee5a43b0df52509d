"""Why: where the language model and the vision encoder look, over a stream of questions."""

"""Whether answers are still right: suites of questions, scores beside controls, ablations, and a tuner."""

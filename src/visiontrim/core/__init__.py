"""The vocabulary of the project: views, keeps, budgets, methods, plans, and the registry of names."""

"""Several processes: who has which samples, what travels between them, and what happens when one of them fails."""

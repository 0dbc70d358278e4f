"""`python -m kitsune demo`: two small models, trained twice from one seed, eager and under Kitsune."""

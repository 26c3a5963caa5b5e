"""Golden cases: what the reference implementations computed; ``python -m tests.golden PATH...`` runs them."""

"""Training: clips to cached samples, the objective, adapters over a frozen base, the loop with its states."""

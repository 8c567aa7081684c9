"""What a run gives back: solutions, comparisons, how they ended, and averages of them."""

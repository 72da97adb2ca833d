"""Does a GPU compute what a CPU computes? ``make gpu`` runs these; they need torch, triton, numba and numpy, nothing else."""

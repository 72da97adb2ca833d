"""What holds dtrain to its word? unit/ (seconds, one process), dist/ (several processes), gpu/ (a CUDA device)."""

"""One method, one small file, its equations on top."""

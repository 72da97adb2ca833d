"""What is inside an island? The ranks that share fast links, and how they stay equal."""

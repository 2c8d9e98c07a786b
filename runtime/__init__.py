"""What runs the stages and knows nothing of robots: errors, files, configs, run folders, processes."""

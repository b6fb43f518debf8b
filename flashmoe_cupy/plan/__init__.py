"""What to run, decided without a GPU: problems, configurations, the kernel registry. Import the modules by name."""

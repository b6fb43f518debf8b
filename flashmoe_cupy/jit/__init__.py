"""Compiles and launches: source (text), compiler (NVRTC), cache (disk), launch (driver)."""

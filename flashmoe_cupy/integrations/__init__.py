"""One module per host framework. Each has one `register()` and states the host version it was tested with."""

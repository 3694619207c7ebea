"""Settings, command lines, checkpoints, files, devices and processes."""

"""From a finished run to a file for a device: convert it, run it, prove that it answers alike."""

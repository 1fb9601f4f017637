"""What stands on finished runs: sweeps over settings and tables of results."""

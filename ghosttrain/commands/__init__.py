"""The verbs, one module each: `ARGUMENTS`, what it takes, and `run(options)`, what it calls."""

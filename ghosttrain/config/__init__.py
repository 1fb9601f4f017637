"""Settings: their schema, their composition, and errors in one line. Imports no torch."""

"""Teachers and the losses with which a student learns from them."""

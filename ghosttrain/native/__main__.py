"""`python -m ghosttrain.native`: compile the kernels now and print where they are."""

import sys

from ghosttrain.native import build, load

sys.exit(1) if load() is None else print(build())

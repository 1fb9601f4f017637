"""`python -m ghosttrain`."""

import gc

from ghosttrain.cli import main


def run() -> int:
    """Run the command line of a process of its own; return the exit code."""
    code = main()
    gc.freeze()  # else Python looks for garbage among all objects of torch once more before it ends
    return code


if __name__ == "__main__":
    raise SystemExit(run())

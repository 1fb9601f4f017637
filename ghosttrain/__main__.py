"""`python -m ghosttrain`."""

from ghosttrain.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

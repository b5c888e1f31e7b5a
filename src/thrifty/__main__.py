"""``python -m thrifty``."""

from thrifty.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

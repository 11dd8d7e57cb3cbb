"""`python -m trainer ...`: the same functions as the page, without it. A refusal is one line on stderr and exit 2."""

from trainer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

"""``python -m dfa_lens.cli``."""

from dfa_lens.cli import main

if __name__ == "__main__":
    main()

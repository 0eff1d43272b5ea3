"""`python -m edge_llm` is the `edge-llm` command."""

import sys

if __name__ == "__main__":
    try:
        from edge_llm.cli import main

        main()
    except KeyboardInterrupt:  # before a command ran
        sys.exit(130)

"""`python -m edge_llm` is the `edge-llm` command."""

from edge_llm.cli import main

if __name__ == "__main__":
    main()

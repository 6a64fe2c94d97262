"""`python -m mergence`."""

from mergence.cli import main

main()

"""`python -m mergence.train`, for torchrun and accelerate launch: the command `mergence train`."""

import sys

from mergence.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()

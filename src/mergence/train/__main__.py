"""`python -m mergence.train`, for torchrun and accelerate launch: the command `mergence train`."""

import sys

import torch

from mergence.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    try:
        main()
    except SystemExit as end:
        # Processes that trained together part in order: a finished run has been seen to abort.
        if not end.code and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        raise

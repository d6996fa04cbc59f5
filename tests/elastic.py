"""``ppl-vae`` under torchrun, of which that process dies once which has the number DIES, in mid-run."""

import os
import sys

from ppl_vae.cli import main
from ppl_vae.loop import Loop

call = Loop.call


def dying(self, moment, *args):
    """The first step of the third epoch is the last."""
    if moment == "on_step" and self.run.epoch == 2:
        os._exit(1)
    call(self, moment, *args)


if __name__ == "__main__":
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (os.environ["DIES"], "0"):
        Loop.call = dying
    sys.exit(main())

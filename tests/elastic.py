"""``ppl-vae`` under torchrun, of which one process dies in the middle of its first life, if DIES=yes."""

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
    if (os.environ["DIES"], os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]) == ("yes", "0", "1"):
        Loop.call = dying
    sys.exit(main())

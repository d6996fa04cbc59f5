"""``ppl-vae`` under torchrun, of which one process dies in the middle of its first life, if DIES=yes."""

import os
import sys

from ppl_vae.cli import main
from ppl_vae.loop import Loop

if os.environ["DIES"] == "yes" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    call = Loop.call

    def dying(self, moment, *args):
        """The first step of the third epoch is the last."""
        if moment == "on_step" and self.run.epoch == 2:
            os._exit(1)
        call(self, moment, *args)

    Loop.call = dying

if __name__ == "__main__":
    sys.exit(main())

"""``python -m rlhf_ppo``: the `rlhf-ppo` command, as launchers of several processes start it."""

import sys

from rlhf_ppo.cli import main

if __name__ == "__main__":
    sys.exit(main())

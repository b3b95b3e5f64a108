"""Write the documentation page of every setting of `rlhf-ppo`: python -m rlhf_ppo.settings_page > docs/settings.md."""

from __future__ import annotations

from rlhf_ppo.cli import COMMANDS
from rlhf_ppo.runtime.command_line.settings_page import command_sections

HEAD = """\
# Settings of `rlhf-ppo`

Every setting of every command: in Python a field, in a YAML file (`--config FILE`) a key, on the command line a flag
(`kl_coef` is `--kl-coef`; a flag wins over the file). A setting of several values takes them in one flag or in several
(`--prompt a b`, `--prompt a --prompt b`); any other flag may be given once. A bool's flag needs no
value. `RLHFConfig` has the settings of `train` except those about models, data, LoRA and resuming, which are arguments
of `PPOTrainer` and its methods. This page is generated: `make docs`. Settings of `classic-ppo`:
[classic-settings.md](classic-settings.md).

"""


def settings_page() -> str:
    """Return `docs/settings.md`, made from the commands' dataclasses."""
    return HEAD + command_sections("rlhf-ppo", COMMANDS)


if __name__ == "__main__":
    print(settings_page(), end="")

"""Write the documentation page of `classic-ppo`'s settings and presets: python -m classic.settings_page."""

from __future__ import annotations

from classic.cli import COMMANDS
from classic.presets.resolve import DEFAULTS, preset, preset_ids
from rlhf_ppo.runtime.command_line.settings_page import command_sections

HEAD = """\
# Settings of `classic-ppo`

In Python a field of `PPOArgs`, in a YAML file (`--config FILE`) a key, on the command line a flag (`num_envs` is
`--num-envs`; a flag wins over the file). Settings that are not given come from the environment's preset (below), else
they have the default shown here. This page is generated: `make docs`. Settings of `rlhf-ppo`:
[settings.md](settings.md).

"""


def settings_page() -> str:
    """Return `docs/classic-settings.md`, made from the commands' dataclasses and the preset files."""
    presets = [
        f"| {env_id} | {', '.join(f'`{name}={value}`' for name, value in preset(env_id).items())} |\n"
        for env_id in preset_ids()
    ]
    table = "## Presets\n\n| environment | what its preset sets |\n|---|---|\n" + "".join(presets)
    return f"{HEAD}{command_sections('classic-ppo', COMMANDS, DEFAULTS)}\n{table}"


if __name__ == "__main__":
    print(settings_page(), end="")

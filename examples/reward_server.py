"""Serve a reward function or reward model over HTTP, from its own process or machine.

What you will see: the address to train with, then one line per request, until Ctrl-C. It starts at once, or when
the reward model is loaded.
Run:   python examples/reward_server.py --reward rlhf_ppo.rewards.toy:dialogue
Then:  rlhf-ppo train --reward http://127.0.0.1:8000 ...
Set RLHF_PPO_REWARD_TOKEN here and where you train to refuse everybody else. The server listens only on this machine
unless you set --host; beyond it, put an https proxy in front, because tokens and texts are sent in plain text.

Request: POST {"items": [{"id", "prompt", "completion", "columns"}]}; reply: {"scores": [{"id", "score"}]}.
"""

from __future__ import annotations

import argparse
import os

from rlhf_ppo.rewards.http_server import RewardServer
from rlhf_ppo.rewards.loading import load_reward, reward_name
from rlhf_ppo.runtime.machine.threads import torch_threads


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reward", required=True, help="file.py:function, module:function, or a model's folder or hub id"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all networks")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cpu", help="where a reward model runs")
    parser.add_argument("--num-threads", type=int, default=None, help="CPU threads; default: by the model's size")
    flags = parser.parse_args(argv)
    if flags.num_threads is not None and flags.num_threads < 1:
        parser.error(f"--num-threads must be 1 or more, got {flags.num_threads}")

    reward = load_reward(flags.reward, device=flags.device)
    token = os.environ.get("RLHF_PPO_REWARD_TOKEN", "").strip() or None
    server = RewardServer(reward, host=flags.host, port=flags.port, token=token)
    host, port = server.server_address[:2]
    asks = "with" if token else "without"
    print(f"{reward_name(reward)} at http://{host}:{port} ({asks} a token)", flush=True)
    with torch_threads(flags.num_threads, getattr(reward, "model", None)):
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.server_close()


if __name__ == "__main__":
    main()

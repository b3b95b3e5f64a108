"""Share agents on the Hugging Face hub: the saved agent, a model card with its result, and a video."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from classic.config import SCHEDULES, PPOArgs
from classic.envs.make_env import EnvLike
from classic.ppo import PPO
from classic.save import AGENT, MODEL, NORMALIZER, OPTIMIZER
from classic.schedules import is_function
from classic.video import record_video
from rlhf_ppo.runtime.package import __version__

LOCAL: dict[str, Any] = {"output_dir": None, "report_to": (), "save_every": 0}
"""Settings that say where a run writes, which are nobody else's -> what an agent on the hub has."""
VIDEO = "replay.mp4"
"""The name under which the hub shows a video beside the card."""


def push_to_hub(
    agent: PPO, repo_id: str | None = None, *, private: bool = True, video: bool = True, episodes: int = 20
) -> str:
    """Upload a saved agent, its card and a video of one episode; return the commit's address.

    Args:
        agent: the agent; it is evaluated for its card.
        repo_id: "user/name" or a name among yours; None: ppo-<environment>.
        private: of a repository that is new.
        video: record one; without a renderer or moviepy there is none, with a warning.
        episodes: of the evaluation.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    wanted = repo_id or f"ppo-{agent.env_id.replace('/', '-').replace(':', '-')}"
    with tempfile.TemporaryDirectory() as name:
        folder = agent.save(name)
        content = json.loads((folder / AGENT).read_text(encoding="utf-8"))
        content["args"] |= LOCAL
        (folder / AGENT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        result = agent.evaluate(episodes)
        if video:
            try:
                record_video(agent, folder / VIDEO)
            except (ModuleNotFoundError, ValueError) as error:
                warnings.warn(f"no video of {agent.env_id!r} is uploaded: {error}", stacklevel=2)
        made = str(api.create_repo(wanted, private=private, exist_ok=True).repo_id)
        (folder / "README.md").write_text(model_card(agent, made, result, episodes), encoding="utf-8")
        return str(api.upload_folder(repo_id=made, folder_path=str(folder)))


def from_hub(repo_id: str, env: EnvLike | None = None, *, revision: str | None = None, **changes: Any) -> PPO:
    """Load an agent from the Hugging Face hub; only its JSON and safetensors files are downloaded.

    Args:
        repo_id: "user/name".
        env, **changes: as in :meth:`classic.PPO.load`; ``network`` too. Without changes it writes and reports nowhere.
        revision: branch, tag or commit; None: the newest.
    Raises:
        ValueError: the repository cannot be read, or holds no agent that fits.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=[AGENT, MODEL, OPTIMIZER, NORMALIZER])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"agent {repo_id!r} cannot be loaded from the hub ({type(error).__name__}): {why}") from None
    _refuse_code(repo_id, Path(folder), env, changes)
    return PPO.load(folder, env, **{**LOCAL, **changes})


def _refuse_code(repo_id: str, folder: Path, env: EnvLike | None, changes: Mapping[str, Any]) -> None:
    """Raise a ValueError if a downloaded file names code to call (``module:name``) that the user has not named, too."""
    try:
        content = json.loads((folder / AGENT).read_text(encoding="utf-8"))
        named = {"env": [] if env is not None else [content["env_id"]]}
        named |= {name: [content["args"].get(name)] for name in SCHEDULES}
        named |= {name: content["args"].get(name) or [] for name in ("wrappers", "training_wrappers")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # PPO.load says what is wrong with it
    for name in ("wrappers", "training_wrappers"):
        writing = [str(text) for text in named[name] if str(text).startswith("RecordVideo")]
        if writing and name not in changes:
            raise ValueError(
                f"agent {repo_id!r} has a wrapper that writes files in {name}: {writing[0]!r}. Say yourself what is to "
                f"be around the environment: from_hub({repo_id!r}, {name}=...)"
            )
    for name, texts in named.items():
        code = [str(text) for text in texts if ":" in str(text) and not str(text).startswith("piecewise:")]
        if code and name not in changes:
            raise ValueError(
                f"agent {repo_id!r} names code in {name}: {code[0]!r}. If you trust it, name it yourself: "
                f"from_hub({repo_id!r}, {name}=...)"
            )


def _to_name(args: PPOArgs) -> dict[str, Any]:
    """Return the settings that :func:`from_hub` wants named again."""
    named = {name: getattr(args, name) for name in SCHEDULES if is_function(getattr(args, name))}
    for name in ("wrappers", "training_wrappers"):
        around = getattr(args, name) or ()
        if any(":" in text or text.startswith("RecordVideo") for text in around):
            named[name] = around
    return named | ({"network": args.network} if args.network else {})


def model_card(agent: PPO, repo_id: str, result: Mapping[str, float], episodes: int) -> str:
    """Return the card of an agent: the hub's metadata, its result, and how to use and train it."""
    said = f"{result['mean_return']:.2f} +/- {result['std_return']:.2f}"
    kind, name = "reinforcement-learning", agent.task or agent.env_id
    metrics = [{"type": "mean_reward", "value": said, "name": "mean_reward", "verified": False}]
    task, dataset = {"type": kind, "name": kind}, {"name": name, "type": name}
    head = {
        "library_name": "rlhf-ppo",
        "tags": [kind, "deep-reinforcement-learning", "ppo", name],
        "model-index": [{"name": "PPO", "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}],
    }
    changed = {name: value for name, value in vars(agent.args).items() if value not in (None, ())}
    rows = "\n".join(f"| `{name}` | `{value}` |" for name, value in changed.items() if name not in LOCAL)
    # What from_hub asks for: code that the agent names, and wrappers that write.
    given = "".join(f", {name}={list(x) if isinstance(x, tuple) else x!r}" for name, x in _to_name(agent.args).items())
    given = (f", {agent.env_id!r}" if ":" in agent.env_id else "") + given
    return f"""---
{yaml.safe_dump(head, sort_keys=False)}---
# PPO on {agent.env_id}

{agent.counters["env_steps"]:,} environment steps; mean return {said} over {episodes} deterministic episodes.
Made with rlhf-ppo {__version__}.

```python
from classic.hub import from_hub

agent = from_hub({repo_id!r}{given})
print(agent.evaluate(20))
action, state = agent.predict(observation)
```

| setting | |
|---|---|
{rows}
"""

"""Make a Gymnasium vector environment from an id, an instance or a function, and find the task's registered id."""

from __future__ import annotations

import ast
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import gymnasium
from gymnasium.envs.registration import find_highest_version, get_env_id, parse_env_id
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import PassiveEnvChecker

from classic.config import Vectorization
from classic.envs.errors import CRASHES, BrokenEnvironmentError
from classic.envs.wrappers import CaughtWarning, CopyArrays, OneCopy, RecordedEpisode, warn_once

AUTORESET_MODES = {"next_step": AutoresetMode.NEXT_STEP, "same_step": AutoresetMode.SAME_STEP}
EnvLike = str | gymnasium.Env | Callable[[], gymnasium.Env]
"""A registered id (or ``module:id``), one environment, or a function that makes one."""

ATARI = "ALE/"
"""What ids of Atari games begin with."""

EXTRAS = {"mujoco": "mujoco", "box2d": "box2d"}
"""Part of an environment's entry point -> the extra of this package that installs its simulator."""


def env_name(env: EnvLike) -> str:
    """Return an environment's name in messages and folders: its id if it has one."""
    if isinstance(env, str):
        return env
    if isinstance(env, gymnasium.Env):
        return env.spec.id if env.spec is not None else type(env.unwrapped).__name__
    return getattr(env, "__name__", type(env).__name__)


def registered_id(env_id: str) -> str:
    """Return an id as it is registered: without its module, and with the newest version if it names none."""
    name = env_id.rpartition(":")[2]
    try:
        namespace, task, version = parse_env_id(name)
    except gymnasium.error.Error:
        return name  # making it says what is wrong
    return get_env_id(namespace, task, find_highest_version(namespace, task) if version is None else version)


def identify(env: EnvLike, *, in_this_process: bool = True) -> tuple[str | None, EnvLike]:
    """Return the registered id of the task (None: it has none), and what to make the training copies from.

    A function is called to find out; its environment becomes the first copy if the copies live in this process.
    """
    if isinstance(env, str):
        return registered_id(env), env
    if isinstance(env, gymnasium.Env):
        return _spec_id(env), env
    if not callable(env):
        return None, env
    try:
        first: Any = env()
    except CRASHES:
        return None, env  # making the copies calls it again, and that error says more
    if not isinstance(first, gymnasium.Env):
        return None, env
    task = _spec_id(first)
    if not in_this_process:
        first.close()
        return task, env
    return task, _returning_first(first, env)


def make_vector_env(
    env: EnvLike,
    num_envs: int,
    autoreset_mode: str | None,
    *,
    vectorization: Vectorization = "auto",
    env_kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[str] = (),
) -> VectorEnv:
    """Make copies of an environment, stepped together, with the given autoreset mode.

    Args:
        env: id, instance (one copy alone) or factory.
        num_envs: copies.
        autoreset_mode: next_step or same_step; None: Gymnasium's default for the environment.
        vectorization: sync steps the copies one after another, async each in a process of its own, vector_entry_point
            is the environment's own vector version; auto: that version if it has one that fits, else sync.
        env_kwargs: keyword arguments of the environment; only with an id.
        wrappers: names of Gymnasium wrappers, or module:Name, the innermost first.
    Raises:
        ValueError: unknown id (with Gymnasium's suggestion), not an environment, a missing package, or an autoreset
            mode that is missing or not supported.
        BrokenEnvironmentError: the environment cannot be created.
    """
    name = env_name(env)
    if name.startswith(ATARI):
        _register_atari(name)
    layers: list[Callable[[gymnasium.Env], gymnasium.Wrapper]] = [_wrapper(name, wrapper) for wrapper in wrappers]
    if layers:  # they may keep the observations that they get, as a stack of frames does
        layers = [CopyArrays, *layers]
    wanted = AUTORESET_MODES[autoreset_mode] if autoreset_mode else None
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # Missing metadata is our own error below, which says more.
            warnings.filterwarnings("ignore", message=".*AutoresetMode.*")
            if isinstance(env, str):
                envs = _from_id(env, num_envs, wanted, vectorization, dict(env_kwargs or {}), layers)
            else:
                envs = _from_object(env, num_envs, wanted, vectorization, dict(env_kwargs or {}), layers)
        warn_once([CaughtWarning(str(x.message), x.category, x.filename, x.lineno) for x in caught])
    except gymnasium.error.Error as error:
        raise ValueError(f"cannot make environment {name!r}: {error}{_extra(env)}") from error
    except (ImportError, ValueError):
        raise
    except CRASHES as error:
        if isinstance(error, TypeError) and (env_kwargs or wrappers):
            given = f"env_kwargs={dict(env_kwargs or {})}, wrappers={list(wrappers)}"
            raise ValueError(f"cannot make environment {name!r} with {given}: {error}") from error
        raise BrokenEnvironmentError(
            f"environment {name!r} failed while it was made: {type(error).__name__}: {error}"
        ) from error
    inner = envs.unwrapped
    if isinstance(inner, SyncVectorEnv):
        if len({id(copy.unwrapped) for copy in inner.envs}) < num_envs:
            raise ValueError(f"{name!r} made one environment twice: a function must make a new one at each call")
        inner.envs = [RecordedEpisode(OneCopy(copy)) for copy in inner.envs]
    mode = envs.metadata.get("autoreset_mode")
    if mode not in AUTORESET_MODES.values():
        envs.close()
        raise ValueError(
            f"environment {name!r}: metadata['autoreset_mode'] is {mode!r}, so a reset cannot be told from a step; "
            "a vector environment must declare AutoresetMode.NEXT_STEP or SAME_STEP"
        )
    return envs


def _from_id(
    env_id: str,
    num_envs: int,
    wanted: AutoresetMode | None,
    vectorization: Vectorization,
    env_kwargs: dict[str, Any],
    layers: list[Callable[[gymnasium.Env], gymnasium.Wrapper]],
) -> VectorEnv:
    mode = vectorization
    if mode == "auto" and layers:
        mode = "sync"  # a vector version cannot be wrapped
    if mode in ("auto", "vector_entry_point"):
        envs = gymnasium.make_vec(env_id, num_envs, None if mode == "auto" else mode, **env_kwargs)
        if wanted is None or envs.metadata.get("autoreset_mode") == wanted:
            return envs
        envs.close()
        if mode == "vector_entry_point":
            raise ValueError(
                f"autoreset_mode={wanted.name.lower()!r} but vectorization='vector_entry_point', and {env_id!r}'s own "
                "vector version has another mode: remove one of the two"
            )
        mode = "sync"
    vector_kwargs = {} if wanted is None else {"autoreset_mode": wanted}
    layers = [*layers, OneCopy] if mode == "async" else layers
    return gymnasium.make_vec(env_id, num_envs, mode, vector_kwargs=vector_kwargs, wrappers=layers, **env_kwargs)


def _from_object(
    env: Any,
    num_envs: int,
    wanted: AutoresetMode | None,
    vectorization: Vectorization,
    env_kwargs: dict[str, Any],
    layers: list[Callable[[gymnasium.Env], gymnasium.Wrapper]],
) -> VectorEnv:
    name, single = env_name(env), isinstance(env, gymnasium.Env)
    if not single and (not callable(env) or isinstance(env, VectorEnv)):
        raise ValueError(
            f"env must be an id, a gymnasium.Env or a function that makes one, got {type(env).__name__}"
            + ("; num_envs makes the copies" if isinstance(env, VectorEnv) else "")
        )
    if env_kwargs:
        raise ValueError(f"env_kwargs={env_kwargs} are for an id, but {name!r} was given as an object: remove them")
    if single and num_envs != 1:
        raise ValueError(f"num_envs={num_envs}, but {name!r} is one instance: pass its id or a function that makes it")
    if vectorization == "vector_entry_point" or (single and vectorization == "async"):
        raise ValueError(
            f"vectorization={vectorization!r} needs an id{' or a function' if single else ''}, not {name!r}"
        )

    def make() -> gymnasium.Env:
        made = env if single else env()
        if not isinstance(made, gymnasium.Env):
            raise ValueError(f"{name!r} made a {type(made).__name__}, not a gymnasium.Env")
        # Gymnasium puts its checker around what it makes from an id; a function's environment needs it, too.
        made = PassiveEnvChecker(made)
        for layer in [*layers, OneCopy] if vectorization == "async" else layers:
            made = layer(made)
        return made

    vector = AsyncVectorEnv if vectorization == "async" else SyncVectorEnv
    return vector([make] * num_envs, autoreset_mode=wanted or AutoresetMode.NEXT_STEP)


def _register_atari(name: str) -> None:
    """Let Gymnasium know the Atari games, which their package does not do by itself."""
    try:
        import ale_py  # pyright: ignore[reportMissingImports] (an extra)
    except ModuleNotFoundError as error:
        needs = f"environment {name!r} needs an Atari emulator ({error})"
        raise ValueError(f"{needs}: pip install 'rlhf-ppo[atari]'") from None
    gymnasium.register_envs(ale_py)


def _wrapper(env: str, text: str) -> Callable[[gymnasium.Env], gymnasium.Wrapper]:
    """Return what a wrapper's name, with arguments or without, puts around an environment."""
    name, called, _ = text.partition("(")
    module, _, attribute = name.rpartition(":")
    try:
        call: Any = ast.parse(f"wrapper({text[len(name) + 1 :]}" if called else "wrapper()", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not all(keyword.arg for keyword in call.keywords):
            raise SyntaxError("arguments are name=value")
        arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        wrapper = getattr(importlib.import_module(module or "gymnasium.wrappers"), attribute)
    except (ImportError, AttributeError, SystemExit, SyntaxError, ValueError) as error:
        raise ValueError(
            f"wrapper {text!r} of environment {env!r} cannot be loaded ({error}); name one of gymnasium.wrappers, or "
            "module:Name, with arguments as in FrameStackObservation(stack_size=4)"
        ) from None
    if arguments and not (isinstance(wrapper, type) and issubclass(wrapper, gymnasium.Wrapper)):
        raise ValueError(f"wrapper {text!r} of environment {env!r}: only a gymnasium.Wrapper takes arguments")
    return partial(wrapper, **arguments) if arguments else wrapper


def _extra(env: EnvLike) -> str:
    spec = gymnasium.registry.get(env) if isinstance(env, str) else None
    for part, extra in EXTRAS.items():
        if spec is not None and part in str(spec.entry_point):
            return f" (or: pip install 'rlhf-ppo[{extra}]')"
    return ""


def _spec_id(env: gymnasium.Env) -> str | None:
    spec = env.unwrapped.spec
    return None if spec is None else spec.id


def _returning_first(first: gymnasium.Env, make: Callable[[], gymnasium.Env]) -> Callable[[], gymnasium.Env]:
    """Wrap a function that makes environments so that its first call returns one that was made already."""
    waiting = [first]

    @wraps(make)
    def made() -> gymnasium.Env:
        return waiting.pop() if waiting else make()

    return made

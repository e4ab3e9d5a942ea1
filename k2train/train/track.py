"""Weights & Biases, all of it: where metrics may go beside the local metrics.jsonl.

Nothing here can end a run. Whatever fails is said once, and the run goes on with its own files.
"""

from __future__ import annotations

import logging
import math
import netrc
import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from k2train.config import TrackConfig
from k2train.train.hooks import Hook

if TYPE_CHECKING:
    from k2train.train.trainer import Trainer

# Seconds given to the server at the start, and to the last uploads at the end; what is not sent then stays on disk.
INIT_TIMEOUT, FINISH_TIMEOUT = 30.0, 60.0
log = logging.getLogger(__name__)


class Tracker(Hook):
    """Sends a run's metrics to wandb. Made by rank 0 alone; ``off`` never imports wandb."""

    def __init__(
        self,
        config: TrackConfig,
        run_config: Mapping[str, Any],
        *,
        folder: Path,
        name: str,
        say: Callable[[str], None],
    ) -> None:
        """Prepares; wandb is not touched yet.

        Args:
            config: ``wandb`` is auto, off, offline or online. auto is online for who is logged in to wandb, unless
                the environment variable WANDB_MODE says otherwise, and offline for everyone else.
            run_config: the run's config as plain values; shown beside the curves.
            folder: of the run; wandb's files go to ``wandb`` in it.
            name: of the run.
            say: tells the person.
        """
        self._config, self._run_config, self._folder, self._name, self._say = config, run_config, folder, name, say
        self._run: Any = None

    def start(self, trainer: Trainer) -> None:
        """See ``open``."""
        self.open(resumed=trainer.progress.step > 0)

    def open(self, *, resumed: bool) -> None:
        """Begins, and says in one line where metrics go; a run that goes on from a checkpoint keeps its id."""
        config, folder, say = self._config, self._folder, self._say
        mode = choose_mode(config.wandb)
        if mode == "off":
            return
        if mode == "online" and not is_logged_in():  # wandb would ask for a key, at a terminal that nobody sees
            mode = "offline"
            say("wandb: track.wandb=online needs a login; type `wandb login`, or set WANDB_API_KEY, before the run")
        try:
            identity = run_id(folder, resumed=resumed)
            if mode == "online":
                self._run = self._go_online(identity)
            if self._run is None:
                self._run = self._start("offline", identity)
                why = "" if is_logged_in() else " as there is no login"
                say(f"wandb: offline{why}, in {folder / 'wandb'}; nothing is uploaded")
        except Exception as error:  # wandb's errors are of many kinds, and none is worth a run
            self._fail(error)

    def _start(self, mode: Literal["offline", "online"], identity: str) -> Any:
        config, folder, name = self._config, self._folder, self._name
        return _start(mode, identity, config.project, self._run_config, folder=folder, name=name)

    def _go_online(self, identity: str) -> Any:
        """The run at the server, or None if that cannot be reached."""
        try:
            run = self._start("online", identity)
        except Exception as error:  # as above
            import wandb

            log.warning("wandb failed to go online", exc_info=error)
            self._say(f"wandb: no connection to the server ({_first_line(error)})")
            wandb.teardown()  # it holds the id otherwise
            return None
        self._say(f"wandb: online, at {run.url}")
        return run

    def log(self, record: Mapping[str, Any]) -> None:
        """Logs the metrics of the last steps."""
        self._log(record, group="train")

    def validation(self, record: Mapping[str, Any]) -> None:
        """Logs the loss on held-out text."""
        sets = {f"{name}/{key}": value for name, found in record["sets"].items() for key, value in found.items()}
        self._log({**record, **sets}, group="validation")

    def finish(self, *, failed: bool = False) -> None:
        """Sends what is left, within a minute. A second call does nothing."""
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.finish(exit_code=1 if failed else 0)
        except Exception as error:  # as above
            self._fail(error)

    def _log(self, record: Mapping[str, Any], *, group: str) -> None:
        if self._run is None:
            return
        axes = {"step": record["step"], "tokens": record["tokens"]}
        numbers = {
            f"{group}/{key.removeprefix(f'{group}_')}": value
            for key, value in record.items()
            if key not in axes and isinstance(value, int | float) and math.isfinite(value)
        }
        try:
            self._run.log(axes | numbers)
        except Exception as error:  # as above
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._run = None
        log.warning("wandb failed", exc_info=error)
        self._say(f"wandb failed and is left out from here on; metrics.jsonl goes on ({_first_line(error)})")


Mode = Literal["off", "offline", "online"]


# What the config and the environment variable WANDB_MODE may say.
MODES: dict[str, Mode] = {"off": "off", "disabled": "off", "offline": "offline", "online": "online"}


def choose_mode(wanted: str) -> Mode:
    """What the config means here; looks at the environment, never at the network."""
    mode = MODES.get(os.environ.get("WANDB_MODE", "") if wanted == "auto" else wanted)
    if mode:
        return mode
    return "online" if is_logged_in() else "offline"


def is_logged_in() -> bool:
    """Whether the environment, or the netrc file that ``wandb login`` writes, has a key for wandb's server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        found = netrc.netrc(path).hosts.get(host)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):  # absent, unreadable or of another format
        return False
    return bool(found and found[2])


def run_id(folder: Path, *, resumed: bool) -> str:
    """The run's id in wandb, kept in ``wandb-id`` in its folder: a new one for a new run.

    It begins with the folder's name and ends at random, as two people may well use the same name in one project, and
    wandb never gives an id free.
    """
    path = folder / "wandb-id"
    if resumed and path.exists():
        return path.read_text(encoding="utf-8").strip()
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name)[:40]
    new = f"{readable}-{uuid.uuid4().hex[:8]}"
    path.write_text(new + "\n", encoding="utf-8")
    return new


def _first_line(error: Exception) -> str:
    first, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {first}"


def _start(
    mode: Literal["offline", "online"],
    identity: str,
    project: str,
    run_config: Mapping[str, Any],
    *,
    folder: Path,
    name: str,
) -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's reports on itself are an upload, too
    import wandb  # here, as it takes a second to import and `off` does without

    run = wandb.init(
        mode=mode,
        project=project,
        name=name,
        id=identity,
        resume="allow",
        dir=folder,
        config=dict(run_config),
        save_code=False,
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
        ),
    )
    # A resumed run repeats the steps after its checkpoint, which wandb's own counter refuses: ours is the axis.
    run.define_metric("*", step_metric="step")
    return run

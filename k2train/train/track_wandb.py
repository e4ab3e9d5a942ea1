"""Weights & Biases, all of it."""

from __future__ import annotations

import logging
import netrc
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from k2train.train.heat import picture

if TYPE_CHECKING:
    from k2train.train.track import Start

# Seconds given to the server at the start, and to the last uploads at the end; what is not sent then stays on disk.
INIT_TIMEOUT, FINISH_TIMEOUT = 30.0, 60.0
TITLE = 64  # characters of an alert's
COLUMNS = ("step", "tokens", "action", "what", "first sample", "last sample")
Mode = Literal["off", "offline", "online"]
# What the config and the environment variable WANDB_MODE may say.
MODES: dict[str, Mode] = {"off": "off", "disabled": "off", "offline": "offline", "online": "online"}
log = logging.getLogger(__name__)


class Wandb:
    """A run in wandb. One that goes on from a checkpoint keeps its id."""

    name = "wandb"

    def __init__(self, mode: Mode, *, project: str, group: str | None) -> None:
        """Prepares; wandb is not imported yet.

        Args:
            mode: offline or online; without a login online is offline.
            project: of wandb.
            group: of runs, in the project; None: that of the environment variable WANDB_RUN_GROUP, or none.
        """
        self._mode, self._project, self._group = mode, project, group
        self._run: Any = None
        self._incidents: list[list[Any]] = []

    def open(self, start: Start, say: Callable[[str], None]) -> None:
        """See ``Backend``."""
        mode = self._mode
        if mode == "online" and not is_logged_in():  # wandb would ask for a key, at a terminal that nobody sees
            mode = "offline"
            say("wandb: track.wandb=online needs a login; type `wandb login`, or set WANDB_API_KEY, before the run")
        identity = run_id(start.folder, resumed=start.resumed)
        self._run = self._go_online(identity, start, say) if mode == "online" else None
        if self._run is None:
            self._run = self._start("offline", identity, start)
            why = "" if is_logged_in() else " as there is no login"
            say(f"wandb: offline{why}; to upload the run later: wandb sync {start.folder / 'wandb'}/offline-run-*")
        self._incidents = [_row(record) for record in start.incidents]

    def numbers(self, values: Mapping[str, float], *, step: int, tokens: int) -> None:
        """See ``Backend``."""
        self._run.log({"step": step, "tokens": tokens, **values})

    def heat_map(self, name: str, rows: Sequence[Sequence[float]], *, step: int, tokens: int) -> None:
        """See ``Backend``."""
        import wandb

        pixels, low, high = picture(rows)
        image = wandb.Image(pixels, caption=f"from {low:.4g} to {high:.4g}; a row for each layer")
        self._run.log({"step": step, "tokens": tokens, name: image})

    def incident(self, record: Mapping[str, Any]) -> None:
        """See ``Backend``: an alert, and the table of all incidents anew."""
        import wandb

        found = record["incident"]
        sentence = f"step {record['step']:,}: {found['sentence']}"
        level = "WARN" if found["action"] in ("logged", "warned") else "ERROR"
        self._run.alert(title=sentence[: TITLE - 1], text=f"{sentence} ({found['action']})", level=level)
        self._incidents.append(_row(record))
        table = wandb.Table(columns=list(COLUMNS), data=list(self._incidents))
        self._run.log({"step": record["step"], "tokens": record["tokens"], "incidents": table})

    def close(self, *, failed: bool) -> None:
        """See ``Backend``."""
        self._run.finish(exit_code=1 if failed else 0)

    def _go_online(self, identity: str, start: Start, say: Callable[[str], None]) -> Any:
        """The run at the server, or None if that cannot be reached."""
        try:
            run = self._start("online", identity, start)
        except Exception as error:  # wandb's errors are of many kinds; whatever it is, offline is left
            import wandb

            log.warning("wandb failed to go online", exc_info=error)
            say(f"wandb: no connection to the server ({type(error).__name__}: {str(error).strip().splitlines()[0]})")
            wandb.teardown()  # it holds the id otherwise
            return None
        say(f"wandb: online, at {run.url}")
        return run

    def _start(self, mode: Literal["offline", "online"], identity: str, start: Start) -> Any:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's reports on itself are an upload, too
        import wandb  # here, as it takes a second to import and `off` does without

        run = wandb.init(
            mode=mode,
            project=self._project,
            group=self._group,
            name=start.name,
            id=identity,
            resume="allow",
            dir=start.folder,
            config=dict(start.config),
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
        # A resumed run repeats the steps after its checkpoint, which wandb's own counter refuses: ours are the axes.
        run.define_metric("*", step_metric="step")
        run.define_metric("by_tokens/*", step_metric="tokens")
        return run


def _row(record: Mapping[str, Any]) -> list[Any]:
    """Of the table of incidents."""
    found = record["incident"]
    first, end = found.get("samples", (None, None))
    last = None if end is None else end - 1
    return [record["step"], record["tokens"], found["action"], found["sentence"], first, last]


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
